"""`adapter.from`: the adapter, of this toolkit, PEFT, or the published script, whose weights a run goes on from.

What it is decides the recipe's `adapter` section: keys that are left out are as the adapter has them, others must
agree. All of it is compared with the model on the meta device, before any weight of the base is loaded.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from torch import nn

from finetune.errors import UserError
from finetune.model.base import Base, build_without_weights
from finetune.model.lora_targets import (
    VISION,
    find_language_targets,
    find_targets,
    is_target,
    refuse_idle_patterns,
)
from finetune.recipe import Adapter, Recipe
from finetune.run.checkpoints import MANIFEST, step_of, verify
from qwenvl import QwenVLConfig, QwenVLForConditionalGeneration
from qwenvl.checkpoint.adapter_config import INIT_TAKES_FROM_BASE, plain_key
from qwenvl.checkpoint.adapter_files import ADAPTER_CONFIG, weights_file
from qwenvl.checkpoint.checkpoint_files import tensors_in
from qwenvl.checkpoint.identity import BaseIdentity, differences
from qwenvl.checkpoint.record import ModelRecord, trained_as
from qwenvl.errors import MissingFileError
from qwenvl.loading import find_adapter, read_adapter
from qwenvl.views import Views

MERGE_FIRST = "Or merge it into its base (finetune merge), and train a new adapter on that"

# Settings that a section of a recipe has a key for, and those that say nothing of what the adapter computes.
_HAVE_A_KEY = {
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "bias", "use_rslora", "use_dora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    "init_lora_weights",
}
_SAY_NOTHING = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "fan_in_fan_out", "megatron_core", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}

# Keys that say the same thing together, by what it is called.
_TOGETHER = {
    "layers": ("targets", "vision_targets", "layers_to_transform"),
    "ranks": ("r", "rank_pattern"),
    "alphas": ("alpha", "alpha_pattern"),
    **{key: (key,) for key in ("bias", "rslora", "dora", "init", "train_embeddings")},
}
TABLES, VISUAL, RESAMPLER = {"transformer.wte", "lm_head"}, "transformer.visual", "transformer.visual.attn_pool"


@dataclass(frozen=True)
class GivenAdapter:
    """An adapter to go on from.

    Attributes:
        folder: of its files.
        sha256: of its settings and weights, wherever they are.
        record: what it was trained as.
    """

    folder: Path
    sha256: str
    record: ModelRecord

    def refuse_other_base(self, base: str, identity: BaseIdentity) -> None:
        """Check that it was trained on this base, as far as its record says.

        Raises:
            UserError: it was trained on another one.
        """
        if self.record.base is None:
            return
        if lines := differences(self.record.base.identity, identity):
            raise UserError(
                f"adapter.from: {self.folder} was trained on {self.record.base.path}, from which {base} differs: "
                f"{'; '.join(lines)}. Give the base that it was trained on as model.path"
            )

    def notes(self, recipe: Recipe, base: Base, views: Views | None, system: str | None) -> tuple[str, ...]:
        """In what this run differs from the training of the adapter, and what else a reader has to know.

        Args:
            recipe: of the run.
            views: what pictures an image is in the run.
            system: the run's system message.
        """
        record, notes = self.record, []
        if record.base is None:
            notes.append("The adapter says nothing of the weights that it was trained on: the base is not checked.")
        if record.chat_format == "raw":
            notes.append("The adapter was trained on raw text; this run trains ChatML.")
        if record.labels is None:
            return tuple(notes)  # nothing is known of its training
        for what, was, now in (
            ("parts of its base in 4 bits", ", ".join(record.quantize), ", ".join(base.quantized)),
            ("images as", record.views, views),
            ("system message", record.system, system),
            ("markup as tokens (data.grounding)", record.grounding, recipe.data.grounding),
            ("labels", record.labels, "assistant" if recipe.data.train_on == "last" else recipe.data.labels),
        ):
            if was != now:
                notes.append(f"The adapter was trained with another setting: {what}: {_said(was)}, now {_said(now)}.")
        return tuple(notes)


def find_given_adapter(recipe: Recipe, base: Base) -> tuple[Recipe, GivenAdapter | None]:
    """Find the adapter that a recipe goes on from, and check that all of it fits.

    Returns:
        The recipe with the keys of `adapter` as that adapter has them; and the adapter. A recipe without
        `adapter.from` stays as it is, and there is None.

    Raises:
        InputError: there is none (`MissingFileError`), it is damaged or not whole, has a weight that is not finite or
            that the model has no place for, or does what a recipe cannot say; or a key of the recipe disagrees.
    """
    if recipe.adapter is None or recipe.adapter.from_ is None:
        return recipe, None
    folder = find_given_folder(recipe.adapter.from_)
    settled = settle(recipe, folder, QwenVLConfig.from_pretrained(base.path))
    model = build_without_weights(settled, base)
    assert isinstance(model, PeftModel), "the recipe has an adapter"
    _refuse_other_tensors(folder, model)
    return settled, GivenAdapter(folder, _sha256(folder), trained_as(base.path, folder))


def load_given_weights(model: PeftModel, given: GivenAdapter) -> None:
    """Put an adapter's weights, and what was trained in full beside it, into a model with a new adapter of its shapes.

    Trained weights stay float32, whatever the file has.
    """
    weights = {_key(tensor.name): tensor.read() for tensor in tensors_in(weights_file(given.folder))}
    set_peft_model_state_dict(model, weights)


def settle(recipe: Recipe, folder: Path, config: QwenVLConfig) -> Recipe:
    """The recipe with the keys of `adapter` as an adapter in a folder has them.

    Raises:
        InputError: as `find_given_adapter`, but for the weights.
    """
    given = recipe.adapter
    assert given is not None, "the caller has looked"
    with torch.device("meta"):
        model = QwenVLForConditionalGeneration(config)
    settings = read_adapter(str(folder)).config
    if not isinstance(settings, LoraConfig):
        raise UserError(f"adapter.from: {folder} is not an adapter of LoRA, which is the only kind trained here")
    _refuse_other_settings(folder, settings)
    there = _section(folder, settings, model)
    values: dict[str, Any] = {name: getattr(there, name) for name in Adapter.model_fields}
    values["from_"] = given.from_
    if "dropout" in given.model_fields_set:  # of the training to come, and nothing that the adapter has
        values["dropout"] = given.dropout
    for what, keys in _TOGETHER.items():
        said = {key: getattr(given, key) for key in keys if key in given.model_fields_set}
        if what == "train_embeddings" and said.get(what) == "auto":
            continue
        if said and _meaning(there.model_copy(update=said), what, model) != _meaning(there, what, model):
            here = ", ".join(f"adapter.{key}: {_said(value)}" for key, value in said.items())
            instead = ", ".join(f"{key}: {_said(getattr(there, key))}" for key in keys)
            raise UserError(
                f"{here} disagrees with the adapter in {folder} (adapter.from), which has {instead}. Remove the key: "
                f"what is left out is as the adapter has it. {MERGE_FIRST}"
            )
        values |= said
    values["train_embeddings"] = there.train_embeddings
    adapter = Adapter(**{Adapter.model_fields[name].alias or name: value for name, value in values.items()})
    _refuse_other_freeze(recipe, folder, _saved(settings, model))
    settled = recipe.model_copy(update={"adapter": adapter})
    if findings := list(settled.findings()):
        problems = "; ".join(f"{', '.join(found.keys)}: {found.reason}" for found in findings)
        raise UserError(f"adapter.from: {folder} does not go with this recipe: {problems}")
    return settled


def find_given_folder(given: str) -> Path:
    """The folder of an adapter, given by it or by its run; verified where a run wrote it.

    Raises:
        InputError: there is none (`MissingFileError`), or it is damaged.
    """
    folder = find_adapter(given)
    if folder is None:
        path = Path(given)
        if (path / "model" / "config.json").is_file() or (path / "config.json").is_file():
            whole = path if (path / "config.json").is_file() else path / "model"
            raise UserError(f"adapter.from: {whole} is a whole checkpoint: give it as model.path")
        if (path / "run.json").is_file():
            raise UserError(
                f"adapter.from: {path} has no adapter yet, as the run did not finish. Give one of its checkpoints "
                f"({path / 'checkpoints' / 'step-N'}), or finish the run"
            )
        raise MissingFileError(f"adapter.from: {given}: no {ADAPTER_CONFIG} here, so this is neither run nor adapter")
    if (folder / MANIFEST).is_file() and (step_of(folder) is not None or folder.name == "adapter"):
        verify(folder)
    return folder


def _refuse_other_settings(folder: Path, settings: LoraConfig) -> None:
    """Raises:
    UserError: something that the adapter does has no key in a recipe.
    """
    defaults = LoraConfig()
    for field in fields(LoraConfig):
        value = getattr(settings, field.name)
        if field.name not in _HAVE_A_KEY | _SAY_NOTHING and value and value != getattr(defaults, field.name):
            raise UserError(
                f"adapter.from: {folder / ADAPTER_CONFIG}: {field.name} is {_said(value)}, which is not trained here. "
                f"{MERGE_FIRST}"
            )


def _section(folder: Path, settings: LoraConfig, model: nn.Module) -> Adapter:
    """An adapter's settings as a section of a recipe."""
    targets = [name for name, _ in model.named_modules() if is_target(settings, name)]
    others = [name for name in targets if not isinstance(model.get_submodule(name), nn.Linear)]
    if others or not targets:
        what = f"has LoRA on {others[0]}, which is no linear layer" if others else "has LoRA on none of the layers"
        raise UserError(f"adapter.from: {folder} {what}. {MERGE_FIRST}")
    ends = sorted(settings.target_modules) if isinstance(settings.target_modules, list | set) else []
    vision = [name for name in targets if name.startswith(VISION)]
    language = [name for name in targets if not name.startswith(VISION)]
    rank_pattern, alpha_pattern = settings.rank_pattern or {}, settings.alpha_pattern or {}
    ranks = {name: rank_pattern.get(_pattern(rank_pattern, name), settings.r) for name in targets}
    alphas = {name: alpha_pattern.get(_pattern(alpha_pattern, name), settings.lora_alpha) for name in targets}
    tables = _saved(settings, model) & TABLES
    if tables and tables != TABLES:
        raise UserError(
            f"adapter.from: {folder} trained {', '.join(tables)} in full and not {', '.join(TABLES - tables)}: here "
            f"both are trained or none. {MERGE_FIRST}"
        )
    init: Any = settings.init_lora_weights
    return Adapter(
        r=settings.r,
        alpha=settings.lora_alpha,
        rank_pattern=_patterns(rank_pattern, ranks, settings.r, targets),
        alpha_pattern=_patterns(alpha_pattern, alphas, settings.lora_alpha, targets),
        dropout=settings.lora_dropout,
        targets=_shortest_ends(model, ends, language),
        vision_targets=_shortest_ends(model, ends, vision),
        bias=settings.bias,
        rslora=settings.use_rslora,
        dora=settings.use_dora,
        init=init if init in INIT_TAKES_FROM_BASE else "default",
        train_embeddings=bool(tables),
    )


def _pattern(patterns: Mapping[str, Any], name: str) -> str:
    return get_pattern_key(list(patterns), name)


def _patterns(patterns: Mapping[str, Any], values: Mapping[str, Any], default: float, targets: list[str]) -> Any:
    """Patterns as they are written, or by full names where some are idle or two match one layer."""
    try:
        refuse_idle_patterns(patterns, targets, "")
    except UserError:
        return {name: value for name, value in values.items() if value != default}
    return dict(patterns)


def _shortest_ends(model: nn.Module, ends: list[str], wanted: list[str]) -> tuple[str, ...]:
    """Ends of names that stand for the wanted layers, or these in full."""
    inside = VISION if wanted and wanted[0].startswith(VISION) else "transformer.h."
    used = [end for end in ends if any(name == end or name.endswith(f".{end}") for name in wanted)]
    if used and set(find_targets(model, used, inside, "")) == set(wanted):
        return tuple(used)
    return tuple(wanted)


def _saved(settings: LoraConfig, model: nn.Module) -> set[str]:
    """Names of the modules that were trained in full, as PEFT finds them."""
    ends = tuple(settings.modules_to_save or ())
    return {name for name, _ in model.named_modules() if ends and name.endswith(ends)}


def _meaning(adapter: Adapter, what: str, model: nn.Module) -> Any:
    """What the keys of an adapter say together, however they are written."""
    if what not in ("layers", "ranks", "alphas"):
        return getattr(adapter, what)
    names = find_language_targets(model, adapter.targets, adapter.layers_to_transform)
    names += find_targets(model, adapter.vision_targets, VISION, "adapter.vision_targets")
    if what == "layers":
        return set(names)
    patterns, default = (
        (adapter.rank_pattern, adapter.r) if what == "ranks" else (adapter.alpha_pattern, adapter.alpha)
    )
    refuse_idle_patterns(patterns, names, "adapter.rank_pattern" if what == "ranks" else "adapter.alpha_pattern")
    return {name: patterns.get(_pattern(patterns, name), default) for name in names}


def _refuse_other_freeze(recipe: Recipe, folder: Path, saved: set[str]) -> None:
    """Raises:
    UserError: the recipe freezes what was trained in full beside the adapter, or trains what it does not have, or the
        adapter has something that is not trained here.
    """
    if others := saved - TABLES - {VISUAL, RESAMPLER}:
        raise UserError(
            f"adapter.from: {folder} trained {', '.join(sorted(others))} in full, which is not trained beside LoRA "
            f"here. {MERGE_FIRST}"
        )
    expected = {"vision": VISUAL not in saved, "resampler": not saved & {VISUAL, RESAMPLER}}
    for key, frozen in expected.items():
        if key == "resampler" and VISUAL in saved:
            continue  # it is part of what was trained, whether it is trained now or not
        if getattr(recipe.freeze, key) != frozen:
            has = f"has no {key} of its own" if frozen else f"has the {key} trained in full"
            raise UserError(
                f"freeze.{key}: {_said(not frozen)}, and the adapter in {folder} (adapter.from) {has}: set "
                f"freeze.{key}: {_said(frozen)}. {MERGE_FIRST}"
            )


def _refuse_other_tensors(folder: Path, model: PeftModel) -> None:
    """Compare an adapter's tensors with those that a model has a place for.

    Raises:
        UserError: one is missing, has no place, is there twice, has another shape or is not finite; names it.
    """
    file = weights_file(folder)
    # Not of its `state_dict`, which on the meta device cannot describe 4-bit weights.
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    places = get_peft_model_state_dict(model, tensors, save_embedding_layers=False)
    shapes = {_key(name): tuple(tensor.shape) for name, tensor in places.items()}
    seen: set[str] = set()
    for tensor in tensors_in(file):
        key = _key(tensor.name)
        if key not in shapes:
            raise UserError(f"adapter.from: {file}: {tensor.name} has no place in the model: the base is another")
        if key in seen:
            raise UserError(f"adapter.from: {file}: {tensor.name} is there twice, in two spellings")
        if tuple(tensor.shape) != shapes[key]:
            raise UserError(
                f"adapter.from: {file}: {tensor.name} has shape {list(tensor.shape)}, and the model has "
                f"{list(shapes[key])} there: it is of another base, or damaged"
            )
        if not torch.isfinite(tensor.read()).all():
            raise UserError(
                f"adapter.from: {file}: {tensor.name} holds NaN or infinities: its training diverged, or the file is "
                "damaged. Give an earlier checkpoint"
            )
        seen.add(key)
    if missing := sorted(shapes.keys() - seen):
        raise UserError(f"adapter.from: {file}: {missing[0]} is missing: the adapter is not complete")


def _key(name: str) -> str:
    """A tensor's name as PEFT saves it."""
    name = plain_key(name)
    return name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name


def _sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in (folder / ADAPTER_CONFIG, weights_file(folder)):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return "none" if value in (None, "") else str(value)
