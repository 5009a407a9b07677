"""The files of the ckkissane layout, as on its Hub: `cc_weights.pt` and `cfg.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from crosscoder import files
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import FileFormatError
from crosscoder.interop.ckkissane import SCALES_KEY
from crosscoder.interop.dense import Dense
from crosscoder.nonlinearities import ReLU


@torch.no_grad()
def write(crosscoder: Crosscoder, weights: Dense, directory: Path) -> list[str]:
    """Write both files; gives what they do not say."""
    if not isinstance(crosscoder.nonlinearity, ReLU):
        raise FileFormatError(
            f"the layout ckkissane computes ReLU; this crosscoder has {crosscoder.nonlinearity.kind}.",
            hint="Use --to dictionary_learning (layout='dictionary_learning') for BatchTopK.",
        )
    shift = weights.mean.double() * weights.scale.double()[:, None]
    tensors = {
        "W_enc": weights.encoder,
        "W_dec": weights.decoder,
        "b_enc": weights.encoder_bias - torch.einsum("sdn,sd->n", weights.encoder.double(), shift),
        "b_dec": weights.bias + shift,
    }
    torch.save({name: value.float().contiguous() for name, value in tensors.items()}, directory / "cc_weights.pt")
    files.write_json(directory / "cfg.json", _settings(crosscoder, weights))
    remarks = [f"multiply activations by {weights.scale.tolist()} first: written as {SCALES_KEY}, which others ignore"]
    if len(crosscoder.sources) != 2:
        remarks.append(f"{len(crosscoder.sources)} sources: the tool's own class has 2 written into it")
    return remarks


def _settings(crosscoder: Crosscoder, weights: Dense) -> dict[str, Any]:
    """All that the tool's constructor reads, and the scales."""
    sources = crosscoder.sources
    path = crosscoder.provenance.get("models", {}).get(sources.models[0], {}).get("path")
    sites = {source.site for source in sources}
    settings: dict[str, Any] = {
        "dict_size": crosscoder.num_latents,
        "d_in": sources.widths[0],
        "enc_dtype": "fp32",
        "seed": 0,
        "dec_init_norm": 0.08,
        "device": "cpu",
        "model_name": Path(str(path or sources.models[0])).name,
        SCALES_KEY: weights.scale.tolist(),
        "sources": list(sources.keys),
    }
    return settings | ({"hook_point": _hook(sites.pop())} if len(sites) == 1 else {})


def _hook(site: str) -> str:
    """The site by its TransformerLens name."""
    if site == "embed":
        return "blocks.0.hook_resid_pre"
    _, layer, kind = site.split(".")
    return f"blocks.{layer}.ln2.hook_normalized" if kind == "mlp_in" else f"blocks.{layer}.hook_{kind}"
