"""Keys of images: one spelling for each path."""

from pathlib import Path

import pytest

from being_vl.images.keys import image_key


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("a.png", "a.png"),
        ("./a.png", "a.png"),
        ("x//a.png", "x/a.png"),
        ("x/../a.png", "a.png"),
        ("x/./y/../a.png", "x/a.png"),
        ("../photos/a.png", "a.png"),
        ("/data/photos/a.png", "a.png"),
        ("//data//photos/./x/a.png", "x/a.png"),
        ("sbu/00000.tar/000.png", "sbu/00000.tar/000.png"),
        ("/data/photos/sbu/00000.tar/a/../000.png", "sbu/00000.tar/000.png"),
        ("../a.png", "/data/a.png"),
        ("/data/photos-2/a.png", "/data/photos-2/a.png"),
        ("/elsewhere/a.png", "/elsewhere/a.png"),
        ("//elsewhere/a.png", "/elsewhere/a.png"),
        ("/data/photos", "/data/photos"),
        ("a\0.png", "a\0.png"),
        ("…/ä ö.png", "…/ä ö.png"),
        (" a.png ", " a.png "),
        ("~/a.png", "~/a.png"),
    ],
)
@pytest.mark.parametrize(
    "root", ["/data/photos", "/data/photos/", "//data/x/../photos", Path("/data/photos")]
)
def test_one_spelling_for_each_path(path: str, key: str, root: str | Path) -> None:
    assert image_key(path, root) == key
    assert image_key(image_key(path, root), root) == key


def test_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert image_key("/a/b.png", "/") == image_key("a/b.png", "/") == "a/b.png"
    # A relative root is one below the working folder; links stay as they are.
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    assert image_key(tmp_path / "link" / "a.png", "link") == "a.png"
    assert image_key(tmp_path / "real" / "a.png", "link") == str(tmp_path / "real" / "a.png")
    assert image_key("a.png", ".") == image_key(Path("a.png"), tmp_path) == "a.png"
