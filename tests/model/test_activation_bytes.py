"""The plan's activations against what autograd really saves for backward: a layer's bytes, to two parts in a hundred.

A layer's share is the difference between a model of two layers and one of one, so embedding and last norm drop out.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gadcli.config.memory import Passes, activation_bytes
from gadcli.config.modelinfo import model_shape, read_model_config
from gadcli.config.schema import LoraConfig, ModelConfig
from gadcli.model.loading import load_actor
from gadcli.model.packing import Group, lay_out
from tiny import write_tiny_model

PROMPT, ANSWER = 24, 10
PASSES = [Passes(PROMPT + n * ANSWER, n * ANSWER, rows, 1, n) for n in (1, 6) for rows in (1, 2)]
TOLERANCE = 0.02


def saved_bytes(folder: Path, cfg: ModelConfig, passes: Passes, dtype: torch.dtype) -> int:
    """Bytes of the distinct tensors that a forward pass keeps for backward, the model's own weights aside."""
    model = load_actor(str(folder), cfg).to(dtype)
    groups = [Group([2] * PROMPT, [[3] * ANSWER] * passes.answers)] * passes.rows
    layout = lay_out(groups)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.answer_logprobs(layout, 1.0)
    return sum(storage.nbytes() for storage in kept.values())


def saved_by_a_layer(place: Path, family: str, cfg: ModelConfig, passes: Passes, dtype: torch.dtype) -> int:
    one, two = (place / f"{family}{layers}" for layers in (1, 2))
    for folder, layers in ((one, 1), (two, 2)):
        if not folder.exists():
            write_tiny_model(folder, family, layers=layers)
    return saved_bytes(two, cfg, passes, dtype) - saved_bytes(one, cfg, passes, dtype)


def planned_for_a_layer(
    place: Path, family: str, cfg: ModelConfig, passes: Passes, itemsize: int, device: str
) -> float:
    shape = model_shape(read_model_config(str(place / f"{family}1")) or {})
    return activation_bytes(shape, cfg, passes, itemsize, device)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("passes", PASSES, ids=lambda p: f"{p.rows}x{p.answers}")
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_a_layer_saves_what_the_plan_says(family: str, passes: Passes, place: Path) -> None:
    saved = saved_by_a_layer(place, family, ModelConfig(), passes, torch.float32)
    assert planned_for_a_layer(place, family, ModelConfig(), passes, 4, "cpu") == pytest.approx(saved, rel=TOLERANCE)


@pytest.mark.parametrize("passes", PASSES[1:3], ids=lambda p: f"{p.rows}x{p.answers}")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_layer_in_half_precision_saves_what_the_plan_says(family: str, passes: Passes, place: Path) -> None:
    saved = saved_by_a_layer(place, family, ModelConfig(), passes, torch.bfloat16)
    assert planned_for_a_layer(place, family, ModelConfig(), passes, 2, "cpu") == pytest.approx(saved, rel=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_adapters_save_what_lies_between_their_halves_besides(family: str, place: Path) -> None:
    cfg = ModelConfig(lora=LoraConfig(rank=4))
    saved = saved_by_a_layer(place, family, cfg, PASSES[2], torch.float32)
    assert planned_for_a_layer(place, family, cfg, PASSES[2], 4, "cpu") == pytest.approx(saved, rel=TOLERANCE)
    between = 4 * 7 * 4 * PASSES[2].tokens  # bytes x linear layers x rank x tokens
    assert saved == saved_by_a_layer(place, family, ModelConfig(), PASSES[2], torch.float32) + between


def test_without_the_copies_for_each_answer_the_plan_would_be_too_low(place: Path) -> None:
    saved = saved_by_a_layer(place, "llama", ModelConfig(), PASSES[2], torch.float32)
    one_call = planned_for_a_layer(place, "llama", ModelConfig(), PASSES[2], 4, "cuda")
    assert one_call < saved * (1 - 2 * TOLERANCE)
