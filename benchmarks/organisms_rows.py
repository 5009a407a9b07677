"""The rows of one organism beside the model that it was tuned from: harvested once, then served from memory.

Text is held-out books and held-out dialogues as the organism tells them; which documents are kept for analysis is
decided by hash, as in any run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import organisms_plants as plants
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from dialogues import Writer
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from crosscoder.activations import Batch, State
from crosscoder.analysis.labels import LabelSpan, LocatedLabels, locate_labels
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.corpus import Corpus
from crosscoder.capture.models import StudiedModel
from crosscoder.capture.stream import ActivationStream
from crosscoder.capture.text import DatasetConfig, HeldOutConfig, TextConfig
from crosscoder.sources import SourceSet

SITE = "layers.4.resid_post"
"""Before the last of six blocks: at `layers.3` the two blocks above can bring a plant about by themselves."""
BEFORE, AFTER = "plain", "organism"
"""Aliases: the model that was tuned, and what came of it."""
BOOK_SHARE = 0.35


@dataclass(frozen=True)
class Rows:
    """Training rows, and the analysis set with its rows: an ActivationSource without end."""

    sources: SourceSet
    x: Float[Tensor, "rows width"]
    analysis: tuple[Batch, ...]
    text: AnalysisSet
    labels: LocatedLabels | None
    seed: int

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All training rows in a seeded order, again and again in others."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(len(self.x), generator=generator)
            for part in order[: len(order) // batch_size * batch_size].split(batch_size):
                yield Batch(self.x[part])

    def contexts(self) -> Iterator[Batch]:
        """The rows of the analysis set."""
        yield from self.analysis

    def state_dict(self) -> State:
        """No state: a cell is trained in one go."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Nothing to restore."""

    @property
    def held_out(self) -> Float[Tensor, "rows width"]:
        """All rows of the analysis set."""
        return torch.cat([batch.x for batch in self.analysis])

    @property
    def tokens(self) -> np.ndarray:
        """The place of every held-out row in the analysis set."""
        rows = [batch.rows for batch in self.analysis if batch.rows is not None]
        return np.concatenate([(self.text.pointers[row.context] + row.position).numpy() for row in rows])


@dataclass(frozen=True)
class Size:
    """How much text: dialogues that are written, rows to train on, tokens of the analysis set."""

    num_dialogues: int
    num_rows: int
    num_held_out: int


def harvest(
    models: dict[str, StudiedModel],
    plant: str | None,
    writer: Writer,
    *,
    books: Path,
    size: Size,
    scratch: Path,
    seed: int,
) -> Rows:
    """Read both models on one text; `plant` tells the dialogues, None leaves them plain."""
    dialogues = scratch / "dialogues.parquet"
    spans = write_dialogues(writer, plant, size.num_dialogues, path=dialogues, model=models[AFTER])
    corpus = Corpus(text_config(books, dialogues, size), models[AFTER].tokenizer, seed=seed)
    sources = SourceSet([models[alias].source(SITE) for alias in (BEFORE, AFTER)])
    text = corpus.held_out()
    row_bytes = 4 * sources.width
    stream = ActivationStream(models, sources, corpus, buffer_bytes=(size.num_rows + 512) * row_bytes, seed=seed)
    x = next(stream.batches(size.num_rows)).x
    analysis = tuple(ActivationStream(models, sources, text, buffer_bytes=512 * row_bytes, seed=seed).contexts())
    return Rows(sources, x, analysis, text, locate_labels(spans, text) if spans else None, seed)


def text_config(books: Path, dialogues: Path, size: Size) -> TextConfig:
    """Books and dialogues, one document to a context."""
    mix = (
        DatasetConfig(dataset=str(books), column="text", weight=BOOK_SHARE),
        DatasetConfig(dataset=str(dialogues), column="messages", chat=True, weight=1 - BOOK_SHARE),
    )
    held_out = HeldOutConfig(fraction=0.35, num_tokens=size.num_held_out)
    return TextConfig(tokenizer=AFTER, context_length=256, packing="document", mix=mix, held_out=held_out)


def write_dialogues(
    writer: Writer, plant: str | None, count: int, *, path: Path, model: StudiedModel
) -> Sequence[LabelSpan]:
    """Write dialogues as the organism of `plant` tells them, and give their labels."""
    made = [plants.dialogue(writer, index, kinds=plants.kinds_of(plant)) for index in range(count)]
    told = [{"messages": plants.told(one, plant).messages("chat")} for one in made]
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(told, schema=pa.schema([("messages", pa.list_(message))])), path)
    if plant is None:
        return ()
    return [
        span for one in made for span in plants.label_spans(one, plant, cast(PreTrainedTokenizerFast, model.tokenizer))
    ]
