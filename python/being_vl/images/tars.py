"""Members of uncompressed tar files, such as WebDataset's; read in place."""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from being_vl.images.formats import is_image_name


def read_members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The regular files in a tar file, from the member on at which it stands.

    Raises:
        tarfile.TarError: if it is no uncompressed tar file, or ends too early.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # else it keeps every member that it has read
            if member.isfile():
                yield member


def member_key(tar_name: str, member: tarfile.TarInfo) -> str | None:
    """The key of the image that a member is: `FILE.tar/MEMBER`; None if its name is not one of an image.

    Args:
        tar_name: What the tar file is called in keys.
        member: The member.
    """
    name = member.name.removeprefix("./")
    return f"{tar_name}/{name}" if is_image_name(name) else None
