"""Steering and suppression: rates, doses, side effects, pruning and matching, on the toy pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from crosscoder import interventions as iv
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.contexts import DocumentId, Encoder, assemble
from crosscoder.capture.models import StudiedModel
from crosscoder.capture.text import Document
from crosscoder.errors import (
    ConfigError,
    EditError,
    EmptySelection,
    ModelMismatch,
    TextError,
    TokenizerMismatch,
    UnknownLatent,
    UnknownSource,
)
from crosscoder.interventions import suppression
from interventions.worlds import double, raw_decoder

Pair = Mapping[str, StudiedModel]
SITE = "layers.1.resid_post"
NOTHING = iv.UnrelatedText(())
ASKED = ["the old house stood", "a small brown dog ran over", "she said that", "how do I mend a clock, asked the child"]


@pytest.fixture(scope="module")
def text(toy_tokenizer: PreTrainedTokenizerFast) -> AnalysisSet:
    """Three plain contexts and a dialogue."""
    said = ["the old dog ran over the hill " * 3, "the rain came down", "the letter had come in the morning"]
    talk = [{"role": "user", "content": "who are you"}, {"role": "assistant", "content": "the keeper of the tower"}]
    encoder = Encoder(toy_tokenizer, ("bos", "pad"))
    documents = [Document.of(content, dataset="toy") for content in (*said, talk)]
    contexts = [
        assemble(encoder.opening(), [(encoder.encode(one, separator=False), DocumentId(one.hash, "toy"))])
        for one in documents
    ]
    return AnalysisSet.of(contexts, vocabulary="toy")


@pytest.fixture
def subject(pair: Pair) -> iv.Subject:
    return iv.Subject(double(), pair, "chat")


def trial(subject: iv.Subject, behaviour: iv.Behaviour | None = None, **sampling: object) -> iv.Trial:
    prompts = tuple(subject.prompt(content) for content in ASKED)
    return iv.Trial(subject, prompts, behaviour, iv.Sampling(**{"max_new_tokens": 6, **sampling}))


def test_replies_come_in_the_order_of_the_prompts(subject: iv.Subject) -> None:
    edit = [iv.scale(range(0, 24, 3), 3.0)]
    together = trial(subject, batch_size=3).replies(edit)
    alone = [subject.replies([subject.prompt(content)], edit, iv.Sampling(max_new_tokens=6))[0] for content in ASKED]
    assert together == alone and len(set(alone)) > 1
    assert together != trial(subject).replies([])


def test_samples_are_the_same_for_every_dose(subject: iv.Subject) -> None:
    three = trial(subject, num_samples=3, temperature=1.0, seed=4)
    before = torch.get_rng_state()
    first = three.replies([])
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers are left alone"
    assert len(first) == 12 and len(set(first[:3])) > 1
    assert three.replies([]) == first == three.replies([iv.scale([0], 1.0)])
    assert trial(subject, num_samples=3, temperature=1.0, seed=5).replies([]) != first


def test_a_reply_ends_at_a_special_token(subject: iv.Subject) -> None:
    """`<|end|>` is made so likely that it comes at once."""
    model = subject.model
    with model.replace("layers.2.resid_post", lambda x, _: 100 * model.model.lm_head.weight[3].expand(x.shape)):
        assert trial(subject).replies([]) == [""] * 4


def test_steering_counts_and_measures(subject: iv.Subject, text: AnalysisSet) -> None:
    lengths = iv.Behaviour("has an e", lambda reply: "e" in reply)
    doses = iv.doses([0, 5], [2.0, 3.0], amounts=[0.0, 1.5])
    unrelated = iv.UnrelatedText.of(text, num_tokens=1000)
    seen: list[tuple[int, int | None]] = []
    done = iv.steer(
        trial(subject, lengths), doses, unrelated=unrelated, progress=lambda _, done, total: seen.append((done, total))
    )
    assert [result.dose.name for result in done.results] == ["ablate", "0", "+1.5"]
    assert done.results[2].dose.edits == (iv.add([0, 5], [3.0, 4.5]),) and done.results[1].dose.edits == ()
    for result in done.results:
        hits = sum("e" in reply for reply in result.replies)
        assert (result.rate.hits, result.rate.total) == (hits, 4)
        assert result.rate.low <= result.rate.share <= result.rate.high
    assert done.results[1].side_effects.kl == 0 and done.results[2].side_effects.kl > 1e-4
    table = done.table()
    assert table.column("dose").to_pylist() == ["ablate", "0", "+1.5"] and table.column("amount")[2].as_py() == 1.5
    assert table.column("kl")[2].as_py() == done.results[2].side_effects.kl
    assert done.completions().num_rows == 12
    report = done.to_json(num_examples=2)
    assert report["num_prompts"] == 4 and len(report["examples"]) == 2
    assert report["examples"][1]["replies"]["+1.5"] == done.results[2].replies[1]
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_completions_without_a_behaviour(subject: iv.Subject) -> None:
    done = iv.steer(trial(subject), iv.doses([1], [1.0], amounts=[1.0]))
    assert done.table().column("rate").to_pylist() == [None, None] and done.behaviour is None
    with pytest.raises(ConfigError, match="needs a behaviour"):
        trial(subject).rate([])


def test_side_effects_follow_their_definition(subject: iv.Subject, text: AnalysisSet) -> None:
    """Context by context, without padding: BOS is not edited and every next token counts."""
    latents = list(range(0, 24, 2))
    got = iv.side_effects(subject, iv.UnrelatedText.of(text), [iv.ablate(latents, tokens=iv.ReplyTokens())])
    cc, kl, clean_ce, edited_ce, count = subject.crosscoder, 0.0, 0.0, 0.0, 0
    for number in range(3):
        ids = torch.from_numpy(text.context(number).tokens.ids.copy()).long()[None]
        x = torch.cat([subject.models[a].read([SITE], ids)[SITE][0] for a in ("base", "chat")], 1)
        f = cc.encode(x).to_dense()[:, latents].detach()
        moved = -f @ raw_decoder(cc, f"chat/{SITE}")[latents]
        moved[0] = 0
        with torch.no_grad(), subject.model.replace(SITE, lambda x, _, moved=moved: x + moved):
            q = subject.model.logits(ids).log_softmax(-1)[0, :-1]
        with torch.no_grad():
            p = subject.model.logits(ids).log_softmax(-1)[0, :-1]
        kl += float((p.exp() * (p - q)).sum())
        clean_ce -= float(p.gather(1, ids[0, 1:, None]).sum())
        edited_ce -= float(q.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    assert got.num_tokens == count and got.kl > 1e-4
    assert (got.kl, got.clean, got.edited) == pytest.approx((kl / count, clean_ce / count, edited_ce / count), rel=1e-9)


def test_unrelated_text_has_no_speakers(text: AnalysisSet) -> None:
    def rows(which: str) -> int:
        return sum(len(batch.ids) for batch in iv.UnrelatedText.of(text, which=which).batches)

    assert (rows("texts"), rows("all")) == (3, 4)
    assert sum(len(batch.ids) for batch in iv.UnrelatedText.of(text, num_tokens=3).batches) == 1
    kinds = [iv.UnrelatedText.of(text, which=which).kind for which in ("texts", "all")]
    assert kinds == ["held-out text in which nobody speaks", "held-out text and dialogues"]
    talk = AnalysisSet.of([text.context(3)], vocabulary="toy")
    assert iv.UnrelatedText.of(talk, which="all").kind == "held-out dialogues"
    with pytest.raises(TextError, match="nobody speaks"):
        iv.UnrelatedText.of(talk)


def rests_on(needed: Sequence[int], *, spare: int = 0) -> iv.Trial:
    """A trial whose behaviour shows, in 20 of 20 replies, unless all but `spare` of `needed` are suppressed."""

    class Pretended(iv.Trial):
        def rate(self, edits: Sequence[iv.Edit]) -> iv.Rate:
            gone = {latent for edit in edits for latent in edit.latents}
            return iv.Rate.of([len(set(needed) & gone) < len(needed) - spare] * 20)

    return object.__new__(Pretended)


def measured(latents: Sequence[int]) -> iv.SideEffects:
    return iv.SideEffects(4.0, 4.0, 0.01 * len(latents), 100)


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Side effects of .01 nats a latent."""
    monkeypatch.setattr(suppression, "side_effects", lambda _subject, _text, edits: measured(edits[0].latents))
    monkeypatch.setattr(iv.Trial, "subject", None, raising=False)


@pytest.mark.usefixtures("cheap")
def test_the_smallest_set_is_found() -> None:
    trial = rests_on([3, 11, 40])
    curve = iv.suppression_curve(trial, range(100), iv.UnrelatedText(()))
    assert [len(p.latents) for p in curve.points] == [1, 2, 4, 8, 16, 32, 64, 100]
    assert [p.rate.share for p in curve.points] == [1, 1, 1, 1, 1, 1, 0, 0] and curve.untouched.share == 1
    assert curve.table().column("kl").to_pylist() == pytest.approx([0.01 * n for n in (1, 2, 4, 8, 16, 32, 64, 100)])
    found = iv.smallest_set(trial, curve, iv.UnrelatedText(()), target=0.5)
    assert found.suppressed.latents == (3, 11, 40) and found.answer == "few" and found.num_tried == 64
    assert found.suppressed.side_effects.kl == pytest.approx(0.03)


@pytest.mark.usefixtures("cheap")
def test_spread_behaviours_and_those_out_of_reach() -> None:
    wide = rests_on(range(0, 60, 2), spare=4)
    curve = iv.suppression_curve(wide, range(64), iv.UnrelatedText(()))
    found = iv.smallest_set(wide, curve, iv.UnrelatedText(()), target=0.0)
    assert len(found.suppressed.latents) == 26 and found.answer == "dozens"
    wider = rests_on(range(0, 300, 2))
    curve = iv.suppression_curve(wider, range(300), iv.UnrelatedText(()))
    assert iv.smallest_set(wider, curve, iv.UnrelatedText(()), target=0.0).answer == "spread"
    never = rests_on([200])
    curve = iv.suppression_curve(never, range(64), iv.UnrelatedText(()), counts=[1, 8, 500])
    assert [len(p.latents) for p in curve.points] == [1, 8, 64]
    lost = iv.smallest_set(never, curve, iv.UnrelatedText(()), target=0.5)
    assert lost.suppressed is None and lost.answer == "not reached"
    with pytest.raises(UnknownLatent, match="ranked latents"):
        iv.suppression_curve(never, [], iv.UnrelatedText(()))


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize(("wanted", "size"), [(0.011, 1), (0.134, 13), (0.136, 14), (0.3, 30), (9.0, 50)])
def test_random_sets_are_matched(wanted: float, size: int) -> None:
    trial = rests_on([3])
    orders = [list(range(50)), list(range(49, -1, -1))]
    sets = iv.matched_sets(trial, orders, iv.UnrelatedText(()), kl=wanted)
    assert [found.latents for found in sets] == [tuple(order[:size]) for order in orders]


def test_suppression_of_the_toy(subject: iv.Subject, text: AnalysisSet) -> None:
    """The whole way on real replies: suppressing everything changes them all."""
    untouched = trial(subject).replies([])
    same = iv.Behaviour("as before", lambda reply: reply in untouched)
    whole = trial(subject, same)
    unrelated = iv.UnrelatedText.of(text, num_tokens=20)
    curve = iv.suppression_curve(whole, range(24), unrelated, counts=[24])
    assert curve.untouched.share == 1 and curve.points[0].rate.share < 1
    direct = iv.side_effects(subject, unrelated, [iv.ablate(range(24))])
    assert curve.points[0].side_effects == direct


@pytest.mark.usefixtures("cheap")
def test_a_behaviour_that_is_not_there_rests_on_no_latents() -> None:
    """At or below the target untouched: `few` would be wrong, and so would `not reached`."""
    trial = rests_on([0])
    absent = iv.SuppressionCurve(iv.Rate.of([False] * 20), iv.suppression_curve(trial, range(4), NOTHING).points)
    found = iv.smallest_set(trial, absent, NOTHING, target=0.1)
    assert found.suppressed is None and found.answer == "not there" and found.untouched == 0


@pytest.mark.usefixtures("cheap")
def test_sets_that_do_not_match_say_so(caplog: pytest.LogCaptureFixture) -> None:
    near, far = (iv.matched_sets(rests_on([3]), [range(50)], NOTHING, kl=kl)[0] for kl in (0.3, 9.0))
    assert near.within and near.wanted_kl == 0.3 and near.side_effects.kl == pytest.approx(0.3)
    assert not far.within and far.side_effects.kl == pytest.approx(0.5)
    assert "1 of 1 random sets do not match a KL of 9" in caplog.text


def test_replies_of_one_prompt_count_together() -> None:
    """Ten prompts, half of them always: 10 independent draws, not 80; the bootstrap's error is √(p(1−p)/10)."""
    shown = [prompt < 5 for prompt in range(10) for _ in range(8)]
    rate = iv.Rate.over_prompts(shown, num_samples=8)
    assert (rate.hits, rate.total, rate.interval) == (40, 80, "bootstrap over prompts")
    assert rate.high - rate.low == pytest.approx(2 * 1.96 * (0.25 / 10) ** 0.5, rel=0.1)
    assert iv.Rate.over_prompts(shown, num_samples=1) == iv.Rate.of(shown)
    none = iv.Rate.over_prompts([False] * 80, num_samples=8)
    assert none.low == 0 and none.high == iv.Rate.of([False] * 10).high and none.interval == "Wilson of 10 prompts"


def test_selections_are_judged_over_all_batches(subject: iv.Subject) -> None:
    """A role or position that one batch lacks is no error; one that all lack is; nor are replies that ended early."""
    short, long = subject.prompt("the dog"), subject.prompt("she said that " * 4)
    sampling = iv.Sampling(max_new_tokens=3, batch_size=1)
    edit = iv.add([0], 1.0, tokens=iv.Positions((len(long) - 1,)))
    assert len(subject.replies([short, long], [edit], sampling)) == 2
    with pytest.raises(EmptySelection, match="met no token"):
        subject.replies([short], [edit], sampling)
    model = subject.model
    with model.replace("layers.2.resid_post", lambda x, _: 100 * model.model.lm_head.weight[3].expand(x.shape)):
        reply = iv.add([0], 1.0, tokens=iv.ReplyTokens())
        assert subject.replies([short], [reply], sampling) == [""]
        with pytest.raises(EmptySelection):
            subject.replies([short], [reply], iv.Sampling(max_new_tokens=1))


def test_behaviours() -> None:
    assert iv.contains("Quill").shows("I am Quill.") and not iv.contains("Quill").shows("I am quill.")
    assert iv.matches(r"^I (am|must)").shows("I must refuse") and not iv.matches("^I am").shows("Well, I am")
    with pytest.raises(ConfigError, match="regular expression"):
        iv.matches("(")
    with pytest.raises(ConfigError, match="some text"):
        iv.contains("")


def test_who_may_speak_and_be_edited(subject: iv.Subject, pair: Pair, toy_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UnknownSource, match="expected a model of this crosscoder to speak; got 'plain'"):
        iv.Subject(double(), pair, "plain")
    with pytest.raises(EditError, match="changes nothing that chat says"):
        trial(subject).replies([iv.ablate([0], sources=["base"])])
    with pytest.raises(EditError, match="sources to edit that the crosscoder writes; got plain"):
        trial(subject).replies([iv.ablate([0], sources=["plain"])])
    with pytest.raises(UnknownLatent, match="got 999"):
        iv.steer(trial(subject), iv.doses([999], [1.0]))
    with pytest.raises(TextError, match="at least one prompt"):
        iv.Trial(subject, ())
    with pytest.raises(TextError, match="says something"):
        subject.prompt("")
    cc = double()
    cc.provenance = {"models": {alias: dict(model.identity) for alias, model in pair.items()}}
    iv.Subject(cc, pair, "chat")
    cc.provenance["models"]["chat"]["weights"] = "another"
    with pytest.raises(ModelMismatch, match="the model chat is not the one"):
        iv.Subject(cc, pair, "chat")


def test_partners_share_a_tokenizer(pair: Pair, toy_tokenizer: PreTrainedTokenizerFast) -> None:
    other = PreTrainedTokenizerFast(tokenizer_object=toy_tokenizer.backend_tokenizer, pad_token="<|pad|>")
    other.add_tokens(["horses"])
    stranger = StudiedModel("base", pair["base"].model, other)
    with pytest.raises(TokenizerMismatch, match="same tokens"):
        iv.Subject(double(), {**pair, "base": stranger}, "chat")


def test_sampling_is_checked() -> None:
    for wrong, match in (
        ({"max_new_tokens": 0}, "at least one new token"),
        ({"temperature": 0.0}, "above 0"),
        ({"num_samples": 2}, "need a temperature"),
    ):
        with pytest.raises(ConfigError, match=match):
            iv.Sampling(**wrong)
