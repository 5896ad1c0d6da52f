"""Models that gad does not train: the plan and the worker refuse the same ones, with the same words and exit 2.

Each case changes one thing in a folder that both take. What the plan's child process would say is asked in this
process, since each child imports torch; one test asks the child itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from families.models import write_family
from families.passage import SETTINGS, trained
from gadcli.config import model_refusals
from gadcli.errors import ConfigError
from gadcli.launch.stage import StageRequest, prepare
from tiny import write_tiny_data

Change = Callable[[Path], None]


def edit(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def quantised(method: str, **more: Any) -> Change:
    return edit(quantization_config={"quant_method": method, "bits": 4, **more})


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Other tensors in the folder's file, its config as it was."""

    def rewrite(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def packed_to_ints(held: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    held[name.replace("weight", "qweight")] = held.pop(name).to(torch.int32)


def token_beyond(folder: Path) -> None:
    """A word that the tokenizer got after the model was made, four rows behind the embedding's end."""
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["returns"] + [f"spare{i}" for i in range(4)])
    tokenizer.save_pretrained(folder)


def own_code(folder: Path) -> None:
    edit(model_type="myown", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})(folder)
    (folder / "code.py").write_text(f"open({str(folder / 'RAN')!r}, 'w')\n")


def another(config: Any) -> Change:
    """Another family's weights and config beside the tokenizer."""

    def write(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        kind = tf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else tf.AutoModelForCausalLM
        kind.from_config(config).save_pretrained(folder)

    return write


def nested(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())
    edit(model_type="gemma3", text_config=text, vision_config={"hidden_size": 32})(folder)


SIZES = {"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Case:
    change: Change
    message: str
    overrides: tuple[str, ...] = ()


def adapters(targets: str) -> tuple[str, ...]:
    return ("actor.model.lora.rank=4", f"actor.model.lora.target_modules={targets}")


CASES = {
    "awq": Case(quantised("awq"), "quantised (awq)"),
    "gptq": Case(quantised("gptq"), "quantised (gptq)"),
    "fp8": Case(quantised("fp8", weight_block_size=[128, 128]), "quantised (fp8)"),
    "bitsandbytes": Case(quantised("bitsandbytes", load_in_4bit=True), "quantised (bitsandbytes)"),
    "compressed-tensors": Case(quantised("compressed-tensors"), "quantised (compressed-tensors)"),
    "mxfp4": Case(quantised("mxfp4"), "quantised (mxfp4)"),
    "quantised without a word in the config": Case(tensors(packed_to_ints), "not in its files"),
    "a tensor missing": Case(tensors(lambda held: held.pop("model.norm.weight")), "model.norm.weight"),
    "tensors of something else": Case(
        tensors(lambda held: held.update({"model.mtp.weight": torch.zeros(2, 2)})), "belong to no part of a llama"
    ),
    "a tensor of another shape": Case(
        tensors(lambda held: held.update({"model.norm.weight": torch.zeros(7)})), "cannot load it"
    ),
    "a short context": Case(edit(max_position_embeddings=100), "reads 100 tokens at most"),
    "a tokenizer beyond the embedding": Case(token_beyond, "2 ids that its embedding of 357 rows lacks"),
    "code of its own": Case(own_code, "gad never runs a model's code"),
    "a type of tomorrow": Case(edit(model_type="qwen9"), "cannot read a model of type 'qwen9'"),
    "no type": Case(edit(model_type=None), "names no model_type"),
    "text and images": Case(nested, "text and images or sound (gemma3)"),
    "an encoder-decoder": Case(
        another(tf.T5Config(vocab_size=400, d_model=64, num_layers=2, num_heads=4)), "an encoder-decoder (t5)"
    ),
    "other names for its parts": Case(
        another(tf.GPT2Config(vocab_size=400, n_embd=64, n_layer=2, n_head=4)),
        "gpt2 has no model.layers",
    ),
    "a head of more than one matrix": Case(another(tf.CohereConfig(**SIZES)), "of type cohere is not computed as"),
    "no attention": Case(another(tf.MambaConfig(vocab_size=400, hidden_size=64, num_hidden_layers=2)), "mamba"),
    "adapters on the head": Case(edit(), "lm_head cannot carry an adapter", adapters("q_proj,lm_head")),
    "adapters on the embedding": Case(edit(), "embed_tokens cannot carry", adapters("embed_tokens")),
    "adapters on nothing": Case(edit(), "no such linear layer", adapters("q_proj,querry_proj")),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("families") / "llama", "llama")


def words(folder: Path, *more: str) -> list[str]:
    rows = write_tiny_data(folder.parent / "rows.parquet", 16)
    paths = [f"actor.model.path={folder}", f"data.train_files=[{rows}]", f"trainer.output_dir={folder.parent}"]
    return [*SETTINGS, *paths, "trainer.critic_warmup=-1", "rollout.engine=hf", *more]


def by_plan(settings: list[str]) -> None:
    prepare(StageRequest(stage="seqkd", overrides=tuple(settings), dry_run=True))


def by_worker(settings: list[str], run_dir: Path) -> None:
    with trained("seqkd", settings, run_dir):
        pass


@pytest.mark.parametrize("name", CASES)
def test_what_the_worker_refuses_the_plan_refuses_with_the_same_words(base: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    case.change(folder)
    settings = words(folder, *case.overrides)
    with pytest.raises(ConfigError) as planned:
        by_plan(settings)
    with pytest.raises(ConfigError) as worked:
        by_worker(settings, tmp_path / "run")
    assert case.message in planned.value.message
    said = [error.value.message.partition(" (outputs differ by")[0] for error in (planned, worked)]
    assert said[0] == said[1]  # a toy's figure is another than the model's
    assert planned.value.hint
    assert not (folder / "RAN").exists()


@pytest.mark.parametrize("overrides", [(), adapters("all-linear"), adapters("[q_proj,'self_attn.v_proj']")])
def test_what_the_plan_takes_the_worker_trains(base: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    settings = words(base, *overrides)
    by_plan(settings)
    by_worker(settings, tmp_path / "run")


def test_a_padding_token_beyond_the_embedding_is_no_reason(base: Path, tmp_path: Path) -> None:
    """Many fine-tunes of Llama 2 have one; no text ever gets its id."""
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"spare{i}" for i in range(3)])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    by_plan(words(folder))


def test_the_child_process_says_what_this_process_says(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its answer is kept: the second time no process is started."""
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    tensors(lambda held: held.pop("model.norm.weight"))(folder)
    monkeypatch.setattr(model_refusals, "_ask", ORIGINAL)
    with pytest.raises(ConfigError, match="not in its files"):
        by_plan(words(folder))
    monkeypatch.setattr(model_refusals, "_ask", None)
    with pytest.raises(ConfigError, match="not in its files"):
        by_plan(words(folder))


ORIGINAL = model_refusals._ask
