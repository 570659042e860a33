"""The running batch, driven step by step: who is in it, and that each picture is that of its single run."""

import pytest
import torch
from serving.servers import make_pipeline, write_adapter, write_adapters

from onelora_diffusion import AdapterConfig
from onelora_diffusion.injection.book import fingerprint
from onelora_diffusion.serving.adapter_cache import AdapterCache
from onelora_diffusion.serving.drawing import Drawing
from onelora_diffusion.serving.engine import Engine
from onelora_diffusion.serving.library import AdapterLibrary
from onelora_diffusion.serving.queue import Ticket
from onelora_diffusion.serving.request import Request

BYTES = 4 * 2000  # no adapter here takes more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    transformer = make_pipeline().transformer
    folder = write_adapters(tmp_path_factory.mktemp("adapters"), transformer)
    write_adapter(transformer, folder / "many.safetensors", AdapterConfig(num_classes=40), 9)
    return folder


class Exact(Drawing):
    """Keeps its images in float32, in the order in which they were drawn, but for NaN; and may fail."""

    def __init__(self, pipeline):
        super().__init__(pipeline, 50)
        self.drawn, self.most, self.poisoned = [], 100, None

    def step(self, trajectories):
        if len(trajectories) > self.most or self.poisoned in trajectories:
            raise RuntimeError("out of memory")
        super().step(trajectories)

    def images(self, trajectories):
        images = super().images(trajectories)
        self.drawn += [image for image in images if image.isfinite().all()]
        return images


class Run:
    """An engine without a thread."""

    def __init__(self, folder, memory_bytes: int = 10**9):
        pipeline = make_pipeline()
        self.drawing, self.library = Exact(pipeline), AdapterLibrary([folder], fingerprint(pipeline.transformer))
        self.engine = Engine(self.drawing, self.library, AdapterCache(pipeline.transformer, memory_bytes), self.settle)
        self.done = []

    def settle(self, ticket, picture=None, error=None):
        self.done += [ticket] if error is None else []
        ticket.picture.set_result(error or picture)

    def ticket(self, **settings) -> Ticket:
        request = Request(**settings)
        entries = [self.library.entry(name) for name, _ in request.adapters]
        request = self.drawing.completed(request, entries)
        return Ticket(request, entries, self.drawing.batch_key(request), None)

    def images(self, joining: list[list[Ticket]]) -> dict[Ticket, torch.Tensor]:
        """Let tickets join step by step, and draw them all."""
        while joining or self.engine.running:
            self.engine.step(*joining[:1])
            joining = joining[1:]
            assert self.engine.running or not is_routed(self)
        return dict(zip(self.done, self.drawing.drawn, strict=True))


def is_routed(run: Run) -> bool:
    book = getattr(run.drawing.transformer, "_onelora", None)
    return book is not None and book.open_route is not None


def alone(folder, tickets) -> list[torch.Tensor]:
    """Each in an engine of its own."""
    images = []
    for ticket in tickets:
        run = Run(folder)
        again = Ticket(ticket.request, ticket.entries, ticket.batch_key, None)
        images.append(run.images([[again]])[again])
    return images


@pytest.mark.parametrize("memory_bytes", [10**9, 2 * BYTES])
def test_each_picture_is_that_of_its_single_run_whenever_it_joins(folder, memory_bytes):
    """Samplers, steps, guidance and adapters differ; there may be memory for the adapters that are in use alone."""
    run = Run(folder, memory_bytes)
    sums = [{}, {"plain": 0.5}, {"birds": 1.0}, {"food": 0.3, "birds": 0.7}, {"lora": 1.0}, {"many": 1.0}]
    tickets = [
        run.ticket(
            subject=index % 3,
            adapters=tuple(sums[index % 6].items()),
            guidance="domain" if index % 4 == 3 and index % 6 else "cfg",
            guidance_scale=1.0 + index % 3,
            sampler=("ddim", "dpm-solver++", "ddpm")[index % 3],
            num_inference_steps=2 + index % 5,
            seed=index,
        )
        for index in range(9)
    ]
    found = run.images([tickets[:3], [], tickets[3:4], tickets[4:6], [], [], tickets[6:]])
    assert [tickets.index(ticket) for ticket in run.done] != list(range(9))  # those of few steps pass others
    for ticket, expected in zip(tickets, alone(folder, tickets), strict=True):
        torch.testing.assert_close(found[ticket], expected, rtol=0, atol=1e-5)
    gaps = torch.cdist(*[torch.stack([found[ticket] for ticket in tickets]).flatten(1)] * 2) + torch.eye(9)
    assert gaps.min() > 1e-2
    assert run.engine.cache.num_bytes <= memory_bytes and not is_routed(run)


def test_who_is_in_the_batch_at_each_step(folder):
    run = Run(folder)
    two, five, three = (run.ticket(subject=1, num_inference_steps=steps) for steps in (2, 5, 3))
    sizes = []
    for joining in ([two, five], [], [three], []):
        run.engine.step(joining)
        sizes.append(len(run.engine.running))
    assert sizes == [2, 1, 2, 2] and run.done == [two]
    assert (five.progress, three.progress) == (4 / 5, 2 / 3)
    five.picture.set_exception(ValueError("cancelled"))  # it leaves, and takes no fifth step
    run.engine.step()
    assert run.done == [two, three] and not run.engine.running
    assert run.engine.batch_sizes == {2: 4, 1: 1}


def test_those_of_other_sizes_are_steps_of_their_own(folder):
    run = Run(folder)
    tickets = [run.ticket(subject=1, num_inference_steps=2, seed=seed) for seed in range(3)]
    tickets[1].batch_key = (32,)
    found = run.images([tickets])
    assert run.engine.batch_sizes == {2: 2, 1: 2}
    for ticket, expected in zip(tickets, alone(folder, tickets), strict=True):
        torch.testing.assert_close(found[ticket], expected, rtol=0, atol=1e-5)


def test_a_step_that_fails_takes_no_others_along(folder, caplog):
    """Out of memory with three, so that each goes on alone; one fails then as well, and one has no finite values."""
    run = Run(folder)
    tickets = [run.ticket(subject=1, adapters=(("plain", 1.0),), num_inference_steps=4, seed=s) for s in range(4)]
    run.engine.step(tickets[:1])
    run.drawing.most = 2
    run.engine.step(tickets[1:])
    assert run.engine.batch_sizes == {1: 1} and len(run.engine.running) == 4  # nobody took this step
    run.drawing.poisoned = run.engine.running[tickets[1]]
    run.engine.running[tickets[2]].latents.fill_(float("nan"))
    found = run.images([])
    assert str(tickets[1].picture.result()) == "out of memory"
    assert str(tickets[2].picture.result()) == "the picture has values that are not finite"
    assert list(found) == [tickets[0], tickets[3]]
    for image, expected in zip(found.values(), alone(folder, found), strict=True):
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("first", ["many", ""])
def test_the_label_of_no_class_is_that_of_the_tables_that_are_there(folder, first):
    """The base is drawn, guided, while an adapter with more classes comes, or goes as the last one."""
    run = Run(folder, 0)
    base = run.ticket(subject=3, num_inference_steps=5)
    many = run.ticket(subject=30, adapters=(("many", 1.0),), num_inference_steps=2)
    found = run.images([[many], [base]] if first else [[base], [], [many]])
    for ticket, expected in zip((base, many), alone(folder, (base, many)), strict=True):
        torch.testing.assert_close(found[ticket], expected, rtol=0, atol=1e-5)
    assert not hasattr(run.drawing.transformer, "_onelora")
