"""Compaction and selection under the interpreter against masks over the full matrix of exact scores."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from crosscoder.kernels.triton import compaction, selection
from crosscoder.kernels.triton.candidates import GroupScores
from crosscoder.kernels.triton.patterns import PaddedPattern, Selected
from crosscoder.kernels.triton.selection import Selection


def group(seed: int = 0, *, rows: int = 11, latents: int = 130, width: int = 24, shift: float = 0.0) -> GroupScores:
    """Random scores whose bf16 product lies in a larger matrix, and with two latents that are never selected."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width + 5, generator=g)[:, 5:]
    encoder = torch.randn(latents, width, generator=g) / width**0.5
    bias = 0.1 * torch.randn(latents, generator=g) + shift
    gate = torch.rand(latents, generator=g) + 0.5
    gate[: min(2, latents - 1)] = 0
    pre = torch.empty(rows, latents + 7, dtype=torch.bfloat16)[:, 3 : 3 + latents]
    pre.copy_(torch.addmm(bias.bfloat16(), x.bfloat16(), encoder.bfloat16().T))
    return GroupScores(pre, gate, x, encoder, bias)


def whole_numbers(pre: Sequence[Sequence[float]], gate: Sequence[float]) -> GroupScores:
    """A group whose pre-activations are exactly these, in bf16 as in fp32."""
    values = torch.tensor(pre).float()
    zeros = torch.zeros(values.shape[1])
    return GroupScores(values.bfloat16(), torch.tensor(gate).float(), values, torch.eye(values.shape[1]), zeros)


def exact_scores(part: GroupScores) -> Tensor:
    """In fp32, with products rounded once: what the kernel's own scores differ from by less than the gaps here."""
    return ((part.x.double() @ part.encoder.double().T + part.bias.double()) * part.gate.double()).float()


def dense(kept: Selected, num_rows: int) -> Tensor:
    """The values as a matrix; what is past the end must be padding."""
    pattern = kept.pattern
    n = int(pattern.row_pointers[-1])
    assert pattern.num_rows == num_rows and kept.values[n:].eq(0).all() and pattern.latents[n:].eq(0).all()
    out = torch.zeros(num_rows, pattern.num_latents)
    out[pattern.row_ids[:n], pattern.latents[:n]] = kept.values[:n]
    keys = pattern.row_ids[:n] * pattern.num_latents + pattern.latents[:n]
    assert bool((keys.diff() > 0).all()), "by row, latents ascending, none twice"
    return out


def assert_selects(found: Selection, groups: Sequence[GroupScores], masks: Sequence[Tensor]) -> None:
    assert not found.broken
    for kept, part, mask in zip(found.groups, groups, masks, strict=True):
        got = dense(kept, part.num_rows)
        assert torch.equal(got != 0, mask)
        torch.testing.assert_close(got, (part.x @ part.encoder.T + part.bias) * mask, rtol=1e-5, atol=1e-5)


def batch_masks(groups: Sequence[GroupScores], k_total: int) -> list[Tensor]:
    scores = torch.cat([exact_scores(part) for part in groups], dim=1)
    mask = torch.zeros_like(scores, dtype=torch.bool).flatten()
    mask[scores.flatten().topk(min(k_total, scores.numel())).indices] = True
    mask = mask.view_as(scores) & (scores > 0)
    return list(mask.split([part.pre.shape[1] for part in groups], dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "latents"), [(5, 203), (1, 1), (3, 2048), (2, 2100), (2, 16385)])
def test_compaction_lists_what_exceeds_the_cut(rows: int, latents: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(rows)
    pre = torch.randn(rows, latents + 1, generator=g)[:, 1:].to(dtype)
    pre[-1, -1] = torch.nan
    cut = 1.5 + torch.rand(latents, generator=g)
    cut[0] = torch.inf
    pre[0, -1] = 1.5 if latents == 1 else 9.0
    into = compaction.Compaction.empty(pre, 2000)
    pattern = compaction.compact(pre, cut, into=into)
    wanted = (pre.float() > cut).nonzero()
    n = int(pattern.row_pointers[-1])
    assert torch.equal(torch.stack([pattern.row_ids[:n], pattern.latents[:n]], 1), wanted)
    assert not into.overflow


def test_compaction_says_when_it_overflows() -> None:
    pre = torch.arange(12.0).view(3, 4)
    into = compaction.Compaction.empty(pre, 6)
    pattern = compaction.compact(pre, torch.full((4,), 1.5), into=into)
    assert into.overflow
    assert pattern.row_pointers.tolist() == [0, 2, 6, 6]
    assert pattern.latents.tolist() == [2, 3, 0, 1, 2, 3]


def test_nothing_runs_under_a_flag_of_zero() -> None:
    pre = torch.arange(12.0).view(3, 4)
    into = compaction.Compaction.empty(pre, 20)
    before = compaction.compact(pre, torch.full((4,), 8.5), into=into)
    idle = torch.zeros(1, dtype=torch.int32)
    after = compaction.compact(pre, torch.zeros(4), into=into, run=idle)
    assert torch.equal(after.row_pointers, before.row_pointers) and torch.equal(after.latents, before.latents)
    levels = torch.tensor([0.5, 8.5])
    assert compaction.count_levels(pre, torch.ones(4), levels=levels, run=idle).tolist() == [0, 0]
    assert compaction.count_levels(pre, torch.ones(4), levels=levels, run=idle + 1).tolist() == [11, 3]


@pytest.mark.parametrize("cut", [1.2, 1.5, 1.59, 1.6, 1.7, 2.3, -0.1, 0.0, 30.0])
def test_batch_top_k_does_not_depend_on_the_cut(cut: float) -> None:
    parts = [group()]
    found = selection.batch_top_k(parts, k_total=60, cut=torch.tensor(cut))
    assert_selects(found, parts, batch_masks(parts, 60))
    assert found.next_cut < found.threshold


def test_several_groups_share_one_threshold() -> None:
    parts = [
        group(1, latents=50),
        group(2, latents=1),
        group(3, latents=90, shift=0.5),
        group(4, latents=20, shift=-9.0),
    ]
    found = selection.batch_top_k(parts, k_total=70, cut=torch.tensor(1.5))
    assert_selects(found, parts, batch_masks(parts, 70))
    again = selection.batch_top_k(parts, k_total=70, cut=found.next_cut)
    for one, two in zip(found.groups, again.groups, strict=True):
        assert torch.equal(one.values, two.values) and torch.equal(one.pattern.latents, two.pattern.latents)


@pytest.mark.parametrize(("shift", "cut"), [(-9.0, 0.0), (-9.0, 1.0), (-2.0, 0.0), (-2.0, 3.0)])
def test_with_few_positive_scores_all_of_them_stay(shift: float, cut: float) -> None:
    parts = [group(shift=shift)]
    positive = int((exact_scores(parts[0]) > 0).sum())
    assert positive < 100 and (positive == 0) == (shift == -9.0)
    found = selection.batch_top_k(parts, k_total=100, cut=torch.tensor(cut))
    assert found.threshold == 0 and found.next_cut <= 0
    assert_selects(found, parts, batch_masks(parts, 100))


@pytest.mark.parametrize("rows", [1, 11])
def test_one_pair_of_the_batch(rows: int) -> None:
    parts = [group(rows=rows)]
    assert_selects(selection.batch_top_k(parts, k_total=1, cut=torch.tensor(1.0)), parts, batch_masks(parts, 1))


def test_ties_go_to_the_lowest_row_then_group_then_latent() -> None:
    one = whole_numbers([[4, 2, 2], [2, 0, 2]], [1, 1, 1])
    two = whole_numbers([[2, 1], [9, 2]], [1, 1])
    scores = torch.tensor([[4.0, 2, 2, 2, 1], [2, 0, 2, 9, 2]])
    order = [8, 0, 1, 2, 3, 5, 7, 9]  # by score, then by (row, group, latent), for everything above 1
    for k_total in range(1, 9):
        found = selection.batch_top_k([one, two], k_total=k_total, cut=torch.tensor(1.5))
        got = torch.cat([dense(kept, 2) for kept in found.groups], dim=1)
        wanted = torch.zeros(10).index_put((torch.tensor(order[:k_total]),), torch.ones(()))
        assert torch.equal(got, scores * wanted.view(2, 5)), k_total


def test_the_score_of_a_latent_that_is_gated_off_is_never_positive() -> None:
    part = whole_numbers([[8, 2, 1]], [0, 1, 1])
    found = selection.batch_top_k([part], k_total=3, cut=torch.tensor(0.0))
    assert dense(found.groups[0], 1).tolist() == [[0, 2, 1]]


def test_latents_that_are_gated_off_take_no_room() -> None:
    """A cut below zero, which few positive scores lead to, must not make candidates of them: there are 1,100."""
    part = group(shift=-2.0)
    part.gate[:100] = 0
    found = selection.batch_top_k([part], k_total=40, cut=torch.tensor(-0.01))
    assert found.threshold == 0
    assert_selects(found, [part], batch_masks([part], 40))


def test_selection_is_broken_only_when_both_rounds_fail() -> None:
    """No fp32 decision is possible on proposals that have nothing to do with the scores; and they are told apart."""
    part = group()
    noise = torch.randn(part.pre.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    lying = GroupScores(noise, part.gate, part.x, part.encoder, part.bias)
    assert selection.batch_top_k([lying], k_total=60, cut=torch.tensor(1.5)).broken
    assert selection.top_k([lying], k=3).broken


def test_a_tie_that_does_not_fit_breaks_the_selection() -> None:
    part = whole_numbers([[1.0] * 400], [1.0] * 400)
    assert selection.batch_top_k([part], k_total=4, cut=torch.tensor(0.5)).broken


def test_the_estimate_is_a_usable_cut() -> None:
    parts = [group(rows=40), group(5, rows=40, latents=30)]
    cut = selection.estimated_cut(parts, k_total=200)
    found = selection.batch_top_k(parts, k_total=200, cut=cut)
    assert 0 < cut < found.threshold
    assert selection.estimated_cut([group(shift=-9.0)], k_total=20) == 0


def row_masks(groups: Sequence[GroupScores], k: int) -> list[Tensor]:
    scores = torch.cat([exact_scores(part) for part in groups], dim=1)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask.scatter_(1, scores.topk(min(k, scores.shape[1]), dim=1).indices, True)
    return list((mask & (scores > 0)).split([part.pre.shape[1] for part in groups], dim=1))


@pytest.mark.parametrize("k", [1, 3, 25])
@pytest.mark.parametrize("shift", [0.0, -2.5])
def test_top_k_of_every_row(k: int, shift: float) -> None:
    parts = [group(shift=shift), group(6, latents=20, shift=shift)]
    assert_selects(selection.top_k(parts, k=k), parts, row_masks(parts, k))
    assert_selects(selection.top_k(parts[1:], k=k), parts[1:], row_masks(parts[1:], k))


def test_top_k_ties_go_to_the_lowest_group_then_latent() -> None:
    one = whole_numbers([[4, 2, 2], [2, 0, 2], [-1, 0, -2]], [1, 1, 1])
    two = whole_numbers([[2, 1], [9, 2], [0, -1]], [1, 1])
    found = selection.top_k([one, two], k=2)
    assert dense(found.groups[0], 3).tolist() == [[4, 2, 0], [2, 0, 0], [0, 0, 0]]
    assert dense(found.groups[1], 3).tolist() == [[0, 0], [9, 0], [0, 0]]
    assert not found.broken


def test_above_threshold() -> None:
    parts = [group(), group(7, latents=40, shift=-9.0)]
    thresholds = [torch.linspace(0.5, 2.5, 130), torch.full((40,), 1.0)]
    masks = [exact_scores(part) > threshold for part, threshold in zip(parts, thresholds, strict=True)]
    found = selection.above_threshold(parts, thresholds=thresholds)
    assert_selects(found, parts, masks)
    wild = GroupScores(parts[0].pre + 1, parts[0].gate, parts[0].x, parts[0].encoder, parts[0].bias)
    assert selection.above_threshold([wild], thresholds=thresholds[:1]).broken


def test_every_positive_score_is_above_a_threshold_of_zero() -> None:
    part = group(latents=50, shift=-1.0)
    found = selection.above_threshold([part], thresholds=[torch.zeros(50)])
    assert_selects(found, [part], [exact_scores(part) > 0])


def test_padded_patterns_sort_their_padding_away() -> None:
    pattern = PaddedPattern(torch.tensor([0, 2, 2, 3]), torch.tensor([1, 3, 1, 0, 0]), 4)
    assert pattern.valid.tolist() == [True, True, True, False, False]
    assert pattern.row_ids.tolist() == [0, 0, 2, 2, 2]
    assert pattern.by_latent.tolist()[:3] == [0, 2, 1]
    assert pattern.latent_pointers.tolist() == [0, 0, 2, 2, 3]
