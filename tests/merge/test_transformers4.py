"""Merged folders read by transformers 4, which most of the world still runs: nothing missing, the same logits.

transformers 4 passes over keys that it does not know, so a config it misreads loads without a word and computes
something else. Needs a Python that has it (ours has version 5): GAD_TEST_TRANSFORMERS4=/path/to/bin/python, or
`make test-transformers4`, which makes such an environment.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    Gemma2Config,
    Glm4Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    Starcoder2Config,
)

from gadcli.checkpoint.merge.to_huggingface import to_huggingface
from merge.test_as_the_base import FAMILIES, SIZES, trained, write_base
from tiny import tiny_tokenizer

PYTHON = os.environ.get("GAD_TEST_TRANSFORMERS4", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="GAD_TEST_TRANSFORMERS4 is not set")]

PLAIN = {k: v for k, v in SIZES.items() if k != "head_dim"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8, "rope_theta": 5e5}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 1e6}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5] * 4, "rope_theta": 1e4,
        "original_max_position_embeddings": 8}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = FAMILIES | {
    "mistral": MistralConfig(**SIZES),
    "qwen2": Qwen2Config(**PLAIN),
    "qwen3": Qwen3Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "llama3 rope": LlamaConfig(**SIZES, max_position_embeddings=64, rope_parameters=LLAMA3),
    "yarn": Qwen2Config(**PLAIN, max_position_embeddings=32, rope_parameters=YARN),
    "gemma2": Gemma2Config(**SIZES, query_pre_attn_scalar=8, sliding_window=8),
    "phi3": Phi3Config(**PLAIN, max_position_embeddings=32, original_max_position_embeddings=8, rope_parameters=LONG),
    "glm4": Glm4Config(**SIZES),
    "olmo2": Olmo2Config(**PLAIN),
    "smollm3": SmolLM3Config(**PLAIN),
    "starcoder2": Starcoder2Config(**PLAIN),
    "granite": GraniteConfig(**PLAIN),
}
READ = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer
assert transformers.__version__.startswith("4."), transformers.__version__
torch.set_num_threads(1)
found = {}
for folder in sys.argv[2:]:
    try:
        auto = AutoModelForTokenClassification if folder.endswith("critic") else AutoModelForCausalLM
        model, info = auto.from_pretrained(folder, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = torch.tensor([json.loads(sys.argv[1])])
        with torch.no_grad():
            logits = model.eval()(ids).logits[0]
        ends = getattr(model.generation_config, "eos_token_id", None) if model.can_generate() else None
        found[folder] = {"keys": {k: sorted(map(str, v)) for k, v in info.items() if v}, "logits": logits.tolist(),
                         "ends": ends, "dtype": str(model.dtype), "text": tokenizer("It returns")["input_ids"]}
    except Exception as error:
        found[folder] = {"error": f"{type(error).__name__}: {error}"[:300]}
print("FOUND" + json.dumps(found))
"""
IDS = [1, 7, 30, 4, 22, 9, 41, 3, 3, 17, 28, 5]  # longer than the scaled ropes' original context


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What transformers 4 found in each merged folder, by path."""
    root = tmp_path_factory.mktemp("v4")
    tokenizer = tiny_tokenizer(vocabulary=300)
    for name, config in CONFIGS.items():
        base = write_base(root / "base" / name, config, scale=10.0)
        tokenizer.save_pretrained(base)
        said = json.loads((base / "tokenizer_config.json").read_text())
        said |= {"tokenizer_class": "PreTrainedTokenizerFast"}  # as the hub's files say, written by version 4
        (base / "tokenizer_config.json").write_text(json.dumps(said))
        for role in ("actor", "critic") if name in ("llama", "qwen3") else ("actor",):
            shards = trained(base, root / "run" / name / role, critic=role == "critic", change=0.01)
            to_huggingface(shards, root / "out" / name / role)
    folders = [str(p) for p in sorted((root / "out").glob("*/*"))]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([PYTHON, "-c", READ, json.dumps(IDS), *folders], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.split("FOUND", 1)[1])
    return {"/".join(Path(folder).parts[-2:]): value | {"folder": folder} for folder, value in found.items()}


@pytest.mark.parametrize("name", [*(f"{name}/actor" for name in CONFIGS), "llama/critic", "qwen3/critic"])
def test_transformers_4_computes_what_5_does(read: dict[str, Any], name: str) -> None:
    """Weights of 0.2 make attention look at positions: a lost rope_theta moves them by more than 0.01."""
    there = read[name]
    assert "error" not in there, there["error"]
    assert there["keys"] == {}
    auto = AutoModelForTokenClassification if name.endswith("critic") else AutoModelForCausalLM
    model = auto.from_pretrained(there["folder"]).eval()
    with torch.no_grad():
        here = model(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(torch.tensor(there["logits"]), here, rtol=1e-3, atol=1e-3)
    if not name.endswith("critic"):
        assert there["ends"] == model.generation_config.eos_token_id == 2
    assert there["text"] == tiny_tokenizer(vocabulary=300)("It returns")["input_ids"]


def test_a_lost_rope_theta_would_be_seen(read: dict[str, Any]) -> None:
    """The mutant: the same folder with transformers 5's spelling alone."""
    folder = Path(read["qwen3/actor"]["folder"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in ("rope_theta",)}))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([PYTHON, "-c", READ, json.dumps(IDS), str(folder)], env=env, capture_output=True, text=True)
    spoiled = json.loads(done.stdout.split("FOUND", 1)[1])[str(folder)]["logits"]
    difference = (torch.tensor(spoiled) - torch.tensor(read["qwen3/actor"]["logits"])).abs().max()
    assert difference > 1e-2
