"""Files of statistics in the layouts of ADM's evaluator and of pytorch-fid; files from strangers."""

import json
import zipfile

import numpy as np
import pytest
import torch

from onelora_diffusion.cli import eval_fid
from onelora_diffusion.evaluation.features import FEATURES, UNTOLD, FeatureKind
from onelora_diffusion.evaluation.features.base import Features
from onelora_diffusion.evaluation.features.dinov2 import DINOV2
from onelora_diffusion.evaluation.features.pixels import PixelFeatures
from onelora_diffusion.evaluation.images import Source
from onelora_diffusion.evaluation.settings import parse
from onelora_diffusion.evaluation.statistics import FeatureStatistics, Measured, Origin
from onelora_diffusion.evaluation.statistics_file import is_statistics, load_statistics, save_statistics


class NarrowInception(Features):
    """Stands for Inception in these tests: 12 features and 7 spatial ones, which are means of pixels."""

    name, extractor, resize = "inception", "narrow", "none"
    num_features, num_spatial = 12, 7

    def forward(self, images):
        return images.double().flatten(1).unfold(1, 4, 4).mean(-1)[:, :12] / 255

    def with_spatial(self, images):
        return self(images), images.double().flatten(1)[:, 5:12] / 255


def make_images(count, seed):
    return np.random.default_rng(seed).integers(0, 256 - 60 * seed, (count, 4, 4, 3), dtype=np.uint8)


def moments(images):
    """As ADM's evaluator has them: NumPy's mean and unbiased covariance."""
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    pooled, spatial = (each.numpy() for each in NarrowInception().with_spatial(tensor))
    return {
        "mu": pooled.mean(0),
        "sigma": np.cov(pooled, rowvar=False),
        "mu_s": spatial.mean(0),
        "sigma_s": np.cov(spatial, rowvar=False),
    }


def frechet(first, second, suffix=""):
    """By SciPy's root of the product, as ADM's evaluator and pytorch-fid take it."""
    scipy_linalg = pytest.importorskip("scipy.linalg")
    mean = first["mu" + suffix] - second["mu" + suffix]
    sigmas = first["sigma" + suffix], second["sigma" + suffix]
    root = scipy_linalg.sqrtm(sigmas[0] @ sigmas[1]).real
    return float(mean @ mean + np.trace(sigmas[0]) + np.trace(sigmas[1]) - 2 * np.trace(root))


def run(*arguments):
    eval_fid.main(parse([str(argument) for argument in arguments], None))


def results_of(path):
    (results,) = json.loads(path.read_text())["results"].values()
    return results


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """a.npz and b.npz hold images; adm.npz also b's statistics in ADM's layout, pytorch-fid.npz these alone."""
    kind = FeatureKind(lambda resolution, weights: NarrowInception(), "inception_weights", width=12)
    monkeypatch.setitem(FEATURES, "inception", kind)
    a, b = make_images(60, 0), make_images(50, 1)
    np.savez(tmp_path / "a.npz", a)
    np.savez(tmp_path / "b.npz", b)
    np.savez(tmp_path / "adm.npz", b[:20], **moments(b))  # ADM's files keep some of the images only
    np.savez(tmp_path / "pytorch-fid.npz", **{key: moments(b)[key] for key in ("mu", "sigma")})
    return tmp_path, moments(a), moments(b)


def test_images_own_statistics_and_adms_give_one_distance(sets):
    folder, a, b = sets
    for name in ("a", "b"):
        for suffix in (".safetensors", ".npz"):
            output = folder / f"{name}-own{suffix}"
            run("ref", "--images", folder / f"{name}.npz", "--features", "inception", "--output", output)
    found = {}
    for images, reference in (
        ("a.npz", "b.npz"),
        ("a.npz", "b-own.safetensors"),
        ("a.npz", "b-own.npz"),
        ("a.npz", "adm.npz"),
        ("a-own.safetensors", "b-own.npz"),
        ("a-own.npz", "adm.npz"),
        ("a-own.npz", "b.npz"),
    ):
        flags = ["--features", "inception", "--metrics", "sfid", "--output", folder / "calc.json"]
        run("calc", "--images", folder / images, "--reference", folder / reference, *flags)
        found[images, reference] = results_of(folder / "calc.json")
    for pair, results in found.items():
        assert results["distance"] == pytest.approx(frechet(a, b), rel=1e-6), pair
        assert results["sfid"] == pytest.approx(frechet(a, b, "_s"), rel=1e-6), pair

    flags = ["--features", "inception", "--output", folder / "calc.json"]
    run("calc", "--images", folder / "a.npz", "--reference", folder / "pytorch-fid.npz", *flags)
    assert results_of(folder / "calc.json")["distance"] == pytest.approx(frechet(a, b), rel=1e-6)


def test_our_npz_is_the_layout_of_adms_evaluator(sets):
    folder, _, b = sets
    run("ref", "--images", folder / "b.npz", "--features", "inception", "--output", folder / "ours.npz")
    with np.load(folder / "ours.npz") as ours:
        for key, expected in b.items():
            assert ours[key].dtype == np.float64
            np.testing.assert_allclose(ours[key], expected, rtol=1e-9, atol=1e-12)


def test_the_report_says_where_the_statistics_are_from_and_images_beside_them_serve_the_other_metrics(sets, capsys):
    folder, a, b = sets
    flags = ["--features", "inception", "--metrics", "precision-recall", "--output", folder / "calc.json"]
    run("calc", "--images", folder / "a.npz", "--reference", folder / "adm.npz", *flags)
    report, printed = json.loads((folder / "calc.json").read_text()), " ".join(capsys.readouterr().out.split())
    assert report["reference"]["extractor"] == UNTOLD and report["reference"]["count"] is None
    assert "mean and covariance as another tool wrote them" in printed
    adm = results_of(folder / "calc.json")
    np.savez(folder / "kept.npz", np.load(folder / "adm.npz")["arr_0"])
    run("calc", "--images", folder / "a.npz", "--reference", folder / "kept.npz", *flags)
    kept = results_of(folder / "calc.json")
    assert (adm["precision"], adm["recall"]) == (kept["precision"], kept["recall"])
    assert adm["distance"] == pytest.approx(frechet(a, b), rel=1e-6) and adm["distance"] != kept["distance"]


def error_of(*arguments):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    message = str(caught.value.code)
    assert message.startswith("eval_fid.py: ") and "\n" not in message
    return message


def test_statistics_of_inception_do_not_serve_other_features(sets):
    folder, *_ = sets
    calc = ["calc", "--images", folder / "a.npz", "--reference", folder / "adm.npz"]
    assert "is taken at 12 for inception's and at 1,024 for dinov2's): choose --features inception" in error_of(
        *calc, "--features", "pixels"
    )
    assert "needs the images" in error_of(*calc[:3], "--reference", folder / "pytorch-fid.npz", "--metrics", "kid")
    assert "no spatial statistics" in error_of(
        *calc[:3], "--reference", folder / "pytorch-fid.npz", "--metrics", "sfid"
    )
    assert "give them by --reference" in error_of(*calc[:3])
    filed = ["calc", "--images", folder / "adm.npz", "--reference", folder / "b.npz"]
    assert "is statistics of inception: leave --features out" in error_of(*filed, "--features", "pixels")
    assert "several files are statistics; images are one set" in error_of(*calc[:3], "--reference", *["b.npz"] * 2)


def test_kept_features_serve_the_other_metrics_without_a_second_pass(sets):
    folder, *_ = sets
    run(
        "ref",
        "--images",
        folder / "b.npz",
        "--features",
        "inception",
        "--keep-features",
        "--output",
        folder / "b.safetensors",
    )
    metrics = ["--metrics", "kid", "precision-recall", "density-coverage"]
    found = []
    for reference in ("b.safetensors", "b.npz"):
        flags = ["--features", "inception", *metrics, "--output", folder / "calc.json"]
        run("calc", "--images", folder / "a.npz", "--reference", folder / reference, *flags)
        found.append(results_of(folder / "calc.json"))
    assert found[0] == pytest.approx(found[1], rel=1e-9) and {"kid", "recall", "density", "coverage"} <= set(found[0])
    assert load_statistics(folder / "b.safetensors").kept is None  # read only where a metric asks for them


def test_several_features_in_one_pass_and_their_files(sets):
    folder, a, b = sets
    both = ["--features", "inception", "pixels"]
    outputs = [folder / "i.safetensors", folder / "p.safetensors"]
    run("ref", "--images", folder / "b.npz", *both, "--output", *outputs)
    run(
        "calc",
        "--images",
        folder / "a.npz",
        "--reference",
        *outputs,
        *both,
        "--metrics",
        "sfid",
        "--output",
        folder / "calc.json",
    )
    report = json.loads((folder / "calc.json").read_text())
    (pixels,) = report["further"]
    assert report["distance_name"] == "FD(inception)" and pixels["distance_name"] == "FD(pixels)"
    assert report["results"]["a.npz"]["distance"] == pytest.approx(frechet(a, b), rel=1e-6)
    assert "sfid" in report["results"]["a.npz"] and "sfid" not in pixels["results"]["a.npz"]
    run(
        "calc",
        "--images",
        folder / "a.npz",
        "--reference",
        folder / "b.npz",
        "--features",
        "pixels",
        "--output",
        folder / "calc.json",
    )
    assert pixels["results"]["a.npz"]["distance"] == pytest.approx(
        results_of(folder / "calc.json")["distance"], rel=1e-9
    )
    assert "2 --features need as many files" in error_of(
        "ref", "--images", folder / "b.npz", *both, "--output", outputs[0]
    )


# ---------------------------------------------------------------------------------------------------
# Files from strangers


def test_arrays_that_are_no_statistics_are_refused(tmp_path):
    def refused(message, **arrays):
        np.savez(tmp_path / "wrong.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            load_statistics(tmp_path / "wrong.npz")

    refused("sigma is missing", mu=np.zeros(3))
    refused(r"a mean \(3,\) and a covariance \(2, 2\) do not fit", mu=np.zeros(3), sigma=np.eye(2))
    refused("sigma is <U1", mu=np.zeros(3), sigma=np.array("x"))
    refused("not finite", mu=np.full(3, np.nan), sigma=np.eye(3))
    refused("its resolution is 'large'", mu=np.zeros(3), sigma=np.eye(3), origin=np.array('{"resolution": "large"}'))
    refused("newer version", mu=np.zeros(3), sigma=np.eye(3), origin=np.array('{"colour": "red"}'))


def test_a_file_that_tells_nothing_is_taken_for_the_features_of_which_there_are_as_many(tmp_path):
    names = {}
    for width in (2048, 1024, 768):
        np.savez(tmp_path / f"{width}.npz", mu=np.zeros(width), sigma=np.eye(width))
        origin = load_statistics(tmp_path / f"{width}.npz").origin
        names[width] = origin.features, origin.distance_name
    unknown = "unknown-768", "FD(unknown-768)"
    assert names == {2048: ("inception", "FID"), 1024: ("dinov2", "FD(dinov2)"), 768: unknown}

    filed = load_statistics(tmp_path / "1024.npz").origin
    for features, extractor in (("dinov2", DINOV2.extractor), ("dinov2-1024", "a folder's digest")):
        Origin(features, extractor, "bicubic", 256, "images").check_comparable(filed)
    for features in ("inception", "dinov2-768", "inception-random"):
        with pytest.raises(
            ValueError, match=f"features {features}, but .*1024.npz' dinov2 .*choose --features dinov2"
        ):
            Origin(features, "digest", "none", 256, "images").check_comparable(filed)


def test_features_one_by_one_of_dgm_eval_are_statistics_and_serve_the_other_metrics(tmp_path):
    features = np.random.default_rng(0).standard_normal((9, 1024))
    hparams = np.array({"nimages": 9}, dtype=object)  # its file has a pickled object beside them, which is not read
    np.savez(tmp_path / "reps.npz", model="dinov2", reps=features, hparams=hparams)
    assert is_statistics(tmp_path / "reps.npz")
    found = load_statistics(tmp_path / "reps.npz", keep=True)
    np.testing.assert_allclose(found.statistics.mean, features.mean(0), atol=1e-12)
    np.testing.assert_allclose(found.statistics.covariance, np.cov(features, rowvar=False), atol=1e-12)
    np.testing.assert_allclose(found.kept, features, rtol=1e-6)
    assert found.statistics.count == 9 and found.origin.features == "dinov2"
    assert load_statistics(tmp_path / "reps.npz").kept is None
    np.savez(tmp_path / "reps.npz", reps=features[0])
    with pytest.raises(ValueError, match=r"reps is \(1024,\), not \(images, d\)"):
        load_statistics(tmp_path / "reps.npz")


def test_pickles_are_refused_unread(sets):
    folder, *_ = sets
    (folder / "img512.pkl").write_bytes(b"cos\nsystem\n(S'touch run'\ntR.")
    calc = ["calc", "--images", folder / "a.npz", "--reference", folder / "img512.pkl", "--features", "inception"]
    assert "img512.pkl' is a pickle, as EDM2 writes statistics, and is not read" in error_of(*calc)
    assert "is a pickle" in error_of("calc", "--images", folder / "img512.pkl", "--reference", folder / "a.npz")
    with pytest.raises(ValueError, match="is a pickle"):
        load_statistics(folder / "img512.pkl")


def test_images_are_not_compared_with_features_that_nobody_knows(sets):
    folder, *_ = sets
    np.savez(folder / "wide.npz", mu=np.zeros(13), sigma=np.eye(13))
    calc = ["calc", "--images", folder / "a.npz", "--reference", folder / "wide.npz"]
    assert "statistics of 13 features, of which their file does not tell what they are" in error_of(*calc)


def test_an_array_larger_than_its_file_is_refused_before_it_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "wide.npz", "w") as archive:
        for name, shape in (("mu", (10**6,)), ("sigma", (10**6, 10**6))):
            with archive.open(f"{name}.npy", "w") as member:
                header = {"descr": "<f8", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
    with pytest.raises(ValueError, match="wide.npz' is damaged: mu is"):
        load_statistics(tmp_path / "wide.npz")


def test_control_characters_of_a_file_are_not_shown(tmp_path):
    statistics = FeatureStatistics(torch.zeros(2).double(), torch.eye(2).double(), 9)
    origin = Origin.of(PixelFeatures(4), Source("\x1b[2Jname", 4))
    for name in ("own.safetensors", "own.npz"):
        save_statistics(tmp_path / name, Measured(statistics, origin))
        assert is_statistics(tmp_path / name)
        filed = load_statistics(tmp_path / name)
        assert filed.origin.dataset == " [2Jname" and torch.equal(filed.statistics.covariance, statistics.covariance)
