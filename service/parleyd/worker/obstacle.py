"""Which models engine `batching` cannot drive."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Chosen by the longest sequence of a forward pass, and so by whatever else is in the batch.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
# What a generation_config.json can ask of logits and no request can, each with what stands for nothing.
_LOGITS_FIELDS = {
    "bad_words_ids": None, "begin_suppress_tokens": None, "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None, "forced_bos_token_id": None, "no_repeat_ngram_size": 0,
    "sequence_bias": None, "suppress_tokens": None, "top_h": None, "typical_p": 1.0, "watermarking_config": None,
}  # fmt: skip


def batching_obstacle(model: PreTrainedModel) -> str | None:
    """Why engine `batching` cannot drive this model, or None."""
    config: Any = model.config.get_text_config()
    if getattr(config, "is_heterogeneous", False):  # what differs cannot be asked of it
        return "layers that differ in size or kind"
    layer_types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    longest = getattr(config, "max_position_embeddings", math.inf)
    own = vars(model.generation_config)
    asked = [name for name, nothing in _LOGITS_FIELDS.items() if own.get(name) not in (None, [], nothing)]
    obstacles = {
        "it is an encoder-decoder": model.config.is_encoder_decoder,
        "it keeps a state instead of keys and values": getattr(model, "_is_stateful", False),
        "it takes no attention function of ours": not getattr(model, "_supports_attention_backend", False),
        f"layers of {', '.join(sorted(layer_types))}": bool(layer_types - {"full_attention"}),
        "sliding-window attention": window is not None and window < longest,
        "soft-capped attention": getattr(config, "attn_logit_softcapping", None) is not None,
        # Counted in rows of a forward pass, which begins with the cache that transformers keeps.
        "attention scaled by positions of its own": getattr(config, "attn_temperature_tuning", False),
        "rotary embeddings that change with the length": bool(_rope_types(config) & _LENGTH_DEPENDENT_ROPE),
        f"its generation_config.json asks for {', '.join(asked)}": bool(asked),
        "it is spread over several devices": len(set(getattr(model, "hf_device_map", {}).values())) > 1,
    }
    return next((obstacle for obstacle, is_there in obstacles.items() if is_there), None)


def _rope_types(config: Any) -> set[str]:
    """The kinds of rotary embedding: one for all layers, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    of_layers = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(one.get("rope_type")) for one in (parameters, *of_layers)}
