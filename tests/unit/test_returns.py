"""What is learned of waits: the index against exact sums, what waits still, what is lent."""

from __future__ import annotations

import numpy as np
import pytest

from kvmem.policy.returns import EDGES_S, N_BINS, WIDTHS_S, Returns, bins_of, gittins


def exact(hazard: np.ndarray, start: int) -> float:
    """By adding up small steps, for each limit at a bin's end."""
    best, left, back, kept = 0.0, 1.0, 0.0, 0.0
    for at in range(start, N_BINS):
        n = min(20_000, int(200 + 20 * hazard[at] * WIDTHS_S[at]))
        step = WIDTHS_S[at] / n
        for _ in range(n):
            gone = left * -np.expm1(-hazard[at] * step)
            back, kept = back + gone, kept + (left - gone / 2) * step
            left -= gone
            if left < 1e-12:
                break
        best = max(best, back / kept)
    return best


@pytest.mark.parametrize("seed", range(3))
def test_the_index_is_the_best_rate_of_any_limit(seed: int) -> None:
    draw = np.random.default_rng(seed)
    hazard = draw.lognormal(-3, 2, N_BINS) / (1 + EDGES_S[:-1]) ** 0.5
    index = gittins(hazard)
    for start in (0, 5, 20, N_BINS - 1):
        assert index[start] == pytest.approx(exact(hazard, start), rel=0.01)


def test_a_steady_hazard_is_its_own_index() -> None:
    assert gittins(np.full(N_BINS, 0.25)) == pytest.approx(np.full(N_BINS, 0.25))


def test_a_loop_is_worth_most_just_before_it_returns() -> None:
    returns = Returns()
    of = returns.settle(("loop",))
    for _ in range(200):
        returns.waited(of, 0, 30.0)
        returns.returned(of, 30.0)
    worth = returns.worth(of)
    at = int(bins_of(np.array([30.0]))[0])
    assert worth[at] > 3 * worth[0]
    assert (np.diff(worth[: at + 1]) > 0).all()
    assert worth[at + 3] < worth[at] / 3


def test_one_wait_counts_as_it_does_among_many() -> None:
    draw = np.random.default_rng(3)
    ends = np.sort(draw.lognormal(2, 3, (200, 2)), 1)
    ends[:20, 0] = 0.0
    ends[20:30, 1] = ends[20:30, 0]
    one, many = Returns(), Returns()
    of = one.settle(("tool", 1))
    many.settle(of)
    for from_s, to_s in ends.tolist():
        one.waited(of, from_s, to_s)
    many.waited_all([of], np.zeros(200, np.int64), ends[:, 0], ends[:, 1])
    for prefix in (of, of[:1], ()):
        assert one.hazard(prefix) == pytest.approx(many.hazard(prefix))


def test_what_never_comes_back_is_worth_less_and_less() -> None:
    returns = Returns()
    of = returns.settle(("gone",))
    for _ in range(100):
        returns.waited(of, 0, 3600.0)
    other = returns.settle(("back",))
    for _ in range(100):
        returns.waited(other, 0, 60.0)
        returns.returned(other, 60.0)
    later = bins_of(np.array([30.0, 60.0]))
    assert (returns.worth(of)[later] < returns.worth(other)[later] / 3).all()
    assert (returns.worth(of)[: later[0]] < returns.worth(other)[: later[0]]).any()


def test_a_new_class_is_lent_what_is_known_of_those_above_it() -> None:
    returns = Returns()
    for _ in range(500):
        known = returns.settle(("tool", 1))
        returns.waited(known, 0, 8.0)
        returns.returned(known, 8.0)
    fresh = returns.settle(("tool", 2))
    at = int(bins_of(np.array([8.0]))[0])
    assert returns.hazard(fresh)[at] == pytest.approx(returns.hazard(("tool",))[at], rel=0.01)
    before = returns.hazard(fresh)[at]
    for _ in range(50):  # its own waits take over
        returns.waited(fresh, 0, 900.0)
    assert returns.hazard(fresh)[at] < before / 5


def test_seconds_are_counted_once_in_their_bins() -> None:
    returns = Returns()
    of = returns.settle(("a",))
    returns.waited(of, 0.0, 10.0)
    returns.waited(of, 10.0, 25.0)
    nothing = np.array([25.0, 0.0])
    returns.waited_all([of], np.array([0, 0]), nothing, nothing)
    assert returns._seen[of].seconds.sum() == pytest.approx(25.0)
    assert returns._seen[()].seconds.sum() == pytest.approx(25.0)
    assert returns._seen[of].seconds[0] == pytest.approx(0.5)


def test_classes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmem.policy.returns.MOST_CLASSES", 10)
    returns = Returns()
    for i in range(100):
        of = returns.settle(("tool", i))
        returns.returned(of, 1.0)
        returns.worth(of)
    assert len(returns._seen) <= 12
