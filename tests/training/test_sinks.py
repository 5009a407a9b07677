"""Sinks: nothing is lost, nothing is recorded twice, and no tracker ends a run."""

import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from crosscoder.errors import DiskFull, FileFormatError, MissingExtra
from crosscoder.training import sinks
from crosscoder.training.progress import ProgressSink, ProgressView, duration
from crosscoder.training.sinks import JsonlSink, RunStart, SinkGroup, TrackerSink, read_metrics


def start_at(directory: Path, step: int = 0) -> RunStart:
    return RunStart(directory, {"seed": 0}, num_steps=100, batch_size=10, step=step)


def test_jsonl_keeps_every_record(tmp_path: Path) -> None:
    sink = JsonlSink()
    sink.open(start_at(tmp_path))
    sink.record(1, {"loss": 2.0})
    sink.record(2, {"loss": 1.0})
    sink.close()
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"format": "crosscoder.metrics/1"}
    assert [json.loads(line) for line in lines[1:]] == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def test_jsonl_has_null_for_what_is_not_a_number(tmp_path: Path) -> None:
    sink = JsonlSink()
    sink.open(start_at(tmp_path))
    sink.record(1, {"loss": float("nan"), "fve": float("-inf")})
    sink.close()
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.splitlines()[1] == '{"step": 1, "loss": null, "fve": null}'


def test_jsonl_removes_records_past_the_restored_step(tmp_path: Path) -> None:
    sink = JsonlSink()
    sink.open(start_at(tmp_path))
    for step in range(1, 6):
        sink.record(step, {"loss": float(step)})
    sink.close()
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "lo')
    sink.open(start_at(tmp_path, step=3))
    sink.record(4, {"loss": 40.0})
    sink.close()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["loss"]) for record in records] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_jsonl_starts_anew_from_step_zero(tmp_path: Path) -> None:
    sink = JsonlSink()
    for _ in range(2):
        sink.open(start_at(tmp_path))
        sink.record(1, {"loss": 1.0})
        sink.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize("text", ["", "nonsense\n", '{"format": "crosscoder.labels/1"}\n', "[1]\n"])
def test_a_foreign_metrics_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FileFormatError):
        read_metrics(path)


def test_a_full_disk_is_named() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    sink = JsonlSink()
    sink._file = full.open("w", encoding="utf-8")
    with pytest.raises(DiskFull):
        sink.record(1, {"loss": 1.0})
    with pytest.raises(OSError, match="No space left"):
        sink._file.close()


class Failing:
    def __init__(self, fails_on: str) -> None:
        self.fails_on = fails_on
        self.calls: list[str] = []

    def open(self, start: RunStart) -> None:
        self._called("open")

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        self._called("record")

    def close(self) -> None:
        self._called("close")

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails_on:
            raise RuntimeError("the server is away")


@pytest.mark.parametrize(("fails_on", "calls"), [("open", 1), ("record", 2), ("close", 4)])
def test_a_failing_tracker_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fails_on: str, calls: int
) -> None:
    inner = Failing(fails_on)
    sink = TrackerSink(inner, name="tracker")
    with caplog.at_level(logging.WARNING):
        sink.open(start_at(tmp_path))
        sink.record(1, {})
        sink.record(2, {})
        sink.close()
    assert len(inner.calls) == calls
    assert [record.message for record in caplog.records] == [
        "tracker failed and is left out from here on: RuntimeError: the server is away"
    ]


def test_a_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(sinks, "import_module", missing)
    with pytest.raises(MissingExtra, match=r"pip install 'crosscoder\[wandb\]'"):
        sinks.wandb_sink()
    with pytest.raises(MissingExtra, match=r"pip install 'crosscoder\[tensorboard\]'"):
        sinks.tensorboard_sink()


class Wandb(ModuleType):
    """Stands for the package: keeps what `init` was called with."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, object]] = []

    def init(self, **settings: object) -> None:
        self.started.append(settings)


def test_wandb_goes_on_with_its_run_and_never_with_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories of one name, and a run begun again, are runs of their own; continuing finds the same one."""
    wandb = Wandb()
    monkeypatch.setattr(sinks, "import_module", lambda name: wandb)
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    for directory, step in [(one, 0), (two, 0), (one, 20), (one, 0), (two, 20)]:
        sinks.wandb_sink().open(start_at(directory, step))
    ids = [settings["id"] for settings in wandb.started]
    assert ids[2] == ids[0] and ids[4] == ids[1]
    assert len(set(ids)) == 3
    assert json.loads((one / "tracker.json").read_text())["format"] == "crosscoder.tracker/1"
    assert {settings["name"] for settings in wandb.started} == {"run"}
    assert {settings["reinit"] for settings in wandb.started} == {"create_new"}, "runs of one process do not mix"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tensorboard_writes_its_file(tmp_path: Path) -> None:
    sink = sinks.tensorboard_sink()
    sink.open(start_at(tmp_path))
    sink.record(1, {"loss": 1.0})
    sink.close()
    assert list((tmp_path / "tensorboard").iterdir())


def test_plain_progress_shows_rate_numbers_and_time_left(tmp_path: Path) -> None:
    now = [0.0]
    out = io.StringIO()
    with ProgressView(Console(file=out, width=200), clock=lambda: now[0]) as view:
        sink = ProgressSink(view)
        sink.open(start_at(tmp_path, step=10))
        now[0] = 1.0
        sink.record(11, {"fve": 0.5})
        now[0] = 10.0
        sink.record(20, {"l0": 31.62, "dead_fraction": 0.081})
        now[0] = 11.0
        sink.record(100, {"fve": 0.9})
        sink.close()
    assert out.getvalue().splitlines() == [
        "training  20 of 100  10 rows/s  FVE 0.500  L0 31.6  dead 8.1%  80 s left",
        "training  100 of 100  82 rows/s  FVE 0.900  L0 31.6  dead 8.1%",
    ]


def test_live_progress_draws_a_bar_for_each_thing(tmp_path: Path) -> None:
    out = io.StringIO()
    with ProgressView(Console(file=out, force_terminal=True, width=120)) as view:
        view("loading", 1, 4)
        sink = ProgressSink(view)
        sink.open(start_at(tmp_path))
        sink.record(50, {"fve": 0.5})
    for text in ("loading", "25%", "training", "50%", "FVE 0.500"):
        assert text in out.getvalue()


def test_work_without_a_known_end_is_shown_too() -> None:
    out = io.StringIO()
    now = [0.0]
    with ProgressView(Console(file=out, width=80), clock=lambda: now[0]) as view:
        view("reading", 1, None)
        now[0] = 6.0
        view("reading", 1234, None)
    assert out.getvalue() == "reading  1,234\n"


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4 s"), (200, "3 min"), (7500, "2 h 05 min")])
def test_durations_are_read_easily(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_group_hands_everything_to_all(tmp_path: Path) -> None:
    members = [Failing("never"), Failing("never")]
    group = SinkGroup(members)
    group.open(start_at(tmp_path))
    group.record(1, {})
    group.close()
    assert [member.calls for member in members] == [["open", "record", "close"]] * 2
