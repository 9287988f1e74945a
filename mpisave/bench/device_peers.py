"""Other ways to save arrays of a device, and to load them there, in one process."""

from __future__ import annotations

import pickle
import platform
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from mpisave.bench.peers import dump
from mpisave.bench.turns import fsync

if TYPE_CHECKING:
    from pathlib import Path

    from mpisave.bench.states import Arrays


class DevicePeer:
    """One other way.

    Parameters
    ----------
    gpu : Gpu
        The device.
    arrays : dict of str to array of the device
        What is saved; only its keys count where it is loaded.
    """

    saves = ""  # name of the side that saves
    loads = ""  # and of the one that loads, if that is measured
    file = ""  # or folder, in which it saves

    def __init__(self, gpu: Any, arrays: Arrays) -> None:
        self.gpu = gpu
        self.arrays = arrays

    def version(self) -> str:
        """Return the name and version of the library."""
        version: str = self.gpu.version
        return version

    def save(self, folder: Path, *, durable: bool) -> None:
        """Save all arrays, flushed to the disk if `durable`."""
        raise NotImplementedError

    def load(self, folder: Path) -> Arrays:
        """Load all arrays to the device."""
        raise NotImplementedError

    def saved(self, folder: Path) -> Arrays:
        """Return what was saved, in host memory or mapped."""
        raise NotImplementedError


class TorchSave(DevicePeer):
    """``torch.save`` and ``torch.load`` of tensors that share the arrays' memory."""

    saves = "torch.save"
    loads = "torch.load, map_location"
    file = "torch.pt"

    def __init__(self, gpu: Any, arrays: Arrays) -> None:
        super().__init__(gpu, arrays)
        self._tensors = {key: gpu.tensor(array) for key, array in arrays.items()}

    def version(self) -> str:
        """Return the version of PyTorch."""
        return f"torch {sys.modules['torch'].__version__}"

    def save(self, folder: Path, *, durable: bool) -> None:
        """Save the dict of tensors."""
        import torch

        torch.save(self._tensors, folder / self.file)
        if durable:
            fsync(folder / self.file)

    def load(self, folder: Path) -> Arrays:
        """Load the dict of tensors."""
        import torch

        loaded: Arrays = torch.load(
            folder / self.file, map_location=self.gpu.torch_device, weights_only=True
        )
        self.gpu.synchronize()
        return loaded

    def saved(self, folder: Path) -> Arrays:
        """Map the file."""
        import torch

        tensors = torch.load(
            folder / self.file, map_location="cpu", weights_only=True, mmap=True
        )
        return {key: tensor.numpy() for key, tensor in tensors.items()}


class CupySave(DevicePeer):
    """``cupy.save`` and ``cupy.load``: a file for each array."""

    saves = "cupy.save, a file an array"
    loads = "cupy.load, a file an array"
    file = "cupy"

    def _path(self, folder: Path, number: int) -> Path:
        return folder / self.file / f"{number}.npy"

    def save(self, folder: Path, *, durable: bool) -> None:
        """Save every array."""
        (folder / self.file).mkdir()
        for number, array in enumerate(self.arrays.values()):
            self.gpu.save(self._path(folder, number), array)
            if durable:
                fsync(self._path(folder, number))

    def load(self, folder: Path) -> Arrays:
        """Load every array."""
        loaded = {
            key: self.gpu.load(self._path(folder, number))
            for number, key in enumerate(self.arrays)
        }
        self.gpu.synchronize()
        return loaded

    def saved(self, folder: Path) -> Arrays:
        """Map every file."""
        return {
            key: np.load(self._path(folder, number), mmap_mode="r")
            for number, key in enumerate(self.arrays)
        }


class HandPickle(DevicePeer):
    """``cupy.asnumpy`` of every array, then one pickle."""

    saves = "cupy.asnumpy, pickle protocol 5"
    file = "hand.pkl"

    def version(self) -> str:
        """Return the versions of CuPy and Python."""
        return f"{self.gpu.version}, Python {platform.python_version()}"

    def save(self, folder: Path, *, durable: bool) -> None:
        """Copy, then dump the dict."""
        arrays = {key: self.gpu.host(array) for key, array in self.arrays.items()}
        dump(arrays, folder / self.file, 5, durable=durable)

    def saved(self, folder: Path) -> Arrays:
        """Load the dict."""
        with (folder / self.file).open("rb") as file:
            arrays: Arrays = pickle.load(file)
        return arrays
