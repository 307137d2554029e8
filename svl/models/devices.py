"""Devices: which one to use, and what a speed measured on it depends on."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor

from svl.core.errors import explained


def find_device(device: str) -> torch.device:
    """A torch device; "auto" is the first accelerator, else the CPU.

    Raises:
        SvlError: if there is no such device.
    """
    if device == "auto":
        device = str(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else "cpu"
    with explained(f"cannot use model.device='{device}'"):
        return torch.device(device)


def moved(value: Tensor, device: torch.device) -> Tensor:
    """`value` on the device; to CUDA through pinned memory, so that nothing waits for the copy."""
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def device_facts(device: torch.device, batch_size: int) -> dict[str, Any]:
    """What a speed depends on besides the model: type and name of the device, and the batch size."""
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return {"type": device.type, "name": name, "batch_size": batch_size}
