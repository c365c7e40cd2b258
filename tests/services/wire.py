"""Finds statements and answers in a database's wire protocol: just enough for the proxy to know what passes through it.

It opens nothing. Sources: "Frontend/Backend Protocol" in PostgreSQL's documentation; "Client/Server Protocol" in MariaDB's;
"Redis serialization protocol specification" in Redis'.
Encrypted connections cannot be read; the servers of these tests offer none.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Request", "Speech", "speech_for"]


@dataclass(frozen=True, slots=True)
class Request:
    """One message of the client's; `answered_as` is what `from_server` returns once it was carried out."""

    frame: bytes
    statement: bytes = b""
    answered_as: int = 0


class Speech(Protocol):
    """One connection's conversation; each method is called by one thread."""

    def from_client(self, data: bytes) -> Iterator[Request]:
        """Cut the client's stream into messages; an incomplete one waits for the rest."""

    def from_server(self, data: bytes) -> int:
        """Return how many of the client's questions have been answered by now."""


def speech_for(backend: str) -> Speech:
    """Return the protocol of a SQLAlchemy backend name, or of `redis`."""
    return {"postgresql": PostgresSpeech, "redis": RedisSpeech}.get(backend, MariaDBSpeech)()


class PostgresSpeech:
    """PostgreSQL: each Query and each Sync is answered by one ReadyForQuery, in order, and so is the startup."""

    ENCRYPTION_REQUESTS = (80877103, 80877104)  # SSLRequest, GSSENCRequest: answered by one bare byte

    def __init__(self) -> None:
        self._requests, self._replies = bytearray(), bytearray()
        self._started = False
        self._bare_answers = 0
        self._asked = self._answered = 0

    def from_client(self, data: bytes) -> Iterator[Request]:
        self._requests += data
        while frame := self._next_frame(self._requests, typed=self._started):
            if not self._started:
                yield self._startup(frame)
            elif frame[:1] == b"Q":
                self._asked += 1
                yield Request(frame, frame[5:-1], self._asked)
            elif frame[:1] == b"P":  # Parse: name, statement; it is carried out by the Sync that follows
                statement = frame[5:].split(b"\0", 2)[1]
                yield Request(frame, statement, self._asked + 1)
            else:
                self._asked += frame[:1] in (b"S", b"F")
                yield Request(frame)

    def from_server(self, data: bytes) -> int:
        self._replies += data
        while self._bare_answers and self._replies:
            del self._replies[:1]
            self._bare_answers -= 1
        while frame := self._next_frame(self._replies, typed=True):
            self._answered += frame[:1] == b"Z"
        return self._answered

    def _startup(self, frame: bytes) -> Request:
        (code,) = struct.unpack_from(">I", frame, 4)
        if code in self.ENCRYPTION_REQUESTS:
            self._bare_answers += 1
        else:
            self._started = True
            self._asked += 1
        return Request(frame)

    @staticmethod
    def _next_frame(stream: bytearray, *, typed: bool) -> bytes:
        head = 1 if typed else 0
        if len(stream) < head + 4:
            return b""
        (length,) = struct.unpack_from(">I", stream, head)
        if len(stream) < head + length:
            return b""
        frame = bytes(stream[: head + length])
        del stream[: head + length]
        return frame


class MariaDBSpeech:
    """MariaDB and MySQL: strictly one command, then its answer; a command starts a new sequence at 0."""

    COM_QUERY = 3

    def __init__(self) -> None:
        self._requests = bytearray()
        self._asked = self._answered = 0

    def from_client(self, data: bytes) -> Iterator[Request]:
        self._requests += data
        while len(self._requests) >= 4:
            length = 4 + int.from_bytes(self._requests[:3], "little")
            if len(self._requests) < length:
                return
            frame = bytes(self._requests[:length])
            del self._requests[:length]
            is_command = frame[3] == 0 and length > 4
            self._asked += is_command
            if is_command and frame[4] == self.COM_QUERY:
                yield Request(frame, frame[5:], self._asked)
            else:
                yield Request(frame)

    def from_server(self, data: bytes) -> int:
        self._answered = self._asked  # the first byte of an answer is proof enough that it was carried out
        return self._answered


class RedisSpeech:
    """Redis, of a client that waits for each answer: a command is an array of words, its statement these with blanks between."""

    def __init__(self) -> None:
        self._requests = bytearray()
        self._asked = self._answered = 0

    def from_client(self, data: bytes) -> Iterator[Request]:
        self._requests += data
        while (words := self._next_words()) is not None:
            frame, spoken = words
            self._asked += 1
            yield Request(frame, b" ".join(spoken), self._asked)

    def from_server(self, data: bytes) -> int:
        self._answered = self._asked  # as with MariaDB
        return self._answered

    def _next_words(self) -> tuple[bytes, list[bytes]] | None:
        """The first command and its words, taken off the stream; None where it is not complete yet."""
        stream, words = bytes(self._requests), []
        head, end, rest = stream.partition(b"\r\n")
        if not end:
            return None
        for _ in range(int(head[1:])):
            size, end, rest = rest.partition(b"\r\n")
            length = int(size[1:]) if end else 0
            if not end or len(rest) < length + 2:
                return None
            words.append(rest[:length])
            rest = rest[length + 2 :]
        frame = stream[: len(stream) - len(rest)]
        del self._requests[: len(frame)]
        return frame, words
