"""SoCo: learn which singular components of every weight matrix to keep (arXiv 2502.15092).

    python soco.py                                  # a bundled 1.9M-parameter GPT-2, offline, on a laptop
    python soco.py --model gpt2 --ratio 0.5         # GPT-2 on WikiText-2; a GPU is used if there is one

The method, on one screen. Every block weight W [m, n] becomes W' = diag(a) U diag(S * sigma) V diag(c) and an
offset d of the outputs, where U diag(sigma) V is its singular value decomposition in a metric (`factor`). The
*scores* S (in rpca.py S is the sparse part) and the *gains* a, c of outputs and inputs start at 1, the
*deviation* d at 0. Only these are trained, to keep KL(dense || compressed) small; the gains are not the
paper's, cost nothing, as they fold into the factors, and help where S and d have done what they can. What is
kept is chosen again and again by what the *learned* scores say a component is worth,

    F_i S_i^2 / (m + n),  F_i = E[(dL/dS_i)^2]:  twice the predicted loss per parameter, in one currency

(L is the loss, the mean E over tokens; the 2 is left out from here on), in three stages of one run:  1
*descend*: the kept share falls from 1 to the target;  2 *swing*: it swings around the target, and components
dropped too early come back;  3 *polarise*: the choice is final, what is dropped stays out, and the survivors'
scores grow to make up for it. Then each layer is stored as two thin products, or dense where that costs less.
"""
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # Ctrl-C while torch is imported: no traceback

import contextlib
import copy
import fcntl
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shlex
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


# ---- the mathematics ----------------------------------------------------------------------------

def factor(W, G=None, R=None, damping=1e-4, output_damping=0.03):
    """Singular value decomposition in a metric: W = U diag(sigma) V, U [m, r], sigma [r], falling, V [r, n].

    G [n, n] = E[x x^T] = B B^T of the layer's inputs, R [m, m] = E[g g^T] = C C^T of the loss's gradients at
    its outputs; None is the identity. Replacing W by W' adds |C^T (W - W') B|_F^2 to the loss, to second
    order and up to a factor (K-FAC, Martens & Grosse 2015, arXiv 1503.05671): this is the SVD of C^T W B,
    taken back to W. In float64, by an eigendecomposition of its smaller Gram matrix. Each damping is a part
    of the mean of a diagonal.
    """
    B = None if G is None else cholesky(G, damping)
    C = None if R is None else cholesky(R, output_damping)
    A = W.double() if B is None else W.double() @ B
    A = A if C is None else C.T @ A
    if wide := A.shape[0] <= A.shape[1]:
        A = A.T
    Q = torch.linalg.eigh(A.T @ A)[1].flip(1)                         # A's right singular vectors, falling
    AQ = A @ Q                                                        # U diag(sigma): A = (A Q) Q^T exactly
    sigma = AQ.norm(dim=0)
    AQ = AQ / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)
    U, V = (Q, AQ.T) if wide else (AQ, Q.T)
    U = U if C is None else torch.linalg.solve_triangular(C.T, U, upper=True)
    V = V if B is None else torch.linalg.solve_triangular(B, V, upper=False, left=False)
    return U, sigma, V


def cholesky(M, damping):
    """Lower triangular factor of M [k, k], `damping` times its mean diagonal added there; in float64. Where M
    is indefinite by the rounding of its sums, ten times as much, or a hundred. Raises LinAlgError."""
    M, mean = M.to(torch.float64, copy=True), M.diagonal().mean(dtype=torch.float64)
    mean = torch.where(mean > 0, mean, 1.0)                           # of zeros: any will do, 1 fits float16
    for more in (damping, 9 * damping, 90 * damping):                 # 1, 10, 100 times in all
        M.diagonal().add_(more * mean)
        lower, failed = torch.linalg.cholesky_ex(M)
        if not failed:
            return lower
    raise torch.linalg.LinAlgError("the matrix has negative eigenvalues, or a NaN")


def stored_parameters(k, m, n):
    """Parameters that rank k of an m x n matrix costs (tensors): two factors, or dense where that is less."""
    return torch.minimum(k * (m + n), m * n)


def choose(worth, m, n, budget, group=8):
    """Which components of N matrices to keep within a budget of parameters: keep [N, r], boolean.

    worth [N, r]: the loss of dropping each component, -1 where a matrix has none; m, n [N]: the shapes. Ranks
    are multiples of `group`, at least one if the budget allows, or all: the matrix then goes dense if that is
    cheaper. The worth of a matrix's best k components over their cost is a concave curve, and dense one more
    point: their upper hull is a list of steps of falling worth per parameter. The steps of all matrices are
    bought in that order, as far as the budget goes, and if the next is a step to dense, as many groups of its
    matrix as still fit: less than one group of one matrix is left over. All that is read back from the device
    is whether worth has a NaN, a ValueError.
    """
    if worth.isnan().any():
        raise ValueError("the worth of a component is NaN")
    value, order = worth.double().sort(dim=1, descending=True)
    full, step = (value >= 0).sum(1), group * (m + n)
    dense, r = stored_parameters(full, m, n)[:, None], value.shape[1]
    value = F.pad(value.clamp_min(0), (0, -r % group)).unflatten(1, (-1, group)).sum(2)    # of each group
    index = torch.arange(value.shape[1], device=value.device)         # of a group; before it is bought,
    rest = dense - index * step[:, None]                              # dense costs so much more,
    slope = (value.sum(1, keepdim=True) - value.cumsum(1) + value) / rest  # and is worth so much a parameter
    slope = torch.where((rest > 0) & (index > 0), slope, math.inf)
    last = torch.where(slope.isinf().all(1), 0, slope.argmin(1))[:, None]  # here the hull goes to dense
    slope = torch.where(index < last, value / step[:, None], slope).masked_fill(index == 0, math.inf)
    cost = torch.where(index < last, step[:, None], rest).masked_fill(index > last, 0)
    cost[:, 0] = torch.minimum(step, dense[:, 0])                     # the least a matrix gets
    turn = slope.masked_fill(index > last, -1).flatten().argsort(descending=True, stable=True)
    bought = cost.flatten()[turn].cumsum(0) <= budget
    groups = torch.zeros_like(bought).scatter(0, turn, bought).view_as(value)
    groups = (groups & (index <= last)).sum(1)
    k = torch.where(groups > last[:, 0], full, torch.minimum(group * groups, full))
    next_one = turn[bought.sum().clamp_max(len(turn) - 1)[None]] // len(index)
    left = budget - stored_parameters(k, m, n).sum()
    more = torch.div(left, step[next_one], rounding_mode="floor").long() * group
    k = torch.minimum(k.scatter_add(0, next_one, more), full)
    keep = torch.arange(r, device=k.device) < k[:, None]
    return torch.zeros_like(keep).scatter(1, order, keep)


class KLDivergence(torch.autograd.Function):
    """Mean over tokens of KL(teacher || student) in nats, from logits [batch, length, vocab]; in float32.

    Its gradient for the student's logits, softmax(student) - softmax(teacher), is known with the value.
    """

    @staticmethod
    def forward(ctx, teacher, student):
        total, grad = 0.0, torch.empty_like(student)
        for i, (t, s) in enumerate(zip(teacher, student)):
            t, s = F.log_softmax(t, -1, dtype=torch.float32), F.log_softmax(s, -1, dtype=torch.float32)
            p = t.exp()
            total = total + torch.dot(p.flatten(), (t - s).flatten())
            grad[i] = s.exp_().sub_(p)
        ctx.tokens = student[..., 0].numel()
        ctx.save_for_backward(grad)
        return total / ctx.tokens

    @staticmethod
    def backward(ctx, upstream):
        return None, ctx.saved_tensors[0] * (upstream / ctx.tokens)


# ---- the layers ---------------------------------------------------------------------------------

class ScoredProduct(torch.autograd.Function):
    """y = a * U (S * kept) V (c * x) + bias of x [tokens, n], where U is [m, r], V [r, n], S and kept [r],
    a and bias [m], c [n]; all but U and V may be of a wider dtype and on another device than x.

    The gradients are written out, to need fewer kernels, and because that of S is not autograd's: whether a
    component is kept or not, dL/dS_i is the sum over tokens of (u_i . a g)(v_i . c x), g = dL/dy.
    """

    @staticmethod
    def forward(ctx, x, S, a, c, bias, kept, U, V):
        ctx.like = {"dtype": S.dtype, "device": S.device}
        masked, a, c, bias = (t.to(x) for t in (S * kept, a, c, bias))
        z = F.linear(x * c, V)
        y = F.linear(z * masked, U)
        _, _, learns_a, learns_c, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if learns_c else None, masked, a, c, U, V, z, y if learns_a else None)
        return torch.addcmul(bias, a, y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, masked, a, c, U, V, z, y = ctx.saved_tensors
        u = (g * a) @ U
        v = (u * masked) @ V                                          # dL/d(c * x)
        sums = [None if terms is None else terms.sum(0, dtype=ctx.like["dtype"]).to(**ctx.like) for terms in
                (u * z, None if y is None else g * y, None if x is None else v * x, g)]
        return v * c, *sums, None, None, None


class ScoredLinear(nn.Module):
    """A layer while it learns: y = a * U (S * sigma * kept) V (c * x) + d + b, all frozen but the scores S
    [r], the gains a [m] of its outputs and c [n] of its inputs, and d [m].

    sigma [r] is split between the buffers U [m, r] and V [r, n]. A component with kept [r] = 0 adds nothing
    to y, yet its score receives the gradient it would have if it did (straight through), so that it can grow
    and come back. price [r]: predicted loss of dropping a component of score 1, at first sigma^2. d is in
    units of offset_scale. `layer` is the dense layer it stands for.
    """

    def __init__(self, layer, U, sigma, V, offset_scale=1.0):
        super().__init__()
        self.layer, self.offset_scale = layer, offset_scale
        half, W = sigma.sqrt(), layer.weight
        self.register_buffer("U", (U * half).to(W))
        self.register_buffer("V", (half[:, None] * V).to(W))
        self.register_buffer("price", sigma.square().to(W.device, torch.float32))
        self.register_buffer("kept", torch.ones_like(self.price))
        self.S = nn.Parameter(torch.ones_like(self.price))
        self.a, self.c = (nn.Parameter(self.price.new_ones(size)) for size in (len(U), V.shape[1]))
        self.d = nn.Parameter(torch.zeros_like(self.a))

    def forward(self, x):
        learned, fixed = (self.S, self.a, self.c, self.bias()), (self.kept, self.U, self.V)
        return ScoredProduct.apply(x.flatten(0, -2), *learned, *fixed).unflatten(0, x.shape[:-1])

    def bias(self):
        d = self.d * self.offset_scale
        return d if self.layer.bias is None else d + self.layer.bias.to(d.device)

    def finish(self):
        """The layer to store: LowRankLinear of the kept components, or dense where that costs no more."""
        S, a, c, kept = (t.detach().to(self.U.device) for t in (self.S, self.a, self.c, self.kept))
        index = kept.nonzero()[:, 0]
        U, V = a[:, None] * self.U[:, index].to(S) * S[index], self.V[index].to(S) * c
        bias = None if self.layer.bias is None and not self.d.any() else self.bias().detach()
        if U.numel() + V.numel() >= self.layer.weight.numel():
            return dense_like(self.layer, U @ V, bias)
        return low_rank(U, V, bias, like=self.layer.weight)


class LowRankLinear(nn.Module):
    """y = up(down(x)): rank k in place of a dense [m, n] layer, as two ordinary nn.Linear.

    `weight` is a marker of one number where the dense weight stood: code that asks a layer for weight.dtype
    or weight.device is answered, and a saved folder that is read as a dense model fails on its shape.
    """

    def __init__(self, n, m, rank, bias=True, **where):
        super().__init__()
        self.down = nn.Linear(n, rank, bias=False, **where)
        self.up = nn.Linear(rank, m, bias=bias, **where)
        self.register_buffer("weight", torch.zeros(1, **where))

    def forward(self, x):
        return self.up(self.down(x))


def low_rank(U, V, bias, like):
    """LowRankLinear of U [m, k], V [k, n] and a bias [m] or None; dtype and device are those of `like`."""
    new = LowRankLinear(V.shape[1], *U.shape, bias is not None, device=like.device, dtype=like.dtype)
    new.spec = {"kind": "LowRankLinear", "rank": len(V), "bias": bias is not None}
    state = {"up.weight": U, "down.weight": V, "weight": new.weight}
    new.load_state_dict(state | ({} if bias is None else {"up.bias": bias}))
    return new.requires_grad_(like.requires_grad)


# ---- the layers of a model -----------------------------------------------------------------------

class CannotCompress(ValueError):
    """A model, a setting or a folder that cannot be used; the message is one line that says why."""


def block_layers(model):
    """{name: layer} of every nn.Linear and Conv1D inside the model's repeated blocks (its ModuleLists).

    Raises CannotCompress for a model without any, for one that is quantized, compressed, not in memory or not
    of AutoModelForCausalLM, and for one with experts in 3-D parameters.
    """
    kind, config = type(model).__name__, getattr(model, "config", None)
    if config is None:
        raise CannotCompress(f"{kind} has no config: give a model of transformers")
    if getattr(config, "quantization_config", None) or getattr(config, "compressed", None):
        raise CannotCompress(f"{kind} is quantized or compressed already: give the dense model")
    if type(config) not in AutoModelForCausalLM._model_mapping:       # a model that brings its own code
        raise CannotCompress(f"AutoModelForCausalLM does not know {type(config).__name__}, so what is saved "
                             f"would not load: give a model of transformers, or register it")
    if not isinstance(model, AutoModelForCausalLM._model_mapping[type(config)]):
        raise CannotCompress(f"{kind} is not what AutoModelForCausalLM makes of its config, so what is saved "
                             f"would not load: give a causal language model")
    layers, inside = {}, block_prefixes(model)
    for name, module in model.named_modules():
        stacks = [key for key, p in module.named_parameters(recurse=False) if p.ndim == 3]
        if name.startswith(inside) and stacks and not isinstance(module, nn.Conv1d):
            raise CannotCompress(f"{kind} holds a stack of matrices in one 3-D parameter, {name}.{stacks[0]}"
                                 f", as mixtures of experts do: matrices must be nn.Linear or Conv1D layers")
        if name.startswith(inside) and (isinstance(module, nn.Linear) or is_conv1d(module)):
            layers[name] = module
            if module.weight.is_meta:
                raise CannotCompress(f"layer {name} is on the meta device: load the model without offloading")
    if not layers:
        raise CannotCompress(f"{kind} has no nn.Linear or Conv1D inside repeated blocks: nothing to compress")
    return layers


def block_prefixes(model):
    """Beginnings of the names of all that stands inside the model's repeated blocks."""
    return tuple(name + "." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))


def untouched(model, layers):
    """(name, shape, reason) of every weight of two or more dimensions that is in none of `layers`."""
    inside = block_prefixes(model)
    chosen = {id(p) for layer in layers.values() for p in layer.parameters()}
    reason = {True: "not a Linear or Conv1D", False: "outside the repeated blocks"}
    return [(name, tuple(p.shape), reason[name.startswith(inside)])
            for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in chosen]


def is_conv1d(layer):
    return type(layer).__name__ == "Conv1D"          # of transformers' GPT-2: a Linear, its weight transposed


def matrix(layer):
    """The weight of a layer as W [m, n] (outputs, inputs): y = W x + b."""
    return layer.weight.detach().T if is_conv1d(layer) else layer.weight.detach()


def dense_like(layer, W, bias):
    """A layer of the same type as `layer` with weight W [m, n] and bias [m] or None."""
    new = type(layer)(*W.shape) if is_conv1d(layer) else nn.Linear(W.shape[1], W.shape[0], device="meta")
    W = W.T if is_conv1d(layer) else W
    new.weight = nn.Parameter(W.to(layer.weight).contiguous())
    new.bias = None if bias is None else nn.Parameter(bias.to(layer.weight))
    return new.requires_grad_(layer.weight.requires_grad)


def swap(model, new_of):
    """Put new_of[layer] in place of every layer wherever the model holds it, in training mode if that was."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new_of:
                parent._modules[name] = new_of[child].train(child.training)


@contextlib.contextmanager
def swapped(model, new_of):
    """`swap` for the length of a with block."""
    swap(model, new_of)
    try:
        yield model
    finally:
        swap(model, {new: old for old, new in new_of.items()})


@contextlib.contextmanager
def frozen(model, checkpointing=False):
    """Inside the with block a model runs without dropout, and only what is switched on there gets gradients.

    checkpointing: whether blocks on which gradient checkpointing was enabled use it there; a block that calls
    dropout itself, as OPT's does, then has it.
    """
    flags, modes = {p: p.requires_grad for p in model.parameters()}, {m: m.training for m in model.modules()}
    for module in modes:                             # transformers checkpoints only blocks in training mode
        module.training = checkpointing and getattr(module, "gradient_checkpointing", False)
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for p, flag in flags.items():
            p.requires_grad_(flag)


def enable_checkpointing(model):
    """Switch gradient checkpointing on, for `frozen(model, checkpointing=True)`."""
    try:                                             # transformers' newer name, and its older one
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    except ValueError as error:
        raise CannotCompress(f"{type(model).__name__} has no gradient checkpointing: leave it out") from error


# ---- several processes: each holds the whole model and reads its own rows of every batch ----------

def process():
    """(rank, number) of the processes that torchrun started; (0, 1) for one alone."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def average(*tensors):
    """Replace each tensor, in place, by its mean over the processes."""
    for tensor in tensors if process()[1] > 1 else ():
        dist.all_reduce(tensor)
        tensor /= process()[1]


def as_the_first(tensors):
    """Replace each tensor by that of the first process: no rounding may lead to different choices."""
    for tensor in tensors if process()[1] > 1 else ():
        dist.broadcast(tensor, 0)
    return tensors


def bar(items, progress, **words):
    """A progress bar over items, if asked for and if standard error is a terminal."""
    from tqdm import tqdm
    return tqdm(items, disable=None if progress and process()[0] == 0 else True, leave=False, **words)


# ---- the metric: what a change of a weight costs the loss ------------------------------------------

class Metric(NamedTuple):
    G: torch.Tensor      # E[x x^T] [n, n] float32, of the layer's inputs x at a token
    R: torch.Tensor      # E[g g^T] [m, m] float32, of the gradients g there of its own and all later losses;
                         # or one number a row [m], E[g_i^2 e_i] / E[e_i] with e_i = sum_j W_ij^2 x_j^2


def observe(model, layers, batches, see, progress=False, desc="metric", drawing=0):
    """Call see(name, x, g) with the inputs x [tokens, n] and the output gradients g [tokens, m] of each of
    `layers` {name: layer}, once a batch of token ids [batch, length]; returns the number of tokens.

    One pass forward and one backward of the whole model a batch. The labels are drawn from the model's own
    prediction: E[g g^T] is then the Fisher matrix, the curvature of KL(model || changed model), not that of
    one text. They depend on torch's seed and the number `drawing`, and on nothing that was drawn before.
    """
    def watch(name, layer, inputs, output):
        x = inputs[0].detach()
        if output.requires_grad:                                      # some models run layers without
            output.register_hook(lambda g: see(name, x.flatten(0, -2), g.detach().flatten(0, -2)))

    tokens, drawn = 0, torch.Generator().manual_seed(torch.initial_seed() + drawing)
    with contextlib.ExitStack() as undo, torch.enable_grad(), frozen(model):  # gradients of outputs only
        for name, layer in layers.items():
            undo.enter_context(layer.register_forward_hook(functools.partial(watch, name)))
        embeddings = model.get_input_embeddings()
        undo.enter_context(embeddings.register_forward_hook(lambda *call: call[-1].requires_grad_().clone()))
        if model.dtype in (torch.bfloat16, torch.float16):            # TF32 holds numbers of these exactly
            with contextlib.suppress(RuntimeError):  # where torch's newer switch is in use, it stays
                undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
                torch.set_float32_matmul_precision("high")
        for ids in bar(batches, progress, desc=desc, unit="batch"):
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits.flatten(0, 1)
            p = logits.detach().softmax(-1, dtype=torch.float32)
            p[torch.arange(len(p), device=p.device), draw(p, *ids.shape, drawn)] -= 1
            logits.backward(p.to(logits.dtype))                       # the gradient of -log p[label]
            tokens += ids.numel()
    return tokens


def draw(p, batch, length, generator):
    """Labels [batch * length] drawn from distributions p [batch * length, vocab], by random numbers of the
    CPU: the same on any device, and for any number of processes that share out a batch."""
    rank, processes = process()
    u = torch.rand(batch * processes, length, generator=generator, dtype=torch.float32, device="cpu")
    total, u = p.cumsum(-1), u[rank::processes].flatten().to(p.device)
    return torch.searchsorted(total, (u * total[:, -1])[:, None])[:, 0].clamp_max(p.shape[-1] - 1)


def collect_metric(model, layers, batches, progress=False, by_row=False):
    """{name: Metric} of `layers` {name: layer} over `batches` of token ids [batch, length].

    The sums, in float32, live where the layer lives; layers that read the same tensor share one G. by_row:
    collect one number a row in place of R, for entries of W. Raises CannotCompress for a layer that no token
    reached, and FloatingPointError for sums that are not finite.
    """
    G, R, owner, latest = {}, {}, {}, {}

    def see(name, x, g):
        if not len(x):                                                # of an expert that no token was sent to
            return
        address, held, x, g = (x.device, x.data_ptr(), x.shape), x, x.float(), g.float()
        if latest.get("address") != address:                          # q, k and v read one tensor
            latest.update(address=address, name=name, x=held)         # held: no other takes its memory
            G[name] = torch.addmm(G.get(name, x.new_zeros(1)), x.T, x)
        owner[name] = latest["name"]
        if by_row:
            energy = F.linear(x.square(), matrix(layers[name]).float().square())
            R[name] = R.get(name, 0) + (g.square() * energy).sum(0)
        else:
            R[name] = torch.addmm(R.get(name, g.new_zeros(1)), g.T, g)

    tokens = observe(model, layers, batches, see, progress)
    lost = [name for name in layers if name not in R]
    if lost:
        raise CannotCompress(f"no calibration token reached layer {lost[0]}: use more calibration text")
    for name, moment in [*G.items(), *R.items()]:
        average(moment.div_(tokens))
        if not moment.sum().isfinite():
            raise FloatingPointError(f"the inputs or gradients of layer {name} are not finite: use --dtype "
                                     f"float32 or bfloat16")
    for name in layers if by_row else ():
        R[name] /= (matrix(layers[name]).float().square() @ G[owner[name]].diagonal()).clamp_min(1e-30)
    return {name: Metric(G[owner[name]], R[name]) for name in layers}


def measured(model, layers, batches, progress=False, room=None, by_row=False):
    """(name, layer, Metric) of `layers` {name: layer}, one after the other.

    Collected in groups of blocks, one pass over `batches` a group, whose sums, and what is made of them, fit
    in `room` bytes (default: a third of what is free then on the device that has least); they are let go
    before the next group.
    """
    def need(names):
        shapes = [matrix(layers[name]).shape for name in names]
        return sum(4 * (n * n + (m * m + m * n) * (not by_row)) for m, n in shapes)

    by_block = itertools.groupby(layers, lambda name: re.match(r".*?\.\d+\.|", name)[0])
    blocks = [list(names) for _, names in by_block]
    while blocks:
        free = min(free_memory(layer.weight.device) for layer in layers.values())
        free, = as_the_first([torch.tensor(free, device=model.device)])
        left, group = room or free.item() // 3, {}
        while blocks and (not group or need(blocks[0]) <= left):
            left -= need(blocks[0])
            group |= {name: layers[name] for name in blocks.pop(0)}
        metrics = collect_metric(model, group, batches, progress, by_row)
        for name, layer in group.items():
            yield name, layer, metrics.pop(name)


def free_memory(device):
    """Bytes free on a device; what torch holds in reserve counts."""
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:                     # macOS does not tell
        return 2 ** 34
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def set_prices(model, scored, batches, progress=False):
    """Set the price [r] of each of `scored` {dense layer: ScoredLinear} to the Fisher information of its
    scores, F_i = E[(dL/dS_i)^2] = E[(g . u_i sigma_i)^2 (v_i . x)^2], token by token, for the dense model.

    sigma_i^2 is this only where a token's input and gradient are independent; attention sinks are not.
    """
    layers = {name: layer for name, layer in model.named_modules() if layer in scored}
    for student in scored.values():
        student.price.zero_()

    def see(name, x, g):
        student = scored[layers[name]]
        student.price += (F.linear(x, student.V).float() * (g @ student.U).float()).square().sum(0)

    tokens = observe(model, layers, batches, see, progress, desc="prices", drawing=1)
    for student in scored.values():
        average(student.price.div_(tokens))


# ---- compressing a model ------------------------------------------------------------------------

BASES = {"plain": "plain SVD", "whitened": "whitened SVD", "two-sided": "KFAC-SVD"}     # and its truncation
LEARNED = ("S", "a", "c", "d")       # of a ScoredLinear: scores, gains of outputs and inputs, deviation
LR = 0.01        # times the ratio: the random part of Adam's steps costs about lr^2 sum(price)
SWING = 0.02     # stage 2: how far the kept share goes over and under the target, as a part of it
POOL = 1.3       # what a budget this much larger would not keep is dropped for good in stages 1 and 2
STAGES = (0.5, 0.1, 0.4)     # the parts of a run that descend, swing and polarise
STEPS = 800      # of learning, times the ratio: where less is removed, there is less to learn
METRIC_BATCHES = 64          # to measure on; unlearned, SmolLM2 at 0.5 loses 0.24 nats more on 4 than on 16


def compress(model, batches, ratio=0.5, steps=None, *, basis="two-sided", lr=LR, learned=LEARNED,
             stages=STAGES, group=8, metric_batches=METRIC_BATCHES, progress=False):
    """Compress a causal language model in place: `ratio` of its block weights' parameters go. Returns it.

    batches: token ids [batch, length], an iterable; repeated when `steps` need more; metric and prices are
    measured on the first `metric_batches`. steps: of learning, by default STEPS * ratio; 0 chooses
    without it. basis: of the decomposition. lr: Adam's rate, times the ratio. learned: which of S, a, c and
    d. stages: the parts of the steps that descend, swing and polarise. group: ranks are multiples of it.
    Raises CannotCompress before any work for what cannot be met, FloatingPointError for sums, a loss or a
    gradient not finite.
    """
    batches, layers = list(batches), block_layers(model)
    check_inputs(batches[:metric_batches], ratio, steps, lr)
    check(layers, ratio, steps, basis, stages, group, learned)
    steps = round(STEPS * ratio) if steps is None else steps
    scored = scored_layers(model, layers, batches[:metric_batches], basis, progress)
    spectrum, budget = Spectrum(list(scored.values()), group), budget_for(scored, ratio, steps, learned)
    learn(model, scored, spectrum, batches, budget, steps, lr, learned, stages, progress=progress)
    return install(model, "soco", layers, finished(scored))


def check_inputs(batches, ratio, steps, lr):
    """Refuse what no method can learn from, or meet."""
    if torch.is_inference_mode_enabled():
        raise CannotCompress("there are no gradients under torch.inference_mode(): leave it, or use no_grad")
    if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        raise CannotCompress("what is measured under torch.autocast is rounded: leave it")
    if not batches:
        raise CannotCompress("there are no batches: give token ids [batch, length] to learn from")
    if not all(torch.is_tensor(ids) and ids.ndim == 2 for ids in batches):
        raise CannotCompress("a batch is no tensor [batch, length]: give an iterable of batches of token ids")
    if not 0 < ratio < 1 or (steps or 0) < 0 or lr <= 0:
        raise CannotCompress(f"ratio {ratio}, steps {steps} or lr {lr} cannot be: give a ratio between 0 and "
                             f"1, steps >= 0, lr > 0")


def check(layers, ratio, steps, basis, stages, group, learned):
    """Refuse what SoCo cannot do."""
    parts = len(stages) == 3 and min(stages) >= 0 and math.isclose(sum(stages), 1)
    if group < 1 or basis not in BASES or not parts:
        raise CannotCompress(f"group {group}, basis {basis!r} or stages {stages} cannot be: give group >= 1, "
                             f"one of {', '.join(BASES)}, three parts of sum 1")
    if not learned or not set(learned) <= set(LEARNED):
        raise CannotCompress(f"learned {learned!r} cannot be: give one or more of {', '.join(LEARNED)}")
    least = sum(min(group * sum(layer.weight.shape), layer.weight.numel()) for layer in layers.values())
    budget = budget_for(layers.values(), ratio, steps, learned)
    if budget < least:
        raise CannotCompress(f"ratio {ratio} leaves {budget} parameters, and the least rank of every matrix "
                             f"takes {least}: give a smaller ratio or rank multiple")


def budget_for(layers, ratio, steps=0, learned=LEARNED):
    """Parameters that what stands for the dense `layers` may take: what `ratio` leaves, less the new biases
    of deviations, if these are learned."""
    parameters = sum(layer.weight.numel() for layer in layers)
    biases = sum(len(matrix(layer)) for layer in layers if layer.bias is None)
    return math.floor((1 - ratio) * parameters + 1e-6) - (biases if steps != 0 and "d" in learned else 0)


def scored_layers(model, layers, batches, basis="two-sided", progress=False, visit=lambda *_: None):
    """{layer: ScoredLinear}, all kept, of score 1, of `layers`; visit(layer, metric, factors) sees each."""
    scored, each = {}, measured(model, layers, batches, progress)
    for name, layer, metric in bar(each, progress, total=len(layers), desc="decompose", unit="matrix"):
        W, factors = matrix(layer).float(), decompose(layer, metric, basis)
        visit(layer, metric, factors)
        output_rms = ((W @ metric.G) * W).sum(1).mean().clamp_min(0).sqrt().item()
        scored[layer] = ScoredLinear(layer, *factors, offset_scale=output_rms)
    set_prices(model, scored, batches, progress)
    return scored


def decompose(layer, metric, basis):
    """`factor` of a layer's weight in a basis: plain (no metric), whitened (inputs only) or two-sided."""
    G, R = metric.G if basis != "plain" else None, metric.R if basis == "two-sided" else None
    return as_the_first([part.contiguous() for part in factor(matrix(layer), G, R)])


def truncated(layer, U, sigma, V, ratio):
    """LowRankLinear of the first components, as many as `ratio` leaves of this matrix: a baseline."""
    k = max(int((1 - ratio) * len(U) * V.shape[1] / (len(U) + V.shape[1]) + 1e-6), 1)
    half = sigma[:k].sqrt()
    return low_rank(U[:, :k] * half, half[:, None] * V[:k], layer.bias, like=layer.weight)


def finished(scored):
    return {layer: student.finish() for layer, student in scored.items()}


class Spectrum:
    """The scores, prices and masks of N ScoredLinear layers as one tensor each, S, price and kept [N, r], and
    their gains, a [N, m] and c [N, n], and deviations, d [N, m], so that a step does for all of them at once
    what it does; each layer's own are views of a row. Where a layer has fewer than r components, price is -1.
    """

    def __init__(self, layers, group):
        self.layers, self.group, device = layers, group, layers[0].price.device
        self.m = torch.tensor([len(layer.U) for layer in layers], device=device)
        self.n = torch.tensor([layer.V.shape[1] for layer in layers], device=device)
        self.ranks = [len(layer.price) for layer in layers]
        for name in ("price", "kept", *LEARNED):
            rows = [getattr(layer, name).detach().to(device) for layer in layers]
            padding = {"price": -1.0, "kept": 0.0, "d": 0.0}.get(name, 1.0)
            tensor = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
            tensor.grad = torch.zeros_like(tensor)
            setattr(self, name, tensor)
        self.share()

    def share(self, names=LEARNED):
        """Make price, kept and the tensors of these names of every layer views of their rows."""
        for row, (layer, rank) in enumerate(zip(self.layers, self.ranks)):
            layer.price, layer.kept = self.price[row, :rank], self.kept[row, :rank]
            for name in names:
                tensor, size = getattr(self, name), rank if name == "S" else len(getattr(layer, name))
                view = nn.Parameter(tensor[row, :size], getattr(layer, name).requires_grad)
                view.grad = tensor.grad[row, :size]
                setattr(layer, name, view)

    def choice(self, budget):
        """`choose` by the predicted loss of dropping each component, price S^2 [N, r], as if gains were 1."""
        worth = torch.where(self.price < 0, -1.0, self.price * self.S.square())
        return choose(worth, self.m, self.n, budget, self.group)

    def keep_best(self, budget):
        """Turn the masks on for what is worth most within a budget of parameters."""
        self.kept.copy_(self.choice(budget))

    def shrink(self, budget, optimizer):
        """Drop for good what would not be kept within `budget`, if that is a tenth of the factors' size."""
        keep, sides = self.choice(budget), (self.m + self.n)[:, None]
        if (keep * sides).sum() > 0.9 * ((self.price >= 0) * sides).sum():
            return
        self.ranks = keep.sum(1).tolist()
        order = keep.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        self.price.masked_fill_(~keep, -1)
        state = optimizer.state.get(self.S, {}).values()
        moments = [moment for moment in state if moment.shape == self.S.shape]
        for tensor in (self.S, self.price, self.kept, *moments):
            tensor.copy_(tensor.gather(1, order))
        for row, (layer, rank) in enumerate(zip(self.layers, self.ranks)):
            left = order[row, :rank].to(layer.U.device)
            layer.U, layer.V = layer.U[:, left], layer.V[left]
        self.share(["S"])


def stage_and_target(step, steps, stages, start, budget):
    """The stage a step belongs to, and the budget of parameters that its mask is chosen for."""
    done, (descend, swing, _) = (step + 1) / steps, stages
    if done <= descend:
        return "descend", budget + (start - budget) * (1 - done / descend) ** 3
    if done <= descend + swing:
        return "swing", budget * (1 + SWING * (-1) ** step)
    return "polarise", budget


def learn(model, scored, spectrum, batches, budget, steps, lr=LR, learned=LEARNED, stages=STAGES, start=None,
          progress=False):
    """Train what is `learned` of `scored` {dense layer: ScoredLinear} in the model, and leave the masks on
    what `budget`, in parameters, keeps. lr: Adam's rate, times the share that is removed; half of it for
    d. start: what is kept at the start (default: all). The model itself is left as it was.
    """
    learned, stage = [name for name in LEARNED if name in learned], None
    parameters = int((spectrum.m * spectrum.n).sum())
    rate = lr * (1 - budget / parameters)
    groups = [{"params": [getattr(spectrum, name)], "lr": rate / 2 if name == "d" else rate}
              for name in learned]

    def set_masks(step, optimizer):
        nonlocal stage
        before, (stage, target) = stage, stage_and_target(step, steps, stages, start or parameters, budget)
        if stage != before or (stage != "polarise" and step % max(steps // 20, 1) == 0):
            pool = target if stage == "polarise" else min(POOL * target, parameters)
            spectrum.shrink(pool, optimizer)  # what is outside the pool cannot come back
        if stage != before or stage != "polarise":
            spectrum.keep_best(target)
        return {"stage": stage, "kept": target / parameters}

    train(model, scored, learned, groups, batches, range(steps), stages[2], set_masks, progress)
    if stage != "polarise":
        spectrum.keep_best(budget)


def learn_down(model, scored, spectrum, batches, ratios, steps, lr, learned=LEARNED, progress=False):
    """Go down through rising `ratios` in one run, `steps` to the last and its share of them to each before,
    over as many batches; at each, yield (steps so far, {dense layer: layer to store})."""
    done, start = 0, None
    for ratio in ratios:
        budget, until = budget_for(scored, ratio, steps, learned), round(steps * ratio / ratios[-1])
        learn(model, scored, spectrum, batches[done:], budget, until - done, lr, learned, start=start,
              progress=progress)
        yield until, finished(scored)
        done, start = until, budget


def train(model, students, learned, groups, batches, steps, falling, before_step=lambda *_: {},
          progress=False):
    """Train `students` {dense layer: what stands for it in the model} to keep KL(dense || compressed) small
    on `batches` of token ids [batch, length]. The model itself is left as it was.

    learned: names of the students' parameters that get gradients; they are, or are views of, the tensors of
    `groups`, which Adam moves, and which have a .grad. steps: a range; step i reads batch i; after the last
    batch they begin anew. Adam's rates rise over the first five steps, are held, and fall to zero over the
    last part `falling`. before_step(step, optimizer) returns words for the progress bar. Raises
    FloatingPointError for a loss or a gradient that is not finite.
    """
    tensors = [tensor for group in groups for tensor in group["params"]]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(
        (done + 1) / 5, 1.0, (1 - done / max(len(steps), 1)) / max(falling, 1e-9)))
    with swapped(model, students), frozen(model, checkpointing=True), torch.enable_grad():
        for student, name in itertools.product(students.values(), learned):
            getattr(student, name).requires_grad_(True)
        for step in (shown := bar(steps, progress, desc="learn", unit="step")):
            words = before_step(step, optimizer)
            optimizer.zero_grad(set_to_none=False)
            loss = distil(model, students, batches[step % len(batches)].to(model.device))
            average(loss, *(tensor.grad for tensor in tensors))
            size = nn.utils.get_total_norm([tensor.grad for tensor in tensors])
            if not (loss + size.to(loss)).isfinite():
                raise FloatingPointError(f"the loss is {loss.item()} or its gradient not finite at step "
                                         f"{step + 1} of {steps.stop}: lower the learning rate, --lr, or use "
                                         f"--dtype float32 or bfloat16")
            optimizer.step()
            schedule.step()
            if progress:
                shown.set_postfix(loss=loss.item(), **words)


def distil(model, students, ids):
    """KL(dense || compressed) on token ids [batch, length], detached; its gradient, times the number of
    tokens, is added to .grad of what is learned. The model is its own teacher: with the dense layers back."""
    with torch.no_grad(), swapped(model, {student: layer for layer, student in students.items()}):
        logits = model(input_ids=ids, use_cache=False).logits
    loss = KLDivergence.apply(logits, model(input_ids=ids, use_cache=False).logits)
    (loss * ids.numel()).backward()                  # Adam does not see the factor; float16 needs it
    return loss.detach()


# ---- the saved folder: an ordinary transformers folder, and the module that puts its layers in place ----

class Kinds(dict):
    """{name: class} of layers; rpca.py adds its own."""

    def __missing__(self, kind):
        raise ValueError(f"layers of kind {kind!r} are not known here: import rpca first")


KINDS = Kinds(LowRankLinear=LowRankLinear)
PACKERS = {}                                     # how rpca.py's S is stored: {kind: S -> {name: tensor}}


def install(model, method, layers, new):
    """Put new[layer] in place of each of `layers` {name: layer}; model.config says what each became."""
    swap(model, new)
    specs = {name: getattr(new[layer], "spec", None) or {"kind": "dense", "bias": new[layer].bias is not None}
             for name, layer in layers.items()}
    shared, config = model.config, copy.deepcopy(model.config)        # other models may have the same object
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = config
    config.compressed = {"method": method, "layers": specs}
    if not isinstance(model, SavesItself):
        model.__class__ = compressed_class(type(model))
    return model


class SavesItself:
    """What a compressed model adds to its dense class: save_pretrained writes what loads anywhere."""

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, **options):
        if options.get("push_to_hub"):
            raise ValueError("this would upload no compressed.py: call push_to_hub() instead")
        state_dict = dict(self.state_dict() if state_dict is None else state_dict)
        for name, spec in self.config.compressed["layers"].items():
            if spec["kind"] in PACKERS:
                stored = PACKERS[spec["kind"]](state_dict.pop(f"{name}.S"))
                state_dict |= {f"{name}.{key}": tensor for key, tensor in stored.items()}
                spec["nonzeros"] = len(stored["values"])
        super().save_pretrained(save_directory, is_main_process, state_dict, **options)
        if is_main_process:
            write_loader(Path(save_directory))


def write_loader(folder):
    """Give a folder that save_pretrained wrote the config.json of a compressed model, and compressed.py."""
    stored = json.loads((folder / "config.json").read_text())
    kinds = {spec["kind"] for spec in stored["compressed"]["layers"].values()} & set(KINDS)
    stored["compressed"]["dense"], stored["model_type"] = stored["model_type"], CompressedConfig.model_type
    stored["auto_map"] = {auto: f"compressed.{made.__name__}" for auto, made in
                          [("AutoConfig", CompressedConfig), ("AutoModelForCausalLM", CompressedForCausalLM)]}
    (folder / "config.json").write_text(json.dumps(stored))
    stored["digest"] = digest(PreTrainedConfig.get_config_dict(folder)[0])     # infinity is written in words
    (folder / "config.json").write_text(json.dumps(stored, indent=1) + "\n")
    parts = [text for name, text in SOURCES.items() if name in kinds or name not in KINDS]
    names = ", ".join(f'"{kind}": {kind}' for kind in sorted(kinds))
    source = LOADER + "\n".join(parts) + f"\nKINDS, MODEL_BASES = {{{names}}}, ()\n"
    (folder / "compressed.py").write_text(source)


LOADER = '''"""Loads this model: AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)."""
import functools
import hashlib
import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

'''
MODEL_BASES = (SavesItself,)


@functools.cache
def compressed_class(dense):
    """The class of a transformers model whose layers are what config.compressed says."""
    class Compressed(*MODEL_BASES, dense):
        def __init__(self, config, *args, **options):
            super().__init__(config, *args, **options)
            replace_layers(self, config.compressed["layers"])

    Compressed.__name__, Compressed.__module__ = dense.__name__, dense.__module__
    return Compressed


def replace_layers(model, specs):
    """Put layers as specs {name: {"kind": ..., ...}} has them, without values, in place of the dense ones."""
    for name, spec in specs.items():
        layer, spec = model.get_submodule(name), dict(spec)
        m, n = layer.weight.shape[::-1] if type(layer).__name__ == "Conv1D" else layer.weight.shape
        if (kind := spec.pop("kind")) != "dense":
            model.set_submodule(name, KINDS[kind](n, m, **spec))
        elif spec["bias"] != (layer.bias is not None):
            layer.bias = nn.Parameter(torch.empty(m)) if spec["bias"] else None


def digest(stored):
    """Of what config.json says of the model: any change of it after saving is found."""
    told = stored | dict.fromkeys(["digest", "auto_map", "architectures", "transformers_version"])
    told.pop("_commit_hash", None)                   # some versions of transformers add it as they read
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


class CompressedConfig(PreTrainedConfig):
    """config.json of a compressed folder: the dense model's, and what its layers became."""
    model_type = "compressed_low_rank"


class CompressedForCausalLM(PreTrainedModel):
    """What AutoModelForCausalLM calls for a compressed folder: loads what was saved, or raises ValueError."""
    config_class = CompressedConfig

    @classmethod
    def from_pretrained(cls, folder, *args, config=None, output_loading_info=False, **options):
        stored, _ = PreTrainedConfig.get_config_dict(folder, **options | {"trust_remote_code": None})  # warns
        index = Path(folder, "model.safetensors.index.json")
        shards = json.loads(index.read_text())["weight_map"].values() if index.is_file() else []
        own = all(Path(name).name == name and Path(name).suffix == ".safetensors" for name in shards)
        if not own or Path(folder, "adapter_config.json").exists() or stored.get("digest") != digest(stored):
            raise ValueError(f"{folder}: config.json or the index of its weights is not what was saved")
        given = {} if config is None else vars(config)                # by AutoModel, as the caller wants it
        known = {key: value for key, value in (stored | given).items() if key not in ("auto_map", "digest")}
        dense = AutoConfig.for_model(**known | {"model_type": stored["compressed"]["dense"]})
        dense._attn_implementation = given.get("_attn_implementation_internal")
        options |= {"config": dense, "use_safetensors": True, "ignore_mismatched_sizes": True}
        model_class = compressed_class(AutoModelForCausalLM._model_mapping[type(dense)])
        model, info = model_class.from_pretrained(folder, *args, output_loading_info=True, **options)
        for name in [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]:
            raise ValueError(f"{folder} is not what was saved: tensor {name} is not as config.json says")
        for module in model.modules():
            if hasattr(module, "unpack"):
                module.S, module.values, module.mask = module.unpack(module.values, module.mask), None, None
        return (model, info) if output_loading_info else model


if __name__ != "__main__":                           # a script imports itself as a module (last lines)
    SOURCES = {part.__name__: inspect.getsource(part) for part in (      # now: it may be edited while it runs
        LowRankLinear, compressed_class, replace_layers, digest, CompressedConfig, CompressedForCausalLM)}
    AutoConfig.register(CompressedConfig.model_type, CompressedConfig, exist_ok=True)
    AutoModelForCausalLM.register(CompressedConfig, CompressedForCausalLM, exist_ok=True)


@contextlib.contextmanager
def reserved(folder):
    """Take a folder's name at once: `folder` is new or empty. Inside the with block it stays empty and
    locked, and the block is given (where to build, folder); `published` moves the one over the other.

    Raises CannotCompress for a name that cannot be taken. Without `published`, nothing is left.
    """
    folder = Path(os.path.abspath(folder))
    missing = [parent for parent in [folder, *folder.parents] if not os.path.lexists(parent)]
    with contextlib.ExitStack() as undo:
        try:
            if folder.is_symlink() or os.path.ismount(folder):
                raise OSError(None, "it is a link or a mount point")
            str(folder).encode("utf-8")
            for parent in reversed(missing):
                parent.mkdir(exist_ok=parent != folder)
                undo.callback(remove_if_empty, parent)
            if any(folder.iterdir()):
                raise OSError(None, "it is not empty")
            lock = os.open(folder, os.O_RDONLY)
            undo.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fresh = undo.enter_context(tempfile.TemporaryDirectory(prefix=".compressed-", dir=folder.parent))
        except (OSError, UnicodeEncodeError) as error:
            why = getattr(error, "strerror", "its name is not UTF-8")
            why = "another run is writing it" if isinstance(error, BlockingIOError) else why
            why = f"cannot write {str(folder)!r}: {why}; give a new or an empty folder"
            raise CannotCompress(why) from error
        yield Path(fresh, folder.name), folder


def remove_if_empty(folder):
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def published(place):
    """Inside the with block, a folder to fill; it then takes its `place` from `reserved`, in one rename."""
    from safetensors import SafetensorError
    fresh, folder = place
    try:
        fresh.mkdir()
        yield fresh
        fresh.rename(folder)
    except (OSError, SafetensorError) as error:
        raise CannotCompress(f"cannot write {str(folder)!r}: {error}; give a place with more room") from error


def save(model, folder):
    """Write a compressed model to a folder that is new or empty, complete or not at all."""
    if not isinstance(model, SavesItself):
        raise CannotCompress("this model was not compressed: save it with save_pretrained; or it was loaded "
                             "by code of its folder: load it again, after the import")
    with reserved(folder) as place, quiet(), published(place) as fresh:
        model.save_pretrained(fresh)


def load(folder, **options):
    """The compressed model in a folder; options as for from_pretrained: dtype, device_map, ...

    Only safetensors is read. Raises ValueError where config.json or a tensor's name or shape is not as saved,
    SafetensorError where a file is torn.
    """
    stored = json.loads(Path(folder, "config.json").read_text())
    if not isinstance(stored, dict) or stored.get("model_type") != CompressedConfig.model_type:
        raise CannotCompress(f"{folder} holds no compressed model: load it with transformers")
    with quiet(), torch.device("cpu"):
        return CompressedForCausalLM.from_pretrained(folder, **options)


@contextlib.contextmanager
def quiet():
    """No progress bars of transformers inside the with block."""
    from transformers.utils import logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# ---- the command: what a run of soco.py or rpca.py does around its method ---------------------------

def add_run_flags(parser, steps=STEPS):
    from eval_ppl import add_model_flags, add_text_flags, between, whole
    add_model_flags(parser)
    add_text_flags(parser, "--eval-")
    add = parser.add_argument
    add("--ratio", type=between(0, 1), nargs="+", default=[0.5], help="share of the block weights' parameters"
        " to remove; several, rising: one run that goes down through them and saves a model at each")
    add("--calib", help="text to learn from, its train split: wikitext2, stdlib or a file (default: stdlib"
                        " for the bundled model, else wikitext2)")
    add("--same-text", action="store_true", help="allow --calib and --eval to be the same file")
    add("--seqlen", type=whole(8, 2 ** 20), default=256, help="tokens a calibration block")
    add("--batch-size", type=whole(1, 2 ** 16), default=4, help="blocks a batch")
    add("--metric-batches", type=whole(1, 10 ** 5), default=METRIC_BATCHES, help="batches that the metric"
        " sees, and that CAP learns from")
    add("--steps", type=whole(0, 10 ** 6), help="of learning, down to the last ratio; each before it has its"
        f" share of them (default: {steps} * the last ratio)")
    add("--lr", type=between(0, 10), default=LR, help="Adam's learning rate, times the ratio")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, more time")
    add("--no-baselines", action="store_true", help="do not measure the baselines")
    add("--seed", type=whole(0), default=0, help="of calibration blocks, of drawn labels, of the policy")
    add("--out", help="folder to write, new or empty; each of several ratios gets its own in it (default: a "
                      "fresh one under out/)")


def read_inputs(args):
    """The model, its tokenizer, and the token ids of the text to learn from and of the text to score. Fills
    in defaults in `args`, refuses flags that cannot be met; joins the processes, and seeds."""
    from eval_ppl import UserError, default_text, load_scored, load_tokens, window
    args.calib, args.eval = args.calib or default_text(args.model), args.eval or default_text(args.model)
    calib, scored = Path(args.calib), Path(args.eval)
    if calib.is_file() and scored.is_file() and calib.samefile(scored) and not args.same_text:
        raise UserError(f"--calib and --eval are both {args.eval}: perplexity on what was learned from says "
                        f"little; give another file, or --same-text if you mean it")
    if args.ratio != sorted(set(args.ratio)):
        raise UserError(f"--ratio {args.ratio}: several ratios must rise")
    processes = os.environ.get("WORLD_SIZE", "1")
    joined = processes == "1" or {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= {*os.environ}
    if not re.fullmatch(r"[1-9]\d{0,4}", processes) or args.batch_size % int(processes) or not joined:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared out among WORLD_SIZE={processes} "
                        f"processes: give a multiple, and start them by torchrun")
    model, tokenizer, evaluation = load_scored(args, "--eval-")
    window(model, "--seqlen", args.seqlen)
    if args.gradient_checkpointing:
        enable_checkpointing(model)
    calibration = load_tokens(model, tokenizer, args.calib, "train", args.seqlen)
    if processes != "1" and not dist.is_initialized():
        dist.init_process_group("nccl" if model.device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)
    return model, tokenizer, calibration, evaluation


def sample_batches(ids, args, count):
    """`count` batches [batch, seqlen] of blocks of a text's ids [tokens], without overlap, in random order,
    repeated when the text has fewer; the same first ones whatever the count; args.bos, if there is one, in
    place of the first token of each. Of several processes, each gets its own rows."""
    blocks = ids[:len(ids) // args.seqlen * args.seqlen].view(-1, args.seqlen)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(args.seed), device="cpu")
    wanted = count * args.batch_size
    blocks = blocks[order.repeat(wanted // len(blocks) + 1)[:wanted]]
    if args.bos is not None:
        blocks[:, 0] = args.bos
    rank, processes = process()
    return [batch[rank::processes] for batch in blocks.split(args.batch_size)]


def model_name(model):
    """The last part of a folder, also of ".", or of a hub id."""
    return os.path.basename(os.path.abspath(model))


def out_folders(args, method, stack):
    """{ratio: place}, reserved until the ExitStack closes: --out, or out/MODEL-METHOD-RATIO with the first
    number that is free. Of several processes, the first alone writes."""
    from eval_ppl import torchrun_rank
    name, places = re.sub(r"[^\w.-]+", "-", model_name(args.model))[:100], {}
    for ratio in {*args.ratio} if torchrun_rank() == "0" else ():
        if args.out is None:
            folder, tails = f"out/{name}-{method}-{ratio:g}", map("-{}".format, itertools.count(2))
            taken = os.path.lexists(folder)
            folder += next(tail for tail in tails if not os.path.lexists(folder + tail)) if taken else ""
        else:
            folder = args.out if len(args.ratio) == 1 else os.path.join(args.out, f"{ratio:g}")
        places[ratio] = stack.enter_context(reserved(folder))
    return places


class Run:
    """What a run reads, its table, its times, and what it writes, to folders reserved until the ExitStack
    `stack` closes. steps: of learning by default, times the ratio."""

    def __init__(self, method, args, steps, stack):
        args.steps = round(steps * args.ratio[-1]) if args.steps is None else args.steps
        self.method, self.args, self.places = method, args, out_folders(args, method, stack)
        self.model, self.tokenizer, self.calibration, self.evaluation = read_inputs(args)
        self.layers, self.seconds, self.rows = block_layers(self.model), {}, {}
        self.dense_bytes = sum(p.nbytes for p in self.model.parameters())
        self.untouched = untouched(self.model, self.layers)

    @contextlib.contextmanager
    def clock(self, phase):
        """Add the time of a with block to seconds[phase]."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] = round(self.seconds.get(phase, 0) + time.perf_counter() - start, 2)

    def score(self, key, label, ratio=None, new={}, pruned=False):
        """Score the model with the layers new {layer: another}, and print that row of the table at once."""
        from eval_ppl import listed, say, score
        args = self.args
        progress = functools.partial(bar, progress=True, desc="perplexity", unit="batch")
        with self.clock("eval"), swapped(self.model, new):
            (ppl, nll, _), self.eval = score(self.model, self.evaluation, args, progress)
            kept, size = block_parameters(self.layers.values(), new, pruned)
        if not self.rows:
            self.dense_nll = nll
            say(f"settings: {listed(vars(args))}")
            say(f"perplexity: {listed(self.eval)}, device {self.model.device}")
            say(f"{'':40} {'perplexity':>12} {'gap':>9} {'parameters':>14} {'MB':>10}")
        gap = nll - self.dense_nll
        self.rows[key, ratio] = {"label": label, "ppl": ppl, "nll": nll, "kept": kept, "gap": gap}
        label = label if ratio is None or len(args.ratio) == 1 else f"{ratio:g}: {label}"
        say(f"{label:40} {ppl:12.2f} {gap:9.4f} {kept:14,} {size / 1e6:10.1f}")

    def write_each(self, models, name):
        """At each ratio, score and write what `models` yields: (steps, {dense layer: layer to store})."""
        for ratio in self.args.ratio:
            with self.clock("choose and learn"):
                steps, new = next(models)
            self.score("compressed", f"{name}, {steps} steps", ratio, new)
            if ratio in self.places:                                  # in the first process
                self.write(self.places[ratio], ratio, steps, new)
            del new

    def write(self, place, ratio, steps, new):
        """Save the compressed model, tokenizer, metrics.json and card; print where, and what it keeps."""
        from eval_ppl import say
        install(self.model, self.method, self.layers, new)
        layers = [{"name": name, "shape": matrix(layer).shape, **self.model.config.compressed["layers"][name],
                   "kept": block_parameters([layer], new)[0]} for name, layer in self.layers.items()]
        rows = {key: row for (key, at), row in self.rows.items() if at in (None, ratio)}
        total = sum(layer.weight.numel() for layer in self.layers.values())
        with published(place) as folder:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            metrics = vars(self.args) | dict(
                method=self.method, ratio=ratio, ratios=self.args.ratio, steps_so_far=steps,
                command=shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
                compressible_params=total, kept_params=rows["compressed"]["kept"],
                dense_bytes=self.dense_bytes,
                file_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
                seconds=self.seconds, peak_memory_bytes=peak_memory(self.model.device),
                ppl={key: row["ppl"] for key, row in rows.items()},
                gap={key: row["gap"] for key, row in rows.items()},
                eval=self.eval, dtype=self.eval["dtype"], device=str(self.model.device),
                processes=process()[1], versions={"torch": torch.__version__}, layers=layers,
                untouched=[dict(zip(("name", "shape", "reason"), weight)) for weight in self.untouched])
            (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
            (folder / "README.md").write_text(model_card(metrics, rows))
        swap(self.model, {new[layer]: layer for layer in new})        # the dense layers, for the next ratio
        say("kept share of each matrix, block by block, in tenths (D: all of it)\n" + allocation(layers))
        if ratio == self.args.ratio[-1]:
            say("not touched: " + "; ".join(f"{name} {' x '.join(map(str, shape))} ({reason})"
                                            for name, shape, reason in self.untouched))
        say(f"kept {metrics['kept_params'] / total:.4f} of {total:,} block parameters; file "
            f"{metrics['file_bytes'] / 1e6:.1f} MB, dense {self.dense_bytes / 1e6:.1f} MB; peak memory "
            f"{metrics['peak_memory_bytes'] / 1e9:.2f} GB; seconds {self.seconds}")
        args, dtype = self.args, {} if self.args.dtype == "auto" else {"dtype": self.args.dtype}
        flags = {"model": place[1], "eval": args.eval, "seqlen": args.eval_seqlen, "stride": args.eval_stride,
                 "bos": args.bos, "blocks": args.eval_blocks} | dtype
        words = [f"--{flag} {shlex.quote(str(value))}" for flag, value in flags.items() if value is not None]
        say(f"written to {place[1]}; score it again with: python eval_ppl.py {' '.join(words)}")


def allocation(layers):
    """Lines of text: the kept share of each matrix, block by block, in tenths; D is all of it."""
    rows = {}
    for layer in layers:
        share = layer["kept"] / math.prod(layer["shape"])
        kind = ".".join("*" if part.isdigit() else part for part in layer["name"].split("."))
        rows[kind] = rows.get(kind, "") + ("D" if share >= 1 else str(int(10 * share)))
    return "\n".join(f"  {kind:34} {row}" for kind, row in rows.items())


def block_parameters(layers, new, pruned=False):
    """(parameters, bytes on disk) of what stands for dense `layers`: new[layer], or the layer itself. A bias
    that was there before does not count; the zeros of a sparse matrix (of a dense one if `pruned`) do not,
    but every entry has one bit of a mask."""
    parameters = size = 0
    for layer in layers:
        stored, bias = new.get(layer, layer), 0 if layer.bias is None else len(layer.bias)
        count, mask = sum(p.numel() for p in stored.parameters()) - bias, 0
        sparse = stored.weight if pruned else getattr(stored, "S", None)
        if sparse is not None:
            count, mask = count - (sparse == 0).sum().item(), -(-layer.weight.numel() // 8)
        parameters, size = parameters + count, size + count * stored.weight.element_size() + mask
    return parameters, size


def peak_memory(device):
    """Bytes: most allocated on CUDA devices so far, else the most this process has had in main memory."""
    if device.type == "cuda":
        return sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def model_card(metrics, rows):
    """The README.md of a compressed folder."""
    from eval_ppl import listed
    script = {"soco": "soco", "cap": "rpca"}[metrics["method"]]
    table = "\n".join(f"| {row['label']} | {row['ppl']:.2f} | {row['gap']:.4f} | {row['kept']:,} |"
                      for row in rows.values())
    return f"""---
library_name: transformers
tags: [{metrics['method']}, compressed]
---
# {model_name(metrics['model'])}, compressed by {metrics['method']} at ratio {metrics['ratio']}

{100 * metrics['ratio']:g}% of the parameters in the block weights are removed.

| | perplexity | gap (nats a token) | parameters in the block weights |
| --- | --- | --- | --- |
{table}

Perplexity: {listed(metrics['eval'])}.
File: {metrics['file_bytes']:,} bytes, dense {metrics['dense_bytes']:,}.

Made by `{metrics['command']}`; every setting is in metrics.json.
To load it with transformers and torch alone, which runs compressed.py of this folder:

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("THIS FOLDER", trust_remote_code=True)
```

With {script}.py at hand, `import {script}` first and leave the flag out: no code of the folder is run.
"""


def main():
    from eval_ppl import Parser, whole
    parser = Parser(__doc__)
    add_run_flags(parser)
    add = parser.add_argument
    add("--basis", choices=BASES, default="two-sided", help="of the decomposition; plain is the paper's")
    add("--rank-multiple", type=whole(1, 4096), default=8, help="ranks are multiples of this; 1 allows any")
    add("--learn", nargs="+", choices=LEARNED, default=LEARNED, help="what is learned: scores S, gains a of"
        " outputs and c of inputs, deviations d (the paper: S and d)")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        run = Run("soco", args, STEPS, stack)
        model, layers, baselines = run.model, run.layers, {}
        batches = sample_batches(run.calibration, args, max(args.steps, args.metric_batches))
        check(layers, args.ratio[-1], args.steps, args.basis, STAGES, args.rank_multiple, args.learn)
        run.score("dense", "dense")

        def truncate(layer, metric, factors):                         # while the metric is there
            for basis, key in () if args.no_baselines else zip(BASES, ("svd", "svd_whitened", "svd_kfac")):
                some = factors if basis == args.basis else decompose(layer, metric, basis)
                for ratio in args.ratio:
                    row = key, f"{BASES[basis]}, same share", ratio
                    baselines.setdefault(row, {})[layer] = truncated(layer, *some, ratio)

        with run.clock("metric and decompositions"):
            scored = scored_layers(model, layers, batches[:args.metric_batches], args.basis, True, truncate)
            spectrum = Spectrum(list(scored.values()), args.rank_multiple)
        for row in list(baselines):
            run.score(*row, baselines.pop(row))
        for ratio in () if args.no_baselines else args.ratio:
            spectrum.keep_best(budget_for(scored, ratio))
            run.score("svd_global", f"{args.basis} SVD, global choice", ratio, finished(scored))
        models = learn_down(model, scored, spectrum, batches, args.ratio, args.steps, args.lr, args.learn,
                            progress=True)
        run.write_each(models, "SoCo")


if __name__ == "__main__":
    from eval_ppl import run
    from soco import CannotCompress, main            # as a module: the classes that a loaded folder knows
    run(main, CannotCompress)
