"""Where a run's numbers go besides metrics.jsonl: TensorBoard and Weights & Biases.

Both fail loudly when they are opened, where a user can still mend it, and only warn once afterwards: no run of a
week dies of a full log disk on a dashboard's side.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from gadcli.errors import ConfigError
from gadcli.metrics.table import GROUPS, METRICS

log = logging.getLogger(__name__)


class TensorBoardSink:
    """Scalars, text samples, histograms and hparams as TensorBoard event files.

    `purge_step`: the first step this process will write again; TensorBoard then hides what an interrupted run
    wrote from there on, so that steps never double. None for a fresh run.
    Raises ConfigError where `folder` cannot be written.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = SummaryWriter(str(folder), purge_step=purge_step, max_queue=200, flush_secs=20)
        except OSError as error:
            raise ConfigError(
                f"TensorBoard's folder {folder} cannot be written: {error.strerror or error}",
                "choose trainer.output_dir, or leave tensorboard out of trainer.logger",
            ) from error
        self._writer.add_custom_scalars(layout())
        self._working = True

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step's metrics; non-finite values are left out, since TensorBoard cannot draw them."""

        values = [Summary.Value(tag=n, simple_value=v) for n, v in metrics.items() if math.isfinite(v)]
        # One event for the step: 40 calls of add_scalar cost 3 ms, this 0.2 ms.
        self._guard(lambda: self._writer._get_file_writer().add_summary(Summary(value=values), step))

    def histograms(self, step: int, values: Mapping[str, Sequence[float]]) -> None:
        """Distributions, e.g. {"scores/student": […], "response_length": […]}; empty ones are left out."""

        def write() -> None:
            for name, row in values.items():
                finite = [value for value in row if math.isfinite(value)]
                if finite:
                    self._writer.add_histogram(name, _array(finite), step)

        self._guard(write)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Prompt, student, teacher and both scores of some rows, as one text page a step."""
        if rows:
            self._guard(lambda: self._writer.add_text("samples", _markdown(rows), step))

    def hparams(self, values: Mapping[str, Any]) -> None:
        """The resolved configuration, flat (`actor.optim.lr` → value), as a text page."""
        lines = "\n".join(f"| {key} | {_cell(value)} |" for key, value in values.items())
        self._guard(lambda: self._writer.add_text("hparams", f"| key | value |\n|---|---|\n{lines}", 0))

    def flush(self) -> None:
        """Write out what is queued."""
        self._guard(self._writer.flush)

    def close(self) -> None:
        """Flush and close."""
        self._guard(self._writer.close)
        self._working = False

    def _guard(self, write: Callable[[], None]) -> None:
        if not self._working:
            return
        try:
            write()
        except OSError as error:
            self._working = False
            log.warning("TensorBoard events are no longer written: %s", error)


def layout() -> dict[str, dict[str, list[Any]]]:
    """Custom-scalars layout: the dashboard's four groups, one chart a metric family."""
    pairs = {
        "discriminator": {
            "d_acc": ["critic/d_acc", "val/d_acc"],
            "gap": ["critic/score_diff", "critic/raw_score_diff"],
            "scores": ["critic/student_value_mean", "critic/teacher_value_mean"],
            "losses": ["critic/d_loss", "critic/ranking_loss", "critic/score_reg", "critic/diff_penalty",
                       "critic/hinge_loss.*"],
            "grad_norm": ["critic/grad_norm"],
            "spread": ["critic/score_std", "critic/zero_std_fraction"],
        },
        "actor": {
            "loss": ["actor/sft_loss", "actor/pg_loss"],
            "grad_norm": ["actor/grad_norm"],
            "kl": ["actor/kl_loss", "actor/ppo_kl"],
            "clipping": ["actor/pg_clipfrac"],
            "entropy": ["actor/entropy"],
            "advantages": ["critic/advantages/.*"],
        },
        "responses": {
            "length": ["response_length/mean", "teacher_length/mean"],
            "truncated": ["response_length/clip_ratio"],
            "held out": ["val/rouge_l", "val/length_ratio", "val/length_auc"],
            "probe scores": ["val/probe_teacher", "val/probe_start", "val/probe_student"],
            "probe wins": ["val/probe_beats_.*"],
        },
        "engine": {
            "time": ["timing_s/.*"],
            "throughput": ["perf/tokens_per_s", "rollout/tokens_per_s"],
            "memory": ["perf/rss_gb", "perf/gpu_gb"],
            "sampler": ["rollout/logp_diff_.*", "rollout/sync_probe"],
        },
    }  # fmt: skip
    return {group: {title: ["Multiline", tags] for title, tags in pairs[group].items()} for group in GROUPS}


def _array(row: Sequence[float]) -> Any:
    import numpy as np

    return np.asarray(row, dtype=np.float64)


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", "<br>")


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "| prompt | student | score | teacher | score |\n|---|---|---|---|---|\n"
    keys = ("prompt", "student", "student_score", "teacher", "teacher_score")
    return head + "\n".join("| " + " | ".join(_cell(row.get(key, "")) for key in keys) + " |" for row in rows)


class WandbSink:
    """The same scalars and samples in Weights & Biases; the client is imported only here.

    Raises ConfigError where the package is missing or the login fails, with the key nowhere in the message.
    Offline (WANDB_MODE=offline, or no key at all) it writes beside the run, to be uploaded by `wandb sync`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        project: str,
        name: str,
        config: Mapping[str, Any],
        run_id: str | None = None,
    ) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError("trainer.logger names wandb, but the package is not installed", "pip install wandb")
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key(wandb) else "offline")
        if mode == "offline":
            log.warning("W&B runs offline; upload later with: wandb sync %s", folder / "wandb")
        settings = wandb.Settings(silent=True, console="off", init_timeout=60)
        try:
            self._run = wandb.init(project=project, name=name, id=run_id, dir=str(folder), config=dict(config),
                                   mode=mode, resume="allow" if run_id else None, settings=settings)  # fmt: skip
        except wandb.errors.Error as error:
            # The client's own text may quote the environment; only its kind is safe to show.
            raise ConfigError(
                f"W&B did not accept this run ({type(error).__name__}, mode {mode})",
                "run `wandb login`, or set WANDB_MODE=offline, or leave wandb out of trainer.logger",
            ) from None
        self._error: type[Exception] = wandb.errors.Error
        self._table = wandb.Table
        self._working = True
        for metric in METRICS:
            self._run.define_metric(metric, step_metric="step")

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step's metrics, against `step` as x axis."""
        # W&B refuses to go back in its own step, so ours is a metric and a resume simply draws on.
        self._log({**{n: v for n, v in metrics.items() if math.isfinite(v)}, "step": step})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Prompt, student, teacher and scores as a table."""
        keys = ["prompt", "student", "student_score", "teacher", "teacher_score"]
        if rows:
            data = [[row.get(key) for key in keys] for row in rows]
            self._log({"samples": self._table(columns=keys, data=data), "step": step})

    def close(self, exit_code: int = 0) -> None:
        """Finish the run on W&B's side."""
        if self._working:
            self._run.finish(exit_code=exit_code)
            self._working = False

    def _log(self, values: dict[str, Any]) -> None:
        if not self._working:
            return
        try:
            self._run.log(values)
        except (self._error, OSError) as error:
            self._working = False
            log.warning("W&B no longer receives metrics (%s)", type(error).__name__)


def _has_key(wandb: Any) -> bool:
    """Whether the client can log in without asking; the key itself is never looked at."""
    return bool(os.environ.get("WANDB_API_KEY")) or wandb.api.api_key is not None
