"""What the data commands print: tables and bars as plain lines, readable at 60 columns."""

from __future__ import annotations

import shutil

from gadcli.data.lengths import FIELDS, PERCENTILES, Analysis, Lengths, limit_table
from gadcli.data.read.findings import REASONS, Summary

BLOCKS = " ▏▎▍▌▋▊▉█"


def check_lines(summary: Summary) -> list[str]:
    """The summary table of `gad data check`."""
    lines = [f"{summary.total:,} rows: {summary.kept:,} good + {summary.dropped:,} bad"]
    if summary.truncated:
        lines.append(f"{summary.truncated:,} of the bad rows could be trimmed")
    if summary.counts:
        lines += ["", f"{'rows':>9}  {'level':5}  reason"]
    for reason, count in summary.counts.most_common():
        examples = summary.examples.get(reason, [])
        lines.append(f"{count:>9,}  {REASONS[reason].level:5}  {reason}: {REASONS[reason].meaning}")
        for finding in examples[:3]:
            shown = f"  | {finding.excerpt}" if finding.excerpt else ""
            lines.append(f"{'':18}{finding.where()}: {finding.message}{shown}")
        lines.append(f"{'':18}-> {REASONS[reason].hint}")
    return lines


def analysis_lines(
    analysis: Analysis, current: dict[str, int], suggested: dict[str, int], per_file: bool = True
) -> list[str]:
    """Statistics, a histogram of the teacher, and what limits cut."""
    fields = analysis.fields
    lines = [f"{'tokens':8}" + "".join(f"{h:>8}" for h in ("rows", "mean", *(f"P{p:g}" for p in PERCENTILES), "max"))]
    for name in FIELDS:
        stats = fields[name]
        rows = stats.rows
        values = [f"{rows:,}" if rows < 1e7 else f"{rows / 1e6:.1f}M", f"{stats.tokens / max(rows, 1):.1f}"]
        values += [f"{stats.percentile(p):,}" for p in PERCENTILES] + [f"{stats.longest:,}"]
        lines.append(f"{name:8}" + "".join(f"{v:>8}" for v in values))
    total = fields["both"].tokens
    lines += [
        "",
        f"{total:,} tokens in all: {fields['prompt'].tokens:,} of prompts, {fields['teacher'].tokens:,} of answers",
    ]
    if per_file and len(analysis.files) > 1:
        lines += ["", f"{'rows':>10} {'bad':>7} {'tokens':>14}  file"]
        for name, file in analysis.files.items():
            tokens = file["prompt_tokens"] + file["teacher_tokens"]
            lines.append(f"{file['rows']:>10,} {file['dropped']:>7,} {tokens:>14,}  {name}")
    for name in ("prompt", "teacher"):
        lines += ["", f"{name}, tokens", *histogram_lines(fields[name])]
        lines += ["", f"{name} limit   rows cut     kept"]
        for limit, label, cut, kept in limit_table(fields[name], current.get(name), suggested[name]):
            lines.append(f"{limit:>12,} {cut:>10,} {100 * kept:>7.2f}%  {label}".rstrip())
    return lines


def histogram_lines(lengths: Lengths) -> list[str]:
    bins = lengths.histogram()
    most = max((rows for _, _, rows in bins), default=1)
    width = max(10, min(shutil.get_terminal_size().columns, 100) - 32)
    out = []
    for low, high, rows in bins:
        eighths = round(8 * width * rows / most) or (1 if rows else 0)
        bar = BLOCKS[8] * (eighths // 8) + BLOCKS[eighths % 8].strip()
        out.append(f"{low:>7,}-{high:<7,} {rows:>10,} {bar}".rstrip())
    return out
