#!/usr/bin/env bash
# The whole check, with no step before it: three end-to-end tests against real processes on free
# ports, then the pytest suite (arguments go to pytest). Exit status 0: all that ran is right.
set -u
case ${PYTHON-} in /*) ;; */*) PYTHON=$PWD/$PYTHON ;; esac
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" || exit 1
unset PYTHONPATH PYTHONHOME
work=$(mktemp -d) || exit 1
failed=0 servers='' running='' parts='' # servers: of the test at hand; running: what is waited for

# What is tested gets nothing of the user's environment that could change an answer: no PORT, no
# BACKEND_URL, no HTTP_PROXY. (LD_LIBRARY_PATH: some CI images' Pythons do not start without it.)
clean=(env -i PATH="$PATH" HOME="${HOME:-/}" ${TMPDIR:+"TMPDIR=$TMPDIR"} ${CI:+"CI=$CI"}
    ${LD_LIBRARY_PATH:+"LD_LIBRARY_PATH=$LD_LIBRARY_PATH"}
    ${PYTEST_ADDOPTS:+"PYTEST_ADDOPTS=$PYTEST_ADDOPTS"})

# ---- Processes: however this script ends, nothing that it started stays behind ------------------

stop() { # stop SIGNAL PID...: ends them, by force after five seconds
    [ $# -gt 1 ] && kill "-$1" "${@:2}" 2>/dev/null || return 0
    for _ in {1..100}; do kill -0 "${@:2}" 2>/dev/null || return 0; sleep 0.05; done
    kill -KILL "${@:2}" 2>/dev/null
}

finish() {
    trap '' INT TERM HUP
    stop INT $running # not TERM: pytest must have the time to end its own processes
    stop TERM $servers
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 129' HUP; trap 'exit 130' INT; trap 'exit 143' TERM

run() { # run COMMAND...: its status. In the background, because traps wait for the foreground;
    set -m # with job control, because without it bash lets the command ignore SIGINT
    "$@" </dev/null & running="$! $parts"
    set +m
    wait "$!"; set -- $?; running=$parts
    return "$1"
}

start() { # start NAME COMMAND...: a server in the background; its address goes to $url
    : >"$work/$1"
    "${clean[@]}" "${@:2}" >>"$work/$1" 2>&1 &
    servers+=" $!"
    for _ in {1..200}; do
        # The last [^0-9]: without it, the port could be the half of a line not yet written.
        [[ $(<"$work/$1") =~ (http://[^/[:space:]]+:[0-9]+)[^0-9] ]] &&
            url=${BASH_REMATCH[1]} && return
        kill -0 $! 2>/dev/null || break
        sleep 0.05
    done
    echo "$1 printed no address; its last line: $(tail -n 1 "$work/$1")"
    return 1
}

# ---- A Python of 3.13 or later ------------------------------------------------------------------

find_python() { # its absolute path goes to $python, its version to $version
    local candidate answer found='' program='import sys; version = sys.version_info[:2]
sys.stdout.write("%d.%d %s" % (version + (sys.executable,))); sys.exit(version < (3, 13))'
    set -- python3.13 python3.14 python3 python
    [ -z "${PYTHON-}" ] || set -- "$PYTHON"
    for candidate; do
        if ! command -v "$candidate" >/dev/null; then
            answer='not found'
        elif answer=$("$candidate" -c "$program" 2>"$work/said"); then
            version=${answer%% *} python=${answer#* } && return
        fi
        found+="; $candidate: ${answer:-$(head -n 1 "$work/said")}" # pyenv's shims can be hollow
    done
    echo "test.sh: Python 3.13 or later is needed (PYTHON=... names one). Found${found/;/:}" >&2
    return 1
}

# ---- The three tests ----------------------------------------------------------------------------

cat >"$work/client.py" <<'PYTHON'
import http.client, json, sys, uuid

CHAT, HELLO = "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello, world!"}]}
STREAM = {**HELLO, "stream": True}

def ask(method, path, body=None, headers={}, url=sys.argv[2]):
    """(status, text, the values of X-Request-ID) of one reply."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.request(method, path, body and json.dumps(body), headers)
    response = connection.getresponse()
    return response.status, response.read().decode(), response.headers.get_all("X-Request-ID", [])

def expect(what, expected, came):
    if came != expected:
        sys.exit(f"{what}: expected {expected!r}, got {came!r}")

def content(stream):
    """What the chunks of a whole stream say."""
    *events, last, rest = stream.split("\n\n")
    expect("end of the stream", ("data: [DONE]", ""), (last, rest))
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)

def echo_mode():
    status, text, _ = ask("POST", CHAT, HELLO)
    expect("status", 200, status)
    reply = json.loads(text)
    expect("object and model", ("chat.completion", "echo"), (reply["object"], reply["model"]))
    expect("content", "Echo: Hello, world!", reply["choices"][0]["message"]["content"])
    usage = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    expect("usage", usage, reply["usage"])
    expect("content of a stream", "Echo: Hello, world!", content(ask("POST", CHAT, STREAM)[1]))
    status, text, _ = ask("GET", "/healthz")
    expect("/healthz", (200, {"status": "ok"}), (status, json.loads(text)))

def request_ids():
    for headers in {"X-Request-ID": "a-1"}, {"Request-Id": "a-1"}:
        _, text, given = ask("POST", CHAT, HELLO, headers)
        expect(f"header and id for {headers}", (["a-1"], "a-1"), (given, json.loads(text)["id"]))
    expect("header of a 404", ["a-1"], ask("GET", "/no", headers={"X-Request-ID": "a-1"})[2])
    for headers in {}, {"X-Request-ID": "a b"}, {"X-Request-ID": "a" * 129}:
        _, text, given = ask("POST", CHAT, HELLO, headers)
        expect(f"header for {headers}", [json.loads(text)["id"]], given)
        expect("uuid4", str(uuid.UUID(given[0], version=4)), given[0])

def forwarding():
    status, text, given = ask("POST", CHAT, HELLO, {"X-Request-ID": "a-1"})
    expect("status and X-Request-ID", (200, ["a-1"]), (status, given))
    expect("content", "Mock", json.loads(text)["choices"][0]["message"]["content"])
    records = json.loads(ask("GET", "/mock/requests", url=sys.argv[3])[1])
    record = [record for record in records if record["method"] == "POST"][-1]
    ids = [value for name, value in record["headers"] if name.lower() == "x-request-id"]
    expect("X-Request-ID at the backend", ["a-1"], ids)
    expect("content of a stream", "Mock", content(ask("POST", CHAT, STREAM)[1]))
    models = json.loads(ask("GET", "/v1/models")[1])["data"]
    expect("models", ["mock"], [model["id"] for model in models])

globals()[sys.argv[1]]()
PYTHON

curl_finds() { # curl_finds TEXT OPTION...: asks as a newcomer does, where there is curl
    local reply body='{"messages": [{"role": "user", "content": "Hello, world!"}]}'
    command -v curl >/dev/null || return 0
    reply=$("${clean[@]}" curl -q -sSi -m 10 -d "$body" "${@:2}" "$url/v1/chat/completions" 2>&1)
    grep -qiF -- "$1" <<<"$reply" && return
    echo "curl: expected $1, got ${reply//$'\r\n'/ }"
    return 1
}

try() { # try NUMBER NAME TEXT OPTION...: one line; curl, with OPTIONs, must find TEXT
    local test=${2// /_} mock=''
    {
        if [ "$test" = forwarding ]; then
            start mock_backend.py MOCK_PORT=0 "$python" -B mock_backend.py && mock=$url
        fi && start gateway.py PORT=0 ${mock:+"BACKEND_URL=$mock"} "$python" -B gateway.py &&
            "${clean[@]}" "$python" -B "$work/client.py" "$test" "$url" "$mock" &&
            curl_finds "${@:3}"
    } >"$work/said" 2>&1 && echo "ok $1 $2" || {
        echo "FAILED $1 $2: $(tail -n 1 "$work/said")"
        failed=1
    }
    stop TERM $servers
    servers=''
}

find_python || exit 1
try 1 'echo mode' 'Echo: Hello, world!'
try 2 'request ids' 'X-Request-ID: a-1' -H 'X-Request-ID: a-1'
try 3 'forwarding' '"Mock"'

# ---- The suite ----------------------------------------------------------------------------------

has() { # has PYTHON MODULE: it is no older than the one found, and has the module
    "${clean[@]}" "$1" -B -c "import sys, $2
sys.exit(sys.version_info[:2] < (${version/./, }))" 2>/dev/null
}

find_pytest() { # a Python that has pytest goes to $tester; if need be, .venv is made
    tester=$python
    has "$tester" pytest && return
    tester=$PWD/.venv/bin/python
    has "$tester" pytest && return
    has "$tester" pip || run "$python" -m venv --clear .venv || { rm -rf .venv; return 1; }
    # In the user's own environment: it names proxies, certificates and package indexes.
    run "$tester" -m pip install --quiet --retries 1 --timeout 15 pytest
}

suite() { # suite PART ARGUMENT...: in the background. Six parts of it run at once, because the
    # tests wait for longer than they compute.
    exec "${clean[@]}" PART="$1" "$tester" -B -m pytest -p test_gateway $options "${@:2}"
}

if [ ! -f test_gateway.py ]; then
    problem='there is no test_gateway.py'
elif ! find_pytest >"$work/said" 2>&1; then
    problem=$(grep -m1 ensurepip "$work/said" || grep . "$work/said" | tail -n 1)
    problem="pytest is missing and cannot be installed: $problem"
else
    [ -w . ] && options='' || options='-p no:cacheprovider'
    if [ $# -gt 0 ]; then
        run suite 0/1 "$@" || failed=1
        exit $failed
    fi
    set -m
    for part in 1 2 3 4 5; do
        suite "$part/6" >"$work/part$part" 2>&1 </dev/null & parts+=" $!"
    done
    set +m
    run suite 0/6 || failed=1
    for part in $parts; do wait "$part" || failed=1; done
    cat "$work"/part?
    [ $failed = 0 ] && echo "ok 4 the suite" || echo "FAILED: the suite; see FAILED or ERROR above"
    exit $failed
fi
echo "pytest suite not run: $problem"
[ "${CI-}" != true ] || failed=1
exit $failed
