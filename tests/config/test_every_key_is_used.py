"""Every key of the schema is read by code that acts on it: none is documented, accepted and then ignored.

A key counts as read where its attribute is taken from its own section (`cfg.rollout.top_k`), or from a local name for
that section in a file that names the section's class (`def f(cfg: RolloutConfig)`). What only checks and plans read
does not count: a plan that prints a setting does not obey it.
"""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path

import gadcli
from gadcli.algo.discriminator import NUMBERS
from gadcli.config import schema

SOURCE = Path(gadcli.__path__[0])


def leaves(cls: type, prefix: str = "", section: str = "") -> Iterator[tuple[str, str, type]]:
    """(dotted key, name of its section, class of its section)."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner):
            yield from leaves(inner, f"{prefix}{field.name}.", field.name)
        else:
            yield f"{prefix}{field.name}", section, cls


def attribute_reads() -> dict[str, set[tuple[str, str]]]:
    """Attribute name -> (what it was taken from, file's text) over all of the package but config.

    A name that stands for a section (`settings = cfg.trainer.tensorboard`) is spelled out.
    """
    found: dict[str, set[tuple[str, str]]] = {}
    for path in SOURCE.rglob("*.py"):
        if path.is_relative_to(SOURCE / "config"):
            continue
        text = path.read_text()
        nodes = list(ast.walk(ast.parse(text)))
        aliases = {
            target.id: ast.unparse(node.value)
            for node in nodes
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                taken_from = ast.unparse(node.value)
                found.setdefault(node.attr, set()).add((aliases.get(taken_from, taken_from), text))
    return found


READS = attribute_reads()
LOCAL_NAMES = ("cfg", "run.cfg", "self.cfg", "config", "self.config", "settings")


def is_read(key: str, section: str, cls: type) -> bool:
    name = key.rpartition(".")[2]
    for taken_from, text in READS.get(name, ()):
        if section and taken_from.rpartition(".")[2] == section:
            return True
        if taken_from in LOCAL_NAMES and (cls.__name__ in text or not section):
            return True
    return False


def numbers_of_losses() -> set[str]:
    """Keys that `model.critic` hands over as a whole section: `getattr(cfg, cfg.loss)`."""
    return {f"critic.{loss}.{name}" for loss, names in NUMBERS.items() for name in names}


def ignored(root: type) -> list[str]:
    known = numbers_of_losses()
    return [key for key, section, cls in leaves(root) if key not in known and not is_read(key, section, cls)]


def test_every_key_is_read() -> None:
    assert ignored(schema.GadConfig) == []


def test_the_numbers_of_each_discriminator_loss_are_its_section() -> None:
    in_schema = {key for key, section, _ in leaves(schema.GadConfig) if section in NUMBERS}
    assert in_schema == numbers_of_losses()


def test_a_key_that_nobody_reads_would_be_caught() -> None:
    """The mutant: a section with one more key, and a key of another section's name."""

    @dataclasses.dataclass
    class RolloutConfig(schema.RolloutConfig):
        best_of: int = 1
        grad_clip: float = 1.0  # read, but as actor.grad_clip

    root = dataclasses.make_dataclass("Root", [("rollout", RolloutConfig)])
    assert ignored(root) == ["rollout.best_of", "rollout.grad_clip"]
