"""MODEL -> its tokenizer, and the files that tokenizer and processors are read from."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils.hub import cached_file

from secateur.errors import ModelError, check_version
from secateur.models.options import DEMO
from secateur.models.silence import quiet
from secateur.models.sources import check_unchanged, hub_options, loader_arguments, resolve
from secateur.models.trust import model_errors
from secateur.models.weight_files import PROCESSOR_FILES, TEMPLATES, TOKENIZER_FILES, is_tokenizer_file

logger = logging.getLogger(__name__)

LEAST_FOR_GGUF = (5, 18)  # transformers before it misreads the special tokens of GGUF files


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of MODEL, with its chat template. Raises `ModelError` when there is none.

    >>> from tokenizers import Tokenizer, models
    >>> from transformers import AutoConfig, PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"?": 0, "prune": 1}, unk_token="?"))
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     AutoConfig.for_model("opt").save_pretrained(folder)
    ...     _ = PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    ...     load_tokenizer(folder)("prune").input_ids
    [1]
    """
    source = resolve(model)
    if source.kind == "config":
        raise ModelError(f"{model!r}: a config file has no tokenizer. Name the folder that has one, or {DEMO!r}.")
    if source.kind == "gguf":
        check_version(ModelError, "transformers", LEAST_FOR_GGUF, what=f"{model!r}: the tokenizer of a GGUF file")
    location, options = loader_arguments(source)
    check_unchanged(source, lambda name: name == "config.json" or is_tokenizer_file(name))  # the config names a class
    with model_errors(source, "no tokenizer can be loaded", trust_remote_code=trust_remote_code):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            location, trust_remote_code=trust_remote_code, **options
        )
    if tokenizer.vocab_size == 0:  # what transformers makes of a folder without any tokenizer file
        raise ModelError(
            f"{model!r}: no tokenizer can be loaded; there is no vocabulary. Expected tokenizer.json or the vocabulary "
            "files of the model's family; copy them from the model that this one was made from."
        )
    return tokenizer


def load_processor(model: str, *, trust_remote_code: bool = False) -> ProcessorMixin | None:
    """What prepares images with their text for MODEL; None for a model that takes text alone."""
    source = resolve(model)
    if source.kind in ("config", "gguf"):
        return None
    location, options = loader_arguments(source)
    with quiet(), model_errors(source, "no processor can be loaded", trust_remote_code=trust_remote_code):
        found = AutoProcessor.from_pretrained(location, trust_remote_code=trust_remote_code, **options)
    return found if isinstance(found, ProcessorMixin) else None  # of a model of text, its tokenizer


def text_files(
    model: str, tokenizer: PreTrainedTokenizerBase | None = None, *, tokenizer_too: bool = True
) -> dict[str, Path]:
    """The files of MODEL that its tokenizer, chat template and processors are read from, by name; a GGUF has none.

    With its tokenizer, those that its class names, too. Without `tokenizer_too`, only those of templates and
    processors, for a tokenizer that is another.
    """
    source = resolve(model)
    named = {name for name in getattr(tokenizer, "vocab_files_names", {}).values() if isinstance(name, str)}
    names = sorted(TOKENIZER_FILES | named) if tokenizer_too else sorted(PROCESSOR_FILES)
    if source.kind == "hub":
        return {name: Path(path) for name in names if (path := hub_file(model, name)) is not None}
    folder = source.folder
    if folder is None:
        return {}
    names += [f"{TEMPLATES}{path.name}" for path in folder.glob(f"{TEMPLATES}*")]
    return {name: folder / name for name in names if _is_in(folder, name)}


def _is_in(folder: Path, name: str) -> bool:
    """Whether a file lies in a folder, or is a link to where the cache of the hub keeps what is in its folders.

    A copy of what any other link leads to may be published with a model, and be a secret.
    """
    path = folder / name
    homes = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        homes.append(folder.resolve().parent.parent / "blobs")
    inside = any(path.resolve().is_relative_to(home) for home in homes)
    if path.is_file() and not inside:
        logger.warning("%s is a link out of its folder, and is not carried over: put a copy in its place", path)
    return path.is_file() and inside


def hub_file(model: str, name: str) -> str | None:
    """The path of a file of a model of the hub, in the hub's cache; None where it has none."""
    failures = ("missing_entries", "connection_errors", "gated_repo")
    silent = {f"_raise_exceptions_for_{failure}": False for failure in failures}
    with quiet():
        return cached_file(model, name, **silent, **hub_options())
