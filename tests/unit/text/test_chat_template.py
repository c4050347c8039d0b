"""ChatTemplate against transformers' apply_chat_template for the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from parleyd.errors import InvalidRequest, StartupError, Unsupported, Violation
from parleyd.text.chat_template import ChatTemplate
from parleyd.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizer import CHATML_TEMPLATE, DEFAULT_SYSTEM_PROMPT, write_tiny_tokenizer

# In the manner of Llama 2: special tokens, trimmed contents, roles that must alternate.
ALTERNATING_TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate\nuser/assistant/user/…') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + message.content | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""

# In the manner of Qwen 3 and SmolLM 3: tools, a switch for reasoning, its own variables, macros and namespaces.
RICH_TEMPLATE = """{% macro show(message) %}<|im_start|>{{ message.role }}
{{ message.content }}{% if message.name %} ({{ message.name }}){% endif %}<|im_end|>
{% endmacro %}
{%- if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}
{%- set style = style | default('plain') %}
{%- set ns = namespace(count=0) %}
{%- if tools %}{{ tools | tojson(indent=2) }}
{% endif %}
{%- for message in messages %}
    {%- set ns.count = ns.count + 1 %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.reasoning_content is defined %}<think>{{ message.reasoning_content }}</think>{% endif %}
    {%- generation %}{{ show(message) }}{% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{{ ns.count }} {{ style }} {{ range(3) | list }}{% if not enable_thinking %}<think>

</think>{% endif %}{% endif %}"""

# In the manner of SmolVLM and Llava: texts in lists of parts alone.
PARTS_TEMPLATE = """{%- for message in messages %}{{ message.role }}:
    {%- if message.content[0].type == 'image' %}<image>{% endif %}
    {%- for part in message.content | selectattr('type', 'equalto', 'text') %} {{ part.text }}{% endfor %}<end>
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""

USER = {"role": "user", "content": " Hé <b>'quoted'</b>\r\n日本 "}
ASSISTANT = {"role": "assistant", "content": "Well, "}
CHATS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [USER, ASSISTANT | {"reasoning_content": "hm"}, USER | {"name": "Zoë"}],
    [USER, ASSISTANT, {"role": "tool", "content": "42", "tool_call_id": "1"}],
    [USER, ASSISTANT],
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "ü <", "parameters": {"type": "object"}}}]


def violations(error: pytest.ExceptionInfo[InvalidRequest]) -> list[Violation]:
    return error.value.violations


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("continued", [False, True])
def test_a_template_that_takes_parts_alone_is_given_them(tmp_path: Path, chat: Any, continued: bool) -> None:
    folder = write_tiny_tokenizer(tmp_path, chat_template=PARTS_TEMPLATE)
    oracle = AutoTokenizer.from_pretrained(folder)
    in_parts = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in chat]
    options = {"continue_final_message": continued}
    prompt = ChatTemplate.load(folder).render(chat, **options)
    assert chat[-1]["content"].strip() in prompt
    assert prompt == oracle.apply_chat_template(
        in_parts, tokenize=False, add_generation_prompt=not continued, **options
    )


@pytest.mark.parametrize("name", ["default", "tool_use"])
def test_each_template_is_given_texts_as_it_takes_them(name: str) -> None:
    parts_alone = "{% for tool in tools or () %}{{ tool.function.name }}{% endfor %}" + PARTS_TEMPLATE
    sources = {"default": CHATML_TEMPLATE, "tool_use": CHATML_TEMPLATE} | {name: parts_alone}
    template = ChatTemplate(sources["default"], {}, tool_use=sources["tool_use"])
    for tools in (None, TOOLS):
        assert ASSISTANT["content"].strip() in template.render([USER, ASSISTANT], tools=tools)


@pytest.mark.parametrize("source", [CHATML_TEMPLATE, RICH_TEMPLATE], ids=["chatml", "rich"])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
def test_prompts_are_those_of_transformers(tmp_path: Path, source: str, chat: Any, tools: Any) -> None:
    folder = write_tiny_tokenizer(tmp_path, chat_template=source)
    oracle = AutoTokenizer.from_pretrained(folder)
    prompt = ChatTemplate.load(folder).render(chat, tools=tools)
    assert prompt == oracle.apply_chat_template(chat, tools=tools, tokenize=False, add_generation_prompt=True)
    ids = oracle.apply_chat_template(chat, tools=tools, add_generation_prompt=True, return_dict=False)
    assert Tokenizer.load(folder).encode(prompt).ids == ids


@pytest.mark.parametrize("source", [CHATML_TEMPLATE, ALTERNATING_TEMPLATE, RICH_TEMPLATE])
@pytest.mark.parametrize("content", ["Well, ", "Well,\n", "x"])
def test_continuations_are_those_of_transformers(tmp_path: Path, source: str, content: str) -> None:
    folder = write_tiny_tokenizer(tmp_path, chat_template=source)
    chat = [USER, {"role": "assistant", "content": content}]
    prompt = ChatTemplate.load(folder).render(chat, continue_final_message=True)
    oracle = AutoTokenizer.from_pretrained(folder)
    assert prompt == oracle.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert prompt.endswith(content.rstrip() if source is ALTERNATING_TEMPLATE else content)


def test_kwargs_reach_the_template_as_in_transformers(tmp_path: Path) -> None:
    folder = write_tiny_tokenizer(tmp_path, chat_template=RICH_TEMPLATE)
    kwargs: dict[str, Any] = {"enable_thinking": False, "style": {"a": [1.0, None]}}
    oracle = AutoTokenizer.from_pretrained(folder)
    expected = oracle.apply_chat_template([USER], tokenize=False, add_generation_prompt=True, **kwargs)
    assert ChatTemplate.load(folder).render([USER], kwargs=kwargs) == expected


def test_keys_whose_value_is_none_count_as_absent() -> None:
    template = ChatTemplate(RICH_TEMPLATE, {})
    assert template.render([USER | {"reasoning_content": None}]) == template.render([USER])


def test_the_default_system_prompt_is_the_templates_own(tmp_path: Path) -> None:
    template = ChatTemplate.load(write_tiny_tokenizer(tmp_path))
    assert DEFAULT_SYSTEM_PROMPT in template.render([USER])
    assert DEFAULT_SYSTEM_PROMPT not in template.render([{"role": "system", "content": "Mine."}, USER])


@pytest.mark.parametrize(
    "value",
    ["{{ bos_token }}!", [{"name": "tool_use", "template": "?"}, {"name": "default", "template": "{{ bos_token }}!"}]],
)
def test_older_folders_keep_the_template_in_the_configuration(tmp_path: Path, value: Any) -> None:
    path = write_tiny_tokenizer(tmp_path, chat_template=None) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"chat_template": value}), encoding="utf-8")
    assert ChatTemplate.load(tmp_path).render([USER]) == "<|im_start|>!"
    (tmp_path / "chat_template.jinja").write_text("the file wins", encoding="utf-8")
    assert ChatTemplate.load(tmp_path).render([USER]) == "the file wins"


def test_of_models_that_see_it_may_be_in_a_file_of_its_own(tmp_path: Path) -> None:
    folder = write_tiny_tokenizer(tmp_path, chat_template=None)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ bos_token }}!"}), encoding="utf-8")
    assert ChatTemplate.load(folder).render([USER]) == "<|im_start|>!"


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("in_files", [True, False], ids=["files", "configuration"])
def test_tools_have_a_template_of_their_own_where_the_model_has_one(tmp_path: Path, in_files: bool, tools: Any) -> None:
    templates = {"default": "d {{ style }}", "tool_use": "{{ tools | tojson }} {{ style }} {{ depth }}", "rag": "r"}
    folder = write_tiny_tokenizer(tmp_path, chat_template=templates["default"] if in_files else None)
    if in_files:
        (folder / "additional_chat_templates").mkdir()
        for name in ("tool_use", "rag"):
            (folder / "additional_chat_templates" / f"{name}.jinja").write_text(templates[name], encoding="utf-8")
    else:
        named = [{"name": name, "template": source} for name, source in templates.items()]
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}), encoding="utf-8")
    template, oracle = ChatTemplate.load(folder), AutoTokenizer.from_pretrained(folder)
    kwargs = {"style": "s", "depth": 2}
    expected = oracle.apply_chat_template([USER], tools=tools, tokenize=False, **kwargs)
    assert template.render([USER], tools=tools, kwargs=kwargs) == expected


def test_a_model_without_a_template_cannot_chat(tmp_path: Path) -> None:
    template = ChatTemplate.load(write_tiny_tokenizer(tmp_path, chat_template=None))
    assert template.kwarg_violations({"anything": 1}) == []
    assert not template.reads_names
    with pytest.raises(Unsupported) as error:
        template.render([USER])
    assert error.value.metadata == {"field": "messages"}
    assert "chat_template.jinja" not in str(error.value)


def test_who_serves_a_folder_without_a_template_is_told_that_it_may_hold_one(tmp_path: Path) -> None:
    template = ChatTemplate.load(write_tiny_tokenizer(tmp_path, chat_template=None), is_own_folder=True)
    with pytest.raises(Unsupported, match=r"no chat template \(a chat_template.jinja in its folder would be one\)"):
        template.render([USER])
    assert ChatTemplate.load(write_tiny_tokenizer(tmp_path), is_own_folder=True).obstacle is None


@pytest.mark.parametrize(
    "template",
    ["{% for %}", "{{ " + "[" * 1000 + "]" * 1000 + " }}", "{% for x in [] %}" * 30 + "{% endfor %}" * 30],
    ids=["syntax", "brackets", "loops"],
)
def test_an_invalid_template_stops_the_start(tmp_path: Path, template: str) -> None:
    with pytest.raises(StartupError, match="not valid"):
        ChatTemplate.load(write_tiny_tokenizer(tmp_path, chat_template=template))


def test_variables_are_what_clients_may_set() -> None:
    template = ChatTemplate(RICH_TEMPLATE, {"image_token": "<img>"})
    assert template.variables == {"enable_thinking", "style"}
    assert ChatTemplate("{{ style }}", {}, tool_use="{{ depth }}").variables == {"style", "depth"}


@pytest.mark.parametrize(
    "name", ["messages", "tools", "add_generation_prompt", "bos_token", "image_token", "chat_template", "self"]
)
def test_reserved_kwargs_are_violations_even_where_the_template_reads_them(name: str) -> None:
    template = ChatTemplate(f"{{{{ {name} }}}}", {"image_token": "<img>"})
    assert [violation.field for violation in template.kwarg_violations([name])] == [f"chat_template_kwargs.{name}"]


def test_every_unknown_kwarg_is_a_violation() -> None:
    found = ChatTemplate(RICH_TEMPLATE, {}).kwarg_violations(["enable_thinking", "enable_thinkin", "range", ""])
    assert [violation.field.removeprefix("chat_template_kwargs.") for violation in found] == [
        "enable_thinkin",
        "range",
        "",
    ]
    assert "enable_thinking, style" in found[0].description


def test_a_template_that_refuses_the_messages_is_quoted_in_one_line() -> None:
    with pytest.raises(InvalidRequest) as error:
        ChatTemplate(ALTERNATING_TEMPLATE, {"bos_token": "<s>"}).render([ASSISTANT])
    assert violations(error) == [
        Violation(
            "messages",
            "the model's chat template refuses them: Conversation roles must alternate user/assistant/user/…",
        )
    ]


@pytest.mark.parametrize(
    "source", ["{{ raise_exception('x' * 10000) }}", "{{ messages[7].content }}", "{{ 1 / 0 }}", "{{ ''.__class__.a }}"]
)
def test_whatever_a_template_raises_is_a_short_violation(source: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        ChatTemplate(source, {}).render([USER])
    assert [violation.field for violation in violations(error)] == ["messages"]
    assert 40 < len(violations(error)[0].description) < 400


def test_a_prompt_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate("{{ messages[0].content }}", {}).render([{"role": "user", "content": "\ud800"}])


@pytest.mark.parametrize("source", ["{{ messages[-1].content | upper }}", "{{ messages[0].content }}", "nothing"])
def test_a_template_that_alters_the_last_message_cannot_continue_it(source: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        ChatTemplate(source, {}).render([USER, ASSISTANT], continue_final_message=True)
    assert [violation.field for violation in violations(error)] == ["continue_final_message"]


def test_hostile_kwargs_are_data_and_no_code() -> None:
    assert ChatTemplate("{{ value }}", {}).render([USER], kwargs={"value": "{{ 1 + 1 }}"}) == "{{ 1 + 1 }}"
