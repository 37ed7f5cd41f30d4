"""Files of others: what is no regular file is not waited for, and JSON is what every reader understands alike."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from recsys.files import FileError, FileTooLargeError, open_regular, read_json, read_regular


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "No such file or directory"),
        (Path.mkdir, "it is no regular file"),
        (os.mkfifo, "it is no regular file"),
        (socket_at, "No such device or address"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a link"),
        (lambda path: path.symlink_to("/no/such/file"), "it is a link"),
        (lambda path: path.symlink_to(path), "it is a link"),
    ],
    ids=["nothing", "a folder", "a pipe", "a socket", "a device", "a dangling link", "a circle"],
)
def test_what_is_no_regular_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)  # paths of sockets are short
    make(path := Path("it"))
    with pytest.raises(FileError) as error:
        read_regular(path, 100)
    assert str(error.value) == f"it: {reason}" and error.value.reason == reason


def test_links_are_followed_where_asked_and_still_no_devices(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "device").symlink_to("/dev/zero")
    assert read_regular(tmp_path / "link", 4, follow=True) == b"text"
    with pytest.raises(FileError, match="it is no regular file"):
        read_regular(tmp_path / "device", 4, follow=True)


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b", "a" * 5000])
def test_what_can_be_no_path_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileError, match=r"it holds a character that no path can|File name too long") as error:
        open_regular(tmp_path / name)
    assert str(error.value).isprintable()


def test_files_are_read_up_to_their_bound(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * (3 << 20))
    assert len(read_regular(tmp_path / "file", 3 << 20)) == 3 << 20
    with pytest.raises(FileTooLargeError, match="it has more than 3,145,727 bytes"):
        read_regular(tmp_path / "file", (3 << 20) - 1)
    os.truncate(tmp_path / "file", 1 << 40)
    with pytest.raises(FileTooLargeError, match="it has more than 100 bytes"):
        read_regular(tmp_path / "file", 100)


@pytest.mark.parametrize(
    "value", [{}, [], None, True, 7, -1.5e300, "text", "\U0001f600\n", {"a": [1, {"b": "é"}]}, 10**300, "x" * 1000]
)
def test_json_is_read(tmp_path: Path, value: object) -> None:
    for ascii_only in (True, False):
        (tmp_path / "it.json").write_text(json.dumps(value, ensure_ascii=ascii_only), encoding="utf-8")
        assert read_json(tmp_path / "it.json", 1 << 20) == value


ODD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it is not JSON: Expecting value"),
    "text": (b"hello", "it is not JSON: Expecting value"),
    "half": (b'{"format": 1', "it is not JSON: Expecting"),
    "two": (b"{} {}", "it is not JSON: Extra data"),
    "NUL": (b'{"a": "\0"}', "it is not JSON: Invalid control character"),
    "a comment": (b'{"a": 1} // so', "it is not JSON: Extra data"),
    "a key twice": (b'{"format": 1, "format": 2}', "an object has one key twice"),
    "a key twice below": (b'[{"a": {"b": 1, "b": 1}}]', "an object has one key twice"),
    "NaN": (b'{"step": NaN}', "it holds NaN, which is no number of JSON"),
    "infinity": (b"-Infinity", "it holds -Infinity, which is no number of JSON"),
    "beyond any double": (b'{"step": 1e999}', "a number is beyond any double"),
    "many decimals": (b"0." + b"1" * 5000, "a number is beyond any double"),
    "a long integer": (b'{"step": ' + b"9" * 5000 + b"}", "a number has 5,000 digits"),
    "lists that nest": (b"[" * 100_000 + b"]" * 100_000, "it nests too deep"),
    "objects that nest": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "it nests too deep"),
    "lists that open": (b"[" * 900_000, "it nests too deep"),
    "no UTF-8": (b'{"a": "\xff"}', "it is not UTF-8 text: invalid start byte at byte 7"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "it is not UTF-8 text"),
    "a mark": (b"\xef\xbb\xbf{}", "it is not JSON: Unexpected UTF-8 BOM"),
    "half a pair": (b'{"a": "\\ud800"}', "a text holds half of a surrogate pair"),
    "half a pair in a key": (b'{"\\udfff": 1}', "a text holds half of a surrogate pair"),
    "half a pair in UTF-8": (b'{"a": "\xed\xa0\x80"}', "it is not UTF-8 text"),
    "too much": (b"[" + b"1," * (1 << 20) + b"1]", "it has more than 1,048,576 bytes"),
}
"""What files of JSON hold that is none, and what is said of it."""


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_json_ends_in_one_line(tmp_path: Path, name: str) -> None:
    content, reason = ODD[name]
    (tmp_path / "it.json").write_bytes(content)
    with pytest.raises(FileError) as error:
        read_json(tmp_path / "it.json", 1 << 20)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/it.json: ") and reason in message
    assert "\n" not in message and len(message) < 500
