"""One metric for both methods: what a change of a weight costs the loss.

Replace a weight W [m, n] by W'. To second order the loss grows by what a Kronecker-factored
Fisher matrix says (K-FAC, Martens & Grosse 2015, arXiv 1503.05671), up to a factor of one half:

    E[ |R^(1/2) (W - W') x|^2 ]  =  | R^(1/2) (W - W') L |_F^2,      G = E[x x^T] = L L^T,   R = diag E[g g^T]

with x [n] the layer's input at a token and g [m] the gradient of that token's loss at its output. In the scaled
matrix R^(1/2) W L a squared singular value, or a squared entry, is the loss it costs to drop it, in the same
currency for every matrix of the model: one threshold on (loss per stored number) spreads the budget.
SoCo truncates singular values in it; CAP, with the diagonal of G only, drops entries and directions.
"""
import functools
from dataclasses import dataclass

import torch

from common import UserError, bar
from common.layers import frozen, input_device
from common.processes import average, rank, world


@dataclass
class Metric:
    G: torch.Tensor      # E[x x^T] [n, n] float32, inputs of the layer
    R: torch.Tensor      # diagonal of E[g g^T] [m] float32, gradients of the loss at the outputs


def draw(p, batch, length):
    """Labels [batch * length] drawn from distributions p [batch * length, vocab], by the CPU's random numbers: the same
    on any device, and for any number of processes that share out a batch."""
    u = torch.rand(batch * world(), length, device="cpu")[rank()::world()].flatten().to(p.device)
    total = p.cumsum(-1)
    return torch.searchsorted(total, (u * total[:, -1])[:, None])[:, 0].clamp_max(p.shape[-1] - 1)


def collect_metric(model, layers, batches, progress=False):
    """{name: Metric}, in main memory, of `layers` {name: layer} over `batches` of token ids [batch, length].

    One pass forward and one backward of the whole model a batch, watched by hooks; sums in float32. The labels are
    drawn from the model's own prediction: E[g g^T] is then the Fisher matrix, the curvature of KL(model || changed
    model), and not that of one text. Raises UserError for a layer that no token reached, or whose weight is not in memory.
    """
    away = next((name for name, layer in layers.items() if layer.weight.is_meta), None)
    if away:
        raise UserError(f"layer {away} is on the meta device, offloaded or not loaded: load the model without offloading")
    G, R, same_input, tokens = {}, dict.fromkeys(layers, 0), {}, 0
    latest = (None, None)                                    # q, k and v read the same tensor: one Gram matrix for all

    def watch(name, layer, inputs, output):
        nonlocal latest
        if inputs[0] is latest[1]:
            same_input[name] = latest[0]
        else:
            latest = (name, inputs[0])
            x = inputs[0].detach().flatten(0, -2).float()
            G[name] = G.get(name, 0) + (x.T @ x).cpu()
        output.register_hook(lambda g: R.update({name: R[name] + g.flatten(0, -2).float().square().sum(0).cpu()}))

    hooks = [layer.register_forward_hook(functools.partial(watch, name)) for name, layer in layers.items()]
    hooks.append(model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_()))
    try:
        with torch.enable_grad(), frozen(model):             # gradients of the outputs are all that is asked for
            for ids in bar(batches, progress, desc="metric", unit="batch"):
                logits = model(input_ids=ids.to(input_device(model)), use_cache=False).logits.flatten(0, 1)
                p = logits.detach().softmax(-1, dtype=torch.float32)
                p[torch.arange(len(p), device=p.device), draw(p, *ids.shape)] -= 1
                logits.backward(p.to(logits.dtype))          # the gradient of -log p[label]
                latest, tokens = (None, None), tokens + ids.numel()
    finally:
        for hook in hooks:
            hook.remove()
    unreached = [name for name in layers if not torch.is_tensor(R[name])]
    if unreached:
        raise UserError(f"no calibration token reached layer {unreached[0]}: use more calibration text")
    for name, moment in [*G.items(), *R.items()]:
        moment /= tokens
        average([moment])
        if not moment.isfinite().all():
            raise FloatingPointError(f"the inputs or gradients of layer {name} are not finite: use --dtype float32 or bfloat16")
    return {name: Metric(G[same_input.get(name, name)], R[name]) for name in layers}


def threshold(worths, count):
    """The number t such that at most `count` entries exceed it, and more would exceed any smaller one.

    worths(): iterates over non-negative float32 tensors, made anew on both passes so that one is in memory at a time.
    Such floats are ordered as their bit patterns are: a radix select, by the high 16 bits and then by the low.
    """
    bucket, above = None, 0
    for shift in (16, 0):
        histogram = 0
        for worth in worths():
            bits = worth.contiguous().view(torch.int32).flatten()
            if shift == 0:
                bits = bits[bits >> 16 == bucket]
            histogram = histogram + torch.bincount(bits >> shift & 0xffff, minlength=1 << 16).cpu()
        at_least = histogram.flip(0).cumsum(0).flip(0) + above        # entries in this bucket or a higher one
        last = int((at_least > count).nonzero().max()) if (at_least > count).any() else None
        if last is None:
            return -1.0
        bucket, above = (last if shift else bucket << 16 | last), above + int(histogram[last + 1:].sum())
    return torch.tensor([bucket], dtype=torch.int32).view(torch.float32).item()
