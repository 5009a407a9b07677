"""Selection and sparse kernels against the dense definition, in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crosscoder.codes import SparseCode
from crosscoder.kernels import reference, selection, sparse


def block_of(pre: Tensor) -> selection.Block:
    return lambda first, last: pre[first:last]


def dense(found: selection.Selection, like: Tensor) -> Tensor:
    out = torch.zeros_like(like)
    out[found.rows, found.latents] = found.values
    return out


def test_batch_top_k_by_hand() -> None:
    pre = torch.tensor([[5.0, 1.0, -2.0], [0.5, 4.0, 3.0]])
    gate = torch.tensor([1.0, 1.0, 2.0])  # scores 5 1 -4 | .5 4 6
    found = selection.batch_top_k(block_of(pre), num_rows=2, gate=gate, k=1)
    assert dense(found, pre).tolist() == [[5.0, 0.0, 0.0], [0.0, 0.0, 3.0]]


def test_top_k_by_hand_keeps_nothing_negative() -> None:
    pre = torch.tensor([[-5.0, -1.0, -2.0], [0.5, -4.0, 3.0], [1.0, 2.0, 3.0]])
    found = selection.top_k(block_of(pre), num_rows=3, gate=torch.tensor([9.0, 1.0, 1.0]), k=2)
    assert dense(found, pre).tolist() == [[0, 0, 0], [0.5, 0, 3.0], [1.0, 0, 3.0]]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 1300), latents=st.integers(1, 60), k=st.integers(1, 20), seed=st.integers(0, 10**6),
    shift=st.sampled_from([-3.0, -1.0, 0.0, 2.0]), kind=st.sampled_from(["top_k", "batch_top_k"]),
)  # fmt: skip
def test_selection_equals_the_dense_definition(
    rows: int, latents: int, k: int, seed: int, shift: float, kind: str
) -> None:
    g = torch.Generator().manual_seed(seed)
    pre = torch.randn(rows, latents, generator=g, dtype=torch.float64) + shift
    gate = torch.rand(latents, generator=g, dtype=torch.float64) + 0.1
    score = pre * gate
    mask = reference.top_k_mask(score, k) if kind == "top_k" else reference.batch_top_k_mask(score, k)
    found = getattr(selection, kind)(block_of(pre), num_rows=rows, gate=gate, k=k)
    assert torch.equal(dense(found, pre), pre * mask)
    assert bool((found.rows.diff() >= 0).all())


def test_batch_top_k_is_exact_when_the_first_block_is_unlike_the_rest() -> None:
    pre = torch.rand(2000, 40, dtype=torch.float64)
    pre[:512] += 100.0  # the cut estimated there is far above everything else
    found = selection.batch_top_k(block_of(pre), num_rows=2000, gate=torch.ones(40).double(), k=30)
    assert found.values.shape[0] == 30 * 2000
    assert torch.equal(dense(found, pre), pre * reference.batch_top_k_mask(pre, 30))


@pytest.mark.parametrize("positives", [0, 3, 640])
def test_batch_top_k_keeps_exactly_k_rows_or_all_positives(positives: int) -> None:
    pre = -torch.rand(64, 20, dtype=torch.float64)
    pre.flatten()[:positives] = 1.0  # ties at the cut included
    found = selection.batch_top_k(block_of(pre), num_rows=64, gate=torch.ones(20).double(), k=5)
    assert found.values.shape[0] == min(positives, 320)


def code_and_tables(seed: int, *, empty_latent: bool) -> tuple[SparseCode, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    f = torch.relu(torch.randn(37, 19, generator=g, dtype=torch.float64) - 0.8)
    f[5] = 0
    if empty_latent:
        f[:, 7] = 0
    tables = (torch.randn(n, 11, generator=g, dtype=torch.float64) for n in (19, 37, 37))
    return SparseCode.from_dense(f), *tables  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("empty_latent", [True, False])
def test_sparse_decode_and_its_gradients_equal_the_dense_ones(empty_latent: bool) -> None:
    code, decoder, grad, _ = code_and_tables(0, empty_latent=empty_latent)
    values = code.values.clone().requires_grad_()
    decoder.requires_grad_()
    y = sparse.decode(values, decoder, code.pattern)
    y.backward(grad)
    f = code.to_dense().requires_grad_()
    twin = decoder.detach().clone().requires_grad_()
    expected = reference.decode(f, twin)
    expected.backward(grad)
    assert f.grad is not None
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(decoder.grad, twin.grad)
    torch.testing.assert_close(values.grad, f.grad[code.row_ids, code.latents])


def test_sparse_encode_gradients_equal_the_dense_ones() -> None:
    code, encoder, x, _ = code_and_tables(1, empty_latent=True)
    bias = torch.randn(19, dtype=torch.float64)
    grad = torch.randn(code.num_active, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, encoder, bias)]
    pre = (x @ encoder.T + bias)[code.row_ids, code.latents]
    sparse.encode(*leaves, values=pre, pattern=code.pattern).backward(grad)
    twins = [t.clone().requires_grad_() for t in (x, encoder, bias)]
    (twins[0] @ twins[1].T + twins[2])[code.row_ids, code.latents].backward(grad)
    for leaf, twin in zip(leaves, twins, strict=True):
        torch.testing.assert_close(leaf.grad, twin.grad)


def test_a_code_survives_dense_and_back_and_splits_by_latents() -> None:
    code, *_ = code_and_tables(2, empty_latent=True)
    f = code.to_dense()
    again = SparseCode.from_dense(f)
    assert torch.equal(again.latents, code.latents)
    assert torch.equal(again.row_pointers, code.row_pointers)
    assert torch.equal(code.of_latents(4, 12).to_dense(), f[:, 4:12])


def test_no_rows_and_no_active_pairs_are_fine() -> None:
    decoder = torch.randn(4, 3)
    empty = SparseCode.from_dense(torch.zeros(0, 4))
    assert sparse.decode(empty.values, decoder, empty.pattern).shape == (0, 3)
    silent = SparseCode.from_dense(torch.zeros(2, 4))
    assert sparse.decode(silent.values, decoder, silent.pattern).tolist() == [[0, 0, 0], [0, 0, 0]]
