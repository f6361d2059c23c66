"""Each exported file against the model itself, by the examples of docs/use.md."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from apply.conftest import make_run
from command_line import ROOT, run
from PIL import Image

import abe_jax
from abe_jax.apply import export
from abe_jax.apply.export import card
from abe_jax.apply.trained import Trained
from abe_jax.errors import UserError
from abe_jax.workdir import config_files

MODELS = [("abe", "googlenet_bn")]
OTHERS = [("abe", "googlenet"), ("abe", "resnet50"), ("m_heads", "vit_small_patch16")]
OTHERS += [("abe", "vit_small_patch14_reg4_dinov2")]
MODELS += [pytest.param(pair, marks=pytest.mark.slow) for pair in OTHERS]
# Parts of these, by the same primitives.
PARTS = [("one_head", "googlenet"), ("one_head", "vit_small_patch14_dinov2")]
PARTS += [("m_heads", "googlenet_bn")]
MODELS += [pytest.param(pair, marks=pytest.mark.campaign) for pair in PARTS]


def example(suffix: str) -> str:
    """The code below the form's name in docs/use.md."""
    text = (ROOT / "docs" / "use.md").read_text()
    found = re.search(rf"\*\*`\{suffix}`\*\*.*?```python\n(.*?)```", text, re.S)
    assert found, suffix
    return found[1]


def run_example(suffix: str, folder, query: str = "query.png") -> np.ndarray:
    """Runs it in a process that has the file and a picture, and not this project."""
    code = (
        "import sys; sys.modules['abe_jax'] = None\n"
        + example(suffix).replace("query.png", query)
        + "\nnp.save('embeddings.npy', embeddings)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=folder, check=True)
    return np.load(folder / "embeddings.npy")


def _name(pair) -> str:
    return "-".join(pair)


@pytest.fixture(scope="module", params=MODELS, ids=_name)
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    make_run(folder / "run", *request.param)
    model = abe_jax.load(folder / "run")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 48, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(pixels).save(folder / "query.png", exif=turned)
    large = Image.fromarray(pixels).resize((600, 480), Image.Resampling.BICUBIC)
    large.save(folder / "large.jpg", exif=turned)
    return model, folder, model.embed(folder / "query.png").reshape(1, -1)


@pytest.fixture(scope="module")
def stablehlo(exported):
    """Writes the program; what was said of it."""
    model, folder, _ = exported
    return export.write(model, folder / "model.stablehlo")


def test_stablehlo(exported, stablehlo):
    _, folder, expected = exported
    assert "cpu, cuda, tpu" in stablehlo
    assert f"made by JAX {jax.__version__}: a JAX" in stablehlo
    found = run_example(".stablehlo", folder)  # of one image
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.usefixtures("stablehlo")
def test_stablehlo_takes_any_batch_on_each_platform(exported):
    model, folder, _ = exported
    program = jax.export.deserialize(
        bytearray((folder / "model.stablehlo").read_bytes())
    )
    assert program.platforms == ("cpu", "cuda", "tpu")
    # Float32 where products of float32 are not, by default: TPUs, GPUs.
    precisions = re.findall(r"precision(?:_config)? = \[(.*?)\]", program.mlir_module())
    assert len(precisions) > 5 and all(p.count("HIGHEST") == 2 for p in precisions)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), dtype=np.uint8)
    expected = model.embed(pixels).reshape(5, -1)
    np.testing.assert_allclose(program.call(pixels), expected, atol=1e-5)


@pytest.mark.peers
def test_onnx(exported):
    import onnx
    import onnxruntime

    model, folder, expected = exported
    assert "checked: within" in export.write(model, folder / "model.onnx")
    found = run_example(".onnx", folder)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    expected = model.embed(folder / "large.jpg").reshape(1, -1)
    found = run_example(".onnx", folder, "large.jpg")
    np.testing.assert_allclose(found, expected, atol=1e-4)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert session.get_inputs()[0].shape == ["batch", 40, 40, 3]
    assert session.get_inputs()[0].type == "tensor(uint8)"
    pixels = np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), dtype=np.uint8)
    (found,) = session.run(["embeddings"], {"images": pixels})
    np.testing.assert_allclose(
        np.asarray(found), model.embed(pixels).reshape(5, -1), atol=1e-4
    )
    (card,) = onnx.load(folder / "model.onnx").metadata_props
    assert json.loads(card.value)["config"]["model"]["num_learners"] == 2


@pytest.mark.peers
def test_onnx_of_another_result_is_not_written(model, tmp_path, monkeypatch):
    embed, precisions = model.embed, []

    def embed_off(images):
        precisions.append(jax.config.jax_default_matmul_precision)
        return embed(images) + 0.001

    monkeypatch.setattr(model, "embed", embed_off)
    with pytest.raises(UserError, match="off by 1.0e-03; nothing was written"):
        export.write(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == [] and precisions == ["highest"]


@pytest.mark.peers
def test_onnx_has_no_rule_for_loops():
    """Of a user's trunk; they are not taken for a call of their body."""
    from abe_jax.apply.export import onnx_graph

    trace = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: 2 * x, x)).trace(
        jax.ShapeDtypeStruct((2,), np.float32)
    )
    graph = onnx_graph.Graph("batch", "x", {})
    with pytest.raises(UserError, match="no rule for JAX's operation 'scan'"):
        graph.run(trace.jaxpr.jaxpr, trace.jaxpr.consts, ["x"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("abe", "Attention-based Ensemble"),
        ("m_heads", "M-heads, the"),
        ("one_head", "1-head, the"),
    ],
)
def test_the_card_names_the_model(name, words, model, monkeypatch):
    monkeypatch.setitem(model.config.model, "name", name)
    assert card.describe(model)["model"].startswith(words)


@pytest.mark.peers
def test_safetensors(exported):
    from safetensors import safe_open

    model, folder, expected = exported
    export.write(model, folder / "model.safetensors")
    with safe_open(folder / "model.safetensors", "np") as file:
        names = set(file.keys())
        card = json.loads(file.metadata()["card"])
    assert names == export.weights(model).keys()
    assert card["config"]["data"]["name"] == "birds"
    assert card["config"]["model"]["pretrained"] == "long/gone.onnx"
    assert card["data"]["licence"] and card["versions"]["abe_jax"]
    config = model.config.model
    if config.name == "abe" and config.trunk.startswith("googlenet"):
        found = run_example(".safetensors", folder)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_how_a_run_computes_is_not_exported(workdir, model, tmp_path):
    config = model.config.copy_and_resolve_references()
    config.model.update(dtype="bfloat16", learners_in_turn=True)
    rounded = Trained(workdir, config=config)
    assert rounded.attention(np.zeros((40, 40, 3), np.uint8)).dtype == np.float32
    export.write(rounded, tmp_path / "model.stablehlo")
    program = jax.export.deserialize(
        bytearray((tmp_path / "model.stablehlo").read_bytes())
    )
    assert "bf16" not in program.mlir_module()
    assert "stablehlo.while" not in program.mlir_module()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    expected = model.embed(pixels).reshape(2, -1)
    np.testing.assert_allclose(program.call(pixels), expected, atol=1e-5)


def test_output_that_cannot_be(model, tmp_path):
    with pytest.raises(
        UserError, match="must end in .safetensors, .onnx or .stablehlo"
    ):
        export.write(model, tmp_path / "model.pt")
    with pytest.raises(UserError, match="there is no folder"):
        export.write(model, tmp_path / "no" / "model.onnx")
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(UserError, match="is a folder; give a file's name"):
        export.write(model, tmp_path / "model.onnx")


def test_settings_are_those_of_the_run(workdir, tmp_path):
    config = config_files.of_workdir(workdir)
    config.data.image_size = 24
    output = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match=r"data.image_size \(there 32, now 24\)"):
        export.export_model(config, workdir, output=str(output), step=None)
    assert not output.exists()


@pytest.mark.slow
def test_the_mode(workdir, tmp_path):
    arguments = (f"--workdir={workdir}", "--mode=export")
    output = tmp_path / "model.stablehlo"
    status, printed, errors = run(*arguments, f"--output={output}")
    assert status == 0, errors
    assert printed.startswith(f"{output}: ")
    status, _, errors = run(*arguments, f"--output={tmp_path}/model.tflite")
    assert status == 1
    assert "must end in" in errors.splitlines()[-1]
