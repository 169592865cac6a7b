"""A process that knows nothing of us and uses folders as anyone would: it loads, generates, tunes with LoRA, saves.

Run as a script it is that process: it reads one request per line, JSON, and answers with one line. It is kept for many
folders, because most of the time of a new process goes into importing.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from line_process import ANSWER, ask

NEW_TOKENS = 5
LORA_STEPS = 2


@dataclass(frozen=True, slots=True)
class Seen:
    """What the stranger found in a folder; where a stage failed, why, and nothing of later stages."""

    logits: Tensor  # of the given tokens, without a cache
    tokens: Tensor  # greedy, with the cache as the model would have it
    failed: Mapping[str, str]  # stage -> the error: lora


class Stranger:
    """The process, seen from here."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="stranger-"))
        environment = {**os.environ, "HF_MODULES_CACHE": str(self.folder / "modules")}
        self.log = (self.folder / "log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            cwd=self.folder,
            text=True,
        )

    def use(
        self,
        folder: Path,
        input_ids: Tensor,
        *,
        loader: str = "AutoModelForCausalLM",
        lora: bool = False,
        thorough: bool = False,
    ) -> Seen:
        """Let it load a folder with a class of transformers, score and generate.

        With `lora` it tunes, merges, saves and loads again; with `thorough` it uses other kernels, gradient
        checkpointing, a random model and the tokenizer. Raises `AssertionError`.
        """
        request, results = self.folder / "request.safetensors", self.folder / "results.safetensors"
        save_file({"input_ids": input_ids.contiguous()}, request)
        order: dict[str, Any] = {"folder": str(folder), "loader": loader, "in": str(request), "out": str(results)}
        order |= {"lora": lora, "thorough": thorough}
        answer = ask(self.process, order, log=self.log)
        if "error" in answer:
            raise AssertionError(answer["error"])
        found = load_file(results)
        return Seen(found["logits"], found["tokens"], answer["failed"])

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        with suppress(BrokenPipeError):
            self.process.communicate()
        self.log.close()


@cache
def stranger() -> Stranger:
    """The one process of this test run."""
    made = Stranger()
    atexit.register(made.end)
    return made


# --- the process itself: what follows runs where nothing of ours can be imported -----------------------------------


def answer(order: Mapping[str, Any]) -> dict[str, Any]:
    """Use one folder."""
    import transformers

    loader = getattr(transformers, order["loader"])
    options = {"trust_remote_code": True, "attn_implementation": "eager", "dtype": "auto"}
    model = loader.from_pretrained(order["folder"], **options).eval()
    ids = load_file(order["in"])["input_ids"]
    found = {"logits": logits(model, ids), "tokens": generated(model, ids[:1])}
    failed = {}
    if order["lora"]:
        try:
            tune(model, ids, partial(loader.from_pretrained, **options), order["folder"] + "_tuned")
        except Exception as error:  # whatever fails is the finding
            failed["lora"] = told(error)
    if order["thorough"]:
        check_thoroughly(model, ids, order["folder"])
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, order["out"])
    return {"failed": failed}


def check_thoroughly(model: Any, ids: Tensor, folder: str) -> None:
    """What else anyone does with a folder. Raises AssertionError for what is wrong."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    if "AutoModel" in getattr(model.config, "auto_map", {}):
        base = AutoModel.from_pretrained(
            folder, trust_remote_code=True, attn_implementation="eager", dtype="auto"
        ).eval()
        assert not hasattr(base, "lm_head"), "AutoModel has a head"
        with torch.no_grad():
            found, expected = (each(input_ids=ids).last_hidden_state for each in (base, model.base_model))
        near = 0.5 if model.dtype == torch.bfloat16 else 1e-4
        assert torch.allclose(found, expected, atol=near, rtol=0), "AutoModel computes other hidden states"
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == bool(model.config.get_text_config().tie_word_embeddings), f"tied: {tied}"
    if model._supports_sdpa:
        eager = logits(model, ids)
        model.set_attn_implementation("sdpa")
        kinds = {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
        assert kinds == {"sdpa"}, f"kernels: {kinds}"
        near = 0.5 if model.dtype == torch.bfloat16 else 1e-4
        assert torch.allclose(logits(model, ids), eager, atol=near, rtol=0), "other logits by another kernel"
        model.set_attn_implementation("eager")
    new = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in new.named_parameters()} == shapes, "a random model has other shapes"
    assert all(torch.isfinite(p).all() for p in new.parameters()), "a random model is not finite"
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    lacking = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking, f"no gradient for {lacking[:3]}"
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # it needs no code of ours
    assert len(tokenizer("prune").input_ids) > 0


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """The logits of one pass, as transformers runs it."""
    found: Tensor = model(input_ids=ids).logits
    return found.clone()


def generated(model: Any, ids: Tensor) -> Tensor:
    """Greedy tokens."""
    found: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    return found[:, ids.shape[1] :]


def tune(model: Any, ids: Tensor, load: Any, out: str) -> None:
    """LoRA on all linear layers: two steps, merged, saved, loaded again. Raises AssertionError for what is wrong."""
    from peft import LoraConfig, get_peft_model

    dense = logits(model, ids)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.01)
    adapted.train()
    for _ in range(LORA_STEPS):
        loss = torch.nn.functional.cross_entropy(
            adapted(input_ids=ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss), "the loss is NaN or Inf"
    moved = [name for name, p in trained.items() if not torch.equal(p, before[name])]
    assert moved, "no adapter was trained"
    adapted.eval().double()  # where code chooses by rank, float32 rounds a merged weight to another choice
    tuned = logits(adapted, ids)
    assert not torch.allclose(tuned.float(), dense), "the adapters change nothing"
    merged: Any = adapted.merge_and_unload()
    off = (logits(merged, ids) - tuned).abs().max()
    assert off < 1e-3, f"merged it is off by {off:.1e}"
    merged.float().save_pretrained(out)
    again = load(out).eval()
    assert type(again).__name__ == type(merged).__name__, f"loaded again it is a {type(again).__name__}"
    off = (logits(again, ids) - logits(merged, ids)).abs().max()
    assert off < 1e-5, f"merged, saved and loaded it is off by {off:.1e}"


def told(error: Exception) -> str:
    """The error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, AssertionError) and text else f"{type(error).__name__}: {text[:300]}"


def serve(requests: IO[str]) -> None:
    """Answer every line."""
    for line in requests:
        try:
            found = answer(json.loads(line))
        except Exception as error:  # whatever fails is the answer
            traceback.print_exc()
            found = {"error": told(error)}
        sys.stdout.write(f"{ANSWER}{json.dumps(found)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.modules["secateur"] = None  # type: ignore[assignment]  # importing it fails from now on
    assert importlib.util.find_spec("peft"), "peft is not installed"
    torch.set_num_threads(1)
    serve(sys.stdin)
