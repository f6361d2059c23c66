"""Files of embeddings that NumPy reads, written without holding all rows twice."""

import pathlib
import zipfile
from collections.abc import Iterable, Mapping

import numpy as np


def write(
    path: pathlib.Path,
    shape: tuple[int, ...],
    blocks: Iterable[bytes | memoryview],
    others: Mapping[str, np.ndarray],
) -> None:
    """Writes an .npz file with an array `embeddings` that comes in blocks.

    Args:
      path: of the file.
      shape: of `embeddings`.
      blocks: its bytes in their order, little-endian float32, C order.
      others: the other arrays by their names.

    Raises:
      OSError: it cannot be written.
    """
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("embeddings.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_2_0(member, header)
            for block in blocks:
                member.write(block)
        for name, array in others.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
