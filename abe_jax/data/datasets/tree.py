"""The files of a data set: listed once, in a folder or a zip file; none is opened."""

import errno
import logging
import os
import pathlib
import unicodedata
import zipfile
from collections.abc import Callable, Iterable

from abe_jax.data.decoding import SUFFIXES
from abe_jax.errors import UserError

_log = logging.getLogger(__name__)

# What network drives, trash cans and file systems keep among the user's files.
SYSTEM_FOLDERS = frozenset(
    {
        *("__MACOSX", "@eaDir", "@tmp", "@__thumb", "@Recycle", "#recycle"),
        *("@Recently-Snapshot", "#snapshot", "$RECYCLE.BIN", "lost+found"),
        "System Volume Information",
    }
)
# A folder that holds both is the workdir of a run (`abe_jax.workdir`).
_OF_A_RUN = {"config.json", "checkpoints"}


class Zip(zipfile.ZipFile):
    r"""An open zip file; some packers write `\` between folders, against the standard.

    Attributes:
      members: those of the file by relative path; of two of one name the later.
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        members = self.infolist()
        if not any("/" in member.filename for member in members):
            for member in members:
                member.filename = member.filename.replace("\\", "/")
        self.members = {member_path(member.filename): member for member in members}


class Tree:
    """The visible files below a folder, or in a zip file.

    Hidden files, system folders, and what is neither file nor folder are left out; of
    folders also workdirs of runs.

    Attributes:
      root: the folder or zip file.
      files: relative path with forward slashes -> path of the file, or its name in the
        zip file.
      folders: relative paths of the folders.
      left_out: relative path of what is left out and not hidden -> what it is.
    """

    def __init__(self, root: str):
        """An empty one; `of` and `of_zip` list what is there."""
        self.root = root
        self.files: dict[str, str] = {}
        self.folders: set[str] = set()
        self.left_out: dict[str, str] = {}

    @classmethod
    def of(cls, *folders: str | os.PathLike[str]) -> "Tree":
        """Lists folders as if they were one; links to folders are followed.

        Raises:
          UserError: a folder does not exist or cannot be read.
        """
        tree = cls(str(folders[0]))
        for folder in folders:
            if not os.path.isdir(folder):
                raise UserError(
                    f"{str(folder)!r} is no folder; give the folder that holds the "
                    "data set, or its zip or tgz file."
                )
            tree._walk(str(folder), "", ())
        return tree

    @classmethod
    def of_zip(cls, path: str | os.PathLike[str]) -> "Tree":
        """Lists a zip file.

        Raises:
          UserError: it is none, or damaged.
        """
        tree = cls(str(path))
        try:
            with Zip(path) as archive:
                members = archive.members
        # A damaged directory of members fails in many ways.
        except Exception as error:
            raise UserError(
                f"{str(path)!r} is neither a folder nor a zip file that can be read "
                f"({error})."
            ) from error
        for path, member in members.items():
            parts = path.split("/")
            system = next((n for n in parts if n in SYSTEM_FOLDERS), None)
            if not path or any(name.startswith(".") for name in parts):
                continue
            if system:
                tree.left_out["/".join(parts[: parts.index(system) + 1])] = (
                    "system folders"
                )
                continue
            if not member.is_dir():
                tree.files[path] = member.filename
                del parts[-1]
            above = ("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
            tree.folders.update(above)
        return tree

    def _walk(self, folder: str, prefix: str, above: tuple[tuple[int, int], ...]):
        try:
            status = os.stat(folder)
            above = (*above, (status.st_dev, status.st_ino))
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
            subfolders = [entry for entry in entries if _leads_to(entry.is_dir)]
            folder_names = {entry.name for entry in subfolders}
            for entry in entries:
                if entry.name.startswith(".") or entry.name in folder_names:
                    continue
                # A link to an image that is gone is named when it is read.
                image = entry.name.lower().endswith(SUFFIXES)
                if _leads_to(entry.is_file) or (entry.is_symlink() and image):
                    self.files[prefix + entry.name] = entry.path
                elif entry.is_symlink():
                    self.left_out[prefix + entry.name] = "links to what is not there"
                else:  # reading a pipe would wait for ever
                    self.left_out[prefix + entry.name] = "pipes or devices"
        except OSError as error:
            raise UserError(
                f"cannot read the folder {error.filename or folder!r}: "
                f"{error.strerror}; make it readable for this user."
            ) from error
        names = {entry.name for entry in entries}
        if prefix and names >= _OF_A_RUN:
            for name in [name for name in self.files if name.startswith(prefix)]:
                del self.files[name]
            self.folders.discard(prefix[:-1])
            self.left_out[prefix[:-1]] = "workdirs of runs"
            return
        for entry in subfolders:
            name = prefix + entry.name
            if entry.name in SYSTEM_FOLDERS:
                self.left_out[name] = "system folders"
            elif _identity(entry.path) in above:
                self.left_out[name] = "links to folders that they are in"
            elif not entry.name.startswith("."):
                self.folders.add(name)
                self._walk(entry.path, f"{name}/", above)

    def log_left_out(self) -> None:
        """Warns of what is left out: how many of each kind, and the first ones."""
        kinds: dict[str, list[str]] = {}
        for name, kind in self.left_out.items():
            kinds.setdefault(kind, []).append(name)
        for kind, names in kinds.items():
            _log.warning(
                "%s: left out %d %s: %s%s.",
                printable(self.root),
                len(names),
                kind,
                ", ".join(map(repr, names[:3])),
                " ..." if len(names) > 3 else "",
            )

    def find(self, name: str) -> list[str]:
        """Relative paths of all files of a name."""
        return sorted(p for p in self.files if p.rpartition("/")[2] == name)

    def folders_with(self, name: str, other: str) -> list[str]:
        """Folders that hold files of both names; see `parent`."""
        folders = map(parent, self.find(name))
        return [folder for folder in folders if folder + other in self.files]

    def images(self, prefix: str = "") -> list[str]:
        """Relative paths of all images below a folder, "" or one that ends in "/"."""
        return sorted(
            p
            for p in self.files
            if p.startswith(prefix) and p.lower().endswith(SUFFIXES)
        )

    def lines(self, name: str) -> list[str]:
        """The lines of a text file that are not empty, at least one.

        Raises:
          UserError: it is not there, cannot be read as UTF-8 text, or is empty.
        """
        if name not in self.files:
            raise UserError(f"{self.root} holds no {name}; give the whole data set.")
        try:
            text = pathlib.Path(self.files[name]).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {name} in {self.root}: {error}.") from error
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines:
            raise UserError(f"{name} in {self.root} is empty; take the original file.")
        return lines

    def rows(self, name: str, columns: int, *, skip: int = 0) -> list[list[str]]:
        """Columns of a text file, split at white space.

        Args:
          name: relative path of the file.
          columns: how many each row must have; the last may hold spaces.
          skip: header lines to leave out.

        Raises:
          UserError: a row of another number of columns, or no rows.
        """
        rows = []
        for number, line in enumerate(self.lines(name)[skip:], skip + 1):
            row = line.split(maxsplit=columns - 1)
            if len(row) != columns:
                raise UserError(
                    f"line {number} of {name} has {len(row)} columns, expected "
                    f"{columns}: {line.strip()[:60]!r}; the file is damaged or is "
                    "another one of the same name."
                )
            rows.append([cell.strip() for cell in row])
        if not rows:
            raise UserError(
                f"{name} in {self.root} has a header only; take the original file."
            )
        return rows


def parent(path: str) -> str:
    """The folder of a relative path, "" or with a slash at its end."""
    head, slash, _ = path.rpartition("/")
    return head + slash


def member_path(name: str) -> str:
    """Relative path of a member of a zip file; some packers write `./` before it."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _leads_to(kind: Callable[[], bool]) -> bool:
    """`is_dir` or `is_file` of an entry; false of a link to itself."""
    try:
        return kind()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def local(path: str | os.PathLike[str], what: str) -> pathlib.Path:
    """The local file or folder that is meant; `~` is the home folder.

    Args:
      path: as the user gave it.
      what: the flag or field it was given by.

    Raises:
      UserError: it is empty, or a remote path, such as gs://bucket/photos.
    """
    if not os.fspath(path).strip():  # it would be the current folder
        raise UserError(f"{what} is empty; give the path of a file or folder.")
    if "://" in os.fspath(path):
        raise UserError(
            f"{what}={os.fspath(path)} is a remote path; give a local one (a bucket "
            "can be mounted as a folder)."
        )
    return pathlib.Path(os.path.expanduser(path))


def printable(name: str | os.PathLike[str]) -> str:
    r"""A name as one line of text: bytes that are no UTF-8 and controls as `\xff`."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    controls = "Cc", "Zl", "Zp"  # with ends of lines; other kinds of spaces are kept
    return "".join(
        rf"\x{ord(c):02x}" if unicodedata.category(c) in controls else c for c in text
    )


def count_suffixes(names: Iterable[str]) -> str:
    """How many files have which suffix, the most first: "12 .heic, 3 .mp4"."""
    counts: dict[str, int] = {}
    for name in names:
        suffix = os.path.splitext(name)[1].lower() or "without a suffix"
        counts[suffix] = counts.get(suffix, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    found = [f"{count:,} {suffix}" for suffix, count in ordered[:6]]
    rest = sum(count for _, count in ordered[6:])
    return ", ".join(found + ([f"{rest:,} others"] if rest else []))


def _identity(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(
            f"cannot read the folder {path!r}: {error.strerror}; make it readable for "
            "this user."
        ) from error
    return status.st_dev, status.st_ino
