"""Results of the rounds -> one result and one chain of records; steps are counted through."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError, PlanError
from secateur.files import read_json, write_json
from secateur.planning.plan import Plan, plan_from_json
from secateur.recovery.result import RecoverResult
from secateur.recovery.setup import TrainingSetup


@dataclass(frozen=True, slots=True)
class Round:
    """The result of a round; its plan is of the model that the round before left."""

    plan: Plan
    recovery: Mapping[str, Any]  # of the record of its folder
    result: Mapping[str, Any]  # of its training, as `RecoverResult.to_json`


def write_round(path: Path, finished: Round) -> None:
    """Write the result of a round, for a run that resumes."""
    plan = finished.plan.to_json()
    write_json(path, {"plan": plan, "recovery": finished.recovery, "result": finished.result})


def read_round(path: Path) -> Round | None:
    """Read the result of a finished round; None where there is none, or it is damaged."""
    try:
        data = read_json(path)
        return Round(plan_from_json(data["plan"]), data["recovery"], data["result"])
    except (CheckpointError, PlanError, LookupError, TypeError):
        return None


def join_results(
    out: Path, setup: TrainingSetup, rounds: Sequence[Round], seconds: Mapping[str, float], *, resumed: bool
) -> RecoverResult:
    """Join the results of all rounds; steps and their losses are counted through."""
    results = [each.result for each in rounds]
    *first_steps, steps = itertools.accumulate((result["steps"] for result in results), initial=0)
    numbered = list(zip(itertools.count(1), first_steps, results, strict=False))
    return RecoverResult(
        out=out,
        method=setup.options.method,
        steps=steps,
        best_step=first_steps[-1] + results[-1]["best_step"],
        tokens=sum(result["tokens"] for result in results),
        trained_parameters=results[-1]["trained_parameters"],
        rows=len(setup.data.train),
        dropped=setup.data.dropped,
        loss=tuple((first + step, loss) for _, first, result in numbered for step, loss in result["loss"]),
        evaluation=tuple(
            {**entry, "step": first + entry["step"], "round": number}
            for number, first, result in numbered
            for entry in result["evaluation"]
        ),
        seconds={
            f"{stage}, round {number}": value
            for number, _, result in numbered
            for stage, value in result["seconds"].items()
        }
        | dict(seconds),
        notes=tuple(
            dict.fromkeys(
                note if note in setup.notes or len(rounds) == 1 else f"round {number}: {note}"
                for number, _, result in numbered
                for note in result["notes"]
            )
        ),
        resumed=resumed,
        diverged=results[-1]["diverged"],
        rounds=tuple(_summary(number, each) for number, each in enumerate(rounds, start=1)),
    )


def _summary(number: int, finished: Round) -> dict[str, Any]:
    result = finished.result
    evaluation = result["evaluation"]
    return {
        "round": number,
        "parameters": finished.plan.parameters["pruned"],
        "non_embedding_parameters": finished.plan.parameters["pruned_non_embedding"],
        "steps": result["steps"],
        "best_step": result["best_step"],
        "tokens": result["tokens"],
        "before": next(iter(evaluation), None),
        "best": next((entry for entry in evaluation if entry["step"] == result["best_step"]), None),
    }


def chain_records(rounds: Sequence[Round], command: str | None) -> dict[str, Any]:
    """Return the records of all trainings, the last first, each with its round and its number of parameters."""
    chain: dict[str, Any] = {}
    for number, each in enumerate(rounds, start=1):
        chain = {
            **each.recovery,
            "command": command,
            "round": number,
            "parameters": each.plan.parameters["pruned"],
            "before": chain or each.recovery.get("before"),
        }
    return chain
