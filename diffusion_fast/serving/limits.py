"""What a server allows, and the errors of what it does not."""

from __future__ import annotations

from dataclasses import dataclass, fields

from starlette.exceptions import HTTPException

from ..ops import checks


@dataclass(frozen=True)
class Limits:
    """The bounds of a server; nothing in it grows past them.

    Attributes:
        steps: the most model calls of an image.
        side: the longest side of an image, in pixels.
        pixels: the most pixels of an image.
        batch: the most images of one request.
        queue: the most images that wait for a slot.
        prompt: the most characters of a prompt.
        body: the most bytes of a request's body.
        picture_pixels: the most pixels of an uploaded picture.
        rate: requests for images a minute and client; 0 for no limit.
        timeout: seconds that a request may take, waiting included.
        receive: seconds that a client may take to send its body.
        files: how many pictures are kept for clients that ask for a URL.
        file_bytes: how many bytes they may have together.
        file_seconds: how long they are kept.
    """

    steps: int = 150
    side: int = 2048
    pixels: int = 2048 * 2048
    batch: int = 8
    queue: int = 64
    prompt: int = 10_000
    body: int = 32 * 2**20
    picture_pixels: int = 4096 * 4096
    rate: int = 0
    timeout: float = 600.0
    receive: float = 30.0
    files: int = 256
    file_bytes: int = 256 * 2**20
    file_seconds: float = 3600.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            checks.finite(field.name, value)
            if value < 0 or (value == 0 and field.name != "rate"):
                checks.fail(field.name, "a number above 0", value)


class FieldError(ValueError):
    """A field of a request that can't be.

    Args:
        field: its name.
        message: what was expected and what came.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field, self.message = field, message


class Refused(HTTPException):
    """A request that is refused as a whole.

    Args:
        status: the HTTP status.
        message: why.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status, self.message = status, message
