"""Worlds: rows are what the description says, wherever one starts and however one cuts them."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crosscoder.activations import ActivationSource
from crosscoder.errors import ConfigError
from crosscoder.synthetic import (
    ConceptGroup,
    ConceptWorld,
    Constant,
    Correlation,
    Exponential,
    Independent,
    LinearMap,
    LogUniform,
    Rotation,
    Turned,
    Uniform,
    WorldConfig,
    WorldSource,
    dedicated_toy,
    feb25_toy,
    layer_world,
    narrow_exclusive,
    null_world,
)
from crosscoder.synthetic.description import Frequency, Magnitude, View

A, B = "base/embed", "chat/embed"
PRESETS = {
    "overcomplete": feb25_toy("overcomplete", width=32),
    "tight": feb25_toy("tight", width=32, degrees=30),
    "dedicated": dedicated_toy(200, widths=(24, 40)),
    "narrow": narrow_exclusive("narrow"),
    "common": narrow_exclusive("common"),
    "null same": null_world("same", num_concepts=40, width=16),
    "null noise": null_world("noise", num_concepts=40, width=16),
    "null rotation": null_world("rotation", num_concepts=40, width=16),
    "layers": layer_world(4, num_concepts=20, width=16),
}


def small(
    *,
    view: View | None = None,
    widths: tuple[int, int] = (12, 12),
    frequency: Frequency | None = None,
    magnitude: Magnitude | None = None,
    noise: float = 0.0,
    correlation: Correlation | None = None,
    geometry: str = "gaussian",
) -> WorldConfig:
    """Five shared concepts, two exclusive to each model, and three children of the first shared ones."""
    rate, size = frequency or Constant(value=0.3), magnitude or Uniform(low=0.5, high=1.5)
    one = {"frequency": rate, "magnitude": size}
    return WorldConfig(
        sources=(
            WorldSource(key=A, width=widths[0]),
            WorldSource(key=B, width=widths[1], view=view or Turned(degrees=0)),
        ),
        concepts=(
            ConceptGroup(name="shared", num_concepts=5, **one),
            ConceptGroup(name="base", num_concepts=2, sources=(A,), **one),
            ConceptGroup(name="chat", num_concepts=2, sources=(B,), **one),
            ConceptGroup(name="children", num_concepts=3, frequency=Constant(value=0.1), parents="shared"),
        ),
        noise=noise,
        correlation=correlation,
        geometry=geometry,
    )


def rows(world: ConceptWorld, batch_size: int, number: int) -> Tensor:
    return torch.cat([batch.x for batch in islice(world.batches(batch_size), number)])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_sources_of_activations(name: str) -> None:
    world: ActivationSource = ConceptWorld(PRESETS[name], seed=3, num_contexts=3, context_length=5)
    assert next(world.batches(7)).x.shape == (7, world.sources.width)
    (batch,) = world.contexts()
    assert batch.rows is not None
    assert batch.rows.context.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert batch.rows.position.tolist() == [0, 1, 2, 3, 4] * 3
    assert batch.x.shape[0] == 15


@pytest.mark.parametrize("name", PRESETS)
def test_descriptions_survive_json(name: str) -> None:
    assert WorldConfig.model_validate_json(PRESETS[name].model_dump_json()) == PRESETS[name]


@given(batch_sizes=st.lists(st.integers(1, 1500), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_rows_do_not_depend_on_the_batch_size(batch_sizes: list[int]) -> None:
    world = ConceptWorld(small(noise=0.1, correlation=Correlation(rank=2)), seed=5)
    whole = world.draw(0, sum(batch_sizes)).x
    parts = [next(world.batches(size)).x for size in batch_sizes]
    assert torch.equal(torch.cat(parts), whole)


def test_resuming_goes_on_exactly() -> None:
    config = PRESETS["dedicated"]
    world = ConceptWorld(config, seed=1)
    rows(world, 300, 5)
    state = world.state_dict()
    expected = rows(world, 300, 3)
    other = ConceptWorld(config, seed=1)
    other.load_state_dict(state)
    assert torch.equal(rows(other, 300, 3), expected)


def test_a_place_in_another_world_is_refused() -> None:
    state = ConceptWorld(small(), seed=1).state_dict()
    for other in (ConceptWorld(small(), seed=2), ConceptWorld(small(noise=0.1), seed=1)):
        with pytest.raises(ConfigError, match="another world"):
            other.load_state_dict(state)


def test_contexts_and_batches_are_different_streams() -> None:
    world = ConceptWorld(small(), seed=1, num_contexts=40, context_length=50)
    held = torch.cat([batch.x for batch in world.contexts()])
    assert len(held) == 2000
    assert torch.equal(held, world.draw(0, 2000, stream="contexts").x)
    assert not torch.equal(held, world.draw(0, 2000).x)
    world.draw(0, 10)
    assert torch.equal(torch.cat([batch.x for batch in world.contexts()]), held)


def test_seeds_give_different_worlds() -> None:
    one, other = ConceptWorld(small(), seed=1), ConceptWorld(small(), seed=2)
    assert not torch.equal(one.truth.packed, other.truth.packed)
    assert not torch.equal(one.draw(0, 4).values, other.draw(0, 4).values)


def test_rows_are_sums_of_concepts_and_noise() -> None:
    world = ConceptWorld(small(noise=0.2), seed=4)
    drawn = world.draw(0, 20_000)
    noise = drawn.x - drawn.values @ world.truth.packed
    assert abs(float(noise.std()) - 0.2) < 0.002
    assert abs(float(noise.mean())) < 0.002
    assert float(torch.corrcoef(noise.T).fill_diagonal_(0).abs().max()) < 0.05


@pytest.mark.parametrize("correlation", [None, Correlation(rank=3, scale=2.0)])
def test_concepts_fire_as_often_as_they_should(correlation: Correlation | None) -> None:
    world = ConceptWorld(small(frequency=LogUniform(low=0.01, high=0.5), correlation=correlation), seed=2)
    n = 200_000
    found = (world.draw(0, n).values > 0).double().mean(0)
    p = world.truth.frequencies.double()
    assert float(((found - p) / (p * (1 - p) / n).sqrt()).abs().max()) < 4.5


def test_decaying_frequencies_fall_to_the_floor_and_keep_their_mean() -> None:
    p = ConceptWorld(dedicated_toy(1000, widths=(8, 8))).truth.frequencies
    assert abs(float(p.mean()) - 0.01) < 3e-4
    assert abs(float(p.log().max() - p.log().min()) - 2.048) < 0.1
    tiny = dedicated_toy(100, widths=(8, 8)).model_copy(
        update={
            "concepts": (
                ConceptGroup(name="x", num_concepts=100, frequency={"kind": "decaying", "mean": 1e-3, "rate": 1.0}),
            )
        }
    )
    assert abs(float(ConceptWorld(tiny).truth.frequencies.min()) - 1e-4) < 1e-9


@pytest.mark.parametrize(
    ("magnitude", "mean", "low", "high"),
    [
        (Constant(value=2.0), 2.0, 2.0, 2.0),
        (Uniform(low=1, high=3), 2.0, 1.0, 3.0),
        (Exponential(mean=2.0), 2.0, 0.0, 99.0),
    ],
)
def test_values_are_as_described(magnitude: Magnitude, mean: float, low: float, high: float) -> None:
    world = ConceptWorld(small(magnitude=magnitude), seed=1)
    values = world.draw(0, 20_000).values[:, :9]
    values = values[values > 0]
    assert abs(float(values.mean()) - mean) < 0.05
    assert low <= float(values.min()) and float(values.max()) <= high
    assert float(world.truth.mean_magnitudes[0]) == mean


def test_exclusive_concepts_are_exactly_absent_elsewhere() -> None:
    world = ConceptWorld(small(view=LinearMap(), widths=(12, 7)), seed=1)
    truth = world.truth
    assert truth.kinds[:9] == ("shared",) * 5 + (f"exclusive to {A}",) * 2 + (f"exclusive to {B}",) * 2
    assert torch.equal(truth.directions[B][5:7], torch.zeros(2, 7))
    assert torch.equal(truth.directions[A][7:9], torch.zeros(2, 12))
    assert truth.exclusive_to("base").nonzero().flatten().tolist() == [5, 6]
    assert truth.exclusive_to(B, against=A).nonzero().flatten().tolist() == [7, 8]
    drawn = world.draw(0, 5000)
    at_b = world.sources.unpack(drawn.x)[B]
    for concept in (5, 6):  # rows on which nothing else fires show nothing at the other model
        alone = (drawn.values > 0).sum(1) == (drawn.values[:, concept] > 0)
        assert bool((drawn.values[alone, concept] > 0).any())
        assert torch.equal(at_b[alone], torch.zeros_like(at_b[alone]))


def test_children_fire_only_where_their_parents_do() -> None:
    world = ConceptWorld(small(correlation=Correlation()), seed=1)
    assert world.truth.parents[-3:] == (0, 1, 2)
    fires = world.draw(0, 20_000).values > 0
    assert bool(fires[:, -3:].any(0).all())
    assert not bool((fires[:, -3:] & ~fires[:, :3]).any())


def test_correlated_concepts_fire_together() -> None:
    def spread(correlation: Correlation | None) -> float:
        fires = ConceptWorld(small(correlation=correlation), seed=1).draw(0, 50_000).values[:, :9] > 0
        return float(torch.corrcoef(fires.double().T).fill_diagonal_(0).abs().max())

    assert spread(None) < 0.02
    assert spread(Correlation(rank=1, scale=3.0)) > 0.1


def test_views_keep_what_they_should() -> None:
    def directions(view: View, widths: tuple[int, int] = (12, 12)) -> tuple[Tensor, Tensor]:
        truth = ConceptWorld(small(view=view, widths=widths), seed=3).truth
        return truth.directions[A][:5], truth.directions[B][:5]

    a, b = directions(Turned(degrees=40))
    assert torch.allclose((a * b).sum(1), torch.full((5,), 40.0).deg2rad().cos(), atol=1e-5)
    assert torch.allclose(b.norm(dim=1), torch.ones(5), atol=1e-5)
    a, b = directions(Rotation())
    assert torch.allclose(a @ a.T, b @ b.T, atol=1e-5)
    assert not torch.allclose(a, b, atol=0.1)
    a, b = directions(Independent(), (12, 5))
    assert torch.allclose(b.norm(dim=1), torch.ones(5), atol=1e-5)


def test_a_linear_map_is_affine_and_keeps_the_median_norm() -> None:
    config = dedicated_toy(61, widths=(6, 9), exclusive_share=0.04)
    truth = ConceptWorld(config, seed=1).truth
    both = truth.shared
    a, b = truth.directions["base/layers.0.resid_post"][both], truth.directions["chat/layers.0.resid_post"][both]
    design = torch.cat([a, torch.ones(len(a), 1)], dim=1).double()
    fitted = design @ torch.linalg.lstsq(design, b.double()).solution
    assert torch.allclose(fitted, b.double(), atol=1e-5)
    assert abs(float(b.norm(dim=1).median()) - 1) < 0.1  # of all concepts, exclusive ones included


def test_drift_is_the_angle_over_the_span() -> None:
    truth = ConceptWorld(small(view=Turned(degrees=40)), seed=3).truth
    assert torch.allclose(truth.drift[:5], torch.full((5,), 40.0), atol=1e-3)
    assert torch.equal(truth.drift[5:9], truth.drift[5:9] * 0)
    assert bool(ConceptWorld(small(view=LinearMap(), widths=(12, 7))).truth.drift[:5].isnan().all())


def test_layer_worlds_have_spans() -> None:
    truth = ConceptWorld(layer_world(5, num_concepts=300, width=16, min_span=2), seed=1).truth
    spans = truth.span[:300]
    lengths = spans[:, 1] - spans[:, 0] + 1
    assert sorted(set(lengths.tolist())) == [2, 3, 4, 5]
    assert torch.equal(truth.presence[:300].sum(1), lengths)
    assert sorted(set(spans[:, 0].tolist())) == [0, 1, 2, 3]
    assert bool(truth.shared[300:].all())
    assert bool((truth.drift[300:] > 5).all())
    assert {"partial", "shared"} == set(truth.kinds)


def test_null_worlds_differ_as_they_say() -> None:
    def sources(kind: str) -> tuple[Tensor, Tensor]:
        world = ConceptWorld(null_world(kind, num_concepts=20, width=16, noise=0.3), seed=1)
        assert bool(world.truth.shared.all())
        a, b = world.sources.unpack(world.draw(0, 4000).x).values()
        return a, b

    a, b = sources("same")
    assert torch.equal(a, b)
    a, b = sources("noise")
    assert abs(float((a - b).std()) - 0.3 * 2**0.5) < 0.01
    a, b = sources("rotation")
    assert float((a - b).std()) > 0.5 * float(a.std())
    assert torch.allclose(a.square().sum(1).mean(), b.square().sum(1).mean(), rtol=0.02)


def test_orthonormal_directions() -> None:
    d = ConceptWorld(small(geometry="orthonormal", view=Rotation()), seed=1).truth.directions[A]
    lives = d.norm(dim=1) > 0
    assert torch.allclose(d[lives] @ d[lives].T, torch.eye(int(lives.sum())), atol=1e-5)
    with pytest.raises(ConfigError, match="12 orthonormal directions do not fit into 8 columns"):
        ConceptWorld(small(geometry="orthonormal", widths=(8, 8)))


def test_strengths_are_norms() -> None:
    config = small()
    stronger = config.concepts[0].model_copy(update={"strengths": (1.0, 0.25)})
    truth = ConceptWorld(config.model_copy(update={"concepts": (stronger, *config.concepts[1:])}), seed=1).truth
    assert torch.allclose(truth.directions[B][:5].norm(dim=1), torch.full((5,), 0.25), atol=1e-5)


def test_the_truth_has_a_table() -> None:
    table = ConceptWorld(small(), seed=1).truth.table()
    assert table.num_rows == 12
    assert table.column("parent").to_pylist()[-3:] == [0, 1, 2]
    assert table.column("kind").to_pylist()[5] == f"exclusive to {A}"


ONE = {"name": "x", "num_concepts": 1, "frequency": {"kind": "constant", "value": 0.1}}
BAD = {
    "differ": {"concepts": [ONE, ONE]},
    "2 sources and 1 strengths": {"concepts": [ONE | {"strengths": [1]}]},
    "lives in 2 sources; min_span is 3": {"concepts": [ONE | {"min_span": 3}]},
    "no group before it": {"concepts": [ONE | {"parents": "y"}]},
    "no source is called": {"concepts": [ONE | {"sources": ["chap/embed"]}]},
    "no source before it": {"sources": [{"key": A, "width": 3, "view": {"kind": "rotation"}}]},
    "needs equal widths": {"sources": [{"key": A, "width": 3}, {"key": B, "width": 4}]},
    "cannot share their noise": {
        "sources": [{"key": A, "width": 3}, {"key": B, "width": 4, "view": {"kind": "independent"}}],
        "noise_across": "shared",
    },
    "low <= high": {"concepts": [ONE | {"frequency": {"kind": "log_uniform", "low": 0.5, "high": 0.1}}]},
    "Extra inputs": {"nosie": 1},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_descriptions_are_refused(message: str) -> None:
    good = {"sources": [{"key": A, "width": 3}, {"key": B, "width": 3}], "concepts": [ONE]}
    WorldConfig.model_validate(good)
    with pytest.raises(ValueError, match=message):
        WorldConfig.model_validate({**good, **BAD[message]})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (small(frequency=Constant(value=0.6), correlation=Correlation()), "0.5 is the most that it can"),
        (small(frequency=Constant(value=0.05)), "0.05 is the most that its parent 0 leaves it"),
    ],
)
def test_impossible_frequencies_are_refused(config: WorldConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConceptWorld(config)
