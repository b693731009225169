"""The learning rate by step, and how it goes on in a run that is given more steps than it had."""

import math
from collections.abc import Sequence
from typing import Any

from zoo.config.schema.optim import Optim
from zoo.config.schema.train import TrainConfig
from zoo.errors import refuse


def learning_rate_factor(optim: Optim, max_steps: int, step: int) -> float:
    """What the peak rate is multiplied by in the step after `step` others.

    Linear warm-up to 1, then a cosine down to `min_lr_ratio` at the last step. From the step
    `continued_at` on, where the run was given more steps, `continuation` says otherwise: "constant"
    keeps the rate it had, "rewarm" warms up from there to 1 and falls along a cosine again.
    """
    warmup, floor, begin = optim.warmup_steps, optim.min_lr_ratio, 0
    if optim.continued_at is not None and step >= optim.continued_at:
        start = optim.continued_from or 0.0
        if optim.continuation == "constant":
            return start
        begin = optim.continued_at
        if step < begin + warmup:
            return start + (1 - start) * (step - begin + 1) / warmup
    elif step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - begin - warmup) / max(1, max_steps - begin - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def continued(before: TrainConfig, after: dict[str, Any], step: int, given: Sequence[str]) -> None:
    """Note in `after`, the plain configuration of a run that goes on at `step`, how its rate does.

    `given` are the options of the command. Raises UserError for fewer steps than were taken, and
    for a continuation of a run that is not given more.
    """
    steps = after["trainer"]["max_steps"]
    if isinstance(steps, int) and steps < step:
        rule = f"must be at least {step}, the step that the run has reached"
        refuse("trainer.max_steps", steps, rule)
    longer = isinstance(steps, int) and steps > before.trainer.max_steps
    if "optim.continuation" in given and not longer:
        refuse(
            "optim.continuation",
            after["optim"]["continuation"],
            "says how the learning rate goes on in a run that is given more steps",
            f"Give trainer.max_steps above {before.trainer.max_steps} with it",
        )
    if longer:
        optim: dict[str, Any] = after["optim"]
        how = optim.get("continuation", "cosine") if "optim.continuation" in given else "cosine"
        optim |= {"continuation": how, "continued_at": None, "continued_from": None}
        if how != "cosine":
            rate = learning_rate_factor(before.optim, before.trainer.max_steps, step)
            optim |= {"continued_at": step, "continued_from": rate}


def describe_continuation(before: TrainConfig, after: TrainConfig, step: int) -> str | None:
    """How the learning rate goes on in a run given more steps; None where it was not."""
    if after.trainer.max_steps <= before.trainer.max_steps or not step:
        return None
    rates = [
        config.optim.lr * learning_rate_factor(config.optim, config.trainer.max_steps, step)
        for config in (before, after)
    ]
    if math.isclose(rates[0], rates[1], rel_tol=1e-3) and after.optim.continuation == "cosine":
        return None
    kind, last = after.optim.continuation, after.trainer.max_steps
    message = f"learning rate: {rates[0]:.3g} at step {step}, "
    if kind == "constant":
        return f"{message}kept to step {last} (optim.continuation=constant)"
    if kind == "rewarm":
        return f"{message}warmed up again and down to step {last} (optim.continuation=rewarm)"
    return (
        f"{message}goes on at {rates[1]:.3g}, as in a run of {last} steps from its start; "
        "optim.continuation=constant keeps it, optim.continuation=rewarm warms it up again"
    )
