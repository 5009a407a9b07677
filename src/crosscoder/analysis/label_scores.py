"""How well single latents find labelled behaviours, on documents that did not choose them, beside simpler detectors.

For each label the documents are halved by hash. On one half the latent with the largest AUROC is chosen, and the
threshold with the largest F1; on the other half both are scored, with an interval by resampling documents. AUROC
compares tokens on which the behaviour acts with look-alike tokens *of the same role* (a latent that fires on whatever
the assistant says tells nothing); template tokens are left out. Beside it, on the same tokens:

    baseline latent        the best latent of another crosscoder, such as an SAE of `a` alone, chosen in the same way
    mean difference        projection of x_b − x_a on its mean over all rows of the analysis set; knows no labels
    difference of means    projection of x_s on E[x_s | acts] − E[x_s | look-alike] of the choosing half, for s = a
                           and b: what a supervised linear direction reads, an upper reference

Directions are of raw space, and take the sign that the choosing half prefers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from crosscoder.activations import ROLES, ActivationSource
from crosscoder.analysis.classes import latent_classes
from crosscoder.analysis.labelled_rows import LabelledRows, labelled_rows, select_rows
from crosscoder.analysis.labels import LabelSpan, locate_labels
from crosscoder.analysis.ranking import Truth, auroc, auroc_of_latents, best_threshold, bootstrap_auroc, f1_score
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.codes import SparseCode
from crosscoder.crosscoder import Crosscoder
from crosscoder.progress import Progress, silent

NUM_DRAWS = 1000
INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class DetectorScore:
    """One detector of one label: chosen on one half of the documents (`auroc_choosing`), scored on the other."""

    detector: str
    latent: int | None
    relative_norm: float | None
    auroc: float
    auroc_low: float
    auroc_high: float
    f1: float
    auroc_choosing: float


@dataclass(frozen=True)
class LabelScore:
    """All detectors of one label, and how much they were scored on; without `scores` where it could not be scored."""

    label: str
    roles: tuple[str, ...]
    num_documents: int
    num_positive: int
    num_negative: int
    scores: tuple[DetectorScore, ...]

    @property
    def best_latent(self) -> DetectorScore | None:
        """The crosscoder's best single latent."""
        return next((score for score in self.scores if score.detector == "latent"), None)


@dataclass(frozen=True)
class LabelScores:
    """The scores of all labels; `num_absent` labelled documents were not in the analysis set."""

    labels: tuple[LabelScore, ...]
    num_documents: int
    num_absent: int

    def table(self) -> pa.Table:
        """One row per label and detector."""
        rows = [{"label": label.label, **asdict(score)} for label in self.labels for score in label.scores]
        return pa.Table.from_pylist(rows)

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


@dataclass(frozen=True)
class _Case:
    """One label's rows: truth, which of them choose, documents."""

    rows: Bool[np.ndarray, "all_rows"]
    truth: Truth
    choosing: Bool[np.ndarray, "rows"]
    document: Int[np.ndarray, "rows"]

    @property
    def scoring(self) -> Bool[np.ndarray, "rows"]:
        """The rows of the other half."""
        return ~self.choosing


def label_scores(
    crosscoder: Crosscoder,
    activations: ActivationSource,
    text: AnalysisSet,
    *,
    labels: Sequence[LabelSpan],
    a: str,
    b: str,
    baseline: Crosscoder | None = None,
    progress: Progress = silent,
) -> LabelScores:
    """Score every label in one pass over `activations`, which are of `text`.

    `baseline` reads some of the same sources. `a` and `b` name written sources.
    """
    located = locate_labels(labels, text)
    classes = latent_classes(crosscoder, a=a, b=b)
    rows = labelled_rows(crosscoder, activations, text, located=located, baseline=baseline, progress=progress)
    hashes = [document.hash for document in text.documents]
    columns = {side: crosscoder.sources.slices[key] for side, key in (("a", classes.a), ("b", classes.b))}
    scores: list[LabelScore] = []
    for number, name in enumerate(located.names):
        progress("scoring labels", number, len(located.names))
        scores.append(_label_score(rows, number, hashes=hashes, columns=columns, norms=classes.relative_norm.tolist()))
        assert scores[-1].label == name
    progress("scoring labels", len(located.names), len(located.names))
    return LabelScores(tuple(scores), located.num_documents, located.num_absent)


def choosing_half(
    document: Int[np.ndarray, "rows"], positive: Bool[np.ndarray, "rows"], hashes: Sequence[str]
) -> Bool[np.ndarray, "rows"]:
    """Whether each row's document is in the half that chooses.

    Documents in which the behaviour acts, and those in which it does not, are each halved in the order of a hash.
    """
    acting = np.unique(document[positive])
    parts = (acting, np.setdiff1d(document, acting))
    key = {int(d): sha256(hashes[int(d)].encode()).digest() for part in parts for d in part}
    ordered = [sorted(part.tolist(), key=lambda d: key[d]) for part in parts]
    return np.isin(document, [*ordered[0][::2], *ordered[1][::2]])


def _label_score(
    rows: LabelledRows, number: int, *, hashes: Sequence[str], columns: dict[str, slice], norms: Sequence[float]
) -> LabelScore:
    case = _case(rows, number, hashes)
    scored = case.truth.of(case.scoring)
    possible = scored.num_pairs > 0 and case.truth.of(case.choosing).num_pairs > 0
    detectors = _detectors(rows, case, columns) if possible else iter(())
    return LabelScore(
        label=rows.names[number],
        roles=tuple(ROLES[role] for role in np.unique(case.truth.stratum)),
        num_documents=len(np.unique(case.document[case.scoring])),
        num_positive=int(scored.positive.sum()),
        num_negative=int((~scored.positive).sum()),
        scores=tuple(_detector_score(name, latent, score, case=case, norms=norms) for name, latent, score in detectors),
    )


def _case(rows: LabelledRows, number: int, hashes: Sequence[str]) -> _Case:
    """The rows of one label, of the roles in which both the behaviour and its look-alike occur, template left out."""
    value, role = rows.values[number], rows.role
    both = set(role[value == 1]) & set(role[value == -1]) - {ROLES.index("template")}
    chosen = (value != 0) & np.isin(role, list(both))
    truth = Truth(value[chosen] == 1, role[chosen])
    document = rows.document[chosen]
    return _Case(chosen, truth, choosing_half(document, truth.positive, hashes), document)


def _detectors(
    rows: LabelledRows, case: _Case, columns: dict[str, slice]
) -> Iterator[tuple[str, int | None, Float[np.ndarray, "rows"]]]:
    """Name, latent and score of every detector, on all of the label's rows."""
    for name, code in (("latent", rows.code), ("baseline latent", rows.baseline_code)):
        if code is not None:
            yield name, *_best_latent(select_rows(code, case.rows), case)
    x = rows.x[case.rows]
    a, b = columns["a"], columns["b"]
    if a.stop - a.start == b.stop - b.start:
        yield "mean difference", None, _oriented((x[:, b] - x[:, a]) @ (rows.mean[b] - rows.mean[a]), case)
    for side, part in columns.items():
        acts, look_alike = (x[case.choosing & side_of][:, part].mean(0) for side_of in _sides(case))
        yield f"difference of means, {side}", None, _oriented(x[:, part] @ (acts - look_alike), case)


def _sides(case: _Case) -> tuple[Bool[np.ndarray, "rows"], Bool[np.ndarray, "rows"]]:
    return case.truth.positive, ~case.truth.positive


def _best_latent(code: SparseCode, case: _Case) -> tuple[int, Float[np.ndarray, "rows"]]:
    found = auroc_of_latents(select_rows(code, case.choosing), case.truth.of(case.choosing))
    latent = int(np.argmax(found))
    mine = (code.latents == latent).numpy()
    values = np.zeros(code.num_rows)
    values[code.row_ids.numpy()[mine]] = code.values.numpy()[mine]
    return latent, values


def _oriented(score: Float[np.ndarray, "rows"], case: _Case) -> Float[np.ndarray, "rows"]:
    return score if auroc(score[case.choosing], case.truth.of(case.choosing))[0] >= 0.5 else -score


def _detector_score(
    name: str, latent: int | None, score: Float[np.ndarray, "rows"], *, case: _Case, norms: Sequence[float]
) -> DetectorScore:
    choosing, scoring = case.truth.of(case.choosing), case.truth.of(case.scoring)
    held_out = score[case.scoring]
    draws = bootstrap_auroc(held_out, scoring, case.document[case.scoring], num_draws=NUM_DRAWS)
    low, high = np.nanquantile(draws, INTERVAL) if np.isfinite(draws).any() else (np.nan, np.nan)
    threshold = best_threshold(score[case.choosing], choosing.positive)
    return DetectorScore(
        detector=name,
        latent=latent,
        relative_norm=norms[latent] if name == "latent" and latent is not None else None,
        auroc=float(auroc(held_out, scoring)[0]),
        auroc_low=float(low),
        auroc_high=float(high),
        f1=f1_score(held_out, scoring.positive, threshold=threshold),
        auroc_choosing=float(auroc(score[case.choosing], choosing)[0]),
    )
