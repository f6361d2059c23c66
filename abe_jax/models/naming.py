"""Where each tensor of a published file of weights goes."""

import dataclasses
import re
from collections.abc import Mapping

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity
class Naming:
    """How a file of a published network names its tensors.

    Attributes:
      network: what such a file holds, in words; for error messages.
      rows: pattern of names, and the path of the layer's variable that it stands for
        (as in `Trunk.section`), with the pattern's groups in braces.
      words: for a group, the texts it may have and what they stand for; a group that
        is not named stands for itself.
      skipped: patterns of the tensors that are left out, and what these are.
      architectures: timm's names of the networks that have these tensors and are this
        one; none where it has no such network.
      hints: for patterns of names, what another shape means; for error messages.
    """

    network: str
    rows: tuple[tuple[str, str], ...]
    words: Mapping[str, Mapping[str, str]]
    skipped: Mapping[str, str]
    architectures: tuple[str, ...] = ()
    hints: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def path(self, name: str) -> Path | None:
        """Where a tensor goes; None for a name that is not in the table."""
        for pattern, target in self.rows:
            if match := re.fullmatch(pattern, name):
                groups = match.groupdict().items()
                words = {
                    k: self.words[k].get(text, "") if k in self.words else text
                    for k, text in groups
                }
                return (
                    tuple(target.format(**words).split("."))
                    if all(words.values())
                    else None
                )
        return None

    def left_out(self, name: str) -> str | None:
        """What a tensor is that is left out on purpose; None for all others."""
        return _of_pattern(self.skipped, name)

    def hint(self, name: str) -> str | None:
        """What it means that a tensor has another shape; None where that is open."""
        return _of_pattern(self.hints, name)


def _of_pattern(texts: Mapping[str, str], name: str) -> str | None:
    for pattern, text in texts.items():
        if re.fullmatch(pattern, name):
            return text
    return None
