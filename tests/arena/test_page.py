"""The arena's page: a curve per arm with a dot per temperature, and every text escaped."""

from __future__ import annotations

import numpy as np

from gadcli.arena.compare import Arena, verdicts
from gadcli.arena.page import html_page
from gadcli.arena.result import Row, Table

ATTACK = "<script>alert(1)</script>"


def test_the_page_draws_every_arm_and_escapes_its_name() -> None:
    scores = {arm: np.array([[[q, q, q, q]] * 2]) for arm, q in (("gad", 0.5), (ATTACK, 0.4))}
    variety = {arm: np.array([v, v + 0.2]) for arm, v in (("gad", 0.3), (ATTACK, 0.2))}
    arena = Arena((0.0, 1.0), scores, variety)
    rows = [Row(arm, 10.0, 3.0, 12.0, [8.0, 8.0], [1.0, 1.0]) for arm in scores]
    found = {"ROUGE-L": verdicts(arena)}
    table = Table((0.0, 1.0), (1,), 4, rows, {"ROUGE-L": arena}, found, 0.5, {"gad": [f"gad train gad {ATTACK}"]})
    page = html_page(table)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5  # costs, findings or legend, dots, scores, commands
    assert (page.count("<polyline"), page.count("<circle")) == (2, 2 * 2)
