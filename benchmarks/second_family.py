"""The default preset beside LLM-Pruner's on a model of another family, with no setting changed.

    python benchmarks/second_family.py --calibration FILE [--text NAME=FILE]... [--steps N] [--folder FOLDER]

A GPT-NeoX of 7 million parameters (parallel attention and MLP, fused projections, biases) is trained on the first nine
tenths of the calibration text's documents, from which calibration is drawn as well; the last tenth, and the texts
named, measure the damage: nats per token in windows of 128 tokens, against the dense model.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from secateur.data.text import read_calibration
from secateur.evaluation.perplexity import evaluate
from secateur.evaluation.texts import read_evaluation_text
from secateur.models.loading import load
from secateur.models.silence import quiet
from secateur.models.tokenizer import load_tokenizer
from secateur.pipeline.pipeline import Pipeline
from secateur.pipeline.recipe import PruneRecipe
from secateur.planning.options import with_preset

VOCABULARY, LENGTH, BATCH = 4096, 128, 16
SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
RATE, WARM_UP = 2e-3, 50


def train(documents: list[str], folder: Path, steps: int, console: Console) -> None:
    """Train the tokenizer and the model, and write them."""
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pairs.train_from_iterator(documents, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<end>")
    ids = torch.tensor(tokenizer("<end>".join(documents), verbose=False)["input_ids"])
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt_neox", vocab_size=VOCABULARY, max_position_embeddings=512, **SIZES)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 - 0.9 * step / steps)
    )
    start = time.perf_counter()
    for step in range(steps):
        at = torch.randint(len(ids) - LENGTH, (BATCH,))
        batch = torch.stack([ids[first : first + LENGTH] for first in at.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            console.print(f"step {step + 1}: {float(loss.detach()):.3f} nats, {time.perf_counter() - start:.0f} s")
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def cut(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Path, preset: str, ratio: float
) -> PreTrainedModel:
    """The model as a preset cuts it, by the same share of the non-embedding parameters under both."""
    options, calibration = with_preset(preset, {"ratio": ratio}, {"text": str(documents)})
    recipe = PruneRecipe("second family", cut=options, calibration=calibration)
    return Pipeline(recipe, model=model, tokenizer=tokenizer).cut()[0]


def main() -> None:
    """Train if there is no model yet, cut by both presets, and show the damage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--folder", default="runs/second-family", type=Path)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console()
    documents = [*read_calibration(arguments.calibration)]
    seen, held_out = documents[: len(documents) * 9 // 10], documents[len(documents) * 9 // 10 :]
    if not (arguments.folder / "config.json").exists():
        train(seen, arguments.folder, arguments.steps, console)
    with quiet():
        model = load(str(arguments.folder), dtype="float32")
    tokenizer = load_tokenizer(str(arguments.folder))
    file = arguments.folder.with_name(f"{arguments.folder.name}-seen.jsonl")
    file.write_text("\n".join(json.dumps({"text": document}) for document in seen), encoding="utf-8")
    texts = {"held out": "\n\n".join(held_out)}
    texts |= {each.partition("=")[0]: read_evaluation_text(each.partition("=")[2]) for each in arguments.text}

    def nll(each: PreTrainedModel) -> dict[str, float]:
        return {found.data: found.nll for found in evaluate(each, tokenizer, texts, max_tokens=arguments.tokens)}

    dense = nll(model)
    found: dict[str, Any] = {"dense": dense}
    table = Table("", "removed", *texts, title="damage in nats per token, windows of 128 tokens")
    table.add_row("dense, nats per token", "", *(f"{dense[text]:.3f}" for text in texts))
    for ratio in (0.2, 0.5):
        for name in ("best", "llm-pruner"):
            smaller = cut(model, tokenizer, file, name, ratio)
            damage = {text: value - dense[text] for text, value in nll(smaller).items()}
            found[f"{name} {ratio:g}"] = damage
            table.add_row(name, f"{ratio:.0%}", *(f"{damage[text]:.3f}" for text in texts))
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
