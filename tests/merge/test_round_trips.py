"""Out of a real run on two ranks and back in: transformers, vLLM, peft, and `gad train` again.

One run (LoRA on both models) is enough: full weights at world sizes 1 to 3 are test_ours's.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from gadcli.checkpoint.merge.pick import models_in
from gadcli.checkpoint.merge.to_huggingface import MergeOptions, merge_models, to_huggingface
from gadcli.launch.environment import engine_variables
from train.training import environment, prepare, steps, train

pytestmark = pytest.mark.slow
PROMPTS = [[7, 8, 9, 10, 11, 12], [20, 21], [33, 34, 35, 36, 2, 4, 5]]
NEW = 12
VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=4, skip_tokenizer_init=True,
          kv_cache_memory_bytes=64 << 20, disable_log_stats=True)
greedy = SamplingParams(temperature=0.0, max_tokens=int(sys.argv[3]), ignore_eos=True, detokenize=False)
prompts = [TokensPrompt(prompt_token_ids=ids) for ids in json.loads(sys.argv[2])]
found = [list(out.outputs[0].token_ids) for out in llm.generate(prompts, greedy, use_tqdm=False)]
print("FOUND", json.dumps(found))
"""


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> Path:
    """global_step_1 of a gad run on two ranks, LoRA on actor and critic, moved away from its run."""
    run = prepare(
        tmp_path_factory.mktemp("runs") / "lora", inputs, "gad", f"critic.model.path={inputs / 'model'}",
        "trainer.total_steps=1", "trainer.critic_warmup=0", "actor.optim.lr=0.05", "critic.optim.lr=0.05",
        "actor.model.lora.rank=4", "actor.model.lora.alpha=6", "critic.model.lora.rank=4",
    )  # fmt: skip
    train(run, 2)
    return Path(shutil.move(run / "global_step_1", tmp_path_factory.mktemp("moved")))


@pytest.fixture(scope="module")
def merged(step: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<merged>/actor and <merged>/critic, each probed: transformers finds every key and gives the shards' logits."""
    out = tmp_path_factory.mktemp("merged") / "out"
    reports = merge_models(models_in(step, print), out, MergeOptions(probe=True))
    assert [r.verified[-1] for r in reports] == ["logits equal"] * 2
    return out


def greedy(model: Any) -> list[list[int]]:
    """What transformers answers to PROMPTS."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in PROMPTS]


def test_vllm_answers_as_transformers_does(merged: Path, inputs: Path) -> None:
    want = greedy(AutoModelForCausalLM.from_pretrained(merged / "actor"))
    assert want != greedy(AutoModelForCausalLM.from_pretrained(inputs / "model"))  # the update is in the fused weights
    words = [sys.executable, "-c", VLLM, str(merged / "actor"), json.dumps(PROMPTS), str(NEW)]
    env = environment() | engine_variables()
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.split("FOUND", 1)[1]) == want


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_peft_takes_the_adapter_and_knows_its_base(step: Path, merged: Path, tmp_path: Path, role: str) -> None:
    """No --base: the checkpoint names it."""
    from peft import PeftModel

    to_huggingface(step / role, tmp_path / "adapter", MergeOptions(keep_adapter=True))
    said = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    auto = AutoModelForCausalLM if role == "actor" else AutoModelForTokenClassification
    labels = {} if role == "actor" else {"num_labels": 1}
    base = auto.from_pretrained(said["base_model_name_or_path"], **labels)
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        apart = PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
        fused = auto.from_pretrained(merged / role)(ids).logits
    torch.testing.assert_close(apart, fused, rtol=0, atol=1e-4)


def test_a_merged_pair_is_where_the_next_run_starts(merged: Path, inputs: Path, tmp_path: Path) -> None:
    """At a learning rate of zero the next run's checkpoint holds the merged weights, bit for bit."""
    run = prepare(
        tmp_path / "next", inputs, "warmup", f"actor.model.path={merged / 'actor'}", "trainer.total_steps=1",
        f"critic.model.path={merged / 'critic'}", "critic.optim.lr=0", "critic.optim.weight_decay=0",
    )  # fmt: skip
    train(run, 1)
    assert list(steps(run)) == [1]
    merge_models(models_in(run, print), tmp_path / "again")
    for role in ("actor", "critic"):
        one, two = (load_file(folder / role / "model.safetensors") for folder in (merged, tmp_path / "again"))
        assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
