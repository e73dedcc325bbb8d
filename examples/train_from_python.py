"""Train from Python: what `finetune recipes/quickstart.yaml` does, with overrides.

python examples/train_from_python.py
"""

from pathlib import Path

from finetune.recipe import load_recipe
from finetune.training.train import train
from qwenvl import load_model


def main() -> None:
    recipe = load_recipe(Path("recipes/quickstart.yaml"), ["train.max_steps=4", "evaluate=null", "output=runs/python"])
    run = train(recipe)
    model = load_model(run)  # the base with the new adapter on it, ready for `generate`
    print(f"{type(model).__name__} from {run}")


if __name__ == "__main__":
    main()
