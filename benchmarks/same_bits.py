"""Does a change keep every bit? Three configs trained before and after it: losses, metrics, checkpoints, shards.

    python -m benchmarks.same_bits COMMIT

COMMIT is checked out under outputs/same_bits/ and trained there, once; then the working tree is. Both train
configs/default.yaml and configs/small.yaml, and configs/movielens_1m.yaml where HILOREC_DATA leads to ml-1m, on two
ranks and a CPU. What is compared: every scalar of TensorBoard but throughput, every figure of summary.json but speed,
a SHA-256 of each tensor of each checkpoint, and one of each Parquet shard that was written. The last checkpoint from
before is opened as well, and must have the test figures that it had. What was there before and differs after makes it
exit with 1; what is there only after is counted.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from recsys.terminal import console, say, table

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "outputs/same_bits"
CONFIGS = ("small", "default", "movielens_1m")
_SPEED = {"seconds", "examples_per_second", "data_wait"}
_OF_THE_RUN = {"versions", "commit", "checkpoint", "name"}


def main() -> None:
    """Compare the working tree with the commit that the command line names; exit with 1 where a bit differs."""
    parser = argparse.ArgumentParser(prog="benchmarks.same_bits", description=__doc__.splitlines()[0])
    parser.add_argument("commit", help="the state before the change")
    parser.add_argument("--config", action="append", choices=CONFIGS, help="only this one; may be repeated")
    arguments = parser.parse_args()
    configs = arguments.config or [name for name in CONFIGS if name != "movielens_1m" or movielens() is not None]
    commit = run("git", "rev-parse", "--short", arguments.commit).strip()
    before = FOLDER / commit
    if not before.exists():
        run("git", "worktree", "add", "--detach", str(before / "tree"), commit)
    known = {name: recorded(before / "tree", before, name, keep=True) for name in configs}
    found = {name: recorded(ROOT, FOLDER / "after", name, keep=False) for name in configs}
    rows = []
    differences: list[str] = []
    for name in configs:
        for kind in known[name]:
            old, new = known[name][kind], found[name][kind]
            different = [key for key in old if key not in new or old[key] != new[key]]
            added = len(new.keys() - old.keys())
            counts = {"values": len(old), "differ": len(different), "only after": added}
            rows.append({"config": name, "compared": kind, **{count: f"{of:,}" for count, of in counts.items()}})
            differences += [f"{name}, {kind}: {key}" for key in sorted(different)]
        told, wrong = reopened(before / f"runs/{name}")
        counts = {"values": len(told), "differ": len(wrong), "only after": 0}
        rows.append(
            {"config": name, "compared": "old checkpoint, opened", **{n: f"{of:,}" for n, of in counts.items()}}
        )
        differences += [f"{name}, old checkpoint: {key}" for key in wrong]
    say(console(), table(rows, f"{commit} and the working tree", left=["config", "compared"]))
    for difference in differences[:40]:
        print(f"differs: {difference}")
    sys.exit(1 if differences else 0)


def recorded(tree: Path, folder: Path, name: str, *, keep: bool) -> dict[str, dict[str, Any]]:
    """What a tree's code makes of a config, from the record of it where there is one and it may be kept."""
    record = folder / f"{name}.json"
    if not (keep and record.exists()):
        print(f"training {name} in {tree}", flush=True)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(trained(tree, folder, name), indent=1), encoding="utf-8")
    read: dict[str, dict[str, Any]] = json.loads(record.read_text(encoding="utf-8"))
    return read


def trained(tree: Path, folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Prepare the config's data and train it with the code of a tree."""
    data, output = folder / f"data/{name}", folder / f"runs/{name}"
    overrides = [f"output_dir={output}", "device=cpu"]
    overrides += [f"data.{split}={data}/{split}/*.parquet" for split in ("train", "valid", "test")]
    run("rm", "-rf", str(data), str(output))
    if name == "movielens_1m":
        source = ["--source", str(movielens()), "--output", str(data)]
        run(sys.executable, "-m", "recsys.prepare", "movielens-1m", *source, cwd=tree)
    else:
        overrides.append(f"data.synthetic.directory={data}")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "recsys.train"]
    run(*launch, "--config", f"configs/{name}.yaml", *overrides, cwd=tree)
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    return {
        "figures of summary.json": dict(figures(summary)),
        "scalars of TensorBoard": scalars(output / "tensorboard"),
        "checkpoints' tensors": dict(tensors(output / "checkpoints")),
        "shards": {str(file.relative_to(data)): digest(file.read_bytes()) for file in sorted(data.rglob("*.parquet"))},
    }


def reopened(run_before: Path) -> tuple[dict[str, Any], list[str]]:
    """Test figures that the working tree gets of the last checkpoint from before, and those that are others.

    They are of one rank instead of two, so that a rounding may differ.
    """
    summary = json.loads((run_before / "summary.json").read_text(encoding="utf-8"))
    evaluate = [sys.executable, "-m", "recsys.evaluate", "--checkpoint", summary["checkpoint"], "--json"]
    told = json.loads(run(*evaluate))["model"]
    known = summary["test"]
    return known, [key for key in known if abs((told[key] or 0) - (known[key] or 0)) > 1e-9 * abs(known[key] or 1)]


def figures(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and text by its path, those of speed, versions and places left out."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in _SPEED | _OF_THE_RUN:
                yield from figures(item, f"{path}.{key}")
    else:
        yield path.removeprefix("."), value


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of each scalar's tag."""
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("throughput/")]
    # As JSON has it: NaN equals NaN there.
    return {tag: [[event.step, repr(event.value)] for event in events.Scalars(tag)] for tag in tags}  # type: ignore[misc]


def tensors(checkpoints: Path) -> Iterator[tuple[str, str]]:
    """A digest of each tensor of each checkpoint."""
    for directory in sorted(checkpoints.iterdir()):
        described = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
        state = {
            name: torch.empty(of.size, dtype=of.properties.dtype)
            for name, of in described.items()
            if isinstance(of, TensorStorageMetadata)
        }
        dcp.load(state, checkpoint_id=directory, no_dist=True)
        for name, tensor in state.items():
            yield f"{directory.name}: {name} {tuple(tensor.shape)}", digest(tensor.contiguous().numpy().tobytes())


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def movielens() -> Path | None:
    """The folder of MovieLens-1M's files, where there is one."""
    folder = Path(os.environ.get("HILOREC_DATA", "")) / "ml-1m"
    return folder if "HILOREC_DATA" in os.environ and folder.is_dir() else None


def run(*command: str, cwd: Path = ROOT) -> str:
    """What a command prints; its errors where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{re.sub(r'(?m)^', '  ', done.stdout[-2000:] + done.stderr[-4000:])}")
    return done.stdout


if __name__ == "__main__":
    main()
