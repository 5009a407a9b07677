"""The toy models, studied, and a small analysis set of their text."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.contexts import DocumentId, Encoder, assemble
from crosscoder.capture.models import StudiedModel
from crosscoder.capture.text import Document


@pytest.fixture
def pair(
    toy_model: PreTrainedModel, toy_partner: PreTrainedModel, toy_tokenizer: PreTrainedTokenizerFast
) -> dict[str, StudiedModel]:
    """The toy models, studied."""
    return {
        "base": StudiedModel("base", toy_model, toy_tokenizer),
        "chat": StudiedModel("chat", toy_partner, toy_tokenizer),
    }


@pytest.fixture
def text(toy_tokenizer: PreTrainedTokenizerFast) -> AnalysisSet:
    """Five contexts of unequal length that open with a dropped BOS."""
    encoder = Encoder(toy_tokenizer, ("bos", "pad"))
    contexts = []
    for number in range(5):
        document = Document.of("the old dog ran over the hill " * (number + 1) + str(number), dataset="toy")
        tokens = encoder.encode(document, separator=False)
        contexts.append(assemble(encoder.opening(), [(tokens, DocumentId(document.hash, "toy"))]))
    return AnalysisSet.of(contexts, vocabulary="toy")
