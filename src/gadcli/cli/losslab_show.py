"""The loss lab on paper: tables, and curves as text and as a PNG (by Pillow, which TensorBoard brings)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gadcli.cli.losslab_examine import ACCURACIES, TABLE_GAPS, Examined, Lab, verdicts

if TYPE_CHECKING:  # torch comes with it
    from gadcli.algo.losslab import Rest

MARKS = {"original": "o", "v1": "1", "v2": "2", "v2_raw": "r", "final": "f"}
COLOURS = {"original": "#1f77b4", "v1": "#d62728", "v2": "#ff7f0e", "v2_raw": "#2ca02c", "final": "#9467bd"}
LOWEST, HIGHEST = -8.0, 2.0  # log10 of the gradient
HEIGHT = 14
SIZE = (1100, 460)


def show(lab: Lab) -> None:
    """The tables and the plot on stdout."""
    from rich.console import Console

    console = Console()
    console.print(
        f"Lengths: teacher {lab.t_len:.0f}, student {lab.s_len:.0f} tokens. critic.values={lab.values}. "
        f"norm gap = teacher/length - student/length.\n"
    )
    if lab.scores is not None:
        first = lab.losses[0].stored
        assert first is not None
        console.print(
            f"Step {lab.scores.step}: {first.pairs} stored pairs, raw gap {first.raw_gap:.4g}, norm gap "
            f"{first.norm_gap:.4g}, d_acc {first.d_acc:.3f}"
        )
        rows = [[_name(lab, x), f"{x.stored.value:.4g}", f"{x.stored.gradient:.2e}"] for x in lab.losses if x.stored]
        _table(console, "Stored scores through each loss", ["loss", "value", "|gradient| a pair"], rows)
    rows = [[_name(lab, x), *_rest_cells(x.rests[1.0])] for x in lab.losses]
    _table(console, "Where each loss rests, texts always told apart",
           ["loss", "raw gap", "norm gap", "rank loss", "held by"], rows)  # fmt: skip
    rows = [[_name(lab, x), *(_number(x.rests[p].norm_gap) for p in ACCURACIES)] for x in lab.losses]
    _table(console, "... and its norm gap where evidence is right with probability p",
           ["loss", *(f"p {p:g}" for p in ACCURACIES)], rows)  # fmt: skip
    for x in lab.losses:
        if x.spreads:
            rows = [[_number(at.spread), f"{at.d_acc:.2f}", _number(at.raw_gap), _number(at.norm_gap),
                     f"{at.ranking_loss:.4f}"] for at in x.spreads]  # fmt: skip
            _table(console, f"{x.spec.name}: at rest while scores scatter",
                   ["std", "d_acc", "raw gap", "norm gap", "rank loss"], rows)  # fmt: skip
    unit = "raw score" if lab.values == "last" else "value a token"
    rows = [[_name(lab, x), *(f"{at.gradient:.1e}" for at in x.points)] for x in lab.losses]
    _table(console, f"Gradient size at a gap of ({unit})", ["loss", *(f"{gap:g}" for gap in TABLE_GAPS)], rows)
    for line in terminal_plot(lab, min(console.width, 80)):
        console.print(line, markup=False, highlight=False)
    console.print()
    for line in verdicts(lab):
        console.print(f"- {line}", markup=False, highlight=False)


def _table(console: Any, title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _name(lab: Lab, loss: Examined) -> str:
    return f"{loss.spec.name} *" if lab.scores is not None and loss.spec.name == lab.used else loss.spec.name


def _rest_cells(at: Rest) -> list[str]:
    if at.kind == "none":
        return ["grows", "grows", "-> 0", "nothing"]
    held = "clamp" if at.kind == "clamp" else "norm only" if at.raw_gap_free else "raw scores"
    return [_number(at.raw_gap), _number(at.norm_gap), f"{at.ranking_loss:.4f}", held]


def _number(x: float) -> str:
    if math.isnan(x):
        return "grows"
    return f"{x:.4f}" if 1e-3 < abs(x) < 1 else f"{x:.3g}"


def terminal_plot(lab: Lab, width: int) -> list[str]:
    """Lines of text: log |gradient| over log gap, a letter a loss (the later of two at one place is drawn)."""
    left = 7
    columns = max(width - left - 1, 20)
    canvas = [[" "] * columns for _ in range(HEIGHT)]
    for loss in lab.losses:
        for at in loss.curve:
            if at.gradient > 0:
                x = _share(at.output_gap, -2, 2) * (columns - 1)
                y = _share(at.gradient, LOWEST, HIGHEST) * (HEIGHT - 1)
                canvas[HEIGHT - 1 - round(y)][round(x)] = MARKS[loss.spec.name]
    lines = ["|gradient| over the gap: " + "  ".join(f"{MARKS[x.spec.name]} {x.spec.name}" for x in lab.losses)]
    for i, row in enumerate(canvas):
        power = HIGHEST - (HIGHEST - LOWEST) * i / (HEIGHT - 1)
        label = f"1e{power:+.0f}" if i % 3 == 0 or i == HEIGHT - 1 else ""
        lines.append(f"{label:>{left - 1}}|{''.join(row).rstrip()}")
    lines.append(" " * (left - 1) + "+" + "-" * columns)
    ends = f"0.01{'1':^{columns - 7}}100"
    lines.append(" " * left + ends)
    return lines


def write_png(lab: Lab, path: Path) -> None:
    """Two panels, loss value and gradient size over the gap, log-log; a dot where a loss rests."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    panels = ((60, "value"), (60 + SIZE[0] // 2, "gradient"))
    for left, field in panels:
        _panel(draw, lab, field, (left, 40, left + SIZE[0] // 2 - 90, SIZE[1] - 70))
    for i, loss in enumerate(lab.losses):
        x, y = 60 + i * 120, SIZE[1] - 26
        draw.line((x, y + 5, x + 22, y + 5), fill=COLOURS[loss.spec.name], width=3)
        draw.text((x + 28, y), loss.spec.name, fill="black")
    draw.text((60 + len(lab.losses) * 120, SIZE[1] - 26), "dot: where the loss rests", fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG")


def _panel(draw: Any, lab: Lab, field: str, box: tuple[int, int, int, int]) -> None:
    x0, y0, x1, y1 = box
    low, high = (LOWEST, HIGHEST) if field == "gradient" else (-5.0, 3.0)

    def place(gap: float, value: float) -> tuple[float, float]:
        return x0 + _share(gap, -2, 2) * (x1 - x0), y1 - _share(value, low, high) * (y1 - y0)

    lengths = f"lengths {lab.t_len:.0f}/{lab.s_len:.0f}"
    draw.text((x0, y0 - 24), f"{field} over the gap of critic outputs ({lengths}, values {lab.values})", fill="black")
    for power in range(-2, 3):
        x, _ = place(10.0**power, 1)
        draw.line((x, y0, x, y1), fill="#dddddd")
        draw.text((x - 10, y1 + 6), f"1e{power}", fill="black")
    for power in range(int(low), int(high) + 1):
        _, y = place(1, 10.0**power)
        draw.line((x0, y, x1, y), fill="#dddddd")
        draw.text((x0 - 36, y - 6), f"1e{power}", fill="black")
    for loss in lab.losses:
        colour = COLOURS[loss.spec.name]
        line = [place(at.output_gap, getattr(at, field)) for at in loss.curve if getattr(at, field) > 0]
        draw.line(line, fill=colour, width=5 if loss.spec.name == "v1" else 2)  # v2 lies on it over most gaps
        resting = loss.rests[1.0]
        if resting.kind == "point" and lab.values == "last" and resting.raw_gap <= loss.curve[-1].raw_gap:
            near = min(loss.curve, key=lambda at: abs(at.raw_gap - resting.raw_gap))
            x, y = place(near.output_gap, max(getattr(near, field), 10**low))
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), outline=colour, width=3)


def _share(x: float, low: float, high: float) -> float:
    """Where log10 x lies between two powers, 0..1, cut off at both ends."""
    return min(max((math.log10(x) - low) / (high - low), 0.0), 1.0)
