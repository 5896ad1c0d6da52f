"""The report: self-contained, safe whatever the run holds, and drawn by a real browser."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gadcli.dashboard import RunView
from gadcli.dashboard.plots import export_svg
from gadcli.dashboard.report import export_html
from gadcli.metrics.samples import highest_scored
from metrics.generated import SYMPTOMS, healthy, write

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> RunView:
    view = RunView(write(tmp_path_factory.mktemp("runs") / "good", healthy(1)))
    view.poll()
    return view


class Page(HTMLParser):
    """Collects tags and whatever would need the network."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]


def test_the_report_is_self_contained_and_escapes_the_runs_text(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", SYMPTOMS["no_spread"](1))
    with (folder / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, "kind": "val", "prompt": "<script>x</script>", "student": "", "teacher": ""}))
        file.write("\n")
    view = RunView(folder)
    view.poll()
    page = Page()
    text = export_html(view, time.time())
    page.feed(text)
    assert page.outside == [] and "script" not in page.tags
    assert page.tags.count("svg") > 25 and "rollout.temperature=0.8 rollout.n=8" in text
    assert "url(" not in text and "@import" not in text


def test_the_svg_is_well_formed_and_draws_every_metric(good: RunView) -> None:
    root = ElementTree.fromstring(export_svg(good))
    lines = root.findall(".//{http://www.w3.org/2000/svg}polyline")
    names = [n for n in good.log.history.names() if not n.startswith("timing_s/")]
    assert len(lines) >= len(names)


def test_an_unhealthy_metric_is_framed_and_marked_at_the_step_where_it_began(tmp_path: Path, good: RunView) -> None:
    view = RunView(write(tmp_path / "run", SYMPTOMS["runaway_gap"](1)))
    view.poll()
    root = ElementTree.fromstring(export_svg(view))
    groups = root.findall("{http://www.w3.org/2000/svg}g")
    marked = {g[0].text.split(":")[0]: g for g in groups if "bad" in g.attrib["class"].split()}  # type: ignore[union-attr]
    assert {"critic/score_diff", "response_length/mean"} <= set(marked)
    since = next(v.since for v in view.verdicts().values() if v.metric == "critic/score_diff")
    dash = next(e for e in marked["critic/score_diff"] if e.attrib.get("class") == "since")
    # 240 px (300 - 52 - 8) from step 1 at x = 52 to step 141
    assert float(dash.attrib["d"][1:].split()[0]) == pytest.approx(52 + 240 * (since - 1) / 140, abs=0.06)
    assert 'class="since"' not in export_svg(good)


def test_the_best_scored_answers_are_the_best_of_all_steps_one_a_text(tmp_path: Path) -> None:
    rows = [{"step": s, "kind": "val", "prompt": "p", "student": f"answer {s % 700}", "teacher": "t",
             "student_score": float((s * 37) % 1000), "teacher_score": 0.0} for s in range(1500)]  # fmt: skip
    rows.append({**rows[0], "student": "unscored", "student_score": None})
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    best = highest_scored(tmp_path, 5)
    by_text: dict[str, float] = {}
    for row in rows[:-1]:
        by_text[str(row["student"])] = max(by_text.get(str(row["student"]), 0.0), float(str(row["student_score"])))
    assert [r.student_score for r in best] == sorted(by_text.values(), reverse=True)[:5]
    assert len({r.student for r in best}) == 5
    assert highest_scored(tmp_path / "nowhere", 5) == []


def browse(page: Path) -> tuple[str, str]:
    """(the document as the browser built it, what it said in its console)."""
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
             "--enable-logging=stderr", f"--user-data-dir={page.parent / 'profile'}",
             "--dump-dom", page.as_uri()]  # fmt: skip
    told = subprocess.run([BROWSER, *words], capture_output=True, text=True, timeout=60, check=True)
    return told.stdout, "\n".join(line for line in told.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(not BROWSER, reason="NO BROWSER: the report was not opened (apt-get install chromium)")
def test_a_browser_draws_the_report_without_a_complaint(tmp_path: Path) -> None:
    view = RunView(write(tmp_path / "run", SYMPTOMS["no_spread"](1)))
    view.poll()
    page = tmp_path / "report.html"
    page.write_text(export_html(view, time.time()))
    document, complaints = browse(page)
    assert complaints == "" and document.count("<polyline") > 25 and "rollout.temperature=0.8 rollout.n=8" in document
    page.write_text(page.read_text().replace("</body>", "<script>document.body.innerHTML=''</script></body>"))
    document, complaints = browse(page)
    assert "Content Security Policy" in complaints, "a script that got in would be refused, and heard"
    assert document.count("<polyline") > 25
