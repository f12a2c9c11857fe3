-- A least-privilege role for loading: it may read and add rows, but not update, delete or truncate them. The
-- setting analytics.role is its name; it is created, without a password, if it does not exist. `loader init
-- --role NAME` applies this after schema.sql; with psql: SET analytics.role = 'analytics_loader'; before the
-- file.
--
-- Names are looked up only in pg_catalog, because a superuser may run this (see schema.sql).

DO $role$
DECLARE
    caller_path CONSTANT pg_catalog.text := pg_catalog.current_setting('search_path');
    events CONSTANT pg_catalog.oid := pg_catalog.to_regclass('analytics_events');
    loader CONSTANT pg_catalog.name := pg_catalog.current_setting('analytics.role');
    home pg_catalog.name;
    events_owner pg_catalog.oid;
    tables pg_catalog.text;
    loaded pg_catalog.text;
BEGIN
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    SELECT nspname, relowner INTO home, events_owner
        FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE pg_class.oid = events;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = loader) THEN
        BEGIN
            EXECUTE format('CREATE ROLE %I LOGIN', loader);
            RAISE NOTICE 'created the role "%", without a password', loader;
        EXCEPTION WHEN duplicate_object OR unique_violation THEN
            RAISE EXCEPTION 'the role "%" was created for another database at the same time: try again', loader
                USING ERRCODE = 'lock_not_available';  -- `loader init` does
        END;
    ELSIF pg_has_role(loader, events_owner, 'MEMBER') THEN
        RAISE EXCEPTION 'the role "%" may act as the owner of the tables: give the loader a role of its own', loader;
    END IF;
    loaded := format(
        '%1$I.analytics_events, %1$I.analytics_metrics, %1$I.analytics_loads, %1$I.analytics_writers', home);
    tables := format('%2$s, %1$I.analytics_schema, %1$I.analytics_settings', home, loaded);
    EXECUTE format('REVOKE ALL ON %s FROM %I', tables, loader);
    EXECUTE format('GRANT SELECT ON %1$s, %2$I.analytics_missing_segments, %2$I.analytics_conservation TO %3$I',
        tables, home, loader);
    EXECUTE format('GRANT INSERT ON %s TO %I', loaded, loader);
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO %I', home, loader);
    RAISE NOTICE 'granted to "%": USAGE on the schema %, SELECT on %, INSERT on %',
        loader, quote_ident(home), tables, loaded;
    -- For marks of touched hours, the daemon's refresh, and the questions, which are often run with the
    -- loader's DSN.
    EXECUTE format('GRANT SELECT, INSERT ON %I.analytics_touched TO %I', home, loader);
    EXECUTE format('GRANT SELECT ON %1$I.analytics_sealed, %1$I.analytics_hourly_events, %1$I.analytics_hourly_metrics, '
        '%1$I.analytics_user_days TO %2$I', home, loader);
    EXECUTE format('GRANT EXECUTE ON FUNCTION %1$I.analytics_refresh, %1$I.analytics_rebuild, %1$I.analytics_mark, '
        '%1$I.analytics_make_partitions, %1$I.analytics_merge_loads TO %2$I', home, loader);
    RAISE NOTICE 'granted to "%": SELECT on the rollups, INSERT on their marks, EXECUTE on their refresh', loader;
    -- Who was erased, which each load looks up.
    EXECUTE format('GRANT SELECT ON %1$I.analytics_erasures, %1$I.analytics_erasure_keys TO %2$I', home, loader);
    RAISE NOTICE 'granted to "%": SELECT on the erasures and their keys', loader;
    -- Rows that may exist are compared in a temporary table. By default every role may connect and create
    -- one.
    IF NOT has_database_privilege(loader, current_database(), 'CONNECT')
        OR NOT has_database_privilege(loader, current_database(), 'TEMPORARY')
    THEN
        EXECUTE format('GRANT CONNECT, TEMPORARY ON DATABASE %I TO %I', current_database(), loader);
        RAISE NOTICE 'granted to "%": CONNECT and TEMPORARY on the database %', loader, quote_ident(current_database());
    END IF;
    PERFORM set_config('search_path', caller_path, true);
END
$role$;
