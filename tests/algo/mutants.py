"""Loads a module of gadcli.algo with one line changed: a seeded bug that the test beside it must catch."""

from __future__ import annotations

import importlib.util
import sys
from itertools import count
from pathlib import Path
from types import ModuleType

import gadcli.algo

_SERIAL = count()


def mutated(module: str, old: str, new: str) -> ModuleType:
    """gadcli.algo.<module> with its only occurrence of `old` replaced by `new`.

    Fails when `old` is not there exactly once, so a mutant cannot rot into the original.
    """
    path = Path(gadcli.algo.__path__[0]) / f"{module}.py"
    source = path.read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {path.name}"
    name = f"gadcli.algo.mutant_{next(_SERIAL)}_{module}"
    spec = importlib.util.spec_from_loader(name, loader=None)
    assert spec is not None
    mutant = importlib.util.module_from_spec(spec)
    mutant.__package__ = "gadcli.algo"
    sys.modules[name] = mutant  # dataclasses look their module up here
    exec(compile(source.replace(old, new), f"<mutant of {path.name}>", "exec"), mutant.__dict__)
    return mutant
