"""The images that a record names or holds, in every way that users' files have, and what is refused."""

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from being_vl.errors import RecordError
from being_vl.images.references import read_references

FILE = Path("/data/chat.json")


def encode_image(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), "red").save(buffer, kind)
    return buffer.getvalue()


PIXELS = {kind: encode_image(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")}
PNG = PIXELS["PNG"]
BASE64 = base64.b64encode(PNG).decode()
URI = f"data:image/png;base64,{BASE64}"


def ask(*parts: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": list(parts)},
        {"role": "assistant", "content": [{"type": "text", "text": "A."}]},
    ]


WHAT = {"type": "text", "text": "What?"}

NAMES = {
    "none": ({}, []),
    "null": ({"image": None, "images": None}, []),
    "empty": ({"image": "", "images": []}, []),
    "list of nulls": ({"images": [None, None]}, []),
    "struct of nulls": ({"image": {"bytes": None, "path": None}}, []),
    "name": ({"image": "a/b.png"}, ["a/b.png"]),
    "list": ({"image": ["b.png", "a.png", "b.png"]}, ["b.png", "a.png", "b.png"]),
    "images": ({"images": ["a.png"]}, ["a.png"]),
    "images as a text": ({"images": "a.png"}, ["a.png"]),
    "one field null": ({"image": None, "images": ["a.png"]}, ["a.png"]),
    "other field empty": ({"image": "a.png", "images": []}, ["a.png"]),
    "one field an empty text": ({"image": "", "images": ["a.png"]}, ["a.png"]),
    "both equal": ({"image": "a.png", "images": ["a.png"]}, ["a.png"]),
    "both equal but for spelling": ({"image": "./a//b.png", "images": ["a\\b.png"]}, ["a/b.png"]),
    "Windows": ({"image": "coco\\train\\1.png"}, ["coco/train/1.png"]),
    "dots": ({"image": ".//a/./b/../c.png"}, ["a/c.png"]),
    "absolute": ({"image": "//a//b.png"}, ["/a/b.png"]),
    "file address": ({"image": "file:///a/b.png"}, ["/a/b.png"]),
    "white space and signs": (
        {"image": "ein Bild\u202f(größer) 100%.png"},
        ["ein Bild\u202f(größer) 100%.png"],
    ),
    "no suffix": ({"image": "a" * 60}, ["a" * 60]),
    "base64's signs, long": ({"image": "iVBORw0KGg/" * 9}, ["iVBORw0KGg/" * 8 + "iVBORw0KGg"]),
    "object": ({"image": {"path": "a.png", "bytes": None}}, ["a.png"]),
    "objects": ({"images": [{"url": "a.png"}, {"image": "b.png"}, "c.png"]}, ["a.png", "b.png", "c.png"]),
    "object with its origin": ({"image": {"path": "a.png", "url": "https://example.org/b.png"}}, ["a.png"]),
    "image part": ({"messages": ask({"type": "image", "image": "a.png"}, WHAT)}, ["a.png"]),
    "path part": ({"messages": ask({"type": "image", "path": "a.png", "text": None}, WHAT)}, ["a.png"]),
    "url part": ({"messages": ask({"type": "image_url", "image_url": {"url": "a.png"}}, WHAT)}, ["a.png"]),
    "url part as a text": ({"messages": ask({"type": "image_url", "image_url": "a.png"})}, ["a.png"]),
    "part without a type": ({"messages": ask({"image": "a.png"}, {"text": "What?"})}, ["a.png"]),
    "parts of conversations": (
        {"conversations": [{"from": "human", "value": [{"image": "a.png"}]}]},
        ["a.png"],
    ),
    "bare part": ({"images": ["a.png"], "messages": ask({"type": "image"}, WHAT)}, ["a.png"]),
    "bare parts and named ones": (
        {
            "images": ["a.png", "c.png"],
            "messages": ask({"type": "image"}, {"type": "image", "image": "b.png"}, {"type": "image"}),
        },
        ["a.png", "b.png", "c.png"],
    ),
    "placeholder and a named part": (
        {
            "image": "b.png",
            "messages": ask({"type": "image", "image": "a.png"}, {"type": "text", "text": "<image>"}),
        },
        ["a.png", "b.png"],
    ),
    "numbered parts": (
        {
            "images": ["a.png", "b.png"],
            "messages": ask({"type": "image", "index": 1}, {"type": "image", "index": 0}),
        },
        ["b.png", "a.png"],
    ),
    "named in parts and in the field": (
        {"images": ["a.png"], "messages": ask({"type": "image", "image": "a.png"}, WHAT)},
        ["a.png"],
    ),
    "field that no part stands for": (
        {"images": ["b.png"], "messages": ask({"type": "image", "image": "a.png"}, WHAT)},
        ["a.png", "b.png"],
    ),
}


@pytest.mark.parametrize(("item", "names"), NAMES.values(), ids=NAMES)
def test_names_of_images(item: dict[str, Any], names: list[str]) -> None:
    for with_data in (False, True):
        references = read_references(item, "here", FILE, 7, with_data)
        assert [(reference.name, reference.data) for reference in references] == [
            (name, None) for name in names
        ]


EMBEDDED = {
    "data URI": ({"image": URI}, [""]),
    "data URI in capitals": ({"image": URI.replace("data:image/png;base64", "DATA:image/png;BASE64")}, [""]),
    "data URI without a kind": ({"image": f"data:;base64,{BASE64}"}, [""]),
    "data URI with a parameter": ({"image": f"data:image/png;name=a.png;base64,{BASE64}"}, [""]),
    "data URI by per cent": ({"image": "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG)}, [""]),
    "base64": ({"image": BASE64}, [""]),
    "base64 without its end": ({"image": BASE64.rstrip("=")}, [""]),
    "base64 in lines": ({"image": base64.encodebytes(PNG).decode()}, [""]),
    "base64 for addresses": ({"image": base64.urlsafe_b64encode(PNG).decode()}, [""]),
    "list of one": ({"image": [URI]}, ["/0"]),
    "several": ({"images": [BASE64, URI]}, ["/0", "/1"]),
    "bytes": ({"image": PNG}, [""]),
    "datasets' image": ({"image": {"bytes": PNG, "path": "a.png"}}, [""]),
    "datasets' images": ({"images": [{"bytes": PNG, "path": None}] * 2}, ["/0", "/1"]),
    "bytes as base64": ({"image": {"bytes": BASE64}}, [""]),
    "both fields": ({"image": URI, "images": [URI]}, ["/0"]),
    "part": (
        {"messages": ask({"type": "image_url", "image_url": {"url": URI, "detail": "low"}}, WHAT)},
        [""],
    ),
    "parts": (
        {"messages": ask({"type": "image", "image": URI}, {"type": "image", "base64": BASE64})},
        ["/0", "/1"],
    ),
}


@pytest.mark.parametrize(("item", "places"), EMBEDDED.values(), ids=EMBEDDED)
def test_images_that_a_record_holds(item: dict[str, Any], places: list[str]) -> None:
    references = read_references(item, "here", FILE, 7, with_data=True)
    assert [reference.name for reference in references] == [f"/data/chat.json/7{place}" for place in places]
    assert [reference.data for reference in references] == [PNG] * len(places)
    without_data = read_references(item, "here", FILE, 7)
    assert [(image.name, image.data) for image in without_data] == [
        (image.name, None) for image in references
    ]


@pytest.mark.parametrize("kind", PIXELS)
def test_images_of_every_kind_are_known_by_their_bytes(kind: str) -> None:
    text = base64.b64encode(PIXELS[kind]).decode()
    for value in (text, f"data:application/octet-stream;base64,{text}"):
        (reference,) = read_references({"image": value}, "here", FILE, 0, with_data=True)
        assert (reference.name, reference.data) == ("/data/chat.json/0", PIXELS[kind])


def test_files_and_images_held_by_a_record_are_numbered_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    references = read_references({"images": ["a.png", URI]}, "here", Path("b.jsonl"), 12)
    assert [reference.name for reference in references] == ["a.png", f"{tmp_path}/b.jsonl/12/1"]


NOISE = base64.b64encode(bytes(range(256)) * 270).decode()
REFUSED = {
    "number": ({"image": 3}, "'image' holds 3; expected a file name or a list of file names"),
    "boolean": ({"image": True}, "'image' holds True"),
    "null in a list": ({"images": ["a.png", None]}, "'images' holds None"),
    "empty text in a list": ({"images": ["a.png", ""]}, "'images' holds ''"),
    "list in a list": ({"image": [["a.png"]]}, "'image' holds ['a.png']"),
    "other object": ({"image": {"id": 3, "src": "a.png"}}, "'image' holds {'id': 3, 'src': 'a.png'}"),
    "object of two files": ({"image": {"path": "a.png", "url": "b.png"}}, "'image' holds {'path'"),
    "NUL": ({"image": "a\0.png"}, r"'image' holds 'a\x00.png', a control character in it"),
    "line": ({"image": "a.png\nb.png"}, r"'image' holds 'a.png\nb.png'"),
    "half a character": ({"image": "a\ud83d.png"}, r"'image' holds 'a\ud83d.png', half of a character in it"),
    "long name": ({"image": "a/" * 5000 + "b.png"}, "10,005 bytes long"),
    "address": (
        {"image": "https://example.org/a.png"},
        "the address 'https://example.org/a.png'; download the images",
    ),
    "bucket": ({"images": ["a.png", "s3://bucket/a.png"]}, "the address 's3://bucket/a.png'; download"),
    "address in a part": (
        {"messages": ask({"type": "image_url", "image_url": {"url": "http://e.org/a"}})},
        "download",
    ),
    "different fields": (
        {"image": "a.png", "images": ["b.png"]},
        "'image' holds 'a.png' and 'images' holds ['b.png']",
    ),
    "fields of different length": (
        {"image": "a.png", "images": ["a.png"] * 2},
        "expected one of the two fields",
    ),
    "base64 of no image": ({"image": NOISE}, "92,159 bytes long"),
    "data URI of no image": ({"image": f"data:image/png;base64,{NOISE}"}, "no image that can be opened"),
    "data URI of a text": ({"image": "data:text/plain,Hello"}, "no image that can be opened"),
    "data URI with other signs": ({"image": f"{URI[:60]}*{URI[60:]}"}, "no image that can be opened"),
    "data URI cut within a byte": (
        {"image": f"data:image/png;base64,{BASE64[:61]}"},
        "no image that can be opened",
    ),
    "SVG": ({"image": "data:image/svg+xml;utf8,<svg xmlns='a'/>"}, "no image that can be opened"),
    "video part": ({"messages": ask({"type": "video", "video": "a.mp4"})}, "part 0, is of the type 'video'"),
    "audio part": (
        {"messages": ask(WHAT, {"type": "input_audio", "input_audio": {}})},
        "part 1, is of the type",
    ),
    "text as a part": ({"messages": ask("What?")}, "'messages[0]', part 0, is a JSON string"),
    "image in a text part": ({"messages": ask(WHAT | {"image": "a.png"})}, "holds a text and an image"),
    "text in an image part": (
        {"messages": ask({"type": "image", "text": "What?"})},
        "holds a text and an image",
    ),
    "text part without a text": (
        {"messages": ask({"type": "text", "txt": "What?"})},
        "part 0, has no 'text'",
    ),
    "other image part": (
        {"messages": ask({"type": "image", "source": {"data": BASE64}})},
        "the field 'source'",
    ),
    "number beyond the images": (
        {"images": ["a.png"], "messages": ask({"type": "image", "index": 1})},
        "part 0, has the index 1, of 1 images",
    ),
    "number below 0": (
        {"images": ["a.png"], "messages": ask({"type": "image", "index": -1})},
        "the index -1",
    ),
}


@pytest.mark.parametrize(("item", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_image_is_a_fault_of_one_short_line(item: dict[str, Any], message: str) -> None:
    for with_data in (False, True):
        with pytest.raises(RecordError) as error:
            read_references(item, "here", FILE, 7, with_data)
        text = str(error.value)
        assert text.startswith("here: ")
        assert message in text
        assert len(text) < 400
        assert text.isprintable()
