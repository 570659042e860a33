"""A Ray Serve application: as many servers as the requests ask for, each asked for the adapters that it has in memory.

    serve run onelora_diffusion.serving.ray_app:application base=facebook/DiT-XL-2-256 adapters=/shared/adapters

Each replica is a whole server, which puts its own requests together into batches. A request whose header
`serve_multiplexed_model_id` names an adapter goes to a replica that has drawn with it before, if one is free.
"""

import dataclasses
import logging

from ray import serve
from ray.serve.config import AutoscalingConfig

from onelora_diffusion.serving.loading import ServeSettings, load_batcher, make_service
from onelora_diffusion.serving.request import checked

SCALING = ("min_replicas", "max_replicas", "target_ongoing_requests", "upscale_delay_s", "downscale_delay_s")
REMEMBERED = 1000  # adapters that Ray knows to be with a replica; how many are in memory, its cache decides


def application(arguments: dict[str, str]) -> serve.Application:
    """The application of `onelora serve`'s settings by name, and of those of Ray's `AutoscalingConfig` in `SCALING`.

    ValueError if a value is wrong, or none of the settings.
    """
    settings = settings_of({name: value for name, value in arguments.items() if name not in SCALING})
    # A batch that is drawn, and one that waits; more replicas are started while there are more requests.
    scaling = {"max_replicas": 8, "target_ongoing_requests": 2 * settings.max_batch}
    scaling |= {name: arguments[name] for name in SCALING if name in arguments}

    def build():  # on each replica
        logging.getLogger("onelora_diffusion.access").setLevel(logging.INFO)
        return Replicated(settings)

    deployment = serve.deployment(
        serve.ingress(build)(Replica),
        name="onelora",
        autoscaling_config=checked(AutoscalingConfig, scaling),
        max_ongoing_requests=settings.max_queue,
        graceful_shutdown_timeout_s=settings.drain_timeout,
    )
    return deployment.bind()


def settings_of(arguments: dict) -> ServeSettings:
    """The settings of values by name, which may be texts; several of one setting are separated by commas."""
    fields = {field.name: field.default for field in dataclasses.fields(ServeSettings)}
    if unknown := [name for name in arguments if name not in fields]:
        raise ValueError(f"unknown setting {unknown[0]}; there is {', '.join([*SCALING, *fields])}")
    values = {
        name: value.split(",") if isinstance(fields[name], tuple) and isinstance(value, str) else value
        for name, value in arguments.items()
    }
    settings = checked(ServeSettings, values)
    settings.check()
    return settings


@serve.multiplexed(max_num_models_per_replica=REMEMBERED)
async def remember(adapter: str) -> str:
    """Let Ray know that this replica has drawn with an adapter."""
    return adapter


class Replicated:
    """The server of a replica, as an ASGI application; its answers tell the replica in `x-replica`."""

    def __init__(self, settings: ServeSettings):
        from onelora_diffusion.serving.api import create_app

        self.service = make_service(settings)
        self.app, self.name = create_app(self.service, settings), serve.get_replica_context().replica_id.unique_id
        self.service.start(load_batcher(settings)[0])

    async def __call__(self, scope, receive, send):
        async def send_named(message):
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message["headers"], (b"x-replica", self.name.encode())]}
            await send(message)

        if scope["type"] == "http" and (adapter := serve.get_multiplexed_model_id()):
            await remember(adapter)
        await self.app(scope, receive, send_named)


class Replica:
    """What Ray asks of a replica besides its answers."""

    def check_health(self) -> None:
        if self.app.service.problem:
            raise RuntimeError(self.app.service.problem)
