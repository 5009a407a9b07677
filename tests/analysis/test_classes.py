"""Classes by relative norm: by hand, and against the definition written out again."""

from __future__ import annotations

import pytest
import torch

from crosscoder.analysis.classes import CLASSES, CutOffs, latent_classes, twins
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ConfigError, SourceMismatch
from crosscoder.nonlinearities import TopK
from crosscoder.sources import Source, SourceSet
from crosscoder.wiring import LatentGroup, Wiring, acausal

from .worlds import random_crosscoder


def crosscoder_with(rows_a: list[list[float]], rows_b: list[list[float]]) -> Crosscoder:
    """A crosscoder of sources a and b with these decoder rows in normalised space."""
    sources = SourceSet([Source("a", "embed", len(rows_a[0])), Source("b", "embed", len(rows_b[0]))])
    crosscoder = Crosscoder(acausal(sources, num_latents=len(rows_a)), TopK(1))
    with torch.no_grad():
        crosscoder.weights[0].decoder.copy_(torch.cat([torch.tensor(rows_a), torch.tensor(rows_b)], dim=1))
    crosscoder.refresh_gate()
    return crosscoder


def test_classes_by_hand() -> None:
    """Norms 1:0, 1:1, 0:1, 2:1 (relative norm .25), and one that never fires."""
    cc = crosscoder_with([[3, 4], [1, 0], [0, 0], [2, 0], [1, 0]], [[0, 0], [0, 1], [0, 2], [1, 0], [1, 0]])
    found = latent_classes(cc, a="a", b="b", density=torch.tensor([0.1, 0.1, 0.1, 0.1, 0.0]))
    assert [CLASSES[i] for i in found.class_ids.tolist()] == ["a-only", "shared", "b-only", "other", "dead"]
    assert found.relative_norm.tolist() == [0.0, 0.5, 1.0, 0.25, 0.5]
    assert found.norm_a.tolist() == [5.0, 1.0, 0.0, 2.0, 1.0]
    assert found.counts == {"a-only": 1, "shared": 1, "b-only": 1, "other": 1, "dead": 1, "elsewhere": 0}
    assert found.counts_by_wiring == {}
    assert found.cosine is not None and found.cosine.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert found.table().column("class").to_pylist() == ["a-only", "shared", "b-only", "other", "dead"]


def test_what_the_wiring_fixed_is_told_from_what_was_learned() -> None:
    """Latents with one decoder, of both or of a alone; tied ones; free ones; and ones that write neither."""
    a, b, c = (Source(name, "embed", 2) for name in "abc")
    sources = SourceSet([a, b, c])
    both = (a.key, b.key)
    groups = [
        LatentGroup("free", 2, sources.keys, both),
        LatentGroup("of-a", 3, (a.key,), (a.key, c.key)),
        LatentGroup("tied", 4, both, both, tied="decoder"),
        LatentGroup("of-c", 5, (c.key,), (c.key,)),
    ]
    cc = Crosscoder(Wiring(sources, groups), TopK(1))
    with torch.no_grad():
        cc.weights[0].decoder[0, 2:] = 0  # learned zero at b
    found = latent_classes(cc, a="a", b="b")
    names = [CLASSES[i] for i in found.class_ids.tolist()]
    assert names == ["a-only", "shared"] + ["a-only"] * 3 + ["shared"] * 4 + ["elsewhere"] * 5
    assert found.by_wiring.tolist() == [False] * 2 + [True] * 12
    assert found.counts_by_wiring == {"a-only": 3, "shared": 4, "elsewhere": 5}
    assert found.relative_norm[:9].tolist() == [0, 0.5, 0, 0, 0, 0.5, 0.5, 0.5, 0.5]
    assert bool(found.relative_norm[9:].isnan().all())
    assert found.learned("shared").tolist() == [1]
    assert found.cosine is not None
    assert found.cosine[2:5].isnan().all() and not found.cosine[:2].isnan().any()
    assert found.table()["cosine"].to_pylist()[2:5] == [None] * 3


def test_unequal_scales_do_not_move_the_classes() -> None:
    """Relative norms are of normalised space, whatever the normaliser, and however it is stored."""
    cc = crosscoder_with([[1, 0], [0, 2]], [[1, 0], [0, 1]])
    cc.set_normaliser(torch.zeros(4), torch.tensor([4.0, 40.0]))
    plain, folded = latent_classes(cc, a="a", b="b"), latent_classes(cc.folded(), a="a", b="b")
    assert plain.relative_norm.tolist() == [0.5, 0.25]
    torch.testing.assert_close(folded.relative_norm, plain.relative_norm)


def test_swapping_the_sources_mirrors_everything() -> None:
    """`relative_norm(b, a) = 1 − relative_norm(a, b)`."""
    rows = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    cc = crosscoder_with(rows[:, :2].tolist(), rows[:, 2:].tolist())
    forth, back = latent_classes(cc, a="a", b="b"), latent_classes(cc, a="b", b="a")
    torch.testing.assert_close(forth.relative_norm, 1 - back.relative_norm)
    assert forth.counts["a-only"] == back.counts["b-only"]


def test_no_cosine_between_spaces_of_different_width() -> None:
    """Unequal widths have classes but no angles, and no twins."""
    cc = crosscoder_with([[1, 0]], [[1, 0, 0]])
    assert latent_classes(cc, a="a", b="b").cosine is None
    with pytest.raises(SourceMismatch, match="equal widths"):
        twins(cc, a="a", b="b")


def test_other_published_cutoffs_cut_the_share() -> None:
    """A share of .04 is exclusive for Anthropic; a share of .1 only for DFC."""
    cc = crosscoder_with([[0.96, 0], [0.9, 0]], [[0.04, 0], [0.1, 0]])
    assert latent_classes(cc, a="a", b="b", cutoffs="anthropic").counts["a-only"] == 1
    assert latent_classes(cc, a="a", b="b", cutoffs="dfc").counts["a-only"] == 2
    own = CutOffs(0.01, (0.01, 0.99), 0.99)
    assert latent_classes(cc, a="a", b="b", cutoffs=own).counts["shared"] == 2
    with pytest.raises(ConfigError, match="no cut-offs are called 'mine'"):
        latent_classes(cc, a="a", b="b", cutoffs="mine")


def test_twins_by_hand() -> None:
    """Of two a-only and two b-only latents, one pair points the same way."""
    cc = crosscoder_with([[1, 0], [0, 1], [0, 0], [0, 0]], [[0, 0], [0, 0], [2, 0.1], [-1, 0]])
    found = twins(cc, a="a", b="b")
    assert (found.latents_a.tolist(), found.latents_b.tolist()) == ([0], [2])
    assert found.cosine.item() == pytest.approx(2 / (4.01**0.5))
    assert twins(cc, a="a", b="b", cosine=0.999).table().num_rows == 0


def test_the_same_source_twice_is_refused() -> None:
    """Comparing a source with itself is a slip of the pen."""
    cc = crosscoder_with([[1, 0]], [[1, 0]])
    with pytest.raises(SourceMismatch, match="two sources to compare"):
        latent_classes(cc, a="a", b="a/embed")


def test_without_exclusive_latents_there_are_no_twins() -> None:
    """Nothing to pair is an answer."""
    cc = random_crosscoder()
    everything_shared = CutOffs(-1.0, (0.0, 1.0), 2.0)
    assert len(twins(cc, a="base", b="chat", cutoffs=everything_shared).cosine) == 0
