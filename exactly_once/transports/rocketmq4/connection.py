"""What every native client of one transport is told: servers, keys, log files. Opens nothing; called by both clients."""

from exactly_once.transports.rocketmq4.library import LOG_ERROR, Library
from exactly_once.transports.rocketmq4.messages import Names

__all__ = ["Connection"]


class Connection:
    """What every native client of one transport is told."""

    def __init__(self, *, library: Library, name_servers: str, names: Names, keys: tuple[str, str] | None) -> None:
        self.library = library
        self.name_servers = name_servers
        self.names = names
        self._keys = keys

    def tell(self, kind: str, handle: int) -> None:
        """Set servers, keys and logs of a producer ("Producer") or a consumer ("PushConsumer")."""
        call, check = self.library.call, self.library.check
        setter = f"Set{kind}NameServerAddress"
        check(setter, getattr(call, setter)(handle, self.name_servers.encode()))
        if self._keys:
            setter = f"Set{kind}SessionCredentials"
            check(setter, getattr(call, setter)(handle, self._keys[0].encode(), self._keys[1].encode(), b""))
        # newer libraries listen to this; for older ones the library was told where home is
        setter = f"Set{kind}LogPath"
        check(setter, getattr(call, setter)(handle, self.library.logs.encode()))
        setter = f"Set{kind}LogLevel"
        check(setter, getattr(call, setter)(handle, LOG_ERROR))
