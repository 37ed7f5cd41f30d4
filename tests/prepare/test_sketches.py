import numpy as np
import pytest

from recsys.prepare.sketches import HyperLogLog, RowSample


def hashes(values: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, values, dtype=np.uint64)


@pytest.mark.parametrize("values", [0, 1, 10, 1_000, 20_000, 40_000, 70_000, 500_000])
def test_the_estimate_is_within_three_standard_errors(values: int) -> None:
    sketch = HyperLogLog()
    distinct = hashes(values, seed=values)
    sketch.add(np.concatenate([distinct, distinct[: values // 2]]))  # what comes again counts once
    # Few values may meet in one register, which no error of a share of them allows for.
    assert abs(sketch.estimate() - values) <= 3 * HyperLogLog.STANDARD_ERROR * values + 0.5


def test_the_standard_error_is_what_is_said() -> None:
    errors = []
    for seed in range(100):
        sketch = HyperLogLog()
        sketch.add(hashes(50_000, seed))
        errors.append(sketch.estimate() / 50_000 - 1)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(HyperLogLog.STANDARD_ERROR, rel=0.25)
    assert abs(np.mean(errors)) < 3 * HyperLogLog.STANDARD_ERROR / 10  # no bias


def test_merged_sketches_count_what_either_saw() -> None:
    both, one, other = HyperLogLog(), HyperLogLog(), HyperLogLog()
    values = hashes(30_000, 5)
    both.add(values)
    one.add(values[:20_000])
    other.add(values[10_000:])
    one.merge(other)
    assert one.estimate() == both.estimate()


def test_samples_of_two_streams_are_of_the_same_rows() -> None:
    rows = hashes(400_000, 3)
    train, valid = RowSample(), RowSample()
    for part in np.array_split(rows[:350_000], 40):
        piece = RowSample()
        piece.add(part)
        train.merge(piece)
    valid.add(rows[340_000:])  # a sixth of it is in train
    shared, compared = valid.shared(train)
    assert 4_000 < compared < 8_000  # of valid's 60,000 so many lie below train's threshold
    assert shared / compared == pytest.approx(1 / 6, abs=0.02)
    assert train.repeated()[0] == 0
    train.add(rows[:35_000])
    repeats, sampled = train.repeated()
    assert repeats / sampled == pytest.approx(70 / 385, abs=0.01)


def test_small_streams_are_compared_whole() -> None:
    one, other = RowSample(), RowSample()
    one.add(hashes(100, 1))
    other.add(np.concatenate([hashes(100, 1)[:7], hashes(50, 2)]))
    assert other.shared(one) == (7, 57)
