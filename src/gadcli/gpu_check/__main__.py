"""`python -m gadcli.gpu_check DEVICE REPORT`: every check by itself, its findings as JSON; see `gad doctor --gpu`."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from gadcli.gpu_check.bench import Bench, Finding, make_bench
from gadcli.gpu_check.exact import check_attention, check_packing, check_resume, check_scores, check_sync
from gadcli.gpu_check.speed import check_head, check_mask, check_memory, check_rate, check_update

# The sync comes last: an engine that shuts down takes the process group with it.
CHECKS: tuple[Callable[[Bench], list[Finding]], ...] = (
    check_attention, check_packing, check_scores, check_resume, check_rate, check_mask, check_head, check_update,
    check_memory, check_sync,
)  # fmt: skip


def run_checks(bench: Bench, checks: tuple[Callable[[Bench], list[Finding]], ...] = CHECKS) -> list[Finding]:
    """What each check finds; one that raises fails alone."""
    found: list[Finding] = []
    for check in checks:
        name = check.__name__.removeprefix("check_")
        started = time.monotonic()
        try:
            found += check(bench)
        except Exception as error:  # noqa: BLE001  a check that breaks is a finding, and the others still count
            traceback.print_exc()
            found.append(Finding(name, "ran", f"{type(error).__name__}: {str(error).splitlines()[0][:120]}", "", False))
        if bench.on_gpu:
            torch.cuda.empty_cache()
        print(f"{name}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    return found


def main() -> None:
    device, report = sys.argv[1], Path(sys.argv[2])
    with make_bench(device) as bench:
        name = torch.cuda.get_device_name() if bench.on_gpu else "cpu"
        found = run_checks(bench)
        facts = {"device": name, "torch": torch.__version__, "shape": bench.size}
        report.write_text(json.dumps({**facts, "findings": [asdict(one) for one in found]}, indent=1))
    sys.stdout.flush()
    os._exit(0)  # native libraries sometimes abort in their own teardown


if __name__ == "__main__":
    main()
