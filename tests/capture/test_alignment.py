"""Rows of models with different tokenizers: where all of them have read the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from capture.families import build
from capture.tokenizers_of_kinds import STRANGE, byte_level, pieces, unigram, word_pieces, wrapped
from conftest import toy_texts
from crosscoder.capture import Document, StudiedModel
from crosscoder.capture.alignment import Aligner, windows
from crosscoder.capture.contexts import Context, DocumentId, Encoder, Tokens, assemble
from crosscoder.capture.fingerprints import vocabulary_hash
from crosscoder.capture.spelling import Spelled, Spelling
from crosscoder.errors import TokenizerMismatch

SMALL, LARGE, BARE = byte_level(300), byte_level(600), byte_level(450, bos=False)
PIECES, UNIGRAM, WORDS = pieces(), unigram(), word_pieces()


def aligner(own: PreTrainedTokenizerFast, *others: PreTrainedTokenizerFast, positions: int = 2048) -> Aligner:
    """The aligner of models with these tokenizers."""
    model = build("llama")
    model.config.max_position_embeddings = positions
    names = ("own", "b", "c", "d")
    studied = {n: StudiedModel(n, model, t) for n, t in zip(names, (own, *others), strict=False)}
    made = Aligner.of(studied, vocabulary=vocabulary_hash(own))
    assert made is not None
    return made


def context(tokenizer: PreTrainedTokenizerFast, *texts: str, separator: bool = True) -> Context:
    """Documents one after the other, behind BOS where there is one."""
    encoder = Encoder(tokenizer, ("bos",))
    documents = [Document.of(text, dataset="toy") for text in texts]
    parts = [(encoder.encode(d, separator=separator), DocumentId(d.hash, "toy")) for d in documents]
    return assemble(encoder.opening(), parts)


def spelled(tokenizer: PreTrainedTokenizerFast, token: int) -> bytes:
    """The bytes of a token, by transformers' own table."""
    text = tokenizer.convert_ids_to_tokens(token)
    if tokenizer in (SMALL, LARGE, BARE):
        table = {c: b for b, c in bytes_to_unicode().items()}
        return bytes(table[c] for c in text) if token not in tokenizer.added_tokens_decoder else text.encode()
    if text.startswith("<0x"):
        return bytes([int(text[3:5], 16)])
    return text.replace("▁", " ").encode()


def greedy(own: Sequence[bytes], other: Sequence[bytes]) -> list[tuple[int, int]]:
    """Window expansion: take tokens of whichever side is behind until both have the same bytes."""
    found, i, j, left, right = [], 0, 0, b"", b""
    while i < len(own) and j < len(other):
        left, right = left + own[i], right + other[j]
        while len(left) != len(right):
            if len(left) < len(right):
                i += 1
                left += own[i]
            else:
                j += 1
                right += other[j]
        assert left == right
        found.append((i, j))
        i, j, left, right = i + 1, j + 1, b"", b""
    return found


def pairs(aligned: Context) -> list[tuple[int, int]]:
    """Aligned tokens that are text, by their places among those of the text."""
    (reading,) = aligned.readings.values()
    places = [(p, int(q)) for p, q in enumerate(reading.places) if q >= 0 and aligned.tokens.document[p] >= 0]
    return places


def test_windows_by_hand() -> None:
    """ab|cd|e against a|bcd|e: the spans abcd and e; a token of no bytes belongs to what is before it."""
    yes = np.ones(3, bool)
    found = windows(Spelled(np.array([2, 4, 5]), yes), [Spelled(np.array([1, 4, 5]), yes)])
    assert found.last.tolist() == [[1, 2], [1, 2]] and found.exact.all()
    empty = windows(Spelled(np.array([2, 2, 4]), yes), [Spelled(np.array([0, 2, 4]), np.array([True, False, True]))])
    assert empty.last.tolist() == [[1, 2], [1, 2]]
    assert empty.exact.tolist() == [[True, True], [False, True]]


TEXT = st.lists(st.sampled_from([*STRANGE[:4], *toy_texts(6), "é", "🙂", " ", "\n\n", "ing"]), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(parts=TEXT, pair=st.sampled_from([(SMALL, LARGE), (LARGE, SMALL), (LARGE, BARE), (PIECES, LARGE)]))
def test_windows_are_those_of_greedy_expansion(parts: list[str], pair: tuple[Any, Any]) -> None:
    """Byte-identical windows, as small as can be, in byte-level vocabularies of different sizes."""
    own, other = pair
    one = context(own, "x" + "".join(parts), separator=False)
    aligned = aligner(own, other)(one)
    (reading,) = aligned.readings.values()
    start, shift = int(own.bos_token_id is not None), int(other.bos_token_id is not None)
    ours = [spelled(own, int(token)) for token in one.tokens.ids[start:]]
    ours[0] = ours[0].removeprefix(b" ")
    theirs = [spelled(other, int(token)) for token in reading.ids[shift:]]
    assert b"".join(ours) == b"".join(theirs) == ("x" + "".join(parts)).encode()
    assert pairs(aligned) == [(i + start, j + shift) for i, j in greedy(ours, theirs)]


@pytest.mark.parametrize("other", [PIECES, UNIGRAM])
def test_a_space_put_before_the_text_is_not_of_it(other: PreTrainedTokenizerFast) -> None:
    """Sentence pieces open every text with a space; the windows are those of the text all the same."""
    aligned = aligner(LARGE, other)(context(LARGE, "the old house stood", separator=False))
    (reading,) = aligned.readings.values()
    read = [
        b"".join(spelled(other, int(t)) for t in reading.ids[: q + 1]).removeprefix(b"<s>") for _, q in pairs(aligned)
    ]
    ours = [b"".join(spelled(LARGE, int(t)) for t in aligned.tokens.ids[1 : p + 1]) for p, _ in pairs(aligned)]
    assert [r.removeprefix(b" ") for r in read] == ours and ours[-1] == b"the old house stood" and len(ours) >= 4


def test_bytes_of_one_character_in_several_tokens() -> None:
    """A row after part of a character only where both tokenizers end there; both split the emoji, at other bytes."""
    aligned = aligner(SMALL, LARGE)(context(SMALL, "a 🙂🙃 b", separator=False))
    (reading,) = aligned.readings.values()
    assert (reading.num_tokens, len(aligned.tokens)) == (len(reading.ids) - 1, 1 + len("a 🙂🙃 b".encode()) - 1)
    read = [b"".join(spelled(LARGE, int(t)) for t in reading.ids[1 : q + 1]) for _, q in pairs(aligned)]
    assert read[-1] == "a 🙂🙃 b".encode() and all("a 🙂🙃 b".encode().startswith(r) for r in read)


def test_signs_stand_for_each_other() -> None:
    """BOS with BOS and EOS with EOS, each tokenizer's own, and the documents are tokenized one by one."""
    aligned = aligner(SMALL, LARGE)(context(SMALL, "ab", "cd"))
    (reading,) = aligned.readings.values()
    assert aligned.tokens.ids.tolist() == [0, *SMALL("ab")["input_ids"], 1, *SMALL("cd")["input_ids"], 1]
    assert reading.ids.tolist() == [0, *LARGE("ab")["input_ids"], 1, *LARGE("cd")["input_ids"], 1]
    assert reading.places[0] == 0 and reading.places[-1] == len(reading.ids) - 1
    assert not aligned.tokens.kept[0] and aligned.tokens.kept[-1]


def test_signs_that_one_side_lacks() -> None:
    """No row at BOS or EOS without a partner; a tokenizer that has them gets them all the same."""
    without = aligner(LARGE, BARE)(context(LARGE, "ab", "cd"))
    (reading,) = without.readings.values()
    assert reading.ids.tolist() == [*BARE("ab")["input_ids"], *BARE("cd")["input_ids"]]
    assert (reading.places[without.tokens.ids < 2] == -1).all() and not without.tokens.kept[-1]
    (reading,) = aligner(BARE, LARGE)(context(BARE, "ab", "cd")).readings.values()
    assert reading.ids.tolist() == [0, *LARGE("ab")["input_ids"], 1, *LARGE("cd")["input_ids"]]


def test_unknown_tokens_and_changed_letters_give_no_row() -> None:
    """[UNK] and a capital that is read small cost their windows, and only theirs; white space costs none."""
    text = "The old house, ☃ stood at the end"
    aligned = aligner(LARGE, WORDS)(context(LARGE, text, separator=False))
    tokens = [spelled(LARGE, int(t)).decode("utf-8", "replace") for t in aligned.tokens.ids]
    rows = [token for token, kept in zip(tokens, aligned.tokens.kept, strict=True) if kept]
    (reading,) = aligned.readings.values()
    assert rows == [" old", " house", ",", " stood", " at", " the", " end"] and reading.unlike == 2
    counts = aligner(LARGE, WORDS).count([aligned])
    assert counts.num_windows == 7 and counts.unlike == {"own": 0, "b": 2}
    assert counts.num_tokens == {"own": len(tokens) - 1, "b": len(reading.ids)}
    assert counts.lost["own"] == 1 - 7 / (len(tokens) - 1)


def test_an_unknown_token_of_the_texts_own() -> None:
    """What it stood for is gone: the other models read U+FFFD there, and there is no row."""
    aligned = aligner(UNIGRAM, LARGE)(context(UNIGRAM, "old ☃ house", separator=False))
    (reading,) = aligned.readings.values()
    assert b"".join(spelled(LARGE, int(t)) for t in reading.ids[1:]).decode() == "old \ufffd house"
    unknown = aligned.tokens.ids == UNIGRAM.unk_token_id
    assert unknown.any() and not aligned.tokens.kept[unknown].any() and aligned.tokens.kept[-1]


def test_added_tokens_are_read_as_text_by_who_lacks_them() -> None:
    """A role token is one token here and several there: one window; with a flag that eats white space, still right."""
    own = byte_level(600)
    own.add_tokens([AddedToken("<|user|>", special=True, rstrip=True), AddedToken("<|end|>", special=True)])
    aligned = aligner(own, SMALL)(context(own, "<|user|>who<|end|>", separator=False))
    (reading,) = aligned.readings.values()
    assert b"".join(spelled(SMALL, int(t)) for t in reading.ids[1:]) == b"<|user|>who<|end|>"
    assert pairs(aligned)[0] == (1, len(SMALL("<|user|>")["input_ids"]))
    back = aligner(SMALL, own)(context(SMALL, "<|user|> who<|end|>", separator=False))
    (reading,) = back.readings.values()
    ends = [b"".join(spelled(SMALL, int(t)) for t in back.tokens.ids[1 : p + 1]) for p, _ in pairs(back)]
    assert ends[0] == b"<|user|>" and ends[-1] == b"<|user|> who<|end|>" and b"<|user|> " not in ends


def test_a_context_that_begins_and_ends_inside_a_character() -> None:
    """Loose bytes at the ends are no text: the others read what lies between, and rows are only there."""
    whole = context(SMALL, "🙂 the old house 🙂", separator=False)
    piece = whole.tokens.window(2, len(whole) - 1)
    cut = assemble(Encoder(SMALL, ("bos",)).opening(), [(piece, whole.documents[0])])
    aligned = aligner(SMALL, LARGE)(cut)
    (reading,) = aligned.readings.values()
    assert b"".join(spelled(LARGE, int(t)) for t in reading.ids[1:]) == b" the old house "
    kept = aligned.tokens.kept
    assert not kept[:4].any() and kept[4:-3].any() and not kept[-3:].any()


def test_a_context_that_begins_inside_a_word() -> None:
    """What came before is not read by anyone; sentence pieces put their space there."""
    tokens = context(LARGE, "the old house stood", separator=False).tokens
    cut = assemble(None, [(tokens.window(2, len(tokens)), DocumentId("x", "toy"))])
    (reading,) = (aligned := aligner(LARGE, PIECES)(cut)).readings.values()
    text = b"".join(spelled(LARGE, int(t)) for t in cut.tokens.ids)
    assert b"".join(spelled(PIECES, int(t)) for t in reading.ids[1:]) in (text, b" " + text)
    assert aligned.tokens.kept[-1]


def test_tokens_beyond_the_positions_of_a_model_are_not_read() -> None:
    """64 positions: rows end where the other tokenization does."""
    text = " ".join(toy_texts(3))
    limited = aligner(LARGE, SMALL, positions=64)
    aligned = limited(context(LARGE, text, separator=False))
    (reading,) = aligned.readings.values()
    last = int(np.flatnonzero(aligned.tokens.kept)[-1])
    assert len(reading.ids) == 64 and reading.places.max() <= 63 and last < len(aligned) - 1
    assert reading.beyond > 0 and limited.count([aligned]).beyond == {"own": 0, "b": reading.beyond}


def test_three_tokenizers_at_once() -> None:
    """Windows are common to all, and one that any of them spells otherwise is lost to all."""
    text = "The old house stood at the end of a long lane"
    aligned = aligner(LARGE, SMALL, WORDS)(context(LARGE, text, separator=False))
    small, words = aligned.readings.values()
    assert ((small.places >= 0) == (words.places >= 0)).all() or small.places[0] == 0
    rows = [spelled(LARGE, int(t)) for t in aligned.tokens.ids[aligned.tokens.kept]]
    assert b"".join(rows)[:4] == b" old" and rows[-1] == b" lane"


def test_a_window_with_any_wrong_token_is_lost_whole() -> None:
    """The wrong token of one tokenization lies before the end of a window that only a third makes so long."""
    yes, wrong = np.ones(3, bool), np.array([False, True, True])
    one, other = Spelled(np.array([1, 2, 3]), yes), Spelled(np.array([1, 2, 3]), wrong)
    found = windows(one, [other, Spelled(np.array([2, 3]), np.ones(2, bool))])
    assert found.last.tolist() == [[1, 2], [1, 2], [0, 1]]
    assert found.exact.all(0).tolist() == [False, True] and found.of(0).last.tolist() == [2]


def test_text_that_is_normalised_ends_where_its_characters_do() -> None:
    """A tokenizer that composes characters spells other bytes: those windows are lost, and what follows is in step.

    tokenizers gives the composed letter the characters of its first half: the other half goes with the next window.
    """
    core = Tokenizer.from_str(LARGE.backend_tokenizer.to_str())
    core.normalizer = normalizers.NFC()
    composing = wrapped(core, bos_token="<s>", eos_token="</s>")
    composing.add_tokens(["<|x|>"])
    aligned = aligner(LARGE, composing)(context(LARGE, "the cafe\u0301 stood still", separator=False))
    rows = [spelled(LARGE, int(t)) for t in aligned.tokens.ids[aligned.tokens.kept]]
    (reading,) = aligned.readings.values()
    assert reading.unlike == 2 and rows == [b"t", b"he", b" still"]


def test_a_text_without_a_token() -> None:
    """Nothing to align is no error."""
    empty = Context(Tokens.join([context(LARGE, "a").tokens.window(0, 1)]), ())
    (reading,) = aligner(LARGE, SMALL)(empty).readings.values()
    assert reading.ids.tolist() == [0] and reading.num_tokens == 0


def test_who_can_be_aligned() -> None:
    """Shared vocabularies need nothing; a text's own tokenizer keeps white space; unknown kinds are refused."""
    model = build("llama")
    same = {name: StudiedModel(name, model, LARGE) for name in "ab"}
    assert Aligner.of(same, vocabulary=vocabulary_hash(LARGE)) is None
    with pytest.raises(TokenizerMismatch, match="none of these has its vocabulary"):
        Aligner.of(same, vocabulary="another")
    with pytest.raises(TokenizerMismatch, match=r"(?s)'own' does not keep white space.*text\.tokenizer"):
        aligner(WORDS, LARGE)
    strange = Tokenizer(models.BPE(vocab={"a</w>": 0}, merges=[]))
    strange.decoder = decoders.BPEDecoder()
    with pytest.raises(TokenizerMismatch, match="decoder is BPEDecoder"):
        Spelling.of(wrapped(strange))
