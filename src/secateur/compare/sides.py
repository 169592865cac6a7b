"""Two MODEL arguments -> the two sides of a comparison: each model with its tokenizer, its groups and its size."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from secateur.discovery.counting import count_macs, count_parameters
from secateur.discovery.discover import discover
from secateur.discovery.groups import Discovery
from secateur.errors import ModelError
from secateur.evaluation.memory import weight_bytes
from secateur.evaluation.options import ProfileOptions
from secateur.evaluation.speed import measure_speed
from secateur.models.config import load_config, max_positions
from secateur.models.loading import LoadOptions, load
from secateur.models.tensors import check_finite
from secateur.models.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

HEADLINE_TOKENS = 64  # as LLM-Pruner counts MACs
COPIES = 0.8  # of the memory that is free: weights that take more stay where the loader left them
NAMES = ("A", "B")


@dataclass(frozen=True, slots=True)
class Size:
    """What one model costs, as the head of the page says it.

    >>> Size("demo", 134515008, 106203456, 8757444608, 538060032, 560000000).weight_bytes
    538060032
    """

    model: str
    parameters: int
    non_embedding_parameters: int
    macs: int  # of one pass over 64 tokens
    weight_bytes: int
    peak_bytes: int | None  # weights + the most that such a pass holds besides; None where it was not measured


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two models, as the command line names it, with all that answering and planning need."""

    name: str  # the MODEL argument
    letter: str  # A or B
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    discovery: Discovery
    size: Size

    @property
    def title(self) -> str:
        """How the page calls it."""
        return f"{self.letter}: {self.name}"

    @property
    def positions(self) -> int | None:
        """The longest text that the model reads, in tokens; None where its config names no limit."""
        return max_positions(self.config)


def load_sides(models: Sequence[str], *, loading: LoadOptions | None = None, seed: int = 0) -> tuple[Side, ...]:
    """Load two models to be compared, and measure what a pass over 64 tokens holds.

    The measuring warms them up, and copies weights that are mapped from a file into memory, where there is room:
    mapped weights lie unaligned and are slower to read, so one model would look slower than the other for no reason of
    its own. What a model's own generation settings say beside its special tokens (a repetition penalty, say) is taken
    away, since the page says how to write. Raises `ModelError` for a model that cannot be loaded, that has no
    tokenizer, or that cannot generate.

    >>> from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    >>> from tokenizers import Tokenizer, models
    >>> words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0, "saw": 1}, unk_token="?")))
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=1)
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    ...     _ = words.save_pretrained(folder)
    ...     a, b = load_sides([folder, folder])
    >>> a.letter, b.letter, a.size.parameters == b.size.parameters
    ('A', 'B', True)
    """
    if len(models) != len(NAMES):
        raise ModelError(f"{len(models)} models to compare; expected two: secateur compare demo pruned")
    loading = loading or LoadOptions()
    trust = loading.trust_remote_code
    for name in models:  # all configs before any weights
        load_config(name, trust_remote_code=trust)
    parts = []
    for name in models:
        model = load(name, dtype=loading.dtype, device=loading.device, trust_remote_code=trust)
        check_finite(model)
        if not hasattr(model, "generate"):
            raise ModelError(f"{name!r}: {type(model).__name__} has no generate, so it cannot answer; `demo` can")
        tokenizer = load_tokenizer(name, trust_remote_code=trust)
        _forget_generation_settings_in_place(model, tokenizer)
        parts.append((name, model, tokenizer, discover(model, name=name, trust_remote_code=trust)))
    peaks = _peaks({letter: part[1] for letter, part in zip(NAMES, parts, strict=True)}, seed=seed)
    return tuple(
        Side(
            name,
            letter,
            model,
            tokenizer,
            model.config,
            discovery,
            Size(
                model=name,
                parameters=count_parameters(discovery),
                non_embedding_parameters=count_parameters(discovery, embeddings=False),
                macs=sum(count_macs(discovery, tokens=HEADLINE_TOKENS).values()),
                weight_bytes=weight_bytes(model),
                peak_bytes=peaks.get(letter),
            ),
        )
        for letter, (name, model, tokenizer, discovery) in zip(NAMES, parts, strict=True)
    )


def sizes_as_json(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """The sizes as `secateur compare --json` writes them.

    >>> sizes_as_json(())
    []
    """
    return [asdict(side.size) for side in sides]


def _forget_generation_settings_in_place(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Leave of the generation settings the special tokens alone; `generate` reads what it is not given from there."""
    own = model.generation_config
    ends = getattr(own, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    pad = next((p for p in (getattr(own, "pad_token_id", None), tokenizer.pad_token_id) if p is not None), None)
    if pad is None:  # one sequence is written at a time, so it is never used; `generate` warns where there is none
        pad = ends[0] if isinstance(ends, list) and ends else ends
    begin = getattr(own, "bos_token_id", None)
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad, bos_token_id=begin)


def _peaks(models: Mapping[str, PreTrainedModel], *, seed: int) -> dict[str, int]:
    """The peak memory of each model, where both fit into memory."""
    weights = sum(weight_bytes(model) for model in models.values() if model.device.type == "cpu")
    free = psutil.virtual_memory().available
    if weights > COPIES * free:
        logger.warning(
            "the weights take %.1f GiB and %.1f GiB of memory are free: they are read from the disk while models "
            "answer, which is slow and makes speeds hard to compare; --dtype bfloat16 may make them fit",
            weights / 2**30,
            free / 2**30,
        )
        return {}
    options = ProfileOptions(seq_lens=(_measured_tokens(models),), new_tokens=1, repeats=1, seed=seed)
    [speeds] = measure_speed(models, options)
    return {letter: speed.peak_bytes for letter, speed in speeds.items()}


def _measured_tokens(models: Mapping[str, PreTrainedModel]) -> int:
    """64, or what the model of fewest positions reads beside the one token that it writes."""
    lengths = [max_positions(model.config) for model in models.values()]
    return max(1, min([HEADLINE_TOKENS, *(length - 1 for length in lengths if length is not None)]))
