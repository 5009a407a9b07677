"""Dead and dense latents, in one place."""

from __future__ import annotations

import torch

from crosscoder.activations import Batch
from crosscoder.analysis.statistics import LatentStatistics, density_flags
from crosscoder.codes import SparseCode

from .worlds import random_crosscoder


def test_flags_by_hand() -> None:
    """A share of exactly the cut is not dense."""
    found = density_flags(torch.tensor([0.0, 0.1, 0.3, 0.2, 0.05]), cut=0.1)
    assert found.dead.tolist() == [True, False, False, False, False]
    assert found.dense_latents.tolist() == [2, 3]
    assert found.to_json()["num_dense"] == 2 and found.to_json()["num_dead"] == 1
    assert abs(found.to_json()["share_of_active_pairs_dense"] - 0.5 / 0.65) < 1e-6
    assert density_flags(torch.zeros(2)).to_json()["share_of_active_pairs_dense"] is None


def test_the_statistics_say_who_is_dense() -> None:
    """The table's flags are those of the density beside them."""
    cc = random_crosscoder(num_latents=4)
    f = torch.zeros(20, 4)
    f[0, 0], f[:3, 2] = 1, 1
    statistics = LatentStatistics(4)
    statistics.update(Batch(torch.zeros(20, 12)), SparseCode.from_dense(f))
    table = statistics.table(cc)
    assert table["dense"].to_pylist() == [False, False, True, False]
    assert table["dead"].to_pylist() == [False, True, False, True]
    assert density_flags(statistics.density).table()["dense"].to_pylist() == table["dense"].to_pylist()
