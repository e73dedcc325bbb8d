"""Replies and losses of the tiny model on one process, or sharded over several by FSDP2 as Accelerate does it."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from recipes_for_tests import IMAGES, LORA, TINY
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from finetune.batches.collate import Collator
from finetune.data.checks.rules import Rules
from finetune.errors import UserError
from finetune.memory.out_of_memory import PackBudget
from finetune.model.step_loss import forward_with_loss
from finetune.replies.lockstep import Lockstep, is_sharded
from finetune.replies.replies import Decoding, Prompt, generate_replies, plan_replies
from finetune.training.equal_packs import Fillers
from finetune.training.evaluation_loss import sum_losses
from qwenvl import ImageAccess, load_model, load_processor
from qwenvl.text.chat import render_chat

NEW = 8


def prompts_for(processor, count: int, *, text_only: bool = False, broken: int | None = None) -> list[Prompt]:
    """Prompts of different lengths with none, one or two images; the images of number `broken` cannot be read."""
    pages = itertools.cycle([IMAGES[:1], [], IMAGES[1:3], IMAGES[:1], IMAGES[3:4], [IMAGES[1], IMAGES[1]]])
    prompts = []
    for number, images in zip(range(count), pages, strict=False):
        sources = ["gone.png"] if number == broken else [] if text_only else [str(file) for file in images]
        parts = [{"type": "image", "image": source} for source in sources]
        content = [*parts, {"type": "text", "text": f"What is number {number}? " * (1 + number % 4)}]
        rendered = render_chat(
            [{"role": "user", "content": content}],
            processor.tokenizer,
            add_generation_prompt=True,
            n_queries=processor.n_queries,
        )
        prompts.append(Prompt(rendered.ids, rendered.images, ImageAccess(), f"row {number}"))
    return prompts


def tiny_model(*, adapter: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = load_model(TINY, dtype="float32").eval()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=LORA.targets)).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.5)
    return model


def ids_of(model: nn.Module, processor, prompts, lockstep=None, **options) -> dict[int, list[int] | str]:
    made = generate_replies(
        model,
        prompts,
        plan_replies(prompts),
        processor.tokenizer,
        processor.image_processor,
        Decoding(NEW, (), batch_tokens=1300),
        lockstep=lockstep,
        **options,
    )
    return {reply.index: list(reply.ids) if reply.unreadable is None else reply.unreadable for reply in made}


def shard(model: nn.Module) -> nn.Module:
    """As Accelerate wraps for FSDP2: the blocks, the embeddings, norm and head together, then the rest."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parts = base.transformer
    for block in (*parts.h, *parts.visual.transformer.resblocks, parts.wte):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard([parts.ln_f, base.lm_head], mesh=mesh, reshard_after_forward=False)
    model = fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "generate")
    return model


def reply_sharded(rank: int, folder: str, cases: list[dict]) -> None:
    """Write the replies of each case, of this process's prompts: every n-th."""
    processor = load_processor(TINY)
    for adapter in (False, True):
        model = shard(tiny_model(adapter=adapter))
        assert is_sharded(model)
        for case in cases:
            if case["adapter"] != adapter:
                continue
            prompts = prompts_for(processor, **case["prompts"])
            own = list(range(rank, len(prompts), dist.get_world_size()))
            state = torch.get_rng_state()
            with Lockstep(model, processor.tokenizer.pad_token_id) as lockstep:
                replies = ids_of(model, processor, [prompts[n] for n in own], lockstep, on_bad_image="wrong")
            assert torch.equal(state, torch.get_rng_state())
            assert "forward" not in vars(model) and "generate" in vars(model) and not hasattr(model, "run_as_forward")
            # What is gathered now is the same on all processes: a forward works.
            model(input_ids=torch.tensor([[5]]), use_cache=False)
            text = json.dumps({own[index]: ids for index, ids in replies.items()})
            Path(folder, f"{case['name']}-{rank}.json").write_text(text)


def fail_together(rank: int, folder: str) -> None:
    """The second process meets an image that cannot be read; write what each raises."""
    processor = load_processor(TINY)
    model = shard(tiny_model())
    prompts = prompts_for(processor, 6, broken=1)
    own = [prompts[n] for n in range(rank, 6, dist.get_world_size())]
    try:
        with Lockstep(model, processor.tokenizer.pad_token_id) as lockstep:
            ids_of(model, processor, own, lockstep)
    except ValueError as error:
        Path(folder, f"raised-{rank}").write_text(f"{isinstance(error, UserError)} {error}")
    # The model is whole, and the processes are together.
    with Lockstep(model, processor.tokenizer.pad_token_id) as lockstep:
        ids_of(model, processor, own[:1] if rank == 0 else [], lockstep)


def eval_batches(processor, count: int, size: int) -> list[dict]:
    """Batches of conversations with none, one or two images."""
    samples = []
    for number in range(count):
        images = [{"type": "image", "image": str(IMAGES[(number + n) % 5])} for n in range((number + 1) % 3)]
        question = [*images, {"type": "text", "text": f"Question {number} " + "and more " * number}]
        messages = ({"role": "user", "content": question}, {"role": "assistant", "content": "Answer " * (number + 1)})
        samples.append(SimpleNamespace(messages=messages, origin=f"row {number}", access=ImageAccess()))
    rules = Rules(processor.tokenizer, None, processor.n_queries)
    collator = Collator(samples, rules, processor.image_processor)
    rows = [{"sample": number} for number in range(count)]
    return [collator(rows[start : start + size]) for start in range(0, count, size)]


def sums_of(model: nn.Module, batches, *, sharded: bool) -> list[float]:
    def loss_of_pack(pack):
        with torch.no_grad():
            return forward_with_loss(model, model, pack, 1).loss

    return sum_losses(
        batches,
        loss_of_pack,
        PackBudget("tokens", 300, ()),
        lambda pack, failure: None,
        seq_length=100,
        device=torch.device("cpu"),
        fillers=Fillers.of(model.config, 5) if sharded else None,
    ).tolist()


def loss_sharded(rank: int, folder: str) -> None:
    """Write the sums of this process: the first has all batches but one, the third none; then one cannot be made."""
    processor = load_processor(TINY)
    model = shard(tiny_model())
    batches = eval_batches(processor, 7, 2)
    sums = sums_of(model, [batches[:-1], batches[-1:], []][rank], sharded=True)
    Path(folder, f"sums-{rank}.json").write_text(json.dumps(sums))

    def broken():
        yield batches[rank]
        if rank == 1:
            raise UserError("row 7 is damaged")
        yield batches[rank]

    try:
        sums_of(model, broken(), sharded=True)
    except UserError as error:
        Path(folder, f"raised-{rank}").write_text(str(error))
