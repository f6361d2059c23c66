"""The house: who may import whom, and how large a room may be."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "abe_jax"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): (
        path
    )
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(name):
    """The package's modules that a module imports when it is imported itself."""
    found = set()
    for node in ast.parse(MODULES[name].read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # A name may be a module of the package, or a thing that a module has.
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {n if n in MODULES else node.module for n in full}
    return found & MODULES.keys()


GRAPH = {name: imports(name) for name in MODULES}


def rooms(graph):
    """The same arrows between the top-level parts: `abe_jax.models`, ..."""

    def room(name):
        return ".".join(name.split(".")[:2])

    result = {}
    for name, others in graph.items():
        result.setdefault(room(name), set()).update(
            room(n) for n in others if room(n) != room(name)
        )
    result.pop("abe_jax", None)  # its __init__ imports nothing when it is imported
    return result


def circle(graph):
    """A way from a module back to itself, or None."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        path.append(name)
        for other in sorted(graph.get(name, ())):
            if found := visit(other):
                return found
        done.add(path.pop())
        return None

    return next((found for name in graph if (found := visit(name))), None)


def test_a_circle_would_be_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_no_module_imports_itself_by_a_detour():
    # `from package import module` in the package's own modules is no circle.
    graph = {
        name: {n for n in others if not name.startswith(f"{n}.")}
        for name, others in GRAPH.items()
    }
    assert circle(graph) is None


def test_no_room_imports_itself_by_a_detour():
    assert circle(rooms(GRAPH)) is None


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("models", {"errors", "precision"}),
        ("losses", {"errors", "precision"}),
        ("retrieval", {"errors", "precision"}),
        ("data", {"errors", "command_line", "interrupts"}),
    ],
)
def test_rooms_that_know_nothing_of_the_loop(room, allowed):
    others = {name.removeprefix("abe_jax.") for name in rooms(GRAPH)[f"abe_jax.{room}"]}
    assert others <= allowed


def test_data_does_not_import_jax():
    for name, path in MODULES.items():
        if name.startswith("abe_jax.data"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in getattr(node, "names", [])]
                names.append(getattr(node, "module", None) or "")
                assert not any(n.split(".")[0] in ("jax", "flax") for n in names), name


def test_no_room_is_too_large():
    assert len([p for p in PACKAGE.iterdir() if p.is_file()]) <= 15
    long = {
        str(path.relative_to(ROOT)): lines
        for path in ROOT.glob("*/**/*.py")
        if ".venv" not in path.parts
        and (lines := len(path.read_text().splitlines())) > 400
    }
    assert not long


def test_both_programs_can_be_imported():
    """They have a flag of one name; `prepare` is a function for other programs, too."""
    command = [sys.executable, "-c", "import abe_jax.main, abe_jax.prepare"]
    subprocess.run(command, check=True, timeout=100)
