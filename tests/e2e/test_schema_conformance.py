"""Answers under JSON Schemas, held against `jsonschema`: random ids of the embedded model's own tokenizer.

The schemas: a public test suite's, where it is there, and generated ones.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer

from parleyd.config import ModelSettings
from parleyd.engine.batching import BatchingEngine
from parleyd.generation import EngineRequest, FinishReason, ModelInfo
from parleyd.grammar.checker import check
from parleyd.grammar.compiler import Clock, compile_grammar, load_tokenizer, replay
from parleyd.ipc.messages import CheckGrammar
from parleyd.model.source import find_folder
from tests.support.random_engine import ask_engine, info_of, make_random_engine, run_all
from tests.support.random_schemas import random_schema

EOS, VOCAB_SIZE = 2, 49152
_BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data" / "json-schema-test-suite"
SUITE = Path(os.environ.get("JSON_SCHEMA_TEST_SUITE", _BESIDE))

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def folder() -> str:
    return str(find_folder(ModelSettings()))


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.from_file(f"{folder}/tokenizer.json")


@pytest.fixture(scope="module")
def info(folder: str) -> ModelInfo:
    return info_of(folder, VOCAB_SIZE, (EOS,))


@pytest.fixture(scope="module")
def engine(info: ModelInfo, tokenizer: Tokenizer) -> BatchingEngine:
    # Without these being likelier, hardly a string or a list would ever end.
    closing = [i for token, i in tokenizer.get_vocab().items() if set(token) <= set('"}],:0123456789')]
    return make_random_engine(info, [*closing, EOS])


def grammar_of(info: ModelInfo, schema: Any) -> tuple[str, str]:
    checked = check(CheckGrammar(info, "json_schema", json.dumps(schema)))
    return checked.grammar, checked.error


def invalid_answers(
    engine: BatchingEngine, tokenizer: Tokenizer, schemas: list[Any], requests: list[EngineRequest]
) -> tuple[int, list[tuple[Any, str]]]:
    """How many answers ended, and those of them that are not valid. Request i is for schema i, modulo their number."""
    num_ended, invalid = 0, []
    for key, answer in run_all(engine, requests).items():
        if answer.finish_reason is not FinishReason.STOP:
            continue
        num_ended += 1
        text, schema = tokenizer.decode(answer.token_ids), schemas[key % len(schemas)]
        try:
            is_valid = Draft202012Validator(schema).is_valid(json.loads(text))
        except json.JSONDecodeError:
            is_valid = False
        if not is_valid:
            invalid.append((schema, text))
    return num_ended, invalid


def test_answers_under_generated_schemas_are_valid(
    engine: BatchingEngine, info: ModelInfo, tokenizer: Tokenizer
) -> None:
    schemas = [random_schema(seed) for seed in range(200)]
    grammars = [grammar_of(info, schema) for schema in schemas]
    assert [(schema, error) for schema, (_, error) in zip(schemas, grammars, strict=True) if error] == []
    requests = [ask_engine(key, grammar, max_new_tokens=250) for key, (grammar, _) in enumerate(grammars)]
    num_ended, invalid = invalid_answers(engine, tokenizer, schemas, requests)
    assert invalid == []
    assert num_ended > 150


@pytest.mark.skipif(not SUITE.is_dir(), reason="the JSON-Schema-Test-Suite is not there")
def test_answers_under_the_test_suites_schemas_are_valid(
    engine: BatchingEngine, info: ModelInfo, tokenizer: Tokenizer
) -> None:
    # jsonschema matches with Python's re, which knows no \p.
    compiled = [
        (schema, grammar) for schema, _, (grammar, error) in suite(info) if not error and "\\p{" not in str(schema)
    ]
    schemas = [schema for schema, _ in compiled]
    requests = [
        ask_engine(index + copy * len(compiled), grammar, max_new_tokens=60)
        for copy in range(2)
        for index, (_, grammar) in enumerate(compiled)
    ]
    num_ended, invalid = invalid_answers(engine, tokenizer, schemas, requests)
    assert invalid == []
    assert num_ended > len(compiled)


@pytest.mark.skipif(not SUITE.is_dir(), reason="the JSON-Schema-Test-Suite is not there")
def test_the_test_suites_invalid_instances_are_refused_and_nearly_all_valid_ones_allowed(
    info: ModelInfo, tokenizer: Tokenizer
) -> None:
    seen: Counter[tuple[bool, bool]] = Counter()
    wrongly_allowed = []
    llguidance_tokenizer = load_tokenizer(info.tokenizer_dir, VOCAB_SIZE, (EOS,))
    for schema, tests, (grammar, error) in suite(info):
        for test in tests if not error else ():
            text = json.dumps(test["data"], ensure_ascii=False)
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            matcher = compile_grammar(llguidance_tokenizer, grammar)
            is_allowed = replay(matcher, ids, Clock()) == len(ids) and matcher.is_accepting()
            seen[test["valid"], is_allowed] += 1
            if is_allowed and not test["valid"]:
                wrongly_allowed.append((schema, text))
    assert wrongly_allowed == []
    assert seen[False, False] > 200
    # Numbers and keys are written one way only, and `format` is a rule: less than a schema allows, never more.
    assert seen[True, True] > 0.9 * (seen[True, True] + seen[True, False])


def suite(info: ModelInfo) -> list[tuple[Any, list[dict[str, Any]], tuple[str, str]]]:
    """The suite's schemas, their tests, and what the checker says of each."""
    groups = [group for path in sorted(SUITE.glob("*.json")) for group in json.loads(path.read_text())]
    return [(group["schema"], group["tests"], grammar_of(info, group["schema"])) for group in groups]
