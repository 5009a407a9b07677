"""The live stream: the right rows, shuffled, from a buffer that refills, bounded, and resumable bit for bit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.families import build
from capture.texts import text_config, write_jsonl
from conftest import build_toy_model, build_toy_tokenizer, toy_texts
from crosscoder.activations import Batch
from crosscoder.capture import ActivationStream, AnalysisSet, Corpus, HeldOutConfig, StudiedModel
from crosscoder.errors import (
    ConfigError,
    NonFiniteActivations,
    RunConflict,
    SourceMismatch,
    TextError,
    TokenizerMismatch,
    UnknownSource,
    UnsupportedSite,
)
from crosscoder.sources import Source, SourceSet

SITES = ("base/layers.0.resid_post", "base/layers.1.mlp_in", "chat/layers.0.resid_post")
ROW_BYTES = 3 * 32 * 4 + 13


@pytest.fixture(scope="module")
def models() -> dict[str, StudiedModel]:
    tokenizer = build_toy_tokenizer()
    return {alias: StudiedModel(alias, build_toy_model(seed), tokenizer) for alias, seed in (("base", 0), ("chat", 1))}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Corpus]:
    path = write_jsonl(tmp_path_factory.mktemp("stream") / "a.jsonl", "text", toy_texts(60))

    def corpus(**settings: Any) -> Corpus:
        held_out = HeldOutConfig(fraction=0.3, num_tokens=400)
        return Corpus(text_config(path, held_out=held_out, **settings), build_toy_tokenizer(), seed=0)

    return corpus


def sources(models: dict[str, StudiedModel]) -> SourceSet:
    return SourceSet(models[key.split("/")[0]].source(key.split("/")[1]) for key in SITES)


def stream(
    models: dict[str, StudiedModel], text: Corpus | AnalysisSet, *, rows: int = 200, **more: Any
) -> ActivationStream:
    return ActivationStream(
        models, sources(models), text, **{"buffer_bytes": rows * ROW_BYTES, "batch_tokens": 64, "seed": 0} | more
    )


def places(batch: Batch) -> list[tuple[int, int]]:
    return list(zip(batch.rows.context.tolist(), batch.rows.position.tolist(), strict=True))


def assert_same(a: Batch, b: Batch) -> None:
    assert torch.equal(a.x, b.x) and places(a) == places(b) and torch.equal(a.rows.role, b.rows.role)


@pytest.mark.parametrize("packing", ["contiguous", "document"])
def test_rows_are_the_models_activations(models: Any, corpora: Any, packing: str) -> None:
    corpus = corpora(packing=packing)
    contexts = list(islice(corpus.training(), 60))
    for batch in islice(stream(models, corpus).batches(50), 6):
        assert batch.x.shape == (50, 96) and batch.x.dtype == torch.float32
        by_source = sources(models).unpack(batch.x)
        for row, (number, position) in enumerate(places(batch)):
            tokens = contexts[number].tokens
            assert tokens.kept[position] and tokens.roles[position] == batch.rows.role[row]
            ids = torch.from_numpy(tokens.ids).long()[None]
            for key in SITES if row % 10 == 0 else ():
                alias, site = key.split("/")
                expected = models[alias].read([site], ids)[site][0, position]
                torch.testing.assert_close(by_source[key][row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("passes", [1, 3])
def test_the_buffer_refills_and_serves_every_row(models: Any, corpora: Any, passes: int) -> None:
    seen: Counter[tuple[int, int]] = Counter()
    for batch in islice(stream(models, corpora(), passes=passes).batches(64), 40):
        seen.update(places(batch))
    last = max(context for context, _ in seen)
    assert sum(seen.values()) == 40 * 64
    done = [count for (context, _), count in seen.items() if context < last - 2 * 13]
    assert set(done) == {passes}
    assert last * 15 > 40 * 64 / passes - 15, "the stream must go on through the text"


def test_rows_of_a_fill_are_shuffled_and_passes_differ(models: Any, corpora: Any) -> None:
    one = stream(models, corpora(), rows=160, passes=2)
    first, second = (places(batch) for batch in islice(one.batches(150), 2))
    assert sorted(first) == sorted(second) and first != second != sorted(second)


def test_memory_is_bounded(models: Any, corpora: Any) -> None:
    one = stream(models, corpora(), rows=123)
    next(one.batches(10))
    held = [one._buffer._x, *one._buffer._places.values()]
    assert sum(tensor.nbytes for tensor in held) <= 123 * ROW_BYTES
    assert 123 - 16 < one._buffer.num_rows <= 123 and one.bytes_per_row == ROW_BYTES


def test_the_buffer_keeps_the_models_dtype(corpora: Any) -> None:
    studied = StudiedModel("base", build_toy_model(0).to(torch.bfloat16), build_toy_tokenizer())
    small = SourceSet([studied.source("embed")])
    one = ActivationStream({"base": studied}, small, corpora(), buffer_bytes=10_000)
    batch = next(one.batches(8))
    assert one.bytes_per_row == 2 * 32 + 13 and batch.x.dtype == torch.float32
    assert torch.equal(batch.x, batch.x.bfloat16().float())


@settings(max_examples=10, deadline=None)
@given(taken=st.integers(0, 25), passes=st.sampled_from([1, 2]), packing=st.sampled_from(["contiguous", "document"]))
def test_resuming_equals_never_having_stopped(models: Any, corpora: Any, taken: int, passes: int, packing: str) -> None:
    whole = stream(models, corpora(packing=packing), passes=passes)
    batches = whole.batches(37)
    for _ in range(taken):
        next(batches)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = stream(models, corpora(packing=packing), passes=passes)
    resumed.load_state_dict(state)
    again = resumed.batches(37)
    for _ in range(12):
        assert_same(next(batches), next(again))
    assert resumed.state_dict() == whole.state_dict()


def test_going_back_in_one_stream(models: Any, corpora: Any) -> None:
    one = stream(models, corpora())
    state = one.state_dict()
    first = list(islice(one.batches(50), 9))
    one.load_state_dict(state)
    for before, after in zip(first, one.batches(50), strict=False):
        assert_same(before, after)


def test_the_seed_shuffles_and_nothing_else(models: Any, corpora: Any) -> None:
    a, b, c = (next(stream(models, corpora(), seed=seed).batches(150)) for seed in (0, 0, 1))
    assert_same(a, b)
    assert places(a) != places(c)


def test_contexts_come_in_text_order(models: Any, corpora: Any) -> None:
    held = corpora(packing="document").held_out()
    one = stream(models, held)
    state = one.state_dict()
    batches = list(one.contexts())
    found = [place for batch in batches for place in places(batch)]
    kept = [(number, int(p)) for number, c in enumerate(held) for p in c.tokens.kept.nonzero()[0]]
    assert found == kept and len(batches) > 1 and one.state_dict() == state
    shuffled = next(one.batches(30))
    ordered = {place: x for batch in batches for place, x in zip(places(batch), batch.x, strict=True)}
    for place, x in zip(places(shuffled), shuffled.x, strict=True):
        torch.testing.assert_close(ordered[place], x, rtol=1e-4, atol=1e-5)


def test_an_analysis_set_is_served_again_and_again(models: Any, corpora: Any) -> None:
    held = corpora().held_out()
    seen = Counter(
        place for batch in islice(stream(models, held, rows=10_000).batches(100), 12) for place in places(batch)
    )
    assert len(seen) == int(held.kept.sum()) and max(seen.values()) - min(seen.values()) <= 1


def test_a_corpus_has_contexts_too(models: Any, corpora: Any) -> None:
    found = [place for batch in islice(stream(models, corpora()).contexts(), 5) for place in places(batch)]
    assert found == sorted(found) and found[0] == (0, 1)


def test_nan_is_named(models: Any, corpora: Any) -> None:
    broken = build_toy_model(0)
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight[3, 3] = float("inf")
    studied = StudiedModel.__new__(StudiedModel)
    healthy = StudiedModel("chat", build_toy_model(0), build_toy_tokenizer())
    studied.__dict__.update(healthy.__dict__)
    healthy.model.load_state_dict(broken.state_dict())
    with pytest.raises(NonFiniteActivations, match=r"(?s)chat/layers\.0\.resid_post.*float32.*models\.chat\.dtype"):
        next(stream({**models, "chat": healthy}, corpora()).batches(10))


def test_other_tokenizers_are_refused(models: Any, corpora: Any) -> None:
    other = build_toy_tokenizer()
    other.add_tokens(["<|new|>"])
    studied = StudiedModel("chat", build_toy_model(1), other)
    with pytest.raises(TokenizerMismatch, match=r"(?s)chat: 401 tokens.*'<\|new\|>': None in base, 400 in chat"):
        stream({**models, "chat": studied}, corpora())


def test_sources_must_fit_the_models(models: Any, corpora: Any) -> None:
    for source, error in (
        (Source("other", "embed", 32), UnknownSource),
        (Source("base", "layers.7.resid_post", 32), UnsupportedSite),
        (Source("base", "embed", 64), SourceMismatch),
    ):
        with pytest.raises(error):
            ActivationStream(models, SourceSet([source]), corpora())


def test_settings_that_cannot_work(models: Any, corpora: Any) -> None:
    with pytest.raises(ConfigError, match=r"(?s)at least one context.*Give it at least 6,352 bytes"):
        stream(models, corpora(), rows=10)
    with pytest.raises(ConfigError, match="at most 256 tokens"):
        stream(models, corpora(context_length=300), rows=400)
    with pytest.raises(TextError, match="became a row"):
        silent = corpora().held_out()
        silent.kept.zero_()
        next(stream(models, silent).batches(4))


def test_a_place_in_another_stream_is_refused(models: Any, corpora: Any) -> None:
    state = stream(models, corpora()).state_dict()
    with pytest.raises(RunConflict, match="these settings"):
        stream(models, corpora(), seed=1).load_state_dict(state)


def test_an_encoder_streams_too(corpora: Any) -> None:
    studied = StudiedModel("base", build("bert").float(), build_toy_tokenizer())
    one = ActivationStream(
        {"base": studied},
        SourceSet([studied.source("layers.1.mlp_out")]),
        corpora(packing="document"),
        buffer_bytes=30_000,
    )
    assert next(one.batches(32)).x.isfinite().all()


def test_models_of_different_widths(models: Any, corpora: Any, toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    wide = StudiedModel("chat", build_toy_model(2, width=64), toy_tokenizer)
    both = SourceSet([models["base"].source("embed"), wide.source("layers.1.resid_post")])
    one = ActivationStream({"base": models["base"], "chat": wide}, both, corpora(), buffer_bytes=50_000)
    assert next(one.batches(16)).x.shape == (16, 96)
