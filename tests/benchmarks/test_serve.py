import json

import pytest
import torch

from benchmarks.arrivals import BATCHES, JOINED
from benchmarks.serve import ALONE, BATCHED, BLOCK, MINIATURE, SWITCHED, ServeSettings, serve

pytest.importorskip("peft")


def test_every_way_serves_every_client_and_is_told(tmp_path):
    settings = ServeSettings(
        clients=(1, 3),
        loads=(0.5,),
        arrivals=(2, 2),
        images=(3, 3),
        steps=(1, 1),
        rounds=1,
        resident=3,
        width=32,
        heads=2,
        sample_size=8,
        threads=torch.get_num_threads(),
        output_dir=tmp_path,
    )
    results = serve(settings)
    rows = [(row["base"], row["clients"], row["way"], row["images"]) for row in results["clients"]]
    assert rows == [
        (base, clients, way, 3)
        for base in (MINIATURE, BLOCK)
        for clients in (1, 3)
        for way in (BATCHED, ALONE, SWITCHED)
    ]
    for row in results["clients"]:
        assert row["images_per_second"] > 0 and 0 < row["p50_s"] <= row["p95_s"]
        together = sum(int(size) * count for size, count in row["batch_sizes"].items())
        assert together == 3
        if row["way"] != BATCHED:
            assert row["batch_sizes"] == {"1": 3}
    rows = [(row["base"], row["way"], row["load"]) for row in results["arrivals"]]
    assert rows == [(base, w, load) for base in (MINIATURE, BLOCK) for load in (None, 0.5) for w in (JOINED, BATCHES)]
    for row in results["arrivals"]:
        assert row["images_per_second"] > 0 and 0 < row["mean_s"] <= row["p95_s"]
        assert row["way"] == JOINED or row["over_batches"] == row["throughput_over_batches"] == [1, 1, 1]
    assert (tmp_path / "serve.png").stat().st_size > 1000
    assert [row["samples"] for row in results["resident"]] == [3, 3]
    for row in results["limit"]:
        (alone, together), (decoded, decoded_together) = row["network_s"], row["autoencoder_s"]
        assert row["alone_over_together"] == pytest.approx((alone + decoded) / (together + decoded_together))
    assert json.loads((tmp_path / "serve.json").read_text())["resident"] == json.loads(json.dumps(results["resident"]))
    assert max(map(len, (tmp_path / "serve.md").read_text().splitlines())) <= 100
