"""Builds a Run from a resolved config, in the order that the engines demand, and closes it again."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gadcli.chat.thinking import AnswerReader
from gadcli.chat.tokenize import ChatTokenizer, load_tokenizer
from gadcli.checkpoint.hub_files import trained_files
from gadcli.checkpoint.resolve_model import resolve_model
from gadcli.config.memory import needs_reference
from gadcli.config.rewards import reward_specs
from gadcli.config.schema import GadConfig
from gadcli.data.batches import Dataset, count_overlap, open_dataset
from gadcli.data.order import BatchOrder
from gadcli.data.tokens import Style
from gadcli.distributed.fsdp import resolve_dtype, shard
from gadcli.distributed.signals import StopFlag
from gadcli.distributed.world import World, init_world
from gadcli.errors import ConfigError, DataError
from gadcli.model.actor import Actor, Reference
from gadcli.model.critic import Critic
from gadcli.model.loading import load_actor, load_critic
from gadcli.model.optim import Optimizer
from gadcli.rewards.build import RewardSet
from gadcli.rollout.build import build_sampler
from gadcli.rollout.weight_sync import make_probe
from gadcli.train.records import Records
from gadcli.train.run import Progress, Run
from gadcli.train.saving import agree_on_checkpoint, restore


def build_run(cfg: GadConfig, run_dir: Path, *, resume_from: Path | None) -> Run:
    """Load data, models and sampler. The process group comes first: an engine made before it would train alone."""
    stop = StopFlag()
    stop.install()
    world = init_world(cfg.trainer.device, cfg.fsdp)
    started = time.monotonic()
    critic_path = _resolve_ahead(cfg.critic.model.path if cfg.trainer.critic_warmup >= 0 else "", world, "critic")
    actor_path = _resolve_together(cfg.actor.model.path, world)
    tokenizer = load_tokenizer(actor_path)
    chat = ChatTokenizer.of(tokenizer, actor_path, cfg.data.template_kwargs)
    train_data, val_data = _open_data(cfg, chat)
    notes = data_notes(cfg, train_data, val_data)
    # Read now, not when the first checkpoint is written: what cannot be saved must fail before training.
    model_files = {
        "actor": trained_files(Path(actor_path), critic=False, ends=chat.end_ids, num_layers=cfg.actor.model.num_layers)
    }
    order = BatchOrder(len(train_data), cfg.data.train_batch_size, cfg.trainer.seed, cfg.data.shuffle)
    progress = Progress(total_steps=cfg.trainer.total_steps or cfg.trainer.total_epochs * order.steps_per_epoch)
    resume_from = agree_on_checkpoint(resume_from, world)
    records = Records(cfg, run_dir, world, start_step=_step_of(resume_from))
    records.status("load", _step_of(resume_from), state="starting")
    for note in notes:
        records.event("note", note, level="warn", step=_step_of(resume_from))

    actor = _build_actor(cfg, actor_path, world, progress, records)
    critic = None
    if cfg.trainer.critic_warmup >= 0:
        path = critic_path() if cfg.critic.model.path else actor_path
        model_files["critic"] = trained_files(
            Path(path), critic=True, ends=chat.end_ids, num_layers=cfg.critic.model.num_layers
        )
        critic = _build_critic(cfg, path, actor_path, world, progress, records, resumed=resume_from is not None)
    reference = _build_reference(cfg, actor_path, actor.model, world)
    sampler = None
    if cfg.stage != "seqkd" or cfg.actor.objective == "soda" or val_data is not None:
        sampler = build_sampler(  # every rollout follows a sync, so the folder's weights need not be read again
            cfg.rollout, actor_path, world, eos_ids=chat.end_ids, dtype=cfg.actor.model.dtype, seed=cfg.trainer.seed,
            weights=False,
        )  # fmt: skip
        stop.install()
    row = train_data[0]
    probe = make_probe(
        row.prompt_ids + row.teacher_ids, cfg.rollout.sync_tolerance, resolve_dtype(cfg.actor.model.dtype, world.device)
    )
    run = Run(
        cfg=cfg, run_dir=run_dir, world=world, tokenizer=tokenizer, eos_ids=chat.end_ids, train_data=train_data,
        val_data=val_data, order=order, actor=actor, sampler=sampler, probe=probe, records=records, stop=stop,
        progress=progress, reference=reference, maybe_critic=critic,
        read=AnswerReader(cfg.critic.reads, chat.decode),
    )  # fmt: skip
    run.model_files = model_files
    run.saver.timeout_s = cfg.fsdp.timeout_s
    if cfg.rewards and cfg.stage != "seqkd":
        run.rewards = RewardSet(reward_specs(cfg.rewards), run_dir / "rewards", world.rank)
    if resume_from is not None:
        restore(run, resume_from)
    if run.sampler is not None:
        run.sampler.sleep()  # seqkd may train for hours before an evaluation needs it
    _announce(run, resume_from, time.monotonic() - started)
    return run


def _resolve_ahead(path: str, world: World, role: str) -> Callable[[], str]:
    """Begins to convert `path` in a thread of rank 0 (mostly hashing and writing); what it returns waits for it."""
    if not (path and world.is_main):
        return lambda: _resolve_together(path, world, role)
    thread = ThreadPoolExecutor(1, thread_name_prefix=f"convert-{role}")
    folder = thread.submit(resolve_model, path, role=role)
    thread.shutdown(wait=False)
    return lambda: _resolve_together(path, world, role, folder)


def _resolve_together(path: str, world: World, role: str = "actor", ahead: Future[Path] | None = None) -> str:
    """The Hugging Face folder behind `path`; rank 0 converts (or has begun to), the others then find it done."""
    if not world.is_main:
        dist.barrier()
    folder = str(ahead.result() if ahead else resolve_model(path, role=role))
    if world.is_main and world.size > 1:
        dist.barrier()
    return folder


def _open_data(cfg: GadConfig, tokenizer: ChatTokenizer) -> tuple[Dataset, Dataset | None]:
    style, each = Style.of(cfg), cfg.stage == "seqkd" and cfg.actor.objective == "sft"
    train = open_dataset(
        cfg.data.train_files, tokenizer, cfg.data, cfg.rollout.max_model_len, "train", style=style, each_answer=each
    )
    if not (cfg.data.val_files or cfg.data.val_rows):
        return train, None
    style = replace(style, turns="last")  # what is sampled and judged is the answer to the whole prompt
    return train, open_dataset(cfg.data.val_files, tokenizer, cfg.data, cfg.rollout.max_model_len, "val", style=style)


def data_notes(cfg: GadConfig, train: Dataset, val: Dataset | None) -> list[str]:
    """What the data's checks noticed, and training prompts that are also held out. DataError for those if strict."""
    notes = [f"training data: {line}" for line in train.warnings]
    if val is None:
        return notes
    if val.folder != train.folder:
        notes += [f"held-out data: {line}" for line in val.warnings]
    shared = count_overlap(train, val)
    if shared:
        message = f"{shared} training rows have a prompt that is also held out: held-out figures will flatter"
        if cfg.data.strict:
            raise DataError(message, "give other data.val_files, or leave them empty and set data.val_rows")
        notes.append(message)
    return notes


def _build_actor(cfg: GadConfig, path: str, world: World, progress: Progress, records: Records) -> Actor:
    loaded = load_actor(path, cfg.actor.model, cfg.trainer.seed)
    _say_if_unshared(loaded, records)
    model = shard(loaded, world, cfg.fsdp, cfg.actor.model.dtype)
    return Actor(
        model,
        Optimizer(model, cfg.actor.optim, cfg.actor.grad_clip, _actor_updates(cfg, progress)),
        cfg.actor,
        world,
        cfg.rollout.temperature,
        cfg.data.max_response_length,
    )


def _actor_updates(cfg: GadConfig, progress: Progress) -> int:
    """Optimiser steps the actor's schedule spans."""
    steps = progress.total_steps - max(0, cfg.trainer.critic_warmup)
    if cfg.actor.objective != "policy":
        return max(1, steps)
    size = cfg.actor.ppo_mini_batch_size or cfg.data.train_batch_size
    return max(1, steps * cfg.actor.ppo_epochs * (cfg.data.train_batch_size // size))


def _build_critic(
    cfg: GadConfig, path: str, actor_path: str, world: World, progress: Progress, records: Records, *, resumed: bool
) -> Critic:
    penalty = cfg.critic.gradient_penalty > 0
    loaded = load_critic(path, cfg.critic.model, cfg.trainer.seed, twice_differentiable=penalty)
    _say_if_unshared(loaded.model, records)
    if loaded.fresh_head and cfg.stage == "gad" and not resumed:  # a resumed head comes from the checkpoint
        records.event(
            "note",
            f"{path} has no scalar head: an untrained discriminator's scores are noise; run the warmup stage first",
            level="warn",
            step=0,
        )
    model = shard(loaded.model, world, cfg.fsdp, cfg.critic.model.dtype, offload=cfg.fsdp.offload_critic)
    if model.config.vocab_size != _vocabulary(actor_path):
        raise ConfigError(
            f"student and critic have different vocabularies: {_vocabulary(actor_path)} and {model.config.vocab_size}",
            "they must share a tokenizer",
        )
    size = cfg.critic.ppo_mini_batch_size or cfg.data.train_batch_size
    updates = progress.total_steps * (cfg.data.train_batch_size // size)
    return Critic(model, Optimizer(model, cfg.critic.optim, cfg.critic.grad_clip, updates), cfg.critic, world)


def _say_if_unshared(model: Any, records: Records) -> None:
    if model.gad_note:
        records.event("note", model.gad_note, level="warn", step=0)


def _vocabulary(path: str) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(path).vocab_size)


def _build_reference(cfg: GadConfig, actor_path: str, actor_model: Any, world: World) -> Reference | None:
    """The frozen start, where a KL asks for it; with LoRA it is the actor with its adapters off."""
    if cfg.stage == "seqkd" or not needs_reference(cfg):
        return None
    if cfg.actor.model.lora.rank:
        return Reference(actor_model, adapters=True)
    model = load_actor(actor_path, cfg.actor.model, trainable=False)
    return Reference(shard(model, world, cfg.fsdp, cfg.actor.model.dtype, offload=cfg.fsdp.offload_reference), False)


def _step_of(path: Path | None) -> int:
    return int(path.name.rpartition("_")[2]) if path is not None else 0


def _announce(run: Run, resume_from: Path | None, seconds: float) -> None:
    cfg = run.cfg
    batch = cfg.data.train_batch_size
    run.records.run(
        stage=cfg.stage, exp_name=cfg.trainer.exp_name, preset=cfg.preset, total_steps=run.progress.total_steps,
        start_step=run.progress.step, critic_loss=cfg.critic.loss if run.maybe_critic is not None else None,
        critic_warmup=cfg.trainer.critic_warmup, ppo_epochs=cfg.actor.ppo_epochs,
        mini_batches=max(1, batch // (cfg.actor.ppo_mini_batch_size or batch)),
        max_response_length=cfg.data.max_response_length, objective=cfg.actor.objective, rollout_n=cfg.rollout.n,
        world_size=run.world.size, resumed=resume_from is not None, model=cfg.actor.model.path,
        critic_values=cfg.critic.values, sampler=run.sampler.name if run.sampler is not None else None,
        train_rows=len(run.train_data), val_rows=len(run.val_data) if run.val_data is not None else 0,
        load_seconds=seconds,
    )  # fmt: skip


def close_run(run: Run) -> None:
    """Shut the engine down; it takes the process group with it, so all ranks come here together."""
    if dist.get_world_size() > 1:
        dist.barrier()
    if run.rewards is not None:
        run.rewards.close()
    if run.sampler is not None:
        run.sampler.close()
    if dist.is_initialized():
        dist.destroy_process_group()
