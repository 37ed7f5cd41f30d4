"""Settings of the towers: each is a class here and a file in `recsys.model.towers`, and named nowhere else."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from recsys.config.section import Layers, Name, Probability, Section, Width, listed

_MAX_LAYERS = 2**8
FIRST_ORDER_WIDTH = 4
"""Numbers of a token that its first-order weight takes: fbgemm reads vectors of four, so three are padding."""
DENSE_DIM = "model.dense_dim"
"""Path of the width of the dense features' token."""
Hidden = Annotated[tuple[Width, ...], Field(max_length=_MAX_LAYERS)]
Stream = Annotated[tuple[Width, ...], Field(min_length=1, max_length=_MAX_LAYERS)]
Activation = Literal["relu", "gelu", "silu", "leaky_relu", "prelu", "none"]
Normalization = Literal["none", "batch", "layer"]
Bilinear = Literal["all", "each", "interaction"]


class PerceptronSettings(Section):
    """What each hidden layer of a perceptron is: a linear, normalisation, activation and dropout, one after another.

    Attributes:
        activation: `prelu` learns a slope for each unit; `none` leaves the layers linear.
        dropout: probability, after activations.
        normalization: between linears and activations; `batch` by the statistics of a step's rows on all ranks.
    """

    activation: Activation = "relu"
    dropout: Probability = 0.0
    normalization: Normalization = "none"


class TowerSettings(PerceptronSettings):
    """What all towers have: those of their perceptrons.

    Attributes:
        type: names the tower.
        expert_linears: patterns of the linears that carry experts unless the config says which.
        deep_linears: those of hidden layers, which adapt to domains unless the config says which; empty for the same.
        pairwise: whether it multiplies tokens with one another, which then are two at least, of one width.
    """

    expert_linears: ClassVar[tuple[str, ...]]
    deep_linears: ClassVar[tuple[str, ...]] = ()
    pairwise: ClassVar[bool] = False

    type: str

    def check_features(self, sparse: Sequence[str]) -> None:
        """Refuse settings that name features which are not among the sparse ones.

        Raises:
            ValueError: one does; the message begins with the setting.
        """

    def check_tokens(self, tokens: Sequence[tuple[str, int]]) -> None:
        """Refuse tokens that the tower cannot take.

        Args:
            tokens: width of each, behind the path of the config that sets it.

        Raises:
            ValueError: they do not fit; the message begins with the setting.
        """
        for path, width in tokens:
            if self.padding and width <= FIRST_ORDER_WIDTH:
                raise ValueError(
                    f"wide: the first-order weight takes {FIRST_ORDER_WIDTH} numbers of each token, and {path} is "
                    f"{width}; raise it by {FIRST_ORDER_WIDTH}"
                )
        if not self.pairwise:
            return
        if len(tokens) < 2:
            raise ValueError(f"type: {self.type} multiplies features with one another; give a second, or take mlp")
        first, width = tokens[0]
        for path, other in tokens:
            if other != width:
                raise ValueError(
                    f"type: {self.type} needs one width, and {path} is {other} where {first} is {width}; make them "
                    "equal"
                )

    @property
    def padding(self) -> int:
        """Numbers of each token that are there for its width alone, as the tower never reads them."""
        return 0


class WideSettings(Section):
    """Beside `TowerSettings`: what towers with first-order ("wide") terms have.

    Attributes:
        wide: whether the last `FIRST_ORDER_WIDTH` numbers of every token are its first-order weight, the first of them,
            and padding; an embedding_dim of 20 is an embedding of 16 then. False leaves first-order terms out.
    """

    wide: bool = True

    @property
    def padding(self) -> int:
        """As `TowerSettings`."""
        return FIRST_ORDER_WIDTH - 1 if self.wide else 0


class MLPTowerConfig(TowerSettings):
    """A multi-layer perceptron; no hidden layers make the ranker a logistic regression on its embeddings."""

    expert_linears = ("tower.linears.*",)

    type: Literal["mlp"]
    hidden: Hidden = (256, 128, 64)


class DCNv2TowerConfig(TowerSettings):
    """Cross layers in front of a perceptron (arXiv 2008.13535, stacked)."""

    expert_linears = ("tower.mlp.*",)
    """In the cross layers experts cost FLOPs and gain nothing (docs/hilomoe.md)."""

    type: Literal["dcn_v2"]
    num_cross_layers: Layers = 3
    hidden: Hidden = (256, 128)


class TransformerTowerConfig(TowerSettings):
    """Pre-norm encoder blocks over one token per feature (plus one for the dense features).

    `normalization` is what stands before attention and perceptrons, and at the end; `batch` counts each token as a row.
    """

    expert_linears = ("tower.blocks.*",)

    type: Literal["transformer"]
    normalization: Normalization = "layer"
    model_dim: Width = 32
    num_blocks: Layers = 2
    num_heads: Width = 4
    feedforward_dim: Width = 64

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.model_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide model_dim {self.model_dim}")
        return self


class FinalMLPTowerConfig(TowerSettings):
    """Two perceptrons on differently gated features, fused bilinearly (arXiv 2304.00902).

    `first_context` and `second_context` name the sparse features that gate each stream; none gates by a learned vector.
    Null `gate_hidden` leaves the gates out.
    """

    expert_linears = ("tower.first.*", "tower.second.*")

    type: Literal["final_mlp"]
    first_hidden: Stream = (256, 128)
    second_hidden: Stream = (256, 128)
    num_heads: Width = 4
    first_context: tuple[Name, ...] = ()
    second_context: tuple[Name, ...] = ()
    gate_hidden: Width | None = 64

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        for stream, hidden in (("first_hidden", self.first_hidden), ("second_hidden", self.second_hidden)):
            if hidden[-1] % self.num_heads:
                raise ValueError(f"num_heads {self.num_heads} does not divide {stream}'s last width {hidden[-1]}")
        return self

    def check_features(self, sparse: Sequence[str]) -> None:
        """As `TowerSettings`."""
        for context in ("first_context", "second_context"):
            if unknown := set(getattr(self, context)) - set(sparse):
                raise ValueError(f"{context}: no sparse feature {min(unknown)!r}; there are {listed(sparse)}")


class WDLTowerConfig(WideSettings, TowerSettings):
    """Wide & Deep: first-order terms beside a perceptron (arXiv 1606.07792)."""

    expert_linears = ("tower.mlp.*",)

    type: Literal["wdl"]
    wide: Literal[True] = True
    hidden: Stream = (256, 128, 64)


class DeepFMTowerConfig(WideSettings, TowerSettings):
    """A factorization machine beside a perceptron on the same embeddings (arXiv 1703.04247)."""

    expert_linears = ("tower.mlp.*",)
    pairwise = True

    type: Literal["deepfm"]
    hidden: Stream = (256, 128, 64)


class NFMTowerConfig(WideSettings, TowerSettings):
    """A perceptron on the sum of all products of two embeddings (arXiv 1708.05027); without layers, an FM."""

    expert_linears = ("tower.mlp.*",)
    pairwise = True

    type: Literal["nfm"]
    hidden: Hidden = (256, 128)


class PNNTowerConfig(TowerSettings):
    """A perceptron on the embeddings and their inner products (arXiv 1611.00144)."""

    expert_linears = ("tower.mlp.*",)
    pairwise = True

    type: Literal["pnn"]
    hidden: Hidden = (256, 128, 64)


class DCNTowerConfig(TowerSettings):
    """Cross layers of one vector each beside a perceptron (arXiv 1708.05123); without layers, the former alone."""

    expert_linears = ("tower.mlp.*",)

    type: Literal["dcn"]
    num_cross_layers: Layers = 3
    hidden: Hidden = (256, 128)


class DLRMTowerConfig(TowerSettings):
    """Inner products between two perceptrons, the first of dense features (arXiv 1906.00091).

    `bottom_hidden` are the layers of the first but for its last, which has the embeddings' width; `hidden` those of the
    second.
    """

    expert_linears = ("tower.top.*",)
    pairwise = True

    type: Literal["dlrm"]
    bottom_hidden: Hidden = (128, 64)
    hidden: Hidden = (256, 128, 64)

    def check_tokens(self, tokens: Sequence[tuple[str, int]]) -> None:
        """As `TowerSettings`; the bottom brings the dense features to the width of the others."""
        _, width = tokens[0]
        super().check_tokens([(path, width if path == DENSE_DIM else own) for path, own in tokens])


class XDeepFMTowerConfig(WideSettings, TowerSettings):
    """A compressed interaction network (CIN) beside a perceptron (arXiv 1803.05170).

    `cin_hidden` are the numbers of the CIN's feature maps, layer by layer. No `hidden` layers leave the perceptron out.
    """

    expert_linears = ("tower.mlp.*",)
    pairwise = True

    type: Literal["xdeepfm"]
    cin_hidden: Stream = (16, 16, 16)
    hidden: Hidden = (256, 128)


class FiBiNETTowerConfig(WideSettings, TowerSettings):
    """Bilinear products of all pairs of tokens, plain and reweighted, into a perceptron (arXiv 1905.09433).

    `bilinear` says how many matrices there are: one for `all`, one for `each` left token, one for each `interaction`.
    The reweighting's hidden layer is as wide as there are tokens, divided by `reduction_ratio`; `excitation` is the
    activation that makes its weights.
    """

    expert_linears = ("tower.mlp.*",)
    pairwise = True

    type: Literal["fibinet"]
    bilinear: Bilinear = "interaction"
    reduction_ratio: Width = 3
    excitation: Literal["relu", "sigmoid"] = "relu"
    hidden: Hidden = (256, 128)


class AutoIntTowerConfig(WideSettings, TowerSettings):
    """Self-attention over the tokens without positions, beside a perceptron (arXiv 1810.11921).

    No `hidden` layers leave the perceptron out. `wide`, off here, is FuxiCTR's linear part.
    """

    expert_linears = ("tower.*",)
    deep_linears = ("tower.mlp.*",)
    pairwise = True

    type: Literal["autoint"]
    num_layers: Layers = 2
    attention_dim: Width = 32
    num_heads: Width = 2
    hidden: Hidden = (256, 128)
    wide: bool = False

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.attention_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide attention_dim {self.attention_dim}")
        return self


class MaskNetTowerConfig(TowerSettings):
    """Blocks that each mask the embeddings by what they are, side by side, into a perceptron (arXiv 2102.07619).

    The hidden layer of each mask is `reduction_ratio` times as wide as the embeddings, as the paper has it.
    """

    expert_linears = ("tower.blocks.*",)
    deep_linears = ("tower.mlp.*",)

    type: Literal["masknet"]
    num_blocks: Layers = 3
    block_dim: Width = 64
    reduction_ratio: Width = 1
    hidden: Hidden = (256, 128)


class GDCNTowerConfig(TowerSettings):
    """Gated cross layers in front of a perceptron (`stacked`) or beside it (`parallel`) (arXiv 2311.04635)."""

    expert_linears = ("tower.mlp.*",)

    type: Literal["gdcn"]
    structure: Literal["stacked", "parallel"] = "stacked"
    num_cross_layers: Layers = 3
    hidden: Hidden = (256, 128)


class QNNTowerConfig(TowerSettings):
    """Quadratic layers, x + norm(A x * B x), beside a perceptron (arXiv 2505.17999)."""

    expert_linears = ("tower.mlp.*",)

    type: Literal["qnn"]
    num_layers: Layers = 3
    norm: Literal["layer", "none"] = "layer"
    hidden: Hidden = (256, 128)


class QNNAlphaTowerConfig(TowerSettings):
    """Quadratic layers, x + sum_r x * relu(A_r x), beside a perceptron (QNN-alpha, arXiv 2505.17999).

    `num_rows` is how many A_r each layer has. With `num_heads` above 1 each token is cut in as many slices, and x in
    the product is put in the order of slices, so that a number of the residual meets another's product.
    """

    expert_linears = ("tower.layers.*.linear",)

    type: Literal["qnn_alpha"]
    num_layers: Layers = 1
    num_rows: Width = 4
    num_heads: Width = 1
    hidden: Hidden = ()

    def check_tokens(self, tokens: Sequence[tuple[str, int]]) -> None:
        """As `TowerSettings`."""
        super().check_tokens(tokens)
        first, width = tokens[0]
        for path, other in tokens if self.num_heads > 1 else ():
            if other != width or other % self.num_heads:
                beside = f" where {first} is {width}" if other != width else ""
                raise ValueError(
                    f"num_heads: {self.num_heads} heads need tokens of one width that they divide, and {path} is "
                    f"{other}{beside}; change {'them' if beside else 'one of them'}, or set num_heads to 1"
                )
