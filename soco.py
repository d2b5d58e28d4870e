"""SoCo: learn which singular components of every weight matrix to keep (arXiv 2502.15092).

    python soco.py                             # a bundled 1.9M-parameter GPT-2, on a laptop
    python soco.py --model gpt2 --ratio 0.5    # GPT-2 on WikiText-2; a GPU is used if present

The method, on one screen. Every block weight W [m, n] becomes diag(a) U diag(S * sigma) V diag(c)
and an offset d of the outputs, where W = U diag(sigma) V is the singular value decomposition in a
metric (`factor`). The *scores* S (in rpca.py S is a sparse matrix) and the *gains* a, c of outputs
and inputs start at 1, the *deviation* d at 0. Only these are trained, to keep KL(dense ||
compressed) small; the gains are not the paper's, and cost nothing: they fold into the factors.
What is kept is chosen again and again by what the *learned* scores say a component is worth,

    F_i S_i^2 / (m + n),    F_i = E[(dL/dS_i)^2],    L the loss, E the mean over tokens,

twice the predicted loss a parameter, in three stages of one run:  1 *descend*: the kept share falls
from 1 to the target;  2 *swing*: it swings around the target, and components dropped too early come
back;  3 *polarise*: the choice is final, and survivors' scores grow to make up for what is gone.
Then each layer is stored as two thin products, or dense where that costs less.
"""
import contextlib
import copy
import functools
import inspect
import itertools
import json
import logging
import math
import tempfile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm
from transformers import (CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig,
                          PreTrainedModel)
from transformers.pytorch_utils import Conv1D

STEPS = 800                # of learning, times the ratio: there is less to learn at a small one
LR = 0.01                  # of Adam, times the ratio, too: noise costs more there
DESCENT, CHOICE = .5, .6   # the parts of a run after which stages 1 and 2 are over
AROUND = 0.02              # how far the kept share swings over and under the target
POOL = 1.3                 # what a budget this much larger would not keep is dropped for good
GROUP = 8                  # ranks are multiples of it: at others kernels are slow
METRIC_BATCHES = 64        # to measure on
METRIC_BYTES = 16e9        # of G and R in memory at once
BASES = {"plain": (False, False), "whitened": (True, False), "two-sided": (True, True)}  # G, R?
LEARNED = "S", "a", "c", "d"  # the paper: S and d, in the plain basis
bar = functools.partial(tqdm, leave=False, disable=True)  # the commands show their progress


# ---- the mathematics ----

def factor(W, G=None, R=None, damping=1e-4, output_damping=0.03):
    """SVD in a metric: W = U diag(sigma) V, U [m, r], sigma [r], falling, V [r, n]; in float64.

    G [n, n] = E[x x^T] = B B^T of the layer's inputs, R [m, m] = E[g g^T] = C C^T of the loss's
    gradients at its outputs; None is the identity. Replacing W by W' adds |C^T (W - W') B|_F^2 to
    the loss, to second order and up to a factor (K-FAC, Martens & Grosse 2015, arXiv 1503.05671):
    this is the SVD of C^T W B, taken back to W. Each damping is a part of the mean diagonal.
    """
    A = W.double()
    if G is not None:
        B = cholesky(G, damping)
        A = A @ B
    if R is not None:
        C = cholesky(R, output_damping)
        A = C.T @ A
    if wide := A.shape[0] <= A.shape[1]:
        A = A.T
    Q = torch.linalg.eigh(A.T @ A)[1].flip(1)  # A's right singular vectors, falling
    AQ = A @ Q  # U diag(sigma): A = (A Q) Q^T exactly
    sigma = AQ.norm(dim=0)
    AQ = AQ / sigma.clamp_min(1e-300)
    U, V = (Q, AQ.T) if wide else (AQ, Q.T)
    if R is not None:
        U = torch.linalg.solve_triangular(C.T, U, upper=True)
    if G is not None:
        V = torch.linalg.solve_triangular(B, V, upper=False, left=False)
    return U, sigma, V


def cholesky(M, damping):
    """Lower triangular factor of M [k, k] + damping * its mean diagonal, in float64; or ten or a
    hundred times the damping, where M is indefinite by the rounding of its sums."""
    M = M.double()
    for more in (1, 10, 100):
        added = more * damping * M.diagonal().mean().clamp_min(1e-30)
        lower, failed = torch.linalg.cholesky_ex(M + added * torch.eye(len(M)).to(M))
        if not failed:
            return lower
    raise torch.linalg.LinAlgError("the matrix has negative eigenvalues, or a NaN")


def choose(worth, m, n, budget):
    """Which components of N matrices to keep within a budget of parameters: keep [N, r], boolean.

    worth [N, r]: the loss of dropping each component, -1 where there is none; m, n [N]: the shapes.
    Rank k costs k (m + n), or m n where that is less: the matrix is then dense, and keeps all.
    Components are bought in groups of GROUP, by falling worth a parameter; each matrix gets its
    first. Worth over cost is a concave curve, and dense one point beyond it: where the tangent from
    there touches it, all the rest is bought at once. Single groups use up what is left.
    """
    worth, order = worth.double().sort(dim=1, descending=True)
    count, sides = (worth >= 0).sum(1, keepdim=True), (m + n)[:, None]
    dense, group = torch.minimum(count * sides, (m * n)[:, None]), GROUP * sides  # their costs
    value = F.pad(worth.clamp_min(0), (0, -worth.shape[1] % GROUP)).unflatten(1, (-1, GROUP)).sum(2)
    index = torch.arange(value.shape[1], device=value.device)
    rest = dense - index * group  # what it costs to go dense from there
    slope = value.flip(1).cumsum(1).flip(1) / rest  # and is worth, per parameter
    slope = slope.masked_fill((rest <= 0) | (index == 0), math.inf).amin(1, keepdim=True)
    touch = (value / group > slope).sum(1, keepdim=True).clamp_min(1)
    cost = torch.where(index < touch, group.minimum(dense), rest.clamp_min(0) * (index == touch))

    def buy(price, cost, budget):
        turn = price.flatten().argsort(descending=True, stable=True)
        fits = cost.flatten()[turn].cumsum(0) <= budget
        return torch.zeros_like(fits).scatter(0, turn, fits).view_as(price)

    price = (value / group).maximum(slope).masked_fill(index == 0, math.inf)
    bought = buy(price, cost, budget)
    left = budget - (cost * bought).sum()
    price = (value / group).masked_fill(bought | (group > left), -1)
    bought |= buy(price, group.expand_as(value), left)
    k = GROUP * bought.sum(1, keepdim=True)
    k = torch.where(k * sides >= dense, count, k)
    keep = torch.arange(worth.shape[1], device=worth.device) < k
    return torch.zeros_like(keep).scatter(1, order, keep)


# ---- the layers ----

class ScoredLinear(nn.Module):
    """A layer while it learns: y = a * U (S * sigma) V (c * x) + d + b, without what is dropped.

    Learned: scores S [r], gains a [m] of its outputs and c [n] of its inputs, and d [m] in units of
    `unit`. sigma [r] is split between U [m, r] and V [r, n]. fisher [r]: E[(dL/dS)^2], until
    `set_fisher` measures it sigma^2. kept [r]: boolean. layer: the dense layer it stands for.
    """

    def __init__(self, layer, U, sigma, V, unit=1.0):
        super().__init__()
        W, half = layer.weight, sigma.sqrt()
        self.layer, self.unit, self.bias = layer, unit, 0 if layer.bias is None else layer.bias
        self.U, self.V = (U * half).to(W), (half[:, None] * V).to(W)
        self.fisher = sigma.square().float()
        self.kept = torch.ones_like(sigma).bool()
        self.S = nn.Parameter(torch.ones_like(self.fisher))
        self.a, self.c = (nn.Parameter(self.S.data.new_ones(size)) for size in matrix(layer).shape)
        self.d = nn.Parameter(torch.zeros_like(self.a))

    def forward(self, x):
        S = self.S - self.S.detach().masked_fill(self.kept, 0)  # 0 where dropped, yet with the
        z = F.linear(x * self.c.to(x), self.V) * S.to(x)  # gradient of S: it can come back
        return F.linear(z, self.U) * self.a.to(x) + (self.d * self.unit + self.bias).to(x)

    def shrink(self, moments):
        """Drop for good what is not kept; moments: the state of S in Adam."""
        index = self.kept.nonzero()[:, 0]
        self.U, self.V = self.U[:, index], self.V[index]
        self.fisher, self.S.data, self.S.grad = self.fisher[index], self.S.data[index], None
        moments |= {key: moments[key][index] for key in ("exp_avg", "exp_avg_sq") if key in moments}
        self.kept = torch.ones_like(index).bool()

    @torch.no_grad()
    def finish(self):
        """The layer to store: LowRankLinear of what is kept, or dense where that costs no more."""
        index = self.kept.nonzero()[:, 0]
        U = self.a[:, None] * self.U[:, index].float() * self.S[index]
        V = self.V[index].float() * self.c
        has_bias = self.layer.bias is not None or bool(self.d.any())
        bias = self.d * self.unit + self.bias if has_bias else None
        if U.numel() + V.numel() >= self.layer.weight.numel():
            sizes = {"in_features": V.shape[1], "out_features": len(U), "bias": has_bias}
            return filled(nn.Linear, sizes, {"weight": U @ V, "bias": bias}, self.layer)
        sizes = {"n": V.shape[1], "m": len(U), "rank": len(index), "bias": has_bias}
        state = {"down.weight": V, "up.weight": U, "up.bias": bias, "weight": torch.zeros(1)}
        return filled(LowRankLinear, sizes, state, self.layer)


class LowRankLinear(nn.Sequential):
    """y = up(down(x)): rank k in place of a dense [m, n] layer. `weight` marks where the dense one
    stood: who asks for weight.dtype is answered, and a folder read as a dense model fails."""

    def __init__(self, n, m, rank, bias):
        super().__init__()
        self.down = nn.Linear(n, rank, bias=False)
        self.up = nn.Linear(rank, m, bias=bias)
        self.register_buffer("weight", torch.zeros(1))


def filled(kind, sizes, state, layer):
    """A layer kind(**sizes) of the tensors in `state`, in the dtype and on the device of layer."""
    with torch.device("meta"):
        new = kind(**sizes)
    new.load_state_dict({name: value.to(layer.weight).contiguous() for name, value in state.items()
                         if value is not None}, assign=True)
    new.spec = [kind.__name__, sizes]  # what config.json says of it
    return new


def matrix(layer):
    """The weight of a layer as W [m, n] (outputs, inputs): y = W x + b."""
    W = layer.weight.detach()
    return W.T if isinstance(layer, Conv1D) else W  # of GPT-2: stored transposed


def block_layers(model):
    """{name: layer} of every nn.Linear and Conv1D inside the model's repeated blocks."""
    named = dict(model.named_modules())
    inside = tuple(f"{name}." for name, part in named.items() if isinstance(part, nn.ModuleList))
    layers = {name: part for name, part in named.items()
              if name.startswith(inside) and isinstance(part, (nn.Linear, Conv1D))}
    if not layers or getattr(model.config, "compressed", None):
        raise ValueError(f"{type(model).__name__} is compressed, or has no Linear in its blocks")
    return layers


@contextlib.contextmanager
def swapped(model, new):
    """Inside the with block the model has the layers new {name: layer}."""
    with contextlib.ExitStack() as undo:
        for name, layer in new.items():
            undo.callback(model.set_submodule, name, model.get_submodule(name))
            model.set_submodule(name, layer)
        yield


@contextlib.contextmanager
def frozen(model):
    """Inside the with block the model is in evaluation mode, and no parameter of it is trained."""
    with contextlib.ExitStack() as undo, torch.enable_grad():
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        for parameter in model.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
        model.eval().requires_grad_(False)
        yield


# ---- the metric: what a change of a weight costs the loss ----

def observe(model, layers, batches, see, desc, drawing=0):
    """Call see(name, x, g) with the inputs x [tokens, n] and output gradients g [tokens, m] of each
    of `layers` {name: layer}, once a batch of token ids [batch, length]; returns the tokens seen.

    The labels are drawn from the model's own prediction: E[g g^T] is then the Fisher matrix, the
    curvature of KL(model || changed model), not that of one text. Another `drawing`, other labels.
    """
    def watch(name, layer, inputs, output):
        x = inputs[0].detach().flatten(0, -2)
        output.register_hook(lambda g: see(name, x, g.detach().flatten(0, -2)))

    tokens, drawn = 0, torch.Generator().manual_seed(torch.initial_seed() + drawing)
    with contextlib.ExitStack() as hooks:  # parameters are frozen: the graph begins with embeddings
        hooks.enter_context(model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: output.requires_grad_().clone()))
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(functools.partial(watch, name)))
        for ids in bar(batches, desc=desc):
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits.flatten(0, 1)
            total = logits.detach().softmax(-1, dtype=torch.float32).cumsum(-1)
            u = torch.rand(len(total), 1, generator=drawn).to(total) * total[:, -1:]
            label = torch.searchsorted(total, u).clamp_max(total.shape[1] - 1)
            F.cross_entropy(logits.float(), label[:, 0], reduction="sum").backward()
            tokens += ids.numel()
    return tokens


def collect_metric(model, layers, batches, by_row=False):
    """[(name, layer, G, R)] of those of `layers` {name: layer} that tokens reach, in float32.

    G [n, n] = E[x x^T] of the layer's inputs x at a token; layers that read one tensor share it. R
    [m, m] = E[g g^T] of the loss's gradients g at its outputs; or, by_row, for entries of W, [m]:
    E[g_i^2 e_i] / E[e_i] with e_i = sum_j W_ij^2 x_j^2.
    """
    G, R, owner, latest = {}, {}, {}, [torch.empty(0), None]

    def see(name, x, g):
        # q, k and v, which read one tensor, come one after another; held, it keeps its address.
        if (latest[0].data_ptr(), latest[0].shape) != (x.data_ptr(), x.shape):
            latest[:] = x, name
            G[name] = torch.addmm(G.get(name, x.new_zeros(1).float()), x.T.float(), x.float())
        owner[name], x, g = latest[1], x.float(), g.float()
        if by_row:
            energy = F.linear(x.square(), matrix(layers[name]).float().square())
            R[name] = R.get(name, 0) + (g.square() * energy).sum(0)
        else:
            R[name] = torch.addmm(R.get(name, g.new_zeros(1)), g.T, g)

    tokens = observe(model, layers, batches, see, "metric")
    for moment in (*G.values(), *R.values()):
        moment /= tokens
    for name in R if by_row else ():
        energy = matrix(layers[name]).float().square() @ G[owner[name]].diagonal()
        R[name] /= energy.clamp_min(1e-30)
    if lost := ", ".join(layers.keys() - R.keys()):
        logging.getLogger(__name__).warning(f"no token reaches {lost}: they stay dense")
    return [(name, layers[name], G[owner[name]], R[name]) for name in layers if name in R]


def measured(model, layers, batches):
    """(name, layer, G, R) of layers, one by one: one pass over batches for each METRIC_BYTES."""
    sizes = itertools.accumulate(4 * sum(side ** 2 for side in layer.weight.shape)
                                 for layer in layers.values())
    for _, part in itertools.groupby(zip(layers, sizes), lambda pair: pair[1] // METRIC_BYTES):
        yield from collect_metric(model, {name: layers[name] for name, _ in part}, batches)


def set_fisher(model, scored, batches):
    """Measure F_i = E[(dL/dS_i)^2] = E[(g . u_i sigma_i)^2 (v_i . x)^2] of scored {name: student}.
    It is sigma_i^2 only where a token's input x and gradient g are independent; attention sinks,
    huge inputs with hardly any gradient, are not."""
    sums = dict.fromkeys(scored, 0)

    def see(name, x, g):
        student = scored[name]
        sums[name] += (F.linear(x, student.V).float() * (g @ student.U).float()).square().sum(0)

    layers = {name: student.layer for name, student in scored.items()}
    tokens = observe(model, layers, batches, see, "Fisher information", drawing=1)
    for name, student in scored.items():
        student.fisher = sums[name] / tokens
        if not student.fisher.isfinite().all():
            raise FloatingPointError(f"layer {name} has inputs or gradients that are not finite")


# ---- compressing a model ----

def compress(model, batches, ratio=0.5, steps=None, *, basis="two-sided", learned=LEARNED, lr=LR,
             metric_batches=METRIC_BATCHES):
    """Compress a causal language model in place: `ratio` of its block weights' parameters go.

    batches: token ids [batch, length], the first `metric_batches` to measure on, all to learn from.
    steps: of learning, by default STEPS * ratio. basis: of BASES. learned: which of S, a, c and d.
    lr: Adam's rate, times the ratio. Raises ValueError where the budget pays for no rank at all.
    """
    batches, steps = list(batches), round(STEPS * ratio) if steps is None else steps
    with frozen(model):
        metric = measured(model, block_layers(model), batches[:metric_batches])
        scored = scored_layers(metric, basis)
        set_fisher(model, scored, batches[:metric_batches])
        learn(model, scored, batches, ratio, steps, learned, lr)
    return install(model, "soco", finished(scored))


def scored_layers(metric, basis="two-sided"):
    """{name: ScoredLinear}, all of score 1, of `measured` layers; "plain" is the paper's SVD."""
    scored, (by_G, by_R) = {}, BASES[basis]
    for name, layer, G, R in bar(metric, desc="decompose"):
        W = matrix(layer).float()
        output_rms = ((W @ G) * W).sum(1).mean().clamp_min(0).sqrt().item()
        U, sigma, V = factor(W, G if by_G else None, R if by_R else None)
        scored[name] = ScoredLinear(layer, U, sigma, V, output_rms)
    return scored


def finished(scored):
    return {name: student.finish() for name, student in scored.items()}


def budget_for(students, ratio):
    """Parameters that students may take, where `ratio` of the dense layers' are to go."""
    return math.floor((1 - ratio) * sum(s.layer.weight.numel() for s in students) + 1e-6)


def keep_best(students, budget):
    """Set the masks of the students to what is worth most within a budget of parameters, by the
    predicted loss of dropping a component, fisher S^2, as if gains were 1."""
    device = students[0].S.device
    m, n = torch.tensor([[len(s.a), len(s.c)] for s in students], device=device).T
    S = nn.utils.rnn.pad_sequence([s.S.detach().to(device) for s in students], True, 1.0)
    fisher = nn.utils.rnn.pad_sequence([s.fisher.to(device) for s in students], True, -1.0)
    keep = choose(fisher * S * S, m, n, budget)
    for student, kept in zip(students, keep):
        student.kept = kept[:len(student.S)].to(student.S.device)


def learn(model, scored, batches, ratio, steps, learned=LEARNED, lr=LR):
    """Train what is `learned` of `scored` {name: ScoredLinear} in the three stages, and keep what
    `ratio` leaves. Returns the learning curve: stage, kept share and KL of every step, and the rank
    of every matrix at the end of stages 1 and 2."""
    students = list(scored.values())
    total, budget = budget_for(students, 0), budget_for(students, ratio)
    if steps and "d" in learned:  # new biases are parameters, too
        budget -= sum(len(s.d) for s in students if s.layer.bias is None)
    if budget < sum(GROUP * (len(s.a) + len(s.c)) for s in students):
        raise ValueError(f"ratio {ratio} leaves less than rank {GROUP} of every matrix")
    swing_at, polarise_at = (math.ceil(part * steps) for part in (DESCENT, CHOICE))
    curve = {"stage": [], "kept": [], "ranks": {}}

    def set_masks(step, optimizer):
        if step < swing_at:
            stage, target = "descend", budget + (total - budget) * (1 - (step + 1) / swing_at) ** 3
        elif step < polarise_at:
            stage, target = "swing", budget * (1 + AROUND * (-1) ** step)
        else:
            stage, target = "polarise", budget
        if step in (swing_at, polarise_at):
            curve["ranks"][curve["stage"][-1]] = [int(student.kept.sum()) for student in students]
        if step == polarise_at or step < polarise_at and step % max(steps // 10, 1) == 0:
            keep_best(students, target if stage == "polarise" else POOL * target)
            for student in students:
                student.shrink(optimizer.state[student.S])
        if stage != "polarise":
            keep_best(students, target)
        curve["stage"].append(stage)
        curve["kept"].append(target / total)
        return stage

    groups = [{"params": [getattr(student, name) for student in students],
               "lr": lr * ratio / (2 if name == "d" else 1)} for name in learned]
    curve["KL"] = train(model, scored, groups, batches, steps, 1 - CHOICE, set_masks)
    keep_best(students, budget)
    return curve


def train(model, students, groups, batches, steps, falling, before_step):
    """Train `students` {name: what stands for a layer} to keep KL(dense || compressed) small on
    `batches` of token ids [batch, length]; the model has its own layers again afterwards.

    groups: of parameters, for Adam; rates rise over five steps and fall to 0 in the last part
    `falling`. before_step(step, optimizer) names what goes on. Returns KL at every step.
    """
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(
        (done + 1) / 5, 1.0, (1 - done / max(steps, 1)) / falling))
    dense, KL = {name: student.layer for name, student in students.items()}, []
    with swapped(model, students):
        for step in (progress := bar(range(steps))):
            progress.set_description(before_step(step, optimizer))
            loss = distil(model, dense, batches[step % len(batches)].to(model.device))
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step + 1}: lower the rate")
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            KL.append(loss)
            progress.set_postfix(KL=loss)
    return KL


def distil(model, dense, ids):
    """KL(dense || compressed) on token ids [batch, length], in nats a token; sets .grad. The model
    is its own teacher, with the layers dense {name: layer} back in place."""
    with torch.no_grad(), swapped(model, dense):
        log_p = model(input_ids=ids, use_cache=False).logits.log_softmax(-1, dtype=torch.float32)
    logits = model(input_ids=ids, use_cache=False).logits
    log_q = logits.detach().log_softmax(-1, dtype=torch.float32)
    p = log_p.exp()
    loss = torch.dot(p.flatten(), (log_p - log_q).flatten()) / ids.numel()
    logits.backward((log_q.exp() - p).to(logits.dtype))  # KL's gradient, times the tokens
    return loss.item()


# ---- the saved folder, and compressed.py in it ----

KINDS = {"LowRankLinear": LowRankLinear}  # rpca.py adds its own


def install(model, method, new):
    """Put the layers new {name: layer} in the model; model.config says what each became."""
    for name, layer in new.items():
        old = model.get_submodule(name)
        layer.train(old.training).requires_grad_(old.weight.requires_grad)
        model.set_submodule(name, layer)
    model.config = copy.deepcopy(model.config)  # another model may share it
    model.config.compressed = {"method": method, "layers": {name: new[name].spec for name in new}}
    return model


@functools.cache
def compressed_class(dense):
    """The class of a transformers model whose layers are what config.compressed says."""
    class Compressed(dense):
        def __init__(self, config):
            super().__init__(config)
            for name, (kind, sizes) in config.compressed["layers"].items():
                self.set_submodule(name, KINDS.get(kind, nn.Linear)(**sizes))

    Compressed.__name__, Compressed.__module__ = dense.__name__, dense.__module__
    return Compressed


class CompressedConfig(PreTrainedConfig):
    """config.json of a compressed folder: the dense model's, and what its layers became."""
    model_type = "compressed_low_rank"


class CompressedForCausalLM(PreTrainedModel):
    """What AutoModelForCausalLM calls for a compressed folder: loads all of it, or raises."""
    config_class = CompressedConfig

    @classmethod
    def from_pretrained(cls, folder, config=None, output_loading_info=False, **options):
        stored, _ = PreTrainedConfig.get_config_dict(folder)
        if config is not None:  # of AutoModel, with what the caller changed
            options.setdefault("attn_implementation", config._attn_implementation_internal)
            stored |= config.to_dict()
        stored["model_type"] = stored["compressed"]["dense"]
        dtype = options.pop("dtype", "auto")
        config, options = CONFIG_MAPPING[stored["model_type"]].from_dict(
            stored, return_unused_kwargs=True, **options)
        kind = compressed_class(AutoModelForCausalLM._model_mapping[type(config)])
        options |= {"config": config, "dtype": dtype, "use_safetensors": True}
        model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
        if wrong := [*info["missing_keys"], *info["unexpected_keys"]]:
            raise ValueError(f"{folder}: tensor {wrong[0]} is not as config.json says")
        for module in model.modules():
            if hasattr(module, "unpack"):
                module.unpack()
        return (model, info) if output_loading_info else model


load = CompressedForCausalLM.from_pretrained  # load(folder, dtype=..., device_map=...)
AutoConfig.register(CompressedConfig.model_type, CompressedConfig, exist_ok=True)
AutoModelForCausalLM.register(CompressedConfig, CompressedForCausalLM, exist_ok=True)
SOURCES = {part.__name__: inspect.getsource(part) for part in (  # of compressed.py
    LowRankLinear, compressed_class, CompressedConfig, CompressedForCausalLM)}
LOADER = '''"""Loads this folder by AutoModelForCausalLM.from_pretrained, trust_remote_code=True."""
import functools
import torch
import torch.nn as nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
'''


def save(model, folder, add_files=lambda folder: None):
    """Write a compressed model, and what add_files(folder) adds, to a folder, or, where that is
    taken, under the next free name; returns its path. All is built beside it, then renamed."""
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as scratch:
        write_model(model, built := Path(scratch, "model"))
        add_files(built)
        for name in itertools.chain([folder], (Path(f"{folder}-{i}") for i in itertools.count(2))):
            if not any(name.glob("*")):
                return built.rename(name)


def write_model(model, folder):
    """A folder of transformers; config.json names compressed.py, which puts the layers in place."""
    state, specs = model.state_dict(), model.config.compressed["layers"]
    for name, module in model.named_modules():
        if hasattr(module, "pack"):  # S of rpca.py: its nonzero values and their places
            packed = module.pack(state.pop(f"{name}.S"))
            specs[name][1]["nonzeros"] = len(packed["values"])
            state |= {f"{name}.{key}": tensor for key, tensor in packed.items()}
    model.save_pretrained(folder, state_dict=state)
    config = json.loads((folder / "config.json").read_text())
    config["compressed"]["dense"] = config["model_type"]
    config |= {"model_type": CompressedConfig.model_type, "auto_map": {
        "AutoConfig": "compressed.CompressedConfig",
        "AutoModelForCausalLM": "compressed.CompressedForCausalLM"}}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    kinds = f"KINDS = dict({', '.join(f'{name}={name}' for name in KINDS)})\n"
    (folder / "compressed.py").write_text("\n\n".join([LOADER, *SOURCES.values(), kinds]))


# ---- the command ----

def stored(layer, new):
    """Parameters of `new`, in place of a dense layer, less its bias and the zeros of a sparse S."""
    zeros = int((new.S == 0).sum()) if hasattr(new, "S") else 0
    bias = 0 if layer.bias is None else len(layer.bias)
    return sum(p.numel() for p in new.parameters()) - zeros - bias


def add_row(run, key, label, new={}):
    """Score the run's model with the layers new {name: layer}: a row of its table."""
    kept = sum(stored(layer, new.get(name, layer)) for name, layer in run.layers.items())
    with swapped(run.model, new):
        run.row(key, label, kept)


def write(run, new, **more):
    """Save the run's model with the layers new {name: layer}, its tokenizer, metrics and card."""
    layers = [{"name": name, "shape": list(matrix(run.layers[name]).shape), "kind": layer.spec[0],
               "rank": layer.spec[1].get("rank"), "kept": stored(run.layers[name], layer)}
              for name, layer in new.items()]
    install(run.model, run.method, new)
    add_files = functools.partial(run.add_files, layers=layers, **more)
    folder = save(run.model, run.args.out, add_files)
    print(f"written to {folder}; score it again by\n"
          f"python eval_ppl.py --model {folder} --eval {run.args.eval}")


def main():
    from eval_ppl import CompressionRun, run_parser
    bar.keywords["disable"] = None
    parser = run_parser(__doc__, STEPS, LR, METRIC_BATCHES)
    parser.add_argument("--basis", choices=BASES, default="two-sided", help="the paper's: plain")
    parser.add_argument("--learn", nargs="+", choices=LEARNED, default=LEARNED, help="paper: S d")
    run = CompressionRun(parser, "soco", block_layers)
    model, args, batches = run.model, run.args, run.batches
    add_row(run, "dense", "dense")
    with frozen(model):
        metric = measured(model, run.layers, batches[:args.metric_batches])
        if not args.no_baselines:
            metric = list(metric)  # to read it four times
            for basis, key in zip(BASES, ("svd", "svd_whitened", "svd_kfac")):
                scored = scored_layers(metric, basis)
                for layer in scored.values():
                    m, n = len(layer.a), len(layer.c)
                    k = int((1 - args.ratio) * m * n / (m + n) + 1e-6)
                    layer.kept = torch.arange(min(m, n), device=layer.S.device) < max(k, 1)
                add_row(run, key, f"{basis} SVD, same share", finished(scored))
        scored = scored_layers(metric, args.basis)
        set_fisher(model, scored, batches[:args.metric_batches])
        if not args.no_baselines:
            keep_best(list(scored.values()), budget_for(scored.values(), args.ratio))
            add_row(run, "svd_global", "global choice, no learning", finished(scored))
        curve = learn(model, scored, batches, args.ratio, args.steps, args.learn, args.lr)
    new = finished(scored)
    add_row(run, "compressed", f"SoCo, {args.steps} steps", new)
    write(run, new, curve=curve)


if __name__ == "__main__":
    main()
