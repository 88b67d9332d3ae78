"""Every function and class for users that takes a path takes strings, `Path`s and any other `PathLike`."""

import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any, get_type_hints

import pytest

import being_vl
from being_vl.options import Options


class Place:
    """A `PathLike` that is no `Path`; its text is another."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


KINDS = {"str": str, "Path": Path, "PathLike": Place}
Kind = Callable[[Path], Any]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    path_kind: Kind = KINDS[request.param]
    return path_kind


def options_classes() -> Iterator[type]:
    for module in walk_packages(being_vl.__path__, "being_vl."):
        if module.name.endswith(".options"):
            members = vars(import_module(module.name)).values()
            yield from (kind for kind in members if inspect.isclass(kind) and kind.__module__ == module.name)


def test_options_with_paths_are_options() -> None:
    """`Options` converts them."""
    other_classes = [
        cls.__name__
        for cls in options_classes()
        if is_dataclass(cls) and not issubclass(cls, Options) and "Path" in str(get_type_hints(cls).values())
    ]
    assert not other_classes


def parameters(name: str) -> Iterator[tuple[str, str]]:
    """Where a name of the front door takes what, for its function or its class's public methods."""
    value = getattr(being_vl, name)
    if inspect.isclass(value) and issubclass(value, Options):
        return
    functions = {name: value} if inspect.isfunction(value) else {}
    if inspect.isclass(value):
        for method_name, method in inspect.getmembers(value, callable):
            if not method_name.startswith("_") or method_name == "__init__":
                functions[f"{name}.{method_name}"] = method
    for place, function in functions.items():
        for parameter, annotation in getattr(function, "__annotations__", {}).items():
            if parameter != "return":
                yield f"{place}({parameter})", str(annotation)


def test_annotations_that_name_a_path_name_every_kind() -> None:
    narrow_annotations = [
        f"{place}: {annotation}"
        for name in being_vl.__all__
        for place, annotation in parameters(name)
        if "Path" in annotation and "PathLike" not in annotation and "StrPath" not in annotation
    ]
    # `GridStore.open` and `Records` have converted these.
    assert [line.partition(":")[0] for line in narrow_annotations] == [
        "GridStore.__init__(folder)",
        "GridStore.__init__(paths)",
        "Record.__init__(source)",
    ]


def test_reading(chain: Path, kind: Kind) -> None:
    from being_vl.images.decode import read_image
    from being_vl.images.readers import open_records
    from being_vl.model.weights import load_causal_lm

    grids = being_vl.GridStore.open(kind(chain / "grids"))
    being_vl.VisualBPE.load(kind(chain / "vocabulary.json"))
    being_vl.VocabularyLayout.load(kind(chain / "tied"))
    being_vl.load_quantizer(kind(chain / "quantizer"))
    records = kind(chain / "data" / "train.json")
    assert len(being_vl.Records(records)) == len(being_vl.Records([records])) == len(open_records(records))
    builder = being_vl.SequenceBuilder.from_model(kind(chain / "tied"), grids=kind(chain / "grids"))
    assert builder.grids is not None
    assert builder.grids.keys() == grids.keys()
    being_vl.BeingVLProcessor.from_pretrained(kind(chain / "tied"))
    assistant = being_vl.Assistant.load(kind(chain / "tied"))
    image = kind(next((chain / "data" / "images").iterdir()))
    assistant.answer(["Hello."], [[read_image(image)]], max_new_tokens=1)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Hello."}]
    assistant.processor([{"role": "user", "content": content}])
    load_causal_lm(kind(chain / "tied"), "auto")


def test_writing(chain: Path, kind: Kind, tmp_path: Path) -> None:
    bpe = being_vl.VisualBPE.load(chain / "vocabulary.json")
    bpe.save(kind(tmp_path / "vocabulary.json"))
    being_vl.VocabularyLayout.load(chain / "tied").save(kind(tmp_path))
    being_vl.BeingVLProcessor.from_pretrained(chain / "tied").save_pretrained(kind(tmp_path / "processor"))
    being_vl.load_quantizer(chain / "quantizer").save_pretrained(kind(tmp_path / "quantizer"))


def test_jobs(chain: Path, kind: Kind, tmp_path: Path) -> None:
    def place(*parts: str) -> Any:
        return kind(chain.joinpath(*parts))

    out = {name: kind(tmp_path / name) for name in ("grids", "tokens", "expanded", "sequences", "training")}
    being_vl.quantize(
        being_vl.QuantizeOptions(
            images=place("data", "images"), out=out["grids"], quantizer=place("quantizer")
        )
    )
    vocabulary = kind(tmp_path / "vocabulary.json")
    being_vl.train_vocabulary(being_vl.VocabularyOptions(grids=[out["grids"]], out=vocabulary, num_merges=40))
    being_vl.encode_grids(
        being_vl.EncodeOptions(grids=out["grids"], vocabulary=vocabulary, out=out["tokens"])
    )
    being_vl.expand(
        being_vl.ExpandOptions(
            llm=place("llm"), vocabulary=vocabulary, out=out["expanded"], quantizer=place("quantizer")
        )
    )
    shared_options = {
        "model": out["expanded"],
        "records": [place("data", "train.json")],
        "grids": out["grids"],
        "sequences": being_vl.SequenceOptions(max_length=512),
    }
    being_vl.prepare(being_vl.PrepareOptions(**shared_options, out=out["sequences"]))
    list(being_vl.check(being_vl.CheckOptions(**shared_options, out=out["training"])))
    names = {path.name for path in tmp_path.iterdir()}
    assert {os.path.basename(path) for path in out.values()} <= names  # noqa: PTH119
