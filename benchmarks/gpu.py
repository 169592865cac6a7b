"""Tests and commands on one device, such as a GPU: what each takes in time and memory.

    python benchmarks/gpu.py [--device cuda] [--layers 32] [--width 4096] [--tokens 50k] [--folder FOLDER] [--write]

1. The tests marked `gpu`, which compare the device with the CPU.
2. The demo model: cut by both presets, trained beside its teacher on so many `--tokens`, evaluated and timed.
3. LLaMA-7B's shape with random bfloat16 weights (13.5 GB of disk, twice): cut by `fast`, trained on as many tokens, and
   timed beside the dense one. On a GPU it is also cut with its layers streamed there one by one, as a model is that
   does not fit. `--layers` and `--width` make it smaller, for a device such as `cpu`.

Each step is a command in a process of its own, whose seconds, memory of the device (what torch had allocated at most)
and memory of the process are taken. Results go to `--out` as they come, and the same command goes on after a stop.
`--write` puts the table under the device's name into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from scoring import write_7b
from secateur.files import atomic_file, write_json
from tables import PAGE, ROOT, TableError, keep, markdown, marks, processor, show

GIB = 2**30
HEAD = ["model", "step", "seconds", "of them", "memory of the device, GiB", "of the process, GiB"]


def main() -> None:
    """Take the steps that are missing; print and write the table."""
    options = _arguments()
    if options.step:
        _step(options.step)
        return
    out: Path = options.out or options.folder / f"{_slug(options.device)}.json"
    options.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    about = _about(options)
    if {**results.get("about", about), "date": about["date"]} != about:
        sys.exit(f"gpu.py: {out} is of {results['about']}, and this is {about}: name another file with --out")
    results.setdefault("about", about)
    steps = results.setdefault("steps", {})
    if "tests" not in steps:
        steps["tests"] = _tests(options.device)
        write_json(out, results)
    for model, commands in _commands(options).items():
        for name, command in commands.items():
            key = f"{model} | {name}"
            if key not in steps:
                print(key, flush=True)
                steps[key] = _run(command, options)
                write_json(out, results)
    show(title_of(results), [HEAD, *rows_of(results)])
    if options.write:
        write(results)


def _commands(options: argparse.Namespace) -> dict[str, dict[str, list[str]]]:
    """Model -> name of a step -> the command of Secateur."""
    place: Path = options.folder
    dense = place / "dense"
    if not (dense / "config.json").exists():
        dense.mkdir(parents=True, exist_ok=True)
        write_7b(dense, layers=options.layers, width=options.width)
    shape = f"LLaMA-7B's shape, {options.layers} layers" + ("" if options.width == 4096 else f", width {options.width}")
    data = ["--data", "demo", "--max-length", "256"]
    found: dict[str, dict[str, list[str]]] = {}
    for model, name, presets in (("demo", "demo", ("fast", "best")), (str(dense), shape, ("fast",))):
        cut, trained = (str(place / f"{Path(model).name}-{what}") for what in ("cut", "trained"))
        steps = {f"`prune --preset {each}`": ["prune", model, cut, "--preset", each, "--overwrite"] for each in presets}
        if model != "demo" and options.device.startswith("cuda"):
            streamed = ["prune", model, str(place / "streamed"), "--device", "streamed", "--preset", "fast"]
            steps["`prune --preset fast --device streamed`"] = [*streamed, "--overwrite"]
        steps["`recover`"] = ["recover", cut, trained, *data, "--tokens", options.tokens, "--overwrite"]
        if model == "demo":
            steps["`evaluate`"] = ["evaluate", model, cut, trained, "--max-tokens", "10000"]
        for batch in ("1", "8"):
            sizes = ["--batch", batch, "--seq-len", "512", "--new-tokens", "32", "--repeats", "3"]
            steps[f"`profile`, batch {batch}"] = ["profile", model, cut, *sizes]
        found[name] = steps
    return found


def _tests(device: str) -> dict[str, Any]:
    """Run the tests; how many passed."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests" / "test_gpu.py")]
    finished = subprocess.run(
        command, env={**os.environ, "SECATEUR_DEVICE": device}, cwd=ROOT, capture_output=True, text=True
    )
    if finished.returncode:
        sys.exit(f"gpu.py: the tests fail on {device}:\n{finished.stdout[-4000:]}")
    return {"seconds": time.perf_counter() - start, "result": finished.stdout.strip().splitlines()[-1].split(" in ")[0]}


def _run(command: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """A command in a process of its own: what it told, and what it took."""
    file = options.folder / "step.json"
    device = [] if "--device" in command else ["--device", options.device]
    whole = [*command, *device, "--json", str(file), "--quiet"]
    start = time.perf_counter()
    finished = subprocess.run(
        [sys.executable, __file__, "--step", json.dumps(whole)], stdout=subprocess.PIPE, text=True, check=True
    )
    seconds = time.perf_counter() - start
    memory = json.loads(finished.stdout.splitlines()[-1])
    return {"seconds": seconds, **memory, "told": _short(command[0], json.loads(file.read_text()))}


def _step(text: str) -> None:
    """In that process: run the command, and print the memory that it held."""
    from secateur.cli.main import run
    from secateur.progress import peak_rss

    code = run(json.loads(text))
    on_device = 0
    if torch.accelerator.is_available():
        on_device = sum(int(torch.accelerator.max_memory_allocated(n)) for n in range(torch.accelerator.device_count()))
    print(json.dumps({"device_bytes": on_device, "process_bytes": peak_rss()}))
    sys.exit(code)


def _short(command: str, told: Any) -> str:
    """What the table says of a command's result."""
    match command:
        case "prune":
            of = {name: seconds for name, seconds in told["seconds"].items() if seconds >= 0.5}
            return ", ".join(f"{name} {seconds:.0f}" for name, seconds in of.items())
        case "recover":
            return f"{told['tokens']:,} tokens"
        case "evaluate":
            dense, cut, trained = (each["perplexity"][0]["nll"] for each in told["results"])
            return f"loss {dense:.3f}, cut {cut - dense:+.3f}, trained {trained - dense:+.3f}"
        case _:
            dense, cut = told["results"]
            prefill = dense["prefill_seconds"] / cut["prefill_seconds"]
            decode = cut["decode_tokens_per_second"] / dense["decode_tokens_per_second"]
            return f"prefill {prefill:.2f} x, decode {decode:.2f} x the dense model's speed"


def rows_of(results: Mapping[str, Any]) -> list[list[str]]:
    """The lines of the table.

    >>> step = {"seconds": 12.3, "device_bytes": 2**31, "process_bytes": 2**30, "told": "score 5"}
    >>> rows_of({"about": {}, "steps": {"tests": {"seconds": 9.0, "result": "8 passed"}, "demo | `prune`": step}})
    [['', 'tests', '9', '8 passed', '', ''], ['demo', '`prune`', '12', 'score 5', '2.0', '1.0']]
    """
    tests = results["steps"]["tests"]
    lines = [["", "tests", f"{tests['seconds']:.0f}", tests["result"], "", ""]]
    for key, step in results["steps"].items():
        if key != "tests":
            model, _, name = key.partition(" | ")
            memory = (f"{step[each] / GIB:.1f}" if step[each] else "" for each in ("device_bytes", "process_bytes"))
            lines.append([model, name, f"{step['seconds']:.0f}", step["told"], *memory])
    return lines


def title_of(results: Mapping[str, Any]) -> str:
    """The device and the software, as a sentence."""
    return "{name}: torch {torch}, transformers {transformers}, {date}".format(**results["about"])


def block(results: Mapping[str, Any]) -> str:
    """The table in Markdown, under the name of the device."""
    return f"**{title_of(results)}**\n\n{markdown([HEAD, *rows_of(results)])}"


def write(results: Mapping[str, Any], *, root: Path = ROOT) -> None:
    """Put the table into docs/benchmarks.md, in place of that of the same device, and keep what it is of.

    Raises `TableError` for a page without the marks.
    """
    name = f"gpu-{_slug(results['about']['name'])}"
    (begin, end), (_, last) = marks(name), marks("gpu")
    page = root / PAGE
    text = page.read_text(encoding="utf-8")
    if begin not in text:
        if text.count(last) != 1:
            raise TableError(f"expected {last} once in {page}")
        with atomic_file(page, overwrite=True) as file:
            file.write_text(text.replace(last, f"{begin}\n{end}\n\n{last}"), encoding="utf-8")
    keep(name, results, block(results), root=root)


def _about(options: argparse.Namespace) -> dict[str, Any]:
    import transformers

    index = torch.device(options.device).index or 0
    of_device = torch.cuda.get_device_name(index) if options.device.startswith("cuda") else processor()
    return {
        "name": of_device,
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "shape": [options.layers, options.width],
    }


def _slug(name: str) -> str:
    return "-".join("".join(each if each.isalnum() else " " for each in name.lower()).split())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda")
    add("--layers", type=int, default=32, help="of LLaMA-7B's shape")
    add("--width", type=int, default=4096, help="of its hidden states; the other sizes follow")
    add("--tokens", default="50k", help="of training, for each model")
    add("--folder", type=Path, default=Path("runs/gpu"), help="which takes 40 GB for all of LLaMA-7B's shape")
    add("--out", type=Path, help="default: a file of the device's name in the folder")
    add("--write", action="store_true", help="the table of docs/benchmarks.md")
    add("--step", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
