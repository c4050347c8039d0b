"""Which models engine `batching` cannot drive."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Chosen by the longest sequence of a forward pass, and so by whatever else is in the batch.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def batching_obstacle(model: PreTrainedModel) -> str | None:
    """Why engine `batching` cannot drive this model, or None."""
    config: Any = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    obstacles = {
        "it is an encoder-decoder": model.config.is_encoder_decoder,
        "it keeps a state instead of keys and values": getattr(model, "_is_stateful", False),
        "it takes no attention function of ours": not getattr(model, "_supports_attention_backend", False),
        f"layers of {', '.join(sorted(layer_types))}": bool(layer_types - {"full_attention"}),
        "sliding-window attention": window is not None and window < getattr(config, "max_position_embeddings", math.inf),
        "soft-capped attention": getattr(config, "attn_logit_softcapping", None) is not None,
        # Counted in rows of a forward pass, which begins with the cache that transformers keeps.
        "attention scaled by positions of its own": getattr(config, "attn_temperature_tuning", False),
        "rotary embeddings that change with the length": bool(_rope_types(config) & _LENGTH_DEPENDENT_ROPE),
        "it is spread over several devices": len(set(getattr(model, "hf_device_map", {}).values())) > 1,
    }
    return next((obstacle for obstacle, is_there in obstacles.items() if is_there), None)


def _rope_types(config: Any) -> set[str]:
    """The kinds of rotary embedding: one for all layers, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    of_layers = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(one.get("rope_type")) for one in (parameters, *of_layers)}
