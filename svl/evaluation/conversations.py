"""What a question shows and says: an lmms-eval message as Hugging Face messages, with its images and videos read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL.Image import Image

from svl.core import SvlError
from svl.data.pictures import open_picture
from svl.data.videos import read_frame_folder, read_frames

Conversation = list[dict[str, Any]]  # Hugging Face messages: role and content, a list of image and text parts


def message_part(part: dict[str, Any], where: str, frames: int) -> dict[str, Any]:
    """One piece of an lmms-eval message as Hugging Face wants it, images in RGB; messages call its document `where`.

    Of a video (a file, or a folder with a picture of each frame), so many frames.
    """
    if part["type"] == "text":
        return part
    if part["type"] == "image":
        return {"type": "image", "image": open_picture(part["url"], f"an image of {where}")}
    if part["type"] == "video" and isinstance(part["url"], str):
        file = Path(part["url"])
        read = read_frame_folder if file.is_dir() else read_frames
        return {"type": "video", "frames": read(file, frames, f"the video of {where}")}
    raise SvlError(f"{where} has {part['type']} in its question; only images, videos and text are supported")


def images_of(conversation: Conversation) -> list[Image]:
    """All images of a conversation, in order."""
    return [part["image"] for message in conversation for part in message["content"] if part["type"] == "image"]


def video_of(conversation: Conversation) -> list[Image] | None:
    """The frames of a conversation's video, None if it has none.

    Raises:
        SvlError: if it has several.
    """
    found = [part["frames"] for message in conversation for part in message["content"] if part["type"] == "video"]
    if len(found) > 1:
        raise SvlError(f"a question shows {len(found)} videos; one is supported")
    return found[0] if found else None


def shown_in(conversation: Conversation) -> tuple[int, int]:
    """How many images and frames a conversation shows."""
    return len(images_of(conversation)), len(video_of(conversation) or ())
