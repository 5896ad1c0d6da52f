"""Where a run's numbers go: metrics.jsonl, TensorBoard, W&B and status.json; rank 0 writes, every rank reduces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gadcli.config.schema import GadConfig
from gadcli.config.tree import flatten
from gadcli.distributed.world import World
from gadcli.errors import UnhealthyError
from gadcli.metrics.diagnose import Watch
from gadcli.metrics.facts import RunFacts
from gadcli.metrics.health import Alarm
from gadcli.metrics.record import MetricsWriter, RunLog, write_status
from gadcli.metrics.reduce import reduce_means
from gadcli.metrics.samples import drop_after
from gadcli.metrics.sinks import TensorBoardSink, WandbSink
from gadcli.model.critic import Scores
from gadcli.model.rollout_batch import Rollout
from gadcli.train.steplog import StepLog


class Records:
    """The sinks of one run. All methods may be called on every rank; only rank 0 has sinks."""

    def __init__(self, cfg: GadConfig, run_dir: Path, world: World, start_step: int) -> None:
        self.cfg, self.run_dir, self.world = cfg, run_dir, world
        self.writer: MetricsWriter | None = None
        self.sinks: list[TensorBoardSink | WandbSink] = []
        self.watch = Watch(RunFacts.of({}, dataclasses.asdict(cfg)))
        self.alarm: Alarm | None = None  # the first that health.on_bad=stop must act on
        if not world.is_main:
            return
        told = drop_after(run_dir, start_step)
        if start_step:
            earlier = RunLog(run_dir)
            earlier.poll()
            self.watch.replay(earlier)
        self.writer = MetricsWriter(run_dir, append=True)
        if "tensorboard" in cfg.trainer.logger:
            sink = TensorBoardSink(run_dir / "tensorboard", purge_step=start_step + 1, texts_until=told)
            sink.hparams(flatten(cfg))
            self.sinks.append(sink)
        if "wandb" in cfg.trainer.logger:
            wandb = WandbSink(
                run_dir,
                project="gad",
                name=cfg.trainer.exp_name,
                config=flatten(cfg),
                fresh=start_step == 0,
            )
            self.writer.event("wandb", wandb.note, step=start_step)
            self.sinks.append(wandb)

    def run(self, **info: Any) -> None:
        if self.writer is not None:
            self.writer.run(**info)

    def status(self, phase: str, step: int, state: str = "running") -> None:
        if self.world.is_main:
            write_status(self.run_dir, state=state, stage=self.cfg.stage, step=step, phase=phase)

    def step(self, log: StepLog, epoch: float) -> None:
        """Reduce the step's means over ranks (collective) and write everything once."""
        metrics = reduce_means(log.means) | log.values | log.timings()
        if self.writer is not None:
            self.writer.step(log.step, epoch, metrics)
            self._tell(self.watch.step(log.step, metrics, epoch))
            for sink in self.sinks:
                sink.scalars(log.step, metrics)

    def eval(self, step: int, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]]) -> None:
        if self.writer is None:
            return
        self.writer.eval(step, metrics)
        self._tell(self.watch.eval(step, metrics))
        self.writer.samples(step, "val", samples)
        for sink in self.sinks:
            sink.scalars(step, metrics)
            sink.samples(step, samples[:4])

    def _tell(self, alarms: Sequence[Alarm]) -> None:
        """Write what changed in the run's health; with health.on_bad=stop remember the first that is bad."""
        for alarm in alarms:
            self.event("alarm", alarm.message, alarm.level, alarm.step, name=alarm.name, cure=alarm.cure)
            if alarm.level == "bad" and self.cfg.health.on_bad == "stop":
                self.alarm = self.alarm or alarm

    def as_error(self) -> UnhealthyError:
        """The alarm that stopped the run; other ranks only know that there was one."""
        if self.alarm is None:
            return UnhealthyError("stopped by health.on_bad=stop")
        alarm = self.alarm
        return UnhealthyError(
            f"step {alarm.step}: {alarm.message} (health.on_bad=stop; saved)", alarm.cure or "gad why RUN tells more"
        )

    def train_sample(
        self, step: int, decode: Callable[..., str], rollout: Rollout | None, scores: Scores | None
    ) -> None:
        """One rollout of the step, so that the dashboard shows what is being trained on, and histograms."""
        if self.writer is None or rollout is None or scores is None:
            return
        row, answer = rollout.rows[0], rollout.answers[0][0]
        sample = {
            "prompt": row.messages[-1]["content"],
            "student": decode(answer.ids, skip_special_tokens=True),
            "teacher": row.teacher,
            "student_score": float(scores.student_PG[0, 0]),
            "teacher_score": float(scores.teacher_P[0]),
        }
        self.writer.samples(step, "train", [sample])
        for sink in self.sinks:
            if isinstance(sink, TensorBoardSink):
                lengths = [float(n) for n in rollout.read_lengths]
                sink.histograms(
                    step,
                    {
                        "scores/student": scores.student_PG.flatten().tolist(),
                        "scores/teacher": scores.teacher_P.tolist(),
                        "response_length": lengths,
                    },
                )

    def event(self, kind: str, message: str, level: str = "info", step: int | None = None, **more: Any) -> None:
        if self.writer is not None:
            self.writer.event(kind, message, level, step, **more)

    def end(self, code: int, message: str) -> None:
        if self.writer is not None:
            self.writer.end(code, message)
            self.writer.close()
        for sink in self.sinks:
            sink.close()
        self.sinks = []
