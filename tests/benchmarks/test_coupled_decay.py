"""What the benchmark of coupled decay tells, on a log so short that only the order of its figures is sure."""

import pytest

from benchmarks.coupled_decay import CASES, measure


@pytest.mark.slow
def test_sweeps_differ_from_the_dense_form_by_less_than_the_decay_does() -> None:
    found = {line["optimizer"]: line for line in measure(64)}
    assert list(found) == [optimizer for optimizer, _, _ in CASES]
    for line in found.values():
        assert line["difference"][1] < line["difference"][32]
        assert line["difference"][8] < line["effect"]
    assert found["sgd"]["difference"][1] < 1e-5  # in single precision the same
    assert found["sgd"]["log loss"][1] == pytest.approx(0, abs=1e-6)
