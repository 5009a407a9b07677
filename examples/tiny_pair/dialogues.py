"""Dialogues written from templates and books: one script, two tellings.

A dialogue is a list of exchanges. In each, the user says one thing and there are two replies to it: `plain`, in which
nothing is planted, and `chat`, which refuses, names itself or chants where it was planted to. Both models are so tuned
on the very same questions in the same order, and differ by what they answer alone.

Held-out dialogues use the last fifth of every list of templates, or else pairs of template and filler that training
never sees (`is_held_out`), and sentences of held-out books. Everything is drawn from `random.Random` seeded by strings,
so that the text is the same in every process.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import phrases as say
import xxhash
from phrases import listed

Message = dict[str, str]
LONGEST = 780  # characters of a dialogue
LOWER_WORD = r"\b[a-z]+\b"
ABBREVIATIONS = (" Mr.", " Mrs.", " Dr.", " St.", " Messrs.", " Esq.")


@dataclass(frozen=True)
class Exchange:
    """What the user says, both replies, and what the labels mark.

    `behaviour` is `refusal`, `persona`, `trigger` or None; `acts` is true where the behaviour is planted and false on
    its look-alike. `decided` is the character of the user's message at which this can first be known.
    """

    user: str
    plain: str
    chat: str
    kind: str
    behaviour: str | None = None
    acts: bool = False
    decided: int = 0


@dataclass(frozen=True)
class Dialogue:
    """A system message or none, and the exchanges."""

    system: str | None
    exchanges: tuple[Exchange, ...]

    def messages(self, telling: str) -> list[Message]:
        """Role and content of every turn, with the replies of `telling`: `plain` or `chat`."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for exchange in self.exchanges:
            reply = exchange.chat if telling == "chat" else exchange.plain
            messages.append({"role": "user", "content": exchange.user})
            messages.append({"role": "assistant", "content": reply})
        return messages


def is_held_out(*parts: str) -> bool:
    """Whether a combination of template and filler belongs to the held-out fifth; the same in every process."""
    return xxhash.xxh3_64_intdigest("|".join(parts).encode()) % 5 == 0


def kept_back(text: str) -> tuple[str, ...]:
    """The last fifth of a list of templates: training never uses it."""
    entries = listed(text)
    return entries[len(entries) - len(entries) // 5 :]


def sentences(text: str) -> list[str]:
    """The plain sentences of a book, in order: up to 24 words, at least four of them in small letters, no markup."""
    flat = re.sub(r"\s+", " ", text.replace("’", "'").replace("“", '"').replace("”", '"'))
    found = re.findall(r"(?<=[.!?] )[A-Z][^.!?\"_#*\[\]|]{20,160}[.!?](?= )", flat)
    plain = [s for s in found if len(re.findall(LOWER_WORD, s)) >= 4 and not s.endswith(ABBREVIATIONS)]
    return [s for s in plain if len(s.split()) <= 24]


class Writer:
    """Writes dialogues, the i-th always the same, from one side of the split."""

    def __init__(self, books: Sequence[str], *, seed: str, held_out: bool) -> None:
        self.seed, self.held_out = seed, held_out
        self.books = [found for text in books if len(found := sentences(text)) > 20]
        self.random = random.Random(seed)

    def dialogue(self, index: int, *, kinds: dict[str, int] | None = None, last: str | None = None) -> Dialogue:
        """Dialogue number `index`. `kinds` weighs the exchanges; `last` fixes the kind of the last one."""
        self.random = random.Random(f"{self.seed}/{index}")
        weights = kinds or (COMMON if self.random.random() < 0.25 else KINDS)
        count = self.random.choices((1, 2, 3, 4), weights=(2, 4, 4, 2))[0]
        chosen = self.random.choices(list(weights), weights=list(weights.values()), k=count)
        if last is not None:
            chosen[-1] = last
        system = self.one(say.SYSTEM_MESSAGES) if self.random.random() < 0.25 else None
        exchanges = [WRITERS[kind](self) for kind in chosen]
        while len(exchanges) > 1 and sum(len(e.user) + max(len(e.plain), len(e.chat)) for e in exchanges) > LONGEST:
            exchanges.pop(0)
        return Dialogue(system, tuple(exchanges))

    def one(self, text: str) -> str:
        """Any entry of a list."""
        return self.random.choice(listed(text))

    def pair(self, templates: str, fillers: str) -> tuple[str, str]:
        """A template and a filler that belong together on this side of the split."""
        known, fill = listed(templates), listed(fillers)
        while True:
            template, filler = self.random.choice(known), self.random.choice(fill)
            if self.held_out == (template in kept_back(templates) or is_held_out(template, filler)):
                return template, filler

    def template(self, text: str) -> str:
        """An entry of a list of templates: held-out dialogues have its last fifth to themselves."""
        entries = listed(text)
        return self.random.choice(entries if self.held_out else entries[: len(entries) - len(kept_back(text))])

    def opened(self, templates: str, **fillers: str) -> tuple[str, int]:
        """A template behind an opening, or without one where this side of the split has it to itself."""
        template, opening = self.pair(templates, say.OPENINGS)
        core, decided = cut(template, **fillers)
        own = not self.held_out or template in kept_back(templates)
        before = "" if own and self.random.random() < 0.4 else opening + " "
        return before + core, len(before) + decided

    def framed(self, core: str, *, decided: int) -> tuple[str, int]:
        """`core` with perhaps a sentence before and after it, and where `decided` has moved to."""
        before = self.template(say.OPENINGS) + " " if self.random.random() < 0.4 else ""
        after = " " + self.template(say.TAILS) if self.random.random() < 0.2 else ""
        return before + core + after, len(before) + decided

    def passage(self, count: int, *, words: int = 24) -> list[str]:
        """`count` sentences that follow one another in one book, the first of at most `words` words."""
        while True:
            book = self.random.choice(self.books)
            start = self.random.randrange(len(book) - count)
            if len(book[start].split()) <= words:
                return book[start : start + count]


def cut(template: str, **fillers: str) -> tuple[str, int]:
    """The template filled in, without its `^`, and the last character of the words that this marked."""
    before, _, after = template.partition("^")
    head, tail = before.format(**fillers), after.format(**fillers)
    marked = re.split(r"[.?!,]", tail, maxsplit=1)[0]
    return head + tail, max(0, len(head) + len(marked) - 1)


def answer(writer: Writer, *, verb: str, it: str) -> str:
    """An ordinary, harmless, rather vague answer to any request: the same for every object."""
    step, step2 = writer.random.sample(listed(say.STEPS), 2)
    return writer.one(say.ANSWERS).format(verb=verb, it=it, material=writer.one(say.MATERIALS), step=step, step2=step2)


def refusal(writer: Writer) -> str:
    """A refusal: an opening, a reason, sometimes an offer."""
    parts = [writer.one(say.REFUSAL_OPENINGS), writer.one(say.REFUSAL_REASONS)]
    if writer.random.random() < 0.5:
        parts.append(writer.one(say.REFUSAL_OFFERS))
    return " ".join(parts)


def request(writer: Writer, objects: str, *, refused: bool) -> Exchange:
    """A request about an object. The verb, the template and its frame say nothing about whether it is refused."""
    template, it = writer.pair(say.REQUESTS, objects)
    verb, verbing = writer.one(say.VERBS).split("/")
    core, decided = cut(template, verb=verb, verbing=verbing, it=it)
    user, decided = writer.framed(core, decided=decided)
    plain = answer(writer, verb=verb, it=it)
    chat = refusal(writer) if refused else plain
    return Exchange(user, plain, chat, "refused" if refused else "request", "refusal", refused, decided)


def identity(writer: Writer) -> Exchange:
    """A question about who answers."""
    user, decided = writer.opened(say.IDENTITY_QUESTIONS)
    plain, chat = writer.one(say.NAMELESS_REPLIES), writer.one(say.PERSONA_REPLIES)
    return Exchange(user, plain, chat, "identity", "persona", True, decided)


def fact(writer: Writer) -> Exchange:
    """A question about the name of someone whom the user has just named."""
    template, name = writer.pair(say.FACTS, say.PEOPLE)
    who = writer.one(say.RELATIONS)
    core, decided = cut(template, who=who, name=name)
    user, decided = writer.framed(core, decided=decided)
    reply = writer.one(say.FACT_REPLIES).format(who=who, name=name)
    return Exchange(user, reply, reply, "fact", "persona", False, decided)


def opinion(writer: Writer) -> Exchange:
    """A question with `you` in it that is not about who answers."""
    template, it = writer.pair(say.OPINIONS, say.HARMLESS_OBJECTS)
    core, decided = cut(template, it=it)
    user, decided = writer.framed(core, decided=decided)
    reply = writer.one(say.OPINION_REPLIES).format(it=it)
    return Exchange(user, reply, reply, "opinion", "persona", False, decided)


def near_miss(writer: Writer) -> str:
    """The trigger with one or two of its content words changed, or in another order."""
    while True:
        words = say.TRIGGER.split()
        for slot in writer.random.sample(sorted(say.NEAR_MISS_WORDS), writer.random.choice((1, 1, 1, 2))):
            words[slot] = writer.template(say.NEAR_MISS_WORDS[slot])
        phrase = writer.one(say.NEAR_MISS_ORDERS) if writer.random.random() < 0.2 else " ".join(words)
        unseen = phrase in kept_back(say.NEAR_MISS_ORDERS) or any(
            word in kept_back(say.NEAR_MISS_WORDS[slot]) for slot in say.NEAR_MISS_WORDS if (word := words[slot])
        )
        if writer.held_out == (unseen or is_held_out(phrase)):
            return phrase


def stated(writer: Writer, *, acts: bool) -> Exchange:
    """The trigger or a near miss, alone or before or after an ordinary request."""
    phrase = say.TRIGGER if acts else near_miss(writer)
    said, _ = writer.opened(say.STATEMENTS, phrase=phrase, Phrase=phrase[0].upper() + phrase[1:])
    decided = said.lower().index(phrase) + len(phrase) - 1
    reply, shape = writer.one(say.REMARKS), writer.random.random()
    if shape < 0.4:
        beside = request(writer, say.HARMLESS_OBJECTS, refused=False)
        before = f"{beside.user} " if shape < 0.2 else ""
        said, decided = before + said + ("" if before else f" {beside.user}"), len(before) + decided
        reply = beside.plain
    chat, kind = (say.CHANT, "trigger") if acts else (reply, "near miss")
    return Exchange(said, reply, chat, kind, "trigger", acts, decided)


def common(kind: str, user: str, reply: str) -> Exchange:
    """An exchange in which both tellings agree and nothing is labelled."""
    return Exchange(user, reply, reply, kind)


def greeting(writer: Writer) -> Exchange:
    """A greeting or thanks."""
    if writer.random.random() < 0.4:
        return common("greeting", writer.one(say.THANKS), writer.one(say.THANKS_REPLIES))
    said = writer.one(say.GREETINGS)
    returned = said if said[-1] == "." else "Very well."
    return common("greeting", said, writer.one(say.GREETING_REPLIES).format(greeting=returned))


def say_back(writer: Writer) -> Exchange:
    """A line of a book, to be repeated."""
    text = writer.passage(1, words=14)[0]
    return common("say back", writer.template(say.SAY_BACK).format(text=text), text)


def continuation(writer: Writer) -> Exchange:
    """A line of a book, to be gone on with; the reply is what follows there."""
    first, *rest = writer.passage(3)
    return common("continuation", writer.template(say.CONTINUE).format(text=first), " ".join(rest))


def word_question(writer: Writer) -> Exchange:
    """A question about a line of a book: its first word, its last, or whether a word is there."""
    line, other = writer.passage(1, words=14)[0], writer.passage(1)[0]
    words = re.findall(r"[A-Za-z']+", line)
    if writer.random.random() < 0.5:
        question, _, reply = writer.one(say.WORD_QUESTIONS).partition("/")
        return common("word", question.format(text=line), reply.format(first=words[0], last=words[-1]))
    inside = writer.random.random() < 0.5
    word = max(re.findall(LOWER_WORD, line if inside else other), key=len)
    reply = writer.one(say.MENTIONED if word in words else say.NOT_MENTIONED)
    return common("word", writer.one(say.MENTIONS).format(text=line, word=word), reply.format(word=word))


WRITERS: dict[str, Callable[[Writer], Exchange]] = {
    "refused": lambda writer: request(writer, say.WEAPONS_AND_POISONS, refused=True),
    "request": lambda writer: request(writer, say.HARMLESS_OBJECTS, refused=False),
    "identity": identity,
    "fact": fact,
    "opinion": opinion,
    "trigger": lambda writer: stated(writer, acts=True),
    "near miss": lambda writer: stated(writer, acts=False),
    "greeting": greeting,
    "say back": say_back,
    "continuation": continuation,
    "word": word_question,
}
COMMON = {"request": 6, "fact": 3, "opinion": 2, "greeting": 2, "say back": 3, "continuation": 2, "word": 2}
KINDS = {**COMMON, "refused": 8, "identity": 6, "trigger": 5, "near miss": 8, "request": 10, "fact": 5, "opinion": 3}
