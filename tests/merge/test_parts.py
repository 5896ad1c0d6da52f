"""The torch-free parts against torch and transformers: casts, expected names, slices in any cut, sizes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from gadcli.checkpoint.merge.cast import convert
from gadcli.checkpoint.merge.expected import compare, expected_shapes
from gadcli.checkpoint.merge.source import LoraInfo
from gadcli.checkpoint.merge.tensors import Files, Part, SourceTensor, read_whole, same_bytes, whole
from gadcli.checkpoint.safe_unpickle import Strided, TorchZip
from gadcli.cli.merge import parse_size
from gadcli.errors import CheckpointError, ConfigError


def raw(tensor: torch.Tensor) -> memoryview:
    return memoryview(bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()))


def test_float32_to_bfloat16_rounds_as_torch_for_every_exponent_and_tie() -> None:
    """All 65,536 upper halves with lower halves around the rounding tie (0x7fff, 0x8000, 0x8001)."""
    upper = torch.arange(65536, dtype=torch.int64) << 16
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        bits = upper + low
        values = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
        want = values.to(torch.bfloat16)
        got = torch.frombuffer(bytearray(convert(raw(values), "float32", "bfloat16")), dtype=torch.bfloat16)
        assert torch.equal(torch.isnan(got), torch.isnan(want))
        fine = ~torch.isnan(want)
        assert torch.equal(got[fine].view(torch.int16), want[fine].view(torch.int16))


@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
def test_casts_equal_torchs(source: str, target: str) -> None:
    values = (torch.randn(999, generator=torch.Generator().manual_seed(1)) * 3).to(getattr(torch, source))
    got = bytes(convert(raw(values), source, target))
    # float64 goes through float32 first, as its values here need no more
    want = values.float().to(getattr(torch, target)) if source == "float64" else values.to(getattr(torch, target))
    assert got == bytes(raw(want))


def test_a_weight_too_large_for_float16_is_an_error_and_not_an_infinity() -> None:
    with pytest.raises(CheckpointError, match="too large for float16"):
        convert(raw(torch.tensor([70000.0])), "float32", "float16")
    assert bytes(convert(raw(torch.tensor([float("inf")])), "float32", "float16")) == bytes(
        raw(torch.tensor([float("inf")], dtype=torch.float16))
    )


CONFIGS = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True, "head_dim": 8}),
    ("mistral", {"head_dim": 16}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 16, "attention_bias": True}),
    ("qwen3", {"head_dim": None}),
]


@pytest.mark.parametrize(("kind", "more"), CONFIGS)
@pytest.mark.parametrize("critic", [False, True])
def test_expected_names_equal_transformers_meta_model(kind: str, more: dict, critic: bool) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

    values = dict(vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, num_labels=1)  # fmt: skip
    config = AutoConfig.for_model(kind, **values, **{k: v for k, v in more.items() if v is not None})
    with torch.device("meta"):
        model = (AutoModelForTokenClassification if critic else AutoModelForCausalLM).from_config(config)
    want = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    if config.tie_word_embeddings and not critic:
        want.pop("lm_head.weight")
    saved = config.to_dict()
    assert expected_shapes(saved, critic=critic) == want
    compare(want, want)
    with pytest.raises(CheckpointError, match="1 missing"):
        compare({n: s for n, s in want.items() if n != "model.norm.weight"}, want)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("value", [0, -1, "many", True, 10**9, 2.0])
def test_a_config_whose_sizes_are_none_is_an_error_and_no_hang(family: str, value: object) -> None:
    sizes = dict(hidden_size=32, intermediate_size=40, num_attention_heads=4, vocab_size=50, num_hidden_layers=value)
    with pytest.raises(CheckpointError, match="num_hidden_layers is"):
        expected_shapes({"model_type": family, **sizes}, critic=False)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number_is_refused(alpha: float) -> None:
    """JSON takes NaN and 1e999; fused, they would be the whole model."""
    with pytest.raises(CheckpointError, match="alpha is"):
        LoraInfo(alpha, 4)


def test_another_family_is_asked_of_transformers() -> None:
    from transformers import Gemma2Config

    config = Gemma2Config(vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=1, head_dim=8,
                          num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    shapes = expected_shapes(config.to_dict(), critic=False)
    assert shapes["model.layers.0.pre_feedforward_layernorm.weight"] == (32,)


def stored(tensor: torch.Tensor, path: Path) -> Strided:
    """A tensor saved by torch, as a place in a file."""
    torch.save(tensor, path)
    with open(path, "rb") as stream:
        at = TorchZip(path, stream).obj
    assert isinstance(at, Strided)
    return at


def test_pieces_cut_along_any_axis_come_back_whole(tmp_path: Path) -> None:
    full = torch.arange(24.0).view(4, 6)
    for axis, sizes in ((0, (1, 3)), (1, (5, 1)), (0, (4, 0))):
        parts, at = [], 0
        for i, piece in enumerate(full.split(list(sizes), dim=axis)):
            place = stored(piece.clone(), tmp_path / f"{axis}_{i}.pt")
            parts.append(Part((at, 0) if axis == 0 else (0, at), place))
            at += sizes[i]
        tensor = SourceTensor("w", "float32", (4, 6), tuple(parts))
        tensor.check()
        assert tensor.rowwise == (axis == 0)
        files = Files()
        assert read_whole(files, tensor) == bytes(raw(full))
        files.close()


def test_views_and_transposes_are_read_by_their_strides(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    files = Files()
    for i, view in enumerate([base.t(), base[1:3], base[:, 2:4], torch.tensor(5.0), torch.empty(0, 3)]):
        at = stored(view, tmp_path / f"{i}.pt")
        assert read_whole(files, whole("w", at)) == bytes(raw(view))
    files.close()


def test_holes_and_overlaps_are_found(tmp_path: Path) -> None:
    piece = stored(torch.zeros(2, 3), tmp_path / "p.pt")
    with pytest.raises(CheckpointError, match="6 of 12"):
        SourceTensor("w", "float32", (4, 3), (Part((0, 0), piece),)).check()
    with pytest.raises(CheckpointError, match="overlap"):
        SourceTensor("w", "float32", (4, 3), (Part((0, 0), piece), Part((1, 0), piece))).check()
    SourceTensor("w", "float32", (4, 3), (Part((0, 0), piece), Part((2, 0), piece))).check()


def test_equality_is_of_bits(tmp_path: Path) -> None:
    files = Files()
    a = whole("a", stored(torch.tensor([0.0, 1.0]), tmp_path / "a.pt"))
    b = whole("b", stored(torch.tensor([-0.0, 1.0]), tmp_path / "b.pt"))
    assert same_bytes(files, a, a) and not same_bytes(files, a, b)
    files.close()


def test_bytes_of_every_dtype_survive_the_torch_free_reader(tmp_path: Path) -> None:
    files = Files()
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
                 "float8_e4m3fn", "float8_e5m2"):  # fmt: skip
        tensor = torch.arange(6).to(getattr(torch, name))
        at = stored(tensor, tmp_path / f"{name}.pt")
        assert at.dtype == name and read_whole(files, whole("w", at)) == bytes(raw(tensor))
    files.close()


def test_a_parameter_with_attributes_is_its_data(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.note = "left by a wrapper"
    at = stored(parameter, tmp_path / "p.pt")
    files = Files()
    assert read_whole(files, whole("w", at)) == bytes(raw(torch.ones(3)))
    files.close()


def test_a_tensor_that_reaches_past_its_storage_is_refused(tmp_path: Path) -> None:
    """Sizes in the pickle and bytes in the record are two claims; the smaller one holds."""
    buffer = io.BytesIO()
    torch.save(torch.zeros(4), buffer)
    import zipfile

    path = tmp_path / "lies.pt"
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name)[: 8 if "/data/" in name else None])
    with open(path, "rb") as stream, pytest.raises(CheckpointError, match="past its storage"):
        TorchZip(path, stream)


@pytest.mark.parametrize(("text", "want"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("700", 700), ("2kb", 2000)])
def test_sizes_are_read(text: str, want: int) -> None:
    assert parse_size(text) == want


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-", "five"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_size(text)
