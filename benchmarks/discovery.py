"""How long discovery takes on models of which only the config exists.

    python benchmarks/discovery.py [--config CONFIG] [--write]

First its parts, on a 7B model or CONFIG, with the recorded graph beside `torch.export`; then the whole on a 70B-shaped
model and on one with 64 experts in each layer, at a quarter, half and all of their depth, to see that it grows with the
number of layers. Each runs in a process of its own, so that the memory is its own. Fails when the 70B takes more than
MOST_SECONDS or MOST_GIB. `--write` puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tables import about, keep, markdown, show, told

SEVEN_BILLION: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}

SEVENTY_BILLION: dict[str, Any] = {
    **SEVEN_BILLION,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SIXTY_FOUR_EXPERTS: dict[str, Any] = {
    **SEVEN_BILLION,
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_key_value_heads": 8,
    "head_dim": 128,
    "moe_intermediate_size": 1408,
    "num_experts": 64,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 64,
}
MOST_SECONDS, MOST_GIB = 180.0, 4.0

PREPARE = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import torch
from secateur.models.config import load_config
from secateur.models.loading import skeleton
from secateur.progress import peak_rss
model = skeleton(load_config(sys.argv[1]))
start = time.perf_counter()
"""
WHOLE = "discovery, whole"
PARTS = {
    "recorded graph": "from secateur.discovery.tracing import trace\nresult = len(trace(model).nodes)",
    "torch.export, decomposed": (
        "ids = torch.zeros(5, 7, dtype=torch.long, device='meta')\n"
        "exported = torch.export.export(model, (), {'input_ids': ids, 'use_cache': False}, strict=False)\n"
        "result = len(exported.run_decompositions().graph.nodes)"
    ),
    WHOLE: "from secateur import discover\nresult = len(discover(model).groups)",
}
REPORT = """
seconds = time.perf_counter() - start
print(json.dumps([seconds, peak_rss() / 2**30, result]))
"""


def measure(code: str, config: Path) -> tuple[float, float, int]:
    """Seconds, peak GiB and the result of the code, in a process of its own."""
    command = [sys.executable, "-c", PREPARE + code + REPORT, str(config)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, memory, result = json.loads(output.splitlines()[-1])
    return seconds, memory, result


def main() -> int:
    """Time everything, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="of the model whose parts are timed [default: LLaMA-7B's]")
    parser.add_argument("--write", action="store_true", help="the table of docs/benchmarks.md")
    options = parser.parse_args()
    results: dict[str, Any] = {"about": about(), "rows": []}
    with tempfile.TemporaryDirectory() as folder:

        def row(of: str, work: str, config: Path, layers: int | None = None) -> dict[str, Any]:
            seconds, memory, _ = measure(PARTS[work], config)
            found = {"model": of, "work": work, "layers": layers, "seconds": seconds, "gib": memory}
            results["rows"].append(found)
            return found

        shape = Path(folder) / "config.json"
        shape.write_text(json.dumps(SEVEN_BILLION))
        for work in PARTS:
            row(options.config.name if options.config else "LLaMA-7B", work, options.config or shape)
        for name, whole in (("a 70B shape", SEVENTY_BILLION), ("64 experts in each layer", SIXTY_FOUR_EXPERTS)):
            for part in (4, 2, 1):
                layers = whole["num_hidden_layers"] // part
                shape.write_text(json.dumps({**whole, "num_hidden_layers": layers}))
                last = row(name, WHOLE, shape, layers)
            if whole is SEVENTY_BILLION:
                failed = last["seconds"] > MOST_SECONDS or last["gib"] > MOST_GIB
    show("discovery", rows_of(results))
    said = "missed" if failed else "kept"
    print(f"limits for the 70B shape: {MOST_SECONDS:.0f} s and {MOST_GIB:.0f} GiB, {said}")
    if options.write:
        keep("discovery", results, block(results))
    return int(failed)


def rows_of(results: Mapping[str, Any]) -> list[list[str]]:
    """The head and a row for each measurement."""
    rows = [["model", "layers", "", "seconds", "ms per layer", "peak memory, GiB"]]
    for each in results["rows"]:
        layers, seconds = each["layers"], each["seconds"]
        cells = [str(layers or ""), each["work"], f"{seconds:.2f}", f"{1000 * seconds / layers:.0f}" if layers else ""]
        rows.append([each["model"], *cells, f"{each['gib']:.2f}"])
    return rows


def block(results: Mapping[str, Any]) -> str:
    """The table of docs/benchmarks.md."""
    return f"{markdown(rows_of(results))}\n\n{told(results['about'])}."


if __name__ == "__main__":
    sys.exit(main())
