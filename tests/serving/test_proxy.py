"""Two servers behind nginx, by the guide's own configuration: TLS, a path, the client's address, and one that ends."""

import contextlib
import logging
import shutil

import pytest

pytest.importorskip("fastapi", reason="pip install 'onelora-diffusion[serve]', or make test-serve")
if shutil.which("nginx") is None or shutil.which("openssl") is None:
    pytest.skip("make test-proxy installs nginx", allow_module_level=True)

import httpx2 as httpx
import openai
from serving.servers import answering, make_pipeline, serving, wait_until, write_adapters

from onelora_diffusion.serving.settings import PortSettings
from tools.soak_serving import nginx

BEHIND = {"root_path": "/draw", "trusted_proxy": ("127.0.0.1",)}


def test_two_servers_behind_nginx_are_one(tmp_path, caplog):
    caplog.set_level(logging.INFO, "onelora_diffusion.access")
    pipelines = [make_pipeline(), make_pipeline()]
    write_adapters(tmp_path / "adapters", pipelines[0].transformer)
    with contextlib.ExitStack() as stack:
        batchers = [stack.enter_context(serving(pipeline, tmp_path / "adapters")) for pipeline in pipelines]
        started = [
            stack.enter_context(
                answering(batcher, tmp_path, port=PortSettings(port=0, **BEHIND), allow_host=("draw.example.org",))
            )
            for batcher in batchers
        ]
        address = stack.enter_context(nginx(tmp_path, [address for address, _ in started]))
        transport = httpx.HTTPTransport(verify=False, local_address="127.0.0.2")
        host = {"host": "draw.example.org"}
        http = stack.enter_context(httpx.Client(transport=transport, headers=host, timeout=60))
        assert "<title>1LoRA" in http.get(f"{address}/").text and http.get(f"{address}/page.js").status_code == 200
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", http_client=http, max_retries=0)
        pictures = set()
        for _ in range(6):
            image = client.images.generate(model="birds", prompt="owl", extra_body={"seed": 1, "steps": 2})
            pictures.add(image.data[0].b64_json)
        assert len(pictures) == 1  # whichever server drew it
        assert min(batcher.state()["images"] for batcher in batchers) >= 1
        page = {"origin": "https://draw.example.org"}
        assert http.get(f"{address}/v1/models", headers=page).status_code == 200
        assert http.get(f"{address}/v1/models", headers={"host": "evil.example"}).status_code == 403
        given = http.get(f"{address}/v1/models").headers["x-request-id"]
        wait_until(lambda: any(message.startswith(f"{given} 127.0.0.2 ") for message in caplog.messages))
        started[0][1].drain(10)  # it answers 503, and the other one draws
        for _ in range(4):
            client.images.generate(model="birds", prompt="owl", extra_body={"seed": 1, "steps": 2})
        assert http.get(f"{address}/readyz").status_code == 200
