"""Programs for other runtimes answer as the artefact does, for any number of rows, without this project."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_module
from safetensors.torch import load_file, save_file
from test_scorer import TOWERS, export, train
from tiny import write_tiny_log

from recsys.model.dense_arch import DenseArch
from recsys.model.towers.mlp import MLP
from recsys.serving import Scorer
from recsys.serving.artifact import ArtifactError
from recsys.serving.formats import write_program

LOADERS = {
    "torch-export": "program = torch.export.load('dense.pt2').module()",
    "aoti": "program = torch._inductor.aoti_load_package('dense.aoti.pt2')",
}
RUN = """
import json, sys, torch
from safetensors.torch import load_file, save_file
{loader}
given = load_file(sys.argv[1])
found = {{n: program(given["pooled"][:int(n)], given["dense"][:int(n)]) for n in ("0", "1", "2", "300")}}
save_file(found, sys.argv[2])
try:
    turned = program(given["pooled"].t().contiguous().t(), given["dense"])
    assert (turned - found["300"]).abs().max() < 1e-4, "columns were read as rows"
except RuntimeError:
    pass
print(json.dumps([name for name in sys.modules if name.partition(".")[0] in ("recsys", "torchrec", "fbgemm_gpu")]))
"""


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("log")
    write_tiny_log(directory)
    return directory


CASES = [
    *((tower, True, "torch-export") for tower in TOWERS),
    *(pytest.param(tower, False, "torch-export", marks=pytest.mark.slow) for tower in TOWERS),
    *(pytest.param(tower, True, "aoti", marks=pytest.mark.slow) for tower in TOWERS),
]


@pytest.mark.parametrize(("tower", "experts", "kind"), CASES)
def test_a_program_answers_as_the_artefact_without_this_project(
    log: Path, tmp_path: Path, tower: str, experts: bool, kind: Any
) -> None:
    told = export(
        train(log, tmp_path, 1, "table", tower, experts=experts),
        tmp_path / "artifact",
        "--format",
        kind,
        "--bound",
        "1e-6",
    )
    assert 0 <= told["programs"][kind] <= 1e-6
    scorer = Scorer(tmp_path / "artifact")
    config = scorer.artifact.config
    width = sum(config.tables[feature.table].embedding_dim for feature in config.features.sparse.values())
    generator = torch.Generator().manual_seed(5)
    given = {
        "pooled": torch.randn(300, width, generator=generator),
        "dense": torch.randn(300, 2, generator=generator),
    }
    save_file(given, tmp_path / "given.safetensors")
    command = [
        sys.executable,
        "-c",
        RUN.format(loader=LOADERS[kind]),
        tmp_path / "given.safetensors",
        tmp_path / "found",
    ]
    checked = {**os.environ, "AOTI_RUNTIME_CHECK_INPUTS": "1"}
    done = subprocess.run(command, cwd=tmp_path / "artifact", env=checked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
    with torch.inference_mode():
        for n, found in load_file(tmp_path / "found").items():
            expected = scorer.dense_arch(given["pooled"][: int(n)], given["dense"][: int(n)])[0]
            assert found.shape == (int(n),) and found.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_what_a_program_holds_is_told_and_a_scorer_needs_none(log: Path, tmp_path: Path) -> None:
    checkpoint = train(log, tmp_path, 1, "table", "mlp", experts=True)
    arguments = ("--checkpoint", str(checkpoint), "--output", str(tmp_path / "artifact"), "--format", "torch-export")
    # A program's logits are those before calibration.
    (done,) = run_module(1, "recsys.export", *arguments, "--calibration", "platt", "--calibration-rows", "5")
    assert done.code == 0, done.stderr
    assert "dense.pt2: within" in done.stdout and "holds a pickle, which can run code" in done.stdout
    path = tmp_path / "artifact" / "dense.pt2"
    row = {"user": 3, "item": 5, "tags": [1, 2], "x": 0.5, "z": 0.1, "domain": 0}
    (before,) = Scorer(tmp_path / "artifact").score([row])
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"dense\.pt2"):
        Scorer(tmp_path / "artifact")
    manifest = json.loads((tmp_path / "artifact" / "manifest.json").read_text())
    del manifest["files"]["dense.pt2"]
    (tmp_path / "artifact" / "manifest.json").write_text(json.dumps(manifest))
    path.write_bytes(b"no program at all")
    assert Scorer(tmp_path / "artifact").score([row])[0] == before


def test_a_program_beyond_the_bound_is_refused_and_leaves_nothing(log: Path, tmp_path: Path) -> None:
    checkpoint = train(log, tmp_path, 1, "table", "mlp", experts=True)
    arguments = ("--checkpoint", str(checkpoint), "--output", str(tmp_path / "artifact"), "--format", "torch-export")
    script = (
        "import recsys.serving.formats as formats, recsys.training.parity as parity, runpy, sys\n"
        "load = parity.load_program\n"
        "parity.load_program = lambda *of: (lambda program: lambda *x: program(*x) + .1)(load(*of))\n"
        f"sys.argv = ['recsys.export', *{arguments!r}]\n"
        "runpy.run_module('recsys.export', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: --format torch-export: the program differs from the model by" in done.stderr
    assert not list(tmp_path.glob("*artifact*"))


def test_a_missing_compiler_is_told_in_one_line(tmp_path: Path) -> None:
    script = (
        "import torch, pathlib\n"
        "from recsys.serving.artifact import ArtifactError\n"
        "from recsys.serving.formats import write_program\n"
        "from recsys.model.dense_arch import DenseArch\n"
        "from recsys.model.towers.mlp import MLP\n"
        "try: write_program(DenseArch(0, 4, MLP(8, (4,)), 4), 8, 0, 'aoti', pathlib.Path('x.pt2'))\n"
        "except ArtifactError as error: print('told:', error)\n"
    )
    environment = {
        **os.environ,
        "PATH": "",
        "CXX": "no-such-compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("told: --format aoti: PyTorch says"), done.stderr
    assert done.stdout.count("\n") == 1


def test_what_cannot_be_written_is_refused() -> None:
    dense_arch = DenseArch(0, 4, MLP(8, (4,)), 4)
    with pytest.raises(ArtifactError, match=r"--format torch-export: PyTorch says"):
        write_program(dense_arch, 8, 0, "torch-export", Path("/nonexistent/dense.pt2"))
