"""The experiment on `data.views`: its pages, and recipes that differ in that key alone."""

import yaml
from recipes_for_tests import finetune

from examples.nano.making import views_experiment


def test_the_two_recipes_differ_in_views_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(views_experiment, "SETS", {"train": (6, 6), "test": (4, 1)})
    assert views_experiment.main(["--to", str(tmp_path / "r")]) == 0
    page, views = (yaml.safe_load((tmp_path / "r" / f"{name}.yaml").read_text()) for name in ("page", "views"))
    assert views["data"].pop("views") == {"page": True, "grid": [2, 2], "overlap": 0.1}
    assert page.pop("output") != views.pop("output")
    assert page == views
    checked = finetune("check", tmp_path / "r" / "page.yaml", "--samples", "1")
    assert checked.returncode == 0, checked.stderr
    assert "6 of 6 rows" in checked.stdout and "4 of 4 rows" in checked.stdout
    capsys.readouterr()
    assert views_experiment.main(["--to", str(tmp_path / "r")]) == 2
    assert "exists; delete it" in capsys.readouterr().err
