"""Files of weights on the Hugging Face hub: `hf://OWNER/NAME[@REVISION][/FILE]`.

The package `huggingface_hub` downloads and caches them: what it has is not asked for
again where there is no network, or where HF_HUB_OFFLINE=1 says so.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
from pathlib import Path

from abe_jax.errors import UserError, first_line

PREFIX = "hf://"
# What timm's repositories hold.
_FILE = "model.safetensors"
_DESCRIPTION = "config.json"

_log = logging.getLogger(__name__)

# What went wrong, by the package's exceptions; the more special ones first.
_REASONS = {
    "GatedRepoError": "its owner asks for consent: accept the terms on the hub's page, "
    "and log in with `hf auth login`",
    "RepositoryNotFoundError": "there is no such repository, or it is private",
    "RevisionNotFoundError": "the repository has no such revision",
    "LocalEntryNotFoundError": "the hub cannot be reached, and the file is not in the "
    "cache; download it elsewhere and give its path",
    "EntryNotFoundError": "the repository has no file {file}; give another one, as "
    "hf://OWNER/NAME/FILE",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, and the file is not in the cache",
}


@dataclasses.dataclass(frozen=True)
class Description:
    """What a repository says of its network; None where it does not say.

    Attributes:
      architecture: timm's name of the network.
      mean: subtracted from its input, one per channel, for images from 0 to 1.
      std: what the difference is divided by.
    """

    architecture: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None


def fetch(url: str) -> Path:
    """Downloads a file, or finds it in the cache.

    Args:
      url: such as `hf://timm/resnet50.tv_in1k`; FILE is `model.safetensors` and
        REVISION the newest by default.

    Returns:
      where it is. Where the cache keeps the hub's SHA-256, the content has it.

    Raises:
      UserError: there is no such file, it is neither in the cache nor in reach, its
        content is damaged, or `huggingface_hub` is not installed.
    """
    path = _download(url)
    _require_intact(url, path)
    return path


def description(url: str) -> Description:
    """What the repository of a file says of its network, as timm's do.

    Args:
      url: see `fetch`.

    Returns:
      the description, empty where the repository has none or it cannot be had.
    """
    try:
        content = json.loads(_download(url, _DESCRIPTION).read_bytes())
        of_input = content.get("pretrained_cfg", {})
        return Description(
            content.get("architecture"), of_input.get("mean"), of_input.get("std")
        )
    except (UserError, OSError, ValueError, AttributeError) as error:
        _log.warning("what network it is was not checked: %s", first_line(error))
        return Description()


def _download(url: str, file: str | None = None) -> Path:
    match = re.fullmatch(
        rf"{PREFIX}(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@]+))?(/(?P<file>.+))?",
        url,
    )
    if not match:
        raise UserError(f"{url} is not of the form hf://OWNER/NAME[@REVISION][/FILE].")
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise UserError(
            f"{url} needs huggingface_hub: pip install -e '.[hub]'"
        ) from error
    wanted: str = file or match["file"] or _FILE
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                match["repo"], wanted, revision=match["revision"]
            )
        )
    # It raises its own errors, those of its HTTP client and of the file system.
    except Exception as error:
        for name, reason in _REASONS.items():
            if isinstance(error, getattr(errors, name)):
                raise UserError(f"{url}: {reason.format(file=wanted)}.") from error
        raise UserError(
            f"{url}: {type(error).__name__}: {first_line(error)}"
        ) from error


def _require_intact(url: str, path: Path) -> None:
    # A large file is a link to a blob whose name is the SHA-256 that the hub gave.
    wanted = Path(os.readlink(path)).name if path.is_symlink() else ""
    if not re.fullmatch(r"[0-9a-f]{64}", wanted):
        return
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wanted:
        raise UserError(
            f"{url}: the file in the cache is damaged: its SHA-256 is {found[:12]}..., "
            f"not {wanted[:12]}...; delete {path.resolve()} and start again."
        )
