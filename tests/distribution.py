"""Build the source distribution and the wheel, check them, and install the wheel somewhere new.

    python tests/distribution.py [dist]

The wheel is built from the source distribution. It is installed into an environment of its own,
which sees the dependencies of this one, and is run outside of the checkout; then quick tests run in
the unpacked source distribution. Nothing is downloaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path, PurePosixPath

from packaging.metadata import Metadata

ROOT = Path(__file__).resolve().parent.parent
QUICK_TESTS = ("tests/test_docs.py", "tests/test_language.py")
SMOKE = """
import sys
from pathlib import Path
import aimet_ext
from transformers import AutoModelForCausalLM, AutoTokenizer

assert Path(sys.prefix) in Path(aimet_ext.__file__).parents, aimet_ext.__file__
folder = aimet_ext.examples.model_dir()
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
texts = aimet_ext.examples.documents("calibration")
batches = aimet_ext.calibration_batches(tokenizer, texts, 64, 1)
sim = aimet_ext.create_sim(model, batches[0], weights=aimet_ext.QSpec(), activations=None)
report = aimet_ext.apply_rtn(sim)
print(f"{len(report.layers)} layers rounded to 4 bits by aimet_ext {aimet_ext.__version__}")
"""


def build(output: Path) -> tuple[Path, Path]:
    """Return the source distribution and the wheel, built by this environment's setuptools."""
    for old in output.glob("aimet_ext-*"):
        old.unlink()
    run(sys.executable, "-m", "build", "--quiet", "--no-isolation", "--outdir", output, ROOT)
    (source,), (wheel,) = output.glob("*.tar.gz"), output.glob("*.whl")
    return source, wheel


def check(source: Path, wheel: Path) -> None:
    """Compare what is packed with what should be, and check the metadata as an index does."""
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        described = Metadata.from_email(packed.read(metadata), validate=True)
    assert described.description_content_type == "text/markdown"
    assert described.license_expression == "BSD-3-Clause"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    files = (path for path in (ROOT / "aimet_ext").rglob("*") if path.is_file())
    wanted = {path.relative_to(ROOT).as_posix() for path in files if path.suffix != ".pyc"}
    assert wanted - names == set(), "not in the wheel, see package-data in pyproject.toml"
    assert {PurePosixPath(name).parts[0] for name in names} == {
        "aimet_ext",
        PurePosixPath(metadata).parts[0],
    }
    with tarfile.open(source) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    # Without git, as in a source distribution itself, there is nothing to compare with.
    tracked = subprocess.run(
        ["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    missing = [name for name in tracked if name not in held and (ROOT / name).exists()]
    assert missing == [], f"not in {source.name}, see MANIFEST.in: {missing}"


def try_out(source: Path, wheel: Path, folder: Path) -> None:
    """Install the wheel into a new environment, run it there, and the quick tests of the source."""
    home = folder / "environment"
    venv.create(home, with_pip=False)
    python = home / "bin/python"
    run(
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "--python", python),
        *("install", "--no-deps", "--no-index", wheel),
    )
    inside = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # Behind its own packages, the dependencies: those of this environment.
    (Path(inside) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(home / "bin/aimet-ext", "--version", folder=folder)
    run(python, "-c", SMOKE, folder=folder)
    with tarfile.open(source) as packed:
        packed.extractall(folder, filter="data")
    (unpacked,) = folder.glob("aimet_ext-*")
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *QUICK_TESTS, folder=unpacked)


def run(*command: str | Path, folder: Path | None = None) -> None:
    """Run a command in a folder; its failure ends the script."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    own = {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", "AIMET_EXT_TEST_INSTALLED": "1"}
    subprocess.run(list(map(str, command)), cwd=folder, env={**clean, **own}, check=True)


if __name__ == "__main__":
    output = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist").resolve()
    source, wheel = build(output)
    check(source, wheel)
    with tempfile.TemporaryDirectory() as folder:
        try_out(source, wheel, Path(folder))
    print(f"{source.name} and {wheel.name} are sound: {output}")  # noqa: T201
