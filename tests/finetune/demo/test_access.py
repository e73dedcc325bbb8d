"""The passwords of the page."""

import asyncio

import pytest

from finetune.demo import access
from finetune.demo.access import password_check, read_passwords
from finetune.errors import InputError, UserError


def test_passwords_are_lines_of_a_file(tmp_path):
    file = tmp_path / "passwords"
    file.write_text("ann:a:b \n\n bob :ü\n")
    assert read_passwords(file) == {"ann": "a:b ", "bob": "ü"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"\n \n", "it is empty"),
        (b"ann:x\nnobody\n", "line 2: write name:password"),
        (b":x\n", "line 1: write name:password"),
        (b"ann:\n", "line 1: write name:password"),
        (b"ann:x\nann:y\n", "line 2: the name is there twice"),
        (b"\xff\xfe", "no text in UTF-8"),
    ],
)
def test_a_file_that_has_no_passwords_is_refused_without_showing_them(content, said, tmp_path):
    file = tmp_path / "passwords"
    file.write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        read_passwords(file)
    assert "nobody" not in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="--password-file"):
        read_passwords(tmp_path / "none")


def test_only_a_name_with_its_own_password_comes_in(monkeypatch):
    monkeypatch.setattr(access, "WRONG_PASSWORD_SECONDS", 0)
    check = password_check({"ann": "a", "bob": "b"})
    tried = [("ann", "a"), ("bob", "b"), ("ann", "b"), ("bob", ""), ("", ""), ("eve", "a"), ("änn", "ä")]
    assert [asyncio.run(check(*one)) for one in tried] == [True, True, False, False, False, False, False]
