"""Who may ask what of the server: hosts, origins, tokens, sizes and times; and a line of the log for each request."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from onelora_diffusion.files import printable
from onelora_diffusion.serving.settings import AccessSettings, hashed

ADMIN = "admin"  # the client that may replace and delete adapters
PROBES = ("/healthz", "/readyz")
PAGE = ("/", "/page.js", "/page.css")  # what the page consists of, without a picture or a name of an adapter
MAX_JSON = 1_000_000  # bytes of a request
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,  # a browser loads nothing from elsewhere, and shows the page in no other one
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
logger = logging.getLogger("onelora_diffusion.access")


def refusal(status: int, message: str, code: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An answer in the form of OpenAI's errors."""
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return JSONResponse({"error": {"message": message, "type": kind, "code": code}}, status, headers)


class Gate:
    """ASGI middleware that refuses what no route should see, limits bodies and times, and logs each request.

    It sets `scope["state"]["client"]`, the name of the client that a token belongs to, or its address. The server may
    be reached by `host` besides the addresses in `settings`; `on_answer` is called with (scope, status, seconds) after
    each request.
    """

    def __init__(self, app, settings: AccessSettings, host: str, on_answer: Callable[[dict, int, float], object]):
        self.app, self.settings, self.on_answer = app, settings, on_answer
        self.named = {host.casefold() for host in settings.allow_host}
        self.hosts = self.named | {"localhost", "127.0.0.1", "::1", host.casefold()} - {"0.0.0.0", "::"}
        self.names = settings.tokens()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["method"] == "HEAD":
            scope = scope | {"method": "GET"}  # whose body the protocol leaves out
        headers, began, status = Headers(scope=scope), time.monotonic(), 499  # if the client is gone before an answer
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        given = headers.get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.-]{1,64}", given) else uuid.uuid4().hex
        client = self._client(scope, headers)
        most = int(self.settings.max_upload * 1e6) if scope["method"] == "PUT" else MAX_JSON
        received, is_whole, head = 0, False, []

        async def receive_limited():
            nonlocal received, is_whole
            if is_whole:
                return await receive()
            try:
                left = began + self.settings.receive_timeout - time.monotonic()
                message = await asyncio.wait_for(receive(), max(0, left))
            except asyncio.TimeoutError as error:
                raise HTTPException(408, "the request was not sent in time") from error
            received, is_whole = received + len(message.get("body", b"")), not message.get("more_body")
            if received > most:
                raise HTTPException(413, f"the request has more than {most:,} bytes, which is the most here")
            return message

        async def send_marked(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status, sent = message["status"], MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    sent.setdefault(name, value)
                sent["x-request-id"] = request_id
                if not is_whole and received < int(headers.get("content-length") or 0):
                    sent["connection"] = "close"  # the rest of the body is not wanted
                head.append(message)
            else:
                await asyncio.wait_for(send_with_head(message), self.settings.receive_timeout)

        async def send_with_head(message):  # in one turn of the event loop: see `Joined`
            while head:
                await send(head.pop())
            await send(message)

        scope.setdefault("state", {})["client"] = client
        try:
            refused = None if path in PROBES else self._refused(path, headers, client, most)
            await (refused or self.app)(scope, receive_limited, send_marked)
        finally:
            seconds = time.monotonic() - began
            self.on_answer(scope, status, seconds)
            if path not in PROBES:
                asked = f"{scope['method']} {printable(path, 200)}"
                logger.info('%s %s "%s" %d %.3f s', request_id, client, asked, status, seconds)

    def _client(self, scope, headers: Headers) -> str | None:
        """The client's name; None if a token is asked for and none of ours was given."""
        if not self.names:
            return (scope.get("client") or ("unknown",))[0]
        scheme, _, token = headers.get("authorization", "").partition(" ")
        return self.names.get(hashed(token.strip())) if scheme.casefold() == "bearer" else None

    def _refused(self, path: str, headers: Headers, client: str | None, most: int) -> JSONResponse | None:
        host = headers.get("host", "")
        if _host_of(host) not in self.hosts:
            said = f"this server is not '{printable(host, 60)}': start it with --allow-host to make it so"
            return refusal(403, said, "wrong_host")
        origin = headers.get("origin", f"//{host}").partition("//")[2]
        if origin != host and _host_of(origin) not in self.named:
            return refusal(403, "pages of other origins may not ask this server", "wrong_origin")
        if client is None and path not in PAGE:
            said = "give a token of this server as 'Authorization: Bearer TOKEN'"
            return refusal(401, said, "invalid_api_key", {"www-authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > most:
            said = f"the request has {printable(length, 20)} bytes, and {most:,} is the most here"
            return refusal(413, said, "too_large")
        return None


def _host_of(netloc: str) -> str:
    """The name in `name:port`, in lower case and without the brackets of an IPv6 address; '' if there is none."""
    found = re.fullmatch(r"(?:\[([0-9a-f:]+)\]|([\w.-]+))(?::[0-9]+)?", netloc.casefold())
    return found[1] or found[2] if found else ""
