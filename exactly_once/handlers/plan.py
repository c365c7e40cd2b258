"""A handler's plan: everything about a decorated function that can be decided before the first message.

    @eo.handler(...) --> plan() --> Plan      once, at import: hints, parameters, key, fingerprint, body, checks
    message --> Plan.read --> Reading          per message: business key, fingerprint, body; never raises for a bad one
    Reading --> Plan.call --> the handler      arguments in the places decided before

A mistake in the program is a `ConfigurationError` at import, which says what to write instead. Never opens, claims, commits,
retries or logs, and never changes the function. Called by `registry` (plan), the router (matches), `configuration` (moved)
and `processing` (the rest).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Final, Literal, NamedTuple

from exactly_once.errors import BadBody, BadKey, ConfigurationError, ExactlyOnceError
from exactly_once.exceptions.stops import asked_from_outside
from exactly_once.handlers.body import NOT_JSON, Decoder, decoder, parse_json, shown, why_not_json, without_none
from exactly_once.handlers.body_paths import check_paths
from exactly_once.handlers.fingerprint import FingerprintRule, FingerprintSpec, differing_paths, maker
from exactly_once.handlers.guard_options import GuardOption, Lease, Lock, Transaction, check_guard
from exactly_once.handlers.hints import Hints
from exactly_once.handlers.options import (
    check_after_dead,
    check_batch,
    check_concurrency,
    check_flag,
    check_handler_name,
    check_linger,
    check_tags,
    check_topic,
)
from exactly_once.handlers.parameters import NO_BODY, Parameters, Values, parameters
from exactly_once.handlers.results import check_result
from exactly_once.handlers.retry import Retry, RetrySpec, check_retry
from exactly_once.keys import KeyRule, KeySpec, Path, extractor
from exactly_once.message import Message
from exactly_once.wording.text import escaped

__all__ = ["Lease", "Lock", "Plan", "Reading", "Transaction", "check_result", "plan"]


class Reading(NamedTuple):
    """One message as a handler's plan reads it. With an `error` the handler must not run."""

    key: str | None
    fingerprint: bytes
    body: Any
    error: ExactlyOnceError | None
    order: str = ""
    """Its place in a batch, by `batch_order=`. Empty: none."""


LINGER: Final = timedelta(milliseconds=5)
"""How long a message waits for others in its batch, by default."""
_NO_BODY: Final = Decoder(lambda body, parsed: None, False)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """All that was decided about one handler. Made by `plan`."""

    function: Callable[..., object]
    """The function as it was decorated."""
    name: str
    topic: str
    tags: tuple[str, ...]
    """Sorted. Empty: every tag, and messages without a tag."""
    guard: GuardOption
    retry: RetrySpec
    ordered: bool
    after_dead: Literal["wait", "go on"]
    concurrency: int | None
    batch: int | None
    """The most messages in one transaction. None: each message has its own transaction."""
    batch_order: KeyRule | None
    """The value by which the messages of one transaction are sorted."""
    linger: timedelta
    in_lists: bool
    """One call handles the whole batch."""
    key: KeyRule
    fingerprint: FingerprintRule
    _parameters: Parameters
    _decoder: Decoder
    _needs_json: bool = field(init=False)
    """Whether anything is read from the JSON of a message."""

    def __post_init__(self) -> None:
        readers = (self.key, self.fingerprint, self._decoder, self.batch_order)
        object.__setattr__(self, "_needs_json", any(each is not None and each.needs_json for each in readers))

    @property
    def is_async(self) -> bool:
        """Whether the handler's result must be awaited."""
        return self._parameters.is_async

    @property
    def session_type(self) -> type[Any] | None:
        """The annotation of the session parameter: Session, AsyncSession or a subclass. None: no such parameter."""
        return self._parameters.session_type

    @property
    def body_annotation(self) -> Any:
        """The annotation of the body parameter. `NO_BODY`: no such parameter."""
        return self._parameters.body_annotation

    @property
    def takes_session(self) -> bool:
        """Whether the handler asks for a session."""
        return self.session_type is not None

    @property
    def takes_steps(self) -> bool:
        """Whether the handler asks for steps."""
        return self._parameters.takes_steps

    @property
    def key_has_tag(self) -> bool:
        """Whether the tag is part of the business key."""
        return self.key.has_tag

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed but probably wrong. Logged once, at start."""
        return tuple(_warnings(self))

    def matches(self, message: Message) -> bool:
        """Whether this handler wants the message."""
        return message.topic == self.topic and (not self.tags or message.tag in self.tags)

    def moved(
        self,
        *,
        topic: str | None = None,
        tag: str | Sequence[str] | None = None,
        retry: RetrySpec | None = None,
        concurrency: int | None = None,
    ) -> "Plan":
        """Return this plan with the values of the settings file. None keeps the value from the code."""
        return replace(
            self,
            topic=self.topic if topic is None else check_topic(topic),
            tags=self.tags if tag is None else check_tags(tag),
            retry=self.retry if retry is None else check_retry(retry),
            concurrency=self.concurrency if concurrency is None else check_concurrency(concurrency),
        )

    def read(self, message: Message) -> Reading:
        """Return key, fingerprint and body of a message. If it cannot be read, the reason is in `error`; nothing is raised.

        If the body is not valid but its JSON has the key, the reading has key and fingerprint beside the error: the dead letter
        is then kept under its key. Without a key the fingerprint is of the whole body, whatever `fingerprint=` is: the message is
        then known by its id, which other messages may share.
        """
        parsed = parse_json(message.body) if self._needs_json else NOT_JSON
        error: ExactlyOnceError | None = None
        key: str | None = None
        made, body = b"", None
        try:
            made = self.fingerprint.of(message, parsed)
        except BadBody as bad:
            error = bad
        except RecursionError:  # parsed, but near the limit of nesting: that of C code differs between Python versions
            error = BadBody("the body is JSON that is nested too deeply")
        try:
            key = self.key.of(message, parsed)
        except BadKey as bad:
            unread = parsed is NOT_JSON and self.key.needs_json and message.body is not None
            error = why_not_json(message.body) if unread else bad
            made = _of_all(message, parsed)
        if error is None:
            try:
                body = self._decoder.read(message.body, parsed)
            except BadBody as bad:
                error = bad
            except BaseException as failed:  # a validator of the user's model raised; the message is kept all the same
                if asked_from_outside(failed):
                    raise
                error = BadBody(f"reading the body failed with {type(failed).__name__}, raised by the body's own model")
                error.__cause__ = failed
        order = self.batch_order
        if order is None:
            return Reading(key, made, body, error)
        try:
            place = order.of(message, parsed)
        except BadKey:  # the message names no row that it locks
            place = ""
        return Reading(key, made, body, error, place)

    def call(self, session: Any, reading: Reading, message: Message, steps: Any = None) -> object:
        """Call the handler with what it asks for. The caller must await the result of an async handler."""
        if self.in_lists:
            return self.call_with_lists(session, [(reading, message)])
        return self._filled((session, reading.body, message, steps))

    def call_with_lists(self, session: Any, batch: Sequence[tuple[Reading, Message]]) -> object:
        """Call a batch handler once for several messages. The caller must await the result of an async handler."""
        messages: Any = [message for _, message in batch]
        return self._filled((session, [reading.body for reading, _ in batch], messages, None))

    def _filled(self, values: Values) -> object:
        parameters = self._parameters
        if parameters.named:
            named = {name: values[place] for name, place in parameters.named}
            return self.function(*parameters.positional(values), **named)
        return self.function(*parameters.positional(values))

    def explain_conflict(self, stored: bytes, message: Message, key: str) -> str:
        """Return what differs between a message and the one its key was consumed with, and which setting would accept it.

        Args:
            stored: The fingerprint stored with the consumed key.
            message: The present message.
            key: Its business key.
        """
        parsed = parse_json(message.body)
        paths = differing_paths(stored, self.fingerprint, message, parsed)
        named = tuple(escaped(path) for path in paths or ())
        text = f"the business key '{escaped(key)}' of handler {self.name!r} was consumed with another payload"
        text += f". Different: {', '.join(named[:20])}" if named else "; which parts differ is not known"
        different = {path.partition(".")[0] for path in paths or ()}
        same = [name for name in sorted(parsed) if name not in different] if isinstance(parsed, dict) and paths else []
        if same and not self.fingerprint.paths and len(same) <= 20 and self.fingerprint.needs_json:
            return f"{text}. If that is allowed, write fingerprint={same!r} (or None, to compare nothing)"
        return f"{text}. If that is allowed, name in fingerprint= what must stay the same, or None to compare nothing"


def _of_all(message: Message, parsed: object) -> bytes:
    try:
        return _WHOLE.of(message, parsed)
    except RecursionError:
        return _WHOLE.of(message, NOT_JSON)


_WHOLE: Final = maker("body")


def plan(
    function: Callable[..., object],
    *,
    topic: str,
    tag: str | Sequence[str] | None = None,
    key: KeySpec,
    name: str | None = None,
    guard: GuardOption | None = None,
    retry: RetrySpec | None = None,
    fingerprint: FingerprintSpec = "body",
    ordered: bool = False,
    after_dead: Literal["wait", "go on"] = "wait",
    concurrency: int | None = None,
    batch: int | None = None,
    batch_order: KeySpec | None = None,
    linger: timedelta | None = None,
    in_lists: bool = False,
    caller_locals: Mapping[str, Any] | None = None,
    caller_globals: Mapping[str, Any] | None = None,
) -> Plan:
    """Decide everything about a handler.

    Args:
        function: A plain or `async def` function, partial, bound method or callable object.
        topic: The topic it consumes.
        tag: None for every tag, one tag, several, or "a || b".
        key: Where the business key stands; see `exactly_once.keys`.
        name: Identifies the handler in the tables. By default the function's own name.
        guard: `Transaction()` by default, `Lease(...)` or `Lock(...)`.
        retry: `Retry()` by default, or one for each of several exception classes.
        fingerprint: What makes two messages of one key the same; see `exactly_once.handlers.fingerprint`.
        ordered: Keep the messages of one ordering key in order.
        after_dead: For ordered handlers: whether messages wait behind a dead message.
        concurrency: The most runs at a time in one process.
        batch: The most messages in one transaction.
        batch_order: Names the row that a message locks.
        linger: How long a message waits for others. None: `LINGER`.
        in_lists: One call handles a whole batch.
        caller_locals: The local names at the place of the decorator.
        caller_globals: The global names there.

    Raises:
        ConfigurationError: The function or an option is wrong; the text says what to write instead.
    """
    found = check_handler_name(function, name)
    try:
        return _plan(
            function,
            Hints(function, caller_locals or {}, caller_globals or {}),
            name=found,
            topic=check_topic(topic),
            tags=check_tags(tag),
            key=extractor(key),
            guard=check_guard(guard),
            retry=check_retry(Retry() if retry is None else retry),
            fingerprint=maker(fingerprint),
            ordered=check_flag("ordered", ordered),
            after_dead=check_after_dead(after_dead),
            concurrency=check_concurrency(concurrency),
            batch=check_batch(batch),
            batch_order=None if batch_order is None else extractor(batch_order, "batch_order"),
            linger=check_linger(linger),
            in_lists=in_lists,
        )
    except ConfigurationError as error:
        # chained to the original cause, if any: the traceback of `error` would print the same text again, with lines of ours
        raise ConfigurationError(f"handler {found!r}: {error}") from error.__cause__


def _plan(
    function: Callable[..., object], hints: Hints, *, key: KeyRule, fingerprint: FingerprintRule, **decided: Any
) -> Plan:
    found = parameters(function, hints, in_lists=decided["in_lists"])
    _check_group(**decided)
    decided["linger"] = LINGER if decided["linger"] is None else decided["linger"]
    if found.takes_steps and not isinstance(decided["guard"], Lease):
        raise ConfigurationError(
            "it asks for steps, which are kept under a lease: write guard=Lease(timedelta(minutes=10)). Under the transaction"
            " guard everything it does in its session is one step already"
        )
    reading = _NO_BODY
    if found.body_annotation is not NO_BODY:
        reading = _body(found.body_name, found.body_annotation, hints)
        key_paths = [part for part in key.parts if isinstance(part, Path)]
        check_paths(found.body_annotation, key_paths, option="key", as_key=True)
        order: KeyRule | None = decided["batch_order"]
        order_paths = [part for part in order.parts if isinstance(part, Path)] if order is not None else []
        check_paths(found.body_annotation, order_paths, option="batch_order", as_key=True)
        check_paths(found.body_annotation, fingerprint.paths, option="fingerprint", as_key=False)
    return Plan(
        function=function,
        key=key,
        fingerprint=fingerprint,
        _parameters=found,
        _decoder=reading,
        **decided,
    )


def _check_group(
    *,
    guard: GuardOption,
    batch: int | None,
    batch_order: KeyRule | None,
    linger: timedelta | None,
    in_lists: bool,
    **_: Any,
) -> None:
    if in_lists and batch is None:
        raise ConfigurationError("a batch_handler needs batch=, the most messages in one list, such as batch=500")
    if batch is not None and not isinstance(guard, Transaction):
        raise ConfigurationError(
            "messages can share a transaction under the transaction guard only: take"
            f" guard={type(guard).__name__}(...) away, or write @eo.handler without batch="
        )
    for option, value in (("batch_order", batch_order), ("linger", linger)):
        if batch is None and value is not None:
            raise ConfigurationError(f"{option}= needs batch=: without it each message has a transaction of its own")


def _body(name: str, annotation: Any, hints: Hints) -> Decoder:
    try:
        return decoder(annotation, hints.names)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"`{name}: {shown(annotation)}` is neither Session, AsyncSession nor Message, so it must be the body, and "
            f"{error}. A dependency of your own gets a default, or is bound with functools.partial"
        ) from error.__cause__


def _warnings(plan: Plan) -> Iterator[str]:
    if len(plan.tags) > 1 and not plan.key.has_tag and not plan.key.opaque:
        yield (
            f"handler {plan.name!r} takes several tags ({', '.join(plan.tags)}), and its key does not tell them apart: the "
            "second event on one thing would be taken for a duplicate of the first. Put the tag into the key: "
            "key=(keys.tag(), ...)"
        )
    if plan.body_annotation is not NO_BODY and plan.key.needs_json:
        _, optional = without_none(plan.body_annotation)
        if optional:
            yield (
                f"handler {plan.name!r} takes messages without a body, and its key stands in the body: they would be kept "
                "as dead letters without a key. Use key=keys.message_key()"
            )
