"""Whole runs with a vision cache: the same losses, gradients and replies as without, and a tower that has left."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import constants
from recipes_for_tests import IMAGES, TINY, write_recipe
from rich.console import Console
from safetensors.torch import load_file

from finetune.batches.image_request import ImageRequest
from finetune.check.check import check
from finetune.data.prepare import prepare
from finetune.errors import Failed, UserError
from finetune.recipe import RecipeError, load_recipe
from finetune.recipe.sections import Data
from finetune.replies.replies import without_adapter
from finetune.terminal import say_nothing
from finetune.training import train as train_module
from finetune.training.train import train
from finetune.vision_cache.cache import cache_folder
from finetune.vision_cache.encoding import encode_images
from finetune.vision_cache.phase import AbsentTower, cache_images, let_tower_go
from finetune.vision_cache.run_images import RunImages
from finetune.vision_cache.store import FEATURES
from qwenvl import QwenVLProcessor, load_model
from tests.finetune.evaluation.test_task_evaluation import recipe as task_recipe
from tests.finetune.model.test_qlora import adapted
from tests.finetune.training.test_trainer import make_trainer, samples, step  # noqa: F401 (fixtures)

RECORD_BYTES = 256 * 256 * 4


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def settings(folder: Path, **changes):
    data = {"path": str(folder / "eval.jsonl"), "format": "messages"}
    return {
        "evaluate": {"data": [data], "predictions": 3, "max_new_tokens": 6},
        "train__max_steps": 2,
        "train__save_strategy": "no",
        **changes,
    }


def run(file: Path, *overrides: str) -> tuple[Path, str]:
    said: list[str] = []
    return train(load_recipe(file, overrides), say=said.append), "\n".join(said)


def logged(folder: Path, key: str) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record[key] for record in records if key in record]


def predictions(folder: Path) -> list[tuple]:
    records = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return [(one["when"], one["prediction"]) for one in records]


@pytest.fixture
def seen_models(monkeypatch) -> list[torch.nn.Module]:
    """The models that reply before and after training, as they are then."""
    models = []
    write = train_module.write_predictions
    monkeypatch.setattr(
        train_module, "write_predictions", lambda model, *args, **kw: models.append(model) or write(model, *args, **kw)
    )
    return models


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "kind", "bounded"),
    [
        ((), "disk", False),
        ((), "memory", True),
        (("language", "vision"), "memory", False),
        (("language", "vision"), "disk", True),
    ],
)
def test_loss_and_gradients_are_those_of_a_run_without(make_trainer, samples, tiny_processor, parts, bounded, kind):  # noqa: F811
    """Packed, of LoRA on a base in float32 and in 4 bits; all features from the cache, or those of three images."""
    results = []
    with torch.compiler.set_stance("force_eager"):  # an odd width sends bitsandbytes to a path that it compiles
        for cached in (False, True):
            model = adapted(parts, quantized=bool(parts))
            trainer = make_trainer(model=model, tokens_per_batch=700)
            if cached:
                base = without_adapter(model)
                data = Data(
                    train={"path": "-", "format": "messages"},
                    vision_cache=kind,
                    vision_cache_gb=3.5 * RECORD_BYTES / 1e9 if bounded else None,
                    workers=0,
                )
                images = [
                    [
                        ImageRequest(part["image"], sample.access, sample.origin)
                        for part in sample.messages[0]["content"]
                        if part["type"] == "image"
                    ]
                    for sample in samples
                ]
                cache = encode_images(base, RunImages([images]), tiny_processor.image_processor, data, lambda _: None)
                assert cache.complete != bounded
                if not bounded:
                    let_tower_go(base)
                trainer.data_collator = replace(trainer.data_collator, vision_cache=cache)
            results.append(step(trainer))
    (loss, gradients), (cached_loss, cached_gradients) = results
    assert cached_loss == pytest.approx(loss, abs=1e-6)
    for name, gradient in gradients.items():
        assert (cached_gradients[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max() + 1e-9, name


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "workers"), [("disk", 2), ("memory", 0)])
def test_a_run_with_a_cache_is_the_run_without(tmp_path, kind, workers, seen_models):
    plain, _ = run(write_recipe(tmp_path / "off", **settings(tmp_path / "off")))
    assert not any(isinstance(without_adapter(model).transformer.visual, AbsentTower) for model in seen_models)
    seen_models.clear()
    file = write_recipe(tmp_path / "on", **settings(tmp_path / "on"), data__vision_cache=kind, data__workers=workers)
    cached, said = run(file)
    assert "5 of 5 images to encode" in said and "the vision side has left the model" in said
    assert len(seen_models) == 2
    assert all(isinstance(without_adapter(model).transformer.visual, AbsentTower) for model in seen_models)
    for key in ("loss", "eval_loss"):
        assert logged(cached, key) == pytest.approx(logged(plain, key), abs=1e-4) and logged(cached, key)
    assert predictions(cached) == predictions(plain) and len(predictions(plain)) == 6
    assert "encode" in json.loads((cached / "run.json").read_text())["phases"]
    assert "encode" not in json.loads((plain / "run.json").read_text())["phases"]
    # The adapter is one like any other, and its base still sees.
    ours, theirs = (load_file(one / "adapter" / "adapter_model.safetensors") for one in (cached, plain))
    assert ours.keys() == theirs.keys()
    model = load_model(cached)
    processor = QwenVLProcessor.from_pretrained(TINY)
    with torch.no_grad():
        assert model.get_image_features(
            processor.image_processor(IMAGES[0], return_tensors="pt")["pixel_values"]
        ).any()


def test_a_second_run_encodes_nothing(tmp_path, monkeypatch):
    file = write_recipe(tmp_path / "run", **settings(tmp_path / "run"), data__vision_cache="disk")
    run(file)
    other = [f"output={tmp_path / 'other'}", "train.max_steps=1", "adapter.r=2", "evaluate=null"]
    _, said = run(file, *other)
    assert "the features of 5 images are in" in said and "encoded" not in said
    assert len(list(cache_folder().glob(f"*/*{FEATURES}"))) == 1


def test_the_score_of_a_task_is_that_of_a_run_without(tmp_path):
    changes = {"data__shuffle": False, "train__max_steps": 2, "train__eval_steps": 2, "train__save_steps": 2}
    plain, _ = run(task_recipe(tmp_path / "off", **changes))
    cached, said = run(task_recipe(tmp_path / "on", **changes, data__vision_cache="disk"))
    assert "the vision side has left" in said
    assert logged(cached, "eval_anls") == logged(plain, "eval_anls") and len(logged(plain, "eval_anls")) == 2
    assert predictions(cached) == predictions(plain)


def test_a_bound_changes_no_result(tmp_path, seen_models):
    plain, _ = run(write_recipe(tmp_path / "off", **settings(tmp_path / "off")))
    bound = {"data__vision_cache": "disk", "data__vision_cache_gb": 2.5 * RECORD_BYTES / 1e9}
    cached, said = run(write_recipe(tmp_path / "on", **settings(tmp_path / "on"), **bound))
    assert "3 are left out for the bound" in said and "has left" not in said
    assert not any(isinstance(without_adapter(model).transformer.visual, AbsentTower) for model in seen_models)
    for key in ("loss", "eval_loss"):
        assert logged(cached, key) == pytest.approx(logged(plain, key), abs=1e-4)
    assert predictions(cached) == predictions(plain)


def test_trained_in_full_the_checkpoint_keeps_its_tower(tmp_path):
    changes = {"adapter": None, "freeze": {"language": False}, "train__learning_rate": 1e-4}
    folder = tmp_path / "run"
    result, said = run(write_recipe(folder, **settings(folder, **changes), data__vision_cache="disk"))
    assert "5 images encoded" in said and "has left" not in said
    base, trained = (load_file(one / "model.safetensors") for one in (TINY, result / "model"))
    visual = [name for name in base if name.startswith("transformer.visual.")]
    assert visual and all(torch.equal(trained[name], base[name]) for name in visual)


def test_a_run_may_take_up_a_cache_when_it_goes_on(tmp_path):
    """What is computed stays the same, so the run is the same; and a resumed run finds its features."""
    folder = tmp_path / "run"
    file = write_recipe(folder, train__max_steps=4, train__save_steps=2)
    finished, _ = run(file)
    losses = logged(finished, "loss")
    for cache in ("disk", "off"):
        shutil.rmtree(finished / "adapter")
        shutil.rmtree(finished / "checkpoints" / "step-4")
        description = json.loads((finished / "run.json").read_text())
        (finished / "run.json").write_text(json.dumps({**description, "status": "running"}))
        _, said = run(file, f"data.vision_cache={cache}")
        assert "resume      from step 2" in said and ("images encoded" in said) == (cache != "off")
        assert logged(finished, "loss") == pytest.approx(losses, abs=1e-4)


def test_prepared_data_is_known_by_its_bytes(tmp_path):
    few = settings(tmp_path / "run", train__max_steps=1)
    file = write_recipe(tmp_path / "run", **few, data__vision_cache="disk")
    first, _ = run(file)
    prepare(load_recipe(file), tmp_path / "prepared", say=say_nothing)
    sources = [
        f"data.train.0.path={tmp_path / 'prepared' / 'train'}",
        f"evaluate.data.0.path={tmp_path / 'prepared' / 'eval'}",
        "data.images_root=null",
    ]
    second, said = run(file, *sources, f"output={tmp_path / 'second'}")
    assert "5 of 5 images to encode" in said and "5 were there under another name" in said
    third, said = run(file, *sources, f"output={tmp_path / 'third'}")
    assert "the features of 5 images are in" in said
    assert logged(first, "loss") == logged(second, "loss") == logged(third, "loss")


def test_streamed_data_is_cached_as_any_other(tmp_path, monkeypatch):
    """Its rows are fetched before the run looks at them, and lie in files from then on."""
    file = write_recipe(tmp_path / "run", **settings(tmp_path / "run"), data__vision_cache="disk")
    prepare(load_recipe(file), tmp_path / "prepared", say=say_nothing)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    load = datasets.load_dataset_builder
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda path, config: load(str(tmp_path / "prepared" / "train"))
    )
    source = ["data.train.0.path=owner/name", "data.train.0.streaming=true", "data.images_root=null", "evaluate=null"]
    for number, told in enumerate(("5 images encoded", "the features of 5 images are in")):
        _, said = run(file, *source, "train.max_steps=1", f"output={tmp_path / str(number)}")
        assert told in said and "has left" in said


# --- what does not go together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["freeze.vision=false"], r"vision_cache: features of images are computed once, and freeze.vision trains"),
        (["freeze.resampler=false"], r"freeze.resampler trains what computes them .*set data.vision_cache: off"),
        (["adapter.vision_targets=[in_proj]"], r"adapter.vision_targets trains what computes them"),
        (["data.vision_cache=off", "data.vision_cache_gb=2"], r"is the bound of the vision cache, which is off"),
        (["data.vision_cache_gb=0"], r"data.vision_cache_gb"),
        (["data.vision_cache=tape"], r"data.vision_cache"),
    ],
)
def test_recipes_that_are_refused(tmp_path, overrides, told):
    file = write_recipe(tmp_path, data__vision_cache="disk")
    load_recipe(file)
    with pytest.raises(RecipeError, match=told):
        load_recipe(file, overrides)


def test_a_vision_side_that_is_trained_is_refused(tmp_path, tiny_model, tiny_processor):
    recipe = load_recipe(write_recipe(tmp_path, data__vision_cache="disk"))
    with pytest.raises(UserError, match="the vision side is trained"):
        cache_images(recipe, tiny_model, tiny_processor, {}, {}, None, lambda line: None)


def test_an_absent_tower_says_so(tiny_model):
    let_tower_go(tiny_model)
    with pytest.raises(Failed, match=r"2 image\(s\) would have to be encoded, but the vision side has left the model"):
        tiny_model.get_image_features(torch.zeros(2, 3, 56, 56))


def test_data_without_images_needs_no_cache(tmp_path):
    file = write_recipe(tmp_path, data__vision_cache="disk", train__max_steps=1, train__save_strategy="no")
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({**row, "images": []}) + "\n" for row in rows if not row["images"])
    (tmp_path / "train.jsonl").write_text(text)
    _, said = run(file)
    assert "vision " not in said.replace("vision               frozen", "") and not cache_folder().exists()


# --- finetune check --------------------------------------------------------------------------------------------------


def test_check_tells_of_the_phase(tmp_path):
    file = write_recipe(tmp_path, data__vision_cache="disk", data__vision_cache_gb=0.5)
    shown = io.StringIO()
    page = tmp_path / "check.html"
    check(load_recipe(file), samples=0, html=page, console=Console(file=shown, width=400), processes=1)
    told = "vision      5 images to encode before training, 1.3 MB into "
    assert told in shown.getvalue() and "at most 500 MB of them" in shown.getvalue()
    assert "Note: the run trains on" not in shown.getvalue()
    assert "5 images to encode before training" in page.read_text()
    few = load_recipe(file, ["train.max_steps=2", "train.gradient_accumulation_steps=1", "data.vision_cache=memory"])
    check(few, samples=0, console=Console(file=shown, width=400), processes=1)
    assert "into memory, at most" in shown.getvalue()
    assert "the run trains on 2 of its 14 samples, and encodes the images of all" in shown.getvalue()
    assert not cache_folder().exists() and not (tmp_path / "run").exists()
