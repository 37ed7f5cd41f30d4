"""Whether our towers compute what FuxiCTR's models of those names do, given the same weights.

    python -m benchmarks.fuxictr.towers --checkout DIR

It runs in FuxiCTR's environment (requirements.txt), from the root of the checkout of this project. Every weight of
FuxiCTR's model is drawn anew and copied into our tower; both then score the same random rows in double precision. The
exit code is 1 if probabilities differ by `ALIKE` or more. docs/benchmarks.md says how to set it up.
"""

import argparse
import importlib.util
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.fuxictr.checkout import check_checkout, checkout_commit
from benchmarks.fuxictr.driver import QNNS, flatten_embeddings, zoo_folder
from benchmarks.fuxictr.weights import copy_weights, linear_part, tables
from benchmarks.report import RESULTS, environment, show, write
from recsys.cli import run_entry
from recsys.config import ModelConfig
from recsys.config.towers import FIRST_ORDER_WIDTH
from recsys.errors import UserError
from recsys.model.dense_arch import build_dense_arch

Settings = Mapping[str, Any]
Features = dict[str, Tensor]

ALIKE = 1e-12
"""How near probabilities must be: rounding of doubles, and far below what one weight in the wrong place changes."""

_ROWS, _FIELDS, _VALUES, _NUMBERS, _EMBEDDING_DIM = 512, 5, 50, 3, 16
_SCALE = 0.3
"""Standard deviation of all weights: probabilities neither all alike nor all 0 or 1."""
_HIDDEN = [32, 16]

_ALL_MODELS: Settings = {
    "gpu": -1,
    "optimizer": "adam",
    "loss": "binary_crossentropy",
    "metrics": ["AUC"],
    "verbose": 0,
    "model_root": "",
    "embedding_dim": _EMBEDDING_DIM,
}


@dataclass(frozen=True)
class Case:
    """A tower of ours and FuxiCTR's model beside it.

    Attributes:
        name: as the page has it.
        tower: what `model.tower` says.
        model: name of FuxiCTR's class.
        settings: its arguments, beside those of all models.
        file: name of the file, the class's own unless it is given.
        numbers: dense features.
    """

    name: str
    tower: Settings
    model: str
    settings: Settings
    file: str = ""
    numbers: int = 0


def _case(
    name: str, tower: Settings, model: str, settings: Settings, hidden: str = "dnn_hidden_units", **more: Any
) -> Case:
    """A case whose perceptrons are alike; FuxiCTR calls their widths `hidden`."""
    return Case(name, {"hidden": _HIDDEN, **tower}, model, {hidden: _HIDDEN, **settings}, **more)


_FIBINET = [
    _case(
        f"FiBiNET, {bilinear}, {excitation}",
        {"type": "fibinet", "bilinear": bilinear, "reduction_ratio": ratio, "excitation": excitation},
        "FiBiNET",
        {"bilinear_type": f"field_{bilinear}", "reduction_ratio": ratio, "excitation_activation": activation},
        "hidden_units",
    )
    for bilinear in ("all", "each", "interaction")
    # With fewer hidden units, relu leaves out tokens whose weights then do not matter.
    for excitation, activation, ratio in (("relu", "ReLU", 1), ("sigmoid", "Sigmoid", 2))
]
_AUTOINT = [
    _case(
        f"AutoInt{', wide' if wide else ''}",
        {"type": "autoint", "num_layers": 3, "attention_dim": 6, "num_heads": 2, "wide": wide},
        "AutoInt",
        {"attention_layers": 3, "attention_dim": 6, "num_heads": 2, "use_wide": wide},
    )
    for wide in (False, True)
]
CASES = (
    _case("MLP", {"type": "mlp"}, "DNN", {}, "hidden_units"),
    _case("WDL", {"type": "wdl"}, "WideDeep", {}, "hidden_units"),
    _case("DeepFM", {"type": "deepfm"}, "DeepFM", {}, "hidden_units"),
    _case("NFM", {"type": "nfm"}, "NFM", {}, "hidden_units"),
    _case("PNN", {"type": "pnn"}, "PNN", {}, "hidden_units"),
    _case("DLRM", {"type": "dlrm"}, "DLRM", {}, "top_mlp_units"),
    _case(
        "DLRM, dense features",
        {"type": "dlrm", "bottom_hidden": [8]},
        "DLRM",
        {"bottom_mlp_units": [8]},
        "top_mlp_units",
        numbers=_NUMBERS,
    ),
    _case("DCN", {"type": "dcn", "num_cross_layers": 3}, "DCN", {"num_cross_layers": 3}),
    _case(
        "DCN-V2",
        {"type": "dcn_v2", "num_cross_layers": 3},
        "DCNv2",
        {"model_structure": "stacked", "num_cross_layers": 3},
        "stacked_dnn_hidden_units",
    ),
    _case("GDCN, stacked", {"type": "gdcn", "num_cross_layers": 3}, "GDCN", {"num_cross_layers": 3}),
    _case(
        "GDCN, parallel",
        {"type": "gdcn", "num_cross_layers": 3, "structure": "parallel"},
        "GDCNP",
        {"num_cross_layers": 3},
        file="GDCN",
    ),
    Case(
        "QNN, T23",
        {"type": "qnn", "num_layers": 2, "norm": "none", "hidden": []},
        "QNN",
        {"num_cross_layers": 2, "neuron_type": "T23", "hidden_activations": None},
    ),
    Case(
        "QNN-alpha",
        {"type": "qnn_alpha", "num_layers": 2, "num_rows": 3, "num_heads": 2, "normalization": "batch"},
        "QNN_alpha",
        {"num_layers": 2, "num_row": 3, "num_heads": 2, "batch_norm": True},
    ),
    _case("xDeepFM", {"type": "xdeepfm", "cin_hidden": [7, 5, 3]}, "xDeepFM", {"cin_hidden_units": [7, 5, 3]}),
    *_FIBINET,
    *_AUTOINT,
    _case(
        "MaskNet, parallel",
        {"type": "masknet", "num_blocks": 3, "block_dim": 7, "reduction_ratio": 2},
        "MaskNet",
        {
            "model_type": "ParallelMaskNet",
            "parallel_num_blocks": 3,
            "parallel_block_dim": 7,
            "reduction_ratio": 2,
        },
    ),
    Case(
        "FinalMLP",
        {
            "type": "final_mlp",
            "first_hidden": _HIDDEN,
            "second_hidden": [12],
            "num_heads": 4,
            "second_context": ["c0"],
            "gate_hidden": 9,
        },
        "FinalMLP",
        {
            "mlp1_hidden_units": _HIDDEN,
            "mlp2_hidden_units": [12],
            "num_heads": 4,
            "fs2_context": ["c0"],
            "fs_hidden_units": [9],
        },
    ),
)


def main() -> None:
    """Compare and report as the command line asks."""
    arguments = parse(sys.argv[1:])
    # The environment has neither TorchRec nor fbgemm, and no need of them.
    run_entry(lambda: benchmark(arguments), checks_versions=False)


def parse(command_line: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.fuxictr.towers", description="Compare towers with FuxiCTR's.")
    parser.add_argument("--checkout", type=Path, required=True, help="clone of https://github.com/reczoo/FuxiCTR")
    parser.add_argument("--seed", type=int, default=17, help="of weights and rows (default: 17)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go (benchmarks/results)")
    return parser.parse_args(command_line)


def benchmark(arguments: argparse.Namespace) -> int:
    """Compare every case and report; 1 if one is not alike.

    Raises:
        UserError: the checkout or the environment is not fit.
    """
    check_checkout(arguments.checkout)
    sys.dont_write_bytecode = True  # the checkout is only read
    sys.path.insert(0, str(arguments.checkout))
    try:
        version = import_module("fuxictr").__version__
        figures = {case.name: compare(case, arguments.checkout, arguments.seed) for case in CASES}
    except ModuleNotFoundError as error:
        raise UserError(f"this Python lacks what FuxiCTR needs ({error}); see docs/benchmarks.md") from None
    unlike = [name for name, found in figures.items() if not found["largest difference"] < ALIKE]
    _report(arguments, version, figures, unlike)
    return int(bool(unlike))


def compare(case: Case, checkout: Path, seed: int) -> dict[str, float]:
    """Largest difference of a row's two probabilities, the control's, and the range of FuxiCTR's.

    The control is the least difference when one tensor of ours is not quite FuxiCTR's: where one does not matter, or
    probabilities are all 0 or 1, it is as small as rounding.
    """
    torch.manual_seed(seed)
    features: Features = {f"c{field}": torch.randint(_VALUES, (_ROWS,)) for field in range(_FIELDS)}
    features |= {f"n{number}": torch.randn(_ROWS, 1, dtype=torch.double) for number in range(case.numbers)}
    theirs = _fuxictr_model(case, checkout, features)
    config = ModelConfig.model_validate_json(json.dumps({"tower": case.tower, "dense_dim": case.numbers or 1}))
    wide = linear_part(theirs)
    width = _EMBEDDING_DIM + (0 if wide is None else FIRST_ORDER_WIDTH)
    widths = {name: width for name in features if name.startswith("c")}
    arch = build_dense_arch(config, widths, num_dense_features=case.numbers).double().eval()
    copy_weights(case.tower["type"], theirs, arch)
    with torch.no_grad():
        pooled = torch.cat([_token(theirs, wide, name, features[name]) for name in widths], 1)
        numbers = torch.cat([pooled[:, :0], *(features[name] for name in features if name not in widths)], 1)
        expected = theirs(features)["y_pred"].squeeze(1)

        def difference() -> float:
            logits = arch(pooled, numbers).logits
            return float((logits.sigmoid() - expected).abs().max())

        return {
            "largest difference": difference(),
            "control": min(
                _disturbed(weight, difference) for part in (arch.tower, arch.head) for weight in part.parameters()
            ),
            "lowest": float(expected.min()),
            "highest": float(expected.max()),
        }


def _disturbed(weight: Tensor, difference: Callable[[], float]) -> float:
    """The difference with every other number of one tensor of ours 1 % too large."""
    copied = weight.clone()
    weight.view(-1)[::2].mul_(1.01)  # not all: a norm behind it would undo that
    found = difference()
    weight.copy_(copied)
    return found


def _fuxictr_model(case: Case, checkout: Path, features: Features) -> Any:
    """FuxiCTR's model in double precision, every weight drawn anew, made to run where it does not."""
    feature_map = import_module("fuxictr.features").FeatureMap("towers", "")
    feature_map.labels, feature_map.default_emb_dim = ["label"], _EMBEDDING_DIM
    for name, values in features.items():
        number = values.is_floating_point()
        feature_map.features[name] = {"type": "numeric"} if number else {"type": "categorical", "vocab_size": _VALUES}
    feature_map.num_fields = feature_map.get_num_fields()
    name = case.file or case.model
    module = _load(zoo_folder(checkout, name) / "src" / f"{name}.py")
    model = getattr(module, case.model)(feature_map, **_ALL_MODELS, **case.settings).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.is_floating_point():  # masks and indices are parameters there as well
                weight.normal_(std=_SCALE)
        if case.model == "FinalMLP":  # its gates have tables of their own, where ours read the tokens
            for feature, table in tables(model.fs_module.fs2_ctx_emb).items():
                table.weight.copy_(tables(model.embedding_layer)[feature].weight)
    if case.model in QNNS:
        flatten_embeddings(model)
    return model


def _load(path: Path) -> Any:
    """The module in a file; those of the zoo are all in packages of one name."""
    spec = importlib.util.spec_from_file_location(f"zoo_{path.stem}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise UserError(f"--checkout: no {path}; see docs/benchmarks.md for the commit that has it")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _token(theirs: Any, wide: Any, name: str, ids: Tensor) -> Tensor:
    """A feature's embeddings as our tables have them: FuxiCTR's, with first-order weights if it has them."""
    embeddings: Tensor = tables(theirs.embedding_layer)[name](ids)
    if wide is None:
        return embeddings
    unread = embeddings.new_full((len(ids), FIRST_ORDER_WIDTH - 1), 9.0)  # would show if it were read
    return torch.cat([embeddings, tables(wide.embedding_layer)[name](ids), unread], 1)


def _report(
    arguments: argparse.Namespace, version: str, figures: Mapping[str, Mapping[str, float]], unlike: Sequence[str]
) -> None:
    options = [] if arguments.seed == 17 else ["--seed", str(arguments.seed)]
    commit = checkout_commit(arguments.checkout)
    about = {
        "command": shlex.join(["python", "-m", "benchmarks.fuxictr.towers", *options])
        + ' --checkout "$HILOREC_FUXICTR"',
        "fuxictr": {"commit": commit, "version": version},
        **environment(),
    }
    cases = {case.name: case for case in CASES}
    rows = [
        {
            "tower": name,
            "FuxiCTR": cases[name].model,
            "largest difference": f"{found['largest difference']:.1e}",
            "control": f"{found['control']:.1e}",
            "probabilities": f"{found['lowest']:.3f} to {found['highest']:.3f}",
        }
        for name, found in figures.items()
    ]
    lines = [
        {
            "kind": "tower",
            "name": name,
            "tower": cases[name].tower,
            "fuxictr": {"model": cases[name].model, "settings": cases[name].settings},
            "figures": found,
        }
        for name, found in figures.items()
    ]
    title = "Towers beside FuxiCTR's models"
    show(title, rows)
    parts: list[str | list[dict[str, str]]] = [
        f"Probabilities of {_ROWS} random rows of {_FIELDS} ids (and of {_NUMBERS} numbers, where there are dense "
        "features) by both, in double precision. All weights are drawn from a normal distribution of deviation "
        f"{_SCALE:g} and copied from FuxiCTR's model to ours. The control is the largest difference with every other "
        "number of one tensor of ours 1 % too large, that of the tensor that shows least.",
        *([f"NOT ALIKE, by {ALIKE:g} or more: {', '.join(unlike)}."] if unlike else []),
        rows,
        "FuxiCTR's QNNs fail as shipped, as they give their embedding layer an argument that this does not take; it "
        "gets the argument that is meant, `flatten_emb`. Its FinalMLP has tables of their own for the gates' contexts; "
        "they get the weights of the features' tables, which our gates read.",
        f"FuxiCTR {version}, its checkout at {commit}.",
    ]
    write(arguments.output / "fuxictr_towers", title, parts, about, lines)


if __name__ == "__main__":
    main()
