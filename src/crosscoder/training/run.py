"""A run from its file to its crosscoder: `xc.train(run)`, which is `crosscoder train run.yaml`.

Open the models, fix the analysis set, open the stream, fit the normaliser, train, save. The same call continues an
interrupted run from its last checkpoint, and says so when the run is finished.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from crosscoder.activations import ActivationSource, Batch
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.buffer import bytes_per_row
from crosscoder.capture.corpus import Corpus
from crosscoder.capture.derived import derived
from crosscoder.capture.harvest import storage_dtype
from crosscoder.capture.models import StudiedModel
from crosscoder.capture.stream import ActivationStream
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import RunConflict
from crosscoder.groups import Columns
from crosscoder.progress import Progress, silent
from crosscoder.sources import SourceSet, split_key
from crosscoder.training import checkpoint, normaliser
from crosscoder.training.config import RunConfig
from crosscoder.training.directory import RunDirectory
from crosscoder.training.firing_fraction import set_firing_fraction
from crosscoder.training.hooks import Checkpointer, Recorder, StopRequest
from crosscoder.training.meter import Meter
from crosscoder.training.sinks import JsonlSink, RunStart, Sink, SinkGroup
from crosscoder.training.trainer import Trainer
from crosscoder.training.warm_start import warm_start

log = logging.getLogger(__name__)
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
    """What a run looks at: its models, sources and text."""

    run: RunConfig
    models: Mapping[str, StudiedModel]
    sources: SourceSet
    corpus: Corpus

    @classmethod
    def open(cls, run: RunConfig, *, progress: Progress = silent) -> Study:
        """Load the models and the text of a run; widths and every derived setting come from them."""
        models: dict[str, StudiedModel] = {}
        for done, (alias, config) in enumerate(run.models.items(), start=1):
            models[alias] = StudiedModel.load(alias, config)
            progress("loading models", done, len(run.models))
        sites = {key: split_key(key) for key in run.harvested_keys}
        sources = run.source_set({key: models[alias].width(site) for key, (alias, site) in sites.items()})
        resolved = run.resolved(widths=run.wiring.build(sources).writes.widths)
        return cls(resolved, models, sources, Corpus(run.text, models[run.text.tokenizer].tokenizer, seed=run.seed))

    def stream(self, text: Corpus | AnalysisSet, *, progress: Progress = silent) -> ActivationSource:
        """Activations of the run's sources over its training text, or over a fixed set of contexts."""
        row = bytes_per_row(self.sources.underlying.width, storage_dtype(self.models))
        stream = ActivationStream(
            self.models,
            self.sources.underlying,
            text,
            buffer_bytes=row * self.run.rows_per_fill(row),
            passes=self.run.activations.passes,
            seed=self.run.seed,
            progress=progress,
        )
        return derived(stream, self.sources)

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
        return {
            "models": {alias: model.identity for alias, model in self.models.items()},
            "tokenizer": {"model": self.run.text.tokenizer, "vocabulary": self.corpus.vocabulary},
            "run": self.run.model_dump(mode="json"),
        }


def train(
    run: RunConfig | str | Path, *, sinks: Sequence[Sink] = (), progress: Progress = silent, device: str | None = None
) -> TrainResult:
    """Train the crosscoder of a run, or continue it, or give it when it is finished.

    Raises ConfigError and its kin for a run that cannot be, RunConflict for a directory that another configuration
    has, TrainingDiverged or NonFiniteActivations with the last good checkpoint kept.
    """
    run = run if isinstance(run, RunConfig) else RunConfig.load(run)
    directory = RunDirectory(Path(run.out or "runs/run"))
    directory.claim(run)
    if directory.finished:
        log.info("%s is finished; nothing is left to do.", directory.path)
        return TrainResult(Crosscoder.load(directory.crosscoder), _last_metrics(directory), directory.path)
    dictionaries = _dictionaries(run)
    study = Study.open(run, progress=progress)
    stream = study.stream(study.corpus, progress=progress)  # every check of models and text is behind us now
    study.run.dump(directory.config)
    held_out = _analysis_set(study, directory)
    validation = list(_first_rows(study.stream(held_out).contexts(), VALIDATION_ROWS))
    trainer = _trainer(
        study, stream, directory, device=device or _best_device(), dictionaries=dictionaries, progress=progress
    )
    recorder = Recorder(SinkGroup([JsonlSink(), *sinks]), Meter(trainer.crosscoder), validation)
    _loop(trainer, stream, recorder, directory, start=_start(study, trainer, directory))
    crosscoder = trainer.crosscoder.eval()
    if run.losses.source_dropout:
        _calibrate_on_whole_rows(crosscoder, stream, batch_size=run.train.batch_size)
    crosscoder.save(directory.crosscoder)
    return TrainResult(crosscoder, recorder.last, directory.path)


def _loop(
    trainer: Trainer, stream: ActivationSource, recorder: Recorder, directory: RunDirectory, *, start: RunStart
) -> None:
    """Train to the end, or to the step at which someone asks to stop."""
    stop = StopRequest()
    recorder.sink.open(start)
    try:
        with stop.listening():
            trainer.run(stream, [recorder, Checkpointer(directory.checkpoints, stream, stop)])
    finally:
        recorder.sink.close()


def _trainer(
    study: Study,
    stream: ActivationSource,
    directory: RunDirectory,
    *,
    device: str,
    dictionaries: Mapping[str, Crosscoder],
    progress: Progress,
) -> Trainer:
    """A trainer at the newest checkpoint, or at the start with the normaliser fitted."""
    run, crosscoder = study.run, study.new_crosscoder()
    latest = directory.latest_checkpoint
    if latest is None:
        rows = run.normaliser.num_tokens
        start = stream.state_dict()
        fitted = normaliser.fit(study.sources, _take(stream, rows, batch_size=run.train.batch_size, progress=progress))
        stream.load_state_dict(start)
        crosscoder.set_normaliser(fitted.mean.float(), fitted.scale.float())
        _start_weights(study, crosscoder, stream, dictionaries)
        stream.load_state_dict(start)
    trainer = Trainer(crosscoder.to(device), run.train, sparsity=run.sparsity, losses=run.losses, seed=run.seed)
    if latest is not None:
        stream.load_state_dict(checkpoint.restore(trainer, latest))
        log.info("continuing %s from step %d.", directory.path, latest.step)
    return trainer


def _dictionaries(run: RunConfig) -> dict[str, Crosscoder]:
    """The autoencoders that the run starts from, by the names it gives their sources."""
    start = run.init.warm_start
    found = {name: RunDirectory(Path(path)) for name, path in (start.dictionaries.items() if start else ())}
    return {name: Crosscoder.load(run.crosscoder if run.finished else run.path) for name, run in found.items()}


def _calibrate_on_whole_rows(crosscoder: Crosscoder, stream: ActivationSource, *, batch_size: int) -> None:
    """The thresholds of rows with no source hidden; those that followed training are of rows with some."""
    columns = Columns(crosscoder.sources, crosscoder.reads.keys)
    batches = _first_rows(stream.batches(batch_size), START_ROWS)
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


def _analysis_set(study: Study, directory: RunDirectory) -> AnalysisSet:
    """The held-out set of the run: made once, and the same text ever after."""
    made = study.corpus.held_out()
    if directory.latest_checkpoint is None:
        made.save(directory.analysis)
    elif AnalysisSet.load(directory.analysis).hash != made.hash:
        raise RunConflict(
            f"the text behind {directory.path} has changed since the run began.",
            details=[f"analysis set there  {directory.analysis}", f"hash of the text now  {made.hash}"],
            hint="Put the text and the tokenizer back as they were, or start a new run with out=PATH.",
        )
    return made


def _first_rows(batches: Iterator[Batch], num_rows: int) -> Iterator[Batch]:
    seen = 0
    for batch in batches:
        yield batch
        seen += batch.x.shape[0]
        if seen >= num_rows:
            return


def _start(study: Study, trainer: Trainer, directory: RunDirectory) -> RunStart:
    return RunStart(
        directory.path,
        study.run.model_dump(mode="json"),
        trainer.num_steps,
        trainer.config.batch_size,
        trainer.step_number,
    )


def _last_metrics(directory: RunDirectory) -> dict[str, float]:
    from crosscoder.training.sinks import read_metrics

    merged: dict[str, float] = {}
    for record in read_metrics(directory.path / "metrics.jsonl"):
        merged |= {name: value for name, value in record.items() if name != "step"}
    return merged


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
