"""Half-precision weights on this CPU: their products as PyTorch takes them, as Secateur does, and in float32.

    python benchmarks/half_precision.py [--dtype bfloat16] [--tokens 512] [--turns 3] [--write]

On a CPU with instructions for the dtype the first two are one. Products are those of linear layers, of so many rows;
attention is causal, with its gradient; the last line is a forward pass of the demo model. Milliseconds, the least of
the turns, and what PyTorch takes as a multiple of ours. `--write` puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.models.loading import DTYPES, load
from secateur.models.precision import half_products
from tables import about, keep, markdown, show, told

SHAPES = ((32, 576, 1536), (512, 576, 1536), (32, 1536, 8960), (512, 1536, 8960))  # rows, inputs, outputs
LENGTHS = (256, 1024)
HEADS, HEAD_DIM = 9, 64


def main() -> None:
    """Time all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--tokens", type=int, default=512, help="of the forward pass")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="the table of docs/benchmarks.md")
    options = parser.parse_args()
    dtype, turns = DTYPES[options.dtype], options.turns
    rows: dict[str, list[float]] = {}
    for size in SHAPES:
        rows[f"{size[0]} rows, {size[1]} to {size[2]}"] = _times(partial(_linear, size), dtype, turns)
    for length in LENGTHS:
        rows[f"attention, {length} tokens"] = _times(partial(_attention, length), dtype, turns)
    model = load("demo", device="cpu")
    ids_BT = torch.arange(options.tokens)[None]
    rows["forward pass of the demo model"] = _times(partial(_forward, model, ids_BT), dtype, turns)
    results = {"about": about(), "dtype": options.dtype, "threads": torch.get_num_threads(), "milliseconds": rows}
    show(f"{options.dtype} on {torch.get_num_threads()} threads, milliseconds", rows_of(results))
    if options.write:
        keep("half", results, block(results))


def rows_of(results: Mapping[str, Any]) -> list[list[str]]:
    """The head and a row for each product.

    >>> rows_of({"milliseconds": {"attention, 256 tokens": [132.1, 24.8, 22.8]}})[1]
    ['attention, 256 tokens', '132.1', '24.8', '22.8', '5.3']
    """
    rows = [["", "PyTorch", "ours", "float32", "PyTorch / ours"]]
    for name, (theirs, ours, full) in results["milliseconds"].items():
        rows.append([name, *(f"{each:.1f}" for each in (theirs, ours, full)), f"{theirs / ours:.1f}"])
    return rows


def block(results: Mapping[str, Any]) -> str:
    """The table of docs/benchmarks.md."""
    return f"{markdown(rows_of(results))}\n\n{told(results['about'])}; {results['dtype']}."


def _times(work: Callable[[torch.dtype], Callable[[], Any]], dtype: torch.dtype, turns: int) -> list[float]:
    """Milliseconds that PyTorch takes, ours takes, and float32 takes."""
    weights = nn.Linear(1, 1, dtype=dtype)  # of the dtype that is asked about
    found = []
    for to, changed in ((dtype, False), (dtype, True), (torch.float32, False)):
        run, best = work(to), float("inf")
        for _ in range(turns + 1):  # the first warms up
            with half_products(weights) if changed else nullcontext():
                begin = time.perf_counter()
                run()
                best = min(best, time.perf_counter() - begin)
        found.append(1000 * best)
    return found


def _linear(size: tuple[int, int, int], dtype: torch.dtype) -> Callable[[], Tensor]:
    rows, inner, columns = size
    x, weight = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    return lambda: functional.linear(x, weight)


def _attention(length: int, dtype: torch.dtype) -> Callable[[], None]:
    q, k, v = (torch.randn(4, HEADS, length, HEAD_DIM).to(dtype).requires_grad_() for _ in range(3))
    return lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()


def _forward(model: nn.Module, ids_BT: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    model.to(dtype)

    def run() -> None:
        with torch.inference_mode():
            model(input_ids=ids_BT, use_cache=False)

    return run


if __name__ == "__main__":
    main()
