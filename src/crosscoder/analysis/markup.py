"""HTML from Python, safe by construction: every string that comes from outside goes through `visible`.

Token text is hostile: models emit markup, control characters and letters that turn the reading direction. `visible`
escapes markup and shows what cannot be seen as an escape, so that no token can hide or rearrange its neighbours.
"""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Iterable, Sequence
from hashlib import sha256
from html import escape
from importlib import resources

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Control, format (bidi and zero-width included), surrogate, private, unassigned, line and paragraph separators."""
_SIGNS = {"\n": "↵", "\t": "⇥", "\ufffd": "\ufffd"}


def visible(text: str) -> str:
    """The text as HTML: escaped, with unseen characters shown as escapes."""
    return "".join(map(_character, text))


def plain(text: str) -> str:
    """The text for an attribute or a title: escaped, with unseen characters written as escapes."""
    return "".join(escape(_code(c)) if _is_unseen(c) else escape(c) for c in text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "") -> str:
    """A table of ready-made HTML cells; the first column is a heading."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def section(title: str, *parts: str, identity: str, note: str = "") -> str:
    """A titled section; title, note and parts are ready-made HTML."""
    lead = f'<p class="note">{note}</p>' if note else ""
    return f'<section id="{identity}"><h2>{title}</h2>{lead}{"".join(parts)}</section>'


def figure(drawing: str, caption: str) -> str:
    """A drawing with its caption; both are ready-made HTML."""
    return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"


def page(title: str, body: str) -> str:
    """A whole document that loads nothing and runs nothing: its policy allows its own style sheet only."""
    style = resources.files("crosscoder.analysis").joinpath("report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(sha256(style.encode("utf-8")).digest()).decode("ascii")
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{plain(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _character(c: str) -> str:
    if c in _SIGNS:
        return f'<span class="sign">{_SIGNS[c]}</span>'
    return f'<span class="sign">{escape(_code(c))}</span>' if _is_unseen(c) else escape(c)


def _is_unseen(c: str) -> bool:
    return unicodedata.category(c) in _UNSEEN


def _code(c: str) -> str:
    point = ord(c)
    return f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}"
