"""A student cut from a model: its logits are those of the base with the other layers skipped; what lies beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from gadcli.checkpoint import cut
from gadcli.checkpoint.cut import choose_layers, cut_config, cut_model
from gadcli.cli.merge import parse_layers
from gadcli.errors import CheckpointError, ConfigError
from mutants import mutated
from tiny import FAMILIES, write_tiny_model

KEEP = [0, 2, 5]


class Skipped(nn.Module):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


def logits(model: Any, length: int = 24) -> torch.Tensor:
    ids = torch.arange(5, 5 + length)[None]  # longer than the window of the families that have one
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def with_layers_skipped(folder: Path, kept: list[int]) -> Any:
    model = load(folder)
    for index in range(len(model.model.layers)):
        if index not in kept:
            model.model.layers[index] = Skipped()
    return model


def check(folder: Path, out: Path, module: Any = cut) -> None:
    module.cut_model(folder, out, keep=KEEP)
    expected = logits(with_layers_skipped(folder, KEEP))
    assert torch.allclose(logits(load(out)), expected, atol=1e-5)
    assert not torch.allclose(expected, logits(load(folder)), atol=1e-2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cut_computes_what_the_base_does_without_the_other_layers(tmp_path: Path, family: str, tied: bool) -> None:
    folder = write_tiny_model(tmp_path / "base", family, tied=tied, layers=6)
    check(folder, tmp_path / "cut")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[values[layer] for layer in kept]", "values[: len(kept)]"),  # the first layers' kinds for the kept ones
        ("model.layers.{place[int(match[1])]}", "model.layers.{len(kept) - 1 - place[int(match[1])]}"),
    ],
)
def test_mutants_of_the_cut_compute_something_else(tmp_path: Path, old: str, new: str) -> None:
    folder = write_tiny_model(tmp_path / "base", "gemma3-window", layers=6)
    check(folder, tmp_path / "right")
    with pytest.raises(AssertionError):
        check(folder, tmp_path / "wrong", mutated("checkpoint.cut", old, new))


def test_a_pattern_of_layer_kinds_without_a_list_is_cut_as_the_list_it_stands_for(tmp_path: Path) -> None:
    """Older files of Gemma 2 hold no layer_types: even layers have the window. Layers 0, 2, 5: window, window, full."""
    folder = write_tiny_model(tmp_path / "base", "gemma2", layers=6)
    config = json.loads((folder / "config.json").read_text())
    del config["layer_types"]
    (folder / "config.json").write_text(json.dumps(config))
    check(folder, tmp_path / "cut")
    kinds = json.loads((tmp_path / "cut" / "config.json").read_text())["layer_types"]
    assert kinds == ["sliding_attention", "sliding_attention", "full_attention"]


def test_shards_stay_shards_and_what_lies_beside_is_copied_byte_for_byte(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "base", "qwen2", tied=True, layers=6)
    load(folder).save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    (folder / "generation_config.json").write_text('{"eos_token_id": 1,  "odd": "spacing"}')
    check(folder, tmp_path / "cut")
    out = tmp_path / "cut"
    assert len(list(out.glob("model-*.safetensors"))) > 1 and (out / "model.safetensors.index.json").is_file()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    stored = {name for path in out.glob("*.safetensors") for name in load_file(path)}
    assert "lm_head.weight" not in stored  # tied, as it was
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, out))
    differing = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert differing == {"num_hidden_layers", "layer_types", "max_window_layers"} & differing
    assert after["num_hidden_layers"] == 3
    assert AutoTokenizer.from_pretrained(out)("It returns").input_ids


def test_the_model_card_says_what_was_kept(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "base", layers=6)
    report = cut_model(folder, tmp_path / "cut", keep=KEEP, name="org/base")
    card = (tmp_path / "cut" / "README.md").read_text()
    assert "org/base" in card and "0, 2, 5 (of 6, from 0)" in card
    model = load(tmp_path / "cut")
    assert report.parameters == sum(p.numel() for p in model.parameters()) < report.base_parameters
    assert f"{report.parameters:,}" in card


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [(30, 8, [0, 1, 2, 3, 4, 5, 28, 29]), (6, 2, [0, 5]), (6, 1, [0]), (6, 3, [0, 1, 5]), (4, 4, [0, 1, 2, 3])],
)
def test_the_first_and_the_last_layers_are_kept(layers: int, count: int, expected: list[int]) -> None:
    assert choose_layers(layers, count) == expected


def test_layers_are_named_singly_or_as_ranges() -> None:
    assert parse_layers("0-2, 5") == [0, 1, 2, 5] and parse_layers("") == []
    for text in ("first", "5-2", "3-", "0-99999999999"):
        with pytest.raises(ConfigError, match="not layer numbers"):
            parse_layers(text)


@pytest.mark.parametrize("keep", [[1, 0], [0, 0], [0, 6]])
def test_layers_that_the_model_does_not_have_or_twice_are_refused(tmp_path: Path, keep: list[int]) -> None:
    folder = write_tiny_model(tmp_path / "base", layers=6)
    with pytest.raises(ConfigError, match="rising layer numbers from 0 to 5"):
        cut_model(folder, tmp_path / "cut", keep=keep)
    with pytest.raises(ConfigError, match="the model has 6 layers"):
        cut_model(folder, tmp_path / "cut", count=7)
    assert not (tmp_path / "cut").exists()


def test_a_folder_that_exists_and_other_architectures_are_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = write_tiny_model(tmp_path / "base", layers=6)
    (tmp_path / "full").mkdir()
    with pytest.raises(CheckpointError, match="exists: not overwritten"):
        cut_model(folder, tmp_path / "full", count=2)
    GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=40)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match=r"not model\.layers\.N"):
        cut_model(tmp_path / "gpt2", tmp_path / "cut", count=2)


def moe(**more: Any) -> dict[str, Any]:
    return {"model_type": "qwen3_moe", "num_hidden_layers": 6, **more}


def test_lists_of_layers_are_renumbered_and_rules_by_number_are_refused() -> None:
    """Of dense layers 0, 1 and 5, the cut 0, 2, 5 keeps 0 and 5: places 0 and 2."""
    new = cut_config(moe(mlp_only_layers=[0, 1, 5], decoder_sparse_step=1), KEEP, 6, uniform=False)
    assert new["mlp_only_layers"] == [0, 2] and new["num_hidden_layers"] == 3
    with pytest.raises(CheckpointError, match="decoder_sparse_step=2 goes by a layer's number"):
        cut_config(moe(decoder_sparse_step=2), KEEP, 6, uniform=False)
    deepseek = {"model_type": "deepseek_v3", "num_hidden_layers": 6, "first_k_dense_replace": 3}
    assert cut_config(deepseek, KEEP, 6, uniform=False)["first_k_dense_replace"] == 2  # 0 and 2 of 0, 1, 2
    llama = {"model_type": "llama", "num_hidden_layers": 6}
    with pytest.raises(CheckpointError, match="different tensors"):
        cut_config(llama, KEEP, 6, uniform=False)
    with pytest.raises(CheckpointError, match="odd_layers is a list"):
        cut_config({**llama, "odd_layers": [1, 3]}, KEEP, 6, uniform=True)
    with pytest.raises(CheckpointError, match="knows no model of type 'none such'"):
        cut_config({**llama, "model_type": "none such"}, KEEP, 6, uniform=True)
