"""Two replicas in Ray Serve: pictures are those of single runs, and adapters stay with the replica that has them."""

import base64
import io
import os
import time

import pytest

os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"  # the machine may be busy
os.environ["RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S"] = "60"
os.environ["RAY_SERVE_MULTIPLEXED_MODEL_ID_MATCHING_TIMEOUT_S"] = "60"
pytest.importorskip("ray", reason="make test-ray installs it")

import numpy as np
import openai
import ray
from PIL import Image
from ray import serve
from serving.servers import make_pipeline, serving, write_adapters

from onelora_diffusion.serving.ray_app import application, settings_of
from onelora_diffusion.serving.request import Request

NAMES = ("birds", "food", "lora", "plain")


def test_settings_are_texts_by_name(tmp_path):
    settings = settings_of({"adapters": str(tmp_path), "max_batch": "4", "allow_host": "a,b", "join": "false"})
    assert (settings.max_batch, settings.allow_host, settings.join) == (4, ("a", "b"), False)
    for wrong, said in (({"adapter": "x"}, "unknown setting adapter"), ({"max_batch": "x"}, "max_batch is 'x'")):
        with pytest.raises(ValueError, match=said):
            settings_of(wrong)


@pytest.fixture
def folder(tmp_path):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path / "base")
    write_adapters(tmp_path / "adapters", pipeline.transformer)
    return tmp_path


def test_two_replicas_draw_as_one_server_does_and_keep_their_adapters(folder):
    arguments = {"base": str(folder / "base"), "adapters": str(folder / "adapters")}
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    try:
        serve.start(http_options={"port": 18000})
        serve.run(application(arguments | {"min_replicas": "2", "max_replicas": "2"}))
        client = openai.OpenAI(base_url="http://127.0.0.1:18000/v1", api_key="none")

        def draw(name: str, seed: int, **headers):
            settings = {"seed": seed, "steps": 3}
            answer = client.images.with_raw_response.generate(
                model=name, prompt="1", extra_body=settings, extra_headers=headers
            )
            return answer.headers["x-replica"], answer.parse().data[0].b64_json

        drawn, replicas = {}, set()
        for number in range(64):  # Ray sends each to the less busy one of two replicas
            key = NAMES[number % 4], number // 4
            replica, drawn[key] = draw(*key)
            replicas.add(replica)
            if number >= 15 and len(replicas) == 2:
                break
        assert len(replicas) == 2
        with serving(make_pipeline(), folder / "adapters") as batcher:
            for (name, seed), b64_json in drawn.items():
                request = Request(subject="1", adapters=((name, 1.0),), seed=seed, num_inference_steps=3)
                expected = batcher.submit(request).picture.result(30).numpy()
                found = np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))))
                assert np.abs(found.astype(int) - expected).max() <= 1
        first = {name: draw(name, 0, serve_multiplexed_model_id=name)[0] for name in NAMES}
        time.sleep(10)  # in which the replicas tell which adapters they have
        for name, replica in first.items():
            assert {draw(name, seed, serve_multiplexed_model_id=name)[0] for seed in range(5)} == {replica}
    finally:
        serve.shutdown()
        ray.shutdown()
