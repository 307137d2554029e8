"""Which device a model is loaded to, and what loading is told about several."""

from __future__ import annotations

import gc
import logging

import pytest
import torch
from helpers.fake_devices import accelerator, fake_devices
from helpers.references import logits
from helpers.spread_models import map_over
from safetensors.torch import load_file

import svl
from svl.core import Plan, SvlError
from svl.models import loading
from svl.models.devices import find_device
from svl.models.options import LoadOptions
from svl.models.placement import stored_tensor
from svl.pruning.surgery import apply


def test_tensors_of_two_fake_devices_do_not_meet():
    """What the tests of placement rest on."""
    first, second, _ = fake_devices()
    x, y = torch.arange(6.0, device=first).view(2, 3), torch.ones(3, device=second)
    with pytest.raises(RuntimeError, match=r"aten::add of tensors on different devices: fake:0, fake:1"):
        x + y
    with pytest.raises(RuntimeError, match=r"different devices: cpu, fake:0"):
        x @ torch.ones(3)
    with pytest.raises(RuntimeError, match="different devices"):
        x[torch.tensor([1], device=second)]
    assert (x + y.to(first) + 1 + torch.tensor(1.0)).cpu().tolist() == [[3, 4, 5], [6, 7, 8]]
    assert x[torch.tensor([1])].device == x.device
    assert torch.accelerator.is_available() is False


def test_auto_is_the_accelerator_if_it_works(caplog):
    assert find_device("auto") == torch.device("cpu")
    with accelerator() as name:
        assert find_device("auto").type == torch.device(name).type
    assert not caplog.records


def test_an_accelerator_that_fails_is_passed_over_and_the_warning_says_why(caplog):
    with accelerator(broken="no kernel image is available for execution on the device"):
        assert find_device("auto") == torch.device("cpu")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "so the CPU is used: no kernel image is available" in record.getMessage()


def test_a_device_that_there_is_not_is_one_line():
    with pytest.raises(SvlError, match=r"^cannot use model\.device='gpu0': [^\n]+$"):
        find_device("gpu0")


def test_weights_go_through_host_memory_without_accelerate_and_the_log_says_so(checkpoint, monkeypatch, caplog):
    (name, *_) = fake_devices()
    direct = svl.load(checkpoint("llava"), device=name)
    assert not [record for record in caplog.records if "accelerate" in record.getMessage()]
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda package: None)
    loading._last_model.clear()
    detour = svl.load(checkpoint("llava"), device=name)
    assert "without the package accelerate, weights are read to host memory first, then to fake:0" in caplog.text
    assert {p.device for p in detour.model.parameters()} == {p.device for p in direct.model.parameters()}


def test_a_process_loads_to_the_accelerator_that_it_has_taken(checkpoint, monkeypatch):
    (_, taken, _) = fake_devices()
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    lvlm = svl.load(checkpoint("llama"), device="fake")
    assert {str(t.device) for t in (*lvlm.model.parameters(), *lvlm.model.buffers())} == {taken}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device_map": "best"}, r"model\.device_map is 'best', but must be one of: auto, balanced, .*sequential"),
        ({"device_map": "auto", "device": "cpu"}, r"names one device, model\.device_map several"),
        ({"max_memory": {0: "1GiB"}}, r"model\.max_memory is read with model\.device_map only"),
        ({"device_map": "auto", "max_memory": "1GiB"}, r"must be a mapping such as \{0: 20GiB\}"),
        ({"attn_implementation": "fast"}, r"must be one of: auto, sdpa, eager, flash_attention_2"),
        ({"attn_implementation": "flash_attention_2"}, r"flash_attention_2 needs the package flash-attn"),
    ],
)
def test_settings_that_cannot_be_are_one_line(settings, message):
    with pytest.raises(SvlError, match=rf"^[^\n]*{message}[^\n]*$"):
        LoadOptions(**settings)


def test_a_map_needs_accelerate(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(SvlError, match="needs the package accelerate: pip install accelerate"):
        LoadOptions(device_map="auto")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_head": None}, r"has no place for 1 weights, lm_head\.weight for one"),
        ({"lm_head": "gpu0"}, r"model\.device_map names 'gpu0'"),
    ],
)
def test_a_map_that_does_not_fit_is_found_before_weights_are_read(change, message, checkpoint, llava, monkeypatch):
    monkeypatch.setattr(loading, "load_spread", lambda *_: pytest.fail("weights are read"))
    places = map_over(llava, ["cpu"]) | change
    with pytest.raises(SvlError, match=rf"^[^\n]*{message}[^\n]*$"):
        svl.load(checkpoint("llava"), device_map={name: place for name, place in places.items() if place is not None})


def test_numbers_of_devices_may_come_as_texts():
    options = LoadOptions(device_map={"": "0", "lm_head": "cuda:1"}, max_memory={"0": "20GiB", "cpu": "60GiB"})
    assert options.device_map == {"": 0, "lm_head": "cuda:1"}
    assert options.max_memory == {0: "20GiB", "cpu": "60GiB"}
    assert len({options, LoadOptions()}) == 2


def test_the_chosen_attention_computes_in_all_parts(checkpoint, samples, encode):
    found = {}
    for name in ("auto", "sdpa", "eager"):
        lvlm = svl.load(checkpoint("llava"), device="cpu", attn_implementation=name)
        config = lvlm.model.config
        kinds = {part._attn_implementation for part in (config, config.text_config, config.vision_config)}
        assert kinds == {"sdpa" if name == "auto" else name}
        inputs = encode(lvlm, samples.samples)
        found[name] = logits(lvlm.model, inputs)[inputs["attention_mask"].bool()]
    assert torch.equal(found["auto"], found["sdpa"])
    torch.testing.assert_close(found["eager"], found["sdpa"], atol=1e-4, rtol=1e-4)


def test_folders_for_offloaded_weights_are_removed_with_their_readers(checkpoint, llava, tmp_path, monkeypatch):
    """Pickled weights on disk have to be written anew."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    folder = tmp_path / "pickled"
    folder.mkdir()
    for file in checkpoint("llava").iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(checkpoint("llava") / "model.safetensors"), folder / "pytorch_model.bin")
    spread = svl.load(folder, device_map=map_over(llava, ["cpu", "disk"]))
    pruned = apply(spread, Plan(4, (0,)))
    loading._last_model.clear()
    del spread
    assert list((tmp_path / "temporary").iterdir())
    assert not any(stored_tensor(pruned.model, name).is_meta for name, _ in pruned.model.named_parameters())
    del pruned
    gc.collect()
    assert not list((tmp_path / "temporary").iterdir())
