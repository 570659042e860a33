"""Ray Serve: another replica comes under load, pictures are those of single runs, adapters stay where they are."""

import base64
import io
import itertools
import os
import threading
import time

import pytest

os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "1200"  # the machine may be busy
os.environ["RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S"] = "1200"
os.environ["RAY_SERVE_MULTIPLEXED_MODEL_ID_MATCHING_TIMEOUT_S"] = "60"
pytest.importorskip("ray", reason="make test-ray installs it")

import numpy as np
import openai
import ray
from PIL import Image
from ray import serve
from serving.servers import make_pipeline, serving, wait_until, write_adapters

from onelora_diffusion.serving.ray_app import application, settings_of
from onelora_diffusion.serving.request import Request

PATIENCE_S = 1200  # in which a condition must hold: a replica may take minutes to start on a busy machine
NAMES = ("birds", "food", "lora", "plain")


def test_settings_are_texts_by_name(tmp_path):
    settings = settings_of({"adapters": str(tmp_path), "max_batch": "4", "allow_host": "a,b", "join": "false"})
    assert (settings.max_batch, settings.allow_host, settings.join) == (4, ("a", "b"), False)
    scaled = application({"max_batch": "4", "max_replicas": "3", "upscale_delay_s": "5"})
    scaling = scaled._bound_deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 3, 8)
    assert scaling.upscale_delay_s == 5
    for wrong, said in (
        ({"adapter": "x"}, "^unknown setting adapter; there is min_replicas, "),
        ({"max_batch": "x"}, "^max_batch is 'x': input should be"),
        ({"max_replicas": "0"}, "^max_replicas is '0': input should be greater"),
        ({"min_replicas": "3", "max_replicas": "2"}, "max_replicas .2. must be greater"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            application(wrong)
        assert "\n" not in str(error.value)


@pytest.fixture
def folder(tmp_path):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path / "base")
    write_adapters(tmp_path / "adapters", pipeline.transformer)
    return tmp_path


def test_a_second_replica_comes_under_load_draws_the_same_and_keeps_its_adapters(folder):
    arguments = {"base": str(folder / "base"), "adapters": str(folder / "adapters")}
    arguments |= {"max_replicas": "2", "target_ongoing_requests": "2", "upscale_delay_s": "1"}
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    try:
        serve.start(http_options={"port": 18000})
        serve.run(application(arguments))
        client = openai.OpenAI(base_url="http://127.0.0.1:18000/v1", api_key="none", timeout=PATIENCE_S)

        def draw(name: str, seed: int, **headers):
            settings = {"seed": seed, "steps": 3}
            answer = client.images.with_raw_response.generate(
                model=name, prompt="1", extra_body=settings, extra_headers=headers
            )
            return answer.headers["x-replica"], answer.parse().data[0].b64_json

        def draw_again_and_again(seed: int) -> None:
            for name in itertools.cycle(NAMES):
                if ended.is_set():
                    return
                replica, drawn[replica, name, seed] = draw(name, seed)

        drawn, ended = {}, threading.Event()
        clients = [threading.Thread(target=draw_again_and_again, args=(seed,)) for seed in range(4)]
        assert draw("plain", 0)[0]
        for each in clients:
            each.start()
        try:  # four at a time, and two are what one replica should have
            wait_until(lambda: len({replica for replica, *_ in list(drawn)}) == 2, PATIENCE_S)
        finally:
            ended.set()
            for each in clients:
                each.join()
        with serving(make_pipeline(), folder / "adapters") as batcher:
            for (_, name, seed), b64_json in drawn.items():
                request = Request(subject="1", adapters=((name, 1.0),), seed=seed, num_inference_steps=3)
                expected = batcher.submit(request).picture.result(PATIENCE_S).numpy()
                found = np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))))
                assert np.abs(found.astype(int) - expected).max() <= 1
        labels = (f"{name} {number}" for number in itertools.count() for name in NAMES)
        pause = 0.5

        def stays() -> bool:
            """Whether one replica gets all requests of an adapter that it has drawn a while ago."""
            nonlocal pause
            label, pause = next(labels), 1.5 * pause  # in which the replicas tell which adapters they have
            replicas = {draw(label.split()[0], 0, serve_multiplexed_model_id=label)[0]}
            time.sleep(pause)
            for seed in range(12):
                replicas.add(draw(label.split()[0], seed, serve_multiplexed_model_id=label)[0])
            return len(replicas) == 1

        wait_until(stays, PATIENCE_S)
    finally:
        serve.shutdown()
        ray.shutdown()
