"""Every number of an evaluation, computed again in fp64 from its definition."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from crosscoder.analysis.cross_entropy import CrossEntropy, cross_entropies
from crosscoder.analysis.evaluation import evaluate
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.models import StudiedModel
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import SourceMismatch, TextError
from crosscoder.nonlinearities import BatchTopK, ReLU, TopK
from crosscoder.sources import SourceSet
from crosscoder.training.validation import validate
from crosscoder.wiring import acausal

from .worlds import ListedActivations, random_crosscoder, random_rows, regular_rows

SITE = "layers.0.resid_post"


@torch.no_grad()
def reconstruct64(cc: Crosscoder, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised rows, their reconstruction and the dense code, all from the weights, in fp64, dense."""
    w = cc.weights[0]
    scale = torch.cat([c.double().expand(s.width) for c, s in zip(cc.scale, cc.sources, strict=True)])
    z = (x.double() - cc.mean.double()) * scale
    pre = z @ w.encoder.double().T + w.encoder_bias.double()
    gate = sum(part.norm(dim=1) for part in w.decoder.double().split(list(cc.writes.widths), dim=1))
    if isinstance(cc.nonlinearity, TopK):
        kept = (pre * gate).topk(cc.nonlinearity.k, dim=1).indices
        f = torch.zeros_like(pre).scatter(1, kept, pre.gather(1, kept)).clamp(min=0)
    elif isinstance(cc.nonlinearity, ReLU):
        f = pre.clamp(min=0)
    else:
        f = torch.where(pre * gate > float(w.threshold), pre, 0.0)
    return z, f @ w.decoder.double() + cc.bias.double(), f


@pytest.mark.parametrize("kind", [BatchTopK(4), TopK(3), ReLU()])
def test_reconstruction_numbers_equal_their_definitions(kind: BatchTopK | TopK | ReLU) -> None:
    """FVE both ways and per source, L0, dead, density."""
    cc = random_crosscoder((6, 3), nonlinearity=kind).train()
    x = random_rows(cc.sources, 120)
    found = evaluate(cc, ListedActivations(cc.sources, x, regular_rows(num_contexts=20, length=7)))
    z, reconstruction, f = reconstruct64(cc, x)
    error, spread = (z - reconstruction).square(), (z - z.mean(0)).square()
    assert found.fve == pytest.approx(float(1 - error.sum() / spread.sum()), abs=1e-6)
    assert found.fve_per_source["chat/embed"] == pytest.approx(
        float(1 - error[:, 6:].sum() / spread[:, 6:].sum()), abs=1e-6
    )
    ratios = 1 - error.sum(1) / z.square().sum(1)
    assert found.fve_mean_of_ratios == pytest.approx(float(ratios.mean()), abs=1e-6)
    assert found.l0 == pytest.approx(float((f > 0).sum() / 120))
    assert found.dead_fraction == pytest.approx(float((~(f > 0).any(0)).double().mean()))
    torch.testing.assert_close(found.density, (f > 0).double().mean(0))
    assert found.num_rows == 120 and cc.training


def test_folding_changes_no_number() -> None:
    """Numbers are of normalised space, wherever the normaliser is."""
    cc = random_crosscoder()
    activations = ListedActivations(cc.sources, random_rows(cc.sources, 60))
    one, two = evaluate(cc, activations), evaluate(cc.folded(), activations)
    assert one.fve == pytest.approx(two.fve, abs=1e-5) and one.l0 == two.l0
    assert one.fve_mean_of_ratios == pytest.approx(two.fve_mean_of_ratios, abs=1e-5)


def test_a_large_common_offset_does_not_count_as_variance() -> None:
    """Variance is about the mean of the rows seen, even where that is far from the normaliser's."""
    cc = random_crosscoder()
    x = random_rows(cc.sources, 200) + 50
    z, reconstruction, _ = reconstruct64(cc, x)
    wanted = 1 - (z - reconstruction).square().sum() / (z - z.mean(0)).square().sum()
    assert evaluate(cc, ListedActivations(cc.sources, x)).fve == pytest.approx(float(wanted), rel=1e-4)


def test_validation_gives_the_same_numbers() -> None:
    """The trainer's validation and the evaluation are one computation."""
    cc = random_crosscoder().train()
    activations = ListedActivations(cc.sources, random_rows(cc.sources, 60))
    numbers, found = validate(cc, activations.contexts()), evaluate(cc, activations)
    assert numbers["fve"] == found.fve and numbers["fve/base/embed"] == found.fve_per_source["base/embed"]
    assert numbers["l0"] == found.l0 and cc.training


def test_wrong_or_empty_activations_are_refused() -> None:
    """Other sources, and no rows at all, are errors that say so."""
    cc, other = random_crosscoder(), random_crosscoder((6, 3))
    with pytest.raises(SourceMismatch, match="not of the crosscoder's sources"):
        evaluate(cc, ListedActivations(other.sources, random_rows(other.sources, 4)))
    with pytest.raises(TextError, match="not one row came"):
        evaluate(cc, ListedActivations(cc.sources, torch.zeros(0, 12)))


def test_json_and_table_hold_the_numbers() -> None:
    """What is written can be read by any program."""
    cc = random_crosscoder()
    found = evaluate(cc, ListedActivations(cc.sources, random_rows(cc.sources, 60)))
    content = json.loads(json.dumps(found.to_json()))
    assert content["fve"] == found.fve and content["ce_recovered_min"] is None
    alive = int((found.density > 0).sum())
    assert sum(content["density_histogram"]["num_latents"]) == alive
    assert found.table().column("source").to_pylist() == ["base/embed", "chat/embed"]


def test_a_source_without_recovery_leaves_the_smallest_unknown() -> None:
    """The smallest of 0.99 and an undefined number is not 0.99."""
    cc = random_crosscoder()
    found = evaluate(cc, ListedActivations(cc.sources, random_rows(cc.sources, 20)))
    ce = {"base/embed": CrossEntropy(2.0, 2.01, 3.0, 3.0, 10), "chat/embed": CrossEntropy(2.0, 2.0, 2.0, 3.0, 10)}
    assert replace(found, cross_entropy={"base/embed": ce["base/embed"]}).ce_recovered_min == pytest.approx(0.99)
    assert replace(found, cross_entropy=ce).ce_recovered_min is None


def toy_crosscoder(pair: dict[str, StudiedModel]) -> Crosscoder:
    """A crosscoder of the toy models' first layer, means and threshold set."""
    sources = SourceSet([model.source(SITE) for model in pair.values()])
    cc = Crosscoder(acausal(sources, num_latents=64), BatchTopK(8))
    generator = torch.Generator().manual_seed(3)
    cc.set_normaliser(torch.randn(sources.width, generator=generator), torch.tensor([1.5, 0.7]))
    for weights in cc.weights:
        weights.threshold.fill_(0.2)
    return cc.eval()


def loss_with(model: PreTrainedModel, ids: torch.Tensor, new: torch.Tensor | None) -> torch.Tensor:
    """Summed next-token loss of one context; `new` replaces the first block's output after the BOS."""

    def hook(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor | None:
        return None if new is None else torch.cat([output[:, :1], new[None]], dim=1)

    handle = model.model.layers[0].register_forward_hook(hook)
    try:
        log_p = model(ids[None]).logits[0].double().log_softmax(-1)
    finally:
        handle.remove()
    return -log_p[torch.arange(len(ids) - 1), ids[1:]].sum()


@torch.no_grad()
def test_cross_entropy_equals_splicing_by_hand(pair: dict[str, StudiedModel], text: AnalysisSet) -> None:
    """Clean, spliced, zeroed and mean-ablated losses, one context at a time with a hook of our own."""
    cc = toy_crosscoder(pair)
    wanted = {key: torch.zeros(4, dtype=torch.float64) for key in cc.writes.keys}
    rows, count = [], 0
    for context in text:
        ids = torch.tensor(context.tokens.ids).long()
        states = [m.model(ids[None], output_hidden_states=True).hidden_states[1][0, 1:] for m in pair.values()]
        rows.append(torch.cat(states, dim=1))
        reconstruction = cc(rows[-1])
        count += len(ids) - 1
        for (key, columns), model in zip(cc.sources.slices.items(), pair.values(), strict=True):
            new = reconstruction[:, columns]
            mean = cc.mean[columns].expand_as(new)
            parts = [loss_with(model.model, ids, x) for x in (None, new, torch.zeros_like(new), mean)]
            wanted[key] += torch.stack(parts)
    found = evaluate(cc, ListedActivations(cc.sources, torch.cat(rows)), pair, text=text).cross_entropy
    for key, total in wanted.items():
        clean, spliced, zero, mean = (total / count).tolist()
        ce = found[key]
        assert [ce.clean, ce.spliced, ce.zero_ablated, ce.mean_ablated] == pytest.approx(
            [clean, spliced, zero, mean], rel=1e-5
        )
        assert ce.recovered == pytest.approx((zero - spliced) / (zero - clean), rel=1e-3)
        assert ce.recovered_mean == pytest.approx((mean - spliced) / (mean - clean), rel=1e-3)
        assert ce.num_tokens == count


def test_fewer_tokens_are_a_sample_of_whole_contexts(pair: dict[str, StudiedModel], text: AnalysisSet) -> None:
    """`num_ce_tokens` bounds the work; batches of any size give the same numbers."""
    cc = toy_crosscoder(pair)
    activations = ListedActivations(cc.sources, random_rows(cc.sources, 8))
    few = evaluate(cc, activations, pair, text=text, num_ce_tokens=10).cross_entropy
    assert all(0 < ce.num_tokens < text.num_tokens - 5 for ce in few.values())
    one_by_one, together = (cross_entropies(cc, pair, text, batch_tokens=size) for size in (1, 10_000))
    for key, ce in one_by_one.items():
        assert ce.spliced == pytest.approx(together[key].spliced, rel=1e-5)
        assert ce.mean_ablated == pytest.approx(together[key].mean_ablated, rel=1e-5)


def test_models_without_text_or_partner_are_refused(pair: dict[str, StudiedModel], text: AnalysisSet) -> None:
    """Cross-entropy needs tokens and every model."""
    cc = toy_crosscoder(pair)
    activations = ListedActivations(cc.sources, random_rows(cc.sources, 8))
    with pytest.raises(TextError, match="needs the tokens"):
        evaluate(cc, activations, pair)
    with pytest.raises(SourceMismatch, match="chat did not come"):
        evaluate(cc, activations, {"base": pair["base"]}, text=text)


def test_a_perfect_crosscoder_recovers_everything(pair: dict[str, StudiedModel], text: AnalysisSet) -> None:
    """With one latent pair per coordinate the reconstruction is exact: FVE 1, all cross-entropy recovered."""
    source = pair["base"].source(SITE)
    cc = Crosscoder(acausal(SourceSet([source]), num_latents=64), ReLU())
    with torch.no_grad():
        eye = torch.eye(32)
        cc.weights[0].encoder.copy_(torch.cat([eye, -eye]))
        cc.weights[0].decoder.copy_(torch.cat([eye, -eye]))
    ids = text.token_ids[None, :20].long()
    x = pair["base"].read([SITE], ids)[SITE][0]
    found = evaluate(cc.eval(), ListedActivations(cc.sources, x), {"base": pair["base"]}, text=text)
    assert found.fve == pytest.approx(1.0, abs=1e-9)
    assert found.ce_recovered_min == pytest.approx(1.0, abs=1e-4)
