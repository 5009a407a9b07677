"""What a check says: lines, and the same as JSON and Markdown."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import gpu_device

FORMAT = "crosscoder.gpu_check/2"


@dataclass(frozen=True)
class Line:
    """One check: what was looked at, whether it holds, and the number that says so."""

    what: str
    holds: bool
    seen: str


def write(lines: list[Line], left_out: str | None, device: str, out: Path) -> None:
    """The lines as JSON and Markdown, and what was left out, if anything was."""
    out.mkdir(parents=True, exist_ok=True)
    facts, checks = asdict(gpu_device.facts(device)), [asdict(line) for line in lines]
    record = {"format": FORMAT, "facts": facts, "left_out": left_out, "checks": checks}
    (out / "check.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    rows = [f"| {line.what} | {'yes' if line.holds else '**no**'} | {line.seen} |" for line in lines]
    head = [gpu_device.described(device), "", *([left_out, ""] if left_out else [])]
    text = "\n".join([*head, "| check | holds | seen |", "|---|---|---|", *rows, ""])
    (out / "check.md").write_text(text, encoding="utf-8")
