"""Errors of the hub's client -> what the reader can do about them."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

AWAY = (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)
LOGIN = "`hf auth login` (or HF_TOKEN) gives this machine a token"


def hub_problem(error: BaseException, name: str) -> str | None:
    """What is wrong with `name` on the hub and what to do, by what the error was raised from; None for other errors.

    >>> hub_problem(OSError(errno.ENOSPC, "No space left on device"), "owner/model").split(". ")[0]
    'the disk of the cache is full'
    >>> hub_problem(ValueError("no such layer"), "owner/model")
    """
    chain = list(_chain(error))
    if any(isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT) for each in chain):
        return f"the disk of the cache is full. Free some of {constants.HF_HUB_CACHE}, or set HF_HOME to another disk"
    if any(isinstance(each, GatedRepoError) for each in chain):
        return f"it is gated. Ask for access at {constants.ENDPOINT}/{name}; then {LOGIN} that may read it"
    status = next((each.response.status_code for each in chain if isinstance(each, HfHubHTTPError)), None)
    if status in (401, 403):
        return f"the hub has no such name, or it is private. Check the spelling; for a private one, {LOGIN}"
    if any(isinstance(each, AWAY) for each in chain):
        away = f"{constants.ENDPOINT} cannot be reached. Check the network"
        why = "HF_HUB_OFFLINE is set. Unset it" if constants.HF_HUB_OFFLINE else away
        return f"it is not in the cache, and {why}, or name a local file or folder"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those it was raised from, first to last."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__
