"""HTTP requests that end: in time, with limited content, and only at addresses that are allowed.

- The address that is connected to is the one that was checked, for every request anew: a name is
  looked up once.
- A deadline holds for a request as a whole, whatever it waits for.
- No proxy of the environment is used: a proxy looks names up itself, so that addresses could not be
  checked.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.message import Message
from functools import cache
from typing import Any
from urllib.parse import quote, urlsplit

from src.utils import progress

# Some hosts refuse what does not call itself a browser.
AGENT = "Mozilla/5.0 (compatible; Percept)"

# Addresses that Python (of some version) calls global and that lead to others: 6to4's relays and
# addresses, Teredo and other IETF uses, documentation, shared carrier addresses.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "100.64.0.0/10",
        "192.0.0.0/24",
        "192.88.99.0/24",
        "2001::/23",
        "2001:db8::/32",
        "2002::/16",
        "3fff::/20",
    )
)

# All of IPv6 that is given out for the public. What embeds IPv4 addresses (mapped, NAT64) is
# outside.
_UNICAST = ipaddress.ip_network("2000::/3")


class RequestFailed(Exception):
    """Why a request failed, as words that follow its url.

    Args:
        reason: the words.
        reached: whether the other side did answer.
    """

    def __init__(self, reason: str, reached: bool = True):
        super().__init__(reason)
        self.reached = reached


@dataclass(frozen=True)
class RequestLimits:
    """What a request may take.

    Attributes:
        timeout: seconds in all.
        max_bytes: of the content.
        allow_private: whether addresses that are not public may be asked.
        content_type: how the type of the content must begin.
    """

    timeout: float
    max_bytes: float
    allow_private: bool
    content_type: str = ""


@dataclass(frozen=True)
class Response:
    """An answer; of `request`, the content is read only if the status is 200."""

    status: int
    headers: Message
    content: bytes


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet.

    It must not be private, loopback, link-local, multicast or reserved, nor lead to such an address
    in a roundabout way.
    """
    ip = ipaddress.ip_address(address.split("%")[0])
    if ip.version == 6 and ip not in _UNICAST:
        return False
    if ip.is_multicast or ip.is_reserved or any(ip in network for network in _NOT_PUBLIC):
        return False
    return ip.is_global


@cache
def tls_context() -> ssl.SSLContext:
    """Return the settings of TLS that check certificates."""
    return ssl.create_default_context()


def request(
    url: str, deadline: float, limits: RequestLimits, body: bytes | None = None
) -> Response:
    """Send a GET, or a POST of JSON; redirects are not followed.

    Args:
        url: http or https.
        deadline: of `time.monotonic()`.
        limits: what the request may take.
        body: JSON to post; None: GET.

    Raises:
        RequestFailed: with the reason, whatever goes wrong.
    """
    headers = {"Accept": "image/*"}
    if body:
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
    message = Outgoing("POST" if body else "GET", body, headers, {200})
    return exchange(url, deadline, limits, message)


@dataclass(frozen=True)
class Outgoing:
    """What a request sends.

    Attributes:
        method: e.g. "GET".
        body: content, None for none.
        headers: without those of the connection.
        statuses: of answers whose content is read.
    """

    method: str
    body: bytes | None
    headers: dict[str, str]
    statuses: Container[int] = range(100, 600)


def exchange(url: str, deadline: float, limits: RequestLimits, message: Outgoing) -> Response:
    """Send any request; see `request`."""
    try:
        response = _send(url, deadline, limits, message)
        # a connection that was cut can look like one that came to its end
        if time.monotonic() < deadline:
            return response
    except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:
        if time.monotonic() < deadline and not isinstance(error, TimeoutError):
            raise RequestFailed(_describe_error(error), reached=False) from error
    except RequestFailed:
        if time.monotonic() < deadline:
            raise
    raise RequestFailed(f"took longer than {limits.timeout:g} s", reached=False)


def _send(url: str, deadline: float, limits: RequestLimits, message: Outgoing) -> Response:
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RequestFailed("is no http or https address")
    secure, host = parts.scheme == "https", parts.hostname.encode("idna").decode()
    port = parts.port or (443 if secure else 80)
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    if parts.query:
        target += f"?{quote(parts.query, safe='/%:@!$&()*+,;=~?')}"
    headers = {"User-Agent": AGENT} | message.headers
    connected = open_connection(host, port, deadline, limits.allow_private)
    connection: http.client.HTTPConnection
    if secure:
        connection = http.client.HTTPSConnection(host, port, context=tls_context())
    else:
        connection = http.client.HTTPConnection(host, port)
    try:
        with _cut_at(deadline, connected):
            if secure:
                connected = tls_context().wrap_socket(connected, server_hostname=host)
            connection.sock = connected
            connection.request(message.method, target, message.body, headers)
            with connection.getresponse() as response:
                is_read = response.status in message.statuses
                content = _read_content(response, limits) if is_read else b""
                return Response(response.status, response.headers, content)
    finally:
        connection.close()
        connected.close()


def open_connection(host: str, port: int, deadline: float, allow_private: bool) -> socket.socket:
    """Connect to an address of the host.

    The name is looked up once, so that the address that was checked is the one that is connected
    to.
    """
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not allow_private:
        for *_, address in addresses:
            if not is_public(str(address[0])):
                raise RequestFailed(f"is at {address[0]}, which is not a public address")
    last_error: OSError = TimeoutError()
    for family, socket_type, protocol, _, address in addresses:
        connected = socket.socket(family, socket_type, protocol)
        try:
            connected.settimeout(max(deadline - time.monotonic(), 1e-3))
            connected.connect(address)
            return connected
        except OSError as error:
            connected.close()
            last_error = error
    raise last_error


@contextmanager
def _cut_at(deadline: float, connected: socket.socket) -> Iterator[None]:
    """Cut the connection at the deadline, whatever is waited for.

    A socket's own time-out would begin anew with every byte.
    """
    duplicate = connected.dup()  # TLS takes the socket itself away

    def cut() -> None:
        with suppress(OSError):
            duplicate.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(deadline - time.monotonic(), 0), cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        duplicate.close()


def _read_content(response: http.client.HTTPResponse, limits: RequestLimits) -> bytes:
    """Read the content of an answer, as far as the limits allow."""
    content_type = response.headers.get_content_type()
    if not content_type.startswith(limits.content_type):
        raise RequestFailed(f"sent {content_type} and no image")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise RequestFailed("sent a compressed answer, which was not asked for")
    blocks, size = [], 0
    while (response.length or 0) + size <= limits.max_bytes:
        block = response.read(65_536)
        if not block:
            break
        blocks.append(block)
        size += len(block)
    if (response.length or 0) + size > limits.max_bytes:
        raise RequestFailed(f"sent more than {limits.max_bytes / 1e6:g} MB")
    if response.length:
        raise RequestFailed("broke off in the middle")
    return b"".join(blocks)


def _describe_error(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "refused the connection"
    if isinstance(error, socket.gaierror):
        return "could not be found, as its name is unknown"
    if isinstance(error, ssl.SSLCertVerificationError):
        return "has no valid certificate"
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return "is no http or https address"
    return f"broke off the connection ({type(error).__name__})"


def run_in_parallel(
    work: Callable[[Any], Any], items: Sequence[Any], workers: int, desc: str
) -> list[Any]:
    """Return work(item) of every item, in their order.

    When it stops early (an error, Ctrl-C), items that have not begun are left out.
    """
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        return list(progress(pool.map(work, items), desc, total=len(items)))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
