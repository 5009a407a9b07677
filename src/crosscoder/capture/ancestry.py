"""Whether two models descend from one another: do their weights still point the same way?

    cosine of a tensor   ⟨w_a, w_b⟩ / (‖w_a‖ ‖w_b‖)     over up to 65,536 evenly spaced values
    cosine of the pair   the median over matrices, each weighted by its number of values

Two independent initialisations stay at about 0, whatever they learn; a model and its fine-tune stay near 1. Vectors
(norms, biases) are left out, for those of any two models are alike. An adapter that is not merged is left out too: what
it sits on is the ancestor. Of matrices that differ in length alone, such as embeddings of a vocabulary that was added
to, the rows that both have are compared. Models of one ancestry write their activations in one basis, so that a
direction of the one can be looked for in the other; without it there is nothing to compare by a direction.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crosscoder.capture.models import StudiedModel
from crosscoder.errors import ConfigError

MIN_COSINE = 0.25
"""Models above this are of one ancestry: a convention, far from both ends."""
MIN_COMPARABLE = 0.5
"""The share of the smaller model's values that must have a counterpart of the same name and shape in the other."""
_VALUES_PER_TENSOR = 65_536
_ADAPTER = re.compile(r"\.(lora_\w+|modules_to_save|ia3_\w+)\.")


@dataclass(frozen=True)
class Ancestry:
    """How alike the weights of the models `a` and `b` are.

    `cosine` is NaN where too few of their tensors correspond; `comparable` is the share of values that do.
    """

    a: str
    b: str
    cosine: float
    comparable: float
    num_tensors: int

    @property
    def shared(self) -> bool:
        """Whether the two are of one ancestry."""
        return self.comparable >= MIN_COMPARABLE and self.cosine >= MIN_COSINE

    @property
    def reason(self) -> str | None:
        """Why they are not, if they are not."""
        if self.comparable < MIN_COMPARABLE:
            return (
                f"{self.a} and {self.b} share no ancestry: {self.comparable:.0%} of the weights have a counterpart of "
                "the same name and shape."
            )
        if not self.shared:
            return f"{self.a} and {self.b} share no ancestry: the cosine of their weights is {self.cosine:.3f}."
        return None

    def between(self, a: str, b: str) -> Ancestry:
        """This, for the models `a` and `b`; raises ConfigError when it is of two others."""
        if {a, b} != {self.a, self.b}:
            raise ConfigError(
                f"expected the ancestry of {a} and {b}; got that of {self.a} and {self.b}.",
                hint="Measure it: capture.measure_ancestry(model_a, model_b).",
            )
        return self

    def to_json(self) -> dict[str, Any]:
        """The numbers and the verdict."""
        return {
            "a": self.a,
            "b": self.b,
            "cosine": None if self.cosine != self.cosine else self.cosine,
            "comparable": self.comparable,
            "num_tensors": self.num_tensors,
            "shared": self.shared,
        }


def measure_ancestry(a: StudiedModel, b: StudiedModel) -> Ancestry:
    """How alike the weights of two models are; neither is changed, and a few values of each tensor are read."""
    matrices_a, matrices_b = _matrices(a.model), _matrices(b.model)
    both = [name for name, w in matrices_a.items() if name in matrices_b and matrices_b[name].shape[1:] == w.shape[1:]]
    rows = {name: min(len(matrices_a[name]), len(matrices_b[name])) for name in both}
    common = [name for name in both if rows[name] >= MIN_COMPARABLE * max(len(matrices_a[name]), len(matrices_b[name]))]
    sizes = [matrices_a[name][: rows[name]].numel() for name in common]
    smaller = min(sum(w.numel() for w in matrices.values()) for matrices in (matrices_a, matrices_b))
    cosines = [_cosine(matrices_a[name][: rows[name]], matrices_b[name][: rows[name]]) for name in common]
    return Ancestry(a.alias, b.alias, _median(cosines, sizes), sum(sizes) / max(1, smaller), len(common))


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    """The weights with two dimensions or more by name; those under an adapter by the name they have without."""
    named = ((f".{name}", weight) for name, weight in model.named_parameters())
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): weight.detach()
        for name, weight in named
        if weight.ndim > 1 and not _ADAPTER.search(name)
    }


def _cosine(a: Tensor, b: Tensor) -> float:
    stride = 1 + a.numel() // _VALUES_PER_TENSOR
    a, b = (w.reshape(-1)[::stride].to("cpu", torch.float64) for w in (a, b))
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))


def _median(values: list[float], weights: list[int]) -> float:
    """The value at half of the weight; NaN of nothing."""
    if not values:
        return float("nan")
    order = sorted(range(len(values)), key=values.__getitem__)
    half, seen = sum(weights) / 2, 0
    for i in order:
        seen += weights[i]
        if seen >= half:
            return values[i]
    return values[order[-1]]
