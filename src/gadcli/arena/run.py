"""The arena's runs: one start per seed, then every arm from it, each an ordinary `gad train` whose command is shown.

`DIR/seedS/NAME/` is a run's folder like any other; `DIR/answers/` holds the answers that arms are judged by. What is
done already is not done again, so an arena that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gadcli.arena.arms import START, Arm
from gadcli.checkpoint.manifest import latest_valid, read_trainer
from gadcli.checkpoint.retention import best_checkpoint
from gadcli.config.reading import read_override
from gadcli.config.resolve import load_resolved, resolve
from gadcli.config.rewards import RewardConfig
from gadcli.config.schema import GadConfig
from gadcli.data.split import split
from gadcli.errors import CheckpointError, ConfigError, ExitCode
from gadcli.evaluate.answers import AnswerRequest, AnswerSet, draw_answers
from gadcli.evaluate.text import Sample
from gadcli.files import write_atomic
from gadcli.launch import run_folder as folders
from gadcli.launch.display import say
from gadcli.launch.inputs import look_at
from gadcli.launch.stage import StageRequest, run_stage

SPEC_FILE = "arena.json"
UNENDING = 1_000_000
# Of an arena's every run, unless the user says otherwise: saves from which a killed one goes on, no board.
DEFAULTS = ("trainer.save_freq=20", "trainer.tensorboard.auto_start=never")
# Overridden here for each run, so no single value of the user's can stand for all of them.
OWN_KEYS = ("actor.model.path", "critic.model.path", "data.train_files", "data.val_files", "data.val_rows",
            "trainer.output_dir", "trainer.exp_name", "trainer.seed", "trainer.critic_warmup", "trainer.total_steps",
           "trainer.total_epochs", "trainer.max_time_s")  # fmt: skip


@dataclass(frozen=True)
class ArenaSpec:
    """What is compared and how. Exactly one of `seconds` (wall time of an arm's steps, its critic's warmup included)
    and `steps` is above 0; `start_epochs` bounds the start, which ends by itself at its best held-out point."""

    folder: Path
    files: tuple[str, ...]
    model: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = (1,)
    seconds: float = 0.0
    steps: int = 0
    start_epochs: int = 10
    preset: str | None = None
    config_file: Path | None = None
    overrides: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    held_out: float = 0.3
    temperatures: tuple[float, ...] = (0.0, 0.4, 0.7, 1.0)
    answers: int = 1
    measures: tuple[RewardConfig, ...] = ()
    teacher: str = ""
    quiet: bool = False

    def training(self) -> dict[str, Any]:
        """What its runs depend on, as JSON: an arena that goes on must have been begun with the same."""
        own = ("folder", "temperatures", "answers", "measures", "teacher", "quiet", "arms", "seeds")
        whole = json.loads(json.dumps(asdict(self), default=str))
        return {key: value for key, value in whole.items() if key not in own}


@dataclass
class Cost:
    """What an arm took beyond the start: seconds of steps (with its critic's warmup), steps, teacher rows read."""

    seconds: float
    steps: int
    rows: int


@dataclass
class ArmResult:
    """One arm of one seed."""

    arm: str
    seed: int
    checkpoint: Path
    cost: Cost
    commands: list[str]
    answers: list[AnswerSet] = field(default_factory=list)


class Stopped(Exception):
    """A run was interrupted; carries its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class ArenaRuns:
    """Trains and samples all arms of a spec."""

    def __init__(self, spec: ArenaSpec) -> None:
        self.spec = spec
        for word in [*spec.overrides, *(word for arm in spec.arms for word in arm.overrides)]:
            if (key := read_override(word).key) in OWN_KEYS:
                raise ConfigError(f"{key} is set by the arena for each run", "leave it out; see gad arena -h")
        self.commands: dict[tuple[int, str], str] = {}
        self.data: dict[str, tuple[str, ...]] = {}

    def run(self) -> list[ArmResult]:
        """Everything that is not there yet. Raises Stopped with the exit code of an interrupted run, and GadErrors."""
        self._claim()
        self.data = self._data_files()
        results = []
        for seed in self.spec.seeds:
            self._start(seed)
            for arm in self.spec.arms:
                self._train(seed, arm)
                results.append(self._result(seed, arm))
        for result in results:  # after all training: an engine beside none of it
            result.answers = self._answers(result)
        return results

    def _claim(self) -> None:
        """The folder is new, or this arena's own."""
        path, wanted = self.spec.folder / SPEC_FILE, self.spec.training()
        if path.exists():
            known = json.loads(path.read_text())
            if differing := [key for key in wanted if known.get(key) != wanted[key]]:
                raise ConfigError(
                    f"{self.spec.folder}: holds an arena with another {', '.join(differing)}",
                    "repeat its command to go on with it, --force moves it aside, or another -o",
                )
        elif self.spec.folder.exists() and any(self.spec.folder.iterdir()):
            raise ConfigError(f"{self.spec.folder}: holds other files", "choose another -o")
        write_atomic(path if path.parent.exists() else _made(path), json.dumps(wanted, indent=1) + "\n")

    def _data_files(self) -> dict[str, tuple[str, ...]]:
        """Training, validation (for the start's best point) and test rows; split by content where not all are given."""
        if self.spec.val and self.spec.test:
            return {"train": self.spec.files, "val": self.spec.val, "test": self.spec.test}
        folder = self.spec.folder / "data"
        if not folder.exists():
            cfg = self._config("seqkd").data
            shares = {"val": self.spec.held_out / 3, "test": self.spec.held_out * 2 / 3}
            unfinished = folder.with_name("data.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)  # of one that was killed meanwhile
            counts, _ = split(list(self.spec.files), (cfg.prompt_key, cfg.response_key), shares, unfinished)
            unfinished.rename(folder)
            self._say("rows: " + ", ".join(f"{rows:,} {name}" for name, rows in counts.items()))
        return {name: (str(folder / f"{name}.parquet"),) for name in ("train", "val", "test")}

    def _config(self, stage: str, words: Sequence[str] = ()) -> GadConfig:
        flags = {"actor.model.path": self.spec.model}
        words = merged(self.spec.overrides, words)
        return resolve(stage, self.spec.preset, self.spec.config_file, flags, words).config

    # -- runs ----------------------------------------------------------------------------------------------------------

    def _start(self, seed: int) -> None:
        """seqkd from the base to its best held-out point: where all arms begin, and an arm itself."""
        cfg = self._config("seqkd", [f"data.train_files={_list(self.data['train'])}", "data.val_rows=0"]).data
        every = max(1, (look_at(cfg).train_rows or 0) // cfg.train_batch_size // 2)
        words = [f"trainer.total_epochs={self.spec.start_epochs}", "trainer.total_steps=0",
                 f"trainer.test_freq={every}", "trainer.keep_best=val/nll", "trainer.stop_after=2"]  # fmt: skip
        self._stage(seed, START, "seqkd", [f"actor.model.path={self.spec.model}", *words])

    def _train(self, seed: int, arm: Arm) -> None:
        if not arm.stage:
            return
        words = [f"actor.model.path={self._checkpoint(seed, START)}/actor"]
        budget = self.spec.seconds
        if arm.needs_critic:
            self._warmup(seed, arm)
            warmup = self._checkpoint(seed, arm.warmup)
            words.append(f"critic.model.path={warmup}/critic")
            budget -= read_trainer(warmup)["train_seconds"]
            if self.spec.seconds and budget <= 0:
                raise ConfigError(
                    f"the warmup of {arm.name}'s critic took all of the {self.spec.seconds / 60:g} minutes",
                    "a larger --minutes",
                )
        words += [f"trainer.total_steps={self.spec.steps or UNENDING}"]
        words += [f"trainer.max_time_s={budget:.1f}"] if self.spec.seconds else []
        self._stage(seed, arm.name, arm.stage, words, arm.overrides)

    def _warmup(self, seed: int, arm: Arm) -> None:
        """The discriminator alone learns, against the start's answers: the student stays as it is."""
        steps = max(1, self._config("warmup", arm.own_critic).trainer.critic_warmup)
        words = [f"actor.model.path={self._checkpoint(seed, START)}/actor", f"trainer.total_steps={steps}",
                 f"trainer.critic_warmup={steps}"]  # fmt: skip
        self._stage(seed, arm.warmup, "warmup", words, arm.own_critic)

    def _stage(self, seed: int, name: str, stage: str, own: list[str], arm: tuple[str, ...] = ()) -> None:
        """Run one stage in its own folder; skip it if it has ended well, resume it if it was interrupted."""
        folder = self.spec.folder / f"seed{seed}" / name
        data = [f"data.train_files={_list(self.data['train'])}", f"data.val_files={_list(self.data['val'])}",
                "data.val_rows=0", f"trainer.seed={seed}"]  # fmt: skip
        words = merged(DEFAULTS, self.spec.overrides, arm, data, own)
        flags = {"trainer.output_dir": str(folder.parent), "trainer.exp_name": name}
        shown = [stage, *(["--preset", self.spec.preset] if self.spec.preset else []),
                 *(["--config", str(self.spec.config_file)] if self.spec.config_file else []),
                 "--output-dir", str(folder.parent), "--exp-name", name, *words]  # fmt: skip
        self.commands[seed, name] = f"gad train {shlex.join(shown)}"
        if folders.ended_well(folder):
            return
        resume = folders.can_resume(folder)
        self._say(f"\n$ {self.commands[seed, name]}" + (" --resume" if resume else ""))
        code = run_stage(
            StageRequest(stage, self.spec.preset, self.spec.config_file, flags, tuple(words), resume=resume,
                         quiet=self.spec.quiet, with_plan=name == START and not resume)
        )  # fmt: skip
        if code != ExitCode.OK:
            raise Stopped(code)

    def _checkpoint(self, seed: int, name: str) -> Path:
        """A run's best checkpoint where it keeps one, else its last."""
        folder = self.spec.folder / f"seed{seed}" / name
        keep_best = load_resolved(folder / "config.yaml").trainer.keep_best
        found = (best_checkpoint(folder, keep_best) if keep_best else None) or latest_valid(
            folder, self._say, deep=False
        )
        if found is None:
            raise CheckpointError(f"{folder}: no checkpoint", "gad arena --force starts anew")
        return found

    def _result(self, seed: int, arm: Arm) -> ArmResult:
        checkpoint = self._checkpoint(seed, arm.name)
        cfg, trainer = load_resolved(checkpoint.parent / "config.yaml"), read_trainer(checkpoint)
        cost = Cost(trainer["train_seconds"], trainer["step"], trainer["step"] * cfg.data.train_batch_size)
        commands = [self.commands[seed, arm.name]]
        if arm.needs_critic:
            warmup = read_trainer(self._checkpoint(seed, arm.warmup))
            batch = self._config("warmup", arm.own_critic).data.train_batch_size
            cost.seconds += warmup["train_seconds"]
            cost.rows += warmup["step"] * batch
            commands.insert(0, self.commands[seed, arm.warmup])
        return ArmResult(arm.name, seed, checkpoint, cost, commands)

    # -- answers -------------------------------------------------------------------------------------------------------

    def _answers(self, result: ArmResult) -> list[AnswerSet]:
        """The arm's answers to the test prompts at every temperature: those on disk, or drawn now."""
        cfg = load_resolved(result.checkpoint.parent / "config.yaml")
        request = AnswerRequest(
            model=str(result.checkpoint / "actor"), files=self.data["test"], temperatures=self.spec.temperatures,
            n=self.spec.answers, max_prompt_length=cfg.data.max_prompt_length,
            max_response_length=cfg.data.max_response_length, prompt_key=cfg.data.prompt_key,
            response_key=cfg.data.response_key, engine=cfg.rollout.engine, device=cfg.trainer.device,
            dtype=cfg.actor.model.dtype, max_num_seqs=cfg.rollout.max_num_seqs, seed=result.seed,
            teacher=self.spec.teacher, reads=cfg.critic.reads, template_kwargs=dict(cfg.data.template_kwargs),
        )  # fmt: skip
        path = self.spec.folder / "answers" / f"{result.arm}-seed{result.seed}.json"
        asked = json.loads(json.dumps(asdict(request)))
        if path.exists() and (known := json.loads(path.read_text()))["request"] == asked:
            return [_answer_set(found) for found in known["sets"]]
        self._say(f"gad: sampling {result.arm}, seed {result.seed}, at {len(request.temperatures)} temperatures")
        sets = draw_answers(request)
        write_atomic(_made(path), json.dumps({"request": asked, "sets": [asdict(found) for found in sets]}))
        return sets

    def _say(self, text: str) -> None:
        if not self.spec.quiet:
            say(sys.stderr, text)


def _answer_set(raw: dict[str, Any]) -> AnswerSet:
    return AnswerSet(**{**raw, "samples": [Sample(**sample) for sample in raw["samples"]]})


def merged(*layers: Sequence[str]) -> list[str]:
    """KEY=VALUE words of several layers, each key once: the last one's word."""
    return list({read_override(word).key: word for layer in layers for word in layer}.values())


def _list(files: Sequence[str]) -> str:
    return f"[{','.join(files)}]"


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
