"""What is shipped: the wheel, the public names, and the README's first snippet."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import onelora_diffusion

REPOSITORY = Path(__file__).parents[1]
SHIPPED_BESIDE = (
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "SECURITY.md",
    "pyproject.toml",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a wheel and an sdist, built from a copy of the tree."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("package")
    for name in ("onelora_diffusion", "benchmarks", "tools", "tests", "docs"):
        shutil.copytree(REPOSITORY / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*SHIPPED_BESIDE, "onelora.py", "train_dit.py", "benchmark.py"):
        shutil.copy(REPOSITORY / name, folder / "tree")
    build(folder / "tree", "wheel", folder / "dist")
    build(folder / "tree", "sdist", folder / "dist")
    return folder / "dist"


def build(tree: Path, kind: str, output: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(output)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_the_package_and_the_miniature_and_no_workshop(built):
    names = names_in(next(built.glob("*.whl")))
    shipped = (path for path in (REPOSITORY / "onelora_diffusion").rglob("*") if path.is_file())
    assert names == {"onelora.py"} | {str(path.relative_to(REPOSITORY)) for path in shipped if path.suffix != ".pyc"}
    assert {"onelora_diffusion/cli/recipes/digits.yaml", "onelora_diffusion/cli/recipes/digit_words.yaml"} <= names
    assert "onelora_diffusion/miniature/transformer/diffusion_pytorch_model.safetensors" in names
    assert "onelora_diffusion/py.typed" in names


def test_the_sdist_builds_that_wheel(built, tmp_path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()} - {""}
        sdist.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    rooms = {name.partition("/")[0] for name in names if "/" in name}
    assert rooms == {"onelora_diffusion", "onelora_diffusion.egg-info"}
    files = {name for name in names - rooms if "/" not in name}
    assert files == {*SHIPPED_BESIDE, "onelora.py", "PKG-INFO", "setup.cfg"}
    build(tree, "wheel", tmp_path / "dist")
    assert names_in(next((tmp_path / "dist").glob("*.whl"))) == names_in(next(built.glob("*.whl")))


def test_the_forges_workflow_runs_our_checks_on_every_python_that_is_promised():
    (job,) = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())["jobs"].values()
    project = (REPOSITORY / "pyproject.toml").read_text()
    promised = re.findall(r"Programming Language :: Python :: (3\.\d+)", project)
    assert job["strategy"]["matrix"]["python"] == promised and f'requires-python = ">={promised[0]}"' in project
    assert [step.get("run") for step in job["steps"]][-1] == ".ci/run"


def packages_imported_by(nodes) -> set[str]:
    """The top-level names that import statements among the nodes ask for."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"onelora_diffusion"}


# Modules that nothing but a script of this extra imports.
OF_EXTRA = (
    {"peft.py": "peft"}
    | {f"serving/{name}.py": "serve" for name in ("access", "api", "launching", "metrics", "request", "service")}
    | {"serving/ray_app.py": "ray"}
)


def test_every_package_that_is_imported_is_declared():
    """At the top of a module, what always comes with the package; inside a function, it may be an extra's."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras_of = project["optional-dependencies"]
    always, extras, *own = (
        {canonicalize_name(Requirement(text).name) for text in texts}
        for texts in (
            project["dependencies"],
            sum(extras_of.values(), []),
            *(extras_of[extra] for extra in OF_EXTRA.values()),
        )
    )
    own_of = dict(zip(OF_EXTRA, own, strict=True))
    distributions = importlib.metadata.packages_distributions()  # of what is not installed, the name is the same
    for path in (REPOSITORY / "onelora_diffusion").rglob("*.py"):
        tree = ast.parse(path.read_text())
        at_top = always | own_of.get(path.relative_to(REPOSITORY / "onelora_diffusion").as_posix(), set())
        for nodes, declared in ((tree.body, at_top), (ast.walk(tree), always | extras)):
            for name in packages_imported_by(nodes):
                owners = {canonicalize_name(owner) for owner in distributions.get(name, [name])}
                assert owners & declared, f"{path.name} imports {name} of {', '.join(owners)}"


def test_every_place_tells_the_same_version():
    assert f'version = "{onelora_diffusion.__version__}"' in (REPOSITORY / "pyproject.toml").read_text()
    assert f"version: {onelora_diffusion.__version__}\n" in (REPOSITORY / "CITATION.cff").read_text()


def test_dir_lists_every_public_name():
    assert set(onelora_diffusion.__all__) <= set(dir(onelora_diffusion))
    assert (onelora_diffusion.miniature_path() / "model_index.json").is_file()


def test_the_readmes_first_snippet_runs_without_a_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snippet = re.search(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)[1]
    names = {}
    exec(snippet, names)
    trainable = onelora_diffusion.count_trainable(names["transformer"])
    assert f"# {trainable};" in snippet
    file = onelora_diffusion.read_adapter("runs/mine")
    assert file.id2label == {0: "five"} and sum(tensor.numel() for tensor in file.tensors.values()) == trainable
