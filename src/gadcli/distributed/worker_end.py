"""How a worker ends: whatever happens becomes an exit code, a record for the parent and lines in the log.

Used by every kind of worker (training, evaluation). Knows no torch until something has gone wrong.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from gadcli.errors import ConfigError, ExitCode, GadError, PeerError, ResourceError, is_full_disk
from gadcli.files import write_atomic

# The launcher's own stderr, where the worker's is a log file: whoever started the ranks sees why one failed.
LAUNCHER_STDERR_VARIABLE = "GAD_LAUNCHER_STDERR"
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
TRAINING_MEMORY_HINT = (
    "actor.micro_batch_tokens=… (halve it), actor.model.gradient_checkpointing=true, "
    "rollout.gpu_memory_utilization (GPUs) or rollout.kv_cache_gb; --dry-run says what fits"
)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def run_worker(
    run_dir: Path, work: Callable[[], int], variables: Mapping[str, str], memory_hint: str = TRAINING_MEMORY_HINT
) -> NoReturn:
    """Set `variables` where they are unset (before torch and vllm are imported), do `work`, leave with its code."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    code = guarded(run_dir, work, memory_hint)
    with contextlib.suppress(OSError):  # a full disk under the log
        sys.stdout.flush()
        sys.stderr.flush()
    # Everything is written and closed; native libraries sometimes abort in their own teardown after that.
    os._exit(code)


def guarded(run_dir: Path, work: Callable[[], int], memory_hint: str = TRAINING_MEMORY_HINT) -> int:
    """`work` returns the number of the signal that stopped it, else 0; whatever it raises becomes the exit code."""
    try:
        number = work()
    except GadError as error:
        return record_end(run_dir, int(error.exit_code), type(error).__name__, error.message, error.hint)
    except KeyboardInterrupt:
        return record_end(run_dir, int(ExitCode.INTERRUPTED), "Interrupted", "interrupted while loading", None)
    except BaseException as error:  # noqa: BLE001  the last boundary of this process: nothing may leave it unrecorded
        with contextlib.suppress(OSError):
            traceback.print_exc()
        known = as_resource_error(error, memory_hint) or as_full_disk(error) or as_peer_error(error)
        if known is not None:
            return record_end(run_dir, int(known.exit_code), type(known).__name__, known.message, known.hint)
        where = f"logs/rank_{rank()}.log has the traceback"
        return record_end(run_dir, int(ExitCode.BUG), type(error).__name__, f"{type(error).__name__}: {error}", where)
    if number:
        return record_end(run_dir, 128 + number, "Interrupted", "interrupted; saved", "--resume goes on")
    return record_end(run_dir, 0, "Done", "done", None)


def record_end(run_dir: Path, code: int, kind: str, message: str, hint: str | None) -> int:
    """Leave the outcome for the parent, in the log and with the launcher; returns the code to end with.

    On a full disk the code alone must do, and a success that cannot be recorded is none: it becomes 6.
    """
    if code:
        text = f"error: {message}" + (f"\nhint: {hint}" if hint else "")
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr)
        with contextlib.suppress(OSError, KeyError):
            os.write(int(os.environ[LAUNCHER_STDERR_VARIABLE]), f"gad: rank {rank()}: {text}\n".encode())
    path = run_dir / "logs" / f"rank_{rank()}.exit.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"code": code, "kind": kind, "message": message, "hint": hint}))
    except OSError:
        return code or int(ExitCode.RESOURCES)
    return code


def read_record(path: Path) -> dict[str, Any] | None:
    """A worker's exit record, or None where it left none (or a torn one)."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("code"), int) else None


def as_resource_error(error: BaseException, hint: str) -> ResourceError | None:
    """Out of memory in any of its spellings; None for anything else."""
    import torch

    text = (str(error).splitlines() or ["python could not allocate"])[0][:200]
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if not known and not any(sign in str(error) for sign in OUT_OF_MEMORY):
        return None
    return ResourceError(f"out of memory: {text}", hint)


def as_full_disk(error: BaseException) -> ResourceError | None:
    """A disk that filled while something other than a checkpoint was written (a log, a sample); None for all else."""
    if not is_full_disk(error):
        return None
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f" ({error.filename})" if error.filename else "")
    else:
        text = (str(error).splitlines() or [""])[0][:200]
    return ResourceError(f"disk full: {text}", "free some space and --resume; the last committed checkpoint is intact")


def as_peer_error(error: BaseException) -> GadError | None:
    """What gloo, NCCL and the store raise when another rank is gone or silent, or rank 0's port is taken."""
    import torch.distributed as dist

    first_line = (str(error).splitlines() or [""])[0][:200]
    if not (isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in first_line)):
        return None
    if "EADDRINUSE" in str(error) or os.strerror(errno.EADDRINUSE).lower() in str(error).lower():
        port = os.environ.get("MASTER_PORT", "")
        return ConfigError(
            f"rank {rank()} cannot listen on MASTER_PORT={port}: another process does",
            "another MASTER_PORT (torchrun --master-port=…), or end what holds it",
        )
    return PeerError(f"rank {rank()} lost its peers: {first_line}", "--resume goes on from the last checkpoint")
