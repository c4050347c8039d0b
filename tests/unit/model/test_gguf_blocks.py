"""Quantised weights of a .gguf file as they stand: kept by the conversion, found again, computed with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from parleyd.config import ModelSettings
from parleyd.model.gguf_blocks import FILE_NAME, Numbers, concatenated
from parleyd.model.linear import by_rows
from parleyd.model.linear.compiled import CompiledLinear, are_blocks_fastest, can_compile_blocks, compiled_block_linear
from parleyd.model.linear.four_bit import four_bit_linear
from parleyd.model.linear.maker import LinearMaker
from parleyd.model.linear.plain import Linear
from parleyd.model.loader import LoadedModel, load_model
from tests.support.tiny_gguf import write_gguf

KINDS = [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0]
QKV = [f"model.layers.0.self_attn.{which}_proj.weight" for which in "qkv"]


def load(path: Path, kind: GGMLQuantizationType) -> LoadedModel:
    write_gguf(path, matrices=kind)
    return load_model(ModelSettings(model=str(path), cache=str(path.parent / "cache")))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_numbers_are_the_files_in_the_order_of_the_models_rows(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    loaded = load(tmp_path / "tiny.gguf", kind)
    assert loaded.blocks is not None
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(tmp_path / "tiny.gguf")).tensors}
    assert loaded.blocks.num_bytes >= sum(int(one.n_bytes) for one in tensors.values() if one.tensor_type == kind)
    for index, layer in enumerate(loaded.model.model.layers):
        for name, place in (
            ("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"), ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"), ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj"),
        ):  # fmt: skip
            weight = layer.get_submodule(place).weight
            numbers = loaded.blocks.numbers_of(f"model.layers.{index}.{place}.weight", weight.shape[1])
            assert numbers is not None
            assert numbers.numbers.min() >= 0 and numbers.numbers.max() <= 15
            assert torch.equal(numbers.dequantised().bfloat16(), weight)
            in_file = gguf.dequantize(tensors[f"blk.{index}.{name}.weight"].data, kind)
            ours = sorted(map(tuple, numbers.dequantised().tolist()))
            assert torch.allclose(torch.tensor(ours), torch.tensor(sorted(map(tuple, in_file.tolist()))), atol=1e-6)
    assert loaded.blocks.numbers_of("model.embed_tokens.weight", 32) is None


@pytest.mark.parametrize("make", [four_bit_linear, compiled_block_linear])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_kernels_multiply_by_what_the_file_says(
    tmp_path: Path, kind: GGMLQuantizationType, make: Callable[[Numbers, Tensor], Linear]
) -> None:
    loaded = load(tmp_path / "tiny.gguf", kind)
    assert loaded.blocks is not None
    weight = loaded.model.model.layers[1].mlp.down_proj.weight
    if make is compiled_block_linear and not can_compile_blocks(weight):
        pytest.skip("this processor has no such instructions")
    numbers = loaded.blocks.numbers_of("model.layers.1.mlp.down_proj.weight", weight.shape[1])
    assert numbers is not None
    bias = torch.randn(32).bfloat16()
    result = make(numbers, bias)(torch.eye(64, dtype=torch.bfloat16)).float() - bias.float()
    error = (result - numbers.dequantised().T).abs().max()
    assert error < 2**-6 * numbers.dequantised().abs().max()  # bfloat16's rounding of scale, zero, product and sum


def test_fused_layers_in_four_bits_agree_with_their_modules(tmp_path: Path) -> None:
    loaded = load(tmp_path / "tiny.gguf", GGMLQuantizationType.Q4_1)
    attention = loaded.model.model.layers[0].self_attn
    x = torch.randn(3, 32).bfloat16()
    expected = torch.cat([module(x).detach() for module in (attention.q_proj, attention.k_proj, attention.v_proj)], -1)
    maker = LinearMaker(dict(loaded.model.state_dict()), packed=False, blocks=loaded.blocks)
    linear = maker.make(*QKV)
    assert isinstance(linear, by_rows.ByRows)
    assert torch.equal(linear(x), expected)  # nothing has been measured, so all widths take the stock kind
    linear.max_narrow_rows = 2
    assert torch.equal(linear(x), expected)
    assert torch.allclose(linear(x[:2]).float(), expected[:2].float(), atol=0.02 * float(expected.abs().max()))


def test_fused_compiled_layers_agree_with_their_modules(tmp_path: Path) -> None:
    loaded = load(tmp_path / "tiny.gguf", GGMLQuantizationType.Q4_1)
    attention = loaded.model.model.layers[0].self_attn
    if not (can_compile_blocks(attention.q_proj.weight) and are_blocks_fastest()):
        pytest.skip("this processor has no such instructions")
    x = torch.randn(3, 32).bfloat16()
    expected = torch.cat([module(x).detach() for module in (attention.q_proj, attention.k_proj, attention.v_proj)], -1)
    maker = LinearMaker(dict(loaded.model.state_dict()), packed=True, blocks=loaded.blocks, compiled=True)
    linear = maker.make(*QKV)
    maker.choose()  # there is nothing to choose
    assert isinstance(linear, CompiledLinear)
    assert torch.allclose(linear(x).float(), expected.float(), atol=0.02 * float(expected.abs().max()))


def test_matrices_of_different_formats_are_not_made_one() -> None:
    """As where a file has values in more bits than queries and keys, or in a format that we cannot read."""
    four_bits, eight_bits = (
        Numbers(torch.zeros(2, 32 * planes), torch.ones(2, planes), torch.ones(2, planes), planes) for planes in (1, 2)
    )
    assert concatenated([four_bits, four_bits]) is not None
    assert concatenated([four_bits, eight_bits]) is None
    assert concatenated([four_bits, None]) is None


def test_a_file_without_such_blocks_keeps_none(gguf_file: Path, tmp_path: Path) -> None:
    loaded = load_model(ModelSettings(model=str(gguf_file), cache=str(tmp_path / "cache")))
    assert loaded.blocks is None
    assert not (Path(loaded.info.tokenizer_dir) / FILE_NAME).exists()


def test_a_file_of_that_name_outside_the_cache_is_not_read_and_the_log_says_so(
    llama_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (llama_folder / FILE_NAME).write_bytes(b"x")
    assert load_model(ModelSettings(model=str(llama_folder), cache=str(tmp_path / "cache"))).blocks is None
    assert f"{llama_folder / FILE_NAME} is not read" in caplog.text


def test_a_conversion_served_by_its_folder_has_its_blocks(tmp_path: Path) -> None:
    folder = load(tmp_path / "tiny.gguf", GGMLQuantizationType.Q4_0).info.tokenizer_dir
    link = tmp_path / "link"
    link.symlink_to(folder)
    for model in (folder, str(link)):
        assert load_model(ModelSettings(model=model, cache=str(tmp_path / "cache"))).blocks is not None


def test_a_conversion_that_was_moved_and_linked_has_its_blocks(tmp_path: Path) -> None:
    folder = Path(load(tmp_path / "tiny.gguf", GGMLQuantizationType.Q4_0).info.tokenizer_dir)
    elsewhere = folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(elsewhere)
    settings = ModelSettings(model=str(tmp_path / "tiny.gguf"), cache=str(tmp_path / "cache"))
    assert load_model(settings).blocks is not None


def test_the_narrow_kind_is_chosen_up_to_where_it_stops_being_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(by_rows, "time", SimpleNamespace(perf_counter=lambda: now))

    def costing(first: float, each: float) -> Linear:
        def linear(x: torch.Tensor) -> torch.Tensor:
            nonlocal now
            now += (first + each * len(x)) * 1e-6
            return x

        return linear

    layers = [by_rows.ByRows(costing(1, 10), costing(50, 1), (400, 400)) for _ in range(2)]
    never = by_rows.ByRows(costing(50, 1), costing(51, 1), (7, 7))
    limited = by_rows.ByRows(costing(1, 1), costing(50, 50), (9, 9), 3)
    chosen = by_rows.choose_by_cost([*layers, never, limited], torch.float32)
    assert chosen == {(400, 400): 4, (7, 7): 0, (9, 9): 3}
    assert [layer.max_narrow_rows for layer in (*layers, never)] == [4, 4, 0]
    assert [layers[0].takes_narrow(num_rows) for num_rows in (4, 5)] == [True, False]
