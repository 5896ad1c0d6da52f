"""On request: vLLM loads a merged folder and continues fixed prompts greedily as transformers does.

`python -m gadcli.checkpoint.merge.probe_vllm DIR` is the half that runs vLLM, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gadcli.checkpoint.hf_folder import read_json
from gadcli.errors import CheckpointError, ConfigError

PROMPT, PROMPTS, NEW = 8, 3, 16  # tokens of a prompt, prompts, tokens that follow
# Logits of two correct computations in float32 differ by far less; a swapped tensor moves them by tenths and more.
TOLERANCE = 0.02
MARK = "GAD-PROBE"
QUIET = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CONFIGURE_LOGGING": "0", "VLLM_NO_USAGE_STATS": "1"}


def prompts(vocab_size: int) -> list[list[int]]:
    """Fixed token ids, spread over the vocabulary."""
    return [[(7 + 13 * i + 29 * j) * 31 % vocab_size for i in range(PROMPT)] for j in range(PROMPTS)]


def probe_vllm(folder: Path) -> str:
    """What was found, for the report. CheckpointError where vLLM fails to load the folder or computes something else.

    ConfigError without vLLM. Every token that vLLM takes must have a logit of transformers' largest, within TOLERANCE.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("--probe-vllm: vLLM is not installed here", "leave it out, or --probe for transformers alone")
    env = os.environ | QUIET
    command = [sys.executable, "-m", __name__, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    said = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if said is None:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise CheckpointError(f"{folder}: vLLM does not load the result: {last[:200]}", "serve it by transformers")
    found: dict[str, Any] = json.loads(said.removeprefix(MARK))
    if "answers" not in found:
        return f"not asked of vLLM, which has no {found['unknown']}"
    _compare(folder, found["answers"])
    return "vLLM's greedy text equal"


def _compare(folder: Path, answers: list[list[int]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, answer in zip(prompts(model.config.vocab_size), answers, strict=True):
        with torch.no_grad():
            logits_TV = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        behind = (logits_TV.max(-1).values - logits_TV.gather(1, torch.tensor(answer)[:, None])[:, 0]).max().item()
        if not behind <= TOLERANCE:
            raise CheckpointError(
                f"{folder}: vLLM computes something else than transformers: logits {behind:.3g} apart", "report this"
            )


def main(folder: str) -> None:
    """Print vLLM's greedy answers to `prompts`, or the architecture that it does not have."""
    from vllm import LLM, ModelRegistry, SamplingParams

    config = read_json(Path(folder) / "config.json")
    (architecture,) = config["architectures"]
    found: dict[str, Any] = {"unknown": architecture}
    if architecture in ModelRegistry.get_supported_archs():
        llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=PROMPTS,
                  skip_tokenizer_init=True, kv_cache_memory_bytes=64 << 20, disable_log_stats=True)  # fmt: skip
        greedy = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": ids} for ids in prompts(config["vocab_size"])]
        outputs = llm.generate(asked, greedy, use_tqdm=False)
        found = {"answers": [list(output.outputs[0].token_ids) for output in outputs]}
    print(MARK + json.dumps(found), flush=True)
    os._exit(0)  # vLLM's own teardown sometimes aborts


if __name__ == "__main__":
    main(sys.argv[1])
