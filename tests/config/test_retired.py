"""Keys that are retired: an old config that has them at their defaults opens, any other value is refused by name."""

from pathlib import Path

import pytest
import yaml
from tiny import tiny_config

from recsys.config import ConfigError, HiLoMoEConfig, load_config

OLD = {"query_projection": False, "learned_temperature": False, "detach_query": False, "expert_dropout": 0.0}
"""As checkpoints before they were retired have them."""


def write(folder: Path, **hilomoe: object) -> Path:
    raw = tiny_config(folder, folder / "out")
    raw["model"]["hilomoe"].update(hilomoe)
    path = folder / "old.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_retired_keys_at_their_defaults_say_nothing(tmp_path: Path) -> None:
    old, new = load_config(write(tmp_path, **OLD)), load_config(write(tmp_path))
    assert old == new
    assert not set(OLD) & set(yaml.safe_load(old.to_yaml())["model"]["hilomoe"])
    assert load_config(write(tmp_path, expert_dropout=0)) == new


@pytest.mark.parametrize(
    ("key", "value"), [("query_projection", True), ("expert_dropout", 0.1), ("detach_query", None)]
)
def test_any_other_value_is_refused_by_name_beside_other_faults(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(write(tmp_path, **{**OLD, key: value}), ["seed=-1", "model.hilomoe.top_q=2"])
    lines = str(refused.value).splitlines()
    assert len(lines) == 4
    assert lines[1].startswith(f"  model.hilomoe.{key}: is retired; only its old default, ")
    assert "use the version that trained with it" in lines[1]
    assert any("model.hilomoe.top_q: unknown key" in line for line in lines)
    assert any("seed" in line for line in lines)


def test_retired_keys_are_none_of_the_schemas() -> None:
    assert set(HiLoMoEConfig.retired) == set(OLD)
    assert not set(HiLoMoEConfig.model_fields) & set(OLD)
