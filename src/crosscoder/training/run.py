"""A run from its file to its crosscoder: `xc.train(run)`, which is `crosscoder train run.yaml`.

Open the models, fix the analysis set, open the stream, fit the normaliser, train, save. The same call continues an
interrupted run from its last checkpoint, and says so when the run is finished. Several dictionaries train side by side
on the batches of one stream; a run of one is the case of one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from crosscoder.activations import ActivationSource, Batch, State
from crosscoder.capture.alignment import Aligner
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.buffer import bytes_per_row
from crosscoder.capture.corpus import Corpus
from crosscoder.capture.derived import derived
from crosscoder.capture.harvest import storage_dtype
from crosscoder.capture.models import StudiedModel
from crosscoder.capture.null_pair import Difference
from crosscoder.capture.stream import ActivationStream
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import RunConflict, TrainingDiverged
from crosscoder.groups import Columns
from crosscoder.progress import Progress, silent
from crosscoder.sources import SourceSet, split_key
from crosscoder.training import checkpoint, normaliser, null_pairs, several
from crosscoder.training.checkpoint import Checkpoint
from crosscoder.training.config import RunConfig
from crosscoder.training.directory import RunDirectory, common_checkpoints
from crosscoder.training.firing_fraction import set_firing_fraction
from crosscoder.training.hooks import Checkpointer, Recorder, StopRequest
from crosscoder.training.meter import Meter
from crosscoder.training.null_pairs import made_up
from crosscoder.training.sinks import JsonlSink, RunStart, Sink, SinkGroup
from crosscoder.training.trainer import Trainer
from crosscoder.training.warm_start import warm_start

log = logging.getLogger(__name__)
MakeSinks = Callable[[str], Sequence[Sink]]
VALIDATION_ROWS = 16_384
START_ROWS = 32_768
"""Training rows that data-driven biases and final thresholds are set on."""
WARM_ROWS = 4096
"""Training rows on which latents of several autoencoders are compared."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run: its crosscoder (eval mode), the last metrics, and where it lies."""

    crosscoder: Crosscoder
    metrics: dict[str, float]
    path: Path


@dataclass(frozen=True)
class Study:
    """What a run looks at: its models, sources and text; of a structureless null pair also the true difference."""

    run: RunConfig
    models: Mapping[str, StudiedModel]
    sources: SourceSet
    corpus: Corpus
    difference: Difference | None = None

    @classmethod
    def open(cls, run: RunConfig, *, progress: Progress = silent) -> Study:
        """Load the models and the text of a run; widths and every derived setting come from them."""
        models: dict[str, StudiedModel] = {}
        for done, (alias, config) in enumerate(run.models.items(), start=1):
            models[alias] = StudiedModel.load(alias, config)
            progress("loading models", done, len(run.models))
        sites = {key: split_key(key) for key in run.harvested_keys}
        sources = run.source_set({key: models[alias].width(site) for key, (alias, site) in sites.items()})
        corpus = Corpus(run.text, models[run.text.tokenizer].tokenizer, seed=run.seed)
        return cls(run, models, sources, corpus).of(run)

    def of(self, run: RunConfig) -> Study:
        """The same models, sources and text for another dictionary; its derived settings follow from them."""
        return replace(self, run=run.resolved(widths=run.wiring.build(self.sources).writes.widths))

    def measured(self, directory: RunDirectory, *, progress: Progress = silent) -> Study:
        """The same, with the true difference of a null pair: the one of the run directory, or measured now."""
        if directory.latest_checkpoint is not None and directory.difference.exists():
            return replace(self, difference=Difference.load(directory.difference))
        null = self.run.activations.null_pair
        return replace(self, difference=null_pairs.measured(null, self._as_models_give(self.corpus, progress)))

    def stream(self, text: Corpus | AnalysisSet, *, progress: Progress = silent) -> ActivationSource:
        """Activations of the run's sources over its training text, or over a fixed set of contexts."""
        stream = self._as_models_give(text, progress)
        return derived(made_up(stream, self.run.activations.null_pair, self.difference), self.sources)

    def _as_models_give(self, text: Corpus | AnalysisSet, progress: Progress) -> ActivationStream:
        row = bytes_per_row(self.sources.underlying.width, storage_dtype(self.models))
        return ActivationStream(
            self.models,
            self.sources.underlying,
            text,
            buffer_bytes=row * self.run.rows_per_fill(row),
            passes=self.run.activations.passes,
            seed=self.run.seed,
            progress=progress,
        )

    def held_out(self) -> AnalysisSet:
        """The held-out text: only what is aligned in all tokenizations, where models have different ones."""
        if self.corpus.alignment == "identical":
            return self.corpus.held_out()
        used = {alias: self.models[alias] for alias in self.sources.underlying.models}
        return self.corpus.held_out(Aligner.of(used, vocabulary=self.corpus.vocabulary))

    def new_crosscoder(self) -> Crosscoder:
        """The untrained crosscoder of the run."""
        init = self.run.init
        crosscoder = Crosscoder(
            self.run.wiring.build(self.sources),
            self.run.nonlinearity.build(),
            seed=self.run.seed,
            decoder_norm=init.decoder_norm,
            across_sources=init.across_sources,
        )
        crosscoder.provenance = self.provenance()
        return crosscoder

    def provenance(self) -> dict[str, Any]:
        """Models, tokenizer, text and configuration, for `config.json`; never text itself."""
        null = self.run.activations.null_pair
        return {
            "models": {alias: model.identity for alias, model in self.models.items()},
            "tokenizer": {"model": self.run.text.tokenizer, "vocabulary": self.corpus.vocabulary},
            "run": self.run.model_dump(mode="json"),
        } | ({} if null is None else {"null_pair": null.in_words()})


@dataclass(frozen=True)
class _Lane:
    """One dictionary on its way: what it looks at, where it goes, and its trainer; its name where there are others."""

    study: Study
    directory: RunDirectory
    trainer: Trainer
    recorder: Recorder
    name: str

    def advance(self, batch: Batch) -> None:
        """One update; a divergence says whose it is."""
        try:
            self.trainer.advance(batch, [self.recorder])
        except TrainingDiverged as error:
            raise TrainingDiverged(f"{self.name}{error.message}", details=error.details, hint=error.hint) from error

    def finish(self) -> TrainResult:
        """Save the crosscoder, in eval mode."""
        crosscoder = self.trainer.crosscoder.eval()
        crosscoder.drop_spares()
        crosscoder.save(self.directory.crosscoder)
        return TrainResult(crosscoder, self.recorder.last, self.directory.path)


def train(
    run: RunConfig | str | Path, *, sinks: Sequence[Sink] = (), progress: Progress = silent, device: str | None = None
) -> TrainResult:
    """Train the crosscoder of a run, or continue it, or give it when it is finished.

    Raises ConfigError and its kin for a run that cannot be, RunConflict for a directory that another configuration
    has, TrainingDiverged or NonFiniteActivations with the last good checkpoint kept.
    """
    run = run if isinstance(run, RunConfig) else RunConfig.load(run)
    return train_together([run], sinks=lambda _: sinks, progress=progress, device=device)[0]


def train_together(
    runs: Sequence[RunConfig] | str | Path,
    *,
    sinks: MakeSinks = lambda _: (),
    progress: Progress = silent,
    device: str | None = None,
) -> tuple[TrainResult, ...]:
    """Train several dictionaries on the batches of one stream: those of a run file, or runs that share all of it.

    Each becomes, to the bit, what `train` makes of its run. `sinks` gives those of the dictionary with that name, which
    is its directory's. Raises as `train` does, for each of them, and ConfigError where they cannot share a stream.
    """
    runs = several.load(runs) if isinstance(runs, str | Path) else runs
    several.require_one_stream(runs)
    directories = [RunDirectory(Path(run.out or "runs/run")) for run in runs]
    for run, directory in zip(runs, directories, strict=True):
        directory.claim(run)
    missing = [(run, directory) for run, directory in zip(runs, directories, strict=True) if not directory.finished]
    found = {directory.path: _finished(directory) for directory in directories if directory.finished}
    if missing:
        lanes, stream = _lanes(missing, sinks, progress=progress, device=device or _best_device())
        _loop(lanes, stream)
        _calibrate_on_whole_rows(lanes, stream)
        found |= {lane.directory.path: lane.finish() for lane in lanes}
    return tuple(found[directory.path] for directory in directories)


def _finished(directory: RunDirectory) -> TrainResult:
    log.info("%s is finished; nothing is left to do.", directory.path)
    return TrainResult(Crosscoder.load(directory.crosscoder), _last_metrics(directory), directory.path)


def _lanes(
    runs: Sequence[tuple[RunConfig, RunDirectory]], sinks: MakeSinks, *, progress: Progress, device: str
) -> tuple[list[_Lane], ActivationSource]:
    """The dictionaries at the newest place that all have in common, and the stream at that place."""
    checkpoints = common_checkpoints(
        [directory for _, directory in runs], most_undone=runs[0][0].train.resolved(k=None).checkpoint_every or 1
    )
    receivers = [sinks(directory.path.name) for _, directory in runs]
    starts = [_dictionaries(run) for run, _ in runs]
    study = Study.open(runs[0][0], progress=progress).measured(runs[0][1], progress=progress)
    studies = [study.of(run) for run, _ in runs]
    stream = study.stream(study.corpus, progress=progress)  # every check of models and text is behind us now
    held_out = study.held_out()
    for each, (_, directory) in zip(studies, runs, strict=True):
        each.run.dump(directory.config)
        _keep_analysis_set(held_out, directory)
        if study.difference is not None and directory.latest_checkpoint is None:
            study.difference.save(directory.difference)
    validation = list(_first_rows(study.stream(held_out).contexts(), VALIDATION_ROWS))
    crosscoders = [each.new_crosscoder() for each in studies]
    if held_out.aligned is not None:
        for crosscoder in crosscoders:
            crosscoder.provenance["tokenizer"] |= {"aligned": held_out.aligned.to_json()}
    if not checkpoints:
        _start(list(zip(studies, crosscoders, starts, strict=True)), stream, progress=progress)
    lanes = []
    for each, crosscoder, (_, directory), others in zip(studies, crosscoders, runs, receivers, strict=True):
        run = each.run
        trainer = Trainer(crosscoder.to(device), run.train, sparsity=run.sparsity, losses=run.losses, seed=run.seed)
        recorder = Recorder(SinkGroup([JsonlSink(), *others]), Meter(crosscoder), validation)
        name = f"{directory.path.name}: " if len(runs) > 1 else ""
        lanes.append(_Lane(each, directory, trainer, recorder, name))
    _restore(lanes, checkpoints, stream)
    return lanes, stream


def _start(
    members: Sequence[tuple[Study, Crosscoder, Mapping[str, Crosscoder]]],
    stream: ActivationSource,
    *,
    progress: Progress,
) -> None:
    """The normaliser, fitted once for all, and initial weights; the stream is left where it was."""
    study, start = members[0][0], stream.state_dict()
    batch_size = study.run.train.batch_size
    rows = _take(stream, study.run.normaliser.num_tokens, batch_size=batch_size, progress=progress)
    fitted = normaliser.fit(study.sources, rows)
    for each, crosscoder, dictionaries in members:
        stream.load_state_dict(start)
        crosscoder.set_normaliser(fitted.mean.float(), fitted.scale.float())
        _start_weights(each, crosscoder, stream, dictionaries)
    stream.load_state_dict(start)


def _restore(lanes: Sequence[_Lane], checkpoints: Sequence[Checkpoint], stream: ActivationSource) -> None:
    """Every trainer at its checkpoint, and the stream at the place that they have in common."""
    places: list[State] = []
    for lane, latest in zip(lanes, checkpoints, strict=False):
        places.append(checkpoint.restore(lane.trainer, latest))
        log.info("continuing %s from step %d.", lane.directory.path, latest.step)
    if any(place != places[0] for place in places):
        raise RunConflict(
            "the checkpoints of these dictionaries are of different places in the text.",
            details=[str(latest.path) for latest in checkpoints],
            hint="They were not trained on one stream: start new runs with out=PATH.",
        )
    if places:
        stream.load_state_dict(places[0])


def _loop(lanes: Sequence[_Lane], stream: ActivationSource) -> None:
    """Train to the end, or to the step at which someone asks to stop."""
    stop = StopRequest()
    checkpointer = Checkpointer([(lane.trainer, lane.directory.checkpoints) for lane in lanes], stream, stop)
    with ExitStack() as stack:
        for lane in lanes:
            stack.callback(lane.recorder.sink.close)
            lane.recorder.sink.open(_run_start(lane))
        stack.enter_context(stop.listening())
        for batch in lanes[0].trainer.draw(stream):
            for lane in lanes:
                lane.advance(batch)
            checkpointer.after_batch()


def _dictionaries(run: RunConfig) -> dict[str, Crosscoder]:
    """The autoencoders that the run starts from, by the names it gives their sources."""
    start = run.init.warm_start
    found = {name: RunDirectory(Path(path)) for name, path in (start.dictionaries.items() if start else ())}
    return {name: Crosscoder.load(run.crosscoder if run.finished else run.path) for name, run in found.items()}


def _calibrate_on_whole_rows(lanes: Sequence[_Lane], stream: ActivationSource) -> None:
    """Thresholds of rows with no source hidden, where those that followed training are of rows with some."""
    end = stream.state_dict()
    for lane in lanes:
        if not lane.study.run.losses.source_dropout:
            continue
        stream.load_state_dict(end)
        crosscoder = lane.trainer.crosscoder.eval()
        columns = Columns(crosscoder.sources, crosscoder.reads.keys)
        batches = _first_rows(stream.batches(lane.trainer.config.batch_size), START_ROWS)
        crosscoder.calibrate(columns(batch.x.to(crosscoder.bias)) for batch in batches)


def _start_weights(
    study: Study, crosscoder: Crosscoder, stream: ActivationSource, dictionaries: Mapping[str, Crosscoder]
) -> None:
    """Initial weights beyond random directions, where the run asks for them; needs the normaliser."""
    init = study.run.init
    if init.warm_start is not None:
        named = {study.sources.resolve(name).key: dictionary for name, dictionary in dictionaries.items()}
        rows = _rows(stream, WARM_ROWS)
        made = warm_start(crosscoder, named, similarity=init.warm_start.similarity, rows=rows)
        log.info(
            "warm start: %d latents taken, %d merged, %d as drawn.", sum(made.taken), sum(made.merged), made.as_drawn
        )
    if init.firing_fraction is not None:
        set_firing_fraction(crosscoder, _rows(stream, START_ROWS), init.firing_fraction)


def _rows(stream: ActivationSource, num_rows: int) -> Float[Tensor, "rows width"]:
    """About that many training rows at once."""
    return torch.cat([batch.x for batch in _first_rows(stream.batches(num_rows // 8), num_rows)])


def _take(
    stream: ActivationSource, num_rows: int, *, batch_size: int, progress: Progress
) -> Iterator[Float[Tensor, "rows width"]]:
    """The first rows of the training stream."""
    for taken, batch in enumerate(stream.batches(batch_size), start=1):
        yield batch.x
        progress("fitting the normaliser", min(taken * batch_size, num_rows), num_rows)
        if taken * batch_size >= num_rows:
            return


def _keep_analysis_set(made: AnalysisSet, directory: RunDirectory) -> None:
    """The held-out set in its directory: made once, and the same text ever after."""
    if directory.latest_checkpoint is None:
        made.save(directory.analysis)
    elif AnalysisSet.load(directory.analysis).hash != made.hash:
        raise RunConflict(
            f"the text behind {directory.path} has changed since the run began.",
            details=[f"analysis set there  {directory.analysis}", f"hash of the text now  {made.hash}"],
            hint="Put the text and the tokenizer back as they were, or start a new run with out=PATH.",
        )


def _first_rows(batches: Iterator[Batch], num_rows: int) -> Iterator[Batch]:
    seen = 0
    for batch in batches:
        yield batch
        seen += batch.x.shape[0]
        if seen >= num_rows:
            return


def _run_start(lane: _Lane) -> RunStart:
    trainer = lane.trainer
    config = lane.study.run.model_dump(mode="json")
    return RunStart(lane.directory.path, config, trainer.num_steps, trainer.config.batch_size, trainer.step_number)


def _last_metrics(directory: RunDirectory) -> dict[str, float]:
    from crosscoder.training.sinks import read_metrics

    merged: dict[str, float] = {}
    for record in read_metrics(directory.path / "metrics.jsonl"):
        merged |= {name: value for name, value in record.items() if name != "step"}
    return merged


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
