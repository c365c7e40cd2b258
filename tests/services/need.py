"""Says what a test needs that this machine may not have: without it the test is skipped, on CI it fails.

A CI that skips what it was built for proves nothing; a laptop without Java should still run everything else.
"""

import os
from types import ModuleType

import pytest

__all__ = ["need", "require"]


def require(service: ModuleType) -> None:
    """Skip the test with `service.missing()`'s reason, or fail it where the environment has CI=true."""
    need(service.missing())


def need(reason: str | None) -> None:
    """Skip the test because of `reason`, or fail it where the environment has CI=true; go on when it is None."""
    if reason is None:
        return
    if os.environ.get("CI", "").lower() in ("true", "1"):
        pytest.fail(f"CI must have everything, but {reason}", pytrace=False)
    pytest.skip(reason)
