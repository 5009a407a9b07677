"""Reading and rewriting one tensor inside a running forward pass, by plain forward hooks.

Modules give a Tensor or a tuple that starts with one; whatever comes is given back in kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from crosscoder.capture.architectures import BoundTap

Rewrite = Callable[[Tensor], Tensor]


def watch(tap: BoundTap, see: Callable[[Tensor], None]) -> RemovableHandle:
    """Calls `see` with the tensor at `tap` in every forward, until the handle is removed."""
    if tap.shared:
        return _register_shared(tap.module, see)
    if tap.side == "input":
        return tap.module.register_forward_pre_hook(lambda _, args, kwargs: see(_input(args, kwargs)), with_kwargs=True)
    return tap.module.register_forward_hook(lambda _module, _args, output: see(_first(output)))


def rewrite(tap: BoundTap, fn: Rewrite) -> RemovableHandle:
    """Replaces the tensor at `tap` by `fn` of it in every forward, until the handle is removed."""
    if tap.shared:
        return watch(tap, lambda x: _write_into(x, fn))
    if tap.side == "input":
        change = partial(_new_input, fn=fn)
        return tap.module.register_forward_pre_hook(lambda _, args, kwargs: change(args, kwargs), with_kwargs=True)
    return tap.module.register_forward_hook(lambda _module, _args, output: _new_output(output, fn))


@dataclass(frozen=True)
class _SharedHook:
    """A pre-hook on a tensor that is the residual stream as well as the module's input."""

    see: Callable[[Tensor], None]

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.see(_input(args, kwargs))


def _register_shared(module: nn.Module, see: Callable[[Tensor], None]) -> RemovableHandle:
    """The stream comes before what the module alone is given: OLMo 2 has resid_mid and mlp_in at one module's input."""
    handle = module.register_forward_pre_hook(_SharedHook(see), with_kwargs=True)
    hooks = module._forward_pre_hooks  # pyright: ignore[reportPrivateUsage] (torch has no other way to order hooks)
    for key in [key for key, hook in hooks.items() if not isinstance(hook, _SharedHook)]:
        hooks[key] = hooks.pop(key)
    return handle


def _write_into(x: Tensor, fn: Rewrite) -> None:
    """In place, because the residual branch holds this very tensor; `fn` sees a copy, which autograd may keep."""
    x.copy_(fn(x.clone()))


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _new_input(args: tuple[Any, ...], kwargs: dict[str, Any], fn: Rewrite) -> tuple[tuple[Any, ...], dict[str, Any]]:
    new = fn(_input(args, kwargs))
    return ((new, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": new})


def _first(output: Any) -> Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _new_output(output: Any, fn: Rewrite) -> Any:
    new = fn(_first(output))
    return new if isinstance(output, torch.Tensor) else (new, *output[1:])
