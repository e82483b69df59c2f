# SPDX-License-Identifier: Apache-2.0
"""PyTorch's pickles: tensors and plain values, read with weights_only, only the keys needed."""

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from apollo_jax.checkpoints.sources import Extent, Index, RawFiles, Source, Stored, concrete

WRAPPERS = ("target_encoder", "state_dict", "model", "module", "encoder")
ENCODERS, PREDICTOR = ("target_encoder", "encoder"), "predictor"  # V-JEPA's: the two go together


class TorchTensors:
    """Tensors that torch mapped into memory; read from the file where it says what lies where.

    What is read through a mapping stays resident, file by file the whole checkpoint.
    """

    def __init__(self, path: Path, tensors: dict[str, Any]):
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.stored = {
            name: Stored(path.name, tuple(t.shape), str(t.dtype).removeprefix("torch."))
            for name, t in self._tensors.items()
        }
        mapped = _mappings(path)
        places = {name: _place(t, mapped) for name, t in self._tensors.items()}
        extents = {name: Extent(path, at) for name, at in places.items() if at is not None}
        self._files = RawFiles({name: self.stored[name] for name in extents}, extents)

    def extent(self, name: str) -> Extent | None:
        return self._files.extents.get(name)

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        if name in self._files.stored:
            return self._files.read(name, index)
        import torch  # pyright: ignore[reportMissingImports]

        tensor = self._tensors[name]
        tensor = tensor[concrete(index, tuple(tensor.shape))] if tensor.ndim else tensor
        if tensor.dtype == torch.bfloat16:
            return tensor.contiguous().view(torch.int16).numpy().view("bfloat16").copy()
        return tensor.contiguous().numpy().copy()


def _mappings(path: Path) -> list[tuple[int, int, int]]:
    """(first address, address behind the last, offset in the file) of a file's mappings (Linux)."""
    maps, found, real = Path("/proc/self/maps"), [], str(path.resolve())
    for line in maps.read_text().splitlines() if maps.is_file() else []:
        addresses, _, offset, _, _, *name = line.split(maxsplit=5)
        if name == [real]:
            first, behind = (int(address, 16) for address in addresses.split("-"))
            found.append((first, behind, int(offset, 16)))
    return found


def _place(tensor: Any, mapped: list[tuple[int, int, int]]) -> int | None:
    """Where in the file the bytes of a tensor lie in order, if they do."""
    if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return None
    address = tensor.data_ptr()
    size = tensor.numel() * tensor.element_size()
    for first, behind, offset in mapped:
        if first <= address and address + size <= behind:
            return address - first + offset
    return None


def open_torch(path: Path, key: str = "") -> tuple[Source, dict[str, str]]:
    """A pickled state dict, and what else the file holds with the reason it is passed over.

    key: which part of a training checkpoint, like "target_encoder"; default the first of WRAPPERS.
    Raises ValueError naming the file if it holds anything but tensors and plain values, which is
    refused unread; ImportError without torch.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError(
            f"{path} is a pickle, which takes PyTorch to read: pip install 'apollo_jax[torch]'"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of another protocol, read or refused
            content = torch.load(path, map_location="cpu", mmap=_is_zip(path), weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises many kinds, all of them about this file
        raise ValueError(f"{path}: {_refusal(str(error))}") from error
    return _state_dict(path, content, key)


def _refusal(said: str) -> str:
    """What is wrong with a pickle, out of the many lines that torch says."""
    if "TorchScript" in said:
        return (
            "it is a TorchScript archive, which holds code: refused unread; save its tensors with "
            "torch.save(torch.jit.load(FILE, 'cpu').state_dict(), OUT), or take the hub's folder"
        )
    if found := re.search(r"GLOBAL ([\w.]+)", said):
        return f"it holds {found[1]}, which is no tensor; such pickles run code: refused unread"
    if "weights_only" in said:
        return "it is a pickle of something else than tensors: refused unread"
    return "it is truncated, corrupt, or no file of PyTorch's; copy it again"


def _is_zip(path: Path) -> bool:
    return path.is_file() and zipfile.is_zipfile(path)


def _state_dict(path: Path, content: Any, key: str) -> tuple[Source, dict[str, str]]:
    import torch  # pyright: ignore[reportMissingImports]

    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name")
    parts = [name for name, value in content.items() if isinstance(value, dict)]
    passed = {}
    if key or not any(isinstance(v, torch.Tensor) for v in content.values()):
        chosen = key or next((name for name in WRAPPERS if name in parts), "")
        if chosen not in parts:
            raise ValueError(
                f"{path} has no {chosen!r} with tensors" if key else f"{path} holds no tensors"
            ) from ValueError(f"it holds {', '.join(map(str, content))}")
        beside = content.get(PREDICTOR, {}) if chosen in ENCODERS else {}
        read = {chosen, PREDICTOR} if beside else {chosen}
        passed = {str(n): "another part of the checkpoint" for n in content if n not in read}
        content = {**beside, **content[chosen]}
    passed |= {str(n): "no tensor" for n, v in content.items() if not isinstance(v, torch.Tensor)}
    tensors = {str(n): t for n, t in content.items() if isinstance(t, torch.Tensor)}
    odd = [n for n, t in tensors.items() if t.layout is not torch.strided or t.is_quantized]
    if odd:
        raise ValueError(f"{path}: {', '.join(odd[:5])}: sparse or quantized; save it dense")
    return TorchTensors(path, tensors), passed
