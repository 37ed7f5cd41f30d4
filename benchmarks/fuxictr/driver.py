"""Train one FuxiCTR model and leave its scores: `driver.py CHECKOUT ROWS RUN`, started by runs.py.

It runs in FuxiCTR's environment, so it knows nothing of HiloRec and imports FuxiCTR from the checkout. RUN/params.json
says what to train. RUN gets valid.npy and test.npy, probabilities in the rows' order, and last result.json. With
CHECKOUT alone it prints the versions of that environment as JSON.
"""

import json
import logging
import platform
import sys
import time
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FOLDERS = {"QNN_alpha": "QNN"}
"""Of models that have none of their own name."""
QNNS = ("QNN", "QNN_alpha")
PACKAGES = ("torch", "numpy", "pandas", "polars", "pyarrow", "scikit-learn")


def print_versions(checkout: Path) -> None:
    """Print the versions of FuxiCTR and of the packages in its environment, as JSON."""
    sys.path.insert(0, str(checkout))
    versions = {"fuxictr": import_module("fuxictr").__version__, "python": platform.python_version()}
    print(json.dumps(versions | {package: metadata.version(package) for package in PACKAGES}))


def train(checkout: Path, rows: Path, run: Path) -> None:
    """Train the model that the run's params.json describes, and leave its scores."""
    params: dict[str, Any] = json.loads((run / "params.json").read_text(encoding="utf-8"))
    name = params["model"]
    sys.path[:0] = [str(zoo_folder(checkout, name)), str(checkout)]
    feature_map_class = import_module("fuxictr.features").FeatureMap
    loader_class = import_module("fuxictr.pytorch.dataloaders").RankDataLoader
    seed_everything = import_module("fuxictr.pytorch.torch_utils").seed_everything
    model_class = getattr(import_module("src"), name)
    if name == "FinalMLP":
        import_module(model_class.__module__).InteractionAggregation.forward = aggregate

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    seed_everything(params["seed"])
    params |= {f"{split}_data": str(rows / f"{split}.parquet") for split in ("train", "valid", "test")}
    feature_map = feature_map_class(params["dataset_id"], str(rows))
    feature_map.load(str(rows / "feature_map.json"), params)
    model = model_class(feature_map, model_root=str(run), **params)
    if name in QNNS:
        flatten_embeddings(model)
    Path(model.checkpoint).parent.mkdir(exist_ok=True)  # FuxiCTR makes it where it opens its log file
    train_batches, valid_batches, test_batches = loader_class(feature_map, stage="both", **params).make_iterator()

    evaluation_seconds = 0.0
    evaluate = model.evaluate

    def timed_evaluate(*args: Any, **kwargs: Any) -> Any:
        nonlocal evaluation_seconds
        start = time.perf_counter()
        figures = evaluate(*args, **kwargs)
        evaluation_seconds += time.perf_counter() - start
        return figures

    model.evaluate = timed_evaluate
    start = time.perf_counter()
    model.fit(train_batches, validation_data=valid_batches, **params)
    training_seconds = time.perf_counter() - start - evaluation_seconds

    scores: dict[str, NDArray[np.float64]] = {}
    for split, batches in {"valid": valid_batches, "test": test_batches}.items():
        scores[split] = model.predict(batches)
        np.save(run / f"{split}.npy", scores[split])
    labels = test_batches.dataset.darray[:, feature_map.get_column_index(feature_map.labels[0])]
    result = {
        "epochs": model._epoch_index + 1,
        "training seconds": training_seconds,
        "parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "own test figures": model.evaluate_metrics(labels, scores["test"], ["AUC", "logloss"]),
    }
    part = run / "result.json.part"
    part.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    part.rename(run / "result.json")


def zoo_folder(checkout: Path, name: str) -> Path:
    """Where a model lies in the zoo; it has a folder within its own where there is a TensorFlow version as well."""
    folder = _FOLDERS.get(name, name)
    zoo = checkout / "model_zoo" / folder
    within = zoo / f"{folder}_torch"
    return within if within.is_dir() else zoo


def flatten_embeddings(model: Any) -> None:
    """Have a model of `QNNS` run, which as shipped gives its embedding layer `dynamic_emb_dim` for `flatten_emb`."""
    embed = model.embedding_layer.forward
    model.embedding_layer.forward = lambda batch, dynamic_emb_dim: embed(batch, flatten_emb=dynamic_emb_dim)


def aggregate(self: Any, x: Any, y: Any) -> Any:
    """What FinalMLP's InteractionAggregation computes, equal but for rounding; for (B, X) and (B, Y) gives (B, out).

    FuxiCTR's own multiplies by broadcasting, which copies the weights for every row.
    """
    torch = import_module("torch")
    head_x = x.view(-1, self.num_heads, self.head_x_dim)
    head_y = y.view(-1, self.num_heads, self.head_y_dim)
    weights = self.w_xy.view(self.num_heads, self.head_x_dim, self.output_dim, self.head_y_dim)
    partial = torch.einsum("bhi,hik->bhk", head_x, weights.flatten(2)).unflatten(2, weights.shape[2:])
    return self.w_x(x) + self.w_y(y) + (partial * head_y.unsqueeze(2)).sum((1, 3))


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]]
    if len(paths) == 1:
        print_versions(*paths)
    else:
        train(*paths)
