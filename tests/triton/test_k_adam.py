"""The optimiser pass under the interpreter against Adam in fp64, written here."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from crosscoder.kernels.triton.adam import Scalars, adam, scalars


@dataclass
class State:
    """A parameter and its moments."""

    param: Tensor
    m: Tensor
    v: Tensor

    @classmethod
    def of(cls, param: Tensor) -> State:
        return cls(param.clone(), torch.zeros_like(param), torch.zeros_like(param))

    def update(
        self, grad: Tensor, packed: Scalars, *, copy: Tensor | None = None, widths: tuple[int, ...] | None = None
    ):
        return adam(self.param, grad, exp_avg=self.m, exp_avg_sq=self.v, scalars=packed, copy=copy, widths=widths)


def reference(state: State, grad: Tensor, *, step: int, divisor: float, learning_rate: float) -> None:
    grad = grad.double() / divisor
    state.m = 0.9 * state.m + 0.1 * grad
    state.v = 0.999 * state.v + 0.001 * grad**2
    m, v = state.m / (1 - 0.9**step), state.v / (1 - 0.999**step)
    state.param = state.param - learning_rate * m / (v.sqrt() + 1e-8)


@pytest.mark.parametrize(
    ("shape", "widths"),
    [((7, 30), (10, 20)), ((3, 2500), (1500, 1000)), ((5, 16), (16,)), ((13,), None), ((8192,), None), ((4, 6), None)],
)
def test_equals_adam_in_double_precision(shape: tuple[int, ...], widths: tuple[int, ...] | None) -> None:
    g = torch.Generator().manual_seed(0)
    own = State.of(torch.randn(shape, generator=g))
    exact = State.of(own.param.double())
    copy = torch.empty(shape, dtype=torch.bfloat16)
    step = torch.zeros((), dtype=torch.int64)
    for number, scale in enumerate([1.0, 300.0, 0.0, 1e-3], start=1):
        grad = scale * torch.randn(shape, generator=g)
        norm = grad.norm()
        packed = scalars(step, norm=norm, max_norm=1.0, learning_rate=1e-2 / number)
        squares = own.update(grad, packed, copy=copy, widths=widths)
        divisor = max(1.0, (float(norm) + 1e-6) / 1.0)
        reference(exact, grad, step=number, divisor=divisor, learning_rate=1e-2 / number)
        torch.testing.assert_close(own.param.double(), exact.param, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(own.m.double(), exact.m, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(own.v.double(), exact.v, rtol=1e-5, atol=1e-10)
        assert torch.equal(copy, own.param.bfloat16()), "rounded to nearest even"
        assert (squares is None) == (widths is None)
        if squares is not None and widths is not None:
            parts = [part.pow(2).sum(1) for part in own.param.split(widths, dim=1)]
            torch.testing.assert_close(squares, torch.stack(parts, dim=1), rtol=1e-5, atol=1e-6)
    assert step == 4


def test_equals_the_fused_optimiser_of_torch() -> None:
    g = torch.Generator().manual_seed(1)
    theirs = torch.nn.Parameter(torch.randn(6, 40, generator=g))
    optimiser = torch.optim.Adam([theirs], lr=3e-3, fused=True)
    own, step = State.of(theirs.detach()), torch.zeros((), dtype=torch.int64)
    for _ in range(5):
        theirs.grad = torch.randn(6, 40, generator=g)
        own_grad = theirs.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_([theirs], 2.0)
        optimiser.step()
        own.update(own_grad, scalars(step, norm=norm, max_norm=2.0, learning_rate=3e-3))
    torch.testing.assert_close(own.param, theirs.detach(), rtol=1e-6, atol=1e-7)


def test_the_copy_rounds_ties_to_even() -> None:
    halves = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0, 1 + 2**-8 + 2**-20]])
    own, copy = State.of(halves), torch.empty(1, 5, dtype=torch.bfloat16)
    step = torch.zeros((), dtype=torch.int64)
    packed = scalars(step, norm=torch.zeros(()), max_norm=1.0, learning_rate=0.1)
    own.update(torch.zeros(1, 5), packed, copy=copy)
    assert copy.tolist() == [[1.0, 1 + 2**-6, -1.0, 0.0, 1 + 2**-7]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_norm_that_is_not_finite_changes_nothing(bad: float) -> None:
    own, step = State.of(torch.ones(3, 8)), torch.zeros((), dtype=torch.int64)
    own.update(torch.ones(3, 8), scalars(step, norm=torch.tensor(5.0), max_norm=1.0, learning_rate=0.1))
    before = State(own.param.clone(), own.m.clone(), own.v.clone())
    grad = torch.full((3, 8), bad)
    packed = scalars(step, norm=grad.norm(), max_norm=1.0, learning_rate=0.1)
    copy = torch.zeros(3, 8, dtype=torch.bfloat16)
    squares = own.update(grad, packed, copy=copy, widths=(3, 5))
    assert step == 1
    assert torch.equal(own.param, before.param) and torch.equal(own.m, before.m) and torch.equal(own.v, before.v)
    assert torch.equal(copy, own.param.bfloat16()), "what follows from the weights is written all the same"
    assert squares is not None
    torch.testing.assert_close(squares, torch.stack([part.pow(2).sum(1) for part in own.param.split((3, 5), 1)], 1))


def test_unlike_layouts_are_refused() -> None:
    own = State.of(torch.ones(3, 8))
    packed = scalars(torch.zeros((), dtype=torch.int64), norm=torch.ones(()), max_norm=1.0, learning_rate=0.1)
    with pytest.raises(AssertionError, match="alike"):
        own.update(torch.ones(8, 3).T, packed)
    with pytest.raises(AssertionError, match="make up"):
        own.update(torch.ones(3, 8), packed, widths=(3, 4))
