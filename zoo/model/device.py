"""Where a model runs."""

import torch

from zoo.errors import refuse


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; `auto` is the accelerator where there is one, else the CPU."""
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].removesuffix(".")
        refuse("device", name, f"is not available here ({reason})", "Use device=auto")
    return device


def device_name(device: torch.device) -> str:
    """The model of an accelerator, `cpu` for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
