"""Checkpoints of a Run: what goes into one, and how a run comes back from one."""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gadcli.checkpoint.manifest import read_trainer
from gadcli.config.tree import config_hash
from gadcli.distributed.world import World
from gadcli.train.async_save import host_copy
from gadcli.train.checkpoint import load_checkpoint, load_rng, save_checkpoint
from gadcli.train.model_state import model_state, optimizer_state, rng_state, set_rng_state
from gadcli.train.run import Run
from gadcli.train.steplog import StepLog


def save(run: Run) -> None:
    """Commit `global_step_N` with all that an exact resume needs, or begin to. Once a step; collective."""
    progress = run.progress
    if progress.last_saved_step == progress.step or progress.step == 0:
        return
    run.on_phase("save", progress.step)
    collect(run, wait=True)
    start = time.monotonic()
    progress.last_saved_step = progress.step
    state = _state_of(run)
    if saves_in_background(run.cfg.trainer.async_save, run.world.device.type):
        state |= {part: host_copy(state[part]) for part in ("models", "optims")}
        work = functools.partial(save_checkpoint, run.run_dir, progress.step, **state)
        run.saver.begin(progress.step, work, time.monotonic() - start)
        return
    path = save_checkpoint(run.run_dir, progress.step, **state)
    seconds = time.monotonic() - start
    run.records.event("save", f"saved {path.name} in {seconds:.1f} s", step=progress.step, seconds=seconds)


def saves_in_background(wanted: str, device: str) -> bool:
    """`trainer.async_save`: on CPUs the copy would cost the memory, and the writing the cores, that training needs."""
    return wanted == "always" or (wanted == "auto" and device == "cuda")


def collect(run: Run, *, wait: bool = False) -> None:
    """Take note of a save in the background that has ended; raises what it raised, on all ranks in the same step."""
    if wait and run.saver.busy:
        run.on_phase("save", run.progress.step)  # in which bytes written are progress
    saved = run.saver.take(wait=wait)
    if saved is not None:
        text = f"saved {saved.path.name} in {saved.seconds:.1f} s, training blocked for {saved.blocked_s:.1f} s"
        run.records.event("save", text, step=saved.step, seconds=saved.seconds, blocked_seconds=saved.blocked_s)


def _state_of(run: Run) -> dict[str, Any]:
    """What a checkpoint of this moment holds: `save_checkpoint`'s words."""
    roles = _roles(run)
    return {
        "stage": run.cfg.stage,
        "config_hash": config_hash(run.cfg),
        "models": {name: model_state(role.model) for name, role in roles.items()},
        # An optimiser that has not stepped has no moments to keep (a gigabyte of zeros for 135M parameters).
        "optims": {n: optimizer_state(r.model, r.optimizer) for n, r in roles.items() if r.optimizer.updates},
        "trainer": dataclasses.asdict(run.progress)
        | {
            "updates": {name: role.optimizer.updates for name, role in roles.items()},
            "data_fingerprint": run.train_data.fingerprint,
            "seed": run.cfg.trainer.seed,
            "batch_size": run.cfg.data.train_batch_size,
            "synced_updates": run.synced_step,
        },
        "rng": rng_state(run.world.device),
        "assets": {name: _writer_of_assets(run, name, role.model) for name, role in roles.items()},
        # Figures of other weights would make these look like the best.
        "metrics": dict(run.progress.last_eval) if run.progress.last_eval_step == run.progress.step else {},
        "keep_last": run.cfg.trainer.keep_last,
        "keep_best": run.cfg.trainer.keep_best,
    }


def restore(run: Run, path: Path) -> None:
    """Bring models, optimisers, progress and generators back to what `path` holds. Collective.

    Whether data and settings are still the same is the parent's to judge, before anything is loaded.
    """
    trainer = read_trainer(path)
    for name, role in _roles(run).items():
        role.optimizer.updates = int(trainer["updates"][name])
        state = {"model": model_state(role.model)}
        if role.optimizer.updates:
            state["optim"] = optimizer_state(role.model, role.optimizer)
        load_checkpoint(path, name, state)
    fields = {field.name for field in dataclasses.fields(run.progress)} - {"total_steps"}
    for key in fields & trainer.keys():
        setattr(run.progress, key, trainer[key])
    if (rng := load_rng(path)) is not None:
        set_rng_state(rng, run.world.device)
    if run.sampler is not None and trainer.get("synced_updates") == run.actor.optimizer.updates:
        # The sampler had these weights already, so the next step would not sync, nor report a probe.
        run.sync_sampler(run.progress.step, StepLog(run.progress.step))
    run.records.event("resume", f"resumed from {path.name}", step=run.progress.step)


def _roles(run: Run) -> dict[str, Any]:
    return {"actor": run.actor} | ({"critic": run.maybe_critic} if run.maybe_critic is not None else {})


def _writer_of_assets(run: Run, name: str, model: Any) -> Any:
    def write(folder: Path) -> None:
        for file, content in run.model_files[name].items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(content)
        adapters = getattr(model, "peft_config", None)
        if adapters:  # alpha and the base's name: a merge then needs nothing but the checkpoint itself
            base = getattr(run.cfg, name).model.path
            dataclasses.replace(adapters["default"], base_model_name_or_path=base).save_pretrained(folder)

    return write


def agree_on_checkpoint(path: Path | None, world: World) -> Path | None:
    """Rank 0's choice, everywhere."""
    if world.size == 1:
        return path
    box = [str(path) if path is not None else None]
    dist.broadcast_object_list(box, src=0)
    return Path(box[0]) if box[0] is not None else None
