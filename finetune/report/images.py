"""Images in a report: thumbnails inside the page, with the boxes of target and reply drawn on them."""

import base64
import io
import warnings
from collections.abc import Sequence
from typing import Any

from PIL import Image

from finetune.report.page import show
from qwenvl.images.drawing import PALETTE, draw_regions
from qwenvl.images.images import ImageAccess, ImageError, load_image
from qwenvl.text.grounding import Region

THUMBNAIL = 480  # pixels of the longer side
JPEG_QUALITY = 80
SMALL = 256  # pixels of the longer side, up to which letters are a few pixels large


def thumbnail(source: Any, access: ImageAccess) -> Image.Image | str:
    """A small copy of an image, or why it cannot be shown."""
    try:
        image = load_image(source, access=access)
    except ImageError as error:
        return f"{error.image}: {error.reason}"
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return image


def image_tag(small: Image.Image | str) -> str:
    """An `<img>` with the bytes of the image, or a note with the reason if there is none."""
    if isinstance(small, str):
        return f'<div class="nothing">No image: {show(small)}</div>'
    file = io.BytesIO()
    small.save(file, "JPEG", optimize=True, **jpeg_settings(small, JPEG_QUALITY))
    data = base64.b64encode(file.getvalue()).decode()
    size = f'width="{small.width}" height="{small.height}"'
    return f'<img {size} alt="image of this row" src="data:image/jpeg;base64,{data}">'


def picture_tag(picture: Image.Image) -> str:
    """An `<img>` of what a model gets: almost lossless, so that what is hard to read is so for the model too."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95, subsampling=0)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img width="{picture.width}" height="{picture.height}" alt="" src="data:image/jpeg;base64,{data}">'


def jpeg_settings(image: Image.Image, quality: int) -> dict[str, int]:
    """Settings to save an image as JPEG: almost lossless for a small one, whose letters would become unreadable."""
    return {"quality": 95, "subsampling": 0} if max(image.size) <= SMALL else {"quality": quality}


def draw_pair(image: Image.Image, target: Sequence[Region], reply: Sequence[Region]) -> Image.Image:
    """Draw the boxes of target and reply, in two colours: `draw_regions` assigns colours to labels in their order."""
    named = [
        Region(region.kind, region.points, name, region.span)
        for name, regions in (("target", target), ("reply", reply))
        for region in regions
    ]
    with warnings.catch_warnings():
        # An image that is too small for labels is drawn without; the legend below it has the colours.
        warnings.simplefilter("ignore", UserWarning)
        return draw_regions(image, named, line_width=2, font_size=12)


def pair_legend(target: Sequence[Region], reply: Sequence[Region]) -> str:
    """The legend of `draw_pair`."""
    names = [name for name, regions in (("target", target), ("reply", reply)) if regions]
    swatches = [
        f'<span class="legend"><svg viewBox="0 0 20 12" aria-hidden="true"><rect width="20" height="12" rx="2" '
        f'fill="rgb{PALETTE[number]}"/></svg>{name}</span>'
        for number, name in enumerate(names)
    ]
    missing = [name for name in ("target", "reply") if names and name not in names]
    remark = "".join(f'<span class="remark">the {name} has no box</span>' for name in missing)
    return f'<div class="legends">{"".join(swatches)}{remark}</div>'
