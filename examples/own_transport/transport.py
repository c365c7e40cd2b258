"""A broker that is a folder on one machine, `folder:///var/spool/shop`. What a message is on the disk stands in `spool`."""

import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import islice
from pathlib import Path
from threading import Event
from uuid import uuid4

import spool

from exactly_once import Message, TransportError
from exactly_once.outcome import Ack, Settlement
from exactly_once.transports.contract import Delivery, Features, Receipt, Subscription, Surroundings


class FolderTransport:
    features = Features(redelivers=True, counts_attempts=True, properties=True, delayed=True, empty_body=True)

    def __init__(self, root: Path, invisible: timedelta = timedelta(seconds=30)) -> None:
        self.root, self.invisible = root, invisible

    @classmethod
    def from_url(cls, url: str, surroundings: Surroundings) -> "FolderTransport":
        return cls(Path(url.partition("://")[2]))

    def check(self, group: str, subscriptions: Sequence[Subscription]) -> Sequence[str]:
        return [] if self.root.is_dir() else [f"There is no folder {self.root}. Type: mkdir -p {self.root}"]

    def concerns(self, group: str, subscriptions: Sequence[Subscription]) -> Sequence[str]:
        return []

    def subscribe(self, group: str, subscriptions: Sequence[Subscription]) -> Sequence["FolderConsumer"]:
        return [FolderConsumer(self, each.topic, group) for each in subscriptions]

    def producer(self) -> "FolderTransport":
        return self

    def send(self, messages: Sequence[Message], *, delay: timedelta | None = None) -> Sequence[Receipt | Exception]:
        return [self._send(message, delay or timedelta(0)) for message in messages]

    def _send(self, message: Message, delay: timedelta) -> Receipt | Exception:
        boxes, message_id = spool.boxes(self.root, message.topic), uuid4().hex
        if not boxes:
            return TransportError(f"No group receives {message.topic!r} yet: start its worker first.")
        try:
            for box in boxes:
                spool.put(box, message, message_id, delay)
        except OSError as error:
            return error
        return Receipt(message.topic, message_id)

    def close(self) -> None: ...  # nothing is open


class FolderConsumer:
    features = FolderTransport.features

    def __init__(self, transport: FolderTransport, topic: str, group: str) -> None:
        self.topic, self.invisible, self.stopped = topic, transport.invisible, Event()
        self.box = spool.box(transport.root, topic, group)
        self.box.mkdir(exist_ok=True)

    def receive(self, limit: int, wait: timedelta) -> Sequence[Delivery]:
        deadline = time.monotonic() + wait.total_seconds()
        while limit and not self.stopped.is_set():
            taken = (spool.take(file, self.topic, self.invisible) for file in self.box.glob("[0-9]*"))
            found = [Delivery(*each) for each in islice(filter(None, taken), limit)]
            if found or time.monotonic() >= deadline:
                return found
            self.stopped.wait(0.05)
        return []

    def settle(self, settlements: Sequence[tuple[Delivery, Settlement]]) -> None:
        for delivery, settlement in settlements:
            if isinstance(settlement, Ack):
                delivery.receipt_handle.unlink(missing_ok=True)
            else:
                spool.later(delivery.receipt_handle, settlement.delay)

    def extend(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            spool.later(delivery.receipt_handle, self.invisible)

    def stop(self) -> None:
        self.stopped.set()

    close = stop
