"""Strict arithmetic, eight fake CPU devices, and data that tests make themselves."""

import importlib.metadata
import os
import pathlib
import shutil
import signal
import tempfile

# Processes of pytest-xdist ignore Ctrl-C, those under nohup a lost connection, and what
# a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Grain's and the command line's processes inherit these.
os.environ["JAX_PLATFORMS"] = "cpu"
# Half the time of a test run is compilation, and none of it needs fast code. Users'
# programs are optimised: ABE_JAX_TESTS_OPTIMIZED=1 tests them as they are.
if not os.environ.get("ABE_JAX_TESTS_OPTIMIZED"):
    _QUICK_TO_COMPILE = [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # gone later
        _QUICK_TO_COMPILE.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(
        (*_QUICK_TO_COMPILE, os.environ.get("XLA_FLAGS", ""))
    )
# What one process compiled the others read; `.ci/run` has one folder for all it starts.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="abe_jax-test-cache-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402
from PIL import Image  # noqa: E402

# Before anything touches a device: multi-device truths are tested, never skipped.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Grain's worker processes read absl flags, which pytest does not parse.
flags.FLAGS.mark_as_parsed()


# A file that began last would keep one process busy while the other has nothing to do.
_LONGEST = (
    *("processes_test", "train_step_test", "features_test", "main_test", "export_test"),
    *("docs_test", "training_test", "configs_test", "joining_test", "trunks_test"),
    *("trunks_peers_test", "search_test", "models_test", "prepare_test", "fuzz_test"),
)


def pytest_collection_modifyitems(items):
    """Long files first."""
    order = {name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session", autouse=True)
def _eight_devices():
    assert jax.device_count() == 8, "the tests need 8 fake CPU devices"


@pytest.fixture
def unreadable(monkeypatch):
    """Makes the folders whose paths end in a text unreadable, even for root."""

    def refuse_those(ending: str) -> None:
        scandir = os.scandir

        def refuse(path):
            if str(path).endswith(ending):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)

    return refuse_those


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> pathlib.Path:
    """A folder of 32 classes with 8 noisy 64 x 64 images each."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(32):
        (folder / f"class{number:02}").mkdir()
        colour = rng.integers(0, 256, 3)
        for i in range(8):
            pixels = np.clip(colour + rng.normal(0, 20, (64, 64, 3)), 0, 255)
            image = Image.fromarray(pixels.astype(np.uint8))
            image.save(folder / f"class{number:02}" / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory, photos) -> pathlib.Path:
    """All prepared data sets, with a few images of 60 x 40 pixels each."""
    import fake_datasets as fake

    from abe_jax.prepare import prepare

    folder = tmp_path_factory.mktemp("prepared")
    layouts = {name: name for name in ("cub200", "sop", "inshop")}
    for dataset, layout in (layouts | {"cars196": "cars196 form B"}).items():
        source = folder / "sources" / dataset
        write = fake.LAYOUTS[layout][1]
        write(source, fake.SMALL[dataset], lambda name: fake.jpeg(name, (60, 40)))
        prepare(dataset, source, folder, expected=fake.SMALL[dataset])
    prepare("image_folder", photos, folder)
    shutil.rmtree(folder / "sources")
    return folder
