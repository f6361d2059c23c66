"""`hf://`: the package's answers and errors, one clear line for each."""

import hashlib
import json
import os
import subprocess
import sys
import types

import pytest

from abe_jax.errors import UserError
from abe_jax.models import hub, weight_files

ERRORS = (
    *("GatedRepoError", "RepositoryNotFoundError", "RevisionNotFoundError"),
    *("LocalEntryNotFoundError", "EntryNotFoundError", "OfflineModeIsEnabled"),
)


@pytest.fixture
def package(monkeypatch):
    """A stand-in for huggingface_hub: `answer` is what a download gives or raises."""
    errors = types.ModuleType("huggingface_hub.errors")
    for name in ERRORS:
        setattr(errors, name, type(name, (Exception,), {}))
    module = types.ModuleType("huggingface_hub")
    module.errors, module.asked = errors, []

    def download(*arguments, **options):
        module.asked.append((*arguments, options))
        if isinstance(module.answer, Exception):
            raise module.answer
        return str(module.answer)

    module.hf_hub_download = download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return module


def _cached(folder, content, digest=None):
    """A file as the hub's cache has it: a link to a blob named by its SHA-256."""
    digest = digest or hashlib.sha256(content).hexdigest()
    repository = folder / "models--timm--resnet50.tv_in1k"
    snapshot = repository / "snapshots" / ("a" * 40)
    for part in (repository / "blobs", repository / "refs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    (repository / "blobs" / digest).write_bytes(content)
    (repository / "refs" / "main").write_text("a" * 40)
    link = snapshot / "model.safetensors"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.join("..", "..", "blobs", digest))
    return link


@pytest.mark.parametrize(
    ("url", "repository", "file", "revision"),
    [
        ("hf://timm/resnet50.tv_in1k", "timm/resnet50.tv_in1k", hub._FILE, None),
        ("hf://a/b@v1.0", "a/b", hub._FILE, "v1.0"),
        ("hf://a/b/x/googlenet-12.onnx", "a/b", "x/googlenet-12.onnx", None),
        ("hf://a/b@main/w.pth", "a/b", "w.pth", "main"),
    ],
)
def test_what_is_asked_for(url, repository, file, revision, package, tmp_path):
    package.answer = _cached(tmp_path, b"weights")
    assert hub.fetch(url) == package.answer
    assert package.asked == [(repository, file, {"revision": revision})]


def test_a_file_that_is_not_a_link_is_taken(package, tmp_path):
    package.answer = tmp_path / "model.safetensors"
    package.answer.write_bytes(b"weights")
    assert hub.fetch("hf://a/b").read_bytes() == b"weights"


def test_damaged_content(package, tmp_path):
    package.answer = _cached(tmp_path, b"weights", digest="0" * 64)
    with pytest.raises(
        UserError, match=r"SHA-256 is [0-9a-f]{12}..., not 000000000000"
    ):
        hub.fetch("hf://a/b")


@pytest.mark.parametrize(
    "url", ["hf://", "hf://name", "hf://a/", "hf://a/b@", "hf://a/b/"]
)
def test_other_forms(url):
    with pytest.raises(UserError, match="is not of the form hf://OWNER/NAME"):
        hub.fetch(url)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("GatedRepoError", "accept the terms"),
        ("RepositoryNotFoundError", "there is no such repository, or it is private."),
        ("RevisionNotFoundError", "no such revision"),
        ("LocalEntryNotFoundError", "cannot be reached, and the file is not in the"),
        ("EntryNotFoundError", "the repository has no file model.safetensors"),
        ("OfflineModeIsEnabled", "HF_HUB_OFFLINE is set"),
    ],
)
def test_errors_of_the_package(name, message, package):
    package.answer = getattr(package.errors, name)("several\nlines")
    with pytest.raises(UserError, match=f"^hf://a/b: .*{message}") as error:
        hub.fetch("hf://a/b")
    assert "\n" not in str(error.value)


def test_errors_of_others(package):
    package.answer = ConnectionError("no route\nto host")
    with pytest.raises(UserError, match="^hf://a/b: ConnectionError: no route$"):
        hub.fetch("hf://a/b")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[hub\]'"):
        weight_files.read("hf://timm/resnet50.tv_in1k")


def test_weights_are_read_from_the_cache(package, tmp_path, monkeypatch):
    package.answer = _cached(tmp_path, b"weights")
    monkeypatch.setitem(weight_files._READERS, ".safetensors", lambda file: file)
    assert weight_files.read("hf://timm/resnet50.tv_in1k") == package.answer


def test_what_the_hub_says_of_a_network(package, tmp_path, caplog):
    package.answer = tmp_path / "config.json"
    content = {
        "architecture": "vit_small_patch16_224",
        "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5]},
    }
    package.answer.write_text(json.dumps(content))
    told = hub.description("hf://a/b@v1/weights.safetensors")
    assert package.asked == [("a/b", "config.json", {"revision": "v1"})]
    assert told == hub.Description(
        "vit_small_patch16_224", [0.5, 0.5, 0.5], [0.25, 0.5, 0.5]
    )
    for text in ("{}", '{"pretrained_cfg": {}}'):
        package.answer.write_text(text)
        assert hub.description("hf://a/b") == hub.Description()
    assert not caplog.records
    for text in ("[1]", "{", '{"pretrained_cfg": 1}'):
        package.answer.write_text(text)
        assert hub.description("hf://a/b") == hub.Description()
    package.answer = package.errors.EntryNotFoundError("none")
    assert hub.description("hf://a/b") == hub.Description()
    assert "has no file config.json" in caplog.text
    assert caplog.text.count("was not checked") == 4


@pytest.mark.peers
def test_the_package_itself_offline(tmp_path):
    """With a prepared cache, by the environment that users set."""
    pytest.importorskip("huggingface_hub")
    link = _cached(tmp_path, b"weights")
    code = """
import sys
from abe_jax.errors import UserError
from abe_jax.models import hub
for url in sys.argv[1:]:
    try:
        print(hub.fetch(url))
    except UserError as error:
        print(error)
"""
    urls = ["hf://timm/resnet50.tv_in1k", "hf://timm/other", "hf://timm/bad name"]
    variables = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *urls],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    found, missing, wrong = done.stdout.splitlines()
    assert found == str(link)
    assert missing.startswith(
        "hf://timm/other: the hub cannot be reached, and the file"
    )
    assert "is not of the form" in wrong
