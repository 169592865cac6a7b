"""The command that trains what a cut has left."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from secateur.cli.cutting import prune_command
from secateur.cli.options import (
    Calibration,
    Command,
    Common,
    Cut,
    Journal,
    OutFolder,
    Overwrite,
    argument,
    option,
    option_names,
    spread,
)
from secateur.cli.output import check_files, finish, show
from secateur.cli.reading import given, run_own_scores
from secateur.errors import PlanError, TrainingError
from secateur.evaluation.texts import read_texts
from secateur.recovery.options import options_for
from secateur.recovery.recover import recover
from secateur.recovery.rounds import prune_and_recover
from secateur.report.formatting import format_bytes
from secateur.report.tables.recovery import recovery_tables


@dataclass(frozen=True, slots=True)
class Data:
    """What is learned from."""

    data: Annotated[
        list[str],
        option("--data", "A file, a data set, or `demo`; may be repeated; FILE@2 weighs it.", metavar="FILE_OR_NAME"),
    ]
    template: Annotated[str | None, option("--template", "auto, alpaca or chat.")] = None
    loss_on: Annotated[str | None, option("--loss-on", "answers, or all: the prompts, too.")] = None
    max_length: Annotated[int | None, option("--max-length", "Tokens to which rows are cut: 256.")] = None
    samples: Annotated[int | None, option("--samples", "Rows of each source, from its start.")] = None
    column: Annotated[str | None, option("--column", "The field that holds text or messages.")] = None
    packing: Annotated[bool, typer.Option("--packing", help="Several short rows in one.")] = False
    group_by_length: Annotated[
        bool, typer.Option("--group-by-length", help="Rows of like length into the same step.")
    ] = False
    validation: Annotated[float | None, option("--validation", "The share of rows left out: 0.02.")] = None

    def options(self) -> dict[str, Any]:
        """What was given, in the form that `DataOptions` takes."""
        told = asdict(self)
        return given(sources=tuple(told.pop("data")), **told)


@dataclass(frozen=True, slots=True)
class Learning:
    """How it is learned."""

    eval_tokens: Annotated[int | None, option("--eval-tokens", "Of each such text: 4096.")] = None
    eval_steps: Annotated[int | None, option("--eval-steps", "Steps between evaluations.")] = None
    patience: Annotated[int | None, option("--patience", "Stop after so many without a better one: 3.")] = None
    epochs: Annotated[float | None, option("--epochs", "1; llm-pruner 2.")] = None
    max_steps: Annotated[int | None, option("--max-steps", "Instead of epochs.")] = None
    global_batch_size: Annotated[int | None, option("--global-batch-size", "Rows of a step.")] = None
    micro_batch_size: Annotated[int | None, option("--micro-batch-size", "Rows computed at once: 4.")] = None
    learning_rate: Annotated[float | None, option("--learning-rate", "The highest learning rate.")] = None
    warmup_steps: Annotated[int | None, option("--warmup-steps", "Steps over which it rises.")] = None
    rank: Annotated[int | None, option("--rank", "Of LoRA.")] = None
    alpha: Annotated[float | None, option("--alpha", "Of LoRA.")] = None
    dropout: Annotated[float | None, option("--dropout", "Of LoRA.")] = None
    teacher_weight: Annotated[float | None, option("--teacher-weight", "Of the teacher in the loss: 1.")] = None
    temperature: Annotated[float | None, option("--temperature", "Of teacher and student: 1.")] = None
    top_k: Annotated[int | None, option("--top-k", "Tokens of the teacher that are kept: 64.")] = None
    hidden_states_weight: Annotated[
        float | None, option("--hidden-states-weight", "The weight of the teacher's hidden states: 0.")
    ] = None

    def options(self) -> dict[str, Any]:
        """What was given, in the form that `RecoverOptions` takes."""
        told = asdict(self)
        lora = given(**{name: told.pop(name) for name in ("rank", "alpha", "dropout")})
        return given(**told, lora=lora or None)


@dataclass(frozen=True, slots=True)
class TrainingCommon(Common):
    """What every command can be told, and what it means for a training."""

    seed: Annotated[int, typer.Option("--seed", help="Of the order of rows, and of what is random in a step.")] = 0
    dtype: Annotated[str, typer.Option("--dtype", help="auto (bfloat16 where it is faster), float32 or bfloat16.")] = (
        "auto"
    )


def recover_command(
    context: typer.Context,
    pruned: Annotated[str, argument("PRUNED", "A pruned folder, or any model.")],
    out: OutFolder,
    *,
    data: Data,
    preset: Annotated[str, typer.Option("--preset", help="default, or llm-pruner (the paper's settings).")] = "default",
    method: Annotated[str | None, option("--method", "lora, full, distill or lora+distill. [default: lora]")] = None,
    teacher: Annotated[
        str | None, option("--teacher", "Instead of the dense model of the record.", metavar="MODEL")
    ] = None,
    eval_text: Annotated[
        list[str] | None,
        option("--eval", "Held-out text that picks the best checkpoint; may be repeated.", metavar="NAME=FILE"),
    ] = None,
    learning: Learning,
    steps: Annotated[int | None, option("--steps", "Cut PRUNED and train, in turns, so often; with --ratio.")] = None,
    ratio: Annotated[float | None, option("--ratio", "The share that all turns remove.")] = None,
    cut: Annotated[
        str | None,
        option("--cut", 'More of how to cut, as `prune` takes it: "--axes mlp --round-to 8".', metavar="OPTIONS"),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    save_adapter: Annotated[bool, typer.Option("--save-adapter", help="Put LoRA alone into OUT, too.")] = False,
    track: Annotated[str | None, option("--track", "tensorboard, trackio or wandb.")] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Put the curves into OUT as a picture, too.")] = False,
    run_folder: Journal = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    common: TrainingCommon,
) -> None:
    """Train a pruned model, with LoRA or from the dense one.

    Writes one ordinary folder; LoRA is merged into the weights. A run that was killed goes on with --resume.
    With --steps N --ratio R, a dense model is cut and trained N times in turns, until R of it is gone.
    """
    check_files(common.json_file, made=out, run=run_folder)
    options, reading = options_for(
        preset,
        given(method=method, gradient_checkpointing=gradient_checkpointing, track=track, seed=common.seed)
        | learning.options(),
        data.options() | {"seed": common.seed},
    )
    how: dict[str, Any] = {
        "data": reading,
        "options": options,
        "texts": read_texts(eval_text, option="--eval") if eval_text else {},
        "teacher": teacher,
        "loading": common.loading,
        "plot": plot,
        "overwrite": overwrite,
        "resume": resume,
        "command": context.obj,
        "bars": common.bars,
    }
    if (steps, ratio, cut) == (None, None, None):
        recovered = recover(pruned, out, save_adapter=save_adapter, **how)
    elif save_adapter:
        raise TrainingError("--save-adapter: in turns, the model that an adapter belongs to is cut again; leave it out")
    else:
        turns = 1 if steps is None else steps
        recovered = prune_and_recover(pruned, out, steps=turns, **_cutting(cut, ratio, steps, common.seed), **how)
    finish(recovered.to_json(), common.json_file, context, [pruned, str(out)])
    if not common.quiet:
        if resume:
            print("went on from what was kept" if recovered.resumed else "nothing was kept of this: started anew")
        show(recovery_tables(recovered))
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in recovered.seconds.items())
        print(f"wrote {recovered.out} ({stages}; peak memory {format_bytes(recovered.peak_rss_bytes)})")


def _cutting(text: str | None, ratio: float | None, steps: int | None, seed: int) -> dict[str, Any]:
    """The cut of a model that is trained in turns: options as `prune` takes them, read as it reads them."""
    try:
        words = shlex.split(text or "")
    except ValueError as error:
        raise PlanError(f"--cut {text}: {error}; expected options of `prune`, for example '--axes mlp'") from error
    app = typer.Typer(add_completion=False)
    app.command("prune", cls=Command)(spread(prune_command))
    told: Any = typer.main.get_command(app).make_context("secateur prune", ["MODEL", "OUT", *words])
    named = {
        name: value
        for name, value in told.params.items()
        if (source := told.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }
    of_cut, of_text = (
        {name: named.pop(name) for name in option_names(group) if name in named} for group in (Cut, Calibration)
    )
    for name in named.keys() - {"model", "out"}:
        raise PlanError(f"--cut: --{name.replace('_', '-')} says nothing of the cut; give it to `recover` itself")
    for name, own in (("ratio", ratio), ("steps", steps)):
        if name in of_cut and (name == "steps" or own is not None):
            raise PlanError(f"--cut: --{name} is an option of `recover` itself; leave it out of --cut")
    if ratio is None and not {"ratio", "target"} & of_cut.keys():
        raise PlanError("cutting in turns: say how much is to go in all, for example --steps 3 --ratio 0.5")
    cut, calibration = Cut(**{"ratio": ratio, **of_cut}), Calibration(**of_text)
    run_own_scores(cut.own_scores)
    return {
        "preset": cut.preset,
        "cut": cut.options(),
        "calibration": calibration.of_preset(cut.preset, seed),
    }
