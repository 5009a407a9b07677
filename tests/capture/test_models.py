"""Reading and replacing: early stop, caches, padding, generation, gradients, and hooks that go away."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers as hf
from torch import Tensor

from capture.families import DECODERS, build, tokens
from crosscoder.capture import StudiedModel
from crosscoder.errors import SourceMismatch, UnsupportedSite

STREAM = "layers.1.resid_post"


@pytest.fixture(scope="module")
def llama(toy_tokenizer: hf.PreTrainedTokenizerFast) -> StudiedModel:
    return StudiedModel("base", build("llama"), toy_tokenizer)


@pytest.fixture
def runs(llama: StudiedModel) -> Iterator[list[int]]:
    """The layers that ran, in order."""
    ran: list[int] = []
    handles = [
        block.mlp.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(llama.architecture.blocks)
    ]
    yield ran
    for handle in handles:
        handle.remove()


def num_hooks(model: StudiedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules())


def test_read_stops_after_the_deepest_site(llama: StudiedModel, runs: list[int]) -> None:
    llama.read(["layers.1.resid_post", "embed"], tokens())
    assert runs == [0, 1]
    runs.clear()
    llama.read(["layers.1.mlp_in"], tokens())
    assert runs == [0]
    runs.clear()
    llama.read(["embed"], tokens())
    assert runs == []


def test_read_with_a_cache_leaves_the_cache_whole(llama: StudiedModel) -> None:
    ids, cache = tokens(), hf.DynamicCache(config=llama.model.config)
    whole = llama.read([STREAM], ids)[STREAM]
    first = llama.read([STREAM], ids[:, :4], past_key_values=cache)[STREAM]
    rest = llama.read([STREAM], ids[:, 4:], past_key_values=cache)[STREAM]
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole)
    assert [layer.get_seq_length() for layer in cache.layers] == [7, 7, 7]


def test_read_gives_the_names_asked_for(llama: StudiedModel) -> None:
    seen = llama.read(["layers.2.resid_pre", "layers.0.resid_pre", STREAM], tokens())
    assert list(seen) == ["layers.2.resid_pre", "layers.0.resid_pre", STREAM]
    assert torch.equal(seen["layers.2.resid_pre"], seen[STREAM])
    assert torch.equal(seen["layers.0.resid_pre"], llama.read(["embed"], tokens())["embed"])


def test_read_is_free_of_graphs_and_of_inference_tensors(llama: StudiedModel) -> None:
    x = llama.read([STREAM], tokens())[STREAM]
    assert not x.requires_grad and not x.is_inference()


def test_padding_on_the_left_changes_nothing(llama: StudiedModel) -> None:
    ids = tokens()
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.int64), torch.ones_like(ids)], dim=1)
    torch.testing.assert_close(
        llama.read([STREAM], padded, attention_mask=mask)[STREAM][:, 3:], llama.read([STREAM], ids)[STREAM]
    )
    torch.testing.assert_close(llama.logits(padded, attention_mask=mask)[:, 3:], llama.logits(ids))


def test_read_sees_what_is_replaced(llama: StudiedModel) -> None:
    with llama.replace("layers.1.mlp_out", lambda x, _: x * 0), llama.replace("layers.1.attn_out", lambda x, _: x * 0):
        seen = llama.read(["layers.0.resid_post", STREAM], tokens())
    assert torch.equal(seen["layers.0.resid_post"], seen[STREAM])


def test_replacements_at_one_site_follow_one_another(llama: StudiedModel) -> None:
    with llama.replace(STREAM, lambda x, _: x * 0 + 1), llama.replace(STREAM, lambda x, _: x * 3):
        assert (llama.read([STREAM], tokens())[STREAM] == 3).all()


@pytest.mark.parametrize("site", ["layers.1.resid_mid", "layers.1.resid_post", "embed"])
def test_gradients_pass_through_a_replacement(llama: StudiedModel, site: str) -> None:
    direction = torch.zeros(32, dtype=torch.float64, requires_grad=True)
    with llama.replace(site, lambda x, _: x * (1 + direction) ** 2):
        llama.logits(tokens())[:, -1].logsumexp(-1).sum().backward()
    step = 3e-3 * torch.ones(32, dtype=torch.float64)  # the model's norms compute in fp32: smaller steps drown in noise

    def loss(scale: Tensor) -> float:
        with llama.replace(site, lambda x, _: x * (1 + scale) ** 2):
            return llama.logits(tokens())[:, -1].logsumexp(-1).sum().item()

    expected = (loss(step) - loss(-step)) / 6e-3
    assert direction.grad.sum().item() == pytest.approx(expected, rel=2e-2)


def test_hooks_are_gone_afterwards(llama: StudiedModel) -> None:
    before = num_hooks(llama)

    def fail(x: Tensor, _: Tensor) -> Tensor:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"), llama.replace(STREAM, fail):
        llama.read(["layers.2.resid_post"], tokens())
    llama.read(llama.sites(), tokens())
    assert num_hooks(llama) == before


def test_a_replacement_keeps_the_shape(llama: StudiedModel) -> None:
    with (
        pytest.raises(SourceMismatch, match=r"\(2, 7, 32\).*\(2, 1, 32\)"),
        llama.replace(STREAM, lambda x, _: x[:, :1]),
    ):
        llama.logits(tokens())


def steering(seen: list[Tensor]) -> object:
    """A replacement that depends on the position, and notes where it was asked."""

    def fn(x: Tensor, positions: Tensor) -> Tensor:
        assert positions.shape == x.shape[:2]
        seen.append(positions.clone())
        return x + 20 * torch.sin(positions[..., None] + torch.arange(x.shape[-1])).to(x.dtype)

    return fn


@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_a_cache_equals_generation_without(
    name: str, toy_tokenizer: hf.PreTrainedTokenizerFast
) -> None:
    model = StudiedModel("m", build(name), toy_tokenizer)
    model.model.generation_config.eos_token_id = None
    ids, cached, whole = tokens(1, 5), [], []
    site = "layers.1.attn_out"
    with model.replace(site, steering(cached)):
        fast = model.generate(ids, max_new_tokens=6)
    with model.replace(site, steering(whole)):
        slow = model.generate(ids, max_new_tokens=6, use_cache=False)
    assert torch.equal(fast, slow) and fast.shape == (1, 11)
    assert not torch.equal(fast, model.generate(ids, max_new_tokens=6))
    assert [p.tolist() for p in cached] == [[[0, 1, 2, 3, 4]], [[5]], [[6]], [[7]], [[8]], [[9]]]
    assert [p.shape[1] for p in whole] == [5, 6, 7, 8, 9, 10]


def test_positions_with_left_padding_count_from_the_text(llama: StudiedModel) -> None:
    ids, seen = tokens(1, 4), []
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.int64), ids], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    with llama.replace(STREAM, steering(seen)):
        out = llama.generate(padded, attention_mask=mask, max_new_tokens=3)
        assert seen[0][0, 2:].tolist() == [0, 1, 2, 3]
        assert [p.tolist() for p in seen[1:]] == [[[4]], [[5]]]
        assert torch.equal(out[:, 2:], llama.generate(ids, max_new_tokens=3))


def test_generation_is_greedy_whatever_the_model_suggests(toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    model = StudiedModel("m", build("llama"), toy_tokenizer)
    expected = model.generate(tokens(), max_new_tokens=5)
    model.model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=1.5)
    assert torch.equal(model.generate(tokens(), max_new_tokens=5), expected)
    torch.manual_seed(0)
    assert not torch.equal(model.generate(tokens(), max_new_tokens=5, temperature=5.0), expected)


def test_encoders_read_but_do_not_unembed(toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    model = StudiedModel("m", build("bert"), toy_tokenizer)
    x = model.read([STREAM], tokens())[STREAM]
    for use in (
        lambda: model.unembed(x),
        lambda: model.logits(tokens()),
        lambda: model.generate(tokens(), max_new_tokens=1),
    ):
        with pytest.raises(UnsupportedSite, match="language-model head"):
            use()


def test_identity_tells_models_apart(llama: StudiedModel, toy_tokenizer: hf.PreTrainedTokenizerFast) -> None:
    again = StudiedModel("other", build("llama"), toy_tokenizer)
    assert again.identity == llama.identity
    changed = build("llama")
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert StudiedModel("m", changed, toy_tokenizer).identity["weights"] != llama.identity["weights"]
    assert llama.identity["dtype"] == "float64"
