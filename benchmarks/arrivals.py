"""How long requests that come at random wait for their pictures, joined at a step and batch by batch."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.measure import table
from onelora_diffusion.serving.engine import Engine
from onelora_diffusion.serving.queue import Ticket, TurnQueue
from onelora_diffusion.serving.request import Request

JOINED, BATCHES = "joined at a step", "batch by batch"
WAYS = {JOINED: True, BATCHES: False}
Clock = Callable[[], float]


def measure_arrivals(
    way,
    names: Sequence[str],
    steps: int,
    number: int,
    loads: Sequence[float],
    rounds: int,
    max_batch: int,
    clock: Clock,
) -> list[dict]:
    """Serve random arrivals at shares of the capacity, the lower one of both ways, in turns.

    Pictures take `steps` of DDIM, or twice or four times as many. Requests come by a clock that advances by what each
    step of the engine takes, and jumps to the next request while nothing is drawn: so it may count the processor time
    of one thread, and nothing waits.

    Args:
        way: a `Way` of `benchmarks.serve`.
        number: pictures of each run.
    """
    ran: dict[tuple[str, float | None], list[tuple[float, np.ndarray]]] = {}
    for round_ in tqdm(range(-1, rounds), desc="arrivals", unit="round", leave=False):
        random = np.random.default_rng(max(round_, 0))
        requests = [
            Request(
                subject=index % 10,
                adapters={names[random.integers(len(names))]: 1.0},
                num_inference_steps=int(steps * random.choice([1, 2, 4])),
                seed=index,
            )
            for index in range(number)
        ]
        gaps = random.exponential(size=number)
        full = {name: run(way, join, requests, np.zeros(number), max_batch, clock) for name, join in WAYS.items()}
        if round_ < 0:
            continue  # it has brought the adapters into memory
        capacity = min(number / seconds for seconds, _ in full.values())
        for name, result in full.items():
            ran.setdefault((name, None), []).append(result)
        for load in loads:
            times = np.cumsum(gaps / (load * capacity))
            for name, join in WAYS.items():
                ran.setdefault((name, load), []).append(run(way, join, requests, times, max_batch, clock))
    return [
        {
            "way": name,
            "load": load,
            "images_per_second": float(np.median([number / seconds for seconds, _ in runs])),
            "mean_s": float(np.median([waits.mean() for _, waits in runs])),
            "p95_s": float(np.median([np.quantile(waits, 0.95) for _, waits in runs])),
            "over_batches": _ratio(runs, ran[BATCHES, load], lambda run: run[1].mean()),
            "throughput_over_batches": _ratio(ran[BATCHES, load], runs, lambda run: run[0]),
        }
        for (name, load), runs in ran.items()
    ]


def _ratio(runs: list, others: list, of: Callable) -> list[float]:
    """The median, the least and the most of the ratios of runs in the same round."""
    ratios = [float(of(a) / of(b)) for a, b in zip(runs, others, strict=True)]
    return [float(np.median(ratios)), min(ratios), max(ratios)]


def run(
    way, join: bool, requests: Sequence[Request], times: np.ndarray, max_batch: int, clock: Clock
) -> tuple[float, np.ndarray]:
    """(seconds until all have their pictures, seconds of each request) of requests that come at these times."""
    came: dict[Ticket, float] = {}
    waits: list[float] = []
    waiting, ended = TurnQueue(), []

    def settle(ticket: Ticket, picture=None, error=None) -> None:
        if error is not None:
            raise error
        ticket.picture.set_result(picture)
        ended.append(ticket)

    engine = Engine(way.drawing, way.library, way.cache, settle)
    tickets = []
    for number, request in enumerate(requests):
        entries = [way.library.entry(name) for name, _ in request.adapters]
        request = way.drawing.completed(request, entries)
        key = way.drawing.batch_key(request) + (() if join else (request.num_inference_steps,))
        tickets.append(Ticket(request, entries, key, None, client=str(number)))
    now, index = 0.0, 0
    while len(waits) < len(tickets):
        if not engine.running and not len(waiting):
            now = max(now, times[index])
        while index < len(tickets) and times[index] <= now:
            waiting.add(tickets[index])
            came[tickets[index]] = times[index]
            index += 1
        start = clock()
        engine.step(waiting.joining(len(engine.running), max_batch, join))
        now += clock() - start
        waits += [now - came[ticket] for ticket in ended]
        ended.clear()
    return now, np.array(waits)


def arrivals_table(rows: list[dict]) -> list[str]:
    header = ["", "load", "images/s", "×", "mean s", "×", "p95 s"]
    cells = [
        [
            row["way"],
            "all at once" if row["load"] is None else f"{row['load']:.0%}",
            f"{row['images_per_second']:.2f}",
            f"{row['throughput_over_batches'][0]:.2f}",
            f"{row['mean_s']:.3f}",
            f"{row['over_batches'][0]:.2f}",
            f"{row['p95_s']:.3f}",
        ]
        for row in rows
    ]
    return table(header, cells)


def plot(rows: list[dict], path: Path) -> None:
    """Mean and 95th percentile by load, a panel for each base."""
    from matplotlib.figure import Figure

    bases = list(dict.fromkeys(row["base"] for row in rows))
    figure = Figure(figsize=(4.5 * len(bases), 3.4), layout="constrained")
    for axes, base in zip(figure.subplots(1, len(bases), squeeze=False)[0], bases, strict=True):
        for way, colour in zip(WAYS, ("tab:blue", "tab:orange"), strict=True):
            own = [row for row in rows if row["base"] == base and row["way"] == way and row["load"]]
            loads = [100 * row["load"] for row in own]
            axes.plot(loads, [row["mean_s"] for row in own], "o-", color=colour, label=f"{way}, mean")
            axes.plot(loads, [row["p95_s"] for row in own], "o--", color=colour, label=f"{way}, 95th percentile")
        axes.set(title=base, xlabel="requests, % of capacity", ylabel="seconds to a picture")
        axes.set_ylim(0, 1.4 * axes.get_ylim()[1])  # room for the legend
        axes.legend(fontsize="small", loc="upper left")
    figure.savefig(path, dpi=100)
