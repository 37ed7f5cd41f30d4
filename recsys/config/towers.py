"""Settings of the towers: each is a class here and a file in `recsys.model.towers`, and named nowhere else."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from recsys.config.section import Layers, Name, Probability, Section, Width, listed

_MAX_LAYERS = 2**8
Hidden = Annotated[tuple[Width, ...], Field(max_length=_MAX_LAYERS)]
Stream = Annotated[tuple[Width, ...], Field(min_length=1, max_length=_MAX_LAYERS)]


Activation = Literal["relu", "gelu", "silu", "leaky_relu", "prelu", "none"]
Normalization = Literal["none", "batch", "layer"]


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
    """

    expert_linears: ClassVar[tuple[str, ...]]

    type: str

    def check_features(self, sparse: Sequence[str]) -> None:
        """Refuse settings that name features which are not among the sparse ones.

        Raises:
            ValueError: one does; the message begins with the setting.
        """


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
