"""`fetch`, against servers on 127.0.0.1: it reaches public addresses only, and ends in time and size.

The servers' own address is forbidden by default, which is what the first tests show; the others allow it by the
parameter a caller has for that.
"""

import ipaddress
import os
import socket
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from shutil import which

import pytest
from encoded_images import encode
from PIL import Image

from qwenvl.images.image_urls import UrlError, fetch, is_public_address
from qwenvl.images.images import ImageAccess, ImageError, load_image

PNG = encode(Image.new("RGB", (3, 2), "red"))
LIMITS = {"max_bytes": 10_000, "timeout": 20.0, "max_redirects": 3}


def loopback(address) -> bool:
    return address.is_loopback


def local(url: str, **limits) -> bytes:
    return fetch(url, **{**LIMITS, "address_allowed": loopback, **limits})


class Site(BaseHTTPRequestHandler):
    """What each path answers; `requests` remembers what was asked."""

    requests: list[tuple[str, dict]] = []  # noqa: RUF012

    def do_GET(self):
        self.requests.append((self.path, dict(self.headers)))
        path = self.path.partition("?")[0]
        name = path.strip("/").replace("-", "_") or "image"
        getattr(self, name, self.missing)()

    def answer(self, body: bytes, **headers):
        self.send_response(200)
        for key, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def image(self):
        self.answer(PNG)

    def missing(self):
        self.send_error(404)

    def empty(self):
        self.answer(b"")

    def html(self):
        self.answer(b"<html>Log in</html>")

    def declared_too_long(self):
        self.answer(b"x", Content_Length="10001")

    def endless(self):
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(100_000):
                self.wfile.write(bytes(1000))
            self.requests.append(("endless was read to the end", {}))
        except OSError:
            pass

    def cut_short(self):
        self.answer(PNG, Content_Length=str(len(PNG) + 5))

    def chunked(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in (PNG[:10], PNG[10:]):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    protocol_version = "HTTP/1.1"

    def chunked_cut(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"ff\r\n" + PNG[:10])
        self.close_connection = True

    def zipped(self):
        self.answer(b"\x1f\x8b", Content_Encoding="gzip")

    def drip_body(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.drip()

    def drip_headers(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-A: ")
        self.drip()

    def silence(self):
        time.sleep(5)

    def drip(self):
        try:
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            pass

    def redirect(self):
        self.send_response(302)
        self.send_header("Location", self.path.partition("?")[2])
        self.send_header("Content-Length", "0")
        self.end_headers()

    def countdown(self):
        """/countdown?3 leads over 3 redirects to the image."""
        left = int(self.path.partition("?")[2])
        self.path = f"/redirect?/countdown?{left - 1}" if left > 1 else "/redirect?/image"
        self.redirect()

    def log_message(self, *_):
        pass


@pytest.fixture
def site():
    """The URL of a running site."""
    Site.requests = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def no_connection(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail(f"connected to {a[1:]}"))


@pytest.fixture
def names(monkeypatch):
    """names["host"] = [addresses]: what the resolver answers, in turn and then the last again."""
    table: dict[str, list[str]] = {}
    looked_up: list[str] = []
    real = socket.getaddrinfo

    def getaddrinfo(host, port, *args, **kwargs):
        looked_up.append(host)
        if host in table:
            answers = table[host]
            host = answers.pop(0) if len(answers) > 1 else answers[0]
        return real(host, port, *args, flags=socket.AI_NUMERICHOST, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    table["looked up"] = looked_up
    return table


# --- addresses -------------------------------------------------------------------------------------------------------


NOT_PUBLIC = {
    "loopback": ["127.0.0.1", "127.9.9.9", "::1"],
    "unspecified": ["0.0.0.0", "0.1.2.3", "::"],
    "private": ["10.0.0.5", "172.16.0.1", "172.31.255.255", "192.168.1.1", "fc00::1", "fd00:ec2::254", "fec0::1"],
    "link-local": ["169.254.169.254", "fe80::1", "fe80::1%eth0"],
    "carrier-grade NAT": ["100.64.0.1", "100.127.255.255"],
    "protocol assignments": ["192.0.0.1", "2001:10::1", "100::1", "5f00::1"],
    "documentation": ["192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff::1"],
    "benchmarking": ["198.18.0.1", "198.19.255.255"],
    "multicast": ["224.0.0.1", "239.255.255.255", "ff02::1"],
    "reserved": ["240.0.0.1", "255.255.255.255"],
    "IPv4 inside IPv6": ["::127.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8"],
    "6to4": ["2002:7f00:1::", "2002:808:808::1", "192.88.99.1"],
    "Teredo": ["2001::1", "2001:0:1::1"],
    "NAT64": ["64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1"],
}
PUBLIC = ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450::1"]


@pytest.mark.parametrize("block", NOT_PUBLIC)
def test_addresses_that_are_not_public(block, names, no_connection):
    for address in NOT_PUBLIC[block]:
        assert not is_public_address(ipaddress.ip_address(address)), address
        if "%" in address:  # an interface that this machine may not have
            continue
        names["host.test"] = [address]
        with pytest.raises(UrlError, match="which is not a public address"):
            fetch("http://host.test/", **LIMITS)


@pytest.mark.parametrize("address", PUBLIC)
def test_addresses_that_are_public(address):
    assert is_public_address(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "127.1", "0177.0.0.1", "[::ffff:7f00:1]"]
)
def test_spellings_of_this_machine(host, no_connection):
    with pytest.raises((UrlError, ImageError)) as caught:
        load_image(f"http://{host}/latest/meta-data/", access=ImageAccess(allow_urls=True))
    # Not every resolver knows every spelling, and a machine may lack IPv6.
    assert "not a public address" in str(caught.value) or "the connection failed" in str(caught.value)
    assert host in str(caught.value)


def test_one_private_address_among_public_ones_is_enough(monkeypatch, no_connection):
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 80)) for a in ("8.8.8.8", "10.0.0.5")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: answer)
    with pytest.raises(UrlError, match=r"host\.test is at 10\.0\.0\.5"):
        fetch("http://host.test/", **LIMITS)


def test_a_name_is_resolved_once_and_its_address_is_what_is_connected_to(site, names, monkeypatch):
    """Rebinding: the second answer would be another address."""
    names["host.test"] = ["127.0.0.1", "10.0.0.5"]
    targets = []
    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda self, to: targets.append(to) or connect(self, to))
    port = int(site.rpartition(":")[2])
    assert local(f"http://host.test:{port}/image?a=1&b=%20") == PNG
    assert names["looked up"] == ["host.test"]
    assert targets == [("127.0.0.1", port)]
    path, headers = Site.requests[0]
    assert path == "/image?a=1&b=%20"
    assert headers["Host"] == f"host.test:{port}"
    assert headers["Accept-Encoding"] == "identity"
    assert not {"Authorization", "Cookie", "Referer"} & set(headers)


def test_proxies_of_the_environment_are_not_used(site, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert local(site) == PNG


# --- URLs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///etc/passwd", "the scheme 'file' is not fetched"),
        ("ftp://host.test/a.png", "the scheme 'ftp' is not fetched"),
        ("gopher://host.test/", "the scheme 'gopher' is not fetched"),
        ("//host.test/a.png", "the scheme '' is not fetched"),
        ("http:///a.png", "it names no host"),
        ("http:a.png", "it names no host"),
        ("http://user:secret@host.test/", "it carries credentials"),
        ("http://user@host.test/", "it carries credentials"),
        ("http://host.test\\@other.test/", "backslashes"),
        ("http://host.test/a b.png", "spaces"),
        ("http://host.test/\r\nX: y", "control characters"),
        ("http://host.test:99999/", "it is not a URL"),
        ("http://[::1/", "it is not a URL"),
        ("http://[fe80::1%25lo]/", "it names no host"),
        (f"http://{'a' * 64}.test/", "not a host name"),
    ],
)
def test_urls_that_are_refused(url, reason, names, no_connection):
    with pytest.raises(UrlError) as caught:
        fetch(url, **LIMITS)
    assert reason in str(caught.value)
    assert "secret" not in str(caught.value)
    assert names["looked up"] == []


def test_characters_beyond_ascii(site):
    assert local(f"{site}/image?größe=1") == PNG
    assert Site.requests[0][0] == "/image?gr%C3%B6%C3%9Fe=1"


# --- redirects -------------------------------------------------------------------------------------------------------


def test_redirects_are_followed_up_to_the_limit(site):
    assert local(f"{site}/countdown?3") == PNG
    assert len(Site.requests) == 4
    with pytest.raises(UrlError, match="redirects more than 3 times"):
        local(f"{site}/countdown?4")
    with pytest.raises(UrlError, match="redirects more than 0 times"):
        local(f"{site}/countdown?1", max_redirects=0)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("http://10.0.0.5/a.png", "10.0.0.5, which is not a public address"),
        ("http://169.254.169.254/latest/meta-data/", "169.254.169.254, which is not a public address"),
        ("//192.168.0.1/", "192.168.0.1, which is not a public address"),
        ("http://inside.test/", "10.1.2.3, which is not a public address"),
        ("file:///etc/passwd", "the scheme 'file' is not fetched"),
        ("ftp://10.0.0.5/", "the scheme 'ftp' is not fetched"),
        ("http://user:secret@127.0.0.1/", "it carries credentials"),
    ],
)
def test_each_redirect_is_checked_like_the_first(site, names, target, reason):
    names["inside.test"] = ["10.1.2.3"]
    with pytest.raises(UrlError) as caught:
        local(f"{site}/redirect?{target}")
    assert reason in str(caught.value) and "secret" not in str(caught.value)
    assert len(Site.requests) == 1


# --- bodies and time -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nothing", "the server answered 404"),
        ("declared-too-long", "longer than the 10000 bytes allowed"),
        ("endless", "longer than the 10000 bytes allowed"),
        ("cut-short", "the connection"),
        ("chunked-cut", "the connection failed"),
        ("zipped", "encoded as 'gzip'"),
    ],
)
def test_bodies_that_are_refused(site, path, reason):
    with pytest.raises(UrlError, match=reason):
        local(f"{site}/{path}", timeout=5)
    assert all(path != "endless was read to the end" for path, _ in Site.requests)


def test_bodies(site):
    assert local(f"{site}/chunked") == PNG
    assert local(f"{site}/empty") == b""


@pytest.mark.parametrize("path", ["drip-body", "drip-headers", "silence"])
def test_a_slow_server_is_left_at_the_deadline(site, path):
    """Every byte comes well within the time; only all of them do not. Without a deadline over all of them the server
    would end after five seconds, and with another error."""
    with pytest.raises(UrlError, match=r"it took longer than 0\.3 s"):
        local(f"{site}/{path}", timeout=0.3)


def test_a_slow_resolver_is_left_at_the_deadline(monkeypatch):
    asked = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [asked.wait(20)][:0])
    with pytest.raises(UrlError, match=r"it took longer than 0\.2 s"):
        fetch("http://host.test/", **{**LIMITS, "timeout": 0.2})
    asked.set()


def test_what_cannot_be_reached(names):
    names["none.test"] = ["not an address"]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(UrlError, match="the connection failed"):
            local(f"http://127.0.0.1:{unused.getsockname()[1]}/")
    with pytest.raises(UrlError, match="the connection failed"):
        local("http://none.test/")


# --- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tls_site(tmp_path, monkeypatch):
    """The port of a TLS server whose certificate is for host.test, trusted; and the names clients asked it for."""
    command = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=host.test"
    files = ["-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"]
    options = [*command.split(), "-addext", "subjectAltName=DNS:host.test", *files]
    subprocess.run(["openssl", *options], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", os.fspath(tmp_path / "cert.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    asked_for = []
    context.sni_callback = lambda _, name, __: asked_for.append(name)

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def get_request(self):
            connection, address = super().get_request()
            return context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), address

        def handle_error(self, *_):
            pass

    Site.requests = []
    with Quiet(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.server_port, asked_for
        server.shutdown()


@pytest.mark.skipif(which("openssl") is None, reason="no openssl command to make a certificate with")
def test_tls_is_verified_for_the_name(tls_site, names, site):
    port, asked_for = tls_site
    names["host.test"] = names["other.test"] = ["127.0.0.1"]
    assert local(f"https://host.test:{port}/image") == PNG
    assert asked_for == ["host.test"]
    with pytest.raises(UrlError, match=r"the TLS connection failed .*certificate"):
        local(f"https://other.test:{port}/image")
    with pytest.raises(UrlError, match="the TLS connection failed"):
        local(site.replace("http", "https"))  # a server without TLS
    Site.requests = []
    with pytest.raises(UrlError, match=r"redirects from https to .* which is not encrypted"):
        local(f"https://host.test:{port}/redirect?{site}/image")
    assert len(Site.requests) == 1


# --- through load_image ----------------------------------------------------------------------------------------------


def test_images_from_urls(site):
    access = ImageAccess(allow_urls=True, address_allowed=loopback)
    assert load_image(f"{site}/image", access=access).getpixel((0, 0)) == (255, 0, 0)
    assert load_image({"bytes": None, "path": f"{site}/image"}, access=access).size == (3, 2)
    with pytest.raises(ImageError, match="an HTML page") as caught:
        load_image(f"{site}/html", access=access, name="row 3")
    assert str(caught.value).startswith(f"row 3 ('{site}/html'): ")
    with pytest.raises(ImageError, match="longer than the 20 bytes allowed"):
        load_image(f"{site}/image", access=ImageAccess(allow_urls=True, address_allowed=loopback, max_bytes=20))
    count = len(Site.requests)
    with pytest.raises(ImageError, match="not a public address"):
        load_image(f"{site}/image", access=ImageAccess(allow_urls=True))
    with pytest.raises(ImageError, match="URLs are not fetched here"):
        load_image(f"{site}/image")
    assert len(Site.requests) == count
