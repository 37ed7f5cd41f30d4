"""When a checkpoint is whole, and which are kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recsys.checkpoint import layout
from recsys.checkpoint.layout import CheckpointError, CheckpointMeta, Digest
from recsys.config import CheckpointsConfig


def meta(step: int, **told: Any) -> CheckpointMeta:
    return CheckpointMeta("joint", step, step, 1, **told)


def valid(log_loss: float | None, auc: float | None = None) -> dict[str, float | None]:
    return {"log_loss": log_loss, "auc": auc}


def write(directory: Path, told: CheckpointMeta | None = None, content: str = "one") -> None:
    """A checkpoint of one file, whole."""
    written = layout.partial(directory)
    (written / "deeper").mkdir(parents=True)
    (written / "deeper" / "data").write_text(content)
    files = {"deeper/data": layout.digest_of(written / "deeper" / "data")}
    told = told or meta(int(directory.name.removeprefix("step-")))
    layout.commit(directory, [], CheckpointMeta(**{**vars(told), "files": files}))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_that_is_committed_is_whole_and_takes_the_place_of_another(tmp_path: Path) -> None:
    directory = tmp_path / "step-5"
    for content in ("one", "two"):
        write(directory, content=content)
        assert names(tmp_path) == ["step-5"]
        assert layout.verify(directory, layout.read_meta(directory).files) is None
        assert (directory / "deeper" / "data").read_text() == content


class Crash(Exception):
    pass


def crashes(monkeypatch: pytest.MonkeyPatch, at: int, change: Callable[[], object]) -> bool:
    """Carry out a change; every change of the disk is a moment at which the process may end, and it does at one."""
    left = at

    def counting(one: Any) -> Any:
        def counted(*args: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                raise Crash
            left -= 1
            return one(*args, **options)

        return counted

    with monkeypatch.context() as patched:
        for owner, name in ((Path, "rename"), (Path, "unlink"), (layout, "flush"), (layout.shutil, "rmtree")):
            patched.setattr(owner, name, counting(getattr(owner, name)))
        try:
            change()
        except Crash:
            return True
    return False


@pytest.mark.parametrize("at", range(8))
def test_a_crash_at_any_moment_of_a_replacement_leaves_one_that_is_whole(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "step-5"
    write(directory, content="old")
    assert crashes(monkeypatch, at, lambda: write(directory, content="new")) or at > 6
    layout.tidy(tmp_path)
    assert names(tmp_path) == ["step-5"]
    assert layout.verify(directory, layout.read_meta(directory).files) is None
    assert (directory / "deeper" / "data").read_text() in ("old", "new")


@pytest.mark.parametrize("at", range(4))
def test_a_crash_at_any_moment_of_a_deletion_leaves_all_of_it_or_nothing(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "step-5"
    write(directory)
    crashed = crashes(monkeypatch, at, lambda: layout.delete(directory))
    assert crashed == (at < 3)
    layout.tidy(tmp_path)
    if directory.exists():
        assert layout.verify(directory, layout.read_meta(directory).files) is None
    assert names(tmp_path) == (["step-5"] if at < 2 else [])


def test_what_a_crash_left_is_taken_away_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "step-5")
    layout.partial(tmp_path / "step-9").mkdir()
    (tmp_path / "notes.partial").mkdir()
    layout.tidy(tmp_path)
    assert names(tmp_path) == ["notes.partial", "step-5"]


def test_those_that_were_passed_over_do_not_push_out_what_is_written_after_them(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path / f"step-{step}")
    layout.set_aside_after(tmp_path / "step-2")
    assert names(tmp_path) == ["step-1", "step-2", "step-3.aside", "step-4.aside"]
    write(tmp_path / "step-3")
    layout.prune(tmp_path, CheckpointsConfig(keep_last=2))
    assert names(tmp_path) == ["step-2", "step-3", "step-3.aside", "step-4.aside"]


def test_only_names_of_checkpoints_are_checkpoints_the_newest_first(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        write(tmp_path / f"step-{step}")
    for name in ("step-7.partial", "step-8.replaced", "step-x", "best", "step-"):
        (tmp_path / name).mkdir()
    assert [path.name for path in layout.checkpoints(tmp_path)] == ["step-100", "step-20", "step-9"]


@pytest.mark.parametrize(
    ("config", "metas", "kept"),
    [
        ({}, [meta(1), meta(2), meta(3)], {2, 3}),
        ({"keep_last": 1}, [meta(1), meta(2), meta(3)], {3}),
        ({"keep_last": 1}, [meta(1, kept="stage"), meta(2), meta(3)], {1, 3}),
        ({"keep_last": 1, "keep_every_steps": 2}, [meta(step) for step in range(1, 6)], {2, 4, 5}),
        ({"keep_last": 1}, [meta(1), meta(2), meta(3, best_step=1)], {1, 3}),
        (
            {"keep_last": 1, "keep_best": 2},
            [meta(1, valid=valid(0.5)), meta(2, valid=valid(0.3)), meta(3, valid=valid(0.4)), meta(4)],
            {2, 3, 4},
        ),
        (
            {"keep_last": 1, "keep_best": 1, "keep_best_by": "auc"},
            [meta(1, valid=valid(0.5, 0.7)), meta(2, valid=valid(0.3, 0.6)), meta(3, valid=valid(0.3)), meta(4)],
            {1, 4},
        ),
    ],
)
def test_what_is_kept(config: dict[str, Any], metas: list[CheckpointMeta], kept: set[int]) -> None:
    assert set(layout.retained(metas, CheckpointsConfig(**config))) == kept


def test_when_the_run_is_over_what_was_kept_to_go_on_from_goes(tmp_path: Path) -> None:
    metas = [meta(1, kept="stage"), meta(2, valid=valid(0.3)), meta(3, best_step=2), meta(4)]
    for told in metas:
        write(tmp_path / f"step-{told.step}", told)
    layout.prune(tmp_path, CheckpointsConfig(), is_over=True)
    assert names(tmp_path) == ["step-1"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"step": -1}, "step is -1"),
        ({"step": True}, "step is True"),
        ({"step": "1"}, "step is '1'"),
        ({"stage": None}, "stage is None"),
        ({"world_size": 1.0}, "world_size is 1.0"),
        ({"best_step": "x"}, "best_step is 'x'"),
        ({"valid": []}, r"valid is \[\]"),
        ({"valid": {"auc": "high"}}, "valid is {'auc': 'high'}"),
        ({"files": {}}, "it lists no files"),
        ({"files": {"a": 1}}, "'a' has no size and digest"),
        ({"files": {"../a": {"bytes": 1, "sha256": ""}}}, "no path within the directory"),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}, "no path within the directory"),
        ({"files": {"a": {"bytes": "1", "sha256": ""}}}, "'a' has no size and digest"),
    ],
)
def test_a_meta_of_another_shape_is_refused_by_name(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    write(tmp_path / "step-5")
    path = tmp_path / "step-5" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=told) as caught:
        layout.read_meta(tmp_path / "step-5")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_keys_of_later_versions_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "step-5")
    path = tmp_path / "step-5" / "meta.json"
    before = layout.read_meta(tmp_path / "step-5")
    path.write_text(json.dumps({**json.loads(path.read_text()), "since": "later"}))
    assert layout.read_meta(tmp_path / "step-5") == before


def test_shares_of_all_ranks_are_all_files(tmp_path: Path) -> None:
    write(tmp_path / "step-5")
    told = layout.read_meta(tmp_path / "step-5")
    (tmp_path / "step-5" / "deeper" / "data").write_text("two")
    found = [layout.verify(tmp_path / "step-5", told.files, share=(rank, 3)) for rank in range(3)]
    assert sum(wrong is not None for wrong in found) == 1
    files = {**told.files, "absent": Digest(1, "")}
    wrong = layout.verify(tmp_path / "step-5", files)
    assert wrong is not None and "absent" in wrong
