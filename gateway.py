#!/usr/bin/env python3
"""An OpenAI-compatible inference gateway in one file that needs nothing but Python 3.13 or later.

    python gateway.py                                       echoes: an endpoint to try clients on
    BACKEND_URL=http://127.0.0.1:8000 python gateway.py     forwards to vLLM, llama.cpp, Ollama ...
    python gateway.py --help                                every setting in a sentence

The path of a request; read the sections in order, or from here:

    main -> Server -> a thread for each connection -> Handler.handle_one_request
        read_head -> parse_request           one strict parser, for both directions
        dispatch                             /healthz, /readyz and /metrics are answered here
            echo -> Echo
            forward -> Admission.enter       a place, or a wait for one
                Backends.open                for each backend that may answer: urllib's opener
                    Pool.default_open        take or dial a link, send, read the response's head
                relay -> Streams.lend        pieces as they come; a cut one never ends as a whole
        except APIError -> fail              OpenAI's error JSON, an error event, or a cut
        except ClientGone                    the link is closed, which makes the backend stop
        finally -> Ledger.enter              one line in the log, all metrics

What it will not do: change a body, translate between APIs, store anything, or speak HTTP/2.
"""

import argparse
import errno
import gc
import http.client
import ipaddress
import itertools
import json
import mmap
import os
import re
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import urllib.parse
import urllib.request
import uuid
from _thread import start_new_thread
from base64 import b64encode
from bisect import bisect_left
from collections import defaultdict, namedtuple
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import formatdate, parsedate_to_datetime
from functools import lru_cache
from hmac import compare_digest
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty, SimpleQueue
from socketserver import TCPServer

try:
    import ssl
except ImportError:  # of a Python that was built without OpenSSL: make_tls refuses https
    ssl = argparse.Namespace(SSLSocket=())  # of which nothing is an instance

__version__ = "0.2.0"

if sys.version_info < (3, 13):
    sys.exit(f"gateway.py needs Python 3.13 or later; this is {sys.version.split()[0]}")

# == 1. Settings ===================================================================================
# Each knob is one row of KNOBS: its flag (--max-body-bytes), its variable (MAX_BODY_BYTES), its
# line of --help and its row of README's table are made from that. A flag wins over the environment,
# that over the default; an empty variable counts as unset. No error repeats what may be a secret.

# "abc==" has no name; "name=" would be a key that is easily guessed, where a variable was empty.
KEY = re.compile(r"(?![A-Za-z0-9_.-]+=$)(?:([A-Za-z0-9_.-]{1,64})=(?==*[^=]))?([!-~]+)")
URL = re.compile(r"(https?://(?:[\w.-]*\w\.?|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?)"
                 r"(/[!$-;=A-\[\]-~]*)?", re.ASCII | re.IGNORECASE)
refused = argparse.ArgumentTypeError  # of a parser: read_settings puts the name before it


def number(kind, low, high):
    """Return a parser of numbers, int or float, from `low` to `high`."""
    def parse(text):
        form = "[0-9]{1,15}" if kind is int else r"[0-9]{1,15}(\.[0-9]{1,6})?"
        if not re.fullmatch(form, text) or not low <= kind(text) <= high:
            raise refused(f"{text[:40]!r} is no {'whole ' if kind is int else ''}number"
                          f" from {low} to {high}")
        return kind(text)
    return parse


def like(pattern, what, convert=str):
    """Return a parser of texts that match a pattern."""
    def parse(text):
        if not re.fullmatch(pattern, text):
            raise refused(f"it must be {what}")
        return convert(text)
    return parse


def listed(parse):
    """Return a parser of what `parse` takes, separated by commas, to a tuple without repeats."""
    return lambda text: tuple({parse(item.strip()): 0 for item in text.split(",") if text})


def backend_url(text):
    """Parse a backend's address to its base, to which a client's path, /v1/..., is appended."""
    match = URL.fullmatch(text)
    with suppress(ValueError):  # of a port above 65,535, or an address in brackets that is none
        path = match and (match[2] or "").rstrip("/")
        if match and urllib.parse.urlsplit(text).port != 0 and not path.endswith("/completions"):
            return match[1] + path.removesuffix("/v1").rstrip("/")
    raise refused("it must be like http://127.0.0.1:8000 or https://host/v1, without user,"
                  " password, /chat/completions, query or fragment; separate several by commas")


def named_keys(text, between=","):
    """Parse keys with `between` between them to (name, key) pairs; raises if a text has none."""
    matches = [KEY.fullmatch(item.strip()) for item in text.split(between) if item.strip()]
    if text and not (matches and all(matches)):
        raise refused("keys are of visible ASCII characters: KEY or NAME=KEY, at least one")
    return [(m[1] or f"key{i}", m[2].encode()) for i, m in enumerate(matches, 1)]


switch = like("[01]", "1 or 0", lambda text: text == "1")
secret = like(r"\s*[!-~]+\s*|", "a key of visible ASCII characters", str.strip)
origin = like(r"\*|[a-z][a-z0-9+.-]*://[a-z0-9_.:\[\]-]+",
              "like https://chat.example.com, lower-case and without a path, or *")
workers = like("auto|[1-9][0-9]?", "from 1 to 99, or auto", lambda text: (
    os.process_cpu_count() or 1 if text == "auto" else int(text)))
seconds, from_0 = number(float, 0.001, 86_400), number(float, 0, 86_400)
KNOBS = (  # name, parser, default, what it is
    ("host", like(r"[\w.%:-]+", "an address or a name, such as 127.0.0.1 or ::1"), "127.0.0.1",
     "address to listen on; 0.0.0.0 or :: for all interfaces"),
    ("port", number(int, 0, 65_535), "8080", "port to listen on; 0 takes a free one"),
    ("backend_url", listed(backend_url), "",
     "servers to forward to, separated by commas; without one the gateway echoes"),
    ("api_keys", named_keys, "",
     "keys that clients must present, separated by commas; of NAME=KEY, the name is logged"),
    ("api_keys_file", str, "", "file with such keys, one a line; read again on SIGHUP"),
    ("backend_api_key", secret, "", "key sent to the backends in place of the client's"),
    ("backend_api_key_file", str, "", "file with that key; read again on SIGHUP"),
    ("allow_open", switch, "0",
     "1 lends the backends' key to everyone on the network: beyond loopback, without API_KEYS"),
    ("max_body_bytes", number(int, 0, 1 << 40), str(64 << 20),
     "largest request body; a larger one is refused with 413"),
    ("max_connections", number(int, 1, 1_000_000), "2000",
     "client connections of a worker at once, a thread each; a further one gets 503"),
    ("max_concurrent_requests", number(int, 0, 1_000_000), "0",
     "requests of a worker at the backends at once; a further one waits; 0 for no limit"),
    ("queue_timeout", from_0, "0", "seconds a request may wait for its turn, before it gets 429"),
    ("client_timeout", seconds, "60",
     "seconds a client may need for a head, and be silent in a body, a reply, between requests"),
    ("connect_timeout", seconds, "5", "seconds to connect to a backend, and for a probe's answer"),
    ("backend_timeout", seconds, "600",
     "seconds a backend may be silent, before its first byte and between bytes"),
    ("probe_interval", from_0, "10", "seconds from one look at /v1/models to the next; 0: none"),
    ("drain_delay", from_0, "0", "seconds after SIGTERM in which /readyz says 503 and all goes on"),
    ("shutdown_timeout", from_0, "30", "seconds that requests in flight have left after that"),
    ("workers", workers, "1", "processes that serve; auto is one for each processor"),
    ("cpu_affinity", switch, "1",
     "1 keeps each worker on one processor; take 0 if other programs are bound to that"),
    ("tls_cert_file", str, "", "certificate chain in PEM, to serve https; read again on SIGHUP"),
    ("tls_key_file", str, "", "private key of that certificate"),
    ("cors_origins", listed(origin), "",
     "origins of web pages that may call, separated by commas; * for any"),
    ("log_format", like("text|json", "text or json"), "text", "form of the log: text or json"))
EXAMPLE = ("curl http://127.0.0.1:8080/v1/chat/completions"
           """ -d '{"messages":[{"role":"user","content":"Hello, world!"}]}'""")


def read_settings(argv, environ):
    """Return a namespace of the knobs, `credentials` (read_credentials), `proxies` (proxy_for) and
    `listen_fd`, of a socket that systemd passed on (sd_listen_fds), or None; exits with 2 if bad.
    """
    parser = argparse.ArgumentParser(
        prog="gateway.py", usage=argparse.SUPPRESS, allow_abbrev=False, exit_on_error=False,
        description=(__doc__ or "").partition("\n\nThe path")[0], epilog=f"Try it:\n  {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"gateway.py {__version__}")
    for name, parse, default, text in KNOBS:
        variable, flag = name.upper(), "--" + name.replace("_", "-")
        parser.add_argument(
            flag, default=environ.get(variable) or default, type=parse, metavar=variable,
            help=f"{text} (environment: {variable}; default: {default or 'none'})")
    try:
        settings, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        flag = error.argument_name.rpartition("/")[2]  # -h/--help
        parser.error(f"{flag[2:].replace('-', '_').upper()} ({flag}): {error.message}")
    if unknown:  # all but the name of a flag may be a secret
        name = re.match("--[^=]*", unknown[0])
        name = ascii(name[0]) if name else "without --"
        parser.error(f"unknown argument {name}; all are flags like --port=8080, see --help")
    settings.listen_fd = 3 if environ.get("LISTEN_PID") == str(os.getpid()) else None
    try:
        settings.credentials = keys, backend_key, _ = read_credentials(settings)
        settings.proxies = [proxy_for(url) for url in settings.backend_url]
    except ValueError as error:
        parser.error(error)
    if settings.listen_fd and environ.get("LISTEN_FDS") != "1":
        parser.error("LISTEN_FDS must be 1: the gateway serves on one socket")
    if settings.workers > 1 and not hasattr(os, "fork"):
        parser.error("WORKERS above 1 needs fork, which this system has not")
    if settings.backend_api_key and settings.backend_api_key_file:
        parser.error("BACKEND_API_KEY and BACKEND_API_KEY_FILE are both set; keep one")
    is_open = settings.listen_fd or not is_loopback(settings.host)
    if backend_key and is_open and not keys and not settings.allow_open:
        parser.error("everyone who reaches HOST would use your BACKEND_API_KEY; set API_KEYS, or"
                     " ALLOW_OPEN=1 if that is meant")
    return settings


def read_credentials(settings):
    """Return the clients' (name, key) pairs, the backends' key, make_tls's; raises ValueError."""
    def read(name, parse, otherwise):
        try:
            if not getattr(settings, name):
                return otherwise
            with open(getattr(settings, name), encoding="ascii", errors="replace") as file:
                return parse(file.read() or "\n")
        except (OSError, argparse.ArgumentTypeError) as error:
            why = getattr(error, "strerror", None) or error  # without the path: it may be a key
            raise ValueError(f"{name.upper()}: {why}") from None
    return (settings.api_keys + read("api_keys_file", lambda text: named_keys(
        re.sub("(?m)^[ \t]*#.*", "", text) + "\n", "\n"), []),
            read("backend_api_key_file", secret, settings.backend_api_key), make_tls(settings))


def make_tls(settings):
    """Return the SSLContext to serve with, or None for plain HTTP; raises ValueError."""
    ours = settings.tls_cert_file or settings.tls_key_file
    if not hasattr(ssl, "SSLContext") and (
            ours or any(url.lower().startswith("https") for url in settings.backend_url)):
        raise ValueError("https needs a Python that was built with OpenSSL, and this one was not")
    if not ours:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    # What tells whether a request is whole is its length; an end without TLS's own would be
    # answered with an alert, and that end is what drain() makes idle connections see.
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    try:
        context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file, password="")
    except (OSError, ValueError) as error:
        raise ValueError("TLS_CERT_FILE and TLS_KEY_FILE must both be set, to a certificate in"
                         f" PEM and its key, without a passphrase: {error}") from None
    return context


def is_loopback(host):
    """Tell whether an address is reached from this machine alone; of names, localhost is."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".").rpartition(".")[2] == "localhost"


def proxy_for(url):
    """Return (address, fields to log in) of the environment's proxy, or None; raises ValueError."""
    backend = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(backend.scheme)
    if is_loopback(backend.hostname) or not proxy or urllib.request.proxy_bypass(backend.netloc):
        return None
    try:
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        login, _, address = parts.netloc.rpartition("@")
        http.client.HTTPConnection(address)  # connects not yet, but looks at it
        if not parts.hostname or parts.port == 0:  # raises for one above 65,535
            raise ValueError
    except (ValueError, http.client.InvalidURL):  # whose text may be a part of a password
        raise ValueError(f"{backend.scheme.upper()}_PROXY is no proxy's address") from None
    words = b64encode(urllib.parse.unquote_to_bytes(login)).decode()
    return address, {"Proxy-Authorization": f"Basic {words}"} if login else {}


# == 2. Errors =====================================================================================
# An APIError is a whole answer: status, OpenAI's type and code, and a sentence that says what to do
# next. Whoever finds the fault raises it in one line, and Handler.fail alone sends it. Inside this
# file only APIError and ClientGone travel: exceptions of libraries are translated where they arise.

MESSAGES = "/v1/messages"  # Anthropic's API, which vLLM, llama.cpp and others have too


class APIError(Exception):
    """A refusal of a request, or a failure; `fields` are further header lines of the reply."""

    def __init__(self, status, code, message, param=None, fields=b""):
        self.status, self.code, self.message, self.param = status, code, message, param
        self.fields = fields or (b"Retry-After: 1\r\n" if status == 503 else b"")

    def body(self, path=""):
        """Return the error as JSON bytes, for OpenAI's SDKs, or for Anthropic's on their path."""
        ours = self.status >= 500 and self.status not in (501, 505)
        kind = "server_error" if ours else (
            "rate_limit_error" if self.status == 429 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps(({"type": "error"} if path.startswith(MESSAGES) else {})
                          | {"error": error}).encode()


class Malformed(APIError):
    """What arrived is not HTTP, or not the HTTP that is spoken here."""

    def __init__(self, message, status=400):
        super().__init__(status, HTTPStatus(status).name.lower(), message)


class BackendError(APIError):
    """A backend failed, and is then left alone; `what` it did, and `advice` on what to do now."""

    status, code, advice = 502, "backend_error", "its own log may say why"

    def __init__(self, what):
        super().__init__(self.status, self.code, f"the backend {what}; {self.advice}")


class Broken(BackendError):
    """It closed the connection, or broke HTTP, before its response was whole."""


class Unreachable(BackendError):
    """No connection to it was made: it has not seen the request."""

    code, advice = "backend_unreachable", "is it running? BACKEND_URL right?"


class BackendTimeout(BackendError):
    """It was silent for too long; it may be at work still."""

    status, code, advice = 504, "backend_timeout", "try again later, or raise BACKEND_TIMEOUT"


class ClientGone(Exception):
    """The client closed its connection, or takes nothing more: nobody is left to answer."""


# == 3. HTTP rules =================================================================================
# Pure functions of bytes; sections are of RFC 9112 where none other is named. A head is taken only
# if each line of it matches the grammar: what the next server could read differently is refused.
# Repeated fields are joined with a comma (RFC 9110, 5.3), which spoils those that must be there
# once. What is passed on keeps its lines byte for byte.

MAX_HEAD_BYTES = 65_536  # nginx takes 32 KiB, Node 16; keys, cookies and tracing need some
MAX_LINE_BYTES = 16_384  # a head's first; 8,000 is what RFC 9112 3 asks for at least
MAX_FIELDS = 100         # as Apache and http.client
MAX_CHUNK_LINE = 4_096   # a chunk's size with its extensions, or the trailers: nobody uses them
MAX_REMEMBERED = 4_096   # bytes of a head that is remembered: strangers could fill the memory
USAGE_BYTES = 4_096      # of an answer's beginning, and of its end: its usage is in one of them
CHUNKED, UNTIL_CLOSE = -1, 1 << 62  # lengths of a body that are not known beforehand

# A writing request always tells its length; what another one has as its body, some servers leave
# unread, and take it for the next request (11.2).
READING, WRITING = ("GET", "HEAD"), ("POST", "PUT", "PATCH")

# Fields of one connection (RFC 9110, 7.6.1), and of a proxy (11.7).
HOP_BY_HOP = frozenset((
    b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding",
    b"upgrade", b"proxy-authenticate", b"proxy-authentication-info", b"proxy-authorization"))
NOT_FORWARDED = HOP_BY_HOP | {
    b"host", b"content-length", b"expect", b"x-request-id", b"x-forwarded-for",
    b"x-forwarded-proto", b"x-forwarded-host",
    b"script-name", b"path-info"}  # WSGI's: gunicorn takes them for the path
NOT_RETURNED = HOP_BY_HOP | {b"content-length", b"x-request-id", b"x-backend-request-id"}
OF_KEYS = {b"authorization", b"x-api-key", b"api-key"}  # Anthropic's and Azure's SDKs send these
CORS_FIELDS = {b"access-control-allow-origin", b"access-control-allow-credentials",
               b"access-control-expose-headers"}

TOKEN, VALUE = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", rb"[^\x00-\x08\n-\x1f\x7f]*"
FIELD = re.compile(rb"(%b):(%b)" % (TOKEN, VALUE))
LENGTH = re.compile(rb"\r\nContent-Length:[ \t]*([0-9]{1,15})[ \t]*(?=\r\n|\Z)", re.I)
REQUEST_LINE = re.compile(rb"(%b) ([!\"$-~]+) HTTP/([0-9])\.(?P<minor>[0-9])" % TOKEN)
STATUS_LINE = re.compile(rb"HTTP/1\.(?P<minor>[01]) ([1-9][0-9][0-9])(?: (%b))?" % VALUE)
# The size line of a chunk, with the CR LF that ends the chunk before it; and the trailers.
QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*+"'
CHUNK = re.compile(rb"\r\n([0-9A-Fa-f]{1,15})(?:[ \t]*;[ \t]*%b(?:[ \t]*=[ \t]*(?:%b|%b))?)*+\r\n"
                   % (TOKEN, TOKEN, QUOTED))
TRAILERS = re.compile(rb"(?:%b:%b\r\n)*+\r\n" % (TOKEN, VALUE))
NEVER_IN_A_HEAD = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n|\Z)|(?<!\r)\n")
HOST = re.compile(rb"(?:(?:[\w.~-]++|%[0-9A-F]{2})+|\[[0-9A-F.]*:[0-9A-F.:]+\])(?::[0-9]{0,5})?",
                  re.I)
ABSOLUTE = re.compile(rb"https?://([^/?#]*)/?(.*)", re.I)
DOTS = re.compile(rb"[/\\]\.\.?(?:[/\\;]|\Z)")  # Tomcat drops what follows a semicolon
LAST_EVENT = re.compile(rb"[\r\n]data: ?\[DONE\](?: *|.*[\r\n])\Z", re.S)  # or lines behind it
EVENT_ENDS = b"\n\n", b"\n\r\n", b"\r\r"
REQUEST_ID = re.compile(rb"[!-~]{1,128}")
SALVAGE = re.compile(rb"\r\n(X-Request-ID|Request-ID|Origin):[ \t]*([!-~]{1,128})[ \t]*"
                     rb"(?=\r)", re.I)  # fields of use in a head that is not understood
TRACE = re.compile(rb"(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}"
                   rb"-[0-9a-f]{2}(?:-.*)?")  # W3C Trace Context, 3.2.2
FORM_MODEL = re.compile(rb'[; ]name="?model"?\r\n(?:[^\r\n]{1,256}\r\n){0,8}\r\n'
                        rb"([^\r\n]{1,256})\r\n")  # bounded: each of its starts is hostile
USAGE = re.compile(rb'"usage"[ \t\r\n]*:[ \t\r\n]*\{')
TOKENS = re.compile(rb'"(prompt|input|completion|output)_tokens"[ \t\r\n]*:[ \t\r\n]*'
                    rb"([0-9]{1,15})(?=[ \t\r\n,}])")

Request = namedtuple("Request", "method path target minor authority persistent index fields")
Head = namedtuple("Head", "status reason persistent index fields")  # of a response


def remembered(parse):
    """Let `parse` remember the last 256 short texts: who sends to us sends the same again."""
    # At 16 connections a request takes 57 us of CPU so, and 83 without. A client's key is in its
    # head: it may stay in memory until 256 others have come.
    cached = lru_cache(256)(parse)
    return lambda data, *more: (cached if len(data) < MAX_REMEMBERED else parse)(data, *more)


def find_head(data, scanned=0):
    """Return where the head in `data`, of which `scanned` bytes are known, ends; or -1."""
    start = max(0, scanned - 3)
    end = data.find(b"\r\n\r\n", start)
    if len(data) > MAX_LINE_BYTES and data.find(b"\r\n", 0, MAX_LINE_BYTES + 2) < 0:
        raise Malformed(f"a head's first line may have {MAX_LINE_BYTES} bytes; send less", 414)
    if (len(data) if end < 0 else end + 2) > MAX_HEAD_BYTES:
        raise Malformed(f"a head may have {MAX_HEAD_BYTES} bytes; send less", 431)
    # Not only once it is whole: who ends lines with LF would wait for an answer.
    if end < 0 and NEVER_IN_A_HEAD.search(data, start):
        raise Malformed("the head holds a control character, or a line that ends without CR LF")
    return end


@remembered
def parse_field(line):
    """Return the lower-case name and the value of a header field (5); raises Malformed."""
    match = FIELD.fullmatch(line)
    if not match:
        raise Malformed("a header field is not of the form 'name: value' (RFC 9112, section 5)")
    return match[1].lower(), match[2].strip(b" \t")


def parse_head(head, drop, first_line, form):
    """Return the match of a head's first line, its values by lower-case name, whether its sender
    keeps the connection open (9.3), and its lines, as bytes, but for those of fields that are in
    `drop` or that Connection names; raises Malformed.
    """
    start, *lines = head.split(b"\r\n")
    if len(lines) > MAX_FIELDS:
        raise Malformed(f"a head may have {MAX_FIELDS} fields; send less", 431)
    match = first_line.fullmatch(start)
    if not match:
        raise Malformed(f"the first line is not of the form '{form}'")
    fields = [parse_field(line) for line in lines]
    index = dict(fields)
    if len(index) < len(fields):
        index = {name: b", ".join(value for same, value in fields if same == name)
                 for name in index}
    options = {option.strip(b" \t") for option in index[b"connection"].lower().split(b",")} if (
        b"connection" in index) else ()
    persistent = b"close" not in options and (match["minor"] != b"0" or b"keep-alive" in options)
    return match, index, persistent, b"".join([  # to CGI and WSGI, _ and - are the same
        line + b"\r\n" for line, (name, _) in zip(lines, fields)
        if name.replace(b"_", b"-") not in drop and name not in options])


def parse_but_length(parse, head, *more):
    """Return what `parse` makes of a head, but with a Content-Length of 1, and the one it tells."""
    # The heads of one client, or backend, often differ in their lengths alone. With 1 for each of
    # these they are all the same to `parse`, which remembers them: requests of OpenAI's SDK take 61
    # us of CPU in place of 89, and where their responses differ so too, 68 in place of 79.
    told = LENGTH.search(head)
    if not told:
        return parse(head, *more)
    known, _ = parse(head[:told.start(1)] + b"1" + head[told.end(1):], *more)
    return known, int(told[1])


@remembered
def parse_request(head, drop):
    """Return the Request (3) that a head is, and its body's length or CHUNKED; raises Malformed."""
    match, index, persistent, fields = parse_head(head, drop, REQUEST_LINE, "METHOD /path HTTP/1.1")
    if match[3] != b"1":
        raise Malformed("set the client to HTTP/1.1", 505)
    method, target, minor = match[1].decode(), match[2], min(int(match[4]), 1)
    authority = index.get(b"host", b"")
    if not HOST.fullmatch(authority) and (minor or b"host" in index):
        raise Malformed("a request needs exactly one valid Host field")
    if target[:1] != b"/":
        absolute = ABSOLUTE.fullmatch(target)
        if absolute and HOST.fullmatch(absolute[1]):  # overrides Host (3.2.2)
            authority, target = absolute[1], b"/" + absolute[2]
        elif method != "OPTIONS" or target != b"*":
            raise Malformed("the request target is neither a path nor an http:// address")
    path = target.partition(b"?")[0]  # dots could lead a backend to a path that is not below /v1
    if DOTS.search(urllib.parse.unquote_to_bytes(path)):
        raise Malformed("the path holds '.' or '..'; send the path that it leads to")
    return Request(method, path.decode(), target.decode(), minor, authority, persistent, index,
                   fields), body_length(index, minor, 0)


def body_length(index, minor, otherwise):
    """Return the length of a body (6.3), or CHUNKED, or `otherwise`; raises Malformed: 400, 501."""
    length, coding = index.get(b"content-length"), index.get(b"transfer-encoding")
    if length is not None and not length.isdigit():
        raise Malformed("Content-Length must be there once, as digits")
    if coding is None:  # 16 digits are too many for every limit, and int() takes no 4,301
        return otherwise if length is None else int(length.lstrip(b"0")[:16] or 0)
    if length is not None or not minor:
        raise Malformed("Transfer-Encoding beside Content-Length, or in HTTP/1.0, is ambiguous")
    if b"chunked" in [token.strip(b" \t") for token in coding.lower().split(b",")[:-1]]:
        raise Malformed("Transfer-Encoding must name 'chunked' once, and last")
    if coding.lower() != b"chunked":
        raise Malformed("the one transfer coding here is 'chunked'", 501)
    return CHUNKED


@remembered
def parse_response(head, drop, to_head):
    """Return the Head (4) that a response's is, and its body's length (6.3); raises Malformed."""
    match, index, persistent, fields = parse_head(head, drop, STATUS_LINE, "HTTP/1.1 200 OK")
    status = int(match[2])
    if status == 101:
        raise Malformed("it switches protocols, which nobody asked for")
    length = 0 if to_head or status in (204, 304) else (
        body_length(index, int(match["minor"]), UNTIL_CLOSE))
    if UNTIL_CLOSE > length >= 10 ** 15:
        raise Malformed("its Content-Length is beyond belief")
    return Head(status, match[3] or b"", persistent, index, fields), length


def accepted_request_id(index, ids):
    """Return the client's id for its request if that is 1 to 128 of 0x21-0x7E, else the next."""
    for name in (b"x-request-id", b"request-id"):
        if name in index and REQUEST_ID.fullmatch(index[name]):
            return index[name].decode()
    return next(ids)


class Body:
    """Decodes a body that is fed in any pieces; when it is `done`, `rest` came behind it.

    Of chunks (7.1), extensions and trailers are checked and dropped; `left` is then what is left
    of a chunk, 0 where the next one's size comes, -1 where the trailers do. If they are
    `malformed`, what came before that is good.
    """

    malformed = False

    def __init__(self, length):
        self._chunked, self.left = length == CHUNKED, max(length, 0)
        self.done, self.rest = length == 0, b"\r\n" if self._chunked else b""  # as behind a chunk

    def feed(self, data):
        """Return the bytes of the body that `data` completes."""
        if not self._chunked:
            piece, self.rest = data[:self.left], data[self.left:]
            self.left -= len(piece)
            self.done = not self.left
            return piece
        data, pieces, at = self.rest + data, [], 0
        if not self.left and (line := CHUNK.match(data)):  # most come alone, whole: saves 3%
            start, end = line.end(), len(data) - 2
            if end - start == int(line[1], 16) > 0 and data.endswith(b"\r\n"):
                self.rest = b"\r\n"
                return data[start:end]
        while not self.done:
            if self.left > 0:
                pieces.append(data[at:at + self.left])
                at, self.left = at + len(pieces[-1]), self.left - len(pieces[-1])
            if self.left == 0 and (line := CHUNK.match(data, at)):
                at, self.left = line.end(), int(line[1], 16) or -1  # -1: trailers come
            elif self.left < 0 and (end := TRAILERS.match(data, at)):
                at, self.done = end.end(), True
            else:
                break
        self.rest = data[at:]
        ended = b"\r\n\r\n" in self.rest if self.left < 0 else b"\r\n" in self.rest[2:]
        self.malformed = not self.done and (
            ended or len(self.rest) > MAX_CHUNK_LINE or bool(NEVER_IN_A_HEAD.search(self.rest))
            or self.left == 0 and self.rest[:1] not in b"\r")
        return b"".join(pieces)


def events_end(data):
    """Return the offset behind the last whole event in `data`, or 0 (WHATWG HTML, 9.2.5)."""
    if data.endswith(b"\n\n"):
        return len(data)
    return max((data.rfind(end) + len(end) for end in EVENT_ENDS if end in data), default=0)


def named_event(names):
    """Return the pattern of events of these names: in their line, or the data's first or last."""
    return re.compile(rb'(?:\A|[\r\n])event: ?(?:%b)[\r\n]|data: ?\{"type" ?: ?"(?:%b)"'
                      rb'|"type" ?: ?"(?:%b)"\}[\r\n]' % (names, names, names))


def refuse_constant(name):
    """Refuse NaN and the infinities, which Python's parser takes and RFC 8259 does not."""
    raise ValueError(f"{name} is not JSON")


JSON = json.JSONDecoder(parse_constant=refuse_constant)


def parse_json(body):
    """Parse a body to a dict; raises 400 invalid_json for all that is no JSON object."""
    try:  # json.loads(bytes) would guess UTF-16, and take encoded surrogates
        value = JSON.decode(body.decode())
    except (ValueError, RecursionError) as error:  # numbers of over 4,300 digits; deep nesting
        raise APIError(400, "invalid_json", f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise APIError(400, "invalid_json", "the body must be a JSON object")
    return value


def token_usage(answer):
    """Return the tokens that an answer tells: {"input": n, "output": n}, or less."""
    # They stand in its last usage; what does not, in its first one (message_start of /v1/messages).
    # In a JSON string the quotes would be escaped: a model cannot write a usage into its text.
    if len(answer) > 2 * USAGE_BYTES:
        answer = answer[:USAGE_BYTES] + answer[-USAGE_BYTES:]
    told, usages = {}, [usage.start() for usage in USAGE.finditer(answer)]
    for at in usages[:1] + usages[1:][-1:]:
        for name, count in reversed(TOKENS.findall(answer, at, at + USAGE_BYTES)):
            told["input" if name in (b"prompt", b"input") else "output"] = int(count)
    return told  # the first counts of each; what is behind the usage does not count


def cors_fields(origin, allowed):
    """Return the lines that let a page of this origin read the reply (Fetch standard, 3.2)."""
    if not origin or "*" not in allowed and origin.decode("latin-1") not in allowed:
        return b"Vary: Origin\r\n" if allowed else b""  # caches must tell origins apart
    return (b"Vary: Origin\r\nAccess-Control-Allow-Origin: %b\r\nAccess-Control-Expose-Headers:"
            b" x-request-id, x-backend-request-id, retry-after, retry-after-ms\r\n" % origin)


# == 4. Observability ==============================================================================
# Each request has one Record, filled in where things become known; when the request has ended, it
# becomes one line of the log, and is counted. Prompts, keys and query strings never come into it.
# What a client chose (method, path, id, model) is ASCII without white space, or quoted: it cannot
# break a line. No label of a metric is a client's choice: what is unknown is counted as "other".

# The bounds of OpenTelemetry, up to 81.92 and 10, and further ones up to BACKEND_TIMEOUT's default.
LATENCY = (*(.01 * 2 ** power for power in range(16)), 600)
FIRST_TOKEN = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 30, 60,
               120, 300, 600)
OVERHEAD = (.00005, .0001, .0002, .0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1)
REPEATABLE = frozenset("/v1/" + name for name in (  # POSTs that change nothing on the backend
    "chat/completions", "completions", "messages", "embeddings", "pooling", "moderations", "rerank",
    "score", "classify", "tokenize", "detokenize", "messages/count_tokens", "images/generations",
    "audio/speech", "audio/transcriptions", "audio/translations"))
OPERATIONS = dict.fromkeys(REPEATABLE, "other") | {
    "/v1/chat/completions": "chat", "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings", "/v1/responses": "chat", "/v1/messages": "chat"}
STATUSES = {int(status): str(int(status)) for status in (499, *HTTPStatus)}
BY_STATUS = {"status": (*STATUSES.values(), "other"),
             "outcome": ("ok", "refused", "failed", "cut", "client_closed")}
BY_OPERATION = {"gen_ai_operation_name": ("chat", "text_completion", "embeddings", "other")}
BY_BACKEND = {"backend": (), "outcome": (  # the backends are those of BACKEND_URL
    *(f"{hundred}xx" for hundred in range(2, 10)), "backend_unreachable", "backend_error",
    "backend_timeout", "cancelled")}
FAMILIES = {  # name: (help, labels and their values, upper bounds of a histogram's buckets)
    "gen_ai_server_request_duration_seconds": (
        "Duration of inference requests; those not tried do not count.", BY_OPERATION, LATENCY),
    "gen_ai_server_time_to_first_token_seconds": (
        "Time to the first event of streamed answers.", BY_OPERATION, FIRST_TOKEN),
    "gen_ai_client_token_usage": (
        "Tokens of a request, as its answer tells them.",
        {"gen_ai_token_type": ("input", "output")}, tuple(4 ** power for power in range(14))),
    "gateway_requests_total": ("Requests by status and outcome.", BY_STATUS, ()),
    "gateway_requests_in_flight": ("Requests at the backends, or on their way there.", {}, ()),
    "gateway_queue_depth": ("Requests that wait for their turn.", {}, ()),
    "gateway_backend_up": ("1 if the backend is up.", {"backend": ()}, ()),
    "gateway_backend_requests_total": ("Tries at a backend by outcome.", BY_BACKEND, ()),
    "gateway_retries_total": ("Tries beyond the first of a request.", {}, ()),
    "gateway_client_disconnects_total": ("Requests whose client left early.", {}, ()),
    "gateway_overhead_seconds": (
        "Our own part of the time to the first byte of a forwarded reply.", {}, OVERHEAD),
    "gateway_build_info": ("1, with the version.", {"version": (__version__,)}, ())}
PLAIN = re.compile(r"[!#-\[\]-~]+")
SETTLED, SETTLE_SECONDS = 12, 0.01  # ended requests, or time, after which they are settled
MANY_LINES = 1_000  # that wait to be written: then requests wait too
NOTE_SECONDS = 1    # that all else waits for stderr
PIPE_BUF = getattr(select, "PIPE_BUF", 512)
log_lock = threading.RLock()


def log(*lines, patience=NOTE_SECONDS):
    """Write lines to stderr: all at once if a pipe keeps so many together, else one by one. What it
    does not take within `patience` seconds, -1 for any time, is lost.
    """
    data = [line.encode("ascii", "backslashreplace") + b"\n" for line in lines]
    if not log_lock.acquire(timeout=patience):
        return
    try:
        for part in [b"".join(data)] if sum(map(len, data)) <= PIPE_BUF else data:
            if is_full(patience):
                break
            os.write(2, part)
    except OSError:  # a closed stderr is no reason to fail a request
        pass
    finally:
        log_lock.release()


def is_full(patience):
    """Tell whether stderr takes nothing within so many seconds; it is never so for -1."""
    with suppress(OSError):  # it is closed; on Windows, select() takes sockets alone
        return patience >= 0 and not select.select([], [2], [], patience)[1]
    return False


def timestamp():
    """Return the time in RFC 3339, with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def note(settings, text):
    """Write a line that is about no request; who has to is not held up by a pipe that is full."""
    form = {"time": timestamp(), "message": text}
    log(json.dumps(form) if settings.log_format == "json" else " ".join(form.values()))


def note_internal_error(settings, where):
    """Write the exception that is being handled, which is our own fault."""
    with suppress(Exception):  # memory may be what has run out
        note(settings, f"internal error, {where}\n{traceback.format_exc()}")


def printable(text):
    """Return at most 100 characters of `text`, as a JSON string if it is no plain ASCII word."""
    return text if PLAIN.fullmatch(text := text[:100]) else json.dumps(text)


class Record:
    """What is known of one request: bytes of the reply's body, milliseconds, how it came out.

    `result` is ok (whatever the status), refused (by us, 4xx), failed (5xx), cut, or client_closed;
    `outcome` is ok, client_closed, or the code of the error. In seconds: `first` and `first_piece`
    are when the reply and its streamed body began, `asked` when the request had been read, `waited`
    is how long others kept it waiting. `tries` are the backends that were tried, each with its
    outcome; `answer` is the beginning and the end of what came, in which the usage is sought.
    """

    LOGGED = ("time", "request_id", "trace_id", "client", "key", "method", "path", "status",
              "model", "backend", "stream", "bytes", "first_byte_ms", "duration_ms", "outcome")
    request_id = ""  # none is known yet; "-" would be a valid one
    method = path = model = backend = key = trace_id = "-"
    outcome = result = "ok"
    stream, answer, tries, status, bytes, waited = False, b"", (), 0, 0, 0
    first = first_piece = asked = duration_ms = None

    def __init__(self, client):
        self.began, self.client = time.monotonic(), client

    def line(self, form):
        """Return the line for the log."""
        self.first_byte_ms = self.first and (self.first - self.began) * 1000
        self.method, self.path = self.method[:32], self.path[:256]  # one write to a pipe: 4,096
        self.model = self.model[:100].encode(errors="replace").decode()  # jq takes no surrogates
        if form == "json":
            fields = ((name, getattr(self, name)) for name in self.LOGGED)
            return json.dumps({name: round(value, 2) if isinstance(value, float) else value
                               for name, value in fields})
        first = f"{self.first_byte_ms:.2f}ms" if self.first else "-"
        return (f"{self.time} {self.status} {self.method} {self.path} {self.duration_ms:.2f}ms"
                f" first={first} bytes={self.bytes} stream={'yes' if self.stream else 'no'}"
                f" model={printable(self.model)} backend={self.backend} client={self.client}"
                f" key={self.key} id={self.request_id} {self.outcome}")


class Metrics:
    """The counters of all workers, a row of numbers for each in one mapping made before the fork.

    By family and the values of its labels, `places` tells where in a row a series stands: its sum,
    and behind that the count of each bucket. Invariant: a worker writes to `row`, its own, alone,
    and counts under `lock`; any reads all. Who takes a dead worker's place goes on in its row.
    """

    def __init__(self, workers, backends):
        self.places, self.lock, width = {}, threading.Lock(), 0
        for family, (_, labels, bounds) in FAMILIES.items():
            self.places[family] = places = {}
            for key in itertools.product(*(values or backends for values in labels.values())):
                places[key] = width
                width += len(bounds) + 2  # the last bucket has no bound: +Inf
        numbers = memoryview(mmap.mmap(-1, 8 * width * workers)).cast("d")
        self.rows = [numbers[worker * width:][:width] for worker in range(workers)]
        self.row = self.rows[0]
        self.row[self.places["gateway_build_info"][__version__,]] = 1

    def add(self, family, value, *key):
        """Add a value to a series. Hold the lock."""
        place = self.places[family][key]
        self.row[place] += value
        if bounds := FAMILIES[family][2]:
            self.row[place + 1 + bisect_left(bounds, value)] += 1

    def count(self, record):
        """Count a request that has ended. Hold the lock."""
        add, tries = self.add, record.tries
        served = tries or record.result not in ("refused", "failed")
        operation = OPERATIONS.get(record.path) if record.method == "POST" and served else None
        add("gateway_requests_total", 1, STATUSES.get(record.status, "other"), record.result)
        if record.result == "client_closed":
            add("gateway_client_disconnects_total", 1)
        for backend, outcome in tries:
            add("gateway_backend_requests_total", 1, backend, outcome)
        if len(tries) > 1:
            add("gateway_retries_total", len(tries) - 1)
        if record.first and tries:
            add("gateway_overhead_seconds", record.first - record.asked - record.waited)
        if not operation:
            return
        add("gen_ai_server_request_duration_seconds", record.duration_ms / 1000, operation)
        if record.stream and record.first_piece and record.status == 200:
            add("gen_ai_server_time_to_first_token_seconds",
                record.first_piece - record.began, operation)
        for kind, tokens in token_usage(record.answer).items():
            add("gen_ai_client_token_usage", tokens, kind)

    def render(self):
        """Return Prometheus' text 0.0.4: all workers' sums; up is what is so for every worker."""
        sums, lines = [sum(column) for column in zip(*map(list, self.rows))], []
        for family, (text, labels, bounds) in FAMILIES.items():
            kind = "counter" if family.endswith("_total") else "histogram" if bounds else "gauge"
            lines += [f"# HELP {family} {text}", f"# TYPE {family} {kind}"]
            for key, place in self.places[family].items():
                total = sums[place] if family != "gateway_backend_up" else (
                    min(row[place] for row in self.rows))
                counts = [*itertools.accumulate(sums[place + 1:place + 2 + len(bounds)])]
                if key and not total and not counts[-1] and kind != "gauge":
                    continue  # of series with labels, those appear that have a number
                pairs = [f'{label}="{value}"' for label, value in zip(labels, key)]
                if bounds:
                    lines += [sample(f"{family}_bucket", [*pairs, f'le="{bound}"'], count)
                              for bound, count in zip((*bounds, "+Inf"), counts)]
                    lines.append(sample(f"{family}_count", pairs, counts[-1]))
                lines.append(sample(f"{family}_sum" if bounds else family, pairs, total))
        return "\n".join([*lines, ""]).encode()


def sample(name, labels, value):
    """Return one line of Prometheus' text format."""
    return f"{name}{{{','.join(labels)}}} {value:.12g}" if labels else f"{name} {value:.12g}"


class Ledger:
    """The requests that have `ended` and are not yet counted, and the `lines` that are not written.

    Several at once take less, for code that has just run runs faster: at 16 connections a request
    took 85 us of CPU and takes 77. A write for each took 7% of a request, and 13% at 128
    connections, where it hands on the GIL. What is left over is settled by the sweep, within a
    tenth of a second. One that is alone is counted while its client reads the reply: then it
    finds the processor awake with its next request, 10% sooner.
    """

    def __init__(self, settings, metrics):
        self.ended, self.lines, self._settled, self._lock = [], [], 0.0, threading.Lock()
        self._form, self._metrics = settings.log_format, metrics

    def enter(self, record, alone):
        """Take a request that ends now; wait if many lines do, as where nobody reads stderr."""
        self.end(record)
        if time.monotonic() - self._settled > SETTLE_SECONDS or len(self.ended) >= SETTLED:
            self.settle(patience=-1 if len(self.lines) > MANY_LINES else 0)
        elif alone:
            self.count()

    def end(self, record, **fate):
        """Take a request that ends now, if it has not yet been, and do nothing about it yet."""
        with self._lock:  # drain() may cut it off at this moment
            if record.duration_ms is not None:
                return
            record.duration_ms = (time.monotonic() - record.began) * 1000
        record.time = timestamp()
        for name, value in fate.items():
            setattr(record, name, value)
        self.ended.append(record)

    def count(self):
        with self._metrics.lock:
            while self.ended:
                record = self.ended.pop(0)
                self._metrics.count(record)
                self.lines.append(record.line(self._form))
                record.answer = b""  # an idle connection keeps its last record

    def settle(self, patience=0):
        """Count what has ended, and write its lines, where that can begin in `patience` seconds."""
        self.count()
        # While another thread writes, who has none leaves them to the next one: where all waited,
        # the slowest hundredth of 128 connections took 180 ms with two workers, and 60 so.
        if log_lock.acquire(timeout=patience):
            try:
                # Under load, to ask each time took 2%, and 1,000 lines are soon there anyway.
                if time.monotonic() - self._settled > SETTLE_SECONDS and is_full(patience):
                    return
                with self._metrics.lock:
                    lines, self.lines, self._settled = self.lines, [], time.monotonic()
                if lines:
                    log(*lines, patience=patience or -1)
            finally:
                log_lock.release()


# == 5. Backends ===================================================================================
# Requests go out through urllib.request: a bare opener whose one handler, Pool, keeps connections
# ("links") alive. So no redirect is followed, no field invented, no proxy used unasked. A link goes
# back to the pool only at a message boundary: request sent whole, body read to its declared end,
# nothing behind it, neither side said close; and it is used again only if nothing has come since. A
# request goes out twice only if no backend has taken it, or if repeating it changes nothing: to the
# same one if a reused link ended before the first byte of an answer, and to one other if the first
# one failed. So one that crashes what it reaches takes down two backends at most. A backend that
# fails is left alone for a time that doubles; then a probe, or one request, looks again.

IDLE_SECONDS = 4        # uvicorn, and so vLLM, closes an idle connection after 5
RECEIVE_BYTES = 65_536  # one read; larger ones cost more to allocate than they save in calls
MAX_BACK_OFF = 30       # seconds, doubled from 1, that a failing backend is left alone
MAX_RETRY_AFTER = 300   # seconds that a backend may ask for
MAX_INTERIM = 1_000     # responses of 1xx, before the one that counts, are taken
MAX_LIST_PIECES = 64    # of a list of models, each of up to RECEIVE_BYTES
SHORTAGES = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))  # on our side
BUSY = frozenset((502, 503, 504, 508))  # it, or one behind it, cannot answer now: another may
UNREAD = frozenset((  # answers that a head alone may get: its body may lie there unread
    *range(300, 400), 401, 403, 404, 405, 411, 413, 415, 417, 431, 501))

# `length` is that of the body, and `body` None if it has not all come with the head; `pieces`
# yields it as it comes, and raises Broken or BackendTimeout if it does not become whole.
Response = namedtuple("Response", "backend head length body pieces")


def set_timeouts(sock, receive, send):
    """Bound each receive and each send of a blocking socket, in seconds."""
    # settimeout() makes each two system calls, a poll and the operation; Python's TLS needs that.
    if os.name != "posix" or isinstance(sock, ssl.SSLSocket):
        return sock.settimeout(receive)
    form = "=qq" if socket.SO_RCVTIMEO == 66 else "@ll"  # 66: 32-bit Linux with a time of 64 bits
    for option, limit in ((socket.SO_RCVTIMEO, receive), (socket.SO_SNDTIMEO, send)):
        whole, rest = int(limit), max(int(limit % 1 * 1e6), 1)  # 0 would mean for ever
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack(form, whole, rest))


class BackendRequest(urllib.request.Request):
    """A request on its way to a backend; `fields` are its header lines but Host, ready as bytes.

    `link` is the one that it holds; `patience` is how many seconds a backend may be silent;
    `cancelled` tells that the client, or the time of a probe, has gone; `turn` is the Event
    on which it waits for its turn; `flags` are those of recv().
    """

    __slots__ = ("full_url", "data")  # properties there, which parse the address each time: 7 us
    headers, link, backend, turn, cancelled, flags = {}, None, None, None, False, 0

    def __init__(self, method, target, fields, body, model, repeatable, patience):
        self.method, self.target, self.data, self.model = method, target, body, model
        self.fields, self.repeatable, self.patience = fields, repeatable, patience


class Link:
    """One connection to a backend; `key` is its scheme and host.

    `idle_since` is when it was last used, or heard by Streams; `reused`: it had a request before,
    and nothing of this one's answer has come. `persistent` turns false if a request broke off (what
    follows would be taken for the rest of it) or the backend said close. `reset`: it broke while we
    sent, which recv() does not tell again: it gives what had come, and then b"", as at a good end.
    Without poll (Windows), links are not used again.
    """

    reused, persistent, reset, patience = False, True, False, None

    def __init__(self, sock, key):
        self.sock, self.key = sock, key
        self.poller = select.poll() if hasattr(select, "poll") else None
        if self.poller:
            self.poller.register(sock, select.POLLIN)

    def receive(self, flags=0):
        """Return the next bytes, b"" at their end, None if it broke; raises BackendTimeout."""
        try:
            return self.sock.recv(RECEIVE_BYTES, flags)
        except (TimeoutError, BlockingIOError):
            raise BackendTimeout(f"was silent for {self.patience} seconds") from None
        except OSError:
            return None


    def retire(self):
        """Use it no more: a body that the backend leaves unread, or sends behind HEAD, 204 or 304
        all the same, as some do, would be the next one's.
        """
        # By RST: else the port is kept for a minute, and 470 a second would use up all of them.
        self.persistent = False
        with suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Pool(urllib.request.BaseHandler):
    """The handler of urllib's opener for http and https: it keeps links alive.

    Invariant: an open link is in `_idle`, or the `link` of one request, or put aside by its _try,
    which alone needs no `_lock` to take it and to give it back. Nothing done under that blocks.
    """

    def __init__(self, settings):
        self._settings, self._lock, self._idle = settings, threading.Lock(), defaultdict(list)
        # Made at the start: without a descriptor left, one would silently trust nobody, for ever.
        self._tls = ssl.create_default_context() if any(  # honours SSL_CERT_FILE
            url.lower().startswith("https") for url in settings.backend_url) else None
        self._dropped = NOT_RETURNED | CORS_FIELDS if settings.cors_origins else NOT_RETURNED

    def default_open(self, request):
        """Send a BackendRequest; return its Response. Raises BackendError or ClientGone."""
        link = self._take(request) or self._dial(request)
        try:
            return self._exchange(request, link)
        except Broken as error:  # a link that was idle may have ended before it was used
            if not (link.reused and request.repeatable) or request.cancelled:
                raise
            self.release(request)
            try:
                link = self._dial(request)
            except Unreachable:
                raise error from None  # the request may be what ended the backend
        return self._exchange(request, link)

    def _take(self, request):
        """Give the request an idle link, and return it; None if no good one is left."""
        while True:
            with self._lock:
                idle = self._idle[request.backend.key]
                if not idle:
                    return None
                link = request.link = idle.pop()
            fresh = time.monotonic() - link.idle_since < IDLE_SECONDS
            if fresh and link.poller and not link.poller.poll(0):  # no bytes have come, and no end
                return link
            self.release(request)

    def _dial(self, request):
        """Give the request a new link, and return it; raises Unreachable, or 503."""
        backend, timeout = request.backend, self._settings.connect_timeout
        address, login = backend.proxy or (backend.host, {})
        connection = http.client.HTTPSConnection(
            address, timeout=timeout, context=self._tls) if backend.scheme == "https" else (
            http.client.HTTPConnection(address, timeout=timeout))
        try:
            if backend.proxy:  # by CONNECT, for http as well
                connection.set_tunnel(backend.host, headers=login)
            connection.connect()
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()  # what is no HTTP leaves it open
            if getattr(error, "errno", 0) in SHORTAGES:
                raise APIError(503, "too_many_connections", f"{error.strerror}: the gateway's"
                               " system has no room for one more connection; try again, or raise"
                               " its limits") from None
            why = ascii(str(error))[1:-1]  # a proxy may have chosen its words
            by = " by its proxy (which must allow CONNECT; else NO_PROXY)" if backend.proxy else ""
            raise Unreachable(
                f"{backend.scheme}://{backend.host} cannot be reached{by}: {why}") from None
        connection.sock.settimeout(None)
        if backend.scheme == "https":
            connection.sock.suppress_ragged_eofs = False  # an end without its alert is a cut (9.8)
        with self._lock:
            request.link = Link(connection.sock, backend.key)
        return request.link

    def _exchange(self, request, link):
        """Send the request, and return the response."""
        backend, body = request.backend, request.data
        if body and request.method not in WRITING:
            link.persistent = False
        if request.cancelled:
            raise ClientGone
        if link.patience != request.patience:
            link.patience = request.patience
            with suppress(OSError):  # it may be reset already
                set_timeouts(link.sock, request.patience, request.patience)
        sent = b"%b HTTP/1.1\r\n%b%b\r\n" % (
            f"{request.method} {backend.path}{request.target}".encode(), backend.host_line,
            request.fields)
        # To copy a large body would cost more than another call; by TLS, one call has one time-out.
        step = RECEIVE_BYTES if backend.scheme == "https" else len(body)
        try:
            for part in (sent + body,) if len(body) <= RECEIVE_BYTES else itertools.chain(
                    (sent,), (body[at:at + step] for at in range(0, len(body), step))):
                link.sock.sendall(part)
        except OSError as error:  # an answer may be there already, such as a 413
            link.persistent = False
            link.reset = not isinstance(error, (TimeoutError, BlockingIOError))
            if not (link.reset or link.poller and link.poller.poll(0)):
                raise BackendTimeout("does not take the request") from None
        try:
            head, length, data = self._receive_head(link, request.method == "HEAD")
        except Malformed as error:
            raise Broken(f"broke HTTP: {error.message.removesuffix('; send less')}") from None
        link.persistent = link.persistent and head.persistent
        if request.method == "HEAD" or head.status in (204, 304) or body and head.status in UNREAD:
            link.retire()
        if not 0 <= length <= len(data):
            return Response(backend, head, length, None, self._pieces(request, link, length, data))
        self.release(request, length == len(data))
        data = data[:length]
        return Response(backend, head, length, data, (data,))

    def _receive_head(self, link, to_head):
        """Return the head behind any 1xx (RFC 9110, 15.2), its body's length, and what has come."""
        data = b""
        for _ in range(MAX_INTERIM):
            scanned = 0
            while not data or (end := find_head(data, scanned)) < 0:
                scanned, piece = len(data), link.receive()
                if not piece:
                    raise Broken("closed the connection before its response was there")
                data, link.reused = data + piece, False
            head, data = data[:end], data[end + 4:]
            if to_head or head[9:12] in (b"204", b"304"):  # it tells the length of another body
                head, length = parse_response(head, self._dropped, to_head)
            else:
                head, length = parse_but_length(parse_response, head, self._dropped, to_head)
            if head.status >= 200:
                return head, length, data
        raise Broken(f"sent {MAX_INTERIM} responses of 1xx before its answer")

    def _pieces(self, request, link, length, data):
        """Yield a response's body, of which `data` has come; see Response. Pieces may be empty."""
        body = Body(length)
        while True:
            piece = body.feed(data)
            if body.done or body.malformed:
                self.release(request, body.done and not body.rest)
            yield piece
            if body.done:
                return
            if body.malformed:
                raise Broken("broke HTTP: its body's chunks are malformed")
            data = link.receive(request.flags)
            if data == b"" and length == UNTIL_CLOSE and not (request.cancelled or link.reset):
                return
            if not data:
                raise Broken("closed the connection in the middle of its response")

    def release(self, request, at_boundary=False):
        """Take its link from a request: keep it for the next one if that is safe, else close it."""
        with self._lock:
            link, request.link = request.link, None
            if at_boundary and link.persistent and not request.cancelled:
                link.idle_since, link.reused = time.monotonic(), True
                return self._idle[link.key].append(link)
        if link:
            link.sock.close()

    def cancel(self, request):
        """End a request from another thread: what waits for it sees the end at once."""
        with self._lock:
            request.cancelled = True
            if request.turn:
                request.turn.set()
            if link := request.link:
                with suppress(OSError):
                    socket.socket.shutdown(link.sock, socket.SHUT_RDWR)  # below any TLS

    def expire(self):
        before, expired = time.monotonic() - IDLE_SECONDS, []
        with self._lock:
            for links in self._idle.values():
                while links and links[0].idle_since < before:  # the longest idle is first
                    expired.append(links.pop(0))
        for link in expired:
            link.sock.close()


class Backend:
    """A server to forward to: its address, what it serves, and how it has been doing.

    `models` are the cards of /v1/models, JSON texts by id, or None if they are not known. While
    `up` is false, others are preferred until `retry_at`, and then, once it has one request to try
    it, until `trial_until`. `lost`: it could not be reached, or a probe saw it fail: the next good
    probe brings it back at once; where requests failed, one behind `retry_at` does. `silent`: its
    last probe had no answer in time. Changed under Backends' lock, but for what probes alone change
    (`models`, `silent`, `probing`), and `probe_at` where one starts.
    """

    up, silent, lost, models, probing = True, False, False, None, None
    back_off, retry_at, trial_until, probe_at, in_flight, chosen = 0, 0.0, 0.0, 0.0, 0, 0

    def __init__(self, url, proxy):
        self.url, self.proxy, parts = url, proxy, urllib.parse.urlsplit(url)
        self.key = self.scheme, self.host = parts.scheme, parts.netloc
        self.path, self.host_line = parts.path, b"Host: %b\r\n" % self.host.encode()

    def free_at(self):
        """Return when it is free for any request: behind its back-off, and a trial of it."""
        return max(self.retry_at, self.trial_until)


def retry_after(head):
    """Return how many seconds a busy backend asks to be left alone (RFC 9110, 10.2.3), or 0."""
    asked = head.index.get(b"retry-after", b"").decode("latin-1") if head.status == 503 else ""
    with suppress(ValueError, OverflowError):
        seconds = int(asked[:9]) if asked.isdecimal() else (
            parsedate_to_datetime(asked).timestamp() - time.time())
        return min(max(seconds, 0), MAX_RETRY_AFTER)
    return 0


def model_cards(body):
    """Return the cards of a list of models by id, in OpenAI's shape; None if it is no such list."""
    try:
        return {card["id"]: json.dumps(
            {"id": card["id"], "object": "model", "created": 0, "owned_by": "backend"} | card,
            allow_nan=False) for card in parse_json(body)["data"]}
    except (APIError, KeyError, TypeError, ValueError, RecursionError):
        return None


class Backends:
    """Where requests are forwarded to, nowhere in echo mode: who is up, serves what, is next."""

    def __init__(self, settings):
        self.settings = settings
        self.all = [Backend(*each) for each in zip(settings.backend_url, settings.proxies)]
        self.pool, self._opener = Pool(settings), urllib.request.OpenerDirector()
        self._opener.add_handler(self.pool)
        self._lock, self._turns = threading.Lock(), itertools.count(1)
        self.via = b"1.1 gateway-" + uuid.uuid4().hex[:16].encode()  # of all workers
        self.authorization = b""  # the header line with the backends' key

    def open(self, request, record):
        """Return the first good Response to a BackendRequest; raises APIError or ClientGone.

        What was sent decides, and the class of the failure proves it. A backend that could not be
        reached has not seen the request: the next one gets it. One that answered 429 has not taken
        it: one other gets it that is not left alone. If one broke, or is BUSY, one other gets it if
        it may be repeated. After a time-out none does: the backend may be at work. The last answer
        stands (no 429 behind which what may not be repeated broke); without one, the last failure
        of a backend that was reached, or else the first.
        """
        answer, failure, tries_left = None, None, 2
        try:
            while tries_left and self._choose(request, record.tries, only_free=(
                    answer and answer.head.status == 429)):
                try:
                    answer = self._try(request, record)
                    if answer.head.status != 429 and not (
                            request.repeatable and answer.head.status in BUSY):
                        break
                except Unreachable as error:
                    failure = failure or error
                    continue
                except (Broken, BackendTimeout) as error:
                    failure = error
                    if not request.repeatable:
                        answer = None  # a 429 would say that nobody has taken it
                    if not request.repeatable or isinstance(error, BackendTimeout):
                        break
                tries_left -= 1
            if request.cancelled:  # perhaps when it had no link, between two answers
                raise ClientGone
            record.backend = (answer or failure).backend.url
            if answer:
                return answer
            if isinstance(failure, Unreachable) and len(self.all) > 1:
                raise APIError(503, "no_healthy_backend", "none of the backends for this request"
                               " can be reached: /readyz tells their state; try again")
            raise failure
        finally:
            del failure  # it holds this frame, and would be held by it, with the request's body

    def _choose(self, request, tries, only_free):
        """Direct the request to the backend to try next, and return whether there is one.

        It serves the model, or may (while it is free, with models unknown), or nobody does. It is
        free now, or the soonest; it is not silent, if another can be had; it has the fewest
        requests in flight, or has waited longest.
        """
        now, candidates = time.monotonic(), self.all
        with self._lock:
            if request.model is not None and len(candidates) > 1:
                candidates = [b for b in candidates if (
                    b.free_at() <= now if b.models is None else request.model in b.models)
                              ] or candidates
            if tries:
                candidates = [b for b in candidates if b.url not in dict(tries) and (
                    not only_free or b.free_at() <= now)]
                if not candidates:
                    return False
                request.backend.in_flight -= 1
            backend = candidates[0] if len(candidates) == 1 else min(candidates, key=lambda b: (
                max(b.free_at() - now, 0), b.silent, b.in_flight, b.chosen))
            if not backend.up and backend.free_at() <= now:  # others wait for how this one fares
                backend.trial_until = now + backend.back_off
            backend.in_flight += 1
            backend.chosen = next(self._turns)
            request.backend = backend
        return True

    def _try(self, request, record):
        """Send the request to the backend that it is directed to; note how that came out.

        An earlier answer may have to stand: its link, `spare`, is put aside, and is the request's
        again unless this one is answered.
        """
        backend, began, outcome = request.backend, time.monotonic(), "cancelled"
        record.backend, answer, spare, request.link = backend.url, None, request.link, None
        request.type, request.full_url = backend.scheme, backend.url + request.target
        try:
            answer = self._opener.open(request)
            status = answer.head.status
            outcome = f"{status // 100}xx"
            if status in BUSY:
                self.failed(backend, f"it answered {status}", retry_after(answer.head))
            elif backend.back_off:
                self.succeeded(backend)
            return answer
        except BackendError as error:
            if request.cancelled:
                raise ClientGone from None
            error.backend, outcome = backend, error.code
            self.failed(backend, error.message, lost=isinstance(error, Unreachable))
            raise
        finally:
            if not answer:
                self.pool.release(request)
                request.link = spare
            elif spare:
                spare.sock.close()
            record.waited += time.monotonic() - began
            record.tries = (*record.tries, (backend.url, outcome))

    def close(self, request):
        """The request has ended: stop what backends still do for it."""
        self.pool.release(request)
        with self._lock:
            request.backend.in_flight -= 1

    def failed(self, backend, why, wait=0, lost=False):
        """Leave the backend alone for a while, `wait` seconds if it said so."""
        with self._lock:
            was_up, now, backend.lost = backend.up, time.monotonic(), lost
            if backend.retry_at <= now:  # else it failed while it was left alone
                backend.up, backend.back_off = False, min(backend.back_off * 2 or 1, MAX_BACK_OFF)
                backend.retry_at = now + backend.back_off
            backend.retry_at = max(backend.retry_at, now + wait)
            backend.probe_at = min(backend.probe_at, backend.retry_at)
        if was_up:
            note(self.settings, f"backend {backend.url} is down: {why}")

    def succeeded(self, backend, proven=True):
        """The backend is up. If that is not `proven`, a failure doubles the last back-off."""
        with self._lock:
            was_up, backend.up = backend.up, True
            backend.retry_at = backend.trial_until = 0.0
            backend.back_off = 0 if proven else backend.back_off
        if not was_up:
            note(self.settings, f"backend {backend.url} is up")

    def probe_due(self):
        """Start a thread for each backend whose probe is due; cancel probes that take too long."""
        now, interval, limit = (
            time.monotonic(), self.settings.probe_interval, self.settings.connect_timeout)
        for backend in self.all:
            probe = backend.probing
            if probe and now > probe.deadline:  # its answer comes byte by byte
                self.pool.cancel(probe)
            elif interval and now >= backend.probe_at and not probe:
                fields = b"User-Agent: gateway.py\r\nVia: %b\r\n%b" % (self.via, self.authorization)
                probe = BackendRequest("GET", "/v1/models", fields, b"", None, True, limit)
                probe.backend, probe.deadline = backend, now + 3 * limit
                backend.probing, backend.probe_at = probe, now + interval
                try:
                    start_new_thread(self._probe, (probe,))
                except RuntimeError:  # the system has no thread left
                    backend.probing = None

    def _probe(self, request):
        """Ask a backend which models it serves, and so whether it is up."""
        backend = request.backend
        try:
            answer = self.pool.default_open(request)
            backend.silent = False
            if answer.head.status in BUSY:
                return self.failed(backend, f"it answered {answer.head.status} to a probe",
                                   retry_after(answer.head), backend.up or backend.lost)
            body = b"".join(itertools.islice(filter(None, answer.pieces), MAX_LIST_PIECES))
            cards = model_cards(body) if answer.head.status == 200 else None
            backend.models = backend.models if cards is None else cards
            if backend.lost or backend.retry_at <= time.monotonic():
                self.succeeded(backend, backend.lost)
        except BackendError as error:
            backend.silent = isinstance(error, BackendTimeout) or request.cancelled
            if not (backend.silent and backend.in_flight):  # some are silent while they generate
                why = "its answer to a probe took too long" if backend.silent else error.message
                self.failed(backend, why, lost=(
                    backend.up or backend.lost or isinstance(error, Unreachable)))
        except (APIError, ClientGone):  # of SHORTAGES; or it was cancelled before it was sent
            pass
        except Exception:
            note_internal_error(self.settings, backend.url)
        finally:
            self.pool.release(request)
            backend.probing = None

    def models(self):
        """Return the list of the models of all backends that are up as JSON, if any is known."""
        known, cards = [b.models for b in self.all if b.up and b.models is not None], {}
        for models in known:
            cards |= models | cards  # the first one's card of a model stays
        return known and f'{{"object": "list", "data": [{", ".join(cards.values())}]}}'.encode()


# == 6. Echo =======================================================================================
# The answer without a backend: "Echo: " and the last user message, as one completion or as events.
# Tokens are words between white space. Only here are messages looked into.

EVENT = b"data: %b\n\n"  # server-sent


def demand(condition, param, what, code="invalid_type"):
    if not condition:
        raise APIError(400, code, f"'{param}' must be {what}", param)


def text_of(message, param):
    """Return a message's text: its content, the text parts of that joined, or "" for null."""
    demand(isinstance(message, dict), param, "an object {role, content}")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content
                 if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else 0
    demand(content is None or isinstance(content, str), f"{param}.content",
           "a string or an array of content parts")
    return content or ""


class Echo:
    """The answer to a chat completion request, in OpenAI's shapes; raises 400 if it is no such."""

    def __init__(self, asked, request_id):
        messages, what = asked.get("messages"), "an array of {role, content}"
        demand("messages" in asked, "messages", what, "missing_required_parameter")
        demand(isinstance(messages, list), "messages", what)
        demand(messages, "messages", f"{what}, with one at least", "empty_array")
        for name, kind, what in (("model", str, "a string"), ("stream", bool, "true or false"),
                                 ("stream_options", dict, "an object")):
            demand(isinstance(asked.get(name), kind | None), name, what)
        texts = [text_of(message, f"messages[{i}]") for i, message in enumerate(messages)]
        said = [text for text, message in zip(texts, messages) if message.get("role") == "user"]
        self.text, self.model = "Echo: " + (said or texts)[-1], asked.get("model") or "echo"
        prompt, completion = len(" ".join(texts).split()), len(self.text.split())
        self.usage = {"prompt_tokens": prompt, "completion_tokens": completion,
                      "total_tokens": prompt + completion}
        self.with_usage = (asked.get("stream_options") or {}).get("include_usage") is True
        self.base = {"id": request_id, "object": "chat.completion", "created": int(time.time()),
                     "model": self.model}

    def completion(self):
        """Return the chat.completion as JSON bytes."""
        choice = {"index": 0, "message": {"role": "assistant", "content": self.text},
                  "logprobs": None, "finish_reason": "stop"}
        return json.dumps(self.base | {"choices": [choice], "usage": self.usage}).encode()

    def events(self):
        """Yield chat.completion.chunk events: the role, each word, the end, the usage; [DONE]."""
        base = self.base | {"object": "chat.completion.chunk"}
        usage = {"usage": None} if self.with_usage else {}
        words = ({"content": word[0]} for word in re.finditer(r"\S+\s*", self.text))
        for delta in itertools.chain([{"role": "assistant", "content": ""}], words, [{}]):
            choice = {"index": 0, "delta": delta, "logprobs": None,
                      "finish_reason": None if delta else "stop"}
            yield EVENT % json.dumps(base | {"choices": [choice]} | usage).encode()
        if self.with_usage:
            yield EVENT % json.dumps(base | {"choices": [], "usage": self.usage}).encode()
        yield EVENT % b"[DONE]"


# == 7. Handler ====================================================================================
# One object and one thread for each connection, one handle_one_request for each request. `owed` is
# the length of the body that the client has still to send, without end until its head has been
# understood: a connection is kept only if nothing is owed. Once a part of the reply has been sent,
# an error can only be an event in a stream, or a cut.

MIN_BODY_RATE = 1_000      # bytes a second that a body has to make on average: a modem's pace
LARGE_BYTES = 131_072      # unless it has learnt otherwise, glibc gives what has more back at once
MAX_EVENT_BYTES = 262_144  # the beginning of an event is held back up to this
FORM_BYTES = 65_536        # of a form's beginning, and of its end, in which its model is sought
TLS_RECORD = 16_384        # bytes: more of them go out together, or count as not sent
LINGER_SECONDS = 5         # for a refused client to stop sending (as in nginx), a worker to end

METHODS = (*READING, *WRITING, "DELETE")
PARSED = frozenset(("/v1/chat/completions", "/v1/completions"))  # POSTs here must be JSON objects
LAST_EVENTS = dict.fromkeys(PARSED, re.compile(rb"[\r\n]data: ?\[DONE\]")) | {
    MESSAGES: named_event(rb"error|message_stop"), "/v1/responses": named_event(
        rb"error|response\.(?:completed|incomplete|failed|cancell?ed|done)")}
PATHS = {"/healthz": READING, "/readyz": READING, "/metrics": READING, "*": METHODS,
         "/v1/chat/completions": ("POST",),  # where no backend answers, as for all under /v1/
         "/v1/models": READING, "/v1/models/echo": READING}
ECHO_MODEL = b'{"id": "echo", "object": "model", "created": 0, "owned_by": "gateway"}'
FIXED = {"/healthz": b'{"status": "ok"}', "/v1/models/echo": ECHO_MODEL,
         "/v1/models": b'{"object": "list", "data": [%b]}' % ECHO_MODEL}
JSON_TYPE = b"Content-Type: application/json\r\n"
METRICS_TYPE = b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
UNBUFFERED = {b"cache-control": b"Cache-Control: no-cache\r\n",  # for proxies before us
              b"x-accel-buffering": b"X-Accel-Buffering: no\r\n"}
EVENT_FIELDS = b"Content-Type: text/event-stream; charset=utf-8\r\n%b%b" % (*UNBUFFERED.values(),)


def request_ids():
    """Yield ids for the requests of one connection: a uuid4, and then those that follow it."""
    # To ask the system for random bytes each time took 7% of a request, and a hand-off of the GIL.
    first = str(uuid.uuid4())
    for last in itertools.count(int(first[24:], 16)):
        yield f"{first[:24]}{last & 0xffffffffffff:012x}"


@lru_cache(1)
def keep_large_blocks():
    """Have glibc keep up to 8 MiB that are freed, in each of its heaps, for what comes next."""
    # It learns that from the largest block that was freed, twice its size. A body of 1 MB took 3.2
    # ms of CPU, the half of it to have its pages anew, and takes 1.2. Not at the start: where all
    # bodies are small, it would keep 20 MiB for nothing.
    with suppress(MemoryError):
        bytes(4 << 20)


class Handler(BaseHTTPRequestHandler):
    """Serves one client's connection.

    Invariant: `buffer` holds what came and was not used, `unsent` what has still to be sent: a head
    without a body yet, or what a slow client did not take. `forwarding` is the BackendRequest under
    way, which Server.sweep cancels if the client has gone, unless we are `deaf` to that; while a
    request is awaited, `idle_since` is set; FIN would pass an `open_ended` reply off as whole;
    while Streams makes our relay's steps, all this is its thread's, until it puts to `lent`.
    """

    buffer, unsent, patience, owed, forwarding, idle_since = b"", b"", 0, 0, None, None
    deaf, open_ended, lent, record = False, False, None, None

    def setup(self):
        self.settings, self.connection, self.ids = self.server.settings, self.request, request_ids()
        try:
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.server.tls:  # its handshake comes with the first read
                self.connection = self.server.tls.wrap_socket(
                    self.request, server_side=True, do_handshake_on_connect=False)
        except OSError:  # it is reset already; what came before must not be read without TLS
            self.request.close()
        self.server.connections[self.request] = self

    def finish(self):
        """Close the connection: by RST if FIN would pass a cut body off as whole."""
        # Closing with input unread, were it an empty line, sends RST too, which destroys what the
        # client has not read of its reply (9.6): so say that no more comes, and read on a while.
        deadline = time.monotonic() + LINGER_SECONDS
        with self.connection, suppress(APIError, OSError, MemoryError):
            if self.open_ended:
                return
            self.reset_at_close(False)
            self.connection.setblocking(False)
            if self.connection is not self.request:
                with suppress(OSError, ValueError):  # tell TLS that this is the end (RFC 8446, 6.1)
                    self.connection.unwrap()
            if not self.owed:  # where nothing is unread, FIN will do: this raises BlockingIOError
                self.connection.recv(RECEIVE_BYTES)
            self.connection.setblocking(True)
            self.patience = 0  # that has taken TLS its time-out
            self.connection.shutdown(socket.SHUT_WR)  # of TLS too: what comes is discarded
            while self.receive(deadline):
                pass

    def reset_at_close(self, on):
        """Have the system end the connection by RST, or by FIN, also where this process dies."""
        with suppress(OSError):
            self.connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", on, 0))

    def handle_one_request(self):
        """Serve one request. Whatever happens, it ends in one reply and one line of the log."""
        self.close_connection = True
        if not self.receive_first():
            return
        self.owed, self.minor, self.cors, self.at_boundary = UNTIL_CLOSE, 1, b"", False
        record = self.record = Record(self.client_address[0].removeprefix("::ffff:"))  # of IPv4
        try:
            self.read_head()
            self.dispatch()
        except APIError as error:
            self.fail(error)
        except ClientGone:  # or it has closed its half of the connection
            self.close_connection, self.owed = True, 0
            record.status, record.outcome, record.result = 499, "client_closed", "client_closed"
        except Exception:
            record.outcome, record.result = "internal_error", "failed"  # without memory, this too
            try:  # the reply first: to format a traceback takes memory
                self.fail(APIError(500, "internal_error", "the gateway failed; its log says why"))
            finally:
                note_internal_error(self.settings, f"id={record.request_id}")
        finally:
            self.forwarding = None
            self.server.ledger.enter(record, len(self.server.connections) == 1)

    def receive_first(self):
        """Wait for a request to begin, behind any empty lines (2.2); return whether one did."""
        self.idle_since = time.monotonic()
        try:
            while (start := self.buffer[:2]) in (b"", b"\r", b"\r\n"):
                if start == b"\r\n":
                    self.buffer = re.sub(rb"\A(?:\r\n)++", b"", self.buffer)
                elif piece := self.receive(self.idle_since + self.settings.client_timeout):
                    self.buffer += piece
                else:
                    return False
        except APIError:  # silence is answered with silence: by closing
            return False
        self.idle_since = None
        return True

    def receive(self, deadline):
        """Return what the client sends next, b"" at its end; raises 408, or 503 in a drain."""
        left = deadline - time.monotonic()
        try:
            if left > 0:
                # Right to a tenth will do, and spares two system calls: `left` is right each time.
                if abs(left - self.patience) > self.patience / 10:
                    self.patience = left
                    set_timeouts(self.connection, left, self.settings.client_timeout)
                data = self.connection.recv(RECEIVE_BYTES)
                if not data and self.deaf:  # drain() has ended it
                    raise APIError(503, "shutting_down", "the gateway is being stopped; try again")
                return data
        except (TimeoutError, BlockingIOError):
            pass
        except OSError:
            return b""
        raise APIError(408, "request_timeout", "the request came too slowly; send it again")

    def read_head(self):
        """Read and judge the request's head: `asked` is what it says."""
        scanned, record = 0, self.record
        deadline = time.monotonic() + self.settings.client_timeout
        while (end := find_head(self.buffer, scanned)) < 0:
            scanned = len(self.buffer)
            if not (piece := self.receive(deadline)):
                raise Malformed("the head of the request was cut off")
            self.buffer += piece
        asked, self.owed = parse_but_length(
            parse_request, self.buffer[:end], self.server.not_forwarded)
        self.asked, self.minor, self.buffer = asked, asked.minor, self.buffer[end + 4:]
        record.method, record.path, index = asked.method, asked.path, asked.index
        record.request_id = accepted_request_id(index, self.ids)
        self.close_connection = not asked.persistent
        self.cors = cors_fields(index.get(b"origin"), self.settings.cors_origins)
        if b"traceparent" in index and (trace := TRACE.fullmatch(index[b"traceparent"])):
            record.trace_id = trace[1].decode()

    def read_body(self):
        """Return the request's body, whole; raises 413, 408 or Malformed."""
        limit, length, data = self.settings.max_body_bytes, self.owed, self.buffer
        if length <= limit and 0 <= length <= len(data):  # it came with the head, as most do
            self.buffer, self.owed = data[length:], 0
            return data[:length]
        expected = self.asked.index.get(b"expect", b"").lower()
        if expected == b"100-continue" and self.minor and not data and length <= limit:
            # Not before (RFC 9110, 10.1.1): by now the request is one to be answered.
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        began, body, received = time.monotonic(), Body(length), bytearray()
        while True:
            received += body.feed(data)
            if len(received) + max(body.left, 0) > limit:  # also of what is announced
                raise APIError(413, "request_too_large", f"a body may have {limit} bytes"
                               " (MAX_BODY_BYTES); send less")
            if body.malformed:
                raise Malformed("the body's chunks are not of the form of RFC 9112, section 7.1")
            if body.done:
                self.buffer, self.owed = body.rest, 0
                if len(received) > LARGE_BYTES:
                    keep_large_blocks()
                return bytes(received)
            # A slow line is served; one that stalls is not, however fast it was.
            slowest = min(began + len(received) / MIN_BODY_RATE, time.monotonic())
            data = self.receive(slowest + self.settings.client_timeout)
            if not data:
                raise Malformed("the body of the request was cut off")

    def dispatch(self):
        method, path, index = self.asked.method, self.asked.path, self.asked.index
        if method == "OPTIONS" and b"access-control-request-method" in index and (
                b"Allow-Origin" in self.cors):  # a browser asks without a key (Fetch, 4.8)
            fields = (b"Access-Control-Allow-Methods: %b\r\nAccess-Control-Allow-Headers: %b\r\n"
                      b"Access-Control-Max-Age: 7200\r\n")
            return self.reply(204, fields=fields % (
                ", ".join(METHODS).encode(), index.get(b"access-control-request-headers", b"")))
        backends = self.server.backends
        if backends.via in index.get(b"via", b""):  # our own probe, say: without a key
            raise APIError(508, "loop_detected", "BACKEND_URL leads back to this gateway")
        if self.server.keys and path not in ("/healthz", "/readyz"):  # probes have none
            self.authenticate()
        forwarded = backends.all and path.startswith("/v1/")
        if forwarded and method == method.upper() and (  # some servers read "head" as HEAD
                method not in ("CONNECT", "TRACE")):  # which are about the way, not the end
            return self.forward()
        methods = METHODS if forwarded else PATHS.get(path)
        if not methods:
            here = "the base URL is http://HOST:PORT/v1" if backends.all else (
                "echo mode has /v1/chat/completions and /v1/models")
            raise APIError(404, "unknown_url", f"nothing is at {printable(path)}; {here}")
        allow = f"Allow: {', '.join(methods)}, OPTIONS\r\n".encode()
        if method == "OPTIONS":
            self.reply(204, b"", allow)
        elif method not in methods:
            raise APIError(405, "method_not_allowed", f"{path} takes {', '.join(methods)}",
                           fields=allow)
        elif path in FIXED:
            self.reply(200, FIXED[path])
        elif path == "/readyz":
            self.reply(*self.server.readiness())
        elif path == "/metrics":
            self.server.ledger.count()
            self.reply(200, self.server.metrics.render(), kind=METRICS_TYPE)
        else:
            self.echo(parse_json(self.read_body()))

    def authenticate(self):
        """Note whose key the request bears (RFC 6750); raises 401 if it is nobody's."""
        index, otherwise = self.asked.index, b""
        if self.record.path.startswith(MESSAGES):  # Anthropic's clients may have their own field
            otherwise = b"Bearer " + index.get(b"x-api-key", b"")
        scheme, _, key = index.get(b"authorization", otherwise).partition(b" ")
        # All are compared, each in constant time: how long it takes tells nothing of any.
        names = [name for name, own in self.server.keys if compare_digest(own, key.strip(b" "))]
        if scheme.lower() != b"bearer" or not names:
            raise APIError(401, "invalid_api_key",  # LiteLLM knows a 401 by OpenAI's first words
                           "Incorrect API key provided: send one of this gateway's,"
                           " 'Authorization: Bearer KEY'", fields=b"WWW-Authenticate: Bearer\r\n")
        self.record.key = names[0]

    def echo(self, asked):
        echo, record = Echo(asked, self.record.request_id), self.record
        record.model, record.stream = echo.model, bool(asked.get("stream"))
        if not record.stream:
            record.answer = echo.completion()
            return self.reply(200, record.answer)
        self.write_head(200, b"OK", EVENT_FIELDS + self.server.date, UNTIL_CLOSE)
        for _ in self.relay_pieces(echo.events(), events=True):
            pass
        self.open_ended = False

    def forward(self):
        asked, record, backends = self.asked, self.record, self.server.backends
        body, record.asked = self.read_body(), time.monotonic()
        if len(backends.all) > 1 and asked.path == "/v1/models" and asked.method in READING and (
                models := backends.models()):
            return self.reply(200, models)
        request = self.forwarding = BackendRequest(
            asked.method, asked.target, self.fields_for_backend(body), body, self.look_into(body),
            asked.method in READING or asked.method == "POST" and asked.path in REPEATABLE,
            self.settings.backend_timeout)
        self.server.admission.enter(request, record)
        try:
            self.relay(backends.open(request, record))
        finally:
            backends.close(request)
            self.server.admission.leave()

    def look_into(self, body):
        """Return the model that is asked for, or None; note a POST's; raises 400 invalid_json."""
        record, path, model = self.record, self.asked.path, None
        if self.asked.method != "POST":
            return urllib.parse.unquote(path.partition("/v1/models/")[2]) or None
        must_parse = path in PARSED and b"content-encoding" not in self.asked.index
        start = body[:64].lstrip()
        if must_parse or start[:1] == b"{":
            try:
                asked = parse_json(body)
                record.stream, model = asked.get("stream") is True, asked.get("model")
            except APIError:
                if must_parse:
                    raise
        elif start[:2] == b"--":  # a form, with the audio to be transcribed
            field = FORM_MODEL.search(body[:FORM_BYTES]) or FORM_MODEL.search(body[-FORM_BYTES:])
            model = field and field[1].decode("utf-8", "replace")
        if not isinstance(model, str):
            return None
        record.model = model
        return model

    def fields_for_backend(self, body):
        """Return the request's header lines for a backend, but for Host: the client's and ours."""
        asked, record, backends = self.asked, self.record, self.server.backends
        index, before = asked.index, asked.index.get(b"x-forwarded-for")
        host = index.get(b"x-forwarded-host", asked.authority)  # HTTP/1.0 may have none
        return b"".join((
            asked.fields, b"Via: ", backends.via, b"\r\nX-Request-ID: ", record.request_id.encode(),
            b"\r\nX-Forwarded-For: ", before + b", " if before else b"", record.client.encode(),
            b"\r\nX-Forwarded-Proto: ", index.get(b"x-forwarded-proto", self.server.scheme),
            b"\r\n", b"X-Forwarded-Host: %b\r\n" % host if host else b"",
            b"Content-Length: %d\r\n" % len(body) if body or asked.method in WRITING else b"",
            b"Connection: close\r\n" if body and asked.method not in WRITING else b"",
            backends.authorization))

    def relay(self, response):
        """Pass the response on, with fields of our own; raises BackendError if it is not whole."""
        record, head = self.record, response.head
        index, fields = head.index, head.fields
        theirs = index.get(b"x-request-id", index.get(b"x-backend-request-id"))
        if theirs and theirs != record.request_id.encode():
            fields += b"X-Backend-Request-ID: %b\r\n" % theirs
        if b"date" not in index:
            fields += self.server.date
        kind = index.get(b"content-type", b"").lower().replace(b",", b";")  # it may be there twice
        events = kind.partition(b";")[0].rstrip() == b"text/event-stream"
        if events:
            fields += b"".join(line for name, line in UNBUFFERED.items() if name not in index)
        events = events and b"content-encoding" not in index
        if record.method == "HEAD" or head.status in (204, 304):  # tell what a GET would have
            told = index.get(b"content-length", b"") if head.status != 204 else b""
            length = int(told) if told.isdigit() and len(told) < 16 else None
        elif events and response.body is None:  # an error event may have to follow
            length = UNTIL_CLOSE
        else:
            length = response.length
        self.write_head(head.status, head.reason, fields, length, response.body)
        if response.body is not None:
            record.answer = response.body
            return
        steps = self.relay_pieces(
            response.pieces, events, events and response.length == UNTIL_CLOSE)
        try:
            for _ in steps:
                if events:
                    self.server.streams.lend(self, steps)
            self.open_ended = False  # it is whole
        except BackendError as error:
            if self.forwarding.cancelled:
                raise ClientGone from None
            self.server.backends.failed(response.backend, error.message)
            raise

    def relay_pieces(self, pieces, events, unproven=False):
        """Pass each piece of a body on as it comes; note its beginning and end, for the usage.

        Yields True behind each; the next one has to be waited for. Of an event stream, what is
        behind the last whole event is held back: if the backend dies, an error event can follow.
        An `unproven` one is cut if it ends within an event, or without its path's last one.
        """
        tail, self.at_boundary = b"", events
        answer = bytearray(b"\n")  # LAST_EVENT wants the end of a line before it
        wanted = unproven and self.record.status == 200 and LAST_EVENTS.get(self.record.path)
        for piece in pieces:
            if events:
                piece = tail + piece
                end = events_end(piece)
                self.at_boundary = end > 0 or self.at_boundary and len(piece) <= MAX_EVENT_BYTES
                if not self.at_boundary:
                    end = len(piece)  # too long to be held back
                piece, tail = piece[:end], piece[end:]
            if wanted and wanted.search(piece):
                wanted = None
            if piece:
                if self.record.first_piece is None:
                    self.record.first_piece = time.monotonic()
                self.write_piece(piece)
                answer += piece
                del answer[USAGE_BYTES:-USAGE_BYTES]  # its beginning and its end stay
            if self.unsent:
                self.send(b"")  # nothing has come with the head of the response
            yield True
        answer += tail
        if unproven and not LAST_EVENT.search(answer[-USAGE_BYTES:]) and (
                wanted or tail.strip(b"\r\n")
                or not (self.at_boundary or answer.endswith(EVENT_ENDS))):
            raise Broken("closed the connection before the end of its event stream")
        if tail:
            self.write_piece(tail)
        if self.chunked:
            self.send(b"0\r\n\r\n")
        self.record.answer = answer

    def reply(self, status, body=b"", fields=b"", kind=JSON_TYPE):
        """Answer with a body of our own."""
        self.write_head(status, HTTPStatus(status).phrase.encode(),
                        fields + (kind if body else b"") + self.server.date,
                        None if status == 204 else len(body),
                        b"" if self.record.method == "HEAD" else body)

    def write_head(self, status, reason, fields, length, body=None):
        """Send the head of the reply, and with it the body; if that is None, leave it `unsent`: it
        goes out with the first piece, or when that has to be waited for. `length` is that of the
        body, known or not; None for a head that needs no framing.
        """
        record, framing, self.chunked = self.record, b"", False
        if length in (CHUNKED, UNTIL_CLOSE):
            self.chunked, self.open_ended = self.minor == 1, self.minor == 0
            self.reset_at_close(self.open_ended)
            framing = b"Transfer-Encoding: chunked\r\n" if self.chunked else b""
        elif length is not None:
            framing = b"Content-Length: %d\r\n" % length
        if self.close_connection or self.owed or self.open_ended or self.server.draining:
            self.close_connection, framing = True, framing + b"Connection: close\r\n"
        elif not self.minor:
            framing += b"Connection: keep-alive\r\n"
        record.status, record.bytes, record.first = status, len(body or b""), time.monotonic()
        head = b"HTTP/1.1 %d %b\r\n%b%b%bX-Request-ID: %b\r\n\r\n%b" % (
            status, reason, fields, self.cors, framing, record.request_id.encode(), body or b"")
        if body is None:
            self.unsent = head
        else:
            self.send(head)

    def write_piece(self, piece):
        """Write a piece of a body of unknown length, behind its head; an empty one would end it."""
        self.record.bytes += len(piece)
        self.send(b"%x\r\n%b\r\n" % (len(piece), piece) if self.chunked else piece)

    def send(self, data):
        """Send bytes as fast as the client takes them; raises ClientGone if it does not.

        What is `unsent` goes first. While we are `lent`, what is not taken at once is kept so.
        """
        if self.unsent:
            data, self.unsent = self.unsent + data, b""
        try:
            if self.lent:
                with suppress(BlockingIOError):
                    data = data[self.connection.send(data, socket.MSG_DONTWAIT):]
                self.unsent = data
                return
            data = memoryview(data)
            while data:
                data = data[self.send_some(data):]
        except OSError:
            raise ClientGone from None

    def send_some(self, data):
        """Send what the client takes, of TLS a record; return its length; raises OSError if 0."""
        # When its buffer has been full, Linux waits until a third is free: who reads slowly seems
        # to read nothing. So the last word has an attempt that does not wait.
        if self.connection is self.request:
            try:
                return self.connection.send(data)
            except BlockingIOError:
                return self.connection.send(data, socket.MSG_DONTWAIT)
        # TLS has one time-out for both directions and all of a call, and waits before it sends.
        self.patience, data = 0, data[:TLS_RECORD]
        for limit in (0, self.settings.client_timeout, 0):
            with suppress(ssl.SSLWantWriteError, TimeoutError):
                self.connection.settimeout(limit)
                return self.connection.send(data)
        raise TimeoutError

    def fail(self, error):
        """Answer with an error: as JSON, in a begun event stream as an event, else by a cut."""
        record, begun = self.record, self.record.first is not None
        if self.unsent:  # its head is ready, and none of it has gone out
            self.unsent, self.open_ended, begun = b"", False, False
        record.outcome = error.code
        record.result = "cut" if begun else "failed" if error.status >= 500 else "refused"
        if not record.request_id:  # the head was not understood; some of it counts all the same
            head, end, _ = self.buffer.partition(b"\r\n\r\n")
            index = {name.lower(): value for name, value in SALVAGE.findall(head + end[:1])}
            record.request_id = accepted_request_id(index, self.ids)
            record.method = "HEAD" if head.startswith(b"HEAD ") else "-"  # its reply has no body
            if line := REQUEST_LINE.match(head):
                record.method, path = line[1].decode(), line[2].partition(b"?")[0].decode()
                record.path = path if path.startswith("/") else "-"  # there may be a password in it
            self.cors = cors_fields(index.get(b"origin"), self.settings.cors_origins)
        with suppress(ClientGone):
            if not begun:
                return self.reply(error.status, error.body(record.path), error.fields)
            if self.at_boundary:
                self.open_ended = False
                name = b"event: error\n" if record.path.startswith(MESSAGES) else b""
                self.write_piece(name + EVENT % error.body(record.path))
        self.close_connection = True


# == 8. Server =====================================================================================
# Binds, gives each connection to a thread, and refuses those past the limit; one thread relays
# the events of all streams. Workers share one socket, and even out how many connections each has.
# Ten times a second it sweeps, for what nobody else would notice. To stop, it says so at /readyz,
# then takes no more connections and waits for the requests in flight.

SWEEP_SECONDS = 0.1     # a vanished client's backend is stopped within about this
MAX_ACCEPTS = 256       # connections that are accepted before other duties are looked after
YIELD_SECONDS = 0.0005  # for another worker to accept a connection
THREAD_SECONDS = 1      # that a thread waits for a further connection
PARTING_SECONDS = 1     # for a 503 to arrive, a kept connection's last request, the first probes
SWITCH_SECONDS = 5e-5   # for each connection, 0.005 at least: how often a thread asks for the GIL
STACK_BYTES = 4 << 20   # of a thread: with 2 MiB, to write deeply nested JSON kills the process


def schedule(policy):
    """Have the system schedule this thread so, if it knows the policy and lets us.

    Of threads of SCHED_BATCH none interrupts another when it wakes up, only to find the GIL taken:
    a quarter less CPU time at 128 connections with two workers. What must not wait is SCHED_OTHER.
    """
    with suppress(AttributeError, OSError):
        if os.sched_getscheduler(0) in (os.SCHED_OTHER, os.SCHED_BATCH):  # else somebody chose
            os.sched_setscheduler(0, getattr(os, policy), os.sched_param(0))


class Admission:
    """Lets so many requests go to the backends at once; further ones wait, the first one first.

    Invariant: while somebody waits, every place is taken; who leaves hands his place on.
    """

    def __init__(self, places, patience):
        self._free, self._patience = places or sys.maxsize, patience
        self._lock, self.queue = threading.Lock(), []

    def enter(self, request, record):
        """Wait for a place, which leave() gives back; raises 429, or ClientGone if cancelled."""
        with self._lock:
            if self._free:
                self._free -= 1
                return
            request.turn = threading.Event()
            self.queue.append(request)
        began = time.monotonic()
        if not request.cancelled:  # before it had an Event to be woken by
            request.turn.wait(self._patience)
        record.waited += time.monotonic() - began
        with self._lock:
            if request not in self.queue:
                return
            self.queue.remove(request)
        if request.cancelled:
            raise ClientGone
        raise APIError(429, "concurrency_limit", "MAX_CONCURRENT_REQUESTS are in flight; try again",
                       fields=b"Retry-After: 1\r\nretry-after-ms: 1000\r\n")

    def leave(self):
        with self._lock:
            if self.queue:
                self.queue.pop(0).turn.set()
            else:
                self._free += 1


class Streams:
    """Relays the event streams of all connections in one thread, as long as none makes it wait.

    A thread for each would sleep, wake and wait for the GIL at each event: of 32 streams one took
    38 us of CPU so, and takes 30. What else a stream needs (the end, an error, patience with a slow
    client, TLS) is left to the thread of its connection. Only Linux has epoll. Invariant: of the
    handlers in `_lent` this thread alone makes the steps; that of the connection waits for `lent`.
    """

    closed, _epoll = False, None

    def __init__(self):
        self._lock, self._lent = threading.Lock(), {}

    def lend(self, handler, steps):
        """Have the handler's steps made, each when its link has bytes, until one has released the
        link, left bytes unsent (which are sent here) or ended; raises what one raised. Does nothing
        where that cannot be: then the caller makes the next step itself, and waits in it.
        """
        request, link, fault = handler.forwarding, handler.forwarding.link, None
        if not self._epoll or not link or (
                ssl.SSLSocket in (type(link.sock), type(handler.connection))):
            return
        handler.lent, request.flags = SimpleQueue(), socket.MSG_DONTWAIT
        descriptor, link.idle_since = link.sock.fileno(), time.monotonic()
        with suppress(OSError):  # the system watches no more of them
            with self._lock:
                with suppress(FileExistsError):  # the step that released the link is not yet over
                    self._epoll.register(descriptor, select.EPOLLIN)
                self._lent[descriptor] = handler, steps, link
            fault = handler.lent.get()
        handler.lent, request.flags = None, 0
        try:
            if handler.unsent:
                handler.send(b"")
            if fault:
                raise fault
        finally:
            del fault  # as in Backends.open

    def start(self):
        # Not only when the first one comes: there may be no memory for the thread's first line.
        with suppress(AttributeError, OSError, RuntimeError):
            epoll = select.epoll()
            threading.Thread(target=self._run, args=(epoll,), daemon=True).start()
            self._epoll = epoll

    def _run(self, epoll):
        schedule("SCHED_OTHER")
        next_look = 0.0
        while not self.closed:
            with suppress(MemoryError):  # what is ready is so in the next round too
                for descriptor, _ in epoll.poll(SWEEP_SECONDS):
                    self._step(descriptor)
                if time.monotonic() < next_look:
                    continue
                next_look = time.monotonic() + SWEEP_SECONDS
                for descriptor, (*_, link) in list(self._lent.items()):
                    if time.monotonic() - link.idle_since > link.patience:
                        self._step(descriptor)  # finds nothing to receive: BackendTimeout
        self._epoll = epoll.close()

    def _step(self, descriptor):
        loan = self._lent.get(descriptor)
        if not loan:
            return  # it is being lent at this moment
        handler, steps, link = loan
        link.idle_since, fault = time.monotonic(), None
        try:
            if next(steps, False) and handler.forwarding.link and not handler.unsent:
                return  # only its backend is waited for: it stays here
        except BaseException as error:
            fault = error
        while True:
            with suppress(MemoryError):  # the fault must not be lost, nor the handler wait for ever
                with self._lock:
                    if self._lent.get(descriptor) is loan:  # else released since, and lent again
                        del self._lent[descriptor]
                        with suppress(OSError):  # it is closed
                            self._epoll.unregister(descriptor)
                handler.lent.put(fault)
                break
        del fault  # as in Backends.open


class Server(ThreadingHTTPServer):
    """The listening socket, and the connections: a dict of socket to Handler (None at first).

    It is made before any worker is forked: they share the socket, the metrics and the keys, and
    `loads`, the number of connections that each has; `number` is this worker's. In `idle` are the
    queues of threads that wait for a connection; in `parting`, refused ones and when to close them.
    """

    request_queue_size = 4096  # the stock backlog of 5 loses connections in any burst
    allow_reuse_address = os.name == "posix"  # elsewhere it would let two servers share a port
    draining, supervisor, number, date, next_sweep = False, None, 0, b"", 0.0

    def __init__(self, settings):
        self.settings, self.connections, self.streams = settings, {}, Streams()
        self.idle, self.parting = [], []
        self.first_processor = uuid.uuid4().int  # by chance: each container's gateway is process 1
        self.metrics = Metrics(settings.workers, settings.backend_url)
        self.ledger = Ledger(settings, self.metrics)
        self.loads = memoryview(mmap.mmap(-1, 8 * settings.workers)).cast("q")
        self.backends = Backends(settings)
        self.admission = Admission(settings.max_concurrent_requests, settings.queue_timeout)
        self.take_over(*settings.credentials)
        if settings.listen_fd is None:
            self.address_family = socket.getaddrinfo(settings.host, settings.port)[0][0]
        super().__init__((settings.host, settings.port), Handler)

    def reload(self):
        """Read the keys and the certificate again; the old ones stay if that cannot be done."""
        try:
            self.take_over(*read_credentials(self.settings))
            said = "the files with keys and certificates were read again, if there are any"
        except ValueError as error:
            said = f"the old keys and certificate stay: {error}"
        if self.supervisor in (None, os.getpid()):
            note(self.settings, f"SIGHUP: {said}")

    def take_over(self, keys, backend_key, tls):
        self.keys, self.tls = keys, tls
        self.scheme = b"https" if tls else b"http"
        self.not_forwarded = NOT_FORWARDED | (OF_KEYS if keys or backend_key else set())
        if backend_key:
            self.backends.authorization = f"Authorization: Bearer {backend_key}\r\n".encode()

    def server_bind(self):
        """Bind without the stock look-up of the host's name, which takes 35 s if DNS is down."""
        if self.settings.listen_fd is None:
            TCPServer.server_bind(self)
        else:
            self.socket.close()
            self.socket = socket.socket(fileno=self.settings.listen_fd)
            if self.socket.family not in (socket.AF_INET, socket.AF_INET6):
                raise ValueError("it is no TCP socket")
            # systemd lets it block again when it starts another service on it: not for ever.
            set_timeouts(self.socket, SWEEP_SECONDS, SWEEP_SECONDS)
            self.server_address = self.socket.getsockname()
        self.socket.setblocking(False)  # of workers, all are woken; who is late must not wait

    def serve_forever(self, poll_interval=SWEEP_SECONDS):
        """Serve, once the first probes have told who serves what, or have had a second for it."""
        if self.backends.all:
            self.streams.start()
        began = time.monotonic()
        self.service_actions()
        while time.monotonic() < began + PARTING_SECONDS and any(
                backend.probing for backend in self.backends.all):
            time.sleep(0.002)
        while self.socket.fileno() >= 0:
            try:
                return super().serve_forever(poll_interval)
            except Exception:  # no memory, say: the process would live, and accept nothing
                time.sleep(SWEEP_SECONDS)
                note_internal_error(self.settings, "accept")

    def get_request(self):
        """Give all connections that wait to threads; BlockingIOError says that there is no more."""
        for _ in range(MAX_ACCEPTS):  # at once: the threads of some would delay the others
            self.process_request(*self.accept())
        return self.accept()

    def accept(self):
        """Return the next connection and its address; raises OSError."""
        # Of several workers, one that has more connections than another lets it go first: of 128
        # they took 88 and 40, or 65 and 63 with this, and the slowest hundredth took half as long.
        if len(self.loads) > 1 and len(self.connections) > min(self.loads) + 2:
            time.sleep(YIELD_SECONDS)
        try:
            request, address = super().get_request()
        except OSError as error:
            if error.errno in SHORTAGES:  # wait for some, rather than spin
                time.sleep(SWEEP_SECONDS)
            raise
        request.setblocking(True)  # BSDs pass the listener's mode on
        # A thread that waits for the GIL wakes up each 5 ms to ask for it. A thousand do little
        # else, and their slowest hundredth took twice as long: the more, the less often they do.
        sys.setswitchinterval(max(SWITCH_SECONDS * len(self.connections), 0.005))
        return request, address

    def process_request(self, request, client_address):
        """Give a connection to a thread that waits for one, or to a new one; or refuse it."""
        if len(self.connections) < self.settings.max_connections:
            self.connections[request] = None
            connection = request, client_address  # made here: no thread may be taken in vain
            with suppress(RuntimeError, MemoryError):  # the system has no thread left
                try:
                    self.idle.pop().put(connection)
                except IndexError:  # Thread.start() would wait: 0.8 s for 128 connections at once
                    start_new_thread(self.serve, connection)
                self.loads[self.number] = len(self.connections)
                return
            self.connections.pop(request)
        body = APIError(503, "too_many_connections", "the gateway has no room for one more"
                        " connection; try again, or raise MAX_CONNECTIONS").body()
        with self.metrics.lock:  # but no line of the log, which could hold this thread up
            self.metrics.add("gateway_requests_total", 1, "503", "failed")
        with suppress(OSError):
            request.setblocking(False)
            if not self.tls:  # no handshake is done here
                request.send(
                    b"HTTP/1.1 503 Service Unavailable\r\n%b%bContent-Length: %d\r\nRetry-After: 1"
                    b"\r\nX-Request-ID: %b\r\nConnection: close\r\n\r\n%b" % (
                        JSON_TYPE, self.date, len(body), next(request_ids()).encode(), body))
            request.shutdown(socket.SHUT_WR)
        self.parting.append((time.monotonic() + PARTING_SECONDS, request))

    def serve(self, request, address):
        """Serve a connection in this thread, and then those that come soon."""
        # A request with a connection of its own takes 120 us of CPU so, with a new thread 180.
        while True:
            self.process_request_thread(request, address)
            queue = SimpleQueue()
            self.idle.append(queue)
            try:
                request, address = queue.get(timeout=THREAD_SECONDS)
            except Empty:
                with suppress(ValueError):  # process_request has just taken it: a connection comes
                    return self.idle.remove(queue)
                request, address = queue.get()

    def shutdown_request(self, request):
        self.connections.pop(request, None)
        self.loads[self.number] = len(self.connections)
        self.close_request(request)  # the Handler has said that no more comes

    def handle_error(self, request, client_address):
        """Log what escaped a Handler, as one write."""
        note_internal_error(self.settings, f"client={client_address[0]}")

    def service_actions(self):
        try:
            if time.monotonic() >= self.next_sweep:
                self.sweep()
        except Exception:  # it would end serve_forever: a process that lives and accepts nothing
            note_internal_error(self.settings, "sweep")

    def sweep(self):
        """Do what is due: settle, cancel for clients that have gone, set gauges, probe, close."""
        self.next_sweep = time.monotonic() + SWEEP_SECONDS
        self.date = f"Date: {formatdate(usegmt=True)}\r\n".encode()
        if self.ledger.ended or self.ledger.lines:
            with suppress(RuntimeError):  # in a thread, for stderr may stall
                start_new_thread(self.ledger.settle, ())
        forwarding = {handler.connection.fileno(): (handler, request)
                      for handler in list(self.connections.values())
                      if handler and (request := handler.forwarding) and not handler.deaf}
        for handler, request in map(forwarding.get, hung_up(forwarding)):
            if not request.cancelled:
                self.backends.pool.cancel(request)
            elif not handler.open_ended:  # it waits, with its place, for who takes nothing more
                with suppress(OSError):
                    socket.socket.shutdown(handler.connection, socket.SHUT_RDWR)
        waiting, row, places = len(self.admission.queue), self.metrics.row, self.metrics.places
        row[places["gateway_requests_in_flight"][()]] = max(len(forwarding) - waiting, 0)
        row[places["gateway_queue_depth"][()]] = waiting
        for backend in self.backends.all:
            row[places["gateway_backend_up"][backend.url,]] = backend.up
        self.backends.pool.expire()
        self.backends.probe_due()
        if self.supervisor and os.getppid() != self.supervisor:  # it was killed
            os.kill(os.getpid(), signal.SIGTERM)
        while self.parting and (self.parting[0][0] < time.monotonic() or len(self.parting) > 1000):
            self.parting.pop(0)[1].close()

    def readiness(self):
        """Return the status and the JSON of /readyz."""
        backends, now = self.backends.all, time.monotonic()
        up = not backends or any(b.up or (  # no probe brings it back
            not self.settings.probe_interval and b.retry_at <= now) for b in backends)
        status = "draining" if self.draining else "ready" if up else "no backend is up"
        return 200 if status == "ready" else 503, json.dumps({"status": status, "backends": [
            {"url": b.url, "up": b.up, "in_flight": b.in_flight,
             "models": None if b.models is None else list(b.models)} for b in backends]}).encode()

    def drain(self):
        """Stop listening and wait until the requests in flight have ended; tell whether they did.

        For DRAIN_DELAY all goes on, but /readyz says 503 and each reply `Connection: close`. Then
        connections made before are still answered, and those that are idle for PARTING_SECONDS are
        closed: the next request of one that was not told may be under way.
        """
        self.draining, patience = True, self.settings.shutdown_timeout
        time.sleep(self.settings.drain_delay)
        began = time.monotonic()
        self.shutdown()
        with suppress(OSError):  # of an empty queue; with listen_fd, a successor accepts the rest
            while self.settings.listen_fd is None and time.monotonic() < began + PARTING_SECONDS:
                self.process_request(*self.get_request())
        self.server_close()
        while self.connections and time.monotonic() < began + patience:
            before = time.monotonic() - min(PARTING_SECONDS, patience / 2)
            for handler in list(self.connections.values()):
                if handler and (handler.idle_since or before) < before:
                    handler.deaf = True  # to poll() this looks as if the client had left
                    with suppress(OSError):  # below any TLS; what has arrived can still be read
                        socket.socket.shutdown(handler.connection, socket.SHUT_RD)
            self.service_actions()
            time.sleep(SWEEP_SECONDS / 10)
        for handler in list(self.connections.values()):  # these are cut off
            if handler and (record := handler.record):
                self.ledger.end(record, outcome="shutdown_timeout", result="cut",
                                request_id=record.request_id or next(request_ids()))
        self.streams.closed = not self.connections
        return not self.connections


def hung_up(descriptors):
    """Return those whose peer has closed its connection, or its half, as nginx and Go see it."""
    if not hasattr(select, "poll"):  # Windows: it is noticed when something is sent
        return []
    poller = select.poll()
    for descriptor in descriptors:
        if descriptor >= 0:
            # macOS tells of POLLHUP only who asks for it (poll_nocancel in its sys_generic.c).
            poller.register(descriptor, getattr(select, "POLLRDHUP", select.POLLHUP))
    return [descriptor for descriptor, _ in poller.poll(0)]


# == 9. Processes ==================================================================================
# With one worker, this process serves. With several, it forks them and only watches: it is the one
# to signal. A worker that dies is replaced; one that dies within a second of its start would do so
# for ever, so the service stops. The first signal to stop has no handler: signals are blocked in
# all threads, and the main thread waits for them. (A handler may run just before the thread goes to
# sleep, and the signal is lost.) A worker whose supervisor is gone stops as if it had been told to.

STOP = {signal.SIGTERM, signal.SIGINT}
CAN_WAIT = hasattr(signal, "sigwait")  # not on Windows: there Ctrl-C raises KeyboardInterrupt
DRAINING = "draining: requests in flight may finish; a second signal ends them at once"


def awaited(settings):
    """Return the signals to wait for; a closed terminal's SIGHUP ends what has no file to read."""
    files = settings.api_keys_file or settings.backend_api_key_file or settings.tls_cert_file
    return STOP | {signal.SIGHUP} if files or not os.isatty(0) else STOP


def work(server):
    """Serve until told to stop, and drain; return the exit status."""
    # Threads of Python take turns: on several processors each turn wakes another one. A request
    # took 93 us of CPU at 16 connections, and takes 55; the slowest 1% of 128 took 1 s, and 20 ms.
    with suppress(AttributeError, OSError):  # only Linux has it, and a sandbox may forbid it
        if server.settings.cpu_affinity:
            allowed, place = sorted(os.sched_getaffinity(0)), server.first_processor + server.number
            os.sched_setaffinity(0, {allowed[place % len(allowed)]})
    schedule("SCHED_BATCH")
    try:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    except RuntimeError:
        note(server.settings, "the system starts no thread: raise its limits on them; or a"
             " container's runtime is too old for the image")
        return 1
    with suppress(KeyboardInterrupt):
        while CAN_WAIT and signal.sigwait(awaited(server.settings)) not in STOP:
            server.reload()
        while not CAN_WAIT:  # Event.wait() does not hear Ctrl-C there before Python 3.14
            time.sleep(1)
    if not server.supervisor:
        for number in STOP:  # process 1 of a container would ignore them without a handler
            signal.signal(number, lambda number, _: os._exit(128 + number))
        if CAN_WAIT:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)
        note(server.settings, DRAINING)
    if not server.drain():
        note(server.settings,
             f"SHUTDOWN_TIMEOUT is over; connections that were open: {len(server.connections)}")
    server.ledger.settle(NOTE_SECONDS)
    return 0


def start_workers(server, workers):
    """Fork the workers that are missing; `workers` is {process id: (number, time of its start)}."""
    for number in {*range(server.settings.workers)} - {number for number, _ in workers.values()}:
        try:
            pid = os.fork()
        except OSError as error:
            return note(server.settings, f"no worker can start: {error.strerror}; trying again")
        if not pid:
            try:
                server.metrics.row = server.metrics.rows[number]
                server.number, server.loads[number] = number, 0
                os._exit(work(server))
            except BaseException:
                note_internal_error(server.settings, f"worker {number}")
                os._exit(1)
        workers[pid] = number, time.monotonic()


def reap(workers):
    """Forget the workers that have ended; yield of each its age in seconds and its fate."""
    for pid, (number, started) in list(workers.items()):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            del workers[pid]
            code = os.waitstatus_to_exitcode(status)
            fate = f"ended with {code}" if code >= 0 else f"died: {signal.strsignal(-code)}"
            yield time.monotonic() - started, f"worker {number} (pid {pid}) {fate}"


def weigh(workers):
    """Give a session of our own the weight of 2, 4, 8 ... programs, up to `workers`, if root."""
    # Linux divides its processors between sessions, and what one gets between its processors: of
    # two workers each had the half of what its backend has. Interrupted within a request, it goes
    # on with other threads, which find the GIL taken. At 128 connections four took 65 us of CPU a
    # request and take 58, and their slowest hundredth took 42 ms and takes 14.
    with suppress(OSError):
        if os.getsid(0) == os.getpid():  # else it is that of a shell, and of all that it starts
            with open("/proc/self/autogroup", "w", encoding="ascii") as file:
                file.write(f"{-3 * (workers.bit_length() - 1)}")  # -3 of nice: twice the weight


def supervise(server):
    """Keep WORKERS processes at work until a signal to stop; return the exit status."""
    settings, workers, status, deadline = server.settings, {}, 0, None
    gc.freeze()  # what the collector does not touch, the workers share: 3 MiB each
    if settings.cpu_affinity:
        weigh(settings.workers)
    signals, server.supervisor = awaited(settings) | {signal.SIGCHLD, signal.SIGALRM}, os.getpid()

    def stop(signum):
        server.server_close()
        for pid in workers:
            os.kill(pid, signum)  # those that have ended are zombies still
        return time.monotonic() + settings.drain_delay + settings.shutdown_timeout + LINGER_SECONDS

    while workers or not deadline:
        if not deadline:
            start_workers(server, workers)
        signal.alarm(1)  # for a fork to be tried again, or a deadline to be seen
        signum = signal.sigwait(signals)
        if signum in STOP and not deadline:
            note(settings, DRAINING)
            deadline = stop(signal.SIGTERM)
        elif signum in STOP or deadline and time.monotonic() > deadline:
            note(settings, "stopped at once")
            status = status or (128 + signum if signum in STOP else 0)
            deadline = stop(signal.SIGKILL)
        elif signum == signal.SIGHUP:
            server.reload()  # for those that are started later
            for pid in workers:
                os.kill(pid, signum)
        for age, fate in reap(workers):
            if not deadline and age < 1:
                note(settings, f"{fate} within a second of its start: the service stops")
                status, deadline = 3, stop(signal.SIGTERM)
            elif not deadline:
                note(settings, f"{fate}; another one replaces it")
    return status


# == 10. main ======================================================================================
# Exit status: 0 after a drain, 1 for no address, 2 for a bad setting, 3 if a worker died at once.


def prepare_descriptors():
    """Have 0, 1 and 2 open, or a socket would get the log, and take as many more as are allowed."""
    traceback.format_stack()  # loads what it needs: later there may be no descriptor left for that
    while (descriptor := socket.socket().detach()) <= 2:  # a bare chroot has no /dev/null
        pass
    socket.close(descriptor)
    with suppress(OSError):  # if another program has made its pipe so, lines would be lost
        os.set_blocking(2, True)
    with suppress(ImportError, OSError, ValueError):  # the soft limit is often 1,024: 512 requests
        import resource  # not on Windows
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def start_up_line(server):
    """Return the line that says where the gateway listens and what it does; it holds no secret."""
    host, port = server.server_address[:2]
    address = f"{server.scheme.decode()}://{f'[{host}]' if ':' in host else host}:{port}"
    line, workers = f"gateway.py {__version__} listening on {address}", server.settings.workers
    line += f" with {workers} workers" if workers > 1 else ""
    if not server.backends.all:
        here = address.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
        example = EXAMPLE.replace("http://127.0.0.1:8080", here)
        example += " -H 'Authorization: Bearer KEY'" if server.keys else ""
        return f"{line} in echo mode; try: {example}{' -k' if server.tls else ''}"
    return f"{line}, forwarding to " + ", ".join(
        backend.url + (f" by the proxy {backend.proxy[0]}" if backend.proxy else "")
        for backend in server.backends.all)


def main():
    """Run the gateway until SIGTERM or SIGINT; return the exit status, or the error if it is 1."""
    settings = read_settings(sys.argv[1:], os.environ)
    if CAN_WAIT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # who started us may have ignored it
        signal.pthread_sigmask(signal.SIG_BLOCK,
                               awaited(settings) | {signal.SIGCHLD, signal.SIGALRM})
    prepare_descriptors()
    threading.stack_size(STACK_BYTES)
    try:
        server = Server(settings)
    except (OSError, ValueError) as error:
        where = f"{printable(settings.host)} port {settings.port}" if (
            settings.listen_fd is None) else "the socket of LISTEN_FDS"
        return (f"gateway.py: cannot listen on {where}:"
                f" {getattr(error, 'strerror', None) or error}; set HOST and PORT")
    line = start_up_line(server)
    note(settings, line) if settings.log_format == "json" else log(line)
    return supervise(server) if settings.workers > 1 else work(server)


if __name__ == "__main__":
    sys.exit(main())
