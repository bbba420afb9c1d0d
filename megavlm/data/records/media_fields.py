"""The fields of a record that name its images and videos."""

from __future__ import annotations

import base64
import binascii
import math
import os
from collections.abc import Mapping
from typing import Any

from megavlm.data.records.record import MediaFile, Video
from megavlm.data.records.reject import RejectError

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "gif", "img", "image")
SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "hf", "https", "http")
VIDEO_ENDINGS = ("mp4", "mkv", "avi", "mov", "webm", "m4v", "video")
# Keys of one meaning. One of the first two is taken if it has a value; else the only other one
# that has a value.
IMAGE_KEYS = (
    "image",
    "images",
    "image_path",
    "image_paths",
    "image_file",
    "file_name",
    "file_names",
    "img",
    "img_path",
    "jpg",
    "jpeg",
    "png",
    "webp",
)
VIDEO_KEYS = ("video", "videos", "video_path", "video_paths", "video_file", "mp4")
ALIASES = (*IMAGE_KEYS[2:], *VIDEO_KEYS[2:])


def find_media(fields: Mapping[str, Any], keys: tuple[str, ...], name: str) -> tuple[list, str]:
    """Return the media that a record lists under one of ``keys``, and the key.

    Raises:
        RejectError: two keys name different media.
    """
    filled = [(key, listed) for key in keys if key in fields and (listed := _listed(fields[key]))]
    main = [each for each in filled if each[0] in keys[:2]]
    chosen = main or filled
    if not chosen:
        return [], ""
    if any(listed != chosen[0][1] for _, listed in chosen[1:]):
        raise RejectError(
            f"{name}_field",
            f"{' and '.join(key for key, _ in chosen)} name different {name}s; keep one of them",
        )
    return chosen[0][1], chosen[0][0]


def _listed(value: Any) -> list[Any]:
    """Return a field that holds nothing, one thing or a list of them as a list."""
    if value is None or (isinstance(value, (str, bytes)) and not value):
        return []
    return value if isinstance(value, list) else [value]


def media_file(entry: Any, name: str, root: str, files: Mapping[str, bytes]) -> MediaFile:
    """Return an image or a video: a path, bytes, base64, or the two in an object as Hugging Face's
    datasets store them; raises RejectError for something else.
    """
    if isinstance(entry, dict):
        if isinstance(entry.get("bytes"), bytes):
            label = str(entry.get("path") or f"the record's {name}")
            return MediaFile(path=label, content=entry["bytes"])
        if entry.get("bytes") is None:
            entry = entry.get("path") or entry.get("url")
    if isinstance(entry, bytes):
        return MediaFile(path=f"the record's {name}", content=entry)
    if not isinstance(entry, str) or not entry:
        raise RejectError(
            f"{name}_field", f"{name} {entry!r:.200} is not the path or the bytes of one {name}"
        )
    if entry in files:
        return MediaFile(path=entry, content=files[entry])
    if entry.startswith("data:"):
        return MediaFile(path=f"the record's {name}", content=_decode_url(entry, name))
    if "://" in entry[:32] and not entry.startswith("file://"):
        return _by_url(entry, name, root)
    path = os.path.join(root, entry.removeprefix("file://"))
    if root and not _is_inside(path, root):
        raise RejectError("outside_root", f"{name} {entry!r:.200} leads out of the root {root}")
    return MediaFile(path=path)


def _by_url(url: str, name: str, root: str) -> MediaFile:
    """Return a medium behind a URL; raises RejectError if it is not below the root, if there is
    one.
    """
    if not url.startswith(tuple(f"{scheme}://" for scheme in SCHEMES)):
        raise RejectError(
            f"{name}_field", f"{name} {url[:200]!r} is a URL of another kind than {SCHEMES}"
        )
    if root and not _is_inside(url, root):
        raise RejectError("outside_root", f"{name} {url!r:.200} leads out of the root {root}")
    return MediaFile(path=url)


def _decode_url(url: str, name: str) -> bytes:
    """Decode a ``data:image/png;base64,...`` URL."""
    head, _, data = url.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("it is not base64")
        return base64.b64decode(data, validate=True)
    except (ValueError, binascii.Error) as error:
        raise RejectError(f"{name}_field", f"{name} {url[:60]!r}: {error}") from None


def _is_inside(path: str, root: str) -> bool:
    """Return whether a path stays in a folder. Links are not followed: whoever made them in the
    folder may have meant it.
    """
    if ".." not in path and path.startswith(os.path.join(root, "")):
        return True
    top = os.path.abspath(root)
    return os.path.commonpath([top, os.path.abspath(path)]) == top


def read_videos(
    entries: list[Any], fields: Mapping[str, Any], root: str, files: Mapping[str, bytes]
) -> tuple[Video, ...]:
    """Return a record's videos; ``clip`` belongs to the only one."""
    if not entries:
        return ()
    clip = fields.get("clip")
    if clip is not None:
        numbers = (
            isinstance(clip, list)
            and len(clip) == 2
            and all(type(end) in (int, float) and math.isfinite(end) for end in clip)
        )
        if not numbers or not 0 <= clip[0] < clip[1]:
            raise RejectError("video", f"clip {clip!r:.200} is not [start, end] in seconds")
        if len(entries) > 1:
            raise RejectError("video", f"one clip, but {len(entries)} videos")
        clip = (float(clip[0]), float(clip[1]))
    return tuple(
        Video(file=media_file(entry, "video", root, files), clip=clip) for entry in entries
    )
