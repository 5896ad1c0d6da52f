"""One stage from the command line to its exit code, in a process that knows no torch.

Resolve the config, look at the data, print the plan, take the folder, start the workers, draw, say how it ended.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gadcli.checkpoint.embedded_model import embedded_or
from gadcli.config.checks import check, check_inputs
from gadcli.config.machine import free_disk_gb, gpus, pick_device, pick_engine, ram_gb
from gadcli.config.model_refusals import try_models
from gadcli.config.modelinfo import local_model_dir, read_model_config
from gadcli.config.plan import Plan, make_plan
from gadcli.config.resolve import Resolved, resolve
from gadcli.config.rewards import reward_specs
from gadcli.config.schema import GadConfig
from gadcli.errors import ConfigError, ExitCode
from gadcli.launch import run_folder as folders
from gadcli.launch.display import make_display, say
from gadcli.launch.environment import gpu_count, processes_here
from gadcli.launch.foreground import supervise
from gadcli.launch.inputs import check_model_path, look_at, make_lineage
from gadcli.launch.outcome import Outcome, as_error, shown_tail
from gadcli.launch.supervisor import WORKER_MODULE, LaunchSpec
from gadcli.launch.tensorboard import TensorBoard, wanted


@dataclass(frozen=True)
class StageRequest:
    """What the command line asks of one stage."""

    stage: str
    preset: str | None = None
    config_file: Path | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    dry_run: bool = False
    resume: bool = False
    force: bool = False
    as_json: bool = False
    quiet: bool = False
    with_plan: bool = True
    keep_tensorboard: bool = False
    node_rank: int | None = None
    rdzv_endpoint: str = ""
    max_restarts: int = 0
    worker_module: str = WORKER_MODULE
    is_rank: bool = False  # somebody else's launcher started this process as one rank of its world
    notes: tuple[str, ...] = ()  # of how this process was started, for the user


@dataclass(frozen=True)
class Prepared:
    """All that is known before anything is written: config, folder, plan, lineage, world, what to tell the user."""

    resolved: Resolved
    run_dir: Path
    plan: Plan
    lineage: dict[str, Any]
    nproc: int
    notes: list[str]

    @property
    def config(self) -> GadConfig:
        return self.resolved.config


def run_stage(request: StageRequest) -> int:
    """Run one stage; returns the exit code of a run that went as asked (0, 130, 143).

    Raises GadError with the documented code for everything else.
    """
    prepared = prepare(request)
    show_plan(prepared, request)
    if request.dry_run:
        return int(ExitCode.OK)
    return launch(prepared, request)


def prepare(request: StageRequest) -> Prepared:
    """Everything that can be known and refused beforehand. Writes nothing, loads no model."""
    request = with_runs_own_config(request)
    resolved = resolve(request.stage, request.preset, request.config_file, dict(request.flags), list(request.overrides))
    config = resolved.config
    for model in (config.actor.model, config.critic.model):
        model.path = embedded_or(model.path, convert=not request.dry_run)
    if not request.dry_run:
        check_inputs(config)
    for role, model in (("actor", config.actor.model), ("critic", config.critic.model)):
        check_model_path(model.path, role=role, dry_run=request.dry_run)
    device, engine = pick_device(config.trainer.device), pick_engine(config.rollout.engine)
    nproc = processes_here(config.trainer.nproc, device)
    world = nproc * config.trainer.nnodes
    if device == "cuda" and not request.is_rank and nproc > (here := gpu_count()) > 0:
        raise ConfigError(f"trainer.nproc is {nproc}, and {here} GPUs are visible here", f"trainer.nproc={here}")
    if config.trainer.nnodes > 1 and not request.rdzv_endpoint and not request.dry_run:
        raise ConfigError(
            f"trainer.nnodes={config.trainer.nnodes} needs --rdzv-endpoint and --node-rank",
            "--rdzv-endpoint HOST:PORT of the first machine, --node-rank 0, 1, … on each (under SLURM: srun gad …)",
        )
    warnings = check(config, world, resolved.origins)
    if request.dry_run:  # a real run's workers say the same themselves
        warnings += try_models(config)
    run_dir = folders.run_dir_of(config)
    data = look_at(config.data)
    warnings += data.notes
    if data.train_files and (folder := local_model_dir(config.actor.model.path)) is not None:
        from gadcli.data.preview import preview_in_a_child

        warnings += preview_in_a_child(config, folder, wait=request.dry_run)
    if config.rewards and config.stage != "seqkd":
        from gadcli.rewards.trivial import reward_notes  # only here: it brings pyarrow into this process

        warnings += reward_notes(reward_specs(config.rewards), config.data)
    lineage = make_lineage(config, [*data.train_files, *data.val_files])
    helper = bool(request.node_rank)  # another machine's parent answers for the folder
    notes = folders.check_free(
        run_dir, resolved, lineage, resume=request.resume and not helper, force=request.force or helper
    )
    critic_path = config.critic.model.path or config.actor.model.path
    plan = make_plan(
        config, data.train_rows, read_model_config(config.actor.model.path), read_model_config(critic_path), world,
        device=device, engine=engine, warnings=warnings, origins=resolved.origins, free_gb=free_here(run_dir, device),
        answers=data.train_answers,
    )  # fmt: skip
    return Prepared(resolved, run_dir, plan, lineage, nproc, [*request.notes, *notes])


def free_here(run_dir: Path, device: str) -> dict[str, float]:
    """What this machine has, in GiB: free RAM, free disk where the run goes, one GPU's memory."""
    free = {"ram": ram_gb()[1], "disk": free_disk_gb(run_dir)}
    if device == "cuda" and (known := [gpu.total_gb for gpu in gpus() if gpu.total_gb is not None]):
        free["device"] = min(known)
    return free


def with_runs_own_config(request: StageRequest) -> StageRequest:
    """--resume without preset or config file means the run's own config.yaml."""
    if not request.resume or request.preset or request.config_file:
        return request
    named = resolve(request.stage, None, None, dict(request.flags), list(request.overrides)).config
    own = folders.run_dir_of(named) / folders.CONFIG_FILE
    if not named.trainer.exp_name or not own.is_file():
        raise ConfigError("--resume needs the run's name", "--exp-name of the run, or the --preset it was started with")
    return replace(request, config_file=own)


def show_plan(prepared: Prepared, request: StageRequest) -> None:
    """The plan on stderr, or on stdout when it is what was asked for."""
    stream = sys.stdout if request.dry_run else sys.stderr
    if request.as_json and request.dry_run:
        import json

        say(stream, json.dumps(plan_report(prepared), indent=2, ensure_ascii=False))
        return
    if not request.quiet and request.with_plan:
        for line in prepared.plan.render():
            say(stream, line)
        if request.dry_run:
            say(stream, "dry run: nothing was loaded or written")
    for note in prepared.notes:
        say(sys.stderr, f"warning: {note}")


def plan_report(prepared: Prepared) -> dict[str, Any]:
    """What --dry-run --json prints of one stage."""
    return {"plan": prepared.plan.to_json(), "run_dir": str(prepared.run_dir), "notes": prepared.notes}


def launch(prepared: Prepared, request: StageRequest) -> int:
    """Take the folder, run the workers to their end, tell it."""
    run_dir = prepared.run_dir
    if request.node_rank:  # the first machine's parent writes; this one only starts its share of the workers
        folders.open_folder(run_dir)
        return tell(attempts(prepared, request), request, run_dir)
    take_folder(prepared, request)
    with folders.folder_lock(run_dir):
        folders.write_run_files(run_dir, prepared.resolved, prepared.plan.to_json(), prepared.lineage)
        outcome = attempts(prepared, request)
    return tell(outcome, request, run_dir)


def take_folder(prepared: Prepared, request: StageRequest) -> None:
    """Make the folder ours: what --force displaces is moved aside, what --resume goes on with stays."""
    run_dir = prepared.run_dir
    if folders.holds_run(run_dir) and not request.resume:
        with folders.folder_lock(run_dir):  # not under a living run
            aside = folders.move_aside(run_dir)
        say(sys.stderr, f"gad: moved the run that was there to {aside}")
    folders.open_folder(run_dir)


def attempts(prepared: Prepared, request: StageRequest) -> Outcome:
    """Launch; after a lost peer launch again from the last checkpoint, as often as --max-restarts allows."""
    config, run_dir = prepared.config, prepared.run_dir
    spec = LaunchSpec(
        run_dir, prepared.nproc, config.trainer.nnodes, request.node_rank or 0, request.rdzv_endpoint, request.resume,
        config.fsdp.timeout_s, request.max_restarts, request.worker_module,
    )  # fmt: skip
    quiet = request.quiet or bool(request.node_rank)  # one machine's picture is enough
    display = make_display(run_dir, as_json=request.as_json, quiet=quiet)
    tensorboard = tensorboard_of(config, run_dir, request) if not request.node_rank else None
    outcome = supervise(spec, display, tensorboard)
    left = request.max_restarts if spec.nnodes == 1 else 0  # on several machines torch's launcher restarts
    while outcome.code == ExitCode.PEERS and left > 0:
        left -= 1
        say(sys.stderr, f"gad: {outcome.message}; starting again from the last checkpoint ({left} restarts left)")
        display = make_display(run_dir, as_json=request.as_json, quiet=request.quiet)
        outcome = supervise(replace(spec, resume=True), display, tensorboard)
    return outcome


def tensorboard_of(config: GadConfig, run_dir: Path, request: StageRequest) -> TensorBoard | None:
    """The TensorBoard this stage wants, not yet started."""
    if not wanted(config):
        return None
    settings = config.trainer.tensorboard
    keep = settings.keep or request.keep_tensorboard
    log = run_dir / "logs" / "tensorboard.log"
    return TensorBoard(run_dir / "tensorboard", log, settings.host, settings.port, keep)


def tell(outcome: Outcome, request: StageRequest, run_dir: Path) -> int:
    """Say how a run ended: nothing more on success, one line when stopped, a raised error with the log's end else."""
    if outcome.code == ExitCode.OK:
        if not request.quiet:
            say(sys.stderr, f"gad: {request.stage} is done: {run_dir}")
        return int(ExitCode.OK)
    if outcome.code in (ExitCode.INTERRUPTED, ExitCode.TERMINATED):
        say(sys.stderr, f"gad: stopped: {outcome.message or 'saved'}; --resume goes on")
        return outcome.code
    for line in shown_tail(outcome):
        say(sys.stderr, line)
    raise as_error(outcome)
