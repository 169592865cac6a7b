"""How long discovery takes on models of which only the config exists.

    python benchmarks/discovery.py [CONFIG]

First its parts, on a 7B model or CONFIG, with the recorded graph beside `torch.export`; then the whole on a 70B-shaped
model and on one with 64 experts in each layer, at a quarter, half and all of their depth, to see that it grows with the
number of layers. Each runs in a process of its own, so that the memory is its own. Fails when the 70B takes more than
MOST_SECONDS or MOST_GIB.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

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
PARTS = {
    "recorded graph": "from secateur.discovery.tracing import trace\nresult = len(trace(model).nodes)",
    "torch.export, decomposed": (
        "ids = torch.zeros(5, 7, dtype=torch.long, device='meta')\n"
        "exported = torch.export.export(model, (), {'input_ids': ids, 'use_cache': False}, strict=False)\n"
        "result = len(exported.run_decompositions().graph.nodes)"
    ),
    "discovery, whole": "from secateur import discover\nresult = len(discover(model).groups)",
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
    """Time everything and print two tables."""
    parts = Table("", "seconds", "peak memory, GiB", "nodes or groups")
    depths = Table("discovery, whole", "layers", "parameters", "seconds", "ms per layer", "peak memory, GiB", "groups")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        config = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "config.json"
        if len(sys.argv) <= 1:
            config.write_text(json.dumps(SEVEN_BILLION))
        for name, code in PARTS.items():
            seconds, memory, result = measure(code, config)
            parts.add_row(name, f"{seconds:.2f}", f"{memory:.2f}", str(result))
        for name, whole in (("70B shape", SEVENTY_BILLION), ("64 experts", SIXTY_FOUR_EXPERTS)):
            for layers in (
                whole["num_hidden_layers"] // 4,
                whole["num_hidden_layers"] // 2,
                whole["num_hidden_layers"],
            ):
                shape = Path(folder) / "shape.json"
                shape.write_text(json.dumps({**whole, "num_hidden_layers": layers}))
                seconds, memory, groups = measure(PARTS["discovery, whole"], shape)
                billions = measure("result = sum(p.numel() for p in model.parameters())", shape)[2] / 1e9
                depths.add_row(
                    name,
                    str(layers),
                    f"{billions:.1f} B",
                    f"{seconds:.2f}",
                    f"{1000 * seconds / layers:.0f}",
                    f"{memory:.2f}",
                    str(groups),
                )
                failed |= whole is SEVENTY_BILLION and (seconds > MOST_SECONDS or memory > MOST_GIB)
    console = Console()
    console.print(parts)
    console.print(depths)
    console.print(
        f"limits for the 70B shape: {MOST_SECONDS:.0f} s and {MOST_GIB:.0f} GiB, {'missed' if failed else 'kept'}"
    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
