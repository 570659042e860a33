"""Feature modules against torch-fidelity's own, and the names that their distances get."""

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from rounding import assert_rounded, rounding
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from onelora_diffusion.evaluation.features import load_features, name_of, networks
from onelora_diffusion.evaluation.features.base import INCEPTION_SHA256
from onelora_diffusion.evaluation.features.clip import CLIP, CLIP_LARGE
from onelora_diffusion.evaluation.features.dino import DINO
from onelora_diffusion.evaluation.features.dinov2 import DINOV2
from onelora_diffusion.evaluation.features.inception import inception_2015
from onelora_diffusion.evaluation.features.networks import IMAGENET
from onelora_diffusion.evaluation.formulas import frechet_distance, paired_similarity
from onelora_diffusion.evaluation.metrics import PUBLISHED
from onelora_diffusion.evaluation.statistics import RunningStatistics
from tools.random_inception import inception_random


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
    assert_rounded(ours.logits(ours(images)), logits, terms=2048)


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
    assert name_of("FD", "inception", INCEPTION_SHA256) == "FID"
    for features in (inception_random(), inception_random(layer="64"), load_features("pixels", 8)):
        assert name_of("FD", features.name, features.extractor) == f"FD({features.name})"
    assert inception_random().name == "inception-random"
    assert name_of("FD", "inception-64", INCEPTION_SHA256 + "-64") == "FD(inception-64)"


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


def test_spatial_features_are_mixed_6s_first_convolution():
    """sFID's 2,023 numbers of ADM's evaluator, by the network's layers one after the other and NumPy's arithmetic."""
    ours, images = inception_random(seed=2), make_images(2, size=299)
    network = ours.network
    x = (images.float() - 128) / 128  # 299 pixels are not resized
    before = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2 "
    before += "Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c"
    with torch.no_grad():
        for name in before.split():
            x = getattr(network, name)(x)
    layer = network.Mixed_6d.branch1x1
    weight = layer.conv.weight.double().numpy()[:7, :, 0, 0]
    maps = np.einsum("oc,bchw->bhwo", weight, x.double().numpy())  # channels last, as TensorFlow has them
    mean, variance, scale, shift = (
        tensor.double().numpy()[:7]
        for tensor in (layer.bn.running_mean, layer.bn.running_var, layer.bn.weight, layer.bn.bias)
    )
    expected = np.maximum((maps - mean) / np.sqrt(variance + 0.001) * scale + shift, 0).reshape(2, -1)

    pooled, spatial = ours.with_spatial(images)
    assert spatial.shape == (2, 2023) and spatial.dtype == torch.float64 and ours.num_spatial == 2023
    assert_rounded(spatial.float(), torch.from_numpy(expected).float(), terms=768)
    assert torch.equal(pooled, ours(images)) and (expected > 0).mean() > 0.1
    assert not network.Mixed_6d.branch1x1._forward_hooks and inception_random(layer="64").num_spatial == 0


@pytest.fixture
def dinov2_folder(tmp_path):
    """A random DINOv2 of one block, with positions of 37 by 37 patches as the released one."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    network = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, image_size=518, patch_size=14)).eval()
    with torch.no_grad():
        network.embeddings.position_embeddings.normal_()
    network.save_pretrained(tmp_path / "dinov2")
    return tmp_path / "dinov2", network, sizes


def cubic(distance):
    """The kernel of bicubic interpolation in PyTorch and in Meta's DINOv2 (Keys, 1981, a = -0.75)."""
    x, a = np.abs(distance), -0.75
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def interpolation(before, after, offset):
    """(after, before): weights of positions on a line, scaled by (after + offset) / before."""
    centres = (np.arange(after) + 0.5) * before / (after + offset) - 0.5
    weights = np.zeros((after, before))
    for row, centre in enumerate(centres):
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            weights[row, min(max(tap, 0), before - 1)] += cubic(centre - tap)
    return weights


@pytest.mark.parametrize("size", [64, 224, 300])
def test_dinov2_is_prepared_as_published(dinov2_folder, size):
    """PIL's bicubic filter, ImageNet's mean and deviation, Meta's positions; then transformers' class token."""
    import transformers

    folder, network, sizes = dinov2_folder
    features = load_features("dinov2", size, folder)
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = []
    features.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    found = features(images)

    # A filter in bytes may round to either side, once along each axis: two grey levels at most, and hardly anywhere.
    resized = [
        np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC))
        for image in images
    ]
    levels = (seen[0].permute(0, 2, 3, 1).double().numpy() * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406]) * 255
    apart = np.abs(levels - np.stack(resized))
    assert apart.max() < 2.001 and apart.mean() < 0.05

    table = network.embeddings.position_embeddings.detach().double().numpy()[0]
    line = interpolation(37, 16, 0.1)
    grid = np.einsum("yr,xc,rcd->yxd", line, line, table[1:].reshape(37, 37, -1)).reshape(256, -1)
    positions = np.concatenate([table[:1], grid])
    # A coordinate of up to 37, rounded, moves the kernel's weights; the sum itself is of 16 numbers of size 4.
    found_positions = features.network.embeddings.position_embeddings[0]
    assert_rounded(found_positions, torch.from_numpy(positions).float(), terms=16, size=37 * np.abs(positions).max())

    plain = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, image_size=224, patch_size=14)).eval()
    state = {**network.state_dict(), "embeddings.position_embeddings": torch.from_numpy(positions[None]).float()}
    plain.load_state_dict(state)
    with torch.no_grad():
        expected = plain(seen[0]).last_hidden_state[:, 0]
    assert_rounded(found.float(), expected, plain)
    assert features.name == "dinov2-32" and name_of("FD", features.name, features.extractor) == "FD(dinov2-32)"
    assert "antialias=True" in features.resize


def test_fd_dinov2_is_the_name_of_the_published_weights_alone(dinov2_folder, monkeypatch):
    import transformers

    folder, network, _ = dinov2_folder
    asked = []

    def from_hub(hub_id, **options):
        asked.append((hub_id, options["revision"], options.get("local_files_only", False)))
        if options.get("local_files_only"):
            raise OSError("not in the cache")
        return network

    monkeypatch.setattr(transformers.Dinov2Model, "from_pretrained", from_hub)
    monkeypatch.setattr(networks, "is_in_reach", lambda hub_id: True)
    features = load_features("dinov2", 224)
    assert [(name, local) for name, _, local in asked] == [(DINOV2.hub_id, True), (DINOV2.hub_id, False)]
    assert {revision for _, revision, _ in asked} == {DINOV2.revision}
    assert name_of("FD", features.name, features.extractor) == "FD-DINOv2"

    monkeypatch.setattr(networks, "is_in_reach", lambda hub_id: False)
    with pytest.raises(
        FileNotFoundError,
        match="facebook/dinov2-large: model.safetensors is not in the hub's cache and cannot be fetched from",
    ):
        load_features("dinov2", 224)


def test_unknown_features_and_missing_dinov2(tmp_path):
    with pytest.raises(ValueError, match="unknown features 'vgg'"):
        load_features("vgg", 8)
    with pytest.raises(FileNotFoundError, match="--dinov2-weights"):
        load_features("dinov2", 8, tmp_path)


@pytest.fixture
def clip_folder(tmp_path):
    """A random CLIP of images of 32 by 32 pixels, with a tokenizer of bytes."""
    from tiny_models import TOKENS, make_tokenizer
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    text = {**sizes, **TOKENS, "max_position_embeddings": 24}
    network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    network.save_pretrained(tmp_path / "clip")
    make_tokenizer(24).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip", network


def test_clip_embeds_images_and_prompts_as_its_model_does(clip_folder):
    from transformers import AutoTokenizer, CLIPImageProcessor

    folder, network = clip_folder
    features = load_features("clip", 32, folder)
    images, prompts = make_images(3), ["a red sign", "night", "a sign " * 20]
    tokens = AutoTokenizer.from_pretrained(folder)(prompts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
        pixels = processor(list(images), return_tensors="pt").pixel_values
        expected = network(pixel_values=pixels, **{k: tokens[k] for k in ("input_ids", "attention_mask")})
    embedded = features(images), features.embed_text(prompts)
    for found, normalised in zip(embedded, (expected.image_embeds, expected.text_embeds), strict=True):
        assert_rounded(torch.nn.functional.normalize(found, dim=1).float(), normalised, network)
    theirs = (expected.logits_per_image.diag() / network.logit_scale.exp()).mean().item()
    assert paired_similarity(*embedded) == pytest.approx(theirs, abs=1e-5)
    assert features.num_features == 8 and features.name == "clip-8" and features.kind == "clip"


def test_names_of_subjects_and_prompts_are_those_of_published_networks(clip_folder, tmp_path, monkeypatch):
    from transformers import AutoTokenizer, CLIPModel, ViTConfig, ViTModel

    folder, network = clip_folder
    tokenizer, asked = AutoTokenizer.from_pretrained(folder), []
    sizes = {"hidden_size": 12, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    dino = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16), add_pooling_layer=False).eval()
    dino.save_pretrained(tmp_path / "dino")
    images = make_images(2)
    ours = load_features("dino", 32, tmp_path / "dino")
    with torch.no_grad():
        mean, deviation = (torch.tensor(colours)[:, None, None] for colours in IMAGENET)
        expected = dino((images.float() / 255 - mean) / deviation).last_hidden_state[:, 0]
    assert_rounded(ours(images).float(), expected, dino)
    assert name_of("similarity", ours.name, ours.extractor) == "similarity(dino-12)"

    for of_class, found in ((CLIPModel, network), (ViTModel, dino), (AutoTokenizer, tokenizer)):

        def from_hub(hub_id, found=found, **options):
            asked.append((hub_id, options))
            return found

        monkeypatch.setattr(of_class, "from_pretrained", from_hub)
    expected = {
        "dino": {"similarity": "DINO-I", "drift": "drift(dino)"},
        "clip": {"similarity": "CLIP-I", "prompt similarity": "CLIP-T", "MMD": "MMD(clip)"},
        "clip-large": {"MMD": "CMMD", "similarity": "similarity(clip-large)"},
    }
    for kind, names in expected.items():
        features = load_features(kind, 32)
        assert {number: name_of(number, features.name, features.extractor) for number in names} == names
    assert {hub_id for hub_id, _ in asked} == {DINO.hub_id, CLIP.hub_id, CLIP_LARGE.hub_id}
    assert {options["revision"] for _, options in asked} == {DINO.revision, CLIP.revision, CLIP_LARGE.revision}
    assert PUBLISHED == {
        "fid": ("fd", "inception"),
        "fd-dinov2": ("fd", "dinov2"),
        "dino-i": ("similarity", "dino"),
        "clip-i": ("similarity", "clip"),
        "clip-t": ("prompt-similarity", "clip"),
        "cmmd": ("mmd", "clip-large"),
    }
