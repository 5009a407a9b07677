"""What is known of latents beside a prompt, and the tables of an encoded prompt.

Scores, norms and classes come from the weights; the largest and mean value and the density on the analysis set from
`latents.parquet`, which is believed when its decoder norms are those of the crosscoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from crosscoder.activations import ROLES
from crosscoder.analysis.classes import CLASSES, LatentClasses, latent_classes
from crosscoder.analysis.prompts import PromptCode
from crosscoder.analysis.tables import read_table
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import FileFormatError

Ranking = Literal["max", "sum", "relative"]
RANKINGS: tuple[Ranking, ...] = ("max", "sum", "relative")


@dataclass(frozen=True)
class LatentFacts:
    """By latent: `scale` = Σ_s ‖d_i^s‖; statistics of the analysis set; classes between two sources; None if unknown.

    `mean_value` and `max_value` are over the rows on which the latent is active.
    """

    scale: Float[Tensor, "latents"]
    mean_value: Float[Tensor, "latents"] | None = None
    max_value: Float[Tensor, "latents"] | None = None
    density: Float[Tensor, "latents"] | None = None
    classes: LatentClasses | None = None

    def of(self, latent: int) -> dict[str, Any]:
        """What is known of one latent, as JSON values."""
        known: dict[str, Any] = {
            name: float(column[latent])
            for name in ("mean_value", "max_value", "density")
            if (column := getattr(self, name)) is not None
        }
        if self.classes is not None:
            norm = float(self.classes.relative_norm[latent])
            known["relative_norm"] = None if norm != norm else norm
            known["class"] = CLASSES[int(self.classes.class_ids[latent])]
        return known


@torch.no_grad()
def latent_facts(
    crosscoder: Crosscoder, statistics: Path | None = None, *, a: str | None = None, b: str | None = None
) -> LatentFacts:
    """The facts of a crosscoder's latents; `statistics` is a latents.parquet, where there is one.

    Classes are between `a` and `b`, or between the only two sources; there are none where neither is given.
    """
    facts = LatentFacts(crosscoder.decoder_norms("normalised").sum(1).cpu())
    columns: dict[str, Tensor] = {}
    if statistics is not None:
        table = read_table(statistics, thing="latents")
        _check_norms(table, crosscoder, statistics)
        columns = {
            name: torch.from_numpy(table[name].to_numpy().astype(np.float64))
            for name in ("mean_value", "max_value", "density")
        }
    if a is None and b is None and len(crosscoder.writes) == 2:
        a, b = crosscoder.writes.keys
    classes = None if a is None or b is None else latent_classes(crosscoder, a=a, b=b, density=columns.get("density"))
    return LatentFacts(facts.scale, **columns, classes=classes)


def _check_norms(table: pa.Table, crosscoder: Crosscoder, path: Path) -> None:
    norms = crosscoder.decoder_norms("normalised").float().cpu().numpy()
    names = [f"norm_normalised/{key}" for key in crosscoder.writes.keys]
    same = len(table) == len(norms) and set(names) <= set(table.column_names)
    if same:
        there = np.stack([table[name].to_numpy(zero_copy_only=False) for name in names], axis=1).astype(np.float32)
        same = np.allclose(np.nan_to_num(there), norms, rtol=1e-4, atol=1e-6)
    if not same:
        raise FileFormatError(
            f"{path} is of another crosscoder: its decoder norms are not the same.",
            hint="Evaluate this one: crosscoder evaluate RUN. Or take the file away; it is not needed.",
        )


@dataclass(frozen=True)
class EncodedPrompts:
    """The code of prompts together with the facts of their latents; `only` restricts what is shown to some latents."""

    code: PromptCode
    facts: LatentFacts
    only: tuple[int, ...] = ()

    def on_token(self, row: int, num: int) -> list[tuple[int, float]]:
        """The latents with the largest scores on one row, with their values."""
        start, stop = self.code.code.row_pointers[row : row + 2].tolist()
        latents, values = self.code.code.latents[start:stop], self.code.code.values[start:stop]
        if self.only:
            chosen = torch.isin(latents, torch.tensor(self.only))
            latents, values = latents[chosen], values[chosen]
        best = (values * self.facts.scale[latents]).argsort(descending=True, stable=True)[:num]
        return list(zip(latents[best].tolist(), values[best].tolist(), strict=True))

    def of_prompt(self, prompt: int, num: int, *, by: Ranking = "max") -> list[int]:
        """The prompt's latents that rank highest, as entries of `code.by_prompt`."""
        entries = (self.code.by_prompt.prompt == prompt).nonzero().squeeze(1)
        latents = self.code.by_prompt.latent[entries]
        if self.only:
            chosen = torch.isin(latents, torch.tensor(self.only))
            entries, latents = entries[chosen], latents[chosen]
        best = self._score(entries, by).argsort(descending=True, stable=True)[:num]
        return entries[best].tolist()

    def token_table(self, num: int = 5) -> pa.Table:
        """One row per token and latent, at most `num` latents a token; tokens without any have one row of nulls."""
        return pa.Table.from_pylist([row for prompt in range(self.code.num_prompts) for row in self._rows(prompt, num)])

    def latent_table(self, num: int = 10) -> pa.Table:
        """One row per prompt, ranking and latent."""
        rows = [
            {"prompt": prompt, "by": by, "rank": rank, **self.entry(entry)}
            for prompt in range(self.code.num_prompts)
            for by in self.rankings
            for rank, entry in enumerate(self.of_prompt(prompt, num, by=by))
        ]
        return pa.Table.from_pylist(rows)

    @property
    def rankings(self) -> tuple[Ranking, ...]:
        """The rankings that can be made: `relative` needs the latents' means."""
        return RANKINGS if self.facts.mean_value is not None else RANKINGS[:2]

    def entry(self, entry: int) -> dict[str, Any]:
        """One latent in one prompt, as JSON values; `peak` is the token of its largest value."""
        found = self.code.by_prompt
        latent = int(found.latent[entry])
        known = self.facts.of(latent)
        value, mean = float(found.maximum[entry]), known.get("mean_value")
        token = int(self.code.token_of_row[found.peak[entry]])
        return {
            "latent": latent,
            "max": value,
            "sum": float(found.total[entry]),
            "num_tokens": int(found.num_tokens[entry]),
            "relative_to_mean": value / mean if mean else None,
            "share_of_max": _share(value, known),
            "peak": self.code.text.pieces[token],
            "peak_position": int(self.code.rows.position[found.peak[entry]]),
            **known,
        }

    def to_json(self, num: int = 5) -> dict[str, Any]:
        """Every token of every prompt with its top latents, and the top latents of every prompt."""
        prompts = [
            {
                "tokens": [self._token(prompt, token, num) for token in self.code.text.span(prompt)],
                "latents": {by: [self.entry(e) for e in self.of_prompt(prompt, num, by=by)] for by in self.rankings},
            }
            for prompt in range(self.code.num_prompts)
        ]
        pair = None if self.facts.classes is None else {"a": self.facts.classes.a, "b": self.facts.classes.b}
        head = {"format": "crosscoder.prompt_code/1", "rendering": self.code.text.rendering}
        return {**head, "pair": pair, "prompts": prompts}

    def _score(self, entries: Tensor, by: Ranking) -> Tensor:
        found = self.code.by_prompt
        latents = found.latent[entries]
        if by == "relative":
            assert self.facts.mean_value is not None
            mean = self.facts.mean_value[latents]
            return torch.where(mean > 0, found.maximum[entries] / mean, 0.0)
        return (found.maximum if by == "max" else found.total)[entries] * self.facts.scale[latents]

    def _token(self, prompt: int, token: int, num: int) -> dict[str, Any]:
        text, row = self.code.text, int(self.code.row_of_token[token])
        active = [] if row < 0 else self.on_token(row, num)
        return {
            "position": token - text.span(prompt).start,
            "token_id": int(text.contexts.token_ids[token]),
            "piece": text.pieces[token],
            "role": ROLES[int(text.contexts.roles[token])],
            "read": row >= 0,
            "latents": [self._active(latent, value) for latent, value in active],
        }

    def _active(self, latent: int, value: float) -> dict[str, Any]:
        known = self.facts.of(latent)
        kept = {name: known[name] for name in ("relative_norm", "class") if name in known}
        score = value * float(self.facts.scale[latent])
        return {"latent": latent, "value": value, "score": score, "share_of_max": _share(value, known), **kept}

    def _rows(self, prompt: int, num: int) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for token in self.code.text.span(prompt):
            told = self._token(prompt, token, num)
            active: Sequence[dict[str, Any]] = told.pop("latents")
            rows += [{"prompt": prompt, **told, "rank": r, **each} for r, each in enumerate(active)]
            rows += [] if active else [{"prompt": prompt, **told, "rank": None, "latent": None, "value": None}]
        return rows


def _share(value: float, known: dict[str, Any]) -> float | None:
    """Of the largest value on the analysis set; a prompt may go beyond it."""
    largest = known.get("max_value")
    return value / largest if largest else None
