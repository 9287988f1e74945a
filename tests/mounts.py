"""File systems of a few megabytes, made for a test and taken away after it."""

import contextlib
import os
import shutil
import subprocess

import pytest

# Programs for root lie where not every PATH looks.
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _run(name, *arguments):
    """Run a program of the system, or skip the test where it cannot be."""
    path = shutil.which(name, path=_PATH)
    if path is None:
        pytest.skip(f"there is no {name} here")
    done = subprocess.run(
        [path, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"{name} is not possible here: {done.stderr.strip()}")


@contextlib.contextmanager
def mounted(folder, kind, options="rw"):
    """Mount a file system that lives in memory at `folder`."""
    _run("mount", "-t", kind, "-o", options, "none", folder)
    try:
        yield folder
    finally:
        subprocess.run([shutil.which("umount"), str(folder)], check=True)


@contextlib.contextmanager
def mounted_image(folder, kind, nbytes):
    """Mount a file system that lives in a file, such as ext2, at `folder`."""
    image = folder.with_name(f"{folder.name}.image")
    with image.open("wb") as file:
        file.truncate(nbytes)
    _run(f"mkfs.{kind}", "-q", "-F", "-m", 0, image)
    _run("mount", "-t", kind, "-o", "loop", image, folder)
    try:
        yield folder
    finally:
        subprocess.run([shutil.which("umount"), str(folder)], check=True)
