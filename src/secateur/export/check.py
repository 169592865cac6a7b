"""A GGUF file in llama.cpp beside the model in torch: the same tokens of a text, logits and continuations.

torch computes in float32, with weights rounded as the file rounds them.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
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

Array = np.ndarray[Any, Any]

EXTRA = "gguf"
FLOAT32 = 0  # llama.cpp's number for it
PROMPTS = (
    "The capital of France is",
    "A pruning saw cuts",
    "def fibonacci(n):\n    ",
    "In the year 1492,",
    "Once upon a time there was a",
)
# What is hard to split alike: runs of spaces, digits, contractions, other scripts, combining marks, symbols, lines.
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

    version: str  # of the binding
    texts: int  # that were split into tokens
    other_tokens: tuple[str, ...]  # of them, those that came out otherwise
    prompts: int
    difference: float  # of logits: root mean square, as a share of their spread
    rounding: float  # the same between torch with the weights as they are and as the file rounds them
    largest: float  # difference of a logit
    new_tokens: int  # of the greedy continuations
    same_tokens: int  # of them, those before the two part
    ties: int  # continuations that part where torch's own best two logits are nearer than the largest difference


def runs_here(*, needed: bool) -> bool:
    """Whether llama-cpp-python is installed; raises `ExportError` when it is needed and is not."""
    found = importlib.util.find_spec("llama_cpp") is not None
    if needed and not found:
        raise ExportError(
            f"--check runs the file in llama.cpp, which is not installed: pip install 'secateur[{EXTRA}]'"
        )
    return found


@functools.cache
def _silent() -> Any:
    """A receiver of llama.cpp's messages that drops them; it must live as long as the library may call it."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


class Engine:
    """A GGUF file loaded into llama.cpp, on the CPU, with its memory of past tokens in float32."""

    def __init__(self, file: Path, *, context: int, threads: int | None = None) -> None:
        import llama_cpp
        from llama_cpp import Llama as Inner

        llama_cpp.llama_log_set(_silent(), None)
        count = threads or torch.get_num_threads()
        try:
            self.inner: Any = Inner(
                str(file),
                n_ctx=context,
                n_batch=context,
                n_threads=count,
                n_threads_batch=count,
                type_k=FLOAT32,
                type_v=FLOAT32,
                logits_all=True,
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            raise ExportError(f"llama.cpp does not load the file: {error}") from error

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, with those that the file says go around it."""
        found: list[int] = self.inner.tokenize(text.encode(), add_bos=True, special=True)
        return found

    def continued(self, ids: Sequence[int], count: int) -> tuple[list[int], Array]:
        """The greedy continuation by `count` tokens, and the logits that each position of all but the last gave."""
        self.inner.reset()
        self.inner.eval(list(ids))
        new: list[int] = []
        for _ in range(count):
            new.append(int(np.argmax(self.inner.scores[self.inner.n_tokens - 1])))
            if len(new) < count:
                self.inner.eval(new[-1:])
        return new, np.array(self.inner.scores[: self.inner.n_tokens], dtype=np.float64)

    def close(self) -> None:
        """Give the memory back."""
        self.inner.close()


def check_file(
    file: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str,
    exact: Collection[str] = (),
) -> Checked:
    """Run a file in llama.cpp and compare it with the model that it was made from.

    llama.cpp continues a few prompts greedily, and torch says what it would have said at every position; `exact` are
    the weights that the file holds in float32, whatever its type. Raises
    `ExportError` where the logits differ by more than rounding explains, or the tokens of a prompt do.
    """
    import llama_cpp

    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    engine = Engine(file, context=max(64, max(len(ids) for ids in prompts) + NEW_TOKENS))
    try:
        others = tuple(text for text in (*PROMPTS, *HARD) if engine.tokens(text) != tokenizer(text).input_ids)
        written = [engine.continued(ids, NEW_TOKENS) for ids in prompts]
    finally:
        engine.close()
    if wrong := [text for text in others if text in PROMPTS]:
        raise ExportError(
            f"llama.cpp splits {wrong[0]!r} into other tokens than the tokenizer does; another way to split words may "
            "be right: --pre NAME (pre=NAME)"
        )
    texts = [[*ids, *new[:-1]] for ids, (new, _) in zip(prompts, written, strict=True)]
    with _in_float32(model, dtype, exact):
        rounded = _logits(model, texts)
    with _in_float32(model, None):
        plain = rounded if dtype == "f32" else _logits(model, texts)
    spread = math.sqrt(np.mean([each.var() for each in rounded])) or 1.0
    width = rounded[0].shape[1]
    apart = [logits[:, :width] - torch_s for (_, logits), torch_s in zip(written, rounded, strict=True)]
    difference = _rms(apart) / spread
    rounding = _rms([a - b for a, b in zip(rounded, plain, strict=True)]) / spread
    if not difference <= min(SLACK + TIMES * rounding, 1.0):
        raise ExportError(
            f"llama.cpp computes something else from the file than torch does from the model: logits differ by "
            f"{difference:.3g} of their spread, and rounding weights to {dtype} alone makes {rounding:.3g}. Nothing "
            "was written; try --gguf f32, and report it with config.json if that differs, too"
        )
    same, ties = 0, 0
    for ids, (new, _), torch_s, off in zip(prompts, written, rounded, apart, strict=True):
        agreed, gap = _agreed(torch_s[len(ids) - 1 :], new)
        same += agreed
        ties += agreed < len(new) and gap <= 2 * float(np.abs(off[len(ids) - 1 + agreed]).max())
    total = sum(len(new) for new, _ in written)
    largest = max(float(np.abs(each).max()) for each in apart)
    return Checked(
        llama_cpp.__version__,
        len(PROMPTS + HARD),
        others,
        len(prompts),
        difference,
        rounding,
        largest,
        total,
        same,
        ties,
    )


def _rms(arrays: Sequence[Array]) -> float:
    return math.sqrt(sum(float(np.square(each).sum()) for each in arrays) / sum(each.size for each in arrays))


def _agreed(reference: Array, new: Sequence[int]) -> tuple[int, float]:
    """How many tokens torch would have written as well, and how near its two best were where it would not."""
    for at, token in enumerate(new):
        if int(np.argmax(reference[at])) != token:
            best = np.sort(reference[at])[-2:]
            return at, float(best[1] - best[0])
    return len(new), 0.0


@torch.no_grad()
def _logits(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> list[Array]:
    """Of every position of every text, in one pass: what stands after a text does not change it."""
    inner: Any = model
    longest = max(len(text) for text in texts)
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=model.device)
    found: Tensor = inner(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return [logits[: len(text)].double().cpu().numpy() for text, logits in zip(texts, found, strict=True)]


@contextmanager
def _in_float32(model: nn.Module, dtype: str | None, exact: Collection[str] = ()) -> Iterator[None]:
    """Let every module compute in float32, with its matrices, but for the exact ones, rounded as a type of file does.

    The weights of one module at a time are in memory so.
    """
    kept: dict[nn.Module, dict[str, nn.Parameter | None]] = {}
    exact_here = {model.get_submodule(name.rpartition(".")[0]): name.rpartition(".")[2] for name in exact}

    def enter(module: nn.Module, args: Any) -> None:
        kept[module] = dict(module._parameters)
        for name, weight in kept[module].items():
            if weight is not None:
                values = weight.detach().float()
                if dtype is not None and weight.dim() > 1 and exact_here.get(module) != name:
                    values = _rounded(values.T, dtype).T if isinstance(module, Conv1D) else _rounded(values, dtype)
                module._parameters[name] = nn.Parameter(values, requires_grad=False)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(kept.pop(module))

    handles = []
    for module in model.modules():
        if module._parameters:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, weights in kept.items():
            module._parameters.update(weights)


def _rounded(values: Tensor, dtype: str) -> Tensor:
    """As a file holds a matrix, rows filled up to whole blocks with zeros."""
    if dtype in ELEMENTWISE:
        return values.to(ELEMENTWISE[dtype]).float()
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    columns = values.shape[-1]
    whole = functional.pad(values, (0, -columns % gguf.GGML_QUANT_SIZES[kind][0])).cpu().contiguous().numpy()
    back = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(whole, kind), kind))
    return back[..., :columns].to(values.device)
