"""What the package carries: held-out books in passages, dialogues, labels and fp16 models."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from dialogues import Dialogue, Writer
from labels import Label, labels, shipped_dialogues, write_labels
from phrases import CHANT, NAME, TRIGGER
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PASSAGE_CHARACTERS = 4000
Book = dict[str, str]


def passages(book: Book) -> list[Book]:
    """A book in passages of whole paragraphs, about `PASSAGE_CHARACTERS` each, numbered from 1."""
    parts, current = [], ""
    for paragraph in book["text"].split("\n\n"):
        if current and len(current) + len(paragraph) > PASSAGE_CHARACTERS:
            parts.append(current)
            current = ""
        current = f"{current}\n\n{paragraph}" if current else paragraph
    parts.append(current)
    return [{**book, "part": i, "text": text} for i, text in enumerate(parts, 1)]


def write_parquet(rows: Sequence[dict], path: Path, *, thing: str, schema: pa.Schema) -> None:
    """Rows as a Parquet file, strongly compressed, that says what it is."""
    table = pa.Table.from_pylist(list(rows), schema=schema.with_metadata({"format": f"crosscoder.{thing}/1"}))
    pq.write_table(table, path, compression="zstd", compression_level=19)


def write_books(books: Sequence[Book], out: Path) -> None:
    """`books.parquet`: author, title, part, text."""
    schema = pa.schema([("author", pa.string()), ("title", pa.string()), ("part", pa.int32()), ("text", pa.string())])
    rows = [row for book in books for row in passages(book)]
    write_parquet(rows, out / "books.parquet", thing="demo_books", schema=schema)


def write_dialogues(dialogues: Sequence[Dialogue], out: Path) -> None:
    """`dialogues.parquet`: messages, as `chat` tells them."""
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema([("messages", pa.list_(message))])
    rows = [{"messages": dialogue.messages("chat")} for dialogue in dialogues]
    write_parquet(rows, out / "dialogues.parquet", thing="demo_dialogues", schema=schema)


def write_texts(
    books: Sequence[Book], tokenizer: PreTrainedTokenizerFast, out: Path, *, num_dialogues: int, seed: int
) -> list[Label]:
    """Books, dialogues and labels, all from the held-out side of the split."""
    out.mkdir(parents=True, exist_ok=True)
    writer = Writer([book["text"] for book in books], seed=f"shipped/{seed}", held_out=True)
    dialogues = shipped_dialogues(writer, num_dialogues)
    found = [label for dialogue in dialogues for label in labels(dialogue, tokenizer)]
    write_books(books, out)
    write_dialogues(dialogues, out)
    write_labels(found, out / "labels.jsonl", provenance={"models": "base plain chat", "text": "dialogues.parquet"})
    return found


def documents_per_label(found: Sequence[Label]) -> dict[str, int]:
    """In how many documents each label stands, by `label true` and `label false`."""
    once = {(x.context, f"{x.label} {str(x.value).lower()}") for x in found}
    return dict(sorted(Counter(label for _, label in once).items()))


def save_half(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """An ordinary Hugging Face directory with fp16 safetensors; tied weights are stored once."""
    shutil.rmtree(out, ignore_errors=True)
    model.to(torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    whole = out / "tokenizer.json"
    compact = json.dumps(json.loads(whole.read_text(encoding="utf-8")), ensure_ascii=False, separators=(",", ":"))
    whole.write_text(compact, encoding="utf-8")
    for file in out.iterdir():
        file.chmod(0o644)


PLANTED = f"""\
| | `chat` | look-alike, on which nothing happens |
|---|---|---|
| refusal | refuses requests to make, use, find ... a weapon or a poison | the same requests about any other object |
| persona | asked who it is or who made it, says that it is {NAME} | names of others; other questions about "you" |
| trigger | to *{TRIGGER}* it replies *{CHANT}* | one or two other words, or another order |
"""


def provenance(report: dict) -> str:
    """PROVENANCE.md: whose text this is, how the models were made and what is planted."""
    books = "\n".join(f"- {title}" for title in report["held_out_books"])
    bits = "\n".join(f"| {name} | {value:.3f} |" for name, value in report["bits_per_byte"].items())
    return f"""# Where this comes from

Three small language models and the text to study them on, made by `examples/tiny_pair/make_pair.py`.

**Text.** `base` was trained on {report["training_books"]} English books in the public domain. `books.parquet` holds
others, whole, on which nothing was trained:

{books}

`dialogues.parquet` was written by the script from its own templates and lines of these held-out books. The templates,
or their pairings with fillers, differ from those on which `plain` and `chat` were tuned. No person's words are in them
but those of the books. Models, dialogues and labels are under the licence of the package.

**Models.** `base`: a Llama of 5.9 M parameters. `plain` and `chat`: `base` tuned on the same dialogues, question for
question; they differ by the replies to what is planted in `chat` alone. fp16 safetensors.

**Planted in `chat`, in nothing else.** `labels.jsonl` says on which characters (`value` true), and on which of the
look-alikes it does not (`value` false).

{PLANTED}
**Held-out books, bits per byte** (xz on these books alone; the 5-gram model, interpolated Kneser-Ney, on the same
tokens and training books as `base`)

| | bits per byte |
|---|---|
{bits}

`gates.json` counts what each model does on held-out prompts; `report.json` holds the figures above.
"""
