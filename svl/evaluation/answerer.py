"""Models as lmms-eval sees them: chat messages in, greedy answers out."""

from __future__ import annotations

import copy
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch

from svl import processes
from svl.core import SvlError
from svl.core.errors import explained, is_out_of_memory, out_of_memory
from svl.evaluation.conversations import Conversation, images_of, message_part, shown_in, video_of
from svl.evaluation.lmms_eval_internals import (
    Model,
    OptionRequest,
    Request,
    generation_arguments,
    likelihood_arguments,
    likelihood_result,
)
from svl.evaluation.lock_step import LockStep
from svl.evaluation.prompt_sizes import PromptSizes
from svl.evaluation.shared_prefill import SharedPrefill
from svl.models.lvlm import Lvlm
from svl.text.progress import progress

T = TypeVar("T")
Answers = tuple[Any, ...]  # to one request, every model's
Reader = SharedPrefill | LockStep  # a way for several models to read one batch

WARM_UP_TOKENS = 2
WAY_OUT = "; leave it out by benchmark.limit, or name the placeholder of images with model.image_token"


class Part(NamedTuple):
    """Requests of a batch that show equally many images and videos.

    Attributes:
        places: of the requests in their batch.
        conversations: that they ask to continue, with their images.
        continuations: whose likelihood is asked for; empty where answers are generated.
        inputs: of models, None until they are made.
    """

    places: list[int]
    conversations: list[Conversation]
    continuations: list[str]
    inputs: dict[str, torch.Tensor] | None = None


class Answerer(Model):
    """Models as lmms-eval sees them: chat messages in, greedy answers out.

    Several models answer together when the first of them is asked, in the way of `reader`.

    Attributes:
        current: the number of the model whose answers are given.
        rows: of the documents, in the data.
        frames: of a video, how many are shown.
        seconds: the time the last benchmark took: reading images, preparing inputs, generating (not likelihoods that
            are asked for besides).
        first_prompt: of the first document, as the model's tokenizer got it.
    """

    # read by lmms-eval
    is_simple = False  # it wants messages
    device = torch.device("cpu")  # of bookkeeping between processes
    accelerator = None  # there, so that lmms-eval sets up none

    def __init__(self, models: Sequence[Lvlm], batch_size: int, description: str, reader: Reader | None = None):
        super().__init__()
        self.models, self.lvlm = models, models[0]
        self.batch_size, self.description = batch_size, description
        self.current = 0
        self.rows: Sequence[int] = ()
        self.frames = 8
        self.first_prompt = ""
        self._seconds: dict[str, float] = {}  # by type of request, as the answers
        self._answers: dict[str, list[Answers]] = {}
        self._reader = reader or SharedPrefill(models)
        self._coming: dict[tuple[int, ...], Future[list[Part]]] = {}  # by their requests
        self._tokenizing = threading.Lock()  # a tokenizer serves one thread at a time

    @property
    def on_accelerator(self) -> bool:
        """Whether threads may prepare batches: on the CPU they would take from the model."""
        return self.lvlm.device.type != "cpu"

    def clean(self) -> None:
        """Nothing: lmms-eval's own would drop the model after its first benchmark."""

    def device_facts(self) -> dict[str, Any]:
        """What a speed depends on besides the model."""
        facts, count = self.lvlm.device_facts(self.batch_size), processes.process_count()
        return {**facts, "processes": count} if count > 1 else facts

    @property
    def seconds(self) -> float:
        """See the class."""
        return self._seconds.get("generate_until", self._seconds.get("loglikelihood", 0.0))

    def generate_until(self, requests: list[Request]) -> list[str]:
        """An answer to each request, in their order."""
        answers = self._of_current(requests, cap_of)
        return [cut_at_stops(text, stops_of(r)) for r, text in zip(requests, answers, strict=True)]

    def loglikelihood(self, requests: list[Request]) -> list[Any]:
        """The likelihood of each request's continuation, as `likelihood_result` makes it."""
        return self._of_current(requests, no_cap)

    def generate_until_multi_round(self, requests: list[Request]) -> Any:
        """Not supported; `load_task` refuses such tasks."""
        raise NotImplementedError

    def _of_current(self, requests: list[Request], cap: Callable[[Request], int | None]) -> list[Any]:
        """The current model's answers to all requests, in their order."""
        if not requests:
            return []
        kind = requests[0].request_type
        if self.current == 0:
            self._answers[kind] = self._of_all(requests, cap)
        return [of_models[self.current] for of_models in self._answers[kind]]

    def _of_all(self, requests: list[Request], cap: Callable[[Request], int | None]) -> list[Answers]:
        """Every model's answers to all requests, in batches of one cap each."""
        first = min(requests, key=lambda request: request.doc_id)
        self.first_prompt = self.lvlm.render(self.conversation(first))
        self._warm_up(requests, cap)
        began = time.perf_counter()
        answers: list[Answers] = [()] * len(requests)
        batches = list(self._batches(requests, cap))
        self._coming.clear()
        with ThreadPoolExecutor(1) as pool, progress(self.description, len(requests), "questions") as answered:
            for (max_new_tokens, batch), following in zip(batches, [*batches[1:], None], strict=True):
                if following and self.on_accelerator:
                    asked = [requests[i] for i in following[1]]
                    self._coming[tuple(map(id, asked))] = pool.submit(self._prepared, asked, following[0])
                given = self.answer_batch([requests[i] for i in batch], max_new_tokens)
                for i, of_models in zip(batch, given, strict=True):
                    answers[i] = of_models
                answered(len(batch))
        self._seconds[requests[0].request_type] = time.perf_counter() - began
        return answers

    def _batches(
        self, requests: list[Request], cap: Callable[[Request], int | None]
    ) -> Iterator[tuple[int | None, list[int]]]:
        """Caps and numbers of requests that are answered at once."""
        sizes = self._sizes(requests)
        for max_new_tokens, group in grouped(range(len(requests)), lambda i: cap(requests[i])):
            # like with like wastes least padding; the longest first, so that memory runs out at once or never
            group.sort(key=lambda i: sizes[i], reverse=True)
            for start in range(0, len(group), self.batch_size):
                yield max_new_tokens, group[start : start + self.batch_size]

    def _sizes(self, requests: list[Request]) -> list[float]:
        """How long each prompt is; on accelerators, which run out of memory, with the tokens of its images."""
        letters, counted = [len(request.args[0]) for request in requests], PromptSizes(self.lvlm)
        if not self.on_accelerator or not counted.depend_on_images():
            return [float(n) for n in letters]

        def shown(request: Request) -> list[tuple[int, int]]:
            with self._explained([request]):
                return [image.size for image in images_of(self.conversation(request))]

        with ThreadPoolExecutor() as pool:
            return [counted.of(*known) for known in zip(letters, pool.map(shown, requests), strict=True)]

    def _warm_up(self, requests: list[Request], cap: Callable[[Request], int | None]) -> None:
        """Answer the first batch in a few tokens: kernels and caches warm up outside the measured time."""
        max_new_tokens = cap(requests[0])
        batch = [request for request in requests if cap(request) == max_new_tokens][: self.batch_size]
        self.answer_batch(batch, None if max_new_tokens is None else WARM_UP_TOKENS)

    def answer_batch(self, requests: list[Request], max_new_tokens: int | None) -> list[Answers]:
        """Every model's answers to requests of one task, in their order; without a cap, likelihoods.

        Raises:
            SvlError: if a model fails on them; names the task and the documents, by their rows.
        """
        what = f"evaluation of task '{requests[0].task_name}'"
        with out_of_memory(what, f"lower benchmark.batch_size (now {self.batch_size})"), self._explained(requests):
            try:
                return self._answer_batch(requests, max_new_tokens)
            except Exception as error:
                if not isinstance(error, SvlError) and not is_out_of_memory(error):
                    self._prepare_one_by_one(requests)
                raise

    def _answer_batch(self, requests: list[Request], max_new_tokens: int | None) -> list[Answers]:
        answers: list[Answers] = [()] * len(requests)
        coming = self._coming.pop(tuple(map(id, requests)), None)
        for part in coming.result() if coming else self._parts(requests, max_new_tokens):
            ready = {"inputs": part.inputs} if part.inputs else {}
            if max_new_tokens is None:
                given = self.likelihood(part.conversations, part.continuations, **ready)
            else:
                given = self.answer(part.conversations, max_new_tokens, **ready)
            for i, of_models in zip(part.places, given, strict=True):
                answers[i] = of_models
        return answers

    def _parts(self, requests: list[Request], max_new_tokens: int | None) -> Iterator[Part]:
        """Requests with their images read, those with equally many images and videos each at once."""
        conversations = [self.conversation(request) for request in requests]
        for _, places in grouped(range(len(requests)), lambda i: shown_in(conversations[i])):
            continuations = [
                self._continuation(requests[i], conversations[i]) if max_new_tokens is None else "" for i in places
            ]
            yield Part(places, [conversations[i] for i in places], continuations)

    def _prepared(self, requests: list[Request], max_new_tokens: int | None) -> list[Part]:
        """The same with their inputs."""
        parts = self._parts(requests, max_new_tokens)
        return [p._replace(inputs=self._encode(p.conversations, p.continuations)) for p in parts]

    def _prepare_one_by_one(self, requests: list[Request]) -> None:
        """Where one of the documents alone cannot be prepared, raise an error that names it."""
        for request in requests:
            with self._explained([request]):
                conversation = self.conversation(request)
                self._encode([conversation], [""])

    def _explained(self, requests: list[Request]) -> AbstractContextManager[None]:
        """Within the block, whatever is raised becomes one line that names the documents."""
        rows = sorted({self.rows[request.doc_id] for request in requests})
        which = f"document {rows[0]}"
        if len(rows) > 1:
            which = f"documents {', '.join(map(str, rows))} (benchmark.batch_size=1 tells which)"
        return explained(f"task '{requests[0].task_name}': no answer to {which}", WAY_OUT)

    def answer(
        self, conversations: list[Conversation], max_new_tokens: int, inputs: dict[str, torch.Tensor] | None = None
    ) -> list[Answers]:
        """Greedy answers, every model's, to conversations with equally many images and videos each.

        Their model inputs are made if they are not given.
        """
        tokenizer: Any = self.lvlm.tokenizer
        inputs = inputs or self._encode(conversations, [""] * len(conversations))
        settings = copy.deepcopy(self.lvlm.model.generation_config)  # one for all models that answer together
        settings.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None)
        settings.update(max_new_tokens=max_new_tokens, max_length=None)
        if settings.pad_token_id is None:
            settings.pad_token_id = tokenizer.pad_token_id
        prompt = inputs["input_ids"].shape[1]
        found = self._reader.generate(inputs, settings)
        with self._tokenizing:
            texts = [tokenizer.batch_decode(tokens[:, prompt:], skip_special_tokens=True) for tokens in found]
        return list(zip(*texts, strict=True))

    def likelihood(
        self,
        conversations: list[Conversation],
        continuations: list[str],
        inputs: dict[str, torch.Tensor] | None = None,
    ) -> list[Answers]:
        """Of each continuation after its conversation (see `answer`), as `loglikelihood` gives it."""
        asked = zip(conversations, continuations, strict=True)
        lengths = [self._tokens_of(self.lvlm.render(c), continuation) for c, continuation in asked]
        inputs, prompts = inputs or self._encode(conversations, continuations), map(self.lvlm.render, conversations)
        with self._tokenizing:
            inputs = self.lvlm.with_answers(inputs, lengths, list(prompts))
        given: list[list[Any]] = [[] for _ in self.models]
        for k, logits in self._reader.logits(inputs, max(lengths) + 1):
            for row, ids, length in zip(logits.float(), inputs["input_ids"], lengths, strict=True):
                predicted, target = row[-length - 1 : -1].log_softmax(-1), ids[-length:]
                loss = -predicted.gather(1, target[:, None]).sum().item()
                given[k].append(likelihood_result(loss, bool((predicted.argmax(-1) == target).all())))
        return list(zip(*given, strict=True))

    def _encode(self, conversations: list[Conversation], continuations: Sequence[str]) -> dict[str, torch.Tensor]:
        """Model inputs of conversations and what they are continued with."""
        texts = [self.lvlm.render(c) + more for c, more in zip(conversations, continuations, strict=True)]
        with self._tokenizing:
            return self.lvlm.encode(texts, [images_of(c) for c in conversations], [video_of(c) for c in conversations])

    def _tokens_of(self, prompt: str, continuation: str) -> int:
        """How many of the last tokens of the two together are not the prompt's."""
        tokenizer: Any = self.lvlm.tokenizer
        with self._tokenizing:
            whole, start = tokenizer([prompt + continuation, prompt])["input_ids"]
        shared = next((i for i, (a, b) in enumerate(zip(whole, start, strict=False)) if a != b), len(start))
        if shared >= len(whole):
            raise ValueError(f"the answer '{continuation}' has no tokens")
        return len(whole) - shared

    def conversation(self, request: Request) -> Conversation:
        """The messages of a request, with its images read."""
        where = f"document {self.rows[request.doc_id]} of task '{request.task_name}'"
        try:
            messages = self._messages(request)
        except SvlError as error:  # of a picture
            raise SvlError(f"{where}: {error}") from error
        conversation = []
        for message in messages:
            content = message["content"]
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            parts = [message_part(part, where, self.frames) for part in content]
            conversation.append({"role": message["role"], "content": parts})
        about, model = f"task '{request.task_name}' asks about", f"model '{self.lvlm.name}'"
        if images_of(conversation) and not self.lvlm.takes_images:
            raise SvlError(f"{about} images, but {model} reads text only")
        if video_of(conversation) and not self.lvlm.takes_videos:
            raise SvlError(f"{about} videos, but {model} takes none")
        return conversation

    def _messages(self, request: Request) -> list[dict[str, Any]]:
        """The messages of a request as lmms-eval writes them: an image part has a `url`, which is the picture."""
        document = self._document(request)
        if isinstance(request, OptionRequest) and request.question:
            request = request.question
        if request.request_type != "loglikelihood":
            return generation_arguments(request).to_messages(document)
        asked = likelihood_arguments(request)
        images = [{"type": "image", "url": image} for image in asked.to_pictures(document) or []]
        return [{"role": "user", "content": [*images, {"type": "text", "text": asked.text}]}]

    def _continuation(self, request: Request, conversation: Conversation) -> str:
        """The text whose likelihood a request asks for; an option is set apart from a prompt that ends in a word."""
        continuation = likelihood_arguments(request).continuation
        if isinstance(request, OptionRequest):
            return f"{'' if self.lvlm.render(conversation)[-1:].isspace() else ' '}{continuation}"
        if isinstance(continuation, str):
            return continuation
        return f" {continuation(self._document(request))}"  # of type loglikelihood: the target

    def _document(self, request: Request) -> dict[str, Any]:
        task, split = request.args[-2:]
        return self.task_dict[task][split][request.doc_id]


def cap_of(request: Request) -> int:
    """The most tokens that the answer to a request may have."""
    return generation_arguments(request).settings["max_new_tokens"]


def no_cap(request: Request) -> None:
    """Nothing is generated for a request of a likelihood."""


def stops_of(request: Request) -> tuple[str, ...]:
    """The strings that end the answer to a request."""
    until = generation_arguments(request).settings.get("until") or []
    return (until,) if isinstance(until, str) else tuple(until)


def cut_at_stops(text: str, stops: Iterable[str]) -> str:
    """`text` up to the first stop string."""
    for stop in stops:
        text = text.partition(stop)[0] if stop else text
    return text


def grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> Iterable[tuple[Any, list[T]]]:
    """Items by the value of `key`, in order of first appearance."""
    groups: dict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups.items()
