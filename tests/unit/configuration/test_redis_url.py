"""Redis URLs: what is refused before anything is opened, and that a password is repeated by none of it."""

import traceback

import pytest

from exactly_once.errors import ConfigurationError
from exactly_once.redis.connection import RedisConnection, checked
from exactly_once.redis.errors import secrets, unfit

PASSWORD = "hunter2"


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "redis://h:6379/0",
        "redis://[::1]:6379/15",
        "redis://:pa%2Fss@h:6379/0",
        "redis://me:pass@h/0",
        "redis://h?db=3&password=x",
        "rediss://me:pass@h:6380/0?ssl_ca_certs=/etc/ca.pem&ssl_check_hostname=yes",
        "unix:///run/redis/redis.sock",
        "unix://me:pass@/run/redis.sock?db=2",
    ],
)
def test_what_the_client_understands_is_taken_as_it_is(url: str) -> None:
    assert checked(url) == url
    assert RedisConnection(url).problem  # nothing is opened


def test_the_scheme_is_taken_in_any_case_and_blanks_around_it_off() -> None:
    assert checked(" REDIS://H:6379/0\n") == "redis://H:6379/0"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("", "begins with redis://"),
        (f"{PASSWORD}@h:6379", "begins with redis://"),
        (f"redis:/{PASSWORD}@h", "begins with redis://"),
        (f"{PASSWORD}://h", "begins with redis://"),
        (f"redis+sentinel://:{PASSWORD}@h/0", "Sentinel"),
        (f"http://:{PASSWORD}@h/0", "begins with redis://"),
        ("redis://", "names no host"),
        (f"redis://:{PASSWORD}@/0", "names no host"),
        (f"redis://{PASSWORD}@h/0", "behind a colon"),
        (f"unix://{PASSWORD}@/run/redis.sock", "behind a colon"),
        (f"redis://:{PASSWORD}@h:port/0", "cannot be read"),
        (f"redis://:{PASSWORD}@h1:6379,h2:6379/0", "cannot be read"),
        (f"redis://:{PASSWORD}/x@h:6379/0", "%2F"),
        (f"redis://:{PASSWORD}?x@h:6379/0", "%3F"),
        (f"redis://:{PASSWORD}#x@h:6379/0", "%23"),
        (f"redis://:{PASSWORD}@[::1/0", "cannot be read"),
        (f"redis://:{PASSWORD}@h/orders", "number of a database"),
        (f"redis://:{PASSWORD}@h/0/1", "number of a database"),
        (f"redis://:{PASSWORD}@h/-1", "number of a database"),
        (f"redis://h?db=first&password={PASSWORD}", "number of a database"),
        (f"redis://h?passwort={PASSWORD}", "Did you mean 'password'"),
        (f"redis://:{PASSWORD}@h?decode_responses=true", "has no option 'decode_responses'"),
        (f"redis://:{PASSWORD}@h?ssl_ca_certs=/etc/ca.pem", "has no option 'ssl_ca_certs'"),
        (f"redis://:{PASSWORD}@h?db=", "is empty"),
        (f"unix://:{PASSWORD}@", "names a socket file"),
        (f"unix://:{PASSWORD}@run/redis.sock", "names a socket file"),
    ],
)
def test_what_is_wrong_is_refused_at_once_without_the_password(url: str, told: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        RedisConnection(url)
    assert told in str(raised.value)
    assert PASSWORD not in "".join(traceback.format_exception_only(raised.value))
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


@pytest.mark.parametrize("given", [None, 6379, b"redis://h", object()])
def test_what_is_no_text_is_refused(given: object) -> None:
    with pytest.raises(ConfigurationError, match="named by a URL"):
        checked(given)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        (f"redis://:{PASSWORD}@h:6379/0", "redis://:***@h:6379/0"),
        (f"rediss://me:{PASSWORD}@h:6379/0", "rediss://me:***@h:6379/0"),
        (f"redis://h:6379/0?password={PASSWORD}&db=1", "redis://h:6379/0?password=***&db=1"),
        (f"unix://:{PASSWORD}@/run/redis.sock", "unix://:***@/run/redis.sock"),
        (f"rediss://:{PASSWORD}@h?ssl_keyfile=/k.pem", "rediss://:***@h?ssl_keyfile=/k.pem"),
    ],
)
def test_the_name_is_the_url_without_its_password(url: str, name: str) -> None:
    assert RedisConnection(url).name == name
    assert secrets(url) == {PASSWORD}


@pytest.mark.parametrize(
    ("info", "told"),
    [
        ({"redis_version": "4.0.14"}, "version 4.0.14, and at least 5"),
        ({"redis_version": "2.8"}, "version 2.8"),
        ({"redis_version": "7.0.15", "cluster_enabled": "1"}, "Redis Cluster"),
        ({"redis_version": "5.0.0", "cluster_enabled": "0"}, None),
        ({"redis_version": "255.255.255"}, None),
        ({"redis_version": "unstable"}, None),
        ({}, None),
    ],
)
def test_a_server_too_old_or_of_a_cluster_is_unfit(info: dict[str, str], told: str | None) -> None:
    found = unfit(info, "redis://h")
    assert found is None if told is None else told in (found or "")
