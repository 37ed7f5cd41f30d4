"""The output directory: where it may be, who owns it, what becomes of an earlier run, and of one that is cut off."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_module
from tiny import tiny_config, write_tiny_config, write_tiny_log
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from recsys.config import ConfigError, load_config
from recsys.errors import TEMPORARY
from recsys.training import output
from recsys.training.output import LOCK, MARKER, WRITTEN, OutputDirectory, OutputError, naming_disk

NOBODY = 65534
IMPATIENT = 0.2


def opened(path: Path | str, **options: Any) -> OutputDirectory:
    return OutputDirectory(Path(path), **{"patience": IMPATIENT, **options})


def refused(path: Path | str) -> str:
    """The one line that entering a directory ends in."""
    with pytest.raises(ConfigError) as caught, opened(path):
        pass
    message = str(caught.value)
    assert message.startswith("output_dir: ") and len(message.splitlines()) == 1
    return message


def leave_run(path: Path, *, finished: bool = True, name: str = "tiny") -> None:
    """What a run leaves, as far as its owner is concerned."""
    with opened(path) as directory:
        directory.begin(name, anew=True)
        (path / "config.yaml").write_text(f"name: {name}\n")
        (path / "checkpoints").mkdir()
        if finished:
            directory.finish()


def marker(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / MARKER).read_text())
    return found


def kept_beside(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}-*"))


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs on a folder, made if it is not there; skips where one may not be mounted."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder that anybody may enter, and no privileges while it is used."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o777)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        shutil.rmtree(folder)


def fill(folder: Path) -> None:
    """Leave no byte of a small file system free."""
    with suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


# Places. Each makes something in a folder and gives the path to be used as the output directory.


def a_missing_one(at: Path) -> Path:
    return at / "out"


def one_below_missing_ones(at: Path) -> Path:
    return at / "a" / "b" / "c" / "out"


def an_empty_one(at: Path) -> Path:
    (at / "out").mkdir()
    return at / "out"


def one_with_files_of_others(at: Path) -> Path:
    (at / "out" / "notes").mkdir(parents=True)
    (at / "out" / "README").write_text("mine")
    return at / "out"


def one_with_a_lock_left_behind(at: Path) -> Path:
    (at / "out").mkdir()
    (at / "out" / LOCK).write_text('{"host": "gone", "pid": 1, "since": "then"}')
    return at / "out"


def a_link_to_one(at: Path) -> Path:
    (at / "target").mkdir()
    (at / "out").symlink_to("target")
    return at / "out"


def a_link_to_a_link(at: Path) -> Path:
    (at / "target").mkdir()
    (at / "between").symlink_to(at / "target")
    (at / "out").symlink_to("between")
    return at / "out"


def one_below_a_link(at: Path) -> Path:
    (at / "target").mkdir()
    (at / "link").symlink_to("target")
    return at / "link" / "deep" / "out"


def one_named_with_a_slash(at: Path) -> Path:
    return Path(f"{at}/out/")


def one_on_a_way_round(at: Path) -> Path:
    (at / "a").mkdir()
    return at / "a" / ".." / "out"


def one_of_a_strange_name(at: Path) -> Path:
    return at / "a b'\"[*]?$x ~\\ü漢"


def one_of_the_longest_name(at: Path) -> Path:
    return at / ("n" * 255)


def one_of_a_name_that_is_hidden(at: Path) -> Path:
    return at / ".out"


def one_of_the_name_of_home(at: Path) -> Path:
    return at / "~"


FRESH = [
    a_missing_one,
    one_below_missing_ones,
    an_empty_one,
    one_with_files_of_others,
    one_with_a_lock_left_behind,
    a_link_to_one,
    a_link_to_a_link,
    one_below_a_link,
    one_named_with_a_slash,
    one_on_a_way_round,
    one_of_a_strange_name,
    one_of_the_longest_name,
    one_of_a_name_that_is_hidden,
    one_of_the_name_of_home,
]


@pytest.mark.parametrize("place", FRESH)
def test_a_usable_place_is_made_and_marked(place: Callable[[Path], Path], tmp_path: Path) -> None:
    path = place(tmp_path)
    before = {file.name for file in path.iterdir()} if path.exists() else set()
    with opened(path) as directory:
        assert directory.state == "fresh"
        assert {file.name for file in path.iterdir()} == before | {LOCK}  # the probe is gone
        assert directory.begin("tiny", anew=True) is None
        assert marker(path)["state"] == "running" and marker(path)["finished"] is None
        directory.check()
        directory.finish()
    found = marker(path)
    assert found.keys() == {"format", "state", "name", "started", "finished", "host", "pid"}
    assert (found["format"], found["state"], found["name"], found["pid"]) == (1, "finished", "tiny", os.getpid())
    assert found["started"] <= found["finished"]
    assert {file.name for file in path.iterdir()} == before | {LOCK, MARKER}


@pytest.mark.parametrize("place", FRESH)
def test_a_run_that_is_refused_before_it_begins_leaves_a_place_as_it_was(
    place: Callable[[Path], Path], tmp_path: Path
) -> None:
    path = place(tmp_path)
    before = sorted(file for file in tmp_path.rglob("*") if file.name != LOCK)
    with opened(path):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def a_file(at: Path) -> Path:
    (at / "out").write_text("")
    return at / "out"


def one_below_a_file(at: Path) -> Path:
    return a_file(at) / "below"


def one_far_below_a_file(at: Path) -> Path:
    return a_file(at) / "far" / "below"


def a_dangling_link(at: Path) -> Path:
    (at / "out").symlink_to("nothing")
    return at / "out"


def one_below_a_dangling_link(at: Path) -> Path:
    (at / "link").symlink_to(at / "taken" / "nothing")
    (at / "taken").write_text("")
    return at / "link" / "out"


def a_link_to_a_file(at: Path) -> Path:
    (at / "file").write_text("")
    (at / "out").symlink_to("file")
    return at / "out"


def a_link_to_itself(at: Path) -> Path:
    (at / "out").symlink_to("out")
    return at / "out"


def one_below_a_link_to_itself(at: Path) -> Path:
    return a_link_to_itself(at) / "below"


def a_pipe(at: Path) -> Path:
    os.mkfifo(at / "out")
    return at / "out"


def one_of_too_long_a_name(at: Path) -> Path:
    return at / ("n" * 256)


def one_below_too_long_a_name(at: Path) -> Path:
    return at / "a" / ("n" * 256) / "b"


def one_on_too_long_a_path(at: Path) -> Path:
    return at.joinpath(*["d" * 200] * 21)


def one_with_a_nul(at: Path) -> Path:
    return at / "o\0ut"


def a_device(at: Path) -> Path:
    return Path("/dev/null")


def one_below_a_device(at: Path) -> Path:
    return Path("/dev/null/out")


def one_in_proc(at: Path) -> Path:
    return Path("/proc/out")


def the_working_directory(at: Path) -> Path:
    return Path(".")


def the_working_directory_in_full(at: Path) -> Path:
    return Path.cwd()


def the_working_directory_by_a_link(at: Path) -> Path:
    (at / "out").symlink_to(Path.cwd())
    return at / "out"


def one_above_the_working_directory(at: Path) -> Path:
    return Path("..")


def the_root(at: Path) -> Path:
    return Path("/")


def the_home_directory(at: Path) -> Path:
    return Path.home()


def one_above_the_home_directory(at: Path) -> Path:
    return Path.home().parent


def one_whose_lock_is_a_directory(at: Path) -> Path:
    (at / "out" / LOCK).mkdir(parents=True)
    return at / "out"


def one_whose_lock_is_a_link(at: Path) -> Path:
    (at / "out").mkdir()
    (at / "out" / LOCK).symlink_to("elsewhere")
    return at / "out"


def one_whose_lock_is_a_pipe(at: Path) -> Path:
    (at / "out").mkdir()
    os.mkfifo(at / "out" / LOCK)
    return at / "out"


UNUSABLE = {
    a_file: "cannot be a directory: File exists",
    one_below_a_file: "cannot be a directory: Not a directory",
    one_far_below_a_file: "cannot be a directory: Not a directory",
    a_dangling_link: "it is a link to nothing, which is not there",
    one_below_a_dangling_link: "cannot be a directory: Not a directory",
    a_link_to_a_file: "cannot be a directory: File exists",
    a_link_to_itself: "it is a link to out, which is not there",
    one_below_a_link_to_itself: "cannot be a directory: ",
    a_pipe: "cannot be a directory: File exists",
    one_of_too_long_a_name: "cannot be a directory: File name too long",
    one_below_too_long_a_name: "cannot be a directory: File name too long",
    one_on_too_long_a_path: "cannot be a directory: File name too long",
    one_with_a_nul: "cannot be a directory: embedded null byte",
    a_device: "cannot be a directory: File exists",
    one_below_a_device: "cannot be a directory: Not a directory",
    one_in_proc: "cannot be a directory: ",
    the_working_directory: "is the working directory, or one above it; name a directory of the run's own",
    the_working_directory_in_full: "is the working directory, or one above it",
    the_working_directory_by_a_link: "is the working directory, or one above it",
    one_above_the_working_directory: "is the working directory, or one above it",
    the_root: "is the home directory, or one above it",
    the_home_directory: "is the home directory, or one above it",
    one_above_the_home_directory: "is the home directory, or one above it",
    one_whose_lock_is_a_directory: "cannot be written to: Is a directory",
    one_whose_lock_is_a_link: "cannot be written to: Too many levels of symbolic links",
    one_whose_lock_is_a_pipe: "cannot be written to: run.lock is no regular file",
}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder beside the working directory and home, neither of which holds the other."""
    for name in ("work/here", "homes/me", "folder"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work/here")
    monkeypatch.setenv("HOME", str(tmp_path / "homes/me"))
    return tmp_path / "folder"


@pytest.mark.parametrize(("place", "expected"), UNUSABLE.items())
def test_an_unusable_place_ends_in_one_line_and_is_left_as_it_was(
    place: Callable[[Path], Path], expected: str, elsewhere: Path
) -> None:
    path = place(elsewhere)
    before = sorted(elsewhere.parent.rglob("*"))
    message = refused(path)
    assert expected in message and ("set output_dir to" in message or "name a directory" in message)
    assert sorted(elsewhere.parent.rglob("*")) == before


def test_a_working_directory_that_is_gone_is_told(elsewhere: Path) -> None:
    Path.cwd().rmdir()
    assert "cannot be a directory: No such file or directory" in refused(elsewhere / "out")


def test_a_place_that_may_not_be_made_is_told() -> None:
    with unprivileged() as folder:
        (folder / "closed").mkdir(mode=0o500)
        assert "closed/out cannot be a directory: Permission denied" in refused(folder / "closed" / "out")


def test_a_place_that_may_not_be_written_to_is_told() -> None:
    with unprivileged() as folder:
        (folder / "closed").mkdir(mode=0o500)
        assert "closed cannot be written to: Permission denied" in refused(folder / "closed")


def test_a_place_that_may_not_be_entered_is_told() -> None:
    with unprivileged() as folder:
        (folder / "shut" / "out").mkdir(parents=True)
        (folder / "shut").chmod(0)
        assert "shut/out cannot be a directory: Permission denied" in refused(folder / "shut" / "out")
        (folder / "shut").chmod(0o700)


def test_a_lock_that_may_not_be_written_is_told() -> None:
    with unprivileged() as folder:
        (folder / LOCK).touch(mode=0o400)
        assert "cannot be written to: Permission denied" in refused(folder)


def test_an_earlier_run_that_may_not_be_moved_aside_is_told_and_kept() -> None:
    with unprivileged() as folder:
        (folder / "closed").mkdir()
        leave_run(folder / "closed" / "out")
        (folder / "closed").chmod(0o500)
        told = pytest.raises(ConfigError, match=r"earlier run in .*out cannot be moved aside: Permission denied")
        with opened(folder / "closed" / "out") as directory, told:
            directory.begin("tiny", anew=True)
        assert marker(folder / "closed" / "out")["state"] == "finished"
        (folder / "closed").chmod(0o700)


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=64k") as disk:
        fill(disk)
        for path in (disk, disk / "out", disk / "a" / "out"):
            assert "No space left on device; free some space" in refused(path)
        os.truncate(disk / "filler", (disk / "filler").stat().st_size - 8192)
        assert "disk cannot be written to: No space left on device" in refused(disk)  # there is room for a lock alone


def test_a_disk_that_takes_files_but_nothing_in_them_is_told(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=64k") as disk:
        (disk / "out").mkdir()
        fill(disk)
        (disk / "empty").touch()  # a file can be made all the same
        assert "out cannot be written to: No space left on device" in refused(disk / "out")
        assert not list((disk / "out").iterdir())


def test_a_disk_without_room_for_another_file_is_told(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "nr_inodes=3,size=1m") as disk:
        for number in range(2):
            (disk / str(number)).touch()
        assert "cannot be a directory: No space left on device" in refused(disk / "out")


def test_a_disk_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=1m") as disk:
        (disk / "out").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert "new cannot be a directory: Read-only file system" in refused(disk / "new")
        assert "out cannot be written to: Read-only file system" in refused(disk / "out")


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):

        def flock(descriptor: int, operation: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(output.fcntl, "flock", flock)
        assert "out cannot be locked: " in (message := refused(tmp_path / "out"))
        assert "its file system has no locks" in message


def test_a_mount_point_is_used_but_never_moved_aside(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=1m") as disk:
        leave_run(disk, finished=False)
        with opened(disk) as directory:  # an unfinished run might go on
            assert directory.state == "unfinished"
            with pytest.raises(ConfigError, match="disk cannot be moved aside: Device or resource busy; it is a mount"):
                directory.begin("tiny", anew=True)
            assert directory.begin("tiny", anew=False) is None
            directory.finish()
        assert "cannot be moved aside: Device or resource busy; it is a mount point" in refused(disk)
        assert marker(disk)["state"] == "finished" and not kept_beside(disk)
        with opened(disk / "below") as directory:
            assert directory.state == "fresh"


# What is in it.


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
def test_what_a_run_would_write_over_is_refused_without_a_marker(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir()
    {"file": path.touch, "directory": path.mkdir, "dangling link": lambda: path.symlink_to("nothing")}[kind]()
    assert f"out holds {name}, where a run would write, but no run.json" in refused(tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == [path.parent, path]


def test_a_folder_that_merely_holds_a_config_is_not_moved_aside(tmp_path: Path) -> None:
    for name in ("config.yaml", "train.py", "thesis.tex"):
        (tmp_path / name).write_text("precious")
    assert "holds config.yaml, where a run would write" in refused(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml", "thesis.tex", "train.py"]


WHOLE = {"format": 1, "state": "finished", "started": "2026-01-01T00:00:00+00:00"}

NO_MARKERS = {
    "": "Expecting value",
    "{": "Expecting property name",
    "\x00\x01": "Expecting value",
    "[" * 60_000: "recursion",
    "[]": "it has no format",
    "1": "it has no format",
    "null": "it has no format",
    '"running"': "it has no format",
    "{}": "it has no format",
    '{"state": "finished"}': "it has no format",
    json.dumps({**WHOLE, "format": 2}): "it has format 2, this version knows 1",
    json.dumps({**WHOLE, "format": "1"}): 'it has format "1"',
    json.dumps({**WHOLE, "format": None}): "it has format null",
    json.dumps({**WHOLE, "format": ["x" * 5000]}): "it has format",
    json.dumps({**WHOLE, "state": "walking"}): "it does not say when the run started and how far it came",
    json.dumps({**WHOLE, "state": ["running"]}): "it does not say",
    json.dumps({**WHOLE, "state": {}}): "it does not say",
    json.dumps({"format": 1}): "it does not say",
    json.dumps({**WHOLE, "started": None}): "it does not say",
    json.dumps({"format": 1, "state": "finished"}): "it does not say",
    json.dumps({**WHOLE, "name": "x" * 70_000}): "Unterminated string",
}


@pytest.mark.parametrize("text", NO_MARKERS, ids=range(len(NO_MARKERS)))
def test_what_is_no_marker_ends_in_one_line_and_moves_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).write_text(text)
    message = refused(tmp_path / "out")
    assert "out/run.json is no marker of a run: " in message and NO_MARKERS[text] in message
    assert len(message) < 1000
    assert (tmp_path / "out" / MARKER).read_text() == text and not kept_beside(tmp_path / "out")


@pytest.mark.parametrize("kind", ["directory", "pipe", "link", "no text"])
def test_a_marker_that_is_no_file_of_text_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "out" / MARKER
    path.parent.mkdir()
    (tmp_path / "whole.json").write_text(json.dumps(WHOLE))
    {
        "directory": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to(tmp_path / "whole.json"),
        "no text": lambda: path.write_bytes(b"\xff\xfe\xfa"),
    }[kind]()
    assert "run.json is no marker of a run: " in refused(path.parent)


@pytest.mark.parametrize(("finished", "state"), [(True, "finished"), (False, "unfinished")])
def test_an_earlier_run_is_found_by_its_marker_and_moved_aside(finished: bool, state: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    leave_run(path, finished=finished, name="first")
    (path / "notes").write_text("mine")
    with opened(path) as directory:
        assert directory.state == state
        assert directory.begin("second", anew=True) == kept_beside(path)[0]
        assert sorted(file.name for file in path.iterdir()) == [MARKER, LOCK]
    (kept,) = kept_beside(path)
    assert sorted(file.name for file in kept.iterdir()) == ["checkpoints", "config.yaml", "notes", MARKER]
    assert (marker(kept)["name"], marker(path)["name"]) == ("first", "second")


def test_a_finished_run_is_moved_aside_however_one_begins(tmp_path: Path) -> None:
    leave_run(tmp_path / "out")
    with opened(tmp_path / "out") as directory:
        assert directory.begin("tiny", anew=False) is not None
    assert marker(tmp_path / "out")["state"] == "running"


def test_an_unfinished_run_is_gone_on_with_unless_one_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "out"
    leave_run(path, finished=False)
    old = {**marker(path), "started": "2026-01-01T00:00:00+00:00", "pid": 1}
    (path / MARKER).write_text(json.dumps(old))
    with opened(path) as directory:
        assert directory.state == "unfinished"
        assert directory.begin("tiny", anew=False) is None
        assert (marker(path)["started"], marker(path)["pid"]) == (old["started"], os.getpid())
        assert (path / "checkpoints").is_dir()
        directory.finish()
    assert not kept_beside(path) and marker(path)["state"] == "finished"


def test_a_run_of_an_older_version_counts_as_finished(tmp_path: Path) -> None:
    path = tmp_path / "out"
    (path / "checkpoints" / "step-9").mkdir(parents=True)
    for name in ("config.yaml", "summary.json", "checkpoints/step-9/meta.json"):
        (path / name).write_text("{}")
    with opened(path) as directory:
        assert directory.state == "finished"
        kept = directory.begin("tiny", anew=False)
    assert kept is not None and (kept / "checkpoints/step-9/meta.json").exists()


@pytest.mark.parametrize("missing", ["config.yaml", "summary.json", "checkpoints/step-9/meta.json"])
def test_what_is_not_quite_a_run_of_an_older_version_is_refused(missing: str, tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoints" / "step-9").mkdir(parents=True)
    for name in {"config.yaml", "summary.json", "checkpoints/step-9/meta.json"} - {missing}:
        (tmp_path / "out" / name).write_text("{}")
    assert "one of an older version that did not end has none" in refused(tmp_path / "out")


def test_a_run_is_kept_under_the_time_at_which_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "out"
    leave_run(path)
    ended = time.mktime((2026, 3, 4, 5, 6, 7, 0, 0, -1))
    for file in path.iterdir():
        os.utime(file, (ended, ended))
    with opened(path) as directory:
        directory.begin("tiny", anew=False)
    assert kept_beside(path) == [tmp_path / "out-20260304-050607"]


def test_runs_that_ended_in_one_second_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "out"
    ended = time.mktime((2026, 3, 4, 5, 6, 7, 0, 0, -1))
    (tmp_path / "out-20260304-050607-3").symlink_to("nothing")
    (tmp_path / "out-20260304-050607-4").touch()
    for number in range(4):
        with opened(path) as directory:
            directory.begin(str(number), anew=True)
            directory.finish()
        for file in path.iterdir():
            os.utime(file, (ended, ended))
    stamps = ["20260304-050607", "20260304-050607-2", "20260304-050607-5"]
    assert [marker(tmp_path / f"out-{stamp}")["name"] for stamp in stamps] == ["0", "1", "2"]


def test_a_name_that_has_no_room_for_the_time_is_told(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250)
    leave_run(path)
    with opened(path) as directory, pytest.raises(ConfigError, match="cannot be moved aside: File name too long"):
        directory.begin("tiny", anew=True)
    assert marker(path)["state"] == "finished"


@pytest.mark.parametrize("place", [a_link_to_one, a_link_to_a_link])
def test_a_link_stays_a_link(place: Callable[[Path], Path], tmp_path: Path) -> None:
    path = place(tmp_path)
    leave_run(path, name="first")
    with opened(path) as directory:
        kept = directory.begin("second", anew=True)
        assert kept is not None and kept.parent == tmp_path and kept.name.startswith("target-")
        directory.check()
    assert path.is_symlink() and path.resolve() == tmp_path / "target"
    assert (marker(path)["name"], marker(tmp_path / "target")["name"], marker(kept)["name"]) == (
        "second",
        "second",
        "first",
    )
    assert not kept_beside(path)


def test_a_run_below_a_link_is_kept_beside_itself(tmp_path: Path) -> None:
    path = one_below_a_link(tmp_path)
    leave_run(path)
    with opened(path) as directory:
        kept = directory.begin("tiny", anew=True)
    assert kept is not None and kept.parent == path.parent and (tmp_path / "target" / "deep" / kept.name).is_dir()


# Who owns it.


def test_a_second_run_is_told_who_holds_the_directory(tmp_path: Path) -> None:
    path = tmp_path / "out"
    (tmp_path / "link").symlink_to("out")
    with opened(path) as directory:
        for way in (path, tmp_path / "link", tmp_path / "." / "out"):
            message = refused(way)
            assert f"{way} is in use by another run (process {os.getpid()} on " in message
            assert ", since 20" in message
        directory.begin("tiny", anew=True)
        refused(path)
        directory.finish()
    with opened(path) as directory:
        assert directory.state == "finished"


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '{"pid": 1}', "\x00" * 50, "[" * 60_000])
def test_a_holder_that_does_not_say_who_it_is_holds_all_the_same(text: str, tmp_path: Path) -> None:
    with opened(tmp_path / "out"):
        (tmp_path / "out" / LOCK).write_text(text)
        assert "in use by another run (its run.lock does not say which)" in refused(tmp_path / "out")


@pytest.mark.slow
def test_a_run_that_waits_gets_the_directory_that_another_leaves(tmp_path: Path) -> None:
    """By a process of its own, which is killed: nothing but the system gives its lock up."""
    code = "import sys, time; from pathlib import Path; from recsys.training.output import OutputDirectory\n"
    code += "held = OutputDirectory(Path(sys.argv[1])).__enter__(); held.begin('first', anew=True)\n"
    code += "print(flush=True); time.sleep(600)"
    path = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    assert f"(process {process.pid} on " in refused(path)
    process.kill()
    with opened(path, patience=60) as directory:
        assert directory.state == "unfinished"
    process.wait()


def test_the_directory_that_takes_the_place_of_an_earlier_run_is_held_too(tmp_path: Path) -> None:
    path = tmp_path / "out"
    leave_run(path)
    with opened(path) as directory:
        directory.begin("second", anew=True)
        assert "in use by another run" in refused(path)
        (kept,) = kept_beside(path)
        with opened(kept) as other:  # while what was kept is nobody's
            assert other.state == "finished"


def test_a_run_that_comes_in_while_an_earlier_one_is_moved_aside_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, others = tmp_path / "out", []
    leave_run(path, name="first")
    acquire = output._acquire

    def beaten(path: Path, real: Path, patience: float) -> int:
        if kept_beside(path) and not others:
            others.append(opened(path))
            others[0].__enter__().begin("other", anew=True)
        return acquire(path, real, patience)

    monkeypatch.setattr(output, "_acquire", beaten)
    with opened(path, patience=60) as directory, pytest.raises(ConfigError, match="out is in use by another run"):
        directory.begin("second", anew=True)
    assert (marker(path)["name"], marker(kept_beside(path)[0])["name"]) == ("other", "first")
    others[0].check()
    others[0].__exit__(None, None, None)


def test_a_lock_that_was_opened_before_its_directory_moved_is_not_the_directorys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    path.mkdir()
    locked, moved = output._locked, []

    def moving(descriptor: int, path: Path) -> bool:
        if not moved:
            moved.append(path.rename(tmp_path / "moved"))
        return locked(descriptor, path)

    monkeypatch.setattr(output, "_locked", moving)
    with opened(path, patience=60) as directory:
        directory.check()
        assert (path / LOCK).exists()


def test_other_ranks_touch_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "out", enabled=False) as directory:
        assert directory.state is None
        assert directory.begin("tiny", anew=True) is None
        directory.check()
        directory.finish()
    assert not list(tmp_path.iterdir())


# What happens under a run.


def move(path: Path) -> None:
    path.rename(path.with_name("moved"))


def move_and_make_another(path: Path) -> None:
    move(path)
    path.mkdir()


def move_and_let_another_run_in(path: Path) -> None:
    move(path)
    leave_run(path)


def delete(path: Path) -> None:
    shutil.rmtree(path)


def delete_the_lock(path: Path) -> None:
    (path / LOCK).unlink()


def put_a_file_there(path: Path) -> None:
    move(path)
    path.touch()


def move_and_link(path: Path) -> None:
    move(path)
    (path.parent / "other").mkdir()
    path.symlink_to("other")


@pytest.mark.parametrize(
    "happens",
    [
        move,
        move_and_make_another,
        move_and_let_another_run_in,
        delete,
        delete_the_lock,
        put_a_file_there,
        move_and_link,
    ],
)
def test_a_directory_that_goes_away_under_a_run_ends_it(happens: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "out"
    with opened(path) as directory:
        directory.begin("tiny", anew=True)
        directory.check()
        happens(path)
        after = sorted(tmp_path.rglob("*"))
        for end in (directory.check, directory.finish):
            with pytest.raises(OutputError, match="out is no longer the directory in which this run began: it") as told:
                end()
            assert len(str(told.value).splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == after


def test_a_directory_that_moved_and_has_a_link_in_its_place_is_still_the_runs(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as directory:
        directory.begin("tiny", anew=True)
        move(tmp_path / "out")
        (tmp_path / "out").symlink_to("moved")
        directory.finish()
    assert marker(tmp_path / "moved")["state"] == "finished"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "output_dir: OUT: No space left on device; free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "OUT/f"), "OUT/f: Disk quota exceeded; free some space"),
        (OSError(errno.EIO, "Input/output error"), "OUT: Input/output error; set output_dir to another"),
        (OSError(errno.EROFS, "Read-only file system"), "OUT: Read-only file system"),
        (OSError(errno.ESTALE, "Stale file handle"), "OUT: Stale file handle"),
        (PermissionError(errno.EACCES, "Permission denied", "OUT/plan.txt"), "OUT/plan.txt: Permission denied"),
        (FileNotFoundError(errno.ENOENT, "No such file", "OUT/a/b"), "OUT/a/b: No such file"),
        (FileNotFoundError(errno.ENOENT, "No such file", b"OUT/tensorboard/events"), "OUT/tensorboard/events: No such"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), "OUT cannot be written whole"),
    ],
)
@pytest.mark.parametrize("is_wrapped", [False, True], ids=["bare", "by DCP"])
def test_a_failure_of_the_disk_is_one_line(error: Exception, expected: str, is_wrapped: bool) -> None:
    if is_wrapped:
        other = _wrap_exception(ValueError("what another rank says"))
        failure: BaseException = CheckpointException("write", {0: other, 1: _wrap_exception(error)})
    else:
        failure = error
    with pytest.raises(OutputError) as told, naming_disk(Path("OUT")):
        raise failure
    assert expected in str(told.value) and len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a mistake"),
        RuntimeError("of a kernel"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        FileNotFoundError(errno.ENOENT, "No such file", "elsewhere/f"),
        OSError("without a number"),
        ConfigError("already told"),
        KeyboardInterrupt(),
        CheckpointException("read", {0: _wrap_exception(ValueError("a mistake"))}),
    ],
    ids=repr,
)
def test_other_failures_pass_as_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as told, naming_disk(Path("OUT")):
        raise error
    assert told.value is error


def test_a_checkpoint_that_fills_the_disk_is_one_line(tmp_path: Path) -> None:
    """Wherever in a file of torch's the disk is full, at its first byte or at its last."""
    with mounted(tmp_path / "disk", "size=256k") as disk:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            for left in (0, 4096, 65536, 131072):
                fill(disk)
                os.truncate(disk / "filler", (disk / "filler").stat().st_size - left)
                with pytest.raises(OutputError, match=f"output_dir: {disk}") as told, naming_disk(disk):
                    dcp.save({"a": torch.zeros(10), "b": torch.zeros(60_000)}, checkpoint_id=disk / f"step-{left}")
                assert "free some space" in str(told.value) and len(str(told.value).splitlines()) == 1
                shutil.rmtree(disk / f"step-{left}", ignore_errors=True)
        finally:
            dist.destroy_process_group()


# Whole runs.


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("log")
    write_tiny_log(directory)
    return directory


@pytest.fixture
def config(log: Path, tmp_path: Path) -> Path:
    """The tiny config with an output directory of the test's."""
    return write_tiny_config(tmp_path / "tiny.yaml", log, tmp_path / "out")


SHORT = 'stages={"joint": {"trains": "all", "steps": 4, "learning_rate": 0.01, "sparse_learning_rate": 0.1}}'
ENDLESS = SHORT.replace("4", "100000000")


def start(config: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "recsys.train", "--config", str(config), "device=cpu", *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def training(process: subprocess.Popen[str]) -> None:
    """Wait until a run has logged a step."""
    assert process.stdout is not None
    for line in process.stdout:
        if " step " in line:
            return
    raise AssertionError(f"it ended before: {process.communicate()}")


@pytest.mark.slow
def test_of_two_runs_at_once_one_trains_and_one_is_told(config: Path, tmp_path: Path) -> None:
    first = start(config, ENDLESS)
    try:
        training(first)
        both = run_module(2, "recsys.train", "--config", str(config), SHORT)
        assert both[0].code == TEMPORARY and both[1].stderr == ""
        assert both[0].stderr.startswith(f"error: output_dir: {tmp_path}/out is in use by another run (process ")
        assert f"(process {first.pid} on " in both[0].stderr and both[0].stderr.count("\n") == 1
        assert first.poll() is None and marker(tmp_path / "out")["pid"] == first.pid
    finally:
        first.kill()
        first.communicate()
    (again,) = run_module(1, "recsys.train", "--config", str(config), SHORT)  # at once: the lock ended with it
    assert again.code == 0, again.stderr
    assert f"An earlier run was in {tmp_path}/out; it is kept as {tmp_path}/out-20" in again.stdout
    (kept,) = kept_beside(tmp_path / "out")
    assert (marker(kept)["state"], marker(tmp_path / "out")["state"]) == ("running", "finished")


@pytest.mark.parametrize("happens", [pytest.param(move, marks=pytest.mark.slow), move_and_make_another])
def test_a_run_whose_directory_goes_away_ends_in_one_line(
    happens: Callable[[Path], None], config: Path, tmp_path: Path
) -> None:
    process = start(config, ENDLESS)
    try:
        training(process)
        happens(tmp_path / "out")
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 2, stderr
    assert stderr.startswith(f"error: output_dir: {tmp_path}/out is no longer the directory in which this run began")
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "size", ["256k", *(pytest.param(size, marks=pytest.mark.slow) for size in ("128k", "192k", "320k"))]
)
def test_a_disk_that_fills_up_under_a_run_ends_it_in_one_line(size: str, config: Path, tmp_path: Path) -> None:
    """In the records of TensorBoard or in a checkpoint, wherever the disk is full."""
    with mounted(tmp_path / "disk", f"size={size}") as disk:
        process = start(config, f"output_dir={disk}/out", "logging.every_steps=1", "data.domain=null")
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 2, stderr
        assert stderr.startswith("error: ") and f"{disk}/out" in stderr and stderr.count("\n") == 1, stderr
        assert "No space left on device" in stderr or "free some space" in stderr, stderr
        assert marker(disk / "out")["state"] == "running"


@pytest.mark.parametrize(
    ("text", "expected"), [("taken", "cannot be a directory: File exists"), ("~", "is the home directory")]
)
def test_an_unusable_place_ends_every_rank_before_data_are_read(
    text: str, expected: str, config: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").touch()
    path = tmp_path / text if text == "taken" else '"~"'
    nothing = "data.train=nothing/*.parquet"  # which would be an error of its own
    first, second = run_module(2, "recsys.train", "--config", str(config), f"output_dir={path}", nothing)
    assert first.code == 2 and expected in first.stderr and first.stderr.count("\n") == 1
    assert second.code != 0 and second.stderr == ""


def test_a_run_that_is_refused_leaves_no_directory(config: Path, tmp_path: Path) -> None:
    (told,) = run_module(1, "recsys.train", "--config", str(config), "data.train=nothing/*.parquet")
    assert told.code == 2 and "data.train" in told.stderr
    assert not (tmp_path / "out").exists()


# What the config may say.


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/b", "../a", "a/..", "/a", "a\nb", "a\n", "a\u2028b", "a\0b"])
def test_a_name_may_not_leave_its_folder(name: str, log: Path, tmp_path: Path) -> None:
    config = write_tiny_config(tmp_path / "tiny.yaml", log, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"  name: "):
        load_config(config, [f"name={json.dumps(name)}"])


@pytest.mark.parametrize("name", ["a", "a b", "...", "a..b", ".a", "-", "~", "a\\b", "ünï", "x" * 300])
def test_other_names_are_names(name: str, log: Path, tmp_path: Path) -> None:
    config = write_tiny_config(tmp_path / "tiny.yaml", log, tmp_path / "out")
    assert load_config(config, [f"name={json.dumps(name)}"]).name == name


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", "is the working directory"),
        (".", "is the working directory"),
        ("./", "is the working directory"),
        ("a/..", "is the working directory"),
        ("a\0b", "NUL"),
        ("a\nb", "line break"),
        ("s3://bucket/run", "is a URL"),
        ("file:///tmp/run", "is a URL"),
    ],
)
def test_an_output_dir_that_cannot_be_one_is_an_error_of_the_config(
    path: str, expected: str, log: Path, tmp_path: Path
) -> None:
    raw = tiny_config(log, tmp_path / "out")
    (tmp_path / "tiny.yaml").write_text(json.dumps({**raw, "output_dir": path}))
    with pytest.raises(ConfigError, match=f"  output_dir: .*{expected}"):
        load_config(tmp_path / "tiny.yaml")
