"""Packed bodies: read whole, or refused with a sentence; never cut, and never more than memory takes."""

import gzip
import zlib
from collections.abc import Callable
from time import monotonic

import lz4.frame
import pytest
import zstandard

from exactly_once.clients.packed import MOST_BYTES, named, unpacked
from exactly_once.errors import BadBody

PACK: dict[str, Callable[[bytes], bytes]] = {
    "lz4": lz4.frame.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "gzip": gzip.compress,
    "zlib": zlib.compress,
}
OF_FRAMES = ["lz4", "zstd", "gzip"]
SKIPPED = b"\x50\x2a\x4d\x18" + b"\x04\0\0\0" + b"mark"  # a frame of LZ4's and of ZSTD's that holds nothing


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("size", [0, 1, 1023, 100_000])
def test_a_body_is_known_by_its_beginning_and_read(name: str, size: int) -> None:
    body = (b"filling " * size)[:size]
    packed = PACK[name](body)
    assert named(packed) == name
    assert unpacked(name, packed) == body


@pytest.mark.parametrize("name", OF_FRAMES)
@pytest.mark.parametrize("size", [1, 1000, 5000])
def test_every_frame_of_a_body_is_read(name: str, size: int) -> None:
    """The first alone may be sound JSON: what is cut there is told as whole."""
    parts = [b"[1]", b"", bytes(range(256)) * size, b" "]
    assert unpacked(name, b"".join(map(PACK[name], parts))) == b"".join(parts)


@pytest.mark.parametrize("name", ["lz4", "zstd"])
def test_a_frame_that_is_to_be_skipped_is_skipped(name: str) -> None:
    assert unpacked(name, PACK[name](b"[1") + SKIPPED + PACK[name](b"]")) == b"[1]"


@pytest.mark.parametrize("name", OF_FRAMES)
@pytest.mark.parametrize("behind", [b"no frame", b"\0", b"{}"])
def test_what_stands_behind_a_frame_and_is_none_is_refused(name: str, behind: bytes) -> None:
    with pytest.raises(BadBody, match=f"The body cannot be unpacked \\({name.upper()}: "):
        unpacked(name, PACK[name](b"[1]") + behind)


def test_what_stands_behind_a_body_of_zlibs_is_left_out_as_javas_client_does() -> None:
    assert unpacked("zlib", zlib.compress(b"[1]") + b"no frame") == b"[1]"


@pytest.mark.parametrize("name", PACK)
def test_a_body_without_its_end_is_refused(name: str) -> None:
    whole = PACK[name](b"filling" * 1000)
    for length in (0, 3, 10, len(whole) - 1):
        with pytest.raises(BadBody, match=r"its end is missing"):
            unpacked(name, whole[:length])
    if name in OF_FRAMES:
        with pytest.raises(BadBody, match=r"its end is missing"):
            unpacked(name, whole + whole[:10])


@pytest.mark.parametrize("name", PACK)
def test_a_body_that_grows_beyond_what_memory_takes_is_refused(name: str) -> None:
    with pytest.raises(BadBody, match=f"it has more than {MOST_BYTES} bytes"):
        unpacked(name, PACK[name](bytes(MOST_BYTES + 1)))


@pytest.mark.parametrize("name", OF_FRAMES)
def test_many_frames_are_bounded_together_and_none_of_them_costs_more_than_the_last(name: str) -> None:
    many = PACK[name](bytes(MOST_BYTES // 8)) * 9
    with pytest.raises(BadBody, match=f"it has more than {MOST_BYTES} bytes"):
        unpacked(name, many)
    empty = PACK[name](b"")
    begun = monotonic()
    assert unpacked(name, empty * (4 * 1024 * 1024 // len(empty))) == b""
    assert monotonic() - begun < 30, "each frame would be copied with all that stand behind it"
