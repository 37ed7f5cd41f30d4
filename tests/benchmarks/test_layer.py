"""The expert layer's benchmark on sizes so small that its figures mean nothing but must be there."""

import itertools
import json
import math
from pathlib import Path

import pytest
from calling import run
from torch import cuda

from benchmarks.report import read

FORMS = ["dense", "stack", "formula", "autograd", "fused"]


@pytest.mark.slow
def test_every_form_of_every_size_is_timed_and_weighed(tmp_path: Path) -> None:
    sizes = ("--dims", "8", "16", "--experts", "1x2", "3x2", "--batch", "32", "--turns", "3")
    ended = run("layer", tmp_path, *sizes, "--compiled", "--note", "The machine did nothing else.")
    assert (ended.returncode, ended.stderr) == (0, "")
    device = "cuda" if cuda.is_available() else "cpu"
    page = (tmp_path / "results" / f"layer_{device}.md").read_text()
    result = read(tmp_path / "results" / f"layer_{device}.jsonl")
    assert str(tmp_path) not in page + json.dumps(result)
    assert result["about"][0]["command"] == " ".join(("python -m benchmarks.layer", *sizes, "--compiled"))
    assert "The machine did nothing else." in page
    names = [f"d {d}, L {layers}, K 2" for d in (8, 16) for layers in (1, 3)]
    passes = ("forward", "forward and backward")
    assert [(line["size"], line["pass"]) for line in result["time"]] == list(itertools.product(names, passes))
    for line in result["time"]:
        assert page.count(f"\n| {line['size']} |") == 2
        for figures in ("milliseconds", "ratios to dense"):
            of = line[figures]
            assert list(of) == FORMS
            assert all(math.isfinite(value) and value > 0 for value in of.values())
        assert line["ratios to dense"]["dense"] == 1
    assert len(result["growth"]) == 4 and "target" not in result
    assert all(f"| {line['sizes']} |" in page for line in result["growth"])
    memory = {line["size"]: line["MiB"] for line in result["memory"]}
    assert list(memory) == names
    for name in names:
        kept = {form: of["kept for backward"] for form, of in memory[name].items()}
        assert kept["dense"] == 0 < kept["fused"] <= kept["autograd"]
        assert kept["fused"] < kept["formula"] or "L 1" in name
    if device == "cpu":
        assert memory[names[-1]]["fused"]["largest tensor"] == 32 * 16 * 4 / 2**20


@pytest.mark.parametrize("experts", ["3", "0x8"])
def test_sizes_that_are_none_are_refused(tmp_path: Path, experts: str) -> None:
    ended = run("layer", tmp_path, "--experts", experts)
    assert ended.returncode == 2
    assert "3 layers of 8 experts" in ended.stderr
    assert not (tmp_path / "results").exists()
