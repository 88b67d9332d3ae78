"""Which column of a table holds images, for every Arrow type that could."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from being_vl.errors import ImageError
from being_vl.images.columns import ImageColumn, find_image_column

PATH = Path("a.parquet")
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})
ITEMS: dict[str, tuple[pa.DataType, Any]] = {
    "binary": (pa.binary(), b"abc"),
    "large_binary": (pa.large_binary(), b"abc"),
    "binary_view": (pa.binary_view(), b"abc"),
    "fixed_size_binary": (pa.binary(3), b"abc"),
    "string": (pa.string(), "a.png"),
    "large_string": (pa.large_string(), "a.png"),
    "string_view": (pa.string_view(), "a.png"),
    "json": (pa.json_(), '"a.png"'),
    "struct": (STRUCT, {"bytes": b"abc", "path": None}),
    "struct of a path": (STRUCT, {"bytes": None, "path": "a.png"}),
    "struct of views": (
        pa.struct({"path": pa.string_view(), "bytes": pa.binary_view(), "more": pa.int8()}),
        {"path": "a.png", "bytes": b"abc", "more": 1},
    ),
    "struct of nulls": (
        pa.struct({"bytes": pa.null(), "path": pa.string()}),
        {"bytes": None, "path": "a.png"},
    ),
    "uint8": (pa.list_(pa.uint8()), [97, 98, 99]),
    "fixed uint8": (pa.list_(pa.uint8(), 3), [97, 98, 99]),
}
LISTS = {
    "plain": lambda kind: kind,
    "list": pa.list_,
    "large_list": pa.large_list,
    "fixed_size_list": lambda kind: pa.list_(kind, 2),
    "list_view": pa.list_view,
    "large_list_view": pa.large_list_view,
}


@pytest.mark.parametrize("item", ITEMS)
@pytest.mark.parametrize("container", LISTS)
def test_images_are_read_out_of_every_type(item: str, container: str) -> None:
    kind, value = ITEMS[item]
    schema = pa.schema({"caption": pa.string(), "image": LISTS[container](kind), "hash": pa.binary()})
    column = find_image_column(PATH, schema)
    assert column is not None
    assert (column.name, column.is_list) == ("image", container != "plain")
    expected = {"string": "a.png", "json": '"a.png"', "struct of a path": "a.png", "struct of nulls": "a.png"}
    image = expected.get(item.removeprefix("large_").removesuffix("_view"), b"abc")
    assert column.values([value, value] if column.is_list else value) == [image] * (1 + column.is_list)
    assert column.values(None) == ([] if column.is_list else [None])


@pytest.mark.parametrize("value_type", [pa.string(), pa.binary(), pa.large_string()])
def test_encoded_columns_are_read_as_their_values(value_type: pa.DataType) -> None:
    for kind in (pa.dictionary(pa.int8(), value_type), pa.run_end_encoded(pa.int32(), value_type)):
        expected = "bytes" if value_type == pa.binary() else "names"
        assert find_image_column(PATH, pa.schema({"image": kind})) == ImageColumn("image", expected, False)
        columns = pa.schema({"images": pa.list_(kind)})
        assert find_image_column(PATH, columns) == ImageColumn("images", expected, True)


@pytest.mark.parametrize(
    "kind",
    [
        pa.int32(),
        pa.float64(),
        pa.timestamp("ns"),
        pa.decimal128(10),
        pa.bool_(),
        pa.list_(pa.int32()),
        pa.list_(pa.list_(pa.list_(pa.uint8()))),
        pa.list_(pa.list_(pa.string())),
        pa.struct({"url": pa.string()}),
        pa.struct({"bytes": pa.string()}),
        pa.struct({"bytes": pa.binary(), "path": pa.int8()}),
        pa.map_(pa.string(), pa.binary()),
        pa.dense_union([pa.field("a", pa.string())]),
        pa.fixed_shape_tensor(pa.uint8(), (2, 2)),
        pa.uuid(),
        pa.dictionary(pa.int8(), pa.int64()),
    ],
    ids=str,
)
def test_other_types_are_refused_by_name(kind: pa.DataType) -> None:
    for name, column in (("image", None), ("images", None), ("img", "img")):
        with pytest.raises(
            ImageError, match=rf"a\.parquet: column '?{name}'? is of type .*; expected bytes of image"
        ):
            find_image_column(PATH, pa.schema({name: kind}), column)
    # In a column of another name it is no image.
    assert find_image_column(PATH, pa.schema({"other": kind})) is None


def test_a_tensor_of_a_library_that_is_not_loaded_is_no_list_of_images() -> None:
    metadata = {"ARROW:extension:name": "datasets.features.features.Array2DExtensionType"}
    field = pa.field("image", pa.list_(pa.list_(pa.uint8())), metadata=metadata)
    with pytest.raises(ImageError, match=r"'?image'? is of type list"):
        find_image_column(PATH, pa.schema([field]))


def test_one_of_several_columns_is_taken_or_asked_for() -> None:
    def find(column: str | None = None, **kinds: pa.DataType) -> str | None:
        image_column = find_image_column(PATH, pa.schema(kinds), column)
        return image_column and image_column.name

    assert find(image=pa.string(), jpg=pa.binary()) == "image"
    assert find(jpg=pa.binary(), caption=pa.string()) == "jpg"
    assert find(sha=pa.binary(32), jpg=pa.large_binary(), mask=pa.list_(pa.uint8())) == "jpg"
    assert find(views=pa.list_(STRUCT), image=pa.null()) == "image"
    assert find(images=pa.list_(STRUCT), image=pa.null()) == "images"
    assert find(images=pa.list_(pa.null()), image=STRUCT) == "image"
    assert find(a=STRUCT, b=STRUCT, column="b") == "b"
    assert find(file=pa.string(), jpg=pa.binary(), column="file") == "file"
    assert find(caption=pa.string(), n=pa.int8()) is None
    for kinds in ({"a": STRUCT, "b": pa.binary()}, {"image": STRUCT, "images": pa.list_(STRUCT)}):
        with pytest.raises(ImageError, match=rf"a\.parquet: several .*{', '.join(kinds)}.*--column"):
            find(**kinds)
    with pytest.raises(ImageError, match=r"a\.parquet: has no column .?c.?; expected one of .?a.?, .?b.?"):
        find("c", a=STRUCT, b=STRUCT)
    with pytest.raises(ImageError, match="2 columns 'image'"):
        find_image_column(PATH, pa.schema([pa.field("image", STRUCT), pa.field("image", STRUCT)]))
