"""Logit lens: the next tokens that a latent's decoder row speaks for, at one source.

The decoder row `d` (raw space) is read as a residual-stream vector of unit root mean square and sent through the
model's own final norm and head, `u(d)`. What it promotes is the odd part

    ½ (u(d) − u(−d))

which removes the biases of a LayerNorm and of the head; for an RMS norm without bias it is `u(d)` itself. Later layers
are skipped, so this is a hint about meaning and no measurement of an effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoder.analysis.tokens import token_pieces
from crosscoder.capture.huggingface import Tokenizer
from crosscoder.capture.models import StudiedModel
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import UnsupportedSite

_BLOCK = 64
"""Latents at once: bounds the (latents × vocabulary) logits."""


@dataclass(frozen=True)
class LogitLens:
    """The most promoted tokens of some latents at `source`, strongest first; `weight` is the promoted logit."""

    source: str
    latents: tuple[int, ...]
    token_ids: Int[Tensor, "latents tokens"]
    weight: Float[Tensor, "latents tokens"]

    def pieces(self, tokenizer: Tokenizer) -> dict[int, list[str]]:
        """The tokens as text, by latent."""
        ids = self.token_ids.tolist()
        text = token_pieces(tokenizer, (token for row in ids for token in row))
        return {latent: [text[token] for token in row] for latent, row in zip(self.latents, ids, strict=True)}

    def table(self, tokenizer: Tokenizer) -> pa.Table:
        """One row per latent."""
        pieces = self.pieces(tokenizer)
        return pa.table(
            {
                "latent": pa.array(self.latents, pa.int32()),
                "source": pa.array([self.source] * len(self.latents)),
                "token_ids": pa.array(self.token_ids.tolist(), pa.list_(pa.int32())),
                "pieces": pa.array([pieces[latent] for latent in self.latents], pa.list_(pa.string())),
                "weight": pa.array(self.weight.tolist(), pa.list_(pa.float32())),
            }
        )


@torch.no_grad()
def logit_lens(
    crosscoder: Crosscoder, model: StudiedModel, *, source: str, latents: Sequence[int], num_tokens: int = 10
) -> LogitLens:
    """The tokens that `latents` promote at `source`, a site in the residual stream of `model` or added to it."""
    key = crosscoder.writes.resolve(source).key
    if key.endswith(".mlp_in"):
        raise UnsupportedSite(
            f"{key} is not in the residual stream, so its directions do not reach the head.",
            hint="Use a source at resid_mid, resid_post, attn_out or mlp_out.",
        )
    rows = crosscoder.decoder_rows(key, "raw")[list(latents)]
    found = [promoted(model, part).topk(num_tokens, dim=1) for part in rows.split(_BLOCK)]
    return LogitLens(
        source=key,
        latents=tuple(latents),
        token_ids=torch.cat([top.indices for top in found]).cpu(),
        weight=torch.cat([top.values for top in found]).cpu(),
    )


@torch.no_grad()
def promoted(model: StudiedModel, rows: Float[Tensor, "rows width"]) -> Float[Tensor, "rows vocabulary"]:
    """What directions of any length promote: the odd part of the logits at unit root mean square."""
    directions = rows / rows.square().mean(1, keepdim=True).sqrt().clamp(min=torch.finfo(rows.dtype).tiny)
    return (model.unembed(directions).float() - model.unembed(-directions).float()) / 2
