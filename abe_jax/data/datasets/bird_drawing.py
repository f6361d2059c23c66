"""Draws one bird from the values of its parts.

Every image is a function of (seed, index, image_size, attributes) alone, and all
random choices are made without looking at the attributes: changing the attribute
of one part changes that part of the picture and nothing else.

Everything is drawn with one primitive, the tapered capsule: a row
(x0, y0, r0, x1, y1, r1) is a line whose thickness goes from r0 to r1.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


def _rgb(code: int) -> np.ndarray:
    """Returns float32 [3], 0 to 1, of a colour such as 0xFFCC1A."""
    return np.array([code >> 16, code >> 8 & 255, code & 255], np.float32) / 255


def _dots(radius: float, *points: tuple[float, float]) -> list[tuple[float, ...]]:
    """Returns capsules without length."""
    return [(x, y, radius) * 2 for x, y in points]


_BLACK, _WHITE, _RUFOUS = _rgb(0x17141A), _rgb(0xF7F5EB), _rgb(0xE6611A)

# Bird units: half a body is 1 long, x points forwards and y down. What is drawn for
# the head and beak is relative to the middle of the head, for the wing to the
# shoulder, for the tail to the rump.
_NECK, _SHOULDER, _RUMP, _FEET = (
    (0.60, -0.56),
    (0.06, -0.04),
    (-0.78, 0.24),
    (0.1, 1.06),
)
_BODY = [(-0.72, 0.22, 0.25, 0.20, 0.06, 0.64), (0.25, -0.10, 0.48, 0.55, -0.50, 0.36)]
_LEGS = [(0.0, 0.5, 0.05, 0.06, 1.02, 0.04), (0.22, 0.5, 0.05, 0.26, 1.02, 0.04)]
_HEAD = [(0.0, 0.0, 0.43) * 2]
_CHEST = [(0.66, -0.04, 0.44, 0.05, 0.56, 0.44)]
_WING = [(-0.04, 0.02, 0.31, -0.98, 0.18, 0.12)]


@dataclasses.dataclass(frozen=True)
class _Look:
    """One value of a part: a shape, and a pattern on it. No colour: the bird's own."""

    shape: Sequence[tuple[float, ...]]
    colour: np.ndarray | None = None
    pattern: Sequence[tuple[float, ...]] = ()
    ink: np.ndarray | None = None


# fmt: off
_LOOKS: dict[str, dict[str, _Look]] = {
    "head": {
        "plain": _Look(_HEAD),
        "capped": _Look(
            _HEAD, None, [(-0.40, -0.24, 0.17, 0.28, -0.36, 0.20)], _rgb(0xDB1A1A)),
        "masked": _Look(_HEAD, None, [(-0.45, -0.03, 0.18, 0.45, -0.03, 0.18)], _BLACK),
        "crested": _Look(_HEAD + [
            (0.12, -0.30, 0.16, -0.12, -0.95, 0.03),
            (-0.05, -0.25, 0.18, -0.50, -0.82, 0.03),
            (-0.20, -0.12, 0.18, -0.74, -0.50, 0.03)], _rgb(0xF2B31A)),
        "cheeked": _Look(_HEAD, None, [(-0.14, 0.18, 0.26, 0.10, 0.22, 0.22)], _WHITE),
    },
    "beak": {
        "cone": _Look([(0.28, 0.05, 0.23, 0.72, 0.11, 0.03)], _rgb(0xFA9E1A)),
        "needle": _Look([(0.30, 0.03, 0.11, 1.28, 0.00, 0.04)], _rgb(0x29262B)),
        "hook": _Look([
            (0.28, 0.00, 0.20, 0.62, 0.03, 0.18),
            (0.66, 0.05, 0.15, 0.72, 0.42, 0.03)], _rgb(0xF7F2E0)),
        "sickle": _Look([
            (0.30, 0.00, 0.11, 0.68, 0.04, 0.10),
            (0.68, 0.04, 0.10, 0.98, 0.24, 0.08),
            (0.98, 0.24, 0.08, 1.10, 0.60, 0.04)], _rgb(0xE64738)),
        "spoon": _Look([
            (0.30, 0.03, 0.11, 0.82, 0.08, 0.08),
            (0.88, 0.09, 0.17, 1.06, 0.11, 0.22)], _rgb(0x2E6BE6)),
    },
    "breast": {
        "clear": _Look(_CHEST),
        "spotted": _Look(_CHEST, _rgb(0xF2D03C), _dots(
            0.07, (0.58, -0.14), (0.78, -0.04), (0.48, 0.12), (0.72, 0.20),
            (0.46, 0.36), (0.64, 0.44), (0.24, 0.44), (0.40, 0.60), (0.14, 0.64),
            (-0.06, 0.52)), _BLACK),
        "streaked": _Look(_CHEST, _rgb(0x7FC4EE), [
            (x, y, 0.04, x - 0.14, y + 0.30, 0.04)
            for x, y in [(0.52, -0.24), (0.68, -0.14), (0.84, 0.00), (0.46, 0.10),
                         (0.64, 0.26), (0.40, 0.40), (0.20, 0.34), (0.02, 0.40)]],
            _BLACK),
        "bibbed": _Look(_CHEST, None, [(0.72, -0.16, 0.34, 0.62, 0.24, 0.26)], _BLACK),
        "rufous": _Look(_CHEST, _RUFOUS),
    },
    "wing": {
        "plain": _Look(_WING),
        "barred": _Look(_WING, None, [
            (-0.12, -0.40, 0.10, -0.22, 0.50, 0.10),
            (-0.50, -0.30, 0.10, -0.60, 0.50, 0.10)], _WHITE),
        "dotted": _Look(_WING, _rgb(0x1E2F8A), _dots(
            0.075, (0.10, -0.10), (0.02, 0.18), (-0.22, -0.07), (-0.30, 0.20),
            (-0.50, 0.04), (-0.62, 0.26), (-0.84, 0.14)), _WHITE),
        "tipped": _Look(
            _WING, None, [(-0.76, 0.16, 0.30, -1.20, 0.24, 0.30)], _rgb(0xDB3A2A)),
        "golden": _Look(
            _WING, None, [(-0.20, 0.08, 0.19, -0.42, 0.12, 0.15)], _rgb(0xFFCC1A)),
    },
    "tail": {
        "short": _Look([(0.10, 0.0, 0.17, -0.58, 0.03, 0.15)]),
        "forked": _Look([
            (0.10, 0.0, 0.14, -1.12, -0.44, 0.04),
            (0.10, 0.0, 0.14, -1.12, 0.44, 0.04)], _rgb(0x2E2933)),
        "fanned": _Look(
            [(0.10, 0.0, 0.10, -0.78, 0.25 * k, 0.13 - 0.01 * k * k)
             for k in (-2, -1, 0, 1, 2)], _WHITE,
            [(-0.86, -0.8, 0.12, -0.98, 0.0, 0.12),
             (-0.98, 0.0, 0.12, -0.86, 0.8, 0.12)], _BLACK),
        "long": _Look([(0.10, 0.0, 0.15, -1.45, 0.03, 0.08)], _rgb(0xA84529)),
        "racket": _Look(
            [(0.10, 0.0, 0.10, -0.95, 0.0, 0.05), (-1.05, 0.0, 0.20, -1.14, 0.0, 0.20)],
            _rgb(0x4099F2)),
    },
}
# fmt: on

# The values of each part, in the order of `Birds.attributes`. All parts have the same
# number of values, which the choice of classes relies on.
PARTS: dict[str, tuple[str, ...]] = {part: tuple(v) for part, v in _LOOKS.items()}
PART_NAMES: tuple[str, ...] = tuple(PARTS)
NUM_VALUES = 5


def render(
    attributes: Sequence[int] | np.ndarray, image_size: int, *, seed: int, index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws one bird.

    Args:
      attributes: one value 0..4 for each part, in the order of `PART_NAMES`.
      image_size: height and width in pixels.
      seed: non-negative; with `index` it decides all that the attributes do not.
      index: non-negative.

    Returns:
      The image, uint8 [H, W, 3] RGB, and the part map, int8 [H, W]: which part of
      `PART_NAMES` is visible in each pixel, -1 for none.
    """
    rng = np.random.default_rng((seed, 0, index))
    canvas = _Canvas(image_size)
    _paint_background(canvas, rng)
    pose = _Pose.draw(rng)
    _paint_bird(canvas, pose, [int(value) for value in attributes], rng)
    _paint_leaves(canvas, pose, rng)
    return _light(canvas.rgb, rng), canvas.parts


class _Canvas:
    """An image in the making, and which part each of its pixels shows."""

    def __init__(self, size: int):
        self.size = size
        self.rgb = np.zeros((size, size, 3), np.float32)
        self.parts = np.full((size, size), -1, np.int8)
        self._axis = np.arange(size, dtype=np.float32) + 0.5

    def paint(
        self,
        shape: np.ndarray,
        colour: np.ndarray,
        *,
        part: int | None = None,
        outline: float = 0.0,
        softness: float = 0.0,
        opacity: float = 1.0,
        clip: np.ndarray | None = None,
    ) -> np.ndarray:
        """Paints the union of capsules.

        Args:
          shape: [K, 6] capsules in image units (1 is the width of the image).
          colour: [3], 0 to 1.
          part: what `parts` becomes under the shape; None leaves it.
          outline: width of a darker rim, image units.
          softness: width of the edge's blur, image units.
          opacity: 0 to 1.
          clip: [H, W] coverage that limits the shape.

        Returns:
          The coverage, float32 [H, W] from 0 to 1, for clipping what is painted on
          the shape.
        """
        shape = shape.astype(np.float32) * np.float32(self.size)
        rim, blur = outline * self.size, max(1.0, softness * self.size)
        ends, radii = shape[:, [0, 1, 3, 4]].reshape(-1, 2), shape[:, [2, 5]]
        reach = radii.reshape(-1, 1) + (rim + blur)
        low = np.clip((ends - reach).min(0), 0, self.size).astype(int)
        high = np.clip((ends + reach).max(0) + 1, 0, self.size).astype(int)
        full = np.zeros((self.size, self.size), np.float32)
        if (low >= high).any():
            return full
        box = slice(low[1], high[1]), slice(low[0], high[0])
        distance = _distance(shape, self._axis[box[0]], self._axis[box[1]])
        inner = np.clip(0.5 - distance / blur, 0, 1)
        if clip is not None:
            inner *= clip[box]
        full[box] = inner
        rgb = self.rgb[box]
        if rim:
            outer = np.clip(0.5 + (rim - distance) / blur, 0, 1)
            rgb += outer[..., None] * (colour * np.float32(0.45) - rgb)
        else:
            outer = inner
        rgb += (np.float32(opacity) * inner)[..., None] * (colour - rgb)
        if part is not None:
            self.parts[box][outer > 0.5] = part
        return full


def _distance(shape: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Returns [H, W]: distance of pixels to a union of capsules, negative inside."""
    x0, y0, r0, x1, y1, r1 = shape.T[:, :, None, None]
    dx, dy = x1 - x0, y1 - y0
    x, y = columns - x0, rows[:, None] - y0
    along = np.clip((x * dx + y * dy) / np.maximum(dx * dx + dy * dy, 1e-9), 0, 1)
    x, y = x - along * dx, y - along * dy
    return (np.sqrt(x * x + y * y) - (r0 + along * (r1 - r0))).min(0)


@dataclasses.dataclass(frozen=True)
class _Pose:
    """Where the bird is and how it holds itself; angles in radians."""

    x: float
    y: float
    scale: float
    facing: float
    slim: float
    tilt: float
    nod: float
    wing: float
    tail: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "_Pose":
        return cls(
            x=rng.uniform(0.45, 0.55),
            y=rng.uniform(0.48, 0.58),
            scale=rng.uniform(0.22, 0.26),
            facing=1.0 if rng.random() < 0.5 else -1.0,
            slim=rng.uniform(0.86, 1.0),
            tilt=rng.uniform(-0.5, 0.2),
            nod=rng.uniform(-0.3, 0.35),
            wing=rng.uniform(-0.2, 0.35),
            tail=rng.uniform(-0.3, 0.4),
        )

    def place(
        self,
        shape: Sequence[tuple[float, ...]],
        pivot: tuple[float, float] = (0.0, 0.0),
        angle: float = 0.0,
    ) -> np.ndarray:
        """Returns [K, 6] capsules in image units of a shape in bird units.

        Args:
          shape: capsules relative to `pivot`.
          pivot: in the bird's frame.
          angle: turn about the pivot; positive lowers what is in front.
        """
        capsules = np.array(shape, np.float64)
        points = capsules[:, [0, 1, 3, 4]].reshape(-1, 2)
        points = points @ _turn(angle) + pivot
        points = points * (self.slim, 1.0) @ _turn(self.tilt)
        points = points * (self.scale * self.facing, self.scale) + (self.x, self.y)
        capsules[:, [0, 1, 3, 4]] = points.reshape(-1, 4)
        capsules[:, [2, 5]] *= self.scale
        return capsules


def _turn(angle: float) -> np.ndarray:
    """Returns the matrix that turns row vectors (x, y)."""
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, sin], [-sin, cos]])


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """Returns float32 [3] RGB of a colour whose hue goes round from 0 to 1."""
    ramps = np.abs((hue + np.array([0.0, 2 / 3, 1 / 3])) % 1.0 * 6 - 3) - 1
    return (value * (1 - saturation * (1 - np.clip(ramps, 0, 1)))).astype(np.float32)


def _paint_background(canvas: _Canvas, rng: np.random.Generator) -> None:
    """Paints sky, distant foliage or water, with clouds, light spots or reeds."""
    kind = rng.integers(3)
    low, high = [(0.48, 0.68), (0.16, 0.42), (0.0, 1.0)][kind]
    hue = rng.uniform(low, high)
    top = _hsv(hue, rng.uniform(0.1, 0.5), rng.uniform(0.5, 0.95))
    hue_below = hue + rng.uniform(-0.12, 0.12)
    bottom = _hsv(hue_below, rng.uniform(0.05, 0.45), rng.uniform(0.45, 0.95))
    ramp = np.linspace(0, 1, canvas.size, dtype=np.float32)[:, None, None]
    canvas.rgb[:] = top + (bottom - top) * ramp
    for _ in range(rng.integers(4, 9)):
        x, y, size, shift, value, opacity = rng.random(6)
        tone = hue + 0.16 * (shift - 0.5)
        colour = _hsv(tone, 0.1 + 0.4 * shift, 0.35 + 0.65 * value)
        if kind == 2:  # reeds
            lean = x + 0.3 * (shift - 0.5)
            blob = (x, 1.0, 0.008 + 0.02 * size, lean, 0.8 * y, 0.004)
            softness = 0.02
        else:
            radius = 0.05 + 0.15 * size
            blob = (x, y, radius, x + (0.25 if kind == 0 else 0.0), y, radius)
            softness = 0.16 if kind == 0 else 0.06
        opacity = 0.25 + 0.45 * opacity
        canvas.paint(np.array([blob]), colour, softness=softness, opacity=opacity)


def _paint_bird(
    canvas: _Canvas, pose: _Pose, attributes: list[int], rng: np.random.Generator
) -> None:
    """Paints the perch and the bird on it."""
    hue, rim = rng.uniform(0.05, 0.72), 0.09 * pose.scale
    coat = _hsv(hue, rng.uniform(0.15, 0.5), rng.uniform(0.45, 0.75))
    wing = _hsv(hue + rng.uniform(-0.05, 0.05), rng.uniform(0.2, 0.5), 0.42)
    belly = _hsv(rng.uniform(0.08, 0.2), rng.uniform(0.05, 0.25), 0.92)
    leg = _hsv(rng.uniform(0.04, 0.14), rng.uniform(0.3, 0.9), 0.6)
    bark = _hsv(rng.uniform(0.03, 0.12), rng.uniform(0.2, 0.5), rng.uniform(0.25, 0.5))
    lean, thickness = rng.uniform(-0.35, 0.35), rng.uniform(0.07, 0.14)

    def paint_part(
        name: str,
        own: np.ndarray,
        pivot: tuple[float, float] = (0.0, 0.0),
        angle: float = 0.0,
        clip: np.ndarray | None = None,
    ) -> None:
        part = PART_NAMES.index(name)
        look = _LOOKS[name][PARTS[name][attributes[part]]]
        shape = pose.place(look.shape, pivot, angle)
        colour = own if look.colour is None else look.colour
        edge = rim if clip is None else 0.0
        area = canvas.paint(shape, colour, part=part, outline=edge, clip=clip)
        if look.ink is not None:
            canvas.paint(pose.place(look.pattern, pivot, angle), look.ink, clip=area)

    perch = [(-6.0, 0.0, thickness, 6.0, 0.0, thickness)]
    canvas.paint(pose.place(perch, _FEET, lean), bark, outline=rim)
    paint_part("tail", wing, _RUMP, pose.tail)
    canvas.paint(pose.place(_LEGS), leg)
    body = canvas.paint(pose.place(_BODY), coat, part=-1, outline=rim)
    paint_part("breast", belly, clip=body)
    paint_part("wing", wing, _SHOULDER, pose.wing)
    paint_part("head", coat, _NECK, pose.nod)
    paint_part("beak", coat, _NECK, pose.nod)
    for radius, colour in [(0.12, _WHITE), (0.085, _BLACK)]:
        eye = pose.place(_dots(radius, (0.13, -0.06)), _NECK, pose.nod)
        canvas.paint(eye, colour)


def _paint_leaves(canvas: _Canvas, pose: _Pose, rng: np.random.Generator) -> None:
    """Paints up to three leaves, now and then in front of a part of the bird."""
    hue, value = rng.uniform(0.18, 0.40), rng.uniform(0.3, 0.7)
    for _ in range(rng.integers(0, 4)):
        x, y, angle, size, shade = rng.random(5)
        angle, length = 2 * math.pi * angle, 0.06 + 0.035 * size
        x, y = pose.x + 0.9 * (x - 0.5), pose.y + 0.7 * (y - 0.5)
        dx, dy = length * math.cos(angle), length * math.sin(angle)
        width = 0.03 + 0.015 * size
        middle, ends = (x, y, width), [(x + dx, y + dy, 0.004), (x - dx, y - dy, 0.004)]
        colour = _hsv(hue + 0.06 * (shade - 0.5), 0.65, value + 0.2 * (shade - 0.5))
        leaf = np.array([middle + end for end in ends])
        canvas.paint(leaf, colour, part=-1, outline=0.008)
        canvas.paint(np.array([ends[0] + ends[1]]), colour * np.float32(0.7))


def _light(rgb: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns uint8 [H, W, 3]: the picture under a random light, with some noise."""
    size = len(rgb)
    gain = rng.uniform(0.75, 1.15) * rng.uniform(0.88, 1.12, 3)
    contrast, slope = rng.uniform(0.75, 1.1), rng.uniform(0.0, 0.5)
    angle = rng.uniform(0.0, 2 * math.pi)
    axis = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    shade = 1 + slope * (math.cos(angle) * axis + math.sin(angle) * axis[:, None])
    rgb = (rgb - 0.5) * contrast + 0.5
    rgb *= shade[..., None] * gain.astype(np.float32)
    rgb += 0.06 * (rng.random((size, size, 1), np.float32) - 0.5)
    return (np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8)
