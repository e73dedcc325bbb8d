"""The page as a server: what a client that is no browser can get out of it."""

import json
import socket
from pathlib import Path

import httpx
import pytest
from asked_models_for_tests import ScriptedModel
from demo_page_for_tests import page_files, served  # noqa: F401 (a fixture)

from finetune.demo.access import password_check
from finetune.demo.server import FIRST_PORT, page_folder, refuse_open_page, take_port
from finetune.errors import UserError

SECRET = "nobody may read this"


def upload_event(client: httpx.Client) -> tuple[int, dict]:
    """The number of the function that takes uploads, and the file that it takes."""
    config = client.get("/config").json()
    (button,) = [one["id"] for one in config["components"] if one["type"] == "uploadbutton"]
    (event,) = [one["id"] for one in config["dependencies"] if button in one["inputs"]]
    return event, {"meta": {"_type": "gradio.FileData"}}


def send(client: httpx.Client, event: int, data: list) -> str:
    """What an event answers with, as text."""
    asked = {"data": data, "fn_index": event, "session_hash": "visitor", "event_data": None, "trigger_id": None}
    assert client.post("/gradio_api/queue/join", json=asked).status_code == 200
    said = []
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": "visitor"}) as stream:
        for line in stream.iter_lines():
            said.append(line)
            if '"msg":"process_completed"' in line.replace(" ", "") or "close_stream" in line:
                break
    return "\n".join(said)


def test_no_file_of_this_machine_and_no_address_can_be_had_through_the_page(page_files, tmp_path, caplog):  # noqa: F811
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET)
    with (
        served([ScriptedModel(["a"])], page_files) as address,
        httpx.Client(base_url=address, timeout=20) as client,
        socket.create_server(("127.0.0.1", 0)) as elsewhere,
    ):
        elsewhere.settimeout(0.2)
        url = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/x.png"
        for path in (
            f"/gradio_api/file={secret}",
            f"/gradio_api/file={page_files}/../secret.txt",
            "/gradio_api/file=/etc/passwd",
            f"/gradio_api/file={url}",
            f"/gradio_api/proxy={url}",
            "/gradio_api/run-history/buckets",
            "/monitoring",
        ):
            got = client.get(path)
            assert got.status_code in (403, 404) and SECRET not in got.text, path
        event, file = upload_event(client)
        for given in (str(secret), "/etc/passwd", url):
            said = send(client, event, [[{**file, "path": given}]])
            assert '"success":false' in said.replace(" ", ""), given
        said = send(client, event, [[{**file, "path": str(secret), "url": url}]])
        assert '"success":false' in said.replace(" ", "")
        with pytest.raises(TimeoutError):
            elsewhere.accept()
        assert not [one for one in page_files.rglob("*") if one.is_file() and SECRET in one.read_text("latin-1")]


def test_an_upload_is_bounded_and_does_not_stay(page_files, monkeypatch):  # noqa: F811
    monkeypatch.setattr("finetune.demo.pictures.MOST_BYTES", 1000)
    with (
        served([ScriptedModel(["a"])], page_files) as address,
        httpx.Client(base_url=address, timeout=20) as client,
    ):
        too_large = client.post("/gradio_api/upload", files={"files": ("a.png", b"x" * 2000)})
        assert too_large.status_code == 413
        (path,) = client.post("/gradio_api/upload", files={"files": ("a.png", b"not a picture")}).json()
        event, file = upload_event(client)
        said = send(client, event, [[{**file, "path": path, "orig_name": "a.png"}]])
        assert "a.png: its content is not an image" in said
        assert not Path(path).exists()


def test_the_browser_is_told_to_load_from_the_page_alone(page_files):  # noqa: F811
    with served([ScriptedModel(["a"])], page_files) as address:
        got = httpx.get(address)
        assert "default-src 'self'" in got.headers["content-security-policy"]
        assert "fonts.googleapis" not in got.text and "cdn" not in got.text.lower()
        config = json.loads(httpx.get(f"{address}/config").text)
        assert config["analytics_enabled"] is False
        for name in ("evil.example", f"evil.example:{address.rpartition(':')[2]}", ""):
            assert httpx.get(address, headers={"host": name}).status_code == 403
        assert httpx.get(address, headers={"host": "localhost"}).status_code == 200


def test_a_password_is_asked_for(page_files, monkeypatch):  # noqa: F811
    monkeypatch.setattr("finetune.demo.access.WRONG_PASSWORD_SECONDS", 0)
    options = {"check_password": password_check({"ann": "right"})}
    with (
        served([ScriptedModel(["a"])], page_files, **options) as address,
        httpx.Client(base_url=address, timeout=20) as client,
    ):
        assert client.get("/config").status_code == 401
        assert client.post("/gradio_api/upload", files={"files": ("a", b"x")}).status_code == 401
        assert client.post("/login", data={"username": "ann", "password": "wrong"}).status_code == 400
        assert client.post("/login", data={"username": "ann", "password": "right"}).status_code == 200
        assert client.get("/config").status_code == 200


def test_the_folder_of_the_page_is_private_and_goes_with_it():
    with page_folder() as folder:
        assert folder.stat().st_mode & 0o077 == 0
        (folder / "a").mkdir()
        (folder / "a" / "b.jpg").write_bytes(b"x")
    assert not folder.exists()


def test_a_port_that_is_taken_is_refused_and_another_one_is_found():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port} cannot be listened on"):
            take_port("127.0.0.1", port)
    with take_port("127.0.0.1", None) as first, take_port("127.0.0.1", None) as second:
        assert FIRST_PORT <= first.getsockname()[1] < second.getsockname()[1]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])
def test_a_page_that_other_machines_reach_needs_a_password(host):
    with pytest.raises(UserError, match="--password-file"):
        refuse_open_page(host, has_passwords=False)
    refuse_open_page(host, has_passwords=True)
    refuse_open_page("127.0.0.1", has_passwords=False)
    refuse_open_page("localhost", has_passwords=False)
