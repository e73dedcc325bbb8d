"""The error of whatever decodes or renders an image."""

from qwenvl.errors import InputError


class UnusableImage(InputError):
    """An image cannot be used. `qwenvl.images.images.load_image` makes an `ImageError` of it, which names the image.

    Attributes: `reason`, `remedy`.
    """

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason, remedy)
        self.reason, self.remedy = reason, remedy

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}"
