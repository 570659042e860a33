"""The server on a port: calls by gradio_client and by plain HTTP, refusals of one line, a password."""

import json
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="pip install 'onelora-diffusion[serve]', or make test-serve")

import text_pipelines
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from serving.servers import make_pipeline, serving, write_adapters
from serving.test_request import malformed

from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.serving.drawing import Drawing
from onelora_diffusion.serving.launching import AUTH, PortSettings, launch
from onelora_diffusion.serving.library import shipped_adapters
from onelora_diffusion.serving.page import Page
from onelora_diffusion.serving.picture_file import request_of

DRAW = {"subject": "owl", "adapters": {"birds": 0.7, "plain": 0.3}, "num_inference_steps": 3, "seed": 5}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, batcher) of a server that lives as long as the tests of this file."""
    folder = tmp_path_factory.mktemp("adapters")
    pipeline = make_pipeline()
    write_adapters(folder, pipeline.transformer)
    (folder / "broken.safetensors").write_bytes((folder / "plain.safetensors").read_bytes()[:500])
    with serving(pipeline, folder, max_queue=8) as batcher:
        blocks, address = launch(Page(batcher, "toy", 2.0), PortSettings(port=0))
        yield address.rstrip("/"), batcher
        blocks.close(verbose=False)


@pytest.fixture(scope="module")
def client(server):
    return Client(server[0], verbose=False)


def post(address: str, name: str, data: list):
    """What a call answers by plain HTTP: the event's kind, and its data."""
    call = urllib.request.Request(
        f"{address}/gradio_api/call/{name}", json.dumps({"data": data}).encode(), {"Content-Type": "application/json"}
    )
    event = json.load(urllib.request.urlopen(call, timeout=30))["event_id"]
    with urllib.request.urlopen(f"{address}/gradio_api/call/{name}/{event}", timeout=60) as stream:
        events = [block.split("\n") for block in stream.read().decode().strip().split("\n\n")]
    kind, content = events[-1][0].removeprefix("event: "), events[-1][1].removeprefix("data: ")
    return kind, json.loads(content)


def test_a_client_draws_a_picture_with_its_settings_inside(server, client):
    path, answer = client.predict(DRAW, api_name="/draw")
    assert answer["base"] == "toy"
    assert answer["request"] == DRAW | {
        "subject": 2, "guidance": "cfg", "guidance_scale": 4.0, "sampler": "ddim", "size": 16,
    }  # fmt: skip
    request, base = request_of(path)
    assert (request.as_json(), base) == (answer["request"], "toy")
    picture = server[1].submit(request).picture.result(30)
    assert Image.open(path).tobytes() == picture.numpy().tobytes()
    assert client.predict(handle_file(path), api_name="/settings") == answer


def test_plain_http_draws_the_same(server, client):
    kind, (picture, answer) = post(server[0], "draw", [DRAW])
    assert kind == "complete"
    with urllib.request.urlopen(picture["url"], timeout=30) as file:
        assert file.read() == open(client.predict(DRAW, api_name="/draw")[0], "rb").read()
    assert answer["request"]["subject"] == 2


def test_adapters_are_listed_with_their_classes_and_problems(client):
    adapters = {adapter["name"]: adapter for adapter in client.predict(api_name="/adapters")}
    assert adapters.keys() == {"birds", "broken", "food", "lora", "plain"}
    assert adapters["food"]["classes"] == {"0": "pizza", "1": "sushi", "2": "soup"}
    assert adapters["broken"]["problem"].startswith("is damaged")
    assert adapters["plain"]["problem"] is None


def test_health_counts(client):
    before = client.predict(api_name="/health")
    client.predict(DRAW, api_name="/draw")
    after = client.predict(api_name="/health")
    assert (after["status"], after["base"], after["waiting"]) == ("ok", "toy", 0)
    assert after["images"] == before["images"] + 1
    assert after["resident_adapters"] >= 2 and after["resident_bytes"] > 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (DRAW | {"adapters": {"broken": 1}}, "adapter 'broken' cannot be drawn with: is damaged"),
        (DRAW | {"adapters": {"../plain": 1}}, "no adapter '../plain': there is birds, food, lora, plain"),
        (DRAW | {"subject": "pizza"}, "no class 'pizza' among the 5 of adapter 'birds': there is robin"),
        (DRAW | {"seed": -1}, "seed is -1"),
        (DRAW | {"num_inference_steps": 51}, "50 is the most here"),
    ],
)
def test_a_refusal_is_one_line_for_the_client(client, values, said):
    with pytest.raises(AppError) as error:
        client.predict(values, api_name="/draw")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_200_malformed_calls_are_200_refusals_and_the_next_is_drawn(server):
    address, batcher = server
    before = batcher.state()
    for values in malformed(200):
        body = json.dumps(values, default=str).replace("NaN", "null").replace("Infinity", "1e999")
        kind, answer = post(address, "draw", [json.loads(body)])
        assert kind == "error", values
        assert "\n" not in json.dumps(answer)
    assert batcher.state()["images"] == before["images"]
    assert post(address, "draw", [DRAW])[0] == "complete"


def test_the_guides_examples_run():
    """docs/serving.md, on the miniature and the adapter that ships, as `serve.py` without flags has them."""
    pipeline, folder = load_base(), shipped_adapters()
    pipeline.transformer.requires_grad_(False)
    guide = (Path(__file__).parents[2] / "docs/serving.md").read_text()
    by_client, by_http = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    with serving(pipeline, folder, drawing=Drawing(pipeline, 250)) as batcher:
        blocks, address = launch(Page(batcher, "miniature", 2.0), PortSettings(port=0))
        try:
            client, http = {}, {}
            exec(by_client.replace("http://127.0.0.1:7860", address.rstrip("/")), client)
            exec(by_http.replace("http://127.0.0.1:7860", address.rstrip("/")), http)
            health = client["client"].predict(api_name="/health")
        finally:
            blocks.close(verbose=False)
    assert http["png"] == Path(client["png"]).read_bytes()
    assert http["answer"] == client["answer"]
    assert client["answer"]["request"]["subject"] == 7
    assert health["images"] >= 2 and health["resident_adapters"] == 1


def test_prompts_are_drawn_as_classes_are(tmp_path):
    pipeline = text_pipelines.make_pipeline("pixart")
    with serving(pipeline, tmp_path, drawing=Drawing(pipeline, 50)) as batcher:
        blocks, address = launch(Page(batcher, "toy", 4.0), PortSettings(port=0))
        try:
            values = {"subject": "a red cube", "num_inference_steps": 2, "size": 16}
            kind, (_, answer) = post(address.rstrip("/"), "draw", [values])
            refused, _ = post(address.rstrip("/"), "draw", [values | {"subject": 3}])
        finally:
            blocks.close(verbose=False)
    assert (kind, refused) == ("complete", "error")
    assert answer["request"]["subject"] == "a red cube" and answer["request"]["sampler"] is None


def test_the_page_and_its_policy_keep_a_browser_with_this_server(server):
    with urllib.request.urlopen(server[0], timeout=30) as page:
        policy, text = page.headers["content-security-policy"], page.read().decode()
    assert "default-src 'self'" in policy and "http" not in policy
    assert "fonts.googleapis" not in text and "cdnjs" not in text


def test_a_password_from_the_environment_is_asked_for(server, monkeypatch):
    monkeypatch.setenv(AUTH, "ann:secret")
    blocks, address = launch(Page(server[1], "toy", 2.0), PortSettings(port=0))
    try:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            post(address.rstrip("/"), "health", [])
        assert Client(address, auth=("ann", "secret"), verbose=False).predict(api_name="/health")["status"] == "ok"
    finally:
        blocks.close(verbose=False)
    monkeypatch.setenv(AUTH, "ann")
    with pytest.raises(ValueError, match="not as user:password"):
        PortSettings().check()
