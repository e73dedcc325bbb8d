"""The sections of a recipe other than `train`: every key with its type, unit and one sentence."""

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, Strict

from finetune.recipe.section import Count, Finding, Section, Word, Words, read_only
from finetune.recipe.sources import NamedSources, Sources, Split, name_given_twice, source_names


class Model(Section):
    """The checkpoint that training starts from."""

    path: Word
    """Hub id or folder of the checkpoint; a relative folder is taken from the working directory."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The type weights are loaded in; auto is bfloat16 on a GPU that has it, float16 on others, as stored on a CPU.
    What is trained is float32, and rounded to this type where it is computed with; float16 scales the loss."""
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


Alpha = Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0)]


class Adapter(Section):
    """A LoRA adapter; null in its place trains without one, as `freeze` says. Defaults are the published script's."""

    model_config = ConfigDict(serialize_by_alias=True)

    from_: Annotated[Word | None, Field(alias="from")] = None
    """Run or adapter folder whose trained weights are gone on from; keys that are left out are then as that one's."""
    r: Count = 64
    """Rank of the LoRA matrices."""
    alpha: Alpha = 16
    """LoRA's scale is alpha / r (alpha / sqrt(r) with rslora)."""
    rank_pattern: Annotated[dict[str, Count], AfterValidator(read_only)] = Field(default_factory=lambda: read_only({}))
    """Other ranks by the end of a layer's name, or a regular expression of it: {w2: 16}."""
    alpha_pattern: Annotated[dict[str, Alpha], AfterValidator(read_only)] = Field(
        default_factory=lambda: read_only({})
    )
    """Other alphas, in the same way."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the adapter's inputs that are dropped in training."""
    targets: Words = ("c_attn", "attn.c_proj", "w1", "w2")
    """Linear layers of the language model that get LoRA, by the end of their names."""
    vision_targets: Words = ()
    """Linear layers of the vision tower and the resampler that get LoRA, by the end of their names."""
    layers_to_transform: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Strict(False)] | None = None
    """Numbers of the language model's layers that `targets` are in, the first is 0; null is all of them."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that are trained too: of layers with LoRA, or all of the model's, also those of the vision side."""
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
        layers = self.layers_to_transform
        if layers is not None and (not layers or len(set(layers)) < len(layers)):
            reason = "a layer is named twice" if layers else "names no layer"
            yield Finding(("layers_to_transform",), reason, "name each layer once, or remove it for all of them")
        if layers is not None and not self.targets:
            reason = "is about the layers of targets, and there are none"
            yield Finding(("layers_to_transform", "targets"), reason, "remove it, or name targets")
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, key):
                if not is_regular_expression(pattern):
                    yield Finding((key,), f"{pattern!r} is no regular expression", "give the end of a layer's name")


def is_regular_expression(pattern: str) -> bool:
    """Whether a pattern can be used, and is not empty."""
    try:
        re.compile(pattern)
    except re.error:
        return False
    return pattern != ""


class Freeze(Section):
    """Components whose own weights are not trained in full; LoRA beside them is unaffected."""

    vision: bool = True
    """The vision transformer (1.8 B parameters)."""
    resampler: bool = True
    """The adapter between vision and language (93 M parameters; the paper calls it the VL adapter)."""
    language: bool = True
    """The language model (7.7 B parameters with embeddings and output head)."""


class Pages(Section):
    """Files of several pages that a row names without a page, as several images."""

    dpi: Annotated[int, Field(ge=36, le=1200)] = 150
    """Pixels an inch that a page of a PDF is drawn with, also where its page is named."""
    first: Count = 8
    """Most pages, from the first, that one file becomes; each is an image of its own."""
    on_more: Literal["error", "drop"] = "error"
    """A file with more pages than first: refuse its row, or leave the others out and count them."""


class Views(Section):
    """Each image as several pictures: the whole page, picture 1, and its parts, row by row."""

    page: bool = True
    """Whether the whole page comes first; boxes are of it, and without it there can be none."""
    grid: Annotated[
        tuple[Annotated[int, Field(ge=1, le=8)], ...], Strict(False), Field(min_length=2, max_length=2)
    ] = (2, 2)
    """Rows and columns of the parts, as [2, 2]; each is a picture of its own and takes 258 tokens."""
    overlap: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """What neighbouring parts share, as a share of a part's side: a line of text that one cuts is whole in another."""

    def findings(self) -> Iterator[Finding]:
        if self.grid == (1, 1):
            yield Finding(("grid",), "a grid of [1, 1] is the whole page", "give more parts, or set data.views: null")


class Data(Section):
    """What is trained on, and how rows become batches."""

    train: Sources
    """The sources to train on, mixed; one source may stand without a list."""
    split: Split | None = None
    """Cut the sources by documents: evaluate.data: split takes the other part. Written out as `part` of each."""
    images_root: Word | None = None
    """Folder that image paths are relative to and may not leave; null takes the folder of each data file."""
    pages: Pages | None = None
    """A file of several pages (PDF, TIFF, animation) becomes as many images; null wants a page named: file.pdf#3."""
    views: Views | None = None
    """Each image becomes several pictures, also where the model is evaluated, asked or served; null is one picture."""
    max_length: Count | None = 2048
    """Most tokens of one conversation; an image takes 258. null sets no limit."""
    on_long: Literal["error", "drop", "drop_turns"] = "error"
    """A conversation beyond max_length: refuse the data, leave it out, or only its first turns. Both are counted."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be read: refuse the data, or leave it out and report it."""
    ignore: Words = ()
    """Columns (or keys of turns, as messages.name) that are left unread though they would change training."""
    markup_as_text: Words = ()
    """Markup that is trained as words where no format reads it, such as <image>, <box> or <|im_end|>; else refused."""
    check_images: Literal["auto", "all", "headers"] = "auto"
    """Before step 1, decode all images, or read only headers; auto decodes all where that takes under ten minutes."""
    tokens_per_batch: Count | Literal["auto"] | None = None
    """Most tokens of one packed forward; auto takes what fits into the memory, null max_length or the longest row."""
    packing: bool = True
    """Put several conversations into one forward, without padding; results do not change, speed does."""
    labels: Literal["assistant", "structure"] = "assistant"
    """What is learned: replies and their end, or also the turn structure as the published script does."""
    train_on: Literal["all", "last"] = "all"
    """all learns every reply of a conversation; last only the last one and its end, whatever `labels` says."""
    grounding: bool = False
    """Read well-formed <ref>, <box> and <quad> in the texts as the model's own tokens instead of as text."""
    box_edge: Literal["error", "clamp"] = "error"
    """Coordinates of 1000 in boxes and quads, the image's far edge: refuse them, or read them as 999, the last one."""
    no_object: Word = "[]"
    """The reply of rows of format grounding that have no box."""
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
        if self.views is not None and not self.views.page:
            reason = "boxes are of the whole page, which is not among the pictures"
            if self.grounding:
                yield Finding(("grounding", "views.page"), reason, "set views.page: true")
            if any(source.format == "grounding" for source in self.train):
                yield Finding(("views.page", "train"), reason, "set views.page: true")
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
    "fields",
    "custom",
]
MetricName = Literal[
    "anls",
    "relaxed_accuracy",
    "vqa_score",
    "exact_match",
    "multiple_choice",
    "grounding",
    "click",
    "detection",
    "cider_d",
    "field_f1",
]


class Evaluate(Section):
    """Evaluation during training, and replies shown before and after; null in its place does without."""

    data: NamedSources
    """The sources to evaluate on, one without a list or several, each scored; split is what data.split cuts off."""
    overlap: Literal["warn", "error"] = "warn"
    """Rows or images to evaluate on that are trained on as well: say so, or refuse to run."""
    task: TaskName | None = None
    """What replies are scored as, besides the loss; its score selects the best checkpoint. custom takes `metric`."""
    metric: MetricName | None = None
    """The score of task custom, on data of any format that it goes with."""
    sample: Count = 200
    """Questions scored at each evaluation, the same over the run, drawn by the seed; sources have equal shares."""
    predictions: Annotated[int, Field(ge=0)] = 8
    """Rows whose replies are shown before and after training."""
    max_new_tokens: Count = 64
    """Most tokens of a reply; where it is not given, task fields takes its own 512."""
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
