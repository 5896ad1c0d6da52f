"""Folders that hold no model: named as what they are, with the way out, by the plan's check and the worker's alike.

Also links: weights that lie elsewhere are found, a folder made to carry off other files gets none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gadcli.checkpoint.resolve_model import check_model, resolve_model
from gadcli.errors import CheckpointError, ConfigError, GadError

CONFIG = json.dumps({"model_type": "llama", "eos_token_id": 2})


def files(folder: Path, *names: str, **contents: str) -> None:
    """Small files by name, folders made as needed; contents by name with dots as double underscores."""
    for name in (*names, *(key.replace("__", ".") for key in contents)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(contents.get(name.replace(".", "__"), "{}"))


def model(folder: Path) -> Path:
    """A folder that is in order."""
    files(folder, "tokenizer.json", config__json=CONFIG)
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    return folder


def whole_model_with_adapter(folder: Path) -> None:
    files(model(folder), "adapter_config.json")


KINDS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "adapter": (
        lambda f: files(f, "adapter_model.safetensors", adapter_config__json='{"base_model_name_or_path": "org/b"}'),
        "an adapter .* of org/b, not a whole model", "merge_and_unload"),
    "model and adapter": (whole_model_with_adapter, "a whole model and an adapter_config.json", "rm "),
    "deepspeed": (lambda f: files(f, "latest", "zero_to_fp32.py", "global_step9/mp_rank_00_model_states.pt"),
                  "DeepSpeed ZeRO", "zero_to_fp32"),
    "deepspeed step": (lambda f: files(f, "zero_pp_rank_0_mp_rank_00_optim_states.pt"), "DeepSpeed ZeRO",
                       "zero_to_fp32"),
    "megatron": (lambda f: files(f, "iter_0000100/mp_rank_00/model_optim_rng.pt",
                                 latest_checkpointed_iteration__txt="100"), "Megatron", "convert"),
    "verl on megatron": (lambda f: files(f, "actor/dist_ckpt/common.pt", "actor/huggingface/config.json"), "Megatron",
                         "model_merger"),
    "dcp": (lambda f: files(f, ".metadata", "__0_0.distcp"), "torch.distributed.checkpoint", "--trust-checkpoint"),
    "gguf inside": (lambda f: files(f, "m.Q4.gguf"), r"GGUF file \(m\.Q4\.gguf\)", "m.Q4.gguf"),
    "diffusers": (lambda f: files(f, "model_index.json", "unet/config.json"), "diffusers", "language model"),
    "sentence-transformers": (lambda f: files(model(f), "modules.json", "config_sentence_transformers.json"),
                              "embeddings", "language model"),
    "pickles": (lambda f: files(f, "config.json", "pytorch_model.bin"), "only as pickles", "save_pretrained"),
    "sharded pickles": (lambda f: files(f, "config.json", "pytorch_model-00001-of-00002.bin"), "pickles", "convert"),
    "flax": (lambda f: files(f, "config.json", "flax_model.msgpack"), "another framework", "safetensors"),
    "original llama": (lambda f: files(f, "consolidated.00.pth", "params.json"), "maker's own format", "Hugging Face"),
    "config alone": (lambda f: files(f, "config.json", "tokenizer.json"), "config.json without weights", "download"),
    "empty": (lambda f: None, "an empty folder", "download"),
    "text": (lambda f: files(f, "notes.txt"), r"no config\.json .*notes\.txt", "model's folder"),
    "Trainer's output": (lambda f: [model(f / f"checkpoint-{n}") for n in (900, 1000)],
                         "holds checkpoint-1000, checkpoint-900", "checkpoint-1000"),
    "merged pair": (lambda f: [model(f / name) for name in ("actor", "critic")], "holds actor, critic", "actor"),
    "stages": (lambda f: files(f, "mine/gad/global_step_3/x"), "holds mine/gad", "mine/gad"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_without_a_model_is_named_by_plan_and_worker_alike(tmp_path: Path, kind: str) -> None:
    make, what, way_out = KINDS[kind]
    folder = tmp_path / "given"
    folder.mkdir()
    make(folder)
    said = []
    for look in (check_model, resolve_model):
        with pytest.raises(ConfigError, match=what) as caught:
            look(str(folder))
        said.append((caught.value.message, caught.value.hint))
    assert said[0] == said[1]
    assert str(folder) in said[0][0] and way_out in said[0][1]


def test_a_model_in_order_is_taken_by_both(tmp_path: Path) -> None:
    check_model(str(model(tmp_path / "m")))
    assert resolve_model(str(tmp_path / "m")) == tmp_path / "m"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<html>", "not a whole safetensors file"),
        (b"", "not a whole safetensors file"),
    ],
)
def test_weights_that_are_no_weights_are_told_before_training(tmp_path: Path, content: bytes, what: str) -> None:
    (model(tmp_path / "m") / "model.safetensors").write_bytes(content)
    for look in (check_model, resolve_model):
        with pytest.raises(CheckpointError, match=what):
            look(str(tmp_path / "m"))


def test_weights_cut_at_their_end_are_told_before_training(tmp_path: Path) -> None:
    weights = model(tmp_path / "m") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="outside the file"):
        check_model(str(tmp_path / "m"))


def linked(target: Path, link: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def into_a_cache(folder: Path, real: Path) -> None:
    """huggingface_hub's older --local-dir: large files are links to blobs named by their hash."""
    (real.parent / "blobs").mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        blob = real.parent / "blobs" / f"{abs(hash(name)):064x}"[-64:]
        (real / name).rename(blob)
        linked(blob, folder / name)


def one_file_changed(folder: Path, real: Path) -> None:
    """A folder of links made by hand, with a template of its own."""
    for name in os.listdir(real):
        linked(real / name, folder / name)
    (folder / "chat_template.jinja").write_text("mine")


def index_of_links(folder: Path, real: Path) -> None:
    """Shards elsewhere under other names, an index here."""
    (folder / "model.safetensors").unlink()
    for i in (1, 2):
        save_file({f"w{i}": torch.ones(2)}, real / f"part{i}")
        linked(real / f"part{i}", folder / f"model-{i}.safetensors")
    weight_map = {f"w{i}": f"model-{i}.safetensors" for i in (1, 2)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("how", [into_a_cache, one_file_changed, index_of_links])
def test_links_that_people_have_are_followed(tmp_path: Path, how: Callable[[Path, Path], None]) -> None:
    folder, real = model(tmp_path / "given"), model(tmp_path / "elsewhere")
    how(folder, real)
    check_model(str(folder))
    assert resolve_model(str(folder)) == folder
    linked(folder, tmp_path / "alias")
    check_model(str(tmp_path / "alias"))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "extra.json", "vocab.txt"])
def test_links_that_would_carry_off_another_file_are_not(tmp_path: Path, name: str) -> None:
    folder = model(tmp_path / "given")
    files(tmp_path / "home", "secret", "extra.json")
    linked(tmp_path / "home" / ("extra.json" if name == "extra.json" else "secret"), folder / name)
    for look in (check_model, resolve_model) if name in ("config.json", "model.safetensors") else (check_model,):
        with pytest.raises(GadError, match="leads out of its folder"):
            look(str(folder))
