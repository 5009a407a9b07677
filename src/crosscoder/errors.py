"""All errors that a user can cause, in one tree.

    CrosscoderError (ValueError)
    ├── ConfigError             a run file or a setting that cannot be used
    │   └── UnknownKey          a key that no setting has
    ├── UnknownSource           a source or alias that is not among those at hand
    ├── SourceMismatch          activations that do not fit the sources they are for
    ├── WiringError             latent groups that contradict one another or their sources
    ├── ModelNotFound           a path or Hub id that holds no model
    ├── UnsupportedModel        an architecture whose sites cannot be trusted
    ├── UnsupportedSite         a site that this model does not have
    ├── TokenizerMismatch       two models that do not share their tokens
    ├── ModelMismatch           a model that is not the one a crosscoder was trained on
    ├── EditError               an edit of activations that cannot be made
    │   ├── UnknownLatent       a latent that the crosscoder does not have
    │   └── EmptySelection      tokens to edit, of which there is none
    ├── TextError               a data set that is missing, empty or of another shape
    ├── FileFormatError         a file that is truncated, foreign or newer than this package
    ├── NotCalibrated           BatchTopK asked to encode row by row before it has a threshold
    ├── NonFiniteActivations    NaN or infinity in what the model gave
    ├── TrainingDiverged        a loss that is NaN or has exploded
    ├── RunConflict             a run directory that belongs to another configuration
    ├── DiskFull                no room for a file that has to be written
    └── MissingExtra            an optional dependency that is not installed

Every message says what was expected, what came, and the next move.
"""

from __future__ import annotations

from collections.abc import Sequence


class CrosscoderError(ValueError):
    """A mistake that the user can put right: one message, details line by line, and the next move."""

    def __init__(self, message: str, *, details: Sequence[str] = (), hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details = tuple(details)
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.message, *(f"  {line}" for line in self.details)]
        return "\n".join(lines if self.hint is None else [*lines, f"  {self.hint}"])


class ConfigError(CrosscoderError):
    """A run file or a setting that cannot be used."""


class UnknownKey(ConfigError):
    """A key that no setting has; the nearest valid name is in the message."""


class UnknownSource(CrosscoderError):
    """A source or model alias that is not among those at hand."""


class SourceMismatch(CrosscoderError):
    """Activations that do not fit the sources they are meant for."""


class WiringError(CrosscoderError):
    """Latent groups that contradict one another or the sources."""


class ModelNotFound(CrosscoderError):
    """A path or Hub id that holds no model."""


class UnsupportedModel(CrosscoderError):
    """An architecture whose sites are unknown, or a model that failed the self-check on loading."""


class UnsupportedSite(CrosscoderError):
    """A site that this model does not have."""


class TokenizerMismatch(CrosscoderError):
    """Two models that do not share their tokens."""


class ModelMismatch(CrosscoderError):
    """A model that is not the one which a crosscoder was trained on."""


class EditError(CrosscoderError):
    """An edit of activations that cannot be made with this crosscoder, these models or these tokens."""


class UnknownLatent(EditError):
    """A latent that the crosscoder does not have."""


class EmptySelection(EditError):
    """A selection of tokens to edit that holds none."""


class TextError(CrosscoderError):
    """A data set that is missing, empty, or of another shape than described."""


class FileFormatError(CrosscoderError):
    """A file that is truncated, foreign, or newer than this package."""


class NotCalibrated(CrosscoderError):
    """BatchTopK asked to encode row by row before a threshold was calibrated."""


class NonFiniteActivations(CrosscoderError):
    """NaN or infinity in a model's activations."""


class TrainingDiverged(CrosscoderError):
    """A loss that is NaN or has exploded; the last good checkpoint is kept."""


class RunConflict(CrosscoderError):
    """A run directory that was made with another configuration."""


class DiskFull(CrosscoderError):
    """No room for a file that has to be written; nothing half-written is left."""


class MissingExtra(CrosscoderError):
    """An optional dependency that is not installed."""
