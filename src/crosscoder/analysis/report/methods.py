"""How every number of the report was computed: the part that a reviewer reads first."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from crosscoder.analysis.markup import plain, section

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "FVE": "1 − Σ‖x̃ − x̂̃‖² / Σ‖x̃ − mean‖², over all held-out rows, in normalised space.",
        "CE recovered": "(CE ablated − CE spliced) / (CE ablated − CE clean): one source at a time is replaced in the "
        "running model by its reconstruction (spliced), by zero or by its mean (ablated).",
        "relative norm": "½ ((‖d_b‖ − ‖d_a‖) / max(‖d_a‖, ‖d_b‖) + 1) of the latent's two decoder rows, in normalised "
        "space. A class is a cut through it, set by hand.",
        "ν error": "Latent scaling. β(y) is the least-squares factor of y on f·d along the side's own decoder row d. "
        "y is what is left of a model's activations when all other latents are taken away; ν is β of the other model "
        "over β of this one. Near 1, the other model has the concept too, and its small norm is shrinkage.",
        "ν reconstruction": "The same with y the model's reconstruction. Near 1, other latents write the concept in "
        "the other model: it was split in two (decoupling).",
        "interval of ν": "2.5 % and 97.5 % of a Poisson bootstrap over documents.",
        "specificity": "How far a latent is one side's alone, from 0 to 1. By norm: the relative norm seen from that "
        "side. By scaling: 1 − max(|ν error|, |ν reconstruction|), 0 where β of the error is below ½. Joint: the "
        "smaller of scaling and 2 · norm − 1.",
        "cut-off": "The specificity that all but a stated share of the latents of null crosscoders stay below. A null "
        "crosscoder is trained as this one was, on a made-up partner x_b := x_a + N(mean, covariance of x_b − x_a).",
        "false-exclusive share": "The share of latents beyond the cut-off in null crosscoders of other seeds than "
        "those that set it, with a one-sided 95 % upper bound.",
        "amplified, attenuated": "How much of the latent is in b over how much is in a, along either decoder row, "
        "as β of what the other latents leave times the norm. 1: unchanged; 2: twice as strong in b.",
        "source activity": "Each source in turn is set to its mean before encoding; the share of the latent's value "
        "that goes with it.",
        "causal effect": "The latent is taken out of the running model, x − f·d in raw space, on the contexts in which "
        "it is most active. KL is of the model's next-token distributions, clean against edited, in nats per token.",
        "KL patching": "x_a + Σ f (d_b − d_a) over a set of latents is fed to the rest of b; KL to b's predictions.",
        "promoted tokens": "The decoder row through the model's final norm and unembedding; later layers are skipped.",
        "AUROC of a label": "Chance that a token on which the behaviour acts scores higher than a look-alike of the "
        "same role, on documents that did not choose the latent.",
    }
)
"""What is measured, and how, in the report's own words."""


def methods() -> str:
    """The section, as a list of definitions."""
    items = "".join(f"<dt>{plain(name)}</dt><dd>{plain(how)}</dd>" for name, how in METHODS.items())
    return section("How the numbers were computed", f'<dl class="facts methods">{items}</dl>', identity="methods")
