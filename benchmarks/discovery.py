"""How long discovery takes on a 7B model of which only the config exists, and the recorded graph beside `torch.export`.

    python benchmarks/discovery.py [CONFIG]

Each part runs in a process of its own, so that the memory is its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

SEVEN_BILLION = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}

PREPARE = """
import json, resource, sys, time, warnings
warnings.simplefilter("ignore")
import torch
from secateur.models import load_config, skeleton
model = skeleton(load_config(sys.argv[1]))
start = time.perf_counter()
"""
PARTS = {
    "recorded graph": "from secateur.graph import trace\nresult = len(trace(model).nodes)",
    "torch.export, decomposed": (
        "ids = torch.zeros(5, 7, dtype=torch.long, device='meta')\n"
        "exported = torch.export.export(model, (), {'input_ids': ids, 'use_cache': False}, strict=False)\n"
        "result = len(exported.run_decompositions().graph.nodes)"
    ),
    "discovery, whole": "from secateur import discover\nresult = len(discover(model).groups)",
}
REPORT = """
seconds = time.perf_counter() - start
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, result]))
"""


def main() -> None:
    """Time every part and print a table."""
    table = Table("", "seconds", "peak memory, GiB", "nodes or groups")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "config.json"
        if len(sys.argv) <= 1:
            config.write_text(json.dumps(SEVEN_BILLION))
        for name, code in PARTS.items():
            command = [sys.executable, "-c", PREPARE + code + REPORT, str(config)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            seconds, memory, result = json.loads(output.splitlines()[-1])
            table.add_row(name, f"{seconds:.2f}", f"{memory:.2f}", str(result))
    Console().print(table)


if __name__ == "__main__":
    main()
