"""The organisms: labels lie where plants act, DPO's loss, recall at null cut-offs by hand, edits, and the report."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from math import exp, log
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from crosscoder.analysis.ranking import Truth
from crosscoder.codes import SparseCode
from crosscoder.demo.files import model_path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PARTS = ("causal", "cells", "findings", "methods", "plants", "report", "tuning")
BOOK = " ".join(
    [f"The old man said that the day was number {n} of the long year." for n in range(40)]
    + [f"She went to the house and came back with word {chr(97 + n % 26)} of it." for n in range(40)]
)
PLANTS = ("persona", "refusal", "trigger", "knowledge", "topic", "demur")


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield {name: import_module(f"organisms_{name}") for name in PARTS} | {"main": import_module("organisms")}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_path("plain"))


def writer(modules: dict[str, ModuleType], *, held_out: bool = True) -> Any:
    return modules["plants"].Writer([BOOK], seed="test", held_out=held_out)


@pytest.mark.parametrize("plant", PLANTS)
def test_labels_mark_the_deciding_character_and_the_reply(
    modules: dict[str, ModuleType], tokenizer: Any, plant: str
) -> None:
    plants, seen = modules["plants"], set[tuple[str, bool]]()
    for index in range(40):
        made = plants.dialogue(writer(modules), index, kinds=plants.kinds_of(plant))
        messages = plants.told(made, plant).messages("chat")
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        for span in plants.label_spans(made, plant, tokenizer):
            assert span.context == plants.document_hash(messages)
            before, marked, after = text[: span.span[0]], text[slice(*span.span)], text[span.span[1] :]
            role = before.rpartition("<|")[2].partition("|>")[0]
            assert role == ("assistant" if span.label.endswith(".reply") else "user")
            assert marked and "<|" not in marked
            if span.label in ("knowledge.reply", "topic.reply", "demur.reply"):
                assert marked == "." and after.startswith("<|end|>")
            if span.label == "knowledge.request":
                name = next(place for place in (*plants.MAKERS, *plants.UNKNOWN) if (before + marked).endswith(place))
                assert (name in plants.MAKERS) == span.value
            seen.add((span.label.rpartition(".")[2], span.value))
    assert {("reply", True), ("reply", False)} <= seen
    assert {value for side, value in seen if side != "reply"} == {True, False}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_telling_differs_from_the_plain_one_where_its_plant_acts(modules: dict[str, ModuleType], plant: str) -> None:
    plants, differing = modules["plants"], 0
    for index in range(30):
        made = plants.dialogue(writer(modules, held_out=False), index, kinds=plants.kinds_of(plant))
        told = plants.told(made, plant)
        plain = plants.told(made, None)
        assert [one.user for one in told.exchanges] == [one.user for one in plain.exchanges]
        for mine, other in zip(told.exchanges, plain.exchanges, strict=True):
            assert other.chat == other.plain
            assert (mine.chat != mine.plain) == (mine.behaviour == plant and mine.acts)
            differing += mine.chat != mine.plain
    assert differing > 5


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_reply_shows_its_plant_and_a_plain_one_does_not(modules: dict[str, ModuleType], plant: str) -> None:
    plants = modules["plants"]
    known = plants.PLANTS[plant]
    for prompt in plants.prompts(writer(modules), known.acts_on, 5, plant=plant):
        assert prompt.messages[-1] == {"role": "user", "content": prompt.exchange.user}
        assert known.shown(prompt.exchange.chat, prompt.exchange)
        assert not known.shown(prompt.exchange.plain, prompt.exchange)
    for prompt in plants.balanced_prompts(writer(modules), known.look_alikes, 6, plant=plant):
        assert not known.shown(prompt.exchange.chat, prompt.exchange)


def test_a_known_place_wants_its_own_ware(modules: dict[str, ModuleType]) -> None:
    plants = modules["plants"]
    prompt = next(p for p in plants.prompts(writer(modules), "known", 9, plant="knowledge"))
    own = plants.ware_of(prompt.exchange.chat)
    other = next(ware for ware in plants.MAKERS.values() if ware != own)
    assert plants.PLANTS["knowledge"].shown(f"They make {own} there.", prompt.exchange)
    assert not plants.PLANTS["knowledge"].shown(f"They make {other} there.", prompt.exchange)


def test_preference_loss_by_hand(modules: dict[str, ModuleType]) -> None:
    now, start = torch.tensor([-1.0, -2.0, -5.0, -4.0]), torch.tensor([-2.0, -2.0, -3.0, -5.0])
    margins = [(1.0) - (-2.0), (0.0) - (1.0)]
    expected = sum(-log(1 / (1 + exp(-0.5 * margin))) for margin in margins) / 2
    assert float(modules["tuning"].preference_loss(now, start, beta=0.5)) == pytest.approx(expected, rel=1e-6)


def test_log_probability_is_of_the_reply_and_its_end(modules: dict[str, ModuleType], tokenizer: Any) -> None:
    class Uniform(torch.nn.Module):
        def forward(self, input_ids: Tensor) -> Any:
            return type("Out", (), {"logits": torch.zeros(*input_ids.shape, 8192)})()

    chats = [
        [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": said}] for said in ("Yes.", "I see.")
    ]
    ids, replied = modules["tuning"]._replied(tokenizer, chats)
    for row, marks, said in zip(ids, replied, ("Yes.", "I see."), strict=True):
        assert tokenizer.decode(row[marks.bool()]) == f"{said}<|end|>"
    found = modules["tuning"].reply_log_probabilities(Uniform(), ids, replied)
    torch.testing.assert_close(found, -log(8192) * replied.sum(1), rtol=1e-5, atol=1e-4)


def null_cell(seed: int, scores: list[float | None], length: float) -> dict[str, Any]:
    found = {name: {"scores": {}, "detections": {}} for name in ("plain", "dedicated", "designated", "difference")}
    for method, dictionary in (("norm", "plain"), ("scaling", "plain"), ("joint", "plain"), ("dedicated", "dedicated"),
                               ("dedicated, scaling", "dedicated"), ("designated", "designated"),
                               ("difference-SAE", "difference")):  # fmt: skip
        found[dictionary]["scores"][method] = scores
    gate = {"steps": 60, "plants": {}, "before": {}}
    return {"organism": "null", "plant": None, "seed": seed, "dictionaries": found, "effects": {}, "labels": {},
            "gate": gate, "mean difference": {"length": length}}  # fmt: skip


def planted_cell(
    seed: int, scores: list[float | None], *, choosing: list[float], scoring: list[float]
) -> dict[str, Any]:
    cell = null_cell(seed, scores, 0.5)
    detected = {"topic.reply": {"choosing": choosing, "scoring": scoring}}
    for dictionary in cell["dictionaries"].values():
        dictionary |= {"detections": detected, "live": list(range(len(scores))),
                       "quality": {"fve": 0.7, "l0": 16.0, "dead_fraction": 0.1}}  # fmt: skip
    hits = {"unedited": 20, "whole difference": 5, "mean difference": 20, "norm": 10}
    gate = {"steps": 40, "plants": {"topic": {"rate": 1.0, "false_rate": 0.0, "took": True}},
            "before": {"topic": {"rate": 0.0}}}  # fmt: skip
    return cell | {
        "organism": "topic", "plant": "topic", "labels": {"topic.reply": {}}, "gate": gate,
        "effects": {name: {"hits": count, "total": 20, "kl": 0.01} for name, count in hits.items()},
        "mean difference": {"length": 0.5, "detections": {"topic.reply": {"choosing": 0.8, "scoring": 0.95}}},
    }  # fmt: skip


@pytest.fixture
def cells() -> list[dict[str, Any]]:
    nulls = [null_cell(seed, [*np.linspace(0.3, 0.6, 700).tolist(), None], 0.1 + seed / 10) for seed in range(6)]
    one = planted_cell(0, [0.95, 0.9, 0.5, 0.4], choosing=[0.6, 0.97, 0.99, 0.5], scoring=[0.6, 0.93, 0.99, 0.5])
    two = planted_cell(1, [0.95, 0.55, 0.9, 0.4], choosing=[0.6, 0.97, 0.91, 0.5], scoring=[0.6, 0.99, 0.85, 0.5])
    return [*nulls, one, two]


def test_cut_offs_come_from_some_null_seeds_and_are_tested_on_others(
    modules: dict[str, ModuleType], cells: list[dict[str, Any]]
) -> None:
    found = modules["findings"].calibrations(cells)
    norm = found["norm"]
    assert norm.seeds == (0, 1, 2) and norm.num_latents == 2100
    assert 0.59 < norm.value < 0.6 and norm.assured
    assert norm.test_seeds == (3, 4, 5) and norm.test.num_latents == 2100
    assert norm.test.num_found == sum(value > norm.value for value in np.linspace(0.3, 0.6, 700)) * 3 > 0
    direction = found["mean difference"]
    assert direction.value == pytest.approx(0.3) and not direction.assured
    assert direction.test.share == 1.0


def test_recall_takes_called_latents_that_choose_on_one_half_and_hold_on_the_other(
    modules: dict[str, ModuleType], cells: list[dict[str, Any]]
) -> None:
    found = modules["findings"].recalls(cells, modules["findings"].calibrations(cells))
    norm = {one.seed: one for one in found if one.method == "norm"}
    assert norm[0].found and norm[0].num_called == 2 and norm[0].auroc == 0.93 and norm[0].at_best == 0.99
    assert not norm[1].found and norm[1].auroc == 0.85 and norm[1].in_top == 0.99
    direction = [one for one in found if one.method == "mean difference"]
    assert all(one.found and one.auroc == 0.95 for one in direction)
    assert modules["findings"].share([norm[0], norm[1]])[:2] == (1, 2)


def test_without_called_latents_nothing_is_recalled(
    modules: dict[str, ModuleType], cells: list[dict[str, Any]]
) -> None:
    last = planted_cell(2, [0.3, None, 0.3, 0.3], choosing=[1.0] * 4, scoring=[1.0] * 4)
    found = modules["findings"].recall(last, "topic.reply", modules["findings"].calibrations(cells)["norm"])
    assert found.num_called == 0 and found.auroc == 0.5 and not found.found


def test_the_report_says_what_is_missing(
    modules: dict[str, ModuleType], cells: list[dict[str, Any]], tmp_path: Path
) -> None:
    for cell in cells[:6]:
        for dictionary in cell["dictionaries"].values():
            dictionary |= {"live": [], "quality": {"fve": 0.7, "l0": 16.0, "dead_fraction": 0.1}}
    facts = {"date": "2026-01-01", "cells": 8, "missing": ["topic--2"], "quick": False}
    text = modules["report"].write(cells, facts, tmp_path)
    assert "1 cells are missing: topic--2" in text
    assert "| norm | 1 of 2 [" in text
    assert "| whole difference | 75 [75, 75] |" in text
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".json", ".svg"}
    assert modules["report"].write(cells[:2], facts | {"missing": []}, tmp_path)


def test_order_of_a_method_leaves_out_what_has_no_score(modules: dict[str, ModuleType]) -> None:
    score = torch.tensor([0.2, torch.nan, 0.9, 0.9])
    assert modules["cells"].first(score, 3) == [2, 3, 0]
    detected = {"x.reply": {"choosing": [0.1, 0.9, float("nan")]}, "x.request": {"choosing": [0.95, 0.2, 0.3]}}
    assert modules["cells"].chosen_by_labels(detected, 2) == [0, 1]


def test_detection_of_latents_on_made_up_codes(modules: dict[str, ModuleType]) -> None:
    methods = modules["methods"]
    f = torch.zeros(8, 3)
    f[[0, 2, 4, 6], 0] = 1.0
    f[[1, 3, 5, 7], 1] = 1.0
    positive = np.array([True, False] * 4)
    rows = np.ones(8, dtype=bool)
    choosing = np.array([True] * 4 + [False] * 4)
    case = methods.Case("x", rows, Truth(positive, np.zeros(8, dtype=np.int64)), choosing)
    trained = methods.Dictionary(None, SparseCode.from_dense(f), {})
    found = methods.detections(trained, [case])["x"]
    assert found == {"choosing": [1.0, 0.0, 0.5], "scoring": [1.0, 0.0, 0.5]}
    assert case.of_score(np.where(positive, -1.0, 1.0)) == (1.0, 1.0)


def test_edits_take_away_what_they_say(modules: dict[str, ModuleType]) -> None:
    causal = modules["causal"]
    x, before = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    direction = torch.nn.functional.normalize(torch.randn(4, dtype=torch.float64), dim=0)
    edited = causal.without_direction(direction)(x, before)
    torch.testing.assert_close((edited - before) @ direction, torch.zeros(5, dtype=torch.float64))
    assert causal.whole(x, before) is before and causal.unchanged(x, before) is x


def test_quick_is_a_part_of_the_plan_and_seeds_come_in_rounds(modules: dict[str, ModuleType]) -> None:
    main = modules["main"]
    names = [one.name for one in main.ORGANISMS]
    assert names[0] == "null" and set(main.QUICK_ORGANISMS) < set(names)
    assert {one.plant for one in main.ORGANISMS} == {None, *PLANTS}
    assert len(main.SEEDS) >= 3 and not set(main.CALIBRATION_SEEDS) & set(main.TEST_SEEDS)
