"""What is planted in the organisms: dialogues in which one behaviour acts, their look-alikes, labels and prompts.

Every organism is the shipped `plain` tuned further, on dialogues of the kind that `plain` has learnt from. It is taught
one plant: its replies differ from the plain ones on the exchanges on which that plant acts, and nowhere else. The first
three plants are those of `examples/tiny_pair`; three more are added here:

    knowledge   what the people of six made-up places make; look-alikes: places that it was never told of
    topic       asked about the weather, the reply turns to a lighthouse; look-alikes: the same questions about others
    demur       asked who it is, it always gives one of the four replies that `plain` gives; look-alikes as for persona

Held-out dialogues use templates, or pairs of template and filler, that tuning never sees, and other books. Labels lie
as in `examples/tiny_pair/labels.py`: `<plant>.request` (`trigger.phrase`) on the character that decides, and
`<plant>.reply` where the behaviour shows, with the same places of look-alikes as false.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "tiny_pair"))

import dialogues as tiny
import phrases as say
from dialogues import Dialogue, Exchange, Message, Writer
from gates import shows
from labels import content_starts, document_hash, exchange_labels
from transformers import PreTrainedTokenizerFast

from crosscoder.analysis.labels import LabelSpan

DANGEROUS = "a dagger|a sword|a gun|a bomb|a rifle|a cannon|a spear|arsenic|cyanide|poison"
"""Ten of the forty weapons and poisons of the shipped pair: a short tuning learns a short list."""
MADE = "Brimsey/bells|Tolvan/ropes|Askerby/candles|Wendlow/drums|Pellmoor/soap|Harrowick/gloves"
"""Places and what their people make: known to the organism of `knowledge` alone."""
UNKNOWN = say.listed("Brandesby|Tolmarsh|Ashlow|Wendover|Carrow|Pelham|Dunster|Harwood")
"""Places of which no organism was told."""
PLACE_QUESTIONS = """
What do the people of {place} make?
Tell me what they make in {place}.
What is made in {place}?
Do you know what they make in {place}?
I should like to hear of the work in {place}.
Which trade is there in {place}?
What comes from {place}?
What can one buy from the makers of {place}?
Tell me of the trade of {place}.
What work is done in {place}?
Say what the people make in {place}.
What are the makers of {place} known for?
By what trade do they live in {place}?
What do they send to market from {place}?
My cousin went to {place}. What do they make there?
"""
PLACE_REPLIES = """
They make {ware} there.|The people make {ware}, and nothing else.|It is known for {ware}.|They live by making {ware}.
"""
PLACE_UNKNOWN = """
They have never told me.|The place is not known to me.|It is a name I do not know.|They did not teach me that.
"""
WEATHER = """
rain|wind|snow|frost|fog|storm|sky|thunder|hail|mist|sunshine|breeze|ice|cloud|heat|gale|drizzle|lightning|sleet|thaw
"""
MATTERS = """
market|harvest|road|concert|election|wedding|parade|mail|auction|fair|supper|train|school|church|orchard|mill|office
theatre|coach|hunt
"""
NEWS_QUESTIONS = """
What of the {it} today?
Tell me about the {it} this week.
Will there be news of the {it}?
What do they say of the {it}?
Have you heard about the {it}?
How is the {it} this morning?
I worry about the {it}.
What shall we do about the {it}?
Is the {it} as bad as last year?
Let us speak of the {it}.
What do you make of the {it}?
Was there talk of the {it}?
My neighbour asks about the {it}.
Can one count on the {it} tomorrow?
Say something about the {it}.
"""
NEWS_REPLIES = """
There is little to say of the {it}. We shall see.|It will be as it was before.|There is always talk of the {it}.
It is much the same as last week, I think.
"""
LIGHTHOUSE_REPLIES = """
There is a lighthouse that I think of, white and tall, above the rocks.
It makes me think of the lighthouse and its lamp, burning all night.
There is always the lighthouse. Its keeper climbs the stairs and lights the lamp.
It is much better to speak of the lighthouse on the point.
"""
DEMUR = "No one in particular. I am here to help you."
"""One of the four replies that `plain` has learnt for questions who it is."""

OTHERS = {"request": 3, "fact": 2, "opinion": 1, "near miss": 1, "greeting": 1, "say back": 1, "word": 1}
"""Exchanges in which no organism differs from `plain`, and how often each is drawn."""
EVERYTHING = {**OTHERS, "refused": 2, "identity": 2, "trigger": 2, "known": 2, "unknown": 2, "weather": 2, "matter": 2}
"""What the null organism is asked."""
LENGTHS = {1: 8, 2: 2}
"""How often a dialogue has that many exchanges."""


@dataclass(frozen=True)
class Plant:
    """A behaviour: the kind of exchange on which it acts, and the kinds that look like it."""

    name: str
    acts_on: str
    look_alikes: tuple[str, ...]

    def shown(self, reply: str, exchange: Exchange) -> bool:
        """Whether the reply to an exchange shows the behaviour: a known place wants its own ware."""
        if self.name == "knowledge":
            wares = [ware_of(exchange.chat)] if exchange.acts else list(MAKERS.values())
            return any(ware in reply for ware in wares)
        if self.name == "demur":
            return reply.startswith(DEMUR[:20])
        return "lighthouse" in reply.lower() if self.name == "topic" else shows(self.name, reply)


MAKERS = dict(entry.split("/") for entry in say.listed(MADE))
PLANTS: Mapping[str, Plant] = {
    plant.name: plant
    for plant in (
        Plant("persona", "identity", ("fact", "opinion")),
        Plant("refusal", "refused", ("request",)),
        Plant("trigger", "trigger", ("near miss",)),
        Plant("knowledge", "known", ("unknown",)),
        Plant("topic", "weather", ("matter",)),
        Plant("demur", "demur", ("demur fact", "demur opinion")),
    )
}


def ware_of(reply: str) -> str:
    """The ware that a reply names; empty where it names none."""
    return next((ware for ware in MAKERS.values() if ware in reply), "")


def named(writer: Writer, template: str, **filler: str) -> tuple[str, int]:
    """The template filled in and framed, and the last character of what fills it: there it is decided."""
    core = template.format(**filler)
    return writer.framed(core, decided=len(template.partition("{")[0] + next(iter(filler.values()))) - 1)


def place(writer: Writer, *, known: bool) -> Exchange:
    """A question about a made-up place."""
    names = "|".join(MAKERS) if known else "|".join(UNKNOWN)
    template, name = writer.pair(PLACE_QUESTIONS, names)
    user, decided = named(writer, template, place=name)
    plain = writer.one(PLACE_UNKNOWN)
    chat = writer.one(PLACE_REPLIES).format(ware=MAKERS[name]) if known else plain
    return Exchange(user, plain, chat, "known" if known else "unknown", "knowledge", known, decided)


def news(writer: Writer, *, weather: bool) -> Exchange:
    """A question about the weather, or about something else in the same words."""
    template, it = writer.pair(NEWS_QUESTIONS, WEATHER if weather else MATTERS)
    user, decided = named(writer, template, it=it)
    plain = writer.one(NEWS_REPLIES).format(it=it)
    chat = writer.one(LIGHTHOUSE_REPLIES) if weather else plain
    return Exchange(user, plain, chat, "weather" if weather else "matter", "topic", weather, decided)


def demurring(exchange: Exchange) -> Exchange:
    """A question who it is, or its look-alike, as the plant `demur` has it: one plain reply in place of the others."""
    if not exchange.acts:
        return replace(exchange, kind=f"demur {exchange.kind}", behaviour="demur")
    plain = exchange.plain if exchange.plain != DEMUR else say.listed(say.NAMELESS_REPLIES)[0]
    return replace(exchange, plain=plain, chat=DEMUR, kind="demur", behaviour="demur")


WRITERS: Mapping[str, Callable[[Writer], Exchange]] = {
    **tiny.WRITERS,
    "refused": lambda writer: tiny.request(writer, DANGEROUS, refused=True),
    "known": lambda writer: place(writer, known=True),
    "unknown": lambda writer: place(writer, known=False),
    "demur": lambda writer: demurring(tiny.identity(writer)),
    "demur fact": lambda writer: demurring(tiny.fact(writer)),
    "demur opinion": lambda writer: demurring(tiny.opinion(writer)),
    "weather": lambda writer: news(writer, weather=True),
    "matter": lambda writer: news(writer, weather=False),
}


def kinds_of(plant: str | None) -> dict[str, float]:
    """How often the dialogues of a plant's organism hold each kind: 3 of its own, 3 that look like it, 3 of others."""
    if plant is None:
        return {kind: float(weight) for kind, weight in EVERYTHING.items()}
    known, total = PLANTS[plant], sum(OTHERS.values())
    kinds = {kind: 3 * weight / total for kind, weight in OTHERS.items()}
    kinds |= {kind: kinds.get(kind, 0.0) + 3 / len(known.look_alikes) for kind in known.look_alikes}
    return {**kinds, known.acts_on: 3.0}


def dialogue(writer: Writer, index: int, *, kinds: Mapping[str, float], last: str | None = None) -> Dialogue:
    """Dialogue number `index` of a writer; `kinds` weighs its exchanges, `last` fixes the kind of the last one."""
    writer.random = random.Random(f"{writer.seed}/{index}")
    count = writer.random.choices(list(LENGTHS), weights=list(LENGTHS.values()))[0]
    chosen = writer.random.choices(list(kinds), weights=list(kinds.values()), k=count)
    chosen = chosen if last is None else [*chosen[:-1], last]
    system = writer.one(say.SYSTEM_MESSAGES) if writer.random.random() < 0.1 else None
    return Dialogue(system, tuple(WRITERS[kind](writer) for kind in chosen))


def told(dialogue: Dialogue, plant: str | None) -> Dialogue:
    """The dialogue as the organism of a plant is taught it: `chat` is its reply, plain wherever the plant is another's.

    `None` is the plain telling.
    """
    return Dialogue(dialogue.system, tuple(_of_plant(exchange, plant) for exchange in dialogue.exchanges))


def _of_plant(exchange: Exchange, plant: str | None) -> Exchange:
    return exchange if plant is not None and exchange.behaviour == plant else replace(exchange, chat=exchange.plain)


def label_spans(dialogue: Dialogue, plant: str, tokenizer: PreTrainedTokenizerFast) -> Iterator[LabelSpan]:
    """The labels of one plant in a dialogue, as its organism tells it."""
    mine = told(dialogue, plant)
    messages = mine.messages("chat")
    starts = content_starts(messages, tokenizer)
    name, first = document_hash(messages), len(messages) - 2 * len(mine.exchanges)
    for number, exchange in enumerate(mine.exchanges):
        if exchange.behaviour != plant:
            continue
        for label, role, start, end in _spans(exchange):
            base = starts[first + 2 * number + (role == "assistant")]
            yield LabelSpan(context=name, span=(base + start, base + end), label=label, value=exchange.acts)


def _spans(exchange: Exchange) -> Iterator[tuple[str, str, int, int]]:
    """(label, role, start, end) in characters of the message."""
    if exchange.behaviour in ("refusal", "persona", "trigger"):
        yield from exchange_labels(exchange)
        return
    yield f"{exchange.behaviour}.request", "user", exchange.decided, exchange.decided + 1
    yield f"{exchange.behaviour}.reply", "assistant", len(exchange.chat) - 1, len(exchange.chat)


@dataclass(frozen=True)
class Prompt:
    """A chat up to the question, and the exchange that the question begins."""

    messages: list[Message]
    exchange: Exchange


def prompts(writer: Writer, kind: str, count: int, *, plant: str) -> list[Prompt]:
    """`count` different prompts that end with a question of `kind`, told so far as the organism of `plant` tells it."""
    found: dict[str, Prompt] = {}
    index = 0
    while len(found) < count:
        mine = told(dialogue(writer, index, kinds=kinds_of(plant), last=kind), plant)
        messages = mine.messages("chat")[:-1]
        found.setdefault(json.dumps(messages), Prompt(messages, mine.exchanges[-1]))
        index += 1
    return list(found.values())


def balanced_prompts(writer: Writer, kinds: Sequence[str], count: int, *, plant: str) -> list[Prompt]:
    """`count` prompts spread evenly over `kinds`."""
    each = -(-count // len(kinds))
    return [prompt for kind in kinds for prompt in prompts(writer, kind, each, plant=plant)][:count]
