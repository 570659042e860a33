"""The settings of the server: its address, who may ask, and how requests are put together into batches."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

TOKENS = "ONELORA_SERVE_TOKENS"  # the environment's variable, with the words of a token file
LEAST_TOKEN = 16  # characters


@dataclass(frozen=True, kw_only=True)
class PortSettings:
    """The address at which the server listens."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 takes connections from every machine that reaches this one (see --allow-host)."""
    port: int = 7860
    """Port to listen at; 0 takes a free one."""
    root_path: str = ""
    """The path below which a proxy serves this server, such as /draw."""
    trusted_proxy: tuple[str, ...] = ()
    """Addresses of proxies whose X-Forwarded-For and X-Forwarded-Proto are believed."""

    def check(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port {self.port}: give 0 to 65535")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ValueError(f"--root-path '{self.root_path}': give it as /draw")


@dataclass(frozen=True, kw_only=True)
class AccessSettings:
    """Who may ask, and how much."""

    allow_host: tuple[str, ...] = ()
    """Names by which others reach this server, such as draw.example.org. Default: those of this machine alone."""
    token_file: Path | None = None
    """File of tokens, one a line, as TOKEN or NAME:TOKEN; clients send one of them. The client named admin may replace
    adapters. Default: the words of ONELORA_SERVE_TOKENS, or no tokens: all may draw, and none may replace adapters."""
    max_upload: float = 100.0
    """Megabytes of an adapter that is sent to the server, at most."""
    receive_timeout: float = 30.0
    """Seconds in which a client must have sent its request, and in which it must take each part of an answer."""
    request_timeout: float = 600.0
    """Seconds after which pictures that are not drawn are given up."""
    drain_timeout: float = 60.0
    """Seconds that SIGTERM and Ctrl-C leave to draw what waits."""

    def check(self) -> None:
        for name in ("max_upload", "receive_timeout", "request_timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name):g}: give more than 0")
        for host in self.allow_host:
            if not re.fullmatch(r"[\w.:-]+", host):
                raise ValueError(f"--allow-host '{host}': give a name or an address, without http:// and a port")

    def tokens(self) -> dict[str, str]:
        """The name of each client by the SHA-256 of its token.

        ValueError if a token is too short, or is given twice; OSError if the file cannot be read.
        """
        text = os.environ.get(TOKENS, "") if self.token_file is None else self.token_file.read_text()
        names: dict[str, str] = {}
        for number, word in enumerate(text.split(), start=1):
            name, _, token = word.rpartition(":")
            if len(token) < LEAST_TOKEN:
                raise ValueError(f"token {number} has {len(token)} characters: give at least {LEAST_TOKEN}")
            if names.setdefault(hashed(token), name or f"client {number}") != (name or f"client {number}"):
                raise ValueError(f"token {number} is there twice: give each client its own")
        if self.token_file is not None and not names:
            raise ValueError(f"--token-file '{self.token_file}' has no token in it")
        return names


def hashed(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """How requests are put together into batches."""

    max_batch: int = 16
    """Pictures drawn together; with guidance the networks run on twice as many."""
    join: bool = True
    """Requests join a running batch at its next step. Otherwise it is drawn to its end, and those of a batch share
    their sampler and steps as well."""
    max_queue: int = 256
    """The most requests that may wait; the next one is refused, as the server is busy."""
    max_queue_per_client: int = 64
    """The most requests of one client that may wait."""

    def check(self) -> None:
        for name in ("max_batch", "max_queue", "max_queue_per_client"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
