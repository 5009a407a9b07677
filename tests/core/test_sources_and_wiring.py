"""Sources and wirings: names, packing, and the contradictions that are refused."""

from __future__ import annotations

import pytest
import torch

from crosscoder.errors import SourceMismatch, UnknownSource, UnsupportedSite, WiringError
from crosscoder.sources import Source, SourceSet, canonical_site, site_order
from crosscoder.wiring import LatentGroup, Wiring, acausal, sae

BASE = Source("base", "layers.3.resid_post", 2)
CHAT = Source("chat", "layers.3.resid_post", 3)
SOURCES = SourceSet([BASE, CHAT])


def test_pack_lays_sources_side_by_side_and_unpack_undoes_it() -> None:
    parts = {BASE.key: torch.tensor([[1.0, 2.0]]), CHAT.key: torch.tensor([[3.0, 4.0, 5.0]])}
    x = SOURCES.pack(parts)
    assert x.tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0]]
    assert all(torch.equal(SOURCES.unpack(x)[key], parts[key]) for key in parts)


def test_resid_pre_is_an_alias_of_the_layer_below() -> None:
    assert canonical_site("layers.6.resid_pre") == "layers.5.resid_post"
    assert Source("m", "layers.0.resid_pre", 4).key == "m/embed"


def test_sites_sort_in_the_order_of_the_forward_pass() -> None:
    sites = ["layers.1.attn_out", "layers.0.resid_post", "embed", "layers.0.mlp_out", "layers.10.attn_out"]
    expected = ["embed", "layers.0.mlp_out", "layers.0.resid_post", "layers.1.attn_out", "layers.10.attn_out"]
    assert sorted(sites, key=site_order) == expected


@pytest.mark.parametrize("site", ["layers.x.resid_post", "layers.01.mlp_in", "resid_post", "layers.1.post", ""])
def test_a_site_that_does_not_exist_is_refused(site: str) -> None:
    with pytest.raises(UnsupportedSite, match="layers.6.resid_post"):
        canonical_site(site)


def test_missing_unknown_and_misshapen_sources_are_all_named() -> None:
    with pytest.raises(SourceMismatch) as caught:
        SOURCES.pack({BASE.key: torch.zeros(1, 7), "chat/embed": torch.zeros(1, 3)})
    text = str(caught.value)
    assert "missing  chat/layers.3.resid_post" in text
    assert "unknown  chat/embed" in text
    assert "expected 2, got 7" in text


def test_an_alias_resolves_when_it_has_one_source() -> None:
    assert SOURCES.resolve("chat") == CHAT
    two = SourceSet([BASE, Source("base", "embed", 2)])
    with pytest.raises(UnknownSource, match="2 sources"):
        two.resolve("base")
    with pytest.raises(UnknownSource, match=r"Did you mean base/layers\.3\.resid_post"):
        SOURCES.resolve("base/layers.3.resid_pos")


def test_an_alias_cannot_be_a_path() -> None:
    with pytest.raises(UnknownSource, match="alias"):
        Source("../base", "embed", 2)


def test_latent_ids_run_through_the_groups_and_the_mask_says_what_cannot_be_written() -> None:
    groups = [LatentGroup("shared", 2, SOURCES.keys, SOURCES.keys), LatentGroup("own", 1, (CHAT.key,), (CHAT.key,))]
    wiring = Wiring(SOURCES, groups)
    assert wiring.latent_ranges == ((0, 2), (2, 3))
    assert wiring.writes_mask.tolist() == [[True, True], [True, True], [False, True]]


def test_an_sae_is_the_crosscoder_of_one_source() -> None:
    assert sae(BASE, num_latents=4) == acausal(SourceSet([BASE]), num_latents=4)


def test_contradictions_are_refused() -> None:
    with pytest.raises(WiringError, match="not there"):
        Wiring(SOURCES, [LatentGroup("g", 1, ("base/embed",), (BASE.key,))])
    with pytest.raises(WiringError, match="order of the sources"):
        Wiring(SOURCES, [LatentGroup("g", 1, (CHAT.key, BASE.key), (BASE.key,))])
    with pytest.raises(WiringError, match="equal widths"):
        Wiring(SOURCES, [LatentGroup("g", 1, SOURCES.keys, SOURCES.keys, tied="decoder")])
    with pytest.raises(WiringError, match="names to differ"):
        Wiring(SOURCES, [LatentGroup("g", 1, SOURCES.keys, SOURCES.keys)] * 2)
    with pytest.raises(WiringError, match="1 <= k <= 3"):
        LatentGroup("g", 3, SOURCES.keys, SOURCES.keys, k=4)
