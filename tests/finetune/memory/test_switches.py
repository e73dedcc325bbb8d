import pytest
from plans_for_tests import recipe_of

from finetune.memory.auto_switches import PAGED, choose_switches, given_checkpointing
from finetune.memory.plan import plan_memory
from finetune.memory.switches import Switches
from finetune.memory.workload import Workload
from qwenvl import QwenVLConfig

GB = 1_000_000_000
PUBLISHED = QwenVLConfig()
PACK = Workload(2048, 500, 4, 4, 512)
BOTH = ("train.checkpointing=auto", "train.optim=auto", "model.dtype=bfloat16")


def choose(*overrides: str, capacity: float | None, device_type: str = "cuda") -> Switches:
    capacity = None if capacity is None else int(capacity * GB)
    return choose_switches(recipe_of(*overrides), PUBLISHED, PACK, capacity, device_type=device_type)


def need(kind: str, optim: str) -> float:
    switches = Switches("varlen", "torch", kind, optim, "off")
    return plan_memory(recipe_of("model.dtype=bfloat16"), PUBLISHED, PACK, switches=switches).peak / GB


def test_the_least_that_fits():
    order = [
        *((kind, "adamw_torch_fused") for kind in ("none", "selective", "full")),
        *((kind, PAGED) for kind in ("full", "offload")),
    ]
    for before, (kind, optim) in zip([None, *order], order, strict=False):
        room = need(kind, optim) + 0.001
        if before is not None and need(*before) <= room:
            continue  # what is better fits as well
        chosen = choose(*BOTH, capacity=room)
        assert (chosen.checkpointing, chosen.optim) == (kind, optim)
        assert len(chosen.reasons) == 1
        assert f"train.checkpointing {kind} and train.optim {optim}" in chosen.reasons[0]


def test_where_nothing_fits_what_takes_least():
    chosen = choose(*BOTH, capacity=1)
    assert (chosen.checkpointing, chosen.optim) == ("offload", PAGED)
    assert "does not fit" in chosen.reasons[0]


def test_a_device_that_holds_everything():
    chosen = choose(*BOTH, capacity=None)
    assert (chosen.checkpointing, chosen.optim) == ("none", "adamw_torch_fused")


def test_only_what_says_auto_is_chosen():
    chosen = choose("train.checkpointing=full", "model.dtype=bfloat16", capacity=None)
    assert (chosen.checkpointing, chosen.optim, chosen.reasons) == ("full", "adamw_torch_fused", ())
    chosen = choose("train.checkpointing=auto", "train.optim=sgd", "model.dtype=bfloat16", capacity=1)
    assert (chosen.checkpointing, chosen.optim) == ("offload", "sgd")
    chosen = choose("train.checkpointing=none", "train.optim=auto", "model.dtype=bfloat16", capacity=1)
    assert (chosen.checkpointing, chosen.optim) == ("none", PAGED)


def test_a_cpu_has_the_plain_ones():
    chosen = choose(*BOTH, capacity=1, device_type="cpu")
    assert (chosen.checkpointing, chosen.optim, chosen.kernels) == ("full", "adamw_torch", "torch")
    assert choose("model.attention=eager", capacity=None, device_type="cpu").attention == "eager"


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        ([], "full"),
        (["train.gradient_checkpointing=false"], "none"),
        (["train.activation_checkpointing=false"], "none"),
        (["train.checkpointing=selective"], "selective"),
        (["train.checkpointing=auto"], None),
    ],
)
def test_checkpointing_by_our_key_and_by_trls(overrides, kind):
    assert given_checkpointing(recipe_of(*overrides).train) == kind
