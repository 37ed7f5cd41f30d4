"""Every component for real, one after another, on this machine: in folders and with overrides that shells dislike."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tiny import write_tiny_config, write_tiny_log

from recsys.config import load_config

ROOT = Path(__file__).parents[2]
BINARIES = Path(sys.executable).parent
ODD = 'it\'s $HOME, "a b"; $$=1'


def environment() -> dict[str, str]:
    path = f"{BINARIES}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "LOGLEVEL": "WARNING", "OMP_NUM_THREADS": "1"}


def torchx(folder: Path, component: str, *arguments: str) -> str:
    """Run a component; what its processes wrote, from the logs that `.torchxconfig` keeps."""
    config = folder / ".torchxconfig"
    config.write_text((ROOT / ".torchxconfig").read_text())
    command = [str(BINARIES / "torchx"), "run", "-s", "local_cwd", f"hilorec.{component}", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=240)
    (handle,) = re.findall(r"^local_cwd://torchx/(.*)$", done.stdout, re.MULTILINE)
    told = (folder / "outputs" / "torchx" / "torchx" / handle / component / "0" / "combined.log").read_text()
    assert done.returncode == 0, told + done.stderr
    return told


def ranks_told(folder: Path) -> list[Path]:
    """Files of what each rank wrote by itself."""
    return sorted(folder.glob("outputs/torchx/torchx/*/torchelastic/train/*/attempt_0/*/stdout.log"))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    folder = tmp_path / ODD
    folder.mkdir()
    write_tiny_log(folder)
    return write_tiny_config(folder / "tiny config.yaml", folder, folder / "out")


@pytest.mark.slow
def test_from_training_to_predictions(tiny: Path) -> None:
    folder = tiny.parent
    out = folder / f"out {ODD}"
    one_stage = ["stages.experts=null", "stages.joint=null"]
    torchx(folder, "train", "-j", "1x2", "--config", str(tiny), "--output_dir", str(out), *one_stage)
    assert load_config(out / "config.yaml").output_dir == str(out)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["world_size"] == 2
    files = ranks_told(folder)
    assert [file.parent.name for file in files] == ["0", "1"]
    assert "Outputs in" in " ".join(files[0].read_text().split())

    checkpoint = str(out / "checkpoints" / f"step-{summary['steps']}")
    told = torchx(folder, "evaluate", "-j", "1x2", "--checkpoint", checkpoint, "--json", "True", "data.batch_size=64")
    figures = json.loads("".join(re.findall(r"^\[0\]:(.*)$", told, re.MULTILINE)))
    assert figures["model"]["auc"] == pytest.approx(summary["test"]["auc"], abs=1e-6)

    artifact = folder / f"artifact {ODD}"
    told = torchx(folder, "export", "--checkpoint", checkpoint, "--output", str(artifact), "--tables", "float16")
    assert f"Written: {artifact}" in told

    predictions = folder / f"predictions {ODD}"
    where = ["--input", "test/*.parquet", "--output", str(predictions), "--logit", "True"]
    torchx(folder, "predict", "-j", "1x2", "--artifact", str(artifact), *where)
    assert {"probability", "logit"} <= set(pq.read_table(predictions).column_names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "told"), [(["seeed=1"], "seeed: unknown key"), (["--gpu", "2"], "the job asks for 2 GPUs")]
)
def test_what_a_person_has_to_put_right_is_told_once_whatever_the_retries(
    tiny: Path, arguments: list[str], told: str
) -> None:
    line = ["torchx", "run", "-s", "local_cwd", "-cfg", "log_dir=logs", "hilorec.train", "-j", "1x2"]
    line += ["--max_retries", "3", "--config", str(tiny), *arguments]
    env = {**environment(), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(line, cwd=tiny.parent, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1  # torchx's own
    (log,) = tiny.parent.glob("logs/torchx/*/train/0/stderr.log")
    assert len(re.findall(r"^\[\d\]:error: ", log.read_text(), re.MULTILINE)) == 1
    assert told in log.read_text()


@pytest.mark.slow
def test_tensorboard_serves(tmp_path: Path) -> None:
    command = [str(BINARIES / "torchx"), "run", "-s", "local_cwd", "hilorec.tensorboard", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True) as torchx:
        assert torchx.stderr is not None
        until, found = time.monotonic() + 60, None
        while found is None and time.monotonic() < until:
            found = re.search(r"http://(\S+?):(\d+)", torchx.stderr.readline())
        assert found is not None and found[1] == "127.0.0.1"
        with urllib.request.urlopen(found[0], timeout=30) as page:
            assert b"TensorBoard" in page.read()
        torchx.terminate()
        torchx.wait(30)
