"""A model and its tokenizer -> one GGUF file, whole or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import ExportError
from secateur.export.architectures import Architecture, ModelType, architecture, type_of
from secateur.export.check import Checked, check_file, runs_here
from secateur.export.metadata import Positions, metadata, positions, rotated_numbers
from secateur.export.tensors import (
    EMBEDDING,
    Fetch,
    Parts,
    Recipe,
    Recipes,
    hard_misfits,
    misfits,
    put_together,
    resize,
    shape_of,
    take_apart,
    weights_of,
)
from secateur.export.vocabulary import Vocabulary, vocabulary
from secateur.files import atomic_file, check_file_vacant
from secateur.progress import Progress

# Name -> how numbers are stored, and what the file says of itself. All that the gguf package can quantise, but for
# those that suit only models trained for them.
TYPES: Mapping[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (GGMLQuantizationType.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (GGMLQuantizationType.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
DEFAULT_TYPE = "f16"
SUFFIX = ".gguf"
ROUTER = ".ffn_gate_inp."  # chooses experts, so it stays exact
LARGEST = {"f16": float(np.finfo(np.float16).max)}


@dataclass(frozen=True)
class Exported:
    """What was written."""

    out: Path
    architecture: str
    dtype: str
    bytes: int
    parameters: int  # in the file, zeros that were added counted
    added: int  # of them, zeros that fill layers up
    plain: tuple[str, ...]  # matrices that stay in 16 bits because their rows do not divide into blocks
    pre: str  # how llama.cpp splits words
    notes: tuple[str, ...]
    checked: Checked | None  # None where llama.cpp was not asked

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self) | {"out": str(self.out)}


def export_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    *,
    dtype: str = DEFAULT_TYPE,
    pad: bool = False,
    pre: str | None = None,
    check: bool | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a model, dense or pruned, as a GGUF file that llama.cpp runs.

    `dtype` is one of `TYPES`; norms, biases and other vectors are in float32 in any. Layers of different sizes go into
    an architecture that knows them; where there is none, `pad` fills all layers up to the widest with zeros, which
    changes nothing but saves nothing either. `pre` names llama.cpp's way to split words where it is not found by
    itself. `check` compares the file with torch in llama.cpp before it gets its name, and None does so where
    llama-cpp-python is installed. The file appears whole or not at all, and is written tensor by tensor. Raises
    `ExportError` for what a file cannot say or when llama.cpp computes something else, and `CheckpointError` when the
    file cannot be written.

    >>> import tempfile
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    >>> pairs = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    >>> pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    >>> config = AutoConfig.for_model("granite", hidden_size=32, num_attention_heads=4, num_hidden_layers=2,
    ...     intermediate_size=64, vocab_size=3, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    >>> model, tokenizer = AutoModelForCausalLM.from_config(config), PreTrainedTokenizerFast(tokenizer_object=pairs)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_gguf(model, tokenizer, Path(folder) / "tiny.gguf", check=False).parameters
    20832
    """
    out = Path(out)
    check_gguf(model.config, out, dtype=dtype, check=check, overwrite=overwrite)
    check = runs_here(needed=False) if check is None else check
    model_type = type_of(model.config)
    parts, wanted, where, added = _fit(model, model_type, pad=pad)
    said = metadata(model.config, model_type, parts, where)
    words = vocabulary(tokenizer, shape_of(parts.whole[EMBEDDING], parts.fetch)[0], pre=pre, stops=_stops(model))
    tensors = put_together(parts, wanted, model_type)
    if where.factors is not None:
        tensors["rope_freqs.weight"] = _constant(where.factors)
    shapes = {name: shape_of(recipe, parts.fetch) for name, recipe in tensors.items()}
    kinds = {name: _kind(name, shape, dtype) for name, shape in shapes.items()}
    plain = tuple(name for name, kind in kinds.items() if dtype not in ("f32", "f16", "bf16") and kind == "f16")
    if EMBEDDING in plain:
        raise ExportError(
            f"{dtype} wants rows of multiples of {_block(dtype)} numbers, and the hidden width is {parts.hidden}, so "
            "nearly all of the model would stay in f16; write --gguf f16 (dtype='f16')"
        )
    with atomic_file(out, overwrite=overwrite) as file:
        writer = GGUFWriter(file, wanted.name)
        try:
            _say(writer, said, words, dtype=dtype, name=_name_of(model, out))
            _write(writer, tensors, shapes, kinds, parts.fetch, progress)
        finally:
            writer.close()
        exact = {
            name for tensor, kind in kinds.items() if kind == "f32" for name in weights_of(tensors[tensor], parts.fetch)
        }
        checked = check_file(file, model, tokenizer, dtype=dtype, exact=exact) if check else None
        size = file.stat().st_size
    notes = (*where.notes, *words.notes, *_told(parts, added, plain, dtype))
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    return Exported(out, wanted.name, dtype, size, total, added, plain, words.pre, notes, checked)


def check_gguf(
    config: PreTrainedConfig, out: Path, *, dtype: str, check: bool | None = None, overwrite: bool = False
) -> None:
    """Raise what `export_gguf` would, for all that shows without the weights.

    >>> from transformers import AutoConfig
    >>> check_gguf(AutoConfig.for_model("granite"), Path("out.gguf"), dtype="q4_k_m")
    Traceback (most recent call last):
    secateur.errors.ExportError: --gguf q4_k_m: no such type. Expected f32, f16, bf16, q8_0, ...
    """
    _check_type(dtype)
    if out.suffix != SUFFIX:
        raise ExportError(f"{out} is not named as a GGUF file is; name it {out}{SUFFIX}")
    check_file_vacant(out, overwrite=overwrite)
    if check:
        runs_here(needed=True)
    type_of(config)


def _check_type(dtype: str) -> None:
    if dtype not in TYPES:
        *others, last = TYPES
        raise ExportError(
            f"--gguf {dtype}: no such type. Expected {', '.join(others)} or {last}; for another write f16 and convert "
            "it with llama.cpp's own tool: llama-quantize OUT.gguf SMALLER.gguf TYPE"
        )


# --- the architecture -------------------------------------------------------------------------------------------


def _fit(model: PreTrainedModel, model_type: ModelType, *, pad: bool) -> tuple[Parts, Architecture, Positions, int]:
    """The parts of the model, in sizes that an architecture can hold; how many zeros that took."""
    parts = take_apart(model, model_type)
    candidates = [architecture(name) for name in model_type.architectures]
    rotated = rotated_numbers(model)
    in_part = 0 < rotated < parts.head_dim
    reasons: dict[str, list[str]] = {}
    chosen: Architecture | None = None
    where: Positions | None = None
    unsaid: ExportError | None = None
    for candidate in candidates:
        if why := misfits(parts, candidate, in_part=in_part):
            reasons[candidate.name] = why
            continue
        try:
            where = positions(model, model.config, candidate, parts)
        except ExportError as error:
            unsaid = unsaid or error
            continue
        chosen = candidate
        break
    if chosen is None and unsaid is not None:
        raise unsaid
    paddable = [each for each in candidates if not hard_misfits(parts, each, in_part=in_part)]
    if chosen is None and pad and paddable:
        chosen = paddable[0]
    if chosen is None:
        raise _unfit(reasons, paddable=bool(paddable) and not parts.sizes[0].experts)
    if where is None:
        where = positions(model, model.config, chosen, parts)
    resized = resize(parts, chosen)
    return resized, chosen, where, _added(parts, resized)


def _unfit(reasons: Mapping[str, list[str]], *, paddable: bool) -> ExportError:
    told = "; ".join(f"{name}: {', and '.join(why)}" for name, why in reasons.items())
    remedy = "Cut all layers alike (secateur prune --shape uniform), and the MLP alone if heads do not fit (--axes mlp)"
    if paddable:
        remedy += (
            ", or fill up with zeros, which makes the file as large as that of the widest layers: --pad (pad=True)"
        )
    return ExportError(f"no architecture of llama.cpp holds this model. {told}. {remedy}")


def _added(before: Parts, after: Parts) -> int:
    """The zeros by which parts have grown."""

    def size(layer: Recipes, name: str) -> int:
        return int(np.prod(shape_of(layer[name], before.fetch))) if name in layer else 0

    return sum(
        size(new, name) - size(old, name)
        for old, new in zip(before.layers, after.layers, strict=True)
        for name in new
        if old.get(name) is not new[name]
    )


def _block(dtype: str) -> int:
    return gguf.GGML_QUANT_SIZES[TYPES[dtype][0]][0]


def _kind(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """As what a tensor is stored: vectors and routers in float32, rows that do not divide into blocks in float16."""
    if len(shape) < 2 or ROUTER in name:
        return "f32"
    return dtype if shape[-1] % _block(dtype) == 0 else "f16"


def _constant(values: Tensor) -> Recipe:
    return lambda fetch: values


def _stops(model: PreTrainedModel) -> tuple[int, ...]:
    config: Any = model.generation_config if getattr(model, "generation_config", None) is not None else model.config
    stops = config.eos_token_id
    return tuple(stops) if isinstance(stops, (list, tuple)) else () if stops is None else (stops,)


def _name_of(model: PreTrainedModel, out: Path) -> str:
    return Path(model.config.name_or_path or out.stem).name


def _told(parts: Parts, added: int, plain: tuple[str, ...], dtype: str) -> list[str]:
    notes = []
    if added:
        notes.append(f"{added:,} zeros fill layers up to sizes that llama.cpp wants")
    if plain:
        notes.append(
            f"{len(plain)} matrices stay in f16, since their rows are no multiples of {_block(dtype)}: {plain[0]}"
            + (" and others" if len(plain) > 1 else "")
            + f"; --round-to {_block(dtype)} makes rows that are"
        )
    return notes


# --- writing ----------------------------------------------------------------------------------------------------


def _say(writer: GGUFWriter, said: Mapping[str, Any], words: Vocabulary, *, dtype: str, name: str) -> None:
    keys = gguf.Keys
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(TYPES[dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in said.items():
        _say_one(writer, f"{writer.arch}.{key}", value)
    writer.add_vocab_size(len(words.tokens))
    writer.add_tokenizer_model(words.kind)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(list(words.tokens))
    writer.add_token_types(list(words.types))
    if words.scores is not None:
        writer.add_token_scores(list(words.scores))
    if words.merges is not None:
        writer.add_token_merges(list(words.merges))
    for kind, index in words.special.items():
        writer.add_uint32(getattr(keys.Tokenizer, f"{kind.upper()}_ID"), index)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(words.add_eos)
    writer.add_add_space_prefix(words.add_space)
    if words.chat_template is not None:
        writer.add_chat_template(words.chat_template)


def _say_one(writer: GGUFWriter, key: str, value: Any) -> None:
    """Whole numbers as unsigned, as llama.cpp expects them."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case [bool(), *_]:
            writer.add_key_value(key, value, GGUFValueType.ARRAY, GGUFValueType.BOOL)
        case _:
            writer.add_key_value(key, value, GGUFValueType.ARRAY, GGUFValueType.UINT32)


def _write(
    writer: GGUFWriter,
    tensors: Mapping[str, Recipe],
    shapes: Mapping[str, tuple[int, ...]],
    kinds: Mapping[str, str],
    fetch: Fetch,
    progress: Progress | None,
) -> None:
    for name, shape in shapes.items():
        kind = TYPES[kinds[name]][0]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), int(np.prod(shape)) // block * size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, (name, recipe) in enumerate(tensors.items(), 1):
        writer.write_tensor_data(_stored(name, recipe(lambda weight: fetch(weight).cpu()), kinds[name]))
        if progress is not None:
            progress(done, len(tensors))


def _stored(name: str, values: Tensor, kind: str) -> np.ndarray[Any, Any]:
    """The bytes of a tensor. Raises `ExportError` where it holds numbers that the type cannot."""
    numbers = values.to(torch.float32).contiguous().numpy()
    largest = float(np.abs(numbers).max(initial=0.0))
    if not np.isfinite(largest):
        raise ExportError(f"{name} holds NaN or Inf; nothing can be computed with such a model")
    if largest > LARGEST.get(kind, np.inf):
        raise ExportError(f"{name} holds {largest:.3g}, more than f16 can; write --gguf bf16 (dtype='bf16')")
    return gguf.quants.quantize(numbers, TYPES[kind][0])
