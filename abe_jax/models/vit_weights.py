"""How timm names the tensors of vision transformers."""

from abe_jax.models.naming import Naming


def naming(network: str, *architectures: str) -> Naming:
    """The names of one of them: equal in all, but not all have each tensor."""
    return Naming(
        network=f"timm's {network}",
        architectures=architectures,
        rows=(
            (r"cls_token", "embedding.class_token"),
            (r"reg_token", "embedding.registers"),
            (r"pos_embed", "embedding.position"),
            (r"patch_embed\.proj\.(?P<leaf>\w+)", "embedding.projection.{leaf}"),
            (r"blocks\.(?P<block>\d+)\.ls(?P<n>[12])\.gamma", "block{block}.scale{n}"),
            (
                r"blocks\.(?P<block>\d+)\.norm(?P<n>[12])\.(?P<norm>\w+)",
                "block{block}.norm{n}.{norm}",
            ),
            (
                r"blocks\.(?P<block>\d+)\.(?P<layer>\w+\.\w+)\.(?P<leaf>\w+)",
                "block{block}.{layer}.{leaf}",
            ),
            (r"norm\.(?P<norm>\w+)", "norm.{norm}"),
        ),
        words={
            # timm counts from 0.
            "block": {str(i): str(i + 1) for i in range(12)},
            "layer": {
                "attn.qkv": "qkv",
                "attn.proj": "projection",
                "mlp.fc1": "fc1",
                "mlp.fc2": "fc2",
            },
            "leaf": {"weight": "kernel", "bias": "bias"},
            "norm": {"weight": "scale", "bias": "bias"},
        },
        skipped={r"head\..*": "classifier"},
        hints={
            r"pos_embed": "it is for images of another size",
            r"patch_embed\.proj\.weight": "it has patches or channels of another size",
        },
    )
