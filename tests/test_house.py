"""The house keeps its order: imports run one way, and loops over seats ask no adapter for its kind."""

import ast
import graphlib

from tools.measure_house import BLIND, ROOT, kind_tests, sources

# Each room may import from the ones before it. Rooms of one line stand beside each other.
ORDER = (
    {"config", "files", "remote", "devices", "launch", "processes", "command_line"},
    {"adapters"},
    {"injection"},
    {"storage", "peft"},
    {"pipelines", "families", "data", "diffusion"},
    {"sampling"},
    {"evaluation"},
    {"training", "serving"},
    {"cli"},
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
PACKAGE = "onelora_diffusion"
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}


def modules() -> dict[str, ast.Module]:
    """Every module by its dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
        for path in sources()
    }


MODULES = modules()


def imported_by(tree: ast.Module) -> set[str]:
    """The modules that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno} imports relatively"
            of_it = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= of_it or {node.module}
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_imports_run_one_way():
    back = []
    for module, tree in MODULES.items():
        if module.startswith(f"{PACKAGE}."):
            for other in imported_by(tree):
                if other.startswith(f"{PACKAGE}.") and RANK[room_of(other)] > RANK[room_of(module)]:
                    back.append(f"{module} imports {other}")
    assert back == []


def test_there_is_no_circle():
    graph = {module: imported_by(tree) & MODULES.keys() for module, tree in MODULES.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the modules of a circle
    assert set(order) == set(MODULES)


def test_the_product_knows_nothing_of_scripts_and_the_workshop():
    workshop = {"benchmarks", "tools", "tests"} | SCRIPTS
    for module, tree in MODULES.items():
        if module.split(".")[0] == PACKAGE:
            assert not {other.split(".")[0] for other in imported_by(tree)} & workshop, module


def test_every_room_has_its_place():
    rooms = {room_of(module) for module in MODULES if module.startswith(f"{PACKAGE}.")}
    assert rooms <= RANK.keys()


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
        "pixel_shuffle": {"families"},
        ".encode_prompt(": {"families"},
        ".norm1.emb": {"families", "injection", "cli"},  # the last converts files of DiT
    }
    rooms = {word: set() for word in allowed}
    for path in sources():
        parts = path.relative_to(ROOT).parts
        if parts[0] == PACKAGE or path.stem in SCRIPTS and len(parts) == 1:
            for word in allowed:
                if word in path.read_text():
                    rooms[word].add(parts[1] if len(parts) > 2 else parts[-1])
    assert rooms == allowed
