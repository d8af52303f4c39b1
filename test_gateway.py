"""The gateway's tests: real sockets, real processes, real faults. Sections mirror gateway.py.

Most tests run the server in this process on a free port (`serve`), so that leaked threads, sockets
and exceptions are seen; those about the command line, signals and limits start it as a user would
(`Process`). Malformed input is written as bytes. No test sleeps for a fixed time: `eventually`
waits for a condition, a backend that plays a script waits for the test.
"""

import atexit
import base64
import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import gc
import gzip
import itertools
import json
import os
import queue
import re
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import termios
import threading
import time
import traceback
import types
import uuid
from pathlib import Path

import pytest

import gateway

HERE = Path(__file__).parent
SETTLED, gateway.SETTLED = gateway.SETTLED, 1  # here, a request is logged before the next begins
gateway.log = lambda *lines, patience=None: None  # fixtures and Process see what is logged
threading.stack_size(gateway.STACK_BYTES)  # as main() does: musl's default is 128 KiB
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's jobs are started to ignore it
SECONDS = 20  # how long anything may take before a test fails: generous, for slow and busy machines
CHAT = b'{"model": "m", "messages": [{"role": "user", "content": "Hello, world!"}]}'
STREAM = CHAT[:-1] + b', "stream": true}'


def pytest_collection_modifyitems(items):
    """Keep one part of the tests, where test.sh runs the suite in several processes (pytest -p)."""
    number, _, parts = os.environ.get("PART", "0/1").partition("/")
    items[:] = items[int(number)::int(parts)]


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
        head = self.until(b"\r\n\r\n")[:-4]
        assert re.match(rb"HTTP/1\.[01] [1-9][0-9][0-9] [^\r\n]*(\r\n|\Z)", head), head
        return Reply(head)

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


def bound():
    """Return a socket whose port refuses connections, and is nobody else's while it is open."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    atexit.register(sock.close)
    return sock


DEAD = itertools.cycle([bound() for _ in range(8)])


def dead_address():
    """Return the URL of an address where nothing listens: another one, eight times."""
    return f"http://127.0.0.1:{next(DEAD).getsockname()[1]}"


def free_port():
    """Return a port that is free, if nobody is quicker."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


@contextlib.contextmanager
def serve(**knobs):
    """Run a gateway in this process, on a free port; yields its Server, which ends empty."""
    knobs = {"port": 0, "probe_interval": 0, "shutdown_timeout": SECONDS, **knobs}
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in knobs.items()]
    server = gateway.Server(gateway.read_settings(argv, {}))
    server.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        drained = server.drain()
        thread.join(SECONDS)
        if server.backends:
            for link in itertools.chain(*server.backends.pool._idle.values()):
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
        return int(eventually(lambda: re.search(r" on https?://\S*?:(\d+)", self.log))[1])

    def wait(self):
        """Wait for the end and return the exit status."""
        status = self.process.wait(SECONDS * 2)
        self.reader.join(SECONDS)
        return status

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.reader.join(SECONDS)
        self.process.stdout.close()
        self.process.stderr.close()
        assert kind or "Traceback" not in self.log, self.log


class Log:
    """The log of the gateways in this process, with the one method of capfd that is used here.

    capfd itself truncates its file when it reads, and loses a line that a thread writes just then.
    """

    def __init__(self):
        self.text, self.seen = "", 0

    def write(self, *lines, patience=None):
        for line in lines:
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
def faults():
    """The gateway's own faults, as tracebacks; a test that expects some clears the list.

    Fails a test that met others, or leaves a thread or a descriptor behind.
    """
    threads, descriptors = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    noted, note = [], gateway.note_internal_error
    with pytest.MonkeyPatch.context() as patch:  # undone last: by then a test's clock is put back
        patch.setattr(gateway, "note_internal_error", lambda settings, where: (
            noted.append(traceback.format_exc()), note(settings, where)))
        yield noted
        eventually(lambda: set(threading.enumerate()) <= threads)
        eventually(lambda: len(os.listdir("/proc/self/fd")) <= len(descriptors))
    assert not noted, "".join(noted)


@pytest.fixture(scope="module")
def echo():
    """The port of a gateway in echo mode."""
    with serve() as server:
        yield server.port


# -- helpers for the tests without a backend -------------------------------------------------------

NOTE_INTERNAL_ERROR = gateway.note_internal_error  # `faults` puts another in its place
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
    monkeypatch.setattr(gateway, "log", lambda *new, **how: (
        lines.extend(new), write(*new, **how)))
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

KNOBS = [(name.upper(), "--" + name.replace("_", "-"), default, sentence)
         for name, _, default, sentence in gateway.KNOBS]

BAD_SETTINGS = {
    "PORT": ("abc", "99999", "-1", "8_0", " 80", "80\n80", "\u0663", "9" * 5000),
    "BACKEND_URL": (
        "localhost:8000", "127.0.0.1", "ftp://h/v1", "file:///etc", "http://", "http://h:99999",
        "http://h:0x50", "http://[::1", "http://h/a b", "http://h?a=b", "http://h\nx",
        "http://h,ftp://h", ",x", "http://[:::::]:80", "http://[1.2.3.4]", "http://h/a\"b",
        "http://a,b:8000", "http://a,http://u:s3cret@b", "http://h/v1/chat/completions",
        "http://h/v1/completions/",
        "http://user:s3cret@h/v1", "http://s3cret@h", "user:s3cret@h"),
    "PROBE_INTERVAL": ("-1", "nan", "often"), "WORKERS": ("0", "-1", "many", "257"),
    "HOST": ("a b", "[::1]", "http://x", "x:8080/", "\udcff"),
    "DRAIN_DELAY": ("-1",), "CORS_ORIGINS": ("example.com", "https://a/b", "*,x"),
    "API_KEYS": ("alice=", "s3cret s3cret", "a=s3cret,b="), "BACKEND_API_KEY": ("s3cret x",),
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
    ((), {"HOST": "\udcff"}, (2,), "host"),
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
        "DRAIN_DELAY": "0", "WORKERS": "1", "CPU_AFFINITY": "1", "TLS_CERT_FILE": "",
        "TLS_KEY_FILE": "",
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


def test_the_readme_has_the_table_of_the_program_s_settings():
    rows = [f"| `{variable}` | `{flag}` | {default and f'`{default}`'} | {sentence} |"
            for variable, flag, default, sentence in KNOBS]
    table = "\n".join(["| variable | flag | default | what it is |", "|---|---|---|---|", *rows])
    assert table in (HERE / "README.md").read_text(), f"README.md needs this table:\n{table}"


NO_DEV_NULL = ("-c", "import os, runpy, sys; os.devnull = '/no/dev/null'; del sys.argv[0];"
               "runpy.run_path(sys.argv[0], run_name='__main__')")  # as in a bare chroot


@pytest.mark.parametrize("options", (
    (), ("-I", "-S"), ("-OO",), ("-X", "dev", "-W", "error", "-bb"), NO_DEV_NULL))
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
    ("http://user:s3cret@proxy.example:3128", "proxy.example:3128")])
def test_forward_mode_starts_with_one_line_that_names_backend_and_proxy_but_no_secret(proxy, named):
    with Process(
            "--port=0", BACKEND_URL="http://backend.example/sub/v1", http_proxy=proxy) as process:
        assert ask(process.port, "GET", "/healthz").status == 200
        assert "http://backend.example/sub" in process.lines[0] and named in process.lines[0]
        assert "s3cret" not in process.log
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
    ([message("user", ["x", TEXT, 5, None])], "a b", 2),
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
    *(({"messages": value}, "invalid_type", "messages")
      for value in (None, "hi", {"a": 1}, 0, False)),
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
    (204, "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS", "OPTIONS", "*"),
    (404, None, "GET", "/ /v1 /v1/ /v1/files /v1/models/x /healthz/ //v1/models /%00"),
    (404, None, "POST", "/v1/embeddings /chat/completions /v1/chat/completions/"),
    (404, None, "OPTIONS", "/nothing"), (404, None, "finish", "/nothing")])
def test_unknown_methods_and_paths_are_refused(echo, status, allow, method, paths):
    for path in paths.split():
        with Client(echo) as client:
            reply = client.send(request(method, path, b"a body")).reply(method)
            assert reply.status == status
            assert [set(methods.split(", ")) for methods in reply.all("allow")] == (
                [set(allow.split(", "))] if allow else [])
            if method != "HEAD" and status != 204:
                assert reply.error()["code"] == (
                    "unknown_url" if status == 404 else "method_not_allowed")
                assert reply.error()["type"] == "invalid_request_error"
            assert reply.one("connection") == "close"  # the body was not read


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
    (400, POST + b"Content-Length: -1\r\n\r\n"),
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
              b"|five|\x0b5|5\x0c|5;|\xb2|\xa05|'5'"),
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
              b"|[::1|[zz]|[]|[1]|[.]|%|%zz|:80|h#|h?|h\\|<h>|\xe9|http://h"),
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
              b"|/v1/..%2fhealthz|/v1/..%5Chealthz|/v1%2F../healthz|/v1/..;/healthz"
              b"|/v1/..;x=y/healthz|/v1/.;/%2e%2e;/healthz|/v1/..%3b/healthz"),
        # Chunks: 7.1
        *each(CHUNKS + b"%b\r\nhello\r\n0\r\n\r\n",
              b"x||-5|+5|0x5|5_0| 5|5 |5\t|5,|5 5|5\n|5\r|;a|5;a\n|5;a\0|5;a\rb|\xb5|" + b"f" * 16),
        *each(CHUNKS + b"%b\r\n\r\n",
              b"5\r\nhello|5\r\nhello\n0|5\r\nhell|5\r\nhelloworld|5\r\nhello\r|5\nhello|0\n|0\r\nA"
              b"|0\r\nA : b|0\r\nA: b\r\n c|0\r\n: b|0\r\nA: b\n|0\r\nA: \0|0\r\nA B: c"),
        *each(CHUNKS + b"5%b\r\nhello\r\n0\r\n\r\n",
              b';|;;|;a="|;a="b|;a="b"c|;a b|;a=|;=b|;\x80|;a=\x80|;a="\x01"|;a="\\"|;a,b| '),
        CHUNKS + b"5;" + b"a" * 5000, CHUNKS + b"0\r\nA: " + b"b" * 70_000],
    (501, "not_implemented"): each(POST + b"Transfer-Encoding: %b\r\n\r\n0\r\n\r\n",
                                   b"|gzip|gzip, chunked|identity|xchunked|chunked;a=b|'chunked'"),
    (505, "http_version_not_supported"): [
        *each(b"GET /healthz HTTP/%b\r\nHost: t\r\n\r\n", b"0.9|2.0|3.1"),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
    (413, "request_too_large"): each(POST + b"Content-Length: %b\r\n\r\nhello", b"|".join(
        b"9" * digits for digits in (11, 15, 16, 30, 5000))),
    (414, "uri_too_long"): [
        b"GET /%b HTTP/1.1\r\nHost: t\r\n\r\n" % (b"a" * size) for size in (20_000, 200_000)],
    (431, "request_header_fields_too_large"): [
        GET + b"A: b\r\n" * 100 + b"\r\n", GET + b"A: %b\r\n\r\n" % (b"b" * 65_536),
        GET + b"A: %b\r\n" % (b"b" * 1000) * 80 + b"\r\n"]}


@pytest.mark.parametrize("chunks", (
    b"5\nhello\n0\n\n", b"5\r\nhello\n", b"5\r\nhello\r\n0\n\n", b"5\r\nhello\r\n0\r\n\n",
    b"5\r\nhello\r\n0\r\nA: b\n\n", b"5\r\nhello\r\n0\r\n\0", b"5\r\nhelloX", b"5\r\nhello\rX"))
def test_chunks_that_do_not_end_as_they_must_are_refused_at_once_though_nothing_follows(
        echo, chunks):
    """Who ends lines with LF, say, waits for an answer. From a backend it is a cut."""
    with Client(echo) as client:
        reply = client.send(CHUNKS + chunks).reply()
        assert (reply.status, reply.error()["code"]) == (400, "bad_request")
    with forward(answers(CHUNKED_HEAD + chunks)) as (port, _), Client(port) as client:
        reply = client.send(request(body=CHAT)).reply()
        assert reply.cut and b"hello".startswith(reply.body)


def test_heads_that_differ_in_their_lengths_alone_are_told_apart(echo):
    """All of them are parsed as one."""
    with Client(echo) as client:
        for length in (0, 1, 100, 1_000, 1, 0):
            assert said(client.send(request(body=chat("x" * length))).reply()) == "Echo: " + (
                "x" * length)
    for lengths in ((0, 0), (5, 0), (0, 5), (5, 5)):
        with Client(echo) as client:
            client.send(POST + b"Content-Length: %d\r\nContent-Length: %d\r\n\r\n" % lengths)
            assert client.reply().status == 400 and client.is_closed()


def test_a_length_may_have_zeros_before_it(echo):
    data = POST + b"Content-Length: %b%d\r\n\r\n" % (b"0" * 5000, len(CHAT)) + CHAT
    with Client(echo) as client:
        assert client.send(data + HEALTH).reply().status == 200 == client.reply().status


def test_of_a_head_that_is_not_understood_the_id_and_its_first_line_count_as_ever(echo, log):
    with Client(echo) as client:
        reply = client.send(LINE + b"Request-Id: b\r\nX-Request-ID: a\r\n\r\n").reply()
        assert (reply.status, reply.one("x-request-id")) == (400, "a")
    for target, path in ((b"/v1/x?key=s3cret", "/v1/x"), (b"http://u:s3cret@h/x", "-")):
        with Client(echo) as client:
            client.send(b"PUT %b HTTP/1.1\r\nX-Request-ID: b\r\n\r\n" % target)
            assert client.reply().status == 400
        eventually(lambda: f" 400 PUT {path} " in "".join(log))
    assert "s3cret" not in "".join(log)
    with Client(echo) as client:
        client.send(LINE.replace(b"GET", b"HEAD") + b"A: b\r\n\r\n")
        assert client.reply("HEAD").status == 400 and client.is_closed()
    with Client(echo) as client:  # nor does one have a body whose first line is none
        client.send(b"HEAD  /x HTTP/1.1\r\nHost: t\r\n\r\n")
        assert client.reply("HEAD").status == 400 and client.is_closed()
    with Client(echo) as client:  # and an id that may be cut off is none
        client.send(LINE + b"X-Request-ID: a").socket.shutdown(socket.SHUT_WR)
        reply = client.reply()
        assert reply.status == 400 and is_new(reply.one("x-request-id"))


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


@pytest.mark.parametrize("start", [
    b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2", b"hello", b"\r\n\r\n\0\r\nQUIT\n!\x11", b"GET /v1"])
def test_a_first_line_that_is_none_is_what_the_error_names_though_no_field_behind_it_is_one(
        echo, start):
    """Such as what a proxy with the PROXY protocol (v1, v2) sends before the request."""
    with Client(echo) as client:
        error = client.send(start + b"\r\n" + HEALTH).reply().error()
        assert "first line" in error["message"] and "field" not in error["message"]
        assert error["code"] == "bad_request"


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
        assert client.send(request(*line.split(), HEALTH)).reply().one("connection") == "close"
        assert not client.more()
    lines_of(log, 1)


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
    with Client(echo) as client:  # the length of a chunked body is not known before it is read
        head = POST + b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
        assert client.send(head + chunked(CHAT)).reply().status == 200


@pytest.mark.parametrize(("status", "head"), [
    (404, b"POST /nothing HTTP/1.1\r\nHost: t\r\nContent-Length: 9\r\n"),
    (405, b"PUT /healthz HTTP/1.1\r\nHost: t\r\nContent-Length: 9\r\n"),
    (413, POST + b"Content-Length: 99999999999\r\n"),
    (400, POST + b"Content-Length: 1\r\nContent-Length: 2\r\n")])
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
        with Client(server.port) as client:  # it is enough that more is announced
            assert client.send(CHUNKS + b"%x\r\n" % (len(CHAT) + 1)).reply().status == 413


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
            counted = b'\ngateway_requests_total{status="503",outcome="failed"} 3\n'
            assert counted in first.send(request("GET", "/metrics")).reply().body
        eventually(lambda: ask(server.port, "GET", "/healthz").status == 200)


def test_of_refused_connections_that_are_not_closed_yet_there_are_1000_at_most():
    closed = []
    refused = [types.SimpleNamespace(close=functools.partial(closed.append, number))
               for number in range(1005)]
    with serve() as server:
        server.parting.extend((float("inf"), each) for each in refused)
        eventually(lambda: len(server.parting) <= 1000)
        assert closed == [*range(5)]  # the first ones first


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


def test_a_body_that_stalls_is_given_up_however_fast_it_was():
    with serve(client_timeout=1) as server, Client(server.port) as client:
        reply = client.send(request(body=b" " * 50_000)[:-1]).reply()
        assert (reply.status, reply.error()["code"]) == (408, "request_timeout")


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
        assert records[replies[0].one("x-request-id")]["model"] == odd.replace(
            "\ud800", "?")  # which some parsers of JSON do not take
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
@pytest.mark.parametrize("options", ((), NO_DEV_NULL))
def test_without_a_reader_of_the_log_requests_are_served_and_no_line_reaches_a_client(
        redirection, options):
    """The number of a closed stderr would go to the next socket that is opened."""
    port = free_port()
    shell = ("bash", "-c", f'exec "$0" "$@" {redirection}', sys.executable, *options)

    def connected():
        with contextlib.suppress(ConnectionRefusedError):
            return Client(port)
    with Process(f"--port={port}", python=shell) as process, contextlib.ExitStack() as stack:
        eventually(lambda: not process.reader.is_alive())  # it is closed, or the pipe is broken
        clients = [stack.enter_context(eventually(connected)) for _ in range(4)]
        for client in clients * 8:  # more lines than are written at once
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


def test_connections_that_do_not_cease_do_not_put_off_the_end_of_a_drain(monkeypatch):
    taken, ended = [], threading.Event()
    def get_request(server):
        if ended.is_set() or not server.draining:
            raise BlockingIOError
        theirs, ours = socket.socketpair()
        theirs.close()
        taken.append(ours)
        return ours, ("127.0.0.1", 1)
    monkeypatch.setattr(gateway, "PARTING_SECONDS", 0.1)
    with serve(shutdown_timeout=1) as server:
        monkeypatch.setattr(gateway.Server, "get_request", get_request)
        drain = threading.Thread(target=server.drain)
        drain.start()
        drain.join(SECONDS)
        ended.set()
        assert taken and drain.is_alive() is False


@pytest.mark.parametrize(("patience", "again", "statuses"), [
    ("0.2", False, (0,)), ("3600", True, (128 + signal.SIGTERM, -signal.SIGTERM))])
def test_shutdown_timeout_or_a_second_signal_cuts_what_does_not_finish(patience, again, statuses):
    with Process("--port=0", SHUTDOWN_TIMEOUT=patience) as process, Client(process.port) as client:
        begin(process, client)
        stop(process)
        if again:
            os.kill(process.pid, signal.SIGTERM)
        assert client.is_closed() and process.wait() in statuses
        assert ("SHUTDOWN_TIMEOUT" in process.log) is not again


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


def test_while_one_thread_writes_the_log_no_request_waits_for_it(monkeypatch):
    """Unless very many lines wait: a lock that is waited for with the GIL's help is a convoy."""
    begun, go = threading.Event(), threading.Event()

    def write(*lines, patience):
        begun.set()
        assert go.wait(SECONDS)

    monkeypatch.setattr(gateway, "log", write)
    with serve() as server, Client(server.port) as first, Client(server.port) as second:
        assert first.send(HEALTH).reply().status == 200
        assert begun.wait(SECONDS)
        for _ in range(50):
            assert second.send(HEALTH).reply().status == 200
        go.set()


# -- 5. Backends: addresses, proxies, TLS ----------------------------------------------------------


def test_ids_that_are_made_for_one_connection_are_uuids_and_no_two_of_any_are_the_same(echo):
    ids = []
    for _ in range(3):
        with Client(echo) as client:
            for _ in range(3):
                ids.append(client.send(request("GET", "/healthz")).reply().one("x-request-id"))
    assert len(set(ids)) == 9 and all(str(uuid.UUID(text)) == text for text in ids)
    assert {uuid.UUID(text).version for text in ids} == {4}


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


@pytest.mark.parametrize("host", (".x", "a..b", "a" * 64))
def test_a_host_that_no_name_server_can_be_asked_about_is_502_backend_unreachable(host, proxies):
    for scheme in ("http", "https"):
        with serve(backend_url=f"{scheme}://{host}") as server:
            reply = ask(server.port, body=CHAT)
            assert (reply.status, reply.error()["code"]) == (502, "backend_unreachable")


def test_a_dead_address_is_502_backend_unreachable():
    with serve(backend_url=dead_address()) as server, Client(server.port) as client:
        for _ in range(2):  # and the client's connection stays
            reply = client.send(request(body=CHAT)).reply()
            assert (reply.status, reply.error()["code"]) == (502, "backend_unreachable")
            assert reply.error()["type"] == "server_error"


@pytest.mark.parametrize(("proxy_of", "login"), [
    ("http://user:pa%40ss@127.0.0.1:{}", [LOGIN]), ("http://127.0.0.1:{}", []),
    ("127.0.0.1:{}", [])])
def test_a_remote_http_backend_is_reached_by_connect_too(proxies, proxy_of, login):
    """The proxy's login, if there is one, goes along once, with the CONNECT."""
    def script(played, number):
        played.request()
        played.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        answers(response())(played, number)
    with PlayedBackend(script) as proxy:
        proxies(http_proxy=proxy_of.format(proxy.port))
        with serve(backend_url="http://backend.test:81/sub/v1") as server:
            for number in (1, 2):
                reply = ask(server.port, "POST", "/v1/embeddings?a=b", b"{}",
                            "Proxy-Authorization: Basic theirs")
                connect, head = seen(proxy, 0), seen(proxy, number)
                assert reply.status == 200 and head.one("host") == "backend.test:81"
                assert head.reason == "POST /sub/v1/embeddings?a=b HTTP/1.1"
                assert not head.all("proxy-authorization")
                assert connect.reason == "CONNECT backend.test:81 HTTP/1.1"
                assert connect.all("proxy-authorization") == login
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


@pytest.mark.parametrize("answer", [b"HTTP/1.1 407 \x1b[31mNo\rway", b"\x1b[31mNo HTTP\rat all"])
def test_a_proxy_that_refuses_is_502_backend_unreachable_and_breaks_no_line_of_the_log(
        proxies, log, answer):
    with PlayedBackend(answers(answer + b"\r\n\r\n")) as proxy:
        proxies(https_proxy=proxy.url)
        with serve(backend_url="https://backend.test") as server:
            reply = ask(server.port, body=CHAT)
            assert (reply.status, reply.error()["code"]) == (502, "backend_unreachable")
            assert "its proxy (which must allow CONNECT" in reply.error()["message"]
    assert any("\\x1b[31mNo" in line for line in log)
    assert all(re.fullmatch("[ -~]+", line) for line in log)


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
                with contextlib.suppress(OSError):  # the link is closed already
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
             + b'05;a="b"\r\nhello\r\n1 ; x ;y\t= "\\";\xe9" ;z=1\r\n \r\n0\r\nX-T: 1\r\n\r\n')
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


def test_interim_responses_without_end_are_a_fault_of_the_backend():
    def script(played, number):
        played.request()
        with contextlib.suppress(OSError):
            while True:
                played.send(INTERIM * 100)
    with forward(script) as (port, backend):
        reply = ask(port, body=CHAT)
        assert (reply.status, reply.error()["code"]) == (502, "backend_error")
        assert "1xx" in reply.error()["message"]


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
        assert backend.connections == len(table)  # a body may yet follow: see the next test


@pytest.mark.parametrize("method, head", [
    ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n"),
    ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    ("POST", b"HTTP/1.1 204 No Content\r\n\r\n"), ("GET", b"HTTP/1.1 304 Not Modified\r\n\r\n")])
def test_a_body_behind_a_response_that_has_none_is_nobody_s_answer(method, head):
    """gunicorn 23 sends what an application yields, to HEAD too, and with 204. The client has its
    answer by then, and its link would be the next one's."""
    def script(played, number):
        played.request()
        played.send(head if number == 1 else response(b"mine"))
        if played.request():
            played.send(response(b"the body of the first"))
    with forward(script) as (port, _), Client(port) as client, Client(port) as victim:
        assert not client.send(request(method, FILES)).reply(method).body
        assert victim.send(request(body=CHAT)).reply().body == b"mine"


def test_responses_that_differ_in_their_lengths_alone_are_told_apart():
    """All of them are parsed as one, but for those that tell the length of another body."""
    none, cases = {"HEAD": "200 OK", "GET": "304 No", "POST": "204 No"}, []
    for length in (0, 1, 100, 1_000, 1, 0):
        cases.append(("POST", response(b"x" * length), b"x" * length, str(length)))
        for method, status in none.items():
            head = b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n" % (status.encode(), length)
            cases.append((method, head, b"", str(length) if method != "POST" else None))
    with forward(by_case([answer for _, answer, _, _ in cases])) as (port, backend):
        with Client(port) as client:
            for case, (method, answer, body, told) in enumerate(cases):
                reply = client.send(request(method, f"{FILES}?{case}")).reply(method)
                assert (reply.body, reply.all("content-length")) == (body, [told] * bool(told))
        assert backend.connections == 6 * len(none)  # behind each body that may yet follow


@pytest.mark.parametrize("head", [
    OK_HEAD, OK_HEAD[:-2] + b"Content-Type: text/event-stream\r\n\r\n"], ids=["plain", "events"])
def test_an_answer_is_not_whole_if_its_backend_reset_the_connection_while_it_was_sent_to(head):
    """The error went to send(): after it, recv() says only that there is no more."""
    event = b"data: 1\n\n"

    def script(played, number):
        played.socket.recv(1)
        played.send(head + event)
        played.reset()
    with forward(script) as (port, _):
        reply = ask(port, "POST", FILES, b"x" * (20 << 20))
        assert reply.status == 200 and reply.body.startswith(event)
        assert reply.cut or b'"backend_error"' in reply.body


def test_a_body_that_a_backend_sends_after_all_to_head_is_nobodys_response():
    def script(played, number):
        while read := played.request():
            if not read[0].startswith(b"HEAD"):
                return played.send(response(b"mine"))
            played.send(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n")
            if played.request():
                return played.send(response(b"another's"))
    with forward(script) as (port, _), Client(port) as client:
        assert client.send(request("HEAD", FILES)).reply("HEAD").status == 200
        assert client.send(request("GET", FILES)).reply().body == b"mine"


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


def test_over_tls_too_a_silent_backend_is_504_backend_timeout(pem):
    def script(played, number):
        played.request()
        played.wait_for_end()
    with PlayedBackend(tls(script, pem)) as backend:
        with serve(backend_url=f"https://localhost:{backend.port}", backend_timeout=1) as server:
            reply = ask(server.port, body=CHAT)
            assert (reply.status, reply.error()["code"]) == (504, "backend_timeout")


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_backend_may_take_longer_to_answer_than_to_be_connected(pem, scheme):
    go = threading.Semaphore(0)
    script = stepwise(go, response())
    with PlayedBackend(tls(script, pem) if scheme == "https" else script) as backend:
        url = f"{scheme}://localhost:{backend.port}"
        with serve(backend_url=url, connect_timeout=0.5) as server, Client(server.port) as client:
            client.send(request(body=CHAT))
            eventually(lambda: backend.requests)
            assert not select.select([client.socket], [], [], 1)[0]
            go.release()
            assert client.reply().status == 200


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


def test_what_is_compressed_is_the_backend_s_to_judge():
    body = gzip.compress(CHAT)
    with forward(mirror) as (port, backend):
        for path in (CHATS, "/v1/completions"):
            reply = ask(port, "POST", path, body, "Content-Encoding: gzip")
            assert (reply.status, reply.body) == (200, body)
            assert seen(backend).one("content-encoding") == "gzip"
            assert ask(port, "POST", path, body).error()["code"] == "invalid_json"


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
    methods = ("HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "QUERY", "M-SEARCH")
    with forward(answers(response(b""))) as (port, backend), Client(port) as client:
        for (method, target), body in itertools.product(
                [*zip(itertools.repeat("GET"), targets), *zip(methods, itertools.repeat("/v1/x"))],
                (b"", b"body")):
            reply = client.send(request(method, target, body)).reply(method)
            assert reply.status == 200, (method, target)
            assert seen(backend).reason == f"{method} {target} HTTP/1.1"
            assert backend.requests[-1][1] == body


@pytest.mark.parametrize("method", ("CONNECT", "TRACE"))
def test_a_method_that_is_about_the_way_does_not_reach_the_backend(method):
    with forward(answers(response())) as (port, backend):
        reply = ask(port, method, FILES)
        assert (reply.status, reply.error()["code"]) == (405, "method_not_allowed")
        assert method not in reply.one("allow") and not backend.requests


@pytest.mark.parametrize("method", ("head", "Get", "trace", "x"))
def test_a_method_with_small_letters_does_not_reach_the_backend(method):
    """Some servers read it as the one with capital letters; and then HEAD's reply has no body."""
    with forward(answers(response())) as (port, backend):
        reply = ask(port, method, FILES)
        assert (reply.status, reply.error()["code"]) == (405, "method_not_allowed")
        assert "POST" in reply.one("allow") and not backend.requests


@pytest.mark.parametrize("method, status", [
    *((method, "200 OK") for method in ("GET", "HEAD", "DELETE", "OPTIONS", "QUERY")),
    ("POST", "404 Not Found"), ("PUT", "401 Unauthorized"), ("POST", "501 Not Implemented"),
    ("POST", "307 Temporary Redirect")])
def test_behind_a_body_that_a_backend_may_leave_unread_no_other_request_is_sent(method, status):
    """What it leaves would be the beginning of the next one: somebody else's."""
    evil = b"GET /slots?evil HTTP/1.1\r\nX-Swallow: "
    def script(played, number):
        while True:
            while b"\r\n\r\n" not in played.buffer:
                if not (data := played.socket.recv(65536)):
                    return
                played.buffer += data
            head, _, played.buffer = played.buffer.partition(b"\r\n\r\n")
            played.backend.requests.append((head, b""))
            played.send(response(b"", status))
    with forward(script) as (port, backend), Client(port) as client:
        for _ in range(2):
            reply = client.send(request(method, FILES, evil)).reply(method)
            assert f"{reply.status} {reply.reason}" == status
            assert client.send(request("GET", "/v1/x")).reply().status == reply.status
        targets = [head.split()[1] for head, _ in backend.requests]
        assert targets == [FILES.encode(), b"/v1/x"] * 2
        assert [b"Connection: close" in head for head, _ in backend.requests] == [
            status == "200 OK", False] * 2  # and not for each POST: most are answered with 200


@pytest.mark.parametrize("method, status", [("POST", "404 No"), ("HEAD", "200 OK")])
def test_a_link_that_is_given_up_for_that_keeps_no_port_for_a_minute(method, status):
    """Anyone may be refused so often in a minute that none would be left: it ends by RST."""
    ends = []
    def script(played, number):
        played.request()
        played.send(response(b"", status))
        try:
            ends.append(played.socket.recv(1))
        except ConnectionResetError:
            ends.append("reset")
    with forward(script) as (port, _):
        ask(port, method, FILES, b"x" if method == "POST" else b"")
        eventually(lambda: ends == ["reset"])


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
    theirs = ["TE: trailers", "Proxy-Authorization: Basic abc", "Transfer_Encoding: chunked",
              "X_Request_ID: forged", "X-Forwarded_For: forged", "SCRIPT_NAME: /v1", "Path-Info: /"]
    names = {line.partition(":")[0].lower() for line in (*hops, *theirs)} - {"connection"}
    with forward(answers(response(b"{}", "200 OK", *hops, "X-Kept: 1"))) as (port, backend):
        reply = ask(port, "POST", FILES, b"x", *hops, *theirs, "X-Kept: 1", "X_Kept: 2")
        assert seen(backend).one("x_kept") == "2"
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
        ask(port, "POST", "/v1/files/1/cancel")
        assert seen(backend).one("content-length") == "0"  # for a POST without it, some wait
        told = {"x-forwarded-host": "api.example", "x-forwarded-proto": "https"}  # by a proxy
        ask(port, "GET", "/v1/models", b"", *[f"{name}: {value}" for name, value in told.items()])
        assert {name: seen(backend).one(name) for name in told} == told


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
        monkeypatch, capfd, faults, rule):
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
    assert len(faults) == 1
    faults.clear()


def test_a_fault_that_cannot_even_be_answered_is_none_that_went_well(
        monkeypatch, capfd, echo, faults):
    def fail(*_):
        raise MemoryError
    with Client(echo) as client:
        monkeypatch.setattr(gateway, "find_head", fail)
        monkeypatch.setattr(gateway.Handler, "fail", fail)
        client.send(HEALTH)
        assert client.is_closed()
        wait_for_log(capfd, " internal_error$")
        eventually(lambda: len(faults) == 2)
    faults.clear()


def test_a_fault_is_answered_though_it_cannot_be_noted(monkeypatch, log, faults):
    def fail(*_):
        raise MemoryError
    with serve() as server, Client(server.port) as client:
        monkeypatch.setattr(gateway, "find_head", fail)
        monkeypatch.setattr(gateway.traceback, "format_exc", fail)
        monkeypatch.setattr(gateway, "note_internal_error", NOTE_INTERNAL_ERROR)
        assert client.send(HEALTH).reply().status == 500
        assert lines_of(log)[0].endswith(" internal_error")


def test_accepting_goes_on_where_it_has_failed(monkeypatch, faults):
    failures = [MemoryError, OSError(errno.ENOMEM, "no memory"), ValueError]
    accept = gateway.Server.get_request
    def get_request(server):
        if failures:
            raise failures.pop()
        return accept(server)
    with serve() as server:
        monkeypatch.setattr(gateway.Server, "get_request", get_request)
        assert ask(server.port, "GET", "/healthz").status == 200 and not failures
    assert len(faults) == 2
    faults.clear()


def test_a_client_of_ipv4_has_its_plain_address_on_a_socket_for_both(capfd):
    try:
        socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with forward(answers(response()), host="::") as (port, backend):
        assert ask(port, body=CHAT).status == 200
        assert seen(backend).one("x-forwarded-for") == "127.0.0.1"
        wait_for_log(capfd, " client=127.0.0.1 ")


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


@pytest.mark.parametrize("head", [STREAM_HEAD, CHUNKED_HEAD, ok(b"Content-Length: 9", body=b"")])
def test_what_has_come_with_the_head_of_a_response_goes_out_with_that_of_the_reply(head):
    event = b"data: 1\n\n"
    first = chunked(event, end=False) if b"chunked" in head else event[:-1]
    with forward(stepwise(threading.Semaphore(1), head + first)) as (port, _):
        with Client(port) as client:
            assert client.send(request(body=STREAM)).more()
            assert b"\r\n\r\n" in client.buffer and b"data: 1" in client.buffer


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("head", [STREAM_HEAD, OK_HEAD, ok(b"Content-Length: 9", body=b"")])
def test_our_own_fault_before_anything_of_the_reply_went_out_is_a_500(
        version, head, monkeypatch, faults):
    def fail(*_):
        monkeypatch.undo()
        raise MemoryError
    with forward(answers(head + b"data")) as (port, _), Client(port) as client:
        monkeypatch.setattr(gateway.Body, "feed", fail)
        reply = client.send(request("GET", FILES, version=version)).reply()
        assert (reply.status, reply.error()["code"]) == (500, "internal_error")
        assert version == "1.1" or client.is_closed()
    assert faults
    faults.clear()


def test_fields_against_buffering_are_added_to_event_streams_where_they_are_missing():
    lines = ["X-Accel-Buffering: yes", "Cache-Control: private", "Content-Encoding: x",
             "Content-Type: text/event-stream"]  # for the second time
    streams = [STREAM_HEAD[:-2] + f"{line}\r\n\r\n".encode() + chunked(DONE) for line in lines]
    with forward(by_case([*streams, response()])) as (port, backend):
        for case, expected in enumerate((
                (["yes"], ["no-cache"]), (["no"], ["private"]), (["no"], ["no-cache"]),
                (["no"], ["no-cache"]), ([], []))):
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


def test_behind_an_event_too_big_to_be_held_back_others_are_so_again_and_an_error_can_follow():
    go, long = threading.Semaphore(1), b"data: " + b"x" * 300_000
    rest = b"\n\ndata: 2\n\ndata: 3"
    script = stepwise(go, STREAM_HEAD + chunked(long, end=False), chunked(rest, end=False))
    with forward(script) as (port, backend), Client(port) as client:
        wait_for(client.send(request(body=STREAM)), b"x" * 60_000)
        eventually(lambda: client.more() and client.buffer.count(b"x") >= 300_000)
        go.release()
        wait_for(client, b"data: 2\n\n")
        backend.sockets[0].shutdown(socket.SHUT_RDWR)
        reply = client.reply()
        before, _, last = reply.body.partition(b"data: 2\n\n")
        assert before == long + b"\n\n" and reply.cut
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "backend_error"


def test_a_whole_stream_ends_as_one_in_every_framing():
    """Even if it has no empty line behind its last event, or further lines behind [DONE]."""
    kind, table = b"HTTP/1.1 200 OK\r\nContent-Type: Text/Event-Stream; charset=utf-8\r\n", []
    for stream in (b"data: 1\n\n" + end for end in (
            DONE, DONE[:-1], DONE[:-2], DONE[:-2] + b" ", DONE + b": x\n\n", DONE + b": x\n",
            DONE[:-1] + b"id: 7\n", DONE + b"\n", DONE.replace(b"\n", b"\r"))):
        table += [(stream, kind + b"Content-Length: %d\r\n\r\n%b" % (len(stream), stream)),
                  (stream, kind + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(stream)),
                  (stream, (kind + b"\r\n" + stream,))]
    with forward(by_case([answer for _, answer in table])) as (port, backend):
        for case, (stream, answer) in enumerate(table):
            reply = ask(port, "POST", f"{CHATS}?{case}", STREAM)
            assert reply.body == stream and not reply.cut, answer


@pytest.mark.parametrize("end", (
    DONE + b'data: {"x"', DONE + b": bye", b"data: 1\ndata: [DONE]\nda", b"data: [DONE", b"data: 2",
    b"xdata: [DONE]"))
def test_a_stream_that_ends_by_closing_within_an_event_is_cut_whatever_came_before(end):
    head = STREAM_HEAD.replace(b"Transfer-Encoding: chunked\r\n", b"")
    def script(played, number):
        played.request()
        played.send(head + b"data: 1\n\n" + end)
    with forward(script) as (port, _):
        reply = ask(port, body=STREAM)
        assert reply.cut and reply.events()[-1]["error"]["code"] == "backend_error"


def test_another_type_that_begins_as_that_of_event_streams_does_is_none():
    head = STREAM_HEAD.replace(b"event-stream", b"event-streamed")
    assert head != STREAM_HEAD
    with forward(answers(head + chunked(b"data: 1"))) as (port, _):
        reply = ask(port, body=STREAM)
        assert reply.body == b"data: 1" and not reply.cut and not reply.all("x-accel-buffering")


@pytest.mark.parametrize("kind", [b"Text/Event-Stream", b"text/event-stream ; charset=utf-8",
                                  b"text/event-stream\r\nContent-Type: text/event-stream"])
def test_the_type_of_event_streams_is_one_in_any_spelling(kind):
    head = STREAM_HEAD.replace(b"text/event-stream", kind)
    with forward(closes(head + chunked(b"data: 1\n\n", end=False))) as (port, _):
        reply = ask(port, body=STREAM)
        assert reply.events()[1]["error"]["code"] == "backend_error"
        assert reply.one("x-accel-buffering") == "no"


@pytest.mark.parametrize("path, name", [
    ("/v1/messages", b"message_stop"), ("/v1/responses", b"response.completed"),
    ("/v1/responses", b"response.incomplete"), ("/v1/responses", b"response.failed"),
    ("/v1/responses", b"response.cancelled"), ("/v1/responses", b"response.done"),
    ("/v1/messages", b"error"), ("/v1/responses", b"error")])
def test_a_stream_that_ends_by_closing_wants_the_last_event_of_its_api(path, name):
    """Its name is in a line of its own, or its data's first key or last, as servers have it."""
    head, long = STREAM_HEAD.replace(b"Transfer-Encoding: chunked\r\n", b""), b"x" * 5_000
    text = b'data: {"type":"first", "a": "\\"type\\":\\"%b\\"}", "metadata": {"type":"%b"}}\n\n' % (
        name, name)
    ends = [b"event: %b\ndata: {}\n\n" % name, b'data: {"a":"%b","type":"%b"}\n\n' % (long, name),
            b'data: {"type": "%b", "a": "%b"}\r\n\r\n' % (name, long)]
    cut = [b"", text, text + b"event: other\ndata: {}\n\n"]
    whole = [text + end + more for end in ends for more in (b"", b": bye\n\n")]
    with forward(by_case([(head + stream,) for stream in cut + whole])) as (port, _):
        for case, stream in enumerate(cut + whole):
            reply = ask(port, "POST", f"{path}?{case}", STREAM)
            if stream in cut:
                assert reply.cut and b"backend_error" in reply.body, stream
            else:
                assert (reply.body, reply.cut) == (stream, False)


def test_an_event_of_many_lines_of_done_holds_nobody_up():
    """A search that begins at each of its lines would take the GIL for a quarter of a minute."""
    head = STREAM_HEAD.replace(b"Transfer-Encoding: chunked\r\n", b"")
    def script(played, number):
        played.request()
        played.send(head + b"data: [DONE]\n" * 30_000 + b"x")
    with forward(script) as (port, _):
        assert ask(port, body=STREAM).cut


def test_an_event_stream_of_another_status_needs_no_done():
    head = STREAM_HEAD.replace(b"Transfer-Encoding: chunked\r\n", b"").replace(b"200 OK", b"400 No")
    def script(played, number):
        played.request()
        played.send(head + b"data: 1\n\n")
    with forward(script) as (port, _):
        reply = ask(port, body=STREAM)
        assert (reply.status, reply.body, reply.cut) == (400, b"data: 1\n\n", False)


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


def test_a_client_that_leaves_while_a_used_connection_waits_causes_no_other_one(capfd):
    """To the pool its end looks like that of one which the backend closed while it was idle."""
    def script(played, number):
        for answer in (response(), b""):
            played.request()
            played.send(answer)
        played.wait_for_end()
    with forward(script) as (port, backend):
        assert ask(port, body=CHAT).status == 200
        with Client(port) as client:
            client.send(request(body=CHAT))
            eventually(lambda: len(backend.requests) == 2)
        wait_for_log(capfd, " 499 .*client_closed")
        assert backend.connections == 1


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


@pytest.mark.parametrize("tls", (False, True))
@pytest.mark.parametrize("kind", ("text/plain", "text/event-stream"))
def test_a_client_that_reads_nothing_and_then_half_closes_gives_its_place_back(by_tls, tls, kind):
    """What is being sent to it by then would wait for CLIENT_TIMEOUT, a minute, and its backend."""
    sent, mebibyte = [], chunked(b": %b\n\n" % (b"x" * (1 << 20)), end=False)
    head = STREAM_HEAD.replace(b"text/event-stream", kind.encode())
    def script(played, number):
        if number > 1:
            return answers(response())(played, number)
        played.request()
        with contextlib.suppress(ConnectionError):
            played.send(head)
            while True:
                played.send(mebibyte)
                sent.append(time.monotonic())
        played.wait_for_end()
    with forward(script, max_concurrent_requests=1, **by_tls if tls else {}) as (port, backend):
        connect = TLSClient if tls else Client
        with connect(port) as stuck, connect(port) as client:
            stuck.send(request(body=STREAM))
            eventually(lambda: sent and time.monotonic() > sent[-1] + 0.5)  # all buffers are full
            socket.socket.shutdown(stuck.socket, socket.SHUT_WR)
            eventually(lambda: client.send(request(body=CHAT)).reply().status == 200)
            eventually(lambda: backend.ended)


EVENTFUL = b": %b\n\n" % (b"x" * 100_000)


@pytest.mark.parametrize("drops", [False, True])
def test_a_client_that_does_not_take_its_stream_delays_no_other_and_loses_nothing(drops):
    """Though all streams are relayed by one thread. It may stall in each of many events."""
    many = [b"data: %d\n\n" % n + EVENTFUL for n in range(300)]
    sent, go = [], threading.Semaphore(0)
    def script(played, number):
        if case_of(played.request()[0]):
            played.send(STREAM_HEAD)
            for n in range(10):
                assert go.acquire(timeout=SECONDS)
                played.send(chunked(b"data: %d\n\n" % n, end=n == 9))
            return
        with contextlib.suppress(ConnectionError):
            played.send(STREAM_HEAD)
            for event in many:
                played.send(chunked(event, end=False))
                sent.append(time.monotonic())
            played.send(chunked(DONE))
        played.wait_for_end()
    with forward(script) as (port, backend), Client(port) as stalled, Client(port) as client:
        stalled.send(request("POST", f"{CHATS}?0", STREAM))
        wait_for(stalled, b"data: 0\n\n")
        eventually(lambda: sent and time.monotonic() > sent[-1] + 0.3)  # all buffers are full
        assert len(sent) < len(many)
        client.send(request("POST", f"{CHATS}?1", STREAM))
        for n in range(10):
            go.release()
            wait_for(client, b"data: %d\n\n" % n)
        if drops:
            stalled.vanish()
            eventually(lambda: backend.ended)
        else:
            assert stalled.reply().body == b"".join(many) + DONE


@pytest.mark.parametrize("tls", (False, True))
def test_a_client_that_reads_its_stream_slowly_gets_it_whole(by_tls, tls):
    """Linux has us wait until a third of the connection's buffer is free, however long that takes;
    CLIENT_TIMEOUT is for clients that take nothing."""
    event, sent = b"data: %b\n\n" % (b"x" * 10_000), []
    def script(played, number):
        played.request()
        played.send(STREAM_HEAD)
        for _ in range(1_000):
            played.send(chunked(event, end=False))
            sent.append(time.monotonic())
        played.send(chunked(DONE))
    with forward(script, client_timeout=2, **by_tls if tls else {}) as (port, _), (
            TLSClient if tls else Client)(port) as client:
        client.send(request(body=STREAM))
        eventually(lambda: sent and time.monotonic() > sent[-1] + 0.2)  # all buffers are full
        assert len(sent) < 1_000
        slow = time.monotonic() + 4
        while time.monotonic() < slow:  # 200 kB a second, or on a busy machine a part of that
            client.buffer += client.socket.recv(20_000)
            threading.Event().wait(0.1)
        reply = client.reply()
        assert (reply.body, reply.cut) == (event * 1_000 + DONE, False)


def test_what_came_before_a_broken_chunk_is_passed_on():
    stream = chunked(b"data: 1\n\n", b"data: 2\n\n", end=False) + b"ZZ\r\n"
    with forward(answers(STREAM_HEAD + stream)) as (port, _):
        first, second, last = ask(port, body=STREAM).events()
        assert (first, second, last["error"]["code"]) == (1, 2, "backend_error")


@pytest.mark.parametrize("leaves", [True, False])
def test_a_client_that_stalls_and_then_leaves_or_not_leaves_nothing_in_memory(leaves):
    """Its request may be large, and the collector of cycles comes late."""
    def script(played, number):
        played.request()
        with contextlib.suppress(ConnectionError):
            for piece in [STREAM_HEAD] + 300 * [chunked(EVENTFUL, end=False)]:
                played.send(piece)
                sent.append(time.monotonic())
        played.wait_for_end()
    gc.collect()
    gc.disable()
    try:
        for sent in [], []:
            with forward(script, client_timeout=60 if leaves else 1) as (port, backend):
                with Client(port) as client:
                    client.send(request(body=STREAM[:-1] + b" " * 1_000_000 + b"}"))
                    eventually(lambda: sent and time.monotonic() > sent[-1] + 0.3)
                    if leaves:
                        client.vanish()
                    eventually(lambda: backend.ended)
            handlers = [each for each in gc.get_objects() if isinstance(each, gateway.Handler)]
            assert not handlers
    finally:
        gc.enable()


@pytest.mark.parametrize("lacks", ["epoll", "descriptors", "threads", "watches"])
def test_streams_work_where_the_system_has_nothing_to_relay_them_in_one_thread(lacks, monkeypatch):
    class NoWatches:
        def close(self):
            pass
        def poll(self, timeout):
            time.sleep(timeout)
            return []
        def register(self, *_):
            raise OSError(errno.ENOSPC, "no watches are left")
    def fail(*_):
        raise OSError(errno.EMFILE, "Too many open files")
    pieces, go = [b"data: %d\n\n" % n for n in range(5)], threading.Semaphore(0)
    script = stepwise(go, STREAM_HEAD, *[
        chunked(piece, end=piece is pieces[-1]) for piece in pieces])
    if lacks == "epoll":
        monkeypatch.delattr(select, "epoll")
        monkeypatch.delattr(socket, "MSG_DONTWAIT")  # as on Windows
    elif lacks == "threads":
        real = threading.Thread.start
        def start(thread):
            if "_run" in thread.name:
                raise RuntimeError("can't start new thread")
            real(thread)
        monkeypatch.setattr(threading.Thread, "start", start)
    else:
        monkeypatch.setattr(select, "epoll", NoWatches if lacks == "watches" else fail)
    with forward(script) as (port, backend), Client(port) as client:
        client.send(request(body=STREAM))
        go.release()
        for piece in pieces:
            go.release()
            wait_for(client, piece)
        assert client.reply().body == b"".join(pieces)


def test_a_stream_may_last_longer_than_its_backend_may_be_silent():
    def script(played, number):
        played.request()
        played.send(STREAM_HEAD)
        for _ in range(10):
            time.sleep(0.2)
            played.send(chunked(b"data: 1\n\n", end=False))
        played.send(chunked(DONE))
    with forward(script, backend_timeout=1) as (port, _):
        assert ask(port, body=STREAM).events() == [1] * 10 + ["[DONE]"]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_shortage_of_memory_hides_no_cut_of_a_stream(version):
    """It comes where its thread has met the cut, and has not yet told so."""
    class Lock:
        real, short = threading.Lock(), [MemoryError] * 3
        def __enter__(self):
            if die.is_set() and self.short and "_run" in threading.current_thread().name:
                raise self.short.pop()
            self.real.acquire()
        def __exit__(self, *_):
            self.real.release()
    die = threading.Event()
    def script(played, number):
        played.request()
        played.send(STREAM_HEAD + chunked(b"data: 1\n\n", end=False))
        assert die.wait(SECONDS)
    with PlayedBackend(script) as backend, serve(backend_url=backend.url) as server, Client(
            server.port) as client:
        server.streams._lock = Lock()
        wait_for(client.send(request(path="/v1/responses", body=STREAM, version=version)), b"1\n\n")
        die.set()
        assert client.reply().events()[-1]["error"]["code"] == "backend_error"
        assert not Lock.short


def test_streams_outlive_a_shortage_of_memory(monkeypatch):
    short, go, real = threading.Event(), threading.Semaphore(0), select.epoll
    class Watches:
        def __init__(self):
            self.register, self.unregister, self.close, self.watches = (
                (epoll := real()).register, epoll.unregister, epoll.close, epoll)
        def poll(self, timeout):
            if short.is_set():
                short.clear()
                raise MemoryError
            return self.watches.poll(timeout)
    monkeypatch.setattr(select, "epoll", Watches)
    with forward(stepwise(go, STREAM_HEAD, *[chunked(b"data: 1\n\n", end=False)] * 2,
                          chunked(DONE))) as (port, _), Client(port) as client:
        go.release(2)
        wait_for(client.send(request(body=STREAM)), b"data: 1\n\n")
        short.set()
        eventually(lambda: not short.is_set())
        go.release(2)
        assert client.reply().events() == [1, 1, "[DONE]"]


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
            assert first == {"a": "[DONE]"} and [*last] == ["error"], case
            assert {*last["error"]} == {"code", "message", "param", "type"}, case
            assert (last["error"]["type"], last["error"]["code"]) == ("server_error", code), case
            assert reply.cut == (case[3] == "1.1") and client.is_closed(), case
    wait_for_log(capfd, f" 200 .*{code}")


def test_errors_to_anthropic_s_sdks_have_their_shape_too():
    """Their events have a name (_streaming.py), and @ai-sdk/anthropic wants "type": "error"."""
    path = "/v1/messages/count_tokens"
    with dying("FIN", [(b"text/event-stream", path, "chunks", "1.1")], b"data: 1\n\n", b"1") as (
            client,):
        reply = client.reply()
        begun, event = reply.body[:-2].split(b"\n\n")
        name, data = event.split(b"\ndata: ")
        assert (reply.cut, begun, name) == (True, b"data: 1", b"event: error")
    with serve() as server:
        refusal, other = ask(server.port, "POST", path), ask(server.port, "POST", FILES)
        assert refusal.status == 404 and [*other.json()] == ["error"]
        for told in json.loads(data), refusal.json():
            assert told["type"] == "error" and {*told["error"]} == {
                "message", "type", "param", "code"}


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
    ("status=429", CHAT, 429, lambda reply: (reply.one("retry-after"), reply.error()["type"]) == (
        "1", "rate_limit_error")),
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
    vector, packed = (ask(mock[1], "POST", "/v1/embeddings", body).json()["data"][0]["embedding"]
                      for body in (b"{}", b'{"encoding_format": "base64"}'))
    assert list(struct.unpack("<3f", base64.b64decode(packed))) == vector
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


def test_a_connection_that_cannot_be_served_does_not_end_the_server(monkeypatch, capfd):
    def fail(*_):
        monkeypatch.undo()
        raise MemoryError
    with serve() as server:
        monkeypatch.setattr(gateway, "start_new_thread", fail)
        with Client(server.port) as client:
            assert client.reply().error()["code"] == "too_many_connections"
        assert ask(server.port, "GET", "/healthz").json() == OK


def test_a_thread_serves_one_connection_after_another_and_ends_when_none_comes(monkeypatch):
    started, ended, start = [], [], gateway.start_new_thread

    def counted(function, arguments):
        def run(*arguments):
            started.append(function)
            function(*arguments)
            ended.append(function)
        start(run, arguments)

    def two_at_once():
        with Client(server.port) as first, Client(server.port) as second:
            for client in (first, second):
                assert client.send(HEALTH).reply().json() == OK
        eventually(lambda: not server.connections)
    monkeypatch.setattr(gateway, "start_new_thread", counted)
    monkeypatch.setattr(gateway, "THREAD_SECONDS", SECONDS)
    with serve() as server:
        for _ in range(3):
            assert ask(server.port, "GET", "/healthz").json() == OK
            eventually(lambda: server.idle)
        assert started.count(server.serve) == 1
        two_at_once()
        eventually(lambda: len(server.idle) == 2)
        longest = server.idle[0]
        assert ask(server.port, "GET", "/healthz").json() == OK
        eventually(lambda: len(server.idle) == 2)
        assert server.idle[0] is longest  # who is not needed can end
        monkeypatch.setattr(gateway, "THREAD_SECONDS", 0.01)
        two_at_once()
        assert started.count(server.serve) == 2
        eventually(lambda: ended.count(server.serve) == 2)
        assert ask(server.port, "GET", "/healthz").json() == OK
        assert started.count(server.serve) == 3


def test_a_connection_that_comes_when_its_thread_is_about_to_end_is_served(monkeypatch):
    ended = threading.Event()

    class Late(queue.SimpleQueue):
        def get(self, timeout=None):
            if timeout is None:
                return super().get()
            eventually(lambda: self not in server.idle or ended.is_set())
            raise queue.Empty

    monkeypatch.setattr(gateway, "SimpleQueue", Late)
    with serve() as server:
        for _ in range(3):
            assert ask(server.port, "GET", "/healthz").json() == OK
            eventually(lambda: server.idle)
        ended.set()
        eventually(lambda: not server.idle)


def test_a_failing_sweep_does_not_end_the_server(monkeypatch, faults):
    failed = threading.Event()

    def fail(*_):
        failed.set()
        raise MemoryError
    with serve() as server:
        monkeypatch.setattr(gateway, "hung_up", fail)
        assert failed.wait(SECONDS)
        assert ask(server.port, "GET", "/healthz").json() == OK
        monkeypatch.undo()
    assert faults
    faults.clear()


def test_loopback_by_another_name_uses_no_proxy():
    for host in ("localhost.", "[::1]", "127.1.2.3"):
        with Process("--port=0", f"--backend-url=http://{host}:9",
                     http_proxy="http://proxy.test:3128") as process:
            assert process.port and "proxy" not in process.log


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


# -- helpers for the tests with several backends ---------------------------------------------------


class Mortal(PlayedBackend):
    """A PlayedBackend that can die, so that its port refuses connections, and rise again there."""

    dead = False

    def __init__(self, script):
        super().__init__(script)
        self.listener.close()  # bound by its number, the port stays ours while nothing listens
        self.listener = socket.create_server(("127.0.0.1", self.port), backlog=1024)

    def die(self):
        self.dead = True
        self.listener.shutdown(socket.SHUT_RDWR)
        self.acceptor.join(SECONDS)
        for sock in self.sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def rise(self):
        self.dead = False
        self.listener.listen(1024)
        self.__enter__()

    def __exit__(self, *about):
        if self.dead:
            self.rise()
        super().__exit__(*about)


@contextlib.contextmanager
def several(*scripts, urls=(), settle=True, **knobs):
    """Backends that play the scripts, and those at `urls`, behind a gateway whose first probes are
    over if it has to `settle`; yields (its port, *backends)."""
    server = None
    try:
        with contextlib.ExitStack() as stack:
            backends = [stack.enter_context(Mortal(script)) for script in scripts]
            urls = ",".join([*(backend.url for backend in backends), *urls])
            server = stack.enter_context(serve(backend_url=urls, **knobs))
            probed = settle and knobs.get("probe_interval")
            eventually(lambda: not probed or all(
                each.probe_at and not each.probing for each in server.backends.all))
            yield server.port, *backends
    finally:
        eventually(lambda: not server or not any(each.probing for each in server.backends.all))
        for link in itertools.chain(*server.backends.pool._idle.values()) if server else ():
            link.sock.close()


@pytest.fixture
def clock(monkeypatch):
    """The gateway's `time`, whose monotonic clock stands unless a test changes `now`."""
    clock = types.SimpleNamespace(**vars(time), now=time.monotonic())
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(gateway, "time", clock)
    return clock


def models(*ids):
    """Return a list of models as a response."""
    cards = [{"id": name, "object": "model", "created": 1, "owned_by": "test"} for name in ids]
    return response(json.dumps({"object": "list", "data": cards}).encode())


EVENT = STREAM_HEAD + chunked(b"data: 1\n\n", end=False)  # a stream that has begun


def plays(then=response(), listed=None, once=None, go=None):
    """Return a script, for one or several backends, that answers with `then`.

    But GET /v1/models with `listed`; a request for ?held with a stream that waits for `go`; and
    their first request of all with `once`, bytes or a function of Played, and a close.
    """
    numbers = itertools.count()
    def script(played, number):
        while read := played.request():
            if listed and re.search(rb" /(base/)?v1/models[? ]", read[0]):
                played.send(listed)
            elif once is not None and not next(numbers):
                return once(played) if callable(once) else played.send(once)
            elif b"?held" in read[0]:
                played.send(EVENT)
                assert go.wait(SECONDS)
                played.send(chunked(DONE))
            else:
                played.send(then)
    return script


def hold(stack, port):
    """Begin a stream that waits; return its client once its first event has come."""
    client = stack.enter_context(Client(port)).send(request("POST", CHATS + "?held", STREAM))
    wait_for(client, b"data: 1\n\n")
    return client


def counts(backends):
    """Return how many requests each got, the gateway's own probes aside."""
    return [sum(b"\r\nX-Forwarded-For: " in head for head, _ in backend.requests)
            for backend in backends]


def states(port, *keys):
    """Return what /readyz tells of each backend, by its address; or these values of each."""
    known = {state["url"]: state for state in ask(port, "GET", "/readyz").json()["backends"]}
    return [tuple(state[key] for key in keys) for state in known.values()] if keys else known


def chats(port, number, model="m", held=0):
    """Send so many requests for a model, one after the other, while `held` others are in flight;
    return the set of their statuses."""
    def is_quiet():
        return sum(count for count, in states(port, "in_flight")) == held
    body, statuses = json.dumps({"model": model, "messages": []}).encode(), set()
    for _ in range(number):
        eventually(is_quiet)  # a request is over a moment after its client has the reply
        statuses.add(ask(port, body=body).status)
    eventually(is_quiet)
    return statuses


def changes(log):
    """Return the changes of state in the log, as (address, "up" or "down")."""
    return [match.groups() for line in log if (match := re.search(r"backend (\S+) is (\w+)", line))]


def take_port(stack):
    """Return a port that refuses connections until a server is told to take it."""
    sock = stack.enter_context(socket.socket())
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    return sock.getsockname()[1]


# -- 5. Backends: who serves what ------------------------------------------------------------------


def test_a_request_goes_to_a_backend_that_lists_its_model_from_the_first_one_on():
    """Whatever its kind and size; those that list the model take turns, and if none does, all."""
    form = (b'--b\r\nContent-Disposition: form-data; name="file"; filename="model"\r\n\r\n'
            b'a\r\n\r\nb\r\n--b\r\nContent-Disposition: form-data; name="model"\r\n\r\no/2\r\n'
            b'--b--\r\n')
    big = b'{"input": "%b", "model": "o/2"}' % (b"x" * 1_500_000)
    with several(plays(listed=models("m1", "both")),
                 plays(response(b"", "404 Not Found"), models("o/2", "both")),
                 probe_interval=600) as (port, one, two):
        assert chats(port, 4, "m1") == {200} and counts([one, two]) == [4, 0]
        assert chats(port, 4, "o/2") == {404} and counts([one, two]) == [4, 4]
        assert chats(port, 6, "both") == {200, 404} and counts([one, two]) == [7, 7]
        for method, path, kind, body in (
                ("POST", "/v1/completions", "application/json", b'{"model": "o/2"}'),
                ("POST", "/v1/embeddings", "application/json; charset=utf-8", big),
                ("POST", "/v1/audio/transcriptions", "multipart/form-data; boundary=b", form),
                ("GET", "/v1/models/o/2", "", b""), ("GET", "/v1/models/o%2F2", "", b""),
                ("HEAD", "/v1/models/o/2?a=b", "", b"")):
            for _ in range(3):
                assert ask(port, method, path, body, f"Content-Type: {kind}").status == 404, path
                assert seen(two).reason == f"{method} {path} HTTP/1.1"
                assert two.requests[-1][1] == body
        assert counts([one, two]) == [7, 7 + 18]
        assert chats(port, 4, "nobody's") == {200, 404} and counts([one, two]) == [9, 27]


@pytest.mark.parametrize("listed", [
    response(status="404 Not Found"), response(status="401 Unauthorized"), response(b"no JSON"),
    response(b"[]"), response(b'{"data": null}'), response(b'{"data": [5]}'),
    response(b"[" * 100_000), response(b'{"n": %b}' % (b"9" * 5000)), response(b"\xff\xfe{")])
def test_a_backend_whose_models_cannot_be_listed_serves_all(listed):
    with several(plays(listed=models("m1")), plays(listed=listed),
                 probe_interval=600) as (port, one, two):
        assert chats(port, 6, "m1") == {200} and counts([one, two]) == [3, 3]
        assert chats(port, 4, "other") == {200} and counts([one, two]) == [3, 7]
        assert states(port, "up", "models") == [(True, ["m1"]), (True, None)]
        assert [card["id"] for card in ask(port, "GET", "/v1/models").json()["data"]] == ["m1"]
        with several(urls=[two.url, two.url + "/base"], probe_interval=600) as (port, *_):
            reply = ask(port, "GET", "/v1/models?a=b")  # by one of the two, as it is
            assert reply.body == listed.partition(b"\r\n\r\n")[2]
            assert seen(two).reason.endswith("/v1/models?a=b HTTP/1.1")


def test_a_model_that_nobody_lists_is_not_asked_of_one_that_is_down_and_never_told_its_models():
    with several(plays(listed=models("a")), urls=[dead_address()], probe_interval=600) as (
            port, one):
        assert chats(port, 3, "b") == {200} and counts([one]) == [3]


def test_a_list_of_models_that_was_known_outlives_a_probe_that_gets_none():
    lists = [models("m")]
    def script(played, number):
        while played.request():
            played.send(lists[-1])
    with several(script, probe_interval=0.1) as (port, backend):
        lists.append(response(status="429 Slow Down"))
        before = len(backend.requests)
        eventually(lambda: len(backend.requests) > before + 2)
        assert states(port, "up", "models") == [(True, ["m"])]


def test_a_backend_that_lists_no_model_any_more_gets_no_request_for_one():
    with several(plays(listed=models("m")), plays(listed=models("m")),
                 probe_interval=0.1) as (port, one, two):
        assert chats(port, 4) == {200} and counts([one, two]) == [2, 2]
        one.script = plays(listed=models())
        for sock in one.sockets:
            with contextlib.suppress(OSError):  # so that the next link meets the new script
                sock.shutdown(socket.SHUT_RDWR)
        eventually(lambda: states(port, "models") == [([],), (["m"],)])
        assert chats(port, 4) == {200} and counts([one, two]) == [2, 6]


def test_a_request_goes_where_the_fewest_are_in_flight_and_ties_are_taken_in_turn():
    """A stream is in flight until its end, or until its client leaves."""
    go = threading.Event()
    with several(*[plays(go=go)] * 3) as (port, *backends), contextlib.ExitStack() as stack:
        leaves, stays = [hold(stack, port) for _ in range(2)]
        assert sorted(counts(backends)) == [0, 1, 1] and chats(port, 4, held=2) == {200}
        assert sorted(counts(backends)) == [1, 1, 4]
        assert sorted(states(port, "in_flight")) == [(0,), (1,), (1,)]
        leaves.vanish()
        eventually(lambda: sorted(states(port, "in_flight")) == [(0,), (0,), (1,)])
        go.set()
        assert stays.reply().events() == [1, "[DONE]"]
        eventually(lambda: states(port, "in_flight") == [(0,)] * 3)
        before = counts(backends)
        assert chats(port, 9) == {200}
        assert [after - count for after, count in zip(counts(backends), before)] == [3, 3, 3]


def test_the_models_are_the_union_over_the_backends_and_survive_a_dead_one():
    """In OpenAI's shape even where a backend is terse."""
    def ids():
        reply = ask(port, "GET", "/v1/models")
        assert reply.status == 200 and reply.json()["object"] == "list"
        for card in reply.json()["data"]:
            assert card["object"] == "model" and type(card["created"]) is int and card["owned_by"]
        return sorted(card["id"] for card in reply.json()["data"])
    terse = response(b'{"data": [{"id": "b"}, {"id": "c"}]}')
    with several(plays(listed=models("a", "b")), plays(listed=terse), urls=[dead_address()],
                 probe_interval=0.1) as (port, one, two):
        assert ids() == ["a", "b", "c"]
        reply = ask(port, "HEAD", "/v1/models")
        assert reply.status == 200 and not reply.body and int(reply.one("content-length")) > 50
        one.die()
        assert "c" in ids()
        eventually(lambda: ids() == ["b", "c"])
        one.rise()
        eventually(lambda: ids() == ["a", "b", "c"])
        assert counts([one, two]) == [0, 0]


# -- 5. Backends: failover -------------------------------------------------------------------------

BROKEN = {"closes": b"", "resets": Played.reset, "half a head": b"HTTP/1.1 200 OK\r\nA: b\r\n",
          "no HTTP": b"\x16\x03\x01\r\n\r\n"}
REFUSED = {status: response(b'{"no": %d}' % status, f"{status} No", "X-A: b", "X-A: c")
           for status in (502, 503, 504)}
FAULTS = BROKEN | REFUSED


@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_that_can_be_repeated_goes_to_one_other_backend(fault):
    """It is the very same, and nothing of the first answer is seen. No other is repeated."""
    for method, path in (("POST", CHATS), ("POST", "/v1/completions"), ("POST", "/v1/embeddings"),
                         ("POST", "/v1/messages"), ("GET", "/v1/x"), ("HEAD", "/v1/x")):
        body = CHAT if method == "POST" else b""
        with several(*[plays(once=FAULTS[fault])] * 3) as (port, *backends):
            reply = ask(port, method, path, body, f"X-Request-ID: {ID}")
            assert (reply.status, reply.all("x-a")) == (200, []), (method, path)
            assert sorted(counts(backends)) == [0, 1, 1]
            for backend in (backend for backend in backends if backend.requests):
                assert seen(backend).reason == f"{method} {path} HTTP/1.1"
                assert f"http://{seen(backend).one('host')}" == backend.url
                assert seen(backend).one("x-request-id") == ID and backend.requests[0][1] == body
    for method, path in (("POST", FILES), ("POST", "/v1/batches"), ("POST", CHATS + "/a/cancel"),
                         ("DELETE", "/v1/files/1"), ("PUT", "/v1/x"), ("PATCH", "/v1/x"),
                         ("PUT", CHATS), ("DELETE", CHATS)):
        with several(*[plays(once=FAULTS[fault])] * 3) as (port, *backends):
            reply = ask(port, method, path, CHAT)
            assert sorted(counts(backends)) == [0, 0, 1], (method, path)
            assert (reply.status, reply.json()) == (fault, {"no": fault}) if fault in REFUSED else (
                reply.status, reply.error()["code"]) == (502, "backend_error")


@pytest.mark.parametrize("status", REFUSED)
def test_no_request_reaches_more_than_two_backends_and_the_last_answer_is_passed_on(status):
    """Not even when all of them are known to be down."""
    numbers = itertools.count(1)
    def script(played, number):
        while played.request():
            played.send(response(b"%d" % next(numbers), f"{status} No", "X-A: b", "X-A: c"))
    with several(*[script] * 4) as (port, *backends):
        for _ in range(4):
            before, reply = sum(counts(backends)), ask(port, body=CHAT)
            assert 1 <= sum(counts(backends)) - before <= 2
            assert (reply.status, reply.json()) == (status, sum(counts(backends)))
            assert reply.all("x-a") == ["b", "c"]


def test_a_request_that_kills_its_backend_kills_no_more_than_two():
    """Even where connections are kept: the one that ends is dialled again, and refused."""
    def script(played, number):
        while read := played.request():
            if b"deadly" in read[1]:
                return played.backend.die()
            played.send(response())
    with several(*[script] * 4) as (port, *backends):
        assert chats(port, 4) == {200} and counts(backends) == [1] * 4
        reply = ask(port, body=b'{"deadly": 1}')
        assert (reply.status, reply.error()["code"]) == (502, "backend_error")
        assert sum(backend.dead for backend in backends) == 2 and chats(port, 4) == {200}


@pytest.mark.parametrize("method, path", [("POST", CHATS), ("POST", FILES), ("DELETE", "/v1/x")])
def test_backends_that_cannot_be_reached_cost_no_request_of_any_method(method, path):
    """They refuse, or are too slow to connect to; and none of that is the one repetition."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        stack.enter_context(socket.create_connection(full.getsockname()))
        urls = [dead_address(), dead_address(), f"http://127.0.0.1:{full.getsockname()[1]}"]
        script = plays(once=REFUSED[503] if path == CHATS else None)
        with several(script, script, urls=urls, connect_timeout=0.3) as (port, *backends):
            for _ in range(5):
                assert ask(port, method, path, CHAT).status == 200
            assert not any(states(port)[url]["up"] for url in urls)
            assert sum(counts(backends)) == 5 + (path == CHATS)


def test_where_no_backend_can_be_reached_it_is_503_and_the_first_that_returns_is_used():
    with several(plays(), plays()) as (port, one, two):
        one.die()
        two.die()
        for method, path in (("POST", CHATS), ("GET", "/v1/x"), ("DELETE", "/v1/x")) * 3:
            reply = ask(port, method, path, CHAT)
            assert (reply.status, reply.error()["code"]) == (503, "no_healthy_backend")
            assert int(reply.one("retry-after")) >= 1
        two.rise()  # within its back-off
        assert chats(port, 3) == {200} and counts([one, two]) == [0, 3]


def test_an_answer_is_passed_on_if_no_other_backend_can_be_reached():
    def script(played, number):
        played.request()
        (two if played.backend is one else one).die()
        played.send(REFUSED[503])
    with several(script, script) as (port, one, two):
        reply = ask(port, body=CHAT)
        assert (reply.status, reply.json(), reply.all("x-a")) == (503, {"no": 503}, ["b", "c"])
        assert sum(counts([one, two])) == 1


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_failures_that_of_the_backend_which_was_reached_is_told(order):
    with PlayedBackend(lambda played, number: played.request()) as broken:
        with serve(backend_url=",".join([broken.url, dead_address()][::order])) as server:
            reply = ask(server.port, body=CHAT)
            assert (reply.status, reply.error()["code"]) == (502, "backend_error")


@pytest.mark.parametrize("fault", ["closes", 503])
def test_a_backend_in_its_back_off_is_asked_before_a_request_fails(fault, clock):
    """It may be back: both are restarted one after the other in any rollout."""
    def script(played, number):
        while read := played.request():
            if b"?bad" in read[0]:
                return played.send(FAULTS[fault])
            played.send(response())
    with several(script, plays()) as (port, one, two):
        two.die()
        assert chats(port, 2) == {200} and not states(port)[two.url]["up"]
        two.rise()
        assert ask(port, path=CHATS + "?bad", body=CHAT).status == 200
        assert counts([two]) == [1]


def test_an_answer_whose_body_does_not_come_delays_no_repetition():
    head = response(b"x" * 100, "503 No")[:-100]
    def wait(played):
        played.send(head)
        played.wait_for_end()
    with several(*[plays(once=wait)] * 2, backend_timeout=600) as (port, *backends):
        assert chats(port, 1) == {200} and counts(backends) == [1, 1]


def test_a_429_is_passed_on_unless_another_backend_is_free_to_take_it(clock, log):
    """Which one that is down, or does not list the model, is not."""
    busy = response(b'{"n": 1}', "429 Slow Down", "Retry-After: 9", "X-RateLimit-Remaining: 0")
    with several(*[plays(once=busy)] * 2) as (port, *backends):
        assert chats(port, 6) == {200} and sorted(counts(backends)) == [3, 4]
    for listed in (None, models("m")):
        log.clear()
        with several(*[plays(busy, listed)] * 2, probe_interval=600 if listed else 0) as (
                port, one, two):
            reply = ask(port, body=CHAT)
            assert (reply.status, reply.json(), counts([one, two])) == (429, {"n": 1}, [1, 1])
            assert (reply.one("retry-after"), reply.one("x-ratelimit-remaining")) == ("9", "0")
            assert not changes(log)
            two.die()
            assert chats(port, 3) == {429} and counts([one, two]) == [4, 1]
            two.rise()  # within its back-off
            assert chats(port, 3) == {429} and counts([one, two]) == [7, 1]
    with several(plays(busy, models("m")), plays(listed=models("other")),
                 probe_interval=600) as (port, one, two):
        assert chats(port, 3) == {429} and counts([one, two]) == [3, 0]


@pytest.mark.parametrize(("second", "expected"), [
    (response(), 200), (response(b"", "503 Busy"), 503), (b"", 502)])
def test_after_a_429_any_request_goes_to_another_backend_for_it_has_not_been_taken(
        second, expected):
    """Even one that may not be sent twice; and what that one makes of it is the answer."""
    with several(plays(response(b"", "429 Slow Down")), plays(once=second), plays()) as (
            port, *backends):
        assert ask(port, "POST", FILES, b"x").status == expected
        assert counts(backends) == [1, 1, 0]


def test_a_request_goes_to_none_that_lacks_its_model_while_one_that_lists_it_is_down():
    """Its 404 would call an outage the client's mistake."""
    with several(plays(REFUSED[503], models("m")), plays(listed=models("other")),
                 probe_interval=600) as (port, one, two):
        assert chats(port, 2) == {503} and counts([one, two]) == [2, 0]
        one.die()
        assert ask(port, body=CHAT).error()["code"] == "no_healthy_backend"
        one.script = plays()
        one.rise()
        assert chats(port, 1) == {200} and counts([one, two]) == [3, 0]


def test_a_client_that_leaves_is_no_failure_and_its_request_goes_to_no_other_backend(log):
    def script(played, number):
        while b"?gone" not in (read := played.request())[0]:
            played.send(response())
        played.send(EVENT if b"begun" in read[0] else b"")
        played.wait_for_end()
    with several(script, script) as (port, *backends):
        for number, wish in ((1, "?gone"), (2, "?gone&begun")):
            with Client(port) as client:
                client.send(request("POST", CHATS + wish, STREAM))
                eventually(lambda: sum(counts(backends)) == number)
                wait_for(client, b"data: 1\n\n" if "begun" in wish else b"")
                client.vanish()
            eventually(lambda: sum(" 499 " in line for line in log) == number)
            eventually(lambda: sum(len(backend.ended) for backend in backends) == number)
        assert sum(counts(backends)) == 2 and not changes(log)


# -- 5. Backends: ejection -------------------------------------------------------------------------

EJECTING = {  # (what a backend does, knobs, the status that its client gets, how many others do)
    **{name: (fault, {}, 200, 1) for name, fault in FAULTS.items()},
    "a cut body": (response()[:-3], {}, 200, 0), "a cut stream": (EVENT, {}, 200, 0),
    "silence": (Played.wait_for_end, {"backend_timeout": 0.5}, 504, 0)}  # which is not retried


@pytest.mark.parametrize("case", EJECTING)
def test_a_backend_that_fails_is_skipped_until_its_back_off_ends(case, clock, log):
    """Each change of state is a line of the log. A reply that has begun is never begun again."""
    fault, knobs, status, others = EJECTING[case]
    with several(*[plays(once=fault)] * 2, **knobs) as (port, *backends):
        reply = ask(port, body=STREAM)
        assert (reply.status, reply.cut) == (status, "cut" in str(case))
        (url, state), = changes(log)
        bad, good = sorted(backends, key=lambda backend: backend.url != url)
        assert (state, counts([bad, good])) == ("down", [1, others])
        assert [line for line in log if re.search(r"is down: .+$", line)]
        assert chats(port, 6) == {200} and counts([bad, good]) == [1, others + 6]
        assert [states(port)[backend.url]["up"] for backend in (bad, good)] == [False, True]
        clock.now += 1.1
        assert chats(port, 6) == {200} and counts([bad, good]) == [4, others + 9]
        assert changes(log) == [(url, "down"), (url, "up")] and states(port)[url]["up"]


@pytest.mark.parametrize("status", [200, 302, 400, 401, 404, 408, 422, 500, 501])
def test_any_other_answer_is_final_and_no_sign_of_ill_health(status, clock, log):
    with several(*[plays(response(status=f"{status} X"))] * 2) as (port, *backends):
        assert chats(port, 6) == {status} and counts(backends) == [3, 3] and not changes(log)


def test_the_back_off_doubles_from_1_to_30_seconds_and_one_success_ends_it(clock, log):
    replies = [REFUSED[503]]
    def script(played, number):
        while played.request():
            played.send(replies[-1])
    with several(script, plays()) as (port, sick, well):
        def tries(seconds):
            clock.now, before, = clock.now + seconds, sum(counts([sick]))
            assert chats(port, 4) == {200}
            return sum(counts([sick])) - before
        assert tries(0) == 1
        for back_off in (1, 2, 4, 8, 16, 30, 30):
            assert (tries(back_off * 0.95), tries(back_off * 0.1)) == (0, 1), back_off
        assert changes(log) == [(sick.url, "down")]
        replies.append(response())
        assert tries(31) in (2, 3) and changes(log)[1:] == [(sick.url, "up")]
        replies.append(REFUSED[503])
        assert (tries(0), tries(0.95), tries(0.1)) == (1, 0, 1)


@pytest.mark.parametrize("value, seconds", [
    ("7", 7), ("0007", 7), ("9" * 9, 300), ("Sat, 01 Jan 2050 00:00:00 GMT", 300),
    ("Sat, 01 Jan 2000 00:00:00 GMT", 1), ("Sat, 01 Jan 50000 00:00:00 GMT", 1), ("-5", 1),
    ("Sat, 01 Jan 2050 00:00:00 +" + "9" * 20, 1),
    ("soon", 1), ("\xb2", 1), ("1_0", 1),
    pytest.param("9" * 5000, 300, id="5000 digits")])
def test_retry_after_of_a_503_is_honoured_within_reason(value, seconds, clock):
    no = response(b"{}", "503 No", f"Retry-After: {value}")
    with several(*[plays(once=no)] * 2) as (port, *backends):
        assert chats(port, 1) == {200} and counts(backends) == [1, 1]
        clock.now += seconds * 0.95
        assert chats(port, 4) == {200} and sorted(counts(backends)) == [1, 5]
        clock.now += seconds * 0.1
        assert chats(port, 4) == {200} and min(counts(backends)) > 1


@pytest.mark.parametrize("status", [502, 504])
def test_retry_after_of_another_status_is_not_the_backend_s_own(status, clock):
    no = response(b"{}", f"{status} No", "Retry-After: 60")
    with several(*[plays(once=no)] * 2) as (port, *backends):
        assert chats(port, 1) == {200}
        clock.now += 1.1
        assert chats(port, 4) == {200} and min(counts(backends)) > 1


def test_what_a_backend_gets_in_its_back_off_does_not_make_that_longer(clock):
    replies = [REFUSED[503], response()]
    def script(which, played, number):
        while played.request():
            played.send(replies[which])
    with several(*[functools.partial(script, which) for which in (0, 1)]) as (port, one, two):
        assert chats(port, 1) == {200} and counts([one, two]) == [1, 1]
        clock.now += 0.5
        replies[1] = REFUSED[503]
        assert chats(port, 1) == {503} and counts([one, two]) == [2, 2]
        clock.now += 0.6
        replies[:] = [response()] * 2
        assert chats(port, 1) == {200} and counts([one, two]) == [3, 2]


@pytest.mark.parametrize("fares", ["well", "and its client leaves"])
def test_when_a_back_off_has_ended_one_request_tries_and_no_other_before_it_succeeds(fares, clock):
    go, end, numbers = threading.Event(), threading.Event(), itertools.count()
    def script(played, number):
        while read := played.request():
            if not next(numbers):
                return played.send(REFUSED[503])
            assert b"?trial" not in read[0] or go.wait(SECONDS)
            played.send(response())
    with several(script, plays(go=end)) as (port, one, two), contextlib.ExitStack() as stack:
        assert chats(port, 2) == {200} and counts([one, two]) == [1, 2]
        clients = [hold(stack, port) for _ in range(2)]
        clock.now += 1.1
        trial = stack.enter_context(Client(port)).send(request("POST", CHATS + "?trial", CHAT))
        eventually(lambda: counts([one, two]) == [2, 4])
        assert chats(port, 4, held=3) == {200} and counts([one, two]) == [2, 8]  # the busier one
        if fares == "well":
            go.set()
            assert trial.reply().status == 200
        else:
            trial.vanish()
        def returns():
            clock.now += 0.2 * (fares != "well")  # also for the sweep that finds out
            return ask(port, body=CHAT).status == 200 and counts([one]) > [2]
        assert returns() or fares != "well" and eventually(returns)
        go.set()
        end.set()
        assert {str(client.reply().events()) for client in clients} == {"[1, '[DONE]']"}


# -- 5. Backends: probes ---------------------------------------------------------------------------


def test_no_request_is_taken_before_the_first_probes_are_over(clock):
    """Though they are waited for no longer than a second, which does not end here."""
    def late(played, number):
        threading.Event().wait(0.3)
        plays(listed=models("m"))(played, number)
    with several(late, late, settle=False, probe_interval=600) as (port, *_):
        assert states(port, "models") == [(["m"],)] * 2


def test_probes_learn_who_is_up_and_what_it_serves_and_cost_no_request(log):
    with several(plays(listed=models("m", "x")), plays(listed=models("m")),
                 probe_interval=0.1) as (port, one, two):
        assert states(port, "url", "up", "models", "in_flight") == [
            (one.url, True, ["m", "x"], 0), (two.url, True, ["m"], 0)]
        one.die()
        eventually(lambda: states(port, "up") == [(False,), (True,)])
        assert chats(port, 4) == {200} and counts([one, two]) == [0, 4]
        one.script = plays(listed=models("y"))
        one.rise()
        eventually(lambda: states(port, "up", "models")[0] == (True, ["y"]))
        assert chats(port, 4) == {200} == chats(port, 3, "y") and counts([one, two]) == [3, 8]
        assert changes(log) == [(one.url, "down"), (one.url, "up")]


def test_a_probe_asks_for_the_models_with_the_backend_s_key_and_0_turns_probes_off():
    with PlayedBackend(plays(listed=models("m"))) as backend:
        urls = [backend.url + "/base/v1"]
        with several(urls=urls, probe_interval=600, backend_api_key="k3y") as (port,):
            assert seen(backend).reason == "GET /base/v1/models HTTP/1.1"
            assert seen(backend).one("authorization") == "Bearer k3y"
            assert seen(backend).one("host") in backend.url and not backend.requests[0][1]
            assert chats(port, 1) == {200} and len(backend.requests) == 2
        with several(urls=urls, probe_interval=600):
            assert len(backend.requests) == 3 and not seen(backend).all("authorization")
        with several(urls=urls, probe_interval=0) as (port,):
            assert states(port, "url", "up") == [(backend.url + "/base", True)]
            assert len(backend.requests) == 3


def test_a_probe_s_answer_of_502_503_504_or_508_or_none_is_down_and_any_other_is_up():
    up, down = [200, 302, 401, 404, 405, 429, 500], [502, 503, 504, 508]
    scripts = [answers(response(status=f"{status} X")) for status in up + down]
    with several(*scripts, answers(b"no HTTP\r\n\r\n"), lambda played, number: None,
                 probe_interval=600) as (port, *_):
        eventually(lambda: states(port, "up") == [(True,)] * 7 + [(False,)] * 6)


def test_a_backend_that_does_not_answer_its_probe_is_down_and_delays_nothing(log):
    """Not even the probes of the others, though a probe may take for ever."""
    def silent(played, number):
        played.request()
        played.wait_for_end()
    with several(silent, plays(), probe_interval=0.1, connect_timeout=0.5) as (port, *_):
        eventually(lambda: states(port, "up") == [(False,), (True,)])
        assert chats(port, 4) == {200}
        assert any("is down: its answer to a probe took too long" in line for line in log)
    with several(silent, plays(), settle=False, probe_interval=0.1, connect_timeout=600) as (
            port, _, two):
        two.die()
        eventually(lambda: states(port, "up")[1] == (False,))
        two.rise()
        eventually(lambda: states(port, "up")[1] == (True,))


@pytest.mark.parametrize("drips", (False, True))
def test_a_probe_that_times_out_is_no_failure_while_its_backend_works(drips, log):
    """One that is busy generating may be slow to tell its models."""
    go = threading.Event()
    def script(played, number):
        read = played.request()
        if number == 1:
            return played.send(models("m"))
        if b"?held" in read[0]:
            played.send(EVENT)
            assert go.wait(SECONDS)
            return played.send(chunked(DONE))
        played.send(b"HTTP/1.1 200 OK\r\nA: " * drips)
        while drips and not select.select([played.socket], [], [], 0.05)[0]:
            played.send(b"b")
        played.wait_for_end()
    with several(script, probe_interval=0.1, connect_timeout=0.2) as (port, backend):
        with contextlib.ExitStack() as stack:
            client = hold(stack, port)
            eventually(lambda: len(backend.ended) >= 3)
            assert states(port, "up") == [(True,)] and not changes(log)
            go.set()
            assert client.reply().events() == [1, "[DONE]"]
        eventually(lambda: changes(log) == [(backend.url, "down")])


def test_a_probe_does_not_bring_back_a_backend_that_answers_503_to_requests():
    no = response(b"{}", "503 Loading", "Retry-After: 300")
    with several(plays(no, models("m")), plays(listed=models("m")), probe_interval=0.1) as (
            port, one, two):
        assert chats(port, 2) == {200} and counts([one, two]) == [1, 2]
        probes = len(one.requests)
        eventually(lambda: len(one.requests) >= probes + 4)
        assert chats(port, 4) == {200} and counts([one, two]) == [1, 6]
        assert states(port, "up") == [(False,), (True,)]


# -- 7. Handler: loops -----------------------------------------------------------------------------


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_a_loop_is_answered_508_by_the_first_gateway_that_sees_its_own_request_again(hops, log):
    with contextlib.ExitStack() as stack:
        ports = [take_port(stack) for _ in range(hops)]
        for port, after in zip(ports, [*ports[1:], ports[0]]):
            stack.enter_context(serve(port=port, backend_url=f"http://127.0.0.1:{after}"))
        for number, (method, path) in enumerate(
                [("POST", CHATS), ("POST", FILES), ("GET", "/v1/models")], 1):
            reply = ask(ports[0], method, path, CHAT)
            assert (reply.status, reply.error()["code"]) == (508, "loop_detected")
            eventually(lambda: sum(" 508 " in line for line in log) >= number * (hops + 1))
        assert sum(" 508 " in line for line in log) == 3 * (hops + 1)


def test_a_gateway_that_asks_for_keys_knows_its_own_requests_without_one():
    """Or its probe would be answered 401, as that of a backend that is up."""
    with contextlib.ExitStack() as stack:
        port, good = take_port(stack), stack.enter_context(Mortal(plays()))
        stack.enter_context(serve(port=port, api_keys="k", probe_interval=600, connect_timeout=1,
                                  backend_url=f"http://127.0.0.1:{port},{good.url}"))
        eventually(lambda: states(port, "up") == [(False,), (True,)])
        for _ in range(4):
            assert ask(port, "POST", CHATS, CHAT, bearer("k")).status == 200
        assert ask(port, body=CHAT).status == 401


def test_via_names_the_gateway_behind_those_before_it():
    with several(plays(listed=models("m")), probe_interval=600) as (port, backend):
        own = seen(backend).one("via")
        assert re.fullmatch("1.1 gateway-[0-9a-f]+", own)
        for is_loop, values in (
                (0, []), (0, ["1.0 a, 1.1 gateway-0"]), (0, ["1.1 a", f"1.1 b ({own[4:]}x)"]),
                (1, [own]), (1, [f"1.1 a , {own} , 1.1 b"]), (1, ["1.1 a", f"HTTP/{own}"])):
            reply = ask(port, "POST", CHATS, CHAT, *(f"Via: {value}" for value in values))
            assert reply.status == (508 if is_loop else 200), values
            assert is_loop or ", ".join(seen(backend).all("via")) == ", ".join([*values, own])


# -- 7. Handler: /readyz ---------------------------------------------------------------------------


def test_readyz_is_200_while_a_backend_is_up_and_else_503(echo):
    reply = ask(echo, "GET", "/readyz")
    assert (reply.status, reply.json()) == (200, {"status": "ready", "backends": []})
    with several(plays(), plays()) as (port, *backends):
        for up in (2, 1, 0):
            for backend in backends[up:up + 1]:
                backend.die()
                chats(port, 3)  # so much for its reputation
            for method in ("GET", "HEAD"):
                assert ask(port, method, "/readyz").status == (200 if up else 503)
            assert ask(port, "GET", "/readyz").json() == {
                "status": "ready" if up else "no backend is up",
                "backends": [{"url": backend.url, "up": not backend.dead, "models": None,
                              "in_flight": 0} for backend in backends]}
        assert ask(port, "GET", "/healthz").status == 200
        assert ask(port, "POST", "/readyz").one("allow") == "GET, HEAD, OPTIONS"
        assert not [1 for backend in backends for head, _ in backend.requests if b"ready" in head]


def test_without_probes_readyz_is_200_again_when_a_backend_may_be_tried_again(clock):
    with several(plays()) as (port, backend):
        backend.die()
        chats(port, 1)
        for seconds, status in ((0.9, 503), (0.2, 200)):
            clock.now += seconds
            assert ask(port, "GET", "/readyz").status == status


# -- several backends: what it must show -----------------------------------------------------------


def talk(port, stop):
    """Ask the mock on one connection until it is to stop; return how often it answered."""
    with Client(port) as client:
        for number in itertools.count():
            reply = client.send(request(
                "POST", CHATS, CHAT, f"X-Request-ID: {ID}", "X-Mock: delay=0.03")).reply()
            assert reply.status == 200 and says_mock(reply), (reply.status, reply.body)
            if stop.is_set():
                return number


def listen(port, stop, name):
    """Ask for one stream after the other until it is to stop; return the replies by their ids."""
    replies = {}
    while not stop.is_set():
        identity = f"{name}-{len(replies)}"
        replies[identity] = ask(port, "POST", CHATS, STREAM, f"X-Request-ID: {identity}",
                                "X-Mock: tokens=20, interval=0.02")
    return replies


def is_streaming(port):
    """Tell whether the mock on this port has a stream in flight."""
    return any(record["outcome"] == "pending" and "stream" in record["body"]
               for record in ask(port, "GET", "/mock/requests").json())


def judge_stream(reply, record, victim):
    """Assert that a stream is whole, or ends with an error event and was of the victim."""
    *events, last = reply.events()
    if reply.cut:
        assert last["error"]["code"] == record["outcome"] == "backend_error"
        assert record["backend"] == victim
    else:
        assert last == "[DONE]" and said(reply) == " ".join(["Mock"] * 20)
    assert reply.status == 200 and (events or reply.cut)


def test_a_backend_killed_again_and_again_under_load_costs_its_own_streams_alone():
    """No other request fails; a stream in flight on the victim ends with an error event."""
    with contextlib.ExitStack() as stack:
        ports = [take_port(stack) for _ in range(2)]
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        def start(port):
            mock = stack.enter_context(Process(script="mock_backend.py", MOCK_PORT=str(port)))
            assert mock.port == port
            return mock
        victim, _ = [start(port) for port in ports]
        front = stack.enter_context(Process(
            PORT="0", BACKEND_URL=",".join(urls), PROBE_INTERVAL="0.2", LOG_FORMAT="json"))
        stop, port = threading.Event(), front.port

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            talkers = [pool.submit(talk, port, stop) for _ in range(4)]
            listeners = [pool.submit(listen, port, stop, name) for name in "abcd"]
            try:
                for _ in range(4):
                    eventually(lambda: is_streaming(ports[0]))
                    victim.process.kill()
                    victim.wait()
                    eventually(lambda: not states(port)[urls[0]]["up"])
                    assert ask(port, "GET", "/v1/models").json()["data"][0]["id"] == "mock"
                    victim = start(ports[0])
                eventually(lambda: is_streaming(ports[0]))
            finally:
                stop.set()
        assert min(talker.result() for talker in talkers) > 10
        streams = dict(item for listener in listeners for item in listener.result().items())
        eventually(lambda: all(f'"{name}"' in front.log for name in streams))
        records = [json.loads(line) for line in front.lines if line.startswith("{")]
        records = {record.get("request_id"): record for record in records}
        cut = {name for name, reply in streams.items() if reply.cut}
        assert 0 < len(cut) < len(streams)
        for name, reply in streams.items():
            judge_stream(reply, records[name], urls[0])


# -- Keys ------------------------------------------------------------------------------------------

MODELS = "/v1/models"
KEYS = "alice=s3cret-a,s3cret-b,YWJjZA=="  # the last one is no name with an empty key


def bearer(key, scheme="Bearer"):
    return f"Authorization: {scheme} {key}"


def as_file(path, text):
    """Write the text to the file, or remove it for None; return its path as a string."""
    path.unlink(missing_ok=True)
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    return str(path)


@pytest.mark.parametrize("fields", [
    (), (bearer(""),), ("Authorization: Bearer",), ("Authorization: s3cret-a",),
    (bearer("s3cret-a", "Basic"),), (bearer("s3cret-"),), (bearer("s3cret-aa"),),
    (bearer("S3CRET-A"),), (bearer("alice"),), (bearer("alice=s3cret-a"),), (bearer(KEYS),),
    (bearer("s3cret-a s3cret-b"),), (bearer("s3cret-\xe9"),), (bearer("s3cret-c"),),
    (bearer("s3cret-a"), bearer("s3cret-b")), ("X-Api-Key: s3cret-a",)])
def test_what_is_not_exactly_a_key_is_401_and_reaches_no_backend(fields, log, tmp_path):
    path = as_file(tmp_path / "keys", "good\n# s3cret-x, s3cret-c\n#s3cret-c\n \n")
    with forward(answers(response()), api_keys=KEYS, api_keys_file=path) as (port, backend):
        with Client(port) as client:
            client.send(request("POST", CHATS, CHAT, "X-Request-ID: i", *fields))
            reply, line = client.reply(), lines_of(log)[0]
            assert (reply.status, reply.error()["code"]) == (401, "invalid_api_key")
            assert reply.error()["message"].startswith("Incorrect API key provided")  # LiteLLM
            assert reply.one("www-authenticate").startswith("Bearer")
            assert reply.error()["type"] == "invalid_request_error"
            assert reply.one("x-request-id") == "i" and b"s3cret" not in reply.body
            assert " key=- " in line and "s3cret" not in line and not backend.requests
            assert reply.one("connection") == "close"  # its body was not read
        assert ask(port, "POST", CHATS, CHAT, bearer("s3cret-a")).status == 200
        assert len(backend.requests) == 1


def test_anthropic_s_sdks_may_send_a_key_in_their_own_field():
    path, key = "/v1/messages", "X-Api-Key: s3cret-b"
    with forward(answers(response()), api_keys=KEYS) as (port, _):
        for status, path, *fields in (
                (200, path, key), (200, path + "?beta=true", bearer("s3cret-a"), key),
                (401, path, "X-Api-Key: s3cret"), (401, path, "X-Api-Key: "), (401, path),
                (401, path, bearer("s3cret"), key), (401, path, key, key), (401, CHATS, key),
                (401, path, "api-key: s3cret-b")):
            assert ask(port, "POST", path, b"{}", *fields).status == status, (path, fields)


@pytest.mark.parametrize("knobs", ({}, {"backend_url": "http://127.0.0.1:9"}))
def test_every_path_but_those_of_probes_needs_a_key_before_a_body_is_asked_for(knobs):
    with serve(api_keys=KEYS, **knobs) as server:
        for path, method in itertools.product((
                MODELS, MODELS + "/echo", CHATS, FILES, "/metrics", "/", "/nothing", "/healthz/",
                "//healthz", "/v1/healthz", "/Healthz"),
                ("GET", "HEAD", "POST", "OPTIONS", "DELETE", "X")):
            assert ask(server.port, method, path).status == 401, (method, path)
        for path, method in itertools.product(("/healthz?a", "/readyz"), ("GET", "HEAD", "POST")):
            assert ask(server.port, method, path).status == (405 if method == "POST" else 200)
        with Client(server.port) as client:
            client.send(POST + b"Content-Length: 9999999\r\nExpect: 100-continue\r\n\r\n")
            assert client.reply().status == 401


@pytest.mark.parametrize(("key", "name", "scheme"), [
    ("s3cret-a", "alice", "Bearer"), ("s3cret-b", "key2", "bearer"), ("YWJjZA==", "key3", "BEARER"),
    ("s3cret=c", "bob", "Bearer"), ("s3cret-d", "c_a.r-ol", "Bearer")])
def test_the_log_names_the_key_and_nothing_else_does(key, name, scheme, log, tmp_path):
    path = as_file(tmp_path / "keys", "# no\r\n\r\nbob=s3cret=c\r\nc_a.r-ol=s3cret-d")
    for form, field in (("text", f" key={name} "), ("json", f'"key": "{name}"')):
        with forward(answers(response()), api_keys=KEYS, api_keys_file=path,
                     log_format=form) as (port, backend):
            reply = ask(port, "POST", CHATS, CHAT, bearer(key, scheme))
            metrics = ask(port, "GET", "/metrics", b"", bearer(key, scheme))
            lines = eventually(lambda: len(log) > 1 and [log.pop(), log.pop()])
            assert all(field in line and key not in line for line in lines)
            assert reply.status == metrics.status == 200
            text = f"{reply.fields} {reply.body} {metrics.fields} {metrics.body} {backend.requests}"
            assert key not in text and name not in text


@pytest.mark.parametrize(("knobs", "fields", "expected"), [
    ({}, (bearer("theirs"),), [b"Bearer theirs"]),
    ({"api_keys": "theirs"}, (bearer("theirs"),), []),
    ({"api_keys": "theirs"}, (bearer("theirs"), "X-Api-Key: theirs", "api-key: theirs"), []),
    ({"backend_api_key": "ours"}, ("X-API-Key: theirs", "Api-Key: theirs"), [b"Bearer ours"]),
    ({"backend_api_key": "ours"}, (), [b"Bearer ours"]),
    ({"backend_api_key_file": "ours\n"}, (bearer("theirs"), bearer("x")), [b"Bearer ours"]),
    ({"api_keys": "theirs", "backend_api_key": "ours"},
     ("Connection: Authorization", "authorization: Bearer theirs"), [b"Bearer ours"])])
def test_the_backend_gets_its_own_key_and_never_a_gateway_s(knobs, fields, expected, tmp_path):
    knobs = {name: as_file(tmp_path / name, text) if name.endswith("file") else text
             for name, text in knobs.items()}
    with forward(answers(response()), **knobs) as (port, backend):
        for method, path in (("POST", CHATS), ("GET", MODELS), ("GET", MODELS + "/m"),
                             ("DELETE", FILES + "/x"), ("OPTIONS", FILES)):
            assert ask(port, method, path, CHAT if method == "POST" else b"", *fields).status == 200
            head, _ = backend.requests[-1]
            assert re.findall(rb"(?i)\r\nauthorization: *([^\r]*)", head) == expected
            assert not knobs or b"theirs" not in head


@pytest.mark.parametrize("form", ("text", "json"))
def test_no_secret_is_in_the_help_the_log_or_the_metrics_and_probes_bear_the_key(form, tmp_path):
    secrets = {"API_KEYS": "a=s3cret-a,s3cret-b", "BACKEND_API_KEY": "s3cret-k",
               "API_KEYS_FILE": as_file(tmp_path / "keys", "f=s3cret-f")}
    status, out, err = run("--help", **secrets)
    assert status == 0 and "API_KEYS" in out and "s3cret" not in out + "".join(err)
    script = answers(response(), response(b"{}", "401 No"), b"no HTTP\r\n\r\n")
    with PlayedBackend(script) as backend, Process(
            "--port=0", BACKEND_URL=f"{backend.url},{dead_address()}", LOG_FORMAT=form,
            PROBE_INTERVAL="0.1", **secrets) as process:
        for key, path in itertools.product("abfkx", (CHATS, FILES, "/healthz")):
            ask(process.port, "POST", path, CHAT, bearer("s3cret-" + key))
        metrics = ask(process.port, "GET", "/metrics", b"", bearer("s3cret-f"))
        assert metrics.status == 200 and b"s3cret" not in metrics.body
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait() == 0 and len(process.lines) > 15
    probes = [head for head, _ in backend.requests if b"GET /v1/models HTTP/1.1" in head]
    assert probes and all(b"\r\nAuthorization: Bearer s3cret-k" in head for head in probes)
    assert "s3cret" not in process.log


@pytest.mark.parametrize(("names", "value"), [  # FILE/... stands for a file with these bytes
    ("API_KEYS", "s3cret a"), ("API_KEYS", "s3cret\u00e9"), ("API_KEYS", ","), ("API_KEYS", " "),
    ("API_KEYS_FILE", "FILE"), ("API_KEYS_FILE", "FILE/"), ("API_KEYS_FILE", "FILE/# s3cret\n \n"),
    ("API_KEYS_FILE", "FILE/# s3cret"), ("API_KEYS_FILE", "FILE/\t#"),
    ("API_KEYS_FILE", "FILE/good\ns3cret bad\n"), ("API_KEYS_FILE", "FILE/s3cret\xe9"),
    ("API_KEYS_FILE", "/"), ("BACKEND_API_KEY", "s3cret\r\nX: y"),
    ("BACKEND_API_KEY_FILE", "FILE"), ("BACKEND_API_KEY_FILE", "FILE/\n"),
    ("BACKEND_API_KEY_FILE BACKEND_API_KEY", "FILE/s3cret"), ("ALLOW_OPEN", "perhaps"),
    ("TLS_CERT_FILE TLS_KEY_FILE", "FILE"), ("TLS_CERT_FILE TLS_KEY_FILE", "FILE/s3cret"),
    ("TLS_CERT_FILE", "FILE/x"), ("TLS_KEY_FILE", "FILE/x"), ("MAX_CONCURRENT_REQUESTS", "-1"),
    ("QUEUE_TIMEOUT", "nan")])
def test_a_bad_key_or_certificate_is_refused_at_start_in_one_line(names, value, tmp_path):
    kind, slash, content = value.partition("/")
    if kind == "FILE":
        value = as_file(tmp_path / "file", content if slash else None)
    status, out, err = run("--port=0", **dict.fromkeys(names.split(), value))
    assert (status, out, len(err)) == (2, "", 1) and "s3cret" not in err[0], err
    for name in ("TLS_CERT_FILE", "TLS_KEY_FILE") if "TLS" in names else names.split():
        assert name in err[0] or "--" + name.lower().replace("_", "-") in err[0]


@pytest.mark.parametrize(("host", "environ", "starts"), [
    ("0.0.0.0", {}, False), ("::", {}, False), ("0", {}, False),
    ("0.0.0.0", {"ALLOW_OPEN": "0"}, False), ("127.0.0.1", {"LISTEN_FDS": "1"}, False),
    ("0.0.0.0", {"BACKEND_API_KEY": "", "BACKEND_API_KEY_FILE": "key"}, False),
    ("0.0.0.0", {"ALLOW_OPEN": "1"}, True), ("0.0.0.0", {"API_KEYS": "s3cret-g"}, True),
    ("0.0.0.0", {"API_KEYS_FILE": "key"}, True), ("0.0.0.0", {"BACKEND_API_KEY": ""}, True),
    ("localhost", {}, True), ("127.0.0.2", {}, True), ("::1", {}, True)])
def test_a_backend_s_key_is_not_lent_to_the_network_unless_that_is_meant(
        host, environ, starts, tmp_path):
    key, python = as_file(tmp_path / "key", "s3cret-k\n"), (sys.executable,)
    environ = {"BACKEND_URL": dead_address(), "BACKEND_API_KEY": "s3cret-k",
               **{name: key if text == "key" else text for name, text in environ.items()}}
    if "LISTEN_FDS" in environ:
        python = ("bash", "-c", 'LISTEN_PID=$$ exec "$0" "$@"', sys.executable)
    with Process("--port=0", f"--host={host}", python=python, **environ) as process:
        eventually(lambda: process.lines)  # without IPv6 the line about ::1 is another one
        assert ("ALLOW_OPEN" in process.log) is not starts and "s3cret" not in process.log
        assert starts or process.wait() == 2 and len(process.lines) == 1


# -- Admission -------------------------------------------------------------------------------------


def queued(port):
    """Return how many requests wait for their turn, as the metrics say."""
    metrics = ask(port, "GET", "/metrics").body
    return float(re.search(rb"(?m)^gateway_queue_depth(?:{.*})? (\S+)$", metrics)[1])


def gated(go):
    """Return a script that answers each request once the test says `go`, or ends with the link."""
    def script(played, number):
        while played.request():
            while not go.acquire(timeout=0.01):
                if select.select([played.socket], [], [], 0)[0]:
                    return
            played.send(response())
    return script


@contextlib.contextmanager
def crowd(number, more=b"", **knobs):
    """A gateway with so many clients, whose requests came one by one; the first sends `more` too.

    Yields (port, backend, clients, go); the query of a request is the client's number.
    """
    go, knobs = threading.Semaphore(0), {"max_concurrent_requests": 1, "queue_timeout": 90, **knobs}
    limit = knobs["max_concurrent_requests"]
    with forward(gated(go), **knobs) as (port, backend), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(port)) for _ in range(number)]
        for n, client in enumerate(clients):
            client.send(request("POST", f"{CHATS}?{n}", CHAT) + more * (n == 0))
            eventually(lambda: len(backend.requests) == min(n + 1, limit)
                       and queued(port) == max(n + 1 - limit, 0))
        yield port, backend, clients, go


@pytest.mark.parametrize("limit", (1, 3))
def test_requests_past_the_limit_wait_in_turn_and_nobody_is_let_past(limit):
    """The first client has its next request ready when its place becomes free: it has to wait."""
    again = request("POST", CHATS + "?9", CHAT)
    with crowd(7, again, max_concurrent_requests=limit) as (port, backend, clients, go):
        go.release(8)
        assert [client.reply().status for client in [*clients, clients[0]]] == [200] * 8
        cases = [case_of(head) for head, _ in backend.requests]
        assert (cases if limit == 1 else sorted(cases)) == [*range(7), 9]
        eventually(lambda: queued(port) == 0)


@pytest.mark.parametrize("patience", (0, 0.3))
def test_a_request_that_waited_in_vain_is_429_with_the_time_to_come_again(patience):
    with crowd(1, queue_timeout=patience) as (port, backend, (first,), go), Client(port) as second:
        for path, body in ((CHATS, STREAM), (FILES, b"x" * 100_000)):
            began = time.monotonic()
            reply = second.send(request("POST", path, body, "X-Request-ID: i")).reply()
            assert time.monotonic() - began >= patience and reply.one("x-request-id") == "i"
            assert (reply.status, reply.error()["code"]) == (429, "concurrency_limit")
            assert reply.error()["type"] == "rate_limit_error"
            assert reply.one("retry-after") == "1" and reply.one("retry-after-ms") == "1000"
        eventually(lambda: queued(port) == 0)
        assert len(backend.requests) == 1
        go.release(100)
        assert first.reply().status == first.send(request(body=CHAT)).reply().status == 200
        eventually(lambda: second.send(request(body=CHAT)).reply().status == 200)


def test_what_needs_no_backend_never_queues():
    with crowd(2) as (port, backend, clients, go):
        for path in ("/healthz", "/readyz", "/metrics", "/nothing"):
            for method in ("GET", "HEAD"):
                assert ask(port, method, path).status == (404 if path == "/nothing" else 200)
        assert ask(port, "POST", "/healthz").status == 405
        assert ask(port, "POST", CHATS, b"{").error()["code"] == "invalid_json"
        eventually(lambda: queued(port) == 1)
        assert len(backend.requests) == 1
        go.release(2)
        assert [client.reply().status for client in clients] == [200] * 2


@pytest.mark.parametrize("leave", (Client.vanish, lambda client: client.socket.close(),
                                   lambda client: client.socket.shutdown(socket.SHUT_WR)))
def test_a_waiter_whose_client_left_leaves_the_queue(leave, log):
    with crowd(5) as (port, backend, clients, go):
        leave(clients[1])
        leave(clients[3])
        eventually(lambda: queued(port) == 2 and sum(" 499 " in line for line in log) == 2)
        go.release(5)
        assert [clients[n].reply().status for n in (0, 2, 4)] == [200] * 3
        assert [case_of(head) for head, _ in backend.requests] == [0, 2, 4]
        eventually(lambda: queued(port) == 0)


def test_a_client_that_leaves_just_before_its_request_has_to_wait_does_not_wait(monkeypatch, log):
    enter = gateway.Admission.enter
    def late(admission, request, record):
        eventually(lambda: "?9" not in request.target or request.cancelled)
        enter(admission, request, record)
    monkeypatch.setattr(gateway.Admission, "enter", late)
    with crowd(1, queue_timeout=600) as (port, backend, (first,), go):
        Client(port).send(request("POST", CHATS + "?9", CHAT)).vanish()
        eventually(lambda: any(" 499 " in line for line in log))
        go.release()
        assert first.reply().status == 200 and len(backend.requests) == 1


@pytest.mark.parametrize("end", [
    response(b"{}", "404 No"), response(b"", "503 No"), (b"no HTTP\r\n\r\n",), (b"",),
    (STREAM_HEAD + chunked(b"data: 1\n\n", end=False),), Client.vanish, None])
def test_the_only_place_comes_back_however_a_request_ends_and_no_upload_takes_it(end):
    script = by_case([response(), end if isinstance(end, (bytes, tuple)) else STREAM_HEAD])
    with forward(script, max_concurrent_requests=1, backend_timeout=1) as (port, _):
        with Client(port) as slow, Client(port) as client:
            begin(None, slow)
            client.send(request("POST", CHATS + "?1", STREAM)).head()
            if end is Client.vanish:
                client.vanish()
            eventually(lambda: ask(port, "POST", CHATS + "?0", CHAT).status == 200)


def test_no_place_is_lost_to_clients_that_leave_at_any_moment():
    """A place may be given to a waiter at the moment at which its client leaves."""
    go = threading.Semaphore(0)
    def script(played, number):
        while read := played.request():
            assert FILES.encode() not in read[0] or go.acquire(timeout=SECONDS)
            played.send(response())
    with forward(script, max_concurrent_requests=2, queue_timeout=90) as (port, backend):
        for n in range(60):
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(Client(port)) for _ in range(6)]
                for client in clients:
                    client.send(request(body=CHAT))
                clients[n % 3].reply()
                clients[3].vanish()
                clients[4].socket.close()
                assert clients[5].reply().status == 200
        eventually(lambda: queued(port) == 0)
        with Client(port) as one, Client(port) as two, Client(port) as three:
            for client in (one, two, three):
                client.send(request("POST", FILES, b"{}"))
            eventually(lambda: queued(port) == 1)  # so two places are left
            eventually(lambda: sum(body == b"{}" for _, body in list(backend.requests)) == 2)
            go.release(3)
            assert [client.reply().status for client in (one, two, three)] == [200] * 3


def test_a_request_that_begins_just_when_a_drain_ends_its_idle_connection_is_no_bad_one(
        monkeypatch):
    """A client sends a 503 again, and a 400 not."""
    def set_deaf(handler, value):
        vars(handler)["noted"] = value
        client.send(POST + b"Content-Length: %d\r\n\r\n" % len(CHAT))
        eventually(lambda: handler.idle_since is None and not handler.buffer)
    monkeypatch.setattr(gateway.Handler, "deaf", property(
        lambda handler: vars(handler).get("noted", False), set_deaf))
    with serve() as server, Client(server.port) as client:
        assert client.send(HEALTH).reply().status == 200
        drain = threading.Thread(target=server.drain)
        drain.start()
        reply = client.reply()
        drain.join(SECONDS)
        assert (reply.status, reply.error()["code"]) == (503, "shutting_down")
        assert reply.one("retry-after") == "1" and reply.one("connection") == "close"


def test_a_request_that_is_cut_off_while_its_id_is_made_is_so_all_the_same(monkeypatch, log):
    making, go, make = threading.Event(), threading.Event(), gateway.request_ids
    def request_ids():
        if threading.current_thread() is not threading.main_thread() and not making.is_set():
            making.set()
            assert go.wait(SECONDS)
        yield from make()
    monkeypatch.setattr(gateway, "request_ids", request_ids)
    with serve(shutdown_timeout=0.1) as server, Client(server.port) as client:
        client.send(HEALTH)
        assert making.wait(SECONDS) and not server.drain()
        server.ledger.settle()
        assert lines_of(log)[0].endswith(" shutdown_timeout")
        assert b'status="other",outcome="cut"} 1' in server.metrics.render()
        go.set()
        client.reply()
        eventually(lambda: not server.connections)
    assert len(lines_of(log)) == 1


def test_a_request_that_ends_while_it_is_cut_off_ends_once():
    settings = gateway.read_settings([], {})
    ledger = gateway.Ledger(settings, gateway.Metrics(1, ()))
    class Record(gateway.Record):
        def cut(self):
            ledger.end(self, outcome="shutdown_timeout")
        @property
        def began(self):  # asked for where the duration is reckoned
            if not other.is_alive():
                other.start()
                other.join(0.2)
            return 0.0
        @began.setter
        def began(self, value):
            pass
    record = Record("127.0.0.1")
    other = threading.Thread(target=record.cut)
    ledger.end(record)
    other.join(SECONDS)
    assert ledger.ended == [record] and record.outcome == "ok"


def test_a_drain_serves_those_who_wait():
    go = threading.Semaphore(0)
    with PlayedBackend(gated(go)) as backend, Process(
            "--port=0", BACKEND_URL=backend.url, MAX_CONCURRENT_REQUESTS="1", QUEUE_TIMEOUT="90"
            ) as process, Client(process.port) as first, Client(process.port) as second:
        first.send(request(body=CHAT))
        eventually(lambda: backend.requests)
        second.send(request(body=CHAT))
        eventually(lambda: queued(process.port) == 1)
        stop(process)
        go.release(2)
        assert first.reply().status == second.reply().status == 200 and process.wait() == 0


# -- CORS ------------------------------------------------------------------------------------------

ORIGIN = "https://app.example"
ORIGINS = f"http://localhost:3000,{ORIGIN}"
ALLOWED, PREFLIGHT = "access-control-allow-origin", "Access-Control-Request-Method: POST"


def listed(reply, name):
    """Return the lower-case items of the fields of that name as a set."""
    return {item.strip().lower() for value in reply.all(name) for item in value.split(",")}


def test_all_replies_to_an_allowed_origin_say_so_errors_and_streams_included():
    go, origin, key = threading.Semaphore(0), f"Origin: {ORIGIN}", bearer("k")
    theirs = response(b"{}", "404 No", "Vary: Accept", "Access-Control-Allow-Origin: *",
                      "Access-Control-Allow-Credentials: true")
    def script(played, number):
        if number == 3:
            return stepwise(go, STREAM_HEAD, chunked(DONE))(played, number)
        played.request()
        played.send(b"no HTTP\r\n\r\n" if number == 1 else theirs)
    with forward(script, cors_origins=ORIGINS, api_keys="k", max_body_bytes=1000,
                 max_concurrent_requests=1) as (port, _), Client(port) as stream:
        for status, method, path, body, *fields in (
                (502, "POST", FILES, CHAT, key), (404, "POST", FILES, CHAT, key),
                (200, "GET", "/healthz", b""), (401, "POST", CHATS, CHAT),
                (404, "GET", "/nothing", b"", key), (405, "POST", "/healthz", b""),
                (413, "POST", CHATS, b"x" * 1001, key), (400, "POST", CHATS, b"{", key),
                (200, "POST", CHATS, STREAM, key),
                (429, "POST", CHATS, CHAT, key), (200, "GET", "/metrics", b"", key)):
            if body == STREAM:
                go.release()
                reply = stream.send(request(method, path, body, origin, *fields)).head()
            else:
                reply = ask(port, method, path, body, origin, *fields)
            assert (reply.status, reply.one(ALLOWED)) == (status, ORIGIN), (path, reply.fields)
            exposed = listed(reply, "access-control-expose-headers")
            assert exposed >= {"x-request-id", "retry-after", "retry-after-ms"}
            assert listed(reply, "vary") >= {"origin", *["accept"] * (reply.reason == "No")}
            assert not reply.all("access-control-allow-credentials")
        go.release()
        stream.until(b"0\r\n\r\n")


@pytest.mark.parametrize("status, target, line", (
    (400, "/v1/../x HTTP/1.1", "A: b"), (414, f"/{'x' * 20_000} HTTP/1.1", "A: b"),
    (431, "/ HTTP/1.1", "A: " + "x" * 70_000), (400, "/ HTTP/1.1", "A : b"),
    (505, "/ HTTP/2.0", "A: b")))
def test_a_page_can_read_the_error_of_a_request_that_was_not_understood(status, target, line):
    with serve(cors_origins=ORIGINS) as server:
        for origin, allowed in ((ORIGIN, [ORIGIN]), ("https://evil.example", [])):
            head = f"GET {target}\r\nHost: t\r\nOrigin: {origin}\r\n{line}\r\n\r\n"
            with Client(server.port) as client:
                client.send(head.encode())
                reply = client.reply()
            assert (reply.status, reply.all(ALLOWED)) == (status, allowed)


@pytest.mark.parametrize(("origins", "origin", "expected"), [
    (ORIGINS, None, ()), (ORIGINS, "https://evil.example", ()), (ORIGINS, "http://app.example", ()),
    (ORIGINS, "null", ()), (ORIGINS, ORIGIN + ".evil.example", ()), (ORIGINS, ORIGINS, ()),
    (ORIGINS, "*", ()), (ORIGINS, "http://localhost:3000", ("http://localhost:3000",)),
    ("*", ORIGIN, ("*", ORIGIN)), ("", ORIGIN, ("theirs",))])
def test_only_the_origins_that_are_set_are_allowed(origins, origin, expected):
    """Even if the backend allows more; without CORS_ORIGINS its word alone counts."""
    theirs = response(b"{}", "200 OK", "Access-Control-Allow-Origin: theirs")
    fields = [f"Origin: {origin}"] if origin else []
    with forward(answers(theirs), cors_origins=origins) as (port, _), Client(port) as client:
        client.send(request("GET", "/healthz", b"", f"Origin: {ORIGIN}")).reply()  # leaves no trace
        for method, path, *more in (("POST", FILES), ("OPTIONS", FILES, PREFLIGHT)):
            reply = client.send(request(method, path, b"", *more, *fields)).reply()
            assert len(reply.all(ALLOWED)) == bool(expected)
            assert not expected or reply.one(ALLOWED) in expected
        reply = client.send(request("GET", "/healthz", b"", *fields)).reply()
        assert bool(reply.all(ALLOWED)) == bool(origins and expected)


def test_a_preflight_needs_no_key_no_place_and_no_backend():
    wanted = "authorization,content-type,x-request-id,x-stainless-os"
    with crowd(2, cors_origins=ORIGINS) as (port, backend, clients, go):
        reply = ask(port, "OPTIONS", CHATS, b"", f"Origin: {ORIGIN}", PREFLIGHT,
                    f"Access-Control-Request-Headers: {wanted}")
        assert reply.status == 204 and not reply.all("content-length")
        assert reply.one(ALLOWED) == ORIGIN and reply.one("x-request-id")
        assert listed(reply, "access-control-allow-methods") >= {"get", "post", "delete"}
        assert listed(reply, "access-control-allow-headers") >= set(wanted.split(","))
        go.release(2)
        assert [client.reply().status for client in clients] == [200] * 2
        assert len(backend.requests) == 2
    with serve(cors_origins=ORIGINS, api_keys="k") as server:
        for fields in ((PREFLIGHT, f"Origin: {ORIGIN}"), (f"Origin: {ORIGIN}",), (PREFLIGHT,)):
            status = ask(server.port, "OPTIONS", CHATS, b"", *fields).status
            assert status == (204 if len(fields) == 2 else 401)


# -- TLS -------------------------------------------------------------------------------------------

KEY, _, OLD = KEY_AND_CERTIFICATE.partition("-----BEGIN C")
OLD = ssl.PEM_cert_to_DER_cert("-----BEGIN C" + OLD)
NEW = OLD.replace(b"\2\1\1", b"\2\1\2", 1)  # another serial number
POINT = base64.b64decode(
    b"Zb1aC2SXBC7Ff4LPM4TU/Xiv3ahEAsNKqVxWtnygoKdVH6zwDO3GzDzG8vE2dG+EUdroJyyhmQhZzV2s+kazwQ==")
STRANGE = OLD.replace(base64.b64decode(KEY[28:-26])[-64:], POINT)  # of another key
OLD, NEW, STRANGE = map(ssl.DER_cert_to_PEM_cert, (OLD, NEW, STRANGE))


class TLSClient(Client):
    """A client by TLS, for which an end without a closure alert is an error."""

    def __init__(self, port, **limits):
        super().__init__(port)
        context = ssl.create_default_context(cadata=OLD + NEW)
        for name, value in limits.items():
            setattr(context, name, value)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.socket)
            self.socket = context.wrap_socket(
                self.socket, server_hostname="localhost", suppress_ragged_eofs=False)
            stack.pop_all()


def client_hello(minor):
    """Return the first message of a client that speaks TLS 1.`minor` at most, 1 or 2."""
    context, out = ssl.create_default_context(), ssl.MemoryBIO()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ALL:@SECLEVEL=0")
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost").do_handshake()
    hello = bytearray(out.read())
    hello[10] = minor + 1
    return bytes(hello)


@pytest.fixture
def by_tls(pem):
    """The settings with which a gateway speaks TLS."""
    return {"tls_cert_file": pem, "tls_key_file": pem}


@pytest.mark.parametrize("version", ("TLSv1_2", "TLSv1_3"))
def test_over_tls_all_is_as_without(by_tls, version):
    exactly = ssl.TLSVersion[version]
    with serve(**by_tls) as server, TLSClient(
            server.port, minimum_version=exactly, maximum_version=exactly) as client:
        assert client.send(HEALTH).reply().json() == OK
        assert client.send(request(body=STREAM)).reply().events()[-1] == "[DONE]"
        client.send((request(body=CHAT) + HEALTH + request("GET", "/nothing")) * 30)
        assert [client.reply().status for _ in range(90)] == [200, 200, 404] * 30
        begin(None, client)
        assert said(client.send(CHAT).reply()) == "Echo: Hello, world!"
        client.send(request("GET", "/healthz", b"", "Connection: close"))
        assert client.reply().json() == OK and client.is_closed()


def test_big_bodies_pass_both_ways_by_tls(by_tls):
    body = os.urandom(1 << 20) * 8
    with forward(mirror, max_body_bytes=len(body), **by_tls) as (port, backend):
        with TLSClient(port) as client:
            for data in (request("POST", FILES, body), b"POST /v1/files HTTP/1.1\r\nHost: t\r\n"
                         b"Transfer-Encoding: chunked\r\n\r\n" + chunked(body[:99], body[99:])):
                assert client.send(data).reply().body == body == backend.requests[-1][1]
                assert seen(backend).one("x-forwarded-proto") == "https"
            assert client.send(request("POST", FILES, body + b"x")).reply().status == 413


@pytest.mark.parametrize("whole", (True, False))
def test_a_tls_client_of_http_1_0_gets_a_closure_alert_behind_a_whole_body_alone(by_tls, whole):
    def script(played, number):
        played.request()
        played.send(CHUNKED_HEAD + chunked(b"x" * 999_999, b"data", end=whole))
    with forward(script, **by_tls) as (port, _), TLSClient(port) as client:
        assert client.send(request("GET", FILES, version="1.0")).head().status == 200
        with contextlib.nullcontext() if whole else pytest.raises((ssl.SSLError, ConnectionError)):
            while piece := client.socket.recv(65536):
                client.buffer += piece
        assert not whole or client.buffer == b"x" * 999_999 + b"data"


@pytest.mark.parametrize("version", ("TLSv1_2", "TLSv1_3"))
def test_an_idle_tls_connection_is_closed_without_an_alert_in_a_drain(by_tls, version):
    exactly = ssl.TLSVersion[version]
    with contextlib.ExitStack() as stack:
        with serve(**by_tls) as server:
            client = stack.enter_context(TLSClient(
                server.port, minimum_version=exactly, maximum_version=exactly))
            assert client.send(HEALTH).reply().json() == OK
        assert client.socket.recv(1) == b""  # raises SSLError for an alert, or an end without one


@pytest.mark.parametrize("pieces", [(), (STREAM_HEAD, chunked(b"data: 1\n\n", end=False))])
@pytest.mark.parametrize("leave", ("FIN", "RST"))
def test_a_tls_client_that_leaves_cancels_the_backend(by_tls, capfd, pieces, leave):
    go = threading.Semaphore(0)
    with forward(stepwise(go, *pieces), **by_tls) as (port, backend), TLSClient(port) as client:
        client.send(request(body=STREAM))
        for _, text in zip(pieces, (b"\r\n\r\n", b"data: 1\n\n")):
            go.release()
            wait_for(client, text)  # at once: the backend's next piece needs another `go`
        eventually(lambda: backend.requests)
        client.vanish() if leave == "RST" else client.socket.close()
        eventually(lambda: backend.ended)
        wait_for_log(capfd, " 499 .*client_closed")


def take(sock, size):
    """Read so many bytes, four megabytes a second."""
    data = bytearray()
    while len(data) < size:
        some = sock.recv(min(size - len(data), 400_000))
        assert some, f"ended after {len(data)} bytes"
        data += some
        threading.Event().wait(len(some) / 4e6)
    return bytes(data)


def test_a_big_body_may_take_longer_by_tls_than_its_reader_may_be_silent(by_tls, pem):
    """Of a TLS connection, the time-out is for all that is given to it at once."""
    said = "x" * 16_000_000
    def script(played, number):
        while b"\r\n\r\n" not in played.buffer:
            played.buffer += played.socket.recv(65536)
        head, _, begun = played.buffer.partition(b"\r\n\r\n")
        length = int(re.search(rb"(?i)content-length: *([0-9]+)", head)[1])
        assert begun + take(played.socket, length - len(begun)) == chat(said)
        played.send(response())
    with PlayedBackend(tls(script, pem)) as backend, serve(
            backend_url=f"https://localhost:{backend.port}", backend_timeout=2) as server:
        assert ask(server.port, body=chat(said)).status == 200
    with serve(client_timeout=2, **by_tls) as server, TLSClient(server.port) as client:
        head = client.send(request(body=chat(said))).head()
        rest = take(client.socket, int(head.one("content-length")) - len(client.buffer))
        assert json.loads(client.buffer + rest)["choices"][0]["message"]["content"].endswith(said)


def test_a_tls_client_that_reads_nothing_is_given_up(by_tls, capfd):
    def script(played, number):
        played.request()
        with contextlib.suppress(ConnectionError):
            played.send(CHUNKED_HEAD + chunked(b"x" * (1 << 26), end=False))
        played.wait_for_end()
    with forward(script, client_timeout=1, **by_tls) as (port, backend), TLSClient(port) as client:
        client.send(request(body=CHAT))
        eventually(lambda: backend.ended)
        wait_for_log(capfd, " 499 ")


def test_a_silent_tls_client_stops_nobody_and_is_given_up(by_tls):
    hello = client_hello(2)
    with serve(client_timeout=SECONDS * 3, **by_tls) as server, contextlib.ExitStack() as stack:
        for n in range(40):
            stack.enter_context(Client(server.port)).send(hello[:n % 2 * 99])
        with TLSClient(server.port) as client:
            assert client.send(HEALTH).reply().json() == OK
    with serve(client_timeout=0.5, **by_tls) as server, Client(server.port) as silent, Client(
            server.port) as slow:
        with contextlib.suppress(ConnectionError):
            drip(slow, hello, 0.1)
        for client in (silent, slow):
            while client.more():
                pass
            assert not client.buffer.startswith(b"HTTP")


def test_neither_silent_nor_idle_tls_clients_delay_the_exit(pem):
    with Process("--port=0", TLS_CERT_FILE=pem, TLS_KEY_FILE=pem, CLIENT_TIMEOUT="3600",
                 SHUTDOWN_TIMEOUT="3600") as process, Client(process.port), \
            TLSClient(process.port) as new, TLSClient(process.port) as used:
        assert used.send(HEALTH).reply().status == 200
        os.kill(process.pid, signal.SIGTERM)
        for client in (new, used):  # with an alert or without: no reply is owed
            with contextlib.suppress(ssl.SSLError):
                assert client.is_closed()
        assert process.wait() == 0


def test_a_tls_client_past_the_limit_gets_no_plain_text(by_tls):
    with serve(max_connections=1, **by_tls) as server, TLSClient(server.port) as first:
        assert first.send(HEALTH).reply().json() == OK
        with Client(server.port) as second:
            assert second.is_closed()


@pytest.mark.parametrize("data", (
    HEALTH, b"\r\n", b"\x16\x03\x01\0\5\1\0\0\1\0", b"\xff" * 300, HEALTH * 999, None))
def test_what_is_no_tls_gets_no_service_on_the_tls_port_and_harms_nobody(by_tls, log, data):
    with serve(client_timeout=1, **by_tls) as server, Client(server.port) as client:
        with contextlib.suppress(ConnectionError):
            client.vanish() if data is None else client.send(data)
        while data and client.more():
            pass
        assert b'"status"' not in client.buffer and b" 200 " not in client.buffer
        with TLSClient(server.port) as other:
            assert other.send(HEALTH).reply().json() == OK
    assert not re.search("(?i)traceback|internal", "\n".join(log))


@pytest.mark.parametrize(("minor", "record"), [(2, b"\x16\x03\x03"), (1, b"\x15\x03")])
def test_tls_1_1_is_refused_by_an_alert(by_tls, minor, record):
    with serve(**by_tls) as server, Client(server.port) as client:
        client.send(client_hello(minor))
        assert client.more() and client.buffer.startswith(record)
        assert minor == 2 or client.buffer[5:7] == b"\2\x46"  # fatal: protocol_version


# -- SIGHUP ----------------------------------------------------------------------------------------


def hang_up(process, *names):
    """Send SIGHUP; wait for a new line of the log that holds one of the names."""
    before = len(process.lines)
    os.kill(process.pid, signal.SIGHUP)
    eventually(lambda: any(name in line for line in process.lines[before:] for name in names))


def test_sighup_loads_a_new_certificate_and_keeps_the_old_one_if_it_is_bad(tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    with Process("--port=0", TLS_CERT_FILE=as_file(cert, OLD), TLS_KEY_FILE=as_file(key, KEY)
                 ) as process, TLSClient(process.port) as before:
        def shown():
            with TLSClient(process.port) as client:
                assert client.send(HEALTH).reply().status == 200
                return ssl.DER_cert_to_PEM_cert(client.socket.getpeercert(True))
        assert before.send(HEALTH).reply().status == 200 and shown() == OLD
        as_file(cert, NEW)
        os.kill(process.pid, signal.SIGHUP)
        eventually(lambda: shown() == NEW)
        for path, bad in ((cert, STRANGE), (cert, "none"), (key, ""), (cert, None)):
            good = path.read_text()
            as_file(path, bad)
            hang_up(process, "TLS_", "tls_", str(path))
            assert shown() == NEW
            as_file(path, good)
        assert before.send(HEALTH).reply().status == 200
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait() == 0 and "PRIVATE" not in process.log


def test_sighup_rereads_the_key_files_and_keeps_the_old_keys_if_the_new_are_bad(tmp_path):
    keys, ours = tmp_path / "keys", tmp_path / "ours"
    with PlayedBackend(answers(response())) as backend, Process(
            "--port=0", BACKEND_URL=backend.url, BACKEND_API_KEY_FILE=as_file(ours, "s3cret-1"),
            API_KEYS_FILE=as_file(keys, "s3cret-old"), API_KEYS="s3cret-fixed"
            ) as process, Client(process.port) as client:
        def accepted():
            replies = [client.send(request("GET", MODELS, b"", bearer("s3cret-" + key))).reply()
                       for key in ("old", "new", "fixed")]
            return [reply.status for reply in replies], seen(backend).one("authorization")[-1]
        assert accepted() == ([200, 401, 200], "1")
        as_file(keys, "new=s3cret-new\n"), as_file(ours, "s3cret-2\n")
        os.kill(process.pid, signal.SIGHUP)
        eventually(lambda: accepted() == ([401, 200, 200], "2"))  # on an old connection, too
        for path, name in ((keys, "API_KEYS_FILE"), (ours, "BACKEND_API_KEY_FILE")):
            good = path.read_text()
            for bad in ("", "# none\n", "s3cret two\n", None):
                as_file(path, bad)
                hang_up(process, name, str(path))
                assert accepted() == ([401, 200, 200], "2")
            as_file(path, good)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait() == 0 and " key=new " in process.log and "s3cret" not in process.log


def test_sighup_without_files_amid_a_request_harms_nobody():
    with Process("--port=0") as process, Client(process.port) as client:
        begin(process, client)
        for _ in range(3):
            os.kill(process.pid, signal.SIGHUP)
        assert client.send(CHAT).reply().status == 200 and process.process.poll() is None
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait() == 0


@pytest.mark.parametrize("files", ({}, {"API_KEYS_FILE": "keys"}))
def test_sighup_of_a_closed_terminal_ends_a_gateway_that_has_no_files_to_read(files, tmp_path):
    try:
        for descriptor in os.openpty():
            os.close(descriptor)
    except OSError as error:
        pytest.skip(f"this system has no pseudo-terminal to give: {error}")
    files = {name: as_file(tmp_path / path, "s3cret") for name, path in files.items()}
    at_terminal = (  # to the end of the process, somebody has the other end of it
        "import os, sys; master, terminal = os.openpty(); os.set_inheritable(master, True);"
        " os.dup2(terminal, 0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])")
    with Process("--port=0", python=(sys.executable, "-c", at_terminal), **files) as process:
        assert ask(process.port, "GET", "/healthz").status == 200
        os.kill(process.pid, signal.SIGHUP)
        if files:
            eventually(lambda: "SIGHUP: " in process.log)
            os.kill(process.pid, signal.SIGTERM)
        assert process.wait() == (0 if files else -signal.SIGHUP)


# -- traceparent -----------------------------------------------------------------------------------

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(("parents", "is_valid"), [
    ((f"00-{TRACE}-{SPAN}-01",), True), ((f"cc-{TRACE}-{SPAN}-00-more",), True), ((), False),
    ((f"00-{'0' * 32}-{SPAN}-01",), False), ((f"00-{TRACE.upper()}-{SPAN}-01",), False),
    ((f"ff-{TRACE}-{SPAN}-01",), False), ((f"00-{TRACE}-{'0' * 16}-01",), False),
    ((f"00-{TRACE[1:]}-{SPAN}-01",), False), ((f"00-{TRACE}-{SPAN}-01-more",), False),
    ((TRACE,), False), (('"\\ \xe9',), False), ((f"00-{TRACE}-{SPAN}-01",) * 2, False)])
def test_trace_fields_pass_as_they_are_and_a_valid_trace_id_is_logged(parents, is_valid, log):
    """W3C Trace Context, 3.2.2: only versions above 00 may have more, and ff is none."""
    fields = [*[f"TraceParent: {parent}" for parent in parents],
              "tracestate: rojo=1 , congo=t61", "TRACESTATE: b=2"]
    with forward(answers(response()), log_format="json") as (port, backend):
        assert ask(port, "POST", CHATS, CHAT, *fields).status == 200
        lines = backend.requests[0][0].decode("latin-1").split("\r\n")
        assert [line for line in lines if line.lower().startswith("trace")] == fields
        assert json.loads(lines_of(log)[0])["trace_id"] == (TRACE if is_valid else "-")


# -- 4. Observability: /metrics --------------------------------------------------------------------

CHAT_PATH = "/v1/chat/completions"
DURATION, TTFT, OVERHEAD, USAGE, REQUESTS, TRIES = (
    "gen_ai_server_request_duration_seconds", "gen_ai_server_time_to_first_token_seconds",
    "gateway_overhead_seconds", "gen_ai_client_token_usage", "gateway_requests_total",
    "gateway_backend_requests_total")
IN_FLIGHT, QUEUE, LEFT, RETRIES, UP = (
    "gateway_requests_in_flight", "gateway_queue_depth", "gateway_client_disconnects_total",
    "gateway_retries_total", "gateway_backend_up")
METRIC_TYPES = {
    **dict.fromkeys((DURATION, TTFT, OVERHEAD, USAGE), "histogram"),
    **dict.fromkeys((REQUESTS, TRIES, LEFT, RETRIES), "counter"),
    **dict.fromkeys((IN_FLIGHT, QUEUE, UP, "gateway_build_info"), "gauge")}
RECOMMENDED = {  # bounds of buckets: OpenTelemetry's semantic conventions for generative AI
    DURATION: [0.01 * 2 ** n for n in range(14)], USAGE: [4 ** n for n in range(14)],
    TTFT: [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10]}
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"'
FAMILY = re.compile(r"# HELP ([a-z_]+) (?:[^\\\n]|\\[\\n])+\n# TYPE ([a-z_]+) ([a-z]+)\n")
SAMPLE = re.compile(rf"([a-z_]+)(?:\{{({LABEL}(?:,{LABEL})*)\}})? (\S+)\n")


def labelled(name, **labels):
    """Return a sample's name with its labels, in the one order that is used here."""
    inner = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    return f"{name}{{{inner}}}" if inner else name


def exposition(text):
    """Parse Prometheus's text format more strictly than Prometheus does; return the families'
    types, and the samples as {name with labels: value}. None of ours is below 0, or NaN."""
    types, samples, buckets, at = {}, {}, {}, 0
    while at < len(text):
        if begun := FAMILY.match(text, at):  # HELP and TYPE, and behind them all its samples
            family, named, kind = begun.groups()
            assert family == named and family not in types
            types[family], at = kind, begun.end()
            continue
        line = SAMPLE.match(text, at)
        assert line, text[at:at + 200]
        at, name, pairs = line.end(), line[1], re.findall(LABEL, line[2] or "")
        labels, value, end = dict(pairs), float(line[line.lastindex]), name.removeprefix(family)
        key, bound = labelled(name, **labels), labels.pop("le", None)
        assert key not in samples and 0 <= value < float("inf"), line[0]
        assert len(pairs) == len(labels) + (bound is not None), line[0]
        assert end in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",)), line[0]
        assert (kind == "counter") is name.endswith("_total"), line[0]
        assert (bound is None) is (end != "_bucket"), line[0]
        samples[key] = value
        if end:
            series = buckets.setdefault((family, *labels.items()), [])
            series += [(float(bound), value)] if bound else []
    for (family, *labels), pairs in buckets.items():  # of bound and number, both rising
        assert pairs == list(zip(*map(sorted, zip(*pairs)))) and pairs[-1] == (
            float("inf"), samples[labelled(f"{family}_count", **dict(labels))])
        assert labelled(f"{family}_sum", **dict(labels)) in samples
    return types, samples


class Meter(Client):
    """Scrapes /metrics on one connection, on which our own scrapes are counted one by one."""

    def __init__(self, port):
        super().__init__(port)
        self.scrapes = 0
        self.begin()

    def scrape(self):
        """Return the samples of now, but for what our own scrapes have added."""
        reply, ours = self.send(request("GET", "/metrics")).reply(), labelled(
            REQUESTS, status="200", outcome="ok")
        self.types, samples = exposition(reply.body.decode())
        samples[ours] = samples.get(ours, 0) - self.scrapes
        self.scrapes += 1
        return samples

    def begin(self):
        """Count from here."""
        self.start = self.scrape()

    def moved(self, pattern=""):
        """Return by what those that match have changed; of times, how many there were."""
        return {name: value - self.start.get(name, 0) for name, value in self.scrape().items()
                if value != self.start.get(name, 0) and re.search(pattern, name)
                and not re.search("_seconds_sum|_bucket", name)}

    def expect(self, moves, pattern=""):
        """Wait until those that match have moved so, and no others; count anew from there."""
        with contextlib.suppress(AssertionError):
            eventually(lambda: self.moved(pattern) == moves)
        assert self.moved(pattern) == moves
        self.begin()


def test_metrics_are_prometheus_s_text_with_help_and_type_of_every_family():
    address = dead_address()
    with serve(backend_url=f"{address},{dead_address()}") as server, Meter(server.port) as meter:
        assert meter.types == METRIC_TYPES
        assert meter.start[labelled("gateway_build_info", version=gateway.__version__)] == 1
        assert meter.start[labelled(UP, backend=address)] == 1
        head, get, post = (ask(server.port, how, "/metrics") for how in ("HEAD", "GET", "POST"))
        assert [(r.status, bool(r.body)) for r in (head, get, post)] == [
            (200, False), (200, True), (405, True)]
        kind = "text/plain; version=0.0.4; charset=utf-8"
        assert get.one("content-type") == head.one("content-type") == kind
    with forward(stream_of(USED)) as (port, _), Meter(port) as meter:
        assert ask(port, body=STREAM).status == 200
        meter.expect(tokens_of((7, 5)), "token_usage")
        for family, recommended in RECOMMENDED.items():
            bounds = {float(bound) for name in meter.start if name.startswith(family)
                      for bound in re.findall(r'le="([^+"]+)"', name)}
            assert bounds >= set(recommended) and 600 <= max(bounds) and len(bounds) < 30


def moves(status, outcome, *tries, operation=None, forwarded=True, ttft=False):
    """Return what a request moves; `tries` are pairs of a backend and an outcome there."""
    names = [labelled(REQUESTS, status=status, outcome=outcome), *[RETRIES] * (len(tries) - 1),
             *(labelled(TRIES, backend=backend, outcome=kind) for backend, kind in tries),
             *[f"{OVERHEAD}_count"] * forwarded, *[LEFT] * (outcome == "client_closed")]
    for family in (DURATION,) * bool(operation) + (TTFT,) * ttft:
        names.append(labelled(f"{family}_count", gen_ai_operation_name=operation))
    return {name: names.count(name) for name in names}


def closes(data):
    """Return a script that answers a request with this, and closes."""
    return lambda played, number: played.request() and played.send(data)


def silent(played, number):
    """Read a request, and wait for the gateway to give up."""
    if played.request():
        played.wait_for_end()


def events_of(*events, gap=b"\n\n"):
    """Return events, whose data may be bytes or is JSON, as bytes."""
    return [b"data: " + (e if isinstance(e, bytes) else json.dumps(e).encode()) + gap
            for e in events]


def stream_of(*events):
    """Return a script that answers with these events, a chunk each, and [DONE]."""
    return answers(STREAM_HEAD + chunked(*events_of(*events, b"[DONE]")))


FINE, ABSENT, BUSY = (response(b"{}", status) for status in (
    "200 OK", "404 Not Found", "503 Service Unavailable"))
SAID = {"choices": [{"index": 0, "delta": {"content": "Hi"}}]}
OPENAI = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
USED = {"choices": [], "usage": OPENAI}
TO_CHAT, TO_STREAM = request(body=CHAT), request(body=STREAM)
TO_TEXT, TO_EMBED, TO_RANK, TO_FILES = (
    request(path=f"/v1/{name}", body=CHAT) for name in (
        "completions", "embeddings?a=b", "rerank", "files"))
TRAFFIC = {  # (what the backend does, what is asked; what moves: status, outcome, try, operation)
    "whole": (answers(FINE), TO_CHAT, "200", "ok", "2xx", "chat"),
    "stream": (stream_of(SAID), TO_STREAM, "200", "ok", "2xx", "chat"),
    "text": (answers(FINE), TO_TEXT, "200", "ok", "2xx", "text_completion"),
    "embeddings": (answers(FINE), TO_EMBED, "200", "ok", "2xx", "embeddings"),
    "rerank": (answers(FINE), TO_RANK, "200", "ok", "2xx", "other"),
    "files": (answers(FINE), TO_FILES, "200", "ok", "2xx", None),
    "absent": (answers(ABSENT), TO_CHAT, "404", "ok", "4xx", "chat"),
    "no stream": (answers(ABSENT), TO_STREAM, "404", "ok", "4xx", "chat"),
    "health": (None, HEALTH, "200", "ok", None, None),
    "unknown": (None, request("GET", "/"), "404", "refused", None, None),
    "malformed": (None, b"nonsense\r\n\r\n", "400", "refused", None, None),
    "headless": (None, TO_CHAT.replace(b"Host", b"Most"), "400", "refused", None, None),
    "ambiguous": (None, TO_CHAT.replace(b"Host", b"Transfer-Encoding: chunked\r\nHost"), "400",
                  "refused", None, None),
    "too new": (None, TO_CHAT.replace(b"HTTP/1.1", b"HTTP/2.0"), "505", "failed", None, None),
    "no JSON": (None, request(body=b"{"), "400", "refused", None, None),
    "garbage": (closes(b"\0\r\n\r\n"), TO_FILES, "502", "failed", "backend_error", None),
    "silence": (silent, TO_CHAT, "504", "failed", "backend_timeout", "chat"),
    "cut": (closes(response(b"{}    ")[:-3]), TO_CHAT, "200", "cut", "2xx", "chat"),
    "cut stream": (closes(STREAM_HEAD + chunked(b"data: {}\n\n", end=False)), TO_STREAM,
                   "200", "cut", "2xx", "chat")}


@pytest.mark.parametrize("case", TRAFFIC)
def test_each_request_moves_just_the_metrics_that_it_should(case):
    script, data, status, outcome, kind, operation = TRAFFIC[case]
    with forward(script, backend_timeout=0.5 if script is silent else SECONDS) as (port, backend):
        with Meter(port) as meter, Client(port) as client:
            client.send(data).reply()
            meter.expect(moves(  # and one that fails is down, besides
                status, outcome, *[(backend.url, kind)] * bool(kind), operation=operation,
                forwarded=bool(kind), ttft="stream" in case and status == "200"),
                f"^(?!{UP})")


def test_metrics_have_all_requests_that_ended_before_they_were_asked_for(monkeypatch):
    monkeypatch.setattr(gateway, "SETTLED", SETTLED)
    monkeypatch.setattr(gateway, "SETTLE_SECONDS", 60)
    with serve() as server, Client(server.port) as client, Client(server.port):
        for number in range(30):
            assert client.send(HEALTH).reply().status == 200
            metrics = client.send(request("GET", "/metrics")).reply().body.decode()
            ok = labelled(REQUESTS, status="200", outcome="ok")
            assert exposition(metrics)[1][ok] == 2 * number + 1


def test_a_fault_of_our_own_is_counted_as_one(monkeypatch, echo, faults):
    """Not as a request that was refused: an alert may be built on that."""
    def fail(*_):
        raise RuntimeError
    with Meter(echo) as meter:
        monkeypatch.setattr(gateway, "parse_json", fail)
        assert ask(echo, body=CHAT).status == 500
        meter.expect({labelled(REQUESTS, status="500", outcome="failed"): 1}, REQUESTS)
    assert len(faults) == 1
    faults.clear()


@pytest.mark.parametrize(("first", "second", "status", "outcome", "kinds"), [
    (BUSY, FINE, 200, "ok", ("5xx", "2xx")), (BUSY, BUSY, 503, "ok", ("5xx", "5xx")),
    (b"", FINE, 200, "ok", ("backend_error", "2xx")),
    (None, FINE, 200, "ok", ("backend_unreachable", "2xx")),
    (None, BUSY, 503, "ok", ("backend_unreachable", "5xx")),
    (None, None, 503, "failed", ("backend_unreachable", "backend_unreachable"))])
def test_a_retry_is_counted_with_each_try_and_gateway_backend_up_tells_who_is_down(
        first, second, status, outcome, kinds):
    with PlayedBackend(closes(first)) as one, PlayedBackend(closes(second)) as other:
        urls = [dead_address() if reply is None else backend.url
                for reply, backend in ((first, one), (second, other))]
        with serve(backend_url=",".join(urls)) as server, Meter(server.port) as meter:
            assert ask(server.port, body=CHAT).status == status
            meter.expect(moves(str(status), outcome, *zip(urls, kinds), operation="chat") | {
                labelled(UP, backend=url): -1 for url, kind in zip(urls, kinds) if kind != "2xx"})


def test_who_leaves_is_counted_and_what_is_in_flight_or_waits_is_told_while_it_does():
    with forward(silent, max_concurrent_requests=1, queue_timeout=SECONDS) as (port, backend):
        with Meter(port) as meter, Client(port) as first, Client(port) as second:
            first.send(TO_CHAT)
            eventually(lambda: backend.requests)
            meter.expect({IN_FLIGHT: 1})
            second.send(TO_STREAM)
            meter.expect({QUEUE: 1})
            for client, gauge, tries in (
                    (second, QUEUE, ()), (first, IN_FLIGHT, [(backend.url, "cancelled")])):
                client.vanish()
                meter.expect({gauge: -1} | moves(
                    "499", "client_closed", *tries, operation="chat", forwarded=False))


QUOTED = 'it says "usage": {"prompt_tokens": 900, "completion_tokens": 900}'
DETAILED = {"prompt_tokens_details": {"cached_tokens": 3}, **OPENAI,
            "completion_tokens_details": {"reasoning_tokens": 4}}
RESPONSES = {"input_tokens": 7, "input_tokens_details": {"cached_tokens": 3}, "output_tokens": 5,
             "output_tokens_details": {"reasoning_tokens": 4}, "total_tokens": 12}
LONG, NOTHING = {"choices": ["x" * 300_000]}, (None, None)
ANSWERED = {  # what is answered, a list as a stream; what is counted
    "whole": (USED | {"service_tier": "default"}, (7, 5)), "long": (LONG | USED, (7, 5)),
    "details": ({"usage": DETAILED} | SAID, (7, 5)),
    "many details": ({"usage": OPENAI | {"more": "x" * 2500}} | SAID, (7, 5)),
    "not quite JSON": ({"usage": OPENAI | {"cost": float("nan")}}, (7, 5)),
    "a word like it": ([SAID, USED, {"choices": ["usage max_tokens"]}], (7, 5)),
    "embedding": ({"data": [], "usage": {"prompt_tokens": 7, "total_tokens": 7}}, (7, None)),
    "responses": ({"object": "response", "usage": RESPONSES, "user": None}, (7, 5)),
    "the word": ({"usage": OPENAI, "choices": [{"message": {"content": "usage"}}]}, (7, 5)),
    "quoted": ({"usage": OPENAI, "choices": [QUOTED]}, (7, 5)),
    "just quoted": ({"choices": [QUOTED]}, NOTHING), "null": ({"usage": None}, NOTHING),
    "a list": ({"usage": [7, 5]}, NOTHING), "none": (SAID, NOTHING),
    "odd": ({"usage": {"prompt_tokens": "7", "completion_tokens": -5}}, NOTHING),
    "odder": ({"usage": {"prompt_tokens": True, "completion_tokens": 5.5}}, NOTHING),
    "absurd": ({"usage": {"prompt_tokens": 10 ** 400, "completion_tokens": None}}, NOTHING),
    "stream": ([SAID | {"usage": None}, SAID, USED], (7, 5)), "long stream": ([LONG, USED], (7, 5)),
    "each chunk": ([SAID | {"usage": OPENAI | {"completion_tokens": n}} for n in range(6)], (7, 5)),
    "all but the last": ([USED, SAID], (7, 5)), "null at last": ([USED, {"usage": None}], (7, 5)),
    "stream without": ([SAID, {"choices": [QUOTED]}], NOTHING),
    "broken": ([b'{"usage": {"prompt_tokens": 900', USED], (7, 5)),
    "responses stream": ([{"response": {"usage": use}} for use in (None, RESPONSES)], (7, 5))}


def tokens_of(counts, times=1):
    """Return what the usage of so many answers moves."""
    return {labelled(f"{USAGE}_{end}", gen_ai_token_type=kind): value * times
            for kind, count in zip(("input", "output"), counts) if count is not None
            for end, value in (("count", 1), ("sum", count))}


WAYS = ("one piece", "pieces", "close", "CR LF", "gzip")


@pytest.mark.parametrize(("case", "way"), [
    (case, way) for number, case in enumerate(ANSWERED)
    for way in (WAYS[number % 5], WAYS[(number + 2) % 5])])
def test_the_usage_that_an_answer_bears_is_counted_once_and_the_answer_is_not_touched(
        case, way, capfd):
    (answer, counts), gap = ANSWERED[case], b"\r\n\r\n" if way == "CR LF" else b"\n\n"
    stream = isinstance(answer, list)
    body = b"".join(events_of(*answer, b"[DONE]", gap=gap) if stream
                    else [json.dumps(answer).encode()])
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n" % (
        b"text/event-stream" if stream else b"application/json")
    if way == "gzip":
        head, body, counts = head + b"Content-Encoding: gzip\r\n", gzip.compress(body), NOTHING
    size = len(body) if way == "one piece" else 4001 if len(body) > 4001 else 7
    pieces = [body[at:at + size] for at in range(0, len(body), size)]
    data = head + (b"\r\n" + body if way == "close"
                   else b"Transfer-Encoding: chunked\r\n\r\n" + chunked(*pieces))
    path = "/v1/responses" if case.startswith("responses") else CHAT_PATH
    with forward(closes(data)) as (port, _), Meter(port) as meter:
        reply = ask(port, "POST", path, STREAM if stream else CHAT)
        assert reply.status == 200 and reply.body == body and not reply.cut
        wait_for_log(capfd, " 200 POST ")  # it has been counted, if that is what it does
        meter.expect(tokens_of(counts), "token_usage")


@pytest.mark.parametrize("before", ("", "x", "xx"))
def test_usage_is_found_before_text_whose_characters_are_several_bytes(before):
    answer = {"usage": OPENAI, "choices": [before + "\u65e5" * 3000]}
    body = json.dumps(answer, ensure_ascii=False).encode()
    with forward(answers(response(body))) as (port, _), Meter(port) as meter:
        assert ask(port, body=CHAT).body == body
        meter.expect(tokens_of((7, 5)), "token_usage")


def test_usage_is_found_before_a_long_answer_that_does_not_come_at_once():
    """llama.cpp's embeddings and ranks are like that."""
    data = response(json.dumps({"usage": OPENAI, "data": [0.123456789] * 5000}).encode())
    def script(played, number):
        played.request()
        send_in_two(played, data[:2000], data[2000:])
    with forward(script) as (port, _), Meter(port) as meter:
        assert ask(port, "POST", "/v1/embeddings", b"{}").body == data.partition(b"\r\n\r\n")[2]
        meter.expect(tokens_of((7, 5)), "token_usage")


def test_of_a_long_answer_no_more_is_kept_than_usage_is_sought_in(monkeypatch):
    kept, end = [], gateway.Ledger.end
    monkeypatch.setattr(gateway.Ledger, "end", lambda ledger, record, **fate: (
        kept.append(len(record.answer)), end(ledger, record, **fate)))
    with forward(answers(CHUNKED_HEAD + chunked(*[b"x" * 50_000] * 20))) as (port, _):
        assert len(ask(port, body=CHAT).body) == 1_000_000
        eventually(lambda: kept)
        assert 0 < kept[0] <= 2 * gateway.USAGE_BYTES


@pytest.mark.parametrize("stream", (False, True))
def test_usage_is_found_wherever_an_answer_is_split(stream):
    data = (STREAM_HEAD + chunked(*events_of(USED, b"[DONE]")) if stream
            else response(json.dumps(USED).encode()))
    splits = range(data.index(b"usage") - 3, len(data))
    def script(played, number):
        while read := played.request():
            send_in_two(played, data[:case_of(read[0])], data[case_of(read[0]):])
    with forward(script) as (port, _), Meter(port) as meter, Client(port) as client:
        for split in splits:
            assert client.send(request(path=f"{CHAT_PATH}?{split}", body=CHAT)).reply().body
        meter.expect(tokens_of((7, 5), len(splits)), "token_usage")


def test_neither_clients_nor_backends_can_make_metrics_grow_or_show_what_they_sent():
    def script(played, number):
        while read := played.request():
            played.send(response(b"", f"{case_of(read[0])} Hostile" if b"?" in read[0] else "200 "))
    sizes = []
    with forward(script) as (port, _), Meter(port) as meter:
        for turn in range(3):
            for n in range(30):
                name = f"hostile-{turn}-{n}"
                for asked in (
                        (name, "/v1/models"), (name, "/metrics"), ("GET", f"/{name}"),
                        ("GET", f"/v1/{name}"), ("POST", f"/v1/{name}", chat("", model=name)),
                        ("POST", CHAT_PATH, chat("", model=name, stream=True),
                         f"X-Request-ID: {name}", f"Authorization: {name}", f"User-Agent: {name}"),
                        ("POST", f"{CHAT_PATH}?{200 + 9 * n + 270 * turn}", CHAT)):
                    ask(port, *asked)
            eventually(lambda: sum(meter.moved(REQUESTS).values()) == 30 * 7 * (turn + 1))
            samples = meter.scrape()
            assert not [name for name in samples if "hostile" in name.lower()]
            sizes.append(len(samples))
    assert sizes[2] < 500 and sizes[2] - sizes[0] < 40  # a few more statuses of the backend


def test_times_begin_and_end_where_they_should_and_overhead_is_ours_alone():
    def passes(seconds=0.4):
        end = time.monotonic() + seconds  # what is measured is time: some has to go by
        eventually(lambda: time.monotonic() > end)
    go, script = threading.Semaphore(0), (STREAM_HEAD, *(
        chunked(event, end=False) for event in (b"data: {}\n\n", DONE)), b"0\r\n\r\n")
    with forward(stepwise(go, *script)) as (port, _), Meter(port) as meter, Client(port) as client:
        client.send(TO_STREAM[:-9])
        passes()  # at the client
        client.send(TO_STREAM[-9:])
        for text, seconds in (
                (b"\r\n\r\n", 0.8), (b"data: {}", 0.8), (b"DONE", 0.4), (b"0\r\n", 0)):
            passes(seconds)  # at the backend
            go.release()
            client.until(text)
        meter.expect({name: 1 for name in moves(
            "", "", operation="chat", ttft=True) if "seconds" in name}, "_seconds")
        total, first = (meter.start[labelled(f"{family}_sum", gen_ai_operation_name="chat")]
                        for family in (DURATION, TTFT))
        assert 1.6 <= first <= total - 0.4 and 0 < meter.start[f"{OVERHEAD}_sum"] < 0.8


# -- 9. Processes: workers and their supervisor ----------------------------------------------------
OWN_GROUP = ("setsid", sys.executable)

KILLED = {-signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGINT}


def workers_of(process, number=2):
    """Wait for a supervisor's workers; return their process ids."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    eventually(lambda: len(children.read_text().split()) == number)
    return [int(pid) for pid in children.read_text().split()]


def kill(pid, number=signal.SIGKILL):
    """Kill a worker, but not so early that it counts as one that dies at its start."""
    def age():
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
        return up - ticks / os.sysconf("SC_CLK_TCK")
    eventually(lambda: age() > 1.5)
    os.kill(pid, number)


@contextlib.contextmanager
def held(pid):
    """Stop a worker for a while: meanwhile, the others accept all connections."""
    def is_stopped():
        stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
        return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)
    os.kill(pid, signal.SIGSTOP)
    try:
        eventually(is_stopped)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def replacement(process, pid):
    """Wait for the line about a worker that was killed; return the pid of the one in its place."""
    line = rf"worker \d+ \(pid {pid}\) died: Killed; another one replaces it"
    eventually(lambda: re.search(line, process.log))
    return workers_of(process)[-1]  # the youngest


def ends(process, number=signal.SIGTERM):
    """Signal a process; return its exit status, and whether nobody has its stderr open any more."""
    os.kill(process.pid, number)
    return process.wait(), not process.reader.is_alive()


def at_fork(tmp_path, number, code):
    """Return an environment in which the process that is forked as `number` begins with `code`."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\nforks = []\nos.register_at_fork(before=lambda: forks.append(1),"
        f" after_in_child=lambda: len(forks) == {number} and {code})\n")
    return {"PYTHONPATH": str(tmp_path)}


def test_each_worker_keeps_to_one_processor_unless_it_is_told_not_to():
    ours = os.sched_getaffinity(0)
    with Process("--port=0", "--workers=2") as process:
        eventually(lambda: all(len(os.sched_getaffinity(pid)) == 1 for pid in workers_of(process)))
        bonds = [os.sched_getaffinity(pid) for pid in workers_of(process)]
        assert len(bonds[0] | bonds[1]) == min(len(ours), 2)
        assert os.sched_getaffinity(process.pid) == ours  # a worker that replaces one may have any
    with Process("--port=0") as process:
        ask(process.port, "GET", "/healthz")
        assert len(os.sched_getaffinity(process.pid)) == 1
    with Process("--port=0", CPU_AFFINITY="0") as process:
        ask(process.port, "GET", "/healthz")
        assert os.sched_getaffinity(process.pid) == ours


def weight(pid):
    """Return the nice value of a process's session."""
    return int(Path(f"/proc/{pid}/autogroup").read_text().split()[-1])


def test_workers_in_a_session_of_their_own_weigh_as_much_as_so_many_programs():
    try:
        ours, status = weight("self"), Path("/proc/self/status").read_text()
    except (OSError, IndexError):
        pytest.skip("this system does not share its processors between sessions")
    if not int(re.search(r"CapEff:\s*(\w+)", status)[1], 16) >> 23 & 1:
        pytest.skip("to weigh more takes CAP_SYS_NICE")
    leader = (sys.executable, "-c",
              "import os, sys; os.setsid(); os.execv(sys.executable, sys.argv)", "-B")
    for workers, affinity, nice in ((1, "1", 0), (2, "1", -3), (8, "1", -9), (8, "0", 0)):
        with Process("--port=0", f"--workers={workers}", python=leader,
                     CPU_AFFINITY=affinity) as process:
            assert ask(process.port, "GET", "/healthz").status == 200  # by a worker: it is done
            assert weight(process.pid) == nice
    with Process("--port=0", "--workers=2") as process:  # in that of whoever runs this test
        assert ask(process.port, "GET", "/healthz").status == 200
        assert weight("self") == weight(process.pid) == ours


def test_gateways_that_are_all_process_1_of_their_containers_do_not_share_one_processor(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os\nos.getpid = lambda: 1\n")
    bonds = set()
    for _ in range(30):  # which one is by chance
        with Process("--port=0", PYTHONPATH=str(tmp_path)) as process:
            ask(process.port, "GET", "/healthz")
            bonds |= os.sched_getaffinity(process.pid)
        if len(bonds) == min(len(os.sched_getaffinity(0)), 2):
            return
    pytest.fail(f"all were bound to {bonds}")


def test_workers_share_connections_that_come_at_once_and_one_that_hangs_holds_up_none():
    with Process("--port=0", "--workers=2") as process, contextlib.ExitStack() as stack:
        pids = workers_of(process)
        def are_shared():
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(Client(process.port)) for _ in range(60)]
                for client in clients:
                    client.send(request("GET", "/healthz"))
                assert all(client.reply().status == 200 for client in clients)
                # One for each connection, and some of the process.
                return min(len(os.listdir(f"/proc/{pid}/task")) for pid in pids) >= 15
        eventually(are_shared)  # a busy machine may let one of them wait for a processor
        with held(pids[0]):  # the other one takes all
            clients = [stack.enter_context(Client(process.port)) for _ in range(40)]
            for client in clients:
                assert client.send(request("GET", "/healthz")).reply().status == 200


def test_any_worker_answers_for_all_and_each_probes_and_reads_the_keys_again(tmp_path):
    (keys := tmp_path / "keys").write_text("old\n")
    def script(played, number):
        while read := played.request():
            models = read[0].startswith(b"GET /v1/models ")
            played.send(response(json.dumps({"data": [{"id": "m"}]} if models else USED).encode()))
    with PlayedBackend(script) as backend, Process(
            "--port=0", "--workers=2", BACKEND_URL=backend.url, PROBE_INTERVAL="0.1",
            API_KEYS_FILE=str(keys)) as process:
        pids, port = workers_of(process), process.port
        def get(key, path="/v1/files", method="GET"):
            return ask(port, method, path, b"", f"Authorization: Bearer {key}")
        for pid, number in zip(pids, (3, 4)):
            with held(pid):
                eventually(lambda: get("", "/readyz").json()["backends"][0]["models"] == ["m"])
                assert [get(key).status for key in ("new", *["old"] * number)] == [
                    401, *[200] * number]
        keys.write_text("new\n")
        os.kill(process.pid, signal.SIGHUP)
        for pid in pids:
            with held(pid):
                eventually(lambda: get("new").status == 200)
                assert get("old").status == 401
        good = labelled(TRIES, backend=backend.url, outcome="2xx")
        def samples_now():
            return exposition(get("new", "/metrics").body.decode())[1]
        eventually(lambda: samples_now()[good] == 9)
        for pid in pids:
            with held(pid):
                samples = samples_now()
                assert samples[good] == samples[f"{OVERHEAD}_count"] == 9, samples
        assert process.log.count("listening on") == 1 and "Warning" not in process.log
        assert ends(process) == (0, True)


def test_a_worker_that_is_started_after_sighup_has_the_new_keys_and_one_line_tells_of_it(tmp_path):
    keys = tmp_path / "keys"
    with Process("--port=0", "--workers=2", API_KEYS_FILE=as_file(keys, "old\n")) as process:
        first, second = workers_of(process)
        def status(key):
            return ask(process.port, "GET", "/v1/models", b"", bearer(key)).status
        as_file(keys, "new\n")
        os.kill(process.pid, signal.SIGHUP)
        with held(first):
            eventually(lambda: status("new") == 200)
        kill(first)
        replacement(process, first)
        with held(second):
            assert (status("new"), status("old")) == (200, 401)
        assert process.log.count("SIGHUP: ") == 1
        assert ends(process) == (0, True)


def test_a_killed_worker_takes_only_its_own_connections_with_it_and_is_replaced():
    go = threading.Event()
    def script(played, number):
        while read := played.request():
            assert b"wait" not in read[1] or go.wait(SECONDS)
            played.send(response())
    with (PlayedBackend(script) as backend, Process(
            "--port=0", "--workers=2", BACKEND_URL=backend.url) as process,
            contextlib.ExitStack() as stack):
        port, clients, (victim, other) = process.port, {}, workers_of(process)
        for pid, sibling in ((victim, other), (other, victim)):
            with held(sibling):
                assert ask(port, body=CHAT).status == 200
                clients[pid] = [stack.enter_context(Client(port)) for _ in range(3)]
                for client in clients[pid]:
                    client.send(request(body=chat("wait")))
                eventually(lambda: len(backend.requests) == 4 * len(clients))
        with Meter(port) as meter:
            eventually(lambda: meter.scrape()[IN_FLIGHT] == 6)
        kill(victim)
        assert all(client.is_closed() for client in clients[victim])
        assert sorted([other, replacement(process, victim)]) == sorted(workers_of(process))
        with held(other), Meter(port) as meter:
            assert ask(port, body=CHAT).status == 200
            eventually(lambda: meter.scrape()[IN_FLIGHT] == 3)
        go.set()
        assert [client.reply().status for client in clients[other]] == [200] * 3
        with Meter(port) as meter:
            good = labelled(TRIES, backend=backend.url, outcome="2xx")
            eventually(lambda: [meter.scrape()[name] for name in (IN_FLIGHT, good)] == [0, 6])
        assert ends(process) == (0, True) and process.log.count("replaces") == 1


def test_workers_killed_under_load_cost_each_client_a_request_at_most_and_metrics_stay_sane():
    over, done, begun, last, rounds = threading.Event(), [], [], {}, 3
    def load(port):
        while not over.is_set():
            with contextlib.suppress(ConnectionError, AssertionError), Client(port) as client:
                while not over.wait(0.002):
                    begun.append(1)
                    assert client.send(TO_STREAM).reply().events()[-1:] == ["[DONE]"]
                    done.append(1)
    with Process("--port=0", "--workers=2") as process:
        threads = [threading.Thread(target=load, args=(process.port,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(rounds):
                victim, enough = workers_of(process)[0], len(done) + 200
                kill(victim)
                replacement(process, victim)
                eventually(lambda: len(done) > enough)
                with Meter(process.port) as meter:
                    assert not [name for name, value in last.items() if meter.start[name] < value
                                and re.search("_total|_bucket|_count|_sum", name)]
                    last = meter.start
        finally:
            over.set()
            for thread in threads:
                thread.join()
        with Meter(process.port) as meter:
            eventually(lambda: meter.scrape()[IN_FLIGHT] == 0)
            counted = meter.scrape()[labelled(f"{DURATION}_count", gen_ai_operation_name="chat")]
        assert ends(process) == (0, True)
    most = rounds * len(threads)
    assert len(begun) - len(done) <= most
    assert abs(counted - len(done)) <= most + rounds * SETTLED


@pytest.mark.parametrize("code", ("os._exit(1)", "os.kill(os.getpid(), signal.SIGKILL)"))
@pytest.mark.parametrize("number", (2, 3))  # the second of the first two, or a replacement
def test_a_worker_that_dies_at_its_start_stops_the_service_with_status_3(number, code, tmp_path):
    with Process("--port=0", "--workers=2", **at_fork(tmp_path, number, code)) as process:
        if number > 2:
            kill(workers_of(process)[0])
        assert process.wait() == 3 and not process.reader.is_alive()
        assert re.search(r"worker \d.* (1|Killed)\b", process.lines[-1])
        with pytest.raises(ConnectionRefusedError):
            Client(process.port)


@pytest.mark.parametrize("hangs", (True, False))
def test_a_worker_that_outlives_its_time_to_stop_is_killed_and_one_in_drain_delay_is_not(hangs):
    delay = "0" if hangs else "5.5"
    with Process("--port=0", "--workers=2", DRAIN_DELAY=delay, SHUTDOWN_TIMEOUT="0.1") as process:
        first, _ = workers_of(process)
        assert ask(process.port, "GET", "/healthz").status == 200
        if hangs:
            os.kill(first, signal.SIGSTOP)
        try:
            assert ends(process) == (0, True)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, signal.SIGKILL)  # else it would have our end of its stderr for ever
        assert ("stopped at once" in process.log) is hangs


def test_status_3_stays_though_a_signal_ends_what_the_stop_has_to_wait_for(tmp_path):
    first_stops_second_dies = (
        "(os.kill(os.getpid(), signal.SIGSTOP) if len(forks) == 1 else os._exit(7))")
    with Process("--port=0", "--workers=2", SHUTDOWN_TIMEOUT="3600",
                 **at_fork(tmp_path, "len(forks)", first_stops_second_dies)) as process:
        eventually(lambda: "within a second of its start: the service stops" in process.log)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait() == 3 and "stopped at once" in process.log


@pytest.mark.parametrize("early", (False, True))
def test_workers_do_not_outlive_a_supervisor_that_is_killed(early, tmp_path):
    """It may die before a new worker has asked to be told of that."""
    at_once = at_fork(tmp_path, 2 * early, "os.kill(os.getppid(), signal.SIGKILL)")
    with Process("--port=0", "--workers=2", python=OWN_GROUP, **at_once) as process:
        try:
            if not early:
                workers_of(process)
                assert ask(process.port, body=CHAT).status == 200
                os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            eventually(lambda: not process.reader.is_alive())  # no worker has stderr open
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(("number", "group"), [
    (signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)])
@pytest.mark.parametrize("how", ("all finish", "time", "signal", "one is killed"))
def test_a_signal_drains_all_workers_and_a_second_one_ends_them(number, group, how):
    """It comes to the supervisor alone, or as from a terminal and from systemd to all of them."""
    patience = "0.2" if how == "time" else "3600"
    with (Process("--port=0", "--workers=2", SHUTDOWN_TIMEOUT=patience,
                  python=OWN_GROUP) as process, contextlib.ExitStack() as stack):
        clients, pids = [], workers_of(process)
        for pid in pids:
            with held(pid):
                clients.append(stack.enter_context(Client(process.port)))
                begin(process, clients[-1])
        target = types.SimpleNamespace(
            pid=-process.pid if group else process.pid, port=process.port)
        stop(target, number)
        if how == "signal":
            os.kill(target.pid, number)
        if how == "one is killed":  # it has the second client, for the first came while it was held
            os.kill(pids[0], signal.SIGKILL)
            assert clients.pop().is_closed()
        for client in clients:
            if how in ("all finish", "one is killed"):
                reply = client.send(CHAT).reply()
                assert (reply.status, reply.one("connection")) == (200, "close")
            assert client.is_closed()
        assert process.wait() in (KILLED if how == "signal" else {0})
        assert not process.reader.is_alive() and "replaces" not in process.log
        assert ("SHUTDOWN_TIMEOUT" in process.log) is (how == "time")


def test_auto_is_a_worker_for_each_cpu_that_may_be_used_and_without_fork_there_is_one(tmp_path):
    for cpus in ({min(os.sched_getaffinity(0))}, os.sched_getaffinity(0)):
        pinned = ("taskset", "-c", ",".join(map(str, cpus)), sys.executable)
        with Process("--port=0", "--workers=auto", python=pinned) as process:
            assert ask(process.port, body=CHAT).status == 200
            workers_of(process, len(cpus) if len(cpus) > 1 else 0)
            assert ends(process) == (0, True)
    (tmp_path / "sitecustomize.py").write_text("import os\ndel os.fork\n")
    status, _, lines = run("--port=0", "--workers=2", PYTHONPATH=str(tmp_path))
    assert status == 2 and len(lines) == 1 and "workers" in lines[0].lower()
    with Process("--port=0", PYTHONPATH=str(tmp_path)) as process:
        assert ask(process.port, body=CHAT).status == 200


def test_a_python_without_openssl_serves_all_but_https(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['_ssl'] = None\n")
    with PlayedBackend(answers(response(b"{}"))) as backend, Process(
            "--port=0", BACKEND_URL=backend.url, PYTHONPATH=str(tmp_path)) as process:
        assert ask(process.port, body=CHAT).body == b"{}"
    for setting in ({"BACKEND_URL": "http://a,HTTPS://b"}, {"TLS_CERT_FILE": "c"},
                    {"TLS_KEY_FILE": "k"}):
        status, _, lines = run("--port=0", PYTHONPATH=str(tmp_path), **setting)
        assert status == 2 and len(lines) == 1 and "OpenSSL" in lines[0]


# -- 9. Processes: rollouts ------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ("1", "2"))
def test_during_drain_delay_all_is_served_but_readyz_is_503_and_connections_end(workers):
    with (Process("--port=0", WORKERS=workers, DRAIN_DELAY="3600", SHUTDOWN_TIMEOUT="0.2") as
          process, Client(process.port) as idle, Client(process.port) as busy):
        port = process.port
        begin(process, busy)
        reply = idle.send(request("GET", "/readyz")).reply()
        assert (reply.status, reply.json()) == (200, {"status": "ready", "backends": []})
        assert not reply.all("connection")
        os.kill(process.pid, signal.SIGTERM)
        eventually(lambda: {ask(port, "GET", "/readyz").status for _ in range(50)} == {503})
        replies = [ask(port, "GET", "/healthz"), ask(port, body=CHAT), ask(port, "GET", "/"),
                   ask(port, "GET", "/readyz"), ask(port, "HEAD", "/readyz"),
                   idle.send(TO_STREAM).reply(), busy.send(CHAT).reply()]
        assert busy.is_closed() and idle.is_closed()
        assert [reply.status for reply in replies] == [200, 200, 404, 503, 503, 200, 200]
        assert {reply.one("connection") for reply in replies} == {"close"}
        assert replies[3].json() == {"status": "draining", "backends": []} and not replies[4].body
        status, is_over = ends(process)
        assert status in KILLED and is_over


@pytest.mark.parametrize("how", ("the deadline", "a second signal", "SIGKILL"))
@pytest.mark.parametrize("kind", (b"text/event-stream", b"text/plain"))
def test_a_reply_without_a_length_looks_cut_however_the_process_ends(kind, how):
    """To a client of HTTP/1.0: without a length, FIN would be its end."""
    script = stepwise(threading.Semaphore(1), ok(b"Content-Type: " + kind, body=b"data: 1\n\n"))
    with PlayedBackend(script) as backend, Process(
            "--port=0", BACKEND_URL=backend.url, SHUTDOWN_TIMEOUT=(
                "0.3" if how == "the deadline" else "3600")) as process, (
            Client(process.port)) as client:
        client.send(request(body=STREAM, version="1.0"))
        wait_for(client, b"data: 1\n\n")
        if how == "SIGKILL":
            os.kill(process.pid, signal.SIGKILL)
        else:
            stop(process)
        if how == "a second signal":
            os.kill(process.pid, signal.SIGTERM)
        with pytest.raises(ConnectionResetError):
            client.socket.recv(65536)


@pytest.mark.parametrize("workers", ("1", "2"))
def test_what_is_cut_off_when_shutdown_timeout_is_over_has_its_line_too(workers):
    def script(played, number):
        played.send(STREAM_HEAD if played.request()[0].startswith(b"POST") else b"")
        played.wait_for_end()
    with PlayedBackend(script) as backend, Process(
            "--port=0", "--shutdown-timeout=0.3", WORKERS=workers,
            BACKEND_URL=backend.url) as process, contextlib.ExitStack() as stack:
        idle, began, half, waiting, begun = [
            stack.enter_context(Client(process.port)) for _ in range(5)]
        assert idle.send(HEALTH).reply().status == 200
        began.send(b"GET / HT")
        begin(process, half)
        begun.send(request(body=STREAM)).head()
        waiting.send(request("GET", "/v1/models/x"))
        eventually(lambda: len(backend.requests) == 2)
        stop(process)
        assert process.wait() == 0
        cut = [line for line in process.lines if line.endswith(" shutdown_timeout")]
        assert sorted(line.split()[1:3] for line in cut) == [
            ["0", "-"], ["0", "GET"], ["0", "POST"], ["200", "POST"]], process.log
        assert len([line for line in process.lines if re.search(" id=[!-~]{36} ", line)]) == 5


def test_after_drain_delay_nobody_is_accepted_and_shutdown_timeout_begins():
    with (Process("--port=0", DRAIN_DELAY="1", SHUTDOWN_TIMEOUT="0.3") as process,
          Client(process.port) as client):
        begin(process, client)
        began = time.monotonic()
        stop(process)
        assert time.monotonic() - began >= 1 and client.is_closed()
        assert time.monotonic() - began >= 1.3
        assert process.wait() == 0 and "SHUTDOWN_TIMEOUT" in process.log


def activate(descriptor, *argv, pid="$$", **environ):
    """Start a gateway as systemd does: it inherits a listening socket, as descriptor 3."""
    shell = f'exec 3<&{descriptor}; LISTEN_PID={pid} exec "$0" "$@"'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", functools.partial(
            subprocess.Popen, pass_fds=[descriptor]))
        return Process(*argv, python=("bash", "-c", shell, sys.executable), **(
            {"LISTEN_FDS": "1"} | environ))


def ask_until(over, port, kept, done, lost):
    """Ask on one connection, or on one each, until it is over; count in `done`, note what fails."""
    client = None
    try:
        while not over.wait(0.002):
            client = client or Client(port)
            reply = client.send(TO_CHAT).reply()
            assert (reply.status, reply.body) == (200, b'{"ok": true}')
            done[kept] += 1
            if not kept or reply.all("connection") == ["close"]:
                client = client.socket.close()
    except Exception as error:
        lost.append(error)
    finally:
        client and client.socket.close()


def answers_but_waits(go):
    """Return a script that answers; but with a stream that ends when it may `go`, if so asked."""
    def script(played, number):
        while read := played.request():
            if b"wait" in read[1]:
                played.send(STREAM_HEAD + chunked(*events_of({}), end=False))
                assert go.wait(SECONDS * 5)
            played.send(chunked(DONE) if b"wait" in read[1] else response())
    return script


def test_ten_gateways_one_after_the_other_on_one_socket_lose_no_request():
    """The next one starts before the last one drains. A client that was told Connection: close
    takes a new connection, as all of HTTP's clients do; and a stream outlives the restarts."""
    over, go, done, lost = threading.Event(), threading.Event(), [0, 0], []
    with (socket.create_server(("127.0.0.1", 0), backlog=1024) as listener,
          PlayedBackend(answers_but_waits(go)) as backend, contextlib.ExitStack() as stack):
        port, gateways = listener.getsockname()[1], []
        threads = [threading.Thread(target=ask_until, args=(over, port, kept, done, lost))
                   for kept in (False, True)]
        def next_gateway():
            gateways.append(stack.enter_context(activate(
                listener.fileno(), BACKEND_URL=backend.url, DRAIN_DELAY="1", HOST="nowhere.invalid",
                SHUTDOWN_TIMEOUT="3600", WORKERS="12"[len(gateways) % 2])))
            assert gateways[-1].port == port
        next_gateway()
        streamed = stack.enter_context(Client(port))
        streamed.send(request(body=chat("wait", stream=True))).until(b"data: {}\n\n")
        try:
            for thread in threads:
                thread.start()
            for _ in range(10):
                next_gateway()
                os.kill(gateways[-2].pid, signal.SIGTERM)
                enough = [number + 3 for number in done]
                eventually(lambda: lost or all(n > m for n, m in zip(done, enough)))
        finally:
            over.set()
            go.set()
            for thread in threads:
                thread.join()
        assert not lost and DONE in streamed.until(b"0\r\n\r\n")
        os.kill(gateways[-1].pid, signal.SIGTERM)
        assert [process.wait() for process in gateways] == [0] * 11


def test_a_shared_socket_that_blocks_again_does_not_stop_who_accepts():
    """systemd makes it block when it starts another service, without NonBlocking=yes."""
    with socket.create_server(("127.0.0.1", 0)) as listener, activate(
            listener.fileno(), SHUTDOWN_TIMEOUT="3600") as process:
        assert ask(process.port, "GET", "/healthz").status == 200
        os.set_blocking(listener.fileno(), True)
        assert ask(process.port, "GET", "/healthz").status == 200
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait() == 0


def test_a_socket_for_another_process_is_not_taken_and_what_is_none_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        descriptor, theirs = listener.fileno(), listener.getsockname()[1]
        with activate(descriptor, "--port=0", pid="1") as process:
            assert process.port != theirs and ask(process.port, body=CHAT).status == 200
        with activate(descriptor, LISTEN_FDS="2") as process:
            assert process.wait() == 2 and len(process.lines) == 1
    with open(os.devnull) as file, socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "socket"))
        other.listen()
        for descriptor in (file.fileno(), other.fileno()):
            with activate(descriptor) as process:
                assert process.wait() == 1 and len(process.lines) == 1
                assert "LISTEN_FDS" in process.log


# -- what an auditor found in what production needs ------------------------------------------------


def test_a_hostile_form_delays_nobody():
    with forward(answers(response())) as (port, _):
        began = time.monotonic()
        assert ask(port, "POST", "/v1/audio/transcriptions", b"; name=model\r\n" * 99_999,
                   "Content-Type: multipart/form-data; boundary=x").status == 200
        assert time.monotonic() - began < SECONDS / 2  # it was minutes


def test_the_fields_of_a_form_are_found_before_and_behind_its_file():
    field = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nb\r\n'
    file = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n%b\r\n' % (
        b"\0" * 999_999)
    with several(plays(listed=models("a")), plays(listed=models("b")),
                 probe_interval=600) as (port, *backends):
        for body in (field + file, file + field, file + field, field + file):
            assert ask(port, "POST", "/v1/audio/transcriptions", body + b"--b--\r\n",
                       "Content-Type: multipart/form-data; boundary=b").status == 200
        assert counts(backends) == [0, 4]


def test_a_gateway_among_its_own_backends_costs_no_request():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with PlayedBackend(answers(response())) as backend, Process(
            f"--port={port}", BACKEND_URL=f"http://127.0.0.1:{port},{backend.url}") as process:
        assert {ask(process.port, body=CHAT).status for _ in range(6)} == {200}


@pytest.mark.parametrize("origin", ((), ("Origin: https://b.example",)))
def test_caches_are_told_that_a_reply_depends_on_its_origin(origin):
    with serve(cors_origins="https://a.example") as server:
        reply = ask(server.port, "GET", "/v1/models", b"", *origin)
        assert reply.one("vary") == "Origin" and not reply.all("access-control-allow-origin")


def test_who_needs_no_key_cannot_send_anything():
    with serve(api_keys="k") as server, Client(server.port) as client:
        client.send(b"GET /healthz HTTP/1.1\r\nHost: t\r\nContent-Length: 9999999\r\n\r\n")
        reply = client.reply()
        assert (reply.status, reply.one("connection")) == (200, "close") and not client.more()


def test_a_silent_backend_gets_no_request_while_another_can_have_it():
    """It is not ejected, for its requests may be at work; but it gets no more of them."""
    go = threading.Event()
    def hangs(played, number):
        played.request()
        assert number == 1 or go.wait(SECONDS)
        played.send(models("m"))
    with several(hangs, plays(listed=models("m")), probe_interval=0.2, connect_timeout=0.5) as (
            port, silent, other), contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(Client(port)).send(TO_CHAT) for _ in range(2)]
        eventually(lambda: len(silent.requests) > 3)  # a second probe: the first had no answer
        before = counts([silent])
        assert {ask(port, body=CHAT).status for _ in range(6)} == {200}
        assert counts([silent]) == before
        for client in waiting:
            client.vanish()
        go.set()
        eventually(lambda: ask(port, body=CHAT).status == 200 and counts([silent]) > before)


def test_a_silent_backend_gets_no_request_though_another_has_more_to_do():
    held = threading.Event()
    def hangs(played, number):
        while read := played.request():
            if number > 1 or b"/v1/models" not in read[0]:
                return played.wait_for_end()
            played.send(models("m"))
    with several(hangs, plays(listed=models("m"), go=held), probe_interval=0.2,
                 connect_timeout=0.5) as (port, silent, other), contextlib.ExitStack() as stack:
        waits = stack.enter_context(Client(port)).send(TO_CHAT)
        eventually(lambda: counts([silent]) == [1])
        clients = [hold(stack, port)]
        eventually(lambda: silent.ended)  # a probe of it
        clients += [hold(stack, port) for _ in range(3)]
        assert counts([silent, other]) == [1, 4]
        held.set()
        assert [client.reply().events() for client in clients] == [[1, "[DONE]"]] * 4
        waits.vanish()


def test_retry_after_outlives_an_older_stream_that_breaks_off(log):
    """No probe brings the backend back before the time that it asked for."""
    go, probes = threading.Event(), []
    def script(played, number):
        head, _ = played.request()
        if b"/v1/models" in head:
            probes.append(number)
            played.send(models("m"))
        elif b"?held" in head:
            played.send(EVENT)
            assert go.wait(SECONDS)
        else:
            played.send(response(b"", "503 Busy", "Retry-After: 300"))
    with several(script, probe_interval=0.1) as (port, _), contextlib.ExitStack() as stack:
        client = hold(stack, port)
        assert ask(port, body=CHAT).status == 503
        go.set()
        while client.more():
            pass
        seen_before = len(probes)
        eventually(lambda: len(probes) > seen_before + 2)
        assert not states(port, "up")[0][0]
    assert [state for _, state in changes(log)] == ["down"]


@pytest.mark.parametrize("other", ("dead", "breaks", "silent", "busy", "well"))
@pytest.mark.parametrize("drips", (False, True))
def test_a_503_whose_body_does_not_come_holds_nobody_up_and_stands_if_there_is_no_other_answer(
        other, drips):
    def script(played, number):
        played.request()
        played.send(b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 99\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(90 * drips):
                played.send(b"x")
                time.sleep(0.01)
        played.wait_for_end()
    def second(played, number):
        played.request()
        if other != "silent":
            played.send({"busy": response(status="503 No"), "well": response()}.get(other, b""))
        if other != "breaks":
            played.wait_for_end()
    with contextlib.ExitStack() as stack:
        urls = [dead_address()] if other == "dead" else [
            stack.enter_context(PlayedBackend(second)).url]
        port, first = stack.enter_context(several(script, urls=urls, backend_timeout=1))
        reply = ask(port, body=CHAT)
        stands = other in ("dead", "breaks", "silent")
        assert reply.status == (200 if other == "well" else 503)
        assert (reply.all("retry-after"), reply.cut) == (["7"] * stands, stands)
        assert not stands or reply.body == b"x" * 90 * drips
        eventually(lambda: first.ended)


@pytest.mark.parametrize("status", (429, 502, 503))
@pytest.mark.parametrize("way", ("length", "chunks", "close"))
@pytest.mark.parametrize("other", ("dead", "breaks"))
def test_the_last_answer_stands_if_the_other_backend_gives_none_however_its_body_comes(
        status, way, other):
    """As it came: http.server sends head and body apart."""
    body = b'{"who": "A"}'
    head = f"HTTP/1.1 {status} X\r\nRetry-After: 3\r\nX-A: b\r\n".encode() + {
        "length": b"Content-Length: 12\r\n", "chunks": b"Transfer-Encoding: chunked\r\n"}.get(
            way, b"") + b"\r\n"
    def script(played, number):
        played.request()
        send_in_two(played, head, chunked(body) if way == "chunks" else body)
    def breaks(played, number):
        played.request()
    with contextlib.ExitStack() as stack:
        urls = [dead_address()] if other == "dead" else [
            stack.enter_context(PlayedBackend(breaks)).url]
        port, first = stack.enter_context(several(script, urls=urls))
        reply = ask(port, body=CHAT)
        assert (reply.status, reply.body, reply.cut) == (status, body, False)
        assert (reply.one("x-a"), reply.one("retry-after")) == ("b", "3")


@pytest.mark.parametrize("faults_seen", [
    ("dead",), ("busy",), ("broken",), ("dead", "busy"), ("busy", "dead")])
def test_a_probe_brings_a_backend_back_whose_faults_no_request_met_however_long_it_was_gone(
        faults_seen, clock):
    listed = []
    def script(played, number):
        while played.request():
            played.send(listed[-1] if listed else models("m"))
    with several(script, probe_interval=1) as (port, backend):
        def is_up(after):
            clock.now += after
            return states(port, "up") == [(True,)]
        for fault in faults_seen:
            if fault == "dead":
                backend.die()
            listed[:] = [b"no HTTP\r\n\r\n" if fault == "broken" else REFUSED[503]]
            if fault == "busy" and backend.dead:
                backend.rise()
            probes, began = len(backend.requests), clock.now
            eventually(lambda: not is_up(0.25) and clock.now > began + 40 and (  # back-off: 30 s
                backend.dead or len(backend.requests) > probes + 40))
        listed.clear()
        if backend.dead:
            backend.rise()
        risen = clock.now
        eventually(lambda: is_up(0.05))
        assert clock.now - risen < 6


@pytest.mark.parametrize("probe", (REFUSED[503], b"no HTTP\r\n\r\n"))
def test_a_probe_that_fails_does_not_shorten_what_a_request_was_told(probe, clock):
    replies = []
    def script(played, number):
        read = played.request()
        is_probe = read[0].startswith(b"GET /v1/models ")
        played.send((replies.pop() if replies else models("m")) if is_probe else response(
            b"", "503 No", "Retry-After: 60"))
    with several(script, probe_interval=1) as (port, backend):
        def is_up(after):
            clock.now += after
            return states(port, "up") == [(True,)]
        assert ask(port, body=CHAT).status == 503
        replies.append(probe)
        failed = clock.now
        eventually(lambda: is_up(0.25))
        assert not replies and 60 <= clock.now - failed < 70


@pytest.mark.parametrize(("fault", "status"), [
    (REFUSED[503], 503), (b"no HTTP\r\n\r\n", 502)])
def test_the_back_off_doubles_where_probes_succeed_and_requests_do_not(fault, status, clock):
    with several(plays(fault, models("m")), probe_interval=1) as (port, backend):
        def is_up(after):
            clock.now += after
            return states(port, "up") == [(True,)]
        for back_off in (1, 2, 4, 8):
            assert ask(port, body=CHAT).status == status
            failed = clock.now
            eventually(lambda: is_up(0.05))
            assert back_off <= clock.now - failed < back_off + 3


def test_a_probe_brings_a_backend_back_at_once_that_a_request_could_not_reach(clock):
    with several(plays(listed=models("m")), probe_interval=0.2) as (port, backend):
        backend.die()
        assert ask(port, body=CHAT).status == 502 and states(port, "up") == [(False,)]
        backend.rise()
        clock.now += 0.3  # it was to be left alone for 1
        eventually(lambda: states(port, "up") == [(True,)])


def test_the_time_that_a_503_to_a_probe_asks_for_is_honoured(clock):
    no = response(b"", "503 Busy", "Retry-After: 60")
    with several(plays(listed=no), plays(listed=models("m")), probe_interval=600) as (
            port, busy, other):
        for _ in range(11):
            clock.now += 5
            assert chats(port, 2) == {200}
        assert len(busy.requests) == 1 and counts([busy, other]) == [0, 22]


def test_a_probe_that_is_ended_before_it_was_sent_is_no_failure(monkeypatch, log):
    dial, late = gateway.Pool._dial, []
    def dial_late(pool, request):
        link = dial(pool, request)
        late.append(request)
        eventually(lambda: request.cancelled or len(late) > 1)
        return link
    monkeypatch.setattr(gateway.Pool, "_dial", dial_late)
    with several(plays(listed=models("m")), probe_interval=0.1, connect_timeout=0.1) as (port, _):
        eventually(lambda: states(port, "up", "models") == [(True, ["m"])])
        assert late[0].cancelled and not changes(log)


def test_a_backend_that_a_probe_brought_back_has_its_full_share_at_once(clock):
    with several(*[plays(listed=models("m"))] * 2, probe_interval=1) as (port, one, two):
        def state(after):
            clock.now += after
            return [up for up, in states(port, "up")]
        one.die()
        began = clock.now
        eventually(lambda: state(0.25) == [False, True] and clock.now > began + 20)
        one.rise()
        eventually(lambda: state(0.05) == [True, True])
        assert chats(port, 4) == {200} and counts([one, two]) == [2, 2]


def test_a_backend_that_a_probe_found_up_needs_no_trial_though_its_last_request_failed(clock):
    """Those in flight there, which have no answer yet, keep no others away."""
    go, faults = threading.Event(), [REFUSED[503]]
    def script(played, number):
        while read := played.request():
            if read[0].startswith(b"GET /v1/models "):
                played.send(models("m"))
            else:
                assert b"?waits" not in read[0] or go.wait(SECONDS)
                played.send(faults.pop() if faults else response())
    with several(*[script] * 2, probe_interval=1) as (port, one, two), (
            contextlib.ExitStack()) as stack:
        def is_up(after):
            clock.now += after
            return states(port, "up") == [(True,)] * 2
        assert chats(port, 1) == {200} and counts([one, two]) == [1, 1]
        eventually(lambda: is_up(0.25))
        clients = []
        for number in range(4):
            clients.append(stack.enter_context(Client(port)))
            clients[-1].send(request("POST", CHATS + "?waits", CHAT))
            eventually(lambda: sum(counts([one, two])) == 3 + number)
        assert counts([one, two]) == [3, 3]
        go.set()
        assert [client.reply().status for client in clients] == [200] * 4


def test_a_comma_in_a_file_of_keys_ends_no_key(tmp_path):
    """What is behind it would be a key that nobody means to be one."""
    with serve(api_keys_file=as_file(tmp_path / "keys", " # a, b\neve=k1,x\n\nk2")) as server:
        for key, status in (("k1,x", 200), ("k2", 200), ("x", 401), ("k1", 401), ("b", 401)):
            assert ask(server.port, "GET", "/v1/models", b"", bearer(key)).status == status, key


def test_keys_can_come_from_a_pipe():
    reader, writer = os.pipe()
    os.write(writer, b"a=k1\n")
    os.close(writer)
    with serve(api_keys_file=f"/dev/fd/{reader}") as server:
        assert ask(server.port, "GET", "/v1/models", b"", "Authorization: Bearer k1").status == 200
    os.close(reader)


def test_a_worker_that_dies_of_a_nameless_signal_is_replaced():
    """Also where SIGCHLD was ignored by whoever started the gateway."""
    with Process("--port=0", "--workers=2",
                 python=("env", "--ignore-signal=CHLD", sys.executable)) as process:
        first, second = workers_of(process)
        kill(first, signal.SIGRTMIN + 3)
        name = signal.strsignal(signal.SIGRTMIN + 3)  # each libc has its own
        eventually(lambda: f"(pid {first}) died: {name}; another" in process.log)
        assert second in workers_of(process)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait() == 0


# -- what an attacker found ------------------------------------------------------------------------


def test_a_deeply_nested_list_of_models_is_passed_on_and_ends_no_process():
    deep = b'{"data": [{"id": "m", "x": %b1%b}]}' % (b'{"a":' * 9_000, b"}" * 9_000)
    script = plays(listed=response(deep))
    with PlayedBackend(script) as one, PlayedBackend(script) as two, Process(
            "--port=0", BACKEND_URL=f"{one.url},{two.url}", PROBE_INTERVAL="600") as process:
        for _ in range(3):
            reply = ask(process.port, "GET", "/v1/models")
            assert reply.status == 200 and reply.body.count(b'"a"') == 9_000


@pytest.mark.parametrize("ends, cut", (
    ([], True), ([b"x"], True), ([b"\n"], True), ([b"\n\n"], False), ([b"\n", b"\n"], False),
    ([b"\r\n", b"\r\n"], False), ([b"\n\n", b"\n"], False), ([b"\n\n", b"data: 2"], True)))
def test_a_stream_that_ends_by_closing_within_a_long_event_is_cut(ends, cut):
    """Where no [DONE] is to be expected, too; its event has begun to go out."""
    go = threading.Semaphore(0)
    def script(played, number):
        played.request()
        played.send(OK_HEAD[:-2] + b"Content-Type: text/event-stream\r\n\r\ndata: 1\n\ndata: ")
        played.send(b"x" * 400_000)
        for end in ends:
            assert go.acquire(timeout=SECONDS)
            played.send(end)
    with forward(script) as (port, _), Client(port) as client:
        client.send(request(path=FILES, body=STREAM))
        while client.buffer.count(b"x") < 400_000:
            assert client.more()
        for left, end in zip(range(len(ends), 0, -1), ends):  # each by itself
            go.release()
            if left > 1:
                wait_for(client, b"\r\n%x\r\n%b\r\n" % (len(end), end))
        assert client.reply().cut is cut


def test_text_within_a_long_event_is_no_end_of_its_stream():
    go = threading.Semaphore(0)
    def script(played, number):
        played.request()
        played.send(OK_HEAD[:-2] + b"Content-Type: text/event-stream\r\n\r\ndata: ")
        played.send(b"x" * 400_000)
        assert go.acquire(timeout=SECONDS)
        played.send(b"data: [DONE] is how a stream ends, and this one is c")
    with forward(script) as (port, _), Client(port) as client:
        client.send(request(body=STREAM))
        while client.buffer.count(b"x") < 400_000:
            assert client.more()
        go.release()
        assert client.reply().cut


def test_an_answer_that_came_before_the_request_was_sent_whole_may_end_by_closing():
    go = threading.Event()
    def script(played, number):
        played.socket.recv(1000)
        played.send(b"HTTP/1.1 413 Too large\r\n\r\nsend less")
        played.socket.shutdown(socket.SHUT_WR)
        assert go.wait(SECONDS)
    with forward(script, backend_timeout=1) as (port, _):
        reply = ask(port, "POST", FILES, b"x" * 20_000_000)
        go.set()
        assert (reply.status, reply.body, reply.cut) == (413, b"send less", False)


def test_an_answer_that_came_before_the_request_was_sent_whole_arrives_and_is_the_links_last():
    """Its backend neither reads on nor closes; the next request would be within a body."""
    go = threading.Event()
    def script(played, number):
        if number > 1:
            return answers(response())(played, number)
        played.socket.recv(1000)
        played.send(response(b"", "413 Too large"))
        assert go.wait(SECONDS)
    with forward(script, backend_timeout=1) as (port, backend), Client(port) as client:
        assert client.send(request("POST", FILES, b"x" * 20_000_000)).reply().status == 413
        assert client.send(request("GET", FILES)).reply().status == 200
        assert backend.connections == 2
        go.set()


def test_a_backend_whose_list_of_models_is_cut_short_is_down():
    with several(lambda played, number: played.request() and played.send(
            models("m")[:-3]), probe_interval=0.1) as (port, _):
        eventually(lambda: states(port, "up") == [(False,)])


def test_a_list_of_models_that_is_too_long_is_unknown_and_its_backend_up():
    with several(plays(listed=models("m" * (5 << 20))), probe_interval=600) as (port, _):
        assert states(port, "up", "models") == [(True, None)]


def test_a_list_of_models_is_known_however_small_the_pieces_are_in_which_it_comes():
    """The line of a chunk's size is no piece of it."""
    data = models(*"abc").partition(b"\r\n\r\n")[2]
    def script(played, number):
        played.request()
        played.send(CHUNKED_HEAD)
        for at in range(0, len(data), 6):
            for part in re.findall(rb".*\r\n|.+", chunked(data[at:at + 6], end=False)):
                send_in_two(played, part, b"")
        played.send(b"0\r\n\r\n")
    with several(script, probe_interval=600) as (port, _):
        assert states(port, "models") == [([*"abc"],)]


def test_out_of_descriptors_each_request_gets_its_error_and_later_ones_are_served():
    """What Python would load only then (codecs, its own sources) it can no more."""
    limited = ("bash", "-c", 'ulimit -n 40; exec "$0" "$@"', sys.executable)
    with PlayedBackend(answers(response())) as backend, contextlib.ExitStack() as stack:
        with Process("--port=0", f"--backend-url={backend.url}", python=limited) as process:
            clients = [stack.enter_context(Client(process.port)) for _ in range(60)]
            eventually(lambda: len(os.listdir(f"/proc/{process.pid}/fd")) == 40)
            for client in clients[:20]:
                reply = client.send(TO_CHAT).reply()
                assert (reply.status, reply.error()["code"]) == (503, "too_many_connections")
                assert is_new(reply.one("x-request-id")) and reply.one("retry-after") == "1"
            for client in clients[5:]:
                client.vanish()
            for client in clients[:5]:
                eventually(lambda: client.send(TO_CHAT).reply().status == 200)
            assert " is down" not in process.log  # which is not to blame


def test_done_behind_a_long_event_whose_end_came_in_two_ends_its_stream():
    go = threading.Semaphore(0)
    def script(played, number):
        played.request()
        played.send(OK_HEAD[:-2] + b"Content-Type: text/event-stream\r\n\r\ndata: ")
        for piece in (b"x" * 400_000 + b"\n", b"\n", DONE):
            played.send(piece)
            assert go.acquire(timeout=SECONDS)
    with forward(script) as (port, _), Client(port) as client:
        client.send(request(body=STREAM))
        while client.buffer.count(b"x") < 400_000 or not client.buffer.endswith(b"\n\r\n"):
            assert client.more()
        go.release()
        wait_for(client, b"\r\n1\r\n\n\r\n")
        go.release()
        wait_for(client, DONE)
        go.release()
        reply = client.reply()
        assert not reply.cut and reply.body.endswith(b"x\n\n" + DONE)


def test_a_number_in_a_list_of_models_that_no_json_can_bear_is_not_passed_on():
    script = plays(listed=response(b'{"data": [{"id": "m", "created": 1e999}]}'))
    with several(script, script, probe_interval=600) as (port, *backends):
        assert states(port, "models") == [(None,)] * 2
        assert b"1e999" in ask(port, "GET", "/v1/models").body  # a backend's own answer


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_worker_that_is_told_to_stop_alone_is_replaced_and_others_go_on(number):
    with Process("--port=0", "--workers=2") as process:
        told = workers_of(process)[0]
        kill(told, number)
        eventually(lambda: f"(pid {told}) ended with 0; another" in process.log)
        for _ in range(5):
            assert ask(process.port, "GET", "/healthz").status == 200
        assert ends(process) == (0, True)


def test_a_connection_whose_reply_began_before_a_drain_may_send_one_more_request():
    """It was not told to close; what it sends just then would be lost."""
    go = threading.Event()
    with PlayedBackend(plays(go=go)) as backend, Process(
            "--port=0", BACKEND_URL=backend.url) as process, contextlib.ExitStack() as stack:
        client = hold(stack, process.port)
        stop(process)
        go.set()
        assert client.reply().events()[-1] == "[DONE]"
        assert not select.select([client.socket], [], [], 0.1)[0]  # it is not closed at once
        reply = client.send(request("GET", FILES)).reply()
        assert (reply.status, reply.one("connection")) == (200, "close") and process.wait() == 0


# -- what an attacker found in the second writing --------------------------------------------------


@pytest.mark.parametrize("case", ("refused", "broken", "failover", "stale", "silent"))
def test_nothing_holds_a_request_that_has_ended(case):
    """An error that holds its frame, which holds the error, would wait for the collector, and the
    request's body with it."""
    def script(played, number):
        while played.request():
            if case in ("broken", "failover") and number == 1 or case == "broken":
                return played.send(b"no HTTP\r\n\r\n")
            if case == "silent":
                return played.wait_for_end()
            played.send(response())
            if case == "stale":
                return
    urls = [dead_address()] if case in ("refused", "failover") else []
    with contextlib.ExitStack() as stack:
        if case == "silent":  # the other one breaks before
            urls.append(stack.enter_context(PlayedBackend(lambda played, _: played.request())).url)
        if case != "refused":
            urls.append(stack.enter_context(PlayedBackend(script)).url)
        server = stack.enter_context(serve(backend_url=",".join(urls), backend_timeout=1))
        gc.collect()
        gc.disable()
        stack.callback(gc.enable)
        for _ in range(5):
            ask(server.port, body=CHAT)
        def held():
            return [each for each in gc.get_objects() if isinstance(each, gateway.BackendRequest)]
        eventually(lambda: not held())


def test_a_stalled_reader_of_the_log_stops_neither_new_connections_nor_a_second_signal():
    reader, writer = os.pipe()
    clean = {"PATH": os.environ["PATH"], "PORT": str(port := free_port())}
    with subprocess.Popen([sys.executable, str(HERE / "gateway.py")], stderr=writer, env=clean,
                          stdin=subprocess.DEVNULL) as process:
        os.close(writer)
        try:
            def connected():
                with contextlib.suppress(ConnectionRefusedError):
                    return Client(port)
            with eventually(connected) as first:
                for _ in range(9_999):  # nobody reads: the pipe fills, and a line of the log waits
                    first.send(HEALTH)
                    if not select.select([first.socket], [], [], 1)[0]:
                        break
                    first.reply()
                for path in ("/healthz", "/metrics", "/metrics"):
                    with Client(port) as second:
                        assert second.send(request("GET", path)).reply().status == 200
                def has_heard():  # two signals at once would be one
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
                    return caught & 1 << signal.SIGTERM - 1
                os.kill(process.pid, signal.SIGTERM)
                eventually(has_heard)
                os.kill(process.pid, signal.SIGTERM)
                assert process.wait(SECONDS) in KILLED
        finally:
            process.kill()
            os.close(reader)


@contextlib.contextmanager
def log_in_a_pipe(workers, blocking=True):
    """Run a gateway whose log goes to a pipe of 8 KiB that the test reads, or does not."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 8192)
    os.set_blocking(writer, blocking)
    clean = {"PATH": os.environ["PATH"], "PORT": str(port := free_port()), "WORKERS": workers,
             "SHUTDOWN_TIMEOUT": "0.3"}
    with subprocess.Popen([sys.executable, str(HERE / "gateway.py")], stderr=writer, env=clean,
                          stdin=subprocess.DEVNULL) as process, open(reader) as log:
        os.close(writer)
        try:
            assert "listening" in log.readline()
            yield process, port, log
        finally:
            process.kill()


@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="only Linux tells a pipe its size")
@pytest.mark.parametrize("workers", ("1", "2"))
def test_a_log_that_nobody_reads_does_not_keep_the_gateway_from_its_end(workers):
    with log_in_a_pipe(workers) as (process, port, _):
        for _ in range(40):
            assert ask(port, "GET", "/" + "x" * 999).status == 404
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0


@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="only Linux tells a pipe its size")
def test_a_log_that_nobody_reads_holds_up_no_connection_before_a_thousand_lines_wait():
    with log_in_a_pipe("1") as (process, port, log), Client(port) as client, (
            concurrent.futures.ThreadPoolExecutor(1)) as pool:
        for _ in range(200):
            assert client.send(request("GET", "/" + "x" * 999)).reply().status == 404
            time.sleep(0.002)  # so that lines are due
        lines = pool.submit(log.read)  # to its end
        client.socket.close()
        process.send_signal(signal.SIGTERM)
        assert lines.result().count(" GET /xxx") == 200 and process.wait(SECONDS) == 0


@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="only Linux tells a pipe its size")
def test_a_log_that_is_full_from_the_start_does_not_keep_the_gateway_from_serving():
    reader, writer = os.pipe()
    os.write(writer, b"x" * fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ))
    clean = {"PATH": os.environ["PATH"], "PORT": str(port := free_port())}
    with subprocess.Popen([sys.executable, str(HERE / "gateway.py")], stderr=writer, env=clean,
                          stdin=subprocess.DEVNULL) as process:
        os.close(writer)
        def status():
            with contextlib.suppress(ConnectionRefusedError):
                return ask(port, "GET", "/healthz").status
        try:
            assert eventually(status) == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()
            os.close(reader)


def test_where_no_thread_can_be_started_one_line_says_so():
    code = """if True:
        import runpy, sys, threading
        def start(thread):
            raise RuntimeError("can't start new thread")
        threading.Thread.start = start
        sys.argv.pop(0)
        runpy.run_path(sys.argv[0], run_name="__main__")"""
    with Process("--port=0", python=(sys.executable, "-c", code)) as process:
        assert process.wait() == 1 and "starts no thread" in process.lines[-1]
        assert len(process.lines) == 2  # the first one says where it listens


@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="only Linux tells a pipe its size")
def test_no_line_is_lost_in_a_pipe_that_does_not_block():
    with log_in_a_pipe("1", blocking=False) as (process, port, log):
        with Client(port) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
            client.send(b"".join(request("GET", f"/{number}-{'x' * 999}") for number in range(99)))
            def is_full():
                size = fcntl.ioctl(log, termios.FIONREAD, bytes(4))
                return int.from_bytes(size, sys.byteorder) > 3_000
            eventually(is_full)
            lines = pool.submit(log.read)  # to its end
            assert [client.reply().status for _ in range(99)] == [404] * 99
            process.send_signal(signal.SIGTERM)
            told = re.findall(r" GET /(\d+)-x", lines.result())
        assert told == [str(number) for number in range(99)]


def test_usage_is_that_of_the_last_usage_object_however_it_comes():
    """What it does not tell, the first one does."""
    anthropic = [{"type": "message_start", "message": {"usage": {"input_tokens": 25}}},
                 {"type": "message_delta", "usage": {"output_tokens": 15}}]
    tool = {"tool": {"input_tokens": 99}}
    twice = [anthropic[0], anthropic[1] | {"context": {"output_tokens": 99}}]
    for events, counted in ((anthropic, (25, 15)), (twice, (25, 15)), ([USED | tool], (7, 5)),
                            ([USED, tool], (7, 5))):
        data = events_of(*events, b"[DONE]")
        whole = b"".join(data)
        for answer in (STREAM_HEAD + chunked(*data), STREAM_HEAD + chunked(whole), response(whole)):
            with forward(answers(answer)) as (port, _), Meter(port) as meter:
                assert ask(port, "POST", "/v1/messages", STREAM).status == 200
                meter.expect(tokens_of(counted), "token_usage")


def test_a_client_that_leaves_just_before_an_earlier_answer_is_taken_up_again_is_gone():
    def busy(played, number):
        played.request()
        played.send(b"HTTP/1.1 503 Busy\r\nContent-Length: 99\r\n\r\n")
        played.wait_for_end()
    with PlayedBackend(busy) as first, PlayedBackend(lambda played, _: played.request()) as (
            second), serve(backend_url=f"{first.url},{second.url}") as server, (
            Client(server.port)) as client:
        failed, cancel = server.backends.failed, server.backends.pool.cancel
        noticed = threading.Event()
        def fail(backend, *how, **more):
            failed(backend, *how, **more)
            if backend.url == second.url:
                client.socket.close()
                assert noticed.wait(SECONDS)
        server.backends.failed = fail
        server.backends.pool.cancel = lambda request: (cancel(request), noticed.set())
        client.send(request("POST", CHATS, CHAT))
        eventually(lambda: first.ended and not server.connections)


@pytest.mark.parametrize("wrong", (
    "http://user:s3cret@[::1", "http://user:s3/cret@127.0.0.1:3128", "http://user:s3@a b:3128",
    "http://127.0.0.1:99999", "http://user:s3@:3128", "http://"))
def test_a_wrong_proxy_is_one_line_that_names_it_and_no_part_of_its_password(
        proxies, capsys, wrong):
    proxies(http_proxy=wrong)
    gateway.read_settings(["--backend-url=http://127.0.0.1:1"], {})  # which no proxy is asked for
    with pytest.raises(SystemExit) as exit:
        gateway.read_settings(["--backend-url=http://backend.test"], {})
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert "HTTP_PROXY" in error and error.count("\n") == 1 and "s3" not in error


@pytest.mark.parametrize("behind", (b"", b"\r\n", b"GET"))
@pytest.mark.parametrize("version", ("1.0", "1.1"))
def test_a_reply_that_ends_its_connection_arrives_whole_whatever_is_behind_the_request(
        version, behind):
    """To close with a byte unread would send RST, and destroy what the client has not yet read."""
    body, go = b"x" * 600_000, threading.Semaphore(0)
    with PlayedBackend(stepwise(go, response(body))) as backend, serve(
            backend_url=backend.url) as server, Client(server.port) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
        client.send(request("POST", CHATS, CHAT, "Connection: close", version=version))
        eventually(lambda: backend.requests)
        client.send(behind)
        go.release()
        client.until(b"\r\n\r\n")
        with contextlib.suppress(AssertionError):  # it is to wait for us: that it does not is RST
            eventually(lambda: not server.connections, 0.5)
        while len(client.buffer) < len(body) and client.more():
            pass
        assert client.buffer == body


def test_head_may_tell_of_a_coding_that_no_get_may_have():
    heads = [b"HTTP/1.1 200 OK\r\n%b\r\n\r\n" % lines for lines in (
        b"Transfer-Encoding: gzip, chunked", b"Content-Length: x",
        b"Transfer-Encoding: chunked\r\nContent-Length: 9")]
    with forward(by_case(heads)) as (port, backend), Client(port) as client:
        for case in range(3):
            assert client.send(request("HEAD", f"{FILES}?{case}")).reply("HEAD").status == 200
        assert backend.connections == 3  # a body may follow all the same


def test_a_model_is_found_behind_white_space_and_a_form_behind_an_empty_line():
    form = b'\r\n--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nb\r\n--b--\r\n'
    with several(plays(listed=models("a")), plays(listed=models("b")),
                 probe_interval=600) as (port, *backends):
        for body in (b' \r\n{"model": "b"}', form) * 2:
            assert ask(port, "POST", "/v1/embeddings", body).status == 200
        assert counts(backends) == [0, 4]


def test_a_probe_that_takes_for_ever_is_ended_and_probed_again():
    def script(played, number):
        played.request()
        with contextlib.suppress(ConnectionError):
            for byte in b"HTTP/1.1 200 OK\r\nA: " + b"a" * 10_000:
                played.send(bytes([byte]))
                if played.backend.listener.fileno() < 0 or select.select(
                        [played.socket], [], [], 0.05)[0]:
                    return
    with several(script, settle=False, probe_interval=0.1, connect_timeout=0.3) as (port, backend):
        eventually(lambda: backend.connections >= 3)
