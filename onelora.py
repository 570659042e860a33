"""The command `onelora`: it lists its subcommands, the modules of onelora_diffusion/cli, and starts one of them.

It lies beside the package, whose import takes as long as torch's: `onelora --help` waits for neither.
"""

import argparse
import ast
import importlib
import importlib.util
import sys
import typing
from importlib.metadata import version
from pathlib import Path

COMMANDS = ("train-dit", "train-text-to-image", "sample", "eval-fid", "serve", "convert-dit")
PACKAGE = "onelora_diffusion"


def main() -> None:
    """Starts the subcommand that is named first, with the words that follow it."""
    first, *others = sys.argv[1:] or ["--help"]
    if first in ("--tyro-write-completion", "--tyro-print-completion"):
        complete([first, *others])
    parser = argparse.ArgumentParser(
        prog="onelora",
        description="1LoRA for diffusion transformers. `onelora COMMAND --help` shows the settings of one command.",
        epilog="For completion in a shell: onelora --tyro-write-completion {bash,zsh,tcsh} FILE, then source that.",
    )
    parser.add_argument("--version", action="version", version=version("onelora-diffusion"))
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        commands.add_parser(name, help=summary(name), add_help=False)
    parser.parse_args([first])
    sys.exit(module_of(first).run(others))


def module_of(command: str):
    return importlib.import_module(f"{PACKAGE}.cli.{command.replace('-', '_')}")


def summary(command: str) -> str:
    """The first line of a command's module, which is not imported for it."""
    (package,) = importlib.util.find_spec(PACKAGE).submodule_search_locations
    source = Path(package, "cli", f"{command.replace('-', '_')}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)).splitlines()[0]


def complete(arguments: list[str]) -> None:
    """Writes what completes all commands in a shell, which tyro makes from their settings."""
    import tyro

    def taking(kind):
        def command(settings: kind) -> None: ...

        return command

    settings = {
        name: typing.get_type_hints(module_of(name).main, include_extras=True)["settings"] for name in COMMANDS
    }
    tyro.extras.subcommand_cli_from_dict(
        {name: taking(kind) for name, kind in settings.items()},
        prog="onelora",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )


if __name__ == "__main__":
    main()
