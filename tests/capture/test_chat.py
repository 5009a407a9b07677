"""Who speaks which characters: by hand, by property, and the templates that are refused."""

from __future__ import annotations

import copy

import pytest
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.texts import dialogue
from crosscoder.activations import ROLES
from crosscoder.capture import Document, Message, chat, render
from crosscoder.capture.contexts import Encoder
from crosscoder.errors import TextError

TRIMS = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] | trim }}[end]\n{% endfor %}"
SYSTEM_IN_USER = (
    "{% set loop_messages = messages %}{% set ns = namespace(system='') %}{% for m in loop_messages %}"
    "{% if m['role'] == 'system' %}{% set ns.system = m['content'] %}"
    "{% elif m['role'] == 'user' %}[INST]{{ ns.system }}: {{ m['content'] }}[/INST]{% set ns.system = '' %}"
    "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
REWRITES = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' and loop.last %} (thought){% endif %}{% endfor %}"
)
CHANGES = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | upper }}{% endfor %}"
RAISES = "{{ raise_exception('Only alternating turns') }}"


def with_template(tokenizer: hf.PreTrainedTokenizerFast, template: str | None) -> hf.PreTrainedTokenizerFast:
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def spoken(messages: list[dict[str, str]], tokenizer: hf.PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    rendered = render(Document.of(messages, dataset="d"), tokenizer)
    return [(role, rendered.text[start:end]) for start, end, role in rendered.spans]


def test_a_text_is_itself(toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    rendered = render(Document.of("Two words", dataset="d"), toy_tokenizer)
    assert rendered.text == "Two words" and rendered.spans == ((0, 9, "text"),)


def test_spans_by_hand(toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    rendered = render(Document.of(dialogue("hi", "yes"), dataset="d"), toy_tokenizer)
    assert rendered.text == "<|bos|><|user|>hi<|end|><|assistant|>yes<|end|>"
    assert rendered.spans == ((15, 17, "user"), (37, 40, "assistant"))


@pytest.mark.parametrize("template", [TRIMS, SYSTEM_IN_USER])
@pytest.mark.parametrize("content", ["user", "end", "s", "[/INST]", " padded "])
def test_content_that_looks_like_the_template(
    template: str, content: str, toy_tokenizer: hf.PreTrainedTokenizerFast
) -> None:
    found = spoken(dialogue(content, content, "more", system="be kind"), with_template(toy_tokenizer, template))
    trimmed = content.strip() if template == TRIMS else content
    assert found == [("system", "be kind"), ("user", trimmed), ("assistant", trimmed), ("user", "more")]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=12), min_size=1, max_size=4))
def test_spans_hold_the_contents(turns: list[str]) -> None:
    from conftest import build_toy_tokenizer

    tokenizer = _cached(build_toy_tokenizer)
    assert [content for _, content in spoken(dialogue(*turns), tokenizer)] == turns


@pytest.mark.parametrize("template", [TRIMS, SYSTEM_IN_USER, None])
@settings(max_examples=30, deadline=None)
@given(turns=st.lists(st.text("a []/INST\ns0", max_size=6), min_size=1, max_size=12))
def test_all_turns_at_once_are_where_one_by_one_finds_them(template: str | None, turns: list[str]) -> None:
    from conftest import build_toy_tokenizer

    tokenizer = _cached(build_toy_tokenizer)
    tokenizer = tokenizer if template is None else with_template(tokenizer, template)
    document = Document.of(dialogue(*turns), dataset="d")
    messages, text = document.content, render(document, tokenizer).text
    at_once = chat._spans_at_once(document, messages, tokenizer, text)
    one_by_one = tuple(chat._span(document, messages, turn, tokenizer, text) for turn in range(len(messages)))
    assert at_once in (one_by_one, None) and render(document, tokenizer).spans == one_by_one


def test_a_long_dialogue_takes_few_renderings(
    toy_tokenizer: hf.PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[int] = []
    apply = chat._apply

    def counted(document: Document, messages: tuple[Message, ...], tokenizer: hf.PreTrainedTokenizerFast) -> str:
        rendered.append(len(messages))
        return apply(document, messages, tokenizer)

    monkeypatch.setattr(chat, "_apply", counted)
    assert len(spoken(dialogue(*map(str, range(9))), toy_tokenizer)) == 9
    assert sorted(rendered) == [2, 4, 6, 8, 9, 9], "finished exchanges, the whole, and the whole with markers"


_tokenizers: list[hf.PreTrainedTokenizerFast] = []


def _cached(build: object) -> hf.PreTrainedTokenizerFast:
    if not _tokenizers:
        _tokenizers.append(build())
    return _tokenizers[0]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (REWRITES, "rewrites the first 2 turns"),
        (CHANGES, "changes the content of turn 1"),
        (RAISES, "Only alternating turns"),
    ],
)
def test_templates_that_are_refused(template: str, why: str, toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    document = Document.of(dialogue("a", "b", "c"), dataset="chats.jsonl")
    with pytest.raises(TextError, match=rf"(?s)chats\.jsonl.*{document.hash}.*{why}"):
        render(document, with_template(toy_tokenizer, template))


def test_dialogues_need_a_template(toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    with pytest.raises(TextError, match="no chat template"):
        render(Document.of(dialogue("a"), dataset="d"), with_template(toy_tokenizer, None))


def test_tokens_have_the_role_of_their_characters(toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    document = Document.of(dialogue("the old house", "a dog"), dataset="d")
    tokens = Encoder(toy_tokenizer, ("bos", "pad")).encode(document, separator=False)
    text = render(document, toy_tokenizer).text
    by_role: dict[str, str] = {}
    for role, start, end in zip(tokens.roles, tokens.char_start, tokens.char_end, strict=True):
        by_role[ROLES[role]] = by_role.get(ROLES[role], "") + text[start:end]
    assert by_role == {
        "template": "<|user|><|end|><|assistant|><|end|>",
        "user": "the old house",
        "assistant": "a dog",
    }
    special = toy_tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>", "<|assistant|>"])
    assert [token for token in tokens.ids if token in special] == [special[0], special[1], special[2], special[1]]
