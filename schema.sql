-- Everything the loader needs, version 4. Idempotent; upgrades older versions; needs no extension.
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
    is_optional pg_catalog.bool;
    version_before pg_catalog.int4;
    choice pg_catalog.text := pg_catalog.current_setting('analytics.foreign_keys', true);
    identity_choice CONSTANT pg_catalog.text := pg_catalog.current_setting('analytics.identity', true);
    foreign_name pg_catalog.name;
    foreign_owner pg_catalog.name;
    grantee_name pg_catalog.name;
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
    -- What was chosen when the schema was applied: foreign_keys is on or off,
    -- identity is required, also without a row, or optional.
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

    -- What writers state about themselves (spool/account.py); the loader adds a row when that has changed. The last row
    -- of a writer counts: `lines` in its first `segments`, `begun` is the last segment that got a line, and the segments
    -- that were in the spool at that time with the lines in each.
    CREATE TABLE IF NOT EXISTS analytics_writers (
        writer TEXT NOT NULL,
        reported_at TIMESTAMPTZ NOT NULL DEFAULT pg_catalog.clock_timestamp(),
        segments BIGINT NOT NULL,
        lines BIGINT NOT NULL,
        begun BIGINT NOT NULL,
        dropped BIGINT NOT NULL,
        pending_segments BIGINT[] NOT NULL,
        pending_lines BIGINT[] NOT NULL,
        ended BOOLEAN NOT NULL,
        PRIMARY KEY (writer, reported_at)
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
                'analytics_loads', 'analytics_events_daily', 'analytics_metrics_hourly', 'analytics_missing_segments',
                'analytics_writers', 'analytics_conservation')
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
    IF version_before > 4 THEN
        RAISE EXCEPTION 'the tables are newer than version 4, nothing was changed: upgrade the loader';
    END IF;
    INSERT INTO analytics_schema (version) VALUES (4) ON CONFLICT DO NOTHING;

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

    -- ---- Since version 4: identity and conservation ----------------------------------------------------------------

    -- The UUID of a person or family that the application knows by an integer or a text: the twin of
    -- spool.analytics_uuid. A UUID of version 8: SHA-256 of the kind, a colon and the key in UTF-8.
    SELECT proname, rolname INTO foreign_name, foreign_owner
        FROM pg_catalog.pg_proc
        JOIN pg_catalog.pg_roles AS function_owner ON function_owner.oid = proowner
        WHERE NOT rolsuper
            AND pg_proc.oid = pg_catalog.to_regprocedure('analytics_uuid(pg_catalog.text, pg_catalog.text)')::pg_catalog.oid
            AND ((SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user)
                OR NOT pg_catalog.pg_has_role(proowner, 'USAGE'))
        LIMIT 1;
    IF foreign_name IS NOT NULL THEN
        RAISE EXCEPTION 'the function "%" belongs to the role "%", who may change what it does: connect as "%", or drop it',
            foreign_name, foreign_owner, foreign_owner;
    END IF;
    CREATE OR REPLACE FUNCTION analytics_uuid(kind TEXT, key TEXT) RETURNS UUID
        LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $function$
        SELECT pg_catalog.encode(pg_catalog.set_byte(pg_catalog.set_byte(hash,
                6, (pg_catalog.get_byte(hash, 6) OPERATOR(pg_catalog.&) 15) OPERATOR(pg_catalog.|) 128),
                8, (pg_catalog.get_byte(hash, 8) OPERATOR(pg_catalog.&) 63) OPERATOR(pg_catalog.|) 128),
            'hex')::pg_catalog.uuid
        FROM (SELECT pg_catalog.substr(pg_catalog.sha256(pg_catalog.convert_to(
            $1 OPERATOR(pg_catalog.||) ':'::pg_catalog.text OPERATOR(pg_catalog.||) $2, 'UTF8'
        )), 1, 16) AS hash) AS hashed
    $function$;
    COMMENT ON FUNCTION analytics_uuid IS
        'The UUID of a person or family that the application knows by an integer or a text: spool.analytics_uuid.';

    -- Whether events need a person and a family is remembered. Tables that exist already keep what they have.
    IF identity_choice IN ('required', 'optional') THEN
        INSERT INTO analytics_settings (name, value) VALUES ('identity', identity_choice)
            ON CONFLICT (name) DO UPDATE SET value = excluded.value;
    ELSIF coalesce(identity_choice, '') <> '' THEN
        RAISE EXCEPTION 'analytics.identity is "%": set it to required or optional', identity_choice;
    ELSE
        INSERT INTO analytics_settings (name, value)
        SELECT 'identity', 'optional' WHERE NOT EXISTS (
            SELECT FROM pg_catalog.pg_attribute
            WHERE attrelid = pg_catalog.to_regclass('analytics_events')::pg_catalog.oid
                AND attname IN ('user_id', 'family_unit_id') AND attnotnull
        ) ON CONFLICT (name) DO NOTHING;
    END IF;
    is_optional := EXISTS (SELECT FROM analytics_settings WHERE name = 'identity' AND value = 'optional');
    IF (is_optional OR identity_choice = 'required') AND EXISTS (
        SELECT FROM pg_catalog.pg_attribute
        WHERE attrelid = pg_catalog.to_regclass('analytics_events')::pg_catalog.oid
            AND attname IN ('user_id', 'family_unit_id') AND attnotnull = is_optional
    ) THEN
        IF is_optional THEN
            ALTER TABLE analytics_events
                ALTER COLUMN user_id DROP NOT NULL, ALTER COLUMN family_unit_id DROP NOT NULL;
            RAISE NOTICE 'events may have no user and no family';
        ELSIF EXISTS (SELECT FROM analytics_events WHERE user_id IS NULL OR family_unit_id IS NULL) THEN
            RAISE EXCEPTION 'some events have no user or no family, nothing was changed: delete them, or leave identity optional';
        ELSE
            ALTER TABLE analytics_events
                ALTER COLUMN user_id SET NOT NULL, ALTER COLUMN family_unit_id SET NOT NULL;
            RAISE NOTICE 'events need a user and a family';
        END IF;
    END IF;

    -- Where each line of each writer is: emitted = rows + duplicates + rejects + dropped + pending + missing. What a
    -- writer states about its first segments is compared with the ledger; of its later ones the ledger and the spool
    -- are the only witnesses. A segment that is neither in the ledger nor in the spool is missing. Of a chunk that was
    -- loaded again the first time counts, so a reject that was loaded later is still a reject here.
    CREATE OR REPLACE VIEW analytics_conservation AS
    WITH stated AS (
        SELECT DISTINCT ON (writer) * FROM analytics_writers ORDER BY writer, reported_at DESC
    ), loaded AS (
        SELECT writer, segment, pg_catalog.sum(lines) AS lines, pg_catalog.sum(events + metrics) AS rows,
            pg_catalog.sum(duplicates) AS duplicates, pg_catalog.sum(rejected) AS rejects
        FROM (
            SELECT DISTINCT ON (writer, segment, byte_offset) * FROM analytics_loads
            WHERE writer IS NOT NULL ORDER BY writer, segment, byte_offset, loaded_at
        ) AS once
        GROUP BY writer, segment
    ), pending AS (
        SELECT stated.writer, waiting.segment,
            greatest(waiting.lines::numeric - coalesce(loaded.lines, 0::numeric), 0::numeric) AS lines
        FROM stated
        CROSS JOIN LATERAL ROWS FROM (pg_catalog.unnest(pending_segments), pg_catalog.unnest(pending_lines))
            AS waiting (segment, lines)
        LEFT JOIN loaded ON loaded.writer = stated.writer AND loaded.segment = waiting.segment
    ), located AS (
        SELECT writer, segment, lines, rows, duplicates, rejects, 0::numeric AS pending FROM loaded
        UNION ALL
        SELECT writer, segment, lines, 0::numeric, 0::numeric, 0::numeric, lines FROM pending
    ), summed AS (
        SELECT coalesce(stated.writer, located.writer) AS writer,
            coalesce(pg_catalog.min(stated.lines), 0::bigint)::numeric AS stated_lines,
            coalesce(pg_catalog.min(stated.dropped), 0::bigint)::numeric AS dropped,
            -- Segments that a living writer began after its statement may be loaded in any order.
            CASE WHEN NOT pg_catalog.bool_and(stated.ended)
                THEN greatest(pg_catalog.min(stated.segments), pg_catalog.min(stated.begun))
                ELSE greatest(pg_catalog.min(stated.segments), pg_catalog.min(stated.begun), pg_catalog.max(segment))
            END AS last,
            pg_catalog.bool_and(stated.ended) AS ended,
            coalesce(pg_catalog.sum(located.lines) FILTER (WHERE segment <= stated.segments), 0::numeric) AS found,
            coalesce(pg_catalog.sum(located.lines) FILTER (WHERE segment > coalesce(stated.segments, 0::bigint)),
                0::numeric) AS found_later,
            coalesce(pg_catalog.sum(rows), 0::numeric) AS rows,
            coalesce(pg_catalog.sum(duplicates), 0::numeric) AS duplicates,
            coalesce(pg_catalog.sum(rejects), 0::numeric) AS rejects,
            coalesce(pg_catalog.sum(pending), 0::numeric) AS pending
        FROM stated FULL JOIN located ON located.writer = stated.writer
        GROUP BY 1
    ), absent AS (
        SELECT writer, pg_catalog.array_agg(
            writer || '-'::text || pg_catalog.repeat('0', 6 - pg_catalog.length(number::text)) || number::text
            ORDER BY number) AS segments
        FROM summed CROSS JOIN LATERAL pg_catalog.generate_series(1::bigint, last) AS number
        WHERE NOT EXISTS (SELECT FROM located WHERE located.writer = summed.writer AND segment = number)
        GROUP BY writer
    )
    SELECT summed.writer, (stated_lines + found_later + dropped)::bigint AS emitted, rows::bigint AS rows,
        duplicates::bigint AS duplicates, rejects::bigint AS rejects, dropped::bigint AS dropped,
        pending::bigint AS pending, (stated_lines - found)::bigint AS missing,
        coalesce(absent.segments, ARRAY[]::text[]) AS missing_segments, coalesce(ended, false) AS ended
    FROM summed LEFT JOIN absent ON absent.writer = summed.writer;

    -- Whoever may load may state what writers state, also if nobody names the role again at an upgrade.
    FOR grantee_name IN
        SELECT DISTINCT rolname FROM pg_catalog.pg_class
        CROSS JOIN LATERAL pg_catalog.aclexplode(relacl) AS acl
        JOIN pg_catalog.pg_roles AS grantee ON grantee.oid = acl.grantee
        WHERE version_before BETWEEN 1 AND 3 AND acl.privilege_type = 'INSERT' AND acl.grantee <> relowner
            AND pg_class.oid = pg_catalog.to_regclass('analytics_loads')::pg_catalog.oid
    LOOP
        EXECUTE pg_catalog.format('GRANT SELECT, INSERT ON analytics_writers TO %I', grantee_name);
        EXECUTE pg_catalog.format('GRANT SELECT ON analytics_conservation TO %I', grantee_name);
    END LOOP;

    -- ---- End of version 4: identity and conservation ---------------------------------------------------------------

    -- For `loader init`.
    PERFORM pg_catalog.set_config('analytics.version_before', version_before::text, true);
    PERFORM pg_catalog.set_config('analytics.foreign_keys', value, true)
        FROM analytics_settings WHERE name = 'foreign_keys';
    PERFORM pg_catalog.set_config('analytics.identity', CASE WHEN is_optional THEN 'optional' ELSE 'required' END, true);
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
