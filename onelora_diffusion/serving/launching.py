"""Listen on a port and answer requests in a thread; connections that send nothing are closed."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from onelora_diffusion.serving.settings import PortSettings


class Joined:
    """A transport that sends what is written in one turn of the event loop together: head and body of an answer.

    So a server that is killed has sent all of a small answer or nothing, and a proxy asks another server for it.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop):
        self._transport, self._loop, self._parts = transport, loop, []

    def __getattr__(self, name: str):
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._send)
        self._parts.append(data)

    def close(self) -> None:
        self._send()
        self._transport.close()

    def _send(self) -> None:
        if self._parts:
            self._transport.write(b"".join(self._parts))
            self._parts.clear()


def protocol(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol of a connection, which closes those without a whole head of a request in so many seconds."""

    class TimedProtocol(H11Protocol):
        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport) -> None:
            super().connection_made(Joined(transport, self.loop))
            self._set_timer()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._set_timer()

        def _set_timer(self) -> None:
            """Start the timer while a head is incomplete, and stop it as soon as a request is being answered."""
            if self.conn.their_state is not h11.IDLE and self.timer is not None:
                self.timer.cancel()
                self.timer = None
            elif self.conn.their_state is h11.IDLE and self.timer is None:
                self.timer = self.loop.call_later(seconds, self.transport.close)

        def connection_lost(self, error) -> None:
            super().connection_lost(error)
            if self.timer is not None:
                self.timer.cancel()

    return TimedProtocol


@contextlib.contextmanager
def listening(app, settings: PortSettings, receive_timeout: float) -> Iterator[str]:
    """Context manager that answers requests in a thread and yields the address; at the end, open answers are given.

    OSError if the port is taken, or the address is none of this machine.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.create_server((settings.host, settings.port), family=family, backlog=1024) as port:
        config = uvicorn.Config(
            app,
            http=protocol(receive_timeout),
            ws="none",
            lifespan="off",
            access_log=False,
            log_level="error",
            server_header=False,
            timeout_keep_alive=min(5, receive_timeout),
            root_path=settings.root_path,
            proxy_headers=bool(settings.trusted_proxy),
            forwarded_allow_ips=list(settings.trusted_proxy),
            timeout_graceful_shutdown=10,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [port]}, name="http", daemon=True)
        thread.start()
        try:
            host = f"[{settings.host}]" if family == socket.AF_INET6 else settings.host
            yield f"http://{host}:{port.getsockname()[1]}{settings.root_path}"
        finally:
            server.should_exit = True
            thread.join()
