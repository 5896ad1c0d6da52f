"""The demo's table: held-out results before and after each stage, the control beside them, answers side by side."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gadcli.demo.docstring_data import has_form
from gadcli.evaluate.text import bootstrap_interval, rouge_l
from gadcli.metrics.record import METRICS_FILE, SAMPLES_FILE


@dataclass(frozen=True)
class StageResult:
    """What one stage's folder says: evaluations by step with their samples, time, rows of teacher text seen."""

    name: str
    evals: dict[int, dict[str, float]]
    samples: dict[int, list[dict[str, Any]]]
    train_seconds: float
    steps: int
    teacher_rows: int
    rollout_n: int
    sync_share: float

    @property
    def last(self) -> int:
        return max(self.evals)


def read_result(folder: Path, name: str) -> StageResult:
    """Read a finished stage back from metrics.jsonl and samples.jsonl."""
    records = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    steps = {r["step"]: r["metrics"] for r in records if r["type"] == "step"}
    evals = {r["step"]: r["metrics"] for r in records if r["type"] == "eval"}
    run = next(r for r in records if r["type"] == "run")
    samples: dict[int, dict[str, dict[str, Any]]] = {}
    for line in (folder / SAMPLES_FILE).read_text().splitlines():
        row = json.loads(line)
        if row["kind"] == "val":
            samples.setdefault(row["step"], {})[row["prompt"]] = row  # a resumed eval writes its rows again
    plan = json.loads((folder / "plan.json").read_text())
    seconds = sum(m["timing_s/step"] for m in steps.values())
    sync = sum(m.get("timing_s/sync", 0.0) for m in steps.values())
    return StageResult(
        name, evals, {step: list(rows.values()) for step, rows in samples.items()}, seconds, len(steps),
        len(steps) * batch_of(plan, folder), run["rollout_n"], sync / seconds if seconds else 0.0,
    )  # fmt: skip


def batch_of(plan: dict[str, Any], folder: Path) -> int:
    from gadcli.config.resolve import load_resolved

    return load_resolved(folder / "config.yaml").data.train_batch_size


def render(results: list[StageResult], merged: Path) -> str:
    """The table, three answers side by side and what to do next, as plain text of the terminal's width."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    console = Console(file=io.StringIO(), width=width, highlight=False, no_color=True)
    seqkd, warmup, gad, control = results
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True, title_justify="left",
                  title=f"Held-out results, {len(seqkd.samples[0])} prompts, at the rollout temperature")  # fmt: skip
    columns = ["", "ROUGE-L", "same", "form", "len", "d_acc", "rows", "secs"]
    shown = len(columns) if width >= 70 else len(columns) - 1  # in 60 columns there is no room for the seconds
    for column in columns[:shown]:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in (
        ["before", *cells(seqkd, 0), "", ""],
        ["after seqkd", *cells(seqkd), *spent(seqkd)],
        ["after warmup", "as above", "", "", "", d_acc(warmup), *spent(warmup)],
        ["after gad", *cells(gad), *spent(gad)],
        ["control", *cells(control), *spent(control)],
    ):
        table.add_row(*row[:shown])
    console.print(table)
    console.print(NOTES.format(temperature_n=gad.rollout_n, sync=100 * gad.sync_share), width=width)
    console.print(verdict(gad, seqkd, control))
    for index in pick_three(gad):
        console.print(side_by_side(results, index))
    # Not `vllm serve`: that command of the CPU wheel looks for a distribution named vllm, and ends.
    serve = f"python -m vllm.entrypoints.openai.api_server --model {merged}"
    console.print(f"\nThe student is in {merged}: a Hugging Face folder. Serve it with `{serve}`.")
    console.print(
        f"Look at the game again: `gad monitor --once {merged.parent / 'gad'}`, `gad why {merged.parent / 'gad'}`."
    )
    return str(console.file.getvalue())  # type: ignore[attr-defined]


NOTES = (
    "ROUGE-L ± half of its 95 % interval over prompts; same and form: shares that equal the teacher's text, and that "
    "have its form; len: length against the teacher's; rows: teacher rows read in training.\n"
    "warmup teaches the discriminator alone, so the student is the one above; d_acc is its held-out accuracy.\n"
    "control: the seqkd student, supervised for the wall time that warmup and gad took together, on the same file. "
    "It reads one teacher row at a time where gad draws {temperature_n} answers a row, so it sees more rows: that is "
    "its advantage, and it is the comparison that matters.\n"
    "Weight sync took {sync:.1f} % of gad's step time. One seed, minutes of training: an illustration, not evidence."
)


def cells(result: StageResult, step: int | None = None) -> list[str]:
    """ROUGE-L with half its 95 % interval, exact, form, length ratio, d_acc of one evaluation."""
    step = result.last if step is None else step
    metrics, rows = result.evals[step], result.samples[step]
    low, high = bootstrap_interval([rouge_l(row["student"], row["teacher"]) for row in rows])
    form = sum(has_form(row["student"]) for row in rows) / len(rows)
    return [
        f"{metrics['val/rouge_l']:.3f} ±" + f"{(high - low) / 2:.3f}".removeprefix("0"),
        f"{metrics['val/exact_match']:.2f}",
        f"{form:.2f}",
        f"{metrics['val/length_ratio']:.2f}x",
        d_acc(result, step),
    ]


def spent(result: StageResult) -> list[str]:
    """Teacher rows read and seconds of training."""
    return [f"{result.teacher_rows}", f"{result.train_seconds:.0f}"]


def d_acc(result: StageResult, step: int | None = None) -> str:
    value = result.evals[result.last if step is None else step].get("val/d_acc")
    return "" if value is None else f"{value:.2f}"


def verdict(gad: StageResult, seqkd: StageResult, control: StageResult) -> str:
    """Paired differences with their intervals, said as they are."""
    lines = []
    for name, other in (("seqkd", seqkd), ("the control", control)):
        theirs = {row["prompt"]: row for row in other.samples[other.last]}
        pairs = [(row, theirs[row["prompt"]]) for row in gad.samples[gad.last] if row["prompt"] in theirs]
        differences = [rouge_l(a["student"], a["teacher"]) - rouge_l(b["student"], b["teacher"]) for a, b in pairs]
        mean = sum(differences) / len(differences)
        low, high = bootstrap_interval(differences)
        word = "better than" if low > 0 else "worse than" if high < 0 else "not distinguishable from"
        lines.append(f"gad is {word} {name}: ROUGE-L {mean:+.3f} ({low:+.3f} to {high:+.3f}, paired).")
    return "\n".join(lines)


def pick_three(result: StageResult) -> list[str]:
    """Prompts of the answers at the worst, middle and best ROUGE-L after gad: not the flattering ones."""
    rows = sorted(result.samples[result.last], key=lambda row: rouge_l(row["student"], row["teacher"]))
    return [rows[0]["prompt"], rows[len(rows) // 2]["prompt"], rows[-1]["prompt"]]


def side_by_side(results: list[StageResult], prompt: str) -> Any:
    from rich.table import Table

    seqkd, _, gad, control = results
    table = Table(title=prompt, title_justify="left", show_header=False, title_style="bold")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, result, step in (
        ("before", seqkd, 0),
        ("after seqkd", seqkd, seqkd.last),
        ("after gad", gad, gad.last),
        ("control", control, control.last),
    ):
        row = next((row for row in result.samples[step] if row["prompt"] == prompt), None)
        table.add_row(name, row["student"] if row else "(not among its rows)")
    table.add_row("teacher", next(r["teacher"] for r in gad.samples[gad.last] if r["prompt"] == prompt))
    return table
