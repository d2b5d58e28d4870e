"""The layer that CAP stores: low-rank plus sparse. It needs torch only and can be copied as it stands."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class LowRankPlusSparse(nn.Module):
    """y = up(down(x)) + S x + b: rank k (two nn.Linear, none for k = 0) plus a sparse matrix, for a dense [m, n] layer.

    S is stored as a bitmask, 1 bit an entry, and its nonzero values; the dense S that multiplies is unpacked on
    first use. `weight` is a marker of one number where the dense weight stood, as in soco.LowRankLinear.
    """

    def __init__(self, n, m, k, nonzeros, bias=True, **where):
        super().__init__()
        self.shape = (m, n)
        self.down = nn.Linear(n, k, bias=False, **where) if k else None
        self.up = nn.Linear(k, m, bias=False, **where) if k else None
        self.values = nn.Parameter(torch.empty(nonzeros, **where))
        self.bias = nn.Parameter(torch.empty(m, **where)) if bias else None
        self.register_buffer("mask", torch.empty(-(-m * n // 8), dtype=torch.uint8, device=where.get("device")))
        self.register_buffer("weight", torch.zeros(1, **where))
        self.unpacked = None

    @classmethod
    def of(cls, U, V, S, bias, like):
        """From U [m, k], V [k, n], S [m, n] and a bias [m] or None, in the dtype and on the device of `like`."""
        S = S.to(like)
        mask = S != 0
        new = cls(V.shape[1], *U.shape, int(mask.sum()), bias is not None, device=like.device, dtype=like.dtype)
        state = {"values": S[mask], "mask": pack_bits(mask), "weight": new.weight}
        state |= {"up.weight": U, "down.weight": V} if new.up else {}
        state |= {} if bias is None else {"bias": bias}
        new.load_state_dict(state)
        return new.requires_grad_(like.requires_grad)

    def _apply(self, *args, **options):
        self.unpacked = None
        return super()._apply(*args, **options)

    def sparse(self):
        """The dense form of S [m, n]."""
        mask = unpack_bits(self.mask, self.shape)
        return torch.zeros(self.shape, dtype=self.values.dtype, device=mask.device).masked_scatter(mask, self.values)

    def forward(self, x):
        if self.training or torch.is_grad_enabled():
            S = self.sparse()
        else:
            key = (self.values._version, self.values.data_ptr(), self.values.dtype)
            if self.unpacked is None or self.unpacked[0] != key:
                self.unpacked = (key, self.sparse())
            S = self.unpacked[1]
        y = F.linear(x, S, self.bias)
        return y if self.up is None else y + self.up(self.down(x))


def pack_bits(mask):
    """A boolean tensor as bytes [ceil(numel / 8)], the first entry in the lowest bit."""
    flat = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed, shape):
    """The boolean tensor of a shape that `pack_bits` packed."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten()[:math.prod(shape)].view(shape).bool()
