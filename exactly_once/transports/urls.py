"""Parses a transport's URL, and prints it without its secrets. Connects to nothing; each `from_url` calls it.

The standard library's parser takes one host only, so `rocketmq4://ns1:9876,ns2:9876?namespace=x` is parsed here.
A secret never appears in an error, in `str()` or in `repr()` of the result.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote

from exactly_once.errors import ConfigurationError

__all__ = ["ParsedURL", "parse"]

_MASK = "***"


@dataclass(frozen=True, slots=True, repr=False)
class ParsedURL:
    """A parsed transport URL.

    Args:
        scheme: In lower case, such as `rocketmq`.
        hosts: Every (host, port) in the order written; port 0 if none was written and there is no default.
        options: What follows the question mark, decoded; a `NAME_file` is replaced by `NAME` and the file's text.
        secrets: The names in `options` whose values are never printed.
    """

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    options: Mapping[str, str] = field(default_factory=dict, hash=False)
    secrets: frozenset[str] = frozenset()

    def __str__(self) -> str:
        """Return the URL in a printable form: secrets as ***."""
        hosts = ",".join(_host_text(host, port) for host, port in self.hosts)
        options = "&".join(f"{name}={_MASK if name in self.secrets else text}" for name, text in self.options.items())
        return f"{self.scheme}://{hosts}{'?' if options else ''}{options}"

    def __repr__(self) -> str:
        return f"<ParsedURL {self}>"

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Each host as `host:port`, an IPv6 address in brackets."""
        return tuple(_host_text(host, port) for host, port in self.hosts)

    def seconds(self, name: str, default: timedelta) -> timedelta:
        """Return an option written in seconds, such as `invisible_s=60`.

        Raises:
            ConfigurationError: It is no number above zero.
        """
        text = self.options.get(name)
        if text is None:
            return default
        try:
            span = timedelta(seconds=float(text))
        except (ValueError, OverflowError):
            span = timedelta(0)
        if span <= timedelta(0):
            raise self._wrong(name, "a number of seconds above zero, such as 60 or 0.5")
        return span

    def whole(self, name: str, default: int) -> int:
        """Return an option that is a whole number above zero.

        Raises:
            ConfigurationError: It is no such number.
        """
        text = self.options.get(name)
        if text is None:
            return default
        if not (text.isascii() and text.isdigit() and int(text) > 0):
            raise self._wrong(name, "a whole number above zero")
        return int(text)

    def flag(self, name: str, default: bool) -> bool:
        """Return an option that is yes or no, written as true, false, yes, no, on, off, 1 or 0.

        Raises:
            ConfigurationError: It is none of these.
        """
        text = self.options.get(name, "").lower()
        if not text:
            return default
        if text in ("true", "yes", "on", "1"):
            return True
        if text in ("false", "no", "off", "0"):
            return False
        raise self._wrong(name, "true or false")

    def _wrong(self, name: str, wanted: str) -> ConfigurationError:
        given = _MASK if name in self.secrets else repr(self.options[name])
        return ConfigurationError(f"The option {name} of {self} must be {wanted}, not {given}.")


def parse(url: str, *, options: Iterable[str] = (), secrets: Iterable[str] = (), default_port: int = 0) -> ParsedURL:
    """Parse a URL, and refuse what its transport does not know.

    Args:
        url: `scheme://host:port,host:port?name=value&name=value`. Values are percent-decoded; a plus sign stays a plus sign.
        options: Names that may follow the question mark.
        secrets: More such names, whose values are never printed. Each may also be given as `NAME_file`, a path to read.
        default_port: For a host written without a port.

    Returns:
        The parts; `str()` of it is safe to print.

    Raises:
        ConfigurationError: An unknown or repeated option, a bad port, a user before the host, an unreadable file.

    Example:
        >>> print(parse("rocketmq4://ns1,ns2:9877?secret_key=x", secrets=["secret_key"], default_port=9876))
        rocketmq4://ns1:9876,ns2:9877?secret_key=***
    """
    scheme, colon, rest = url.partition("://")
    scheme = scheme.lower()
    if not colon:
        raise ConfigurationError("A transport's URL is written SCHEME://HOST:PORT; what was given has no '://'.")
    place, _, query = rest.partition("?")
    place = place.rstrip("/")
    secret_names = frozenset(secrets)
    if "@" in place:
        # The text before the @ may be a password: nothing of this part is repeated.
        names = f" ({', '.join(sorted(secret_names))})" if secret_names else ""
        raise ConfigurationError(
            f"A {scheme} URL has no user or password before the host: they are options{names} behind a question mark."
        )
    if "/" in place:
        raise ConfigurationError(f"A {scheme} URL has no path: write {scheme}://{place.partition('/')[0]}.")
    found = _options(scheme, query, frozenset(options) | secret_names, secret_names)
    hosts = tuple(_host(scheme, part.strip(), default_port) for part in place.split(",")) if place else ()
    return ParsedURL(scheme, hosts, found, secret_names)


def _options(scheme: str, query: str, known: frozenset[str], secrets: frozenset[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    secret: str | None = None
    for part in filter(None, query.split("&")):
        name, _, text = part.partition("=")
        name, text = unquote(name), unquote(text)
        from_file = name.endswith("_file") and name.removesuffix("_file") in secrets
        target = name.removesuffix("_file") if from_file else name
        if target not in known:
            names = ", ".join(sorted([*known, *(f"{secret}_file" for secret in secrets)]))
            knows = f"It knows: {names}." if names else "It takes no options."
            if secret is not None:  # it may be the rest of that secret: nothing of it is repeated
                raise ConfigurationError(
                    f"Behind the option {secret} of the {scheme} URL stands one that it does not know, and that may be the rest"
                    f" of the {secret}: there an & is written %26. {knows}"
                )
            raise ConfigurationError(f"A {scheme} URL has no option {name!r}. {knows}")
        if target in found:
            raise ConfigurationError(f"The option {target} stands twice in the {scheme} URL; keep one.")
        if from_file:
            text = _read(name, text)
        if not text:
            raise ConfigurationError(f"The option {name} of the {scheme} URL is empty; set it or leave it out.")
        found[target] = text
        if name in secrets:
            secret = secret or name
    return found


def _read(name: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigurationError(f"The file {path!r} named by {name} cannot be read: {error}.") from error


def _host(scheme: str, part: str, default_port: int) -> tuple[str, int]:
    if part.startswith("["):  # an IPv6 address contains colons
        host, _, tail = part[1:].partition("]")
        port_text = tail.removeprefix(":")
    else:
        host, _, port_text = part.partition(":")
    if not host:
        raise ConfigurationError(f"The {scheme} URL has a host without a name; write HOST:PORT, several with commas.")
    if not port_text:
        return unquote(host), default_port
    if not (port_text.isascii() and port_text.isdigit() and 0 < int(port_text) < 65536):
        raise ConfigurationError(f"The port {port_text!r} of host {host!r} is no number from 1 to 65535.")
    return unquote(host), int(port_text)


def _host_text(host: str, port: int) -> str:
    text = f"[{host}]" if ":" in host else host
    return f"{text}:{port}" if port else text
