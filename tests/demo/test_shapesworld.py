"""ShapesWorld's pictures and records, checked against the scenes and against the pixels."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from being_vl.data.options import CATEGORIES
from being_vl.data.records import Records
from being_vl.demo import shapesworld


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 training pictures, 60 held-out ones, and 100 scenes in words."""
    folder = tmp_path_factory.mktemp("world")
    shapesworld.generate(folder, 300, seed=3)
    shapesworld.generate(folder, 60, seed=3, split="held-out")
    shapesworld.generate_text(folder, 100, seed=3)
    return folder


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_same_seed_gives_the_same_bytes_and_another_seed_others(world: Path, tmp_path: Path) -> None:
    shapesworld.generate(str(tmp_path / "again"), 20, seed=3)
    shapesworld.generate(tmp_path / "other", 20, seed=4)
    names = [f"train-{n:05d}.png" for n in range(20)]
    assert [f.name for f in sorted((tmp_path / "again" / "images").iterdir())] == names
    for name in names:
        assert (tmp_path / "again/images" / name).read_bytes() == (world / "images" / name).read_bytes()
    assert load(tmp_path / "again" / "train.json") == load(world / "train.json")[:80]
    assert load(tmp_path / "other" / "train.json") != load(tmp_path / "again" / "train.json")


def test_pictures_of_a_larger_world_do_not_stay(tmp_path: Path) -> None:
    shapesworld.generate(tmp_path, 4, seed=0)
    shapesworld.generate(tmp_path, 2, seed=0, split="held-out")
    (tmp_path / "images" / "mine.png").write_bytes(b"")
    shapesworld.generate(tmp_path, 3, seed=1)
    names = [path.name for path in sorted((tmp_path / "images").iterdir())]
    assert names == [
        "held-out-00000.png",
        "held-out-00001.png",
        "mine.png",
        *(f"train-{n:05d}.png" for n in range(3)),
    ]
    assert shapesworld.read_scenes(str(tmp_path / "train-scenes.json")).keys() == set(names[3:])


def test_no_held_out_scene_is_trained_on() -> None:
    # One object in few places: the same scenes come up again and again.
    rng = np.random.default_rng(0)
    training_scenes, held_out_scenes = (
        {shapesworld.sample_scene(rng, split, max_objects=1) for _ in range(600)}
        for split in ("train", "held-out")
    )
    assert not training_scenes & held_out_scenes
    assert len(training_scenes) > 500
    assert len(held_out_scenes) > 400


def test_records_are_llava_json_of_all_categories(world: Path) -> None:
    for split, count in (("train", 300), ("held-out", 60)):
        records = list(Records(world / f"{split}.json"))
        assert Counter(record.category for record in records) == dict.fromkeys(CATEGORIES, count)
        assert all((world / "images" / image).is_file() for record in records for image in record.images)
    words = list(Records(world / "text.json"))
    assert len(words) == 400
    assert not any(record.images for record in words)
    for record in load(world / "train.json"):
        assert len(record["kinds"]) * 2 == len(record["conversations"])


def answer(scene: dict[str, Any], question: str) -> str:
    """Answer a question from the scene's own fields, by other means than the generator's."""
    things = scene["things"]
    cells = {"small": 2, "large": 3}
    words = question.rstrip("?.").split()

    def make_thing(**fields: str) -> dict[str, Any]:
        (thing,) = [t for t in things if all(t[key] == value for key, value in fields.items())]
        return dict(thing)

    def centre(thing: dict[str, Any], axis: str) -> float:
        return float(thing[axis]) + cells[thing["size"]] / 2

    match words:
        case ["describe", *_]:
            names = [f"a {t['colour']} {t['shape']}" for t in things]
            return ", ".join([*names, f"on a {scene['background']} background."])
        case ["what", "is", "the", "background"]:
            return str(scene["background"])
        case ["what", "is", "the", attribute, "of", "the", shape]:
            return str(make_thing(shape=shape)[attribute])
        case ["which", "shape", "is", colour]:
            return str(make_thing(colour=colour)["shape"])
        case ["how", "many", *_]:
            return str(len(things))
        case ["list", "the", attributes]:
            return ", ".join(t[attributes[:-1]] for t in things)
        case ["which", "is", *relation, "the", a, "or", "the", b]:
            pair = [make_thing(shape=a), make_thing(shape=b)]
            order = {
                "larger,": lambda thing: -cells[thing["size"]],
                "higher,": lambda thing: centre(thing, "row"),
                "further left,": lambda thing: centre(thing, "column"),
            }[" ".join(relation)]
            assert order(pair[0]) != order(pair[1])
            return str(min(pair, key=order)["shape"])
    raise AssertionError(question)


def test_answers_follow_from_the_scenes(world: Path) -> None:
    scenes = load(world / "train-scenes.json")
    counts: Counter[str] = Counter()
    first_counts: Counter[str] = Counter()
    for record in load(world / "train.json"):
        subject = None
        for kind, question, reply in zip(
            record["kinds"], record["conversations"][::2], record["conversations"][1::2], strict=True
        ):
            text = question["value"].replace("<image>\n", "")
            if text.startswith("what is its"):
                text = text.replace("its", "the").replace("?", f" of the {subject}")
            subject = text.rstrip("?").split()[-1]
            assert reply["value"] == answer(scenes[record["image"]], text), record
            counts[kind] += 1
            first_counts[kind] += reply["value"] in text.partition(" or ")[0].split()
    relations = {"larger", "higher", "further left"}
    attributes = {"colour", "shape", "size", "texture", "background", "its size", "its texture"}
    assert counts.keys() == relations | attributes | {"caption", "count", "list colours", "list shapes"}
    for kind in relations:
        assert 0.35 < first_counts[kind] / counts[kind] < 0.65


def test_pictures_show_their_scenes(world: Path) -> None:
    for name, scene in list(load(world / "train-scenes.json").items())[:100]:
        pixels = np.asarray(Image.open(world / "images" / name)).astype(int)
        assert pixels.shape == (64, 64, 3)
        is_covered = np.zeros((8, 8), bool)
        for thing in scene["things"]:
            side = {"small": 2, "large": 3}[thing["size"]]
            row, column = thing["row"], thing["column"]
            assert not is_covered[row : row + side, column : column + side].any()
            is_covered[row : row + side, column : column + side] = True
            window = pixels[row * 8 : (row + side) * 8, column * 8 : (column + side) * 8]
            middle = window[side * 4 : side * 4 + 2, side * 4]
            expected = shapesworld.COLOURS[thing["colour"]]
            assert np.abs(middle - expected).max() <= 9, (name, thing)
        background = pixels.reshape(8, 8, 8, 8, 3).transpose(0, 2, 1, 3, 4)[~is_covered].mean()
        assert {"dark": background < 70, "light": background > 200, "checked": 80 < background < 180}[
            scene["background"]
        ]


def test_find_objects_reads_captions() -> None:
    caption = "A red circle, a blue square , on a dark background."
    assert shapesworld.find_objects(caption) == {"red circle", "blue square"}
    assert shapesworld.find_objects("red, circle") == {"red circle"}
    assert shapesworld.find_objects("circle red") == set()
