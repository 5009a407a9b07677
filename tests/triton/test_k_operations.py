"""The primitive operations under the interpreter against sums over pairs in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from crosscoder.codes import Pattern, SparseCode, pointers
from crosscoder.kernels.triton import latent_sums, operations, row_products
from crosscoder.kernels.triton.patterns import PaddedPattern

PADDING = 5


@dataclass(frozen=True)
class Case:
    """Active pairs with weights, padded with latent 0 and NaN, and the tables that go with them."""

    pattern: PaddedPattern
    weights: Tensor
    rows: Tensor
    latents: Tensor
    left: Tensor
    right: Tensor

    @property
    def num_active(self) -> int:
        return len(self.rows)

    @property
    def active_weights(self) -> Tensor:
        return self.weights[: self.num_active]


def padded(rows: Tensor, latents: Tensor, *, size: tuple[int, int], width: int, dtype: torch.dtype) -> Case:
    g = torch.Generator().manual_seed(len(rows) + width)
    weights = torch.cat([torch.rand(len(rows), generator=g) + 0.1, torch.full((PADDING,), torch.nan)])
    listed = torch.cat([latents, torch.zeros(PADDING, dtype=torch.int64)])
    pattern = PaddedPattern(pointers(rows, num_rows=size[0]), listed, size[1])
    left = torch.randn(size[0], width + 3, generator=g).to(dtype)[:, 3:]  # strided
    right = torch.randn(size[1], width, generator=g).to(dtype)
    return Case(pattern, weights, rows, latents, left, right)


def masks(name: str) -> Tensor:
    """How often each latent is active in each row."""
    g = torch.Generator().manual_seed(0)
    usual = (torch.rand(9, 37, generator=g) < 0.3).long()
    hot = torch.zeros(600, 5, dtype=torch.int64)
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


NAMES = (
    "usual", "empty rows", "silent latents", "no pair", "one row", "one pair", "k = 1", "one latent", "duplicates",
    "hot latents", "long rows", "exactly a tile",
)  # fmt: skip
SHAPES = [(name, 32, torch.float32) for name in NAMES] + [
    ("usual", 1, torch.float32), ("usual", 80, torch.bfloat16), ("usual", 300, torch.float32),
    ("long rows", 300, torch.bfloat16), ("hot latents", 5, torch.bfloat16), ("duplicates", 129, torch.bfloat16),
]  # fmt: skip


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}, {shape[1]} wide, {str(shape[2])[6:]}")
def case(request: pytest.FixtureRequest) -> Case:
    name, width, dtype = request.param
    counts = masks(name)
    rows, latents = counts.nonzero(as_tuple=True)
    times = counts[rows, latents]
    size = (counts.shape[0], counts.shape[1])
    return padded(rows.repeat_interleave(times), latents.repeat_interleave(times), size=size, width=width, dtype=dtype)


def assert_near(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == torch.float32
    scale = max([1.0, *expected.abs().flatten().tolist()])
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-5 * scale)


def test_sum_by_row(case: Case, dense_sum: Callable[..., Tensor]) -> None:
    got = operations.sum_by_row(case.pattern, case.weights, case.right)
    assert_near(got, dense_sum(case.rows, case.active_weights, case.right[case.latents], case.pattern.num_rows))


def test_sum_by_latent(case: Case, dense_sum: Callable[..., Tensor]) -> None:
    got = operations.sum_by_latent(case.pattern, case.weights, case.left)
    assert_near(got, dense_sum(case.latents, case.active_weights, case.left[case.rows], case.pattern.num_latents))
    assert torch.equal(got, operations.sum_by_latent(PaddedPattern(*fields(case.pattern)), case.weights, case.left))


def test_pair_products(case: Case) -> None:
    got = operations.pair_products(case.pattern, case.left, case.right)
    assert_near(got[: case.num_active], (case.left[case.rows].double() * case.right[case.latents].double()).sum(1))
    assert got[case.num_active :].tolist() == [0.0] * PADDING


def test_decode_error(case: Case, dense_sum: Callable[..., Tensor]) -> None:
    target = case.left.float()
    got = operations.decode_error(case.pattern, case.weights, case.right, target=target)
    y = dense_sum(case.rows, case.active_weights, case.right[case.latents], case.pattern.num_rows)
    assert_near(got.error, target.double() - y)
    products = ((target.double() - y)[case.rows] * case.right[case.latents].double()).sum(1)
    assert_near(got.products[: case.num_active], products)
    assert got.products[case.num_active :].tolist() == [0.0] * PADDING
    again = operations.decode_error(case.pattern, case.weights, case.right, target=target)
    assert torch.equal(again.error, got.error) and torch.equal(again.products, got.products)


def fields(pattern: PaddedPattern) -> tuple[Tensor, Tensor, int]:
    return pattern.row_pointers, pattern.latents, pattern.num_latents


def test_by_hand() -> None:
    code = SparseCode.from_dense(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]]))
    table = torch.tensor([[1.0, 1.0], [10.0, 0.0], [0.0, 100.0]])
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert operations.sum_by_row(code.pattern, code.values, table).tolist() == [[20.0, 0.0], [1.0, 301.0]]
    assert operations.sum_by_latent(code.pattern, code.values, x).tolist() == [[3.0, 4.0], [2.0, 4.0], [9.0, 12.0]]
    assert operations.pair_products(code.pattern, x, table).tolist() == [10.0, 7.0, 400.0]
    left = operations.decode_error(code.pattern, code.values, table, target=x)
    assert left.error.tolist() == [[-19.0, 2.0], [2.0, -297.0]]
    assert left.products.tolist() == [-190.0, -295.0, -29700.0]


def test_hot_latents_are_cut_into_pieces() -> None:
    """The case `hot latents` is one: 600 = 256 + 256 + 88 pairs, and 270 = 256 + 14."""
    starts = torch.tensor([0, 1, 601, 871])
    pieces = latent_sums._pieces(starts, capacity=871)
    assert pieces.pointers.tolist() == [0, 0, 3, 5]
    assert pieces.begins.tolist()[:5] == [1, 257, 513, 601, 857]
    assert pieces.ends.tolist()[:5] == [257, 513, 601, 857, 871]
    assert pieces.begins[5:].tolist() == pieces.ends[5:].tolist() == [0]


@pytest.mark.parametrize("lengths", [[257] * 4, [1024], [256] * 4, [0, 1024, 0]])
def test_pieces_never_outnumber_their_slots(lengths: list[int]) -> None:
    starts = torch.tensor([0, *lengths]).cumsum(0)
    pieces = latent_sums._pieces(starts, capacity=int(starts[-1]))
    assert int(pieces.pointers[-1]) <= len(pieces.begins)
    covered = sum(n for n in lengths if n > latent_sums.PIECE.value)
    assert int((pieces.ends - pieces.begins).sum()) == covered


def test_what_is_past_the_limit_stays(case: Case) -> None:
    before = torch.arange(case.pattern.latents.shape[0]).float()
    into = before.clone()
    row_products.multiply_pairs(case.pattern, case.left, case.right, into=into, limit=torch.zeros(1, dtype=torch.int64))
    assert torch.equal(into, before)


def test_patterns_without_padding_give_the_same(case: Case) -> None:
    n = case.num_active
    plain = Pattern(case.pattern.row_pointers, case.latents, case.pattern.num_latents)
    got = operations.sum_by_latent(plain, case.weights[:n], case.left)
    assert torch.equal(got, operations.sum_by_latent(case.pattern, case.weights, case.left))
    assert torch.equal(PaddedPattern.of(plain).row_ids, case.rows)
