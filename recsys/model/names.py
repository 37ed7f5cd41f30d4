"""What tables are called: by the config, and by collections, plans and checkpoints. Needs no TorchRec."""

from functools import cache

from torch import nn

POOLED = "embedding_bag_collection"
"""The collection of tables that are pooled; its name begins those of its tables in a checkpoint."""

_RESERVED_PREFIX = "table-"
"""Holds a character that no name of a config's has, so that no other table can be called so."""


@cache
def table_key(name: str) -> str:
    """What a table is called in its collection, in plans and in checkpoints: its name, unless torch reserves that.

    A module of torch's takes no child of the name of one of its own attributes, such as `items` or `type`.
    """
    try:
        nn.ModuleDict().add_module(name, nn.Module())
    except KeyError:
        return f"{_RESERVED_PREFIX}{name}"
    return name


def table_name(key: str) -> str:
    """The config's name of a table that its collection calls `key`."""
    return key.removeprefix(_RESERVED_PREFIX)


def weight_name(table: str) -> str:
    """What the weight of a pooled table of the config is called in a checkpoint."""
    return f"model.{POOLED}.embedding_bags.{table_key(table)}.weight"
