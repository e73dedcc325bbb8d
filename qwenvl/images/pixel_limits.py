"""The limits on an image's size in pixels."""

from qwenvl.images.unusable_image import UnusableImage

# The longest side in pixels: each row costs memory of its own, so 100 million rows of one pixel take a lot of it.
_MAX_SIDE = 500_000


def check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    """Raise `UnusableImage` for a (width, height) beyond the limits, or without pixels."""
    width, height = size
    if width * height > max_pixels or max(size) > _MAX_SIDE:
        raise UnusableImage(
            f"it has {width} x {height} pixels, more than {max_pixels} in all or {_MAX_SIDE} a side",
            "shrink it, or raise max_pixels",
        )
    if width * height == 0:
        raise UnusableImage(f"it has {width} x {height} pixels", "replace it, or drop it from the data")
