"""Latent scaling against least squares, latent by latent, on targets that are written out in full."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from crosscoder.activations import Batch, Rows
from crosscoder.analysis.bootstrap import Bootstrap
from crosscoder.analysis.evaluation import evaluate
from crosscoder.analysis.latent_scaling import LatentScaling, latent_scaling, scaling
from crosscoder.analysis.passes import watch
from crosscoder.analysis.scaling_sums import ScalingSums
from crosscoder.capture.ancestry import Ancestry
from crosscoder.capture.null_pair import NullPair
from crosscoder.crosscoder import Crosscoder
from crosscoder.errors import ConfigError, SourceMismatch, TextError
from crosscoder.nonlinearities import BatchTopK
from crosscoder.sources import Source, SourceSet, difference
from crosscoder.synthetic import ConceptWorld, narrow_exclusive
from crosscoder.training import normaliser
from crosscoder.training.config import TrainConfig
from crosscoder.training.trainer import Trainer
from crosscoder.wiring import acausal, dedicated

from .worlds import ListedActivations, random_crosscoder, random_rows, regular_rows

TARGETS = ("activation", "activation_no_bias", "reconstruction", "error")


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-6) -> None:
    """Equal up to rounding, NaN where the other has it."""
    torch.testing.assert_close(found, wanted.to(found), rtol=tolerance, atol=tolerance, equal_nan=True)


@torch.no_grad()
def least_squares(cc: Crosscoder, x: torch.Tensor, *, a: int, b: int, space: str, kind: str) -> dict[str, torch.Tensor]:
    """Every β by `lstsq` of the whole target on `f v`, from the weights of an acausal fp64 crosscoder of two sources.

    Space by space from scratch: in raw space targets, directions and biases are those of the folded function.
    """
    width = cc.sources.widths[0]
    f = cc.encode(x).to_dense()
    scale, mean = cc.scale.repeat_interleave(width), cc.mean
    decoder, bias, target = cc.weights[0].decoder, cc.bias, (x - mean) * scale
    if space == "raw":
        decoder, bias, target = decoder / scale, bias / scale + mean, x
    whole = f @ decoder + bias
    columns = [slice(0, width), slice(width, 2 * width)]
    betas = {f"beta_{t}_{side}": torch.full((cc.num_latents,), torch.nan).double() for t in TARGETS for side in "ab"}
    for (side, m), j in product((("a", a), ("b", b)), range(cc.num_latents)):
        v, here = decoder[j, columns[b]], columns[m]
        own = f[:, j, None] * decoder[j, here]
        targets = {
            "activation": target[:, here],
            "activation_no_bias": target[:, here] - bias[here],
            "reconstruction": whole[:, here] - (own if kind == "leave_one_out" else 0),
            "error": target[:, here] - whole[:, here] + own,
        }
        design = (f[:, j, None] * v).reshape(-1, 1)
        for name, y in targets.items():
            if design.norm() > 0:
                betas[f"beta_{name}_{side}"][j] = torch.linalg.lstsq(design, y.reshape(-1, 1)).solution.squeeze()
    ratios = {f"nu_{t}": betas[f"beta_{t}_a"] / betas[f"beta_{t}_b"] for t in TARGETS}
    return betas | ratios


def trained_crosscoder() -> tuple[Crosscoder, torch.Tensor]:
    """A small world's crosscoder after 150 steps, in fp64, sources on unequal scales; and rows it did not see."""
    world = ConceptWorld(narrow_exclusive("common", width=16), seed=3)
    stretch = torch.cat([torch.ones(16), torch.full((16,), 7.0)])
    batches = [next(world.batches(256)).x * stretch + 0.5 for _ in range(60)]
    cc = Crosscoder(acausal(world.sources, num_latents=32), BatchTopK(2))
    fitted = normaliser.fit(world.sources, batches)
    cc.set_normaliser(fitted.mean.float(), fitted.scale.float())
    trainer = Trainer(cc, TrainConfig(num_tokens=150 * 256, batch_size=256, learning_rate=5e-3))
    for step in range(150):
        trainer.step(batches[step % 60])
    cc.calibrate(batches[:4])
    return cc.eval().double(), (next(world.batches(300)).x * stretch + 0.5).double()


def assert_is_least_squares(cc: Crosscoder, x: torch.Tensor) -> None:
    """Both directions, both spaces, both kinds of reconstruction."""
    keys = cc.writes.keys
    sums = ScalingSums(cc, [keys, keys[::-1]], bootstrap=None)
    watch(cc, ListedActivations(cc.sources, x), reconstructions=[sums])
    for (a, b), space, kind in product([(0, 1), (1, 0)], ("normalised", "raw"), ("full", "leave_one_out")):
        found = scaling(sums, a=keys[a], b=keys[b], space=space, reconstruction=kind)
        for name, wanted in least_squares(cc, x, a=a, b=b, space=space, kind=kind).items():
            close(getattr(found, name), wanted)
        assert (found.space, found.reconstruction, found.reason) == (space, kind, None)
        assert found.num_active.tolist() == (cc.encode(x).to_dense() > 0).sum(0).tolist()


def test_one_pass_equals_least_squares_on_random_weights() -> None:
    """Unequal scales, a mean far from zero, biases, latents that never fire."""
    cc = random_crosscoder((6, 6), num_latents=30).double()
    with torch.no_grad():
        cc.weights[0].encoder_bias[:2] = -1e3
    x = random_rows(cc.sources, 200).double()
    assert_is_least_squares(cc, x)
    assert (
        latent_scaling(cc, ListedActivations(cc.sources, x), a="base", b="chat", bootstrap=None)
        .nu_error[:2]
        .isnan()
        .all()
    )


def test_one_pass_equals_least_squares_on_trained_weights() -> None:
    """A crosscoder that has learned a world."""
    assert_is_least_squares(*trained_crosscoder())


def test_folded_crosscoders_give_the_same() -> None:
    """Where the normaliser is stored changes no number, in either space."""
    cc = random_crosscoder((6, 6)).double()
    activations = ListedActivations(cc.sources, random_rows(cc.sources, 150).double())
    for space in ("normalised", "raw"):
        one, two = (
            latent_scaling(c, activations, a="base", b="chat", space=space, bootstrap=None) for c in (cc, cc.folded())
        )
        for name in ("nu_error", "nu_reconstruction", "nu_activation", "nu_activation_no_bias", "beta_activation_a"):
            close(getattr(one, name), getattr(two, name), 1e-5)


def in_batches(activations: ListedActivations, sizes: list[int]) -> ListedActivations:
    """The same rows, in batches of these sizes over and over."""

    class Odd(ListedActivations):
        def contexts(self):
            first, turn = 0, 0
            while first < len(self.x):
                part = slice(first, first + sizes[turn % len(sizes)])
                rows = self.rows and Rows(self.rows.context[part], self.rows.position[part], self.rows.role[part])
                yield Batch(self.x[part], rows)
                first, turn = part.stop, turn + 1

    return Odd(activations.sources, activations.x, activations.rows)


def some_rows(cc: Crosscoder, *, num_contexts: int = 30, length: int = 9) -> ListedActivations:
    """Rows in contexts, in the crosscoder's dtype."""
    rows = regular_rows(num_contexts=num_contexts, length=length)
    return ListedActivations(cc.sources, random_rows(cc.sources, len(rows.context)).to(cc.bias.dtype), rows)


def test_odd_batches_give_the_same_numbers_and_intervals() -> None:
    """Contexts may straddle batches: weights belong to the document, not to the batch."""
    cc = random_crosscoder((6, 6)).double()
    activations = some_rows(cc)
    whole, odd = (
        latent_scaling(cc, in_batches(activations, sizes), a="base", b="chat") for sizes in ([1000], [7, 1, 13])
    )
    assert whole.intervals is not None and odd.intervals is not None
    for name in ("nu_error", "nu_reconstruction", "nu_activation"):
        close(getattr(whole, name), getattr(odd, name), 1e-9)
        close(getattr(whole.intervals, name), getattr(odd.intervals, name), 1e-9)
        assert not getattr(whole.intervals, name).isnan().all()
    assert whole.intervals.num_documents.tolist() == odd.intervals.num_documents.tolist()


def test_intervals_equal_an_explicit_resampling() -> None:
    """Every draw is a least squares of its own, on rows repeated as often as their document was drawn."""
    cc = random_crosscoder((6, 6), num_latents=8).double()
    activations = some_rows(cc, num_contexts=25)
    bootstrap = Bootstrap(num_draws=12, seed=5)
    found = latent_scaling(cc, activations, a="base", b="chat", bootstrap=bootstrap)
    assert found.intervals is not None and activations.rows is not None
    weights = bootstrap.weights(torch.arange(25))[activations.rows.context]
    draws: dict[str, list[torch.Tensor]] = {"nu_error": [], "nu_reconstruction": [], "nu_activation": []}
    for r in range(12):
        x = activations.x.repeat_interleave(weights[:, r].long(), dim=0)
        numbers = least_squares(cc, x, a=0, b=1, space="normalised", kind="full")
        for name, drawn in draws.items():
            drawn.append(numbers[name])
    for name, drawn in draws.items():
        wanted = torch.stack(drawn, dim=1).nanquantile(torch.tensor([0.025, 0.975]).double(), dim=1).T
        kept = found.intervals.num_documents >= 5
        assert kept.any()
        close(getattr(found.intervals, name)[kept], wanted[kept])


def test_documents_straddle_contexts_and_share_them() -> None:
    """With a text its documents are what is resampled: the numbers behind the rows come from it."""
    rows = Rows(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1, 2, 3, 0, 1]), torch.zeros(5).to(torch.int8))
    document = torch.tensor([-1, 0, 0, 1, 1, -1])
    text = analysis_set(document, pointers=[0, 4, 6])
    bootstrap = Bootstrap(text=text)
    batch = Batch(torch.zeros(5, 2), rows)
    assert bootstrap.documents(batch).tolist() == [0, 0, 1, 1, 3], "the last token is of none: it counts with context 1"
    assert replace(bootstrap, text=None).documents(batch).tolist() == [0, 0, 0, 1, 1]
    elsewhere = Rows(torch.tensor([2]), torch.tensor([0]), torch.zeros(1).to(torch.int8))
    with pytest.raises(TextError, match="the text has 2 contexts"):
        bootstrap.documents(Batch(torch.zeros(1, 2), elsewhere))
    with pytest.raises(TextError, match="do not say which context"):
        bootstrap.documents(Batch(torch.zeros(1, 2)))
    with pytest.raises(ConfigError, match="at least 2 draws"):
        Bootstrap(num_draws=1)


def analysis_set(document: torch.Tensor, *, pointers: list[int]):
    """An analysis set of which only the documents matter."""
    from crosscoder.capture.analysis_set import AnalysisSet
    from crosscoder.capture.contexts import DocumentId

    nothing = torch.zeros_like(document)
    named = tuple(DocumentId(str(i), "toy") for i in range(int(document.max()) + 1))
    return AnalysisSet(
        torch.tensor(pointers),
        nothing,
        nothing,
        document,
        nothing,
        nothing,
        nothing.bool(),
        documents=named,
        vocabulary="toy",
    )


def test_weights_are_poisson_and_belong_to_seed_and_document() -> None:
    """Mean and variance 1, no correlation between documents, the same whatever is asked for beside."""
    bootstrap = Bootstrap(num_draws=4000, seed=1)
    weights = bootstrap.weights(torch.arange(20))
    assert (weights.mean(1) - 1).abs().max() < 0.08 and (weights.var(1) - 1).abs().max() < 0.15
    share_of_zero = (weights == 0).double().mean()
    assert float(share_of_zero) == pytest.approx(0.3679, abs=0.01)
    assert torch.corrcoef(weights).fill_diagonal_(0).abs().max() < 0.08
    assert torch.equal(bootstrap.weights(torch.tensor([7])), weights[7:8])
    assert not torch.equal(replace(bootstrap, seed=2).weights(torch.tensor([7])), weights[7:8])


def test_memory_does_not_grow_with_rows() -> None:
    """The state is the same size after one batch and after ten times as many rows."""
    cc = random_crosscoder((6, 6))
    sums = ScalingSums(cc, [("base", "chat"), ("chat", "base")])
    sizes = []
    for num_contexts in (10, 100):
        watch(cc, some_rows(cc, num_contexts=num_contexts), reconstructions=[sums])
        sizes.append(
            (sums.num_bytes, [(k, tuple(v.shape)) for k, v in vars(sums._sums).items() if hasattr(v, "shape")])
        )
    assert sizes[0] == sizes[1]
    held = sum(v.numel() * v.element_size() for v in vars(sums._sums).values() if hasattr(v, "shape"))
    assert sums.num_bytes == held and len(sums._products) == 4


def test_many_documents_at_once_are_summed_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound on memory changes no number."""
    cc = random_crosscoder((6, 6)).double()
    activations = in_batches(some_rows(cc, num_contexts=90), [1000])
    whole = latent_scaling(cc, activations, a="base", b="chat")
    monkeypatch.setattr("crosscoder.analysis.bootstrap._CELLS", 1)
    parts = latent_scaling(cc, activations, a="base", b="chat")
    assert whole.intervals is not None and parts.intervals is not None
    close(whole.intervals.nu_error, parts.intervals.nu_error, 1e-9)
    assert whole.intervals.num_documents.tolist() == parts.intervals.num_documents.tolist()


def test_documents_are_counted_once() -> None:
    """By latent, by hand: those with at least one active row."""
    cc = random_crosscoder((6, 6), num_latents=40).double()
    with torch.no_grad():
        cc.weights[0].encoder_bias[::2] = -7.0
    activations = some_rows(cc, num_contexts=12)
    found = latent_scaling(cc, in_batches(activations, [5]), a="base", b="chat")
    assert found.intervals is not None and activations.rows is not None
    active = cc.encode(activations.x).to_dense() > 0
    wanted = [sum(bool(active[activations.rows.context == c, j].any()) for c in range(12)) for j in range(40)]
    assert found.intervals.num_documents.tolist() == wanted
    few = found.intervals.num_documents < 5
    assert found.intervals.nu_error[few].isnan().all() and few.any() and not few.all()


def test_equal_sources_have_ratio_one() -> None:
    """x^a = x^b and d^a = d^b: every ν of every live latent is 1."""
    cc = random_crosscoder((6, 6), num_latents=30).double()
    with torch.no_grad():
        for part in (cc.weights[0].decoder, cc.weights[0].encoder, cc.bias[None], cc.mean[None]):
            part[:, 6:] = part[:, :6]
    cc.set_normaliser(cc.mean, torch.tensor([2.0, 2.0]))
    half = random_rows(cc.sources, 200)[:, :6].double()
    for space, kind in product(("normalised", "raw"), ("full", "leave_one_out")):
        activations = ListedActivations(cc.sources, torch.cat([half, half], dim=1))
        found = latent_scaling(cc, activations, a="base", b="chat", space=space, reconstruction=kind, bootstrap=None)
        live = found.num_active > 0
        for target in TARGETS:
            close(getattr(found, f"nu_{target}")[live], torch.ones(int(live.sum())), 1e-9)


def exclusive_concept() -> tuple[Crosscoder, torch.Tensor, torch.Tensor]:
    """Base and chat share a direction; chat has one more at right angles. Latent 1 has a decoder at base all the same.

    Latents read what they write, and base's decoder of the exclusive latent is put there by hand: a norm that misleads.
    """
    sources = SourceSet([Source("base", "embed", 4), Source("chat", "embed", 4)])
    cc = Crosscoder(acausal(sources, num_latents=2), BatchTopK(2), seed=None).double()
    with torch.no_grad():
        cc.weights[0].encoder[0, [0, 4]] = 0.5
        cc.weights[0].encoder[1, 5] = 1.0
        cc.weights[0].decoder[0, [0, 4]] = 1.0
        cc.weights[0].decoder[1, 5] = 1.0
        cc.weights[0].threshold.fill_(0.0)
    cc.refresh_gate()
    generator = torch.Generator().manual_seed(0)
    f = torch.rand(400, 2, generator=generator).double() * (torch.rand(400, 2, generator=generator) < 0.5)
    x = torch.zeros(400, 8).double()
    x[:, 0] = x[:, 4] = f[:, 0]
    x[:, 5] = f[:, 1]
    return cc.eval(), x, f


def test_an_absent_concept_has_ratio_zero_whatever_its_norm_says() -> None:
    """ν_error and ν_reconstruction vanish with the concept; a decoder at base that explains nothing hides nothing."""
    cc, x, _ = exclusive_concept()
    found = latent_scaling(cc, ListedActivations(cc.sources, x), a="base", b="chat", bootstrap=None)
    close(found.nu_error, torch.tensor([1.0, 0.0]), 1e-12)
    close(found.nu_reconstruction, torch.tensor([1.0, 0.0]), 1e-12)
    with torch.no_grad():
        cc.weights[0].decoder[1, 1] = 1.0
    cc.refresh_gate()
    assert cc.decoder_norms()[1].tolist() == [1.0, 1.0], "the norms call it shared"
    found = latent_scaling(cc, ListedActivations(cc.sources, x), a="base", b="chat", bootstrap=None)
    close(found.nu_error, torch.tensor([1.0, 0.0]), 1e-12)
    close(found.nu_activation, torch.tensor([1.0, 0.0]), 1e-12)


def test_complete_shrinkage_and_decoupling_show() -> None:
    """A shared concept has ν_error 1 where its decoder at base was shrunk, ν_reconstruction 1 where another says it."""
    cc, x, f = exclusive_concept()
    x[:, 1] = f[:, 1]
    shrunk = latent_scaling(cc, ListedActivations(cc.sources, x), a="base", b="chat", bootstrap=None)
    assert cc.decoder_norms()[1].tolist() == [0.0, 1.0], "the norms call it exclusive"
    close(shrunk.nu_error[1], torch.tensor(1.0), 1e-12)
    close(shrunk.nu_reconstruction[1], torch.tensor(0.0), 1e-12)
    twin = Crosscoder(acausal(cc.sources, num_latents=3), BatchTopK(3), seed=None).double()
    with torch.no_grad():
        for name in ("encoder", "decoder"):
            getattr(twin.weights[0], name)[:2] = getattr(cc.weights[0], name)
        twin.weights[0].encoder[2, 1] = twin.weights[0].decoder[2, 1] = 1.0
        twin.weights[0].threshold.fill_(0.0)
    twin.refresh_gate()
    decoupled = latent_scaling(twin.eval(), ListedActivations(cc.sources, x), a="base", b="chat", bootstrap=None)
    close(decoupled.nu_error[1], torch.tensor(0.0), 1e-12)
    close(decoupled.nu_reconstruction[1], torch.tensor(1.0), 1e-12)


def test_latents_that_cannot_write_b_have_no_ratio() -> None:
    """Base's own latents have no direction at chat; chat's own have one, and are looked for at base."""
    sources = random_crosscoder((6, 6)).sources
    cc = Crosscoder(dedicated(sources, shared=10, exclusive={"base": 5, "chat": 5}), BatchTopK(6), seed=1).double()
    for weights in cc.weights:
        weights.threshold.fill_(0.05)
    found = latent_scaling(cc.eval(), some_rows(cc), a="base", b="chat")
    assert found.num_active.min() > 0
    assert found.nu_error[10:15].isnan().all() and not found.nu_error[15:].isnan().any()
    assert found.intervals is not None and found.intervals.nu_error[10:15].isnan().all()
    assert found.table()["nu_error"].null_count == 5


def assert_without_meaning(found: LatentScaling, why: str) -> None:
    """No number, no interval, and a reason."""
    assert found.reason is not None and why in found.reason and found.intervals is None
    assert all(getattr(found, f"{name}").isnan().all() for name in ("nu_error", "nu_reconstruction", "beta_error_a"))
    assert found.num_active.sum() > 0
    assert found.table().schema.metadata[b"reason"].decode() == found.reason
    assert found.table()["nu_error"].null_count == len(found.num_active)


def test_pairs_without_meaning_say_why() -> None:
    """Unequal widths, a derived difference, and models of no common ancestry."""
    wide = random_crosscoder((6, 3)).double()
    assert_without_meaning(latent_scaling(wide, some_rows(wide), a="base", b="chat"), "3: a direction")
    cc = random_crosscoder((6, 6)).double()
    foreign = Ancestry("base", "chat", cosine=0.01, comparable=1.0, num_tensors=9)
    assert_without_meaning(latent_scaling(cc, some_rows(cc), a="base", b="chat", ancestry=foreign), "no ancestry")
    tuned = replace(foreign, cosine=0.99)
    assert latent_scaling(cc, some_rows(cc), a="base", b="chat", ancestry=tuned).reason is None
    with pytest.raises(ConfigError, match="expected the ancestry of base and chat"):
        latent_scaling(cc, some_rows(cc), a="base", b="chat", ancestry=replace(tuned, b="other"))
    base, chat = Source("base", "embed", 6), Source("chat", "embed", 6)
    derived = Crosscoder(acausal(SourceSet([base, difference(chat, base)]), num_latents=9), BatchTopK(3))
    for weights in derived.weights:
        weights.threshold.fill_(0.0)
    assert_without_meaning(latent_scaling(derived, some_rows(derived), a="base", b="chat-base"), "is a difference")


def test_pairs_that_were_not_summed_are_refused() -> None:
    """The other direction is another pair; a source is no pair with itself."""
    cc = random_crosscoder((6, 6, 6))
    sums = ScalingSums(cc, [("base", "chat"), ("other", "chat")])
    watch(cc, some_rows(cc), reconstructions=[sums])
    assert scaling(sums, a="other", b="chat").a == "other/embed"
    with pytest.raises(SourceMismatch, match="not of the pair"):
        scaling(sums, a="chat", b="base")
    with pytest.raises(SourceMismatch, match="two sources to compare"):
        ScalingSums(cc, [("base", "base")])


def test_one_pass_serves_an_evaluation_too() -> None:
    """`evaluate` hands reconstructions on, and its numbers are what they were."""
    cc = random_crosscoder((6, 6)).train()
    activations = some_rows(cc)
    sums = ScalingSums(cc, [("base", "chat")])
    together, alone = evaluate(cc, activations, reconstructions=[sums]), evaluate(cc, activations)
    assert together.fve == alone.fve and cc.training
    one, two = scaling(sums, a="base", b="chat"), latent_scaling(cc, activations, a="base", b="chat")
    close(one.nu_error, two.nu_error, 1e-12)


def test_the_table_holds_every_number() -> None:
    """One row per latent, intervals beside the ratios."""
    cc = random_crosscoder((6, 6))
    found = latent_scaling(cc, some_rows(cc), a="base", b="chat", space="raw", reconstruction="leave_one_out")
    table = found.table()
    assert table["latent"].to_pylist() == list(range(20))
    assert found.intervals is not None
    for name in ("nu_error", "beta_reconstruction_a", "nu_activation_no_bias"):
        assert table[name].to_pylist() == [None if v != v else v for v in getattr(found, name).tolist()]
    assert table["nu_error_low"].drop_null().to_pylist() == [
        v for v in found.intervals.nu_error[:, 0].tolist() if v == v
    ]
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert metadata == {"a": "base/embed", "b": "chat/embed", "space": "raw", "reconstruction": "leave_one_out"}


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """300 latents that are in base to an extent which differs from document to document, half of it on average.

    Between 90 and 98 % of the 95 % intervals hold ½; intervals by rows, as if those were documents, far fewer.
    """
    num_latents, num_documents = 300, 60
    sources = SourceSet([Source(alias, "embed", num_latents) for alias in ("base", "chat")])
    cc = Crosscoder(acausal(sources, num_latents=num_latents), BatchTopK(num_latents), seed=None).double()
    with torch.no_grad():
        cc.weights[0].encoder[:, num_latents:] = torch.eye(num_latents)
        cc.weights[0].decoder[:, num_latents:] = torch.eye(num_latents)
        cc.weights[0].threshold.fill_(0.0)
    cc.refresh_gate()
    context = torch.arange(num_documents).repeat_interleave(5)
    generator = torch.Generator().manual_seed(0)
    f = torch.rand(len(context), num_latents, generator=generator).double() + 0.1
    extent = torch.rand(num_documents, num_latents, generator=generator).double()[context]
    rows = Rows(context, torch.arange(5).repeat(num_documents), torch.zeros(len(context)).to(torch.int8))
    one_each = replace(rows, context=torch.arange(len(context)))
    covered = []
    for known in (rows, one_each):
        activations = in_batches(ListedActivations(sources, torch.cat([f * extent, f], dim=1), known), [100])
        found = latent_scaling(cc.eval(), activations, a="base", b="chat", bootstrap=Bootstrap(num_draws=200))
        assert found.intervals is not None
        low, high = found.intervals.nu_error.T
        covered.append(float(((low <= 0.5) & (high >= 0.5)).double().mean()))
    assert 0.90 <= covered[0] <= 0.98 and covered[1] < 0.75


def test_a_null_pair_is_a_source_like_any_other() -> None:
    """A copy has ν = 1 once the crosscoder treats both alike; a structureless partner gives numbers all the same."""
    cc = random_crosscoder((6, 6), num_latents=30)
    real = some_rows(cc)
    noisy = latent_scaling(cc, NullPair(real, a="base", b="chat"), a="base", b="chat")
    live = noisy.num_active > 0
    assert noisy.nu_error[live].isfinite().all() and live.any()
    with torch.no_grad():
        for part in (cc.weights[0].decoder, cc.weights[0].encoder, cc.bias[None], cc.mean[None]):
            part[:, 6:] = part[:, :6]
    cc.set_normaliser(cc.mean, torch.tensor([2.0, 2.0]))
    half = real.x[:, :6]
    twice = ListedActivations(cc.sources, torch.cat([half, half], dim=1), real.rows)
    copied = latent_scaling(cc, twice, a="base", b="chat")
    close(copied.nu_error[copied.num_active > 0], torch.ones(int((copied.num_active > 0).sum())), 1e-3)


def test_a_direction_that_is_left_over_makes_no_latent_specific() -> None:
    """Base's leftover decoder of chat's concept: β_error is 0 there, and its ratio is not looked at."""
    cc, x, _ = exclusive_concept()
    with torch.no_grad():
        cc.weights[0].decoder[1, 3] = 0.2
    cc.refresh_gate()
    sums = ScalingSums(cc, [("base", "chat"), ("chat", "base")], bootstrap=None)
    watch(cc, ListedActivations(cc.sources, x), reconstructions=[sums])
    of_chat, of_base = scaling(sums, a="base", b="chat"), scaling(sums, a="chat", b="base")
    assert of_chat.specific().tolist() == [False, True]
    assert of_base.beta_error_b[1].abs() < 1e-9 and of_base.specific().tolist() == [False, False]
    assert of_chat.specific(least_beta=1.5).tolist() == [False, False]
    assert replace(
        of_chat, nu_error=torch.tensor([0.0, -0.3]), nu_reconstruction=torch.zeros(2)
    ).specific().tolist() == [
        True,
        False,
    ]
