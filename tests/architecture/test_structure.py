"""The shape of the code: import direction, sizes, names, what must not be there."""

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "crosscoder"

# Rooms and single modules, lowest first: what stands in a line may import from its own line and from lines above.
LINES = (
    ("errors", "files", "progress"),
    ("sources",),
    ("wiring",),
    ("codes", "activations"),
    ("nonlinearities", "kernels", "initialisation"),
    ("groups", "activity"),
    ("crosscoder", "crosscoder_files", "folding", "calibration"),
    ("capture",),
    ("store",),
    ("synthetic",),
    ("training",),
    ("interventions",),
    ("analysis",),
    ("circuits", "explain", "interop"),
    ("dashboard", "demo", "cli"),
)
LEVELS = {room: level for level, line in enumerate(LINES) for room in line}
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
BANNED_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".cff", ".jsonl", ".json", ""}
MODULES = sorted(PACKAGE.rglob("*.py"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(parsed(path)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = node.module == "crosscoder"
            names = [f"crosscoder.{alias.name}" for alias in node.names] if whole else [node.module]
        for name in names:
            parts = name.split(".")
            if parts[0] == "crosscoder" and len(parts) > 1 and parts[1] != "__version__":
                yield parts[1], node.lineno


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def named_arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    arguments = function.args
    everything = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [argument for argument in everything if argument.arg not in ("self", "cls")]


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1


def tracked_files() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("path", [path for path in MODULES if path != PACKAGE / "__init__.py"], ids=name_of)
def test_imports_flow_downwards(path: Path) -> None:
    room = room_of(path)
    assert room in LEVELS, f"{room} has no line: give it one in LINES, and in the design"
    upwards = [
        f"line {line}: {room} imports {other}"
        for other, line in imported_rooms(path)
        if LEVELS.get(other, len(LINES)) > LEVELS[room]
    ]
    assert upwards == []


def test_the_import_rule_can_fail(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("from crosscoder import errors\nimport crosscoder.cli.app\nfrom crosscoder.training.run import x\n")
    assert list(imported_rooms(path)) == [("errors", 1), ("cli", 2), ("training", 3)]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_are_short_and_have_names_that_say_something(path: Path) -> None:
    assert path.read_text(encoding="utf-8").count("\n") <= 600
    assert not BANNED_NAMES & {part.removesuffix(".py") for part in path.relative_to(PACKAGE).parts}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions_are_short_and_take_few_arguments(path: Path) -> None:
    for function in functions(path):
        where = f"{name_of(path)}:{function.lineno} {function.name}"
        positional = [a for a in [*function.args.posonlyargs, *function.args.args] if a.arg not in ("self", "cls")]
        assert body_lines(function) <= 50, where
        assert len(named_arguments(function)) <= (17 if is_command(function) else 8), where
        assert len(positional) <= 3 or function.name.startswith("_") or is_called_by_others(function), where


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it is a verb of the command line, whose arguments are the options that a user picks from."""
    return any("command" in ast.unparse(decorator) for decorator in function.decorator_list)


def is_called_by_others(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Commands get their arguments from the command line by name, autograd functions theirs from torch."""
    first = [argument.arg for argument in function.args.args][:1]
    return first == ["ctx"] or is_command(function)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_everything_public_is_annotated_and_described(path: Path) -> None:
    assert ast.get_docstring(parsed(path)), f"{name_of(path)} has no docstring"
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name_of(path)}:{node.lineno} class {node.name} has no docstring"
    for scope in public_scopes(parsed(path)):
        for function in scope.body:
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and not function.name.startswith("_"):
                where = f"{name_of(path)}:{function.lineno} {function.name}"
                assert ast.get_docstring(function), f"{where} has no docstring"
                assert all(argument.annotation for argument in named_arguments(function)), where
                assert function.returns is not None, where


def public_scopes(module: ast.Module) -> Iterator[ast.Module | ast.ClassDef]:
    yield module
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_prints_or_unpickles(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not BANNED_IMPORTS & {name.split(".")[0] for name in names}, f"{name_of(path)}:{node.lineno}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            foreign = room_of(path) == "interop" and called in ("torch.load", "torch.save")
            where = f"{name_of(path)}:{node.lineno} {called}"
            assert foreign or called not in ("print", "torch.load", "torch.save"), where
            if called == "torch.load":  # files of other tools are pickles: nothing but tensors may come out of them
                assert {"weights_only": "True"}.items() <= {k.arg: ast.unparse(k.value) for k in node.keywords}.items()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_one_module_has_a_getattr(path: Path) -> None:
    names = [function.name for function in functions(path)]
    assert ("__getattr__" in names) == (path == PACKAGE / "__init__.py")


def test_files_name_no_machine() -> None:
    """No absolute path of a developer's machine and no package index in anything that is committed."""
    machine = re.compile(r"(?<![\w.:/])/(?:home|root|work|Users|opt|mnt)/\w|--(?:extra-)?index-url|--find-links")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked_files()
        if path.suffix in TEXT_SUFFIXES and path.stat().st_size < 1_000_000 and path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if machine.search(line)
    ]
    assert found == []


def test_constraints_pin_everything_and_nothing_else() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins)
    assert "torch==2.13.0" in pins
