"""A finished crosscoder together with all that analysing it needs: models, analysis set, and where results go.

A run directory has everything. A crosscoder directory or Hub id carries the configuration of its run in `provenance`:
models and text are opened from that, and the caller says where results go. What is missing is named in the error.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from xxhash import xxh3_128

from crosscoder.activations import ActivationSource
from crosscoder.analysis.classes import source_pair
from crosscoder.capture.alignment import Aligner
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.ancestry import Ancestry, measure_ancestry
from crosscoder.capture.corpus import Corpus
from crosscoder.capture.derived import derived
from crosscoder.capture.huggingface import Tokenizer
from crosscoder.capture.loading import load_tokenizer
from crosscoder.capture.models import StudiedModel
from crosscoder.capture.null_pair import Difference
from crosscoder.capture.recorded import check_recorded
from crosscoder.capture.stream import ActivationStream
from crosscoder.crosscoder import Crosscoder
from crosscoder.crosscoder_files import tensors_of
from crosscoder.errors import ConfigError, FileFormatError, RunConflict, SourceMismatch
from crosscoder.progress import Progress, silent
from crosscoder.training import runfile
from crosscoder.training.config import RunConfig
from crosscoder.training.directory import RunDirectory
from crosscoder.training.null_pairs import made_up, measured


@dataclass(frozen=True)
class OpenedRun:
    """A trained crosscoder, the configuration that made it, and the directory that results go to.

    `home` is its run directory, where it has one.
    """

    crosscoder: Crosscoder
    config: RunConfig
    out: Path
    home: RunDirectory | None = None
    progress: Progress = silent

    @cached_property
    def models(self) -> dict[str, StudiedModel]:
        """The models of the crosscoder's sources, loaded when they are first needed.

        Raises ModelMismatch where they are not the ones that the crosscoder was trained on.
        """
        aliases = self.crosscoder.sources.underlying.models
        loaded: dict[str, StudiedModel] = {}
        for done, alias in enumerate(aliases):
            self.progress("loading models", done, len(aliases))
            loaded[alias] = StudiedModel.load(alias, self.config.models[alias])
        self.progress("loading models", len(aliases), len(aliases))
        check_recorded(loaded, self.crosscoder.provenance)
        return loaded

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that renders the text; the models share its vocabulary, but not always its chat template."""
        return load_tokenizer(self.config.models[self.config.text.tokenizer])

    @cached_property
    def text(self) -> AnalysisSet:
        """The held-out set: of the run directory, or made again from the text of the run and kept with the results.

        Raises RunConflict where the results' directory holds a set of another text: results there are of that one.
        """
        own = None if self.home is None else _saved_set(self.home)
        mine = own or self._corpus_set()
        there = _saved_set(RunDirectory(self.out))
        if there is not None and there.hash != mine.hash:
            raise RunConflict(
                f"{self.out} holds the analysis set of another text.",
                details=[f"hash there             {there.hash}", f"hash of this held-out  {mine.hash}"],
                hint="Choose another directory with out=PATH (--out).",
            )
        if own is None and there is None:
            mine.save(RunDirectory(self.out).analysis)
        return mine

    def activations(self) -> ActivationSource:
        """Activations of the crosscoder's sources over the analysis set; of a null pair with its made-up source."""
        made = made_up(self._as_models_give(self.text), self.config.activations.null_pair, self._difference)
        return derived(made, self.crosscoder.sources)

    def pair(self, a: str | None, b: str | None) -> tuple[str, str]:
        """The keys of two written sources: those that `a` and `b` name, or the only two where neither is named.

        Raises SourceMismatch or UnknownSource for what is no pair.
        """
        writes = self.crosscoder.writes
        if a is None and b is None and len(writes) == 2:
            return writes.keys[0], writes.keys[1]
        if a is None or b is None:
            raise SourceMismatch(
                f"this crosscoder writes {len(writes)} sources; which two are meant?"
                if len(writes) > 1
                else "two sources are compared; this crosscoder writes one.",
                details=writes.describe(),
                hint="Name both: a=..., b=... (--a, --b), by key or by model alias.",
            )
        source_a, source_b = source_pair(self.crosscoder, a=a, b=b)
        return source_a.key, source_b.key

    @property
    def models_to_splice(self) -> dict[str, StudiedModel] | None:
        """The models that cross-entropy can be measured with: none for encoders, nor where a source is made up."""
        encoders = any(model.architecture.family.encoder for model in self.models.values())
        return None if encoders or self.made_up else self.models

    @property
    def made_up(self) -> bool:
        """Whether a source is made up, so that no model gives it: what edits do to models then says nothing."""
        return self.config.activations.null_pair is not None

    def ancestry(self, a: str, b: str) -> Ancestry | None:
        """How the two models of a pair of source keys are related.

        None where both are of one model, one is a difference, or one is made up from the other.
        """
        sources = self.crosscoder.writes[a], self.crosscoder.writes[b]
        one, two = (source.model for source in sources)
        if self.made_up or one == two or any(source.difference is not None for source in sources):
            return None
        return measure_ancestry(self.models[one], self.models[two])

    @cached_property
    def _difference(self) -> Difference | None:
        """What a structureless null pair was made up with: of the run directory, or measured again on its text."""
        if self.home is not None and self.home.difference.is_file():
            return Difference.load(self.home.difference)
        null = self.config.activations.null_pair
        return None if null is None else measured(null, self._as_models_give(self._corpus()))

    def _as_models_give(self, text: AnalysisSet | Corpus) -> ActivationStream:
        return ActivationStream(self.models, self.crosscoder.sources.underlying, text, seed=self.config.seed)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of tensors, analysis set and null pair, where there is one: which results belong together."""
        digest = xxh3_128(self.text.hash.encode())
        if self.config.activations.null_pair is not None:
            digest.update(self.config.activations.null_pair.model_dump_json().encode())
        for name, tensor in sorted(tensors_of(self.crosscoder).items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _corpus_set(self) -> AnalysisSet:
        corpus = self._corpus()
        aligned = corpus.alignment == "bytes"
        return corpus.held_out(Aligner.of(self.models, vocabulary=corpus.vocabulary) if aligned else None)

    def _corpus(self) -> Corpus:
        self.progress("opening the text", 0, None)
        return Corpus(self.config.text, self.tokenizer, seed=self.config.seed)


def open_run(path: str | Path, *, out: str | Path | None = None, progress: Progress = silent) -> OpenedRun:
    """The run at `path`, or the crosscoder there (directory or Hub id), whose results then go to `out`.

    Raises RunConflict for a run that is not finished, FileFormatError or ConfigError where something is missing.
    """
    directory = _run_directory(Path(path))
    if directory is None:
        crosscoder = Crosscoder.load(path)
        return OpenedRun(crosscoder, _recorded(crosscoder, path), _chosen(out, path), progress=progress)
    if not directory.finished:
        raise RunConflict(
            f"the run in {directory.path} is not finished: it has no trained crosscoder yet.",
            hint=f"Finish it: crosscoder train {directory.config}",
        )
    crosscoder = Crosscoder.load(directory.crosscoder)
    config = RunConfig.load(directory.config)
    return OpenedRun(crosscoder, config, Path(out or directory.path), home=directory, progress=progress)


def _saved_set(directory: RunDirectory) -> AnalysisSet | None:
    return AnalysisSet.load(directory.analysis) if (directory.analysis / "set.json").exists() else None


def open_crosscoder(path: str | Path) -> Crosscoder:
    """The crosscoder of a run, of a directory, or of a Hub id."""
    directory = _run_directory(Path(path))
    return Crosscoder.load(path if directory is None else directory.crosscoder)


def _run_directory(path: Path) -> RunDirectory | None:
    """The run that `path` is, or that it is the crosscoder of."""
    candidates = [path, path.parent] if path.name == "crosscoder" else [path]
    return next((RunDirectory(c) for c in candidates if (c / "run.yaml").is_file()), None)


def _recorded(crosscoder: Crosscoder, path: str | Path) -> RunConfig:
    """The configuration that a crosscoder was saved with."""
    recorded = crosscoder.provenance.get("run")
    if not isinstance(recorded, dict):
        raise FileFormatError(
            f"the crosscoder {path} does not say which models and text made it.",
            details=["missing  provenance.run in config.json"],
            hint="Give its run directory, or use analysis.evaluate(crosscoder, activations, models) in Python.",
        )
    return runfile.validate(RunConfig, recorded, name=f"provenance.run of {path}")


def _chosen(out: str | Path | None, path: str | Path) -> Path:
    if out is None:
        raise ConfigError(
            f"{path} is a crosscoder without a run directory: where should results go?",
            hint="Say so with out=PATH; the analysis set and passages of its text are written there.",
        )
    return Path(out)
