"""Finds messages that would crash librocketmq before the client joins, and reads the queue up to them without it.

librocketmq unpacks every packed body as zlib. Java's client packs with LZ4 or ZSTD if configured to. Such a message
ends the process (signal 6) before any callback, and again after each restart. So before the client joins, we look at the messages
that the group has yet to read. If there is such a message, this reads the queue itself, up to and including
that message, and hands each message to the worker as the client would. Then the group's offset is moved behind it, and the
client joins. What Python can unpack is handled; the rest becomes a dead letter with its bytes.

Such a message that arrives while a process runs ends that process; the next start finds it. The look costs a few milliseconds for
each queue with unread messages, and has a time limit, a longer one if a process died lately.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import BoundedSemaphore, Event, Thread
from time import monotonic
from typing import Final

from exactly_once.errors import BadBody, TransportError
from exactly_once.message import Message
from exactly_once.transports.contract import Subscription
from exactly_once.transports.remoting import Admin, Queue
from exactly_once.transports.rocketmq4.messages import Names
from exactly_once.transports.rocketmq4.stored import Stored, read_stored, stored_in
from exactly_once.wording.steady_log import steady

__all__ = ["Ahead", "Stretch", "look_ahead"]

LOOKS_S: Final = 3.0
# A message that ended a process is near the stored offset: after it come some seconds of work, and what the client prefetched.
LOOKS_AFTER_A_DEATH_S: Final = 15.0
_AGAIN_S: Final = 1.0

_log = steady("exactly_once.transports.rocketmq4")

Wanted = Callable[[Stored], bool]
Offer = Callable[[Message, BadBody | None], bool]
"""Hands a message to the worker and waits. False: it is not settled, and we are leaving."""


@dataclass(slots=True)
class Stretch:
    """A queue from the group's offset on; `last` is the last message there that would crash the client.

    With `expression` the broker returns the messages that the client would get; `wanted` are the tags of
    those that handlers want.
    """

    queue: Queue
    first: int
    expression: str
    wanted: Wanted
    last: int | None = None


def look_ahead(
    admin: Admin, names: Names, group: str, subscriptions: Sequence[Subscription], *, died: bool
) -> Sequence[Stretch]:
    """Return the queues that contain such a message; usually none. Changes nothing, and never raises.

    Args:
        admin: Requests to the servers.
        names: The namespace.
        group: The group that reads them.
        subscriptions: What it subscribes to.
        died: A process of the group died lately: look farther.
    """
    found: list[Stretch] = []
    try:
        _look(admin, names, group, subscriptions, found, monotonic() + (LOOKS_AFTER_A_DEATH_S if died else LOOKS_S))
    except (OSError, TransportError) as error:
        _log.warning("Group %s: what is in front of it could not be looked at: %s", group, error)
    deadly = [stretch for stretch in found if stretch.last is not None]
    for stretch in deadly:
        _log.warning(
            "Group %s: queue %d of %s has a message at %d that librocketmq cannot unpack (LZ4, ZSTD, damaged): it would end this"
            " process. The queue is read without librocketmq, from %d to there.",
            *(group, stretch.queue.number, stretch.queue.topic, stretch.last, stretch.first),
        )
    return deadly


def _look(
    admin: Admin,
    names: Names,
    group: str,
    subscriptions: Sequence[Subscription],
    found: list[Stretch],
    deadline: float,
) -> None:
    theirs = names.outside(group)
    # What a client of another language sent back comes from the group's retry topic.
    topics = [(names.outside(each.topic), each.tags) for each in subscriptions] + [(f"%RETRY%{theirs}", ())]
    reading: deque[tuple[Stretch, int, int]] = deque()
    for topic, tags in topics:
        for queue in admin.queues(topic):
            place = admin.offset(theirs, queue)
            if place is not None:
                end = admin.end(queue)
                stretch = Stretch(queue, place, " || ".join(sorted(tags)) or "*", partial(_has_tag, frozenset(tags)))
                found.append(stretch)
                reading.append((stretch, place, end))
    while reading and monotonic() < deadline:
        stretch, offset, end = reading.popleft()
        if offset >= end:
            continue
        data, following = admin.pull(theirs, stretch.queue, offset, stretch.expression)
        for stored in stored_in(data):
            # Also with an unwanted tag: the broker compares hashes, and the client unpacks before it compares tags.
            if stored.deadly:
                stretch.last = stored.offset
        if following > offset:
            reading.append((stretch, following, end))


def _has_tag(tags: frozenset[str], stored: Stored) -> bool:
    return not tags or stored.tag in tags


class Ahead:
    """Reads these stretches, each in a thread of its own, one message of a queue at a time.

    Args:
        admin: Requests to the servers.
        names: The namespace.
        group: The broker's name of the group.
        stretches: What `look_ahead` found.
        properties: Property names to read from messages of producers other than ours.
        at_once: The most messages in hand.
    """

    def __init__(
        self,
        admin: Admin,
        names: Names,
        group: str,
        stretches: Sequence[Stretch],
        *,
        properties: tuple[str, ...],
        at_once: int,
    ) -> None:
        self._admin, self._names, self._group, self._stretches = admin, names, group, stretches
        self._properties = properties
        self._places = BoundedSemaphore(at_once)
        self._leaving = Event()
        self._threads: list[Thread] = []

    def start(self, offer: Offer) -> None:
        """Begin to hand out the messages."""
        self._threads = [
            Thread(target=self._read, args=(stretch, offer), name=f"rocketmq4-ahead {n}", daemon=True)
            for n, stretch in enumerate(self._stretches)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def done(self) -> bool:
        """Whether all is read and settled, and the group's offset is behind it."""
        return not any(thread.is_alive() for thread in self._threads)

    def leave(self) -> None:
        """Read no further. Unsettled messages come again."""
        self._leaving.set()

    def _read(self, stretch: Stretch, offer: Offer) -> None:
        offset, last = stretch.first, stretch.last
        assert last is not None
        while offset <= last and not self._leaving.is_set():
            try:
                data, following = self._admin.pull(self._group, stretch.queue, offset, stretch.expression)
                settled = self._handed(stretch, data, last, offer)
                # A crash before this line brings these messages again, and their claims say that they are done.
                offset = max(offset, settled if settled is not None else min(max(following, offset + 1), last + 1))
                self._admin.move(self._group, stretch.queue, offset)
            except Exception as error:
                _log.warning("Queue %d of %s cannot be read: %s", stretch.queue.number, stretch.queue.topic, error)
                self._leaving.wait(_AGAIN_S)

    def _handed(self, stretch: Stretch, data: bytes, last: int, offer: Offer) -> int | None:
        """Hand these out one by one. Return where to go on, or None if all of them are done."""
        for stored in stored_in(data):
            if stored.offset > last:
                return last + 1
            if stretch.wanted(stored):
                message, unread = read_stored(stored, self._names.inside, self._properties)
                with self._places:
                    if not offer(message, unread):
                        return stored.offset
        return None
