"""Reads weight files, ours and foreign ones, into named parts; loads parts strictly.

This is the only place that knows the key names of other projects. Layouts understood (all as `torch.save`
files of tensors, read with `weights_only=True`, or as safetensors where that package is installed):

| file | parts |
|---|---|
| a checkpoint of this engine | the method's children: `student`, `student_head`, `teacher`, `backbone`, ... |
| BURN: training checkpoint, extracted backbone, "multi" file | `student`, `student_head`, `teacher`, `teacher_head` |
| ReActNet (liuzechun/ReActNet), S2-BNN (szq0214/S2-BNN) | `backbone`; `head` of S2-BNN, `classifier` of ReActNet |
| MoCo (`module.encoder_q.*`), torchvision, plain ResNet | `backbone`; `head` of MoCo, `classifier` of torchvision |
| any file of tensors, or with them as its `state_dict` | `network`: all of it, under its own names (`arch: imported`) |
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
WHOLE = "network"
"""The part that a file of any layout has: itself."""

_START = 256  # bytes that say what a file is
_OURS = (b"PK\x03\x04", b"\x80")  # of torch.save: an archive, or a pickle by older versions
_PACKED = {
    "gzip": (b"\x1f\x8b", "gunzip"),
    "bzip2": (b"BZh", "bunzip2"),
    "xz": (b"\xfd7zXZ", "unxz"),
    "zstd": (b"\x28\xb5\x2f\xfd", "unzstd"),
    "7-Zip": (b"7z\xbc\xaf", "7z x"),
}
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")
"""What DataParallel and torch.compile put into the names of what they wrap."""

# BURN's and ReActNet's names inside `feature.<i>.` -> ours inside `blocks.<i - 1>.`
_BLOCK_NAMES = {
    "move11": "shift1",
    "binary_3x3": "conv3x3",
    "bn1": "norm1",
    "move12": "act1.shift_in",
    "prelu1": "act1.prelu",
    "move13": "act1.shift_out",
    "move21": "shift2",
    "binary_pw": "conv1x1.0",
    "bn2": "norm2.0",
    "binary_pw_down1": "conv1x1.0",
    "binary_pw_down2": "conv1x1.1",
    "bn2_1": "norm2.0",
    "bn2_2": "norm2.1",
    "move22": "act2.shift_in",
    "prelu2": "act2.prelu",
    "move23": "act2.shift_out",
}
_DOUBLING_ONLY = ("binary_pw_down1", "binary_pw_down2", "bn2_1", "bn2_2")
_SAME_ONLY = ("binary_pw", "bn2")


class WeightsError(ValueError):
    """A weight file that cannot be used; the message names the file, the part and the keys."""

    exit_code = 2


def read(path: Path) -> dict[str, State]:
    """Read a weight file into parts (see the table above).

    Raises:
        WeightsError: the file is missing, is not a weight file, would run code, or has an unknown layout.
    """
    return split(read_file(path), path)


def read_file(path: Path) -> Any:
    """`torch.load` on the CPU with `weights_only=True`.

    Raises:
        WeightsError: as `read`.
    """
    if not os.path.exists(path):
        raise WeightsError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            start = file.read(_START)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from None
    if _is_safetensors(start):
        return _read_safetensors(path)
    if not start.startswith(_OURS):
        raise WeightsError(f"{path}: {_what(start)}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise WeightsError(
                f"{path}: refused, it holds more than tensors and could run code when loaded; "
                "expected a file of tensors only"
            ) from error
        raise WeightsError(
            f"{path}: cut short, damaged, or not written by torch.save ({type(error).__name__}); get it again"
        ) from error


def _is_safetensors(start: bytes) -> bool:
    return start[8:10] in (b'{"', b"{}")


def _read_safetensors(path: Path) -> State:
    if problem := missing_safetensors():
        raise WeightsError(f"{path}: is a safetensors file; {problem}")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{path}: is a safetensors file, cut short or damaged ({error}); get it again") from error


def missing_safetensors() -> str:
    """What is missing for safetensors files and what to do, or ""."""
    if importlib.util.find_spec("safetensors"):
        return ""
    return "the package safetensors is not installed; run pip install safetensors"


def as_safetensors(state: State) -> bytes:
    """The file of these tensors, which `read` reads where they have published names."""
    from safetensors.torch import save

    return save({key: value.contiguous() for key, value in state.items()}, metadata={"format": "pt"})


def published(backbone: Mapping[str, Tensor], classifier: Mapping[str, Tensor] | None = None) -> State:
    """A ReActNet of ours under the names of BURN's release, which `split` takes back.

    Args:
        backbone, classifier: states of a `ReActNet` and of a linear layer on its features. That layer is `fc`, as in
            ReActNet's own files; where the network has BURN's pooled MLP, which is `fc.0` there, it is `classifier`.
    """
    doubling = {key.split(".")[1] for key in backbone if ".conv1x1.1." in key}
    names: State = {}
    for key, value in backbone.items():
        room, rest = key.split(".", 1)
        if room == "blocks":
            place, rest = rest.split(".", 1)
            name, leaf = rest.rsplit(".", 1)
            unused = _SAME_ONLY if place in doubling else _DOUBLING_ONLY
            theirs = next(old for old, ours in _BLOCK_NAMES.items() if ours == name and old not in unused)
            names[f"feature.{int(place) + 1}.{theirs}.{leaf}"] = value
        elif room == "stem":
            names[f"feature.0.{('conv1', 'bn1')[int(rest[0])]}.{rest[2:]}"] = value
        else:
            names[f"fc.0.{rest}"] = value
    room = "classifier" if "fc.weight" in backbone else "fc"
    return names | {f"{room}.{leaf}": value for leaf, value in (classifier or {}).items()}


def _what(start: bytes) -> str:
    """What a file is that torch.save has not written, from its first bytes, and what to do."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return "is empty; get it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file; run `git lfs pull`"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is an HTML page: a link led to a site, not to the file; download it again"
    for name, (magic, command) in _PACKED.items():
        if start.startswith(magic):
            return f"is packed with {name}; unpack it with {command}"
    return f"was not written by torch.save, it begins with {start[:8]!r}; expected a file of tensors"


def split(content: Any, path: Path) -> dict[str, State]:
    """Sort the tensors of a loaded file into parts under our own key names.

    Raises:
        WeightsError: an unknown layout, or a known one with keys missing.
    """
    try:
        return _split(content, path)
    except (KeyError, RuntimeError, TypeError, IndexError) as error:
        raise WeightsError(f"{path}: incomplete or damaged, at {error}") from error


def _split(content: Any, path: Path) -> dict[str, State]:
    if isinstance(content, Mapping) and "method" in content and "format" in content:
        return _by_first_name(content["method"])
    if isinstance(content, Mapping) and isinstance(content.get("backbone"), Mapping):
        names = {"backbone": "student", "classifier": "student_head", "teacher_classifier": "teacher_head"}
        found = {ours: _unwrapped(content[theirs]["state_dict"]) for theirs, ours in names.items() if theirs in content}
        return {part: _reactnet(state) if part == "student" else state for part, state in found.items()}
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise WeightsError(f"{path}: unknown layout, expected one of those listed in models/weights.py")
    state: State = _unwrapped(content)
    if any(key.startswith("online_net.0.") for key in state):
        # The release writes the student twice, as `online_net.0` and as `backbone`.
        for key, value in _strip(state, "backbone.").items():
            if not torch.equal(value, state[f"online_net.0.{key}"]):
                raise WeightsError(f"{path}: its two copies of the student differ at {key}")
        return {
            "student": _reactnet(_strip(state, "online_net.0.")),
            "student_head": _strip(state, "online_net.1."),
            "teacher": _strip(state, "diff_branch_net.0."),
            "teacher_head": _strip(state, "diff_branch_net.1."),
        }
    if any(key.startswith("encoder_q.") for key in state):
        state = _strip(state, "encoder_q.")
    if "feature.0.conv1.weight" in state:
        if "fc.2.weight" in state:  # S2-BNN's projection head, whose first layer BURN keeps as `fc` of the backbone
            head = _head(state)
            part = _reactnet({key: value for key, value in state.items() if not key.startswith("fc.")})
            return {"student": part, "backbone": part, "head": head}
        part = _reactnet(state)
        parts = {"student": part, "backbone": part}
        for place in ("fc.", "classifier."):  # of ReActNet's own files, and of ours beside BURN's `fc.0`
            if f"{place}weight" in state:
                parts["classifier"] = {leaf: state[place + leaf] for leaf in ("weight", "bias")}
        return parts
    if "conv1.weight" in state and "layer1.0.conv1.weight" in state:
        parts = {"backbone": {key: value for key, value in state.items() if not key.startswith("fc.")}}
        if "fc.2.weight" in state:  # MoCo's projection head
            parts["head"] = _head(state)
        elif "fc.weight" in state:
            parts["classifier"] = _strip(state, "fc.")
        return parts
    raise WeightsError(f"{path}: unknown layout, its first keys are {', '.join(list(state)[:3])}")


def has(state: Mapping[str, Tensor], module: str) -> bool:
    """Whether a part has tensors of a module of this name."""
    return any(key.startswith(f"{module}.") for key in state)


def whole(content: Any, path: Path) -> State:
    """All tensors of a loaded file under their own names, behind `network.`, as `models.imported` has them.

    Raises:
        WeightsError: it holds anything but tensors.
    """
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path}: expected a file of named tensors, or one with them as its state_dict")
    return {f"{WHOLE}.{key}": value for key, value in _unwrapped(content).items()}


def load_part(module: nn.Module, state: State, *, part: str, path: Path) -> None:
    """Load one part strictly; a module on the meta device is only compared.

    Raises:
        WeightsError: lists every missing and unexpected key and every shape that differs; nothing is loaded.
    """
    own = module.state_dict()
    counters = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
    state = {**{key: torch.zeros_like(value) for key, value in counters.items()}, **state}
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    if problems:
        raise WeightsError(f"{path}: part '{part}' does not fit: {'; '.join(problems)}")
    if not any(value.is_meta for value in own.values()):
        module.load_state_dict(state)


def _by_first_name(state: Mapping[str, Tensor]) -> dict[str, State]:
    parts: dict[str, State] = {}
    for key, value in state.items():
        first, _, rest = key.partition(".")
        if rest:
            parts.setdefault(first, {})[rest] = value
    return parts


def _unwrapped(state: Mapping[str, Tensor]) -> State:
    return {_WRAPPERS.sub("", key): value for key, value in state.items()}


def _head(state: State) -> State:
    """The two-layer projection of MoCo and S2-BNN, `fc.0` and `fc.2` there."""
    return {f"fc{place // 2}.{leaf}": state[f"fc.{place}.{leaf}"] for place in (0, 2) for leaf in ("weight", "bias")}


def _strip(state: State, prefix: str) -> State:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _reactnet(state: Mapping[str, Tensor]) -> State:
    """Rename a ReActNet of BURN, ReActNet or S2-BNN; unflatten ReActNet's weights; drop unused variants."""
    # S2-BNN writes both kinds of 1x1 convolution into every block; a block doubles if its second shift does.
    doubles = {}
    for key, value in state.items():
        if match := re.fullmatch(r"feature\.(\d+)\.move22\.bias", key):
            doubles[match[1]] = value.shape[1] == 2 * state[f"feature.{match[1]}.move11.bias"].shape[1]
    renamed: State = {}
    for key, value in state.items():
        if match := re.fullmatch(r"fc\.0\.(weight|bias)", key):
            renamed[f"fc.{match[1]}"] = value
            continue
        if key.startswith(("fc.", "classifier.")):
            continue  # a classifier or projection on top, not part of the backbone
        match = re.fullmatch(r"feature\.(\d+)\.(\w+)\.(\w+)", key)
        if not match:
            raise WeightsError(f"unknown key {key} in a ReActNet")
        place, name, leaf = match.groups()
        if place == "0":
            renamed[f"stem.{0 if name == 'conv1' else 1}.{leaf}"] = value
            continue
        if name in (_SAME_ONLY if doubles[place] else _DOUBLING_ONLY):
            continue
        if leaf == "weights":  # ReActNet keeps them flat as [N, 1], row-major [C, C, k, k]
            channels = state[f"feature.{place}.move11.bias"].shape[1]
            side = 3 if name == "binary_3x3" else 1
            value, leaf = value.view(channels, channels, side, side), "weight"
        if name not in _BLOCK_NAMES:
            raise WeightsError(f"unknown key {key} in a ReActNet")
        renamed[f"blocks.{int(place) - 1}.{_BLOCK_NAMES[name]}.{leaf}"] = value
    return renamed
