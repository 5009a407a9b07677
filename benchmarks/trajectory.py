"""Whether training with the sparse kernels is training: 500 steps of the demo pair beside a dense reference.

Both start from the same weights and see the same batches. The reference is the definition in torch operations: every
pre-activation in fp32, the mask of `kernels/reference.py` by a sort, full matrices, gradients by autograd,
`clip_grad_norm_` and plain Adam. Reported: the largest relative gap of the losses (means over 25 steps), where it is,
and the FVE of both on rows that neither trained on.

    python benchmarks/trajectory.py [--steps 500] [--json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from step_data import Start
from step_dense import DenseModel
from step_sizes import Size
from torch import Tensor

from crosscoder.crosscoder import Crosscoder
from crosscoder.demo.run import run_config
from crosscoder.kernels import reference
from crosscoder.training import normaliser
from crosscoder.training.run import Study
from crosscoder.training.trainer import Trainer

SMOOTHED_OVER = 25
HELD_OUT = 16
"""Batches after those of training, which FVE is measured on."""


@dataclass(frozen=True)
class Comparison:
    """What came out of it."""

    steps: int
    largest_gap: float
    largest_gap_at: int
    fve: float
    fve_reference: float
    seconds: float
    seconds_reference: float


class Reference:
    """The training step by definition."""

    def __init__(self, crosscoder: Crosscoder, trainer: Trainer) -> None:
        weights, sources = crosscoder.weights[0], crosscoder.sources
        size = Size("demo", len(sources), sources.widths[0], crosscoder.num_latents, trainer.config.batch_size,
                    trainer.k or 0, training_steps=0)  # fmt: skip
        tensors = {name: getattr(weights, name).detach() for name in ("encoder", "encoder_bias", "decoder")}
        tensors |= {"bias": crosscoder.bias.detach(), "mean": crosscoder.mean, "scale": crosscoder.scale}
        self.model = DenseModel(Start(size, tensors, torch.zeros(0, dtype=torch.int64)))
        self.model.dead_after = trainer.dead.after_rows
        self._adam = torch.optim.Adam(self.model.parameters.values())

    def step(self, x: Tensor, learning_rate: float) -> float:
        """One update; gives the loss before it."""
        model = self.model
        x = model.normalised(x)
        pre = model.pre_activations(x)
        kept = reference.batch_top_k_mask(pre.detach() * model.gate, model.size.k)
        loss = model.loss(x, reference.decode(pre * kept, model.decoder) + model.bias)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters.values(), 1.0)
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        self._adam.zero_grad()
        model.refresh_gate()
        model.count(kept.any(0), len(x))
        return float(loss.detach())

    def as_crosscoder(self, like: Crosscoder) -> Crosscoder:
        """A crosscoder with the reference's weights."""
        made = Crosscoder(like.wiring, like.nonlinearity, seed=None)
        made.set_normaliser(like.mean, like.scale)
        with torch.no_grad():
            for name in ("encoder", "encoder_bias", "decoder"):
                getattr(made.weights[0], name).copy_(self.model.parameters[name])
            made.bias.copy_(self.model.bias)
        made.settle()
        return made


@torch.no_grad()
def fve(crosscoder: Crosscoder, batches: list[Tensor]) -> float:
    """1 − Σ error / Σ variance about the mean, in normalised space, selecting over each batch."""
    crosscoder.train()
    x = [crosscoder.normalise(batch) for batch in batches]
    errors = sum(float((part - crosscoder.decode_normalised(crosscoder.encode_normalised(part))).square().sum())
                 for part in x)  # fmt: skip
    return 1 - errors / float((torch.cat(x) - torch.cat(x).mean(0)).square().sum())


def compare(steps: int) -> Comparison:
    """Train both and compare."""
    with tempfile.TemporaryDirectory() as folder:
        study = Study.open(run_config(Path(folder)))
        batch_size = study.run.train.batch_size
        batches = [b.x for b in islice(study.stream(study.corpus).batches(batch_size), steps + HELD_OUT)]
    crosscoder = study.new_crosscoder()
    fitted = normaliser.fit(crosscoder.sources, batches[:200])
    crosscoder.set_normaliser(fitted.mean.float(), fitted.scale.float())
    config = study.run.train.model_copy(update={"num_tokens": steps * batch_size, "warmup_steps": None})
    trainer = Trainer(crosscoder, config, losses=study.run.losses)
    other = Reference(crosscoder, trainer)
    mine: list[float] = []
    theirs: list[float] = []
    seconds = [0.0, 0.0]
    for x in batches[:steps]:
        rate, start = trainer.learning_rate, time.perf_counter()
        mine.append(float(trainer.step(x).loss))
        middle = time.perf_counter()
        theirs.append(other.step(x, rate))
        seconds = [seconds[0] + middle - start, seconds[1] + time.perf_counter() - middle]
    smooth = [torch.tensor(values).unfold(0, SMOOTHED_OVER, 1).mean(1) for values in (mine, theirs)]
    gaps = (smooth[0] / smooth[1] - 1).abs()
    held_out = batches[steps:]
    found = [fve(cc, held_out) for cc in (crosscoder, other.as_crosscoder(crosscoder))]
    return Comparison(steps, float(gaps.max()), int(gaps.argmax()), *found, *seconds)


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description="Losses of 500 steps beside a dense reference.")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = compare(arguments.steps)
    if arguments.json:
        print(json.dumps(asdict(found)))
        return
    print(f"{found.steps} steps of the demo pair, losses as means over {SMOOTHED_OVER} steps")
    print(f"largest relative gap   {found.largest_gap:.2%} at step {found.largest_gap_at}")
    print(f"FVE on held-out rows   {found.fve:.4f}, reference {found.fve_reference:.4f}")
    print(f"time of all steps      {found.seconds:.0f} s, reference {found.seconds_reference:.0f} s")


if __name__ == "__main__":
    main()
