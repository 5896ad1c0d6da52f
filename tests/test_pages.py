"""CONTRIBUTING.md and docs/architecture.md name files, rooms and floors that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from test_imports import ROOMS

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "gadcli"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_every_file_that_a_page_names_exists(page: str) -> None:
    names = set(re.findall(r"`([\w./]+/[\w./]*)`", (ROOT / page).read_text(encoding="utf-8")))
    assert len(names) > 20
    missing = [name for name in names if not (ROOT / name).exists() and not (SOURCE / name).exists()]
    assert not missing


def test_the_page_has_the_floors_and_torch_free_rooms_that_the_import_rules_hold() -> None:
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|[^|]*\| (\w+)[^|]* \|$", ARCHITECTURE, re.M)
    stated = {
        name.removesuffix(".py"): (int(floor), torch == "no")
        for floor, cell, torch in rows
        for name in re.findall(r"`([\w.]+)`", cell)
    }
    assert stated == {name: (room.floor, room.torch_free) for name, room in ROOMS.items() if name != "__main__"}
