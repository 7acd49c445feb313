-- The catalogue, first form. One text for SQLite and PostgreSQL: TEXT and BIGINT only, times are milliseconds
-- since 1970 in UTC, records are JSON text. Nothing here deletes.

CREATE TABLE counter (
    name  TEXT NOT NULL PRIMARY KEY,
    value BIGINT NOT NULL
);
INSERT INTO counter (name, value) VALUES ('work', 0), ('session', 0), ('operation', 0), ('event', 0), ('plan_run', 0), ('dispatch', 0);

CREATE TABLE session (
    id         BIGINT NOT NULL PRIMARY KEY,
    kind       TEXT NOT NULL,
    job        TEXT,
    state      TEXT NOT NULL,
    result     TEXT NOT NULL,
    initiator  TEXT NOT NULL,
    reason     TEXT,
    retry_of   BIGINT,
    wish       TEXT NOT NULL,
    progress   TEXT NOT NULL,
    begun_at   BIGINT NOT NULL,
    ended_at   BIGINT
);
CREATE INDEX session_job ON session (job, id);
CREATE INDEX session_state ON session (state, id);

CREATE TABLE work (
    id          BIGINT NOT NULL PRIMARY KEY,
    kind        TEXT NOT NULL,
    object      TEXT NOT NULL,
    job         TEXT,
    session     BIGINT,
    priority    BIGINT NOT NULL,
    place       BIGINT NOT NULL,
    queued_at   BIGINT NOT NULL,
    run_at      BIGINT NOT NULL,
    state       TEXT NOT NULL,
    attempts    BIGINT NOT NULL,
    retries     BIGINT NOT NULL,
    retry_ms    BIGINT NOT NULL,
    lost        BIGINT NOT NULL,
    epoch       BIGINT NOT NULL,
    owner       TEXT,
    lease_until BIGINT,
    needs       TEXT NOT NULL,
    spec        TEXT NOT NULL,
    progress    TEXT NOT NULL,
    outcome     TEXT,
    ended_at    BIGINT
);
CREATE INDEX work_ready ON work (state, run_at);
CREATE INDEX work_session ON work (session);

CREATE TABLE slot (
    resource TEXT NOT NULL,
    work     BIGINT NOT NULL,
    epoch    BIGINT NOT NULL,
    taken    BIGINT NOT NULL,
    PRIMARY KEY (resource, work)
);

CREATE TABLE event (
    seq        BIGINT NOT NULL PRIMARY KEY,
    at         BIGINT NOT NULL,
    object     TEXT NOT NULL,
    from_state TEXT,
    to_state   TEXT,
    op         TEXT NOT NULL,
    session    BIGINT,
    initiator  TEXT NOT NULL,
    reason     TEXT,
    error      TEXT
);
CREATE INDEX event_object ON event (object, seq);

CREATE TABLE replica (
    name     TEXT NOT NULL PRIMARY KEY,
    revision BIGINT NOT NULL,
    state    TEXT NOT NULL,
    source   TEXT NOT NULL,
    job      TEXT,
    record   TEXT NOT NULL
);

CREATE TABLE replica_point (
    replica  TEXT NOT NULL,
    id       TEXT NOT NULL,
    revision BIGINT NOT NULL,
    taken_at BIGINT NOT NULL,
    state    TEXT NOT NULL,
    record   TEXT NOT NULL,
    PRIMARY KEY (replica, id)
);

CREATE TABLE operation (
    id       BIGINT NOT NULL PRIMARY KEY,
    object   TEXT NOT NULL,
    op       TEXT NOT NULL,
    work     BIGINT NOT NULL,
    epoch    BIGINT NOT NULL,
    state    TEXT NOT NULL,
    intent   TEXT NOT NULL,
    step     BIGINT NOT NULL,
    data     TEXT NOT NULL,
    begun_at BIGINT NOT NULL,
    ended_at BIGINT,
    reason   TEXT
);
-- One mutating operation for an object at a time.
CREATE UNIQUE INDEX operation_open ON operation (object) WHERE state = 'open';

CREATE TABLE job (
    name         TEXT NOT NULL PRIMARY KEY,
    paused       BIGINT NOT NULL,
    open_session BIGINT,
    last_session BIGINT,
    last_result  TEXT,
    last_begun   BIGINT,
    last_ended   BIGINT,
    next_run     BIGINT,
    mark         TEXT NOT NULL
);

CREATE TABLE plan_run (
    id       BIGINT NOT NULL PRIMARY KEY,
    plan     TEXT NOT NULL,
    revision BIGINT NOT NULL,
    state    TEXT NOT NULL,
    record   TEXT NOT NULL,
    begun_at BIGINT NOT NULL
);
CREATE INDEX plan_run_plan ON plan_run (plan, id);
