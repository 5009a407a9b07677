"""Is it right, on the trained weights: what the first update kept, its gradients, and whether two runs are bit-equal.

The set is held against a dense float32 selection by flat `topk`; pairs that differ must be ties, so what is given is
how far their float64 scores are from the cut. Gradients are held against float64 autograd of the dense loss on the set
that was kept: `‖g − g₆₄‖ / ‖g₆₄‖`, for every parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from step_contenders import CHECKED, OURS, PER_ROW, OurStep
from step_data import Start, pool, start
from step_dense import DenseModel, DenseStep, FirstUpdate
from step_worker import Task
from torch import Tensor

from crosscoder.kernels.reference import batch_top_k_mask, top_k_mask

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's. The step size is so small that weights alone would hardly tell two runs apart."""
STEPS = 3
"""Updates after which two runs are compared."""


def check(task: Task) -> dict[str, Any]:
    """The checks of one contender."""
    torch.set_num_threads(task.threads)
    x, begin = pool(task.folder)[0], start(task.size, task.folder, dead=task.dead)
    inexact = task.contender not in CHECKED
    contender = DenseStep(begin, autocast=True) if inexact else CHECKED[task.contender](begin)
    update = contender.first_update(x)
    del contender
    found = compare(begin, x, update, per_row=task.contender in PER_ROW)
    if task.contender in OURS:
        found["bit_equal"] = bit_equal(task)
    return found


def compare(begin: Start, x: Tensor, update: FirstUpdate, *, per_row: bool) -> dict[str, Any]:
    """Differing pairs, their largest relative distance from the cut, and the relative error of every gradient."""
    expected, cut = dense_selection(begin, x, per_row=per_row)
    model = DenseModel(begin, dtype=torch.float64)
    rows = model.normalised(x)
    pre = model.pre_activations(rows)
    differs = expected != update.kept
    distance = ((pre.detach() * model.gate) / cut - 1).abs()[differs]
    model.loss(rows, torch.addmm(model.bias, pre * update.kept, model.decoder)).backward()
    exact = model.gradients()
    return {
        "kept": int(update.kept.sum()),
        "differing": int(differs.sum()),
        "largest_distance": float(distance.max()) if len(distance) else 0.0,
        "gradient_errors": {name: relative_error(update.gradients[name], g) for name, g in exact.items()},
    }


@torch.no_grad()
def dense_selection(begin: Start, x: Tensor, *, per_row: bool) -> tuple[Tensor, Tensor]:
    """The pairs that a dense float32 step keeps, and the lowest score kept: of each row, or of the batch."""
    model = DenseModel(begin)
    score = model.pre_activations(model.normalised(x)) * model.gate
    mask = (top_k_mask if per_row else batch_top_k_mask)(score, begin.size.k)
    lowest = score.masked_fill(~mask, torch.inf)
    return mask, lowest.amin(1, keepdim=True) if per_row else lowest.min()


def relative_error(found: Tensor, exact: Tensor) -> float:
    """`‖g − g₆₄‖ / ‖g₆₄‖`."""
    return float((found.double() - exact).norm() / exact.norm())


def bit_equal(task: Task) -> bool:
    """Whether two trainers that see the same batches have the same weights and moments to the last bit."""
    first, second = (_state_after(task) for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _state_after(task: Task) -> list[Tensor]:
    contender = OurStep(start(task.size, task.folder, dead=task.dead), OURS[task.contender])
    for x in pool(task.folder)[:STEPS]:
        contender.step(x)
    trainer = contender.trainer
    parameters = list(trainer.crosscoder.parameters())
    moments = [trainer.optimiser.state[parameter][name] for parameter in parameters for name in MOMENTS]
    return [tensor.detach().clone() for tensor in (*parameters, *moments)]
