"""A run opened from its folder alone."""

import os
import shutil
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from apply.conftest import NAMES, make_run
from flax import nnx
from PIL import Image

import abe_jax
from abe_jax import models, train_step
from abe_jax.apply import images
from abe_jax.apply.trained import Trained
from abe_jax.errors import UserError
from abe_jax.workdir import config_files, weights


def test_import_and_load_by_name_need_no_jax():
    code = "import abe_jax, sys; abe_jax.load; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_copied_workdir_is_enough(workdir, model, tmp_path, monkeypatch):
    """No config, weights or data; `make_run` names a file of weights that is gone."""
    copy = shutil.copytree(workdir, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    again = abe_jax.load(copy)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    embeddings = again.embed(pixels)
    assert embeddings.shape == (3, 2, 4) and embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(embeddings, model.embed(pixels))
    assert again.step == 0 and again.protocol == {}
    assert again.config.model.num_learners == 2


def test_embeddings_are_those_of_the_evaluation(workdir, model):
    """The square that evaluation takes, its middle, and the checkpoint's weights."""
    section = weights.model_section(model.config, restored=True)
    net = models.create(section, rngs=nnx.Rngs(1))
    embed = train_step.make_embed_step(net, 32)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    expected = embed(train_step.split_model(net)[1:], jnp.asarray(pixels))
    np.testing.assert_allclose(model.embed(pixels), expected, rtol=1e-5, atol=1e-6)


def test_numbers_and_sizes_of_images_do_not_matter(model):
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        for size in ((40, 40), (50, 90), (31, 40))
    ] * 7  # 21 images: a batch of 16 and one of 8 that is padded
    together = model.embed(arrays)
    assert together.shape == (21, 2, 4)
    assert model.embed(jnp.asarray(arrays[1])).shape == (1, 2, 4)
    for i in (0, 1, 2, 20):
        np.testing.assert_allclose(together[i], model.embed(arrays[i])[0], atol=1e-5)


def test_paths_are_read_as_arrays_are(model, pictures):
    files = images.find(pictures)
    assert [file.name for file in files] == NAMES
    with images.Reader() as reader:
        pixels = [model.decode(reader.read(file), "") for file in files]
    expected = model.embed(pixels)
    np.testing.assert_array_equal(model.embed(pictures), expected)
    one = model.embed(str(pictures / "a" / "1.png"))
    np.testing.assert_allclose(one[0], expected[NAMES.index("a/1.png")], atol=1e-6)
    both = [pictures / "a" / "1.png", pictures / "a" / "more.zip"]
    assert (
        model.embed(both).shape == model.embed(dict.fromkeys(both)).shape == (3, 2, 4)
    )


def test_a_list_of_paths_is_read_by_several_threads(model, pictures, monkeypatch):
    both = threading.Barrier(2, timeout=20)
    decode = model.decode

    def decode_together(content, name):
        both.wait()
        return decode(content, name)

    monkeypatch.setattr(model, "decode", decode_together)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    model.embed([pictures / "a" / "1.png", pictures / "a" / "b" / "2.PNG"])


def test_attention(model):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    masks = model.attention(pixels)
    assert masks.shape[:4] == (2, 2, 2, 2)
    assert ((masks >= 0) & (masks <= 1)).all() and masks.std() > 0.1


def test_a_model_without_attention_says_so(tmp_path):
    make_run(tmp_path / "run", "m_heads")
    with pytest.raises(UserError, match="'m_heads', which has no attention"):
        abe_jax.load(tmp_path / "run").attention(np.zeros((1, 40, 40, 3), np.uint8))


def test_mistakes(model, tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        abe_jax.load(tmp_path)
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        abe_jax.load(model.workdir, step=7)
    with pytest.raises(UserError, match="does not exist"):
        model.embed(tmp_path / "none")
    with pytest.raises(UserError, match="holds no images"):
        model.embed(tmp_path)
    with pytest.raises(ValueError, match=r"must be uint8 .* not float32 \[4, 4, 3\]"):
        model.embed(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(ValueError, match=r"must be uint8 .* not uint8 \[0, 4, 3\]"):
        model.embed(np.zeros((1, 0, 4, 3), np.uint8))
    for wrong in (Image.new("RGB", (4, 4)), [Image.new("RGB", (4, 4))], ["a.png", 1]):
        with pytest.raises(
            ValueError, match="must be uint8 .* or all of them paths, not"
        ):
            model.embed(wrong)
    with pytest.raises(ValueError, match="no images to embed"):
        model.embed([])
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"cannot read broken.png as an image"):
        model.embed(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "fine.png")
    assert model.embed(tmp_path / "fine.png").shape == (1, 2, 4)


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("eval", "batch_size", 0, "eval.batch_size is 0; it must be"),
        ("data", "square", "centr", "data.square is 'centr'; known are"),
    ],
)
def test_values_of_a_config_are_checked(workdir, section, field, value, message):
    config = config_files.of_workdir(workdir)
    config[section][field] = value
    with pytest.raises(UserError, match=message):
        Trained(workdir, config=config)
