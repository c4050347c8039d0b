"""The forward pass of the Llama family with nothing between the operators: fused QKV and gate/up, no masks, no modules.

The stock modules cost several milliseconds a step in Python and dispatch alone. Weights are the loaded model's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from parleyd.kernels import layer_ops
from parleyd.kernels.cache import PagedKVCache
from parleyd.kernels.compiled import CompiledKernels
from parleyd.kernels.layer_ops import LayerOps
from parleyd.kernels.layout import StepLayout, attend_to_written
from parleyd.model.gguf_blocks import GgufBlocks
from parleyd.model.lean_model import EMBEDDING, HEAD, LeanModel
from parleyd.model.linear.compiled import compiled_weights
from parleyd.model.linear.maker import LinearMaker
from parleyd.model.linear.plain import Linear

if TYPE_CHECKING:
    from parleyd.cpu_kernels.decoder import Decoder


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
    """See `Forward`."""

    def __init__(
        self,
        model: LeanModel,
        cache: PagedKVCache,
        *,
        packed: bool = True,
        blocks: GgufBlocks | None = None,
        compiled: CompiledKernels | None = None,
    ) -> None:
        """Takes the model's weights. `packed`, `blocks`: see LinearMaker."""
        self._shape = model.shape
        self._cache = cache
        self._ops: LayerOps = compiled.layers if compiled else layer_ops
        self._eps = model.shape.norm_epsilon
        self._embedding = model.embedding
        self._cos, self._sin = model.rotary_tables()
        self._norm = model.weights["model.norm.weight"]
        linears = LinearMaker(model.weights, packed=packed, blocks=blocks, compiled=compiled is not None)
        self._layers = [_lean_layer(f"model.layers.{index}", model, linears) for index in range(model.shape.num_layers)]
        self._head = linears.make(HEAD if HEAD in model.weights else EMBEDDING)
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
        num_heads, num_kv_heads, head_dim = self._shape.num_heads, self._shape.num_kv_heads, self._shape.head_dim
        qkv = layer.qkv(x).view(-1, num_heads + 2 * num_kv_heads, head_dim)
        if layer.qk_norms is not None:
            query, key, value = qkv.split_with_sizes([num_heads, num_kv_heads, num_kv_heads], 1)
            query_norm, key_norm = layer.qk_norms
            query = F.rms_norm(query, (head_dim,), query_norm, self._eps)
            key = F.rms_norm(key, (head_dim,), key_norm, self._eps)
            qkv = torch.cat([query, key, value], 1)
        keys, values = self._cache.keys[index], self._cache.values[index]
        qkv = self._ops.rotate_and_write(qkv, num_kv_heads, cos, sin, layout.slots, keys, values)
        attended = attend_to_written(self._cache, index, layout, qkv[:, :num_heads], head_dim**-0.5)
        return attended.reshape(-1, num_heads * head_dim)


def _compiled_decoder(layers: list[_Layer], cache: PagedKVCache, epsilon: float) -> Decoder | None:
    """None where the layers are not all of what it knows."""
    known = []
    for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
        linears = [compiled_weights(linear) for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        weights = [weights_for for weights_for in linears if weights_for is not None]
        if len(weights) < 4 or layer.qk_norms is not None or cache.kernels.decode is None:
            return None
        known.append((layer.input_norm, layer.post_norm, keys, values, *weights))
    from parleyd.cpu_kernels.decoder import Decoder, Layer

    return Decoder([Layer(*one) for one in known], epsilon, cache.count_layers)


def _lean_layer(name: str, model: LeanModel, linears: LinearMaker) -> _Layer:
    weights = model.weights
    norms = [weights.get(f"{name}.self_attn.{which}_norm.weight") for which in "qk"]
    attention = [f"{name}.self_attn.{which}_proj.weight" for which in "qkvo"]
    gate, up, down = (f"{name}.mlp.{which}_proj.weight" for which in ("gate", "up", "down"))
    return _Layer(
        input_norm=weights[f"{name}.input_layernorm.weight"],
        qkv=linears.make(*attention[:3]),
        qk_norms=None if norms[0] is None or norms[1] is None else (norms[0], norms[1]),
        out=linears.make(attention[3]),
        post_norm=weights[f"{name}.post_attention_layernorm.weight"],
        gate_up=linears.make(gate, up),
        down=linears.make(down),
    )
