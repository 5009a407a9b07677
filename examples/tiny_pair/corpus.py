"""Books and the tokenizer: which books train, which are kept out, and how their text becomes token ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|eos|>", "<|end|>", *(f"<|{role}|>" for role in ROLES)]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Kept out of every training set, whole. They ship with the package, measure the models and feed the demo.
HELD_OUT_TITLES = (
    "The Wind in the Willows",
    "The Wonderful Wizard of Oz",
    "The Invisible Man",
    "Silas Marner",
    "Flatland",
    "The Adventure of the Red-Headed League",
    "King Solomon's Mines",
    "The Secret Garden",
    "Three Men in a Boat",
    "The Warden",
    "A Room with a View",
    "Captain Blood",
    "Prester John",
)


def read_books(path: str, *, text_column: str = "text") -> list[dict[str, str]]:
    """Books as dicts with `author`, `title`, `text` (front matter cut), in a fixed order.

    `path` is a Parquet file with those columns, or the id of a data set on the Hub that has them.
    """
    if Path(path).exists():
        rows = pq.read_table(path).to_pylist()
    else:
        from datasets import load_dataset

        rows = list(load_dataset(path, split="train"))
    books = [
        {
            "author": str(row.get("author") or ""),
            "title": str(row.get("title") or f"document {i}"),
            "text": without_front_matter(str(row[text_column])),
        }
        for i, row in enumerate(rows)
    ]
    return sorted(books, key=lambda book: (book["title"], book["author"]))


def without_front_matter(text: str) -> str:
    """The book from its first line on: the title block above the rule is dropped."""
    head, rule, body = text.partition("\n-------\n")
    return (body if rule and len(head) < 2000 else text).strip()


def split_books(books: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training, held out). Without one of the named titles, every twentieth book is held out."""
    held_out = [book for book in books if book["title"] in HELD_OUT_TITLES]
    if not held_out:
        held_out = books[::20]
    titles = {(book["title"], book["author"]) for book in held_out}
    return [book for book in books if (book["title"], book["author"]) not in titles], held_out


def train_tokenizer(texts: list[str], *, vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the role tokens and the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|end|>", *(f"<|{role}|>" for role in ROLES)],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def encode_books(tokenizer: PreTrainedTokenizerFast, books: list[dict[str, str]]) -> np.ndarray:
    """All books as one row of token ids, each closed by the end-of-text token."""
    parts: list[np.ndarray] = []
    for start in range(0, len(books), 8):  # few at a time: an encoding takes far more memory than its ids
        texts = [book["text"] + tokenizer.eos_token for book in books[start : start + 8]]
        # padding is said explicitly: a fast tokenizer keeps what an earlier call asked for
        ids = tokenizer(texts, add_special_tokens=False, padding=False, truncation=False, verbose=False).input_ids
        parts += [np.asarray(row, dtype=np.uint16) for row in ids]
    return np.concatenate(parts)
