"""The replacement model against a forward patched by hand, layer by layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from crosscoder.analysis.cross_entropy import cross_entropies
from crosscoder.analysis.evaluation import evaluate
from crosscoder.analysis.replacement import is_defined, replacement_model
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.models import StudiedModel
from crosscoder.crosscoder import Crosscoder
from crosscoder.nonlinearities import BatchTopK, ReLU, TopK
from crosscoder.sources import SourceSet
from crosscoder.wiring import Wiring, acausal, strictly_causal, weakly_causal

from .worlds import ListedActivations, random_rows


def of(model: StudiedModel, kind: str) -> SourceSet:
    return SourceSet(model.source(f"layers.{layer}.{kind}") for layer in range(model.num_layers))


def transcoder(model: StudiedModel, **options: bool) -> Crosscoder:
    """A cross-layer transcoder of all layers with parameters that matter."""
    wiring = strictly_causal(of(model, "mlp_in"), of(model, "mlp_out"), num_latents_per_layer=24, **options)
    cc = Crosscoder(wiring, BatchTopK(6), seed=2).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in cc.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        cc.set_normaliser(
            torch.randn(cc.sources.width, generator=generator),
            torch.linspace(0.5, 2.0, len(cc.sources)),
        )
        for weights in cc.weights:
            weights.threshold.fill_(0.3)
    cc.settle()
    return cc


def by_hand(cc: Crosscoder, model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of one context with every MLP replaced after the first token, each from what came in up to there."""
    inputs: dict[str, Tensor] = {}

    def patch(layer: int) -> object:
        def hook(module: object, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs[f"base/layers.{layer}.mlp_in"] = args[0][0, 1:]
            new = reconstruction(cc, inputs, f"base/layers.{layer}.mlp_out")
            return torch.cat([output[:, :1], new[None]], 1)

        return model.model.layers[layer].mlp.register_forward_hook(hook)

    handles = [patch(layer) for layer in range(len(model.model.layers))]
    try:
        return model(ids[None]).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def reconstruction(cc: Crosscoder, inputs: dict[str, Tensor], key: str) -> Tensor:
    """`x̂` of one source from the groups that write it: formulas alone."""
    total = cc.bias[cc.writes.slices[key]].clone()
    for group, w, layout in zip(cc.wiring, cc.weights, cc.layouts, strict=True):
        if key not in group.writes:
            continue
        read = group.reads[0]
        place = cc.sources.index(read)
        x = (inputs[read] - cc.mean[cc.sources.slices[read]]) * cc.scale[place]
        p = x @ w.encoder.T + w.encoder_bias
        f = p * (p * sum(part.norm(dim=1) for part in w.decoder.split(list(layout.widths), 1)) > 0.3)
        start = 32 * list(group.writes).index(key)
        total = total + f @ w.decoder[:, start : start + 32]
        if key in group.skips:
            total = total + x @ w.skip.T
    return total / cc.scale[cc.sources.index(key)] + cc.mean[cc.sources.slices[key]]


@pytest.mark.parametrize("skip", [False, True])
@torch.no_grad()
def test_it_equals_a_forward_patched_by_hand(pair: dict[str, StudiedModel], text: AnalysisSet, skip: bool) -> None:
    model = pair["base"]
    cc = transcoder(model, skip=skip)
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for context in text:
        ids = torch.tensor(context.tokens.ids).long()
        both = model.model(ids[None]).logits[0], by_hand(cc, model.model, ids)
        p, q = (logits.double().log_softmax(-1)[:-1] for logits in both)
        at, target = torch.arange(len(ids) - 1), ids[1:]
        agreed = (p.argmax(1) == q.argmax(1)).sum()
        parts = (-p[at, target].sum(), -q[at, target].sum(), agreed, (p.exp() * (p - q)).sum())
        sums += torch.stack([part.double() for part in parts])
        count += len(ids) - 1
    found = replacement_model(cc, {"base": model}, text)
    assert found is not None and found.num_tokens == count
    expected = (sums / count).tolist()
    assert [found.clean, found.replaced, found.top1_agreement, found.kl] == pytest.approx(expected, rel=1e-4)
    assert found.replaced != pytest.approx(found.clean, rel=1e-3)


def test_evaluation_reports_it_beside_one_source_at_a_time(
    pair: dict[str, StudiedModel],
    text: AnalysisSet,
) -> None:
    cc = transcoder(pair["base"])
    rows = ListedActivations(cc.sources, random_rows(cc.sources, 30))
    found = evaluate(cc, rows, {"base": pair["base"]}, text=text)
    assert found.replacement == replacement_model(cc, {"base": pair["base"]}, text)
    assert list(found.cross_entropy) == list(cc.writes.keys)
    assert found.to_json()["replacement"]["top1_agreement"] == found.replacement.top1_agreement
    assert replace(found, replacement=None).to_json()["replacement"] is None
    last = cc.writes.keys[-1]
    alone = cross_entropies(cc, {"base": pair["base"]}, text)[last]
    assert alone.spliced == pytest.approx(found.cross_entropy[last].spliced)


def test_wirings_without_one_have_none(pair: dict[str, StudiedModel]) -> None:
    model = pair["base"]
    reads, writes = of(model, "mlp_in"), of(model, "mlp_out")
    strict = strictly_causal(reads, writes, num_latents_per_layer=8)
    assert is_defined(Crosscoder(strict, ReLU()))
    assert is_defined(Crosscoder(strict, BatchTopK(4)))
    assert not is_defined(Crosscoder(strict, TopK(4))), "layers compete for one k"
    assert not is_defined(Crosscoder(weakly_causal(reads, num_latents_per_layer=8), ReLU())), (
        "all that is written is read"
    )
    assert not is_defined(Crosscoder(acausal(reads, num_latents=8), ReLU()))
    group = replace(strict.groups[0], reads=reads.keys)
    assert not is_defined(Crosscoder(Wiring(strict.sources, [group]), ReLU())), "reads what comes later"
