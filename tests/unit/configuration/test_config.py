"""Settings: which value holds, where it came from, and that secrets are not printed."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import make_url

from exactly_once.configuration import config as config_module
from exactly_once.configuration import settings_file
from exactly_once.configuration.config import Config, load, redacted
from exactly_once.database.url import database_url
from exactly_once.errors import ConfigurationError
from exactly_once.handlers.plan import Plan, plan
from exactly_once.handlers.retry import Retry
from exactly_once.message import Message


def project(folder: Path, text: str, name: str = "pyproject.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def read(folder: Path, environ: dict[str, str] | None = None, **more: Any) -> Config:
    return load(environ=environ or {}, directory=folder, **more)


def refused(folder: Path, environ: dict[str, str] | None = None, **more: Any) -> str:
    with pytest.raises(ConfigurationError) as error:
        read(folder, environ, **more)
    return str(error.value)


def test_without_anything_there_are_defaults(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert (config.database.value, config.group.value, config.imports.value) == (None, None, ())
    assert (config.concurrency.value, config.drain_timeout.value) == (16, timedelta(seconds=25))
    assert config.concurrency.source == "default"


def test_the_environment_wins_over_the_file_and_the_file_over_code(tmp_path: Path) -> None:
    path = project(tmp_path, '[tool.exactly_once]\ngroup = "file"\nschema = "file"\n')
    config = read(
        tmp_path, {"EXACTLY_ONCE_GROUP": "env"}, code={"group": "code", "schema": "code", "transport": "sql://"}
    )
    assert (config.group.value, config.group.source) == ("env", "environment EXACTLY_ONCE_GROUP")
    assert (config.schema.value, config.schema.source) == ("file", f"file {path}, schema")
    assert (config.transport.value, config.transport.source) == ("sql://", "code")


def test_every_setting_can_come_from_the_environment(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        {
            "EXACTLY_ONCE_DATABASE": "postgresql+psycopg://u:p@h/d",
            "EXACTLY_ONCE_ASYNC_DATABASE": "postgresql+psycopg_async://u:p@h/d",
            "EXACTLY_ONCE_TRANSPORT": "rocketmq://h:8081",
            "EXACTLY_ONCE_REDIS": "redis://:p@h/0",
            "EXACTLY_ONCE_GROUP": "g",
            "EXACTLY_ONCE_SCHEMA": "s",
            "EXACTLY_ONCE_IMPORTS": "shop.consumers, shop.more",
            "EXACTLY_ONCE_CONCURRENCY": "8",
            "EXACTLY_ONCE_PROCESSES": "2",
            "EXACTLY_ONCE_DRAIN_TIMEOUT_S": "2.5",
            "EXACTLY_ONCE_HEALTH": "127.0.0.1:8000",
            "EXACTLY_ONCE_TEST_DATABASE": "is another room's",
            "OTHER": "x",
        },
    )
    assert config.imports.value == ("shop.consumers", "shop.more")
    assert (config.concurrency.value, config.processes.value) == (8, 2)
    assert config.drain_timeout.value == timedelta(seconds=2.5)
    assert config.health.value == "127.0.0.1:8000"
    assert (config.redis.value, config.redis.shown) == ("redis://:p@h/0", "redis://:***@h/0")


def test_an_empty_variable_is_not_set(tmp_path: Path) -> None:
    assert read(tmp_path, {"EXACTLY_ONCE_GROUP": ""}).group.source == "default"


def test_secrets_may_stand_in_files(tmp_path: Path) -> None:
    secret = project(tmp_path, "postgresql://u:p@h/d\n", "secret")
    config = read(tmp_path, {"EXACTLY_ONCE_DATABASE_FILE": str(secret)})
    assert config.database.value == "postgresql://u:p@h/d"
    assert config.database.source == "environment EXACTLY_ONCE_DATABASE_FILE"
    project(tmp_path, '[tool.exactly_once]\ntransport_file = "secret"\n')
    assert read(tmp_path).transport.value == "postgresql://u:p@h/d"


def test_a_redis_may_stand_in_a_file_and_what_is_none_is_refused_without_its_password(tmp_path: Path) -> None:
    secret = project(tmp_path, "redis://:hunter2@h:6379/0\n", "secret")
    config = read(tmp_path, {"EXACTLY_ONCE_REDIS_FILE": str(secret)}, code={"redis": "redis://other"})
    assert config.redis.value == "redis://:hunter2@h:6379/0"
    assert config.redis.source == "environment EXACTLY_ONCE_REDIS_FILE"
    for wrong in ("http://:hunter2@h", "redis://hunter2@h", "redis://:hunter2@h/orders"):
        told = refused(tmp_path, {"EXACTLY_ONCE_REDIS": wrong})
        assert told.startswith("environment EXACTLY_ONCE_REDIS: ")
        assert "hunter2" not in told
    assert "redis= in the program" in refused(tmp_path, code={"redis": 6379})


def test_a_secret_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path, {"EXACTLY_ONCE_DATABASE_FILE": str(tmp_path / "none")})
    assert "cannot be read" in refused(tmp_path, {"EXACTLY_ONCE_DATABASE_FILE": str(tmp_path)})


def test_a_value_and_a_file_for_the_same_setting_is_an_error(tmp_path: Path) -> None:
    text = refused(tmp_path, {"EXACTLY_ONCE_DATABASE": "a://", "EXACTLY_ONCE_DATABASE_FILE": "b"})
    assert "EXACTLY_ONCE_DATABASE and environment EXACTLY_ONCE_DATABASE_FILE both set the database" in text


@pytest.mark.parametrize(
    ("environ", "toml", "told"),
    [
        ({"EXACTLY_ONCE_DATABSE": "x"}, "", "EXACTLY_ONCE_DATABASE"),
        ({"EXACTLY_ONCE_GROUP_FILE": "x"}, "", "EXACTLY_ONCE_GROUP"),
        ({}, 'gruop = "x"', "'group'"),
        ({}, "drain_timeout = 5", "'drain_timeout_s'"),
        ({}, 'handler.reserve.topic = "x"', "'handlers'"),
        ({}, 'Handlers.reserve.topic = "x"', "'handlers'"),
        ({}, 'handlers.reserve.topik = "x"', "'topic'"),
        ({}, "handlers.reserve.retry.delay = [1]", "'delays'"),
    ],
)
def test_an_unknown_name_is_an_error_that_names_what_is_close(
    tmp_path: Path, environ: dict[str, str], toml: str, told: str
) -> None:
    project(tmp_path, f"[tool.exactly_once]\n{toml}\n")
    text = refused(tmp_path, environ)
    assert "Did you mean" in text
    assert told in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("concurrency", "0"),
        ("concurrency", "-1"),
        ("concurrency", "1.5"),
        ("concurrency", "many"),
        ("concurrency", "²"),
        ("drain_timeout_s", "nan"),
        ("drain_timeout_s", "-1"),
        ("drain_timeout_s", "soon"),
        ("group", "x" * 65),
        ("group", " "),
        ("imports", "a,,b"),
        ("database", "{broken"),
        ("pooler", "pgbouncer"),
        ("database", "{}"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_its_source(tmp_path: Path, name: str, value: str) -> None:
    assert f"EXACTLY_ONCE_{name.upper()}" in refused(tmp_path, {f"EXACTLY_ONCE_{name.upper()}": value})


@pytest.mark.parametrize(
    "toml",
    [
        "concurrency = true",
        "concurrency = 1.5",
        "group = 5",
        "imports = 5",
        "pooler = 5",
        "database = 5",
        "handlers = 5",
    ],
)
def test_a_wrong_value_in_the_file_is_an_error(tmp_path: Path, toml: str) -> None:
    path = project(tmp_path, f"[tool.exactly_once]\n{toml}\n")
    assert str(path) in refused(tmp_path)


def test_a_wrong_secret_is_not_repeated(tmp_path: Path) -> None:
    assert "hunter2" not in refused(tmp_path, {"EXACTLY_ONCE_DATABASE": '{"eu": "postgresql://u:hunter2@h"'})


def test_several_databases_have_names(tmp_path: Path) -> None:
    project(tmp_path, '[tool.exactly_once.database]\neu = "postgresql://u:p@eu/d"\nus = "postgresql://u:p@us/d"\n')
    config = read(tmp_path)
    assert list(config.database.value) == ["eu", "us"]
    assert config.database.shown == "eu=postgresql://u:***@eu/d, us=postgresql://u:***@us/d"
    assert read(tmp_path, {"EXACTLY_ONCE_DATABASE": '{"eu": "sqlite://"}'}).database.value == {"eu": "sqlite://"}


def test_an_engine_from_code_passes_as_it_is(tmp_path: Path) -> None:
    engine = object()
    assert read(tmp_path, code={"database": engine}).database.value is engine


def test_the_nearest_pyproject_is_read_from_a_folder_below(tmp_path: Path) -> None:
    project(tmp_path, '[tool.exactly_once]\ngroup = "above"\n')
    below = tmp_path / "src" / "shop"
    below.mkdir(parents=True)
    assert read(below).group.value == "above"


def test_a_named_file_needs_no_table_and_wins_over_pyproject(tmp_path: Path) -> None:
    project(tmp_path, '[tool.exactly_once]\ngroup = "pyproject"\n')
    bare = project(tmp_path, 'group = "bare"\n', "bare.toml")
    full = project(tmp_path, '[tool.exactly_once]\ngroup = "full"\n', "full.toml")
    assert read(tmp_path, config=bare).group.value == "bare"
    assert read(tmp_path, {"EXACTLY_ONCE_CONFIG": str(full)}).group.value == "full"
    assert read(tmp_path, {"EXACTLY_ONCE_CONFIG": str(full)}, config=bare).group.value == "bare"


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path, {"EXACTLY_ONCE_CONFIG": str(tmp_path / "none.toml")})
    project(tmp_path, "[tool.exactly_once\n")
    assert "pyproject.toml" in refused(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "EXACTLY_ONCE_GROUP=inventory\n",
        'EXACTLY_ONCE_GROUP="inventory"\n',
        "# shop\nexport A=b\n",
        'DATABASE_URL="x"\nB=c\n',
    ],
)
def test_a_file_of_variables_in_place_of_toml_is_told_to_be_one(tmp_path: Path, text: str) -> None:
    path = project(tmp_path, text, ".env")
    assert refused(tmp_path, {"EXACTLY_ONCE_CONFIG": str(path)}) == (
        f"the settings file {path} has lines NAME=value, which belong into the environment: set -a; . {path}; set +a. What"
        ' EXACTLY_ONCE_CONFIG names is read as TOML, with lines such as group = "inventory"'
    )


def test_a_damaged_toml_is_still_told_as_that(tmp_path: Path) -> None:
    path = project(tmp_path, 'group = "inventory\n', "shop.toml")
    assert "cannot be read: " in refused(tmp_path, {"EXACTLY_ONCE_CONFIG": str(path)})


@pytest.mark.parametrize("quote", ['"', "'"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE", "sqlite:///shop.db"),
        ("REDIS", "redis://h"),
        ("TRANSPORT", "sql://"),
        ("GROUP", "inventory"),
        ("PROCESSES", "2"),
    ],
)
def test_a_value_in_quotation_marks_says_that_they_are_part_of_it(
    tmp_path: Path, name: str, value: str, quote: str
) -> None:
    assert refused(tmp_path, {f"EXACTLY_ONCE_{name}": f"{quote}{value}{quote}"}) == (
        f"environment EXACTLY_ONCE_{name}: it begins and ends with a quotation mark, which is part of the value here (an"
        " --env-file of Docker's, a secret's file, TOML with quotes in quotes). Leave both out."
    )


def test_a_value_in_quotation_marks_in_a_secrets_file_says_so_too(tmp_path: Path) -> None:
    (tmp_path / "url").write_text('"sqlite:///shop.db"\n')
    text = refused(tmp_path, {"EXACTLY_ONCE_DATABASE_FILE": str(tmp_path / "url")})
    assert "EXACTLY_ONCE_DATABASE_FILE: it begins and ends with a quotation mark" in text


def test_a_pyproject_of_another_program_is_no_error(tmp_path: Path) -> None:
    project(tmp_path, '[tool.other]\ngroup = "x"\n')
    assert read(tmp_path).group.value is None


LINKS = {
    "EXACTLY_ONCE_SERVICE_HOST": "10.0.0.11",
    "EXACTLY_ONCE_SERVICE_PORT": "80",
    "EXACTLY_ONCE_SERVICE_PORT_HEALTH_CHECK": "8080",
    "EXACTLY_ONCE_PORT": "tcp://10.0.0.11:80",
    "EXACTLY_ONCE_PORT_80_TCP": "tcp://10.0.0.11:80",
    "EXACTLY_ONCE_PORT_80_TCP_PROTO": "tcp",
    "EXACTLY_ONCE_PORT_80_TCP_PORT": "80",
    "EXACTLY_ONCE_PORT_80_TCP_ADDR": "10.0.0.11",
    "EXACTLY_ONCE_PORT_53_UDP": "udp://[fd00::11]:53",
    # of a Service named exactly-once-redis
    "EXACTLY_ONCE_REDIS_SERVICE_HOST": "fd00::12",
    "EXACTLY_ONCE_REDIS_SERVICE_PORT": "6379",
    "EXACTLY_ONCE_REDIS_PORT": "tcp://[fd00::12]:6379",
    "EXACTLY_ONCE_REDIS_PORT_6379_TCP_ADDR": "fd00::12",
}


def test_what_kubernetes_says_of_a_service_of_our_name_is_left_out_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config_module._say_ignored.cache_clear()
    config = read(tmp_path, LINKS | {"EXACTLY_ONCE_GROUP": "g"})
    read(tmp_path, LINKS)
    assert config.group.value == "g"
    assert (config.redis.value, config.health.value) == (None, None)
    (line,) = caplog.messages
    assert line.startswith(
        "settings: EXACTLY_ONCE_PORT, EXACTLY_ONCE_PORT_53_UDP, EXACTLY_ONCE_PORT_80_TCP and 10 more"
    )
    assert "Kubernetes" in line


@pytest.mark.parametrize(
    "wrong",
    [
        {"EXACTLY_ONCE_PORT": "8080"},
        {"EXACTLY_ONCE_PORT": "http://10.0.0.11:80"},
        {"EXACTLY_ONCE_HEALTH_HOST": "10.0.0.11"},
        {"EXACTLY_ONCE_PORT_80": "80"},
    ],
)
def test_what_a_person_wrote_is_still_an_error(tmp_path: Path, wrong: dict[str, str]) -> None:
    assert f"there is no setting '{next(iter(wrong))}'" in refused(tmp_path, LINKS | wrong)


@pytest.fixture
def another_users(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], int]:
    """Gives a file to another user; where only root may, who runs the program becomes another one."""

    def give(path: Path) -> int:
        if os.geteuid() == 0:
            os.chown(path, 4711, -1)
        else:
            me = os.geteuid()
            monkeypatch.setattr(os, "geteuid", lambda: me + 1)
        return path.stat().st_uid

    return give


@pytest.mark.parametrize("below", ["", "job/of/mine"])
def test_a_pyproject_of_another_user_that_was_found_is_refused(
    tmp_path: Path, below: str, another_users: Callable[[Path], int]
) -> None:
    tmp_path.chmod(0o1777)  # as /tmp is
    path = project(tmp_path, '[tool.exactly_once]\nimports = ["evil"]\ngroup = "theirs"\n')
    owner = another_users(path)
    folder = tmp_path / below
    folder.mkdir(parents=True, exist_ok=True)
    said = refused(folder, code={"group": "mine"})
    assert f"{path} belongs to another user (uid {owner};" in said
    assert f"EXACTLY_ONCE_CONFIG={path}" in said
    assert read(folder, {"EXACTLY_ONCE_CONFIG": str(path)}).group.value == "theirs"


def test_a_pyproject_of_another_user_that_says_nothing_to_us_is_no_error(
    tmp_path: Path, another_users: Callable[[Path], int]
) -> None:
    another_users(project(tmp_path, '[tool.other]\ngroup = "x"\n'))
    assert read(tmp_path, code={"group": "mine"}).group.value == "mine"


only_root_gives = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@only_root_gives
def test_a_link_of_another_user_to_a_pyproject_of_mine_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    mine = project(tmp_path / "mine", '[tool.exactly_once]\ngroup = "prod"\n')
    link = tmp_path / "pyproject.toml"
    tmp_path.chmod(0o1777)
    link.symlink_to(mine)
    assert read(tmp_path).group.value == "prod"
    os.lchown(link, 4711, -1)
    said = refused(tmp_path)
    assert f"The link to the settings file, {link}, belongs to another user (uid 4711;" in said
    assert f"EXACTLY_ONCE_CONFIG={link}" in said


@only_root_gives
def test_a_pyproject_of_mine_in_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    path = project(tmp_path, '[tool.exactly_once]\ngroup = "prod"\n')
    os.chown(tmp_path, 4711, -1)
    assert f"The folder of the settings file {path} belongs to another user (uid 4711;" in refused(tmp_path)
    path.write_text('[tool.other]\ngroup = "x"\n')
    assert read(tmp_path, code={"group": "mine"}).group.value == "mine"


@pytest.mark.parametrize("broken", ["[tool.exactly_once\n", "[tool]\nexactly_once = 5\n"])
def test_a_broken_pyproject_of_another_user_is_told_as_theirs(
    tmp_path: Path, broken: str, another_users: Callable[[Path], int]
) -> None:
    path = project(tmp_path, broken)
    assert "another user" not in refused(tmp_path)
    owner = another_users(path)
    said = refused(tmp_path)
    assert f"{path} belongs to another user (uid {owner};" in said
    assert "EXACTLY_ONCE_CONFIG=FILE" in said


def test_a_pyproject_that_is_changed_for_another_one_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = project(tmp_path, '[tool.exactly_once]\ngroup = "theirs"\n')
    opened = settings_file._toml

    def change(found: Path) -> Any:
        content = opened(found)
        (tmp_path / "other").write_text("")
        (tmp_path / "other").rename(path)
        return content

    monkeypatch.setattr(settings_file, "_toml", change)
    assert "was replaced while it was read" in refused(tmp_path)


@pytest.mark.parametrize(
    ("owner", "me", "sudo", "trusted"),
    [
        (1000, 1000, None, True),
        (0, 1000, None, True),  # installed by root, as images are
        (1001, 1000, None, False),
        (1001, 0, None, False),
        (1001, 0, "1001", True),
        (1001, 0, "1000", False),
        (1001, 1000, "1001", False),  # the variable of an ordinary user proves nothing
    ],
)
def test_whose_settings_are_believed(
    monkeypatch: pytest.MonkeyPatch, owner: int, me: int, sudo: str | None, trusted: bool
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: me)
    monkeypatch.delenv("SUDO_UID", raising=False)
    if sudo is not None:
        monkeypatch.setenv("SUDO_UID", sudo)
    assert settings_file._is_trusted(owner) is trusted


def reserve(message: Message) -> None: ...


PLAN: Plan = plan(reserve, topic="orders", tag="created", key="no")


def test_the_file_moves_handlers(tmp_path: Path) -> None:
    project(
        tmp_path,
        "[tool.exactly_once.handlers.reserve]\n"
        'topic = "orders-eu"\ntag = ["a", "b"]\nconcurrency = 3\n'
        "retry = { immediate = 0, delays = [1, 5.5], max_attempts = 4 }\n",
    )
    (moved,) = read(tmp_path).applied([PLAN])
    assert (moved.topic, moved.tags, moved.concurrency) == ("orders-eu", ("a", "b"), 3)
    assert moved.retry == Retry(immediate=0, delays=[1, 5.5], max_attempts=4)
    assert moved.key is PLAN.key


def test_handlers_that_the_file_does_not_name_stay(tmp_path: Path) -> None:
    assert read(tmp_path).applied([PLAN]) == (PLAN,)


@pytest.mark.parametrize(
    ("toml", "told"),
    [
        ('[tool.exactly_once.handlers.resreve]\ntopic = "x"', "Did you mean 'reserve'?"),
        ("[tool.exactly_once.handlers.reserve]\ntopic = 5", "'reserve'"),
        ('[tool.exactly_once.handlers.reserve]\ntag = ""', "tag"),
        ("[tool.exactly_once.handlers.reserve]\nconcurrency = 0", "concurrency"),
        ("[tool.exactly_once.handlers.reserve]\nretry = { delays = [-1] }", "delays"),
    ],
)
def test_a_wrong_setting_of_a_handler_is_an_error(tmp_path: Path, toml: str, told: str) -> None:
    project(tmp_path, toml)
    with pytest.raises(ConfigurationError) as error:
        read(tmp_path).applied([PLAN])
    assert told in str(error.value)


# -- redaction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "printed"),
    [
        ("postgresql+psycopg://me:pw@h:5432/d", "postgresql+psycopg://me:***@h:5432/d"),
        ("postgresql://me@h/d", "postgresql://me@h/d"),
        ("postgresql://h/d", "postgresql://h/d"),
        ("postgresql:///d?user=me&sslkey=/k", "postgresql:///d?user=me&sslkey=/k"),
        ("postgresql:///d?user=me&password=p&w=x&sslkey=/k", "postgresql:///d?user=me&password=***"),
        ("postgresql://:pw@h/d", "postgresql://:***@h/d"),
        ("postgresql://me:p@w@h/d", "postgresql://me:***@h/d"),
        ("postgresql://me:p/w@h/d", "postgresql://me:***@h/d"),
        ("postgresql://me:p?w@h/d", "postgresql://me:***@h/d"),
        ("postgresql://me:1?w@h/d", "postgresql://me:***@h/d"),
        ("postgresql://me:p@x?w@h/d", "postgresql://me:***@h/d"),
        ("postgresql://me:p#w@h/d", "postgresql://me:***@h/d"),
        ("sqlite:////home/me@work/x.db", "sqlite:////home/me@work/x.db"),
        ("sqlite://", "sqlite://"),
        ("rocketmq4://ns1:9876,ns2:9876?namespace=eu", "rocketmq4://ns1:9876,ns2:9876?namespace=eu"),
        ("rocketmq://ak:sk@h1:8081,h2:8081/x?a=b%40c", "rocketmq://ak:***@h1:8081,h2:8081/x?a=b%40c"),
        (
            "rocketmq://h:8081?access_key=a&secret_key=b&group=g",
            "rocketmq://h:8081?access_key=***",
        ),
        ("rocketmq://h?group=g&secret_key=b&c=d", "rocketmq://h?group=g&secret_key=***"),
        ("postgresql:///d?%70assword=pw", "postgresql:///d?%70assword=***"),
        ("rocketmq://h?owner=me@example.org&token=x", "rocketmq://h?owner=me@example.org&token=***"),
        ("rocketmq://[::1]:8081?owner=me%40example.org", "rocketmq://[::1]:8081?owner=me%40example.org"),
        ("memory://test", "memory://test"),
        ("not a url", "not a url"),
    ],
)
def test_a_url_is_printed_without_its_secrets(url: str, printed: str) -> None:
    assert redacted(url) == printed


@given(st.text(st.sampled_from("aB1@:/?#,%&=. "), min_size=1, max_size=12))
def test_no_password_is_ever_printed_whatever_it_holds(noise: str) -> None:
    password = f"XX{noise}YY"
    printed = redacted(f"postgresql://user:{password}@host.example/db?sslmode=require")
    assert "XX" not in printed
    assert "YY" not in printed


@given(st.text(max_size=20), st.text(max_size=20))
def test_what_sqlalchemy_hides_we_hide_too(user: str, password: str) -> None:
    url = make_url("postgresql://h/d").set(username=user, password=password)
    printed = redacted(url.render_as_string(hide_password=False))
    if user or password:
        assert make_url(printed).password in (None, "***", "")
    assert make_url(printed).host == "h"


def test_a_database_url_in_quotation_marks_says_so_without_settings_too() -> None:
    with pytest.raises(ConfigurationError, match=r"^The database URL begins with a quotation mark"):
        database_url('"sqlite:///shop.db"')
