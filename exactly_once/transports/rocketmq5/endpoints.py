"""Where the proxies are, and whether one of them can be reached. Imports nothing of the client."""

import socket
from dataclasses import dataclass, field
from typing import Final

__all__ = ["Endpoints", "reachable"]

CONNECT_TIMEOUT_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the proxies are, as `host:port`, and as whom we come. Printed without the secret."""

    addresses: tuple[str, ...]
    namespace: str = ""
    access_key: str = ""
    secret_key: str = field(default="", repr=False)

    def __str__(self) -> str:
        return ",".join(self.addresses)

    def named(self, resource: str) -> str:
        """Return the name of this topic or group on the wire and in the broker's own tools."""
        return f"{self.namespace}%{resource}" if self.namespace else resource


def reachable(proxies: Endpoints) -> str | None:
    """Try to connect to one of the endpoints; None when one accepts, else why the last did not.

    A fresh TCP connection asks the network now. The client's channel would not: after failures it waits up to two
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
