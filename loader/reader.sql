-- A role that may read and nothing else: SELECT on the tables, rollups and views, EXECUTE on the questions, statements
-- of at most 30 s. Its name is the setting analytics.reader; it is created, without a password, if it does not exist.
-- `loader init --reader NAME` applies this; with psql: SET analytics.reader = 'analytics_reader'; before the file.

DO $$
DECLARE
    reader CONSTANT NAME := current_setting('analytics.reader');
    place CONSTANT NAME := (
        SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = 'analytics_events'::regclass
    );
    tables CONSTANT TEXT := 'analytics_events, analytics_metrics, analytics_loads, analytics_schema, analytics_touched, '
        'analytics_sealed, analytics_hourly_events, analytics_hourly_metrics, analytics_user_days, analytics_events_daily, '
        'analytics_metrics_hourly, analytics_missing_segments';
    question REGPROCEDURE;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = reader) THEN
        EXECUTE format('CREATE ROLE %I LOGIN', reader);
    ELSIF pg_has_role(reader, (SELECT relowner FROM pg_class WHERE oid = 'analytics_events'::regclass), 'MEMBER') THEN
        RAISE EXCEPTION 'the role "%" may act as the owner of the tables', reader
            USING HINT = 'Give the reader a role of its own.';
    END IF;
    EXECUTE format('REVOKE ALL ON %s FROM %I', tables, reader);
    EXECUTE format('GRANT SELECT ON %s TO %I', tables, reader);
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO %I', place, reader);
    -- Where EXECUTE is taken from everybody. What changes a rollup is not granted to everybody to begin with.
    FOR question IN
        SELECT p.oid FROM pg_proc p
        WHERE p.pronamespace = quote_ident(place)::regnamespace AND p.proname LIKE 'analytics\_%' AND p.provolatile <> 'v'
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %I', question, reader);
    END LOOP;
    IF NOT has_database_privilege(reader, current_database(), 'CONNECT') THEN
        EXECUTE format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), reader);
    END IF;
    -- A dashboard runs whatever SQL it is given. The role itself can lift both; they guard against accidents.
    EXECUTE format('ALTER ROLE %I IN DATABASE %I SET statement_timeout = ''30s''', reader, current_database());
    EXECUTE format('ALTER ROLE %I IN DATABASE %I SET default_transaction_read_only = on', reader, current_database());
END
$$;
