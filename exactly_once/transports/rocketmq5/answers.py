"""The broker's answers to acknowledgements and to requests for more time. Never raises, never tries again.

Called by the consumer. If anything fails here, the broker's timer redelivers the message, so a line in
the log is enough.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from time import monotonic
from typing import Any, Final

from rocketmq.grpc_protocol import Code

from exactly_once.transports.rocketmq5.group_client import Grip, describe
from exactly_once.wording.steady_log import steady

__all__ = ["FINE", "begun", "refused_acknowledgements", "refused_renewals", "tell"]

log = steady("exactly_once.transports.rocketmq5")

FINE: Final = frozenset({Code.OK, Code.MULTIPLE_RESULTS, Code.MESSAGE_NOT_FOUND})
PATIENCE_S: Final = 8.0  # seconds; calls carry their own deadline of 5 s, this bounds a loop that is stuck

Answer = Future[Any]
Refused = dict[str, list[str]]
"""Message ids by reason."""


def begun(call: Callable[..., Answer], *arguments: object) -> Answer:
    """Begin a call. A call that cannot begin, because its session is being closed, counts as failed like any other."""
    try:
        return call(*arguments)
    except Exception as error:
        answer = Answer()
        answer.set_exception(error)
        return answer


def refused_acknowledgements(asked: Sequence[tuple[Sequence[Grip], Answer]]) -> Refused:
    """Wait for each request, and return the messages that were not acknowledged."""
    refused: Refused = {}
    for grips, answer in asked:
        try:
            result = answer.result(PATIENCE_S)
        except Exception as error:
            refused.setdefault(describe(error), []).extend(grip.message_id for grip in grips)
            continue
        if result.status.code == Code.OK:
            continue
        # The status of the whole may only say that results differ: each entry has its own status.
        for entry in result.entries:
            if entry.status.code not in FINE:
                refused.setdefault(describe(entry.status), []).append(entry.message_id)
        if not result.entries:
            refused.setdefault(describe(result.status), []).extend(grip.message_id for grip in grips)
    return refused


def refused_renewals(asked: Sequence[tuple[Grip, Answer]]) -> Refused:
    """Wait for each request, replace the handles of those that were granted, and return the others."""
    refused: Refused = {}
    for grip, answer in asked:
        try:
            result = answer.result(PATIENCE_S)
        except Exception as error:
            refused.setdefault(describe(error), []).append(grip.message_id)
            continue
        if result.status.code == Code.OK:
            # Only a successful answer carries a handle. The client's own call would store the empty handle of a failed answer,
            # and nothing could be done with the message afterwards.
            grip.handle = result.receipt_handle or grip.handle
            grip.received_at = monotonic()
        else:
            refused.setdefault(describe(result.status), []).append(grip.message_id)
    return refused


def tell(topic: str, refused: Refused, what: str) -> None:
    """Log what was refused, one line for each reason."""
    for reason, ids in refused.items():
        some = ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")
        log.warning(
            "%d messages of %s could not be %s (%s): %s. They come again by themselves.",
            *(len(ids), topic, what, some, reason),
        )
