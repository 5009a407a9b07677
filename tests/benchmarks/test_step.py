"""The step benchmark: contenders compute the same update, memory decides the heats, and the report renders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
BATCH = ("ours", "ours, float32", "dense")
ROW = ("ours, TopK", "textbook TopK")


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        names = ("check", "contenders", "data", "floor", "phases", "race", "report", "sizes", "summary", "worker")
        yield {name: import_module(f"step_{name}") for name in names}


@pytest.fixture(scope="module")
def size(modules: dict[str, ModuleType]) -> Any:
    return modules["sizes"].Size("A", 2, 8, 60, 24, 4, training_steps=6)


@pytest.fixture(scope="module")
def folder(modules: dict[str, ModuleType], size: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return modules["data"].prepare(size, tmp_path_factory.mktemp("weights"))


def updates(modules: dict[str, ModuleType], size: Any, folder: Path, *, dead: bool) -> dict[str, Any]:
    x, begin = modules["data"].pool(folder)[0], modules["data"].start(size, folder, dead=dead)
    return {name: make(begin).first_update(x) for name, make in modules["contenders"].CHECKED.items()}


@pytest.mark.parametrize("dead", [False, True])
def test_contenders_agree_on_the_gradient_of_a_batch(
    modules: dict[str, ModuleType], size: Any, folder: Path, dead: bool
) -> None:
    found = updates(modules, size, folder, dead=dead)
    for name, first in ((name, group[0]) for group in (BATCH, ROW) for name in group):
        assert torch.equal(found[name].kept, found[first].kept), name
        for parameter, gradient in found[first].gradients.items():
            torch.testing.assert_close(found[name].gradients[parameter], gradient, rtol=1e-4, atol=1e-6)
    assert int(found["dense"].kept.sum()) == size.num_active
    assert found[ROW[0]].kept.sum(1).tolist() == [size.k] * size.batch_size


@pytest.mark.parametrize("name", [*BATCH, *ROW])
def test_what_was_kept_and_gradients_are_exact(
    modules: dict[str, ModuleType], size: Any, folder: Path, name: str
) -> None:
    task = modules["worker"].Task(name, size, folder, True, torch.get_num_threads())
    found = modules["check"].check(task)
    assert found["differing"] == 0
    assert max(found["gradient_errors"].values()) < 1e-5
    assert found.get("bit_equal", True)


def test_a_wrong_gradient_and_a_wrong_set_are_seen(modules: dict[str, ModuleType], size: Any, folder: Path) -> None:
    x, begin = modules["data"].pool(folder)[0], modules["data"].start(size, folder, dead=False)
    update = modules["contenders"].CHECKED["dense"](begin).first_update(x)
    update.gradients["decoder"].mul_(1.001)
    first = int(update.kept.flatten().nonzero()[0])
    update.kept.view(-1)[first] = False
    found = modules["check"].compare(begin, x, update, per_row=False)
    assert found["gradient_errors"]["decoder"] > 5e-4
    assert found["differing"] == 1


def test_dead_latents_never_fire_and_get_gradients(modules: dict[str, ModuleType], size: Any, folder: Path) -> None:
    dead = modules["data"].dead_latents(size)
    without, with_dead = (updates(modules, size, folder, dead=there)["ours"] for there in (False, True))
    assert with_dead.kept[:, dead].sum() == 0
    assert without.kept[:, dead].sum() > 0
    assert with_dead.gradients["encoder"][dead].abs().sum() > 0


def test_batches_differ_and_are_functions_of_their_number(modules: dict[str, ModuleType], size: Any) -> None:
    worlds = [modules["data"].World(size) for _ in range(2)]
    assert torch.equal(worlds[0].batch(3), worlds[1].batch(3))
    assert not torch.equal(worlds[0].batch(3), worlds[0].batch(4))


def test_heats_hold_what_memory_has_room_for(modules: dict[str, ModuleType], size: Any) -> None:
    race, names = modules["race"], ["ours", "dense", "textbook TopK", "sparsify TopK"]
    one = race.bytes_of(size) / race.ROOM
    assert list(race.heats(size, names, available=100 * one)) == [names]
    assert list(race.heats(size, names, available=4.1 * one)) == [names[:3], ["ours", names[3]]]
    assert list(race.heats(size, names, available=0)) == [["ours", name] for name in names[1:]]


def test_ratios_are_of_rounds_in_which_both_were_quiet(modules: dict[str, ModuleType]) -> None:
    race, turn = modules["race"], modules["worker"].Turn
    ours, theirs = race.Contest("ours"), race.Contest("dense")
    ours.turns = {
        (0, 0): turn([1.0, 1.0], [2.0], 0.0),
        (0, 1): turn([1.0], [1.0], 0.5),
        (0, 2): turn([2.0], [1.0], 0.0),
    }
    theirs.turns = {(0, place): turn([4.0], [6.0], 0.01) for place in range(3)}
    assert race.ratios(theirs, ours, quiet=True) == [4.0, 2.0]
    assert race.ratios(theirs, ours, quiet=False, cpu=True) == [3.0, 6.0, 6.0]


def test_the_floor_is_what_the_rates_say(modules: dict[str, ModuleType]) -> None:
    """B D F = 1000, k B D = 100, 200 parameters; at one operation or byte per second."""
    size = modules["sizes"].Size("x", 1, 10, 10, 10, 1, training_steps=1)
    found = modules["floor"].floor(size, modules["floor"].Rates(1.0, 2.0, 1.0, 1.0))
    assert found.dense == 5 * 2000 + 28 * 200
    assert found.sparse == 2000 + 4 * 200 + 4 * 200 + 28 * 200
    assert found.sparse_bfloat16 == 1000 + 2 * 200 + 4 * 200 + 28 * 200


def measured(modules: dict[str, ModuleType], size: Any, folder: Path) -> dict[str, Any]:
    """A cell as `step.py` makes it, but in this process."""
    race, worker, names = modules["race"], modules["worker"], ("ours", "dense", "textbook TopK")
    plan = race.Plan(size, folder, False, torch.get_num_threads(), rounds=2, steps=1)
    begin, contests = modules["data"].start(size, folder, dead=False), {}
    for name in names:
        contender = modules["contenders"].CONTENDERS[name](begin)
        rows = cycle(modules["data"].pool(folder))
        turns = {(0, this): worker.turn(contender, rows, steps=1) for this in range(plan.rounds)}
        contests[name] = race.Contest(name, turns)
    tasks = [worker.Task(name, size, folder, False, plan.threads) for name in names]
    scenario = {
        "contenders": modules["summary"].summaries(contests, plan),
        "rates": {"float32": 1e11, "bfloat16": 2e11, "copy": 3e10, "adam": 5e10},
        "floor_ms": {"dense": 3.0, "sparse": 2.0, "sparse_bfloat16": 1.0},
        "phases": modules["phases"].phases(tasks[0]),
        "checks": {task.contender: modules["check"].check(task) for task in tasks},
    }
    shape = {name: getattr(size, name) for name in size.__dataclass_fields__}
    about = modules["summary"].about(plan)
    return {"size": shape, "about": about, "scenarios": {"alive": scenario}, "fve": 0.5, "missing": [], "quick": False}


def test_the_report_renders(
    modules: dict[str, ModuleType], size: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules["worker"], "AT_LEAST", 0.0)
    cell = measured(modules, size, folder)
    report = modules["report"].write([cell], tmp_path)
    date = cell["about"]["date"]
    assert (tmp_path / f"{date}-step.md").read_text(encoding="utf-8") == report
    for line in ("| **ours** |", "| dense |", "two runs bit-equal | equal | yes", "training.trainer."):
        assert line in report
    plots = {f"{date}-step-{name}.svg" for name in ("A-alive", "phases")}
    assert {path.name for path in tmp_path.glob("*.svg")} == plots
    content = json.loads((tmp_path / f"{date}-step.json").read_text(encoding="utf-8"))
    assert content["cells"][0]["scenarios"]["alive"]["contenders"]["dense"]["ratio"] > 0


@pytest.mark.slow
def test_a_race_in_processes_of_their_own(modules: dict[str, ModuleType], size: Any, folder: Path) -> None:
    race = modules["race"]
    plan = race.Plan(size, folder, True, 1, rounds=2, steps=1)
    said: list[str] = []
    contests, rates = race.race(plan, ["ours", "dense"], said.append)
    assert [sorted(contest.turns) for contest in contests.values()] == [[(0, 0), (0, 1)]] * 2
    assert all(rate > 0 for rate in rates.values)
    assert len(said) == 1
