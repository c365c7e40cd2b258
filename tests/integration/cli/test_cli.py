"""The real command, as a child process, against a real database: what it does, says and exits with."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from sqlalchemy import URL, create_engine, text

from tests.waiting import until

ROOT = Path(__file__).parents[3]

SHOP = """
import os
from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from exactly_once import ExactlyOnce, Message, Reject, Retry


eo = ExactlyOnce(group="cli")

class Base(DeclarativeBase):
    pass

class Reservation(Base):
    __tablename__ = "cli_reservation"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_no: Mapped[str] = mapped_column(String(64))

@eo.handler("orders", key="order_no", retry=Retry(immediate=0, delays=[0.1], max_attempts=2))
def reserve(session: Session, order: dict[str, str], message: Message) -> None:
    if order["order_no"] == "bad" and not os.path.exists("mended"):
        raise Reject("the shop does not know this product")
    session.add(Reservation(order_no=order["order_no"]))
"""


class Shop:
    """A program in a folder of its own, and the command run there."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        (folder / "shop.py").write_text(SHOP)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("EXACTLY_ONCE_")}
        self.environment |= {"EXACTLY_ONCE_DATABASE": url, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        self(
            "-c",
            "import shop, sqlalchemy; shop.Base.metadata.create_all(sqlalchemy.create_engine(shop.eo.config.database.value))",
            module=None,
        )

    def command(self, *arguments: str, module: str | None = "exactly_once") -> list[str]:
        return [sys.executable, *(("-m", module) if module else ()), *arguments]

    def __call__(
        self, *arguments: str, stdin: str = "", module: str | None = "exactly_once", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments, module=module),
            cwd=self.folder,
            env=self.environment | environment,
            input=stdin,
            text=True,
            capture_output=True,
            timeout=60,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments), cwd=self.folder, env=self.environment, stderr=subprocess.PIPE, text=True
        )

    def ask(self, statement: str) -> list[tuple[object, ...]]:
        engine = create_engine(self.url)
        with engine.connect() as connection:
            rows = [tuple(row) for row in connection.execute(text(statement))]
        engine.dispose()
        return rows

    def orders(self) -> list[object]:
        return [row[0] for row in self.ask("SELECT order_no FROM cli_reservation ORDER BY order_no")]


@pytest.fixture
def shop(postgres_url: str, tmp_path: Path) -> Shop:
    return Shop(tmp_path, postgres_url)


def lines(orders: Sequence[str]) -> str:
    return "".join(
        json.dumps({"topic": "orders", "body": {"order_no": no}, "message_id": f"id-{no}"}) + "\n" for no in orders
    )


def test_send_and_run_process_each_message_once_and_sigterm_exits_0(shop: Shop) -> None:
    # a group that has not joined yet finds what was sent before it
    sent = shop("send", "-", "--transport", "sql://", stdin=lines(["A", "B", "A", "C"]))
    assert sent.returncode == 0, sent.stderr
    assert len(sent.stdout.splitlines()) == 4, "a receipt for each"
    worker = shop.start("run", "shop:eo", "--transport", "sql://")
    until(lambda: shop.orders() == ["A", "B", "C"] and shop.ask("SELECT count(*) FROM message_queue") == [(0,)])
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0


def test_two_processes_survive_the_death_of_one(shop: Shop) -> None:
    supervisor = shop.start("run", "shop:eo", "--transport", "sql://?invisible_s=2", "--processes", "2")
    try:
        children = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children")
        until(lambda: len(children.read_text().split()) == 2)
        wanted = [f"n{number:03}" for number in range(200)]
        assert shop("send", "-", "-t", "sql://", stdin=lines(wanted[:100] * 2)).returncode == 0
        killed = children.read_text().split()[0]
        os.kill(int(killed), signal.SIGKILL)
        until(lambda: len(now := children.read_text().split()) == 2 and killed not in now)
        assert shop("send", "-", "-t", "sql://", stdin=lines(wanted * 2)).returncode == 0
        until(lambda: shop.ask("SELECT count(*) FROM message_queue") == [(0,)])
        assert shop.orders() == wanted
    finally:
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(40) == 0


def test_a_file_is_processed_and_a_bad_line_is_named_and_stops_nothing(shop: Shop) -> None:
    (shop.folder / "recorded.jsonl").write_text(
        lines(["A", "B"]) + "not json\n" + lines(["A"]) + '{"topic": "orders"}\n'
    )
    done = shop("process", "recorded.jsonl", "--app", "shop:eo", "--concurrency", "1")
    assert done.returncode == 1
    assert "2 processed, 1 duplicate, 1 dead" in done.stdout
    assert "line 3" in done.stderr
    again = shop("process", "-", "--app", "shop:eo", stdin=lines(["A", "B", "C"]))
    assert again.returncode == 0
    assert "1 processed, 2 duplicate" in again.stdout
    assert shop.orders() == ["A", "B", "C"]


def test_a_dead_letter_is_listed_shown_requeued_and_then_run_by_a_worker(shop: Shop) -> None:
    assert "1 dead" in shop("process", "-", "-a", "shop:eo", stdin=lines(["bad"])).stdout
    listed = shop("failures", "list", "--group", "cli")
    (row,) = listed.stdout.splitlines()
    number, state, handler, key, *_ = row.split("\t")
    assert (state, handler, key) == ("dead", "reserve", "bad")
    assert "the shop does not know this product" in row
    shown = shop("failures", "show", number, "--app", "shop:eo")
    assert '{"order_no": "bad"}' in shown.stdout
    assert shop("failures", "show", number, "--raw", "-g", "cli").stdout == '{"order_no": "bad"}'
    (shop.folder / "mended").touch()
    requeued = shop("failures", "requeue", number, "--group", "cli", "--reason", "product added")
    assert requeued.returncode == 0, requeued.stderr
    worker = shop.start("run", "shop:eo", "--transport", "sql://")
    until(lambda: shop.orders() == ["bad"])
    until(lambda: shop.ask("SELECT state, decided_why FROM message_failure") == [("resolved", "product added")])
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0


def test_what_a_person_discarded_does_not_run_when_the_producer_sends_it_again(shop: Shop) -> None:
    shop("process", "-", "-a", "shop:eo", stdin=lines(["bad"]))
    assert shop("failures", "discard", "--all", "-g", "cli").returncode == 0
    (shop.folder / "mended").touch()
    assert "1 duplicate" in shop("process", "-", "-a", "shop:eo", stdin=lines(["bad"])).stdout
    assert shop.orders() == []


def test_json_steers_no_terminal_and_is_the_same_text(shop: Shop) -> None:
    key = "鑫-\x9b31m\u202egro\u2066\u200b\u2028\x7f\U000e0041é"
    body = json.dumps({"topic": "orders", "body": {"order_no": key}, "message_id": key}) + "\n"
    (shop.folder / "shop.py").write_text(SHOP.replace('== "bad"', "!= 0"))
    shop("process", "-", "-a", "shop:eo", stdin=body)
    (line,) = shop("failures", "list", "--json", "-g", "cli").stdout.splitlines()
    assert line.isprintable()
    assert "鑫-" in line
    assert "é" in line
    assert json.loads(line)["business_key"] == key


def test_requeue_at_a_rate_spreads_the_times_over_the_servers_clock(shop: Shop) -> None:
    records = "".join(
        json.dumps({"topic": "orders", "body": {"no": n}, "message_id": f"m{n}"}) + "\n" for n in range(5)
    )
    shop("process", "-", "-a", "shop:eo", stdin=records)
    assert shop("failures", "requeue", "--error-class", "BadKey", "--rate", "0.1", "-g", "cli").returncode == 0
    (spread,) = shop.ask("SELECT extract(epoch FROM max(next_attempt_at) - min(next_attempt_at)) FROM message_failure")
    assert float(str(spread[0])) == pytest.approx(40, abs=1)


def test_failures_are_not_decided_on_without_saying_which(shop: Shop) -> None:
    refused = shop("failures", "discard", "-g", "cli")
    assert refused.returncode == 2
    assert "--all" in refused.stderr


def test_handlers_are_shown_with_where_each_value_comes_from(shop: Shop) -> None:
    (shop.folder / "exactly_once.toml").write_text("[handlers.reserve]\nconcurrency = 3\n")
    shown = shop("handlers", "--app", "shop:eo", EXACTLY_ONCE_CONFIG="exactly_once.toml")
    assert shown.returncode == 0, shown.stderr
    assert "exactly_once.toml" in next(line for line in shown.stdout.splitlines() if "concurrency" in line)
    assert "[environment EXACTLY_ONCE_DATABASE]" in shown.stdout
    assert "transaction  one message " in shown.stdout


def test_handlers_in_groups_are_shown_with_what_shares_a_transaction(shop: Shop) -> None:
    (shop.folder / "sets.py").write_text(
        "from exactly_once import ExactlyOnce, Message\n"
        "eo = ExactlyOnce('sqlite://', group='sets')\n"
        "@eo.batch_handler('orders', key='no', batch=1000, batch_order='sku')\n"
        "def many(orders: list[dict]) -> None: ...\n"
        "@eo.handler('orders', key='no', batch=20)\n"
        "def one(order: dict) -> None: ...\n"
    )
    shown = shop("handlers", "--app", "sets:eo")
    assert shown.returncode == 0, shown.stderr
    assert "up to 1,000 messages, in one call, in the order of sku, the first waits 5 ms for more" in shown.stdout
    assert "up to 20 messages, each a call, as they came, the first waits 5 ms for more" in shown.stdout


def test_a_renamed_handlers_claims_are_moved_so_that_nothing_runs_again(shop: Shop) -> None:
    shop("process", "-", "-a", "shop:eo", stdin=lines(["A"]))
    (shop.folder / "shop.py").write_text(SHOP.replace("def reserve(", "def reserve_stock("))
    doctor = shop("doctor", "--app", "shop:eo", "-t", "sql://")
    assert "exactly-once handlers rename reserve" in doctor.stdout
    assert shop("handlers", "rename", "reserve", "reserve_stock", "-a", "shop:eo").returncode == 0
    assert "1 duplicate" in shop("process", "-", "-a", "shop:eo", stdin=lines(["A"])).stdout


def test_doctor_finds_nothing_wrong_in_a_healthy_program(shop: Shop) -> None:
    healthy = shop("doctor", "--app", "shop:eo", "--transport", "sql://")
    assert healthy.returncode == 0, healthy.stdout
    assert "FAIL" not in healthy.stdout
    assert "a key claimed twice is won, then known" in healthy.stdout


def test_doctor_says_what_to_type_for_each_thing_that_is_broken(shop: Shop) -> None:
    (shop.folder / "shop.py").write_text(
        SHOP.replace("@eo.handler", "def loud(f):\n    return lambda *a: f(*a)\n\n@loud\n@eo.handler")
    )
    above = shop("doctor", "--app", "shop:eo", "-t", "sql://")
    assert above.returncode == 1
    assert "decorator above @eo.handler" in above.stdout
    shop.ask("SELECT 1")
    engine = create_engine(shop.url)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE message_failure, message_queue, message_idempotent, exactly_once_version"))
    engine.dispose()
    missing = shop("doctor", "--app", "shop:eo", "-t", "sql://")
    assert missing.returncode == 1
    assert "exactly-once db upgrade" in missing.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "says"),
    [
        (("run", "nowhere:eo"), {}, 2, "no module 'nowhere'"),
        (("run", "shop:nothing"), {}, 2, "shop:eo"),
        (("run", "shop"), {}, 2, "shop.consumers:eo"),
        (("run", "shop:eo"), {}, 2, "EXACTLY_ONCE_TRANSPORT"),
        (("run", "shop:eo", "-t", "pigeon://coop"), {}, 2, "rocketmq4://"),
        (("run", "shop:eo", "-t", "sql://", "--health", "here"), {}, 2, "HOST:PORT"),
        (("run", "shop:eo", "-t", "sql://"), {"EXACTLY_ONCE_DATABASE": ""}, 2, "EXACTLY_ONCE_DATABASE="),
        (("run", "shop:eo", "-t", "sql://"), {"EXACTLY_ONCE_DATABASE": "nonsense"}, 2, "database"),
        (("run", "shop:eo", "-t", "sql://"), {"EXACTLY_ONCE_DATBASE": "x"}, 2, "EXACTLY_ONCE_DATABASE"),
        (("process", "absent.jsonl", "-a", "shop:eo"), {}, 2, "absent.jsonl"),
        (("send", "-t", "sql://"), {}, 2, "--body"),
        (("failures", "show", "99", "-g", "cli"), {}, 1, "failures list"),
    ],
)
def test_a_mistake_is_one_paragraph_with_what_to_type_and_never_a_traceback(
    shop: Shop, arguments: tuple[str, ...], environment: dict[str, str], code: int, says: str
) -> None:
    refused = shop(*arguments, **environment)
    assert refused.returncode == code, refused.stderr
    assert says in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "Traceback" in shop(*arguments, "--traceback", **environment).stderr or code == 1


@pytest.mark.parametrize("place", ["before the host", "in the query"])
def test_a_wrong_password_is_refused_and_appears_nowhere(shop: Shop, place: str) -> None:
    right = create_engine(shop.url).url
    wrong = {
        "before the host": right.set(password="hunter2"),
        "in the query": URL.create(
            right.drivername, right.username, None, right.host, right.port, right.database, {"password": "hunter2"}
        ),
    }[place]
    url = wrong.render_as_string(hide_password=False)
    refused = shop("run", "shop:eo", "-t", "sql://", EXACTLY_ONCE_DATABASE=url)
    assert refused.returncode == 2
    assert "EXACTLY_ONCE_DATABASE" in refused.stderr
    assert "hunter2" not in refused.stderr + refused.stdout


def test_every_verb_has_help(shop: Shop) -> None:
    for verb in ("run", "process", "send", "handlers", "db", "failures", "doctor"):
        told = shop(verb, "--help")
        assert told.returncode == 0, told.stderr
        assert "Usage" in told.stdout
    assert "doctor" in shop("--help").stdout
    assert shop("--version").stdout.startswith("exactly_once ")
