"""Prompts of one's own: read from files, rendered as the model sees them, and cut into tokens.

A prompt is text, or the messages of a dialogue. Under `chat` text is what a user says; messages are rendered by the
chat template, and where the last one is not the assistant's, what opens the reply comes behind it: there a model that
is about to answer is seen. Under `raw` text is taken as it stands, special tokens in it included. A special token that
someone *typed* under `chat` is refused: the model would take it for the template's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from crosscoder.activations import ROLES
from crosscoder.analysis.tokens import token_pieces
from crosscoder.capture.alignment import Aligner
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.chat import awaiting_reply, render
from crosscoder.capture.contexts import Context, DocumentId, Encoder, Tokens, assemble
from crosscoder.capture.fingerprints import vocabulary_hash
from crosscoder.capture.huggingface import Tokenizer
from crosscoder.capture.text import Document, Drop
from crosscoder.errors import TextError

Prompt = str | Sequence[Mapping[str, Any]]
"""Text, or messages as mappings with `role` and `content`."""
Rendering = Literal["chat", "raw"]
RENDERINGS: tuple[Rendering, ...] = ("chat", "raw")


@dataclass(frozen=True)
class PromptText:
    """Prompts as contexts, one each, and the text of every token."""

    contexts: AnalysisSet
    pieces: tuple[str, ...]
    rendering: Rendering

    @property
    def num_prompts(self) -> int:
        """How many prompts there are."""
        return self.contexts.num_contexts

    def span(self, prompt: int) -> range:
        """The tokens of one prompt, BOS included, as places in the columns of `contexts` and in `pieces`."""
        start, stop = self.contexts.pointers[prompt : prompt + 2].tolist()
        return range(start, stop)


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file: `.jsonl` has one object a line, all else one prompt a line; blank lines part nothing.

    An object is {"prompt": "..."} or {"messages": [{"role": ..., "content": ...}, ...]}. Raises TextError.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(
            f"expected a text file of prompts at {path}: {error}.",
            hint="Give a .txt with one prompt a line, or a .jsonl of objects with `prompt` or `messages`.",
        ) from error
    return parse_prompts(text, name=str(path), as_json=path.suffix == ".jsonl")


def parse_prompts(text: str, *, name: str, as_json: bool = False) -> list[Prompt]:
    """The prompts of the lines of `text`, which is called `name` in errors."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise TextError(f"expected prompts in {name}; every line is empty.", hint="Give one prompt a line.")
    return [_json_prompt(line, f"{name}, line {number}") if as_json else line.strip("\r") for number, line in lines]


def parse_prompt(text: str) -> Prompt:
    """One prompt as typed: the messages that a JSON list stands for, else the text itself."""
    if text.lstrip().startswith("["):
        try:
            content = json.loads(text)
        except json.JSONDecodeError:
            return text
        if content and all(isinstance(item, dict) and "role" in item for item in content):
            return content
    return text


def default_rendering(tokenizer: Tokenizer) -> Rendering:
    """`chat` where the tokenizer has a template for it."""
    return "raw" if tokenizer.chat_template is None else "chat"


def prompt_text(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    *,
    rendering: Rendering | None = None,
    drop: Sequence[Drop] = ("bos", "pad"),
    max_tokens: int | None = None,
    aligner: Aligner | None = None,
    name: str = "the prompts",
) -> PromptText:
    """The prompts' tokens; those that `drop` names are seen by the model and become no rows.

    `aligner` keeps those that models with other tokenizers can be read at too. Raises TextError for a prompt that is
    empty, longer than `max_tokens`, holds a special token under `chat` or messages under `raw`, or leaves no row.
    """
    if not prompts:
        raise TextError(f"expected at least one prompt in {name}; got none.")
    rendering = rendering or default_rendering(tokenizer)
    encoder = Encoder(tokenizer, tuple(drop))
    contexts = []
    for number, prompt in enumerate(prompts, start=1):
        where = f"prompt {number} of {name}" if len(prompts) > 1 else "the prompt"
        context = _context(prompt, encoder, rendering, where=where)
        context = context if aligner is None else aligner(context)
        _check_size(context, max_tokens, where=where)
        contexts.append(context)
    counts = None if aligner is None else aligner.count(contexts)
    made = AnalysisSet.of(contexts, vocabulary=vocabulary_hash(tokenizer), aligned=counts)
    ids = made.token_ids.tolist()
    pieces = token_pieces(tokenizer, ids)
    return PromptText(made, tuple(pieces[token] for token in ids), rendering)


def _json_prompt(line: str, where: str) -> Prompt:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise TextError(f"{where} is not JSON: {error}.", hint='Write {"prompt": "..."} on every line.') from error
    found = [content[key] for key in ("prompt", "messages") if isinstance(content, dict) and key in content]
    if len(found) != 1 or not isinstance(found[0], str | list):
        raise TextError(
            f"{where}: expected an object with `prompt` (text) or `messages` (a list), and not both.",
            details=[f"got  {line[:80]}"],
        )
    return found[0]


def _context(prompt: Prompt, encoder: Encoder, rendering: Rendering, *, where: str) -> Context:
    document = _document(prompt, rendering, where=where)
    if isinstance(document.content, str):
        tokens = encoder.encode(document, separator=False)
    else:
        answered = document.content[-1].role == "assistant"
        opened = render if answered else awaiting_reply
        tokens = encoder.encode_rendered(opened(document, encoder.tokenizer), separator=False)
        _refuse_typed_specials(tokens, encoder.tokenizer, where=where)
    return assemble(encoder.opening(), [(tokens, DocumentId(document.hash, document.dataset))])


def _document(prompt: Prompt, rendering: Rendering, *, where: str) -> Document:
    text = prompt if isinstance(prompt, str) else "".join(str(message.get("content", "")) for message in prompt)
    if not text.strip():
        raise TextError(f"{where} is empty.", hint="Take it out, or write what the model is to read.")
    if not _is_whole(text):
        raise TextError(f"{where} is not text in UTF-8.", hint="Save it as UTF-8.")
    if isinstance(prompt, str):
        return Document.of(prompt if rendering == "raw" else [{"role": "user", "content": prompt}], dataset=where)
    if rendering == "raw":
        raise TextError(
            f"{where} is a list of messages, which needs the chat template.",
            hint="Leave out --raw (rendering='raw'), or give the dialogue as text.",
        )
    return Document.of(prompt, dataset=where)


def _is_whole(text: str) -> bool:
    """Whether no character is half of one, which no tokenizer takes."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _refuse_typed_specials(tokens: Tokens, tokenizer: Tokenizer, *, where: str) -> None:
    marked = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special = np.isin(tokens.ids, sorted(marked | set(tokenizer.all_special_ids)))
    typed = tokens.ids[special & (tokens.roles != ROLES.index("template"))]
    if len(typed):
        names = tokenizer.convert_ids_to_tokens(np.unique(typed).tolist())
        raise TextError(
            f"{where} holds special tokens, which the model would take for those of its chat template.",
            details=[f"typed  {name!r}" for name in names],
            hint="Write them otherwise; or render the dialogue yourself and give it with --raw (rendering='raw').",
        )


def _check_size(context: Context, max_tokens: int | None, *, where: str) -> None:
    if max_tokens is not None and len(context) > max_tokens:
        raise TextError(
            f"{where} is {len(context):,} tokens long; the models were made for {max_tokens:,}.",
            hint="Shorten it, or give its parts as prompts of their own.",
        )
    if context.num_rows == 0:
        raise TextError(
            f"{where} leaves no token to encode: the run drops all that it has.",
            hint="Its text.drop names the tokens that never become rows.",
        )
