"""The training step and loop: gradients of AuxK, dead counts, schedules, resuming, and what stops a run."""

from __future__ import annotations

from copy import deepcopy
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crosscoder.activations import Batch
from crosscoder.activity import Activity
from crosscoder.codes import SparseCode
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import (
    ConfigError,
    FileFormatError,
    NonFiniteActivations,
    RunConflict,
    SourceMismatch,
    TextError,
    TrainingDiverged,
)
from crosscoder.files import read_tensors
from crosscoder.kernels import candidates
from crosscoder.nonlinearities import BatchTopK, Nonlinearity, ReLU, TopK
from crosscoder.sources import SourceSet
from crosscoder.training import checkpoint, losses, normaliser, schedules
from crosscoder.training.clipped_adam import ClippedAdam
from crosscoder.training.config import AuxConfig, L1Sparsity, LossesConfig, NoSparsity, TrainConfig
from crosscoder.training.dead import DeadLatents
from crosscoder.training.trainer import StepResult, Trainer
from crosscoder.wiring import LatentGroup, Wiring, acausal
from training.worlds import SOURCES, ToyWorld


def config(steps: int = 60, **changes: object) -> TrainConfig:
    return TrainConfig(**{"num_tokens": 128 * steps, "batch_size": 128, "learning_rate": 3e-3, **changes})  # pyright: ignore


def trainer(kind: Nonlinearity | None = None, *, seed: int = 0, steps: int = 60, **changes: object) -> Trainer:
    cc = Crosscoder(acausal(SOURCES, num_latents=48), kind or BatchTopK(6), seed=seed)
    fitted = normaliser.fit(SOURCES, (b.x for b in islice(ToyWorld().batches(500), 6)))
    cc.set_normaliser(fitted.mean.float(), fitted.scale.float())
    return Trainer(cc, config(steps, **changes), losses=LossesConfig(aux=AuxConfig(dead_after_tokens=640)))


class StopAt:
    """Interrupts the loop after a given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if trainer.step_number == self.step:
            raise KeyboardInterrupt


def everything(trainer: Trainer) -> dict[str, Tensor]:
    named = dict(trainer.crosscoder.state_dict())
    for name, parameter in trainer.crosscoder.named_parameters():
        named |= {f"{name}.{k}": v for k, v in trainer.optimiser.state[parameter].items()}
    return named | {"dead": trainer.dead.rows_since_fired}


def test_the_loss_falls_and_the_reconstruction_is_good() -> None:
    t = trainer(steps=400)
    t.run(ToyWorld())
    x = ToyWorld().rows(2000, 10**6)
    t.crosscoder.eval()
    with torch.no_grad():
        error = (t.crosscoder(x) - x).square().sum() / (x - x.mean(0)).square().sum()
        assert float(error) < 0.25
        assert abs(t.crosscoder.encode(x).l0 - 6) < 0.3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_resuming_equals_never_having_stopped_bit_for_bit(seed: int, tmp_path: Path) -> None:
    stop = int(torch.randint(5, 55, (), generator=torch.Generator().manual_seed(seed)))
    whole = trainer(seed=seed)
    whole.run(ToyWorld(seed=seed))
    first, world = trainer(seed=seed), ToyWorld(seed=seed)
    with pytest.raises(KeyboardInterrupt):
        first.run(world, [StopAt(stop)])
    checkpoint.save(first, tmp_path, stream=world.state_dict())
    second, again = trainer(seed=seed + 17), ToyWorld(seed=seed)
    again.load_state_dict(checkpoint.restore(second, checkpoint.found(tmp_path)[-1]))
    assert second.step_number == stop
    second.run(again)
    expected = everything(whole)
    for name, tensor in everything(second).items():
        assert torch.equal(tensor, expected[name]), name


def test_auxk_reaches_dead_encoders_and_decoders_and_nothing_else() -> None:
    cc = Crosscoder(
        Wiring(SOURCES, [LatentGroup("all", 20, SOURCES.keys, SOURCES.keys),
                         LatentGroup("chat", 8, SOURCES.keys[1:], SOURCES.keys[1:])]), TopK(3)).double()  # fmt: skip
    x = torch.randn(60, 24, dtype=torch.float64)
    error = x - cc.decode_normalised(cc.encode_normalised(x))
    dead = torch.tensor([2, 5, 21, 27])
    auxiliary = losses.auxiliary(cc, x, error, dead=dead, k_aux=2)
    auxiliary.loss.backward()
    auxiliary.add_gradients()
    assert cc.bias.grad is None
    for weights, own in zip(cc.weights, ([2, 5], [1, 7]), strict=True):
        for parameter in (weights.encoder, weights.decoder, weights.encoder_bias):
            assert parameter.grad is not None
            touched = parameter.grad.reshape(parameter.shape[0], -1).abs().sum(1).nonzero().squeeze(1).tolist()
            assert touched == own


def test_auxk_by_definition_in_one_group() -> None:
    cc = Crosscoder(acausal(SOURCES, num_latents=12), TopK(2)).double()
    x, error = torch.randn(30, 24, dtype=torch.float64), torch.randn(30, 24, dtype=torch.float64)
    dead = torch.tensor([0, 3, 4, 9])
    pre = x @ cc.weights[0].encoder[dead].T
    score = pre * cc.decoder_norms()[dead].sum(1)
    f = torch.relu(pre) * (score >= score.topk(2, dim=1).values[:, -1:])
    expected = (error - f @ cc.weights[0].decoder[dead]).square().sum(1).mean()
    torch.testing.assert_close(losses.auxiliary(cc, x, error, dead=dead, k_aux=2).loss, expected)


def test_auxk_shares_its_latents_among_groups() -> None:
    """The k_aux largest scores of a row over all groups, as in one group with the same weights."""
    blocks = [LatentGroup(name, 6, SOURCES.keys, SOURCES.keys) for name in "ab"]
    cc = Crosscoder(Wiring(SOURCES, blocks), TopK(2)).double()
    one = Crosscoder(acausal(SOURCES, num_latents=12), TopK(2)).double()
    with torch.no_grad():
        for name in ("encoder", "decoder"):
            getattr(one.weights[0], name).copy_(torch.cat([getattr(w, name) for w in cc.weights]))
    one.settle()
    x, error = torch.randn(30, 24, dtype=torch.float64), torch.randn(30, 24, dtype=torch.float64)
    dead = torch.tensor([0, 3, 4, 7, 9, 11])
    found, expected = (losses.auxiliary(c, x, error, dead=dead, k_aux=2).loss for c in (cc, one))
    torch.testing.assert_close(found, expected)


def test_an_empty_batch_is_called_one() -> None:
    with pytest.raises(TextError, match="an empty batch"):
        trainer().step(torch.zeros(0, SOURCES.width))


def test_auxk_alone_moves_dead_latents_and_lets_them_explain_the_error() -> None:
    def train(coefficient: float) -> tuple[Tensor, Tensor, float]:
        cc = Crosscoder(acausal(SOURCES, num_latents=64), TopK(3))
        with torch.no_grad():
            cc.weights[0].decoder[:32] *= 1e-3  # a gate far below all others: never selected
        cc.refresh_gate()
        before = cc.weights[0].encoder[:32].detach().clone()
        t = Trainer(cc, config(150), losses=LossesConfig(aux=AuxConfig(coefficient=coefficient, dead_after_tokens=1)))
        t.run(ToyWorld())
        x = cc.normalise(ToyWorld().rows(500, 7))
        with torch.no_grad():
            error = x - cc.decode_normalised(cc.encode_normalised(x))
            aux = losses.auxiliary(cc, x, error, dead=torch.arange(32), k_aux=6).loss
            left = aux / error.square().sum(1).mean()
        return before, cc.weights[0].encoder[:32].detach(), float(left)

    before, after, left = train(0.0)
    assert torch.equal(before, after)
    assert left > 0.99
    before, after, left = train(0.5)
    assert not torch.equal(before, after)
    assert left < 0.9


def test_l1_of_norms_by_hand() -> None:
    cc = Crosscoder(acausal(SOURCES, num_latents=2), ReLU())
    with torch.no_grad():
        cc.weights[0].decoder.zero_()
        cc.weights[0].decoder[0, 0], cc.weights[0].decoder[0, 10] = 3.0, 4.0
        cc.weights[0].decoder[1, 1] = 2.0
    activity = Activity([torch.zeros(2, 20)], [SparseCode.from_dense(torch.tensor([[1.0, 0.0], [2.0, 5.0]]))])
    found = losses.sparsity(activity, cc, L1Sparsity(coefficient=9.0), coefficient=0.5)
    assert found.item() == 0.5 * (1 * 7 + 2 * 7 + 5 * 2) / 2


def test_dead_latents_are_counted_in_rows_and_take_turns() -> None:
    dead = DeadLatents(4, after_rows=5)
    code = SparseCode.from_dense(torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 1.0]]))
    dead.update(Activity([torch.zeros(3, 2)], [code]))
    assert dead.rows_since_fired.tolist() == [3, 0, 3, 0]
    dead.update(Activity([torch.zeros(3, 2)], [code]))
    assert dead.ids.tolist() == [0, 2]
    assert [dead.taking_turns(step, at_most=1).tolist() for step in range(3)] == [[0], [2], [0]]


@pytest.mark.parametrize("count", [0, 1, 3, 7, 40])
def test_the_dead_take_the_same_turns_where_nobody_waits_for_the_device(count: int) -> None:
    dead = DeadLatents(40, after_rows=5)
    dead.rows_since_fired[torch.randperm(40, generator=torch.Generator().manual_seed(count))[:count]] = 9
    for step in range(8):
        chosen, among = dead.without_waiting(step, at_most=3)
        assert chosen.shape == (3,)
        assert torch.equal(chosen[among], dead.taking_turns(step, at_most=3))


def test_auxk_of_the_dead_among_others_is_that_of_the_dead() -> None:
    cc = trainer().crosscoder
    x = cc.normalise(next(ToyWorld().batches(30)).x)
    error = torch.randn(30, cc.writes.width)
    some, among = torch.tensor([3, 9, 20, 31]), torch.tensor([True, False, True, False])
    found: list[list[Tensor]] = []
    for dead, mask in ((some[among], None), (some, among)):
        auxiliary = losses.auxiliary(cc, x, error, dead=dead, k_aux=2, among=mask)
        cc.zero_grad()
        auxiliary.loss.backward()
        auxiliary.add_gradients()
        grads = [p.grad for p in cc.parameters() if p.grad is not None]
        found.append([auxiliary.loss.detach(), *grads])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    none = losses.auxiliary(cc, x, error, dead=some, k_aux=2, among=torch.zeros(4, dtype=torch.bool))
    assert none.loss.item() == 0.0


def test_schedules_by_hand() -> None:
    at = [schedules.learning_rate_factor(s, num_steps=10, warmup_steps=2, decay_steps=4) for s in range(10)]
    assert at == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [schedules.annealed_k(s, k=4, start=10, num_steps=3) for s in range(5)] == [10, 8, 6, 4, 4]
    assert [schedules.ramp(s, num_steps=4) for s in (0, 1, 4, 9)] == [0, 0.25, 1, 1]


def test_the_normaliser_gives_every_source_the_mean_width_as_energy() -> None:
    x = torch.randn(5000, 24, dtype=torch.float64) * torch.linspace(0.1, 9, 24).double() + 7
    fitted = normaliser.fit(SOURCES, x.split(313))
    torch.testing.assert_close(fitted.mean, x.mean(0))
    for i, part in enumerate(SOURCES.unpack((x - fitted.mean) * 1.0).values()):
        torch.testing.assert_close((part * fitted.scale[i]).square().sum(1).mean(), torch.tensor(12.0).double())


def test_a_constant_source_cannot_be_normalised() -> None:
    with pytest.raises(TextError, match="cannot normalise"):
        normaliser.fit(SOURCES, [torch.ones(10, 24)])


@pytest.mark.parametrize("kind", [ReLU(), TopK(4), BatchTopK(4)], ids=lambda k: k.kind)
@pytest.mark.parametrize("sparsity", [NoSparsity(), L1Sparsity(coefficient=0.5)], ids=lambda s: s.kind)
@pytest.mark.parametrize("aux", [0.0, 0.1])
@pytest.mark.parametrize("groups", ["acausal", "blocks"])
def test_every_combination_trains_twenty_steps(
    kind: Nonlinearity, sparsity: NoSparsity | L1Sparsity, aux: float, groups: str
) -> None:
    blocks = [LatentGroup("a", 20, SOURCES.keys, SOURCES.keys), LatentGroup("b", 12, SOURCES.keys[:1], SOURCES.keys)]
    wiring = acausal(SOURCES, num_latents=32) if groups == "acausal" else Wiring(SOURCES, blocks)
    extra = LossesConfig(aux=AuxConfig(coefficient=aux, dead_after_tokens=256))
    if sparsity.kind != "none" and not isinstance(kind, ReLU):
        with pytest.raises(ConfigError, match="expected none"):
            Trainer(Crosscoder(wiring, kind), config(20), sparsity=sparsity, losses=extra)
        return
    t = Trainer(Crosscoder(wiring, kind), config(20), sparsity=sparsity, losses=extra)
    seen = [t.step(b.x) for b in islice(ToyWorld().batches(128), 20)]
    assert float(seen[-1].loss) < float(seen[0].loss)
    if isinstance(kind, BatchTopK):
        assert all(r.code.num_active == 4 * 128 for r in seen)


def test_activations_that_are_not_numbers_stop_the_run_and_name_the_source() -> None:
    class Broken(ToyWorld):
        def rows(self, n: int, number: int) -> Tensor:
            x = super().rows(n, number)
            if number == 3:
                x[4, 15] = float("nan")
            return x

    with pytest.raises(NonFiniteActivations, match="chat/embed  1 of 128 rows"):
        trainer().run(Broken())


def test_a_diverging_loss_stops_the_run() -> None:
    with pytest.raises(TrainingDiverged, match="learning rate"):
        trainer(learning_rate=1e6).run(ToyWorld())


def test_activations_in_another_order_are_refused() -> None:
    with pytest.raises(SourceMismatch, match="in another order"):
        trainer().run(ToyWorld(SourceSet(reversed(SOURCES.sources))))


def test_a_step_that_is_not_finite_leaves_the_weights_as_they_were() -> None:
    t = trainer()
    before = t.crosscoder.weights[0].encoder.detach().clone()
    with pytest.raises(TrainingDiverged):
        t.step(torch.full((16, 24), 1e30))
    assert torch.equal(t.crosscoder.weights[0].encoder, before)


def test_batches_smaller_than_the_share_of_auxk_are_fine() -> None:
    t = trainer()
    t.dead.rows_since_fired.fill_(10**6)
    losses_seen = [float(t.step(ToyWorld().rows(2, n)).loss) for n in range(5)]
    assert all(loss == loss for loss in losses_seen)


def test_checkpoints_of_other_models_are_refused(tmp_path: Path) -> None:
    t = trainer()
    t.crosscoder.provenance = {"models": {"base": {"weights": "a"}}}
    t.step(next(ToyWorld().batches(128)).x)
    found = checkpoint.save(t, tmp_path, stream={})
    other = trainer()
    other.crosscoder.provenance = {"models": {"base": {"weights": "b"}}}
    with pytest.raises(RunConflict, match="models have changed"):
        checkpoint.restore(other, found)


def test_a_checkpoint_without_its_marker_is_none_and_only_two_are_kept(tmp_path: Path) -> None:
    t = trainer()
    for batch in islice(ToyWorld().batches(128), 4):
        t.step(batch.x)
        checkpoint.save(t, tmp_path, stream={})
    assert [c.step for c in checkpoint.found(tmp_path)] == [3, 4]
    (tmp_path / "step-4" / "complete").unlink()
    assert [c.step for c in checkpoint.found(tmp_path)] == [3]


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    t = trainer()
    t.step(next(ToyWorld().batches(128)).x)
    path = checkpoint.save(t, tmp_path, stream={}).path / "shard-0-of-1.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FileFormatError, match="whole safetensors"):
        checkpoint.restore(trainer(), checkpoint.found(tmp_path)[-1])


def test_steps_leave_no_trace_of_being_measured() -> None:
    from crosscoder.training.validation import validate

    quiet, watched = trainer(), trainer()
    for batch in islice(ToyWorld().batches(128), 12):
        quiet.step(batch.x)
        watched.step(batch.x)
        validate(watched.crosscoder, [Batch(ToyWorld().rows(50, 99))])
    for name, tensor in everything(quiet).items():
        assert torch.equal(tensor, everything(watched)[name]), name


def test_checkpoint_tensors_are_plain_safetensors(tmp_path: Path) -> None:
    t = trainer()
    t.step(next(ToyWorld().batches(128)).x)
    saved = checkpoint.save(t, tmp_path, stream={}).path
    names = read_tensors(saved / "shard-0-of-1.safetensors", thing="checkpoint")
    assert "crosscoder.groups.all.encoder" in names
    assert "optimiser.groups.0.encoder.exp_avg" in names


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", [TopK(4), ReLU()], ids=lambda k: k.kind)
def test_micro_batches_add_up_to_the_step_of_the_whole_batch(kind: Nonlinearity, dropout: float) -> None:
    penalty = L1Sparsity(coefficient=0.1) if isinstance(kind, ReLU) else None
    no_aux = LossesConfig(aux=AuxConfig(coefficient=0.0), source_dropout=dropout)
    found: list[dict[str, Tensor]] = []
    for micro_batches in (1, 3):
        cc = Crosscoder(acausal(SOURCES, num_latents=40), kind).double()
        t = Trainer(cc, config(20, micro_batches=micro_batches), sparsity=penalty, losses=no_aux)
        g = torch.Generator().manual_seed(0)
        results = [t.step(torch.randn(70, cc.sources.width, generator=g, dtype=torch.float64)) for _ in range(5)]
        terms = {"loss": results[-1].loss, "norm": results[-1].gradient_norm, "errors": results[-1].source_errors}
        found.append(dict(cc.named_parameters()) | terms | {"code": results[-1].code.to_dense()})
        assert results[-1].num_rows == 70 and int(results[-1].num_active) == results[-1].code.num_active
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=1e-6, atol=1e-8)


def test_batch_top_k_selects_within_each_micro_batch() -> None:
    cc = Crosscoder(acausal(SOURCES, num_latents=40), BatchTopK(2))
    x = torch.randn(60, cc.sources.width) * torch.linspace(0.1, 5, 60)[:, None]
    result = Trainer(cc, config(20, micro_batches=3)).step(x)
    assert [int(activity.num_active) for activity in result.activities] == [40, 40, 40]


def test_the_fused_clip_equals_clipping_and_then_adam() -> None:
    """Against `clip_grad_norm_` and an Adam of its own, over steps that are clipped and steps that are not."""
    cc = Crosscoder(acausal(SOURCES, num_latents=12), TopK(3))
    twin = deepcopy(cc)
    mine = ClippedAdam(cc, learning_rate=1e-2, clip=1.0)
    theirs = torch.optim.Adam(twin.parameters(), lr=1e-2)
    for step in range(6):
        for a, b in zip(cc.parameters(), twin.parameters(), strict=True):
            a.grad = torch.randn_like(a) * (0.001 if step % 2 else 10.0)
            b.grad = a.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        theirs.step()
        torch.testing.assert_close(mine.norm(), norm)
        mine.update(norm, loss=norm, learning_rate=1e-2)
        assert all(p.grad is None for p in cc.parameters())
    for a, b in zip(cc.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_step_selects_once_when_training_has_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut that is too high, or a rounded encoder that is out of date, would not be wrong but slow."""
    t = trainer(BatchTopK(6), precision="mixed")
    batches = ToyWorld().batches(128)
    for batch in islice(batches, 20):
        t.step(batch.x)
    found: list[object] = []
    above = candidates.above
    monkeypatch.setattr(candidates, "above", lambda *args, **limit: found.append(above(*args, **limit)) or found[-1])
    for batch in islice(batches, 30):
        t.step(batch.x)
    assert 30 <= len(found) <= 36
