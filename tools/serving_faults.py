"""What a server did wrong before it had an API of its own, measured again: a table.

python -m tools.serving_faults
"""

import contextlib
import http.client
import json
import os
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from signal import SIGKILL

import psutil

from benchmarks.tiny_dit import make_dit_pipeline
from onelora_diffusion.serving.settings import TOKENS
from tools.soak_serving import GENERATE, HEADERS, ServedAdapters, Server, metrics_in

CLIENTS = ("admin", "ann", "bob")
BEARER = {name: f"the-token-of-{name}-here" for name in CLIENTS}
PICTURES = "/v1/pictures"
SLOW = {"subject": 1, "num_inference_steps": 50}


def main() -> None:
    os.environ[TOKENS] = " ".join(f"{name}:{token}" for name, token in BEARER.items())
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        make_dit_pipeline().save_pretrained(folder / "base")
        files = ServedAdapters(folder)
        loop = folder / "adapters/loop.safetensors"
        loop.symlink_to(loop)
        server = Server(folder, 10**8, places=600)
        server.start()
        stack.callback(server.end, SIGKILL)
        print("| what | today |\n|---|---|")
        for said, measure in FAULTS.items():
            print(f"| {said} | {measure(server, files)} |", flush=True)
        assert server.process.poll() is None


@contextlib.contextmanager
def asking(server: Server, path: str, body=None, client: str = "ann", method: str = "POST", **headers):
    """A connection that has sent a request, whose answer is not read yet; it hangs up at the end."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = HEADERS | {"Authorization": f"Bearer {BEARER[client]}"} | headers
    try:
        connection.request(method, path, content, headers)
    except (BrokenPipeError, ConnectionResetError):
        pass  # it was answered before it was sent
    yield connection
    connection.close()


def status(server: Server, path: str, body=None, **how) -> int:
    with asking(server, path, body, **how) as connection:
        answer = connection.getresponse()
        answer.read()
        return answer.status


def state(server: Server) -> dict:
    with asking(server, "/metrics", method="GET") as connection:
        return metrics_in(connection.getresponse().read().decode())


def wait_until(holds) -> float:
    """Seconds until a condition holds."""
    began = time.monotonic()
    while not holds():
        time.sleep(0.005)
    return time.monotonic() - began


@contextlib.contextmanager
def queued(server: Server, pictures: int, client: str = "ann"):
    """So many pictures of one client wait or are drawn; they are given up at the end."""
    with contextlib.ExitStack() as stack:
        for first in range(0, pictures, 50):
            body = {"pictures": [SLOW] * min(50, pictures - first)}
            stack.enter_context(asking(server, PICTURES, body, client))
        wait_until(lambda: state(server)["queue_length"] + state(server)["drawing"] == pictures)
        yield
    wait_until(lambda: not state(server)["drawing"])


def seconds_of(call) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def reach(server: Server, files) -> str:
    with queued(server, 160):
        found = state(server)
        return f"{found['queue_length'] + found['drawing']:.0f}"


def health(server: Server, files) -> str:
    with queued(server, 160):
        slowest = max(seconds_of(lambda: status(server, "/healthz", method="GET")) for _ in range(50))
        page = seconds_of(lambda: [status(server, path, method="GET") for path in ("/", "/page.js", "/v1/models")])
        return f"{1e3 * slowest:.0f} ms at most of 50 times; the page and its list of models {1e3 * page:.0f} ms"


def hang_up(server: Server, files) -> str:
    with asking(server, PICTURES, {"pictures": [SLOW | {"num_inference_steps": 250}] * 8}):
        wait_until(lambda: state(server)["drawing"] == 8)
    return f"all of eight are given up after {wait_until(lambda: not state(server)['drawing']):.2f} s"


def fair(server: Server, files) -> str:
    def one():
        assert status(server, GENERATE, {"prompt": 3, "steps": 50}, client="bob") == 200

    alone = min(seconds_of(one) for _ in range(3))
    with queued(server, 500):
        waits = [seconds_of(one) for _ in range(3)]
    return f"{sorted(waits)[1]:.1f} s; alone {alone:.1f} s"


def statuses(server: Server, files) -> str:
    bad, unknown = ({"prompt": 1} | more for more in ({"seed": -1}, {"model": "nobody"}))
    found = [status(server, GENERATE, body) for body in (bad, unknown)]
    with queued(server, 580):
        found.append(status(server, GENERATE, {"prompt": 1, "n": 64}))
    return f"{found[0]} for a wrong value, {found[1]} for an unknown adapter, {found[2]} for a full queue"


def replaced(server: Server, files) -> str:
    ended, drawn = threading.Event(), []
    sources = files.paths[1], server.folder / "other.safetensors"

    def draw() -> None:
        while not ended.is_set():
            drawn.append(status(server, GENERATE, {"prompt": 1, "steps": 1, "model": files.names[0]}))

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(300):
        subprocess.run(["cp", sources[number % 2], files.paths[0]], check=True)
    ended.set()
    for thread in threads:
        thread.join()
    assert set(drawn) <= {200, 400}, set(drawn)
    caught = drawn.count(400)
    return f"300 times while it drew {drawn.count(200):,} pictures: {caught} requests that read a part of it got 400"


def links(server: Server, files) -> str:
    with asking(server, "/v1/models", method="GET") as connection:
        (found,) = json.loads(connection.getresponse().read())["problems"]
    return f"'{found['id']}: {found['problem']}' in the list, and all others are served"


def strangers(server: Server, files) -> str:
    host = status(server, "/v1/models", method="GET", Host="evil.example")
    origin = status(server, GENERATE, {"prompt": 1}, Origin="http://evil.example")
    return f"another Host {host}, another Origin {origin}"


def fetching(server: Server, files) -> str:
    return f"{status(server, '/gradio_api/file=http://127.0.0.1:9/', method='GET')}: no route fetches"


def large(server: Server, files) -> str:
    process = psutil.Process(server.process.pid)
    before, found = process.memory_info().rss, []
    for method, path, megabytes in (("PUT", "/v1/adapters/x", 300), ("POST", GENERATE, 100), ("POST", "/", 1)):
        client = "admin" if method == "PUT" else "ann"
        found.append(status(server, path, bytes(megabytes * 10**6), client=client, method=method))
    grown = max(0, process.memory_info().rss - before) / 1e6
    return f"{found[0]}, {found[1]}, {found[2]} (a picture is read by the page, in the browser); +{grown:.0f} MB"


FAULTS = {
    "of 160 requests at once reach the batcher": reach,
    "health, and the page, with 160 queued": health,
    "a client that hangs up": hang_up,
    "another client's wait behind 500 requests of one": fair,
    "errors have a status": statuses,
    "`cp` over an adapter that is read": replaced,
    "a loop of links in the folder": links,
    "other hosts and web pages": strangers,
    "`gradio_api/file=http://...`": fetching,
    "300 MB of upload, 100 MB of JSON, a picture": large,
}

if __name__ == "__main__":
    main()
