"""`editing`: while its block runs, the models run as the edits say.

What an edit is, `edits.py` says; which tokens it acts on, `selections.py`; where the code comes from, `codes.py`. Here
they meet the hooks: at every edited source `x_s' = x_s + Σ_j (f'_j − f_j) d_j^s` on the tokens that are selected, in
the wider dtype of model and crosscoder, rounded once to the model's. Tokens that no row was of (BOS, padding) are never
edited, and where no edit acts the tensor goes on as it came.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakSet

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from crosscoder.capture.models import Forward, StudiedModel
from crosscoder.capture.positions import padded_positions
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import EditError, EmptySelection
from crosscoder.interventions.codes import Reads, check_models
from crosscoder.interventions.edits import Edit
from crosscoder.interventions.prompts import Prompts
from crosscoder.interventions.selections import SeenTokens
from crosscoder.sources import Source

_under_edit: WeakSet[nn.Module] = WeakSet()
"""Models that a block of `editing` concerns: two blocks at once would not see each other's partners as clean."""


@dataclass
class MetTokens:
    """Which edits have met a token, in one block of `editing` after another."""

    num_forwards: int = 0
    edits: set[Edit] = field(default_factory=set[Edit])

    def missed(self, edits: Sequence[Edit]) -> list[Edit]:
        """The edits that change something and met no token, though models ran."""
        return [edit for edit in edits if self.num_forwards and not edit.is_identity and edit not in self.edits]


@contextmanager
def editing(
    crosscoder: Crosscoder,
    models: Mapping[str, StudiedModel],
    edits: Sequence[Edit],
    *,
    prompts: Prompts | None = None,
    never: Sequence[int] = (),
    met: MetTokens | None = None,
) -> Iterator[None]:
    """While the block runs, `read`, `logits` and `generate` of every edited model honour the edits.

    `models` maps aliases to all models of the crosscoder's sources. `prompts` are what the texts of every batch begin
    with: selections by role, prompt or reply need them, and tokens that they do not keep are not edited. `never` lists
    ids of tokens that are not edited anywhere. Gradients flow through edits to activations, not to the crosscoder.

    Raises UnknownLatent, EditError where models or sources or prompts do not fit or inside another such block over the
    same models, NotCalibrated as `encode` does, and EmptySelection on leaving, when models ran and an edit met no
    token. With `met`, which edits met a token is noted there instead: of several blocks the caller judges together.
    """
    check_models(crosscoder, models)
    effective = [(edit, edit.edited_sources(crosscoder)) for edit in edits]
    effective = [(edit, sources) for edit, sources in effective if not edit.is_identity]
    aliases = dict.fromkeys(source.model for _, sources in effective for source in sources)
    shared = _Shared(prompts, tuple(never), MetTokens() if met is None else met)
    with ExitStack() as stack:
        stack.enter_context(_fixed(crosscoder))
        if effective:
            stack.enter_context(_alone([models[alias].model for alias in crosscoder.sources.underlying.models]))
        for alias in aliases:
            stack.enter_context(_Session(crosscoder, models, effective, alias=alias, shared=shared).in_force())
        yield
    if met is None:
        refuse_unused(shared.met.missed(edits))


@dataclass
class _Shared:
    """What the sessions of all models know together."""

    prompts: Prompts | None
    never: tuple[int, ...]
    met: MetTokens
    nested: bool = False
    """Whether a forward pass is under way that edits have started: nothing is edited in it."""


class _Session:
    """The edits of one model, in one forward pass after another."""

    def __init__(
        self,
        crosscoder: Crosscoder,
        models: Mapping[str, StudiedModel],
        edits: Sequence[tuple[Edit, Sequence[Source]]],
        *,
        alias: str,
        shared: _Shared,
    ) -> None:
        self._model, self._shared = models[alias], shared
        keys = dict.fromkeys(source.key for _, sources in edits for source in sources if source.model == alias)
        at = {key: [edit for edit, sources in edits if key in [source.key for source in sources]] for key in keys}
        self._changes = {key: _Change(crosscoder, key, found) for key, found in at.items()}
        own = [edit for edit, _ in edits if any(edit in found for found in at.values())]
        self._reads = Reads(crosscoder, models, own, running=alias)
        self._forward: Forward | None = None

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Hooks for as long as the block runs."""
        with ExitStack() as stack:
            stack.enter_context(self._model.before_forward(self._begin))
            for key in dict.fromkeys([*self._reads.running_keys, *self._changes]):
                site = key.partition("/")[2]
                stack.enter_context(self._model.replace(site, partial(self._at, key)))
            yield

    def _begin(self, forward: Forward) -> None:
        shared = self._shared
        if shared.nested:
            return
        _check_batch(shared.prompts, forward)
        self._forward = forward
        shared.met.num_forwards += 1
        shared.nested = True
        try:
            self._reads.begin(forward)
        finally:
            shared.nested = False

    def _at(self, key: str, x: Tensor, position_ids: Tensor) -> Tensor:
        if self._shared.nested:
            return x
        if key in self._reads.running_keys:
            self._reads.note(key, x)
        return self._edited(self._changes[key], x) if key in self._changes else x

    def _edited(self, change: _Change, x: Tensor) -> Tensor:
        masks = self._masks(change.edits)
        where = torch.stack(masks).any(0)
        if not where.any():
            return x
        f = self._reads.code(where, change.latents) if change.reads_code else None
        moved = change.difference(f, [mask[where] for mask in masks])
        place = where.to(x.device)
        new = x.clone()
        new[place] = (x[place] + moved.to(x.device)).to(x.dtype)
        return new

    def _masks(self, edits: Sequence[Edit]) -> list[Bool[Tensor, "batch positions"]]:
        forward, prompts = self._forward, self._shared.prompts
        assert forward is not None, "every forward pass begins by saying so"
        position = _positions(forward)
        tokens = SeenTokens(position) if prompts is None else prompts.seen(position)
        editable = _editable(forward, self._shared.never)
        if prompts is not None:
            editable &= prompts.keeps(position)
        masks = [edit.tokens.mask(tokens) & editable for edit in edits]
        self._shared.met.edits |= {edit for edit, mask in zip(edits, masks, strict=True) if bool(mask.any())}
        return masks


class _Change:
    """What some edits do at one source: `Σ_j (f'_j − f_j) d_j`."""

    def __init__(self, crosscoder: Crosscoder, key: str, edits: Sequence[Edit]) -> None:
        self.edits = list(edits)
        self.reads_code = any(edit.reads_code for edit in edits)
        latents = sorted({latent for edit in edits for latent in edit.latents})
        self.latents = torch.tensor(latents)
        self._columns = [torch.tensor([latents.index(latent) for latent in edit.latents]) for edit in edits]
        with torch.no_grad():
            self._rows = crosscoder.decoder_rows(key, "raw")[self.latents.to(crosscoder.mean.device)]

    def difference(
        self, f: Float[Tensor, "rows latents"] | None, masks: Sequence[Bool[Tensor, "rows"]]
    ) -> Float[Tensor, "rows width"]:
        """What is added to the rows; `f` is not needed where every edit only adds."""
        f = self._rows.new_zeros(len(masks[0]), len(self.latents)) if f is None else f
        changed = f
        for edit, columns, mask in zip(self.edits, self._columns, masks, strict=True):
            columns = columns.to(f.device)
            part = changed[:, columns]
            new = torch.where(mask.to(f.device)[:, None], edit.applied(part), part)
            changed = changed.index_copy(1, columns, new)
        return (changed - f) @ self._rows


def _positions(forward: Forward) -> Int[Tensor, "batch positions"]:
    """The position of every new token in its own text."""
    batch, length = forward.input_ids.shape
    if forward.attention_mask is not None:
        return padded_positions(forward.attention_mask)[:, -length:]
    start = forward.num_cached
    return torch.arange(start, start + length, device=forward.input_ids.device).expand(batch, length)


def _editable(forward: Forward, never: Sequence[int]) -> Bool[Tensor, "batch positions"]:
    """Which new tokens are tokens, and none of those that are never edited."""
    ids, mask = forward.input_ids, forward.attention_mask
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -ids.shape[1] :].bool()
    return real & ~torch.isin(ids, torch.tensor(never, dtype=ids.dtype, device=ids.device))


def _check_batch(prompts: Prompts | None, forward: Forward) -> None:
    if prompts is not None and len(prompts.ids) != len(forward.input_ids):
        raise EditError(
            f"a batch of {len(forward.input_ids)} texts runs, and edits were given {len(prompts.ids)} prompts.",
            hint="Give the prompts of this batch, in its order.",
        )
    if prompts is not None and forward.num_cached == 0:
        differs = prompts.differs(_positions(forward), forward.input_ids) & _editable(forward, ())
        texts = differs.any(1).nonzero().squeeze(1).tolist()
        if texts:
            raise EditError(
                f"{len(texts)} of {len(differs)} texts do not begin with the prompts that edits were given.",
                details=[f"text {text} in the batch" for text in texts[:5]],
                hint="Give the prompts of this batch, in its order.",
            )


@contextmanager
def _alone(models: Sequence[nn.Module]) -> Iterator[None]:
    """Raises EditError where one of the models is in a block of `editing` already."""
    if any(model in _under_edit for model in models):
        raise EditError(
            "these models are inside another `editing` block: each would take the other's edits for clean activations.",
            hint="Give all edits in one call: editing(crosscoder, models, [first, second, ...]).",
        )
    _under_edit.update(models)
    try:
        yield
    finally:
        for model in models:
            _under_edit.discard(model)


def refuse_unused(edits: Sequence[Edit]) -> None:
    """Raises EmptySelection where there are edits that met no token."""
    if edits:
        raise EmptySelection(
            f"{len(edits)} of the edits met no token: what they select was not in the texts.",
            details=[f"{edit.kind} of {len(edit.latents)} latents at {edit.tokens}" for edit in edits],
            hint="Select tokens that the texts have; BOS and padding are never edited.",
        )


@contextmanager
def _fixed(crosscoder: Crosscoder) -> Iterator[None]:
    """Eval mode and no gradients of its own, inside the block."""
    was_training = crosscoder.training
    learned = [parameter for parameter in crosscoder.parameters() if parameter.requires_grad]
    crosscoder.eval()
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        crosscoder.train(was_training)
        for parameter in learned:
            parameter.requires_grad_(True)
