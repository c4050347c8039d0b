"""Engine `generate` on a tiny random model: the oracle's ids, its order, its draws, its cancellation."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from parleyd.engine.generate import GenerateEngine
from parleyd.generation import EngineRequest, EngineStats, FinishReason, Output, SamplingParams
from tests.support.tiny_models import run

VOCAB_SIZE, CONTEXT, EOS = 97, 128, 3
PROMPT = (5, 17, 42, 8, 13)


@pytest.fixture(scope="module")
def make_model() -> Callable[[], LlamaForCausalLM]:
    def make() -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=CONTEXT, eos_token_id=EOS, pad_token_id=0,
            initializer_range=0.4,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture
def engine(make_model: Callable[[], LlamaForCausalLM]) -> GenerateEngine:
    return GenerateEngine(make_model(), (EOS,), CONTEXT)


def request(
    key: int = 1, prompt: tuple[int, ...] = PROMPT, output: tuple[int, ...] = (), **params: object
) -> EngineRequest:
    sampling = SamplingParams(**{"max_new_tokens": 20, **params})  # type: ignore[arg-type]
    return EngineRequest(key=key, prompt_ids=prompt, output_ids=output, params=sampling)


def oracle(model: LlamaForCausalLM, prompt: tuple[int, ...], **config: object) -> list[int]:
    inputs = torch.tensor([prompt])
    sequences = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), generation_config=GenerationConfig(pad_token_id=0, **config)
    )
    return sequences[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("prompt", [PROMPT, (1,), (5, 0, 42), tuple(range(4, 60))])
def test_greedy_ids_are_those_of_model_generate(
    make_model: Callable[[], LlamaForCausalLM], engine: GenerateEngine, prompt: tuple[int, ...], penalty: float
) -> None:
    expected = oracle(make_model(), prompt, max_new_tokens=20, eos_token_id=EOS, repetition_penalty=penalty)
    assert run(engine, request(prompt=prompt, repetition_penalty=penalty))[1] == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [("prompt_lookup_num_tokens", 3), ("assistant_early_exit", 1), ("penalty_alpha", 0.6), ("token_healing", True),
     ("guidance_scale", 3.0)],
)  # fmt: skip
def test_search_methods_of_the_models_own_give_way(
    make_model: Callable[[], LlamaForCausalLM], name: str, value: object
) -> None:
    model = make_model()
    setattr(model.generation_config, name, value)
    prompt = PROMPT * 4  # something to look up
    expected = oracle(make_model(), prompt, max_new_tokens=20, eos_token_id=EOS)
    assert run(GenerateEngine(model, (EOS,), CONTEXT), request(prompt=prompt))[1] == expected


def test_the_stats_tell_who_runs_and_who_waits(make_model: Callable[[], LlamaForCausalLM]) -> None:
    model = make_model()
    entered, go_on = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        entered.set()
        assert go_on.wait(10)

    model.register_forward_pre_hook(hold)
    engine = GenerateEngine(model, (), CONTEXT)
    assert (engine.stats().num_running, engine.stats().num_waiting) == (0, 0)
    for key in range(3):
        engine.submit(request(key, max_new_tokens=1))
    assert entered.wait(10)
    assert (engine.stats().num_running, engine.stats().num_waiting) == (1, 2)
    go_on.set()


def test_the_stats_count_tokens_and_no_request_that_has_ended(engine: GenerateEngine) -> None:
    run(engine, request(ignore_eos=True))
    engine._executor.submit(lambda: None).result()
    assert engine.stats() == EngineStats(num_prompt_tokens=len(PROMPT), num_generated_tokens=20)


def test_requests_are_taken_in_order(engine: GenerateEngine) -> None:
    keys = [7, 3, 9]
    for key in keys:
        engine.submit(request(key, ignore_eos=True, max_new_tokens=3))
    seen: list[int] = []
    while len(seen) < 9:
        seen += [output.key for output in engine.step()]
    assert seen == [7, 7, 7, 3, 3, 3, 9, 9, 9]


def test_the_last_output_tells_why(engine: GenerateEngine) -> None:
    engine.submit(request(max_new_tokens=2, ignore_eos=True))
    outputs: list[Output] = []
    while len(outputs) < 2:
        outputs += engine.step()
    assert [output.finish_reason for output in outputs] == [None, FinishReason.LENGTH]
    first_id = outputs[0].token_ids[0]
    engine.submit(request(stop_token_ids=(first_id,)))
    (output,) = engine.step()
    assert (output.token_ids, output.finish_reason) == ((first_id,), FinishReason.STOP)


def test_an_answer_ends_where_the_context_ends(engine: GenerateEngine) -> None:
    prompt = tuple(i % 90 + 5 for i in range(CONTEXT - 4))
    assert len(run(engine, request(prompt=prompt, max_new_tokens=100, ignore_eos=True))[1]) == 4


def test_the_same_seed_gives_the_same_draws_whatever_ran_before(engine: GenerateEngine) -> None:
    sampled = {"do_sample": True, "temperature": 1.5, "seed": 11, "ignore_eos": True}
    alone = run(engine, request(**sampled))[1]
    torch.rand(5)
    assert run(engine, request(2, seed=5, do_sample=True), request(1, **sampled))[1] == alone
    assert run(engine, request(**{**sampled, "seed": 12}))[1] != alone


def test_draws_depend_on_the_position_so_that_a_sequence_can_be_taken_up(engine: GenerateEngine) -> None:
    sampled = {"do_sample": True, "temperature": 1.5, "seed": 11, "ignore_eos": True, "repetition_penalty": 1.2}
    whole = run(engine, request(**sampled))[1]
    for cut in (1, 7, 19):
        assert run(engine, request(output=tuple(whole[:cut]), **sampled))[1] == whole[cut:]


def test_each_position_has_a_draw_of_its_own(engine: GenerateEngine) -> None:
    ids = run(engine, request(do_sample=True, temperature=100.0, seed=11, ignore_eos=True))[1]
    assert len(set(ids)) > len(ids) / 2  # each id is about as likely as any other


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("begin_suppress_tokens", list(range(VOCAB_SIZE // 2))), ("exponential_decay_length_penalty", (2, 1.2)),
        ("encoder_repetition_penalty", 3.0), ("encoder_no_repeat_ngram_size", 1),
    ],
)  # fmt: skip
def test_what_a_model_asks_by_position_or_prompt_is_the_same_where_a_sequence_is_taken_up(
    make_model: Callable[[], LlamaForCausalLM], name: str, value: object
) -> None:
    model = make_model()
    setattr(model.generation_config, name, value)
    engine = GenerateEngine(model, (EOS,), CONTEXT)
    for prompt in (PROMPT, (1,)):
        whole = run(engine, request(prompt=prompt))[1]
        for cut in (1, len(whole) - 1):
            assert run(engine, request(prompt=prompt, output=tuple(whole[:cut])))[1] == whole[cut:]


def test_draws_follow_the_models_distribution(
    make_model: Callable[[], LlamaForCausalLM], engine: GenerateEngine
) -> None:
    with torch.no_grad():
        logits = make_model()(torch.tensor([PROMPT])).logits[0, -1]
    expected = torch.softmax(logits / 2.0, -1)
    num_draws = 800
    draws = run(
        engine, *(request(i, do_sample=True, temperature=2.0, seed=i, max_new_tokens=1) for i in range(num_draws))
    )
    counts = torch.bincount(torch.tensor([ids[0] for ids in draws.values()]), minlength=VOCAB_SIZE)
    likely = expected * num_draws >= 5
    chi2 = ((counts - expected * num_draws) ** 2 / (expected * num_draws))[likely].sum()
    degrees = int(likely.sum())
    assert degrees > 10
    assert chi2 < degrees + 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-30}])
def test_the_narrowest_sampling_is_greedy(engine: GenerateEngine, params: dict[str, float]) -> None:
    greedy = run(engine, request(ignore_eos=True))[1]
    assert run(engine, request(do_sample=True, seed=3, ignore_eos=True, **params))[1] == greedy


def test_the_tiniest_repetition_penalty_fails_nothing(engine: GenerateEngine) -> None:
    assert run(engine, request(do_sample=True, repetition_penalty=1e-38, temperature=1e-38, ignore_eos=True))[1]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_end_tokens_and_stop_ids_cannot_be_drawn_before_min_new_tokens(
    engine: GenerateEngine, ignore_eos: bool
) -> None:
    everything = tuple(i for i in range(40, 90))
    ids = run(
        engine,
        request(stop_token_ids=everything, min_new_tokens=10, max_new_tokens=12, ignore_eos=ignore_eos, do_sample=True),
    )[1]
    assert not {*everything, EOS} & set(ids[:10])


@pytest.mark.parametrize("do_sample", [False, True])
def test_what_a_model_asks_of_logits_gives_way_to_min_new_tokens(
    make_model: Callable[[], LlamaForCausalLM], do_sample: bool
) -> None:
    model = make_model()
    model.generation_config.suppress_tokens = [i for i in range(VOCAB_SIZE) if i != EOS]
    engine = GenerateEngine(model, (EOS,), CONTEXT)
    (*before, last) = run(engine, request(min_new_tokens=3, max_new_tokens=4, do_sample=do_sample))[1]
    assert len(before) == 3 and EOS not in before and last == EOS


def test_ignore_eos_goes_past_the_end_token(make_model: Callable[[], LlamaForCausalLM]) -> None:
    first = run(GenerateEngine(make_model(), (), CONTEXT), request())[1][0]
    engine = GenerateEngine(make_model(), (first,), CONTEXT)
    assert run(engine, request())[1] == [first]
    assert len(run(engine, request(ignore_eos=True))[1]) == 20


def test_a_models_pull_towards_its_end_gives_way_where_nothing_ends_the_answer(
    make_model: Callable[[], LlamaForCausalLM],
) -> None:
    expected = run(GenerateEngine(make_model(), (EOS,), CONTEXT), request(ignore_eos=True))[1]
    model = make_model()
    model.generation_config.exponential_decay_length_penalty = (2, 1.5)
    assert run(GenerateEngine(model, (EOS,), CONTEXT), request(ignore_eos=True))[1] == expected


def test_an_abort_ends_the_sequence_within_one_token(make_model: Callable[[], LlamaForCausalLM]) -> None:
    model = make_model()
    forwards: list[int] = []
    reached, go_on = threading.Event(), threading.Event()

    def count(*_: object) -> None:
        forwards.append(1)
        if len(forwards) == 3:
            reached.set()
            assert go_on.wait(10)

    model.register_forward_pre_hook(count)
    engine = GenerateEngine(model, (), CONTEXT)
    engine.submit(request(1, max_new_tokens=100))
    assert reached.wait(10)
    engine.abort(1)
    go_on.set()
    engine.submit(request(2, max_new_tokens=1))
    while not any(output.key == 2 for output in engine.step()):
        pass
    assert len(forwards) == 3 + 1  # the aborted one's third, then the next request's first


def test_an_abort_ends_a_prefill_before_its_next_layer(make_model: Callable[[], LlamaForCausalLM]) -> None:
    model = make_model()
    entered, go_on, layers = threading.Event(), threading.Event(), []
    engine = GenerateEngine(model, (), CONTEXT)

    def hold(layer: object, *_: object) -> None:
        layers.append(layer)
        entered.set()
        assert go_on.wait(10)

    for layer in model.model.layers:
        layer.register_forward_pre_hook(hold)
    engine.submit(request(1, prompt=tuple(range(4, 90)), max_new_tokens=30))
    assert entered.wait(10)
    engine.abort(1)
    go_on.set()
    engine.submit(request(2, max_new_tokens=1))
    while not any(output.key == 2 for output in engine.step()):
        pass
    assert len(layers) == 1 + 2  # one of the aborted prefill, both of the next request


def test_an_abort_after_the_last_layer_ends_the_sequence_before_its_next_token(
    make_model: Callable[[], LlamaForCausalLM],
) -> None:
    model = make_model()
    engine = GenerateEngine(model, (), CONTEXT)
    model.lm_head.register_forward_pre_hook(lambda *_: engine.abort(1))
    engine.submit(request(1))
    engine.submit(request(2, max_new_tokens=1))
    assert [output.key for output in engine.step()] == [2]


def test_an_aborted_request_that_has_not_begun_never_begins(engine: GenerateEngine) -> None:
    engine.submit(request(1, max_new_tokens=30, ignore_eos=True))
    engine.submit(request(2, max_new_tokens=30, ignore_eos=True))
    engine.abort(2)
    engine.abort(99)
    engine.submit(request(3, max_new_tokens=1))
    keys: list[int] = []
    while 3 not in keys:
        keys += [output.key for output in engine.step()]
    assert 2 not in keys


def test_a_request_makes_progress_at_each_layer_and_at_its_end(engine: GenerateEngine) -> None:
    progress = engine.progress
    run(engine, request(max_new_tokens=1))
    engine._executor.submit(lambda: None).result()
    assert engine.progress == progress + 2 + 1


def test_progress_tells_also_of_a_request_that_was_aborted_before_it_began(engine: GenerateEngine) -> None:
    go_on = threading.Event()
    engine._executor.submit(go_on.wait)  # as if another were being generated
    progress = engine.progress
    engine.submit(request(1))
    engine.abort(1)
    go_on.set()
    engine._executor.submit(lambda: None).result()
    assert engine.progress == progress + 1


def test_a_request_that_fails_fails_alone(engine: GenerateEngine) -> None:
    engine.submit(request(1, prompt=(VOCAB_SIZE + 5,)))
    (output,) = engine.step()
    assert output.is_last and output.error
    assert run(engine, request(2))[2]


def test_a_device_that_breaks_ends_the_engine(make_model: Callable[[], LlamaForCausalLM]) -> None:
    def broken(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    model = make_model()
    model.register_forward_pre_hook(broken)
    engine = GenerateEngine(model, (EOS,), CONTEXT)
    engine.submit(request())
    with pytest.raises(torch.AcceleratorError):
        engine.step()


def test_the_models_own_defaults_for_what_requests_govern_do_not_leak(
    make_model: Callable[[], LlamaForCausalLM],
) -> None:
    model = make_model()
    expected = oracle(make_model(), PROMPT, max_new_tokens=20)
    model.generation_config = GenerationConfig(
        max_length=7, do_sample=True, temperature=0.1, top_k=3, repetition_penalty=5.0, eos_token_id=[expected[2]]
    )
    assert run(GenerateEngine(model, (), CONTEXT), request())[1] == expected
