"""The README's commands work as written, on data small enough for a test; the docs name every key of the config."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel
from tiny import write_tiny_config, write_tiny_log

from recsys.config import Config, load_config
from recsys.training.optimizers import phase_lengths

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.strip()
    for block in re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "LOGLEVEL": "WARNING",
    "MAKEFLAGS": "",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    write_tiny_log(folder)
    return write_tiny_config(folder / "tiny.yaml", folder, folder / "out")


def run(command: str, *, cwd: Path = ROOT, timeout: float = 240.0) -> str:
    finished = subprocess.run(
        shlex.split(command), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout
    )
    assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout + finished.stderr


def command(start: str) -> str:
    """The README's one command that starts so; the rest of it may change."""
    (found,) = [line for line in COMMANDS if line.startswith(start)]
    return found


def with_config(line: str, config: Path, output_dir: Path) -> str:
    """The command on the tiny config, its own overrides kept, its outputs elsewhere."""
    line = re.sub(r" --config \S+", "", line)
    kept = [word for word in line.split() if "=" in word]
    line = " ".join(word for word in line.split() if word not in kept)
    return f"{line} --config {config} {' '.join(kept)} output_dir={output_dir}"


def steps_of(output_dir: Path) -> int:
    return int(json.loads((output_dir / "summary.json").read_text())["steps"])


def test_every_command_is_run_by_a_test_below() -> None:
    tested = [
        "make train",
        "make test",
        "make tensorboard",
        "torchx run -s local_cwd dist.ddp -j 1x4 recsys/train.py",
        "torchx run -s local_cwd dist.ddp -j 1x2 recsys/train.py --config configs/small.yaml",
        "torchx run -s local_cwd hilorec.train -j 2x2",
        "torchrun --nproc-per-node 2 -m recsys.train",
        "python -m recsys.train",
        "python -m recsys.evaluate",
        "python -m recsys.export",
        "python -m recsys.predict",
        "python -m recsys.plan",
        "python -m recsys.doctor",  # tests/test_doctor.py
        "docker compose",  # tests/test_docker.py reads what it would build; there is no engine to run it
        "python -m recsys.prepare validate",
        "python -m recsys.prepare movielens-1m",  # tests/test_prepare.py
        "python -m benchmarks.quality",  # tests/benchmarks
        "torchrun --nproc-per-node 2 -m benchmarks.step",  # tests/benchmarks
        "torchx run -s local_cwd dist.ddp -j 1x2 recsys/train.py --config configs/movielens_1m.yaml",
    ]
    assert [line for line in COMMANDS if not any(line.startswith(start) for start in tested)] == []
    assert [start for start in tested if not any(line.startswith(start) for line in COMMANDS)] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "start",
    [
        "torchx run -s local_cwd dist.ddp -j 1x4 recsys/train.py",
        "torchx run -s local_cwd dist.ddp -j 1x2 recsys/train.py --config configs/small.yaml",
        "torchx run -s local_cwd hilorec.train -j 2x2",
        "torchrun --nproc-per-node 2 -m recsys.train",
        "python -m recsys.train",
    ],
)
def test_training_commands(config: Path, tmp_path: Path, start: str) -> None:
    run(with_config(command(start), config, tmp_path / "out"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    shape = re.search(r"-j (\d)x(\d)|--nproc-per-node (\d)", start)
    ranks = [int(n) for n in shape.groups() if n] if shape else [1]
    assert summary["world_size"] == ranks[0] * (ranks[1] if len(ranks) > 1 else 1)
    assert summary["steps"] > 0
    assert load_config(tmp_path / "out" / "config.yaml").output_dir == str(tmp_path / "out")


def test_make_train_trains_on_two_ranks_and_says_where_the_outputs_are(config: Path, tmp_path: Path) -> None:
    output = run(f'{command("make train")} ARGS="--config {config} output_dir={tmp_path}/out"')
    assert "installing" not in output  # the environment that runs this test is the one that make would set up
    assert f"Outputs in {tmp_path}/out" in output
    assert "Warning" not in output
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["world_size"] == 2


def test_make_train_fails_when_training_does(config: Path) -> None:
    line = f'make train ARGS="--config {config} data.batch_sise=1"'
    finished = subprocess.run(shlex.split(line), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert finished.returncode != 0
    output = finished.stdout + finished.stderr
    assert len(re.findall(r"\[\d\]:error: ", output)) == 1, output
    assert "data.batch_sise: unknown key" in output


def test_make_test_runs_pytest() -> None:
    assert "test_readme.py" in run(f'{command("make test")} ARGS="--collect-only -q tests/test_readme.py"')


@pytest.mark.slow
def test_evaluate_takes_the_checkpoint_of_a_run(config: Path, tmp_path: Path) -> None:
    run(f"python -m recsys.train --config {config} output_dir={tmp_path}/out stages.experts=null stages.joint=null")
    steps = steps_of(tmp_path / "out")
    line = re.sub(r"outputs/\S+", f"{tmp_path}/out/checkpoints/step-{steps}", command("python -m recsys.evaluate"))
    assert f"step-{steps}, test" in run(line)
    line = command("python -m recsys.export").replace("outputs/small", f"{tmp_path}/out")
    assert "Its probabilities are the model's on" in run(re.sub(r"step-\d+", f"step-{steps}", line))
    line = command("python -m recsys.predict").replace("outputs/small", f"{tmp_path}/out")
    line = re.sub(r"--input \S+ --output \S+", f"--input {config.parent}/test --output {tmp_path}/predictions", line)
    assert "251 rows predicted" in run(line)
    score = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    assert score is not None
    names: dict[str, Any] = {"rows": pq.read_table(config.parent / "test")}
    exec(score[1].replace("outputs/small", f"{tmp_path}/out"), names)
    assert names["scorer"].columns
    assert len(names["scorer"].score(names["rows"])) == 251


def test_validate_reads_a_sample_and_finds_nothing_wrong(config: Path, tmp_path: Path) -> None:
    output = run(with_config(command("python -m recsys.prepare validate"), config, tmp_path))
    assert "0 errors, 0 warnings" in output


def test_plan_prints_where_the_tables_would_be_and_what_an_example_costs() -> None:
    output = run(command("python -m recsys.plan"))
    assert "Embedding plan" in output
    assert "Cost of hilomoe mlp 64x32 L2 K4 against mlp 64x32" in output


def test_the_checkpoint_that_the_readme_evaluates_is_the_one_that_the_line_before_leaves() -> None:
    index = COMMANDS.index(command("python -m recsys.evaluate"))
    assert COMMANDS[index - 1] == "python -m recsys.train --config configs/small.yaml"
    config = load_config(ROOT / "configs" / "small.yaml")
    assert config.data.synthetic is not None
    steps_per_epoch = -(-config.data.synthetic.train_rows // config.data.batch_size)
    steps = sum(phase_lengths(config, lambda _: steps_per_epoch).values())
    assert f"{config.output_dir}/checkpoints/step-{steps} " in COMMANDS[index]


@pytest.fixture
def tensorboard(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*shlex.split(command("make tensorboard")), f"LOGDIR={tmp_path}"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    yield process
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(20)


def test_make_tensorboard_serves_on_this_machine_only(tensorboard: subprocess.Popen[str]) -> None:
    assert tensorboard.stdout is not None
    until = time.monotonic() + 60
    address = None
    while address is None and time.monotonic() < until:
        address = re.search(r"http://\S+", tensorboard.stdout.readline())
    assert address is not None
    assert address[0].startswith("http://127.0.0.1:")
    with urllib.request.urlopen(address[0], timeout=30) as page:
        assert b"TensorBoard" in page.read()


def test_every_config_loads_under_its_file_name() -> None:
    # These include what a conversion counts: tests/prepare/test_criteo.py and test_taobao.py.
    converted = ("criteo", "taobao_domains")
    paths = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem not in converted)
    assert len(paths) >= 4
    for path in paths:
        assert load_config(path).name == path.stem


def test_the_readmes_own_config_loads(tmp_path: Path) -> None:
    (block,) = re.findall(r"^ *```yaml\n(.*?)^ *```", README, re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.yaml").write_text("\n".join(line[3:] for line in block.splitlines()))
    assert list(load_config(tmp_path / "mine.yaml").stages) == ["backbone", "experts", "joint"]


def test_docs_name_every_key_of_the_config() -> None:
    text = (ROOT / "docs" / "config.md").read_text()

    def keys(model: type[BaseModel]) -> Iterator[str]:
        for name, field in model.model_fields.items():
            yield name
            pending = [field.annotation]
            while pending:
                annotation = pending.pop()
                if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                    yield from keys(annotation)
                pending.extend(get_args(annotation))

    assert [key for key in set(keys(Config)) if not re.search(rf"\b{key}\b", text)] == []


def test_files_that_the_readme_and_the_docs_link_to_exist() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
