"""How long the tests are that can be short or long: short, unless the environment has EXACTLY_ONCE_TEST_FULL=1.

`make nightly` sets it, and runs what is marked `nightly`. A number between 0 and 1 is that part of the long version, where
a test can be cut to measure.
"""

import os

__all__ = ["PART", "WHOLE"]

PART = float(os.environ.get("EXACTLY_ONCE_TEST_FULL") or 0)
WHOLE = PART > 0
