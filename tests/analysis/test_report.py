"""The report: hostile tokens stay text, highlights follow values, nothing is loaded from anywhere."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from crosscoder.activations import ROLES, Rows
from crosscoder.analysis.calibrated import Cut, Found, NullTest
from crosscoder.analysis.classes import latent_classes
from crosscoder.analysis.diff_cards import Unmeasured
from crosscoder.analysis.diff_data import most_used
from crosscoder.analysis.label_scores import DetectorScore, LabelScore, LabelScores
from crosscoder.analysis.latent_cards import LatentCard, highlighted, percent
from crosscoder.analysis.markup import page, plain, visible
from crosscoder.analysis.pair import PairStatistics, pair_statistics
from crosscoder.analysis.pair_controls import CalibratedScore, ControlResult, PairControls, Stability
from crosscoder.analysis.passes import watch
from crosscoder.analysis.plots import Axes, Curve, bars, curves, tiles
from crosscoder.analysis.report import ReportData, report
from crosscoder.analysis.shares import share_of
from crosscoder.analysis.statistics import LatentStatistics
from crosscoder.analysis.survivors import Survivors
from crosscoder.capture.analysis_set import AnalysisSet
from crosscoder.capture.contexts import DocumentId
from crosscoder.crosscoder import Crosscoder
from crosscoder.interventions.patching_curves import Condition, PatchingCurves

from .worlds import ListedActivations, random_crosscoder

HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "'onmouseover='alert(1)",
    "</style><script>alert(1)</script>",
    "</title><b>",
    "&lt;b&gt;",
    "javascript:alert(1)",
    "\u202eevil\u202c",
    "a\u2028b\u2029c\x00\x1b[2J\u200b\ufeff",
)
ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "section", "article", "footer", "figure",
    "figcaption", "h1", "h2", "h3", "p", "b", "span", "dl", "dt", "dd", "div", "ol", "li", "br", "a", "code", "polygon",
    "table", "thead", "tbody", "tr", "th", "td", "svg", "line", "rect", "circle", "polyline", "text",
}  # fmt: skip


class Collector(HTMLParser):
    """Tags, attributes and text of a page, as a browser would see them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile_data(*, labels: LabelScores | None = None) -> ReportData:
    """A report in which every string that can come from outside is hostile."""
    cc = random_crosscoder()
    classes = latent_classes(cc, a="base", b="chat")
    statistics = {"density": 0.01, "max_value": 2.0} | {f"density_{role}": 0.01 for role in ROLES}
    exemplar = {
        "value": 2.0,
        "role": HOSTILE[0],
        "context": 3,
        "position": 7,
        "first_position": 6,
        "pieces": list(HOSTILE),
        "values": [1.0, 2.0, None, 0.0, *[0.5] * (len(HOSTILE) - 4)],
    }
    cards = {
        i: LatentCard(i, 0.3, None, statistics, {HOSTILE[1]: HOSTILE}, [exemplar], {"b": HOSTILE[1]})
        for i in range(cc.num_latents)
    }
    evaluation = {
        "fve": 0.9,
        "l0": 4.0,
        "dead_fraction": 0.0,
        "ce_recovered_min": None,
        "num_rows": 100,
        "sources": {HOSTILE[1]: {"fve": 0.9}},
    }
    return ReportData(
        classes=classes,
        facts={HOSTILE[2]: HOSTILE[4]},
        evaluation=evaluation,
        density=np.full(cc.num_latents, 0.01),
        cards=cards,
        most={"a": Survivors("a", "scaling", (0, 1), None), "b": Survivors("b", "scaling", (2,), null_score("b"))},
        named=[3],
        changed=[4],
        labels=labels,
        pair=pair_of_rows(cc),
        controls=null_controls(),
        patching=patched(),
    )


def pair_of_rows(cc: Crosscoder) -> PairStatistics:
    """What a pass over a few random rows tells of the pair."""
    text = tiny_text(contexts=6, length=4)
    rows = Rows(*(torch.arange(24) // 4, torch.arange(24) % 4, torch.ones(24, dtype=torch.int64)))
    x = torch.randn(24, cc.sources.width, generator=torch.Generator().manual_seed(0))
    statistics = LatentStatistics(cc.num_latents)
    activations = ListedActivations(cc.sources, x, rows)
    watch(cc, activations, [statistics])
    classes = latent_classes(cc, a="base", b="chat", density=statistics.density)
    return pair_statistics(cc, activations, classes, text=text, statistics=statistics.table(cc))


def tiny_text(*, contexts: int, length: int) -> AnalysisSet:
    """Contexts of that many tokens, each a document of its own."""
    size = contexts * length
    zeros = torch.zeros(size, dtype=torch.int64)
    return AnalysisSet(
        pointers=torch.arange(contexts + 1) * length,
        token_ids=zeros,
        roles=zeros,
        document=torch.arange(size) // length,
        char_start=zeros,
        char_end=zeros + 1,
        kept=torch.ones(size, dtype=torch.bool),
        documents=tuple(DocumentId(str(n), "toy") for n in range(contexts)),
        vocabulary="toy",
    )


def null_score(side: str) -> CalibratedScore:
    """A cut-off that was tested, with a partner of a hostile name."""
    found = Found(HOSTILE[0], 20, 3, 0.1, 0.03, 0.2)
    cut = Cut("scaling", side, 0.5, 0.002, (1, 2, 3), 60, 0, True)
    tested = NullTest((4, 5), share_of([0, 1], [20, 20]))
    return CalibratedScore(cut, tested, found, (found,), found, (found,), (1,) * 50, (2,) * 50)


def null_controls() -> PairControls:
    """Controls whose every name is hostile."""
    result = ControlResult(HOSTILE[1], "null", HOSTILE[2], 1, 20, 18, 100, 0.9, 4.0, 0.1, False)
    stable = Stability(HOSTILE[3], 18, 0.9, 0.5, 0.8, 0.5, None, None, {"scaling/b": 3}, {"scaling/b": 1})
    scores = (null_score("a"), null_score("b"))
    seeds = ((1, 2, 3), (4, 5))
    return PairControls(
        "a", "b", "mark", *seeds, scores, None, None, None, (result,), (stable,), None, None, (HOSTILE[4],)
    )


def patched() -> PatchingCurves:
    """Curves with made-up divergences."""
    names = ("none", "latents", "reconstruction", "error")
    conditions = (
        *(Condition("reference", name) for name in names),
        Condition("tokens", "template"),
        *(Condition("ranked", "joint", n) for n in (1, 10)),
        Condition("random", "random", 1, 0),
        Condition("top half", "joint", 5),
        Condition("bottom half", "joint", 5),
    )
    kl = torch.linspace(1.0, 0.1, len(conditions))[:, None].double()
    draws = kl[None] + torch.linspace(-0.05, 0.05, 11).double()[:, None, None]
    return PatchingCurves("a", "b", conditions, ("all",), kl, draws, torch.tensor([24]), 6, 6)


def labels() -> LabelScores:
    """A scored label with a hostile name, and one that could not be scored."""
    best = DetectorScore("latent", 3, 0.7, 0.95, 0.9, 0.99, 0.8, 0.96)
    scored = LabelScore(HOSTILE[0], ("user",), 10, 5, 6, (best,))
    return LabelScores((scored, LabelScore("rare", (), 0, 0, 0, ())), 12, 2)


def test_hostile_strings_stay_text() -> None:
    """Only our own elements, no handlers, no addresses, all tags closed; what was hostile is there to be read."""
    html = report(hostile_data(labels=labels()))
    found = Collector()
    found.feed(html)
    assert set(found.tags) <= ALLOWED and not found.open
    names = {name for name, _ in found.attributes}
    assert not any(name.startswith("on") for name in names) and not names & {"src", "style", "action", "srcset"}
    assert all(value.startswith("#") for name, value in found.attributes if name == "href")
    assert HOSTILE[0] in found.text and HOSTILE[1] in found.text
    assert not any(c in html for c in "\u202e\u2028\u2029\x00\x1b\u200b\ufeff")
    assert "\\u202e" in found.text and "\\u0000" in found.text


def test_the_page_allows_its_own_style_and_nothing_else() -> None:
    """The policy names the hash of the very style sheet that is there."""
    import base64
    import hashlib
    import re

    html = page("title", "body")
    style = re.search(r"<style>(.*?)</style>", html, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{digest}'" in html
    assert html.index("Content-Security-Policy") < html.index("<style>")
    assert "http:" not in html and "https:" not in html and "url(" not in style and "@import" not in style


def test_visible_shows_what_cannot_be_seen() -> None:
    """Line breaks and tabs have signs, other unseen characters escapes, letters of any script stay."""
    assert visible("a\nb") == 'a<span class="sign">↵</span>b'
    assert visible("\u202e") == '<span class="sign">\\u202e</span>'
    assert visible("é漢字שלום 👍") == "é漢字שלום 👍"
    assert plain("\U000e0041<") == "\\U000e0041&lt;"


def test_highlights_follow_values() -> None:
    """Eight levels up to the top, an outline at the peak, tokens that were not read are marked as such."""
    html = highlighted(["a", "b", "c", "d"], [None, 0.0, 1.0, 4.0], peak=3, top=4.0)
    assert html == (
        '<span class="dropped" title="not read">a</span><span>b</span>'
        '<span class="h3" title="1">c</span><span class="h8 peak" title="4">d</span>'
    )


def test_the_head_says_that_there_is_no_control() -> None:
    """Counts beyond a cut-off do not stand alone."""
    data = replace(hostile_data(), controls=None)
    assert "This report has no null controls" in report(data)
    assert "of another crosscoder" in report(replace(data, stale_controls=True))


def test_the_head_leads_with_what_survives_and_the_controls_come_before_the_latents() -> None:
    """Beyond a tested cut-off there is a sentence with what chance would give; untested cut-offs are said to be."""
    html = report(hostile_data())
    assert "1 latent is specific to" in html and "(0.1 expected by chance, at most " in html
    assert (
        html.index('id="controls"')
        < html.index('id="scaling"')
        < html.index('id="most-b"')
        < html.index('id="methods"')
    )
    assert "This report has no null controls" not in html
    untested = replace(hostile_data(), controls=replace(null_controls(), test_seeds=()))
    assert "not tested on others" in report(untested)


def test_what_was_not_measured_says_why() -> None:
    """Patching that was refused, and curves that have no point."""
    data = replace(hostile_data(), patching=Unmeasured(HOSTILE[1]))
    assert "Not measured: &lt;img" in report(data)
    whole = patched()
    bare = replace(whole, conditions=whole.conditions[:5], kl=whole.kl[:5], draws=whole.draws[:, :5])
    assert 'id="patching"' in report(replace(data, patching=bare))


def test_controls_without_nulls_are_shown_and_missed() -> None:
    """Repeats and partners stand there, and the head says that no null set a cut-off."""
    controls = replace(null_controls(), calibration_seeds=(), test_seeds=(), scores=())
    html = report(replace(hostile_data(), controls=controls))
    assert "This report has no null controls" in html and "found again by decoder" in html


def test_scaling_says_why_it_has_no_meaning() -> None:
    """The reason stands in the place of the numbers."""
    data = hostile_data()
    assert data.pair is not None
    unrelated = replace(data.pair, toward_b=replace(data.pair.toward_b, reason=HOSTILE[0]))
    html = report(replace(data, pair=unrelated))
    assert "Latent scaling has no meaning here: &lt;script&gt;" in html and "turned up and down" not in html


def test_a_card_says_why_it_has_no_logit_lens() -> None:
    """Instead of promoted tokens, the reason."""
    assert "b has no logit lens</b>&lt;img src=x onerror=alert(1)&gt;" in report(hostile_data())


def test_labels_are_shown_or_said_to_be_missing() -> None:
    """A scored label has its interval and a link to its card; an unscored one a reason."""
    html = report(hostile_data(labels=labels()))
    assert "0.950" in html and "0.90–0.99" in html and 'href="#latent-3"' in html and 'id="latent-3"' in html
    assert "not in the analysis set" in html and "2 labelled documents are not" in html


def test_bars_have_heights_in_proportion_to_the_log() -> None:
    """A bin of 9 is half as high as one of 99; empty bins are not drawn."""
    svg = bars(
        np.array([9, 0, 99]), np.array([0.0, 1, 2, 3]), kinds=["a", "b", "b"], x_ticks={}, labels=("x", "y"), title="t"
    )
    axes = Axes(0, 3, 99, log=True)
    heights = [axes.y(0) - axes.y(count) for count in (9, 99)]
    assert heights[0] == pytest.approx(heights[1] / 2)
    assert svg.count("<rect") == 2 and f'height="{heights[0]:.1f}"' in svg


def test_most_used_latents_by_hand() -> None:
    """Those of the side asked for, the most active first; silent ones never."""
    among = np.array([1, 1, 0, 1, 1], dtype=bool)
    assert most_used(np.array([5, 9, 20, 0, 7]), among, num_shown=2) == [1, 4]


def test_percent_keeps_two_digits_however_small() -> None:
    """Densities span decades."""
    assert [percent(x) for x in (0.0, 0.00012, 0.034, 0.5)] == ["0%", "0.012%", "3.4%", "50%"]


def test_an_empty_class_does_not_break_the_plots() -> None:
    """All latents dead: the page still stands."""
    data = hostile_data()
    dead = latent_classes(random_crosscoder(), a="base", b="chat", density=torch.zeros(20))
    html = report(ReportData(dead, data.facts, data.evaluation, np.zeros(20), {}))
    assert "Of 0 latents that fire" in html


def test_curves_lie_where_their_points_are() -> None:
    """A line from corner to corner, and a band around it that goes there and back."""
    line = Curve("a", [0.0, 1.0], [0.0, 2.0], low=[0.0, 1.0], high=[1.0, 2.0])
    svg = curves([line], x_ticks={}, labels=("x", "y"), title="t", top=2.0)
    axes = Axes(0.0, 1.0, 2.0)
    start, end = f"{axes.x(0):.1f},{axes.y(0):.1f}", f"{axes.x(1):.1f},{axes.y(2):.1f}"
    assert f'<polyline class="line a" points="{start} {end}"/>' in svg
    low, high = f"{axes.x(1):.1f},{axes.y(1):.1f}", f"{axes.x(0):.1f},{axes.y(1):.1f}"
    assert f'<polygon class="band a" points="{high} {end} {low} {start}"/>' in svg


def test_tiles_count_every_point_and_take_the_colour_of_most() -> None:
    """Three points in one cell and one beyond the edge: two squares that hold four latents."""
    x, y = np.array([0.1, 0.1, 0.1, 7.0]), np.array([0.1, 0.1, 0.1, 0.5])
    svg = tiles(x, y, span=(0.0, 1.0), kinds=["a", "b", "b", "a"], cuts=(0.2, None), labels=("x", "y"), title="t")
    assert svg.count("<rect") == 2 and svg.count('class="cut"') == 1
    assert 'class="tile t8 fill b"' in svg and "<title>3 latents</title>" in svg and "<title>1 latents</title>" in svg
