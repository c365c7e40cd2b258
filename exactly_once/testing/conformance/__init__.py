"""What every transport and every store of leases must do, as tests for your own: subclass a suite, and give it a fixture.

    from exactly_once.testing.conformance import Conformance, Harness

    class TestMyBroker(Conformance):
        @pytest.fixture
        def harness(self) -> Harness:
            return MyHarness()

`transport` holds the suites of a transport, `leases` that of a store of leases. They need pytest, and nothing else does.
The page docs/how-to/own-transport.md says how one is written and what a skipped test means.
"""

try:
    import pytest
except ImportError as error:
    raise ImportError(
        "exactly_once.testing.conformance holds tests of pytest, which is not installed. Type: pip install pytest"
    ) from error

# before they are imported: else a failed assertion there says no values
pytest.register_assert_rewrite(f"{__name__}.transport", f"{__name__}.leases")

from exactly_once.testing.conformance.leases import LeaseConformance  # noqa: E402
from exactly_once.testing.conformance.transport import (  # noqa: E402
    Conformance,
    Harness,
    Listening,
    ServedHarness,
    ServerConformance,
    TopicConformance,
    numbered,
    producing,
    send,
)

__all__ = [
    "Conformance",
    "Harness",
    "LeaseConformance",
    "Listening",
    "ServedHarness",
    "ServerConformance",
    "TopicConformance",
    "numbered",
    "producing",
    "send",
]
