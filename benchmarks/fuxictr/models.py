"""Settings of FuxiCTR's models: the defaults, and what the command line makes of them."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

from recsys.errors import UserError

Settings = dict[str, Any]

ALL_MODELS: Settings = {
    "batch_size": 4096,
    "learning_rate": 1e-3,
    "embedding_regularizer": 0,
    "net_regularizer": 0,
    "net_dropout": 0,
    "epochs": 100,
    "early_stop_patience": 2,
    "reduce_lr_on_plateau": True,
    "monitor": "AUC",
}
MODELS: dict[str, Settings] = {
    "DNN": {"hidden_units": [400, 400, 400], "hidden_activations": "ReLU", "batch_norm": False},
    "DCNv2": {
        "model_structure": "parallel",
        "num_cross_layers": 3,
        "parallel_dnn_hidden_units": [400, 400, 400],
        "stacked_dnn_hidden_units": [],
        "dnn_activations": "ReLU",
        "use_low_rank_mixture": False,
        "low_rank": 32,
        "num_experts": 4,
        "batch_norm": False,
    },
    "FinalMLP": {
        "mlp1_hidden_units": [400, 400, 400],
        "mlp1_hidden_activations": "ReLU",
        "mlp1_batch_norm": False,
        "mlp2_hidden_units": [400],
        "mlp2_hidden_activations": "ReLU",
        "mlp2_batch_norm": False,
        "use_fs": True,
        "fs_hidden_units": [400],
        "fs1_context": [],
        "fs2_context": [],
        "num_heads": 2,
    },
    "MaskNet": {
        "model_type": "SerialMaskNet",
        "dnn_hidden_units": [400, 400, 400],
        "dnn_hidden_activations": "ReLU",
        "parallel_num_blocks": 1,
        "parallel_block_dim": 64,
        "reduction_ratio": 1,
        "emb_layernorm": True,
        "net_layernorm": True,
    },
    "WideDeep": {"hidden_units": [400, 400, 400], "hidden_activations": "ReLU", "batch_norm": False},
    "DeepFM": {"hidden_units": [400, 400, 400], "hidden_activations": "ReLU", "batch_norm": False},
    "DCN": {
        "num_cross_layers": 3,
        "dnn_hidden_units": [400, 400, 400],
        "dnn_activations": "ReLU",
        "batch_norm": False,
    },
    "AutoInt": {
        "attention_layers": 3,
        "attention_dim": 32,
        "num_heads": 2,
        "use_scale": False,
        "use_wide": False,
        "use_residual": True,
        "dnn_hidden_units": [400, 400, 400],
        "dnn_activations": "ReLU",
        "batch_norm": False,
    },
    "xDeepFM": {
        "cin_hidden_units": [16, 16],
        "dnn_hidden_units": [400, 400, 400],
        "dnn_activations": "ReLU",
        "batch_norm": False,
    },
    "FiBiNET": {
        "hidden_units": [400, 400, 400],
        "hidden_activations": "ReLU",
        "excitation_activation": "ReLU",
        "reduction_ratio": 3,
        "bilinear_type": "field_interaction",
        "batch_norm": False,
    },
    "DLRM": {
        "top_mlp_units": [400, 400, 400],
        "bottom_mlp_units": [64],
        "top_mlp_activations": "ReLU",
        "bottom_mlp_activations": "ReLU",
        "interaction_op": "dot",
        "batch_norm": False,
    },
    "QNN_alpha": {"num_layers": 1, "num_row": 4, "num_heads": 4, "batch_norm": True},
}
"""Every setting of each model: FuxiCTR ignores those it does not know, so others are refused here."""


def settings_of(model: str, assignments: Sequence[str]) -> Settings:
    """A model's settings: the defaults, then what was given for all models and for it, in the order given."""
    settings = ALL_MODELS | MODELS[model]
    for given in assignments:
        key, value = assignment(given, "--set")
        scope, _, name = key.rpartition(".")
        if scope not in ("", *MODELS):
            raise UserError(f"--set {given}: no model {scope!r}; there are {', '.join(MODELS)}")
        if scope in ("", model):
            if name not in settings:
                raise UserError(f"--set {given}: {model} has no setting {name!r}; it has {', '.join(settings)}")
            settings[name] = _parsed(value, f"--set {given}")
    return settings


def points(searches: Sequence[str]) -> list[Settings]:
    """All combinations of the values to try; one empty combination if there are none."""
    axes: dict[str, list[Any]] = {}
    for search in searches:
        key, values = assignment(search, "--search")
        if key not in ALL_MODELS:
            raise UserError(f"--search {search}: only what all models have is searched: {', '.join(ALL_MODELS)}")
        axes[key] = _parsed(f"[{values}]", f"--search {search}")
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def assignment(text: str, option: str) -> tuple[str, str]:
    """Divide `key=value`."""
    key, separator, value = text.partition("=")
    if not (separator and key and value):
        raise UserError(f"{option} {text}: not of the form key=value")
    return key, value


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f'{where}: {error}; values are JSON, so that a text stands in "quotes"') from None
