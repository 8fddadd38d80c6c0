"""The tree, the package list, what the core imports, and a wheel in a fresh environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"muxtune": "muxtune", "sim": "", "kernels": ""}
CORE = (
    *("types", "protocols", "errors", "registry", "codec", "engine", "config", "cost", "planning"),
    *("planners", "cluster_policies", "workload"),
)
HEAVY = ("torch", "simpy", "triton", "transformers", "peft")


def declared_packages() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return set(project["tool"]["setuptools"]["packages"])


def packages_in_tree() -> set[str]:
    found = {"muxtune.conf"}  # YAML only; mapped to conf/
    for source in SOURCES:
        base = ROOT if source == "muxtune" else ROOT / source
        for init in (ROOT / source).rglob("__init__.py"):
            found.add(".".join(init.parent.relative_to(base).parts))
    return found


def test_package_list_equals_the_tree():
    assert declared_packages() == packages_in_tree()


@pytest.mark.parametrize("folder", ["experiments", "validation"])
def test_every_experiment_and_result_is_in_its_index(folder: str):
    index = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    folders = (path.name for path in (ROOT / folder).iterdir() if path.is_dir())
    names = sorted(name for name in folders if not name.startswith(("_", ".")))
    assert len(names) > 10
    assert [name for name in names if not re.search(rf"\b{re.escape(name)}\b", index)] == []


def test_every_folder_with_python_code_is_a_package():
    for source in SOURCES:
        for file in (ROOT / source).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), f"{file.parent} lacks __init__.py"


@pytest.mark.parametrize("name", ["kernels", "sim", "conf"])
def test_no_regular_package_with_a_taken_name_at_the_root(name):
    assert (ROOT / name).is_dir()
    assert not (ROOT / name / "__init__.py").exists()


def test_no_python_code_beside_the_yaml_files():
    assert not list((ROOT / "conf").rglob("*.py"))


def test_transformers_imports_with_our_folders_on_the_path():
    code = "import transformers, importlib.util as u; assert u.find_spec('muxtune_kernels')"
    run_python(code, {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])})


def test_core_imports_without_torch_simpy_triton_and_transformers():
    code = f"""
import importlib, pkgutil, sys
for name in {HEAVY!r}:
    sys.modules[name] = None  # an import of it raises ImportError
for name in {CORE!r}:
    module = importlib.import_module("muxtune." + name)
    prefix = module.__name__ + "."
    for part in pkgutil.walk_packages(getattr(module, "__path__", []), prefix):
        importlib.import_module(part.name)
assert not set({HEAVY!r}) & {{name for name, module in sys.modules.items() if module}}
"""
    run_python(code)


def test_the_blocking_of_modules_would_catch_an_import():
    code = "import sys\nsys.modules['simpy'] = None\nimport muxtune_sim.executor"
    done = run_python(code, check=False)
    assert done.returncode != 0
    assert "import of simpy halted" in done.stderr


@pytest.mark.parametrize("name", ["muxtune_sim", "muxtune.runtime"])
def test_backends_do_not_import_each_other(name):
    other = {"muxtune_sim": "muxtune.runtime", "muxtune.runtime": "muxtune_sim"}[name]
    code = f"""
import importlib, pkgutil, sys
module = importlib.import_module({name!r})
for part in pkgutil.walk_packages(module.__path__, module.__name__ + "."):
    importlib.import_module(part.name)
assert not [loaded for loaded in sys.modules if loaded.startswith({other!r})]
"""
    run_python(code)


def test_help_is_fast_because_it_imports_nothing_heavy():
    code = f"""
import sys
from muxtune.cli import main
assert main(["--help"]) == 0
heavy = set({HEAVY!r}) | {{"hydra", "pandas", "scipy", "matplotlib", "numpy"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    assert "usage: muxtune COMMAND" in run_python(code).stdout


def run_python(
    code: str, env: dict[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


# -------------------------------------------------------------------------------------- the wheel

IGNORED = shutil.ignore_patterns(
    ".venv", ".git", "build", "dist", "*.egg-info", "outputs", "multirun", "__pycache__", ".*_cache"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree, so that no build folder is left in the checkout."""
    source = tmp_path_factory.mktemp("source") / "tree"
    shutil.copytree(ROOT, source, ignore=IGNORED)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def wheel_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment with the wheel, outside of the checkout.

    The dependencies are those already installed here, seen through a .pth file; the checkout's
    own editable install is not, because its .pth files are not processed that way.
    """
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    purelib = next((folder / "lib").glob("python*")) / "site-packages"
    command = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([sys.executable, *command, str(purelib), str(wheel)], check=True)
    (purelib / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.slow
def test_the_wheel_holds_code_configuration_and_data(wheel: Path):
    import zipfile

    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "muxtune/cli.py",
        "muxtune/conf/simulate.yaml",
        "muxtune/conf/planner/muxtune.yaml",
        "muxtune_sim/__init__.py",
        "muxtune_kernels/__init__.py",
        "muxtune/cost/data/devices.csv",
        "muxtune/workload/data/seqlen/histograms.csv",
    ):
        assert name in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "conf/", "sim/", "kernels/"))]


@pytest.mark.slow
def test_the_wheel_simulates_outside_of_the_checkout(wheel_python: Path, tmp_path: Path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    origin = [str(wheel_python), "-c", "import muxtune, muxtune_sim; print(muxtune.__file__)"]
    place = subprocess.run(
        origin, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert str(wheel_python.parents[1]) in place.stdout

    command = [str(wheel_python), "-m", "muxtune.cli", "simulate", "workload=poisson"]
    command += ["workload.limit=20", "cluster.num_gpus=2", "output_dir=out"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "summary.json").exists()
    assert (tmp_path / "out" / "tasks.csv").read_text().count("\n") == 21
