"""Answers under a grammar, from the whole engine over random logits and a vocabulary of bytes."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from parleyd.engine.batching import BatchingEngine
from parleyd.engine.generate import GenerateEngine
from parleyd.generation import FinishReason, ModelInfo
from parleyd.grammar import state as state_module
from parleyd.grammar.compiler import GrammarError, UnknownTokenizer, compile_grammar
from parleyd.grammar.formats import to_grammar
from parleyd.grammar.state import GrammarCompiler
from parleyd.sampling.draws import first_argmax
from parleyd.sampling.grammar_mask import mask_by_grammar
from parleyd.sampling.sampler import sample
from parleyd.sampling.sampling_row import SamplingRow
from parleyd.scheduling.kv_cache import KVLedger
from parleyd.scheduling.scheduler import Scheduler
from tests.support import tiny_tokenizer
from tests.support.random_engine import Answer, ask_engine, info_of, make_random_engine, run_all
from tests.support.tiny_models import CONTEXT, make_model

EOS, VOCAB_SIZE = tiny_tokenizer.IM_END_ID, tiny_tokenizer.VOCAB_SIZE
LIKELY = (*b'"}],:0', EOS)


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    folder = tiny_tokenizer.write_tiny_tokenizer(tmp_path_factory.mktemp("bytes"))
    return info_of(str(folder), VOCAB_SIZE, (EOS,))


@pytest.fixture(params=[False, True], ids=["one step at a time", "a step launched ahead"])
def engine(request: pytest.FixtureRequest, info: ModelInfo) -> BatchingEngine:
    return make_random_engine(info, LIKELY, overlap=request.param)


def text_of(answer: Answer) -> str:
    return bytes(i for i in answer.token_ids if i < tiny_tokenizer.NUM_BYTES).decode()


@pytest.mark.parametrize(
    ("kind", "source", "pattern"),
    [
        ("regex", "[a-c]{2,4}(-[0-9]+)?", "[a-c]{2,4}(-[0-9]+)?"),
        ("regex", "é+|日本", "é+|日本"),
        ("choice", json.dumps(["yes", "no", 'a "quoted"\n| word', "\0"]), 'yes|no|a "quoted"\n\\| word|\0'),
        ("grammar", 'root ::= item+\nitem ::= "- " [^\\n]{1,4} "\\n"', "(- [^\n]{1,4}\n)+"),
        ("grammar", 'root ::= whole "c"\nwhole ::= [a-c]+', "[a-c]+c"),
        ("grammar", 'root ::= "\\u00e9" [\\u4e00-\\u4e10] [a\\-]', "é[一-丐][a-]"),
    ],
)
def test_every_answer_that_ends_matches_as_a_whole(
    engine: BatchingEngine, kind: str, source: str, pattern: str
) -> None:
    grammar = to_grammar(kind, source)
    answers = run_all(engine, [ask_engine(key, grammar) for key in range(16)]).values()
    ended = [text_of(answer) for answer in answers if answer.finish_reason is FinishReason.STOP]
    assert ended
    assert [text for text in ended if not re.fullmatch(pattern, text)] == []


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("root ::= . .", "a\n"),
        ("root ::= [b-d&&c~~]{5}", "bd&~c"),
        ('root ::= "\\[\\]\t\n" [\t\n]', "[]\t\n\t"),
    ],
)
def test_what_gbnf_means_for_itself_is_allowed(engine: BatchingEngine, source: str, text: str) -> None:
    answer = run_all(engine, [ask_engine(0, to_grammar("grammar", source), (*text.encode(),), max_new_tokens=6)])[0]
    assert answer.grammar_error is None and answer.token_ids[-1] == EOS


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": '^[^"]x$'},
        {"type": "string", "pattern": '^[^]"]x$'},
        {"type": "string", "pattern": '^[^-"]x$'},
        {"type": "string", "pattern": '^[^--/"]x$'},
        {"$ref": "#/$defs/const", "$defs": {"const": {"type": "string", "pattern": r'^[^\d"\n]x$'}}},
        {"anyOf": [{"type": "string", "pattern": '^[^"]x$'}, {"type": "null"}]},
        {"type": "object", "patternProperties": {'^[^"]x$': {}}, "additionalProperties": False},
    ],
)
def test_what_a_class_of_a_pattern_leaves_out_is_not_allowed(engine: BatchingEngine, schema: dict[str, Any]) -> None:
    grammar = to_grammar("json_schema", json.dumps(schema))
    texts = ['"ax"', '"éx"', '"\\tx"', '"\\"x"']
    if "patternProperties" in schema:
        texts = [f"{{{name}: 1}}" for name in texts]
    answers = run_all(engine, [ask_engine(key, grammar, (*text.encode(),)) for key, text in enumerate(texts)])
    assert [answers[key].grammar_error is None for key in range(4)] == [True, True, True, False]


def test_what_looks_like_a_pattern_in_a_constant_stays_as_it_is(engine: BatchingEngine) -> None:
    text = '{"pattern": "[^a]"}'
    grammar = to_grammar("json_schema", f'{{"enum": [{text}]}}')
    answer = run_all(engine, [ask_engine(0, grammar, (*text.encode(),))])[0]
    assert (answer.grammar_error, answer.token_ids) == (None, [EOS])


@pytest.mark.parametrize("text", ["<|im_end|>", "a<|im_start|>b", "<|im_end|><|endoftext|>"])
def test_text_that_spells_a_special_token_is_written_as_text(engine: BatchingEngine, text: str) -> None:
    answer = run_all(engine, [ask_engine(0, to_grammar("choice", json.dumps([text])))])[0]
    assert (answer.token_ids, answer.finish_reason) == ([*text.encode(), EOS], FinishReason.STOP)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(("field", "value"), [("no_repeat_ngram_size", 2), ("suppress_tokens", [ord("a")])])
def test_what_a_model_asks_of_logits_gives_way_to_a_grammar(
    info: ModelInfo, field: str, value: object, do_sample: bool
) -> None:
    model = make_model("Llama", vocab_size=VOCAB_SIZE)
    setattr(model.generation_config, field, value)
    engine = GenerateEngine(model, (EOS,), CONTEXT, GrammarCompiler(info))
    asked = ask_engine(0, to_grammar("choice", '["aaaa"]'), do_sample=do_sample, logprobs=True)
    answer = run_all(engine, [asked])[0]
    assert (answer.token_ids, answer.finish_reason) == ([*b"aaaa", EOS], FinishReason.STOP)
    assert max(one.logprob for one in answer.logprobs) < -1  # of the model's own distribution, not of what is left


def test_in_engine_generate_a_grammars_end_is_one_under_ignore_eos_and_one_that_cannot_be_followed_fails(
    info: ModelInfo,
) -> None:
    engine = GenerateEngine(make_model("Llama", vocab_size=VOCAB_SIZE), (EOS,), CONTEXT, GrammarCompiler(info))
    fine, hostile = to_grammar("choice", '["fine"]'), to_grammar("regex", "(a{1000}){1000}")
    answers = run_all(engine, [ask_engine(0, fine, ignore_eos=True), ask_engine(1, hostile)])
    assert (answers[0].token_ids, answers[0].finish_reason) == ([*b"fine", EOS], FinishReason.STOP)
    assert "cannot be followed" in (answers[1].grammar_error or "")


def test_json_object_is_an_object_with_any_members(engine: BatchingEngine) -> None:
    grammar = to_grammar("json_object", "")
    answers = run_all(engine, [ask_engine(key, grammar) for key in range(16)]).values()
    ended = [json.loads(text_of(answer)) for answer in answers if answer.finish_reason is FinishReason.STOP]
    assert ended
    assert all(isinstance(value, dict) for value in ended)


def test_a_line_of_json_is_indented_by_forty_blanks_at_most(engine: BatchingEngine) -> None:
    grammar = to_grammar("json_object", "")
    answers = run_all(engine, [ask_engine(num, grammar, (*b"{\n", *b" " * num)) for num in (40, 41)])
    assert [answers[num].grammar_error is None for num in (40, 41)] == [True, False]


def test_the_end_token_ends_a_finished_grammar_even_under_ignore_eos_and_min_new_tokens(
    engine: BatchingEngine,
) -> None:
    grammar = to_grammar("choice", '["ok"]')
    requests = [
        ask_engine(0, grammar),
        ask_engine(1, grammar, ignore_eos=True),
        ask_engine(2, grammar, min_new_tokens=9),
    ]
    for answer in run_all(engine, requests).values():
        assert (answer.token_ids, answer.finish_reason) == ([*b"ok", EOS], FinishReason.STOP)


def test_where_more_is_allowed_ignore_eos_and_min_new_tokens_put_the_end_off(engine: BatchingEngine) -> None:
    grammar = to_grammar("regex", "[a-z]*")
    requests = [
        ask_engine(0, grammar, ignore_eos=True, max_new_tokens=30),
        ask_engine(1, grammar, min_new_tokens=20, max_new_tokens=100),
    ]
    answers = run_all(engine, requests)
    ignoring, long = answers[0], answers[1]
    assert (len(ignoring.token_ids), ignoring.finish_reason) == (30, FinishReason.LENGTH)
    assert EOS not in long.token_ids[:20]
    assert (long.token_ids[-1], long.finish_reason) == (EOS, FinishReason.STOP)


def test_ids_that_are_there_already_count_towards_min_new_tokens(engine: BatchingEngine) -> None:
    request = ask_engine(0, to_grammar("regex", "a*"), (*b"aaa",), min_new_tokens=3, logit_bias=((EOS, 100.0),))
    assert run_all(engine, [request])[0].token_ids == [EOS]


def test_stop_ids_are_drawn_only_where_the_grammar_allows_an_end(engine: BatchingEngine) -> None:
    grammar = to_grammar("regex", "x{3}|x{6}")
    for answer in run_all(engine, [ask_engine(k, grammar, stop_token_ids=(ord("}"),)) for k in range(16)]).values():
        *text, end = answer.token_ids
        assert text in ([*b"xxx"], [*b"xxxxxx"])
        assert end in (EOS, ord("}"))


def test_a_grammar_whose_only_next_token_is_a_stop_id_ends_instead_of_hanging(engine: BatchingEngine) -> None:
    answer = run_all(engine, [ask_engine(0, to_grammar("choice", '["ab"]'), stop_token_ids=(ord("b"),))])[0]
    assert (answer.token_ids, answer.finish_reason) == ([ord("a"), EOS], FinishReason.STOP)


def test_length_cuts_an_answer_short(engine: BatchingEngine) -> None:
    answer = run_all(engine, [ask_engine(0, to_grammar("regex", "x{50}"), max_new_tokens=7)])[0]
    assert (answer.token_ids, answer.finish_reason) == ([*b"xxxxxxx"], FinishReason.LENGTH)


def test_every_sampling_parameter_applies_on_top(engine: BatchingEngine) -> None:
    grammar = to_grammar("regex", "[ab]{8}")
    some = {"do_sample": True, "temperature": 9.0, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.5}
    requests = [
        ask_engine(0, grammar, logit_bias=((ord("a"), 100.0), (ord("z"), 100.0))),
        ask_engine(1, grammar, logit_bias=((ord("a"), -100.0), (EOS, 100.0))),
        *(ask_engine(2 + seed, grammar, seed=seed, **some) for seed in range(8)),
    ]
    answers = run_all(engine, requests)
    assert text_of(answers[0]) == "aaaaaaaa"
    assert text_of(answers[1]) == "bbbbbbbb"
    assert all(re.fullmatch("[ab]{8}", text_of(answers[2 + seed])) for seed in range(8))


def test_a_resumed_answer_goes_on_from_its_ids_and_ids_that_the_grammar_forbids_are_refused(
    engine: BatchingEngine,
) -> None:
    grammar = to_grammar("choice", '["alpha", "beta"]')
    answers = run_all(engine, [ask_engine(0, grammar, tuple(b"be")), ask_engine(1, grammar, tuple(b"bx"))])
    assert (text_of(answers[0]), answers[0].finish_reason) == ("ta", FinishReason.STOP)
    assert (answers[1].token_ids, answers[1].finish_reason) == ([], None)
    assert "does not allow" in (answers[1].grammar_error or "")


@pytest.mark.parametrize("overlap", [False, True])
def test_preempted_sequences_keep_their_place_in_the_grammar(info: ModelInfo, overlap: bool) -> None:
    engine = make_random_engine(info, num_blocks=64, overlap=overlap)
    grammar = to_grammar("regex", "(abcdefghij){20}")
    answers = run_all(engine, [ask_engine(key, grammar, max_new_tokens=300) for key in range(12)])
    assert engine.stats().num_preemptions > 0
    assert {text_of(answer) for answer in answers.values()} == {"abcdefghij" * 20}


def test_a_grammar_that_cannot_be_followed_fails_alone(engine: BatchingEngine) -> None:
    hostile, fine = to_grammar("regex", "(a{1000}){1000}"), to_grammar("choice", '["fine"]')
    answers = run_all(engine, [ask_engine(0, hostile), ask_engine(1, fine)])
    assert "cannot be followed" in (answers[0].grammar_error or "")
    assert text_of(answers[1]) == "fine"


def test_a_request_that_is_aborted_while_its_grammar_compiles_never_runs(engine: BatchingEngine) -> None:
    engine.submit(ask_engine(0, to_grammar("regex", "[a-z]*")))
    engine.abort(0)
    answers = run_all(engine, [ask_engine(1, to_grammar("choice", '["ok"]'))])
    assert set(answers) == {1}
    assert engine.stats().num_running == engine.stats().num_waiting == 0


def test_an_abort_at_the_moment_that_a_grammar_is_compiled_ends_the_request_alone(engine: BatchingEngine) -> None:
    class Compiling(set[int]):
        def __contains__(self, key: object) -> bool:
            found = super().__contains__(key)
            if key == 0 and found:
                engine.abort(0)  # as the thread that receives does
            return found

    engine._compiling = Compiling()
    engine.submit(ask_engine(0, to_grammar("regex", "[a-z]*")))
    answers = run_all(engine, [ask_engine(1, to_grammar("choice", '["ok"]'))])
    assert text_of(answers[1]) == "ok"
    assert engine.stats().num_running == engine.stats().num_waiting == 0


def test_a_sequence_with_a_grammar_is_not_scheduled_ahead_of_its_id(info: ModelInfo) -> None:
    scheduler = Scheduler(KVLedger(64, 16), max_running=4, max_batch_tokens=64, max_context_tokens=256)
    grammar = to_grammar("regex", "[a-z]*")
    request = ask_engine(0, grammar)
    scheduler.submit(request, GrammarCompiler(info).start(request).result())
    first = scheduler.schedule()
    assert first is not None and first.num_samples == 1
    assert scheduler.schedule() is None
    scheduler.commit(first, [ord("a")])
    assert scheduler.schedule() is not None


def test_rows_without_a_grammar_and_log_probabilities_are_as_they_would_be_without(info: ModelInfo) -> None:
    steered = ask_engine(0, to_grammar("choice", '["z"]'), logprobs=True, top_logprobs=3)
    free = ask_engine(1, "", logprobs=True)
    state = GrammarCompiler(info).start(steered).result()
    rows = [SamplingRow(steered.params, (1, 2, 3), 3, 0, state), SamplingRow(free.params, (1, 2, 3), 3, 0)]
    logits = torch.randn(2, VOCAB_SIZE)
    before = logits.clone()
    sampled = sample(logits, rows, torch.tensor([3, 3]), (EOS,))
    assert torch.equal(logits, before)
    assert sampled.token_ids.tolist() == [ord("z"), int(first_argmax(logits[1:]))]
    assert sampled.logprobs is not None
    expected = logits.log_softmax(-1)[[0, 1], sampled.token_ids]
    torch.testing.assert_close(sampled.logprobs.token_logprobs, expected)


AMBIGUOUS = to_grammar("grammar", 'root ::= s\ns ::= "a" | s s')


def test_a_grammar_that_takes_ever_longer_ends_its_own_answer_alone(engine: BatchingEngine) -> None:
    requests = [
        ask_engine(0, AMBIGUOUS, min_new_tokens=2000, max_new_tokens=2000),
        ask_engine(1, to_grammar("regex", "[a-z]*"), min_new_tokens=20, max_new_tokens=20),
    ]
    answers = run_all(engine, requests)
    assert "takes too long to follow" in answers[0].grammar_error
    assert len(answers[1].token_ids) == 20


def test_ids_that_take_too_long_to_replay_are_refused(info: ModelInfo) -> None:
    request = replace(ask_engine(0, AMBIGUOUS), output_ids=tuple(b"a" * 2000))
    with pytest.raises(GrammarError, match="takes too long to follow"):
        GrammarCompiler(info).start(request).result()


def test_a_tokenizer_that_could_not_be_read_is_read_again(info: ModelInfo, tmp_path: Path) -> None:
    compiler = GrammarCompiler(replace(info, tokenizer_dir=str(tmp_path)))
    request = ask_engine(0, to_grammar("regex", "[a-c]*"))
    with pytest.raises(UnknownTokenizer):
        compiler.start(request).result()
    shutil.copy(Path(info.tokenizer_dir) / "tokenizer.json", tmp_path)
    assert compiler.start(request).result()


def test_whoever_learns_that_nothing_could_be_compiled_may_ask_again_at_once(
    info: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = GrammarCompiler(info)
    tokenizer: Future[Any] = Future()
    compiled: Future[Any] = Future()
    monkeypatch.setattr(compiler, "_compile", lambda _: (tokenizer, compiled))
    tokenizer.set_exception(UnknownTokenizer("no file"))
    state = compiler.start(ask_engine(0, "a grammar"))
    compiled.set_exception(UnknownTokenizer("no tokenizer"))
    # What fails last tells: until it has failed, whoever asked again would be given it.
    with pytest.raises(UnknownTokenizer, match="no tokenizer"):
        state.result()


def test_the_grammar_that_was_used_last_is_kept_longest(info: ModelInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def compile_one(tokenizer: Any, grammar: str) -> Any:
        made.append(grammar)
        return compile_grammar(tokenizer, grammar)

    monkeypatch.setattr(state_module, "_MAX_CACHED", 2)
    monkeypatch.setattr(state_module, "compile_grammar", compile_one)
    compiler = GrammarCompiler(info)
    first, second, third = (to_grammar("regex", text) for text in "abc")
    for grammar in (first, second, first, third, first, second):
        compiler.start(ask_engine(0, grammar)).result()
    assert made == [first, second, third, second]


def test_a_grammar_that_cannot_be_compiled_for_a_fault_of_ours_fails_its_own_request(
    info: ModelInfo, tmp_path: Path
) -> None:
    engine = make_random_engine(replace(info, tokenizer_dir=str(tmp_path)), LIKELY)
    engine.submit(ask_engine(0, to_grammar("regex", "[a-c]*")))
    (output,) = engine.step()
    assert output.key == 0 and output.grammar_error is None and "UnknownTokenizer" in (output.error or "")


def test_a_mask_is_of_the_bits_it_is_made_from(info: ModelInfo) -> None:
    request = ask_engine(0, to_grammar("regex", "[a-c]*"))
    state = GrammarCompiler(info).start(request).result()
    masked = torch.zeros(1, VOCAB_SIZE)
    mask_by_grammar(masked, {0: state})
    assert masked[0].isfinite().nonzero()[:, 0].tolist() == [*b"abc", EOS]
