"""What the live stream costs beside the bare forward passes that it cannot do without.

Per setting, on the same contexts, taking turns in one process:

    bare      the contexts, tokenised and padded beforehand, through the models up to the deepest site; nothing captured
    stream    `ActivationStream.batches`, end to end: text, tokens, forwards, hooks, buffer, shuffle, fp32 batches

and the parts of the stream, each alone: text (reading and tokenising), padding, capture (forwards with hooks, rows
checked and written into the buffer) and serving (shuffled batches in fp32). Figures are medians over rounds; the ratio
is the median of each round's own. Aim: the stream costs at most 15 % over the bare forwards.

Settings: the shipped pair on its own text; and a wider Llama with random weights that reads three sites in float32.

    python benchmarks/capture.py                      # about a minute on two cores
    python benchmarks/capture.py --write REPORT.md    # the same, as a report
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import crosscoder
from crosscoder.capture import ActivationStream, Corpus, StudiedModel
from crosscoder.capture.buffer import RowBuffer, bytes_per_row
from crosscoder.capture.fills import FillPlan, Stretch
from crosscoder.capture.harvest import Harvest, storage_dtype
from crosscoder.capture.padding import padded_batches
from crosscoder.capture.readers import ContextReader, reader_of
from crosscoder.demo.run import run_config
from crosscoder.sources import SourceSet
from crosscoder.training.run import Study

BATCH_SIZE = 1024
BATCH_TOKENS = 4096
POOL_TOKENS = 64 * BATCH_TOKENS
PARTS = ("bare", "stream", "text", "padding", "capture", "serving")


@dataclass(frozen=True)
class Setting:
    """Models, sources and text, and how many rows one fill of the buffer holds."""

    name: str
    models: Mapping[str, StudiedModel]
    sources: SourceSet
    corpus: Corpus
    rows: int

    @property
    def harvest(self) -> Harvest:
        """The forward passes of its stream."""
        return Harvest(self.models, self.sources, BATCH_TOKENS, storage_dtype(self.models))

    def stream(self) -> ActivationStream:
        """Its stream."""
        row = bytes_per_row(self.sources.width, storage_dtype(self.models))
        return ActivationStream(self.models, self.sources, self.corpus, buffer_bytes=row * self.rows)

    def fills(self) -> Iterator[list[Stretch]]:
        """What each fill of that stream reads, one fill after the other."""
        forward = self.harvest.forward_tokens
        plan = FillPlan(self.rows, self.corpus.context_length, POOL_TOKENS, forward)
        stretches = plan.stretches(reader_of(self.corpus))
        while True:
            fill = [next(stretches)]
            while fill[-1].end is None:
                fill.append(next(stretches))
            yield fill


@dataclass
class Seconds:
    """Seconds per row of each part, round by round: of the clock, and of this process on all cores together.

    The second hardly changes when others use the machine, so that the ratio of both says what the clock may hide.
    """

    of: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    cpu: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})

    @contextmanager
    def measuring(self, part: str, num_rows: int) -> Iterator[None]:
        """Times what is done inside."""
        began, spent = time.perf_counter(), time.process_time()
        yield
        self.of[part].append((time.perf_counter() - began) / num_rows)
        self.cpu[part].append((time.process_time() - spent) / num_rows)

    def ratios(self, kind: Literal["of", "cpu"]) -> str:
        """Stream over bare, round by round: median, lowest, highest."""
        kept = getattr(self, kind)
        ratios = [s / b for s, b in zip(kept["stream"], kept["bare"], strict=True)]
        return f"{median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"


def main() -> None:
    """Measure and print, or write the report."""
    parser = argparse.ArgumentParser(description="What the live stream costs beside the bare forward passes.")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    found = {setting.name: measure(setting, options.rounds) for setting in (demo_pair(), wide_model())}
    report = as_markdown(found, options.rounds)
    if options.write:
        options.write.write_text(report, encoding="utf-8")
    print(report)


def demo_pair() -> Setting:
    """The shipped pair, as `crosscoder demo` reads it."""
    study = Study.open(run_config(Path("unused")))
    return Setting("demo pair, 2 × 256 wide, bfloat16", study.models, study.sources, study.corpus, rows=8_000)


def wide_model() -> Setting:
    """A Llama 768 wide with random weights, read at three sites of its first four layers, on the demo's text."""
    run = run_config(Path("unused"))
    tokenizer = StudiedModel.load("chat", run.models["chat"]).tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=12,
        max_position_embeddings=512,
    )
    studied = StudiedModel("wide", LlamaForCausalLM(config), tokenizer)
    sites = ("layers.1.resid_post", "layers.3.mlp_in", "layers.3.resid_post")
    text = run.text.model_copy(update={"context_length": 512, "packing": "contiguous"})
    sources = SourceSet(studied.source(site) for site in sites)
    return Setting(
        "random Llama, 768 wide, 3 sites, float32", {"wide": studied}, sources, Corpus(text, tokenizer, seed=0), 1_500
    )


def measure(setting: Setting, rounds: int) -> Seconds:
    """The first fill warms up; then every round takes a new fill, bare and streamed in turns."""
    seconds, stream, fills = Seconds(), setting.stream(), setting.fills()
    reader = reader_of(setting.corpus)
    buffer = RowBuffer(setting.rows, setting.sources.width, dtype=setting.harvest.dtype, device=setting.harvest.device)
    for number in range(rounds + 1):
        fill = next(fills)
        kept = seconds if number else Seconds()
        turns: list[Callable[[Setting, list[Stretch], Seconds], None]] = [_bare, _Streamed(stream)]
        for turn in turns if number % 2 else reversed(turns):
            turn(setting, fill, kept)
        _parts(setting, fill, kept, buffer)
        _text(setting, reader, kept)
    return seconds


def _rows(fill: list[Stretch]) -> int:
    return sum(batch.num_rows for stretch in fill for batch in stretch.batches)


def _bare(setting: Setting, fill: list[Stretch], seconds: Seconds) -> None:
    deepest = {
        alias: max((s.site for s in setting.sources if s.model == alias), key=list(studied.sites()).index)
        for alias, studied in setting.models.items()
    }
    with seconds.measuring("bare", _rows(fill)):
        for batch in (batch for stretch in fill for batch in stretch.batches):
            for alias, studied in setting.models.items():
                studied.read([deepest[alias]], batch.ids)


@dataclass(frozen=True)
class _Streamed:
    """One whole fill of a stream, in batches."""

    stream: ActivationStream

    def __call__(self, _setting: Setting, fill: list[Stretch], seconds: Seconds) -> None:
        whole, rest = divmod(_rows(fill), BATCH_SIZE)
        with seconds.measuring("stream", _rows(fill)):
            for _, batch in zip(range(whole), self.stream.batches(BATCH_SIZE), strict=False):
                assert batch.x.dtype == torch.float32
            if rest:
                next(self.stream.batches(rest))


def _parts(setting: Setting, fill: list[Stretch], seconds: Seconds, buffer: RowBuffer) -> None:
    buffer.clear()
    harvest = setting.harvest
    with seconds.measuring("capture", _rows(fill)):
        for stretch in fill:
            harvest.finish([harvest.read(batch, buffer.reserve(batch.rows)) for batch in stretch.batches])
    with seconds.measuring("serving", _rows(fill)):
        for chosen in torch.randperm(buffer.num_rows).split(BATCH_SIZE):
            buffer.take(chosen)


def _text(setting: Setting, reader: ContextReader, seconds: Seconds) -> None:
    with seconds.measuring("text", setting.rows):
        pool = reader.pool(setting.rows)
    with seconds.measuring("padding", setting.rows):
        list(padded_batches(pool, most_tokens=setting.harvest.forward_tokens))


def as_markdown(found: Mapping[str, Seconds], rounds: int) -> str:
    """The report."""
    about = (
        f"version {crosscoder.__version__} · torch {torch.__version__} · {platform.machine()}, "
        f"{torch.get_num_threads()} threads · {rounds} rounds, one fill each"
    )
    lines = [f"# Capture: the stream beside the bare forward, {datetime.now(UTC):%Y-%m-%d}", "", about, ""]
    lines += ["Stream over bare: median of rounds [lowest, highest].", ""]
    lines += ["| | bare, rows/s | stream, rows/s | by the clock | by CPU time |", "|---|---|---|---|---|"]
    for name, seconds in found.items():
        bare, stream = (1 / median(seconds.of[part]) for part in ("bare", "stream"))
        lines.append(f"| {name} | {bare:,.0f} | {stream:,.0f} | {seconds.ratios('of')} | {seconds.ratios('cpu')} |")
    lines += ["", "CPU time of each part, alone, in percent of the bare forward's:", ""]
    lines += ["| | text | padding | capture | serving |", "|---|---|---|---|---|"]
    for name, seconds in found.items():
        bare = median(seconds.cpu["bare"])
        cells = [f"{median(seconds.cpu[part]) / bare:.1%}" for part in PARTS[2:]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
