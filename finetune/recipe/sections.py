"""The sections of a recipe other than `train`: every key with its type, unit and one sentence."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, Protocol, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator
from pydantic_core import PydanticCustomError

from finetune.recipe.problems import nearest

NAME = re.compile(r"\w[\w.-]*")
"""Of a source: it becomes part of a logged key and of a folder's name."""


class Named(Protocol):
    """A source that has a name: the one it was given, else that of its path."""

    @property
    def path(self) -> str: ...

    @property
    def name(self) -> str | None: ...


def source_name(source: Named) -> str:
    """The name given, or that of the file, folder or hub dataset without folders and ending."""
    if source.name is not None:
        return source.name
    return re.sub(r"[^\w.-]+", "_", Path(source.path).stem).lstrip("_.-") or "data"


def source_names(sources: Sequence[Named]) -> list[str]:
    """The name of each source, in their order; one may come twice, see `name_given_twice`."""
    return [source_name(source) for source in sources]


def name_given_twice(names: Sequence[str]) -> str | None:
    """The first name that several sources share; None where all differ, as they must: scores go by these names."""
    return next((name for number, name in enumerate(names) if name in names[:number]), None)


class Finding(NamedTuple):
    """Keys that do not go together, or a value that its type allows but that is wrong."""

    keys: tuple[str, ...]
    """Dotted paths from the section that found it; the first is the one to look at."""
    reason: str
    remedy: str = ""


CONTRADICTION = "contradiction"
"""Type of the pydantic error that carries findings."""


class Section(BaseModel):
    """Immutable; unknown keys are refused; `"3"` is not 3, 3.0 is not 3, true is not 1, but 3 may stand for 3.0."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def findings(self) -> Iterator[Finding]:
        """Keys of this section that do not go together, though each is right by itself."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_findings(self) -> Self:
        findings = tuple(self.findings())
        if findings:
            text = "; ".join(f"{', '.join(finding.keys)}: {finding.reason}" for finding in findings)
            raise PydanticCustomError(CONTRADICTION, "{text}", {"text": text, "findings": findings})
        return self


class ReadOnlyDict(dict[str, Any]):
    """A mapping in a recipe, as immutable as the sections."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("a recipe does not change after it was read")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple[type[Self], tuple[dict[str, Any]]]:
        return type(self), (dict(self),)


def read_only(value: Any) -> Any:
    """Lists as tuples and mappings as read-only ones, all the way down."""
    if isinstance(value, dict):
        return ReadOnlyDict({key: read_only(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(read_only(item) for item in value)
    return value


Word = Annotated[str, Field(min_length=1)]
Words = Annotated[tuple[Word, ...], Strict(False)]
Count = Annotated[int, Field(ge=1)]


class Model(Section):
    """The checkpoint that training starts from."""

    path: Word
    """Hub id or folder of the checkpoint; a relative folder is taken from the working directory."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The type weights are loaded in; auto is bfloat16 on a GPU that has it, float16 on others, as stored on a CPU."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4 holds the frozen base in 4 bits (Q-LoRA)."""
    quantize: Annotated[tuple[Literal["language", "vision", "head"], ...], Strict(False)] = ("language",)
    """With nf4, the parts in 4 bits: the language model's linears, the vision tower's, and the output head."""
    embeddings_on_cpu: bool = False
    """Keep the token embeddings, frozen, in host memory: 1.2 GB less on the GPU."""
    attention: Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2"] = "auto"
    """auto is varlen: each sequence of a pack by itself; sdpa masks the others, eager is the plain reference."""
    kernels: Literal["auto", "torch", "liger"] = "auto"
    """For norms, rotary positions and SwiGLU: liger fuses each of them (GPU); auto takes it where it is installed."""

    def findings(self) -> Iterator[Finding]:
        if "language" not in self.quantize:
            yield Finding(("quantize",), "the language model is in 4 bits where anything is", "add language")
        if len(set(self.quantize)) < len(self.quantize):
            yield Finding(("quantize",), "a part is named twice", "name each once")
        if self.quantization == "none" and self.quantize != ("language",):
            reason = "acts with quantization: nf4 only"
            yield Finding(("quantize", "quantization"), reason, "set quantization: nf4, or remove quantize")


class Adapter(Section):
    """A LoRA adapter; null in its place trains without one, as `freeze` says. Defaults are the published script's."""

    r: Count = 64
    """Rank of the LoRA matrices."""
    alpha: Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0)] = 16
    """LoRA's scale is alpha / r (alpha / sqrt(r) with rslora)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the adapter's inputs that are dropped in training."""
    targets: Words = ("c_attn", "attn.c_proj", "w1", "w2")
    """Linear layers of the language model that get LoRA, by the end of their names."""
    vision_targets: Words = ()
    """Linear layers of the vision tower and the resampler that get LoRA, by the end of their names."""
    rslora: bool = False
    """Scale by alpha / sqrt(r), which keeps large ranks learning."""
    dora: bool = False
    """Weight-decomposed LoRA: magnitude and direction apart."""
    init: Literal["default", "gaussian", "pissa", "olora", "orthogonal"] = "default"
    """How the LoRA matrices start; default leaves the model unchanged at step 0."""
    train_embeddings: Literal["auto"] | bool = "auto"
    """Train token embeddings and output head in full; auto does for a base model, which never saw ChatML's tokens."""

    def findings(self) -> Iterator[Finding]:
        if not self.targets and not self.vision_targets:
            yield Finding(("targets", "vision_targets"), "the adapter has no layer to sit on", "name at least one")
        for key in ("targets", "vision_targets"):
            names = getattr(self, key)
            if len(set(names)) < len(names):
                yield Finding((key,), "a layer is named twice", "name each once")


class Freeze(Section):
    """Components whose own weights are not trained in full; LoRA beside them is unaffected."""

    vision: bool = True
    """The vision transformer (1.8 B parameters)."""
    resampler: bool = True
    """The adapter between vision and language (93 M parameters; the paper calls it the VL adapter)."""
    language: bool = True
    """The language model (7.7 B parameters with embeddings and output head)."""


ROLES = {
    "messages": ("messages", "images", "prompt", "completion"),
    "qwen_json": ("conversations",),
    "llava": ("image", "conversations"),
    "vqa": ("image", "question", "answers"),
    "grounding": ("image", "phrase", "box"),
    "caption": ("image", "caption"),
}
"""The roles that the columns of each format can have."""

PLACEHOLDERS = {"vqa": "{question}", "grounding": "{phrase}", "caption": ""}
"""What the prompt of each format must hold; the rows of other formats bring their prompts."""


class Source(Section):
    """A dataset, or a part of one, in one of the formats."""

    path: Word
    """File, folder or hub dataset id; a relative path is taken from the working directory."""
    format: Literal["messages", "qwen_json", "llava", "vqa", "grounding", "caption"]
    """What a row looks like."""
    config: Word | None = None
    """Configuration of a hub dataset that has several."""
    split: Word | None = None
    """Split of a hub dataset, such as train or validation."""
    columns: Annotated[dict[str, Word], AfterValidator(ReadOnlyDict)] = Field(default_factory=ReadOnlyDict)
    """Role -> name of its column, where the two differ."""
    box_form: Literal["xyxy", "xywh"] | None = None
    """Boxes, in pixels, are two corners (xyxy) or a corner, width and height (xywh); for format grounding only."""
    prompt: Word | None = None
    """What the user says: {question} (vqa) or {phrase} (grounding) is filled in; the instruction for caption."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each row is used an epoch: 2.0 twice, 0.5 half of the rows."""
    limit: Count | None = None
    """Only this many of the first rows."""
    streaming: bool = False
    """Fetch a hub dataset row by row, and none beyond limit, instead of whole."""

    def findings(self) -> Iterator[Finding]:
        roles = ROLES[self.format]
        for role in self.columns:
            if role not in roles:
                meant = nearest(role, roles)
                remedy = f"did you mean {' or '.join(meant)}? " if meant else ""
                remedy += f"The roles are {', '.join(roles)}"
                yield Finding((f"columns.{role}", "format"), f"format {self.format} has no such role", remedy)
        if self.format == "grounding" and self.box_form is None:
            yield Finding(
                ("format", "box_form"),
                "boxes in pixels are stored in two ways, and box_form does not say which",
                "set box_form: xyxy or xywh",
            )
        if self.format != "grounding" and self.box_form is not None:
            yield Finding(("box_form", "format"), f"format {self.format} has no boxes in pixels", "remove box_form")
        if self.prompt is not None and self.format not in PLACEHOLDERS:
            yield Finding(("prompt", "format"), f"rows of format {self.format} bring their prompts", "remove prompt")
        elif self.prompt is not None and PLACEHOLDERS[self.format] not in self.prompt:
            needed = PLACEHOLDERS[self.format]
            yield Finding(("prompt", "format"), f"there is no {needed} in it to fill in", f"write {needed} in it")


def one_as_list(value: Any) -> Any:
    """A single source as a list of one."""
    return (value,) if isinstance(value, dict | Source) else value


Sources = Annotated[
    tuple[Source, ...],
    Strict(False),
    Field(min_length=1),
    BeforeValidator(one_as_list, json_schema_input_type=Source | Annotated[tuple[Source, ...], Field(min_length=1)]),
]


class NamedSource(Source):
    """A dataset to evaluate on, whose score is told apart from those of the others."""

    name: Word | None = None
    """The word its score is logged under, such as old for eval_anls_old; null takes the name of its file."""

    def findings(self) -> Iterator[Finding]:
        yield from super().findings()
        if self.name is not None and not NAME.fullmatch(self.name):
            yield Finding(("name",), f"{self.name!r} is not one word", "use letters, digits, _, . and - only")


NamedSources = Annotated[
    tuple[NamedSource, ...],
    Strict(False),
    Field(min_length=1),
    BeforeValidator(
        one_as_list,
        json_schema_input_type=NamedSource | Annotated[tuple[NamedSource, ...], Field(min_length=1)],
    ),
]


class Data(Section):
    """What is trained on, and how rows become batches."""

    train: Sources
    """The sources to train on, mixed; one source may stand without a list."""
    images_root: Word | None = None
    """Folder that image paths are relative to and may not leave; null takes the folder of each data file."""
    max_length: Count | None = 2048
    """Most tokens of one conversation; an image takes 258. null sets no limit."""
    on_long: Literal["error", "drop", "drop_turns"] = "error"
    """A conversation beyond max_length: refuse the data, leave it out, or only its first turns. Both are counted."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be read: refuse the data, or leave it out and report it."""
    check_images: Literal["auto", "all", "headers"] = "auto"
    """Before step 1, decode all images, or read only headers; auto decodes all where that takes under ten minutes."""
    tokens_per_batch: Count | Literal["auto"] | None = None
    """Most tokens of one packed forward; auto takes what fits into the memory, null max_length or the longest row."""
    packing: bool = True
    """Put several conversations into one forward, without padding; results do not change, speed does."""
    labels: Literal["assistant", "structure"] = "assistant"
    """What is learned: replies and their end, or also the turn structure as the published script does."""
    grounding: bool = False
    """Read well-formed <ref>, <box> and <quad> in the texts as the model's own tokens instead of as text."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes that decode images; 0 decodes in the training process."""
    allow_urls: bool = False
    """Allow rows to name images by public web address."""
    shuffle: bool = True
    """Draw a new order of the rows in each epoch."""
    vision_cache: Literal["off", "memory", "disk"] = "off"
    """Encode each image once, before training, where the vision side is frozen; disk keeps that for later runs."""
    vision_cache_gb: Annotated[float, Field(gt=0)] | None = None
    """Most GB of the vision cache; null takes what fits, in memory at most half of what is free."""

    def findings(self) -> Iterator[Finding]:
        if self.vision_cache_gb is not None and self.vision_cache == "off":
            yield Finding(
                ("vision_cache_gb", "vision_cache"),
                "is the bound of the vision cache, which is off",
                "remove it, or set vision_cache: disk or memory",
            )
        if self.tokens_per_batch is not None:
            if not self.packing:
                yield Finding(
                    ("tokens_per_batch", "packing"),
                    "is the budget of packing, which is off",
                    "remove it or set packing: true",
                )
            tokens, longest = self.tokens_per_batch, self.max_length
            if isinstance(tokens, int) and longest is not None and tokens < longest:
                yield Finding(
                    ("tokens_per_batch", "max_length"),
                    f"{tokens} tokens cannot hold a conversation of max_length {longest}",
                    "raise one or lower the other",
                )


TaskName = Literal[
    "docvqa",
    "infographicvqa",
    "chartqa",
    "textvqa",
    "vqav2",
    "ocrvqa",
    "gqa",
    "refcoco",
    "refcoco+",
    "refcocog",
    "flickr30k",
    "nocaps",
    "screenspot",
    "multiple_choice",
    "custom",
]
MetricName = Literal[
    "anls", "relaxed_accuracy", "vqa_score", "exact_match", "multiple_choice", "grounding", "click", "cider_d"
]


class Evaluate(Section):
    """Evaluation during training, and replies shown before and after; null in its place does without."""

    data: NamedSources
    """The sources to evaluate on; one may stand without a list, of several each has a score of its own as well."""
    task: TaskName | None = None
    """What replies are scored as, besides the loss; its score selects the best checkpoint. custom takes `metric`."""
    metric: MetricName | None = None
    """The score of task custom, on data of any format that it goes with."""
    sample: Count = 200
    """Questions scored at each evaluation, the same over the run, drawn by the seed; sources have equal shares."""
    predictions: Annotated[int, Field(ge=0)] = 8
    """Rows whose replies are shown before and after training."""
    max_new_tokens: Count = 64
    """Most tokens of a reply."""
    patience: Count | None = None
    """Stop after this many evaluations without a better score (without a task: loss); null trains to the end."""
    limit: Count | None = None
    """Evaluate on only this many of the first rows, over all sources."""

    def findings(self) -> Iterator[Finding]:
        if self.task == "custom" and self.metric is None:
            yield Finding(("metric", "task"), "task custom has no score of its own", "set metric, such as anls")
        if self.task is not None and (name := name_given_twice(source_names(self.data))) is not None:
            reason = f"two sources are called {name}, and their scores are told apart by name"
            yield Finding(("data",), reason, "give one of them another `name`")
        if self.metric is not None and self.task != "custom":
            remedy = "remove metric, or set task: custom"
            yield Finding(("metric", "task"), f"task {self.task or 'null'} does not take one", remedy)
