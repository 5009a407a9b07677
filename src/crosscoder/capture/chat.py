"""Documents as the model sees them: rendered text, and who speaks which characters.

Masks that chat templates give for this are unreliable, so roles come from rendering alone. Let R(m) be the rendered
text of messages m. A turn's content is located by rendering the dialogue once more with a marker in its place: if
`R(m with marker) = A + marker + B`, then `R(m) = A + content + B`, which is verified. And for every finished exchange
`R(m)` must start with `R(m[:i])`: a template that rewrites earlier turns would show a model other text than it was
trained on, and is refused. Characters that no content claims are the template's. Markers for all turns at once save
renderings, and are believed where their parts and the contents, put together, are R(m).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any

import numpy as np

from crosscoder.activations import ROLES
from crosscoder.capture.huggingface import Tokenizer
from crosscoder.capture.text import Document, Message
from crosscoder.errors import TextError

_MARKER = "\ue000\ue001\ue000"


@dataclass(frozen=True)
class Rendered:
    """Text as a model reads it; `spans` are (start, end, role) in characters, all else is template."""

    text: str
    spans: tuple[tuple[int, int, str], ...]

    def roles(self) -> np.ndarray:
        """The role code of every character."""
        codes = np.full(len(self.text), ROLES.index("template"), dtype=np.int8)
        for start, end, role in self.spans:
            codes[start:end] = ROLES.index(role)
        return codes


def render(document: Document, tokenizer: Tokenizer) -> Rendered:
    """The document's text: itself, or its messages in the tokenizer's chat template."""
    if isinstance(document.content, str):
        return Rendered(document.content, ((0, len(document.content), "text"),))
    if not document.content:
        return Rendered("", ())
    text = _apply(document, document.content, tokenizer)
    _check_prefixes(document, document.content, tokenizer, text)
    spans = _spans_at_once(document, document.content, tokenizer, text)
    if spans is None:
        turns = range(len(document.content))
        spans = tuple(_span(document, document.content, turn, tokenizer, text) for turn in turns)
    return Rendered(text, spans)


def awaiting_reply(document: Document, tokenizer: Tokenizer) -> Rendered:
    """The dialogue as the model sees it when it is to reply: rendered, and behind it what opens a reply."""
    rendered = render(document, tokenizer)
    assert not isinstance(document.content, str), "only dialogues are replied to"
    text = _apply(document, document.content, tokenizer, opens_reply=True)
    if not text.startswith(rendered.text):
        raise _refusal(document, "the chat template rewrites the dialogue when a reply is to follow")
    return Rendered(text, rendered.spans)


def _apply(
    document: Document, messages: tuple[Message, ...], tokenizer: Tokenizer, *, opens_reply: bool = False
) -> str:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise TextError(
            f"{document.dataset} holds dialogues, but the tokenizer has no chat template to render them by.",
            hint="Set `tokenizer` to the model that was trained on dialogues.",
        )
    turns: Any = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opens_reply))
    except TemplateError as error:
        raise _refusal(document, f"the chat template refuses it: {error}") from error


def _check_prefixes(document: Document, messages: tuple[Message, ...], tokenizer: Tokenizer, text: str) -> None:
    for turns in range(1, len(messages)):
        finished = messages[turns - 1].role == "assistant"
        if finished and not text.startswith(_apply(document, messages[:turns], tokenizer)):
            raise _refusal(document, f"the chat template rewrites the first {turns} turns when more follow")


def _spans_at_once(
    document: Document, messages: tuple[Message, ...], tokenizer: Tokenizer, text: str
) -> tuple[tuple[int, int, str], ...] | None:
    """All spans from one rendering; None where contents, as they are or trimmed, do not fill its gaps exactly."""
    markers = [f"{_MARKER}{turn}{_MARKER}" for turn in range(len(messages))]
    marked = tuple(replace(message, content=marker) for message, marker in zip(messages, markers, strict=True))
    rest = _apply(document, marked, tokenizer)
    parts: list[str] = []
    for marker in markers:
        part, _, rest = rest.partition(marker)
        parts.append(part)
    for contents in ([m.content for m in messages], [m.content.strip() for m in messages]):
        if text == "".join(chain.from_iterable(zip(parts, contents, strict=True))) + rest:
            ends = list(accumulate(len(part) + len(content) for part, content in zip(parts, contents, strict=True)))
            pairs = zip(messages, contents, ends, strict=True)
            return tuple((end - len(content), end, message.speaker) for message, content, end in pairs)
    return None


def _span(
    document: Document, messages: tuple[Message, ...], turn: int, tokenizer: Tokenizer, text: str
) -> tuple[int, int, str]:
    marked = (*messages[:turn], replace(messages[turn], content=_MARKER), *messages[turn + 1 :])
    before, found, after = _apply(document, marked, tokenizer).partition(_MARKER)
    start, end = len(before), len(text) - len(after)
    whole = bool(found) and start <= end and text.startswith(before) and text.endswith(after)
    if not whole or text[start:end].strip() != messages[turn].content.strip():
        raise _refusal(document, f"the chat template changes the content of turn {turn + 1}")
    return start, end, messages[turn].speaker


def _refusal(document: Document, why: str) -> TextError:
    return TextError(
        f"cannot tell who speaks in a dialogue of {document.dataset} (document {document.hash}): {why}.",
        hint="Use a plainer chat template, or render the dialogues yourself and give them as text.",
    )
