"""CONTRIBUTING names each file that one delivery goes through, and no other."""

import ast
import re
from pathlib import Path

from benchmarks.trace import TRIPS, travel

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "CONTRIBUTING.md"


def test_the_files_of_one_delivery_are_those_of_the_page(tmp_path: Path) -> None:
    _, _, section = PAGE.read_text().partition("### One delivery, file by file")
    section, _, _ = section.partition("\nEach module opens")
    # backticked names but the commands; `keys` is a file at the top
    named = {name for name in re.findall(r"`([a-z_0-9/]+)`", section) if "/" in name or name == "keys"}
    way = travel(*TRIPS["one message, sync"], tmp_path)
    assert set(way.files) == named
    assert way.changes


def test_what_the_page_names_on_the_way_of_one_message_exists() -> None:
    _, _, way = PAGE.read_text().partition("### The way of one message")
    way, _, _ = way.partition("\nAll else is")
    methods = {
        f"{each.name}.{member.name}"
        for file in (ROOT / "exactly_once").rglob("*.py")
        for each in ast.walk(ast.parse(file.read_text()))
        if isinstance(each, ast.ClassDef)
        for member in each.body
        if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    named = set(re.findall(r"`([A-Z]\w+\.\w+)`", way))
    assert len(named) > 20
    assert named <= methods
