"""How the database came to look as it does: one migration for each version that was released."""

from __future__ import annotations

import sqlite3

from sqlite_utils import Database, Migrations

_JOURNAL = """
CREATE TABLE journals (no INTEGER PRIMARY KEY, run_id TEXT NOT NULL UNIQUE);
CREATE TABLE events (
  run INTEGER NOT NULL REFERENCES journals(no), seq INTEGER NOT NULL, at TEXT NOT NULL, epoch INTEGER,
  type TEXT NOT NULL, data TEXT NOT NULL, hash BLOB NOT NULL, PRIMARY KEY (run, seq)
) WITHOUT ROWID;
CREATE UNIQUE INDEX one_result ON events (run, data ->> 'key', ifnull(data ->> 'generation', 0))
  WHERE type = 'step.finished';
CREATE UNIQUE INDEX one_request ON events (run, data ->> 'key', ifnull(data ->> 'generation', 0), data ->> 'request_id')
  WHERE type = 'request.opened';
CREATE TABLE revisions (hash TEXT PRIMARY KEY, entry TEXT NOT NULL, files BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE checkpoints (run INTEGER PRIMARY KEY REFERENCES journals(no), at TEXT NOT NULL, data TEXT NOT NULL);
CREATE TABLE beats (worker TEXT PRIMARY KEY, pid INTEGER NOT NULL, beat INTEGER NOT NULL) WITHOUT ROWID
"""

migrations = Migrations("mcp-flow")


@migrations()
def m001_journal(db: Database) -> None:
    """The journal, and what is kept beside it."""
    for statement in _JOURNAL.split(";\n"):
        db.execute(statement)


@migrations()
def m002_places(db: Database) -> None:
    """Where a run's pages are, apart from their storage; whose loop stands still; since when a page is held."""
    db.execute("ALTER TABLE checkpoints ADD COLUMN places TEXT NOT NULL DEFAULT '{}'")
    db.execute(
        "UPDATE checkpoints SET places = ifnull(json_extract(data, '$.urls'), '{}'), data = json_remove(data, '$.urls')"
    )
    db.execute("ALTER TABLE beats ADD COLUMN silent REAL NOT NULL DEFAULT 0")
    for table in ("run_rows", "request_rows"):  # the store makes them anew
        db.execute(f"DROP TABLE IF EXISTS {table}")


@migrations()
def m003_waits(db: Database) -> None:
    """Secrets that were given as answers, events that were sent to whoever waits, and until when a page is held."""
    db.execute(
        "CREATE TABLE secret_answers (run INTEGER NOT NULL REFERENCES journals(no), ref TEXT NOT NULL,"
        " value TEXT NOT NULL, PRIMARY KEY (run, ref)) WITHOUT ROWID"
    )
    db.execute("CREATE TABLE sent_events (key TEXT PRIMARY KEY, at TEXT NOT NULL, sent TEXT NOT NULL) WITHOUT ROWID")
    db.execute("DROP TABLE IF EXISTS run_rows")  # the store makes it anew


def migrate(conn: sqlite3.Connection) -> None:
    """Bring a database of any older schema, or an empty one, to the present one, but for its projections.

    In the transaction that is open.
    """
    migrations.apply(Database(conn))
