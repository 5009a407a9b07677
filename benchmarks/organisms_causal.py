"""What happens to the planted behaviour when a method's latents are taken out of the organism, at the site they are of.

    latents           x' = x − Σ_{j chosen} f_j d_j              f_j from both models' activations, or their difference
    mean difference   x' = x − u uᵀ (x − x_plain)                u along the mean difference
    whole             x' = x_plain                               the most that edits of differences at this site can do

The organism generates greedily with a cache; `plain` reads the same tokens beside it. Side effect: mean KL(as it is ‖
edited) of next-token predictions on held-out books, in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from organisms_methods import Dictionary
from organisms_plants import PLANTS, Prompt
from organisms_rows import AFTER, BEFORE, SITE
from torch import Tensor
from transformers import DynamicCache

from crosscoder.capture.models import StudiedModel

NEW_TOKENS = 12
Edit = Callable[[Tensor, Tensor], Tensor]
"""`edit(x, x_plain) -> x'` on rows."""


def unchanged(x: Float[Tensor, "rows width"], before: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
    """No edit."""
    return x


def whole(x: Float[Tensor, "rows width"], before: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
    """The whole difference taken away."""
    return before


def without_direction(direction: Float[Tensor, "width"]) -> Edit:
    """The difference's part along a unit vector taken away."""
    return lambda x, before: x - ((x - before) @ direction)[:, None] * direction


def without_latents(trained: Dictionary, latents: Sequence[int]) -> Edit:
    """What some latents write to the organism taken away."""
    cc, chosen = trained.crosscoder, list(latents)
    decoder = cc.decoder_rows(cc.writes.keys[-1], space="raw").detach()[chosen]

    def edit(x: Tensor, before: Tensor) -> Tensor:
        packed = x - before if len(cc.sources) == 1 else torch.cat([before, x], dim=1)
        return x - cc.encode(packed).to_dense()[:, chosen] @ decoder

    return edit


@dataclass(frozen=True)
class Subject:
    """Both models, the prompts of a plant and its look-alikes, and unrelated text (contexts, positions)."""

    models: Mapping[str, StudiedModel]
    plant: str
    acting: Sequence[Prompt]
    unrelated: Int[Tensor, "contexts positions"]

    def effects(self, edits: Mapping[str, Edit]) -> dict[str, dict[str, float]]:
        """For every edit, how many prompts still show the plant, and what it does to unrelated text."""
        said = self.replies(list(edits.values()))
        found: dict[str, dict[str, float]] = {}
        for (name, edit), mine in zip(edits.items(), said, strict=True):
            shown = zip(mine, self.acting, strict=True)
            hits = sum(PLANTS[self.plant].shown(reply, prompt.exchange) for reply, prompt in shown)
            found[name] = {"hits": hits, "total": len(self.acting), "kl": self.kl(edit)}
        return found

    @torch.no_grad()
    def replies(self, edits: Sequence[Edit]) -> list[list[str]]:
        """Greedy replies under each edit; all edits run in one batch, prompt by prompt, edit by edit."""
        tokenizer = self.models[AFTER].tokenizer
        chats = [prompt.messages for prompt in self.acting]
        texts = [str(tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True)) for c in chats]
        batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        ids, mask = (part.repeat_interleave(len(edits), dim=0) for part in (batch.input_ids, batch.attention_mask))
        caches = {alias: DynamicCache() for alias in self.models}
        said: list[Tensor] = []
        for _ in range(NEW_TOKENS):
            ids = self._logits(ids, edits, mask=mask, caches=caches)[:, -1].argmax(1, keepdim=True)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            said.append(ids)
        end = tokenizer.convert_tokens_to_ids("<|end|>")
        rows = [str(tokenizer.decode(_before(row, end))).strip() for row in torch.cat(said, dim=1).tolist()]
        return [rows[number :: len(edits)] for number in range(len(edits))]

    @torch.no_grad()
    def kl(self, edit: Edit) -> float:
        """Mean KL(as it is ‖ edited) of next-token predictions on unrelated text, in nats."""
        clean, edited = self._unedited, self._logits(self.unrelated, [edit]).float().log_softmax(-1)
        return float((clean.exp() * (clean - edited)).sum(-1).mean())

    @cached_property
    @torch.no_grad()
    def _unedited(self) -> Float[Tensor, "contexts positions vocabulary"]:
        """Log-probabilities on unrelated text without an edit."""
        return self._logits(self.unrelated, [unchanged]).float().log_softmax(-1)

    def _logits(
        self,
        ids: Tensor,
        edits: Sequence[Edit],
        *,
        mask: Tensor | None = None,
        caches: Mapping[str, DynamicCache] | None = None,
    ) -> Tensor:
        """The organism's logits, with caches at the last position alone; row r has edit r modulo their number."""
        organism, plain = self.models[AFTER], self.models[BEFORE]
        cache = None if caches is None else caches[BEFORE]
        before = plain.read([SITE], ids, attention_mask=mask, past_key_values=cache)[SITE].float()

        def fn(x: Tensor, positions: Tensor) -> Tensor:
            new = x.float()
            for number, edit in enumerate(edits):
                rows = slice(number, None, len(edits))
                part = new[rows]
                new[rows] = edit(part.flatten(0, 1), before[rows].flatten(0, 1)).view_as(part)
            return new

        given: dict[str, Any] = {}
        if caches is not None and mask is not None:
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            given = {"attention_mask": mask, "position_ids": places, "past_key_values": caches[AFTER]}
            given |= {"use_cache": True, "logits_to_keep": 1}
        with organism.replace(SITE, fn):
            return cast(Any, organism.model)(input_ids=ids, **given).logits


def _before(ids: list[int], end: int | list[int]) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def matched_random(trained: Dictionary, latents: Sequence[int], *, seed: int) -> list[int]:
    """As many other live latents, each of nearly the density and strength of one of these: a control of chance."""
    energy = _energy(trained)
    generator = torch.Generator().manual_seed(seed)
    free = [j for j in energy.nonzero().squeeze(1).tolist() if j not in set(latents)]
    chosen: list[int] = []
    for latent in latents:
        near = sorted(free, key=lambda j: abs(float(energy[j].log() - energy[latent].log())))[:8]
        pick = near[int(torch.randint(len(near), (1,), generator=generator))]
        chosen.append(pick)
        free.remove(pick)
    return chosen


def _energy(trained: Dictionary) -> Float[Tensor, "latents"]:
    code, cc = trained.code, trained.crosscoder
    squares = torch.zeros(code.num_latents, dtype=torch.float64)
    squares.index_add_(0, code.latents, code.values.detach().double() ** 2)
    return squares * cc.decoder_rows(cc.writes.keys[-1], space="raw").detach().double().square().sum(1)
