"""The connection to Redis: scripts from threads and loops, every way Redis can be away, and no password in any text."""

import asyncio
import re
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import monotonic
from typing import Any, Literal

import pytest
from sqlalchemy.util import greenlet_spawn

from exactly_once.errors import ConfigurationError, ExactlyOnceError, MissingExtra, StoreUnavailable
from exactly_once.redis import pools
from exactly_once.redis.connection import RedisConnection
from exactly_once.testing.child import free_ports, wait_until
from exactly_once.wording.installation import to_install
from tests.services import redis as redis_service
from tests.services.need import need, require
from tests.services.proxy import Proxy
from tests.services.redis import Redis

ECHO = "return ARGV[1]"
WRITE = "redis.call('TIME') return redis.call('SET', KEYS[1], ARGV[1], 'PX', 60000)"
COUNT = "return redis.call('INCR', KEYS[1])"


@contextmanager
def connected(url: str) -> Iterator[RedisConnection]:
    connection = RedisConnection(url)
    yield connection
    connection.close()


@pytest.fixture
def connection(redis_url: str) -> Iterator[RedisConnection]:
    with connected(redis_url) as made:
        yield made


@pytest.fixture
def own(own_redis: Redis) -> Iterator[RedisConnection]:
    with connected(own_redis.url) as made:
        yield made


@contextmanager
def server(**settings: str) -> Iterator[Redis]:
    require(redis_service)
    with Redis(settings={name.replace("_", "-"): value for name, value in settings.items()}) as started:
        yield started


def in_loop(connection: RedisConnection, script: str, *arguments: str, key: str = "k") -> Any:
    return asyncio.run(greenlet_spawn(connection.ascript(script), [key], arguments))


def both(connection: RedisConnection) -> list[Callable[[], Any]]:
    """A write from a thread, and one from a loop."""
    return [lambda: connection.script(WRITE)(["k"], ["v"]), lambda: in_loop(connection, WRITE, "v")]


def away(connection: RedisConnection, told: str) -> None:
    """Redis is away, says everyone who asks, and says why."""
    for write in both(connection):
        with pytest.raises(StoreUnavailable, match=told) as raised:
            write()
        assert raised.value.store == connection.name
        assert raised.value.__cause__ is not None
    assert not connection.answers()
    problem = connection.problem()
    assert problem is not None
    assert re.search(told, problem)
    assert not problem.endswith(".")


def works(connection: RedisConnection) -> None:
    for write in both(connection):
        assert write() == b"OK"
    assert connection.answers()
    assert connection.problem() is None


def refused(url: str, told: str) -> str:
    """It cannot be used and waiting would not help; returns all that is printed of that, of every way in."""
    printed = ""
    with connected(url) as connection:
        for write in [*both(connection), connection.problem]:
            with pytest.raises(ConfigurationError, match=told) as raised:
                write()
            printed += "".join(traceback.format_exception(raised.value))
        assert not connection.answers()
        return printed + connection.name + repr(connection)


def clients(redis: Redis) -> int:
    """Connections to the server besides the one that asks."""
    return len(redis.tell("CLIENT", "LIST", "TYPE", "NORMAL").splitlines()) - 1


# -- scripts -------------------------------------------------------------------------------------------------------------


def test_a_script_gets_its_keys_and_arguments_and_bytes_come_back(connection: RedisConnection) -> None:
    script = "return {KEYS[1], ARGV[1], ARGV[2], 7, false}"
    wanted = [b"a", "ü".encode(), b"\xff\x00", 7, None]
    assert connection.script(script)(["a"], ["ü", b"\xff\x00"]) == wanted
    assert asyncio.run(greenlet_spawn(connection.ascript(script), ["a"], ["ü", b"\xff\x00"])) == wanted


def test_a_script_that_redis_forgot_is_told_again(connection: RedisConnection, redis_server: Redis) -> None:
    run = connection.script(COUNT)
    assert run(["n"], []) == 1
    redis_server.tell("SCRIPT", "FLUSH")
    assert run(["n"], []) == 2
    redis_server.tell("SCRIPT", "FLUSH")
    assert in_loop(connection, COUNT, key="n") == 3
    assert run(["n"], []) == 4


def test_a_script_travels_by_its_name_once_redis_knows_it(connection: RedisConnection, redis_server: Redis) -> None:
    run = connection.script(COUNT)
    run(["n"], [])
    redis_server.tell("CONFIG", "RESETSTAT")
    for _ in range(5):
        run(["n"], [])
    told = redis_server.tell("INFO", "COMMANDSTATS")
    assert told["cmdstat_evalsha"]["calls"] == 5
    assert not {"cmdstat_eval", "cmdstat_script|load", "cmdstat_ping"} & told.keys()


def test_the_clock_is_read_and_a_write_follows(connection: RedisConnection) -> None:
    works(connection)


def test_what_redis_does_not_understand_is_an_error_of_ours_and_no_outage(connection: RedisConnection) -> None:
    connection.command("LPUSH", "list", "1")
    for wrong in ("return redis.call('GET', KEYS[1])", "return oops("):
        with pytest.raises(ExactlyOnceError, match="refused a command") as raised:
            connection.script(wrong)(["list"], [])
        assert not isinstance(raised.value, (StoreUnavailable, ConfigurationError))
    works(connection)


def test_more_threads_than_connections_wait_for_one_another(redis_server: Redis, redis_url: str) -> None:
    with connected(redis_url) as connection, ThreadPoolExecutor(3 * pools.CONNECTIONS) as threads:
        run, before = connection.script(COUNT), clients(redis_server)
        list(threads.map(lambda _: run(["n"], []), range(10 * pools.CONNECTIONS)))
        assert int(connection.command("GET", "n")) == 10 * pools.CONNECTIONS
        assert clients(redis_server) - before <= pools.CONNECTIONS


def test_more_tasks_than_connections_wait_for_one_another(redis_server: Redis, redis_url: str) -> None:
    async def all_at_once(connection: RedisConnection) -> int:
        run = connection.ascript(COUNT)
        await asyncio.gather(*(greenlet_spawn(run, ["n"], []) for _ in range(10 * pools.CONNECTIONS)))
        return clients(redis_server)

    before = clients(redis_server)  # of other tests of this process
    with connected(redis_url) as connection:
        assert asyncio.run(all_at_once(connection)) - before <= pools.CONNECTIONS
        assert int(connection.command("GET", "n")) == 10 * pools.CONNECTIONS


# -- threads and loops -----------------------------------------------------------------------------------------------------


def test_one_loop_after_the_other_each_has_connections_that_end_with_it(redis_server: Redis, redis_url: str) -> None:
    before = clients(redis_server)
    with connected(redis_url) as connection:
        for turn in range(5):
            assert in_loop(connection, ECHO, str(turn)) == str(turn).encode()
            assert clients(redis_server) == before


def test_two_loops_at_the_same_time_do_not_share_sockets(connection: RedisConnection) -> None:
    async def many(name: str) -> list[bytes]:
        run = connection.ascript(ECHO)
        return [await greenlet_spawn(run, [], [f"{name}{n}"]) for n in range(200)]

    with ThreadPoolExecutor(2) as threads:
        found = [threads.submit(asyncio.run, many(name)) for name in "ab"]
        assert [each.result() for each in found] == [[f"{name}{n}".encode() for n in range(200)] for name in "ab"]


def test_a_loop_that_was_closed_without_a_shutdown_is_forgotten(connection: RedisConnection) -> None:
    for turn in range(3):
        loop = asyncio.new_event_loop()
        assert loop.run_until_complete(greenlet_spawn(connection.ascript(ECHO), [], [str(turn)])) == str(turn).encode()
        for side in connection._pools._loops.values():  # the sockets would be closed by the collector, with a warning
            if side.pool._available_connections:
                loop.run_until_complete(side.pool.disconnect())
        loop.close()
    assert len(connection._pools._loops) == 1


def test_close_closes_what_threads_and_running_loops_have(redis_server: Redis, redis_url: str) -> None:
    before = clients(redis_server)

    async def closing(connection: RedisConnection) -> None:
        await greenlet_spawn(connection.ascript(ECHO), [], ["x"])
        connection.script(ECHO)([], ["x"])
        assert clients(redis_server) == before + 2
        connection.close()
        async with asyncio.timeout(10):
            while clients(redis_server) != before:
                await asyncio.sleep(0.01)
        assert await greenlet_spawn(connection.ascript(ECHO), [], ["again"]) == b"again"

    with connected(redis_url) as connection:
        asyncio.run(closing(connection))
        assert clients(redis_server) == before


def test_a_cancelled_task_does_not_leave_its_answer_to_the_next(connection: RedisConnection) -> None:
    async def cancelled() -> bytes:
        run = connection.ascript(ECHO)
        await greenlet_spawn(run, [], ["warm"])
        connection.command("CLIENT", "PAUSE", 300, "ALL")
        asked = asyncio.create_task(greenlet_spawn(run, [], ["first"]))
        await asyncio.sleep(0.05)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        found: bytes = await greenlet_spawn(run, [], ["second"])
        return found

    assert asyncio.run(cancelled()) == b"second"


def test_a_cancellation_is_never_lost_at_whatever_moment_it_comes(connection: RedisConnection) -> None:
    async def for_ever() -> None:
        run = connection.ascript(ECHO)
        while True:
            await greenlet_spawn(run, [], ["x"])

    async def cancelled() -> None:
        await greenlet_spawn(connection.ascript(ECHO), [], ["warm"])
        for turn in range(300):
            running = asyncio.create_task(for_ever())
            for _ in range(turn % 30):  # so many turns of the loop later, in the middle of something else each time
                await asyncio.sleep(0)
            running.cancel()
            done, _ = await asyncio.wait([running], timeout=5)
            assert done, f"it runs on, cancelled after {turn % 30} turns of the loop"
            assert running.cancelled()
        assert await greenlet_spawn(connection.ascript(ECHO), [], ["last"]) == b"last"

    asyncio.run(cancelled())


def test_an_interrupted_thread_does_not_leave_its_answer_to_the_next(connection: RedisConnection) -> None:
    class InterruptedHere(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise InterruptedHere

    run = connection.script(ECHO)
    run([], ["warm"])
    connection.command("CLIENT", "PAUSE", 300, "ALL")
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(InterruptedHere):
            run([], ["first"])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert run([], ["second"]) == b"second"


# -- away ----------------------------------------------------------------------------------------------------------------


def test_a_restart_between_two_commands_is_not_noticed(own: RedisConnection, own_redis: Redis) -> None:
    async def across() -> bytes:
        run = own.ascript(WRITE)
        await greenlet_spawn(run, ["k"], ["v"])
        own_redis.restart()
        found: bytes = await greenlet_spawn(run, ["k"], ["v"])
        return found

    run = own.script(COUNT)
    assert run(["n"], []) == 1
    own_redis.restart()
    assert run(["n"], []) == 2
    assert asyncio.run(across()) == b"OK"


def test_a_killed_redis_is_away_until_it_is_back(own: RedisConnection, own_redis: Redis) -> None:
    works(own)
    own_redis.kill()
    began = monotonic()
    away(own, "does not answer")
    assert monotonic() - began < 5
    own_redis.start()
    works(own)


def test_a_redis_that_stands_still_is_away_after_a_bounded_time(
    own_redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "TIMEOUT_S", 0.5)
    with connected(own_redis.url) as connection:
        works(connection)
        with own_redis.paused():
            began = monotonic()
            with pytest.raises(StoreUnavailable):
                connection.script(ECHO)([], ["x"])
            assert monotonic() - began < 2 * 0.5 + 0.4  # for the answer, and once more on a fresh connection
            began = monotonic()
            away(connection, "does not answer")
            assert monotonic() - began < 4 * (2 * 0.5 + 0.4)
        works(connection)


@pytest.mark.parametrize("lost", ["before", "after"])
def test_a_connection_that_breaks_under_a_command_is_replaced_and_the_command_sent_again(
    redis_url: str, lost: Literal["before", "after"]
) -> None:
    with Proxy(redis_url) as proxy, connected(proxy.url) as connection:
        works(connection)
        for turn, write in enumerate(both(connection), 1):
            proxy.cut_at(re.compile(b"^EVALSHA"), lost)
            assert write() == b"OK"
            assert proxy.cuts == turn


def test_where_the_network_swallows_every_answer_a_command_ends_in_time_and_is_not_sent_for_ever(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "TIMEOUT_S", 0.5)
    with Proxy(redis_url) as proxy, connected(proxy.url) as connection:
        run = connection.script(COUNT)
        assert run(["n"], []) == 1
        proxy.stall("replies")
        began = monotonic()
        with pytest.raises(StoreUnavailable):
            run(["n"], [])
        assert monotonic() - began < 2 * 0.5 + 0.4
        proxy.resume()
        assert run(["n"], []) == 3


def test_a_script_costs_one_round_trip(redis_url: str) -> None:
    with Proxy(redis_url) as proxy, connected(proxy.url) as connection:
        run = connection.script(COUNT)
        run(["n"], [])
        before = proxy.round_trips
        for _ in range(10):
            run(["n"], [])
        assert proxy.round_trips - before == 10


def test_an_answer_that_never_comes_is_asked_for_once_more(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "TIMEOUT_S", 0.5)
    with connected(redis_url) as connection:
        works(connection)
        connection.command("CLIENT", "PAUSE", 700, "ALL")
        works(connection)
        connection.command("CLIENT", "PAUSE", 2500, "ALL")
        with pytest.raises(StoreUnavailable):
            connection.script(WRITE)(["k"], ["v"])


def test_full_memory_is_away_also_where_the_script_only_says_err(redis_url: str, redis_server: Redis) -> None:
    with connected(redis_url) as connection:
        redis_server.tell("CONFIG", "SET", "maxmemory", 1)
        try:
            away(connection, "memory is full.*OOM")
            hidden = "return redis.error_reply('ERR Error running script: -OOM')"  # as Redis 6 says it
            with pytest.raises(StoreUnavailable, match="memory is full"):
                connection.script(hidden)([], [])
            with pytest.raises(StoreUnavailable, match="memory is full"):
                in_loop(connection, hidden)
        finally:
            redis_server.tell("CONFIG", "SET", "maxmemory", 0)
        works(connection)


def test_a_read_only_replica_is_away_and_says_where_to_point(own: RedisConnection, own_redis: Redis) -> None:
    own_redis.tell("REPLICAOF", "127.0.0.1", 1)
    away(own, "read only replica.*primary")
    own_redis.tell("CONFIG", "SET", "replica-serve-stale-data", "no")
    away(own, "MASTERDOWN")
    own_redis.tell("REPLICAOF", "NO", "ONE")
    works(own)


def test_too_few_replicas_is_away(own: RedisConnection, own_redis: Redis) -> None:
    own_redis.tell("CONFIG", "SET", "min-replicas-to-write", 1)
    away(own, "min-replicas-to-write")
    own_redis.tell("CONFIG", "SET", "min-replicas-to-write", 0)
    works(own)


def test_a_redis_that_cannot_save_is_away() -> None:
    with server() as redis, connected(redis.url) as connection:
        redis.tell("CONFIG", "SET", "save", "3600 1")
        shutil.rmtree(redis.directory)
        redis.tell("BGSAVE")
        wait_until(
            lambda: redis.tell("INFO", "PERSISTENCE")["rdb_last_bgsave_status"] == "err", what="failed", patience_s=10
        )
        away(connection, "cannot write to its disk.*MISCONF")


def test_a_redis_that_loads_its_files_is_away_until_it_has(own: RedisConnection, own_redis: Redis) -> None:
    own_redis.tell("EVAL", "for i = 1, 3000 do redis.call('SET', 'key' .. i, 'some value') end", 0)
    own_redis.tell("CONFIG", "SET", "key-load-delay", 1000)  # microseconds
    own_redis.tell("CONFIG", "SET", "loading-process-events-interval-bytes", 1024)
    loading = threading.Thread(target=own_redis.tell, args=("DEBUG", "RELOAD"))
    loading.start()
    seen, answered = "", set()
    while loading.is_alive():
        try:
            own.script(ECHO)([], ["x"])
        except StoreUnavailable as error:
            seen = str(error)
            answered.add(own.answers())  # the last of these may come when it has loaded
    assert "reads its files (LOADING)" in seen
    assert False in answered
    works(own)


def test_no_such_server_is_away() -> None:
    for url in ("redis://127.0.0.1:1/0", "redis://nowhere.invalid:6379", "unix:///nowhere/redis.sock"):
        with connected(url) as connection:
            away(connection, "does not answer")


def test_a_unix_socket_serves_threads_and_loops() -> None:
    with server(unixsocket="socket") as redis:
        path = redis.directory / "socket"
        with connected(f"unix://{path}?db=3") as connection:
            works(connection)
            assert connection.command("CLIENT", "INFO").split(b" db=")[1].startswith(b"3 ")


def test_tls_serves_threads_and_loops_and_a_stranger_in_between_is_noticed() -> None:
    need(None if shutil.which("openssl") else "there is no `openssl` here (Debian: apt-get install openssl)")
    with server() as redis:
        key, certificate = redis.directory / "key.pem", redis.directory / "certificate.pem"
        made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
        made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
        subprocess.run(made, check=True, capture_output=True)
        key.chmod(0o644)  # Redis may be another user
        (port,) = free_ports()
        files = ["tls-key-file", str(key), "tls-cert-file", str(certificate), "tls-ca-cert-file", str(certificate)]
        redis.tell("CONFIG", "SET", "tls-port", port, "tls-auth-clients", "no", *files)
        with connected(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}") as connection:
            works(connection)
        with connected(f"rediss://127.0.0.1:{port}/0") as connection:
            away(connection, "does not answer .*certificate")


# -- wrong ---------------------------------------------------------------------------------------------------------------


def test_a_wrong_or_missing_password_is_no_outage_and_is_never_printed() -> None:
    with server(requirepass="right/one") as redis:
        with connected(redis.url) as connection:
            works(connection)
            assert "right" not in connection.name
        host = f"127.0.0.1:{redis.port}/0"
        assert "hunter2" not in refused(f"redis://:hunter2@{host}", "password is wrong")
        assert "hunter2" not in refused(f"redis://me:hunter2@{host}", "password is wrong")
        assert "hunter2" not in refused(f"redis://{host}?password=hunter2", "password is wrong")
        refused(f"redis://{host}", "password")


def test_a_server_that_repeats_the_password_does_not_make_us_repeat_it() -> None:
    with server(rename_command="AUTH NOTHING") as redis:
        told = refused(f"redis://:hunt%C3%A9r2@127.0.0.1:{redis.port}/0", "refused the connection")
        assert "unknown command 'AUTH'" in told
        assert "hunt" not in told


def test_a_database_that_is_not_there_is_no_outage(redis_server: Redis) -> None:
    refused(f"redis://127.0.0.1:{redis_server.port}/99", "refused the connection")


def test_what_a_user_may_not_do_is_no_outage_and_the_rights_it_names_are_enough() -> None:
    with server() as redis:
        url = f"redis://shop:pw@127.0.0.1:{redis.port}/0"
        redis.tell("ACL", "SETUSER", "shop", "on", ">pw", "+ping", "~exactly_once:*")
        told = refused(url, "NOPERM")
        redis.tell("ACL", "SETUSER", "shop", "+evalsha", "+eval")
        with connected(url) as connection, pytest.raises(ConfigurationError, match="NOPERM"):
            connection.problem()
        rights = re.findall(r"ACL SETUSER NAME (.*?) \(NOPERM\)", told)[0]
        redis.tell("ACL", "SETUSER", "shop", "reset", "on", ">pw", *rights.split())
        with connected(url) as connection:
            assert connection.problem() is None
            assert connection.info()["maxmemory_policy"]
            assert connection.command("CONFIG", "GET", "save")
        redis.tell("ACL", "SETUSER", "shop", "-info")
        with connected(url) as connection:
            assert connection.problem() is None


def test_a_node_of_a_cluster_is_refused() -> None:
    (bus,) = free_ports()
    with server(cluster_enabled="yes", cluster_port=str(bus)) as redis, connected(redis.url) as connection:
        redis.tell("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        wait_until(connection.answers, what="the cluster is up", patience_s=10)
        with pytest.raises(ConfigurationError, match="Cluster"):
            connection.problem()


def test_what_speaks_another_protocol_is_not_taken_for_a_redis() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with connected(f"redis://127.0.0.1:{other.server_port}/0") as connection:
            for write in both(connection):
                with pytest.raises((StoreUnavailable, ConfigurationError)):
                    write()
            assert not connection.answers()
        other.shutdown()


@pytest.mark.parametrize("module", ["redis", "redis.asyncio"])
def test_without_the_client_the_command_that_installs_it_is_told(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = RedisConnection("redis://:hunter2@127.0.0.1:1/0")
    monkeypatch.setitem(sys.modules, module, None)
    ask = both(connection)[module == "redis.asyncio"]
    with pytest.raises(MissingExtra, match=re.escape(to_install("redis"))) as raised:
        ask()
    assert "hunter2" not in str(raised.value)
