"""What commands can be told. Options that several commands have are written once, in groups; a command takes groups.

`spread` makes of a function that takes groups a command that takes their options, under the same names.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from secateur.cli.output import progress_bars
from secateur.cli.reading import count, given, layer_range, names, proportion
from secateur.data.calibration import COLUMN, CalibrationOptions
from secateur.models.loading import LoadOptions
from secateur.models.sources import DEMO
from secateur.planning.options import calibration_for
from secateur.progress import ProgressBars
from secateur.scoring.scores import SCORES


class Command(TyperCommand):
    """A command whose usage line is written as the documentation writes it: `prune [OPTIONS] MODEL OUT`."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The pieces without the braces that typer may put around them."""
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]


def argument(metavar: str, about: str) -> Any:
    """An argument that has to be given."""
    return typer.Argument(metavar=metavar, help=about, show_default=False)


def option(name: str, about: str, *, metavar: str | None = None) -> Any:
    """An option whose default its help tells, if any."""
    return typer.Option(name, help=about, metavar=metavar, show_default=False)


MODEL_HELP = "A hub name, a folder, a .gguf file, a config.json, or `demo`."
ModelArgument = Annotated[str, argument("MODEL", MODEL_HELP)]
ModelArguments = Annotated[list[str], argument("MODEL", MODEL_HELP)]
OutFolder = Annotated[Path, argument("OUT", "The folder to write.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON, too.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")]
Journal = Annotated[Path | None, option("--run", "Keep the result here, for `report`.", metavar="FOLDER")]
Statistics = Annotated[
    Path | None,
    option("--run", "Keep statistics here, for other plans, and the result, for `report`.", metavar="FOLDER"),
]
Texts = Annotated[list[str] | None, option("--ppl", "A text to score; may be repeated.", metavar="NAME=FILE")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="Score the first N tokens only.")]


@dataclass(frozen=True, slots=True)
class Common:
    """What every command can be told."""

    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False
    json_file: Json = None
    seed: Annotated[int, typer.Option("--seed", help="Of calibration windows and random scores.")] = 0
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N, or balanced (over all GPUs).")] = (
        "auto"
    )
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16, float16 or float64.")] = "auto"
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the model's own Python files run.")
    ] = False

    @property
    def loading(self) -> LoadOptions:
        """How models are loaded."""
        return LoadOptions(self.dtype, self.device, self.trust_remote_code)

    @property
    def bars(self) -> ProgressBars:
        """What shows how far the work is."""
        return progress_bars(quiet=self.quiet)


@dataclass(frozen=True, slots=True)
class Cut:
    """How to cut: what was given, None elsewhere."""

    preset: Annotated[str, typer.Option("--preset", help="best, fast, or llm-pruner (the paper's recipe).")] = "best"
    ratio: Annotated[float | None, option("--ratio", "The share to remove, 0 to 1.")] = None
    of: Annotated[str | None, option("--of", "Of what: units, parameters, non-embedding, macs, memory or latency.")] = (
        None
    )
    target: Annotated[str | None, option("--target", "What is to be left instead, for example 100M.")] = None
    axes: Annotated[str | None, option("--axes", "Any of attention,mlp,query; or hidden; or layers.")] = None
    strategy: Annotated[str | None, option("--strategy", "LLM-Pruner's names: block, channel or layer.")] = None
    layers: Annotated[str | None, option("--layers", "Only layers A to B-1.", metavar="A:B")] = None
    score: Annotated[str | None, option("--score", f"{', '.join(SCORES)}; or one of yours (--own-scores).")] = None
    own_scores: Annotated[
        Path | None, option("--own-scores", "Run this file of yours, which registers scores.", metavar="FILE.py")
    ] = None
    reduce: Annotated[str | None, option("--reduce", "Over a group's axes: sum, mean, max, prod, first, last.")] = None
    round_to: Annotated[int | None, option("--round-to", "Widths are multiples of this.")] = None
    scope: Annotated[
        str | None,
        option("--scope", "local: the same share everywhere; global: one ranking; sensitivity: by measured damage."),
    ] = None
    shape: Annotated[str | None, option("--shape", "uniform: layers alike; free: each its own.")] = None
    schedule: Annotated[
        str | None,
        option("--schedule", "Shares of the first and the last layer, in proportion: 0.5:1.5.", metavar="A:B"),
    ] = None
    at_least: Annotated[float | None, option("--at-least", "The share of each group that stays.")] = None
    choose: Annotated[str | None, option("--choose", "Which units go: by score, or by obs while repairing.")] = None
    repair: Annotated[str | None, option("--repair", "none, bias, least-squares or reconstruct.")] = None
    steps: Annotated[int | None, option("--steps", "Plan, cut, repair and score again so often.")] = None
    sublayers: Annotated[
        bool | None, option("--sublayers/--no-sublayers", "An attention or MLP may go as a whole.")
    ] = None
    at_dtype: Annotated[str | None, option("--at-dtype", "In which memory is counted: bfloat16, int8.")] = None

    def options(self) -> dict[str, Any]:
        """What was given, in the form that `CutOptions` takes."""
        told = asdict(self)
        del told["preset"], told["own_scores"]
        read = {"target": count, "axes": names, "layers": layer_range, "schedule": proportion}
        return {name: read[name](value) if name in read else value for name, value in given(**told).items()}


@dataclass(frozen=True, slots=True)
class Calibration:
    """Which text a cut looks at, and how much of it."""

    calibration: Annotated[
        str,
        typer.Option("--calibration", help="`demo`, a file, the name of a data set, or `self`: what the model writes."),
    ] = DEMO
    samples: Annotated[
        int | None, option("--samples", "Calibration windows: 256 (64 for scores), fast 24 (8), llm-pruner 10.")
    ] = None
    length: Annotated[int | None, option("--length", "Tokens of a window: 256; llm-pruner 64.")] = None
    column: Annotated[
        str, typer.Option("--column", help="The field of calibration documents that holds their text.")
    ] = COLUMN
    chat: Annotated[bool, typer.Option("--chat", help="Put calibration documents into the chat template.")] = False
    shuffled: Annotated[
        float | None,
        option(
            "--shuffled",
            "Share of the windows that repair sees with their tokens in random order: 0.25 with preset best.",
        ),
    ] = None

    def about(self, seed: int) -> dict[str, Any]:
        """What was given, as `calibration_for` takes it."""
        told = asdict(self)
        return given(text=told.pop("calibration"), seed=seed, **told)

    def of_preset(self, preset: str, seed: int) -> CalibrationOptions:
        """The calibration of a preset, but for what was given."""
        return calibration_for(preset, **self.about(seed))


@dataclass(frozen=True, slots=True)
class Without:
    """Options of a group that a command does not have, as in `Annotated[Cut, Without("score")]`."""

    options: tuple[str, ...]

    def __init__(self, *options: str) -> None:
        object.__setattr__(self, "options", options)


def option_names(group: type) -> list[str]:
    """The options of a group, as parameters of a command are called."""
    return [each.name for each in fields(group)]


def spread(function: Callable[..., None]) -> Callable[..., None]:
    """Make the command of a function that takes groups of options: it takes the options, each by its name.

    >>> def shown(model: ModelArgument, common: Annotated[Common, Without("seed", "device", "dtype")]) -> None:
    ...     print(model, common.quiet)
    >>> command = spread(shown)
    >>> list(inspect.signature(command).parameters)
    ['model', 'quiet', 'json_file', 'trust_remote_code']
    >>> command(model="demo", quiet=True, json_file=None, trust_remote_code=False)
    demo True
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[type, list[str]]] = {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        annotated = get_origin(parameter.annotation) is Annotated
        group, *about = get_args(parameter.annotation) if annotated else (parameter.annotation,)
        if not (isinstance(group, type) and is_dataclass(group)):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        left_out = {name for each in about if isinstance(each, Without) for name in each.options}
        hints = get_type_hints(group, include_extras=True)
        own = [
            inspect.Parameter(
                each.name,
                inspect.Parameter.KEYWORD_ONLY,
                annotation=hints[each.name],
                default=inspect.Parameter.empty if each.default is MISSING else each.default,
            )
            for each in fields(group)
            if each.name not in left_out
        ]
        parameters += own
        groups[parameter.name] = group, [each.name for each in own]

    @functools.wraps(function)
    def command(**told: Any) -> None:
        made = {name: group(**{each: told.pop(each) for each in own}) for name, (group, own) in groups.items()}
        function(**told, **made)

    vars(command)["__signature__"] = inspect.Signature(parameters)  # what typer looks at
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command
