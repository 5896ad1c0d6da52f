"""Loads a module of gadcli with one line changed: a seeded bug that the test beside it must catch."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import FunctionType, ModuleType
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


@contextmanager
def planted(module: str, old: str, new: str) -> Iterator[None]:
    """Within, the real functions of gadcli.<module> run the mutant's code, whoever has imported them.

    `old` and `new` must have as many lines. Only functions and methods can be mutated so, not what a module computes.
    """
    original, mutant = importlib.import_module(f"gadcli.{module}"), mutated(module, old, new)
    theirs = dict(_functions(mutant))
    changed = [(f, f.__code__) for name, f in _functions(original) if f.__code__ != theirs[name].__code__]
    assert changed, f"{old!r} stands in no function of {module}"
    for name, function in _functions(original):
        function.__code__ = theirs[name].__code__
    try:
        yield
    finally:
        for function, code in changed:
            function.__code__ = code


def _functions(module: Any) -> Iterator[tuple[str, FunctionType]]:
    """A module's own functions, methods and properties by qualified name, decorators seen through."""
    owners = [module, *(value for value in vars(module).values() if isinstance(value, type))]
    for owner in owners:
        if owner is not module and owner.__module__ != module.__name__:
            continue
        for value in vars(owner).values():
            inner = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            function = inspect.unwrap(inner) if callable(inner) else None
            if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                yield function.__qualname__, function
