"""One's own prompts: read, rendered and encoded as the models see them, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from capture.tokenizers_of_kinds import byte_level
from crosscoder.activations import ROLES
from crosscoder.analysis.contrasts import fires_on
from crosscoder.analysis.prompt_facts import EncodedPrompts, latent_facts
from crosscoder.analysis.prompt_page import prompt_page
from crosscoder.analysis.prompt_text import parse_prompt, prompt_text, read_prompts
from crosscoder.analysis.prompts import PromptCode, encode_for_run, encode_prompts
from crosscoder.analysis.statistics import LatentStatistics
from crosscoder.analysis.tables import write_table
from crosscoder.capture.models import StudiedModel
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ConfigError, FileFormatError, ModelMismatch, TextError

from .worlds import random_crosscoder

PROMPTS = ["how do I mend a clock?", "the old house <b>stood</b> at the end of a long lane", "rain & rain"]
DIALOGUE = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "a dog?"},
    {"role": "assistant", "content": "a small brown dog"},
]


@pytest.fixture
def crosscoder() -> Crosscoder:
    return random_crosscoder((32, 32), num_latents=24)


@pytest.fixture
def code(crosscoder: Crosscoder, pair: dict[str, StudiedModel]) -> PromptCode:
    return encode_prompts(crosscoder, pair, PROMPTS)


def roles_of(prompt: object, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    """Runs of tokens of one role, joined."""
    made = prompt_text([prompt], tokenizer)  # type: ignore[list-item]
    runs: list[tuple[str, str]] = []
    for role, piece in zip(made.contexts.roles.tolist(), made.pieces, strict=True):
        if runs and runs[-1][0] == ROLES[role]:
            runs[-1] = ROLES[role], runs[-1][1] + piece
        else:
            runs.append((ROLES[role], piece))
    return runs


def test_codes_are_those_of_the_tokens_that_the_chat_template_gives(
    code: PromptCode, crosscoder: Crosscoder, pair: dict[str, StudiedModel]
) -> None:
    """Read from the models once more, one prompt at a time, without padding or the stream."""
    tokenizer = pair["base"].tokenizer
    for number, prompt in enumerate(PROMPTS):
        rendered = f"<|bos|><|user|>{prompt}<|end|><|assistant|>"
        ids = torch.tensor([tokenizer(rendered, add_special_tokens=False)["input_ids"]])
        assert code.text.contexts.context(number).tokens.ids.tolist() == ids[0].tolist()
        parts = {f"{alias}/embed": model.read(["embed"], ids)["embed"][0, 1:] for alias, model in pair.items()}
        expected = crosscoder.encode(crosscoder.sources.pack(parts)).to_dense()
        rows = code.rows.context == number
        torch.testing.assert_close(code.code.to_dense()[rows], expected, rtol=1e-5, atol=1e-6)
        assert code.rows.position[rows].tolist() == list(range(1, ids.shape[1]))
    assert code.code.num_active > 0


def test_roles_and_the_opening_of_a_reply(toy_tokenizer: PreTrainedTokenizerFast) -> None:
    assert roles_of("a dog?", toy_tokenizer) == [
        ("template", "<|bos|><|user|>"),
        ("user", "a dog?"),
        ("template", "<|end|><|assistant|>"),
    ]
    assert roles_of(DIALOGUE, toy_tokenizer) == [
        ("template", "<|bos|><|system|>"),
        ("system", "be kind"),
        ("template", "<|end|><|user|>"),
        ("user", "a dog?"),
        ("template", "<|end|><|assistant|>"),
        ("assistant", "a small brown dog"),
        ("template", "<|end|>"),
    ]


def test_raw_text_stands_as_it_is_special_tokens_included(toy_tokenizer: PreTrainedTokenizerFast) -> None:
    made = prompt_text(["<|user|>a dog?<|end|>"], toy_tokenizer, rendering="raw")
    assert made.pieces[:2] == ("<|bos|>", "<|user|>") and made.pieces[-1] == "<|end|>"
    assert set(made.contexts.roles[1:].tolist()) == {ROLES.index("text")}


def test_a_tokenizer_without_template_reads_raw(toy_tokenizer: PreTrainedTokenizerFast) -> None:
    from copy import deepcopy

    plain = deepcopy(toy_tokenizer)
    plain.chat_template = None
    assert prompt_text(["a dog?"], plain).rendering == "raw"
    with pytest.raises(TextError, match="no chat template"):
        prompt_text(["a dog?"], plain, rendering="chat")


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "expected at least one prompt"),
        (["a dog", " \n"], {}, "prompt 2 of the prompts is empty"),
        ([[{"role": "user", "content": ""}]], {}, "the prompt is empty"),
        (["say <|assistant|> twice"], {}, r"holds special tokens.*\n.*<\|assistant\|>"),
        ([DIALOGUE[:1] + [{"role": "user", "content": "<|end|>"}]], {}, "holds special tokens"),
        ([DIALOGUE], {"rendering": "raw"}, "is a list of messages, which needs the chat template"),
        (["a dog " * 30], {"max_tokens": 20}, "tokens long; the models were made for 20"),
        (["a\udc80b"], {}, "is not text in UTF-8"),
        ([[{"role": "wizard", "content": "x"}]], {}, "role 'wizard'"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(
    prompts: list[str], settings: dict[str, object], message: str, toy_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(TextError, match=re.compile(message, re.DOTALL)):
        prompt_text(prompts, toy_tokenizer, **settings)  # type: ignore[arg-type]


def test_a_prompt_of_dropped_tokens_alone_is_refused(toy_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TextError, match="leaves no token to encode"):
        prompt_text(["<|bos|>"], toy_tokenizer, rendering="raw")


def test_files_of_prompts(tmp_path: Path) -> None:
    lines, objects = tmp_path / "a.txt", tmp_path / "b.jsonl"
    lines.write_text("one \n\n[two]\n")
    objects.write_text(json.dumps({"prompt": "one"}) + "\n" + json.dumps({"messages": DIALOGUE}) + "\n")
    assert read_prompts(lines) == ["one ", "[two]"]
    assert read_prompts(objects) == ["one", DIALOGUE]
    assert parse_prompt(json.dumps(DIALOGUE)) == DIALOGUE and parse_prompt("[1] is a footnote") == "[1] is a footnote"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "every line is empty"),
        ('{"prompt": "x"\n', "line 1 is not JSON"),
        ('{"prompt": "x"}\n{"text": "y"}\n', "line 2: expected an object with `prompt`"),
        ('{"prompt": "x", "messages": []}\n', "not both"),
    ],
)
def test_files_that_hold_no_prompts(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(TextError, match=message):
        read_prompts(tmp_path / "a.jsonl")
    with pytest.raises(TextError, match="expected a text file of prompts"):
        read_prompts(tmp_path / "none.txt")


def test_models_other_than_the_recorded_ones_are_refused(
    crosscoder: Crosscoder, pair: dict[str, StudiedModel], caplog: pytest.LogCaptureFixture
) -> None:
    crosscoder.provenance = {"models": {alias: model.identity for alias, model in pair.items()}}
    encode_prompts(crosscoder, pair, ["a dog"])
    assert caplog.text == ""
    swapped = {"base": pair["chat"], "chat": pair["chat"]}
    with pytest.raises(ModelMismatch, match="the model base is not the one") as caught:
        encode_prompts(crosscoder, swapped, ["a dog"])
    assert pair["base"].identity["weights"] in str(caught.value)
    crosscoder.provenance["models"]["base"]["dtype"] = "bfloat16"
    encode_prompts(crosscoder, swapped, ["a dog"])
    assert "base is held in float32, and was in bfloat16" in caplog.text


def test_models_with_another_tokenizer_are_read_where_tokens_end_together(
    crosscoder: Crosscoder, pair: dict[str, StudiedModel]
) -> None:
    """Every row holds each model's own activations after the same bytes of the prompt."""
    other = byte_level(300)
    unlike = {"base": StudiedModel("base", pair["base"].model, other), "chat": pair["chat"]}
    prompt = "the old house stood at the end"
    found = encode_prompts(crosscoder, unlike, [prompt], rendering="raw")
    ends: list[dict[str, int]] = []
    for model in unlike.values():
        ids = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        texts = ["".join(model.tokenizer.decode([i]) for i in ids[: n + 1]) for n in range(len(ids))]
        ends.append({text: n for n, text in enumerate(texts)})
    shared = [text for text in ends[0] if text in ends[1]]
    assert 0 < len(shared) < len(ends[0])
    assert found.rows.position.tolist() == [1 + ends[0][text] for text in shared]
    parts = {}
    for (alias, model), end in zip(unlike.items(), ends, strict=True):
        ids = torch.tensor([model.tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        parts[f"{alias}/embed"] = model.read(["embed"], ids)["embed"][0, [end[text] for text in shared]]
    expected = crosscoder.encode(crosscoder.sources.pack(parts)).to_dense()
    torch.testing.assert_close(found.code.to_dense(), expected, rtol=1e-5, atol=1e-6)


def test_a_null_pair_has_no_code_of_prompts(crosscoder: Crosscoder) -> None:
    from types import SimpleNamespace

    run = SimpleNamespace(config=SimpleNamespace(activations=SimpleNamespace(null_pair="something")))
    with pytest.raises(ConfigError, match="prompts have no code in a null pair"):
        encode_for_run.__wrapped__(run, ["a dog"])  # type: ignore[attr-defined]


def test_what_latents_do_in_a_prompt_is_counted_from_its_rows(code: PromptCode) -> None:
    dense = code.code.to_dense().double()
    found, values = code.by_prompt, code.per_prompt()
    for prompt in range(len(PROMPTS)):
        rows = (code.rows.context == prompt).nonzero().squeeze(1)
        mine = found.prompt == prompt
        assert found.latent[mine].tolist() == (dense[rows] > 0).any(0).nonzero().squeeze(1).tolist()
        latents = found.latent[mine]
        torch.testing.assert_close(found.maximum[mine], dense[rows].max(0).values[latents])
        torch.testing.assert_close(found.total[mine], dense[rows].sum(0)[latents])
        assert found.num_tokens[mine].tolist() == (dense[rows] > 0).sum(0)[latents].tolist()
        torch.testing.assert_close(dense[found.peak[mine], latents], found.maximum[mine])
        torch.testing.assert_close(values.mean.to_dense()[prompt], dense[rows].mean(0))
        assert values.num_rows[prompt] == len(rows)


def test_latents_are_ranked_by_what_they_add(code: PromptCode, crosscoder: Crosscoder) -> None:
    encoded = EncodedPrompts(code, latent_facts(crosscoder))
    scale = crosscoder.decoder_norms("normalised").sum(1)
    scores = (code.code.to_dense() * scale).detach()
    row = int(code.rows.position.argmax())
    assert [latent for latent, _ in encoded.on_token(row, 3)] == scores[row].topk(3).indices.tolist()
    mine = scores[code.rows.context == 1]
    by_sum = [encoded.entry(entry)["latent"] for entry in encoded.of_prompt(1, 4, by="sum")]
    assert by_sum == mine.sum(0).topk(4).indices.tolist()
    by_max = [encoded.entry(entry)["latent"] for entry in encoded.of_prompt(1, 4)]
    assert by_max == mine.max(0).values.topk(4).indices.tolist()
    chosen = EncodedPrompts(code, encoded.facts, only=(by_sum[1],))
    assert [chosen.entry(entry)["latent"] for entry in chosen.of_prompt(1, 4)] == [by_sum[1]]
    assert {latent for latent, _ in chosen.on_token(row, 9)} <= {by_sum[1]}


def statistics_file(crosscoder: Crosscoder, code: PromptCode, path: Path) -> Path:
    from crosscoder.activations import Batch

    seen = LatentStatistics(crosscoder.num_latents)
    seen.update(Batch(torch.zeros(code.code.num_rows, 1), code.rows), code.code)
    write_table(path, seen.table(crosscoder), thing="latents")
    return path


def test_statistics_of_the_analysis_set_stand_beside(code: PromptCode, crosscoder: Crosscoder, tmp_path: Path) -> None:
    """With the prompts as analysis set, the largest values are all of the maximum, and means are their own."""
    facts = latent_facts(crosscoder, statistics_file(crosscoder, code, tmp_path / "latents.parquet"))
    encoded = EncodedPrompts(code, facts)
    assert encoded.rankings == ("max", "sum", "relative")
    best = max((encoded.entry(e) for e in range(len(code.by_prompt.latent))), key=lambda told: told["max"])
    assert best["share_of_max"] == pytest.approx(1)
    values = code.code.to_dense()[:, best["latent"]]
    assert best["relative_to_mean"] == pytest.approx(float(values.max() / values[values > 0].mean()), rel=1e-5)
    assert best["class"] in ("shared", "other", "a-only", "b-only") and 0 <= best["relative_norm"] <= 1
    other = random_crosscoder((32, 32), num_latents=24, seed=3)
    with pytest.raises(FileFormatError, match="is of another crosscoder"):
        latent_facts(other, tmp_path / "latents.parquet")


def test_tables_and_json_have_every_token(code: PromptCode, crosscoder: Crosscoder) -> None:
    encoded = EncodedPrompts(code, latent_facts(crosscoder))
    told = json.loads(json.dumps(encoded.to_json(2)))
    assert told["format"] == "crosscoder.prompt_code/1" and told["pair"] == {"a": "base/embed", "b": "chat/embed"}
    tokens = [token for prompt in told["prompts"] for token in prompt["tokens"]]
    assert len(tokens) == code.text.contexts.num_tokens
    assert not tokens[0]["read"] and tokens[0]["latents"] == []
    table = encoded.token_table(2)
    assert table.num_rows >= len(tokens) and table["latent"].null_count == sum(not t["latents"] for t in tokens)
    assert set(encoded.latent_table(3)["by"].to_pylist()) == {"max", "sum"}


def test_firing_tokens_are_counted(code: PromptCode) -> None:
    latent = int(code.code.latents[0])
    values = code.values_of(latent)
    fired = fires_on(code, latent, num=1000)
    assert sum(firing.count for firing in fired) == int((values > 0).sum())
    assert sum(firing.count * firing.mean_value for firing in fired) == pytest.approx(float(values.sum()), rel=1e-5)
    assert [f.count for f in fired] == sorted((f.count for f in fired), reverse=True)


def test_the_page_runs_and_loads_nothing(code: PromptCode, crosscoder: Crosscoder) -> None:
    html = prompt_page(EncodedPrompts(code, latent_facts(crosscoder)), title="<img src=x> run")
    assert "<script" not in html and "<img" not in html and "<b>stood" not in html
    assert "default-src 'none'" in html and "http" not in html.replace("http-equiv", "")
    assert html.count('<section id="prompt-') == 3 and "Every token and its latents" in html
