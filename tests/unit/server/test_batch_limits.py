"""How many clips are taken at once."""

import time

from server.worker.batch_limits import BatchLimits, best_size


def test_size_that_did_not_fit_is_remembered_for_its_shape_and_for_a_while() -> None:
    limits = BatchLimits(16, remembered_s=0.05)
    limits.lower("m", (16, 32, 32), 4)
    assert (limits.of("m", (16, 32, 32)), limits.of("m", (32, 32, 32)), limits.of("n", (16, 32, 32))) == (4, 16, 16)
    time.sleep(0.06)
    assert limits.of("m", (16, 32, 32)) == 16
    limits.lower("m", (16, 32, 32), 0)
    assert limits.of("m", (16, 32, 32)) == 1


def test_best_size_of_a_model_goes_before_the_largest() -> None:
    limits = BatchLimits(16)
    limits.set_best("m", 8)
    limits.lower("m", "shape", 12)
    assert (limits.of("m", "shape"), limits.of("m", "other"), limits.of("n", "other")) == (8, 8, 16)


def test_best_size_is_the_last_that_pays() -> None:
    asked = []

    def seconds(size: int) -> float:
        asked.append(size)
        return {1: 0.01, 4: 0.02, 16: 0.0795, 64: 0.3}[size]

    assert best_size((1, 4, 16, 64), seconds) == 4
    assert asked == [1, 4, 16]
    assert best_size((1, 4, 16), lambda size: 0.01 + 0.001 * size) == 16


def test_long_clips_are_not_measured_in_company() -> None:
    assert best_size((1, 2, 4), lambda size: 0.6 if size == 1 else 1 / 0) == 1
