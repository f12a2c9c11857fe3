-- Everything the loader needs, version 3. Idempotent; upgrades older versions; needs no extension.
--
-- psql applies this file as it is (psql -f schema.sql). `loader init` runs its statements one by one, each in a
-- transaction of its own, and repeats one that could not get a lock.
--
-- Whatever changes a table here must keep it loadable by the loader of the version before.
--
-- Other roles may create functions, operators and types in the schema of the tables (until PostgreSQL 14 everybody
-- could in "public"), and this file may be applied by a superuser. So no name is looked up where they could have
-- put one: each statement sets its own search path, functions are qualified, and both sides of an operator have
-- exactly the types of an operator of pg_catalog, which is searched first.

DO $tables$
DECLARE
    caller_path CONSTANT pg_catalog.text := pg_catalog.current_setting('search_path');
    caller_schemas CONSTANT pg_catalog.name[] := pg_catalog.current_schemas(false);
    existing CONSTANT pg_catalog.oid := pg_catalog.to_regclass('analytics_events');
    families CONSTANT pg_catalog.oid := pg_catalog.to_regclass('family_units');
    home pg_catalog.name;
    is_versioned pg_catalog.bool;
    is_upgrade pg_catalog.bool;
    version_before pg_catalog.int4;
    choice pg_catalog.text := pg_catalog.current_setting('analytics.foreign_keys', true);
    foreign_name pg_catalog.name;
    foreign_owner pg_catalog.name;
BEGIN
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    PERFORM pg_catalog.set_config('lock_timeout', '1s', true);
    PERFORM pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtext('analytics_schema'));  -- one at a time

    -- The tables stay in the schema in which they are; new ones go to the first schema of the caller's search path.
    home := coalesce(
        (SELECT nspname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE pg_class.oid = existing),
        (SELECT schema.name FROM unnest(caller_schemas) WITH ORDINALITY AS schema (name, place)
            WHERE left(schema.name::text, 3) <> 'pg_' ORDER BY place LIMIT 1)
    );
    IF home IS NULL THEN
        RAISE EXCEPTION 'the search path "%" names no schema to create the tables in: create one, or change it', caller_path;
    END IF;

    -- pg_catalog is searched first because it is not named; named first, tables would be created in it.
    PERFORM pg_catalog.set_config('search_path', pg_catalog.format('%I, pg_temp', home), true);

    is_versioned := pg_catalog.to_regclass('analytics_schema') IS NOT NULL;
    is_upgrade := pg_catalog.to_regclass('analytics_loads') IS NOT NULL;

    -- Which versions were applied, and when; version 1 did not record it.
    CREATE TABLE IF NOT EXISTS analytics_schema (
        version INTEGER PRIMARY KEY,
        applied_at TIMESTAMPTZ NOT NULL DEFAULT pg_catalog.now()
    );
    -- What was chosen when the schema was applied: foreign_keys is on or off.
    CREATE TABLE IF NOT EXISTS analytics_settings (
        name TEXT PRIMARY KEY,
        value TEXT NOT NULL
    );

    CREATE TABLE IF NOT EXISTS analytics_events (
        id UUID PRIMARY KEY DEFAULT pg_catalog.gen_random_uuid(),
        event_id UUID UNIQUE NOT NULL,
        event_type VARCHAR(100) NOT NULL,
        timestamp TIMESTAMPTZ NOT NULL,
        user_id UUID NOT NULL,
        family_unit_id UUID NOT NULL,
        session_id UUID,
        metadata JSONB NOT NULL DEFAULT '{}',
        created_at TIMESTAMPTZ DEFAULT pg_catalog.now()
    );

    CREATE TABLE IF NOT EXISTS analytics_metrics (
        id UUID PRIMARY KEY DEFAULT pg_catalog.gen_random_uuid(),
        metric_name VARCHAR(100) NOT NULL,
        metric_type VARCHAR(50) NOT NULL,
        value NUMERIC NOT NULL,
        labels JSONB DEFAULT '{}',
        timestamp TIMESTAMPTZ NOT NULL,
        created_at TIMESTAMPTZ DEFAULT pg_catalog.now()
    );

    -- The ledger: one row per chunk of a file, written in the transaction of its rows and keyed by a digest of its
    -- bytes, so that a chunk that is copied, renamed or read again after a crash is known.
    CREATE TABLE IF NOT EXISTS analytics_loads (
        digest BYTEA PRIMARY KEY,
        file TEXT NOT NULL,
        byte_offset BIGINT NOT NULL,
        bytes BIGINT NOT NULL,
        lines BIGINT NOT NULL,
        events BIGINT NOT NULL,
        metrics BIGINT NOT NULL,
        duplicates BIGINT NOT NULL,
        rejected BIGINT NOT NULL,
        loader_host TEXT NOT NULL,
        loaded_at TIMESTAMPTZ NOT NULL DEFAULT pg_catalog.now(),
        CONSTRAINT every_line_is_accounted_for CHECK (lines = events + metrics + duplicates + rejected)
    );

    -- Triggers, defaults and checks of a table, and functions of a view, run with the rights of whoever uses it. From
    -- here on, tables are used: those that exist now cannot be exchanged by anybody but their owner.
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    SELECT relname, rolname INTO foreign_name, foreign_owner
        FROM pg_class
        JOIN pg_namespace ON pg_namespace.oid = relnamespace
        JOIN pg_roles AS table_owner ON table_owner.oid = relowner
        WHERE nspname = home AND NOT rolsuper
            AND relname IN ('analytics_schema', 'analytics_settings', 'analytics_events', 'analytics_metrics',
                'analytics_loads', 'analytics_events_daily', 'analytics_metrics_hourly', 'analytics_missing_segments')
            AND ((SELECT rolsuper FROM pg_roles WHERE rolname = current_user) OR NOT pg_has_role(relowner, 'USAGE'))
        ORDER BY relname
        LIMIT 1;
    IF foreign_name IS NOT NULL THEN
        RAISE EXCEPTION 'the table "%" belongs to the role "%", whose triggers would run with the rights of "%": connect as "%"',
            foreign_name, foreign_owner, current_user, foreign_owner;
    END IF;
    PERFORM set_config('search_path', format('%I, pg_temp', home), true);

    version_before := CASE WHEN is_versioned THEN coalesce((SELECT pg_catalog.max(version) FROM analytics_schema), 1)
        WHEN is_upgrade THEN 1 ELSE 0 END;
    IF version_before > 3 THEN
        RAISE EXCEPTION 'the tables are newer than version 3, nothing was changed: upgrade the loader';
    END IF;
    INSERT INTO analytics_schema (version) VALUES (3) ON CONFLICT DO NOTHING;

    -- What exists is left alone: CREATE INDEX IF NOT EXISTS and ADD COLUMN IF NOT EXISTS lock the table first.

    -- Which segment of which writer a file is; NULL for every other file, such as a retried reject file. Generated, so
    -- that rows of older versions and of older loaders have it too. The pattern is that of spool.segment.SegmentName.
    IF NOT EXISTS (
        SELECT FROM pg_catalog.pg_attribute WHERE attname = 'segment'
            AND attrelid = pg_catalog.to_regclass('analytics_loads')::pg_catalog.oid
    ) THEN
        ALTER TABLE analytics_loads
            ADD COLUMN IF NOT EXISTS writer TEXT GENERATED ALWAYS AS (substring(file FROM
                '(?:^|/)[0-9]{8}T[0-9]{6}[.][0-9]{6}Z-([A-Za-z0-9.-]{1,64}-[0-9a-f]{8}-[0-9]+-[0-9a-f]{8})-[0-9]{6,18}[.]ndjson(?:[.]gz|[.]zst)?$'
            )) STORED,
            ADD COLUMN IF NOT EXISTS segment BIGINT GENERATED ALWAYS AS (substring(file FROM
                '(?:^|/)[0-9]{8}T[0-9]{6}[.][0-9]{6}Z-[A-Za-z0-9.-]{1,64}-[0-9a-f]{8}-[0-9]+-[0-9a-f]{8}-([0-9]{6,18})[.]ndjson(?:[.]gz|[.]zst)?$'
            )::bigint) STORED;
    END IF;

    IF pg_catalog.to_regclass('analytics_events_type_time') IS NULL THEN
        CREATE INDEX analytics_events_type_time ON analytics_events (event_type, timestamp);
    END IF;
    IF pg_catalog.to_regclass('analytics_events_user_time') IS NULL THEN
        CREATE INDEX analytics_events_user_time ON analytics_events (user_id, timestamp);
    END IF;
    IF pg_catalog.to_regclass('analytics_events_family_time') IS NULL THEN
        CREATE INDEX analytics_events_family_time ON analytics_events (family_unit_id, timestamp);
    END IF;
    IF pg_catalog.to_regclass('analytics_metrics_name_time') IS NULL THEN
        CREATE INDEX analytics_metrics_name_time ON analytics_metrics (metric_name, timestamp);
    END IF;
    -- For rows that were loaded recently, and for rows that are old enough to be pruned.
    IF pg_catalog.to_regclass('analytics_loads_loaded_at') IS NULL THEN
        CREATE INDEX analytics_loads_loaded_at ON analytics_loads (loaded_at);
    END IF;

    -- Views for reading.

    CREATE OR REPLACE VIEW analytics_events_daily AS
    SELECT pg_catalog.date_trunc('day', timestamp) AS day, event_type, pg_catalog.count(*) AS events,
        pg_catalog.count(DISTINCT user_id) AS users, pg_catalog.count(DISTINCT family_unit_id) AS families
    FROM analytics_events
    GROUP BY 1, 2;

    CREATE OR REPLACE VIEW analytics_metrics_hourly AS
    SELECT pg_catalog.date_trunc('hour', timestamp) AS hour, metric_name, labels, pg_catalog.count(*) AS records,
        pg_catalog.sum(value) AS sum, pg_catalog.avg(value) AS average,
        pg_catalog.min(value) AS minimum, pg_catalog.max(value) AS maximum
    FROM analytics_metrics
    GROUP BY 1, 2, 3;

    -- Each writer counts its segments from 1 without gaps, so a number that is missing below a loaded one is a
    -- file that was lost, or that waits to be loaded.
    CREATE OR REPLACE VIEW analytics_missing_segments AS
    WITH counted AS (
        SELECT writer, pg_catalog.max(segment) AS last FROM analytics_loads WHERE writer IS NOT NULL GROUP BY writer
    )
    SELECT writer, number FROM counted, pg_catalog.generate_series(1, last) AS number
    EXCEPT
    SELECT writer, segment FROM analytics_loads WHERE writer IS NOT NULL;

    -- Whether there are foreign keys is remembered. Older versions did not: their tables keep what they have.
    IF choice IN ('on', 'off') THEN
        INSERT INTO analytics_settings (name, value) VALUES ('foreign_keys', choice)
            ON CONFLICT (name) DO UPDATE SET value = excluded.value;
    ELSIF coalesce(choice, '') <> '' THEN
        RAISE EXCEPTION 'analytics.foreign_keys is "%": set it to on or off', choice;
    ELSE
        INSERT INTO analytics_settings (name, value)
        SELECT 'foreign_keys', CASE WHEN is_upgrade
            AND (families IS NOT NULL OR EXISTS (
                SELECT FROM pg_catalog.pg_class JOIN pg_catalog.pg_namespace ON pg_namespace.oid = relnamespace
                WHERE nspname = 'auth' AND relname = 'users'))
            AND NOT EXISTS (
                SELECT FROM pg_catalog.pg_constraint
                WHERE contype = 'f' AND conrelid = pg_catalog.to_regclass('analytics_events')::pg_catalog.oid)
            THEN 'off' ELSE 'on' END
        ON CONFLICT (name) DO NOTHING;
    END IF;

    -- For `loader init`.
    PERFORM pg_catalog.set_config('analytics.version_before', version_before::text, true);
    PERFORM pg_catalog.set_config('analytics.foreign_keys', value, true)
        FROM analytics_settings WHERE name = 'foreign_keys';
    PERFORM pg_catalog.set_config('search_path', caller_path, true);
END
$tables$;

-- Foreign keys to the application's own tables, if they exist. They are added without a look at the rows, which takes
-- no time, or dropped. With psql: SET analytics.foreign_keys = off; (or on) before the file. A key that cannot be added
-- is reported and keeps nothing else from being applied.
DO $foreign_keys$
DECLARE
    caller_path CONSTANT pg_catalog.text := pg_catalog.current_setting('search_path');
    events CONSTANT pg_catalog.regclass := pg_catalog.to_regclass('analytics_events');
    families CONSTANT pg_catalog.oid := pg_catalog.to_regclass('family_units');
    users pg_catalog.oid;
    wanted pg_catalog.text;
    child pg_catalog.name;
    parent pg_catalog.regclass;
    parent_type pg_catalog.regtype;
    key pg_catalog.name;
BEGIN
    IF events IS NULL THEN
        RAISE EXCEPTION 'the table "analytics_events" does not exist';
    END IF;
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    PERFORM set_config('lock_timeout', '1s', true);
    EXECUTE (
        SELECT format('SELECT value FROM %I.analytics_settings WHERE name = ''foreign_keys''', nspname)
        FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
        WHERE pg_class.oid = events
    ) INTO wanted;
    users := (
        SELECT pg_class.oid FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
        WHERE nspname = 'auth' AND relname = 'users'
    );

    FOR key, parent IN
        SELECT conname, confrelid
        FROM pg_constraint
        JOIN pg_class ON pg_class.oid = confrelid
        JOIN pg_namespace ON pg_namespace.oid = relnamespace
        WHERE wanted = 'off' AND contype = 'f' AND conrelid = events AND conparentid = 0
            AND (relname = 'family_units' OR (nspname = 'auth' AND relname = 'users'))
    LOOP
        BEGIN
            EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', events, key);
            RAISE NOTICE 'dropped the foreign key to %', parent;
        EXCEPTION WHEN OTHERS THEN
            RAISE WARNING 'could not drop the foreign key to %: %; apply the schema again', parent, SQLERRM
                USING ERRCODE = SQLSTATE;
        END;
    END LOOP;

    FOR child, parent IN
        SELECT link.child, link.parent
        FROM (VALUES ('user_id', users), ('family_unit_id', families)) AS link (child, parent)
        WHERE wanted = 'on' AND link.parent IS NOT NULL AND NOT EXISTS (
            SELECT FROM pg_constraint JOIN pg_attribute ON attrelid = conrelid AND attnum = conkey[1]
            WHERE contype = 'f' AND conrelid = events AND confrelid = link.parent AND attname = link.child
        )
    LOOP
        BEGIN
            parent_type := (SELECT atttypid FROM pg_attribute WHERE attrelid = parent AND attname = 'id');
            IF parent_type IS DISTINCT FROM 'uuid'::regtype THEN
                RAISE EXCEPTION 'its column "id" has the type %, not uuid', coalesce(parent_type::text, 'none')
                    USING ERRCODE = 'datatype_mismatch';
            END IF;
            EXECUTE format('ALTER TABLE %s ADD FOREIGN KEY (%I) REFERENCES %s (id) NOT VALID', events, child, parent);
            RAISE NOTICE 'added the foreign key from "%" to %', child, parent;
        EXCEPTION WHEN OTHERS THEN
            RAISE WARNING 'could not add the foreign key from "%" to %: %; correct that and apply the schema again, or leave the keys out',
                child, parent, SQLERRM USING ERRCODE = SQLSTATE;
        END;
    END LOOP;
    PERFORM set_config('search_path', caller_path, true);
END
$foreign_keys$;

-- The rows that existed before a key was added are checked here; loading goes on in the meantime. A key that some rows
-- violate stays as it is: it holds for new rows.
DO $validation$
DECLARE
    caller_path CONSTANT pg_catalog.text := pg_catalog.current_setting('search_path');
    events CONSTANT pg_catalog.regclass := pg_catalog.to_regclass('analytics_events');
    key pg_catalog.name;
    parent pg_catalog.regclass;
BEGIN
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    PERFORM set_config('lock_timeout', '1s', true);
    FOR key, parent IN
        SELECT conname, confrelid
        FROM pg_constraint
        JOIN pg_class ON pg_class.oid = confrelid
        JOIN pg_namespace ON pg_namespace.oid = relnamespace
        WHERE contype = 'f' AND conrelid = events AND NOT convalidated
            AND (relname = 'family_units' OR (nspname = 'auth' AND relname = 'users'))
    LOOP
        BEGIN
            EXECUTE format('ALTER TABLE %s VALIDATE CONSTRAINT %I', events, key);
        EXCEPTION WHEN OTHERS THEN
            RAISE WARNING 'the foreign key to % holds for new rows only: %; remove such rows and apply the schema again',
                parent, SQLERRM USING ERRCODE = SQLSTATE;
        END;
    END LOOP;
    PERFORM set_config('search_path', caller_path, true);
END
$validation$;
