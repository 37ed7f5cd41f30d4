"""Taobao's theme clicks: what plain Python makes of a sample of the files is what the converter writes."""

import csv
import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ranks import run_module

from recsys.config import load_config
from recsys.data.storage import DataError
from recsys.prepare import writing
from recsys.prepare.__main__ import main
from recsys.prepare.taobao import convert_taobao_themes

ROOT = Path(__file__).parents[2]
THEMES = (900, 12, 77, 31)
"""In the order of the log; nobody who clicked in the first one has a vector."""
KEPT = THEMES[1:]
UNKNOWN_USER, UNKNOWN_ITEM = 5_000_000_000, 3
Row = tuple[int, int, int, int]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the published form, of which the click log ends its lines in CR LF."""
    rng = random.Random(1)
    clicks: list[tuple[int, int, int]] = []
    for number, theme in enumerate(KEPT):
        pool = range(100 * number, 100 * number + 140)  # which themes share in part
        clicks += [(user, theme, item) for user in range(1, 120) for item in rng.sample(pool, rng.randint(1, 12))]
        clicks += [(500, theme, item) for item in pool[:-2]]  # two items are left for the many negatives due
        clicks += [(501, theme, item) for item in pool]
        clicks += [(UNKNOWN_USER, theme, pool[5])]
    clicks += rng.sample(clicks, 90)  # clicked again
    rng.shuffle(clicks)
    clicks.sort(key=lambda click: click[1] == THEMES[3])  # the last to appear
    clicks = [(UNKNOWN_USER, THEMES[0], 100), (1, THEMES[1], 7), *clicks]
    folder = tmp_path_factory.mktemp("raw_data")
    lines = ["user_id,theme_id,item_id,leaf_cate_id,cate_level1_id,clk_cnt,reach_time"]
    lines += [f"{user},{theme},{item},{item % 9},{item % 3},1,20181207000000" for user, theme, item in clicks]
    (folder / "theme_click_log.csv").write_bytes(("\r\n".join(lines) + "\r\n").encode())
    vector = " ".join(["0.25"] * 128)
    for name, ids in (("user", [9999, 501, 500, *range(1, 120)]), ("item", sorted({*range(500)} - {UNKNOWN_ITEM}))):
        text = f"{name}_id,emb\n" + "".join(f"{one},{vector}\n" for one in ids)
        (folder / f"{name}_embedding.csv").write_text(text)
    return folder


def positives(source: Path) -> dict[int, set[tuple[int, int]]]:
    """Users and items of each theme's clicks that count, by plain Python."""

    def rows(name: str) -> list[dict[str, str]]:
        with (source / name).open(newline="") as file:
            return list(csv.DictReader(file))

    users = {row["user_id"] for row in rows("user_embedding.csv")}
    items = {row["item_id"] for row in rows("item_embedding.csv")}
    found: dict[int, set[tuple[int, int]]] = {}
    for row in rows("theme_click_log.csv"):
        if row["user_id"] in users and row["item_id"] in items:
            found.setdefault(int(row["theme_id"]), set()).add((int(row["user_id"]), int(row["item_id"])))
    return found


def read(output: Path) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """Raw user, raw item, theme and label of each split's rows, and `dataset.json`."""
    summary = writing.read_summary(output)
    assert summary is not None and writing.is_complete(output, summary)
    values = {
        name: pq.read_table(output / f"vocabularies/{name}.parquet")["value"].to_pylist() for name in ("user", "item")
    }
    return {
        split: [
            (values["user"][row["user"]], values["item"][row["item"]], row["theme"], row["label"])
            for row in pq.read_table(output / split).to_pylist()
        ]
        for split in ("train", "valid", "test")
    }, summary


def sizes(rows: int) -> list[int]:
    train = rows * 6 // 10
    valid = (rows - train) // 2
    return [train, valid, rows - train - valid]


def test_rows_are_those_of_plain_python(source: Path, tmp_path: Path) -> None:
    convert_taobao_themes(source, tmp_path / "out", themes=3)
    splits, summary = read(tmp_path / "out")
    clicked = positives(source)
    assert [told["theme"] for told in summary["themes"]] == list(KEPT)
    rows = [(split, row) for split in splits for row in splits[split]]
    assert len({row[:3] for _, row in rows}) == len(rows)  # nothing is there twice, with either label
    full = 0
    for number, theme in enumerate(KEPT):
        ratio, pool = summary["themes"][number]["click_ratio"], {item for _, item in clicked[theme]}
        assert 0.2 <= ratio <= 0.5 and ratio == round(ratio, 2)
        of_theme = [(split, user, item, label) for split, (user, item, place, label) in rows if place == number]
        assert {(user, item) for _, user, item, label in of_theme if label} == clicked[theme]
        assert all(
            item in pool and (user, item) not in clicked[theme] for _, user, item, label in of_theme if not label
        )
        shares = Counter(split for split, *_, label in of_theme if label)
        assert [shares[split] for split in splits] == sizes(len(clicked[theme]))
        middle = sorted(pool)[len(pool) // 2]
        for split in splits:  # not in any order of the ids
            drawn_there = [item < middle for of, _, item, label in of_theme if of == split and not label]
            assert 0.4 < sum(drawn_there) / len(drawn_there) < 0.6
            assert {user for of, user, _, label in of_theme if of == split and label} & set(range(1, 9))
        for user, count in Counter(user for user, _ in clicked[theme]).items():
            shares = Counter(split for split, of, _, label in of_theme if of == user and not label)
            due, left = int(count / ratio), len(pool) - count
            full += due > left
            assert [shares[split] for split in splits] == sizes(min(due, left))
    assert full >= 6  # users 500 and 501 in each theme
    assert len({told["click_ratio"] for told in summary["themes"]}) > 1
    lines = (source / "theme_click_log.csv").read_bytes().count(b"\r\n") - 1
    assert sum(summary["left_out"].values()) == lines - sum(len(clicked[theme]) for theme in KEPT)
    assert set(summary["left_out"]) == {"user or item without a vector", "clicked before"}


def test_rows_follow_the_seed_alone(source: Path, tmp_path: Path) -> None:
    def shards(name: str, themes: int = 3, seed: int = 123) -> dict[str, bytes]:
        convert_taobao_themes(source, tmp_path / name, themes=themes, seed=seed)
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}

    first = shards("first")
    assert shards("again") == first
    assert shards("other", seed=7) != first
    # Two themes are the first two of three, row for row.
    shards("two", themes=2)
    three, two = read(tmp_path / "first")[0], read(tmp_path / "two")[0]
    assert {split: sorted(row for row in three[split] if row[2] < 2) for split in three} == {
        split: sorted(rows) for split, rows in two.items()
    }
    assert sorted(read(tmp_path / "other")[0]["train"]) != sorted(three["train"])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "theme_click_log",
            ("\n1,", "\nx,"),
            "line 3: column 'user_id': invalid value 'x' for int64; mend it, or leave",
        ),
        ("theme_click_log", ("\n1,12,7", "\n1,12,"), "line 3: column 'item_id': no value; mend it, or leave"),
        ("theme_click_log", ("theme_id", "topic"), "line 1: no column named 'theme_id'; the file has user_id"),
        ("item_embedding", ("\n7,", "\n7.5,"), "line 8: column 'item_id': invalid value '7.5' for int64; mend it"),
    ],
)
def test_lines_that_are_wrong(source: Path, tmp_path: Path, name: str, change: tuple[str, str], message: str) -> None:
    shutil.copytree(source, tmp_path / "in")
    path = tmp_path / f"in/{name}.csv"
    text = path.read_bytes().decode()
    assert change[0] in text
    path.write_bytes(text.replace(*change, 1).encode())
    with pytest.raises(DataError) as refused:
        convert_taobao_themes(tmp_path / "in", tmp_path / "out", themes=3)
    assert str(refused.value).startswith(f"{path}, {message}") and not (tmp_path / "out").exists()
    if "leave" in message:
        convert_taobao_themes(tmp_path / "in", tmp_path / "out", themes=3, skip_malformed=True)
        assert read(tmp_path / "out")[1]["skipped"] == {str(path): 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--themes", "4"), "{}/theme_click_log.csv has 3 themes with clicks whose user and item are in"),
        (("--themes", "0"), "themes must be at least 1, not 0"),
        (("--themes", "3", "--seed", "-1"), "seed must be at least 0, not -1"),
        (("--themes", "3", "--source", "none"), "none/user_embedding.csv does not exist; take it from https://tianchi"),
    ],
)
def test_errors_are_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["taobao-themes", "--source", str(source), "--output", str(tmp_path / "out"), *options])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("error: " + message.format(source)) and told.count("\n") == 1


def test_the_config_trains_on_what_is_converted(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["taobao-themes", "--source", str(source), "--output", "data/taobao", "--themes", "3"])
    told = capsys.readouterr().out
    assert not ended.value.code and "taobao-themes written to data/taobao" in told
    assert "drawing: 100 %" in told and "clicked before: " in told
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs/taobao_domains.yaml", tmp_path / "configs")
    domain = load_config(Path("configs/taobao_domains.yaml")).data.domain
    assert domain is not None and (domain.column, domain.labels) == ("theme", tuple(map(str, KEPT)))
    overrides = [f"stages.{stage}.epochs=1" for stage in ("backbone", "experts", "gate")]
    (done,) = run_module(1, "recsys.train", "--config", "configs/taobao_domains.yaml", *overrides)
    assert done.code == 0, done
    summary = json.loads(Path("outputs/taobao_domains/summary.json").read_text())
    assert list(summary["stages"]) == ["backbone", "experts", "gate"]
    assert list(summary["domains"]) == list(map(str, KEPT))
