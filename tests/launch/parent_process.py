"""A parent for tests, as a process of its own: supervises small workers in a folder and exits with the outcome's code.

`python parent_process.py RUN_DIR NPROC TIMEOUT_S DISPLAY [tensorboard|keep]`: DISPLAY is json, plain, live or quiet.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gadcli.launch.display import Display, JsonDisplay, LiveDisplay, PlainDisplay, say
from gadcli.launch.foreground import supervise
from gadcli.launch.supervisor import LaunchSpec
from gadcli.launch.tensorboard import TensorBoard

DISPLAYS = {"json": JsonDisplay, "plain": PlainDisplay, "live": LiveDisplay, "quiet": Display}


def main() -> int:
    run_dir = Path(sys.argv[1])
    spec = LaunchSpec(run_dir, nproc=int(sys.argv[2]), timeout_s=float(sys.argv[3]), worker_module="small_worker")
    board = None
    if len(sys.argv) > 5:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        log = run_dir / "logs" / "tensorboard.log"
        board = TensorBoard(run_dir / "tensorboard", log, port=int(sys.argv[6]), keep=sys.argv[5] == "keep")
    outcome = supervise(spec, DISPLAYS[sys.argv[4]](run_dir), board)
    say(sys.stderr, f"outcome {outcome.code} rank {outcome.rank}: {outcome.message} | {outcome.hint}")
    for line in outcome.tail:
        say(sys.stderr, f"tail {line}")
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
