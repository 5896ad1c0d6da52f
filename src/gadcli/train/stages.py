"""The stages' loops: seqkd, where the student learns the teacher's text; warmup and gad, which are one loop.

Shapes: P prompts on this rank, G answers per prompt, B = P*G rows, T the longest answer.
"""

from __future__ import annotations

import torch

from gadcli.algo.advantages import group_advantages
from gadcli.algo.kl import kl_in_reward
from gadcli.algo.mean import mean_of
from gadcli.data.batches import TokenizedRow
from gadcli.model.critic import Scores
from gadcli.model.rollout_batch import Rollout, best_groups, teacher_groups
from gadcli.train.loop import finish_step, steps
from gadcli.train.mixing import mixed_rewards
from gadcli.train.probe_set import keep_start
from gadcli.train.run import Run
from gadcli.train.steplog import StepLog


def train_seqkd(run: Run) -> None:
    """One optimiser step per batch of teacher answers; no critic exists."""
    for step, rows in steps(run):
        log = StepLog(step, run.on_phase)
        with log.phase("actor"):
            log.add(run.actor.sft_update(teacher_groups(rows)))
        finish_step(run, log, rows)


def train_adversarial(run: Run) -> None:
    """Roll out, score, judge within groups, update the critic, then (if released) the actor."""
    for step, rows in steps(run):
        log = StepLog(step, run.on_phase)
        rollout = roll_out(run, rows, log)
        scores = learn_from(run, rollout, log)
        finish_step(run, log, rows, rollout, scores)


def roll_out(run: Run, rows: list[TokenizedRow], log: StepLog) -> Rollout:
    with log.phase("sync"):
        run.sync_sampler(log.step, log)  # rollouts come from today's weights, and that is proved
    keep_start(run, log.step, log)  # what later students are compared with
    with log.phase("rollout"):
        return run.roll_out(rows, log.step, log)


def learn_from(run: Run, rollout: Rollout, log: StepLog) -> Scores:
    """The critic's update, whose own pass gives the scores; then the actor's."""
    if run.cfg.actor.objective == "best_of_n":
        return learn_from_best(run, rollout, log)
    with log.phase("critic"):
        scores, critic_log = run.critic.score_and_update(rollout)  # scores from before this update
        log.add(critic_log)
    if run.actor_learns(log.step):
        with log.phase("actor"):
            update_actor(run, rollout, scores.student_PG, log)
    else:
        log_spread(run, scores.student_PG, log)
    return scores


def learn_from_best(run: Run, rollout: Rollout, log: StepLog) -> Scores:
    """Supervised on the answer of each group that the critic ranks first; the critic itself stays as it is."""
    with log.phase("critic"):
        scores = Scores.of(torch.stack(run.critic.score(rollout.pair_groups())))
        log_spread(run, scores.student_PG, log)
    with log.phase("actor"):
        best_P, group_P = scores.student_PG.amax(-1), scores.student_PG.mean(-1)
        log.add({"actor/best_of_n_gain": mean_of(best_P - group_P)})
        log.add(run.actor.sft_update(best_groups(rollout, scores.student_PG)))
    return scores


def log_spread(run: Run, scores_PG: torch.Tensor, log: StepLog) -> None:
    """The advantages of a step in which nobody learns from them: logged all the same."""
    algorithm = run.cfg.algorithm
    precision = run.critic.precision
    log.add(group_advantages(scores_PG, algorithm.adv_estimator, sigma_min=algorithm.sigma_min, precision=precision)[1])


def update_actor(run: Run, rollout: Rollout, scores_PG: torch.Tensor, log: StepLog) -> None:
    """By its own samples and their scores, or (objective sft, the paper's warm-up) by the teacher's text."""
    cfg = run.cfg
    if cfg.actor.objective == "sft":
        log_spread(run, scores_PG, log)
        log.add(run.actor.sft_update(teacher_groups(rollout.rows)))
        return
    old_BT = ref_BT = None
    kl_coef = cfg.algorithm.kl_ctrl.kl_coef if cfg.algorithm.use_kl_in_reward else 0.0
    if kl_coef:
        old_BT = run.actor.logprobs(rollout.student_groups(), rollout.width)
    elif run.several_mini_batches:
        old_BT = run.actor.old_logprobs(rollout)
    if run.reference is not None:
        ref_BT = run.actor.logprobs(rollout.student_groups(), rollout.width, reference=run.reference)
    rewards_PG = scores_PG
    if run.rewards is not None:
        decode, clip = run.tokenizer.decode, cfg.algorithm.reward_clip
        rewards_PG = mixed_rewards(run.rewards, rollout, scores_PG, decode, clip, log)
    if kl_coef and old_BT is not None and ref_BT is not None:
        rewards_B, kl_log = kl_in_reward(rewards_PG.flatten(), old_BT, ref_BT, rollout.mask_BT(), kl_coef)
        rewards_PG = rewards_B.view_as(scores_PG)
        log.add(kl_log)
    advantages_PG, spread = group_advantages(
        rewards_PG,
        cfg.algorithm.adv_estimator,
        sigma_min=cfg.algorithm.sigma_min,
        precision=run.critic.precision,
    )
    log.add(spread)
    log.add(run.actor.update(rollout, advantages_PG, old_BT, ref_BT))
