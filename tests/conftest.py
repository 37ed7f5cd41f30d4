"""Fixtures shared by all tests; being here also puts this folder on sys.path for its helper modules."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from hypothesis import settings

# A deadline would be a timed test: on a busy machine it fails whatever the code does.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture
def process_group() -> Iterator[None]:
    """A gloo process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
