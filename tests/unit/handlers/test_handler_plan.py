"""A handler's plan: what is decided when a function is decorated, and what each message becomes."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import pytest
from pydantic import AliasChoices, AliasPath, BaseModel, ConfigDict, Field, RootModel, field_validator, model_validator
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, scoped_session
from typing_extensions import TypedDict

from exactly_once import ExactlyOnce, keys
from exactly_once.errors import BadBody, BadKey, ConfigurationError, Misuse
from exactly_once.handlers.body import NOT_JSON, parse_json
from exactly_once.handlers.parameters import NO_BODY
from exactly_once.handlers.plan import Lease, Lock, Plan, Transaction, check_result, plan
from exactly_once.handlers.retry import Retry
from exactly_once.handlers.steps import Steps
from exactly_once.message import Message

if TYPE_CHECKING:
    import decimal as money
    from fractions import Fraction as Portion


class Line(BaseModel):
    sku: str
    qty: int = 1


class Order(BaseModel):
    order_no: str = Field(alias="orderNo")
    total: Decimal = Decimal(0)
    weight: float = 1.0
    paid: bool = False
    lines: list[Line] = []
    note: str | None = None


def made(function: Callable[..., Any], **options: Any) -> Plan:
    given: dict[str, Any] = {"topic": "orders", "key": "orderNo"} | options
    caller = sys._getframe(1)
    return plan(function, caller_locals=caller.f_locals, caller_globals=caller.f_globals, **given)


def refused(function: Any, **options: Any) -> str:
    caller = sys._getframe(1)
    given: dict[str, Any] = {"topic": "orders", "key": "orderNo"} | options
    with pytest.raises(ConfigurationError) as error:
        plan(function, caller_locals=caller.f_locals, caller_globals=caller.f_globals, **given)
    return str(error.value)


def handle(session: Session, order: Order, message: Message) -> object:
    return session, order, message


ORDER = Message("orders", b'{"orderNo": "A-1", "total": 12345678901234567.25}', tag="created")
SESSION = Session()


# -- parameters ----------------------------------------------------------------------------------------------------


def test_each_parameter_is_filled_by_its_class() -> None:
    decided = made(handle)
    reading = decided.read(ORDER)
    assert (reading.key, reading.error) == ("A-1", None)
    assert decided.call(SESSION, reading, ORDER) == (SESSION, reading.body, ORDER)
    assert isinstance(reading.body, Order)


def test_the_order_of_parameters_is_the_handlers_own() -> None:
    def in_another_order(m: Message, o: Order, *, s: Session) -> object:
        return m, o, s

    decided = made(in_another_order)
    reading = decided.read(ORDER)
    assert decided.call(SESSION, reading, ORDER) == (ORDER, reading.body, SESSION)


def test_a_body_is_not_needed() -> None:
    def by_session(session: Session) -> object:
        return session

    def by_message(message: Message) -> object:
        return message

    assert made(by_session).call(SESSION, made(by_session).read(ORDER), ORDER) is SESSION
    assert made(by_message).call(SESSION, made(by_message).read(ORDER), ORDER) is ORDER
    assert made(by_session).takes_session
    assert not made(by_message).takes_session


def test_a_parameter_with_a_default_is_never_filled() -> None:
    def defaults(
        session: Session,
        order: Order,
        other: Session | None = None,
        unread: NoSuchName = 5,  # type: ignore[name-defined]  # noqa: F821
        plain=7,  # type: ignore[no-untyped-def]
        *,
        message: Message | None = None,
    ) -> object:
        return other, unread, plain, message

    decided = made(defaults)
    assert decided.call(SESSION, decided.read(ORDER), ORDER) == (None, 5, 7, None)


def test_what_could_only_be_filled_by_us_has_no_other_default() -> None:
    """`session: Session = Depends(...)`: the handler would be handed the mark of another framework, and fail on each message."""

    class Depends:
        pass

    theirs: Any = Depends()

    def a_session(order: Order, session: Session = theirs) -> None: ...

    async def async_one(order: Order, *, session: AsyncSession = theirs) -> None: ...

    def a_message(order: Order, message: Message | None = theirs) -> None: ...

    def steps_too(order: Order, steps: Steps = theirs) -> None: ...

    def annotated(order: Order, session: Annotated[Session, "mine"] = theirs) -> None: ...

    for function, name in (
        (a_session, "session"),
        (async_one, "session"),
        (a_message, "message"),
        (steps_too, "steps"),
        (annotated, "session"),
    ):
        text = refused(function)
        assert f"`{name}` has a default (Depends(...)), so it is never filled. Take the default away" in text

    def of_lists(orders: list[Order], session: Session = theirs) -> None: ...

    assert "`session` has a default (Depends(...))" in refused(of_lists, in_lists=True, batch=5)


def test_what_is_bound_by_the_program_itself_may_be_anything() -> None:
    """A partial's own, and a default of the right class: the program says by that what it wants."""

    def two(session: Session, order: Order, other: Session = SESSION, message: Message = ORDER) -> object:
        return session, other, message

    decided = made(two)
    assert decided.call(None, decided.read(ORDER), ORDER) == (None, SESSION, ORDER)
    bound = made(functools.partial(two, other="a stand-in"), name="bound")
    assert bound.call(None, bound.read(ORDER), ORDER) == (None, "a stand-in", ORDER)
    scoped: Any = scoped_session(lambda: SESSION)  # type: ignore[arg-type]
    assert made(functools.partial(two, other=scoped), name="scoped").takes_session


def test_a_mistake_is_told_once() -> None:
    """One traceback: the error that this one was made of says nothing more, and its lines are ours."""

    def nowhere(session: Session, order: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    eo = ExactlyOnce(group="shop")
    mistakes: list[Callable[[], object]] = [
        lambda: eo.handler("orders", key="")(handle),
        lambda: eo.handler("orders", key="nothing")(handle),
        lambda: eo.handler("orders"),  # type: ignore[call-arg]
        lambda: eo.handler("orders", key="orderNo", grp=1),  # type: ignore[call-arg]
        lambda: eo.handler("orders", "created", key="orderNo"),  # type: ignore[call-arg]
        lambda: eo.batch_handler("orders", key="orderNo", batch=0)(handle),
    ]
    for mistake in mistakes:
        with pytest.raises(ConfigurationError) as told:
            mistake()
        lines = "".join(traceback.format_exception(told.value))
        assert lines.count("Traceback (most recent call last)") == 1, lines
        assert lines.count(str(told.value)) == 1
    with pytest.raises(ConfigurationError) as told:
        eo.handler("orders", key="orderNo")(nowhere)
    assert isinstance(told.value.__cause__, NameError)  # an error of Python's own says more


def test_partials_bound_methods_closures_and_callable_objects_are_handlers() -> None:
    class Service:
        def __init__(self, name: str) -> None:
            self.name = name

        def reserve(self, session: Session, order: Order) -> object:
            return self.name, session, order

        def __call__(self, session: Session, order: Order) -> object:
            return self.reserve(session, order)

    def with_dependency(client: Service, session: Session, order: Order, *, limit: Any) -> object:
        return client.name, session, order

    def closure(service: Service) -> Callable[..., object]:
        def inner(session: Session, order: Order) -> object:
            return service.name, session, order

        return inner

    service = Service("s")
    for function, options in [
        (service.reserve, {}),
        (service, {"name": "service"}),
        (closure(service), {}),
        (functools.partial(with_dependency, service, limit=3), {"name": "partial"}),
        (functools.partial(functools.partial(with_dependency, client=service), limit=3), {"name": "partial"}),
        (lambda session, order: (service.name, session, order), None),
    ]:
        if options is None:
            assert "no name of its own" in refused(function)
            continue
        decided = made(function, **options)
        reading = decided.read(ORDER)
        assert decided.call(SESSION, reading, ORDER) == ("s", SESSION, reading.body)
        assert decided.function is function


def test_a_decorator_below_that_wraps_is_seen_through_and_still_runs() -> None:
    ran: list[str] = []

    def logged(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            ran.append("wrapper")
            return function(*args, **kwargs)

        return wrapper

    decided = made(logged(handle))
    assert decided.name == "handle"
    decided.call(SESSION, decided.read(ORDER), ORDER)
    assert ran == ["wrapper"]

    @logged
    async def coming(session: AsyncSession, order: Order) -> None: ...

    assert made(coming).is_async


def test_subclasses_of_session_are_sessions() -> None:
    class Mine(Session): ...

    class MineToo(AsyncSession): ...

    def plain(session: Mine, order: Order) -> None: ...

    async def coming(session: MineToo, order: Order) -> None: ...

    assert made(plain).session_type is Mine
    assert made(coming).session_type is MineToo
    assert made(coming).is_async


def test_an_annotated_session_is_a_session() -> None:
    def annotated(session: Annotated[Session, "the one"], order: Annotated[Order, "a body"]) -> None: ...

    assert made(annotated).session_type is Session


# -- mistakes ------------------------------------------------------------------------------------------------------


class Repository:
    pass


def test_mistakes_in_a_handler_are_errors_when_it_is_decorated_with_the_fix_in_them() -> None:
    def two_bodies(session: Session, order: Order, line: Line) -> None: ...

    def two_sessions(a: Session, b: Session) -> None: ...

    def no_annotation(session: Session, order) -> None: ...  # type: ignore[no-untyped-def]

    def unknown(session: Session, repository: Repository) -> None: ...

    def nowhere(session: Session, order: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    def nothing() -> None: ...

    def variable(*args: Any, **kwargs: Any) -> None: ...

    def generator(session: Session, order: Order) -> Iterator[int]:
        yield 1

    async def async_generator(session: AsyncSession) -> Any:
        yield 1

    async def wrong_colour(session: Session, order: Order) -> None: ...

    def other_wrong_colour(session: AsyncSession, order: Order) -> None: ...

    def maybe(session: Session | None, order: Order) -> None: ...

    def scoped(session: scoped_session[Session], order: Order) -> None: ...

    class Service:
        def method(self, session: Session) -> None: ...

    def broken(session: Session, order: "Order[") -> None: ...  # type: ignore[valid-type,syntax]  # noqa: F722

    for function, told in [
        (two_bodies, ["'order'", "'line'", "default"]),
        (two_sessions, ["'a'", "'b'"]),
        (no_annotation, ["'order'", "annotation"]),
        (unknown, ["repository: Repository", "functools.partial"]),
        (nowhere, ["'Nowhere'", "Import"]),
        (nothing, ["no parameter"]),
        (variable, ["functools.wraps"]),
        (generator, ["yield"]),
        (async_generator, ["yield"]),
        (wrong_colour, ["AsyncSession"]),
        (other_wrong_colour, ["`session: Session`"]),
        (maybe, ["without None"]),
        (scoped, ["scoped_session", "Session"]),
        (Service.method, ["bound method"]),
        (broken, ["Order["]),
    ]:
        text = refused(function)
        assert f"handler {function.__name__!r}" in text
        for part in told:
            assert part in text, text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"topic": ""}, "topic"),
        ({"topic": 5}, "topic"),
        ({"tag": ""}, "tag"),
        ({"tag": ()}, "tag"),
        ({"tag": ("a", "")}, "tag"),
        ({"tag": "a | b"}, "tag"),
        ({"tag": ("a", "*")}, "tag"),
        ({"tag": 5}, "tag"),
        ({"key": ()}, "key"),
        ({"key": keys.tag}, "keys.tag"),
        ({"name": ""}, "name"),
        ({"name": "x" * 129}, "129 bytes"),
        ({"guard": Transaction}, "Transaction()"),
        ({"retry": Retry}, "Retry()"),
        ({"retry": 3}, "Retry("),
        ({"fingerprint": "everything"}, "fingerprint"),
        ({"ordered": 1}, "ordered"),
        ({"after_dead": "stop"}, "go on"),
        ({"concurrency": 0}, "concurrency"),
        ({"batch": 1}, "from 2"),
        ({"batch": True}, "from 2"),
        ({"batch": 10_001}, "10,000"),
        ({"batch": 10, "linger": 5}, "timedelta"),
        ({"linger": timedelta(milliseconds=1)}, "linger= needs batch="),
        ({"batch": 10, "linger": timedelta(seconds=11)}, "ten seconds"),
        ({"batch": 10, "linger": timedelta(seconds=-1)}, "ten seconds"),
        ({"batch_order": "sku"}, "batch="),
        ({"batch": 10, "batch_order": ()}, "batch_order= has no parts"),
        ({"batch": 10, "batch_order": 5}, "batch_order= was given 5"),
        ({"batch": 10, "guard": Lease(timedelta(minutes=10))}, "Lease"),
        ({"batch": 10, "guard": Lock()}, "Lock"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], told: str) -> None:
    assert told in refused(handle, **options)


def test_a_batch_handler_gets_lists_of_the_body_and_of_messages() -> None:
    def listed(session: Session, orders: list[Order], messages: list[Message]) -> tuple[list[Order], list[Message]]:
        return orders, messages

    made = plan(listed, topic="orders", key="orderNo", batch=10, in_lists=True)
    message = Message("orders", b'{"orderNo": "A-1", "lines": []}')
    reading = made.read(message)
    assert reading.error is None
    assert made.call(None, reading, message) == ([reading.body], [message])
    assert made.call_with_lists(None, [(reading, message)] * 2) == ([reading.body] * 2, [message] * 2)
    assert isinstance(reading.body, Order)


def test_a_batch_handler_that_does_not_take_lists_is_told_what_to_write() -> None:
    def no_list(session: Session, order: Order) -> None: ...
    def no_list_of_messages(session: Session, orders: list[Order], message: Message) -> None: ...
    def sessions(sessions: list[Session], orders: list[Order]) -> None: ...
    def untyped(session: Session, orders: list) -> None: ...  # type: ignore[type-arg]
    def perhaps(session: Session, orders: list[Order] | None) -> None: ...
    def walked(session: Session, orders: Iterable[Order]) -> None: ...
    def described(session: Session, orders: Annotated[list[Order], "of one group"]) -> None: ...
    def with_steps(session: Session, orders: list[Order], steps: Steps) -> None: ...
    def starred(session: Session, *orders: Order) -> None: ...
    def by_default(session: Session, orders: list[Order] = []) -> None: ...  # noqa: B006
    def no_message(session: Session) -> None: ...
    def mapping(session: Session, order: Mapping[str, str]) -> None: ...
    def pair(session: Session, order: tuple[str, int]) -> None: ...
    def many(session: Session, orders: tuple[Order, ...]) -> None: ...
    def bare(session: Session, orders: Sequence) -> None: ...  # type: ignore[type-arg]
    async def async_sessions(sessions: list[AsyncSession], orders: list[Order]) -> None: ...

    for function, told in [
        (no_list, "list[Order]"),
        (no_list_of_messages, "list[Message]"),
        (sessions, "sessions: Session"),
        (untyped, "list[dict]"),
        (perhaps, "list[Order]"),
        (walked, "list[Order]"),
        (described, "list[Order]"),
        (with_steps, "guard=Lease("),
        (starred, "list[dict]"),
        (by_default, "`orders` has a default"),
        (mapping, "list[collections.abc.Mapping[str, str]]"),
        (pair, "list[tuple[str, int]]"),
        (many, "list[Order]"),
        (bare, "list[dict]"),
        (async_sessions, "sessions: AsyncSession"),
        (no_message, "asks for no list"),
    ]:
        with pytest.raises(ConfigurationError) as error:
            plan(function, topic="orders", key="orderNo", batch=10, in_lists=True)
        assert told in str(error.value)
        assert "list[list" not in str(error.value)


def test_a_handler_whose_message_would_go_into_a_star_is_refused() -> None:
    def starred(session: Session, *orders: Order) -> None: ...
    def named(session: Session, **order: Any) -> None: ...
    def by_default(session: Session, order: Order | None = None) -> None: ...

    assert "`*orders` is never filled" in refused(starred)
    assert "`**order` is never filled" in refused(named)
    assert "`order` has a default" in refused(by_default, key=keys.message_key())


def test_a_handler_that_wants_nothing_of_its_message_may_have_defaults() -> None:
    def tick(session: Session, clock: Any = keys, step: int = 1) -> None: ...

    assert made(tick, key=keys.message_key()).body_annotation is NO_BODY


def test_a_list_for_single_messages_is_told_where_lists_are() -> None:
    def listed(session: Session, orders: list[Order]) -> None: ...

    assert "@eo.batch_handler" in refused(listed, batch=10)


def test_the_order_of_a_group_is_checked_against_the_model() -> None:
    def one(session: Session, order: Order) -> None: ...

    with pytest.raises(ConfigurationError, match="batch_order"):
        plan(one, topic="orders", key="orderNo", batch=10, batch_order="skew")

    def free(session: Session, order: dict[str, Any]) -> None: ...

    made = plan(free, topic="orders", key="no", batch=10, batch_order="sku")
    messages = [Message("orders", body) for body in (b'{"no": 1, "sku": "b"}', b'{"no": 2}', b'{"no": 3, "sku": "a"}')]
    assert [made.read(message).order for message in messages] == ["b", "", "a"]


def test_a_guard_has_positive_times() -> None:
    for wrong in ({"claim_wait": timedelta(0)}, {"claim_wait": 2}, {"claim_wait": None}):
        with pytest.raises(ConfigurationError):
            Transaction(**wrong)  # type: ignore[arg-type]


def test_what_has_no_name_needs_one() -> None:
    for nameless in (functools.partial(handle), lambda message: None):
        assert "name=" in refused(nameless)
    assert "name='handle'" in refused(functools.partial(handle))
    assert made(functools.partial(handle), name="mine").name == "mine"
    assert "a class" in refused(Order)
    assert "a str" in refused("handle")


# -- hints ---------------------------------------------------------------------------------------------------------


def test_models_of_the_callers_function_are_found() -> None:
    class Inner(BaseModel):
        no: int

    class Local(BaseModel):
        inner: Inner

    @dataclasses.dataclass
    class Part:
        no: int

    @dataclasses.dataclass
    class Whole:
        parts: list[Part]

    def quoted(session: Session, order: "Optional['Local']") -> object:  # noqa: UP037, UP045  (texts inside texts)
        return order

    def whole(session: Session, order: Whole) -> object:
        return order

    assert made(quoted, key="inner.no").read(Message("orders", b'{"inner": {"no": 5}}')).body.inner.no == 5
    assert made(whole, key="parts.0.no").read(Message("orders", b'{"parts": [{"no": 5}]}')).body == Whole([Part(5)])


def test_names_imported_for_type_checkers_only_are_found() -> None:
    def hidden(session: Session, amount: money.Decimal) -> None: ...

    decided = made(hidden, key=keys.message_key())
    assert decided.read(Message("orders", b"1.50", key="k")).body == Decimal("1.50")
    assert "Portion" not in globals()

    def aliased(session: Session, amount: Portion) -> None: ...

    assert made(aliased, key=keys.message_key()).read(Message("orders", b'"1/2"', key="k")).body.denominator == 2
    assert "Portion" not in globals()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Write a package of modules and import one of them."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def write(wanted: str, **modules: str) -> Any:
        (tmp_path / "shop").mkdir()
        (tmp_path / "shop" / "__init__.py").write_text("")
        for name, text in modules.items():
            (tmp_path / "shop" / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return importlib.import_module(f"shop.{wanted}")

    yield write
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "shop":
            del sys.modules[name]


MODELS = "from pydantic import BaseModel\nclass Order(BaseModel):\n    no: int\n"
CONSUMER = """
{future}
import typing as t
from typing import TYPE_CHECKING
from sqlalchemy.orm import Session
from exactly_once.handlers.plan import plan
{imports}
def handle(session: Session, order: {hint}):
    return order
decided = plan(handle, topic="orders", key="no", caller_locals=locals(), caller_globals=globals())
"""


@pytest.mark.parametrize(
    ("imports", "hint"),
    [
        ("if TYPE_CHECKING:\n    from .models import Order", "Order"),
        ("if TYPE_CHECKING:\n    from shop.models import Order, NotThere", "Order"),
        ("if t.TYPE_CHECKING:\n    from shop.models import Order as O", "O | None"),
        ("if TYPE_CHECKING:\n    import shop.models", "shop.models.Order"),
        ("import shop\nif TYPE_CHECKING:\n    import shop.models", "shop.models.Order"),
        ("if TYPE_CHECKING:\n    import shop.models as models", "models.Order"),
        ("if TYPE_CHECKING:\n    from . import models\n    Alias = models.Order", "Alias"),
        ("if not TYPE_CHECKING:\n    Other = None\nelse:\n    from shop.models import Order", "Order"),
        (
            "if TYPE_CHECKING:\n    try:\n        from shop.models import Order\n    except ImportError:\n        pass",
            "Order",
        ),
    ],
)
@pytest.mark.parametrize("quoted", [True, False])
def test_type_checking_imports_work_however_they_are_written(
    package: Callable[..., Any], imports: str, hint: str, quoted: bool
) -> None:
    text = CONSUMER.format(
        future="" if quoted else "from __future__ import annotations",
        imports=imports,
        hint=f'"{hint}"' if quoted else hint,
    )
    module = package("consumers", models=MODELS, consumers=text)
    assert module.decided.read(Message("orders", b'{"no": 5}')).body.no == 5


def test_a_circle_of_imports_is_explained(package: Callable[..., Any]) -> None:
    consumers = CONSUMER.format(
        future="from __future__ import annotations",
        imports="if TYPE_CHECKING:\n    from shop.models import Order",
        hint="Order",
    )
    with pytest.raises(ConfigurationError, match=r"'Order' is imported under TYPE_CHECKING only.*module of its own"):
        package("models", models="import shop.consumers\n" + MODELS, consumers=consumers)


def test_a_function_of_another_module_means_its_own_names(package: Callable[..., Any]) -> None:
    module = package(
        "consumers",
        models=MODELS,
        consumers="from __future__ import annotations\nfrom shop.models import Order\n"
        "def handle(order: Order): return order\n",
    )

    class Order(BaseModel):
        other: str

    assert made(module.handle, key="no").read(Message("orders", b'{"no": 5}')).body.no == 5


# -- bodies --------------------------------------------------------------------------------------------------------


class Typed(TypedDict):
    no: int


@dataclasses.dataclass
class Data:
    no: int
    lines: list[Line] = dataclasses.field(default_factory=list)


def as_body(annotation: Any, body: bytes | None, key: Any = None) -> Any:
    def function(order: Any) -> None: ...

    function.__annotations__["order"] = annotation
    return made(function, key=key or keys.message_key()).read(Message("orders", body, key="k"))


@pytest.mark.parametrize(
    ("annotation", "body", "value"),
    [
        (bytes, b"\x00\xff", b"\x00\xff"),
        (str, "grün".encode(), "grün"),
        (dict, b'{"a": 1.5}', {"a": 1.5}),
        (dict[str, int], b'{"a": "1"}', {"a": 1}),
        (list[int], b"[1]", [1]),
        (Any, b"null", None),
        (int, b"5", 5),
        (Typed, b'{"no": 5}', {"no": 5}),
        (Data, b'{"no": 5}', Data(5)),
        (Line, b'{"sku": "a"}', Line(sku="a")),
        (RootModel[list[int]], b"[1]", RootModel[list[int]]([1])),
        (Line | None, None, None),
        (Optional[Line], b'{"sku": "a"}', Line(sku="a")),  # noqa: UP045  (both spellings are in use)
        (Line | None, b"null", None),
        (bytes | None, None, None),
        (str | None, b"x", "x"),
        (Line | Typed, b'{"no": 5}', {"no": 5}),
        (Annotated[int, Field(gt=3)], b"5", 5),
    ],
)
def test_a_body_is_read_as_its_annotation_says(annotation: Any, body: bytes | None, value: object) -> None:
    reading = as_body(annotation, body)
    assert reading.error is None
    assert reading.body == value


@pytest.mark.parametrize(
    ("annotation", "body", "told"),
    [
        (str, b"\xff", "not text"),
        (dict, b"{", "line 1, column 2"),
        (dict, b"\xff", "not UTF-8"),
        (dict, b"[1]", "a list"),
        (dict, b"", "not JSON"),
        (Any, b"[" * 100_000, "nested deeper"),
        (dict, b'{"a": ' + b"1" * 5000 + b"}", "too many digits"),
        (Line, b"{", "not JSON"),
        (Line, b'{"sku": 5}', "sku: "),
        (Line, None, "Order | None"),
        (bytes, None, "no body"),
        (str, None, "no body"),
        (dict, None, "no body"),
        (Annotated[int, Field(gt=3)], b"1", "greater than 3"),
    ],
)
def test_a_bad_body_is_an_error_in_the_reading_with_its_key(annotation: Any, body: bytes | None, told: str) -> None:
    reading = as_body(annotation, body)
    assert isinstance(reading.error, BadBody)
    assert told in str(reading.error)
    assert reading.key == "k"
    assert len(reading.fingerprint) >= 20


def test_a_body_nested_to_the_limit_is_read_or_refused_and_never_raises() -> None:
    limit = sys.getrecursionlimit()
    for depth in range(limit - 150, limit + 20):
        for annotation in (Any, dict, Line):
            as_body(annotation, b'{"a":' * depth + b"1" + b"}" * depth)


@pytest.mark.parametrize("nest", ['{"a":1,"b":', "[0,"])
def test_how_deep_a_body_may_be_does_not_depend_on_the_caller(nest: str) -> None:
    close = {"{": "}", "[": "]"}[nest[0]]

    def read(depth: int, callers: int) -> Any:
        return parse_json((nest * depth + "1" + close * depth).encode()) if callers == 0 else read(depth, callers - 1)

    for callers in (0, sys.getrecursionlimit() - 400):
        assert read(200, callers) is not NOT_JSON
        assert read(201, callers) is NOT_JSON
    wide = "[" + ",".join(["[[0]]"] * 500) + "]"
    assert parse_json(wide.encode()) == [[[0]]] * 500
    assert "deeper than 200" in str(as_body(Any, (nest * 201 + "1" + close * 201).encode()).error)


def test_a_body_that_fails_validation_keeps_its_key_and_tells_no_values() -> None:
    reading = made(handle).read(Message("orders", b'{"orderNo": "A-1", "total": "4111-1111", "lines": [{"sku": 7}]}'))
    assert (reading.key, reading.body) == ("A-1", None)
    assert isinstance(reading.error, BadBody)
    assert "4111" not in str(reading.error)
    assert "total" in str(reading.error)
    assert "lines.0.sku" in str(reading.error)
    assert reading.error.__cause__ is None


def test_an_error_about_a_body_cannot_forge_a_log_line() -> None:
    reading = as_body(dict[str, int], b'{"a\\nERROR all is lost": "x", "' + b"b" * 5000 + b'": "x"}')
    assert "\n" not in str(reading.error)
    assert len(str(reading.error)) < 1000

    class Talkative(BaseModel):
        no: int

        @field_validator("no")
        @classmethod
        def complain(cls, value: int) -> int:
            raise ValueError("first\nERROR second")

    assert "\n" not in str(as_body(Talkative, b'{"no": 1}').error)


def test_a_validator_that_breaks_is_a_bad_body() -> None:
    class Broken(BaseModel):
        no: int

        @field_validator("no")
        @classmethod
        def explode(cls, value: int) -> int:
            raise KeyError("secret")

    reading = as_body(Broken, b'{"no": 1}', "no")
    assert isinstance(reading.error, BadBody)
    assert "KeyError" in str(reading.error)
    assert reading.key == "1"


def test_decimals_in_texts_keep_every_digit() -> None:
    body = b'{"orderNo": "A-1", "total": "12345678901234567890.10"}'
    assert made(handle).read(Message("orders", body)).body.total == Decimal("12345678901234567890.10")


def test_a_message_without_its_key_is_an_error_in_the_reading() -> None:
    reading = made(handle).read(Message("orders", b'{"total": 1}'))
    assert reading.key is None
    assert isinstance(reading.error, BadKey)
    assert isinstance(made(handle).read(Message("orders", None)).error, BadKey)
    assert isinstance(made(handle).read(Message("orders", b"no json")).error, BadBody)


# -- key paths against the model -------------------------------------------------------------------------------------


def body_of(annotation: Any) -> Callable[..., None]:
    def function(order: Any) -> None: ...

    function.__annotations__["order"] = annotation
    return function


class Choices(BaseModel):
    one: str = Field(validation_alias=AliasChoices("uno", "un", AliasPath("deep", "er")))
    named: str = Field(alias="Named")
    model_config = ConfigDict(populate_by_name=True)


class Generated(BaseModel):
    order_no: str
    model_config = ConfigDict(alias_generator=lambda name: name.upper())


class Allowing(BaseModel):
    no: int
    model_config = ConfigDict(extra="allow")


class Reshaped(BaseModel):
    no: int

    @model_validator(mode="before")
    @classmethod
    def unwrap(cls, value: Any) -> Any:
        return value["data"]


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    tricks: dict[str, str]


@pytest.mark.parametrize(
    ("annotation", "key"),
    [
        (Order, "orderNo"),
        (Order | None, "orderNo"),
        (Order, "lines.0.sku"),
        (Choices, "uno"),
        (Choices, "un"),
        (Choices, "deep.er"),
        (Choices, "one"),
        (Choices, "Named"),
        (Generated, "ORDER_NO"),
        (Allowing, "anything"),
        (Reshaped, "data.no"),
        (Cat | Dog, "lives"),
        (Annotated[Cat | Dog, Field(discriminator="kind")], "tricks.roll"),
        (list[Order], "0.orderNo"),
        (RootModel[list[Order]], "0.orderNo"),
        (dict, "a.b"),
        (dict[str, Order], "x.orderNo"),
        (Any, "a.b"),
        (bytes, "a.b"),
        (Typed, "no"),
        (Data, "lines.0.qty"),
    ],
)
def test_a_path_that_can_exist_is_accepted(annotation: Any, key: str) -> None:
    if annotation is bytes:
        assert made(body_of(annotation), key=key).read(Message("orders", b'{"a": {"b": 1}}')).key == "1"
    made(body_of(annotation), key=key)


@pytest.mark.parametrize(
    ("annotation", "key", "told"),
    [
        (Order, "orderNr", "'orderNo'"),
        (Order, "order_no", "In the JSON it is called 'orderNo'"),
        (Order, "orderNo.x", "no object"),
        (Order, "lines.sku", "'sku'"),
        (Order, "lines.0.skuu", "'sku'"),
        (Order, "weight", "float"),
        (Order, "paid", "bool"),
        (Order, "lines", "list"),
        (Order, "lines.0", "Line"),
        (Choices, "dos", "uno"),
        (Generated, "order_no", "'ORDER_NO'"),
        (Cat | Dog, "wings", "lives"),
        (Typed, "nr", "It has: no."),
        (Data, "nr", "It has: lines, no."),
        (RootModel[list[Order]], "orderNo", "orderNo"),
    ],
)
def test_a_misspelled_path_is_refused_with_what_is_close(annotation: Any, key: str, told: str) -> None:
    text = refused(body_of(annotation), key=key)
    assert f"key={key!r}" in text
    assert told in text


def test_every_part_of_a_key_and_each_fingerprint_path_is_checked() -> None:
    assert "'nr'" in refused(body_of(Order), key=(keys.tag(), "orderNo", keys.path("nr")))
    assert "fingerprint='totl'" in refused(body_of(Order), fingerprint=["totl"])
    made(body_of(Order), fingerprint=["weight", "lines"])


# -- what a plan knows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "tags"),
    [
        (None, ()),
        ("*", ()),
        ("b", ("b",)),
        ("b || a", ("a", "b")),
        (("b", "a", "b"), ("a", "b")),
        (["a || c", "b"], ("a", "b", "c")),
    ],
)
def test_tags_are_sorted_each_once(tag: Any, tags: tuple[str, ...]) -> None:
    assert made(handle, tag=tag).tags == tags


def test_a_plan_matches_its_topic_and_tags() -> None:
    some = made(handle, tag="a||b")
    assert some.matches(Message("orders", b"", tag="a"))
    assert not some.matches(Message("orders", b"", tag="c"))
    assert not some.matches(Message("orders", b""))
    assert not some.matches(Message("stock", b"", tag="a"))
    assert made(handle).matches(Message("orders", b""))


def test_a_handler_of_several_tags_is_warned_when_its_key_does_not_tell_them_apart() -> None:
    assert "keys.tag()" in made(handle, tag="a||b").warnings[0]
    assert not made(handle, tag="a").warnings
    assert not made(handle, tag="a||b", key=(keys.tag(), "orderNo")).warnings
    assert not made(handle, tag="a||b", key=keys.call(lambda m: m.topic)).warnings
    assert made(handle, tag="a||b", key=(keys.tag(), "orderNo")).key_has_tag


def test_a_handler_of_tombstones_is_warned_when_its_key_is_in_the_body() -> None:
    assert "message_key" in made(body_of(Order | None)).warnings[0]
    assert not made(body_of(Order | None), key=keys.message_key()).warnings


def test_settings_move_a_plan_and_leave_the_rest() -> None:
    moved = made(handle, tag="a").moved(topic="orders-eu", tag=("b", "c"), retry=Retry(max_attempts=3), concurrency=2)
    assert (moved.topic, moved.tags, moved.retry, moved.concurrency) == (
        "orders-eu",
        ("b", "c"),
        Retry(max_attempts=3),
        2,
    )
    assert (moved.name, moved.function) == ("handle", handle)
    assert made(handle, tag="a").moved().tags == ("a",)
    with pytest.raises(ConfigurationError):
        moved.moved(topic="")


def test_a_conflict_is_explained_with_the_setting_that_accepts_it() -> None:
    decided = made(handle)
    stored = decided.read(Message("orders", b'{"orderNo": "A-1", "total": 1, "note": "x"}')).fingerprint
    text = decided.explain_conflict(stored, Message("orders", b'{"orderNo": "A-1", "total": 2, "note": "x"}'), "A-1")
    assert "'A-1'" in text
    assert "Different: total" in text
    assert "fingerprint=['note', 'orderNo']" in text
    chosen = made(handle, fingerprint=["total"])
    stored = chosen.read(Message("orders", b'{"orderNo": "A-1", "total": 1}')).fingerprint
    assert "Different: total" in chosen.explain_conflict(stored, Message("orders", b'{"total": 2}'), "A-1")
    raw = made(body_of(bytes), key=keys.message_key())
    assert "not known" in raw.explain_conflict(
        raw.read(Message("o", b"\x01", key="k")).fingerprint, Message("o", b"2"), "k"
    )


# -- results -------------------------------------------------------------------------------------------------------


def test_a_plain_function_that_returns_a_coroutine_is_found_out_at_run_time() -> None:
    async def inner(order: Order) -> None: ...

    def outer(order: Order) -> object:
        return inner(order)

    decided = made(outer)
    assert not decided.is_async
    with pytest.raises(Misuse):
        check_result(decided.call(None, decided.read(ORDER), ORDER))


def test_pydantic_is_not_imported_for_a_plain_body() -> None:
    import subprocess

    program = (
        "import sys\nfrom exactly_once.handlers.plan import plan\n"
        "def handle(order: dict): ...\n"
        "plan(handle, topic='orders', key='no', caller_locals=locals(), caller_globals=globals())\n"
        "assert 'pydantic' not in sys.modules and 'sqlalchemy.ext.asyncio' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[3])
