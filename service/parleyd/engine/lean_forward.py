"""The forward pass of the Llama family with nothing between the operators: fused QKV and gate/up, no masks, no modules.

The stock modules cost several milliseconds a step in Python and dispatch alone. Weights are the loaded model's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from parleyd.kernels.cache import PagedKVCache
from parleyd.kernels.compiled import CompiledKernels
from parleyd.kernels.layer_ops import TORCH_OPS
from parleyd.kernels.layout import StepLayout, attend_to_written
from parleyd.model.gguf_blocks import GgufBlocks
from parleyd.model.linear.compiled import CompiledLinear
from parleyd.model.linear.maker import LinearMaker
from parleyd.model.linear.plain import Linear

if TYPE_CHECKING:
    from parleyd.cpu_kernels.decoder import Decoder

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


@dataclass(frozen=True)
class _Layer:
    """One decoder layer. `qk_norms`: of queries and keys, as Qwen3 has them."""

    input_norm: Tensor
    qkv: Linear
    qk_norms: tuple[Tensor, Tensor] | None
    out: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


class LeanForward:
    """See `Forward`. For models whose `config.model_type` is one of FAMILIES and whose activation is SiLU."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PagedKVCache,
        *,
        packed: bool = True,
        blocks: GgufBlocks | None = None,
        compiled: CompiledKernels | None = None,
    ) -> None:
        """`packed`, `blocks`: see LinearMaker. The model's own layers are of no use after."""
        decoder: Any = model.model
        config: Any = model.config
        self._cache = cache
        self._ops = compiled.layers if compiled else TORCH_OPS
        self._num_heads = config.num_attention_heads
        self._num_kv_heads = config.num_key_value_heads
        self._head_dim = decoder.layers[0].self_attn.head_dim
        self._eps = config.rms_norm_eps
        self._embedding = decoder.embed_tokens.weight
        self._cos, self._sin = _rotary_tables(decoder.rotary_emb, config.max_position_embeddings, self._embedding)
        self._norm = decoder.norm.weight
        linears = LinearMaker(packed=packed, blocks=blocks, compiled=compiled is not None)
        self._layers = [_lean_layer(layer, linears) for layer in decoder.layers]
        head: Any = model.get_output_embeddings()
        self._head = linears.make(head, keep=head.weight is self._embedding)
        linears.choose()
        self._decoder = _compiled_decoder(self._layers, cache, self._eps)

    def __call__(self, input_ids: Tensor, positions: Tensor, layout: StepLayout, sample_rows: Tensor) -> Tensor:
        """See Forward."""
        x = F.embedding(input_ids, self._embedding)
        cos, sin = self._cos.index_select(0, positions), self._sin.index_select(0, positions)
        if self._decoder is not None and (paged := layout.paged_decode) is not None:
            delta = self._decoder(x, cos, sin, layout.slots, paged.table, paged.lengths)
        else:
            delta = self._run_layers(x, cos, sin, layout)
        sampled, delta = x.index_select(0, sample_rows), delta.index_select(0, sample_rows)
        return self._head(self._ops.add_and_normalise(sampled, delta, self._norm, self._eps))

    def _run_layers(self, x: Tensor, cos: Tensor, sin: Tensor, layout: StepLayout) -> Tensor:
        """Changes `x`, and returns what is still to be added to it."""
        ops, eps = self._ops, self._eps
        delta = None
        for index, layer in enumerate(self._layers):
            normalised = ops.add_and_normalise(x, delta, layer.input_norm, eps)
            delta = layer.out(self._attend(index, layer, normalised, cos, sin, layout))
            normalised = ops.add_and_normalise(x, delta, layer.post_norm, eps)
            delta = layer.down(ops.gate(layer.gate_up(normalised)))
        assert delta is not None
        return delta

    def _attend(self, index: int, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor, layout: StepLayout) -> Tensor:
        num_heads, num_kv_heads, head_dim = self._num_heads, self._num_kv_heads, self._head_dim
        qkv = layer.qkv(x).view(-1, num_heads + 2 * num_kv_heads, head_dim)
        if layer.qk_norms is not None:
            query, key, value = qkv.split_with_sizes([num_heads, num_kv_heads, num_kv_heads], 1)
            query_norm, key_norm = layer.qk_norms
            query = F.rms_norm(query, (head_dim,), query_norm, self._eps)
            key = F.rms_norm(key, (head_dim,), key_norm, self._eps)
            qkv = torch.cat([query, key, value], 1)
        keys, values = self._cache.keys[index], self._cache.values[index]
        qkv = self._ops.rotate_and_write(qkv, num_kv_heads, cos, sin, layout.slots, keys, values)
        query, key, value = qkv.split_with_sizes([num_heads, num_kv_heads, num_kv_heads], 1)
        attended = attend_to_written(self._cache, index, layout, query, key, value, head_dim**-0.5)
        return attended.reshape(-1, num_heads * head_dim)


def can_run(model: PreTrainedModel) -> bool:
    """Whether LeanForward knows this model."""
    config: Any = model.config
    return (
        config.model_type in FAMILIES
        and getattr(config, "hidden_act", None) == "silu"
        and all(parameter.device == model.device for parameter in model.parameters())
        and getattr(model, "hf_quantizer", None) is None  # its layers, or their weights, are not plain ones
        and all(type(layer.self_attn.q_proj) is torch.nn.Linear for layer in model.model.layers)
    )


def _compiled_decoder(layers: list[_Layer], cache: PagedKVCache, epsilon: float) -> Decoder | None:
    """None where the layers are not all of what it knows."""
    known = []
    for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
        linears = [
            linear for linear in (layer.qkv, layer.out, layer.gate_up, layer.down) if isinstance(linear, CompiledLinear)
        ]
        if len(linears) < 4 or layer.qk_norms is not None or cache.kernels.decode is None:
            return None
        known.append((layer.input_norm, layer.post_norm, keys, values, *(linear.weights for linear in linears)))
    from parleyd.cpu_kernels.decoder import Decoder, Layer

    return Decoder([Layer(*one) for one in known], epsilon)


def _rotary_tables(rotary: Any, num_positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all positions, `[positions, 1, head_dim]`; each sine with the sign that its product gets."""
    cos, sin = rotary(like, torch.arange(num_positions, device=like.device)[None])
    sin = torch.cat([-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]], -1)
    return cos.transpose(0, 1), sin.transpose(0, 1)


def _lean_layer(layer: Any, linears: LinearMaker) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    norms = (attention.q_norm.weight, attention.k_norm.weight) if hasattr(attention, "q_norm") else None
    return _Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=linears.make(attention.q_proj, attention.k_proj, attention.v_proj),
        qk_norms=norms,
        out=linears.make(attention.o_proj),
        post_norm=layer.post_attention_layernorm.weight,
        gate_up=linears.make(mlp.gate_proj, mlp.up_proj),
        down=linears.make(mlp.down_proj),
    )
