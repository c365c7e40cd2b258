"""Whether a standby server could take over without commits that were acknowledged here. Changes nothing. Called by `databases`.

A claim and its effects are in one commit. If that commit is lost with the server, both are lost, but the message was already
acknowledged. PostgreSQL: https://www.postgresql.org/docs/current/warm-standby.html#SYNCHRONOUS-REPLICATION. MariaDB:
https://mariadb.com/kb/en/semisynchronous-replication/. MySQL: "Semisynchronous Replication" in its manual.
"""

from collections.abc import Iterator
from typing import Any

from sqlalchemy import text

from exactly_once.doctor.finding import Finding, Mark

__all__ = ["findings_for_standbys"]

_LOST = (
    "a failover to one of them loses what was committed a moment before, claims and effects alike, although those messages were"
    " acknowledged"
)


def findings_for_standbys(where: str, connection: Any) -> Iterator[Finding]:
    """Yield findings about the standby servers; nothing if there are none.

    Args:
        where: The name of the database for the text.
        connection: A connection to it.
    """
    if connection.dialect.name == "postgresql":
        yield from _postgresql(where, connection)
    elif connection.dialect.name in ("mysql", "mariadb"):
        yield from _mysql(where, connection)


def _postgresql(where: str, connection: Any) -> Iterator[Finding]:
    # Every user sees the rows; of another user's connections, not their content.
    follow = connection.execute(text("SELECT count(*) FROM pg_stat_replication")).scalar_one()
    if not follow:
        return
    names = connection.execute(text("SHOW synchronous_standby_names")).scalar_one()
    if not names:
        yield Finding(
            Mark.WARN,
            f"{where}: {follow} server(s) follow it, and no commit waits for them: {_LOST}. ALTER SYSTEM SET"
            " synchronous_standby_names = 'ANY 1 (*)', with synchronous_commit = on (on that standby's disk) or remote_apply"
            " (also visible there)",
        )
        return
    level = connection.execute(text("SHOW synchronous_commit")).scalar_one()
    if level in ("on", "remote_apply"):
        yield Finding(Mark.OK, f"{where}: commits wait for standbys ({names}): a failover to one of those loses none")


def _mysql(where: str, connection: Any) -> Iterator[Finding]:
    shown = connection.execute(text("SHOW GLOBAL STATUS WHERE Variable_name IN (:a, :b, :c)"), _STATUS)
    status = {name.lower(): value for name, value in shown}
    waits = {status.get(name) for name in ("rpl_semi_sync_master_status", "rpl_semi_sync_source_status")}
    if "ON" in waits:
        yield Finding(
            Mark.OK,
            f"{where}: commits wait for a replica (semi-synchronous). While none answers in its timeout they do not: look at"
            " Rpl_semi_sync_..._status in your monitoring",
        )
        return
    follow = connection.execute(
        text("SELECT COUNT(*) FROM information_schema.PROCESSLIST WHERE COMMAND LIKE 'Binlog Dump%'")
    ).scalar_one()
    follow = max(follow, int(status.get("slaves_connected", 0)))  # without PROCESS, others' connections are not shown
    if follow:
        yield Finding(
            Mark.WARN,
            f"{where}: {follow} replica(s) follow it, and no commit waits for them: {_LOST}. Turn semi-synchronous replication"
            " on, with rpl_semi_sync_master_wait_point = AFTER_SYNC and a timeout longer than a failover takes",
        )


_STATUS = {
    "a": "Rpl_semi_sync_master_status",
    "b": "Rpl_semi_sync_source_status",
    "c": "Slaves_connected",
}
