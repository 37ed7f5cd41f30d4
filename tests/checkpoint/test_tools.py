"""`python -m recsys.checkpoint`: what it says of checkpoints, and one as a plain file, beside torch's own reader."""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from checkpoints import tensors_as_dcp_reads_them
from runs import reseal
from torch import Tensor

from recsys.checkpoint.__main__ import main
from recsys.checkpoint.layout import CheckpointError, CheckpointMeta, read_meta, retained
from recsys.checkpoint.unsharding import unshard
from recsys.config import CheckpointsConfig

Command = Callable[..., tuple[int, str, str]]

USER = "model.embedding_bag_collection.embedding_bags.user.weight"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command: exit code, output, errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return call


def as_format_1(checkpoint: Path) -> Path:
    """A checkpoint as it was before there were digests."""
    meta = json.loads((checkpoint / "meta.json").read_text())
    old = {name: meta[name] for name in ("stage", "step", "stage_step", "world_size")}
    (checkpoint / "meta.json").write_text(json.dumps({**old, "format": 1}))
    for name in ("progress.json", "plan.json"):
        (checkpoint / name).unlink()
    return checkpoint


def written_anew(checkpoint: Path, directory: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A checkpoint with other tensors, written by one rank."""
    shutil.copytree(checkpoint, directory, ignore=shutil.ignore_patterns("*.distcp", ".metadata"))
    tensors = tensors_as_dcp_reads_them(checkpoint)
    change(tensors)
    dcp.save(tensors, checkpoint_id=directory, no_dist=True)
    reseal(directory)
    return directory


def run_of(checkpoint: Path, folder: Path, **metas: dict[str, Any]) -> Path:
    """An output directory with a checkpoint for each step, whose `meta.json` says more."""
    for step, more in metas.items():
        directory = folder / "checkpoints" / step.replace("_", "-")
        shutil.copytree(checkpoint, directory)
        meta = replace(read_meta(directory), **{"step": int(step.split("_")[1]), "kept": None, "valid": None} | more)
        (directory / "meta.json").write_text(meta.to_json())
    return folder


def one_line(err: str) -> str:
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_a_run_is_listed_with_its_figures_and_why_each_is_kept(original: Path, tmp_path: Path, run: Command) -> None:
    folder = run_of(
        original,
        tmp_path,
        step_2={"kept": "stage", "valid": {"auc": 0.625, "log_loss": 0.5}},
        step_4={"stage": "other"},
        step_6={},
        step_8={"best_step": 4},
    )
    (folder / "checkpoints" / "step-9.partial").mkdir()
    (folder / "checkpoints" / "step-6" / "kinds.json").write_text("{}")
    as_format_1(shutil.copytree(original, folder / "checkpoints" / "step-1"))
    (folder / "checkpoints" / "step-1" / "meta.json").write_text(
        json.dumps({"stage": "joint", "step": 1, "stage_step": 1, "world_size": 3, "format": 1})
    )
    for given in (folder, folder / "checkpoints"):
        code, out, _ = run("list", given, "--json")
        found = {Path(one["checkpoint"]).name: one for one in json.loads(out)}
        assert code == 0 and list(found) == ["step-8", "step-6", "step-4", "step-2", "step-1", "step-9.partial"]
        assert [one["kept"] for one in found.values()] == [["last"], ["last"], ["to go back to"], ["stage"], [], []]
        assert found["step-2"]["valid"] == {"auc": 0.625, "log_loss": 0.5} and found["step-4"]["stage"] == "other"
        assert (found["step-1"]["format"], found["step-1"]["world_size"]) == (1, 3)
        step_2 = folder / "checkpoints" / "step-2"
        assert found["step-2"]["bytes"] == sum(path.stat().st_size for path in step_2.rglob("*"))
        assert [name for name, one in found.items() if one["wrong"]] == ["step-6", "step-9.partial"]
    code, out, _ = run("list", folder)
    assert code == 0 and "0.625000" in out
    assert f"step-6 is not whole: {folder}/checkpoints/step-6/kinds.json has 2 bytes instead of" in out


def test_a_run_that_is_over_keeps_none_to_go_on_from(original: Path, tmp_path: Path, run: Command) -> None:
    folder = run_of(original, tmp_path, step_2={"kept": "stage"}, step_4={"best_step": 2})
    (folder / "summary.json").write_text("{}")
    _, out, _ = run("list", folder, "--json")
    assert [one["kept"] for one in json.loads(out)] == [[], ["stage"]]


def test_a_folder_without_checkpoints_is_named(tmp_path: Path, run: Command) -> None:
    for command in (("list",), ("prune", "--keep-last", 1)):
        code, out, err = run(command[0], tmp_path, *command[1:])
        assert (code, out) == (2, "") and one_line(err).startswith(f"error: {tmp_path} holds no checkpoint")


@pytest.mark.parametrize("is_format_1", [False, True])
def test_what_is_in_a_checkpoint_is_what_torch_finds_there(checkpoint: Path, run: Command, is_format_1: bool) -> None:
    progress = json.loads((checkpoint / "progress.json").read_text())
    plan = json.loads((checkpoint / "plan.json").read_text())
    if is_format_1:
        as_format_1(checkpoint)
    code, out, _ = run("inspect", checkpoint, "--json")
    assert code == 0
    found = json.loads(out)
    expected = tensors_as_dcp_reads_them(checkpoint)
    told = {one["name"]: (one["shape"], one["dtype"], one["bytes"]) for one in found["tensors"]}
    assert told == {
        name: (list(value.shape), str(value.dtype).split(".")[1], value.nbytes) for name, value in expected.items()
    }
    groups = {one["group"] for one in found["tensors"]}
    assert groups == {"tables", "dense", "optimizer.sparse", "optimizer.data_parallel", "optimizer.dense", "ranks"}
    assert next(one for one in found["tensors"] if one["name"] == USER.replace("user", "item"))["parts"] == 2
    assert (found["step"], found["world_size"], found["format"]) == (5, 2, 1 if is_format_1 else 2)
    wanted = (None, None, None) if is_format_1 else (progress["progress"], progress["position"], plan)
    assert (found["progress"], found["position"], found["plan"]) == wanted
    code, out, _ = run("inspect", checkpoint)
    assert (code == 0 and USER in out and "column_wise" in out) or is_format_1
    assert ("its run cannot be resumed" in out) == is_format_1


@pytest.mark.parametrize("text", ["[]", '{"progress": 3}', '{"a": {"b": 1', '{"progress": {}, "position": []}'])
def test_progress_that_is_none_is_named(checkpoint: Path, run: Command, text: str) -> None:
    (checkpoint / "progress.json").write_text(text)
    code, _, err = run("inspect", checkpoint)
    assert code == 2 and f"{checkpoint}/progress.json" in one_line(err)


def test_a_whole_checkpoint_is_said_to_be_so(checkpoint: Path, run: Command) -> None:
    code, out, _ = run("verify", checkpoint)
    number = len(tensors_as_dcp_reads_them(checkpoint))
    assert code == 0 and "7 files have the size and SHA-256" in out and f"{number} tensors were read" in out
    (checkpoint / "beside").write_text("")
    code, out, _ = run("verify", checkpoint, "--json")
    assert (code, json.loads(out)) == (
        0,
        {"checkpoint": str(checkpoint), "files": 7, "unlisted": ["beside"], "tensors": number},
    )


@pytest.mark.parametrize(
    "name", [".metadata", "__0_0.distcp", "__1_0.distcp", "config.yaml", "kinds.json", "plan.json", "progress.json"]
)
@pytest.mark.parametrize("way", ["a bit", "a byte less", "gone", "a link"])
def test_a_file_that_is_not_what_was_written_is_named(checkpoint: Path, run: Command, name: str, way: str) -> None:
    path = checkpoint / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if way == "a bit":
        path.write_bytes(content)
    elif way == "a byte less":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.rename(checkpoint.parent / "elsewhere")
        if way == "a link":
            path.symlink_to(checkpoint.parent / "elsewhere")
    code, out, err = run("verify", checkpoint, "--json")
    assert (code, out) == (2, "") and str(path) in one_line(err)


def test_of_format_1_tensors_alone_are_said_to_be_verified(checkpoint: Path, run: Command) -> None:
    as_format_1(checkpoint)
    code, out, _ = run("verify", checkpoint)
    assert code == 0 and "format 1 has no digests" in out
    value = tensors_as_dcp_reads_them(checkpoint)[USER]
    spoil(checkpoint, value)
    code, _, err = run("verify", checkpoint)
    assert code == 2 and USER in one_line(err) and ".distcp" in err


def spoil(checkpoint: Path, value: Tensor) -> None:
    """Flip a bit in the stored bytes of a tensor."""
    wanted = value.numpy().tobytes()
    (path,) = [path for path in checkpoint.glob("*.distcp") if wanted in path.read_bytes()]
    content = bytearray(path.read_bytes())
    content[content.index(wanted) + len(wanted) // 2] ^= 1
    path.write_bytes(content)


def test_checkpoints_of_the_same_tensors_are_equal_whoever_wrote_them(
    original: Path, tmp_path: Path, run: Command
) -> None:
    other = written_anew(original, tmp_path / "step-5", lambda tensors: None)
    stored = json.loads((other / "progress.json").read_text())
    stored["progress"]["totals"]["joint"]["seconds"] += 1
    (other / "progress.json").write_text(json.dumps(stored))
    reseal(other)
    code, out, _ = run("diff", original, other)
    assert (code, out) == (0, f"{len(tensors_as_dcp_reads_them(original))} tensors are equal, and so is all else\n")
    assert run("diff", original, other, "--json")[0] == 0


def test_each_difference_is_told(original: Path, tmp_path: Path, run: Command) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[USER][3, 2] += 0.5
        tensors[USER][7, 1] -= 0.25
        tensors["model.dense_arch.head.bias"] = torch.zeros(3)
        tensors["model.dense_arch.head.weight"][0, 0] = torch.nan
        del tensors["optimizer.sparse_steps"]
        tensors["model.dense_arch.extra"] = torch.zeros(2)

    other = written_anew(original, tmp_path / "step-5", change)
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["seed"] = 99
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    plan = json.loads((other / "plan.json").read_text())
    plan["user"]["ranks"] = [1]
    (other / "plan.json").write_text(json.dumps(plan))
    reseal(other)
    code, out, _ = run("diff", original, other, "--json")
    found = json.loads(out)
    assert code == 1 and not found["is_equal"]
    assert found["keys"] == {
        "config.yaml": [{"path": "seed", "then": 0, "now": 99}],
        "plan.json": [{"path": "user.ranks", "then": [0], "now": [1]}],
    }
    assert (found["only_first"], found["only_second"]) == (["optimizer.sparse_steps"], ["model.dense_arch.extra"])
    assert found["shapes"] == {"model.dense_arch.head.bias": ["float32 (1,)", "float32 (3,)"]}
    told = {one["name"]: (one["largest"], one["differing"], one["elements"]) for one in found["values"]}
    assert told.keys() == {USER, "model.dense_arch.head.weight"}
    assert told[USER] == (pytest.approx(0.5), 2, 320) and told["model.dense_arch.head.weight"] == (0.0, 1, 8)
    code, out, _ = run("diff", original, other)
    assert code == 1
    for line in (
        "config.yaml: seed: 0 -> 99",
        "plan.json: user.ranks: [0] -> [1]",
        "only in A: optimizer.sparse_steps",
        "only in B: model.dense_arch.extra",
        "model.dense_arch.head.bias: float32 (1,) in A, float32 (3,) in B",
        f"{USER}: 2 of 320 elements differ (0.62%), by at most 0.5",
    ):
        assert line in out.splitlines()


def test_a_damaged_checkpoint_is_not_compared(checkpoint: Path, original: Path, run: Command) -> None:
    (checkpoint / "plan.json").write_text("{}")
    code, _, err = run("diff", original, checkpoint)
    assert code == 2 and f"{checkpoint}/plan.json" in one_line(err)


def parsed(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """A safetensors file by the format's definition: metadata, and tensors, which lie one after another."""
    content = file.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    types = {"F32": torch.float32, "F64": torch.float64, "I64": torch.int64, "U8": torch.uint8}
    tensors, end = {}, 0
    for name, told in header.items():
        first, last = told["data_offsets"]
        assert first == end
        end, dtype = last, types[told["dtype"]]
        assert (8 + length + first) % dtype.itemsize == 0
        data = bytearray(content[8 + length + first : 8 + length + last])
        tensors[name] = torch.frombuffer(data, dtype=dtype).reshape(told["shape"])
    assert len(content) == 8 + length + end
    return metadata, tensors


def read_by_the_library(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


@pytest.mark.parametrize("read", [parsed, read_by_the_library])
@pytest.mark.parametrize("is_format_1", [False, True])
@pytest.mark.parametrize("with_optimizer", [False, True])
def test_one_plain_file_holds_the_model(
    checkpoint: Path, tmp_path: Path, run: Command, read: Any, is_format_1: bool, with_optimizer: bool
) -> None:
    expected = {
        name.removeprefix("model."): value
        for name, value in tensors_as_dcp_reads_them(checkpoint).items()
        if name.startswith("model.") or (with_optimizer and name.startswith("optimizer."))
    }
    if is_format_1:
        as_format_1(checkpoint)
    file = tmp_path / "deep" / "model.safetensors"
    option = ["--optimizer"] if with_optimizer else []
    code, out, _ = run("unshard", checkpoint, "--output", file, "--json", *option)
    assert code == 0
    metadata, found = read(file)
    assert metadata == {"format": "pt", "stage": "joint", "step": "5"}
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in expected.items())
    told = {name: list(value.shape) for name, value in expected.items()}
    assert json.loads(out) == {"output": str(file), "bytes": file.stat().st_size, "tensors": told}
    assert [path.name for path in file.parent.iterdir()] == ["model.safetensors"]


def test_every_type_and_empty_tensors_survive(original: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    made = {
        f"model.{str(dtype).removeprefix('torch.')}": torch.tensor([[1, 0, 3]]).to(dtype)
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int16, torch.int8, torch.bool)
    }
    made |= {"model.scalar": torch.tensor(7), "model.none": torch.empty(0, 4), "model.bytes": torch.tensor([3]).byte()}
    other = written_anew(original, tmp_path / "step-5", lambda tensors: (tensors.clear(), tensors.update(made)))
    unshard(other, tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors")
    assert {f"model.{name}" for name in found} == made.keys()
    assert all(torch.equal(found[name.removeprefix("model.")], value) for name, value in made.items())
    assert all(found[name.removeprefix("model.")].dtype == value.dtype for name, value in made.items())


def test_names_are_the_callers_to_choose(original: Path, tmp_path: Path) -> None:
    shapes = unshard(original, tmp_path / "m", names=lambda name: "user" if name == USER else None)
    assert shapes == {"user": (40, 8)} and parsed(tmp_path / "m")[1].keys() == {"user"}
    with pytest.raises(CheckpointError, match="two tensors would be called same"):
        unshard(original, tmp_path / "n", names=lambda name: "same")
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize("is_format_1", [False, True])
def test_a_file_that_is_there_stays_where_the_checkpoint_is_damaged(
    checkpoint: Path, tmp_path: Path, run: Command, is_format_1: bool
) -> None:
    if is_format_1:
        as_format_1(checkpoint)
    spoil(checkpoint, tensors_as_dcp_reads_them(checkpoint)[USER])
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "m").write_text("before")
    code, _, err = run("unshard", checkpoint, "--output", folder / "m")
    assert code == 2 and ".distcp" in one_line(err)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("m", "before")]


def test_a_place_that_cannot_be_written_is_named(original: Path, tmp_path: Path, run: Command) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for output in (tmp_path / "file" / "m", tmp_path / "folder", Path("/proc/m"), Path("/dev/full/m")):
        code, _, err = run("unshard", original, "--output", output)
        assert code == 2 and one_line(err).startswith(f"error: {output} cannot be written"), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


PEAK = """
import re, sys
from pathlib import Path
from recsys.checkpoint.unsharding import unshard

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

unshard(Path(sys.argv[1]), Path(sys.argv[2]), names=lambda name: name if name == "small" else None)
before = peak()
unshard(Path(sys.argv[1]), Path(sys.argv[2]))
print(peak() - before)
"""


def test_no_more_than_the_largest_table_is_in_memory(original: Path, tmp_path: Path) -> None:
    size = 48 << 20

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.clear()
        tensors.update({f"model.{name}": torch.rand(size // 64, 16) for name in "abcd"}, small=torch.zeros(2))

    other = written_anew(original, tmp_path / "step-5", change)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(other), str(tmp_path / "m")], capture_output=True, text=True, check=True
    )
    assert size / 2 < int(done.stdout) < 1.5 * size
    assert (tmp_path / "m").stat().st_size > 4 * size


ALONE = """
import sys
from recsys.checkpoint.__main__ import main
for arguments in (["list", sys.argv[1]], ["inspect", sys.argv[2]], ["verify", sys.argv[2]],
        ["diff", sys.argv[2], sys.argv[2]], ["unshard", sys.argv[2], "--output", sys.argv[3]],
        ["prune", sys.argv[1], "--keep-last", "1"]):
    try:
        main(arguments)
    except SystemExit as end:
        assert not end.code, arguments
import torch
assert not torch.distributed.is_initialized()
loaded = {"torchrec", "fbgemm_gpu", "tensorboard"} & set(sys.modules)
sys.exit(f"{loaded} is loaded" if loaded else 0)
"""


def test_neither_torchrec_nor_a_process_group_is_needed(original: Path, tmp_path: Path) -> None:
    arguments = [str(original.parent), str(original), str(tmp_path / "m")]
    done = subprocess.run([sys.executable, "-c", ALONE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_old_checkpoints_are_deleted_by_hand(original: Path, tmp_path: Path, run: Command) -> None:
    metas: dict[str, dict[str, Any]] = {
        "step_10": {"kept": "stage"},
        "step_20": {"valid": {"log_loss": 0.3, "auc": 0.6}},
        "step_30": {"valid": {"log_loss": 0.4, "auc": 0.7}},
        "step_40": {},
        "step_50": {},
        "step_60": {"best_step": 30},
        "step_70": {},
    }
    folder = run_of(original, tmp_path, **metas)

    def left() -> list[int]:
        return sorted(int(path.name.split("-")[1]) for path in (folder / "checkpoints").iterdir())

    options = ["--keep-last", 2, "--keep-best", 1, "--keep-every-steps", 25]
    code, out, _ = run("prune", folder, *options)
    gone = folder / "checkpoints" / "step-40"
    assert (code, out) == (0, f"would delete {gone}\nnothing was deleted; add --yes to do so\n")
    assert left() == [10, 20, 30, 40, 50, 60, 70]
    code, out, _ = run("prune", folder, *options, "--yes", "--json")
    assert (code, json.loads(out)) == (0, {"deleted": True, "checkpoints": [str(gone)]})
    assert left() == [10, 20, 30, 50, 60, 70]
    code, out, _ = run("prune", folder, "--keep-last", 1, "--keep-best", 1, "--keep-best-by", "auc", "--yes")
    assert code == 0 and out.count("deleted") == 3 and left() == [10, 30, 70]
    assert "all checkpoints are kept" in run("prune", folder / "checkpoints", "--keep-last", 3)[1]
    for count in ("0", "-1", "x"):
        assert run("prune", folder, f"--keep-last={count}", "--yes")[0] == 2
    assert left() == [10, 30, 70]


def test_what_a_checkpoint_goes_back_to_is_kept_for_those_that_stay_alone() -> None:
    metas = [CheckpointMeta("a", step, step, 1, best_step=step - 1) for step in range(1, 6)]
    assert retained(metas, CheckpointsConfig(keep_last=1)) == {5: ["last"], 4: ["to go back to"]}
