"""Checkpoints of FRSKD's authors: the entries of their modules under our names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import arguments

# Members of a separable block and of a pointwise one; and the authors' names of what a layer has.
SEPARABLE = ("depthwise", "pointwise", "norm")
_CONV_NORM = ("conv", "norm")
_POINTWISE = {
    "lat_conv": "lateral",
    "lat_conv2": "skip",
    "up_sample": "up",
    "down_sample": "down",
}
_NODES = {
    "up_conv": "top_down",
    "up_weight": "top_down",
    "down_conv": "bottom_up",
    "down_weight": "bottom_up",
}
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def converted(
    op: str,
    theirs: str,
    state_dict: Mapping[str, Any],
    part: str | None,
    rename: Callable[[str], str | None],
) -> dict[str, Any]:
    """The entries of a module of the authors, or of `part` of a larger one, under our names."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"{op}: state_dict is {arguments.described(state_dict)}, expected a dict of tensors"
            " (module.state_dict())"
        )
    found: dict[str, Any] = {}
    for key, value in state_dict.items():
        name = _unwrapped(str(key))
        if part is not None:
            if not name.startswith(f"{part}."):
                continue
            name = _unwrapped(name.removeprefix(f"{part}."))
        ours = rename(name)
        if ours is None:
            raise ValueError(
                f"{op}: state_dict has the key {key!r}, expected those of FRSKD's {theirs}"
                " (part=... picks one module's from a larger checkpoint)"
            )
        if ours in found:
            raise ValueError(f"{op}: state_dict has {key!r} twice, expected one prefix for all")
        found[ours] = value
    if part is not None and not found:
        names = sorted({_unwrapped(str(key)).split(".")[0] for key in state_dict})
        raise ValueError(f'{op}: part is "{part}", expected one of {", ".join(names)}')
    return found


def _unwrapped(key: str) -> str:
    """The name without what DataParallel puts before it."""
    return key.removeprefix("module.")


def key_of_bifpn(key: str) -> str | None:
    """The name here of an entry of the authors' state dict; None: they have no such entry."""
    match key.split("."):
        case ["fc" | "linear", name]:
            return f"head.{name}" if name in ("weight", "bias") else None
        case ["layers", r, stem, i, *rest] if r.isdigit() and i.isdigit():
            part = {**_NODES, **_POINTWISE}.get(stem)
        case _:
            return None
    entry = None
    match stem, rest:
        case "up_weight" | "down_weight", []:
            entry = "weight"
        case "lat_conv" | "lat_conv2", ["conv", "0", k, name]:
            entry = _entry(_CONV_NORM, k, name)
        case "up_sample" | "down_sample", ["1", "conv", "0", k, name]:
            entry = _entry(_CONV_NORM, k, name)
        case "up_conv" | "down_conv", ["conv", j, k, name] if j.isdigit():
            relu = [] if j == "0" else [""]  # begins all but the first
            entry = _entry([*relu, *SEPARABLE], k, name)
            entry = entry and f"conv.{j}.{entry}"
    return entry and f"layers.{r}.{part}.{i}.{entry}"


def _entry(members: Sequence[str], k: str, name: str) -> str | None:
    """Entry `name` of the k-th member of a block, of which only the norm has more than a weight."""
    member = members[int(k)] if k.isdigit() and int(k) < len(members) else ""
    known = name in NORM if member == "norm" else member and name == "weight"
    return f"{member}.{name}" if known else None
