"""Checks one Redis: whether scripts can write to it, and when it loses data. Changes nothing.

If the server does not show a setting, the finding says so; it does not guess. Called by the doctor.
"""

from collections.abc import Callable, Iterator, Mapping

from exactly_once.doctor.finding import Finding, Mark
from exactly_once.errors import ConfigurationError, ExactlyOnceError, StoreUnavailable
from exactly_once.redis.connection import RedisConnection
from exactly_once.wording.text import escaped, stopped

__all__ = ["findings_for_redis"]

Read = Callable[[str], str | None]
"""Returns one of the server's settings by name; None if it does not show it."""


def findings_for_redis(connection: RedisConnection) -> Iterator[Finding]:
    """Yield the findings about one Redis, in the order in which to repair them.

    Args:
        connection: The Redis.
    """
    where = f"Redis {connection.name}"
    try:
        problem = connection.problem()
        if problem is not None:
            yield Finding(
                Mark.FAIL, f"{stopped(problem)} Start it, or mend its URL (EXACTLY_ONCE_REDIS, or where it was given)."
            )
            return
        yield Finding(Mark.OK, f"{where} answers, and a script can write to it")
        info = _info(connection)
        if info:
            yield Finding(Mark.OK, f"{where}: version {escaped(info.get('redis_version', 'unknown'))}")
        else:
            yield Finding(
                Mark.WARN,
                f"{where}: this user may not ask for INFO, so version and replicas could not be read."
                " ACL SETUSER NAME +info",
            )

        def read(name: str) -> str | None:
            return _setting(connection, name)

        yield _eviction(where, info, read)
        yield _persistence(where, info, read)
        if info:
            yield _replication(where, info)
    except (StoreUnavailable, ConfigurationError) as error:
        yield Finding(Mark.FAIL, str(error))


def _info(connection: RedisConnection) -> Mapping[str, str]:
    try:
        return connection.info()
    except ConfigurationError:
        return {}


def _setting(connection: RedisConnection, name: str) -> str | None:
    try:
        found = connection.command("CONFIG", "GET", name)
    except StoreUnavailable:
        raise
    except ExactlyOnceError:  # this user lacks the right; or Redis as a service has no such command
        return None
    return found[1].decode(errors="replace") if found else None


def _eviction(where: str, info: Mapping[str, str], read: Read) -> Finding:
    policy = info.get("maxmemory_policy") or read("maxmemory-policy")
    if policy is None:
        return Finding(
            Mark.WARN,
            f"{where}: maxmemory-policy could not be read. It must be noeviction: any other throws claims away when memory"
            " is full, and their duplicates run.",
        )
    if policy == "noeviction":
        return Finding(
            Mark.OK, f"{where}: maxmemory-policy is noeviction: full memory is an outage, and nothing is lost"
        )
    first = ", and ours before others, since all of ours expire" if policy.startswith("volatile") else ""
    return Finding(
        Mark.WARN,
        f"{where}: maxmemory-policy is {escaped(policy)}: when memory is full, claims, steps and locks are thrown away{first};"
        " an evicted claim makes its duplicates run. CONFIG SET maxmemory-policy noeviction, then CONFIG REWRITE",
    )


def _persistence(where: str, info: Mapping[str, str], read: Read) -> Finding:
    told = read("appendonly") or {"1": "yes", "0": "no"}.get(info.get("aof_enabled", ""))
    if told is None:
        return Finding(
            Mark.WARN,
            f"{where}: whether it keeps anything on disk could not be read. With appendonly yes and appendfsync always a"
            " restart forgets no claim.",
        )
    if told == "yes":
        return _log_of_writes(where, read("appendfsync"))
    snapshots = read("save")
    if snapshots is None:
        lost = (
            "since its last snapshot, or, without snapshots, every claim there is (which of these could not be read:"
            " CONFIG is forbidden here)"
        )
    elif snapshots:
        lost = f"since its last snapshot, which is minutes as a rule (save {escaped(snapshots)})"
    else:
        lost = "there is, for nothing is kept on disk"
    return Finding(
        Mark.WARN,
        f"{where}: appendonly is no: a restart forgets every claim {lost}; copies that come later run again."
        " CONFIG SET appendonly yes, CONFIG SET appendfsync always, then CONFIG REWRITE",
    )


def _log_of_writes(where: str, fsync: str | None) -> Finding:
    if fsync == "always":
        return Finding(
            Mark.OK, f"{where}: appendonly is yes and appendfsync always: what was answered survives a crash"
        )
    lost = {
        "everysec": "a crash of its machine forgets the claims of the last second, two under load",
        "no": "a crash of its machine forgets what its kernel had not written yet, half a minute of claims as a rule",
        None: "appendfsync could not be read (CONFIG is forbidden here); with everysec, the default, a crash of its machine"
        " forgets the claims of the last second",
    }
    value = "" if fsync is None else f" and appendfsync {escaped(fsync)}"
    return Finding(
        Mark.WARN,
        f"{where}: appendonly is yes{value}: {lost.get(fsync, lost['no'])}; their copies run again."
        " CONFIG SET appendfsync always, then CONFIG REWRITE",
    )


def _replication(where: str, info: Mapping[str, str]) -> Finding:
    replicas = info.get("connected_slaves", "0")
    if info.get("role") == "slave":
        return Finding(
            Mark.WARN,
            f"{where}: it is a replica that takes writes: its primary knows nothing of them, and the next time it follows"
            " from the start they are gone. Point EXACTLY_ONCE_REDIS at the primary.",
        )
    if replicas != "0":
        return Finding(
            Mark.WARN,
            f"{where}: it has {escaped(replicas)} replica(s), which follow later, not together: a failover can lose the claims"
            " of the last moment, and their copies run again. Where that must not happen, keep leases in the database"
            " (no store=), which commits or does not.",
        )
    return Finding(Mark.OK, f"{where}: it has no replicas, so no failover can lose claims")
