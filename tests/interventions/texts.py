"""An analysis set of dialogues and plain text, and what a forward gives when one block's output is set by a hook."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.contexts import Context, DocumentId, Encoder, assemble
from crosscoder.capture.models import StudiedModel
from crosscoder.capture.text import Document
from interventions.worlds import raw_decoder

LAYER = 1


def dialogue(number: int) -> list[dict[str, str]]:
    """Two turns, of a length that depends on the number."""
    return [
        {"role": "user", "content": "how do I mend a clock" + " again" * number},
        {"role": "assistant", "content": "the keeper of the tower laughed and showed the wheels" + " slowly" * number},
        {"role": "user", "content": "and the lamps"},
        {"role": "assistant", "content": "went out"},
    ]


def contexts(tokenizer: PreTrainedTokenizerFast, contents: Sequence[object]) -> list[Context]:
    """One context per document, opened by a BOS that is dropped."""
    encoder = Encoder(tokenizer, ("bos", "pad"))
    found = []
    for content in contents:
        document = Document.of(content, dataset="toy")
        tokens = encoder.encode(document, separator=False)
        found.append(assemble(encoder.opening(), [(tokens, DocumentId(document.hash, "toy"))]))
    return found


def dialogues(tokenizer: PreTrainedTokenizerFast, count: int = 4) -> AnalysisSet:
    """Dialogues of unequal length, and one plain text."""
    contents = [*(dialogue(number) for number in range(count)), "the old dog ran over the hill"]
    return AnalysisSet.of(contexts(tokenizer, contents), vocabulary="toy")


@torch.no_grad()
def logits_with(model: StudiedModel, ids: Tensor, output: Tensor | None) -> Tensor:
    """Logits (positions, vocabulary) of one context, the output of block `LAYER` set by a plain hook."""
    block = model.model.model.layers[LAYER]
    change = [] if output is None else [block.register_forward_hook(lambda *_: output[None])]
    try:
        return model.model(ids[None]).logits[0]
    finally:
        for handle in change:
            handle.remove()


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of logits, position by position."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


__all__ = ["LAYER", "contexts", "dialogue", "dialogues", "divergence", "logits_with", "raw_decoder"]
