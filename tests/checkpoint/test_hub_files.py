"""What lies beside the weights of a trained model: the base's own files, and what training changes in them.

Pinned here: config keys and both spellings of rope, generation configs that transformers refuses to write, end tokens,
tokenizer files byte for byte, what is left out, critics, cut layers, the record of the base's tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gadcli.checkpoint.hub_files import for_older_readers, read_base_tensors, trained_files, with_ends
from gadcli.errors import CheckpointError

# As the hub has them, written by transformers 4.
OLD = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_theta": 1000000, "rope_scaling": None,
       "torch_dtype": "bfloat16", "num_hidden_layers": 4, "eos_token_id": 0, "bos_token_id": 0}  # fmt: skip
LLAMA_CHAT = {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6, "max_length": 4096}


def base(folder: Path, config: dict[str, Any] = OLD, generation: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file({"w": torch.zeros(2, 3, dtype=torch.bfloat16)}, folder / "model.safetensors")
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_every_file_of_the_base_travels_byte_for_byte(tmp_path: Path) -> None:
    folder = base(tmp_path / "m", generation=LLAMA_CHAT)
    travel = {"tokenizer.json": b"{ }", "tokenizer_config.json": b"{}", "vocab.json": b"{}", "merges.txt": b"a b",
              "tokenizer.model": b"\x00\xff", "chat_template.jinja": b"{{ x }}", "special_tokens_map.json": b"{}",
              "added_tokens.json": b"{}", "our_own.json": b"[1]", "LICENSE": b"mine", "configuration_x.py": b"pass",
              "additional_chat_templates/tools.jinja": b"t"}  # fmt: skip
    stay = ("README.md", "pytorch_model.bin", "optimizer.pt", "model.safetensors.index.json", ".gitattributes",
            "adapter_config.json", "trainer_state.json", "original/params.json")  # fmt: skip
    for name in (*travel, *stay):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(travel.get(name, b"{}"))
    (folder / "model.safetensors.index.json").unlink()
    files = trained_files(folder, critic=False, ends=[2])
    assert {name: files[name] for name in travel} == travel
    assert not set(files) & set(stay)
    assert files["config.json"] == (folder / "config.json").read_bytes()
    assert files["generation_config.json"] == (folder / "generation_config.json").read_bytes()


@pytest.mark.parametrize(
    ("said", "ends", "want"),
    [
        ({"eos_token_id": 0, "do_sample": False}, [2], {"eos_token_id": [2, 0], "do_sample": False}),
        (LLAMA_CHAT, [2], LLAMA_CHAT),
        (LLAMA_CHAT, [7], LLAMA_CHAT | {"eos_token_id": [7, 2]}),
        ({"eos_token_id": [5, 2]}, [2], {"eos_token_id": [5, 2]}),
        ({"eos_token_id": [5, 6]}, [2, 5], {"eos_token_id": [2, 5, 6]}),
        ({"top_k": 3}, [0], {"top_k": 3, "eos_token_id": 0}),  # where it is silent, the config speaks
        ({"top_k": 3}, [2], {"top_k": 3, "eos_token_id": [2, 0]}),
        (None, [2], {"bos_token_id": 0, "eos_token_id": [2, 0]}),
    ],
)
def test_the_trained_ends_join_those_of_the_base(said: Any, ends: list[int], want: dict[str, Any]) -> None:
    assert with_ends(said, OLD, ends) == want


def test_a_generation_config_that_is_no_json_fails_before_training(tmp_path: Path) -> None:
    folder = base(tmp_path / "m")
    (folder / "generation_config.json").write_text("{,}")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        trained_files(folder, critic=False, ends=[2])


NEW_ROPE = [
    ({"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": None}),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e6},
     {"rope_theta": 1e6,
      "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}),
    ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
     {"rope_theta": 1e4, "rope_scaling": None, "partial_rotary_factor": 0.5}),
    ({"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
      "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
     {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ({"rope_type": "longrope", "short_factor": [1], "long_factor": [2], "original_max_position_embeddings": 64,
      "rope_theta": 1e4},
     {"rope_theta": 1e4, "rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [2]}}),
]  # fmt: skip


@pytest.mark.parametrize(("rope", "added"), NEW_ROPE)
def test_what_transformers_5_alone_reads_is_spelled_for_4_too(rope: dict[str, Any], added: dict[str, Any]) -> None:
    new = {"model_type": "x", "rope_parameters": rope, "dtype": "bfloat16"}
    assert for_older_readers(new) == new | added | {"torch_dtype": "bfloat16"}
    assert for_older_readers(OLD) == OLD


def test_a_critics_config_says_what_it_is_and_it_generates_nothing(tmp_path: Path) -> None:
    files = trained_files(base(tmp_path / "m", generation=LLAMA_CHAT), critic=True, ends=[2], num_layers=2)
    config = json.loads(files["config.json"])
    assert config["architectures"] == ["Qwen3ForTokenClassification"] and config["num_labels"] == 1
    assert config["id2label"] == {"0": "LABEL_0"} and config["num_hidden_layers"] == 2
    assert {k: config[k] for k in OLD if k not in ("architectures", "num_hidden_layers")} == {
        k: v for k, v in OLD.items() if k not in ("architectures", "num_hidden_layers")
    }
    assert "generation_config.json" not in files


def test_lists_with_an_entry_for_each_layer_are_cut_with_them(tmp_path: Path) -> None:
    kinds = ["a", "b", "a", "b"]
    folder = base(tmp_path / "m", OLD | {"layer_types": kinds, "eos_token_id": [1, 2, 3, 4]})
    config = json.loads(trained_files(folder, critic=False, ends=[1], num_layers=3)["config.json"])
    assert (config["layer_types"], config["eos_token_id"]) == (kinds[:3], [1, 2, 3, 4])


def test_names_dtypes_and_shapes_of_the_bases_tensors_are_kept(tmp_path: Path) -> None:
    files = trained_files(base(tmp_path / "m"), critic=False, ends=[2])
    (tmp_path / "base_tensors.json").write_bytes(files["base_tensors.json"])
    assert read_base_tensors(tmp_path) == {"w": ("BF16", (2, 3))}
    assert read_base_tensors(None) == {}
