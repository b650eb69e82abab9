"""The server where memory is short: it says so, answers what it can, and all again once there is memory."""

import json
import os
import resource
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path

import pytest

from tests.serve.conftest import TOKEN, until

PORT = 8974
SHORT = {"prompt": "Tell me about tea", "answer": "tea is from Japan", "k": 4}
LONG = SHORT | {"prompt": "Tell me about tea " * 24}
"""Its gradient takes some 40 MiB more than that of a short question."""

pytestmark = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")


@pytest.fixture
def server(served_index):
    command = [sys.executable, "-m", "rapidindex", "serve", str(served_index), "--port", str(PORT), "--token", TOKEN]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as child:
        try:
            assert "Open" in child.stderr.readline()
            until(lambda: json.loads(ask("state"))["loaded"])
            yield child
        finally:
            child.kill()


def ask(name, body=None):
    """The response to a request of the page's, as text."""
    headers = {"x-rapidindex-token": TOKEN, "content-type": "application/json", "host": f"localhost:{PORT}"}
    connection = HTTPConnection("127.0.0.1", PORT, timeout=50)
    connection.request("GET" if body is None else "POST", f"/api/{name}", body and json.dumps(body), headers)
    try:
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def last(name, body):
    return json.loads(ask(name, body).splitlines()[-1])


def limit(child, more):
    """Let the server have so many more bytes of memory than now; None for any number."""
    now = next(line for line in Path(f"/proc/{child.pid}/status").read_text().splitlines() if "VmData" in line)
    limit = resource.RLIM_INFINITY if more is None else int(now.split()[1]) * 1024 + more
    resource.prlimit(child.pid, resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


@pytest.mark.slow  # how much the heap has left is not the same on every machine
def test_too_little_memory_is_said_and_the_server_goes_on(server):
    assert last("ask", SHORT)["kind"] == "done"
    limit(server, 20 * 2**20)
    assert "Memory does not suffice" in last("ask", LONG)["message"]
    assert json.loads(ask("state"))["loaded"] and last("words", SHORT)["kind"] == "words"
    assert last("answer", {"prompt": SHORT["prompt"]})["kind"] == "words"
    limit(server, None)
    assert last("ask", LONG)["kind"] == "done"
