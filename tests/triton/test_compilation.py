"""Every kernel, as it is launched, compiles for a Hopper GPU without one: registers at most 255, none spilled."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is for Linux", exc_type=ImportError)
if not hasattr(triton, "compile"):  # a folder of tests by that name is no package
    pytest.skip("Triton is not installed", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from crosscoder.kernels.triton import adam, compaction, operations, row_products, segment_sums  # noqa: E402

TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
F, B, L, J = "*fp32", "*bf16", "*i64", "*i32"
ADAM = [F, F, F, F, F, "*i16", F, "constexpr"]
MODULES = (adam, compaction, row_products, segment_sums)
Launch = tuple[Any, list[str], int, dict[str, Any], bool]


def launches() -> Iterator[Launch]:
    """Kernel, types of its arguments, warps, constants, and whether pointers and sizes are multiples of 16."""
    for table in (F, B):
        for aligned in (True, False):
            for kernel, types in on_tables(table):
                yield kernel, types, 4, {}, aligned
            for kernel, types in on_scores(table):
                yield kernel, types, 8, {}, aligned
                yield kernel, types[:-3] + ["i32", "i64", "i32"] if len(types) == 8 else types, 8, {}, aligned
        yield row_products._decode_error, [L, L, F, table, F, F, "i32", "i32"], 8, {}, True
        yield row_products._decode_error, [L, L, F, table, F, F, "i32", "i64"], 8, {"capacity": 1}, True
        for kernel, types in on_tables(table):  # a bias is a table of one column
            yield kernel, types, 4, {"width": 1}, True
    for ends in ((2304, 4608), (80,), (4096,), (1,), (10, 25, 37), tuple(256 * (i + 1) for i in range(12))):
        yield adam._adam, ADAM, 4, {"ends": ends}, ends[0] % 16 == 0
        yield adam._adam, ADAM, 4, {"ends": ends, "copy": None, "squares": None}, ends[0] % 16 == 0


def on_tables(table: str) -> list[tuple[Any, list[str]]]:
    return [
        (row_products._pair_products, [L, L, L, F, table, F, "i32"]),
        (segment_sums._sum_ranges, [L, L, L, F, table, F, "i32"]),
        (segment_sums._sum_latents, [L, L, F, table, L, F, F, "i32"]),
    ]


def on_scores(pre: str) -> list[tuple[Any, list[str]]]:
    return [
        (compaction._count, [pre, F, J, L, "i32", "i32"]),
        (compaction._fill, [pre, F, J, L, L, "i32", "i32", "i32"]),
        (compaction._count_levels, [pre, F, F, J, L, "i32", "i32", "i32"]),
    ]


def compiled(kernel: Any, types: list[str], warps: int, constants: Mapping[str, Any], aligned: bool) -> Any:
    names: list[str] = kernel.arg_names
    signature = {name: "constexpr" if name in constants else type_ for name, type_ in zip(names, types, strict=True)}
    whole = [(i,) for i, name in enumerate(names) if signature[name][0] in "*i"] if aligned else []
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={place: [["tt.divisibility", 16]] for place in whole},
    )
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=TARGET, options=options)


def name_of(launch: Launch) -> str:
    kernel, types, _, constants, aligned = launch
    return f"{kernel.__name__} {' '.join(types)} {constants or ''} {'aligned' if aligned else ''}"


def assert_fits(binary: bytes, path: Path) -> None:
    """No spills, and two programs of eight warps in a multiprocessor."""
    path.write_bytes(binary)
    if CUOBJDUMP.exists():
        usage = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True)
        found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)}
        assert found["STACK"] == found["LOCAL"] == 0, found
        assert found["REG"] <= 128, found


@pytest.mark.parametrize("launch", list(launches()), ids=name_of)
def test_compiles_for_sm_90_without_spills(launch: Launch, tmp_path: Path) -> None:
    assert_fits(compiled(*launch).asm["cubin"], tmp_path / "kernel.cubin")


class Hopper:
    """A driver that knows what to compile for, and can run nothing."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


SIZES = {"aligned": ((2304, 2304), 64, 16, 10), "odd": ((13, 20), 41, 7, 3), "one latent": ((16,), 1, 1, 1)}


@pytest.mark.parametrize("name", SIZES)
def test_a_step_compiles_with_the_arguments_that_it_passes(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Everything of a training step but running the kernels: nothing in it looks at what they compute."""
    launched: list[str] = []

    def compile_only(kernel: Any, grid: tuple[int, ...], *arguments: object, warps: int) -> None:
        made = kernel.warmup(*arguments, grid=grid, num_warps=warps, enable_fp_fusion=True)
        assert_fits(made.asm["cubin"], tmp_path / "kernel.cubin")
        launched.append(kernel.fn.__name__)

    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    for module in MODULES:
        monkeypatch.setattr(module, "launch", compile_only)
    monkeypatch.setattr(torch, "empty", torch.zeros)  # the trainer refuses what is not finite
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"))
    widths, num_latents, rows, k = SIZES[name]
    worlds, trainers = import_module("gpu_worlds"), import_module("gpu_trainer")
    with trainers.on_triton("cpu"):
        world = worlds.World(worlds.Size(widths, num_latents, rows, k), device="cpu")
        trainer = trainers.trainer(world)
        trainers.silence(trainer)
        code = trainer.step(torch.ones(rows, sum(widths))).activities[0].groups[0]
    operations.sum_by_row(code.pattern, code.values, trainer.crosscoder.weights[0].rounded_encoder)
    assert set(launched) == {launch[0].__name__ for launch in launches()}


def test_every_kernel_is_compiled() -> None:
    compiled_ones = {launch[0].__name__ for launch in launches()}
    called_by_others = {"_tile", "_weighted_sum", "_rounded"}
    written = {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and value.__module__ == module.__name__
    }
    assert written == compiled_ones | called_by_others


def test_kernels_are_found_by_their_file() -> None:
    room = Path(row_products.__file__).parent
    with_kernels = {path.stem for path in room.glob("*.py") if "@triton.jit" in path.read_text(encoding="utf-8")}
    assert with_kernels == {"adam", "compaction", "row_products", "segment_sums"}
