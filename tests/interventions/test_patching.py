"""KL patching against forwards patched by hand, context by context; its groups, controls, intervals and refusals."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from conftest import build_toy_model
from crosscoder.activations import ROLES
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.models import StudiedModel
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import EditError, SourceMismatch, UnknownLatent, UnknownSource
from crosscoder.interventions import Condition, PatchingCurves, PatchingPlan, patching
from crosscoder.interventions.patching_curves import bootstrap_means
from crosscoder.interventions.reading import TokenBlock
from crosscoder.interventions.token_groups import response_places, token_groups
from crosscoder.nonlinearities import ReLU
from crosscoder.sources import Source, SourceSet, difference
from crosscoder.wiring import acausal
from interventions.texts import dialogues, divergence, logits_with
from interventions.worlds import (
    BASE,
    CHAT,
    WORLDS,
    clean_reads,
    dense_code,
    double,
    layered,
    random_crosscoder,
    raw_decoder,
    sources,
)

Pair = Mapping[str, StudiedModel]
RANKED = {"first": torch.arange(24), "last": torch.arange(23, -1, -1)}
PLAN = PatchingPlan(num_contexts=100, sizes=(2, 7), num_random=2, num_chosen=8, first=3, num_draws=50)


@pytest.fixture
def text(toy_tokenizer: PreTrainedTokenizerFast) -> AnalysisSet:
    return dialogues(toy_tokenizer)


def run(cc: Crosscoder, pair: Pair, text: AnalysisSet, plan: PatchingPlan = PLAN) -> PatchingCurves:
    return patching(cc, pair, text, a="base", b="chat", rankings=RANKED, plan=plan)


def rows_by_hand(cc: Crosscoder, x_a: Tensor, x_b: Tensor, template: Tensor) -> dict[Condition, Tensor]:
    """What every condition puts in the place of b's rows, from formulas alone."""
    f = dense_code(cc, torch.cat([x_a, x_b], 1))
    rows_a, rows_b = raw_decoder(cc, BASE), raw_decoder(cc, CHAT)
    bias, scale = cc.bias.detach().view(2, -1), cc.scale
    x_hat_a, x_hat_b = (
        f @ rows + b / c + mean
        for rows, b, c, mean in zip((rows_a, rows_b), bias, scale, cc.mean.view(2, -1), strict=True)
    )

    def moved(latents: Tensor) -> Tensor:
        return x_a + f[:, latents] @ (rows_b - rows_a)[latents]

    every = torch.arange(24)
    error = (x_b - x_hat_b) - (x_a - x_hat_a)
    reference = {
        "none": x_a,
        "offset": x_a + (x_hat_b - x_hat_a) - (moved(every) - x_a),
        "latents": moved(every),
        "reconstruction": x_a + x_hat_b - x_hat_a,
        "error": x_a + error,
        "everything": x_b,
    }
    found = {Condition("reference", name): rows for name, rows in reference.items()}
    found[Condition("tokens", "template")] = torch.where(template[:, None], x_b, x_a)
    for name, order in RANKED.items():
        found |= {Condition("ranked", name, size): moved(order[:size]) for size in (2, 7)}
        found[Condition("top half", name, 4)] = moved(order[:4])
        found[Condition("bottom half", name, 4)] = moved(order[4:8])
    return found


def test_every_condition_equals_a_forward_patched_by_hand(pair: Pair, text: AnalysisSet) -> None:
    cc = double()
    found = run(cc, pair, text)
    totals: dict[Condition, Tensor] = {}
    num_rows = 0
    for number in range(4):
        ids = torch.from_numpy(text.context(number).tokens.ids).long()
        template = torch.from_numpy(text.context(number).tokens.roles)[1:] == ROLES.index("template")
        x = clean_reads(cc, pair, ids[None])
        clean = logits_with(pair["chat"], ids, None)
        for condition, rows in rows_by_hand(cc, x[1:, :32], x[1:, 32:], template).items():
            patched = logits_with(pair["chat"], ids, torch.cat([x[:1, 32:], rows]))
            totals[condition] = totals.get(condition, 0) + divergence(clean, patched)[1:].sum()
        num_rows += len(ids) - 1
    assert found.num_tokens[0] == num_rows and found.num_contexts == 4
    for condition, total in totals.items():
        value = found.divergence(condition).value
        assert value == pytest.approx(float(total) / num_rows, rel=1e-9, abs=1e-14), condition
    gap, latents, everything = (found.divergence(Condition("reference", name)).value for name in
                                ("none", "latents", "everything"))  # fmt: skip
    assert gap > 1e-3 and latents != pytest.approx(gap, rel=1e-3) and everything < 1e-20
    assert len(found.conditions) == len(totals) + 4, "and two random sets of two sizes"


def test_batched_equals_looped(pair: Pair, text: AnalysisSet) -> None:
    """Many contexts and conditions to a forward, or one."""
    together, alone = (
        run(double(), pair, text, PatchingPlan(**{**vars(PLAN), "block_tokens": size})) for size in (4096, 1)
    )
    assert together.conditions == alone.conditions and together.groups == alone.groups
    torch.testing.assert_close(together.kl, alone.kl, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(together.draws, alone.draws, rtol=1e-9, atol=1e-14, equal_nan=True)


def test_without_latents_nothing_moves_and_with_all_of_them_as_much_as_by_the_reference(
    pair: Pair, text: AnalysisSet
) -> None:
    found = run(double(), pair, text, PatchingPlan(sizes=(24,), num_random=1, num_chosen=2))
    every = found.kl[found.conditions.index(Condition("reference", "latents"))]
    for condition in (Condition("ranked", "last", 24), Condition("random", "random", 24, 0)):
        torch.testing.assert_close(found.kl[found.conditions.index(condition)], every, rtol=1e-9, atol=1e-14)
    bare = patching(double(), pair, text, a="base", b="chat", rankings={}, plan=PLAN)
    assert [c.kind for c in bare.conditions] == ["reference"] * 6 + ["tokens"]
    torch.testing.assert_close(bare.kl[0], run(double(), pair, text).kl[0])


def test_both_directions_are_of_their_own_model(pair: Pair, text: AnalysisSet) -> None:
    there = run(double(), pair, text)
    back = patching(double(), pair, text, a="chat", b="base", rankings=RANKED, plan=PLAN)
    assert (back.a, back.b) == (CHAT, BASE)
    ids = torch.from_numpy(text.context(0).tokens.ids).long()
    x = clean_reads(double(), pair, ids[None])
    patched = logits_with(pair["base"], ids, torch.cat([x[:1, :32], x[1:, 32:]]))
    expected = divergence(logits_with(pair["base"], ids, None), patched)[1:].mean()
    one = AnalysisSet.of([text.context(0)], vocabulary="toy")
    alone = patching(double(), pair, one, a="chat", b="base", rankings={}, plan=PLAN)
    assert float(alone.kl[0, 0]) == pytest.approx(float(expected), rel=1e-9)
    assert not torch.allclose(there.kl[0], back.kl[0])


@pytest.mark.parametrize("name", ["two models", "layers of two"])
def test_groups_that_share_nothing_with_the_site_change_nothing(pair: Pair, text: AnalysisSet, name: str) -> None:
    """With several layers of each model, a site is named in full, and the latents' vectors at that site are moved."""
    found = patching(WORLDS[name](), pair, text, a=BASE, b=CHAT, rankings=RANKED, plan=PLAN)
    assert float(found.kl[found.conditions.index(Condition("reference", "everything")), 0]) < 1e-20


def block_of(roles: list[str], *, dropped: int = 1) -> TokenBlock:
    """One context with these roles, its first tokens dropped, followed by one of padding alone but for a token."""
    ids = torch.zeros(2, len(roles), dtype=torch.int64)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, 1:] = False
    kept = real.clone()
    kept[:, :dropped] = False
    number = torch.tensor([ROLES.index(role) for role in roles])
    both = torch.stack([number, torch.full_like(number, ROLES.index("assistant"))])
    return TokenBlock(torch.arange(2), ids, real, kept, both, torch.zeros_like(ids))


def test_groups_of_tokens_by_hand() -> None:
    """Positions that predict a response begin with the template's last token, and end before the response does."""
    u, t, a = "user", "template", "assistant"
    roles = [t, u, t, a, a, a, t, u, t, a, a, t]
    block = block_of(roles)
    assert response_places(block)[0].tolist() == [0, 0, 1, 2, 3, 0, 0, 0, 1, 2, 0, 0]
    groups = {
        name: positions[0].nonzero().squeeze(1).tolist() for name, positions in token_groups(block, first=2).items()
    }
    assert groups["all"] == list(range(1, 12)), "the dropped token is in no group"
    assert groups["response"] == [2, 3, 4, 8, 9] and groups["first 2"] == [2, 3, 8, 9]
    assert groups["assistant"] == [3, 4, 5, 9, 10] and groups["template"] == [2, 6, 8, 11] and groups["text"] == []
    assert not response_places(block)[1].any(), "padding predicts nothing"


def test_the_first_tokens_are_a_group_of_the_run(pair: Pair, text: AnalysisSet) -> None:
    found = run(double(), pair, text)
    assert found.groups == ("all", "response", "first 3", "user", "assistant", "template")
    assert int(found.num_tokens[2]) == 4 * (3 + 3), "two turns in each of four dialogues; the plain text is left out"


def test_contexts_without_responses_serve_where_there_are_none(
    toy_tokenizer: PreTrainedTokenizerFast, pair: Pair
) -> None:
    whole = dialogues(toy_tokenizer)
    plain = AnalysisSet.of([whole.context(4)], vocabulary="toy")
    assert run(double(), pair, plain).groups == ("all", "text")


def test_intervals_resample_documents_as_a_whole() -> None:
    """One document: no spread. Two that differ: draws of their weighted mean, the same for every condition."""
    one = bootstrap_means(torch.tensor([[[6.0]]]), torch.tensor([[3.0]]), num_draws=200, seed=0)
    assert set(one[one.isfinite()].tolist()) == {2.0} and one.isnan().any(), "a draw without it has no mean"
    sums, counts = torch.tensor([[[1.0, 30.0]], [[2.0, 60.0]]]), torch.tensor([[1.0, 10.0]])
    two = bootstrap_means(sums, counts, num_draws=500, seed=0)
    torch.testing.assert_close(2 * two[:, 0], two[:, 1], equal_nan=True)
    weights = torch.poisson(torch.ones(500, 2), generator=torch.Generator().manual_seed(0))
    expected = (weights * sums[0, 0]).sum(1) / (weights * counts[0]).sum(1)
    torch.testing.assert_close(two[:, 0, 0], expected, equal_nan=True)


def hand_made() -> PatchingCurves:
    conditions = (
        Condition("reference", "none"),
        Condition("ranked", "norm", 5),
        Condition("random", "random", 5, 0),
        Condition("random", "random", 5, 1),
        Condition("top half", "norm", 2),
        Condition("bottom half", "norm", 2),
    )
    kl = torch.tensor([[2.0], [0.5], [1.8], [1.6], [1.0], [1.5]]).double()
    return PatchingCurves(
        "a", "b", conditions, ("all",), kl, kl.expand(9, -1, -1), torch.tensor([7]), num_documents=3, num_contexts=4
    )


def test_shares_curves_and_halves_by_hand() -> None:
    found = hand_made()
    assert found.recovered[:, 0].tolist() == pytest.approx([0, 0.75, 0.1, 0.2, 0.5, 0.25])
    assert [(size, share.value) for size, share in found.curve("random")] == [(5, pytest.approx(0.15))]
    assert found.halves("norm").value == pytest.approx(0.25)
    assert found.share_recovered(found.conditions[1]).low == pytest.approx(0.75)
    assert found.names == ["norm", "random"]
    rows = found.table().to_pylist()
    assert rows[1] | {"kl": 0.5, "recovered": 0.75, "kind": "ranked", "num_latents": 5, "group": "all"} == rows[1]
    content = found.to_json()
    assert content["format"] == "crosscoder.patching/1" and len(content["conditions"]) == 6
    assert content["num_tokens"] == {"all": 7}


def test_no_gap_has_no_share() -> None:
    """Models that do not differ: nothing to recover, and null in the files."""
    found = hand_made()
    same = PatchingCurves(**{**vars(found), "kl": 0 * found.kl, "draws": 0 * found.draws})
    assert all(map(math.isnan, same.recovered.flatten().tolist()))
    assert {row["recovered"] for row in same.to_json()["conditions"]} == {None}


def test_what_was_not_run_is_named() -> None:
    found = hand_made()
    for ask in (
        lambda: found.curve("scaling"),
        lambda: found.halves("scaling"),
        lambda: found.divergence(Condition("ranked", "norm", 6)),
        lambda: found.divergence(found.conditions[0], group="system"),
    ):
        with pytest.raises(EditError):
            ask()


def other(toy_tokenizer: PreTrainedTokenizerFast, **options: int) -> StudiedModel:
    return StudiedModel("chat", build_toy_model(seed=3, **options).double(), toy_tokenizer)


def crosscoder_of(*kinds: Source) -> Crosscoder:
    return random_crosscoder(acausal(SourceSet(kinds), num_latents=8), ReLU())


def test_pairs_that_mean_nothing_to_each_other_are_refused(
    pair: Pair, text: AnalysisSet, toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    def refused(cc: Crosscoder, models: Pair, a: str = "base", b: str = "chat") -> str:
        with pytest.raises(SourceMismatch) as caught:
            patching(cc, models, text, a=a, b=b, rankings={}, plan=PLAN)
        return str(caught.value)

    layers = sources(BASE, "chat/layers.0.resid_post")
    assert "different sites" in refused(random_crosscoder(acausal(layers, num_latents=8)), pair)
    one = refused(layered(), pair, "chat/layers.0.resid_post", "chat/layers.1.resid_post")
    assert "one model" in one
    deeper = {**pair, "chat": other(toy_tokenizer, num_layers=4)}
    assert "numbers of layers" in refused(double(), deeper)
    wide = {**pair, "chat": other(toy_tokenizer, num_layers=3, width=48)}
    cc = crosscoder_of(Source.parse(BASE, width=32), Source.parse(CHAT, width=48))
    assert "width" in refused(cc, wide)
    a, b = Source.parse(BASE, width=32), Source.parse(CHAT, width=32)
    assert "a difference of two models" in refused(crosscoder_of(a, difference(b, a)), pair, b="chat-base")


def test_latents_and_sources_that_are_not_there_are_refused(pair: Pair, text: AnalysisSet) -> None:
    with pytest.raises(UnknownLatent, match="latents 0 to 23; got 24"):
        patching(double(), pair, text, a="base", b="chat", rankings={"norm": torch.tensor([3, 24])})
    with pytest.raises(EditError, match="twice"):
        patching(double(), pair, text, a="base", b="chat", rankings={"norm": torch.tensor([3, 3])})
    with pytest.raises(UnknownSource):
        patching(double(), pair, text, a="base", b="plain", rankings={})
    with pytest.raises(UnknownSource):
        patching(double(), {"chat": pair["chat"]}, text, a="base", b="chat", rankings={})
