"""docs/algorithm.md names keys, files and metrics that exist, and numbers that are the schema's defaults."""

from __future__ import annotations

import re
from pathlib import Path

from omegaconf import OmegaConf

from gadcli.config.schema import GadConfig
from gadcli.metrics.table import METRICS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
SECTIONS = ("data", "actor", "critic", "algorithm", "rollout", "trainer")
CONFIG = OmegaConf.structured(GadConfig)


def test_every_key_on_the_page_is_in_the_schema() -> None:
    keys = set(re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z0-9_.]+)", PAGE))
    assert len(keys) > 25
    missing = [key for key in keys if OmegaConf.select(CONFIG, key, default="none such") == "none such"]
    assert not missing


def test_every_file_on_the_page_exists() -> None:
    files = re.findall(r"`((?:algo|train|model|rollout)/[a-z_]+\.py)`", PAGE)
    assert len(files) >= 7
    assert [file for file in files if not (ROOT / "src" / "gadcli" / file).is_file()] == []


def test_every_metric_on_the_page_is_in_the_table() -> None:
    names = set(re.findall(r"`((?:critic|actor|rollout|val)/[a-z_]+)`", PAGE))
    assert names
    assert [name for name in names if name not in METRICS] == []


def test_the_defaults_that_the_page_states_are_the_schemas() -> None:
    stated = re.findall(r"`(critic\.[a-z0-9_.]+)` \((?:default )?([\d.]+)\)", PAGE)
    assert len(stated) == 5
    for key, value in stated:
        assert OmegaConf.select(CONFIG, key) == float(value), key
