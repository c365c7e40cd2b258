"""Decides which handlers on which database a delivery is for: by topic, tag and `route=`.

Made at first use from the handlers registered at the facade, and fixed from then on. Called by the facade and by `service`.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from exactly_once.database.store import Store
from exactly_once.errors import ConfigurationError, Reject
from exactly_once.events.alert import Hook
from exactly_once.exceptions.stops import asked_from_outside
from exactly_once.exceptions.words import words_of
from exactly_once.guards.lease.stores import LeaseStores
from exactly_once.handlers.plan import Plan
from exactly_once.message import Message
from exactly_once.processing.batch import BatchProcessor
from exactly_once.processing.parked import ParkingProcessor
from exactly_once.processing.processor import Processor
from exactly_once.transports.contract import Delivery, Subscription
from exactly_once.wording.steady_log import steady
from exactly_once.wording.text import escaped

__all__ = ["Route", "Router", "decorated_above"]

Route = Callable[[Message], str]
"""Return the name of the database that a message belongs to."""

_NONE: Final[tuple[Processor, ...]] = ()
_MOST_TOLD: Final = 100  # topics that no handler takes: each is remembered, and the names come from outside

_log = steady("exactly_once.routing")


class Router:
    """Handlers by topic on each database.

    Args:
        plans: The handlers, in the order they were registered.
        stores: The databases by name; the first is the default.
        group: The consumer group.
        leases: Where the leases of its handlers are kept.
        route: Returns the name of a message's database. None: there is one database.
        enforce: False: duplicates run all the same.
        alert: The application's hook for what a person should look at.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        stores: Mapping[str, Store],
        group: str,
        *,
        leases: LeaseStores,
        route: Route | None = None,
        enforce: bool = True,
        alert: Hook | None = None,
    ) -> None:
        self.leases = leases
        self.plans, self.stores, self.group, self._route = tuple(plans), dict(stores), group, route
        self._first = next(iter(self.stores))
        self._topics: dict[str, dict[str, tuple[Processor, ...]]] = {}
        self._names: dict[str, dict[str, Processor]] = {}
        for name, store in self.stores.items():
            delivering = [
                # with enforce=False no batches: the claims of a batch stand or fall together, and a duplicate has none
                (BatchProcessor if plan.batch is not None and enforce else Processor)(
                    plan, store, group, leases=leases, enforce=enforce, alert=alert
                )
                for plan in self.plans
            ]
            self._names[name] = {each.plan.name: each for each in delivering}
            topics = self._topics[name] = {}
            for each in delivering:
                topics[each.plan.topic] = (*topics.get(each.plan.topic, ()), each)
        self._only = self._topics[self._first] if route is None else None
        self._told: set[str] = set()

    def find(self, delivery: Delivery) -> Sequence[Processor]:
        """Return the handlers that a delivery is for. From the failure store: only the handler that failed."""
        if delivery.unread is not None:
            return [ParkingProcessor(each, delivery.unread) for each in self._of_unread(delivery)]
        if delivery.handler is not None:
            return self._failed_before(delivery, delivery.handler)
        return self.matching(delivery.message)

    def _of_unread(self, delivery: Delivery) -> Sequence[Processor]:
        """Return the handlers that park an unreadable message. If even its tag is unknown: every handler of the topic."""
        if delivery.handler is not None:
            return self._failed_before(delivery, delivery.handler)
        return self.matching(delivery.message) or self._topics[self._first].get(delivery.message.topic, _NONE)

    def _failed_before(self, delivery: Delivery, handler: str) -> Sequence[Processor]:
        """Ask route= again: a message that could not be routed was kept in the first database, but must run on its own.

        On another database its claim would not be seen by other copies of the message, and it would be processed twice.
        """
        kept_in = delivery.database or self._first
        name = kept_in if self._route is None else self._named(delivery.message)
        unknown = name not in self._names
        found = self._names[kept_in if unknown else str(name)].get(handler)
        if found is None:
            return _NONE
        return (ParkingProcessor(found, Reject(self._unknown(name))),) if unknown else (found,)

    def matching(self, message: Message) -> Sequence[Processor]:
        """Return the handlers of a message on the database it is routed to.

        Raises:
            ConfigurationError: There are no handlers at all. An empty result would have the message acknowledged.
        """
        topics = self._only
        if topics is None:
            name = self._named(message)
            if name not in self._topics:
                reason = self._unknown(name)
                return [
                    ParkingProcessor(each, Reject(reason))
                    for each in self._matching(self._topics[self._first], message)
                ]
            topics = self._topics[name]
        return self._matching(topics, message)

    def _matching(self, topics: Mapping[str, tuple[Processor, ...]], message: Message) -> Sequence[Processor]:
        found = topics.get(message.topic)
        if found is None:
            self._is_nobodys(message.topic)
            return _NONE
        if len(found) == 1:
            return found if found[0].plan.matches(message) else _NONE
        return [each for each in found if each.plan.matches(message)]

    def _is_nobodys(self, topic: str) -> None:
        if not self.plans:
            raise ConfigurationError(_NO_HANDLERS)
        if topic in self._told or len(self._told) >= _MOST_TOLD:
            return
        self._told.add(topic)
        _log.warning(
            "No handler takes topic '%s'; its messages are acknowledged unread. Handlers take: %s.",
            escaped(topic, 200),
            ", ".join(sorted({escaped(plan.topic) for plan in self.plans})),
        )

    def _unknown(self, name: object) -> str:
        known = ", ".join(self._topics)
        return f"route= named the database {escaped(str(name))!r} for this message; known are: {known}"

    def _named(self, message: Message) -> object:
        assert self._route is not None
        try:
            return self._route(message)
        except BaseException as error:  # the user's function failed: the message is parked with this as its reason
            if asked_from_outside(error):
                raise
            return f"(it raised {type(error).__name__}: {words_of(error)})"

    def subscriptions(self) -> Sequence[Subscription]:
        """Return the group's subscriptions: for each topic the union of its handlers' tags, sorted, alike in every process.

        On RocketMQ a group whose processes subscribe differently loses messages: the broker keeps only the last subscription.
        """
        wanted: dict[str, list[Plan]] = {}
        for plan in self.plans:
            wanted.setdefault(plan.topic, []).append(plan)
        return [
            Subscription(
                topic,
                # a handler without a tag wants every message of the topic
                tuple(sorted({tag for plan in plans for tag in plan.tags})) if all(plan.tags for plan in plans) else (),
                any(plan.ordered for plan in plans),
                max(plan.batch or 1 for plan in plans),
            )
            for topic, plans in sorted(wanted.items())
        ]

    def answers(self, store: str) -> bool:
        """Whether the store of this name answers and can be written to."""
        answered = self.leases.answers(store)
        return self.stores[store].answers() if answered is None else answered

    def unready(self) -> str | None:
        """Return which handler is held because it is wrong, and why; or None."""
        for handlers in self._names.values():
            for each in handlers.values():
                if each.recording.refused is not None:
                    return f"the handler {each.plan.name!r} is held: {each.recording.refused}"
        return None

    def require_handlers(self) -> None:
        """Raise unless there are handlers, and none has a decorator above @eo.handler, which would not run."""
        if not self.plans:
            raise ConfigurationError(_NO_HANDLERS)
        for plan in self.plans:
            if (above := decorated_above(plan, self.plans)) is not None:
                raise ConfigurationError(above)


def decorated_above(plan: Plan, plans: Sequence[Plan]) -> str | None:
    """Return a text if a decorator stands above @eo.handler: it wraps the module's name only, so it never runs for messages."""
    function = plan.function
    name, module = getattr(function, "__qualname__", ""), sys.modules.get(getattr(function, "__module__", ""))
    if module is None or "." in name or "<" in name:
        return None
    seen = getattr(module, name, function)
    if seen is function or any(seen is other.function for other in plans):  # the second: two functions of the same name
        return None
    return (
        f"The handler {plan.name!r} has a decorator above @eo.handler, which does not run for messages. Put @eo.handler on"
        f" top of the others, in {module.__name__}."
    )


_NO_HANDLERS: Final = (
    "No handlers are registered. Import the module that decorates them before the first message:"
    " ExactlyOnce(imports=['shop.consumers']), or EXACTLY_ONCE_IMPORTS=shop.consumers."
)
