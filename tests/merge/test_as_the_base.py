"""A merged model against the base it was trained from: files, names, shapes and dtypes as the base's own.

Checkpoints are saved here as a run saves them (model state, `trained_files`), without training in between; what a
reader needs is compared with the base folder's own files, read by safetensors and transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from gadcli.checkpoint.hub_files import trained_files
from gadcli.checkpoint.merge.to_huggingface import OWN, MergeOptions, to_huggingface
from gadcli.checkpoint.resolve_model import resolve_model
from gadcli.errors import CheckpointError
from gadcli.train.checkpoint import save_checkpoint

SIZES: dict[str, Any] = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                             num_attention_heads=2, num_key_value_heads=1, head_dim=8, eos_token_id=2,
                             bos_token_id=1, pad_token_id=0)  # fmt: skip
EXPERTS: dict[str, Any] = dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12)
FAMILIES: dict[str, PretrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS),
    "qwen2_moe": Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=12),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2),
    "olmoe": OlmoeConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, num_experts=3, num_experts_per_tok=2),
    "gemma3_text": Gemma3TextConfig(**SIZES, query_pre_attn_scalar=8, sliding_window=8),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
}


def write_base(folder: Path, config: PretrainedConfig, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale if p.dim() > 1 else 1.0)
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{ }")
    return folder


def headers(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Name -> dtype and shape, as the safetensors package reads them."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {n: (file.get_slice(n).get_dtype(), file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
    return found


def trained(base: Path, run: Path, *, critic: bool = False, num_layers: int = 0, change: float = 1.0) -> Path:
    """global_step_1/actor or critic of a run from `base` in float32; a small, known change stands for training."""
    config = AutoConfig.from_pretrained(base)
    config.num_hidden_layers = num_layers or config.num_hidden_layers
    if critic:
        config.num_labels = 1
    auto = AutoModelForTokenClassification if critic else AutoModelForCausalLM
    model = auto.from_pretrained(base, config=config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(change)
    name = "critic" if critic else "actor"
    files = trained_files(base, critic=critic, ends=[2], num_layers=num_layers)

    def assets(folder: Path) -> None:
        for file, content in files.items():
            (folder / file).write_bytes(content)

    save_checkpoint(
        run, 1, stage="gad", config_hash="c", models={name: model.state_dict()}, optims={}, trainer={"step": 1},
        rng={}, assets={name: assets}, metrics={},
    )  # fmt: skip
    return run / "global_step_1" / name


@pytest.mark.parametrize("family", FAMILIES)
def test_names_shapes_and_dtypes_are_those_of_the_bases_files(tmp_path: Path, family: str) -> None:
    base = write_base(tmp_path / "base", FAMILIES[family])
    report = to_huggingface(trained(base, tmp_path / "run"), tmp_path / "out", MergeOptions(probe=True))
    assert report.verified[0] == "names, shapes and dtypes as in the base's files" and report.notes == []
    assert headers(tmp_path / "out") == headers(base)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], before[name] + 1.0) for name in before)


def test_the_bases_dtype_is_written_and_the_masters_are_kept_for_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAD_CACHE", str(tmp_path / "cache"))
    base = write_base(tmp_path / "base", FAMILIES["llama"], torch.bfloat16)
    shards = trained(base, tmp_path / "run")
    to_huggingface(shards, tmp_path / "out")
    assert headers(tmp_path / "out") == headers(base)
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said["dtype"] == said["torch_dtype"] == "bfloat16"
    to_huggingface(shards, tmp_path / "own", MergeOptions(dtype=OWN))
    assert {dtype for dtype, _ in headers(tmp_path / "own").values()} == {"F32"}
    # A second run starts from the float32 weights, and its merge still knows the base's dtype.
    start = resolve_model(str(shards), say=lambda _: None)
    assert {dtype for dtype, _ in headers(start).values()} == {"F32"}
    to_huggingface(trained(start, tmp_path / "second"), tmp_path / "out2")
    assert headers(tmp_path / "out2") == headers(base)
    assert "base_tensors.json" not in {p.name for p in (tmp_path / "out2").iterdir()}


def test_a_critic_of_fewer_layers_has_the_bases_names_and_a_head(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", FAMILIES["qwen3_moe"])
    shards = trained(base, tmp_path / "run", critic=True, num_layers=1)
    to_huggingface(shards, tmp_path / "out", MergeOptions(probe=True))
    want = {n: v for n, v in headers(base).items() if ".layers.1." not in n and not n.startswith("lm_head")}
    assert headers(tmp_path / "out") == want | {"score.weight": ("F32", [1, 16]), "score.bias": ("F32", [1])}


def test_a_tied_head_that_the_base_wrote_twice_is_written_twice(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base = write_base(tmp_path / "base", LlamaConfig(**SIZES, tie_word_embeddings=True))
    weights = load_file(base / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    to_huggingface(trained(base, tmp_path / "run"), tmp_path / "out")
    assert headers(tmp_path / "out") == headers(base)


def test_parts_of_the_base_that_are_not_trained_are_told(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base = write_base(tmp_path / "base", FAMILIES["llama"])
    save_file(load_file(base / "model.safetensors") | {"mtp.w": torch.ones(1)}, base / "model.safetensors")
    report = to_huggingface(trained(base, tmp_path / "run"), tmp_path / "out")
    assert report.notes == ["1 tensors of the base are no part of the trained model: left out (mtp.w)"]


def test_a_name_that_the_base_does_not_have_is_an_error(tmp_path: Path) -> None:
    """The mutant of the tests above: packed names, as transformers 5 holds them, in a folder for readers of others."""
    from gadcli.checkpoint.merge.expected import compare_with_base

    base = write_base(tmp_path / "base", FAMILIES["mixtral"])
    known = {n: (d, tuple(s)) for n, (d, s) in headers(base).items()}
    packed = {n: v for n, v in known.items() if ".experts." not in n} | {
        "model.layers.0.mlp.experts.down_proj": ("F32", (3, 16, 24))
    }
    with pytest.raises(CheckpointError, match=r"not those of the base's files: .*1 unexpected"):
        compare_with_base(packed, known, {}, critic=False)


def test_files_that_training_does_not_touch_are_the_bases_byte_for_byte(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", FAMILIES["llama"])
    config = json.loads((base / "config.json").read_text()) | {"rope_theta": 1e4, "rope_scaling": None}
    config["torch_dtype"] = config.pop("dtype")
    (base / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "rope_parameters"}, indent=1))
    (base / "generation_config.json").write_text('{"temperature": 0.9, "eos_token_id": 2}')  # no do_sample: refused
    to_huggingface(trained(base, tmp_path / "run"), tmp_path / "out")
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes(), name
