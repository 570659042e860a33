"""Feature modules against torch-fidelity's own, and the names that their distances get."""

import pytest
import torch
import torch_fidelity
from rounding import assert_rounded, rounding
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from onelora_diffusion.evaluation.features import INCEPTION_SHA256, distance_name, load_features
from onelora_diffusion.evaluation.features.inception import inception_2015, inception_random
from onelora_diffusion.evaluation.frechet import frechet_distance
from onelora_diffusion.evaluation.statistics import RunningStatistics


def make_images(count, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    return (images * 255).clamp(0, 255).to(torch.uint8)


class Images(torch.utils.data.Dataset):
    """As torch-fidelity takes them."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def test_pixels_of_a_tiny_image_are_the_features():
    images = make_images(2, size=8)
    assert_rounded(load_features("pixels", 8)(images), images.double().flatten(1) / 255, terms=1)
    assert load_features("pixels", 8).resize == "none, 8x8 pixels"


def test_pixels_of_a_larger_image_are_averages():
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    images[0, 0, 0, :2] = 102
    features = load_features("pixels", 32)
    assert features.num_features == 768 and features.resize == "averaged to 16x16 pixels"
    assert features(images)[0, 0] == pytest.approx(0.2) and features(images)[0, 1:].count_nonzero() == 0


def test_inception_equals_torch_fidelity(tmp_path):
    ours = inception_random(seed=1)
    torch.save(ours.network.state_dict(), tmp_path / "random.pth")
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], tmp_path / "random.pth")
    images = make_images(2)
    features, logits = theirs(images)
    assert torch.equal(ours(images).float(), features)
    assert_rounded(ours.logits(ours(images)).float(), logits, terms=2048)


def test_distance_agrees_with_torch_fidelity(tmp_path):
    features = inception_random(layer="64")
    torch.save(features.network.state_dict(), tmp_path / "random.pth")
    sets = [make_images(70), make_images(66, seed=1) // 2]
    found = []
    for images in sets:
        running = RunningStatistics(features)
        for indices in torch.arange(len(images)).split(64):  # as torch-fidelity does, so that features are equal
            running.update(indices.tolist(), images[indices])
        found.append(running.reduce())
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(sets[0]),
        input2=Images(sets[1]),
        fid=True,
        feature_layer_fid="64",
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(tmp_path / "random.pth"),
        cuda=False,
        verbose=False,
        cache=False,
        save_cpu_ram=True,
    )
    size = sum((each.mean.square().sum() + each.covariance.trace()).item() for each in found)
    allowed = size * rounding(70)  # torch-fidelity takes the means of 70 and 66 images in float32
    assert frechet_distance(*found) == pytest.approx(theirs["frechet_inception_distance"], rel=0, abs=allowed)


def test_random_inception_is_a_function_of_its_seed():
    images = make_images(2)
    first, again, other = (inception_random(seed, layer="64")(images) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_only_released_inception_gives_fid():
    assert distance_name("inception", INCEPTION_SHA256) == "FID"
    for features in (inception_random(), inception_random(layer="64"), load_features("pixels", 8)):
        assert distance_name(features.name, features.extractor) == f"FD({features.name})"
    assert inception_random().name == "inception-random"
    assert distance_name("inception-64", INCEPTION_SHA256 + "-64") == "FD(inception-64)"


def test_other_inception_weights_are_refused_unread(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"\x80\x02cos\nsystem\n.")
    with pytest.raises(ValueError, match="is not torch-fidelity's weights-inception-2015-12-05-6726825d.pth"):
        inception_2015(tmp_path / "weights.pth")
    with pytest.raises(FileNotFoundError, match="no Inception weights at .*nowhere.pth"):
        inception_2015(tmp_path / "nowhere.pth")


def test_no_network_and_no_file(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(FileNotFoundError, match="no network .*--inception-weights"):
        inception_2015()
    assert not list(tmp_path.rglob("*.pth"))


def test_dinov2_is_transformers_class_token(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=224)
    network = transformers.Dinov2Model(config).eval()
    network.save_pretrained(tmp_path)
    features = load_features("dinov2", 224, tmp_path)
    images = make_images(2, size=224)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    expected = network(pixel_values=(images / 255 - mean) / std).last_hidden_state[:, 0]
    assert_rounded(features(images).float(), expected, network)
    assert features.name == "dinov2-32"


def test_unknown_features_and_missing_dinov2(tmp_path):
    with pytest.raises(ValueError, match="unknown features 'vgg'"):
        load_features("vgg", 8)
    with pytest.raises(FileNotFoundError, match="--dinov2-weights"):
        load_features("dinov2", 8, tmp_path)
