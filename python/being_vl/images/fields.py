"""Fields of a record: those that are read, and those that change its meaning and are not known here.

Any other field says something about the record (`id`, `source`, `width`, `score`) and is passed over.
"""

from collections.abc import Mapping
from typing import Any

from being_vl.images.formats import is_image_name

IMAGE_FIELDS = ("image", "images")
"""Fields that name or hold the images."""
CONVERSATION_FIELDS = ("conversations", "messages", "texts")
"""Fields that hold the turns of a conversation."""
_OTHER_IMAGE_FIELDS = (
    *("img", "imgs", "picture", "pictures", "photo", "photos", "jpg", "jpeg", "png", "webp", "pixel_values"),
)
_ORIGIN_FIELDS = (
    *("image_path", "image_paths", "image_file", "image_files", "image_name", "image_names", "img_path"),
    *(
        "img_paths",
        "image_url",
        "image_urls",
        "img_url",
        "img_urls",
        "image_base64",
        "image_bytes",
        "image_data",
    ),
)
_FILE_FIELDS = ("file", "file_name", "filename", "path")
UNSUPPORTED_FIELDS = frozenset(
    [
        *("video", "videos", "video_path", "video_paths", "video_url", "video_urls", "frames"),
        *("audio", "audios", "audio_path", "audio_paths", "audio_url", "audio_urls", "speech"),
        *(
            "img",
            "imgs",
            "picture",
            "pictures",
            "photo",
            "photos",
            "jpg",
            "jpeg",
            "png",
            "webp",
            "pixel_values",
        ),
        *("point_cloud", "point_clouds", "pointcloud"),
        *("bbox", "bboxes", "boxes", "objects", "mask", "masks", "segmentation", "segmentations"),
        *("tools", "tool_calls", "tool_choice", "functions", "function_call", "documents", "history"),
        *("system_prompt", "system_message", "chat_template", "chat_template_kwargs"),
        *("chosen", "rejected", "chosen_images", "rejected_images", "rejected_messages", "rejected_response"),
    ]
)
"""Fields with content or roles of other kinds; a record in which one of them is filled is refused."""
UNSUPPORTED_TURN_FIELDS = frozenset(
    [
        *(
            "tools",
            "tool_calls",
            "tool_call_id",
            "functions",
            "function_call",
            "reasoning",
            "reasoning_content",
        ),
        *("thinking", "refusal", "attachments", "files", "documents", "chosen", "rejected", "loss_scale"),
        *(
            "loss_weight",
            "train_detail",
            "training_detail",
            "image",
            "images",
            "img",
            "audio",
            "video",
            "videos",
        ),
    ]
)
"""The same of a turn."""
RECORD_FIELDS = frozenset(
    [
        *("id", "category", "caption", "system"),
        *(*IMAGE_FIELDS, *CONVERSATION_FIELDS, *UNSUPPORTED_FIELDS, *_ORIGIN_FIELDS, *_FILE_FIELDS),
    ]
)
"""All fields that are looked at; of a table the other columns are not read."""


def is_empty(value: Any) -> bool:
    """Whether a field's value stands for nothing: null, an empty text, list or object, or one of nothing but such."""
    if type(value) is str:
        return not value
    if isinstance(value, list | dict):
        return all(is_empty(element) for element in (value.values() if isinstance(value, dict) else value))
    return value is None or (isinstance(value, bytes) and not value)


def has_content(value: Any) -> bool:
    """Whether a field's value is a text, a list, an object or bytes, and not empty, not even as a text of JSON."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    return isinstance(value, list | dict | bytes) and not is_empty(value)


def find_unsupported_field(item: Mapping[str, Any], has_images: bool) -> str | None:
    """The name of a field that changes what a record means, and is not known here; None if it has none.

    Fields such as `image_path` say where an image came from, if the record has images; else they name images that
    would be passed over.

    Args:
        item: The record as it was decoded.
        has_images: Whether the fields that are known name an image.
    """
    for name, value in item.items():
        if name in UNSUPPORTED_FIELDS and has_content(value):
            # Lists of a scene's objects describe it; an object with their places is ms-swift's, for marks in the text.
            if name != "objects" or isinstance(value, dict):
                return name
        elif not has_images and (
            (name in _ORIGIN_FIELDS and has_content(value))
            or (name in _FILE_FIELDS and isinstance(value, str) and is_image_name(value[-100:]))
        ):
            return name
    return None


def is_image_field(name: str) -> bool:
    """Whether a field that is not known here would name or hold an image."""
    return name in (*_OTHER_IMAGE_FIELDS, *_ORIGIN_FIELDS, *_FILE_FIELDS)
