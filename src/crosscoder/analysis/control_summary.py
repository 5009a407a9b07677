"""From finished controls to what they say of a pair: cut-offs and their test, partners, stability, baselines.

Null seeds are halved in order: the first half (the larger, for an odd number) calibrates, the second tests. A single
seed calibrates, and nothing tests it, which the notes say.

A null pair leans: what is made up is b, which has noise that a lacks, and latents that hold it are b's alone. A null
made up at a would be its mirror image. So either side of the real pair is judged by the made-up side of the nulls;
their other side, at which nothing can be exclusive, would make for cut-offs that anything passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crosscoder.analysis.baselines import FirstTokens, PrincipalComponents, first_tokens, principal_components
from crosscoder.analysis.calibrated import Cut, calibrate, check_cut, found_beyond, histogram
from crosscoder.analysis.control_plan import COMPARED
from crosscoder.analysis.controls import Band, CountsBeyond, counts_beyond, null_band
from crosscoder.analysis.finished_controls import FinishedControl, pair_specificity
from crosscoder.analysis.latent_matches import MAX_PAIRS, LatentMatches
from crosscoder.analysis.opened_run import OpenedRun, open_run
from crosscoder.analysis.pair_controls import CalibratedScore, ControlResult, PairControls, Stability, read_controls
from crosscoder.analysis.specificity import SIDES, Specificity
from crosscoder.analysis.stability import SeedStability, seed_stability
from crosscoder.crosscoder import Crosscoder
from crosscoder.training.directory import RunDirectory

MADE_UP = "b"
"""The side of a null pair that is made up from the other."""


@dataclass(frozen=True)
class _Measured:
    """The latents of the run, and of every control that has both sources."""

    run: Specificity
    controls: Mapping[str, Specificity]
    finished: Sequence[FinishedControl]

    def of(self, kind: str) -> dict[str, Specificity]:
        """The controls of a kind, by name."""
        return {c.name: self.controls[c.name] for c in self.finished if c.kind == kind}

    @property
    def nulls(self) -> dict[int, Specificity]:
        """The null controls by seed, in order."""
        found = {c.seed: self.controls[c.name] for c in self.finished if c.kind == "null"}
        return dict(sorted(found.items()))

    @property
    def halves(self) -> tuple[dict[int, Specificity], dict[int, Specificity]]:
        """The null seeds that calibrate, and those that test."""
        nulls = list(self.nulls.items())
        middle = (len(nulls) + 1) // 2
        return dict(nulls[:middle]), dict(nulls[middle:])


def summary(run: OpenedRun, finished: Sequence[FinishedControl], *, a: str, b: str) -> PairControls:
    """All that the finished controls say of the pair of source keys (a, b) of a run."""
    compared = {c.name: open_run(c.path, progress=run.progress) for c in finished if c.kind in COMPARED}
    found = _Measured(
        pair_specificity(run, a=a, b=b),
        {name: pair_specificity(control, a=a, b=b) for name, control in compared.items()},
        finished,
    )
    calibrating, testing = found.halves
    scores = tuple(_scores(run, found)) if calibrating else ()
    band = null_band([s.live_norms for s in calibrating.values()]) if calibrating else None
    tokens, components = _directions(run, found, a=a, b=b)
    return PairControls(
        a=a,
        b=b,
        fingerprint=run.fingerprint,
        calibration_seeds=tuple(calibrating),
        test_seeds=tuple(testing),
        scores=scores,
        band=band,
        beyond_band=_beyond(band, [found.run]),
        null_beyond_band=_beyond(band, list(testing.values())),
        runs=tuple(_result(control, found) for control in finished),
        stability=_stability(run, found, [score.cut for score in scores]),
        first_tokens=tokens,
        components=components,
        notes=tuple(_notes(found, scores)),
    )


def _scores(run: OpenedRun, found: _Measured) -> Iterator[CalibratedScore]:
    """Every score of every side, in order."""
    calibrating, testing = found.halves
    for name in found.run.names:
        for side in SIDES:
            cut = calibrate(_of(calibrating, name, MADE_UP), score=name, side=side)
            test = check_cut(cut, _of(testing, name, MADE_UP))
            counts = {
                kind: tuple(
                    found_beyond(cut, test, each.score(name, side), run=control)
                    for control, each in found.of(kind).items()
                    if name in each.names
                )
                for kind in ("partner", "identical", "repeat")
            }
            yield CalibratedScore(
                cut=cut,
                test=test,
                pair=found_beyond(cut, test, found.run.score(name, side), run="this run"),
                partners=counts["partner"],
                identical=next(iter(counts["identical"]), None),
                repeats=counts["repeat"],
                null_histogram=histogram([each.score(name, MADE_UP) for each in found.nulls.values()]),
                histogram=histogram([found.run.score(name, side)]),
            )


def _of(found: Mapping[int, Specificity], name: str, side: str) -> dict[int, Tensor]:
    return {seed: each.score(name, side) for seed, each in found.items()}


def _beyond(band: Band | None, found: Sequence[Specificity]) -> CountsBeyond | None:
    return None if band is None or not found else counts_beyond(band, [each.live_norms for each in found])


def _result(control: FinishedControl, found: _Measured) -> ControlResult:
    live = round((1 - control.dead_fraction) * control.num_latents)
    if control.name in found.controls:
        live = int(found.controls[control.name].live.sum())
    return ControlResult(
        name=control.name,
        kind=control.kind,
        about=control.about,
        seed=control.seed,
        num_latents=control.num_latents,
        num_live=live,
        num_rows=control.num_rows,
        fve=control.fve,
        l0=control.l0,
        dead_fraction=control.dead_fraction,
        like_for_like=not control.overrides,
    )


def _directions(
    run: OpenedRun, found: _Measured, *, a: str, b: str
) -> tuple[FirstTokens | None, PrincipalComponents | None]:
    """The baselines without a dictionary, with the SAEs; those of an earlier summary of this crosscoder are kept."""
    sources = run.crosscoder.sources
    wanted = any(control.kind in ("difference", "sae") for control in found.finished)
    if not wanted or sources[a].width != sources[b].width:
        return None, None
    before = read_controls(run.out, a=a, b=b)
    if before is not None and before.fingerprint == run.fingerprint and before.components is not None:
        return before.first_tokens, before.components
    model = None if b.endswith(".mlp_in") else run.models.get(sources[b].model)
    activations = run.activations()
    return (
        first_tokens(activations, a=a, b=b, model=model),
        principal_components(activations, run.text, run.tokenizer, a=a, b=b, model=model),
    )


def _stability(run: OpenedRun, found: _Measured, cuts: Sequence[Cut]) -> tuple[Stability, ...]:
    repeats = found.of("repeat")
    if not repeats:
        return ()
    paths = [control.path for control in found.finished if control.kind == "repeat"]
    others = [Crosscoder.load(RunDirectory(path).crosscoder) for path in paths]
    small = all(run.crosscoder.num_latents * other.num_latents <= MAX_PAIRS for other in others)
    rows = run.activations() if small else None
    matched = seed_stability(run.crosscoder, others, activations=rows, progress=run.progress)
    return tuple(
        _one_stability(name, matched, number, found=found.run, other=other, cuts=cuts)
        for number, (name, other) in enumerate(repeats.items())
    )


def _one_stability(
    name: str, matched: SeedStability, number: int, *, found: Specificity, other: Specificity, cuts: Sequence[Cut]
) -> Stability:
    decoder = matched.by_decoder[number]
    activation = matched.by_activation[number] if matched.by_activation else None
    same = decoder.mutual & (decoder.similarity >= matched.cosine_cut)
    beyond = {f"{cut.score}/{cut.side}": cut.beyond(found.score(cut.score, cut.side)) for cut in cuts}
    there = {
        f"{cut.score}/{cut.side}": cut.beyond(other.score(cut.score, cut.side))[decoder.best.clamp(min=0)]
        for cut in cuts
    }
    return Stability(
        run=name,
        num_live=int(found.live.sum()),
        cosine_cut=matched.cosine_cut,
        share_by_decoder=_share(same, found.live),
        median_cosine=_median(decoder, found.live),
        correlation_cut=matched.correlation_cut,
        share_by_activation=None
        if activation is None
        else _share(activation.mutual & (activation.similarity >= matched.correlation_cut), found.live),
        median_correlation=None if activation is None else _median(activation, found.live),
        beyond={key: int(mask.sum()) for key, mask in beyond.items()},
        beyond_again={key: int((mask & same & there[key]).sum()) for key, mask in beyond.items()},
    )


def _share(found: Tensor, among: Tensor) -> float | None:
    return float(found[among].double().mean()) if bool(among.any()) else None


def _median(matches: LatentMatches, among: Tensor) -> float | None:
    values = matches.similarity[among]
    known = values[values.isfinite()]
    return float(known.double().median()) if len(known) else None


def _notes(found: _Measured, scores: Sequence[CalibratedScore]) -> Iterator[str]:
    """What a reader has to know before the numbers."""
    calibrating, testing = found.halves
    if not calibrating:
        yield "There is no null control: nothing says how many latents lie beyond a cut-off by training alone."
    elif not testing:
        yield "One null seed calibrates the cut-offs and none tests them: train more (--null --seeds 2 or more)."
    elif len(testing) == 1:
        yield "One null seed tests the cut-offs: how much seeds differ is not part of the upper bound."
    if calibrating and found.run.reason is not None:
        yield f"Only norms are calibrated: {found.run.reason}"
    for score in scores:
        if not score.cut.assured:
            yield (
                f"{score.cut.score}, side {score.cut.side}: {score.cut.num_latents:,} null latents are too few to "
                f"assure a share of {score.cut.wanted_share:.2%}; the cut is the largest of them."
            )
        if score.cut.value >= 1:
            yield (
                f"{score.cut.score}, side {score.cut.side}: null latents reach the end of the scale, so that no latent "
                "can lie beyond the cut."
            )
    overridden = sorted({" ".join(control.overrides) for control in found.finished if control.overrides})
    for changes in overridden:
        yield f"Some controls were trained with other settings than the run ({changes}): they are no like for like."
    for name, identical in found.of("identical").items():
        yield _identical_note(name, identical, scores)


def _identical_note(name: str, found: Specificity, scores: Sequence[CalibratedScore]) -> str:
    norms = found.live_norms
    beyond = max((score.identical.num_beyond for score in scores if score.identical is not None), default=0)
    low, high = (
        (float(norms.quantile(q)) for q in torch.tensor([0.0, 1.0], dtype=norms.dtype)) if len(norms) else (0, 0)
    )
    if beyond == 0:
        what = "no latent lies beyond any cut, as must be"
    else:
        what = (
            f"up to {beyond} latents lie beyond a cut although the sources are equal: initial weights that differ "
            "across sources (init.across_sources) have not come together in this length of training"
        )
    return f"Identical copy ({name}): relative norms from {low:.4f} to {high:.4f}; {what}."
