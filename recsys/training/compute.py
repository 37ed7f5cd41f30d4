"""How a run computes its dense arch where the config asks for other than plain float32: compiled, in fewer bits."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recsys.config import ComputeConfig, ConfigError
from recsys.model.dense_arch import DenseArch, DenseOutput
from recsys.runtime import set_precision


def begin_computing(settings: ComputeConfig, device: torch.device) -> None:
    """Have this process compute as the config says, once it knows its device.

    Raises:
        ConfigError: what the device, or this machine, lacks for it.
    """
    if settings.tf32 and device.type != "cuda":
        raise ConfigError("compute.tf32: TF32 is a format of GPUs, and this run is on a CPU; set it to false")
    if settings.autocast and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"compute.autocast: {torch.cuda.get_device_name(device)} does not compute in bfloat16; set it to null"
        )
    set_precision(tf32=settings.tf32)
    if settings.compile:
        _check_compiler(device)


def _check_compiler(device: torch.device) -> None:
    """See whether anything can be compiled: by compiling something.

    Raises:
        ConfigError: nothing can.
    """
    torch._dynamo.reset()
    try:
        torch.compile(_doubled, fullgraph=True)(torch.ones(2, device=device))
    except Exception as error:  # whatever Inductor, the compiler or Triton raise
        needed = "a C++ compiler (apt install g++)" if device.type == "cpu" else "Triton and a C compiler (gcc)"
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"compute.compile: torch.compile needs {needed} and the headers of Python, and fails here: {why}; install "
            "them, or set it to false"
        ) from error


def _doubled(x: Tensor) -> Tensor:
    return x + x


class CompiledDenseArch(nn.Module):
    """A dense arch whose training steps run as the one graph that `torch.compile` makes of it.

    Parameters stay those of the dense arch, which optimizers, evaluation and checkpoints know by their names. A graph
    goes by what requires a gradient and which experts are active, so one is for one phase; and by the number of rows,
    as Inductor chooses kernels by it. So the last batch of an epoch, if it has fewer, is computed as it would be
    without; and so is evaluation, whose figures are to be those of the model as it is served.

    Args:
        dense_arch: on its device.
        rows: of the batches that are compiled.
        backend: of `torch.compile`.
    """

    def __init__(self, dense_arch: nn.Module, rows: int, backend: str = "inductor") -> None:
        super().__init__()
        torch._dynamo.reset()  # what was compiled for another phase would count against the limit of recompilations
        # Else dynamo would cut the graph where DDP's buckets end, to send each as soon as it is full. They are sent
        # while the tables' backward goes on, which comes after that of the graph either way.
        torch._dynamo.config.optimize_ddp = False
        self.dense_arch, self._rows = dense_arch, rows
        self._compiled = torch.compile(dense_arch.forward, backend=backend, fullgraph=True, dynamic=False)

    def forward(
        self, pooled: Tensor, dense_features: Tensor, domain: Tensor, loss_weights: Mapping[str, float]
    ) -> DenseOutput:
        """As `DenseArch.forward`."""
        call = self._compiled if self.training and len(pooled) == self._rows else self.dense_arch
        output: DenseOutput = call(pooled, dense_features, domain, loss_weights)
        return output


def as_computed(dense_arch: nn.Module, settings: ComputeConfig, rows: int) -> nn.Module:
    """What training steps call in the place of a dense arch, by batches of so many rows: itself, unless compiled."""
    assert isinstance(dense_arch, DenseArch)
    dense_arch.autocast = torch.bfloat16 if settings.autocast else None
    return CompiledDenseArch(dense_arch, rows) if settings.compile else dense_arch
