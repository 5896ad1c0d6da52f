"""One rank of a run: `python -m gadcli.train.worker --run-dir DIR [--resume]`, started by the parent or by torchrun.

Ends with a documented exit code, and leaves the same in `logs/rank_R.exit.json` for the parent to show.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

from gadcli.distributed.worker_end import rank, record_end, run_worker
from gadcli.errors import ExitCode, GadError
from gadcli.launch.environment import engine_variables

SAVE_GRACE_S = 5.0  # for a checkpoint that is being written when the run fails


def main() -> None:
    arguments = argparse.ArgumentParser(prog="gadcli.train.worker")
    arguments.add_argument("--run-dir", type=Path, required=True)
    arguments.add_argument("--resume", action="store_true")
    options = arguments.parse_args()
    run_worker(options.run_dir, lambda: train(options.run_dir, options.resume), engine_variables())


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection while modules and models load: of their million objects it would find none to free."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def train(run_dir: Path, resume: bool) -> int:
    """Run the stage that DIR/config.yaml describes; returns the number of the signal that stopped it, else 0."""
    from gadcli.checkpoint.manifest import latest_valid
    from gadcli.checkpoint.retention import set_aside_newer
    from gadcli.config.resolve import load_resolved
    from gadcli.distributed.watchdog import WATCHDOG

    cfg = load_resolved(run_dir / "config.yaml")
    skipped: list[str] = []
    resume_from = None
    if resume and rank() == 0:
        resume_from = latest_valid(run_dir, skipped.append)
        skipped += [f"renamed it to {path.name}" for path in set_aside_newer(run_dir, resume_from)]

    with _no_collection():
        from gadcli.train.build import build_run, close_run
        from gadcli.train.loop import evaluate_once, finish
        from gadcli.train.soda import train_soda
        from gadcli.train.stages import train_adversarial, train_seqkd

        run = build_run(cfg, run_dir, resume_from=resume_from)
    for message in skipped:
        run.records.event("resume", message, level="warn", step=run.progress.step)
    ended = (int(ExitCode.BUG), "failed; see logs")
    try:
        WATCHDOG.start(cfg.fsdp.timeout_s, lambda message: _record_hang(run_dir, message))
        if cfg.trainer.val_before_train and run.progress.step == 0:
            evaluate_once(run)
        if cfg.actor.objective == "soda":
            train_soda(run)
        else:
            (train_seqkd if cfg.stage == "seqkd" else train_adversarial)(run)
        finish(run)
        ended = (128 + run.stop.number, "interrupted; saved") if run.stop.number else (0, "done")
    except GadError as error:
        ended = (int(error.exit_code), error.message)
        raise
    finally:
        WATCHDOG.stop()
        run.saver.let_finish(SAVE_GRACE_S)
        run.records.end(*ended)
        run.records.status("end", run.progress.step, state="done" if ended[0] == 0 else "failed")
    close_run(run)
    return run.stop.number


def _record_hang(run_dir: Path, message: str) -> None:
    hint = f"the stacks are in logs/rank_{rank()}.log; a larger fsdp.timeout_s if the work is merely slow; --resume"
    record_end(run_dir, int(ExitCode.PEERS), "PeerError", f"rank {rank()}: {message}", hint)


if __name__ == "__main__":
    main()
