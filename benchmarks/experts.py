"""What fewer experts cost a small mixture of experts: ours beside REAP's score, random experts and merging.

    python benchmarks/experts.py MODEL --calibration FILE --text NAME=FILE [--ratio 0.5] [--write]

Every row removes the same number of whole experts, chosen on the same windows, without training; damage is
ln(perplexity / perplexity of the dense model) in nats per token, the mean over `--seeds` with half the range. Merging
(as M-SMoE does it, arXiv 2310.01334) keeps the router: in every layer the experts that most tokens take stay, and each
of the others joins that one whose router logits are most like its own, all weighted by their tokens. Results go into a
JSON file as they come (`--out`), and the same command goes on after a stop; `--write` puts the table into
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.data.calibration import CalibrationOptions
from secateur.data.windows import calibration_windows
from secateur.discovery.discover import discover
from secateur.discovery.groups import Discovery
from secateur.evaluation.perplexity import evaluate
from secateur.evaluation.texts import read_evaluation_text
from secateur.files import write_json
from secateur.models.loading import load
from secateur.models.silence import quiet
from secateur.models.tokenizer import load_tokenizer
from secateur.planning.options import CutOptions
from secateur.planning.plan import plan
from secateur.planning.selection import groups_to_cut
from secateur.pruning.prune import prune
from secateur.pruning.repair import repair
from secateur.scoring.collect_experts import expert_modules, routed
from secateur.scoring.passes.forward import pass_to_hidden
from secateur.scoring.scores import scores_from, statistics_for
from tables import about, keep, markdown, show

LOCAL = CutOptions(ratio=0.5, of="units", axes=("experts",), score="reap", choose="score", repair="none", min_keep=0.0)
GLOBAL = replace(LOCAL, of="non-embedding", score="fisher", scope="global", shape="per-layer", min_keep=0.05)
MERGED = "merged (M-SMoE)"
ROWS: Mapping[str, CutOptions] = {
    "ours: Fisher information, one ranking, experts fitted": replace(GLOBAL, repair="least-squares"),
    "the same number in every layer": replace(LOCAL, score="fisher", repair="least-squares"),
    "the same, nothing fitted": replace(LOCAL, score="fisher"),
    "REAP": LOCAL,
    "REAP, experts fitted": replace(LOCAL, repair="least-squares"),
    MERGED: LOCAL,
    "random": replace(LOCAL, score="random"),
}


def main() -> None:
    """Measure what is missing; print the table."""
    options = _arguments()
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    tokenizer = load_tokenizer(options.model)
    with quiet():
        model = load(options.model, dtype="float32")
    texts = {each.partition("=")[0]: read_evaluation_text(each.partition("=")[2]) for each in options.text}

    def losses(of: PreTrainedModel) -> dict[str, float]:
        found = evaluate(of, tokenizer, texts, protocols=[options.protocol], max_tokens=options.tokens)
        return {each.data: each.nll for each in found}

    if "dense" not in results:
        results["dense"] = losses(model)
    for ratio in options.ratio:
        for seed in options.seeds:
            windows = _windows(tokenizer, seed, options)
            for row, how in ROWS.items():
                if (key := f"{ratio:.0%} | {row} | {seed}") not in results:
                    results[key] = _measured(model, row, how, ratio, windows, seed, losses)
                    write_json(options.out, results)
    show("Damage in nats per token", rows_of(results))
    if options.write:
        keep("experts", results, block(results))


def _windows(tokenizer: PreTrainedTokenizerBase, seed: int, options: argparse.Namespace) -> Tensor:
    text = CalibrationOptions(options.calibration, samples=options.samples, column=options.column, seed=seed)
    return calibration_windows(tokenizer, replace(text, held_out=1, score_samples=None))


def _measured(
    model: PreTrainedModel,
    row: str,
    how: CutOptions,
    ratio: float,
    windows: Tensor,
    seed: int,
    losses: Callable[[PreTrainedModel], dict[str, float]],
) -> dict[str, Any]:
    start, discovery = time.perf_counter(), discover(model)
    if row == MERGED:
        smaller = merged(model, discovery, windows, ratio)
        kept = None
    else:
        share = ratio if how.of == "units" else ratio * _share_of_experts(model)
        options = replace(how, ratio=share)
        groups = [group for each in groups_to_cut(discovery, options).values() for group in each]
        statistics = statistics_for(options.score, model, discovery, windows, groups=groups)
        scores = scores_from(discovery, statistics, groups=groups, name=options.score, seed=seed)
        decided = plan(discovery, options, config=model.config, scores=scores)
        repaired = repair(model, decided, discovery, windows, method=options.repair)
        with quiet():
            smaller = prune(model, repaired.plan, discovery=discovery, weights=repaired.weights)
        kept = [group.kept for group in decided.groups]
    return {"kept": kept, "seconds": time.perf_counter() - start, "losses": losses(smaller), "about": about()}


def _share_of_experts(model: PreTrainedModel) -> float:
    """Of the non-embedding parameters, those of experts and of the rows of routers that go with them."""
    embeddings = {
        id(p) for each in (model.get_input_embeddings(), model.get_output_embeddings()) for p in each.parameters()
    }
    sizes = {name: p.numel() for name, p in model.named_parameters() if id(p) not in embeddings}
    return sum(size for name, size in sizes.items() if ".experts." in name or ".gate." in name) / sum(sizes.values())


# --- merging ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def merged(model: PreTrainedModel, discovery: Discovery, windows: Tensor, ratio: float) -> PreTrainedModel:
    """A copy whose experts share weights: as many different ones are left as when a share of them goes.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> small = {"hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1, "num_local_experts": 4}
    >>> config = AutoConfig.for_model("mixtral", num_attention_heads=2, num_key_value_heads=1, **small)
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> half = merged(model, discover(config), torch.arange(20).reshape(2, 10), 0.5)
    >>> len(half.get_parameter("model.layers.0.mlp.experts.down_proj").unique(dim=0))
    2
    """
    result = copy.deepcopy(model)
    paths = expert_modules(result, discovery, discovery.groups)
    seen: dict[str, tuple[Tensor, Tensor]] = {}  # path -> tokens and similarity of router logits

    def watch(path: str, number: int) -> Callable[..., None]:
        router = dict(result.get_submodule(path.rpartition(".")[0]).named_parameters())["gate.weight"]

        def hook(_: nn.Module, args: Any, kwargs: Any, __: Any) -> None:
            call = routed([*args, *kwargs.values()])
            assert call is not None
            logits_EN = functional.normalize(router @ call.hidden_ND.T, dim=1)
            tokens_E = torch.bincount(call.chosen_NK.flatten(), minlength=number)
            seen[path] = tokens_E, logits_EN @ logits_EN.T

        return hook

    hooks = [
        result.get_submodule(path).register_forward_hook(watch(path, len(next(iter(units.values())))), with_kwargs=True)
        for path, units in paths.items()
    ]
    pass_to_hidden(result, windows)()
    for hook in hooks:
        hook.remove()
    for path, (tokens_E, alike_EE) in seen.items():
        stay = tokens_E.argsort(descending=True)[: round(len(tokens_E) * (1 - ratio))]
        joins_E = stay[alike_EE[:, stay].argmax(1)]
        joins_E[stay] = stay
        for weight in result.get_submodule(path).parameters():
            share_E = tokens_E.clamp_min(1).to(weight.dtype).reshape(-1, *[1] * (weight.dim() - 1))
            total = torch.zeros_like(weight).index_add_(0, joins_E, weight * share_E)
            counts = torch.zeros_like(share_E).index_add_(0, joins_E, share_E)
            weight.copy_((total / counts.clamp_min(1))[joins_E])
    return result


# --- tables ----------------------------------------------------------------------------------------------------------


def rows_of(results: Mapping[str, Any]) -> list[list[str]]:
    """The head and a row for each way to cut: the mean damage over the seeds, and half the range.

    >>> found = {f"50% | REAP | {seed}": {"losses": {"WT2": 3.1 + seed / 10}} for seed in (0, 1)}
    >>> rows_of({"dense": {"WT2": 3.0}, **found})
    [['experts removed', '', 'WT2'], ['50%', 'REAP', '0.150 ± 0.050']]
    """
    dense = results["dense"]
    by_row: dict[tuple[str, str], list[Mapping[str, float]]] = {}
    for key, found in results.items():
        if key != "dense":
            ratio, row, _ = key.split(" | ")
            by_row.setdefault((ratio, row), []).append(found["losses"])
    rows = [["experts removed", "", *dense]]
    for (ratio, row), found in by_row.items():
        damages = {text: [each[text] - loss for each in found] for text, loss in dense.items()}
        cells = [f"{mean(each):.3f} ± {(max(each) - min(each)) / 2:.3f}" for each in damages.values()]
        rows.append([ratio, row, *cells])
    return rows


def block(results: Mapping[str, Any]) -> str:
    """The table of docs/benchmarks.md."""
    return markdown(rows_of(results))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="a folder: zoo_models.py trains one")
    add("--calibration", action="append", required=True, metavar="FILE[@WEIGHT]")
    add("--column", default="text", help="the field of those files that have it")
    add("--text", action="append", required=True, metavar="NAME=FILE", help="what is measured")
    add("--ratio", action="append", type=float, help="of the experts [default: 0.25, 0.5 and 0.75]")
    add("--seeds", default=[0, 1, 2], type=lambda text: [int(x) for x in text.split(",")], help="of the windows")
    add("--samples", type=int, default=64, help="windows of 256 tokens")
    add("--tokens", type=int, default=4096, help="of each text")
    add("--protocol", default="llm-pruner@256")
    add("--write", action="store_true", help="the table of docs/benchmarks.md")
    add("--out", type=Path, default=Path("runs/experts.json"))
    options = parser.parse_args()
    options.ratio = options.ratio or [0.25, 0.5, 0.75]
    return options


if __name__ == "__main__":
    main()
