"""Resize an image to the same pixels on every Pillow: those of Pillow 12.3, whose order of passes is stated here.

Pillow resizes in two passes and rounds to 8 bits between them, so the order of the passes shows in the pixels. The
published models saw images resized across first, as Pillow always did up to 12.1. 12.2 and 12.3 go down first for
images more than 100 times as tall as wide, which would take hundreds of megabytes between the passes
(python-pillow/Pillow#9524); 13 goes down first for many more (#9549). A resize of one side has no order.
"""

from PIL import Image

_TALL = 100
"""Times as tall as wide, beyond which an image is first resized down."""


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image at `width` x `height` pixels, by Pillow's antialiased bicubic filter; the image itself if it has them.

    Args:
        image: in a mode that Pillow filters as it is, such as RGB or L.
    """
    down_first = image.height > _TALL * image.width and image.height > height
    between = (image.width, height) if down_first else (width, image.height)
    for size in (between, (width, height)):
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
    return image
