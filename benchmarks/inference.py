"""Embedding images with ABE-M against PyTorch, in turns in one run.

    python benchmarks/inference.py
    python benchmarks/inference.py --cases=64:32 --learners=1,2,4,8
    python benchmarks/inference.py --trunk=resnet50 --learners=4

Ours is the embedding step of `abe_jax.main`, from uint8 images. The peer finds its
images preprocessed; on a GPU it is compiled by torch.compile and uses autocast. Read
the ratios; a busy machine changes the rest.
"""

from collections.abc import Callable

import abe_cases
import jax
from flax import nnx

from abe_jax import models, parallel, train_step


def ours(case: abe_cases.Case) -> Callable[[int], None]:
    mesh = parallel.make_mesh(jax.devices()[:1])
    model = models.create(case.config().model, rngs=nnx.Rngs(0))
    embed = parallel.map_over_devices(
        train_step.make_embed_step(model, case.size), mesh, rows_out=True
    )
    variables = parallel.replicate(train_step.split_model(model)[1:], mesh)
    images = parallel.split_rows(case.images(), mesh)

    def run(count: int) -> None:
        jax.block_until_ready([embed(variables, images) for _ in range(count)])

    return run


def peer(case: abe_cases.Case) -> Callable[[int], None]:
    import abe_torch
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = (
        abe_torch.ABE(case.learners, abe_cases.EMBEDDING_DIM, case.trunk)
        .to(device)
        .eval()
    )
    images = abe_torch.preprocess(case.images(), device, case.trunk)
    forward = torch.compile(net, mode="max-autotune") if device == "cuda" else net
    lower = torch.autocast(device, torch.bfloat16, enabled=case.dtype == "bfloat16")

    def run(count: int) -> None:
        with torch.inference_mode(), lower:
            for _ in range(count):
                forward(images)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


if __name__ == "__main__":
    abe_cases.main(__doc__ or "", ours, peer, passes=1)
