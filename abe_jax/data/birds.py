"""Birds: a generated, deterministic fine-grained data set that needs no download.

A class is a combination of part attributes, as a bird species is: one of five
heads, beaks, breasts, wings and tails each. An image of a class varies everything
else: pose, scale, position, plumage colour, background, light and occlusion. Two
classes differ in two parts or more, so a representation that attends to the parts
tells classes apart that it never saw, and one that does not cannot.

Every image is a function of (seed, index, image_size, attributes) alone, and all
random choices are made without looking at the attributes: changing the attribute
of one part changes that part of the picture and nothing else.

Everything is drawn with one primitive, the tapered capsule: a row
(x0, y0, r0, x1, y1, r1) is a line whose thickness goes from r0 to r1.
"""

import dataclasses
import math
import operator
from collections.abc import Sequence

import numpy as np

# The values of each part, in the order of `Birds.attributes`. All parts have the same
# number of values, which the choice of classes relies on.
PARTS: dict[str, tuple[str, ...]] = {
    "head": ("plain", "capped", "masked", "crested", "cheeked"),
    "beak": ("cone", "needle", "hook", "sickle", "spoon"),
    "breast": ("clear", "spotted", "streaked", "bibbed", "rufous"),
    "wing": ("plain", "barred", "dotted", "tipped", "golden"),
    "tail": ("short", "forked", "fanned", "long", "racket"),
}
PART_NAMES: tuple[str, ...] = tuple(PARTS)
NUM_VALUES = 5
MAX_CLASSES = NUM_VALUES ** (len(PARTS) - 1)

_HEAD, _BEAK, _BREAST, _WING, _TAIL = range(5)
_BLACK = np.array([0.09, 0.08, 0.10], np.float32)
_WHITE = np.array([0.97, 0.96, 0.92], np.float32)
_RED = np.array([0.86, 0.10, 0.10], np.float32)
_GOLD = np.array([1.00, 0.80, 0.10], np.float32)
_RUFOUS = np.array([0.90, 0.38, 0.10], np.float32)
_CHESTNUT = np.array([0.66, 0.27, 0.16], np.float32)
_BLUE = np.array([0.25, 0.60, 0.95], np.float32)
_BEAK_COLOURS = np.array(
    [
        [0.98, 0.62, 0.10],
        [0.16, 0.15, 0.17],
        [0.93, 0.87, 0.70],
        [0.90, 0.28, 0.22],
        [0.42, 0.60, 0.80],
    ],
    np.float32,
)

# Shapes in bird units (half a body long), x forwards and y down, relative to the
# middle of the head for heads and beaks, the shoulder for wings, the rump for tails.
_BODY = [(-0.72, 0.22, 0.25, 0.20, 0.06, 0.64), (0.25, -0.10, 0.48, 0.55, -0.50, 0.36)]
_BELLY = [(0.66, -0.04, 0.44, 0.05, 0.56, 0.44)]
_HEAD_SHAPE = [(0.0, 0.0, 0.43, 0.0, 0.0, 0.43)]
_CREST = [
    (0.12, -0.30, 0.16, -0.12, -0.92, 0.03),
    (-0.05, -0.25, 0.18, -0.48, -0.80, 0.03),
    (-0.20, -0.12, 0.18, -0.72, -0.50, 0.03),
]
_CAP = [(-0.40, -0.24, 0.17, 0.28, -0.36, 0.20)]
_MASK = [(-0.45, -0.03, 0.13, 0.45, -0.03, 0.13)]
_CHEEK = [(-0.10, 0.20, 0.20, 0.08, 0.22, 0.16)]
_BEAKS = [
    [(0.28, 0.05, 0.23, 0.72, 0.11, 0.03)],
    [(0.30, 0.03, 0.11, 1.28, 0.00, 0.04)],
    [(0.28, 0.00, 0.20, 0.62, 0.03, 0.18), (0.66, 0.05, 0.15, 0.72, 0.42, 0.03)],
    [
        (0.30, 0.00, 0.11, 0.68, 0.04, 0.10),
        (0.68, 0.04, 0.10, 0.98, 0.24, 0.08),
        (0.98, 0.24, 0.08, 1.10, 0.60, 0.04),
    ],
    [(0.30, 0.03, 0.11, 0.82, 0.08, 0.08), (0.88, 0.09, 0.17, 1.06, 0.11, 0.22)],
]
_WING_SHAPE = [(-0.04, 0.02, 0.31, -0.98, 0.18, 0.12)]
_WING_BARS = [
    (-0.12, -0.40, 0.065, -0.22, 0.50, 0.065),
    (-0.44, -0.30, 0.065, -0.54, 0.50, 0.065),
]
_WING_DOTS = [
    (x, y, 0.075, x, y, 0.075)
    for x, y in [(0.1, -0.1), (0.02, 0.18), (-0.22, -0.07), (-0.3, 0.2), (-0.5, 0.04)]
    + [(-0.62, 0.26), (-0.84, 0.14)]
]
_WING_TIP = [(-0.86, 0.16, 0.30, -1.20, 0.24, 0.30)]
_WING_PATCH = [(-0.20, 0.08, 0.19, -0.42, 0.12, 0.15)]
_BREAST_SPOTS = [
    (x, y, 0.07, x, y, 0.07)
    for x, y in [(0.58, -0.14), (0.78, -0.04), (0.48, 0.12), (0.72, 0.2), (0.46, 0.36)]
    + [(0.64, 0.44), (0.24, 0.44), (0.4, 0.6), (0.14, 0.64), (-0.06, 0.52)]
]
_BREAST_STREAKS = [
    (x, y, 0.04, x - 0.14, y + 0.30, 0.04)
    for x, y in [(0.52, -0.24), (0.68, -0.14), (0.84, 0.00), (0.46, 0.10)]
    + [(0.64, 0.26), (0.40, 0.40), (0.20, 0.34), (0.02, 0.40)]
]
_BIB = [(0.76, -0.16, 0.26, 0.72, 0.16, 0.18)]
_TAILS = [
    [(0.10, 0.0, 0.17, -0.58, 0.03, 0.15)],
    [(0.1, 0.0, 0.14, -1.12, -0.44, 0.04), (0.1, 0.0, 0.14, -1.12, 0.44, 0.04)],
    [(0.1, 0.0, 0.10, -0.78, 0.25 * k, 0.13 - 0.01 * k * k) for k in range(-2, 3)],
    [(0.10, 0.0, 0.15, -1.45, 0.03, 0.08)],
    [(0.1, 0.0, 0.10, -0.95, 0.0, 0.05), (-1.05, 0.0, 0.20, -1.14, 0.0, 0.20)],
]
_FAN_BAND = [
    (-0.86, -0.8, 0.12, -0.98, 0.0, 0.12),
    (-0.98, 0.0, 0.12, -0.86, 0.8, 0.12),
]
_RACKET_DISC = [(-1.05, 0.0, 0.20, -1.14, 0.0, 0.20)]


class Birds:
    """Generated birds: `num_classes` species with `images_per_class` images each.

    Image i belongs to class ``i // images_per_class``. The class list of a smaller
    `num_classes` is the beginning of that of a larger one. The object is a random
    access data source (`len`, indexing), holds no random state, and is picklable.

    Attributes:
      labels: int32 [N], class of each image, ascending.
      class_names: unique slugs such as
        ``"007.capped-head.hook-beak.spotted-breast.plain-wing.forked-tail"``; their
        alphabetical order is the order of the classes.
      attributes: int64 [num_classes, num_parts], values 0..4 that index `PARTS`.
    """

    def __init__(
        self,
        *,
        num_classes: int = 128,
        images_per_class: int = 24,
        image_size: int = 64,
        seed: int = 0,
    ):
        """Chooses the classes; images are drawn when they are asked for.

        Args:
          num_classes: number of classes, 1 to 625.
          images_per_class: number of images of each class, at least 1.
          image_size: height and width in pixels, at least 16.
          seed: any non-negative integer; chooses the classes and all images.

        Raises:
          ValueError: an argument is out of its range.
        """
        if not 1 <= num_classes <= MAX_CLASSES:
            raise ValueError(
                f"num_classes is {num_classes}, but must be from 1 to {MAX_CLASSES}, "
                "the number of part combinations that differ in two parts or more."
            )
        if images_per_class < 1:
            raise ValueError(
                f"images_per_class is {images_per_class}, but must be at least 1."
            )
        if image_size < 16:
            raise ValueError(
                f"image_size is {image_size}, but must be at least 16 pixels."
            )
        if seed < 0:
            raise ValueError(f"seed is {seed}, but must be 0 or larger.")
        self.image_size = image_size
        self.images_per_class = images_per_class
        self.seed = seed
        self.attributes = _choose_classes(num_classes, seed)
        self.class_names = tuple(
            f"{number:03d}."
            + ".".join(
                f"{PARTS[part][value]}-{part}"
                for part, value in zip(PART_NAMES, row, strict=True)
            )
            for number, row in enumerate(self.attributes.tolist())
        )
        self.labels = np.repeat(
            np.arange(num_classes, dtype=np.int32), images_per_class
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns image `index`: uint8 [H, W, 3], RGB; IndexError outside 0..N-1."""
        return self._render(index)[0]

    def part_masks(self, index: int) -> np.ndarray:
        """Returns where each part is visible in image `index`.

        Args:
          index: 0..N-1; IndexError outside.

        Returns:
          bool [num_parts, H, W] in the order of `PART_NAMES`: the pixels of each part
          that nothing hides. The masks are disjoint; one may be empty.
        """
        parts = self._render(index)[1]
        return parts == np.arange(len(PART_NAMES), dtype=np.int8)[:, None, None]

    def name(self, index: int) -> str:
        """Returns a unique path-like name, e.g. ``birds/<class name>/0007.png``."""
        label, number = divmod(self._checked(index), self.images_per_class)
        return f"birds/{self.class_names[label]}/{number:04d}.png"

    def _checked(self, index: int) -> int:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index is {index}, but must be from 0 to {len(self) - 1}")
        return index

    def _render(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        index = self._checked(index)
        attributes = self.attributes[index // self.images_per_class]
        return render(attributes, self.image_size, seed=self.seed, index=index)


def _choose_classes(num_classes: int, seed: int) -> np.ndarray:
    """Returns int64 [num_classes, num_parts]: distinct, balanced part combinations.

    Combinations whose values sum to 0 modulo 5 differ in at least two parts from one
    another. They fall into groups of five (add 1 to every value), in each of which
    every part takes every value once; taking whole groups in a random order therefore
    keeps both halves of the classes balanced.
    """
    rng = np.random.default_rng((seed, 1))
    free = len(PARTS) - 2
    # One member of each group has 0 as its first value.
    digits = np.indices((NUM_VALUES,) * free).reshape(free, -1).T
    first = np.insert(digits, 0, 0, axis=1)
    groups = np.insert(first, first.shape[1], -first.sum(1), axis=1)
    groups = groups[rng.permutation(len(groups)), None, :]
    shifts = np.argsort(rng.random((len(groups), NUM_VALUES)), axis=1)
    words = (groups + shifts[:, :, None]) % NUM_VALUES
    # Relabelling the values of each part makes the sum rule invisible.
    relabel = np.argsort(rng.random((len(PARTS), NUM_VALUES)), axis=1)
    words = relabel[np.arange(len(PARTS)), words.reshape(-1, len(PARTS))]
    return words[:num_classes].astype(np.int64)


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
        keep: bool = False,
    ) -> np.ndarray | None:
        """Paints the union of capsules.

        Args:
          shape: [K, 6] capsules in image units (1 is the width of the image).
          colour: [3], 0 to 1.
          part: what `parts` becomes under the shape; None leaves it.
          outline: width of a darker rim, image units.
          softness: width of the edge's blur, image units.
          opacity: 0 to 1.
          clip: [H, W] coverage that limits the shape.
          keep: whether to return the coverage.

        Returns:
          The coverage, float32 [H, W] from 0 to 1, for clipping what is painted on
          the shape; None unless `keep`.
        """
        shape = shape.astype(np.float32) * np.float32(self.size)
        rim, blur = outline * self.size, max(1.0, softness * self.size)
        ends, radii = shape[:, [0, 1, 3, 4]].reshape(-1, 2), shape[:, [2, 5]]
        reach = radii.reshape(-1, 1) + (rim + blur)
        low = np.clip((ends - reach).min(0), 0, self.size).astype(int)
        high = np.clip((ends + reach).max(0) + 1, 0, self.size).astype(int)
        full = np.zeros((self.size, self.size), np.float32) if keep else None
        if (low >= high).any():
            return full
        box = slice(low[1], high[1]), slice(low[0], high[0])
        distance = _distance(shape, self._axis[box[0]], self._axis[box[1]])
        inner = np.clip(0.5 - distance / blur, 0, 1)
        if clip is not None:
            inner *= clip[box]
        if full is not None:
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
            x=rng.uniform(0.44, 0.56),
            y=rng.uniform(0.46, 0.58),
            scale=rng.uniform(0.20, 0.26),
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
    hue = [rng.uniform(0.48, 0.68), rng.uniform(0.16, 0.42), rng.uniform(0.0, 1.0)]
    hue = hue[kind]
    top = _hsv(hue, rng.uniform(0.1, 0.5), rng.uniform(0.5, 0.95))
    bottom = _hsv(
        hue + rng.uniform(-0.12, 0.12), rng.uniform(0.05, 0.45), rng.uniform(0.45, 0.95)
    )
    ramp = np.linspace(0, 1, canvas.size, dtype=np.float32)[:, None, None]
    canvas.rgb[:] = top + (bottom - top) * ramp
    for _ in range(rng.integers(4, 9)):
        x, y, size, shift, value, opacity = rng.random(6)
        colour = _hsv(
            hue + 0.16 * (shift - 0.5), 0.1 + 0.4 * shift, 0.35 + 0.65 * value
        )
        if kind == 2:  # reeds
            lean = x + 0.3 * (shift - 0.5)
            blob = (x, 1.0, 0.008 + 0.02 * size, lean, 0.8 * y, 0.004)
            softness = 0.02
        else:
            radius = 0.05 + 0.15 * size
            blob = (x, y, radius, x + (0.25 if kind == 0 else 0.0), y, radius)
            softness = 0.16 if kind == 0 else 0.06
        canvas.paint(
            np.array([blob]), colour, softness=softness, opacity=0.25 + 0.45 * opacity
        )


def _paint_bird(
    canvas: _Canvas, pose: _Pose, attributes: list[int], rng: np.random.Generator
) -> None:
    """Paints the perch and the bird on it."""
    hue, rim = rng.uniform(0.05, 0.72), 0.09 * pose.scale
    coat = _hsv(hue, rng.uniform(0.15, 0.5), rng.uniform(0.45, 0.75))
    wing = _hsv(hue + rng.uniform(-0.05, 0.05), rng.uniform(0.2, 0.5), 0.42)
    belly = _hsv(rng.uniform(0.08, 0.2), rng.uniform(0.05, 0.25), 0.92)
    legging = _hsv(rng.uniform(0.04, 0.14), rng.uniform(0.3, 0.9), 0.6)
    bark = _hsv(rng.uniform(0.03, 0.12), rng.uniform(0.2, 0.5), rng.uniform(0.25, 0.5))
    lean, thickness = rng.uniform(-0.35, 0.35), rng.uniform(0.07, 0.14)

    head, beak, breast, wing_kind, tail = attributes
    perch = [(-6.0, 0.0, thickness, 6.0, 0.0, thickness)]
    canvas.paint(pose.place(perch, (0.1, 1.06), lean), bark, outline=rim)
    rump = (-0.78, 0.24)
    feathers = [coat, _BLACK * 2, wing, _CHESTNUT, wing][tail]
    shape = pose.place(_TAILS[tail], rump, pose.tail)
    fan = canvas.paint(shape, feathers, part=_TAIL, outline=rim, keep=True)
    pattern = [None, None, _FAN_BAND, None, _RACKET_DISC][tail]
    if pattern:
        colour = _WHITE if tail == 2 else _BLUE
        canvas.paint(pose.place(pattern, rump, pose.tail), colour, clip=fan)
    legs = [(0.0, 0.5, 0.05, 0.06, 1.02, 0.04), (0.22, 0.5, 0.05, 0.26, 1.02, 0.04)]
    canvas.paint(pose.place(legs), legging)

    body = canvas.paint(pose.place(_BODY), coat, part=-1, outline=rim, keep=True)
    front = belly if breast != 4 else _RUFOUS
    chest = canvas.paint(pose.place(_BELLY), front, part=_BREAST, clip=body, keep=True)
    pattern = [None, _BREAST_SPOTS, _BREAST_STREAKS, _BIB, None][breast]
    if pattern:
        canvas.paint(pose.place(pattern), _BLACK, clip=chest)

    shoulder = (0.06, -0.04)
    shape = pose.place(_WING_SHAPE, shoulder, pose.wing)
    folded = canvas.paint(shape, wing, part=_WING, outline=rim, keep=True)
    pattern = [None, _WING_BARS, _WING_DOTS, _WING_TIP, _WING_PATCH][wing_kind]
    if pattern:
        colour = [_WHITE, _WHITE, _WHITE, _BLACK, _GOLD][wing_kind]
        canvas.paint(pose.place(pattern, shoulder, pose.wing), colour, clip=folded)

    neck = (0.60, -0.56)
    if head == 3:
        crest = pose.place(_CREST, neck, pose.nod)
        canvas.paint(crest, coat, part=_HEAD, outline=rim)
    shape = pose.place(_HEAD_SHAPE, neck, pose.nod)
    skull = canvas.paint(shape, coat, part=_HEAD, outline=rim, keep=True)
    pattern = [None, _CAP, _MASK, None, _CHEEK][head]
    if pattern:
        colour = [_WHITE, _RED, _BLACK, _WHITE, _WHITE][head]
        canvas.paint(pose.place(pattern, neck, pose.nod), colour, clip=skull)
    bill = pose.place(_BEAKS[beak], neck, pose.nod)
    canvas.paint(bill, _BEAK_COLOURS[beak], part=_BEAK, outline=rim)
    for radius, colour in [(0.12, _WHITE), (0.085, _BLACK)]:
        eye = [(0.13, -0.06, radius) * 2]
        canvas.paint(pose.place(eye, neck, pose.nod), colour)


def _paint_leaves(canvas: _Canvas, pose: _Pose, rng: np.random.Generator) -> None:
    """Paints up to three leaves, now and then in front of a part of the bird."""
    hue, value = rng.uniform(0.18, 0.40), rng.uniform(0.3, 0.7)
    for _ in range(rng.integers(0, 4)):
        x, y, angle, size, shade = rng.random(5)
        half = (0.07 + 0.04 * size) * np.array(
            [math.cos(6.283 * angle), math.sin(6.283 * angle)]
        )
        x, y = pose.x + 0.9 * (x - 0.5), pose.y + 0.7 * (y - 0.5)
        width = 0.035 + 0.02 * size
        leaf = np.array(
            [
                (x, y, width, x + half[0], y + half[1], 0.004),
                (x, y, width, x - half[0], y - half[1], 0.004),
            ]
        )
        colour = _hsv(hue + 0.06 * (shade - 0.5), 0.65, value + 0.2 * (shade - 0.5))
        canvas.paint(leaf, colour, part=-1, outline=0.008)
        vein = np.array(
            [(x + half[0], y + half[1], 0.004, x - half[0], y - half[1], 0)]
        )
        canvas.paint(vein, colour * np.float32(0.7))


def _light(rgb: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns uint8 [H, W, 3]: the picture under a random light, with some noise."""
    size = len(rgb)
    gain = rng.uniform(0.75, 1.15) * rng.uniform(0.88, 1.12, 3)
    contrast, angle, slope = rng.uniform(0.75, 1.1), rng.uniform(0, 6.283), rng.random()
    axis = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    slope *= 0.5
    shade = 1 + slope * (math.cos(angle) * axis + math.sin(angle) * axis[:, None])
    rgb = (rgb - np.float32(0.5)) * np.float32(contrast) + np.float32(0.5)
    rgb *= shade[..., None].astype(np.float32) * gain.astype(np.float32)
    rgb += np.float32(0.06) * (
        rng.random((size, size, 1), np.float32) - np.float32(0.5)
    )
    return (np.clip(rgb, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)
