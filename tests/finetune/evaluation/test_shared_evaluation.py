"""`finetune evaluate` under a launcher: its processes share the questions, and the files are those of one process."""

import json

import pytest
from forked_ranks import finetune_on
from recipes_for_tests import IMAGES, ROOT, TINY, finetune

from finetune.replies.plan import Plan


def write_questions(folder, count=10, broken=()):
    """Questions of several lengths, three on each image; two of these numbers are on no image."""
    folder.mkdir()
    lines = []
    for n in range(count):
        image = "gone.png" if n in broken else str(IMAGES[n // 3 % len(IMAGES)])
        question = f"What is number {n}? " * (1 + n % 3)
        lines.append(json.dumps({"questionId": n, "image": image, "question": question, "answers": [f"answer {n}"]}))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def command(folder, *more):
    given = ("--task", "docvqa", "--data", folder / "questions.jsonl", "--images-root", ROOT, "--max-new-tokens", 6)
    return ("evaluate", TINY, *given, "--batch-tokens", 1200, "--out", folder / "out", *more)


def results(folder):
    """Without what tells one run of the same evaluation from another."""
    found = json.loads((folder / "out" / "results.json").read_text())
    return {key: value for key, value in found.items() if key not in ("speed", "environment")}


def files(folder):
    return {name: (folder / "out" / name).read_bytes() for name in ("predictions.jsonl", "evaluation.json")}


def test_processes_share_the_questions(tmp_path):
    """Two models, and half of the replies of the first there already."""
    folder = write_questions(tmp_path / "data")
    finetune(*command(folder, "--compare", TINY))
    expected, predictions, compared = (
        results(folder),
        files(folder),
        (folder / "out" / "compared" / "predictions.jsonl").read_bytes(),
    )
    kept = (folder / "out" / "predictions.jsonl").read_bytes().splitlines(keepends=True)[3:6]
    (folder / "out" / "predictions.jsonl").write_bytes(b"".join(kept))
    (folder / "out" / "compared" / "predictions.jsonl").unlink()
    (folder / "out" / "results.json").unlink()

    first, second = finetune_on(2, *command(folder, "--compare", TINY))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert results(folder) == expected and files(folder) == predictions
    assert (folder / "out" / "compared" / "predictions.jsonl").read_bytes() == compared
    assert first.stdout.count("2 share the questions") == 2 and "3 of 10 replies" in first.stdout
    assert second.stdout == ""
    speed = json.loads((folder / "out" / "results.json").read_text())["speed"]
    assert speed["replies"] == 7


@pytest.mark.slow
def test_more_processes_than_questions(tmp_path):
    folder = write_questions(tmp_path / "data", count=2)
    finetune(*command(folder))
    expected = results(folder), files(folder)
    (folder / "out" / "predictions.jsonl").unlink()
    assert [done.returncode for done in finetune_on(3, *command(folder))] == [0, 0, 0]
    assert (results(folder), files(folder)) == expected


@pytest.mark.slow
def test_a_failure_of_one_process_ends_all_and_keeps_the_replies(tmp_path):
    """The image is there and damaged, so that it is met while replying, by one of them."""
    folder = write_questions(tmp_path / "data", broken=(9,))
    broken = folder / "gone.png"
    broken.write_bytes(IMAGES[0].read_bytes()[:300])
    text = (folder / "questions.jsonl").read_text().replace("gone.png", str(broken))
    (folder / "questions.jsonl").write_text(text)
    given = [word if word != ROOT else "/" for word in command(folder)]
    done = finetune_on(2, *given)
    assert [one.returncode for one in done] == [2, 2], done
    assert all("gone.png" in one.stderr and "--bad-image wrong" in one.stderr for one in done)
    assert sum("process " in one.stderr for one in done) == 1  # the other is told
    kept = len((folder / "out" / "predictions.jsonl").read_text().splitlines())
    assert 0 < kept < 10
    done = finetune_on(2, *given, "--bad-image", "wrong")
    assert [one.returncode for one in done] == [0, 0]
    assert f"{kept} of 10 replies" in done[0].stdout
    assert [one["id"] for one in results(folder)["unreadable"]] == ["9"]


def test_shares_are_even_and_keep_images_together():
    plan = Plan()
    for n in range(24):
        plan.lengths.append(50 + n)
        plan.images.append((n // 3,) if n < 12 else ())
    shares = plan.shares(3)
    assert sorted(index for share in shares for index in share) == list(range(24))
    tokens = [sum(plan.lengths[index] for index in share) for share in shares]
    assert max(tokens) - min(tokens) < 160
    for image in range(4):
        (owner,) = [share for share in shares if 3 * image in share]
        assert {3 * image + 1, 3 * image + 2} <= set(owner)
    assert shares == plan.shares(3)
    one_image = Plan(plan.lengths, [(0,)] * 24)
    assert all(one_image.shares(4))  # not all questions on one image for one process
    assert plan.shares(1) == [list(range(24))]
