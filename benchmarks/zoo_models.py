"""Small models of other families for the benchmarks, trained here in some minutes each.

    python benchmarks/zoo_models.py --text FILE [--family NAME] [--steps N] [--out FOLDER]

A GPT-NeoX (parallel attention and MLP, fused projections) and a StarCoder2 (grouped queries), both of 7 million
parameters with layer norms, biases and an output head of its own, are trained on the text's documents with a tokenizer
made from them; so is, where it is named, a Qwen3-MoE of 13 million, of whose 16 experts in each layer every token takes
two. A model that is there is left as it is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from secateur.data.text import read_calibration
from secateur.models.silence import quiet

VOCABULARY, LENGTH, BATCH = 4096, 256, 8
SIZES = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "max_position_embeddings": LENGTH}
NO_DROPOUT = {"residual_dropout": 0.0, "embedding_dropout": 0.0}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "gpt_neox": {"intermediate_size": 1024},
    "starcoder2": {"intermediate_size": 1024, "num_key_value_heads": 4, "tie_word_embeddings": False, **NO_DROPOUT},
    "qwen3_moe": {
        "moe_intermediate_size": 128,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "intermediate_size": 512,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.01,  # trained with the loss that balances experts
    },
}
RATE, WARM_UP = 2e-3, 50


def make_tokenizer(documents: list[str]) -> PreTrainedTokenizerBase:
    """Byte pairs of the documents."""
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
    return PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<end>")


def train(family: str, tokenizer: PreTrainedTokenizerBase, documents: list[str], folder: Path, steps: int) -> None:
    """Train one model, and write it."""
    ids = torch.tensor(tokenizer("<end>".join(documents), verbose=False)["input_ids"])
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, **SIZES, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 - 0.9 * step / steps)
    )
    console, start = Console(), time.perf_counter()
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
            seconds = time.perf_counter() - start
            console.print(f"{family}, step {step + 1}: {float(loss.detach()):.3f} nats, {seconds:.0f} s")
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def main() -> None:
    """Train the models that are not there yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", required=True)
    parser.add_argument("--family", action="append", choices=[*FAMILIES], help="[default: gpt_neox and starcoder2]")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--out", default="runs/zoo", type=Path)
    arguments = parser.parse_args()
    documents = [*read_calibration(arguments.text)]
    families = arguments.family or ["gpt_neox", "starcoder2"]
    missing = [family for family in families if not (arguments.out / family / "config.json").exists()]
    tokenizer = make_tokenizer(documents) if missing else None
    for family in missing:
        assert tokenizer is not None
        train(family, tokenizer, documents, arguments.out / family, arguments.steps)


if __name__ == "__main__":
    main()
