"""Whether training with the sparse kernels is training: 500 steps of the demo pair beside a dense reference.

Both start from the same weights and see the same batches. The reference is the definition in torch operations: every
pre-activation in fp32, the mask of `kernels/reference.py` by a sort, full matrices, gradients by autograd,
`clip_grad_norm_` and plain Adam. A *twin* of the reference starts from weights that differ in their last bit: training
is chaotic, and what two runs of one definition differ by is no fault of kernels. Reported: the largest relative gap of
the losses (means over 25 steps) to the reference, ours and the twin's, where it is, up to which step ours stays within
half a per cent, and the FVE of all on rows that none trained on.

    python benchmarks/trajectory.py [--steps 500] [--json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
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
class Gap:
    """How far smoothed losses lie from the reference's: at most, at which step, and from which step on over 0.5 %."""

    largest: float
    at: int
    over_from: int | None

    @classmethod
    def between(cls, losses: list[float], reference: list[float]) -> Gap:
        """Relative gaps of means over 25 steps."""
        smooth = [torch.tensor(values).unfold(0, SMOOTHED_OVER, 1).mean(1) for values in (losses, reference)]
        gaps = (smooth[0] / smooth[1] - 1).abs()
        over = (gaps > 0.005).nonzero().flatten().tolist()
        return cls(float(gaps.max()), int(gaps.argmax()), over[0] if over else None)


@dataclass(frozen=True)
class Comparison:
    """What came out of it."""

    steps: int
    gap: Gap
    gap_of_twin: Gap
    fve: float
    fve_reference: float
    fve_twin: float


class Reference:
    """The training step by definition."""

    def __init__(self, crosscoder: Crosscoder, trainer: Trainer, *, off_by: float = 0.0) -> None:
        weights, sources = crosscoder.weights[0], crosscoder.sources
        size = Size("demo", len(sources), sources.widths[0], crosscoder.num_latents, trainer.config.batch_size,
                    trainer.k or 0, training_steps=0)  # fmt: skip
        tensors = {name: getattr(weights, name).detach() for name in ("encoder", "encoder_bias", "decoder")}
        tensors |= {"bias": crosscoder.bias.detach(), "mean": crosscoder.mean, "scale": crosscoder.scale}
        self.model = DenseModel(Start(size, tensors, torch.zeros(0, dtype=torch.int64)))
        with torch.no_grad():
            encoder = self.model.encoder
            encoder.mul_(1 + off_by * torch.randn(encoder.shape, generator=torch.Generator().manual_seed(0)))
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
    others = [Reference(crosscoder, trainer), Reference(crosscoder, trainer, off_by=1e-7)]
    mine: list[float] = []
    theirs: list[list[float]] = [[], []]
    for x in batches[:steps]:
        rate = trainer.learning_rate
        mine.append(float(trainer.step(x).loss))
        for other, losses in zip(others, theirs, strict=True):
            losses.append(other.step(x, rate))
    found = [fve(cc, batches[steps:]) for cc in (crosscoder, *(other.as_crosscoder(crosscoder) for other in others))]
    return Comparison(steps, Gap.between(mine, theirs[0]), Gap.between(theirs[1], theirs[0]), *found)


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
    for name, gap in (("ours", found.gap), ("twin", found.gap_of_twin)):
        since = "never" if gap.over_from is None else f"first at step {gap.over_from}"
        print(f"{name}: largest gap to the reference {gap.largest:.2%} at step {gap.at}; over 0.5 % {since}")
    print(f"FVE on held-out rows: {found.fve:.4f}, reference {found.fve_reference:.4f}, twin {found.fve_twin:.4f}")


if __name__ == "__main__":
    main()
