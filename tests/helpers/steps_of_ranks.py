"""The samples of every step of a run, process by process, without computing anything."""

import itertools
import json
from pathlib import Path

import torch
from recipes_for_tests import TINY
from trl import SFTConfig

from finetune.batches.collate import Collator
from finetune.data.checks.rules import Rules
from finetune.data.sample import Sample
from finetune.run.folder import RunFolder
from finetune.training.trainer import QwenVLTrainer
from qwenvl import load_model, load_processor

SAMPLES, PER_DEVICE, EPOCHS = 17, 1, 2


def steps_of_rank(rank: int, folder: str, processes: int, accumulation: int, shuffle: bool) -> None:
    """Write, for each epoch and step, the samples of this process."""
    processor = load_processor(TINY)
    rules = Rules(processor.tokenizer, None, processor.n_queries)
    message = ({"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"})
    samples = [Sample(message, (), f"row {number}") for number in range(SAMPLES)]
    trainer = QwenVLTrainer(
        load_model(TINY, dtype="float32"),
        SFTConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_length=None,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            per_device_train_batch_size=PER_DEVICE,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=EPOCHS,
            gradient_checkpointing=False,
            seed=7,
            data_seed=7,
        ),
        collators={"train": Collator(samples, rules, processor.image_processor)},
        indices={"train": range(SAMPLES)},
        run=RunFolder(folder),
        tokens_per_batch=2048,
        shuffle=shuffle,
    )
    loader = trainer.get_train_dataloader()
    steps = trainer.set_initial_training_values(trainer.args, loader)
    found = []
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        batches = iter(loader)
        found.append([])
        while taken := list(itertools.islice(batches, accumulation)):
            assert all(len(batch["samples"]) <= PER_DEVICE for batch in taken)
            found[-1].append(torch.cat([batch["samples"] for batch in taken]).tolist())
    result = {"steps": found, "per_epoch": steps[1], "max_steps": steps[6]}
    Path(folder, f"steps-{shuffle}-{processes}-{rank}.json").write_text(json.dumps(result))
