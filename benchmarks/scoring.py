"""Memory and time of scores by gradients, beside a plain loop, and of a model of a billion weights.

    python benchmarks/scoring.py [--part a,b,c] [--folder FOLDER] [--write]

(a) The demo model: all four Taylor scores of heads and MLP channels, the axes that LLM-Pruner cuts, against a loop that
stores gradients and their squares as LLM-Pruner does: that they are the same, and at what memory and CPU time. (b) A
model of 1.1 billion random bfloat16 weights in memory. (c) A checkpoint of LLaMA-7B's shape, random bfloat16 weights,
made on the disk (13.5 GB, and as much again for what comes of it), pruned to 5.42 billion by the command, loaded, and
removed; the rate of scoring beside that of the fastest matrix product on this machine.

Every measurement is a process of its own; memory is its anonymous memory (RssAnon), sampled; in (a) what is above that
held when the weights were in place, and the least CPU time of three runs. Limits that are not met are marked. `--write`
puts the table of all parts into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from secateur.data.calibration import CalibrationOptions
from secateur.data.text import demo_texts
from secateur.data.windows import calibration_windows
from secateur.discovery.discover import discover
from secateur.models.loading import load, skeleton
from secateur.models.silence import quiet
from secateur.models.tokenizer import load_tokenizer
from secateur.scoring.scores import statistics_for
from secateur.scoring.statistics import load_statistics, save_statistics
from tables import about, keep, markdown, show, told

SAMPLES, LENGTH = 10, 64  # LLM-Pruner's defaults
RUNS = 3  # of part (a), of which the least CPU time counts
LAYERS_7B, TOKENS_7B = 32, 1280
SIZES_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": LAYERS_7B, "num_attention_heads": 32}
TAYLOR = ("vectorize", "param_first", "param_second", "param_mix")
GIB = 2**30


@dataclass(slots=True)
class Usage:
    """What a piece of work took."""

    cpu_s: float = 0.0
    wall_s: float = 0.0
    before: int = 0  # bytes of anonymous memory
    peak: int = 0


def anonymous_memory(process: int | str = "self") -> int:
    """Bytes of anonymous memory of a process: what no file can give back."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


@contextmanager
def measured() -> Iterator[Usage]:
    """Measure what happens inside."""
    usage = Usage(before=anonymous_memory())
    stop = threading.Event()

    def sample() -> None:
        while not stop.is_set():
            usage.peak = max(usage.peak, anonymous_memory())
            stop.wait(0.005)

    sampler = threading.Thread(target=sample, daemon=True)
    cpu, wall = time.process_time(), time.perf_counter()
    sampler.start()
    try:
        yield usage
    finally:
        usage.cpu_s, usage.wall_s = time.process_time() - cpu, time.perf_counter() - wall
        stop.set()
        sampler.join()


# --- the work -------------------------------------------------------------------------------------------------------


def demo_windows() -> Tensor:
    """The calibration windows of part (a)."""
    options = CalibrationOptions(samples=SAMPLES, length=LENGTH)
    return calibration_windows(load_tokenizer("demo"), options)


def plain_loop(
    model: PreTrainedModel, windows: Tensor, *, second_order: bool
) -> dict[str, dict[str, tuple[Tensor, ...]]]:
    """Gradients in `.grad`, squares of each sample's summed in copies, then the scores; the calls are LLM-Pruner's."""

    def backward(ids: Tensor) -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    squares: dict[str, Tensor] = {}
    if second_order:
        for ids in windows:
            backward(ids[None])
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                parameter.grad = parameter.grad * parameter.grad / len(windows)
                if name in squares:
                    squares[name] += parameter.grad
                else:
                    squares[name] = copy.deepcopy(parameter.grad)
            model.zero_grad()
    backward(windows)
    sums: dict[str, dict[str, tuple[Tensor, ...]]] = {name: {} for name in TAYLOR}
    with torch.no_grad():
        for name, w in model.named_parameters():
            assert w.grad is not None
            first = w * w.grad
            found = {"vectorize": first, "param_first": first.abs()}
            if second_order:
                second = w * squares[name] * w
                found |= {"param_second": second.abs(), "param_mix": (first - second / 2).abs()}
            for key, s in found.items():
                sums[key][name] = tuple(
                    s.sum([i for i in range(s.dim()) if i != d]) if s.dim() > 1 else s for d in range(s.dim())
                )
    return sums


def work(kind: str, second_order: bool, out: Path) -> None:
    """One measurement, in this process: writes its usage, and its sums."""
    from secateur.scoring.statistics import Statistics

    with quiet():
        if kind in ("plain", "ours"):
            model, windows = load("demo", dtype="float32"), demo_windows()
        else:
            model = billion()
            windows = torch.randint(0, 32000, (SAMPLES, 128), generator=torch.Generator().manual_seed(0))
    discovery = discover(model)
    if kind == "plain":
        with measured() as usage:
            statistics = Statistics(plain_loop(model, windows, second_order=second_order))
    else:
        with measured() as usage:
            groups = [group for group in discovery.groups if group.kind in ("attention", "mlp")]
            name = "param_mix" if second_order else "param_first"
            statistics = statistics_for(name, model, discovery, windows, groups=groups)
    save_statistics(out / "sums.safetensors", statistics)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    (out / "usage.json").write_text(
        json.dumps(
            {
                "cpu_s": usage.cpu_s,
                "wall_s": usage.wall_s,
                "above": usage.peak - usage.before,
                "peak": usage.peak,
                "weights": weights,
            }
        )
    )


def billion() -> PreTrainedModel:
    """A model of 1.1 billion random weights, in bfloat16."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    config = AutoConfig.for_model("llama", num_key_value_heads=4, vocab_size=32000, **sizes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.eval()
    return model


def run(kind: str, second_order: bool) -> dict[str, Any]:
    """One measurement in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--work", kind, folder, *(["--second-order"] if second_order else [])]
        subprocess.run(command, check=True)
        usage: dict[str, Any] = json.loads((Path(folder) / "usage.json").read_text())
        usage["sums"] = load_statistics(Path(folder) / "sums.safetensors").sums
    return usage


# --- the parts ------------------------------------------------------------------------------------------------------


def compared(ours: Any, plain: Any) -> float:
    """The largest difference of a sum, relative to the largest of its weight's dimension, over the scores of both."""
    worst = 0.0
    for key in ours:
        for name, dims in ours[key].items():
            for one, other in zip(dims, plain[key][name], strict=True):
                worst = max(worst, float((one - other).abs().max() / other.abs().max().clamp_min(1e-30)))
    return worst


def part_a() -> dict[str, Any]:
    """Our pass against the plain loop."""
    found: dict[str, Any] = {}
    for name, second_order in (("param_first", False), ("param_mix", True)):
        runs = [(run("plain", second_order), run("ours", second_order)) for _ in range(RUNS)]
        plain, ours = (min(each, key=lambda usage: usage["cpu_s"]) for each in zip(*runs, strict=True))
        worst = compared(ours.pop("sums"), plain.pop("sums"))
        found[name] = {"plain": plain, "ours": ours, "relative difference": worst}
    return found


def part_b() -> dict[str, Any]:
    """1.1 billion weights in memory."""
    found = {name: run("billion", second_order) for name, second_order in (("param_first", False), ("param_mix", True))}
    for usage in found.values():
        usage.pop("sums")
    return found


# --- seven billion weights on the disk --------------------------------------------------------------------------------


def write_7b(folder: Path, *, layers: int = LAYERS_7B, width: int = 4096) -> None:
    """A checkpoint of LLaMA-7B's shape with random weights, a layer a file, and a tokenizer of a few tokens.

    Fewer layers, or a smaller width with all other sizes in proportion, make it smaller.
    """
    config = AutoConfig.for_model("llama", vocab_size=32000, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"])
    heads = width // 128
    sizes = {"hidden_size": width, "intermediate_size": width * 11008 // 4096, "num_attention_heads": heads}
    config.update(
        {
            **SIZES_7B,
            **sizes,
            "num_hidden_layers": layers,
            "num_key_value_heads": heads,
            "max_position_embeddings": 2048,
        }
    )
    config.update({"bos_token_id": 0, "eos_token_id": 0})
    config.save_pretrained(folder)
    by_file: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes_of(config).items():
        by_file.setdefault(f"layer-{name.split('.')[2]}" if ".layers." in name else "ends", {})[name] = shape
    torch.manual_seed(0)
    files = {}
    for file, inside in by_file.items():
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)
            for name, shape in inside.items()
        }
        save_file(tensors, folder / f"{file}.safetensors", metadata={"format": "pt"})
        files.update(dict.fromkeys(inside, f"{file}.safetensors"))
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    pairs.train_from_iterator(demo_texts()[0], trainer)
    PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<end>").save_pretrained(folder)


def shapes_of(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Every parameter's shape, without its memory."""
    return {name: parameter.shape for name, parameter in skeleton(config).named_parameters()}


def matmul_rate() -> float:
    """The fastest matrix product of a layer's size here, bfloat16 or float32, in operations a second."""
    best = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.randn(TOKENS_7B, 4096).to(dtype), torch.randn(11008, 4096).to(dtype)
        functional.linear(x, w)
        for _ in range(5):
            start = time.perf_counter()
            functional.linear(x, w)
            best = max(best, 2 * TOKENS_7B * w.numel() / (time.perf_counter() - start))
    return best


def watched(command: list[str]) -> tuple[float, int]:
    """Run a command; its wall seconds, and the most anonymous memory that it held."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        with suppress(OSError):  # it has just ended
            peak = max(peak, anonymous_memory(process.pid))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, peak


def part_c(parent: Path | None = None) -> dict[str, Any]:
    """Prune a checkpoint that no process here could hold as the older tools do."""
    rate = matmul_rate()
    with tempfile.TemporaryDirectory(dir=parent) as name:
        dense, out, numbers = Path(name) / "dense", Path(name) / "pruned", Path(name) / "numbers.json"
        dense.mkdir()
        write_7b(dense)
        command = [str(Path(sys.executable).with_name("secateur")), "prune", str(dense), str(out)]
        command += ["--score", "param_first", "--repair", "none", "--samples", "10", "--length", "128"]
        command += ["--json", str(numbers)]
        wall, peak = watched([*command, "--of", "parameters", "--target", "5.42B"])
        told = json.loads(numbers.read_text())
        load = (
            "import sys, torch, transformers as t; m = t.AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
            "assert m.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=2, do_sample=False).shape[1] > 4; "
            "print(sum(p.numel() for p in m.parameters()))"
        )
        found = subprocess.run([sys.executable, "-c", load, str(out)], check=True, capture_output=True, text=True)
    parameters = int(found.stdout.split()[-1])
    weights = told["parameters"]["dense_non_embedding"]
    head = 32000 * 4096
    # Forward, gradient of inputs and gradient of weights: 2 operations each for each weight and token. The head's
    # weights are not scored. What is computed again is not counted, nor is attention.
    operations = (6 * weights + 4 * head) * TOKENS_7B
    share = operations / told["seconds"]["score"] / rate
    return {
        "wall_s": wall,
        "seconds": told["seconds"],
        "peak": peak,
        "parameters": parameters,
        "matmul_rate": rate,
        "share": share,
    }


# --- the table ------------------------------------------------------------------------------------------------------


def rows_of(results: Mapping[str, Any]) -> list[list[str]]:
    """The head and the rows of the parts that were measured.

    >>> usage = {"peak": 3 * GIB, "weights": 2 * GIB}
    >>> rows_of({"b": {"param_first": usage}})[1]
    ['1.1 B weights in memory, `param_first`: peak', '', '3.00 GiB', '', 'at most 3.20 GiB']
    """
    rows = [["", "plain loop", "ours", "ratio", "asked"]]
    for name, found in results.get("a", {}).items():
        plain, ours = found["plain"], found["ours"]
        most = dict.fromkeys(("above", "cpu_s")) if name == "param_first" else {"above": 0.5, "cpu_s": 1 / 3}
        for what, key, scale, unit in (
            ("memory above the weights", "above", GIB, "GiB"),
            ("CPU time", "cpu_s", 1, "s"),
        ):
            ratio = ours[key] / plain[key]
            cells = [f"{each[key] / scale:.2f} {unit}" for each in (plain, ours)]
            limit = most[key]
            asked = "" if limit is None else _asked(f"at most {limit:.2f}", ratio <= limit)
            rows.append([f"demo model, `{name}`: {what}", *cells, f"{ratio:.2f}", asked])
        worst = found["relative difference"]
        asked = _asked("at most 1e-4", worst <= 1e-4)
        rows.append([f"demo model, `{name}`: largest relative difference", "", f"{worst:.1e}", "", asked])
    for name, usage in results.get("b", {}).items():
        limit = 1.25 * usage["weights"] + 0.7 * GIB
        asked = _asked(f"at most {limit / GIB:.2f} GiB", usage["peak"] <= limit)
        rows.append([f"1.1 B weights in memory, `{name}`: peak", "", f"{usage['peak'] / GIB:.2f} GiB", "", asked])
    if found := results.get("c"):
        wall, peak, parameters = found["wall_s"] / 60, found["peak"] / GIB, found["parameters"] / 1e9
        for what, value, asked in (
            ("the whole command", f"{wall:.1f} minutes", _asked("under 25", wall < 25)),
            ("of it scoring", f"{found['seconds']['score'] / 60:.1f} minutes", ""),
            ("peak of anonymous memory", f"{peak:.2f} GiB", _asked("under 8", peak < 8)),
            ("parameters of the folder, loaded", f"{parameters:.3f} B", _asked("5.42", round(parameters, 2) == 5.42)),
            ("fastest matrix product here", f"{found['matmul_rate'] / 1e9:.0f} GFLOP/s", ""),
            ("rate of scoring, of that", f"{found['share']:.0%}", _asked("at least 40%", found["share"] >= 0.4)),
        ):
            rows.append([f"LLaMA-7B's shape on the disk: {what}", "", value, "", asked])
    return rows


def _asked(limit: str, met: bool) -> str:
    return limit if met else f"{limit}, MISSED"


def block(results: Mapping[str, Any]) -> str:
    """The table of docs/benchmarks.md."""
    return f"{markdown(rows_of(results))}\n\n{told(results['about'])}."


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="a,b,c", help="which, separated by commas")
    parser.add_argument(
        "--folder", type=Path, help="where part (c) finds 27 GB of disk; by default, where temporary files go"
    )
    parser.add_argument("--write", action="store_true", help="the table of docs/benchmarks.md; needs all parts")
    parser.add_argument("--work", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--second-order", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work[0], options.second_order, Path(options.work[1]))
        return
    parts: dict[str, Callable[[], dict[str, Any]]] = {"a": part_a, "b": part_b, "c": partial(part_c, options.folder)}
    asked = [*parts] if options.write else options.part.split(",")
    results = {"about": about(), **{part: parts[part]() for part in asked}}
    show("scoring", rows_of(results))
    if options.write:
        keep("scoring", results, block(results))


if __name__ == "__main__":
    main()
