"""A whole run, parent and worker, whose disk fills up or that is killed: one of each here, 25 by `make test-disk`
and `make test-kill-run`; what is looked at stands in fault_loop.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint import fault_loop


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["disk", "kill"])
def test_a_broken_run_resumes_to_what_an_undisturbed_one_is(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "disk" and (reason := fault_loop.why_no_strace()):
        pytest.skip(reason)
    wrong = fault_loop.main(str(tmp_path / "runs"), kind, cases=1, seed=3, worlds=(1,))
    assert wrong == 0, capsys.readouterr().out


def test_a_damaged_checkpoint_and_a_lost_one_would_be_noticed(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    broken = run_dir / "global_step_2"
    broken.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text('{"type":"event","step":3,"kind":"save","message":"saved global_step_3"}\n')
    case = fault_loop.Case(0, 1, "")
    fault_loop.look_at_what_is_left(case, run_dir)
    assert len(case.wrong) == 2 and "looks committed and is not" in case.wrong[0] and "saved [3]" in case.wrong[1]
