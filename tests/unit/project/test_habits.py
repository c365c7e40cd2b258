"""What contributors find around the code agrees with the code: hooks, CI, the dev container, the forms, the decisions."""

import json
import re
import tomllib
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
WORKFLOW = ROOT / ".github/workflows/ci.yml"
HOOKS = ROOT / ".pre-commit-config.yaml"
DEVCONTAINER = ROOT / ".devcontainer/devcontainer.json"
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
DECISIONS = sorted((ROOT / "docs/decisions").glob("[0-9]*.md"))
HEADINGS = ["Context", "Decision", "Consequences", "What would make us change it"]
POSTGRESQL = ["14", "15", "16", "17", "18"]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = {target for line in re.findall(r"^([\w -]+):(?!=)", MAKEFILE, re.MULTILINE) for target in line.split()}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def jobs() -> dict[str, Any]:
    found: dict[str, Any] = read_yaml(WORKFLOW)["jobs"]
    return found


def devcontainer() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DEVCONTAINER.read_text())
    return found


def pythons() -> list[str]:
    """The versions that the classifiers name."""
    start = "Programming Language :: Python :: "
    return [each.removeprefix(start) for each in PROJECT["project"]["classifiers"] if each.startswith(f"{start}3.")]


def commands(path: Path) -> list[str]:
    """What a file has a shell run."""
    if path == WORKFLOW:
        return [step["run"] for job in jobs().values() for step in job["steps"] if "run" in step]
    if path == HOOKS:
        return [hook["entry"] for repo in read_yaml(HOOKS)["repos"] for hook in repo["hooks"] if "entry" in hook]
    return [each for name, each in devcontainer().items() if name.endswith("Command")]


# -- make, and what it stands on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [WORKFLOW, HOOKS, DEVCONTAINER], ids=_name)
def test_what_make_is_asked_for_is_a_target(path: Path) -> None:
    asked = set()
    for command in commands(path):
        for words in re.findall(r"(?:^|&& )make ([^&\n]*)", command, re.MULTILINE):
            plain = re.sub(r"""\w+=("[^"]*"|'[^']*'|\S*)""", "", words)
            asked |= {word for word in plain.split() if not word.startswith("-")}
    assert asked, f"{_name(path)} asks make for nothing"
    assert asked <= TARGETS


def test_the_dev_container_installs_what_ci_installs() -> None:
    needed = re.findall(r"^ +need \S+ ([\w.-]+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert len(needed) >= 10
    install = devcontainer()["onCreateCommand"].partition("apt-get install ")[2]
    options, *rest = re.split(r"Dpkg::Options\S+ ", install)
    packages = (rest[-1] if rest else options).split()
    assert sorted(packages) == sorted(needed)


def test_the_dev_container_has_a_python_that_is_supported_and_a_debian() -> None:
    image = re.fullmatch(r"python:(3\.\d+)-(bookworm|trixie)", devcontainer()["image"])
    assert image
    assert image[1] in pythons()


def test_hooks_are_local_and_take_ruff_from_the_environment_of_the_project() -> None:
    for repo in read_yaml(HOOKS)["repos"]:
        assert repo["repo"] == "local"
        for hook in repo["hooks"]:
            assert hook["language"] == "system"
            assert hook["pass_filenames"] is False


def test_editors_are_told_what_ruff_checks() -> None:
    told = ConfigParser()
    told.read_string("[top]\n" + (ROOT / ".editorconfig").read_text())
    assert told["top"]["root"] == "true"
    assert told["*.py"]["max_line_length"] == str(PROJECT["tool"]["ruff"]["line-length"])
    assert told["Makefile"]["indent_style"] == "tab"


# -- hosted CI -----------------------------------------------------------------------------------------------------------


def test_ci_runs_each_python_that_the_project_names_and_no_other() -> None:
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert pythons() == sorted(pythons(), key=lambda version: int(version.partition(".")[2]))
    assert pythons()[0] == oldest
    assert jobs()["unit"]["strategy"]["matrix"]["python"] == pythons()
    met = [each["python"] for each in jobs()["integration"]["strategy"]["matrix"]["include"]]
    assert set(met) == set(pythons())


def test_ci_runs_each_postgresql_once() -> None:
    include = jobs()["integration"]["strategy"]["matrix"]["include"]
    assert [each["postgresql"] for each in include] == POSTGRESQL


def test_ci_has_few_rights_ends_and_keeps_its_results() -> None:
    workflow = read_yaml(WORKFLOW)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    for name, job in jobs().items():
        assert 0 < job["timeout-minutes"] <= 240, name
        assert "permissions" not in job, name
        checkout, *steps = job["steps"]
        assert checkout["uses"].startswith("actions/checkout@"), name
        assert checkout["with"] == {"persist-credentials": False}, name
        if any("make " in step.get("run", "") for step in steps):
            *_, upload = steps
            assert upload["uses"].startswith("actions/upload-artifact@"), name
            assert upload["if"] == "${{ !cancelled() }}", name
            assert upload["with"]["path"] == "build/junit/*.xml", name


def test_ci_names_only_what_its_matrix_has() -> None:
    for name, job in jobs().items():
        matrix = job.get("strategy", {}).get("matrix", {})
        known = set(matrix) - {"include"} | {key for each in matrix.get("include", []) for key in each}
        assert set(re.findall(r"matrix\.(\w+)", json.dumps(job))) == known, name


def test_no_text_of_an_event_gets_into_a_shell() -> None:
    assert not [command for command in commands(WORKFLOW) if "${{" in command]


# -- forms ---------------------------------------------------------------------------------------------------------------


def test_the_chooser_offers_the_forms_alone() -> None:
    assert read_yaml(ROOT / ".github/ISSUE_TEMPLATE/config.yml") == {"blank_issues_enabled": False}
    assert [path.stem for path in FORMS] == ["bug_report", "config", "feature_request"]


@pytest.mark.parametrize("path", [path for path in FORMS if path.stem != "config"], ids=_name)
def test_a_form_is_one_that_the_platform_takes(path: Path) -> None:
    form = read_yaml(path)
    assert {"name", "description", "body"} <= set(form)
    asked = [element for element in form["body"] if element["type"] != "markdown"]
    ids = [element["id"] for element in asked]
    assert len(ids) == len(set(ids)) > 0
    for element in form["body"]:
        assert element["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        attributes = element["attributes"]
        assert attributes["value" if element["type"] == "markdown" else "label"].strip()
        if element["type"] == "dropdown":
            assert all(isinstance(option, str) for option in attributes["options"])
            assert len(set(attributes["options"])) == len(attributes["options"])


def test_the_bug_report_asks_for_each_outcome_and_transport() -> None:
    from exactly_once.outcome import Outcome
    from exactly_once.transports.registry import SCHEMES

    form = {element.get("id"): element["attributes"] for element in read_yaml(FORMS[0])["body"]}
    assert {each.name for each in Outcome} <= set(form["outcome"]["options"])
    assert {f"{scheme}://" for scheme in SCHEMES} <= set(form["transport"]["options"])


# -- decisions, and the pages beside them --------------------------------------------------------------------------------


def defined_tests() -> Iterator[str]:
    for path in (*(ROOT / "tests").rglob("*.py"), *(ROOT / "exactly_once/testing/conformance").glob("*.py")):
        yield from re.findall(r"def (test_\w+)", path.read_text())


def test_decisions_are_numbered_without_a_gap_and_all_in_the_index() -> None:
    assert [int(path.name[:4]) for path in DECISIONS] == list(range(1, len(DECISIONS) + 1))
    index = (ROOT / "docs/decisions/README.md").read_text()
    listed = re.findall(r"^\| \[(\d{4})\]\((\S+)\) \|", index, re.MULTILINE)
    assert listed == [(path.name[:4], path.name) for path in DECISIONS]


@pytest.mark.parametrize("path", DECISIONS, ids=_name)
def test_a_decision_is_one_page_with_its_number_and_its_headings(path: Path) -> None:
    text = path.read_text()
    assert re.fullmatch(rf"# {path.name[:4]}: \S.*", text.splitlines()[0])
    assert text.splitlines()[2].startswith("Status: ")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == HEADINGS
    consequences = text.partition("## Consequences\n")[2].partition("\n## ")[0]
    assert re.findall(r"^(\w+):$", consequences, re.MULTILINE) == ["Good", "Bad"]
    assert 20 <= len(text.splitlines()) <= 45


def test_tests_and_files_that_decisions_name_exist() -> None:
    text = "\n".join(path.read_text() for path in DECISIONS)
    named = set(re.findall(r"`(test_\w+)`", text))
    assert named
    assert named <= set(defined_tests())
    for file in re.findall(r"`((?:tests|exactly_once|docs)/\S+)`", text):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("name", ["SECURITY.md", ".github/pull_request_template.md"])
def test_a_page_outside_the_documentation_names_what_is_there(name: str) -> None:
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert "://" in target or (ROOT / target).exists(), target
    for target in re.findall(r"`make ([\w-]+)", text):
        assert target in TARGETS, target
