"""The GPU path without a GPU: gad's own updates under a fake CUDA device, in a process of its own.

Semantics pinned here: an update mixes no devices and no dtypes in a product; at most one block mask is made per window
and micro-batch; the host waits a fixed number of times per update, however many micro-batches; variants of the compiled
attention stay under their limit; and faults of each kind are found. Shapes have the widths of real models and few
layers: an operation on fake tensors costs the same whatever their size. `make test-gpu-path` runs whole 8B models.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from gadcli.model.attention import VARIANTS
from train.training import environment

pytestmark = pytest.mark.timeout(1500)  # one process for all cases, some 90 CPU-seconds, beside whatever else runs
HERE = Path(__file__).parent
WAITS = 6  # of an update: three uploads of the rollout, the losses, the gradient norm, the scores
SMALL: dict[str, Any] = {
    "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 2,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "tie_word_embeddings": False,
}  # fmt: skip
EIGHT_B = SMALL | {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32
}  # fmt: skip
BATCH = {"prompts": 2, "answers": 3, "prompt": 40, "answer": 16, "budget": 100}  # two micro-batches
CASES: dict[str, dict[str, Any]] = {
    "student, one device": {"model": "actor", "world": 1},
    "student, adapters, one device": {"model": "actor", "world": 1, "lora": 8, "checkpointing": True},
    "student, eight devices": {"model": "actor", "world": 8, "checkpointing": True},
    "critic, hybrid": {"model": "critic", "world": 16, "replicate": 2, "checkpointing": True},
    "critic, adapters, eight devices": {"model": "critic", "world": 8, "lora": 8},
    "reference, one device": {"model": "reference", "world": 1},
    "student, four micro-batches": {"model": "actor", "world": 1, "prompts": 4},
}
SCALE: dict[str, dict[str, Any]] = {
    "64 devices": {"model": "actor", "world": 64},
    "512 devices in 64 copies": {"model": "actor", "world": 512, "replicate": 64},
}
# One micro-batch's peak is set by the head, by a layer's backward pass or by the last reduction: one case for each.
WIDE = {"prompts": 2, "answers": 8, "prompt": 512, "answer": 256, "budget": 3000}
PLANNED: dict[str, dict[str, Any]] = {
    "plan: student": {**WIDE, "model": "actor", "world": 8},
    "plan: student, checkpointing": {**WIDE, "model": "actor", "world": 8, "checkpointing": True},
    "plan: critic, checkpointing": {**WIDE, "model": "critic", "world": 8, "checkpointing": True},
    "plan: student, adapters": {**WIDE, "model": "actor", "world": 1, "lora": 16, "checkpointing": True},
}
FAULTS: dict[str, dict[str, Any]] = {
    "index_on_host": {"model": "reference", "world": 1},
    "float32_operand": {"model": "reference", "world": 1},
    "mask_per_layer": {"model": "reference", "world": 1},
    "forgotten_free": {"model": "reference", "world": 1},
    "wait_per_micro_batch": {"model": "actor", "world": 1, "prompts": 6, "answers": 1},
}


def fake_cuda(folder: Path) -> Path:
    """The library that stands in for a device, built against this torch; skips where no compiler is."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    headers = Path(torch.__file__).parent / "include"
    if compiler is None or not (headers / "ATen").is_dir() or torch.version.cuda:
        pytest.skip("the fake CUDA device needs a C++ compiler and torch's CPU build with its headers")
    library, torch_lib = folder / "libfakecuda.so", headers.parent / "lib"
    include = [f"-I{headers}", f"-I{headers / 'torch/csrc/api/include'}", f"-I{sysconfig.get_paths()['include']}"]
    links = [f"-L{torch_lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_lib}"]
    command = [compiler, "-std=c++20", "-shared", "-fPIC", "-O0", str(HERE / "fakecuda.cpp"), *include, *links]
    subprocess.run([*command, "-o", str(library)], check=True, capture_output=True, text=True)
    return library


def run(cases: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    (folder / "cases.json").write_text(json.dumps(cases))
    env = environment() | {"LD_PRELOAD": str(fake_cuda(folder)), "TORCHDYNAMO_DISABLE": "0"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), env.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "updates.py"), str(folder / "cases.json"), str(folder / "found.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1500)
    assert (folder / "found.json").exists(), done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def complaints(found: dict[str, Any]) -> list[str]:
    """What a card would refuse, or what is dearer on it than it need be."""
    if "refused" in found:
        return [found["refused"]]
    wrong = []
    for name, seen in found.items():
        if not isinstance(seen, dict):
            continue
        wrong += [f"{name}: {what}" for what in seen["mixed"]]
        if seen["masks"] > seen["micro_batches"]:  # these models have one window
            wrong.append(f"{name}: {seen['masks']} masks in {seen['micro_batches']} micro-batches")
        if sum(seen["waits"].values()) > WAITS:
            wrong.append(f"{name}: the host waits: {seen['waits']}")
    if found["variants"] > VARIANTS:
        wrong.append(f"{found['variants']} variants of attention")
    return wrong


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All cases in one process: its imports cost more than a case."""
    cases = [{**BATCH, "shape": SMALL, **case} for case in CASES.values()]
    faults = [{**BATCH, "shape": SMALL, **case, "fault": fault} for fault, case in FAULTS.items()]
    scale = [{**BATCH, "shape": EIGHT_B | {"num_hidden_layers": 2}, **case} for case in SCALE.values()]
    planned = [{"shape": EIGHT_B | {"num_hidden_layers": 4}, **case} for case in PLANNED.values()]
    results = run(cases + faults + scale + planned, tmp_path_factory.mktemp("gpu_path"))
    return dict(zip([*CASES, *FAULTS, *SCALE, *PLANNED], results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_update_is_what_a_card_would_take(found: dict[str, dict[str, Any]], case: str) -> None:
    assert complaints(found[case]) == []


@pytest.mark.slow
def test_waits_do_not_grow_with_micro_batches(found: dict[str, dict[str, Any]]) -> None:
    few, many = found["student, one device"]["update"], found["student, four micro-batches"]["update"]
    assert many["micro_batches"] == 2 * few["micro_batches"]
    assert sum(many["waits"].values()) == sum(few["waits"].values())


@pytest.mark.slow
@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "forgotten_free"])
def test_a_planted_fault_is_found(found: dict[str, dict[str, Any]], fault: str) -> None:
    assert complaints(found[fault]) != []


@pytest.mark.slow
def test_memory_that_is_never_freed_is_found(found: dict[str, dict[str, Any]]) -> None:
    """After a pass without gradients only the weights are left; with logits kept, more."""
    sound, leaking = (found[name]["logprobs"]["left"] for name in ("reference, one device", "forgotten_free"))
    weights = 2 * (2 * 151936 * 1024 + 2 * (1024 * (2048 + 2048) + 2048 * 1024 + 3 * 1024 * 3072))
    assert abs(sound / weights - 1) < 0.01
    assert leaking > 1.01 * sound


@pytest.mark.slow
@pytest.mark.parametrize("case", SCALE)
def test_an_update_moves_what_arithmetic_says(found: dict[str, dict[str, Any]], case: str) -> None:
    """Every micro-batch gathers all weights in bf16 twice, forward and backward, and reduces every gradient once, in
    float32. Copies of a hybrid mesh exchange their shards of the gradients."""
    seen, passes = found[case]["update"]["moved"], 2
    layer = 4096 * (4096 + 2048) + 4096 * 4096 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128
    weights = 2 * layer + 2 * 151936 * 4096 + 4096
    gathered, reduced = passes * 2 * 2 * weights, passes * 4 * weights
    assert abs(seen["gathered"] / gathered - 1) < 0.01
    assert abs(seen["reduced"] / reduced - 1) < 0.01
    shards = SCALE[case]["world"] // SCALE[case].get("replicate", 1)
    between = reduced / shards if "replicate" in SCALE[case] else 0
    assert abs(seen.get("between copies", 0) - between) <= 0.01 * reduced / shards


@pytest.mark.slow
@pytest.mark.parametrize("case", PLANNED)
def test_the_plan_is_within_5_percent_of_the_peak(found: dict[str, dict[str, Any]], case: str) -> None:
    assert abs(found[case]["plan"] / found[case]["update"]["peak"] - 1) < 0.05


@pytest.mark.skipif("GAD_GPU_PATH" not in os.environ, reason="whole 8B models take minutes: make test-gpu-path")
@pytest.mark.parametrize("case", ["student, eight devices", "critic, hybrid", "student, adapters, one device"])
def test_a_whole_8b_model_is_updated(case: str, tmp_path: Path) -> None:
    batch = {"prompts": 2, "answers": 8, "prompt": 512, "answer": 512, "budget": 8192}
    (seen,) = run([{**batch, "shape": EIGHT_B, **CASES[case]}], tmp_path)
    assert complaints(seen) == []
    assert seen["update"]["peak"] < 80 * 2**30
