"""Work done ahead: in order, by one thread that ends, and the stream's text through it."""

from __future__ import annotations

import gc
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from capture.families import build
from capture.texts import text_config, write_jsonl
from conftest import build_toy_model, build_toy_tokenizer, toy_texts
from crosscoder.capture import ActivationStream, Corpus, HeldOutConfig, StudiedModel
from crosscoder.capture.ahead import Ahead
from crosscoder.capture.carrying import Carrier
from crosscoder.capture.fills import FillPlan, Stretch
from crosscoder.capture.harvest import Harvest
from crosscoder.capture.padding import padded_batches
from crosscoder.capture.readers import CorpusReader
from crosscoder.errors import TextError
from crosscoder.sources import SourceSet

PATIENCE = 20.0


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether something becomes true; no time is measured, only given."""
    deadline = time.monotonic() + PATIENCE
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.005)
    return holds()


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("crosscoder-ahead")]


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    gc.collect()
    yield
    gc.collect()
    assert eventually(lambda: workers() == []), "a thread outlived its owner"


@pytest.fixture
def studied() -> StudiedModel:
    return StudiedModel("base", build_toy_model(0), build_toy_tokenizer())


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    path = write_jsonl(tmp_path / "a.jsonl", "text", toy_texts(60))
    config = text_config(path, held_out=HeldOutConfig(fraction=0.3, num_tokens=400))
    return Corpus(config, build_toy_tokenizer(), seed=0)


def stream_of(studied: StudiedModel, corpus: Corpus, *, rows: int = 150) -> ActivationStream:
    sources = SourceSet([studied.source("layers.0.resid_post")])
    return ActivationStream({"base": studied}, sources, corpus, buffer_bytes=rows * (32 * 4 + 13), batch_tokens=64)


# The thread


def test_items_come_in_order_and_only_so_many_are_made_ahead() -> None:
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for number in count():
            made.append(number)
            yield number

    ahead = Ahead(numbers(), depth=3)
    assert eventually(lambda: len(made) == 3)
    assert [ahead.take() for _ in range(50)] == list(range(50))
    assert eventually(lambda: len(made) == 53)
    assert len(made) == 53 and threading.current_thread() not in workers()


def test_an_error_is_raised_where_its_item_would_have_come() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise TextError("line 7 is not JSON.", hint="Correct it.")

    ahead = Ahead(failing(), depth=4)
    assert ahead.take() == 1
    with pytest.raises(TextError, match=r"^line 7 is not JSON\.\n  Correct it\.$"):
        ahead.take()


def test_closing_gives_up_what_is_not_begun() -> None:
    begun, go_on = threading.Event(), threading.Event()
    made: list[int] = []

    def slow() -> Iterator[int]:
        for number in count():
            begun.set()
            assert go_on.wait(PATIENCE)
            made.append(number)
            yield number

    ahead = Ahead(slow(), depth=5)
    assert begun.wait(PATIENCE)
    ahead.close()
    go_on.set()
    assert eventually(lambda: workers() == []) and made == [0]


def test_the_thread_ends_when_its_owner_is_dropped() -> None:
    ahead = Ahead(count(), depth=2)
    ahead.take()
    assert len(workers()) == 1
    del ahead
    gc.collect()
    assert eventually(lambda: workers() == [])


FORGOTTEN = """
from itertools import count
from crosscoder.capture.ahead import Ahead
kept_to_the_end = Ahead(count(), depth=2)
print(kept_to_the_end.take())
"""


def test_a_program_can_end_with_one_still_open() -> None:
    done = subprocess.run([sys.executable, "-c", FORGOTTEN], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


# The stream


def test_text_is_read_by_another_thread_and_ahead_of_the_models(studied: StudiedModel, corpus: Corpus) -> None:
    readers: set[str] = set()
    encode = corpus.encoder.encode

    def noted(*arguments: Any, **settings: Any) -> Any:
        readers.add(threading.current_thread().name)
        return encode(*arguments, **settings)

    object.__setattr__(corpus.encoder, "encode", noted)
    stream = stream_of(studied, corpus)
    next(stream.batches(10))
    assert len(readers) == 1 and readers.pop().startswith("crosscoder-ahead")


def test_a_stream_that_only_gives_contexts_starts_no_thread(studied: StudiedModel, corpus: Corpus) -> None:
    stream = stream_of(studied, corpus)
    assert next(stream.contexts()).x.isfinite().all() and workers() == []


def test_places_do_not_know_how_far_the_text_was_read_ahead(studied: StudiedModel, corpus: Corpus) -> None:
    stream = stream_of(studied, corpus)
    before = stream.state_dict()
    batches = stream.batches(30)
    next(batches)
    assert stream.state_dict()["text"] == before["text"], "the place of the text is that of the fill being served"
    plan = FillPlan(150, corpus.context_length, 64 * 64, 64)
    reader, fills = CorpusReader(corpus), []
    for stretch in islice(plan.stretches(reader), 40):
        fills += [stretch.end] if stretch.end is not None else []
    while stream.state_dict()["fill"] < 3:
        next(batches)
    assert stream.state_dict()["text"] == fills[2]


def test_resuming_in_every_fill_gives_the_same_batches(studied: StudiedModel, corpus: Corpus) -> None:
    whole = stream_of(studied, corpus)
    batches, states = [], []
    for batch in islice(whole.batches(41), 15):
        batches.append(batch)
        states.append(json.loads(json.dumps(whole.state_dict())))
    other = stream_of(studied, corpus)
    for number in (11, 2, 6, 6, 13, 0):  # back and forth in one stream, too
        other.load_state_dict(states[number])
        assert torch.equal(next(other.batches(41)).x, batches[number + 1].x)


def test_an_error_of_the_reading_thread_surfaces_with_its_own_message(studied: StudiedModel, corpus: Corpus) -> None:
    stream = stream_of(studied, corpus)
    first = next(stream.batches(20))
    state = stream.state_dict()
    encode = corpus.encoder.encode

    def broken(*arguments: Any, **settings: Any) -> Any:
        raise TextError("the disk with the text is gone.")

    object.__setattr__(corpus.encoder, "encode", broken)
    with pytest.raises(TextError, match=r"^the disk with the text is gone\.$"):
        for _ in stream.batches(500):
            pass
    object.__setattr__(corpus.encoder, "encode", encode)
    stream.load_state_dict(state)
    other = stream_of(studied, corpus)
    assert torch.equal(next(other.batches(20)).x, first.x)
    assert torch.equal(next(other.batches(200)).x, next(stream.batches(200)).x), "and it goes on once that is mended"


def test_an_interrupted_fill_is_begun_anew(studied: StudiedModel, corpus: Corpus) -> None:
    stream = stream_of(studied, corpus)
    asked = iter([True])

    def interrupting(description: str, done: int, total: int | None) -> None:
        if done > 60 and next(asked, False):
            raise KeyboardInterrupt

    stream._progress = interrupting
    with pytest.raises(KeyboardInterrupt):
        next(stream.batches(20))
    assert torch.equal(next(stream.batches(90)).x, next(stream_of(studied, corpus).batches(90)).x)


def test_contexts_leave_the_batches_alone_while_text_is_read_ahead(studied: StudiedModel, corpus: Corpus) -> None:
    alone = list(islice(stream_of(studied, corpus).batches(40), 8))
    stream, seen = stream_of(studied, corpus), []
    contexts = stream.contexts()
    for batch in islice(stream.batches(40), 8):
        seen.append(batch)
        next(contexts)
    assert all(torch.equal(a.x, b.x) for a, b in zip(alone, seen, strict=True))


def test_what_its_owner_does_with_the_tokenizer_changes_nothing(studied: StudiedModel, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", "text", toy_texts(60))
    tokenizer = build_toy_tokenizer()
    corpus = Corpus(text_config(path), tokenizer, seed=0)
    expected = [context.tokens.ids.tolist() for context in islice(corpus.training(), 20)]
    tokenizer(["one", "two of them"], padding="max_length", max_length=40, truncation=True)
    tokenizer.add_tokens(["the old house"])
    assert [context.tokens.ids.tolist() for context in islice(corpus.training(), 20)] == expected


def test_epochs_are_logged_from_the_thread_too(
    studied: StudiedModel, corpus: Corpus, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        for _ in islice(stream_of(studied, corpus, rows=1000).batches(1000), 12):
            pass
    assert any("epoch 2 begins" in message for message in caplog.messages)


# Forward passes


def test_padded_batches_hold_every_kept_token_once(corpus: Corpus) -> None:
    by_document = Corpus(corpus.config.model_copy(update={"packing": "document"}), corpus.tokenizer, seed=0)
    contexts = list(enumerate(islice(by_document.training(), 30)))
    batches = list(padded_batches(contexts, most_tokens=48))
    found = sorted(
        (c, p, int(r), int(batch.ids.flatten()[place]))
        for batch in batches
        for place, c, p, r in zip(
            range(batch.ids.numel()) if batch.picked is None else batch.picked.tolist(),
            batch.rows.context.tolist(), batch.rows.position.tolist(), batch.rows.role.tolist(), strict=True,
        )
    )  # fmt: skip
    expected = [
        (number, int(p), int(c.tokens.roles[p]), int(c.tokens.ids[p]))
        for number, c in contexts
        for p in c.tokens.kept.nonzero()[0]
    ]
    assert found == expected and all(batch.ids.numel() <= 48 for batch in batches)
    assert any(batch.mask is not None for batch in batches) and any(batch.mask is None for batch in batches)


def test_a_batch_without_rows_is_left_out(corpus: Corpus) -> None:
    context = next(corpus.training())
    context.tokens.kept[:] = False
    assert list(padded_batches([(0, context)], most_tokens=64)) == []


def test_fills_are_cut_alike_whatever_a_forward_takes(corpus: Corpus) -> None:
    def fill(forward_tokens: int) -> list[Stretch]:
        stretches = FillPlan(150, 16, 4096, forward_tokens).stretches(CorpusReader(corpus))
        return list(islice(stretches, 4))

    def rows(stretches: list[Stretch]) -> list[tuple[list[int], list[int]]]:
        columns = [batch.rows for stretch in stretches for batch in stretch.batches]
        return [
            (torch.cat([r.context for r in columns]).tolist(), torch.cat([r.position for r in columns]).tolist()),
        ]

    small, large = fill(16), fill(256)
    assert rows(small) == rows(large)
    assert [stretch.end for stretch in small] == [stretch.end for stretch in large]
    assert sum(len(stretch.batches) for stretch in small) > sum(len(stretch.batches) for stretch in large)


def test_forward_passes_on_the_cpu_are_small(studied: StudiedModel) -> None:
    sources = SourceSet([studied.source("embed")])
    sizes = [Harvest({"base": studied}, sources, size, torch.float32).forward_tokens for size in (64, 4096)]
    assert sizes == [64, 1024]


def test_causal_models_are_told_from_others(studied: StudiedModel) -> None:
    assert studied.is_causal
    assert not StudiedModel("bert", build("bert").float(), build_toy_tokenizer()).is_causal


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_padding_never_reaches_a_row(name: str, corpus: Corpus) -> None:
    model = build_toy_model(0) if name == "llama" else build("bert").float()
    studied = StudiedModel("base", model, build_toy_tokenizer())
    site = "layers.1.resid_post"
    text = Corpus(corpus.config.model_copy(update={"packing": "document"}), corpus.tokenizer, seed=0)
    contexts = list(enumerate(islice(text.training(), 24)))
    assert len({len(context) for _, context in contexts}) > 1
    harvest = Harvest({"base": studied}, SourceSet([studied.source(site)]), 4096, torch.float32)
    (batch,) = harvest.rows(contexts)
    assert batch.rows is not None
    for row in range(0, len(batch.x), 17):
        number, position = int(batch.rows.context[row]), int(batch.rows.position[row])
        alone = studied.read([site], torch.from_numpy(contexts[number][1].tokens.ids).long()[None])[site]
        torch.testing.assert_close(batch.x[row], alone[0, position], rtol=1e-4, atol=1e-5)


def test_carrying_on_the_cpu_is_a_copy() -> None:
    activations, rows = torch.randn(3, 4).bfloat16(), torch.zeros(3, 9)
    carrier = Carrier()
    carrier.carry(activations, rows[:, 2:6])
    carrier.finish()
    assert torch.equal(rows[:, 2:6], activations.float()) and rows[:, [0, 1, 6, 7, 8]].eq(0).all()


class Remote(torch.Tensor):
    """Stands for a tensor on a GPU: notes what is done to it, and on which streams."""

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.where

    @property
    def is_cuda(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return True

    def copy_(self, other: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        self.log.append(("copy", *sorted(self.current.values()), non_blocking))
        return self

    def record_stream(self, s: Any) -> None:
        self.log.append(("kept for", s.name))


def test_between_gpus_copies_have_streams_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fakes: the order of events that a real GPU would be given."""
    log: list[tuple[Any, ...]] = []
    current = {torch.device("cuda", number): f"compute {number}" for number in (0, 1)}

    class Stream:
        def __init__(self, device: torch.device, name: str | None = None) -> None:
            self.device, self.name = device, name or f"copies {device.index}"

        def wait_stream(self, other: Stream) -> None:
            log.append((self.name, "waits for", other.name))

    @contextmanager
    def stream(of: Stream) -> Iterator[None]:
        before, current[of.device] = current[of.device], of.name
        yield
        current[of.device] = before

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device, current[device]))
    here, there = (torch.zeros(2).as_subclass(Remote) for _ in range(2))
    for tensor, number in ((here, 0), (there, 1)):
        tensor.where, tensor.log, tensor.current = torch.device("cuda", number), log, current
    carrier = Carrier()
    for _ in range(2):
        carrier.carry(there, here)
    once = [
        ("copies 1", "waits for", "compute 1"),
        ("copies 0", "waits for", "compute 0"),
        ("copy", "copies 0", "copies 1", True),
        ("kept for", "copies 1"),
        ("kept for", "copies 0"),
    ]
    assert log == once + once, (
        "a copy waits for the forward that it belongs to, on streams that forwards never wait for"
    )
    log.clear()
    carrier.finish()
    assert sorted(log) == [("compute 0", "waits for", "copies 0"), ("compute 1", "waits for", "copies 1")]
    log.clear()
    carrier.carry(here, here)
    assert log == [("copy", "compute 0", "compute 1", False)], "on one device, copies are in the order of its work"
