"""The facade: handlers are registered here, databases are named here, and the three entry points are here.

Making an object connects to nothing and reads no settings; the first message, claim or worker does. Objects share nothing, so a
program may have several. The work is done in other modules: claims in `guards`, one delivery in `processing.processor`,
receiving in `worker`.
"""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, NoReturn

from sqlalchemy.orm import Session, scoped_session

from exactly_once.configuration.supervised import is_supervised
from exactly_once.database.connections import forked_engines
from exactly_once.database.schema import GROUP_BYTES
from exactly_once.errors import ConfigurationError, StoreUnavailable
from exactly_once.handlers.plan import Plan
from exactly_once.handlers.registry import Registrations
from exactly_once.handlers.wrong_arguments import explained, of_making_one
from exactly_once.keys import check_name
from exactly_once.message import Message
from exactly_once.outcome import Outcome

# What runs messages is imported when the first message comes: a program that only sends should not wait for it.
if TYPE_CHECKING:
    from exactly_once.configuration.config import Config
    from exactly_once.database.store import Store
    from exactly_once.events.alert import Hook
    from exactly_once.executor.callers_loop import CallersLoop
    from exactly_once.executor.executor import Executor
    from exactly_once.executor.routing import Route, Router
    from exactly_once.guards.claiming import Claimer
    from exactly_once.guards.lease.stores import LeaseStores
    from exactly_once.redis.connection import RedisConnection, RedisConnections
    from exactly_once.redis.lock import RedisLock
    from exactly_once.service.worker_service import WorkerService
    from exactly_once.transports.contract import Subscription, Transport
    from exactly_once.transports.producer import Producer

__all__ = ["ExactlyOnce"]

_DEFAULT: Final = "default"


class _Binding:
    """Where the claims are: the databases, and the router over them once it is used."""

    def __init__(self, database: Any = None, async_database: Any = None) -> None:
        self.database, self.async_database = database, async_database
        self.stores: dict[str, Store] | None = None
        self.leases: LeaseStores | None = None
        self.router: Router | None = None
        self.callers_loop: CallersLoop | None = None

    def close(self) -> None:
        """Close what was opened for it."""
        for store in (self.stores or {}).values():
            store.close()
        if self.leases is not None:
            self.leases.close()
        self.stores = self.leases = self.router = self.callers_loop = None


class ExactlyOnce(Registrations):
    """Runs SQLAlchemy handlers so that each message takes effect exactly once in the database.

    Args:
        database: A URL, an Engine, a sessionmaker, a scoped_session, or several of these by name: `{"eu": ..., "us": ...}`.
            The first is the default, and keeps what cannot be routed. None: from EXACTLY_ONCE_DATABASE or the settings file.
        async_database: An AsyncEngine or async_sessionmaker for async handlers; None derives it from `database`.
        redis: The URL of a Redis, for locks and for leases in Redis. None: from EXACTLY_ONCE_REDIS or the settings file.
        group: The consumer group, a part of every claim's identity. None: from EXACTLY_ONCE_GROUP or the settings file.
        imports: Modules that register handlers, imported before the first message.
        schema: The database schema of our tables.
        pooler: True: there is a transaction pooler before PostgreSQL, even if we detect none. We detect PgBouncer. None: from
            EXACTLY_ONCE_POOLER or the settings file.
        may_lose_commits: True leaves `synchronous_commit = off` (PostgreSQL) and `synchronous = OFF` (SQLite) unchanged. Then, if
            that server or machine stops, the last acknowledged messages are lost, claims and effects together.
        route: With several databases, returns the name of a message's database. All rows of one business key belong in one.
        enforce: False writes claims and counts duplicates, but runs them all the same: for a trial before you trust it.
        alert: Called with an `Alert` when a message is kept for a person, or a run takes longer than its `max_run`.
            It is called in the thread that noticed, so it must not take long. A plain function; what it raises is logged.

    Example:
        >>> eo = ExactlyOnce("sqlite:///orders.db", group="inventory")
        >>> @eo.handler("orders", key="order_no")
        ... def reserve(session: Session, order: dict[str, str]) -> None:
        ...     ...
    """

    @explained(of_making_one)
    def __init__(
        self,
        database: Any = None,
        *,
        async_database: Any = None,
        redis: str | None = None,
        group: str | None = None,
        imports: Sequence[str] = (),
        schema: str | None = None,
        pooler: bool | None = None,
        may_lose_commits: bool = False,
        route: "Route | None" = None,
        enforce: bool = True,
        alert: "Hook | None" = None,
    ) -> None:
        if group is not None:
            check_name(group, GROUP_BYTES, "group")
        if alert is not None:
            from exactly_once.events.alert import check_hook

            check_hook(alert)
        said = {
            "database": database,
            "async_database": async_database,
            "redis": redis,
            "group": group,
            "imports": tuple(imports) or None,
            "schema": schema,
            "pooler": pooler,
        }
        self._said = {name: value for name, value in said.items() if value is not None}
        self._route, self._enforce, self._alert, self._durable = route, enforce, alert, not may_lose_commits
        super().__init__()
        self._store_binding = _Binding()
        for each in (database, async_database):
            forked_engines.register_named(each)

    def __reduce__(self) -> NoReturn:
        # Else pickle's error would name a lock or a function inside it.
        raise TypeError(
            "An ExactlyOnce is not pickled or copied: import it in the other process, from the module that makes it."
        )

    def _registered(self) -> None:
        self._store_binding.router = self._store_binding.callers_loop = None  # made again with the new handler

    def bind(self, database: Any, *, async_database: Any = None) -> None:
        """Say where the claims are, before first use.

        Args:
            database: As for the constructor.
            async_database: As for the constructor.

        Raises:
            ConfigurationError: Messages were already handled through another database.
        """
        if self._store_binding.router is not None:
            raise ConfigurationError(
                "bind() came after first use: messages were handled through another database already. Call it earlier,"
                " in a test use exactly_once.testing.bound(eo, engine)."
            )
        self._store_binding = _Binding(database, async_database)
        for each in (database, async_database):
            forked_engines.register_named(each)

    # -- entry point 1: a claim in a transaction of the caller's --------------------------------------------------------------

    def claim(
        self,
        session: "Session | scoped_session[Any]",
        handler: str,
        key: object,
        *,
        payload: bytes | None = None,
        claim_wait: timedelta = timedelta(seconds=2),
    ) -> bool:
        """Claim a key in the transaction you have: True the first time, False if it was done before.

        In a handler of that name it is True each time for its own message, which the handler has claimed already.

        Acknowledge the message only after your commit. A claim that is not committed is rolled back with its work. If a Session
        is closed like that, a WARNING of `exactly_once.claim` says so. If an error ended the transaction and was
        caught, so that the claim would not be kept, this raises `Misuse`. It does not notice a procedure, DDL or a call on the
        driver that ends the transaction before your commit.
        With an AsyncSession: `await session.run_sync(eo.claim, "reserve_stock", order.no)`.

        Args:
            session: Begun or not; the claim is part of its transaction. Earlier work in it survives a refusal. For a
                `scoped_session` (Flask-SQLAlchemy's `db.session`), the session of this thread or request is used.
            handler: What the claim is for; with the group and the key it is the identity.
            key: The business key, or a tuple of parts.
            payload: The message's body, to detect another payload under a known key.
            claim_wait: The longest to wait for another transaction that holds the key; whole seconds on MySQL/MariaDB.

        Returns:
            True if the work is yours to do, False if it was done and committed.

        Raises:
            InProgress: Another transaction holds the key and may still fail: do not acknowledge.
            PayloadConflict: The key was consumed with another payload.
            BadKey: The key is empty, too long, or neither text, a whole number nor a UUID.
            Misuse: The database rolled back the transaction of an earlier claim, and the error was caught: roll back.

        Example:
            with Session(engine) as session, session.begin():
                if eo.claim(session, "reserve_stock", order.no):
                    reserve(session, order)
            consumer.ack(message)
        """
        try:
            return self._claimer.claim(
                session,
                self.group,
                handler,
                key,
                payload=payload,
                wait_ms=max(1, round(claim_wait.total_seconds() * 1000)),
                schema=self.config.schema.value,
            )
        except StoreUnavailable as error:
            error.asked_by_handler = True
            raise

    # -- entry point 2: one message in a loop of the caller's -----------------------------------------------------------------

    def process(self, message: Message) -> Outcome:
        """Run a message through its handlers in this thread. Acknowledge it if the outcome says so.

        Never raises for a fault of a message, a handler or the database: the outcome says it. Failures are
        recorded; the caller's loop redelivers the message.

        Args:
            message: As `Message.from_rocketmq(m)` and the like make it.

        Returns:
            What became of it; `outcome.acknowledge` is all that a loop has to check. An outcome itself is neither true nor false.

        Raises:
            ConfigurationError: Nothing can run yet: no group, no tables, no handlers, no such module to import; or a handler
                is async.
            BaseException: An exception of a handler that is no `Exception`, such as gevent's Timeout. It is recorded, and
                raised as long as the message is to come again. KeyboardInterrupt, SystemExit and the like are raised and not
                recorded.

        Example:
            return SUCCESS if eo.process(Message.from_rocketmq(m)).acknowledge else LATER
        """
        return self._callers_loop.run(_checked(message))

    async def aprocess(self, message: Message) -> Outcome:
        """The same in an event loop: async handlers run in the loop, sync handlers in a thread.

        Example:
            outcome = await eo.aprocess(Message.from_kafka(m))
        """
        return await self._callers_loop.arun(_checked(message))

    # -- entry point 3: the worker --------------------------------------------------------------------------------------------

    def worker(
        self,
        url: str | None = None,
        *,
        concurrency: int | None = None,
        drain_timeout: timedelta | None = None,
        patience: timedelta | None = None,
        background: bool = False,
    ) -> "WorkerService":
        """Return a worker over a broker, used with `with` or `async with`.

        Args:
            url: The transport, such as `rocketmq://127.0.0.1:8081` or `sql://`. None: from EXACTLY_ONCE_TRANSPORT.
            concurrency: How many messages run at once. None: from the settings, else 16.
            drain_timeout: How long stopping lets running messages finish. None: from the settings, else 25 s.
            patience: How long the start waits for a database or broker that does not answer. None: five minutes, and in the
                background without limit.
            background: `with` and `async with` go on at once, and the worker starts in the background. For the lifespan of an
                API that serves while the worker's database or broker is away. What keeps the worker from starting is logged,
                and `unready()` returns it.

        Example:
            with eo.worker("memory://test") as worker:
                worker.drain()
        """
        from exactly_once.service.worker_service import WorkerService
        from exactly_once.wording.redaction import redacted

        config = self.config
        router = self._router
        router.require_handlers()
        return WorkerService(
            router,
            self.transport(url),
            concurrency=concurrency or config.concurrency.value,
            drain_timeout=drain_timeout or config.drain_timeout.value,
            patience=patience,
            background=background,
            describe=redacted(url or self._transport_url()),
        )

    def run(self, url: str | None = None, *, concurrency: int | None = None) -> int:
        """Run a worker until SIGTERM or SIGINT. Returns 0, or 1 if messages were given back unfinished.

        Example:
            if __name__ == "__main__":
                raise SystemExit(eo.run("rocketmq://127.0.0.1:8081"))
        """
        from exactly_once.daemon.signals import run_until_signal

        serving = self.worker(url, concurrency=concurrency)
        return run_until_signal(serving, start=serving.start)

    def producer(self, url: str | None = None) -> "Producer":
        """Return a producer to a broker, used with `with`.

        Args:
            url: The transport. None: from EXACTLY_ONCE_TRANSPORT.

        Example:
            with eo.producer("rocketmq://127.0.0.1:8081") as producer:
                producer.send(Message("orders", b"{}", tag="created"))
        """
        from exactly_once.configuration.config import redacted
        from exactly_once.transports.producer import Producer

        transport = self.transport(url)
        return Producer(transport.producer(), redacted(url or self._transport_url()))

    def executor(self, concurrency: int) -> "Executor":
        """Return an executor, which runs deliveries without a worker; for the command line. Stop it after use."""
        router = self._router
        router.require_handlers()
        from exactly_once.executor.executor import Executor

        return Executor(router.find, router.plans, threads=concurrency)

    # -- work that must not overlap ------------------------------------------------------------------------------------

    def lock(
        self,
        key: object,
        *,
        expires: timedelta = timedelta(seconds=30),
        wait: timedelta = timedelta(seconds=10),
        store: str | None = None,
    ) -> "RedisLock":
        """Return a lock in Redis, used with `with` or `async with`: for work that only must not overlap.

        It records nothing of what was done, and it does not fence: a process that stands still for longer than `expires`
        overlaps with the next holder. For work that must happen once, use a claim.

        Args:
            key: What is locked: a text, whole number or UUID, or a tuple of these. Locks of other groups are different locks.
            expires: The longest it is held; it is not prolonged.
            wait: How long to wait for a lock that another holds.
            store: The URL of the Redis. None: from EXACTLY_ONCE_REDIS.

        Raises:
            InProgress: On entering: another holder had it all that time.
            StoreUnavailable: On entering: Redis does not answer.

        Example:
            with eo.lock(("rebuild", shop_id), expires=timedelta(minutes=2)):
                rebuild_search_index(shop_id)
        """
        from exactly_once.redis.lock import RedisLock

        return RedisLock(self.redis_at(store), self.group, key, expires=expires, wait=wait)

    @cached_property
    def _redis_connections(self) -> "RedisConnections":
        from exactly_once.redis.connection import RedisConnections

        return RedisConnections()

    def redis_at(self, url: str | None = None) -> "RedisConnection":
        """Return the connection for this Redis, or for that of the settings. Each is made once, and opens nothing yet."""
        named = url or self.config.redis.value
        if not named:
            raise ConfigurationError(
                "No Redis is named. Type: export EXACTLY_ONCE_REDIS=redis://127.0.0.1:6379/0, or write"
                f" ExactlyOnce(redis='redis://...'), or give store= ({self.config.looked})."
            )
        return self._redis_connections.at(named)

    # -- what applies ---------------------------------------------------------------------------------------------------------

    @cached_property
    def group(self) -> str:
        """The consumer group."""
        group = self.config.group.value
        if not group:
            raise ConfigurationError(
                "No consumer group is named, and it is part of every claim. Write ExactlyOnce(group='inventory'), or type:"
                " export EXACTLY_ONCE_GROUP=inventory (on the command line --app MODULE:NAME or --group, where there is one)."
            )
        return check_name(group, GROUP_BYTES, "group")

    @cached_property
    def _claimer(self) -> "Claimer":
        from exactly_once.guards.claiming import Claimer

        return Claimer(pooler=self.config.pooler.value, durable=self._durable)

    @cached_property
    def config(self) -> "Config":
        """The settings that apply: environment over file over code. Read once, at first use."""
        from exactly_once.configuration.config import load

        return load(code=self._said)

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The handlers as they will run: the code's options with the settings file's changes.

        Imports the modules of `imports=`.
        """
        return self._router.plans

    def subscriptions(self) -> "Sequence[Subscription]":
        """What the group subscribes to: for each topic the union of its handlers' tags."""
        return self._router.subscriptions()

    @property
    def stores(self) -> "Mapping[str, Store]":
        """The databases by name."""
        return self._stores(self._store_binding)

    @property
    def _router(self) -> "Router":
        """Made at first use, and fixed after that."""
        binding = self._store_binding
        if binding.router is None:
            from exactly_once.executor.routing import Router

            for module in self.config.imports.value:
                _import(module, self.config.imports.source)
            plans = self.config.applied(tuple(self._plans.values()))
            binding.router = Router(
                plans,
                self._stores(binding),
                self.group,
                leases=self.leases,
                route=self._route,
                enforce=self._enforce,
                alert=self._alert,
            )
        return binding.router

    @property
    def _callers_loop(self) -> "CallersLoop":
        """The same for messages that a loop of the caller's brings."""
        binding = self._store_binding
        if binding.callers_loop is None:
            from exactly_once.executor.callers_loop import CallersLoop

            binding.callers_loop = CallersLoop(self._router.matching)
        return binding.callers_loop

    @property
    def leases(self) -> "LeaseStores":
        """The stores of the handlers' leases; for the command line."""
        binding = self._store_binding
        if binding.leases is None:
            from exactly_once.guards.lease.stores import LeaseStores

            config = self.config
            binding.leases = LeaseStores(
                self._redis_connections,
                config.redis.value,
                config.schema.value,
                self._alert,
                pooler=config.pooler.value,
            )
        return binding.leases

    def _stores(self, binding: _Binding) -> "dict[str, Store]":
        if binding.stores is None:
            from exactly_once.database.store import Store

            database, async_database = binding.database, binding.async_database
            if database is None and async_database is None:  # bind() wins over every setting
                from exactly_once.configuration.which_database import say_which

                config = self.config
                database, async_database = config.database.value, config.async_database.value
                say_which("database", self._said.get("database"), config.database)
                say_which("async_database", self._said.get("async_database"), config.async_database)
            if database is None and async_database is None:
                from exactly_once.configuration.which_database import lend_one

                raise ConfigurationError(
                    f"No database is named.{lend_one()}"
                    " Type: export EXACTLY_ONCE_DATABASE=postgresql+psycopg://user:password@host/name, or"
                    f" write ExactlyOnce('postgresql+psycopg://...'), or eo.bind(engine) ({self.config.looked})."
                )
            several = database if isinstance(database, Mapping) else {_DEFAULT: database}
            if len(several) > 1 and self._route is None:
                raise ConfigurationError("Several databases need route=: a function that names the one of a message.")
            others = async_database if isinstance(async_database, Mapping) else {_DEFAULT: async_database}
            # A handler holds one connection; recording a failure and the pump need another for a moment.
            config = self.config
            size = config.concurrency.value + 4
            binding.stores = {
                name: Store(
                    name,
                    each,
                    others.get(name),
                    schema=config.schema.value,
                    pool_size=size,
                    pooler=config.pooler.value,
                    durable=self._durable,
                )
                for name, each in several.items()
            }
        return binding.stores

    def _transport_url(self) -> str:
        url = self.config.transport.value
        if not url:
            raise ConfigurationError(
                "No transport is named. Type: export EXACTLY_ONCE_TRANSPORT=rocketmq://127.0.0.1:8081, or give the URL:"
                f" --transport on the command line, else to eo.worker, eo.run or eo.producer ({self.config.looked})."
            )
        return url

    def transport(self, url: str | None = None) -> "Transport":
        """Return the transport that a URL, or the settings, name. Opens nothing."""
        from exactly_once.transports.contract import Surroundings
        from exactly_once.transports.registry import transport_from

        def store() -> "Store":
            return next(iter(self._stores(self._store_binding).values()))

        around = Surroundings(lambda: store().engine, lambda: store().resolved_schema, one_of_several=is_supervised())
        return transport_from(url or self._transport_url(), around)


def _checked(message: Message) -> Message:
    if not isinstance(message, Message):
        raise ConfigurationError(
            f"A {type(message).__name__} was given where a Message is wanted. Write Message(topic, body), or"
            " Message.from_rocketmq(m), from_rocketmq4(m), from_kafka(m) for what a client received."
        )
    return message


def _import(module: str, source: str) -> None:
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module exists, and imports one that does not
        raise ConfigurationError(
            f"There is no module {error.name!r}, which imports= names as {module!r} (from {source}). Is its folder on"
            " PYTHONPATH, and the name that of a module and no file?"
        ) from error
