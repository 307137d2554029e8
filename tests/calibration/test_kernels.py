"""Fused kernels, run by Triton's interpreter on the CPU, and compiled for real devices, which need not be there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svl.calibration import hooks

triton = pytest.importorskip("triton", reason="Triton comes with CUDA builds of torch")
from svl.calibration import kernels  # noqa: E402 (needs Triton)

ROOT = Path(__file__).parents[2]


def test_kernels_compute_what_they_say():
    """In a process of their own: Triton decides when it is imported whether it interprets kernels."""
    file = Path(__file__).with_name("interpreted_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("device", "dtype", "d"), [(80, "fp32", 512), (90, "bf16", 128)])
def test_kernels_compile_for_devices(device, dtype, d):
    target = triton.backends.compiler.GPUTarget("cuda", device, 32)
    sizes = kernels.block_sizes(d, 4 if dtype == "fp32" else 2)
    constants = {"width": sizes["width"], "rows": sizes["rows"], "masked": True, "causal": True}
    types = {"q_at": f"*{dtype}", "k_at": f"*{dtype}", "mask_at": "*u8", "scaling": "fp32"}
    options = {name: sizes[name] for name in ("num_warps", "num_stages")}
    for kernel in (kernels.emitted_by_head, kernels.received_by_head):
        signature = {name: types.get(name, "*fp32" if name.endswith("_at") else "i32") for name in kernel.arg_names}
        signature |= dict.fromkeys(constants, "constexpr")
        made = triton.compile(triton.compiler.ASTSource(kernel, signature, constants), target=target, options=options)
        assert made.asm["cubin"]
        assert made.metadata.shared <= 99 * 1024


def test_the_cpu_runs_no_kernels():
    assert hooks.fused_kernels(torch.device("cpu")) is None


def test_kernels_that_do_not_run_are_done_without(caplog):
    """As on a machine without a C compiler, or without a device of that name."""
    hooks.fused_kernels.cache_clear()
    assert hooks.fused_kernels(torch.device("cuda", 7)) is None
    (record,) = caplog.records
    assert record.getMessage().startswith("fused kernels do not run in torch.float32 with heads of size 16 on 'cuda:7'")
