"""Serve many adapters of one base by a page and an API; requests are drawn together in batches.

    onelora serve                                              # the miniature, and the adapters under runs/
    onelora serve --base facebook/DiT-XL-2-256 --adapters runs --adapter-memory 2000
    onelora serve --host 0.0.0.0 --allow-host draw.example.org --token-file tokens.txt

The page is at http://127.0.0.1:7860, the API below /v1 and described by /openapi.json (docs/serving.md). Ctrl-C or
SIGTERM ends it, once what waits is drawn.
"""

import logging
import os
import sys
import threading

import tyro

from onelora_diffusion.command_line import Stopped, one_line_errors, quieten, typed_as
from onelora_diffusion.serving.loading import ServeSettings, load_batcher, make_service


@one_line_errors("serve.py")
def main(settings: ServeSettings) -> None:
    settings.check()
    try:
        from onelora_diffusion.serving.api import create_app
        from onelora_diffusion.serving.launching import listening
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: pip install 'onelora-diffusion[serve]', or make serve") from error
    logging.basicConfig(format="%(message)s")
    logging.getLogger("onelora_diffusion.access").setLevel(logging.INFO)
    service, tokens = make_service(settings), settings.tokens()
    with listening(create_app(service, settings, settings.host), settings, settings.receive_timeout) as address:
        batcher, summary = load_batcher(settings)
        service.start(batcher)
        print(summary)
        for entry in batcher.library.entries():
            if entry.problem:
                print(f"left out: {entry.name}: {entry.problem}")
        if not tokens and (settings.allow_host or settings.host not in ("127.0.0.1", "localhost", "::1")):
            print("all who reach this server may draw: --token-file asks them for a token")
        print(f"serving at {address} (Ctrl-C ends it)", flush=True)
        try:
            threading.Event().wait()
        finally:
            service.drain(settings.drain_timeout)


def run(arguments: list[str]) -> None:
    if any(word.startswith("--max-wait-ms") for word in arguments):
        sys.exit("serve.py: --max-wait-ms is gone, since a request joins the running batch at its next step: drop it")
    quieten()
    settings = tyro.cli(ServeSettings, args=arguments, description=__doc__, prog=typed_as("serve.py"))
    try:
        main(settings)
    except Stopped as stopped:
        sys.stdout.flush()
        os._exit(stopped.code)  # a step that the networks are still in would abort the interpreter's own end


if __name__ == "__main__":
    run(sys.argv[1:])
