"""What a run ran on."""

import json
import re
import socket
import subprocess
import sys

from finetune.run.environment import describe_environment


def test_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = describe_environment("a device")
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert all(re.match(r"\d+\.", found["versions"][name]) for name in ("torch", "transformers", "peft"))
    assert found["versions"].keys() >= {"trl", "qwenvl-finetune"}
    assert (found["host"], found["device"], found["commit"]) == (socket.gethostname(), "a device", None)
    json.dumps(found)


def test_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["add", "a"], [*who, "commit", "-q", "-m", "a"], ["tag", "a-tag"]):
        (tmp_path / "a").write_text("a")
        subprocess.run(["git", *arguments], check=True)
    commit = describe_environment()["commit"]
    assert re.fullmatch(r"[0-9a-f]{40}", commit)
    (tmp_path / "a").write_text("b")
    assert describe_environment()["commit"] == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert describe_environment()["commit"] is None
