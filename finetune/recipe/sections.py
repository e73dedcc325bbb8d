"""The sections of a recipe other than `train`: every key with its type, unit and one sentence."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, Protocol, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator
from pydantic_core import PydanticCustomError

from finetune.recipe.document_fields import problems_of_fields
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
    "messages": ("messages", "images", "prompt", "completion", "system"),
    "qwen_json": ("conversations", "system"),
    "llava": ("image", "conversations", "system"),
    "swift": ("query", "response", "history", "system", "images", "objects", "messages"),
    "texts": ("images", "texts", "system"),
    "vqa": ("image", "question", "answers"),
    "grounding": ("image", "phrase", "box", "boxes", "labels"),
    "caption": ("image", "caption"),
    "fields": ("image",),
}
"""The roles that the columns of each format can have; those of `fields` in addition the fields that are named."""

PLACEHOLDERS = {"vqa": "{question}", "grounding": "", "caption": ""}
"""What the prompt of each format must hold; the rows of other formats bring their prompts."""


LAYOUTS = {
    "coco": ("grounding", "caption"),
    "label_studio": ("grounding", "vqa"),
    "labelme": ("grounding",),
    "cvat": ("grounding",),
    "via": ("grounding",),
    "yolo": ("grounding",),
}
"""Layouts of annotation exports -> the formats that their rows can have."""


def _class_names(value: Any) -> Any:
    """Classes by number, as YAML reads them, by the text of the number."""
    if not isinstance(value, dict):
        return value
    return {str(key) if type(key) is int else key: name for key, name in value.items()}


class Annotations(Section):
    """How the export of an annotation tool becomes rows of the source's format."""

    layout: Literal["coco", "label_studio", "labelme", "cvat", "via", "yolo"]
    """Which tool's: COCO or CVAT (images 1.1) file, Label Studio JSON, VIA 2 project, LabelMe or YOLO folder."""
    classes: Annotated[
        dict[str, Word | None],
        BeforeValidator(_class_names, json_schema_input_type=dict[str, Word | None]),
        AfterValidator(ReadOnlyDict),
    ] = Field(default_factory=ReadOnlyDict)
    """Class, by name or number -> what it is called; null leaves it out, and those not listed keep their names."""
    rows: Literal["class", "image"] = "class"
    """A row for each class in an image, asked by {phrase}; or for each image, with all objects and their names."""
    unlabelled: Literal["skip", "keep"] = "skip"
    """Images without an object: leave out, or learn that nothing is there (rows: class: of one of the classes)."""
    rotated: Literal["error", "bounds"] = "error"
    """Turned boxes: refuse the image, or take the upright box around each."""
    label: Word | None = None
    """The region attribute that is the class, where there are several; for layout via only."""
    questions: Annotated[dict[str, Word | None], AfterValidator(ReadOnlyDict)] = Field(default_factory=ReadOnlyDict)
    """Label Studio's text area or choice -> its question, with {key} of the task's data; null leaves it out."""

    def findings(self) -> Iterator[Finding]:
        if self.label is not None and self.layout != "via":
            yield Finding(("label", "layout"), "is for layout via only", "remove label")
        if self.questions and self.layout != "label_studio":
            yield Finding(("questions", "layout"), "is for layout label_studio only", "remove questions")


class Split(Section):
    """Cuts what is trained on into a part to train on and one to evaluate on, whole documents at a time."""

    eval: Annotated[float, Field(gt=0, lt=1)]
    """Share of the documents to evaluate on, such as 0.1."""
    by: Word = "image"
    """What a document is: rows that share an image, or rows with the same value in the column of this name."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Draws the documents; rows that are added later do not move others, and the recipe's seed does not count."""


class Part(Split):
    """One part of a source that is cut."""

    take: Literal["train", "eval"]
    """Which one."""


class Source(Section):
    """A dataset, or a part of one, in one of the formats."""

    path: Word
    """File, files (data/*.jsonl), folder or hub dataset id; a relative path starts at the working directory."""
    format: Literal["messages", "qwen_json", "llava", "swift", "texts", "vqa", "grounding", "caption", "fields"]
    """What a row looks like."""
    config: Word | None = None
    """Configuration of a hub dataset that has several."""
    split: Word | None = None
    """Split of a hub dataset or of a YOLO folder, such as train or validation; or the sheet of an Excel workbook."""
    columns: Annotated[dict[str, Word], AfterValidator(ReadOnlyDict)] = Field(default_factory=ReadOnlyDict)
    """Role -> name of its column, where the two differ."""
    box_form: Literal["xyxy", "xywh"] | None = None
    """Boxes, in pixels, are two corners (xyxy) or a corner, width and height (xywh); for format grounding only."""
    prompt: Word | None = None
    """What the user says: {question} or {phrase} is filled in; without {phrase}, grounding asks for all objects."""
    fields: Words = ()
    """Of format fields: the fields of a document, each a column, in the order of the reply."""
    reply: Literal["value", "json"] = "value"
    """Of format fields: a question for each field, replied to with its value, or one for all, replied to with JSON."""
    missing: Literal["write_null", "leave_out"] | None = None
    """Of format fields: null replies null or asks nothing where there is no value; by default null in JSON only."""
    nested: Words = ()
    """Of format fields: those whose text is JSON, such as the lines of an invoice in a CSV file."""
    prompts: Word | Words | Annotated[dict[str, Word | Words], AfterValidator(ReadOnlyDict)] | None = None
    """Of format fields: what the user says, with {field} (or {fields}); several phrasings, also by field."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each row is used an epoch, on average: 2.0 twice, 0.5 in every other one."""
    limit: Count | None = None
    """Only this many of the first rows."""
    streaming: bool = False
    """Fetch a hub dataset row by row, and none beyond limit, instead of whole."""
    annotations: Annotations | None = None
    """How `path` is read, where it is the export of an annotation tool; null is a file, folder or dataset of rows."""
    encoding: Word | None = None
    """Of a text file, such as gbk or cp1252; null is UTF-8, or UTF-16 and UTF-32 where the file shows that."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """What is between the fields of a .csv, .tsv or .txt file; null is what the file shows."""

    part: Part | None = None
    """Only the part of the rows that a cut by documents makes; data.split sets it for all sources."""

    def findings(self) -> Iterator[Finding]:
        yield from self._findings_of_fields()
        roles = (*ROLES[self.format], *self.fields)
        for role in self.columns:
            if role not in roles:
                meant = nearest(role, roles)
                remedy = f"did you mean {' or '.join(meant)}? " if meant else ""
                remedy += f"The roles are {', '.join(roles)}"
                yield Finding((f"columns.{role}", "format"), f"format {self.format} has no such role", remedy)
        if self.annotations is not None:
            yield from self._annotation_findings(self.annotations)
        elif self.format == "grounding" and self.box_form is None:
            yield Finding(
                ("format", "box_form"),
                "boxes in pixels are stored in two ways, and box_form does not say which",
                "set box_form: xyxy or xywh",
            )
        if self.format != "grounding" and self.box_form is not None:
            yield Finding(("box_form", "format"), f"format {self.format} has no boxes in pixels", "remove box_form")
        if self.encoding is not None and not _is_text_encoding(self.encoding):
            remedy = "write its common name, such as gbk, big5, shift_jis, cp1252 or utf-16"
            yield Finding(("encoding",), f"{self.encoding!r} is no encoding that is known", remedy)
        if self.delimiter is not None and self.delimiter in '"\r\n':
            yield Finding(("delimiter",), "quotes and line ends are between no fields", "give the mark between fields")
        if self.prompt is not None and self.format == "fields":
            yield Finding(("prompt", "format"), "format fields may have several prompts", "write prompts")
        elif self.prompt is not None and self.format not in PLACEHOLDERS:
            yield Finding(("prompt", "format"), f"rows of format {self.format} bring their prompts", "remove prompt")
        elif self.prompt is not None and PLACEHOLDERS[self.format] not in self.prompt:
            needed = PLACEHOLDERS[self.format]
            yield Finding(("prompt", "format"), f"there is no {needed} in it to fill in", f"write {needed} in it")

    def _annotation_findings(self, annotations: Annotations) -> Iterator[Finding]:
        layout = f"annotations of layout {annotations.layout}"
        formats = LAYOUTS[annotations.layout]
        if self.format not in formats:
            remedy = f"set format: {' or '.join(formats)}"
            yield Finding(("format", "annotations.layout"), f"{layout} are not read as {self.format}", remedy)
        for key in (
            "columns",
            "box_form",
            "config",
            "streaming",
            "encoding",
            "delimiter",
            *(() if annotations.layout == "yolo" else ("split",)),
        ):
            if getattr(self, key):
                yield Finding((key, "annotations"), f"{layout} say that themselves", f"remove {key}")
        if self.format != "grounding":
            keys = ("rows", "unlabelled", "rotated", *(() if self.format == "vqa" else ("classes",)))
            for key in keys:
                # Not whether it is written: the recipe of a run has every key.
                if getattr(annotations, key) != getattr(Annotations(layout=annotations.layout), key):
                    reason = f"is of boxes, and format {self.format} has none"
                    yield Finding((f"annotations.{key}", "format"), reason, f"remove {key}")
        if self.format == "vqa" and not annotations.questions:
            reason = "nothing says which questions the text areas and choices answer"
            yield Finding(("annotations.questions", "format"), reason, "name each with its question")
        if self.format != "vqa" and annotations.questions:
            yield Finding(("annotations.questions", "format"), "is for format vqa only", "remove questions")
        if self.format == "grounding":
            asks_phrase = self.prompt is None or "{phrase}" in self.prompt
            if annotations.rows == "image" and asks_phrase:
                reason = "asks for all objects of an image, and the prompt for one phrase"
                remedy = "set prompt to what is asked, such as: Find all objects."
                yield Finding(("annotations.rows", "prompt"), reason, remedy)
            if annotations.rows == "class" and not asks_phrase:
                reason = "there is no {phrase} in it to fill in"
                remedy = "write {phrase} in it, or set annotations.rows: image"
                yield Finding(("prompt", "annotations.rows"), reason, remedy)

    def _findings_of_fields(self) -> Iterator[Finding]:
        if self.format == "fields":
            for key, reason, remedy in problems_of_fields(self.fields, self.reply, self.nested, self.prompts):
                yield Finding((key,), reason, remedy)
            return
        for key in ("fields", "reply", "missing", "nested", "prompts"):
            if getattr(self, key) != type(self).model_fields[key].default:
                yield Finding((key, "format"), f"is of format fields, not of {self.format}", f"remove {key}")


def _is_text_encoding(name: str) -> bool:
    try:
        b"a".decode(name)  # refuses codecs that are not of text, such as base64
    except LookupError:
        return False
    except ValueError:  # a is no whole character in it
        return True
    return True


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
        json_schema_input_type=NamedSource
        | Annotated[tuple[NamedSource, ...], Field(min_length=1)]
        | Literal["split"],
    ),
]


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
