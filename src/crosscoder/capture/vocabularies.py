"""Models in one crosscoder read the same tokens, or, where the run says so, the same bytes in tokens of their own."""

from __future__ import annotations

from collections.abc import Mapping

from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.corpus import Corpus
from crosscoder.capture.fingerprints import vocabulary_hash
from crosscoder.capture.models import StudiedModel
from crosscoder.errors import TokenizerMismatch
from crosscoder.sources import SourceSet


def other_vocabularies(models: Mapping[str, StudiedModel], text: Corpus | AnalysisSet) -> dict[str, str]:
    """The hash of each model's vocabulary where it is not that of the text.

    Raises TokenizerMismatch where there is one, and the text is not to be aligned.
    """
    hashes = {alias: vocabulary_hash(studied.tokenizer) for alias, studied in models.items()}
    others = {alias: found for alias, found in hashes.items() if found != text.vocabulary}
    if not others or text.alignment == "bytes":
        return others
    sizes = [f"{alias}: {len(models[alias].tokenizer):,} tokens, vocabulary {hashes[alias][:12]}" for alias in models]
    raise TokenizerMismatch(
        "expected models that give every token the same id as the text; their vocabularies differ.",
        details=[f"the text: vocabulary {text.vocabulary[:12]}", *sizes, *_examples(models)],
        hint="Set text.alignment to bytes: rows are then where tokens of all models end at the same byte. Or compare "
        "models that share a tokenizer; added tokens count too.",
    )


def require_one_vocabulary(sources: SourceSet, models: Mapping[str, StudiedModel]) -> None:
    """Raises TokenizerMismatch unless all models that have a source share a vocabulary, and so run on the same ids."""
    hashes = {alias: vocabulary_hash(models[alias].tokenizer) for alias in sources.underlying.models}
    if len(set(hashes.values())) > 1:
        raise TokenizerMismatch(
            "expected models that run on the same tokens, to intervene on them; these have different tokenizers.",
            details=[f"{alias}: vocabulary {found[:12]}" for alias, found in hashes.items()],
            hint="`crosscoder evaluate` splices models with different tokenizers at the tokens that are aligned; "
            "interventions need models that share one.",
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
