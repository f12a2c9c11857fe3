-- Everything the loader needs, version 5. Idempotent; upgrades older versions; needs no extension.
--
-- psql can apply this file directly (psql -f schema.sql). `loader init` applies the tables with the questions
-- in one transaction, then each step of the foreign keys in its own, and repeats a step that could not get a
-- lock.
--
-- Every change of a table here must keep it loadable by the loader of the previous version.
--
-- Other roles may create functions, operators and types in the schema of the tables (until PostgreSQL 14
-- every role could in "public"), and a superuser may apply this file. So no name may resolve to their
-- objects: each statement sets its own search path, functions are qualified, and both sides of an operator
-- have exactly the types of an operator in pg_catalog, which is searched first.

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
    layout_choice CONSTANT pg_catalog.text := pg_catalog.current_setting('analytics.layout', true);
    width_choice CONSTANT pg_catalog.text := pg_catalog.current_setting('analytics.width', true);
    is_new CONSTANT pg_catalog.bool :=
        pg_catalog.to_regclass('analytics_events') IS NULL AND pg_catalog.to_regclass('analytics_metrics') IS NULL;
    parent pg_catalog.name;
    key pg_catalog.name;
    foreign_name pg_catalog.name;
    foreign_owner pg_catalog.name;
    grantee_name pg_catalog.name;
BEGIN
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    PERFORM pg_catalog.set_config('lock_timeout', '1s', true);
    PERFORM pg_catalog.set_config('citus.multi_shard_modify_mode', 'sequential', true);  -- so that all fits into one transaction
    PERFORM pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtext('analytics_schema'));  -- one at a time

    -- Existing tables stay in their schema; new ones are created in the first schema of the caller's search path.
    home := coalesce(
        (SELECT nspname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE pg_class.oid = existing),
        (SELECT schema.name FROM unnest(caller_schemas) WITH ORDINALITY AS schema (name, place)
            WHERE left(schema.name::text, 3) <> 'pg_' ORDER BY place LIMIT 1)
    );
    IF home IS NULL THEN
        RAISE EXCEPTION 'the search path "%" has no schema in which to create the tables: create one, or change the search path', caller_path;
    END IF;

    -- pg_catalog is searched first because it is not named; named first, tables would be created in it.
    PERFORM pg_catalog.set_config('search_path', pg_catalog.format('%I, pg_temp', home), true);

    is_versioned := pg_catalog.to_regclass('analytics_schema') IS NOT NULL;
    is_upgrade := pg_catalog.to_regclass('analytics_loads') IS NOT NULL;

    -- The applied versions, with times; version 1 did not record itself.
    CREATE TABLE IF NOT EXISTS analytics_schema (
        version INTEGER PRIMARY KEY,
        applied_at TIMESTAMPTZ NOT NULL DEFAULT pg_catalog.now()
    );
    -- The choices made when the schema was applied: foreign_keys is on or off, identity is required (the default) or
    -- optional; layout is plain (the default), partitioned or citus, then partition_width is day, week or month.
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

    -- The partitioned layout: a row is in the partition of the time in its UUIDv7 (see "partitions" below).
    -- Ids before 2020 are in early; ids from 2039 on, such as most of version 4, are in other. Rows without a
    -- partition wait in default. citus is the same, distributed over the workers by the key; all other tables stay
    -- on the coordinator, so that the ledger row and the rows of its chunk commit together.
    IF coalesce(layout_choice, '') NOT IN ('', 'plain', 'partitioned', 'citus') THEN
        RAISE EXCEPTION 'analytics.layout is "%": set it to plain, partitioned or citus', layout_choice;
    ELSIF coalesce(width_choice, '') NOT IN ('', 'day', 'week', 'month') THEN
        RAISE EXCEPTION 'analytics.width is "%": set it to day, week or month', width_choice;
    END IF;
    IF pg_catalog.to_regclass('pg_catalog.pg_dist_partition') IS NOT NULL THEN  -- tables may have been distributed by hand
        INSERT INTO analytics_settings (name, value)
        SELECT 'layout', 'citus' FROM pg_catalog.pg_dist_partition
            WHERE logicalrelid::pg_catalog.oid = pg_catalog.to_regclass('analytics_events')::pg_catalog.oid
            ON CONFLICT (name) DO UPDATE SET value = excluded.value;
    ELSIF layout_choice = 'citus' THEN
        RAISE EXCEPTION 'this database is not a coordinator of Citus, nothing was changed: CREATE EXTENSION citus, and add the workers';
    END IF;
    IF layout_choice IN ('partitioned', 'citus') AND is_new THEN
        FOR parent, key IN VALUES ('analytics_events', 'event_id'), ('analytics_metrics', 'id') LOOP
            EXECUTE pg_catalog.format('ALTER TABLE %I RENAME TO analytics_model', parent);
            EXECUTE pg_catalog.format('CREATE TABLE %I (LIKE analytics_model INCLUDING DEFAULTS) PARTITION BY RANGE (%I)', parent, key);
            DROP TABLE analytics_model;
            EXECUTE pg_catalog.format('ALTER TABLE %I ADD PRIMARY KEY (%I)', parent, key);
            EXECUTE pg_catalog.format('CREATE TABLE %I PARTITION OF %I FOR VALUES FROM (MINVALUE) TO (%L)',
                parent || '_early', parent, '016f5e66-e800-0000-0000-000000000000');
            EXECUTE pg_catalog.format('CREATE TABLE %I PARTITION OF %I FOR VALUES FROM (%L) TO (MAXVALUE)',
                parent || '_other', parent, '02000000-0000-0000-0000-000000000000');
            EXECUTE pg_catalog.format('CREATE TABLE %I PARTITION OF %I DEFAULT', parent || '_default', parent);
        END LOOP;
        IF layout_choice = 'citus' THEN
            PERFORM pg_catalog.create_distributed_table('analytics_events', 'event_id');
            PERFORM pg_catalog.create_distributed_table('analytics_metrics', 'id', colocate_with => 'analytics_events');
        END IF;
        INSERT INTO analytics_settings (name, value) VALUES ('layout', layout_choice)
            ON CONFLICT (name) DO UPDATE SET value = excluded.value;
    ELSIF layout_choice <> '' AND layout_choice <> coalesce((SELECT value FROM analytics_settings WHERE name = 'layout'), 'plain') THEN
        IF layout_choice = 'partitioned' AND NOT EXISTS (SELECT FROM analytics_settings WHERE name = 'layout' AND value <> 'plain') THEN
            RAISE EXCEPTION 'the tables exist and are plain, nothing was changed: run "loader migrate --to partitioned"';
        ELSE
            RAISE EXCEPTION 'the tables exist, and their layout "%" cannot become "%", nothing was changed',
                coalesce((SELECT value FROM analytics_settings WHERE name = 'layout'), 'plain'), layout_choice;
        END IF;
    END IF;
    IF width_choice <> '' THEN  -- for partitions created from now on
        INSERT INTO analytics_settings (name, value) VALUES ('partition_width', width_choice)
            ON CONFLICT (name) DO UPDATE SET value = excluded.value;
    END IF;

    -- The ledger: one row per chunk of a file, written in the transaction of its rows and keyed by a digest of its
    -- bytes, so that a chunk that was copied, renamed or read again after a crash is recognized.
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
        erased BIGINT NOT NULL DEFAULT 0,
        expired BIGINT NOT NULL DEFAULT 0,
        segments BIGINT NOT NULL DEFAULT 1,
        digests BYTEA,
        first_loaded_at TIMESTAMPTZ,
        CONSTRAINT every_line_is_accounted_for
            CHECK (lines = events + metrics + duplicates + rejected + erased + expired)
    );

    -- The accounts of writers (spool/account.py); the loader adds a row when an account has changed. The last
    -- row of a writer is valid: `lines` are those in its first `segments`, `begun` is the last segment that
    -- received a line, and the pending segments were in the spool at that time, with their lines.
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

    -- Triggers, defaults and checks of a table, and functions in a view, run with the privileges of the role
    -- that uses it. Tables are used from here on, so existing ones must belong to a trusted owner, who alone
    -- can replace them.
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
        RAISE EXCEPTION 'the table "%" belongs to the role "%", whose triggers would run with the privileges of "%": connect as "%"',
            foreign_name, foreign_owner, current_user, foreign_owner;
    END IF;
    PERFORM set_config('search_path', format('%I, pg_temp', home), true);

    version_before := CASE WHEN is_versioned THEN coalesce((SELECT pg_catalog.max(version) FROM analytics_schema), 1)
        WHEN is_upgrade THEN 1 ELSE 0 END;
    IF version_before > 5 THEN
        RAISE EXCEPTION 'the tables are newer than version 5, nothing was changed: upgrade the loader';
    END IF;
    INSERT INTO analytics_schema (version) VALUES (5) ON CONFLICT DO NOTHING;

    -- Existing objects are skipped explicitly: CREATE INDEX IF NOT EXISTS and ADD COLUMN IF NOT EXISTS lock
    -- the table first.

    -- The writer and segment number of a file; NULL for other files, such as a retried reject file.
    -- Generated, so that rows of older versions and older loaders have them too. The pattern is that of
    -- spool.segment.SegmentName.
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

    IF pg_catalog.to_regclass('analytics_events_family_time') IS NULL THEN
        CREATE INDEX analytics_events_family_time ON analytics_events (family_unit_id, timestamp);
    END IF;
    IF pg_catalog.to_regclass('analytics_metrics_name_time') IS NULL THEN
        CREATE INDEX analytics_metrics_name_time ON analytics_metrics (metric_name, timestamp);
    END IF;
    -- For finding recently loaded rows, and rows that are old enough to be pruned.
    IF pg_catalog.to_regclass('analytics_loads_loaded_at') IS NULL THEN
        CREATE INDEX analytics_loads_loaded_at ON analytics_loads (loaded_at);
    END IF;

    -- ---- Since version 5: retention ---------------------------------------------------------------------------------

    -- `erased`: lines of erased people. `expired`: lines below the low-water mark of their table (analytics_kept_since), which were not loaded.
    -- A merged row (analytics_merge_loads) represents `segments` successive segments. It has the name of the first one,
    -- the sums of all, and the first 8 bytes of each digest, by which a segment that is read again is recognized.
    IF NOT EXISTS (
        SELECT FROM pg_catalog.pg_attribute WHERE attname = 'expired'
            AND attrelid = pg_catalog.to_regclass('analytics_loads')::pg_catalog.oid
    ) THEN
        ALTER TABLE analytics_loads
            ADD COLUMN IF NOT EXISTS erased BIGINT NOT NULL DEFAULT 0,
            ADD COLUMN IF NOT EXISTS expired BIGINT NOT NULL DEFAULT 0,
            ADD COLUMN IF NOT EXISTS segments BIGINT NOT NULL DEFAULT 1,
            ADD COLUMN IF NOT EXISTS digests BYTEA,
            ADD COLUMN IF NOT EXISTS first_loaded_at TIMESTAMPTZ;
        ALTER TABLE analytics_loads DROP CONSTRAINT IF EXISTS every_line_is_accounted_for;
        -- Not validated, because existing rows satisfy the stricter constraint that it replaces.
        ALTER TABLE analytics_loads ADD CONSTRAINT every_line_is_accounted_for
            CHECK (lines = events + metrics + duplicates + rejected + erased + expired) NOT VALID;
    END IF;
    IF EXISTS (
        SELECT FROM pg_catalog.pg_attribute WHERE attname = 'digests' AND attstorage <> 'e'
            AND attrelid = pg_catalog.to_regclass('analytics_loads')::pg_catalog.oid
    ) THEN
        ALTER TABLE analytics_loads ALTER COLUMN digests SET STORAGE EXTERNAL;  -- cannot be compressed
    END IF;
    IF pg_catalog.to_regclass('analytics_loads_segment') IS NULL THEN
        CREATE INDEX analytics_loads_segment ON analytics_loads (writer, segment) WHERE writer IS NOT NULL;
    END IF;
    IF pg_catalog.to_regclass('analytics_loads_merged') IS NULL THEN
        CREATE INDEX analytics_loads_merged ON analytics_loads (writer, segment) WHERE digests IS NOT NULL;
    END IF;

    -- ---- End of version 5: retention --------------------------------------------------------------------------------

    -- Views for reading. On Citus they stay on the coordinator, as the ledger does.

    PERFORM pg_catalog.set_config('citus.enable_ddl_propagation', 'off', true);
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

    -- Each writer counts its segments from 1 without gaps, so a missing number below a loaded one is a file
    -- that was lost, or is not loaded yet.
    CREATE OR REPLACE VIEW analytics_missing_segments AS
    WITH gaps AS (
        SELECT writer, segment AS until, coalesce(pg_catalog.max(segment + segments) OVER (
            PARTITION BY writer ORDER BY segment ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ), 1::bigint) AS since
        FROM analytics_loads WHERE writer IS NOT NULL
    )
    SELECT writer, number FROM gaps CROSS JOIN LATERAL pg_catalog.generate_series(since, until - 1::bigint) AS number;
    PERFORM pg_catalog.set_config('citus.enable_ddl_propagation', 'on', true);

    -- The choice of foreign keys is stored. Older versions did not store it: their tables stay as they are.
    IF EXISTS (SELECT FROM analytics_settings WHERE name = 'layout' AND value = 'citus') THEN
        IF choice = 'on' THEN
            RAISE EXCEPTION 'Citus allows no foreign keys from distributed tables to local ones, nothing was changed: leave --foreign-keys out';
        END IF;
        choice := 'off';
    END IF;
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

    -- The UUID of a person or family that the application identifies by an integer or a text, as computed by
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
        RAISE EXCEPTION 'the function "%" belongs to the role "%", which may change it at any time: connect as "%", or drop it',
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
        'The UUID of a person or family that the application identifies by an integer or a text, as spool.analytics_uuid.';

    -- The choice whether events need a person and a family is stored. Existing tables stay as they are.
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
            RAISE NOTICE 'events without a user or a family are accepted';
        ELSIF EXISTS (SELECT 1 FROM analytics_events WHERE user_id IS NULL OR family_unit_id IS NULL) THEN
            RAISE EXCEPTION 'some events have no user or no family, nothing was changed: delete them, or keep identity optional';
        ELSE
            ALTER TABLE analytics_events
                ALTER COLUMN user_id SET NOT NULL, ALTER COLUMN family_unit_id SET NOT NULL;
            RAISE NOTICE 'events without a user or a family are rejected';
        END IF;
    END IF;

    -- The sum for each writer: emitted = rows + duplicates + rejects + erased + expired + dropped + pending + missing. A
    -- writer's account of its first segments is compared with the ledger; for its later segments only the
    -- ledger and the spool are evidence. A segment that is neither in the ledger nor in the spool is missing.
    -- If a chunk was loaded again, the first load counts, so a reject that was loaded later is still a reject
    -- here. Merged rows represent whole segments that are not pending and are covered by the account.
    PERFORM pg_catalog.set_config('citus.enable_ddl_propagation', 'off', true);
    CREATE OR REPLACE VIEW analytics_conservation AS
    WITH stated AS (
        SELECT DISTINCT ON (writer) * FROM analytics_writers ORDER BY writer, reported_at DESC
    ), first_time AS (
        SELECT DISTINCT ON (writer, segment, byte_offset) *
        FROM analytics_loads AS each
        WHERE writer IS NOT NULL AND digests IS NULL AND (byte_offset > 0::bigint OR NOT EXISTS (
            SELECT FROM (
                SELECT merged.segment + merged.segments AS until FROM analytics_loads AS merged
                WHERE merged.digests IS NOT NULL AND merged.writer = each.writer AND merged.segment <= each.segment
                ORDER BY merged.segment DESC LIMIT 1
            ) AS range WHERE until > each.segment
        ))
        ORDER BY writer, segment, byte_offset, loaded_at
    ), loaded AS (
        SELECT writer, segment, 1::bigint AS segments, pg_catalog.sum(lines) AS lines,
            pg_catalog.sum(events + metrics) AS rows, pg_catalog.sum(duplicates) AS duplicates,
            pg_catalog.sum(rejected) AS rejects, pg_catalog.sum(erased) AS erased,
            pg_catalog.sum(expired) AS expired
        FROM first_time
        GROUP BY writer, segment
        UNION ALL
        SELECT writer, segment, segments, lines::numeric, (events + metrics)::numeric, duplicates::numeric,
            rejected::numeric, erased::numeric, expired::numeric
        FROM analytics_loads WHERE digests IS NOT NULL AND writer IS NOT NULL
    ), pending AS (
        SELECT stated.writer, waiting.segment,
            greatest(waiting.lines::numeric - coalesce(pg_catalog.sum(loaded.lines), 0::numeric), 0::numeric) AS lines
        FROM stated
        CROSS JOIN LATERAL ROWS FROM (pg_catalog.unnest(pending_segments), pg_catalog.unnest(pending_lines))
            AS waiting (segment, lines)
        LEFT JOIN loaded ON loaded.writer = stated.writer
            AND loaded.segment <= waiting.segment AND loaded.segment + loaded.segments > waiting.segment
        GROUP BY stated.writer, waiting.segment, waiting.lines
    ), located AS (
        SELECT writer, segment, segments, lines, rows, duplicates, rejects, erased, expired, 0::numeric AS pending
            FROM loaded
        UNION ALL
        SELECT writer, segment, 1::bigint, lines, 0::numeric, 0::numeric, 0::numeric, 0::numeric, 0::numeric, lines
            FROM pending
    ), summed AS (
        SELECT coalesce(stated.writer, located.writer) AS writer,
            coalesce(pg_catalog.min(stated.lines), 0::bigint)::numeric AS stated_lines,
            coalesce(pg_catalog.min(stated.dropped), 0::bigint)::numeric AS dropped,
            -- Segments that a running writer created after its account may be loaded in any order.
            CASE WHEN NOT pg_catalog.bool_and(stated.ended)
                THEN greatest(pg_catalog.min(stated.segments), pg_catalog.min(stated.begun))
                ELSE greatest(pg_catalog.min(stated.segments), pg_catalog.min(stated.begun),
                    pg_catalog.max(segment + located.segments - 1::bigint))
            END AS last,
            pg_catalog.bool_and(stated.ended) AS ended,
            coalesce(pg_catalog.sum(located.lines) FILTER (WHERE segment <= stated.segments), 0::numeric) AS found,
            coalesce(pg_catalog.sum(located.lines) FILTER (WHERE segment > coalesce(stated.segments, 0::bigint)),
                0::numeric) AS found_later,
            coalesce(pg_catalog.sum(rows), 0::numeric) AS rows,
            coalesce(pg_catalog.sum(duplicates), 0::numeric) AS duplicates,
            coalesce(pg_catalog.sum(rejects), 0::numeric) AS rejects,
            coalesce(pg_catalog.sum(erased), 0::numeric) AS erased,
            coalesce(pg_catalog.sum(expired), 0::numeric) AS expired,
            coalesce(pg_catalog.sum(pending), 0::numeric) AS pending
        FROM stated FULL JOIN located ON located.writer = stated.writer
        GROUP BY 1
    ), gaps AS (
        SELECT writer, coalesce(pg_catalog.max(segment + segments) OVER (
            PARTITION BY writer ORDER BY segment ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ), 1::bigint) AS since, segment AS until
        FROM (
            SELECT writer, segment, segments FROM located
            UNION ALL
            SELECT writer, last + 1::bigint, 1::bigint FROM summed WHERE last IS NOT NULL
        ) AS bounds
    ), absent AS (
        SELECT gaps.writer, pg_catalog.array_agg(
            gaps.writer || '-'::text || pg_catalog.repeat('0', 6 - pg_catalog.length(number::text)) || number::text
            ORDER BY number) AS segments
        FROM gaps
        JOIN summed ON summed.writer = gaps.writer
        CROSS JOIN LATERAL pg_catalog.generate_series(since, least(until - 1::bigint, last)) AS number
        GROUP BY gaps.writer
    )
    SELECT summed.writer, (stated_lines + found_later + dropped)::bigint AS emitted, rows::bigint AS rows,
        duplicates::bigint AS duplicates, rejects::bigint AS rejects, dropped::bigint AS dropped,
        pending::bigint AS pending, (stated_lines - found)::bigint AS missing,
        coalesce(absent.segments, ARRAY[]::text[]) AS missing_segments, coalesce(ended, false) AS ended,
        -- New columns come last: an existing view can only get columns at its end.
        erased::bigint AS erased, expired::bigint AS expired
    FROM summed LEFT JOIN absent ON absent.writer = summed.writer;
    PERFORM pg_catalog.set_config('citus.enable_ddl_propagation', 'on', true);

    -- Roles that may load also get the privileges for accounts, even if an upgrade does not name the role.
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
    PERFORM pg_catalog.set_config('analytics.layout',
        coalesce((SELECT value FROM analytics_settings WHERE name = 'layout'), 'plain'), true);
    PERFORM pg_catalog.set_config('analytics.identity', CASE WHEN is_optional THEN 'optional' ELSE 'required' END, true);
    PERFORM pg_catalog.set_config('search_path', caller_path, true);
END
$tables$;

-- Foreign keys to the application's own tables, if they exist. They are added without checking the rows,
-- which takes no time, or dropped. With psql: SET analytics.foreign_keys = off; (or on) before the file. A
-- key that cannot be added causes a warning; everything else is still applied.
DO $foreign_keys$
DECLARE
    caller_path CONSTANT pg_catalog.text := pg_catalog.current_setting('search_path');
    events CONSTANT pg_catalog.regclass := pg_catalog.to_regclass('analytics_events');
    families CONSTANT pg_catalog.oid := pg_catalog.to_regclass('family_units');
    users pg_catalog.oid;
    wanted pg_catalog.text;
    child pg_catalog.name;
    child_table pg_catalog.regclass;
    parent pg_catalog.regclass;
    parent_type pg_catalog.regtype;
    key pg_catalog.name;
BEGIN
    IF events IS NULL THEN
        RAISE EXCEPTION 'the table "analytics_events" does not exist';
    END IF;
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    PERFORM set_config('lock_timeout', '100ms', true);  -- the application's statements queue behind the wait
    EXECUTE (
        SELECT format('SELECT value FROM %I.analytics_settings WHERE name = ''foreign_keys''', nspname)
        FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
        WHERE pg_class.oid = events
    ) INTO wanted;
    users := (
        SELECT pg_class.oid FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
        WHERE nspname = 'auth' AND relname = 'users'
    );

    -- On a partitioned table each partition gets the key, so that they can be validated one by one (before PostgreSQL 18, a
    -- key of the partitioned table is validated at once, under a lock); see "validation".
    FOR key, child_table, parent IN
        SELECT conname, conrelid, confrelid
        FROM pg_constraint
        JOIN pg_class ON pg_class.oid = confrelid
        JOIN pg_namespace ON pg_namespace.oid = relnamespace
        WHERE wanted = 'off' AND contype = 'f' AND conparentid = 0
            AND (conrelid = events OR conrelid IN (SELECT relid FROM pg_partition_tree(events)))
            AND (relname = 'family_units' OR (nspname = 'auth' AND relname = 'users'))
    LOOP
        BEGIN
            EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', child_table, key);
            RAISE NOTICE 'dropped the foreign key to %', parent;
        EXCEPTION WHEN OTHERS THEN
            RAISE WARNING 'could not drop the foreign key to %: %; apply the schema again', parent, SQLERRM
                USING ERRCODE = SQLSTATE;
        END;
    END LOOP;

    FOR child, parent, child_table IN
        SELECT link.child, link.parent, pg_class.oid
        FROM (VALUES ('user_id', users), ('family_unit_id', families)) AS link (child, parent)
        JOIN pg_class ON relkind <> 'p' AND (pg_class.oid = events OR pg_class.oid IN (SELECT relid FROM pg_partition_tree(events)))
        WHERE wanted = 'on' AND link.parent IS NOT NULL AND NOT EXISTS (
            SELECT FROM pg_constraint JOIN pg_attribute ON attrelid = conrelid AND attnum = conkey[1]
            WHERE contype = 'f' AND conrelid = pg_class.oid AND confrelid = link.parent AND attname = link.child
        )
    LOOP
        BEGIN
            parent_type := (SELECT atttypid FROM pg_attribute WHERE attrelid = parent AND attname = 'id');
            IF parent_type IS DISTINCT FROM 'uuid'::regtype THEN
                RAISE EXCEPTION 'its column "id" has the type %, not uuid', coalesce(parent_type::text, 'none')
                    USING ERRCODE = 'datatype_mismatch';
            END IF;
            EXECUTE format('ALTER TABLE %s ADD FOREIGN KEY (%I) REFERENCES %s (id) NOT VALID', child_table, child, parent);
            IF child_table = events THEN
                RAISE NOTICE 'added the foreign key from "%" to %', child, parent;
            END IF;
        EXCEPTION WHEN OTHERS THEN
            RAISE WARNING 'could not add the foreign key from "%" to %: %; correct that and apply the schema again, or turn the keys off',
                child, parent, SQLERRM USING ERRCODE = SQLSTATE;
        END;
    END LOOP;
    PERFORM set_config('search_path', caller_path, true);
END
$foreign_keys$;

-- Rows that existed before a key was added are checked here, while loading continues. A key that some rows
-- violate is kept unvalidated: it applies to new rows.
DO $validation$
DECLARE
    caller_path CONSTANT pg_catalog.text := pg_catalog.current_setting('search_path');
    events CONSTANT pg_catalog.regclass := pg_catalog.to_regclass('analytics_events');
    key pg_catalog.name;
    child pg_catalog.name;
    definition pg_catalog.text;
    child_table pg_catalog.regclass;
    parent pg_catalog.regclass;
BEGIN
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    PERFORM set_config('lock_timeout', '100ms', true);  -- as above
    FOR key, child_table, parent IN
        SELECT conname, conrelid, confrelid
        FROM pg_constraint
        JOIN pg_class ON pg_class.oid = confrelid
        JOIN pg_namespace ON pg_namespace.oid = relnamespace
        WHERE contype = 'f' AND NOT convalidated
            AND (conrelid = events OR conrelid IN (SELECT relid FROM pg_partition_tree(events)))
            AND (relname = 'family_units' OR (nspname = 'auth' AND relname = 'users'))
    LOOP
        BEGIN
            EXECUTE format('ALTER TABLE %s VALIDATE CONSTRAINT %I', child_table, key);
        EXCEPTION WHEN OTHERS THEN
            RAISE WARNING 'the foreign key to % applies to new rows only: %; remove such rows and apply the schema again',
                parent, SQLERRM USING ERRCODE = SQLSTATE;
        END;
    END LOOP;

    -- A key that is valid on all partitions can be added to the partitioned table without a scan, and then applies to later
    -- partitions too. This includes keys that users added themselves.
    FOR key, child, definition, parent IN
        SELECT min(conname::text), attname, pg_get_constraintdef(pg_constraint.oid), confrelid
        FROM pg_constraint JOIN pg_attribute ON attrelid = conrelid AND attnum = conkey[1]
        WHERE contype = 'f' AND convalidated AND conparentid = 0
            AND conrelid IN (SELECT relid FROM pg_partition_tree(events) WHERE isleaf AND relid <> events)
        GROUP BY 2, 3, 4
        HAVING count(DISTINCT conrelid) = (SELECT count(*) FROM pg_partition_tree(events) WHERE isleaf)
    LOOP
        BEGIN
            EXECUTE format('ALTER TABLE %s ADD CONSTRAINT %I %s', events, key, definition);
            RAISE NOTICE 'added the foreign key from "%" to %', child, parent;
        EXCEPTION WHEN OTHERS THEN
            RAISE WARNING 'could not add the foreign key from "%" to %: %; apply the schema again', child, parent, SQLERRM
                USING ERRCODE = SQLSTATE;
        END;
    END LOOP;
    PERFORM set_config('search_path', caller_path, true);
END
$validation$;

-- ---- questions ----------------------------------------------------------------------------------------------------
-- Functions that answer them (prefix analytics_), and the rollups that make the answers cheap. Ranges are half-open,
-- since <= timestamp < until. A time zone is an argument, never the session's. Every bucket of the range is a
-- row, with 0 if it has no events; `complete` is false for a bucket that is only partly in the range or has
-- not ended: mark it, never show it as a decline.
--
-- "@." stands for the schema of the tables. All else is looked up in pg_catalog alone, when a function is created
-- (BEGIN ATOMIC) or by its own search path, so that an answer depends on no reader's. Functions in SQL have no SET and
-- are inlined: the planner sees the caller's constants.

DO $questions$
DECLARE
    caller_path CONSTANT pg_catalog.text := pg_catalog.current_setting('search_path');
    events CONSTANT pg_catalog.oid := pg_catalog.to_regclass('analytics_events');
    home pg_catalog.name;
    home_oid pg_catalog.oid;
    statements pg_catalog.text;
    is_distributed pg_catalog.bool;
    foreign_name pg_catalog.name;
    foreign_owner pg_catalog.name;
BEGIN
    IF events IS NULL THEN
        RAISE EXCEPTION 'the table "analytics_events" does not exist';
    END IF;
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    PERFORM set_config('lock_timeout', '1s', true);
    PERFORM set_config('citus.multi_shard_modify_mode', 'sequential', true);
    PERFORM pg_advisory_xact_lock(hashtext('analytics_schema'));  -- one at a time
    SELECT nspname, pg_namespace.oid INTO home, home_oid
        FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE pg_class.oid = events;
    statements := $sql$

COMMENT ON VIEW @.analytics_events_daily IS
'Always reads the whole table, and days are those of the session time zone: prefer analytics_trend.';
COMMENT ON VIEW @.analytics_metrics_hourly IS
'Always reads the whole table: prefer analytics_requests, or analytics_hourly_metrics with analytics_touched.';

-- One mark per load and hour with new rows, written in the transaction of the load. Appended without a key:
-- with a key and ON CONFLICT DO NOTHING, a load that commits after a refresh would lose its mark to that of
-- an earlier load.
-- source users: a day (at its first hour in UTC) whose user days are not computed. hour -infinity: nothing is
-- computed yet.
DO $$
BEGIN
    IF to_regclass('@.analytics_touched') IS NULL THEN
        CREATE TABLE @.analytics_touched (
            hour TIMESTAMPTZ NOT NULL,
            source TEXT NOT NULL CHECK (source IN ('events', 'metrics', 'users'))
        );
        INSERT INTO @.analytics_touched
        SELECT timestamptz '-infinity', 'events' WHERE EXISTS (SELECT FROM @.analytics_events)
        UNION ALL SELECT timestamptz '-infinity', 'metrics' WHERE EXISTS (SELECT FROM @.analytics_metrics);
    END IF;
END
$$;

-- UTC hours whose rows were pruned. Only their rollup remains: it is never recomputed, only added to.
CREATE TABLE IF NOT EXISTS @.analytics_sealed (
    source TEXT NOT NULL CHECK (source IN ('events', 'metrics')),
    hour TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (source, hour)
);

CREATE TABLE IF NOT EXISTS @.analytics_hourly_events (
    hour TIMESTAMPTZ NOT NULL,
    event_type VARCHAR(100) NOT NULL,
    events BIGINT NOT NULL,
    PRIMARY KEY (hour, event_type)
);

-- The quarter hours of a day of UTC in which a user did something: the local days of every zone follow from them,
-- because all offsets in use since 1972 are multiples of 15 minutes.
CREATE TABLE IF NOT EXISTS @.analytics_user_days (
    day DATE NOT NULL,
    user_id UUID,
    family_unit_id UUID,
    quarters BIT(96) NOT NULL,
    UNIQUE NULLS NOT DISTINCT (day, user_id, family_unit_id)
);

-- Counts by logarithmic bucket (see analytics_value_bucket). Several rows may have the same hour, name and labels
-- (late rows of a pruned hour); they add up. No key: labels may be longer than an index entry.
CREATE TABLE IF NOT EXISTS @.analytics_hourly_metrics (
    hour TIMESTAMPTZ NOT NULL,
    metric_name VARCHAR(100) NOT NULL,
    labels JSONB,
    records BIGINT NOT NULL,
    sum NUMERIC NOT NULL,
    min NUMERIC NOT NULL,
    max NUMERIC NOT NULL,
    buckets SMALLINT[] NOT NULL,
    counts INT[] NOT NULL
);
DO $$
BEGIN
    IF to_regclass('@.analytics_hourly_metrics_hour') IS NULL THEN  -- IF NOT EXISTS locks the table first
        CREATE INDEX analytics_hourly_metrics_hour ON @.analytics_hourly_metrics (hour, metric_name);
    END IF;
END
$$;

-- ---- time ----

CREATE OR REPLACE FUNCTION @.analytics_bucket(bucket TEXT, at TIMESTAMPTZ, tz TEXT) RETURNS TIMESTAMP
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
SELECT CASE WHEN bucket IN ('minute', 'hour') THEN date_trunc(bucket, at, tz) AT TIME ZONE 'UTC'
    ELSE date_trunc(bucket, at AT TIME ZONE tz) END;
END;
COMMENT ON FUNCTION @.analytics_bucket IS
'Internal. The bucket of an instant: the local day, Monday, month, quarter or year; for an hour or minute, its start in UTC.';

CREATE OR REPLACE FUNCTION @.analytics_bucket_start(bucket TEXT, key TIMESTAMP, tz TEXT) RETURNS TIMESTAMPTZ
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
-- A local midnight that occurs twice (Havana in November) means the first; Postgres takes the second.
SELECT CASE WHEN bucket IN ('minute', 'hour') THEN key AT TIME ZONE 'UTC'
    WHEN (key AT TIME ZONE tz - interval '1 hour') AT TIME ZONE tz = key THEN key AT TIME ZONE tz - interval '1 hour'
    ELSE key AT TIME ZONE tz END;
END;
COMMENT ON FUNCTION @.analytics_bucket_start IS 'Internal. The instant at which a bucket (see @.analytics_bucket) begins.';

CREATE OR REPLACE FUNCTION @.analytics_bucket_number(bucket TEXT, day DATE) RETURNS INT
LANGUAGE sql IMMUTABLE PARALLEL SAFE
BEGIN ATOMIC
SELECT CASE bucket
    WHEN 'day' THEN day - date '0001-01-01'
    WHEN 'week' THEN (day - date '0001-01-01') / 7  -- which was a Monday
    WHEN 'month' THEN 12 * extract(year FROM day)::int + extract(month FROM day)::int
    WHEN 'quarter' THEN 4 * extract(year FROM day)::int + extract(quarter FROM day)::int
    WHEN 'year' THEN extract(year FROM day)::int
    ELSE ('bucket must be day, week, month, quarter or year, not ' || bucket)::int END;
END;
COMMENT ON FUNCTION @.analytics_bucket_number IS
'Internal. Consecutive numbers for consecutive buckets. The cast in the ELSE fails with the text as its message.';

CREATE OR REPLACE FUNCTION @.analytics_bucket_step(bucket TEXT) RETURNS INTERVAL
LANGUAGE sql IMMUTABLE PARALLEL SAFE
BEGIN ATOMIC
SELECT CASE WHEN bucket IN ('minute', 'hour', 'day', 'week', 'month', 'year') THEN ('1 ' || bucket)::interval
    WHEN bucket = 'quarter' THEN interval '3 months'
    ELSE ('bucket must be minute, hour, day, week, month, quarter or year, not ' || bucket)::interval END;
END;
COMMENT ON FUNCTION @.analytics_bucket_step IS 'Internal. The length of a bucket on the calendar.';

CREATE OR REPLACE FUNCTION @.analytics_calendar(bucket TEXT, since TIMESTAMPTZ, until TIMESTAMPTZ, tz TEXT)
RETURNS TABLE (key TIMESTAMP, starts TIMESTAMPTZ, complete BOOLEAN)
LANGUAGE sql STABLE
BEGIN ATOMIC
WITH bounds AS (
    SELECT CASE WHEN isfinite(since) AND isfinite(until) THEN since
        ELSE 'since and until must be finite'::text::timestamptz END AS since
), keys AS (
    SELECT DISTINCT @.analytics_bucket(bucket, t, tz) AS key  -- by quarters: Lord Howe's clock changes by half an hour
    FROM bounds b, generate_series(date_trunc('minute', b.since), until - interval '1 microsecond',
        CASE bucket WHEN 'minute' THEN interval '1 minute' ELSE interval '15 minutes' END) AS t
    WHERE bucket IN ('minute', 'hour') AND since < until
    UNION ALL
    SELECT k FROM bounds b, generate_series(date_trunc(bucket, b.since AT TIME ZONE tz),
        (until - interval '1 microsecond') AT TIME ZONE tz, @.analytics_bucket_step(bucket)) AS k
    WHERE bucket NOT IN ('minute', 'hour') AND since < until
)
SELECT k.key, @.analytics_bucket_start(bucket, k.key, tz), @.analytics_bucket_start(bucket, k.key, tz) >= since
    AND @.analytics_bucket_start(bucket, k.key + @.analytics_bucket_step(bucket), tz) <= least(until, now())
FROM keys k;
END;
COMMENT ON FUNCTION @.analytics_calendar IS 'Internal. Every bucket of a range, with the instant at which it begins.';

-- ---- reading from rollups or from rows ----

CREATE OR REPLACE FUNCTION @.analytics_hours(
    wanted TEXT, since TIMESTAMPTZ, until TIMESTAMPTZ, bucket TEXT, tz TEXT
) RETURNS TABLE (hour TIMESTAMPTZ, key TIMESTAMP, rolled BOOLEAN, from_rows BOOLEAN)
LANGUAGE sql STABLE
BEGIN ATOMIC
WITH touched AS MATERIALIZED (
    SELECT DISTINCT t.hour FROM @.analytics_touched t WHERE t.source = wanted
), hours AS (
    SELECT h AS hour, @.analytics_bucket(bucket, h, tz) AS key,
        @.analytics_bucket(bucket, h + interval '59 minutes 59.999999 seconds', tz) AS last, t.hour IS NOT NULL AS touched,
        s.hour IS NOT NULL AS sealed, h >= since AS begins, h >= since AND h + interval '1 hour' <= until AS whole
    FROM generate_series(date_trunc('hour', since, 'UTC'), until - interval '1 microsecond', interval '1 hour') AS h
        LEFT JOIN touched t ON t.hour = h
        LEFT JOIN @.analytics_sealed s ON s.source = wanted AND s.hour = h
    WHERE bucket <> 'minute' AND CASE WHEN isfinite(since) AND isfinite(until) THEN true  -- else the series has no end
        ELSE 'since and until must be finite'::text::timestamptz IS NULL END AND NOT EXISTS (SELECT FROM touched WHERE touched.hour = '-infinity')
)
SELECT h.hour, h.key, CASE WHEN h.sealed THEN h.begins ELSE h.whole AND NOT h.touched AND h.key = h.last END,
    h.touched OR NOT h.sealed AND NOT (h.whole AND h.key = h.last)
FROM hours h;
END;
COMMENT ON FUNCTION @.analytics_hours IS
'Internal. The hours of a range: read from the rollup, or from rows if they are touched, cut by the range, or on both sides of a bucket''s border (zones of half hours); a pruned hour from both, as a whole. None at all for minutes, or before the first refresh.';

CREATE OR REPLACE FUNCTION @.analytics_row_spans(
    wanted TEXT, since TIMESTAMPTZ, until TIMESTAMPTZ, bucket TEXT, tz TEXT
) RETURNS TABLE (lo TIMESTAMPTZ, hi TIMESTAMPTZ)
LANGUAGE sql STABLE
BEGIN ATOMIC
-- Consecutive hours form one span, because each span is a scan, of the whole table if it has no statistics yet.
SELECT greatest(min(h.hour), since), least(max(h.hour) + interval '1 hour', until)
FROM (
    SELECT h.hour, h.hour - row_number() OVER (ORDER BY h.hour) * interval '1 hour' AS run
    FROM @.analytics_hours(wanted, since, until, bucket, tz) h WHERE h.from_rows
) h
GROUP BY h.run
UNION ALL
SELECT since, until
WHERE bucket = 'minute' OR EXISTS (SELECT FROM @.analytics_touched t WHERE t.source = wanted AND t.hour = '-infinity');
END;
COMMENT ON FUNCTION @.analytics_row_spans IS 'Internal. The parts of a range that are read from rows.';

CREATE OR REPLACE FUNCTION @.analytics_counts(
    since TIMESTAMPTZ, until TIMESTAMPTZ, bucket TEXT, tz TEXT, types TEXT[] DEFAULT NULL
) RETURNS TABLE (key TIMESTAMP, event_type VARCHAR, events BIGINT)
LANGUAGE sql STABLE
BEGIN ATOMIC
SELECT c.key, c.event_type, sum(c.events)::bigint
FROM (
    SELECT h.key, r.event_type, r.events
    FROM @.analytics_hours('events', since, until, bucket, tz) h JOIN @.analytics_hourly_events r ON r.hour = h.hour
    WHERE h.rolled AND r.hour >= since AND r.hour < until AND (types IS NULL OR r.event_type = ANY (types))
    UNION ALL
    SELECT @.analytics_bucket(bucket, e.timestamp, tz), e.event_type, 1
    FROM @.analytics_row_spans('events', since, until, bucket, tz) s
        CROSS JOIN LATERAL (  -- OFFSET 0: joined, the planner assumes a ninth of the table per span, and scans the whole index
            SELECT e.timestamp, e.event_type FROM @.analytics_events e
            WHERE e.timestamp >= s.lo AND e.timestamp < s.hi AND (types IS NULL OR e.event_type = ANY (types)) OFFSET 0
        ) e
) c
GROUP BY 1, 2;
END;
COMMENT ON FUNCTION @.analytics_counts IS 'Internal. Events by bucket and type, without empty buckets.';

CREATE OR REPLACE FUNCTION @.analytics_local_days(since TIMESTAMPTZ, until TIMESTAMPTZ, tz TEXT)
RETURNS TABLE (day DATE, local DATE, mask BIT(96), frozen BOOLEAN, dirty BOOLEAN)
LANGUAGE sql STABLE
BEGIN ATOMIC
WITH RECURSIVE days AS (  -- those with user days, by a loose index scan
    (SELECT u.day FROM @.analytics_user_days u WHERE u.day >= (since AT TIME ZONE 'UTC')::date ORDER BY 1 LIMIT 1)
    UNION ALL
    SELECT (SELECT u.day FROM @.analytics_user_days u WHERE u.day > d.day ORDER BY 1 LIMIT 1)
    FROM days d WHERE d.day IS NOT NULL
), touched AS MATERIALIZED (
    SELECT DISTINCT (t.hour AT TIME ZONE 'UTC')::date AS day FROM @.analytics_touched t
    WHERE t.source IN ('events', 'users') AND isfinite(t.hour)
), frozen AS MATERIALIZED (
    SELECT DISTINCT (s.hour AT TIME ZONE 'UTC')::date AS day FROM @.analytics_sealed s WHERE s.source = 'events'
), cut AS (  -- bits do not cut within a quarter hour
    SELECT (until AT TIME ZONE 'UTC')::date AS day WHERE until <> date_bin('15 minutes', until, timestamptz '2000-01-01 00:00+00')
)
SELECT d.day, ((d.day::timestamp + q * interval '15 minutes') AT TIME ZONE 'UTC' AT TIME ZONE tz)::date,
    bit_or(set_bit(0::bit(96), q, 1)), f.day IS NOT NULL, t.day IS NOT NULL OR c.day IS NOT NULL
FROM days d CROSS JOIN generate_series(0, 95) q LEFT JOIN touched t ON t.day = d.day LEFT JOIN frozen f ON f.day = d.day
    LEFT JOIN cut c ON c.day = d.day
WHERE (d.day::timestamp + q * interval '15 minutes') AT TIME ZONE 'UTC' >= since
    AND (d.day::timestamp + q * interval '15 minutes') AT TIME ZONE 'UTC' < until
GROUP BY 1, 2, 4, 5;
END;
COMMENT ON FUNCTION @.analytics_local_days IS
'Internal. The quarter hours of each day of UTC that belong to a local day, also to one of 23, 25 or 23.5 hours.';

CREATE OR REPLACE FUNCTION @.analytics_day_spans(since TIMESTAMPTZ, until TIMESTAMPTZ)
RETURNS TABLE (lo TIMESTAMPTZ, hi TIMESTAMPTZ)
LANGUAGE sql STABLE
BEGIN ATOMIC
WITH touched AS MATERIALIZED (
    SELECT DISTINCT t.hour FROM @.analytics_touched t WHERE t.source IN ('events', 'users')
), days AS (
    SELECT date_trunc('day', t.hour, 'UTC') AS day FROM touched t WHERE isfinite(t.hour)
    UNION SELECT date_trunc('day', until, 'UTC')  -- the bits do not cut within a quarter hour
    WHERE until <> date_bin('15 minutes', until, timestamptz '2000-01-01 00:00+00')
)
SELECT greatest(min(r.day), since), least(max(r.day) + interval '24 hours', until)
FROM (  -- consecutive days form one span, as in analytics_row_spans
    SELECT d.day, d.day - row_number() OVER (ORDER BY d.day) * interval '24 hours' AS run FROM days d
    WHERE d.day < until AND d.day + interval '24 hours' > since
        AND NOT EXISTS (SELECT FROM touched t WHERE t.hour = '-infinity')
) r
GROUP BY r.run
UNION ALL
SELECT since, until WHERE EXISTS (SELECT FROM touched t WHERE t.hour = '-infinity');
END;
COMMENT ON FUNCTION @.analytics_day_spans IS 'Internal. The parts of a range in which users are read from rows.';

CREATE OR REPLACE FUNCTION @.analytics_unit(who TEXT, user_id UUID, family_unit_id UUID) RETURNS UUID
LANGUAGE sql IMMUTABLE PARALLEL SAFE
BEGIN ATOMIC
SELECT CASE who WHEN 'user' THEN user_id WHEN 'family' THEN family_unit_id
    ELSE ('who must be user or family, not ' || who)::uuid END;
END;
COMMENT ON FUNCTION @.analytics_unit IS 'Internal. Whom to count: users or families.';

CREATE OR REPLACE FUNCTION @.analytics_seen(
    since TIMESTAMPTZ, until TIMESTAMPTZ, bucket TEXT, tz TEXT, who TEXT, types TEXT[]
) RETURNS TABLE (unit UUID, starts DATE)
LANGUAGE sql STABLE
BEGIN ATOMIC
SELECT @.analytics_unit(who, u.user_id, u.family_unit_id), date_trunc(bucket, d.local::timestamp)::date
FROM @.analytics_local_days(since, until, tz) d JOIN @.analytics_user_days u ON u.day = d.day
WHERE types IS NULL AND (u.quarters & d.mask) <> 0::bit(96)
    AND @.analytics_unit(who, u.user_id, u.family_unit_id) IS NOT NULL
    AND (d.frozen OR NOT d.dirty)
    AND NOT EXISTS (SELECT FROM @.analytics_touched t WHERE t.source = 'events' AND t.hour = '-infinity')
UNION
SELECT @.analytics_unit(who, e.user_id, e.family_unit_id), date_trunc(bucket, e.timestamp AT TIME ZONE tz)::date
FROM @.analytics_day_spans(since, until) s
    CROSS JOIN LATERAL (  -- OFFSET 0 as in analytics_counts
        SELECT e.timestamp, e.user_id, e.family_unit_id FROM @.analytics_events e
        WHERE e.timestamp >= s.lo AND e.timestamp < s.hi OFFSET 0
    ) e
WHERE types IS NULL AND @.analytics_unit(who, e.user_id, e.family_unit_id) IS NOT NULL
UNION
SELECT @.analytics_unit(who, e.user_id, e.family_unit_id), date_trunc(bucket, e.timestamp AT TIME ZONE tz)::date
FROM @.analytics_events e
WHERE e.timestamp >= since AND e.timestamp < until AND e.event_type = ANY (types)
    AND @.analytics_unit(who, e.user_id, e.family_unit_id) IS NOT NULL;
END;
COMMENT ON FUNCTION @.analytics_seen IS
'Internal. In which buckets (day or longer) a user or family was active: from user days if these are exact, otherwise from rows; for given event types only from rows.';
-- ---- the questions ----

CREATE OR REPLACE FUNCTION @.analytics_trend(
    since TIMESTAMPTZ, until TIMESTAMPTZ DEFAULT now(), bucket TEXT DEFAULT 'day', tz TEXT DEFAULT 'UTC',
    types TEXT[] DEFAULT NULL, people BOOLEAN DEFAULT false, top INT DEFAULT NULL
) RETURNS TABLE (
    starts TIMESTAMPTZ, event_type VARCHAR, events BIGINT, users BIGINT, families BIGINT, complete BOOLEAN
)
LANGUAGE sql STABLE
BEGIN ATOMIC
WITH counted AS MATERIALIZED (
    SELECT c.key, c.event_type, c.events FROM @.analytics_counts(since, until, bucket, tz, types) c
), kinds AS MATERIALIZED (
    SELECT k.event_type, CASE WHEN row_number() OVER (ORDER BY sum(k.events) DESC, k.event_type) > top
        THEN '(others)' ELSE k.event_type END AS shown
    FROM (SELECT c.event_type, c.events FROM counted c UNION ALL SELECT t, 0 FROM unnest(types) t) k
    GROUP BY k.event_type
), sums AS (
    SELECT c.key, k.shown, sum(c.events)::bigint AS events FROM counted c JOIN kinds k USING (event_type) GROUP BY 1, 2
), numbers AS (  -- numbers are sorted in three quarters of the time of names
    SELECT k.event_type, k.shown, dense_rank() OVER (ORDER BY k.shown) AS number FROM kinds k
), pairs AS (  -- first, so that little is left to sort for count(DISTINCT)
    SELECT @.analytics_bucket(bucket, e.timestamp, tz) AS key, n.number, e.user_id, e.family_unit_id
    FROM @.analytics_events e JOIN numbers n USING (event_type)
    WHERE people AND e.timestamp >= since AND e.timestamp < until AND (types IS NULL OR e.event_type = ANY (types))
    GROUP BY 1, 2, 3, 4
), counts AS (
    SELECT p.key, p.number, count(DISTINCT p.user_id) AS users, count(DISTINCT p.family_unit_id) AS families
    FROM pairs p GROUP BY 1, 2
), persons AS (
    SELECT c.key, n.shown, c.users, c.families
    FROM counts c JOIN (SELECT DISTINCT numbers.number, numbers.shown FROM numbers) n USING (number)
)
SELECT c.starts, k.shown, coalesce(s.events, 0), CASE WHEN people THEN coalesce(p.users, 0) END,
    CASE WHEN people THEN coalesce(p.families, 0) END, c.complete
FROM @.analytics_calendar(bucket, since, until, tz) c CROSS JOIN (SELECT DISTINCT kinds.shown FROM kinds) k
    LEFT JOIN sums s ON s.key = c.key AND s.shown = k.shown
    LEFT JOIN persons p ON p.key = c.key AND p.shown = k.shown
ORDER BY 1, 2;
END;
COMMENT ON FUNCTION @.analytics_trend IS
'Events by bucket (minute, hour, day, week, month, quarter, year) and event type. people: also distinct users and families, which reads every row (NULL without). top: the n most frequent types, the others summed as (others).';

CREATE OR REPLACE FUNCTION @.analytics_active(
    since TIMESTAMPTZ, until TIMESTAMPTZ DEFAULT now(), tz TEXT DEFAULT 'UTC', who TEXT DEFAULT 'user',
    types TEXT[] DEFAULT NULL
) RETURNS TABLE (day DATE, dau BIGINT, wau BIGINT, mau BIGINT, stickiness NUMERIC, complete BOOLEAN)
LANGUAGE sql STABLE
BEGIN ATOMIC
-- An active day of a user covers the days up to the user's next one or the end of the window, so that a rolling
-- distinct count is a running sum of beginnings minus ends: one sort, exact, no self-join.
WITH spans AS (
    SELECT s.starts AS day, lead(s.starts) OVER (PARTITION BY s.unit ORDER BY s.starts) AS again
    FROM @.analytics_seen((date_trunc('day', since AT TIME ZONE tz) - interval '27 days') AT TIME ZONE tz, until, 'day', tz,
        who, types) s
), moves AS (
    SELECT s.day, 1 AS d, 1 AS w, 1 AS m FROM spans s
    UNION ALL SELECT s.day + 1, -1, 0, 0 FROM spans s
    UNION ALL SELECT least(s.day + 7, s.again), 0, -1, 0 FROM spans s
    UNION ALL SELECT least(s.day + 28, s.again), 0, 0, -1 FROM spans s
    UNION ALL SELECT c.key::date, 0, 0, 0 FROM @.analytics_calendar('day', since, until, tz) c
), sums AS (
    SELECT m.day, sum(sum(m.d)) OVER o AS d, sum(sum(m.w)) OVER o AS w, sum(sum(m.m)) OVER o AS m
    FROM moves m GROUP BY m.day WINDOW o AS (ORDER BY m.day)
)
SELECT s.day, s.d::bigint, s.w::bigint, s.m::bigint, round(s.d / nullif(s.m, 0), 4), c.complete
FROM @.analytics_calendar('day', since, until, tz) c JOIN sums s ON s.day = c.key::date
ORDER BY 1;
END;
COMMENT ON FUNCTION @.analytics_active IS
'Daily, weekly (that day and the 6 before it) and monthly (27 before it) active users or families (who) of each local day; stickiness is dau / mau.';

CREATE OR REPLACE FUNCTION @.analytics_lifecycle(
    since TIMESTAMPTZ, until TIMESTAMPTZ DEFAULT now(), bucket TEXT DEFAULT 'week', tz TEXT DEFAULT 'UTC',
    who TEXT DEFAULT 'user', types TEXT[] DEFAULT NULL
) RETURNS TABLE (
    starts DATE, new BIGINT, retained BIGINT, resurrected BIGINT, dormant BIGINT, complete BOOLEAN
)
LANGUAGE sql STABLE
BEGIN ATOMIC
WITH walk AS (
    SELECT s.starts AS day, @.analytics_bucket_number(bucket, s.starts) AS number,
        lag(@.analytics_bucket_number(bucket, s.starts)) OVER o AS before,
        lead(@.analytics_bucket_number(bucket, s.starts)) OVER o AS after
    FROM @.analytics_seen('-infinity', until, bucket, tz, who, types) s WINDOW o AS (PARTITION BY s.unit ORDER BY s.starts)
), states AS (
    SELECT w.number, count(*) FILTER (WHERE w.before IS NULL) AS new,
        count(*) FILTER (WHERE w.before = w.number - 1) AS retained,
        count(*) FILTER (WHERE w.before < w.number - 1) AS resurrected,
        count(*) FILTER (WHERE w.after = w.number + 1) AS staying, count(*) AS active
    FROM walk w GROUP BY 1
)
SELECT c.key::date, coalesce(s.new, 0), coalesce(s.retained, 0), coalesce(s.resurrected, 0),
    coalesce(p.active - p.staying, 0), c.complete
FROM @.analytics_calendar(bucket, @.analytics_bucket_start(bucket, date_trunc(bucket, since AT TIME ZONE tz), tz), until, tz) c
    LEFT JOIN states s ON s.number = @.analytics_bucket_number(bucket, c.key::date)
    LEFT JOIN states p ON p.number = @.analytics_bucket_number(bucket, c.key::date) - 1
ORDER BY 1;
END;
COMMENT ON FUNCTION @.analytics_lifecycle IS
'Users or families (who) by bucket (day or longer; the first one is counted as a whole). new: their first event ever; retained: also active in the previous bucket; resurrected: active earlier, but not in the previous bucket; dormant: active in the previous bucket, but not in this one. With types, only events of these types count, and after pruning "ever" goes back to the oldest kept row.';

CREATE OR REPLACE FUNCTION @.analytics_first(
    until TIMESTAMPTZ, bucket TEXT, tz TEXT, who TEXT, types TEXT[]
) RETURNS TABLE (unit UUID, starts DATE)
LANGUAGE sql STABLE
BEGIN ATOMIC
SELECT s.unit, min(s.starts) FROM @.analytics_seen('-infinity', until, bucket, tz, who, NULL) s WHERE types IS NULL GROUP BY 1
UNION ALL
SELECT @.analytics_unit(who, e.user_id, e.family_unit_id), date_trunc(bucket, min(e.timestamp) AT TIME ZONE tz)::date
FROM @.analytics_events e WHERE e.timestamp < until AND e.event_type = ANY (types)
    AND @.analytics_unit(who, e.user_id, e.family_unit_id) IS NOT NULL GROUP BY 1;
END;
COMMENT ON FUNCTION @.analytics_first IS 'Internal. The bucket of the first event, or first event of given types, of each user or family.';

CREATE OR REPLACE FUNCTION @.analytics_retention(
    since TIMESTAMPTZ, until TIMESTAMPTZ DEFAULT now(), bucket TEXT DEFAULT 'week', tz TEXT DEFAULT 'UTC',
    periods INT DEFAULT 8, starting TEXT[] DEFAULT NULL, coming TEXT[] DEFAULT NULL,
    unbounded BOOLEAN DEFAULT false, who TEXT DEFAULT 'user'
) RETURNS TABLE (cohort DATE, size BIGINT, period INT, users BIGINT, rate NUMERIC, complete BOOLEAN)
LANGUAGE sql STABLE
BEGIN ATOMIC
WITH cohorts AS MATERIALIZED (
    SELECT f.unit, f.starts AS cohort FROM @.analytics_first(until, bucket, tz, who, starting) f
    WHERE f.starts >= date_trunc(bucket, since AT TIME ZONE tz)::date
), diffs AS (
    SELECT c.cohort, c.unit, @.analytics_bucket_number(bucket, s.starts) - @.analytics_bucket_number(bucket, c.cohort) AS period
    FROM cohorts c JOIN @.analytics_seen(@.analytics_bucket_start(bucket, date_trunc(bucket, since AT TIME ZONE tz), tz),
        until, bucket, tz, who, coming) s ON s.unit = c.unit AND s.starts > c.cohort
), counted AS MATERIALIZED (
    SELECT d.cohort, d.period, count(*) AS users FROM diffs d WHERE NOT unbounded GROUP BY 1, 2
    UNION ALL
    SELECT l.cohort, p, sum(count(*)) OVER (PARTITION BY l.cohort ORDER BY p DESC)
    FROM (SELECT d.cohort, d.unit, max(d.period) AS p FROM diffs d WHERE unbounded GROUP BY 1, 2) l GROUP BY 1, 2
), sizes AS (
    SELECT c.cohort, count(*) AS size FROM cohorts c GROUP BY 1
), grid AS (
    SELECT s.cohort, s.size, p AS period, s.cohort + p * @.analytics_bucket_step(bucket) AS begins
    FROM sizes s CROSS JOIN generate_series(0, periods) p
), filled AS (
    SELECT g.cohort, g.size, g.period, g.begins, CASE WHEN g.period = 0 THEN g.size WHEN NOT unbounded THEN coalesce(c.users, 0)
        ELSE coalesce((SELECT n.users FROM counted n WHERE n.cohort = g.cohort AND n.period >= g.period
            ORDER BY n.period LIMIT 1), 0) END::bigint AS users
    FROM grid g LEFT JOIN counted c ON NOT unbounded AND c.cohort = g.cohort AND c.period = g.period
)
SELECT f.cohort, f.size, f.period, f.users, round(f.users::numeric / f.size, 4),
    @.analytics_bucket_start(bucket, f.begins + @.analytics_bucket_step(bucket), tz) <= least(until, now())
FROM filled f WHERE @.analytics_bucket_start(bucket, f.begins, tz) < until
ORDER BY 1, 3;
END;
COMMENT ON FUNCTION @.analytics_retention IS
'Cohort: users (or families) by the bucket (day or longer) of their first event of the types starting, ever, so each is in one cohort; since is moved to the beginning of its bucket. Period n: how many had an event of the types coming in the n-th bucket after it, or in that one or later (unbounded). complete is false until the n-th bucket has ended.';

CREATE OR REPLACE FUNCTION @.analytics_funnel(
    steps TEXT[], since TIMESTAMPTZ, until TIMESTAMPTZ DEFAULT now(), within INTERVAL DEFAULT '7 days',
    strict BOOLEAN DEFAULT false, who TEXT DEFAULT 'user', breakdown TEXT DEFAULT NULL
) RETURNS TABLE (
    step INT, event_type TEXT, value TEXT, reached BIGINT, of_first NUMERIC, of_previous NUMERIC, p50 INTERVAL, p90 INTERVAL
)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
-- A window function per step, nested over one sort. s_k of an event is the entry from which step k was reached there:
-- the latest that can still continue, as in ClickHouse's windowFunnel and PostHog's. Events with the same timestamp
-- count in the order of the steps. Times are float8 seconds (date_part; extract is numeric): cheap for max().
DECLARE
    n CONSTANT INT := cardinality(steps);
    unit CONSTANT TEXT := CASE who WHEN 'user' THEN 'user_id' WHEN 'family' THEN 'family_unit_id' WHEN 'session' THEN 'session_id' END;
    seconds CONSTANT FLOAT8 := extract(epoch FROM within);
    frame CONSTANT TEXT := CASE WHEN strict THEN '' ELSE ' ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING' END;
    before CONSTANT TEXT := CASE WHEN strict THEN 'lag' ELSE 'max' END;
    query TEXT;
    firsts TEXT := '';
BEGIN
    IF n IS NULL OR n NOT BETWEEN 1 AND 12 THEN
        RAISE EXCEPTION 'a funnel has 1 to 12 steps';
    ELSIF unit IS NULL THEN
        RAISE EXCEPTION 'who must be user, family or session, not %', who;
    END IF;
    query := format($q$SELECT %I AS unit, %s AS b, coalesce(array_position($1, event_type::text), 99) AS k,
            date_part('epoch', timestamp) AS t,
            CASE WHEN event_type = $1[1] AND timestamp < $3 THEN date_part('epoch', timestamp) END AS s1
        FROM @.analytics_events
        WHERE timestamp >= $2 AND timestamp < $3 + make_interval(secs => $4) AND %1$I IS NOT NULL %3$s$q$,
        unit, CASE WHEN breakdown IS NULL THEN 'NULL::text' ELSE format('metadata->>%L', breakdown) END,
        CASE WHEN strict THEN '' ELSE 'AND event_type = ANY ($1)' END);
    FOR k IN 2..n LOOP
        query := format('SELECT z.*, CASE WHEN k = %s AND t - %s(s%s) OVER o <= $4 THEN %2$s(s%3$s) OVER o END AS s%s '
            'FROM (%s) z WINDOW o AS (PARTITION BY unit ORDER BY t, k%s)',
            array_position(steps, steps[k]), before, k - 1, k, query, frame);
    END LOOP;
    FOR k IN 1..n LOOP
        firsts := firsts || format(', min(CASE WHEN s%s IS NOT NULL THEN ARRAY[t, s%1$s] END) AS a%1$s', k);
    END LOOP;
    query := format('SELECT unit, %s AS b%s FROM (%s) z WHERE s1 IS NOT NULL %s GROUP BY unit',
        CASE WHEN breakdown IS NULL THEN 'NULL::text' ELSE '(array_agg(b ORDER BY t) FILTER (WHERE s1 IS NOT NULL))[1]' END,
        firsts, query, (SELECT coalesce(string_agg(format('OR s%s IS NOT NULL', i), ' '), '') FROM generate_series(2, n) i));
    RETURN QUERY EXECUTE format($q$
        WITH units AS MATERIALIZED (%s), long AS (
            SELECT i AS step, b, (ARRAY[%s])[i] AS d FROM units, generate_series(1, %s) i
        ), sums AS (
            SELECT step, b, count(d) AS reached, percentile_cont(ARRAY[0.5, 0.9]) WITHIN GROUP (ORDER BY d) AS p FROM long GROUP BY 1, 2
            UNION ALL SELECT i, NULL, 0, NULL FROM generate_series(1, %3$s) i WHERE NOT EXISTS (SELECT FROM units)
        )
        SELECT step, $1[step], b, reached, round(reached::numeric / nullif(first_value(reached) OVER o, 0), 4),
            round(reached::numeric / nullif(coalesce(lag(reached) OVER o, reached), 0), 4),
            make_interval(secs => p[1]), make_interval(secs => p[2])
        FROM sums WINDOW o AS (PARTITION BY b ORDER BY step) ORDER BY b, step $q$,
        query, (SELECT string_agg(format('a%s[1] - a%1$s[2]', i), ', ') FROM generate_series(1, n) i), n)
    USING steps, since, until, seconds;
END
$function$;
COMMENT ON FUNCTION @.analytics_funnel IS
'How many users (or families, or sessions) did the steps in this order, the last at most `within` after the first; first steps are in the range, later steps may be after it. strict: without another event of theirs in between. breakdown: by a metadata key of the first entry (value). p50 and p90: the time from the entry to the step, when it was first reached.';

CREATE OR REPLACE FUNCTION @.analytics_sessions(since TIMESTAMPTZ, until TIMESTAMPTZ DEFAULT now())
RETURNS TABLE (
    session_id UUID, user_id UUID, family_unit_id UUID, starts TIMESTAMPTZ, ends TIMESTAMPTZ, events BIGINT
)
LANGUAGE sql STABLE
BEGIN ATOMIC
SELECT e.session_id, e.user_id, min(e.family_unit_id::text)::uuid, min(e.timestamp), max(e.timestamp), count(*)
FROM @.analytics_events e
WHERE e.timestamp >= since - interval '24 hours' AND e.timestamp < until + interval '24 hours' AND e.session_id IS NOT NULL
GROUP BY e.session_id, e.user_id HAVING min(e.timestamp) >= since AND min(e.timestamp) < until;
END;
COMMENT ON FUNCTION @.analytics_sessions IS
'Sessions by session_id and user that start in the range. Events more than 24 hours before or after the range are ignored.';

CREATE OR REPLACE FUNCTION @.analytics_sessions_by_gap(
    since TIMESTAMPTZ, until TIMESTAMPTZ DEFAULT now(), gap INTERVAL DEFAULT '30 minutes'
) RETURNS TABLE (user_id UUID, family_unit_id UUID, starts TIMESTAMPTZ, ends TIMESTAMPTZ, events BIGINT)
LANGUAGE sql STABLE
BEGIN ATOMIC
WITH walked AS (
    SELECT e.user_id, e.family_unit_id, e.timestamp, row_number() OVER w AS place,
        (e.timestamp - lag(e.timestamp) OVER w <= gap) IS NOT TRUE AS begins,
        (lead(e.timestamp) OVER w - e.timestamp <= gap) IS NOT TRUE AS ends
    FROM @.analytics_events e WHERE e.timestamp >= since - gap AND e.timestamp < until + interval '24 hours'
        AND e.user_id IS NOT NULL
    WINDOW w AS (PARTITION BY e.user_id ORDER BY e.timestamp)
), edges AS (  -- the first event of a session and, unless it is the same one, then its last
    SELECT w.*, lead(w.timestamp) OVER s AS last, lead(w.place) OVER s AS last_place
    FROM walked w WHERE w.begins OR w.ends WINDOW s AS (PARTITION BY w.user_id ORDER BY w.place)
)
SELECT e.user_id, e.family_unit_id, e.timestamp, CASE WHEN e.ends THEN e.timestamp ELSE e.last END,
    CASE WHEN e.ends THEN 1 ELSE e.last_place - e.place + 1 END
FROM edges e WHERE e.begins AND e.timestamp >= since AND e.timestamp < until;
END;
COMMENT ON FUNCTION @.analytics_sessions_by_gap IS
'Sessions of users that start in the range: a session ends when no event follows within gap. Events more than 24 hours after the range are ignored.';

CREATE OR REPLACE FUNCTION @.analytics_value_bucket(value NUMERIC) RETURNS SMALLINT
LANGUAGE sql IMMUTABLE PARALLEL SAFE
BEGIN ATOMIC
SELECT CASE WHEN value <= 0 OR value = 'NaN' THEN -32768 WHEN value < 1e-280 THEN -14000 WHEN value > 1e280 THEN 32767
    ELSE ceil(ln(value::float8) * 50) END::smallint;
END;
COMMENT ON FUNCTION @.analytics_value_bucket IS
'Internal. Bucket i holds exp((i - 1) / 50) < value <= exp(i / 50), 1 % to either side of its middle (a DDSketch); -32768 holds zero and what is below. Sketches are merged by adding their counts.';

CREATE OR REPLACE FUNCTION @.analytics_bucket_value(bucket INT) RETURNS FLOAT8
LANGUAGE sql IMMUTABLE PARALLEL SAFE
BEGIN ATOMIC
SELECT CASE WHEN bucket = -32768 THEN 0 ELSE 2 * exp(bucket / 50.0::float8) / (exp(0.02::float8) + 1) END;
END;
COMMENT ON FUNCTION @.analytics_bucket_value IS 'Internal. The value that is within 1 % of every value in a bucket of @.analytics_value_bucket.';

CREATE OR REPLACE FUNCTION @.analytics_request_counts(since TIMESTAMPTZ, until TIMESTAMPTZ, bucket TEXT, tz TEXT)
RETURNS TABLE (key TIMESTAMP, labels JSONB, requests NUMERIC)
LANGUAGE sql STABLE
BEGIN ATOMIC
SELECT h.key, r.labels, r.sum
FROM @.analytics_hours('metrics', since, until, bucket, tz) h JOIN @.analytics_hourly_metrics r ON r.hour = h.hour
WHERE h.rolled AND r.metric_name = 'api_request_count' AND r.hour >= since AND r.hour < until
UNION ALL
SELECT @.analytics_bucket(bucket, m.timestamp, tz), m.labels, m.value
FROM @.analytics_row_spans('metrics', since, until, bucket, tz) s
    CROSS JOIN LATERAL (  -- OFFSET 0 as in analytics_counts
        SELECT m.timestamp, m.labels, m.value FROM @.analytics_metrics m
        WHERE m.metric_name = 'api_request_count' AND m.timestamp >= s.lo AND m.timestamp < s.hi OFFSET 0
    ) m;
END;
COMMENT ON FUNCTION @.analytics_request_counts IS 'Internal. Increments of api_request_count.';

CREATE OR REPLACE FUNCTION @.analytics_request_durations(since TIMESTAMPTZ, until TIMESTAMPTZ, bucket TEXT, tz TEXT)
RETURNS TABLE (key TIMESTAMP, endpoint TEXT, method TEXT, p50 FLOAT8, p95 FLOAT8, p99 FLOAT8)
LANGUAGE sql STABLE
BEGIN ATOMIC
WITH rolled AS (
    SELECT h.key, r.labels->>'endpoint' AS endpoint, r.labels->>'method' AS method, r.buckets, r.counts
    FROM @.analytics_hours('metrics', since, until, bucket, tz) h JOIN @.analytics_hourly_metrics r ON r.hour = h.hour
    WHERE h.rolled AND r.metric_name = 'api_request_duration_ms' AND r.hour >= since AND r.hour < until
), counted AS (
    SELECT c.key, c.endpoint, c.method, c.number, sum(c.n) AS n
    FROM (
        SELECT r.key, r.endpoint, r.method, u.number, u.n FROM rolled r CROSS JOIN unnest(r.buckets, r.counts) AS u(number, n)
        UNION ALL
        SELECT @.analytics_bucket(bucket, m.timestamp, tz), m.labels->>'endpoint', m.labels->>'method', @.analytics_value_bucket(m.value), 1
        FROM @.analytics_row_spans('metrics', since, until, bucket, tz) s
            CROSS JOIN LATERAL (
                SELECT m.timestamp, m.labels, m.value FROM @.analytics_metrics m
                WHERE m.metric_name = 'api_request_duration_ms' AND m.timestamp >= s.lo AND m.timestamp < s.hi OFFSET 0
            ) m
        WHERE bucket <> 'minute'
    ) c GROUP BY 1, 2, 3, 4
), ranked AS (
    SELECT c.key, c.endpoint, c.method, c.number, sum(c.n) OVER (PARTITION BY c.key, c.endpoint, c.method ORDER BY c.number) AS upto,
        sum(c.n) OVER (PARTITION BY c.key, c.endpoint, c.method) AS total
    FROM counted c
)
SELECT r.key, r.endpoint, r.method, @.analytics_bucket_value(min(r.number) FILTER (WHERE r.upto >= 0.5 * r.total)),
    @.analytics_bucket_value(min(r.number) FILTER (WHERE r.upto >= 0.95 * r.total)),
    @.analytics_bucket_value(min(r.number) FILTER (WHERE r.upto >= 0.99 * r.total))
FROM ranked r GROUP BY 1, 2, 3
UNION ALL
SELECT d.key, d.endpoint, d.method, d.p[1]::float8, d.p[2]::float8, d.p[3]::float8
FROM (
    SELECT @.analytics_bucket(bucket, m.timestamp, tz) AS key, m.labels->>'endpoint' AS endpoint, m.labels->>'method' AS method,
        percentile_disc(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (ORDER BY m.value) AS p
    FROM @.analytics_metrics m
    WHERE bucket = 'minute' AND m.metric_name = 'api_request_duration_ms' AND m.timestamp >= since AND m.timestamp < until
    GROUP BY 1, 2, 3
) d;
END;
COMMENT ON FUNCTION @.analytics_request_durations IS
'Internal. Percentiles of api_request_duration_ms: percentile_disc for minutes, within 1 % of it for longer buckets.';

CREATE OR REPLACE FUNCTION @.analytics_requests(
    since TIMESTAMPTZ, until TIMESTAMPTZ DEFAULT now(), bucket TEXT DEFAULT 'hour', tz TEXT DEFAULT 'UTC'
) RETURNS TABLE (
    starts TIMESTAMPTZ, endpoint TEXT, method TEXT, requests BIGINT, errors BIGINT, error_rate NUMERIC,
    p50 FLOAT8, p95 FLOAT8, p99 FLOAT8, complete BOOLEAN
)
LANGUAGE sql STABLE
BEGIN ATOMIC
WITH by_labels AS (
    SELECT c.key, c.labels, sum(c.requests) AS requests FROM @.analytics_request_counts(since, until, bucket, tz) c GROUP BY 1, 2
), counts AS MATERIALIZED (
    SELECT l.key, l.labels->>'endpoint' AS endpoint, l.labels->>'method' AS method, sum(l.requests) AS requests,
        coalesce(sum(l.requests) FILTER (WHERE l.labels->>'status' ~ '^[5-9][0-9][0-9]$'), 0) AS errors
    FROM by_labels l GROUP BY 1, 2, 3
), durations AS MATERIALIZED (
    SELECT d.key, d.endpoint, d.method, d.p50, d.p95, d.p99 FROM @.analytics_request_durations(since, until, bucket, tz) d
), kinds AS (
    SELECT c.endpoint, c.method FROM counts c UNION SELECT d.endpoint, d.method FROM durations d
)
SELECT b.starts, k.endpoint, k.method, coalesce(c.requests, 0)::bigint, coalesce(c.errors, 0)::bigint,
    round(c.errors / nullif(c.requests, 0), 5), d.p50, d.p95, d.p99, b.complete
FROM @.analytics_calendar(bucket, since, until, tz) b CROSS JOIN kinds k
    LEFT JOIN counts c ON c.key = b.key AND (c.endpoint, c.method) IS NOT DISTINCT FROM (k.endpoint, k.method)
    LEFT JOIN durations d ON d.key = b.key AND (d.endpoint, d.method) IS NOT DISTINCT FROM (k.endpoint, k.method)
ORDER BY 1, 2, 3;
END;
COMMENT ON FUNCTION @.analytics_requests IS
'Requests by bucket, endpoint and method: how many (from the counter api_request_count), errors (status 500 and above), and percentiles in milliseconds (from api_request_duration_ms; exact for minutes, within 1 % for longer buckets).';

CREATE OR REPLACE FUNCTION @.analytics_anomalies(
    since TIMESTAMPTZ, until TIMESTAMPTZ DEFAULT now(), tz TEXT DEFAULT 'UTC', threshold FLOAT8 DEFAULT 3
) RETURNS TABLE (event_type VARCHAR, hour TIMESTAMPTZ, events BIGINT, expected FLOAT8, z FLOAT8, alarm BOOLEAN)
LANGUAGE sql STABLE
BEGIN ATOMIC
WITH counted AS MATERIALIZED (
    SELECT c.event_type, c.key AT TIME ZONE 'UTC' AS hour, c.events
    FROM @.analytics_counts(date_trunc('hour', since, 'UTC') - interval '1248 hours', date_trunc('hour', least(until, now()), 'UTC'),
        'hour', 'UTC') c
), kinds AS (  -- below ten an hour, outages cannot be distinguished from chance: they are summed
    SELECT c.event_type, CASE WHEN sum(c.events) FILTER (WHERE c.hour >= since - interval '672 hours' AND c.hour < since) >= 6720
        THEN c.event_type ELSE '(others)' END AS shown
    FROM counted c GROUP BY 1
), shown AS (
    SELECT k.shown AS event_type, c.hour, sum(c.events) AS events FROM counted c JOIN kinds k USING (event_type) GROUP BY 1, 2
), grid AS (
    SELECT k.event_type, h AS hour, h AT TIME ZONE tz AS local, coalesce(s.events, 0)::float8 AS n
    FROM (SELECT DISTINCT kinds.shown AS event_type FROM kinds) k
        CROSS JOIN generate_series(date_trunc('hour', since, 'UTC') - interval '1248 hours',
            date_trunc('hour', least(until, now()), 'UTC') - interval '1 hour', interval '1 hour') h
        LEFT JOIN shown s ON s.event_type = k.event_type AND s.hour = h
), summed AS MATERIALIZED (
    SELECT g.*, sum(g.n) OVER (PARTITION BY g.event_type ORDER BY g.hour ROWS BETWEEN 24 PRECEDING AND 1 PRECEDING) AS day FROM grid g
), wanted AS MATERIALIZED (  -- materialized, so that the join below is by hash: 0.13 s instead of 15
    SELECT s.event_type, s.hour, s.n, s.day, date_trunc('hour', (s.local - w * interval '7 days') AT TIME ZONE tz, 'UTC') AS past
    FROM summed s CROSS JOIN generate_series(1, 4) w WHERE s.hour >= since - interval '504 hours'
), expected AS (
    SELECT w.event_type, w.hour, w.n, percentile_cont(0.5) WITHIN GROUP (
        ORDER BY p.n * CASE WHEN p.day > 0 THEN least(greatest(w.day / p.day, 0.5), 2) ELSE 1 END) AS m
    FROM wanted w JOIN summed p ON p.event_type = w.event_type AND p.hour = w.past GROUP BY 1, 2, 3
), spread AS (
    SELECT e.event_type, greatest(1, percentile_cont(0.5) WITHIN GROUP (ORDER BY (e.n - e.m) ^ 2 / greatest(e.m, 1)) / 0.4549) AS phi
    FROM expected e WHERE e.hour < since GROUP BY 1
), scored AS (
    SELECT e.event_type, e.hour, e.n, e.m, (e.n - e.m) / sqrt(s.phi * greatest(e.m, 1)) AS z FROM expected e JOIN spread s USING (event_type)
), alarms AS (
    SELECT s.*, abs(s.z) > threshold
        AND coalesce(abs(lag(s.z) OVER (PARTITION BY s.event_type ORDER BY s.hour)) > threshold, false) AS alarm
    FROM scored s
)
SELECT a.event_type, a.hour, a.n::bigint, a.m, a.z, a.alarm FROM alarms a WHERE a.hour >= since
ORDER BY 2, 1;
END;
COMMENT ON FUNCTION @.analytics_anomalies IS
'Whole hours of each event type against the same local hour of the last four weeks, scaled by the level of the last 24 hours; z is in units of the series'' own spread. alarm: |z| > threshold in two consecutive hours. It finds outages of three hours and nine doublings of ten, and misses half of all halvings. Types of less than 10 events an hour are summed as (others). Needs 52 days of history.';

CREATE OR REPLACE FUNCTION @.analytics_interactions(
    since TIMESTAMPTZ, until TIMESTAMPTZ DEFAULT now(), half_life INTERVAL DEFAULT '30 days'
) RETURNS TABLE (
    user_id UUID, memory_id TEXT, views BIGINT, reactions BIGINT, comments BIGINT, seconds FLOAT8, weight FLOAT8, last TIMESTAMPTZ
)
LANGUAGE sql STABLE
BEGIN ATOMIC
SELECT e.user_id, e.metadata->>'memory_id', count(*) FILTER (WHERE e.event_type = 'memory_viewed'),
    count(*) FILTER (WHERE e.event_type = 'reaction_created'), count(*) FILTER (WHERE e.event_type = 'comment_created'),
    coalesce(sum(CASE WHEN e.event_type = 'memory_viewed' AND jsonb_typeof(e.metadata->'duration_ms') = 'number'
        AND abs((e.metadata->>'duration_ms')::numeric) < 1e15 THEN (e.metadata->>'duration_ms')::float8 END), 0) / 1000,
    sum(CASE e.event_type WHEN 'memory_viewed' THEN 1 WHEN 'reaction_created' THEN 3 WHEN 'comment_created' THEN 5 ELSE -3 END
        * power(0.5, least(1000, extract(epoch FROM until - e.timestamp)::float8 / extract(epoch FROM half_life)::float8))),
    max(e.timestamp)
FROM @.analytics_events e
WHERE e.user_id IS NOT NULL AND e.event_type IN ('memory_viewed', 'reaction_created', 'reaction_deleted', 'comment_created')
    AND e.timestamp >= since AND e.timestamp < until AND e.metadata ? 'memory_id'
GROUP BY 1, 2;
END;
COMMENT ON FUNCTION @.analytics_interactions IS
'Per user and memory: views, reactions, comments, seconds of viewing, and a weight (view 1, reaction 3, withdrawn reaction -3, comment 5) that halves every half_life before until: input for recommendations.';
CREATE OR REPLACE FUNCTION @.analytics_features(
    as_of TIMESTAMPTZ DEFAULT now(), tz TEXT DEFAULT 'UTC', known TIMESTAMPTZ DEFAULT NULL, users UUID[] DEFAULT NULL
) RETURNS TABLE (
    user_id UUID, family_unit_id UUID, tenure_days FLOAT8, recency_hours FLOAT8,
    events_1d INT, events_7d INT, events_28d INT, active_days_1d INT, active_days_7d INT, active_days_28d INT,
    sessions_28d INT, session_events_mean FLOAT8, session_minutes_mean FLOAT8,
    hour_mean FLOAT8, hour_concentration FLOAT8, weekend_share FLOAT8, types_28d INT, type_entropy_28d FLOAT8,
    user_registered_1d INT, user_registered_7d INT, user_registered_28d INT,
    user_logged_in_1d INT, user_logged_in_7d INT, user_logged_in_28d INT,
    user_logged_out_1d INT, user_logged_out_7d INT, user_logged_out_28d INT,
    memory_posted_1d INT, memory_posted_7d INT, memory_posted_28d INT,
    memory_updated_1d INT, memory_updated_7d INT, memory_updated_28d INT,
    memory_deleted_1d INT, memory_deleted_7d INT, memory_deleted_28d INT,
    memory_viewed_1d INT, memory_viewed_7d INT, memory_viewed_28d INT,
    reaction_created_1d INT, reaction_created_7d INT, reaction_created_28d INT,
    reaction_deleted_1d INT, reaction_deleted_7d INT, reaction_deleted_28d INT,
    comment_created_1d INT, comment_created_7d INT, comment_created_28d INT,
    comment_updated_1d INT, comment_updated_7d INT, comment_updated_28d INT,
    comment_deleted_1d INT, comment_deleted_7d INT, comment_deleted_28d INT,
    feed_viewed_1d INT, feed_viewed_7d INT, feed_viewed_28d INT,
    invite_created_1d INT, invite_created_7d INT, invite_created_28d INT,
    invite_accepted_1d INT, invite_accepted_7d INT, invite_accepted_28d INT,
    child_provisioned_1d INT, child_provisioned_7d INT, child_provisioned_28d INT,
    pet_created_1d INT, pet_created_7d INT, pet_created_28d INT
)
LANGUAGE sql STABLE
BEGIN ATOMIC
WITH recent AS (
    SELECT e.user_id, e.event_type, e.timestamp, e.session_id FROM @.analytics_events e
    WHERE e.timestamp >= as_of - interval '672 hours' AND e.timestamp < as_of AND (known IS NULL OR e.created_at <= known)
        AND (users IS NULL OR e.user_id = ANY (users))
), by_day AS (
    SELECT r.user_id, r.event_type, (r.timestamp AT TIME ZONE tz)::date AS day, max(r.timestamp) AS last, count(*) AS d28,
        count(*) FILTER (WHERE r.timestamp >= as_of - interval '168 hours') AS d7,
        count(*) FILTER (WHERE r.timestamp >= as_of - interval '24 hours') AS d1
    FROM recent r GROUP BY 1, 2, 3
), days AS (
    SELECT d.user_id, max(d.last) AS last, count(DISTINCT d.day)::int AS d28, (count(DISTINCT d.day) FILTER (WHERE d.d7 > 0))::int AS d7,
        (count(DISTINCT d.day) FILTER (WHERE d.d1 > 0))::int AS d1
    FROM by_day d GROUP BY 1
), by_type AS (
    SELECT d.user_id, d.event_type, sum(d.d28) AS d28, sum(d.d7) AS d7, sum(d.d1) AS d1 FROM by_day d GROUP BY 1, 2
), wide AS (
    SELECT k.user_id, sum(k.d1)::int AS d1, sum(k.d7)::int AS d7, sum(k.d28)::int AS d28, count(*)::int AS types,
        greatest(0, ln(sum(k.d28)) - sum(k.d28 * ln(k.d28)) / sum(k.d28))::float8 AS entropy,
        coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'user_registered'), 0)::int AS user_registered_1d,
        coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'user_registered'), 0)::int AS user_registered_7d,
        coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'user_registered'), 0)::int AS user_registered_28d,
        coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'user_logged_in'), 0)::int AS user_logged_in_1d,
        coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'user_logged_in'), 0)::int AS user_logged_in_7d,
        coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'user_logged_in'), 0)::int AS user_logged_in_28d,
        coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'user_logged_out'), 0)::int AS user_logged_out_1d,
        coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'user_logged_out'), 0)::int AS user_logged_out_7d,
        coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'user_logged_out'), 0)::int AS user_logged_out_28d,
        coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'memory_posted'), 0)::int AS memory_posted_1d,
        coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'memory_posted'), 0)::int AS memory_posted_7d,
        coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'memory_posted'), 0)::int AS memory_posted_28d,
        coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'memory_updated'), 0)::int AS memory_updated_1d,
        coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'memory_updated'), 0)::int AS memory_updated_7d,
        coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'memory_updated'), 0)::int AS memory_updated_28d,
        coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'memory_deleted'), 0)::int AS memory_deleted_1d,
        coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'memory_deleted'), 0)::int AS memory_deleted_7d,
        coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'memory_deleted'), 0)::int AS memory_deleted_28d,
        coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'memory_viewed'), 0)::int AS memory_viewed_1d,
        coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'memory_viewed'), 0)::int AS memory_viewed_7d,
        coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'memory_viewed'), 0)::int AS memory_viewed_28d,
        coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'reaction_created'), 0)::int AS reaction_created_1d,
        coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'reaction_created'), 0)::int AS reaction_created_7d,
        coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'reaction_created'), 0)::int AS reaction_created_28d,
        coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'reaction_deleted'), 0)::int AS reaction_deleted_1d,
        coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'reaction_deleted'), 0)::int AS reaction_deleted_7d,
        coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'reaction_deleted'), 0)::int AS reaction_deleted_28d,
        coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'comment_created'), 0)::int AS comment_created_1d,
        coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'comment_created'), 0)::int AS comment_created_7d,
        coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'comment_created'), 0)::int AS comment_created_28d,
        coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'comment_updated'), 0)::int AS comment_updated_1d,
        coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'comment_updated'), 0)::int AS comment_updated_7d,
        coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'comment_updated'), 0)::int AS comment_updated_28d,
        coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'comment_deleted'), 0)::int AS comment_deleted_1d,
        coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'comment_deleted'), 0)::int AS comment_deleted_7d,
        coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'comment_deleted'), 0)::int AS comment_deleted_28d,
        coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'feed_viewed'), 0)::int AS feed_viewed_1d,
        coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'feed_viewed'), 0)::int AS feed_viewed_7d,
        coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'feed_viewed'), 0)::int AS feed_viewed_28d,
        coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'invite_created'), 0)::int AS invite_created_1d,
        coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'invite_created'), 0)::int AS invite_created_7d,
        coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'invite_created'), 0)::int AS invite_created_28d,
        coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'invite_accepted'), 0)::int AS invite_accepted_1d,
        coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'invite_accepted'), 0)::int AS invite_accepted_7d,
        coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'invite_accepted'), 0)::int AS invite_accepted_28d,
        coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'child_provisioned'), 0)::int AS child_provisioned_1d,
        coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'child_provisioned'), 0)::int AS child_provisioned_7d,
        coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'child_provisioned'), 0)::int AS child_provisioned_28d,
        coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'pet_created'), 0)::int AS pet_created_1d,
        coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'pet_created'), 0)::int AS pet_created_7d,
        coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'pet_created'), 0)::int AS pet_created_28d
    FROM by_type k GROUP BY 1
), by_session AS (
    SELECT r.user_id, min(r.timestamp) AS starts, max(r.timestamp) AS ends, count(*) AS events
    FROM recent r WHERE r.session_id IS NOT NULL GROUP BY r.user_id, r.session_id
    UNION ALL
    SELECT n.user_id, min(n.timestamp), max(n.timestamp), count(*)
    FROM (
        SELECT m.user_id, m.timestamp, count(*) FILTER (WHERE m.begins) OVER (PARTITION BY m.user_id ORDER BY m.timestamp) AS number
        FROM (
            SELECT r.user_id, r.timestamp, (r.timestamp - lag(r.timestamp) OVER (PARTITION BY r.user_id ORDER BY r.timestamp)
                <= interval '30 minutes') IS NOT TRUE AS begins
            FROM recent r WHERE r.session_id IS NULL
        ) m
    ) n GROUP BY n.user_id, n.number
), habits AS (
    SELECT s.user_id, count(*)::int AS sessions, avg(s.events)::float8 AS events,
        avg(extract(epoch FROM s.ends - s.starts) / 60)::float8 AS minutes,
        avg(sin(h.angle)::numeric)::float8 AS y, avg(cos(h.angle)::numeric)::float8 AS x,
        avg((extract(isodow FROM s.starts AT TIME ZONE tz) > 5)::int)::float8 AS weekend
    FROM by_session s
        CROSS JOIN LATERAL (SELECT extract(epoch FROM (s.starts AT TIME ZONE tz)::time)::float8 / 86400 * 2 * pi()) h(angle)
    GROUP BY 1
)
SELECT h.user_id, l.family_unit_id, extract(epoch FROM as_of - f.first)::float8 / 86400,
    extract(epoch FROM as_of - d.last)::float8 / 3600, w.d1, w.d7, w.d28, d.d1, d.d7, d.d28, h.sessions, h.events, h.minutes,
    (CASE WHEN atan2(h.y, h.x) < 0 THEN atan2(h.y, h.x) + 2 * pi() ELSE atan2(h.y, h.x) END) / (2 * pi()) * 24,
    sqrt(h.x * h.x + h.y * h.y), h.weekend, w.types, w.entropy,
    w.user_registered_1d, w.user_registered_7d, w.user_registered_28d, w.user_logged_in_1d, w.user_logged_in_7d,
    w.user_logged_in_28d, w.user_logged_out_1d, w.user_logged_out_7d, w.user_logged_out_28d, w.memory_posted_1d,
    w.memory_posted_7d, w.memory_posted_28d, w.memory_updated_1d, w.memory_updated_7d, w.memory_updated_28d,
    w.memory_deleted_1d, w.memory_deleted_7d, w.memory_deleted_28d, w.memory_viewed_1d, w.memory_viewed_7d,
    w.memory_viewed_28d, w.reaction_created_1d, w.reaction_created_7d, w.reaction_created_28d,
    w.reaction_deleted_1d, w.reaction_deleted_7d, w.reaction_deleted_28d, w.comment_created_1d,
    w.comment_created_7d, w.comment_created_28d, w.comment_updated_1d, w.comment_updated_7d, w.comment_updated_28d,
    w.comment_deleted_1d, w.comment_deleted_7d, w.comment_deleted_28d, w.feed_viewed_1d, w.feed_viewed_7d,
    w.feed_viewed_28d, w.invite_created_1d, w.invite_created_7d, w.invite_created_28d, w.invite_accepted_1d,
    w.invite_accepted_7d, w.invite_accepted_28d, w.child_provisioned_1d, w.child_provisioned_7d,
    w.child_provisioned_28d, w.pet_created_1d, w.pet_created_7d, w.pet_created_28d
FROM habits h JOIN wide w ON w.user_id = h.user_id JOIN days d ON d.user_id = h.user_id
    CROSS JOIN LATERAL (
        SELECT e.timestamp AS first FROM @.analytics_events e
        WHERE e.user_id = h.user_id AND (known IS NULL OR e.created_at <= known) ORDER BY e.timestamp LIMIT 1
    ) f
    CROSS JOIN LATERAL (
        SELECT e.family_unit_id FROM @.analytics_events e
        WHERE e.user_id = h.user_id AND e.timestamp < as_of AND (known IS NULL OR e.created_at <= known)
        ORDER BY e.timestamp DESC, e.event_id DESC LIMIT 1
    ) l;
END;
COMMENT ON FUNCTION @.analytics_features IS
'One row per user with an event in the 28 days (of 24 hours) before as_of; reads no event at or after as_of, and with known none loaded after known: an event that arrived late did not exist when a model would have been queried. After a backfill created_at is that of the backfill: leave known NULL. users: only these. tenure_days goes back to the oldest kept row; days are those of the zone tz; hour_mean is the mean angle on a clock of 24 hours, hour_concentration 0 (spread) to 1 (always the same hour); events without session_id form sessions by gaps of 30 minutes; type_entropy in nats.';
-- ---- maintaining the rollups ----
-- A refresh deletes marks and recomputes their hours in one snapshot: visible rows are counted, and invisible
-- rows have a mark that is not visible either. All changes of a rollup hold one advisory lock.

CREATE OR REPLACE FUNCTION @.analytics_mark(wanted TEXT, since TIMESTAMPTZ, until TIMESTAMPTZ) RETURNS VOID
LANGUAGE sql
BEGIN ATOMIC
INSERT INTO @.analytics_touched (hour, source)
SELECT h, wanted FROM generate_series(date_trunc('hour', since, 'UTC'), until - interval '1 microsecond', interval '1 hour') h;
END;
COMMENT ON FUNCTION @.analytics_mark IS
'Mark the hours of a range (source: events or metrics) whose rows were inserted, changed or deleted by other programs than the loader; call it in the same transaction. Pruned hours must not be changed.';

CREATE OR REPLACE FUNCTION @.analytics_islands(hours TIMESTAMPTZ[], step INTERVAL)
RETURNS TABLE (lo TIMESTAMPTZ, hi TIMESTAMPTZ)
LANGUAGE sql IMMUTABLE
BEGIN ATOMIC
SELECT min(h.hour), max(h.hour) + step
FROM (SELECT u AS hour, u - row_number() OVER (ORDER BY u) * step AS island FROM unnest(hours) u) h GROUP BY h.island;
END;
COMMENT ON FUNCTION @.analytics_islands IS
'Internal. Joins consecutive hours (or days), so that rows are read in few ranges whose size the planner knows: joining hour by hour, PostgreSQL 15 took five times as long.';

CREATE OR REPLACE FUNCTION @.analytics_roll_events(hours TIMESTAMPTZ[]) RETURNS VOID
LANGUAGE plpgsql SET plan_cache_mode = force_custom_plan SET jit = off SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    island RECORD;
BEGIN
    DELETE FROM @.analytics_hourly_events WHERE hour = ANY (hours);
    FOR island IN SELECT * FROM @.analytics_islands(hours, interval '1 hour') LOOP
        INSERT INTO @.analytics_hourly_events (hour, event_type, events)
        SELECT date_trunc('hour', e.timestamp, 'UTC'), e.event_type, count(*)
        FROM @.analytics_events e WHERE e.timestamp >= island.lo AND e.timestamp < island.hi
        GROUP BY 1, 2;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION @.analytics_roll_events IS 'Internal. Computes the rollup of hours that are not pruned.';

CREATE OR REPLACE FUNCTION @.analytics_roll_metrics(hours TIMESTAMPTZ[]) RETURNS VOID
LANGUAGE plpgsql SET plan_cache_mode = force_custom_plan SET jit = off SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    island RECORD;
BEGIN
    DELETE FROM @.analytics_hourly_metrics WHERE hour = ANY (hours);
    FOR island IN SELECT * FROM @.analytics_islands(hours, interval '1 hour') LOOP
        INSERT INTO @.analytics_hourly_metrics (hour, metric_name, labels, records, sum, min, max, buckets, counts)
        SELECT b.hour, b.metric_name, b.labels, sum(b.n), sum(b.sum), min(b.min), max(b.max),
            array_agg(b.bucket ORDER BY b.bucket), array_agg(b.n::int ORDER BY b.bucket)
        FROM (
            SELECT date_trunc('hour', m.timestamp, 'UTC') AS hour, m.metric_name, m.labels,
                @.analytics_value_bucket(m.value) AS bucket, count(*) AS n,
                sum(m.value) AS sum, min(m.value) AS min, max(m.value) AS max
            FROM @.analytics_metrics m WHERE m.timestamp >= island.lo AND m.timestamp < island.hi
            GROUP BY 1, 2, 3, 4
        ) b GROUP BY 1, 2, 3;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION @.analytics_roll_metrics IS 'Internal. Computes the rollup of metrics, as @.analytics_roll_events does for events.';

CREATE OR REPLACE FUNCTION @.analytics_roll_users(days TIMESTAMPTZ[]) RETURNS VOID
LANGUAGE plpgsql SET plan_cache_mode = force_custom_plan SET jit = off SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    island RECORD;
BEGIN
    -- The user days of a day with a pruned hour are only added to.
    DELETE FROM @.analytics_user_days u USING unnest(days) d
    WHERE u.day = (d AT TIME ZONE 'UTC')::date AND NOT EXISTS (
        SELECT FROM @.analytics_sealed s WHERE s.source = 'events' AND s.hour >= d AND s.hour < d + interval '24 hours'
    );
    FOR island IN SELECT * FROM @.analytics_islands(days, interval '24 hours') LOOP
        INSERT INTO @.analytics_user_days AS old (day, user_id, family_unit_id, quarters)
        SELECT (e.timestamp AT TIME ZONE 'UTC')::date, e.user_id, e.family_unit_id,
            bit_or(set_bit(0::bit(96), floor(date_part('epoch', (e.timestamp AT TIME ZONE 'UTC')::time) / 900)::int, 1))
        FROM @.analytics_events e WHERE e.timestamp >= island.lo AND e.timestamp < island.hi
        GROUP BY 1, 2, 3
        ON CONFLICT (day, user_id, family_unit_id) DO UPDATE SET quarters = old.quarters | excluded.quarters;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION @.analytics_roll_users IS 'Internal. Computes the user days of UTC days, given by their first instants.';

CREATE OR REPLACE FUNCTION @.analytics_rebuild() RETURNS BIGINT
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    marked BIGINT;
BEGIN
    IF current_setting('transaction_isolation') = 'read committed' THEN
        RAISE EXCEPTION 'analytics_rebuild needs one snapshot'
            USING HINT = 'Call it in a transaction that is REPEATABLE READ.';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('analytics_rollup'));
    DELETE FROM @.analytics_touched WHERE hour = '-infinity';
    INSERT INTO @.analytics_touched (hour, source)
    SELECT date_trunc('hour', timestamp, 'UTC'), 'events' FROM @.analytics_events GROUP BY 1
    UNION SELECT hour, 'events' FROM @.analytics_hourly_events
    UNION SELECT date_trunc('hour', timestamp, 'UTC'), 'metrics' FROM @.analytics_metrics GROUP BY 1
    UNION SELECT hour, 'metrics' FROM @.analytics_hourly_metrics
    UNION SELECT day::timestamp AT TIME ZONE 'UTC', 'users' FROM @.analytics_user_days
    EXCEPT SELECT hour, source FROM @.analytics_sealed;
    GET DIAGNOSTICS marked = ROW_COUNT;
    RETURN marked;
END
$function$;
COMMENT ON FUNCTION @.analytics_rebuild IS
'Marks every hour with rows or a rollup, so that refreshes recompute all rollups; pruned hours keep theirs. Returns the number of marks. REPEATABLE READ only.';

CREATE OR REPLACE FUNCTION @.analytics_refresh(at_most INT DEFAULT 168) RETURNS INT
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    wanted TEXT;
    hours TIMESTAMPTZ[];
    days TIMESTAMPTZ[];
    done INT := 0;
BEGIN
    IF current_setting('transaction_isolation') = 'read committed' THEN
        RAISE EXCEPTION 'analytics_refresh needs one snapshot'
            USING HINT = 'Call it in a transaction that is REPEATABLE READ.';
    ELSIF NOT pg_try_advisory_xact_lock(hashtext('analytics_rollup')) THEN
        RETURN 0;
    END IF;
    IF EXISTS (SELECT FROM @.analytics_touched WHERE hour = '-infinity') THEN
        PERFORM @.analytics_rebuild();
    END IF;
    FOREACH wanted IN ARRAY ARRAY['events', 'metrics'] LOOP
        hours := ARRAY(
            SELECT DISTINCT t.hour FROM @.analytics_touched t
            WHERE t.source = wanted AND t.hour <= now() - interval '1 hour'
                AND NOT EXISTS (SELECT FROM @.analytics_sealed s WHERE s.source = wanted AND s.hour = t.hour)
            ORDER BY 1 DESC LIMIT at_most
        );
        DELETE FROM @.analytics_touched WHERE source = wanted AND hour = ANY (hours);
        IF wanted = 'events' THEN
            PERFORM @.analytics_roll_events(hours);
            INSERT INTO @.analytics_touched (hour, source) SELECT DISTINCT date_trunc('day', h, 'UTC'), 'users' FROM unnest(hours) h;
        ELSE
            PERFORM @.analytics_roll_metrics(hours);
        END IF;
        done := done + cardinality(hours);
    END LOOP;
    days := ARRAY(  -- that have ended, and none of whose hours is touched
        SELECT DISTINCT t.hour FROM @.analytics_touched t
        WHERE t.source = 'users' AND t.hour <= now() - interval '24 hours' AND NOT EXISTS (
            SELECT FROM @.analytics_touched e WHERE e.source = 'events'
                AND e.hour >= t.hour AND e.hour < t.hour + interval '24 hours'
                AND NOT EXISTS (SELECT FROM @.analytics_sealed s WHERE s.source = 'events' AND s.hour = e.hour)
        )
        ORDER BY 1 DESC LIMIT greatest(1, at_most / 24)
    );
    DELETE FROM @.analytics_touched WHERE source = 'users' AND hour = ANY (days);
    PERFORM @.analytics_roll_users(days);
    RETURN done + cardinality(days);
END
$function$;
COMMENT ON FUNCTION @.analytics_refresh IS
'Computes the rollups of touched hours and days that have ended, at most at_most of each; returns their number: call it until it returns 0. Returns 0 immediately while another refresh runs. REPEATABLE READ only; after a serialization failure, try again.';

CREATE OR REPLACE FUNCTION @.analytics_check_rollups(since TIMESTAMPTZ, until TIMESTAMPTZ DEFAULT now())
RETURNS TABLE (source TEXT, hour TIMESTAMPTZ, in_rows BIGINT, in_rollup BIGINT)
LANGUAGE sql STABLE
BEGIN ATOMIC
WITH counted AS (
    SELECT 'events' AS source, date_trunc('hour', e.timestamp, 'UTC') AS hour, count(*) AS in_rows, 0::bigint AS in_rollup
    FROM @.analytics_events e WHERE e.timestamp >= since AND e.timestamp < until GROUP BY 2
    UNION ALL
    SELECT 'metrics', date_trunc('hour', m.timestamp, 'UTC'), count(*), 0
    FROM @.analytics_metrics m WHERE m.timestamp >= since AND m.timestamp < until GROUP BY 2
    UNION ALL
    SELECT 'events', r.hour, 0, r.events FROM @.analytics_hourly_events r WHERE r.hour >= since AND r.hour < until
    UNION ALL
    SELECT 'metrics', r.hour, 0, r.records FROM @.analytics_hourly_metrics r WHERE r.hour >= since AND r.hour < until
)
SELECT c.source, c.hour, sum(c.in_rows)::bigint, sum(c.in_rollup)::bigint
FROM counted c
WHERE c.hour >= since AND c.hour + interval '1 hour' <= until
    AND NOT EXISTS (SELECT FROM @.analytics_sealed s WHERE s.source = c.source AND s.hour = c.hour)
    AND NOT EXISTS (SELECT FROM @.analytics_touched t WHERE t.source = c.source AND t.hour IN (c.hour, '-infinity'))
GROUP BY 1, 2 HAVING sum(c.in_rows) <> sum(c.in_rollup)
ORDER BY 1, 2;
END;
COMMENT ON FUNCTION @.analytics_check_rollups IS
'Hours whose rollup differs from their rows, because rows were changed without analytics_mark. Reads all rows of the range.';

-- ---- partitions ----
-- With the partitioned layout, the indexes that a load writes to are those of the last days, so they stay in memory
-- however large the table grows, and old rows are deleted by dropping their partition. Bounds are UTC midnights.

CREATE OR REPLACE FUNCTION @.analytics_id_at(moment TIMESTAMPTZ) RETURNS UUID
LANGUAGE sql STABLE STRICT PARALLEL SAFE
BEGIN ATOMIC
SELECT (lpad(to_hex(greatest(0, least(281474976710655, floor(extract(epoch FROM moment) * 1000)))::bigint), 12, '0')
    || repeat('0', 20))::uuid;
END;
COMMENT ON FUNCTION @.analytics_id_at IS
'The smallest UUIDv7 of a time, in milliseconds. A condition on event_id, or on the id of a metric, lets Postgres skip partitions: event_id >= analytics_id_at(now() - interval ''1 day'').';

CREATE OR REPLACE FUNCTION @.analytics_id_time(id UUID) RETURNS TIMESTAMPTZ
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
BEGIN ATOMIC
SELECT to_timestamp(('x' || left(replace(id::text, '-', ''), 12))::bit(48)::bigint / 1000.0);
END;
COMMENT ON FUNCTION @.analytics_id_time IS 'The time in a UUIDv7, at which it was created.';

CREATE OR REPLACE FUNCTION @.analytics_partitions(wanted TEXT)
RETURNS TABLE (partition REGCLASS, low UUID, high UUID, is_default BOOLEAN)
LANGUAGE sql STABLE
BEGIN ATOMIC
SELECT c.oid::regclass, nullif(bound[1], 'MINVALUE')::uuid, nullif(bound[2], 'MAXVALUE')::uuid, b.expression = 'DEFAULT'
FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
    CROSS JOIN pg_get_expr(c.relpartbound, c.oid) AS b (expression)
    CROSS JOIN regexp_match(b.expression, '\(''?([0-9a-f-]{36}|MINVALUE)''?\) TO \(''?([0-9a-f-]{36}|MAXVALUE)''?\)') AS bound
WHERE i.inhparent = to_regclass('@.analytics_' || wanted)::oid AND c.relpartbound IS NOT NULL;
END;
COMMENT ON FUNCTION @.analytics_partitions IS
'The partitions of the source events or metrics with their ranges of ids, low <= id < high; NULL means no bound. is_default is the partition for all other ids.';

CREATE OR REPLACE FUNCTION @.analytics_make_partition(wanted TEXT, key NAME, since TIMESTAMPTZ, until TIMESTAMPTZ) RETURNS VOID
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $function$
-- Created separately and then attached, so that loads and reads continue: CREATE TABLE ... PARTITION OF takes
-- ACCESS EXCLUSIVE on the parent. Attaching locks the default partition and the tables that foreign keys reference.
-- A query that waits for the default partition has already planned which partitions it reads. So if rows are to be
-- moved, the parent is locked first; rows that arrive in between make ATTACH fail (23514), and it is tried again.
DECLARE
    moves BOOLEAN;
    parent CONSTANT NAME := 'analytics_' || wanted;
    waiting CONSTANT NAME := parent || '_default';
    child CONSTANT NAME := parent || to_char(since, '_YYYYMMDD');
    within CONSTANT TEXT := format('%1$I >= %2$L AND %1$I < %3$L', key, @.analytics_id_at(since), @.analytics_id_at(until));
    columns CONSTANT TEXT := (SELECT string_agg(quote_ident(a.attname), ', ') FROM pg_attribute a
        WHERE a.attrelid = to_regclass(format('@.%I', parent))::oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '');
BEGIN
    IF to_regclass(format('@.%I', child)) IS NOT NULL THEN
        RAISE EXCEPTION 'the table "%" exists and is not a partition for % to %: rename or drop it', child, since, until;
    END IF;
    EXECUTE format('CREATE TABLE @.%I (LIKE @.%I INCLUDING DEFAULTS INCLUDING GENERATED INCLUDING CONSTRAINTS '
        'INCLUDING STORAGE INCLUDING COMPRESSION) WITH (autovacuum_vacuum_insert_scale_factor = 0.01)', child, parent);
    IF to_regclass(format('@.%I', waiting)) IS NOT NULL THEN
        EXECUTE format('SELECT EXISTS (SELECT 1 FROM @.%I WHERE %s)', waiting, within) INTO moves;
        IF moves THEN
            EXECUTE format('LOCK TABLE %s @.%I IN ACCESS EXCLUSIVE MODE', CASE WHEN EXISTS (
                SELECT FROM @.analytics_settings s WHERE s.name = 'layout' AND s.value = 'citus') THEN '' ELSE 'ONLY' END, parent);
            EXECUTE format('LOCK TABLE @.%I IN ACCESS EXCLUSIVE MODE', waiting);
            EXECUTE format('WITH moved AS (DELETE FROM @.%I WHERE %s RETURNING *) INSERT INTO @.%I (%s) SELECT %4$s FROM moved',
                waiting, within, child, columns);
        END IF;
    END IF;
    EXECUTE format('ALTER TABLE @.%I ATTACH PARTITION @.%I FOR VALUES FROM (%L) TO (%L)',
        parent, child, @.analytics_id_at(since), @.analytics_id_at(until));
END
$function$;
COMMENT ON FUNCTION @.analytics_make_partition IS
'Internal. Creates one partition, and moves its rows from the default partition.';

CREATE OR REPLACE FUNCTION @.analytics_make_partitions(
    since TIMESTAMPTZ DEFAULT NULL, until TIMESTAMPTZ DEFAULT NULL, at_most INT DEFAULT 1
) RETURNS INT
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' SET lock_timeout = '100ms'
AS $function$
DECLARE
    width CONSTANT TEXT := coalesce((SELECT value FROM @.analytics_settings WHERE name = 'partition_width'), 'day');
    step CONSTANT INTERVAL := '1 ' || width;
    first CONSTANT TIMESTAMPTZ := coalesce(since, now() - interval '2 days');
    finish CONSTANT TIMESTAMPTZ := coalesce(until, now() + interval '14 days' + step);
    wanted TEXT;
    key NAME;
    covered TSTZMULTIRANGE;
    needed TSTZMULTIRANGE;
    gap TSTZRANGE;
    begins TIMESTAMPTZ;
    ends TIMESTAMPTZ;
    made INT := 0;
BEGIN
    IF NOT EXISTS (SELECT FROM @.analytics_settings WHERE name = 'layout' AND value <> 'plain') THEN
        RETURN 0;
    ELSIF NOT (first >= '2020-01-01' AND finish <= now() + interval '400 days') THEN  -- refuses the dates of a wrong clock
        RAISE EXCEPTION 'cannot create partitions for % to %: only from 2020 on, and for 400 days ahead', first, finish;
    END IF;
    PERFORM set_config('citus.multi_shard_modify_mode', 'sequential', true);  -- in parallel, it would wait for itself
    PERFORM pg_advisory_xact_lock(hashtext('analytics_partitions'));
    FOR wanted, key IN VALUES ('events', 'event_id'), ('metrics', 'id') LOOP
        covered := (SELECT range_agg(tstzrange(@.analytics_id_time(p.low), @.analytics_id_time(p.high)))
            FROM @.analytics_partitions(wanted) p WHERE NOT p.is_default);
        needed := CASE WHEN first < finish
            THEN tstzmultirange(tstzrange(date_trunc(width, first), date_trunc(width, finish - interval '1 microsecond') + step))
            ELSE '{}' END;
        -- Rows of other days in the default partition: loaded late, or from a host with a wrong clock.
        IF since IS NULL AND (SELECT count(*) FROM @.analytics_partitions(wanted)) < 400 THEN
            EXECUTE format($q$SELECT $1 + coalesce(range_agg(tstzrange(day, day + $3)), '{}') FROM (
                SELECT DISTINCT date_trunc($2, @.analytics_id_time(%1$I)) AS day FROM @.%2$I
                WHERE %1$I < @.analytics_id_at($4) AND substr(%1$I::text, 15, 1) = '7') AS waiting$q$,
                key, format('analytics_%s_default', wanted)) INTO needed USING needed, width, step, finish;
        END IF;
        FOR gap IN SELECT unnest(needed - covered) LOOP
            begins := lower(gap);
            WHILE begins < upper(gap) AND made < at_most LOOP
                ends := least(date_trunc(width, begins) + step, upper(gap));
                PERFORM @.analytics_make_partition(wanted, key, begins, ends);
                made := made + 1;
                begins := ends;
            END LOOP;
        END LOOP;
    END LOOP;
    RETURN made;
END
$function$;
COMMENT ON FUNCTION @.analytics_make_partitions IS
'Creates up to at_most missing partitions, and returns their number: call it until it returns 0, each time in its own transaction, because it locks the tables that foreign keys reference. Without arguments: for the next 14 days, and for rows in the default partition. Waits at most 100 ms for a lock: after lock_not_available (55P03), try again. Returns 0 for the plain layout.';

-- ---- retention ----
-- Each table has a low-water mark in analytics_settings: rows below it were deleted, so a load counts lines below it as
-- expired. It is raised in the transaction that deletes rows. On partitioned tables, whole partitions are dropped; rows are
-- deleted only from partitions without bounds in time, by the time in a UUIDv7, or by `timestamp` for other ids.

CREATE OR REPLACE FUNCTION @.analytics_kept_since(wanted TEXT) RETURNS TIMESTAMPTZ
LANGUAGE sql STABLE
BEGIN ATOMIC
SELECT max(s.value::timestamptz) FROM @.analytics_settings s WHERE s.name = wanted || '_kept_since';
END;
COMMENT ON FUNCTION @.analytics_kept_since IS
'The low-water mark of events or metrics: older rows were pruned, and lines below it are expired. NULL if nothing was pruned.';

CREATE OR REPLACE FUNCTION @.analytics_raise_mark(wanted TEXT, moment TIMESTAMPTZ) RETURNS VOID
LANGUAGE sql
BEGIN ATOMIC
INSERT INTO @.analytics_settings AS old (name, value)
SELECT wanted || '_kept_since',
    to_char(greatest(moment, timestamptz '0001-01-01 00:00+00') AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')
ON CONFLICT (name) DO UPDATE SET value = excluded.value WHERE old.value::timestamptz < excluded.value::timestamptz;
END;
COMMENT ON FUNCTION @.analytics_raise_mark IS 'Internal. Raises a low-water mark, and never lowers it.';

CREATE OR REPLACE FUNCTION @.analytics_has_time(id UUID) RETURNS BOOLEAN
LANGUAGE sql IMMUTABLE PARALLEL SAFE
BEGIN ATOMIC
SELECT get_byte(uuid_send(id), 6) >> 4 = 7;
END;
COMMENT ON FUNCTION @.analytics_has_time IS 'Internal. Whether a UUID begins with the time of its creation (version 7).';

CREATE OR REPLACE FUNCTION @.analytics_time_partitions(wanted TEXT)
RETURNS TABLE (child REGCLASS, since TIMESTAMPTZ, until TIMESTAMPTZ)
LANGUAGE sql STABLE
BEGIN ATOMIC
SELECT p.partition, @.analytics_id_time(p.low), @.analytics_id_time(p.high) FROM @.analytics_partitions(wanted) p
WHERE p.high > @.analytics_id_at('2020-01-01 00:00+00')  -- which the early ids lie below
    AND NOT EXISTS (SELECT FROM @.analytics_settings s WHERE s.name = 'layout' AND s.value = 'citus')
ORDER BY p.high;
END;
COMMENT ON FUNCTION @.analytics_time_partitions IS
'Internal. The partitions with bounds in time (since is NULL for a migrated plain table); none if the tables are not partitioned, or distributed by Citus.';

CREATE OR REPLACE FUNCTION @.analytics_untimed(wanted TEXT) RETURNS SETOF REGCLASS
LANGUAGE sql STABLE
BEGIN ATOMIC
SELECT ('@.analytics_' || wanted)::regclass
WHERE NOT EXISTS (SELECT FROM pg_class WHERE oid = ('@.analytics_' || wanted)::regclass AND relkind = 'p')
    OR EXISTS (SELECT FROM @.analytics_settings s WHERE s.name = 'layout' AND s.value = 'citus')
UNION ALL
SELECT p.partition FROM @.analytics_partitions(wanted) p
WHERE p.partition NOT IN (SELECT t.child FROM @.analytics_time_partitions(wanted) t WHERE t.since IS NOT NULL)
    AND NOT EXISTS (SELECT FROM @.analytics_settings s WHERE s.name = 'layout' AND s.value = 'citus');
END;
COMMENT ON FUNCTION @.analytics_untimed IS
'Internal. The tables from which rows are deleted: the plain table, the table on Citus, or the partitions without bounds in time.';

CREATE OR REPLACE FUNCTION @.analytics_row_hours(wanted TEXT, before TIMESTAMPTZ) RETURNS SETOF TIMESTAMPTZ
LANGUAGE plpgsql STABLE SET plan_cache_mode = force_custom_plan SET jit = off SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    name CONSTANT TEXT := CASE wanted WHEN 'events' THEN 'event_type' WHEN 'metrics' THEN 'metric_name' END;
    child REGCLASS;
BEGIN
    IF EXISTS (SELECT FROM @.analytics_settings s WHERE s.name = 'layout' AND s.value = 'citus') THEN  -- which has no recursion
        RETURN QUERY EXECUTE format('SELECT DISTINCT date_trunc(''hour'', timestamp, ''UTC'') FROM @.analytics_%s '
            'WHERE timestamp > ''-infinity'' AND timestamp < $1', wanted) USING before;
        RETURN;
    END IF;
    FOR child IN SELECT * FROM @.analytics_untimed(wanted) LOOP
        RETURN QUERY EXECUTE format($q$
            WITH RECURSIVE kinds AS (
                (SELECT %1$I AS kind FROM %2$s ORDER BY 1 LIMIT 1)
                UNION ALL
                SELECT (SELECT %1$I FROM %2$s WHERE %1$I > k.kind ORDER BY 1 LIMIT 1) FROM kinds k WHERE k.kind IS NOT NULL
            ), leaps AS (
                SELECT k.kind, (SELECT min(timestamp) FROM %2$s
                    WHERE %1$I = k.kind AND timestamp > '-infinity' AND timestamp < $1) AS at
                FROM kinds k WHERE k.kind IS NOT NULL
                UNION ALL
                SELECT l.kind, (SELECT min(timestamp) FROM %2$s
                    WHERE %1$I = l.kind AND timestamp >= date_trunc('hour', l.at, 'UTC') + interval '1 hour' AND timestamp < $1)
                FROM leaps l WHERE l.at IS NOT NULL
            )
            SELECT DISTINCT date_trunc('hour', l.at, 'UTC') FROM leaps l WHERE l.at IS NOT NULL $q$, name, child) USING before;
    END LOOP;
END
$function$;
COMMENT ON FUNCTION @.analytics_row_hours IS
'Internal. The hours before a time that have rows to delete, by a loose scan of the index that begins with their kind.';

CREATE OR REPLACE FUNCTION @.analytics_prunable(wanted TEXT, before TIMESTAMPTZ) RETURNS SETOF TIMESTAMPTZ
LANGUAGE sql STABLE
BEGIN ATOMIC
SELECT h.hour FROM (
    SELECT r AS hour FROM @.analytics_row_hours(wanted, before) r
    UNION
    SELECT t.hour FROM @.analytics_touched t WHERE t.source = wanted AND isfinite(t.hour)
    UNION
    (SELECT r.hour FROM @.analytics_hourly_events r WHERE wanted = 'events'
    UNION SELECT r.hour FROM @.analytics_hourly_metrics r WHERE wanted = 'metrics'
    EXCEPT SELECT s.hour FROM @.analytics_sealed s WHERE s.source = wanted)
) h
WHERE h.hour + interval '1 hour' <= before ORDER BY 1;
END;
COMMENT ON FUNCTION @.analytics_prunable IS
'Hours that end before a time and have rows of the source events or metrics: the arguments for analytics_prune_hour.';

CREATE OR REPLACE FUNCTION @.analytics_check_pruner(wanted TEXT) RETURNS VOID
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    IF wanted NOT IN ('events', 'metrics') THEN
        RAISE EXCEPTION 'cannot prune "%": use events or metrics', wanted;
    END IF;
    -- Pruning runs with the owner's privileges for a role that may delete the rows; current_user is the owner there.
    IF NOT has_table_privilege(session_user, format('@.analytics_%I', wanted)::regclass, 'DELETE') THEN
        RAISE EXCEPTION 'permission denied to prune: "%" may not DELETE from analytics_%', session_user, wanted
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('analytics_rollup'));
    IF EXISTS (SELECT FROM @.analytics_touched WHERE source = wanted AND hour = '-infinity') THEN
        RAISE EXCEPTION 'the rollups of % are not computed yet', wanted USING HINT = 'Run "loader rollup".';
    END IF;
END
$function$;
COMMENT ON FUNCTION @.analytics_check_pruner IS
'Internal. Fails for a role without the privilege to prune, and takes the lock for changes of rollups.';

CREATE OR REPLACE FUNCTION @.analytics_await_workers() RETURNS VOID
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    prepared CONSTANT TEXT := 'SELECT array_agg(gid) FROM run_command_on_workers($q$SELECT string_agg(gid, '','') '
        'FROM pg_prepared_xacts WHERE database = current_database()$q$) w, string_to_table(w.result, '','') gid WHERE w.success';
    before TEXT[];
    now TEXT[];
BEGIN
    EXECUTE prepared INTO before;
    FOR attempt IN 1..20 LOOP
        EXECUTE prepared INTO now;
        IF (before && now) IS NOT TRUE THEN
            RETURN;
        END IF;
        PERFORM pg_sleep(0.1);
    END LOOP;
    RAISE EXCEPTION 'transactions of Citus are in doubt: try again' USING ERRCODE = 'serialization_failure';
END
$function$;
COMMENT ON FUNCTION @.analytics_await_workers IS
'Internal. Waits until the workers of Citus have committed what the coordinator had committed.';

CREATE OR REPLACE FUNCTION @.analytics_prune_hour(wanted TEXT, pruned TIMESTAMPTZ, at_most INT DEFAULT 5000) RETURNS BIGINT
LANGUAGE plpgsql SECURITY DEFINER SET plan_cache_mode = force_custom_plan SET jit = off SET search_path = pg_catalog, pg_temp
AS $function$
-- A batch moves rows into the rollup of their hour, which is sealed: readers add the remaining rows to it, because the mark
-- of the hour is deleted with its last row. One statement, so that it deletes no mark of rows that it does not see. On Citus
-- the workers may commit the rows of a mark after it, so only marks whose rows are visible are deleted.
DECLARE
    distributed CONSTANT BOOLEAN := EXISTS (SELECT FROM @.analytics_settings s WHERE s.name = 'layout' AND s.value = 'citus');
    marks TID[];
    the_day CONSTANT TIMESTAMPTZ := date_trunc('day', pruned, 'UTC');
    key CONSTANT NAME := CASE wanted WHEN 'events' THEN 'event_id' ELSE 'id' END;
    kind CONSTANT NAME := CASE wanted WHEN 'events' THEN 'event_type' ELSE 'metric_name' END;
    kept CONSTANT NAME := CASE wanted WHEN 'events' THEN 'event_type, user_id, family_unit_id, timestamp'
        ELSE 'metric_name, labels, value' END;
    children REGCLASS[];
    partitioned BOOLEAN;
    gone BIGINT;
BEGIN
    PERFORM @.analytics_check_pruner(wanted);
    IF pruned <> date_trunc('hour', pruned, 'UTC') OR pruned > now() - interval '1 hour' THEN
        RAISE EXCEPTION '% is not the beginning of an hour that has ended', pruned;
    ELSIF at_most < 1 THEN
        RAISE EXCEPTION 'at_most must be 1 or more, not %', at_most;
    END IF;
    PERFORM @.analytics_raise_mark(wanted, pruned + interval '1 hour');
    children := ARRAY(SELECT @.analytics_untimed(wanted));
    partitioned := distributed OR children <> ARRAY[('@.analytics_' || wanted)::regclass];
    IF wanted = 'events' AND NOT EXISTS (  -- Before the first hour of a day is deleted: from then on its user days are only added to.
        SELECT FROM @.analytics_sealed s
        WHERE s.source = 'events' AND s.hour >= the_day AND s.hour < the_day + interval '24 hours'
    ) THEN
        PERFORM @.analytics_roll_users(ARRAY[the_day]);
    END IF;
    IF NOT EXISTS (SELECT FROM @.analytics_sealed WHERE source = wanted AND hour = pruned) THEN
        EXECUTE format('DELETE FROM @.analytics_hourly_%s WHERE hour = $1', wanted) USING pruned;
    END IF;
    IF distributed THEN
        marks := ARRAY(SELECT t.ctid FROM @.analytics_touched t WHERE t.source = wanted AND t.hour = pruned);
        PERFORM @.analytics_await_workers();
        DELETE FROM @.analytics_touched WHERE ctid = ANY (marks);  -- inserted again if rows remain
    END IF;
    EXECUTE (
        SELECT CASE WHEN distributed THEN 'WITH ' ELSE 'WITH RECURSIVE ' END || string_agg(format(CASE WHEN distributed THEN $q$
            old%1$s AS MATERIALIZED (  -- Citus has no recursion over its tables
                SELECT %4$I AS key FROM %2$s WHERE timestamp >= $2 AND timestamp < $2 + interval '1 hour' %5$s LIMIT $3
            ), $q$ ELSE $q$
            kinds%1$s AS (  -- by leaps: BRIN finds an hour only if rows lie in the order of their time
                (SELECT %3$I AS kind FROM %2$s ORDER BY 1 LIMIT 1)
                UNION ALL
                SELECT (SELECT %3$I FROM %2$s WHERE %3$I > k.kind ORDER BY 1 LIMIT 1) FROM kinds%1$s k WHERE k.kind IS NOT NULL
            ), old%1$s AS MATERIALIZED (
                SELECT found.key FROM kinds%1$s k CROSS JOIN LATERAL (
                    SELECT %4$I AS key FROM %2$s
                    WHERE %3$I = k.kind AND timestamp >= $2 AND timestamp < $2 + interval '1 hour' %5$s LIMIT $3
                ) found LIMIT $3
            ), $q$ END || $q$
            rows%1$s AS (
                DELETE FROM %2$s e USING old%1$s old WHERE e.%4$I = old.key RETURNING e.*
            ), $q$, c.place, c.child, kind, key, CASE WHEN partitioned THEN format(
                'AND (NOT @.analytics_has_time(%1$I) OR %1$I < %2$L)', key, @.analytics_id_at(@.analytics_kept_since(wanted))) END), '')
        || format('old AS MATERIALIZED (%s), rows AS (%s), ',
            string_agg(format('SELECT key FROM old%s', c.place), ' UNION ALL '),
            string_agg(format('SELECT %s FROM rows%s', kept, c.place), ' UNION ALL '))
        || format($q$
            remain AS MATERIALIZED (SELECT (SELECT count(*) FROM old) >= $3 %s AS yes), unmarked AS (
                DELETE FROM @.analytics_touched WHERE source = $1 AND hour = $2 AND NOT (SELECT yes FROM remain)
                    AND NOT $4
            ), marked AS (
                INSERT INTO @.analytics_touched (hour, source) SELECT $2, $1 FROM remain WHERE yes
                    AND NOT EXISTS (SELECT FROM @.analytics_touched WHERE source = $1 AND hour = $2)
            ), $q$, CASE WHEN partitioned THEN format('OR EXISTS (SELECT FROM @.analytics_%1$s e '
                'WHERE e.timestamp >= $2 AND e.timestamp < $2 + interval ''1 hour'' AND e.%2$I NOT IN (SELECT key FROM old))',
                wanted, key) END)
        || CASE wanted WHEN 'events' THEN $q$
            users AS (
                INSERT INTO @.analytics_user_days AS old (day, user_id, family_unit_id, quarters)
                SELECT ($2 AT TIME ZONE 'UTC')::date, user_id, family_unit_id, bit_or(set_bit(0::bit(96),
                    floor(date_part('epoch', timestamp - date_trunc('day', $2, 'UTC')) / 900)::int, 1))
                FROM rows GROUP BY 1, 2, 3
                ON CONFLICT (day, user_id, family_unit_id) DO UPDATE SET quarters = old.quarters | excluded.quarters
            ), hourly AS (
                INSERT INTO @.analytics_hourly_events AS old (hour, event_type, events)
                SELECT $2, event_type, count(*) FROM rows GROUP BY 2
                ON CONFLICT (hour, event_type) DO UPDATE SET events = old.events + excluded.events
            ) $q$ ELSE $q$
            bucketed AS (
                SELECT metric_name, labels, @.analytics_value_bucket(value) AS bucket, count(*) AS n, sum(value) AS sum,
                    min(value) AS min, max(value) AS max
                FROM rows GROUP BY 1, 2, 3
            ), hourly AS (
                INSERT INTO @.analytics_hourly_metrics (hour, metric_name, labels, records, sum, min, max, buckets, counts)
                SELECT $2, metric_name, labels, sum(n), sum(sum), min(min), max(max),
                    array_agg(bucket ORDER BY bucket), array_agg(n::int ORDER BY bucket)
                FROM bucketed GROUP BY 2, 3
            ) $q$ END
        || 'SELECT count(*) FROM rows'
        FROM unnest(children) WITH ORDINALITY AS c (child, place)
    ) INTO gone USING wanted, pruned, at_most, distributed;
    INSERT INTO @.analytics_sealed (source, hour) VALUES (wanted, pruned) ON CONFLICT DO NOTHING;
    RETURN gone;
END
$function$;
COMMENT ON FUNCTION @.analytics_prune_hour IS
'Deletes up to at_most rows of one hour and keeps its rollup, which is final from then on: readers add later rows to it, and the next call includes them. Returns the number of deleted rows: call it until that is less than at_most, each time in its own READ COMMITTED transaction.';

CREATE OR REPLACE FUNCTION @.analytics_drop_partition(
    wanted TEXT, partition REGCLASS, before TIMESTAMPTZ, expected BIGINT DEFAULT NULL
) RETURNS TABLE (rows BIGINT, newer BIGINT)
LANGUAGE plpgsql SECURITY DEFINER SET plan_cache_mode = force_custom_plan SET jit = off SET search_path = pg_catalog, pg_temp
AS $function$
-- DROP without DETACH: DETACH locks the tables that foreign keys reference, DROP does not
-- (tests/operate/test_dropping.py). All slow work comes before it, while only new rows of this partition wait.
DECLARE
    key CONSTANT NAME := CASE wanted WHEN 'events' THEN 'event_id' ELSE 'id' END;
    is_timed CONSTANT TEXT := format('@.analytics_has_time(%I)', key);
    since_at TIMESTAMPTZ;
    until_at TIMESTAMPTZ;
    hours TIMESTAMPTZ[];
    moved_events @.analytics_events[];
    moved_metrics @.analytics_metrics[];
    dropped BOOLEAN := false;
BEGIN
    IF EXISTS (SELECT FROM @.analytics_settings s WHERE s.name = 'layout' AND s.value = 'citus') THEN  -- there, a lock of the partition keeps no rows away
        RAISE EXCEPTION 'cannot drop a partition and keep its rollup on Citus: delete its rows with analytics_prune_hour first';
    END IF;
    PERFORM @.analytics_check_pruner(wanted);
    SELECT p.since, p.until INTO since_at, until_at FROM @.analytics_time_partitions(wanted) p WHERE p.child = partition;
    IF until_at IS NULL THEN
        RAISE EXCEPTION '"%" is not a partition of analytics_% by time', partition, wanted;
    ELSIF until_at > least(before, now()) THEN
        RAISE EXCEPTION '"%" has ids up to %, which is not older than %', partition, until_at, before;
    END IF;
    -- From here on, no row can be added. A running autovacuum is cancelled after deadlock_timeout (1 s by default).
    PERFORM set_config('lock_timeout', '5s', true);
    EXECUTE format('LOCK TABLE %s IN SHARE MODE', partition);
    EXECUTE format('SELECT count(*), count(*) FILTER (WHERE timestamp >= $1) FROM %s', partition) INTO rows, newer USING before;
    IF rows <> expected THEN
        RAISE EXCEPTION '"%" has % rows, of which % were exported: try again', partition, rows, expected
            USING ERRCODE = 'serialization_failure';
    END IF;
    EXECUTE format($q$SELECT ARRAY(SELECT DISTINCT date_trunc('hour', timestamp, 'UTC') FROM %s WHERE %s)$q$, partition, is_timed)
        INTO hours;
    IF wanted = 'events' THEN
        -- Must precede the deletion of the first hour of a day: after that, user days of the day are only added to.
        PERFORM @.analytics_roll_users(ARRAY(
            SELECT DISTINCT date_trunc('day', h, 'UTC') FROM unnest(hours) h WHERE NOT EXISTS (
                SELECT FROM @.analytics_sealed s WHERE s.source = 'events' AND s.hour >= date_trunc('day', h, 'UTC')
                    AND s.hour < date_trunc('day', h, 'UTC') + interval '24 hours')
        ));
    END IF;
    EXECUTE format($q$DELETE FROM @.analytics_hourly_%1$s WHERE hour = ANY ($1)
        AND hour NOT IN (SELECT s.hour FROM @.analytics_sealed s WHERE s.source = %1$L)$q$, wanted) USING hours;
    EXECUTE CASE wanted WHEN 'events' THEN format($q$
        WITH users AS (
            INSERT INTO @.analytics_user_days AS old (day, user_id, family_unit_id, quarters)
            SELECT (timestamp AT TIME ZONE 'UTC')::date, user_id, family_unit_id, bit_or(set_bit(0::bit(96),
                floor(date_part('epoch', (timestamp AT TIME ZONE 'UTC')::time) / 900)::int, 1))
            FROM %1$s WHERE %2$s GROUP BY 1, 2, 3
            ON CONFLICT (day, user_id, family_unit_id) DO UPDATE SET quarters = old.quarters | excluded.quarters
        )
        INSERT INTO @.analytics_hourly_events AS old (hour, event_type, events)
        SELECT date_trunc('hour', timestamp, 'UTC'), event_type, count(*) FROM %1$s WHERE %2$s GROUP BY 1, 2
        ON CONFLICT (hour, event_type) DO UPDATE SET events = old.events + excluded.events $q$, partition, is_timed)
    ELSE format($q$
        INSERT INTO @.analytics_hourly_metrics (hour, metric_name, labels, records, sum, min, max, buckets, counts)
        SELECT hour, metric_name, labels, sum(n), sum(sum), min(min), max(max),
            array_agg(bucket ORDER BY bucket), array_agg(n::int ORDER BY bucket)
        FROM (
            SELECT date_trunc('hour', timestamp, 'UTC') AS hour, metric_name, labels,
                @.analytics_value_bucket(value) AS bucket, count(*) AS n, sum(value) AS sum, min(value) AS min, max(value) AS max
            FROM %s WHERE %s GROUP BY 1, 2, 3, 4
        ) b GROUP BY 1, 2, 3 $q$, partition, is_timed) END;
    INSERT INTO @.analytics_sealed (source, hour) SELECT wanted, h FROM unnest(hours) h ON CONFLICT DO NOTHING;
    -- One statement, so that it deletes no mark of rows that it does not see.
    EXECUTE format($q$
        WITH remaining AS MATERIALIZED (
            SELECT h FROM unnest($1) h WHERE EXISTS (
                SELECT FROM @.analytics_%1$s e WHERE e.timestamp >= h AND e.timestamp < h + interval '1 hour'
                    AND (e.tableoid <> $2 OR NOT %2$s))
        ), unmarked AS (
            DELETE FROM @.analytics_touched WHERE source = $3 AND hour = ANY ($1) AND hour NOT IN (SELECT h FROM remaining)
        )
        INSERT INTO @.analytics_touched (hour, source)
        SELECT h, $3 FROM remaining WHERE NOT EXISTS (SELECT FROM @.analytics_touched t WHERE t.source = $3 AND t.hour = h)
        $q$, wanted, is_timed) USING hours, partition::oid, wanted;
    PERFORM @.analytics_raise_mark(wanted, until_at);
    -- Ids in the range that are not UUIDv7 have no time: they are moved to the default partition (3 in 100,000 of UUIDv4).
    IF wanted = 'events' THEN
        SELECT array_agg(e) INTO moved_events FROM @.analytics_events e
            WHERE e.event_id >= @.analytics_id_at(coalesce(since_at, 'epoch')) AND e.event_id < @.analytics_id_at(until_at)
                AND e.tableoid = partition::oid AND NOT @.analytics_has_time(e.event_id);
    ELSE
        SELECT array_agg(m) INTO moved_metrics FROM @.analytics_metrics m
            WHERE m.id >= @.analytics_id_at(coalesce(since_at, 'epoch')) AND m.id < @.analytics_id_at(until_at)
                AND m.tableoid = partition::oid AND NOT @.analytics_has_time(m.id);
    END IF;
    -- Readers and loads queue behind each attempt, so attempts are short, with a pause between them.
    PERFORM set_config('lock_timeout', '100ms', true);
    FOR attempt IN 1..20 LOOP
        BEGIN
            EXECUTE format('DROP TABLE %s', partition);
            dropped := true;
            EXIT;
        EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
            PERFORM pg_sleep(0.1 + 0.3 * random());
        END;
    END LOOP;
    IF NOT dropped THEN
        RAISE EXCEPTION 'could not get the lock to drop "%"', partition USING ERRCODE = 'lock_not_available';
    END IF;
    INSERT INTO @.analytics_events SELECT (e).* FROM unnest(moved_events) e;
    INSERT INTO @.analytics_metrics SELECT (m).* FROM unnest(moved_metrics) m;
    rows := rows - coalesce(cardinality(moved_events), 0) - coalesce(cardinality(moved_metrics), 0);
    RETURN NEXT;
END
$function$;
COMMENT ON FUNCTION @.analytics_drop_partition IS
'Drops a partition whose ids are all older than a time. Keeps the rollups of its hours, which are final from then on, and raises the low-water mark. Returns the number of its rows, and how many of them had a newer timestamp. Fails if expected is given and is not the number of its rows.';

-- ---- keeping the ledger small ----

CREATE OR REPLACE FUNCTION @.analytics_merge_loads(since TIMESTAMPTZ DEFAULT '-infinity')
RETURNS TABLE (merged BIGINT, until TIMESTAMPTZ)
LANGUAGE plpgsql SECURITY DEFINER SET plan_cache_mode = force_custom_plan SET jit = off SET search_path = pg_catalog, pg_temp AS $function$
-- Merges only whole segments of one chunk that were loaded once, are covered by their writer's last account, and are not
-- pending in it, so that the sums of analytics_conservation stay exact. Gaps between numbers are kept.
DECLARE
    begins TIMESTAMPTZ;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtext('analytics_merge')) THEN
        RETURN;
    END IF;
    begins := date_trunc('hour', (
        SELECT l.loaded_at FROM @.analytics_loads l
        WHERE l.loaded_at >= since AND l.loaded_at < date_trunc('hour', now() - interval '1 hour', 'UTC')
            AND l.writer IS NOT NULL AND l.digests IS NULL AND l.byte_offset = 0
        ORDER BY l.loaded_at LIMIT 1
    ), 'UTC');
    IF begins IS NULL THEN
        RETURN;
    END IF;
    until := begins + interval '1 hour';
    WITH ripe AS MATERIALIZED (
        SELECT l.digest FROM @.analytics_loads l LEFT JOIN LATERAL (
            SELECT w.segments, w.pending_segments FROM @.analytics_writers w
            WHERE w.writer = l.writer ORDER BY w.reported_at DESC LIMIT 1
        ) stated ON true
        WHERE l.loaded_at >= begins AND l.loaded_at < begins + interval '1 hour'
            AND l.writer IS NOT NULL AND l.digests IS NULL AND l.byte_offset = 0
            AND (stated.segments IS NULL OR l.segment <= stated.segments AND l.segment <> ALL (stated.pending_segments))
            AND NOT EXISTS (
                SELECT FROM @.analytics_loads o WHERE o.writer = l.writer AND o.segment = l.segment AND o.digest <> l.digest
            ) AND NOT EXISTS (
                SELECT FROM (
                    SELECT m.segment + m.segments AS after FROM @.analytics_loads m
                    WHERE m.digests IS NOT NULL AND m.writer = l.writer AND m.segment <= l.segment
                    ORDER BY m.segment DESC LIMIT 1
                ) range WHERE range.after > l.segment
            )
    ), gone AS (
        DELETE FROM @.analytics_loads l USING ripe r WHERE l.digest = r.digest RETURNING l.*
    ), runs AS (
        SELECT g.*, g.segment - row_number() OVER (PARTITION BY g.writer ORDER BY g.segment) AS run FROM gone g
    ), kept AS (
        INSERT INTO @.analytics_loads (digest, file, byte_offset, bytes, lines, events, metrics, duplicates, rejected,
            erased, expired, loader_host, loaded_at, first_loaded_at, segments, digests)
        SELECT sha256(string_agg(r.digest, '' ORDER BY r.segment)), (array_agg(r.file ORDER BY r.segment))[1], 0, sum(r.bytes),
            sum(r.lines), sum(r.events), sum(r.metrics), sum(r.duplicates), sum(r.rejected), sum(r.erased), sum(r.expired),
            max(r.loader_host), max(r.loaded_at), min(r.loaded_at), count(*),
            string_agg(substr(r.digest, 1, 8), '' ORDER BY r.segment)
        FROM runs r GROUP BY r.writer, r.run
    )
    SELECT count(*) INTO merged FROM gone;
    RETURN NEXT;
END
$function$;
COMMENT ON FUNCTION @.analytics_merge_loads IS
'Merges ledger rows of the first hour from a time on that ended an hour ago and has rows to merge: into one row for each run of a writer''s segments without gaps. Returns the number of merged rows and the end of that hour: call it again with that time until it returns no row.';

-- A role that may insert events may also mark hours, refresh, and create partitions; a role that may read events may read
-- their rollups; a role that may delete events may refresh the rollups first.
DO $$
DECLARE
    grantee TEXT;
    privilege TEXT;
BEGIN
    REVOKE ALL ON FUNCTION @.analytics_refresh, @.analytics_rebuild, @.analytics_mark, @.analytics_roll_events,
        @.analytics_roll_metrics, @.analytics_roll_users, @.analytics_make_partition, @.analytics_make_partitions,
        @.analytics_merge_loads FROM PUBLIC;
    FOR grantee, privilege IN
        SELECT DISTINCT coalesce(quote_ident(r.rolname), 'PUBLIC'), a.privilege_type
        FROM pg_class c CROSS JOIN aclexplode(c.relacl) a LEFT JOIN pg_roles r ON r.oid = a.grantee
        WHERE c.oid = '@.analytics_events'::regclass AND a.privilege_type IN ('SELECT', 'INSERT', 'DELETE') AND a.grantee <> c.relowner
    LOOP
        IF privilege = 'SELECT' THEN
            EXECUTE 'GRANT SELECT ON @.analytics_touched, @.analytics_sealed, @.analytics_hourly_events, @.analytics_hourly_metrics, '
                '@.analytics_user_days TO ' || grantee;
        ELSIF privilege = 'DELETE' THEN
            EXECUTE 'GRANT EXECUTE ON FUNCTION @.analytics_refresh, @.analytics_merge_loads TO ' || grantee;
            EXECUTE 'GRANT SELECT ON @.analytics_settings TO ' || grantee;  -- the low-water marks
        ELSE
            EXECUTE 'GRANT INSERT ON @.analytics_touched TO ' || grantee;
            EXECUTE 'GRANT EXECUTE ON FUNCTION @.analytics_refresh, @.analytics_rebuild, @.analytics_mark, '
                '@.analytics_make_partitions, @.analytics_merge_loads TO ' || grantee;
        END IF;
    END LOOP;
END
$$;
-- ---- indexes ----
-- Covering ones, for index-only scans; BRIN for ranges of time and touched hours. There is no index on
-- metadata: GIN (metadata jsonb_path_ops) takes 44 to 65 % more server CPU when loading.

CREATE OR REPLACE FUNCTION @.analytics_indexes() RETURNS TABLE (name NAME, definition TEXT, replaces NAME, schema REGNAMESPACE)
LANGUAGE sql STABLE
BEGIN ATOMIC
SELECT i.name::name, i.definition, i.replaces::name, c.relnamespace::regnamespace
FROM pg_class c CROSS JOIN (VALUES
    ('analytics_events_type_seen', '@.analytics_events (event_type, timestamp) INCLUDE (user_id)', 'analytics_events_type_time'),
    ('analytics_events_user_seen', '@.analytics_events (user_id, timestamp) INCLUDE (event_type)', 'analytics_events_user_time'),
    ('analytics_events_timestamp', '@.analytics_events USING brin (timestamp)', NULL),
    ('analytics_metrics_timestamp', '@.analytics_metrics USING brin (timestamp)', NULL)
) AS i (name, definition, replaces) WHERE c.oid = '@.analytics_events'::regclass;
END;
COMMENT ON FUNCTION @.analytics_indexes IS
'Internal. The indexes that serve the questions, and those of earlier versions that they replace.';

-- Building them blocks loads. If there are rows, `loader init` makes this file skip them and builds them
-- CONCURRENTLY afterwards; with psql: SET analytics.indexes = later.
DO $$
DECLARE
    index RECORD;
BEGIN
    IF coalesce(current_setting('analytics.indexes', true), '') = 'later'
        AND (EXISTS (SELECT FROM @.analytics_events) OR EXISTS (SELECT FROM @.analytics_metrics))
    THEN
        RETURN;
    END IF;
    FOR index IN SELECT * FROM @.analytics_indexes() LOOP
        IF to_regclass(format('@.%I', index.name)) IS NULL THEN
            EXECUTE format('CREATE INDEX %I ON ', index.name) || index.definition;
        END IF;
        IF to_regclass('@.' || quote_ident(index.replaces)) IS NOT NULL THEN
            EXECUTE format('DROP INDEX @.%I', index.replaces);
        END IF;
    END LOOP;
END
$$;

-- An index-only scan needs the visibility map, and autovacuum would set it only after 20 % of new rows. Set
-- only once, because it takes a lock.
DO $$
DECLARE
    grown REGCLASS;
BEGIN
    FOR grown IN
        SELECT c.oid FROM pg_class c
        WHERE (c.oid IN ('@.analytics_events'::regclass, '@.analytics_metrics'::regclass)
                OR c.oid IN (SELECT p.partition FROM (VALUES ('events'), ('metrics')) w (name) CROSS JOIN @.analytics_partitions(w.name) p))
            AND c.relkind = 'r' AND coalesce(array_to_string(c.reloptions, ' '), '') NOT LIKE '%autovacuum_vacuum_insert_scale_factor%'
    LOOP
        EXECUTE format('ALTER TABLE %s SET (autovacuum_vacuum_insert_scale_factor = 0.01)', grown);
    END LOOP;
END
$$;

$sql$;
    -- On Citus, no function may depend on a distributed table, because Citus then cannot attach partitions. Citus also
    -- cannot push down OFFSET, read a subquery without columns, or recurse over a distributed table.
    EXECUTE format('SELECT EXISTS (SELECT FROM %I.analytics_settings WHERE name = ''layout'' AND value = ''citus'')', home)
        INTO is_distributed;
    IF is_distributed THEN
        statements := regexp_replace(statements, '(\nLANGUAGE sql(?: STABLE| IMMUTABLE)??)\nBEGIN ATOMIC\n(.*?)\nEND;\n',
            E'\\1 SET search_path = pg_catalog, pg_temp AS $atomic$\n\\2\n$atomic$;\n', 'g');
        statements := replace(replace(statements, ' OFFSET 0', ''), 'EXISTS (SELECT FROM', 'EXISTS (SELECT 1 FROM');
    END IF;
    EXECUTE replace(statements, '@.', replace(quote_ident(home), $quote$'$quote$, $quote$''$quote$) || '.');

    -- An existing function with one of these names belongs to its creator, and would run with the privileges
    -- of the roles that load or query.
    SELECT named.name, rolname INTO foreign_name, foreign_owner
        FROM (
            SELECT relname, relowner FROM pg_class WHERE relnamespace = home_oid
            UNION ALL SELECT proname, proowner FROM pg_proc WHERE pronamespace = home_oid
        ) AS named (name, owner_oid)
        JOIN pg_roles ON pg_roles.oid = owner_oid
        WHERE named.name::text ~ '^analytics_[a-z_]+$' AND statements ~ concat('@[.]', named.name, '\M') AND NOT rolsuper
            AND ((SELECT rolsuper FROM pg_roles WHERE rolname = current_user) OR NOT pg_has_role(owner_oid, 'USAGE'))
        ORDER BY named.name
        LIMIT 1;
    IF foreign_name IS NOT NULL THEN
        RAISE EXCEPTION '"%" belongs to the role "%" and would run with the privileges of other roles: drop it, or connect as "%"',
            foreign_name, foreign_owner, foreign_owner;
    END IF;
    PERFORM set_config('search_path', caller_path, true);
END
$questions$;

-- ---- erasure ------------------------------------------------------------------------------------------------------
-- An erasure of a person or a family writes a tombstone, by which every later load discards their lines, and deletes the
-- stored data. "@." is the schema of the tables, as above.
--
-- A load holds the lock "analytics_erasures" in shared mode from its beginning, and an erasure holds it exclusively: loads
-- that began earlier have ended when the rows are deleted, and loads that begin later see the tombstone.

DO $erasure$
DECLARE
    caller_path CONSTANT pg_catalog.text := pg_catalog.current_setting('search_path');
    events CONSTANT pg_catalog.oid := pg_catalog.to_regclass('analytics_events');
    home pg_catalog.name;
    home_oid pg_catalog.oid;
    statements pg_catalog.text;
    foreign_name pg_catalog.name;
    foreign_owner pg_catalog.name;
    grantee_name pg_catalog.name;
BEGIN
    IF events IS NULL THEN
        RAISE EXCEPTION 'the table "analytics_events" does not exist';
    END IF;
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    PERFORM set_config('lock_timeout', '1s', true);
    PERFORM pg_advisory_xact_lock(hashtext('analytics_schema'));  -- one at a time
    SELECT nspname, pg_namespace.oid INTO home, home_oid
        FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE pg_class.oid = events;
    statements := $sql$

-- The hashes are keyed, because UUIDs made from consecutive numbers (analytics_uuid) could be found by trying them all. A
-- second key exists only after tombstones of another database were restored.
CREATE TABLE IF NOT EXISTS @.analytics_erasure_keys (
    key BYTEA PRIMARY KEY CHECK (octet_length(key) = 32),
    made_at TIMESTAMPTZ NOT NULL DEFAULT now()
);

-- The tombstones, one per erased id: subject = sha256(key || the 16 bytes of the UUID). `number` grows with each, so that
-- a load detects new ones by reading the last number.
CREATE TABLE IF NOT EXISTS @.analytics_erasures (
    subject BYTEA PRIMARY KEY CHECK (octet_length(subject) = 32),
    kind TEXT NOT NULL CHECK (kind IN ('user', 'family')),
    number BIGINT GENERATED ALWAYS AS IDENTITY UNIQUE,
    requested_at TIMESTAMPTZ NOT NULL DEFAULT now(),
    requested_by TEXT NOT NULL DEFAULT session_user,
    events BIGINT NOT NULL DEFAULT 0,
    metrics BIGINT NOT NULL DEFAULT 0,
    mentions BIGINT NOT NULL DEFAULT 0,
    user_days BIGINT NOT NULL DEFAULT 0,
    done_at TIMESTAMPTZ,
    proof JSONB
);
REVOKE ALL ON @.analytics_erasure_keys, @.analytics_erasures FROM PUBLIC;

INSERT INTO @.analytics_erasure_keys (key)
SELECT sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()))
WHERE NOT EXISTS (SELECT FROM @.analytics_erasure_keys);

CREATE OR REPLACE FUNCTION @.analytics_redacted(content TEXT, digits TEXT) RETURNS TEXT
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    pattern CONSTANT TEXT := '(?i)' || array_to_string(regexp_split_to_array(digits, ''), '-*');
    redacted TEXT := content;
    mention TEXT;
BEGIN
    LOOP
        mention := substring(redacted FROM pattern);
        EXIT WHEN mention IS NULL;
        redacted := replace(redacted, mention, translate(lower(mention), '0123456789abcdef', repeat('0', 16)));
    END LOOP;
    RETURN redacted;
END
$function$;
COMMENT ON FUNCTION @.analytics_redacted(TEXT, TEXT) IS
'Internal. The text with an id replaced by zeros in any spelling. The id is given by its 32 digits in lower case.';

CREATE OR REPLACE FUNCTION @.analytics_redacted(content JSONB, digits TEXT) RETURNS JSONB
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    RETURN @.analytics_redacted(content::text, digits)::jsonb;
EXCEPTION WHEN invalid_text_representation THEN
    RETURN '{}';  -- the digits were those of a number
END
$function$;
COMMENT ON FUNCTION @.analytics_redacted(JSONB, TEXT) IS 'Internal. The same for a JSON document.';

CREATE OR REPLACE FUNCTION @.analytics_mentions(content TEXT, digits TEXT) RETURNS BOOLEAN
LANGUAGE sql IMMUTABLE PARALLEL SAFE
BEGIN ATOMIC
SELECT strpos(replace(lower(content), '-', ''), digits) > 0;
END;
COMMENT ON FUNCTION @.analytics_mentions IS 'Internal. Whether a text contains an id in any spelling.';

CREATE OR REPLACE FUNCTION @.analytics_erase_rows(ids UUID[], subject_kind TEXT) RETURNS JSONB
LANGUAGE plpgsql SET plan_cache_mode = force_custom_plan SET jit = off SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    secret BYTEA;
    gone_events BIGINT;
    gone_metrics BIGINT;
    gone_days BIGINT;
BEGIN
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION 'cannot erase in a transaction that is %', upper(current_setting('transaction_isolation'))
            USING HINT = 'Its snapshot does not contain rows that were committed after it began. Use READ COMMITTED.';
    ELSIF ids IS NULL OR array_position(ids, NULL) IS NOT NULL OR '00000000-0000-0000-0000-000000000000' = ANY (ids) THEN
        RAISE EXCEPTION 'cannot erase without an id, or the id of zeros, which is the replacement of mentions'
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('analytics_erasures'));
    SELECT k.key INTO STRICT secret FROM @.analytics_erasure_keys k ORDER BY k.made_at, k.key LIMIT 1;
    INSERT INTO @.analytics_erasures (subject, kind)
    SELECT DISTINCT sha256(secret || uuid_send(i)), subject_kind FROM unnest(ids) i
    ON CONFLICT (subject) DO NOTHING;
    PERFORM pg_advisory_xact_lock(hashtext('analytics_rollup'));  -- who computes user days of rows that it has read

    WITH gone AS (
        DELETE FROM @.analytics_events e
        WHERE e.user_id = ANY (ids) OR e.family_unit_id = ANY (ids) OR e.event_id = ANY (ids)
        RETURNING e.timestamp AS at, CASE WHEN e.user_id = ANY (ids) THEN e.user_id
            WHEN e.family_unit_id = ANY (ids) THEN e.family_unit_id ELSE e.event_id END AS id
    ), marks AS (
        INSERT INTO @.analytics_touched (hour, source)
        SELECT DISTINCT date_trunc('hour', g.at, 'UTC'), 'events' FROM gone g WHERE isfinite(g.at)
    ), counted AS (
        UPDATE @.analytics_erasures r SET events = r.events + c.n
        FROM (SELECT g.id, count(*) AS n FROM gone g GROUP BY 1) c WHERE r.subject = sha256(secret || uuid_send(c.id))
    )
    SELECT count(*) INTO gone_events FROM gone;
    WITH gone AS (
        DELETE FROM @.analytics_metrics m WHERE m.id = ANY (ids) RETURNING m.timestamp AS at, m.id
    ), marks AS (
        INSERT INTO @.analytics_touched (hour, source)
        SELECT DISTINCT date_trunc('hour', g.at, 'UTC'), 'metrics' FROM gone g WHERE isfinite(g.at)
    ), counted AS (
        UPDATE @.analytics_erasures r SET metrics = r.metrics + 1
        FROM gone g WHERE r.subject = sha256(secret || uuid_send(g.id))
    )
    SELECT count(*) INTO gone_metrics FROM gone;
    WITH gone AS (
        DELETE FROM @.analytics_user_days u WHERE u.user_id = ANY (ids) OR u.family_unit_id = ANY (ids)
        RETURNING CASE WHEN u.user_id = ANY (ids) THEN u.user_id ELSE u.family_unit_id END AS id
    ), counted AS (
        UPDATE @.analytics_erasures r SET user_days = r.user_days + c.n
        FROM (SELECT g.id, count(*) AS n FROM gone g GROUP BY 1) c WHERE r.subject = sha256(secret || uuid_send(c.id))
    )
    SELECT count(*) INTO gone_days FROM gone;
    RETURN jsonb_build_object('events', gone_events, 'metrics', gone_metrics, 'user_days', gone_days);
END
$function$;
COMMENT ON FUNCTION @.analytics_erase_rows IS
'Internal. Writes the tombstones of ids, and deletes their rows and user days, but not mentions: see analytics_erase_user.';

CREATE OR REPLACE FUNCTION @.analytics_erase_mentions(wanted UUID) RETURNS BIGINT
LANGUAGE plpgsql SET jit = off SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    digits CONSTANT TEXT := encode(uuid_send(wanted), 'hex');
    in_events BIGINT;
    in_metrics BIGINT;
BEGIN
    UPDATE @.analytics_events e SET metadata = @.analytics_redacted(e.metadata, digits),
        session_id = CASE WHEN e.session_id = wanted THEN '00000000-0000-0000-0000-000000000000' ELSE e.session_id END
    WHERE e.session_id = wanted OR @.analytics_mentions(e.metadata::text, digits);
    GET DIAGNOSTICS in_events = ROW_COUNT;
    WITH redacted AS (
        UPDATE @.analytics_metrics m SET labels = @.analytics_redacted(m.labels, digits)
        WHERE @.analytics_mentions(m.labels::text, digits) RETURNING m.timestamp AS at
    ), marks AS (
        INSERT INTO @.analytics_touched (hour, source)
        SELECT DISTINCT date_trunc('hour', r.at, 'UTC'), 'metrics' FROM redacted r WHERE isfinite(r.at)
    )
    SELECT count(*) INTO in_metrics FROM redacted;
    -- Rollups are changed in place, because pruned hours have no rows to compute them from. Several rows of an hour may
    -- have the same labels.
    UPDATE @.analytics_hourly_metrics h SET labels = @.analytics_redacted(h.labels, digits)
    WHERE @.analytics_mentions(h.labels::text, digits);
    UPDATE @.analytics_loads l SET file = @.analytics_redacted(l.file, digits) WHERE @.analytics_mentions(l.file, digits);
    UPDATE @.analytics_erasures r SET mentions = r.mentions + in_events + in_metrics
    FROM @.analytics_erasure_keys k WHERE r.subject = sha256(k.key || uuid_send(wanted));
    RETURN in_events + in_metrics;
END
$function$;
COMMENT ON FUNCTION @.analytics_erase_mentions IS
'Internal. Replaces an id by zeros in the metadata and labels of other people, and in the names of loaded files. Reads all rows.';

CREATE OR REPLACE FUNCTION @.analytics_erase_user(id UUID) RETURNS JSONB
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    RETURN @.analytics_erase_rows(ARRAY[id], 'user') || jsonb_build_object('mentions', @.analytics_erase_mentions(id));
END
$function$;
COMMENT ON FUNCTION @.analytics_erase_user IS
'Erases a person: rows, user days and mentions at once, later lines when they are loaded, files when a loader runs next. Call it first in the transaction that deletes the account: it waits for running loads, and loads wait for its end.';

CREATE OR REPLACE FUNCTION @.analytics_erase_family(id UUID) RETURNS JSONB
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    RETURN @.analytics_erase_rows(ARRAY[id], 'family') || jsonb_build_object('mentions', @.analytics_erase_mentions(id));
END
$function$;
COMMENT ON FUNCTION @.analytics_erase_family IS
'Erases a family as analytics_erase_user erases a person: the events of all members in this family. Their events in other families are kept.';

REVOKE ALL ON FUNCTION @.analytics_erase_rows, @.analytics_erase_mentions, @.analytics_erase_user, @.analytics_erase_family
FROM PUBLIC;
$sql$;
    EXECUTE replace(statements, '@.', replace(quote_ident(home), $quote$'$quote$, $quote$''$quote$) || '.');

    -- As above: an existing function with one of these names would run with the privileges of other roles.
    SELECT named.name, rolname INTO foreign_name, foreign_owner
        FROM (
            SELECT relname, relowner FROM pg_class WHERE relnamespace = home_oid
            UNION ALL SELECT proname, proowner FROM pg_proc WHERE pronamespace = home_oid
        ) AS named (name, owner_oid)
        JOIN pg_roles ON pg_roles.oid = owner_oid
        WHERE named.name::text ~ '^analytics_[a-z_]+$' AND statements ~ concat('@[.]', named.name, '\M') AND NOT rolsuper
            AND ((SELECT rolsuper FROM pg_roles WHERE rolname = current_user) OR NOT pg_has_role(owner_oid, 'USAGE'))
        ORDER BY named.name
        LIMIT 1;
    IF foreign_name IS NOT NULL THEN
        RAISE EXCEPTION '"%" belongs to the role "%" and would run with the privileges of other roles: drop it, or connect as "%"',
            foreign_name, foreign_owner, foreign_owner;
    END IF;

    -- Roles that may load also get the privileges on tombstones, even if an upgrade does not name the role.
    FOR grantee_name IN
        SELECT DISTINCT rolname FROM pg_class
        CROSS JOIN LATERAL aclexplode(relacl) AS acl
        JOIN pg_roles AS grantee ON grantee.oid = acl.grantee
        WHERE acl.privilege_type = 'INSERT' AND acl.grantee <> relowner
            AND relnamespace = home_oid AND relname = 'analytics_loads'
    LOOP
        EXECUTE format('GRANT SELECT ON %1$I.analytics_erasures, %1$I.analytics_erasure_keys TO %2$I', home, grantee_name);
    END LOOP;
    PERFORM set_config('search_path', caller_path, true);
END
$erasure$;
