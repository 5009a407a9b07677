"""Edits: the definition, the identity, both rules, padding, caches, dtypes, gradients, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from crosscoder import interventions as iv
from crosscoder.capture.models import StudiedModel
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import EditError, EmptySelection, NotCalibrated, SourceMismatch, UnknownLatent
from crosscoder.nonlinearities import BatchTopK, JumpReLU, ReLU, TopK
from crosscoder.sources import SourceSet, difference
from crosscoder.wiring import acausal, dedicated
from interventions.worlds import (
    BASE,
    CHAT,
    WORLDS,
    clean_reads,
    dense_code,
    double,
    layered,
    padded,
    random_crosscoder,
    raw_decoder,
    single,
    sources,
    token_ids,
)

Pair = Mapping[str, StudiedModel]
SITE = "layers.1.resid_post"
LATENTS = tuple(range(0, 24, 3))
EDITS = {
    "ablate": (iv.ablate(LATENTS), lambda f: 0 * f),
    "clamp": (iv.clamp(LATENTS, 0.7), lambda f: 0 * f + 0.7),
    "scale": (iv.scale(LATENTS, -1.5), lambda f: -1.5 * f),
    "add": (iv.add(LATENTS, [0.1 * j for j in range(8)]), lambda f: f + 0.1 * torch.arange(8).double()),
}


def edited_logits(cc: Crosscoder, models: Pair, edits: list[iv.Edit], ids: Tensor, **more: object) -> Tensor:
    """Logits of the last model that the crosscoder reads."""
    mask = more.pop("mask", None)
    with iv.editing(cc, models, edits, **more), torch.no_grad():
        return models[cc.sources.models[-1]].logits(ids, attention_mask=mask)


def by_hand(cc: Crosscoder, models: Pair, ids: Tensor, new: object, latents: tuple[int, ...] = LATENTS) -> Tensor:
    """Logits when codes come from clean forwards and all written sources of the model are moved."""
    alias = cc.sources.models[-1]
    f = dense_code(cc, clean_reads(cc, models, ids))[:, list(latents)]
    moved = {s.site: (new(f) - f) @ raw_decoder(cc, s.key)[list(latents)] for s in cc.writes if s.model == alias}
    with torch.no_grad():
        return replaced(models[alias], {site: m.view(*ids.shape, -1) for site, m in moved.items()}, ids)


def replaced(model: StudiedModel, moved: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Logits with something added at sites."""
    (site, added), *rest = moved.items()
    with model.replace(site, lambda x, _: x + added):
        return replaced(model, dict(rest), ids) if rest else model.logits(ids)


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("world", ["one model", "two models", "layers", "layers of two"])
def test_edits_follow_their_definition(world: str, kind: str, pair: Pair) -> None:
    cc, ids = WORLDS[world](), token_ids()
    edit, new = EDITS[kind]
    got = edited_logits(cc, pair, [edit], ids)
    assert_same(got, by_hand(cc, pair, ids, new))
    alias = cc.sources.models[-1]
    assert (got - pair[alias].logits(ids)).abs().max() > 1e-3


@pytest.mark.parametrize("world", WORLDS)
def test_a_zero_edit_is_the_identity(world: str, pair: Pair) -> None:
    cc, ids = WORLDS[world](), token_ids()
    alias = cc.sources.models[-1]
    clean = pair[alias].logits(ids)
    for edit in (iv.add(LATENTS, 0.0), iv.scale(LATENTS, 1.0)):
        assert torch.equal(edited_logits(cc, pair, [edit], ids), clean)
    undone = [iv.add(LATENTS, 0.5), iv.add(LATENTS, -0.5)]
    assert torch.equal(edited_logits(cc, pair, undone, ids), clean)


def test_what_is_not_selected_is_the_same_tensor(pair: Pair) -> None:
    seen: list[Tensor] = []

    def watch(x: Tensor, _: Tensor) -> Tensor:
        seen.append(x)
        return x

    ids = token_ids()
    with pair["base"].replace(SITE, watch), iv.editing(single(), pair, [iv.ablate(LATENTS)], never=[1]):
        with pair["base"].replace(SITE, watch):
            pair["base"].logits(torch.full_like(ids, 1))
        assert seen[0] is seen[1]
        pair["base"].logits(ids)


def test_ablating_all_latents_leaves_bias_and_error(pair: Pair) -> None:
    cc, ids = double(), token_ids()
    x = clean_reads(cc, pair, ids)
    with torch.no_grad():
        error = (x - cc(x))[:, cc.sources.slices[CHAT]]
        bias = cc.decode(cc.encode(x), x)[:, cc.sources.slices[CHAT]]
        bias = bias - dense_code(cc, x) @ raw_decoder(cc, CHAT)
    with pair["chat"].replace(SITE, lambda x, _: (bias + error).view(*ids.shape, -1)), torch.no_grad():
        expected = pair["chat"].logits(ids)
    assert bias.std(0).max() < 1e-12
    assert_same(edited_logits(cc, pair, [iv.ablate(range(24))], ids), expected)


def test_clamping_to_the_present_value_changes_nothing(pair: Pair) -> None:
    cc, ids = double(), token_ids(1)
    f = cc.encode(clean_reads(cc, pair, ids)).to_dense()
    clean = pair["chat"].logits(ids)
    at = iv.Positions((4,))
    now = [iv.clamp(range(24), f[4].tolist(), tokens=at)]
    assert (edited_logits(cc, pair, now, ids) - clean).abs().max() < 1e-12
    assert (
        edited_logits(cc, pair, [iv.clamp(range(24), (2 * f[4]).tolist(), tokens=at)], ids) - clean
    ).abs().max() > 1e-3


@pytest.mark.parametrize(
    "nonlinearity", [ReLU(), TopK(4), BatchTopK(4), JumpReLU(bandwidth=0.5, initial_threshold=0.2)]
)
@pytest.mark.parametrize("fold", [False, True])
def test_every_nonlinearity_and_folding(nonlinearity: object, fold: bool, pair: Pair) -> None:
    cc = random_crosscoder(acausal(sources(BASE, CHAT), num_latents=24), nonlinearity)
    cc = cc.folded() if fold else cc
    ids = token_ids()
    x = clean_reads(cc, pair, ids)
    with torch.no_grad():
        f = cc.encode(x).to_dense()
        half = f.clone()
        half[:, list(LATENTS)] *= 0.5
        dense = type(cc.encode(x)).from_dense
        moved = (cc.decode(dense(half)) - cc.decode(dense(f)))[:, cc.sources.slices[CHAT]]
        expected = replaced(pair["chat"], {SITE: moved.view(*ids.shape, -1)}, ids)
    assert_same(edited_logits(cc, pair, [iv.scale(LATENTS, 0.5)], ids), expected)


def test_edits_follow_one_another(pair: Pair) -> None:
    ids, cc = token_ids(), double()
    got = edited_logits(cc, pair, [iv.scale(LATENTS, 3.0), iv.add(LATENTS[:4], 0.25), iv.ablate(LATENTS[3:5])], ids)

    def new(f: Tensor) -> Tensor:
        f = 3 * f
        f[:, :4] += 0.25
        f[:, 3:5] = 0
        return f

    assert_same(got, by_hand(cc, pair, ids, new))


def test_the_rule_of_codes() -> None:
    edit = [iv.ablate([0, 13])]
    assert iv.code_rule(double(), edit, "chat") == "running"
    assert iv.code_rule(layered(), edit, "chat") == "clean"
    assert iv.code_rule(layered(), [iv.ablate([0], sources=["chat/layers.1.resid_post"])], "chat") == "running"
    assert iv.code_rule(layered(), [iv.add([0], 1.0)], "chat") == "running"
    assert iv.code_rule(WORLDS["causal layers"](), edit, "chat") == "running"
    assert iv.code_rule(WORLDS["layers of two"](), [iv.ablate([0], sources=["base"])], "chat") == "running"
    shared = random_crosscoder(WORLDS["causal layers"]().wiring, TopK(4))
    assert iv.code_rule(shared, edit, "chat") == "clean", "a later layer's latents compete for k"


def test_running_codes_see_the_edits_before_them(pair: Pair) -> None:
    """Latents 0-11 are read at layer 0 and written from there on; 12-23 are read at layer 1, which is then edited."""
    cc, ids = WORLDS["causal layers"](), token_ids()
    got = edited_logits(cc, pair, [iv.scale(range(24), 0.0)], ids)
    first, second = "chat/layers.0.resid_post", CHAT
    x0 = pair["chat"].read(["layers.0.resid_post"], ids)["layers.0.resid_post"].flatten(0, 1)
    f0 = dense_code(cc, torch.cat([x0, x0], 1))[:, :12]
    moved0 = (-f0 @ raw_decoder(cc, first)[:12]).view(*ids.shape, -1)
    with torch.no_grad(), pair["chat"].replace("layers.0.resid_post", lambda x, _: x + moved0):
        x1 = pair["chat"].read([SITE], ids)[SITE].flatten(0, 1)
        f1 = dense_code(cc, torch.cat([x0, x1], 1))[:, 12:]
        moved1 = -f0 @ raw_decoder(cc, second)[:12] - f1 @ raw_decoder(cc, second)[12:]
        expected = replaced(pair["chat"], {SITE: moved1.view(*ids.shape, -1)}, ids)
    assert_same(got, expected)


@pytest.mark.parametrize("world", WORLDS)
def test_a_padded_batch_equals_texts_one_by_one(world: str, pair: Pair) -> None:
    cc = WORLDS[world]()
    ids, mask = padded(token_ids(3, 9), [9, 4, 6])
    got = edited_logits(cc, pair, [iv.scale(LATENTS, 2.0)], ids, mask=mask)
    for row, length in enumerate([9, 4, 6]):
        alone = edited_logits(cc, pair, [iv.scale(LATENTS, 2.0)], ids[row : row + 1, -length:])
        assert_same(got[row, -length:], alone[0])


@pytest.mark.parametrize("world", WORLDS)
def test_generation_with_a_cache_equals_generation_without(world: str, pair: Pair) -> None:
    cc = WORLDS[world]()
    ids, mask = padded(token_ids(3, 9), [9, 4, 6])
    prompts = prompts_of(ids, mask)
    edits = [iv.scale(LATENTS, 3.0), iv.add(LATENTS[:2], 1.0, tokens=iv.ReplyTokens(first=3))]
    model = pair[cc.sources.models[-1]]
    with iv.editing(cc, pair, edits, prompts=prompts):
        fast = model.generate(ids, attention_mask=mask, max_new_tokens=6)
        slow = model.generate(ids, attention_mask=mask, max_new_tokens=6, use_cache=False)
        whole = torch.cat([mask, torch.ones(3, 6, dtype=torch.int64)], 1)
        at_once = model.logits(fast, attention_mask=whole)
        rest = stepwise(model, fast, whole, start=9)
    assert torch.equal(fast, slow) and not torch.equal(fast, model.generate(ids, attention_mask=mask, max_new_tokens=6))
    assert_same(rest, at_once[:, 8:])


def stepwise(model: StudiedModel, ids: Tensor, mask: Tensor, *, start: int) -> Tensor:
    """Logits from the last prompt token on, fed one token at a time to a cache."""
    cache, found = model.new_cache(), []
    for stop in range(start, ids.shape[1] + 1):
        new = ids[:, :start] if stop == start else ids[:, stop - 1 : stop]
        positions = (mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        with torch.no_grad():
            given = {"attention_mask": mask[:, :stop], "position_ids": positions, "past_key_values": cache}
            out = model.model(input_ids=new, use_cache=True, **given)
        found.append(out.logits[:, -1])
    return torch.stack(found, 1)


def prompts_of(ids: Tensor, mask: Tensor, roles: Tensor | None = None) -> iv.Prompts:
    roles = torch.full_like(ids, 2) if roles is None else roles
    return iv.Prompts(ids, mask, roles, mask.bool())


def test_selections(pair: Pair) -> None:
    ids, mask = padded(token_ids(2, 5), [5, 3])
    roles = torch.tensor([[4, 1, 2, 2, 4], [4, 4, 4, 2, 4]])
    prompts = prompts_of(ids, mask, roles)
    position = torch.cat([(mask.cumsum(1) - 1).clamp(min=0), torch.tensor([[5, 6], [3, 4]])], 1)
    tokens = prompts.seen(position)

    def chosen(selection: iv.TokenSelection) -> list[list[int]]:
        return [row.nonzero().squeeze(1).tolist() for row in selection.mask(tokens) & (position > 0)]

    assert chosen(iv.AllTokens()) == [[1, 2, 3, 4, 5, 6], [3, 4, 5, 6]]
    assert chosen(iv.Roles(("user",))) == [[2, 3], [3]]
    assert chosen(iv.Roles(("system", "assistant"))) == [[1, 5, 6], [5, 6]]
    assert chosen(iv.PromptTokens()) == [[1, 2, 3, 4], [3, 4]]
    assert chosen(iv.ReplyTokens()) == [[5, 6], [5, 6]]
    assert chosen(iv.ReplyTokens(first=1)) == [[5], [5]]
    assert chosen(iv.Positions((4, 5))) == [[4, 5], [6]]
    assert chosen(iv.PromptTokens() & ~iv.Roles(("user",))) == [[1, 4], [4]]
    assert chosen(iv.ReplyTokens(first=1) | iv.Roles(("system",))) == [[1, 5], [5]]


def test_only_the_selected_tokens_are_edited(pair: Pair) -> None:
    ids, cc = token_ids(1), single()
    seen: list[Tensor] = []
    with iv.editing(cc, pair, [iv.add([0], 1.0, tokens=iv.Positions((3, 5)))]):
        seen.append(pair["base"].read([SITE], ids)[SITE])
    difference = (seen[0] - pair["base"].read([SITE], ids)[SITE])[0]
    row = raw_decoder(cc, BASE)[0]
    for position in range(9):
        assert_same(difference[position], row if position in (3, 5) else 0 * row)


def test_edits_in_one_model_leave_the_other_alone(pair: Pair) -> None:
    ids, cc = token_ids(), double()
    clean = {alias: model.logits(ids) for alias, model in pair.items()}
    with iv.editing(cc, pair, [iv.ablate(LATENTS, sources=["chat"])]):
        assert torch.equal(pair["base"].logits(ids), clean["base"])
        assert not torch.equal(pair["chat"].logits(ids), clean["chat"])
    with iv.editing(cc, pair, [iv.ablate(LATENTS)]):
        assert not torch.equal(pair["base"].logits(ids), clean["base"])
    assert torch.equal(pair["chat"].logits(ids), clean["chat"]), "nothing stays behind"


def test_replacements_outside_keep_their_positions(pair: Pair) -> None:
    """The clean forward beside, of the same model, does not disturb what another `replace` is told."""
    seen: list[Tensor] = []
    with (
        pair["chat"].replace("embed", lambda x, p: (seen.append(p), x)[1]),
        iv.editing(layered(), pair, [iv.ablate(LATENTS)]),
    ):
        pair["chat"].generate(token_ids(1, 4), max_new_tokens=3)
    assert [p.tolist() for p in seen] == [[[0, 1, 2, 3]]] * 2 + [[[4]]] * 2 + [[[5]]] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_models_stay_in_their_dtype(dtype: torch.dtype, pair: Pair, toy_tokenizer: object) -> None:
    from conftest import build_toy_model

    model = StudiedModel("base", build_toy_model(num_layers=3).to(dtype), toy_tokenizer)
    cc, ids = single().float(), token_ids()
    x = model.read([SITE], ids)[SITE]
    assert torch.equal(read_edited(cc, model, iv.scale(LATENTS, 1.0), ids), x)
    f = cc.encode(x.flatten(0, 1).float()).to_dense().detach()
    rows = cc.decoder_rows(BASE, "raw").detach()
    moved = -f[:, list(LATENTS)] @ rows[list(LATENTS)]
    expected = (x.flatten(0, 1).float() + moved).to(dtype).view_as(x)
    got = read_edited(cc, model, iv.ablate(LATENTS), ids)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected)


def read_edited(cc: Crosscoder, model: StudiedModel, edit: iv.Edit, ids: Tensor) -> Tensor:
    with iv.editing(cc, {"base": model}, [edit]):
        return model.read([SITE], ids)[SITE]


def test_gradients_pass_through_edits(pair: Pair) -> None:
    cc, ids, model = double(), token_ids(), pair["chat"]

    def loss(step: Tensor) -> Tensor:
        with (
            model.replace("layers.0.resid_post", lambda x, _: x + step),
            iv.editing(cc, pair, [iv.scale(range(24), 3.0)]),
        ):
            return model.logits(ids)[:, -1].logsumexp(-1).sum()

    step = torch.zeros(32, dtype=torch.float64, requires_grad=True)
    loss(step).backward()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in cc.parameters())
    assert step.grad is not None
    way = torch.randn(32, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        expected = (loss(2e-4 * way) - loss(-2e-4 * way)) / 4e-4
    assert (step.grad @ way).item() == pytest.approx(expected.item(), rel=1e-2)


def test_modes_and_gradients_are_given_back(pair: Pair) -> None:
    cc = double().train()
    with iv.editing(cc, pair, [iv.ablate([1])]):
        assert not cc.training and not any(p.requires_grad for p in cc.parameters())
        pair["chat"].logits(token_ids())
    assert cc.training and all(p.requires_grad for p in cc.parameters())


def test_what_cannot_be_edited(pair: Pair) -> None:
    cc, ids = double(), token_ids()
    with pytest.raises(UnknownLatent, match="latents 0 to 23; got 24"):
        edited_logits(cc, pair, [iv.ablate([3, 24])], ids)
    with pytest.raises(UnknownLatent, match="at least one latent"):
        iv.ablate([])
    with pytest.raises(EditError, match="one value, or one for each of 2 latents; got 3"):
        iv.add([0, 1], [1.0, 2.0, 3.0])
    with pytest.raises(EditError, match="sources to edit that the crosscoder writes; got plain"):
        edited_logits(cc, pair, [iv.ablate([0], sources=["plain"])], ids)
    with pytest.raises(EditError, match="needs base, chat; base did not come"):
        edited_logits(cc, {"chat": pair["chat"]}, [iv.ablate([0])], ids)
    exclusive = random_crosscoder(dedicated(sources(BASE, CHAT), shared=8, exclusive={"base": 4, "chat": 4}))
    with pytest.raises(EditError, match="none of the edited latents writes"):
        edited_logits(exclusive, pair, [iv.ablate([9], sources=["chat"])], ids)
    apart = SourceSet([difference(sources(CHAT)[CHAT], sources(BASE)[BASE])])
    with pytest.raises(EditError, match="none of the edited latents writes"):
        edited_logits(random_crosscoder(acausal(apart, num_latents=24)), pair, [iv.ablate([0])], ids)
    for value in (float("nan"), float("inf")):
        with pytest.raises(EditError, match="expected finite values"):
            iv.add([0, 1], [1.0, value])
    fresh = Crosscoder(cc.wiring, BatchTopK(4)).double()
    with pytest.raises(NotCalibrated):
        edited_logits(fresh, pair, [iv.ablate([0])], ids)


def test_empty_selections_are_errors(pair: Pair) -> None:
    cc, ids = double(), token_ids()
    for empty in (lambda: iv.Roles(()), lambda: iv.Positions(()), lambda: iv.ReplyTokens(first=0)):
        with pytest.raises(EmptySelection):
            empty()
    with pytest.raises(EmptySelection, match="met no token"):
        edited_logits(cc, pair, [iv.ablate([0], tokens=iv.Positions((50,)))], ids)
    prompts = prompts_of(ids, torch.ones_like(ids))
    with pytest.raises(EmptySelection, match="met no token"):
        edited_logits(cc, pair, [iv.ablate([0], tokens=iv.Roles(("system",)))], ids, prompts=prompts)
    with pytest.raises(EditError, match="no prompts were given"):
        edited_logits(cc, pair, [iv.ablate([0], tokens=iv.Roles(("user",)))], ids)
    with pytest.raises(EditError, match="a batch of 1 texts runs, and edits were given 2 prompts"):
        edited_logits(cc, pair, [iv.ablate([0])], ids[:1], prompts=prompts)
    with pytest.raises(EditError, match="expected roles among"):
        iv.Roles(("usher",))


def test_prompts_are_those_that_run(pair: Pair) -> None:
    """The same number of other texts is an error; longer texts that begin with the prompts are none."""
    cc, ids = double(), token_ids()
    prompts = prompts_of(ids[:, :5], torch.ones_like(ids[:, :5]))
    edited_logits(cc, pair, [iv.ablate([0])], ids, prompts=prompts)
    other = ids.clone()
    other[1, 2] += 1
    with pytest.raises(EditError, match="1 of 2 texts do not begin with the prompts"):
        edited_logits(cc, pair, [iv.ablate([0])], other, prompts=prompts)


def test_one_block_at_a_time(pair: Pair) -> None:
    """Inside a block, another over the same models is refused; without edits, and afterwards, it is none."""
    cc, ids = double(), token_ids()
    with iv.editing(cc, pair, [iv.ablate([0])]):
        for edits in ([iv.ablate([1])], [iv.ablate([1], sources=["base"])]):
            with pytest.raises(EditError, match="inside another"), iv.editing(cc, pair, edits):
                pass
        with iv.editing(cc, pair, []):
            pair["chat"].logits(ids)
    with iv.editing(cc, pair, [iv.ablate([1])]):
        pair["chat"].logits(ids)


def test_texts_begin_inside_the_block(pair: Pair) -> None:
    cc, ids, model = double(), token_ids(), pair["chat"]
    cache = model.new_cache()
    model.read([SITE], ids[:, :4], past_key_values=cache)
    seen_none = pytest.raises(SourceMismatch, match="holds 4 tokens, of which edits have seen 0")
    with seen_none, iv.editing(cc, pair, [iv.ablate([0])]):
        model.read([SITE], ids[:, 4:], past_key_values=cache)


def test_prompts_are_rendered_by_the_chat_template(toy_tokenizer: object) -> None:
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "how do I mend a clock"}]
    prompt = iv.read_prompt(messages, toy_tokenizer)
    text = toy_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.text == text and prompt.ids.tolist() == toy_tokenizer(text, add_special_tokens=False)["input_ids"]
    spoken = {role: toy_tokenizer.decode(prompt.ids[prompt.roles == role]) for role in (1, 2)}
    assert spoken == {1: "be kind", 2: "how do I mend a clock"}
    assert prompt.kept.tolist() == [False] + [True] * (len(prompt) - 1)
    plain = iv.read_prompt("the old house", toy_tokenizer)
    assert plain.ids[0] == 1 and plain.roles.tolist() == [4] + [0] * (len(plain) - 1)
    both = iv.Prompts.of([prompt, plain])
    assert both.ids[1, -len(plain) :].tolist() == plain.ids.tolist() and both.lengths.tolist() == [
        len(prompt),
        len(plain),
    ]


def test_bos_is_never_edited(pair: Pair, toy_tokenizer: object) -> None:
    prompts = iv.Prompts.of([iv.read_prompt("the old house", toy_tokenizer), iv.read_prompt("the dog", toy_tokenizer)])
    cc = single()
    clean = pair["base"].read([SITE], prompts.ids, attention_mask=prompts.mask)[SITE]
    with iv.editing(cc, pair, [iv.add([0], 1.0)], prompts=prompts):
        got = pair["base"].read([SITE], prompts.ids, attention_mask=prompts.mask)[SITE]
    moved = (got - clean).abs().sum(-1) > 0
    assert torch.equal(moved, prompts.kept)
