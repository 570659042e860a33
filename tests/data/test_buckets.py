import pytest

from onelora_diffusion.data.buckets import bucket_sizes, nearest_buckets


@pytest.mark.parametrize(("resolution", "multiple"), [(16, 4), (32, 4), (32, 16), (512, 16), (512, 32), (1024, 16)])
def test_buckets_have_about_as_many_tokens_as_the_square(resolution, multiple):
    sizes = bucket_sizes(resolution, multiple)
    side = resolution // multiple
    assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes) <= 17
    assert {(width, height) for height, width in sizes} == set(sizes)
    for height, width in sizes:
        assert height % multiple == width % multiple == 0 and 1 / 4 <= height / width <= 4
        assert abs((height // multiple) * (width // multiple) - side**2) <= side / 2


def test_buckets_of_32_pixels_for_a_model_that_needs_fours():
    tall = [(36, 28), (44, 24), (52, 20), (64, 16)]
    assert bucket_sizes(32, 4) == sorted([(32, 32), *tall, *((width, height) for height, width in tall)])


def test_an_image_is_in_the_bucket_of_the_nearest_ratio():
    # Height and width; 3 is nearer to 52:20 than to 64:16, as 3 < √(2.6 · 4); 8:7 > √(36:28) > 10:9.
    images = [(100, 100), (300, 100), (1, 50), (100, 190), (90, 100), (7, 8)]
    buckets = nearest_buckets(images, 32, 4)
    assert [buckets.sizes[number] for number in buckets.of_image] == [
        (32, 32),
        (52, 20),
        (16, 64),
        (24, 44),
        (32, 32),
        (28, 36),
    ]
    assert buckets.sizes == [(16, 64), (24, 44), (28, 36), (32, 32), (52, 20)]  # no bucket without an image
