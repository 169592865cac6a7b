"""Commands that measure models: what they lose, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedTokenizerBase

from secateur.checkpoint.record import read_record
from secateur.cli.options import Common, Journal, MaxTokens, ModelArguments, Texts, option
from secateur.cli.output import check_files, finish, show
from secateur.cli.reading import counts, names
from secateur.errors import TaskError
from secateur.evaluation.contamination import warn_of_overlap
from secateur.evaluation.evaluate import ModelEvaluation, as_json, evaluate_model, load_inputs
from secateur.evaluation.memory import weight_bytes
from secateur.evaluation.options import EvaluationOptions, ProfileOptions
from secateur.evaluation.profile import profile_models
from secateur.models.config import load_config
from secateur.models.loading import load
from secateur.models.tokenizer import load_tokenizer
from secateur.models.weight_files import weight_file_bytes
from secateur.pipeline.run import cut_as_planned
from secateur.planning.plan import Plan, read_plan
from secateur.report.tables.evaluation import evaluation_tables
from secateur.report.tables.profile import profile_tables


def evaluate_command(
    context: typer.Context,
    models: ModelArguments,
    *,
    ppl: Texts = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            "--protocol",
            metavar="NAME",
            help="llm-pruner@N or sliding@N/STRIDE; may be repeated. [default: llm-pruner@128]",
        ),
    ] = None,
    seq_len: Annotated[
        list[int] | None,
        typer.Option("--seq-len", metavar="N", help="Short for --protocol llm-pruner@N; may be repeated."),
    ] = None,
    max_tokens: MaxTokens = None,
    tasks: Annotated[
        str | None, option("--tasks", "Tasks of lm-eval; zero-shot is LLM-Pruner's seven.", metavar="A,B,...")
    ] = None,
    tasks_data: Annotated[
        Path | None, option("--tasks-data", "Local files with the questions, not the hub.", metavar="FOLDER")
    ] = None,
    limit: Annotated[int | None, option("--limit", "Only the first N questions of each task.")] = None,
    batch_size: Annotated[int | None, option("--batch-size", "Choices at once; what fits.")] = None,
    prompt: Annotated[
        list[str] | None, option("--prompt", "A text to continue; may be repeated.", metavar="TEXT")
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens to continue it by.")] = 48,
    plan_file: Annotated[
        Path | None,
        option(
            "--plan",
            "Score each MODEL as this plan cuts it, too; in memory, so per-layer shapes work.",
            metavar="plan.json",
        ),
    ] = None,
    run_folder: Journal = None,
    common: Common,
) -> None:
    """Measure perplexity, accuracy in tasks, and see samples of text.

    Every model stands beside the first one given, window by window and question by question. Without --ppl, --tasks or
    --prompt the text is the half of Python's language reference that calibration does not see.
    """
    check_files(common.json_file, run=run_folder)
    protocols = (*(f"llm-pruner@{length}" for length in seq_len or ()), *(protocol or ()))
    if tasks is not None and not names(tasks):
        raise TaskError(f"tasks={tasks!r} names no task. Expected for example --tasks boolq,piqa, or --tasks zero-shot")
    options = EvaluationOptions(
        texts=tuple(ppl or ()),
        protocols=protocols or EvaluationOptions().protocols,
        max_tokens=max_tokens,
        tasks=names(tasks or ""),
        tasks_data=None if tasks_data is None else str(tasks_data),
        limit=limit,
        batch_size=batch_size,
        prompts=tuple(prompt or ()),
        new_tokens=new_tokens,
    )
    _check_models(models, trust_remote_code=common.trust_remote_code)
    planned = read_plan(plan_file) if plan_file is not None else None
    inputs = load_inputs(options)
    results: list[ModelEvaluation] = []
    for name in models:
        with common.bars(f"load {name}"):
            model = load(name, dtype=common.dtype, device=common.device, trust_remote_code=common.trust_remote_code)
            tokenizer = load_tokenizer(name, trust_remote_code=common.trust_remote_code)
        if not common.quiet:
            _warn_of_overlap(name, tokenizer, inputs.texts, planned)
        variants = {name: model}
        if planned:
            variants[f"{name} + {plan_file}"] = cut_as_planned(model, planned, tokenizer, bars=common.bars)
        for label, each in variants.items():
            results.append(
                evaluate_model(
                    label,
                    each,
                    tokenizer,
                    inputs,
                    bars=common.bars,
                    weight_bytes=weight_bytes(each),
                    file_bytes=weight_file_bytes(name) if label == name else None,
                )
            )
    finish(as_json(results), common.json_file, context, models)
    if not common.quiet:
        show(evaluation_tables(results))


def profile_command(
    context: typer.Context,
    models: ModelArguments,
    *,
    seq_len: Annotated[
        str, typer.Option("--seq-len", metavar="N,...", help="Tokens of the prompt; several make a grid.")
    ] = "64",
    batch: Annotated[str, typer.Option("--batch", metavar="N,...", help="Prompts at once; several make a grid.")] = "1",
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens written after it.")] = 16,
    repeats: Annotated[int, typer.Option("--repeats", help="Rounds that are timed; the median counts.")] = 5,
    plan_file: Annotated[
        Path | None, option("--plan", "Each MODEL as this plan cuts it, too, in memory.", metavar="plan.json")
    ] = None,
    sizes_only: Annotated[
        bool, typer.Option("--sizes-only", help="Count and do not measure; reads no weights.")
    ] = False,
    run_folder: Journal = None,
    common: Common,
) -> None:
    """Measure parameters, MACs, memory and speed.

    All models take turns in one run, so that a busy machine slows all of them alike. Without weights, a config.json
    gives the sizes.
    """
    check_files(common.json_file, run=run_folder)
    _check_models(models, trust_remote_code=common.trust_remote_code)
    options = ProfileOptions(
        seq_lens=tuple(counts(seq_len, option="--seq-len")),
        batch_sizes=tuple(counts(batch, option="--batch")),
        new_tokens=new_tokens,
        repeats=repeats,
        sizes_only=sizes_only,
        seed=common.seed,
    )
    with common.bars("profile") as progress:
        rows = profile_models(
            models,
            options,
            plan=None if plan_file is None else read_plan(plan_file),
            plan_name=str(plan_file),
            loading=common.loading,
            progress=progress,
        )
    finish({"results": [row.to_json() for row in rows]}, common.json_file, context, models)
    if not common.quiet:
        show(profile_tables(rows))


def _check_models(models: Sequence[str], *, trust_remote_code: bool) -> None:
    """Raise `ModelError` for a model that is none, before the ones named ahead of it are measured."""
    for name in models:
        load_config(name, trust_remote_code=trust_remote_code)


def _warn_of_overlap(
    name: str, tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], planned: Plan | None
) -> None:
    """Warn where a text was calibrated on: by the folder's record, or by the plan."""
    record = read_record(Path(name))
    for calibrated in (record.to_json() if record else None, planned.scored if planned else None):
        if calibrated:
            warn_of_overlap(name, tokenizer, texts, calibrated)
