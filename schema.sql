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

-- Questions: functions that answer them, and rollups that make the answers cheap.

CREATE TABLE IF NOT EXISTS analytics_events_hourly (
    hour TIMESTAMPTZ NOT NULL, event_type VARCHAR(100) NOT NULL, events BIGINT NOT NULL, PRIMARY KEY (hour, event_type)
);

CREATE OR REPLACE FUNCTION analytics_bucket(bucket text, at timestamptz, tz text) RETURNS date
LANGUAGE sql IMMUTABLE PARALLEL SAFE
BEGIN ATOMIC
SELECT date_trunc(bucket, at AT TIME ZONE tz)::date;
END;

CREATE OR REPLACE FUNCTION analytics_buckets(bucket text, first date, later date) RETURNS int
LANGUAGE sql IMMUTABLE PARALLEL SAFE
BEGIN ATOMIC
SELECT CASE bucket WHEN 'day' THEN later - first WHEN 'week' THEN (later - first) / 7
  ELSE 12 * (extract(year FROM later) - extract(year FROM first))::int
       + (extract(month FROM later) - extract(month FROM first))::int END;
END;

CREATE OR REPLACE FUNCTION analytics_calendar(bucket text, since timestamptz, until timestamptz, tz text) RETURNS SETOF date
LANGUAGE sql STABLE
BEGIN ATOMIC
SELECT s::date FROM generate_series(date_trunc(bucket, since AT TIME ZONE tz),
  (until AT TIME ZONE tz) - interval '1 microsecond', ('1 ' || bucket)::interval) AS s;
END;

CREATE OR REPLACE FUNCTION analytics_trend(since timestamptz, until timestamptz DEFAULT now(), bucket text DEFAULT 'day',
    tz text DEFAULT 'UTC', types text[] DEFAULT NULL,
    people boolean DEFAULT false, top int DEFAULT NULL)
RETURNS TABLE (starts timestamptz, event_type varchar, events bigint, users bigint, families bigint, complete boolean)
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
SELECT date_trunc(bucket, e.timestamp, tz), e.event_type, count(*), count(DISTINCT user_id), count(DISTINCT family_unit_id),
    date_trunc(bucket, e.timestamp, tz) >= since AND date_trunc(bucket, e.timestamp, tz) + ('1 ' || bucket)::interval <= least(until, now())
FROM analytics_events e
WHERE e.timestamp >= since AND e.timestamp < until AND (types IS NULL OR e.event_type = ANY (types))
GROUP BY 1, 2;
END;

CREATE OR REPLACE FUNCTION analytics_active(since timestamptz, until timestamptz DEFAULT now(), tz text DEFAULT 'UTC',
    who text DEFAULT 'user', types text[] DEFAULT NULL)
RETURNS TABLE (day date, dau bigint, wau bigint, mau bigint, stickiness numeric, complete boolean)
LANGUAGE sql STABLE
BEGIN ATOMIC
WITH seen AS (
    SELECT DISTINCT CASE who WHEN 'family' THEN e.family_unit_id ELSE e.user_id END AS who,
        (e.timestamp AT TIME ZONE tz)::date AS day
    FROM analytics_events e
    WHERE e.timestamp >= (date_trunc('day', since AT TIME ZONE tz) - interval '27 days') AT TIME ZONE tz
        AND e.timestamp < until AND (types IS NULL OR e.event_type = ANY (types))
), spans AS (
    SELECT s.day, lead(s.day) OVER (PARTITION BY s.who ORDER BY s.day) AS again FROM seen s
), moves AS (
    SELECT s.day, 1 AS d, 1 AS w, 1 AS m FROM spans s
    UNION ALL SELECT s.day + 1, -1, 0, 0 FROM spans s
    UNION ALL SELECT least(s.day + 7, s.again), 0, -1, 0 FROM spans s
    UNION ALL SELECT least(s.day + 28, s.again), 0, 0, -1 FROM spans s
), sums AS (
    SELECT m.day, sum(sum(m.d)) OVER o AS d, sum(sum(m.w)) OVER o AS w, sum(sum(m.m)) OVER o AS m
    FROM (SELECT day, d, w, m FROM moves UNION ALL SELECT c, 0, 0, 0 FROM analytics_calendar('day', since, until, tz) c) AS m
    GROUP BY m.day WINDOW o AS (ORDER BY m.day)
)
SELECT s.day, s.d::bigint, s.w::bigint, s.m::bigint, round(s.d / nullif(s.m, 0), 4),
    (s.day + 1)::timestamp AT TIME ZONE tz <= least(until, now()) FROM sums s
WHERE s.day >= (since AT TIME ZONE tz)::date AND s.day <= ((until AT TIME ZONE tz) - interval '1 microsecond')::date
ORDER BY 1;
END;

CREATE OR REPLACE FUNCTION analytics_lifecycle(since timestamptz, until timestamptz DEFAULT now(), bucket text DEFAULT 'week',
    tz text DEFAULT 'UTC', who text DEFAULT 'user', types text[] DEFAULT NULL)
RETURNS TABLE (starts date, new bigint, retained bigint, resurrected bigint, dormant bigint, complete boolean)
LANGUAGE sql STABLE
BEGIN ATOMIC
WITH seen AS (
    SELECT CASE who WHEN 'family' THEN e.family_unit_id ELSE e.user_id END AS who,
        analytics_bucket(bucket, e.timestamp, tz) AS b
    FROM analytics_events e
    WHERE e.timestamp < until AND (types IS NULL OR e.event_type = ANY (types))
    GROUP BY 1, 2
), walk AS (
    SELECT s.b, lag(s.b) OVER o AS before, lead(s.b) OVER o AS after FROM seen s WINDOW o AS (PARTITION BY s.who ORDER BY s.b)
), states AS (
    SELECT w.b, CASE WHEN w.before IS NULL THEN 'new' WHEN analytics_buckets(bucket, w.before, w.b) = 1 THEN 'returning'
        ELSE 'resurrecting' END AS state FROM walk w
    UNION ALL
    SELECT (w.b + ('1 ' || bucket)::interval)::date, 'dormant' FROM walk w
    WHERE w.after IS NULL OR analytics_buckets(bucket, w.b, w.after) > 1
)
SELECT c, count(*) FILTER (WHERE s.state = 'new'), count(*) FILTER (WHERE s.state = 'returning'),
    count(*) FILTER (WHERE s.state = 'resurrecting'), count(*) FILTER (WHERE s.state = 'dormant'),
    (c + ('1 ' || bucket)::interval) AT TIME ZONE tz <= least(until, now())
FROM analytics_calendar(bucket, since, until, tz) c LEFT JOIN states s ON s.b = c GROUP BY c ORDER BY c;
END;

CREATE OR REPLACE FUNCTION analytics_retention(since timestamptz, until timestamptz DEFAULT now(), bucket text DEFAULT 'week',
    tz text DEFAULT 'UTC', periods int DEFAULT 8, starting text[] DEFAULT NULL, coming text[] DEFAULT NULL,
    unbounded boolean DEFAULT false, who text DEFAULT 'user')
RETURNS TABLE (cohort date, size bigint, period int, users bigint, rate numeric, complete boolean)
LANGUAGE sql STABLE
BEGIN ATOMIC
WITH cohorts AS (
    SELECT f.who, analytics_bucket(bucket, f.first, tz) AS cohort
    FROM (
        SELECT CASE who WHEN 'family' THEN e.family_unit_id ELSE e.user_id END AS who, min(e.timestamp) AS first
        FROM analytics_events e WHERE e.timestamp < until AND (starting IS NULL OR e.event_type = ANY (starting)) GROUP BY 1
    ) f
    WHERE f.first >= date_trunc(bucket, since AT TIME ZONE tz) AT TIME ZONE tz
), seen AS (
    SELECT CASE who WHEN 'family' THEN e.family_unit_id ELSE e.user_id END AS who, analytics_bucket(bucket, e.timestamp, tz) AS b
    FROM analytics_events e
    WHERE e.timestamp >= date_trunc(bucket, since AT TIME ZONE tz) AT TIME ZONE tz AND e.timestamp < until
        AND (coming IS NULL OR e.event_type = ANY (coming))
    GROUP BY 1, 2
), diffs AS (
    SELECT c.cohort, c.who, analytics_buckets(bucket, c.cohort, s.b) AS period FROM cohorts c JOIN seen s ON s.who = c.who AND s.b > c.cohort
), counted AS MATERIALIZED (
    SELECT d.cohort, d.period, count(*) AS users
    FROM (SELECT d.cohort, d.who, d.period FROM diffs d WHERE NOT unbounded
          UNION ALL SELECT d.cohort, d.who, max(d.period) FROM diffs d WHERE unbounded GROUP BY 1, 2) d GROUP BY 1, 2
), sizes AS (
    SELECT c.cohort, count(*) AS size FROM cohorts c GROUP BY 1
), grid AS (
    SELECT s.cohort, s.size, p AS period, (s.cohort + p * ('1 ' || bucket)::interval) AS begins,
        CASE p WHEN 0 THEN s.size ELSE coalesce((SELECT sum(c.users) FROM counted c WHERE c.cohort = s.cohort
            AND CASE WHEN unbounded THEN c.period >= p ELSE c.period = p END), 0)::bigint END AS users
    FROM sizes s, generate_series(0, periods) p
)
SELECT g.cohort, g.size, g.period, g.users, round(g.users::numeric / g.size, 4),
    g.begins + ('1 ' || bucket)::interval <= (least(until, now()) AT TIME ZONE tz)
FROM grid g WHERE g.begins < (until AT TIME ZONE tz) ORDER BY 1, 3;
END;

CREATE OR REPLACE FUNCTION analytics_sessions(since timestamptz, until timestamptz DEFAULT now())
RETURNS TABLE (session_id uuid, user_id uuid, family_unit_id uuid, starts timestamptz, ends timestamptz, events bigint)
LANGUAGE sql STABLE
BEGIN ATOMIC
SELECT e.session_id, e.user_id, (array_agg(e.family_unit_id))[1], min(e.timestamp), max(e.timestamp), count(*)
FROM analytics_events e
WHERE e.timestamp >= since - interval '1 day' AND e.timestamp < until + interval '1 day' AND e.session_id IS NOT NULL
GROUP BY e.session_id, e.user_id HAVING min(e.timestamp) >= since AND min(e.timestamp) < until;
END;

CREATE OR REPLACE FUNCTION analytics_sessions_by_gap(since timestamptz, until timestamptz DEFAULT now(), gap interval DEFAULT '30 minutes')
RETURNS TABLE (user_id uuid, family_unit_id uuid, starts timestamptz, ends timestamptz, events bigint)
LANGUAGE sql STABLE
BEGIN ATOMIC
WITH marked AS (
    SELECT e.user_id, e.family_unit_id, e.timestamp,
        (e.timestamp - lag(e.timestamp) OVER (PARTITION BY e.user_id ORDER BY e.timestamp) <= gap) IS NOT TRUE AS starts
    FROM analytics_events e WHERE e.timestamp >= since - gap AND e.timestamp < until + interval '1 day'
), numbered AS (
    SELECT m.*, count(*) FILTER (WHERE m.starts) OVER (PARTITION BY m.user_id ORDER BY m.timestamp) AS number FROM marked m
)
SELECT n.user_id, (array_agg(n.family_unit_id))[1], min(n.timestamp), max(n.timestamp), count(*)
FROM numbered n GROUP BY n.user_id, n.number HAVING min(n.timestamp) >= since AND min(n.timestamp) < until
    AND bool_or(n.starts);
END;

CREATE OR REPLACE FUNCTION analytics_requests(since timestamptz, until timestamptz DEFAULT now(), bucket text DEFAULT 'hour', tz text DEFAULT 'UTC')
RETURNS TABLE (starts timestamptz, endpoint text, method text, requests bigint, errors bigint, error_rate numeric,
    p50 float8, p95 float8, p99 float8, complete boolean)
LANGUAGE sql STABLE
BEGIN ATOMIC
WITH grouped AS (
    SELECT date_trunc(bucket, m.timestamp, tz) AS starts, m.labels->>'endpoint' AS endpoint, m.labels->>'method' AS method,
        count(*) AS requests, count(*) FILTER (WHERE m.labels->>'status' >= '500') AS errors,
        percentile_cont(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (ORDER BY m.value::float8) AS p
    FROM analytics_metrics m
    WHERE m.metric_name = 'api_request_duration_ms' AND m.timestamp >= since AND m.timestamp < until
    GROUP BY 1, 2, 3
)
SELECT g.starts, g.endpoint, g.method, g.requests, g.errors, round(g.errors::numeric / g.requests, 5), g.p[1], g.p[2], g.p[3],
    g.starts >= since AND g.starts + ('1 ' || bucket)::interval <= least(until, now())
FROM grouped g;
END;

CREATE OR REPLACE FUNCTION analytics_interactions(since timestamptz, until timestamptz DEFAULT now(), half_life interval DEFAULT '30 days')
RETURNS TABLE (user_id uuid, memory_id text, views bigint, reactions bigint, comments bigint, seconds float8, weight float8, last timestamptz)
LANGUAGE sql STABLE
BEGIN ATOMIC
SELECT e.user_id, e.metadata->>'memory_id', count(*) FILTER (WHERE e.event_type = 'memory_viewed'),
    count(*) FILTER (WHERE e.event_type = 'reaction_created'), count(*) FILTER (WHERE e.event_type = 'comment_created'),
    sum((e.metadata->>'duration_ms')::float8) / 1000,
    sum(CASE e.event_type WHEN 'memory_viewed' THEN 1 WHEN 'reaction_created' THEN 3 WHEN 'comment_created' THEN 5 ELSE -3 END
        * power(0.5, extract(epoch FROM until - e.timestamp)::float8 / extract(epoch FROM half_life)::float8)), max(e.timestamp)
FROM analytics_events e
WHERE e.event_type IN ('memory_viewed', 'reaction_created', 'reaction_deleted', 'comment_created')
    AND e.timestamp >= since AND e.timestamp < until AND e.metadata ? 'memory_id'
GROUP BY 1, 2;
END;

CREATE OR REPLACE FUNCTION analytics_features(as_of timestamptz DEFAULT now(), tz text DEFAULT 'UTC', known timestamptz DEFAULT NULL,
    users uuid[] DEFAULT NULL)
RETURNS TABLE (user_id uuid, family_unit_id uuid, tenure_days float8, recency_hours float8, events_1d int, events_7d int,
    events_28d int, active_days_7d int, active_days_28d int, sessions_28d int, session_events_mean float8, session_minutes_mean float8,
    hour_mean float8, hour_concentration float8, weekend_share float8, types_28d int, type_entropy_28d float8,
    user_registered_1d int, user_registered_7d int, user_registered_28d int, user_logged_in_1d int, user_logged_in_7d int, user_logged_in_28d int, user_logged_out_1d int, user_logged_out_7d int, user_logged_out_28d int, memory_posted_1d int, memory_posted_7d int, memory_posted_28d int, memory_updated_1d int, memory_updated_7d int, memory_updated_28d int, memory_deleted_1d int, memory_deleted_7d int, memory_deleted_28d int, memory_viewed_1d int, memory_viewed_7d int, memory_viewed_28d int, reaction_created_1d int, reaction_created_7d int, reaction_created_28d int, reaction_deleted_1d int, reaction_deleted_7d int, reaction_deleted_28d int, comment_created_1d int, comment_created_7d int, comment_created_28d int, comment_updated_1d int, comment_updated_7d int, comment_updated_28d int, comment_deleted_1d int, comment_deleted_7d int, comment_deleted_28d int, feed_viewed_1d int, feed_viewed_7d int, feed_viewed_28d int, invite_created_1d int, invite_created_7d int, invite_created_28d int, invite_accepted_1d int, invite_accepted_7d int, invite_accepted_28d int, child_provisioned_1d int, child_provisioned_7d int, child_provisioned_28d int, pet_created_1d int, pet_created_7d int, pet_created_28d int)
LANGUAGE sql STABLE
BEGIN ATOMIC
WITH recent AS (
    SELECT e.user_id, e.family_unit_id, e.event_type, e.timestamp, e.session_id FROM analytics_events e
    WHERE e.timestamp >= as_of - interval '28 days' AND e.timestamp < as_of AND (known IS NULL OR e.created_at <= known)
        AND (users IS NULL OR e.user_id = ANY (users))
), by_type AS (
    SELECT r.user_id, r.event_type, count(*) AS d28, count(*) FILTER (WHERE r.timestamp >= as_of - interval '7 days') AS d7,
        count(*) FILTER (WHERE r.timestamp >= as_of - interval '1 day') AS d1
    FROM recent r GROUP BY 1, 2
), wide AS (
    SELECT k.user_id, sum(k.d1)::int AS d1, sum(k.d7)::int AS d7, sum(k.d28)::int AS d28, count(*)::int AS types,
        (ln(sum(k.d28)) - sum(k.d28 * ln(k.d28)) / sum(k.d28))::float8 AS entropy,
    coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'user_registered'), 0)::int AS c0, coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'user_registered'), 0)::int AS c1, coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'user_registered'), 0)::int AS c2,
    coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'user_logged_in'), 0)::int AS c3, coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'user_logged_in'), 0)::int AS c4, coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'user_logged_in'), 0)::int AS c5,
    coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'user_logged_out'), 0)::int AS c6, coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'user_logged_out'), 0)::int AS c7, coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'user_logged_out'), 0)::int AS c8,
    coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'memory_posted'), 0)::int AS c9, coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'memory_posted'), 0)::int AS c10, coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'memory_posted'), 0)::int AS c11,
    coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'memory_updated'), 0)::int AS c12, coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'memory_updated'), 0)::int AS c13, coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'memory_updated'), 0)::int AS c14,
    coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'memory_deleted'), 0)::int AS c15, coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'memory_deleted'), 0)::int AS c16, coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'memory_deleted'), 0)::int AS c17,
    coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'memory_viewed'), 0)::int AS c18, coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'memory_viewed'), 0)::int AS c19, coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'memory_viewed'), 0)::int AS c20,
    coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'reaction_created'), 0)::int AS c21, coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'reaction_created'), 0)::int AS c22, coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'reaction_created'), 0)::int AS c23,
    coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'reaction_deleted'), 0)::int AS c24, coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'reaction_deleted'), 0)::int AS c25, coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'reaction_deleted'), 0)::int AS c26,
    coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'comment_created'), 0)::int AS c27, coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'comment_created'), 0)::int AS c28, coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'comment_created'), 0)::int AS c29,
    coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'comment_updated'), 0)::int AS c30, coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'comment_updated'), 0)::int AS c31, coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'comment_updated'), 0)::int AS c32,
    coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'comment_deleted'), 0)::int AS c33, coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'comment_deleted'), 0)::int AS c34, coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'comment_deleted'), 0)::int AS c35,
    coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'feed_viewed'), 0)::int AS c36, coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'feed_viewed'), 0)::int AS c37, coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'feed_viewed'), 0)::int AS c38,
    coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'invite_created'), 0)::int AS c39, coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'invite_created'), 0)::int AS c40, coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'invite_created'), 0)::int AS c41,
    coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'invite_accepted'), 0)::int AS c42, coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'invite_accepted'), 0)::int AS c43, coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'invite_accepted'), 0)::int AS c44,
    coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'child_provisioned'), 0)::int AS c45, coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'child_provisioned'), 0)::int AS c46, coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'child_provisioned'), 0)::int AS c47,
    coalesce(sum(k.d1) FILTER (WHERE k.event_type = 'pet_created'), 0)::int AS c48, coalesce(sum(k.d7) FILTER (WHERE k.event_type = 'pet_created'), 0)::int AS c49, coalesce(sum(k.d28) FILTER (WHERE k.event_type = 'pet_created'), 0)::int AS c50
    FROM by_type k GROUP BY 1
), by_session AS (
    SELECT r.user_id, (array_agg(r.family_unit_id))[1] AS family_unit_id, min(r.timestamp) AS starts, max(r.timestamp) AS ends, count(*) AS events
    FROM recent r GROUP BY r.user_id, coalesce(r.session_id, r.user_id)
), habits AS (
    SELECT s.user_id, (array_agg(s.family_unit_id))[1] AS family_unit_id, max(s.ends) AS last, count(*)::int AS sessions, avg(s.events)::float8 AS events,
        avg(extract(epoch FROM s.ends - s.starts) / 60)::float8 AS minutes,
        avg(sin(h.angle)) AS y, avg(cos(h.angle)) AS x, avg((extract(isodow FROM s.starts AT TIME ZONE tz) > 5)::int)::float8 AS weekend,
        count(DISTINCT (s.starts AT TIME ZONE tz)::date)::int AS days,
        (count(DISTINCT (s.starts AT TIME ZONE tz)::date) FILTER (WHERE s.starts >= as_of - interval '7 days'))::int AS days_7
    FROM by_session s, LATERAL (SELECT extract(epoch FROM (s.starts AT TIME ZONE tz)::time)::float8 / 86400 * 2 * pi()) h(angle) GROUP BY 1
)
SELECT h.user_id, h.family_unit_id, extract(epoch FROM as_of - f.first)::float8 / 86400, extract(epoch FROM as_of - h.last)::float8 / 3600,
    w.d1, w.d7, w.d28, h.days_7, h.days, h.sessions, h.events, h.minutes,
    (CASE WHEN atan2(h.y, h.x) < 0 THEN atan2(h.y, h.x) + 2 * pi() ELSE atan2(h.y, h.x) END) / (2 * pi()) * 24, sqrt(h.x * h.x + h.y * h.y),
    h.weekend, w.types, w.entropy, w.c0, w.c1, w.c2, w.c3, w.c4, w.c5, w.c6, w.c7, w.c8, w.c9, w.c10, w.c11, w.c12, w.c13, w.c14, w.c15, w.c16, w.c17, w.c18, w.c19, w.c20, w.c21, w.c22, w.c23, w.c24, w.c25, w.c26, w.c27, w.c28, w.c29, w.c30, w.c31, w.c32, w.c33, w.c34, w.c35, w.c36, w.c37, w.c38, w.c39, w.c40, w.c41, w.c42, w.c43, w.c44, w.c45, w.c46, w.c47, w.c48, w.c49, w.c50
FROM habits h JOIN wide w ON w.user_id = h.user_id,
    LATERAL (SELECT e.timestamp AS first FROM analytics_events e WHERE e.user_id = h.user_id AND (known IS NULL OR e.created_at <= known)
        ORDER BY e.timestamp LIMIT 1) f;
END;

CREATE OR REPLACE FUNCTION analytics_anomalies(since timestamptz, until timestamptz DEFAULT now(), tz text DEFAULT 'UTC', threshold float8 DEFAULT 3)
RETURNS TABLE (event_type varchar, hour timestamptz, events bigint, expected float8, z float8, alarm boolean)
LANGUAGE sql STABLE
BEGIN ATOMIC
WITH kinds AS (
    SELECT DISTINCT r.event_type FROM analytics_events_hourly r WHERE r.hour >= since - interval '28 days' AND r.hour < until
), grid AS (
    SELECT k.event_type, h.hour, (h.hour AT TIME ZONE tz) AS local, coalesce(r.events, 0)::float8 AS n
    FROM kinds k CROSS JOIN generate_series(date_trunc('hour', since) - interval '52 days', date_trunc('hour', until) - interval '1 hour', '1 hour') h(hour)  -- whole hours only
    LEFT JOIN analytics_events_hourly r ON r.event_type = k.event_type AND r.hour = h.hour
), summed AS MATERIALIZED (
    SELECT g.*, sum(g.n) OVER (PARTITION BY g.event_type ORDER BY g.hour ROWS BETWEEN 24 PRECEDING AND 1 PRECEDING) AS day FROM grid g
), wanted AS MATERIALIZED (  -- materialized, so that the join below is by hash
    SELECT s.event_type, s.hour, s.n, s.day, (s.local - w * interval '7 days') AT TIME ZONE tz AS past
    FROM summed s, generate_series(1, 4) w WHERE s.hour >= since - interval '21 days'
), expected AS (
    SELECT w.event_type, w.hour, w.n, percentile_cont(0.5) WITHIN GROUP (ORDER BY p.n * CASE WHEN p.day > 0 THEN least(greatest(w.day / p.day, 0.5), 2) ELSE 1 END) AS m
    FROM wanted w JOIN summed p ON p.event_type = w.event_type AND p.hour = w.past GROUP BY 1, 2, 3
), spread AS (
    SELECT e.event_type, greatest(1, percentile_cont(0.5) WITHIN GROUP (ORDER BY (e.n - e.m) ^ 2 / greatest(e.m, 1)) / 0.4549) AS phi
    FROM expected e WHERE e.hour < since GROUP BY 1
), scored AS (
    SELECT e.event_type, e.hour, e.n, e.m, (e.n - e.m) / sqrt(s.phi * greatest(e.m, 1)) AS z FROM expected e JOIN spread s USING (event_type)
)
SELECT s.event_type, s.hour, s.n::bigint, s.m, s.z,
    abs(s.z) > threshold AND coalesce(abs(lag(s.z) OVER (PARTITION BY s.event_type ORDER BY s.hour)) > threshold, false)
FROM scored s WHERE s.hour >= since;
END;

CREATE OR REPLACE FUNCTION analytics_funnel(steps text[], since timestamptz, until timestamptz DEFAULT now(), within interval DEFAULT '7 days',
    strict boolean DEFAULT false, who text DEFAULT 'user', breakdown text DEFAULT NULL)
RETURNS TABLE (step int, event_type text, value text, reached bigint, of_first numeric, of_previous numeric,
    p50 interval, p90 interval)
LANGUAGE plpgsql STABLE AS $fn$
DECLARE
    n CONSTANT int := cardinality(steps);
    unit CONSTANT text := CASE who WHEN 'family' THEN 'family_unit_id' WHEN 'session' THEN 'session_id' ELSE 'user_id' END;
    q text; k int; reach text := ''; times text := '';
BEGIN
    IF n IS NULL OR n NOT BETWEEN 1 AND 12 THEN RAISE EXCEPTION 'a funnel has 1 to 12 steps'; END IF;
    q := format('SELECT %I AS who, timestamp AS t, %s AS b, coalesce(array_position($1, event_type::text), 99) AS k FROM analytics_events
        WHERE timestamp >= $2 AND timestamp < $3 + $4 %s', unit,
        CASE WHEN breakdown IS NULL THEN 'NULL::text' ELSE format('metadata->>%L', breakdown) END,
        CASE WHEN strict THEN '' ELSE 'AND event_type = ANY ($1)' END);
    -- extract(epoch)::float8 is 8 bytes passed by value, so max() over it is cheap
    q := format('SELECT who, b, k, extract(epoch FROM t)::float8 AS t, CASE WHEN k = 1 AND t < $3 THEN extract(epoch FROM t)::float8 END AS s1 FROM (%s) z', q);
    FOR k IN 2..n LOOP
        IF strict THEN
            q := format('SELECT z.*, CASE WHEN k = %s AND t - lag(s%s) OVER o <= $5 THEN lag(s%2$s) OVER o END AS s%s FROM (%s) z WINDOW o AS (PARTITION BY who ORDER BY t, k)', array_position(steps, steps[k]), k - 1, k, q);
        ELSE
            q := format('SELECT z.*, CASE WHEN k = %s AND t - max(s%s) OVER o <= $5 THEN max(s%2$s) OVER o END AS s%s FROM (%s) z WINDOW o AS (PARTITION BY who ORDER BY t, k ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)', array_position(steps, steps[k]), k - 1, k, q);
        END IF;
    END LOOP;
    FOR k IN 1..n LOOP
        times := times || format(', min(CASE WHEN s%s IS NOT NULL THEN ARRAY[t, s%1$s] END) AS a%1$s', k);
    END LOOP;
    q := format('SELECT who, %s AS b%s FROM (%s) z WHERE s1 IS NOT NULL %s GROUP BY who',
        CASE WHEN breakdown IS NULL THEN 'NULL::text' ELSE '(array_agg(b ORDER BY t) FILTER (WHERE s1 IS NOT NULL))[1]' END, times, q,
        (SELECT coalesce(string_agg(format('OR s%s IS NOT NULL', i), ' '), '') FROM generate_series(2, n) i));
    RETURN QUERY EXECUTE format($q$
        WITH users AS MATERIALIZED (%s), long AS (
            SELECT i AS step, b, (ARRAY[%s])[i] AS d FROM users, generate_series(1, %s) i
        ), sums AS (
            SELECT step, b, count(d) AS reached, percentile_cont(ARRAY[0.5, 0.9]) WITHIN GROUP (ORDER BY d) AS p FROM long GROUP BY 1, 2
        )
        SELECT step, $1[step], b, reached, round(reached::numeric / nullif(first_value(reached) OVER o, 0), 4),
            round(reached::numeric / nullif(coalesce(lag(reached) OVER o, reached), 0), 4),
            make_interval(secs => p[1]), make_interval(secs => p[2])
        FROM sums WINDOW o AS (PARTITION BY b ORDER BY step) ORDER BY b, step $q$,
        q, (SELECT string_agg(format('a%s[1] - a%1$s[2]', i), ', ') FROM generate_series(1, n) i), n)
    USING steps, since, until, within, extract(epoch FROM within)::float8;
END $fn$;
