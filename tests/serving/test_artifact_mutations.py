"""No damaged artefact gives other answers quietly, and no request ends in anything but answers or one line.

The rule: a file that the manifest lists is what was written, or the artefact is refused. What else is changed, in the
manifest or beside what it lists, is refused or changes no bit of an answer. Who makes the manifest's digests anew has
made another artefact: it is refused in one line, or it is one whose answers are its own; what only describes the model
(schemas, test vectors, card) changes none.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from artifact_mutations import MANIFEST, MUTATIONS, files
from every_kind import export
from generated import ODD, requests, schema_of
from hostile import ROOT, run_bounded
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from recsys.errors import UserError
from recsys.serving import Scorer

DESCRIBES = {"README.md", "schema.json", "schema.arrows", "vectors.json"}


class Ended(NamedTuple):
    kind: str
    file: str
    sealed: bool
    refusal: str | None
    same: bool
    mebibytes: int


@pytest.fixture(scope="module", params=[80, pytest.param(320, marks=pytest.mark.slow)])
def ended(request: pytest.FixtureRequest, every_kind: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Ended]:
    """How so many damaged copies ended."""
    folder = tmp_path_factory.mktemp("mutations")
    other = export(every_kind.parent / "out/checkpoints/step-8", folder / "other", "--tables", "float16")
    program = ROOT / "tests/serving/artifact_mutations.py"
    done = run_bounded(str(program), str(every_kind), str(other), str(folder), str(request.param), memory=8 << 30)
    assert done.code == 0, done.stderr
    ended = [Ended(*json.loads(line)) for line in done.stdout.splitlines()]
    assert len(ended) == request.param and {one.kind for one in ended} == set(MUTATIONS)
    return ended


def test_every_end_is_answers_or_a_refusal_that_is_read(ended: list[Ended]) -> None:
    for one in ended:
        if one.refusal is not None:
            heading, *faults = one.refusal.split("\n")  # a config's faults are listed, each on a line
            assert heading and len(heading) < 1000 and all(fault.startswith("  ") for fault in faults), one
        assert one.mebibytes < 1500, one


def test_damage_that_digests_tell_is_refused(ended: list[Ended], every_kind: Path) -> None:
    listed = set(files(every_kind)) - {MANIFEST}
    for one in ended:
        if not one.sealed and one.file in listed:
            # Another's file may be the very same.
            assert one.refusal is not None or (one.kind in ("another's", "keys", "zeros") and one.same), one


def test_what_no_digest_tells_changes_no_answer(ended: list[Ended]) -> None:
    for one in ended:
        if not one.sealed or one.file in DESCRIBES or "extra" in one.kind:
            assert one.refusal is not None or one.same, one


def test_new_digests_make_other_artefacts_of_which_some_are_whole(ended: list[Ended]) -> None:
    sealed = [one for one in ended if one.sealed]
    assert any(one.refusal is None and not one.same for one in sealed), "nothing of what answers was changed"
    assert sum(one.refusal is not None for one in sealed) > len(sealed) // 4
    assert sum(one.refusal is not None for one in ended if not one.sealed) > len(ended) // 3


@pytest.fixture(scope="module")
def scorer(every_kind: Path) -> Scorer:
    return Scorer(every_kind)


def ask(scorer: Scorer, request: Any) -> np.ndarray[Any, Any] | None:
    """Answers, or None where there is one line that says why not."""
    refusal = None
    try:
        found = scorer.score(request)
    except UserError as error:
        refusal = str(error)
    if refusal is not None:
        assert refusal and "\n" not in refusal
        return None
    assert found.dtype == np.float32 and found.ndim == 1
    assert ((found >= 0) & (found <= 1)).all()
    return found


@pytest.mark.parametrize("number", [250, pytest.param(1000, marks=pytest.mark.slow)])
def test_requests_of_any_kind_end_in_answers_or_one_line(scorer: Scorer, every_kind: Path, number: int) -> None:
    answered: list[bool] = []

    # Shrinking such requests takes minutes.
    @settings(
        max_examples=number,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(request=requests(schema_of(every_kind), {"bag_weights": "bag"}))
    def asked(request: Any) -> None:
        answered.append(ask(scorer, request) is not None)

    asked()
    assert number // 10 < sum(answered) < number * 9 // 10, "all answered, or all refused: nothing is tried"


@pytest.mark.filterwarnings("ignore")  # numpy's and torch's, of such values
def test_each_odd_value_in_each_column_ends_in_answers_or_one_line(scorer: Scorer, every_kind: Path) -> None:
    """Also those on which Arrow's inference would end the process: lists that nest as deep as they like."""
    itself: list[Any] = []
    itself.append(itself)
    row = json.loads((every_kind / "vectors.json").read_text())["rows"][0]["row"]
    columns = {name: [value] for name, value in row.items()}
    answered = [
        ask(scorer, request) is not None
        for odd in [*ODD, itself, {"a": itself}, (itself,), np.array([itself, 1], object)]
        for name in row
        for request in ([{**row, name: odd}], {**columns, name: [odd]}, {**columns, name: odd})
    ]
    assert 0 < sum(answered) < len(answered) // 3


def test_numpys_times_among_its_numbers_are_refused(scorer: Scorer, every_kind: Path) -> None:
    """On which, too, Arrow's inference would end the process."""
    row = json.loads((every_kind / "vectors.json").read_text())["rows"][0]["row"]
    columns = {name: [value] * 2 for name, value in row.items()}
    time = np.datetime64("2024-01-01")
    for other in (np.int8(1), np.uint64(1), np.float32(1), np.longdouble(1), np.bool_(True)):
        arrays = np.array([time]), np.array([other])
        views = [{"a": time, "b": other}.values()] * 2
        alike = [[time], [other]], arrays, [[time], arrays[1]], views
        for mixed in ([time, other], np.array([time, other], object), *alike):
            for name in row:
                assert ask(scorer, {**columns, name: mixed}) is None


@given(rows=st.integers(0, 3))
@settings(max_examples=4)
def test_requests_of_no_column_are_refused(scorer: Scorer, rows: int) -> None:
    assert ask(scorer, [{}] * rows) is None or rows == 0
