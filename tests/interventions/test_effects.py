"""Effects of single latents against ablations by hand, one latent and one context at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.models import StudiedModel
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import EditError, UnknownLatent
from crosscoder.interventions import EffectsPlan, LatentEffects, effects
from crosscoder.interventions.effects import MEASURES
from crosscoder.wiring import dedicated
from interventions.texts import dialogues, divergence, logits_with
from interventions.worlds import BASE, CHAT, clean_reads, dense_code, double, random_crosscoder, raw_decoder, sources

Pair = Mapping[str, StudiedModel]
WINDOW = 2


@pytest.fixture
def text(toy_tokenizer: PreTrainedTokenizerFast) -> AnalysisSet:
    return dialogues(toy_tokenizer)


@dataclass
class ByHand:
    """What ablating one latent in chat does, position by position."""

    kl: dict[str, list[float]] = field(default_factory=lambda: {"active": [], "after": []})
    ce: dict[str, list[float]] = field(default_factory=lambda: {"active": [], "after": []})
    change: list[Tensor] = field(default_factory=list)

    def see(self, cc: Crosscoder, pair: Pair, ids: Tensor, latent: int) -> None:
        """Add one context."""
        x = clean_reads(cc, pair, ids[None])
        f = dense_code(cc, x)[:, latent]
        f[0] = 0  # BOS is no row
        clean = logits_with(pair["chat"], ids, None)
        ablated = logits_with(pair["chat"], ids, x[:, 32:] - f[:, None] * raw_decoder(cc, CHAT)[latent])
        p, q = clean.log_softmax(-1), ablated.log_softmax(-1)
        active = f.nonzero().squeeze(1).tolist()
        for position in range(len(ids)):
            before = [a for a in active if a < position and position - a <= WINDOW]
            if position not in active and not before:
                continue
            kind = "active" if position in active else "after"
            self.kl[kind].append(float(divergence(clean, ablated)[position]))
            if position + 1 < len(ids):
                self.ce[kind].append(float((p - q)[position, ids[position + 1]]))
            if position in active:
                self.change.append((q.exp() - p.exp())[position])

    def means(self) -> list[float]:
        """In the order of `MEASURES`."""
        parts = [self.kl["active"], self.kl["after"], self.ce["active"], self.ce["after"]]
        return [sum(part) / len(part) if part else math.nan for part in parts]


def strongest(cc: Crosscoder, pair: Pair, text: AnalysisSet, latent: int, count: int) -> list[int]:
    """The contexts of a latent's largest values."""
    largest = {}
    for number in range(text.num_contexts):
        ids = torch.from_numpy(text.context(number).tokens.ids).long()
        largest[number] = float(dense_code(cc, clean_reads(cc, pair, ids[None]))[1:, latent].max())
    ordered = sorted(largest, key=lambda number: -largest[number])
    return [number for number in ordered[:count] if largest[number] > 0]


def ids_of(text: AnalysisSet, number: int) -> Tensor:
    return torch.from_numpy(text.context(number).tokens.ids).long()


PLAN = EffectsPlan(num_contexts=2, window=WINDOW, num_tokens=3)


def test_every_measure_equals_ablation_by_hand(pair: Pair, text: AnalysisSet) -> None:
    cc = double()
    found = effects(cc, pair, text, latents=range(24), sources=["chat"], plan=PLAN)
    fired = 0
    for latent in range(24):
        hand, contexts = ByHand(), strongest(cc, pair, text, latent, 2)
        for number in contexts:
            hand.see(cc, pair, ids_of(text, number), latent)
        values = [float(getattr(found, name)[latent, 0]) for name in MEASURES]
        assert values == pytest.approx(hand.means(), rel=1e-8, abs=1e-12, nan_ok=True), latent
        assert int(found.num_contexts[latent]) == len(contexts)
        assert int(found.num_active[latent]) == len(hand.change)
        if hand.change:
            change = torch.stack(hand.change).mean(0)
            assert found.falling[latent, 0].tolist() == (-change).topk(3).indices.tolist()
            torch.testing.assert_close(found.falling_change[latent, 0], -(-change).topk(3).values)
            torch.testing.assert_close(found.rising_change[latent, 0], change.topk(3).values)
            fired += 1
    assert fired > 12


def assert_equal(one: LatentEffects, other: LatentEffects) -> None:
    for name in ("num_contexts", "num_active", "rising", "falling"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in (*MEASURES, "rising_change"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-8, atol=1e-13, equal_nan=True)


def test_batched_equals_looped(pair: Pair, text: AnalysisSet) -> None:
    together = effects(double(), pair, text, latents=range(24), sources=["base", "chat"], plan=PLAN)
    small = EffectsPlan(num_contexts=2, window=WINDOW, num_tokens=3, block_tokens=1)
    assert_equal(together, effects(double(), pair, text, latents=range(24), sources=["base", "chat"], plan=small))
    some = list(range(0, 24, 5))
    alone = [effects(double(), pair, text, latents=[j], sources=["chat"], plan=PLAN) for j in some]
    for name in MEASURES:
        each = torch.cat([getattr(one, name) for one in alone])
        torch.testing.assert_close(getattr(together, name)[some, 1:], each, rtol=1e-8, atol=1e-13, equal_nan=True)


def test_contexts_that_are_named_are_not_looked_for(pair: Pair, text: AnalysisSet) -> None:
    cc, latents = double(), [5, 2, 9]
    named = {latent: strongest(cc, pair, text, latent, 5) for latent in latents}
    found = effects(cc, pair, text, latents=latents, sources=["chat"], contexts=named, plan=PLAN)
    assert_equal(found, effects(cc, pair, text, latents=latents, sources=["chat"], plan=PLAN))
    other = effects(cc, pair, text, latents=[5], sources=["chat"], contexts={5: named[5][-1:]}, plan=PLAN)
    hand = ByHand()
    hand.see(cc, pair, ids_of(text, named[5][-1]), 5)
    assert float(other.kl_active) == pytest.approx(hand.means()[0], rel=1e-8)


def test_a_latent_that_is_silent_or_cannot_write_has_no_effect_and_says_so(pair: Pair, text: AnalysisSet) -> None:
    wiring = dedicated(sources(BASE, CHAT), shared=10, exclusive={"base": 4, "chat": 4})
    cc = random_crosscoder(wiring)
    with torch.no_grad():
        cc.weights[0].encoder_bias[3] = -1e6
    found = effects(cc, pair, text, latents=range(18), sources=["base", "chat"], plan=PLAN)
    assert found.kl_active[3].isnan().all() and int(found.num_active[3]) == int(found.num_contexts[3]) == 0
    mask = torch.from_numpy(cc.wiring.writes_mask)
    assert found.kl_active[~mask].isnan().all() and found.falling_change[~mask].isnan().all()
    fires = found.num_active > 0
    assert found.kl_active[mask & fires[:, None]].isfinite().all()
    rows = found.table().to_pylist()
    assert len(rows) == 36 and rows[6]["latent"] == 3 and rows[6]["kl_active"] is None
    assert all((row["rising"] == []) == (row["falling_change"] == []) == (row["kl_active"] is None) for row in rows)
    assert [row["source"] for row in rows[:2]] == [BASE, CHAT]


def test_taking_nothing_away_is_exact(pair: Pair, text: AnalysisSet) -> None:
    """A crosscoder narrower than the model's dtype: the activations are not rounded to it."""
    cc = double().float()
    with torch.no_grad():
        for weights in cc.weights:
            for decoder in weights.decoder:
                decoder.zero_()
    found = effects(cc, pair, text, latents=range(6), sources=["chat"], plan=PLAN)
    active = found.num_active > 0
    assert active.any() and bool((found.kl_active[active] == 0).all())


def test_what_cannot_be_measured_is_refused(pair: Pair, text: AnalysisSet) -> None:
    def ask(**changed: object) -> None:
        options = {"latents": [1], "sources": ["chat"], "plan": PLAN} | changed
        effects(double(), pair, text, **options)

    with pytest.raises(UnknownLatent):
        ask(latents=[-1])
    with pytest.raises(EditError, match="at least one latent"):
        ask(latents=[])
    with pytest.raises(EditError, match="at least one latent"):
        ask(sources=[])
    with pytest.raises(EditError, match="contexts from 0 to 4"):
        ask(contexts={1: [5]})
