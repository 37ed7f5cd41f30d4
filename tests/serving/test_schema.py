"""What the schemas accept is scored, and what is refused they refuse; any reader of Arrow reads them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from every_kind import table
from generated import ANY_JSON, NUMBERS, TIMES, Json, rows, schema_of
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from recsys.config import DenseFeatureConfig
from recsys.errors import UserError
from recsys.serving import ArtifactError, Scorer
from recsys.serving.schema import accepted_numbers, integer_texts
from recsys.serving.scorer import RequestError

WEIGHTS = {"bag_weights": "bag"}


@pytest.fixture(scope="module", params=["every_kind", "converted"])
def artifact(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def scorer(artifact: Path) -> Scorer:
    return Scorer(artifact)


@pytest.fixture(scope="module")
def validator(artifact: Path) -> Draft202012Validator:
    return Draft202012Validator(schema_of(artifact))


def assert_scored(scorer: Scorer, row: Json) -> None:
    (found,) = scorer.score([json.loads(json.dumps(row))])
    assert 0 <= found <= 1


@settings(max_examples=60, phases=(Phase.explicit, Phase.generate))  # shrinking such rows takes minutes
@given(data=st.data())
def test_what_the_schema_accepts_is_scored(
    scorer: Scorer, validator: Draft202012Validator, data: st.DataObject
) -> None:
    """Also where one value is any that JSON has: it is refused by the schema, or scored."""
    row = data.draw(rows(validator.schema, WEIGHTS))
    assert validator.is_valid(row)
    assert_scored(scorer, row)
    name = data.draw(st.sampled_from(sorted(set(row) - {"bag", "bag_weights"})))
    row[name] = data.draw(ANY_JSON | NUMBERS | TIMES)
    if validator.is_valid(row):
        assert_scored(scorer, row)


def test_rows_of_the_log_are_accepted(every_kind: Path) -> None:
    validator, scorer = Draft202012Validator(schema_of(every_kind)), Scorer(every_kind)
    told = table(90, 2).drop(["label", "place"]).to_pylist()
    texts = [json.loads(json.dumps(row, default=lambda of: of.isoformat())) for row in told]
    short = [place for place, row in enumerate(texts) if len(row["bag"]) <= 3]
    assert len(short) > 40 and all(validator.is_valid(texts[place]) for place in short)
    np.testing.assert_array_equal(scorer.score(texts), scorer.score(table(90, 2)))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("user", 20),
        ("user", -1),
        ("user", 3.5),
        ("user", "3"),
        ("page", 2**64),
        ("site", 7),
        ("shop", "5"),
        ("at", "2024-02-30T00:00:00Z"),
        ("at", "2024-02-29T24:00:00Z"),
        ("at", "2024-02-29T00:00:00"),
        ("at", "2024-02-29T00:00:00Z\n"),
        ("at", 1_711_846_799),
        ("born", "1900-02-29"),
        ("second", 2**36),
        ("codes", "3|40"),
        ("codes", "3||4"),
        ("codes", "3|4\n"),
        ("bag", [None]),
        ("bag", [9]),
        ("bag_weights", ["a"]),
        ("likes", [1]),
        ("mobile", "yes"),
        ("price", None),
        ("price", "3"),
        ("x", [1.0]),
    ],
)
def test_what_is_refused_the_schema_refuses(every_kind: Path, column: str, value: Any) -> None:
    scorer, validator = Scorer(every_kind), Draft202012Validator(schema_of(every_kind))
    row = json.loads((every_kind / "vectors.json").read_text())["rows"][0]["row"]
    row |= {"bag": [1], "bag_weights": [0.5]}
    assert_scored(scorer, row)
    assert validator.is_valid(row)
    row[column] = value
    with pytest.raises(UserError):
        scorer.score([row])
    assert not validator.is_valid(row)
    for changed in ({**row, "colour": 1}, {name: of for name, of in row.items() if name != column}):
        assert not validator.is_valid(changed)


@pytest.mark.parametrize(
    ("column", "value"), [("user", True), ("user", [3]), ("likes", "cats"), ("x", 1e30), ("bag", [1, 2, 3, 4])]
)
def test_what_is_taken_beyond_the_schema_is_scored(every_kind: Path, column: str, value: Any) -> None:
    """As docs/serving.md says: the schema is the narrower of the two."""
    scorer, validator = Scorer(every_kind), Draft202012Validator(schema_of(every_kind))
    row = json.loads((every_kind / "vectors.json").read_text())["rows"][0]["row"]
    row |= {"bag": [1, 2, 3, 4], "bag_weights": [0.5] * 4, column: value}
    assert_scored(scorer, row)
    assert not validator.is_valid(row)


def test_times_are_read_in_their_zone(every_kind: Path) -> None:
    scorer = Scorer(every_kind)
    row = json.loads((every_kind / "vectors.json").read_text())["rows"][0]["row"]
    moments = ("2024-07-01T23:30:00Z", "2024-07-02T01:30:00+02:00", "2024-07-01T19:30:00.5-04:00")
    found = scorer.score([{**row, "at": moment} for moment in (*moments, "2024-07-01T22:30:00Z")])
    assert len(set(found[:3].tolist())) == 1 and found[3] != found[0]
    with pytest.raises(RequestError, match=r"column 'at': row 1 is '2024-07-01T23:30:00'; times with their zone"):
        scorer.score([row, {**row, "at": "2024-07-01T23:30:00"}])


def test_whole_numbers_are_integers_however_they_are_written(every_kind: Path) -> None:
    scorer = Scorer(every_kind)
    row = json.loads((every_kind / "vectors.json").read_text())["rows"][0]["row"]
    same = [{**row, "device": 7, "user": 3, "bag": [1, 2], "bag_weights": [1, 2]}]
    np.testing.assert_array_equal(
        scorer.score(same), scorer.score([{**same[0], "device": 7.0, "user": 3.0, "bag": [1.0, 2.0]}])
    )
    with pytest.raises(RequestError, match=r"column 'device': row 0 is 9.*; integers .below"):  # it may be another
        scorer.score([{**row, "device": 2.0**53}])
    for value in (3.5, float("nan"), float("inf")):
        with pytest.raises(RequestError, match=f"column 'user': row 1 is {value}; integers"):
            scorer.score([{**row, "user": 3.0}, {**row, "user": value}])


def test_arrow_rows_of_the_schema_are_scored(artifact: Path, scorer: Scorer) -> None:
    with pa.ipc.open_stream(artifact / "schema.arrows") as stream:
        assert stream.schema == scorer.schema and stream.read_all().num_rows == 0
    vectors = json.loads((artifact / "vectors.json").read_text())
    assert tuple(scorer.schema.names) == scorer.columns
    assert {field.name for field in scorer.schema if not field.nullable} == {
        "price",
        *([domain.column] if (domain := scorer.raw_columns.domain) else []),
    }
    assert scorer.score(scorer.schema.empty_table()).shape == (0,)
    rows = [row["row"] for row in vectors["rows"]]
    columns = []
    for field in scorer.schema:
        is_time = pa.types.is_temporal(field.type)
        values = pa.array([row[field.name] for row in rows], pa.string() if is_time else field.type)
        columns.append(values.cast(field.type))
    found = scorer.score(pa.table(columns, schema=scorer.schema))
    np.testing.assert_array_equal(found, [np.float32(row["probability"]) for row in vectors["rows"]])


def test_an_artefact_without_a_schema_scores_and_says_so(every_kind: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(every_kind, tmp_path / "copy")
    told = json.loads((copy / "manifest.json").read_text())
    del told["files"]["schema.arrows"]
    (copy / "manifest.json").write_text(json.dumps(told))
    scorer = Scorer(copy)
    with pytest.raises(ArtifactError, match=r"schema\.arrows tells no schema .*; export the checkpoint again"):
        _ = scorer.schema


@pytest.mark.parametrize("most", [0, 1, 9, 10, 19, 39, 100, 255, 999, 1000, 1205])
def test_integers_up_to_a_bound_are_a_pattern(most: int) -> None:
    validator = Draft202012Validator({"type": "string", "pattern": f"^{integer_texts(most)}$"})
    assert [number for number in range(2000) if validator.is_valid(str(number))] == list(range(most + 1))
    assert not any(map(validator.is_valid, ("", "01", "-1", "a", "1 ")))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, (-(2**63), 2**64 - 1, False)),
        ({"fill": 3.0}, (-(2**63), 2**64 - 1, True)),
        ({"log1p": True}, (np.nextafter(-1, 0), 2**64 - 1, False)),
        ({"log1p": True, "fill": -1.0}, (np.nextafter(-1, 0), 2**64 - 1, False)),
        ({"log1p": True, "clip": (0, 5)}, (-(2**63), 2**64 - 1, False)),
        ({"log1p": True, "minimum": 0, "fill": -2.0}, (-(2**63), 2**64 - 1, False)),
    ],
)
def test_numbers_that_the_transforms_take(settings: Json, told: tuple[float, float, bool]) -> None:
    assert accepted_numbers(DenseFeatureConfig(**settings)) == told


def test_numbers_that_would_be_too_large_for_a_float_are_not_accepted() -> None:
    low, high, _ = accepted_numbers(DenseFeatureConfig(standardize={"mean": 10.0, "std": 1e-36}))  # type: ignore[arg-type]
    assert -400 < low < -300 and 300 < high < 400
