"""Where a run's numbers go besides metrics.jsonl: TensorBoard and Weights & Biases.

Both fail loudly when they are opened, where a user can still mend it, and only warn once afterwards: no run of a
week dies of a full log disk on a dashboard's side.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparam_summaries

from gadcli.errors import ConfigError
from gadcli.metrics.table import GROUPS

log = logging.getLogger(__name__)

HISTOGRAM_BINS = 40
HPARAM_METRICS = ("val/rouge_l", "val/d_acc", "critic/d_acc", "response_length/mean", "actor/sft_loss")
"""What the HPARAMS tab shows beside the settings; the values are the scalars' own."""


class TensorBoardSink:
    """Scalars, text samples, histograms and hparams as TensorBoard event files.

    `purge_step`: the first step this process will write again; TensorBoard then hides the scalars and histograms that
    an interrupted run wrote from there on, so that steps never double. None for a fresh run. It does not hide texts:
    those of steps up to `texts_until` are there already and are not written again.
    Raises ConfigError where `folder` cannot be written.
    """

    def __init__(self, folder: Path, purge_step: int | None = None, texts_until: int = 0) -> None:
        self._texts_until = texts_until
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._first = not any(folder.glob("events.out.tfevents.*"))
            self._writer = SummaryWriter(str(folder), purge_step=purge_step, max_queue=200, flush_secs=20)
        except OSError as error:
            raise ConfigError(
                f"TensorBoard's folder {folder} cannot be written: {error.strerror or error}",
                "choose trainer.output_dir, or leave tensorboard out of trainer.logger",
            ) from error
        if self._first:
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
                    # TensorFlow's 1,500 bins, the default, cost 1.5 ms each.
                    self._writer.add_histogram(name, _array(finite), step, bins=HISTOGRAM_BINS)

        self._guard(write)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Prompt, student, teacher and both scores of some rows, as one text page per step."""
        if rows and step > self._texts_until:
            self._guard(lambda: self._writer.add_text("samples", _markdown(rows), step))
            self.flush()  # evaluations are rare, and a text that a kill swallowed would not come again

    def hparams(self, values: Mapping[str, Any]) -> None:
        """The resolved configuration, flat (`actor.optim.lr` → value): a text page, and the HPARAMS tab's columns.

        Once per folder: a resume continues under the settings that are there.
        """
        if not self._first:
            return
        lines = "\n".join(f"| {key} | {_cell(value)} |" for key, value in values.items())
        plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in values.items()}

        def write() -> None:
            self._writer.add_text("hparams", f"| key | value |\n|---|---|\n{lines}", 0)
            # Not add_hparams: it would write into a run of its own beside this one.
            for summary in hparam_summaries(plain, dict.fromkeys(HPARAM_METRICS, 0.0)):
                self._writer._get_file_writer().add_summary(summary)

        self._guard(write)

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

    Raises ConfigError where the package is missing, its settings are no good or the key is refused, with the key
    nowhere in the message. Offline (WANDB_MODE=offline, no key at all, or a server that cannot be reached, which is a
    warning) it writes beside the run, to be uploaded by `wandb sync`.
    `fresh`: a run of its own there; else it continues the one that this folder began.
    """

    def __init__(self, folder: Path, *, project: str, name: str, config: Mapping[str, Any], fresh: bool = True) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError("trainer.logger names wandb, but the package is not installed", "pip install wandb")
        os.environ.setdefault("WANDB_SILENT", "true")  # read at import; the run's own lines say what matters
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._error: type[Exception] = wandb.errors.Error
        self._table = wandb.Table
        given: dict[str, Any] = {"project": project, "name": name, "id": own_id(folder, fresh), "dir": str(folder),
                                 "config": dict(config), "resume": "allow"}  # fmt: skip
        try:
            self._run = _begin(wandb, folder, given)
        except (wandb.errors.Error, ValueError) as error:
            # The client's own text may quote the environment; only its kind is safe to show.
            raise ConfigError(
                f"W&B did not accept this run ({type(error).__name__})",
                "check the key with `wandb login`, or set WANDB_MODE=offline, or leave wandb out of trainer.logger",
            ) from None
        self._working = True
        self.note = _where(self._run, folder)
        # W&B refuses to go back in its own step, so ours is the x axis, and a resume simply draws on.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step's metrics, against `step` as x axis."""
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


WANDB_START_S = 30
# How the client's text differs where no server answered; one that does is quoted in its own words.
UNREACHABLE = ("timed out", "retrying", "deadline exceeded", "dial tcp", "connection")


def _begin(wandb: Any, folder: Path, given: Mapping[str, Any]) -> Any:
    """The client's run: online with a key that the server takes, else offline (said in the log)."""

    def init(mode: str) -> Any:
        settings = wandb.Settings(silent=True, console="off", init_timeout=WANDB_START_S)
        return wandb.init(**given, mode=mode, settings=settings)

    mode = os.environ.get("WANDB_MODE")
    if not mode:
        known = bool(os.environ.get("WANDB_API_KEY")) or wandb.login(prompt=False, verify=False)
        mode = "online" if known else "offline"
    sync = f"upload later with: wandb sync {folder / 'wandb'}/offline-*"
    if mode == "offline":
        log.warning("W&B runs offline; %s", sync)
    try:
        return init(mode)
    except wandb.errors.AuthenticationError:
        raise
    except wandb.errors.CommError as error:
        if not any(sign in str(error).lower() for sign in UNREACHABLE):
            raise  # the server answered, and refused the key or the project: the client has one kind for all of it
        log.warning("W&B cannot be reached (%s), so it runs offline; %s", type(error).__name__, sync)
        wandb.teardown()  # its service still holds the run's id
        return init("offline")


def _where(run: Any, folder: Path) -> str:
    """Where this run's numbers are, for the run's own records: a rank's log is not where a user looks."""
    if run.offline:
        return f"W&B runs offline; upload later with: wandb sync {folder / 'wandb'}/offline-*"
    return f"W&B: {run.url}"


def own_id(folder: Path, fresh: bool) -> str:
    """The run's name at W&B: made once per folder, so that a resume continues it and a rerun does not."""
    path = folder / "wandb" / "gad-run-id"
    if not fresh and path.exists():
        return path.read_text().strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(uuid.uuid4().hex[:12])
    return path.read_text()
