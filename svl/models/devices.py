"""Devices: which one to use, what it can do, and what a speed measured on it depends on."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from svl.core.errors import explained, reason_of

log = logging.getLogger(__name__)


def find_device(device: str) -> torch.device:
    """A torch device; "auto" is the accelerator, if it works, else the CPU.

    An accelerator that is there but fails in what takes it a moment (an old driver, no kernels for it in this build of
    torch) is passed over with a warning.

    Raises:
        SvlError: if there is no such device.
    """
    if device != "auto":
        with explained(f"cannot use model.device='{device}'"):
            return torch.device(device)
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator()
    try:
        x = torch.ones(2, 2, device=found)
        works = float((x @ x).sum()) == 8
        why = "2 x 2 ones times themselves give another sum than 8"
    except Exception as error:  # noqa: BLE001 (whatever a driver raises)
        works, why = False, reason_of(error)
    if works and found is not None:
        return found
    log.warning("the accelerator '%s' does not work, so the CPU is used: %s", found, why)
    return torch.device("cpu")


def numbered_device(device: torch.device) -> torch.device:
    """The device with its number: without one, an accelerator is the thread's current one, and threads differ in it."""
    if device.index is not None or device.type in ("cpu", "meta"):
        return device
    with explained(f"cannot use model.device='{device}'"):
        return torch.device(device.type, torch.accelerator.current_device_index())


def fp64_device(device: torch.device) -> torch.device:
    """Where sums over tensors of `device` are taken: there if it computes in fp64, else (Apple's MPS) on the CPU."""
    try:
        torch.ones((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):  # torch raises one or the other, by device
        return torch.device("cpu")
    return device


def synchronize(devices: Iterable[torch.device]) -> None:
    """Wait until devices have done what they were told to do; a CPU is never late."""
    for device in devices:
        if device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(device)


def moved(value: Tensor, device: torch.device) -> Tensor:
    """`value` on the device; to CUDA through pinned memory, so that nothing waits for the copy."""
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def fetched(values: dict[str, Tensor], device: torch.device) -> Callable[[], dict[str, Tensor]]:
    """Starts to copy what a device computes to the CPU; calling what it gives waits for the copies.

    On CUDA the device works on meanwhile. On others, and for values that lie elsewhere, everything is waited for at
    once.
    """
    if device.type != "cuda":
        copies = {name: value.cpu() for name, value in values.items()}
        return lambda: copies
    copies = {name: value.to("cpu", non_blocking=value.device == device) for name, value in values.items()}
    with torch.cuda.device(device):
        arrived = torch.cuda.Event()
        arrived.record()

    def wait() -> dict[str, Tensor]:
        arrived.synchronize()
        return copies

    return wait


def device_facts(device: torch.device, batch_size: int) -> dict[str, Any]:
    """What a speed depends on besides the model: type and name of the device, and the batch size."""
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return {"type": device.type, "name": name, "batch_size": batch_size}
