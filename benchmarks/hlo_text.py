"""What an optimised program does, read from the text that XLA gives of it.

Bytes are those of the device's main memory. TPU programs say which arrays stay on the
chip (memory spaces, `S(1)`), which XLA's own count of bytes does not regard.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all"),
    "collective-permute",
)
# What moves nothing by itself.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all")
_ALLOCATES = 'custom_call_target="AllocateBuffer"'
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_SHAPE = re.compile(r"\b(\w+)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[\w-]+)\("
    r"(?P<operands>[^)]*)\)"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One of an optimised program.

    Attributes:
      name: its name in the program.
      op: what it does, as "fusion".
      shapes: of its results, as "f32[8,16]".
      size: bytes of its results, wherever they are.
      moved: bytes it reads from and writes to main memory, in all trips of its loop.
      moved_padded: the same with the padding of arrays to a TPU's tiles.
      where: "file:line" of its source.
      scope: its path through the program's named scopes.
      chain: id that all steps of an operation share, if XLA cut it into a chain of
        steps; else its name.
    """

    name: str
    op: str
    shapes: tuple[str, ...]
    size: int
    moved: int
    moved_padded: int
    where: str
    scope: str
    chain: str


@dataclasses.dataclass(frozen=True)
class _Array:
    shape: str
    size: int
    padded: int
    in_main_memory: bool
    is_row: bool  # of an array with a row a trip


def instructions(text: str, *, entry: bool = True) -> Iterator[Instruction]:
    """What an optimised HLO module does.

    Args:
      text: as `compiled.as_text()` gives it.
      entry: if true, only what the entry computation and its loops do, in their order;
        if not, also what they call, such as fusions, where bytes moved are not known.
    """
    frames = _frames(text)
    if entry:
        yield from _entry(text, text[text.index("\nENTRY ") :], 1, frames)
    else:
        yield from _instructions(text, text, 1, frames)


def _entry(
    text: str, computation: str, trips: int, frames: dict[str, str]
) -> Iterator[Instruction]:
    """Instructions of a computation, each loop's in its place."""
    for each in _instructions(text, computation, trips, frames):
        yield each
        if each.op == "while":
            line = re.search(rf"%{re.escape(each.name)} = .*", computation)
            assert line
            condition, body = (
                _computation(text, name)
                for name in re.findall(r"(?:condition|body)=%([\w.-]+)", line[0])
            )
            # XLA does not always tell how far: counted from 0 up to a constant.
            ends = re.findall(r'"known_trip_count":\{"n":"(\d+)"', line[0])
            ends = ends or re.findall(r" constant\((\d+)\)", condition)
            count = int(ends[0]) if len(ends) == 1 else 1
            for inner in _entry(text, body, count, frames):
                yield dataclasses.replace(
                    inner,
                    moved=trips * inner.moved,
                    moved_padded=trips * inner.moved_padded,
                )


def _computation(text: str, name: str) -> str:
    start = text.index(f"\n%{name} ")
    return text[start : text.index("\n}", start)]


def _instructions(
    text: str, computation: str, trips: int, frames: dict[str, str]
) -> Iterator[Instruction]:
    known: dict[str, list[_Array]] = {}
    for line in computation.splitlines()[1:]:
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        arrays = known[found["name"]] = _arrays(found["shape"], trips)
        op = found["op"]
        names = re.findall(r"%([\w.-]+)", found["operands"])
        operands = [array for name in names for array in known.get(name, [])]
        called = re.search(r"calls=%([\w.-]+)", line)
        if op == "fusion" and called:
            sliced = _sliced(_computation(text, called[1]))
            operands = [
                _part(array, sliced.get(number, array.size))
                for number, array in enumerate(operands)
            ]
        results = _results(op, arrays)
        if 'custom_call_target="__cu' in line:
            results = results[:1]  # the others are cuBLAS's and cuDNN's scratch
        passing = [] if _ALLOCATES in line else _passing(op, operands, results)
        frame = re.search(r"stack_frame_id=(\d+)", line)
        chain = re.search(r'chain_id="(\d+)"', line)
        scope = re.search(r'op_name="([^"]*)"', line)
        yield Instruction(
            name=found["name"],
            op=op,
            shapes=tuple(array.shape for array in arrays),
            size=sum(array.size for array in results),
            moved=trips * sum(array.size for array in passing),
            moved_padded=trips * sum(array.padded for array in passing),
            where=frames.get(frame[1], "") if frame else "",
            scope=scope[1] if scope else "",
            chain=chain[1] if chain else found["name"],
        )


def _sliced(fused: str) -> dict[int, int]:
    """{number of an operand: bytes} of those a fusion reads nothing but slices of."""
    read: dict[str, list[int | None]] = collections.defaultdict(list)
    numbers = {}
    for line in fused.splitlines():
        if found := _INSTRUCTION.match(line):
            if found["op"] == "parameter":
                numbers[found["name"]] = int(found["operands"])
            size = sum(array.size for array in _arrays(found["shape"], 1))
            is_slice = found["op"] in ("slice", "dynamic-slice")
            for name in re.findall(r"%([\w.-]+)", found["operands"]):
                read[name].append(size if is_slice else None)
    return {
        numbers[name]: sum(size for size in sizes if size is not None)
        for name, sizes in read.items()
        if name in numbers and None not in sizes
    }


def _part(array: _Array, size: int) -> _Array:
    """At most so many bytes of an array, padded like the whole."""
    if size >= array.size:
        return array
    padded = array.padded * size // array.size
    return dataclasses.replace(array, size=size, padded=padded)


def collectives(text: str) -> dict[str, list[int]]:
    """{operation: bytes of each one's results on a device} of a module.

    For TPUs XLA cuts some into a chain of steps that run beside other work, and repeats
    the operation in each: a chain is one.
    """
    found: dict[str, list[int]] = {}
    chains = set()
    for each in instructions(text, entry=False):
        op = each.op.removesuffix("-start")
        if op in COLLECTIVES and (op, each.chain) not in chains:
            chains.add((op, each.chain))
            found.setdefault(op, []).append(each.size)
    return found


def bytes_by(text: str, key: Callable[[Instruction], str]) -> dict[str, int]:
    """Bytes moved to and from main memory, by a property of what moves them."""
    total: dict[str, int] = collections.Counter()
    for each in instructions(text):
        total[key(each)] += each.moved
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _arrays(shape: str, trips: int) -> list[_Array]:
    """Arrays of a shape or a tuple; of one with a row for each trip, a row's size."""
    arrays = []
    for dtype, dims, layout in _SHAPE.findall(shape):
        if dtype in _BYTES:
            sides = [int(n) for n in dims.split(",") if n]
            is_row = trips > 1 and sides[:1] == [trips]
            size, padded = (
                _BYTES[dtype] * math.prod(each[1:] if is_row else each)
                for each in (sides, _padded(sides, layout))
            )
            place = "S(" not in layout, is_row
            arrays.append(_Array(f"{dtype}[{dims}]", size, padded, *place))
    return arrays


def _results(op: str, arrays: list[_Array]) -> list[_Array]:
    """The results among these arrays: a "-start" also lists its operands or state."""
    if op in ("copy-start", "slice-start"):
        # A copy's is (result, operand, state), a slice's ((operands), result, state).
        return arrays[:1] if op == "copy-start" else arrays[-2:-1]
    return arrays[len(arrays) // 2 :] if op.endswith("-start") else arrays


def _passing(op: str, operands: list[_Array], results: list[_Array]) -> list[_Array]:
    """What an operation reads from main memory, and what it writes there."""
    if op in _FREE or op == "while" or op.endswith("-done"):
        return []
    written = [array for array in results if array.in_main_memory]
    if op == "slice-start":  # reads what it gives, not all it could
        return written + (results if operands[0].in_main_memory else [])
    # A trip's row is written in place: the others are not read.
    filled = [result.shape for result in results if result.is_row]
    read = (o for o in operands if not (o.is_row and o.shape in filled))
    return written + [array for array in read if array.in_main_memory]


def _padded(sides: list[int], layout: str) -> list[int]:
    """Sides of an array in memory, as "{1,0:T(8,128)}" of its layout says."""
    tile = re.search(r"T\(([\d,]+)\)", layout)
    if not tile:
        return sides
    minor_first = [int(n) for n in re.findall(r"\d+", layout.split(":")[0])]
    padded = list(sides)
    for axis, side in zip(minor_first, reversed(tile[1].split(",")), strict=False):
        padded[axis] = -(-sides[axis] // int(side)) * int(side)
    return padded


def _frames(text: str) -> dict[str, str]:
    """{id of a stack frame: "file:line"} from the tables at the module's head."""
    tables: dict[str, dict[str, str]] = collections.defaultdict(dict)
    current = ""
    for line in text[: text.index("\nENTRY ")].splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            current = line
        elif found := re.match(r"(\d+) (.*)", line):
            tables[current][found[1]] = found[2]
    where = {}
    for frame, content in tables["StackFrames"].items():
        place = re.search(r"file_location_id=(\d+)", content)
        location = tables["FileLocations"].get(place[1], "") if place else ""
        file = re.search(r"file_name_id=(\d+)", location)
        line = re.search(r"\bline=(\d+)", location)
        if file and line:
            name = tables["FileNames"].get(file[1], "").strip('"')
            where[frame] = f"{name.split('abe_jax/')[-1]}:{line[1]}"
    return where
