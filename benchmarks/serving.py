"""Dense, pruned, quantized and both, in vLLM: bytes, damage, and how fast each is served.

    python benchmarks/serving.py [--preset fast] [--schemes w8a8,w4a16] [--folder runs/serving] [--write]

Makes the folders that are missing: the demo model, dense, pruned uniform and per-layer, and the first and the last
quantized. Damage is the rise of the loss on the demo's text by transformers, in float32. Then vLLM serves all of them
(on a CPU, in `.venv-vllm`), each in a process of its own, taking turns; the dense model also by its backend for any
model of transformers, by which it serves per-layer folders. What is measured is the time to read a prompt of 512
tokens, and that of one more token after a prompt of 16, for 1 and 8 requests at once. What is printed are medians over
the rounds, as ratios to the dense model, beside what the weights promise: reading prompts multiplies with all but the
embeddings, and writing a token reads all bytes in memory once. int4 is timed with `--dtype bfloat16` alone, since its
kernel for CPUs takes nothing else; on processors with AMX that of int8 does so, too. `--write` puts the table into
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import IO, Any

ROOT = Path(__file__).parent.parent
PROMPT, SHORT, NEW_TOKENS = 512, 16, 33
BATCHES = (1, 8)
BACKEND = "dense, by the backend"
COLUMNS = ("prefill, promised", "prefill 1", "prefill 8", "decode, promised", "decode 1", "decode 8")
ITEM_BYTES = {"float32": 4, "bfloat16": 2}  # of the dtypes in which vLLM computes these folders


# --- in the environment of vLLM --------------------------------------------------------------------------------------


def serve(folder: str, options: dict[str, Any]) -> None:
    """Load a folder, then measure once for every line that comes."""
    sys.path.insert(0, str(ROOT / "tests"))
    from vllm import LLM, SamplingParams

    from line_process import ANSWER

    engine = LLM(
        folder,
        max_model_len=PROMPT + NEW_TOKENS,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_num_batched_tokens=PROMPT * max(BATCHES),
        **options,
    )

    def seconds(batch: int, length: int, new: int) -> float:
        prompts = [
            {"prompt_token_ids": [3 + (7 * row + 13 * at) % 900 for at in range(length)]} for row in range(batch)
        ]
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    for line in sys.stdin:
        found: dict[str, float] = {}
        for batch in json.loads(line)["batches"]:
            found[f"prefill {batch}"] = seconds(batch, PROMPT, 1)
            found[f"decode {batch}"] = (seconds(batch, SHORT, NEW_TOKENS) - seconds(batch, SHORT, 1)) / (NEW_TOKENS - 1)
        sys.stdout.write(f"{ANSWER}{json.dumps(found)}\n")
        sys.stdout.flush()


class Served:
    """A process that serves one folder, and its log."""

    def __init__(self, program: Path, folder: Path, settings: dict[str, str], options: dict[str, Any]) -> None:
        self.log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process lives
        self.process = subprocess.Popen(
            [str(program), __file__, "--serve", str(folder), "--options", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env={**os.environ, **settings, "VLLM_PLUGINS": "secateur", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            text=True,
        )


# --- in ours ---------------------------------------------------------------------------------------------------------


def make_folders(folder: Path, preset: str, schemes: Sequence[str], samples: int) -> dict[str, Path]:
    """The folders by name, in bfloat16; those that are there are left as they are."""
    from secateur import load, load_tokenizer, prune_model, prune_recipe
    from secateur.checkpoint.save import save_updated
    from secateur.data.calibration import CalibrationOptions
    from secateur.export.formats import export_model
    from secateur.export.options import QuantizeOptions

    folder.mkdir(parents=True, exist_ok=True)
    cuts = {"dense": None, "pruned, uniform": folder / "cut-uniform", "pruned": folder / "cut"}
    folders = {name: folder / name.replace(", ", "-") for name in cuts}
    for name, source in cuts.items():
        if source is not None and not source.exists():
            shape = "uniform" if "uniform" in name else "per-layer"
            prune_model(prune_recipe("demo", preset=preset, cut={"shape": shape}), source)
        if not folders[name].exists():
            model = "demo" if source is None else str(source)
            small = load(model, device="cpu", dtype="bfloat16")
            with save_updated(small, folders[name], source=source, tokenizer=load_tokenizer(model)):
                pass
    for name in ("dense", "pruned"):
        for scheme in schemes:
            folders[f"{name}, {scheme}"] = out = folder / f"{name}-{scheme}"
            if not out.exists():
                text = CalibrationOptions() if scheme == "fp8" else CalibrationOptions(samples=samples)
                export_model(str(folders[name]), out, QuantizeOptions(scheme, text))  # type: ignore[arg-type]
    return folders


def costs_of(folder: Path, tokens: int) -> dict[str, float]:
    """The bytes of the files, the loss in nats per token, and the weights without embeddings."""
    from safetensors import safe_open

    from secateur import evaluate, load, load_tokenizer
    from secateur.data.text import demo_texts
    from secateur.models.silence import quiet

    with quiet():
        model = load(str(folder), device="cpu", dtype="float32")
    embeddings = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    inner = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    (result,) = evaluate(
        model,
        load_tokenizer(str(folder)),
        {"demo": demo_texts()[1]},
        protocols=["served@1024"],
        max_tokens=tokens,
    )
    packed = others = size = 0
    for path in folder.glob("*.safetensors"):
        size += path.stat().st_size
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_tensor(name)
                small = tensor.element_size() == 1 or not tensor.is_floating_point()
                packed += tensor.nbytes if small else 0
                others += 0 if small else tensor.numel()
    return {"bytes": size, "nll": result.nll, "inner": inner, "packed bytes": packed, "other weights": others}


def measure(
    folders: dict[str, Path], rounds: int, *, eager: bool, dtype: str = "float32", batches: Sequence[int] = BATCHES
) -> dict[str, dict[str, float]]:
    """Median seconds by folder and what was done; the first round warms up."""
    sys.path.insert(0, str(ROOT / "tests"))
    from line_process import ask
    from tables import cores
    from vllm_environment import SETTINGS, python

    settings = {**SETTINGS, "OMP_NUM_THREADS": str(cores())}
    served: dict[str, Served] = {}
    for name, folder in folders.items():
        options = {"dtype": dtype, "enforce_eager": eager}
        options |= {"model_impl": "transformers"} if name == BACKEND else {}
        served[name] = Served(python(), folder, settings, options)
    try:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in served}
        for number in range(rounds + 1):
            for name, each in served.items():
                answer = ask(each.process, {"batches": [*batches]}, log=each.log)
                if number:
                    found[name].append(answer)
    finally:
        for each in served.values():
            each.process.kill()
            each.process.communicate()
    return {name: {key: median(one[key] for one in all_) for key in all_[0]} for name, all_ in found.items()}


def faster(
    costs: dict[str, dict[str, float]], seconds: dict[str, dict[str, float]], item_bytes: int
) -> dict[str, dict[str, float]]:
    """How many times as fast as the dense model each is, and should be by its weights, with all that was measured."""

    def read(name: str) -> float:
        return costs[name]["packed bytes"] + item_bytes * costs[name]["other weights"]

    return {
        name: {
            **costs[name],
            **{f"{key}, s": value for key, value in own.items()},
            **{key: seconds["dense"][key] / value for key, value in own.items()},
            "prefill, promised": costs["dense"]["inner"] / costs[name]["inner"],
            "decode, promised": read("dense") / read(name),
        }
        for name in costs
        for own in [seconds.get(name, {})]
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """The Markdown table.

    >>> row = {"bytes": 2**21, "nll": 1.0, **dict.fromkeys(COLUMNS, 1.0)}
    >>> print(table({"dense": row, "pruned": {**row, "bytes": 2**20, "nll": 1.2}}).splitlines()[-1])
    | pruned | 1.0 (0.50) | 0.200 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |
    """
    from tables import markdown

    dense, rows = results["dense"], [["", "MiB", "damage", *COLUMNS]]
    for name, row in results.items():
        size = f"{row['bytes'] / 2**20:.1f} ({row['bytes'] / dense['bytes']:.2f})"
        cells = [
            name,
            size,
            f"{row['nll'] - dense['nll']:.3f}",
            *(f"{row[column]:.2f}" if column in row else "" for column in COLUMNS),
        ]
        rows.append(cells)
    return markdown(rows)


def block(results: Mapping[str, Any]) -> str:
    """The table of docs/benchmarks.md."""
    from tables import told

    return f"{table(results['rows'])}\n\n{told(results['about'])}; {results['dtype']}."


def main() -> None:
    """Make what is missing, measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="of the text, the first")
    parser.add_argument("--preset", default="fast", help="of the cut, at 20 %%")
    parser.add_argument("--schemes", default="w8a8,w4a16", help="of quantization")
    parser.add_argument("--samples", type=int, default=32, help="windows that GPTQ looks at")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--dtype", choices=[*ITEM_BYTES], default="float32", help="bfloat16 on a processor with AMX")
    parser.add_argument("--options", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path("runs/serving"))
    parser.add_argument("--write", action="store_true", help="the table of docs/benchmarks.md")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, json.loads(arguments.options))
        return
    from secateur.files import write_json
    from tables import about, keep

    schemes = [scheme for scheme in arguments.schemes.split(",") if scheme]
    folders = make_folders(arguments.folder, arguments.preset, schemes, arguments.samples)
    costs = {name: costs_of(folder, arguments.tokens) for name, folder in folders.items()}
    for name in folders:  # as many products, whatever the weights are packed into
        costs[name]["inner"] = costs[name if "uniform" in name else name.partition(",")[0]]["inner"]
    folders = {"dense": folders["dense"], BACKEND: folders["dense"], **folders}
    costs = {name: costs["dense" if name == BACKEND else name] for name in folders}
    dtype = arguments.dtype
    timed = {name: each for name, each in folders.items() if dtype == "bfloat16" or not name.endswith("w4a16")}
    seconds = measure(timed, arguments.rounds, eager=arguments.eager, dtype=dtype)
    results = {"about": about(), "dtype": dtype, "rows": faster(costs, seconds, ITEM_BYTES[dtype])}
    write_json(arguments.folder / "results.json", results)
    print(block(results))
    if arguments.write:
        keep("serving", results, block(results))


if __name__ == "__main__":
    main()
