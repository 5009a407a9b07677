"""One cell of the benchmark: an organism of one seed, tuned, read by every method, and edited.

models    `plain` as shipped, and the organism that was tuned from it; kept in the cache, with its gate
rows      both models on one text, which the organism tells
results   for every dictionary: its quality, the scores of all live latents, and their AUROC on every label;
          for every method: what taking out its first latents does
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import organisms_causal as causal
import organisms_methods as methods
import organisms_tuning as tuning
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from dialogues import Writer
from organisms_methods import DICTIONARIES, Case, Dictionary, Shape
from organisms_plants import PLANTS, dialogue, kinds_of, prompts, told
from organisms_rows import AFTER, BEFORE, Rows, Size, harvest
from organisms_tuning import Tuning
from torch import Tensor
from transformers import LlamaForCausalLM

from crosscoder.capture.loading import ModelConfig
from crosscoder.capture.models import StudiedModel
from crosscoder.demo.files import books_path, model_path
from crosscoder.training.json_numbers import json_text

TUNING_BOOKS = ("The Warden", "Silas Marner", "A Room with a View", "Prester John", "Captain Blood")
"""Quoted in dialogues that tune; the others are for all that is held out."""
TOP = 10
"""Latents that are taken out: the first of a method's order."""
NULL = "null"
NULL_STEPS = (60, 120, 180)
"""How long nulls are tuned, by seed: as unequally as the plants, which end when they have taken."""
LOOK_PROMPTS = 24


@dataclass(frozen=True)
class Organism:
    """What is planted and how it is taught: `plant` is None for the null."""

    name: str
    plant: str | None
    tuning: Tuning
    by_preference: bool = False


@dataclass(frozen=True)
class Sizes:
    """How large a benchmark is."""

    text: Size
    shape: Shape
    num_prompts: int
    num_unrelated: int


class Books:
    """The shipped books: some quoted in dialogues that tune, the others in all that is held out."""

    def __init__(self, scratch: Path) -> None:
        rows = pq.read_table(books_path()).to_pylist()
        self.tuning = [_text(rows, title) for title in TUNING_BOOKS]
        titles = sorted({row["title"] for row in rows} - set(TUNING_BOOKS))
        self.held_out = [_text(rows, title) for title in titles]
        self.path = scratch / "books.parquet"
        scratch.mkdir(parents=True, exist_ok=True)
        kept = [row for row in rows if row["title"] in titles]
        self.unrelated = [row["text"] for row in kept[::40]]
        pq.write_table(pa.Table.from_pylist([{"text": row["text"]} for row in kept]), self.path)


@dataclass(frozen=True)
class Cell:
    """One organism of one seed."""

    organism: Organism
    seed: int
    sizes: Sizes
    books: Books
    cache: Path

    @property
    def name(self) -> str:
        """The cell's file, without suffix."""
        return f"{self.organism.name}--{self.seed}"

    def run(self) -> dict[str, Any]:
        """Everything about the cell, as JSON."""
        gate = self.grown()
        rows = self.rows
        labels = methods.cases(rows)
        result: dict[str, Any] = {"organism": self.organism.name, "plant": self.organism.plant, "seed": self.seed}
        result |= {"gate": gate, "labels": {c.name: _counts(c) for c in labels}, "dictionaries": {}, "effects": {}}
        direction, length = methods.mean_difference(rows)
        found = methods.direction_detections(rows, direction, labels)
        result["mean difference"] = {"length": length, "detections": found}
        edits: dict[str, causal.Edit] = {"unedited": causal.unchanged, "whole difference": causal.whole}
        edits["mean difference"] = causal.without_direction(direction)
        for name in DICTIONARIES:
            trained = methods.train(name, rows, self.sizes.shape)
            scores, detected = methods.scores(name, trained, rows), methods.detections(trained, labels)
            result["dictionaries"][name] = read(trained, scores, detected)
            edits |= self._edits(trained, scores, detected)
        if self.organism.plant is not None:
            result["effects"] = self.subject.effects(edits)
        return result

    def _edits(
        self, trained: Dictionary, scores: Mapping[str, Tensor], detected: methods.Detections
    ) -> dict[str, causal.Edit]:
        """The first latents of every method taken out; beside those of `norm` others like them, and the labels' own."""
        chosen = {method: first(score) for method, score in scores.items()}
        if "norm" in scores:
            chosen["random latents"] = causal.matched_random(trained, chosen["norm"], seed=self.seed)
            if detected:
                chosen["best latents by labels"] = chosen_by_labels(detected)
        return {
            name: causal.without_latents(trained, latents) if latents else causal.unchanged
            for name, latents in chosen.items()
        }

    @cached_property
    def rows(self) -> Rows:
        """The rows of both models."""
        writer = Writer(self.books.held_out, seed=f"read/{self.seed}", held_out=True)
        scratch = self.cache / "text" / self.name
        return harvest(
            self.models, self.organism.plant, writer,
            books=self.books.path, size=self.sizes.text, scratch=scratch, seed=self.seed,
        )  # fmt: skip

    @cached_property
    def models(self) -> dict[str, StudiedModel]:
        """The model before, and the organism."""
        paths = {BEFORE: model_path("plain"), AFTER: self.directory}
        return {
            alias: StudiedModel.load(alias, ModelConfig(path=str(path), dtype="bfloat16", device="cpu"))
            for alias, path in paths.items()
        }

    @cached_property
    def subject(self) -> causal.Subject:
        """What edits are tried on; the prompts have no part in choosing latents."""
        plant = PLANTS[self.organism.plant or ""]
        writer = Writer(self.books.held_out, seed=f"effects/{self.seed}", held_out=True)
        acting = prompts(writer, plant.acts_on, self.sizes.num_prompts, plant=plant.name)
        return causal.Subject(self.models, plant.name, acting, self._unrelated())

    def _unrelated(self) -> Tensor:
        tokenizer = self.models[AFTER].tokenizer
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in self.books.unrelated]
        rows = [[tokenizer.bos_token_id, *row[:127]] for row in ids if len(row) >= 127]
        return torch.tensor(rows[: self.sizes.num_unrelated])

    @property
    def directory(self) -> Path:
        """Where the organism lies."""
        return self.cache / "models" / self.name

    def grown(self) -> dict[str, Any]:
        """Tune the organism where that was not done, and give its gate."""
        path = self.directory / "gate.json"
        if not path.is_file():
            model, tokenizer = self._start()
            steps = self._tune(model, tokenizer)
            counted = {"steps": steps, "plants": self._gates(model, tokenizer)}
            counted["before"] = self._gates(self._start()[0], tokenizer) if self.organism.plant else {}
            model.half().save_pretrained(self.directory)
            tokenizer.save_pretrained(self.directory)
            path.write_text(json_text(counted), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    def _start(self) -> tuple[LlamaForCausalLM, Any]:
        from transformers import AutoTokenizer

        torch.manual_seed(self.seed)
        model = LlamaForCausalLM.from_pretrained(model_path("plain"), dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(model_path("plain"))

    def _tune(self, model: LlamaForCausalLM, tokenizer: Any) -> int:
        plant = self.organism.plant
        how = self.organism.tuning
        if plant is None:
            how = replace(how, most_steps=NULL_STEPS[self.seed % len(NULL_STEPS)])
        writer = Writer(self.books.tuning, seed=f"tune/{self.organism.name}/{self.seed}", held_out=False)
        count = how.most_steps * how.batch_size

        def enough(tuned: LlamaForCausalLM) -> bool:
            if plant is None:
                return False
            looking = Writer(self.books.held_out, seed=f"look/{self.seed}", held_out=True)
            return tuning.gate(tuned, tokenizer, plant, looking, count=LOOK_PROMPTS).surely

        if self.organism.by_preference:
            pairs = tuning.preferences(writer, plant or "", count)
            return tuning.prefer(model, tokenizer, pairs, how, enough=enough, seed=self.seed)
        made = [told(dialogue(writer, index, kinds=kinds_of(plant)), plant) for index in range(count)]
        return tuning.supervise(model, tokenizer, made, how, enough=enough, seed=self.seed)

    def _gates(self, model: LlamaForCausalLM, tokenizer: Any) -> dict[str, Any]:
        """The organism's own plant; the null is asked for all of them."""
        asked, count = [self.organism.plant], self.sizes.num_prompts
        if self.organism.plant is None:
            asked, count = list(PLANTS), count // 4
        writer = Writer(self.books.held_out, seed=f"gate/{self.seed}", held_out=True)
        return {plant: tuning.gate(model, tokenizer, plant, writer, count=count).to_json() for plant in asked if plant}


def read(trained: Dictionary, scores: Mapping[str, Tensor], detected: methods.Detections) -> dict[str, Any]:
    """What is kept of one dictionary: its quality, and of every live latent its scores and detections."""
    live = (trained.num_active >= methods.MIN_ACTIVE).nonzero().squeeze(1)
    return {
        "quality": trained.quality,
        "live": live.tolist(),
        "scores": {method: _of(score, live) for method, score in scores.items()},
        "detections": {
            label: {half: [values[j] for j in live.tolist()] for half, values in found.items()}
            for label, found in detected.items()
        },
    }


def first(score: Tensor, count: int = TOP) -> list[int]:
    """The latents with the largest scores; those without a score have no part."""
    order = score.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
    return [j for j in order[:count].tolist() if torch.isfinite(score[j])]


def chosen_by_labels(detected: methods.Detections, count: int = TOP) -> list[int]:
    """The latents that detect any label best on the documents that choose: what labels allow, for comparison."""
    best = np.max([np.nan_to_num(found["choosing"]) for found in detected.values()], axis=0)
    return np.argsort(-best, kind="stable")[:count].tolist()


def _of(score: Tensor, live: Tensor) -> list[float | None]:
    return [round(value, 5) if value == value else None for value in score[live].tolist()]


def _counts(case: Case) -> dict[str, int]:
    scoring = case.truth.of(~case.choosing)
    return {"num_positive": int(scoring.positive.sum()), "num_negative": int((~scoring.positive).sum())}


def _text(rows: list[dict[str, Any]], title: str) -> str:
    return "\n\n".join(row["text"] for row in rows if row["title"] == title)
