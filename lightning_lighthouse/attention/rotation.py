"""Rotary positions, as far as pooling concerns them: an entry of unrotated tokens, rotated at the last that it covers.

Attention sees q and k rotated, R(i) x for token i. What rotate="after" pools is R(last) mean(x_i), and by algebra that
is the mean of R(last - i) R(i) x_i: a rotation inside the window, by offsets that are the same in every window.
"""

# D head dim, R rotated channels of it, the first ones, O offsets

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.checks import SettingError, quoted

# Which channels are rotated together
Pairing = Literal["half", "interleaved"]


@dataclass(frozen=True, eq=False)
class Rotation:
    """How a model rotates the channels of q and k.

    Args:
        inv_freq: `[R / 2]`, the angle of each pair in radians a token. R may be less than the head dim: the first R
            channels are rotated then, and the others are left as they are.
        pairing: "half": channel i with channel i + R / 2, as in Llama. "interleaved": channel 2 i with channel
            2 i + 1, as in GPT-J. The first of a pair becomes `first cos - second sin`.

    Raises:
        ValueError: `inv_freq` has another shape or dtype, or the pairing does not exist.
    """

    inv_freq: Tensor
    pairing: Pairing = "half"
    # the table that was made last, with what it was made for
    _kept: dict[tuple[object, ...], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.inv_freq.dim() != 1 or not len(self.inv_freq) or not self.inv_freq.is_floating_point():
            raise ValueError(
                f"inv_freq must be a frequency for each pair of channels, floats [R / 2], got {self.inv_freq.dtype} "
                f"{list(self.inv_freq.shape)}"
            )
        if self.pairing not in get_args(Pairing):
            raise ValueError(f"pairing must be 'half' or 'interleaved', got {quoted(self.pairing)}")

    @property
    def distance(self) -> int:
        """Channels between the two of a pair."""
        return len(self.inv_freq) if self.pairing == "half" else 1

    def within(self, window: int, like: Tensor) -> Tensor:
        """The table `[2, window, D]` that rotates each token of a window of `window` tokens on to its last one."""
        return self._table(torch.arange(window - 1, -1, -1, device=like.device), like)

    def steps(self, factor: int, count: int, like: Tensor) -> Tensor:
        """The table `[2, count, D]` that rotates on by 1, `factor`, `factor`^2, ... tokens, made once in eager code."""
        # a compiled frame makes it anew, in one small kernel: it must follow buffers that change
        if torch.compiler.is_compiling() or self.inv_freq.is_inference():
            return self._table(factor ** torch.arange(count, device=like.device), like)
        made_for = (
            factor, count, like.shape[-1], like.dtype, like.device, self.inv_freq._version,
            torch.is_inference_mode_enabled(),
        )  # fmt: skip
        table = self._kept.get(made_for)
        if table is None:
            table = self._table(factor ** torch.arange(count, device=like.device), like)
            # memory of a graph under capture is not filled before it is replayed
            if not (table.is_cuda and torch.cuda.is_current_stream_capturing()):
                self._kept.clear()
                self._kept[made_for] = table
        return table

    def _table(self, offsets_O: Tensor, like: Tensor) -> Tensor:
        """Cosines, and sines with the sign that they have for each channel: `[2, O, D]`, fp32 or wider."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        inv_freq = self.inv_freq.detach().to(like.device, dtype)
        angles = offsets_O.to(dtype).unsqueeze(1) * inv_freq
        cos, sin = angles.cos(), angles.sin()
        pair = 1 if self.pairing == "half" else 2
        cos, sin = torch.stack((cos, cos), pair).flatten(1), torch.stack((-sin, sin), pair).flatten(1)
        rest = like.shape[-1] - cos.shape[1]
        return torch.stack((F.pad(cos, (0, rest), value=1.0), F.pad(sin, (0, rest))))

    def turn(self, x: Tensor, table_2OD: Tensor) -> Tensor:
        """Rotate `[..., O, D]` by a table."""
        cos, sin = table_2OD
        return x * cos + self._partners(x) * sin

    def _partners(self, x: Tensor) -> Tensor:
        rotated, rest = x.tensor_split([2 * len(self.inv_freq)], -1)
        swapped = rotated.unflatten(-1, (-1, 2, self.distance)).flip(-2).flatten(-3)
        return torch.cat((swapped, rest), -1)


def check_rotation(rotation: Rotation | None, config: LighthouseConfig, head_dim: int) -> Rotation | None:
    """The rotation that `config` pools by; None where it pools what it gets.

    Raises:
        SettingError: It needs one, and none was given.
        ValueError: It rotates more channels than there are.
    """
    if config.rotate == "before":
        return None
    if rotation is None:
        raise SettingError(
            "rotate='after' needs the rotary frequencies of q and k: pass rotation=Rotation(inv_freq, pairing) to "
            "lighthouse_attention, or set rotate='before'"
        )
    if 2 * len(rotation.inv_freq) > head_dim:
        raise ValueError(
            f"a rotation of {2 * len(rotation.inv_freq)} channels does not fit into a head dim of {head_dim}"
        )
    return rotation
