"""Exports run no code, take nothing along that is not asked for, and are whole or not there."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import digests
from helpers.exports import set_config
from helpers.races import in_another_process, race

from svl.checkpoints import export, safetensors_files, safetensors_writing
from svl.checkpoints.export import ExportRecord
from svl.core import Plan, SvlError
from svl.models.options import LoadOptions


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_only_known_files_are_taken_along(family, tmp_path):
    source = family("llama")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "vocab.pt"):
        torch.save(Trap(tmp_path / "mark"), source / name)
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("secret")
    for name in (".env", ".tokenizer.json", "notes.txt", "id_rsa", "events.out.tfevents", "trainer_state.json"):
        (source / name).write_text("secret")
    known = (
        "LICENSE", "LICENSE.txt", "NOTICE", "vocab.txt", "merges.txt", "tokenizer.model", "tokenizer_config.json",
        "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "qwen.tiktoken",
        "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "tokenizer.json",
        "additional_chat_templates/tool.jinja", "modeling_mine.py",
    )  # fmt: skip
    for name in known:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    ours = export.save(source, Plan(6, (1,)), tmp_path / "out")
    written = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert digests(ours).keys() == {*known, *written}
    assert all((ours / name).read_text() == name for name in known)
    assert not (tmp_path / "mark").exists()
    torch.load(source / "training_args.bin", weights_only=False)  # the trap would have worked
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "additional_chat_templates/tool.jinja"])
def test_links_out_of_the_folder_are_not_followed(name, family, tmp_path):
    source = family("llama")
    (tmp_path / "secret").write_text("secret")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(tmp_path / "secret")
    for check in (export.check_exportable, lambda *paths: export.save(paths[0], Plan(6, (1,)), paths[1])):
        with pytest.raises(SvlError, match=r"is a link out of its folder, to '.*secret'.*copy the file there"):
            check(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (source / name).unlink()
    (source / "within").write_text("mine")
    (source / name).symlink_to(source / "within")
    out = export.save(source, Plan(6, (1,)), tmp_path / "out")
    assert (out / name).read_text() == "mine"
    assert not (out / name).is_symlink()


def test_folders_and_devices_are_no_files(family, tmp_path):
    source = family("llama")
    (source / "tokenizer.json").mkdir()
    os.mkfifo(source / "vocab.txt")
    (source / "merges.txt").symlink_to("/dev/zero")
    out = export.save(source, Plan(6, (1,)), tmp_path / "out")
    assert not {"tokenizer.json", "vocab.txt", "merges.txt"} & {path.name for path in out.iterdir()}


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).touch()
class MineConfig(LlamaConfig):
    model_type = "mine"
class Mine(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_remote_code_runs_only_if_asked_by_name(family, tmp_path, monkeypatch):
    source = family("llama")
    mark = tmp_path / "mark"
    (source / "modeling_mine.py").write_text(CODE.format(mark=str(mark)))
    auto = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.Mine"}
    set_config(source, model_type="mine", auto_map=auto, architectures=["Mine"])
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(SvlError):
        export.save(source, Plan(6, (1,)), tmp_path / "out")
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_the_disk_must_have_room(family, tmp_path, monkeypatch):
    source = family("llama")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(SvlError, match=r"needs 1[67]\.\d MB, but .* has 100\.0 kB left; nothing was written"):
        export.save(source, Plan(6, (1,)), tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("error", "message"), [(KeyboardInterrupt, None), (OSError(errno.ENOSPC, "full"), "No space"), (ValueError, None)]
)
def test_a_failing_export_leaves_nothing(error, message, family, tmp_path, monkeypatch):
    source = family("llama")
    copied = safetensors_writing.copy_bytes

    def failing(*arguments: Any) -> None:
        copied(*arguments)
        raise error

    monkeypatch.setattr(safetensors_writing, "copy_bytes", failing)
    with pytest.raises(SvlError if message else error, match=message):
        export.save(source, Plan(6, (1,)), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [source.name]


def test_nothing_is_overwritten(family, tmp_path):
    source = family("llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    for target in (tmp_path / "out", source):
        with pytest.raises(SvlError, match="exists already"):
            export.save(source, Plan(6, (1,)), target)
    assert digests(tmp_path / "out").keys() == {"mine.txt"}


def test_two_processes_never_mix_their_exports(family, tmp_path):
    """In 20 rounds, two plans for one folder: one is written whole, the other is told why not."""
    source = family("llama")
    plans = [Plan(6, (1,)), Plan(6, (2, 3))]
    alone = [digests(export.save(source, p, tmp_path / f"alone-{len(p.kept)}" / "out")) for p in plans]

    def write(number: int, process: int) -> str:
        try:
            export.save(source, plans[process], tmp_path / str(number) / "out")
        except SvlError as error:
            return str(error)
        return "exported"

    refusal = re.compile(r"is being written by process \d+ on \S+ since |exists already; it is never overwritten")
    for number, told in enumerate(race(write)):
        out = tmp_path / str(number) / "out"
        assert told.count("exported") == 1
        assert digests(out) == alone[told.index("exported")]
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        assert refusal.search(told[1 - told.index("exported")])


def test_a_reserved_path_is_for_one_process(family, tmp_path):
    source, out = family("llama"), tmp_path / "new" / "out"
    with export.reserve_export(out):
        refusal = in_another_process(lambda: export.save("nowhere", Plan(6, (1,)), out))
        me = f"process {os.getpid()} on {socket.gethostname()} since "
        assert isinstance(refusal, SvlError)
        assert f"out' is being written by {me}" in str(refusal)
        export.save(source, Plan(6, (2,)), out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with pytest.raises(SvlError, match="exists already"), export.reserve_export(out):
        pytest.fail("entered")


def test_what_an_export_refuses_is_known_before(family, tmp_path, monkeypatch):
    source = family("llama")
    export.check_exportable(source, tmp_path / "out", n_remove=2, compensates=True)
    with pytest.raises(SvlError, match="exists already"):
        export.check_exportable(source, tmp_path)
    with pytest.raises(SvlError, match="normalises after its projections"):
        export.check_exportable(family("gemma3"), tmp_path / "out", compensates=True)
    with pytest.raises(SvlError, match="is no list of 6 layers"):
        export.check_exportable(source, tmp_path / "out", LoadOptions(layers="model.norm"))
    tensors = safetensors_files.read_tensors(source)
    layer = sum(tensor.size for name, tensor in tensors.items() if ".layers.0." in name)
    least = sum(tensor.size for tensor in tensors.values()) - 2 * layer
    usage = shutil.disk_usage(tmp_path)
    for free in (least - 1, least):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if free < least:
            with pytest.raises(SvlError, match=r"the export needs .* left; nothing was written"):
                export.check_exportable(source, tmp_path / "out", n_remove=2)
        else:
            export.check_exportable(source, tmp_path / "out", n_remove=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EIO", "ESTALE", "EXDEV", "EROFS", "EACCES", "ENOLCK"])
@pytest.mark.parametrize("call", ["pathlib.Path.rename", "shutil.copyfile", "pathlib.Path.mkdir"])
def test_any_error_of_the_file_system_is_one_line(call, code, family, tmp_path, monkeypatch):
    source, number = family("llama"), getattr(errno, code)

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(call, refused)
        with pytest.raises(SvlError, match=f"cannot write .*{re.escape(os.strerror(number))}"):
            export.save(source, Plan(6, (1,)), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_an_export_remembers_its_run(family, tmp_path):
    path = export.save(family("llama"), Plan(6, (1,)), tmp_path / "out", record=ExportRecord(key="abc"))
    assert export.exporting_run(path) == "abc"
    export.check_export_path(path)
    export.check_export_path(tmp_path / "new")
    with pytest.raises(SvlError, match="exists already"):
        export.check_export_path(tmp_path)


@pytest.mark.parametrize(
    "content", ["[1, 2]", "{}", "null", '{"layer_pruning": 3}', "no JSON", '{"layer_pruning": {}}']
)
def test_other_folders_have_no_key(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    assert export.exporting_run(tmp_path) is None
    with pytest.raises(SvlError, match="exists already"):
        export.check_export_path(tmp_path)
