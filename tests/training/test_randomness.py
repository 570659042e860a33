import math
from itertools import islice

import numpy as np
import pytest
import torch

from onelora_diffusion.training.randomness import (
    BATCH_ORDER,
    StepKeyedBatches,
    TimestepDensity,
    draw_step,
    keyed_generator,
    micro_batches,
)


def batch_indices(seed, step, batch_size, num_images, bucket_of=None):
    return StepKeyedBatches(seed, 0, batch_size, num_images, flip=False, rows=[], bucket_of=bucket_of).indices(step)


def test_every_epoch_shows_every_image_once_in_an_order_of_its_own():
    shown = [index for step in range(9) for index in batch_indices(3, step, batch_size=4, num_images=12)]
    epochs = [shown[:12], shown[12:24], shown[24:]]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert batch_indices(4, 0, 12, 12) != shown[:12]


def test_batches_run_on_over_the_end_of_an_epoch():
    shown = [index for step in range(7) for index in batch_indices(0, step, batch_size=5, num_images=7)]
    assert all(sorted(shown[first : first + 7]) == list(range(7)) for first in range(0, 35, 7))
    assert sorted(batch_indices(0, 0, batch_size=14, num_images=7)) == sorted([*range(7), *range(7)])


BUCKETS = np.array([0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0, 0, 2, 1, 0, 0])  # 9, 4 and 3 images


def shown_by_bucket(steps, batch_size):
    """For each bucket, its images in the order in which they are shown."""
    shown = {0: [], 1: [], 2: []}
    for step in range(steps):
        indices = batch_indices(5, step, batch_size, len(BUCKETS), BUCKETS)
        (bucket,) = set(BUCKETS[indices].tolist())
        assert len(indices) == batch_size
        shown[bucket] += indices
    return shown


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_batch_is_of_one_bucket_and_each_bucket_runs_through_its_images(batch_size):
    epochs = 10 * batch_size  # enough for every bucket to end with a whole batch
    shown = shown_by_bucket(epochs * len(BUCKETS) // batch_size, batch_size)
    for bucket, images in shown.items():
        members = np.flatnonzero(BUCKETS == bucket).tolist()
        assert len(images) == epochs * len(members)
        rounds = [images[first : first + len(members)] for first in range(0, len(images), len(members))]
        assert all(sorted(each) == members for each in rounds)
        assert len({tuple(each) for each in rounds}) > 1


def test_buckets_take_turns_by_their_sizes_within_every_epoch():
    orders = []
    for epoch in range(4):
        batches = [batch_indices(5, 16 * epoch + step, 1, len(BUCKETS), BUCKETS)[0] for step in range(16)]
        assert sorted(batches) == list(range(16))
        orders.append(BUCKETS[batches].tolist())
    assert len(set(map(tuple, orders))) == 4
    # Batches of 4: in the first epoch 9 // 4 of the first bucket, 4 // 4 of the second, 3 // 4 of the third.
    assert {bucket: len(images) // 4 for bucket, images in shown_by_bucket(3, 4).items()} == {0: 2, 1: 1, 2: 0}


def test_the_order_of_images_without_buckets_is_that_of_runs_begun_earlier():
    positions = range(5 * 10**6, 5 * 10**6 + 5)
    epochs = [keyed_generator(3, BATCH_ORDER, position // 12).permutation(12) for position in positions]
    expected = [epoch[position % 12] for epoch, position in zip(epochs, positions, strict=True)]
    assert batch_indices(3, 10**6, 5, 12) == expected


def test_draws_depend_on_seed_and_step_and_on_nothing_before_them():
    arguments = dict(batch_size=6, latent_shape=(4, 2, 2), num_timesteps=1000, label_drop=0.5)
    torch.manual_seed(1)
    first = draw_step(0, 7, **arguments)
    torch.manual_seed(2)
    draw_step(0, 6, **arguments)
    again = draw_step(0, 7, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (draw_step(0, 8, **arguments), draw_step(1, 7, **arguments)):
        assert not torch.equal(first.noise, other.noise)
    assert not torch.equal(first.noise, first.posterior_noise)


def test_draws_follow_their_distributions():
    draws = draw_step(0, 0, 20_000, (1, 1, 2), num_timesteps=10, label_drop=0.1)
    assert draws.noise.dtype == torch.float32
    assert abs(draws.noise.mean()) < 0.02 and abs(draws.noise.std() - 1) < 0.02
    assert draws.timesteps.bincount(minlength=10).float().div(20_000).sub(0.1).abs().max() < 0.01
    assert abs(draws.label_drops.float().mean() - 0.1) < 0.01
    correlation = torch.corrcoef(torch.stack([draws.noise.flatten(), draws.posterior_noise.flatten()]))[0, 1]
    assert abs(correlation) < 0.02


DENSITIES = [TimestepDensity(), TimestepDensity("logit-normal", 0.5, 0.8), TimestepDensity("mode", mode_scale=1.29)]


@pytest.mark.parametrize("density", DENSITIES, ids=lambda density: density.kind)
def test_timesteps_follow_their_density(density):
    """Esser et al. (2024): below each u as often as the distribution has it."""
    drawn = density.draw(np.random.default_rng(0), 20_000, 1000)
    assert drawn.dtype == torch.int64 and 0 <= drawn.min() and drawn.max() <= 999
    position = np.arange(1, 10) / 10
    found = [(drawn >= 1000 * (1 - u)).float().mean().item() for u in position]
    if density.kind == "logit-normal":
        logits = np.log(position / (1 - position))
        expected = [(1 + math.erf((logit - 0.5) / 0.8 / 2**0.5)) / 2 for logit in logits]
    elif density.kind == "mode":
        v = np.linspace(0, 1, 100_001)  # the share of v with 1 - v - s (cos²(πv / 2) - 1 + v) below u
        mapped = 1 - v - 1.29 * (np.cos(np.pi * v / 2) ** 2 - 1 + v)
        expected = [(mapped < u).mean() for u in position]
    else:
        expected = position
    assert found == pytest.approx(list(expected), abs=0.015)  # four deviations of 20,000 draws


@pytest.mark.parametrize("kind", ["logit-normal", "mode"])
def test_timesteps_are_those_of_diffusers_scripts_on_the_same_draws(kind):
    generator = torch.Generator().manual_seed(int(keyed_generator(3, 4, 7).integers(2**32)))
    if kind == "logit-normal":
        u = torch.sigmoid(torch.normal(mean=0.2, std=0.9, size=(64,), generator=generator))
    else:
        u = torch.rand(64, generator=generator)
        u = 1 - u - 1.1 * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    descending = torch.arange(1000).flip(0)  # as a scheduler's timesteps are
    expected = descending[(u * 1000).long()]
    density = TimestepDensity(kind, 0.2, 0.9, 1.1)
    assert torch.equal(draw_step(3, 7, 64, (1, 1, 1), 1000, 0.0, density).timesteps, expected)


@pytest.mark.parametrize(("num_processes", "accumulation"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_processes_and_micro_batches_share_the_global_batch(num_processes, accumulation):
    rows = [micro_batches(12, num_processes, process, accumulation) for process in range(num_processes)]
    shared = [list(range(12))[part] for parts in rows for part in parts]
    assert [index for part in shared for index in part] == list(range(12))
    assert {len(part) for part in shared} == {12 // (num_processes * accumulation)}


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="batch of 8 images .* 3 processes with 2 accumulation steps"):
        micro_batches(8, num_processes=3, process_index=0, accumulation=2)


@pytest.mark.parametrize("bucket_of", [None, np.arange(20) % 3])
def test_batches_start_at_any_step(bucket_of):
    def batches(first_step, rows):
        return iter(StepKeyedBatches(0, first_step, 6, 20, True, rows, bucket_of))

    whole = list(islice(batches(0, [slice(0, 6)]), 5))
    assert list(islice(batches(3, [slice(0, 6)]), 2)) == whole[3:]
    assert list(islice(batches(4, [slice(2, 4), slice(4, 6)]), 2)) == [whole[4][2:4], whole[4][4:6]]
    assert {flip for batch in whole for _, flip in batch} == {False, True}
