"""`gad run`: the stages in a row, each fed by the one before, resumable as a whole. No torch.

`<output_dir>/<exp_name>/` holds `run.json` (what is done, with which result) and one folder per stage: `seqkd/`,
`warmup/`, `gad/`, each a run's folder like any other.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gadcli.checkpoint.manifest import latest_valid
from gadcli.config.checks import UNTRAINED_CRITIC
from gadcli.config.reading import read_override
from gadcli.config.resolve import resolve
from gadcli.config.schema import STAGES
from gadcli.errors import CheckpointError, ConfigError, ExitCode, GadError
from gadcli.files import write_atomic
from gadcli.launch import run_folder as folders
from gadcli.launch.display import say
from gadcli.launch.stage import Prepared, StageRequest, plan_report, prepare, run_stage, show_plan
from gadcli.launch.started_by import refuse_worlds

STATE_FILE = "run.json"
# What differs between the stages of one run, so that no single value of the user's can stand for all.
OWN_KEYS = ("trainer.output_dir", "trainer.exp_name", "actor.model.path", "critic.model.path")
PENDING, RUNNING, DONE, FAILED, STOPPED = "pending", "running", "done", "failed", "stopped"


@dataclass
class StageState:
    """What run.json knows of one stage. `checkpoint` is what the next stage starts from."""

    stage: str
    folder: str
    state: str = PENDING
    code: int | None = None
    reason: str = ""
    checkpoint: str = ""
    started: float | None = None
    ended: float | None = None


@dataclass
class WholeRun:
    """A row of stages and the folder that holds them."""

    folder: Path
    stages: list[StageState]
    command: list[str] = field(default_factory=list)

    def save(self) -> None:
        state = {"stages": [asdict(stage) for stage in self.stages], "command": self.command}
        write_atomic(self.folder / STATE_FILE, json.dumps(state, indent=2) + "\n")


def run_stages(request: StageRequest, stages: Sequence[str] = STAGES) -> int:
    """Run `stages` in their order; returns the exit code of the first that did not end with 0.

    `request.stage` is ignored. A stage that is done is skipped on --resume. Raises what the stages raise.
    """
    check_order(stages)
    notes = refuse_worlds("gad run")
    request = with_paths_as_flags(replace(request, notes=(*request.notes, *notes)))
    folder = run_folder(request, stages[0])
    whole = open_whole(folder, stages, request)
    if request.dry_run:
        return dry_run(request, whole)
    look_ahead(request, whole)
    folder.mkdir(parents=True, exist_ok=True)
    for index, stage in enumerate(whole.stages):
        if stage.state == DONE:
            say(sys.stderr, f"gad: {stage.stage} is done already ({stage.checkpoint})")
            continue
        code = run_one(request, whole, index)
        if code != ExitCode.OK:
            return code
    say(sys.stderr, f"gad: all stages are done; next: gad merge {whole.stages[-1].checkpoint}/actor -o DIR")
    return int(ExitCode.OK)


def check_order(stages: Sequence[str]) -> None:
    """ConfigError for names that are no stages, or not in their order."""
    unknown = [name for name in stages if name not in STAGES]
    if unknown or not stages:
        raise ConfigError(f"no stage named {', '.join(unknown) or '(none given)'}", f"stages are {', '.join(STAGES)}")
    if list(stages) != [name for name in STAGES if name in stages]:
        raise ConfigError(f"stages {', '.join(stages)} are not in their order", f"--stages {','.join(STAGES)}")


def with_paths_as_flags(request: StageRequest) -> StageRequest:
    """KEY=VALUE words for models and folders become flags: they change with the stage, and overrides would win."""
    settings = [read_override(word) for word in request.overrides]
    flags = {**request.flags, **{setting.key: setting.value for setting in settings if setting.key in OWN_KEYS}}
    kept = [word for word, setting in zip(request.overrides, settings, strict=True) if setting.key not in OWN_KEYS]
    return replace(request, flags=flags, overrides=tuple(kept))


def run_folder(request: StageRequest, first: str) -> Path:
    """`<output_dir>/<exp_name>`, by default named after the preset."""
    config = resolve(first, request.preset, request.config_file, dict(request.flags), list(request.overrides)).config
    name = config.trainer.exp_name or Path(config.preset).stem or "run"
    return Path(config.trainer.output_dir).expanduser() / name


def open_whole(folder: Path, stages: Sequence[str], request: StageRequest) -> WholeRun:
    """The row as it stands: fresh, or as run.json left it. Refuses what --resume or --force would have to allow."""
    fresh = [StageState(name, str(folder / name)) for name in stages]
    path = folder / STATE_FILE
    if not path.exists():
        if request.resume:
            raise ConfigError(f"{folder}: no run to resume", "without --resume this starts one")
        return WholeRun(folder, fresh, sys.argv[1:])
    if request.resume:
        return WholeRun(folder, merge_states(read_states(path), fresh), sys.argv[1:])
    if not request.force:
        raise ConfigError(
            f"{folder}: holds a run of several stages already",
            "--resume goes on with it, --force moves it aside and starts anew, or another --exp-name",
        )
    if not request.dry_run:
        say(sys.stderr, f"gad: moved the run that was there to {folders.move_aside(folder)}")
    return WholeRun(folder, fresh, sys.argv[1:])


def read_states(path: Path) -> list[StageState]:
    """The stages of a run.json; CheckpointError when it cannot be read."""
    try:
        return [StageState(**stage) for stage in json.loads(path.read_text())["stages"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})", "--force moves this run aside") from error


def merge_states(known: Sequence[StageState], wanted: Sequence[StageState]) -> list[StageState]:
    """What is known of the wanted stages. After the first that is not done nothing counts as done."""
    by_name = {stage.stage: stage for stage in known}
    merged = []
    intact = True
    for stage in wanted:
        found = by_name.get(stage.stage, stage)
        intact = intact and found.state == DONE
        merged.append(found if intact or found.state != DONE else replace(found, state=PENDING))
    return merged


# -- one stage ---------------------------------------------------------------------------------------------------------


def run_one(request: StageRequest, whole: WholeRun, index: int) -> int:
    """Run one stage of the row and note how it ended; its errors go on to the caller."""
    stage = whole.stages[index]
    stage.state, stage.started, stage.ended, stage.reason = RUNNING, time.time(), None, ""
    whole.save()
    say(sys.stderr, f"gad: stage {index + 1} of {len(whole.stages)}: {stage.stage}")
    try:
        stage.code = run_stage(stage_request(request, whole, index))
        if stage.code == ExitCode.OK:
            stage.checkpoint = str(last_checkpoint(Path(stage.folder)))
    except GadError as error:
        stage.code, stage.reason = int(error.exit_code), error.message
        raise
    finally:
        stage.state = DONE if stage.checkpoint and stage.code == ExitCode.OK else FAILED
        if stage.code in (ExitCode.INTERRUPTED, ExitCode.TERMINATED):
            stage.state = STOPPED
        stage.ended = time.time()
        whole.save()
    return stage.code


def stage_request(request: StageRequest, whole: WholeRun, index: int) -> StageRequest:
    """The stage as a request of its own: its folder, and the models of the stage before where there is one."""
    stage = whole.stages[index]
    folder = Path(stage.folder)
    flags = dict(request.flags)
    flags["trainer.output_dir"], flags["trainer.exp_name"] = str(folder.parent), folder.name
    if index > 0:
        flags |= inherited(whole.stages[index - 1], flags)
    if stage.stage == "seqkd":
        flags.pop("critic.model.path", None)
    begun = folders.can_resume(folder)
    return replace(request, stage=stage.stage, flags=flags, resume=request.resume and begun)


def inherited(before: StageState, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Where a stage's models come from: the student always, the discriminator once there has been one."""
    models: dict[str, Any] = {"actor.model.path": f"{before.checkpoint}/actor"}
    if before.stage != "seqkd":
        models["critic.model.path"] = f"{before.checkpoint}/critic"
    return models


def last_checkpoint(folder: Path) -> Path:
    """What a finished stage leaves to the next; CheckpointError when there is nothing whole."""
    found = latest_valid(folder, warn, deep=False)
    if found is None:
        raise CheckpointError(f"{folder}: the stage ended without a checkpoint", f"see {folder / 'logs'}")
    return found


def warn(line: str) -> None:
    say(sys.stderr, f"warning: {line}")


def look_ahead(request: StageRequest, whole: WholeRun) -> None:
    """Judge every stage that has not begun: what the last one refuses should not be learnt after hours of the first."""
    for stage in whole.stages:
        if stage.state != DONE and not folders.can_resume(Path(stage.folder)):
            prepare(on_its_own(request, stage))


def dry_run(request: StageRequest, whole: WholeRun) -> int:
    """Every stage's plan; as JSON one list of them."""
    requests = [on_its_own(request, stage) for stage in whole.stages]
    prepared = [prepare(own) for own in requests]
    for before, stage in zip(whole.stages, prepared[1:], strict=False):
        expect_models_of(before.stage, stage)
    if request.as_json:
        reports = [plan_report(stage) for stage in prepared]
        say(sys.stdout, json.dumps(reports, indent=2, ensure_ascii=False))
        return int(ExitCode.OK)
    for own, stage in zip(requests, prepared, strict=True):
        show_plan(stage, own)
    return int(ExitCode.OK)


def expect_models_of(before: str, stage: Prepared) -> None:
    """Say in a stage's plan that it will start from what the stage before leaves, and not that it has no such thing."""
    unusual = stage.plan.unusual
    if before != "seqkd" and UNTRAINED_CRITIC in unusual:
        unusual.remove(UNTRAINED_CRITIC)
    models = "student" if before == "seqkd" else "student and discriminator"
    unusual.append(f"starts from the {models} that {before} leaves; sizes are those of the base model")


def on_its_own(request: StageRequest, stage: StageState) -> StageRequest:
    """A stage as a request, with the base standing in for models that the stage before has yet to make."""
    folder = Path(stage.folder)
    flags = {**request.flags, "trainer.output_dir": str(folder.parent), "trainer.exp_name": folder.name}
    if stage.stage == "seqkd":
        flags.pop("critic.model.path", None)
    return replace(request, stage=stage.stage, flags=flags, resume=request.resume and folders.can_resume(folder))
