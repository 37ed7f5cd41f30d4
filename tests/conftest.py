"""Fixtures shared by all tests; being here also puts this folder on sys.path for its helper modules."""

import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from hypothesis import settings

# A deadline would be a timed test: on a busy machine it fails whatever the code does.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all tests but those of `-m gpu`, as processes that are forked can use none."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def process_group() -> Iterator[None]:
    """A gloo process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
