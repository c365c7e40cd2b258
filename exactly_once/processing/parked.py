"""In the place of a handler, for a message that cannot be given to it: could not be routed, or could not be read."""

from exactly_once.errors import ExactlyOnceError
from exactly_once.outcome import Result
from exactly_once.processing.processor import Processor
from exactly_once.processing.work import Work

__all__ = ["ParkingProcessor"]


class ParkingProcessor(Processor):
    """Parks each message with this error. Never runs the handler.

    Args:
        inner: The handler's own.
        error: What the failure store says of the message.
    """

    def __init__(self, inner: Processor, error: ExactlyOnceError) -> None:
        super().__init__(inner.plan, inner.store, inner.group, leases=inner.leases, alert=inner.alert)
        self._error = error

    def process(self, work: Work) -> Result:
        """See `Processor.process`."""
        return self.recording.failed(work, self._error)
