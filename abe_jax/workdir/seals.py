"""A list of a checkpoint's files, by which damage is found before anything is read.

Orbax restores an array with a flipped bit without a word, and after an emptied file it
fails in as many ways as it has kinds of files.
"""

import hashlib
import json
import os
import pathlib

from abe_jax.workdir import sync_folder, write_whole

SEAL_FILE = "files.json"


def seal(folder: pathlib.Path) -> None:
    """Lists sizes and hashes of all files in a checkpoint's items.

    When this returns, they survive a power failure. Files beside the items are Orbax's
    own notes, which it still writes to, and does without.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        elif path.parent != folder:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                size = os.fstat(file.fileno()).st_size
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.relative_to(folder).as_posix()] = [size, digest]
    write_whole(folder / SEAL_FILE, json.dumps(files, indent=1) + "\n")


def is_sealed(folder: pathlib.Path) -> bool:
    """Whether the folder has a list; checkpoints of earlier versions have none."""
    return (folder / SEAL_FILE).exists()


def damage(folder: pathlib.Path) -> str | None:
    """What differs from a sealed folder's list, in a few words; None if nothing."""
    try:
        files = json.loads((folder / SEAL_FILE).read_text())
        for name, (size, digest) in files.items():
            with (folder / name).open("rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != size:
                    return f"{name} has {found} bytes instead of {size}"
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name} has other content than was written"
    except FileNotFoundError as error:
        return f"{pathlib.Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{SEAL_FILE} or a file in it cannot be read ({error})"
    return None
