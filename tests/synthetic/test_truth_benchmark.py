"""The ground-truth benchmark: its rule decides as it says, and every architecture of its cells can be trained."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from math import exp, isnan, nan
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module(name)


def cells_with(values: list[float | None], field: str = "recall") -> dict[str, dict[str, object]]:
    return {f"x--plain--l1--same--{seed}": {"cuts": {"dfc": {field: value}}} for seed, value in enumerate(values)}


@pytest.mark.parametrize(
    ("values", "direction", "verdict"),
    [
        ([0.7, 0.8, 0.9], "above", "confirmed"),
        ([0.7, 0.8, 0.9], "below", "refuted"),
        ([0.1, 0.2, 0.3], "above", "refuted"),
        ([0.1, 0.2, 0.3], "below", "confirmed"),
        ([0.1, 0.5, 0.9], "above", "inconclusive"),
        ([0.7, 0.8, None], "above", "inconclusive"),
        ([0.8, 0.8], "above", "inconclusive"),
    ],
)
def test_the_rule(values: list[float | None], direction: str, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = module("truth_findings", monkeypatch)
    measure = findings.Measure("x", "plain", "l1", "recall")
    finding = findings.Finding("n", "c", "s", measure, direction, 0.5, seeds=(0, 1, 2))
    assert findings.judge(finding, cells_with(values)).verdict == verdict


def test_seeds_that_agree_exactly_are_judged_by_their_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 of 24 does not prove nine in ten (Wilson's lower end is .862); 240 of 240 does (.984)."""
    findings = module("truth_findings", monkeypatch)
    measure = findings.Measure("x", "plain", "l1", "recall")
    for trials, verdict in ((8, "inconclusive"), (80, "confirmed"), (None, "confirmed")):
        finding = findings.Finding("n", "c", "s", measure, "above", 0.9, seeds=(0, 1, 2), trials=trials)
        assert findings.judge(finding, cells_with([1.0] * 3)).verdict == verdict
    none_of_many = findings.Finding("n", "c", "s", measure, "above", 1.0, seeds=(0, 1, 2), trials=300, per=100.0)
    found = findings.judge(none_of_many, cells_with([0.0] * 3))
    assert (found.verdict, found.high) == ("refuted", pytest.approx(0.425, abs=1e-3))


def test_sizes_are_compared_where_both_curves_have_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the latents at every loss: a ratio of 2, confirmed above 1.5, refuted above 3; none where curves miss."""
    findings = module("layers_findings", monkeypatch)

    def cells(shift: float) -> list[dict[str, object]]:
        return [
            {
                "sparsity": "l1",
                "wiring": wiring,
                "seed": seed,
                "loss": loss + at + 0.001 * seed * size,
                "num_latents": size,
            }
            for wiring, factor, at in (("per_source", 2, shift), ("acausal", 1, 0.0))
            for seed in range(3)
            for size, loss in ((factor * 100, 3.0), (factor * 200, 2.0), (factor * 400, 1.0))
        ]

    measure = findings.EqualLoss("num_latents", "per_source", "acausal")
    ratio = measure.value(cells(0.0), 0)
    assert exp(ratio) == pytest.approx(2)
    assert isnan(measure.value(cells(10.0), 0))


def test_the_interval_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """1, 2, 3: mean 2, standard deviation 1, t 4.303, so 2 ± 2.484."""
    interval = module("truth_findings", monkeypatch).interval
    assert interval([1.0, nan, 2.0, 3.0]) == pytest.approx((2, -0.4843, 4.4843), abs=1e-3)
    assert isnan(interval([1.0])[1])


def test_differences_pair_the_seeds_and_ratios_are_logarithms(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = module("truth_findings", monkeypatch)
    cells = cells_with([exp(1), exp(2), exp(3)], "density_ratio")
    cells |= {
        name.replace("plain", "designated"): cell for name, cell in cells_with([1.0] * 3, "density_ratio").items()
    }
    one, other = (findings.Measure("x", name, "l1", "density_ratio") for name in ("plain", "designated"))
    finding = findings.Finding("n", "c", "s", one, "above", 1.5, minus=other, log_scale=True, seeds=(0, 1, 2))
    assert finding.numbers(cells) == pytest.approx([1, 2, 3])
    assert findings.judge(finding, cells).mean == pytest.approx(exp(2))


def test_every_finding_names_cells_that_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, findings = module("truth", monkeypatch), module("truth_findings", monkeypatch)
    arenas = module("truth_cells", monkeypatch).arenas()
    trained = {cell.name for arena, seed in truth.units(arenas) for cell in truth.cells_of(arena, seed)}
    for finding in findings.FINDINGS:
        for measure in filter(None, (finding.measure, finding.minus)):
            assert {measure.cell(seed) for seed in finding.seeds} <= trained
        assert len(finding.seeds) >= findings.FEWEST


@pytest.mark.parametrize(
    ("architecture", "sparsity"),
    [
        ("plain", "jumprelu"),
        ("designated", "l1"),
        ("designated", "batchtopk"),
        ("designated-norm", "l1"),
        ("dedicated", "batchtopk"),
        ("difference", "topk"),
    ],
)
def test_cells_train(architecture: str, sparsity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = module("truth_cells", monkeypatch)
    arena = replace(benchmark.arenas()["narrow"], num_rows=1024, batch_size=128)
    result = benchmark.run(benchmark.Cell("narrow", architecture, sparsity, 0), benchmark.Rows(arena, 0))
    assert 0 < result["fve"] <= 1
    assert set(result["cuts"]) == ({"difference"} if architecture == "difference" else {"dfc", "anthropic", "minder"})


def test_the_report_is_written_from_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark, report = module("truth_cells", monkeypatch), module("truth_report", monkeypatch)
    arena = replace(benchmark.arenas()["null-crowded"], num_rows=512, batch_size=128, num_latents=32)
    cells = [benchmark.Cell("null-crowded", "plain", "batchtopk", seed) for seed in (0, 3)]
    results = {cell.name: benchmark.run(cell, benchmark.Rows(arena, cell.seed)) for cell in cells}
    text = report.write(results, {"date": "today", "quick": True}, tmp_path)
    assert "| null-crowded | plain batchtopk |" in text
    assert {path.name for path in tmp_path.iterdir()} == {"truth.md", "truth.json", "truth-shares-null.svg"}
