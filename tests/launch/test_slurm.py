"""Our Slurm scheduler by TorchX's own commands, with Slurm's commands replaced by what they were seen to say.

`make test-cluster` has the real ones (tests/cluster/test_slurm_cluster.py).
"""

import os
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from torchx.cli import main as torchx
from torchx.cli.argparse_util import ArgOnceAction, torchxconfig
from torchx.cli.cmd_base import SubCommand
from torchx.specs import AppState

from launch import commands, slurm

ROOT = Path(__file__).parents[2]
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["torchx.cli.cmds"]
NO_ACCOUNTS = "echo Slurm accounting storage is disabled >&2; exit 1"
NODES = "printf 'gpu\\t8\\ntrain*\\t2\\n'"
UNKNOWN = "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1"
WITHOUT = f"squeue no longer knows job 7, and there is no accounting (sacct says {NO_ACCOUNTS[5:-12].strip()})"


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have commands of Slurm run a line of shell; those not given are not there."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "sh").symlink_to("/bin/sh")
    (binaries / "cat").symlink_to("/bin/cat")
    monkeypatch.setenv("PATH", str(binaries))
    monkeypatch.chdir(tmp_path)

    def saying(**lines: str) -> None:
        for name, line in lines.items():
            (binaries / name).write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8", errors="surrogateescape")
            (binaries / name).chmod(0o755)

    return saying


def jobs(*rows: str) -> str:
    return "cat <<'END'\n" + "\n".join(row.replace("|", "\t") for row in rows) + "\nEND"


def run(*arguments: str) -> int:
    """Run a TorchX command as `torchx` would, with the commands that we register."""
    ours: dict[str, SubCommand] = {name: load(path)() for name, path in COMMANDS.items()}
    for action in (ArgOnceAction, torchxconfig):
        action.called_args.clear()  # TorchX expects one command a process
    try:
        torchx.run_main({**torchx.get_default_sub_cmds(), **ours}, list(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def load(path: str) -> type[SubCommand]:
    module, _, name = path.partition(":")
    found: type[SubCommand] = getattr(import_module(module), name)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(*arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: slurm: ")]
    return line.removeprefix("error: slurm: ")


def test_a_job_is_submitted_as_torchx_writes_it(say: Callable[..., None], capsys, tmp_path: Path) -> None:
    say(sinfo=NODES, sbatch="cat > script; echo '7;federation'", squeue=jobs("7|PENDING|Resources||/w|echo-0"))
    assert run("run", "-s", "slurm", "utils.echo", "--msg", "two words") == 0
    assert capsys.readouterr().out.strip() == "slurm://torchx/7"
    script = (tmp_path / "script").read_text()
    assert script.startswith("#!/bin/bash\n") and "'two words'" in script


# Public reports: Lonestar's and Stampede's welcome, wrappers that leave --parsable out, clusters with names.
@pytest.mark.parametrize("told", [
    "7;nautilus", "Submitted batch job 7", "Submitted batch job 7 on cluster nautilus",
    "      Welcome to the Stampede3 Supercomputer\n\nNo reservation for this job\n--> Verifying ssh keys...OK\n7",
    "7;c1\nsee docs.example.org/2024",
])  # fmt: skip
def test_a_jobs_number_is_found_in_what_a_site_has_sbatch_say(say: Callable[..., None], capsys, told: str) -> None:
    say(sinfo=NODES, sbatch=f"cat > script; cat <<'END'\n{told}\nEND", squeue=jobs("7|PENDING|None||/w|echo-0"))
    assert run("run", "-s", "slurm", "utils.echo") == 0
    assert capsys.readouterr().out.strip() == "slurm://torchx/7"


def test_a_submission_without_a_number_is_one_line(say: Callable[..., None], capsys) -> None:
    say(sinfo=NODES, sbatch="cat > script; echo; echo Welcome to cluster 3")
    told = refused(capsys, "run", "-s", "slurm", "utils.echo")
    assert told == "sbatch told no job's number but 'Welcome to cluster 3'; squeue --me has the job if it was taken"


def test_what_a_site_says_of_a_job_is_passed_on(say: Callable[..., None], caplog) -> None:
    note = "sbatch: no partition specified, using default partition m100_all_serial"
    say(sinfo=NODES, sbatch=f"cat > script; echo '{note}' >&2; echo 7", squeue=jobs("7|PENDING|None||/w|echo-0"))
    assert run("run", "-s", "slurm", "utils.echo") == 0
    assert note in caplog.text


@pytest.mark.parametrize("sinfo", [
    "echo 'sinfo: error: Unable to contact slurm controller' >&2; exit 1",
    r"printf 'CLUSTER: c1\n\na\tbanner\ttoo\ntrain*\t9\n'",
])  # fmt: skip
def test_a_job_that_is_there_is_told_whatever_sinfo_says(say: Callable[..., None], capsys, sinfo: str) -> None:
    say(sinfo=sinfo, sbatch="cat > script; echo 7", squeue=jobs("7|PENDING|None||/w|echo-0"))
    assert run("run", "-s", "slurm", "utils.echo") == 0
    assert capsys.readouterr().out.strip() == "slurm://torchx/7"


def test_a_script_keeps_all_its_bytes(say: Callable[..., None], tmp_path: Path) -> None:
    say(sinfo=NODES, sbatch="cat > script; echo 7", squeue=jobs("7|PENDING|None||/w|echo-0"))
    assert run("run", "-s", "slurm", "utils.echo", "--msg", "映画-\udcff") == 0  # an argument that is no UTF-8
    assert "映画-".encode() + b"\xff" in (tmp_path / "script").read_bytes()


def test_a_job_directory_is_where_the_job_runs(say: Callable[..., None], tmp_path: Path) -> None:
    say(sinfo=NODES, sbatch='echo "$@" > arguments; echo 7', squeue=jobs("7|PENDING|None||/w|echo-0"))
    assert run("run", "-s", "slurm", "-cfg", "job_dir=/tmp/there", "--workspace", "", "utils.echo") == 0
    assert (tmp_path / "arguments").read_text() == "--parsable --chdir=/tmp/there\n"


@pytest.mark.parametrize(("nodes", "cfg", "waits"), [
    (2, "time=1", False), (3, "time=1", True), (3, "partition=gpu", False), (9, "partition=gpu", True),
    (3, "partition=of_another_cluster", False),
])  # fmt: skip
def test_a_job_of_more_nodes_than_there_are_is_told_to_wait(
    say: Callable[..., None], caplog, nodes: int, cfg: str, waits: bool
) -> None:
    say(sinfo=NODES, sbatch="echo 7", squeue=jobs("7+0|PENDING|None||/w|echo-0"))
    assert run("run", "-s", "slurm", "-cfg", cfg, "utils.echo", "--num_replicas", str(nodes)) == 0
    told = f"a job of {nodes} nodes waits: its partition has "
    assert (told in caplog.text) == waits


def test_what_sbatch_refuses_is_one_line(say: Callable[..., None], capsys) -> None:
    first = "sbatch: error: Memory specification can not be satisfied"
    second = "sbatch: error: Batch job submission failed: Requested node configuration is not available"
    say(sbatch=f"echo '{first}' >&2; echo '{second}' >&2; exit 1")
    told = refused(capsys, "run", "-s", "slurm", "utils.echo")
    reasons = f"{first} / {second}".replace("sbatch: error: ", "")
    assert told == f"the job is refused: sbatch says {reasons}"


@pytest.mark.parametrize(
    ("cfg", "told"),
    [
        ("partiton=gpu,time=1", "error: -cfg partiton: slurm has no such setting; there are partition, time, "),
        ("partition", "error: -cfg partition: `partition` does not have at least one `key=value` pair"),
        ("mail-type=ALL,nomem=x", "error: -cfg nomem: slurm has no such setting; there are partition, time, "),
    ],
)
def test_a_setting_that_a_scheduler_does_not_know_is_refused(capsys, cfg: str, told: str) -> None:
    assert run("run", "--dryrun", "-s", "slurm", "-cfg", cfg, "utils.echo") == 2
    assert capsys.readouterr().err.startswith(told)


@pytest.mark.parametrize(
    "arguments", [("run", "-s", "slurm", "utils.echo"), ("status", "slurm://torchx/7"), ("list", "-s", "slurm")]
)
def test_a_machine_without_slurm_is_named(say: Callable[..., None], capsys, arguments: tuple[str, ...]) -> None:
    assert "is not on this machine; submit where Slurm's commands are" in refused(capsys, *arguments)


HETEROGENEOUS = [f"7+{i}|RUNNING|None|node{i}|/w|train-{i}" for i in (0, 10, 2, 1, *range(3, 10))]


def test_status_tells_each_node_in_order(say: Callable[..., None], capsys) -> None:
    say(squeue=jobs(*HETEROGENEOUS))
    assert run("status", "slurm://torchx/7") == 0
    told = capsys.readouterr().out
    positions = [told.index(f"train[{node}]:RUNNING") for node in range(11)]
    assert positions == sorted(positions) and "Msg: RUNNING" in told


def test_sacct_is_asked_for_what_squeue_has_forgotten(say: Callable[..., None], capsys) -> None:
    say(squeue=UNKNOWN, sacct=jobs("7+0|COMPLETED|None|node0|/w|train-0", "7+1|FAILED|None|node1|/w|train-1"))
    assert run("status", "slurm://torchx/7") == 0
    assert "State: FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(("squeue", "sacct", "told"), [
    (UNKNOWN, NO_ACCOUNTS, WITHOUT),
    ("true", NO_ACCOUNTS, WITHOUT),
    (UNKNOWN, "true", "there is no job 7"),
    ("echo 'squeue: error: Unable to contact slurm controller (connect failure)' >&2; exit 1", "true",
     "squeue says slurm_load_jobs error: Unable to contact slurm controller"),
])  # fmt: skip
@pytest.mark.parametrize("command", ["status", "log", "cancel", "describe"])
def test_what_is_not_known_is_one_line(
    say: Callable[..., None], capsys, command: str, squeue: str, sacct: str, told: str
) -> None:
    say(squeue=squeue, sacct=sacct)
    assert refused(capsys, command, "slurm://torchx/7").startswith(told.replace("slurm_load_jobs error: ", ""))


def test_a_handle_without_a_number_is_refused(say: Callable[..., None], capsys) -> None:
    assert refused(capsys, "status", "slurm://torchx/train-7").startswith('a job of Slurm is a number, not "train-7"')


def test_list_has_a_heterogeneous_job_once_as_squeue_knows_it(say: Callable[..., None], capsys) -> None:
    old = ["6|CANCELLED by 1000|None||/w|train-0", "10|COMPLETED|None|n1|/w|sh", "7+0|RUNNING|None|node0|/w|train-0"]
    now = ["7+0|COMPLETING|None|node0|/w|train-0", "7+1|FAILED|NonZeroExitCode|node1|/w|train-1"]
    say(sacct=jobs(*old), squeue=jobs(*now))
    assert run("list", "-s", "slurm") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [
        [f"slurm://torchx/{job}", state] for job, state in ((6, "CANCELLED"), (7, "RUNNING"), (10, "SUCCEEDED"))
    ]


def test_arrays_steps_and_a_sites_own_words_do_not_mislead(say: Callable[..., None], capsys) -> None:
    rows = ["Welcome to c1", "7_1|COMPLETED|None|n1|/w|sweep", "7_1.batch|COMPLETED|None|n1|/w|batch"]
    rows += ["7_[3-9%2]|PENDING|JobArrayTaskLimit||/w|sweep", "7.extern|FAILED|None|n1|/w|extern"]
    say(sacct=jobs(*rows), squeue=jobs("7_2|FAILED|None|n2|/w|sweep", "8|COMPLETED|None|n1|/w|train-²"))
    assert run("list", "-s", "slurm") == 0
    told = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert told == [["slurm://torchx/7", "PENDING"], ["slurm://torchx/8", "SUCCEEDED"]]
    assert run("status", "slurm://torchx/8") == 0
    assert "State: SUCCEEDED" in capsys.readouterr().out


def test_list_says_what_it_lacks_without_accounting(say: Callable[..., None], capsys, caplog) -> None:
    say(sacct=NO_ACCOUNTS, squeue=jobs("7|RUNNING|None|node0|/w|train-0"))
    assert run("list", "-s", "slurm") == 0
    assert "slurm://torchx/7" in capsys.readouterr().out
    assert "jobs that ended some minutes ago are not listed: sacct says Slurm accounting" in caplog.text


@pytest.mark.parametrize("folder", ["where it was submitted", "a\ttab", "映画", "latin-\udce9", "line\u2028separator"])
def test_logs_are_found_from_anywhere(say: Callable[..., None], capsys, tmp_path: Path, folder: str) -> None:
    there = tmp_path / folder
    there.mkdir()
    for stream in ("out", "err"):
        (there / f"slurm-7-train-0.{stream}").write_text(f"a line of {stream}\nerror: of {stream}\n")
    say(squeue=jobs(f"7|FAILED|NonZeroExitCode|node0|{there}|train-0"))

    def told(*more: str) -> list[str]:
        assert run("log", *more, "slurm://torchx/7/train/0") == 0
        return [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines()]

    assert told() == ["a line of err", "error: of err"]
    assert told("--streams", "stdout") == ["a line of out", "error: of out"]
    assert told("--regex", "^error: ") == ["error: of err"]
    assert "--streams stdout or --streams stderr" in refused(
        capsys, "log", "--streams", "combined", "slurm://torchx/7/train/0"
    )
    assert "has no train/3; it has train/0" in refused(capsys, "log", "slurm://torchx/7/train/3")


def test_logs_that_are_not_there_are_named(say: Callable[..., None], capsys) -> None:
    say(squeue=jobs("7|COMPLETED|None|node0|/no/such|train-0"))
    told = refused(capsys, "log", "slurm://torchx/7/train/0")
    assert told == "job 7 is COMPLETED, and left no /no/such/slurm-7-train-0.err, or not on this machine"


def test_what_scancel_refuses_is_one_line(say: Callable[..., None], capsys) -> None:
    row = jobs("7|RUNNING|None|node0|/w|train-0")
    say(squeue=row, scancel="echo 'scancel: error: Kill job error on job id 7: Access/permission denied' >&2; exit 1")
    told = refused(capsys, "cancel", "slurm://torchx_other/7")
    assert told == "job 7 is not cancelled: scancel says Kill job error on job id 7: Access/permission denied"


# All of squeue's manual, 22.05 and 25.05, and how sacct writes them.
@pytest.mark.parametrize(("told", "state"), [
    ("BOOT_FAIL", AppState.FAILED), ("CANCELLED by 1000", AppState.CANCELLED), ("CANCELLED+", AppState.CANCELLED),
    ("COMPLETED", AppState.SUCCEEDED), ("COMPLETING", AppState.RUNNING), ("CONFIGURING", AppState.PENDING),
    ("DEADLINE", AppState.FAILED), ("EXPEDITING", AppState.PENDING), ("FAILED", AppState.FAILED),
    ("LAUNCH_FAILED", AppState.FAILED), ("NODE_FAIL", AppState.FAILED), ("OUT_OF_MEMORY", AppState.FAILED),
    ("PENDING", AppState.PENDING), ("POWER_UP_NODE", AppState.PENDING), ("PREEMPTED", AppState.FAILED),
    ("RECONFIG_FAIL", AppState.FAILED), ("REQUEUED", AppState.PENDING), ("REQUEUE_FED", AppState.PENDING),
    ("REQUEUE_HOLD", AppState.PENDING), ("RESIZING", AppState.PENDING), ("RESV_DEL_HOLD", AppState.PENDING),
    ("REVOKED", AppState.FAILED), ("RUNNING", AppState.RUNNING), ("SIGNALING", AppState.RUNNING),
    ("SPECIAL_EXIT", AppState.PENDING), ("STAGE_OUT", AppState.RUNNING), ("STOPPED", AppState.PENDING),
    ("SUSPENDED", AppState.PENDING), ("TIMEOUT", AppState.FAILED), ("UPDATE_DB", AppState.RUNNING),
    ("A_STATE_TO_COME", AppState.UNKNOWN),
])  # fmt: skip
def test_states_are_those_of_torchx(say: Callable[..., None], told: str, state: AppState) -> None:
    say(squeue=jobs(f"7|{told}|None|node0|/w|train-0"))
    found = slurm.create_scheduler("torchx").describe("7")
    assert found.state == state and found.msg == told


def test_torchx_takes_our_scheduler_and_leaves_its_own_default() -> None:
    from torchx.schedulers import get_default_scheduler_name, get_scheduler_factories

    assert commands.slurm is slurm
    assert isinstance(get_scheduler_factories()["slurm"]("torchx"), slurm.SlurmScheduler)
    assert get_default_scheduler_name() == "local_docker"
    assert set(COMMANDS) == {"cancel", "describe", "list", "log", "run", "status"} and os.path.isfile(commands.__file__)
