"""An OpenAI-compatible backend that answers "Mock" to whatever it is asked, and records it.

It has POST /v1/chat/completions, /v1/completions (both with "stream": true too), /v1/embeddings,
GET /v1/models, /v1/models/NAME and /healthz. A completion's id is the received X-Request-ID.
GET /mock/requests lists the last 100 requests to /v1 as JSON: method, path, headers, body,
connection (a number), outcome (pending, answered, client_gone or misbehaved).

Asked by the header X-Mock, it misbehaves as real backends do, in one or several of these ways:

  delay=S     waits S seconds before it answers
  status=N    answers status N with an error body (429 and 503: with Retry-After: 1)
  tokens=N    says "Mock" N times
  interval=S  waits S seconds between two tokens of a stream
  cut         closes in the body: at half its length, or halfway a stream in mid-event
  silent      reads the request and never answers
  garbage     answers bytes that are not HTTP, and closes
  close       closes without a byte

  curl -N http://127.0.0.1:8081/v1/chat/completions \\
    -H 'X-Mock: tokens=20, interval=0.1, cut' -d '{"stream": true}'

--misbehave does the same to all requests to /v1 that have no X-Mock (it may be empty).
"""

import argparse
import collections
import itertools
import json
import os
import re
import signal
import socket
import socketserver
import sys
import time
import urllib.parse
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# What each word of X-Mock takes: (type, lowest value, highest value), or None for no value.
MISBEHAVIOURS = {
    "delay": (float, 0, 3600), "status": (int, 200, 599), "tokens": (int, 1, 100_000),
    "interval": (float, 0, 3600), "cut": None, "silent": None, "garbage": None, "close": None}
GARBAGE = b"\x16\x03\x01\x00\xff these bytes are not HTTP\r\n\r\n\x00\xfe"


class Refused(argparse.ArgumentTypeError):
    """Why a setting (exit status 2) or a request (400) is refused; argparse shows no other text."""


# ---- What is answered: functions of values, no socket -------------------------------------------


def parse_misbehaviour(text):
    """{"delay": 1.5, "cut": True} for "delay=1.5, cut"; Refused where the table has no such."""
    how = {}
    for item in filter(None, map(str.strip, text.split(","))):
        word, equals, value = item.partition("=")
        if word not in MISBEHAVIOURS:
            raise Refused(f"misbehaviour {word!r} is unknown; known: {', '.join(MISBEHAVIOURS)}")
        kind, low, high = MISBEHAVIOURS[word] or (lambda _: not equals, True, True)
        try:
            how[word] = kind(value)
        except ValueError:
            how[word] = -1
        if not low <= how[word] <= high:
            raise Refused(f"misbehaviour {word!r} cannot be {value!r}; it takes " + (
                f"{low} to {high}" if MISBEHAVIOURS[word] else "no value"))
    return how


def error(status, message, code, param=None):
    """(status, OpenAI's error body)."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def count_words(prompt):
    """Whitespace-separated words of a text, a message, a content part, or a list of them."""
    if isinstance(prompt, dict):
        prompt = prompt.get("content", prompt.get("text"))
    if isinstance(prompt, list):
        return sum(map(count_words, prompt))
    return len(prompt.split()) if isinstance(prompt, str) else 0


def reply_to(method, path, body, request_id, models, tokens):
    """(status, value): a tuple of dicts is to be sent as events, all else as JSON."""
    try:
        asked = json.loads(body)
        words = count_words(asked.get("messages", asked.get("prompt", asked.get("input"))))
    except (AttributeError, ValueError, RecursionError):
        asked, words = {}, 0  # no JSON object: that gets its "Mock" too
    model = asked["model"] if isinstance(asked.get("model"), str) else models[0]
    cards = [{"id": name, "object": "model", "created": 0, "owned_by": "mock"} for name in models]
    match "GET" if method == "HEAD" else method, path:
        case "GET", "/healthz":
            return 200, {"status": "ok"}
        case "GET", "/v1/models":
            return 200, {"object": "list", "data": cards}
        case "GET", _ if path.startswith("/v1/models/"):
            name = urllib.parse.unquote(path.removeprefix("/v1/models/"))
            if name in models:
                return 200, cards[models.index(name)]
            return error(404, f"The model {name!r} does not exist", "model_not_found", "model")
        case "POST", "/v1/chat/completions" | "/v1/completions":
            chat = path == "/v1/chat/completions"
            return 200, completion(chat, asked, request_id, model, words, tokens)
        case "POST", "/v1/embeddings":
            inputs = asked["input"] if isinstance(asked.get("input"), list) else [None]
            vectors = [{"object": "embedding", "index": index, "embedding": [0.6, 0.0, 0.8]}
                       for index in range(len(inputs))]
            usage = {"prompt_tokens": words, "total_tokens": words}
            return 200, {"object": "list", "data": vectors, "model": model, "usage": usage}
    return error(404, f"The mock backend has no {method} {path}", "unknown_url")


def completion(chat, asked, request_id, model, words, tokens):
    """A chat (else a text) completion of so many tokens: a dict, or a tuple of chunks."""
    streamed = asked.get("stream") is True
    kind = "chat.completion" + ".chunk" * streamed if chat else "text_completion"
    same = {"id": request_id, "object": kind, "created": int(time.time()), "model": model}
    usage = {"prompt_tokens": words, "completion_tokens": tokens, "total_tokens": words + tokens}

    def say(part, finish_reason=None):
        choice = {"index": 0, **part, "logprobs": None, "finish_reason": finish_reason}
        return {**same, "choices": [choice]}

    texts = ["Mock"] + [" Mock"] * (tokens - 1)
    if not streamed:
        text = "".join(texts)
        part = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return {**say(part, "stop"), "usage": usage}
    first, last = ({"role": "assistant", "content": ""}, {}) if chat else ("", "")
    name = "delta" if chat else "text"
    parts = [first, *({"content": text} if chat else text for text in texts)]
    chunks = [say({name: part}) for part in parts] + [say({name: last}, "stop")]
    options = asked.get("stream_options")
    if isinstance(options, dict) and options.get("include_usage") is True:
        chunks = [{**chunk, "usage": None} for chunk in chunks]
        chunks.append({**same, "choices": [], "usage": usage})
    return tuple(chunks)


def encode(value):
    """(fields, pieces) of a body: JSON is one piece; of a stream, each event is one."""
    if not isinstance(value, tuple):
        body = json.dumps(value).encode()
        return {"Content-Type": "application/json", "Content-Length": len(body)}, [body]
    events = [f"data: {data}\n\n".encode() for data in (*map(json.dumps, value), "[DONE]")]
    pieces = [b"%x\r\n%b\r\n" % (len(event), event) for event in events]
    pieces[-1] += b"0\r\n\r\n"
    return {"Content-Type": "text/event-stream", "Cache-Control": "no-cache",
            "Transfer-Encoding": "chunked"}, pieces


# ---- How it is sent: one handler and one thread per connection ----------------------------------


class Handler(BaseHTTPRequestHandler):
    """One connection: reads a request, records it, answers or misbehaves, and again."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.connection_number = next(self.server.connection_numbers)

    def dispatch(self):
        """Answer one request, whatever happens: one record, one log line."""
        self.record = {"method": self.command, "path": self.path, "headers": self.headers.items(),
                       "body": "", "connection": self.connection_number, "outcome": "pending"}
        received = self.headers.get("X-Request-ID", "")
        # A folded value holds line ends: sent back, it would split the head of the reply.
        self.request_id = received if received and received.isprintable() else str(uuid.uuid4())
        self.status = "-"
        try:
            try:
                self.answer(self.receive())
            except Refused as refusal:
                self.close_connection = True
                self.write(*error(400, str(refusal), "bad_request"))
        except OSError:
            self.close_connection = True
            self.record["outcome"] = "client_gone"
        finally:
            self.log_message("%s %s %s %s %s", self.command, self.path, self.status,
                             self.record["outcome"], self.request_id)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = dispatch

    def receive(self):
        """The body. The request is recorded once that is read, or known to be broken."""
        try:
            body = self.read_body()
            self.record["body"] = body.decode("latin-1")
            return body
        finally:
            if self.path.startswith("/v1/"):  # no health check pushes a record out
                self.server.records.append(self.record)

    def read_body(self):
        if "Transfer-Encoding" not in self.headers:
            return self.read(self.headers.get("Content-Length", "0"), 10)
        chunks = [None]
        while chunks[-1] != b"":
            chunks.append(self.read(self.rfile.readline(65536).partition(b";")[0], 16))
            rest = self.rfile.readline(65536)
        while rest.strip():  # trailers
            rest = self.rfile.readline(65536)
        return b"".join(chunks[1:])

    def read(self, length, base):
        """As many bytes as the text says; Refused if absurd: BufferedReader allocates them."""
        try:
            count = int(length, base)
        except ValueError:
            count = -1
        if not 0 <= count < 2**30:
            raise Refused(f"{length!r} is no length of a body or a chunk")
        data = self.rfile.read(count)
        if len(data) < count:
            raise ConnectionAbortedError("the client went away within its body")
        return data

    def answer(self, body):
        """Misbehave as the request asks, else as the command line does; or reply."""
        path, how = self.path.partition("?")[0], {}
        if path == "/mock/requests":
            return self.write(200, list(self.server.records))
        if path.startswith("/v1/"):
            wishes = self.headers.get_all("X-Mock")
            how = parse_misbehaviour(",".join(wishes)) if wishes else self.server.misbehaviour
        self.pause(how.get("delay", 0))
        if "silent" in how:
            while self.request.recv(65536):
                pass  # only the end is of interest
            raise ConnectionAbortedError("the client went away")
        if "close" in how or "garbage" in how:
            self.close_connection = True
            self.record["outcome"] = "misbehaved"
            return self.request.sendall(b"" if "close" in how else GARBAGE)
        if "status" in how:
            return self.write(*error(how["status"], "The mock was asked for this", "mock"), how)
        self.write(*reply_to(self.command, path, body, self.request_id, self.server.models,
                             how.get("tokens", 1)), how)

    def write(self, status, value, how={}):
        """The head and the first piece go in one write, each further piece in its own."""
        fields, pieces = encode(value)
        if status in (204, 304):
            fields, pieces = {}, [b""]  # RFC 9112, 6.3: these have no body
        elif self.command == "HEAD":
            pieces = [b""]
        if "cut" in how:
            self.close_connection = True
            middle = len(pieces) // 2
            pieces[middle:] = [pieces[middle][:len(pieces[middle]) // 2]]
        if status in (429, 503):
            fields["Retry-After"] = 1
        fields = {"Date": self.date_time_string(), "Server": "mock-backend", **fields,
                  "X-Request-ID": self.request_id,
                  "Connection": "close" if self.close_connection else "keep-alive"}
        head = f"HTTP/1.1 {status} {self.responses.get(status, ('',))[0]}\r\n"
        head += "".join(f"{name}: {field}\r\n" for name, field in fields.items())
        pieces[0] = f"{head}\r\n".encode("latin-1") + pieces[0]
        self.status = status
        for number, piece in enumerate(pieces):
            if number > 0:  # a stream: its tokens are pieces 1, 2, 3 ...
                self.pause(how.get("interval", 0) if 1 < number <= how.get("tokens", 1) else 0)
            if number == len(pieces) - 1:  # before the write: who has the reply finds it recorded
                self.record["outcome"] = "misbehaved" if "cut" in how else "answered"
            self.request.sendall(piece)

    def pause(self, seconds):
        """Return after so many seconds; ConnectionError as soon as the client is gone.

        A client that closes only its sending side counts as gone: from here it looks the same.
        """
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.request.settimeout(left)
            try:
                if not self.request.recv(1, socket.MSG_PEEK):
                    raise ConnectionAbortedError("the client went away")
                time.sleep(min(left, 0.05))  # its next request is there already: recv returns
            except TimeoutError:
                pass
            finally:
                self.request.settimeout(None)


class Server(ThreadingHTTPServer):
    """Listens, counts connections, and keeps the records of the last 100 requests."""

    request_queue_size = 1024  # with the stock 5, clients that come together wait for a second
    connection_numbers = itertools.count(1)
    records = collections.deque(maxlen=100)

    def server_bind(self):
        """Bind without HTTPServer's look-up of the host's name: bad DNS makes it take 35 s."""
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request, client_address):
        """A client that resets its connection is no news; anything else is a fault of ours."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


# ---- The command line ---------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")  # one line, without the usage


def port(text):
    if re.fullmatch("[0-9]{1,5}", text) and int(text) <= 65535:
        return int(text)
    raise Refused(f"{text!r} is no port: 0 to 65535 (MOCK_PORT)")


def main():
    """Serve until SIGINT or SIGTERM, then exit with 0."""
    parser = Parser(prog="mock_backend.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, kind, default, what in (
            ("port", port, "8081", "where to listen; 0: a free port"),
            ("host", str, "127.0.0.1", "the address to listen on"),
            ("model", str, "mock", "the models that it lists, separated by commas"),
            ("misbehave", parse_misbehaviour, "", "what X-Mock says where a request has none")):
        variable = f"MOCK_{flag.upper()}"
        # A default that is a string goes through the same parser as the flag's value.
        parser.add_argument(f"--{flag}", type=kind, default=os.environ.get(variable) or default,
                            help=f"{what} ({variable}; default: {default or 'nothing'})")
    asked = parser.parse_args()
    models = [name.strip() for name in asked.model.split(",")]
    try:
        server = Server((asked.host, asked.port), Handler)
    except (OSError, UnicodeError) as problem:
        sys.exit(f"{parser.prog}: cannot listen on {asked.host}:{asked.port}: {problem}")
    server.models, server.misbehaviour = models, asked.misbehave
    try:
        for number in (signal.SIGINT, signal.SIGTERM):  # shells start jobs with SIGINT ignored
            signal.signal(number, signal.default_int_handler)
        print(f"mock backend on http://{asked.host}:{server.server_address[1]} "
              f"(models: {', '.join(models)}); Ctrl-C stops", file=sys.stderr, flush=True)
        server.serve_forever()
    except KeyboardInterrupt:
        os._exit(0)  # an ordinary exit aborts where a thread is just writing its log line


if __name__ == "__main__":
    main()
