"""Edge cases of the primitive operations, and how far each operation is from sums over pairs in fp64.

The tests run them under Triton's interpreter, `check.py` on a GPU. New memory is NaN meanwhile, so that what a kernel
forgets to write is seen; so are weights past the end of a pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from crosscoder.codes import pointers
from crosscoder.kernels.operations import DecodeError
from crosscoder.kernels.triton import operations
from crosscoder.kernels.triton.patterns import PaddedPattern

PADDING = 5
NAMES = (
    "usual",
    "empty rows",
    "silent latents",
    "no pair",
    "one row",
    "one pair",
    "k = 1",
    "one latent",
    "duplicates",
    "hot latents",
    "long rows",
    "exactly a tile",
)
SHAPES: list[tuple[str, int, torch.dtype]] = [(name, 32, torch.float32) for name in NAMES] + [
    ("usual", 1, torch.float32),
    ("usual", 80, torch.bfloat16),
    ("usual", 300, torch.float32),
    ("long rows", 300, torch.bfloat16),
    ("hot latents", 5, torch.bfloat16),
    ("duplicates", 129, torch.bfloat16),
]


@dataclass(frozen=True)
class Case:
    """Active pairs with weights, padded with latent 0 and NaN, and the tables that go with them."""

    pattern: PaddedPattern
    weights: Tensor
    rows: Tensor
    latents: Tensor
    left: Tensor
    right: Tensor

    def again(self) -> PaddedPattern:
        """The pattern with nothing computed yet."""
        return PaddedPattern(self.pattern.row_pointers, self.pattern.latents, self.pattern.num_latents)


@dataclass(frozen=True)
class Outcome:
    """How one operation did on one case: error relative to the largest result, and two properties."""

    operation: str
    error: float
    padding_is_zero: bool
    repeats: bool

    @property
    def good(self) -> bool:
        """Whether it is as near as fp32 sums are, and the same every time."""
        return self.error <= 2e-5 and self.padding_is_zero and self.repeats


def times_active(name: str) -> Tensor:
    """How often each latent (column) is listed in each row."""
    g = torch.Generator().manual_seed(0)
    usual = (torch.rand(9, 37, generator=g) < 0.3).long()
    hot = torch.zeros(300, 5, dtype=torch.int64)
    hot[:, 2], hot[:270, 4], hot[3, 0] = 1, 1, 1
    made = {
        "usual": usual,
        "empty rows": usual * (torch.arange(9) % 3 != 1)[:, None],
        "silent latents": usual * (torch.arange(37) % 2)[None, :],
        "no pair": usual * 0,
        "one row": usual[:1],
        "one pair": (torch.arange(37) == 20).long()[None, :],
        "k = 1": torch.nn.functional.one_hot(torch.randint(0, 37, (9,), generator=g), 37),
        "one latent": usual[:, :1],
        "duplicates": usual * 2,
        "hot latents": hot,
        "long rows": (torch.rand(3, 320, generator=g) < torch.tensor([[0.9], [0.01], [0.41]])).long(),
        "exactly a tile": (torch.arange(140) < torch.tensor([[128], [129], [0]])).long(),
    }
    return made[name]


def case(name: str, width: int, dtype: torch.dtype, *, device: str = "cpu") -> Case:
    """The case of that name with tables of that width; `left` is strided."""
    counts = times_active(name)
    rows, latents = counts.nonzero(as_tuple=True)
    times = counts[rows, latents]
    rows, latents = rows.repeat_interleave(times), latents.repeat_interleave(times)
    g = torch.Generator().manual_seed(len(rows) + width)
    weights = torch.cat([torch.rand(len(rows), generator=g) + 0.1, torch.full((PADDING,), torch.nan)])
    listed = torch.cat([latents, torch.zeros(PADDING, dtype=torch.int64)])
    left = torch.randn(counts.shape[0], width + 3, generator=g).to(device, dtype)[:, 3:]
    right = torch.randn(counts.shape[1], width, generator=g).to(device, dtype)
    pattern = PaddedPattern(pointers(rows, num_rows=counts.shape[0]).to(device), listed.to(device), counts.shape[1])
    return Case(pattern, weights.to(device), rows.to(device), latents.to(device), left, right)


def outcomes(one: Case) -> Iterator[Outcome]:
    """Every operation on `one`, twice."""
    n, target = len(one.rows), one.left.float()
    left, right, weights = one.left.double(), one.right.double(), one.weights[:n].double()
    y = _sums(one.rows, weights, right[one.latents], one.pattern.num_rows)
    s = _sums(one.latents, weights, left[one.rows], one.pattern.num_latents)
    products = ((left - y)[one.rows] * right[one.latents]).sum(1)
    yield _outcome("sum_by_row", one, lambda p: operations.sum_by_row(p, one.weights, one.right), y)
    yield _outcome("sum_by_latent", one, lambda p: operations.sum_by_latent(p, one.weights, one.left), s)
    pairs = (left[one.rows] * right[one.latents]).sum(1)
    yield _outcome("pair_products", one, lambda p: operations.pair_products(p, one.left, one.right), pairs)

    def decoded(pattern: PaddedPattern) -> DecodeError:
        return operations.decode_error(pattern, one.weights, one.right, target=target)

    yield _outcome("decode_error: error", one, lambda p: decoded(p).error, left - y)
    yield _outcome("decode_error: products", one, lambda p: decoded(p).products, products)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within it, `torch.empty` gives NaN (integers: their largest value)."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan if made.is_floating_point() else torch.iinfo(made.dtype).max)

    with patch("torch.empty", poisoned):
        yield


def _outcome(name: str, one: Case, operation: Callable[[PaddedPattern], Tensor], expected: Tensor) -> Outcome:
    with poisoned_memory():
        got, again = operation(one.again()), operation(one.again())
    own, rest = got[: len(expected)], got[len(expected) :]
    scale = max([1.0, *expected.abs().flatten().tolist()])
    error = max([0.0, *(own.double() - expected).abs().flatten().tolist()]) / scale
    finite = bool(got.isfinite().all())
    return Outcome(name, error if finite else float("inf"), bool((rest == 0).all()), torch.equal(got, again))


def _sums(index: Tensor, weights: Tensor, rows: Tensor, size: int) -> Tensor:
    out = torch.zeros(size, rows.shape[1], dtype=torch.float64, device=rows.device)
    return out.index_add(0, index, weights[:, None] * rows)
