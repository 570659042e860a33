"""eval_fid.py on prompts: a tiny PixArt and two random adapters, against the same numbers by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import make_pipeline, randomize

from onelora_diffusion import AdapterConfig, disable_adapter, inject_adapter, load_adapter, save_adapter
from onelora_diffusion.cli import eval_fid
from onelora_diffusion.evaluation.features import FEATURES, load_features, networks
from onelora_diffusion.evaluation.settings import parse
from onelora_diffusion.evaluation.sheets import HEADER
from onelora_diffusion.families import family_of
from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.sampling import SamplerSettings, generate_images

PROMPTS = ["a red sign", "a red sign at night", "a blue sign"]
UNRELATED = ["a tree", "a car"]
COLOURS = {"red/1.png": (230, 20, 20), "red/2.jpg": (200, 40, 20), "blue.png": (20, 40, 230)}
SMALL = ["--num-inference-steps", "2", "--num-images", "6", "--features", "pixels"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, two adapters of it, prompts with reference images of several sizes, and unrelated prompts."""
    folder = tmp_path_factory.mktemp("prompts")
    pipeline = make_pipeline("pixart")
    pipeline.save_pretrained(folder / "base")
    training = {"family": "pixart", "dataset": "signs", "resolution": 16, "max_sequence_length": 24, "trigger": "red"}
    for seed, name in enumerate(("one", "lr0.01")):
        config = AdapterConfig(targets=family_of(pipeline).targets)
        model = randomize(inject_adapter(make_pipeline("pixart").transformer, config), scale=0.2, seed=seed)
        save_adapter(model, folder / name, base=str(folder / "base"), training=training)
    (folder / "red").mkdir()
    for (name, colour), size in zip(COLOURS.items(), [(16, 16), (40, 30), (20, 64)], strict=True):
        Image.new("RGB", size, colour).save(folder / name, quality=95)
    rows = zip(
        ["a {trigger} sign", "a [trigger] sign at night", "a blue sign"],
        ["red", "red", ""],
        ["red", "red/1.png", "blue.png"],
        strict=True,
    )
    (folder / "signs.csv").write_text("prompt,group,image\n" + "\n".join(map(",".join, rows)))
    (folder / "unrelated.txt").write_text("\n\n".join(UNRELATED))
    return folder


def run(*arguments):
    eval_fid.main(parse([str(argument) for argument in arguments], None))


def images_of(folder, adapter, prompts):
    """What the base, or an adapter, draws of prompts: (prompts, 3, 16, 16) in uint8."""
    pipeline = load_base(folder / "base", condition=str)
    settings = SamplerSettings(num_inference_steps=2, guidance_scale=family_of(pipeline).guidance_scale(pipeline))
    load_adapter(pipeline.transformer, folder / (adapter or "one"))
    indices = range(len(prompts))

    def draw():
        batches = generate_images(
            pipeline, prompts, 0, indices, settings, size=16, max_sequence_length=24, images_at_once=1
        )
        return torch.cat([images for _, images in batches])

    if adapter:
        return draw()
    with disable_adapter(pipeline.transformer):
        return draw()


def cosines(first, second):
    first, second = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (first, second))
    return first @ second.T


def pixels(images):
    return images.flatten(1).double().numpy() / 255


def test_two_adapters_are_measured_beside_their_base(folder, capsys):
    given = ["--adapter", folder / "one", folder / "lr0.01", "--prompts", folder / "signs.csv"]
    given += ["--unrelated-prompts", folder / "unrelated.txt", "--output", folder / "out/report.json", *SMALL]
    run(*given, "--metrics", "similarity", "nearest", "mmd", "fd", "authenticity")
    report = json.loads((folder / "out/report.json").read_text())
    assert list(report["results"]) == ["base", "one", "lr0.01"] and report["prompts"] == PROMPTS
    assert report["unrelated_prompts"] == UNRELATED and report["images_at_once"] == 1

    real = torch.tensor([COLOURS[name] for name in ("red/1.png", "red/2.jpg", "blue.png")], dtype=torch.uint8)
    real = pixels(real[:, :, None, None].expand(-1, -1, 16, 16))
    base_unrelated = pixels(images_of(folder, None, UNRELATED))
    for name in ("base", "one", "lr0.01"):
        adapter = None if name == "base" else name
        found = report["results"][name]
        drawn = pixels(images_of(folder, adapter, PROMPTS * 2))
        near = cosines(drawn, real)
        by_group = [near[index, 2:] if index % 3 == 2 else near[index, :2] for index in range(6)]
        # A JPEG keeps a colour to some grey levels.
        assert found["similarity"] == pytest.approx(np.mean([each.mean() for each in by_group]), abs=2e-3)
        assert found["similarity_by_group"]
        assert found["nearest"] == pytest.approx(near.max(1).mean(), abs=2e-3) and len(found["nearest_images"]) == 6
        unrelated = pixels(images_of(folder, adapter, UNRELATED))
        assert found["drift"] == pytest.approx(1 - np.diag(cosines(unrelated, base_unrelated)).mean(), abs=1e-6)
        change = np.sqrt(np.mean((unrelated - base_unrelated) ** 2))
        assert found["drift_rms"] == pytest.approx(change, abs=1e-6) and (change > 0.01) == (name != "base")
    assert set(found) == {
        *("distance", "mmd", "similarity", "similarity_by_group", "nearest", "nearest_images", "authenticity"),
        *("drift", "drift_rms"),
    }

    printed = capsys.readouterr().out
    assert max(map(len, printed.replace(str(folder), "").splitlines())) <= 80
    for name in ("base", "one", "lr0.01"):
        line = next(line for line in printed.splitlines() if line.startswith(f"{name} "))
        assert f"{report['results'][name]['distance']:.4f}" in line
    assert "similarity(pixels)" in printed and "drift(pixels)" in printed and "MMD(pixels)" in printed
    assert "the real images of its own group" in " ".join(printed.split())

    sheet = np.array(Image.open(folder / "out/report.png"))
    drawn = images_of(folder, "lr0.01", PROMPTS)
    top, tile = HEADER, sheet.shape[1] - 68  # the last block on the right
    assert sheet.shape[0] == top + 3 * 66 + 2
    for row, image in enumerate(drawn):
        expected = image.permute(1, 2, 0).repeat_interleave(4, 0).repeat_interleave(4, 1).numpy()
        assert np.array_equal(sheet[top + 2 + 66 * row :, tile + 2 :][:64, :64], expected)
    nearest = np.array(Image.open(folder / "out/report-nearest.png"))
    shown = nearest[-3 * 66 :, -66:][:64, :64].reshape(-1, 3)[0]
    assert np.abs(shown.astype(int) - [*COLOURS.values()][found["nearest_images"][0]]).max() < 8


def test_a_prompt_adapter_needs_no_real_images_for_drift_and_a_folder_has_them_of_any_kind(folder, tmp_path, capsys):
    given = ["--adapter", folder / "one", "--prompts", folder / "unrelated.txt", *SMALL]
    unrelated = ["--unrelated-prompts", folder / "unrelated.txt", "--metrics", "drift"]
    run(*given, *unrelated, "--output", tmp_path / "drift.json")
    report = json.loads((tmp_path / "drift.json").read_text())
    assert report["reference"] is None and set(report["results"]["adapted"]) == {"drift", "drift_rms"}
    assert "drift(pixels)" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drift.json", "drift.png"]

    shutil.copytree(folder / "red", tmp_path / "red")
    run(*given, "--reference", tmp_path / "red", "--output", tmp_path / "red.json", "--metrics", "similarity")
    report = json.loads((tmp_path / "red.json").read_text())
    assert report["reference"]["count"] == 2 and not report["results"]["base"]["similarity_by_group"]
    assert report["reference"]["crop"] == "ADM centre crop" and set(report["results"]) == {"base", "adapted"}


def test_a_published_name_is_given_to_published_weights_alone(folder, tmp_path, monkeypatch, capsys):
    """CLIP-T is the cosine of images and prompts, by the features of the row that has this name."""

    class Embedder(type(load_features("pixels", 16))):
        def embed_text(self, prompts):
            return torch.stack([self(torch.full((1, 3, 16, 16), len(p), dtype=torch.uint8))[0] for p in prompts])

    for name in ("clip", "dino"):
        row = FEATURES[name]
        monkeypatch.setitem(FEATURES, name, type(row)(lambda resolution, weights: Embedder(16), None, (), row.names))
    given = ["--adapter", folder / "one", "--prompts", folder / "signs.csv", *SMALL[:4], "--no-compare-base"]
    run(*given, "--output", tmp_path / "all.json")  # the default: DINO-I, CLIP-I, CLIP-T and the nearest images
    dino, clip = (lambda report: (report, *report["further"]))(json.loads((tmp_path / "all.json").read_text()))
    assert {"prompt_similarity", "similarity", "nearest"} <= set(clip["results"]["adapted"])
    assert "prompt_similarity" not in dino["results"]["adapted"] and "distance" not in dino["results"]["adapted"]
    drawn = pixels(images_of(folder, "one", PROMPTS * 2))
    expected = cosines(drawn, np.ones((1, drawn.shape[1]))).mean()
    assert clip["results"]["adapted"]["prompt_similarity"] == pytest.approx(expected, abs=1e-6)
    assert "prompt similarity(pixels)" in capsys.readouterr().out


def error_of(*arguments):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    message = str(caught.value.code)
    assert message.startswith("eval_fid.py: ") and "\n" not in message
    return message


def test_what_is_wrong_is_one_line_before_anything_is_drawn(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "is_in_reach", lambda hub_id: False)
    files = {
        "empty.txt": b"\n \n",
        "picture.txt": b"\x89PNG\xff\xfe\x00",
        "columns.csv": b"text,image\na sign,1.png\n",
        "empty.csv": b"prompt\n",
        "missing.csv": b"prompt,image\na sign,none.png\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    output = tmp_path / "out" / "report.json"
    good = ["--output", output, "--adapter", folder / "one"]
    texts = [*good, "--prompts"]
    assert "empty.txt has no prompt: write one a line" in error_of(*texts, tmp_path / "empty.txt")
    assert "empty.csv has no prompt" in error_of(*texts, tmp_path / "empty.csv")
    assert "picture.txt is no text in UTF-8" in error_of(*texts, tmp_path / "picture.txt")
    assert "has the columns text, image" in error_of(*texts, tmp_path / "columns.csv")
    assert "none.png, which is not in" in error_of(*texts, tmp_path / "missing.csv")
    assert "No such file" in error_of(*texts, tmp_path / "none.txt")
    signs = [*texts, folder / "signs.csv"]
    found = error_of(*signs)
    assert "facebook/dino-vits16: pytorch_model.bin is not in the hub's cache and cannot be fetched from" in found
    assert "https://huggingface.co/facebook/dino-vits16" in found and "--dino-weights" in found
    assert "clip-vit-large-patch14-336" in error_of(*signs, "--metrics", "CMMD")
    assert "--clip-weights takes a folder" in error_of(*signs, "--metrics", "clip-t", "--clip-weights", tmp_path)
    assert "--metrics beauty is unknown: choose from" in error_of(*signs, "--metrics", "beauty")
    assert "--metrics drift needs prompts that" in error_of(*signs, "--metrics", "drift")
    assert "prompt-similarity needs --features clip" in error_of(*signs, *SMALL, "--metrics", "prompt-similarity")
    plain = [*texts, folder / "unrelated.txt", *SMALL]
    assert "--metrics similarity compares with real images" in error_of(*plain, "--metrics", "similarity")
    assert "draws prompts: give --prompts" in error_of(*good, *SMALL)
    unread = error_of(*plain, "--labels", "dataset", "--reference", folder / "red")
    assert "--labels dataset draws the classes of a --dataset" in unread
    shutil.copytree(folder / "one", tmp_path / "more" / "one")
    twice = error_of(*signs, "--adapter", folder / "one", tmp_path / "more" / "one")
    assert "has the name 'one', as has" in twice
    shutil.copytree(folder / "lr0.01", tmp_path / "lr0_01")
    twice = error_of(*signs, "--adapter", folder / "lr0.01", tmp_path / "lr0_01")
    assert "has the name 'lr0_01', as has" in twice
    (tmp_path / "place.txt").write_text("a {trigger} sign")
    without = error_of("--adapter", "None", "--base", folder / "base", "--prompts", tmp_path / "place.txt")
    assert "'a {trigger} sign' has {trigger}, and no adapter here has a trigger word: write the word" in without
    pipeline = make_pipeline("sd3")
    pipeline.save_pretrained(tmp_path / "other-base")
    model = inject_adapter(pipeline.transformer, AdapterConfig(targets=family_of(pipeline).targets))
    facts = {"family": "sd3", "dataset": "signs"}
    save_adapter(model, tmp_path / "other", base=str(tmp_path / "other-base"), training=facts)
    both = ["--adapter", folder / "one", tmp_path / "other"]
    assert "adapters of several bases, 'one' for" in error_of(*signs, *both)
    assert "other" in error_of(*signs, *both, "--base", folder / "base", *SMALL)
    save_adapter(
        model, tmp_path / "endless", base=str(folder / "base"), training=facts | {"max_sequence_length": 10**9}
    )
    (tmp_path / "one.txt").write_text("a red sign")
    endless = error_of("--adapter", tmp_path / "endless", "--prompts", tmp_path / "one.txt", *SMALL)
    assert "an adapter's file gives max_sequence_length as 1000000000: 1 to 10,000 are taken" in endless
    assert not output.parent.exists() and not list(Path(folder / "one").glob("*.json"))
