"""Towers: from feature embeddings to the representation that the head turns into a logit.

Each family is a file here, which registers what builds it, and a settings class in `recsys.config.towers`. Towers are
built dense; `recsys.model.experts.attach_experts` puts experts on the linears that one names.

Shapes: B rows, F tokens (one of each sparse feature, one more for the dense features), W the sum of the tokens' widths.
"""

import importlib
import pkgutil

from recsys.model.towers.registry import Tokens, Tower, build_tower

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = ["Tokens", "Tower", "build_tower"]
