"""The benchmark of domain experts on sizes so small that its figures mean nothing but must be there."""

import json
import math
from pathlib import Path

import torch
from calling import run
from torch import Tensor, nn

from benchmarks.domains import FORMS, TRAINED, _forms
from benchmarks.layer import PASSES, Device
from benchmarks.report import read


def test_every_form_of_every_size_is_timed(tmp_path: Path) -> None:
    sizes = ("--domains", "2", "3", "--ranks", "1", "2", "--dim", "8", "--batch", "24", "--turns", "2")
    done = run("domains", tmp_path, *sizes)
    assert (done.returncode, done.stderr) == (0, "")
    (page,) = (tmp_path / "results").glob("domains_*.md")
    result = read(page.with_suffix(".jsonl"))
    assert str(tmp_path) not in page.read_text() + json.dumps(result)
    assert result["about"][0]["command"] == " ".join(("python -m benchmarks.domains", *sizes))
    names = [f"n {n}, r {rank}" for n in (2, 3) for rank in (1, 2)]
    assert [(line["size"], line["pass"]) for line in result["time"]] == [(n, kind) for kind in PASSES for n in names]
    for line in result["time"]:
        forms = list(FORMS) if line["pass"] == PASSES[0] else list(TRAINED)
        assert list(line["milliseconds"]) == list(line["ratios to dense"]) == forms
        assert all(math.isfinite(value) and value > 0 for value in line["milliseconds"].values())
    first = result["time"][0]
    assert first["flops over dense"] == {"mlora": 1 + 2 / 8, "moe_mlora": 1 + 2 * 2 / 8}


def test_forms_of_one_method_compute_the_same() -> None:
    torch.manual_seed(0)
    forms = _forms(8, 3, 2, 30, Device("cpu"))
    x = torch.randn(30, 8)

    def of(form: str) -> Tensor:
        module: nn.Module = forms[form]
        with torch.no_grad():
            y: Tensor = module(x)
        return y

    for form in ("loop", "merged"):
        torch.testing.assert_close(of(form), of("mlora"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of("folded"), of("moe_mlora"), rtol=1e-4, atol=1e-5)
