"""An encoded prompt as a page: its tokens coloured by one latent after another, and every token with its latents.

Self-contained, and safe by construction (`markup`): no script, no address, every piece of text escaped.
"""

from __future__ import annotations

from collections.abc import Sequence

from crosscoder.activations import ROLES
from crosscoder.analysis.latent_cards import highlighted, percent
from crosscoder.analysis.markup import page, plain, section, table, visible
from crosscoder.analysis.prompt_facts import EncodedPrompts

MOST_PROMPTS = 40
"""Prompts on one page; more would be slow to open."""


def prompt_page(encoded: EncodedPrompts, *, title: str, num_latents: int = 6, per_token: int = 4) -> str:
    """The page; of each prompt the `num_latents` with the largest scores are shown, or those of `encoded.only`."""
    shown = range(min(MOST_PROMPTS, encoded.code.num_prompts))
    sections = "".join(_prompt(encoded, prompt, num_latents, per_token) for prompt in shown)
    left = encoded.code.num_prompts - len(shown)
    more = f'<p class="note">{left:,} more prompts are not on this page.</p>' if left else ""
    head = (
        f'<header class="top"><p class="kicker">crosscoder encode</p><h1>{plain(title)}</h1>'
        f'<p class="lead">{_lead(encoded)}</p>{_pair(encoded)}</header>'
    )
    return page(f"{title}: latents", f"{head}<main>{sections}{more}</main>")


def _lead(encoded: EncodedPrompts) -> str:
    text = encoded.code.text
    how = "in the chat template" if text.rendering == "chat" else "as they stand"
    many, code = "s" * (text.num_prompts != 1), encoded.code.code
    return (
        f"{text.num_prompts:,} prompt{many}, read {how}: {code.num_rows:,} tokens encoded, {code.l0:.1f} latents "
        "active on each. The darker a token, the larger the value there, next to the prompt's largest. Hover for it."
    )


def _pair(encoded: EncodedPrompts) -> str:
    classes = encoded.facts.classes
    if classes is None:
        return ""
    return (
        f'<dl class="facts"><dt>a</dt><dd class="side-a"><code>{plain(classes.a)}</code></dd>'
        f'<dt>b</dt><dd class="side-b"><code>{plain(classes.b)}</code></dd>'
        "<dt>relative norm</dt><dd>0: the latent writes a alone; ½: both alike; 1: b alone</dd></dl>"
    )


def _prompt(encoded: EncodedPrompts, prompt: int, num_latents: int, per_token: int) -> str:
    entries = encoded.of_prompt(prompt, len(encoded.only) or num_latents)
    cards = "".join(_card(encoded, prompt, entry) for entry in entries)
    silent = "" if entries else '<p class="note">None of these latents is active here.</p>'
    tokens = f"<details><summary>Every token and its latents</summary>{_tokens(encoded, prompt, per_token)}</details>"
    return section(f"Prompt {prompt + 1}", cards, silent, tokens, identity=f"prompt-{prompt + 1}")


def _card(encoded: EncodedPrompts, prompt: int, entry: int) -> str:
    told = encoded.entry(entry)
    code = encoded.code
    by_row = code.values_of(told["latent"])
    rows = [int(code.row_of_token[token]) for token in code.text.span(prompt)]
    values = [None if row < 0 else float(by_row[row]) for row in rows]
    pieces = [code.text.pieces[token] for token in code.text.span(prompt)]
    text = highlighted(pieces, values, peak=told["peak_position"], top=told["max"])
    return (
        f'<article class="{_side(told.get("relative_norm"))}"><header><h3>Latent {told["latent"]}</h3>'
        f'<span class="facts">{_facts(told)}</span></header><p class="text">{text}</p></article>'
    )


def _facts(told: dict[str, float | None]) -> str:
    facts = [f"largest value {told['max']:.3g}", f"on {told['num_tokens']} token{'s' * (told['num_tokens'] != 1)}"]
    share, ratio, norm = told["share_of_max"], told["relative_to_mean"], told.get("relative_norm")
    facts += [] if share is None else [f"{share:.0%} of its maximum"]
    facts += [] if ratio is None else [f"{ratio:.1f} × its mean"]
    facts += [] if norm is None else [f"relative norm {norm:.2f}"]
    density = told.get("density")
    facts += [] if density is None else [f"active on {percent(density)} of the analysis set"]
    return " · ".join(facts)


def _side(relative_norm: float | None) -> str:
    if relative_norm is None or 0.4 <= relative_norm <= 0.6:
        return "shared"
    return "a" if relative_norm < 0.4 else "b"


def _tokens(encoded: EncodedPrompts, prompt: int, num: int) -> str:
    text = encoded.code.text
    rows: list[Sequence[str]] = []
    for position, token in enumerate(text.span(prompt)):
        row = int(encoded.code.row_of_token[token])
        active = [] if row < 0 else encoded.on_token(row, num)
        latents = ", ".join(f"{latent} ({value:.3g})" for latent, value in active)
        role = ROLES[int(text.contexts.roles[token])]
        told = latents if row >= 0 else "not read"
        rows.append((str(position), f"<code>{visible(text.pieces[token])}</code>", plain(role), told))
    return table(("position", "token", "role", "latents (values)"), rows)
