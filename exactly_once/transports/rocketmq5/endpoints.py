"""The addresses of the proxies, and whether one of them can be reached. Imports nothing of the client."""

import socket
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

__all__ = ["Endpoints", "not_grpc", "reachable"]

CONNECT_TIMEOUT_S: Final = 1.0
ANSWER_TIMEOUT_S: Final = 2.0
# The first bytes of every HTTP/2 connection, on which gRPC is built (RFC 9113, 3.4); the server answers with its settings.
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
_SETTINGS: Final = 4
_FRAME_HEAD_BYTES: Final = 9


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The addresses of the proxies, as `host:port`, and our credentials. Printed without the secret."""

    addresses: tuple[str, ...]
    namespace: str = ""
    access_key: str = ""
    secret_key: str = field(default="", repr=False)

    def __str__(self) -> str:
        return ",".join(self.addresses)

    def named(self, resource: str) -> str:
        """Return the name of this topic or group in the protocol and in the broker's own tools."""
        return f"{self.namespace}%{resource}" if self.namespace else resource


def reachable(proxies: Endpoints) -> str | None:
    """Try to connect to one of the endpoints. None if one accepts, else why the last did not.

    A new TCP connection tests the network now. The client's channel would not: after failures it waits up to two
    minutes before it tries again, and it "starts" with no server at all.
    """
    reason = "no endpoint was given"
    for endpoint in proxies.addresses:
        host, _, port = endpoint.rpartition(":")
        try:
            with socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S):
                return None
        except OSError as error:
            reason = f"{endpoint}: {error.strerror or error}"
    return reason


def not_grpc(proxies: Endpoints) -> str | None:
    """Say that one of the endpoints accepts but does not speak gRPC, and whose port it may be. None if each speaks it.

    Asked only after a call has failed: for a healthy proxy it would be a needless connection.
    """
    for endpoint in proxies.addresses:
        host, _, port = endpoint.rpartition(":")
        try:
            connection = socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S)
        except OSError:
            continue  # nobody listens, which is reported elsewhere
        said = b""
        with connection, suppress(OSError):  # a timeout, or a reset
            connection.settimeout(ANSWER_TIMEOUT_S)
            connection.sendall(_PREFACE)
            while len(said) < _FRAME_HEAD_BYTES and (more := connection.recv(_FRAME_HEAD_BYTES)):
                said += more
        if len(said) < _FRAME_HEAD_BYTES or said[3] != _SETTINGS:
            return (
                f"Something listens at {endpoint} and does not speak gRPC. Is it a name server (9876) or a broker (10911)?"
                " rocketmq:// wants the proxy (8081); rocketmq4:// takes name servers."
            )
    return None
