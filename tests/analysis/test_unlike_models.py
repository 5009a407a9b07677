"""Two models that share nothing but the text: other tokenizers, widths and architectures, from a run file to a diff."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from capture.tokenizers_of_kinds import byte_level, pieces, word_pieces
from conftest import toy_texts
from crosscoder.analysis import diff_run, evaluate_run
from crosscoder.analysis.cross_entropy import aligner_of, cross_entropies
from crosscoder.analysis.opened_run import OpenedRun, open_run
from crosscoder.analysis.tables import read_table
from crosscoder.capture import StudiedModel
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ConfigError, TokenizerMismatch
from crosscoder.interventions.effects import effects
from crosscoder.nonlinearities import TopK
from crosscoder.training.config import RunConfig
from crosscoder.training.run import train
from crosscoder.training.runfile import validate
from crosscoder.wiring import acausal

ONE, TWO, THREE = "one/layers.1.resid_post", "two/layers.0.resid_post", "three/layers.0.resid_post"
Raw = dict


def llama(size: int) -> hf.PreTrainedModel:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
        )
    )  # fmt: skip


def gpt2(size: int) -> hf.PreTrainedModel:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=size, n_embd=24, n_layer=2, n_head=2, n_positions=48))


def bert(size: int) -> hf.PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hf.BertModel(hf.BertConfig(vocab_size=size, **sizes, max_position_embeddings=128), add_pooling_layer=False)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Raw:
    """A run over a Llama with byte-level tokens and a narrower GPT-2 with sentence pieces; a BERT lies beside them."""
    root = tmp_path_factory.mktemp("unlike")
    models = {"one": (llama, byte_level(500)), "two": (gpt2, pieces()), "three": (bert, word_pieces())}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, (build, tokenizer) in models.items():
            build(len(tokenizer)).eval().save_pretrained(root / name)
            tokenizer.save_pretrained(root / name)
    lines = [json.dumps({"text": text}) for text in toy_texts(80)]
    (root / "text.jsonl").write_text("\n".join(lines))
    return {
        "models": {name: {"path": str(root / name), "dtype": "float32"} for name in ("one", "two")},
        "sources": [ONE, TWO],
        "text": {
            "tokenizer": "one",
            "alignment": "bytes",
            "context_length": 40,
            "mix": [{"dataset": str(root / "text.jsonl")}],
            "held_out": {"fraction": 0.3, "num_tokens": 1000},
        },
        "activations": {"buffer_gb": 0.0005},
        "normaliser": {"num_tokens": 512},
        "wiring": {"kind": "acausal", "num_latents": 48},
        "nonlinearity": {"kind": "batch_topk", "k": 4},
        "train": {"num_tokens": 2560, "batch_size": 128, "learning_rate": 1e-3, "checkpoint_every": 7},
        "out": str(root / "run"),
    }


def config(raw: Raw, **changes: object) -> RunConfig:
    return validate(RunConfig, raw | changes, name="unlike models")


@pytest.fixture(scope="module")
def run(raw: Raw) -> Path:
    """The finished run."""
    return train(config(raw)).path


def test_from_a_run_file_to_a_diff(run: Path) -> None:
    """Train, evaluate and diff; the share lost is recorded with the set and with the crosscoder."""
    evaluation = evaluate_run(run, num_ce_tokens=300, num_exemplars=3)
    aligned = json.loads((run / "analysis" / "set.json").read_text())["aligned"]
    assert evaluation.num_rows == int(open_run(run).text.kept.sum())
    assert set(aligned["lost"]) == {"one", "two"} and aligned["lost"]["one"] > 0
    assert 1 - aligned["num_windows"] / aligned["num_tokens"]["one"] == aligned["lost"]["one"]
    recorded = json.loads((run / "crosscoder" / "config.json").read_text())["provenance"]["tokenizer"]
    assert recorded["aligned"] == aligned and recorded["model"] == "one"
    assert set(evaluation.ce_recovered) == {ONE, TWO}
    assert evaluation.cross_entropy[ONE].num_tokens != evaluation.cross_entropy[TWO].num_tokens
    found = diff_run(run, a="one", b="two")
    assert found.classes.cosine is None and (run / "diff" / "one--two" / "report.html").is_file()
    shown = read_table(run / "exemplars.parquet", thing="exemplars").to_pylist()
    kept = open_run(run).text
    for row in shown:
        assert kept.context(row["context"]).tokens.kept[row["position"]]


def test_the_held_out_set_is_made_again_alike(run: Path, tmp_path: Path) -> None:
    """A crosscoder away from its run makes the same set: the same tokens, kept and lost."""
    home = open_run(run)
    away = OpenedRun(home.crosscoder, home.config, tmp_path / "away").text
    assert torch.equal(away.kept, home.text.kept) and away.aligned == home.text.aligned


def test_an_interrupted_run_ends_in_the_same_bits(raw: Raw, run: Path, tmp_path: Path, monkeypatch) -> None:
    """Stopped after a checkpoint and continued, the weights are those of a run that never stopped."""
    from crosscoder.training import checkpoint

    real, written = checkpoint.save, []

    def stop_after_one(*args, **kwargs):
        written.append(real(*args, **kwargs))
        raise KeyboardInterrupt

    again = config(raw, out=str(tmp_path / "again"))
    monkeypatch.setattr(checkpoint, "save", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        train(again)
    monkeypatch.setattr(checkpoint, "save", real)
    resumed, whole = train(again).crosscoder.state_dict(), Crosscoder.load(run / "crosscoder").state_dict()
    assert len(written) == 1 and all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_cross_entropy_is_spliced_at_aligned_tokens_alone(run: Path) -> None:
    """Against splicing by hand, one context at a time, in double precision."""
    opened = open_run(run)
    text = opened.text
    models = {
        name: StudiedModel(name, studied.model.double(), studied.tokenizer) for name, studied in opened.models.items()
    }
    cc = Crosscoder(acausal(opened.crosscoder.sources, num_latents=12), TopK(3), seed=0).double().eval()
    found = cross_entropies(cc, models, text, num_tokens=10**9, batch_tokens=200)
    aligner = aligner_of(cc, models, text)
    assert aligner is not None
    sums = {key: torch.zeros(3, dtype=torch.float64) for key in (ONE, TWO)}
    for number in range(text.num_contexts):
        context = aligner(text.context(number))
        (reading,) = context.readings.values()
        rows = context.tokens.kept.nonzero()[0]
        ids = {"one": context.tokens.ids, "two": reading.ids}
        places = {"one": rows, "two": reading.places[rows]}
        tokens = {name: torch.from_numpy(values).long()[None] for name, values in ids.items()}
        x = {
            key: models[key[:3]].read([key[4:]], tokens[key[:3]])[key[4:]][0, torch.from_numpy(places[key[:3]]).long()]
            for key in (ONE, TWO)
        }
        rebuilt = cc.writes.unpack(cc(cc.reads.pack(x)))
        for key in (ONE, TWO):
            sums[key] += losses(models[key[:3]], key[4:], tokens[key[:3]], places=places[key[:3]], new=rebuilt[key])
    for key in (ONE, TWO):
        clean, spliced, zero = (sums[key] / found[key].num_tokens).tolist()
        assert (found[key].clean, found[key].spliced) == pytest.approx((clean, spliced), rel=1e-6)
        assert found[key].zero_ablated == pytest.approx(zero, rel=1e-6)


def test_interventions_need_one_tokenizer(run: Path) -> None:
    """No token id of one model is ever fed to another."""
    opened = open_run(run)
    with pytest.raises(TokenizerMismatch, match="to intervene on them"):
        effects(opened.crosscoder, opened.models, opened.text, latents=[0], sources=[ONE])


def losses(model: StudiedModel, site: str, tokens: torch.Tensor, *, places, new: torch.Tensor) -> torch.Tensor:
    """Summed next-token losses: clean, with `new` at `places`, with zeros there."""
    found = []
    for values in (None, new, torch.zeros_like(new)):

        def put(x, position_ids, values=values):
            x = x.clone()
            if values is not None:
                x[0, torch.from_numpy(places).long()] = values
            return x

        with torch.no_grad(), model.replace(site, put):
            logits = model.logits(tokens)
        found.append(cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum"))
    return torch.stack(found)


def test_three_tokenizers_and_an_encoder(raw: Raw, tmp_path: Path) -> None:
    """A BERT that drops white space and capitals beside the two; cross-entropy is left out, as with any encoder."""
    beside = {"path": raw["models"]["one"]["path"].replace("/one", "/three"), "dtype": "float32"}
    three = config(
        raw, models=raw["models"] | {"three": beside}, sources=[ONE, TWO, THREE], out=str(tmp_path / "three")
    )
    path = train(three).path
    evaluation = evaluate_run(path, num_exemplars=2)
    aligned = open_run(path).text.aligned
    assert aligned is not None and aligned.unlike["three"] > 0 and set(evaluation.fve_per_source) == {ONE, TWO, THREE}
    diff_run(path, a="two", b="three")
    assert (path / "diff" / "two--three" / "report.html").is_file()


def test_what_cannot_be_aligned_says_so(raw: Raw, tmp_path: Path) -> None:
    """No choice: the error names it. A text tokenizer without a source: refused before any model is loaded."""
    plain = raw["text"] | {"alignment": "identical"}
    with pytest.raises(TokenizerMismatch, match=r"text\.alignment to bytes"):
        train(config(raw, text=plain, out=str(tmp_path / "a")))
    with pytest.raises(ConfigError, match="'one' must have a source"):
        config(raw, sources=[TWO])


def test_the_same_text_in_a_tokenizer_with_one_more_token(raw: Raw, tmp_path: Path) -> None:
    """A fine-tune that added a token: nearly nothing is lost."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(raw["models"]["one"]["path"])
    tokenizer.add_tokens(["<|new|>"])
    tuned = hf.LlamaForCausalLM.from_pretrained(raw["models"]["one"]["path"])
    tuned.resize_token_embeddings(len(tokenizer))
    tuned.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    models = {"one": raw["models"]["one"], "two": {"path": str(tmp_path / "tuned"), "dtype": "float32"}}
    path = train(config(raw, models=models, out=str(tmp_path / "run"))).path
    aligned = open_run(path).text.aligned
    assert aligned is not None and aligned.lost == {"one": 0.0, "two": 0.0}
