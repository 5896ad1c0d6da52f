"""Draw docs/dashboard.svg: the dashboard of a generated run whose score gap runs off. Run: python docs/picture.py"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from gadcli.dashboard import RunView, render
from gadcli.metrics.record import MetricsWriter, write_status

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO / "tests"))

from metrics.generated import SYMPTOMS  # noqa: E402 (the tests' runs are no package)

WIDTH, HEIGHT = 128, 36


def main() -> None:
    """Write the run, look at it once, keep the picture."""
    info, steps = SYMPTOMS["runaway_gap"](1)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "gad-v1"
        writer = MetricsWriter(run, append=False)
        writer.run(**{**info, "exp_name": "gad-v1", "total_steps": 400})
        for step, metrics in enumerate(steps, start=1):
            writer.step(step, 0, metrics)
        yeast = "Yeast eats sugar and gives off gas, which the dough's gluten holds in bubbles."
        glass = "Glass with a thin layer of silver or aluminium behind it."
        writer.samples(140, "val", [
            {"prompt": "Why does bread rise?", "student": "Yes.", "teacher": yeast, "student_score": -112.9,
             "teacher_score": 1.31},
            {"prompt": "What is a mirror made of?", "student": "A glass", "teacher": glass, "student_score": -114.2,
             "teacher_score": 1.18},
        ])  # fmt: skip
        writer.event("save", "saved global_step_140 in 21.4 s", step=140)
        write_status(run, state="running", stage="gad", step=141, phase="rollout")
        status = json.loads((run / "status.json").read_text())
        (run / "status.json").write_text(json.dumps({**status, "pid": 4711, "host": "node1"}))
        view = RunView(run)
        view.poll()
        console = Console(file=io.StringIO(), width=WIDTH, height=HEIGHT, record=True, force_terminal=True,
                          color_system="truecolor")  # fmt: skip
        console.print(render(view, WIDTH, HEIGHT))
        console.save_svg(str(REPO / "docs" / "dashboard.svg"), title="gad monitor runs/gad-v1")


if __name__ == "__main__":
    main()
