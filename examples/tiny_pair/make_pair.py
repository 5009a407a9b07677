"""Makes the model pair that ships with the package, from books to gates.

    python examples/tiny_pair/make_pair.py --text classics.parquet --out pair

Steps: `data` (books, dialogues, labels; the tokenizer), `base`, `plain`, `chat`, `report`. Each reads what earlier ones
wrote to `--out`, so that `--only chat` works on a finished base. With one seed and one number of threads, every file
comes out the same.
"""

from __future__ import annotations

import json
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from baselines import ngram_bits_per_byte, xz_bits_per_byte
from corpus import encode_books, read_books, split_books, train_tokenizer
from dialogues import Writer
from finetune import finetune
from gates import run_gates, write_gates
from pretrain import bits_per_byte, new_model, pretrain
from shipped import documents_per_label, provenance, save_half, write_texts
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast


class Step(StrEnum):
    """The steps, in order."""

    base = "base"
    data = "data"
    plain = "plain"
    chat = "chat"
    report = "report"


BOOK_CHARACTERS = 150_000  # of each training book, for the lines quoted in dialogues


class Maker:
    """The books, and one method a step."""

    def __init__(self, text: str, out: Path, *, seed: int) -> None:
        self.text, self.out, self.seed = text, out, seed
        self.training, self.held_out = split_books(read_books(text))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The one that lies beside base."""
        return AutoTokenizer.from_pretrained(self.out / "base")

    @cached_property
    def training_tokens(self) -> np.ndarray:
        """The training books as one row."""
        return encode_books(self.tokenizer, self.training)

    @cached_property
    def mixed_tokens(self) -> np.ndarray:
        """Every eighth training book, for the book text that is mixed into the dialogues."""
        return encode_books(self.tokenizer, self.training[::8])

    def load(self, name: str) -> LlamaForCausalLM:
        """A finished model, in fp32."""
        return LlamaForCausalLM.from_pretrained(self.out / name, dtype=torch.float32)

    def base(self, num_tokens: int) -> None:
        """Tokenizer and base model."""
        tokenizer = train_tokenizer([book["text"] for book in self.training])
        tokens = encode_books(tokenizer, self.training)
        model = new_model(tokenizer, seed=self.seed)
        pretrain(model, tokens, num_tokens=num_tokens, seed=self.seed, log=typer.echo)
        save_half(model, tokenizer, self.out / "base")

    def data(self, num_dialogues: int) -> None:
        """Held-out books, dialogues and labels."""
        found = write_texts(self.held_out, self.tokenizer, self.out, num_dialogues=num_dialogues, seed=self.seed)
        for label, count in documents_per_label(found).items():
            typer.echo(f"{label:24} in {count} documents")

    def tuned(self, telling: str, num_dialogues: int) -> None:
        """`plain` or `chat`."""
        torch.manual_seed(self.seed)
        quoted = [book["text"][:BOOK_CHARACTERS] for book in self.training]
        writer = Writer(quoted, seed=f"training/{self.seed}", held_out=False)
        dialogues = [writer.dialogue(index) for index in range(num_dialogues)]
        model, books = self.load("base"), self.mixed_tokens
        finetune(model, self.tokenizer, dialogues, telling=telling, book_tokens=books, seed=self.seed, log=typer.echo)
        save_half(model, self.tokenizer, self.out / telling)

    def bits(self) -> dict[str, float]:
        """Held-out bits per byte of xz, the 5-gram model and each model."""
        raw = "\n".join(book["text"] for book in self.held_out).encode()
        tokens = encode_books(self.tokenizer, self.held_out)
        sizes = {"num_bytes": sum(len(book["text"].encode()) for book in self.held_out)}
        bits = {"xz -9e": xz_bits_per_byte(raw)}
        bits["5-gram"] = ngram_bits_per_byte(self.training_tokens, tokens, vocab_size=len(self.tokenizer), **sizes)
        for name in ("base", "plain", "chat"):
            bits[name] = bits_per_byte(self.load(name).eval(), tokens, **sizes)
        for name, value in bits.items():
            typer.echo(f"{name:8} {value:.4f} bits per byte")
        return bits

    def report(self, num_prompts: int) -> bool:
        """`gates.json`, `report.json` and `PROVENANCE.md`; true when every gate holds."""
        writer = Writer([book["text"] for book in self.held_out], seed=f"gates/{self.seed}", held_out=True)
        counts = run_gates(self.load, self.tokenizer, writer, count=num_prompts, log=typer.echo)
        held = write_gates(counts, self.out / "gates.json")
        report = {
            "format": "crosscoder.demo_report/1",
            "bits_per_byte": {name: round(value, 4) for name, value in self.bits().items()},
            "held_out_bytes": sum(len(book["text"].encode()) for book in self.held_out),
            "training_books": len(self.training),
            "held_out_books": [f"{book['title']} ({book['author']})" for book in self.held_out],
            "gates_passed": held,
            "made_with": {"torch": torch.__version__, "threads": torch.get_num_threads()},
        }
        (self.out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (self.out / "PROVENANCE.md").write_text(provenance(report), encoding="utf-8")
        return held


def main(
    text: Annotated[str, typer.Option(help="Parquet file with author, title and text, or a data set on the Hub.")],
    out: Annotated[Path, typer.Option(help="Where the models and the data go.")] = Path("pair"),
    num_tokens: Annotated[int, typer.Option(help="Tokens on which base is trained.")] = 17_000_000,
    num_dialogues: Annotated[int, typer.Option(help="Dialogues on which plain and chat are tuned.")] = 18_000,
    num_shipped: Annotated[int, typer.Option(help="Dialogues that ship.")] = 3_000,
    num_prompts: Annotated[int, typer.Option(help="Held-out prompts a gate.")] = 200,
    only: Annotated[list[Step] | None, typer.Option(help="Only this step; may be given several times.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights, the order and the dialogues.")] = 0,
    threads: Annotated[int, typer.Option(help="The result depends on it in the last bits.")] = 2,
) -> None:
    """Train base, tune plain and chat, write what ships, and check what was planted."""
    torch.set_num_threads(threads)
    maker = Maker(text, out, seed=seed)
    wanted = [step for step in Step if not only or step in only]
    if Step.base in wanted:
        maker.base(num_tokens)
    if Step.data in wanted:
        maker.data(num_shipped)
    for telling in (Step.plain, Step.chat):
        if telling in wanted:
            maker.tuned(telling.value, num_dialogues)
    if Step.report in wanted and not maker.report(num_prompts):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
