-- Everything the loader needs, safe to apply again, without an extension.
-- The two tables are as their users know them; the ledger accounts for every line that was read.

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
