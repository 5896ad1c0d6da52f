"""One rank of a run: `python -m gadcli.train.worker --run-dir DIR [--resume]`, started by the parent or by torchrun.

Ends with a documented exit code, and leaves the same in `logs/rank_R.exit.json` for the parent to show.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from gadcli.errors import ExitCode, GadError, PeerError, ResourceError, is_full_disk
from gadcli.launch.environment import engine_variables

# How torch's CPU allocator, CUDA and its libraries, and vLLM say it, who have no class for it.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "cudaErrorMemoryAllocation",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "Cuda failure 2 'out of memory'",
    "No available memory for the cache blocks",
    "less than desired GPU memory utilization",
    "larger than the available KV cache memory",
    "KV cache is needed",
)
SAVE_GRACE_S = 5.0  # for a checkpoint that is being written when the run fails


def main() -> None:
    arguments = argparse.ArgumentParser(prog="gadcli.train.worker")
    arguments.add_argument("--run-dir", type=Path, required=True)
    arguments.add_argument("--resume", action="store_true")
    options = arguments.parse_args()
    for name, value in engine_variables().items():  # before torch and vllm are imported
        os.environ.setdefault(name, value)
    code = guarded(options.run_dir, options.resume)
    with contextlib.suppress(OSError):  # a full disk under the log
        sys.stdout.flush()
        sys.stderr.flush()
    # Everything is written and closed; native libraries sometimes abort in their own teardown after that.
    os._exit(code)


def guarded(run_dir: Path, resume: bool) -> int:
    """Train, and turn whatever happens into an exit code, a record and a line in the log."""
    try:
        number = train(run_dir, resume)
    except GadError as error:
        return _record(run_dir, int(error.exit_code), type(error).__name__, error.message, error.hint)
    except KeyboardInterrupt:
        return _record(run_dir, int(ExitCode.INTERRUPTED), "Interrupted", "interrupted while loading", None)
    except BaseException as error:  # noqa: BLE001  the last boundary of this process: nothing may leave it unrecorded
        with contextlib.suppress(OSError):
            traceback.print_exc()
        known = _as_resource_error(error) or _as_full_disk(error) or _as_peer_error(error)
        if known is not None:
            return _record(run_dir, int(known.exit_code), type(known).__name__, known.message, known.hint)
        where = f"logs/rank_{_rank()}.log has the traceback"
        return _record(run_dir, int(ExitCode.BUG), type(error).__name__, f"{type(error).__name__}: {error}", where)
    code = 128 + number if number else 0
    message = "interrupted; saved" if number else "done"
    return _record(run_dir, code, "Interrupted" if number else "Done", message, "--resume goes on" if number else None)


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
    if resume and _rank() == 0:
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


def _as_resource_error(error: BaseException) -> ResourceError | None:
    """Out of memory in any of its spellings, with the knobs that help; None for anything else."""
    import torch

    text = (str(error).splitlines() or ["python could not allocate"])[0][:200]
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if not known and not any(sign in str(error) for sign in OUT_OF_MEMORY):
        return None
    return ResourceError(
        f"out of memory: {text}",
        "actor.micro_batch_tokens=… (halve it), actor.model.gradient_checkpointing=true, "
        "rollout.gpu_memory_utilization (GPUs) or rollout.kv_cache_gb; --dry-run says what fits",
    )


def _as_full_disk(error: BaseException) -> ResourceError | None:
    """A disk that filled while something other than a checkpoint was written (a log, a sample); None for all else."""
    if not is_full_disk(error):
        return None
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f" ({error.filename})" if error.filename else "")
    else:
        text = (str(error).splitlines() or [""])[0][:200]
    return ResourceError(f"disk full: {text}", "free some space and --resume; the last committed checkpoint is intact")


def _as_peer_error(error: BaseException) -> PeerError | None:
    """What gloo, NCCL and the store raise when another rank is gone or silent; None for anything else."""
    import torch.distributed as dist

    first_line = (str(error).splitlines() or [""])[0][:200]
    if not (isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in first_line)):
        return None
    return PeerError(f"rank {_rank()} lost its peers: {first_line}", "--resume goes on from the last checkpoint")


def _record_hang(run_dir: Path, message: str) -> None:
    hint = f"the stacks are in logs/rank_{_rank()}.log; a larger fsdp.timeout_s if the work is merely slow; --resume"
    _record(run_dir, int(ExitCode.PEERS), "PeerError", f"rank {_rank()}: {message}", hint)


def _record(run_dir: Path, code: int, kind: str, message: str, hint: str | None) -> int:
    """Leave the outcome for the parent and in the log; on a full disk the exit code alone must do."""
    with contextlib.suppress(OSError):
        if code:
            print(f"error: {message}" + (f"\nhint: {hint}" if hint else ""), file=sys.stderr)
    with contextlib.suppress(OSError):
        path = run_dir / "logs" / f"rank_{_rank()}.exit.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"code": code, "kind": kind, "message": message, "hint": hint}))
        os.replace(temporary, path)
    return code


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


if __name__ == "__main__":
    main()
