"""Weights of a FuxiCTR model in our tower of that kind: what corresponds to what."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from recsys.model.dense_arch import DenseArch

Affine = tuple[Tensor, Tensor]
"""Weight (1, n) and bias (1,) of a linear to one number."""


@torch.no_grad()
def copy_weights(kind: str, theirs: Any, arch: DenseArch) -> None:
    """Give our dense arch all weights of FuxiCTR's model but for its tables, from which the tokens are read.

    The head's factors of the tower's `num_logits` summands stay as they begin, 1.

    Args:
        kind: the tower's `type`.
        theirs: FuxiCTR's model of that kind.
        arch: ours, of the same sizes.
    """
    weight, bias = _copy_tower(kind, theirs, arch.tower)
    arch.head.weight[:, : weight.shape[1]] = weight
    arch.head.bias.copy_(bias)
    first_order = linear_part(theirs)
    if first_order is not None and first_order.bias is not None:
        arch.head.bias.add_(first_order.bias)
    if arch.dense_projection is not None:  # FuxiCTR has none
        nn.init.eye_(arch.dense_projection.weight)
        nn.init.zeros_(arch.dense_projection.bias)


def linear_part(theirs: Any) -> Any:
    """The module of FuxiCTR's model that has the first-order weights, or None."""
    return next((module for module in theirs.modules() if type(module).__name__ == "LogisticRegression"), None)


def tables(layer: Any) -> Any:
    """The tables of FuxiCTR's embedding layer, by feature."""
    return layer.embedding_layer.embedding_layers


def _copy_tower(kind: str, theirs: Any, tower: Any) -> Affine:
    """Copy what lies before the head, and give the head of what the tower's outputs begin with."""
    match kind:
        case "mlp":
            return _beside(*_copy_perceptron(tower, theirs.mlp))
        case "deepfm":
            return _beside(*_copy_perceptron(tower.mlp, theirs.mlp))
        case "wdl" | "nfm" | "pnn":
            return _beside(*_copy_perceptron(tower.mlp, theirs.dnn))
        case "dlrm":
            return _copy_dlrm(theirs, tower)
        case "dcn":
            layers = theirs.crossnet.cross_net
            _copy_all(tower.cross, (layer.weight for layer in layers))
            for bias, layer in zip(tower.cross_biases, layers, strict=True):
                bias.copy_(layer.bias)
            _copy_perceptron(tower.mlp, theirs.dnn)
            return _beside(theirs.fc)
        case "dcn_v2":
            _copy_all(tower.cross, theirs.crossnet.cross_layers)
            _copy_perceptron(tower.mlp, theirs.stacked_dnn)
            return _beside(theirs.fc)
        case "gdcn":
            return _copy_gdcn(theirs, tower)
        case "qnn":
            for ours, layer in zip(tower.layers, theirs.qnn.layer, strict=True):
                for linear, weight, bias in zip(
                    (ours.left, ours.right), layer.linear.weight.chunk(2), layer.linear.bias.chunk(2), strict=True
                ):
                    _set(linear, weight, bias)
            return _beside(theirs.qnn.fc)
        case "qnn_alpha":
            for ours, layer in zip(tower.layers, theirs.qnn.layer, strict=True):
                _copy_all((ours.linear, ours.norm), layer.linear[:2])
            return _beside(theirs.qnn.fc)
        case "xdeepfm":
            _copy_all(tower.cin.layers, theirs.cin.cin_layer.values())
            return _beside(*_copy_perceptron(tower.mlp, theirs.dnn), theirs.cin.fc)
        case "fibinet":
            _copy_all((tower.senet.squeeze, tower.senet.excite), theirs.senet_layer.excitation[0:3:2])
            _copy_bilinear(tower.plain, theirs.bilinear_interaction1)
            _copy_bilinear(tower.reweighted, theirs.bilinear_interaction2)
            return _beside(*_copy_perceptron(tower.mlp, theirs.dnn))
        case "autoint":
            for ours, layer in zip(tower.layers, theirs.self_attention, strict=True):
                _copy_all((ours.query, ours.key, ours.value), (layer.W_q, layer.W_k, layer.W_v))
                if layer.W_res is not None:
                    _copy(ours.residual, layer.W_res)
            return _beside(*_copy_perceptron(tower.mlp, theirs.dnn), theirs.fc)
        case "masknet":
            _copy_all(tower.norms, theirs.emb_norm)
            for ours, block in zip(tower.blocks, theirs.mask_net.mask_blocks, strict=True):
                _copy_all((ours.aggregation, ours.projection), block.mask_layer[0:3:2])
                _copy_all((ours.linear, ours.norm), block.hidden_layer[:2])
            return _beside(*_copy_perceptron(tower.mlp, theirs.mask_net.dnn))
        case "final_mlp":
            return _copy_final_mlp(theirs, tower)
    raise NotImplementedError(kind)


def _copy_dlrm(theirs: Any, tower: Any) -> Affine:
    head = _beside(*_copy_perceptron(tower.top, theirs.top_mlp))
    if tower.bottom is not None:
        _copy_perceptron(tower.bottom, theirs.bottom_mlp)
        first = tower.top.linears[0].weight  # the bottom's outputs come first here, the products there
        first.copy_(first.roll(tower.bottom.out_features, 1))
    return head


def _copy_gdcn(theirs: Any, tower: Any) -> Affine:
    for ours, gate, cross, bias in zip(
        tower.layers, theirs.cross_net.wg, theirs.cross_net.w, theirs.cross_net.b, strict=True
    ):
        _copy(ours.gate, gate)
        _set(ours.cross, cross.weight, bias)
    output = _copy_perceptron(tower.mlp, theirs.dnn)
    if not tower.parallel:
        return _beside(*output)
    # The perceptron's outputs come first here, the cross layers' there.
    return theirs.fc.weight.roll(tower.mlp.out_features, 1), theirs.fc.bias


def _copy_bilinear(ours: Any, theirs: Any) -> None:
    # There v W, here W v. The matrices of one left token are one linear here, and none is the last token's.
    rows = theirs.bilinear_W.reshape(-1, ours.dim, ours.dim).mT.flatten(0, 1)
    begin = 0
    for linear in ours.linears:
        _set(linear, rows[begin : begin + linear.out_features], None)
        begin += linear.out_features


def _copy_final_mlp(theirs: Any, tower: Any) -> Affine:
    selection, fusion = theirs.fs_module, theirs.fusion_module
    for ours, gate, context in zip(
        tower.gates,
        (selection.fs1_gate, selection.fs2_gate),
        (getattr(selection, f"fs{stream}_ctx_bias", None) for stream in (1, 2)),
        strict=True,
    ):
        _copy_all((ours.hidden, ours.output), _linears(gate))
        if context is not None:
            ours.context.copy_(context)
    _copy_perceptron(tower.first, theirs.mlp1)
    _copy_perceptron(tower.second, theirs.mlp2)
    tower.interaction.copy_(fusion.w_xy.reshape_as(tower.interaction))
    weight, bias = _beside(fusion.w_x, fusion.w_y)
    return torch.cat([weight, weight.new_ones(1, fusion.num_heads)], 1), bias


def _copy_perceptron(ours: Any, theirs: Any) -> list[Any]:
    """Copy the hidden layers; the linear to the logit, if theirs has one, is what is left."""
    linears = _linears(theirs)
    hidden = len(ours.linears)
    _copy_all(ours.linears, linears[:hidden])
    return linears[hidden:]


def _linears(theirs: Any) -> list[Any]:
    return [module for module in theirs.modules() if isinstance(module, nn.Linear)]


def _beside(*linears: Any) -> Affine:
    """The sum of linears of one number each, as one linear of their inputs side by side."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return torch.cat([linear.weight for linear in linears], 1), torch.stack(biases).sum(0)


def _copy_all(ours: Iterable[Any], theirs: Iterable[Any]) -> None:
    for mine, their in zip(ours, theirs, strict=True):
        _copy(mine, their)


def _copy(ours: Any, theirs: Any) -> None:
    """Copy a linear, a norm, or a convolution of width 1 into a linear."""
    _set(ours, theirs.weight, theirs.bias)


def _set(ours: Any, weight: Tensor, bias: Tensor | None) -> None:
    ours.weight.copy_(weight.reshape_as(ours.weight))
    if bias is not None:
        ours.bias.copy_(bias)
