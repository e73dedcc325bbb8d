"""The memory plan of a run: bytes on the device in each of its phases, from recipe and config alone.

Weights, gradients and optimizer states are exact; what a step allocates is counted by running it on the meta device
(`activations`). A model that several cards share (`sharding`) is planned for each of them.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import torch

from finetune.batches.budget import ENCODED_TOGETHER, KEPT_FEATURE_BYTES, REPLY_BATCH_ROWS, REPLY_BATCH_TOKENS
from finetune.memory.activations import BACKWARD, LANGUAGE, LOSS, VISION, VISION_BACKWARD, Step, step_of_shapes
from finetune.memory.sharding import Sharding, SharedBytes, shared_bytes
from finetune.memory.switches import Switches
from finetune.memory.weights import WeightBytes, model_of_shapes, state_bytes, weight_bytes, weights_dtype
from finetune.memory.workload import Workload
from finetune.model.adapters import TrainableModel, without_adapter
from finetune.model.masters import copy_bytes
from finetune.model.recomputation import Recomputation
from finetune.quantities import format_bytes
from finetune.recipe import Recipe
from qwenvl import QwenVLConfig

COPIES = "16-bit copies"
"""Of trained float32 weights, for forward and backward."""
GATHERED = "gathered layers"
"""Weights that cards share, made whole where they are computed with."""


@dataclass(frozen=True)
class Phase:
    """A phase of a run, at the moment at which it holds most.

    Attributes:
        name: load, encode, train, evaluate or save.
        parts: bytes on the device, by what they are.
        reducible: of these, bytes that the run saves by itself where memory is short: it generates fewer replies at a
            time.
        host: bytes in host memory, unless that is the device.
    """

    name: str
    parts: dict[str, int]
    reducible: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """All bytes on the device."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """Bytes without which the phase cannot run."""
        return self.total - self.reducible


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a run.

    Attributes:
        phases: in the order of the run.
        workload: the forward that was planned.
    """

    phases: tuple[Phase, ...]
    workload: Workload
    _by_name: dict[str, Phase] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {phase.name: phase for phase in self.phases})

    def __getitem__(self, name: str) -> Phase:
        return self._by_name[name]

    @property
    def peak(self) -> int:
        """Bytes that the device must have."""
        return self.fullest.needed

    @property
    def fullest(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.needed)

    @property
    def host(self) -> int:
        """Bytes in host memory, unless that is the device."""
        return max(phase.host for phase in self.phases)

    def fits(self, capacity_bytes: int) -> bool:
        return self.peak <= capacity_bytes

    def lines(self, capacity: int | None = None) -> list[str]:
        """What the run needs in each phase, and what the fullest phase consists of, in words.

        Args:
            capacity: bytes that can be used; None leaves them out.
        """
        usable = "" if capacity is None else f" of {format_bytes(capacity)} that can be used"
        phases = ", ".join(f"{phase.name} {self._show(phase.needed)}" for phase in self.phases)
        host = f", and {format_bytes(self.host)} of host memory" if self.host else ""
        large = [(name, size) for name, size in self.fullest.parts.items() if size >= self.fullest.total / 500]
        parts = ", ".join(f"{name} {self._show(size)}" for name, size in large)
        return [
            f"{format_bytes(self.peak)} at most{usable}{host} ({self._unit}: {phases})",
            f"in {self.fullest.name}: {parts}",
        ]

    def table(self) -> list[tuple[str, ...]]:
        """Rows of a table: the unit and the phases' names, each kind of bytes, the totals."""
        names = dict.fromkeys(name for phase in self.phases for name in phase.parts)
        return [
            (self._unit, *(phase.name for phase in self.phases)),
            *((name, *(self._show(phase.parts.get(name, 0)) for phase in self.phases)) for name in names),
            ("together", *(self._show(phase.total) for phase in self.phases)),
        ]

    @property
    def _unit(self) -> str:
        return "GB" if self.peak >= 1e9 else "MB"

    def _show(self, size: int) -> str:
        return f"{size / 1e9:.2f}" if self._unit == "GB" else f"{size / 1e6:.1f}"


def plan_memory(
    recipe: Recipe,
    config: QwenVLConfig,
    workload: Workload,
    *,
    switches: Switches,
    sharding: Sharding | None = None,
) -> MemoryPlan:
    """Plan a run without loading its weights.

    `adapter.train_embeddings: auto` counts as false: see `weights.settle_embeddings`.

    Args:
        workload: the largest forward of the run (`workload.worst_workload`).
        switches: what the run computes with.
        sharding: how cards share the model, for a plan of each of them; None where a card has all of it.

    Raises:
        UserError: the model cannot be trained as the recipe says.
        ValueError: no forward has the sizes of `workload`.
    """
    return _Plan(recipe, config, workload, switches, sharding).make()


class _Plan:
    """Makes the phases of one plan."""

    def __init__(
        self,
        recipe: Recipe,
        config: QwenVLConfig,
        workload: Workload,
        switches: Switches,
        sharding: Sharding | None,
    ):
        self.recipe, self.config, self.workload, self.switches = recipe, config, workload, switches
        self.device_type = switches.device_type
        self.on_host = self.device_type == "cpu"
        as_peft = sharding is not None and sharding.way == "zero3"
        self.model = model_of_shapes(recipe, config, self.device_type, as_peft=as_peft)
        self.weights: WeightBytes = weight_bytes(self.model)
        # Trained without an adapter in 16 bits, weights are float32, and rounded copies of them compute.
        self.rounds_to = weights_dtype(recipe, config, self.device_type) if recipe.adapter is None else None
        self.shared: SharedBytes | None = None
        if sharding is not None:
            self.shared = shared_bytes(self.model, sharding, switches.optim, self.device_type, self.rounds_to)
        self.states = self.shared.states if self.shared else state_bytes(self.model, switches.optim, self.device_type)
        self.copies = 0 if self.rounds_to is None or self.shared else copy_bytes(self.model, self.rounds_to)
        # With a vision cache images are encoded before training, and the vision side is removed then, unless the model
        # is trained without an adapter: its checkpoints contain the vision side.
        self.cached = switches.vision_cache != "off" and config.visual is not None
        self.removes_vision = self.cached and recipe.adapter is not None

    def make(self) -> MemoryPlan:
        phases = [self.load(), *self.encode(), self.train(), *self.evaluate(), self.save()]
        return MemoryPlan(tuple(phases), self.workload)

    def kept(self, *, training: bool, vision: bool = True) -> dict[str, int]:
        """What a phase holds throughout: weights, their copies, optimizer states and, with `training`, gradients."""
        removed = () if vision else ("vision", "resampler")
        weights = self.shared.weights if self.shared else self.weights.device
        parts = {name: size for name, size in weights.items() if name not in removed}
        if self.on_host and self.weights.host:
            parts["embeddings"] = parts.get("embeddings", 0) + self.weights.host
        if self.copies:
            parts[COPIES] = self.copies
        if self.shared and self.shared.gathered:
            parts[GATHERED] = self.shared.gathered
        if training:
            parts["gradients"] = self.shared.gradients if self.shared else self.weights.gradients
        parts["optimizer states"] = self.states.device
        return parts

    def host(self, offloaded: int = 0) -> int:
        return 0 if self.on_host else self.weights.host + self.states.host + offloaded

    # --- phases ------------------------------------------------------------------------------------------------------

    def load(self) -> Phase:
        parts = {name: size for name, size in self.weights.device.items() if name != "adapter"}
        quantized = self.weights.staged > 0
        if quantized:
            # bitsandbytes needs 16 bytes per value while it quantises on the CPU.
            parts["one weight in 16 bits"] = self.weights.staged * (8 if self.on_host else 1)
        if self.on_host and self.weights.host:
            parts["embeddings"] = parts.get("embeddings", 0) + self.weights.host
        # 16-bit weights are all read into host memory before they are moved; 4-bit weights are moved one by one.
        staged = self.weights.largest if quantized else sum(self.weights.device.values())
        if self.shared:  # the first process reads it, and shares it out tensor by tensor
            parts = dict(self.shared.weights) | {"one tensor": self.shared.largest}
        return Phase("load", parts, host=0 if self.on_host else staged + self.weights.host)

    def encode(self) -> list[Phase]:
        if not self.workload.images:
            return []
        if self.cached:
            parts = dict(self.weights.device)
            host = self.host()
            if not self.on_host and self.recipe.adapter is not None:
                # Trained parameters are in host memory meanwhile (`phase.trained_parameters_on_host`).
                host += parts.pop("adapter")
            parts["encoding images"] = self._encoding(ENCODED_TOGETHER)
            return [Phase("encode", parts, host=host)]
        parts = self.kept(training=True) | {"encoding images": self._step().peak(VISION).total}
        return [Phase("encode", parts, host=self.host())]

    def train(self) -> Phase:
        kept = self.kept(training=True, vision=not self.removes_vision)
        step = self._step()
        fullest = step.peak(LANGUAGE, LOSS, BACKWARD, VISION_BACKWARD)
        if self.shared and self.shared.exchanged:
            kept["gradients being exchanged"] = self.shared.exchanged
        activations = fullest.held[VISION] + fullest.held[LANGUAGE]
        made = {
            "activations": activations,
            "loss": fullest.held[LOSS],
            "working memory": fullest.total - activations - fullest.held[LOSS],
        }
        if self.states.working > fullest.total + self.copies:
            kept.pop(COPIES, None)
            made = {"working memory": self.states.working}  # the optimizer's step is the fullest moment
        return Phase("train", kept | made, host=self.host(step.host))

    def evaluate(self) -> list[Phase]:
        evaluate = self.recipe.evaluate
        if evaluate is None:
            return []
        kept = self.kept(training=False, vision=not self.removes_vision)
        loss = {"loss of the data": self._step(trains=False).peak().total}
        replies = evaluate.sample if evaluate.task is not None else evaluate.predictions
        if not replies:
            return [Phase("evaluate", kept | loss, host=self.host())]
        row = self.workload.sequence_length + evaluate.max_new_tokens
        rows = max(1, min(REPLY_BATCH_TOKENS // row, REPLY_BATCH_ROWS, replies))
        many, one = (self._replies(count, row, replies) for count in (rows, 1))
        need = max(sum(loss.values()), sum(one.values()))
        made = many if sum(many.values()) >= need else loss
        return [Phase("evaluate", kept | made, reducible=sum(made.values()) - need, host=self.host())]

    def save(self) -> Phase:
        parts = self.kept(training=False, vision=not self.removes_vision)
        if self.shared:  # gathered tensor by tensor, into the host memory of the first process
            parts.pop(GATHERED, None)
            parts["one tensor"] = self.shared.largest
            return Phase("save", parts, host=self.host(sum(self.weights.device.values())))
        return Phase("save", parts, host=self.host())

    # --- what steps allocate -----------------------------------------------------------------------------------------

    def _step(self, *, trains: bool = True) -> Step:
        switches = self.switches
        kind: Recomputation | None = switches.checkpointing if trains else None
        if kind == "offload" and self.on_host:
            kind = "full"  # inputs of layers are in host memory already
        # TRL's own key makes the embeddings' output require gradients; ours does not need that.
        by_trl = self.recipe.train.checkpointing is None and self.recipe.adapter is not None and kind != "none"
        return _step(
            self.model,
            self.workload,
            kind,
            self.device_type,
            switches.attention,
            switches.kernels,
            features=self.cached,
            input_gradient=trains and by_trl,
            rounds_to=self.rounds_to,
        )

    def _encoding(self, images: int) -> int:
        """Bytes that encoding this many images at once allocates, without gradients."""
        tokens = images * (self.config.n_queries + 2) + 1
        return self._forward(Workload(tokens, 1, 1, images, tokens)).peak(VISION).total

    def _forward(self, workload: Workload) -> Step:
        """A forward without gradients."""
        attention, kernels = self.switches.attention, self.switches.kernels
        return _step(self.model, workload, None, self.device_type, attention, kernels, rounds_to=self.rounds_to)

    def _replies(self, rows: int, row: int, replies: int) -> dict[str, int]:
        """Bytes that a batch of replies allocates.

        Args:
            rows: prompts in the batch.
            row: tokens of a prompt with its reply.
            replies: prompts in all.
        """
        config, value = self.config, weights_dtype(self.recipe, self.config, self.device_type).itemsize
        tokens = rows * row
        layer = tokens * 2 * config.num_attention_heads * config.kv_channels * value
        forward = self._forward(Workload(tokens, 1, 1, 0, tokens))
        made = {
            # One layer's are copied whenever they grow.
            "keys and values": layer * (config.num_hidden_layers + 1),
            # Padding needs a mask, both boolean and additive.
            "forward of prompts": forward.peak(LANGUAGE, LOSS).total + rows * row * row * (1 + value),
        }
        if config.visual is not None and not self.cached:
            features = config.n_queries * config.hidden_size * value
            made["image features"] = min(KEPT_FEATURE_BYTES, replies * features)
            encoding = self._encoding(min(ENCODED_TOGETHER, replies))
            made["forward of prompts"] = max(made["forward of prompts"], encoding)
        return made


@lru_cache(maxsize=128)
def _step(
    model: TrainableModel,
    workload: Workload,
    checkpointing: Recomputation | None,
    device_type: str,
    attention: str,
    kernels: str,
    *,
    features: bool = False,
    input_gradient: bool = False,
    rounds_to: torch.dtype | None = None,
) -> Step:
    without_adapter(model).config._attn_implementation = attention
    return step_of_shapes(
        model,
        workload,
        checkpointing,
        device_type,
        kernels=kernels,
        features=features,
        input_gradient=input_gradient,
        rounds_to=rounds_to,
    )
