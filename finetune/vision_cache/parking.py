"""What a GPU need not hold for a while waits in host memory."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def parked(model: nn.Module) -> Iterator[None]:
    """Inside, the trained parameters are in host memory; afterwards they are back where they were, the same objects.

    The published adapter's take 0.45 GB, as much as encoding images does.
    """
    places = {parameter: parameter.device for parameter in model.parameters() if parameter.requires_grad}
    for parameter in places:
        parameter.data = parameter.data.cpu()
    try:
        yield
    finally:
        for parameter, device in places.items():
            parameter.data = parameter.data.to(device)
