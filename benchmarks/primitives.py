"""What two habits of the sparse kernels are worth on this CPU: where gradients are written, and how products go.

    fresh    a weight gradient by one embedding_bag into new memory   reused      as `torch_ops.sum_by_latent` does
    by row   products of pairs with sampled_addmm, row by row         by latent   as `torch_ops.pair_products` does

Size A of the step benchmark (2,048 rows, 8,192 latents, 1,024 columns, k = 64), a random pattern, in turn in one run.

    python benchmarks/primitives.py [--rounds 15] [--threads 2]
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from crosscoder.codes import Pattern, SparseCode
from crosscoder.kernels import torch_ops

ROWS, LATENTS, WIDTH, K = 2048, 8192, 1024, 64


def fresh(pattern: Pattern, values: Tensor, x: Tensor) -> Tensor:
    """The gradient of a weight matrix in new memory."""
    order, starts = pattern.by_latent, pattern.latent_pointers
    rows = pattern.rows_by_latent
    return embedding_bag(rows, x, starts, mode="sum", per_sample_weights=values[order], include_last_offset=True)


def by_row(pattern: Pattern, x: Tensor, decoder: Tensor) -> Tensor:
    """Products of pairs, row by row."""
    zeros, size = x.new_zeros(pattern.num_active), (len(x), len(decoder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = torch.sparse_csr_tensor(pattern.row_pointers, pattern.latents, zeros, size=size, check_invariants=False)
        return torch.sparse.sampled_addmm(pairs, x, decoder.T, beta=0.0).values()


def race(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every contender, one turn each per round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description="What two habits of the sparse kernels are worth.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    f = torch.zeros(ROWS, LATENTS).scatter_(1, torch.rand(ROWS, LATENTS).topk(K).indices, 1.0)
    code, x, decoder = SparseCode.from_dense(f), torch.randn(ROWS, WIDTH), torch.randn(LATENTS, WIDTH)
    pattern, values, out = code.pattern, code.values, torch.zeros(LATENTS, WIDTH)
    pairs = {
        "weight gradient: fresh memory": lambda: fresh(pattern, values, x),
        "weight gradient: reused memory": lambda: torch_ops.sum_by_latent(pattern, values, x, out=out),
        "pair products: by row": lambda: by_row(pattern, x, decoder),
        "pair products: by latent": lambda: torch_ops.pair_products(pattern, x, decoder),
    }
    torch.testing.assert_close(pairs["weight gradient: fresh memory"](), pairs["weight gradient: reused memory"]())
    times = race(pairs, arguments.rounds)
    for name, found in times.items():
        print(f"{name:32s} median {median(found):6.1f} ms   least {min(found):6.1f} ms")
    for slow, fast in (tuple(pairs)[:2], tuple(pairs)[2:]):
        ratio = median([a / b for a, b in zip(times[slow], times[fast], strict=True)])
        print(f"{slow} / {fast.split(': ')[1]}: {ratio:.2f}")


if __name__ == "__main__":
    main()
