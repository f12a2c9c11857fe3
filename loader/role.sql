-- A role that may load and nothing else: it reads and adds rows, and can't change, remove or truncate any.
-- Its name is the setting analytics.role; it is made, without a password, where it is missing. `loader init
-- --role NAME` applies this; with psql: SET analytics.role = 'analytics_loader'; before the file.

DO $$
DECLARE
    loader CONSTANT NAME := current_setting('analytics.role');
    tables CONSTANT TEXT := 'analytics_events, analytics_metrics, analytics_loads, analytics_schema';
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = loader) THEN
        EXECUTE format('CREATE ROLE %I LOGIN', loader);
    ELSIF pg_has_role(loader, (SELECT relowner FROM pg_class WHERE oid = 'analytics_events'::regclass), 'MEMBER') THEN
        RAISE EXCEPTION 'the role % may act as the owner of the tables: give the loader a role of its own', loader;
    END IF;
    EXECUTE format('REVOKE ALL ON %s FROM %I', tables, loader);
    EXECUTE format('GRANT SELECT ON %s, analytics_missing_segments TO %I', tables, loader);
    EXECUTE format('GRANT INSERT ON analytics_events, analytics_metrics, analytics_loads TO %I', loader);
    EXECUTE format('GRANT SELECT, INSERT ON analytics_touched TO %I', loader);
    -- The questions (`loader ask`, `loader report`) are often asked with the loader's own DSN.
    EXECUTE format('GRANT SELECT ON analytics_sealed, analytics_hourly_events, analytics_hourly_metrics, '
        'analytics_user_days TO %I', loader);
    EXECUTE format('GRANT EXECUTE ON FUNCTION analytics_refresh, analytics_rebuild, analytics_mark TO %I', loader);
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO %I', current_schema, loader);
    -- Rows that may be there already are compared in a temporary table. Everybody may connect and make one where
    -- nobody took that away.
    IF NOT has_database_privilege(loader, current_database(), 'CONNECT')
        OR NOT has_database_privilege(loader, current_database(), 'TEMPORARY')
    THEN
        EXECUTE format('GRANT CONNECT, TEMPORARY ON DATABASE %I TO %I', current_database(), loader);
    END IF;
END
$$;
