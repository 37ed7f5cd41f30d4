"""How every entry reads its arguments and ends: options and overrides in any order, one error for a user's mistake."""

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import run_module
from tiny import write_tiny_config, write_tiny_log

from recsys import cli
from recsys.cli import ArgumentParser

ROOT = Path(__file__).parents[1]


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own; `code` runs in its place with the arguments."""
    start = ["-c", code] if code else ["-m"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *start, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT
    )


def test_options_and_overrides_come_in_any_order() -> None:
    words = ["seed=3", "data.batch_size=64", "--json"]
    for option in (["--config", "c.yaml"], ["--config=c.yaml"]):
        for order in itertools.permutations([[word] for word in words] + [option]):
            parser = ArgumentParser()
            parser.add_argument("--json", action="store_true")
            parser.add_config_arguments()
            found = parser.parse_args([word for part in order for word in part])
            assert (found.config, found.json) == ("c.yaml", True)
            assert sorted(found.overrides) == ["data.batch_size=64", "seed=3"]
    assert parser.parse_args([]).overrides == []
    assert parser.parse_args(["a=1", "--", "b=2"]).overrides == ["a=1", "b=2"]


def test_the_order_of_overrides_is_kept() -> None:
    parser = ArgumentParser()
    parser.add_config_arguments()
    assert parser.parse_args(["a=1", "--config", "c.yaml", "a=2"]).overrides == ["a=1", "a=2"]


@pytest.mark.parametrize("entry", [pytest.param("recsys.plan", marks=pytest.mark.slow), "recsys.prepare validate"])
def test_entries_take_overrides_before_their_options(tmp_path: Path, entry: str) -> None:
    write_tiny_log(tmp_path)
    config = write_tiny_config(tmp_path / "tiny.yaml", tmp_path, tmp_path / "out")
    done = run(*entry.split(), "data.batch_size=64", "--config", str(config), "name=other", "--json")
    assert done.returncode == 0, done.stderr
    assert '"name": "other"' in done.stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["recsys.train", "--config", "none.yaml"], "cannot read config none.yaml"),
        (["recsys.train", "seed", "--config", "configs/small.yaml"], "override 'seed' is not of the form"),
        (["recsys.evaluate", "--checkpoint", "none"], "none is no complete checkpoint"),
        (["recsys.plan", "tables.user.rows=3"], "tables.user.rows: unknown key"),
        (["recsys.prepare", "validate", "--config", "none.yaml"], "cannot read config none.yaml"),
        (["recsys.prepare", "movielens-1m", "--source", "none", "--output", "out"], "none does not exist"),
        (
            ["recsys.prepare", "csv", "--source", "none", "--schema", "none", "--output", "out"],
            "cannot read schema none",
        ),
    ],
)
def test_a_mistake_of_the_user_is_one_error(command: list[str], message: str) -> None:
    done = run(*command)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_terminal_of_ascii_alone_shows_what_it_can() -> None:
    code = "from recsys.cli import run_entry; run_entry(lambda: print('caf\u00e9 \u2501'))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, b"caf? ?\n")


@pytest.mark.parametrize(
    "body",
    ["print('one line')", "print('x' * 100_000)", "print('one line', flush=True) or print('and another')"],
    ids=["at the end", "before", "once"],
)
def test_a_result_that_nobody_takes_is_one_error(body: str) -> None:
    code = f"from recsys.cli import run_entry; run_entry(lambda: {body})"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    assert (done.returncode, done.stderr) == (2, "error: stdout takes no more (No space left on device)\n")
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (2, "error: stdout takes no more (Broken pipe)\n")


def test_figures_get_into_no_other_file_where_stdout_is_closed(tmp_path: Path) -> None:
    """Which, else, has the number of the one that stands for stdout."""
    code = f"""
from recsys.cli import run_entry
def body():
    with open({str(tmp_path / "other")!r}, "w"):
        print("figures", flush=True)
run_entry(body, prints_result=False)
"""
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )
    assert (done.returncode, done.stderr, (tmp_path / "other").read_text()) == (0, b"", "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("body", "code"),
    [("print('told', file=sys.stderr)", 0), ("parser.parse_args(['--none'])", 2), ("int('x')", 1)],
)
def test_a_command_ends_as_it_would_where_stderr_takes_no_more(body: str, code: int, unbuffered: str) -> None:
    start = f"import sys; from recsys.cli import *; parser = ArgumentParser(); run_entry(lambda: {body})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", start], stderr=full, env=environment).returncode == code


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_help_that_nobody_takes_is_one_error(unbuffered: str) -> None:
    code = "from recsys.cli import ArgumentParser; ArgumentParser().parse_args(['--help'])"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert (done.returncode, done.stderr) == (2, "error: stdout takes no more (No space left on device)\n")
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: ")


def test_lines_come_as_they_are_printed_where_python_is_told_so() -> None:
    code = "import os; from recsys.cli import run_entry; run_entry(lambda: print('x' * 100_000) or os._exit(7))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (7, "x" * 100_000 + "\n")


@pytest.mark.parametrize(
    ("stream", "then", "printed"),
    [
        ("sys.stdout", "print('before')", "before\nresult\n"),
        ("gzip.open('it.gz', 'wt')", "pass", "zipped result\n"),
        ("sys.stdout", "sys.stdout.close()", ""),
        ("sys.stdout", "sys.stderr.close()", "result\n"),
    ],
    ids=["printed to before", "zipped", "closed", "stderr closed"],
)
def test_another_program_may_have_streams_of_its_own(tmp_path: Path, stream: str, then: str, printed: str) -> None:
    code = f"""
import gzip, sys
from recsys.cli import run_entry
sys.stdout = stream = {stream}
{then}
try:
    run_entry(lambda: print("result"))
finally:
    stream.close()
    if "gzip" in {stream!r}:
        sys.__stdout__.write("zipped " + gzip.open("it.gz", "rt").read())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, printed, "")


BROKEN = """
import sys
import time
import recsys.prepare.__main__ as entry
def broken(options): raise {error}
entry._synthetic = broken
entry.main(["synthetic", "--output", "out"])
"""


def test_a_bug_of_prepare_shows_its_traceback() -> None:
    for error in ("KeyError('lost')", "ValueError('not a word of the user')"):
        done = run(code=BROKEN.format(error=error))
        assert done.returncode == 1
        assert "Traceback" in done.stderr and error.partition("(")[0] in done.stderr


def test_prepare_checks_versions_first() -> None:
    code = """
import recsys.cli as cli
from recsys.versions import VersionError
def mismatch(): raise VersionError("they differ")
cli.check_versions = mismatch
from recsys.prepare.__main__ import main
main(["synthetic", "--output", "out"])
"""
    done = run(code=code)
    assert (done.returncode, done.stderr) == (2, "error: they differ\n")


def test_a_run_that_a_signal_stopped_ends_with_one_line_and_its_code() -> None:
    for name, code in (("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)):
        done = run(
            code=f"""
import signal
from recsys.cli import run_entry
from recsys.errors import Stopped
def body(): raise Stopped(signal.{name}, 1234)
run_entry(body)
"""
        )
        assert (done.returncode, done.stdout) == (code, "")
        assert done.stderr == f"stopped by {name} at step 1234; run the same command to go on\n"


STOPPED = """
import signal
from recsys.cli import run_entry
def body():
    from recsys.errors import Stopped
    from recsys.runtime import process_group
    with process_group("cpu"):
        raise Stopped(signal.SIGTERM, 7)
if __name__ == "__main__":
    run_entry(body)
"""


@pytest.mark.parametrize(
    ("rank", "here", "waits"), [("0", "0", []), ("2", "0", [1]), ("3", "1", [2]), ("", "", []), ("first", "", [1])]
)
def test_before_ranks_have_met_the_first_of_all_machines_tells_first(
    monkeypatch: pytest.MonkeyPatch, rank: str, here: str, waits: list[int]
) -> None:
    """Then the first of each other machine, which is there where its launcher did not end with another's."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", here)
    assert cli._is_ours_to_tell(caused_by_a_peer=False)
    assert slept == [cli._PATIENCE_SECONDS * times for times in waits]


def test_the_first_rank_alone_tells_of_the_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stopped_entry.py").write_text(STOPPED)
    monkeypatch.syspath_prepend(tmp_path)
    first, second = run_module(2, "stopped_entry")
    assert (first.code, second.code) == (143, 143)
    assert first.stderr == "stopped by SIGTERM at step 7; run the same command to go on\n"
    assert second.stderr == first.stdout == second.stdout == ""
