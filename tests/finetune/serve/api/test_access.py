"""Who may ask."""

from collections.abc import Iterator

import pytest
from running_api import RunningApi, chat_body, running_api

from finetune.serve.api.access import host_name

KEYS = ("first-key-of-this-server", "second-key-of-this-server")


@pytest.fixture(scope="module")
def keyed() -> Iterator[RunningApi]:
    with running_api(keys=KEYS, cors=("https://example.org",)) as api:
        yield api


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_is_known(keyed, key):
    body = chat_body("Hi")
    headers = {"Authorization": f"Bearer {key}"}
    assert keyed.request("POST", "/v1/chat/completions", body, headers)[0] == 200
    for path in ("/v1/models", "/metrics", "/health"):
        assert keyed.request("GET", path, headers=headers)[0] == 200


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer ", "Bearer first", f"Bearer {KEYS[0]}x", f"Basic {KEYS[0]}", KEYS[0], "Bearer \xe9"],
)
def test_a_key_that_is_not(keyed, authorization):
    headers = {} if authorization is None else {"Authorization": authorization}
    for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/x")):
        status, content, response = keyed.request(method, path, chat_body("Hi"), headers)
        assert (status, content["error"]["code"]) == (401, "invalid_api_key")
        assert response.headers["WWW-Authenticate"] == "Bearer"
    assert keyed.request("GET", "/health", headers=headers)[0] == 200
    assert keyed.decoder.live == []


def test_pages_of_one_origin_may_ask(keyed):
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
    status, _, response = keyed.request(
        "OPTIONS", "/v1/chat/completions", headers={**asks, "Origin": "https://example.org"}
    )
    assert (status, response.headers["Access-Control-Allow-Origin"]) == (200, "https://example.org")
    status, _, response = keyed.request(
        "OPTIONS", "/v1/chat/completions", headers={**asks, "Origin": "https://evil.example"}
    )
    assert (status, response.headers["Access-Control-Allow-Origin"]) == (400, None)


def test_no_page_of_the_web_may_ask_by_default():
    with running_api(hosts=("localhost", "127.0.0.1", "[::1]")) as api:
        body = chat_body("Hi")
        for host in ("localhost", "LOCALHOST:5", f"127.0.0.1:{api.port}", "[::1]:80"):
            assert api.request("POST", "/v1/chat/completions", body, {"Host": host})[0] == 200
        for host in ("evil.example", f"evil.example:{api.port}", "127.0.0.1.evil.example", ""):
            assert api.request("POST", "/v1/chat/completions", body, {"Host": host})[0] == 403
        asks = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
        status, _, response = api.request("OPTIONS", "/v1/chat/completions", headers=asks)
        assert (status, response.headers["Access-Control-Allow-Origin"]) == (405, None)
        # What a page may send without being asked first.
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
            assert api.request("POST", "/v1/chat/completions", body, {"Content-Type": kind})[0] == 415


@pytest.mark.parametrize(
    ("header", "name"), [("localhost", "localhost"), ("[::1]:80", "[::1]"), ("[::1]", "[::1]"), ("a.b.:8", "a.b")]
)
def test_the_name_in_a_host_header(header, name):
    assert host_name(header) == name
