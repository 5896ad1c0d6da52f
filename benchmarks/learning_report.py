"""The learning benchmark's table (Markdown) and plot (SVG) from its records; controls stand beside every claim."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ARMS = {
    "base": "the base model",
    "a": "SeqKD until it stops improving",
    "b": "gad from a",
    "c": "SeqKD continued, b's time",
    "d": "gad from an early SeqKD",
    "e": "SeqKD continued, d's time",
}
COLUMNS = (
    ("ROUGE-L", "val/rouge_l"),
    ("exact", "val/exact_match"),
    ("form", "val/form"),
    ("fresh acc", "val/fresh_accuracy"),
    ("length ratio", "val/length_ratio"),
    ("length AUC", "val/length_auc"),
    ("distinct-2", "val/distinct_2"),
    ("ended", "val/finished"),
)
CLAIMS = (("b", "a"), ("b", "c"), ("d", "e"))
PLOTTED = (("ROUGE-L, sampled", "sampled", "val/rouge_l"), ("ROUGE-L, greedy", "greedy", "val/rouge_l"),
           ("form, sampled", "sampled", "val/form"), ("form, greedy", "greedy", "val/form"),
           ("exact match, sampled", "sampled", "val/exact_match"), ("exact match, greedy", "greedy", "val/exact_match"),
           ("fresh discriminator, sampled", "sampled", "val/fresh_accuracy"))  # fmt: skip

Results = dict[str, dict[int, dict[str, Any]]]  # arm -> seed -> record


def write(out: Path, records: Sequence[dict[str, Any]]) -> str:
    """Write OUT/learning.md and OUT/learning.svg; returns the table. A repeated arm's last record counts."""
    results: Results = {}
    for entry in records:
        results.setdefault(entry["arm"], {})[entry["seed"]] = entry
    text = table(results)
    out.mkdir(parents=True, exist_ok=True)
    (out / "learning.md").write_text(text)
    (out / "learning.svg").write_text(plot(results))
    return text


def table(results: Results) -> str:
    """Mean ± standard deviation over seeds on the test rows, a part for each kind of decoding; then the claims."""
    lines = ["# Learning benchmark", ""]
    if not results:
        return "\n".join([*lines, "Nothing has been run yet.", ""])
    prompts = sorted({entry["test"]["prompts"] for found in results.values() for entry in found.values()})
    lines += [
        f"Test rows: {', '.join(map(str, prompts))} prompts. Mean ± standard deviation over seeds. "
        "`seconds` is training time beyond the arm's start; fresh acc .5 means indistinguishable.",
        "",
    ]
    for kind in ("sampled", "greedy"):
        lines += [f"## {kind.capitalize()}", ""]
        lines.append("| arm | seeds | seconds | " + " | ".join(title for title, _ in COLUMNS) + " |")
        lines.append("|---|---|---|" + "---|" * len(COLUMNS))
        for arm, title in ARMS.items():
            if arm in results:
                found = results[arm]
                seconds = spread([entry["seconds"] for entry in found.values()], digits=0)
                cells = [spread(values_of(found, kind, name)) for _, name in COLUMNS]
                lines.append(f"| {arm}: {title} | {len(found)} | {seconds} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join([*lines, *claims(results), ""])


def claims(results: Results) -> list[str]:
    """For each claim, in how many seeds it holds and by how much, whichever way it went."""
    lines = [
        "## Which arm is better, seed by seed",
        "",
        "| claim | measure | holds | differences by seed |",
        "|---|---|---|---|",
    ]
    for one, two in CLAIMS:
        seeds = sorted(results.get(one, {}).keys() & results.get(two, {}).keys())
        for title, kind, name in PLOTTED:
            pairs = [(results[one][seed]["test"][kind], results[two][seed]["test"][kind]) for seed in seeds]
            deltas = [x[name] - y[name] for x, y in pairs if name in x and name in y]
            if not deltas:
                continue
            sign = -1.0 if name == "val/fresh_accuracy" else 1.0  # harder to tell apart is better
            holds = sum(sign * delta > 0 for delta in deltas)
            shown = ", ".join(f"{delta:+.3f}" for delta in deltas)
            lines.append(f"| {one} better than {two} | {title} | {holds} of {len(deltas)} | {shown} |")
    return lines


def values_of(found: dict[int, dict[str, Any]], kind: str, name: str) -> list[float]:
    return [entry["test"][kind][name] for _, entry in sorted(found.items()) if name in entry["test"][kind]]


def spread(values: Sequence[float], digits: int = 3) -> str:
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def plot(results: Results) -> str:
    """One panel a measure: a dot for each seed, a bar at the mean, an arm a row."""
    arms = [arm for arm in ARMS if arm in results]
    height = 40 + 22 * len(arms)
    panels = [
        panel(results, arms, title, kind, name, i * (height + 16)) for i, (title, kind, name) in enumerate(PLOTTED)
    ]
    total = len(panels) * (height + 16)
    style = "text{font:12px system-ui,sans-serif;fill:#333}"
    return (f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 760 {total}'><style>{style}</style>"
            f"<rect width='760' height='{total}' fill='#fff'/>{''.join(panels)}</svg>\n")  # fmt: skip


def panel(results: Results, arms: Sequence[str], title: str, kind: str, name: str, top: float) -> str:
    parts = [f"<text x='8' y='{top + 18}' font-weight='bold'>{title}</text>"]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = 260 + 460 * tick
        parts.append(f"<line x1='{x}' x2='{x}' y1='{top + 26}' y2='{top + 26 + 22 * len(arms)}' stroke='#ddd'/>")
        parts.append(f"<text x='{x}' y='{top + 20}' text-anchor='middle' fill='#777'>{tick:g}</text>")
    for row, arm in enumerate(arms):
        y = top + 38 + 22 * row
        parts.append(f"<text x='8' y='{y + 4}'>{arm}  {ARMS[arm]}</text>")
        values = values_of(results[arm], kind, name)
        if values:
            x = 260 + 460 * statistics.fmean(values)
            parts.append(
                f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{y - 8}' y2='{y + 8}' stroke='#b5651d' stroke-width='3'/>"
            )
        parts += [
            f"<circle cx='{260 + 460 * value:.1f}' cy='{y}' r='4' fill='#2f6f9f' fill-opacity='.7'/>"
            for value in values
        ]
    return "".join(parts)
