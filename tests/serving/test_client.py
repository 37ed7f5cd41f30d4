"""A client in another language: plain Python by docs/serving.md alone gives what the artefact's test vectors say."""

import ast
import json
import math
import struct
from bisect import bisect_right
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow.parquet as pq
import pytest
import xxhash
import yaml

Json = dict[str, Any]


def safetensors(file: Path) -> dict[str, list[Any]]:
    """Tensors of at most two dimensions as lists; of uint8, the rows as bytes."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, told in header.items():
        start, end = told["data_offsets"]
        data = content[8 + length + start : 8 + length + end]
        shape = told["shape"]
        if told["dtype"] == "U8":
            flat: Any = data
        else:
            code = {"F32": "f", "F16": "e"}[told["dtype"]]
            flat = list(struct.unpack(f"<{math.prod(shape)}{code}", data))
        width = shape[-1]
        found[name] = [flat[place : place + width] for place in range(0, len(flat), width)] if len(shape) > 1 else flat
    return found


def float32(number: float) -> float:
    """Rounded to float32."""
    rounded: float = struct.unpack("<f", struct.pack("<f", number))[0]
    return rounded


class Client:
    """Scores rows of JSON by an artefact whose tower is an MLP without experts."""

    def __init__(self, directory: Path) -> None:
        self.config = yaml.safe_load((directory / "config.yaml").read_text())
        self.tables, self.dense_arch = (safetensors(directory / f"{name}.safetensors") for name in ("tables", "dense"))
        self.precision = json.loads((directory / "manifest.json").read_text())["tables"]
        path = directory / "calibration.json"
        self.calibration = json.loads(path.read_text()) if path.is_file() else None
        self.vocabularies = {
            name: pq.read_table(directory / "vocabularies" / f"{name}.parquet")["value"].to_pylist()
            for name, feature in self.config["features"]["sparse"].items()
            if (feature["ids"] or {}).get("type") == "vocabulary"
        }

    def ids(self, name: str, value: Any, weights: list[float] | None) -> tuple[list[int], list[float]]:
        """Rows of the table, and their weights."""
        feature = self.config["features"]["sparse"][name]
        text = feature["list_text"]
        if value is None or (text and value == ""):
            values = []
        elif text and isinstance(value, str):
            values = value.split(text["separator"])
            values = [int(item) for item in values] if text["items"] == "ints" else values
        else:
            values = value if isinstance(value, list) else [value]
        weights = list(weights) if weights else [1.0] * len(values)
        longest = feature["max_length"]
        if longest is not None and len(values) > longest:
            cut = slice(longest) if feature["keep"] == "first" else slice(len(values) - longest, None)
            values, weights = values[cut], weights[cut]
        if feature["minimum"] is not None:
            values = [max(item, feature["minimum"]) for item in values]
        rows = [self.row(name, feature, item) for item in values]
        kept = [(row, float32(weight)) for row, weight in zip(rows, weights, strict=True) if row is not None]
        return [row for row, _ in kept], [weight for _, weight in kept]

    def row(self, name: str, feature: Json, value: Any) -> int | None:
        """Row of one value."""
        ids, size = feature["ids"], self.config["tables"][feature["table"]]["num_embeddings"]
        if ids is None:
            value = int(value)
            if 0 <= value < size:
                return value
            assert feature["out_of_range"] != "error"
            return hashed(value, 0, size) if feature["out_of_range"] == "hash" else 0
        match ids["type"]:
            case "hash":
                return hashed(value, ids["salt"], ids["buckets"] or size)
            case "vocabulary":
                known = self.vocabularies[name]
                place = known.index(value) if value in known else None
                if ids["out_of_vocabulary"] == "empty":
                    return place
                return 0 if place is None else place + 1
            case "bucketize":
                return bisect_right(ids["boundaries"], value)
        if isinstance(value, str) and "T" not in value:
            local: Any = date.fromisoformat(value)
        else:
            moment = datetime.fromtimestamp(value, UTC) if isinstance(value, int) else datetime.fromisoformat(value)
            local = moment.astimezone(ZoneInfo(ids["timezone"]))
        part = ids["part"]
        if part == "hour":
            return int(local.hour)
        return int({"weekday": local.weekday(), "day": local.day - 1, "month": local.month - 1}[part])

    def number(self, name: str, value: Any) -> float:
        """A dense feature, transformed."""
        feature = self.config["features"]["dense"][name]
        if value is not None and feature["minimum"] is not None:
            value = max(value, feature["minimum"])
        value = feature["fill"] if value is None else float(value)
        if feature["clip"]:
            value = min(max(value, feature["clip"][0]), feature["clip"][1])
        if feature["log1p"]:
            value = math.log1p(value)
        if feature["standardize"]:
            value = (value - feature["standardize"]["mean"]) / feature["standardize"]["std"]
        return float32(value)

    def embedding(self, table: str, row: int) -> list[float]:
        kept = self.tables[table][row]
        if self.precision != "int8":
            return list(kept)
        scale, least = struct.unpack("<2f", kept[-8:])
        return [level * scale + least for level in kept[:-8]]

    def pooled(self, name: str, value: Any, weights: list[float] | None) -> list[float]:
        feature = self.config["features"]["sparse"][name]
        table = self.config["tables"][feature["table"]]
        rows, factors = self.ids(name, value, weights)
        sums = [0.0] * table["embedding_dim"]
        for row, factor in zip(rows, factors, strict=True):
            of_row = self.embedding(feature["table"], row)
            sums = [total + factor * number for total, number in zip(sums, of_row, strict=True)]
        return [total / max(1, len(rows)) for total in sums] if table["pooling"] == "mean" else sums

    def linear(self, name: str, inputs: list[float]) -> list[float]:
        weight, bias = self.dense_arch[f"{name}.weight"], self.dense_arch[f"{name}.bias"]
        return [sum(map(float.__mul__, row, inputs)) + of for row, of in zip(weight, bias, strict=True)]

    def logit(self, row: Json) -> float:
        features = self.config["features"]
        hidden: list[float] = []
        for name, feature in features["sparse"].items():
            weights = row[feature["weights"]] if feature["weights"] else None
            hidden += self.pooled(name, row[feature["column"] or name], weights)
        if features["dense"]:
            dense = [self.number(name, row[feature["column"] or name]) for name, feature in features["dense"].items()]
            hidden += self.linear("dense_projection", dense)
        for number in range(len(self.config["model"]["tower"]["hidden"])):
            hidden = [max(0.0, value) for value in self.linear(f"tower.linears.{number}", hidden)]
        (logit,) = self.linear("head", hidden)
        return logit if self.calibration is None else self.calibrated(logit, self.calibration, row)

    def calibrated(self, logit: float, told: Json, row: Json) -> float:
        domain = self.config["data"]["domain"]
        calibrator = told["overall"]
        if told["domains"]:
            calibrator = told["domains"].get(str(row[domain["column"]]), calibrator)
        if told["method"] == "platt":
            slope, intercept = calibrator["slope"], calibrator["intercept"]
            return float(slope * logit + intercept)
        knots, to = calibrator["logits"], calibrator["calibrated"]
        place = bisect_right(knots, logit)
        if place in (0, len(knots)):
            return float(to[0] if place == 0 else to[-1])
        share = (logit - knots[place - 1]) / (knots[place] - knots[place - 1])
        return float(to[place - 1] + share * (to[place] - to[place - 1]))


def hashed(value: Any, salt: int, buckets: int) -> int:
    data = value.encode() if isinstance(value, str) else (value % 2**64).to_bytes(8, "little")
    return int(xxhash.xxh3_64_intdigest(data, salt)) % buckets


@pytest.fixture(scope="module", params=["every_kind", "converted"])
def directory(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def client(directory: Path) -> Client:
    return Client(directory)


@pytest.fixture(scope="module")
def vectors(directory: Path) -> Json:
    found: Json = json.loads((directory / "vectors.json").read_text())
    return found


def test_every_value_has_the_rows_that_the_vectors_say(client: Client, vectors: Json) -> None:
    assert list(vectors["sparse"]) == list(client.config["features"]["sparse"])
    for name, told in vectors["sparse"].items():
        given = told.get("weights") or [None] * len(told["values"])
        found = [client.ids(name, value, weights) for value, weights in zip(told["values"], given, strict=True)]
        assert [rows for rows, _ in found] == told["rows"], name
        assert len(told["values"]) >= 5 and None in told["values"]
        if "row_weights" in told:
            assert [weights for _, weights in found] == told["row_weights"]


def test_every_number_becomes_what_the_vectors_say(client: Client, vectors: Json) -> None:
    assert list(vectors["dense"]) == list(client.config["features"]["dense"])
    for name, told in vectors["dense"].items():
        found = [client.number(name, value) for value in told["values"]]
        assert found == pytest.approx(told["results"], rel=1e-6, abs=1e-7), name
        assert len(found) >= 5


def test_whole_rows_have_the_logits_that_the_vectors_say(client: Client, vectors: Json) -> None:
    assert len(vectors["rows"]) >= 24
    logits = [client.logit(row["row"]) for row in vectors["rows"]]
    assert logits == pytest.approx([row["logit"] for row in vectors["rows"]], abs=2e-5)
    assert max(logits) - min(logits) > 0.02
    probabilities = [1 / (1 + math.exp(-logit)) for logit in logits]
    assert probabilities == pytest.approx([row["probability"] for row in vectors["rows"]], abs=5e-6)


def test_the_client_has_nothing_of_ours() -> None:
    imported = {
        name
        for node in ast.walk(ast.parse(Path(__file__).read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
    }
    assert not [name for name in imported if name.split(".")[0] in ("recsys", "torch", "numpy")]
