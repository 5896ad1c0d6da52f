"""Checkpoints that verl 0.9.1's own FSDPCheckpointManager wrote, merged and compared bit for bit with full_tensor().

Needs a Python that has verl (not one of ours: verl wants ray and more): GAD_TEST_VERL_PYTHON=/path/to/bin/python.
Pinned here: world sizes 1-3, FSDP1 and FSDP2, hybrid meshes, bfloat16, critics, TRL value heads, LoRA in all its forms.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gadcli.checkpoint.merge.to_huggingface import MergeOptions, to_huggingface
from tiny import write_tiny_model

VERL_PYTHON = os.environ.get("GAD_TEST_VERL_PYTHON", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not VERL_PYTHON, reason="GAD_TEST_VERL_PYTHON is not set")]

MODELS = {"untied": ("llama", False), "tied": ("qwen2", True), "qwen3": ("qwen3", False)}
# name -> (world size, kind, FSDP version, ranks that share one replica (0: all), model)
CASES: dict[str, tuple[int, str, int, int, str]] = {
    "fsdp1-w1": (1, "actor", 1, 0, "tied"),
    "fsdp1-w2": (2, "actor", 1, 0, "untied"),
    "fsdp1-w3": (3, "actor", 1, 0, "tied"),
    "fsdp2-w1": (1, "actor", 2, 0, "tied"),
    "fsdp2-w2": (2, "actor", 2, 0, "untied"),
    "fsdp2-w3": (3, "actor", 2, 0, "qwen3"),
    "fsdp1-w2-bf16": (2, "bf16", 1, 0, "tied"),
    "fsdp2-w2-bf16": (2, "bf16", 2, 0, "untied"),
    "fsdp1-hybrid": (4, "actor", 1, 2, "untied"),
    "fsdp2-hybrid": (4, "bf16", 2, 2, "qwen3"),
    "fsdp1-w1-critic": (1, "critic", 1, 0, "tied"),
    "fsdp1-w2-critic": (2, "critic", 1, 0, "untied"),
    "fsdp2-w3-critic": (3, "critic", 2, 0, "tied"),
    "fsdp2-w2-valuehead": (2, "valuehead", 2, 0, "tied"),
    "fsdp1-w1-lora": (1, "lora", 1, 0, "untied"),
    "fsdp1-w2-lora": (2, "lora", 1, 0, "tied"),
    "fsdp1-w3-lora": (3, "lora-bf16", 1, 0, "qwen3"),
    "fsdp2-w1-lora": (1, "lora", 2, 0, "tied"),
    "fsdp2-w2-lora": (2, "lora-bf16", 2, 0, "untied"),
    "fsdp2-w3-lora": (3, "lora", 2, 0, "qwen3"),
    "fsdp1-w2-lora-only": (2, "lora-only", 1, 0, "untied"),
    "fsdp2-w2-lora-only": (2, "lora-only", 2, 0, "tied"),
    "fsdp1-w3-lora-critic": (3, "lora-critic", 1, 0, "untied"),
    "fsdp2-w2-lora-critic": (2, "lora-critic", 2, 0, "tied"),
}
SCALE = 6 / 4  # alpha / r of verl_manager.py


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<root>/<case>/global_step_5/actor, and <root>/models/<name>."""
    root = tmp_path_factory.mktemp("verl-manager")
    for name, (family, tied) in MODELS.items():
        write_tiny_model(root / "models" / name, family, tied=tied)
    jobs = [
        (name, world, kind, version, size, str(root / "models" / model))
        for name, (world, kind, version, size, model) in CASES.items()
    ]
    script = str(Path(__file__).with_name("verl_manager.py"))
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([VERL_PYTHON, script, str(root), json.dumps(jobs)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def expected(root: Path, case: str) -> dict[str, torch.Tensor]:
    """Plain names -> full_tensor()'s values, adapters added by torch in float32."""
    whole = load_file(root / case / "global_step_5/actor/whole.safetensors")
    base = load_file(root / "models" / CASES[case][4] / "model.safetensors") if "lora-only" in case else {}
    plain = {n.removeprefix("base_model.model.").removeprefix("pretrained_model."): t for n, t in whole.items()}
    found = dict(base)
    for name, tensor in plain.items():
        if ".lora_" not in name and ".original_module." not in name:
            name = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
            found[name.replace("v_head.summary.", "score.")] = tensor
    for name in [n for n in plain if ".lora_A." in n]:
        layer = name.removesuffix(".lora_A.default.weight")
        weight, a, b = found[f"{layer}.weight"], plain[name], plain[f"{layer}.lora_B.default.weight"]
        found[f"{layer}.weight"] = (weight.float() + SCALE * (b.float() @ a.float())).to(weight.dtype)
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_verl_saved_is_merged_bit_for_bit(root: Path, tmp_path: Path, case: str) -> None:
    _, kind, _, _, model = CASES[case]
    base = root / "models" / model if kind == "lora-only" else None
    to_huggingface(root / case / "global_step_5" / "actor", tmp_path / "out", MergeOptions(probe=True, base=base))
    merged, want = load_file(tmp_path / "out/model.safetensors"), expected(root, case)
    config = json.loads((tmp_path / "out/config.json").read_text())
    critic = "critic" in kind or kind == "valuehead"
    if critic or config["tie_word_embeddings"]:
        want.pop("lm_head.weight", None)
    assert config["architectures"][0].endswith("ForTokenClassification" if critic else "ForCausalLM")
    assert merged.keys() == want.keys()
    adapted = {n for n in want if "lora" in kind and "_proj.weight" in n}
    for name, tensor in merged.items():
        assert tensor.dtype == want[name].dtype, name
        if name in adapted:  # two orders of four products in float32: a few ulp of |W| < 4, or one rounding in bfloat16
            torch.testing.assert_close(
                tensor, want[name], rtol=2**-8 if tensor.dtype == torch.bfloat16 else 0, atol=2e-6
            )
        else:
            assert torch.equal(tensor, want[name]), name
