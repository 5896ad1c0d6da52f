"""A student small enough to ruin: three layers, random weights, a tokenizer learnt from the demo's own text.

`python -m gadcli.demo.tiny_model TRAIN.parquet DIR`: a process of its own, so that the demo needs no torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2000
END = "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_dwarf(rows: Path, folder: Path, seed: int = 0) -> None:
    """A Hugging Face folder; the weights are the seed's, nothing has been learnt yet."""
    table = pq.read_table(rows, columns=["content", "teacher_response"]).to_pylist()
    texts = [text for row in table for text in (row["content"][-1]["content"], row["teacher_response"])]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|im_start|>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=96, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=3, head_dim=32, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, chat_template=TEMPLATE
    ).save_pretrained(folder)


if __name__ == "__main__":
    write_dwarf(Path(sys.argv[1]), Path(sys.argv[2]))
