"""The measurement of the latent cache, on a tiny VAE and DiT."""

import pytest

from benchmarks.cache import CacheSettings, measure_cache


def test_the_table_holds_the_numbers_that_are_returned(capsys):
    result = measure_cache(
        CacheSettings(
            images=5,
            batch_size=2,
            rounds=2,
            resolution=32,
            photograph=(48, 40),
            layers=2,
            width=144,
            vae_channels=(8, 8),
        )
    )
    said = capsys.readouterr().out
    assert all(len(line) <= 80 for line in said.splitlines())
    speed = result["images_per_second"]
    assert set(speed) == {"input, cached", "step, cached", "input, encoded", "step, encoded"}
    assert result["ratio_of_steps"] == pytest.approx(speed["step, cached"] / speed["step, encoded"])
    assert f"{speed['step, cached']:.3g}" in said and "16.4 kB each" in said
    assert result["bytes_per_image"] == 2 * 2 * 4 * 16 * 16 * 4
