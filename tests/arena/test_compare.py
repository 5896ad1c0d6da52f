"""Semantics pinned: sharper is not better (one line at other temperatures is no win), higher at equal variety is.

Curves are made up so that every expected number follows by hand.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from gadcli.arena import compare
from gadcli.arena.compare import Arena, along_frontier, at_temperature, between, curve, resamples, verdicts
from mutants import mutated

TEMPERATURES = (0.0, 0.5, 1.0)


def flat(quality: list[float], prompts: int = 40, seeds: int = 2, noise: float = 0.0, seed: int = 0) -> compare.Array:
    """[S, K, P]: these means at each temperature, with noise that all temperatures and arms of one seed share."""
    rng = np.random.default_rng(seed)
    return np.array(quality)[None, :, None] + noise * rng.standard_normal((seeds, 1, prompts))


def arena(**arms: tuple[list[float], list[float]]) -> Arena:
    scores = {name: flat(quality) for name, (quality, _) in arms.items()}
    return Arena(TEMPERATURES, scores, {name: np.array(variety) for name, (_, variety) in arms.items()})


def line(variety: list[float], above: float = 0.0) -> tuple[list[float], list[float]]:
    """Quality 1 - variety, moved up by `above`."""
    return [1 - v + above for v in variety], variety


def check_frontier(module: ModuleType = compare) -> None:
    # Both on the line q = 1 - v, the second at colder points: greedy it is .2 better, along the frontier 0.
    sharper = arena(one=line([0.4, 0.6, 0.8]), other=line([0.2, 0.3, 0.5]))
    assert module.at_temperature(sharper, "other", "one", 0).mean == pytest.approx(0.2)
    found = module.along_frontier(sharper, "other", "one")
    assert found.mean == pytest.approx(0.0, abs=1e-9) and found.low <= 1e-9 and found.high >= -1e-9
    # .1 above the line wherever both are.
    better = arena(one=line([0.4, 0.6, 0.8]), other=line([0.3, 0.5, 0.7], above=0.1))
    assert module.along_frontier(better, "other", "one").mean == pytest.approx(0.1)
    # Unordered varieties (a hotter temperature that gives less) are sorted, not mixed up.
    odd = arena(one=line([0.8, 0.4, 0.6]), other=line([0.3, 0.5, 0.7], above=0.1))
    assert module.along_frontier(odd, "other", "one").mean == pytest.approx(0.1)


def test_a_sharper_arm_lies_on_the_same_frontier_and_a_better_one_above() -> None:
    check_frontier()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("variety_K[order], unit[order]", "variety_K, unit"),  # np.interp wants rising points
        ("max(one_K.min(), other_K.min()), min(one_K.max(), other_K.max())", "0.0, 1.0"),  # beyond what was measured
        ("between(arena.variety[other], at_G)", "between(arena.variety[one], at_G)"),
        ("found - curve(other[0], weights)", "found + curve(other[0], weights)"),
        ("[:, index : index + 1]", "[:, -1:]"),
    ],
)
def test_mutants_of_the_frontier_are_caught(old: str, new: str) -> None:
    with pytest.raises((AssertionError, AttributeError)):
        check_frontier(mutated("arena.compare", old, new))


def test_frontiers_that_share_no_variety_are_not_compared() -> None:
    apart = arena(one=line([0.1, 0.2, 0.3]), other=line([0.4, 0.5, 0.6], above=1.0))
    assert along_frontier(apart, "one", "other") is None
    (frontier,) = [v for v in verdicts(apart) if v.view == "equal variety"]
    assert frontier.winner == "" and frontier.differences == {}


def test_interpolation_gives_the_points_themselves_and_halves_between() -> None:
    weights = between(np.array([0.2, 0.4, 0.8]), np.array([0.2, 0.3, 0.8]))
    assert weights == pytest.approx(np.array([[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1]]))


def test_bootstrap_weights_keep_the_mean_of_equal_scores_and_are_the_same_for_all_arms() -> None:
    weights = resamples(2, 40)
    assert weights[0].sum(1) == pytest.approx(1.0) and weights[1].sum(1) == pytest.approx(1.0)
    assert curve(flat([1.0, 2.0, 3.0]), weights) == pytest.approx(np.tile([1.0, 2.0, 3.0], (compare.DRAWS, 1)))
    assert all(np.array_equal(a, b) for a, b in zip(weights, resamples(2, 40), strict=True))


def test_pairing_removes_what_prompts_share() -> None:
    """Both arms have the same hard and easy prompts, spread 1; the arms differ by .05 on each: clear when paired."""
    shared = flat([0.0, 0.0, 0.0], noise=1.0)
    variety = {"one": np.array([0.1, 0.2, 0.3]), "other": np.array([0.1, 0.2, 0.3])}
    paired = Arena(TEMPERATURES, {"one": shared + 0.05, "other": shared}, variety)
    difference = at_temperature(paired, "one", "other", 1)
    assert (difference.low, difference.high) == pytest.approx((0.05, 0.05), abs=1e-9)
    alone = Arena(TEMPERATURES, {"one": flat([0.05] * 3, noise=1.0, seed=1), "other": shared}, variety)
    difference = at_temperature(alone, "one", "other", 1)
    assert difference.low < 0 < difference.high


def test_the_interval_covers_seeds_as_well_as_prompts() -> None:
    """Two seeds that differ by 1, no noise over prompts: means of resampled seeds are 0, .5 or 1 (1/4, 1/2, 1/4)."""
    scores = np.stack([np.zeros((3, 20)), np.ones((3, 20))])
    variety = {"one": np.array([0.1, 0.2, 0.3]), "zero": np.array([0.1, 0.2, 0.3])}
    difference = at_temperature(Arena(TEMPERATURES, {"one": scores, "zero": 0 * scores}, variety), "one", "zero", 0)
    assert (difference.mean, difference.low, difference.high) == (0.5, 0.0, 1.0)


def test_an_arm_wins_only_where_it_is_clear_of_every_other() -> None:
    variety = np.array([0.1, 0.2, 0.3])
    shared = flat([0.5, 0.4, 0.3], noise=0.1)
    other = flat([0.5, 0.4, 0.3], noise=0.1, seed=5)
    arms = {"far": shared - 0.2, "near": other, "best": shared + 0.001}
    found = {v.view: v for v in verdicts(Arena(TEMPERATURES, arms, dict.fromkeys(arms, variety)))}
    assert set(found) == {"greedy", "temperature 1", "equal variety"}
    assert all(v.winner == "" for v in found.values())
    clear = {"far": shared - 0.2, "near": shared - 0.1, "best": shared}
    found = {v.view: v for v in verdicts(Arena(TEMPERATURES, clear, dict.fromkeys(clear, variety)))}
    assert [v.winner for v in found.values()] == ["best"] * 3
    assert found["greedy"].differences["near"].mean == pytest.approx(0.1)
