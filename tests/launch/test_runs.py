"""Real runs of a small script by the command line, on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
print("RAN", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], sys.argv[1:])
sys.exit("fail" in sys.argv)
"""


@pytest.fixture
def project(tmp_path):
    package = tmp_path / "recsys"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "train.py").write_text(SCRIPT)
    return tmp_path


def torchx(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a component; stdout becomes what the processes wrote.

    It is read from TorchX's log files: its console can lose what is written a moment before the end.
    """
    binaries = Path(sys.executable).parent
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    env |= {"PATH": f"{binaries}{os.pathsep}{env['PATH']}", "LOGLEVEL": "WARNING"}
    command = [str(binaries / "torchx"), "run", "-s", "local_cwd", "-cfg", "log_dir=logs", *arguments]
    run = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=120)
    logs = [*project.glob("logs/**/stdout.log"), *project.glob("logs/**/stderr.log")]
    run.stdout = "".join(log.read_text() for log in logs)
    return run


def test_script_by_its_bare_path(project):
    run = torchx(project, "dist.ddp", "-j", "1x2", "recsys/train.py", "--config", "x.yaml", "a.b=1", "two words")
    assert run.returncode == 0, run.stderr
    for rank in range(2):
        assert f"RAN {rank} of 2 ['--config', 'x.yaml', 'a.b=1', 'two words']" in run.stdout
    assert "OMP_NUM_THREADS" not in run.stdout


@pytest.mark.parametrize("target", [("--script", "recsys/train.py"), ("-m", "recsys.train")])
def test_script_and_module_by_name(project, target):
    run = torchx(project, "dist.ddp", "-j", "1x1", *target, "a=1")
    assert run.returncode == 0, run.stderr
    assert "RAN 0 of 1 ['a=1']" in run.stdout


def test_two_nodes_on_one_machine_meet_though_the_usual_port_is_taken(project):
    with socket.socket() as other:
        other.bind(("", 29500))
        other.listen()
        run = torchx(project, "hilorec.train", "-j", "2x2", "--config", "x.yaml", "a=1")
    assert run.returncode == 0, run.stderr
    for rank in range(4):
        assert f"RAN {rank} of 4 ['--config', 'x.yaml', 'a=1']" in run.stdout


def test_failure_is_the_exit_code(project):
    run = torchx(project, "dist.ddp", "-j", "1x1", "recsys/train.py", "fail")
    assert run.returncode == 1
    assert "RAN 0 of 1 ['fail']" in run.stdout


def test_missing_script_is_explained_without_a_traceback(project):
    run = torchx(project, "dist.ddp", "-j", "1x1")
    assert run.returncode == 1
    assert "SCRIPT" in run.stderr
    assert "Traceback" not in run.stderr


def test_echo(project):
    run = torchx(project, "utils.echo", "--msg", "hello from stock")
    assert run.returncode == 0, run.stderr
    assert "hello from stock" in run.stdout
