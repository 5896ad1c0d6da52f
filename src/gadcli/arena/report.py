"""The arena's table in a terminal: what each arm costs, each measure's frontier, and who wins on what, by how much."""

from __future__ import annotations

import io
from collections.abc import Sequence

from gadcli.arena.arms import START
from gadcli.arena.compare import Arena, Verdict
from gadcli.arena.result import Table

PLOT_HEIGHT = 12
MARKS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def render(table: Table, width: int) -> str:
    """Plain text of that width."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid

    console = Console(file=io.StringIO(), width=width, highlight=False, no_color=True)

    def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        grid = Grid(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in columns:
            grid.add_column(column, justify="right" if column else "left", overflow="fold")
        for row in rows:
            grid.add_row(*row)
        console.print(grid)

    seeds = f"{len(table.seeds)} seed{'s' if len(table.seeds) > 1 else ''}"
    console.print(f"{table.prompts} test prompts, {seeds}. {limits(table)}")
    show(
        "Cost beyond the start, and answers at the last temperature",
        ["", "seconds", "steps", "teacher rows", "tokens", "ended"],
        [
            [name_of(table, row.arm), f"{row.seconds:.0f}", f"{row.steps:.0f}", f"{row.teacher_rows:.0f}",
             f"{row.lengths[-1]:.1f}", f"{row.finished[-1]:.2f}"]
            for row in table.rows
        ],
    )  # fmt: skip
    for measure, arena in table.measures.items():
        show(
            f"{measure} (variety: share of different word pairs; the teacher's own {table.teacher_variety:.3f})",
            ["", *(f"T {t:g}" for t in table.temperatures)],
            [[name_of(table, arm), *cells(arena, arm)] for arm in arena.scores],
        )
        console.print("\n".join(plot(arena, min(width, 72))))
        console.print("\n".join(sentences(measure, table)) + "\n")
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def limits(table: Table) -> str:
    """What the intervals cover."""
    if len(table.seeds) == 1:
        return "Intervals are over prompts: one seed says nothing of the luck of a run."
    return "Intervals are over prompts and seeds."


def name_of(table: Table, arm: str) -> str:
    """The arm with the letter it has in plots."""
    arms = [row.arm for row in table.rows]
    return f"{MARKS[arms.index(arm) % len(MARKS)]} {arm}" + (" (the start)" if arm == START else "")


def cells(arena: Arena, arm: str) -> list[str]:
    """`score (variety)` at each temperature."""
    means = arena.scores[arm].mean((0, 2))
    return [f"{mean:.3f} ({variety:.2f})" for mean, variety in zip(means, arena.variety[arm], strict=True)]


def sentences(measure: str, table: Table) -> list[str]:
    """Who wins in each view, by how much, at what cost; "none" where none does."""
    return [f"{found.view}: {sentence(found, table)}" for found in table.verdicts[measure]]


def sentence(found: Verdict, table: Table) -> str:
    """One verdict in words."""
    if not found.differences:
        return f"none wins ({found.best} reaches varieties that no other arm does)"
    closest = min(found.differences, key=lambda arm: found.differences[arm].low)
    d = found.differences[closest]
    by = f"{d.mean:+.3f} over {closest} (95 % {d.low:+.3f} to {d.high:+.3f})"
    if not found.winner:
        lead = f"{found.best} is {by}" if len(found.differences) == len(table.rows) - 1 else (
            f"{found.best} is {by}; the others reach no variety that it reaches")  # fmt: skip
        return f"none wins; {lead}"
    seconds = {row.arm: row.seconds for row in table.rows}
    cost = f"{seconds[found.winner]:.0f} s against {seconds[closest]:.0f} s"
    return f"{found.winner} wins: {by}, the closest of the others, in {cost}"


def plot(arena: Arena, width: int) -> list[str]:
    """The frontiers: quality upwards, variety to the right; an arm's letter at each temperature, * where two meet."""
    points = [
        (MARKS[i % len(MARKS)], float(x), float(y))
        for i, (arm, scores) in enumerate(arena.scores.items())
        for x, y in zip(arena.variety[arm], scores.mean((0, 2)), strict=True)
    ]
    xs, ys = [x for _, x, _ in points], [y for _, _, y in points]
    columns = width - 12
    rows = [[" "] * columns for _ in range(PLOT_HEIGHT)]
    for mark, x, y in points:
        column = round(share(x, min(xs), max(xs)) * (columns - 1))
        line = rows[PLOT_HEIGHT - 1 - round(share(y, min(ys), max(ys)) * (PLOT_HEIGHT - 1))]
        line[column] = mark if line[column] in (" ", mark) else "*"
    labels = [f"{max(ys):>9.3f}", *[" " * 9] * (PLOT_HEIGHT - 2), f"{min(ys):>9.3f}"]
    lines = [f"{label} |{''.join(row)}".rstrip() for label, row in zip(labels, rows, strict=True)]
    low, high = f"{min(xs):.2f}", f"{max(xs):.2f}"
    return [*lines, " " * 10 + "+" + "-" * columns, " " * 11 + low + "variety".center(columns - 8) + high]


def share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5
