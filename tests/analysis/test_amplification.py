"""Amplification by hand, and on a world in which b has some concepts at twice or half the strength."""

from __future__ import annotations

import pytest
import torch

from crosscoder.analysis.amplification import Carried, amplification
from crosscoder.analysis.latent_scaling import scaling
from crosscoder.analysis.passes import watch_reconstructions
from crosscoder.analysis.scaling_sums import ScalingSums
from crosscoder.crosscoder import Space
from crosscoder.errors import SourceMismatch
from crosscoder.nonlinearities import ReLU

from .worlds import ListedActivations, random_crosscoder, random_rows


def carried(name: str, norm: list[float], beta: list[float], *error: list[float]) -> Carried:
    return Carried(name, *(torch.tensor(part, dtype=torch.float64) for part in (norm, beta, *error)))


def test_ratios_by_hand() -> None:
    """Twice, half, as strong; not carried at all; and a norm of zero."""
    a = carried("a", [1, 2, 1, 1, 0], [1, 1, 1, -0.1, 1], [1, 1, 1, 1, 1])
    b = carried("b", [1, 1, 4, 1, 1], [2, 1, 0.25, 1, 1], [1, 1, 1, 8, 1])
    found = amplification(a, b, num_active=torch.tensor([100, 100, 100, 100, 100]))
    assert found.norm_ratio.tolist()[:4] == [0, -1, 2, 0] and found.norm_ratio[4].isnan()
    assert found.activation_ratio.tolist()[:3] == [1, -1, 0] and bool(found.activation_ratio[3:].isnan().all())
    assert found.own_ratio.tolist()[:4] == [0, -1, 2, 3] and found.own_ratio[4].isnan()
    by = "activation"
    assert found.most("amplified", by=by).tolist() == [0] and found.most("attenuated", by=by).tolist() == [1]
    assert found.most("amplified", by="norm").tolist() == [2]
    assert found.most("amplified").tolist() == [3, 2]
    assert found.table()["activation_ratio"].to_pylist() == [1, -1, 0, None, None]
    spread = found.to_json()["log2_activation_ratio"]
    assert (spread["num_doubled"], spread["num_halved"], spread["num_without"]) == (1, 1, 2)


def test_swapping_the_models_turns_the_sign() -> None:
    """`ratio(b, a) = −ratio(a, b)`, and amplified and attenuated change places."""
    generator = torch.Generator().manual_seed(0)
    norm, beta = torch.rand(2, 50, generator=generator) + 0.1, torch.rand(2, 50, generator=generator) + 0.1
    a, b = (Carried(name, norm[i], beta[i], beta[1 - i] + 1) for i, name in enumerate("ab"))
    count = torch.full((50,), 100)
    forth, back = amplification(a, b, num_active=count), amplification(b, a, num_active=count)
    torch.testing.assert_close(forth.activation_ratio, -back.activation_ratio)
    assert forth.most("amplified", num=5).tolist() == back.most("attenuated", num=5).tolist()


def test_only_active_latents_of_those_asked_about_are_ranked() -> None:
    """A rare latent and one outside the set are in the table, not in the ranking; an empty set has no quartiles."""
    a, b = carried("a", [1] * 4, [1] * 4), carried("b", [1] * 4, [8, 4, 2, 1])
    count, among = torch.tensor([9, 100, 100, 100]), torch.tensor([True, False, True, True])
    found = amplification(a, b, num_active=count, among=among, min_active=10, density={"user": torch.ones(4)})
    assert found.most("amplified", by="activation").tolist() == [2]
    assert found.table().to_pylist()[0]["activation_ratio"] == 3 and "density_user" in found.table().column_names
    none = amplification(a, b, num_active=count, among=~among & (count > 1000))
    assert none.to_json()["log2_norm_ratio"]["median"] is None


def test_planted_strengths_come_out_whatever_the_norms_say() -> None:
    """Least squares of activations along each side's rows: b's strengths 2, ½ and 1, with norms that hide them."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(16, 3, generator=generator).double()).Q.T
    f = torch.rand(2000, 3, generator=generator).double() * (torch.rand(2000, 3, generator=generator) < 0.2)
    strength = {"a": torch.tensor([1.0, 1.0, 1.0]).double(), "b": torch.tensor([2.0, 0.5, 1.0]).double()}
    norms = {"a": torch.tensor([1.0, 1.0, 2.0]).double(), "b": torch.tensor([1.0, 1.0, 0.3], dtype=torch.float64)}
    sides = {}
    for name in "ab":
        x, rows = (f * strength[name]) @ directions, norms[name][:, None] * directions
        beta = [float(torch.linalg.lstsq((f[:, i : i + 1, None] * rows[i]).reshape(-1, 1), x.reshape(-1, 1)).solution)
                for i in range(3)]  # fmt: skip
        fitted = torch.tensor(beta, dtype=torch.float64)
        sides[name] = Carried(name, norms[name], fitted, fitted)
    found = amplification(sides["a"], sides["b"], num_active=(f > 0).sum(0))
    torch.testing.assert_close(found.activation_ratio, torch.tensor([1.0, -1.0, 0.0]).double(), atol=1e-9, rtol=0)
    assert found.norm_ratio.tolist() != [0, 0, 0]


@pytest.mark.parametrize("space", ["normalised", "raw"])
def test_it_takes_its_parts_from_latent_scaling(space: Space) -> None:
    """Both directions of one pass; against least squares of each side's activations along its own rows."""
    cc = random_crosscoder(nonlinearity=ReLU()).double()
    x = random_rows(cc.sources, 300).double()
    sums = ScalingSums(cc, [("base", "chat"), ("chat", "base")], bootstrap=None)
    watch_reconstructions(cc, ListedActivations(cc.sources, x), [sums])
    sides = {
        one: Carried.of(cc, scaling(sums, a=other, b=one, space=space))
        for one, other in (("base", "chat"), ("chat", "base"))
    }
    found = amplification(sides["base"], sides["chat"], num_active=sums.num_active, space=space)
    assert (found.a.source, found.b.source) == ("base/embed", "chat/embed")
    f = cc.encode(x).to_dense().detach()
    target = x if space == "raw" else cc.normalise(x)
    lengths = {}
    for key in cc.sources.keys:
        rows = cc.decoder_rows(key, space).detach()
        y = target[:, cc.sources.slices[key]]
        lengths[key] = (f.T @ y * rows).sum(1) / (f.square().sum(0) * rows.norm(dim=1))
    torch.testing.assert_close(found.b.length, lengths["chat/embed"], rtol=1e-9, atol=1e-12)
    ratio = (lengths["chat/embed"] / lengths["base/embed"]).log2()
    both = (lengths["chat/embed"] > 0) & (lengths["base/embed"] > 0)
    assert both.sum() > 3
    torch.testing.assert_close(found.activation_ratio[both], ratio[both], rtol=1e-9, atol=1e-9)
    rows = cc.decoder_rows("chat/embed", space).detach()
    columns = cc.sources.slices["chat/embed"]
    reconstruction = cc.decode(cc.encode(x)) if space == "raw" else cc.decode_normalised(cc.encode(x))
    error = (target - reconstruction.detach())[:, columns]
    own = torch.stack([((error + f[:, [i]] * rows[i]) * f[:, [i]]).sum(0) @ rows[i] for i in range(cc.num_latents)])
    expected = own / (f.square().sum(0) * rows.norm(dim=1))
    torch.testing.assert_close(found.b.own_length, expected, rtol=1e-9, atol=1e-9)


def test_parts_of_different_crosscoders_are_refused() -> None:
    """Every part is of the same latents."""
    with pytest.raises(SourceMismatch, match="different numbers"):
        amplification(carried("a", [1], [1]), carried("b", [1], [1]), num_active=torch.tensor([1, 2]))
