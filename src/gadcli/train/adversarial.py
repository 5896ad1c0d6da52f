"""Stages warmup and gad, which are one loop: the critic learns at every step, the actor once it is released.

Shapes: P prompts on this rank, G answers a prompt, B = P*G rows, T the longest answer.
"""

from __future__ import annotations

import torch

from gadcli.algo.advantages import group_advantages
from gadcli.algo.kl import kl_in_reward
from gadcli.engine.rows import Rollout, teacher_groups
from gadcli.train.probe_set import keep_start
from gadcli.train.run import Run
from gadcli.train.steplog import StepLog


def train_adversarial(run: Run) -> None:
    """Roll out, score, judge within groups, update the critic, then (if released) the actor."""
    for step, rows in run.steps():
        log = StepLog(step, run.on_phase)
        with log.phase("sync"):
            run.sync_sampler(step, log)  # rollouts come from today's weights, and that is proved
        keep_start(run, step, log)  # what later students are compared with
        with log.phase("rollout"):
            rollout = run.roll_out(rows, step, log)
        with log.phase("critic"):
            scores, critic_log = run.critic.score_and_update(rollout)  # scores from before this update
            log.add(critic_log)
        if run.actor_learns(step):
            with log.phase("actor"):
                update_actor(run, rollout, scores.student_PG, log)
        else:
            algorithm = run.cfg.algorithm
            log.add(group_advantages(scores.student_PG, algorithm.adv_estimator, sigma_min=algorithm.sigma_min)[1])
        run.finish_step(log, rows, rollout, scores)


def update_actor(run: Run, rollout: Rollout, scores_PG: torch.Tensor, log: StepLog) -> None:
    """By its own samples and their scores, or (objective sft, the paper's warm-up) by the teacher's text."""
    cfg = run.cfg
    if cfg.actor.objective == "sft":
        log.add(group_advantages(scores_PG, cfg.algorithm.adv_estimator, sigma_min=cfg.algorithm.sigma_min)[1])
        log.add(run.actor.sft_update(teacher_groups(rollout.rows)))
        return
    old_BT = ref_BT = None
    if run.several_mini_batches or cfg.algorithm.use_kl_in_reward:
        old_BT = run.actor.logprobs(rollout.student_groups(), rollout.width)
    if run.reference is not None:
        ref_BT = run.actor.logprobs(rollout.student_groups(), rollout.width, reference=run.reference)
    rewards_PG = scores_PG
    if cfg.algorithm.use_kl_in_reward and old_BT is not None and ref_BT is not None:
        rewards_B, kl_log = kl_in_reward(
            scores_PG.flatten(), old_BT, ref_BT, rollout.mask_BT(), cfg.algorithm.kl_ctrl.kl_coef
        )
        rewards_PG = rewards_B.view_as(scores_PG)
        log.add(kl_log)
    advantages_PG, spread = group_advantages(rewards_PG, cfg.algorithm.adv_estimator, sigma_min=cfg.algorithm.sigma_min)
    log.add(spread)
    log.add(run.actor.update(rollout, advantages_PG, old_BT, ref_BT))
