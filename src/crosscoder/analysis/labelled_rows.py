"""The rows that labels speak of: their activations and codes, collected in one pass over the analysis set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from crosscoder.activations import ActivationSource, Batch
from crosscoder.analysis.labels import LocatedLabels
from crosscoder.analysis.passes import check_sources
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.codes import SparseCode, pointers
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import SourceMismatch
from crosscoder.progress import Progress, silent
from crosscoder.training.validation import evaluating


@dataclass(frozen=True)
class LabelledRows:
    """The rows that any label speaks of: label values (labels, rows), role, document, activations, codes.

    `mean` is of all rows of the analysis set, labelled or not.
    """

    names: tuple[str, ...]
    values: Int[np.ndarray, "labels rows"]
    role: Int[np.ndarray, "rows"]
    document: Int[np.ndarray, "rows"]
    x: Float[np.ndarray, "rows width"]
    code: SparseCode
    baseline_code: SparseCode | None
    mean: Float[np.ndarray, "width"]


@torch.no_grad()
def labelled_rows(
    crosscoder: Crosscoder,
    activations: ActivationSource,
    text: AnalysisSet,
    *,
    located: LocatedLabels,
    baseline: Crosscoder | None = None,
    progress: Progress = silent,
) -> LabelledRows:
    """Activations and codes of every row that a label speaks of; of all others only the mean is kept."""
    check_sources(crosscoder, activations)
    baseline_columns = _baseline_columns(crosscoder, baseline)
    wanted = (located.values != 0).any(0)
    device = crosscoder.mean.device
    tokens, x, codes, baseline_codes = [], [], list[SparseCode](), list[SparseCode]()
    total, num_rows = torch.zeros(crosscoder.sources.width, dtype=torch.float64), 0
    reads = list(crosscoder.sources.columns(crosscoder.reads.keys))
    with evaluating(crosscoder):
        for batch in activations.contexts():
            total += batch.x.sum(0, dtype=torch.float64).cpu()
            num_rows += len(batch.x)
            token = _tokens_of(batch, text)
            chosen = torch.from_numpy(wanted[token].nonzero()[0])
            rows = batch.x[chosen.to(batch.x.device)].to(device)
            tokens.append(token[chosen.numpy()])
            x.append(rows.cpu().numpy())
            codes.append(crosscoder.encode(rows[:, reads].to(crosscoder.mean)))
            if baseline is not None:
                with evaluating(baseline):
                    baseline_codes.append(baseline.encode(rows[:, baseline_columns].to(baseline.mean)))
            progress("reading activations", num_rows, int(text.kept.sum()))
    token = np.concatenate(tokens)
    return LabelledRows(
        names=located.names,
        values=located.values[:, token],
        role=text.roles.numpy()[token].astype(np.int64),
        document=text.document.numpy()[token].astype(np.int64),
        x=np.concatenate(x).astype(np.float64),
        code=joined(codes),
        baseline_code=joined(baseline_codes) if baseline_codes else None,
        mean=(total / max(1, num_rows)).numpy(),
    )


def select_rows(code: SparseCode, rows: Bool[np.ndarray, "rows"]) -> SparseCode:
    """The part of a code on some rows, renumbered."""
    chosen = torch.from_numpy(rows)
    kept, number = chosen[code.row_ids], chosen.cumsum(0) - 1
    starts = pointers(number[code.row_ids[kept]], num_rows=int(chosen.sum()))
    return SparseCode(starts, code.latents[kept], code.values[kept], code.num_latents)


def _tokens_of(batch: Batch, text: AnalysisSet) -> Int[np.ndarray, "rows"]:
    """The place of each row's token in the analysis set."""
    if batch.rows is None:
        raise SourceMismatch(
            "labels need to know where each row lies; these activations do not say.",
            hint="Read them from a stream over the analysis set, which gives Batch.rows.",
        )
    return (text.pointers[batch.rows.context.cpu()] + batch.rows.position.cpu()).numpy()


def _baseline_columns(crosscoder: Crosscoder, baseline: Crosscoder | None) -> list[int]:
    if baseline is None:
        return []
    missing = [source for source in baseline.reads if source not in tuple(crosscoder.sources)]
    if missing:
        raise SourceMismatch(
            "the baseline reads sources that this crosscoder does not have.",
            details=[f"missing  {source.key}  width {source.width}" for source in missing],
            hint="Train the baseline on one of the crosscoder's sources: " + ", ".join(crosscoder.sources.keys) + ".",
        )
    return [c for key in baseline.reads.keys for c in range(*crosscoder.sources.slices[key].indices(10**9))]


def joined(codes: Sequence[SparseCode]) -> SparseCode:
    """Several codes one below the other, on the CPU."""
    lengths = torch.cat([code.row_pointers.diff().cpu() for code in codes])
    return SparseCode(
        torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        torch.cat([code.latents.cpu() for code in codes]),
        torch.cat([code.values.detach().cpu() for code in codes]),
        codes[0].num_latents,
    )
