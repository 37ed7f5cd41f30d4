"""FuxiCTR as the benchmark calls it: a stand-in with FuxiCTR's interface shows what reaches it and what becomes of its
scores; where a checkout and its environment are named, FuxiCTR itself trains."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist
from tiny import write_tiny_config, write_tiny_log

from benchmarks.fuxictr.__main__ import benchmark, parse
from benchmarks.report import Line, read
from recsys.errors import UserError

ONE_WIDTH = "tables.tag.embedding_dim=8"

STAND_IN = {
    "fuxictr/__init__.py": "from .version import __version__\n",
    "fuxictr/version.py": "__version__ = 'stand-in'\n",
    "fuxictr/features.py": """
import json

class FeatureMap:
    def __init__(self, dataset_id, data_dir):
        self.dataset_id = dataset_id

    def load(self, path, params):
        content = json.load(open(path))
        assert content["dataset_id"] == self.dataset_id
        self.labels = content["labels"]
        self.columns = [*(name for feature in content["features"] for name in feature), *self.labels]

    def get_column_index(self, name):
        return self.columns.index(name)
""",
    "fuxictr/pytorch/__init__.py": "",
    "fuxictr/pytorch/torch_utils.py": "def seed_everything(seed):\n    pass\n",
    "fuxictr/pytorch/dataloaders.py": """
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq

class RankDataLoader:
    def __init__(self, feature_map, stage, train_data, valid_data, test_data, **params):
        assert (stage, params["data_format"], params["num_workers"]) == ("both", "parquet", 0)
        self.splits = [self.read(feature_map, path) for path in (train_data, valid_data, test_data)]

    def read(self, feature_map, path):
        table = pq.read_table(path)
        first = lambda column: column if column.ndim == 1 else column[:, 0]
        columns = [first(np.array(table[name].to_pylist())) for name in feature_map.columns]
        return SimpleNamespace(dataset=SimpleNamespace(darray=np.column_stack(columns)))

    def make_iterator(self):
        return self.splits
""",
    # It knows how the tiny log's labels come about, but uses it only at the better of two learning rates.
    "model_zoo/DNN/DNN_torch/src/__init__.py": """
import os
from types import SimpleNamespace

import numpy as np

class DNN:
    def __init__(self, feature_map, model_root, learning_rate, embedding_dim, **params):
        assert params["net_dropout"] != 0.9, "no such dropout"
        assert embedding_dim == 8 and params["embedding_regularizer"] is None and params["gpu"] == -1
        assert os.environ["OMP_NUM_THREADS"] == "1" and "recsys" not in __import__("sys").modules
        self.feature_map, self.rate, self.seed = feature_map, learning_rate, params["seed"]
        self.checkpoint = os.path.join(model_root, "rows", "DNN.model")

    def parameters(self):
        sizes = {12: True, 100: False}
        return [SimpleNamespace(numel=lambda size=size: size, requires_grad=grad) for size, grad in sizes.items()]

    def fit(self, batches, validation_data, **params):
        open(self.checkpoint, "w").close()
        self._epoch_index = 2

    def evaluate(self, batches):
        raise NotImplementedError

    def predict(self, batches):
        column = lambda name: batches.dataset.darray[:, self.feature_map.get_column_index(name)]
        logits = 0.8 * column("x") + 1e-3 * self.seed * column("scale")
        if self.rate == 0.01:
            logits += 1.6 * ((column("user") + column("item")) % 2)
        return 1 / (1 + np.exp(-logits))

    def evaluate_metrics(self, labels, scores, metrics):
        assert metrics == ["AUC", "logloss"]
        above = np.subtract.outer(scores[labels == 1], scores[labels == 0])
        loss = -np.log(np.where(labels == 1, scores, 1 - scores)).mean()
        return {"AUC": ((above > 0) + 0.5 * (above == 0)).mean(), "logloss": loss}
""",
    **{f"{name}-0.dist-info/METADATA": f"Name: {name}\nVersion: 0\n" for name in ("pandas", "polars", "scikit_learn")},
}


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """The benchmark of model DNN as from the command line, but in this process, which has torch at hand."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(checkout: Path, python: str, *arguments: str) -> None:
        command = ["--checkout", str(checkout), "--python", python, "--config", "tiny.yaml", "--output", "results"]
        benchmark(parse([*command, "--models", "DNN", *arguments]))

    yield run
    if dist.is_initialized():  # a command that fails leaves that to its end
        dist.destroy_process_group()


def read_result(folder: Path) -> dict[str, list[Line]]:
    page = (folder / "results" / "fuxictr_tiny.md").read_text()
    result = read(folder / "results" / "fuxictr_tiny.jsonl")
    assert str(folder) not in page + json.dumps(result)
    assert "| FuxiCTR DNN |" in page
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_log(tmp_path / "log", rows={"train": 300, "valid": 90, "test": 110})
    write_tiny_config(tmp_path / "tiny.yaml", tmp_path / "log", tmp_path / "out")
    return tmp_path


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, content in STAND_IN.items():
        path = tmp_path / "FuxiCTR" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "FuxiCTR"


def test_searches_on_one_seed_resumes_and_measures_as_we_measure(
    folder: Path, checkout: Path, run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def started(*arguments: str) -> int:
        run(checkout, sys.executable, *arguments, "--", ONE_WIDTH)
        return capsys.readouterr().out.count(": runs")

    before = contents(checkout)
    search = ("--search", "learning_rate=0.02,0.01", "--seeds", "17")
    assert started(*search) == 2
    assert contents(checkout) == before
    result = read_result(folder)
    assert "| FuxiCTR DNN | 0.01 | " in (folder / "results" / "fuxictr_tiny.md").read_text()
    (model,), trials = result["model"], result["trial"]
    assert (model["model"], model["name"]) == ("DNN", "FuxiCTR DNN")
    assert {trial["model"] for trial in trials} == {"DNN"}
    assert [trial["settings"] for trial in trials] == [{"learning_rate": 0.02}, {"learning_rate": 0.01}]
    assert trials[0]["figures"]["best valid AUC"] < trials[1]["figures"]["best valid AUC"]
    assert (model["settings"]["learning_rate"], model["settings"]["net_dropout"]) == (0.01, 0)
    assert result["about"][0]["fuxictr"]["versions"]["fuxictr"] == "stand-in"

    rows = pq.read_table(folder / "log" / "test").to_pydict()
    logits = [
        0.8 * (x or 0) + 17e-3 * z + 1.6 * ((user + 1 + (0 if item is None else item + 1)) % 2)
        for user, item, x, z in zip(rows["user"], rows["item"], rows["x"], rows["z"], strict=True)
    ]
    clicked = [logit for logit, label in zip(logits, rows["label"], strict=True) if label]
    passed = [logit for logit, label in zip(logits, rows["label"], strict=True) if not label]
    (trained,) = result["run"]
    assert (trained["model"], trained["seed"]) == ("DNN", 17)
    figures = trained["figures"]
    assert figures["test AUC"] == pytest.approx(np.greater.outer(clicked, passed).mean(), abs=1e-6)
    losses = np.logaddexp(0, np.concatenate([-np.array(clicked), passed]))
    assert figures["test log loss"] == pytest.approx(losses.mean(), abs=1e-6)
    assert (figures["epochs"], figures["parameters"]) == (3, 12)

    assert started(*search, "18", "--jobs", "2") == 1
    runs = {line["seed"]: line["figures"] for line in read_result(folder)["run"]}
    assert runs[17] == figures
    assert runs[18]["test log loss"] != figures["test log loss"]

    write_tiny_log(folder / "log", rows={"train": 301, "valid": 90, "test": 110})
    assert started("--seeds", "17") == 1


def test_names_what_failed_and_what_it_does_not_know(folder: Path, checkout: Path, run: Callable[..., None]) -> None:
    with pytest.raises(UserError, match="no setting 'dropout'; it has batch_size"):
        run(checkout, sys.executable, "--set", "dropout=0", "--", ONE_WIDTH)
    with pytest.raises(UserError, match=r"--set DCNv3\.net_dropout=0: no model 'DCNv3'"):
        run(checkout, sys.executable, "--set", "DCNv3.net_dropout=0", "--", ONE_WIDTH)
    with pytest.raises(UserError, match="values are JSON"):
        run(checkout, sys.executable, "--set", "monitor=AUC", "--", ONE_WIDTH)
    with pytest.raises(UserError, match="embedding_dim 4, 8"):
        run(checkout, sys.executable)
    with pytest.raises(UserError, match="--checkout: no "):
        run(folder, sys.executable, "--", ONE_WIDTH)
    with pytest.raises(UserError, match="failed: DNN"):
        run(checkout, sys.executable, "--set", "net_dropout=0.9", "--", ONE_WIDTH)
    assert "no such dropout" in next((folder / "outputs").rglob("log.txt")).read_text()
    assert not (folder / "results").exists()


def test_names_what_the_environment_lacks(checkout: Path, run: Callable[..., None]) -> None:
    shutil.rmtree(checkout / "polars-0.dist-info")
    with pytest.raises(UserError, match=r"lacks what FuxiCTR needs .*polars.*; see docs/benchmarks.md"):
        run(checkout, sys.executable, "--", ONE_WIDTH)


def test_exports_every_row_with_ids_moved_by_one(folder: Path, checkout: Path, run: Callable[..., None]) -> None:
    overrides = (ONE_WIDTH, "features.sparse.buddy={table: user, column: item}", "tables.user.pooling=sum")
    run(checkout, sys.executable, "--seeds", "17", "--", *overrides)
    (exported,) = (folder / "outputs").rglob("rows-*")
    for split in ("train", "valid", "test"):
        rows = pq.read_table(folder / "log" / split).to_pydict()
        found = pq.read_table(exported / f"{split}.parquet").to_pydict()
        assert found[".label"] == rows["label"]
        assert found["user"] == [user + 1 for user in rows["user"]]
        assert found["item"] == found["buddy"] == [0 if item is None else item + 1 for item in rows["item"]]
        bags = [[tag + 1 for tag in tags or []] for tags in rows["tags"]]
        assert found["tags"] == [bag + [0] * (3 - len(bag)) for bag in bags]
        assert found["x"] == [x or 0 for x in rows["x"]]
        assert found["scale"] == pytest.approx(rows["z"])
    described = {
        name: feature
        for entry in json.loads((exported / "feature_map.json").read_text())["features"]
        for name, feature in entry.items()
    }
    assert list(described) == ["x", "scale", "user", "item", "tags", "buddy"]
    assert {name: feature["type"] for name, feature in described.items()} == {
        **dict.fromkeys(("x", "scale"), "numeric"),
        **dict.fromkeys(("user", "item", "buddy"), "categorical"),
        "tags": "sequence",
    }
    assert (described["user"]["vocab_size"], described["tags"]["vocab_size"]) == (41, 13)
    assert described["buddy"]["share_embedding"] == "user"
    assert described["tags"]["feature_encoder"] == "layers.MaskedSumPooling()"


def test_the_embedded_log_is_written_where_it_is_not_there(
    folder: Path, checkout: Path, run: Callable[..., None]
) -> None:
    log = [f"data.{split}=log/{split}/*.parquet" for split in ("train", "valid", "test")]
    log += [f"data.synthetic.{split}_rows={rows}" for split, rows in (("train", 90), ("valid", 30), ("test", 40))]
    config = str(Path(__file__).parents[3] / "configs" / "small.yaml")
    shutil.rmtree(folder / "log")
    with pytest.raises(UserError, match="failed: DNN"):  # the stand-in knows the tiny log alone
        run(checkout, sys.executable, "--config", config, "--", "data.synthetic.directory=log", *log)
    (exported,) = (folder / "outputs").rglob("rows-*")
    counts = {path.stem: pq.read_metadata(path).num_rows for path in exported.glob("*.parquet")}
    assert counts == {"train": 90, "valid": 30, "test": 40}


@pytest.mark.slow
@pytest.mark.skipif("HILOREC_FUXICTR" not in os.environ, reason="HILOREC_FUXICTR names no checkout of FuxiCTR")
def test_fuxictr_itself_learns_the_tiny_log(folder: Path, run: Callable[..., None]) -> None:
    write_tiny_log(folder / "log", rows={"train": 3000, "valid": 500, "test": 2000})
    checkout, python = Path(os.environ["HILOREC_FUXICTR"]), os.environ["HILOREC_FUXICTR_PYTHON"]
    narrow = ("DNN.hidden_units", "DCNv2.parallel_dnn_hidden_units", "MaskNet.dnn_hidden_units")
    narrow += ("FinalMLP.mlp1_hidden_units", "FinalMLP.mlp2_hidden_units", "FinalMLP.fs_hidden_units")
    settings = ("batch_size=128", "learning_rate=0.01", "epochs=2", *(f"{units}=[16]" for units in narrow))
    models = ("DNN", "DCNv2", "FinalMLP", "MaskNet")
    run(checkout, python, "--models", *models, "--seeds", "17", "--set", *settings, "--", ONE_WIDTH)
    found = read_result(folder)["run"]
    assert tuple(line["model"] for line in found) == models
    for line in found:
        assert line["seed"] == 17 and line["figures"]["test AUC"] > 0.56  # chance is within 0.5 ± 0.04
