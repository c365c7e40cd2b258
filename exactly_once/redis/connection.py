"""One Redis as the application uses it: for threads and for asyncio, with limited waits; and whether it answers.

It runs scripts, and knows none: its callers decide what is kept in Redis, and under which key. The client's errors
are translated here and chained: `StoreUnavailable` if waiting helps, `ConfigurationError` if it does not. Connects
to nothing until first used, and imports `redis` then. Called by `guards.lease.redis`, by `lock` and by the doctor.

If a server or a network falls silent, a command waits for at most ten seconds: five for the answer, and the same once more on
a new connection, because a firewall may have cut an idle connection without notice. Then the result of the first
command is unknown, so scripts are written to do nothing the second time. A server that accepts no connection is not
asked twice. A server that answers that it takes no writes now is asked once more on a new connection: after a planned switchover
the old one keeps its connections, and the address leads to another.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha1
from threading import Lock
from typing import Any, Final

from exactly_once import fork
from exactly_once.errors import ConfigurationError, ExactlyOnceError, StoreUnavailable
from exactly_once.redis.errors import awaited, code, dropped, meaning, secrets, unfit
from exactly_once.redis.pools import Pools, Side
from exactly_once.redis.url import checked
from exactly_once.wording.redaction import redacted

__all__ = ["RedisConnection", "RedisConnections", "Script", "checked"]

Script = Callable[[Sequence[str], Sequence[Any]], Any]
"""Call it with the script's keys and arguments. It returns bytes and numbers, lists of them, or None."""

_PROBE: Final = "redis.call('TIME') return redis.call('SET', KEYS[1], '1', 'PX', 1000)"
_PROBE_KEY: Final = "exactly_once:probe"
_BEFORE: Final = "It could be used before, so it is waited for: put its password, or its user's rights, right."


class RedisConnection:
    """One Redis, for threads and for asyncio.

    Args:
        url: `redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]`, `rediss://` for TLS, `unix://` for a socket file.

    Raises:
        ConfigurationError: The URL is none of these.
    """

    def __init__(self, url: str) -> None:
        sound = checked(url)
        self.name = redacted(sound, whole=True)
        """The URL without its password, for logs and errors."""
        self._hidden = secrets(sound)
        self._pools = Pools(sound)
        self._was_usable = False

    # -- scripts -----------------------------------------------------------------------------------------------------

    def script(self, text: str) -> Script:
        """Return a function that runs a Lua script from a thread.

        Args:
            text: The script. It may run twice for one call, if an answer is lost: the second time, with the same arguments,
                must change nothing.

        Returns:
            A function of keys and arguments. It raises `StoreUnavailable` if Redis is away: then it is not known
            whether the script ran. It raises `ConfigurationError` for a wrong password and the like, but `StoreUnavailable` if a
            script has run before: then the password or the user's rights were changed, and no message is to blame.
        """
        return self._script(text, self._pools.of_threads)

    def ascript(self, text: str) -> Script:
        """Return a function that runs a Lua script in SQLAlchemy's greenlet: synchronous for its caller, and the loop goes on."""
        return self._script(text, self._pools.of_this_loop)

    def command(self, *words: str | int) -> Any:
        """Send one command from a thread. Raises the same errors as a script."""
        with self._translated():
            return self._said(self._pools.of_threads(), words)

    # -- whether it answers --------------------------------------------------------------------------------------------

    def answers(self) -> bool:
        """Say whether scripts can read the clock and write now. Does both, with a key that lives for a second."""
        try:
            self._probe()
        except Exception:  # any error: it does not answer
            return False
        return True

    def problem(self) -> str | None:
        """Check whether this Redis can be used. None if so, else a sentence about what is waited for.

        Raises:
            ConfigurationError: Waiting would not repair it: a wrong password, too old, or a node of a cluster.
        """
        try:
            try:
                self._probe()
            except (StoreUnavailable, ConfigurationError):
                raise
            except ExactlyOnceError as error:  # an old version does not let a script write after reading the time
                raise ConfigurationError(self._unfit() or str(error)) from error
            unfit = self._unfit()
        except StoreUnavailable as error:
            return str(error).removesuffix(".")
        if unfit is not None:
            raise ConfigurationError(unfit)
        return None

    def info(self) -> dict[str, str]:
        """The fields of INFO, by name."""
        lines = self.command("INFO").decode(errors="replace").splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))

    def close(self) -> None:
        """Close the connections; running loops close theirs when they get to it. A later use opens new ones."""
        self._pools.close()

    # -- what is said to Redis -----------------------------------------------------------------------------------------

    def _script(self, text: str, side_of: Callable[[], Side]) -> Script:
        digest = _digest(text)

        def run(keys: Sequence[str], arguments: Sequence[Any]) -> Any:
            try:
                answer = self._run(side_of(), text, digest, (len(keys), *keys, *arguments))
            except ConfigurationError as error:
                if self._was_usable:
                    raise StoreUnavailable(f"{error} {_BEFORE}", store=self.name) from error
                raise
            self._was_usable = True
            return answer

        return run

    def _run(self, side: Side, text: str, digest: str, rest: tuple[Any, ...]) -> Any:
        with self._translated():
            try:
                try:
                    return self._said(side, ("EVALSHA", digest, *rest))
                except Exception as error:
                    if code(error) != "NOSCRIPT":
                        raise
                # Redis restarted, or got SCRIPT FLUSH, and ran nothing; EVAL loads the script again.
                return self._said(side, ("EVAL", text, *rest))
            except Exception as error:
                if code(error) == "ERR":
                    # Redis before 7 reports ERR for every reason that stopped a script, also full memory, and Redis 7 for a
                    # missing right. The answer to a plain write has the reason.
                    self._said(side, ("SET", _PROBE_KEY, "1", "PX", 1000), again=False)
                raise

    def _said(self, side: Side, words: tuple[Any, ...], *, again: bool = True) -> Any:
        """Send one command and return its answer. If the connection is no good, `again` on a new one."""
        with side.uninterrupted():
            return self._tried(side, words, again)

    def _tried(self, side: Side, words: tuple[Any, ...], again: bool) -> Any:
        try:
            connection = side.wait(side.pool.get_connection())  # may connect
        except Exception as error:
            raise self._meaning(error, connecting=True) from self._shown(error)
        try:
            try:
                return _exchanged(side, connection, words)
            except Exception as error:
                if not dropped(error) and not awaited(error):
                    raise
                side.wait(connection.disconnect())
                if not again:
                    raise
            # The other connections of the pool may be as dead as this one. Or a server that takes no writes has kept its
            # connections, and the address leads to its successor by now.
            side.wait(connection.connect())
            return _exchanged(side, connection, words)
        finally:
            side.wait(side.pool.release(connection))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except ExactlyOnceError:
            raise
        except Exception as error:
            raise self._meaning(error) from self._shown(error)

    def _meaning(self, error: Exception, *, connecting: bool = False) -> ExactlyOnceError:
        return meaning(error, self.name, self._hidden, connecting=connecting)

    def _shown(self, error: Exception) -> Exception | None:
        """Return the error to chain, unless its text would show the password."""
        return None if any(secret in str(error) for secret in self._hidden) else error

    def _probe(self) -> None:
        self._run(self._pools.of_threads(), _PROBE, _PROBE_DIGEST, (1, _PROBE_KEY))
        self._was_usable = True

    def _unfit(self) -> str | None:
        try:
            info = self.info()
        except ConfigurationError:  # this user may not ask; its rights are sufficient for us
            return None
        return unfit(info, self.name)


def _digest(text: str) -> str:
    return sha1(text.encode()).hexdigest()  # noqa: S324  (the name Redis knows it by, no secret)


_PROBE_DIGEST: Final = _digest(_PROBE)


def _exchanged(side: Side, connection: Any, words: tuple[Any, ...]) -> Any:
    """Send a command and read its answer.

    The client closes the connection after an error or an interruption: else the next command would read this answer as its own.
    """
    side.wait(connection.send_command(*words))
    return side.wait(connection.read_response())


class RedisConnections:
    """The connections of one application: one for each URL, shared by all callers."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._by_url: dict[str, RedisConnection] = {}
        fork.tell(self)

    def forked(self) -> None:
        """Runs in a forked child: a thread of the parent may have held the lock."""
        self._lock = Lock()

    def at(self, url: str) -> RedisConnection:
        """Return the connection for this URL. Opens nothing."""
        with self._lock:
            found = self._by_url.get(url)
            if found is None:
                found = self._by_url[url] = RedisConnection(url)
            return found

    def close(self) -> None:
        """Close them all."""
        with self._lock:
            every, self._by_url = self._by_url, {}
        for each in every.values():
            each.close()
