"""Training steps of ABE-M against PyTorch's, in turns in one run.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --cases=64:32 --learners=1,2,4,8
    python benchmarks/train_step.py --trunk=resnet50 --learners=4

Ours is the step of `abe_jax.main`: augmentation, both losses, SGD. The peer has no
augmentation; on a GPU it is compiled by torch.compile and uses autocast. Both find
their batch on the device. Read the ratios; a busy machine changes the rest.
"""

from collections.abc import Callable

import abe_cases
import jax

from abe_jax import parallel


def ours(case: abe_cases.Case) -> Callable[[int], None]:
    mesh = parallel.make_mesh(jax.devices()[:1])
    take_step, state = abe_cases.training(case.config(), mesh)
    state = parallel.replicate(state, mesh)
    rows = {"image": case.images(), "label": case.labels()}
    batch = parallel.split_rows(rows, mesh)

    def run(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, _ = take_step(state, batch)
        jax.block_until_ready(state)

    return run


def peer(case: abe_cases.Case) -> Callable[[int], None]:
    import abe_torch
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = case.config().train
    net = abe_torch.ABE(case.learners, abe_cases.EMBEDDING_DIM, case.trunk).to(device)
    images = abe_torch.preprocess(case.images(), device, case.trunk)
    labels = torch.from_numpy(case.labels()).to(device)
    optimiser = torch.optim.SGD(
        net.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    lower = torch.autocast(
        device, torch.bfloat16, enabled=case.dtype == "bfloat16", cache_enabled=False
    )

    def loss_of(images: torch.Tensor) -> torch.Tensor:
        with lower:
            embeddings = net(images)
        return abe_torch.loss_of(embeddings, labels)

    if device == "cuda":
        loss_of = torch.compile(loss_of, mode="max-autotune-no-cudagraphs")

    def run(count: int) -> None:
        for _ in range(count):
            optimiser.zero_grad(set_to_none=True)
            loss_of(images).backward()
            optimiser.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


if __name__ == "__main__":
    # Backward is twice the multiply-adds of forward.
    abe_cases.main(__doc__ or "", ours, peer, passes=3)
