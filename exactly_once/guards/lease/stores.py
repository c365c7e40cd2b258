"""Finds the lease store of each handler: its own database, another database, or Redis. Each is opened once, with its renewal.

Made by the facade. Called by each handler's `Processor` when it is made, and by the router, which asks whether a store answers
that is no database of the application.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from time import sleep
from typing import TYPE_CHECKING, Final

from sqlalchemy.util import await_only

from exactly_once.alembic import ready
from exactly_once.database.store import Store
from exactly_once.errors import ConfigurationError
from exactly_once.events.alert import Hook
from exactly_once.guards.lease.contract import LeaseStore
from exactly_once.guards.lease.guard import LeaseGuard
from exactly_once.guards.lease.redis import RedisLeases
from exactly_once.guards.lease.renewal import Renewal
from exactly_once.guards.lease.sql import SqlLeases
from exactly_once.handlers.plan import Lease, Lock, Plan
from exactly_once.wording.redaction import redacted

if TYPE_CHECKING:
    from collections.abc import Callable

    from exactly_once.guards.lock import LockGuard
    from exactly_once.redis.connection import RedisConnection, RedisConnections

__all__ = ["LeasePlacement", "LeaseStores", "sql_leases"]

SETTING: Final = "redis"
_REDIS: Final = ("redis", "rediss", "unix")


@dataclass(frozen=True, slots=True)
class LeasePlacement:
    """Where the leases of one handler are kept."""

    store: LeaseStore
    """Called from threads or from the event loop, as the handler is."""
    local: SqlLeases
    """The handler's own database, for steps that are a transaction in it."""
    own: bool
    """Both are the same database, so the handler's transaction is fenced."""
    renewal: Renewal
    pause: "Callable[[float], None]"

    def guard(self, plan: Plan, store: Store) -> LeaseGuard:
        """Return the guard of a handler whose leases are kept here."""
        assert isinstance(plan.guard, Lease)
        return LeaseGuard(
            self.store,
            self.local,
            self.renewal,
            store.dialect,
            own=self.own,
            lease=plan.guard.lease,
            max_run=plan.guard.max_run,
            steps=plan.takes_steps,
            pause=self.pause,
        )


class LeaseStores:
    """The lease stores of one application.

    Args:
        connections: Its Redis connections, by URL.
        redis: The URL of the setting `redis`.
        schema: The database schema of our tables.
        alert: The application's hook.
        pooler: Assume a pooler between us and PostgreSQL, even if none is detected.
    """

    def __init__(
        self,
        connections: "RedisConnections",
        redis: str | None,
        schema: str | None,
        alert: Hook | None = None,
        *,
        pooler: bool = False,
    ) -> None:
        self._connections, self._redis, self._schema, self._alert = connections, redis, schema, alert
        self._pooler = pooler
        self._renewals: dict[tuple[str, object], Renewal] = {}
        self._databases: dict[str, Store] = {}
        self._used: dict[str, RedisConnection] = {}

    def placed(self, plan: Plan, store: Store) -> LeasePlacement:
        """Return where a handler's leases are kept. Opens nothing.

        Raises:
            ConfigurationError: The handler wants the setting `redis`, which is not set. Or the URL is not that of a store.
        """
        assert isinstance(plan.guard, Lease)
        local = sql_leases(store, is_async=plan.is_async)
        pause = _await_pause if plan.is_async else sleep
        url = self.url(plan.guard.store)
        if url is None:
            renewal = self._renewal(store.name, None, lambda: _renewed_in(store))
            return LeasePlacement(local, local, True, renewal, pause)
        if url.partition("://")[0] in _REDIS:
            return self._in_redis(plan, self._connection(url), local, pause)
        other = self._databases.get(url)
        if other is None:
            # a lease uses a connection for a moment only, not for the whole run of a handler
            other = self._databases[url] = Store(
                redacted(url), url, schema=self._schema, pool_size=store.pool_size, pooler=self._pooler
            )
        # known by its URL: without passwords, two different URLs may print alike
        renewal = self._renewal(url, None, lambda: _renewed_in(other))
        return LeasePlacement(sql_leases(other, is_async=plan.is_async), local, False, renewal, pause)

    def at_rest(self, plan: Plan, store: Store) -> LeaseStore:
        """Return the lease store of a handler for use in a thread: for the command line."""
        return self.placed(plan, store).renewal.store

    def lock_guard(self, plan: Plan, store: Store) -> "LockGuard":
        """Return the guard of a handler under a lock."""
        from exactly_once.guards.lock import LockGuard

        assert isinstance(plan.guard, Lock)
        url = self.url(plan.guard.store or SETTING)
        assert url is not None
        return LockGuard(self._connection(url), store.dialect, plan.guard, awaiting=plan.is_async)

    def url(self, store: str | None) -> str | None:
        """Return the URL that a guard's `store=` means. None: the handler's own database."""
        if store != SETTING:
            return store
        if self._redis is None:
            raise ConfigurationError(
                "A handler's store is 'redis', and no Redis is named. Type:"
                " export EXACTLY_ONCE_REDIS=redis://127.0.0.1:6379/0, or write ExactlyOnce(redis='redis://...')."
            )
        return self._redis

    def _in_redis(
        self, plan: Plan, redis: "RedisConnection", local: SqlLeases, pause: "Callable[[float], None]"
    ) -> LeasePlacement:
        assert isinstance(plan.guard, Lease)
        retention = plan.guard.retention
        in_threads = RedisLeases(redis.name, redis.script, retention)
        store = RedisLeases(redis.name, redis.ascript, retention) if plan.is_async else in_threads
        return LeasePlacement(store, local, False, self._renewal(redis.name, retention, lambda: in_threads), pause)

    def _connection(self, url: str) -> "RedisConnection":
        found = self._connections.at(url)
        self._used[found.name] = found
        return found

    def _renewal(self, name: str, kind: object, make: "Callable[[], LeaseStore]") -> Renewal:
        found = self._renewals.get((name, kind))
        if found is None:
            found = self._renewals[name, kind] = Renewal(make(), self._alert)
        return found

    @property
    def redises(self) -> "Sequence[RedisConnection]":
        """Every Redis that a handler's guard uses."""
        return tuple(self._used.values())

    def answers(self, name: str) -> bool | None:
        """Whether the store of this name answers. None: it is not one of these stores."""
        if name in self._used:
            return self._used[name].answers()
        alike = [store.answers() for store in self._databases.values() if store.name == name]
        return all(alike) if alike else None

    def problems(self) -> "Iterator[tuple[str, Callable[[], str | None]]]":
        """Yield each store that is no database of the application, with a function that checks whether it can be used."""
        for name, redis in self._used.items():
            yield name, redis.problem
        for store in self._databases.values():
            yield store.name, partial(ready.problem, store)

    def in_redis(self) -> Sequence[RedisLeases]:
        """Return the leases of each Redis that handlers use."""
        return [RedisLeases(redis.name, redis.script, timedelta(days=7)) for redis in self._used.values()]

    def databases(self) -> Sequence[Store]:
        """Return the databases of leases that are not the application's own."""
        return tuple(self._databases.values())

    def close(self) -> None:
        """Close the databases opened here. The Redis connections belong to the application."""
        for store in self._databases.values():
            store.close()


def sql_leases(store: Store, *, is_async: bool = False) -> SqlLeases:
    """Return the leases in a database, for use from threads or from the event loop."""
    engine = store.async_engine.sync_engine if is_async else store.engine
    return SqlLeases(store.name, engine, store.dialect, lambda: store.tables)


def _renewed_in(store: Store) -> SqlLeases:
    """Return the leases in a database through a separate engine, so that a full pool cannot let healthy leases run out."""
    return SqlLeases(store.name, store.engine_apart, store.dialect, lambda: store.tables)


def _await_pause(seconds: float) -> None:
    import asyncio

    await_only(asyncio.sleep(seconds))
