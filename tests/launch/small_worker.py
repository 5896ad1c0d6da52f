"""A worker for tests of the parent: a real process that writes what a worker writes and misbehaves on request.

What it does stands in SMALL_WORKER, words separated by blanks: `steps=3` `sleep=0.05` `code=5` (end with a record),
`raise` (no record, code 1), `silent=9` (code without a record), `rank=1` (only this rank misbehaves), `abort` (SIGABRT
after the record), `hang` (after the steps, forever), `child` (start a child in a session of its own), `deaf` (ignore
SIGTERM and SIGINT), `spin=3` (seconds of busy work without a record), `others` (the ranks that do not misbehave
hang), `boot=3` (seconds before it listens to signals).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from gadcli.checkpoint.manifest import Manifest, hash_file, step_folder, write_manifest
from gadcli.metrics.record import MetricsWriter, write_status

RANK = int(os.environ.get("RANK", "0"))


def words() -> dict[str, str]:
    pairs = [word.partition("=") for word in os.environ.get("SMALL_WORKER", "").split()]
    return {name: value for name, _, value in pairs}


def end(run_dir: Path, code: int, message: str, hint: str = "") -> int:
    record = {"code": code, "kind": "test", "message": message, "hint": hint}
    (run_dir / "logs" / f"rank_{RANK}.exit.json").write_text(json.dumps(record))
    return code


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    run_dir, asked = args.run_dir, words()
    mine = "rank" not in asked or int(asked["rank"]) == RANK
    wanted: list[int] = []
    (run_dir / f"pid_{RANK}").write_text(str(os.getpid()))
    time.sleep(float(asked.get("boot", "0")))
    if "deaf" in asked:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    else:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda n, frame: wanted.append(n))
    print(f"rank {RANK} is up, pid {os.getpid()}", flush=True)
    if "child" in asked:
        child = subprocess.Popen(["sleep", "300"], start_new_session=True)
        (run_dir / f"child_{RANK}").write_text(str(child.pid))
    return work(run_dir, args.resume, asked, mine, wanted)


def work(run_dir: Path, resume: bool, asked: dict[str, str], mine: bool, wanted: list[int]) -> int:
    writer = MetricsWriter(run_dir, append=resume) if RANK == 0 else None
    if writer is not None:
        writer.run(stage="seqkd", exp_name="t", total_steps=int(asked.get("steps", "3")), start_step=0, resumed=resume)
    for step in range(1, int(asked.get("steps", "3")) + 1):
        if writer is not None:
            write_status(run_dir, state="running", stage="seqkd", step=step, phase="actor")
        time.sleep(float(asked.get("sleep", "0.05")))
        if writer is not None:
            writer.step(step, 0.0, {"actor/sft_loss": 1.0 / step})
        while wanted:
            number = wanted.pop()
            if writer is not None:
                writer.event("save", f"saved at step {step}")
            if number != signal.SIGUSR1:
                return end(run_dir, 130 if number == signal.SIGINT else 143, f"saved at step {step}")
    if mine:
        misbehave(run_dir, asked)
    elif "others" in asked:
        misbehave(run_dir, {"hang": ""})
    if writer is not None:
        writer.end(0, "done")
        checkpoint(run_dir, int(asked.get("steps", "3")))
    return end(run_dir, 0, "")


def checkpoint(run_dir: Path, step: int) -> None:
    """A committed checkpoint with one small file a model."""
    folder = step_folder(run_dir, step)
    for name in ("actor", "critic"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / ".metadata").write_text(name)
    files = {f"{name}/.metadata": hash_file(folder / name / ".metadata") for name in ("actor", "critic")}
    write_manifest(folder, Manifest(step, "gad", "", 1, ["actor", "critic"], files))


def misbehave(run_dir: Path, asked: dict[str, str]) -> None:
    if "spin" in asked:
        until = time.monotonic() + float(asked["spin"])
        while time.monotonic() < until:
            pass
    if "raise" in asked:
        raise ValueError("a bug for the log")
    if "silent" in asked:
        os._exit(int(asked["silent"]))
    if "code" in asked:
        sys.exit(end(run_dir, int(asked["code"]), "what went wrong, where", "what=to_do"))
    if "abort" in asked:
        end(run_dir, 0, "")
        os.abort()
    while "hang" in asked:
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
