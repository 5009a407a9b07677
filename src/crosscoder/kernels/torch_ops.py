"""The sparse primitives in torch operations: sums over the pairs of a row or of a latent, and products of pairs.

    sum_by_row      y_r = Σ_{p in row r} v_p T_{i(p)}           decode; the gradient of x
    sum_by_latent   G_i = Σ_{p on i} v_p T_{r(p)}               both weight gradients
    pair_products   u_p = L_{r(p)} · R_{i(p)}                   values of chosen pairs; the gradient of values
    decode_error    e = y − Σ v d,  u_p = e_{r(p)} · d_{i(p)}   both at once
    add_by_latent   s_i = Σ_{p on i} v_p                        the gradient of biases

Exact but for the order of summation, in the tables' dtype; the same pairs give the same bits. Every sum goes over a
list that is sorted by the side it sums for, so nothing is scattered and no (rows x latents) matrix exists. Products of
pairs go latent by latent, so that what is gathered is the table of rows, the smaller of the two.
"""

from __future__ import annotations

import warnings
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import embedding_bag

from crosscoder.codes import Pattern
from crosscoder.kernels.operations import DecodeError

CHUNK_ELEMENTS = 2**19
"""Weight gradients are summed so many numbers at a time: new memory costs more than the sums, and this much is reused.
"""


def sum_by_row(
    pattern: Pattern, weights: Float[Tensor, "active"], table: Float[Tensor, "latents width"]
) -> Float[Tensor, "rows width"]:
    """`Σ_{p in row r} weights_p · table[latent_p]` for every row."""
    return _segment_sums(pattern.latents, table, pattern.row_pointers, weights)


def sum_by_latent(
    pattern: Pattern,
    weights: Float[Tensor, "active"],
    table: Float[Tensor, "rows width"],
    *,
    out: Float[Tensor, "latents width"] | None = None,
) -> Float[Tensor, "latents width"]:
    """`Σ_{p on latent i} weights_p · table[row_p]` for every latent; written into `out` where one is given."""
    out = table.new_empty(pattern.num_latents, table.shape[1]) if out is None else out
    rows, starts, weights = pattern.rows_by_latent, pattern.latent_pointers, weights[pattern.by_latent]
    table = table.contiguous()
    step = max(1, CHUNK_ELEMENTS // max(1, table.shape[1]))
    edges = [*range(0, pattern.num_latents, step), pattern.num_latents]
    for (i, j), (a, b) in zip(pairwise(edges), pairwise(starts[edges].tolist()), strict=True):
        out[i:j] = _segment_sums(rows[a:b], table, starts[i : j + 1] - a, weights[a:b])
    return out


def add_by_latent(pattern: Pattern, weights: Float[Tensor, "active"]) -> Float[Tensor, "latents"]:
    """`Σ_{p on latent i} weights_p` for every latent; differentiable."""
    if not weights.shape[0]:
        return weights.new_zeros(pattern.num_latents)
    offsets = pattern.latent_pointers
    return torch.segment_reduce(weights[pattern.by_latent], "sum", offsets=offsets, initial=0.0, unsafe=True)


def decode_error(
    pattern: Pattern,
    values: Float[Tensor, "active"],
    decoder: Float[Tensor, "latents width"],
    *,
    target: Float[Tensor, "rows width"],
) -> DecodeError:
    """What the code leaves of `target`, and for every pair its product with the decoder row."""
    error = target - sum_by_row(pattern, values, decoder)
    return DecodeError(error, pair_products(pattern, error, decoder))


def pair_products(
    pattern: Pattern, left: Float[Tensor, "rows width"], right: Float[Tensor, "latents width"]
) -> Float[Tensor, "active"]:
    """`left[row_p] · right[latent_p]` for every pair."""
    found = latent_products((pattern.latent_pointers, pattern.rows_by_latent), left, right)
    return torch.empty_like(found).index_copy_(0, pattern.by_latent, found)


def latent_products(
    pairs: tuple[Tensor, Tensor], left: Float[Tensor, "rows width"], right: Float[Tensor, "latents width"]
) -> Float[Tensor, "active"]:
    """`left[row_p] · right[latent_p]` for pairs sorted by latent: where each latent's start, and their rows."""
    starts, rows = pairs
    zeros = left.new_zeros(rows.shape[0])
    size = (right.shape[0], left.shape[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse")  # torch announces that its CSR tensors are in beta
        sampled = torch.sparse_csr_tensor(starts, rows, zeros, size=size, check_invariants=False)
        return torch.sparse.sampled_addmm(sampled, right, left.T, beta=0.0).values()


def _segment_sums(index: Tensor, table: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    if starts.shape[0] == 1:
        return table.new_zeros(0, table.shape[1])
    return embedding_bag(index, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)
