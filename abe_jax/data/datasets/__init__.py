"""The data sets, one module each: layouts, official numbers, protocol and citation.

A module says what people have on disk, and what is read or listed of it. To add a data
set, write a module with a `DATASET`, import it below and name it in `_MODULES`.
"""

from abe_jax.data.datasets import birds, cars196, cub200, image_folder, inshop, sop

_MODULES = (cub200, cars196, sop, inshop, image_folder, birds)

DATASETS = {module.DATASET.name: module.DATASET for module in _MODULES}
