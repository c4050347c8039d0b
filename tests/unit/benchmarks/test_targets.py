"""From a suite's rows to the table of targets: what is met, missed or not measured is said plainly."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from benchmarks import workload
from benchmarks.load import Clock, Run, closed_loop
from benchmarks.online import maker
from benchmarks.report import targets_table, throughput_table
from benchmarks.summary import percentile, ratio, summarise
from benchmarks.targets import TARGETS


def cell(server: str, concurrency: int, *rounds: float, ttft_ms: float = 10.0) -> dict[str, Any]:
    """A row of the throughput step."""
    return {
        "server": server,
        "workload": "fixed",
        "concurrency": concurrency,
        "tokens_per_s": sorted(rounds)[len(rounds) // 2],
        "rounds": list(rounds),
        "ttft_p50_rounds_ms": [ttft_ms] * len(rounds),
        "itl_p50_ms": 1.0,
    }


def verdict(table: str, what: str) -> str:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {what} |")]
    return line.split("|")[4].strip()


def test_a_target_is_met_missed_or_not_measured() -> None:
    table = targets_table([cell("parley-bf16", 1, 140), cell("vllm", 1, 100), {"experiment": "start", "value": 6.0}])
    assert verdict(table, "tokens/s over vLLM's, same bf16 weights, c=1") == "met"
    assert verdict(table, "start to serving, warm cache") == "**MISSED**"
    assert verdict(table, "tokens/s over vLLM's, same bf16 weights, c=64") == "–"


def test_the_peers_best_configuration_counts() -> None:
    rows = [cell("parley-bf16", 4, 150, ttft_ms=9), cell("vllm", 4, 90, ttft_ms=10)]
    assert verdict(targets_table(rows), "tokens/s over vLLM's, same bf16 weights, c=4") == "met"
    rows.append(cell("vllm-reserved-core", 4, 120, ttft_ms=30))
    table = targets_table(rows)
    assert verdict(table, "tokens/s over vLLM's, same bf16 weights, c=4") == "**MISSED**"
    assert verdict(table, "TTFT p50 over vLLM's, c=4") == "**MISSED**"


def test_a_peer_that_failed_is_named() -> None:
    table = targets_table([{"server": "vllm", "failed": "vllm is not installed: make bench-peers"}])
    assert "- vllm: vllm is not installed" in table
    assert "MISSED" not in table


def test_every_target_tells_its_command() -> None:
    table = targets_table([])
    assert len(re.findall(r"`python -m benchmarks\.suite --only [a-z-]+`", table)) == len(TARGETS)


def test_the_table_tells_a_closed_loop_from_an_open_one() -> None:
    rows = [cell("parley", 64, 5) | {"loop": loop} for loop in ("closed", "open, 2.0 a second")]
    _, _, header, _, *lines = throughput_table(rows, "fixed").splitlines()
    column = [cell_.strip() for cell_ in header.split("|")].index("loop")
    assert [line.split("|")[column].strip() for line in lines] == ["closed", "open, 2.0 a second"]


def test_ratios_are_taken_round_by_round() -> None:
    assert ratio([100, 50, 10], [50, 25, 20]) == 2


def test_percentiles_are_values_that_were_seen() -> None:
    assert [percentile([3, 1, 2], percent) for percent in (0, 50, 100)] == [1, 2, 3]


def test_tokens_of_one_message_share_its_time_and_a_short_answer_is_an_error() -> None:
    run = Run()
    clock = Clock(run)
    clock.saw(1)
    clock.saw(4)
    assert len(run.first_token_s) == 1 and len(run.between_tokens_s) == 4 and len(set(run.between_tokens_s)) == 1
    clock.ended(6)
    assert run.num_answers == 0 and run.errors == ["5 tokens instead of 6"]


class NeverBegins:
    """A server that answers nobody."""

    async def stream(self, request: workload.Request) -> AsyncIterator[int]:
        await asyncio.Event().wait()
        yield 1

    async def close(self) -> None: ...


async def test_who_waits_for_a_first_token_when_the_time_is_over_has_waited_so_long() -> None:
    run = await closed_loop(NeverBegins(), workload.fixed(0, 4, 8), 2, limit_s=0.05)
    assert run.is_cut and len(run.cut_first_token_s) == 2 and min(run.cut_first_token_s) > 0.04
    assert summarise({"concurrency": 2}, [run])["ttft_p50_ms"] > 40


def test_a_wait_that_was_cut_off_early_tells_nothing() -> None:
    run = Run(first_token_s=[1.0, 2.0, 3.0], cut_first_token_s=[0.5, 10.0, 10.0])
    assert summarise({"concurrency": 2}, [run])["ttft_curve_ms"][-1] == [100, 10_000]
    assert summarise({"concurrency": 2}, [run])["ttft_p50_rounds_ms"] == [3000]


def test_workloads_are_seeded_and_no_two_prompts_alike() -> None:
    assert workload.mixed(3, 50) == workload.mixed(3, 50) != workload.mixed(4, 50)
    assert len({request.messages for request in workload.fixed(0, 1000, 8)}) == 1000
    arrivals = [request.arrival_s for request in workload.poisson(0, workload.fixed(0, 2000, 8), 50.0)]
    assert arrivals == sorted(arrivals) and 35 < arrivals[-1] < 45
    cold, shared = (workload.shared_prefix(0, 16, 4, is_shared=value) for value in (False, True))
    assert [len({request.messages[0] for request in requests}) for requests in (cold, shared)] == [16, 1]


def test_no_prompt_begins_like_another_that_the_same_servers_are_asked() -> None:
    makers = [maker("fixed", concurrency, 2 * concurrency, 8) for concurrency in (1, 4, 16, 64)]
    asked = [request for make in makers for round_ in range(3) for request in make(round_)]
    # A block of 32 tokens holds so many words behind the default system prompt and before its end.
    beginnings = {tuple(request.messages[0][1].split()[:5]) for request in asked}
    assert len({request.messages for request in asked}) == len(asked) and len(beginnings) > 0.99 * len(asked)


def test_mixed_prompts_go_from_16_tokens_to_1500_and_no_two_are_alike() -> None:
    requests = workload.mixed(0, 3000)
    lengths = [num_tokens(request) for request in requests]
    assert (min(lengths), max(lengths)) == (16, 1500)
    assert len({request.messages for request in requests}) == 3000


@pytest.mark.parametrize("prompt_tokens", [16, 17, 43, 44, 64, 1000])
def test_prompts_have_the_length_that_is_asked_for(prompt_tokens: int) -> None:
    assert {num_tokens(one) for one in workload.fixed(0, 20, 8, prompt_tokens)} == {prompt_tokens}


def num_tokens(request: workload.Request) -> int:
    """In the embedded model's chat template, where a word with a space or a line's end before it is one token.

    22 of the default system prompt or 5 around another, 5 around the question and 3 before the answer; one is the colon
    of the question, and one the line's end behind the first message.
    """
    has_system = request.messages[0][0] == "system"
    words = " ".join(content.replace(":", " :") for _, content in request.messages).split()
    return (6 if has_system else 22) + 5 + 3 + len(words)
