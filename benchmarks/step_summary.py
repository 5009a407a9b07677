"""What is kept of a race: one small dict per contender, and what the machine is, in words."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import step_peers
import torch
from step_contenders import BASELINE
from step_race import Contest, Plan, ratios

import crosscoder

FEWEST = 3
"""Quiet steps that a median needs; with fewer, CPU seconds over threads stand in for it."""
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "sve", "bf16")


def summaries(contests: Mapping[str, Contest], plan: Plan) -> dict[str, dict[str, Any]]:
    """Every contender's numbers."""
    return {name: summary(contest, contests[BASELINE], plan) for name, contest in contests.items()}


def summary(contest: Contest, baseline: Contest, plan: Plan) -> dict[str, Any]:
    """Times in milliseconds, ratios to ours, peak memory in GB; `estimated` where too few steps were quiet."""
    quiet, every = contest.times(quiet=True), contest.times(quiet=False)
    cpu = median(contest.cpu_times) / plan.threads
    estimated = len(quiet) < FEWEST
    seconds = cpu if estimated else median(quiet)
    pairs = ratios(contest, baseline, quiet=True)
    by_cpu = len(pairs) < 2
    pairs = ratios(contest, baseline, quiet=False, cpu=True) if by_cpu else pairs
    return {
        "ms": seconds * 1e3,
        "estimated": estimated,
        "quiet": len(quiet),
        "steps": len(every),
        "best_ms": min(every) * 1e3,
        "cpu_ms": cpu * 1e3,
        "rows_per_second": plan.size.batch_size / seconds,
        "ratio": median(pairs),
        "ratio_low": min(pairs),
        "ratio_high": max(pairs),
        "pairs": len(pairs),
        "ratio_by_cpu": by_cpu,
        "peak_gb": contest.peak_bytes / 1e9,
        "ms_of_turns": [[round(s * 1e3, 2) for s in turn.seconds] for turn in contest.turns.values()],
        "foreign_shares": [round(turn.foreign_share, 3) for turn in contest.turns.values()],
    }


def about(plan: Plan) -> dict[str, Any]:
    """What made these numbers."""
    peers = {package: step_peers.version(package) or "not installed" for package in step_peers.PACKAGES.values()}
    return {
        "date": datetime.date.today().isoformat(),
        "version": crosscoder.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **peers,
        "machine": machine(),
        "threads": plan.threads,
        "rounds": plan.rounds,
    }


def machine() -> str:
    """Processor, cores, instruction sets and memory, in words."""
    fields = _fields(Path("/proc/cpuinfo"))
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    known = ", ".join(flag for flag in INSTRUCTIONS if flag in flags)
    memory = _fields(Path("/proc/meminfo")).get("MemTotal", "0").split()[0]
    name = fields.get("model name", platform.machine())
    return f"{name}, {torch.multiprocessing.cpu_count()} core(s), {known}, {int(memory) / 2**20:.0f} GiB"


def _fields(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = [line.partition(":") for line in reversed(lines)]
    return {name.strip(): value.strip() for name, _, value in pairs}
