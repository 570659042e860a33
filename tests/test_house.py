"""The house keeps its order: imports run one way, and loops over seats ask no adapter for its kind."""

import ast

import pytest

from tools.measure_house import BLIND, ROOT, kind_tests, sources

PACKAGE = "onelora_diffusion"
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}


def modules() -> dict[str, ast.Module]:
    """Every module by its dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
        for path in sources()
    }


MODULES = modules()


def test_imports_keep_their_contracts(monkeypatch, capsys):
    """Those in pyproject.toml: rooms import one way and in no circle, and the product nothing of the workshop."""
    pytest.importorskip("importlinter", reason="import-linter needs Python 3.11")
    from importlinter import api, cli

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("logging.config.dictConfig", lambda settings: None)  # which would turn off all loggers
    assert cli.lint_imports(no_cache=True, no_logo=True) == 0, capsys.readouterr().out
    contracts = api.read_configuration("pyproject.toml")["contracts_options"]
    (workshop,) = (set(contract["forbidden_modules"]) for contract in contracts if "forbidden_modules" in contract)
    assert workshop == {"benchmarks", "tools", "tests"} | SCRIPTS


# Of the standard library, what Windows has not.
POSIX = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
POSIX |= {f"os.{name}" for name in ("fork", "getuid", "geteuid", "pread", "pwrite", "register_at_fork", "wait")}


def needs_posix(tree: ast.Module) -> set[str]:
    """What a module takes from the list above, unless it is imported inside a function, for one system alone."""
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    return (top | {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}) & POSIX


def test_the_product_and_its_scripts_import_where_there_is_no_posix():
    assert needs_posix(ast.parse("import fcntl\nos.pread(1, 2, 3)\ndef f():\n    import pwd")) == {"fcntl", "os.pread"}
    product = (name for name in MODULES if name.split(".")[0] in {PACKAGE} | SCRIPTS)
    assert {name: needs_posix(MODULES[name]) for name in product if needs_posix(MODULES[name])} == {}


def test_kinds_are_counted():
    source = """
if isinstance(module, VectorAdapter | SwapAdapter): pass
if path != CLASS_TABLE: pass
if config.is_peft and isinstance(weight, dict): pass
"""
    assert kind_tests(source) == [2, 3, 4]


def test_no_adapter_is_asked_for_its_kind_where_seats_are_looped_over():
    assert {path: kind_tests((ROOT / path).read_text()) for path in BLIND} == dict.fromkeys(BLIND, [])


def test_what_is_special_to_a_base_is_known_to_families_and_to_what_puts_adapters_into_it():
    """An autoencoder's scale, packed latents, prompts, and a DiT's conditioning: one room knows each."""
    allowed = {
        "scaling_factor": {"families"},
        "shift_factor": {"families"},
        ".encode_prompt(": {"families"},
        ".norm1.emb": {"families/dit.py", "injection/dit_parts.py", "cli/convert_dit.py"},
    }
    rooms = {word: set() for word in allowed}
    for path in sources():
        parts = path.relative_to(ROOT).parts
        if parts[0] == PACKAGE or path.stem in SCRIPTS and len(parts) == 1:
            for word in allowed:
                if word in path.read_text():
                    file = "/".join(parts[1:])
                    rooms[word].add(file if file in allowed[word] else parts[1] if len(parts) > 2 else parts[-1])
    assert rooms == allowed
