"""Tests of soco.py, rpca.py and eval_ppl.py: `pytest -q`, without a network, with or without a GPU.

Every expected value is computed here a second way, by a slower or plainer formula; none is from a run.
"""
import copy
import functools
import gc
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"                # read once, on import: no test may reach for the network
ROOT = Path(__file__).resolve().parent

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, pipeline
from transformers.pytorch_utils import Conv1D

import eval_ppl
import rpca
import soco
from bench.baselines import oats, sparsegpt
from eval_ppl import encode, perplexity
from soco import (BASES, LEARNED, CannotCompress, KLDivergence, LowRankLinear, ScoredLinear, Spectrum,
                  block_layers, choose, collect_metric, compress, factor, load, matrix, save, swapped)

VOCAB = 64
SHAPES = [(7, 5), (5, 11), (8, 8), (1, 6), (6, 1)]
KINDS = ["linear", "linear without bias", "conv1d"]
METHODS = {"soco": soco, "cap": rpca}


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    return torch.device(request.param)


def random(*shape, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)


def tokens(*shape, seed=0, device="cpu"):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def make_layer(kind, m, n, device="cpu"):
    """A layer [m, n] of one of KINDS, in float64."""
    layer = Conv1D(m, n) if kind == "conv1d" else nn.Linear(n, m, bias=kind == "linear")
    for seed, p in enumerate(layer.parameters()):
        p.data = random(*p.shape, seed=seed + 1)
    return layer.to(device)


CONFIG = {      # of every architecture, which reads of it what it knows
    "vocab_size": VOCAB, "hidden_size": 24, "word_embed_proj_dim": 16, "intermediate_size": 40, "ffn_dim": 40,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2,
    "new_decoder_architecture": True, "sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": 64, "dff": 40, "initializer_range": 0.2, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}


def tiny(kind, **config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **CONFIG | config)).eval()


tiny_gpt2 = functools.partial(tiny, "gpt2", num_attention_heads=2)
tiny_llama = functools.partial(tiny, "llama")
MODELS, IDS = [tiny_gpt2, tiny_llama], tokens(2, 16)
make, method, basis, kind = (pytest.fixture(lambda request: request.param, params=params)
                             for params in (MODELS, METHODS, BASES, KINDS))


def tiny_tokenizer(first=0):
    words = Tokenizer(models.WordLevel({f"w{i}": first + i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w0", bos_token="w63")


def text(count, seed):
    return " ".join(f"w{i}" for i in tokens(count, seed=seed))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def divergence(dense_logits, model, batches):
    """Mean of KL(dense || model) over batches, by the plain formula."""
    values = []
    for dense, ids in zip(dense_logits, batches):
        ours, theirs = logits(model, ids).log_softmax(-1), dense.log_softmax(-1)
        values.append(F.kl_div(ours, theirs, log_target=True, reduction="sum") / ids.numel())
    return torch.stack(values).mean().item()


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


@pytest.fixture(scope="session")
def house(tmp_path_factory):
    """A folder with the model and the texts that command lines name: model, train, test."""
    folder = tmp_path_factory.mktemp("house")
    tiny_gpt2().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for seed, name in enumerate(["train", "test"]):
        (folder / name).write_text(text(1000, seed))
    return folder


def run_flags(house):
    """Flags of a run of soco.py or rpca.py that takes a second."""
    return (f"--model {house}/model --eval {house}/test --calib {house}/train --device cpu --seqlen 16 "
            f"--metric-batches 2 --eval-blocks 3").split()


@pytest.fixture
def command(house, capsys, monkeypatch, tmp_path):
    """command(script, flags, a text or words): (code, stdout, stderr), run in this process."""
    monkeypatch.chdir(tmp_path)

    def call(script, flags):
        words = flags if isinstance(flags, list) else flags.split()
        before = run_flags(house)[:4 if script == "eval_ppl.py" else None]
        before += ["--steps", "2"] if script == "soco.py" else []
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *before, *words])
        capsys.readouterr()
        try:
            eval_ppl.run(sys.modules[script.removesuffix(".py")].main, CannotCompress)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return call


# ---- the mathematics ----------------------------------------------------------------------------
def metric_of(basis, m, n, device="cpu"):
    """Random inputs x [60, n] and output gradients g [60, m], and the G and R that a basis takes of them."""
    x, g = random(60, n, seed=3, device=device), random(60, m, seed=4, device=device)
    return x, g, None if basis == "plain" else x.T @ x / 60, g.T @ g / 60 if basis == "two-sided" else None


@pytest.mark.parametrize("m, n", SHAPES)
def test_factors_are_the_singular_value_decomposition_in_the_metric(basis, m, n, device):
    W = random(m, n, device=device)
    x, g, G, R = metric_of(basis, m, n, device)
    U, sigma, V = factor(W, G, R, damping=1e-13, output_damping=1e-13)
    assert (U.shape, sigma.shape, V.shape) == ((m, min(m, n)), (min(m, n),), (min(m, n), n))
    assert_close((U * sigma) @ V, W, rtol=1e-8, atol=1e-8)
    seen = {"plain": W, "whitened": W @ x.T / 60 ** 0.5, "two-sided": g @ W @ x.T / 60}[basis]
    assert_close(sigma, torch.linalg.svdvals(seen)[:len(sigma)], rtol=1e-7, atol=1e-8)
    for k in range(len(sigma)):                     # what truncation costs, by the definition of each metric
        change = W - (U[:, :k] * sigma[:k]) @ V[:k]
        cost = {"plain": change.square().sum(), "whitened": (x @ change.T).square().sum(1).mean(),
                "two-sided": (g @ change @ x.T).square().mean()}[basis]       # of every g with every x
        assert_close(cost, sigma[k:].square().sum(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("W, G, R", [
    (torch.zeros(4, 6), None, None),
    (torch.ones(4, 6), torch.ones(6, 6), None),
    (random(4, 6), torch.zeros(6, 6), torch.zeros(4, 4)),
    (random(4, 6), torch.tensor([1e6, 1, 1e-6, 0, 0, 0]).diag(), torch.tensor([1, 0, 0, 1e-9]).diag()),
    (random(4, 6), torch.tensor([1, 1, 1, 1, 1, -5e-3]).diag(), None),
], ids=["zero weight", "rank one", "all zero", "mostly zero", "rounded below zero"])
def test_a_degenerate_metric_still_gives_the_weight_back(W, G, R):
    U, sigma, V = factor(W, G, R)
    assert_close((U * sigma) @ V, W.double(), rtol=1e-6, atol=1e-6)
    U, V = (U * sigma.sqrt()).half(), (sigma.sqrt()[:, None] * V).half()
    assert_close(U.double() @ V.double(), W.double(), rtol=1e-2, atol=1e-2)
    with pytest.raises(torch.linalg.LinAlgError, match="negative"):
        factor(W, -torch.eye(6))


CHOICES = {1: [(4, 30), (5, 5), (9, 6)], 3: [(10, 30), (13, 13), (2, 9)], 8: [(20, 40), (24, 25), (17, 70)]}
WORTHS = {"steep": lambda x: (2 * x).exp(), "flat": torch.ones_like, "half zero": lambda x: x.clamp_min(0)}


def cost_and_value(ranks, shapes, worth):
    """What a choice costs, and the worth of what it keeps: all of a matrix that is stored dense."""
    factors = [torch.empty(m, k).numel() + torch.empty(k, n).numel() for k, (m, n) in zip(ranks, shapes)]
    cost = [min(parameters, m * n) for parameters, (m, n) in zip(factors, shapes)]
    kept = [len(w) if c == m * n else k for c, k, w, (m, n) in zip(cost, ranks, worth, shapes)]
    return sum(cost), sum(w.sort(descending=True)[0][:k].sum().item() for k, w in zip(kept, worth))


@pytest.mark.parametrize("group", CHOICES)
@pytest.mark.parametrize("worths", WORTHS)
def test_choose_is_as_good_as_any_choice_and_spends_the_budget(worths, group, device):
    shapes, sides = CHOICES[group], torch.tensor(CHOICES[group], device=device).T
    worth = [WORTHS[worths](random(min(shape), seed=i, device=device)) for i, shape in enumerate(shapes)]
    padded = nn.utils.rnn.pad_sequence(worth, batch_first=True, padding_value=-1)
    allowed = [[*range(group, min(shape), group), min(shape)] for shape in shapes]      # at least one group
    points = [cost_and_value(ranks, shapes, worth) for ranks in itertools.product(*allowed)]
    prices = np.geomspace(1e-6, 10, 500)            # of a parameter: what is best at one is best at its cost
    best = dict(max(points, key=lambda point: point[1] - price * point[0]) for price in prices)
    for budget in [*range(min(points)[0], max(points)[0] + 20, group), *best]:
        keep = choose(padded, *sides, budget + 0.5, group)
        ranks = keep.sum(1).tolist()
        for k, kept, w, (m, n), some in zip(ranks, keep, padded, shapes, allowed):
            assert k in some and (k * (m + n) < m * n or k == min(m, n))
            assert not kept[w < 0].any() and (k == min(m, n) or w[kept].min() >= w[~kept].max())
        cost, value = cost_and_value(ranks, shapes, worth)
        assert value >= max(best[corner] for corner in best if corner <= budget) - 1e-9
        assert_within(cost, budget, shapes, ranks, group)
    padded[1, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        choose(padded, *sides, budget, group)


def assert_within(stored, budget, shapes, ranks, group):
    """The budget is met: never over, and under it by less than one group of one matrix."""
    steps = [group * (m + n) for (m, n), k in zip(shapes, ranks) if k < min(m, n)]
    assert 0 <= budget - stored < max(steps, default=math.inf)


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-6), ("float32", 1e-6), ("bfloat16", 2e-2)])
def test_kl_divergence_and_its_gradient_match_the_plain_formula(dtype, tolerance, device):
    teacher, ours = (random(2, 5, 11, seed=seed, device=device).to(getattr(torch, dtype)) for seed in (0, 1))
    plain = ours.double().requires_grad_()
    loss = KLDivergence.apply(teacher, ours.requires_grad_())
    logs = plain.log_softmax(-1), teacher.double().log_softmax(-1)
    expected = F.kl_div(*logs, log_target=True, reduction="sum") / 10
    assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    (3 * loss).backward()
    (3 * expected).backward()
    assert_near(ours.grad.double(), plain.grad, tolerance)


def assert_near(ours, theirs, tolerance):
    assert ours.shape == theirs.shape and (ours - theirs).norm() <= tolerance * theirs.norm()


# ---- the layers ---------------------------------------------------------------------------------
def scored(kind, m, n, basis="plain", device="cpu", dtype=torch.float64):
    """(layer, its ScoredLinear, inputs [4, n])."""
    layer = make_layer(kind, m, n, device).to(dtype)
    *_, G, R = metric_of(basis, m, n, device)
    student = ScoredLinear(layer, *factor(matrix(layer), G, R), offset_scale=3.0)
    return layer, student, random(4, n, seed=7, device=device).to(dtype)


@pytest.mark.parametrize("dtype, wide, tolerance", [
    ("float64", "float64", 1e-9), ("bfloat16", "float32", 2e-2), ("float16", "float32", 3e-3)])
def test_what_is_learned_gets_its_gradient_and_masked_scores_that_of_coming_back(
        basis, kind, dtype, wide, tolerance, device):
    layer, student, x = scored(kind, 5, 11, basis, device, getattr(torch, dtype))
    for inputs in (x, x[None], x[:0], x[None, :0]):                   # scores of one, full rank
        assert_near(student(inputs), layer(inputs), tolerance)
    student.kept[1:] = 0                            # rank 1 takes 16 of 55 parameters, rank 2 more than half
    half = soco.truncated(layer, *factor(matrix(layer), *metric_of(basis, 5, 11, device)[2:]), 0.5)
    assert_near(half(x), student(x), tolerance)
    for seed, name in enumerate(LEARNED):
        value = random(len(getattr(student, name)), seed=9 + seed, device=device)
        getattr(student, name).data = value.to(getattr(torch, wide))
    student.kept.copy_(torch.tensor([0, 1, 0, 1, 0]))
    own = [x.requires_grad_(), *map(student.get_parameter, LEARNED)]
    plain = [value.detach().double().clone() for value in own]
    plain[1] *= student.kept                        # scores of zero, as it were
    z, S, a, c, d = (value.requires_grad_() for value in plain)
    U, V, bias = student.U.double(), student.V.double(), 0 if layer.bias is None else layer.bias.double()
    expected = ((z * c) @ V.T * S) @ U.T * a + 3 * d + bias
    assert_near((y := student(x)).double(), expected, tolerance)
    for answer in (y, expected):
        (answer * random(4, 5, seed=8, device=device)).sum().backward()
    for ours, theirs in zip(own, plain):
        assert_near(ours.grad.double(), theirs.grad, tolerance)


@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("kept", [1, 3, 99])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_what_is_stored_answers_like_what_learned(kind, kept, m, n, dtype, tolerance, device):
    layer, student, x = scored(kind, m, n, "two-sided", device)
    for name in LEARNED:
        getattr(student, name).data = random(len(getattr(student, name)), seed=9, device=device).to(dtype)
    student.kept[:-kept] = 0
    layer.weight.requires_grad_(False)
    expected, new, k = student(x), student.finish(), min(kept, m, n)
    assert_close(new(x), expected, rtol=tolerance, atol=tolerance)
    assert type(new) is (LowRankLinear if k * (m + n) < m * n else type(layer))
    assert sum(p.numel() for p in new.parameters()) == min(k * (m + n), m * n) + m
    assert new.weight.dtype == layer.weight.dtype and not any(p.requires_grad for p in new.parameters())


def test_gains_fold_into_the_factors_bit_for_bit():
    U, sigma, V = factor(matrix(layer := make_layer("linear without bias", 7, 5)))
    student, x = ScoredLinear(layer, U[:, :2], sigma[:2], V[:2]), random(4, 5, seed=7)
    for seed, name in enumerate("Sac"):             # powers of two: their products are exact
        getattr(student, name).data = 2.0 ** random(len(student.get_parameter(name)), seed=seed).round()
    assert type(new := student.finish()) is LowRankLinear and torch.equal(new(x), student(x))


def test_a_scored_layer_is_moved_and_restored_like_any_module():
    _, student, x = scored("linear", 7, 5)
    student.S.data, student.d.data, student.price, student.kept[3] = random(5), random(7), random(5), 0
    student.a.data, student.c.data = random(7), random(5)
    state, again = student.state_dict(), scored("linear", 7, 5, "two-sided")[1].double()
    assert state.keys() == {*LEARNED, "U", "V", "price", "kept", "layer.weight", "layer.bias"}
    again.load_state_dict(state)
    assert_close((again(x), again.price), (student(x), student.price), rtol=1e-12, atol=1e-12)
    assert_close(again.to(torch.float32)(x.float()), student(x).float(), rtol=1e-5, atol=1e-5)
    moved = again.to("meta").state_dict().values()
    assert {(value.dtype, value.device.type) for value in moved} == {(torch.float32, "meta")}


# ---- a model, its metric and its prices ------------------------------------------------------------
def test_a_model_is_left_as_it_was_also_after_an_error():
    model, ids = tiny_gpt2(resid_pdrop=0.5), tokens(65)               # one token more than it can read
    model.transformer.wpe.requires_grad_(False)
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0

    def told():
        modules = [(module, module.training, len(module._forward_hooks)) for module in model.modules()]
        return modules, [(p.requires_grad, p.grad) for p in model.parameters()]

    before = told()
    assert perplexity(model, ids, 16) == perplexity(tiny_gpt2(), ids, 16)       # without dropout
    for use, *args in ((perplexity, ids, 65), (collect_metric, block_layers(model), [IDS, ids[None]])):
        with pytest.raises(IndexError):
            use(model, *args)
        assert told() == before


def label(p, batch, length, generator=None):        # in place of soco.draw: labels that are not drawn
    return tokens(batch * length, seed=batch + length, device=p.device)


def test_the_metric_the_prices_and_the_worths_are_moments_of_what_autograd_finds(make, monkeypatch, device):
    model, batches = make().to(device), [tokens(3, 20, device=device), tokens(2, 9, device=device)]
    layers = block_layers(model)
    seen = {layer: [] for layer in layers.values()}
    monkeypatch.setattr(soco, "draw", label)
    metrics, students = collect_metric(model, layers, batches), soco.scored_layers(model, layers, batches)
    drafts = rpca.drafted(model, layers, batches)

    def with_scores_for_every_token(layer, inputs, output):           # which are 1, and take gradients
        x, student = inputs[0], students[layer]
        S = x.new_ones(*x.shape[:-1], len(student.V)).requires_grad_()
        output.retain_grad()
        seen[layer].append((x.detach(), output, S))
        return output + (x @ student.V.T * (S - 1)) @ student.U.T

    for layer in seen:
        layer.register_forward_hook(with_scores_for_every_token)
    for ids in batches:
        found = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        F.cross_entropy(found, label(found, *ids.shape), reduction="sum").backward()
    for draft, (name, layer) in zip(drafts, layers.items()):
        values = zip(*[(x, output.grad, S.grad) for x, output, S in seen[layer]])
        x, g, dS = (torch.cat([value.flatten(0, 1) for value in some]) for some in values)
        assert_near(metrics[name].G, x.T @ x / 78, 1e-3)
        assert_near(metrics[name].R, g.T @ g / 78, 1e-3)
        assert_near(students[layer].price, dS.square().mean(0), 1e-3)      # (dL/dS)^2, token by token
        fisher = (g ** 2 * (x ** 2 @ (matrix(layer) ** 2).T)).mean(0)      # (W dL/dW)^2, summed over a row
        assert_close(draft.worth().sum(1), fisher, rtol=1e-3, atol=1e-5 * fisher.max().item())
        shares = draft.worth() / (matrix(layer) ** 2 * draft.G.diagonal())
        assert_close(shares, shares[:, :1].expand_as(shares), rtol=1e-2, atol=0)


def test_labels_depend_on_the_seed_and_on_nothing_drawn_before():
    model, found = tiny_gpt2(), []
    for seed, before in ((3, 0), (3, 5), (4, 0)):
        torch.rand(before, generator=torch.manual_seed(seed))
        metrics = collect_metric(model, block_layers(model), [tokens(2, 16)])
        scored = soco.scored_layers(model, block_layers(model), [tokens(2, 16)])
        found.append([*(metric.R for metric in metrics.values()), *(one.price for one in scored.values())])
    assert all(map(torch.equal, *found[:2])) and not any(map(torch.equal, *found[1:]))


def test_a_price_is_the_second_difference_of_the_divergence():
    model, ids, step = tiny_gpt2().double(), torch.full((10_000, 1), 5), 1e-3      # of texts of one token
    torch.manual_seed(0)
    students, dense = soco.scored_layers(model, block_layers(model), [ids]), logits(model, ids[:1])
    with swapped(model, students):
        for student in list(students.values())[1::2]:
            measured = torch.zeros(6)
            for i in range(6):
                student.S.data[i] += step
                measured[i] = 2 * divergence([dense], model, [ids[:1]]) / step ** 2
                student.S.data[i] -= step
            assert_near(student.price[:6], measured, 0.1)


def test_a_metric_in_groups_of_blocks_is_the_same_and_one_group_is_held_at_a_time(monkeypatch):
    model, batches = tiny_llama(num_hidden_layers=5), [tokens(2, 16), tokens(1, 9)]
    layers, groups, seen, names = block_layers(model), [], [], []
    at_once = collect_metric(model, layers, batches)
    shapes = [layer.weight.shape for name, layer in layers.items() if ".0." in name]

    def collect(model, group, *rest, **how):
        assert not any(reference() is not None for reference in seen)    # the groups before are let go
        groups.append(sorted({name.split(".")[2] for name in group}))
        found = collect_metric(model, group, *rest, **how)
        seen.extend(weakref.ref(moment) for metric in found.values() for moment in metric)
        return found

    monkeypatch.setattr(soco, "collect_metric", collect)
    room = 10 * sum(m * m + n * n + m * n for m, n in shapes)    # bytes: 2.5 blocks in float32
    for name, layer, metric in soco.measured(model, layers, batches, room=room):
        names.append(name)
        assert_close(tuple(metric), tuple(at_once[name]))
        del metric
    assert names == list(layers) and groups == [["0", "1"], ["2", "3"], ["4"]]
    assert len(list(soco.measured(model, layers, batches))) == 35 and len(groups) == 4        # room for all


# ---- learning -----------------------------------------------------------------------------------
def spectrum_of(model, ids, group=1):
    """({layer: ScoredLinear}, their Spectrum, half of their parameters)."""
    students = soco.scored_layers(model, block_layers(model), [ids])
    spectrum = Spectrum(list(students.values()), group)
    return students, spectrum, int((spectrum.m * spectrum.n).sum()) // 2


def test_the_tensors_of_layers_are_rows_of_the_spectrum():
    students, spectrum, half = spectrum_of(model := tiny_llama(), IDS)
    for tensor in (spectrum.S.data, spectrum.a.data, spectrum.c.data, spectrum.d.data):
        tensor.copy_(random(*tensor.shape))
    spectrum.keep_best(half)
    worth = torch.where(spectrum.price < 0, -1, spectrum.price * spectrum.S.detach() ** 2)
    assert torch.equal(spectrum.kept.bool(), choose(worth, spectrum.m, spectrum.n, half, 1))
    with swapped(model, students):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for row, student in enumerate(students.values()):
        (m, r), n = student.U.shape, student.V.shape[1]
        assert (spectrum.m[row], spectrum.n[row], r) == (m, n, min(m, n))
        assert (spectrum.price[row] >= 0).sum() == r and student.S.grad.all() and student.d.grad.all()
        for name, size in {"price": r, "kept": r, "S": r, "a": m, "c": n, "d": m}.items():
            own, whole = getattr(student, name), getattr(spectrum, name)
            for one, all_of_them in [(own, whole), (own.grad, whole.grad)][:1 + (name in LEARNED)]:
                assert one.shape == (size,) and one.data_ptr() == all_of_them[row].data_ptr()


def test_shrinking_keeps_the_function_and_sorts_what_adam_remembers():
    students, spectrum, half = spectrum_of(model := tiny_gpt2(), IDS)
    optimizer = torch.optim.Adam([spectrum.S, spectrum.d])
    optimizer.step()
    moments = [optimizer.state[spectrum.S][key] for key in ("exp_avg", "exp_avg_sq")]
    for seed, tensor in enumerate([*moments, spectrum.S.data]):
        tensor.copy_(random(*tensor.shape, seed=seed))
    spectrum.keep_best(half // 2)

    def told():
        """Of every layer, {a component's row of V: what else is known of it}."""
        values = torch.stack([spectrum.S.detach(), spectrum.price, spectrum.kept, *moments], dim=-1).tolist()
        return [{tuple(v): (u, known) for v, u, known in zip(student.V.tolist(), student.U.T.tolist(), row)}
                for student, row in zip(spectrum.layers, values)]

    known, pool = told(), spectrum.choice(half)
    with swapped(model, students):
        before = logits(model, IDS)
        spectrum.shrink(half, optimizer)
        assert_close(logits(model, IDS), before, rtol=1e-4, atol=1e-4)
    assert [len(layer) for layer in told()] == spectrum.ranks == pool.sum(1).tolist()
    assert all(layer.items() <= old.items() for layer, old in zip(told(), known))
    assert torch.equal(spectrum.choice(2 * half).sum(1), pool.sum(1))  # the others are out for good


@pytest.mark.parametrize("steps, learned", [(0, LEARNED), (4, LEARNED), (4, "S"), (4, "ac")])
@pytest.mark.parametrize("ratio, group", [(0.2, 1), (0.5, 1), (0.7, 2), (0.3, 8)])
def test_the_budget_is_met_and_ranks_are_multiples(make, ratio, group, steps, learned, device):
    model = make().to(device)
    dense, stored, ranks = block_layers(model), 0, []
    shapes = [matrix(layer).shape for layer in dense.values()]
    assert compress(model, [tokens(2, 16)], ratio, steps, learned=learned, group=group) is model
    specs = model.config.compressed["layers"]
    assert specs.keys() == dense.keys()
    for (name, layer), (m, n) in zip(dense.items(), shapes):
        new, k = model.get_submodule(name), specs[name].get("rank")
        stored += sum(p.numel() for p in new.parameters()) - (0 if layer.bias is None else m)
        ranks.append(k or min(m, n))
        if k is None:
            assert specs[name]["kind"] == "dense" and type(new) is type(layer) and new is not layer
        else:
            assert (new.up.weight.shape, new.down.weight.shape) == ((m, k), (k, n))
            assert k > 0 and k % group == 0 and k * (m + n) < m * n
    assert_within(stored, int((1 - ratio) * sum(map(math.prod, shapes)) + 1e-6), shapes, ranks, group)
    assert len(set(ranks)) > 2 or group == 8


@pytest.mark.parametrize("method, shape, ratios, taught, defaults, slack, spare", [
    ("soco", (2, 16), [.2, .4, .6], [(18, range(6)), (12, range(6)), (6, range(6))], [160, 440], 1.15, 128),
    ("cap", (4, 32), [.5, .8], [(16, range(10)), (16, range(10, 16))], [32, 88], 1.3, 1)])
def test_each_ratio_of_a_run_gets_its_share_of_steps_and_is_as_good_as_a_run_of_its_own(
        method, shape, ratios, taught, defaults, slack, spare, monkeypatch):
    model, ids = tiny_llama(), tokens(*shape)
    layers, before, dense = block_layers(model), copy.deepcopy(model.state_dict()), logits(model, ids)
    parameters = sum(layer.weight.numel() for layer in layers.values())

    def down(ratios, steps):
        torch.manual_seed(0)
        if method == "soco":
            students, spectrum, _ = spectrum_of(model, ids, group=2)
            run = soco.learn_down(model, students, spectrum, [ids] * steps, ratios, steps, soco.LR, "S")
        else:
            students = {draft.layer: draft for draft in rpca.drafted(model, layers, [ids])}
            rpca.set_ranks([*students.values()], 0.6, 0.3, False)
            assert any(len(draft.V) for draft in students.values())
            run = rpca.prune_down(model, [*students.values()], [ids] * steps, ratios, steps)
        for ratio, (done, new) in zip(ratios, run):
            stored = soco.block_parameters(layers.values(), new)[0]
            assert 0 <= int((1 - ratio) * parameters + 1e-6) - stored < spare
            with swapped(model, students):
                learned = logits(model, ids)
            with swapped(model, new):
                assert_near(logits(model, ids), learned, 1e-5)        # what is stored is what learned
                loss = divergence([dense], model, [ids])
            yield done, loss

    monkeypatch.setattr(METHODS[method], "train", train := mock.Mock(wraps=soco.train))
    one = list(down(ratios, taught[0][0]))          # rates, batches that are left, steps:
    calls = [(args[3][0]["initial_lr"], len(args[4]), args[5]) for args, _ in train.call_args_list]
    assert calls == [(pytest.approx(ratio * soco.LR, 1e-2), *call) for ratio, call in zip(ratios, taught)]
    alone = [next(down([ratio], done)) for ratio, (done, _) in zip(ratios, one)]
    assert one[0] == alone[0] and [done for done, _ in one] == [done for done, _ in alone]
    assert all(loss < slack * single for (_, loss), (_, single) in zip(one, alone))
    assert block_layers(model) == layers and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    monkeypatch.setattr(METHODS[method], "train", train := mock.Mock())
    for ratio in (0.2, 0.55):
        METHODS[method].compress(tiny_gpt2(), [ids], ratio)
    assert [len(args[5]) for args, _ in train.call_args_list] == defaults


def test_one_seed_gives_one_result_in_training_mode_under_no_grad_and_with_checkpointing():
    batches, states, calls = [tokens(2, 16, seed=seed) for seed in (0, 1)], [], []
    for checkpointing, training in ((False, False), (True, False), (False, True)):
        model, count = tiny_gpt2(resid_pdrop=0.5).train(training), []
        model.transformer.h[0].mlp.c_fc.weight.data.fill_(3.0)        # its outputs are 0 up to rounding
        if checkpointing:
            soco.enable_checkpointing(model)
        model.transformer.h[0].mlp.register_forward_pre_hook(lambda *call: count.append(1))
        torch.manual_seed(7)
        with torch.set_grad_enabled(not training):
            compress(model, iter(batches), 0.5, steps=5, group=1)
        assert all(module.training == training for module in model.modules())
        assert all(p.requires_grad for p in model.parameters())
        states.append(model.state_dict())
        calls.append(len(count))
    assert_close(states[1:], [states[0]] * 2, rtol=0, atol=0)
    assert calls == [calls[0], calls[0] + 5, calls[0]]                # checkpointing: one more in every step


@pytest.mark.parametrize("method, ratio, runs", [
    ("soco", 0.5, [{"steps": 0}, *({"steps": 20, "learned": learned} for learned in ("S", "Sd", LEARNED))]),
    ("cap", 0.8, [{"steps": 0}, {"steps": 20}])])
def test_learning_lowers_the_divergence_also_on_other_text(method, ratio, runs):
    from pydoc_data.topics import topics
    dense, tokenizer = eval_ppl.load_model(eval_ppl.BUNDLED, torch.device("cpu"), torch.float32)
    batches = encode(tokenizer, "\n\n".join(topics.values())[:30_000])[:640].view(5, 2, 64)
    targets, found, masks = [logits(dense, ids) for ids in batches], [], []
    for settings in runs:
        torch.manual_seed(0)
        model = METHODS[method].compress(copy.deepcopy(dense), batches[:4], ratio, **settings)
        found.append([divergence(targets[part], model, batches[part]) for part in (slice(4), slice(4, 5))])
        masks.append([(module.S != 0, module.spec) for module in model.modules() if hasattr(module, "S")])
        assert all(p.requires_grad for p in model.parameters())
    seen, other = zip(*found)
    if method == "soco":
        assert 1.1 * seen[3] < seen[2] and 1.05 * seen[2] < seen[1] < 0.7 * seen[0]
        assert 1.02 * other[3] < other[2] and max(other[1:]) < 0.95 * other[0]
    else:
        assert seen[1] < 0.8 * seen[0] and other[1] < 0.95 * other[0]
        assert all(torch.equal(a, b) and x == y for (a, x), (b, y) in zip(*masks))      # what is kept stays


def test_a_compressed_model_keeps_its_other_weights_and_frees_the_dense_ones(make):
    model = make()
    dense = {name: weakref.ref(layer.weight) for name, layer in block_layers(model).items()}
    others = {p for name, p in model.named_parameters() if not name.startswith(tuple(dense))}
    compress(model, [tokens(2, 16)], 0.5, steps=3, group=1)
    gc.collect()
    assert len(others) > 4 and others <= {*model.parameters()}
    assert not any(weight() is not None for weight in dense.values())


def with_an_empty_layer(model):
    """Add a layer to a GPT-2 that sees no token, as an expert may, and so passes gradients of none."""
    model.transformer.h[1].add_module("spare", nn.Linear(24, 24))
    model.transformer.h[1].register_forward_hook(lambda block, x, y: y + block.spare(x[0][:, :0]).sum())


REFUSED_SETTINGS = {        # what the message says: settings, of the methods that have them
    "no batches": {"batches": []}, "are no batches": {"metric_batches": 0}, "steps -1": {"steps": -1},
    "no tensor": {"batches": tokens(2, 16)}, "no tensor .*": {"batches": [{}]}, "lr -1": {"lr": -1},
    "group 0": {"group": 0}, "basis 'diagonal'": {"basis": "diagonal"}, "ratio 0.5": {"group": 24},
    **{f"ratio {ratio}": {"ratio": ratio} for ratio in (0, 1, 1.5, -0.1, math.nan)},
    "ratio 0.999": {"ratio": 0.999, "group": 1}, "three parts": {"stages": (0.5, 0.1, 0.5)},
    "step 2 of 10.*learning rate": {"steps": 10, "lr": 1e30}, "learned ''": {"learned": ""},
    "learned 'Sb'": {"learned": "Sb"}, "estimator 'luck'": {"estimator": "luck"}, "rounds 0": {"rounds": 0},
    "rank_share 1.5": {"rank_share": 1.5}, "rank_share -1": {"rank_share": -1}}
REFUSED_MODELS = {          # what the message says: a change of a model, or another model
    "GPT2LMHeadModel": lambda model: tiny_gpt2(num_hidden_layers=0),
    "has no config": lambda model: delattr(model, "config"),
    "quantized": lambda model: setattr(model.config, "quantization_config", {"bits": 4}),
    "c_attn is on the meta device": lambda model: model.to("meta"),
    "no calibration token .* transformer.h.1.spare": lambda model: with_an_empty_layer(model),
    "does not know Own": lambda model: setattr(model, "config", type("Own", (type(model.config),), {})()),
    "3-D parameter, .*experts": lambda model: tiny("mixtral"),
    "GPT2Model is not what": lambda model: model.transformer,
    "compressed already": lambda model: compress(model, [tokens(2, 16)], 0.2, 0),
    "no_grad": lambda model: None, "autocast": lambda model: None}    # under inference mode, and autocast


@pytest.mark.parametrize("what", [*REFUSED_SETTINGS, *REFUSED_MODELS])
def test_what_cannot_be_met_is_refused_and_the_model_stays_as_it_was(what, monkeypatch):
    model = REFUSED_MODELS.get(what, lambda model: None)(dense := tiny_gpt2()) or dense
    settings = {"batches": [tokens(2, 16)]} | REFUSED_SETTINGS.get(what, {})
    modules, users = list(model.modules()), [script.compress for script in METHODS.values() if
        settings.keys() <= inspect.signature(script.compress).parameters.keys()]
    error = FloatingPointError if settings.get("lr", 0) > 1 else CannotCompress
    if what in REFUSED_SETTINGS and error is CannotCompress:
        monkeypatch.setattr(soco, "observe", None)                    # refused before the work
    for compress in users:
        with (pytest.raises(error, match=what), torch.inference_mode(what == "no_grad"),
              torch.autocast("cpu", enabled=what == "autocast")):
            compress(model, **settings)
    assert users and list(model.modules()) == modules and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("ratio, learned", [(0.2, LEARNED), (0.5, LEARNED), (0.5, "S"), (0.5, "dcd")])
def test_the_learning_rate_goes_with_the_share_that_is_removed_and_the_rest_stays(ratio, learned):
    scored, spectrum, _ = spectrum_of(model := tiny_gpt2(), ids := tokens(2, 16))
    soco.learn(model, scored, spectrum, [ids], soco.budget_for(scored, ratio), 1, 0.1, learned)
    for name in LEARNED:                            # Adam's first step is the rate, warming up
        tensor, start = getattr(spectrum, name), 0 if name == "d" else 1
        step = (0.1 if name == "d" else 0.2) * 0.1 * ratio if name in learned else 0
        assert (tensor.detach() - start).abs().max().item() == pytest.approx(step, rel=1e-2)
        assert tensor.grad.any() == (name in learned)


class Operations(TorchDispatchMode):
    """Counts operations, and those among them for which a GPU would make the host wait."""
    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "_unique2", "equal.")
    all, waits = 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation).removeprefix("aten.")
        indices = args[1] if name.startswith("index") and isinstance(args[1], (list, tuple)) else ()
        boolean = any(torch.is_tensor(i) and i.dtype in (torch.bool, torch.uint8) for i in indices)
        self.all, self.waits = self.all + 1, self.waits + (boolean or name.startswith(self.WAITS))
        return operation(*args, **(kwargs or {}))


def test_a_learning_step_waits_for_the_device_a_few_times_whatever_the_number_of_matrices():
    waits, ids, steps = [], tokens(2, 8), 40
    for blocks in (2, 8):
        students, spectrum, half = spectrum_of(model := tiny_llama(num_hidden_layers=blocks), ids)
        with Operations() as learning:
            soco.learn(model, students, spectrum, [ids], half, steps)
        drafts = rpca.drafted(model, block_layers(model), [ids])
        with Operations() as of_gains:
            rpca.learn_gains(model, drafts, [ids], 0.5, 0, steps)
        with Operations() as dense:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        waits.append((learning.waits, of_gains.waits))
    assert learning.all <= 2.0 * dense.all * steps and of_gains.all <= 1.6 * dense.all * steps
    assert waits[0] == waits[1] and learning.waits <= 5 * steps and of_gains.waits <= 3 * steps


# ---- architectures --------------------------------------------------------------------------------
ARCHITECTURES = ("gpt2 llama mistral qwen2 qwen3 gemma3_text phi3 opt gpt_neox bloom falcon granite olmo2 "
                 "starcoder2 ctrl").split()
SETTINGS = {"soco": {"steps": 2, "group": 1}, "cap": {"steps": 2}}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_is_compressed_saved_and_loaded(kind, method, tmp_path):
    model, ids = tiny(kind), tokens(2, 16)
    dense, layers = logits(model, ids), block_layers(model)
    inside = {name for name, p in model.named_parameters() if p.ndim == 2 and re.search(r"\.\d+\.", name)}
    assert inside == {name + ".weight" for name in layers}      # every matrix of the blocks and no other
    others = {name for name, p in model.named_parameters() if p.ndim > 1} - inside
    assert {(name, "outside the repeated blocks") for name in others} == {
        (name, reason) for name, _, reason in soco.untouched(model, layers)}
    with swapped(model, soco.scored_layers(model, layers, [ids])):
        assert_near(logits(model, ids), dense, 1e-3)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    METHODS[method].compress(model, [ids], 0.4, **SETTINGS[method])
    new = {layer: model.get_submodule(name) for name, layer in layers.items()}
    stored, parameters = soco.block_parameters(new, new)[0], sum(layer.weight.numel() for layer in new)
    assert 0.5 * parameters < stored <= 0.6 * parameters
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    model.config.limits = [0.0, math.inf]           # JSON knows no infinity
    save(model, tmp_path / "model")
    assert torch.equal(logits(load(tmp_path / "model"), ids), logits(model, ids))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes_devices_frozen_flags_and_shared_blocks_are_kept(dtype, method, device):
    model = tiny_llama().to(device, getattr(torch, dtype))
    blocks, frozen_one = model.model.layers, "model.layers.0.mlp.up_proj"
    blocks[1] = blocks[0]
    blocks[0].mlp.down_proj.weight.data.zero_()     # what comes before it has no effect
    layers = block_layers(model)
    layers[frozen_one].weight.requires_grad_(False)
    METHODS[method].compress(model, [tokens(2, 16)], 0.4, **SETTINGS[method])
    for name in layers:
        for p in model.get_submodule(name).parameters():
            assert (p.dtype, p.device) == (getattr(torch, dtype), layers[name].weight.device)
            assert p.requires_grad == (name != frozen_one)
    assert logits(model, tokens(2, 16, device=device)).isfinite().all()
    assert blocks[1] is blocks[0] and len(model.config.compressed["layers"]) == len(layers) == 7


# ---- several processes ----------------------------------------------------------------------------
@pytest.mark.parametrize("script, flags", [
    ("soco.py", "--steps 4"), ("rpca.py", "--rank-share 0.3"), ("rpca.py", "--estimator policy")])
def test_two_processes_find_what_one_finds(script, flags, house, command, tmp_path):
    flags += " --batch-size 4 --metric-batches 8 --no-baselines --out "
    words = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    words += [ROOT / script, *run_flags(house), *f"{flags} two".split()]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True,
                          timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout.count("written to")) == (0, 1), done.stderr
    assert command(script, f"{flags} one")[0] == 0
    one, two = map(metrics, folders := [tmp_path / "one", tmp_path / "two"])
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["ppl"] == pytest.approx(one["ppl"], rel=5e-3)
    for a, b in zip(one["layers"], two["layers"]):                    # entries on the edge may change sides
        assert a.get("rank") == b.get("rank") and abs(a.get("nonzeros", 0) - b.get("nonzeros", 0)) <= 10
    found = [logits(load(folder), tokens(2, 16)) for folder in folders]
    assert_near(*found, 1e-3 if script == "soco.py" else 0.05)


# ---- perplexity, texts, devices -------------------------------------------------------------------
@pytest.mark.parametrize("blocks", [None, 1, 3])
@pytest.mark.parametrize("bos", [None, 5])
@pytest.mark.parametrize("stride", [None, 15, 7, 1])
def test_perplexity_scores_every_token_once_with_all_the_context_of_its_window(stride, bos, blocks, device):
    model, ids = tiny_llama().to(device), tokens(50)
    windows = [start for start in range(0, 50, stride or 16) if start + 16 <= 50][:blocks]
    nats = []
    for t in range(1, windows[-1] + 16):
        start = next(start for start in windows if start + 16 > t)
        if start < t:
            window = ids[None, start:t].clone()
            window[0, 0] = window[0, 0] if bos is None else bos
            found = logits(model, window.to(device))[0, -1]
            nats.append(-found.log_softmax(-1)[ids[t]].item())
    result = perplexity(model, ids, 16, stride, blocks, bos=bos)
    assert result.tokens == len(nats) and result.nll == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert result.ppl == pytest.approx(math.exp(result.nll), rel=1e-12)
    for none_whole in ((51, None), (1, None), (16, 17), (16, -1)):
        with pytest.raises(ValueError, match="50 tokens"):
            perplexity(model, ids, *none_whole)


def sample(ids, count, seed=0, bos=None):
    args = SimpleNamespace(seqlen=8, batch_size=3, seed=seed, bos=bos)
    return torch.stack(soco.sample_batches(ids, args, count))


def test_batches_are_pieces_of_the_text_in_an_order_the_seed_decides():
    batches = sample(ids := torch.arange(100), 4)
    starts = batches.flatten(0, 1)[:, :1]
    assert batches.shape == (4, 3, 8) and sorted(starts.flatten().tolist()) == list(range(0, 96, 8))
    assert torch.equal(batches.flatten(0, 1), starts + torch.arange(8))
    assert torch.equal(sample(ids, 9), batches.repeat(3, 1, 1)[:9])   # the text has 12 pieces
    assert not torch.equal(sample(ids, 4, seed=1), batches)
    begun = sample(ids, 4, bos=200)
    assert begun[..., 0].eq(200).all() and torch.equal(begun[..., 1:], batches[..., 1:])


def test_bos_is_a_token_and_is_named_where_the_tokenizer_begins_texts_with_it(house, monkeypatch, capsys):
    model, tokenizer = tiny_gpt2(), tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="w63 $A", special_tokens=[("w63", 63)])
    monkeypatch.setattr(eval_ppl, "load_named", lambda args: (model, tokenizer))
    for bos, expected in ((None, None), (7, 7), (eval_ppl.OWN_BOS, 63)):
        args = SimpleNamespace(model="", eval=f"{house}/test", bos=bos, eval_seqlen=None, eval_stride=None)
        assert eval_ppl.load_scored(args)[2][0] == 63 and args.bos == expected
        assert ("--bos" in capsys.readouterr().out) == (bos is None)
    tokenizer.bos_token = None
    with pytest.raises(eval_ppl.UserError, match="--bos: .* no <bos>"):
        eval_ppl.first_token(model, tokenizer, eval_ppl.OWN_BOS)


def test_texts_are_read_and_encoded_whole_and_marks_of_rare_words_not_learned_from(tmp_path, monkeypatch):
    assert encode(tiny_tokenizer(), text(5000, seed=3)).tolist() == tokens(5000, seed=3).tolist()
    (tmp_path / "stdlib").write_text("one\n two\n")
    assert eval_ppl.load_text(str(tmp_path / "stdlib"), "test") == "one\n two\n"
    with zipfile.ZipFile(tmp_path / "wikitext.zip", "w") as archive:
        archive.writestr("wikitext-2-raw/wiki.test.raw", " \n = Title = \n \nOne @-@ two .\n")
        archive.writestr("wikitext-2-raw/wiki.train.raw", "train\n")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **options: tmp_path / "wikitext.zip")
    assert [eval_ppl.default_text(model) for model in (os.path.relpath(ROOT / "demo"), "gpt2")] == [
        "stdlib", "wikitext2"]
    assert eval_ppl.load_text("wikitext2", "train") == "train\n"
    assert eval_ppl.load_text("wikitext2", "test") == "\n\n = Title = \n\n\n\n\nOne @-@ two .\n"
    (tmp_path / "marked").write_text(" <unk> ".join(text(100, seed=0).split()))
    train, test = (eval_ppl.load_tokens(tiny_gpt2(), tiny_tokenizer(), str(tmp_path / "marked"), split, 16)
                   for split in ("train", "test"))
    assert torch.equal(train, tokens(100)) and torch.equal(test[::2], train) and not test[1::2].any()


def test_the_splits_of_the_standard_library_share_no_text(monkeypatch):
    documents = {f"module {i}": [f"only in {i}", "in all of them"] for i in range(50)}
    monkeypatch.setattr(eval_ppl, "stdlib_documents", lambda: documents)
    train, test = (eval_ppl.load_text("stdlib", split).split("\n\n") for split in ("train", "test"))
    assert sorted(train + test) == sorted(["in all of them"] + [f"only in {i}" for i in range(50)])
    assert "in all of them" in train and 0 < len(test) < 15


@pytest.mark.parametrize("settings", [{"steps": 5}, {"steps": 0}, {}, {"estimator": "policy", "rounds": 1}])
def test_what_a_program_around_it_has_set_stays_and_changes_nothing(make, settings, request, tmp_path):
    config, ids, products = make().config, tokens(64), torch.backends.cuda.matmul     # of several models
    method, before, found = soco if "steps" in settings else rpca, products.fp32_precision, []
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    for device, dtype, precision in (("cpu", torch.float32, before), ("meta", torch.bfloat16, "tf32"),
                                     ("meta", torch.float64, before)):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        torch.set_default_dtype(dtype)
        products.fp32_precision = precision
        with torch.device(device):                  # what is made on meta cannot be read
            method.compress(model, sample(ids, 1), 0.3, **settings)
            found.append(perplexity(model, ids, 16))
            save(model, tmp_path / str(dtype))
            assert perplexity(load(tmp_path / str(dtype)), ids, 16) == found[0]
        assert (torch.get_default_dtype(), products.fp32_precision) == (dtype, precision)
        torch.set_default_dtype(torch.float32)
        assert {value.device.type for value in model.state_dict().values()} == {"cpu"}
    assert found == 3 * found[:1] and not hasattr(config, "compressed")


def python(code, *args, cwd, **environment):
    """A process that imports from `cwd` and the environment alone."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=cwd, env=clean | environment,
                          capture_output=True, text=True, timeout=300)


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def compressed(method, make=tiny_gpt2):
    """A small model, compressed; CAP's by the policy, whose low-rank parts are never empty."""
    settings = {"soco": {"steps": 2, "group": 1}, "cap": {"estimator": "policy", "rounds": 1}}
    torch.manual_seed(0)                                              # of the labels that the metric draws
    return METHODS[method].compress(make(), [IDS], 0.5, **settings[method])


# ---- copying and pasting ------------------------------------------------------------------------
# what can be pasted: the names it needs beside it, with torch and the standard library, and a use of it
PASTED = {
    "factor": ("cholesky", "factor(W, W.T @ W, W @ W.T)"),
    "choose": ("stored_parameters", "choose(W.abs(), *torch.tensor([[9, 8, 7, 6], [5, 6, 7, 8]]), 60, 2)"),
    "KLDivergence": ("", "torch.autograd.functional.vjp(lambda s: KLDivergence.apply(W[None], s), -W[None])"),
    "ScoredLinear": ("ScoredProduct LowRankLinear low_rank dense_like is_conv1d",
                     "[(s(W), s.finish()(W)) for s in [ScoredLinear(dense, W[:, :k], W[0, :k].abs(), W[:k])"
                     " for k in (2, 4)]]"),
    "LowRankLinear": ("", "LowRankLinear(5, 4, 2).double()(W)"),
    "rpca": ("RPCA singular_value_threshold leading_range soft_threshold", "rpca(W)"),
    "project": ("", "project([W.sigmoid()], [2], 9)"),
    "policy_gradient": ("project score_function", "policy_gradient("
                        "lambda masks, step: masks[0].sum().item(), [W.sigmoid()], [1], 9, range(9))"),
    "keep_most_probable": ("", "keep_most_probable([W], [2], 9)"),
    "refit": ("", "refit(W, 0 * W, W > 0, W.T @ W)"),
    "LowRankPlusSparse": ("low_rank_plus_sparse",
                          "low_rank_plus_sparse(W[:, :2], W[:2], W * (W > 0), None, like=W)(W)"),
    "perplexity": ("Perplexity", "perplexity(model, ids, 16)"),
}


@pytest.mark.parametrize("name", PASTED)
def test_what_the_readme_lists_does_where_it_is_pasted_what_it_does_in_its_place(name):
    place = {"torch": torch, "nn": nn, "F": F, "math": math, "functools": functools, "NamedTuple": NamedTuple}
    for part in [*PASTED[name][0].split(), name]:
        home = next(script for script in (soco, rpca, eval_ppl)
                    if getattr(getattr(script, part, None), "__module__", None) == script.__name__)
        exec(inspect.getsource(getattr(home, part)), place)
    given = {"W": random(4, 5), "dense": make_layer("linear", 4, 5), "model": tiny_gpt2(), "ids": tokens(16)}
    found = [torch.manual_seed(0) and eval(PASTED[name][1], names | given) for names in (place, vars(home))]
    assert_close(*found, rtol=0, atol=0)


# ---- a saved folder loads anywhere, and is what was saved or an error -------------------------------
@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """{method: (folder, logits)} of saved models, with a tokenizer: SoCo's is a GPT-2, CAP's a LLaMA."""
    found = {}
    for method, make in (("soco", tiny_gpt2), ("cap", tiny_llama)):
        folder, model = tmp_path_factory.mktemp("saved") / method, compressed(method, make)
        METHODS[method].save(model, folder)
        tiny_tokenizer().save_pretrained(folder)
        found[method] = folder, logits(model, IDS)
    return found


def leaves(value, path=()):
    below = value if isinstance(value, dict) else ()
    return [leaf for key in below for leaf in leaves(value[key], (*path, key))] if below else [path]


def edit_config(folder, path, *value, sealed=False):
    """Give what config.json holds at a path of keys another value, or drop it; sealed: with its digest."""
    config = json.loads((folder / "config.json").read_text())
    place = functools.reduce(dict.get, path[:-1], config)
    place.pop(path[-1], None)
    place.update({path[-1]: new for new in value})
    if sealed:
        config["digest"] = soco.digest(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, change=lambda tensors: None, target="model.safetensors", index=False):
    """Change the tensors of a folder, or put them into another file, with an index that names it."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    (folder / "model.safetensors").unlink()
    write = torch.save if target.endswith(".bin") else functools.partial(save_file, metadata={"format": "pt"})
    write(tensors, os.path.join(folder, target))
    if index:
        shards = {"metadata": {}, "weight_map": dict.fromkeys(tensors, target)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(shards))


ADAPTER = '{"peft_type": "LORA", "base_model_name_or_path": "nobody/nothing"}'
TRICKS = {
    "pickle": lambda folder: edit_tensors(folder, target="x.bin", index=True),
    "outside": lambda folder: edit_tensors(folder, target=f"../{folder.name}.safetensors", index=True),
    "absolute": lambda folder: edit_tensors(folder, target=f"{folder}-elsewhere.safetensors", index=True),
    "pickled": lambda folder: edit_tensors(folder, target="pytorch_model.bin"),
    "torn": lambda folder: os.truncate(folder / "model.safetensors", 5000),
    "weightless": lambda folder: (folder / "model.safetensors").unlink(),
    "adapter": lambda folder: (folder / "adapter_config.json").write_text(ADAPTER),
    "list": lambda folder: (folder / "config.json").write_text("[]"),
    "cut": lambda folder: os.truncate(folder / "config.json", 300),
}


@pytest.fixture(scope="session")
def tampered(saved, tmp_path_factory):
    """{(method, what): folder}: mutations of both folders, seeded; "sealed" ones forge the digest too."""
    found, chance, root = {}, np.random.default_rng(0), tmp_path_factory.mktemp("tampered")

    def add(what, edit, *arguments, **options):
        found[method, what] = Path(shutil.copytree(saved[method][0], root / f"m{len(found)}"))
        edit(found[method, what], *arguments, **options)

    for method, (folder, _) in saved.items():
        config = json.loads((folder / "config.json").read_text())
        tensors, paths = load_file(folder / "model.safetensors"), leaves(config)
        for what, trick in TRICKS.items():
            add(what, trick)
        for new in ((), (7,)):
            for path in [paths[i] for i in chance.choice(len(paths), 25, replace=False)]:
                add(f"{path} becomes {new}", edit_config, path, *new)
        at, specs = ("compressed", "layers"), config["compressed"]["layers"].items()
        name, spec = next((name, spec) for name, spec in specs if spec["kind"] != "dense")
        values = {"rank": [0, -1, 1.5, "2", spec["rank"] + 1], "kind": ["dense", 1], "bias": [7],
                  "nonzeros": [0, -1, spec["nonzeros"] + 1] if method == "cap" else []}
        for key, value in [(key, value) for key in values for value in values[key]]:
            add(f"{key} {value}", edit_config, (*at, name, key), value)
            add(f"{key} {value}, sealed", edit_config, (*at, name, key), value, sealed=True)
        add("a layer less, sealed", edit_config, (*at, name), sealed=True)
        add("a layer more, sealed", edit_config, (*at, "x.9"), spec, sealed=True)
        add("no auto_map", edit_config, ("auto_map",))
        add("a tensor more", edit_tensors, lambda tensors: tensors.update(extra=torch.ones(3)))
        for name in chance.choice(sorted(tensors), 5, replace=False):
            add(f"{name} dropped", edit_tensors, lambda tensors: tensors.pop(name))
            add(f"{name} renamed", edit_tensors, lambda tensors: tensors.update(x=tensors.pop(name)))
            add(f"{name} longer", edit_tensors, lambda own: own.update({name: torch.cat([own[name]] * 2)}))
        for mask in [name for name in tensors if name.endswith(".mask")][:1]:
            add("no bits", edit_tensors, lambda tensors: tensors[mask].zero_())
            add("a bit flipped", edit_tensors, lambda tensors: tensors[mask][:1].bitwise_xor_(1))
    return found


def attempt(load, *args, ids=IDS, **options):
    """Logits of what `load` gives; or of what it raises, the names of its classes, and its message."""
    try:
        model = load(*args, **options)
    except Exception as error:
        return [kind.__name__ for kind in type(error).__mro__], str(error)
    return logits(model, ids)


STRANGER = """
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM
explicit, auto = {"soco": GPT2LMHeadModel, "cap": LlamaForCausalLM}, AutoModelForCausalLM.from_pretrained
trust = {"trust_remote_code": True}
found = {"bad": {folder: attempt(auto, folder, **trust) for folder in bad}}
for method, folder in good.items():
    auto(folder, **trust).save_pretrained(method + "-again")
    found[method] = {
        "without": attempt(auto, folder), "explicit": attempt(explicit[method].from_pretrained, folder),
        "trusted": attempt(auto, folder, **trust), "again": attempt(auto, method + "-again", **trust),
        "generated": auto(folder, **trust).generate(IDS, max_new_tokens=3, do_sample=False)}
torch.save(found, "found")
assert not {"soco", "rpca", "eval_ppl"} & set(sys.modules)
"""


@pytest.fixture(scope="session")
def stranger(saved, tampered, tmp_path_factory):
    """What a process with torch and transformers alone makes of the folders."""
    home = tmp_path_factory.mktemp("stranger")
    good = {method: str(folder) for method, (folder, _) in saved.items()}
    torch.save((good, [str(folder) for folder in tampered.values()], IDS), home / "given")
    code = "import sys, torch\ngood, bad, IDS = torch.load('given', weights_only=False)\n"
    code += inspect.getsource(logits) + inspect.getsource(attempt) + STRANGER
    done = python(code, cwd=home, HF_HOME=str(home / "cache"))
    assert done.returncode == 0, done.stderr
    return torch.load(home / "found", weights_only=False)


def test_a_folder_loads_in_a_process_without_this_project(method, saved, stranger):
    found, (folder, expected) = stranger[method], saved[method]
    assert torch.equal(found["trusted"], expected)
    assert torch.equal(found["generated"][:, 16], expected[:, -1].argmax(-1))
    assert not torch.is_tensor(found["again"]) or torch.equal(found["again"], expected)
    for way in ("without", "explicit"):                               # an error, and never random weights
        assert {"ValueError", "OSError", "RuntimeError"} & set(found[way][0]) and found[way][1]
    assert len((folder / "compressed.py").read_text().splitlines()) <= 100
    config = json.loads((folder / "config.json").read_text())         # transformers may add a key as it reads
    assert soco.digest(config | {"_commit_hash": None}) == config["digest"]


@pytest.mark.parametrize("way", ["load", "import", "trust"])
def test_a_folder_is_what_was_saved_or_an_error(method, way, saved, tampered, stranger):
    (folder, expected), wrong = saved[method], []
    load = METHODS[method].load if way == "load" else AutoModelForCausalLM.from_pretrained
    assert torch.equal(attempt(load, folder), expected)
    for what, copied in ((what, copied) for (kind, what), copied in tampered.items() if kind == method):
        found = stranger["bad"][str(copied)] if way == "trust" else attempt(load, copied)
        if torch.is_tensor(found):
            fine, found = torch.equal(found, expected), "other logits"
        else:
            clear = {"ValueError", "OSError", "SafetensorError"} & set(found[0]) and "\n" not in found[1]
            fine = found[1] and (clear or way != "load" or "sealed" in what)
        if not fine:
            wrong.append(f"{what}: {found}")
    assert not wrong, "\n".join(wrong)


# ---- saving: complete or absent -------------------------------------------------------------------
NAMES = {"full": "full", "a file": "file", "in a file": "file/new", "dangling": "dangling", "link": "link",
         "mount point": "disk", "300 letters": "n" * 300, "not UTF-8": "\udcff", "the one above": "new/.."}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_cannot_be_taken_is_refused_before_any_work(name, monkeypatch, tmp_path):
    for folder in ("full", "full/mine", "disk"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "link").symlink_to("disk")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    before = tree(tmp_path)
    for take in (soco.reserved, functools.partial(save, compressed("soco"))):
        with pytest.raises(CannotCompress, match=r"^cannot write [^\n]*$"), take(tmp_path / NAMES[name]):
            pass
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["deep/new", "empty", "n" * 250, "é\n"], ids=range(4))
def test_a_name_that_is_taken_holds_the_model_in_the_end(name, monkeypatch, tmp_path):
    (tmp_path / "here" / "empty").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    before, model = tree(tmp_path), compressed("soco")
    with soco.reserved(name), soco.reserved("other"), pytest.raises(CannotCompress, match="another run is"):
        with soco.reserved(name):                                     # a name is taken once
            pass
    assert tree(tmp_path) == before                                   # not used: nothing is left
    save(model, name)
    assert torch.equal(logits(load(name), IDS), logits(model, IDS))
    assert not any(".compressed-" in path for path in tree(tmp_path))


@pytest.mark.parametrize("place, name", [(PreTrainedModel, "save_pretrained"), (Path, "rename")])
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_killed_in_its_save_leaves_nothing(number, code, place, name, command, monkeypatch, tmp_path):
    real = getattr(place, name) if name == "save_pretrained" else lambda *args: None
    monkeypatch.setattr(place, name, lambda *args, **more: (real(*args, **more), signal.raise_signal(number)))
    ended, _, err = command("soco.py", "--no-baselines --out new/folder")
    assert ended == code and err.count("\n") <= 1 and "Traceback" not in err and tree(tmp_path) == []


# each of RUNS is a process of its own, two at a time, of scripts that were copied
RUN = """
import os, resource, runpy, sys, torch
before, *sys.argv = sys.argv[1:]
exec(before)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
LIBRARY = """
from transformers import GPT2Config, GPT2LMHeadModel
from soco import compress, save, load
config, ids = GPT2Config(n_embd=24, n_head=2, n_layer=2), torch.randint(64, (2, 16))
save(model := compress(GPT2LMHeadModel(config).eval(), [ids], 0.5, steps=2, group=1), "saved")
assert torch.equal(load("saved")(ids).logits, model(ids).logits)
assert not {"eval_ppl", "rpca"} & sys.modules.keys()
"""
DEMO = "--seqlen 64 --metric-batches 2 --eval-seqlen 64 --eval-blocks 20 --out"
RUNS = {    # {name: (what is done before, script, flags)}; flags behind a space come after `run_flags`
    "soco": (LIBRARY, "soco.py", f"--steps 10 {DEMO} soco"),
    "hub": ("", "soco.py", "--model gpt2 --basis plain --steps 2 --seqlen 32 --metric-batches 2 --out hub"),
    "cap": ("", "rpca.py", f"--rounds 2 --rank-share 0.1 {DEMO} cap"),
    "limit": ("resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))", "rpca.py", " --out deep/limited"),
    "head": ("r, w = os.pipe(); os.close(r); os.dup2(w, 1)", "rpca.py", " --out h"),
    "ascii": ("sys.stdout.reconfigure(encoding='ascii')", "rpca.py", " --out é"),
    "taken": ("", "rpca.py", " --model no/model --out taken"),
    "soco again": ("", "eval_ppl.py", "--model soco --eval stdlib --seqlen 64 --blocks 20"),
    "cap again": ("", "eval_ppl.py", "--model cap --eval stdlib --seqlen 64 --blocks 20"),
}


@pytest.fixture(scope="session")
def ran(house, tmp_path_factory):
    """The folder where RUNS ran, and for each (exit code, stdout, stderr)."""
    home, revision = tmp_path_factory.mktemp("ran"), "0123456789abcdef0123456789abcdef01234567"
    for name in ("models--gpt2", "datasets--ggml-org--ci"):           # a cache as the hub's client writes it
        (home / "at" / name / "refs").mkdir(parents=True)
        (home / "at" / name / "refs" / "main").write_text(revision)
        shutil.copytree(house / "model", snapshot := home / "at" / name / "snapshots" / revision)
    with zipfile.ZipFile(snapshot / "wikitext-2-raw-v1.zip", "w") as archive:
        for seed, (split, count) in enumerate({"train": 2000, "valid": 300, "test": 900}.items()):
            archive.writestr(f"wikitext-2-raw/wiki.{split}.raw", text(count, seed) + "\n")
    shutil.copytree(ROOT / "demo", home / "demo")
    for script in FLAGS:
        shutil.copy(ROOT / script, home)

    def ended(run):
        before, script, flags = run
        words = [script, *run_flags(house) * (flags[0] == " "), *flags.split()]
        done = python(RUN, before, *words, cwd=home, OMP_NUM_THREADS="1", HF_HUB_CACHE=str(home / "at"))
        return done.returncode, done.stdout, done.stderr

    with soco.reserved(home / "taken"), ThreadPoolExecutor(2) as pool:    # taken here, and not by them
        return home, dict(zip(RUNS, pool.map(ended, RUNS.values())))


@pytest.mark.parametrize("name, folder, why", [
    ("limit", "deep/limited", "arge"), ("taken", "taken", "another"), ("head", "h", ""), ("ascii", "é", "")])
def test_a_run_that_cannot_write_ends_in_one_line_and_one_that_nobody_reads_saves(name, folder, why, ran):
    (code, out, err), folder = ran[1][name], ran[0] / folder
    if not why:
        assert (code, err) == (0, "") and math.isfinite(perplexity(load(folder), tokens(64), 32).ppl)
    else:
        assert (code, err.count("\n")) == (2, 1) and str(folder) in err and why in err
        assert not folder.exists() and not (ran[0] / "deep").exists() and (out == "" or name == "limit")


@pytest.mark.parametrize("script", ["soco.py", "rpca.py", "eval_ppl.py"])
def test_an_interrupt_during_imports_is_silent(script, tmp_path):
    shutil.copy(ROOT / script, tmp_path)
    (tmp_path / "torch.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


# ---- the model that is loaded -----------------------------------------------------------------------
def test_a_loaded_model_behaves_like_any_other(method, saved, house, monkeypatch, tmp_path):
    (folder, expected), read, auto = saved[method], METHODS[method].load, AutoModelForCausalLM.from_pretrained
    for model in (auto(folder).half().float(), read(folder, dtype=torch.bfloat16).float()):
        assert (logits(model, IDS) - expected).norm() < 0.02 * expected.norm()
    traced = torch.compile(read(folder), backend="aot_eager")
    assert_close(logits(traced, IDS), expected, rtol=1e-4, atol=1e-4)
    words = pipeline("text-generation", str(folder))("w1 w2", max_new_tokens=3, do_sample=False)
    assert words[0]["generated_text"].startswith("w1 w2")
    config = auto(folder, attn_implementation="eager", output_attentions=True, eos_token_id=5).config
    assert (config._attn_implementation, config.output_attentions, config.eos_token_id) == ("eager", True, 5)
    for main in (True, False):                      # the second writes nothing
        auto(folder).save_pretrained(save_directory=tmp_path / "again", is_main_process=main)
    assert torch.equal(logits(read(tmp_path / "again"), IDS), expected)
    with pytest.raises(ValueError, match="call push_to_hub"):
        auto(folder).save_pretrained(tmp_path / "pushed", push_to_hub=True)
    (orphan := tiny_gpt2()).config.compressed = model.config.compressed     # as code of a folder loads it
    with pytest.raises(CannotCompress, match="not compressed"):
        save(orphan, tmp_path / "dense")
    with monkeypatch.context() as without, pytest.raises(ValueError, match="not known here: import rpca"):
        without.setattr(soco, "KINDS", soco.Kinds())
        auto(folder)
    if method == "soco" and importlib.util.find_spec("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
        quantize_(model := read(folder), Int8WeightOnlyConfig())
        assert_close(logits(model, IDS), expected, rtol=0.1, atol=0.1)
    pytest.importorskip("accelerate")
    where = dict.fromkeys(["transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"], "disk")
    offloaded, _ = eval_ppl.load_model(str(house / "model"), None, None, where | {"transformer.h": "cpu"})
    assert any(p.is_meta for p in offloaded.parameters())
    assert perplexity(offloaded, IDS[0], 16).nll == pytest.approx(perplexity(tiny_gpt2(), IDS[0], 16).nll)
    for device_map in ("auto", {"": "cpu"}):
        model = read(folder, device_map=device_map)
        assert_close(logits(model, IDS.to(model.device)).cpu(), expected, rtol=1e-4, atol=1e-4)
    dense = [auto(house / "model", device_map=where) for where in ({"": "cpu"}, None)]
    found = [logits(compressed(method, lambda: model), IDS) for model in dense]
    assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_is_trained_whole_or_by_lora_and_saved(method, lora, saved, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments
    folder, read = saved[method][0], METHODS[method].load
    trained = model = read(folder)
    if lora:
        peft = pytest.importorskip("peft")
        trained = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["down", "up"]))
    zeros = {module: module.S == 0 for module in model.modules() if hasattr(module, "S")}
    settings = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], save_strategy="no", use_cpu=True,
                                 learning_rate=0.01, disable_tqdm=True)
    Trainer(trained, settings, train_dataset=[{"input_ids": row, "labels": row} for row in IDS]).train()
    expected = logits(trained.eval(), IDS)
    assert not torch.equal(expected, saved[method][1])
    assert all((module.S[zero] == 0).all() for module, zero in zeros.items())
    model = trained.merge_and_unload() if lora else trained
    assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-4)
    METHODS[method].save(model, tmp_path / "new")
    (other := read(folder)).load_state_dict(model.state_dict())
    (resumed := read(folder)).load_state_dict(load_file(tmp_path / "new" / "model.safetensors"), strict=False)
    for again in (read(tmp_path / "new"), other, resumed):            # resumed: as Trainer does it
        assert torch.equal(logits(again, IDS), logits(model, IDS))


def test_half_the_parameters_take_at_most_six_tenths_of_the_bytes(method, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    dense = {name + ".": layer.weight.nbytes for name, layer in block_layers(model).items()}
    METHODS[method].save(compressed(method, lambda: model), tmp_path / "model")
    again = METHODS[method].load(tmp_path / "model")
    assert torch.equal(logits(again, IDS), logits(model, IDS)) and again.dtype == torch.bfloat16
    stored = sum(value.nbytes for key, value in load_file(tmp_path / "model" / "model.safetensors").items()
                 if key.startswith(tuple(dense)) and "bias" not in key)
    assert 0.4 * sum(dense.values()) < stored <= 0.6 * sum(dense.values())


# ---- the command line -----------------------------------------------------------------------------
MODEL_FLAGS = "model revision trust_remote_code device device_map dtype eval "
SHARED = MODEL_FLAGS + ("ratio calib same_text seqlen batch_size metric_batches steps lr eval_seqlen "
                        "eval_stride eval_blocks bos gradient_checkpointing no_baselines seed out ")
FLAGS = {"soco.py": SHARED + "basis rank_multiple learn",
         "rpca.py": SHARED + "estimator rank_share rounds no_scale no_refit",
         "eval_ppl.py": MODEL_FLAGS + "seqlen stride blocks bos"}
ROWS = {"soco": {"dense", "svd", "svd_whitened", "svd_kfac", "svd_global", "compressed"},
        "cap": {"dense", "magnitude", "wanda", "compressed"}}


@pytest.mark.parametrize("method, script", [("soco", "soco.py"), ("cap", "rpca.py")])
def test_metrics_and_table_tell_the_whole_run(method, script, ran):
    (code, out, err), folder = ran[1][method], ran[0] / method
    report, kept, dense, model = metrics(folder), 0, 0, METHODS[method].load(folder)
    assert (code, err, out[:10]) == (0, "", "settings: ") and f"written to {folder}" in out
    assert report["method"] == method                                 # before it, the library was silent
    assert {*FLAGS[script].split(), "command", "versions", "untouched"} <= report.keys()
    told = dict(data="stdlib", split="test", seqlen=64, stride=64, bos=None, tokens=1260, dtype="float32")
    assert report["eval"] == told and "eval" in report["seconds"]
    size = (folder / "model.safetensors").stat().st_size
    assert report["file_bytes"] == size < 0.8 * report["dense_bytes"] < report["peak_memory_bytes"]
    for layer in report["layers"]:                                    # counted again, in what was saved
        (m, n), module, rank = layer["shape"], model.get_submodule(layer["name"]), layer.get("rank", 0)
        nonzeros = module.S.count_nonzero().item() if hasattr(module, "S") else 0
        assert (layer.get("nonzeros", 0), rank) == (nonzeros, len(module.down.weight) if rank else 0)
        kept += m * n if layer["kind"] == "dense" else rank * (m + n) + nonzeros
        dense += m * n
    assert (report["compressible_params"], report["kept_params"]) == (dense, kept)
    assert dense / 2 - 8 * max(sum(layer["shape"]) for layer in report["layers"]) < kept <= dense / 2
    assert report["ppl"].keys() == report["gap"].keys() == ROWS[method] and f" {dense:,} " in out
    for key, ppl in report["ppl"].items():
        gap = math.log(ppl / report["ppl"]["dense"])
        assert re.search(rf" {ppl:.2f} +{gap:.4f} +[0-9,]{{5,}} ", out), key
    assert re.search(rf"\n(SoCo|CAP).* {report['ppl']['compressed']:.2f} .* {kept:,} ", out)


def test_folders_score_the_same_again_and_a_hub_model_on_the_test_split_of_wikitext(ran):
    for method in METHODS:
        (code, out, err), report = ran[1][f"{method} again"], metrics(ran[0] / method)
        found = float(re.match(r"perplexity (\S+)", out)[1])
        assert (code, err, found) == (0, "", pytest.approx(report["ppl"]["compressed"], rel=1e-5))
        assert all(f"{name} {value}" in out for name, value in report["eval"].items())
        assert " --eval stdlib --seqlen 64 --stride 64 --blocks 20\n" in ran[1][method][1]
    report = metrics(ran[0] / "hub")
    assert ran[1]["hub"][::2] == (0, "") and report["calib"] == "wikitext2" == report["eval"]["data"]
    assert report["eval"]["tokens"] == 900 // 64 * 63 and report["ppl"].keys() == ROWS["soco"]
    for key, model in (("dense", tiny_gpt2()), ("compressed", load(ran[0] / "hub"))):
        assert report["ppl"][key] == pytest.approx(perplexity(model, tokens(900, seed=2), 64).ppl, rel=1e-3)


@pytest.mark.parametrize("script", FLAGS)
def test_help_shows_every_flag(script, command):
    code, out, _ = command(script, "--help")
    shown = {flag.replace("-", "_") for flag in re.findall(r"^  --([a-z-]+)", out, re.M)}
    assert (code, shown) == (0, {*FLAGS[script].split()})


@pytest.mark.parametrize("script, flag", [
    ("soco.py", ""), ("rpca.py", ""), ("rpca.py", "--estimator policy ")])
def test_a_run_saves_a_model_at_each_ratio_and_is_repeated_from_its_metrics(script, flag, command, tmp_path):
    line = flag + "--no-baselines --ratio 0.3 0.5 --seed 3 --eval-seqlen 16 --eval-stride 8 --bos"
    line += " --device-map cpu" if importlib.util.find_spec("accelerate") else ""
    code, out, err = command(script, [*line.split(), "--out", "one run"])
    assert (code, err) == (0, "") and out.count("--seqlen 16 --stride 8 --bos 63 --blocks 3\n") == 2
    assert {path.name for path in tmp_path.glob("one run/*")} == {"0.3", "0.5"}
    for ratio in (0.3, 0.5):
        report = metrics(folder := tmp_path / "one run" / str(ratio))
        assert f"python eval_ppl.py --model '{folder}' --eval " in out
        assert report["ratio"] == ratio and report["ppl"].keys() == {"dense", "compressed"}
        assert report["ratios"] == [0.3, 0.5] and report["steps_so_far"] == round(2 * report["steps"] * ratio)
        assert (0.9 - ratio) < report["kept_params"] / report["compressible_params"] <= 1 - ratio
        found = perplexity(load(folder), tokens(1000, seed=1), 16, 8, 3, bos=63).ppl
        assert found == pytest.approx(report["ppl"]["compressed"], rel=1e-4)
    words = ["--ratio", "0.3", "0.5", "--eval", report["eval"]["data"], "--out", "two"]
    for flag in {*FLAGS[script].split()} - {"ratio", "eval", "out"}:
        values = report[flag] if isinstance(report[flag], list) else [report[flag]]
        if values[0] not in (None, False):
            words += ["--" + flag.replace("_", "-"), *([] if values[0] is True else map(str, values))]
    assert command(script, words)[0] == 0
    again = metrics(tmp_path / "two" / "0.5")
    assert (again["ppl"], again["layers"]) == (report["ppl"], report["layers"])


def test_without_out_a_run_takes_a_name_that_no_other_has(command, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "64")                                  # torchrun sets WORLD_SIZE too
    with soco.reserved(tmp_path / "out" / "model-cap-0.5"):            # by a run that has not ended yet
        assert [command("rpca.py", "--no-baselines")[::2] for _ in range(2)] == 2 * [(0, "")]
    assert {path.parent.name[-3:] for path in tmp_path.rglob("metrics.json")} == {"5-2", "5-3"}


# ---- bad input: one line that names it, and nothing written -------------------------------------------
QUANTIZED = [{"quant_method": "gptq", "bits": 4, "group_size": 32}, {"quant_method": "awq", "bits": 4},
             {"quant_method": "bitsandbytes", "load_in_4bit": True}]
CONFIGS = {"width": ("n_embd", "wide"), "heads": ("n_head", 2.5), "layers": ("n_layer", [2]),
           "blockless": ("n_layer", 0), "epsilon": ("layer_norm_epsilon", "x"), "negative": ("n_layer", -1),
           "wordless": ("vocab_size", 0), "unheard": ("model_type", "unheard"), "number": ("model_type", 3)}
CONFIGS |= {quantized["quant_method"]: ("quantization_config", quantized) for quantized in QUANTIZED}
TENSORS = {"nan": lambda tensors: tensors["transformer.h.1.mlp.c_fc.weight"][3, 4].fill_(math.nan),
           "loud": lambda tensors: tensors["transformer.h.1.mlp.c_proj.weight"].fill_(1e38),
           "partial": lambda tensors: tensors.pop("transformer.h.1.attn.c_proj.weight")}
BROKEN = TRICKS | {"beyond": lambda folder: tiny_tokenizer(first=900).save_pretrained(folder),
                   "torn-words": lambda folder: (folder / "tokenizer.json").write_text("{")}
BROKEN |= {name: lambda folder, at=at: edit_config(folder, at[:1], at[1]) for name, at in CONFIGS.items()}
BROKEN |= {name: lambda folder, edit=edit: edit_tensors(folder, edit) for name, edit in TENSORS.items()}


@pytest.fixture(scope="session")
def bad(house, saved, tmp_path_factory):
    """A folder of models and texts that cannot be used."""
    root = tmp_path_factory.mktemp("bad")
    for name, breaks in BROKEN.items():
        breaks(Path(shutil.copytree(house / "model", root / name)))
    for name, key in (("newer", "format"), ("strange", "method")):
        edit_config(Path(shutil.copytree(saved["soco"][0], root / name)), ("compressed", key), 99)
    shutil.copytree(saved["cap"][0], root / "compressed")
    (root / "empty").mkdir()
    (root / "short").write_text("w1 w2 " * 5)
    (root / "binary").write_bytes(bytes(range(256)))
    return root


BAD = {
    "soco.py": """--ratio 0|--ratio 1|--ratio -0.5|--ratio nan|--ratio abc|--ratio|--ratio 0.5 0.3
--out x --ratio 0.4 0.4|--ratio 0.99|--rati 0.5|--batch-size 200000000|--metric-batches 200000000
--seqlen=--|--seqlen 1e3|--steps=--|--batch-size 0|--seqlen 65|--eval-seqlen 65|--eval-stride 65
--eval-blocks 0|--seed x|--seed 99999999999999999999|--steps -1|--device tpu9|--device meta|--device cuda:99
--device-map nowhere|--device-map {|--steps 1.5|--dtype float12|--lr 0|--basis diagonal|--rank-multiple 0
--rounds 3|--pattern 2:4|--overwrite|--out {bad}/newer|--out {bad}/short|--out {bad}/short/new
--calib {bad}/short|--eval {bad}/short|--calib {bad}/nowhere|--calib {bad}/binary|--calib {bad}/empty
--calib wikitext2|--eval {house}/train|--model nobody/none|--model no/such/folder|--model {bad}/compressed
--model {bad}/empty|--bos -1|--bos 64|WORLD_SIZE=x|WORLD_SIZE=0|WORLD_SIZE=3|WORLD_SIZE=2""",
    "rpca.py": """--rank-share 1|--rank-share -0.1|--rounds 0|--rounds=--|--basis plain|--estimator luck""",
    "eval_ppl.py": """--seqlen 1|--seqlen 65|--seqlen 16 --stride 17|--blocks 0|--blocks=--|--eval {bad}/short
--bos 64|--device tpu9|--eval {bad}/binary|--model no/such/folder|--model {bad}/newer
--model {bad}/strange"""}
LINES = [(script, line) for script in BAD for line in re.split(r"[|\n]", BAD[script])]
LINES += [(script, "--model {bad}/" + name) for name in BROKEN for script in ("rpca.py", "eval_ppl.py")]
LINES += [("soco.py", "--device cpu\n")]
NAMED = {"{": "--device-map", "beyond": "tokenizer gives token", "loud": "not finite", "negative": "block",
         "blockless": "block", "0.4": "must rise"}       # named, if not the last word


@pytest.mark.parametrize("script, line", LINES, ids=[f"{script[:4]}-{line}" for script, line in LINES])
def test_bad_input_is_one_line_and_writes_nothing(script, line, command, house, bad, monkeypatch, tmp_path):
    before, word = tree(bad), line.split("=")[0].split("/")[-1].split()[-1]
    line = line.replace("{bad}", str(bad)).replace("{house}", str(house))
    if word == "WORLD_SIZE":
        monkeypatch.setenv(*line.split("="))
        line = "--steps 0"
    code, out, err = command(script, line.split(" "))
    assert code == 2 and err.count("\n") == 1 and err.startswith(f"{script}: error: "), err
    assert NAMED.get(word, word) in err and (out == "" or word == "loud"), err
    assert tree(bad) == before and tree(tmp_path) == []


@pytest.mark.parametrize("place, name", [(eval_ppl, "load_dense"), (soco, "choose")])
@pytest.mark.parametrize("full", [MemoryError(), *map(RuntimeError, [
    "CUDA out of memory. Try", "CUDA error: out of memory\nFor", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"])])
def test_full_memory_is_told_in_one_line(full, place, name, command, monkeypatch, tmp_path):
    monkeypatch.setattr(place, name, mock.Mock(side_effect=full))     # raised outside this project's files
    code, _, err = command("soco.py", "")
    assert (code, err.count("\n"), err[:29], tree(tmp_path)) == (2, 1, "soco.py: error: out of memory", [])


@pytest.mark.parametrize("script, place, name", [
    ("eval_ppl.py", soco, "hashlib"), ("eval_ppl.py", soco, "AutoConfig"), ("soco.py", soco, "choose"),
    ("soco.py", eval_ppl, "check_folder"), ("soco.py", soco, "json"), ("rpca.py", rpca, "refit")])
def test_a_defect_keeps_its_traceback(script, place, name, bad, command, monkeypatch, tmp_path):
    monkeypatch.setattr(place, name, None)
    with pytest.raises((TypeError, AttributeError), match="NoneType"):
        command(script, f"--model {bad}/compressed" if script == "eval_ppl.py" else "")
    assert tree(tmp_path) == []


# ================================ rpca.py ========================================================
def planted(m, n, seed=0, device="cpu"):
    """(L, S): rank max(min(m, n) // 20, 1), and one entry in twenty."""
    k, size = max(min(m, n) // 20, 1), random(m, n, seed=seed, device=device)
    L = random(m, k, seed=seed + 1, device=device) @ random(k, n, seed=seed + 2, device=device)
    return L, 3 * size.sign() * (size.abs() > size.abs().flatten().quantile(0.95))


def product(U, sigma, V, *others):
    return U @ torch.diag_embed(sigma) @ V


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("m, n", [(60, 40), (37, 90), (121, 31), (50, 50)])
def test_planted_low_rank_and_sparse_parts_are_recovered_alone_and_in_a_batch(m, n, dtype, device):
    L, S = (part.to(dtype) for part in planted(m, n, device=device))
    split, k = rpca.rpca(L + S), max(min(m, n) // 20, 1)
    assert (split.U.shape, split.V.shape, split.S.dtype) == ((m, k), (k, n), dtype)
    assert (product(*split) - L).norm() < 1e-5 * L.norm() and (split.S - S).norm() < 1e-5 * S.norm()
    assert torch.equal(split.S != 0, S != 0) and (split.sigma.diff() <= 0).all()
    left = ((L + S - product(*split) - split.S).norm() / (L + S).norm()).item()
    assert split.residuals[-1] == pytest.approx(left, abs=3e-7) and len(split.residuals) < 40
    assert split.residuals[-1] <= 1e-6 < min(split.residuals[:-1])
    for columns in (split.U, split.V.T):
        assert_close(columns.T @ columns, torch.eye(k).to(columns), rtol=0, atol=1e-5)
    several = torch.stack([1e3 * (L + S), L + S, 0 * L, L, random(m, n).to(L) ** 3]).view(5, 1, m, n)
    together, scales = rpca.rpca(several), [1e3, 1, 0]                # the last takes much longer
    for scale, one_L, one_S in zip(scales, product(*together)[:, 0], together.S[:, 0]):
        assert (one_L - scale * L).norm() + (one_S - scale * S).norm() <= 2e-5 * scale * (L + S).norm()
    assert not together.S[3].any()


@pytest.mark.parametrize("iterations, above", [(10, 1e-3), (60, 1e-4), (300, 1e-5)])
@pytest.mark.parametrize("m, n", [(60, 40), (37, 90)])
def test_the_objective_is_the_textbooks_with_its_penalty_and_no_more_without(m, n, iterations, above, device):
    noise, lam = random(m, n, device=device), max(m, n) ** -0.5
    objective = lambda L, S: (torch.linalg.svdvals(L.double()).sum() + lam * S.double().abs().sum()).item()
    for W in (noise, noise ** 3, sum(planted(m, n, device=device))):
        S, Y, mu = torch.zeros_like(W), torch.zeros_like(W), W.numel() / (4 * W.abs().sum().item())
        for _ in range(iterations):                 # ADMM with a full SVD
            U, sigma, V = torch.linalg.svd(W - S + Y / mu, full_matrices=False)
            L = product(U, (sigma - 1 / mu).clamp_min(0), V)
            S = F.softshrink(W - L + Y / mu, lam / mu)
            Y = Y + mu * (W - L - S)
        for dtype, rounding in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
            held = rpca.rpca(W.to(dtype), penalty=mu, tol=0, max_iter=iterations)
            assert objective(product(*held), held.S) == pytest.approx(objective(L, S), rel=rounding)
            grown = rpca.rpca(W.to(dtype), tol=1e-7, max_iter=iterations)
            assert objective(product(*grown), grown.S) <= objective(L, S) * (1 + above)
    for given in (0, 0.05):                                           # lam of the caller's
        first = rpca.rpca(W, given, penalty=mu, max_iter=1)
        assert_close(first.S, rpca.soft_threshold(W - product(*first), given / mu))


@pytest.mark.parametrize("m, n", [(7, 5), (5, 11), (1, 6), (6, 1)])
@pytest.mark.parametrize("operator, size", [(rpca.soft_threshold, torch.abs),
    (lambda A, tau: product(*rpca.singular_value_threshold(A, tau)), torch.linalg.svdvals)], ids=["S", "L"])
def test_thresholding_is_the_minimiser_of_its_problem(operator, size, m, n, device):
    A = random(m, n, device=device)
    for tau, i in itertools.product((0.3, 1.0, 3.0, 100.0), range(12)):
        X, D = operator(A, tau), 10.0 ** -(i % 3) * random(m, n, seed=20 + i, device=device)
        change = tau * (size(X + D).sum() - size(X).sum()) + ((X + D - A) ** 2 - (X - A) ** 2).sum() / 2
        assert change >= D.square().sum() / 2 - 1e-9        # at least: the problem is strongly convex


@pytest.mark.parametrize("m, n", [(120, 150), (150, 120)])
def test_a_nearby_span_only_makes_thresholding_cheaper(m, n, device, monkeypatch):
    A, sizes, eigh = torch.stack([sum(planted(m, n, s, device)) for s in (0, 7)]), [], torch.linalg.eigh
    sigma = torch.linalg.svdvals(A)
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: sizes.append(gram.shape[-1]) or eigh(gram))
    for tau in (1.01 * sigma[:, 6].max().item(), 0.5 * sigma.median().item()):    # planted rank, many more
        exact = product(*rpca.singular_value_threshold(A, tau))
        found = product(*rpca.singular_value_threshold(A, tau, nearby=rpca.leading_range(A)))
        assert (found - exact).norm() < 1e-3 * A.norm()
    assert sizes == [120, 20, 120, 20, 120]                           # too small a span is noticed


@pytest.mark.parametrize("m, n", [(60, 80), (80, 60), (4, 7)])
def test_leading_range_holds_the_leading_directions_and_starts_alike_on_any_device(m, n, device):
    U = torch.linalg.qr(random(m, 3))[0]
    A = 100 * U @ random(3, n, seed=1) + random(m, n, seed=2)
    for start in ([], [random(m, 5, seed=3)]):
        on_cpu = rpca.leading_range(A, *start)
        with torch.device("meta"):                     # a default device of the caller's decides nothing
            basis = rpca.leading_range(A.to(device), *(part.to(device) for part in start)).cpu()
        assert_close(basis @ basis.T, on_cpu @ on_cpu.T, rtol=0, atol=1e-10)
        assert_close(basis.T @ basis, torch.eye(basis.shape[1]).to(basis), rtol=0, atol=1e-12)
        assert (U - basis @ (basis.T @ U)).norm() < 0.02


def test_score_function_and_policy_gradient_are_reinforce_by_autograd(device):
    loss_of = lambda masks, step: 0.1 * masks[1].sum().item() - masks[0][1].item() + 0.05 * step
    p = [torch.full(shape, 0.3, dtype=torch.float64, device=device) for shape in [(3,), (2, 5)]]
    draws, again, losses = torch.Generator(device).manual_seed(0), torch.Generator(device).manual_seed(0), []
    found, found_losses = rpca.policy_gradient(loss_of, p, [4, 1], 6.1, range(9), lr=0.01, generator=draws)
    for step in range(9):
        masks = [torch.bernoulli(q, generator=again) for q in p]
        losses.append(loss_of(masks, step))
        better = np.mean(losses[-6:-1] or losses) - losses[-1]        # than the mean of the five before
        p = [q.requires_grad_() for q in p]
        chance = sum(torch.distributions.Bernoulli(q).log_prob(mask).sum() for q, mask in zip(p, masks))
        score, p = torch.autograd.grad(chance, p), [q.detach() for q in p]
        assert_close([rpca.score_function(mask, q) for q, mask in zip(p, masks)], list(score))
        p = rpca.project([q + 0.01 * better * s for q, s in zip(p, score)], [4, 1], 6.1)
    assert found_losses == losses and p[0].max() - p[0].min() > 0.01
    assert_close(found, p, rtol=1e-12, atol=0)
    with pytest.raises(FloatingPointError, match="draw 3"):
        rpca.policy_gradient(lambda masks, step: math.nan if step == 2 else 1.0, p, [4, 1], 6.1, range(3))


@pytest.mark.parametrize("spread", [0.2, 3.0, 30.0])
@pytest.mark.parametrize("budget", [0, 0.7, 4, 9.5, 100])
def test_project_gives_the_nearest_point_of_the_budget(budget, spread, device):
    for seed in range(5):
        q, costs = 0.5 + spread * random(6, seed=seed, device=device), [5, 5, 1, 1, 1, 1]
        x = torch.cat([part.flatten() for part in rpca.project([q[:2], q[2:].view(2, 2)], [5, 1], budget)])
        assert x.min() >= 0 and x.max() <= 1 and torch.dot(x, torch.tensor(costs).to(x)) <= budget + 1e-12
        # x is nearest if no point of the budget lies further in the direction of q: a knapsack of fractions
        left, furthest = budget, 0
        for gain, c in sorted(zip((q - x).tolist(), costs), key=lambda item: -item[0] / item[1]):
            taken = min(1, left / c) if gain > 0 else 0
            left, furthest = left - taken * c, furthest + taken * gain
        assert furthest - torch.dot(q - x, x).item() <= 1e-9 * (1 + spread)


@pytest.mark.parametrize("levels", [3, 1000])
def test_keep_most_probable_is_the_greedy_loop(levels, device):
    shapes, cost = [(3,), (2, 4), (2,), (3, 3)], [5, 1, 3, 1]
    for seed, budget in itertools.product(range(20), [0, 0.9, 4, 7.5, 11, 20, 37, 38, 100]):
        p = [(random(*shape, seed=100 * seed + i, device=device).sigmoid() * levels).round().float() / levels
             for i, shape in enumerate(shapes)]
        each = [c for q, c in zip(p, cost) for _ in range(q.numel())]
        flat = torch.cat([q.flatten() for q in p]).tolist()
        left, expected = budget, [False] * len(flat)
        for i in sorted(range(len(flat)), key=lambda i: -flat[i]):
            if each[i] <= left:
                expected[i], left = True, left - each[i]
        masks = rpca.keep_most_probable(p, cost, budget)
        assert torch.cat([mask.flatten() for mask in masks]).tolist() == expected


def test_threshold_is_what_sorting_finds(device):
    a, b, extremes = random(40, 5).T, random(13, seed=1), torch.tensor([1e-40, 1e-45, 0, 0, 3e38])
    for values in ([a ** 2, b ** 2], [(2 * a).round() ** 2, b.round() ** 2], [(30 * a).exp(), extremes]):
        values = [value.to(device).float() for value in values]
        falling = torch.cat([value.flatten() for value in values]).sort(descending=True)[0].tolist()
        for count in [*range(0, len(falling), 7), len(falling) - 1, len(falling)]:
            assert rpca.threshold(lambda: iter(values), count) == [*falling, -1][count]


@pytest.mark.parametrize("dtype, slack", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("m, n", [(7, 5), (5, 11), (1, 6), (6, 1)])
def test_refit_falls_to_the_least_squares_of_every_row(m, n, dtype, slack, device):
    T, start, x = (random(size, n, seed=size, device=device).to(dtype) for size in (m, m, n))
    mask, G, eye = random(m, n, device=device) > 0, x.T @ x, torch.eye(n, dtype=dtype, device=device)
    errors, H = [], G + 1e-2 * G.diagonal().mean() * eye
    for iterations in [*range(10), 2 * n]:
        S = rpca.refit(T, start, mask, G, iterations)
        assert S.dtype == dtype and not S[~mask].any()
        errors.append(((T - S) @ H @ (T - S).T).trace().item())
    assert all(after <= before * (1 + slack) for before, after in itertools.pairwise(errors))
    root = torch.linalg.cholesky(H)                                   # |(t - s) root|^2, row by row
    for row, kept, target in zip(S, mask, T):
        if kept.any():
            exact = torch.linalg.lstsq(root[kept].T, root.T @ target[:, None]).solution[:, 0]
            assert_close(row[kept], exact, rtol=100 * slack, atol=100 * slack)
    assert_close(rpca.refit(T, T, mask, eye[:1].T @ eye[:1]), T * mask)         # all inputs but one are zero


@pytest.mark.parametrize("m, n, k", [(20, 30, 1), (31, 17, 3)])
def test_alternating_never_raises_the_error(m, n, k, device):
    Q, parameters = random(m, n, device=device) ** 3, m * n // 2
    V, dropped = torch.linalg.svd(Q)[2][:k], m * n - parameters + k * (m + n)
    found = [torch.mm(*rpca.alternate(Q, V, parameters, rounds)) for rounds in range(8)]
    left = Q - found[0]
    left = Q - left * (left.abs() >= left.abs().flatten().sort()[0][dropped])     # for L of the first round
    basis = torch.linalg.qr(left @ V.T)[0]
    assert_close(found[:2], [Q @ V.T @ V, basis @ basis.T @ left])
    errors = [(Q - L).abs().flatten().sort()[0][:dropped].square().sum().item() for L in found]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize("m, n, k, bias", [(7, 5, 2, True), (5, 11, 0, True), (1, 6, 1, False)])
def test_a_sum_layer_answers_learns_and_is_stored_as_its_weight(m, n, k, bias, device):
    U, V, S, x, b = (random(*shape, device=device) for shape in [(m, k), (k, n), (m, n), (4, n), (m,)])
    S, b = (S * (S > 0)).requires_grad_(), b if bias else None
    layer, W = rpca.low_rank_plus_sparse(U, V, S.clone(), b, like=S), (U @ V + S).detach().requires_grad_()
    layer(x).square().sum().backward()
    F.linear(x, W, b).square().sum().backward()
    assert_close(layer.S.grad, W.grad * (S != 0))                     # zeros get no gradient, and stay zero
    assert k == 0 or (layer.up.weight.grad - W.grad @ V.T).norm() < 1e-9
    torch.optim.SGD([layer.S], lr=0.1).step()
    layer.S.data.mul_(2)
    with torch.no_grad():
        assert_close(layer(x), F.linear(x, U @ V + 2 * (S - 0.1 * layer.S.grad), b))
    stored, state = rpca.pack(layer.S.detach()), layer.state_dict()
    assert np.array_equal(stored["mask"].cpu(), np.packbits(S.detach().cpu() != 0, bitorder="little"))
    new = rpca.LowRankPlusSparse(n, m, k, len(stored["values"]), bias, dtype=S.dtype, device=device)
    new.load_state_dict({key: state[key] for key in state if key != "S"} | stored)
    new.S, new.values, new.mask = new.unpack(new.values, new.mask), None, None
    assert torch.equal(new.S, layer.S) and torch.equal(new(x), layer(x))
    for one in (layer, new):                                          # S once, dense, and the marker
        places = [place for part in one.modules() for place in (vars(part), part._parameters, part._buffers)]
        held = [value.numel() for place in places for value in place.values() if torch.is_tensor(value)]
        assert sum(held) == m * n + k * (m + n) + m * bias + 1


def test_the_worths_of_a_row_add_up_to_the_second_differences_of_the_loss(monkeypatch):
    # of texts of one token, whose labels are drawn in exact proportion to their probability
    monkeypatch.setattr(soco, "draw", lambda p, batch, length, generator: torch.searchsorted(
        p.cumsum(-1), (torch.arange(batch)[:, None] + 0.5) / batch)[:, 0])
    model, ids = tiny_gpt2(), tokens(5, 1)
    drafts = rpca.drafted(model, block_layers(model), [one.expand(4000, 1) for one in ids])
    dense = logits(model.double(), ids)
    for draft in drafts:
        W, worth = matrix(draft.layer), draft.worth()
        for i in (int(worth.sum(1).argmax()), draft.m - 1):
            curvature = 0
            for j, w in enumerate(W[i].tolist()):
                for step in (0.01, -0.01):
                    W[i, j] = (1 + step) * w
                    curvature += divergence([dense], model, [ids]) / step ** 2
                W[i, j] = w
            assert worth[i].sum().item() == pytest.approx(curvature, rel=0.02, abs=1e-9)


def test_l_is_given_only_where_it_lowers_the_predicted_loss():
    x, g = random(200, 40, seed=8).float(), random(200, 60, seed=9).float()
    moments = x.T @ x / 200, (g ** 2).mean(0)
    layers = [SimpleNamespace(weight=W.float()) for W in (sum(planted(60, 40)), random(60, 40) ** 3)]
    drafts = [rpca.Draft(layer, *moments) for layer in layers]
    rpca.set_ranks(drafts, 0.5, 0.2, False)
    assert [draft.U.shape[1] for draft in drafts] == [2, 0]
    for draft, chosen in zip(drafts, (2, 0)):
        Q, losses = draft.scaled(draft.layer.weight), {}
        for k in (0, 2):
            U, V = rpca.alternate(Q, torch.linalg.svd(Q)[2][:k], 1200) if k else (Q[:, :0], Q[:0])
            T = draft.layer.weight - U @ V / draft.rows[:, None] / draft.columns
            worth = draft.scaled(T) ** 2
            mask = worth >= worth.flatten().sort(descending=True)[0][1200 - 100 * k - 1]
            E = T - rpca.refit(T, T, mask, draft.G, iterations=6)
            losses[k] = ((E @ draft.G * E).sum(1) * (g ** 2).mean(0)).sum().item()
            assert draft.loss_with(U, V, 1200, draft.G).item() == pytest.approx(losses[k], rel=1e-3)
        assert losses[chosen] < losses[2 - chosen]


def test_matrices_are_split_in_a_batch_as_one_by_one(make, monkeypatch):
    found, sizes, split = [], {1: [], 2 ** 26: []}, rpca.rpca
    for entries in sizes:
        monkeypatch.setattr(rpca, "RPCA_BATCH", entries)
        monkeypatch.setattr(rpca, "rpca", lambda Q, **how: sizes[entries].append(len(Q)) or split(Q, **how))
        torch.manual_seed(0)
        drafts = rpca.drafted(model := make(), block_layers(model), [tokens(2, 16)])
        rpca.set_ranks(drafts, 0.7, 0.3, False)
        found.append([draft.U @ draft.V for draft in drafts])
    assert_close(*found, rtol=1e-3, atol=1e-5)
    assert max(sizes[1]) == 1 < max(sizes[2 ** 26]) and sum(sizes[1]) == sum(sizes[2 ** 26])


def test_a_round_keeps_the_worthiest_and_refits_with_every_g_moved_once(make):
    drafts, far, moves = rpca.drafted(model := make(), block_layers(model), [tokens(8, 32)]), {}, []
    refitted, rounds = ([copy.copy(draft) for draft in drafts] for _ in range(2))
    for some in (drafts, refitted):
        worths = [draft.scaled(matrix(draft.layer)) ** 2 for draft in some]
        cuts = [worth.sort(dim=1)[0][:, worth.shape[1] // 2 - 1, None] for worth in worths]
        worth = torch.cat([(worth / cut.sqrt()).flatten() for worth, cut in zip(worths, cuts)])
        rpca.choose_by_metric(some, 0.5, 1, False, False)
        kept = torch.cat([draft.S.flatten() for draft in some]) != 0
        assert kept.sum() == len(kept) // 2 and worth[kept].min() > worth[~kept].max()
    for draft in refitted:
        there = mock.Mock(to=lambda device, G=draft.G: moves.append(G) or G)
        draft.G = far.setdefault(draft.G, there)
    rpca.refit_all(refitted)
    assert len(moves) == len(far) == 8                                # Llama's q, k and v share one
    rpca.choose_by_metric(rounds, 0.5, 8, True, False)
    losses = [0, 0, 0]
    for draft, *others in zip(drafts, refitted, rounds):
        assert_close(others[0].S, rpca.refit(draft.target(), draft.S, draft.S != 0, draft.G))
        for i, S in enumerate([draft.S, others[0].S, others[1].S]):
            E = draft.rows[:, None] * (draft.target() - S)
            losses[i] += (E @ draft.G * E).sum().item()
    assert losses[2] < 0.95 * losses[1] < 0.95 ** 2 * losses[0]


def gpt2_with_planted_and_dead_layers():
    first, second = (model := tiny_gpt2()).transformer.h
    matrix(first.attn.c_attn).copy_(0.1 * sum(planted(72, 24)))
    first.mlp.c_fc.weight.data.zero_()
    first.mlp.c_fc.bias.data.fill_(-1000)
    second.mlp.c_proj.weight.data.zero_()
    return model


@pytest.mark.parametrize("settings", [{}, {"rank_share": 0.3, "refitted": False, "steps": 0},
    {"scale": False, "rounds": 2}, {"estimator": "policy"}])
@pytest.mark.parametrize("make", [*MODELS, gpt2_with_planted_and_dead_layers])
def test_compress_meets_the_budget_with_the_weights_that_it_says(make, settings):
    for ratio in (0.2, 0.5, 0.8):
        dense, model, again, stored, total = make(), make(), make(), 0, 0
        for compressed in (model, again):
            torch.manual_seed(0)
            rpca.compress(compressed, [tokens(2, 16), tokens(2, 16, seed=1)], ratio, **settings)
        for name, layer in block_layers(dense).items():
            new, spec = model.get_submodule(name), model.config.compressed["layers"][name]
            U, V = (new.up.weight, new.down.weight) if new.up else (new.S[:, :0], new.S[:0])
            W, kept = (new.S + U @ V).detach(), new.S != 0
            if "refitted" in settings:                                # L and S make up what is kept
                assert_close(W[kept], matrix(layer)[kept], rtol=1e-4, atol=1e-5)
            matrix(layer).copy_(W)
            assert (int(new.S.count_nonzero()), len(V)) == (spec["nonzeros"], spec["rank"])
            stored += int(new.S.count_nonzero()) + U.numel() + V.numel()
            total += new.S.numel()
        assert stored <= (1 - ratio) * total and (make not in MODELS or stored > (1 - ratio) * total - 1)
        assert_close(logits(model, tokens(3, 20)), logits(dense, tokens(3, 20)), rtol=1e-4, atol=1e-4)
        assert torch.equal(logits(model, tokens(3, 20)), logits(again, tokens(3, 20)))


def test_the_gradient_of_a_gain_does_not_overflow_float16():
    layer = make_layer("linear without bias", 4, 4).half()
    layer.weight.data.copy_(torch.eye(4))
    draft = rpca.Draft(layer, torch.eye(4), torch.ones(4)).requires_grad_()
    draft(torch.full((2048, 4), 100.0).half()).sum(dtype=torch.float32).backward()
    assert draft.a.grad.tolist() == draft.c.grad.tolist() == [204_800.0] * 4


@pytest.mark.parametrize("tenths", [3, 5, 8, 9])
@pytest.mark.parametrize("m, n", [(7, 5), (5, 11), (20, 20)])
def test_baselines_keep_the_largest_and_as_much_as_the_ratio_leaves(m, n, tenths):
    W, D, rank = random(m, n), random(n, seed=1).abs(), max((10 - tenths) * m * n // (10 * (m + n)), 1)
    assert soco.truncated(make_layer("linear", m, n), *factor(W), tenths / 10).spec["rank"] == rank
    cut = sorted(W.abs().flatten().tolist(), reverse=True)[m * n * (10 - tenths) // 10 - 1]
    assert torch.equal(rpca.magnitude(W, None, tenths / 10), W * (W.abs() >= cut))
    for row, kept in zip(W.tolist(), rpca.wanda(W, (D ** 2).diag(), tenths / 10).tolist()):
        best = sorted(range(n), key=lambda i: -abs(row[i]) * D[i].item())[:n * (10 - tenths) // 10]
        assert kept == [w if i in best else 0 for i, w in enumerate(row)]


@pytest.mark.parametrize("m, n, block", [(6, 12, 4), (9, 10, 128), (5, 7, 3)])
def test_sparsegpt_makes_up_for_each_column_by_the_inverse_of_what_is_left(m, n, block):
    W, x = random(m, n), random(60, n, seed=1) @ random(n, n, seed=2)
    G = x.T @ x / 60
    H, expected = G + 0.01 * G.diagonal().mean() * torch.eye(n), W.clone()
    for j in range(n):
        if j % block == 0:
            rows = [torch.linalg.inv(H[i:, i:])[0] for i in range(j, min(j + block, n))]
            saliency = expected[:, j:j + block] ** 2 / torch.stack([row[0] for row in rows])
            drop = saliency <= saliency.flatten().sort()[0][round(0.5 * saliency.numel()) - 1]
        row = rows[j % block]
        expected[:, j:] -= torch.outer(expected[:, j] * drop[:, j % block] / row[0], row)
    assert_close(sparsegpt(W, G, 0.5, damping=0.01, block=block), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("rank_share", [0, 0.25, 0.6])
@pytest.mark.parametrize("m, n", [(40, 60), (61, 39)])
def test_oats_ends_at_the_error_that_a_full_svd_and_sorting_reach(m, n, rank_share):
    W, D, S = random(m, n) ** 3, random(n, seed=1).abs() + 0.1, torch.zeros(m, n)
    A, rank, entries = W * D, int(rank_share * (m * n // 2) / (m + n)), int((1 - rank_share) * n / 2 + 1e-6)
    for _ in range(80):
        U, sigma, V = torch.linalg.svd(A - S)
        L = U[:, :rank] * sigma[:rank] @ V[:rank]
        S = (A - L) * ((A - L).abs() >= (A - L).abs().sort(1)[0][:, -entries, None])
    assert rank * (m + n) + S.count_nonzero() <= 0.5 * m * n
    error = (A - oats(W, (D ** 2).diag(), 0.5, rank_share) * D).norm().item()
    assert error == pytest.approx((A - L - S).norm().item(), rel=0.01)
