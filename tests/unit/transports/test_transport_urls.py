"""A transport's URL: several hosts, options, secrets that are never printed, and errors that name what is known."""

from pathlib import Path

import pytest

from exactly_once.errors import ConfigurationError
from exactly_once.transports.contract import Surroundings
from exactly_once.transports.registry import ENTRY_POINTS, SCHEMES, transport_from
from exactly_once.transports.urls import parse


def test_several_hosts_keep_their_order_and_take_the_default_port() -> None:
    parsed = parse("rocketmq4://ns1:9877,ns2,[::1]:9878?namespace=x", options=["namespace"], default_port=9876)
    assert parsed.hosts == (("ns1", 9877), ("ns2", 9876), ("::1", 9878))
    assert parsed.endpoints == ("ns1:9877", "ns2:9876", "[::1]:9878")
    assert parsed.options == {"namespace": "x"}


def test_a_secret_is_kept_and_never_printed() -> None:
    parsed = parse("rocketmq://h:1?access_key=me&secret_key=a%2Bb+c%26", options=["access_key"], secrets=["secret_key"])
    assert parsed.options["secret_key"] == "a+b+c&"
    for printed in (str(parsed), repr(parsed), f"{parsed}"):
        assert "a+b" not in printed
        assert "secret_key=***" in printed
        assert "access_key=me" in printed


def test_a_secret_may_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("from a file\n")
    parsed = parse(f"rocketmq://h:1?secret_key_file={file}", secrets=["secret_key"])
    assert parsed.options == {"secret_key": "from a file"}
    assert "from a file" not in str(parsed)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("h:1", "://"),
        ("rocketmq://h:1?colour=red", "It knows: namespace, secret_key, secret_key_file."),
        ("rocketmq://h:1?namespace=a&namespace=b", "stands twice"),
        ("rocketmq://h:1?namespace=", "is empty"),
        ("rocketmq://h:1?secret_key=hidden&secret_key_file=x", "stands twice"),
        ("rocketmq://h:1?secret_key_file=/no/such/file", "cannot be read"),
        ("rocketmq://h:0", "no number from 1"),
        ("rocketmq://h:99999", "no number from 1"),
        ("rocketmq://h:1,,g:2", "without a name"),
        ("rocketmq://h:1/path", "no path"),
        ("rocketmq://me:hidden@h:1", "no user or password"),
        ("rocketmq://h:1?namespace_file=x", "no option 'namespace_file'"),
    ],
)
def test_what_is_not_understood_is_an_error_that_says_what_is_known(url: str, says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(url, options=["namespace"], secrets=["secret_key"])
    assert says in str(caught.value)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf", "nan", "1e400"])
def test_an_option_in_seconds_is_a_number_above_zero(text: str) -> None:
    from datetime import timedelta

    parsed = parse(f"sql://?invisible_s={text}", options=["invisible_s"])
    with pytest.raises(ConfigurationError, match="invisible_s"):
        parsed.seconds("invisible_s", timedelta(seconds=60))


@pytest.mark.parametrize(("text", "value"), [("true", True), ("No", False), ("1", True), ("off", False)])
def test_a_flag_is_written_in_several_ways(text: str, value: bool) -> None:
    assert parse(f"sql://?x={text}", options=["x"]).flag("x", not value) is value


def test_an_unknown_scheme_names_the_known_ones_and_no_secret() -> None:
    with pytest.raises(ConfigurationError) as caught:
        transport_from("kafka://h:1?secret_key=hidden", Surroundings())
    assert "'kafka'" in str(caught.value)
    assert all(f"{scheme}://" in str(caught.value) for scheme in SCHEMES)
    with pytest.raises(ConfigurationError) as caught:
        transport_from("me:hidden@h:1", Surroundings())
    assert "hidden" not in str(caught.value)


# -- transports of other distributions -----------------------------------------------------------------------------------

_THEIRS = """
from exactly_once.transports.memory import MemoryTransport

class Theirs(MemoryTransport):
    @classmethod
    def from_url(cls, url, surroundings):
        return cls(url)

no_class = None
"""


def _install(site: Path, name: str, *lines: str) -> None:
    """Write what pip writes of a distribution that names transports."""
    metadata = site / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("\n".join([f"[{ENTRY_POINTS}]", *lines]))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "their_transport.py").write_text(_THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_another_distribution_names_its_transport_and_its_url_is_as_any_other(site: Path) -> None:
    _install(site, "theirs", "Their = their_transport:Theirs")
    assert type(transport_from("their://a/b?c", Surroundings())).__name__ == "Theirs"
    with pytest.raises(ConfigurationError, match="sql://, their://"):
        transport_from("kafka://h:1", Surroundings())


def test_no_other_distribution_takes_the_place_of_a_transport_of_ours(site: Path) -> None:
    _install(site, "theirs", "memory = their_transport:Theirs")
    assert type(transport_from("memory://ours", Surroundings())).__name__ == "MemoryTransport"


def test_of_two_distributions_with_one_scheme_none_is_chosen_in_silence(site: Path) -> None:
    _install(site, "theirs", "their = their_transport:Theirs")
    _install(site, "others", "THEIR = other:Transport")
    with pytest.raises(ConfigurationError) as refused:
        transport_from("their://a", Surroundings())
    assert "others (other:Transport), theirs (their_transport:Theirs)" in str(refused.value)


@pytest.mark.parametrize("value", ["gone:Theirs", "their_transport:Gone", "their_transport:no_class"])
def test_a_transport_that_another_distribution_names_and_does_not_have_is_told_with_its_name(
    site: Path, value: str
) -> None:
    _install(site, "theirs", f"their = {value}")
    with pytest.raises(ConfigurationError) as refused:
        transport_from("their://a?secret_key=hidden", Surroundings())
    assert f"theirs ({value})" in str(refused.value)
    assert "hidden" not in str(refused.value)
