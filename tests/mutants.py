"""Loads a module of gadcli with one line changed: a seeded bug that the test beside it must catch."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

_SERIAL = count()


def mutated(module: str, old: str, new: str) -> Any:
    """gadcli.<module> with its only occurrence of `old` replaced by `new`; fails when it is not there exactly once."""
    original = importlib.import_module(f"gadcli.{module}")
    source = Path(str(original.__file__)).read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module}"
    name = f"gadcli.mutant_{next(_SERIAL)}"
    spec = importlib.util.spec_from_loader(name, loader=None)
    assert spec is not None
    mutant: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[name] = mutant  # dataclasses look their module up here
    exec(compile(source.replace(old, new), f"<mutant of {module}>", "exec"), mutant.__dict__)
    return mutant
