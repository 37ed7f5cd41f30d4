"""The dense part of an artefact as programs for other runtimes; nothing here is loaded to score.

A program takes what the tables and the config give of N rows, any number of them, and gives their logits:

    pooled (N, W) float32, dense_features (N, F_d) float32 -> (N,) float32

That of a model that adapts to domains takes theirs, domain (N,) int64, after these.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from recsys.model.experts import domain_adaptation
from recsys.serving.artifact import ArtifactError

Format = Literal["torch-export", "aoti"]
Program = Callable[..., Tensor]

PROGRAMS: dict[Format, str] = {"torch-export": "dense.pt2", "aoti": "dense.aoti.pt2"}
"""By format, the file in an artefact."""

CAUTIONS: dict[Format, str] = {
    "torch-export": "holds a pickle, which can run code when it is loaded; load none that you do not trust",
    "aoti": "holds machine code, for processors like this one and this PyTorch; load none that you do not trust, and "
    "set AOTI_RUNTIME_CHECK_INPUTS=1, or what is not contiguous float32 of the right shape is misread",
}
"""By format, what whoever loads the file must know."""

_ROWS = 1024


class _Logits(nn.Module):
    def __init__(self, dense_arch: nn.Module) -> None:
        super().__init__()
        self.dense_arch = dense_arch

    def forward(self, pooled: Tensor, dense_features: Tensor, domain: Tensor | None = None) -> Tensor:
        logits: Tensor = self.dense_arch(pooled, dense_features, domain)[0]
        return logits


def write_program(dense_arch: nn.Module, width: int, num_dense_features: int, kind: Format, path: Path) -> None:
    """Write a dense arch in evaluation as a program.

    Args:
        dense_arch: on the CPU.
        width: W, that of the pooled embeddings.
        num_dense_features: F_d.
        kind: `torch-export` for what `torch.export.load` reads; `aoti` for what `torch._inductor.aoti_load_package`,
            or libtorch without Python, does.
        path: of the file.

    Raises:
        ArtifactError: PyTorch cannot, for `aoti` most often as no C++ compiler is there.
    """
    rows = torch.export.Dim("rows", min=0)
    # As examples, many rows: of few, the compiler makes a program that some towers cannot use for more than 28.
    inputs = {"pooled": torch.zeros(_ROWS, width), "dense_features": torch.zeros(_ROWS, num_dense_features)}
    if domain_adaptation(dense_arch) is not None:
        inputs["domain"] = torch.zeros(_ROWS, dtype=torch.int64)
    with _told(f"--format {kind}"):
        program = torch.export.export(
            _Logits(dense_arch).eval(), tuple(inputs.values()), dynamic_shapes={name: {0: rows} for name in inputs}
        )
        if kind == "torch-export":
            torch.export.save(program, path)
        else:
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=_of_any_size())


def load_program(kind: Format, path: Path) -> Program:
    """A program that was just written, to be compared; it runs what the file holds.

    Raises:
        ArtifactError: PyTorch cannot load it.
    """
    with _told(str(path)):
        loaded: Program = (
            torch.export.load(path).module() if kind == "torch-export" else torch._inductor.aoti_load_package(str(path))
        )
        return loaded


def _of_any_size() -> dict[str, bool]:
    """What lets programs that check their inputs take 0 rows and 1, where this PyTorch has it."""
    known = hasattr(torch._inductor.config.aot_inductor, "check_lowerbound")
    return {"aot_inductor.check_lowerbound": False} if known else {}


@contextmanager
def _told(what: str) -> Iterator[None]:
    """PyTorch's failures in one line, and none of its warnings about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (RuntimeError, OSError, ValueError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ArtifactError(f"{what}: PyTorch says {lines[0]}; leave this format out, or mend that") from error
