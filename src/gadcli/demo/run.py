"""The demo: three stages on the embedded default, a control beside them, merge, and a table. No torch in this process.

Every part is what a user would type; its command is shown before it runs. What is done already is not done again, so
a demo that was killed goes on where it stopped.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from gadcli.checkpoint.embedded_model import ensure_demo_model
from gadcli.checkpoint.manifest import latest_valid, read_trainer
from gadcli.demo.report import StageResult, read_result, render
from gadcli.errors import CheckpointError, ExitCode, GadError
from gadcli.launch import run_folder as folders
from gadcli.launch.display import say
from gadcli.launch.environment import with_bytecode
from gadcli.launch.pipeline import warn
from gadcli.launch.stage import StageRequest, run_stage

QUICK_EVERYWHERE = ["data.val_rows=12", "rollout.kv_cache_gb=0.25"]
QUICK = {
    "seqkd": ["trainer.total_steps=3", "data.train_batch_size=8"],
    "warmup": ["trainer.total_steps=1", "trainer.critic_warmup=1", "data.train_batch_size=2", "rollout.n=4"],
    "gad": ["trainer.total_steps=2", "data.train_batch_size=1", "rollout.n=4"],
    "control": ["data.train_batch_size=8"],
}
HELD_OUT = "data.val_rows=200"
UNENDING = "trainer.total_steps=100000"


@dataclass
class Demo:
    """Where the demo lives and what it was asked for."""

    folder: Path
    quick: bool = False
    quiet: bool = False
    results: list[StageResult] = field(default_factory=list)

    def run(self) -> int:
        """All of it; returns the exit code of the first part that did not end with 0."""
        model = ensure_demo_model()
        files = self._data_files()
        if not (self.folder / "seqkd").exists():
            self._command("data", "analyze-tokens", str(files["train"]), "-t", str(model), "--preset", "demo")
        for part in (lambda: self._seqkd(str(model)), self._warmup, self._gad, self._control):
            code = part()
            if code != ExitCode.OK:
                return code
        merged = self.folder / "merged"
        if not merged.exists():
            self._command("merge", self._checkpoint("gad", "actor"), "-o", str(merged))
        self.results = [read_result(self.folder / name, name) for name in ("seqkd", "warmup", "gad", "control")]
        say(sys.stdout, render(self.results, merged))
        return int(ExitCode.OK)

    def _seqkd(self, model: str) -> int:
        return self._stage("seqkd", "seqkd", {"actor.model.path": model}, ["trainer.val_before_train=true"])

    def _warmup(self) -> int:
        return self._stage("warmup", "warmup", {"actor.model.path": self._checkpoint("seqkd", "actor")}, [])

    def _gad(self) -> int:
        models = {f"{role}.model.path": self._checkpoint("warmup", role) for role in ("actor", "critic")}
        return self._stage("gad", "gad", models, [])

    def _control(self) -> int:
        """The seqkd student, supervised on for the wall time that warmup and gad took together."""
        limit = [UNENDING, f"trainer.max_time_s={self._adversarial_seconds():.0f}", "trainer.seed=4"]
        return self._stage("control", "seqkd", {"actor.model.path": self._checkpoint("seqkd", "actor")}, limit)

    def _data_files(self) -> dict[str, Path]:
        folder = self.folder / "data"
        names = {name: folder / f"{name}.parquet" for name in ("train", "val", "test")}
        if not all(path.exists() for path in names.values()):
            say(sys.stderr, "gad: writing the demo's data from the docstrings of Python's own standard library")
            self._process("gadcli.demo.docstring_data", str(folder))
        return names

    def _stage(self, name: str, stage: str, models: dict[str, str], extra: list[str]) -> int:
        """Run one stage in its own folder; skip it if it has ended well, resume it if it was interrupted."""
        folder = self.folder / name
        if folders.ended_well(folder):
            return int(ExitCode.OK)
        data = {"data.train_files": f"[{self.folder / 'data' / 'train.parquet'}]",
                "data.val_files": f"[{self.folder / 'data' / 'test.parquet'}]"}  # fmt: skip
        words = [f"{key}={value}" for key, value in {**data, **models}.items()] + [HELD_OUT, *extra]
        words += QUICK[name] + QUICK_EVERYWHERE if self.quick else []
        flags = {"trainer.output_dir": str(self.folder), "trainer.exp_name": name}
        resume = folders.can_resume(folder) and latest_valid(folder, lambda line: None, deep=False) is not None
        force = folder.exists() and not resume
        self._show("train", stage, "--preset", "demo", "--output-dir", str(self.folder), "--exp-name", name,
                   *(["--resume"] if resume else []), *words)  # fmt: skip
        first = name == "seqkd"  # one plan is enough to see what a plan is
        return run_stage(StageRequest(stage, "demo", None, flags, tuple(words), resume=resume, force=force,
                                      quiet=self.quiet, with_plan=first))  # fmt: skip

    def _checkpoint(self, name: str, role: str) -> str:
        found = latest_valid(self.folder / name, warn, deep=False)
        if found is None:
            raise CheckpointError(f"{self.folder / name}: no checkpoint", "gad demo --force starts anew")
        return str(found / role)

    def _adversarial_seconds(self) -> float:
        """Wall time of the steps of warmup and gad: what the control gets for more supervised training."""
        return sum(read_trainer(Path(self._checkpoint(name, "actor")).parent)["train_seconds"]
                   for name in ("warmup", "gad"))  # fmt: skip

    def _show(self, *words: str) -> None:
        if not self.quiet:
            say(sys.stderr, f"\n$ gad {shlex.join(words)}")

    def _command(self, *words: str) -> None:
        """Show and run another gad command."""
        self._show(*words)
        self._process("gadcli", *words)

    def _process(self, module: str, *words: str) -> None:
        """Run a module in a process of its own, so that this one stays small; its errors have been told by then."""
        done = subprocess.run([sys.executable, "-m", module, *words], check=False, env=with_bytecode(dict(os.environ)),
                              stdout=subprocess.DEVNULL if self.quiet else sys.stderr)  # fmt: skip
        if done.returncode:
            error = GadError(
                f"`{module} {words[0]}` ended with exit code {done.returncode}", "its own message is above"
            )
            error.exit_code = ExitCode(done.returncode) if done.returncode in set(ExitCode) else ExitCode.BUG
            raise error
