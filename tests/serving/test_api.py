"""The HTTP API: OpenAI's own client, statuses, limits, probes, hang-ups, tokens, and adapters that change under it."""

import base64
import io
import json
import logging
import re
import socket
import threading
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="pip install 'onelora-diffusion[serve]', or make test-serve")

import httpx2 as httpx
import numpy as np
import openai
import tiny_models
import torch
from PIL import Image
from serving.servers import CONFIGS, Held, answering, make_pipeline, serving, wait_until, write_adapter, write_adapters
from serving.test_request import malformed

from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.serving import library as library_module
from onelora_diffusion.serving.drawing import Drawing
from onelora_diffusion.serving.library import shipped_adapters
from onelora_diffusion.serving.request import Request
from onelora_diffusion.serving.settings import AccessSettings, PortSettings

DRAW = {"subject": "owl", "adapters": {"birds": 0.7, "plain": 0.3}, "num_inference_steps": 3, "seed": 5}
ASK = {"prompt": "owl", "model": "birds:0.7+plain:0.3", "steps": 3, "seed": 5}
LONG = {"prompt": 1, "steps": 50, "guidance_scale": 1.0}
HEAD = "POST /v1/{} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
ADMIN, ANN = "the-token-of-the-admin", "the-token-of-ann-here"


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline()


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    return write_adapters(tmp_path_factory.mktemp("adapters"), pipeline.transformer, broken=True)


@pytest.fixture(scope="module")
def server(pipeline, folder):
    """(address, batcher, service) of a server that lives as long as the tests of this file."""
    with serving(pipeline, folder, max_queue=8) as batcher, answering(batcher, folder) as (address, service):
        yield address, batcher, service


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server[0], timeout=60) as client:
        yield client


@pytest.fixture
def held(folder):
    """(client, batcher, drawing, service) of a server that draws nothing until its drawing is let go."""
    pipeline = make_pipeline()
    drawing = Held(pipeline)
    with serving(pipeline, folder, drawing=drawing, max_batch=2, max_queue=600) as batcher:
        batcher.settings = type(batcher.settings)(max_batch=2, max_queue=600, max_queue_per_client=600)
        with answering(batcher, folder) as (address, service), httpx.Client(base_url=address, timeout=60) as client:
            yield client, batcher, drawing, service
            drawing.go.set()


def pixels(b64_json: str) -> bytes:
    return Image.open(io.BytesIO(base64.b64decode(b64_json))).tobytes()


def assert_same(b64_json: str, expected: torch.Tensor) -> None:
    """Pictures of one request, drawn alone and with others, whose rounding may reach the next grey level."""
    found = np.frombuffer(pixels(b64_json), np.uint8).reshape(expected.shape)
    difference = np.abs(found.astype(int) - expected.numpy())
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02


def error_of(answer: httpx.Response) -> tuple[int, str]:
    """(status, code) of a refusal; its message is one line."""
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "code"} and error["message"].isprintable() and error["message"]
    return answer.status_code, error["code"]


def test_openais_own_client_draws_lists_and_is_refused_by_its_own_errors(server):
    address, batcher, _ = server
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    images = client.images.generate(
        model="birds:0.7+plain:0.3",
        prompt="owl",
        n=2,
        size="16x16",
        response_format="b64_json",
        extra_body={"seed": 5, "steps": 3},
    )
    for seed, image in zip((5, 6), images.data, strict=True):
        expected = batcher.submit(Request.from_json(DRAW | {"seed": seed})).picture.result(30)
        assert_same(image.b64_json, expected)
        request = image.settings["request"]
        assert (request["subject"], request["seed"], request["size"]) == (2, seed, 16)
        inside = Image.open(io.BytesIO(base64.b64decode(image.b64_json))).info["onelora"]
        assert json.loads(inside) == image.settings
    assert [model.id for model in client.models.list()] == ["toy", "birds", "food", "lora", "plain"]
    assert client.models.retrieve("food").classes == ["pizza", "sushi", "soup"]
    with pytest.raises(openai.NotFoundError, match="no adapter 'nobody': there is birds"):
        client.images.generate(model="nobody", prompt="1")
    with pytest.raises(openai.BadRequestError, match="no class 'pizza' among the 5 of adapter 'birds'"):
        client.images.generate(model="birds", prompt="pizza")
    seeds = {client.images.generate(prompt="1", extra_body={"steps": 1}).data[0].settings["request"]["seed"]}
    assert seeds != {0}  # any, if none is asked for


@pytest.mark.parametrize(
    ("values", "status", "said"),
    [
        ({"adapters": {"broken": 1}}, 400, "adapter 'broken' cannot be drawn with: is damaged"),
        ({"adapters": {"../plain": 1}}, 404, "no adapter '../plain': there is birds, food, lora, plain"),
        ({"model": "birds:0.5+nobody:0.5"}, 404, "no adapter 'nobody'"),
        ({"model": "plain+plain"}, 400, "plain is in it twice"),
        ({"model": "plain:0.5+"}, 400, "model is 'plain:0.5+'; give an adapter, or a mixture"),
        ({"model": ""}, 400, "model is ''; give an adapter"),
        ({"size": "१६x१६"}, 400, "give a square"),
        ({"model": "plain", "adapters": {"birds": 1}}, 400, "adapters are given as well: choose one"),
        ({"seed": -1}, 400, "seed is -1: input should be"),
        ({"steps": 51}, 400, "50 is the most here"),
        ({"size": "16x32"}, 400, "size is '16x32'; give a square"),
        ({"size": "32x32"}, 400, "size is 32"),
        ({"n": 65}, 400, "n is 65: input should be less than"),
        ({"quality": "hd"}, 400, "quality is 'hd': extra inputs are not permitted"),
        ({"response_format": "url"}, 400, "response_format is 'url': input should be 'b64_json'"),
        ({"negative_prompt": "x"}, 400, "this base is not guided from a prompt"),
    ],
)
def test_a_refusal_is_one_line_with_its_status(client, values, status, said):
    answer = client.post("/v1/images/generations", json={"prompt": 1} | values)
    assert error_of(answer)[0] == status and said in answer.json()["error"]["message"]


def test_malformed_requests_are_refused_and_the_next_is_drawn(server, client):
    before = server[1].state()
    for values in malformed(80):
        text = json.dumps({"pictures": [values]}, default=str)
        answer = client.post("/v1/pictures", content=text, headers={"content-type": "application/json"})
        assert error_of(answer)[0] in (400, 404), values  # JSON makes a name of a number
    for content in (b"", b"{", b"[" * 100_000, b"\xff", b"null"):
        answer = client.post("/v1/pictures", content=content, headers={"content-type": "application/json"})
        assert error_of(answer)[0] == 400
    twice = {
        "images/generations": '{"prompt": 1, "seed": 1, "seed": 2}',
        "pictures": '{"pictures": [{"seed": 1, "seed": 2}]}',
    }
    for path, text in twice.items():
        answer = client.post(f"/v1/{path}", content=text, headers={"content-type": "application/json"})
        assert error_of(answer)[0] == 400 and "'seed' is there twice" in answer.text
    for content, headers in ((b"{}", {"content-type": "text/plain"}), (b"{}", {}), (b"", {})):
        answer = client.post("/v1/pictures", content=content, headers=headers)
        assert error_of(answer)[0] == 400 and "no body of the type application/json" in answer.text
    assert server[1].state()["images"] == before["images"]
    assert client.post("/v1/images/generations", json=ASK).status_code == 200


def test_pictures_come_with_their_progress_as_they_are_drawn(server, client):
    body = {"pictures": [DRAW, DRAW | {"seed": 6}]}
    with client.stream("POST", "/v1/pictures", json=body) as answer:
        events = [json.loads(line) for line in answer.iter_lines()]
    pictures = {event["index"]: event for event in events if "index" in event}
    for index, seed in enumerate((5, 6)):
        expected = server[1].submit(Request.from_json(DRAW | {"seed": seed})).picture.result(30)
        assert_same(pictures[index]["b64_json"], expected)
        assert pictures[index]["settings"]["request"]["seed"] == seed and pictures[index]["warnings"] == []
    assert all(0 <= event["progress"] <= 1 for event in events if "index" not in event)


def test_a_full_queue_and_a_server_that_ends_tell_when_to_ask_again(held):
    client, batcher, drawing, service = held
    batcher.settings = type(batcher.settings)(max_batch=1, max_queue=3)
    tickets = [batcher.submit(Request(subject=1, num_inference_steps=1))]
    wait_until(lambda: drawing.drawn)
    tickets += batcher.submit_all([Request(subject=1, num_inference_steps=1)] * 3)
    answer = client.post("/v1/images/generations", json={"prompt": 1})
    assert error_of(answer) == (429, "queue_full") and int(answer.headers["retry-after"]) >= 1
    drain = threading.Thread(target=service.drain, args=(30,))
    drain.start()
    wait_until(lambda: service.is_draining)
    for answer in (client.post("/v1/images/generations", json={"prompt": 1}), client.get("/readyz")):
        assert error_of(answer) == (503, "not_ready") and "retry-after" in answer.headers
    assert client.get("/healthz").status_code == 200
    drawing.go.set()
    drain.join()
    assert [ticket.picture.result(0).shape for ticket in tickets] == [(16, 16, 3)] * 4  # what waited is drawn


def test_a_server_that_is_starting_says_so(folder):
    from onelora_diffusion.serving.api import create_app
    from onelora_diffusion.serving.launching import listening
    from onelora_diffusion.serving.service import Service

    app = create_app(Service("toy", folder), AccessSettings())
    with listening(app, PortSettings(port=0), 30) as address, httpx.Client(base_url=address) as client:
        assert client.get("/healthz").status_code == 200 and client.get("/metrics").status_code == 200
        for answer in (client.get("/readyz"), client.get("/v1/models"), client.post("/v1/pictures", json={})):
            assert answer.status_code in (503, 400)
        assert error_of(client.post("/v1/images/generations", json={"prompt": 1})) == (503, "not_ready")
        with pytest.raises(OSError):
            with listening(app, PortSettings(port=int(address.rpartition(":")[2])), 30):
                pass


def test_probes_are_answered_while_500_wait_and_nothing_is_drawn(held):
    client, batcher, drawing, _ = held
    batcher.submit_all([Request(subject=1, num_inference_steps=1, seed=seed) for seed in range(450)])
    asked = {"url": f"{client.base_url}/v1/images/generations", "json": {"prompt": 1, "steps": 1}, "timeout": 60}
    asking = [threading.Thread(target=httpx.post, kwargs=asked) for _ in range(50)]
    for thread in asking:
        thread.start()
    wait_until(lambda: batcher.state()["waiting"] + batcher.state()["drawing"] == 500)
    for path in ("/healthz", "/readyz", "/metrics", "/", "/v1/models"):
        assert client.get(path, timeout=10).status_code == 200
        assert client.head(path, timeout=10).status_code == 200
    assert f"onelora_queue_length {batcher.state()['waiting']}.0" in client.get("/metrics").text
    drawing.go.set()
    for thread in asking:
        thread.join()


def test_a_client_that_hangs_up_is_drawn_for_no_longer(held):
    client, batcher, drawing, _ = held
    host, port = client.base_url.host, client.base_url.port
    bodies = {
        "images/generations": LONG,
        "pictures": {"pictures": [{"subject": 1, "num_inference_steps": 50}]},
    }
    for number, (path, body) in enumerate(bodies.items(), start=1):
        content = json.dumps(body)
        with socket.create_connection((host, port)) as connection:
            connection.sendall(f"{HEAD.format(path)}{len(content)}\r\n\r\n{content}".encode())
            wait_until(lambda number=number: len(drawing.drawn) + batcher.state()["waiting"] == number)
        wait_until(lambda number=number: batcher.state()["cancelled"] == number)
    drawing.go.set()
    wait_until(lambda: not batcher.state()["drawing"])
    assert drawing.steps <= 1 and batcher.state()["images"] == 0


def test_what_takes_too_long_is_given_up(pipeline, folder):
    drawing = Held(pipeline)
    with serving(pipeline, folder, drawing=drawing) as batcher:
        with answering(batcher, folder, request_timeout=0.2) as (address, _):
            assert error_of(httpx.post(f"{address}/v1/images/generations", json=LONG)) == (504, "timeout")
            lines = httpx.post(f"{address}/v1/pictures", json={"pictures": [{"subject": 1}]}).text.splitlines()
            assert json.loads(lines[-1])["error"]["code"] == "timeout"
        assert batcher.state()["cancelled"] == 2
        drawing.go.set()


def test_requests_have_ids_and_a_line_in_the_log_and_are_counted(client, caplog):
    caplog.set_level(logging.INFO, "onelora_diffusion.access")
    given = client.get("/v1/models", headers={"x-request-id": "mine-1"})
    other = client.get("/nothing%0d%0ahere", headers={"x-request-id": "not one\x7f"})
    assert given.headers["x-request-id"] == "mine-1"
    assert re.fullmatch("[0-9a-f]{32}", other.headers["x-request-id"]) and error_of(other) == (404, "not_found")
    client.get("/healthz")
    wait_until(lambda: len(caplog.messages) >= 2)
    assert re.fullmatch(r'mine-1 127\.0\.0\.1 "GET /v1/models" 200 \d\.\d{3} s', caplog.messages[0])
    assert len(caplog.messages) == 2 and all(message.isprintable() for message in caplog.messages)
    counted = client.get("/metrics").text
    assert 'onelora_requests_total{method="GET",route="/v1/models",status="200"}' in counted
    assert 'onelora_requests_total{method="any",route="none",status="404"}' in counted
    assert "onelora_batch_size_bucket" in counted and "onelora_resident_bytes" in counted


def test_every_route_is_described_with_the_types_of_its_values(client):
    described = client.get("/openapi.json").json()
    assert described["paths"].keys() == {
        "/healthz", "/readyz", "/metrics", "/v1/models", "/v1/models/{name}", "/v1/adapters/{name}",
        "/v1/images/generations", "/v1/pictures",
    }  # fmt: skip
    steps = described["components"]["schemas"]["ImagesRequest"]["properties"]["steps"]
    assert (steps["type"], steps["minimum"], steps["maximum"], steps["default"]) == ("integer", 1, 1000, 25)


# ---------------------------------------------------------------------------------------------------
# Safe in the open


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"host": "evil.example"}, "wrong_host"),  # a name that an attacker lets point at this address
        ({"host": "evil.example:80@127.0.0.1"}, "wrong_host"),
        ({"host": "["}, "wrong_host"),
        ({"origin": "http://evil.example"}, "wrong_origin"),
        ({"origin": "http://localhost:1"}, "wrong_origin"),
        ({"origin": "null"}, "wrong_origin"),
    ],
)
def test_other_hosts_and_origins_are_refused(client, headers, code):
    for method, path in (("GET", "/"), ("GET", "/v1/models"), ("POST", "/v1/images/generations")):
        assert error_of(client.request(method, path, headers=headers)) == (403, code)
    assert client.get("/healthz", headers=headers).status_code == 200


def test_a_named_host_is_served_and_nothing_is_shared_with_other_origins(server, pipeline, folder):
    with answering(server[1], folder, allow_host=("draw.example.org",)) as (address, _):
        for headers in (
            {"host": "draw.example.org", "origin": "https://draw.example.org"},
            {"host": "DRAW.example.org:8443"},
            {"host": "localhost", "origin": "https://draw.example.org"},
        ):
            answer = httpx.get(f"{address}/v1/models", headers=headers)
            assert answer.status_code == 200
            assert not [name for name in answer.headers if name.startswith("access-control") or name == "set-cookie"]
    policy = httpx.get(server[0]).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "http" not in policy


def test_bodies_have_limits_before_they_are_read(client):
    large = b"x" * 1_000_001
    for content in (large, iter([large[:500_000]] * 3)):  # with its length, and in chunks
        answer = client.post("/v1/pictures", content=content, headers={"content-type": "application/json"})
        assert error_of(answer) == (413, "too_large")
    assert client.get("/healthz").status_code == 200


def test_slow_and_half_sent_requests_end(server, folder):
    with answering(server[1], folder, receive_timeout=0.3) as (address, _):
        host, port = address.removeprefix("http://").split(":")
        for sent in (b"", b"GET / HT", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /"):
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                connection.sendall(sent)
                while connection.recv(4096):
                    pass  # its end
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(f"{HEAD.format('pictures')}9\r\n\r\n{{".encode())
            assert b" 408 " in connection.recv(4096).splitlines()[0]


def test_the_head_of_an_answer_is_sent_with_its_body(server):
    """A server that is killed between them would leave its proxy an answer that no other server may give."""
    host, port = server[0].removeprefix("http://").split(":")
    sent = f"{HEAD.format('images/generations')}4\r\n\r\nnull".encode()
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        for _ in range(20):
            connection.sendall(sent)
            head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
            assert f"content-length: {len(body)}".encode() in head.lower() and body


@pytest.fixture
def guarded(server, pipeline, tmp_path):
    """(client, folder) of a server with tokens, whose adapters change."""
    write_adapters(tmp_path / "served", pipeline.transformer, ["plain", "birds"])
    tokens = tmp_path / "tokens"
    tokens.write_text(f"admin:{ADMIN}\nann:{ANN}\n")
    with serving(make_pipeline(), tmp_path / "served") as batcher:
        with answering(batcher, tmp_path / "served", token_file=tokens, max_upload=0.1) as (address, _):
            with httpx.Client(base_url=address, timeout=60) as client:
                yield client, tmp_path / "served"


def bearer(token: str) -> dict:
    return {"authorization": f"Bearer {token}"}


def test_tokens_are_asked_for_and_name_the_clients(guarded, caplog):
    client, _ = guarded
    caplog.set_level(logging.INFO, "onelora_diffusion.access")
    for path in ("/v1/models", "/metrics", "/openapi.json"):
        for headers in ({}, bearer("wrong"), {"authorization": ANN}, {"authorization": f"Basic {ANN}"}):
            assert error_of(client.get(path, headers=headers)) == (401, "invalid_api_key")
    assert [client.get(path).status_code for path in ("/", "/page.js", "/page.css", "/healthz", "/readyz")] == [
        200
    ] * 5
    caplog.clear()
    assert (
        client.post("/v1/images/generations", json={"prompt": 1, "steps": 1}, headers=bearer(ANN)).status_code == 200
    )
    wait_until(lambda: caplog.messages)
    assert ' ann "POST /v1/images/generations" 200 ' in caplog.messages[0] and ANN not in caplog.text


def test_only_the_admin_changes_adapters_and_a_file_is_checked_before_it_replaces(guarded, pipeline, tmp_path):
    client, folder = guarded
    write_adapter(pipeline.transformer, tmp_path / "new.safetensors", CONFIGS["food"], 9, ("a", "b", "c"))
    new, old = (tmp_path / "new.safetensors").read_bytes(), (folder / "plain.safetensors").read_bytes()
    for headers in ({}, bearer(ANN)):
        assert client.put("/v1/adapters/plain", content=new, headers=headers).status_code == 401
        assert client.delete("/v1/adapters/plain", headers=headers).status_code == 401
    headers = bearer(ADMIN)
    flipped = new[:-1] + bytes([new[-1] ^ 1])
    for content in (b"", b"no file", new[:-1], flipped, json.dumps({}).encode()):
        assert error_of(client.put("/v1/adapters/plain", content=content, headers=headers)) == (400, "invalid_value")
    assert error_of(client.put("/v1/adapters/plain", content=b"x" * 100_001, headers=headers)) == (413, "too_large")
    assert (folder / "plain.safetensors").read_bytes() == old
    put = client.put("/v1/adapters/plain", content=new, headers=headers).json()
    assert put["classes"] == ["a", "b", "c"] and (folder / "plain.safetensors").read_bytes() == new
    assert client.put("/v1/adapters/team/run-1.5", content=new, headers=headers).json()["id"] == "team/run-1.5"
    assert client.get("/v1/models/team/run-1.5", headers=headers).json()["digest"] == put["digest"]
    drawn = client.post(
        "/v1/images/generations", json={"prompt": "b", "model": "team/run-1.5", "steps": 1}, headers=headers
    )
    assert drawn.json()["data"][0]["settings"]["digests"]["adapters"] == {"team/run-1.5": put["digest"]}
    assert client.delete("/v1/adapters/team/run-1.5", headers=headers).json()["deleted"] is True
    assert error_of(client.delete("/v1/adapters/team/run-1.5", headers=headers)) == (404, "model_not_found")
    assert sorted(path.name for path in folder.rglob("*.*")) == ["birds.safetensors", "plain.safetensors"]


def test_no_name_writes_or_removes_outside_of_the_folder(guarded, tmp_path):
    client, folder = guarded
    content = (folder / "plain.safetensors").read_bytes()
    (folder / "out").symlink_to(tmp_path)
    (folder / "link.safetensors").symlink_to(tmp_path / "target.safetensors")
    before = sorted(tmp_path.iterdir())
    for name in (
        "%2e%2e/x",
        "..%2fx",
        "a/../../x",
        "out/x",
        "link",
        ".hidden",
        "a//b",
        "%00",
        "checkpoints/x",
        "a/b/c/d/e",
    ):
        for method in ("PUT", "DELETE")[: 1 if name == "link" else 2]:  # the link itself may be deleted
            answer = client.request(method, f"/v1/adapters/{name}", content=content, headers=bearer(ADMIN))
            assert answer.status_code in (400, 404), (name, answer.text)
    assert sorted(tmp_path.iterdir()) == before and not (tmp_path / "target.safetensors").exists()


def test_no_answer_and_no_picture_tells_a_path_of_the_machine(client, folder):
    answers = [client.get("/v1/models"), client.get("/openapi.json"), client.get("/v1/models/broken")]
    answers += [client.post("/v1/images/generations", json=ASK | more) for more in ({}, {"model": "broken"})]
    picture = base64.b64decode(answers[3].json()["data"][0]["b64_json"])
    for said in [answer.text for answer in answers] + [picture.decode("latin-1")]:
        assert str(folder) not in said and str(Path.home()) not in said


def test_settings_of_an_access_that_cannot_be_are_refused(tmp_path, monkeypatch):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "short").write_text("ann:short")
    (tmp_path / "twice").write_text(f"ann:{ANN} bob:{ANN}")
    for name, said in (("empty", "no token in it"), ("short", "at least 16"), ("twice", "token 2 is there twice")):
        with pytest.raises(ValueError, match=said):
            AccessSettings(token_file=tmp_path / name).tokens()
    monkeypatch.setenv("ONELORA_SERVE_TOKENS", f"{ANN} bob:{ADMIN}")
    assert sorted(AccessSettings().tokens().values()) == ["bob", "client 1"]
    for wrong in ({"allow_host": ("http://x",)}, {"max_upload": 0.0}, {"receive_timeout": 0.0}):
        with pytest.raises(ValueError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
            AccessSettings(**wrong).check()


# ---------------------------------------------------------------------------------------------------
# Adapters that change under it


def test_settings_that_find_another_adapter_or_base_are_drawn_with_a_warning(guarded, pipeline, monkeypatch):
    monkeypatch.setattr(library_module, "RESCAN_S", 0.0)
    client, folder = guarded
    ask = {"prompt": 1, "model": "plain", "steps": 1, "seed": 1}
    first = client.post("/v1/images/generations", json=ask, headers=bearer(ANN)).json()
    digests = first["data"][0]["settings"]["digests"]
    again = client.post("/v1/images/generations", json=ask | {"digests": digests}, headers=bearer(ANN)).json()
    assert again["warnings"] == [] and again["data"] == first["data"]
    write_adapter(pipeline.transformer, folder / "plain.safetensors", CONFIGS["plain"], 7)
    digests["base"] = "0" * 64
    other = client.post("/v1/images/generations", json=ask | {"digests": digests}, headers=bearer(ANN)).json()
    assert other["warnings"] == [
        "the base 'toy' is another than the one that drew the picture before",
        "adapter 'plain' is another than the one that drew the picture before",
    ]
    assert other["data"][0]["b64_json"] != first["data"][0]["b64_json"]


# ---------------------------------------------------------------------------------------------------
# The guide, and prompts


def test_the_guides_examples_run(tmp_path, monkeypatch):
    """docs/serving.md, on the miniature and the adapter that ships, as `serve.py` without flags has them."""
    monkeypatch.chdir(tmp_path)
    pipeline = load_base()
    pipeline.transformer.requires_grad_(False)
    guide = (Path(__file__).parents[2] / "docs/serving.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    with serving(pipeline, shipped_adapters(), drawing=Drawing(pipeline, 250)) as batcher:
        with answering(batcher, tmp_path) as (address, _):
            found = {}
            for snippet in snippets:
                exec(snippet.replace("http://127.0.0.1:7860", address), found)
    assert Image.open("seven.png").tobytes() == pixels(found["picture"]["b64_json"])
    assert found["picture"]["settings"]["request"]["subject"] == 7


def test_prompts_are_drawn_as_classes_are(tmp_path):
    pipeline = tiny_models.make_pipeline("pixart")
    with serving(pipeline, tmp_path, drawing=Drawing(pipeline, 50)) as batcher:
        with answering(batcher, tmp_path) as (address, _):
            values = {"prompt": "a red cube", "steps": 2, "size": "16x16", "negative_prompt": "blue"}
            answer = httpx.post(f"{address}/v1/images/generations", json=values, timeout=60).json()
            refused = httpx.post(f"{address}/v1/images/generations", json=values | {"prompt": 3}, timeout=60)
            base = httpx.get(f"{address}/v1/models").json()["data"][0]
    request = answer["data"][0]["settings"]["request"]
    assert (request["subject"], request["negative_prompt"], request["sampler"]) == ("a red cube", "blue", None)
    assert error_of(refused) == (400, "invalid_value")
    assert (base["condition"], base["takes_negative_prompts"]) == ("prompt", True)
