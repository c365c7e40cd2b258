"""The documentation says what the code says: settings, errors, commands, tables, links, test names."""

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest

from exactly_once import errors
from exactly_once.configuration.settings import SECRET, SETTINGS
from exactly_once.database import schema
from exactly_once.database.schema import tables
from exactly_once.errors import ConfigurationError
from exactly_once.failures.states import CLOSED, OPEN, RESOLVABLE
from exactly_once.outcome import Outcome, Verdict
from exactly_once.transports.contract import Surroundings
from exactly_once.transports.registry import SCHEMES, transport_from

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md"), *ROOT.glob("examples/*/README.md")])
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def page(name: str) -> str:
    return (DOCS / name).read_text()


def rows(text: str) -> Iterator[list[str]]:
    """The cells of every row of every table; code cells without their backticks."""
    for line in text.splitlines():
        if line.startswith("|") and not set(line) <= set("|- "):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def first_names(text: str) -> list[str]:
    """What stands in backticks in the first column."""
    return [name for row in rows(text) for name in re.findall(r"`([^`]+)`", row[0])]


def blocks(text: str, language: str) -> list[str]:
    return [content for found, content in _BLOCK.findall(text) if found == language]


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


# -- reference -----------------------------------------------------------------------------------------------------------


def test_every_setting_is_documented_with_its_variable_and_default() -> None:
    found = {row[0].strip("`"): row for row in rows(page("reference/settings.md")) if len(row) == 4 and "`" in row[0]}
    assert set(found) == set(SETTINGS)
    for name, (_, default) in SETTINGS.items():
        _, variable, told, _ = found[name]
        assert variable == f"`EXACTLY_ONCE_{name.upper()}`"
        seconds = getattr(default, "total_seconds", None)
        wanted = {None: "not set", (): "none"}.get(default, f"{seconds():g}" if seconds else str(default))
        assert told == wanted, name
    for name in SECRET:
        assert f"`{name}`" in page("reference/settings.md").split("may hold a password")[0].splitlines()[-1]


def test_every_error_is_documented_with_its_parent() -> None:
    found = {row[0].strip("`"): row[1].strip("`") for row in rows(page("reference/errors.md")) if row[0] != "error"}
    assert found == {name: getattr(errors, name).__bases__[0].__name__ for name in errors.__all__}


def test_every_outcome_is_documented_with_whether_to_acknowledge() -> None:
    found = {row[0].strip("`"): row[1] for row in rows(page("reference/outcomes.md")) if row[0] != "outcome"}
    assert found == {each.name: "yes" if each.acknowledge else "no" for each in Outcome}


def test_every_column_is_documented_under_its_table() -> None:
    text = page("reference/tables.md")
    for table in tables().metadata.tables.values():
        assert f"`{table.name}`" in text
    assert _columns(text, "`message_idempotent`:") == {c.name for c in tables().idempotent.c}
    assert _columns(text, "`message_failure`:") - {"retrying", "waiting", "requeued", "dead", "broken"} - {
        "resolved",
        "discarded",
    } == {c.name for c in tables().failure.c}
    told = {row[0].strip("`"): set(re.findall(r"`([^`]+)`", row[1])) for row in rows(text) if len(row) == 2}
    for table in (tables().queue, tables().queue_group, tables().step, tables().outbox, tables().cutover):
        assert told[table.name] == {c.name for c in table.c}, table.name


def _columns(text: str, heading: str) -> set[str]:
    section = text.split(f"## {heading}")[1].split("\n## ")[0]
    return set(first_names(section))


def test_every_transport_and_its_options_are_documented() -> None:
    text = page("reference/transports.md")
    found = {
        row[0].strip("`"): set(re.findall(r"`(\w+)`", row[2])) for row in rows(text) if row[0].strip("`") in SCHEMES
    }
    assert set(found) == set(SCHEMES)
    for scheme, options in found.items():
        with pytest.raises(ConfigurationError) as refused:
            transport_from(f"{scheme}://host?nonsense=1", Surroundings())
        assert options == set(str(refused.value).split("It knows: ")[1].rstrip(".").split(", ")), scheme


# the contracts: whoever reads the code meets these words first
WORDS_IN = (
    "outcome.py",
    "claim.py",
    "guards/contract.py",
    "processing/work.py",
    "executor/executor.py",
    "transports/contract.py",
)


@pytest.mark.parametrize("module", WORDS_IN)
def test_each_public_class_of_a_contract_is_in_the_glossary(module: str) -> None:
    body = ast.parse((ROOT / "exactly_once" / module).read_text()).body
    public = {node.name for node in body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")}
    assert public, f"{module} has no public class"
    missing = public - set(re.findall(r"`(\w+)`", page("reference/glossary.md")))
    assert not missing, f"say in docs/reference/glossary.md what these of {module} are: {sorted(missing)}"


def test_the_glossary_has_each_term_once_in_the_order_of_the_alphabet() -> None:
    terms = [row[0].casefold() for row in rows(page("reference/glossary.md")) if row[0] != "term"]
    assert terms == sorted(set(terms))


# -- diagrams ------------------------------------------------------------------------------------------------------------

_ARROW = re.compile(r"^ +(\S+) --> ([^\s:]+)", re.MULTILINE)


def arrows(text: str) -> set[tuple[str, str]]:
    """From where to where, of the one state diagram of a page; `[*]` is no state but the beginning and the end."""
    [diagram] = blocks(text, "mermaid")
    assert diagram.startswith("stateDiagram-v2\n")
    lines = [line for line in diagram.splitlines()[1:] if not line.startswith("    state ")]
    found = _ARROW.findall(diagram)
    assert len(found) == len(lines), "a line is neither an arrow nor a state"
    return set(found)


def states(text: str) -> set[str]:
    return {name for arrow in arrows(text) for name in arrow} - {"[*]"}


def test_the_states_of_a_claim_are_the_statuses_of_the_schema() -> None:
    text = page("explanation/how-a-claim-works.md")
    statuses = {
        name.lower(): value
        for name, value in vars(schema).items()
        if name in schema.__all__ and isinstance(value, int) and not re.search("^STEP_|_BYTES$", name)
    }
    assert states(text) == set(statuses)
    [diagram] = blocks(text, "mermaid")
    assert {name: int(value) for name, value in re.findall(r'state "(\w+) \((\d)\)" as \1', diagram)} == statuses


def test_the_states_of_a_failure_are_those_of_the_failure_store() -> None:
    text = page("how-to/dead-letters.md")
    assert states(text) == {*OPEN, *CLOSED}
    assert {before for before, after in arrows(text) if after == "[*]"} == set(CLOSED)
    assert {before for before, after in arrows(text) if after == "resolved"} == set(RESOLVABLE)
    assert {row[0].strip("`") for row in rows(page("reference/tables.md")) if len(row) == 3} >= states(text)


def test_the_states_of_a_lease_are_those_of_its_table() -> None:
    text = page("explanation/leases.md")
    of_table = text.split("## The states of a message")[1].split("```")[0]
    named = {row[0] for row in rows(of_table) if row[0] != "state"}
    assert {state.replace("_", " ") for state in states(text)} == named - {"absent"}


def test_the_diagram_of_a_delivery_has_each_verdict() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert {before for before, after in arrows(text) if after == "[*]"} == {"settled"}
    [diagram] = blocks(text, "mermaid")
    said = set(re.findall(r"running --> \w+: (\w+)", diagram))
    assert said >= {verdict.__name__ for verdict in get_args(Verdict)}


# -- the command line ----------------------------------------------------------------------------------------------------


def commands() -> dict[str, Any]:
    """Every command by its words, as click knows it: "run", "failures list"."""
    from typer.main import get_group

    from exactly_once.cli.command import VERBS, _application

    found: dict[str, Any] = {}
    for verb in VERBS:
        command: Any = get_group(_application(verb)).commands[verb]  # type: ignore[attr-defined]
        found[verb] = command
        found |= {f"{verb} {name}": each for name, each in getattr(command, "commands", {}).items()}
    return found


def test_every_command_and_option_is_documented() -> None:
    text = page("reference/cli.md")
    for words, command in commands().items():
        verb = words.partition(" ")[0]
        assert f"\n## `{verb}`\n" in text
        section = text.split(f"\n## `{verb}`\n")[1].split("\n## ")[0]
        assert f"`{words}`" in section or words == verb, words
        for option in _options(command):
            assert f"`{option}`" in section, f"{words} {option}"


def _options(command: Any) -> set[str]:
    every = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return {option for option in every if option.startswith("-")} - {"-h", "--help"}


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_a_printed_command_exists_with_its_options(path: Path) -> None:
    known = commands()
    for line in "\n".join(blocks(path.read_text(), "sh")).splitlines():
        words = shlex.split(line, comments=True)
        if not words or words[0] != "exactly-once":
            continue
        assert words[1] in known, line
        below = getattr(known[words[1]], "commands", None) and not words[2].startswith("-")
        name = " ".join(words[1 : 3 if below else 2])
        assert name in known, line
        given = {word.partition("=")[0] for word in words[2:] if word.startswith("-") and word != "-"}
        assert given <= _options(known[name]) | {"--help", "--traceback"}, line


def test_a_printed_make_target_exists() -> None:
    targets = set(re.findall(r"^([\w/-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in PAGES:
        for target in re.findall(r"^make ([\w-]+)|`make ([\w-]+)", path.read_text(), re.MULTILINE):
            assert "".join(target) in targets, f"{ids(path)}: make {''.join(target)}"


# -- pages ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in _LINK.findall(path.read_text()):
        if "://" in target:
            continue
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), f"{target} in {ids(path)}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_python_in_the_pages_is_python(path: Path) -> None:
    for code in blocks(path.read_text(), "python"):
        # a piece of a consumer's function may return
        compile(
            "async def page():\n" + "".join(f"    {line}" for line in code.splitlines(True)), str(path), "exec"
        ) if "return " in code and "def " not in code else ast.parse(code)


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_nothing_promises_exactly_once_delivery(path: Path) -> None:
    text = re.sub(r"[*_`\s]+", " ", path.read_text())
    for found in re.finditer("exactly[- ]once delivery", text, re.IGNORECASE):
        before = text[max(0, found.start() - 60) : found.start()].lower()
        assert "nobody can promise" in before or "no such thing" in before or '"' in before[-2:], before


@pytest.mark.parametrize("path", [path for path in PAGES if path.name != "CONTRIBUTING.md"], ids=ids)
def test_a_page_has_the_fields_words_and_none_of_our_own(path: Path) -> None:
    text = _BLOCK.sub("", path.read_text())
    private = re.findall(r"\b(?:doors?|verbs?|house|corridor)\b", text, re.IGNORECASE)
    assert not private, "say entry point, command, module"


def test_every_page_of_the_documentation_is_reached_by_links() -> None:
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        path = todo.pop()
        if path in reached:
            continue
        reached.add(path)
        if path.is_dir():  # README links folders, which a forge lists
            todo += path.glob("*.md")
        elif path.suffix == ".md":
            targets = [target for target, _ in _LINK.findall(path.read_text()) if target and "://" not in target]
            todo += [(path.parent / target).resolve() for target in targets]
    assert set(DOCS.rglob("*.md")) <= reached


# what the promise table of the README names, and the paragraph that says it once more
LIMITS = {
    "asynchronous standby": "A standby takes over",
    "store's clock": "The server's clock jumps",
    "subscribe differently": "Two programs of one RocketMQ group subscribe differently",
    "calls on the raw driver object": "It calls the driver's own connection",
}
# what is marked (doctor), and words of the findings about it
SEEN_BY_DOCTOR = {
    "A standby takes over": ["no commit waits for them"],
    "The server loses what it had committed": ["is UNLOGGED", "fsync", "innodb_flush_log_at_trx_commit"],
    "Two programs of one RocketMQ group subscribe differently": ["LOSES MESSAGES"],
    "A new container without a volume": ["a message that ends its process each time is then never"],
    "It forgets, or fails over": ["appendonly", "maxmemory-policy", "a failover can lose the claims"],
    "Two distributions bring a package": ["Two distributions are installed"],
}


def _limits() -> dict[str, str]:
    return {
        title.split(" (doctor")[0].strip(): title
        for title in re.findall(r"^\*\*(.*?)\.\*\*", page("explanation/what-can-still-go-wrong.md"), re.MULTILINE)
    }


@pytest.mark.parametrize(("named", "paragraph"), LIMITS.items())
def test_a_limit_of_the_readme_has_its_paragraph(named: str, paragraph: str) -> None:
    section = (ROOT / "README.md").read_text().partition("## What is promised")[2].partition("\n## ")[0]
    assert named in " ".join(row[2].replace("*", "") for row in rows(section))
    assert [title for title in _limits() if title.startswith(paragraph)]


def test_what_is_marked_as_seen_by_doctor_is_looked_for() -> None:
    marked = [title for title, whole in _limits().items() if "(doctor" in whole]
    assert len(marked) == len(SEEN_BY_DOCTOR)
    for start, words in SEEN_BY_DOCTOR.items():
        assert [title for title in marked if title.startswith(start)], start
        for word in words:
            assert [text for text in _said_by_doctor() if word in text], word


@cache
def _said_by_doctor() -> frozenset[str]:
    """All texts of the doctor's code, and of what it asks: the installation, and each transport's concerns."""
    package = ROOT / "exactly_once"
    sources = [*(package / "doctor").glob("*.py"), package / "wording/installation.py"]
    asked = (
        [*(package / "transports").rglob("*.py")] if "concerns(" in (package / "doctor/looking.py").read_text() else []
    )
    said: set[str] = set()
    for source in (*sources, *asked):
        nodes = list(ast.walk(ast.parse(source.read_text())))
        described = {node.value for node in nodes if isinstance(node, ast.Expr)}  # docstrings say nothing to anybody
        constants = [node for node in nodes if isinstance(node, ast.Constant) and node not in described]
        said |= {node.value for node in constants if isinstance(node.value, str)}
    return frozenset(said)


def test_tests_named_in_the_rules_exist() -> None:
    defined = set()
    for path in (*(ROOT / "tests").rglob("*.py"), *(ROOT / "exactly_once/testing/conformance").glob("*.py")):
        defined |= set(re.findall(r"def (test_\w+)", path.read_text()))
    named = set(re.findall(r"`(test_\w+)`", page("explanation/rules.md") + page("explanation/what-each-crash-does.md")))
    assert named, "the rules name no tests"
    assert named <= defined, f"gone or renamed: {sorted(named - defined)}"


def test_each_crash_point_that_is_tested_is_explained() -> None:
    from tests.acceptance import crash_shop

    explained = {row[0] for row in rows(page("explanation/what-each-crash-does.md"))}
    assert set(crash_shop.POINTS) <= explained


def test_each_logger_of_the_package_is_one_that_raises_nothing() -> None:
    own = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "exactly_once").rglob("*.py")
        if "logging.getLogger(" in path.read_text()
    }
    # its own place; levels of other packages' loggers, and filters on them
    assert own == {
        "exactly_once/wording/steady_log.py",
        "exactly_once/cli/run.py",
        "exactly_once/transports/rocketmq5/wall.py",
    }


def test_the_loggers_names_are_those_of_the_page() -> None:
    # a module that moves must not take its logger's name with it: operators' settings name it
    named = {
        name
        for path in (ROOT / "exactly_once").rglob("*.py")
        for name in re.findall(r'^_?log = steady\("?(__name__|exactly_once\.[a-z]+)', path.read_text(), re.MULTILINE)
    }
    [paragraph] = [line for line in page("how-to/production.md").split("\n* ") if "The loggers' names" in line]
    told = set(re.findall(r"`(exactly_once\.[a-z]+)`", paragraph))
    assert named == told


def test_each_room_is_named_in_contributing() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    package = ROOT / "exactly_once"
    rooms = {path.stem for path in package.glob("*.py") if not path.stem.startswith("__")}
    rooms |= {path.parent.name for path in package.glob("*/__init__.py")}
    missing = {room for room in rooms if f"`{room}`" not in text}
    assert not missing, f"say in CONTRIBUTING.md what these do: {sorted(missing)}"


def test_the_facades_names_are_all_importable() -> None:
    package = import_module("exactly_once")
    for path in PAGES:
        for code in blocks(path.read_text(), "python"):
            for names in re.findall(r"^from exactly_once import ([\w, ]+)", code, re.MULTILINE):
                for name in names.split(", "):
                    assert name.strip() in package.__all__, f"{ids(path)}: {name}"


def test_the_programs_own_help_names_every_verb() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "exactly_once", "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0
    for verb in ("run", "process", "send", "handlers", "db", "failures", "doctor"):
        assert f"  {verb}" in done.stdout
