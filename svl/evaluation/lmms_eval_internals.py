"""What svl uses of lmms-eval 0.7.3, under plain names: its interface, its private names, and what is changed in it.

Nothing else in svl imports lmms_eval (but for functions of task files, which lmms-eval runs). pyproject.toml pins the
version; tests/evaluation/test_lmms_eval_internals.py looks for every name.

* lmms-eval's bars are hidden, its prints go to stderr, its warnings and errors to the logger `lmms_eval`.
* Loading and scoring are tried once: lmms-eval tries five times, two seconds apart, and hides the error.
"""

from __future__ import annotations

import gc
import io
import logging
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import datasets
import loguru
import torch
from lmms_eval import evaluator
from lmms_eval.api import task as task_module
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.instance import Instance as Request
from lmms_eval.api.model import lmms as Model
from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask
from lmms_eval.utils import load_yaml_config
from tqdm import tqdm

from svl.core import SvlError
from svl.text.escaping import for_terminal

__all__ = [
    "GenerationTask",
    "LikelihoodTask",
    "Model",
    "OptionRequest",
    "Request",
    "data_cache_folder",
    "generation_arguments",
    "likeliest",
    "likelihood_arguments",
    "likelihood_result",
    "load_yaml_config",
    "quiet",
    "run_task",
    "vllm_adapter",
]


def _to_logging(message: Any) -> None:
    logging.getLogger("lmms_eval").log(message.record["level"].no, for_terminal(message.record["message"]))


loguru.logger.configure(handlers=[{"sink": _to_logging, "level": "WARNING", "format": "{message}"}])


# --------------------------------------------------------------------------------------------------- tasks


class GenerationTask(ConfigurableMessagesTask):
    """A task that asks for generated answers.

    Attributes:
        options_of: of a document, the answers whose likelihood is asked for besides; None: of none.
        likely: what the names of metrics begin with that are scored as if the likeliest option were the answer.
    """

    options_of: Callable[[Mapping[str, Any]], list[str]] | None = None
    likely = ""
    download = ConfigurableMessagesTask.download.__wrapped__

    def construct_requests(self, doc_id: int, ctx: str, **more: Any) -> list[Request]:
        """As upstream; then one request for each option."""
        question = super().construct_requests(doc_id, ctx, **more)
        text, _, _, *where = question.args
        if self.options_of is None:
            return [question]
        document = self.dataset_no_image[where[-1]][doc_id]
        return [question] + [
            OptionRequest(
                "loglikelihood", (text, option, self.doc_to_visual, *where), i, question.metadata, question=question
            )
            for i, option in enumerate(self.options_of(document), 1)
        ]

    def process_results(self, doc: Any, results: list[Any], full_docs: Any = None) -> Any:
        """As upstream, of the generated answer and of the likeliest option; of the latter, metrics that are listed."""
        score = ConfigurableMessagesTask.process_results.__wrapped__
        answer, *likelihoods = results
        items = score(self, doc, [answer], full_docs)
        if likelihoods and self.options_of is not None:
            found = score(self, doc, [likeliest(self.options_of(doc), likelihoods)], full_docs).items()
            items |= {self.likely + name: item for name, item in found if self.likely + name in self.aggregation()}
        return items


def likeliest(options: Sequence[str], likelihoods: Sequence[tuple[float, bool]]) -> str:
    """The option of the least loss (sum over its tokens; of equals the first), by one `likelihood_result` of each.

    Raises:
        SvlError: if a loss is NaN.
    """
    losses = [loss for loss, _ in likelihoods]
    if any(map(math.isnan, losses)):
        raise SvlError("the model's logits are not finite, so that no option is the likeliest: try another model.dtype")
    return options[losses.index(min(losses))]


class LikelihoodTask(ConfigurableTask):
    """A task that asks for the likelihood of given answers."""

    download = ConfigurableTask.download.__wrapped__

    def process_results(self, doc: Any, results: list[Any], full_docs: Any = None) -> Any:
        """As upstream, which looks for the pair of a `loglikelihood` task one level too high."""
        score = ConfigurableTask.process_results.__wrapped__
        return score(self, doc, results[0] if self.OUTPUT_TYPE == "loglikelihood" else results, full_docs)


def data_cache_folder() -> str:
    """Where lmms-eval keeps the data sets that it has loaded."""
    return str(task_module._resolve_hf_datasets_cache_dir())


# ------------------------------------------------------------------------------------------------ requests


class GenerationArguments(NamedTuple):
    """What a request for a generated answer consists of."""

    text: str
    to_messages: Callable[[Mapping[str, Any]], list[dict[str, Any]]]  # of the document
    settings: dict[str, Any]  # `max_new_tokens`, `until`, ...
    doc_id: int
    task: str
    split: str


class LikelihoodArguments(NamedTuple):
    """What a request for the likelihood of an answer consists of."""

    text: str
    continuation: str | Callable[[Mapping[str, Any]], Any]  # of the document
    to_pictures: Callable[[Mapping[str, Any]], list[Any] | None]
    doc_id: int
    task: str
    split: str


@dataclass
class OptionRequest(Request):
    """A request for the likelihood of an option as the answer to a question.

    Attributes:
        question: the request for a generated answer.
    """

    question: Request | None = None


def generation_arguments(request: Request) -> GenerationArguments:
    """The arguments of a request of type `generate_until`."""
    return GenerationArguments(*request.args)


def likelihood_arguments(request: Request) -> LikelihoodArguments:
    """The arguments of a request of type `loglikelihood`."""
    return LikelihoodArguments(*request.args)


def likelihood_result(loss: float, greedy: bool) -> GenerationResult:
    """What a model answers to a likelihood request: nats, and whether greedy decoding gives the continuation.

    lmms-eval takes the lowest as the model's choice; it would turn a plain pair into text, hence the wrapping.
    """
    return GenerationResult(text=(loss, greedy))


# ----------------------------------------------------------------------------------------------- evaluation


def run_task(model: Model, name: str, task: ConfigurableTask, folder: Path, processes: int) -> dict[str, Any] | None:
    """The `results` and `samples` of a task that `model` answers; None in all processes but the first."""
    model.task_dict[name] = task.dataset
    return evaluator.evaluate(
        lm=model,
        task_dict={name: task},
        bootstrap_iters=0,
        process_docs_parallel=1,
        distributed_executor_backend="torchrun" if processes > 1 else "accelerate",
        # without media: or every image is decoded once more for scoring
        cli_args=Namespace(process_with_media=False, output_path=str(folder), reasoning_tags=None),
    )


class _Harmless(io.TextIOBase):
    """A stream that passes text on with its control characters shown: tasks print what data and models say."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(for_terminal(text))
        return len(text)


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block, lmms-eval and datasets show no progress bars, and print to stderr."""

    def silent(*args: Any, **kwargs: Any) -> tqdm:
        return tqdm(*args, **{**kwargs, "disable": True})

    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    evaluator.tqdm = task_module.tqdm = silent
    try:
        with redirect_stdout(_Harmless(sys.stderr)):
            yield
    finally:
        evaluator.tqdm = task_module.tqdm = tqdm
        if shown:
            datasets.enable_progress_bars()


# ----------------------------------------------------------------------------------------------------- vLLM


def vllm_adapter() -> type[Any]:
    """lmms-eval's model that answers with vLLM, corrected: a task's cap holds, and `close` frees the device.

    (The original takes the larger of a task's cap and its own, which is no cap.) vLLM must be installed.
    """
    from lmms_eval.models.chat.vllm import VLLM

    class Adapter(VLLM):
        """See vllm_adapter."""

        def clean(self) -> None:
            """Nothing: lmms-eval's own would drop the model after its first benchmark."""

        def close(self) -> None:
            """Free the device for the next model."""
            core = getattr(getattr(self.client, "llm_engine", None), "engine_core", None)
            if core is not None:
                core.shutdown()
            del self.client
            gc.collect()
            torch.cuda.empty_cache()

        def _select_max_new_tokens(self, request_max_new_tokens: Any) -> int:
            return int(request_max_new_tokens)

    return Adapter
