"""A real server over a tiny index, some of whose training text is hostile."""

import json
import shutil
import socket
import threading
import time
from http.client import HTTPConnection

import pytest
import uvicorn

from rapidindex import Index
from rapidindex.caching.build import build
from rapidindex.caching.checkpoints import build_checkpoints
from rapidindex.config import GradientConfig, ModelConfig
from rapidindex.serve.app import make_app
from rapidindex.serve.desk import Desk
from tests import tiny
from tests.oracles import request as build_request
from tests.query.test_checkpoints import save_adapter
from tests.views.shown import HOSTILE

TOKEN = "a-token-for-the-tests"


class Server:
    def __init__(self, path, port=0):
        self.path = path
        listening = socket.create_server(("127.0.0.1", port))
        self.port = listening.getsockname()[1]
        self.url = f"http://localhost:{self.port}"
        self.desk = Desk(lambda: Index.open(path))
        self.guard = app = make_app(self.desk, token=TOKEN, host="127.0.0.1", port=self.port)
        self.server = uvicorn.Server(
            uvicorn.Config(app, log_level="error", lifespan="off", ws="none", timeout_graceful_shutdown=1)
        )
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]}, daemon=True)
        self.thread.start()
        self.desk.load()

    def ask(self, method, path, body=None, **changes):
        """(status, headers, text) of a request with the token; `changes` are headers, None to leave one out."""
        headers = {"x-rapidindex-token": TOKEN, "content-type": "application/json", "host": f"localhost:{self.port}"}
        headers |= {name.replace("_", "-"): value for name, value in changes.items()}
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        if data is not None:
            headers.setdefault("content-length", str(len(data)))
        for name, value in headers.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(data)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, dict(answer.getheaders()), text

    def pieces(self, path, body):
        return [json.loads(one) for one in self.ask("POST", f"/api/{path}", body)[2].splitlines()]

    def stop(self):
        self.server.should_exit = True
        self.thread.join(30)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    rows = [
        {"instruction": f"Tell me about {word}", "output": f"{word} is nice", "kind": "plain"} for word in tiny.WORDS
    ]
    rows += [{"instruction": "Say it", "output": HOSTILE, "kind": HOSTILE[:30]}]
    rows += [{"instruction": "Tell me about tea", "output": "tea is nice", "kind": "copy", "n": n} for n in range(2)]
    file = tmp_path_factory.mktemp("asked") / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="session")
def served_index(tmp_path_factory, data, llama_folders):
    path = tmp_path_factory.mktemp("served") / "index"
    build(build_request(data, path, llama_folders, gradient=GradientConfig(second_moment="none")))
    return path


@pytest.fixture(scope="session")
def two_checkpoints(tmp_path_factory, data, llama_folders):
    """An index of two checkpoints, `tuned` and `early`; read only."""
    base, adapter = llama_folders
    folder = tmp_path_factory.mktemp("two")
    adapters = [shutil.copytree(adapter, folder / "tuned"), save_adapter(base, folder / "tuned" / "early", 5)]
    request = build_request(data, folder / "index", llama_folders, gradient=GradientConfig(second_moment="none"))
    build_checkpoints(request, [ModelConfig(str(base), str(one)) for one in adapters])
    return folder / "index"


@pytest.fixture(scope="session")
def server(served_index):
    started = Server(served_index)
    yield started
    started.stop()


def until(condition, seconds=60):
    """Wait for a condition."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.05)
