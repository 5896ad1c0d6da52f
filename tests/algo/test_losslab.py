"""Semantics pinned: where each discriminator loss rests, derived by hand, and what its gradient is on the way."""

from __future__ import annotations

import dataclasses
import math

import pytest

from algo.mutants import mutated
from gadcli.algo import losslab
from gadcli.config import schema

NUMBERS = {
    "original": {},
    "v1": dataclasses.asdict(schema.V1LossConfig()),
    "v2": dataclasses.asdict(schema.V2LossConfig()),
    "v2_raw": dataclasses.asdict(schema.V2RawLossConfig()),
    "final": dataclasses.asdict(schema.FinalLossConfig()),
}
LENGTHS = {"t_len": 150.0, "s_len": 250.0}


def spec(name: str, module=losslab, **options: float):
    return module.LossSpec(name, NUMBERS[name], **options)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def check_final(module) -> None:
    # dL/dt = -1.5 σ(-d/2) / (2 · 150) + 2 · .005 t = 0 and the same for s over 250, so with k = σ(-d/2):
    # t = .5 k, s = -.3 k, d = t/150 - s/250 = k (.5/150 + .3/250). Iterating from k = 1/2:
    k = 0.5
    for _ in range(20):
        k = sigmoid(-k * (0.5 / 150 + 0.3 / 250) / 2)
    at = module.rest(spec("final", module), **LENGTHS)
    assert at.kind == "point"
    assert at.raw_gap == pytest.approx(0.8 * k, rel=1e-4)  # .3998
    assert at.norm_gap == pytest.approx(k * (0.5 / 150 + 0.3 / 250), rel=1e-4)  # .002265
    assert at.norm_gap == pytest.approx(0.0023, abs=5e-5)
    assert at.ranking_loss == pytest.approx(0.6926, abs=5e-5)
    assert not at.raw_gap_free


def test_final_rests_near_norm_gap_0023() -> None:
    check_final(losslab)


@pytest.mark.parametrize("spread", [0.1, 0.4, 1.2424, 11.0])
def test_final_rests_there_whatever_the_quality(spread: float) -> None:
    # Scattering scores leave the loss linear in d (|d|/2 < .1), so the means balance where they did; d_acc falls
    # from .998 to .51 meanwhile. 1.2424 is the scatter of the reported d_acc .59: Φ(.3998 / (1.2424 √2)) = .59.
    at = losslab.rest(spec("final"), **LENGTHS, spread=spread)
    assert at.norm_gap == pytest.approx(0.0022654, rel=2e-3)
    assert at.d_acc == pytest.approx(0.5 * (1 + math.erf(0.39977 / (2 * spread))), abs=1e-3)
    if spread == 1.2424:
        assert at.d_acc == pytest.approx(0.59, abs=1e-3)


def test_with_weak_evidence_final_rests_lower_never_higher() -> None:
    # First order in d: a = 37.5 (p/150 - (1-p)/250), b = 37.5 ((1-p)/150 - p/250); p = .8 gives a = .17, b = -.07 and
    # a norm gap of .8 (a/150 - b/250) + .2 (b/150 - a/250) = .000901.
    at = losslab.rest(spec("final"), **LENGTHS, accuracy=0.8)
    assert at.norm_gap == pytest.approx(0.000901, rel=1e-2)
    assert at.d_acc == pytest.approx(0.8) and at.raw_gap == pytest.approx(0.6 * 0.24, rel=1e-2)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Pairs(t_raw, t_raw / t_len, s_raw, s_raw / s_len)", "Pairs(t_raw, t_raw, s_raw, s_raw)"),
        ("p * (a / t_len - b / s_len)", "p * (a / s_len - b / t_len)"),
        ("self.name, pair, self.numbers,", 'self.name, pair, {**self.numbers, "score_reg": 0.01},'),
    ],
)
def test_mutants_of_the_lab_are_caught(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_final(mutated("losslab", old, new))


@pytest.mark.parametrize("p", [0.6, 0.8, 0.99])
def test_original_rests_at_the_log_odds(p: float) -> None:
    # p softplus(-g) + (1-p) softplus(g) is smallest at g = logit p; what metrics show is its mean, (2p-1) g.
    at = losslab.rest(spec("original"), t_len=100, s_len=100, accuracy=p)
    assert at.kind == "point" and at.raw_gap == pytest.approx((2 * p - 1) * math.log(p / (1 - p)), rel=1e-4)
    assert at.d_acc == pytest.approx(p)


def test_original_never_rests_where_texts_are_told_apart_unless_smoothed() -> None:
    assert losslab.rest(spec("original"), **LENGTHS).kind == "none"
    assert losslab.rest(spec("original"), **LENGTHS, spread=1.0).kind == "none"
    # Label smoothing .1 is the same as labels wrong one time in ten: logit .9 = ln 9.
    smooth = losslab.rest(spec("original", label_smoothing=0.1), **LENGTHS)
    assert smooth.kind == "point" and smooth.raw_gap == pytest.approx(math.log(9), rel=1e-4)


def test_v1_is_held_by_nothing_but_its_clamp() -> None:
    # d / temperature reaches the clamp at d = 2 · 10.
    at = losslab.rest(spec("v1"), **LENGTHS)
    assert at.kind == "clamp" and at.norm_gap == pytest.approx(20.0, rel=1e-6)


def test_v2_holds_the_norm_gap_and_lets_raw_scores_drift() -> None:
    # The upper hinge (slope 1) outweighs the ranking term (slope below 1/4): d = 5 exactly. Of the raw scores with
    # that d the nearest to 0 lie along (1/150, -1/250): gap 5 (1/150 + 1/250) / (1/150² + 1/250²) = 882.35.
    at = losslab.rest(spec("v2"), **LENGTHS)
    assert at.kind == "point" and at.raw_gap_free
    assert at.norm_gap == pytest.approx(5.0, rel=1e-6) and at.raw_gap == pytest.approx(882.35, rel=1e-4)


def test_v2_can_have_its_gap_from_the_lengths_alone() -> None:
    # Equal raw scores c on both sides give d = c (1/150 - 1/250): evidence is not needed.
    at = losslab.rest(spec("v2"), **LENGTHS, accuracy=0.6)
    assert at.norm_gap == pytest.approx(5.0, rel=1e-6) and at.raw_gap == 0.0 and at.d_acc == 0.5


def test_v2_raw_rests_between_its_hinges() -> None:
    # Lengths 1: with t = g/2 = -s and 1 < g < 5, dL/dg = -.25 σ(-g/2) + .005 g = 0, by bisection.
    low, high = 1.0, 5.0
    for _ in range(60):
        g = (low + high) / 2
        low, high = (g, high) if -0.25 * sigmoid(-g / 2) + 0.005 * g < 0 else (low, g)
    at = losslab.rest(spec("v2_raw"), t_len=1, s_len=1)
    assert at.kind == "point" and at.raw_gap == pytest.approx(low, rel=1e-4)


def check_sweep(module) -> None:
    # original: |(d/dt, d/ds)| = √2 σ(-gap)
    (at,) = module.sweep(spec("original", module), [15.5], **LENGTHS)
    assert at.gradient == pytest.approx(math.sqrt(2) * sigmoid(-15.5), rel=1e-6)
    assert at.raw_gap == 15.5
    assert at.norm_gap == pytest.approx(7.75 / 150 + 7.75 / 250)
    # values=all: .05 · 150 + .05 · 250 = 20 raw; each side's pull is multiplied by its length
    (at,) = module.sweep(spec("original", module), [0.1], **LENGTHS, values="all")
    assert at.raw_gap == pytest.approx(20.0)
    assert at.norm_gap == pytest.approx(0.1)
    assert at.gradient == pytest.approx(math.hypot(150, 250) * sigmoid(-20.0), rel=1e-6)


def test_the_sweep_shows_saturation_and_what_summing_over_tokens_does_to_it() -> None:
    check_sweep(losslab)


def test_sweep_mutant_without_the_length_gain_is_caught() -> None:
    mutant = mutated("losslab", 'if values == "all" else (1.0, 1.0)', "if False else (1.0, 1.0)")
    with pytest.raises(AssertionError):
        check_sweep(mutant)


def test_stored_scores_are_averaged_over_pairs() -> None:
    # Pairs with gaps 0 and ln 3: losses ln 2 and ln(4/3); slopes σ(0) = 1/2 and σ(-ln 3) = 1/4, times √2.
    # A pair with an answer of length 0 counts it as 1.
    at = losslab.stored(spec("original"), [1.0, math.log(3)], [1.0, 0.0], [2.0, 2.0], [4.0, 0.0])
    assert at.value == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)
    assert at.gradient == pytest.approx(math.sqrt(2) * 0.75 / 2)
    assert at.raw_gap == pytest.approx(math.log(3) / 2)
    assert at.norm_gap == pytest.approx((1 / 2 - 1 / 4 + math.log(3) / 2) / 2)
    assert at.d_acc == 0.75 and at.pairs == 2
