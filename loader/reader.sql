-- A least-privilege role for reading: SELECT on the tables, rollups and views, EXECUTE on the questions, and a
-- statement timeout of 30 s. The setting analytics.reader is its name; it is created, without a password, if it
-- does not exist. `loader init --reader NAME` applies this after schema.sql; with psql: SET analytics.reader =
-- 'analytics_reader'; before the file.
--
-- Names are looked up only in pg_catalog, because a superuser may run this (see schema.sql).

DO $reader$
DECLARE
    caller_path CONSTANT pg_catalog.text := pg_catalog.current_setting('search_path');
    events CONSTANT pg_catalog.oid := pg_catalog.to_regclass('analytics_events');
    reader CONSTANT pg_catalog.name := pg_catalog.current_setting('analytics.reader');
    home pg_catalog.name;
    home_oid pg_catalog.oid;
    events_owner pg_catalog.oid;
    readable pg_catalog.text;
    question pg_catalog.regprocedure;
BEGIN
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    SELECT nspname, pg_namespace.oid, relowner INTO home, home_oid, events_owner
        FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE pg_class.oid = events;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = reader) THEN
        BEGIN
            EXECUTE format('CREATE ROLE %I LOGIN', reader);
            RAISE NOTICE 'created the role "%", without a password', reader;
        EXCEPTION WHEN duplicate_object OR unique_violation THEN
            RAISE EXCEPTION 'the role "%" was created for another database at the same time: try again', reader
                USING ERRCODE = 'lock_not_available';  -- `loader init` does
        END;
    ELSIF pg_has_role(reader, events_owner, 'MEMBER') THEN
        RAISE EXCEPTION 'the role "%" may act as the owner of the tables: give the reader a role of its own', reader;
    END IF;
    readable := (
        SELECT string_agg(format('%I.%I', home, relation), ', ') FROM unnest(ARRAY[
            'analytics_events', 'analytics_metrics', 'analytics_loads', 'analytics_schema', 'analytics_touched',
            'analytics_sealed', 'analytics_hourly_events', 'analytics_hourly_metrics', 'analytics_user_days',
            'analytics_events_daily', 'analytics_metrics_hourly', 'analytics_missing_segments']) AS relation
    );
    EXECUTE format('REVOKE ALL ON %s FROM %I', readable, reader);
    EXECUTE format('GRANT SELECT ON %s TO %I', readable, reader);
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO %I', home, reader);
    RAISE NOTICE 'granted to "%": USAGE on the schema %, SELECT on the tables, rollups and views, EXECUTE on the questions',
        reader, quote_ident(home);
    -- In case EXECUTE was revoked from PUBLIC. Functions that change a rollup are never granted to PUBLIC.
    FOR question IN
        SELECT oid FROM pg_proc
        WHERE pronamespace = home_oid AND starts_with(proname::text, 'analytics_') AND provolatile <> 'v'
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %I', question, reader);
    END LOOP;
    IF NOT has_database_privilege(reader, current_database(), 'CONNECT') THEN
        EXECUTE format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), reader);
    END IF;
    -- A dashboard runs any SQL entered by its users. The role can override these settings: they prevent
    -- accidents.
    EXECUTE format('ALTER ROLE %I IN DATABASE %I SET statement_timeout = ''30s''', reader, current_database());
    EXECUTE format('ALTER ROLE %I IN DATABASE %I SET default_transaction_read_only = on', reader, current_database());
    -- Compiling the plan of a question took 4.4 of 4.5 s (PostgreSQL 15), because the planner overestimates
    -- empty buckets.
    EXECUTE format('ALTER ROLE %I IN DATABASE %I SET jit = off', reader, current_database());
    PERFORM set_config('search_path', caller_path, true);
END
$reader$;
