"""README and docs: their code runs, their run files are valid, their commands exist, their links resolve."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from crosscoder.cli.app import app
from crosscoder.training import several

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]\n]+\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#+ +(?P<text>.+)$", re.MULTILINE)


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    found = FENCE.finditer(path.read_text(encoding="utf-8"))
    return [block["body"] for block in found if block["info"] == language]


def anchors(path: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = [match["text"].lower() for match in HEADING.finditer(FENCE.sub("", path.read_text(encoding="utf-8")))]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def links(path: Path) -> Iterator[str]:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    return (match["target"] for match in LINK.finditer(text) if "://" not in match["target"])


@pytest.mark.slow
@pytest.mark.parametrize("path", [page for page in PAGES if blocks(page, "python") and page != README], ids=page_id)
def test_python_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(path, "python"):
        exec(compile(block, page_id(path), "exec"), {"__name__": "__main__"})


@pytest.mark.slow
def test_readme_finds_the_planted_latents(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks(README, "python")
    exec(compile(block, "README.md", "exec"), {})
    number = int(capsys.readouterr().out.rsplit(": ", 1)[1])
    assert 8 <= number <= 24  # sixteen were planted


@pytest.mark.parametrize("path", [page for page in PAGES if blocks(page, "yaml")], ids=page_id)
def test_run_files_are_valid(path: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(path, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block, encoding="utf-8")
        assert several.load(file), page_id(path)


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_commands_exist(path: Path) -> None:
    verbs = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shell = "\n".join(blocks(path, "bash"))
    assert set(re.findall(r"^crosscoder ([a-z]+)", shell, re.MULTILINE)) <= verbs
    assert set(re.findall(r"^make ([a-z]+)", shell, re.MULTILINE)) <= targets


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_links_resolve(path: Path) -> None:
    for target in links(path):
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), f"{page_id(path)}: {target}"
        assert not anchor or anchor in anchors(there), f"{page_id(path)}: {target}"


def test_every_page_is_in_the_navigation() -> None:
    def files(node: object) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        elif isinstance(node, dict | list):
            for part in node.values() if isinstance(node, dict) else node:
                yield from files(part)

    nav = sorted(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert nav == sorted(str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md"))


def test_the_citation_and_the_changes_name_the_version() -> None:
    from crosscoder import __version__

    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_blocks_are_found() -> None:
    assert len(blocks(README, "python")) == 1
