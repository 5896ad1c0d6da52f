"""Plans of these tests ask in their own process what a child would be asked: each child imports torch anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gadcli.config import model_refusals
from gadcli.errors import ConfigError
from train.in_process import process_as_it_was


@pytest.fixture(autouse=True)
def asked_in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    from gadcli.model.trial import try_models

    def ask(cfg: Any) -> dict[str, Any]:
        try:
            return {"notes": try_models(cfg)}
        except ConfigError as error:
            return {"error": error.message, "hint": error.hint}

    monkeypatch.setenv("GAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model_refusals, "_ask", ask)
    with process_as_it_was():
        yield
