"""The settings of every native client of one transport: servers, keys, log files. Opens nothing; called by both clients."""

from exactly_once.transports.rocketmq4.library import LOG_ERROR, Library
from exactly_once.transports.rocketmq4.messages import Names

__all__ = ["Connection"]


class Connection:
    """The settings of every native client of one transport."""

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
        # Newer libraries use this path; for older ones HOME was set while the library was loaded.
        setter = f"Set{kind}LogPath"
        check(setter, getattr(call, setter)(handle, self.library.logs.encode()))
        setter = f"Set{kind}LogLevel"
        check(setter, getattr(call, setter)(handle, LOG_ERROR))
