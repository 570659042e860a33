"""The queue: who is drawn together, who waits, who is told to come back, and that nobody gets another's picture."""

import threading
from concurrent.futures import CancelledError
from types import SimpleNamespace

import pytest
import torch
from serving.servers import Held, make_pipeline, serving, wait_until, write_adapters

from onelora_diffusion.serving import batching
from onelora_diffusion.serving.batching import BatchSettings
from onelora_diffusion.serving.drawing import Drawing
from onelora_diffusion.serving.queue import Busy, Stopping
from onelora_diffusion.serving.request import Request

PLAIN = Request(subject=1, num_inference_steps=3, guidance_scale=1.0)


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline()


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    return write_adapters(tmp_path_factory.mktemp("adapters"), pipeline.transformer)


def mixed_requests(number: int) -> list[Request]:
    """Requests of all kinds: every adapter alone and in pairs, two samplers, two numbers of steps."""
    pairs = [(), (("plain", 0.5),), (("birds", 1.0),), (("food", 0.3), ("birds", 0.7)), (("lora", 1.0), ("food", 0.5))]
    return [
        Request(
            subject=index % 3,
            adapters=pairs[index % 5],
            guidance="domain" if index % 4 == 3 and pairs[index % 5] else "cfg",
            guidance_scale=1.0 + index % 3,
            sampler=("ddim", "dpm-solver++")[index % 7 == 0],
            num_inference_steps=3 + (index % 11 == 0),
            seed=index // 2,
        )
        for index in range(number)
    ]


def test_many_threads_get_each_the_picture_of_its_single_run(pipeline, folder):
    requests = mixed_requests(48)
    with serving(pipeline, folder, max_batch=1) as batcher:
        alone = [batcher.submit(request).picture.result() for request in requests]
    assert len({picture.numpy().tobytes() for picture in alone}) > 40
    # Memory for two of the four adapters, so that they come and go meanwhile.
    found, memory = {}, 2 * 4 * 2000
    with serving(pipeline, folder, memory, max_batch=8) as batcher:

        def ask(index):
            found[index] = batcher.submit(requests[index]).picture.result(60)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        state = batcher.state()
    for index, picture in enumerate(alone):  # rounding may reach the last grey level of an image
        difference = (found[index].int() - picture.int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 0.02, requests[index]
    assert state["images"] == 48 and state["waiting"] == state["failed"] == 0
    steps = sum(request.num_inference_steps for request in requests)
    assert sum(int(size) * count for size, count in state["batch_sizes"].items()) == steps
    assert max(map(int, state["batch_sizes"])) > 1


def test_they_join_in_the_order_in_which_they_came_or_batch_by_batch(pipeline, folder):
    steps = [3, 4, 3, 3, 4, 3, 3]
    requests = [
        Request(subject=1, num_inference_steps=n, seed=i, adapters=(("plain", i / 10),) if i % 2 else ())
        for i, n in enumerate(steps)
    ]
    blocking = Request(subject=1, num_inference_steps=2, seed=9)
    ways = {
        True: (
            [9, 0, 1, 2, 3, 4, 5, 6],
            {"1": 2, "2": 1, "3": 7},
        ),  # three in each step but the first and the last two
        False: ([9, 0, 2, 3, 1, 4, 5, 6], {"1": 2, "2": 4 + 3, "3": 3}),  # batches of those with equal steps
    }
    for join, (order, sizes) in ways.items():
        drawing = Held(pipeline)
        with serving(pipeline, folder, drawing=drawing, max_batch=3, join=join) as batcher:
            blocker = batcher.submit(blocking)
            wait_until(lambda drawing=drawing: drawing.drawn)
            tickets = batcher.submit_all(requests)
            assert [ticket.place() for ticket in tickets] == [1, 2, 3, 4, 5, 6, 7]
            assert blocker.place() == 0
            drawing.go.set()
            batcher.drain()
            assert drawing.drawn == order and batcher.state()["batch_sizes"] == sizes


def test_a_full_queue_says_that_it_is_busy_and_takes_all_of_a_call_or_nothing(pipeline, folder):
    drawing = Held(pipeline)
    with serving(pipeline, folder, drawing=drawing, max_batch=1, max_queue=3) as batcher:
        batcher.submit(PLAIN)
        wait_until(lambda: drawing.drawn)
        waiting = batcher.submit_all([PLAIN, PLAIN])
        with pytest.raises(Busy, match="busy: 2 requests are waiting, and 3 is the most; ask again later"):
            batcher.submit_all([PLAIN, PLAIN])
        batcher.submit(PLAIN)
        with pytest.raises(Busy):
            batcher.submit(PLAIN)
        assert batcher.state()["busy"] == 3 and batcher.state()["waiting"] == 3
        waiting[0].cancel()
        batcher.submit(PLAIN)  # there is a place again
        drawing.go.set()


class Counted:
    """A drawing without a model: images take as many steps as they are told to; it notes who joins at which step."""

    def __init__(self):
        self.steps, self.joined, self.go = 0, [], threading.Event()

    def completed(self, request, entries):
        return request

    def batch_key(self, request):
        return ()

    def start(self, request, mixture):
        self.joined.append((request.seed, self.steps))
        return SimpleNamespace(step=0, num_steps=request.num_inference_steps, is_done=False)

    def step(self, images):
        assert self.go.wait(30)
        self.steps += 1
        for image in images:
            image.step += 1
            image.is_done = image.step == image.num_steps

    def images(self, images):
        return torch.zeros(len(images), 3, 2, 2)

    def pause(self):
        pass


@pytest.mark.parametrize("join", [True, False])
def test_five_hundred_of_one_client_do_not_make_another_wait_for_more_than_two_batches(pipeline, folder, join):
    drawing = Counted()
    settings = {"max_batch": 8, "max_queue": 600, "max_queue_per_client": 500, "join": join}
    with serving(pipeline, folder, drawing=drawing, **settings) as batcher:
        batcher.submit_all([Request(subject=1, num_inference_steps=5)] * 500, "many")
        wait_until(lambda: drawing.joined)
        batcher.submit_all([Request(subject=1, num_inference_steps=5, seed=seed) for seed in (1, 2, 3)], "few")
        drawing.go.set()
        batcher.drain()
    assert len(drawing.joined) == 503 and drawing.steps == 5 * 63
    joined = [(place, step) for place, (seed, step) in enumerate(drawing.joined) if seed]
    assert joined == [(9, 5), (11, 5), (13, 5)]  # after the eight that were drawn when they came, in turns


def test_clients_are_served_in_turns_and_each_has_its_own_limit(pipeline, folder):
    """A client with two requests does not wait for the forty of another that came before."""
    drawing = Held(pipeline)
    settings = {"max_batch": 4, "max_queue_per_client": 40}
    with serving(pipeline, folder, drawing=drawing, **settings) as batcher:
        batcher.submit(PLAIN, "many")
        wait_until(lambda: drawing.drawn)
        many = batcher.submit_all([PLAIN] * 40, "many")
        few = batcher.submit_all([PLAIN] * 2, "few")
        assert [ticket.place() for ticket in few] == [2, 4]
        assert [ticket.place() for ticket in many[:4]] == [1, 3, 5, 6]
        with pytest.raises(Busy, match="40 requests of one client are waiting, and 40 is the most") as refused:
            batcher.submit(PLAIN, "many")
        assert refused.value.retry_after == 42 * batcher._seconds_a_picture  # of which the last of its own is the 42nd
        with pytest.raises(ValueError, match="41 pictures asked for at once; 40 is the most"):
            batcher.submit_all([PLAIN] * 41, "another")
        many[0].cancel()
        assert [ticket.place() for ticket in few] == [2, 4]
        drawing.go.set()
        batcher.drain()
        assert [ticket.picture.result(0).shape for ticket in few + many[1:]] == [(16, 16, 3)] * 41
        assert not batcher.is_alive
        with pytest.raises(Stopping):
            batcher.submit(PLAIN, "few")


def test_cancelled_requests_leave_and_a_batch_that_nobody_wants_ends_early(pipeline, folder):
    drawing = Held(pipeline)
    slow = Request(subject=1, num_inference_steps=50, guidance_scale=1.0)
    with serving(pipeline, folder, drawing=drawing, max_batch=2) as batcher:
        drawn = batcher.submit_all([slow, slow])
        wait_until(lambda: drawing.drawn)
        queued = batcher.submit(PLAIN)
        queued.cancel()
        with pytest.raises(CancelledError):
            queued.picture.result()
        for ticket in drawn:
            ticket.cancel()
            ticket.cancel()
        drawing.go.set()
        batcher.submit(PLAIN).picture.result(30)
        assert batcher.state()["cancelled"] == 3
        assert batcher.state()["images"] == 1
        assert drawing.steps == 1 + 3  # one of the fifty, and those of the last picture


def test_one_that_is_cancelled_leaves_the_others_of_its_batch_alone(pipeline, folder):
    drawing = Held(pipeline)
    with serving(pipeline, folder, drawing=drawing, max_batch=2) as batcher:
        first, second = batcher.submit_all([PLAIN, Request(subject=2, num_inference_steps=3, guidance_scale=1.0)])
        wait_until(lambda: drawing.drawn)
        first.cancel()
        drawing.go.set()
        picture = second.picture.result(30)
        assert second.progress == pytest.approx(1.0)
    with serving(pipeline, folder) as batcher:
        assert torch.equal(batcher.submit(second.request).picture.result(30), picture)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request(subject="owl"), "no class 'owl' among the 10 of the base"),
        (
            Request(subject="owl", adapters=(("nobody", 1.0),)),
            "no adapter 'nobody': there is birds, food, lora, plain",
        ),
        (Request(subject="pizza", adapters=(("birds", 1.0),)), "no class 'pizza' among the 5 of adapter 'birds'"),
        (Request(subject=5, adapters=(("birds", 1.0),)), "label 5 is none of the 5 classes"),
        (Request(subject=1, size=8), "size is 8; this base draws 16 by 16"),
        (Request(subject=1, size=32), "size is 32; 16, the base's own, is the most here"),
        (Request(subject=1, num_inference_steps=51), "num_inference_steps is 51; 50 is the most here"),
        (Request(subject=1, sampler="euler"), "sampler 'euler' does not fit this model"),
    ],
)
def test_what_does_not_exist_is_refused_before_it_is_queued(pipeline, folder, request_, said):
    with serving(pipeline, folder) as batcher:
        with pytest.raises(ValueError) as error:
            batcher.submit_all([PLAIN, request_])
        assert said in str(error.value) and "\n" not in str(error.value)
        assert batcher.state()["refused"] == 1 and batcher.state()["waiting"] == batcher.state()["images"] == 0


def test_an_adapter_that_turns_out_damaged_fails_its_own_requests_alone(pipeline, folder, tmp_path):
    write_adapters(tmp_path, pipeline.transformer, ["plain", "birds"])
    content = bytearray((tmp_path / "birds.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "birds.safetensors").write_bytes(content)
    requests = [Request(subject=1, adapters=((name, 1.0),), num_inference_steps=3) for name in ("plain", "birds")]
    with serving(pipeline, tmp_path, max_batch=2) as batcher:
        good, bad = batcher.submit_all(requests)
        with pytest.raises(ValueError, match="adapter 'birds': is damaged, for it is not what was written"):
            bad.picture.result(30)
        assert good.picture.result(30).shape == (16, 16, 3)
        with pytest.raises(ValueError, match="adapter 'birds' cannot be drawn with: is damaged"):
            batcher.submit(requests[1])


def test_a_step_that_fails_is_told_in_one_line_and_the_thread_goes_on(pipeline, folder, caplog):
    class Failing(Drawing):
        def step(self, trajectories):
            if len(trajectories) > 1 or trajectories[0].requests[0].guidance_scale == 1.3:
                raise RuntimeError("out of memory\nand a long story")
            return super().step(trajectories)

    requests = [Request(subject=1, num_inference_steps=3, guidance_scale=scale) for scale in (1.2, 1.3, 1.4)]
    with serving(pipeline, folder, drawing=Failing(pipeline, 50), max_batch=3) as batcher:
        tickets = batcher.submit_all(requests)
        assert tickets[0].picture.result(30).shape == tickets[2].picture.result(30).shape == (16, 16, 3)
        with pytest.raises(RuntimeError, match="^not drawn: out of memory$"):
            tickets[1].picture.result(30)
        assert batcher.is_alive and batcher.state()["failed"] == 1


def test_closing_tells_those_who_wait_and_those_who_come_and_waits_for_no_long_step(pipeline, folder, monkeypatch):
    drawing = Held(pipeline)
    monkeypatch.setattr(batching, "LAST_STEP_S", 0.01)
    with serving(pipeline, folder, drawing=drawing, max_batch=1) as batcher:
        first = batcher.submit(PLAIN)
        wait_until(lambda: drawing.drawn)
        second = batcher.submit(PLAIN)
        batcher.close()
        assert batcher.is_alive  # the step is not done
        for ticket in (first, second):
            with pytest.raises(Busy, match="the server is being stopped"):
                ticket.picture.result(0)
        with pytest.raises(Busy, match="the server is being stopped"):
            batcher.submit(PLAIN)
        drawing.go.set()
        batcher.drain()
        assert not batcher.is_alive


@pytest.mark.parametrize(
    "wrong",
    [{"max_batch": 0}, {"max_queue": 0}, {"max_queue_per_client": 0}],
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
        BatchSettings(**wrong).check()
