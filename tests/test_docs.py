"""The README and the guides say what is: snippets run, commands are understood, links lead somewhere.

A snippet that needs what a test has not begins with `# needs ...`, and is looked at without being run. In others a hub
id is a folder of a small random pipeline here, and `runs/food101`, `runs/birds` and `runs/text-to-image` are adapters.
"""

import ast
import importlib
import inspect
import json
import re
import shlex
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from research_models import inputs_of, make_model
from tiny_models import dit_inputs, make_dit, make_dit_pipeline, make_pipeline

import onelora_diffusion
from onelora_diffusion import AdapterConfig, inject_adapter, save_adapter

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
NOTEBOOK = REPOSITORY / "docs/notebook.ipynb"
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
NEEDS = "# needs "


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def snippets(page: Path) -> list[str]:
    return [code for language, code in FENCE.findall(page.read_text()) if language == "python"]


# ---------------------------------------------------------------------------------------------------
# Python


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What snippets find: bases by their hub ids, and adapters of them."""
    folder = tmp_path_factory.mktemp("docs")
    dit = make_dit(num_classes=1000)
    names = {label: f"class {label}" for label in range(1000)}
    make_dit_pipeline(dit, id2label=names).save_pretrained(folder / "facebook/DiT-XL-2-256")
    sd3 = make_pipeline("sd3")
    sd3.save_pretrained(folder / "stabilityai/stable-diffusion-3.5-medium")
    for name, classes in (("food101", {0: "pizza", 1: "sushi"}), ("birds", {0: "robin", 1: "wren"})):
        adapted = inject_adapter(deepcopy(dit), AdapterConfig(num_classes=2))
        save_adapter(adapted, folder / "runs" / name, id2label=classes, base="facebook/DiT-XL-2-256")
    save_adapter(inject_adapter(sd3.transformer, AdapterConfig()), folder / "runs/text-to-image")
    return folder


def given(page: Path) -> dict:
    """Names that a page's snippets take for granted: a model of its reader's, and what it is called with."""
    names = {"torch": torch, "deepcopy": deepcopy}
    if page.name == "research_models.md":
        names["model"] = make_model("DiT", num_classes=1000)
        return names | dict(zip("xty", inputs_of("DiT", 2), strict=True))
    if page.name == "loading.md":
        inputs = dit_inputs()
        names |= {
            "latents": inputs["hidden_states"],
            "timesteps": inputs["timestep"],
            "labels": torch.tensor([0, 1, 7]),
        }
        return names | {"flux": make_pipeline("flux")}
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=name_of)
def test_snippets_run(page, folder, monkeypatch, tmp_path):
    for kept in ("facebook", "stabilityai", "runs"):
        (tmp_path / kept).mkdir()
        for content in (folder / kept).iterdir():
            (tmp_path / kept / content.name).symlink_to(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names, per_snippet = {}, page.name == "research_models.md"  # its model is loaded anew in each
    for number, code in enumerate(snippets(page)):
        if number == 0 or per_snippet:
            names |= given(page)
        compiled = compile(code, f"{name_of(page)}, snippet {number + 1}", "exec")
        if code.startswith(NEEDS):
            check_names(code)
        else:
            exec(compiled, names)


def check_names(code: str) -> None:
    """An error for a name that is not to be imported, or an argument that its function does not take.

    Packages that are not installed, as those of extras, are left out.
    """
    tree, names = ast.parse(code), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            try:
                exec(ast.unparse(node), names)
            except ModuleNotFoundError as error:
                assert error.name.partition(".")[0] != "onelora_diffusion", error
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            arguments = {keyword.arg: None for keyword in node.keywords}
            inspect.signature(names[node.func.id]).bind(*[None] * len(node.args), **arguments)


def test_the_notebook_runs(monkeypatch, tmp_path):
    """With a few updates: its outputs are from a run with all of them, `make notebook`."""
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names = {}
    for number, cell in enumerate(cells, 1):
        code = re.sub(r"^STEPS = \d+", "STEPS = 3", "".join(cell["source"]), flags=re.MULTILINE)
        code = code.replace("num_inference_steps=20", "num_inference_steps=2")
        exec(compile(code, f"cell {number}", "exec"), names)
        assert cell["execution_count"] == number and not any(out["output_type"] == "error" for out in cell["outputs"])
    assert names["STEPS"] == 3
    assert names["before"] == names["after"]  # drawn by the mixture, and by what was loaded of it
    drawn = [cell for cell in cells if "make_image_grid(" in cell["source"][-1]]
    assert len(drawn) == 6 and all("image/png" in cell["outputs"][-1]["data"] for cell in drawn)


# ---------------------------------------------------------------------------------------------------
# Commands


def commands(page: Path) -> list[list[str]]:
    """Words of every command line: in fences without a language, in indented lines, and between backticks."""
    text = page.read_text()
    blocks = [code for language, code in FENCE.findall(text) if language in ("", "bash", "sh")]
    prose = FENCE.sub("", text)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += [line for line in prose.replace("\\\n", " ").splitlines() if line.startswith("    ")]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    found = []
    for line in lines:
        if not re.match(r"\s*(\w+=\S+ )*(\S*/)?(python3?|pytest|make|accelerate|torchrun|onelora) ", line):
            continue
        words = shlex.split(line, comments=True)
        while "=" in words[0]:  # of the environment
            words.pop(0)
        found.append([Path(words[0]).name, *(word for word in words[1:] if word != "...")])
    return found


CLI = "onelora_diffusion.cli."
COMMANDS = {(name_of(page), *words) for page in PAGES for words in commands(page)}


def test_commands_are_found():
    assert len(COMMANDS) > 60
    assert (
        "README.md",
        "python",
        "train_dit.py",
        "--dataset",
        "food101",
        "--data-root",
        "data",
        "--download",
    ) in COMMANDS
    assert ("docs/evaluation.md", "python", "tools/check_rounding.py") in COMMANDS


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands_are_understood(page, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for words in commands(page):
        check_command(words, monkeypatch)


def check_command(words: list[str], monkeypatch) -> None:
    program, *rest = words
    if program == "make":
        makefile = (REPOSITORY / "Makefile").read_text()
        known = {*re.findall(r"^([\w-]+):", makefile, re.MULTILINE), *re.findall(r"\$\((\w+)\)", makefile)}
        assert {word.partition("=")[0] for word in rest} <= known, words
    elif program == "onelora" and not rest[0].startswith("-"):
        module = CLI + rest[0].replace("-", "_")
        assert (REPOSITORY / module.replace(".", "/")).with_suffix(".py").is_file(), words
        if rest[1:]:
            check_script(module, rest[1:], monkeypatch)
    elif program == "onelora":
        assert rest[0] in ("--help", "--tyro-write-completion")
    elif program == "pytest" or rest[:2] == ["-m", "pytest"]:
        check_tests(rest if program == "pytest" else rest[2:])
    elif "-m" in rest[:-1] and rest[rest.index("-m") + 1].startswith(("tools.", CLI)):
        module = rest.index("-m") + 1
        check_script(rest[module], rest[module + 1 :], monkeypatch)
    elif rest[0] == "-m":
        pass  # of another package
    elif script := next((word for word in rest if word.endswith(".py") and not word.startswith("-")), None):
        arguments = rest[rest.index(script) + 1 :]
        assert (REPOSITORY / script).is_file(), words
        check_script(script.removesuffix(".py").replace("/", "."), arguments, monkeypatch)


def check_script(module: str, arguments: list[str], monkeypatch) -> None:
    """Runs what a script does when it is started, as far as its `main`."""
    if arguments == ["--help"]:
        return
    if (REPOSITORY / CLI.replace(".", "/") / module).with_suffix(".py").is_file():
        module = CLI + module
    if (REPOSITORY / module.replace(".", "/")).is_dir():
        module += ".__main__"
    try:
        script, asked = importlib.import_module(module), []
    except SystemExit:  # it has said which packages it needs
        source = (REPOSITORY / module.replace(".", "/")).with_suffix(".py").read_text()
        asked = {word[2:].replace("-", "_") for word in arguments if word.startswith("--")}
        assert asked <= set(FIELD.findall(source)), arguments
        return
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    try:
        if module.startswith(CLI):
            with monkeypatch.context() as patched:
                patched.setattr(script, "main", lambda settings, *since: asked.append(settings))
                patched.setattr(script, "start_all_processes", lambda: None, raising=False)
                script.run(arguments)
            assert asked
            return
        if not inspect.signature(script.main).parameters:  # it parses inside, or takes none
            assert not arguments or script.parse(arguments)
            return
        names = vars(script) | {"main": lambda *settings: asked.extend(settings)}
        (block,) = (node for node in ast.parse(inspect.getsource(script)).body if is_start(node))
        exec(compile(ast.Module(block.body, []), module, "exec"), names)
    except SystemExit as ended:
        assert not ended.code, f"{module} {shlex.join(arguments)}: {ended.code}"
    assert asked


def is_start(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)


def check_tests(words: list[str]) -> None:
    """Files that are there, and a `-k` whose words are in them."""
    keyword = words[words.index("-k") + 1] if "-k" in words else ""
    places = [REPOSITORY / word for word in words if word.startswith("tests")]
    assert places and all(place.exists() for place in places), words
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("test_*.py"))]
    text = " ".join(file.name + file.read_text() for file in files)  # parameters are in names of tests too
    for word in set(re.findall(r"\w+", keyword)) - {"or", "and", "not"}:
        assert word in text, f"{words}: no test of {word}"


FIELD = re.compile(r"^    (\w+): ", re.MULTILINE)
SCRIPTS = [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("tools/*.py"), *REPOSITORY.glob("benchmarks/*.py")]
SETTINGS = [*SCRIPTS, *(REPOSITORY / "onelora_diffusion").rglob("*.py")]
FLAGS = {name.replace("_", "-") for path in SETTINGS for name in FIELD.findall(path.read_text())}
THEIRS = {"cache_latents", "num_processes", "cpu", "help", "lora_alpha", "lora_rank", "network_module"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_that_are_spoken_of_are_there(page):
    known = FLAGS | THEIRS
    prose = FENCE.sub("", page.read_text())
    for code in re.findall(r"`(--[^`]+)`", prose):
        flag = re.match(r"--([\w-]+)", code)[1]
        assert flag in known or flag.removeprefix("no-") in known, f"{name_of(page)}: {code}"


# ---------------------------------------------------------------------------------------------------
# The site


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#][^)]*)\)", re.sub(r"`[^`]*`", "", FENCE.sub("", page.read_text()))):
        if not target.startswith("https://"):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_the_reference_has_every_public_name():
    named = re.findall(r"^::: onelora_diffusion\.([\w.]+)$", (REPOSITORY / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted([*onelora_diffusion.__all__, "diffusion.training_losses", "peft.OneLoraConfig"])


def test_every_guide_is_in_the_menu():
    menu = (REPOSITORY / "mkdocs.yml").read_text()
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert page.name in menu, page


def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path, monkeypatch, caplog):
    """Strict: a warning is an error. What a page loads (scripts, styles, fonts, pictures) comes with the site."""
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("nbconvert")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(REPOSITORY)
    config = load_config(str(REPOSITORY / "mkdocs.yml"), site_dir=str(tmp_path), strict=True)
    build(config)
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(list((REPOSITORY / "docs").glob("*.md")))
    for page in pages:
        loaded = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=\"?([^\" >]+)", page.read_text())
        assert loaded and not [url for url in loaded if re.match(r"(\w+:)?//", url)], page
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"(@import|url\()[\s\"']*(\w+:)?//", style.read_text()), style


def test_recipes_spoken_of_are_there():
    for page in PAGES:
        for path in re.findall(r"\bonelora_diffusion/cli/recipes/[\w-]+\.yaml", page.read_text()):
            assert isinstance(yaml.safe_load((REPOSITORY / path).read_text()), dict)
