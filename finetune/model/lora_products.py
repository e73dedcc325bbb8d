"""LoRA beside a 16-bit or 4-bit base: products in the base's computing type, parameters in float32.

PEFT casts the input of each adapted layer to the parameters' float32, multiplies there, and casts the result back. For
2.6 % of a step's arithmetic that doubles the memory traffic outside of products, and the products run at a small part
of the speed that a GPU has in 16 bits. Here the parameters are cast, which are small, and never the input:

    y = base(x) + dropout(x) A' B'      with B' = B * scaling / (1 - rate)

The second product adds to the base's result in place. For backward x is kept, which the layers around keep anyway, and
x A', which is narrow; dropout's mask is drawn again from its seed. `w1` and `w2` of an MLP read the same input: they
share one product with both A, and one dropout mask. PEFT draws two. Each is a fair draw by itself; what they lose is
that their noise is independent of each other's.

The modules stay PEFT's, of a class of ours: saving, merging, `disable_adapter` and the names of parameters are theirs.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.lora import Linear, LoraLayer
from torch import nn

from qwenvl.model.kernels import LigerMLP
from qwenvl.model.language import MLP

HALF = (torch.bfloat16, torch.float16)


class _Add(torch.autograd.Function):
    """Adds the updates of LoRA layers that read the same input to the results of their base layers, in place."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, rate: float, seed: int, scalings: tuple[float, ...], *rest: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """x: (tokens, in); rest: each base's result (tokens, out), then each A (r, in), then each B (out, r)."""
        count = len(scalings)
        results, downs, ups = rest[:count], rest[count : 2 * count], rest[2 * count :]
        down = _stacked(downs, x.dtype)
        narrow = _dropped(x, rate, seed) @ down.T
        for result, part, up, scaling in zip(results, _split(narrow, downs), ups, scalings, strict=True):
            result.addmm_(part, _scaled(up, scaling, rate, x.dtype).T)
        ctx.mark_dirty(*results)
        ctx.save_for_backward(x, narrow, *downs, *ups)
        ctx.rate, ctx.seed, ctx.scalings = rate, seed, scalings
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        x, narrow, *parameters = ctx.saved_tensors
        count, rate, dtype = len(ctx.scalings), ctx.rate, x.dtype
        downs, ups = parameters[:count], parameters[count:]
        scaled = [_scaled(up, scaling, rate, dtype) for up, scaling in zip(ups, ctx.scalings, strict=True)]
        of_narrow = torch.cat([one @ up for one, up in zip(gradients, scaled, strict=True)], dim=1)
        of_downs: Sequence[torch.Tensor | None] = [None] * count
        of_ups: list[torch.Tensor | None] = [None] * count
        if any(ctx.needs_input_grad[4 + count :]):
            together = of_narrow.T @ _dropped(x, rate, ctx.seed)
            of_downs = [part.to(down.dtype) for part, down in zip(_split(together, downs, 0), downs, strict=True)]
            for number, (one, part, up) in enumerate(zip(gradients, _split(narrow, downs), ups, strict=True)):
                # The scaling is applied in the parameter's type, and B' was B times it.
                of_ups[number] = (one.T @ part).to(up.dtype).mul_(ctx.scalings[number] / (1 - rate))
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = of_narrow @ _stacked(downs, dtype)
            if rate:
                of_x.mul_(_kept(of_x, rate, ctx.seed))
        return of_x, None, None, None, *gradients, *of_downs, *of_ups


def results_of(x: torch.Tensor, layers: Sequence[LoraLayer]) -> list[torch.Tensor]:
    """The results of layers that read the same input.

    Args:
        x: (..., in), 16 bits.
        layers: PEFT's, each with one active adapter of the plain kind, and with the same dropout.

    Returns:
        (..., out) for each layer.
    """
    names = [layer.active_adapters[0] for layer in layers]
    rate = _rate(layers[0])
    # From the CPU's generator, whose state checkpoints and recomputation keep; no wait for the device.
    seed = int(torch.randint(2**62, ())) if rate else 0
    # Of more than two dimensions, the base's result would be a view, which autograd lets nothing add to in this way.
    flat = x.flatten(0, -2)
    results = _Add.apply(
        flat,
        rate,
        seed,
        tuple(layer.scaling[name] for layer, name in zip(layers, names, strict=True)),
        *(layer.base_layer(flat) for layer in layers),
        *(layer.lora_A[name].weight for layer, name in zip(layers, names, strict=True)),
        *(layer.lora_B[name].weight for layer, name in zip(layers, names, strict=True)),
    )
    return [result.view(*x.shape[:-1], result.shape[-1]) for result in results]


def takes_16_bits(layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether a layer's update of this input is the plain one, of one adapter, in training, beside 16 bits."""
    return (
        isinstance(layer, LoraLayer)
        and layer.training
        and x.dtype in HALF
        and not (torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type))
        and not layer.disable_adapters
        and not layer.merged
        and len(layer.active_adapters) == 1
        and _is_plain(layer, layer.active_adapters[0])
    )


def _is_plain(layer: LoraLayer, name: str) -> bool:
    return (
        name in layer.lora_A
        and name not in layer.lora_variant  # DoRA and others
        and not layer.lora_bias[name]
        and layer.cast_input_dtype_enabled
    )


class HalfLinear(Linear):
    """PEFT's LoRA of a linear layer in 16 bits."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not takes_16_bits(self, x):
            return super().forward(x, *args, **kwargs)
        return results_of(x, [self])[0]


BECOMES: dict[type[nn.Module], type[nn.Module]] = {Linear: HalfLinear}

if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit

    class HalfLinear4bit(Linear4bit):
        """PEFT's LoRA of a linear layer in 4 bits, which bitsandbytes dequantises to 16 once each way."""

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if args or kwargs or not takes_16_bits(self, x):
                return super().forward(x, *args, **kwargs)
            return results_of(x, [self])[0]

    BECOMES[Linear4bit] = HalfLinear4bit


class PairedMLP(MLP):
    """An MLP whose gate and value have their updates in one."""

    def gate_and_value(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        w1: nn.Module = self.w1
        w2: nn.Module = self.w2
        if not (_is_half(w2, x) and _is_half(w1, x)) or _rate(w1) != _rate(w2):
            return super().gate_and_value(x)
        gate, value = results_of(x, (w2, w1))
        return gate, value


class PairedLigerMLP(PairedMLP, LigerMLP):
    pass


def _is_half(layer: nn.Module, x: torch.Tensor) -> TypeGuard[LoraLayer]:
    return type(layer) in BECOMES.values() and takes_16_bits(layer, x)


PAIRS: dict[type[nn.Module], type[nn.Module]] = {MLP: PairedMLP, LigerMLP: PairedLigerMLP}


def multiply_in_16_bits(model: nn.Module) -> None:
    """Let the adapters of a model multiply in the base's type where that is 16 bits, in place.

    Layers of kinds that are not known here, such as DoRA, go on as PEFT computes them; so do all in eval mode.
    """
    becomes = BECOMES | PAIRS
    for module in model.modules():
        if type(module) in becomes:
            module.__class__ = becomes[type(module)]


def multiply_as_peft(model: nn.Module) -> None:
    """Undo `multiply_in_16_bits`."""
    was = {after: before for before, after in (BECOMES | PAIRS).items()}
    for module in model.modules():
        if type(module) in was:
            module.__class__ = was[type(module)]


def left_to_peft(model: nn.Module) -> list[str]:
    """Names of LoRA layers whose products `multiply_in_16_bits` leaves to PEFT."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        and not (type(module) in BECOMES.values() and all(_is_plain(module, one) for one in module.active_adapters))
    ]


def _rate(layer: LoraLayer) -> float:
    dropout = layer.lora_dropout[layer.active_adapters[0]]
    return float(dropout.p) if isinstance(dropout, nn.Dropout) else 0.0


def _kept(like: torch.Tensor, rate: float, seed: int) -> torch.Tensor:
    """Dropout's mask: true with probability 1 - rate, the same for the same seed."""
    mask = torch.empty(like.shape, dtype=torch.bool, device=like.device)
    if like.device.type == "meta":  # shapes alone: there is no generator
        return mask.bernoulli_(1 - rate)
    return mask.bernoulli_(1 - rate, generator=torch.Generator(like.device).manual_seed(seed))


def _dropped(x: torch.Tensor, rate: float, seed: int) -> torch.Tensor:
    """x with dropped values at 0; the others are not scaled here."""
    return x * _kept(x, rate, seed) if rate else x


def _stacked(downs: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """(sum of the ranks, in)"""
    return downs[0].to(dtype) if len(downs) == 1 else torch.cat([down.to(dtype) for down in downs])


def _scaled(up: torch.Tensor, scaling: float, rate: float, dtype: torch.dtype) -> torch.Tensor:
    """(out, r)"""
    return (up * (scaling / (1 - rate))).to(dtype)


def _split(together: torch.Tensor, downs: Sequence[torch.Tensor], dim: int = 1) -> tuple[torch.Tensor, ...]:
    return together.split([len(down) for down in downs], dim=dim)
