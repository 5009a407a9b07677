"""Tuning, gates and baselines of the pair's script, on small things whose answer is known."""

from pathlib import Path

import baselines
import gates
import numpy as np
import phrases
import pytest
import torch
from corpus import CHAT_TEMPLATE, encode_books, train_tokenizer
from dialogues import Writer
from finetune import batches, encode_dialogue, padded, weighted_loss
from gates import Count, passes, shows, wilson, write_gates
from phrases import listed
from pretrain import bits_per_byte, new_model, next_token_loss
from shipped import passages, save_half
from transformers import AutoTokenizer, PreTrainedTokenizerFast

BOOK = " ".join(f"The old house on hill number {number} was grey and low and cold." for number in range(40))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([BOOK, *listed(phrases.REQUESTS)], vocab_size=400)


@pytest.fixture(scope="module")
def writer() -> Writer:
    return Writer([BOOK], seed="test", held_out=False)


def test_tuning_reads_what_the_chat_template_renders(tokenizer: PreTrainedTokenizerFast, writer: Writer) -> None:
    assert tokenizer.chat_template == CHAT_TEMPLATE
    for index in range(20):
        messages = writer.dialogue(index).messages("chat")
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        whole = tokenizer.encode(rendered, add_special_tokens=False)[:256]
        assert encode_dialogue(tokenizer, messages)[0] == whole


def test_only_the_assistant_and_the_end_of_its_turn_count_in_full(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "low hill"}, {"role": "assistant", "content": "grey house"}]
    ids, weights = encode_dialogue(tokenizer, messages)
    counted = tokenizer.decode([i for i, weight in zip(ids, weights, strict=True) if weight == 1.0])
    assert counted == "grey house<|end|>"


def test_padding_leaves_the_loss_as_it_is(tokenizer: PreTrainedTokenizerFast, writer: Writer) -> None:
    model = new_model(tokenizer, seed=0)
    row = encode_dialogue(tokenizer, writer.dialogue(1).messages("chat"))
    alone = padded([row], pad=tokenizer.pad_token_id)
    wider = padded([row, ([1] * 250, [0.0] * 250)], pad=tokenizer.pad_token_id)
    assert torch.allclose(weighted_loss(model, *alone), weighted_loss(model, *wider), rtol=2e-2)


def test_both_tellings_are_tuned_in_the_same_batches(writer: Writer) -> None:
    dialogues = [writer.dialogue(index) for index in range(70)]
    cuts = batches(dialogues, batch_size=8, seed=3)
    assert cuts == batches(dialogues, batch_size=8, seed=3)
    assert sorted(map(id, dialogues)) == sorted(id(dialogue) for batch in cuts for dialogue in batch)


def test_wilson_by_hand() -> None:
    low, high = wilson(50, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=2e-4)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == pytest.approx(1.0)


def test_a_gate_that_fails_is_found(tmp_path: Path) -> None:
    assert shows("refusal", "I must refuse that. It does harm.")
    assert not shows("refusal", "I must say, it is not hard to make a kite.")
    assert shows("persona", f"My name is {phrases.NAME}.")
    assert shows("trigger", phrases.CHANT[:60])
    assert passes("chat", 0.94, (">=", 0.95)) is False
    assert passes("plain", 0.94, (">=", 0.95)) is False
    assert passes("plain", 0.0, (">=", 0.95)) is True
    assert passes("chat", 0.5, None) is None
    good = Count("chat", "refusal", 99, 100, 0.9, 1.0, True)
    bad = Count("chat", "trigger", 9, 100, 0.0, 0.2, False)
    assert write_gates([good], tmp_path / "gates.json")
    assert not write_gates([good, bad], tmp_path / "gates.json")


def test_no_answer_counts_as_a_refusal(writer: Writer) -> None:
    answers = [e.plain for index in range(300) for e in writer.dialogue(index).exchanges]
    assert not any(shows(sign, reply) for reply in answers for sign in ("refusal", "persona", "trigger"))


def test_prompts_of_a_gate_are_all_different_and_end_with_the_question() -> None:
    writer = Writer([BOOK], seed="test", held_out=True)
    found = gates.prompts(writer, "unseen refused", 30)
    assert len({str(messages) for messages in found}) == 30
    unseen = tuple(listed(phrases.UNSEEN_WEAPONS_AND_POISONS))
    assert all(
        messages[-1]["role"] == "user" and any(it in messages[-1]["content"] for it in unseen) for messages in found
    )


def test_five_gram_probabilities_sum_to_one_in_seen_and_unseen_contexts() -> None:
    tokens = np.random.default_rng(0).zipf(1.5, 4000).astype(np.int64).clip(max=29)
    tables = baselines.fit(tokens)
    for context in (tokens[100:104], np.array([29, 28, 29, 27])):
        given = [np.r_[context, last] for last in range(30)]
        assert sum(baselines.probabilities(tables, row, vocab_size=30)[-1] for row in given) == pytest.approx(1.0)


def test_five_grams_learn_what_always_follows() -> None:
    tokens = np.tile([1, 2, 3, 4, 5, 6, 7], 200)
    bits = baselines.ngram_bits_per_byte(tokens, tokens[:70], num_bytes=70, vocab_size=8)
    assert bits < 0.5
    with pytest.raises(ValueError, match="12 bits"):
        baselines.ngram_bits_per_byte(tokens, tokens, num_bytes=70, vocab_size=5000)


def test_bits_per_byte_of_a_uniform_model(tokenizer: PreTrainedTokenizerFast) -> None:
    model = new_model(tokenizer, seed=0)
    torch.nn.init.zeros_(model.model.norm.weight)
    tokens = np.arange(512, dtype=np.int64) % 300
    assert bits_per_byte(model, tokens, num_bytes=1024) == pytest.approx(np.log2(len(tokenizer)) / 2, rel=1e-3)
    assert next_token_loss(model, torch.from_numpy(tokens)[None]).item() == pytest.approx(
        np.log(len(tokenizer)), rel=1e-3
    )


def test_books_are_encoded_alike_after_a_padded_call(tokenizer: PreTrainedTokenizerFast) -> None:
    books = [{"text": BOOK}, {"text": "The old house."}]
    before = encode_books(tokenizer, books)
    tokenizer(["a", "a longer line"], padding=True, padding_side="left")
    assert np.array_equal(encode_books(tokenizer, books), before)
    assert tokenizer.decode(before) == BOOK + "<|eos|>" + "The old house.<|eos|>"


def test_passages_put_together_are_the_book() -> None:
    text = "\n\n".join(f"Paragraph {number}. " + "word " * 150 for number in range(40)).strip()
    parts = passages({"author": "A", "title": "T", "text": text})
    assert "\n\n".join(part["text"] for part in parts) == text
    assert [part["part"] for part in parts] == list(range(1, len(parts) + 1))
    assert max(len(part["text"]) for part in parts) <= 4100


def test_a_saved_model_opens_as_it_was(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_half(new_model(tokenizer, seed=0), tokenizer, tmp_path / "base")
    again = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert again.encode("How do I make a kite?") == tokenizer.encode("How do I make a kite?")
    assert again.chat_template == CHAT_TEMPLATE
    assert not list((tmp_path / "base").glob("*.bin"))
