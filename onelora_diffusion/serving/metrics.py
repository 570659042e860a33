"""What Prometheus reads of the server: requests, the queue, the batches and the adapters in memory."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from onelora_diffusion.serving.batching import COUNTERS

GAUGES = {
    "waiting": ("queue_length", "Pictures that wait."),
    "drawing": ("drawing", "Pictures that are drawn now."),
    "resident_adapters": ("resident_adapters", "Adapters in memory."),
    "resident_bytes": ("resident_bytes", "Memory of these adapters."),
}


class Metrics:
    """A registry of its own for each server; `state` gives that of its batcher, or None before there is one."""

    def __init__(self, state: Callable[[], dict | None]):
        self.state, self.registry = state, CollectorRegistry()
        labels = ("method", "route", "status")
        self.requests = Counter("onelora_requests", "Requests that were answered.", labels, registry=self.registry)
        self.seconds = Histogram(
            "onelora_request_seconds", "From a request to the end of its answer.", labels[:2], registry=self.registry
        )
        self.registry.register(self)

    def answered(self, scope: dict, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None)
        labels = (scope["method"], route) if route else ("any", "none")  # a client could invent any number of others
        self.requests.labels(*labels, str(status)).inc()
        self.seconds.labels(*labels).observe(seconds)

    def describe(self) -> list[Metric]:
        return []  # its metrics are those of `collect`, which needs no batcher to be registered

    def collect(self) -> Iterator[Metric]:
        state = self.state()
        if state is None:
            return
        for key, (name, said) in GAUGES.items():
            yield GaugeMetricFamily(f"onelora_{name}", said, state[key])
        pictures = CounterMetricFamily("onelora_pictures", "Requests for a picture, by their end.", labels=("end",))
        for end in COUNTERS:
            pictures.add_metric((end,), state[end])
        yield pictures
        yield CounterMetricFamily("onelora_adapter_reads", "Files of adapters that were read.", state["adapter_reads"])
        drawn = state["images"] + state["failed"]
        yield CounterMetricFamily("onelora_waited_seconds", "Of all drawn pictures.", state["mean_wait_s"] * drawn)
        sizes = {int(size): count for size, count in state["batch_sizes"].items()}
        buckets = [(str(le), sum(count for size, count in sizes.items() if size <= le)) for le in (1, 2, 4, 8, 16, 32)]
        total = sum(size * count for size, count in sizes.items())
        yield HistogramMetricFamily(
            "onelora_batch_size",
            "Pictures that were drawn together.",
            buckets=[*buckets, ("+Inf", sum(sizes.values()))],
            sum_value=total,
        )
