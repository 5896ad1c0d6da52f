"""Speed and memory of the data commands, side by side with `datasets.map` and bare `tokenizers`, in one run.

python benchmarks/data.py [--rows 200000] [--tokenizer FOLDER] [--check-rows 1000000] [--json]

Each command runs in a process of its own, from a cold start, on the same file with the same tokenizer and all
cores; CPU seconds are user + system of the process, peak RSS is its VmHWM. Needs `datasets` for its column only.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import pkgutil
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CONTESTANTS = {
    "gad analyze-tokens": """
from gadcli.data.lengths import analyse
from gadcli.chat.tokenize import ChatTokenizer
tokens = analyse([FILE], ("content", "teacher_response"), ChatTokenizer.from_folder(MODEL)).fields["both"].tokens
""",
    "gad check -t": """
from gadcli.data.audit import CheckSpec, audit
from gadcli.data.tokens import Limits
from gadcli.chat.tokenize import ChatTokenizer
summary = audit([FILE], CheckSpec(tokenizer=ChatTokenizer.from_folder(MODEL), limits=Limits(4096, 4096, 8192)))
assert summary.dropped == 0
tokens = TOKENS
""",
    "datasets.map": """
import datasets
from transformers import AutoTokenizer
datasets.disable_progress_bars()
tokenizer = AutoTokenizer.from_pretrained(MODEL)
def encode(rows):
    texts = tokenizer.apply_chat_template(rows["content"], add_generation_prompt=True, tokenize=False)
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    answers = tokenizer(rows["teacher_response"], add_special_tokens=False)["input_ids"]
    return {"prompt": [len(p) for p in prompts], "answer": [len(a) + 1 for a in answers]}
data = datasets.load_dataset("parquet", data_files=FILE, split="train", cache_dir=CACHE)
data = data.map(encode, batched=True, remove_columns=data.column_names)
tokens = sum(data["prompt"]) + sum(data["answer"])
""",
    "bare encode_batch_fast": """
import pyarrow.parquet as pq
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(MODEL + "/tokenizer.json")
START = (time.monotonic(), time.process_time())  # the strings are given: only encoding counts
texts = json.load(open(TEXTS))
START = (time.monotonic(), time.process_time())
tokens = len(texts) // 2
for i in range(0, len(texts), 2048):
    tokens += sum(map(len, tokenizer.encode_batch_fast(texts[i : i + 2048], add_special_tokens=False)))
""",
    "gad check": """
from gadcli.data.audit import CheckSpec, audit
START = (time.monotonic(), time.process_time())  # rows a second of the pass itself
summary = audit([FILE], CheckSpec())
assert summary.dropped == 0
tokens = 0
""",
}


def corpus(rows: int, out: Path) -> None:
    """Rows made of the standard library's docstring words: real words, real punctuation, no download."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    warnings.simplefilter("ignore", DeprecationWarning)
    rng = random.Random(1)
    sentences: list[str] = []
    for module in sorted(m.name for m in pkgutil.iter_modules() if m.name in sys.stdlib_module_names):
        if module in ("antigravity", "this", "idlelib", "turtledemo") or module.startswith("_"):
            continue
        try:
            found = __import__(module)
        except ImportError:
            continue
        for _, value in inspect.getmembers(found):
            sentences += [s.strip() for s in (inspect.getdoc(value) or "").split(".") if 20 < len(s) < 120]
    schema = pa.schema([
        ("content", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("teacher_response", pa.string()),
    ])  # fmt: skip
    with pq.ParquetWriter(out, schema) as writer:
        for start in range(0, rows, 50_000):
            n = min(50_000, rows - start)
            content = [[{"role": "user", "content": f"{rng.choice(sentences)} {start + i}?"}] for i in range(n)]
            answers = [f"{rng.choice(sentences)}." for _ in range(n)]
            writer.write_table(pa.table({"content": content, "teacher_response": answers}, schema))


def train_tokenizer(file: Path, folder: Path) -> None:
    """A byte-level BPE of 16k tokens on the corpus, saved as a model folder."""
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=16_000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(pq.read_table(file)["teacher_response"].to_pylist()[:50_000], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)


def run_alone(name: str, names: dict[str, Any]) -> dict[str, float]:
    """Run one command in a fresh process: tokens, wall and CPU seconds, peak MB."""
    head = "import json, time\nSTART = (0.0, 0.0)\n" + "".join(f"{k} = {v!r}\n" for k, v in names.items())
    tail = """
import resource
status = open("/proc/self/status").read()
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"tokens": tokens, "cpu": used.ru_utime + used.ru_stime - START[1], "end": time.monotonic(),
                  "start": START[0], "peak": int(status.split("VmHWM:")[1].split()[0]) / 1024}))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(["src", os.environ.get("PYTHONPATH", "")])}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(names["CACHE"])}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", head + CONTESTANTS[name] + tail], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    found["wall"] = found["end"] - (found["start"] or started)
    return found


def write_texts(file: Path, model: Path, out: Path) -> None:
    """The very strings that are tokenised, for the bare tokenizer."""
    from gadcli.chat.tokenize import ChatTokenizer
    from gadcli.data.check import open_files, scan_rows
    from gadcli.data.read.findings import Summary

    tokenizer, keys, summary = ChatTokenizer.from_folder(model), ("content", "teacher_response"), Summary()
    texts: list[str] = []
    for batch in scan_rows(open_files([str(file)], keys, summary), summary):
        for row in batch.good():
            texts += [tokenizer.prompt_text(row.messages), row.teacher]
    out.write_text(json.dumps(texts))


def warm_start(file: Path, model: Path, cache: Path) -> dict[str, float]:
    """Seconds to the first batch of a data set whose cache is built."""
    from gadcli.chat.tokenize import ChatTokenizer
    from gadcli.config.schema import DataConfig
    from gadcli.data.batches import BatchOrder, open_dataset

    cfg = DataConfig(train_files=[str(file)], train_batch_size=128, max_prompt_length=4096, max_response_length=4096)
    tokenizer = ChatTokenizer.from_folder(model)
    start = time.monotonic()
    rows = len(open_dataset([], tokenizer, cfg, 8192, "train", cache))
    cold, start = time.monotonic() - start, time.monotonic()
    tokenizer = ChatTokenizer.from_folder(model)
    data = open_dataset([], tokenizer, cfg, 8192, "train", cache)
    order = BatchOrder(len(data), 128, 1, True)
    [data[i] for i in order.rows(order.steps_per_epoch // 2)]
    return {"rows": rows, "cold_s": cold, "warm_s": time.monotonic() - start}


def show(name: str, found: dict[str, float], amount: float, unit: str) -> None:
    """One line of the table, on stderr."""
    print(f"{name:24} {amount:>12,} {unit:6} {found['wall']:6.1f} s wall {found['cpu']:6.1f} s CPU "
          f"{amount / found['cpu']:>10,.0f} {unit}/CPU-s {found['peak']:5.0f} MB", file=sys.stderr)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--check-rows", type=int, nargs="*", default=[1_000_000])
    parser.add_argument("--tokenizer", type=Path, help="a model folder; trained on the corpus if not given")
    parser.add_argument("--only", nargs="*", help="only some commands")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, "src")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="gad-bench-") as name:
        folder = Path(name)
        file, texts, model = folder / "rows.parquet", folder / "texts.json", args.tokenizer or folder / "model"
        corpus(args.rows, file)
        if args.tokenizer is None:
            train_tokenizer(file, model)
        write_texts(file, model, texts)
        names = {"FILE": str(file), "MODEL": str(model), "TEXTS": str(texts), "CACHE": str(folder / "hf"), "TOKENS": 0}
        for command in ("gad analyze-tokens", "gad check -t", "datasets.map", "bare encode_batch_fast"):
            if args.only and command not in args.only:
                continue
            results[command] = run_alone(command, names)
            names["TOKENS"] = names["TOKENS"] or results[command]["tokens"]
            found = results[command]
            show(command, found, found["tokens"], "tokens")
        for rows in args.check_rows:
            big = folder / f"check_{rows}.parquet"
            corpus(rows, big)
            found = run_alone("gad check", {**names, "FILE": str(big)})
            results[f"check {rows}"] = found | {"rows": rows}
            show("gad check, no tokenizer", found, rows, "rows")
            big.unlink()
        results["warm"] = warm_start(file, model, folder / "cache")
        print(f"first batch of {results['warm']['rows']:,} rows: {results['warm']['warm_s']:.2f} s with a warm cache, "
              f"{results['warm']['cold_s']:.1f} s to build it", file=sys.stderr)  # fmt: skip
    if args.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
