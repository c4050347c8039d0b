"""Answers under GBNF grammars: random ids of the embedded model's own tokenizer."""

from __future__ import annotations

import random
import re
from string import ascii_lowercase

import pytest
from tokenizers import Tokenizer

from parleyd.config import ModelSettings
from parleyd.generation import FinishReason
from parleyd.grammar.formats import to_grammar
from parleyd.model.source import find_folder
from tests.support.random_engine import ask_engine, info_of, make_random_engine, run_all

EOS, VOCAB_SIZE = 2, 49152

pytestmark = pytest.mark.timeout(300)


def test_long_lists_of_names_may_follow_each_other() -> None:
    draw = random.Random(0)
    lists = [["".join(draw.choices(ascii_lowercase, k=12)) for _ in range(3000)] for _ in range(5)]
    rules = [f"list{i} ::= " + " | ".join(f'"{name}"' for name in names) for i, names in enumerate(lists)]
    grammar = to_grammar("grammar", "\n".join(['root ::= list0 " " list1 " " list2 " " list3 " " list4', *rules]))
    folder = str(find_folder(ModelSettings()))
    engine = make_random_engine(info_of(folder, VOCAB_SIZE, (EOS,)), [EOS])
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    answers = run_all(engine, [ask_engine(key, grammar) for key in range(4)])
    assert {answer.finish_reason for answer in answers.values()} == {FinishReason.STOP}
    pattern = " ".join("(" + "|".join(names) + ")" for names in lists)
    assert all(re.fullmatch(pattern, tokenizer.decode(answer.token_ids)) for answer in answers.values())
