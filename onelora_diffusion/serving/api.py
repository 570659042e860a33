"""The HTTP API: pictures as OpenAI's clients ask for them, pictures with their progress, models, adapters, probes."""

import asyncio
import base64
import json
import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Literal

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from onelora_diffusion.files import first_line, keys_once
from onelora_diffusion.injection.routing import Guidance
from onelora_diffusion.sampling.settings import SamplerName
from onelora_diffusion.serving.access import ADMIN, Gate, refusal
from onelora_diffusion.serving.library import AdapterEntry, UnknownAdapter
from onelora_diffusion.serving.metrics import Metrics
from onelora_diffusion.serving.picture_file import png_of
from onelora_diffusion.serving.queue import Busy, Stopping, Ticket
from onelora_diffusion.serving.request import (
    GuidanceScale,
    Line,
    Name,
    Request,
    Seed,
    Steps,
    Subject,
    Weights,
    problem,
)
from onelora_diffusion.serving.service import POLL_S, Gone, NotReady, Progress, Service
from onelora_diffusion.serving.settings import AccessSettings

MAX_PICTURES = 64  # of one request
PAGE = Path(__file__).with_name("page")
CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 408: "too_slow", 413: "too_large"}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Digests(Strict):
    """The digests in the settings of a saved picture; a difference from what draws now is a warning."""

    base: Line | None = None
    adapters: dict[Name, Line] = {}


class ImagesRequest(Strict):
    """Pictures as OpenAI's images API asks for them, and what is ours besides."""

    prompt: Subject = Field(description="A class by name or number, or a prompt, depending on the base.")
    model: Line | None = Field(None, description="The base, an adapter, or a mixture: `food:0.7+birds:0.3`.")
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_PICTURES)] = 1
    size: Line | None = Field(None, description="`256x256`, a square, or `auto`.")
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"
    user: Line | None = Field(None, description="Ignored.")
    negative_prompt: Line | None = None
    adapters: Weights | None = Field(None, description="`{name: weight}`, instead of a model.")
    guidance: Guidance = "cfg"
    guidance_scale: GuidanceScale | None = Field(
        None, description="1 or less is without. Default: 1 if guidance is trained into all adapters, else 4."
    )
    sampler: SamplerName | None = None
    steps: Steps = 25
    seed: Seed | None = Field(None, description="Of the first picture; the others follow. Default: any.")
    digests: Digests = Digests()


class Image(BaseModel):
    b64_json: str
    settings: dict = Field(description="What draws the same picture again, which the PNG has inside.")


class Images(BaseModel):
    created: int
    data: list[Image]
    warnings: list[str]


class PicturesRequest(Strict):
    """Pictures whose progress is told; all of them are queued, or none."""

    pictures: Annotated[list[Request], Field(min_length=1, max_length=MAX_PICTURES)]
    digests: Digests = Digests()


class Strictly(fastapi.Request):
    """A request whose JSON gives each key once."""

    async def json(self):
        try:
            return json.loads(await self.body(), object_pairs_hook=keys_once)
        except json.JSONDecodeError:
            raise
        except ValueError as error:
            raise HTTPException(400, f"the request cannot be read: {error}") from None


class Route(APIRoute):
    def get_route_handler(self):
        handle = super().get_route_handler()

        async def handle_strictly(request: fastapi.Request):
            return await handle(Strictly(request.scope, request.receive))

        return handle_strictly


def create_app(service: Service, access: AccessSettings, host: str = "localhost") -> Gate:
    """The ASGI application of a service, which may be reached by `host` besides the addresses that `access` allows."""
    app = fastapi.FastAPI(title="onelora", docs_url=None, redoc_url=None)
    app.router.route_class = Route
    metrics = Metrics(lambda: service.batcher and service.batcher.state())
    _answer_errors(app)
    _add_probes(app, service, metrics)
    _add_models(app, service)
    _add_pictures(app, service)
    for path, file in (("/", "page.html"), ("/page.js", "page.js"), ("/page.css", "page.css")):
        app.add_api_route(path, _file_route(PAGE / file), include_in_schema=False)
    return Gate(app, access, host, metrics.answered)


def _file_route(path: Path):
    async def file() -> FileResponse:
        return FileResponse(path)

    return file


def _answer_errors(app: fastapi.FastAPI) -> None:
    """Every error is one line, with its status, in the form of OpenAI's errors."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        return refusal(400, problem(error.errors()), "invalid_value")

    @app.exception_handler(HTTPException)
    async def http_error(request, error):
        return refusal(error.status_code, str(error.detail), CODES.get(error.status_code, "invalid_request"))

    for kind in ERRORS:
        app.add_exception_handler(kind, lambda request, error: refused(error))


ERRORS = {  # the status and the code of each kind
    UnknownAdapter: (404, "model_not_found"),
    ValueError: (400, "invalid_value"),
    Busy: (429, "queue_full"),
    Stopping: (503, "not_ready"),
    NotReady: (503, "not_ready"),
    TimeoutError: (504, "timeout"),
    Gone: (499, "gone"),
    RuntimeError: (500, "not_drawn"),
    Exception: (500, "failed"),
}


def refused(error: Exception) -> JSONResponse:
    status, code = next(ERRORS[kind] for kind in type(error).__mro__ if kind in ERRORS)
    wait = getattr(error, "retry_after", 1.0)
    headers = {"retry-after": str(max(1, round(wait)))} if status in (429, 503) else None
    said = "the server failed" if code == "failed" else first_line(error, 500)
    return refusal(status, said, code, headers)


def _add_probes(app: fastapi.FastAPI, service: Service, metrics: Metrics) -> None:
    """Probes, which nothing delays: they ask the queue for no place and no thread for time."""

    @app.get("/healthz", tags=["probes"])
    async def healthz():
        """Whether the process works; a server that is starting or is being stopped does."""
        if service.problem and service.batcher is not None and not service.is_draining:
            return refusal(503, service.problem, "stopped")
        return {"status": "ok"}

    @app.get("/readyz", tags=["probes"])
    async def readyz():
        """Whether pictures are drawn now: the base is loaded, and the server is not being stopped."""
        if service.problem:
            return refusal(503, service.problem, "not_ready", {"retry-after": "1"})
        return {"status": "ok"}

    @app.get("/metrics", tags=["probes"], response_class=Response)
    async def read_metrics():
        """What Prometheus reads."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


class Model(BaseModel):
    """An adapter, or the base, as OpenAI's clients list models, and what is ours besides."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["onelora"] = "onelora"
    method: str | None = None
    base: str | None = None
    dataset: str | None = None
    classes: list[str] | None = Field(None, description="Names by label; without them the base's are drawn.")
    prompt: str | None = None
    trigger: str | None = Field(None, description="The word for what it has learned, for prompts.")
    guidance_scale: float | None = Field(None, description="1 if guidance is trained into it.")
    num_params: int | None = None
    digest: str | None


class BaseModelOfServer(Model):
    """The base, and what its requests may ask for."""

    condition: Literal["class", "prompt"]
    takes_negative_prompts: bool
    samplers: list[str]
    size: int
    max_steps: int
    guidance_scale: float = Field(description="The one with which the page begins.")


class Problem(BaseModel):
    id: str
    problem: str


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[BaseModelOfServer | Model]
    problems: list[Problem]


class Deleted(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: bool = True


def _model_of(entry: AdapterEntry) -> Model:
    names = ("method", "base", "dataset", "prompt", "trigger", "num_params", "digest")
    classes = entry.classes and [entry.classes[label] for label in sorted(entry.classes)]
    return Model(
        id=entry.name,
        created=entry.stamp[1] // 10**9,
        classes=classes,
        guidance_scale=1.0 if entry.has_guidance else None,
        **{name: getattr(entry, name) for name in names},
    )


def _add_models(app: fastapi.FastAPI, service: Service) -> None:
    started = int(time.time())

    def base_model() -> BaseModelOfServer:
        drawing = service.ready().drawing
        return BaseModelOfServer(
            id=service.base,
            created=started,
            classes=[drawing.base_classes[label] for label in sorted(drawing.base_classes)] or None,
            digest=service.base_digest,
            condition="class" if drawing.draws_classes else "prompt",
            takes_negative_prompts=drawing.takes_negative_prompts,
            samplers=drawing.samplers,
            size=drawing.size,
            max_steps=drawing.max_steps,
            guidance_scale=service.guidance_scale,
        )

    def listing() -> Models:
        entries = service.ready().library.entries()
        return Models(
            data=[base_model(), *(_model_of(entry) for entry in entries if not entry.problem)],
            problems=[Problem(id=entry.name, problem=entry.problem) for entry in entries if entry.problem],
        )

    @app.get("/v1/models", tags=["models"])
    async def models() -> Models:
        """The base first, then its adapters; and of files that cannot be drawn with, the problems."""
        return await asyncio.to_thread(listing)

    @app.get("/v1/models/{name:path}", tags=["models"])
    async def model(name: str) -> BaseModelOfServer | Model:
        """The base, or one adapter."""
        if name == service.base:
            return base_model()
        return _model_of(await asyncio.to_thread(service.ready().library.entry, name))

    binary = {"required": True, "content": {"application/octet-stream": {"schema": {"format": "binary"}}}}

    @app.put("/v1/adapters/{name:path}", tags=["models"], openapi_extra={"requestBody": binary})
    async def put(name: str, request: fastapi.Request) -> Model:
        """Write or replace an adapter by the file in the body, which is checked first; whole or not at all."""
        check_admin(request)
        return _model_of(await asyncio.to_thread(service.put, name, await request.body()))

    @app.delete("/v1/adapters/{name:path}", tags=["models"])
    async def delete(name: str, request: fastapi.Request) -> Deleted:
        """Remove an adapter's file."""
        check_admin(request)
        await asyncio.to_thread(service.delete, name)
        return Deleted(id=name)


def check_admin(request: fastapi.Request) -> None:
    if request.state.client != ADMIN:
        raise HTTPException(401, f"only who has the token of '{ADMIN}' may change adapters")


def _add_pictures(app: fastapi.FastAPI, service: Service) -> None:
    @app.post("/v1/images/generations", tags=["pictures"])
    async def generate(body: ImagesRequest, request: fastapi.Request) -> Images:
        """Pictures of one prompt or class, as OpenAI's images API."""

        def submit() -> list[Ticket]:
            return service.ready().submit_all(requests_of(service, body), client=request.state.client)

        tickets, data = await asyncio.to_thread(submit), [None] * body.n
        async with aclosing(service.follow(tickets, hang_up_of(request), poll=None)) as drawn:
            async for index, ticket in drawn:
                data[index] = await asyncio.to_thread(image_of, service, ticket)
        warnings = service.warnings(body.digests.model_dump(), tickets)
        return Images(created=int(time.time()), data=data, warnings=warnings)

    @app.post("/v1/pictures", tags=["pictures"], response_class=StreamingResponse)
    async def draw(body: PicturesRequest, request: fastapi.Request) -> StreamingResponse:
        """Pictures with their progress: a line of JSON for each event.

        `{"place", "progress"}` tells where they are, `{"index", "b64_json", "settings", "warnings"}` is a picture, and
        `{"index", "error"}` one that was not drawn. A last line `{"error"}` ends what takes too long.
        """
        batcher = service.ready()
        tickets = await asyncio.to_thread(batcher.submit_all, body.pictures, client=request.state.client)
        events = event_lines(service, tickets, hang_up_of(request), body.digests.model_dump())
        return StreamingResponse(events, media_type="application/x-ndjson")


def requests_of(service: Service, body: ImagesRequest) -> list[Request]:
    """The pictures that a request in OpenAI's form asks for, with seeds that follow each other."""
    adapters = body.adapters or ()
    if body.model not in (None, service.base):
        if adapters:
            raise ValueError(f"model is '{body.model[:60]}', and adapters are given as well: choose one of them")
        adapters = service.weights(body.model)
    size = None
    if body.size not in (None, "auto"):
        sides = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", body.size)
        if sides is None or sides[1] != sides[2]:
            raise ValueError(f"size is '{body.size[:60]}'; give a square, such as '256x256', or 'auto'")
        size = int(sides[1])
    seed = secrets.randbelow(2**32) if body.seed is None else body.seed
    shared = body.model_dump(include={"negative_prompt", "guidance", "guidance_scale", "sampler"})
    shared |= {"subject": body.prompt, "adapters": dict(adapters), "num_inference_steps": body.steps, "size": size}
    return [Request.from_json(shared | {"seed": seed + index}) for index in range(body.n)]


def image_of(service: Service, ticket: Ticket) -> Image:
    settings = service.settings(ticket)
    png = png_of(ticket.picture.result(), settings)
    return Image(b64_json=base64.b64encode(png).decode(), settings=settings)


def hang_up_of(request: fastapi.Request) -> asyncio.Task:
    """A task that ends when the client hangs up."""

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return asyncio.create_task(hang_up())


async def event_lines(service: Service, tickets: list[Ticket], gone: asyncio.Task, expected: dict) -> AsyncIterator:
    try:
        async with aclosing(service.follow(tickets, gone, poll=POLL_S)) as events:
            async for event in events:
                if isinstance(event, Progress):
                    line = {"place": event.place, "progress": round(event.share, 3)}
                elif error := event[1].picture.exception():
                    line = {"index": event[0]} | json.loads(refused(error).body)
                else:
                    image = await asyncio.to_thread(image_of, service, event[1])
                    warnings = service.warnings(expected, [event[1]])
                    line = {"index": event[0], "warnings": warnings} | image.model_dump()
                yield json.dumps(line) + "\n"
    except TimeoutError as error:
        yield refused(error).body.decode() + "\n"
    except Gone:
        pass
