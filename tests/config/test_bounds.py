"""Whatever a config's text is, it ends in one error that names the path, soon and in little memory."""

import json
import os
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import ROOT, TEXTS, WIDE, run_bounded
from tiny import tiny_config

from recsys.config import Config, ConfigError, load_checkpoint_config, load_config
from recsys.config.dialect import MAX_BYTES, MAX_CHARACTERS, MAX_DEPTH, MAX_INCLUDES, MAX_VALUES

MUTATIONS = 500
MEBIBYTES = 200


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny config, after `edit` changed its mapping."""

    def write(edit: Callable[[dict[str, Any]], object] = lambda raw: None, name: str = "tiny") -> Path:
        raw = tiny_config(tmp_path / "log", tmp_path / "out")
        edit(raw)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(raw, sort_keys=False))
        return path

    return write


READ_ALL = """
import sys
from pathlib import Path
from hostile import TEXTS, outcomes
from recsys.config import load_config
def read(name):
    path = Path("written.yaml")
    path.write_text(TEXTS[name][0])
    load_config(path)
outcomes(read, TEXTS)
"""


def test_hostile_texts_end_in_one_error_soon_and_in_little_memory(tmp_path: Path) -> None:
    done = run_bounded("-c", READ_ALL, memory=MEBIBYTES << 21, folder=tmp_path)
    assert done.code == 0, done.stderr
    ended = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in ended] == list(TEXTS)
    for name, error, seconds, mebibytes in ended:
        assert error is not None and TEXTS[name][1] in error, (name, error)
        assert len(error) < 20_000 and error.count("\n") <= 102, name
        assert "written.yaml" in error, name
        # Each takes a second or two at most; the rest is for machines that are slow, or busy.
        assert seconds < 15 and mebibytes < MEBIBYTES, (name, seconds, mebibytes)


@pytest.mark.parametrize("entry", ["recsys.plan", "recsys.train"])
def test_an_entry_ends_with_code_2_and_no_traceback(tmp_path: Path, entry: str) -> None:
    (tmp_path / "bomb.yaml").write_text(TEXTS["aliases that multiply"][0])
    done = run_bounded("-m", entry, "--config", str(tmp_path / "bomb.yaml"), memory=8 << 30)
    assert done.code == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"error: config {tmp_path}/bomb.yaml is not valid YAML: it holds too much")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_regular_files_are_read(tmp_path: Path, kind: str) -> None:
    path = {"pipe": tmp_path / "pipe", "device": Path("/dev/zero"), "folder": tmp_path}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    including = tmp_path / "including.yaml"
    including.write_text(f"include: {path}\n")
    code = "import sys; from recsys.config import load_config; load_config(sys.argv[1])"
    for config in (path, including):
        done = run_bounded("-c", code, str(config))
        told = done.stderr.splitlines()[-1]
        assert f"cannot read config {path}: it is no regular file; " in told


def test_a_path_that_is_none_is_refused(tmp_path: Path) -> None:
    for name in ("a\0b", "a\ud800b"):
        with pytest.raises(ConfigError, match="it holds a character that no path can; give one with --config"):
            load_config(tmp_path / name)


def test_files_that_include_each_other_twice_are_read_once(write: Callable[..., Path], tmp_path: Path) -> None:
    write(name="n0")
    for level in range(1, 25):
        text = f"include: [n{level - 1}.yaml, n{level - 1}.yaml]\nseed: {level}\n"
        (tmp_path / f"n{level}.yaml").write_text(text)
    assert load_config(tmp_path / "n24.yaml").seed == 24


def test_a_chain_of_includes_is_bounded(write: Callable[..., Path], tmp_path: Path) -> None:
    write(name="n0")
    for level in range(1, 2001):
        (tmp_path / f"n{level}.yaml").write_text(f"include: n{level - 1}.yaml\n")
    assert load_config(tmp_path / f"n{MAX_INCLUDES}.yaml").name == "tiny"
    for level in (MAX_INCLUDES + 1, 2000):
        with pytest.raises(ConfigError, match=f"the files of one config may include {MAX_INCLUDES} in all"):
            load_config(tmp_path / f"n{level}.yaml")


def test_the_bounds_hold_over_all_that_is_included(write: Callable[..., Path], tmp_path: Path) -> None:
    write(name="base")
    for part in ("one", "two"):
        (tmp_path / f"{part}.yaml").write_text(f"x_{part}: [{'1,' * (MAX_VALUES * 2 // 3)}]\n")
    (tmp_path / "run.yaml").write_text("include: [base.yaml, one.yaml, two.yaml]\n")
    with pytest.raises(ConfigError, match=r"two\.yaml is not valid YAML: it holds too much: with all that is included"):
        load_config(tmp_path / "run.yaml")
    for part in ("one", "two"):
        (tmp_path / f"{part}.yaml").write_text("#" * (MAX_BYTES * 2 // 3))
    (tmp_path / "run.yaml").write_text("include: [two.yaml]\n# " + "#" * (MAX_BYTES * 2 // 3))
    with pytest.raises(ConfigError, match=r"two\.yaml is too large"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("b" + ".b" * 2000 + "=1", "no section lies 50 deep; shorten the path"),
        ("seed=" + "[" * 100_000, "more than 50 lists and mappings within each other"),
        ("seed=2020-13-45", "'2020-13-45' is no timestamp"),
        ("seed=!!int foo", "'foo' is no int"),
        ("seed=" + "1" * 5000, "(5000 characters)' is no int"),
        ('name="\\ud800"', 'name: "\\ud800" holds half of a surrogate pair'),
        ("name=\udcff", "not valid YAML"),
        ("=" + "x" * 100_000, "is not of the form path.to.key=value"),
    ],
)
def test_hostile_overrides_end_in_one_error(write: Callable[..., Path], override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(), [override])
    assert message in str(error.value)
    assert len(str(error.value)) < 5000


@pytest.mark.parametrize("path", WIDE)
def test_what_counts_has_a_bound(write: Callable[..., Path], path: str) -> None:
    def value(number: int) -> str:
        return f"{path}=[{number}]" if path.endswith("hidden") else f"{path}={number}"

    beside = ["data.domain.names=null"] if path == "data.domain.num_domains" else []
    load_config(write(), [*beside, value(WIDE[path])])
    at = f"{path}.0" if path.endswith("hidden") else path
    for number in (WIDE[path] + 4, 2**63, 2**64 + 4, 10**300):
        if number > WIDE[path]:
            with pytest.raises(ConfigError, match=rf"\n  {at}: Input should be less than "):
                load_config(write(), [*beside, value(number)])


def test_layers_have_a_bound(write: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"model\.tower\.hidden: Tuple should have at most 256 items"):
        load_config(write(), [f"model.tower.hidden=[{'1,' * 257}]"])


def test_both_halves_of_a_pair_are_one_character(write: Callable[..., Path]) -> None:
    assert load_config(write(), ['name="\\ud83d\\ude00"']).name == "\N{GRINNING FACE}"


def test_a_config_that_could_not_be_read_back_is_refused(write: Callable[..., Path]) -> None:
    def widen(number: int) -> Callable[[dict[str, Any]], object]:
        def edit(raw: dict[str, Any]) -> None:
            raw["features"]["sparse"] |= {f"f{place}": {"table": "user"} for place in range(number)}

        return edit

    config = load_config(path := write(widen(1500)))
    path.write_text(config.to_yaml())
    assert load_config(path) == config
    with pytest.raises(ConfigError, match=r"and a checkpoint's config with more than 65536 of .* could not be read"):
        load_config(write(widen(4000)))


def test_an_override_changes_its_own_section_alone(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(lambda raw: raw.pop("stages"))
    stage = "{trains: all, epochs: 1, learning_rate: 0.1, sparse_learning_rate: 0.2}"
    path.write_text(f"{path.read_text()}\nstages:\n  one: &one {stage}\n  two: *one\n")
    stages = load_config(path, ["stages.two.learning_rate=0.3"]).stages
    assert (stages["one"].learning_rate, stages["two"].learning_rate) == (0.1, 0.3)


def test_the_bounds_are_in_the_docs() -> None:
    text = " ".join((ROOT / "docs" / "config.md").read_text().split())
    for bound in (
        f"{MAX_BYTES >> 20} MiB",
        f"{MAX_VALUES:,} values",
        f"{MAX_CHARACTERS:,} characters",
        f"{MAX_DEPTH} deep",
        f"{MAX_INCLUDES} entries",
    ):
        assert bound in text, bound


FUZZ = """
import sys
from pathlib import Path
from hostile import outcomes
from recsys.config import load_config
outcomes(lambda name: load_config(Path(name)), sorted(map(str, Path(".").glob("m*.yaml"))))
"""

_TOKENS = [
    *"[]{}&*!|>%@`'\"#,:?-\n\t\0",
    *(
        "&a ",
        "*a",
        "<<: ",
        "!!int ",
        "!!binary ",
        "!!set ",
        "---\n",
        "...\n",
        "${here}",
        "~",
        "null",
        ".nan",
        ".inf",
        "-.inf",
    ),
    *(
        "2020-13-45",
        "0x",
        "0o7",
        "1e400",
        "1_000",
        "1:60",
        str(2**63),
        str(2**64),
        "9" * 5000,
        "-0",
        "include: ",
        "\\ud800",
    ),
    *("\ufeff", "\u2028", "\x85", "\U0001f600", "[" * 100, "- " * 100, "a: {" * 60),
]


def _mutated(text: str, random: random.Random) -> bytes:
    for _ in range(random.randint(1, 4)):
        start = random.randrange(len(text) + 1)
        stop = min(len(text), start + random.randint(0, 12))
        match random.randrange(6):
            case 0:
                text = text[:start] + text[stop:]
            case 1:
                text = text[:start] + random.choice(_TOKENS) + text[stop:]
            case 2:
                text = text[:start] + random.choice(_TOKENS) + text[start:]
            case 3:
                lines = text.splitlines(keepends=True)
                random.shuffle(lines)
                text = "".join(lines)
            case 4:
                lines = text.splitlines(keepends=True) or [""]
                place = random.randrange(len(lines))
                key, colon, _ = lines[place].partition(": ")
                lines[place] = f"{key}{colon}{random.choice(_TOKENS)}\n"
                text = "".join(lines)
            case 5:
                text = text[:start] + random.choice(string.printable) * random.choice((1, 3, 300)) + text[start:]
    return text.encode("utf-8", "surrogatepass")


def test_mutated_configs_end_as_a_config_or_in_one_error(write: Callable[..., Path], tmp_path: Path) -> None:
    seeded, text = random.Random(17), write().read_text()
    for number in range(MUTATIONS):
        (tmp_path / f"m{number:03}.yaml").write_bytes(_mutated(text, seeded))
    done = run_bounded("-c", FUZZ, folder=tmp_path, seconds=300)
    assert done.code == 0, done.stderr
    ended = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(ended) == MUTATIONS
    refused = [name for name, error, _, _ in ended if error is not None]
    assert MUTATIONS // 2 < len(refused) < MUTATIONS  # some mutations do no harm
    assert max(seconds for _, _, seconds, _ in ended) < 15
    for name in {name for name, *_ in ended} - set(refused):
        assert isinstance(load_config(tmp_path / name), Config)


def test_a_checkpoints_config_is_one_file_and_no_link(write: Callable[..., Path], tmp_path: Path) -> None:
    written = write(name="config")
    assert load_checkpoint_config(tmp_path, ["seed=7"]) == load_config(written, ["seed=7"])
    written.write_text("include: other.yaml\n" + (text := written.read_text()))
    (tmp_path / "other.yaml").write_text("seed: 5\n")
    assert load_config(written).seed == 5
    with pytest.raises(ConfigError, match=r"config\.yaml: a checkpoint's config includes nothing"):
        load_checkpoint_config(tmp_path)
    (tmp_path / "other.yaml").write_text(text)
    written.unlink()
    written.symlink_to("other.yaml")
    assert load_config(written).name == "tiny"
    with pytest.raises(ConfigError, match=rf"cannot read config {written}: it is a link; restore the checkpoint"):
        load_checkpoint_config(tmp_path)
