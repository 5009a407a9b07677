"""The same text in several tokenizations: rows at the tokens after which all models have read the same bytes.

A context is text in the tokens of one tokenizer, the text's own. What these tokens spell is tokenized by every other
tokenizer. Let E_m be the bytes after which a token of tokenization m ends. Between neighbours of `∩_m E_m` lie the
*windows*: the smallest spans that begin and end with whole tokens in all tokenizations. A window gives one row, at the
last token that it has in each of them, unless one of its tokens does not spell what the text has there (`spelling`).
(Jiralerspong & Bricken 2026, section on tokenizers: greedy expansion on decoded text until both sides agree, last token
of each window. Here in bytes and without a search, which finds the same windows; and BOS, separators and limits.)

Each document's stretch of a context is tokenized by itself, as the text's own tokenizer did. BOS opens a context and
EOS closes a document where a tokenizer has them; a row is formed there only where all of them do. Tokens that a model
has no positions for are not read, and give no rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Int

from crosscoder.capture.contexts import Context, Reading, Tokens
from crosscoder.capture.fingerprints import vocabulary_hash
from crosscoder.capture.huggingface import Tokenizer
from crosscoder.capture.models import StudiedModel
from crosscoder.capture.spelling import Spelled, Spelling
from crosscoder.errors import TokenizerMismatch


@dataclass(frozen=True)
class AlignmentCounts:
    """How many windows a text has, and how many tokens of it by model; tokens that are no text (BOS, EOS) left out.

    `unlike`: windows lost because a token of that model spells something else, `beyond`: because it lies after the last
    position of that model.
    """

    num_windows: int
    num_tokens: Mapping[str, int]
    unlike: Mapping[str, int]
    beyond: Mapping[str, int]

    @property
    def lost(self) -> dict[str, float]:
        """The share of each model's tokens at which no row can be formed."""
        return {alias: 1 - self.num_windows / count if count else 0.0 for alias, count in self.num_tokens.items()}

    def in_words(self) -> str:
        """One line."""
        shares = ", ".join(f"{alias} {share:.1%}" for alias, share in self.lost.items())
        reasons = {"not spelled alike": self.unlike, "beyond its positions": self.beyond}
        more = [f"{n:,} windows {why} in {alias}" for why, found in reasons.items() for alias, n in found.items() if n]
        return "; ".join([f"tokens without a row: {shares}", *more])

    def to_json(self) -> dict[str, Any]:
        """The counts and the shares lost."""
        counts = {name: dict(getattr(self, name)) for name in ("num_tokens", "unlike", "beyond")}
        return {"num_windows": self.num_windows, **counts, "lost": self.lost}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> AlignmentCounts:
        """What `to_json` gave."""
        return cls(content["num_windows"], content["num_tokens"], content["unlike"], content["beyond"])


@dataclass(frozen=True)
class _Reader:
    """One tokenizer beside the text's own: its models, and the fewest positions that one of them has."""

    tokenizer: Tokenizer
    spelling: Spelling
    aliases: tuple[str, ...]
    most_tokens: int | None


@dataclass(frozen=True)
class Aligner:
    """Gives contexts their readings in other tokenizations; `readers` by the hash of their vocabularies."""

    vocabulary: str
    spelling: Spelling
    eos: int | None
    aliases: tuple[str, ...]
    readers: Mapping[str, _Reader]

    @classmethod
    def of(cls, models: Mapping[str, StudiedModel], *, vocabulary: str) -> Aligner | None:
        """The aligner of text with that vocabulary for `models`; None where all of them share it.

        Raises TokenizerMismatch where none of them has it.
        """
        hashes = {alias: vocabulary_hash(studied.tokenizer) for alias, studied in models.items()}
        by_hash = {key: [alias for alias in models if hashes[alias] == key] for key in hashes.values()}
        own = by_hash.pop(vocabulary, None)
        if own is None:
            raise TokenizerMismatch(
                "expected a model whose tokenizer made the text; none of these has its vocabulary.",
                details=[f"the text: vocabulary {vocabulary[:12]}", *(f"{a}: {h[:12]}" for a, h in hashes.items())],
                hint="Give that model too: rows are at tokens of the text's own tokenizer (text.tokenizer).",
            )
        if not by_hash:
            return None
        tokenizer = models[own[0]].tokenizer
        spelling = Spelling.of(tokenizer)
        if spelling.kind == "words":
            raise _unspoken(own[0])
        readers = {key: _reader({alias: models[alias] for alias in aliases}) for key, aliases in by_hash.items()}
        return cls(vocabulary, spelling, cast("int | None", tokenizer.eos_token_id), tuple(own), readers)

    def __call__(self, context: Context) -> Context:
        """The context with a reading for each other tokenizer; tokens that are not aligned in all are not kept."""
        tokens = context.tokens
        stretches = _stretches(tokens, self.eos)
        spoken = [self._spoken(tokens, stretch) for stretch in stretches if not stretch.is_sign]
        encoded = {key: _encode(reader, [text for text, _ in spoken]) for key, reader in self.readers.items()}
        found = [windows(own, [of_reader[n][1] for of_reader in encoded.values()]) for n, (_, own) in enumerate(spoken)]
        readings: dict[str, Reading] = {}
        for place, (key, reader) in enumerate(self.readers.items()):
            made = _Made(reader, len(tokens))
            made.add_all(stretches, [(ids, w.of(place)) for (ids, _), w in zip(encoded[key], found, strict=True)])
            readings[key] = made.reading()
        aligned = np.all([reading.places >= 0 for reading in readings.values()], axis=0)
        return Context(replace(tokens, kept=tokens.kept & aligned), context.documents, readings)

    def count(self, contexts: Sequence[Context]) -> AlignmentCounts:
        """The counts of contexts that were aligned."""
        windows = own = 0
        for context in contexts:
            is_text = ~_is_sign(context.tokens, self.eos)
            own += int(is_text.sum())
            windows += int(np.all([is_text, *(r.places >= 0 for r in context.readings.values())], axis=0).sum())
        counts: dict[str, dict[str, int]] = {name: dict.fromkeys(self.aliases, 0) for name in ("unlike", "beyond")}
        counts["num_tokens"] = dict.fromkeys(self.aliases, own)
        for key, reader in self.readers.items():
            for name, of_model in counts.items():
                total = sum(getattr(context.readings[key], name) for context in contexts)
                of_model.update(dict.fromkeys(reader.aliases, total))
        return AlignmentCounts(windows, **counts)

    def _spoken(self, tokens: Tokens, stretch: _Stretch) -> tuple[str, Spelled]:
        """A stretch as text, and its own tokens in it."""
        part = slice(stretch.start, stretch.stop)
        starts = tokens.char_start[part]
        first = int(
            min([tokens.char_end[stretch.start], *starts[1:2]])
        )  # its characters, without those of the next one
        return self.spelling.read(tokens.ids[part].tolist(), opening=first if starts[0] == 0 else None)


@dataclass(frozen=True)
class _Stretch:
    """Tokens [start, stop) of one document, or one BOS (document −1) or EOS that is no text."""

    start: int
    stop: int
    document: int
    is_sign: bool


def _is_sign(tokens: Tokens, eos: int | None) -> Bool[np.ndarray, "tokens"]:
    """Tokens that stand beside the text: BOS, of no document, and EOS without characters."""
    closing = (
        np.zeros(len(tokens), bool) if eos is None else (tokens.ids == eos) & (tokens.char_start == tokens.char_end)
    )
    return (tokens.document < 0) | closing


def _stretches(tokens: Tokens, eos: int | None) -> list[_Stretch]:
    sign = _is_sign(tokens, eos)
    new = np.append(True, (np.diff(tokens.document) != 0) | sign[1:] | sign[:-1])
    starts = np.flatnonzero(new).tolist()
    spans = zip(starts, [*starts[1:], len(tokens)], strict=True)
    return [_Stretch(start, stop, int(tokens.document[start]), bool(sign[start])) for start, stop in spans]


def _encode(reader: _Reader, texts: Sequence[str]) -> list[tuple[list[int], Spelled]]:
    if not texts:
        return []
    found = reader.tokenizer(
        list(texts), add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    rows = zip(texts, found["input_ids"], found["offset_mapping"], strict=True)
    return [(ids, reader.spelling.place(text, ids, offsets)) for text, ids, offsets in rows]


class _Made:
    """A reading that grows, stretch by stretch."""

    def __init__(self, reader: _Reader, num_tokens: int) -> None:
        self._bos = cast("int | None", reader.tokenizer.bos_token_id)
        self._eos = cast("int | None", reader.tokenizer.eos_token_id)
        self._most = reader.most_tokens
        self._ids: list[int] = [] if self._bos is None else [self._bos]
        self._places = np.full(num_tokens, -1, dtype=np.int32)
        self._text_tokens = self._unlike = 0

    def add_all(self, stretches: Sequence[_Stretch], texts: Sequence[tuple[list[int], _OneSide]]) -> None:
        """All stretches of a context; `texts` has those that are text."""
        remaining, before = iter(texts), None
        for stretch in stretches:
            if stretch.is_sign:
                self.add_sign(stretch)
            else:
                if before is not None and not before.is_sign:
                    self.separate()
                self.add_text(stretch, *next(remaining))
            before = stretch

    def add_sign(self, stretch: _Stretch) -> None:
        """BOS or EOS of the text's own, to which this tokenizer's answers where it has one."""
        if stretch.document < 0 and self._bos is not None:
            self._places[stretch.start] = 0
        elif stretch.document >= 0 and self._eos is not None:
            self._places[stretch.start] = len(self._ids)
            self.separate()

    def separate(self) -> None:
        """An end of a document."""
        if self._eos is not None:
            self._ids.append(self._eos)

    def add_text(self, stretch: _Stretch, ids: Sequence[int], own: _OneSide) -> None:
        """A stretch of text, with its windows."""
        self._places[stretch.start + own.last] = len(self._ids) + own.partner
        self._unlike += own.unlike
        self._ids += ids
        self._text_tokens += len(ids)

    def reading(self) -> Reading:
        """What was made, cut to what the models have positions for."""
        most = len(self._ids) if self._most is None else self._most
        beyond = self._places >= most
        places = np.where(beyond, np.int32(-1), self._places)
        ids = np.array(self._ids[:most], dtype=np.int32)
        return Reading(ids, places, num_tokens=self._text_tokens, unlike=self._unlike, beyond=int(beyond.sum()))


@dataclass(frozen=True)
class _OneSide:
    """The windows that give a row, by their last tokens in the text's own and in one other tokenization."""

    last: Int[np.ndarray, "rows"]
    partner: Int[np.ndarray, "rows"]
    unlike: int


@dataclass(frozen=True)
class Windows:
    """The windows of a text in several tokenizations, its own first: the last token that each has in every one.

    `exact` says whether all tokens that a tokenization has in a window spell what the text has there.
    """

    last: Int[np.ndarray, "tokenizations windows"]
    exact: Bool[np.ndarray, "tokenizations windows"]

    def of(self, other: int) -> _OneSide:
        """What concerns the text's own and one other tokenization, by its number among the others."""
        alike = self.exact.all(0)
        unlike = int((~self.exact[0] | ~self.exact[1 + other]).sum())
        return _OneSide(self.last[0][alike], self.last[1 + other][alike], unlike)


def windows(own: Spelled, others: Sequence[Spelled]) -> Windows:
    """The smallest spans of bytes that begin and end with whole tokens in all tokenizations."""
    stops = np.unique(own.ends)
    for other in others:
        stops = np.intersect1d(stops, other.ends)
    stops = stops[stops > 0]
    every = [own, *others]
    last = np.stack([np.searchsorted(each.ends, stops, side="right") - 1 for each in every])
    wrong = [np.append(0, np.cumsum(~each.exact, dtype=np.int64)[row]) for each, row in zip(every, last, strict=True)]
    return Windows(last, np.diff(np.stack(wrong), axis=1) == 0)


def _reader(models: Mapping[str, StudiedModel]) -> _Reader:
    tokenizer = deepcopy(next(iter(models.values())).tokenizer)  # used by threads, while its owner may change his
    limits = [studied.max_positions for studied in models.values() if studied.max_positions is not None]
    return _Reader(tokenizer, Spelling.of(tokenizer), tuple(models), min(limits, default=None))


def _unspoken(alias: str) -> TokenizerMismatch:
    return TokenizerMismatch(
        f"the tokenizer of {alias!r} does not keep white space, so that its tokens are not enough to give the text to "
        "another tokenizer.",
        hint="Set text.tokenizer to a model with byte-level or sentence-piece tokens.",
    )
