"""Attribution: exact where the model is linear, complete where it is not, and its gradients by finite differences."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from conftest import build_toy_model
from crosscoder.capture.contexts import Context
from crosscoder.capture.models import StudiedModel
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import EditError, EmptySelection, SourceMismatch, UnknownSource
from crosscoder.interventions import (
    Attribution,
    AttributionPath,
    ContinuationLogProbability,
    LogitDifference,
    NextTokenLoss,
    Positions,
    ReplyTokens,
    Roles,
    as_context,
    continued,
    gradient_times_activation,
    integrated_gradients,
    read_prompt,
    relative_indirect_effect,
)
from crosscoder.wiring import acausal
from interventions.texts import contexts, dialogue, logits_with
from interventions.worlds import BASE, CHAT, clean_reads, dense_code, double, random_crosscoder, raw_decoder, sources

Pair = Mapping[str, StudiedModel]
LAST = ("base/layers.2.resid_post", "chat/layers.2.resid_post")
DIFFERENCE = LogitDifference(torch.tensor([11, 12, 13]), torch.tensor([21, 22, 23]))


@pytest.fixture
def texts(toy_tokenizer: PreTrainedTokenizerFast) -> list[Context]:
    """Three contexts of unequal length."""
    return contexts(toy_tokenizer, [dialogue(1), "the old dog ran over the hill", dialogue(0)])


@pytest.fixture(scope="module")
def linear_pair(toy_tokenizer: PreTrainedTokenizerFast) -> dict[str, StudiedModel]:
    """Models whose logits are linear in the last layer's output: no final norm."""
    made = {}
    for seed, alias in enumerate(("base", "chat")):
        model = build_toy_model(seed=seed, num_layers=3).double()
        model.model.norm = nn.Identity()
        made[alias] = StudiedModel(alias, model, toy_tokenizer)
    return made


def last_layer() -> Crosscoder:
    return random_crosscoder(acausal(sources(*LAST), num_latents=24))


def ids_of(context: Context) -> Tensor:
    return torch.from_numpy(context.tokens.ids).long()


def code_of(cc: Crosscoder, pair: Pair, context: Context) -> tuple[Tensor, Tensor]:
    """Rows of both sources and code of a context, BOS without a code."""
    x = clean_reads(cc, pair, ids_of(context)[None])
    f = dense_code(cc, x)
    f[0] = 0
    return x, f


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("start", [None, "base"])
def test_in_a_linear_model_every_effect_is_that_of_ablation(
    linear_pair: Pair, texts: list[Context], start: str | None, steps: int
) -> None:
    """Each (token, latent) ablated by itself, by hand; any number of steps is exact."""
    cc = last_layer()
    path = AttributionPath(start=start, steps=steps)
    found = integrated_gradients(cc, linear_pair, texts, metric=DIFFERENCE, source="chat", path=path)
    v = raw_decoder(cc, LAST[1]) - (0 if start is None else raw_decoder(cc, LAST[0]))
    head = linear_pair["chat"].model.lm_head.weight
    expected = {}
    for number, context in enumerate(texts):
        _, f = code_of(cc, linear_pair, context)
        readout = head[11 + number] - head[21 + number]
        last = len(context) - 1
        for position, latent in f.nonzero().tolist():
            change = float(f[position, latent] * (v[latent] @ readout)) if position == last else 0.0
            expected[number, position, latent] = change
    rows = found.token_table().to_pylist()
    pairs = {(row["context"], row["position"], row["latent"]): row["effect"] for row in rows}
    assert pairs == pytest.approx(expected, rel=1e-9, abs=1e-12) and any(expected.values())
    torch.testing.assert_close(found.missing, torch.zeros(3).double(), atol=1e-11, rtol=0)


def by_hand(cc: Crosscoder, pair: Pair, context: Context, number: int, values: Tensor) -> float:
    """The metric in chat with the context's code scaled by `values` (positions, latents)."""
    x, f = code_of(cc, pair, context)
    rows = x[:, 32:] - ((1 - values) * f) @ raw_decoder(cc, CHAT)
    logits = logits_with(pair["chat"], ids_of(context), rows)[-1]
    return float(logits[11 + number] - logits[21 + number])


def test_effects_add_up_to_the_change_along_the_path_as_steps_grow(pair: Pair, texts: list[Context]) -> None:
    """A model that is not linear: the gap shrinks with the square of the step (midpoint rule)."""
    cc = double()
    gaps = []
    for steps in (2, 8, 32):
        found = integrated_gradients(
            cc, pair, texts, metric=DIFFERENCE, source="chat", path=AttributionPath(steps=steps)
        )
        gaps.append(float(found.missing.abs().max()))
    ends = [[by_hand(cc, pair, c, n, torch.full((), a)) for n, c in enumerate(texts)] for a in (1.0, 0.0)]
    torch.testing.assert_close(found.metric, torch.tensor(ends[0], dtype=torch.float64), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.metric_start, torch.tensor(ends[1], dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert gaps[0] > 1e-6 and gaps[1] < gaps[0] / 8 and gaps[2] < gaps[1] / 8
    assert float(found.effects.sum()) == pytest.approx(float((found.metric - found.metric_start).mean()), abs=gaps[2])


def test_from_a_to_b_the_path_starts_at_a_share_of_every_latent(pair: Pair, texts: list[Context]) -> None:
    cc = double()
    found = integrated_gradients(
        cc, pair, texts, metric=DIFFERENCE, source="chat", path=AttributionPath(start="base", steps=64)
    )  # fmt: skip
    context = texts[1]
    x, f = code_of(cc, pair, context)
    rows = x[:, 32:] - f @ (raw_decoder(cc, CHAT) - raw_decoder(cc, BASE))
    logits = logits_with(pair["chat"], ids_of(context), rows)[-1]
    assert float(found.metric_start[1]) == pytest.approx(float(logits[12] - logits[22]), rel=1e-9)
    assert float(found.missing.abs().max()) < 1e-4 * float((found.metric - found.metric_start).abs().max())


def test_gradient_times_activation_is_the_slope_at_the_activations(pair: Pair, texts: list[Context]) -> None:
    """Finite differences of the metric in each latent's share, at all of its tokens."""
    cc = double()
    found = gradient_times_activation(cc, pair, texts, metric=DIFFERENCE, source="chat")
    number, step = 0, 3e-3  # norms of the model are in fp32
    own = found.context == number
    for latent in found.latent[own].unique().tolist():
        values = torch.ones(len(texts[number]), 24).double()
        values[:, latent] = 1 + step
        up = by_hand(cc, pair, texts[number], number, values)
        values[:, latent] = 1 - step
        slope = (up - by_hand(cc, pair, texts[number], number, values)) / (2 * step)
        effect = float(found.effect[own & (found.latent == latent)].sum())
        assert effect == pytest.approx(slope, rel=2e-3, abs=1e-4)


def test_batched_equals_looped(pair: Pair, texts: list[Context]) -> None:
    cc = double()
    together, alone = (
        integrated_gradients(
            cc, pair, texts, metric=DIFFERENCE, source="chat", path=AttributionPath(block_tokens=size, steps=3)
        )
        for size in (4096, 1)
    )
    assert table_of(together) == pytest.approx(table_of(alone), rel=1e-8, abs=1e-13)
    for name in ("metric", "metric_start", "missing"):
        torch.testing.assert_close(getattr(together, name), getattr(alone, name), rtol=1e-9, atol=1e-11)


def table_of(found: Attribution) -> dict[tuple[int, int, int], float]:
    rows = found.token_table().to_pylist()
    return {(row["context"], row["position"], row["latent"]): row["effect"] for row in rows}


@pytest.mark.parametrize("tokens", [Positions((3, 5)), Roles(("template",)), ReplyTokens(first=2)])
def test_at_chosen_tokens_only_those_move(pair: Pair, toy_tokenizer: PreTrainedTokenizerFast, tokens: object) -> None:
    """And the effects are complete along that shorter path."""
    cc, spoken = double(), contexts(toy_tokenizer, [dialogue(1), dialogue(0)])
    path = AttributionPath(tokens=tokens, steps=64)
    found = integrated_gradients(cc, pair, spoken, metric=NextTokenLoss(), source="chat", path=path)
    roles = torch.from_numpy(spoken[0].tokens.roles)
    allowed = {
        Positions: {3, 5},
        Roles: set((roles == 4).nonzero().squeeze(1).tolist()) - {0},
        ReplyTokens: {p for p in range(2, len(roles)) if roles[p] == 3 and 3 not in roles[p - 2 : p].tolist()[:1]},
    }[type(tokens)]
    assert set(found.position[found.context == 0].tolist()) <= allowed
    assert found.position.numel() and float(found.missing.abs().max()) < 1e-5
    whole = integrated_gradients(cc, pair, spoken, metric=NextTokenLoss(), source="chat", path=AttributionPath(steps=2))
    assert not torch.allclose(whole.metric_start, found.metric_start)


def test_metrics_by_hand(pair: Pair, texts: list[Context]) -> None:
    """On contexts of unequal length; log-probabilities are of the given continuation."""
    cc = double()
    start = torch.tensor([4, 3, 9])
    for metric, expected in (
        (ContinuationLogProbability(start), lambda lp, n: lp[int(start[n]) - 1 :].sum()),
        (NextTokenLoss(), lambda lp, n: -lp.mean()),
    ):
        found = gradient_times_activation(cc, pair, texts, metric=metric, source="chat")
        for number, context in enumerate(texts):
            ids = ids_of(context)
            lp = logits_with(pair["chat"], ids, None).log_softmax(-1)[:-1].gather(1, ids[1:, None]).squeeze(1)
            assert float(found.metric[number]) == pytest.approx(float(expected(lp, number)), rel=1e-9)


def test_a_prompt_and_its_continuation_are_a_context(pair: Pair, toy_tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = read_prompt([{"role": "user", "content": "how do I mend a clock"}], toy_tokenizer)
    whole = continued(prompt, [40, 41])
    assert whole.ids.tolist() == [*prompt.ids.tolist(), 40, 41] and whole.roles[-2:].tolist() == [3, 3]
    metric = ContinuationLogProbability(torch.tensor([len(prompt)]))
    found = integrated_gradients(
        double(), pair, [as_context(whole)], metric=metric, source="chat", path=AttributionPath(tokens=Roles(("user",)))
    )
    logits = logits_with(pair["chat"], whole.ids, None).log_softmax(-1)
    expected = logits[len(prompt) - 1, 40] + logits[len(prompt), 41]
    assert float(found.metric[0]) == pytest.approx(float(expected), rel=1e-9)
    assert found.latents.numel() and found.to_json()["num_contexts"] == 1


def of(source: str, effects: dict[int, float]) -> Attribution:
    latent = torch.tensor(list(effects))
    at, one = torch.zeros_like(latent), torch.zeros(1).double()
    effect = torch.tensor(list(effects.values())).double()
    return Attribution(source, at, at, latent, effect, torch.tensor([0]), one, one)


def test_relative_effects_by_hand() -> None:
    """|IE_2| / (|IE_1| + |IE_2|) for two; for three, each against all; a latent without any effect has none."""
    one, two = of("early", {4: -3.0, 7: 0.0, 2: 1.0}), of("late", {7: 0.0, 4: 1.0, 9: 2.0})
    pair = relative_indirect_effect([one, two])
    assert pair.latents.tolist() == [2, 4, 7, 9]
    torch.testing.assert_close(
        pair.share[:, 1], torch.tensor([0.0, 0.25, torch.nan, 1.0]).double(), equal_nan=True
    )  # fmt: skip
    three = relative_indirect_effect([one, two, of("last", {4: 4.0})])
    assert three.share[1].tolist() == [3 / 8, 1 / 8, 4 / 8]
    row = three.table().to_pylist()[2]
    assert row["latent"] == 7 and row["share/late"] is None and row["effect/late"] == 0
    for wrong in ([one], [one, one]):
        with pytest.raises(EditError, match="two or more different"):
            relative_indirect_effect(wrong)


def test_the_latents_of_largest_effect_come_first() -> None:
    latent, place = torch.tensor([5, 2, 5, 8]), torch.tensor([0, 1, 1, 1])
    effect = torch.tensor([1.0, -5.0, 1.0, 0.5]).double()
    metric = torch.tensor([3.0, 0.0]).double()
    found = Attribution("s", place, place, latent, effect, torch.arange(2), metric, 0 * metric)
    assert found.top(2) == [2, 5] and found.effects.tolist() == [-2.5, 1.0, 0.25]
    assert found.missing.tolist() == [2.0, 3.5]
    assert found.table().to_pylist()[1] == {"latent": 5, "effect": 1.0, "num_active": 2}


def test_what_cannot_be_attributed_is_refused(pair: Pair, texts: list[Context]) -> None:
    def ask(**changed: object) -> None:
        integrated_gradients(double(), pair, texts, **({"metric": DIFFERENCE, "source": "chat"} | changed))

    with pytest.raises(EmptySelection, match="1 of 3 contexts"):
        ask(path=AttributionPath(tokens=Roles(("user",))))
    with pytest.raises(EmptySelection, match="3 of 3"):
        ask(path=AttributionPath(tokens=Positions((0,))))
    with pytest.raises(EditError, match="at least one step"):
        ask(path=AttributionPath(steps=0))
    with pytest.raises(EditError, match="is of 2 contexts"):
        ask(metric=LogitDifference(torch.tensor([1, 2]), torch.tensor([1, 2])))
    with pytest.raises(EditError, match="before the context's end"):
        ask(metric=ContinuationLogProbability(torch.tensor([4, 3, 500])))
    with pytest.raises(SourceMismatch, match="another source"):
        ask(path=AttributionPath(start="chat"))
    with pytest.raises(UnknownSource):
        ask(source="plain")
