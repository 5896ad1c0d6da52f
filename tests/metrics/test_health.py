"""Health and diagnoses on generated runs: each collapse is named, and nothing healthy alarms."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Literal

import pytest

from gadcli.metrics.cures import cure_for
from gadcli.metrics.diagnose import Watch, judge
from gadcli.metrics.facts import RunFacts, read_config
from gadcli.metrics.health import Alarm, HealthTracker, number
from gadcli.metrics.runlog import RunLog
from gadcli.metrics.table import METRICS
from metrics.generated import LOSSES, SYMPTOMS, Run, bend, header, healthy, write

HEALTHY = [
    *[(seed, loss, "gad") for seed, loss in enumerate(LOSSES)],
    *[(10 + seed, loss, "warmup") for seed, loss in enumerate(LOSSES)],
    *[(20 + seed, loss, "gad") for seed, loss in enumerate(LOSSES)],
    *[(30 + seed, "final", "seqkd") for seed in range(3)],
    *[(40 + seed, "final", "warmup") for seed in range(2)],
]


def watch(run: Run) -> tuple[Watch, list[Alarm]]:
    watching = Watch(RunFacts.of(run[0]))
    alarms = []
    for step, metrics in enumerate(run[1], start=1):
        alarms += watching.step(step, metrics)
    return watching, alarms


@pytest.mark.parametrize(("seed", "loss", "stage"), HEALTHY)
def test_a_healthy_run_never_alarms_at_any_step(seed: int, loss: str, stage: str) -> None:
    watching, alarms = watch(healthy(seed, loss, stage, ppo_epochs=1 + seed % 2))
    assert alarms == []
    assert [d.name for d in watching.diagnoses if d.level != "info"] == []


def test_there_are_twenty_healthy_runs() -> None:
    assert len(HEALTHY) == 20


CURES = {
    "saturated_ranking": "critic.values=last",
    "runaway_gap": "critic.loss=final",
    "no_spread": "rollout.temperature=0.8 rollout.n=8",
    "lower_hinge": "critic.loss=final",
    "length_giveaway": "data.max_response_length=256",
    "clip_fraction": "actor.clip_ratio_low=0.1 actor.clip_ratio_high=0.1",
    "raw_drift": "critic.loss=v2_raw critic.v2_raw.score_reg=0.005",
    "giveaway": "data.truncation=drop",
}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", SYMPTOMS)
def test_each_symptom_is_named_first_with_its_cure(name: str, seed: int, tmp_path: Path) -> None:
    judged = judge(write(tmp_path / "run", SYMPTOMS[name](seed)))
    first = judged.diagnoses[0]
    assert first.name == name, [(d.name, d.certainty) for d in judged.diagnoses]
    assert first.evidence and first.cause
    if name in CURES:
        assert first.level != "info" and first.cures[0] == CURES[name]
    else:
        assert first.level == "info", "no fault"


@pytest.mark.parametrize("name", [n for n in SYMPTOMS if n in CURES])
def test_each_fault_alarms_while_the_run_still_goes_on(name: str) -> None:
    run = SYMPTOMS[name](4)
    _, alarms = watch(run)
    named = [a for a in alarms if a.name == name]
    assert named and named[0].step < len(run[1]), [a.name for a in alarms]
    assert named[0].cure == CURES[name]


def test_the_runaway_is_noticed_before_half_of_the_way_to_117() -> None:
    run = SYMPTOMS["runaway_gap"](1)
    _, alarms = watch(run)
    first = next(a for a in alarms if a.name in ("critic/score_diff", "runaway_gap"))
    # 1.8 * 65^p passes 117 / 2 at p = 0.83: step 0.05 * 141 + 0.83 * 134 = 118
    assert first.step < 118


def test_the_evidence_says_since_when(tmp_path: Path) -> None:
    run = bend(healthy(5), lambda p, r: {"actor/pg_clipfrac": 0.63}, begin=0.5)  # from index 100, which is step 101
    evidence = judge(write(tmp_path / "run", run)).diagnoses[0].evidence[0]
    assert (evidence.metric, evidence.since, evidence.value) == ("actor/pg_clipfrac", 101, 0.63)


def test_the_resting_point_is_not_called_convergence_and_is_no_alarm(tmp_path: Path) -> None:
    judged = judge(write(tmp_path / "run", SYMPTOMS["resting_point"](1)))
    assert "not convergence" in judged.diagnoses[0].title
    assert all(d.level == "info" for d in judged.diagnoses)


def test_ppo_kl_zero_is_normal_on_policy_and_a_fault_with_two_epochs(tmp_path: Path) -> None:
    still = bend(healthy(6), lambda p, r: {"actor/ppo_kl": 0.0}, begin=0.0)
    names = [d.name for d in judge(write(tmp_path / "two", still)).diagnoses if d.level != "info"]
    assert names == ["policy_still"]
    normal = judge(write(tmp_path / "one", healthy(6, ppo_epochs=1))).diagnoses
    assert [(d.name, d.level) for d in normal] == [("on_policy", "info")]


def test_a_verdict_falls_back_only_inside_the_healthy_band() -> None:
    tracker = HealthTracker(RunFacts(loss="final"))
    levels = []
    # d_acc: warn above .90, healthy up to .80; between the two a raised verdict stays raised.
    for step, value in enumerate([0.7] * 20 + [0.95] * 20 + [0.85] * 30 + [0.75] * 20, start=1):
        tracker.update(step, {"critic/d_acc": value})
        levels.append(tracker.verdicts()[0].level)
    assert levels[19] == "ok" and levels[39] == "warn" and levels[69] == "warn" and levels[-1] == "ok"
    alone = HealthTracker(RunFacts(loss="final"))
    for step in range(1, 60):
        alone.update(step, {"critic/d_acc": 0.85})
    assert alone.verdicts()[0].level == "ok"


@pytest.mark.parametrize(
    ("metric", "side", "facts", "cure"),
    [("critic/score_diff", "high", RunFacts(loss="v1"), "critic.loss=final"),
     ("critic/score_diff", "high", RunFacts(loss="final", critic_lr=3e-6), "critic.optim.lr=1e-6"),
     ("critic/d_acc", "low", RunFacts(critic_lr=2e-4), "critic.optim.lr=6e-4"),
     ("critic/d_acc", "low", RunFacts(), "critic.optim.lr=3e-6"),
     ("critic/grad_norm", "low", RunFacts(values="all"), "critic.values=last"),
     ("critic/grad_norm", "low", RunFacts(values="last", loss="original"), "critic.loss=final"),
     ("critic/raw_score_diff", "high", RunFacts(loss="final"), "critic.final.score_reg=0.01"),
     ("critic/zero_std_fraction", "high", RunFacts(temperature=0.8, rollout_n=8),
      "rollout.temperature=1.0 rollout.n=16"),
     ("response_length/clip_ratio", "high", RunFacts(max_response_length=512), "data.max_response_length=256"),
     ("response_length/clip_ratio", "high", RunFacts(max_response_length=128), "data.max_response_length=256"),
     ("response_length/clip_ratio", "high", RunFacts(max_response_length=48), "data.max_response_length=96"),
     ("val/length_auc", "high", RunFacts(max_response_length=48, values="all"), "critic.values=last"),
     ("actor/grad_norm", "high", RunFacts(actor_lr=3e-5), "actor.grad_clip=1.0 actor.optim.lr=1e-5")],
)  # fmt: skip
def test_a_cure_is_not_what_the_run_does_already(
    metric: str, side: Literal["low", "high"], facts: RunFacts, cure: str
) -> None:
    assert cure_for(METRICS[metric], side, facts) == cure


def test_one_odd_step_raises_nothing_but_a_nan_does_at_once() -> None:
    tracker = HealthTracker(RunFacts(loss="final"))
    for step in range(1, 40):
        assert tracker.update(step, {"critic/score_diff": 500.0 if step == 30 else 0.1}) == []
    alarms = tracker.update(40, {"critic/d_loss": math.nan})
    assert [(a.name, a.level) for a in alarms] == [("critic/d_loss", "bad")]


def test_watching_costs_under_five_milliseconds_a_step() -> None:
    info, steps = SYMPTOMS["runaway_gap"](1)
    watching = Watch(RunFacts.of(info))
    begin = time.process_time()
    for step in range(1, 1200):
        watching.step(step, steps[step % len(steps)])
    assert (time.process_time() - begin) / 1200 < 5e-3


def test_a_length_giveaway_on_held_out_rows_is_a_warning(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", healthy(7))
    text = (folder / "metrics.jsonl").read_text()
    assert [d for d in judge(folder).diagnoses if d.level != "info"] == []
    (folder / "metrics.jsonl").write_text(text.replace('"val/length_auc": 0.55', '"val/length_auc": 0.97'))
    assert [d.name for d in judge(folder).diagnoses if d.level != "info"] == ["val/length_auc"]


def test_a_resumed_watch_goes_on_where_the_log_ended(tmp_path: Path) -> None:
    run = SYMPTOMS["clip_fraction"](1)
    log = RunLog(write(tmp_path / "run", (run[0], run[1][:100])))
    log.poll()
    resumed = Watch(RunFacts.of(run[0]))
    resumed.replay(log)
    alarms = [a for step in range(101, 110) for a in resumed.step(step, run[1][step])]
    # 6 fresh steps alone would be too few for a verdict: the replayed ones count
    assert "clip_fraction" in [a.name for a in alarms]


@pytest.mark.parametrize("missing", ["critic/", "actor/", "response_length/", "teacher_length/"])
@pytest.mark.parametrize("name", SYMPTOMS)
def test_rules_take_runs_that_do_not_measure_everything(name: str, missing: str) -> None:
    info, steps = SYMPTOMS[name](1)
    bare = {"type": "run", "start_step": 0}
    watch((bare, [{k: v for k, v in m.items() if not k.startswith(missing)} for m in steps[-40:]]))
    assert info["type"] == header()["type"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (3.6e-7, "3.6e-07"), (0.62131, "0.6213"), (117.04, "117"), (14500, "14.5k"), (1.2e6, "1.2M"),
     (math.nan, "NaN"), (None, "–"), (-167.0, "-167"), (477.6, "477.6")],
)  # fmt: skip
def test_numbers_are_short_and_readable(value: float | None, text: str) -> None:
    assert number(value) == text


def test_settings_come_from_the_config_where_the_header_lacks_them(tmp_path: Path) -> None:
    # 3e-4 without a point is text to a YAML 1.1 reader
    (tmp_path / "config.yaml").write_text("actor: {clip_ratio_high: 3e-4, ppo_epochs: 2}\ncritic: {values: all}\n")
    facts = RunFacts.of({"critic_loss": "v2", "ppo_epochs": 1}, read_config(tmp_path))
    assert (facts.clip_high, facts.values, facts.loss, facts.ppo_epochs) == (3e-4, "all", "v2", 1)
    assert read_config(tmp_path / "nowhere") is None
