"""`why` on runs as they are in the field: odd but healthy shapes stay silent, collapses get their own name."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gadcli.metrics.diagnose import Watch, diagnose
from gadcli.metrics.facts import RunFacts
from gadcli.metrics.health import HealthTracker
from gadcli.metrics.history import History, StepRecord
from gadcli.metrics.symptoms import Diagnosis
from metrics.generated import Metrics, Run, header
from metrics.rough import HEALTHY, Draw, Noise, game, many, sft
from metrics.rough_collapses import COLLAPSES, turn

Evals = list[tuple[int, Metrics]]


def judged(run: Run, evals: Evals = []) -> list[Diagnosis]:  # noqa: B006 (never changed)
    """The diagnoses at the run's end: what a reader of the whole log sees."""
    facts, history = RunFacts.of(run[0]), History()
    tracker = HealthTracker(facts)
    for step, metrics in enumerate(run[1], start=1):
        tracker.update(step, metrics)
        history.append(StepRecord(step, 0.0, 0.0, metrics))
    return diagnose(history, facts, tracker.verdicts(), evals)


def faults(found: list[Diagnosis]) -> list[str]:
    return [d.name for d in found if d.level != "info"]


@pytest.mark.parametrize("name", HEALTHY)
def test_an_odd_but_healthy_run_never_alarms_at_any_step(name: str) -> None:
    info, steps = HEALTHY[name](5)
    watching = Watch(RunFacts.of(info))
    alarms = [(a.step, a.message) for i, m in enumerate(steps, start=1) for a in watching.step(i, m)]
    assert alarms == [] and faults(watching.diagnoses) == []


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", HEALTHY)
def test_why_is_silent_on_an_odd_but_healthy_run(name: str, seed: int) -> None:
    assert faults(judged(HEALTHY[name](seed))) == []


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("name", "draw"), [(n, d) for n, draws in COLLAPSES.items() for d in draws])
def test_a_rough_collapse_is_named_first_and_its_evidence_speaks_for_it(name: str, draw: Draw, seed: int) -> None:
    found = judged(draw(seed))
    assert found and found[0].name == name, [(d.name, d.certainty) for d in found]
    assert found[0].evidence and (found[0].cures or name == "on_policy")


def test_a_value_that_does_not_speak_for_a_diagnosis_is_not_its_evidence() -> None:
    (one_sided,) = [d for d in COLLAPSES["raw_drift"] if d.__name__ == "drifts_on_one_side"]
    drift = judged(one_sided(1))[0]
    # the teacher's mean stays at 2.0: the drift is the student's
    assert "critic/teacher_value_mean" not in [e.metric for e in drift.evidence]
    assert "critic/student_value_mean" in [e.metric for e in drift.evidence]


def test_answers_on_their_way_down_to_the_teachers_length_are_no_warning_and_those_that_stay_are() -> None:
    falling = HEALTHY["shrinking_to_the_teacher"]
    stays = turn(falling(1), lambda n, p: {"response_length/mean": n.around(130, 0.02)}, onset=0.0)
    assert faults(judged((falling(1)[0], falling(1)[1][:14]))) == []
    assert "response_length/mean" in faults(judged(stays))


# --- what builds up slowly ----------------------------------------------------------------------------------------


def evals_of(rouge: Callable[[int], float], every: int = 20, steps: int = 200) -> Evals:
    n = Noise(3)
    return [(step, {"val/rouge_l": rouge(step) + n.rng.gauss(0, 0.012)}) for step in range(every, steps + 1, every)]


def rising_reward(seed: int) -> Run:
    def draw(n: Noise, i: int) -> Metrics:
        return game(n, i) | {"critic/student_value_mean": -0.5 + 0.02 * i + n.rng.gauss(0, 0.1)}

    return many(200, {}, draw, seed)


def test_a_reward_that_rises_while_held_out_answers_get_worse_is_named_with_the_step_of_the_best() -> None:
    best_at_80 = evals_of(lambda step: 0.3 + 0.002 * step if step <= 80 else 0.46 - 0.002 * (step - 80))
    found = judged(rising_reward(1), best_at_80)[0]
    assert found.name == "quality_falls" and "reward rises" in found.title and 60 <= found.since <= 100
    flat_reward = judged(many(200, {}, game, 1), best_at_80)[0]
    assert flat_reward.name == "quality_falls" and "reward" not in flat_reward.title
    assert faults(judged(rising_reward(1), evals_of(lambda step: 0.3 + 0.0005 * step))) == []
    assert faults(judged(rising_reward(1), evals_of(lambda step: 0.35))) == [], "noise alone is no fall"


def test_a_critic_that_stays_at_one_half_is_named_and_an_even_match_is_not() -> None:
    def blind(n: Noise, i: int) -> Metrics:
        return game(n, i, loss="original") | {
            "critic/d_acc": n.share(0.5, 128),
            "critic/score_diff": n.rng.gauss(0, 0.02),
        }

    info = {"stage": "warmup", "critic_loss": "original", "critic_lr": 1e-6}
    found = judged(many(120, info, blind, 4))
    assert (
        "blind_critic" in faults(found)
        and "critic.optim.lr=3e-06" in next(d for d in found if d.name == "blind_critic").cures
    )
    assert "blind_critic" not in faults(judged(HEALTHY["even_match"](3)))
    assert "blind_critic" not in faults(judged(many(30, info, blind, 4))), "thirty steps are early"


def test_lost_variety_is_named_before_the_advantages_are_zero() -> None:
    def narrow(n: Noise, p: float) -> Metrics:
        return {"actor/entropy": n.around(0.05, 0.2), "critic/zero_std_fraction": n.share(0.4, 64)}

    assert faults(judged(turn(many(200, {}, game, 1), narrow, onset=0.6))) == ["variety_lost"]
    spread_stays = turn(many(200, {}, game, 1), lambda n, p: {"actor/entropy": n.around(0.05, 0.2)}, onset=0.6)
    assert faults(judged(spread_stays)) == [], "a sure student whose groups still differ is fine"


@pytest.mark.parametrize(
    ("name", "curve"),
    [("sft_stuck", lambda i: 2.9), ("sft_diverges", lambda i: 3.0 - 0.02 * i if i < 80 else 1.4 + 0.03 * (i - 80)),
     (None, lambda i: 3.0 / (1 + i / 20)), (None, lambda i: 0.4)],
)  # fmt: skip
def test_an_sft_loss_that_stands_still_or_rises_is_named(name: str | None, curve: Callable[[int], float]) -> None:
    info = {**header(), "stage": "seqkd", "objective": "sft", "critic_warmup": -1}
    steps = [
        sft(Noise(i), i, 120) | {"actor/sft_loss": curve(i) * Noise(i).rng.lognormvariate(0, 0.05)} for i in range(120)
    ]
    assert faults(judged((info, steps))) == ([name] if name else [])


def test_held_out_text_that_gets_less_likely_again_is_named_with_the_step_to_go_back_to() -> None:
    info = {**header(), "stage": "seqkd", "objective": "sft", "critic_warmup": -1}
    steps = [sft(Noise(i), i, 120) for i in range(120)]
    turns: Evals = [(step, {"val/nll": 2.0 + 0.01 * abs(step - 40)}) for step in range(20, 121, 20)]
    (found,) = judged((info, steps), turns)
    assert found.name == "overfits" and found.evidence[0].since == 40 and "stop_after" in found.cures[0]
    still_falling: Evals = [(step, {"val/nll": 3.0 - 0.01 * step}) for step in range(20, 121, 20)]
    assert faults(judged((info, steps), still_falling)) == []
    one_worse: Evals = [*still_falling, (140, {"val/nll": 1.9})]
    assert faults(judged((info, steps), one_worse)) == [], "one evaluation is no trend"


def test_answers_that_stop_ending_are_named_long_before_the_mass_is_cut() -> None:
    def never_ends(n: Noise, p: float) -> Metrics:
        return {"response_length/clip_ratio": n.within(0.1 + 0.55 * p, 0.03), "response_length/mean": 150.0}

    found = judged(turn(many(120, {"max_response_length": 160}, game, 2), never_ends, onset=0.4))
    assert faults(found) == ["limit_too_low"] and "stops ending" in found[0].title


def test_a_tight_limit_is_not_cured_by_a_lower_one() -> None:
    def draw(n: Noise, i: int) -> Metrics:
        cut = {"response_length/clip_ratio": n.within(0.93, 0.03), "response_length/mean": n.around(23.5, 0.01)}
        return game(n, i, teacher=12, start=24, limit=24) | cut

    # P99 of teachers with a mean of 12 is about 18: the next multiple of 16 is above the limit of 24
    found = judged(many(40, {"max_response_length": 24}, draw, 1))[0]
    assert found.name == "length_giveaway" and found.cures == ("data.max_response_length=48",)


def test_a_symptom_that_comes_and_goes_at_its_edge_is_told_a_few_times_and_not_at_every_turn() -> None:
    edge = turn(many(400, {}, game, 1), lambda n, p: {"actor/pg_clipfrac": n.within(0.5, 0.12)}, onset=0.1)
    watching = Watch(RunFacts.of(edge[0]))
    told = [a.name for i, m in enumerate(edge[1], start=1) for a in watching.step(i, m)].count("clip_fraction")
    assert 1 <= told <= 4


def test_a_symptom_that_returns_after_a_healthy_stretch_is_told_again() -> None:
    def twice(n: Noise, i: int) -> Metrics:
        high = 40 <= i < 80 or i >= 160
        return game(n, i) | {"actor/pg_clipfrac": n.within(0.65 if high else 0.15, 0.02)}

    info, steps = many(200, {}, twice, 1)
    watching = Watch(RunFacts.of(info))
    alarms = [a for i, m in enumerate(steps, start=1) for a in watching.step(i, m) if a.name == "clip_fraction"]
    assert len(alarms) == 2 and alarms[0].step < 80 < 160 < alarms[1].step
