"""An OpenAI-compatible backend that answers "Mock" to whatever it is asked, and records it.

It has POST /v1/chat/completions, /v1/completions (both with "stream": true too), /v1/embeddings,
GET /v1/models, /v1/models/NAME and /healthz. A completion's id is the received X-Request-ID.
GET /mock/requests lists the last 100 requests to /v1 as JSON: method, path, headers, body,
connection (the client's port), outcome (pending, answered, client_gone or misbehaved).

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
import base64
import collections
import json
import os
import re
import signal
import socket
import socketserver
import struct
import sys
import time
import urllib.parse
import uuid
from http.server import BaseHTTPRequestHandler

# What an item of X-Mock may be. No status 1xx: clients would wait for the one after it.
WAYS = re.compile(r"(delay|interval)=[0-9]{1,4}(\.[0-9]+)?|status=[2-5][0-9][0-9]|"
                  r"tokens=[1-9][0-9]{0,4}|cut|silent|garbage|close")


def misbehaviour(text):
    """{"delay": "1.5", "cut": ""} for "delay=1.5, cut"; ArgumentTypeError if it is none of WAYS."""
    how = {}
    for item in filter(None, map(str.strip, text.split(","))):
        if not WAYS.fullmatch(item):
            raise argparse.ArgumentTypeError(
                f"{item!r} is not one of delay=S, status=N, tokens=N, interval=S, cut, silent,"
                " garbage and close, or its number is out of range")
        word, _, value = item.partition("=")
        how[word] = value
    return how


def reply_to(method, path, body, request_id, models, tokens):
    """(status, value) of the reply; encode() says what a value may be."""
    try:
        asked = dict(json.loads(body))
    except (TypeError, ValueError, RecursionError):
        asked = {}  # no JSON object: that gets its "Mock" too
    model = asked["model"] if isinstance(asked.get("model"), str) else models[0]
    cards = {f"/v1/models/{name}": {"id": name, "object": "model", "created": 0, "owned_by": "mock"}
             for name in models}
    match "GET" if method == "HEAD" else method, path:
        case "GET", "/healthz":
            return 200, {"status": "ok"}
        case "GET", "/v1/models":
            return 200, {"object": "list", "data": [*cards.values()]}
        case "GET", _ if path in cards:
            return 200, cards[path]
        case "POST", "/v1/chat/completions" | "/v1/completions":
            return 200, completion("chat" in path, asked, request_id, model, tokens)
        case "POST", "/v1/embeddings":
            count = len(asked["input"]) if isinstance(asked.get("input"), list) else 1
            vector = {"object": "embedding", "embedding": [0.5, 0.0, 0.25]}
            if asked.get("encoding_format") == "base64":  # the SDKs ask for it unasked
                vector["embedding"] = base64.b64encode(struct.pack("<3f", 0.5, 0.0, 0.25)).decode()
            return 200, {"object": "list", "data": [{**vector, "index": n} for n in range(count)],
                         "model": model, "usage": {"prompt_tokens": count, "total_tokens": count}}
    return 404, f"The mock backend has no {method} {path}"


def completion(chat, asked, request_id, model, tokens):
    """A chat (else a text) completion of so many tokens: a dict, or a tuple of chunks."""
    streamed, options = asked.get("stream") is True, asked.get("stream_options")
    kind = "chat.completion" + ".chunk" * streamed if chat else "text_completion"
    same = {"id": request_id, "object": kind, "created": int(time.time()), "model": model}
    usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 1 + tokens}

    def say(text, finish_reason=None, **role):
        part = {"delta" if streamed else "message": {**role, "content": text}}
        choice = {"index": 0, **(part if chat else {"text": text}), "logprobs": None,
                  "finish_reason": finish_reason}
        return {**same, "choices": [choice]}

    texts = ["Mock"] + [" Mock"] * (tokens - 1)
    if not streamed:
        return {**say("".join(texts), "stop", role="assistant"), "usage": usage}
    chunks = [say("", role="assistant"), *map(say, texts), say("", "stop")]
    if isinstance(options, dict) and options.get("include_usage") is True:
        chunks = [{**chunk, "usage": None} for chunk in chunks]
        chunks.append({**same, "choices": [], "usage": usage})
    return tuple(chunks)


def encode(status, value):
    """(fields, pieces) of a body: a tuple's events, a text as an error, all else as JSON."""
    if status in (204, 304):
        return {}, [b""]  # RFC 9112, 6.3: these have none
    if isinstance(value, tuple):
        events = [f"data: {data}\n\n".encode() for data in (*map(json.dumps, value), "[DONE]")]
        pieces = [b"%x\r\n%b\r\n" % (len(event), event) for event in events]
        pieces[-1] += b"0\r\n\r\n"
        return {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"}, pieces
    if isinstance(value, str):
        kind = "server_error" if status >= 500 else (
            "rate_limit_error" if status == 429 else "invalid_request_error")
        value = {"error": {"message": value, "type": kind, "param": None, "code": "mock"}}
    body = json.dumps(value).encode()
    return {"Content-Type": "application/json", "Content-Length": len(body)}, [body]


class Handler(BaseHTTPRequestHandler):
    """One connection: reads a request, records it, answers or misbehaves, and again."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each event would wait for the client's ACK of the last
    wbufsize = 65_536  # a head and the first piece of its body are one write

    def dispatch(self):
        """Answer one request, or note in its record that the client would not wait."""
        self.record = {"method": self.command, "path": self.path, "headers": self.headers.items(),
                       "body": "", "connection": self.client_address[1], "outcome": "pending"}
        self.request_id = self.headers.get("X-Request-ID") or str(uuid.uuid4())
        try:
            self.answer()
        except OSError:
            self.close_connection = True
            self.record["outcome"] = "client_gone"
        self.log_message("%s %s %s", self.requestline, self.record["outcome"], self.request_id)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = dispatch

    def answer(self):
        """Misbehave as the request asks, else as the command line does; or reply."""
        path, how = urllib.parse.unquote(self.path.partition("?")[0]), {}
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "Transfer-Encoding" in self.headers:  # chunks are not read, nor taken for a request
            self.close_connection = True
        if path == "/mock/requests":
            return self.write(200, list(self.server.records))
        if path.startswith("/v1/"):  # no health check pushes a record out
            self.record["body"] = body.decode("latin-1")
            self.server.records.append(self.record)
            wishes = self.headers.get_all("X-Mock")
            try:
                how = misbehaviour(",".join(wishes)) if wishes else self.server.misbehaviour
            except argparse.ArgumentTypeError as problem:
                return self.write(400, str(problem))
        if "delay" in how:
            self.pause(float(how["delay"]))
        if "silent" in how:
            self.rfile.read()  # returns when the client has gone
            raise ConnectionAbortedError("the client went away")
        if "close" in how or "garbage" in how:
            self.close_connection = True
            self.record["outcome"] = "misbehaved"
            return self.wfile.write(b"\x16\x03\x01 no HTTP\r\n\r\n" if "garbage" in how else b"")
        if "status" in how:
            return self.write(int(how["status"]), "The mock was asked for this", how)
        self.write(*reply_to(self.command, path, body, self.request_id, self.server.models,
                             int(how.get("tokens", 1))), how)

    def write(self, status, value, how={}):
        """Send the head, then the body piece by piece."""
        fields, pieces = encode(status, value)
        if self.command == "HEAD":
            pieces = [b""]
        self.send_response(status)
        for name, field in fields.items():
            self.send_header(name, field)
        self.send_header("X-Request-ID", self.request_id)
        if status in (429, 503):
            self.send_header("Retry-After", "1")
        if "cut" in how:
            self.send_header("Connection", "close")  # and then http.server does close
            middle = len(pieces) // 2
            pieces[middle:] = [pieces[middle][:len(pieces[middle]) // 2]]
        self.end_headers()
        for number, piece in enumerate(pieces, 1):
            if "interval" in how and 2 < number <= 1 + int(how.get("tokens", 1)):
                self.pause(float(how["interval"]))
            if number == len(pieces):  # before the write: who has the reply finds it recorded
                self.record["outcome"] = "misbehaved" if "cut" in how else "answered"
            self.wfile.write(piece)
            self.wfile.flush()

    def log_request(self, *_):
        """Log nothing yet: how the request came out is not known."""

    def pause(self, seconds):
        """Return after so many seconds; ConnectionError as soon as the client is gone."""
        self.connection.settimeout(seconds)
        try:
            if not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionAbortedError("the client went away")
            time.sleep(seconds)  # its next request is there already: its leaving is not seen
        except (BlockingIOError, TimeoutError):
            pass
        finally:
            self.connection.settimeout(None)


class Server(socketserver.ThreadingTCPServer):
    """Not an HTTPServer: that looks its host's name up, which takes 35 s where DNS is bad."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = 1024  # with the stock 5, clients that come together wait for a second
    records = collections.deque(maxlen=100)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # a client's reset is no news
            super().handle_error(request, client_address)


def main():
    """Serve until SIGINT or SIGTERM, then exit with 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, kind, default, what in (
            ("port", int, "8081", "where to listen; 0: a free port"),
            ("host", str, "127.0.0.1", "the address to listen on"),
            ("model", str, "mock", "the models that it lists, separated by commas"),
            ("misbehave", misbehaviour, "", "what X-Mock says where a request has none")):
        variable = f"MOCK_{flag.upper()}"
        # A default that is a string goes through the same parser as the flag's value.
        parser.add_argument(f"--{flag}", type=kind, default=os.environ.get(variable) or default,
                            help=f"{what} ({variable}; default: {default or 'nothing'})")
    asked = parser.parse_args()
    try:
        server = Server((asked.host, asked.port), Handler)
    except (OSError, OverflowError) as problem:
        sys.exit(f"{parser.prog}: cannot listen on {asked.host}:{asked.port}: {problem};"
                 " set MOCK_PORT")
    server.models = [name.strip() for name in asked.model.split(",")]
    server.misbehaviour = asked.misbehave
    for number in (signal.SIGINT, signal.SIGTERM):  # shells start jobs with SIGINT ignored
        # No ordinary exit: that aborts where a thread is just writing its log line.
        signal.signal(number, lambda *_: os._exit(0))
    print(f"mock backend on http://{asked.host}:{server.server_address[1]} "
          f"(models: {asked.model}); Ctrl-C stops", file=sys.stderr, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
