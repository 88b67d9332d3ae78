"""ShapesWorld: seeded pictures of coloured shapes, with records of all four categories.

A picture is 64×64 pixels, 8×8 cells of 8 pixels. Its objects (small: 2×2 cells, large: 3×3 cells) sit on the
cells and never touch each other. A `Scene` says all about its picture, so every answer can be checked.

Training and held-out scenes are disjoint by construction: a scene's own hash says to which of the two it
belongs.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from being_vl.errors import OutputError
from being_vl.files import write_aside, write_json
from being_vl.options import StrPath
from being_vl.outputs import read_json

CELL_SIDE = 8
"""In pixels."""
GRID_SIDE = 8
"""In cells."""
PICTURE_SIDE = CELL_SIDE * GRID_SIDE

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
    """A background and one to four objects, in raster order of their corners.

    No two objects share a shape or a colour, so either of the two is enough to ask for an object.
    """

    background: str
    things: tuple[Thing, ...]

    @property
    def split(self) -> Split:
        """The split that may use this scene: one scene in eight is held out."""
        return "held-out" if crc32(repr(self).encode()) % 8 == 0 else "train"


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
    num_objects = int(rng.integers(1, max_objects + 1))
    # Scenes with too little room, and those of the other split, are drawn again.
    while True:
        things = _place_things(rng, num_objects)
        scene = Scene(_pick(rng, list(BACKGROUNDS)), tuple(things))
        if len(things) == num_objects and scene.split == split:
            return scene


def _place_things(rng: np.random.Generator, num_objects: int) -> list[Thing]:
    """Objects in raster order that do not touch each other; one that finds no room in 20 attempts is left out."""
    is_free = np.ones((GRID_SIDE, GRID_SIDE), dtype=bool)
    things: list[Thing] = []
    shapes, colours = rng.permutation(len(SHAPES)), rng.permutation(len(COLOURS))
    for shape, colour in zip(shapes[:num_objects], colours, strict=False):
        size = _pick(rng, list(SIZES))
        cells = SIZES[size]
        for _ in range(20):
            row, column = (int(v) for v in rng.integers(0, GRID_SIDE - cells + 1, size=2))
            if is_free[row : row + cells, column : column + cells].all():
                # The cells around it stay free as well.
                top, left = max(row - 1, 0), max(column - 1, 0)
                is_free[top : row + cells + 1, left : column + cells + 1] = False
                looks = SHAPES[shape], list(COLOURS)[colour], size, _pick(rng, TEXTURES)
                things.append(Thing(*looks, row, column))
                break
    return sorted(things, key=lambda thing: (thing.row, thing.column))


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draw `scene` as an RGB picture of 64×64 pixels; `rng` makes it a little lighter or darker."""

    def shift(colour: tuple[int, int, int]) -> NDArray[np.float32]:
        return np.asarray(colour, np.float32) + brightness

    brightness = np.float32(rng.integers(-8, 9))
    # The background, plain or checked.
    colour_a, colour_b = (shift(colour) for colour in BACKGROUNDS[scene.background])
    rows, columns = np.indices((PICTURE_SIDE, PICTURE_SIDE)) // (CELL_SIDE // 2)
    pixels = np.where(((rows + columns) % 2 == 0)[..., None], colour_a, colour_b)
    # The objects, with soft edges.
    for thing in scene.things:
        side = thing.cells * CELL_SIDE
        top, left = thing.row * CELL_SIDE, thing.column * CELL_SIDE
        window = pixels[top : top + side, left : left + side]
        colour = np.broadcast_to(shift(COLOURS[thing.colour]), window.shape)
        if thing.texture == "striped":
            is_bright = (np.arange(side) % 4 >= 2)[:, None, None]
            colour = np.where(is_bright, 0.35 * colour + 0.65 * 250, colour)
        mask = _mask(thing.shape, thing.cells)[:, :, None]
        window[:] = mask * colour + (1 - mask) * window
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


@cache
def _mask(shape: str, cells: int) -> NDArray[np.float32]:
    """Coverage, 0 to 1, of each pixel of the bounding square, by supersampling."""
    side, scale = cells * CELL_SIDE, 8
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
    coverage = image.resize((side, side), Image.Resampling.BOX)
    return np.asarray(coverage, np.float32) / np.float32(255)


def caption(scene: Scene) -> str:
    """All objects in raster order of their corners, then the background."""
    return ", ".join(f"a {thing.name}" for thing in scene.things) + f", on a {scene.background} background."


def find_objects(text: str) -> set[str]:
    """The objects that a caption names, such as `red circle`."""
    words = text.lower().replace(",", " ").replace(".", " ").split()
    return {f"{a} {b}" for a, b in pairwise(words) if a in COLOURS and b in SHAPES}


def _ask_attribute(attribute: str, thing: Thing) -> Question:
    key, text = {
        "colour": ("shape", "what is the colour of the {}?"),
        "shape": ("colour", "which shape is {}?"),
        "size": ("shape", "what is the size of the {}?"),
        "texture": ("shape", "what is the texture of the {}?"),
    }[attribute]
    return Question(attribute, text.format(getattr(thing, key)), getattr(thing, attribute))


def _ask_comparison(
    rng: np.random.Generator, scene: Scene, kind: str, rank: Callable[[Thing], float]
) -> list[Question]:
    """Ask which of two objects comes first in `rank`; nothing where no two objects differ by 1 or more."""
    pairs = [(a, b) for a in scene.things for b in scene.things if rank(b) - rank(a) >= 1]
    if not pairs:
        return []
    answer, foil = _pick(rng, pairs)
    a, b = (answer, foil) if rng.integers(2) else (foil, answer)
    return [Question(kind, f"which is {kind}, the {a.shape} or the {b.shape}?", answer.shape)]


def perception(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Attributes of single objects and of the background, in random order.

    Asks for colours by shape or for shapes by colour, never both, so that no question gives away another's
    answer.
    """
    attribute = _pick(rng, ("colour", "shape"))
    questions = [_ask_attribute(attribute, thing) for thing in scene.things]
    questions += [_ask_attribute(_pick(rng, ("size", "texture")), thing) for thing in scene.things]
    questions.append(Question("background", "what is the background?", scene.background))
    return _shuffle(rng, questions)


def reasoning(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Counting, comparison and spatial relations, in random order."""
    return _shuffle(
        rng,
        [
            Question("count", "how many objects are there?", str(len(scene.things))),
            *_ask_comparison(rng, scene, "larger", lambda thing: -thing.cells),
            *_ask_comparison(rng, scene, "higher", lambda thing: thing.middle[0]),
            *_ask_comparison(rng, scene, "further left", lambda thing: thing.middle[1]),
        ],
    )


def instruction(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """A conversation in which later questions refer to earlier ones."""
    colours = Question("list colours", "list the colours.", ", ".join(thing.colour for thing in scene.things))
    shapes = Question("list shapes", "list the shapes.", ", ".join(thing.shape for thing in scene.things))
    thing = _pick(rng, scene.things)
    follow_ups = [
        Question("its size", "what is its size?", thing.size),
        Question("its texture", "what is its texture?", thing.texture),
    ]
    return [_pick(rng, (colours, shapes)), _ask_attribute("colour", thing), _pick(rng, follow_ups)]


def _shuffle(rng: np.random.Generator, questions: list[Question]) -> list[Question]:
    return [questions[i] for i in rng.permutation(len(questions))]


def conversations(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, list[Question]]]:
    """Per category, one conversation about `scene`."""
    yield "foundation", [Question("caption", "describe the picture.", caption(scene))]
    yield "perception", perception(scene, rng)
    yield "reasoning", reasoning(scene, rng)
    yield "instruction", instruction(scene, rng)


def describe(scene: Scene) -> str:
    """The scene in words, one for each object, in the order of the picture's tokens."""
    things = " ".join("-".join((t.size, t.texture, t.colour, t.shape)) for t in scene.things)
    return f"{scene.background} {things}."


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
    out: StrPath, count: int, seed: int = 0, split: Split = "train", max_objects: int = MAX_OBJECTS
) -> None:
    """Write `count` pictures and four records of each, one per category.

    Writes `out/images/<split>-00000.png` and so on, `out/<split>.json` (LLaVA JSON; beside the usual fields
    each record has `kinds`, the kind of each of its questions) and `out/<split>-scenes.json` (image name →
    scene). The same arguments give the same bytes, and picture n does not depend on `count`. Pictures that an earlier
    call with a larger `count` has left are removed.

    Raises:
        OutputError: if there is a picture of such a name that no earlier call has written.
    """
    out = Path(out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    names = [f"{split}-{n:05d}" for n in range(count)]
    scenes = {}
    for n, name in enumerate(names):
        rng = np.random.default_rng([seed, split == "held-out", n])
        scenes[f"{name}.png"] = sample_scene(rng, split, max_objects)
    _clear_pictures(out / "images", scenes.keys(), read_json(out / f"{split}-scenes.json").keys())
    # The names of the pictures stand there before the pictures do: so they are known if this is interrupted.
    write_json(out / f"{split}-scenes.json", {name: asdict(scene) for name, scene in scenes.items()})
    records = []
    for n, name in enumerate(names):
        rng = np.random.default_rng([seed, split == "held-out", n])
        scene = sample_scene(rng, split, max_objects)
        draw(scene, rng).save(out / "images" / f"{name}.png")
        for category, questions in conversations(scene, rng):
            records.append(_record(name, category, questions, f"{name}.png", "<image>"))
    _write_lines(out / f"{split}.json", records)


def _clear_pictures(folder: Path, names: Iterable[str], old_names: Iterable[str]) -> None:
    """Remove the pictures of an earlier call that are not written again.

    Args:
        folder: Of the pictures.
        names: Those to be written.
        old_names: Those that an earlier call has written.

    Raises:
        OutputError: if a name to be written is that of a picture that no earlier call has written.
    """
    names, old_names = {*names}, {*old_names}
    for name in sorted(names - old_names):
        if (folder / name).exists():
            raise OutputError(
                f"{folder / name}: is there, and is no picture of ShapesWorld; choose another folder"
            )
    for name in old_names - names:
        if re.fullmatch(r"[a-z-]+-\d{5,}\.png", name):
            (folder / name).unlink(missing_ok=True)


def generate_text(out: StrPath, count: int, seed: int = 0, max_objects: int = MAX_OBJECTS) -> None:
    """Write `out/text.json`: records of `count` training scenes described in words instead of drawn.

    The words say nothing about left and right, so that is not asked.
    """
    records = []
    for n in range(count):
        rng = np.random.default_rng([seed, 2, n])
        scene = sample_scene(rng, "train", max_objects)
        for category, questions in conversations(scene, rng):
            questions = [question for question in questions if question.kind != "further left"]
            records.append(_record(f"text-{n:05d}", category, questions, None, describe(scene)))
    _write_lines(Path(out) / "text.json", records)


def read_scenes(path: StrPath) -> dict[str, Scene]:
    """Read the scenes that `generate` wrote: image name → scene."""
    return {
        name: Scene(scene["background"], tuple(Thing(**thing) for thing in scene["things"]))
        for name, scene in json.loads(Path(path).read_text(encoding="utf-8")).items()
    }


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write `records` as one JSON array, a record a line: a quarter of the size of indented JSON."""
    with write_aside(path) as temporary_path:
        lines = ",\n".join(json.dumps(record) for record in records)
        temporary_path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
