import random

import numpy as np
import pytest
from plans_for_tests import ALL_IN_4_BITS, KINDS, ONE, THREE, recipe_of, tiny_config

from finetune.batches.packing import pack
from finetune.memory.free_memory import CARDS, describe_cards
from finetune.memory.plan import MemoryPlan, Phase, plan_memory
from finetune.memory.switches import Switches
from finetune.memory.workload import Workload, worst_workload
from qwenvl import QwenVLConfig

GB = 1_000_000_000
PUBLISHED = QwenVLConfig()
SWITCHES = Switches("varlen", "torch", "full", "adamw_torch_fused", "off")
EVALUATED = "evaluate={data: {path: e.jsonl, format: messages}, task: custom, metric: anls, max_new_tokens: 32}"


def switches(**changes) -> Switches:
    return Switches(**{**vars(SWITCHES), **changes})


def of_tokens(tokens: int, *, images: int = 1) -> Workload:
    return Workload(tokens, tokens // 4, images, images, min(tokens, 512))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_every_phase_of_every_kind_is_planned(kind, device_type):
    chosen = switches(device_type=device_type)
    plan = plan_memory(recipe_of(*KINDS[kind], EVALUATED), tiny_config(), THREE, switches=chosen)
    assert [phase.name for phase in plan.phases] == ["load", "encode", "train", "evaluate", "save"]
    assert all(size >= 0 for phase in plan.phases for size in phase.parts.values())
    assert plan.peak == max(phase.needed for phase in plan.phases)
    assert (plan.host == 0) == (device_type == "cpu")
    rows = plan.table()
    assert len({len(row) for row in rows}) == 1
    assert rows[0][0] == "MB"
    assert len(plan.lines(GB)) == 2
    assert "of 1.0 GB that can be used" in plan.lines(GB)[0]


def test_what_is_there_throughout_is_counted_once_in_each_phase():
    plan = plan_memory(recipe_of(), tiny_config(), ONE, switches=switches(device_type="cpu"))
    train, save = plan["train"].parts, plan["save"].parts
    assert train["optimizer states"] == pytest.approx(2 * train["gradients"], rel=1e-3)
    assert train["gradients"] == train["adapter"]
    assert save == {name: size for name, size in train.items() if name in save}
    assert "gradients" not in save
    assert "adapter" not in plan["load"].parts


def test_more_checkpointing_takes_less():
    plans = {
        kind: plan_memory(recipe_of(), PUBLISHED, of_tokens(1024), switches=switches(checkpointing=kind))
        for kind in ("none", "selective", "full", "offload")
    }
    peaks = [plan["train"].total for plan in plans.values()]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4
    # The input of each of 32 layers, in bfloat16.
    assert plans["offload"].host - plans["full"].host in (0, 32 * 1024 * 4096 * 2)


def test_features_encoded_before_need_no_tower():
    recipe = recipe_of("model.dtype=bfloat16", "data.vision_cache=memory")
    plan = plan_memory(recipe, PUBLISHED, of_tokens(512), switches=switches(vision_cache="memory"))
    assert "vision" in plan["encode"].parts
    assert not {"vision", "resampler"} & plan["train"].parts.keys()


def test_a_tower_whose_weights_are_saved_stays():
    in_full = ["adapter=null", "freeze.language=false", "data.vision_cache=memory"]
    plan = plan_memory(recipe_of(*in_full), tiny_config(), ONE, switches=switches(vision_cache="memory"))
    phases = {phase.name: phase.parts for phase in plan.phases}
    assert phases["train"]["vision"] == phases["load"]["vision"] > 0


def test_replies_give_way():
    """Replies are made in batches of what there is room for: only one of them must fit."""
    recipe = recipe_of("model.dtype=bfloat16", EVALUATED)
    plan = plan_memory(recipe, PUBLISHED, of_tokens(512), switches=SWITCHES)
    evaluate = plan["evaluate"]
    assert evaluate.reducible > 3 * GB  # of 4 GB of keys and values for 8,192 tokens
    assert evaluate.needed == evaluate.total - evaluate.reducible
    assert plan.peak < evaluate.total


def test_a_plan_fits_what_it_needs():
    plan = MemoryPlan((Phase("load", {"language": 4 * GB}), Phase("train", {"language": 6 * GB}, reducible=GB)), ONE)
    assert plan.peak == 5 * GB
    assert plan.fits(5 * GB)
    assert not plan.fits(5 * GB - 1)
    assert describe_cards(plan.peak) == "fits a GPU of 6 GB or more"
    assert all(usable < size * GB for size, usable in CARDS.items())


PAGED = {"optim": "paged_adamw_8bit"}
CACHED = {"vision_cache": "disk"}


@pytest.mark.parametrize(
    ("overrides", "changes", "most"),
    [
        ([], {}, {512: 21.5}),
        (["model.embeddings_on_cpu=true", "data.vision_cache=disk"], PAGED | CACHED, {512: 15.5}),
        (ALL_IN_4_BITS, PAGED, {512: 7.0, 2048: 8.0}),
        ([*ALL_IN_4_BITS, "data.vision_cache=disk"], PAGED | CACHED, {512: 5.0, 2048: 6.0}),
    ],
    ids=["lora", "lora, images cached", "q-lora", "q-lora, images cached"],
)
def test_training_the_published_model_takes_no_more_than_it_should(overrides, changes, most):
    """GB by tokens of a forward: the targets of the specification's page on performance."""
    recipe = recipe_of("model.dtype=bfloat16", *overrides)
    for tokens, limit in most.items():
        workload = Workload(tokens, tokens // 5, 1, 1, tokens)
        plan = plan_memory(recipe, PUBLISHED, workload, switches=switches(**changes))
        assert plan["train"].total <= limit * GB
        assert plan["train"].total > 0.8 * limit * GB


def test_the_published_model_fits_the_cards_it_should():
    lora, q_lora = recipe_of("model.dtype=bfloat16"), recipe_of("model.dtype=bfloat16", *ALL_IN_4_BITS)
    assert plan_memory(lora, PUBLISHED, of_tokens(512), switches=SWITCHES).fits(CARDS[24])
    paged = switches(**PAGED)
    assert plan_memory(q_lora, PUBLISHED, of_tokens(512), switches=paged).fits(CARDS[8])


@pytest.mark.parametrize("seed", range(30))
def test_no_pack_is_larger_than_the_worst(seed):
    draw = random.Random(seed)
    count = draw.randrange(1, 12)
    images = [draw.randrange(3) for _ in range(count)]
    lengths = [258 * number + draw.randrange(2, 300) for number in images]
    supervised = [draw.randrange(1, length) for length in lengths]
    batch, budget = draw.randrange(1, 5), draw.choice([None, 600, 1200, 5000])
    worst = worst_workload(lengths, supervised, images, budget=budget, batch=batch)
    assert worst.supervised < worst.tokens
    assert worst.images * 258 <= worst.tokens
    for _ in range(50):
        members = draw.sample(range(count), min(batch, count))
        for chosen in pack([lengths[index] for index in members], budget):
            rows = [members[place] for place in chosen]
            assert sum(lengths[row] for row in rows) <= worst.tokens
            assert min(sum(supervised[row] for row in rows), worst.tokens - 1) <= worst.supervised
            assert sum(images[row] for row in rows) <= worst.images
            assert len(rows) <= worst.sequences
            assert max(lengths[row] for row in rows) <= worst.sequence_length


def test_the_worst_of_arrays_is_of_plain_numbers():
    arrays = [np.array([300, 20]), np.array([30, 5]), np.array([1, 0])]
    worst = worst_workload(*(one.tolist() for one in arrays), budget=320, batch=2)
    assert worst == Workload(320, 35, 2, 1, 300)
