"""Who wins: paired bootstrap over prompts and seeds, sampled at one temperature or along the frontier.

Legend: S seeds, K temperatures, P prompts. Sampling colder raises quality and lowers variety for nothing (Caccia et
al., arXiv 1811.02549), so arms are compared greedy against greedy, and at equal variety between the same two
varieties: what lies above there is better, what lies elsewhere on one line is only sharper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DRAWS = 2000
GRID = 21  # varieties at which two frontiers are compared
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Arena:
    """Scores of all arms by one measure, and their varieties. Rows of all arms are the same prompts."""

    temperatures: tuple[float, ...]
    scores: Mapping[str, Array]  # arm -> [S, K, P]
    variety: Mapping[str, Array]  # arm -> [K], mean over seeds


@dataclass(frozen=True)
class Difference:
    """One arm minus another, with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """Which arm is above every other by one measure in one view; `winner` is empty where none is."""

    view: str
    winner: str
    best: str  # the highest on average
    differences: dict[str, Difference]  # best minus each other arm that can be compared


def resamples(seeds: int, prompts: int, seed: int = 0) -> tuple[Array, Array]:
    """Bootstrap weights (draws x S, draws x P): the same for all arms, so that differences are paired."""
    rng = np.random.default_rng(seed)
    return (
        rng.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS) / seeds,
        rng.multinomial(prompts, np.full(prompts, 1 / prompts), DRAWS) / prompts,
    )


def curve(scores_SKP: Array, weights: tuple[Array, Array] | None) -> Array:
    """Mean score at each temperature: [K], or [draws, K] under bootstrap weights."""
    if weights is None:
        return scores_SKP.mean((0, 2))
    of_seeds, of_prompts = weights
    return np.einsum("skp,ds,dp->dk", scores_SKP, of_seeds, of_prompts, optimize=True)


def between(variety_K: Array, at_G: Array) -> Array:
    """[G, K]: what gives the frontier's quality at `at_G` from its quality at each temperature, linearly between."""
    order = np.argsort(variety_K, kind="stable")
    return np.stack([np.interp(at_G, variety_K[order], unit[order]) for unit in np.eye(len(variety_K))], axis=1)


def shared_range(one_K: Array, other_K: Array) -> tuple[float, float] | None:
    """The varieties that both frontiers reach; None where there is no such range."""
    low, high = max(one_K.min(), other_K.min()), min(one_K.max(), other_K.max())
    return (float(low), float(high)) if high > low else None


def at_temperature(arena: Arena, one: str, other: str, index: int) -> Difference:
    """One arm minus another at the temperature of that index."""
    difference_S1P = (arena.scores[one] - arena.scores[other])[:, index : index + 1]
    return _interval(difference_S1P, np.ones((1, 1)), None)


def along_frontier(arena: Arena, one: str, other: str) -> Difference | None:
    """Mean difference at equal variety over the varieties that both reach; None where there is no such range.

    The bootstrap draws prompts and seeds; varieties stay as measured.
    """
    both = shared_range(arena.variety[one], arena.variety[other])
    if both is None:
        return None
    at_G = np.linspace(*both, GRID)
    weights_1K = between(arena.variety[one], at_G).mean(0, keepdims=True)
    weights_2K = between(arena.variety[other], at_G).mean(0, keepdims=True)
    return _interval(arena.scores[one], weights_1K, (arena.scores[other], weights_2K))


def _interval(one_SKP: Array, weights_1K: Array, other: tuple[Array, Array] | None) -> Difference:
    draws = resamples(one_SKP.shape[0], one_SKP.shape[2])

    def value(weights: tuple[Array, Array] | None) -> Array:
        found = curve(one_SKP, weights) @ weights_1K[0]
        return found - curve(other[0], weights) @ other[1][0] if other else found

    low, high = np.percentile(value(draws), [2.5, 97.5])
    return Difference(float(value(None)), float(low), float(high))


def verdicts(arena: Arena) -> list[Verdict]:
    """Greedy (or the coldest), at temperature 1 (or the hottest), and along the frontier.

    An arm wins where its interval against every other arm lies above 0: that holds it to each of them, so no
    correction for their number is needed.
    """
    order = np.argsort(arena.temperatures)
    found = []
    for index in dict.fromkeys((int(order[0]), int(order[-1]))):
        temperature = arena.temperatures[index]
        means = {arm: float(scores[:, index].mean()) for arm, scores in arena.scores.items()}
        best = max(means, key=lambda arm: means[arm])
        against = {arm: at_temperature(arena, best, arm, index) for arm in means if arm != best}
        found.append(_verdict(f"temperature {temperature:g}" if temperature else "greedy", best, against))
    if len(order) > 1:
        found.append(_on_frontier(arena))
    return found


def _on_frontier(arena: Arena) -> Verdict:
    """The arm that is on average above the others it can be compared with."""
    pairs = {
        arm: {other: d for other in arena.scores if other != arm and (d := along_frontier(arena, arm, other))}
        for arm in arena.scores
    }
    best = max(pairs, key=lambda arm: (sum(d.mean > 0 for d in pairs[arm].values()), _mean(list(pairs[arm].values()))))
    verdict = _verdict("equal variety", best, pairs[best])
    if len(pairs[best]) < len(arena.scores) - 1:  # it cannot be above one whose varieties it never reaches
        return Verdict(verdict.view, "", best, verdict.differences)
    return verdict


def _mean(differences: Sequence[Difference]) -> float:
    return float(np.mean([d.mean for d in differences])) if differences else -np.inf


def _verdict(view: str, best: str, against: dict[str, Difference]) -> Verdict:
    wins = bool(against) and all(d.low > 0 for d in against.values())
    return Verdict(view, best if wins else "", best, against)
