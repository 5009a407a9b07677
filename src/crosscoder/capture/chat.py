"""Documents as the model sees them: rendered text, and who speaks which characters.

Masks that chat templates give for this are unreliable, so roles come from rendering alone. Let R(m) be the rendered
text of messages m. A turn's content is located by rendering the dialogue once more with a marker in its place: if
`R(m with marker) = A + marker + B`, then `R(m) = A + content + B`, which is verified. And for every finished exchange
`R(m)` must start with `R(m[:i])`: a template that rewrites earlier turns would show a model other text than it was
trained on, and is refused. Characters that no content claims are the template's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    spans = [_span(document, document.content, turn, tokenizer, text) for turn in range(len(document.content))]
    return Rendered(text, tuple(spans))


def _apply(document: Document, messages: tuple[Message, ...], tokenizer: Tokenizer) -> str:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise TextError(
            f"{document.dataset} holds dialogues, but the tokenizer has no chat template to render them by.",
            hint="Set `tokenizer` to the model that was trained on dialogues.",
        )
    turns: Any = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False))
    except TemplateError as error:
        raise _refusal(document, f"the chat template refuses it: {error}") from error


def _check_prefixes(document: Document, messages: tuple[Message, ...], tokenizer: Tokenizer, text: str) -> None:
    for turns in range(1, len(messages)):
        finished = messages[turns - 1].role == "assistant"
        if finished and not text.startswith(_apply(document, messages[:turns], tokenizer)):
            raise _refusal(document, f"the chat template rewrites the first {turns} turns when more follow")


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
