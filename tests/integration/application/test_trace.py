"""CONTRIBUTING names each file that one delivery goes through, and no other."""

import re
from pathlib import Path

from benchmarks.trace import TRIPS, travel

PAGE = Path(__file__).parents[3] / "CONTRIBUTING.md"


def test_the_files_of_one_delivery_are_those_of_the_page(tmp_path: Path) -> None:
    _, _, section = PAGE.read_text().partition("### One delivery, file by file")
    section, _, _ = section.partition("\nEach module opens")
    # backticked names but the commands; `keys` is a file at the top
    named = {name for name in re.findall(r"`([a-z_0-9/]+)`", section) if "/" in name or name == "keys"}
    way = travel(*TRIPS["one message, sync"], tmp_path)
    assert set(way.files) == named
    assert way.changes
