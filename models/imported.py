"""Any network as a backbone, by the import path that a recipe gives: a frozen teacher that is none of ours.

Importing a package runs its code, and so does calling what it offers: a recipe that names one is trusted as a program
is. Files are not: of a checkpoint that somebody else has made, nothing is imported (`not_imported`).
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from models.contract import Backbone, BackboneConfig, NetworkError
from models.precision import at_least_float32

_imports: ContextVar[bool] = ContextVar("imports", default=True)
Positive = Annotated[float, Field(gt=0)]


class Config(BackboneConfig):
    """Any network by its import path, mostly a teacher. Its code is run: name none that you do not trust."""

    arch: Literal["imported"]
    network: str
    """`package.module:name` of a class or function that gives a `torch.nn.Module`; the name may have dots."""
    arguments: dict[str, Any] = Field(default={})
    """Its keyword arguments; what loads weights by itself is better left out: `init` does that."""
    call: str = "forward"
    """Method of the network that is called with images [B, 3, side, side]; it returns vectors [B, C], which are the
    features, or maps [B, C, h, w], whose mean is."""
    out_channels: int = Field(ge=1)
    """C of the features; compared with what the network gives."""
    side: int = Field(ge=1, le=4096)
    """Of the images that it gets: views are resized to it (bicubic), whatever size the student sees them in."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """What it wants its pixels normalized with, in place of `data.mean` and `data.std`."""
    white: float = Field(default=1.0, gt=0)
    """The number of a white pixel that its `mean` and `std` are meant for: 1 or 255."""
    data_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    data_std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """`data.mean` and `data.std` of the recipe, which are undone first; others are refused."""
    pip: str | None = None
    """What pip calls the package, where that is not the first name of its import path."""

    @field_validator("network")
    @classmethod
    def _is_a_path(cls, network: str) -> str:
        if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", network):
            raise ValueError(f"expected package.module:name, got {network!r}")
        return network

    def check_normalization(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Refuse images that are normalized with other numbers than those that are undone."""
        if mean != self.data_mean or std != self.data_std:
            raise ValueError(
                f"the network undoes mean {list(self.data_mean)} and std {list(self.data_std)}, got {list(mean)} and "
                f"{list(std)}; set its data_mean and data_std to data.mean and data.std"
            )

    def missing(self) -> str:
        """What keeps its code from being imported, and what to do, or ""."""
        package = self.network.split(":")[0].split(".")[0]
        try:
            is_there = importlib.util.find_spec(package) is not None
        except ValueError:  # a module without a spec, such as one of a test
            is_there = True
        if not is_there:
            return f"the package {package} is not installed; run pip install {self.pip or package.replace('_', '-')}"
        try:
            self._factory()
        except NetworkError as error:
            return str(error)
        return ""

    def _factory(self) -> Any:
        module, _, names = self.network.partition(":")
        try:
            found = importlib.import_module(module)
            for name in names.split("."):
                found = getattr(found, name)
        except Exception as error:  # of code that is not ours
            raise NetworkError(f"{self.network} cannot be imported: {_said(error)}") from error
        return found

    def make(self) -> nn.Module:
        """The network itself, on the CPU.

        Raises:
            NetworkError: it cannot be imported or made, is no module, or gives no features of the shape expected.
        """
        if why := self.missing():
            raise NetworkError(why)
        factory = self._factory()
        try:
            with torch.device("cpu"):
                network = factory(**self.arguments)
        except Exception as error:
            raise NetworkError(f"{self.network} with {self.arguments}: {_said(error)}") from error
        if not isinstance(network, nn.Module):
            raise NetworkError(f"{self.network} gives a {type(network).__name__}, expected a torch.nn.Module")
        if not callable(getattr(network, self.call, None)):
            raise NetworkError(f"{self.network} has no method {self.call!r} to call")
        return network

    def build(self) -> Imported:
        """See `Imported`."""
        return Imported(self)


class Imported(Backbone):
    """A network of somebody else's, with its own size of images and its own normalization inside.

    The state has the network's own names behind `network.`; `init` loads a file of those names as its part `network`.
    On the meta device it may be hollow: without the package, a recipe can still be looked at.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.out_channels = config, config.out_channels
        self.data_mean: Tensor
        self.data_std: Tensor
        self.mean: Tensor
        self.std: Tensor
        on_meta = torch.empty(0).is_meta
        self.network: nn.Module | None = None
        if _imports.get() and not (on_meta and config.missing()):
            network = config.make()
            self.network = network
            self._try()
            if on_meta:
                network.to("meta")
        for name in ("data_mean", "data_std", "mean", "std"):
            numbers = torch.tensor(getattr(config, name))[:, None, None]
            self.register_buffer(name, numbers / (1 if "data" in name else config.white), persistent=False)

    @torch.no_grad()
    def _try(self) -> None:
        config, network = self.config, self.network
        assert network is not None
        was_training = network.training
        network.eval()
        try:
            with torch.device("cpu"):
                parameter = next(network.parameters(), torch.empty(0))
                found = self._call(torch.zeros(1, 3, config.side, config.side, dtype=parameter.dtype))
        except NetworkError:
            raise
        except Exception as error:
            raise NetworkError(
                f"{config.network}: {config.call} fails with an image of {config.side} pixels: {_said(error)}"
            ) from error
        finally:
            network.train(was_training)
        if found.shape[1] != config.out_channels:
            raise NetworkError(
                f"{config.network}: {config.call} gives {found.shape[1]} features, the recipe expects "
                f"{config.out_channels}; set out_channels"
            )

    def _call(self, x: Tensor) -> Tensor:
        features = getattr(self.network, self.config.call)(x)
        if not isinstance(features, Tensor) or features.ndim not in (2, 4):
            what = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise NetworkError(
                f"{self.config.network}: {self.config.call} gives {what}, expected vectors [B, C] or maps [B, C, h, w]"
            )
        return features.mean(dim=(2, 3)) if features.ndim == 4 else features

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W], normalized as `data` says, to features [B, out_channels].

        Raises:
            NetworkError: the network was not imported.
        """
        if self.network is None:
            if x.is_meta:
                return x.new_empty(len(x), self.out_channels)
            raise NetworkError(f"{self.config.network} was not imported: a file names it, not a recipe of yours")
        x = self.prepared(x)
        parameter = next(self.network.parameters(), x)
        return self._call(x.to(parameter.dtype))

    def prepared(self, x: Tensor) -> Tensor:
        """Images as `data` normalizes them [B, 3, H, W] as the network wants them [B, 3, side, side], in at least
        float32."""
        x = at_least_float32(x) * self.data_std + self.data_mean
        side = self.config.side
        if x.shape[2:] != (side, side):
            shrinks = max(x.shape[2:]) > side
            x = F.interpolate(x, size=(side, side), mode="bicubic", align_corners=False, antialias=shrinks)
            x = x.clamp(0, 1)  # a cubic filter overshoots
        return (x - self.mean) / self.std

    def compile(self, *_: Any, **options: Any) -> None:
        """Compile what can be: nobody knows whether foreign code is one graph."""
        super().compile(**{**options, "fullgraph": False})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        if self.network is not None:  # a hollow one takes whatever there is for it
            super()._load_from_state_dict(state_dict, prefix, *arguments)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def not_imported() -> Iterator[None]:
    """Within it imported networks are hollow, without code and weights: for recipes that a file has brought."""
    token = _imports.set(False)
    try:
        yield
    finally:
        _imports.reset(token)
