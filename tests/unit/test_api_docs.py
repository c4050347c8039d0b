"""tools/generate_api_docs.py: what its table of tests must hold."""

from __future__ import annotations

import copy
import tomllib

import pytest

from tools.generate_api_docs import FIELD_TESTS, ProtoFile, check_field_tests, load, render

FieldTests = dict[str, dict[str, list[str]]]


@pytest.fixture(scope="module")
def files() -> dict[str, ProtoFile]:
    return load()


@pytest.fixture
def table() -> FieldTests:
    return copy.deepcopy(tomllib.loads(FIELD_TESTS.read_text()))


def test_the_table_is_complete(files: dict[str, ProtoFile], table: FieldTests) -> None:
    assert check_field_tests(files, table) == []


def test_a_field_without_a_test_a_test_that_is_gone_and_a_field_that_is_gone_are_told(
    files: dict[str, ProtoFile], table: FieldTests
) -> None:
    del table["Choice"]["index"]
    table["Usage"]["prompt_tokens"] = []
    table["Message"]["role"] = ["integration/test_generate.py::test_no_such"]
    table["Message"]["name"] = ["integration/test_no_such.py::test_no_such"]
    table["Message"]["colour"] = ["integration/test_generate.py::test_timings_are_in_order"]
    assert check_field_tests(files, table) == [
        "Choice.index has no test",
        "Message.colour is no field",
        "Message.colour: none of its tests' files names it",
        "Message.name: there is no integration/test_no_such.py::test_no_such",
        "Message.name: none of its tests' files names it",
        "Message.role: there is no integration/test_generate.py::test_no_such",
        "Usage.prompt_tokens: none of its tests' files names it",
    ]


def test_the_page_has_every_message_field_and_reason(files: dict[str, ProtoFile], table: FieldTests) -> None:
    page = render(files, table)
    for file in files.values():
        for message in file.proto.message_type:
            assert f"\n## {message.name}\n" in page
            for field in message.field:
                assert f"\n| `{field.name}` | " in page
    for value in files["errors"].proto.enum_type[0].value[1:]:
        assert f"\n| `{value.name.removeprefix('ERROR_REASON_')}` | " in page
    assert "| `temperature` | optional float | 1 | " in page
    assert "| `logit_bias` | map of uint32 to float | none | " in page
