"""Models in one crosscoder read the same tokens, so every token must have the same id in all of them."""

from __future__ import annotations

from collections.abc import Mapping

from crosscoder.capture.fingerprints import vocabulary_hash
from crosscoder.capture.models import StudiedModel
from crosscoder.errors import TokenizerMismatch


def check_vocabularies(models: Mapping[str, StudiedModel], *, expected: str) -> None:
    """Raises TokenizerMismatch unless every model's vocabulary has the hash `expected`, that of the text."""
    hashes = {alias: vocabulary_hash(studied.tokenizer) for alias, studied in models.items()}
    if set(hashes.values()) <= {expected}:
        return
    sizes = [f"{alias}: {len(models[alias].tokenizer):,} tokens, vocabulary {hashes[alias][:12]}" for alias in models]
    raise TokenizerMismatch(
        "expected models that give every token the same id as the text; their vocabularies differ.",
        details=[f"the text: vocabulary {expected[:12]}", *sizes, *_examples(models)],
        hint="Compare models that share a tokenizer; added tokens count too.",
    )


def _examples(models: Mapping[str, StudiedModel]) -> list[str]:
    """A few tokens on which the first model and another one differ."""
    first, *others = models
    own = models[first].tokenizer.get_vocab()
    for other in others:
        theirs = models[other].tokenizer.get_vocab()
        tokens = sorted(token for token in own.keys() | theirs.keys() if own.get(token) != theirs.get(token))
        if tokens:
            return [f"{token!r}: {own.get(token)} in {first}, {theirs.get(token)} in {other}" for token in tokens[:4]]
    return []
