"""Start the server on a port: by default for this machine alone, with a page that loads nothing from other hosts."""

import os
from dataclasses import dataclass

AUTH = "ONELORA_SERVE_AUTH"  # user:password
LOCAL = ("127.0.0.1", "localhost", "::1")
# The browser may load from this server alone; gradio's page needs inline styles and scripts.
POLICY = (
    b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    b"frame-ancestors 'self'"
)


@dataclass(frozen=True, kw_only=True)
class PortSettings:
    """The address at which the server listens."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 accepts connections from every machine that reaches this one."""
    port: int = 7860
    """Port to listen at; 0 takes a free one."""
    share: bool = False
    """Also give the page a public address through gradio's servers."""

    def check(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port {self.port}: give 0 to 65535")
        credentials()


class OwnSourcesOnly:
    """ASGI middleware that tells browsers to load nothing from other hosts."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message["headers"], (b"content-security-policy", POLICY)]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


def credentials() -> tuple[str, str] | None:
    """User and password from the environment, or None; ValueError if one of the two is missing."""
    text = os.environ.get(AUTH)
    if text is None:
        return None
    user, _, password = text.partition(":")
    if not user or not password:
        raise ValueError(f"{AUTH} is set, but not as user:password")
    return user, password


def launch(page, settings: PortSettings):
    """Start the server of a `Page` in a thread and return (its `gradio.Blocks`, which the caller closes; its address).

    Raises:
        OSError: the port is taken.
    """
    import gradio as gr
    from starlette.middleware import Middleware

    auth = credentials()
    blocks = page.build()
    _, address, _ = blocks.launch(
        server_name=settings.host,
        server_port=settings.port or None,
        share=settings.share,
        auth=auth,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        ssr_mode=False,
        run_history=False,
        # Every HTTP call is a session of its own, and gradio would keep ten thousand of them, which take a gigabyte.
        state_session_capacity=256,
        pwa=False,
        footer_links=["api"],
        css=page.css,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        app_kwargs={"middleware": [Middleware(OwnSourcesOnly)]},
    )
    return blocks, blocks.share_url or address
