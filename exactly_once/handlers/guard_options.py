"""The options of `guard=`: `Transaction`, `Lease` or `Lock`. Checked at the decorator. Never opens anything."""

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, TypeAlias

from exactly_once.errors import ConfigurationError
from exactly_once.wording.redaction import redacted

__all__ = ["GuardOption", "Lease", "Lock", "Transaction", "check_guard"]

_SHORTEST: Final = timedelta(seconds=1)
_LONGEST: Final = timedelta(days=30)


@dataclass(frozen=True, slots=True)
class Transaction:
    """The default guard: claim, handler and completion commit in one transaction of the handler's database.

    Args:
        claim_wait: How long to wait for another run that holds the same key. Then the outcome is *in progress*.

    Raises:
        ConfigurationError: A time is not positive.
    """

    claim_wait: timedelta = timedelta(seconds=2)

    def __post_init__(self) -> None:
        _span("Transaction(claim_wait", self.claim_wait, timedelta(milliseconds=1))

    @property
    def told(self) -> str:
        """The option in a few words, for a person."""
        return f"Transaction, claim_wait {self.claim_wait.total_seconds():g} s"


@dataclass(frozen=True, slots=True)
class Lease:
    """For handlers that call other services or run for minutes: one run at a time, under a lease that is renewed while it lives.

    After a crash the lease runs out, and another run takes the message over. A consumed message never runs again. If the leases
    are in the handler's own database, its SQL effects happen exactly once, too. A call to the outside may be repeated after a
    crash, unless it is a step with `at_most_once`. A process that was paused for longer than the lease can finish the one outside
    call it was in.

    Args:
        lease: How long a lease lasts without renewal. It is renewed after each third. At least as long as a machine may pause.
        store: None: in the handler's database. A redis:// or database URL: there; then the claim is completed after the commit.
            "redis": the Redis of the setting `redis`.
        max_run: After this time the lease is not renewed any more, and an alert is raised. None: as long as the handler runs.
        retention: In Redis, how long a message is remembered after its last change. Longer than a copy may be late.

    Raises:
        ConfigurationError: A time is out of range, or the store is not a URL.

    Example:
        @eo.handler("orders", tag="created", key="order_no", guard=Lease(timedelta(minutes=10)))
        def checkout(order: Order, steps: Steps) -> None:
            hold = steps.run("lock stock", lambda key: inventory.lock(order.order_no, idempotency_key=key), returns=Hold)
    """

    lease: timedelta
    store: str | None = field(default=None, repr=False)
    max_run: timedelta | None = None
    retention: timedelta = timedelta(days=7)

    def __post_init__(self) -> None:
        _span("Lease(", self.lease, _SHORTEST)
        if self.max_run is not None:
            _span("Lease(max_run", self.max_run, self.lease)
        _span("Lease(retention", self.retention, self.lease, timedelta(days=3650))
        _store("Lease", self.store)

    @property
    def told(self) -> str:
        """The option in a few words, for a person."""
        most = "" if self.max_run is None else f", max_run {self.max_run}"
        return f"Lease of {self.lease} in {_place(self.store, _OWN)}{most}"


@dataclass(frozen=True, slots=True)
class Lock:
    """A plain lock in Redis around each run: for work that is idempotent by itself and only must not overlap.

    It remembers nothing: a redelivered message runs again. It does not fence: a run that was paused for longer than `expires`
    overlaps with the next run.

    Args:
        expires: How long the lock lasts. It is not renewed, so it must be longer than the handler runs.
        store: A redis:// URL. None: the Redis of the setting `redis`.
        wait: How long to wait for another run of the same key. Then the outcome is *in progress*.

    Raises:
        ConfigurationError: A time is out of range, or the store is not a URL.
    """

    expires: timedelta = timedelta(seconds=30)
    store: str | None = field(default=None, repr=False)
    wait: timedelta = timedelta(seconds=2)

    def __post_init__(self) -> None:
        _span("Lock(expires", self.expires, _SHORTEST)
        _span("Lock(wait", self.wait, timedelta(0))
        _store("Lock", self.store)

    @property
    def told(self) -> str:
        """The option in a few words, for a person."""
        return f"Lock of {self.expires} in {_place(self.store, _SETTING)}, wait {self.wait.total_seconds():g} s"


GuardOption: TypeAlias = Transaction | Lease | Lock


def check_guard(guard: object) -> GuardOption:
    """Return the guard option. None: the default.

    Raises:
        ConfigurationError: It is not one of our guard options, or a class that was not called.
    """
    if guard is None:
        return Transaction()
    if isinstance(guard, (Transaction, Lease, Lock)):
        return guard
    if isinstance(guard, type) and issubclass(guard, (Transaction, Lease, Lock)):
        call = "timedelta(minutes=10)" if guard is Lease else ""
        raise ConfigurationError(f"guard={guard.__name__}: call it: guard={guard.__name__}({call})")
    raise ConfigurationError(f"guard={guard!r}: give Transaction(), Lease(timedelta(minutes=10)) or Lock()")


def _span(what: str, given: Any, least: timedelta, most: timedelta = _LONGEST) -> None:
    equals = "" if what.endswith("(") else "="
    if not isinstance(given, timedelta) or not least <= given <= most:
        low = "above zero" if least <= timedelta(milliseconds=1) else f"from {least}"
        if least == timedelta(0):
            low = "of zero or more"
        number = isinstance(given, (int, float)) and not isinstance(given, bool)
        meant = f". For {given:g} seconds write {what}{equals}timedelta(seconds={given:g}))" if number else ""
        raise ConfigurationError(f"{what}{equals}{given!r}): give a timedelta {low}, at most {most.days} days{meant}")


_OWN: Final = "the handler's database"
_SETTING: Final = "the Redis of the settings"


def _place(store: str | None, default: str) -> str:
    return default if store is None else _SETTING if store == "redis" else redacted(store)


def _store(what: str, given: object) -> None:
    if given is None:
        return
    if not isinstance(given, str) or ("://" not in given and given != "redis"):
        # the value is never shown: it may be a URL with a password and a misspelled scheme
        raise ConfigurationError(
            f"{what}(store=...): give a URL such as redis://127.0.0.1:6379/0, or 'redis' for the setting"
        )
