"""Health of a binary network in training, read at log time only: signs, channels, features, collapse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.binary import BinaryConv2d
from models.losses import collapse_meters
from models.methods import Method

IMAGES = 128
"""Images that are looked at, of rank 0's newest micro-batch."""


class Monitors:
    """What a loss does not show. Names with a "/" are groups in TensorBoard.

    | scalar | meaning |
    |---|---|
    | `binary/sign_flips` | share of binary weights whose sign differs from that at the last log |
    | `binary/latent_beyond_one` | share of latent weights outside [-1, 1] |
    | `binary/dead_channels` | share of input channels with one sign for all images and positions: they carry nothing |
    | `binary/saturated_channels` | share that is outside [-1, 1] everywhere: clip-STE passes no gradient |
    | `features/rank` | exp of the entropy of the normalized singular values (RankMe, Garrido et al. 2023, eq. 1) |
    | `outputs/entropy` | mean entropy of `Method.outputs`, in nats |
    | `outputs/entropy_of_mean` | entropy of their mean distribution |
    | `outputs/information` | the latter minus the former, 0 where all images get one answer |

    The last three are there where the method has such outputs, those of binary weights and of binary activations where
    the network has some. Ranges and alarms: `docs/meters.md`.

    Args:
        method: watched where its evaluated network trains; a frozen one (linear evaluation) gives nothing.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.network = method.evaluated
        self.is_trained = any(p.requires_grad for p in self.network.parameters())
        convolutions = [m for m in self.network.modules() if isinstance(m, BinaryConv2d) and m.weight.requires_grad]
        self.layers = [layer for layer in convolutions if layer.weights == "binary"]
        self.readers = [layer for layer in convolutions if layer.activations == "binary"]
        self._signs = self._read_signs()
        self._low: dict[str, int] = {}  # meter -> rows in which it was too low, counted on once it was said

    def _read_signs(self) -> Tensor:
        signs = [layer.weight.detach().flatten() < 0 for layer in self.layers]
        return torch.cat(signs) if signs else torch.zeros(0, dtype=torch.bool)

    @torch.no_grad()
    def read(self, images: Tensor) -> dict[str, Tensor]:
        """Look at the network with `images` [B, 3, H, W] in evaluation mode; nothing of it changes.

        Returns:
            0-d tensors by name; the sign flips of the next reading count from here.
        """
        if not self.is_trained:
            return {}
        found: dict[str, Tensor] = {}
        if self.layers:
            signs = self._read_signs()
            found["binary/sign_flips"] = (signs != self._signs).float().mean()
            self._signs = signs
            beyond = torch.stack([(layer.weight.abs() > 1).sum() for layer in self.layers]).sum()
            found["binary/latent_beyond_one"] = beyond / len(signs)
        dead: list[Tensor] = []
        saturated: list[Tensor] = []

        def look(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            low, high = args[0].amin(dim=(0, 2, 3)), args[0].amax(dim=(0, 2, 3))  # [C]
            dead.append((low > 0) | (high < 0))
            saturated.append(args[0].abs().amin(dim=(0, 2, 3)) > 1)

        hooks = [layer.register_forward_pre_hook(look) for layer in self.readers]
        was_training = self.method.training
        self.method.eval()
        try:
            features = self.network(images[:IMAGES])  # [B, D]
            outputs = self.method.outputs(features)
        finally:
            self.method.train(was_training)
            for hook in hooks:
                hook.remove()
        if dead:
            found["binary/dead_channels"] = torch.cat(dead).float().mean()
            found["binary/saturated_channels"] = torch.cat(saturated).float().mean()
        found["features/rank"] = effective_rank(features)
        if outputs is None:
            return found
        meters = collapse_meters(outputs, temperature=1.0)
        return {**found, **{f"outputs/{name}": meters[name] for name in ("entropy", "entropy_of_mean", "information")}}

    def alarms(self, row: dict[str, float]) -> list[str]:
        """A line for each meter that says in two rows of the log, one after the other, that all images get one answer;
        each line once in a run."""
        said = []
        for meter, (least, remedy) in self.method.collapse.items():
            is_low = meter in row and row[meter] < least
            self._low[meter] = self._low.get(meter, 0) + 1 if is_low or self._low.get(meter, 0) >= 2 else 0
            if self._low[meter] == 2:
                said.append(
                    f"collapsed: {meter} is {row[meter]:.3g}, below {least:.3g}: every image gets the same answer, "
                    f"and the loss does not show it; {remedy} (docs/meters.md)"
                )
        return said

    def state_dict(self) -> dict[str, Any]:
        """The signs at the last log, so that a resumed run counts the same flips."""
        return {"signs": self._signs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them, unless others were watched."""
        if len(state["signs"]) == len(self._signs):
            self._signs = state["signs"].to(self._signs.device)


def effective_rank(features: Tensor) -> Tensor:
    """exp(-Σ p log p) with p the singular values of [B, D] over their sum, from 1 to min(B, D); 0 if not finite."""
    wide = features.float()
    values = torch.linalg.svdvals(wide.nan_to_num(0, 0, 0))
    share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    rank = torch.exp(-torch.special.xlogy(share, share).sum())
    return torch.where(wide.isfinite().all() & (values.sum() > 0), rank, torch.zeros_like(rank))
