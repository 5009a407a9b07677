"""Run files: what is read, what is overridden, and what the message says when something is wrong."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from crosscoder.errors import ConfigError, FileFormatError, UnknownKey
from crosscoder.training import runfile
from crosscoder.training.config import AcausalConfig, BatchTopKConfig, L1Sparsity, ReLUConfig, RunConfig, SaeConfig

RUN = """
format: crosscoder.run/1
models:
  base: {path: models/base}
  chat: {path: models/chat, dtype: float32}
sources: [base/layers.1.resid_post, chat/layers.1.resid_post]
text:
  tokenizer: chat
  context_length: 64
  mix:
    - {dataset: books.parquet, weight: 0.75}
    - {dataset: talks.parquet, column: messages, chat: true, weight: 0.25}
wiring: {kind: acausal, num_latents: 128}
nonlinearity: {kind: batch_topk, k: 8}
train: {num_tokens: 1e5, batch_size: 256, learning_rate: 1e-3}
"""


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    path = tmp_path / "pair.yaml"
    path.write_text(RUN, encoding="utf-8")
    return path


def write_changed(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({**runfile.parse(RUN), **changes}), encoding="utf-8")
    return path


def test_numbers_are_read_as_people_write_them(run_path: Path) -> None:
    run = RunConfig.load(run_path)
    assert run.train.learning_rate == 0.001
    assert run.train.num_tokens == 100_000
    assert isinstance(run.train.num_tokens, int)
    assert run.out == "runs/pair"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("-2.5E+4", -2.5e4), ("2_000", 2000), ("on", "on"), ("no", "no"), ("true", True)],
)
def test_parse_spares_yaml_surprises(text: str, value: object) -> None:
    parsed = runfile.parse(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("text", ["1.2.3", "1e", "base", "."])
def test_words_stay_words(text: str) -> None:
    assert runfile.parse(text) == text


def test_unknown_keys_name_the_path_and_the_nearest_key(run_path: Path) -> None:
    write_changed(run_path, train={"learning_rat": 1e-3}, batch_size=64)
    with pytest.raises(UnknownKey) as caught:
        RunConfig.load(run_path)
    message = str(caught.value)
    assert "has 2 problems" in message
    assert "train.learning_rat: there is no such key; did you mean train.learning_rate?" in message
    assert "batch_size: there is no such key; did you mean train.batch_size?" in message
    assert "crosscoder train --keys" in message


def test_unknown_keys_inside_lists_and_unions_have_their_real_path(run_path: Path) -> None:
    overrides = ["text.mix.1.wieght=2", "nonlinearity.kk=3", "models.base.revison=main"]
    with pytest.raises(UnknownKey) as caught:
        RunConfig.load(run_path, overrides)
    message = str(caught.value)
    assert "text.mix.1.wieght: there is no such key; did you mean text.mix.1.weight?" in message
    assert "nonlinearity.kk: there is no such key; did you mean nonlinearity.k?" in message
    assert "models.base.revison: there is no such key; did you mean models.base.revision?" in message


def test_all_problems_come_at_once(run_path: Path) -> None:
    overrides = ["train.batch_size=-1", "wiring.kind=acausl", "init.across_sources=some", "nonlinearity.k=ten"]
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(run_path, overrides)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("has 4 problems.")
    assert any(line.startswith("  wiring.kind: expected 'acausal', 'sae', 'transcoder'") for line in lines)
    assert any(
        line.startswith("  train.batch_size: input should be greater than or equal to 1; got -1") for line in lines
    )
    assert any(line.startswith("  init.across_sources:") and "some" in line for line in lines)
    assert any(line.startswith("  nonlinearity.k: input should be a valid integer") for line in lines)


def test_missing_keys_are_named(run_path: Path) -> None:
    raw = runfile.parse(RUN)
    del raw["wiring"], raw["models"]["base"]["path"]
    run_path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(run_path)
    assert "wiring: expected a value; the key is missing" in str(caught.value)
    assert "models.base.path: expected a value; the key is missing" in str(caught.value)


def test_overrides_reach_blocks_lists_and_blocks_that_are_not_there(run_path: Path) -> None:
    overrides = ["sources.1=chat/layers.0.resid_post", "text.mix.0.weight=0.5", "losses.aux.coefficient=0", "seed=3"]
    run = RunConfig.load(run_path, overrides)
    assert run.sources == ("base/layers.1.resid_post", "chat/layers.0.resid_post")
    assert run.text.mix[0].weight == 0.5
    assert run.losses.aux.coefficient == 0.0
    assert run.seed == 3


def test_a_block_without_a_kind_is_of_the_default_one(run_path: Path) -> None:
    write_changed(run_path, nonlinearity={"k": 4})
    assert RunConfig.load(run_path).nonlinearity == BatchTopKConfig(k=4)


def test_the_number_after_the_last_appends(run_path: Path) -> None:
    run = RunConfig.load(run_path, ["sources.2=base/layers.0.resid_post"])
    assert run.sources[2] == "base/layers.0.resid_post"


def test_the_number_after_the_last_appends_a_block_through_a_longer_path(run_path: Path) -> None:
    run = RunConfig.load(run_path, ["text.mix.2.dataset=more.parquet", "text.mix.2.weight=0.5"])
    assert [(part.dataset, part.weight) for part in run.text.mix[1:]] == [
        ("talks.parquet", 0.25),
        ("more.parquet", 0.5),
    ]
    with pytest.raises(ConfigError, match="expected a number from 0 to 2"):
        RunConfig.load(run_path, ["text.mix.3.dataset=more.parquet"])


def test_a_new_kind_drops_keys_it_does_not_accept(run_path: Path) -> None:
    overrides = ["nonlinearity.kind=relu", "sparsity.kind=l1", "sparsity.coefficient=2e-2"]
    run = RunConfig.load(run_path, overrides)
    assert run.nonlinearity == ReLUConfig()
    assert run.sparsity == L1Sparsity(coefficient=0.02)


def test_a_new_kind_keeps_keys_it_accepts_in_either_order(run_path: Path) -> None:
    for overrides in (["nonlinearity.k=4", "nonlinearity.kind=topk"], ["nonlinearity.kind=topk", "nonlinearity.k=4"]):
        run = RunConfig.load(run_path, overrides)
        assert run.nonlinearity.kind == "topk"
        assert run.k == 4


def test_a_key_that_the_new_kind_lacks_is_refused_when_the_user_gives_it(run_path: Path) -> None:
    overrides = ["nonlinearity.k=4", "nonlinearity.kind=relu", "sparsity.kind=l1", "sparsity.coefficient=1"]
    with pytest.raises(UnknownKey, match=r"nonlinearity\.k: there is no such key"):
        RunConfig.load(run_path, overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size", "expected an override as key.path=value"),
        ("sources.7=base/embed", "expected a number from 0 to 2"),
        ("sources.first=base/embed", "expected a number from 0 to 2"),
        ("seed.more=1", "goes inside seed"),
        ("train.batch_size=[1", "is not YAML"),
    ],
)
def test_overrides_that_cannot_be_applied_say_why(run_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.load(run_path, ["seed=1", override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sources.0=other/layers.1.resid_post", "sources: no model is called as in other/layers.1.resid_post"),
        ("sources.0=base/layers.1.residual", "expected a site such as"),
        ("sources.0=chat/layers.2.resid_pre", "sources: every source can be named once"),
        ("text.tokenizer=other", "text.tokenizer: expected one of base, chat; got 'other'"),
        ("nonlinearity.k=129", "expected k of at most the 128 latents it selects from; got 129"),
        ("nonlinearity.kind=relu", "sparsity.kind: expected l1"),
        ("wiring.kind=sae", "wiring.source: expected one of"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(run_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(run_path, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("", ConfigError, "expected keys and values"),
        ("a: [1", ConfigError, "is not YAML"),
        ("seed: 1\nseed: 2", ConfigError, "a key is given twice: seed"),
        ("seed: 1", ConfigError, "does not say its format"),
        ("format: crosscoder.run/2", FileFormatError, "newer version"),
        ("format: crosscoder.labels/1", FileFormatError, "is not a run"),
    ],
)
def test_files_that_are_no_run_files(tmp_path: Path, text: str, kind: type[Exception], message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(kind, match=message):
        RunConfig.load(path)


def test_no_file_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is none"):
        RunConfig.load(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not text"):
        RunConfig.load(tmp_path / "run.yaml")


def test_dump_and_load_give_the_same_run(run_path: Path, tmp_path: Path) -> None:
    run = RunConfig.load(run_path, ["train.learning_rate=1e-5"]).resolved(widths=[32, 32])
    copy = tmp_path / "copy" / "run.yaml"
    run.dump(copy)
    assert RunConfig.load(copy) == run
    written = list(yaml.safe_load(copy.read_text(encoding="utf-8")))
    assert written == list(RunConfig.model_fields)


def test_resolved_derives_what_is_null_and_keeps_what_is_given(run_path: Path) -> None:
    run = RunConfig.load(run_path, ["train.checkpoint_every=7"]).resolved(widths=[32, 48])
    assert run.losses.aux.max_latents == 20
    assert run.losses.aux.dead_after_tokens == 5_000
    assert run.train.num_steps == 390
    assert run.train.checkpoint_every == 7
    assert run.train.evaluate_every == 39
    assert run.train.k_start == 8
    assert run.train.warmup_steps == 20


def test_differences_name_keys_and_both_values(run_path: Path) -> None:
    mine = RunConfig.load(run_path, ["train.batch_size=512", "sources.0=base/layers.0.resid_post"])
    theirs = RunConfig.load(run_path).resolved(widths=[32, 32])
    found = [str(difference) for difference in mine.differences(theirs)]
    assert found == [
        "sources.0: base/layers.0.resid_post / base/layers.1.resid_post",
        "train.batch_size: 512 / 256",
    ]


def test_wirings_build_over_the_sources() -> None:
    from crosscoder.sources import Source, SourceSet

    sources = SourceSet([Source("base", "embed", 4), Source("chat", "embed", 4)])
    assert AcausalConfig(num_latents=8).build(sources).groups[0].reads == sources.keys
    assert SaeConfig(num_latents=8, source="chat").build(sources).groups[0].reads == ("chat/embed",)


def test_every_key_has_a_description() -> None:
    keys = runfile.keys(RunConfig)
    assert {"models.*.path", "text.mix.*.weight", "wiring.num_latents", "losses.aux.max_latents"} <= {
        k.path for k in keys
    }
    assert [key.path for key in keys if not key.description] == []
