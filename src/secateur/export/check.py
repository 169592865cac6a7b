"""A GGUF file in llama.cpp beside the model in torch: same tokens of a text, logits and greedy continuations.

torch computes in float32, with weights rounded as the file rounds them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from secateur.errors import ExportError
from secateur.export.llama_cpp import Array, Engine, version

PROMPTS = (
    "The capital of France is",
    "A pruning saw cuts",
    "def fibonacci(n):\n    ",
    "In the year 1492,",
    "Once upon a time there was a",
)
# Hard to tokenize alike: runs of spaces, digits, contractions, other scripts, combining marks, symbols, lines.
HARD = (
    "",
    " ",
    "   three  spaces\tand\ttabs \n\n\n lines\r\n",
    "I'll won't THEY'RE it's o'clock",
    "1234567 3.14159 0x1F 2026-11-26",
    "naïve café Ünïcödé ﬁ ½ ²",
    "Привет мир 你好世界 こんにちは مرحبا हिन्दी 한국어",
    "emoji 👩‍👩‍👧 and signs €∑→…",
    "x = {'a': [1, 2], \"b\": None}  # comment\n\tif x:\n\t\treturn -x**2",
    "CamelCase snake_case kebab-case user@example.org https://example.org/a?b=c#d",
)
NEW_TOKENS = 16
ELEMENTWISE = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# llama.cpp rounds what it multiplies with a matrix to the matrix's own type: logits may differ from torch's by a few
# times what rounding the weights makes. A wrong file (heads rotated wrongly, a norm left out) differs by about 1.
SLACK, TIMES = 0.01, 4.0


@dataclass(frozen=True)
class Checked:
    """What llama.cpp computes beside what torch computes."""

    version: str  # of llama.cpp
    texts: int  # that were tokenized
    other_tokens: tuple[str, ...]  # texts whose tokens differ from the tokenizer's
    prompts: int
    difference: float  # of logits: root mean square, relative to their standard deviation
    rounding: float  # the same between torch with the weights as they are and as the file rounds them
    largest: float  # difference of a logit
    new_tokens: int  # of the greedy continuations
    same_tokens: int  # new tokens before the two continuations diverge
    ties: int  # continuations that diverge where torch's two best logits are nearer than the largest difference


def check_file(
    file: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    type_name: str,
    exact: Collection[str] = (),
) -> Checked:
    """Run a file in llama.cpp and compare it with the model that it was made from.

    llama.cpp continues a few prompts greedily, and torch computes the logits at every position; `exact` are the weights
    that the file holds in float32, whatever its type. Raises `ExportError` where the logits differ by more than
    rounding explains, or the tokens of a prompt do.
    """
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    with closing(Engine(file, context=max(64, max(len(ids) for ids in prompts) + NEW_TOKENS))) as engine:
        others = tuple(text for text in (*PROMPTS, *HARD) if engine.tokens(text) != tokenizer(text).input_ids)
        continued = [engine.greedy(ids, NEW_TOKENS) for ids in prompts]
    if wrong := [text for text in others if text in PROMPTS]:
        raise ExportError(
            f"llama.cpp splits {wrong[0]!r} into other tokens than the tokenizer does; another pre-tokenizer may be "
            "right: --pre NAME (pre=NAME)"
        )
    texts = [[*ids, *new[:-1]] for ids, (new, _) in zip(prompts, continued, strict=True)]
    with _in_float32(model, type_name, exact):
        rounded = _logits(model, texts)
    with _in_float32(model, None):
        plain = rounded if type_name == "f32" else _logits(model, texts)
    spread = math.sqrt(np.mean([each.var() for each in rounded])) or 1.0
    width = rounded[0].shape[1]
    errors = [logits[:, :width] - reference for (_, logits), reference in zip(continued, rounded, strict=True)]
    difference = _rms(errors) / spread
    rounding = _rms([a - b for a, b in zip(rounded, plain, strict=True)]) / spread
    if not difference <= min(SLACK + TIMES * rounding, 1.0):
        raise ExportError(
            f"llama.cpp computes something else from the file than torch does from the model: logits differ by "
            f"{difference:.3g} of their spread, and rounding weights to {type_name} alone makes {rounding:.3g}. "
            "Nothing was written; try --gguf f32, and report it with config.json if that differs, too"
        )
    agreed = [
        _agreement(reference[len(ids) - 1 :], error[len(ids) - 1 :], new)
        for ids, (new, _), reference, error in zip(prompts, continued, rounded, errors, strict=True)
    ]
    return Checked(
        version=version(),
        texts=len(PROMPTS + HARD),
        other_tokens=others,
        prompts=len(prompts),
        difference=difference,
        rounding=rounding,
        largest=max(float(np.abs(error).max()) for error in errors),
        new_tokens=sum(len(new) for new, _ in continued),
        same_tokens=sum(same for same, _ in agreed),
        ties=sum(tie for _, tie in agreed),
    )


def _rms(arrays: Sequence[Array]) -> float:
    return math.sqrt(sum(float(np.square(each).sum()) for each in arrays) / sum(each.size for each in arrays))


def _agreement(reference: Array, errors: Array, new: Sequence[int]) -> tuple[int, bool]:
    """How many tokens torch would have chosen as well, and whether a tie of torch's two best logits ended that."""
    for at, token in enumerate(new):
        if int(np.argmax(reference[at])) != token:
            best = np.sort(reference[at])[-2:]
            return at, float(best[1] - best[0]) <= 2 * float(np.abs(errors[at]).max())
    return len(new), False


@torch.no_grad()
def _logits(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> list[Array]:
    """Logits at every position of every text, in one pass: padding after a text does not change it."""
    inner: Any = model
    longest = max(len(text) for text in texts)
    ids_BT = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=model.device)
    logits_BTX: Tensor = inner(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False).logits
    return [logits_TX[: len(text)].double().cpu().numpy() for text, logits_TX in zip(texts, logits_BTX, strict=True)]


@contextmanager
def _in_float32(model: nn.Module, type_name: str | None, exact: Collection[str] = ()) -> Iterator[None]:
    """Let every module compute in float32, with its matrices, but for the exact ones, rounded as a file's type does.

    The float32 weights of one module at a time are in memory.
    """
    originals: dict[nn.Module, dict[str, nn.Parameter | None]] = {}
    exact_here = {model.get_submodule(name.rpartition(".")[0]): name.rpartition(".")[2] for name in exact}

    def enter(module: nn.Module, args: Any) -> None:
        originals[module] = dict(module._parameters)
        for name, weight in originals[module].items():
            if weight is not None:
                values = weight.detach().float()
                if type_name is not None and weight.dim() > 1 and exact_here.get(module) != name:
                    is_transposed = isinstance(module, Conv1D)
                    values = _rounded(values.T, type_name).T if is_transposed else _rounded(values, type_name)
                module._parameters[name] = nn.Parameter(values, requires_grad=False)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(originals.pop(module))

    holders = [module for module in model.modules() if module._parameters]
    handles = [module.register_forward_pre_hook(enter) for module in holders]
    handles += [module.register_forward_hook(leave, always_call=True) for module in holders]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, weights in originals.items():
            module._parameters.update(weights)


def _rounded(values: Tensor, type_name: str) -> Tensor:
    """A matrix as a file holds it, rows padded with zeros to whole blocks."""
    if type_name in ELEMENTWISE:
        return values.to(ELEMENTWISE[type_name]).float()
    kind = gguf.GGMLQuantizationType[type_name.upper()]
    columns = values.shape[-1]
    padded = functional.pad(values, (0, -columns % gguf.GGML_QUANT_SIZES[kind][0])).cpu().contiguous().numpy()
    back = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(padded, kind), kind))
    return back[..., :columns].to(values.device)
