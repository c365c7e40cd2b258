"""What a handler returns: nothing. What looks like an answer is refused, at import or when returned; the rest is ignored."""

import asyncio
import contextlib
import functools
import io
import itertools
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from concurrent.futures import Future
from ctypes import c_int
from decimal import Decimal
from enum import Enum, Flag, IntEnum, StrEnum
from fractions import Fraction
from http import HTTPStatus
from types import FunctionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NewType, Optional, TypeVar, Union
from unittest.mock import MagicMock
from uuid import UUID

import pytest
from pydantic import BaseModel
from sqlalchemy import Select, column, create_engine, delete, func, insert, select, table, text, update
from sqlalchemy.orm import Query

from exactly_once.errors import ConfigurationError, Misuse, RefusedResult, Reject
from exactly_once.handlers.plan import check_result, plan
from exactly_once.outcome import Outcome

if TYPE_CHECKING:
    from no_such_package import Answer  # noqa: F401  (named in an annotation that cannot be resolved)


class ConsumeResult(Enum):
    SUCCESS = 0
    FAILURE = 1


class ConsumeStatus(IntEnum):
    CONSUME_SUCCESS = 0
    RECONSUME_LATER = 1


class Said(StrEnum):
    NO = "no"


class Bits(Flag):
    ONE = 1


class Text(str):
    pass


class NumpyBool(type("generic", (), {"__module__": "numpy"})):  # type: ignore[misc]
    """As numpy.bool_, of `(amounts >= 0).all()`: neither a bool nor registered as a number."""


class Money:
    """No number, though it can be made one."""

    def __float__(self) -> float:
        return 12.5


class Model(BaseModel):
    no: str = ""


Count = NewType("Count", int)

ANSWERS = [
    *(
        True,
        False,
        0,
        1,
        0.0,
        2j,
        Decimal(0),
        Fraction(1, 2),
        "",
        "4111111111111111",
        Text("no"),
        b"",
        b"no",
        bytearray(b"no"),
        NumpyBool(),
    ),
    *(
        memoryview(b"no"),
        ConsumeResult.FAILURE,
        ConsumeStatus.RECONSUME_LATER,
        Said.NO,
        Bits.ONE,
        HTTPStatus.OK,
        Outcome.FAILED,
    ),
    *(ValueError("not raised"), Reject("not raised"), KeyboardInterrupt()),
]


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda value: repr(value).partition(" at 0x")[0])
@pytest.mark.parametrize("in_lists", [False, True])
def test_an_answer_is_refused_as_a_mistake_of_the_handler(answer: object, in_lists: bool) -> None:
    with pytest.raises(RefusedResult, match="nobody reads what a handler returns") as error:
        check_result(answer, in_lists=in_lists, handler="reserve")
    assert isinstance(error.value, ConfigurationError)
    assert "'reserve' returned" in str(error.value)
    assert "raise an exception to have the message tried again" in str(error.value)
    assert "4111111111111111" not in str(error.value)


def test_the_member_that_was_returned_is_named() -> None:
    with pytest.raises(RefusedResult, match=r"returned ConsumeResult\.FAILURE, "):
        check_result(ConsumeResult.FAILURE)
    with pytest.raises(RefusedResult, match="returned False, "):
        check_result(False)


def test_a_result_that_shows_that_nothing_ran_is_refused() -> None:
    async def coroutine() -> None: ...

    def generator() -> Iterator[int]:
        yield 1

    async def async_generator() -> AsyncIterator[int]:
        yield 1

    class Later:
        def __await__(self) -> Any: ...

    class Walked:
        def __iter__(self) -> Any:
            return self

        def __next__(self) -> int:
            raise AssertionError("it is not for us to walk")

    class WalkedAsync:
        def __aiter__(self) -> Any:
            return self

        async def __anext__(self) -> int:
            raise StopAsyncIteration

    @contextlib.contextmanager
    def managed() -> Iterator[int]:
        yield 1

    @contextlib.asynccontextmanager
    async def async_managed() -> AsyncIterator[int]:
        yield 1

    loop = asyncio.new_event_loop()
    step = async_generator().asend(None)  # type: ignore[attr-defined]
    t = table("t", column("a"))
    results: list[object] = [
        *(coroutine(), generator(), async_generator(), Later(), loop.create_future(), step),
        *(map(str, [1]), filter(None, [1]), zip([1], [2], strict=True), enumerate([1]), reversed([1]), iter([1])),
        *(itertools.starmap(str, [(1,)]), itertools.chain([1]), Walked(), WalkedAsync(), managed(), async_managed()),
        *(select(t), update(t).values(a=1), insert(t), delete(t), text("DELETE FROM t"), func.now(), Query([t.c.a])),
    ]
    for result in results:
        with pytest.raises(Misuse, match="nothing in it ran"):
            check_result(result)
    step.close()
    loop.close()


def test_the_future_of_a_thread_is_refused() -> None:
    with pytest.raises(Misuse, match="may not be done"):
        check_result(Future())


def result_of_a_statement() -> object:
    """An iterator, too, of what was executed."""
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        return connection.execute(text("SELECT 1"))


def test_any_other_result_is_ignored_with_one_warning_a_handler(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "exactly_once")
    for handler in ("first", "second"):
        for result in (
            [],
            {},
            (),
            object(),
            result_of_a_statement(),
            io.StringIO(),
            Model(),
            None,
            c_int(1),
            ConsumeResult,
            Model,
            UUID(int=1),
            Money(),
            MagicMock(),  # of a function that a test has patched
        ):
            check_result(result, handler=f"ignored-{handler}")
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(" type=")[0] for line in said] == [
        "handler_result_ignored handler=ignored-first",
        "handler_result_ignored handler=ignored-second",
    ]


def test_nothing_returned_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    check_result(None, handler="silent")
    assert not caplog.records


def test_a_batch_handler_may_return_nothing_at_all() -> None:
    for result in ([], {}, object(), ["A-1"]):
        with pytest.raises(Misuse, match="nothing was committed"):
            check_result(result, in_lists=True)
    check_result(None, in_lists=True)


# -- annotations -----------------------------------------------------------------------------------------------------


def plain(order: dict[str, Any]) -> Any: ...


async def awaited(order: dict[str, Any]) -> Any: ...


def annotated(function: Any, annotation: object) -> Any:
    copied = FunctionType(function.__code__, globals(), function.__name__, None, function.__closure__)
    copied.__annotations__ = {"order": dict, "return": annotation}
    return copied


def planned(function: Callable[..., object], **options: Any) -> None:
    caller = sys._getframe(1)
    plan(function, topic="orders", key="no", caller_locals=caller.f_locals, caller_globals=caller.f_globals, **options)


@pytest.mark.parametrize("function", [plain, awaited])
@pytest.mark.parametrize(
    "annotation",
    [
        *(
            bool,
            int,
            float,
            complex,
            Decimal,
            str,
            bytes,
            bytearray,
            memoryview,
            Enum,
            ConsumeResult,
            ConsumeStatus,
            Said,
        ),
        *(bool | None, Optional[str], Union[Model, int], Model | None | bool, ConsumeResult | None),  # noqa: UP007, UP045
        *(Literal["ok", "later"], Literal[True], Literal[None, 1], Literal[ConsumeResult.SUCCESS]),
        *(Annotated[bool, "said"], Annotated[bool | None, "said"], Optional[Annotated[int, 1]], Count, Text),  # noqa: UP045
        *("bool", "ConsumeResult", "ConsumeResult | None", "Optional[bool]", "Literal['ok']", "Annotated[str, 1]"),
        *(ValueError, Reject, "Model | Exception", Outcome, HTTPStatus),
    ],
    ids=str,
)
def test_a_handler_annotated_to_answer_is_refused_at_import(function: Any, annotation: object) -> None:
    with pytest.raises(ConfigurationError, match=r"handler '\w+': it is annotated `-> .* nobody reads") as error:
        planned(annotated(function, annotation))
    assert "Write `-> None`; raise an exception to have the message tried again, Reject(reason)" in str(error.value)


@pytest.mark.parametrize("function", [plain, awaited])
@pytest.mark.parametrize(
    "annotation",
    [
        *(None, "None", Any, object, Model, "Model", Model | None, dict, dict[str, bool], list[int], tuple[bool, str]),
        *(
            "Answer",
            "Answer | bool",
            "no_such_name",
            "1/0",
            "not a type",
            5,
            (),
            TypeVar("T"),
            Callable[[], bool],
            Literal[None],
        ),
        *(type[bool], Annotated[None, "said"], Annotated[Model, bool]),
    ],
    ids=str,
)
def test_any_other_annotation_is_fine_and_one_that_cannot_be_resolved_too(function: Any, annotation: object) -> None:
    planned(annotated(function, annotation))


def test_no_annotation_is_fine() -> None:
    def handle(order: dict):  # type: ignore[no-untyped-def, type-arg]
        ...

    planned(handle)


@pytest.mark.parametrize(
    "annotation",
    [
        *(
            Awaitable[None],
            Coroutine[Any, Any, None],
            Generator[int, None, None],
            asyncio.Future,
            Future,
            Select,
            Query,
        ),
        *(Iterator[int], AsyncIterator[int], map, "Iterator[int]"),
    ],
)
def test_a_plain_handler_annotated_to_run_nothing_is_refused_at_import(annotation: object) -> None:
    with pytest.raises(ConfigurationError, match="calling it would run nothing"):
        planned(annotated(plain, annotation))


def test_what_a_coroutine_is_annotated_to_give_is_looked_at() -> None:
    planned(annotated(awaited, Coroutine[Any, Any, None]))
    with pytest.raises(ConfigurationError, match="nobody reads"):
        planned(annotated(awaited, Coroutine[Any, Any, bool]))


def test_methods_partials_and_callable_objects_are_looked_at_too() -> None:
    class Service:
        def handle(self, order: dict[str, Any]) -> bool:
            return True

        def __call__(self, order: dict[str, Any]) -> bool:
            return True

    functions: list[Any] = [
        Service().handle,
        Service(),
        functools.partial(annotated(plain, bool)),
        annotated(plain, bool),
    ]
    for function in functions:
        with pytest.raises(ConfigurationError, match="nobody reads"):
            planned(function, name="handle")


def test_a_decorator_that_makes_an_answer_an_exception_is_let_through() -> None:
    def raising(function: Callable[..., bool]) -> Callable[..., None]:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> None:
            if not function(*args, **kwargs):
                raise ValueError("not done")

        return called

    @raising
    def handle(order: dict[str, Any]) -> bool:
        return False

    planned(handle)


def test_a_batch_handler_annotated_to_answer_is_refused_at_import() -> None:
    def handle(orders: list[dict[str, Any]]) -> int:
        return len(orders)

    with pytest.raises(ConfigurationError, match="nobody reads"):
        planned(handle, batch=10, in_lists=True)
