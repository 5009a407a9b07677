"""Sparse dictionaries over several sources of language models.

Every public name is loaded when it is first used: `import crosscoder` brings in neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crosscoder import analysis, capture, errors, interop, interventions, synthetic, wiring
    from crosscoder.activations import ActivationSource, Batch, Rows
    from crosscoder.codes import SparseCode
    from crosscoder.crosscoder import Crosscoder
    from crosscoder.errors import CrosscoderError
    from crosscoder.nonlinearities import BatchTopK, JumpReLU, ReLU, TopK
    from crosscoder.sources import Source, SourceSet, difference
    from crosscoder.training.config import RunConfig, TrainConfig
    from crosscoder.training.run import TrainResult, train, train_together
    from crosscoder.training.trainer import Trainer
    from crosscoder.wiring import LatentGroup, Wiring

__version__ = "0.1.0"

__all__ = [
    "ActivationSource",
    "Batch",
    "BatchTopK",
    "Crosscoder",
    "CrosscoderError",
    "JumpReLU",
    "LatentGroup",
    "ReLU",
    "Rows",
    "RunConfig",
    "Source",
    "SourceSet",
    "SparseCode",
    "TopK",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "Wiring",
    "analysis",
    "capture",
    "difference",
    "errors",
    "interop",
    "interventions",
    "synthetic",
    "train",
    "train_together",
    "wiring",
]

_HOMES = {
    "ActivationSource": "activations",
    "Batch": "activations",
    "BatchTopK": "nonlinearities",
    "Crosscoder": "crosscoder",
    "CrosscoderError": "errors",
    "JumpReLU": "nonlinearities",
    "LatentGroup": "wiring",
    "ReLU": "nonlinearities",
    "Rows": "activations",
    "RunConfig": "training.config",
    "Source": "sources",
    "SourceSet": "sources",
    "SparseCode": "codes",
    "TopK": "nonlinearities",
    "TrainConfig": "training.config",
    "TrainResult": "training.run",
    "Trainer": "training.trainer",
    "Wiring": "wiring",
    "difference": "sources",
    "train": "training.run",
    "train_together": "training.run",
}
_ROOMS = ("analysis", "capture", "errors", "interop", "interventions", "synthetic", "wiring")


def __getattr__(name: str) -> object:
    """The public name `name`, imported on first use and kept (PEP 562)."""
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return [*__all__, "__version__"]
