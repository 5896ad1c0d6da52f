"""Advice that makes a run fit is true of the plan's own arithmetic, minimal, and given where there is no GPU too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gadcli.config.fit import GPU_GB, HEADROOM, Advice, advise, gpus_that_fit, on_gpus, peak_gb, what_gpus_hold
from gadcli.config.memory import Placement, estimate
from gadcli.config.modelinfo import model_shape
from gadcli.config.plan import make_plan
from gadcli.config.resolve import resolve
from gadcli.errors import ConfigError
from gadcli.launch.stage import StageRequest, prepare

QWEN3_8B = {
    "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936,
    "tie_word_embeddings": False,
}  # fmt: skip
SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
SHAPE = model_shape(QWEN3_8B)


def cluster(gpus: int, device_gb: float = GPU_GB) -> Placement:
    return Placement("cuda", "vllm", gpus, SHAPE, SHAPE, device_gb, local_size=min(gpus, 8))


def peak_with(setting: Placement, words: tuple[str, ...]) -> float:
    """The peak of chengla-8b's gad stage with overrides as a user would type them."""
    return peak_gb(estimate(resolve("gad", "chengla-8b", overrides=list(words)).config, setting))


@pytest.mark.parametrize(("gpus", "limit"), [(8, 70.0), (8, 60.0), (4, 75.0), (2, 75.0), (1, 79.5)])
def test_typing_the_advice_makes_the_run_fit_and_no_word_of_it_is_idle(gpus: int, limit: float) -> None:
    setting = cluster(gpus)
    advice = advise(resolve("gad", "chengla-8b").config, setting, limit)
    assert advice is not None and advice.fits and advice.overrides
    assert peak_with(setting, advice.overrides) == pytest.approx(advice.peak_gb)
    assert advice.peak_gb <= limit < peak_with(setting, ())
    for word in advice.overrides:
        rest = tuple(other for other in advice.overrides if other != word)
        assert peak_with(setting, rest) > limit, f"{word} is not needed"


def test_what_fits_gets_no_advice_and_what_never_fits_is_told_so() -> None:
    config = resolve("gad", "chengla-8b").config
    assert advise(config, cluster(16), HEADROOM * GPU_GB) is None
    hopeless = advise(config, cluster(1, 24.0), 24.0)  # 8B float32 masters alone are 30.5 GiB
    assert isinstance(hopeless, Advice) and not hopeless.fits and hopeless.peak_gb > 24.0


def test_the_fewest_gpus_that_fit_do_and_half_of_them_do_not() -> None:
    config = resolve("gad", "chengla-8b").config
    gpus = gpus_that_fit(config, cluster(1), 70.0)
    assert gpus is not None
    assert peak_gb(estimate(config, on_gpus(cluster(1), gpus))) <= 70.0
    assert peak_gb(estimate(config, on_gpus(cluster(1), gpus // 2))) > 70.0


def test_sixteen_gpus_hold_half_of_what_eight_do_but_no_smaller_sampler() -> None:
    one, eight, sixteen = what_gpus_hold(resolve("gad", "chengla-8b").config, cluster(1))
    assert eight.memory.actor.resident == pytest.approx(2 * sixteen.memory.actor.resident)
    assert eight.memory.sampler_weights == sixteen.memory.sampler_weights
    assert not one.fits and sixteen.fits
    # A host holds, a rank: the whole model once while loading, and a copy of the rank's share while saving.
    assert sixteen.memory.host_ram < eight.memory.host_ram < 2 * sixteen.memory.host_ram


def plan_text(config: dict[str, object], *overrides: str, ram: float = 20.0) -> tuple[str, dict[str, object]]:
    cfg = resolve("gad", "chengla-8b", overrides=list(overrides)).config
    made = make_plan(cfg, 1000, config, None, 1, device="cpu", engine="vllm", free_gb={"ram": ram})
    return "\n".join(made.render()), made.to_json()


def test_a_machine_without_a_gpu_is_told_what_1_8_and_16_would_hold() -> None:
    text, data = plan_text(QWEN3_8B)
    for expected in ("1 x 80 GB", "8 x 80 GB", "16 x 80 GB", "host a node", "1 GPU: "):
        assert expected in text, expected
    assert [there["gpus"] for there in json.loads(json.dumps(data))["on_gpus"]] == [1, 8, 16]


@pytest.mark.parametrize("overrides", [["trainer.device=cpu"], []])
def test_a_small_model_or_a_run_meant_for_the_cpu_is_not(overrides: list[str]) -> None:
    text, data = plan_text(QWEN3_8B if overrides else SMOLLM2, *overrides, ram=900.0)
    assert "80 GB" not in text and data["on_gpus"] == []


def test_a_config_json_alone_is_planned_with_and_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    request = StageRequest("gad", "chengla-8b", flags={"actor.model.path": f"{tmp_path}/config.json"}, dry_run=True)
    assert len(prepare(request).plan.elsewhere) in (0, 3)  # none where this machine has GPUs
    folder = StageRequest("gad", "chengla-8b", flags={"actor.model.path": str(tmp_path)}, dry_run=True)
    with pytest.raises(ConfigError, match="without weights"):  # as the worker would say
        prepare(folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"content": [{"role": "user", "content": "a"}], "teacher_response": "b"}) + "\n")
    flags = {"actor.model.path": str(tmp_path / "config.json"), "data.train_files": [str(rows)]}
    with pytest.raises(ConfigError, match="alone has no weights"):
        prepare(StageRequest("gad", "chengla-8b", flags=flags))
