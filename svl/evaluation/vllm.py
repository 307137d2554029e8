"""A checkpoint in vLLM, as an answerer of lmms-eval tasks."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from svl.core import SvlError


def vllm_answerer(path: str, batch_size: int, options: dict[str, Any], template: str | None = None) -> Any:
    """A checkpoint in vLLM, as `evaluate` takes it: lmms-eval's own adapter, with its caps and stop strings corrected.

    Args:
        path: folder, or hub id.
        batch_size: requests that are handed over at once.
        options: of `vllm.LLM`.
        template: chat template to use instead of the checkpoint's own.

    Raises:
        SvlError: if vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise SvlError("evaluator=vllm needs vLLM (pip install vllm) and a GPU that it supports")
    from svl.evaluation.answerer import cut_at_stops, stops_of
    from svl.evaluation.lmms_eval_internals import Request, generation_arguments, vllm_adapter

    adapter = vllm_adapter()

    class VllmAnswerer(adapter):  # type: ignore[valid-type, misc]
        """What `evaluate` reads of an answerer, besides lmms-eval's interface."""

        def device_facts(self) -> dict[str, Any]:
            """What a speed depends on besides the model."""
            name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
            return {"type": "vllm", "name": name, "batch_size": batch_size}

        def generate_until(self, requests: list[Request]) -> list[str]:
            """An answer to each request, in their order."""
            began = time.perf_counter()
            answers = super().generate_until(requests)
            self.seconds = time.perf_counter() - began
            self.first_prompt = generation_arguments(requests[0]).text
            return [cut_at_stops(answer.text, stops_of(r)) for r, answer in zip(requests, answers, strict=True)]

    with tempfile.TemporaryDirectory() as folder:
        if template:  # as a file: in a text, the adapter takes a slash for a path
            file = Path(folder, "template.jinja")
            file.write_text(template)
            options = {**options, "chat_template": str(file)}
        return VllmAnswerer(model=path, batch_size=batch_size, **options)
