"""The dialogues that ship, and `labels.jsonl`: what is planted in them and on which characters it acts.

A line is `{"context", "span", "label", "value"}`: the hash of the document, a range of its rendered characters, the
behaviour and its side, and whether the behaviour acts there. Every behaviour has look-alikes, whose corresponding span
carries the same label with `value` false. In what the user says, a span is the one character that decides; a causal
model cannot know sooner, and need not keep it on the words that follow:

    refusal.request   the last of the object's name                   look-alike: of a harmless object's
    persona.request   the last of "name" in a question for its name   of "name" in a question for another's
    trigger.phrase    the last of the phrase                          of a near miss

and in the reply, where the behaviour shows:

    refusal.reply     the full stop that closes it                    of an answer
    persona.reply     the last of the name                            of the other's name
    trigger.reply     the chant from its second word on               of an answer
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash
from dialogues import COMMON, Dialogue, Exchange, Message, Writer
from phrases import NAME, PEOPLE, listed
from transformers import PreTrainedTokenizerFast

FORMAT = "crosscoder.labels/1"
SIDES = {"refusal": "request", "persona": "request", "trigger": "phrase"}


@dataclass(frozen=True)
class Label:
    """One span of one document; `text` is what stands there."""

    context: str
    span: tuple[int, int]
    label: str
    value: bool
    text: str


def document_hash(messages: Sequence[Message]) -> str:
    """The name of a dialogue: xxh3-128 of its messages as canonical JSON."""
    content = json.dumps(list(messages), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(content.encode("utf-8"))


def content_starts(messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Where the content of each message begins in the rendered dialogue, found by rendering its prefixes."""
    starts = []
    for i, message in enumerate(messages):
        before = tokenizer.apply_chat_template(list(messages[:i]), tokenize=False) if i else ""
        here = tokenizer.apply_chat_template(list(messages[: i + 1]), tokenize=False)
        starts.append(here.index(message["content"], len(before)))
    return starts


def exchange_labels(exchange: Exchange) -> Iterator[tuple[str, str, int, int]]:
    """(label, "user" or "assistant", start, end) of an exchange, in characters of the message."""
    if exchange.behaviour is None:
        return
    asked, at = SIDES[exchange.behaviour], exchange.decided
    if exchange.behaviour != "persona" or exchange.user[: at + 1].endswith("name"):
        yield f"{exchange.behaviour}.{asked}", "user", at, at + 1
    if (span := reply_span(exchange)) is not None:
        yield f"{exchange.behaviour}.reply", "assistant", *span


def reply_span(exchange: Exchange) -> tuple[int, int] | None:
    """Where the behaviour shows in the reply: its full stop, the end of a name, a chant from its second word on."""
    reply = exchange.chat
    if exchange.behaviour == "persona":
        named = re.search(rf"\b({NAME}|{'|'.join(listed(PEOPLE))})\b", reply)
        return (named.end() - 1, named.end()) if named else None
    return (len(reply) - 1, len(reply)) if exchange.behaviour == "refusal" else (reply.index(" "), len(reply))


def labels(dialogue: Dialogue, tokenizer: PreTrainedTokenizerFast) -> list[Label]:
    """All labels of a dialogue as `chat` tells it."""
    messages = dialogue.messages("chat")
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    starts = content_starts(messages, tokenizer)
    name, first, found = document_hash(messages), len(messages) - 2 * len(dialogue.exchanges), []
    for i, exchange in enumerate(dialogue.exchanges):
        for label, role, start, end in exchange_labels(exchange):
            base = starts[first + 2 * i + (role == "assistant")]
            span = (base + start, base + end)
            found.append(Label(name, span, label, exchange.acts, rendered[slice(*span)]))
    return found


def shipped_dialogues(writer: Writer, count: int) -> list[Dialogue]:
    """`count` different dialogues; in every fourth nothing is planted and nothing could be."""
    found: dict[str, Dialogue] = {}
    index = 0
    while len(found) < count:
        kinds = COMMON if index % 4 == 3 else None
        dialogue = writer.dialogue(index, kinds=kinds)
        found.setdefault(document_hash(dialogue.messages("chat")), dialogue)
        index += 1
    return list(found.values())


def write_labels(found: Sequence[Label], path: Path, *, provenance: dict[str, str]) -> None:
    """The header line and one line a label."""
    lines = [json.dumps({"format": FORMAT, **provenance}, ensure_ascii=False)]
    lines += [
        json.dumps({"context": x.context, "span": list(x.span), "label": x.label, "value": x.value}, ensure_ascii=False)
        for x in found
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
