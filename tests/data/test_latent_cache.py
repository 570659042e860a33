import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import EncoderOutput
from PIL import Image
from reading import load_captioned
from rounding import assert_rounded
from safetensors.torch import save_file
from tiny_models import make_vae
from torch import nn
from torch.utils.data import DataLoader, Dataset

from onelora_diffusion.data import latent_cache, load_dataset
from onelora_diffusion.data.latent_cache import LatentCache, build_cache, cache_size, inputs_of
from onelora_diffusion.data.latents import FlippableImages, sample_moments
from onelora_diffusion.data.row_cache import is_whole
from onelora_diffusion.families.autoencoder import encode_moments
from onelora_diffusion.training.randomness import StepKeyedBatches


def seeded_vae(seed=0):
    torch.manual_seed(seed)
    return make_vae(4, None, levels=1)


@pytest.fixture(scope="module")
def vae():
    return seeded_vae()


@pytest.fixture(scope="module")
def digits():
    return torch.utils.data.Subset(load_dataset("digits", resolution=8), range(11))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(latent_cache, "SHARD_SIZE", 4)  # 11 images: shards of 4, 4 and 3


def shards(folder):
    return sorted(path.name for path in folder.glob("shard-*"))


def encoded_images(monkeypatch, vae):
    """How many images are encoded from now on."""
    counts, encode = [], latent_cache.encode_moments
    monkeypatch.setattr(
        latent_cache, "encode_moments", lambda vae, images: counts.append(len(images)) or encode(vae, images)
    )
    return counts


@pytest.mark.parametrize("flip", [False, True])
def test_the_cache_gives_what_encoding_on_the_fly_gives(tmp_path, vae, digits, flip):
    cache = LatentCache(build_cache(tmp_path, digits, vae, flip, batch_size=3), len(digits))
    keys = [(index, False) for index in range(11)] + [(index, True) for index in range(11)] * flip
    cached, labels = next(iter(DataLoader(cache, batch_sampler=[keys])))
    images, expected_labels = next(iter(DataLoader(FlippableImages(digits), batch_sampler=[keys])))
    assert torch.equal(labels, expected_labels)
    noise = torch.randn(len(keys), 4, 8, 8)
    latents = sample_moments(encode_moments(vae, images), noise)
    assert_rounded(sample_moments(cached, noise), latents, vae.encoder)
    assert len(cache) == 11 and sum(shard["moments"].nbytes for shard in cache.shards) == cache_size(
        11, flip, (4, 8, 8)
    )


def test_what_is_there_is_not_encoded_again_and_a_damaged_shard_is(tmp_path, vae, digits, monkeypatch):
    folder = build_cache(tmp_path, digits, vae, flip=False)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    counts, said = encoded_images(monkeypatch, vae), []
    assert build_cache(tmp_path, digits, vae, flip=False, report=said.append) == folder
    assert (counts, said) == ([], [])

    for damage in (lambda content: content[:-5] + b"\1" + content[-4:], lambda content: content[:50]):
        path = folder / "shard-00001.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        build_cache(tmp_path, digits, vae, flip=False, report=said.append)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert counts == [4, 4] and said == [f"{path} is damaged: its images are encoded again"] * 2


def test_an_interrupted_build_goes_on_where_it_was(tmp_path, vae, digits, monkeypatch):
    asked = iter([False, False, True])
    folder = build_cache(tmp_path, digits, vae, flip=True, is_stopped=lambda: next(asked))
    assert shards(folder) == ["shard-00000.safetensors", "shard-00001.safetensors"]
    counts = encoded_images(monkeypatch, vae)
    build_cache(tmp_path, digits, vae, flip=True)
    assert counts == [3, 3]


def test_kill_9_in_a_build_leaves_whole_shards(tmp_path, vae, digits):
    if not (child := os.fork()):
        torch.set_num_threads(1)
        calls = iter(range(100))
        encode = latent_cache.encode_moments

        def kill(vae, images):
            if next(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(vae, images)

        latent_cache.encode_moments = kill
        build_cache(tmp_path, digits, vae, flip=False)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (folder,) = tmp_path.iterdir()
    assert shards(folder) == ["shard-00000.safetensors", "shard-00001.safetensors"]
    assert all(is_whole(folder / name) for name in shards(folder))


def test_a_full_disk_in_a_build_names_the_shard_and_leaves_whole_ones(tmp_path, vae, digits, monkeypatch):
    write = Path.write_bytes

    def full(path, content):
        if "shard-00001" in path.name:
            write(path, content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device: '.*/shard-00001.safetensors'"):
        build_cache(tmp_path, digits, vae, flip=False)
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {"inputs.json", "shard-00000.safetensors"}


def test_processes_share_the_shards(tmp_path, vae, digits):
    folder = build_cache(tmp_path, digits, vae, flip=False, process_index=1, num_processes=2)
    assert shards(folder) == ["shard-00001.safetensors"]
    build_cache(tmp_path, digits, vae, flip=False, process_index=0, num_processes=2)
    alone = build_cache(tmp_path / "alone", digits, vae, flip=False)
    for name in ["inputs.json", *shards(alone)]:
        assert (folder / name).read_bytes() == (alone / name).read_bytes()


def image_folder(tmp_path, colour=(0, 0, 0)):
    (tmp_path / "images" / "a").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(tmp_path / "images" / "a" / "1.png")
    return load_dataset("imagefolder", tmp_path / "images", resolution=8, broken="skip")


def test_a_changed_input_makes_another_cache(tmp_path, vae):
    folders = {build_cache(tmp_path / "latents", image_folder(tmp_path), vae, flip=False)}
    assert {
        build_cache(
            tmp_path / "latents",
            load_dataset("imagefolder", tmp_path / "images", resolution=8, broken="skip"),
            vae,
            flip=False,
        )
    } == folders
    folders.add(build_cache(tmp_path / "latents", image_folder(tmp_path), seeded_vae(seed=1), flip=False))
    folders.add(build_cache(tmp_path / "latents", image_folder(tmp_path), vae, flip=True))
    changed = build_cache(tmp_path / "latents", image_folder(tmp_path, (255, 0, 0)), vae, flip=False)
    assert len(folders | {changed}) == 4
    first = LatentCache(changed, 1)[0, False][0]
    assert not torch.allclose(first, LatentCache(min(folders), 1)[0, False][0])


def test_the_description_of_the_inputs_is_the_same_every_time(vae):
    first, second = (inputs_of(load_dataset("digits", resolution=8), vae, True) for _ in range(2))
    assert first == second and first["images"] == 1442
    assert inputs_of(load_dataset("digits", resolution=8, classes=(0, 1, 2, 3, 4, 5, 6, 7, 9, 8)), vae, True) != first


def test_images_that_were_skipped_are_remembered(tmp_path, vae):
    image_folder(tmp_path)
    (tmp_path / "images" / "a" / "2.png").write_bytes(b"cut")
    dataset = load_dataset("imagefolder", tmp_path / "images", resolution=8, broken="skip")
    folder = build_cache(tmp_path / "latents", dataset, vae, flip=False)
    assert LatentCache(folder, 2).broken().tolist() == [False, True]


def test_a_read_that_the_system_failed_is_tried_again_at_the_next_start(tmp_path, vae, monkeypatch, capsys):
    """Too many open files, or a network disk that hiccups, say nothing of an image."""
    image_folder(tmp_path, (255, 0, 0))
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a" / "2.png")
    (tmp_path / "images" / "a" / "3.png").write_bytes(b"cut")
    opens, said = Image.open, []

    def build():
        dataset = load_dataset("imagefolder", tmp_path / "images", resolution=8, broken="skip")
        return LatentCache(build_cache(tmp_path / "latents", dataset, vae, False, report=said.append), 3)

    def fail(path, *arguments):
        if str(path).endswith("1.png"):
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return opens(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", fail)
        cache = build()
        assert cache.broken().tolist() == [True, False, True] and not said
        assert torch.equal(cache[0, False][0], cache[1, False][0])
        assert "1.png cannot be read now (Too many open files): start again" in "".join(capsys.readouterr())
    cache = build()
    assert cache.broken().tolist() == [False, False, True]
    assert not torch.equal(cache[0, False][0], cache[1, False][0])
    assert len(said) == 1 and said[0].startswith("image 0, which was skipped, can be read now: ")
    build()
    assert len(said) == 1


# ---------------------------------------------------------------------------------------------------
# Caches of earlier versions: a folder's name and its files as they were when one was written.


class Few(Dataset):
    name = "few"

    def __init__(self):
        self.images = torch.arange(60).reshape(5, 3, 2, 2) / 64 - 1

    def __len__(self):
        return 5

    def __getitem__(self, index):
        raise AssertionError("nothing is to be encoded")


class SmallVAE(nn.Module):
    """A deterministic one: the red channel at a quarter of the size."""

    config = FrozenDict({"scaling_factor": 0.5, "_name_or_path": "anywhere"})
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 0.25))

    def encode(self, images):
        return EncoderOutput(latent=images[:, :1, ::4, ::4])


def test_a_cache_that_an_earlier_version_wrote_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "SHARD_SIZE", 1024)
    images = Few().images
    moments = torch.stack([torch.stack([each / 8, torch.ones_like(each)], 1) for each in (images, images.flip(-1))], 1)
    tensors = {"moments": moments, "labels": torch.arange(5) ** 2, "broken": torch.zeros(5, dtype=torch.bool)}
    folder = tmp_path / "few-1b63ae0e709a"
    folder.mkdir()
    sha256 = {"sha256": "a58bda2838932790965ecf432dbec85ebba196011a67c1190efb69d95dbf1c8b"}
    save_file(tensors, folder / "shard-00000.safetensors", metadata=sha256)
    assert build_cache(tmp_path, Few(), SmallVAE(), flip=True) == folder
    assert inputs_of(Few(), SmallVAE(), True)["vae_config"] == {"scaling_factor": 0.5}

    cache = LatentCache(folder, 5)
    for flip in (False, True):
        found, label = cache[3, flip]
        assert label == 9
        assert torch.equal(
            found, torch.stack([images[3].flip(-1) if flip else images[3], torch.full((3, 2, 2), 8.0)]) / 8
        )


# ---------------------------------------------------------------------------------------------------
# Images in buckets


@pytest.fixture
def shapes(tmp_path):
    """Captioned images of grey level 10 times their number: wide, square, wide, square, square, tall, wide."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    for number, size in enumerate([(90, 30), (30, 30), (90, 30), (30, 30), (30, 30), (30, 90), (90, 30)]):
        Image.new("RGB", size, (10 * number,) * 3).save(folder / f"{number}.png")
    return load_captioned(folder, "x", resolution=32, multiple=4, aspect_buckets=True, broken="skip")


def test_latents_of_images_in_buckets_keep_their_shapes(tmp_path, shapes, monkeypatch):
    monkeypatch.setattr(latent_cache, "BUCKET_SHARD_SIZE", 2)
    folder = build_cache(tmp_path, shapes.dataset, SmallVAE(), flip=True)
    assert len(shards(folder)) == 5  # of three wide images two files, of three square ones two, and one
    cache = LatentCache(folder, 7, shapes.dataset.buckets)
    assert len(cache) == 7
    for index in range(7):
        moments, caption = cache[index, False]
        height, width = shapes.dataset.buckets.sizes[shapes.dataset.buckets.of_image[index]]
        assert caption == index and moments.shape == (2, 1, height // 4, width // 4)
        assert_rounded(moments[0], torch.full_like(moments[0], (10 * index / 127.5 - 1) / 2), 2)
        assert not moments[1].any() and torch.equal(cache[index, True][0], moments)


def test_a_batch_of_a_bucket_comes_from_the_cache_as_from_the_images(tmp_path, shapes):
    vae = seeded_vae()
    cache = LatentCache(build_cache(tmp_path, shapes.dataset, vae, flip=True), 7, shapes.dataset.buckets)
    keys = StepKeyedBatches(0, 0, 3, 7, True, [slice(0, 3)], shapes.dataset.buckets.of_image)
    loaders = [iter(DataLoader(examples, batch_sampler=keys)) for examples in (shapes, cache)]
    seen = set()
    for _ in range(7):
        (images, expected), (moments, captions) = (next(loader) for loader in loaders)
        assert torch.equal(captions, expected)
        assert_rounded(moments, encode_moments(vae, images), vae.encoder)
        seen.add(tuple(images.shape))
    assert seen == {(3, 3, 20, 52), (3, 3, 32, 32), (3, 3, 52, 20)}


def test_skipped_images_in_buckets_are_remembered_by_their_own_numbers(tmp_path, shapes):
    path = shapes.dataset.source.paths[2]
    path.write_bytes(path.read_bytes()[:60])
    cache = LatentCache(build_cache(tmp_path, shapes.dataset, SmallVAE(), False), 7, shapes.dataset.buckets)
    assert cache.broken().tolist() == [False, False, True, False, False, False, False]
    assert [int(cache[index, False][1]) for index in range(7)] == [0, 1, 6, 3, 4, 5, 6]


def test_latents_depend_on_images_and_shapes_and_not_on_captions(tmp_path, shapes):
    def key(prompt="x", flip=False, **arguments):
        arguments = {"resolution": 32, "multiple": 4, "aspect_buckets": True, "broken": "skip", **arguments}
        dataset = load_captioned(tmp_path / "shapes", prompt, **arguments).dataset
        return json.dumps(inputs_of(dataset, SmallVAE(), flip), sort_keys=True)

    assert key() == key(prompt="y")
    others = [key(), key(resolution=64), key(aspect_buckets=False), key(multiple=8), key(flip=True)]
    assert len(set(others)) == 5
