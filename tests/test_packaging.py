"""The wheel: complete, nothing else in it, and at work in an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from helpers.paths import ROOT

INGREDIENTS = ("pyproject.toml", "README.md", "LICENSE", ".gitignore")
LOCAL = "svl/conf/local/default.yaml"
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "SVL_", "HYDRA_"))}

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="not a checkout")


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sources(folder: str) -> set[str]:
    """Files of a source folder, without what tools leave behind."""
    files = (p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {p.relative_to(ROOT).as_posix() for p in files if ROOT / "conf" / "local" not in p.parents}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy with a user's own settings and a stale byte-code file in it."""
    tree = tmp_path_factory.mktemp("tree")
    for name in INGREDIENTS:
        shutil.copy(ROOT / name, tree)
    for folder in ("svl", "conf", "tests", "experiments/paper"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "local"))
    for name in ("conf/local/default.yaml", "svl/__pycache__/core.cpython-311.pyc"):
        (tree / name).parent.mkdir()
        (tree / name).write_text("")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tree / "dist", cwd=tree)
    (built,) = (tree / "dist").iterdir()
    return built


def test_wheel_holds_package_configuration_and_demo_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    paper = {f"svl/report/{name.rpartition('/')[2]}" for name in sources("experiments/paper") if name.endswith(".csv")}
    assert names == sources("svl") | {f"svl/{name}" for name in sources("conf")} | paper
    assert {name.rpartition("/")[2] for name in paper} == {"published_scores.csv", "short_lvlm_main_results.csv"}
    assert names >= {
        "svl/conf/config.yaml", "svl/conf/strategy/short_lvlm.yaml", "svl/demo/demo_lvlm/model.safetensors",
        "svl/demo/demo_lvlm/chat_template.jinja", "svl/demo/data/calibration.parquet",
        "svl/demo/tasks/svl_demo_open.yaml", "svl/demo/tasks/utils.py",
    }  # fmt: skip


def test_settings_of_this_machine_are_not_shipped(wheel):
    assert LOCAL not in zipfile.ZipFile(wheel).namelist()


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (info,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert b"Apache License" in archive.read(f"{info}/licenses/LICENSE")
    assert "lmms-eval==" in "".join(line for line in metadata.splitlines() if "extra == 'eval'" in line)
    assert archive.read(f"{info}/entry_points.txt").decode().split("\n")[:4] == [
        "[console_scripts]",
        "svl = svl.cli:main",
        "svl-export = svl.checkpoints.export_command:main",
        "svl-report = svl.report:main",
    ]


def test_installed_wheel_works_from_another_folder(wheel, tmp_path):
    """In a fresh environment that finds the dependencies, but not svl itself, where they are already installed."""
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python, script = venv / "bin" / "python", venv / "bin" / "svl"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=tmp_path)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    package = run(python, "-c", "import svl; print(svl.__file__)", cwd=elsewhere).strip()
    assert package == str(site / "svl" / "__init__.py")
    n = len(list((ROOT / "conf" / "strategy").glob("*.yaml")))
    assert f"which layers go ({n} choices" in run(script, "--help", cwd=elsewhere)
    assert "Paper     https://arxiv.org/abs/2402.11187" in run(script, "explain", "strategy=laco", cwd=elsewhere)
    shown = run(script, "--cfg", "job", "--resolve", cwd=elsewhere)
    for path in (site / "svl" / "demo" / "demo_lvlm", site / "svl" / "demo" / "tasks"):
        assert str(path) in shown
        assert path.is_dir()
    assert not list(elsewhere.iterdir())
    beside = "from svl.report.paper import numbers; print(numbers('llava-1.5-7b').value(None, 'svl_pope', []))"
    assert run(python, "-c", beside, cwd=elsewhere) == "84.8\n"
