"""Every key of a recipe: mistyped, or with a value of the wrong kind."""

import random
import string

import pytest

from finetune.recipe import Recipe, RecipeError, parse_recipe
from finetune.recipe.problems import dotted, edit_distance, nearest
from finetune.recipe.schema import alternatives, keys_at, part, schema_of
from finetune.recipe.train_section import OWNED
from finetune.recipe.validation import ELSEWHERE
from finetune.recipe.yaml_file import write_yaml

SCHEMA = schema_of(Recipe)
SECTIONS = [
    *[(), ("model",), ("adapter",), ("freeze",), ("data",), ("data", "train", 0), ("train",)],
    *[("train", "learning_rates"), ("evaluate",), ("evaluate", "data", 0)],
]
KEYS = [(*section, key) for section in SECTIONS for key in keys_at(SCHEMA, section)]
LEAVES = [key for key in KEYS if key not in SECTIONS and (*key, 0) not in SECTIONS]


def recipe_values():
    source = {"path": "rows", "format": "vqa"}
    return {
        "model": {"path": "m"},
        "adapter": {},
        "freeze": {},
        "data": {"train": [dict(source)]},
        "train": {"learning_rates": {}},
        "evaluate": {"data": [dict(source)]},
        "output": "o",
    }


def holder(values, path):
    for step in path:
        values = values[step]
    return values


def problems_of(values):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(write_yaml(values), file="x.yaml")
    return {problem.key: problem for problem in caught.value.problems}


def test_there_are_keys():
    assert len(KEYS) > 130
    assert ("train", "max_steps") in LEAVES and ("data", "train", 0, "weight") in LEAVES and ("seed",) in LEAVES


def typos(word, rng):
    """One deletion, substitution, swap of neighbours and insertion, drawn at random."""
    position, letter = rng.randrange(len(word)), rng.choice(string.ascii_lowercase + "_")
    yield word[:position] + word[position + 1 :]
    yield word[:position] + letter + word[position + 1 :]
    yield word[:position] + letter + word[position:]
    if len(word) > 1:
        position = rng.randrange(len(word) - 1)
        yield word[:position] + word[position + 1] + word[position] + word[position + 2 :]


@pytest.mark.parametrize("seed", range(3))
def test_a_mistyped_key_is_refused_with_the_right_one_named(seed):
    rng = random.Random(seed)
    targets = {(*section, key): dotted((*section, key)) for *section, key in KEYS}
    targets |= {("train", key): instead or f"train.{key}" for key, (instead, _) in OWNED.items()}
    queue = [(path, typo) for path in targets for typo in typos(path[-1], rng)]
    rounds = checked = 0
    while queue:
        # Many at once: each must be named, whatever else is wrong. The same typo of two keys waits for another round.
        values, given, later = recipe_values(), {}, []
        for path, typo in queue:
            wrong = (*path[:-1], typo)
            if typo in keys_at(SCHEMA, path[:-1]) or typo in ELSEWHERE or (path[:-1] == ("train",) and typo in OWNED):
                continue  # is a key itself
            if wrong in given or not typo:
                later += [(path, typo)] if typo else []
                continue
            given[wrong] = targets[path]
            holder(values, path[:-1])[typo] = 1
        found = problems_of(values)
        for wrong, target in given.items():
            problem = found[dotted(wrong)]
            assert problem.reason == "unknown key"
            assert f" {target}" in problem.remedy.replace("?", " ") + " ", f"{dotted(wrong)}: {problem.remedy}"
        queue, rounds, checked = later, rounds + 1, checked + len(given)
    assert checked > 700


def test_a_mistyped_key_has_its_line():
    for section in SECTIONS:
        values = recipe_values()
        holder(values, section)["zzzz"] = 1
        text = write_yaml(values)
        line = next(number for number, text in enumerate(text.splitlines(), start=1) if "zzzz" in text)
        problem = problems_of(values)[dotted((*section, "zzzz"))]
        assert (problem.place.line, problem.reason) == (line, "unknown key")
        assert problem.remedy


VALUES = [None, True, 7, 7.5, 7.0, "zz zz", "", [], [7], {}, {"zz": 7}]


def takes(about, value):
    """Whether a schema may take a value, by its kind alone."""
    kinds = {
        bool: {"boolean"},
        int: {"integer", "number"},
        float: {"number"},
        str: {"string"},
        list: {"array"},
        dict: {"object"},
        type(None): {"null"},
    }[type(value)]
    for choice in alternatives(about, SCHEMA):
        if choice.get("type") in kinds and not (isinstance(value, str) and {"enum", "const"} & choice.keys()):
            return not (isinstance(value, str) and not value) or choice.get("minLength") is None
    return False


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_of_the_wrong_kind_is_refused_at_every_key(value):
    values = recipe_values()
    wrong = [key for key in LEAVES if not takes(part(SCHEMA, key), value)]
    for key in wrong:
        holder(values, key[:-1])[key[-1]] = value
    found = problems_of(values)
    assert set(found) == {dotted(key) for key in wrong}
    for problem in found.values():
        assert problem.reason.startswith("expected ") and ", found " in problem.reason
    assert len(wrong) > 30


@pytest.mark.parametrize("section", [section for section in SECTIONS if section and isinstance(section[-1], str)])
@pytest.mark.parametrize("value", [7, "text", [], [7], True], ids=repr)
def test_a_section_that_is_no_mapping(section, value):
    values = recipe_values()
    holder(values, section[:-1])[section[-1]] = value
    found = problems_of(values)
    assert list(found) == [dotted(section)]
    assert found[dotted(section)].reason.startswith("expected a mapping")


@pytest.mark.parametrize("key", [key for key in LEAVES if "enum" in part(SCHEMA, key)])
def test_words_that_are_nearly_right(key):
    for word in part(SCHEMA, key)["enum"]:
        if len(word) < 4:
            continue
        values = recipe_values()
        holder(values, key[:-1])[key[-1]] = word[:-1]
        if word[:-1] in part(SCHEMA, key)["enum"]:
            continue
        assert word in problems_of(values)[dotted(key)].remedy


@pytest.mark.parametrize(
    ("path", "value", "remedy"),
    [
        ("adapter.r", 8.0, "write 8"),
        ("adapter.r", "8", "write 8, without quotes"),
        ("adapter.r", "1_000", "write 1000, without quotes"),
        ("train.max_steps", 1e5, "write 100000"),
        ("train.learning_rate", "1e-5", "write 1e-5, without quotes"),
        ("data.packing", "yes", "write true"),
        ("data.packing", "off", "write false"),
        ("data.packing", "False", "write false"),
        ("output", 2024, 'write "2024", in quotes'),
        ("output", True, 'write "true", in quotes'),
        ("adapter.targets", "c_attn", "write [c_attn]"),
        ("model.dtype", "bf16", "did you mean bfloat16?"),
        ("train.optim", "adamw_troch", "did you mean adamw_torch?"),
    ],
)
def test_what_was_likely_meant(path, value, remedy):
    values = recipe_values()
    *section, key = path.split(".")
    holder(values, section)[key] = value
    assert problems_of(values)[path].remedy == remedy


@pytest.mark.parametrize("name", OWNED)
def test_fields_of_trl_that_are_set_elsewhere(name):
    values = recipe_values()
    values["train"][name] = None
    problem = problems_of(values)[f"train.{name}"]
    instead, why = OWNED[name]
    assert (instead or why) in problem.remedy


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("learning_rate", "train.learning_rate"),
        ("adapter.lora_alpha", "adapter.alpha"),
        ("adapter.target_modules", "adapter.targets"),
        ("model.torch_dtype", "model.dtype"),
        ("train.warmup_ratio", "train.warmup_steps"),
        ("train.evaluation_strategy", "train.eval_strategy"),
        ("data.seed", "seed"),
        ("r", "adapter.r"),
        ("data.patience", "evaluate.patience"),
    ],
)
def test_keys_of_other_sections_and_other_programs(path, meant):
    values = recipe_values()
    *section, key = path.split(".")
    holder(values, section)[key] = 1
    assert problems_of(values)[path].remedy == f"did you mean {meant}?"


def test_every_pointer_leads_to_a_key():
    pointers = [instead for instead, _ in OWNED.values() if instead] + list(ELSEWHERE.values())
    for pointer in pointers:
        path = pointer.replace("data.train.columns", "data.train.0.columns").split(".")
        assert part(SCHEMA, tuple(int(step) if step.isdecimal() else step for step in path)), pointer


def test_edit_distance():
    assert edit_distance("", "abc") == 3
    assert edit_distance("abc", "abc") == 0
    assert edit_distance("abc", "acb") == 1  # neighbours swapped
    assert edit_distance("kitten", "sitting") == 3
    assert nearest("adam_beta", ["adam_beta1", "adam_beta2", "optim"]) == ["adam_beta1", "adam_beta2"]
    assert nearest("zzz", ["adam_beta1"]) == []
    assert nearest("x", []) == []
