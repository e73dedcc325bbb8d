"""The YAML that recipes are written in."""

import os
import random
from pathlib import Path

import pytest

from finetune.recipe import RecipeError, load_recipe, parse_recipe
from finetune.recipe.yaml_file import MAX_BYTES, MAX_VALUES, read_yaml, write_yaml


def value_of(text):
    document = read_yaml(text, "x.yaml")
    assert not document.problems
    return document.value


def lines_of(text):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, file="x.yaml")
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("2e-4", 2e-4), ("1e5", 1e5), ("1E5", 1e5), ("1.5e+3", 1500.0), (".5", 0.5), ("5.", 5.0), ("-2e-4", -2e-4)],
        *[("12", 12), ("-3", -3), ("+3", 3), ("0", 0), ("0.0", 0.0)],
        *[("true", True), ("false", False), ("null", None), ("~", None), ("", None)],
        *[(word, word) for word in ("yes", "no", "on", "off", "y", "n", "True", "FALSE", "Null")],
        *[("010", "010"), ("0x10", "0x10"), ("0o7", "0o7"), ("1_000", "1_000"), ("1:30", "1:30"), ("1e", "1e")],
        *[("2024-01-01", "2024-01-01"), ("=", "="), ("2e-4m", "2e-4m"), ("e5", "e5"), (".", "."), ("-", [None])],
        *[("'3'", "3"), ('"true"', "true"), ("'2e-4'", "2e-4"), ("|\n  3\n", "3\n"), ("'null'", "null")],
        *[("[1, a, [true]]", [1, "a", [True]]), ("{a: {b: no}}", {"a": {"b": "no"}}), ("# only a comment", None)],
        *[("on: 1\n3: 2\nnull: 3", {"on": 1, "3": 2, "null": 3}), ("---\na: 1\n...\n", {"a": 1})],
        ("a: 1\r\nb: [2]\r\n", {"a": 1, "b": [2]}),
    ],
)
def test_plain_values(text, value):
    read = value_of(text)
    assert read == value
    assert type(read) is type(value)


def test_infinite_numbers_are_read_and_refused_by_every_key():
    assert value_of("[.inf, -.inf]") == [float("inf"), float("-inf")]
    assert any("seed: expected a whole number" in line for line in lines_of("seed: .inf"))
    assert any(
        "learning_rate: expected a number, above 0, found inf" in x for x in lines_of("train: {learning_rate: .inf}")
    )
    assert any(
        "learning_rate: expected a number, above 0, found nan" in x for x in lines_of("train: {learning_rate: .nan}")
    )
    assert any(
        "learning_rate: expected a number, above 0, found inf" in x for x in lines_of("train: {learning_rate: 1e999}")
    )


def test_every_value_keeps_its_place():
    document = read_yaml("a: 1\nb:\n  - x\n  - c: 2\n    d: [3,\n      4]\n", "x.yaml")
    lines = {path: (place.line, place.column) for path, place in document.places.items()}
    assert lines == {
        (): (1, 1),
        ("a",): (1, 1),
        ("b",): (2, 1),
        ("b", 0): (3, 5),
        ("b", 1): (4, 5),
        ("b", 1, "c"): (4, 5),
        ("b", 1, "d"): (5, 5),
        ("b", 1, "d", 0): (5, 9),
        ("b", 1, "d", 1): (6, 7),
    }


def test_duplicate_keys_name_both_lines():
    lines = lines_of("seed: 1\noutput: a\nadapter:\n  r: 1\n  alpha: 2\n  r: 3\noutput: b\n")
    assert "x.yaml:6: adapter.r: this key stands twice, first in line 4; keep one of the two" in lines
    assert "x.yaml:7: output: this key stands twice, first in line 2; keep one of the two" in lines


def test_aliases_repeat_a_value_and_its_place():
    document = read_yaml("a: &x {p: 1}\nb: *x\nc: [*x]\n", "x.yaml")
    assert document.value == {"a": {"p": 1}, "b": {"p": 1}, "c": [{"p": 1}]}
    assert document.places[("b",)].line == 2
    assert document.places[("b", "p")].line == 1
    document.value["a"]["p"] = 2
    assert document.value["b"] == {"p": 1}


def test_merge_keys_are_refused():
    lines = lines_of("model: &m {path: a}\nadapter:\n  <<: *m\n")
    assert "x.yaml:3: adapter.<<: merge keys are not read; write the keys out, or alias single values" in lines


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch {0}']",
        "!!python/object/new:os.system ['touch {0}']",
        "!!python/object/apply:subprocess.check_output [['touch', '{0}']]",
        '!!python/object/apply:builtins.exec [\'open("{0}", "w")\']',
        "!!python/name:os.system ''",
        "!!python/module:os ''",
        "!!python/tuple [1]",
        "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch {0}']",
        "!!int '3'",
        "!custom x",
        "! x",
        "!!binary aGk=",
        "!!set {{a}}",
    ],
)
def test_tags_are_refused_and_nothing_runs(tmp_path, text):
    victim = tmp_path / "ran"
    for place in ("seed: {}", "train: {{run_name: {}}}", "adapter: {{targets: [{}]}}", "{}: 1"):
        lines = lines_of(place.format(text.format(victim)))
        assert any("is not allowed" in line or "a key that is not text" in line for line in lines)
    assert not victim.exists()


def test_tag_directives_do_not_help():
    lines = lines_of("%TAG !e! tag:yaml.org,2002:python/\n---\nseed: !e!name:os.system x\n")
    assert any("x.yaml:3: seed: the tag tag:yaml.org,2002:python/name:os.system is not allowed" in x for x in lines)


def test_alias_bombs_are_bounded():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 15))
    (line,) = lines_of(bomb)
    assert line.startswith(f"x.yaml:4: a3: more than {MAX_VALUES} values")


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("{a: ", "}")])
def test_deep_nesting_is_bounded(opening, closing):
    (line,) = lines_of("seed: " + opening * 5000 + closing * 5000)
    assert "nested deeper than 20 levels" in line


def test_an_anchor_inside_itself_is_refused():
    assert any("*x names no anchor before it" in line for line in lines_of("adapter: &x {targets: [*x]}"))
    assert any("*y names no anchor before it" in line for line in lines_of("adapter: *y"))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "x.yaml:1: the recipe is empty"),
        ("# a comment\n", "x.yaml:1: the recipe is empty"),
        ("---\n", "x.yaml:1: the recipe is empty"),
        (
            "[1, 2]",
            "x.yaml:1: a recipe is a mapping with the keys model, adapter, freeze, data, train, evaluate, output,",
        ),
        ("just text", "x.yaml:1: a recipe is a mapping"),
        ("\n\n- model", "x.yaml:3: a recipe is a mapping"),
        ("model:\n\tpath: x\n", "x.yaml:2: a tab where YAML wants spaces; indent with spaces"),
        ("model: [1\nseed: 3\n", "x.yaml:2: not readable as YAML"),
        ("model: {a: 1\n", "x.yaml:2: not readable as YAML"),
        ("seed: 1\n a: 2\n", "x.yaml:2: not readable as YAML"),
        ("output: 'open\n", "x.yaml:2: not readable as YAML"),
        ("seed: 1\noutput: a\x00b\n", "x.yaml:2: a character that YAML does not allow: '\\x00'"),
        ("seed: @x\n", "x.yaml:1: not readable as YAML"),
    ],
)
def test_what_is_no_recipe_at_all(text, line):
    assert lines_of(text)[0].startswith(line)
    assert len(lines_of(text)) == 1


def test_a_second_document_is_refused():
    assert any(
        line.startswith("x.yaml:2: a second document begins here") for line in lines_of("seed: 1\n---\nseed: 2\n")
    )


def test_keys_are_text():
    assert any("a key that is not text" in line for line in lines_of("[a, b]: 1\n"))
    assert any("a key that is not text" in line for line in lines_of("? {a: 1}\n: 2\n"))


def test_numbers_of_thousands_of_digits():
    assert any("x.yaml:1: seed: a number with too many digits" in line for line in lines_of("seed: " + "9" * 5000))


def test_damaged_recipes_are_read_or_refused_with_their_problems():
    recipe = (Path(__file__).parents[3] / "recipes" / "grounding_lora.yaml").read_text(encoding="utf-8")
    rng = random.Random(0)
    pieces = [*"{}[]:#&*!|>-?,'\"%@`~\t\n\x00é", "<<: ", "- ", "null", "1e5", "&a", "*a", "!!x ", "\n---\n", "true: "]
    refused = 0
    for _ in range(1000):
        text = recipe
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(text))
            text = text[:place] + rng.choice(pieces) + text[place + rng.choice([0, 0, 1, 5]) :]
        try:
            parse_recipe(text, file="x.yaml")
        except RecipeError as error:
            refused += 1
            lines = text.count("\n") + 1
            assert all(problem.reason and 1 <= problem.place.line <= lines + 1 for problem in error.problems)
    assert refused > 300


# Files


def refusal(path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    assert refusal(tmp_path / "none.yaml") == f"{tmp_path}/none.yaml:1: there is no such file"
    assert "is a folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "is not a regular file" in refusal(tmp_path / "pipe.yaml")
    (tmp_path / "latin.yaml").write_bytes("seed: 1\noutput: caf\xe9\n".encode("latin-1"))
    assert refusal(tmp_path / "latin.yaml") == f"{tmp_path}/latin.yaml:2: is not UTF-8 text; save it as UTF-8"
    (tmp_path / "wide.yaml").write_bytes("seed: 1".encode("utf-16"))
    assert "is not UTF-8 text" in refusal(tmp_path / "wide.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    assert "is larger than 256 KiB" in refusal(tmp_path / "large.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    assert "loop.yaml:1: " in refusal(tmp_path / "loop.yaml")


def test_endless_devices_are_not_read():
    assert "is not a regular file" in refusal(Path("/dev/zero"))


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    file = tmp_path / "marked.yaml"
    file.write_text("model: {path: a}\ndata: {train: {path: b, format: vqa}}\noutput: c\n", encoding="utf-8-sig")
    assert load_recipe(file).model.path == "a"


# Writing


@pytest.mark.parametrize(
    "value",
    [
        *["1e5", "2e-4", "no", "yes", "true", "null", "~", "", "3", "0x10", "1:30", "2024-01-01", "a: b", "#", "- a"],
        *[
            "*x",
            "&x",
            "!x",
            "@",
            "`",
            "%",
            "'",
            '"',
            "\n",
            "tab\there",
            "a\x85b",
            "\u2028",
            "a\ufeff",
            "\x07",
            "two\nlines ",
            "日本",
            "🙂",
            " a ",
            "<<",
            "=",
            ".5",
            "1.",
        ],
        *[0.1, 1e-5, 1e300, 5e-324, -0.0, 3, -3, True, None, [], {}, [[]], {"a": [{"b": None}]}, "x" * 500],
    ],
)
def test_what_is_written_is_read_back(value):
    read = value_of(write_yaml({"key": value, "list": [value]}))
    assert read == {"key": value, "list": [value]}
    assert type(read["key"]) is type(value)
