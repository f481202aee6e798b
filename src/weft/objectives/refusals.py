"""What does not go with gradients that are taken inside of a step, refused in words before anything is read."""

from typing import Any

from weft.errors import ConfigError


def refuse_inner_gradients(config: Any, twice: bool) -> None:
    """Raises ConfigError for an adapter, an engine or a precision with which inner gradients would be wrong. twice:
    they are differentiated again."""
    kind, engine = config.objective.kind, config.engine
    if reason := config.adapter.inner:
        raise ConfigError(f"adapter.kind: '{config.adapter.kind}' does not go with objective '{kind}': {reason}")
    if engine.kind != "torch":
        raise ConfigError(
            f"engine.kind: {engine.kind} gathers gradients as they are made, and objective '{kind}' takes some for "
            "itself. Write engine.kind=torch."
        )
    if config.parallel.shard not in (1, "auto"):
        raise ConfigError(
            f"parallel.shard: weights in parts are whole only while a block runs, and objective '{kind}' moves them "
            "between. Write parallel.shard=1; parallel.data may be more."
        )
    if engine.precision == "fp16":
        raise ConfigError(
            f"engine.precision: fp16 needs its losses scaled, and objective '{kind}' takes gradients of losses "
            "that are not. Write bf16, or fp32."
        )
    if twice and engine.recompute:
        raise ConfigError(
            "engine.recompute: a block that runs again would run with other weights than before, and the gradient "
            "would be wrong without an error. Write objective.order=first, or engine.recompute=false."
        )
    if twice and engine.compile is True:
        raise ConfigError(
            "engine.compile: torch's compiler does not differentiate twice. Write objective.order=first, or leave "
            "engine.compile out."
        )
    for name in ("offload_activations", "stream_blocks"):
        if twice and getattr(engine, name):
            raise ConfigError(
                f"engine.{name}: what waits in host memory comes back for one backward pass, and second order has one "
                f"within another. Write objective.order=first, or leave engine.{name} out."
            )
