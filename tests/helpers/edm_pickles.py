"""Pickles of EDM2's form around a small torch network. Every object carries its class's source, which raises if run."""

import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


class EasyDict(dict[str, Any]):
    """What such a file's options are."""


def _reconstruct_persistent_obj(meta: Any) -> Any:
    raise AssertionError("the pickle was run")


class Persistent:
    """An object that brings its own code."""

    def __reduce__(self) -> Any:
        state = {k: v for k, v in self.__dict__.items() if k != "_compiled_call_impl"}
        meta = {
            "type": "class", "version": 6, "module_src": "raise AssertionError('the source was run')",
            "class_name": type(self).__name__, "state": state,
        }  # fmt: skip
        return _reconstruct_persistent_obj, (meta,), None


class Conv(Persistent, torch.nn.Module):
    """A weight without a bias, as EDM2's."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(*shape).to(dtype))
        self.gain = np.float64(0.5)  # EDM's networks keep such a number


class Net(Persistent, torch.nn.Module):
    """Modules in a dict, a buffer, a buffer that is not kept, a parameter without axes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.enc = torch.nn.ModuleDict(
            {"8x8_conv": Conv(4, 2, 3, 3, dtype=dtype), "8x8_block0": Conv(4, 4, dtype=dtype)}
        )
        self.out_gain = torch.nn.Parameter(torch.zeros([]).to(dtype))
        self.register_buffer("freqs", torch.arange(6.0)[1:5].to(dtype))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


class TinyPrecond(Persistent, torch.nn.Module):
    """The outer network."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._init_args: tuple[Any, ...] = ()
        self._init_kwargs = EasyDict(img_resolution=8, label_dim=10, channel_mult=[1, 2], sigma_data=0.5)
        self.unet = Net(dtype)


class Encoder(Persistent):
    """Latents' means, as numpy arrays."""

    def __init__(self) -> None:
        self.scale = np.array([0.5, 2.0], np.float32)


def write_edm_pickle(
    path: Path, *, dtype: torch.dtype = torch.float16, change: Callable[[Any], None] | None = None, protocol: int = 4
) -> dict[str, Any]:
    """Write a pickle; ``change`` may alter its root before. Returns the network's state dict."""
    torch.manual_seed(0)
    network = TinyPrecond(dtype)
    root = EasyDict(ema=network, encoder=Encoder(), dataset_kwargs=EasyDict(path="imagenet", use_labels=True))
    if change:
        change(root)
    with pytest.MonkeyPatch.context() as patch:
        _place(patch, _reconstruct_persistent_obj, "torch_utils.persistence")
        _place(patch, EasyDict, "dnnlib.util")
        path.write_bytes(pickle.dumps(root, protocol=protocol))
    return network.state_dict()


def _place(patch: pytest.MonkeyPatch, thing: Any, module: str) -> None:
    """Make a class or function look as if it came from a module of theirs."""
    patch.setattr(thing, "__module__", module)
    for name in (module.partition(".")[0], module):
        patch.setitem(sys.modules, name, types.ModuleType(name))
    setattr(sys.modules[module], thing.__name__, thing)
