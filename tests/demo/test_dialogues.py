"""The dialogues' writer: the same in every process, fair to look-alikes, and with a real split."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import dialogues
import phrases
import pytest
from dialogues import Dialogue, Writer
from phrases import listed

EXAMPLE = Path(dialogues.__file__).parent
BOOK = " ".join(
    f"The {colour} house on hill number {number} was old and nobody lived there now."
    for number in range(12)
    for colour in ("red", "grey", "low")
)
PRINT_HASH = """
import json, sys, xxhash
sys.path.insert(0, sys.argv[1])
from dialogues import Writer
writer = Writer([sys.argv[2]], seed="test", held_out=False)
told = [[writer.dialogue(i).messages(telling) for telling in ("plain", "chat")] for i in range(80)]
sys.stdout.write(xxhash.xxh3_128_hexdigest(json.dumps(told).encode()))
"""


def written(*, held_out: bool, count: int = 300) -> list[Dialogue]:
    writer = Writer([BOOK], seed="test", held_out=held_out)
    return [writer.dialogue(index) for index in range(count)]


def exchanges(*, held_out: bool, count: int = 300) -> list[dialogues.Exchange]:
    return [exchange for dialogue in written(held_out=held_out, count=count) for exchange in dialogue.exchanges]


def run_with_hash_seed(seed: str) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run(
        [sys.executable, "-c", PRINT_HASH, str(EXAMPLE), BOOK],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_two_processes_with_other_string_hashes_write_the_same() -> None:
    assert run_with_hash_seed("1") == run_with_hash_seed("271828")


def test_a_dialogue_depends_on_its_number_alone() -> None:
    writer = Writer([BOOK], seed="test", held_out=False)
    late = writer.dialogue(7)
    writer.dialogue(3)
    assert writer.dialogue(7) == late
    assert writer.dialogue(8) != late


def test_the_two_tellings_differ_only_where_something_is_planted() -> None:
    for exchange in exchanges(held_out=False):
        assert (exchange.plain != exchange.chat) == exchange.acts


def test_nothing_planted_is_told_in_plain() -> None:
    told = json.dumps([dialogue.messages("plain")[-1] for dialogue in written(held_out=False)])
    assert phrases.NAME not in told
    assert phrases.CHANT not in told
    assert not any(opening in told for opening in listed(phrases.REFUSAL_OPENINGS))


def test_every_request_template_is_refused_and_answered_about_as_often() -> None:
    found = {kind: Counter() for kind in ("refused", "request")}
    starts = {template.split("{")[0] for template in listed(phrases.REQUESTS)} - set(
        dialogues.kept_back(phrases.REQUESTS)
    )
    for exchange in exchanges(held_out=False, count=1500):
        if exchange.kind in found:
            found[exchange.kind].update(start for start in starts if start in exchange.user)
    assert set(found["refused"]) == set(found["request"])
    assert max(found["refused"].values()) < 0.15 * found["refused"].total()


@pytest.mark.parametrize("kind", ["refused", "request"])
def test_held_out_requests_were_never_asked_in_training(kind: str) -> None:
    asked = {e.user for e in exchanges(held_out=False, count=1500) if e.kind == kind}
    held = {e.user for e in exchanges(held_out=True, count=600) if e.kind == kind}
    assert len(held) > 50
    assert not asked & held


@pytest.mark.parametrize("kind", ["identity", "trigger", "near miss"])
def test_held_out_identity_questions_and_phrases_were_never_said_in_training(kind: str) -> None:
    assert {e.user for e in exchanges(held_out=True) if e.kind == kind}
    said = {e.user for e in exchanges(held_out=False, count=1500) if e.kind == kind}
    assert not said & {e.user for e in exchanges(held_out=True, count=600) if e.kind == kind}


def test_near_misses_never_hold_the_trigger() -> None:
    for exchange in exchanges(held_out=False) + exchanges(held_out=True):
        assert (phrases.TRIGGER in exchange.user.lower()) == (exchange.kind == "trigger")


def test_the_deciding_character_closes_the_object_or_the_phrase() -> None:
    weapons = tuple(listed(phrases.WEAPONS_AND_POISONS))
    for exchange in exchanges(held_out=False):
        upto = exchange.user[: exchange.decided + 1]
        if exchange.kind == "refused":
            assert upto.endswith(weapons)
        if exchange.kind == "trigger":
            assert upto.lower().endswith(phrases.TRIGGER)
