"""The gateway's tests: real sockets, real processes, real faults. Sections mirror gateway.py.

Most tests run the server in this process on a free port (`serve`), so that leaked threads, sockets
and exceptions are seen; those about the command line, signals and limits start it as a user would
(`Process`). Malformed input is written as bytes. No test sleeps for a fixed time: `eventually`
waits for a condition, a backend that plays a script waits for the test.
"""

import base64
import contextlib
import gzip
import itertools
import json
import os
import re
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import types
import uuid
from pathlib import Path

import pytest

import gateway

HERE = Path(__file__).parent
gateway.log = lambda line: None  # of this process; fixtures and Process see what is logged
SECONDS = 20  # how long anything may take before a test fails: generous, for slow and busy machines
CHAT = b'{"model": "m", "messages": [{"role": "user", "content": "Hello, world!"}]}'
STREAM = CHAT[:-1] + b', "stream": true}'


# -- helpers ---------------------------------------------------------------------------------------


def eventually(condition, seconds=SECONDS):
    """Wait until `condition()` is true and return its value; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {condition}"
        time.sleep(0.005)
    return value


class Reply:
    """A parsed reply: status, reason, fields as (lower-case name, value) pairs, body, pieces.

    `cut` tells that the connection ended before the body was whole; `pieces` are the chunks.
    """

    def __init__(self, head):
        line, *lines = head.decode("latin-1").split("\r\n")
        self.version, status, self.reason = line.split(" ", 2)
        self.status, self.body, self.cut, self.pieces = int(status), b"", False, []
        fields = (line.partition(":") for line in lines)
        self.fields = [(name.lower(), value.strip()) for name, _, value in fields]

    def all(self, name):
        """Return the values of all fields of that name."""
        return [value for key, value in self.fields if key == name.lower()]

    def one(self, name):
        """Return the value of the one field of that name."""
        values = self.all(name)
        assert len(values) == 1, f"{name}: {values} in {self.fields}"
        return values[0]

    def json(self):
        return json.loads(self.body)

    def error(self):
        """Return the error of an error reply, after checking that it has OpenAI's shape."""
        assert self.one("content-type") == "application/json"
        error = self.json()["error"]
        assert sorted(error) == ["code", "message", "param", "type"] and error["message"]
        return error

    def events(self):
        """Return the data of the server-sent events, JSON decoded but for [DONE]."""
        assert not self.body or self.body.endswith(b"\n\n")
        data = [event.removeprefix(b"data: ") for event in self.body.split(b"\n\n")[:-1]]
        return [d.decode() if d == b"[DONE]" else json.loads(d) for d in data]


class Client:
    """A client on a raw socket, which reads as strictly as it can."""

    def __init__(self, port, host="127.0.0.1"):
        self.socket = socket.create_connection((host, port), SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)
        return self

    def more(self):
        """Read some more bytes; tell whether any came before the end (or the reset)."""
        try:
            data = self.socket.recv(65536)
        except ConnectionError:
            data = b""
        self.buffer += data
        return bool(data)

    def until(self, text):
        """Read until `text` has come; return and consume all up to its end."""
        while text not in self.buffer:
            assert self.more(), f"ended before {text!r}: {self.buffer!r}"
        before, _, self.buffer = self.buffer.partition(text)
        return before + text

    def head(self):
        """Read the head of a reply."""
        return Reply(self.until(b"\r\n\r\n")[:-4])

    def chunk(self):
        """Read one chunk of a chunked body; b"" is the last one."""
        size = int(self.until(b"\r\n"), 16)
        while len(self.buffer) < size + 2:
            assert self.more(), "ended in a chunk"
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        assert self.buffer.startswith(b"\r\n")
        self.buffer = self.buffer[2:]
        return data

    def reply(self, method="GET"):
        """Read a reply that may have been cut off."""
        reply = self.head()
        if method == "HEAD" or reply.status in (204, 304) or reply.status < 200:
            return reply
        assert len(reply.all("content-length")) + len(reply.all("transfer-encoding")) <= 1
        if reply.all("transfer-encoding"):
            assert reply.one("transfer-encoding") == "chunked"
            try:
                while piece := self.chunk():
                    reply.pieces.append(piece)
            except AssertionError:
                reply.cut = True
            reply.body = b"".join(reply.pieces)
        elif reply.all("content-length"):
            length = int(reply.one("content-length"))
            while len(self.buffer) < length and self.more():
                pass
            reply.body, self.buffer = self.buffer[:length], self.buffer[length:]
            reply.cut = len(reply.body) < length
        else:
            while self.more():
                pass
            reply.body, self.buffer = self.buffer, b""
        return reply

    def is_closed(self):
        """Wait for the end of the connection; fail if anything more comes."""
        ended = not self.more()
        return ended and not self.buffer

    def vanish(self):
        """Leave without a word, as a killed process does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def request(method="POST", path="/v1/chat/completions", body=b"", *lines, version="1.1"):
    """Return a request as bytes: Host and Content-Length are added, `lines` are further fields."""
    head = [f"{method} {path} HTTP/{version}", "Host: test", *lines]
    if body or method == "POST":
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def ask(port, method="POST", path="/v1/chat/completions", body=b"", *lines, version="1.1"):
    """Send one request on a connection of its own and return the reply."""
    with Client(port) as client:
        client.send(request(method, path, body, *lines, version=version))
        return client.reply(method)


class Played:
    """One connection to a PlayedBackend, as its script sees it."""

    def __init__(self, backend, sock):
        self.backend, self.socket, self.buffer = backend, sock, b""

    def request(self):
        """Read a request; return (head, body), or None at the end of the connection."""
        while b"\r\n\r\n" not in self.buffer:
            data = self.socket.recv(65536)
            if not data:
                return None
            self.buffer += data
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        length = re.search(rb"(?im)^content-length: *(\d+)", head)
        length = int(length[1]) if length else 0
        while len(self.buffer) < length:
            data = self.socket.recv(65536)
            assert data, "the request's body was cut off"
            self.buffer += data
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        self.backend.requests.append((head, body))
        return head, body

    def send(self, data):
        self.socket.sendall(data)

    def wait_for_end(self):
        """Wait until the gateway closes the connection; return when it did (time.monotonic)."""
        with contextlib.suppress(ConnectionError):
            while self.socket.recv(65536):
                pass
        self.backend.ended.append(time.monotonic())

    def reset(self):
        """Close with RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


class PlayedBackend:
    """A backend whose connections are played by `script(played, number)`, each in a thread.

    The connection closes when the script returns. `requests` are all that it read, as (head, body);
    `connections` counts; `ended` has the times at which wait_for_end saw the gateway close.
    """

    def __init__(self, script):
        self.script, self.requests, self.ended, self.connections = script, [], [], 0
        self.failures, self.threads, self.sockets = [], [], []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        self.acceptor = threading.Thread(target=self._accept)
        self.acceptor.start()
        return self

    def _accept(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            sock.settimeout(SECONDS * 2)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections += 1
            self.sockets.append(sock)
            thread = threading.Thread(target=self._play, args=(sock, self.connections))
            self.threads.append(thread)
            thread.start()

    def _play(self, sock, number):
        with sock:
            try:
                self.script(Played(self, sock), number)
            except ConnectionError:
                pass
            except Exception as error:
                self.failures.append(error)

    def __exit__(self, kind, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.acceptor.join(SECONDS)
        for sock in self.sockets:  # whatever is still waited for ends now
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(SECONDS)
            assert not thread.is_alive()
        assert kind or not self.failures, self.failures


def answers(*replies):
    """Return a script that answers the requests of each connection with these bytes, the last again
    and again, and keeps the connection open."""
    def script(played, number):
        for reply in [*replies, *[replies[-1]] * 10_000]:
            if not played.request():
                return
            played.send(reply)
    return script


def response(body=b'{"ok": true}', status="200 OK", *lines):
    """Return a response with a Content-Length as bytes."""
    head = [f"HTTP/1.1 {status}", "Content-Type: application/json", *lines,
            f"Content-Length: {len(body)}"]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


STREAM_HEAD = (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
               b"Transfer-Encoding: chunked\r\n\r\n")


def chunked(*pieces, end=True):
    """Return the pieces as chunks, with the last chunk if `end`."""
    return b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n" * end


def dead_address():
    """Return the URL of an address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return f"http://127.0.0.1:{sock.getsockname()[1]}"


@contextlib.contextmanager
def serve(**knobs):
    """Run a gateway in this process, on a free port; yields its Server, which ends empty."""
    knobs = {"port": 0, "probe_interval": 0, **knobs}
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in knobs.items()]
    server = gateway.Server(gateway.read_settings(argv, {}))
    server.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        drained = server.drain(SECONDS)
        thread.join(SECONDS)
        if server.backends:
            for links in server.backends.pool._idle.values():
                for link in links:
                    link.sock.close()
        for _, sock in server.parting:
            sock.close()
    assert drained, f"connections were left over: {server.connections}"


class Process:
    """A gateway (or the mock backend) as a process of its own; its stderr is collected in `log`."""

    def __init__(self, *argv, script="gateway.py", python=(sys.executable,), **environ):
        kept = ("PATH", "HOME", "TMPDIR")
        clean = {name: os.environ[name] for name in kept if name in os.environ}
        clean["PROBE_INTERVAL"] = "0"  # a played backend expects no probe
        self.process = subprocess.Popen(
            [*python, str(HERE / script), *argv], stdin=subprocess.DEVNULL, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**clean, **environ})
        self.lines, self.pid = [], self.process.pid
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    @property
    def log(self):
        return "\n".join(self.lines)

    @property
    def port(self):
        """The port that the start-up line names."""
        return int(eventually(lambda: re.search(r"http://[^ ]*?:(\d+)", self.log))[1])

    def wait(self):
        """Wait for the end and return the exit status."""
        status = self.process.wait(SECONDS * 2)
        self.reader.join(SECONDS)
        return status

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.reader.join(SECONDS)
        self.process.stdout.close()
        self.process.stderr.close()


class Log:
    """The log of the gateways in this process, with the one method of capfd that is used here.

    capfd itself truncates its file when it reads, and loses a line that a thread writes just then.
    """

    def __init__(self):
        self.text, self.seen = "", 0

    def write(self, line):
        self.text += line.encode("ascii", "backslashreplace").decode() + "\n"

    def readouterr(self):
        text, self.seen = self.text[self.seen:], len(self.text)
        return types.SimpleNamespace(err=text)


@pytest.fixture
def capfd(monkeypatch):
    """What is logged from here on."""
    log = Log()
    monkeypatch.setattr(gateway, "log", log.write)
    return log


def log_of(capfd):
    """Return the log lines that the gateway in this process has written since the last call."""
    return capfd.readouterr().err.splitlines()


@pytest.fixture(autouse=True)
def nothing_leaks():
    """Fail a test that leaves a thread or a descriptor behind."""
    threads, descriptors = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    yield
    eventually(lambda: set(threading.enumerate()) <= threads)
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= len(descriptors))


@pytest.fixture(scope="module")
def echo():
    """The port of a gateway in echo mode."""
    with serve() as server:
        yield server.port


# -- helpers for the tests without a backend -------------------------------------------------------

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: t\r\n\r\n"
OK = {"status": "ok"}


def run(*argv, **environ):
    """Run a gateway that ends by itself; return its exit status, stdout and lines of stderr."""
    with Process(*argv, **environ) as process:
        return process.wait(), process.process.stdout.read(), process.lines


def drip(client, data, pause, size=1):
    """Send `data` in small pieces, `pause` seconds apart, until all is sent or a reply has come."""
    for at in range(0, len(data), size):
        client.send(data[at:at + size])
        if select.select([client.socket], [], [], pause)[0]:
            return


def is_new(identity):
    """Tell whether this is a request id that the gateway made."""
    return re.fullmatch("[0-9a-f-]{36}", identity) and uuid.UUID(identity).version == 4


@pytest.fixture
def log(monkeypatch):
    """The lines of the log so far. (Reading capfd truncates its file: what comes then is lost.)"""
    lines, write = [], gateway.log
    monkeypatch.setattr(gateway, "log", lambda line: lines.append(line) or write(line))
    return lines


def lines_of(log, number=1):
    """Wait for the log lines of `number` requests; fail if there are more."""
    eventually(lambda: len(log) >= number)
    assert len(log) == number, log
    return log


def message(role, content):
    return {"role": role, "content": content}


def chat(content, **more):
    """Return the body of a request with one message."""
    return json.dumps({"messages": [message("user", content)], **more}).encode()


def said(reply):
    """Return the text of a completion, streamed or not."""
    if reply.one("content-type") == "application/json":
        return reply.json()["choices"][0]["message"]["content"]
    return "".join(event["choices"][0]["delta"].get("content", "") for event in reply.events()[:-1])


# -- 1. Settings -----------------------------------------------------------------------------------

KNOBS = [[cell.strip(" `") for cell in row.strip("|").split(" | ")]
         for row in gateway.settings_table().splitlines()[2:]]  # variable, flag, default, sentence

BAD_SETTINGS = {
    "PORT": ("abc", "99999", "-1", "8_0", " 80", "80\n80", "\u0663", "9" * 5000),
    "BACKEND_URL": (
        "localhost:8000", "127.0.0.1", "ftp://h/v1", "file:///etc", "http://", "http://h:99999",
        "http://h:0x50", "http://[::1", "http://h/a b", "http://h?a=b", "http://h\nx",
        "http://h,ftp://h", ",x",
        "http://user:s3cret@h/v1", "http://s3cret@h", "user:s3cret@h"),
    "CLIENT_TIMEOUT": ("nan", "0", "inf", "-1", "1e9"), "CONNECT_TIMEOUT": ("5s",),
    "BACKEND_TIMEOUT": ("0.0",), "SHUTDOWN_TIMEOUT": ("soon",), "MAX_CONNECTIONS": ("0",),
    "LOG_FORMAT": ("xml", "JSON"), "MAX_BODY_BYTES": ("-1", "1e6", "64MB")}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_SETTINGS.items() for value in values])
def test_a_bad_setting_is_one_line_that_names_it(name, value, capsys):
    flag = "--" + name.lower().replace("_", "-")
    for argv, environ in (([f"{flag}={value}"], {}), ([], {name: value})):
        with pytest.raises(SystemExit) as end:
            gateway.read_settings(argv, environ)
        out, err = capsys.readouterr()
        assert end.value.code == 2 and not out and err.endswith("\n") and err.count("\n") == 1
        assert (name in err or flag in err) and "s3cret" not in err


@pytest.mark.parametrize(("argv", "environ", "statuses", "named"), [
    ((), {"PORT": "abc"}, (2,), "port"),
    (("--backend-url=http://user:s3cret@h",), {}, (2,), "backend-url"),
    (("--no-such-flag",), {}, (2,), "--no-such-flag"),
    (("--backend_url=http://user:s3cret@h",), {}, (2,), "--backend_url"),  # no flag: mistyped
    ((), {"HOST": "no-such-host.invalid"}, (1,), "no-such-host.invalid"),
    ((), {"HOST": "a..b"}, (1, 2), "host"),  # no name at all: getaddrinfo raises a UnicodeError
    ((), {"HOST": "\udcff"}, (1, 2), "host"),
])
def test_a_start_that_fails_is_one_line_and_no_traceback(argv, environ, statuses, named):
    status, out, lines = run(*argv, **{"PORT": "0", **environ})
    assert status in statuses and len(lines) == 1 and not out
    assert named in lines[0].lower() and "s3cret" not in lines[0]


def test_a_taken_port_is_one_line_and_exit_status_1():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        status, _, (line,) = run(PORT=str(port := sock.getsockname()[1]))
    assert status == 1 and str(port) in line and "PORT" in line


def test_flags_win_over_the_environment_and_that_over_the_default():
    read = gateway.read_settings
    assert read([], {}).port == 8080 and read([], {"PORT": "1"}).port == 1
    assert read(["--port", "2"], {"PORT": "1"}).port == 2
    assert read([], {"PORT": "", "LOG_FORMAT": "", "BACKEND_URL": ""}) == read([], {})  # unset
    assert {name: default for name, _, default, _ in KNOBS} == {
        "HOST": "127.0.0.1", "PORT": "8080", "BACKEND_URL": "", "MAX_BODY_BYTES": str(64 << 20),
        "MAX_CONNECTIONS": "2000", "CLIENT_TIMEOUT": "60", "CONNECT_TIMEOUT": "5",
        "BACKEND_TIMEOUT": "600", "SHUTDOWN_TIMEOUT": "30", "LOG_FORMAT": "text", "API_KEYS": "",
        "API_KEYS_FILE": "", "BACKEND_API_KEY": "", "BACKEND_API_KEY_FILE": "", "ALLOW_OPEN": "0",
        "MAX_CONCURRENT_REQUESTS": "0", "QUEUE_TIMEOUT": "0", "PROBE_INTERVAL": "10",
        "DRAIN_DELAY": "0", "WORKERS": "1", "TLS_CERT_FILE": "", "TLS_KEY_FILE": "",
        "CORS_ORIGINS": ""}


def test_help_lists_every_knob_with_its_variable_its_default_and_a_sentence():
    status, out, lines = run("--help")
    text = "".join(out.split())  # argparse wraps lines where it likes
    assert status == 0 and not lines
    for variable, flag, default, sentence in KNOBS:
        about = text.split(flag + variable)[-1]
        assert about.startswith("".join(sentence.split()))
        assert f"environment:{variable};default:{default or 'none'})" in about.partition("--")[0]
    assert re.fullmatch(r"gateway\.py \d+\.\d+\.\d+\n", run("--version")[1])


def test_the_readme_has_the_settings_table_that_the_program_makes():
    assert gateway.settings_table() in (HERE / "README.md").read_text()


@pytest.mark.parametrize("options", ((), ("-I", "-S")))
def test_echo_mode_starts_with_one_line_whose_curl_command_works(options):
    """PORT=0 takes a free port, which the line names."""
    with Process(PORT="0", python=(sys.executable, *options)) as process:
        address = f"http://127.0.0.1:{process.port}"
        assert process.port and len(process.lines) == 1
        assert address in process.log and "echo" in process.log
        url, body = re.search("curl ([^ ]+) -d '(.*)'", process.log).groups()
        assert url == f"{address}/v1/chat/completions"
        assert said(ask(process.port, body=body.encode())) == "Echo: Hello, world!"


@pytest.mark.parametrize(("proxy", "named"), [
    ("http://user:s3cret@proxy.example:3128", "proxy.example:3128"),
    ("http://user:s3cret@[::1", "HTTP_PROXY")])  # a mistake; only what is forwarded fails by it
def test_forward_mode_starts_with_one_line_that_names_backend_and_proxy_but_no_secret(proxy, named):
    with Process(
            "--port=0", BACKEND_URL="http://backend.example/sub/v1", http_proxy=proxy) as process:
        assert ask(process.port, "GET", "/healthz").status == 200
        assert "http://backend.example/sub" in process.lines[0] and named in process.lines[0]
        assert "s3cret" not in process.log and "Traceback" not in process.log
        assert all(" 200 GET /healthz " in line for line in process.lines[1:])


# -- 6. Echo ---------------------------------------------------------------------------------------


def test_a_completion_has_exactly_the_fields_of_the_contract(echo):
    reply = ask(echo, body=b'{"messages":[{"role":"user","content":"Hello, world!"}]}')
    answer = reply.json()
    assert reply.status == 200 and reply.one("content-type") == "application/json"
    assert type(answer["created"]) is int and abs(answer["created"] - time.time()) < SECONDS
    assert answer == {
        "id": reply.one("x-request-id"), "object": "chat.completion", "created": answer["created"],
        "model": "echo", "choices": [{
            "index": 0, "message": message("assistant", "Echo: Hello, world!"), "logprobs": None,
            "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}}


@pytest.mark.parametrize("options", (None, {}, {"include_usage": False}, {"include_usage": True}))
def test_a_stream_has_exactly_the_chunks_of_the_contract(echo, options):
    reply = ask(echo, body=chat("Hello, world!", model="m", stream=True, stream_options=options))
    *chunks, done = reply.events()
    assert reply.status == 200 and reply.one("content-type").startswith("text/event-stream")
    assert reply.one("x-accel-buffering") == "no" and reply.one("cache-control") == "no-cache"
    assert len(reply.pieces) == len(chunks) + 1  # each in its own write
    created = chunks[0]["created"]
    assert type(created) is int and abs(created - time.time()) < SECONDS and done == "[DONE]"
    base = {"id": reply.one("x-request-id"), "object": "chat.completion.chunk", "model": "m",
            "created": created}
    expected = [base | {"choices": [{
        "index": 0, "delta": delta, "logprobs": None, "finish_reason": None if delta else "stop"}]}
        for delta in (message("assistant", ""), {"content": "Echo: "}, {"content": "Hello, "},
                      {"content": "world!"}, {})]
    if options and options.get("include_usage"):
        expected = [chunk | {"usage": None} for chunk in expected] + [base | {
            "choices": [],
            "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}}]
    assert chunks == expected


TEXT, IMAGE = {"type": "text", "text": "a b"}, {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(("messages", "text", "tokens"), [
    ([message("system", "be brief"), message("user", "one"), message("assistant", "two words"),
      message("user", "three"), message("tool", "four")], "three", 7),  # the last user message
    ([message("system", "be"), message("assistant", "it is")], "it is", 3),  # else the last one
    ([message("user", [TEXT, IMAGE, {"type": "text", "text": "c"}])], "a bc", 2),
    ([message("user", [])], "", 0), ([message("user", None)], "", 0), ([{"role": "user"}], "", 0),
    ([{"content": "x"}], "x", 1),
    ([message("user", " \n a\tb\r\n\u00a0c ")], " \n a\tb\r\n\u00a0c ", 3),
    ([message("user", "\u00fc \U0001f600 \x00")], "\u00fc \U0001f600 \x00", 3),
])
def test_the_last_user_message_is_echoed_and_words_are_counted(echo, messages, text, tokens):
    reply = ask(echo, body=json.dumps({"messages": messages}).encode())
    completion = 1 + len(text.split())
    assert said(reply) == "Echo: " + text and reply.json()["usage"] == {
        "prompt_tokens": tokens, "completion_tokens": completion,
        "total_tokens": tokens + completion}
    body = json.dumps({"messages": messages, "stream": True}).encode()
    assert said(ask(echo, body=body)) == "Echo: " + text


def test_the_model_comes_back_as_asked_and_lone_surrogates_as_escapes(echo):
    for model in ("gpt-x", "a \"b\" \u20ac\r\n", "m" * 10_000, "\udfff"):
        for stream in (False, True):
            reply = ask(echo, body=chat("\ud800", model=model, stream=stream))
            assert said(reply) == "Echo: \ud800" and json.dumps(model).encode() in reply.body
    assert ask(echo, body=chat("x", model=None)).json()["model"] == "echo"


@pytest.mark.parametrize(("body", "code", "param"), [
    ({}, "missing_required_parameter", "messages"),
    ({"messages": None}, "missing_required_parameter", "messages"),
    *(({"messages": value}, "invalid_type", "messages") for value in ("hi", {"a": 1}, 0, False)),
    ({"messages": []}, "empty_array", "messages"),
    ({"messages": ["hi"]}, "invalid_type", "messages[0]"),
    ({"messages": [message("user", "x"), None]}, "invalid_type", "messages[1]"),
    *(({"messages": [message("user", value)]}, "invalid_type", "messages[0].content")
      for value in (5, {}, [{"type": "text"}], [{"type": "text", "text": 5}])),
    *(({"messages": [message([], "x")], name: value}, "invalid_type", name)
      for name, value in (("model", 5), ("stream", "yes"), ("stream_options", 1))),
])
def test_a_request_of_the_wrong_shape_is_told_which_field_is_wrong(echo, body, code, param):
    with Client(echo) as client:
        reply = client.send(request(body=json.dumps(body).encode())).reply()
        error = reply.error()
        assert (reply.status, error["type"], error["code"], error["param"]) == (
            400, "invalid_request_error", code, param)
        assert client.send(request(body=CHAT)).reply().status == 200  # the connection goes on


@pytest.mark.parametrize("body", [
    b"", b"hello", b"{", b'{"messages": [}', b"{'messages': []}", CHAT + b"x", CHAT[:-1] + b",}",
    b"[]", b"null", b'"text"', b"5", b"\xef\xbb\xbf" + CHAT, b"\xff" + CHAT,
    *(CHAT.decode().encode(name) for name in ("utf-16", "utf-16-le", "utf-32")),
    *(CHAT.replace(b"Hello", text) for text in (b"\xe9", b"\xed\xa0\x80", b"\n", b"\\x")),
    *(b'{"messages": %b}' % text for text in (b"NaN", b"Infinity", b"[-Infinity]", b"9" * 5000)),
    b"[" * 100_000 + b"]" * 100_000], ids=lambda body: f"{body[:24]}{len(body)}")
def test_what_is_no_json_object_is_refused(echo, body):
    with Client(echo) as client:
        reply = client.send(request(body=body)).reply()
        assert (reply.status, reply.error()["code"]) == (400, "invalid_json")
        assert reply.error()["type"] == "invalid_request_error"
        assert client.send(request(body=CHAT)).reply().status == 200


def test_deep_nesting_kills_no_process():
    """The threads of a real gateway have smaller stacks than those of this test's process."""
    with Process("--port=0") as process:
        for begin, end in ((b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")):
            for body in (begin * 100_000 + b"1" + end * 100_000, begin * 300_000,
                         b'{"messages": %b1%b}' % (begin * 100_000, end * 100_000)):
                assert ask(process.port, body=body).error()["code"] == "invalid_json"
        assert ask(process.port, body=CHAT).status == 200


def test_models_and_health_are_given(echo):
    model = ask(echo, "GET", "/v1/models/echo").json()
    assert (model["id"], model["object"]) == ("echo", "model")
    assert type(model["created"]) is int and type(model["owned_by"]) is str
    assert ask(echo, "GET", "/v1/models").json() == {"object": "list", "data": [model]}
    for reply in (ask(echo, "GET", "/healthz?a=b"), ask(echo, "GET", "/healthz", b"a body")):
        assert (reply.status, reply.json()) == (200, OK)
        assert reply.one("content-type") == "application/json"


# -- 7. Handler: methods, paths and request ids ----------------------------------------------------


@pytest.mark.parametrize("path", ("/healthz", "/v1/models", "/v1/models/echo", "/nothing"))
def test_head_has_the_fields_of_get_and_no_body(echo, path):
    with Client(echo) as client:
        got = client.send(request("GET", path)).reply()
        reply = client.send(request("HEAD", path)).reply("HEAD")
        assert client.send(HEALTH).reply().status == 200  # not a byte lay between
    assert (reply.status, reply.reason) == (got.status, got.reason)
    assert reply.one("content-length") == got.one("content-length")
    assert [name for name, _ in reply.fields] == [name for name, _ in got.fields]


@pytest.mark.parametrize(("status", "allow", "method", "paths"), [
    *((405, "POST, OPTIONS", method, "/v1/chat/completions") for method in (
        "GET", "HEAD", "PUT", "post", "M-SEARCH!#$%&'*+.^_`|~")),
    *((405, "GET, HEAD, OPTIONS", method, "/healthz /v1/models /v1/models/echo") for method in (
        "POST", "DELETE", "TRACE", "get", "dispatch", "__class__")),
    (204, "POST, OPTIONS", "OPTIONS", "/v1/chat/completions"),
    (204, "GET, HEAD, OPTIONS", "OPTIONS", "/healthz /v1/models"),
    (204, "GET, HEAD, POST, OPTIONS", "OPTIONS", "*"),
    (404, None, "GET", "/ /v1 /v1/ /v1/files /v1/models/x /healthz/ //v1/models /%00"),
    (404, None, "POST", "/v1/embeddings /chat/completions /v1/chat/completions/"),
    (404, None, "OPTIONS", "/nothing"), (404, None, "finish", "/nothing")])
def test_unknown_methods_and_paths_are_refused(echo, status, allow, method, paths):
    with Client(echo) as client:
        for path in paths.split():
            reply = client.send(request(method, path, b"a body")).reply(method)
            assert reply.status == status
            assert [set(methods.split(", ")) for methods in reply.all("allow")] == (
                [set(allow.split(", "))] if allow else [])
            if method != "HEAD" and status != 204:
                assert reply.error()["code"] == (
                    "unknown_url" if status == 404 else "method_not_allowed")
                assert reply.error()["type"] == "invalid_request_error"
            assert client.send(HEALTH).reply().json() == OK  # the body was read


@pytest.mark.parametrize(("fields", "accepted"), [
    (["X-Request-ID: abc"], "abc"), (["x-request-id:abc"], "abc"), (["X-Request-Id: \t a \t"], "a"),
    (["X-Request-ID: " + "a" * 128], "a" * 128), (["X-Request-ID: !,;=\"\\~"], "!,;=\"\\~"),
    (["Request-Id: b"], "b"), (["REQUEST-ID: " + "b" * 128], "b" * 128),
    (["Request-Id: b", "X-Request-ID: a"], "a"), (["X-Request-ID: a", "Request-Id: b"], "a"),
    *((fields, None) for fields in (
        [], ["X-Request-ID:"], ["X-Request-ID: " + "a" * 129], ["X-Request-ID: a b"],
        ["X-Request-ID: a\tb"], ["X-Request-ID: \xe9"], ["X-Request-ID: a", "X-Request-ID: b"],
        ["X-Request-ID: a", "X-Request-ID: a"], ["Request-Id: a b"], ["Request_Id: a"]))])
def test_an_id_of_1_to_128_visible_characters_is_kept_else_one_is_made(
        echo, fields, accepted, log):
    reply = ask(echo, "POST", "/v1/chat/completions", CHAT, *fields)
    identity = reply.one("x-request-id")
    assert identity == accepted if accepted else is_new(identity)
    assert reply.json()["id"] == identity and f"id={identity} " in lines_of(log)[0]


LINE = b"GET /healthz HTTP/1.1\r\n"
GET = LINE + b"Host: t\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\n"
CHUNKS = POST + b"Transfer-Encoding: chunked\r\n\r\n"
TOO_LARGE = POST + b"Content-Length: 99999999999\r\n\r\n"


@pytest.mark.parametrize(("status", "data"), [
    (200, request(body=CHAT)), (200, request(body=STREAM)), (200, HEALTH),
    (200, request("HEAD", "/healthz")), (204, request("OPTIONS", "/healthz")),
    (200, request("GET", "/healthz", version="1.0")), (404, request("GET", "/")),
    (400, request(body=b"{")), (405, request("GET", "/v1/chat/completions")), (413, TOO_LARGE),
    (400, LINE + b"\r\n"), (400, LINE + b"no colon\r\nHost: t\r\n\r\n"), (400, LINE + b"A: t\n\n"),
    (400, b"GET  /healthz HTTP/1.1\r\n\r\n"), (400, GET + b"A: \0\r\n"), (400, CHUNKS + b"x\r\n"),
    (400, POST + b"Content-Length: -1\r\n\r\n"), (417, GET + b"Expect: magic\r\n\r\n"),
    (414, b"GET /%b HTTP/1.1\r\nHost: t\r\n\r\n" % (b"a" * 20_000)),
    (431, GET + b"A: b\r\n" * 100 + b"\r\n"), (431, GET + b"A: %b\r\n\r\n" % (b"b" * 70_000)),
    (501, POST + b"Transfer-Encoding: gzip\r\n\r\n"), (505, b"GET / HTTP/2.0\r\nHost: t\r\n\r\n"),
], ids=lambda value: repr(value)[-50:])
def test_every_reply_has_one_request_id_even_if_the_head_is_broken(echo, status, data, log):
    line, _, rest = data.partition(b"\r\n")
    method = line.partition(b" ")[0].decode()
    with Client(echo) as client:
        reply = client.send(data).reply(method)
        assert reply.status == status and is_new(reply.one("x-request-id")) and reply.one("date")
    with Client(echo) as client:
        reply = client.send(line + b"\r\nX-Request-ID: mine\r\n" + rest).reply(method)
        assert reply.status == status and reply.one("x-request-id") == "mine"
    assert sum("id=mine " in line for line in lines_of(log, 2)) == 1


@pytest.mark.parametrize("head", (LINE + b"no colon\r\n\r\n", b"GET /healthz\r\n\r\n"))
def test_an_id_behind_a_broken_head_is_not_that_head_s(echo, head):
    """It stands in other bytes: a body, or a request that will never be looked at."""
    with Client(echo) as client:
        reply = client.send(head + GET + b"X-Request-ID: other\r\n\r\n").reply()
        assert reply.status == 400 and is_new(reply.one("x-request-id"))


# -- 3. HTTP rules: what is refused ----------------------------------------------------------------


def each(template, values):
    """Return the template filled with each of the values, which are separated by bars."""
    return [template % value for value in values.split(b"|")]


MALFORMED = {
    (400, "bad_request"): [
        # A length in doubt: RFC 9112, 6.2 and 6.3
        *each(POST + b"Content-Length: %b\r\n\r\nhello", b"+5|-5|-0|5,5|5, 5|5 5|0x5|5_0|1e1|5.0|"
              b"|five|\x0b5|5\x0c|5;|\xb2|\xa05|'5'|" + b"9" * 30),
        *each(POST + b"Content-Length: 5\r\n%b\r\n\r\nhello",
              b"Content-Length: 5|Content-Length: 6|content-length: 0|Transfer-Encoding: chunked"),
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        *each(POST + b"Transfer-Encoding: %b\r\n\r\n0\r\n\r\n",
              b"chunked, gzip|chunked, chunked|chunked,identity|\x0bchunked"),
        *each(CHUNKS[:-2] + b"Transfer-Encoding: %b\r\n\r\n0\r\n\r\n", b"chunked|identity"),
        CHUNKS.replace(b"1.1", b"1.0") + b"0\r\n\r\n",
        # Lines that are no fields: 2.2 and 5
        *each(POST + b"%b: 5\r\n\r\nhello", b"Content-Length |Content-Length\t| Content-Length"),
        *each(GET + b"%b\r\n\r\n", b"A: b\r\n c|A: b\r\n\tc|A: b\r\n |A: b\nC: d|A: b\rC: d|A: b\r"
              b"|\r|: b|:|A|garbage|A\r\nB: c|GET / HTTP/1.1|A: b\n|A\0: b|A: b\r\n\0"),
        *each(GET + b"A: b%bc\r\n\r\n", b"\0|\1|\x08|\x0b|\x0c|\x1b|\x1f|\x7f"),
        *each(GET + b"%b: c\r\n\r\n", b"A B|A\xe9|A(B)|\"A\"|A/B|A[0]|{A}|A,B|A@|A;|A=|A\\"),
        *each(LINE + b"%bHost: t\r\n\r\n", b" |\t|\r|\n|\tA: b\r\n| A: b\r\n"), GET + b"\n",
        LINE + b"Host: t\n\r\n", HEALTH.replace(b"\r\n", b"\n"), LINE[:-2] + b"\nHost: t\r\n\r\n",
        # Host is there once and valid: 3.2
        LINE + b"\r\n", LINE + b"A: b\r\n\r\n", b"GET http://t/healthz HTTP/1.1\r\n\r\n",
        *each(GET + b"%b\r\n\r\n", b"Host: t|host: u"),
        *each(LINE + b"Host: %b\r\n\r\n", b"|a b|a/b|a,b|u@h|u:p@h|h:port|h:1:2|h:-1|h:123456|::1"
              b"|[::1|[zz]|[]|:80|h#|h?|h\\|<h>|\xe9|http://h"),
        # Request lines: 2.3 and 3
        *each(b"GET /healthz %b\r\nHost: t\r\n\r\n",
              b"HTTP/1|HTTP/1.|HTTP/1.10|HTTP/1.1.1|HTTP/11|HTTP/a.b|http/1.1|HTTP /1.1|HTTP/ 1.1"
              b"|HTTP/1.1 | HTTP/1.1|HTTP/+1.1|H/1.1|\xc8TTP/1.1|z HTTP/1.1||\xa0HTTP/1.1"),
        *each(b"%b HTTP/1.1\r\nHost: t\r\n\r\n",
              b"GET|GET |/healthz| GET /healthz|GET  /healthz|GET\t/healthz|GET\x0b/healthz"
              b"|GET\x0c/healthz|GET\x85/healthz|GET\xa0/healthz|GET /health\xe9|GET /health\0"
              b"|G(T /healthz|GET: /healthz|G\xcbT /healthz|GET /healthz\t"),
        *each(b"%b\r\n\r\n", b"GET /healthz|GET|HTTP/1.1 200 OK|SSH-2.0-OpenSSH_9.6|\r"),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\0", b"\n" + HEALTH,
        # Targets: 3.2
        *each(b"GET %b HTTP/1.1\r\nHost: t\r\n\r\n",
              b"healthz|*|?a|t:80|ftp://t/healthz|http:/healthz|http:///healthz|http://t:x/healthz"
              b"|http://u:p@t/healthz|http://u@t/healthz|/healthz#a|/healthz?a#b|http://t/healthz#a"
              b"|/..|/.|/v1/../healthz|/v1/./models|/v1/models/..|/v1/..?a|http://t/v1/../healthz"
              b"|/v1/..\\healthz|/v1/%2e%2e/healthz|/v1/.%2E/healthz|/v1/%2e/models"
              b"|/v1/..%2fhealthz|/v1/..%5Chealthz|/v1%2F../healthz"),
        # Chunks: 7.1
        *each(CHUNKS + b"%b\r\nhello\r\n0\r\n\r\n",
              b"x||-5|+5|0x5|5_0| 5|5 |5\t|5,|5 5|5\n|5\r|;a|5;a\n|5;a\0|5;a\rb|\xb5|" + b"f" * 16),
        *each(CHUNKS + b"%b\r\n\r\n",
              b"5\r\nhello|5\r\nhello\n0|5\r\nhell|5\r\nhelloworld|5\r\nhello\r|5\nhello|0\n|0\r\nA"
              b"|0\r\nA : b|0\r\nA: b\r\n c|0\r\n: b|0\r\nA: b\n|0\r\nA: \0|0\r\nA B: c"),
        CHUNKS + b"5;" + b"a" * 5000, CHUNKS + b"0\r\nA: " + b"b" * 70_000],
    (501, "not_implemented"): each(POST + b"Transfer-Encoding: %b\r\n\r\n0\r\n\r\n",
                                   b"|gzip|gzip, chunked|identity|xchunked|chunked;a=b|'chunked'"),
    (505, "http_version_not_supported"): [
        *each(b"GET /healthz HTTP/%b\r\nHost: t\r\n\r\n", b"0.9|2.0|3.1"),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
    (414, "uri_too_long"): [b"GET /%b HTTP/1.1\r\nHost: t\r\n\r\n" % (b"a" * 20_000)],
    (431, "request_header_fields_too_large"): [
        GET + b"A: b\r\n" * 100 + b"\r\n", GET + b"A: %b\r\n\r\n" % (b"b" * 65_536),
        GET + b"A: %b\r\n" % (b"b" * 1000) * 80 + b"\r\n"]}


@pytest.mark.parametrize("bytewise", (False, True), ids=("whole", "bytewise"))
@pytest.mark.parametrize(
    ("data", "expected"), [(data, answer) for answer, rows in MALFORMED.items() for data in rows],
    ids=lambda value: repr(value)[-50:])
def test_what_is_malformed_is_refused_and_what_follows_is_never_executed(
        echo, data, expected, bytewise, log):
    """Whether it comes whole or a byte at a time."""
    with Client(echo) as client:
        split = len(data) if bytewise and len(data) < 1000 else 0
        for at in range(split):
            client.send(data[at:at + 1])
        reply = client.send(data[split:] + HEALTH).reply()
        assert (reply.status, reply.error()["code"]) == expected
        assert reply.error()["type"] == "invalid_request_error"
        assert reply.one("connection") == "close" and is_new(reply.one("x-request-id"))
        assert client.is_closed()
    assert f" {expected[0]} " in (line := lines_of(log)[0]) and line.endswith(f" {expected[1]}")


@pytest.mark.parametrize("data", [
    b"G", LINE, GET, GET + b"\r", GET[:-1],
    *(request(body=CHAT)[:-left] for left in (1, len(CHAT), len(CHAT) + 2)),
    *(CHUNKS + chunked(CHAT)[:-left] for left in (1, 2, 5, 6, len(CHAT)))])
def test_a_request_that_is_cut_off_is_never_executed(echo, data, log):
    with Client(echo) as client:
        client.send(data).socket.shutdown(socket.SHUT_WR)
        reply = client.reply()
        assert (reply.status, reply.error()["code"]) == (400, "bad_request")
        assert client.is_closed()
    assert " 400 " in lines_of(log)[0]


# -- 3. HTTP rules: what is served -----------------------------------------------------------------


@pytest.mark.parametrize("head", [
    b"\r\n\r\n\r\n" + GET, GET.replace(b" t", b"t"), GET.replace(b"1.1", b"1.2"),
    *each(GET.replace(b"/healthz", b"%b"),
          b"http://other.example:80/healthz|HTTPS://[::1]/healthz?a=b|/healthz?%%2e%%2e/../"
          b"|/healthz?" + b"a" * (8000 - len(b"GET /healthz? HTTP/1.1"))),
    *each(LINE + b"Host: %b\r\n", b"t:80|t:|127.0.0.1:8080|[::1]:80|a_b.c-d.example.|%7e~"),
    *each(GET + b"%b\r\n", b"A:\r\nB: \xe9\t\xff|!#$%&'*+-.^_`~09azAZ: b|Content-Length: 000"
          b"|Connection: x, , TE|Upgrade: h2c\r\nConnection: upgrade|A: " + b"b" * 60_000),
    GET + b"A: b\r\n" * 99], ids=lambda head: repr(head)[-50:])
def test_what_is_well_formed_is_served_and_the_connection_kept(echo, head):
    with Client(echo) as client:
        for _ in range(2):
            assert client.send(head + b"\r\n").reply().json() == OK


@pytest.mark.parametrize(("version", "connection", "kept"), [
    ("1.1", "x", True), ("1.1", "keep-alive", True), ("1.1", "closed", True),
    ("1.1", "close", False), ("1.1", "CLOSE", False), ("1.1", "keep-alive, close", False),
    ("1.1", "x ,\tClose", False), ("1.0", "x", False), ("1.0", "keep-alive", True),
    ("1.0", "x, Keep-Alive", True), ("1.0", "keep-alive, close", False), ("1.0", "close", False)])
def test_connection_is_a_list_of_tokens_that_says_whether_to_go_on(echo, version, connection, kept):
    field = f"Connection: {connection}"
    with Client(echo) as client:
        reply = client.send(request("GET", "/healthz", b"", field, version=version)).reply()
        if kept:
            assert reply.all("connection") == (["keep-alive"] if version == "1.0" else [])
            assert client.send(HEALTH).reply().json() == OK
        else:
            assert reply.one("connection") == "close" and client.is_closed()


def test_a_client_of_http_1_0_needs_no_host_and_gets_neither_chunks_nor_100_continue(echo):
    with Client(echo) as client:
        client.send(b"POST /v1/chat/completions HTTP/1.0\r\nConnection: keep-alive\r\n"
                    b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(STREAM))
        drip(client, STREAM, 0.01, 40)
        reply = client.reply()
        assert reply.one("connection") == "close"
        assert not reply.all("transfer-encoding") and not reply.all("content-length")
        assert said(reply) == "Echo: Hello, world!" and reply.events()[-1] == "[DONE]"


def test_pipelined_requests_are_answered_in_order(echo):
    with Client(echo) as client:
        client.send(b"".join(request(
            "POST", "/v1/chat/completions", chat(f"number {n}", stream=n % 3 == 0),
            f"X-Request-ID: {n}") for n in range(300)))
        for n in range(300):
            reply = client.reply()
            assert (reply.one("x-request-id"), said(reply)) == (str(n), f"Echo: number {n}")


@pytest.mark.parametrize("line", ("POST /nothing", "POST /healthz", "GET /healthz", "PUT /v1/x"))
def test_a_body_that_nobody_asked_for_is_no_request(echo, line, log):
    with Client(echo) as client:
        client.send(request(*line.split(), HEALTH)).reply()
        last = client.send(request("GET", "/healthz", b"", "X-Request-ID: last")).reply()
        assert last.one("x-request-id") == "last"
    lines_of(log, 2)


CHUNKED_BODY = (
    b'7;a="b;c" ;d\r\n{"messa\r\n00029 \t;e\r\nges": [{"role": "user", "content": "hello\r\n'
    b'4\r\n"}]}\r\n00;last\r\nTrailer-Name: value\r\nContent-Length: 99\r\n\r\n')


def test_a_chunked_body_is_the_same_wherever_it_is_split(echo):
    data = CHUNKS + CHUNKED_BODY
    with Client(echo) as client:
        for at in range(len(CHUNKS) - 4, len(data) + 1):
            drip(client, data[:at], 0.001, at)
            assert said(client.send(data[at:] + HEALTH).reply()) == "Echo: hello"
            assert client.reply().json() == OK
        drip(client, data, 0)
        assert said(client.reply()) == "Echo: hello"


@pytest.mark.parametrize(
    "framing", (b"Content-Length: %d" % len(CHAT), b"Transfer-Encoding: chunked"))
def test_a_client_that_expects_100_continue_gets_it_before_its_body_is_read(echo, framing):
    head = POST + framing + b"\r\nExpect: 100-Continue\r\n\r\n"
    body = chunked(CHAT) if b"chunked" in framing else CHAT
    with Client(echo) as client:
        for _ in range(2):
            assert client.send(head).head().status == 100
            assert client.send(body).reply().status == 200
    with Client(echo) as client:  # one that does not wait
        reply = client.send(head + body).reply()
        assert (client.reply() if reply.status == 100 else reply).status == 200


@pytest.mark.parametrize(("status", "head"), [
    (404, b"POST /nothing HTTP/1.1\r\nHost: t\r\nContent-Length: 9\r\n"),
    (405, b"PUT /healthz HTTP/1.1\r\nHost: t\r\nContent-Length: 9\r\n"),
    (413, POST + b"Content-Length: 99999999999\r\n"),
    (400, POST + b"Content-Length: 1\r\nContent-Length: 2\r\n"),
    (417, POST + b"Content-Length: 1\r\nExpect: more\r\n")])
def test_what_will_be_refused_is_refused_without_100_continue(echo, status, head):
    """The client may send the body then or not: the connection cannot be used again."""
    with Client(echo) as client:
        reply = client.send(head + b"Expect: 100-continue\r\n\r\n").reply()
        assert reply.status == status and reply.error()["message"]
        assert reply.one("connection") == "close" and client.send(HEALTH).is_closed()


# -- 8. Server: limits -----------------------------------------------------------------------------


def test_a_body_may_have_max_body_bytes_and_not_one_more():
    def framings(body):
        yield request(body=body)
        yield CHUNKS + chunked(body[:9], body[9:])
    with serve(max_body_bytes=len(CHAT)) as server:
        for good, bad in zip(framings(CHAT), framings(CHAT + b" ")):
            with Client(server.port) as client:
                assert client.send(good).reply().status == 200
                reply = client.send(bad).reply()
                assert (reply.status, reply.error()["code"]) == (413, "request_too_large")
                assert reply.one("connection") == "close" and client.is_closed()


@pytest.mark.parametrize(
    "head", (POST + b"Content-Length: 50000000\r\n\r\n", CHUNKS + b"2faf080\r\n"))
def test_a_refused_upload_can_be_sent_whole_before_the_413_is_read(head):
    """Closing with bytes unread would reset the connection, and destroy the reply."""
    with serve(max_body_bytes=1000) as server, Client(server.port) as client:
        client.send(head)
        for _ in range(50):
            client.send(bytes(1_000_000))
        reply = client.reply()
        assert (reply.status, reply.error()["code"], reply.cut) == (413, "request_too_large", False)


def test_a_connection_past_the_limit_gets_503_and_there_is_room_again_later():
    with serve(max_connections=2) as server, Client(server.port) as first:
        with Client(server.port) as second:
            for client in (first, second):
                assert client.send(HEALTH).reply().status == 200
            for data in (b"", HEALTH, request(body=CHAT)):
                with Client(server.port) as third:
                    reply = third.send(data).reply()
                    assert reply.status == 503 and reply.error()["type"] == "server_error"
                    assert reply.one("connection") == "close" and reply.one("retry-after")
                    assert is_new(reply.one("x-request-id")) and third.is_closed()
            assert first.send(HEALTH).reply().status == 200
        eventually(lambda: ask(server.port, "GET", "/healthz").status == 200)


def test_requests_that_stall_or_come_a_byte_at_a_time_get_408(log):
    cases = ((b"G", b""), (GET, b""), (GET + b"A: ", b"a"), (CHUNKS + b"2\r\n", b""),
             (POST + b"Content-Length: 9\r\n\r\n", b""),
             (POST + b"Content-Length: 9000\r\n\r\n", b" "),
             (CHUNKS, b"1\r\n \r\n"), (CHUNKS + b"0\r\nA: ", b"a"))
    with serve(client_timeout=0.5) as server, contextlib.ExitStack() as stack:
        waiting = {stack.enter_context(Client(server.port)).send(begin): more
                   for begin, more in cases}
        for at in range(1000):  # of 20 ms each
            for client in list(waiting):
                if select.select([client.socket], [], [], 0.02 / len(waiting))[0]:
                    reply = client.reply()
                    assert (reply.status, reply.error()["code"]) == (408, "request_timeout")
                    assert reply.error()["type"] == "invalid_request_error"
                    assert reply.one("connection") == "close" and client.is_closed()
                    del waiting[client]
                elif more := waiting[client]:
                    client.send(more[at % len(more):][:1])
        assert not waiting
    assert all(" 408 " in line for line in lines_of(log, len(cases)))


def test_a_slow_but_steady_body_outlives_the_timeout():
    body = chat("a " * 5000)
    with serve(client_timeout=1) as server, Client(server.port) as client:
        drip(client.send(request(body=body)[:-len(body)]), body, 0.1, 400)
        assert client.reply().status == 200


def test_an_idle_connection_is_closed_without_a_word(log):
    with (serve(client_timeout=2) as server, Client(server.port) as new,
          Client(server.port) as used):
        assert used.send(HEALTH).reply().status == 200
        assert new.is_closed() and used.is_closed()
    lines_of(log)


@pytest.mark.parametrize("leave", (False, True))
def test_empty_lines_are_no_request_and_get_no_reply(leave, log):
    """Old clients send one behind a body; a 408 for it would be taken for the next answer."""
    with serve(client_timeout=2) as server, Client(server.port) as client:
        assert client.send(HEALTH + b"\r\n").reply().status == 200
        if leave:
            client.socket.shutdown(socket.SHUT_WR)
        assert client.is_closed()
    lines_of(log)


def test_200_clients_that_send_a_byte_at_a_time_delay_nobody():
    is_over = threading.Event()

    def send_on(slow):
        for byte in GET + b"A: " + b"a" * 30_000:
            for client in slow:
                client.send(bytes([byte]))
            if is_over.wait(0.05):
                return
    with Process("--port=0") as process, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(Client(process.port)) for _ in range(200)]
        thread = threading.Thread(target=send_on, args=(slow,))
        thread.start()
        began = time.monotonic()
        try:
            for _ in range(20):
                assert ask(process.port, body=CHAT).status == 200
        finally:
            is_over.set()
            thread.join()
        assert time.monotonic() - began < SECONDS


# -- 4. Observability ------------------------------------------------------------------------------

RECORD = {"time": str, "request_id": str, "trace_id": str, "client": str, "key": str,
          "method": str, "path": str, "status": int, "model": str, "backend": str, "stream": bool,
          "bytes": int, "first_byte_ms": float, "duration_ms": float, "outcome": str}
SECRETS = ("Authorization: Bearer s3cret", "X-Api-Key: s3cret", "Cookie: a=s3cret")


@pytest.mark.parametrize("stream", (False, True))
def test_a_line_of_the_log_has_every_field_and_no_secret(stream, log):
    asked = ("POST", "/v1/chat/completions?key=s3cret", chat("s3cret", model="m", stream=stream),
             "X-Request-ID: i", *SECRETS)
    with serve(log_format="json") as server:
        reply = ask(server.port, *asked)
        line = lines_of(log)[0]
    record = json.loads(line)
    assert {name: type(value) for name, value in record.items()} == RECORD and "s3cret" not in line
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record["time"])
    assert 0 <= record["first_byte_ms"] <= record["duration_ms"]
    del record["time"], record["first_byte_ms"], record["duration_ms"]
    assert record == {
        "request_id": "i", "trace_id": "-", "key": "-", "client": "127.0.0.1",
        "method": "POST", "path": "/v1/chat/completions",
        "status": 200, "model": "m", "backend": "-", "stream": stream, "bytes": len(reply.body),
        "outcome": "ok"}
    with serve(log_format="text") as server:
        reply = ask(server.port, *asked)
        line = lines_of(log, 2)[1]
    assert "s3cret" not in line and len(re.findall(r" (?:first=)?[\d.]+ms\b", line)) == 2
    assert set(line.split()) > {
        "200", "POST", "/v1/chat/completions", f"bytes={len(reply.body)}", "model=m", "backend=-",
        "client=127.0.0.1", "id=i", f"stream={'yes' if stream else 'no'}", "ok"}


@pytest.mark.parametrize("form", ("text", "json"))
def test_no_input_can_break_a_line_of_the_log(form):
    odd = "a\r\nb\x1b[31m\u2028\x85\x00 \"c\" id=d \u20ac\ud800\\"
    with Process("--port=0", LOG_FORMAT=form) as process:
        port = process.port
        replies = [
            ask(port, body=chat("x", model=odd)), ask(port, body=chat("x", model="")),
            ask(port, "GET", "/%0d%0a%1b[31m\"\\'<>", b"", "X-Request-ID: \"\\\"'\\n%0a"),
            ask(port, "a'b|c", "/v1/models", b"", "X-Request-ID: \xe9"),
            ask(port, "GET", "/a\x1bb\x85c"), ask(port, "GET", "/a b\r c")]
        eventually(lambda: len(process.lines) > len(replies))
        lines, statuses = process.lines[1:], [reply.status for reply in replies]
    assert statuses == [200, 200, 404, 405, 400, 400] and len(lines) == len(replies)
    assert all(re.fullmatch("[ -~]+", line) for line in lines)
    if form == "json":
        records = {record["request_id"]: record for record in map(json.loads, lines)}
        assert statuses == [records[reply.one("x-request-id")]["status"] for reply in replies]
    else:
        assert sorted(int(line.split()[1]) for line in lines) == sorted(statuses)


@pytest.mark.parametrize("form", ("text", "json"))
def test_a_line_of_the_log_is_short_enough_for_a_pipe_to_take_it_whole(form, log):
    """POSIX: writes of up to PIPE_BUF bytes, 4,096 on Linux, are not mixed with others."""
    with serve(log_format=form) as server:
        ask(server.port, "GET", "/" + "\"" * 15_000, b"", "X-Request-ID: " + "\"" * 128)
        ask(server.port, "M" * 15_000, "/")
        ask(server.port, body=chat("x", model="\U0001f600" * 5000))
        assert max(map(len, lines_of(log, 3))) < select.PIPE_BUF


@pytest.mark.parametrize("redirection", ("2>&-", "<&- >&- 2>&-", "2> >(head -n1 >&2)"))
def test_without_a_reader_of_the_log_requests_are_served_and_no_line_reaches_a_client(redirection):
    """The number of a closed stderr would go to the next socket that is opened."""
    port = int(dead_address().rpartition(":")[2])
    shell = ("bash", "-c", f'exec "$0" "$@" {redirection}', sys.executable)

    def connected():
        with contextlib.suppress(ConnectionRefusedError):
            return Client(port)
    with Process(f"--port={port}", python=shell) as process, contextlib.ExitStack() as stack:
        eventually(lambda: not process.reader.is_alive())  # it is closed, or the pipe is broken
        clients = [stack.enter_context(eventually(connected)) for _ in range(4)]
        for client in clients * 2:
            assert client.send(HEALTH).reply().json() == OK
        for client in clients:
            client.socket.shutdown(socket.SHUT_WR)
            assert client.is_closed()


# -- 9. main: life ---------------------------------------------------------------------------------


def begin(process, client):
    """Send a request without its body; return when the gateway waits for that."""
    client.send(POST + b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % len(CHAT))
    assert client.head().status == 100


def stop(process, number=signal.SIGTERM):
    """Send a signal; return when new connections are refused."""
    def is_refused():
        try:
            Client(process.port).socket.close()
        except ConnectionError:
            return True
    os.kill(process.pid, number)
    eventually(is_refused)


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_lets_the_request_in_flight_finish_and_exits_0(number):
    with Process("--port=0") as process, Client(process.port) as client:
        begin(process, client)
        stop(process, number)
        reply = client.send(CHAT).reply()
        assert reply.status == 200 and reply.one("connection") == "close" and client.is_closed()
        assert process.wait() == 0 and " 200 POST /v1/chat/completions" in process.log


def test_a_signal_is_heard_while_connections_come_and_what_was_sent_before_it_is_answered():
    """Starting a thread can take a signal from the main thread, which has to be woken all the same;
    and connections may still be in the listening socket's queue."""
    for _ in range(6):
        with Process("--port=0") as process, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Client(process.port)) for _ in range(20)]
            for client in clients:
                client.send(HEALTH)
            os.kill(process.pid, signal.SIGTERM)
            with contextlib.suppress(ConnectionError):
                for _ in range(20):
                    stack.enter_context(Client(process.port)).send(HEALTH)
            assert [client.reply().status for client in clients] == [200] * 20
            stack.close()
            assert process.wait() == 0


@pytest.mark.parametrize(("patience", "again", "statuses"), [
    ("0.2", False, (0,)), ("3600", True, (128 + signal.SIGTERM, -signal.SIGTERM))])
def test_shutdown_timeout_or_a_second_signal_cuts_what_does_not_finish(patience, again, statuses):
    with Process("--port=0", SHUTDOWN_TIMEOUT=patience) as process, Client(process.port) as client:
        begin(process, client)
        stop(process)
        if again:
            os.kill(process.pid, signal.SIGTERM)
        assert client.is_closed() and process.wait() in statuses
        assert ("SHUTDOWN_TIMEOUT" in process.log) is not again and "Traceback" not in process.log


def test_idle_connections_do_not_delay_the_exit_and_are_closed_without_a_word():
    with (Process("--port=0", SHUTDOWN_TIMEOUT="3600", CLIENT_TIMEOUT="3600") as process,
          Client(process.port) as new, Client(process.port) as used):
        assert used.send(HEALTH).reply().status == 200
        os.kill(process.pid, signal.SIGTERM)
        assert new.is_closed() and used.is_closed() and process.wait() == 0


def test_two_thousand_requests_leave_nothing_behind():
    data = [request(body=CHAT), request(body=STREAM), HEALTH, request("GET", "/nothing"),
            request(body=b"{"), CHUNKS + chunked(CHAT)] * 7

    def work(port):
        with Client(port) as client:
            client.send(b"".join(data))
            for _ in data:
                client.reply()
        for bad in (GET + b"no colon\r\n\r\n", TOO_LARGE):
            with Client(port) as client:
                assert client.send(bad).reply().status in (400, 413)
        Client(port).send(request(body=CHAT)[:-5]).vanish()

    with Process("--port=0") as process:
        def count(what):
            return len(os.listdir(f"/proc/{process.pid}/{what}"))

        def memory():
            return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096
        assert ask(process.port, "GET", "/healthz").status == 200
        eventually(lambda: count("task") == 2)  # the main thread, and that of the listening socket
        descriptors = count("fd")
        for rounds in (15, 50):
            before = memory()
            for _ in range(rounds):
                work(process.port)
            eventually(lambda: (count("task"), count("fd")) == (2, descriptors))
        assert memory() - before < 2 << 20


# -- helpers for the tests with a backend ----------------------------------------------------------

ID = "req-1"
OK_HEAD = b"HTTP/1.1 200 OK\r\n\r\n"  # of a body that ends by closing
CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
INTERIM = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
DONE = b"data: [DONE]\n\n"
LOGIN = "Basic " + base64.b64encode(b"user:pa@ss").decode()  # to a proxy

# Made for these tests alone; valid from 2020 to 2120 for localhost, backend.test and 127.0.0.1.
KEY_AND_CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgbdt3OA3j28ne99pLTEC8F48gIJbCOD7YNZYWpy08mpyhRANC
AARNRYOCIggphZUXxYhLlU3kTglcZSmStXgPMzMYo8nMS5jFwXHon351fe42vgubF4MxPhWfp39U0f/ZUuUswEOy
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBejCCASGgAwIBAgIBATAKBggqhkjOPQQDAjAPMQ0wCwYDVQQDDAR0ZXN0MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAx
MDAwMDAwWjAPMQ0wCwYDVQQDDAR0ZXN0MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAETUWDgiIIKYWVF8WIS5VN5E4JXGUp
krV4DzMzGKPJzEuYxcFx6J9+dX3uNr4LmxeDMT4Vn6d/VNH/2VLlLMBDsqNsMGowHQYDVR0OBBYEFEsCxj1cccAK7PcPsKDz
DiCLfJLdMA8GA1UdEwEB/wQFMAMBAf8wDgYDVR0PAQH/BAQDAgKEMCgGA1UdEQQhMB+CCWxvY2FsaG9zdIIMYmFja2VuZC50
ZXN0hwR/AAABMAoGCCqGSM49BAMCA0cAMEQCIEISej9glU/TMpXpaqx1mYdxogobBioN9KEp68xSdJ4uAiB4+OY+4mF8YG4q
6xOSzm55Dau81zNhcNUDMvtLKiad5A==
-----END CERTIFICATE-----
"""


@contextlib.contextmanager
def forward(script, path="", **knobs):
    """A backend that plays the script, behind a gateway; yields (the gateway's port, backend)."""
    with PlayedBackend(script) as backend:
        with serve(**{"backend_url": backend.url + path, **knobs}) as server:
            yield server.port, backend


def case_of(head):
    """Return the number that a request's query is."""
    return int(re.search(rb"\?(\d+) ", head)[1])


def by_case(replies):
    """Return a script that answers a request for ...?N with reply N; behind a tuple's it closes."""
    def script(played, number):
        while read := played.request():
            reply = replies[case_of(read[0])]
            if isinstance(reply, tuple):
                return played.send(*reply)
            played.send(reply)
    return script


def stepwise(go, *pieces):
    """Return a script that reads a request and sends the pieces, each once the test says `go`."""
    def script(played, number):
        played.request()
        for piece in pieces:
            assert go.acquire(timeout=SECONDS)
            played.send(piece)
        played.wait_for_end()
    return script


def send_in_two(played, first, second):
    """Send two segments, with a moment between them in which the gateway can read the first."""
    played.send(first)
    time.sleep(0.001)
    played.send(second)


def tls(script, pem):
    """Return a script that plays `script` over TLS; a failed handshake is the client's business."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    def over_tls(played, number):
        with contextlib.suppress(ssl.SSLError):
            with context.wrap_socket(played.socket, server_side=True) as played.socket:
                script(played, number)
    return over_tls


def seen(backend, number=-1):
    """Return a request's head as the backend read it: a Reply whose reason is the first line."""
    return Reply(b"- 0 " + backend.requests[number][0])


def wait_for(client, text):
    """Read, but do not consume, until `text` has come."""
    while text not in client.buffer:
        assert client.more(), f"ended before {text!r}: {client.buffer!r}"


def wait_for_log(capfd, *patterns):
    """Wait until each of the patterns has been found in a line of the log."""
    lines = []
    def found():
        lines.extend(log_of(capfd))
        return all(any(re.search(pattern, line) for line in lines) for pattern in patterns)
    eventually(found)


@pytest.fixture
def pem(tmp_path, monkeypatch):
    """The path of a key with its certificate, which SSL_CERT_FILE names."""
    path = tmp_path / "test.pem"
    path.write_text(KEY_AND_CERTIFICATE)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    return str(path)


@pytest.fixture
def proxies(monkeypatch):
    """A function that sets proxy variables; at first there are none."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    return lambda **variables: [monkeypatch.setenv(*item) for item in variables.items()]


# -- 5. Backends: addresses, proxies, TLS ----------------------------------------------------------


@pytest.mark.parametrize("end, prefix", [
    ("", ""), ("/", ""), ("/v1", ""), ("/v1/", ""), ("/sub", "/sub"), ("/sub/v1/", "/sub"),
    ("/v1beta", "/v1beta")])
def test_backend_url_in_any_spelling_never_gives_v1_twice(end, prefix):
    with forward(answers(response()), end) as (port, backend):
        assert ask(port, "GET", "/v1/models?a=b").status == 200
        assert seen(backend).reason == f"GET {prefix}/v1/models?a=b HTTP/1.1"


@pytest.mark.parametrize("status", ["302 Found", "307 Temporary Redirect"])
def test_a_redirect_is_passed_on_and_not_followed(status):
    moved = response(b"", status, "Location: /v1/other")
    with forward(answers(moved, response())) as (port, backend):
        reply = ask(port, "GET", "/v1/models")
        assert f"{reply.status} {reply.reason}" == status and reply.one("location") == "/v1/other"
        assert len(backend.requests) == 1


def test_a_dead_address_is_502_backend_unreachable():
    with serve(backend_url=dead_address()) as server, Client(server.port) as client:
        for _ in range(2):  # and the client's connection stays
            reply = client.send(request(body=CHAT)).reply()
            assert (reply.status, reply.error()["code"]) == (502, "backend_unreachable")
            assert reply.error()["type"] == "server_error"


def test_a_remote_http_backend_is_reached_by_the_proxy(proxies):
    """RFC 9112, 3.2.2: a proxy gets the absolute form. Its login goes along with each request."""
    with PlayedBackend(answers(response())) as proxy:
        proxies(http_proxy=f"http://user:pa%40ss@127.0.0.1:{proxy.port}")
        with serve(backend_url="http://backend.test:81/sub/v1") as server:
            for _ in range(2):
                reply = ask(server.port, "POST", "/v1/embeddings?a=b", b"{}",
                            "Proxy-Authorization: Basic theirs")
                head = seen(proxy)
                assert reply.status == 200 and head.one("host") == "backend.test:81"
                assert head.reason == "POST http://backend.test:81/sub/v1/embeddings?a=b HTTP/1.1"
                assert head.one("proxy-authorization") == LOGIN
        assert proxy.connections == 1


def test_an_https_backend_is_reached_by_connect_and_the_proxy_sees_no_request(pem):
    def script(played, number):
        played.request()
        played.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        tls(answers(response()), pem)(played, number)
    with PlayedBackend(script) as proxy, Process(
            "--port=0", "--backend-url=https://backend.test/v1", SSL_CERT_FILE=pem,
            HTTPS_PROXY=f"http://user:pa%40ss@127.0.0.1:{proxy.port}") as process:
        for _ in range(2):
            assert ask(process.port, body=CHAT).body == b'{"ok": true}'
        connect, *inner = [seen(proxy, number) for number in range(3)]
        assert connect.reason == "CONNECT backend.test:443 HTTP/1.1"
        assert connect.one("proxy-authorization") == LOGIN and proxy.connections == 1
        for head in inner:
            assert head.reason == "POST /v1/chat/completions HTTP/1.1"
            assert head.one("host") == "backend.test" and not head.all("proxy-authorization")
        assert f"127.0.0.1:{proxy.port}" in process.lines[0]  # the proxy is named, not its secret
    assert not re.search("pa(%40|@)ss", process.log)


def test_a_proxy_that_refuses_is_502_backend_unreachable(proxies):
    with PlayedBackend(answers(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n")) as proxy:
        proxies(https_proxy=proxy.url)
        with serve(backend_url="https://backend.test") as server:
            reply = ask(server.port, body=CHAT)
            assert (reply.status, reply.error()["code"]) == (502, "backend_unreachable")


@pytest.mark.parametrize("host, no_proxy", [
    ("127.0.0.1", ""), ("localhost", ""), ("0.0.0.0", "other.test,0.0.0.0")])  # no loopback by name
def test_loopback_backends_and_those_in_no_proxy_are_reached_directly(proxies, host, no_proxy):
    proxies(http_proxy=dead_address(), HTTP_PROXY=dead_address(), no_proxy=no_proxy)
    with PlayedBackend(answers(response())) as backend:
        with serve(backend_url=f"http://{host}:{backend.port}") as server:
            assert ask(server.port, body=CHAT).status == 200
            assert "proxy" not in gateway.start_up_line(server)


def test_an_https_backend_is_verified_and_ssl_cert_file_is_honoured(pem):
    with PlayedBackend(tls(answers(response()), pem)) as backend:
        url = f"--backend-url=https://127.0.0.1:{backend.port}"
        with Process("--port=0", url) as process:
            reply = ask(process.port, body=CHAT)
            assert (reply.status, reply.error()["code"]) == (502, "backend_unreachable")
            assert "CERTIFICATE_VERIFY_FAILED" in reply.error()["message"]
        assert not backend.requests
        with Process("--port=0", url, SSL_CERT_FILE=pem) as process, Client(process.port) as client:
            for _ in range(3):
                assert client.send(request(body=CHAT)).reply().body == b'{"ok": true}'
        assert backend.connections == 2 and len(backend.requests) == 3


@pytest.mark.parametrize("pieces", [(), (STREAM_HEAD, chunked(b"data: 1\n\n", end=False))])
def test_over_tls_too_pieces_come_at_once_and_a_client_that_leaves_cancels(pem, capfd, pieces):
    go = threading.Semaphore(0)
    with PlayedBackend(tls(stepwise(go, *pieces), pem)) as backend:
        with serve(backend_url=f"https://localhost:{backend.port}") as server:
            with Client(server.port) as client:
                client.send(request(body=STREAM))
                for _, text in zip(pieces, (b"\r\n\r\n", b"data: 1\n\n")):
                    go.release()
                    wait_for(client, text)
                eventually(lambda: backend.requests)
            eventually(lambda: backend.ended)
            wait_for_log(capfd, " 499 .*client_closed")


@pytest.mark.parametrize("alert", [True, False])
def test_over_tls_a_body_that_ends_by_closing_is_whole_only_with_a_closure_alert(pem, alert):
    """RFC 9112, 9.8: anybody on the way can send a FIN, only the backend its close_notify."""
    def script(played, number):
        played.request()
        played.send(OK_HEAD + b"{}")
        if alert:
            with contextlib.suppress(OSError):
                played.socket.unwrap()
    with PlayedBackend(tls(script, pem)) as backend:
        with serve(backend_url=f"https://localhost:{backend.port}") as server:
            reply = ask(server.port, "GET", "/v1/files/x/content")
            assert reply.body == b"{}" and reply.cut == (not alert)


# -- 5. Backends: the pool -------------------------------------------------------------------------


def test_a_thousand_serial_requests_take_one_connection():
    script = answers(response(), STREAM_HEAD + chunked(DONE), response(b""))
    with forward(script) as (port, backend), Client(port) as client:
        for _ in range(1000):
            assert client.send(request(body=CHAT)).reply().status == 200
        assert len(backend.requests) == 1000 and backend.connections == 1


def test_an_idle_connection_is_closed_before_the_backend_would(monkeypatch):
    assert gateway.IDLE_SECONDS <= 4
    monkeypatch.setattr(gateway, "IDLE_SECONDS", 0.05)
    go = threading.Semaphore(9)
    with forward(stepwise(go, response())) as (port, backend):
        assert ask(port, body=CHAT).status == 200
        answered = time.monotonic()
        assert eventually(lambda: backend.ended)[0] - answered < 3
        monkeypatch.setattr(gateway, "IDLE_SECONDS", 0)
        for number in (2, 3, 4):
            assert ask(port, body=CHAT).status == 200 and backend.connections == number


def test_a_connection_that_the_backend_closes_while_it_is_idle_costs_no_request():
    """Not even one that must not be repeated: the end is seen before the link is used again."""
    byes, closed = ["X: 1", "Connection: close", "Connection: a, Close"] * 3, threading.Semaphore(0)
    def script(played, number):
        played.request()
        played.send(response(b"{}", "200 OK", byes[number - 1]))
        played.socket.close()
        closed.release()
    with forward(script) as (port, backend):
        for _ in byes:
            assert ask(port, "POST", "/v1/files", b"data").status == 200
            assert closed.acquire(timeout=SECONDS)
        assert len(backend.requests) == backend.connections == len(byes)


CHATS, FILES = "/v1/chat/completions", "/v1/files"


@pytest.mark.parametrize("how", ["FIN", "RST"])
def test_a_request_goes_out_again_only_if_a_reused_connection_ended_and_that_is_harmless(how):
    """Inference and reading are repeated once, on a fresh connection, if no byte had come; other
    requests are not, and nothing is that was sent on a fresh connection."""
    table = [  # method, path, bytes before the end, was the connection used before, is it repeated
        ("POST", CHATS, b"", True, True), ("POST", "/v1/completions", b"", True, True),
        ("POST", "/v1/embeddings", b"", True, True), ("GET", FILES, b"", True, True),
        ("HEAD", FILES, b"", True, True), ("POST", FILES, b"", True, False),
        ("DELETE", FILES, b"", True, False), ("PUT", FILES, b"", True, False),
        ("POST", CHATS, b"", False, False), ("GET", FILES, b"", False, False),
        ("POST", CHATS, b"HTTP/1.1 2", True, False)]
    def script(played, number):
        while read := played.request():
            if b"?" in read[0] and len(delivered(case_of(read[0]))) == 1:
                played.send(table[case_of(read[0])][2])
                return played.reset() if how == "RST" else None
            keeps = b"?" in read[0] or b"/v1/keep" in read[0]
            played.send(response(b"", "200 OK", "X: 1" if keeps else "Connection: close"))
    def delivered(case):
        return [read for read in backend.requests if b"?%d " % case in read[0]]
    with forward(script) as (port, backend):
        for case, (method, path, _, reused, again) in enumerate(table):
            assert ask(port, "GET", "/v1/close").status == 200
            assert ask(port, "GET", "/v1/keep" if reused else "/v1/close").status == 200
            connections = backend.connections
            reply = ask(port, method, f"{path}?{case}", CHAT if method == "POST" else b"")
            assert reply.status == (200 if again else 502), table[case]
            assert again or reply.error()["code"] == "backend_error"
            assert len(delivered(case)) == 1 + again, table[case]
            assert delivered(case)[0] == delivered(case)[-1]
            assert backend.connections == connections + (again or not reused), table[case]


def test_bytes_behind_an_answer_never_reach_another_request():
    """Neither those that come with it, nor those that come later."""
    forged, go, sent = response(b"forged"), threading.Semaphore(0), threading.Semaphore(0)
    table = [*itertools.product([
        ("POST", response()), ("POST", response(b"")), ("POST", CHUNKED_HEAD + chunked(b"{}")),
        ("POST", b"HTTP/1.1 204 No Content\r\n\r\n"), ("HEAD", response()),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 6\r\n\r\n")], [forged, b"", b"x"])]
    def script(played, number):
        while (read := played.request()) and b"?" not in read[0]:
            played.send(response(b"genuine"))
        if read:
            (_, answer), behind = table[case_of(read[0])]
            played.send(answer + behind)
            if not behind:
                assert go.acquire(timeout=SECONDS)
                played.send(forged)
            sent.release()
            played.wait_for_end()
    with forward(script) as (port, backend), Client(port) as client:
        for case, ((method, _), behind) in enumerate(table):
            reply = client.send(request(method, f"{FILES}?{case}", CHAT)).reply(method)
            assert reply.status in (200, 204, 304)
            if not behind:
                go.release()
            assert sent.acquire(timeout=SECONDS)
            reply = client.send(request("POST", FILES, CHAT)).reply()
            assert reply.body == b"genuine", table[case]


def test_an_answer_to_an_upload_that_is_still_being_sent_is_passed_on():
    """The backend refuses and closes; its RST makes the send fail, and must not hide the 413."""
    def script(played, number):
        played.socket.recv(1000)
        played.send(response(b"{}", "413 Payload Too Large", "Connection: close"))
    with forward(script) as (port, backend):
        reply = ask(port, "POST", FILES, b"x" * 20_000_000)
        assert (reply.status, reply.body) == (413, b"{}") and backend.connections == 1


def test_300_requests_in_flight_at_once_all_succeed():
    """The backend answers none before it has them all."""
    barrier = threading.Barrier(300, timeout=SECONDS * 2)
    def script(played, number):
        played.request()
        barrier.wait()
        played.send(response())
        played.wait_for_end()
    with PlayedBackend(script) as backend, contextlib.ExitStack() as stack:
        process = stack.enter_context(Process("--port=0", "--backend-url", backend.url))
        clients = [stack.enter_context(Client(process.port)) for _ in range(300)]
        for client in clients:
            client.send(request(body=CHAT))
        assert [client.reply().status for client in clients] == [200] * 300


# -- 5. Backends: heads and bodies of responses ----------------------------------------------------


def test_interim_responses_are_skipped_and_a_response_may_be_split_at_every_byte():
    """Chunks may have extensions, and trailers behind them; these are dropped."""
    whole = (b"HTTP/1.1 100 Continue\r\nX-A: 1\r\n\r\n" + CHUNKED_HEAD
             + b'05;a="b"\r\nhello\r\n1 ; x\r\n \r\n0\r\nX-T: 1\r\n\r\n')
    def script(played, number):
        for at in range(len(whole)):
            played.request()
            send_in_two(played, whole[:at], whole[at:])
    with forward(script) as (port, backend), Client(port) as client:
        for at in range(len(whole)):
            reply = client.send(request(body=CHAT)).reply()
            assert (reply.status, reply.body, reply.cut) == (200, b"hello ", False), whole[:at]
            assert not reply.all("x-a") + reply.all("x-t")
        assert backend.connections == 1


def test_a_response_without_a_body_is_one_and_the_connections_go_on():
    table = [
        ("POST", INTERIM + b"HTTP/1.1 204 No Content\r\nX-A: 1\r\n\r\n", "x-a", ["1"]),
        ("POST", b"HTTP/1.1 204 No Content\r\n\r\n", "content-length", []),
        ("GET", b"HTTP/1.1 304 No\r\nETag: 1\r\nContent-Length: 9\r\n\r\n", "etag", ["1"]),
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", "content-length", ["9"]),
        ("HEAD", CHUNKED_HEAD, "content-length", []), ("HEAD", OK_HEAD, "content-length", []),
        ("POST", response(b""), "content-length", ["0"])]
    script = by_case([answer for _, answer, _, _ in table])
    with forward(script) as (port, backend), Client(port) as client:
        for case, (method, answer, name, values) in enumerate(table):
            reply = client.send(request(method, f"{FILES}?{case}")).reply(method)
            assert b" %d " % reply.status in answer and reply.all(name) == values, answer
            assert client.send(request("GET", "/healthz")).reply().json() == {"status": "ok"}
        assert backend.connections == 1


@pytest.mark.parametrize("answer, connections", [
    ((b"HTTP/1.0 200 OK\r\n\r\nhello",), 2), ((OK_HEAD + b"hello",), 2),
    (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", 2),
    (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello", 1),
    (b"HTTP/1.1 200\r\ncontent-length:5\r\n\r\nhello", 1)])
def test_old_and_terse_backends_work(answer, connections):
    with forward(by_case([answer])) as (port, backend), Client(port) as client:
        for _ in range(2):
            reply = client.send(request("POST", f"{CHATS}?0", CHAT)).reply()
            assert (reply.status, reply.body, reply.cut) == (200, b"hello", False)
        assert backend.connections == connections


def ok(*lines, body=b"{}"):
    return b"\r\n".join([b"HTTP/1.1 200 OK", *lines, b"", body])


def test_a_backend_that_breaks_http_is_502_backend_error():
    """Nothing of its answer is passed on, the request is not repeated, the client goes on."""
    length, coding, data = b"Content-Length: 2", b"Transfer-Encoding: chunked", chunked(b"{}")
    table = [
        b"", b"H", b"\x16\x03\x01\x00\xff not HTTP\r\n\r\n\x00", b"HTTP/2.0 200 OK\r\n\r\n",
        b"ICY 200 OK\r\n\r\n", b"<p>HTTP/0.9</p>", INTERIM,
        *[b"HTTP/1.1 %b OK\r\n\r\n" % code for code in (b"", b"20", b"2000", b"099", b" 200")],
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n" + response(),
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n", b"HTTP/1.1 200 OK\r\nContent-Le",  # cut off
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}", ok(b"X: 1\n" + length), ok(b"X: 1\r" + length),
        ok(b"X: a\0b", length), ok(b"X: \x7f", length), ok(b"X: 1", b" " + length),
        ok(b"X", length), ok(b"Content-Length : 2"), ok(b": 2", length), ok(length, length),
        ok(length, b"Content-Length: 1"), *[ok(b"Content-Length: " + text) for text in (
            b"2, 2", b"", b"+2", b"-2", b"0x2", b"2_0", b"9" * 30)],
        ok(length, coding, body=data), ok(coding, coding, body=data),
        ok(b"Transfer-Encoding: gzip"), ok(b"Transfer-Encoding: gzip, chunked", body=data),
        b"HTTP/1.0 200 OK\r\n%b\r\n\r\n%b" % (coding, data),
        ok(*[b"X: " + b"x" * 9000] * 8, length), ok(*[b"X: 1"] * 100, length)]  # 72 kB, 101 fields
    script = by_case([(answer,) for answer in table])
    with forward(script) as (port, backend), Client(port) as client:
        for case, answer in enumerate(table):
            reply = client.send(request("POST", f"{CHATS}?{case}", CHAT)).reply()
            assert (reply.status, reply.error()["code"]) == (502, "backend_error"), answer[:200]
        assert len(backend.requests) == backend.connections == len(table)


def test_a_body_whose_chunks_are_broken_is_cut_or_refused_and_never_passed_off_as_whole(capfd):
    table = [size + b"{}\r\n0\r\n\r\n" for size in (
        b"\r\n", b"two\r\n", b"+2\r\n", b"-2\r\n", b"0x2\r\n", b"2\n", b"1\r\n", b"2" * 30)]
    table += [b"2\r\n{}" + end + b"\r\n\r\n" for end in (b"0", b"\r\n\r\n0", b"\r\n0\r\nbad")]
    script = by_case([(CHUNKED_HEAD + chunks,) for chunks in table])
    with forward(script) as (port, backend):
        for case, chunks in enumerate(table):
            reply = ask(port, "POST", f"{CHATS}?{case}", CHAT, f"X-Request-ID: case-{case:02}")
            assert reply.status == 502 or reply.cut and b"{}".startswith(reply.body), chunks
            wait_for_log(capfd, f"case-{case:02}.*backend_error")


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nX: 1\r\n", INTERIM])
def test_a_silent_backend_is_504_backend_timeout(begun):
    """Nor is that a reason to repeat a request, even on a reused connection."""
    def script(played, number):
        for answer in (response(), begun):
            played.request()
            played.send(answer)
        played.wait_for_end()
    with forward(script, backend_timeout=2) as (port, backend):
        assert ask(port, body=CHAT).status == 200
        reply = ask(port, body=CHAT)
        assert (reply.status, reply.error()["code"]) == (504, "backend_timeout")
        eventually(lambda: backend.ended)
        assert len(backend.requests) == 2


# -- 7. Handler: forwarding is transparent ---------------------------------------------------------


def mirror(played, number):
    """Answer with the body that was received."""
    while read := played.request():
        played.send(response(read[1]))


def test_bytes_in_are_bytes_out_both_ways():
    """Only completions have to be JSON objects; and even these are never written anew."""
    kind = "multipart/form-data; boundary=b"
    with forward(mirror) as (port, backend):
        for path, body in (
                (CHATS, b' \r\n{"m" :"x",\t"x":1.50, "x": 2e1,"\\u00e9":"\xc3\xa9" }\n '),
                (CHATS, b'{"messages":5,"tools":[{}],"n":1844674407370955161,"a":"\\ud800"}'),
                ("/v1/completions", b"{}"), ("/v1/embeddings", b"no JSON"), (FILES, b"\xff\xfe"),
                ("/v1/responses", b"[]"), ("/v1/moderations", b'{"input": NaN}'),
                ("/v1/audio/transcriptions", b'--b\r\nContent-Disposition: form-data; name="f"'
                 b"\r\n\r\n" + bytes(range(256)) * 300 + b"\r\n--b--\r\n"),
                (CHATS, b'{"url": "%b"}' % base64.b64encode(b"\xfb" * 7_500_000))):
            reply = ask(port, "POST", path, body, f"Content-Type: {kind}")
            assert reply.status == 200 and reply.body == backend.requests[-1][1] == body
            assert seen(backend).one("content-length") == str(len(body))
            assert seen(backend).one("content-type") == kind


def test_a_chunked_request_body_arrives_whole_with_a_length():
    with forward(mirror) as (port, backend), Client(port) as client:
        client.send(b"POST /v1/files HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n"
                    b"Expect: 100-continue\r\nTrailer: X-T\r\n\r\n"
                    b"5;a=b\r\nhello\r\n1\r\n \r\n0\r\nX-T: 1\r\n\r\n")
        while (reply := client.reply()).status == 100:
            pass
        assert reply.body == b"hello " and seen(backend).one("content-length") == "6"
        assert not [name for name, _ in seen(backend).fields
                    if name in ("transfer-encoding", "trailer", "x-t", "expect")]


def test_every_method_path_and_query_goes_to_the_backend_as_it_is():
    targets = ("/v1/models?limit=5&after=a+b%20c&q=%2e%2e/..&&=?x/y", "/v1/a%2Fb%3Fc%c3%A9",
               "/v1//x//", "/v1/", "/v1/~a:b@c!$&'()*+,;=", "/v1/.well-known/..x/a..b", "/v1/x?")
    methods = ("HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "QUERY", "M-SEARCH", "get")
    with forward(answers(response(b""))) as (port, backend), Client(port) as client:
        for (method, target), body in itertools.product(
                [*zip(itertools.repeat("GET"), targets), *zip(methods, itertools.repeat("/v1/x"))],
                (b"", b"body")):
            reply = client.send(request(method, target, body)).reply(method)
            assert reply.status == 200, (method, target)
            assert seen(backend).reason == f"{method} {target} HTTP/1.1"
            assert backend.requests[-1][1] == body


def test_completion_requests_that_are_no_json_objects_do_not_reach_the_backend():
    bodies = (b"", b"{", b"[]", b'"text"', b"null", b'{"a": 1} x', b'{"a": \xff}', b'{"a": NaN}',
              b"[" * 100_000, b'{"a": %b}' % (b"9" * 5000), '{"a": 1}'.encode("utf-16"))
    with forward(answers(response())) as (port, backend), Client(port) as client:
        for path, body in itertools.product((CHATS, "/v1/completions", CHATS + "?a=b"), bodies):
            reply = client.send(request("POST", path, body, f"X-Request-ID: {ID}")).reply()
            assert (reply.status, reply.error()["code"]) == (400, "invalid_json"), body[:20]
            assert reply.one("x-request-id") == ID
        assert not backend.requests


def test_statuses_fields_and_error_bodies_come_back_unchanged():
    """Several fields of one name too, in their order; and no field comes twice."""
    statuses = ("200 Fine by me", "201 Created", "400 Bad Request", "401 Unauthorized",
                "404 Not Found", "429 Too Many Requests", "500 No", "503 Busy", "529 Overloaded")
    fields = ["Retry-After: 7", "retry-after-ms: 7000", "x-should-retry: true", "Set-Cookie: a=1",
              "x-ratelimit-remaining-tokens: 0", "openai-processing-ms: 12", "Set-Cookie: b=2, c",
              "X-Odd:   a  b ", "openai-organization: \xe9", "Server: uvicorn", "Empty:",
              "Date: Mon, 01 Jan 2001 00:00:00 GMT", "Set-Cookie: a=3", "Request-Id: r"]
    sent = [(name.lower(), value.strip()) for name, value in (f.split(":", 1) for f in fields)]
    body = b' {"error" :{"message":"no"} }\n'
    replies = [response(body, status, *fields) for status in statuses]
    with forward(by_case(replies)) as (port, backend):
        for case, status in enumerate(statuses):
            reply = ask(port, "POST", f"{CHATS}?{case}", CHAT)
            assert f"{reply.status} {reply.reason}" == status and reply.body == body
            assert [field for field in reply.fields if field in sent] == sent
            for name in ("date", "server", "content-length", "content-type", "x-request-id"):
                assert reply.one(name)


def test_fields_of_one_connection_are_dropped_both_ways():
    """RFC 9110, 7.6.1: those of its table, and those that Connection names."""
    hops = ["Connection: close , X-Named,X-Also", "Connection: x-third", "Keep-Alive: timeout=5",
            "Proxy-Connection: close", "X-Named: 1", "x-also: 2", "X-Third: 3", "Upgrade: h2c",
            "Proxy-Authenticate: Basic", "Trailer: X-T"]
    theirs = ["TE: trailers", "Proxy-Authorization: Basic abc"]
    names = {line.partition(":")[0].lower() for line in (*hops, *theirs)} - {"connection"}
    with forward(answers(response(b"{}", "200 OK", *hops, "X-Kept: 1"))) as (port, backend):
        reply = ask(port, "POST", FILES, b"x", *hops, *theirs, "X-Kept: 1")
        for head in (reply, seen(backend)):
            assert head.one("x-kept") == "1" and head.one("content-length")
            assert not [name for name, _ in head.fields if name in names]
            assert not set(head.all("connection")) - {"close", "keep-alive"}


def test_what_the_backend_sees_of_the_client():
    fields = {"Authorization": "Bearer sk-1", "Accept-Encoding": "gzip, br", "Cookie": "a=1; b",
              "OpenAI-Beta": "x", "User-Agent": "test/1", "api-key": "k", "X-Request-ID": ID}
    with forward(answers(response()), "/sub/v1") as (port, backend):
        ours = {"Host": f"127.0.0.1:{backend.port}", "X-Forwarded-For": "127.0.0.1",
                "X-Forwarded-Proto": "http", "X-Forwarded-Host": "test"}
        ask(port, "POST", CHATS, CHAT, "X-A: 1", "Request-Id: other",
            *[f"{name}:  {value}" for name, value in fields.items()], "X-A: 2")
        for name, value in (fields | ours).items():
            assert seen(backend).one(name) == value
        assert seen(backend).all("x-a") == ["1", "2"]
        ask(port, "GET", "/v1/models")
        assert {name for name, _ in seen(backend).fields} == {  # nothing else is invented
            *map(str.lower, ours), "x-request-id", "via"}
        assert uuid.UUID(seen(backend).one("x-request-id")).version == 4
        ask(port, "GET", "/v1/models", b"", "X-Forwarded-For: 1.1.1.1", "X-Forwarded-For: 2.2.2.2")
        assert seen(backend).one("x-forwarded-for") == "1.1.1.1, 2.2.2.2, 127.0.0.1"


def test_a_client_cannot_take_our_own_fields_away_by_naming_them_in_connection():
    names = ("X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Request-ID", "Host")
    with forward(answers(response())) as (port, backend):
        ask(port, "GET", "/v1/models", b"", f"Connection: {', '.join(names)}",
            *[f"{name}: theirs" for name in names[:4]])
        assert all(seen(backend).one(name) for name in names)


def test_an_id_of_the_backend_s_own_comes_back_beside_ours_if_it_differs():
    """The body stays as the backend sent it."""
    table = [([], []), ([f"X-Request-ID: {ID}"], []), (["x-request-id: theirs"], ["theirs"]),
             (["X-Backend-Request-ID: further"], ["further"])]
    replies = [response(b'{"id": "body"}', "200 OK", *fields) for fields, _ in table]
    with forward(by_case(replies)) as (port, backend):
        for case, (_, expected) in enumerate(table):
            reply = ask(port, "POST", f"{CHATS}?{case}", CHAT, f"X-Request-ID: {ID}")
            assert reply.one("x-request-id") == ID and reply.body == b'{"id": "body"}'
            assert reply.all("x-backend-request-id") == expected
            assert reply.one("date") and not reply.all("server")


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
def test_an_encoded_body_passes_as_it_is(kind):
    body = gzip.compress(b"data: 1\n\n" + DONE)
    head = (f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nVary: Accept-Encoding\r\n"
            "Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n").encode()
    with forward(answers(head + chunked(body[:10], body[10:]))) as (port, backend):
        reply = ask(port, "POST", CHATS, STREAM, "Accept-Encoding: gzip")
        assert reply.body == body and not reply.cut and reply.one("vary") == "Accept-Encoding"
        assert reply.one("content-encoding") == seen(backend).one("accept-encoding") == "gzip"


@pytest.mark.parametrize("rule", ["parse_json", "events_end"])
def test_a_fault_of_our_own_is_an_internal_error_with_its_text_in_the_log_alone(
        monkeypatch, capfd, rule):
    real, go, begun = getattr(gateway, rule), threading.Semaphore(1), rule == "events_end"
    def fail(data):
        if b"bad" in data:
            raise RuntimeError("the details")
        return real(data)
    monkeypatch.setattr(gateway, rule, fail)
    script = stepwise(go, STREAM_HEAD + chunked(b"data: 1\n\n", end=False), chunked(b"bad"))
    with forward(script) as (port, backend), Client(port) as client:
        client.send(request(body=STREAM if begun else b'{"model": "bad"}'))
        wait_for(client, b"data: 1\n\n" if begun else b"\r\n\r\n")
        go.release()
        reply = client.reply()
        error = reply.events()[1]["error"] if begun else reply.error()
        assert (error["type"], error["code"]) == ("server_error", "internal_error")
        assert reply.status == (200 if begun else 500) and reply.cut == begun
        assert b"details" not in reply.body
        wait_for_log(capfd, "RuntimeError: the details")


# -- 7. Handler: streams ---------------------------------------------------------------------------


@pytest.mark.parametrize("version, head, gap", [
    *[("1.1", STREAM_HEAD, gap) for gap in (b"\n\n", b"\r\n\r\n", b"\r\r")],
    ("1.0", STREAM_HEAD, b"\n\n"), ("1.1", CHUNKED_HEAD, b"."), ("1.1", OK_HEAD, b"."),
    ("1.1", ok(b"Content-Length: 99", body=b""), b".")])
def test_head_and_pieces_reach_the_client_before_the_backend_sends_the_next(version, head, gap):
    pieces, go = [b"data: %d%b" % (number, gap) for number in range(5)], threading.Semaphore(0)
    script = stepwise(go, head, *[
        chunked(piece, end=False) if b"chunked" in head else piece for piece in pieces])
    with forward(script) as (port, backend), Client(port) as client:
        client.send(request("POST", CHATS, STREAM, "Connection: keep-alive", version=version))
        go.release()
        reply = client.head()
        for piece in pieces:
            go.release()
            assert client.until(gap).endswith(piece)
        if version == "1.0":  # knows no chunks
            assert not reply.all("transfer-encoding") and reply.one("connection") == "close"
            assert not client.buffer


@pytest.mark.parametrize("first", [b"7\r\nda", chunked(b"data: 1", end=False)])
def test_the_head_of_a_stream_does_not_wait_for_its_first_event(first):
    go = threading.Semaphore(1)
    with forward(stepwise(go, STREAM_HEAD + first)) as (port, backend), Client(port) as client:
        client.socket.settimeout(5)
        assert client.send(request(body=STREAM)).head().status == 200


def test_fields_against_buffering_are_added_to_event_streams_where_they_are_missing():
    lines = ["X-Accel-Buffering: yes", "Cache-Control: private", "X: 1"]
    streams = [STREAM_HEAD[:-2] + f"{line}\r\n\r\n".encode() + chunked(DONE) for line in lines]
    with forward(by_case([*streams, response()])) as (port, backend):
        for case, expected in enumerate((
                (["yes"], ["no-cache"]), (["no"], ["private"]), (["no"], ["no-cache"]), ([], []))):
            reply = ask(port, "POST", f"{CHATS}?{case}", STREAM)
            assert (reply.all("x-accel-buffering"), reply.all("cache-control")) == expected


@pytest.mark.parametrize("gap", [b"\n\n", b"\r\n\r\n", b"\r\r"], ids=repr)
def test_a_piece_of_an_event_is_held_back_until_its_boundary(gap):
    """WHATWG HTML, 9.2.5: a line ends with LF, CR LF or CR, an event with an empty line."""
    stream = b": a" + gap + b"id: 1" + gap[:len(gap) // 2] + b"data: 1" + gap
    def script(played, number):
        for at in range(1, len(stream)):
            played.request()
            first = STREAM_HEAD + chunked(stream[:at], end=False)
            send_in_two(played, first, chunked(stream[at:]))
    with forward(script) as (port, backend), Client(port) as client:
        for at in range(1, len(stream)):
            reply = client.send(request(body=STREAM)).reply()
            assert reply.body == stream and not reply.cut
            assert all(piece.endswith(gap) for piece in reply.pieces), stream[:at]


def test_an_event_too_big_to_be_held_back_passes_and_no_error_event_falls_into_it():
    go, pieces = threading.Semaphore(1), [b"data: ", *[b"x" * 100_000] * 6]
    with forward(stepwise(go, STREAM_HEAD + chunked(*pieces, end=False))) as (port, backend):
        with Client(port) as client:
            wait_for(client.send(request(body=STREAM)), b"x" * 60_000)  # though it has no end yet
            backend.sockets[0].shutdown(socket.SHUT_RDWR)
            reply = client.reply()
            assert reply.cut and re.fullmatch(b"data: x+", reply.body) and client.is_closed()
    with forward(answers(STREAM_HEAD + chunked(*pieces, b"\n", b"\n", DONE))) as (port, backend):
        reply = ask(port, body=STREAM)
        assert reply.body == b"".join(pieces) + b"\n\n" + DONE and not reply.cut


def test_a_whole_stream_ends_as_one_in_every_framing():
    """Even if it has no empty line behind its last event, or a comment behind [DONE]."""
    kind, table = b"HTTP/1.1 200 OK\r\nContent-Type: Text/Event-Stream; charset=utf-8\r\n", []
    for stream in (b"data: 1\n\n" + end for end in (DONE, DONE[:-1], DONE[:-2], DONE + b": x\n\n")):
        table += [(stream, kind + b"Content-Length: %d\r\n\r\n%b" % (len(stream), stream)),
                  (stream, kind + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(stream)),
                  (stream, (kind + b"\r\n" + stream,))]
    with forward(by_case([answer for _, answer in table])) as (port, backend):
        for case, (stream, answer) in enumerate(table):
            reply = ask(port, "POST", f"{CHATS}?{case}", STREAM)
            assert reply.body == stream and not reply.cut, answer


def test_a_comment_that_comes_after_done_does_not_make_a_stream_broken():
    go, head = threading.Semaphore(1), STREAM_HEAD.replace(b"Transfer-Encoding: chunked\r\n", b"")
    script = stepwise(go, head + DONE, b": bye\n\n")
    with forward(script) as (port, backend), Client(port) as client:
        wait_for(client.send(request(body=STREAM)), DONE)
        go.release()
        wait_for(client, b": bye\n\n")
        backend.sockets[0].shutdown(socket.SHUT_RDWR)
        reply = client.reply()
        assert reply.body == DONE + b": bye\n\n" and not reply.cut


# -- 7. Handler: clients that leave, clients that are slow -----------------------------------------


def test_a_client_that_leaves_cancels_the_backend_in_every_phase(capfd):
    """By FIN or RST. The backend is silent by then, so nothing but the leaving can end it."""
    begun = (b"", INTERIM, STREAM_HEAD, STREAM_HEAD + chunked(b"data: 1\n\n", end=False),
             ok(b"Content-Length: 9", body=b"{"), OK_HEAD + b"{")
    table = [*itertools.product(begun, ("FIN", "RST"))]
    def script(played, number):
        played.send(table[case_of(played.request()[0])][0])
        played.wait_for_end()
    with forward(script) as (port, backend), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(port)) for _ in table]
        for case, (client, (start, _)) in enumerate(zip(clients, table)):
            client.send(request("POST", f"{CHATS}?{case}", STREAM, f"X-Request-ID: case-{case:02}"))
            wait_for(client, b"\r\n\r\n" if start.startswith(b"HTTP/1.1 200") else b"")
        eventually(lambda: len(backend.requests) == len(table))
        for client, (_, leave) in zip(clients, table):
            client.vanish() if leave == "RST" else client.socket.close()
        eventually(lambda: len(backend.ended) == len(table), 10)
        wait_for_log(capfd, *[f" 499 .*case-{n:02}.*client_closed" for n in range(len(table))])
        assert backend.connections == len(table)


def test_a_client_that_leaves_with_its_whole_answer_is_not_logged_as_gone(capfd, monkeypatch):
    monkeypatch.setattr(gateway, "SWEEP_SECONDS", 0.0001)  # looks for such clients all the time
    with forward(answers(response())) as (port, backend):
        for _ in range(100):
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(Client(port)) for _ in range(4)]
                for client in clients:
                    client.send(request(body=CHAT))
                for client in clients:
                    assert client.reply().status == 200
                    client.socket.close()
    lines = log_of(capfd)
    assert len(lines) == 400 and not [line for line in lines if " 200 " not in line]


@pytest.mark.parametrize("leaves", [True, False])
def test_an_upload_that_the_backend_does_not_read_ends_with_the_client_or_in_time(capfd, leaves):
    reached, done = threading.Event(), threading.Event()
    def script(played, number):
        played.socket.recv(1000)
        reached.set()
        assert done.wait(SECONDS * 2)
    knobs = {} if leaves else {"backend_timeout": 0.5}
    with forward(script, **knobs) as (port, backend), Client(port) as client:
        client.send(request("POST", FILES, b"x" * 20_000_000))
        assert reached.wait(SECONDS)
        if leaves:
            client.vanish()
        else:
            assert client.reply().error()["code"] == "backend_timeout"
        wait_for_log(capfd, " 499 .*client_closed" if leaves else " 504 .*backend_timeout")
        done.set()


def test_a_client_that_reads_nothing_slows_its_backend_costs_no_memory_and_is_given_up():
    sent, mebibyte = [], chunked(b"x" * (1 << 20), end=False)
    def script(played, number):
        played.request()
        played.send(CHUNKED_HEAD)
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                played.send(mebibyte)
                sent.append(1)
        played.wait_for_end()
    with PlayedBackend(script) as backend, Process(
            "--port=0", "--client-timeout=1", "--backend-url", backend.url) as process:
        with Client(process.port) as client:
            client.send(request(body=CHAT))
            eventually(lambda: backend.ended)
            assert len(sent) < 100  # no more than the kernel's buffers take
            eventually(lambda: " 499 " in process.log)
            memory = Path(f"/proc/{process.pid}/status").read_text()
            assert int(re.search(r"VmHWM:\s*(\d+) kB", memory)[1]) < 100_000


# -- 7. Handler: backends that die in mid-answer ---------------------------------------------------

FRAMINGS = {  # (a line of the head, what makes of data the beginning of a body)
    "chunks": (b"Transfer-Encoding: chunked\r\n", lambda data: chunked(data, end=False)),
    "a cut chunk": (b"Transfer-Encoding: chunked\r\n", lambda data: b"ff\r\n" + data),
    "a length": (b"Content-Length: 100\r\n", bytes), "closing": (b"", bytes)}


@contextlib.contextmanager
def dying(how, table, data, first):
    """Run requests against a backend that dies in its answers: by FIN, by RST or by silence.

    `table` has (content type, path, framing, HTTP version), `data` begins each body. Yields a
    client for each, which has seen `first` of it.
    """
    die = threading.Event()
    def script(played, number):
        kind, _, framing, _ = table[case_of(played.request()[0])]
        line, frame = FRAMINGS[framing]
        played.send(b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n%b\r\n" % (kind, line) + frame(data))
        if how == "silence":
            return played.wait_for_end()
        assert die.wait(SECONDS)
        if how == "RST":
            played.reset()
    knobs = {"backend_timeout": 2} if how == "silence" else {}
    with forward(script, **knobs) as (port, _), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(port)) for _ in table]
        for case, (client, (_, path, _, version)) in enumerate(zip(clients, table)):
            client.send(request("POST", f"{path}?{case}", STREAM, version=version))
        for client in clients:
            wait_for(client, first)
        die.set()
        yield clients


@pytest.mark.parametrize("how", ["FIN", "RST", "silence"])
def test_an_event_stream_that_breaks_off_ends_with_an_error_event(how, capfd):
    """At an event boundary, without [DONE] and last chunk; and the connection is closed.

    A model that says [DONE] has not ended its stream by that.
    """
    table = [*itertools.product([b"text/event-stream"], [CHATS], FRAMINGS, ("1.1", "1.0"))]
    code = "backend_timeout" if how == "silence" else "backend_error"
    with dying(how, table, b'data: {"a": "[DONE]"}\n\ndata: 2', b"\n\n") as clients:
        for client, case in zip(clients, table):
            reply = client.reply()
            first, last = reply.events()
            assert first == {"a": "[DONE]"}, case
            assert {*last["error"]} == {"code", "message", "param", "type"}, case
            assert (last["error"]["type"], last["error"]["code"]) == ("server_error", code), case
            assert reply.cut == (case[3] == "1.1") and client.is_closed(), case
    wait_for_log(capfd, f" 200 .*{code}")


@pytest.mark.parametrize("how", ["FIN", "RST", "silence"])
@pytest.mark.parametrize("kind, path", [
    (b"application/json", CHATS), (b"audio/mpeg", "/v1/audio/speech"),
    (b"text/event-stream\r\nContent-Encoding: gzip", CHATS)])
def test_any_other_body_that_breaks_off_is_cut_short(kind, path, how):
    """To a client of HTTP/1.0 only an RST tells so where no length frames the body."""
    table = [case for case in itertools.product([kind], [path], FRAMINGS, ("1.1", "1.0"))
             if (case[2], how) != ("closing", "FIN")]  # which is a whole body
    with dying(how, table, b"begun", b"begun") as clients:
        for client, case in zip(clients, table):
            if case[3] == "1.0" and case[2] != "a length":
                with pytest.raises(ConnectionResetError):
                    while client.socket.recv(65536):
                        pass
            else:
                reply = client.reply()
                assert reply.cut and reply.body == b"begun" and client.is_closed(), case


# -- The mock backend ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mock():
    """The ports of the mock backend and of a gateway before it, both as processes."""
    with Process(script="mock_backend.py", MOCK_PORT="0") as backend, Process(
            PORT="0", BACKEND_URL=f"http://127.0.0.1:{backend.port}", BACKEND_TIMEOUT="3") as front:
        yield backend.port, front.port


def says_mock(reply, words=1):
    """Tell whether this is a completion, or its whole stream: "Mock" so many times, with our ID."""
    if reply.one("content-type") == "application/json":
        parts, done, key = [reply.json()], "[DONE]", "message"
    else:
        *parts, done = reply.events()
        key = "delta"
    choices = [part["choices"][0] for part in parts]
    text = "".join(choice[key].get("content", "") for choice in choices)
    return (text == " ".join(["Mock"] * words) and choices[-1]["finish_reason"] == "stop"
            and {part["id"] for part in parts} == {ID} and done == "[DONE]" and not reply.cut)


@pytest.mark.parametrize("wish, body, status, is_right", [
    ("", CHAT, 200, says_mock), ("", STREAM, 200, says_mock),
    ("delay=0.1", CHAT, 200, says_mock), ("delay=0.1", STREAM, 200, says_mock),
    ("tokens=3", CHAT, 200, lambda reply: says_mock(reply, 3)),
    ("tokens=3, interval=0.05", STREAM, 200, lambda reply: says_mock(reply, 3)),
    ("status=429", CHAT, 429, lambda reply: reply.one("retry-after") == "1"),
    ("status=500", STREAM, 500, lambda reply: reply.error()["type"] == "server_error"),
    ("status=204", CHAT, 204, lambda reply: not reply.body),
    ("cut", CHAT, 200, lambda reply: reply.cut),
    ("cut, tokens=4", STREAM, 200, lambda reply: reply.cut and len(reply.events()) > 1
     and reply.events()[-1]["error"]["code"] == "backend_error"),
    ("silent", CHAT, 504, lambda reply: reply.error()["code"] == "backend_timeout"),
    ("garbage", CHAT, 502, lambda reply: reply.error()["code"] == "backend_error"),
    ("close", CHAT, 502, lambda reply: reply.error()["code"] == "backend_error"),
    ("unknown", CHAT, 400, lambda reply: "delay" in reply.error()["message"])])
def test_the_mock_misbehaves_as_asked_through_the_gateway(mock, wish, body, status, is_right):
    reply = ask(mock[1], "POST", CHATS, body, f"X-Request-ID: {ID}", f"X-Mock: {wish}")
    assert reply.status == status and is_right(reply)
    assert reply.one("x-request-id") == ID and not reply.all("x-backend-request-id")


def test_what_else_the_mock_has_directly_and_through_the_gateway(mock):
    for port, (method, path, body, find) in itertools.product(mock, (
            ("GET", "/v1/models", b"", lambda value: value["data"][0]["id"] == "mock"),
            ("GET", "/healthz", b"", lambda value: value["status"] == "ok"),
            ("POST", "/v1/completions", b"{}", lambda value: value["choices"][0]["text"] == "Mock"),
            ("POST", "/v1/embeddings", b'{"input": "a"}', lambda value: len(value["data"]) == 1))):
        reply = ask(port, method, path, body)
        assert reply.status == 200 and find(reply.json()), path
    for body in (b"", b"[]", b"no JSON", b'{"messages": 5}'):
        assert says_mock(ask(mock[0], "POST", CHATS, body, f"X-Request-ID: {ID}"))


def test_the_mock_s_help_documents_its_ways_and_a_signal_ends_it():
    with Process("--help", script="mock_backend.py") as process:
        text = process.process.stdout.read()
        assert process.wait() == 0
    for word in ("delay=", "status=", "tokens=", "interval=", "cut", "silent", "garbage", "close",
                 "X-Mock", "MOCK_PORT", "8081"):
        assert word in text
    with Process(script="mock_backend.py", MOCK_PORT="0") as process:
        assert ask(process.port, "GET", "/healthz").status == 200
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait() == 0


# -- what an auditor found -------------------------------------------------------------------------


@pytest.mark.parametrize("version", ("1.0", "1.1"))
@pytest.mark.parametrize("path", ("/v1/files/x", "/v1/responses"))
def test_a_client_that_half_closes_never_takes_a_cut_answer_for_a_whole_one(path, version):
    """It counts as gone, and the backend is cancelled; but it reads on."""
    kind = b"text/event-stream" if path == "/v1/responses" else b"text/plain"

    def script(played, number):
        played.request()
        played.send(b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n\r\ndata: 1\n\n" % kind)
        played.wait_for_end()
    with forward(script) as (port, backend), Client(port) as client:
        client.send(request("POST", path, b"{}", version=version))
        wait_for(client, b"data: 1\n\n")
        client.socket.shutdown(socket.SHUT_WR)
        if version == "1.0":
            with pytest.raises(ConnectionResetError):
                while client.socket.recv(65536):
                    pass
        else:
            assert client.reply().cut


def test_an_id_in_a_body_is_not_the_request_s(echo):
    body = b"x-request-id: injected\r\n\r\n"
    for identity in ("-", "mine"):
        reply = ask(echo, "POST", "/nothing", body, f"X-Request-ID: {identity}")
        assert reply.one("x-request-id") == identity


def test_a_flood_of_empty_lines_is_skipped_at_once(echo):
    with Client(echo) as client:
        client.send(b"\r\n" * 500_000 + HEALTH)
        assert client.reply().json() == OK


def test_a_refused_client_that_asked_to_close_can_still_send_and_read(echo):
    with Client(echo) as client:
        client.send(b"POST /nothing HTTP/1.1\r\nHost: t\r\nConnection: close\r\n"
                    b"Content-Length: 100000\r\n\r\n")
        client.until(b"HTTP/1.1 404")
        for _ in range(10):
            client.send(b"x" * 10_000)  # would raise once an RST had come


def test_a_refusal_after_the_body_was_read_keeps_the_connection_of_an_expecting_client(echo):
    with Client(echo) as client:
        client.send(POST + b"Expect: 100-continue\r\nContent-Length: 1\r\n\r\n")
        assert client.head().status == 100
        assert client.send(b"{").reply().error()["code"] == "invalid_json"
        assert client.send(HEALTH).reply().json() == OK


def test_a_response_whose_fields_are_all_hop_by_hop_is_still_framed():
    head = b"HTTP/1.1 200 OK\r\nConnection: date\r\nDate: x\r\nContent-Length: 2\r\n\r\nhi"
    with forward(answers(head)) as (port, backend):
        reply = ask(port, "GET", "/v1/models")
        assert reply.body == b"hi" and reply.one("x-request-id")


def test_a_failing_sweep_does_not_end_the_server(monkeypatch, capfd):
    failed = threading.Event()

    def fail(*_):
        failed.set()
        raise MemoryError
    with serve() as server:
        monkeypatch.setattr(gateway, "hung_up", fail)
        assert failed.wait(SECONDS)
        assert ask(server.port, "GET", "/healthz").json() == OK
        monkeypatch.undo()


def test_loopback_by_another_name_uses_no_proxy_and_a_wrong_proxy_is_no_traceback():
    for host in ("localhost.", "0.0.0.0", "[::1]", "127.1.2.3"):
        with Process("--port=0", f"--backend-url=http://{host}:9",
                     http_proxy="http://proxy.test:3128") as process:
            assert process.port and "proxy" not in process.log
    wrong = "http://[::1"
    with Process("--port=0", "--backend-url=http://backend.test", http_proxy=wrong) as process:
        assert "HTTP_PROXY is wrong" in eventually(lambda: process.log)
        error = ask(process.port, "GET", "/v1/models").error()
        assert error["code"] == "backend_unreachable"
    assert "Traceback" not in process.log


def test_a_client_of_http_1_0_without_a_host_has_no_forwarded_host():
    with forward(answers(response())) as (port, backend), Client(port) as client:
        client.send(b"GET /v1/models HTTP/1.0\r\nX-Forwarded-For:\r\n\r\n").reply()
        assert not seen(backend).all("x-forwarded-host")
        assert seen(backend).one("x-forwarded-for") == "127.0.0.1"


@pytest.mark.parametrize("address", (
    "http://[::1]x:9", "http://.", "http://host:", "http://host:0", "http://host:65536", "http:///",
    "http://a b", "http://a/v1?x=1", "http://a/#x", "http://user@a", "//a", "a:80", "http:/a"))
def test_an_address_that_can_never_work_is_refused(address, capsys):
    with pytest.raises(SystemExit) as exit:
        gateway.read_settings([f"--backend-url={address}"], {})
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert "--backend-url" in error and error.count("\n") == 1 and address not in error
