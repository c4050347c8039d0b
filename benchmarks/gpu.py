"""How near engine `batching` comes to a GPU's limits: a model of Qwen2.5-7B's shape with random weights, in process.

Two figures: tokens/s of one stream, against the bandwidth that reading the weights for each token takes; and the time
of a decode step of 32 streams with 4,096 tokens of context each. The engine is the service's own, with all it does
between two steps. Bandwidth is measured first, as a copy. `--tiny` runs the same on a toy, on any device.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from benchmarks.environment import describe
from parleyd.config import ModelSettings
from parleyd.engine.batching import BatchingEngine
from parleyd.generation import EngineRequest, ModelInfo, SamplingParams
from parleyd.worker.build import build_engine

_QWEN_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768, "rope_theta": 1e6,
}  # fmt: skip
_TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 512,
}  # fmt: skip
_NUM_STREAMS = 32
# docs/performance.md: an H200's.
_TARGET_SHARE, _TARGET_STEP_MS = 0.85, 10.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="where to run (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a toy model and short contexts, to see that it runs")
    parser.add_argument("--new-tokens", type=int, default=256, help="tokens of each answer (default: %(default)s)")
    parser.add_argument("--attention", default="auto", help="see parleyd serve --attention")
    parser.add_argument("--no-cuda-graphs", action="store_true")
    parser.add_argument("--no-overlap", action="store_true")
    parser.add_argument("--json", type=Path, help="file for the results as JSON")
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(message)s")

    device = torch.device(arguments.device)
    settings = ModelSettings(
        engine="batching",
        max_running=_NUM_STREAMS,
        attention=arguments.attention,
        cuda_graphs=not arguments.no_cuda_graphs,
        overlap=not arguments.no_overlap,
        kv_cache_memory=0.05 if arguments.tiny else None,
        max_batch_tokens=512 if arguments.tiny else 4096,
    )
    context = 64 if arguments.tiny else 4096
    bandwidth = copy_bandwidth(device)
    model = make_model(_TINY if arguments.tiny else _QWEN_7B, device)
    weight_bytes = read_bytes(model)
    _, engine = build_engine(settings, model, model_info(model, context + arguments.new_tokens))
    assert isinstance(engine, BatchingEngine)

    decode(engine, model, num_streams=2, prompt_tokens=16, new_tokens=8)  # warm-up
    one_s = decode(engine, model, num_streams=1, prompt_tokens=min(128, context), new_tokens=arguments.new_tokens)
    step_s = decode(
        engine, model, num_streams=_NUM_STREAMS, prompt_tokens=context - arguments.new_tokens // 2,
        new_tokens=arguments.new_tokens,
    )  # fmt: skip
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "copy_bandwidth_gb_per_s": round(bandwidth / 1e9, 1),
        "one_stream_tokens_per_s": round(1 / one_s, 1),
        "one_stream_bandwidth_share": round(weight_bytes / one_s / bandwidth, 3),
        "streams": _NUM_STREAMS,
        "context_tokens": context,
        "step_ms": round(step_s * 1e3, 3),
        "step_tokens_per_s": round(_NUM_STREAMS / step_s, 1),
        "tiny": arguments.tiny,
        "attention": arguments.attention,
        "cuda_graphs": settings.cuda_graphs,
        "overlap": settings.overlap,
        **describe(),
    }
    print(json.dumps(result, indent=2))
    print(f"one stream: {result['one_stream_bandwidth_share']:.0%} of the bandwidth (target {_TARGET_SHARE:.0%})")
    print(f"{_NUM_STREAMS} streams: {result['step_ms']} ms a step (target {_TARGET_STEP_MS} ms on an H200)")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def make_model(sizes: dict[str, Any], device: torch.device) -> PreTrainedModel:
    """Random weights in bfloat16, made where they are to be."""
    torch.manual_seed(0)
    config = Qwen2Config(**sizes, tie_word_embeddings=False)
    with torch.device(device):
        model: PreTrainedModel = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.eval()


def model_info(model: PreTrainedModel, context: int) -> ModelInfo:
    return ModelInfo(
        tokenizer_dir="", max_context_tokens=context, vocab_size=model.config.vocab_size, eos_token_ids=(),
        dtype="bfloat16", device=str(model.device), engine="", max_running=_NUM_STREAMS,
    )  # fmt: skip


def read_bytes(model: PreTrainedModel) -> int:
    """What a step of one stream has to read: all weights but the rows of the embedding that it does not look up."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    return total - model.get_input_embeddings().weight.nbytes


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s, read and written together."""
    source = torch.ones(2**31 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    into = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        synchronize(device)
        started = time.perf_counter()
        into.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / statistics.median(seconds)


def decode(
    engine: BatchingEngine, model: PreTrainedModel, *, num_streams: int, prompt_tokens: int, new_tokens: int
) -> float:
    """Median seconds between two steps that decode all streams and nothing else."""
    random = torch.Generator().manual_seed(num_streams)
    for key in range(num_streams):
        ids = torch.randint(model.config.vocab_size, (prompt_tokens,), generator=random)
        params = SamplingParams(max_new_tokens=new_tokens)
        engine.submit(EngineRequest(key=key, prompt_ids=tuple(ids.tolist()), params=params))
    return statistics.median(_step_seconds(engine, num_streams))


def _step_seconds(engine: BatchingEngine, num_streams: int) -> Iterator[float]:
    open_streams, is_steady = num_streams, False
    begun: set[int] = set()
    last = time.perf_counter()
    while open_streams:
        outputs = engine.step()
        now = time.perf_counter()
        if is_steady and len(outputs) == num_streams:
            yield now - last
        last = now
        is_steady = len(begun) == num_streams
        begun |= {output.key for output in outputs}
        open_streams -= sum(output.is_last for output in outputs)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    raise SystemExit(main())
