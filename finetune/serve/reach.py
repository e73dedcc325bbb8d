"""Who can reach a server, by the address that it listens on."""

import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from finetune.errors import UserError

THIS_MACHINE = ("localhost", "127.0.0.1", "[::1]")
"""What a server on a loopback address is called."""


def check_reach(host: str, cors: Sequence[str], with_keys: bool) -> None:
    """Check who could use the server.

    Args:
        host: that it listens on.
        cors: origins whose pages may use it in a browser.
        with_keys: whether it needs a key.

    Raises:
        UserError: other machines or any page of the web could, without a key; or an origin is none.
    """
    if not with_keys and not is_this_machine(host):
        raise UserError(
            f"--host {host} is reached from other machines: give --api-key-file FILE with a key in each line, or "
            "leave --host out to be reached from this machine alone"
        )
    for origin in cors:
        if origin == "*":
            if not with_keys:
                raise UserError("--cors '*' lets every page of the web use this server: give --api-key-file as well")
            continue
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}":
            raise UserError(f"--cors {origin}: an origin is like https://example.org or http://localhost:3000")


def is_this_machine(host: str) -> bool:
    """Whether a host to listen on is reached from this machine alone.

    Raises:
        UserError: there is no such host.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} is no address of this machine: {reason}") from None
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def own_names(host: str) -> tuple[str, ...]:
    """What requests may call a server that only this machine reaches."""
    return tuple(dict.fromkeys([*THIS_MACHINE, host.lower()]))


def url_of(bound: socket.socket) -> str:
    """The address of a socket; one that listens everywhere is shown as this machine."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
