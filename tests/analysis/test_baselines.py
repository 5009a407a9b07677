"""Baselines without a dictionary: the mean difference on first tokens, and the components of the difference."""

from __future__ import annotations

import pytest
import torch

from crosscoder.activations import ROLES, Rows
from crosscoder.analysis.baselines import first_tokens, principal_components
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.models import StudiedModel
from crosscoder.errors import SourceMismatch, TextError
from crosscoder.sources import Source, SourceSet

from .worlds import ListedActivations, regular_rows


def planted(text: AnalysisSet, direction: torch.Tensor, *, roles: str = "text") -> ListedActivations:
    """Rows of `text`: b is a plus `direction` (longer at position 2), and a little noise."""
    width = len(direction)
    sources = SourceSet([Source("base", "embed", width), Source("chat", "embed", width)])
    context = torch.repeat_interleave(torch.arange(text.num_contexts), text.pointers.diff())
    position = torch.arange(text.num_tokens) - text.pointers[context]
    kept = text.kept
    role = torch.full((int(kept.sum()),), ROLES.index(roles), dtype=torch.int8)
    rows = Rows(context[kept], position[kept], role)
    generator = torch.Generator().manual_seed(0)
    x_a = torch.randn(len(role), width, generator=generator)
    shift = direction * (1 + (rows.position == 2).float())[:, None]
    x_b = x_a + shift + 0.01 * torch.randn(len(role), width, generator=generator)
    return ListedActivations(sources, torch.cat([x_a, x_b], 1), rows)


def test_the_mean_difference_is_measured_position_by_position(text: AnalysisSet, pair: dict[str, StudiedModel]) -> None:
    """Lengths against means by hand; a planted unembedding direction is read as its token."""
    model = pair["chat"]
    head = model.model.get_output_embeddings().weight.float()
    direction = 3 * head[77] / head[77].norm()
    activations = planted(text, direction)
    found = first_tokens(activations, a="base", b="chat", model=model)
    assert (found.a, found.b, found.role) == ("base/embed", "chat/embed", "text")
    assert found.positions == (1, 2, 3, 4, 5) and found.num_rows == (5,) * 5
    rows, x = activations.rows, activations.x
    width = x.shape[1] // 2
    for number, position in enumerate(found.positions):
        here = x[rows.position == position]
        length = (here[:, width:] - here[:, :width]).mean(0).norm() / here[:, :width].norm(dim=1).mean()
        assert found.relative_lengths[number] == pytest.approx(float(length), rel=1e-5)
    assert found.relative_lengths[1] > 1.5 * found.relative_lengths[0]
    assert found.readings is not None and len(found.readings) == 5
    logits = model.unembed(direction / direction.square().mean().sqrt())
    best = str(model.tokenizer.decode([int(logits.argmax())]))
    assert best in found.readings[0].promoted and best not in found.readings[0].suppressed
    assert first_tokens(activations, a="base", b="chat", model=None).readings is None


def test_without_text_all_rows_count(text: AnalysisSet) -> None:
    found = first_tokens(planted(text, torch.ones(6), roles="user"), a="base", b="chat", model=None)
    assert found.role is None and found.num_rows == (5,) * 5


def test_components_are_those_of_the_uncentred_difference(text: AnalysisSet, pair: dict[str, StudiedModel]) -> None:
    """Shares against singular values of the whole; the first is the planted shift, and its rows are cited as tokens."""
    activations = planted(text, torch.tensor([2.0, -1.0, 0.5, 0.0, 0.0, 1.0]))
    found = principal_components(activations, text, pair["chat"].tokenizer, a="base", b="chat", model=None)
    delta = (activations.x[:, 6:] - activations.x[:, :6]).double()
    squares = torch.linalg.svdvals(delta).square()
    torch.testing.assert_close(torch.tensor(found.shares).double(), (squares / squares.sum())[:5], rtol=1e-6, atol=1e-9)
    assert found.share_of_mean == pytest.approx(float(len(delta) * delta.mean(0).square().sum() / squares.sum()))
    assert found.shares[0] > 0.99 and found.num_rows == len(delta)
    second = {int(t) for t in text.token_ids[text.pointers[:-1] + 2]}
    pieces = {str(pair["chat"].tokenizer.decode([token])) for token in second}
    assert pieces & set(found.largest_positive[0])  # where the shift is longest
    assert len(found.largest_negative) == 5 and found.readings is None


def test_rows_that_do_not_say_where_they_lie_are_refused(text: AnalysisSet) -> None:
    placed = planted(text, torch.ones(6))
    with pytest.raises(TextError, match="where each row lies"):
        first_tokens(ListedActivations(placed.sources, placed.x), a="base", b="chat", model=None)
    sources = SourceSet([Source("base", "embed", 4), Source("chat", "embed", 5)])
    rows = regular_rows(num_contexts=2, length=4)
    with pytest.raises(SourceMismatch, match="one width"):
        first_tokens(ListedActivations(sources, torch.zeros(6, 9), rows), a="base", b="chat", model=None)
