"""MODEL -> what its model card says that the card of a model made from it says, too: name, licence, languages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from secateur.errors import ModelError
from secateur.models.gguf import metadata
from secateur.models.manifest import CARD_FILE
from secateur.models.options import DEMO
from secateur.models.sources import resolve
from secateur.models.tokenizer import hub_file

TAG = "secateur"  # of the cards that we write
CARRIED = ("license", "license_name", "license_link", "language")
DEMO_CARD = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0", "language": ["en"]}


def origin(model: str) -> dict[str, Any]:
    """What a card says of MODEL as the one that another was made from: `base_model` and the fields in `CARRIED`.

    `base_model` is a name on the hub: that of MODEL, or what the card of a folder of ours says. Licence and languages
    are those of MODEL's card, or of a GGUF's metadata. What is not said there is left out.

    >>> origin("demo")["license"], origin("no/such/folder")
    ('apache-2.0', {})
    """
    if model == DEMO:
        return dict(DEMO_CARD)
    try:
        source = resolve(model)
    except ModelError:
        return {}
    if source.path is not None and source.kind == "gguf":
        return _of_gguf(source.path)
    folder = source.path if source.kind != "config" else None
    path = hub_file(model, CARD_FILE) if source.kind == "hub" else folder and folder / CARD_FILE
    fields = card_fields(Path(path)) if path is not None else {}
    said = {name: fields[name] for name in CARRIED if name in fields}
    if source.kind == "hub":
        return {"base_model": model, **said}
    ours = isinstance(fields.get("tags"), list) and TAG in fields["tags"]
    return {"base_model": fields["base_model"], **said} if ours and "base_model" in fields else said


def card_fields(card: Path) -> dict[str, Any]:
    """The fields in the header of a model card; none where there is no such file, or no header that can be read.

    >>> card_fields(Path("no-such-card.md"))
    {}
    """
    try:
        fields = metadata_load(card)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _of_gguf(path: Path) -> dict[str, Any]:
    found = metadata(path, ("general.license", "general.license.name", "general.license.link", "general.languages"))
    return {name: found[key] for name, key in zip(CARRIED, found, strict=False) if found[key]}
