"""Selection and sparse kernels against the dense definition: in fp64, and in fp32 with a bf16 product that proposes."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from crosscoder.codes import Pattern, SparseCode
from crosscoder.crosscoder import Crosscoder
from crosscoder.kernels import candidates, reference, selection, sparse, torch_ops
from crosscoder.kernels.candidates import Encoding
from crosscoder.kernels.cuts import Cut
from crosscoder.kernels.spares import Spares
from crosscoder.kernels.sparse import Decoding
from crosscoder.nonlinearities import BatchTopK
from crosscoder.sources import Source
from crosscoder.wiring import sae


def scores_as(pre: Tensor, gate: Tensor | None = None) -> Encoding:
    """An encoding whose pre-activations are `pre`."""
    latents = pre.shape[1]
    gate = torch.ones(latents).to(pre) if gate is None else gate
    return Encoding(pre, torch.eye(latents).to(pre), torch.zeros(latents).to(pre), gate)


def dense(codes: list[SparseCode]) -> Tensor:
    return SparseCode.side_by_side(codes).to_dense()


def drawn(rows: int, latents: int, width: int, *, seed: int, proposes: bool = False) -> Encoding:
    g = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if proposes else torch.float64
    x, encoder = (torch.randn(n, width, generator=g, dtype=torch.float64).to(dtype) for n in (rows, latents))
    bias = torch.randn(latents, generator=g, dtype=torch.float64).to(dtype) * 0.1
    gate = torch.rand(latents, generator=g, dtype=torch.float64).to(dtype) + 0.1
    return Encoding(x, encoder, bias, gate, encoder.bfloat16() if proposes else None)


def test_batch_top_k_by_hand() -> None:
    pre = torch.tensor([[5.0, 1.0, -2.0], [0.5, 4.0, 3.0]])
    gate = torch.tensor([1.0, 1.0, 2.0])  # scores 5 1 -4 | .5 4 6
    assert dense(selection.batch_top_k([scores_as(pre, gate)], 1, Cut())).tolist() == [[5.0, 0.0, 0.0], [0.0, 0.0, 3.0]]


def test_top_k_by_hand_keeps_nothing_negative() -> None:
    pre = torch.tensor([[-5.0, -1.0, -2.0], [0.5, -4.0, 3.0], [1.0, 2.0, 3.0]])
    found = selection.top_k([scores_as(pre, torch.tensor([9.0, 1.0, 1.0]))], 2, Cut())
    assert dense(found).tolist() == [[0, 0, 0], [0.5, 0, 3.0], [1.0, 0, 3.0]]


def test_above_threshold_by_hand() -> None:
    pre = torch.tensor([[5.0, 1.0, -2.0], [0.5, 4.0, 3.0]])
    found = selection.above_threshold([scores_as(pre)], [torch.tensor([0.5, 2.0, -3.0])], Cut())
    assert [code.latents.tolist() for code in found] == [[0, 2, 1, 2]], "0.5 is not above 0.5"


def test_of_equal_scores_the_lowest_row_and_then_the_lowest_latent_is_kept() -> None:
    pre = torch.tensor([[1.0, 2.0, 1.0], [1.0, 3.0, 1.0], [1.0, 1.0, 1.0]])
    halves = [scores_as(pre[:, :2].contiguous()), scores_as(pre[:, 2:].contiguous())]
    for found in (
        selection.batch_top_k([scores_as(pre)], 1, Cut()),
        selection.batch_top_k([scores_as(pre)], 1, Cut(0.9)),
    ):
        assert dense(found).tolist() == [[1, 2, 0], [0, 3, 0], [0, 0, 0]]
    wide = [Encoding(pre, torch.eye(3)[rows], torch.zeros(len(rows)), torch.ones(len(rows))) for rows in ([0, 1], [2])]
    assert dense(selection.batch_top_k(wide, 1, Cut(0.9))).tolist() == [[1, 2, 0], [0, 3, 0], [0, 0, 0]]
    assert dense(selection.top_k([scores_as(pre)], 2, Cut())).tolist() == [[1, 2, 0], [1, 3, 0], [1, 1, 0]]
    assert len(halves) == 2


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 300), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3), k=st.integers(1, 20),
    seed=st.integers(0, 10**6), shift=st.sampled_from([-3.0, -1.0, 0.0, 2.0]),
    kind=st.sampled_from(["top_k", "batch_top_k"]), guess=st.sampled_from([0.0, 0.01, 1.0, 30.0]),
)  # fmt: skip
def test_selection_equals_the_dense_definition_whatever_the_cut(
    rows: int, sizes: list[int], k: int, seed: int, shift: float, kind: str, guess: float
) -> None:
    groups = [drawn(rows, latents, 7, seed=seed + i) for i, latents in enumerate(sizes)]
    for group in groups:
        group.bias.add_(shift)
    pre = torch.cat([torch.addmm(g.bias, g.x, g.encoder.T) for g in groups], dim=1)
    score = pre * torch.cat([g.gate for g in groups])
    mask = reference.top_k_mask(score, k) if kind == "top_k" else reference.batch_top_k_mask(score, k)
    cut = Cut(score=guess)
    for _ in range(2):
        found = getattr(selection, kind)(groups, k, cut)
        torch.testing.assert_close(dense(found), pre * mask, rtol=1e-13, atol=1e-13)
        for code in found:
            assert bool((code.row_ids.diff() >= 0).all())
            assert torch.equal(code.pattern.latents[code.pattern.by_latent], code.latents.sort(stable=True).values)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 200), latents=st.integers(1, 5000), width=st.integers(1, 40), k=st.integers(1, 12),
    seed=st.integers(0, 10**6), kind=st.sampled_from(["top_k", "batch_top_k", "above_threshold"]),
    guess=st.sampled_from([0.0, 0.01, 4.0, 30.0]),
)  # fmt: skip
def test_what_bf16_proposes_and_fp32_decides_is_what_fp32_keeps(
    rows: int, latents: int, width: int, k: int, seed: int, kind: str, guess: float
) -> None:
    group = drawn(rows, latents, width, seed=seed, proposes=True)
    score = (torch.addmm(group.bias.double(), group.x.double(), group.encoder.double().T) * group.gate).double()
    if kind == "above_threshold":
        found = selection.above_threshold([group], [torch.full((latents,), 2.0)], Cut(slack=guess / 30))
        mask, edge = score > 2.0, torch.tensor(2.0)
    else:
        found = getattr(selection, kind)([group], k, Cut(score=guess))
        define = reference.top_k_mask if kind == "top_k" else reference.batch_top_k_mask
        mask = define(score, k)
        kept = torch.where(mask, score, torch.inf)
        edge = kept.amin(1, keepdim=True) if kind == "top_k" else kept.amin()
    differing = (dense(found) != 0) ^ mask
    assert bool(((score - edge).abs()[differing] < 1e-5 * score.abs().max()).all())
    assert found[0].num_active == int(mask.sum()) or kind == "above_threshold"
    values = dense(found).double()
    torch.testing.assert_close(values, torch.where(values != 0, score / group.gate, 0.0), rtol=1e-5, atol=1e-5)


def test_a_product_that_errs_more_than_the_margin_is_made_again() -> None:
    """The proposer is a bad copy: what it proposes at first is not enough, and the selection says so and widens."""
    exact = drawn(300, 2000, 16, seed=3, proposes=True)
    bad = Encoding(exact.x, exact.encoder, exact.bias, exact.gate, (exact.encoder * 1.3 - 0.1).bfloat16())
    for kind, args in (("batch_top_k", (4,)), ("top_k", (4,)), ("above_threshold", ([torch.full((2000,), 1.0)],))):
        pick = getattr(selection, kind)
        found, expected = (pick([e], *args, Cut(score=2.0)) for e in (bad, exact))
        assert torch.equal(found[0].latents, expected[0].latents), kind
        torch.testing.assert_close(dense(found), dense(expected))


def test_batch_top_k_is_exact_when_a_sample_is_unlike_the_rest() -> None:
    pre = torch.rand(2000, 40, dtype=torch.float64)
    pre[::15] += 100.0  # the cut estimated on these rows is far above everything else
    found = selection.batch_top_k([scores_as(pre)], 30, Cut())
    assert found[0].num_active == 30 * 2000
    torch.testing.assert_close(dense(found), pre * reference.batch_top_k_mask(pre, 30))


@pytest.mark.parametrize("positives", [0, 3, 640])
def test_batch_top_k_keeps_exactly_k_rows_or_all_positives(positives: int) -> None:
    pre = -torch.rand(64, 20, dtype=torch.float64)
    pre.flatten()[:positives] = 1.0  # ties at the cut included
    for cut in (Cut(), Cut(score=0.9), Cut(score=5.0)):
        assert selection.batch_top_k([scores_as(pre)], 5, cut)[0].num_active == min(positives, 320)


def test_a_cut_of_another_time_gives_up_before_everything_is_a_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    pre = torch.rand(4096, 3000)
    most: list[int] = []
    pairs_of = candidates._pairs_of

    def counted(*args: object) -> tuple[Tensor, ...]:
        found = pairs_of(*args)
        most.append(len(found[0]))
        return found

    monkeypatch.setattr(candidates, "_pairs_of", counted)
    assert selection.batch_top_k([scores_as(pre)], 3, Cut(score=1e-6))[0].num_active == 3 * 4096
    assert sum(most) < pre.numel(), "a block each for the tries that failed"


@pytest.mark.parametrize("rows", [1, 2, 50])
@pytest.mark.parametrize("proposes", [False, True])
def test_latents_without_a_gate_are_never_kept(rows: int, proposes: bool) -> None:
    group = drawn(rows, 64, 4, seed=0, proposes=proposes)
    group.gate[::2] = 0.0
    above = candidates.above([group], [torch.where(group.gate > 0, 0.01 / group.gate, torch.inf)], at_most=10**9)
    assert above is not None and bool((above[0].latents % 2 == 1).all())
    for pick in (selection.batch_top_k, selection.top_k):
        assert bool((dense(pick([group], 4, Cut(score=0.01))).nonzero()[:, 1] % 2 == 1).all())


def test_one_wild_batch_does_not_make_everything_a_candidate_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    calm = drawn(64, 512, 16, seed=0, proposes=True)
    wild = Encoding(calm.x * 300, calm.encoder, calm.bias, calm.gate, calm.proposer)
    threshold, cut, seen = [torch.full((512,), 3.0)], Cut(), []
    above = candidates.above
    monkeypatch.setattr(candidates, "above", lambda *args, **limit: seen.append(above(*args, **limit)) or seen[-1])
    for group in (calm, wild, calm, calm):
        selection.above_threshold([group], threshold, cut)
    assert len(seen[-1][0].rows) < 2 * len(seen[0][0].rows) + 50


# Sparse operations, and their gradients.


def code_and_tables(seed: int, *, empty_latent: bool, hot: bool = False) -> tuple[SparseCode, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    f = torch.relu(torch.randn(37, 19, generator=g, dtype=torch.float64) - 0.8)
    f[5] = 0
    if empty_latent:
        f[:, 7] = 0
    if hot:
        f[:, 3] = 1.0
    tables = (torch.randn(n, 11, generator=g, dtype=torch.float64) for n in (19, 37, 37))
    return SparseCode.from_dense(f), *tables  # pyright: ignore[reportReturnType]


class Everything:
    """A group that writes all columns."""

    everything = True

    def add_(self, writes: Tensor, part: Tensor) -> None:
        writes += part

    def gather(self, writes: Tensor) -> Tensor:
        return writes


def decoding(code: SparseCode, decoder: Tensor) -> Decoding:
    return Decoding(code, decoder, Everything(), Spares(), torch_ops)


CASES = [{"empty_latent": True}, {"empty_latent": False}, {"empty_latent": True, "hot": True}]


@pytest.mark.parametrize("case", CASES)
def test_sparse_decode_and_its_gradients_equal_the_dense_ones(case: dict[str, bool]) -> None:
    code, decoder, grad, _ = code_and_tables(0, **case)
    values, bias = code.values.clone().requires_grad_(), torch.randn(11, dtype=torch.float64, requires_grad=True)
    decoder.requires_grad_()
    y = sparse.decode([decoding(SparseCode.of(code.pattern, values), decoder)], bias, num_rows=37)
    y.backward(grad)
    f = code.to_dense().requires_grad_()
    twin = decoder.detach().clone().requires_grad_()
    expected = reference.decode(f, twin) + bias.detach()
    expected.backward(grad)
    assert f.grad is not None
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(decoder.grad, twin.grad)
    torch.testing.assert_close(bias.grad, grad.sum(0))
    torch.testing.assert_close(values.grad, f.grad[code.row_ids, code.latents])


@pytest.mark.parametrize("uses", ["total", "error", "both"])
def test_the_fit_and_its_gradients_equal_autograd(uses: str) -> None:
    code, decoder, target, other = code_and_tables(4, empty_latent=True)
    leaves = [t.clone().requires_grad_() for t in (code.values, decoder, torch.randn(11).double(), target)]
    twins = [t.detach().clone().requires_grad_() for t in leaves]
    groups = [decoding(SparseCode.of(code.pattern, leaves[0]), leaves[1])]
    fit = sparse.fit(groups, leaves[2], target=leaves[3], widths=[4, 7])
    error = twins[3] - SparseCode.of(code.pattern, twins[0]).to_dense() @ twins[1] - twins[2]
    sources = torch.stack([part.square().sum() / 37 for part in error.split([4, 7], dim=1)])
    torch.testing.assert_close(fit.error, error)
    torch.testing.assert_close(fit.source_errors, sources)
    for found, e, total in ((fit, fit.error, fit.total), (None, error, sources.sum())):
        loss = {"total": 3 * total, "error": (e * other).sum(), "both": 3 * total + (e * other).sum()}[uses]
        loss.backward()
        assert found is fit or found is None
    for leaf, twin in zip(leaves, twins, strict=True):
        torch.testing.assert_close(leaf.grad, twin.grad)


def test_sparse_encode_gradients_equal_the_dense_ones() -> None:
    code, encoder, x, _ = code_and_tables(1, empty_latent=True)
    bias = torch.randn(19, dtype=torch.float64)
    grad = torch.randn(code.num_active, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, encoder, bias)]
    pre = (x @ encoder.T + bias)[code.row_ids, code.latents]
    sparse.encode(
        *leaves, code=SparseCode.of(code.pattern, pre), spares=Spares(), operations=torch_ops
    ).values.backward(grad)
    twins = [t.clone().requires_grad_() for t in (x, encoder, bias)]
    (twins[0] @ twins[1].T + twins[2])[code.row_ids, code.latents].backward(grad)
    for leaf, twin in zip(leaves, twins, strict=True):
        torch.testing.assert_close(leaf.grad, twin.grad)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    code, encoder, x, _ = code_and_tables(1, empty_latent=False)
    x.requires_grad_()
    found = sparse.encode(x, encoder, torch.zeros(19).double(), code=code, spares=Spares(), operations=torch_ops).values
    (slope,) = torch.autograd.grad(found.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        slope.sum().backward()


def test_spent_gradients_are_written_again_and_never_mixed_up() -> None:
    code, decoder, grad, _ = code_and_tables(2, empty_latent=True)
    weight, spares = nn.Parameter(decoder), Spares()
    group = Decoding(code, weight, Everything(), spares, torch_ops)
    sparse.decode([group], torch.zeros(11).double(), num_rows=37).backward(grad)
    assert weight.grad is not None
    first, place = weight.grad.clone(), weight.grad.data_ptr()
    spares.put("decoder", weight.grad)
    weight.grad = None
    sparse.decode([group], torch.zeros(11).double(), num_rows=37).backward(grad)
    assert weight.grad is not None and weight.grad.data_ptr() == place, "the same memory, not a copy of it"
    assert torch.equal(weight.grad, first)
    sparse.decode([group], torch.zeros(11).double(), num_rows=37).backward(grad)
    torch.testing.assert_close(weight.grad, 2 * first)
    assert deepcopy(spares).take("decoder", weight).data_ptr() != place


def test_a_code_survives_dense_and_back_and_splits_by_latents() -> None:
    code, *_ = code_and_tables(2, empty_latent=True)
    f = code.to_dense()
    again = SparseCode.from_dense(f)
    assert torch.equal(again.latents, code.latents)
    assert torch.equal(again.row_pointers, code.row_pointers)
    parts = code.split([4, 8, 0, 7])
    for part, (first, last) in zip(parts, [(0, 4), (4, 12), (12, 12), (12, 19)], strict=True):
        assert torch.equal(part.to_dense(), f[:, first:last])
    joined = SparseCode.side_by_side(parts)
    assert torch.equal(joined.latents, code.latents) and torch.equal(joined.values, code.values)
    halves = [SparseCode.from_dense(f[:20]), SparseCode.from_dense(f[20:])]
    assert torch.equal(SparseCode.below_each_other(halves).to_dense(), f)


def test_a_pattern_made_from_latent_order_knows_both_orders() -> None:
    code, *_ = code_and_tables(2, empty_latent=True)
    plain, order = code.pattern, code.pattern.by_latent
    made, back = Pattern.of_latent_order(plain.row_ids[order], plain.latents[order], size=(37, 19))
    fresh = Pattern(plain.row_pointers, plain.latents, 19)
    for name in ("row_pointers", "latents", "row_ids", "by_latent", "rows_by_latent", "latent_pointers"):
        assert torch.equal(getattr(made, name), getattr(fresh, name)), name
    assert torch.equal(code.values[order][back], code.values)


def test_no_rows_and_no_active_pairs_are_fine() -> None:
    decoder, bias = torch.randn(4, 3, requires_grad=True), torch.ones(3)
    empty = SparseCode.from_dense(torch.zeros(0, 4))
    assert sparse.decode([decoding(empty, decoder)], bias, num_rows=0).shape == (0, 3)
    silent = SparseCode.from_dense(torch.zeros(2, 4))
    found = sparse.decode([decoding(silent, decoder)], bias, num_rows=2)
    assert found.tolist() == [[1, 1, 1], [1, 1, 1]]
    found.sum().backward()
    assert decoder.grad is not None and not decoder.grad.any()


def test_the_rounded_encoder_follows_every_kind_of_update() -> None:
    """A fused update does not raise a tensor's version; an in-place one does."""
    cc = Crosscoder(sae(Source("base", "embed", 6), num_latents=9), BatchTopK(2))
    weights, x = cc.weights[0], torch.randn(5, 6)
    adam = torch.optim.Adam([weights.encoder], lr=0.1, fused=True)
    for mode in (True, False):
        cc.train(mode)
        for _ in range(2):
            assert torch.equal(weights.rounded_encoder, weights.encoder.bfloat16())
            cc.activity(x, k=2) if mode else None
            with torch.no_grad():
                assert torch.equal(weights.rounded_encoder, weights.encoder.bfloat16())
            weights.encoder.grad = torch.ones_like(weights.encoder)
            adam.step()
        with torch.no_grad():
            assert torch.equal(weights.rounded_encoder, weights.encoder.bfloat16())
            place = weights.rounded_encoder.data_ptr()
            weights.encoder.mul_(2)
            assert torch.equal(weights.rounded_encoder, weights.encoder.bfloat16())
            assert weights.rounded_encoder.data_ptr() == place


@pytest.mark.parametrize("levels", [1, 2, 5, 40])
@pytest.mark.parametrize("guess", [0.0, 0.3, 0.999, 1.0, 7.0])
def test_many_equal_scores_do_not_lead_the_selection_astray(levels: int, guess: float) -> None:
    """A cut between two levels gives none or far too many: then all of a level are candidates, and the first win."""
    g = torch.Generator().manual_seed(levels)
    pre = torch.randint(1, levels + 1, (64, 2048), generator=g).float() / levels
    proposed = Encoding(pre, torch.eye(2048), torch.zeros(2048), torch.ones(2048), torch.eye(2048).bfloat16())
    order = pre.flatten().sort(descending=True, stable=True).indices[: 3 * 64]
    mask = torch.zeros(pre.numel(), dtype=torch.bool)
    mask[order] = True
    for group in (scores_as(pre), proposed):
        found = selection.batch_top_k([group], 3, Cut(score=guess))
        assert torch.equal(dense(found) > 0, mask.view_as(pre))
