"""A trained model as one file that is used without this project.

All forms take uint8 images `[B, load_size, load_size, 3]`, B free, and give float32
`[B, D]`: the learners' embeddings, each of unit length, side by side. docs/use.md has
an example for each. They compute in float32 by the plain operations; the CPU lowerings
of `abe_jax.models` need a batch of a known size.
"""

import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from abe_jax.apply.export import card
from abe_jax.apply.images import Path
from abe_jax.apply.output import by_suffix, written
from abe_jax.apply.trained import Trained
from abe_jax.data.datasets.tree import local, printable
from abe_jax.errors import UserError
from abe_jax.models import lowering
from abe_jax.workdir import claim

_PLATFORMS = ("cpu", "cuda", "tpu")

_TOLERANCE = 1e-4


def export_model(config, workdir: str, *, output: str, step: int | None) -> None:
    """Writes a run's model as one file: `--mode=export`.

    Args:
      config: of the run.
      workdir: folder of the run.
      output: file to write, by its suffix: .safetensors, .onnx or .stablehlo.
      step: of the checkpoint; the newest by default.

    Raises:
      UserError: the config is not that of the run; or see `write`.
    """
    by_suffix(local(output, "output"), _FORMS)
    claim.require_run(workdir, config)
    print(write(Trained(workdir, step, config=config), output))


def write(model: Trained, output: Path) -> str:
    """Writes a model as one file.

    Args:
      model: as returned by `abe_jax.load`.
      output: `.safetensors`: the weights by their names, and the card as metadata
        "card"; `.onnx`: for ONNX Runtime, the card as metadata "card"; `.stablehlo`:
        for `jax.export` on CPU, CUDA and TPU.

    Returns:
      what the user should know of it.

    Raises:
      UserError: another suffix, a package is missing, or the file cannot be written.
    """
    path = local(output, "output")
    make = by_suffix(path, _FORMS)
    own = model.config.model
    if own.dtype != "float32" or own.get("learners_in_turn"):
        config = model.config.copy_and_resolve_references()
        with config.unlocked():  # the ONNX writer knows no loops
            config.model.update(dtype="float32", learners_in_turn=False)
        model = Trained(model.workdir, model.step, config=config)
    # By default TPUs multiply in bfloat16 and GPUs in tensorfloat32. What the file is
    # checked against is traced anew with this setting.
    with jax.default_matmul_precision("highest"):
        content, note = make(model)
    with written(path) as part:
        part.write_bytes(content)
    return f"{printable(path)}: {len(content) / 2**20:,.1f} MiB, {note}"


def _program(model: Trained) -> Callable[[jax.Array], jax.Array]:
    variables = jax.tree.map(np.asarray, model.variables)

    def embed(images: jax.Array) -> jax.Array:
        rows = model.embed_program(variables, images)
        return rows.reshape(images.shape[0], model.dim)

    return embed


def _safetensors(model: Trained) -> tuple[bytes, str]:
    try:
        from safetensors.numpy import save
    except ImportError as error:
        raise UserError(_missing("safetensors")) from error
    described = card.describe(model)
    metadata = {"format": "abe_jax", "card": json.dumps(described)}
    return save(weights(model), metadata), "weights by name, a card as metadata"


def weights(model: Trained) -> dict[str, np.ndarray]:
    """Every array of a model by its name: "spatial.conv1.conv.kernel"."""
    named = {}
    for tree in model.variables:
        for path, leaf in jax.tree.leaves_with_path(tree):
            named[".".join(str(key.key) for key in path)] = np.array(leaf)
    return named


def _onnx(model: Trained) -> tuple[bytes, str]:
    try:
        import onnx
        import onnxruntime

        from abe_jax.apply.export import onnx_model
    except ImportError as error:
        raise UserError(_missing("onnx and onnxruntime")) from error
    size = model.config.data.load_size
    with lowering.plain_operations():
        graph = onnx_model.convert(
            _program(model),
            (size, size, 3),
            input_name="images",
            output_name="embeddings",
        )
    onnx.helper.set_model_props(graph, {"card": json.dumps(card.describe(model))})
    content = graph.SerializeToString()
    session = onnxruntime.InferenceSession(content)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    (found,) = session.run(None, {"images": images})
    expected = model.embed(images).reshape(len(images), -1)
    error = float(np.abs(found - expected).max())
    if not error <= _TOLERANCE:
        raise UserError(
            f"ONNX Runtime gives embeddings that are off by {error:.1e}; nothing was "
            "written. Please report this, with the config."
        )
    return content, f"checked: within {error:.0e} of this model in ONNX Runtime"


def _stablehlo(model: Trained) -> tuple[bytes, str]:
    size = model.config.data.load_size
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
    with lowering.plain_operations():
        program = jax.jit(_program(model))
        exported = jax.export.export(program, platforms=_PLATFORMS)(images)
    return bytes(exported.serialize()), (
        f"for {', '.join(_PLATFORMS)}; made by JAX {jax.__version__}: a JAX that was "
        "released up to six months later reads it; for newer ones export again"
    )


def _missing(packages: str) -> str:
    return f"this needs {packages}: pip install -e '.[export]'"


_FORMS: dict[str, Callable[[Trained], tuple[bytes, str]]] = {
    ".safetensors": _safetensors,
    ".onnx": _onnx,
    ".stablehlo": _stablehlo,
}
