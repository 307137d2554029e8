"""Errors that say what is allowed."""

from __future__ import annotations

import pytest
import torch

from svl.core import SvlError, did_you_mean, one_of
from svl.core.errors import explained, out_of_memory


def test_suggestions_come_from_what_is_allowed():
    assert did_you_mean("shortgtp", ["short_lvlm", "shortgpt", "tail"]) == " (did you mean 'shortgpt'?)"
    assert did_you_mean("zzz", ["tail"]) == ""
    one_of("rule", "nucleus", ("fraction", "nucleus"))
    recovery = ["recovery.layers", "recovery.learning_rate", "recovery.steps", "recovery.max_grad_norm"]
    sets = ["aokvqa", "finevision", "llava_instruct", "local"]
    for word, options, meant in (
        ("llava", sets, "llava_instruct"),  # begins with it; "aokvqa" has as many letters of it
        ("instruct", sets, "llava_instruct"),
        ("mine.json", sets, None),
        ("recovery.lr", recovery, "recovery.learning_rate"),
        ("recovery.grad_norm", recovery, "recovery.max_grad_norm"),
        ("recovery.xyz", recovery, None),  # all that is alike is what settings of a group have in common
        ("ShortGTP", ["short_lvlm", "shortgpt"], "shortgpt"),
    ):
        assert did_you_mean(word, options) == (f" (did you mean '{meant}'?)" if meant else "")
    with pytest.raises(SvlError, match=r"rule is 'nucles'.*fraction, nucleus \(did you mean 'nucleus'\?\)"):
        one_of("rule", "nucles", ("fraction", "nucleus"))


# ------------------------------------------------------------------------------------- errors of others


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("wrong value\nmore of it"), "reading x: wrong value; do this"),
        (KeyError("name"), "reading x: KeyError: 'name'; do this"),
        (ZeroDivisionError(), "reading x: ZeroDivisionError; do this"),
        (FileNotFoundError(2, "No such file", "x.json"), "reading x: [Errno 2] No such file: 'x.json'; do this"),
    ],
)
def test_whatever_is_raised_becomes_one_line_and_stays_the_cause(error, line):
    with pytest.raises(SvlError) as caught, explained("reading x", "; do this"):
        raise error
    assert (str(caught.value), caught.value.__cause__) == (line, error)


def test_an_explained_error_is_not_explained_again():
    with pytest.raises(SvlError, match=r"^mended$"), explained("reading x"):
        raise SvlError("mended")
    with pytest.raises(KeyboardInterrupt), explained("reading x"):
        raise KeyboardInterrupt


# ----------------------------------------------------------------------------------------------- memory


def allocate_more_than_there_is():
    torch.empty(2**60, dtype=torch.uint8)


def python_error():
    raise MemoryError


def accelerator_error():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")


def library_error():
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize(
    ("fail", "asked"),
    [
        (allocate_more_than_there_is, r" when it asked for \d+ bytes"),
        (python_error, ""),
        (accelerator_error, r" when it asked for 2\.00 GiB"),
        (library_error, ""),
    ],
)
def test_running_out_of_memory_is_one_line_with_what_to_turn_down(fail, asked):
    with (
        pytest.raises(SvlError, match=rf"^calibration ran out of memory{asked}: lower the batch$"),
        out_of_memory("calibration", "lower the batch"),
        explained("reading x"),  # lets it pass
    ):
        fail()


@pytest.mark.parametrize("error", [ValueError("too large"), RuntimeError("shapes differ"), SvlError("out of memory")])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, out_of_memory("calibration", "lower the batch"):
        raise error
    assert caught.value is error
