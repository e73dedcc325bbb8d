"""Images -> `pixel_values`: resized to a square, in [0, 1], normalised with CLIP's mean and standard deviation.

    processor = QwenVLImageProcessor(size=448)
    processor(["a.jpg", "b.png"], return_tensors="pt")["pixel_values"]                      # (2, 3, 448, 448) float32
    processor(["a.jpg", "b.png"], return_tensors="pt", do_normalize=False)["pixel_values"]  # the same as uint8

Loader workers deliver uint8, a quarter of the bytes; the model calls `normalize_pixels` on its own device.
"""

import logging
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import SizeDict
from transformers.processing_utils import ImagesKwargs

from qwenvl.errors import InputError
from qwenvl.images.images import ImageAccess, ImageReader
from qwenvl.images.resizing import resize

# CLIP's, as the published vision tower was trained with.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

logger = logging.getLogger(__name__)


def normalize_pixels(pixels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normalise 8-bit pixels for the vision tower: (pixels / 255 - mean) / std per channel, on the pixels' device.

    Computed in float32 whatever the result's type, so that it equals the image processor's own normalisation.

    Args:
        pixels: (..., 3, height, width) uint8.

    Returns:
        (..., 3, height, width) `dtype`.

    Raises:
        InputError: pixels that are not uint8, or not three channels.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim < 3 or pixels.shape[-3] != 3:
        raise InputError(
            f"normalize_pixels takes (..., 3, height, width) uint8, not {tuple(pixels.shape)} {pixels.dtype}: "
            "float pixel_values are normalised already"
        )
    mean = torch.tensor(IMAGE_MEAN, dtype=torch.float32, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(IMAGE_STD, dtype=torch.float32, device=pixels.device).view(3, 1, 1)
    # In the order of the published preprocessing; fused into one multiplication, the last bits would differ.
    return pixels.to(torch.float32).div_(255).sub_(mean).div_(std).to(dtype)


class QwenVLImagesKwargs(ImagesKwargs, total=False):
    """Transformers' image options, and what image references may reach."""

    access: ImageAccess | None


class QwenVLImageProcessor(BaseImageProcessor):
    """Images of any source -> `pixel_values` for Qwen-VL.

    Each image is loaded by `qwenvl.load_image` (RGB, upright, on white), resized to `size` x `size` without
    keeping its aspect ratio (`resizing.resize`: bicubic, antialiased), and normalised.

    Args:
        size: side of the square in pixels, or {"height": side, "width": side}.
        do_normalize: False returns the resized 8-bit levels as uint8, for `normalize_pixels` to finish.
        fixed: the other options of Transformers' image processors, as a saved configuration has them. The model allows
            one value each; any other is an error, not a silently different image.

    Raises:
        InputError: a size that is not a square, or another value of an option.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (Transformers' own declaration)
    valid_kwargs = QwenVLImagesKwargs

    do_resize = True
    do_convert_rgb = True
    resample = Image.Resampling.BICUBIC
    rescale_factor = 1 / 255
    image_mean = IMAGE_MEAN
    image_std = IMAGE_STD

    def __init__(self, size: int | Mapping[str, int] = 448, do_normalize: bool = True, **fixed: Any):
        super().__init__()
        self.size = {"height": _side(size), "width": _side(size)}
        self.do_normalize = bool(do_normalize)
        self._check_fixed(fixed, self.do_normalize)

    @property
    def do_rescale(self) -> bool:
        """Pixels are rescaled to [0, 1] exactly when they are normalised."""
        return self.do_normalize

    def preprocess(
        self,
        images: Any,
        *,
        size: int | Mapping[str, int] | None = None,
        do_normalize: bool | None = None,
        access: ImageAccess | None = None,
        return_tensors: str | None = None,
        device: str | torch.device | None = None,
        **fixed: Any,
    ) -> BatchFeature:
        """Turn images in reading order into `pixel_values`.

        Args:
            images: anything `load_image` takes, or a list of such, nested to any depth; an array or tensor of four
                dimensions is a batch.
            size, do_normalize: override the processor's own for this call.
            access: what paths and URLs may reach; by default any path and no URL.
            return_tensors: "pt", "np", or None for a list of numpy arrays.
            device: of the tensor, with return_tensors="pt".

        Returns:
            `pixel_values`: (images, 3, size, size), float32, or uint8 with do_normalize=False.

        Raises:
            ImageError: an image cannot be loaded; the message names it: `images[2]`, its path.
            InputError: another value of an option.
        """
        side = _side(self.size if size is None else size)
        normalize = self.do_normalize if do_normalize is None else do_normalize
        self._check_fixed(fixed, normalize)
        access = ImageAccess() if access is None else access

        sources = list(_in_reading_order(images, "images"))
        levels = np.empty((len(sources), 3, side, side), np.uint8)
        reader = ImageReader()
        for row, (name, source) in zip(levels, sources, strict=True):
            image = reader.load(source, access=access, name=name)
            row[:] = np.asarray(resize(image, side, side)).transpose(2, 0, 1)

        pixels = torch.from_numpy(levels)
        if normalize:
            pixels = normalize_pixels(pixels)
        if return_tensors == "pt":
            return BatchFeature({"pixel_values": pixels.to(device)}, tensor_type="pt")
        array = pixels.numpy()
        return BatchFeature({"pixel_values": list(array) if return_tensors is None else array}, return_tensors)

    def fetch_images(self, images: Any) -> Any:
        """Return the images unchanged. Transformers' own version would open URLs and paths without `access`."""
        return images

    def to_dict(self) -> dict[str, Any]:
        """The content of `preprocessor_config.json`, in the terms of Transformers' image processors."""
        return {
            **super().to_dict(),
            "do_resize": self.do_resize,
            "resample": int(self.resample),
            "do_convert_rgb": self.do_convert_rgb,
            "do_rescale": self.do_rescale,
            "rescale_factor": self.rescale_factor,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }

    def _check_fixed(self, options: Mapping[str, Any], normalize: bool) -> None:
        """Check options that allow one value: that value and None pass, as do options without effect here."""
        allowed = {
            "do_resize": True,
            "resample": self.resample,
            "do_convert_rgb": True,
            "do_rescale": bool(normalize),
            "rescale_factor": self.rescale_factor,
            "image_mean": self.image_mean,
            "image_std": self.image_std,
            "do_center_crop": False,
            "do_pad": False,
            "data_format": "channels_first",
        }
        for option, value in options.items():
            if option in _WITHOUT_EFFECT or value is None:
                continue
            if option not in allowed:
                logger.warning("QwenVLImageProcessor has no option %r: ignored", option)
            elif not np.array_equal(_plain(value), _plain(allowed[option])):
                raise InputError(
                    f"{option}={value!r}: Qwen-VL's images are preprocessed with {option}={allowed[option]!r} only"
                )


# Bookkeeping of saved configurations, and options of other backends or of steps that this preprocessing lacks.
_WITHOUT_EFFECT = {
    "auto_map",
    "crop_size",
    "default_to_square",
    "disable_grouping",
    "feature_extractor_type",
    "image_processor_type",
    "image_seq_length",
    "input_data_format",
    "pad_size",
    "processor_class",
}


def _plain(option: Any) -> Any:
    return option.value if isinstance(option, Enum) else option


def _side(size: int | Mapping[str, int] | SizeDict) -> int:
    """The side in pixels of a square, from a size in any of Transformers' forms."""
    side: Any = size
    if isinstance(size, (Mapping, SizeDict)):
        given = dict(size)
        side = given["height"] if given.keys() == {"height", "width"} and len(set(given.values())) == 1 else None
    if not isinstance(side, int) or isinstance(side, bool) or side <= 0:
        raise InputError(
            f"size must be one side in pixels, or equal 'height' and 'width': Qwen-VL reads squares, not {size!r}"
        )
    return side


def _in_reading_order(images: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(name, source) of each image, depth first."""
    is_batch = isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4
    if isinstance(images, (list, tuple)) or is_batch:
        for index, inner in enumerate(images):
            yield from _in_reading_order(inner, f"{name}[{index}]")
    else:
        yield name if name != "images" else "image", images
