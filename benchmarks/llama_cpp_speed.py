"""How fast llama.cpp runs a dense model and a pruned one, from GGUF files of the same types.

    secateur prune demo runs/cut --choose score --repair none --samples 12
    python benchmarks/llama_cpp_speed.py runs/cut --write

All files are loaded at once and take turns in every round, so that a busy machine slows them alike. What is printed are
medians over the rounds, and ratios of medians. A prompt is read in one batch, then tokens are written one by one. Needs
`pip install 'secateur[gguf]'`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from llama_cpp_py_sync import Llama

from secateur import export_gguf, load, load_tokenizer
from secateur.export.gguf_file import GgufResult
from secateur.export.options import GgufOptions, GgufType
from secateur.files import write_json
from tables import about, keep, markdown, show, told


def write_files(model: str, types: list[str], folder: Path, label: str) -> dict[str, GgufResult]:
    """Export a model in every type."""
    loaded, tokenizer = load(model, device="cpu"), load_tokenizer(model)
    return {
        dtype: export_gguf(
            loaded, tokenizer, folder / f"{label}-{dtype}.gguf", GgufOptions(cast(GgufType, dtype), check=False)
        )
        for dtype in types
    }


def measure(engine: Any, prompt: list[int], new_tokens: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Tokens per second of reading the prompt and of writing after it."""
    engine._clear_context_state()  # the binding has no public call that reads tokens and samples none
    start = clock()
    place = engine._eval_tokens(prompt, 0)
    read = clock()
    for token in prompt[:new_tokens]:  # which ones does not matter to the speed, and so all files write the same
        place = engine._eval_tokens([token], place)
    end = clock()
    return len(prompt) / (read - start), new_tokens / (end - read)


def main() -> None:
    """Export, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", help="a folder that secateur prune wrote")
    parser.add_argument("--dense", default="demo", help="the model that it was made from (demo)")
    parser.add_argument("--types", default="f16,q8_0", help="of the files, with commas between them (f16,q8_0)")
    parser.add_argument("--prompt", type=int, default=256, help="tokens that are read (256)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens that are written (64)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every file (7)")
    parser.add_argument("--threads", type=int, default=1, help="of llama.cpp (1)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the processor's time and not the clock's: for one thread, where others use the machine, too",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the prompt's tokens (0)")
    parser.add_argument("--out", type=Path, help="write the numbers here, too, as JSON")
    parser.add_argument("--write", action="store_true", help="the table of docs/benchmarks.md")
    options = parser.parse_args()
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time adds up the time of all threads; use it with --threads 1")
    clock = time.process_time if options.cpu_time else time.perf_counter
    types = options.types.split(",")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        files = {
            label: write_files(model, types, Path(temporary), label)
            for label, model in (("dense", options.dense), ("pruned", options.pruned))
        }
        keys = [(dtype, label) for dtype in types for label in files]
        engines = {
            key: Llama(
                str(files[key[1]][key[0]].out),
                n_ctx=options.prompt + options.new_tokens,
                n_batch=options.prompt,
                n_ubatch=options.prompt,
                n_threads=options.threads,
                n_threads_batch=options.threads,
                n_gpu_layers=0,
                flash_attn_type=1,  # on, as in llama.cpp's own programs
            )
            for key in keys
        }
        words = min(engine.n_vocab for engine in engines.values())
        prompt = np.random.default_rng(options.seed).integers(100, words, options.prompt).tolist()
        speeds: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in keys}
        for number in range(options.rounds + 1):
            for key in keys if number % 2 else reversed(keys):
                speed = measure(engines[key], prompt, options.new_tokens, clock)
                if number:  # the first round reads the files from the disk
                    speeds[key].append(speed)
        for dtype, label in keys:
            written = files[label][dtype]
            read, wrote = (statistics.median(column) for column in zip(*speeds[dtype, label], strict=True))
            rows.append(
                {
                    "model": label,
                    "type": dtype,
                    "architecture": written.architecture,
                    "parameters": written.parameters,
                    "bytes": written.bytes,
                    "prompt_tokens_per_second": read,
                    "new_tokens_per_second": wrote,
                    "rounds": speeds[dtype, label],
                }
            )
    settings = {name: value if not isinstance(value, Path) else str(value) for name, value in vars(options).items()}
    results = json.loads(json.dumps({"about": about(), "options": settings, "results": rows}))
    show("llama.cpp", rows_of(results))
    if options.out:
        write_json(options.out, results)
    if options.write:
        keep("llama-cpp", results, block(results))


def rows_of(results: Mapping[str, Any]) -> list[list[str]]:
    """The head and a row for every file, beside the dense one of its type."""
    table = [["type", "model", "architecture", "parameters", "MiB", "prompt tokens/s", "new tokens/s"]]
    dense = {row["type"]: row for row in results["results"] if row["model"] == "dense"}
    for row in results["results"]:

        def cell(name: str, text: str, row: dict[str, Any] = row, beside: dict[str, Any] = dense[row["type"]]) -> str:
            return text if row is beside else f"{text} ({row[name] / beside[name]:.2f} x)"

        sizes = [
            cell("parameters", f"{row['parameters'] / 1e6:.1f} M"),
            cell("bytes", f"{row['bytes'] / 2**20:.1f}"),
            cell("prompt_tokens_per_second", f"{row['prompt_tokens_per_second']:.1f}"),
            cell("new_tokens_per_second", f"{row['new_tokens_per_second']:.1f}"),
        ]
        table.append([row["type"], row["model"], row["architecture"], *sizes])
    return table


def block(results: Mapping[str, Any]) -> str:
    """The table of docs/benchmarks.md."""
    return f"{markdown(rows_of(results))}\n\n{told(results['about'])}; {results['options']['threads']} thread(s)."


if __name__ == "__main__":
    main()
