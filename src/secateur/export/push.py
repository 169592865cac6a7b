"""A folder that `save` wrote -> a model on the hub, after every file was compared with its hash."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from secateur import __version__
from secateur.checkpoint.verification import verify
from secateur.errors import CheckpointError, ExportError, one_line
from secateur.models.manifest import CARD_FILE, MANIFEST_FILE
from secateur.models.silence import quiet
from secateur.models.sources import hub_is_reachable

TOKEN = "`hf auth login` asks for one, HF_TOKEN names one; make it with write access at hf.co/settings/tokens"


@dataclass(frozen=True, slots=True)
class Pushed:
    """What was uploaded, and where it is."""

    folder: str
    name: str
    url: str
    files: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur push --json` writes it."""
        return asdict(self)


def push(folder: str | Path, name: str, *, private: bool = False, trust_remote_code: bool = False) -> Pushed:
    """Upload a folder as the model `name` (`owner/model`, or `model` under your own name), which is made if need be.

    The folder is verified first; exactly the files of its manifest and the model card are uploaded, in one commit. The
    token is the one that huggingface_hub finds. Raises `CheckpointError` for a folder that is not as it was written,
    and `ExportError` without token or network, and for a name that the token may not write to.

    >>> push("no-such-folder", "me/model")
    Traceback (most recent call last):
    secateur.errors.CheckpointError: no-such-folder is no folder; ...
    """
    found = verify(folder, trust_remote_code=trust_remote_code)
    if found.problems:
        raise CheckpointError(f"{folder}: {found.problems[0]}; only a folder that is as it was written is pushed")
    from huggingface_hub import HfApi, get_token

    if constants.HF_HUB_OFFLINE:
        raise ExportError(f"{name!r}: HF_HUB_OFFLINE is set, so nothing is uploaded. Unset it: env -u HF_HUB_OFFLINE")
    if get_token() is None:
        raise ExportError(f"{name!r}: there is no token of the hub on this machine. {TOKEN}")
    if not hub_is_reachable():
        raise ExportError(f"{name!r}: {constants.ENDPOINT} cannot be reached. Check the network, or HF_ENDPOINT")
    card = [CARD_FILE] if (Path(folder) / CARD_FILE).is_file() else []
    names = [MANIFEST_FILE, *card, *(file.name for file in found.files)]
    with _errors_of_hub(name), quiet():
        hub = HfApi(library_name="secateur", library_version=__version__)
        made = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=[glob.escape(file) for file in names],
            commit_message=f"Secateur {__version__}",
        )
    size = sum((Path(folder) / file).stat().st_size for file in names)
    return Pushed(str(folder), made.repo_id, str(made), len(names), size)


@contextmanager
def _errors_of_hub(name: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise ExportError(f"{name!r} is no name of a model. Expected owner/model: letters, digits, - _ .") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise ExportError(f"{name!r}: the hub does not know the token. {TOKEN}") from error
        if status in (403, 404):
            reason = "the token may not write there: the name is another's, or the token only reads"
            raise ExportError(f"{name!r}: {reason}. Name one of yours (`hf auth whoami`). {TOKEN}") from error
        raise ExportError(f"{name!r}: the hub refuses the upload; {one_line(error)}. Try again") from error
    except Exception as error:  # whatever the network or the client's storage makes of it
        raise ExportError(
            f"{name!r}: the upload has failed; {one_line(error)}. The same command uploads what is missing"
        ) from error
