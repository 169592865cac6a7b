"""Model -> calibration windows of text that it generates itself: calibration without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from secateur.data.calibration import DEMO, SELF, CalibrationOptions
from secateur.errors import DataError, SecateurError, one_line
from secateur.models.classes import objective
from secateur.models.config import check_positions
from secateur.models.silence import quiet
from secateur.models.trust import runs_remote_code

CACHE_BYTES = 2**30  # of the keys and values of samples that are generated at once
UNCACHED_TOKENS = 2048  # at once, where code has no cache and gives logits of all tokens at each step
LAYERS, WIDTH = 32, 4096  # of a model whose config names no such numbers
_INSTEAD = f"Give a text instead: CalibrationOptions({DEMO!r})."


def generate_windows(
    model: PreTrainedModel,
    options: CalibrationOptions,
    *,
    start_tokens: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Let the model generate its own calibration text; returns int64 ids on the CPU, samples x length.

    Calibration without data, as in LLM-QAT (arXiv 2305.17888): every token is drawn from the model's own distribution
    at temperature 1. A sample starts after `start_tokens`; without any, after the start token that the configs name,
    else the first end-of-text token, else token 0. It does not hold these, and an end of text within it is a token like
    any other. `progress` counts samples.
    Raises `DataError` for a model that cannot generate, or whose logits hold NaN, and as `check_positions` does.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=2)
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> generate_windows(model, CalibrationOptions("self", samples=3, length=5)).shape
    torch.Size([3, 5])
    """
    check_positions(model.config, options.length)
    any_model: Any = model
    if not hasattr(any_model, "generate") or objective(model) != "next token":
        raise DataError(f"text={SELF!r}: {type(model).__name__} writes no text by itself. {_INSTEAD}")
    cached = bool(getattr(model.config, "use_cache", True)) or not runs_remote_code(model)  # custom code may have none
    sampling = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=cached, max_new_tokens=options.length
    )
    device = torch.device("cpu") if model.device.type == "meta" else model.device  # accelerate moves what goes in
    at_once = _rows_at_once(model, options.length) if cached else max(1, UNCACHED_TOKENS // options.length)
    batches: list[Tensor] = []
    with _own_distribution(any_model, options.seed, device), quiet():
        for first in range(0, options.samples, at_once):
            count = min(at_once, options.samples - first)
            start = torch.tensor([start_tokens or [_start_token(model)]] * count, device=device)
            batches.append(_generate(any_model, start, sampling))
            if progress is not None:
                progress(first + count, options.samples)
    return torch.cat(batches)


def _rows_at_once(model: PreTrainedModel, length: int) -> int:
    """How many rows have keys and values of `CACHE_BYTES`, were they as wide as hidden states in every layer."""
    config = model.config.get_text_config()
    layers, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    numbers = 2 * (layers or LAYERS) * (width or WIDTH) * length
    return max(1, CACHE_BYTES // (numbers * model.dtype.itemsize))


def _generate(model: Any, start: Tensor, sampling: GenerationConfig) -> Tensor:
    """Token ids on the CPU that follow the start tokens."""
    name = type(model).__name__

    def check(_: Tensor, logits: Tensor) -> Tensor:
        if logits.isnan().any():
            raise DataError(f"text={SELF!r}: the logits of {name} hold NaN, so it writes no text.")
        return logits

    try:
        ids = model.generate(input_ids=start, generation_config=sampling, logits_processor=[check])
    except SecateurError:
        raise
    except Exception as error:  # whatever the model's own code makes of it
        raise DataError(f"text={SELF!r}: {name} writes no text ({one_line(error)}). {_INSTEAD}") from error
    generated: Tensor = ids[:, start.shape[1] :].cpu()
    return generated


def _start_token(model: PreTrainedModel) -> int:
    """The token that a text starts after: see `generate_windows`."""
    config = model.config.get_text_config()
    for name in ("bos_token_id", "eos_token_id"):
        for source in (config, getattr(model, "generation_config", None)):
            token = getattr(source, name, None)
            token = token[0] if isinstance(token, list | tuple) and token else token
            if isinstance(token, int) and 0 <= token < config.vocab_size:  # some configs name tokens that are not there
                return token
    return 0


@contextmanager
def _own_distribution(model: Any, seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch and take the model's generation settings away, which `generate` reads; both come back."""
    settings, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        model.generation_config = settings
