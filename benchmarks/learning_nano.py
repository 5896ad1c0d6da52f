"""The learning benchmark's small task: a student of a few layers, from nothing, and words to be put in order.

One run takes minutes where the demo's student takes hours, so that regimes can be searched. A prompt names K words of
a list of 48; the teacher, a fixed rule, answers with all of them in the list's own order (which is not the alphabet's:
the student has to learn it). An answer is in form if it holds the same words, in whatever order.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

WORDS = [
    "river", "stone", "cloud", "maple", "ember", "frost", "lantern", "harbor", "meadow", "willow", "copper", "velvet",
    "thunder", "island", "saddle", "violin", "anchor", "basket", "candle", "dragon", "engine", "feather", "garden",
    "hammer", "insect", "jungle", "kettle", "ladder", "mirror", "needle", "orange", "pillow", "quartz", "ribbon",
    "silver", "tunnel", "umbrella", "valley", "window", "yellow", "zipper", "acorn", "bridge", "cactus", "desert",
    "eagle", "forest", "goblet",
]  # fmt: skip
SHORTEST, LONGEST = 6, 12
HELD_OUT = 256
TRAIN_ROWS = 4096
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)
END = "<|im_end|>"
LIMITS = (32, 16)  # tokens of a prompt and of an answer
WHOLE = ["actor.model.train_layers=0", "critic.model.num_layers=0", "actor.micro_batch_tokens=16384",
         "critic.micro_batch_tokens=16384", "rollout.engine=hf", "rollout.max_num_seqs=256"]  # fmt: skip
GAME = ["data.train_batch_size=16", "rollout.n=8", "critic.loss=original", "critic.values=all", "critic.optim.lr=1e-3",
        "critic.ppo_mini_batch_size=4", "actor.optim.lr=1e-4", "algorithm.adv_estimator=dr_grpo"]  # fmt: skip
SETTINGS = {
    "seqkd": [*WHOLE, "actor.optim.lr=1e-3", "data.train_batch_size=32"],
    "warmup": [*WHOLE, *GAME],
    "gad": [*WHOLE, *GAME],
    "eval": ["--engine=hf"],
}


@dataclass(frozen=True)
class NanoFiles:
    """As the demo's: rows to train on, rows that checkpoints are chosen by, rows that only the table reads."""

    train: Path
    val: Path
    test: Path


def right_answer(words: list[str]) -> str:
    """The same words in the list's order."""
    return " ".join(sorted(words, key=WORDS.index))


def has_form(sample: dict[str, Any]) -> bool:
    """Whether an answer has the prompt's words, each as often as the prompt, in whatever order."""
    return sorted(sample["student"].split()) == sorted(sample["teacher"].split())


def write_data(folder: Path, seed: int) -> NanoFiles:
    """Parquet files of distinct prompts: held-out rows alike for every seed, training rows the seed's own."""
    held_out = random.Random("held out")
    sources = {"val": held_out, "test": held_out, "train": random.Random(f"train {seed}")}

    def a_row(rng: random.Random) -> tuple[str, str]:
        words = rng.sample(WORDS, rng.randint(SHORTEST, LONGEST))
        return f"order these: {' '.join(words)}", right_answer(words)

    return write_rows(folder, {"val": HELD_OUT, "test": HELD_OUT, "train": TRAIN_ROWS}, sources, a_row)


def write_rows(
    folder: Path,
    sizes: dict[str, int],
    sources: dict[str, random.Random],
    a_row: Callable[[random.Random], tuple[str, str]],
) -> NanoFiles:
    """A file of (prompt, answer) rows for each name, drawn in the order of `sizes`; no prompt comes twice."""
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for name, size in sizes.items():
        rows: list[dict[str, Any]] = []
        while len(rows) < size:
            prompt, answer = a_row(sources[name])
            if prompt not in seen:
                seen.add(prompt)
                rows.append({"content": [{"role": "user", "content": prompt}], "teacher_response": answer})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return NanoFiles(*(folder / f"{name}.parquet" for name in ("train", "val", "test")))


def write_student(folder: Path) -> Path:
    return write_model(folder, WORDS, layers=3, width=96, seed=0)


def settings(_: Path) -> dict[str, list[str]]:
    """Overrides for each stage."""
    return SETTINGS


def write_model(folder: Path, vocabulary: list[str], *, layers: int, width: int, seed: int) -> Path:
    """A Llama with random weights and a tokenizer that has a token a word, as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if (folder / "model.safetensors").exists():
        return folder
    names = ["<|im_start|>", END, "<unk>", "user", "assistant", "order", "these:", *vocabulary]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<|im_start|>", END])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=END, pad_token=END, unk_token="<unk>", chat_template=TEMPLATE
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=width // 32, num_key_value_heads=width // 32, head_dim=32, max_position_embeddings=128,
            tie_word_embeddings=False, bos_token_id=None, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
