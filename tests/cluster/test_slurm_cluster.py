"""Jobs on a real Slurm of two nodes, submitted, followed and signalled as its users do, by TorchX's commands.

`make test-cluster` brings the cluster up with tests/cluster/slurm.sh. Figures go to what `CLUSTER_RESULTS` names.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hosts import await_
from runs import checkpoint_tensors
from test_lifetime import environment
from tiny import tiny_config, write_tiny_log

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
SLURM = str(ROOT / "tests" / "cluster" / "slurm.sh")
BINARIES = Path(sys.executable).parent


class Cluster:
    """The cluster of a folder, used from its head."""

    def __init__(self, folder: str | None = None) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        path = f"{BINARIES}{os.pathsep}{os.environ['PATH']}"
        self.env = {**kept, **environment(PATH=path), **({"CLUSTER": folder} if folder else {})}

    def script(self, *arguments: str, **more: str) -> None:
        subprocess.run([SLURM, *arguments], env={**self.env, **more}, check=True)

    def ask(self, *command: str, at: Path = ROOT, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the head."""
        there, env = [SLURM, "at", "head", *command], {**self.env, **more}
        return subprocess.run(there, env=env, cwd=at, capture_output=True, text=True, timeout=300)

    def told(self, *command: str, at: Path = ROOT, **more: str) -> str:
        done = self.ask(*command, at=at, **more)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, at: Path, *arguments: str, **more: str) -> "Job":
        handle = self.told("torchx", "run", "-s", "slurm", *arguments, at=at, **more).strip()
        assert re.fullmatch(r"slurm://torchx/\d+", handle)
        return Job(self, handle, at)


class Job:
    """A job that was submitted."""

    def __init__(self, cluster: Cluster, handle: str, folder: Path) -> None:
        self.cluster, self.handle, self.folder = cluster, handle, folder
        self.number = handle.rpartition("/")[2]

    def status(self) -> str:
        return self.cluster.told("torchx", "status", self.handle)

    def state(self) -> str:
        found = re.search(r"State: (\w+)", self.status())
        assert found
        return found[1]

    def log(self, node: int = 0, stream: str = "out") -> str:
        path = self.folder / f"slurm-{self.number}-train-{node}.{stream}"
        return path.read_text() if path.exists() else ""

    def all(self) -> str:
        return "\n".join(path.read_text() for path in self.folder.glob(f"slurm-{self.number}*"))

    def accounts(self) -> list[str]:
        """Slurm's states of its nodes, with exit codes, once no step of it is at work."""
        columns = ["--format=State,ExitCode", "--noheader", "--parsable2", "--allocations"]
        return self.cluster.told("sacct", *columns, f"--jobs={self.number}").splitlines()

    def queued(self) -> bool:
        return self.number in self.cluster.told("squeue", "--noheader", "--format=%A")

    def await_end(self) -> float:
        return await_(lambda: not self.queued(), 300, self.all)

    def await_stage(self, stage: str) -> None:
        await_(lambda: re.search(rf"^\[0\]:{stage} +step", self.log(), re.M) is not None, 240, self.all)

    def signal(self, *how: str) -> float:
        """Signal it, and tell after how many seconds it had ended."""
        self.cluster.told("scancel", *how, self.number)
        return self.await_end()


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    cluster = Cluster()
    if cluster.ask("sinfo", "--noheader", "--Node", "--format=%N").stdout.split() != ["node0", "node1"]:
        pytest.skip("no cluster of two nodes is up: tests/cluster/slurm.sh up, or make test-cluster")
    return cluster


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where jobs are submitted: a log, a config in three stages, and the jobs' files."""
    folder = tmp_path_factory.mktemp("submitted")
    write_tiny_log(folder / "log")
    raw = tiny_config(folder / "log", folder / "out")
    raw["stages"]["joint"] |= {"steps": 50, "warmup_steps": 5}
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    return folder


@pytest.fixture(scope="module")
def alone(cluster: Cluster, place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The last checkpoint of the same run with two ranks on one host, without Slurm."""
    arguments = ["--standalone", "--nproc-per-node", "2", "-m", "recsys.train", "--config", "config.yaml"]
    cluster.told("env", "OMP_NUM_THREADS=2", "torchrun", *arguments, "output_dir=alone", at=place)
    return last_checkpoint(place / "alone", tmp_path_factory.mktemp("alone"))


def last_checkpoint(output: Path, scratch: Path) -> dict[str, torch.Tensor]:
    steps = sorted((output / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))
    return checkpoint_tensors(steps[-1], scratch)


def check_same(output: Path, alone: dict[str, torch.Tensor], scratch: Path) -> None:
    found = last_checkpoint(output, scratch)
    assert found.keys() == alone.keys() and all(torch.equal(found[name], alone[name]) for name in alone)


def train(output: str, *more: str) -> list[str]:
    options = [more[index] for index in range(len(more)) if not re.match(r"\w+[.\w]*=", more[index])]
    overrides = [word for word in more if word not in options]
    return ["hilorec.train", "-j", "2x1", "--config", "config.yaml", *options, f"output_dir={output}", *overrides]


@pytest.fixture(scope="module")
def note() -> Iterator[Callable[[str], None]]:
    """Keep a figure for the page of results."""
    lines: list[str] = []
    yield lines.append
    if path := os.environ.get("CLUSTER_RESULTS"):
        Path(path).write_text("".join(f"{line}\n" for line in lines))


def test_a_job_on_two_nodes_is_followed_to_the_bits_of_one_host(
    cluster: Cluster, place: Path, alone: dict[str, torch.Tensor], tmp_path: Path, note: Callable[[str], None]
) -> None:
    began = time.monotonic()
    job = cluster.submit(place, *train("two"))
    assert job.state() in ("PENDING", "RUNNING")
    note(f"from submission to running: {await_(lambda: job.state() == 'RUNNING', 90, job.status):.0f} s")
    job.await_end()
    note(f"a job of three stages on two nodes: {time.monotonic() - began:.0f} s")
    await_(lambda: job.accounts() == ["COMPLETED|0:0"] * 2, 20, lambda: str(job.accounts()))
    assert "train[0]:SUCCEEDED" in job.status() and "train[1]:SUCCEEDED" in job.status()
    listed = cluster.told("torchx", "list", "-s", "slurm")
    assert re.findall(rf"^{job.handle} +(\w+)$", listed, re.M) == ["SUCCEEDED"]
    # From another directory than that of the job.
    lines = cluster.told("torchx", "log", "--streams", "stdout", job.handle, at=tmp_path)
    assert "[0]:tiny: 2 ranks on cpu" in lines and "train/0" in lines
    assert "rank" in cluster.told("torchx", "log", "--streams", "stdout", "--regex", "2 ranks", f"{job.handle}/train/0")
    nodes = cluster.told("sacct", "--allocations", "--noheader", "--format=NodeList%20", f"--jobs={job.number}")
    assert nodes.split() == ["node0", "node1"]
    check_same(place / "two", alone, tmp_path)


@pytest.mark.parametrize("how", [["--signal=TERM"], ["--signal=TERM", "--batch"], []], ids=["steps", "batch", "cancel"])
def test_a_signal_saves_and_requeue_goes_on_to_the_same_bits(
    cluster: Cluster,
    place: Path,
    alone: dict[str, torch.Tensor],
    tmp_path: Path,
    note: Callable[[str], None],
    how: list[str],
) -> None:
    output = f"stopped-{tmp_path.name}"
    job = cluster.submit(place, *train(output))
    job.await_stage("joint")
    seconds = job.signal(*how)
    (step,) = re.findall(r"stopped by SIGTERM at step (\d+); run the same command to go on", job.all())
    assert (place / output / "checkpoints" / f"step-{step}" / "meta.json").exists()
    states = job.accounts()
    note(f"scancel {' '.join(how)}: saved and ended after {seconds:.1f} s, as {', '.join(states)}".replace("  ", " "))
    assert job.state() == ("FAILED" if how else "CANCELLED")
    cluster.told("scontrol", "requeue", job.number)
    assert job.state() == "PENDING"
    job.await_end()
    assert job.state() == "SUCCEEDED"
    assert f"[0]:Resumed from {output}/checkpoints/step-{step}: joint" in job.log()
    check_same(place / output, alone, tmp_path)


def test_a_job_goes_on_beyond_its_limit_of_time(
    cluster: Cluster, place: Path, tmp_path: Path, note: Callable[[str], None]
) -> None:
    """Told of its end a minute before, by sbatch's own variable, it saves and is requeued by its script."""
    cfg = ["-cfg", "time=3"]
    more = train("limited", "--max_retries", "1", "stages.joint.steps=100000")
    job = cluster.submit(place, *cfg, *more, SBATCH_SIGNAL="TERM@60")
    stopped = r"stopped by SIGTERM at step (\d+); run the same command to go on"
    seconds = await_(lambda: re.search(stopped, job.all()) is not None, 200, job.all)
    note(f"SBATCH_SIGNAL=TERM@60 with a limit of 3 min: saved after {seconds:.0f} s")
    (step,) = re.findall(stopped, job.all())
    await_(lambda: f"Resumed from limited/checkpoints/step-{step}: joint" in job.log(), 200, job.all)
    job.signal()


def test_a_config_that_is_wrong_fails_with_one_line(cluster: Cluster, place: Path) -> None:
    """On each node, with the exit code by which its script knows that a retry would end alike."""
    job = cluster.submit(place, *train("never", "--max_retries", "1", "stages.joint.steps=-1"))
    job.await_end()
    assert job.state() == "FAILED"
    said = cluster.told("torchx", "log", "--regex", r"^\[[0-9]+\]:", job.handle)
    assert said.count("error: ") == said.count("stages.joint.steps: Input should be greater than 0, found -1") == 2
    assert "train/0 [0]:error: " in said and "train/1 [0]:error: " in said
    await_(lambda: job.accounts() == ["FAILED|2:0"] * 2, 20, lambda: str(job.accounts()))
    assert not (place / "never").exists()


def ranks(cluster: Cluster, host: str) -> list[int]:
    """Processes of ranks on a host, by torchrun's variable; a host shares the machine's numbers of processes."""
    listed = cluster.told("ps", "-eo", "pid,args")
    found = [
        int(line.split()[0]) for line in listed.splitlines() if "-m recsys.train" in line and "recsys.agent" not in line
    ]
    names = {
        pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in found if Path(f"/proc/{pid}").exists()
    }
    return [pid for pid, variables in names.items() if f"SLURMD_NODENAME={host}".encode() in variables]


@pytest.mark.parametrize("retries", [0, 1])
def test_a_rank_that_is_killed(
    cluster: Cluster, place: Path, alone: dict[str, torch.Tensor], tmp_path: Path, retries: int
) -> None:
    """It is named; with a retry, torchrun starts all again, within the job."""
    output = f"killed-{retries}"
    job = cluster.submit(place, *train(output, "--max_retries", str(retries), "rank_timeout_seconds=20"))
    job.await_stage("joint")
    (rank,) = ranks(cluster, "node1")
    os.kill(rank, 9)
    job.await_end()
    said = cluster.told("torchx", "log", "--regex", r"^\[[0-9]+\]:", job.handle)
    lines = [line for line in said.splitlines() if "error: " in line]
    assert len(lines) == 1 and f"error: rank 1 (node1, process {rank}) is gone or cut off" in lines[0]
    assert job.state() == ("SUCCEEDED" if retries else "FAILED")
    if retries:
        check_same(place / output, alone, tmp_path)


def test_a_node_that_is_lost_has_its_job_started_again(
    cluster: Cluster, place: Path, alone: dict[str, torch.Tensor], tmp_path: Path, note: Callable[[str], None]
) -> None:
    """By Slurm, which may pass on late to the new attempt what was to end the old one; that saves, and is a retry."""
    job = cluster.submit(place, *train("lost", "--max_retries", "3"))
    job.await_stage("joint")
    cluster.script("crash", "node1")
    seconds = await_(lambda: job.state() != "RUNNING", 120, job.status)
    note(f"a node lost: noticed by Slurm after {seconds:.0f} s (SlurmdTimeout 20 s), the job is then {job.state()}")
    cluster.script("boot", "node1")
    job.await_end()
    assert job.state() == "SUCCEEDED"
    check_same(place / "lost", alone, tmp_path)


def test_a_drained_node_has_jobs_wait(cluster: Cluster, place: Path) -> None:
    cluster.told("scontrol", "update", "nodename=node1", "state=drain", "reason=test")
    try:
        job = cluster.submit(place, *train("drained"))
        time.sleep(5)
        assert job.state() == "PENDING"
        cluster.told("torchx", "cancel", job.handle)
        job.await_end()
        assert job.state() == "CANCELLED"
    finally:
        cluster.told("scontrol", "update", "nodename=node1", "state=resume")


def test_two_jobs_share_their_nodes(
    cluster: Cluster, place: Path, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    first, second = (cluster.submit(place, *train(f"shared-{job}")) for job in (1, 2))
    for job in (first, second):
        job.await_stage("backbone")
    first.signal()
    second.await_end()
    assert second.state() == "SUCCEEDED" and first.state() == "CANCELLED"
    check_same(place / "shared-2", alone, tmp_path)


def test_what_the_job_is_given_arrives(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "say.py"
    script.write_text("import os, sys\nprint([*sys.argv[1:], os.environ['A'], os.environ['OMP_NUM_THREADS']])\n")
    job = cluster.submit(tmp_path, "dist.ddp", "-j", "1x1", "--env", "A=x,y z", str(script), "it's $HOME", 'a "b"')
    job.await_end()
    told = (tmp_path / f"slurm-{job.number}-say-0.out").read_text()
    assert told.strip() == "[0]:" + str(["it's $HOME", 'a "b"', "x,y z", "2"])


@pytest.mark.parametrize(("arguments", "told"), [
    (["-cfg", "partition=nosuch", "utils.echo"], "invalid partition specified: nosuch"),
    (["hilorec.train", "-j", "2x1", "--memMB", "30000"], "Memory specification can not be satisfied"),
    (["hilorec.train", "-j", "2x1", "--cpu", "9"], "CPU count per node can not be satisfied"),
    (["hilorec.train", "-j", "2x1", "--gpu", "1"], "Invalid generic resource"),
])  # fmt: skip
def test_what_the_cluster_has_not_is_refused_in_one_line(
    cluster: Cluster, place: Path, arguments: list[str], told: str
) -> None:
    done = cluster.ask("torchx", "run", "-s", "slurm", *arguments, at=place)
    (error,) = re.findall(r"^error: slurm: the job is refused: sbatch says (.*)$", done.stderr, re.M)
    assert done.returncode == 2 and told in error and "Traceback" not in done.stderr


def test_a_job_of_more_nodes_than_there_are_waits(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.ask("torchx", "run", "-s", "slurm", "utils.echo", "--num_replicas", "3", at=tmp_path)
    job = Job(cluster, done.stdout.strip(), tmp_path)
    assert "a job of 3 nodes waits: its partition has 2" in done.stderr
    time.sleep(5)
    assert "Msg: PENDING (" in job.status()
    cluster.told("torchx", "cancel", job.handle)
    job.await_end()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of one node without accounting."""
    cluster = Cluster(str(tmp_path_factory.mktemp("bare") / "cluster"))
    cluster.script("up", "1", ACCOUNTING="no")
    yield cluster
    cluster.script("down")


def test_without_accounting_jobs_are_followed_as_long_as_slurm_knows_them(bare: Cluster, tmp_path: Path) -> None:
    assert "accounting storage is disabled" in bare.ask("sacct").stderr
    job = bare.submit(tmp_path, "utils.echo", "--msg", "hello")
    job.await_end()
    assert job.state() == "SUCCEEDED"
    assert "hello" in bare.told("torchx", "log", "--streams", "stdout", job.handle)
    listed = bare.ask("torchx", "list", "-s", "slurm")
    assert job.handle in listed.stdout and "jobs that ended some minutes ago are not listed" in listed.stderr
    unknown = bare.ask("torchx", "status", "slurm://torchx/999")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: slurm: squeue no longer knows job 999, and there is no accounting")


def test_what_is_up_stays_and_what_crashed_is_cleaned_up(bare: Cluster, tmp_path: Path) -> None:
    before = bare.told("sinfo", "--noheader")
    bare.script("up", "1", ACCOUNTING="no")
    assert bare.told("sinfo", "--noheader") == before
    bare.script("crash", "head")
    bare.script("up", "1", ACCOUNTING="no")
    assert bare.told("srun", "hostname") == "node0\n"
