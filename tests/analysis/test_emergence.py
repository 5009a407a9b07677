"""Latents over checkpoints: by hand, on the truth of a world, on a trained crosscoder, and on real toy checkpoints."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch

from crosscoder.analysis.emergence import EMERGENCE_CLASSES, emergence, one_against_all
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ConfigError, SourceMismatch, UnknownSource
from crosscoder.nonlinearities import TopK
from crosscoder.sources import Source, SourceSet
from crosscoder.synthetic import (
    ConceptGroup,
    ConceptWorld,
    Constant,
    Turned,
    Uniform,
    WorldConfig,
    WorldSource,
    matching,
)
from crosscoder.training import normaliser
from crosscoder.training.config import TrainConfig
from crosscoder.training.trainer import Trainer
from crosscoder.wiring import acausal, per_source

STEPS = ("early", "middle", "late", "last")
SOURCES = SourceSet([Source(name, "layers.0.resid_post", 4) for name in STEPS])


def with_norms(norms: list[list[float]]) -> Crosscoder:
    """A crosscoder whose latents have these norms, all in the first direction."""
    cc = Crosscoder(acausal(SOURCES, num_latents=len(norms)), TopK(1))
    with torch.no_grad():
        cc.weights[0].decoder.zero_()
        cc.weights[0].decoder.view(len(norms), 4, 4)[:, :, 0] = torch.tensor(norms)
    cc.refresh_gate()
    return cc.eval()


CURVES = {
    "steady": [1.0, 0.9, 1.1, 1.0],
    "always": [0.6, 0.7, 0.8, 1.0],
    "emerging": [0.0, 0.2, 0.6, 1.0],
    "fading": [1.0, 0.9, 0.3, 0.0],
    "transient": [0.1, 2.0, 1.2, 0.2],
    "recurring": [1.0, 0.1, 0.2, 1.0],
    "dead": [0.0, 0.0, 0.0, 0.0],
}


def test_classes_and_points_by_hand() -> None:
    """Each curve is of its class, and comes and goes where a reader would say."""
    found = emergence(with_norms(list(CURVES.values())))
    assert [EMERGENCE_CLASSES[i] for i in found.class_ids.tolist()] == list(CURVES)
    assert found.emergence.tolist() == [0, 0, 2, 0, 1, 0, -1]
    assert found.decline.tolist() == [4, 4, 4, 2, 3, 4, -1]
    assert found.num_present == [4, 4, 4, 4] and found.num_emerged == [4, 1, 1, 0]
    assert found.num_declined == [0, 0, 1, 1] and found.counts == dict.fromkeys(EMERGENCE_CLASSES, 1)
    torch.testing.assert_close(found.profile[4], torch.tensor([0.05, 1.0, 0.6, 0.1]))
    assert found.latents("fading").tolist() == [3]


def test_the_table_and_the_summary_say_the_same() -> None:
    """Names instead of places; null where there is none."""
    found = emergence(with_norms(list(CURVES.values())))
    table = found.table().to_pylist()
    key = "early/layers.0.resid_post"
    assert table[4]["emergence"] == "middle/layers.0.resid_post" and table[4]["decline"] == "last/layers.0.resid_post"
    assert table[0]["decline"] is None and table[6]["emergence"] is None and table[6][f"to_last/{key}"] is None
    assert table[4][f"profile/{key}"] == pytest.approx(0.05) and table[0][f"turn/{key}"] == pytest.approx(1)
    assert f"turn/{SOURCES.keys[-1]}" not in table[0]
    summary = found.to_json()
    assert summary["classes"] == found.counts and summary["median_turn"] == pytest.approx([1, 1, 1])


def test_a_later_cut_and_an_order_of_ones_own() -> None:
    """The cut moves the point; sources may be some of them, in another order."""
    cc = with_norms(list(CURVES.values()))
    assert emergence(cc, cut=0.7, steady=0.8).emergence.tolist()[2] == 3
    back = emergence(cc, ["last", "late", "early"])
    assert EMERGENCE_CLASSES[int(back.class_ids[2])] == "fading" and back.sources[0].startswith("last/")


def test_turns_are_angles_between_decoder_rows() -> None:
    """30 degrees a step: cos 30 from each to the next, cos 90 from the first to the last; sizes do not matter."""
    cc = with_norms([[1.0, 1.0, 1.0, 1.0]])
    with torch.no_grad():
        for place in range(4):
            angle = math.radians(30 * place)
            row = (place + 1) * torch.tensor([math.cos(angle), math.sin(angle), 0.0, 0.0])
            cc.weights[0].decoder.view(1, 4, 4)[0, place] = row
    found = emergence(cc)
    torch.testing.assert_close(found.turn[0], torch.full((3,), math.cos(math.radians(30))))
    expected = torch.tensor([math.cos(math.radians(30 * (3 - place))) for place in range(4)])
    torch.testing.assert_close(found.to_last[0], expected, atol=1e-6, rtol=0)


def test_one_against_all() -> None:
    """Shares of the norms: a quarter each where all are alike, and one where only one is."""
    found = one_against_all(with_norms([[2, 2, 2, 2], [0, 3, 0, 0], [0, 0, 0, 0], [1, 1, 0, 2]]))
    torch.testing.assert_close(found.share[[0, 1, 3]], torch.tensor([[0.25] * 4, [0, 1, 0, 0], [0.25, 0.25, 0, 0.5]]))
    assert found.share[2].isnan().all() and found.largest.tolist() == [0, 1, -1, 3]
    assert found.to_json()["num_latents_largest"] == dict(zip(SOURCES.keys, [1, 1, 0, 1], strict=True))
    assert found.table().to_pylist()[2][f"share/{SOURCES.keys[0]}"] is None
    two = one_against_all(with_norms([[1, 0, 0, 3]]), ["early", "last"])
    torch.testing.assert_close(two.share, torch.tensor([[0.25, 0.75]]))


def test_what_the_wiring_fixed_is_no_finding() -> None:
    """A latent of one source alone emerges there because it can write nowhere else."""
    cc = Crosscoder(per_source(SOURCES, num_latents_per_source=2), TopK(1), seed=0)
    found = emergence(cc.eval())
    assert found.by_wiring.all() and found.to_json()["num_by_wiring"] == 8
    assert found.emergence.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_unlike_widths_have_no_angle() -> None:
    sources = SourceSet([Source("a", "embed", 4), Source("b", "embed", 6)])
    found = emergence(Crosscoder(acausal(sources, num_latents=3), TopK(1), seed=0))
    assert found.turn.isnan().all() and found.to_json()["median_turn"] == [None]


def test_latents_that_never_fire_are_dead() -> None:
    density = torch.tensor([0.1, 0.0, 0.1, 0.1, 0.1, 0.1, 0.1])
    found = emergence(with_norms(list(CURVES.values())), density=density)
    assert found.counts["dead"] == 2 and found.emergence[1] == -1


def test_bad_input() -> None:
    cc = with_norms([[1, 1, 1, 1]])
    with pytest.raises(SourceMismatch, match="two or more different sources"):
        emergence(cc, ["early", "early"])
    with pytest.raises(SourceMismatch, match="two or more different sources"):
        one_against_all(cc, ["early"])
    with pytest.raises(UnknownSource):
        emergence(cc, ["early", "none"])
    with pytest.raises(ConfigError, match="0 < cut <= steady <= 1"):
        emergence(cc, cut=0.9, steady=0.8)


def checkpoints_world() -> WorldConfig:
    """Five checkpoints of a model: concepts that are there from the start, come at each of them, or go again."""
    keys = [f"step{place}/layers.0.resid_post" for place in range(5)]
    common = {"frequency": Constant(value=0.05), "magnitude": Uniform(low=0.5, high=1.5)}
    groups = [ConceptGroup(name="from the start", num_concepts=6, **common)]
    groups += [ConceptGroup(name=f"at {s}", num_concepts=4, sources=tuple(keys[s:]), **common) for s in range(1, 5)]
    groups += [ConceptGroup(name="passing", num_concepts=4, sources=tuple(keys[1:3]), **common)]
    views = [{} if place == 0 else {"view": Turned(degrees=15)} for place in range(5)]
    return WorldConfig(
        sources=tuple(WorldSource(key=key, width=32, **view) for key, view in zip(keys, views, strict=True)),
        concepts=tuple(groups),
    )


@pytest.mark.slow
def test_emergence_points_are_recovered() -> None:
    """A trained crosscoder says of nearly every concept where it comes, where it goes and how it turns."""
    world = ConceptWorld(checkpoints_world(), seed=1)
    cc = Crosscoder(acausal(world.sources, num_latents=60), TopK(3), seed=0)
    fitted = normaliser.fit(world.sources, (batch.x for batch in islice(world.batches(1024), 8)))
    cc.set_normaliser(fitted.mean.float(), fitted.scale.float())
    Trainer(cc, TrainConfig(num_tokens=160_000, batch_size=256, learning_rate=6e-3)).run(world)
    found, match = emergence(cc.eval()), matching(cc, world.truth)
    sure = match.cosine > 0.9
    lives = torch.stack([world.truth.directions[key].norm(dim=1) > 0 for key in world.sources.keys], dim=1)
    first = lives.int().argmax(1)[match.concepts]
    last = torch.where(lives, torch.arange(5) + 1, 0).amax(1)[match.concepts]
    right = (found.emergence[match.latents] == first) & (found.decline[match.latents] == last)
    assert float(sure.double().mean()) > 0.9 and float(right[sure].double().mean()) > 0.9
    there = lives[match.concepts][:, 1:] & lives[match.concepts][:, :-1] & (sure & right)[:, None]
    turns = found.turn[match.latents][there]
    assert float(turns.median()) == pytest.approx(math.cos(math.radians(15)), abs=0.03)
