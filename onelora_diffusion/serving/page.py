"""The server's page and API, built with gradio: pictures side by side, a strip between two adapters, and a grid."""

import asyncio
import contextlib
import html
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import gradio as gr
from PIL import Image

from onelora_diffusion.families.classes import find_class, plain
from onelora_diffusion.files import first_line, printable
from onelora_diffusion.injection.routing import GUIDANCES
from onelora_diffusion.serving.batching import Batcher
from onelora_diffusion.serving.library import AdapterEntry
from onelora_diffusion.serving.picture_file import picture_with_settings, request_of, request_of_image
from onelora_diffusion.serving.queue import Busy, Ticket
from onelora_diffusion.serving.request import Request

ALONE = "the base alone"
POLL_S = 0.2  # seconds between two updates of the progress
MAX_STRIP = 12
MAX_GRID = 64
COLUMNS = ["adapter", "method", "data set", "draws", "numbers", "state"]
CSS = """
.small img { image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain; }
.status progress { width: 100%; }
"""


DRAW = """Draw one picture. request: an object with subject (a class by name or number, or a prompt) and, as you like,
adapters ({name: weight}), guidance, guidance_scale, sampler, num_inference_steps, seed, size. Returns the PNG, its
settings inside, and the same settings."""
ADAPTERS = (
    "List the adapters: name, method, base, data set, classes, size, and the problem of one that cannot be used."
)
SETTINGS = "Read the settings in a PNG that was saved here."
HEALTH = "Tell whether the server works, its counters since the start, its queue and the adapters in memory."


@dataclass(frozen=True)
class Status:
    """The progress of some pictures, as text and as a share of the work."""

    text: str
    share: float | None = None

    @classmethod
    def of(cls, tickets: Sequence[Ticket]) -> "Status":
        places = [ticket.place() for ticket in tickets]
        share = sum(ticket.progress for ticket in tickets) / len(tickets)
        if all(places):
            return cls(f"place {min(places)} in the queue", 0.0)
        return cls(f"drawing: {share:.0%}", min(share, 1.0))

    def as_html(self) -> str:
        bar = "" if self.share is None else f'<progress max="1" value="{self.share:.3f}"></progress>'
        return f"{bar}<div>{html.escape(self.text)}</div>"


class Page:
    """The page of a server.

    Args:
        base: the base's name, which saved pictures contain.
        guidance_scale: the initial value of the guidance scale.
    """

    css = CSS

    def __init__(self, batcher: Batcher, base: str, guidance_scale: float):
        self.batcher, self.library, self.drawing = batcher, batcher.library, batcher.drawing
        self.base, self.guidance_scale, self.started = base, guidance_scale, time.monotonic()

    def build(self) -> gr.Blocks:
        """Build the page and its API without starting a server."""
        with gr.Blocks(title="1LoRA", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
            gr.Markdown(f"## Many adapters, one batch\nBase: `{self.base}`. An adapter is a vector a layer.")
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self._controls()
                with gr.Column(scale=3, min_width=320):
                    self._outputs()
            with gr.Accordion("Adapters", open=False):
                widths = ["18%", "8%", "10%", "26%", "10%", "28%"]
                table = gr.Dataframe(
                    headers=COLUMNS, column_widths=widths, interactive=False, wrap=True, elem_id="adapters"
                )
                refresh = gr.Button("Look for new files", size="sm")
            private = dict(show_progress="hidden", api_visibility="private")
            choices = [self.first, self.second, self.several]
            gr.on([blocks.load, refresh.click], self._listing, choices, [table, *choices], **private).then(
                self._classes, [self.subject, *self._chosen], [self.subject, self.card], **private
            )
            self._calls()
        return blocks.queue(default_concurrency_limit=None)

    # -----------------------------------------------------------------------------------------------
    # The layout of the page

    def _controls(self) -> None:
        names = [ALONE, *self._names()]
        with gr.Row():
            self.first = gr.Dropdown(names, value=names[min(1, len(names) - 1)], label="Adapter A", elem_id="a")
            self.first_weight = gr.Slider(-2, 2, 1, step=0.05, label="Weight of A", elem_id="weight-a")
        with gr.Row():
            self.second = gr.Dropdown(names, value=ALONE, label="Adapter B", elem_id="b")
            self.second_weight = gr.Slider(-2, 2, 1, step=0.05, label="Weight of B", elem_id="weight-b")
        if self.drawing.draws_classes:
            self.subject = gr.Dropdown([], label="Class", elem_id="subject")
        else:
            self.subject = gr.Textbox("", label="Prompt", elem_id="subject")
        with gr.Row():
            self.guidance = gr.Radio(list(GUIDANCES), value="cfg", label="Guidance", elem_id="guidance")
            self.scale = gr.Slider(1, 15, self.guidance_scale, step=0.1, label="Its strength", elem_id="scale")
        with gr.Row():
            samplers = self.drawing.samplers
            is_chosen = len(samplers) > 1  # a base that draws prompts has its pipeline's sampler alone
            self.sampler = gr.Dropdown(
                samplers,
                value=samplers[0] if samplers else None,
                label="Sampler",
                elem_id="sampler",
                visible=is_chosen,
            )
            steps = min(25, self.drawing.max_steps)
            self.steps = gr.Slider(1, self.drawing.max_steps, steps, step=1, label="Steps", elem_id="steps")
        self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1, elem_id="seed")
        self.restore = gr.File(label="Settings from a saved PNG", file_types=[".png"], height=140, elem_id="restore")
        self.card = gr.Markdown(elem_id="card")
        self._chosen = [self.first, self.first_weight, self.second, self.second_weight]
        self._settings = [*self._chosen, self.subject, self.guidance, self.scale, self.sampler, self.steps, self.seed]
        gr.on(
            [self.first.input, self.second.input], self._classes, [self.subject, *self._chosen],
            [self.subject, self.card], show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        self.restore.upload(
            self._restored, self.restore, self._settings, show_progress="hidden", api_visibility="private"
        )

    def _outputs(self) -> None:
        small = ["small"] if self.drawing.size < 128 else []
        self.status = gr.HTML("", elem_id="status", elem_classes=["status"])
        events = []
        hidden = dict(show_progress="hidden", api_visibility="private")  # the status shows the progress
        with gr.Tab("One"):
            one = gr.Button("Draw", variant="primary", elem_id="draw")
            picture = gr.Image(
                format="png", type="pil", label="Picture", height=384, elem_id="picture", elem_classes=small,
                buttons=["download", "fullscreen"], interactive=False,
            )  # fmt: skip
            events.append(one.click(self._one, self._settings, [picture, self.status], **hidden))
        with gr.Tab("Side by side"):
            gr.Markdown("The base, A, B and both with their weights, from the same noise.")
            compare = gr.Button("Draw side by side", variant="primary", elem_id="compare")
            events.append(self._gallery(compare.click, self._side_by_side, self._settings, 4, small, "side-by-side"))
        with gr.Tab("From A to B"):
            gr.Markdown("Weights from (A 1, B 0) to (A 0, B 1), from the same noise.")
            number = gr.Slider(2, MAX_STRIP, 5, step=1, label="Pictures")
            strip = gr.Button("Draw the strip", variant="primary", elem_id="strip")
            events.append(
                self._gallery(strip.click, self._strip, [*self._settings, number], MAX_STRIP, small, "strip-of")
            )
        with gr.Tab("A grid of adapters"):
            gr.Markdown("A picture by each adapter, all in one batch, from the same noise.")
            self.several = gr.Dropdown([], multiselect=True, label="Adapters", max_choices=MAX_GRID, elem_id="several")
            grid = gr.Button("Draw the grid", variant="primary", elem_id="grid")
            inputs = [*self._settings, self.several]
            events.append(self._gallery(grid.click, self._grid, inputs, 4, small, "grid-of"))
        cancel = gr.Button("Cancel", elem_id="cancel")
        cancel.click(lambda: Status("cancelled").as_html(), None, self.status, cancels=events, **hidden)

    def _gallery(self, click, draw, inputs, columns: int, classes: list[str], elem_id: str):
        gallery = gr.Gallery(
            columns=columns, format="png", type="pil", label="Pictures", height="auto", object_fit="contain",
            elem_id=elem_id, elem_classes=classes, interactive=False,
        )  # fmt: skip
        return click(draw, inputs, [gallery, self.status], show_progress="hidden", api_visibility="private")

    def _calls(self) -> None:
        """Add the API that programs call: `draw`, `adapters`, `classes`, `settings` and `health`."""
        with gr.Column(visible=False):
            request, answer, file = gr.JSON(), gr.JSON(), gr.File()
            picture = gr.Image(format="png", type="pil")
            call = gr.Button()
            call.click(self._draw_call, request, [picture, answer], api_name="draw", api_description=DRAW)
            call.click(self._adapters_call, None, answer, api_name="adapters", api_description=ADAPTERS)
            call.click(self._settings_call, file, answer, api_name="settings", api_description=SETTINGS)
            call.click(self._health_call, None, answer, api_name="health", api_description=HEALTH)

    # -----------------------------------------------------------------------------------------------
    # The choices on the page

    def _names(self) -> list[str]:
        return [entry.name for entry in self.library.entries() if not entry.problem]

    def _listing(self, first, second, several):
        """List the adapter files again, and update the table and the choices."""
        names = self._names()
        rows = [row_of(entry) for entry in self.library.entries()]
        choices = [ALONE, *names]
        first, second = (name if name in choices else ALONE for name in (first, second))
        several = [name for name in several or [] if name in names] or names[:16]
        return (
            rows,
            gr.update(choices=choices, value=first),
            gr.update(choices=choices, value=second),
            gr.update(choices=names, value=several),
        )

    def _classes(self, subject, *chosen):
        """The classes that the chosen adapters draw, keeping the chosen one if possible, and both adapters' cards."""
        with one_line():
            entries = [self.library.entry(name) for name, _ in adapters_of_page(*chosen)]
        card = "\n\n".join(card_of(entry) for entry in entries)
        if not self.drawing.draws_classes:
            return gr.update(), card
        classes, _ = self.drawing.classes_of(adapters_of_page(*chosen), entries)
        names = list(classes.values())
        return gr.update(choices=names, value=subject if subject in names else names[0]), card

    def _restored(self, path: str | None):
        """Set the page's controls to the settings in a saved PNG."""
        if path is None:
            return [gr.update()] * len(self._settings)
        with one_line():
            request, base = request_of(path)
            if base != self.base:
                raise ValueError(f"the picture is of the base {printable(base, 60)}, and this is {self.base}")
            if len(request.adapters) > 2:
                raise ValueError(
                    f"the picture is of {len(request.adapters)} adapters, and the page has places for two"
                )
            entries = [self.library.entry(name) for name, _ in request.adapters]
        chosen = [*request.adapters, (ALONE, 1.0), (ALONE, 1.0)][:2]
        subject = gr.update(value=request.subject)
        if self.drawing.draws_classes:
            classes, _ = self.drawing.classes_of(request.adapters, entries)
            subject = gr.update(choices=list(classes.values()), value=classes.get(request.subject))
        flat = [value for pair in chosen for value in pair]
        rest = [request.guidance, request.guidance_scale, request.sampler, request.num_inference_steps, request.seed]
        return [*flat, subject, *rest]

    def _request(self, chosen: Sequence, settings: Sequence) -> Request:
        subject, guidance, scale, sampler, steps, seed = settings
        adapters = dict(chosen)
        # Domain guidance needs an adapter to guide towards.
        guidance = guidance if adapters else "cfg"
        values = dict(subject=subject, adapters=adapters, guidance=guidance, guidance_scale=scale, sampler=sampler)
        return Request.from_json(values | {"num_inference_steps": steps, "seed": seed})

    # -----------------------------------------------------------------------------------------------
    # Drawing

    async def _one(self, *settings):
        adapters = adapters_of_page(*settings[:4])
        async with aclosing(self._captioned({"": adapters}, settings)) as steps:
            async for shown, status in steps:
                yield (shown[0][0] if isinstance(shown, list) else shown), status

    async def _side_by_side(self, *settings):
        first, second = settings[:2], settings[2:4]
        asked = {"base": (), "A": adapters_of_page(*first), "B": adapters_of_page(*second)}
        asked["mix"] = adapters_of_page(*first, *second)
        async with aclosing(self._captioned(asked, settings)) as steps:
            async for shown in steps:
                yield shown

    async def _strip(self, *settings):
        *settings, number = settings
        pair = [settings[0], settings[2]]
        if ALONE in pair or pair[0] == pair[1]:
            yield gr.update(), Status("a strip leads from one adapter to another: choose two").as_html()
            return
        shares = [index / (int(number) - 1) for index in range(int(number))]
        asked = {f"B {share:.2f}": tuple(zip(pair, (1 - share, share), strict=True)) for share in shares}
        async with aclosing(self._captioned(asked, settings)) as steps:
            async for shown in steps:
                yield shown

    async def _grid(self, *settings):
        *settings, names = settings
        if not names:
            yield gr.update(), Status("a grid is of some adapters: choose them").as_html()
            return
        async with aclosing(self._captioned({name: ((name, 1.0),) for name in names}, settings)) as steps:
            async for shown in steps:
                yield shown

    async def _captioned(self, asked: dict[str, Sequence], settings: Sequence):
        """Draw pictures with captions from the same subject and noise; errors are shown in the status line."""
        try:
            captions, requests = [], []
            for caption, adapters in asked.items():
                subject, name = self._subject(settings[4], adapters_of_page(*settings[:4]), adapters)
                captions.append(f"{caption}: {name}" if name else caption)
                requests.append(self._request(adapters, [subject, *settings[5:]]))
            async with aclosing(self._drawn(requests)) as steps:
                async for images, status in steps:
                    shown = list(zip(images, captions, strict=True)) if images else gr.update()
                    yield shown, status.as_html()
        except (ValueError, Busy, RuntimeError, OSError) as error:
            yield gr.update(), Status(first_line(error, 500)).as_html()

    def _subject(self, subject, chosen: Sequence, adapters: Sequence) -> tuple[str | int, str | None]:
        """(the subject that these adapters draw for the chosen class, its name if that differs from the chosen one).

        If the adapters have no class of that name, their class with the same number is drawn.
        """
        if not self.drawing.draws_classes:
            return subject, None
        classes, _ = self.drawing.classes_of(adapters, [self.library.entry(name) for name, _ in adapters])
        named = {plain(name): label for label, name in reversed(classes.items())}
        if plain(str(subject)) in named:
            return named[plain(str(subject))], None
        entries = [self.library.entry(name) for name, _ in chosen]
        label = find_class(subject, *self.drawing.classes_of(chosen, entries)) % len(classes)
        return label, classes[label]

    async def _drawn(self, requests: Sequence[Request]) -> AsyncIterator[tuple[list[Image.Image], Status]]:
        """Yield (no images, the progress) repeatedly, and at the end (the images, the time that they took)."""
        start = time.monotonic()
        tickets = self.batcher.submit_all(requests)
        try:
            waiting = {asyncio.wrap_future(ticket.picture) for ticket in tickets}
            while waiting:
                _, waiting = await asyncio.wait(waiting, timeout=POLL_S)
                if waiting:
                    yield [], Status.of(tickets)
            images = [picture_with_settings(t.picture.result(), t.request, self.base) for t in tickets]
            yield images, Status(f"{len(images)} drawn in {time.monotonic() - start:.1f} s", 1.0)
        finally:
            for ticket in tickets:
                ticket.cancel()

    # -----------------------------------------------------------------------------------------------
    # The API

    async def _draw_call(self, request, progress=gr.Progress()):  # noqa: B008
        with one_line():
            async with aclosing(self._drawn([Request.from_json(request)])) as steps:
                async for images, status in steps:
                    if not images:
                        progress(status.share, status.text)
        return images[0], as_answer(*request_of_image(images[0]))

    def _adapters_call(self):
        return [
            {
                "name": entry.name,
                "method": entry.method,
                "base": entry.base,
                "dataset": entry.dataset,
                "classes": entry.classes and {str(label): name for label, name in entry.classes.items()},
                "prompt": entry.prompt,
                "num_params": entry.num_params,
                "problem": entry.problem,
            }
            for entry in self.library.entries()
        ]

    def _settings_call(self, path: str | None):
        with one_line():
            if path is None:
                raise ValueError("give a PNG")
            return as_answer(*request_of(path))

    def _health_call(self):
        state = {"status": "ok" if self.batcher.is_alive else "stopped", "base": self.base}
        return state | {"uptime_s": round(time.monotonic() - self.started, 1)} | self.batcher.state()


@contextlib.contextmanager
def one_line():
    """Context manager: an error of a request or of the server becomes one line for the client."""
    try:
        yield
    except (ValueError, Busy, RuntimeError, OSError) as error:
        raise gr.Error(first_line(error, 500), print_exception=False) from error


def adapters_of_page(*chosen) -> list[tuple[str, float]]:
    """(name, weight) of the adapters chosen on the page, from name, weight, name, weight; equal names are summed."""
    weights: dict[str, float] = {}
    for name, weight in zip(chosen[::2], chosen[1::2], strict=True):
        if name not in (None, ALONE):
            weights[name] = weights.get(name, 0.0) + weight
    return list(weights.items())


def as_answer(request: Request, base: str) -> dict:
    return {"base": base, "request": request.as_json()}


def row_of(entry: AdapterEntry) -> list[str]:
    draws = "the base's classes" if entry.classes is None else ", ".join(entry.classes.values())
    numbers = f"{entry.num_params:,}" if entry.num_params else ""
    return [
        printable(entry.name, 60),
        entry.method,
        entry.dataset or "",
        "" if entry.problem else printable(entry.prompt or draws, 80),
        numbers,
        entry.problem or "fits",
    ]


def card_of(entry: AdapterEntry) -> str:
    """A summary of an adapter, as Markdown."""
    facts = {
        "method": entry.method,
        "base": entry.base,
        "data set": entry.dataset,
        "classes": entry.classes and str(len(entry.classes)),
        "prompt": entry.prompt,
        "numbers": f"{entry.num_params:,}",
    }
    listing = ", ".join(f"{name}: {html.escape(value)}" for name, value in facts.items() if value)
    return f"**{html.escape(entry.name)}**: {listing}"
