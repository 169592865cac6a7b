"""What training gives back of what a cut cost, at equal tokens, and how fast it is beside a bare loop.

    python benchmarks/recover.py --data alpaca.json --calibration FILE --text NAME=FILE [--recover=--OPTION=X]

The demo model is cut by a fifth of its non-embedding parameters and trained in four ways on the same rows, once over,
and in one way on other text:

lora-paper      LLM-Pruner's settings: rank 8, 64 rows a step, a rate of 1e-4 (its warm-up is shortened to fit)
lora            ours
distill         all weights, from the dense model, which is asked about all tokens and not about answers alone
lora+distill    an adapter, from the dense model, too
distill-text    as distill, on as many documents of the calibration text: what the kind of text is worth

Each is a process of its own, `secateur recover` as a user would call it, so that its peak memory is its own. The best
checkpoint is picked by a text that is none of those reported (`--development`, by default Python's language reference).
Damage is ln(perplexity / perplexity of the dense model), in nats per token; beside the texts given, on answers of rows
of the same file that come after those trained on. Results go to a JSON file as they come
(`--out`), and the same command goes on after a stop.

Speed is that of steps without evaluations: ours, ours with a teacher, and a loop of peft and PyTorch alone that reads
the very same batches, in turns in one process. CPU seconds are compared, since a busy machine stretches the clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from secateur.data.options import DataOptions
from secateur.data.rows import collate, training_order
from secateur.data.training_data import read_training_data
from secateur.evaluation.perplexity import evaluate
from secateur.evaluation.protocols import Protocol
from secateur.evaluation.texts import read_evaluation_text
from secateur.models.loading import load
from secateur.models.tokenizer import load_tokenizer
from secateur.recovery.lora import LoraOptions, add_lora
from secateur.recovery.options import RecoverOptions
from secateur.recovery.teacher_cache import TeacherCache, TeacherOutputs, save_teacher_outputs
from secateur.recovery.trainer import TrainingInputs, train

LENGTHS = (128, 1024)
ROWS: dict[str, list[str]] = {
    "lora-paper": ["--preset", "llm-pruner", "--epochs", "1"],
    "lora": ["--method", "lora"],
    "distill": ["--method", "distill", "--learning-rate", "1e-4", "--loss-on", "all"],
    "lora+distill": ["--method", "lora+distill", "--learning-rate", "1e-3", "--loss-on", "all"],
    "distill-text": ["--method", "distill", "--learning-rate", "1e-4"],
}
ON_TEXT = ("distill-text",)  # which learn from the text of --calibration


def main() -> None:
    """Cut, train, measure; print tables."""
    options = _arguments()
    options.folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=160)
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}

    def keep(name: str, found: Any) -> None:
        results[name] = found
        options.out.write_text(json.dumps(results, indent=2))

    if options.calibration is None and not (options.pruned and set(options.rows).isdisjoint(ON_TEXT)):
        sys.exit(f"recover.py: expected --calibration FILE, for the cut and for {', '.join(ON_TEXT)}")
    pruned = options.pruned or options.folder / "pruned"
    if not pruned.exists():
        cut = ["--preset", options.preset, "--ratio", str(options.ratio), "--calibration", str(options.calibration)]
        _secateur("prune", options.model, str(pruned), *cut, *options.cut)
    texts = {name: read_evaluation_text(file) for name, file in options.text} | _unseen_answers(options)
    folders = {"dense": options.model, "pruned": str(pruned)}
    for name in options.rows:
        folders[name] = str(options.folder / name)
        if name not in results:
            keep(name, _trained(name, str(pruned), folders[name], options))
            console.print(f"{name}: {results[name]['seconds']}")
    for name, folder in folders.items() if options.rows else ():
        if f"perplexity, {name}" not in results:
            model, tokenizer = load(folder, device="cpu"), load_tokenizer(folder)
            found = evaluate(
                model, tokenizer, texts, protocols=[Protocol(n) for n in LENGTHS], max_tokens=options.tokens
            )
            keep(f"perplexity, {name}", {f"{each.data}@{each.seq_len}": each.ppl for each in found})
    if options.rows:
        console.print(_damage(results, options.rows))
    if options.speed_steps:
        keep("speed", _speed(str(pruned), options))
        console.print(_speed_table(results["speed"]))


def _trained(name: str, pruned: str, out: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train in a process of its own; returns what the command writes as JSON."""
    development = [f"--eval={text}" for text in options.development] or [f"--eval=reference={_reference(options)}"]
    file = options.folder / "recovered.json"
    source = options.calibration if name in ON_TEXT else options.data
    data = ["--data", str(source), "--samples", str(options.samples), "--json", str(file)]
    _secateur(
        "recover", pruned, out, *data, *development, *ROWS[name], *options.recover, "--overwrite", "--resume", "--quiet"
    )
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def _unseen_answers(options: argparse.Namespace) -> dict[str, str]:
    """The answers of rows that nothing was trained on: what training gives back on text of its own kind."""
    if options.data.suffix != ".json":
        return {}
    rows = json.loads(options.data.read_text(encoding="utf-8"))[options.samples :]
    answers = [str(row["output"]) for row in rows if row.get("output")]
    return {"unseen answers": "\n\n".join(answers)} if answers else {}


def _reference(options: argparse.Namespace) -> Path:
    """The half of Python's language reference that no calibration sees, as a file."""
    from secateur.data.text import demo_texts

    file: Path = options.folder / "reference.txt"
    file.write_text(demo_texts()[1], encoding="utf-8")
    return file


def _secateur(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "secateur", *arguments], check=True)


def _damage(results: dict[str, Any], rows: list[str]) -> Table:
    columns = list(results["perplexity, dense"])
    table = Table(title="Damage in nats per token, and the share of it that training took back")
    for column in ("", *columns, "steps", "best", "tokens", "tokens/s", "peak memory"):
        table.add_column(column, justify="right" if column else "left")

    def damage(name: str, text: str) -> float:
        return math.log(results[f"perplexity, {name}"][text] / results["perplexity, dense"][text])

    table.add_row("pruned", *(f"{damage('pruned', text):.3f}" for text in columns))
    for name in rows:
        about = results[name]
        cells = []
        for text in columns:
            before, after = damage("pruned", text), damage(name, text)
            cells.append(f"{after:.3f} ({1 - after / before:.0%})" if before > 0 else f"{after:.3f}")
        rate = about["tokens"] / about["seconds"]["train"]  # with the evaluations in between
        memory = f"{about['peak_rss_bytes'] / 2**30:.2f} GiB"
        steps = (str(about[key]) for key in ("steps", "best_step"))
        table.add_row(name, *cells, *steps, f"{about['tokens']:,}", f"{rate:,.0f}", memory)
    return table


# --- speed ------------------------------------------------------------------------------------------------------------


def _speed(pruned: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step, on the clock and of the CPU, of three loops that take turns."""
    tokenizer = load_tokenizer(pruned)
    data = DataOptions((str(arguments.data),), samples=arguments.samples, validation=0.0)
    rows = read_training_data(tokenizer, data).train
    options = replace(
        RecoverOptions(),
        max_steps=arguments.speed_steps,
        global_batch_size=min(RecoverOptions().global_batch_size, len(rows)),
        warmup_steps=0,
        eval_steps=arguments.speed_steps + 1,
    )
    order = training_order(rows, steps=arguments.speed_steps, batch_size=options.global_batch_size, seed=0)
    used = rows.select(order.flatten().unique())
    renumbered = torch.searchsorted(order.flatten().unique(), order)
    pad = tokenizer.pad_token_id or 0
    found: dict[str, list[tuple[float, float]]] = {"bare": [], "ours": [], "ours with a teacher": []}
    with TemporaryDirectory() as folder:
        teacher = Path(folder) / "teacher"
        begin = time.process_time()
        outputs = TeacherOutputs(options.top_k)
        save_teacher_outputs(lambda: load(arguments.model, device="cpu"), used, teacher, outputs)
        reading = time.process_time() - begin
        inputs = TrainingInputs(used, renumbered, used.select(torch.zeros(0, dtype=torch.int64)), {}, pad=pad)
        taught = replace(inputs, teacher=TeacherCache(teacher, used))
        loops: dict[str, Callable[[Path], list[tuple[float, float]]]] = {
            "bare": lambda _: _bare(pruned, inputs, options),
            "ours": lambda work: _ours(pruned, inputs, options, work),
            "ours with a teacher": lambda work: _ours(pruned, taught, options, work),
        }
        for turn in range(arguments.turns):
            for name, loop in loops.items():
                found[name] += loop(Path(folder) / f"{name}-{turn}")
    tokens = int(used.lengths_R[renumbered].sum())
    steps = len(inputs.order_SB)
    return {
        "tokens": tokens,
        "teacher_cpu_seconds": reading,
        # The first step of a loop warms up; of the others the least is what the work takes.
        "loops": {
            name: {
                kind: sum(
                    min(times[turn * steps + step][i] for turn in range(arguments.turns)) for step in range(steps)
                )
                for i, kind in enumerate(("seconds", "cpu_seconds"))
            }
            for name, times in found.items()
        },
    }


def _adapted(pruned: str) -> Any:
    torch.manual_seed(0)
    return add_lora(load(pruned, device="cpu"), LoraOptions())


def _ours(pruned: str, inputs: TrainingInputs, options: RecoverOptions, folder: Path) -> list[tuple[float, float]]:
    """What `recover` runs: wall and CPU seconds of every step."""
    model = _adapted(pruned)
    started: list[tuple[float, float]] = []  # when the first rows reach the model
    moments: list[tuple[float, float]] = []  # when each step ends

    def progress(done: int, total: int, line: str = "") -> None:
        moments.append(_now())

    model.register_forward_pre_hook(lambda *_: started.append(_now()) if not started else None)
    train(model, inputs, options, folder, progress=progress)
    return _between([*started, *moments[: len(inputs.order_SB)]])


def _bare(pruned: str, inputs: TrainingInputs, options: RecoverOptions) -> list[tuple[float, float]]:
    """The loop that one would write with peft and PyTorch: the same rows in the same micro-batches, and no more."""
    model = _adapted(pruned)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
    moments = [_now()]
    rows = inputs.rows
    for step in inputs.order_SB:
        labels_in_step = sum(int(rows.loss_mask_T[rows.slice_of(int(row))].sum()) for row in step)
        for numbers in step.split(options.micro_batch_size):
            batch = collate(rows, numbers.tolist(), pad=inputs.pad)
            # A model shifts its labels itself.
            labels = torch.cat([torch.full((len(numbers), 1), -100), batch.pop("labels")[:, :-1]], dim=1)
            loss = model(**batch, labels=labels, num_items_in_batch=torch.tensor(labels_in_step), use_cache=False).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        moments.append(_now())
    return _between(moments)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _between(moments: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(moments)]


def _speed_table(speed: dict[str, Any]) -> Table:
    table = Table(title=f"Steps over {speed['tokens']:,} tokens, without evaluations")
    for column in ("", "seconds", "CPU seconds", "tokens per CPU second", "throughput, bare = 1", "cost, ours = 1"):
        table.add_column(column, justify="right" if column else "left")
    loops = dict(speed["loops"])
    both = loops["ours with a teacher"]
    loops["the same, with the teacher's reading"] = {
        "seconds": 0.0,  # not timed in turns with the others
        "cpu_seconds": both["cpu_seconds"] + speed["teacher_cpu_seconds"],
    }
    for name, about in loops.items():
        cpu = about["cpu_seconds"]
        table.add_row(
            name,
            f"{about['seconds']:.1f}" if about["seconds"] else "",
            f"{cpu:.1f}",
            f"{speed['tokens'] / cpu:,.0f}",
            f"{loops['bare']['cpu_seconds'] / cpu:.2f}",
            f"{cpu / loops['ours']['cpu_seconds']:.2f}",
        )
    return table


def _rows(text: str) -> list[str]:
    return [] if text == "none" else text.split(",")


def _named(text: str) -> tuple[str, Path]:
    name, _, file = text.partition("=")
    return name, Path(file)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="rows to train on, Alpaca's")
    parser.add_argument("--calibration", type=Path, help="text for the cut, and for one row")
    parser.add_argument("--text", type=_named, action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--development", action="append", default=[], metavar="NAME=FILE", help="picks the checkpoint")
    parser.add_argument("--model", default="demo", help="the dense one")
    parser.add_argument("--pruned", type=Path, help="a folder that is cut already")
    parser.add_argument("--preset", default="best", help="of the cut")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=40_000, help="of each text that are scored")
    parser.add_argument("--rows", type=_rows, default=list(ROWS), help="none for the speed alone")
    parser.add_argument("--cut", action="append", default=[], help="one more option of `secateur prune`")
    parser.add_argument("--recover", action="append", default=[], help="one more option of `secateur recover`")
    parser.add_argument("--speed-steps", type=int, default=4, help="0 leaves the speed out")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/recover"))
    parser.add_argument("--out", type=Path, default=Path("runs/recover.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
