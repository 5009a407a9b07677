"""The definition of a crosscoder, as masked full matrices in fp64: a second implementation for tests.

Shares no code with the package's arithmetic; reads a crosscoder's parameters, and only from there on goes its own way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crosscoder.crosscoder import Crosscoder
from crosscoder.nonlinearities import BatchTopK, JumpReLU, ReLU, TopK
from crosscoder.sources import Source, SourceSet
from crosscoder.wiring import (
    Wiring,
    acausal,
    combine,
    dedicated,
    designated_shared,
    local,
    mixed,
    per_source,
    pre_post_mlp,
    sae,
    strictly_causal,
    transcoder,
    weakly_causal,
)

WIDTH = 5
LAYERS = 3


def at(kind: str, *, models: tuple[str, ...] = ("base",), width: int = WIDTH) -> SourceSet:
    """The sources of one kind of site at every layer."""
    return SourceSet(Source(model, f"layers.{i}.{kind}", width) for i in range(LAYERS) for model in models)


PAIR = SourceSet([Source("base", "layers.1.resid_post", WIDTH), Source("chat", "layers.1.resid_post", WIDTH)])
UNLIKE = SourceSet([Source("base", "layers.1.resid_post", WIDTH), Source("chat", "layers.1.resid_post", 7)])
READ, WRITTEN = Source("base", "layers.0.mlp_in", WIDTH), Source("base", "layers.0.mlp_out", 4)


def family() -> dict[str, Wiring]:
    """Every constructor, and options of groups that no constructor combines so."""
    stream, mlp_in, mlp_out, attn = at("resid_post"), at("mlp_in"), at("mlp_out"), at("attn_out")
    return {
        "sae": sae(stream.sources[0], num_latents=14),
        "acausal": acausal(stream, num_latents=14),
        "transcoder with skip": transcoder(READ, WRITTEN, num_latents=14, skip=True),
        "per_source": per_source(stream, num_latents_per_source=6),
        "per_source, own k": per_source(stream, num_latents_per_source=6, k=1),
        "weakly_causal": weakly_causal(stream, num_latents_per_layer=6),
        "weakly_causal, two models": weakly_causal(at("resid_post", models=("base", "chat")), num_latents_per_layer=6),
        "weakly_causal, prefix": weakly_causal(stream, num_latents_per_layer=6, reads="prefix"),
        "strictly_causal": strictly_causal(mlp_in, mlp_out, num_latents_per_layer=6, skip=True),
        "strictly_causal, tied": strictly_causal(mlp_in, mlp_out, num_latents_per_layer=6, tied="decoder"),
        "mixed": mixed(mlp_in, mlp_out, attn, num_latents_per_layer=5),
        "local": local(stream, num_latents_per_layer=7, window=2),
        "pre_post_mlp": pre_post_mlp(Source("base", "layers.0.resid_mid", WIDTH), WRITTEN, num_latents=12),
        "designated_shared": designated_shared(PAIR, shared=6, free=9, penalty=1.0),
        "designated_shared, norms": designated_shared(UNLIKE, shared=6, free=9, penalty=1.0, tied="norm", k_shared=1),
        "dedicated": dedicated(UNLIKE, shared=9, exclusive={"base": 4, "chat": 5}, k_exclusive={"chat": 1}),
        "combined": combine(acausal(PAIR, num_latents=8), transcoder(READ, WRITTEN, num_latents=6).prefixed("mlp")),
    }


def penalised() -> Wiring:
    """Groups under unequal penalties, one of them tied."""
    return designated_shared(PAIR, shared=6, free=9, penalty=0.25)


def with_parameters(cc: Crosscoder, *, seed: int = 0) -> Crosscoder:
    """The crosscoder in fp64 with parameters, normaliser and thresholds that are not trivial."""
    cc = cc.double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in cc.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=g, dtype=torch.float64)
        mean = torch.randn(cc.sources.width, generator=g, dtype=torch.float64)
        cc.set_normaliser(mean, torch.linspace(0.5, 4, len(cc.sources), dtype=torch.float64))
        for i, weights in enumerate(cc.weights):
            weights.threshold.fill_(0.4 + 0.2 * i)
    cc.settle()
    return cc


def rows(cc: Crosscoder, n: int = 60, *, seed: int = 5) -> Tensor:
    """Raw rows over all sources."""
    return torch.randn(n, cc.sources.width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class Full:
    """A crosscoder as full matrices over packed columns of all sources, zero where a group has no weights."""

    encoder: Tensor
    decoder: Tensor
    skip: Tensor
    bias: Tensor
    norms: Tensor


def full(cc: Crosscoder) -> Full:
    """The full matrices of a crosscoder's parameters; differentiable in them."""
    of, width = cc.sources, cc.sources.width
    encoders, decoders = [], []
    skip = torch.zeros(width, width, dtype=torch.float64)
    for group, weights in zip(cc.wiring, cc.weights, strict=True):
        read, write = (list(of.columns(keys)) for keys in (group.reads, group.writes))
        zeros = torch.zeros(group.num_latents, width, dtype=torch.float64)
        rows = torch.cat([weights.decoder] * len(group.writes), 1) if group.tied == "decoder" else weights.decoder
        index = torch.arange(group.num_latents)[:, None]
        encoders.append(zeros.index_put((index, torch.tensor(read)[None]), weights.encoder))
        decoders.append(zeros.index_put((index, torch.tensor(write)[None]), rows))
        if group.skips:
            to = torch.tensor(list(of.columns(group.skips)))
            skip = skip.index_put((to[:, None], torch.tensor(read)[None]), weights.skip, accumulate=True)
    decoder = torch.cat(decoders)
    bias = torch.zeros(width, dtype=torch.float64)
    bias = bias.index_put((torch.tensor(list(of.columns(cc.writes.keys))),), cc.bias)
    norms = torch.stack([decoder[:, s].norm(dim=1) for s in of.slices.values()], 1)
    return Full(torch.cat(encoders), decoder, skip, bias, norms)


def code_norm(norms: Tensor, kind: str) -> Tensor:
    """The norm that scores are multiplied with, from its name."""
    made = {"sum": norms.sum(1), "concat": (norms**2).sum(1) ** 0.5, "max": norms.max(1).values}
    return made.get(kind, torch.ones(len(norms), dtype=norms.dtype))


def forward(cc: Crosscoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Values `f` (rows, latents) and raw reconstruction over the written sources, of raw rows over all sources."""
    w = full(cc)
    scale = torch.cat([cc.scale[i].expand(s.width) for i, s in enumerate(cc.sources)])
    normalised = (x - cc.mean) * scale
    pre = normalised @ w.encoder.T + torch.cat([g.encoder_bias for g in cc.weights])
    f = pre * _kept(cc, pre, w.norms)
    y = (f @ w.decoder + normalised @ w.skip.T + w.bias) / scale + cc.mean
    return f, y[:, list(cc.sources.columns(cc.writes.keys))]


def _kept(cc: Crosscoder, pre: Tensor, norms: Tensor) -> Tensor:
    kind = cc.nonlinearity
    if isinstance(kind, ReLU):
        return pre > 0
    if isinstance(kind, JumpReLU):
        return pre > torch.cat([g.log_threshold for g in cc.weights]).exp()
    score = (pre * code_norm(norms, kind.code_norm)).detach()
    if isinstance(kind, BatchTopK) and not cc.training:
        return score > torch.cat([g.threshold.expand(len(g.gate)) for g in cc.weights])
    kept = torch.zeros_like(pre, dtype=torch.bool)
    left = kind.k - sum(group.k or 0 for group in cc.wiring)
    pool = [r for r, g in zip(cc.wiring.latent_ranges, cc.wiring, strict=True) if g.k is None]
    own = [([r], g.k) for r, g in zip(cc.wiring.latent_ranges, cc.wiring, strict=True) if g.k is not None]
    for ranges, k in [*own, *([(pool, left)] if pool else [])]:
        latents = torch.cat([torch.arange(*r) for r in ranges])
        mine = score[:, latents]
        if isinstance(kind, TopK):
            cut = mine.sort(dim=1, descending=True).values[:, k - 1 : k]
        else:
            cut = mine.flatten().sort(descending=True).values[k * len(pre) - 1]
        kept[:, latents] = (mine >= cut) & (mine > 0)
    return kept
