"""The doctor finds what makes a Redis forget, before it does; and what it names as the cure is one."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce
from exactly_once.doctor.looking import Finding, Mark, examine
from exactly_once.doctor.redis import findings_for_redis
from exactly_once.redis.connection import RedisConnection
from exactly_once.testing.child import wait_until
from tests.services import redis as redis_service
from tests.services.need import require
from tests.services.redis import Redis


@contextmanager
def server(*, persistent: bool = False, **settings: str) -> Iterator[Redis]:
    require(redis_service)
    found = {name.replace("_", "-"): value for name, value in settings.items()}
    with Redis(persistent=persistent, settings=found) as started:
        yield started


def look(url: str) -> list[Finding]:
    connection = RedisConnection(url)
    found = list(findings_for_redis(connection))
    connection.close()
    return found


def text(found: list[Finding], *marks: Mark) -> str:
    return "\n".join(f"{each.mark.value} {each.text}" for each in found if not marks or each.mark in marks)


def warned(redis: Redis) -> str:
    """What is not well, and nothing has failed."""
    found = look(redis.url)
    assert text(found, Mark.FAIL) == ""
    return text(found, Mark.WARN)


def follow(redis: Redis, warning: str) -> None:
    """Type what a warning says to type."""
    for command in re.findall(r"CONFIG SET [\w-]+ \w+", warning):
        redis.tell(*command.split())


def test_a_redis_that_forgets_nothing_has_nothing_to_mend(own_redis: Redis) -> None:
    found = look(own_redis.url)
    assert text(found, Mark.WARN, Mark.FAIL) == ""
    told = text(found)
    assert "a script can write to it" in told
    assert "version 7." in told or re.search(r"version \d+\.", told)
    assert "noeviction" in told
    assert "survives a crash" in told
    assert own_redis.tell("KEYS", "*") in ([], [b"exactly_once:probe"])


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_redis_that_throws_claims_away_is_warned_of_and_what_to_type_mends_it(own_redis: Redis, policy: str) -> None:
    own_redis.tell("CONFIG", "SET", "maxmemory-policy", policy)
    told = warned(own_redis)
    assert f"maxmemory-policy is {policy}" in told
    assert "makes its duplicates run" in told
    assert ("all of ours expire" in told) is policy.startswith("volatile")
    follow(own_redis, told)
    assert warned(own_redis) == ""


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"save": ""}, "a restart forgets every claim there is, for nothing is kept on disk"),
        ({"save": "900 1"}, "a restart forgets every claim since its last snapshot, which is minutes .*save 900 1"),
        ({"appendonly": "yes", "appendfsync": "everysec"}, "forgets the claims of the last second"),
        ({"appendonly": "yes", "appendfsync": "no"}, "half a minute"),
    ],
)
def test_what_a_restart_forgets_is_warned_of_and_what_to_type_mends_it(settings: dict[str, str], wanted: str) -> None:
    with server(**settings) as redis:
        told = warned(redis)
        assert re.search(wanted, told)
        follow(redis, told)
        assert warned(redis) == ""


def test_after_what_is_to_be_typed_a_killed_redis_forgets_nothing() -> None:
    def on_disk() -> bool:  # what was in memory before is written in the background
        told = redis.tell("INFO", "PERSISTENCE")
        return not told["aof_rewrite_in_progress"] and not told["aof_rewrite_scheduled"]

    with server() as redis:
        redis.tell("SET", "before", "1")
        follow(redis, warned(redis))
        wait_until(on_disk, what="on disk", patience_s=10)
        redis.tell("SET", "after", "1")
        redis.kill()
        redis._child.argv += ["--appendonly", "yes", "--appendfsync", "always"]  # as CONFIG REWRITE would have it
        redis.start()
        assert (redis.tell("GET", "before"), redis.tell("GET", "after")) == (b"1", b"1")


def test_replicas_and_their_failover_are_warned_of(own_redis: Redis) -> None:
    with server(replicaof=f"127.0.0.1 {own_redis.port}") as replica:
        wait_until(
            lambda: own_redis.tell("INFO", "REPLICATION")["connected_slaves"] == 1, what="it follows", patience_s=20
        )
        told = warned(own_redis)
        assert "has 1 replica(s)" in told
        assert "a failover can lose the claims" in told
        assert "keep leases in the database" in told
        read_only = text(look(replica.url), Mark.FAIL)
        assert "read only replica" in read_only
        assert "primary" in read_only
        replica.tell("CONFIG", "SET", "replica-read-only", "no")
        assert "it is a replica that takes writes" in text(look(replica.url), Mark.WARN)


def test_where_config_is_forbidden_it_says_what_it_could_not_read() -> None:
    with server(persistent=True) as redis:
        redis.tell("ACL", "SETUSER", "shop", "on", ">pw", "~exactly_once:*", "+@all", "-config")
        url = f"redis://shop:pw@127.0.0.1:{redis.port}/0"
        found = look(url)
        assert text(found, Mark.FAIL) == ""
        assert "appendfsync could not be read (CONFIG is forbidden here)" in text(found, Mark.WARN)
        assert "maxmemory-policy is noeviction" in text(found, Mark.OK)
        redis.tell("CONFIG", "SET", "appendonly", "no")
        assert "could not be read: CONFIG is forbidden here" in text(look(url), Mark.WARN)
        redis.tell("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        assert "maxmemory-policy is allkeys-lru" in text(look(url), Mark.WARN)


def test_where_config_is_no_command_it_says_what_it_could_not_read() -> None:
    """As with Redis as a service."""
    with server(persistent=True, rename_command="CONFIG NOTHING") as redis:
        assert "CONFIG is forbidden here" in warned(redis)


def test_where_nothing_may_be_asked_nothing_is_guessed() -> None:
    with server(persistent=True) as redis:
        redis.tell("ACL", "SETUSER", "shop", "on", ">pw", "~exactly_once:*", "+@all", "-@dangerous")
        found = look(f"redis://shop:pw@127.0.0.1:{redis.port}/0")
        assert text(found, Mark.FAIL) == ""
        told = text(found, Mark.WARN)
        for unread in ("may not ask for INFO", "maxmemory-policy could not be read", "on disk could not be read"):
            assert unread in told
        assert "replicas, so no failover" not in text(found)


def test_one_that_is_away_or_full_is_a_finding(own_redis: Redis) -> None:
    own_redis.tell("CONFIG", "SET", "maxmemory", 1)
    assert "FAIL" in text(look(own_redis.url))
    assert "memory is full" in text(look(own_redis.url), Mark.FAIL)
    own_redis.kill()
    told = text(look(own_redis.url))
    assert told.startswith("FAIL")
    assert "does not answer" in told
    assert "Start it" in told


def test_a_wrong_password_is_a_finding_that_does_not_say_it() -> None:
    with server(requirepass="right") as redis:
        told = text(look(f"redis://:hunter2@127.0.0.1:{redis.port}/0"))
        assert told.startswith("FAIL")
        assert "password is wrong" in told
        assert "hunter2" not in told
        assert "right" not in text(look(redis.url))


@pytest.fixture
def program(sqlite_url: str) -> Callable[[str | None], str]:
    """What the doctor says of a program with this Redis in its settings."""

    def told(redis: str | None) -> str:
        eo = ExactlyOnce(sqlite_url, group="doctor", redis=redis)

        @eo.handler("orders", key="no")
        def reserve(session: Session, order: dict[str, str]) -> None: ...

        found = text(list(examine(eo, None)))
        eo._redis_connections.close()
        return found

    return told


def test_the_redis_of_the_settings_is_looked_at(program: Callable[[str | None], str], own_redis: Redis) -> None:
    assert "Redis" not in program(None)
    assert f"ok Redis {own_redis.url} answers" in program(own_redis.url)
    assert "FAIL Redis redis://:***@127.0.0.1:1/0 does not answer" in program("redis://:hunter2@127.0.0.1:1/0")
