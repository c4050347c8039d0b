"""A decoder of the Llama family as its numbers and its weights alone, whoever has read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class LeanShape:
    """`inverse_frequencies`: of the rotary embedding, whose cosines and sines are multiplied by `rotary_scale`."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_positions: int
    norm_epsilon: float
    inverse_frequencies: tuple[float, ...]
    rotary_scale: float


@dataclass(frozen=True)
class LeanModel:
    """`weights`: by their names in a checkpoint, all on one device and of one type; without the output's matrix where
    that is the embedding. Whoever lays one out anew takes it out, lest it be held twice."""

    shape: LeanShape
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, model: PreTrainedModel) -> LeanModel:
        """Takes the weights out of a model that `can_be_lean`, which is of no use any more."""
        shape, weights = lean_shape(model), lean_weights(model)
        for module in model.modules():
            module._parameters.clear()
        return cls(shape, weights)

    @property
    def embedding(self) -> Tensor:
        """`[vocabulary, hidden]`."""
        return self.weights[EMBEDDING]

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def rotary_tables(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions, `[positions, 1, head_dim]`, each sine with the sign that its product
        gets."""
        frequencies = torch.tensor(self.shape.inverse_frequencies, device=self.device)
        angles = torch.arange(self.shape.num_positions, device=self.device).float()[:, None, None] * frequencies
        cos, sin = angles.cos() * self.shape.rotary_scale, angles.sin() * self.shape.rotary_scale
        return torch.cat([cos, cos], -1).to(self.dtype), torch.cat([-sin, sin], -1).to(self.dtype)


def can_be_lean(model: PreTrainedModel) -> bool:
    """Whether this is one of FAMILIES with plain layers on one device."""
    config: Any = model.config
    decoder: Any = model.model if config.model_type in FAMILIES else None
    return (
        decoder is not None
        and getattr(config, "hidden_act", None) == "silu"
        and all(parameter.device == model.device for parameter in model.parameters())
        and getattr(model, "hf_quantizer", None) is None  # its layers, or their weights, are not plain ones
        and all(type(module) is torch.nn.Linear for layer in decoder.layers for module in _linears(layer))
    )


def _linears(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    attention = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*attention, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def lean_shape(model: PreTrainedModel) -> LeanShape:
    """That of a model that `can_be_lean`."""
    config: Any = model.config
    decoder: Any = model.model
    return LeanShape(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=decoder.layers[0].self_attn.head_dim,
        num_positions=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        inverse_frequencies=tuple(decoder.rotary_emb.inv_freq.float().tolist()),
        rotary_scale=decoder.rotary_emb.attention_scaling,
    )


def lean_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Those of a model that `can_be_lean`."""
    weights = dict(model.state_dict())
    if weights[HEAD].data_ptr() == weights[EMBEDDING].data_ptr():
        del weights[HEAD]
    return weights
