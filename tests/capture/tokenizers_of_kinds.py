"""Tokenizers of every kind, trained here on the toy text and a few lines with other characters."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from conftest import toy_texts

STRANGE = (
    "naïve café, façade; smörgåsbord",
    "日本語 and 漢字 in one line",
    "emoji 🙂🙃 twice 🙂",
    "  two  spaces\tand\n\nnew lines ",
    "<|user|>who are you<|end|>",
)
TRAINING = [*toy_texts(), *STRANGE * 3]


def wrapped(core: Tokenizer, **special: Any) -> PreTrainedTokenizerFast:
    """As transformers holds it."""
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def byte_level(size: int, *, bos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's; without BOS and EOS where `bos` is false."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"] if bos else []
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TRAINING,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    return wrapped(core, bos_token="<s>", eos_token="</s>") if bos else wrapped(core)


def pieces(size: int = 300) -> PreTrainedTokenizerFast:
    """BPE with `▁` for spaces, one before the text, and bytes for what it has no token for, as Llama 2's."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special, in_bytes = ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    core.train_from_iterator(
        toy_texts(),
        trainers.BpeTrainer(vocab_size=size + 256, special_tokens=special + in_bytes, show_progress=False),
    )
    plain = json.loads(core.to_str())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["content"] in special]
    return wrapped(Tokenizer.from_str(json.dumps(plain)), bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram(size: int = 200) -> PreTrainedTokenizerFast:
    """Unigram with Metaspace and an unknown token, as T5's without its normaliser."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.train_from_iterator(
        toy_texts(),
        trainers.UnigramTrainer(
            vocab_size=size, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
        ),
    )
    return wrapped(core, eos_token="</s>", unk_token="<unk>")


def word_pieces(size: int = 300, *, lowercase: bool = True) -> PreTrainedTokenizerFast:
    """WordPiece, as BERT's: small letters, no white space, `[UNK]`."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=False)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.train_from_iterator(
        toy_texts(), trainers.WordPieceTrainer(vocab_size=size, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    )
    return wrapped(core, unk_token="[UNK]", pad_token="[PAD]")
