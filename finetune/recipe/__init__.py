"""The recipe: a YAML file that says everything about a run, read into an immutable, validated object.

    recipe = load_recipe(Path("recipes/quickstart.yaml"), ["train.max_steps=100", "evaluate=null"])

Nothing heavy is imported on the way, so a typing mistake costs no time. Paths in a recipe are kept as written;
relative ones are taken from the working directory.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from finetune.recipe.checks import findings_across
from finetune.recipe.overrides import apply_overrides, read_overrides
from finetune.recipe.problems import Place, Problem, RecipeError
from finetune.recipe.section import Finding, Section, Word
from finetune.recipe.sections import Adapter, Data, Evaluate, Freeze, Model
from finetune.recipe.sources import Source
from finetune.recipe.split import cut_sources
from finetune.recipe.train_section import DECIDING, LearningRates, OwnTrainKeys, Train
from finetune.recipe.validation import validate
from finetune.recipe.yaml_file import Document, read_file, read_yaml, write_yaml

__all__ = [
    "Adapter",
    "Data",
    "Evaluate",
    "Freeze",
    "LearningRates",
    "Model",
    "Place",
    "Problem",
    "Recipe",
    "RecipeError",
    "Source",
    "Train",
    "load_recipe",
    "parse_recipe",
]


class Recipe(Section):
    """Everything about a run."""

    model: Model
    """The checkpoint that training starts from."""
    adapter: Adapter | None = Field(default_factory=Adapter)
    """LoRA; null trains without an adapter."""
    freeze: Freeze = Field(default_factory=Freeze)
    """What is not trained in full."""
    data: Data
    """What is trained on."""
    train: Train = Field(default_factory=Train)
    """How it is trained."""
    evaluate: Evaluate | None = None
    """What is measured on the way; null measures nothing."""
    output: Word
    """The run folder; a relative one is taken from the working directory."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of everything random: order of rows, dropout, fresh weights."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on where the run in the output folder stopped; never refuses a folder that holds a run."""

    def findings(self) -> Iterator[Finding]:
        yield from findings_across({name: getattr(self, name) for name in type(self).model_fields})

    def train_arguments(self) -> dict[str, Any]:
        """Arguments of TRL's `SFTConfig`: what the recipe sets, and the fields in `train_section.DECIDING`."""
        return self.train.arguments()

    def to_yaml(self) -> str:
        """The recipe with its defaults, as YAML that loads back equal.

        Of `train`, that is what the recipe sets, our own keys and the fields that decide the result. The rest of
        TRL's hundred defaults belongs to the installed version.
        """
        values = self.model_dump(mode="json")
        shown = self.train.model_fields_set | set(OwnTrainKeys.model_fields) | set(DECIDING)
        values["train"] = {name: value for name, value in values["train"].items() if name in shown}
        return write_yaml(values)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: the YAML file.
        overrides: `key.path=value` strings laid over it, the value as in YAML: `train.max_steps=24`, `evaluate=null`,
            `adapter.targets=[c_attn, w1]`, `data.train.0.path=rows.jsonl`. Of two for one key the last counts.

    Raises:
        RecipeError: with every problem of file and overrides; `.problems` has them one by one.
    """
    path = Path(path)
    return parse_recipe(read_file(path), overrides, file=str(path))


def parse_recipe(text: str, overrides: Sequence[str] = (), file: str = "recipe") -> Recipe:
    """As `load_recipe`, from the text of a file; `file` is what problems call it."""
    given, problems = read_overrides(overrides, file)
    try:
        document = read_yaml(text, file)
    except RecipeError as error:
        raise RecipeError([*error.problems, *problems]) from error
    if document.value is None:
        raise RecipeError([Problem(Place(file), "", "the recipe is empty"), *problems])
    _put_single_sources_in_lists(document)
    lost = list(apply_overrides(document, given))
    document.problems += [((), problem) for problem in [*problems, *lost]]
    _put_single_sources_in_lists(document)
    cut_sources(document)
    return validate(document, Recipe)


def _put_single_sources_in_lists(document: Document) -> None:
    """Make `data.train` and `evaluate.data` lists, where the recipe has a single source: paths then have one form."""
    for section, key in (("data", "train"), ("evaluate", "data")):
        holder = document.value.get(section) if isinstance(document.value, dict) else None
        if not isinstance(holder, dict) or not isinstance(holder.get(key), dict):
            continue
        holder[key] = [holder[key]]
        above = (section, key)
        for path in [path for path in document.places if path[:2] == above]:
            document.places[(*above, 0, *path[2:])] = place = document.places[path]
            if path != above:
                del document.places[path]
            else:
                document.places[above] = place
        document.problems = [
            ((*above, 0, *path[2:]) if path[:2] == above else path, problem) for path, problem in document.problems
        ]
