"""Programs for other runtimes answer as the artefact does, for any number of rows, without this project."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_module
from safetensors.torch import load_file, save_file
from test_candidates import make
from test_scorer import MODELS

from recsys.model.dense_arch import DenseArch
from recsys.model.towers.mlp import MLP
from recsys.serving import Scorer
from recsys.serving.artifact import ArtifactError
from recsys.serving.formats import PROGRAMS, Program, write_program
from recsys.training import parity

FEW = ["mlp", "deepfm", "paths"]
LOADERS = {
    "torch-export": "program = torch.export.load(f'{name}/dense.pt2').module()",
    "aoti": "program = torch._inductor.aoti_load_package(f'{name}/dense.aoti.pt2')",
}
RUN = """
import json, sys, torch
from safetensors.torch import load_file, save_file
given, found = load_file("given.safetensors"), {{}}
for name in json.loads(sys.argv[1]):
    {loader}
    of_tower = {{n: program(given[name][:n], given["dense"][:n]) for n in (0, 1, 2, 300)}}
    try:
        turned = program(given[name].t().contiguous().t(), given["dense"])
        assert (turned - of_tower[300]).abs().max() < 1e-4, "columns were read as rows"
    except RuntimeError:
        pass
    found |= {{f"{{name}} {{n}}": logits for n, logits in of_tower.items()}}
save_file(found, "found.safetensors")
print(json.dumps([name for name in sys.modules if name.partition(".")[0] in ("recsys", "torchrec", "fbgemm_gpu")]))
"""


@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        ("torch-export", 3),
        pytest.param("torch-export", 0, marks=pytest.mark.slow),
        pytest.param("aoti", 3, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("towers", [FEW, pytest.param([*MODELS], marks=pytest.mark.slow)], ids=["few", "all"])
def test_programs_answer_as_the_artefact_without_this_project(
    tmp_path: Path, kind: Any, experts: int, towers: list[str]
) -> None:
    generator = torch.Generator().manual_seed(5)
    scorers = {tower: Scorer(make(tmp_path, MODELS[tower], experts)) for tower in towers}
    num_dense = 2
    given = {
        "dense": torch.randn(300, num_dense, generator=generator),
    }
    for tower, scorer in scorers.items():
        config = scorer.artifact.config
        width = sum(config.embedding_dims.values())
        given[tower] = torch.randn(300, width, generator=generator)
        (tmp_path / tower).mkdir()
        write_program(scorer.dense_arch, width, num_dense, kind, tmp_path / tower / PROGRAMS[kind])
    save_file(given, tmp_path / "given.safetensors")
    command = [sys.executable, "-c", RUN.format(loader=LOADERS[kind]), json.dumps(towers)]
    checked = {**os.environ, "AOTI_RUNTIME_CHECK_INPUTS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=checked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
    found = load_file(tmp_path / "found.safetensors")
    assert len(found) == 4 * len(towers)
    with torch.inference_mode():
        for name, logits in found.items():
            tower, n = name.split()
            expected = scorers[tower].dense_arch(given[tower][: int(n)], given["dense"][: int(n)])[0]
            assert logits.shape == (int(n),) and logits.dtype == torch.float32
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


def test_what_a_program_holds_is_told_and_a_scorer_needs_none(trained: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ("--checkpoint", str(trained[0]), "--output", str(tmp_path / "artifact"), "--format", "torch-export")
    # A program's logits are those before calibration.
    (done,) = run_module(1, "recsys.export", *arguments, "--calibration", "platt", "--calibration-rows", "5")
    assert done.code == 0, done.stderr
    told = r"From the calibrated model to the artefact: auc (0\.\d{6}) -> \1, log loss (0\.\d{6}) -> \2, calibration"
    assert re.search(told, done.stdout)
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


def test_a_program_beyond_the_bound_is_refused_and_leaves_nothing(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = parity.load_program

    def spoilt(kind: Any, path: Path) -> Program:
        program = load(kind, path)
        return lambda pooled, dense: program(pooled, dense) + 0.1

    monkeypatch.setattr(parity, "load_program", spoilt)
    with pytest.raises(ArtifactError, match=r"^--format torch-export: the program differs from the model by"):
        parity.export(
            trained[0],
            tmp_path / "artifact",
            tables="float32",
            split="test",
            max_rows=251,
            bound=None,
            formats=["torch-export"],
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_missing_compiler_is_told_in_one_line(tmp_path: Path) -> None:
    script = (
        "import torch, pathlib\n"
        "from recsys.serving.artifact import ArtifactError\n"
        "from recsys.serving.formats import write_program\n"
        "from recsys.model.dense_arch import DenseArch\n"
        "from recsys.model.towers.mlp import MLP\n"
        "try: write_program(DenseArch(0, 4, MLP(8, (4,))), 8, 0, 'aoti', pathlib.Path('x.pt2'))\n"
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
    dense_arch = DenseArch(0, 4, MLP(8, (4,)))
    with pytest.raises(ArtifactError, match=r"--format torch-export: PyTorch says"):
        write_program(dense_arch, 8, 0, "torch-export", Path("/nonexistent/dense.pt2"))
