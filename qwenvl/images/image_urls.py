"""Images from http(s) URLs: bytes from public addresses only, with limits on size, time and redirects.

An image field is data, and data must not make this machine send requests into its own network (SSRF). So a host name
is resolved once, every address it resolves to is checked, and the connection goes to the checked address itself: the
name is never looked up again, which rules out DNS rebinding. Redirects are followed here, each hop checked like the
first. Proxies set in the environment are not used: a proxy would resolve the name unchecked.

`qwenvl.images.images` calls this only if its caller allowed URLs.
"""

import http.client
import io
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from qwenvl.errors import InputError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# The registries' special-purpose blocks (IANA, RFC 6890 and successors), spelled out: `ipaddress.is_global` differs
# between Python releases and calls multicast global.
_RESERVED_V4 = [
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # "this" network, unspecified
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier-grade NAT
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local, where clouds serve instance credentials
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarking
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
]
# Everything outside 2000::/3 is special (loopback, unique-local, link-local, multicast, IPv4-mapped, NAT64, ...).
_GLOBAL_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")
_RESERVED_V6 = [
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, Teredo among them: an IPv4 address hides inside
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: an IPv4 address hides inside
        "3fff::/20",  # documentation
    )
]

_CHUNK = 1 << 16  # bytes per read
_REDIRECTS = (301, 302, 303, 307, 308)


class UrlError(InputError):
    """An image URL was refused or could not be fetched.

    Attributes: `url` (without credentials), `reason`, `remedy`.
    """

    def __init__(self, url: str, reason: str, remedy: str):
        super().__init__(url, reason, remedy)
        self.url, self.reason, self.remedy = url, reason, remedy

    def __str__(self) -> str:
        return f"{self.url}: {self.reason}; {self.remedy}"


def is_url(source: Any) -> bool:
    """Whether an image source is an http(s) URL."""
    return isinstance(source, str) and source[:6].lower().startswith(("http:", "https:"))


def is_data_uri(source: Any) -> bool:
    """Whether an image source is a data URI, which holds the image itself."""
    return isinstance(source, str) and source[:5].lower() == "data:"


def is_public_address(address: IPAddress) -> bool:
    """Whether an address is on the public internet: not private, loopback, link-local, multicast, reserved,
    unspecified, carrier-grade NAT, IPv4-mapped, 6to4, Teredo or NAT64."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _RESERVED_V4)
    return address in _GLOBAL_UNICAST_V6 and not any(address in network for network in _RESERVED_V6)


def display_url(url: str) -> str:
    """The URL for a message, with the credentials before an `@` in the host part hidden."""
    return re.sub(r"(?<=://)[^/?#]*@", "***@", url)


def fetch(
    url: str,
    *,
    max_bytes: int,
    timeout: float,
    max_redirects: int,
    address_allowed: Callable[[IPAddress], bool] = is_public_address,
) -> bytes:
    """Fetch the body of an http(s) URL.

    Args:
        url: absolute http or https URL, without credentials.
        max_bytes: longest body accepted, in bytes.
        timeout: seconds in total, for name resolution, connections, TLS, redirects and the body.
        max_redirects: redirects followed.
        address_allowed: which addresses may be connected to.

    Raises:
        UrlError: refused (scheme, address, redirect, size, encoding), not found, or too slow.
    """
    deadline = _Deadline(timeout)
    current = url
    try:
        for _ in range(max_redirects + 1):
            location, body = _get(current, deadline, max_bytes, address_allowed)
            if location is None:
                return body
            # A Location header is bytes that http.client read as Latin-1.
            target = urljoin(current, quote(location.encode("latin-1"), safe="".join(map(chr, range(33, 127)))))
            if urlsplit(current).scheme == "https" and urlsplit(target).scheme == "http":
                raise UrlError(
                    display_url(url),
                    f"it redirects from https to {display_url(target)}, which is not encrypted",
                    "download the image yourself, or use the final URL",
                )
            current = target
    except TimeoutError:
        raise UrlError(
            display_url(url),
            f"it took longer than {timeout:g} s",
            "download the image beforehand, or allow more time (url_timeout)",
        ) from None
    except ssl.SSLError as error:
        raise UrlError(
            display_url(url), f"the TLS connection failed ({error})", "check the URL and the host"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise UrlError(
            display_url(url), f"the connection failed ({type(error).__name__}: {error})", "check the URL, or try again"
        ) from error
    raise UrlError(
        display_url(url), f"it redirects more than {max_redirects} times", "use the final URL, or raise max_redirects"
    )


def _get(
    url: str, deadline: "_Deadline", max_bytes: int, address_allowed: Callable[[IPAddress], bool]
) -> tuple[str | None, bytes]:
    """Send one request: (the redirect's location or None, the body)."""
    shown = display_url(url)
    parts, host, port = _parse(url)
    with _connect(shown, host, port, deadline, address_allowed) as plain:
        if parts.scheme == "https":
            context = ssl.create_default_context()
            plain.settimeout(deadline.remaining())
            sock: socket.socket = context.wrap_socket(plain, server_hostname=host)
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(host, port, context=context)
        else:
            sock = plain
            connection = http.client.HTTPConnection(host, port)
        with sock:
            # http.client uses the socket made here; it must not open one itself, to an unchecked address.
            connection.auto_open = 0
            connection.sock = _DeadlineSocket(sock, deadline)
            path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
            query = quote(parts.query, safe="/?%:@!$&'()*+,;=~-._[]{}|^`<>\"")
            headers = {
                "Accept": "image/*",
                "Accept-Encoding": "identity",
                "User-Agent": "qwenvl",
                "Connection": "close",
            }
            connection.request("GET", f"{path}?{query}" if query else path, headers=headers)
            with connection.getresponse() as response:
                if response.status in _REDIRECTS and response.getheader("Location"):
                    return response.getheader("Location"), b""
                if response.status != 200:
                    raise UrlError(shown, f"the server answered {response.status} {response.reason}", "check the URL")
                return None, _read(shown, response, max_bytes)


def _parse(url: str) -> tuple[SplitResult, str, int]:
    """(parts, ASCII host name, port) of an acceptable URL."""
    shown = display_url(url)
    # urlsplit drops tabs and newlines, and other parsers read a backslash as a slash: parsers would disagree.
    if re.search(r"[\x00-\x20\x7f\\]", url):
        raise UrlError(repr(shown), "it holds spaces, control characters or backslashes", "percent-encode the URL")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UrlError(shown, f"it is not a URL ({error})", "check the URL") from None
    if parts.scheme not in ("http", "https"):
        raise UrlError(shown, f"the scheme {parts.scheme!r} is not fetched", "use an http or https URL")
    if parts.username is not None or parts.password is not None:
        raise UrlError(shown, "it carries credentials", "download the image yourself: no credentials are sent")
    if not host or "%" in host:
        raise UrlError(shown, "it names no host", "use a URL like https://host/path/image.jpg")
    try:
        host = host.encode("idna").decode("ascii")
    except UnicodeError:
        raise UrlError(shown, f"{host!r} is not a host name", "check the URL") from None
    return parts, host, port or (443 if parts.scheme == "https" else 80)


def _connect(
    shown: str, host: str, port: int, deadline: "_Deadline", address_allowed: Callable[[IPAddress], bool]
) -> socket.socket:
    """A connected socket to a checked address of the host."""
    found = _resolve(host, port, deadline)
    for _, _, _, _, target in found:
        address = ipaddress.ip_address(target[0])
        # One forbidden address forbids the host: a mix of public and private addresses is a means of attack, and
        # legitimate image hosts have none.
        if not address_allowed(address):
            raise UrlError(
                shown,
                f"{host} is at {address}, which is not a public address",
                "download the image yourself if you trust this host",
            )
    failure: OSError = OSError(f"{host} has no address")
    for tried, (family, kind, protocol, _, target) in enumerate(found):
        sock = socket.socket(family, kind, protocol)
        try:
            # The time left is shared between the addresses, so that a dead first one leaves time for the second.
            sock.settimeout(deadline.remaining() / (len(found) - tried))
            sock.connect(target)
        except OSError as error:
            sock.close()
            failure = error
        else:
            return sock
    raise failure


def _resolve(host: str, port: int, deadline: "_Deadline") -> list[tuple]:
    """`getaddrinfo` within the deadline: it has no timeout, so it runs in a thread that is abandoned when late."""
    answer: list[tuple] = []
    failure: list[OSError] = []

    def look_up() -> None:
        try:
            answer.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            failure.append(error if isinstance(error, OSError) else OSError(str(error)))

    thread = threading.Thread(target=look_up, daemon=True, name="qwenvl-resolve")
    thread.start()
    thread.join(deadline.remaining())
    if thread.is_alive():
        raise TimeoutError
    if failure:
        raise failure[0]
    return answer


def _read(shown: str, response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    """The whole body, at most `max_bytes`; a body that is cut short is an error."""
    encoding = response.getheader("Content-Encoding", "identity").strip().lower()
    if encoding != "identity":
        # A compressed body could expand a thousandfold, and images are compressed already.
        raise UrlError(shown, f"the body is encoded as {encoding!r}, which was not asked for", "download it yourself")
    declared = response.length
    too_long = UrlError(
        shown, f"it is longer than the {max_bytes} bytes allowed", "use a smaller image, or raise max_bytes"
    )
    if declared is not None and declared > max_bytes:
        raise too_long
    body = bytearray()
    while chunk := response.read(_CHUNK):
        body += chunk
        if len(body) > max_bytes:
            raise too_long
    if declared is not None and len(body) != declared:
        raise UrlError(
            shown, f"the connection closed after {len(body)} of {declared} bytes", "try again, or download it yourself"
        )
    return bytes(body)


class _Deadline:
    """The point in time at which one fetch must be complete."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, above zero. Raises TimeoutError if there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class _DeadlineSocket:
    """The part of a socket's interface that http.client uses, with the deadline set before every wait.

    A socket's own timeout starts again at each byte, so a server that sends one byte a second would never time out.
    """

    def __init__(self, sock: socket.socket, deadline: _Deadline):
        self._sock, self._deadline = sock, deadline

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(self._deadline.remaining())
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_DeadlineReader(self._sock, self._deadline))

    def close(self) -> None:
        """Do nothing: http.client closes before it reads the body; `_get` closes the socket afterwards."""


class _DeadlineReader(io.RawIOBase):
    def __init__(self, sock: socket.socket, deadline: _Deadline):
        self._sock, self._deadline = sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        self._sock.settimeout(self._deadline.remaining())
        return self._sock.recv_into(buffer)
