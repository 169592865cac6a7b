"""How fast `recover` trains, beside a bare loop of peft and PyTorch that reads the very same batches.

    python benchmarks/recover_speed.py FOLDER --calibration FILE [--steps 4] [--turns 2] [--write]

FOLDER is a cut of the model (`secateur prune demo FOLDER`). Ours, ours with a teacher, and the bare loop take turns in
one process, without evaluations. CPU seconds are compared, since a busy machine stretches the clock: of each step the
least of all turns. `--write` puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from secateur.data.options import DataOptions
from secateur.data.rows import collate, training_order
from secateur.data.training_data import read_training_data
from secateur.models.loading import load
from secateur.models.tokenizer import load_tokenizer
from secateur.recovery.lora import add_lora
from secateur.recovery.options import LoraOptions, RecoverOptions
from secateur.recovery.teacher_cache import TeacherCache, TeacherOutputs, save_teacher_outputs
from secateur.recovery.trainer import TrainingInputs, train
from tables import about, keep, markdown, show, told

BARE, OURS, TAUGHT = "a bare loop", "`recover`", "`recover` with a teacher, its logits on the disk"
READ = "the same, and the teacher's reading, which is done once"


def main() -> None:
    """Train some steps in each way; print the table."""
    options = _arguments()
    results = {"about": about(), "threads": torch.get_num_threads(), **measured(options)}
    show(f"Steps over {results['tokens']:,} tokens", rows_of(results))
    if options.write:
        keep("recover-speed", results, block(results))


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of each loop, and of the teacher's reading."""
    tokenizer = load_tokenizer(arguments.pruned)
    rows = read_training_data(tokenizer, DataOptions(tuple(arguments.calibration), validation=0.0)).train
    options = replace(
        RecoverOptions(),
        max_steps=arguments.steps,
        global_batch_size=min(RecoverOptions().global_batch_size, len(rows)),
        warmup_steps=0,
        eval_steps=arguments.steps + 1,
    )
    order = training_order(rows, steps=arguments.steps, batch_size=options.global_batch_size, seed=0)
    used = rows.select(order.flatten().unique())
    renumbered = torch.searchsorted(order.flatten().unique(), order)
    times: dict[str, list[list[float]]] = {BARE: [], OURS: [], TAUGHT: []}
    with TemporaryDirectory() as folder:
        teacher, begin = Path(folder) / "teacher", time.process_time()
        outputs = TeacherOutputs(options.top_k)
        save_teacher_outputs(lambda: load(arguments.model, device="cpu"), used, teacher, outputs)
        reading = time.process_time() - begin
        pad = tokenizer.pad_token_id or 0
        inputs = TrainingInputs(used, renumbered, used.select(torch.zeros(0, dtype=torch.int64)), {}, pad=pad)
        taught = replace(inputs, teacher=TeacherCache(teacher, used))
        loops: dict[str, Callable[[Path], list[float]]] = {
            BARE: lambda _: _bare(arguments.pruned, inputs, options),
            OURS: lambda work: _ours(arguments.pruned, inputs, options, work),
            TAUGHT: lambda work: _ours(arguments.pruned, taught, options, work),
        }
        for turn, (name, loop) in itertools.product(range(arguments.turns), loops.items()):
            times[name].append(loop(Path(folder) / f"{turn}-{[*loops].index(name)}"))
    least = {name: sum(min(steps) for steps in zip(*turns, strict=True)) for name, turns in times.items()}
    tokens = int(used.lengths_R[renumbered].sum())
    return {"tokens": tokens, "steps": arguments.steps, "cpu_seconds": least, "teacher_cpu_seconds": reading}


def _adapted(pruned: str) -> Any:
    torch.manual_seed(0)
    return add_lora(load(pruned, device="cpu"), LoraOptions())


def _ours(pruned: str, inputs: TrainingInputs, options: RecoverOptions, folder: Path) -> list[float]:
    """What `recover` runs: CPU seconds of every step."""
    model = _adapted(pruned)
    started: list[float] = []  # when the first rows reach the model
    moments: list[float] = []  # when each step ends

    def progress(done: int, total: int, line: str = "") -> None:
        moments.append(time.process_time())

    model.register_forward_pre_hook(lambda *_: started.append(time.process_time()) if not started else None)
    train(model, inputs, options, folder, progress=progress)
    return _between([*started, *moments[: len(inputs.order_SB)]])


def _bare(pruned: str, inputs: TrainingInputs, options: RecoverOptions) -> list[float]:
    """The loop that one would write with peft and PyTorch: the same rows in the same micro-batches, and no more."""
    model = _adapted(pruned)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.rate(), weight_decay=0.0)
    moments = [time.process_time()]
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
        moments.append(time.process_time())
    return _between(moments)


def _between(moments: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(moments)]


def rows_of(results: Mapping[str, Any]) -> list[list[str]]:
    """The head and a row for each loop."""
    loops = dict(results["cpu_seconds"])
    loops[READ] = loops[TAUGHT] + results["teacher_cpu_seconds"]
    rows = [["", "CPU seconds", "throughput, bare loop = 1", "step, without a teacher = 1"]]
    for name, cpu in loops.items():
        beside = "" if name == BARE else f"{cpu / loops[OURS]:.2f}"
        rows.append([name, f"{cpu:.1f}", f"{loops[BARE] / cpu:.2f}", beside])
    return rows


def block(results: Mapping[str, Any]) -> str:
    """The table of docs/benchmarks.md."""
    steps = f"{results['steps']} steps over {results['tokens']:,} tokens, {results['threads']} thread(s)"
    return f"{markdown(rows_of(results))}\n\n{steps}; {told(results['about'])}."


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("pruned", help="a folder that secateur prune wrote")
    add("--model", default="demo", help="the teacher")
    add("--calibration", action="append", required=True, metavar="FILE", help="text of the training")
    add("--steps", type=int, default=4)
    add("--turns", type=int, default=2)
    add("--write", action="store_true", help="the table of docs/benchmarks.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
