"""Settle the recipe's keys that say `auto` by the memory plan: recomputation and optimizer, with the reason."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

from finetune.memory.plan import plan_memory
from finetune.memory.sharding import Sharding
from finetune.memory.switches import Switches
from finetune.memory.workload import Workload
from finetune.model.computing import settled_attention
from finetune.model.recomputation import LEAST_FIRST, Recomputation
from finetune.quantities import format_bytes
from finetune.recipe import Recipe, Train
from qwenvl import QwenVLConfig
from qwenvl.model.kernels import liger_runs

PAGED = "paged_adamw_8bit"


def choose_switches(
    recipe: Recipe,
    config: QwenVLConfig,
    workload: Workload,
    device_capacity: int | None,
    *,
    device_type: str,
    sharding: Sharding | None = None,
) -> Switches:
    """Settle every key of the recipe that says `auto`.

    Of recomputation and optimizer, the first pair that fits is taken: full-precision optimizer states before 8-bit
    states, and the least recomputation with either. Where nothing fits, it is the pair that takes least.

    Args:
        workload: the largest forward of the run.
        device_capacity: bytes that the run can plan with; None, where nothing is planned, takes the first pair.
        device_type: cuda or cpu.
        sharding: see `plan.plan_memory`.

    Raises:
        UserError: the model cannot be trained as the recipe says.
    """
    switches = Switches(
        # Backends that cannot run here are refused by the run (`computing`): this may plan for another machine.
        attention=settled_attention(recipe.model),
        kernels=_kernels(recipe.model.kernels, device_type),
        checkpointing=given_checkpointing(recipe.train) or "none",
        optim=recipe.train.optim,
        vision_cache=recipe.data.vision_cache,
        device_type=device_type,
    )
    autos = [
        key
        for key, value in (("checkpointing", recipe.train.checkpointing), ("optim", recipe.train.optim))
        if value == "auto"
    ]
    if autos:
        switches, reason = _first_that_fits(recipe, config, workload, device_capacity, switches, autos, sharding)
        settled = " and ".join(f"train.{key} {getattr(switches, key)}" for key in autos)
        switches = replace(switches, reasons=(f"auto is {settled}: {reason}",))
    return switches


def given_checkpointing(train: Train) -> Recomputation | None:
    """The recomputation that a recipe sets, by our key or by TRL's; None if ours is auto."""
    if train.checkpointing is not None:
        return None if train.checkpointing == "auto" else train.checkpointing
    wanted = train.gradient_checkpointing if train.activation_checkpointing is None else train.activation_checkpointing
    return "full" if wanted else "none"


def _first_that_fits(
    recipe: Recipe,
    config: QwenVLConfig,
    workload: Workload,
    capacity: int | None,
    switches: Switches,
    autos: list[str],
    sharding: Sharding | None,
) -> tuple[Switches, str]:
    choices = list(_choices(switches, autos, shares=sharding is not None))
    if capacity is None:
        return choices[0], "its memory is not planned"
    tried = ""
    for choice in choices:
        plan = plan_memory(recipe, config, workload, switches=choice, sharding=sharding)
        peak = format_bytes(plan.peak)
        if plan.fits(capacity):
            before = f"; {tried} would take more" if tried else ""
            return choice, f"by the plan: {peak} of {format_bytes(capacity)}{before}"
        tried = " and ".join(f"{getattr(choice, key)}" for key in autos)
    return choices[-1], f"which takes least, and by the plan does not fit: {peak} of {format_bytes(capacity)}"


def _choices(switches: Switches, autos: list[str], *, shares: bool) -> Iterator[Switches]:
    on_gpu = switches.device_type == "cuda"
    kinds: tuple[Recomputation, ...] = (switches.checkpointing,)
    if "checkpointing" in autos:
        # Without a GPU activations are in host memory already.
        kinds = LEAST_FIRST if on_gpu else LEAST_FIRST[:-1]
    optims = [switches.optim]
    if "optim" in autos:
        optims = ["adamw_torch_fused" if on_gpu else "adamw_torch"]
        # bitsandbytes' optimizers take no parts of tensors.
        if on_gpu and not shares and find_spec("bitsandbytes") is not None:
            optims.append(PAGED)
    for optim in optims:
        for kind in kinds:
            # 8-bit states cost less time than moving every layer's input to the host and back.
            if kind == "offload" and optim != optims[-1] and len(kinds) > 1:
                continue
            yield replace(switches, optim=optim, checkpointing=kind)


def _kernels(wanted: str, device_type: str) -> str:
    if wanted != "auto":
        return wanted
    return "liger" if device_type == "cuda" and liger_runs() else "torch"
