"""The data sets, one module each: layouts, official numbers, protocol and citation.

A module says what people have on disk, and what is read or listed of it. A new one is
a module with a `DATASET` and its name in the line below.
"""

from abe_jax.data.datasets import birds, cars196, cub200, image_folder, inshop, sop

_MODULES = (cub200, cars196, sop, inshop, image_folder, birds)

DATASETS = {module.DATASET.name: module.DATASET for module in _MODULES}
