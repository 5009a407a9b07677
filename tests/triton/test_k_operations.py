"""The primitive operations under the interpreter against sums over pairs in fp64."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from crosscoder.codes import Pattern, SparseCode
from crosscoder.kernels.operations import Operations
from crosscoder.kernels.triton import operations, row_products, segment_sums

edges = import_module("gpu_edges")


@pytest.mark.parametrize(("name", "width", "dtype"), edges.SHAPES)
def test_edge_cases(name: str, width: int, dtype: torch.dtype) -> None:
    found = list(edges.outcomes(edges.case(name, width, dtype)))
    assert len(found) == 5
    assert [outcome for outcome in found if not outcome.good] == []


@pytest.mark.parametrize("broken", ["error", "padding", "repeats"])
def test_the_edge_cases_can_fail(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))
    right = operations.pair_products

    def wrong(pattern: Pattern, left: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        got = right(pattern, left, table)
        got[0 if broken == "error" else -1 if broken == "padding" else 1] += 1e-3
        return got + 1e-7 * next(calls) if broken == "repeats" else got

    monkeypatch.setattr(operations, "pair_products", wrong)
    found = [outcome for outcome in edges.outcomes(edges.case("usual", 32, torch.float32)) if not outcome.good]
    assert [outcome.operation for outcome in found] == ["pair_products"]


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
    """The longest here is 600 = 256 + 256 + 88."""
    starts = torch.tensor([0, 1, 601, 871])
    pieces = segment_sums._pieces(starts, capacity=871)
    assert pieces.pointers.tolist() == [0, 0, 3, 5]
    assert pieces.begins.tolist()[:5] == [1, 257, 513, 601, 857]
    assert pieces.ends.tolist()[:5] == [257, 513, 601, 857, 871]
    assert pieces.begins[5:].tolist() == pieces.ends[5:].tolist() == [0]


@pytest.mark.parametrize("lengths", [[257] * 4, [1024], [256] * 4, [0, 1024, 0]])
def test_pieces_never_outnumber_their_slots(lengths: list[int]) -> None:
    starts = torch.tensor([0, *lengths]).cumsum(0)
    pieces = segment_sums._pieces(starts, capacity=int(starts[-1]))
    assert int(pieces.pointers[-1]) <= len(pieces.begins)
    covered = sum(n for n in lengths if n > segment_sums.PIECE.value)
    assert int((pieces.ends - pieces.begins).sum()) == covered


def test_what_is_past_the_limit_stays() -> None:
    case = edges.case("usual", 32, torch.float32)
    before = torch.arange(case.pattern.latents.shape[0]).float()
    into = before.clone()
    row_products.multiply_pairs(case.pattern, case.left, case.right, into=into, limit=torch.zeros(1, dtype=torch.int64))
    assert torch.equal(into, before)


@pytest.mark.parametrize("name", ["usual", "hot latents", "no pair"])
def test_patterns_without_padding_give_the_same(name: str) -> None:
    case = edges.case(name, 20, torch.float32)
    n = len(case.rows)
    plain = Pattern(case.pattern.row_pointers, case.latents, case.pattern.num_latents)
    got = operations.sum_by_latent(plain, case.weights[:n], case.left)
    assert torch.equal(got, operations.sum_by_latent(case.pattern, case.weights, case.left))


def test_sums_are_written_where_they_are_wanted() -> None:
    backend: Operations = operations
    case = edges.case("usual", 32, torch.float32)
    out = torch.full((37, 32), torch.nan)
    assert backend.sum_by_latent(case.pattern, case.weights, case.left, out=out) is out
    assert torch.equal(out, operations.sum_by_latent(case.pattern, case.weights, case.left))


def test_other_types_are_refused() -> None:
    case = edges.case("usual", 32, torch.float32)
    with pytest.raises(AssertionError, match="fp32 or bf16"):
        operations.sum_by_row(case.pattern, case.weights, case.right.double())
    with pytest.raises(AssertionError, match="whole rows of fp32"):
        operations.sum_by_latent(case.pattern, case.weights, case.left, out=torch.empty(32, 37).T)
