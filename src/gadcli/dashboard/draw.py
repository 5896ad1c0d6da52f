"""Marks, sparklines and small charts in a terminal's cells, with the healthy band visible in all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.cells import cell_len, chop_cells, set_cell_size
from rich.text import Text

from gadcli.metrics.health import Level, number
from gadcli.metrics.table import Range

# Shapes differ, not only colours: NO_COLOR and colour-blind readers see the same.
MARKS: dict[Level, str] = {"quiet": "·", "ok": "●", "warn": "▲", "bad": "✖"}
STYLES: dict[Level, str] = {"quiet": "dim", "ok": "green", "warn": "bold yellow", "bad": "bold red"}
_BARS = "▁▂▃▄▅▆▇█"
# Bit of each dot of a braille cell, by (row, column); U+2800 + bits.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def clean(text: str) -> str:
    """Model text made safe for a terminal: control and escape characters go, line ends become ⏎."""
    lines = text.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", " ")
    return "".join(c for c in lines if c.isprintable() or c == " ")


def fit(line: Text, width: int) -> Text:
    """The line cut to `width` cells (an ellipsis where it was cut); never wrapped."""
    line.no_wrap = True
    if line.cell_len > width:
        line.truncate(max(0, width), overflow="ellipsis")
    return line


def pad(line: Text, width: int) -> Text:
    """The line cut or filled to exactly `width` cells."""
    fit(line, width)
    line.append(" " * max(0, width - line.cell_len))
    return line


def wrap(text: str, width: int, lines: int) -> list[str]:
    """At most `lines` pieces of `text`, each at most `width` cells (wide characters count two), broken at spaces."""
    if lines <= 0 or width < 2:
        return []
    pieces = [""]
    for word in text.split(" "):
        joined = f"{pieces[-1]} {word}" if pieces[-1] else word
        if cell_len(joined) <= width:
            pieces[-1] = joined
            continue
        # A word that no line can hold is cut where the line ends.
        *cut, rest = chop_cells(word, width) or [""]
        pieces += [*cut, rest]
        if len(pieces) > lines + 1:
            break
    pieces = [piece for piece in pieces if piece] or [""]
    if len(pieces) > lines:
        pieces = pieces[:lines]
        pieces[-1] = set_cell_size(pieces[-1], min(cell_len(pieces[-1]), width - 1)).rstrip() + "…"
    return pieces


def buckets(values: Sequence[float], count: int) -> list[float]:
    """`values` averaged into at most `count` buckets of equal size; NaN where none is finite."""
    if len(values) <= count:
        return list(values)
    means = []
    for i in range(count):
        part = [v for v in values[i * len(values) // count : (i + 1) * len(values) // count] if math.isfinite(v)]
        means.append(sum(part) / len(part) if part else math.nan)
    return means


def level_of(value: float, bounds: Range | None) -> Level:
    """Where one value lies: ok inside the healthy band or near it, warn or bad beyond."""
    if not math.isfinite(value):
        return "bad"
    if bounds is None or bounds.warn_low <= value <= bounds.warn_high:
        return "ok"
    return "warn" if bounds.bad_low <= value <= bounds.bad_high else "bad"


def extent(values: Sequence[float], bounds: Range | None) -> tuple[float, float]:
    """(low, high) of a plot: the values, stretched to a band edge that lies near them.

    A lone spike as high as all the rest together does not flatten that rest: it is cut at the edge.
    """
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    if len(finite) >= 8:
        # Running medians of three: a lone spike goes, whatever lasts stays.
        steady = [sorted(finite[i - 1 : i + 2])[1] for i in range(1, len(finite) - 1)]
        span = max(steady) - min(steady)
        low = low if min(steady) - low <= span else min(steady)
        high = high if high - max(steady) <= span else max(steady)
    if bounds is not None:
        room = max(high - low, 0.25 * max(abs(low), abs(high)))
        for edge in (bounds.low, bounds.high):
            if math.isfinite(edge) and low - room <= edge <= high + room:
                low, high = min(low, edge), max(high, edge)
    if high - low <= 1e-9 * abs(high):  # constant but for rounding
        half = abs(high) * 0.5 or 0.5
        low, high = low - half, high + half
    return low, high


def sparkline(values: Sequence[float], width: int, bounds: Range | None) -> Text:
    """One row of bars: green in the healthy band, yellow beside it, bold beyond the warning edges; × is not finite."""
    line = Text(no_wrap=True)
    shown = buckets(values, width)
    low, high = extent(shown, bounds)
    for value in shown:
        level = level_of(value, bounds)
        style = STYLES[level] if level != "ok" or bounds is not None else "cyan"
        if level == "ok" and bounds is not None and not bounds.low <= value <= bounds.high:
            style = "yellow"
        if not math.isfinite(value):
            line.append("×", style=STYLES["bad"])
            continue
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        line.append(_BARS[min(7, int(share * 8))], style=style)
    line.append(" " * (width - len(shown)))
    return line


def band_text(bounds: Range | None) -> str:
    """The healthy band in words: `.55–.8`, `≥.01`, `≤.3`."""
    if bounds is None:
        return ""
    low, high = (number(v).removeprefix("0") or "0" for v in (bounds.low, bounds.high))
    if not math.isfinite(bounds.high):
        return f"≥{low}"
    if not math.isfinite(bounds.low) or bounds.low == 0:
        return f"≤{high}"
    if bounds.low == -bounds.high:
        return f"±{high}"
    return f"{low}–{high}"


def chart(values: Sequence[float], width: int, height: int, bounds: Range | None) -> list[Text]:
    """A braille line chart of `height` rows with the band's edges dotted through and its range at the right."""
    labels = 8
    plot = max(4, width - labels - 1)
    shown = buckets(values, plot * 2)
    low, high = extent(shown, bounds)

    def dot_row(value: float) -> int:
        share = (min(high, max(low, value)) - low) / (high - low)
        return min(height * 4 - 1, max(0, round((1 - share) * (height * 4 - 1))))

    cells = [[0] * plot for _ in range(height)]
    before: int | None = None
    for x, value in enumerate(shown):
        if not math.isfinite(value):
            before = None
            continue
        end = dot_row(value)
        begin = end if before is None else before + (end > before) - (end < before)
        # A connected line: from beside the last point's row to this one's.
        for row in range(min(begin, end), max(begin, end) + 1):
            cells[row // 4][x // 2] |= _DOTS[row % 4][x % 2]
        before = end
    edges = set()
    if bounds is not None:
        edges = {dot_row(e) // 4 for e in (bounds.low, bounds.high) if math.isfinite(e) and low <= e <= high}
    lines = []
    for y, row_cells in enumerate(cells):
        line = Text(no_wrap=True)
        for bits in row_cells:
            if bits:
                line.append(chr(0x2800 + bits), style="cyan")
            else:
                line.append("┈" if y in edges else " ", style="green" if y in edges else "")
        label = number(high) if y == 0 else number(low) if y == height - 1 else ""
        line.append(" " + set_cell_size(label, labels), style="dim")
        lines.append(line)
    return lines


def bar(share: float, width: int) -> Text:
    """A progress bar of `width` cells."""
    full = int(min(1.0, max(0.0, share)) * width + 0.5)
    return Text("━" * full, style="cyan").append("─" * (width - full), style="dim")


def duration(seconds: float) -> str:
    """A span of time in two units: 48 s, 12 min 5 s, 3 h 20 min, 2 d 4 h."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {unit}" + (f" {rest} {small_unit}" if rest else "")
    return f"{whole} s"


def cells(text: str) -> int:
    """Width of `text` in terminal cells."""
    return cell_len(text)
