"""Import rules: imports only go down, `algo` stands alone, and what draws or launches knows no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "gadcli"
# Rooms from the ground up; a module may import from its own room and from lower floors.
FLOORS = {
    "errors": 0, "files": 0, "config": 1, "algo": 2, "data": 3, "metrics": 3, "dashboard": 4, "rewards": 4,
    "checkpoint": 4, "distributed": 4, "model": 5, "launch": 5, "rollout": 6, "evaluate": 7, "train": 8, "demo": 9,
    "cli": 10, "__main__": 11,
}  # fmt: skip
HEAVY = ("torch", "transformers", "vllm", "peft", "tensorboard")
# Modules that start in every parent process, by dotted prefix: none of them may load what is HEAVY.
LIGHT = ("rewards", "cli", "config", "dashboard", "launch", "checkpoint")
LIGHT_MODULES = (
    "errors", "files", "metrics.table", "metrics.health", "metrics.record", "metrics.diagnose", "data.rows",
    "data.files", "data.check", "evaluate.text",
)  # fmt: skip


def modules() -> dict[str, Path]:
    """Dotted name below gadcli (`config.plan`) to file."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name:
            found[name] = path
    return found


def package_of(path: Path, level: int) -> str:
    """The package that `level` dots mean in a file of gadcli ("" for none)."""
    if not level:
        return ""
    folder = path.parents[level - 1]
    return ".".join(("gadcli", *folder.relative_to(SOURCE).parts))


def imports(path: Path, anywhere: bool = True) -> Iterator[str]:
    """Absolute names that a file imports; with `anywhere`, inside functions too (TYPE_CHECKING blocks never)."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, (package_of(path, node.level), node.module)))
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
        elif anywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting += ast.iter_child_nodes(node)


def floor_of(module: str) -> int:
    return FLOORS[module.partition(".")[0]]


def upward(name: str, path: Path) -> list[str]:
    """Imports of a module that go up, or sideways into another room."""
    room = name.partition(".")[0]
    bad = []
    for target in imports(path):
        package, _, inside = target.partition(".")
        other = inside.partition(".")[0]
        if package != "gadcli" or other == room or other not in FLOORS:
            continue
        if FLOORS[other] >= floor_of(name):
            bad.append(f"{name} imports {target}")
    return bad


def test_every_module_is_in_a_known_room() -> None:
    unknown = [name for name in modules() if name.partition(".")[0] not in FLOORS]
    assert not unknown


def test_imports_only_go_down() -> None:
    bad = [line for name, path in modules().items() for line in upward(name, path)]
    assert not bad, "\n".join(bad)


def test_the_walk_would_see_an_upward_import(tmp_path: Path) -> None:
    mutant = tmp_path / "mutant.py"
    mutant.write_text("def f():\n    from gadcli.cli.app import main\n    import gadcli.launch.supervisor\n")
    assert len(upward("config.mutant", mutant)) == 2
    assert upward("cli.mutant", mutant) == []


def test_algo_imports_torch_and_nothing_of_ours() -> None:
    allowed = {"torch", "gadcli", "__future__"} | set(sys.stdlib_module_names)
    for name, path in modules().items():
        if name.partition(".")[0] == "algo":
            for target in imports(path):
                assert target.split(".")[0] in allowed, f"{name} imports {target}"
                assert not target.startswith("gadcli") or target.startswith("gadcli.algo"), f"{name} imports {target}"


def light_names() -> list[str]:
    found = modules()
    prefixes = tuple(name for name in found if name.startswith(LIGHT))
    return [f"gadcli.{name}" for name in found if name in prefixes or name in LIGHT_MODULES]


def loaded_after(code: str) -> set[str]:
    """Top-level packages in memory after running `code` in a fresh interpreter."""
    start = f"import sys\nsys.path.insert(0, {str(SOURCE.parent)!r})"
    program = f"{start}\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_the_parents_modules_load_no_torch() -> None:
    names = light_names()
    loaded = loaded_after("\n".join(f"import {name}" for name in names))
    if set(HEAVY) & loaded:  # find out which one
        guilty = [name for name in names if set(HEAVY) & loaded_after(f"import {name}")]
        pytest.fail(f"{', '.join(guilty)} load {', '.join(sorted(set(HEAVY) & loaded))}")


def test_the_commands_load_nothing_slow_when_imported() -> None:
    names = [f"gadcli.{name}" for name in modules() if name.startswith("cli")]
    loaded = loaded_after("\n".join(f"import {name}" for name in names))
    assert not loaded & {*HEAVY, "omegaconf", "pyarrow", "rich", "numpy", "yaml"}


def test_help_loads_the_parser_alone() -> None:
    loaded = loaded_after("from gadcli.cli.app import run\nassert run(['-h']) == 0")
    assert not loaded & {*HEAVY, "omegaconf", "pyarrow", "rich", "numpy", "yaml", "click"}
