"""The files in a model's folder: which of them a loader reads, and whether those of the weights are all there.

Weights are read from safetensors or GGUF, never from a pickle.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError, ModelError, one_line
from secateur.files import read_json
from secateur.models.manifest import WEIGHTS, tensors_in
from secateur.models.sources import Source, resolve

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
PICKLES = ("pytorch_model*.bin", "pytorch_model*.bin.index.json")
# What tokenizers and processors are made of, whichever class reads it; a tokenizer's class may name more.
PROCESSOR_FILES = frozenset(
    "chat_template.jinja chat_template.json processor_config.json preprocessor_config.json "
    "video_preprocessor_config.json audio_tokenizer_config.json".split()
)
TOKENIZER_FILES = PROCESSOR_FILES | frozenset(
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.model vocab.json "
    "vocab.txt merges.txt spiece.model sentencepiece.bpe.model".split()
)
TEMPLATES = "additional_chat_templates/"  # a folder of them


def is_read(name: str) -> bool:
    """Whether a loader reads, or may run, a file of that name in the folder of a model.

    >>> is_read("model.safetensors"), is_read("README.md")
    (True, False)
    """
    other = name == ADAPTER_FILE or any(fnmatch(name, pattern) for pattern in (*PICKLES, "*.py", "adapter_model.*"))
    return other or is_tokenizer_file(name) or is_model_file(name)


def is_tokenizer_file(name: str) -> bool:
    """Whether a tokenizer or processor may be read from a file of that name, of those that we write."""
    return name in TOKENIZER_FILES or name.startswith(TEMPLATES)


def is_model_file(name: str) -> bool:
    """Whether a model is read from a file of that name."""
    return name in ("config.json", "generation_config.json", INDEX_FILE) or name.endswith(WEIGHTS)


def has_weights(model: str) -> bool:
    """Tell whether MODEL has weights of any kind; a hub name is taken to have some."""
    source = resolve(model)
    if source.folder is not None:
        return any(any(source.folder.glob(pattern)) for pattern in ("*.safetensors", INDEX_FILE, "*.gguf", *PICKLES))
    return source.kind != "config"


def weight_file_bytes(model: str) -> int | None:
    """Bytes of the files that hold MODEL's weights; None for a hub name, and where there are none."""
    source = resolve(model)
    if source.kind == "gguf" and source.path is not None:
        return source.path.stat().st_size
    files = source.folder.glob("*.safetensors") if source.folder is not None else ()
    return sum(path.stat().st_size for path in files) or None


def check_weight_files(source: Source) -> None:
    """Raise `ModelError` unless a folder's safetensors files are all there and have whole headers."""
    folder = source.folder
    if folder is None:
        return
    if (folder / ADAPTER_FILE).exists():
        raise ModelError(
            f"{source.argument!r}: {ADAPTER_FILE} lies beside the config, and loaders would read an adapter, too, or "
            "the model that it names. Merge the adapter into the model (peft: merge_and_unload), or move the file away"
        )
    file_of: dict[str, str] = {}
    files = _weight_files(source, folder)
    for name in files:
        if not (folder / name).is_file():
            raise ModelError(
                f"{source.argument!r}: the shard {name} is missing, one of the {len(files)} that {INDEX_FILE} lists. "
                "Copy it into the folder."
            )
        try:
            tensors = tensors_in(folder / name)
        except CheckpointError as error:
            raise ModelError(f"{source.argument!r}: {error}") from error
        for tensor in tensors:
            if tensor in file_of:
                raise ModelError(
                    f"{source.argument!r}: {tensor} lies in {file_of[tensor]} and in {name}; expected one of it. Copy "
                    "the folder again"
                )
            file_of[tensor] = name


def _weight_files(source: Source, folder: Path) -> list[str]:
    """The safetensors files that a loader would read."""
    try:
        config = read_json(folder / "config.json")
    except CheckpointError:
        config = None  # what is wrong with it is said when the config is read
    named = config.get("transformers_weights") if isinstance(config, dict) else None
    if named is not None:
        _check_plain(source, "config.json, transformers_weights", named, (WEIGHTS, f"{WEIGHTS}.index.json"))
    weights = named or WEIGHTS_FILE
    if (folder / weights).is_file() and weights.endswith(WEIGHTS):
        return [weights]
    if (folder / (named or INDEX_FILE)).is_file():
        return _shards(source, folder / (named or INDEX_FILE))
    if any(folder.glob(f"*{WEIGHTS}")):
        return []  # a name of its own, which nothing gives: the loader will say so
    raise ModelError(f"{source.argument!r}: {_why_no_weights(folder)}")


def _shards(source: Source, index: Path) -> list[str]:
    expected = 'Expected JSON with a "weight_map" from each tensor to its file; copy it again.'
    try:
        weight_map = read_json(index)["weight_map"]
        shards = set(weight_map.values())
    except CheckpointError as error:
        raise ModelError(f"{source.argument!r}: {error}. {expected}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{source.argument!r}: {index.name} cannot be read; {one_line(error)}. {expected}") from error
    for name in weight_map.values():
        _check_plain(source, index.name, name, (WEIGHTS,))
    return sorted(shards)


def _check_plain(source: Source, where: str, name: Any, suffixes: tuple[str, ...]) -> None:
    """Raise `ModelError` for a name that leads out of the folder, or to another kind of file.

    A link in the folder may lead anywhere: the hub's cache is made of such.
    """
    plain = isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)
    if not plain or not name.endswith(suffixes):
        raise ModelError(
            f"{source.argument!r}: {where} names {name!r:.80} as a file of weights; expected the name of a "
            f"{WEIGHTS} file that lies in the folder, not a path"
        )


def _why_no_weights(folder: Path) -> str:
    if any(any(folder.glob(pattern)) for pattern in PICKLES):
        return (
            "its weights are a pickle, pytorch_model.bin, which can run code when read; expected safetensors. If you "
            f"trust it, convert it: AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(OUT)"
        )
    if ggufs := sorted(folder.glob("*.gguf")):
        return f"the folder has no safetensors. Name the GGUF file itself: {str(ggufs[0])!r}."
    return (
        f"the folder has a config.json but no weights; expected {WEIGHTS_FILE} or {INDEX_FILE}. What needs only sizes "
        f"works: skeleton(load_config({str(folder)!r}))."
    )
