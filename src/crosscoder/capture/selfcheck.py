"""Proves, on the model itself, that every site is where the table says.

On a dozen made-up tokens, in one forward pass:
  `embed` and `layers.l.resid_post` equal the model's own hidden states (all but the last, which is after the final
  norm); the branches add up: resid_pre + attn_out = resid_mid, resid_mid + mlp_out = resid_post (or the family's own
  equation); final norm and head of the last resid_post give the model's logits.
All values come from one forward, so each sum must hold to the last bit or two of the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from crosscoder.capture.architectures import Architecture
from crosscoder.capture.huggingface import PreTrainedModel
from crosscoder.capture.taps import watch
from crosscoder.errors import UnsupportedModel

_ULPS = 4


@torch.no_grad()
def check_sites(model: PreTrainedModel, architecture: Architecture) -> None:
    """Raises UnsupportedModel unless every site of `architecture` is where it should be in `model`."""
    seen, hidden = _run(model, architecture)
    wrong = [*_against_hidden_states(architecture, seen, hidden), *_sums(architecture, seen)]
    if wrong:
        raise UnsupportedModel(
            f"expected the sites of a {architecture.name} model in this {type(model).__name__}; some are elsewhere.",
            details=[*wrong[:6], f"{len(wrong)} checks failed in all"],
            hint="The installed transformers may be newer than this package knows: try another version of either.",
        )


@torch.no_grad()
def check_unembedding(model: PreTrainedModel, architecture: Architecture, unembed: Callable[[Tensor], Tensor]) -> None:
    """Raises UnsupportedModel unless `unembed` of the last residual stream gives the model's logits."""
    seen: list[Tensor] = []
    handle = watch(architecture.tap(architecture.sites()[-1]), lambda x: seen.append(x.clone()))
    try:
        logits = model(input_ids=_tokens(model)).logits
    finally:
        handle.remove()
    if not _close(unembed(seen[0]), logits, scale=logits.abs().amax(-1, keepdim=True)):
        raise UnsupportedModel(
            f"the final norm and head of this {type(model).__name__} do not give its logits.",
            hint="It scales or caps its logits in a way this package does not know: study another model.",
        )


def sees_no_later_token(model: PreTrainedModel, read: Callable[[Tensor], Tensor]) -> bool:
    """Whether changing the last token leaves `read(input_ids)` at all earlier positions as it was, to the last bit.

    A model that mixes positions by causal attention alone passes; where arithmetic alone makes a difference it is
    taken not to.
    """
    tokens = _tokens(model)[:1]
    changed = torch.cat([tokens[:, :-1], tokens[:, :1]], dim=1)
    return torch.equal(read(tokens)[:, :-1], read(changed)[:, :-1])


def _tokens(model: PreTrainedModel) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    return (torch.arange(12) * 37 + 5).remainder(min(vocabulary, 1000)).view(2, 6).to(model.device)


def _run(model: PreTrainedModel, architecture: Architecture) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for site in architecture.sites():
            handle = watch(architecture.tap(site), lambda x, site=site: seen.__setitem__(site, x.clone()))
            stack.callback(handle.remove)
        output: Any = model(input_ids=_tokens(model), output_hidden_states=True, return_dict=True)
    hidden = output.hidden_states
    missing = [site for site in architecture.sites() if site not in seen]
    if hidden is None or len(hidden) != architecture.num_layers + 1 or missing:
        raise UnsupportedModel(
            f"expected {architecture.num_layers + 1} hidden states and {len(architecture.sites())} sites of this "
            f"{architecture.name} model; got {0 if hidden is None else len(hidden)} and {len(seen)}.",
            hint="Its blocks do not run one after another, so its sites cannot be trusted: study another model.",
        )
    return seen, hidden


def _against_hidden_states(
    architecture: Architecture, seen: Mapping[str, Tensor], hidden: tuple[Tensor, ...]
) -> Iterator[str]:
    for layer in range(architecture.num_layers):
        site = "embed" if layer == 0 else f"layers.{layer - 1}.resid_post"
        if not _close(seen[site], hidden[layer], scale=hidden[layer].abs()):
            yield f"{site}  is not hidden state {layer}"


def _sums(architecture: Architecture, seen: Mapping[str, Tensor]) -> Iterator[str]:
    for layer in range(architecture.num_layers):
        pre = seen["embed" if layer == 0 else f"layers.{layer - 1}.resid_post"]
        here = {site.rpartition(".")[2]: x for site, x in seen.items() if site.startswith(f"layers.{layer}.")}
        for total, parts in _equations(architecture, layer, {"resid_pre": pre, **here}):
            if not _close(*parts, scale=here[total].abs() + pre.abs()):
                yield f"layers.{layer}.{total}  is not the sum of its parts"


def _equations(
    architecture: Architecture, layer: int, here: Mapping[str, Tensor]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """(name of the sum, (the sum recomputed, the sum seen)) for each equation of the family."""
    family = architecture.family
    if family.residual == "sequential":
        yield "resid_mid", (here["resid_pre"] + here["attn_out"], here["resid_mid"])
        yield "resid_post", (here["resid_mid"] + here["mlp_out"], here["resid_post"])
    if family.residual == "parallel":
        yield "resid_post", (here["mlp_out"] + here["attn_out"] + here["resid_pre"], here["resid_post"])
    if family.post_norms is not None:
        after_attention, after_mlp = (architecture.blocks[layer].get_submodule(path) for path in family.post_norms)
        yield "resid_mid", (after_attention(here["attn_out"] + here["resid_pre"]), here["resid_mid"])
        yield "resid_post", (after_mlp(here["mlp_out"] + here["resid_mid"]), here["resid_post"])


def _close(got: Tensor, expected: Tensor, *, scale: Tensor) -> bool:
    if got.shape != expected.shape:
        return False
    tolerance = _ULPS * torch.finfo(expected.dtype).eps * scale
    return bool(((got - expected.to(got.device)).abs() <= tolerance.to(got.device)).all())
