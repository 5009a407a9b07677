"""Matched latents: by hand, as sets, and how well they match against a draw at random."""

from __future__ import annotations

import pytest
import torch

from crosscoder.analysis.matched_latents import matched_latents
from crosscoder.errors import ConfigError


def random_latents(number: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    density = (torch.randn(number, generator=generator).double() - 5).exp()
    return density, (0.5 * torch.randn(number, generator=generator).double()).exp()


def test_the_nearest_by_hand() -> None:
    """Twice as dense with the same norm is nearer than as dense with another norm, and the twin of itself is best."""
    density = torch.tensor([0.01, 0.01, 0.02, 0.3, 0.0, 0.01])
    norm = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 9.0])
    assert matched_latents([0], density=density, norm=norm, nearest=1).latents.tolist() == [1]
    second = matched_latents([0], density=density, norm=norm, nearest=1, exclude=[1])
    assert second.latents.tolist() == [2]
    assert second.density.tolist() == [[pytest.approx(0.01), pytest.approx(0.02)]]
    assert second.table().to_pylist()[0]["latent"] == 2


@pytest.mark.parametrize("seed", range(5))
def test_sets_are_disjoint_live_and_seeded(seed: int) -> None:
    """Nothing chosen, excluded, dead or drawn twice; the same seed draws the same, another one another."""
    density, norm = random_latents()
    density[350:] = 0
    chosen, exclude = list(range(0, 80, 2)), list(range(100, 150))
    found = matched_latents(chosen, density=density, norm=norm, exclude=torch.tensor(exclude), seed=seed)
    drawn = found.latents.tolist()
    assert len(set(drawn)) == len(chosen) and not set(drawn) & {*chosen, *exclude, *range(350, 400)}
    assert found.chosen.tolist() == chosen
    again = matched_latents(torch.tensor(chosen), density=density, norm=norm, exclude=exclude, seed=seed)
    other = matched_latents(chosen, density=density, norm=norm, exclude=exclude, seed=seed + 99)
    assert again.latents.tolist() == drawn != other.latents.tolist()


def test_an_odd_set_is_matched_where_a_random_one_is_not() -> None:
    """The 30 densest latents of 400: controls within 50 %, where the average latent is a tenth as dense."""
    density, norm = random_latents()
    chosen = density.argsort(descending=True)[10:70:2]
    rest = density[density.argsort(descending=True)[70:]]
    found = matched_latents(chosen, density=density, norm=norm)
    ratios = found.to_json()["ratio_of_geometric_means"]
    assert 0.5 < ratios["density"] < 1.5 and 0.67 < ratios["norm"] < 1.5
    assert rest.log().mean().exp() < 0.3 * density[chosen].log().mean().exp()


def test_what_cannot_be_matched_is_refused() -> None:
    """Dead, absent and repeated latents, and too small a pool."""
    density, norm = random_latents(10)
    density[3] = 0
    with pytest.raises(ConfigError, match="never active"):
        matched_latents([3], density=density, norm=norm)
    with pytest.raises(ConfigError, match="from 0 to 9; got 10"):
        matched_latents([10], density=density, norm=norm)
    with pytest.raises(ConfigError, match="named twice"):
        matched_latents([1, 1], density=density, norm=norm)
    with pytest.raises(ConfigError, match="5 latents to choose controls from; 4 are"):
        matched_latents([0, 1, 2, 4, 5], density=density, norm=norm)
    assert matched_latents([], density=density, norm=norm).to_json()["num_latents"] == 0
