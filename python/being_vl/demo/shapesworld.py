"""ShapesWorld: seeded pictures of coloured shapes, with records of all four categories.

A picture is 64×64 pixels, 8×8 cells of 8 pixels. Its objects (small: 2×2 cells, large: 3×3 cells) sit on the
cells and never touch each other. A `Scene` says all about its picture, so every answer can be checked.

Training and held-out scenes are disjoint by construction: a scene's own hash says to which of the two it
belongs.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from being_vl.files import digest, write_aside, write_json

CELL = 8
CELLS = 8
PIXELS = CELL * CELLS

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (215, 40, 45),
    "green": (40, 165, 65),
    "blue": (45, 80, 220),
    "yellow": (240, 205, 45),
    "purple": (150, 55, 185),
    "cyan": (50, 200, 215),
}
SIZES = {"small": 2, "large": 3}
TEXTURES = ("plain", "striped")
BACKGROUNDS = {
    "dark": ((45, 45, 50),) * 2,
    "light": ((225, 222, 215),) * 2,
    "checked": ((150, 150, 150), (105, 105, 110)),
}
MAX_OBJECTS = 4

Split = Literal["train", "held-out"]
T = TypeVar("T")


@dataclass(frozen=True)
class Thing:
    """One object; `row` and `column` are the cell of its top left corner."""

    shape: str
    colour: str
    size: str
    texture: str
    row: int
    column: int

    @property
    def cells(self) -> int:
        """Side of its bounding square, in cells."""
        return SIZES[self.size]

    @property
    def middle(self) -> tuple[float, float]:
        """Its centre (row, column), in cells."""
        return self.row + self.cells / 2, self.column + self.cells / 2

    @property
    def name(self) -> str:
        """Colour and shape, for example `red circle`; unique within a scene."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A background and one to four objects, in raster order of their corners."""

    background: str
    things: tuple[Thing, ...]

    @property
    def split(self) -> Split:
        """The split that may use this scene: one scene in eight is held out."""
        return "held-out" if int(digest(asdict(self))[:8], 16) % 8 == 0 else "train"

    def only(self, attribute: str) -> list[Thing]:
        """The objects that no other object of the scene equals in `attribute`."""
        count = Counter(getattr(thing, attribute) for thing in self.things)
        return [thing for thing in self.things if count[getattr(thing, attribute)] == 1]


@dataclass(frozen=True)
class Question:
    """One question with its answer; `kind` groups questions in the results."""

    kind: str
    text: str
    answer: str


def _pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


def sample_scene(rng: np.random.Generator, split: Split, max_objects: int = MAX_OBJECTS) -> Scene:
    """Draw a scene of `split` with 1 to `max_objects` objects, each number equally likely."""
    wanted = int(rng.integers(1, max_objects + 1))
    while True:
        free = np.ones((CELLS, CELLS), dtype=bool)
        things: list[Thing] = []
        names: set[str] = set()
        for _ in range(40):
            size = _pick(rng, list(SIZES))
            cells = SIZES[size]
            row, column = (int(v) for v in rng.integers(0, CELLS - cells + 1, size=2))
            shape, colour, texture = _pick(rng, SHAPES), _pick(rng, list(COLOURS)), _pick(rng, TEXTURES)
            thing = Thing(shape, colour, size, texture, row, column)
            if thing.name in names or not free[row : row + cells, column : column + cells].all():
                continue
            free[max(row - 1, 0) : row + cells + 1, max(column - 1, 0) : column + cells + 1] = False
            things.append(thing)
            names.add(thing.name)
            if len(things) == wanted:
                break
        things.sort(key=lambda thing: (thing.row, thing.column))
        scene = Scene(_pick(rng, list(BACKGROUNDS)), tuple(things))
        if len(things) == wanted and scene.split == split:
            return scene


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draw `scene` as a 64×64 RGB picture; `rng` shifts the colours a little, as light does."""

    def shifted(colour: tuple[int, int, int]) -> NDArray[np.float32]:
        return np.asarray(colour, np.float32) + rng.integers(-8, 9, size=3)

    first, second = (shifted(colour) for colour in BACKGROUNDS[scene.background])
    if scene.background != "checked":
        second = first
    rows, columns = np.indices((PIXELS, PIXELS)) // (CELL // 2)
    pixels = np.where(((rows + columns) % 2 == 0)[..., None], first, second)
    for thing in scene.things:
        side = thing.cells * CELL
        top, left = thing.row * CELL, thing.column * CELL
        window = pixels[top : top + side, left : left + side]
        colour = np.broadcast_to(shifted(COLOURS[thing.colour]), window.shape)
        if thing.texture == "striped":
            bright = (np.arange(side) % 4 >= 2)[:, None, None]
            colour = np.where(bright, 0.35 * colour + 0.65 * 250, colour)
        mask = _mask(thing.shape, thing.cells)[:, :, None]
        window[:] = mask * colour + (1 - mask) * window
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


@cache
def _mask(shape: str, cells: int) -> NDArray[np.float32]:
    """Coverage 0..1 of each pixel of the bounding square, by supersampling."""
    side, scale = cells * CELL, 8
    end = side * scale - 1
    image = Image.new("L", (side * scale, side * scale))
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((0, 0, end, end), fill=255)
    elif shape == "square":
        margin = scale
        pen.rectangle((margin, margin, end - margin, end - margin), fill=255)
    elif shape == "triangle":
        pen.polygon([(end / 2, 0), (end, end), (0, end)], fill=255)
    else:
        third = end * 0.31
        pen.rectangle((third, 0, end - third, end), fill=255)
        pen.rectangle((0, third, end, end - third), fill=255)
    covered = image.resize((side, side), Image.Resampling.BOX)
    return np.asarray(covered, np.float32) / np.float32(255)


def caption(scene: Scene) -> str:
    """All objects in raster order of their corners, then the background."""
    return ", ".join(f"a {thing.name}" for thing in scene.things) + f", on a {scene.background} background."


def named_objects(text: str) -> set[str]:
    """The objects (`red circle`) that a caption names; what `caption` is scored by."""
    words = text.lower().replace(",", " ").replace(".", " ").split()
    return {f"{a} {b}" for a, b in pairwise(words) if a in COLOURS and b in SHAPES}


# One function per kind of question; it returns None where the scene allows no unambiguous one.


def _attribute(
    attribute: str, by: str, pattern: str
) -> Callable[[Scene, np.random.Generator], Question | None]:
    """Ask for `attribute` of an object that is the only one of its `by`."""

    def ask(scene: Scene, rng: np.random.Generator) -> Question | None:
        things = scene.only(by)
        if not things:
            return None
        thing = _pick(rng, things)
        return Question(attribute, pattern.format(getattr(thing, by)), getattr(thing, attribute))

    return ask


def _background(scene: Scene, rng: np.random.Generator) -> Question:
    return Question("background", "what is the background?", scene.background)


def _count(scene: Scene, rng: np.random.Generator) -> Question:
    return Question("count", "how many objects are there?", str(len(scene.things)))


def _two(
    scene: Scene, rng: np.random.Generator, differ: Callable[[Thing, Thing], bool]
) -> tuple[Thing, Thing] | None:
    """Two objects, in random order, each the only one of its shape, for which `differ` holds."""
    things = scene.only("shape")
    pairs = [(a, b) for a in things for b in things if a != b and differ(a, b)]
    return _pick(rng, pairs) if pairs else None


def _compare(scene: Scene, rng: np.random.Generator) -> Question | None:
    pair = _two(scene, rng, lambda a, b: a.size != b.size)
    if pair is None:
        return None
    a, b = pair
    return Question(
        "compare", f"is the {a.shape} larger than the {b.shape}?", "yes" if a.cells > b.cells else "no"
    )


def _relation(axis: int, word: str) -> Callable[[Scene, np.random.Generator], Question | None]:
    def ask(scene: Scene, rng: np.random.Generator) -> Question | None:
        pair = _two(scene, rng, lambda a, b: abs(a.middle[axis] - b.middle[axis]) >= 1)
        if pair is None:
            return None
        a, b = pair
        answer = "yes" if a.middle[axis] < b.middle[axis] else "no"
        return Question(word, f"is the {a.shape} {word} the {b.shape}?", answer)

    return ask


_PERCEPTION = (
    _attribute("colour", "shape", "what colour is the {}?"),
    _attribute("shape", "colour", "what shape is the {} object?"),
    _attribute("size", "shape", "how large is the {}?"),
    _attribute("texture", "shape", "what is the texture of the {}?"),
    _background,
)
_REASONING = (_count, _compare, _relation(0, "above"), _relation(1, "left of"))


def perception(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Attributes of single objects and of the background, in random order."""
    return _ask_all(_PERCEPTION, scene, rng)


def reasoning(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Counting, comparison and spatial relations, in random order; yes and no are equally likely."""
    return _ask_all(_REASONING, scene, rng)


def instruction(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """A conversation in which later questions refer to what was said before."""
    colours = Question("list colours", "list the colours.", ", ".join(thing.colour for thing in scene.things))
    shapes = Question("list shapes", "list the shapes.", ", ".join(thing.shape for thing in scene.things))
    lists = [colours, shapes] if rng.integers(2) else [shapes, colours]
    if not scene.only("shape"):
        return lists
    thing = _pick(rng, scene.only("shape"))
    first = Question("colour", f"what colour is the {thing.shape}?", thing.colour)
    follow_ups = [
        Question("its size", "how large is it?", thing.size),
        Question("its texture", "what is its texture?", thing.texture),
    ]
    return [lists[0], first, _pick(rng, follow_ups)]


def _ask_all(
    kinds: tuple[Callable[[Scene, np.random.Generator], Question | None], ...],
    scene: Scene,
    rng: np.random.Generator,
) -> list[Question]:
    asked = [kind(scene, rng) for kind in kinds]
    questions = [question for question in asked if question is not None]
    return [questions[i] for i in rng.permutation(len(questions))]


def conversations(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, list[Question]]]:
    """Per category, one conversation about `scene`."""
    yield "foundation", [Question("caption", "describe the picture.", caption(scene))]
    yield "perception", perception(scene, rng)
    yield "reasoning", reasoning(scene, rng)
    yield "instruction", instruction(scene, rng)


def describe(scene: Scene) -> str:
    """The scene in words, its objects in the order of the picture's tokens."""
    things = "; ".join(f"{thing.size} {thing.texture} {thing.name}" for thing in scene.things)
    return f"{scene.background}; {things}."


def _record(
    name: str, category: str, questions: list[Question], image: str | None, opening: str
) -> dict[str, Any]:
    turns = []
    for n, question in enumerate(questions):
        text = f"{opening}\n{question.text}" if n == 0 else question.text
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": question.answer}]
    record = {"id": f"{name}-{category}", "category": category, "conversations": turns}
    if image is not None:
        record["image"] = image
    return record | {"kinds": [question.kind for question in questions]}


def generate(
    out: Path, count: int, seed: int = 0, split: Split = "train", max_objects: int = MAX_OBJECTS
) -> None:
    """Write `count` pictures and four records of each, one per category.

    Writes `out/images/<split>-00000.png` and so on, `out/<split>.json` (LLaVA JSON; beside the usual fields
    each record has `kinds`, the kind of each of its questions) and `out/<split>-scenes.json` (image name →
    scene). The same arguments give the same bytes, and picture n does not depend on `count`.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    records, scenes = [], {}
    for n in range(count):
        rng = np.random.default_rng([seed, split == "held-out", n])
        scene = sample_scene(rng, split, max_objects)
        name = f"{split}-{n:05d}"
        draw(scene, rng).save(out / "images" / f"{name}.png")
        scenes[f"{name}.png"] = asdict(scene)
        for category, questions in conversations(scene, rng):
            records.append(_record(name, category, questions, f"{name}.png", "<image>"))
    _write_lines(out / f"{split}.json", records)
    write_json(out / f"{split}-scenes.json", scenes)


def generate_text(out: Path, count: int, seed: int = 0, max_objects: int = MAX_OBJECTS) -> None:
    """Write `out/text.json`: records of `count` training scenes described in words instead of drawn."""
    records = []
    for n in range(count):
        rng = np.random.default_rng([seed, 2, n])
        scene = sample_scene(rng, "train", max_objects)
        for category, questions in conversations(scene, rng):
            records.append(_record(f"text-{n:05d}", category, questions, None, describe(scene)))
    _write_lines(out / "text.json", records)


def read_scenes(path: Path) -> dict[str, Scene]:
    """Read the scenes that `generate` wrote: image name → scene."""
    return {
        name: Scene(scene["background"], tuple(Thing(**thing) for thing in scene["things"]))
        for name, scene in json.loads(path.read_text(encoding="utf-8")).items()
    }


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write `records` as one JSON array, a record a line: a quarter of the size of indented JSON."""
    with write_aside(path) as aside:
        lines = ",\n".join(json.dumps(record) for record in records)
        aside.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
