-- Everything the loader needs, safe to apply again, without an extension: version 3.
-- The two tables are as their users know them; the ledger accounts for every line that was read.
--
-- Applying it brings any older version up, so whatever changes a table here must stand beside a statement that
-- changes one that is there, and must leave it loadable by the loader of the version before.

DO $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('analytics_schema'));  -- two at once would make a table twice
    IF to_regclass('analytics_schema') IS NOT NULL THEN
        IF (SELECT max(version) FROM analytics_schema) > 3 THEN
            RAISE EXCEPTION 'the tables are newer than version 3, nothing was changed: upgrade the loader';
        END IF;
    END IF;
END
$$;

-- Which versions were applied, and when; version 1 did not write it down.
CREATE TABLE IF NOT EXISTS analytics_schema (
    version INTEGER PRIMARY KEY,
    applied_at TIMESTAMPTZ NOT NULL DEFAULT NOW()
);
INSERT INTO analytics_schema (version) VALUES (3) ON CONFLICT DO NOTHING;

CREATE TABLE IF NOT EXISTS analytics_events (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    event_id UUID UNIQUE NOT NULL,
    event_type VARCHAR(100) NOT NULL,
    timestamp TIMESTAMPTZ NOT NULL,
    user_id UUID NOT NULL,
    family_unit_id UUID NOT NULL,
    session_id UUID,
    metadata JSONB NOT NULL DEFAULT '{}',
    created_at TIMESTAMPTZ DEFAULT NOW()
);

CREATE TABLE IF NOT EXISTS analytics_metrics (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    metric_name VARCHAR(100) NOT NULL,
    metric_type VARCHAR(50) NOT NULL,
    value NUMERIC NOT NULL,
    labels JSONB DEFAULT '{}',
    timestamp TIMESTAMPTZ NOT NULL,
    created_at TIMESTAMPTZ DEFAULT NOW()
);

CREATE INDEX IF NOT EXISTS analytics_events_type_time ON analytics_events (event_type, timestamp);
CREATE INDEX IF NOT EXISTS analytics_events_user_time ON analytics_events (user_id, timestamp);
CREATE INDEX IF NOT EXISTS analytics_events_family_time ON analytics_events (family_unit_id, timestamp);
CREATE INDEX IF NOT EXISTS analytics_metrics_name_time ON analytics_metrics (metric_name, timestamp);

-- One row per chunk of a file, written in the transaction of its rows and keyed by a digest of its bytes,
-- so that a chunk that is copied, renamed or met again after a crash is known.
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
    loaded_at TIMESTAMPTZ NOT NULL DEFAULT NOW(),
    CONSTRAINT every_line_is_accounted_for CHECK (lines = events + metrics + duplicates + rejected)
);

-- Which segment of which writer a file is; NULL for every other file, such as a retried reject file. Generated, so
-- that rows of older versions and of older loaders have it too. The pattern is that of spool.segment.SegmentName.
ALTER TABLE analytics_loads
    ADD COLUMN IF NOT EXISTS writer TEXT GENERATED ALWAYS AS (substring(file FROM
        '(?:^|/)[0-9]{8}T[0-9]{6}[.][0-9]{6}Z-([A-Za-z0-9.-]{1,64}-[0-9a-f]{8}-[0-9]+-[0-9a-f]{8})-[0-9]{6,18}[.]ndjson(?:[.]gz|[.]zst)?$'
    )) STORED,
    ADD COLUMN IF NOT EXISTS segment BIGINT GENERATED ALWAYS AS (substring(file FROM
        '(?:^|/)[0-9]{8}T[0-9]{6}[.][0-9]{6}Z-[A-Za-z0-9.-]{1,64}-[0-9a-f]{8}-[0-9]+-[0-9a-f]{8}-([0-9]{6,18})[.]ndjson(?:[.]gz|[.]zst)?$'
    )::bigint) STORED;

-- For rows that were loaded recently, and for rows that are old enough to be pruned.
CREATE INDEX IF NOT EXISTS analytics_loads_loaded_at ON analytics_loads (loaded_at);

-- Views for reading.

CREATE OR REPLACE VIEW analytics_events_daily AS
SELECT date_trunc('day', timestamp) AS day, event_type, count(*) AS events,
    count(DISTINCT user_id) AS users, count(DISTINCT family_unit_id) AS families
FROM analytics_events
GROUP BY 1, 2;

CREATE OR REPLACE VIEW analytics_metrics_hourly AS
SELECT date_trunc('hour', timestamp) AS hour, metric_name, labels, count(*) AS records,
    sum(value) AS sum, avg(value) AS average, min(value) AS minimum, max(value) AS maximum
FROM analytics_metrics
GROUP BY 1, 2, 3;

-- Each writer counts its segments from 1 without gaps, so a number that is missing below a loaded one is a
-- file that was lost, or that waits to be loaded.
CREATE OR REPLACE VIEW analytics_missing_segments AS
WITH counted AS (
    SELECT writer, max(segment) AS last FROM analytics_loads WHERE writer IS NOT NULL GROUP BY writer
)
SELECT writer, number FROM counted, generate_series(1, last) AS number
EXCEPT
SELECT writer, segment FROM analytics_loads WHERE writer IS NOT NULL;

-- Foreign keys, where the application's own tables exist. `loader init --no-foreign-keys` leaves them out; with
-- psql: SET analytics.foreign_keys = off.
DO $$
BEGIN
    IF coalesce(current_setting('analytics.foreign_keys', true), '') = 'off' THEN
        RETURN;
    END IF;
    IF to_regclass('auth.users') IS NOT NULL AND NOT EXISTS (
        SELECT FROM pg_constraint
        WHERE conrelid = 'analytics_events'::regclass AND conname = 'analytics_events_user_id_fkey'
    ) THEN
        ALTER TABLE analytics_events ADD FOREIGN KEY (user_id) REFERENCES auth.users (id);
    END IF;
    IF to_regclass('family_units') IS NOT NULL AND NOT EXISTS (
        SELECT FROM pg_constraint
        WHERE conrelid = 'analytics_events'::regclass AND conname = 'analytics_events_family_unit_id_fkey'
    ) THEN
        ALTER TABLE analytics_events ADD FOREIGN KEY (family_unit_id) REFERENCES family_units (id);
    END IF;
END
$$;
