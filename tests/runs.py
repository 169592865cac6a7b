"""A run folder as the commands leave it, with everything that a report can show.

The shapes are those of real runs on the tiny model (`test_report.py` makes one, too); the numbers are made up.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from secateur.pipeline.run_log import append_entry
from secateur.scoring.scores import Scores, save_scores

UNITS, LAYERS = 84, 6
CALIBRATION = "a0c9" * 16


def plan_json(ratio: float, out: str | None = None, **changes: Any) -> dict[str, Any]:
    """What `plan --json` writes, and with `out` what `prune --json` does."""
    groups = []
    for layer in range(LAYERS):
        kept = max(1, round(UNITS * (1 - ratio * (0.5 + layer / LAYERS))))
        keep = list(range(kept))
        name = f"layers.{layer}.mlp"
        groups.append({"name": name, "kind": "mlp", "layer": layer, "units": UNITS, "kept": kept, "keep": keep})
    groups.append({"name": "hidden", "kind": "hidden", "layer": None, "units": 48, "kept": 40, "keep": None})
    sizes = {"dense": 106896, "pruned": round(106896 * (1 - ratio)), "dense_non_embedding": 78096}
    return {
        "format": 1,
        "model": "tiny",
        "options": {"ratio": ratio, "of": "non-embedding", "target": None, "axes": ["attention", "mlp"]}
        | {"score": "fisher", "scope": "global", "shape": "per-layer", "choose": "score", "repair": "none"},
        "groups": groups,
        "parameters": {**sizes, "pruned_non_embedding": round(78096 * (1 - ratio))},
        "macs": {"dense": 8445696, "pruned": round(8445696 * (1 - ratio))},
        "settings": None,
        "refusal": None,
        "scored": {
            "score": "fisher",
            "reduce": "sum",
            "seed": 0,
            "calibration": CALIBRATION,
            "calibration_options": {"text": "demo", "samples": 16, "length": 64, "seed": 0},
        },
        **({} if out is None else {"out": out, "seconds": {"cut": 0.4}, "peak_rss_bytes": 500260864}),
        **changes,
    }


def perplexity_json(ppl: float | None, data: str = "ref", *, full: bool = True) -> dict[str, Any]:
    """One entry of `perplexity`; without `full`, as versions before the protocols wrote it."""
    entry: dict[str, Any] = {"data": data, "seq_len": 128, "tokens": 4445, "ppl": ppl, "nll": 3.2}
    bounds = {} if ppl is None else {"ppl_low": ppl * 0.9, "ppl_high": ppl * 1.1}
    about = {"protocol": "llm-pruner@128", "stride": 128, "bits_per_byte": 1.25, "nll_stderr": 0.02}
    return {**entry, **about, **bounds} if full else entry


def evaluate_json(models: Mapping[str, float | None], **options: Any) -> dict[str, Any]:
    """What `evaluate --json` writes: model -> perplexity, with tasks and samples."""
    rows = []
    for i, (model, ppl) in enumerate(models.items()):
        tasks = {}
        for task, metric in (("boolq", "acc"), ("hellaswag", "acc_norm")):
            tasks[task] = {
                "acc": 0.55,
                "acc_stderr": 0.03,
                "acc_norm": 0.6 - i / 50,
                "acc_norm_stderr": 0.035,
                "documents": 200,
                "metric": metric,
                "value": 0.6 - i / 50,
                "stderr": 0.035,
            }
            if i:
                tasks[task]["against"] = {"model": "tiny", "difference": -i / 50, "stderr": 0.02, "p": 0.03 / i}
        rows.append(
            {
                "model": model,
                "perplexity": [perplexity_json(ppl, **options), perplexity_json(ppl and ppl * 2, "ptb", **options)],
                "tasks": tasks,
                "tasks_mean": {
                    "value": 0.6 - i / 50,
                    "stderr": 0.02,
                    "difference": -i / 50,
                    "p": 0.04,
                    "tasks": [*tasks],
                },
                "samples": [{"prompt": "A saw cuts", "text": f" wood, says {model}.\n\nAnd more."}],
                "weight_bytes": 427584 - 50_000 * i,
                "file_bytes": 430656 - 50_000 * i,
            }
        )
    return {"results": rows}


def profile_json(models: Mapping[str, float], seq_len: int = 64) -> dict[str, Any]:
    """What `profile --json` writes: model -> its share of the dense model's size."""
    rows = []
    for i, (model, share) in enumerate(models.items()):
        row: dict[str, Any] = {
            "model": model,
            "parameters": round(106896 * share),
            "non_embedding_parameters": round(78096 * share),
            "seq_len": seq_len,
            "macs": round(8445696 * share * seq_len / 64),
            "weight_bytes": round(427584 * share),
            "peak_bytes": round(645247 * share),
            "prefill_seconds": 0.007 * share,
            "decode_tokens_per_second": 790.0 / share,
            "kv_cache_bytes": 36864,
            "macs_by_operator": {"linear": round(8e6 * share), "attention": 400_000},
            "grid": [
                {
                    "batch": batch,
                    "seq_len": 64,
                    "prefill_seconds": 0.007 * batch * share,
                    "decode_tokens_per_second": 700.0 * batch,
                    "peak_bytes": 700_000 * batch,
                }
                for batch in (1, 8)
            ],
        }
        if i:
            row["against"] = {"model": "tiny", "macs_ratio": share, "prefill_speedup": 1 / share, "decode_speedup": 1}
        rows.append(row)
    return {"results": rows}


def recover_json(out: str, steps: int = 12) -> dict[str, Any]:
    """What `recover --json` writes."""
    measured = range(0, steps + 1, 3)
    return {
        "out": out,
        "method": "lora",
        "steps": steps,
        "best_step": steps - 3,
        "tokens": 12275,
        "trained_parameters": 36864,
        "rows": 329,
        "loss": [[step, 6 - step / 20] for step in range(1, steps + 1)],
        "evaluation": [
            {"step": step, "validation": 5.9 - step / 25, "perplexity": {"ref": 300.0 - step}, "score": 1.0}
            for step in measured
        ],
        "seconds": {"train": 7.4},
        "peak_rss_bytes": 10**8,
    }


def sweep_json() -> dict[str, Any]:
    """What `sweep --json` writes."""
    rows: list[dict[str, Any]] = [
        {"score": score, "ratio": ratio, "label": score}
        | {"parameters": round(106896 * (1 - ratio)), "non_embedding_parameters": 1, "macs": 1}
        | {"perplexity": [perplexity_json(25 * (1 + ratio) ** power)]}
        for power, score in ((4, "fisher"), (9, "l2"))
        for ratio in (0.0, 0.1, 0.3)
    ]
    return {"model": "tiny", "rows": [rows[0], *(row for row in rows if row["ratio"])]}


ENTRIES: list[tuple[str, list[str], dict[str, Any]]] = [  # kind, models, result
    ("plan", ["tiny"], plan_json(0.3)),
    ("prune", ["tiny", "small"], plan_json(0.2, "small")),
    ("prune", ["tiny", "smaller"], plan_json(0.4, "smaller")),
    ("recover", ["small", "better"], recover_json("better")),
    (
        "evaluate",
        ["tiny", "small", "smaller", "better"],
        evaluate_json({"tiny": 25.0, "small": 40.0, "smaller": 70.0, "better": 30.0}),
    ),
    ("profile", ["tiny", "small", "smaller"], profile_json({"tiny": 1.0, "small": 0.8, "smaller": 0.6})),
    ("sweep", ["tiny"], sweep_json()),
    ("export", ["small", "small.gguf"], {"out": "small.gguf", "bytes": 400_000}),
]


def write_run(folder: Path, *kinds: str) -> Path:
    """Write the entries of some kinds, or of all, and the scores."""
    for kind, models, result in ENTRIES:
        if not kinds or kind in kinds:
            line = f"secateur {kind} {' '.join(models)} --run run"
            append_entry(folder, line, kind, result, seed=0, models=models)
    if not kinds or "scores" in kinds:
        torch.manual_seed(0)
        units = {f"layers.{layer}.mlp": torch.rand(UNITS).exp2() / 2**layer for layer in range(LAYERS)}
        units |= {f"layers.{layer}.attention": torch.rand(3) for layer in range(LAYERS)}
        units["hidden"] = torch.randn(48)
        save_scores(folder / "scores.safetensors", Scores("fisher", "sum", units, CALIBRATION))
    return folder
