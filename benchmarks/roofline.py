"""What a step must cost at least, on paper: of each operator, the slower of its arithmetic and its memory traffic."""

from dataclasses import dataclass

from benchmarks.measure import Work


@dataclass(frozen=True)
class Device:
    """Peak rates of a device, from its data sheet or measured.

    Attributes:
        flops_per_second: of dense bf16 matrix products that accumulate in fp32.
        bytes_per_second: of its memory.
        seconds_per_launch: that the host needs to start an operator from eager PyTorch.
    """

    name: str
    flops_per_second: float
    bytes_per_second: float
    seconds_per_launch: float = 5e-6


# NVIDIA's data sheets: A100 SXM 40 GB, H100 SXM (dense). Five microseconds a launch are a rule of thumb.
DEVICES = (Device("A100", 312e12, 1.555e12), Device("H100", 989e12, 3.35e12))

# Dense products of each precision, from the same data sheets.
RATES = {
    "A100": {"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12},
    "H100": {"fp32": 67e12, "tf32": 494.7e12, "bf16": 989e12},
}


def step_seconds(work: Work, device: Device) -> float:
    """Σ over operators of max(flops / matrix rate, bytes / bandwidth)."""
    return sum(max(f / device.flops_per_second, m / device.bytes_per_second) for _, f, m in work.each)


def launch_seconds(work: Work, device: Device) -> float:
    return work.operators * device.seconds_per_launch


def at_batch(two: Work, three: Work, batch: int) -> Work:
    """Work at any batch from that at batches 2 and 3: what an operator does grows linearly with the batch.

    A batch of 1 is no witness: some of its copies are views.
    """
    return Work(
        [
            (name, f2 + (batch - 2) * (f3 - f2), m2 + (batch - 2) * (m3 - m2))
            for (name, f2, m2), (_, f3, m3) in zip(two.each, three.each, strict=True)
        ]
    )


def at_layers(one: float, two: float, layers: int) -> float:
    """Any sum over operators at a number of layers, from that at 1 and at 2: every layer adds the same."""
    return one + (layers - 1) * (two - one)


def roofline(works: dict[tuple[int, int], Work], device: Device, batches: tuple[int, ...], layers: int) -> list[dict]:
    """Seconds of a step at each batch.

    Args:
        works: (layers, batch) -> work, for 1 and 2 layers and batches of 2 and 3.
    """
    rows = []
    for batch in batches:
        one, two = (at_batch(works[depth, 2], works[depth, 3], batch) for depth in (1, 2))
        rows.append(
            {
                "batch": batch,
                "seconds": at_layers(step_seconds(one, device), step_seconds(two, device), layers),
                "launch_seconds": at_layers(launch_seconds(one, device), launch_seconds(two, device), layers),
            }
        )
    return rows
