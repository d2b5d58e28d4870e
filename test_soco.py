"""Tests of soco.py, rpca.py, eval_ppl.py and common/: `pytest -q`, without a network and with or without a
GPU.

Every expected value is computed here a second way, by a slower or plainer formula; none was recorded from a
run.
"""
import contextlib
import copy
import gc
import http.server
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import weakref
import zipfile
from fractions import Fraction
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"                # read once, on import: no test may reach for the network

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast, pipeline)
from transformers.pytorch_utils import Conv1D

import eval_ppl
import rpca
import soco
from bench import baselines
from bench.ablate import same_share_of_matrices, same_share_of_rows
from common import UserError, cli, metric, sparse
from common.cli import sample_blocks
from common.layers import block_layers, dense_like, enable_checkpointing, matrix, swap, swapped, untouched
from common.metric import collect_metric
from eval_ppl import encode, perplexity
from soco import (BASES, KLDivergence, LowRankLinear, ScoredLinear, choose, compress, compressed_layers, factor, load, save,
                  stored_numbers, truncate)

ROOT = Path(__file__).resolve().parent
VOCAB = 64
RPCA_LINE = "--model {house}/model --calib {house}/train --eval {house}/test --seqlen 16 --metric-batches 2 --eval-blocks 3 "
SHAPES = [(7, 5), (5, 11), (8, 8), (1, 6), (6, 1)]
KINDS = ["linear", "linear without bias", "conv1d"]


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    return torch.device(request.param)


def random(*shape, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def tokens(*shape, seed=0, device="cpu"):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def make_layer(kind, m, n, device="cpu"):
    layer = Conv1D(m, n) if kind == "conv1d" else nn.Linear(n, m, bias=kind == "linear")
    layer = layer.double()
    layer.weight.data = random(*layer.weight.shape, seed=1)
    if layer.bias is not None:
        layer.bias.data = random(m, seed=2)
    return layer.to(device)


def tiny_gpt2(**config):
    torch.manual_seed(0)
    config = {"n_layer": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2} | config
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=24, n_head=2, bos_token_id=0, eos_token_id=0,
                                      **config)).eval()


def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                                        bos_token_id=0, eos_token_id=0, initializer_range=0.2)).eval()


MODELS = [tiny_gpt2, tiny_llama]


def tiny_tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w0")


def text(count, seed):
    return " ".join(f"w{i}" for i in tokens(count, seed=seed))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def divergence(dense_logits, model, batches):
    """Mean of KL(dense || model) over batches, by the plain formula."""
    values = [F.kl_div(logits(model, ids).log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="sum") / ids.numel()
              for dense, ids in zip(dense_logits, batches)]
    return torch.stack(values).mean().item()


def students_of(model, basis, batches):
    """{layer: ScoredLinear} with every component kept."""
    layers = block_layers(model)
    metrics = collect_metric(model, layers, batches)
    return {layer: ScoredLinear(layer, *soco.decompose(layer, metrics[name], basis)) for name, layer in layers.items()}


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def run_script(script, *args, cwd, **environment):
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd, env=os.environ | environment,
                          capture_output=True, text=True, timeout=300)


# ---- mathematics --------------------------------------------------------------------------------

def metric_of(basis, m, n, device):
    """Random inputs x [60, n], output weights R [m], and the G and R that a basis takes."""
    x, R = random(60, n, seed=3, device=device), random(m, seed=4, device=device).square()
    return x, R, None if basis == "plain" else x.T @ x / len(x), R if basis == "two-sided" else None


@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("basis", BASES)
def test_factors_multiply_back_to_the_weight(basis, m, n, device):
    W = random(m, n, device=device)
    *_, G, R = metric_of(basis, m, n, device)
    U, sigma, V = factor(W, G, R)
    assert (U.shape, sigma.shape, V.shape) == ((m, min(m, n)), (min(m, n),), (min(m, n), n))
    torch.testing.assert_close((U * sigma) @ V, W, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("basis", BASES)
def test_sigma_are_the_singular_values_in_the_metric(basis, m, n, device):
    W = random(m, n, device=device)
    x, rows, G, R = metric_of(basis, m, n, device)
    outputs = W @ x.T / len(x) ** 0.5
    scaled = {"plain": W, "whitened": outputs, "two-sided": rows.sqrt()[:, None] * outputs}[basis]
    sigma = factor(W, G, R, damping=1e-13)[1]
    torch.testing.assert_close(sigma, torch.linalg.svdvals(scaled)[:len(sigma)], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("basis", BASES)
def test_truncation_costs_the_energy_of_what_it_drops(basis, m, n, device):
    W = random(m, n, device=device)
    x, rows, G, R = metric_of(basis, m, n, device)
    U, sigma, V = factor(W, G, R, damping=1e-13)
    for k in range(len(sigma)):
        change = W - (U[:, :k] * sigma[:k]) @ V[:k]
        outputs = (x @ change.T).square().mean(0)
        measured = {"plain": change.square().sum(), "whitened": outputs.sum(), "two-sided": rows @ outputs}[basis]
        torch.testing.assert_close(measured, sigma[k:].square().sum(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("m, n", SHAPES)
def test_whitened_truncation_never_loses_on_the_calibration_output(m, n, device):
    W = random(m, n, device=device)
    x = random(60, n, seed=5, device=device) @ random(n, n, seed=6, device=device)
    errors = {}
    for basis, G in [("plain", None), ("whitened", x.T @ x / len(x))]:
        U, sigma, V = factor(W, G, damping=1e-13)
        errors[basis] = [(x @ (W - (U[:, :k] * sigma[:k]) @ V[:k]).T).square().sum() for k in range(len(sigma))]
    assert all(ours <= theirs * (1 + 1e-9) for ours, theirs in zip(errors["whitened"], errors["plain"]))
    if min(m, n) > 1:
        assert sum(errors["whitened"]) < 0.9 * sum(errors["plain"])


@pytest.mark.parametrize("W, G, R", [
    (torch.zeros(4, 6), None, None),
    (torch.ones(4, 6), torch.ones(6, 6), None),
    (random(4, 6), torch.zeros(6, 6), None),
    (random(4, 6), torch.eye(6), torch.zeros(4)),
    (random(4, 6), torch.diag(torch.tensor([1e6, 1.0, 1e-6, 0.0, 0.0, 0.0])), torch.tensor([1.0, 0.0, 0.0, 1e-9])),
], ids=["zero weight", "rank one", "inputs all zero", "gradients all zero", "both mostly zero"])
def test_a_degenerate_metric_still_gives_the_weight_back(W, G, R):
    U, sigma, V = factor(W, G, R)
    torch.testing.assert_close((U * sigma) @ V, W.double(), rtol=1e-6, atol=1e-6)


def test_stored_numbers_counts_two_factors_or_one_dense_matrix(device):
    for m, n in SHAPES:
        for k in range(min(m, n) + 1):
            counted = min(torch.empty(m, k).numel() + torch.empty(k, n).numel(), torch.empty(m, n).numel())
            assert stored_numbers(*torch.tensor([k, m, n], device=device)) == counted


CHOICES = [(4, 30), (5, 5), (9, 6)]


def spectra(seed, device="cpu"):
    return [(2 * random(min(shape), seed=100 * seed + i, device=device)).exp() for i, shape in enumerate(CHOICES)]


def cost_of(ranks):
    return sum(min(k * (m + n), m * n) for k, (m, n) in zip(ranks, CHOICES))


def value_of(ranks, worth):
    """Worth of the best `ranks` components of each matrix, and of all of them where it would be stored
    dense."""
    kept = [len(w) if k * (m + n) >= m * n else k for k, w, (m, n) in zip(ranks, worth, CHOICES)]
    return sum(w.sort(descending=True)[0][:k].sum().item() for k, w in zip(kept, worth))


def corners(points):
    """The points (cost, value) on the upper concave hull: what no mixture of two others beats at its cost."""
    corner = max(points, key=lambda point: (-point[0], point[1]))
    yield corner
    while better := [point for point in points if point[1] > corner[1]]:
        corner = max(better, key=lambda point: ((point[1] - corner[1]) / (point[0] - corner[0]), point[0]))
        yield corner


def chosen_ranks(worth, budget):
    device = worth[0].device
    keep = choose(worth, *torch.tensor(CHOICES, device=device).T, budget)
    for w, kept in zip(worth, keep):
        assert kept.dtype == torch.bool and kept.shape == w.shape
        assert kept.all() or w[kept].min() >= w[~kept].max()
    return [kept.sum().item() for kept in keep]


@pytest.mark.parametrize("seed", range(3))
def test_choose_spends_every_budget_and_no_more(seed, device):
    worth = spectra(seed, device)
    ranks = [range(1, min(shape) + 1) for shape in CHOICES]
    best = list(corners([(cost_of(k), value_of(k, worth)) for k in itertools.product(*ranks)]))
    for budget in range(best[0][0], best[-1][0] + 5):
        k = chosen_ranks(worth, budget + 0.5)
        left = budget - cost_of(k)
        more = [cost_of([k_ + (i == j) for j, k_ in enumerate(k)]) - cost_of(k) for i in range(3) if k[i] < min(CHOICES[i])]
        assert left >= 0
        assert all(extra > left for extra in more)
        assert all(k_ * (m + n) < m * n or k_ == min(m, n) for k_, (m, n) in zip(k, CHOICES))
        assert value_of(k, worth) >= max(value for cost, value in best if cost <= budget) - 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_choose_is_optimal_wherever_one_price_meets_the_budget(seed, device):
    worth = spectra(seed, device)
    ranks = [range(1, min(shape) + 1) for shape in CHOICES]
    best = list(corners([(cost_of(k), value_of(k, worth)) for k in itertools.product(*ranks)]))
    assert len(best) > 4
    for budget, value in best:
        assert value_of(chosen_ranks(worth, budget), worth) == pytest.approx(value, rel=1e-12)


def test_choose_goes_dense_where_that_costs_no_more():
    worth, sides = [torch.tensor([4.0, 3.0, 2.0, 1.0])], (torch.tensor([4]), torch.tensor([4]))
    assert choose(worth, *sides, 15)[0].tolist() == [True, False, False, False]
    assert choose(worth, *sides, 16)[0].tolist() == [True, True, True, True]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_kl_divergence_and_its_gradient_match_the_plain_formula(dtype, tolerance, device):
    teacher, student = (3 * random(2, 5, 11, seed=seed, device=device).to(dtype) for seed in (0, 1))
    ours, plain = student.clone().requires_grad_(), student.double().requires_grad_()
    loss = KLDivergence.apply(teacher, ours)
    expected = F.kl_div(plain.log_softmax(-1), teacher.double().log_softmax(-1), log_target=True, reduction="sum") / 10
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad.double(), plain.grad, rtol=tolerance, atol=tolerance * plain.grad.abs().max().item())


# ---- layers -------------------------------------------------------------------------------------

def scored(kind, m, n, basis="plain", device="cpu"):
    """(layer, its ScoredLinear, inputs [4, n]), the weights and inputs in float64."""
    layer = make_layer(kind, m, n, device)
    *_, G, R = metric_of(basis, m, n, device)
    return layer, ScoredLinear(layer, *factor(matrix(layer), G, R)), random(4, n, seed=7, device=device)


@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("basis", BASES)
def test_scores_of_one_and_full_rank_give_the_layer_back(basis, kind, m, n, device):
    layer, student, x = scored(kind, m, n, basis, device)
    torch.testing.assert_close(student(x), layer(x), rtol=1e-9, atol=1e-9)
    finished = student.finish()
    assert type(finished) is type(layer)
    torch.testing.assert_close(matrix(finished), matrix(layer), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(finished(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_scores_and_deviation_match_finite_differences(kind, device):
    _, student, x = scored(kind, 7, 5, "two-sided", device)
    target, student = random(4, 7, seed=8, device=device), student.double()
    student.S.data, student.d.data = 1 + 0.3 * random(5, seed=9, device=device), random(7, seed=10, device=device)

    def loss():
        return (student(x) - target).square().sum()

    loss().backward()
    for parameter in (student.S, student.d):
        for i, gradient in enumerate(parameter.grad.tolist()):
            values = []
            for step in (0.25, -0.5):
                parameter.data[i] += step
                values.append(loss().item())
            parameter.data[i] += 0.25
            assert gradient == pytest.approx((values[0] - values[1]) / 0.5, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_score_gets_the_gradient_of_coming_back(kind, device):
    layer, student, x = scored(kind, 5, 11, "whitened", device)
    student = student.double()
    target, parts = random(4, 5, seed=8, device=device), student.U.T[:, :, None] * student.V[:, None]
    student.kept[::2] = 0
    y = student(x)
    bias = 0 if layer.bias is None else layer.bias
    torch.testing.assert_close(y, x @ parts[1::2].sum(0).T + bias, rtol=1e-9, atol=1e-9)
    (y - target).square().sum().backward()
    for part, gradient in zip(parts, student.S.grad.tolist()):
        up, down = ((y + step * (x @ part.T) - target).square().sum().item() for step in (0.5, -0.5))
        assert gradient == pytest.approx(up - down, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("kept", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_answers_like_what_learned(kind, kept, m, n, device):
    layer, student, x = scored(kind, m, n, "two-sided", device)
    student.S.data, student.d.data = (random(size, seed=9, device=device).float() for size in (min(m, n), m))
    student.kept[kept:] = 0
    expected, k = student(x), min(kept, m, n)
    finished = student.finish()
    torch.testing.assert_close(finished(x), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(finished, LowRankLinear) == (k * (m + n) < m * n)
    assert sum(p.numel() for p in finished.parameters()) == min(k * (m + n), m * n) + m


def test_components_dropped_for_good_leave_the_factors():
    _, student, x = scored("linear", 7, 5)
    student.kept[[0, 3]] = 0
    expected = student(x)
    student.drop(student.kept.bool())
    assert student.U.shape == (7, 3) and student.V.shape == (3, 5) and len(student.worth()) == 3
    torch.testing.assert_close(student(x), expected, rtol=1e-12, atol=1e-12)


def test_a_low_rank_layer_answers_for_the_weight_it_replaced():
    U, V, bias = random(7, 2), random(2, 5, seed=1), random(7, seed=2)
    layer = LowRankLinear.of(U, V, bias, like=torch.empty(7, 5, dtype=torch.bfloat16))
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.shape != (7, 5)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    x = random(4, 5, seed=3)
    torch.testing.assert_close(layer.double()(x), x @ (U @ V).T + bias, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_dense_like_and_matrix_agree_on_orientation(kind, m, n):
    layer, W, x = make_layer(kind, m, n), random(m, n, seed=11), random(4, n, seed=12)
    assert matrix(layer).shape == (m, n)
    layer.weight.requires_grad_(False)
    new = dense_like(layer, W, layer.bias)
    assert type(new) is type(layer) and new.weight.shape == layer.weight.shape and not new.weight.requires_grad
    torch.testing.assert_close(new(x), x @ W.T + (0 if layer.bias is None else layer.bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make, kinds", [
    (tiny_gpt2, ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    (tiny_llama, [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]),
])
def test_block_layers_are_all_matrices_of_the_blocks_and_no_others(make, kinds):
    names = list(block_layers(make()))
    assert sorted(name.split(".", 3)[3] for name in names) == sorted(2 * kinds)
    assert {name.split(".")[2] for name in names} == {"0", "1"}


def test_block_layers_of_a_model_without_any_is_an_error():
    with pytest.raises(UserError, match="GPT2LMHeadModel"):
        block_layers(tiny_gpt2(n_layer=0))


def test_swap_reaches_every_place_and_swapped_undoes_it_after_an_error():
    shared, other = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(other, shared)})
    new = nn.Linear(2, 2)
    with pytest.raises(KeyError), swapped(model, {shared: new}):
        assert model["a"] is new and model["b"][1] is new and model["b"][0] is other
        raise KeyError
    assert model["a"] is shared and model["b"][1] is shared
    swap(model, {shared: new})
    assert model["a"] is new and model["b"][1] is new


@pytest.mark.parametrize("make", MODELS)
def test_metric_holds_the_second_moment_of_the_inputs(make, device):
    model, batches = make().to(device), [tokens(3, 20, seed=seed) for seed in (0, 1)]
    layers = block_layers(model)
    seen = {name: [] for name in layers}
    hooks = [layer.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0].flatten(0, 1).double()))
             for name, layer in layers.items()]
    for ids in batches:
        logits(model, ids.to(device))
    for hook in hooks:
        hook.remove()
    metrics = collect_metric(model, layers, batches)
    for name, layer in layers.items():
        X = torch.cat(seen[name]).cpu()
        torch.testing.assert_close(metrics[name].G.double(), X.T @ X / 120, rtol=1e-4, atol=1e-5 * (X ** 2).mean().item())
        assert torch.linalg.eigvalsh(metrics[name].G.double()).min() > -1e-5 * (X ** 2).mean()
        assert metrics[name].R.shape == matrix(layer).shape[:1]
        assert metrics[name].R.min() >= 0 and metrics[name].R.max() > 0


def test_metric_of_the_outputs_is_the_fisher_diagonal_of_the_model():
    # one token a text: the expectation over labels that collect_metric draws can be written out
    model = tiny_gpt2()
    layers = block_layers(model)
    outputs = {}
    hooks = [layer.register_forward_hook(lambda _, inputs, output, name=name: outputs.update({name: output}))
             for name, layer in layers.items()]
    logs = model(input_ids=torch.tensor([[5]]), use_cache=False).logits[0, 0].log_softmax(-1)
    for hook in hooks:
        hook.remove()
    fisher = dict.fromkeys(layers, 0)
    for log in logs:
        for name, g in zip(layers, torch.autograd.grad(-log, [outputs[name] for name in layers], retain_graph=True)):
            fisher[name] = fisher[name] + log.exp().detach() * g.flatten().square()
    metrics = collect_metric(model, layers, [torch.full((4000, 1), 5), torch.full((4000, 1), 5)])
    for name in layers:
        assert (metrics[name].R - fisher[name]).norm() < 0.1 * fisher[name].norm()


def test_layers_that_read_the_same_input_share_its_metric():
    model = tiny_llama()
    metrics = collect_metric(model, block_layers(model), [tokens(2, 16)])
    block = {name.split(".")[-1]: metric for name, metric in metrics.items() if ".0." in name}
    assert block["q_proj"].G is block["k_proj"].G is block["v_proj"].G
    assert block["gate_proj"].G is block["up_proj"].G
    assert not torch.equal(block["o_proj"].G, block["q_proj"].G)


@pytest.mark.parametrize("fails", [False, True])
def test_collecting_the_metric_leaves_no_trace(fails):
    model = tiny_gpt2()
    model.transformer.wpe.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    batches = [tokens(2, 16), tokens(1, 65) if fails else tokens(1, 8)]  # 65: one more than it can read
    try:
        collect_metric(model, block_layers(model), batches)
        assert not fails
    except IndexError:
        assert fails
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_layer_that_no_token_reaches_is_named():
    model = tiny_gpt2()
    model.transformer.h[1].spare = nn.Linear(3, 3)
    with pytest.raises(UserError, match="transformer.h.1.spare"):
        compress(model, [tokens(2, 16)], steps=0)


# ---- learning -----------------------------------------------------------------------------------

@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("basis", BASES)
def test_divergence_is_zero_at_the_start(make, basis, device):
    model, ids = make().double().to(device), tokens(3, 20, device=device)
    dense = logits(model, ids)
    with swapped(model, students_of(model, basis, [ids])):
        torch.testing.assert_close(logits(model, ids), dense, rtol=1e-7, atol=1e-7)
        assert abs(KLDivergence.apply(dense, logits(model, ids)).item()) < 1e-6


@pytest.mark.parametrize("steps, deviation", [(0, True), (4, True), (4, False)])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("make", MODELS)
def test_the_budget_is_met_exactly(make, ratio, steps, deviation, device):
    model = make().to(device)
    dense = block_layers(model)
    budget = (1 - ratio) * sum(matrix(layer).numel() for layer in dense.values())
    assert compress(model, [tokens(2, 16)], ratio, steps, deviation=deviation) is model
    new = {name: model.get_submodule(name) for name in dense}
    stored = sum(p.numel() for layer in new.values() for p in layer.parameters())
    stored -= sum(layer.bias.numel() for layer in dense.values() if layer.bias is not None)
    more = []
    for name, layer in dense.items():
        m, n = matrix(layer).shape
        if isinstance(new[name], LowRankLinear):
            k = len(new[name].down.weight)
            assert 0 < k * (m + n) < m * n
            more.append(min((k + 1) * (m + n), m * n) - k * (m + n))
        else:
            assert type(new[name]) is type(layer) and new[name] is not layer
    assert stored <= budget
    assert budget - stored < min(more)
    assert len(new) > len(more) or ratio > 0.2


def test_ranks_differ_from_matrix_to_matrix():
    model = compress(tiny_gpt2(), [tokens(4, 32)], 0.5, steps=0)
    assert len({len(module.down.weight) for module in model.modules() if isinstance(module, LowRankLinear)}) > 2


@pytest.mark.parametrize("basis", ["plain", "whitened", "two-sided"])
def test_truncation_takes_the_same_share_of_every_matrix(basis):
    model = tiny_llama()
    layers = block_layers(model)
    new = truncate(layers, collect_metric(model, layers, [tokens(2, 16)]), basis, 0.5)
    for layer in layers.values():
        m, n = matrix(layer).shape
        stored = sum(p.numel() for p in new[layer].parameters())
        assert stored <= m * n / 2 < stored + m + n


def test_whitened_truncation_does_not_lose_to_plain_in_a_model():
    model, ids = tiny_llama(), tokens(8, 32)
    layers = block_layers(model)
    metrics = collect_metric(model, layers, [ids])
    plain, whitened = (truncate(layers, metrics, basis, 0.5) for basis in ("plain", "whitened"))
    for name, layer in layers.items():
        errors = []
        for new in (whitened, plain):
            change = matrix(layer) - new[layer].up.weight @ new[layer].down.weight
            errors.append((change @ metrics[name].G @ change.T).trace().item())
        assert errors[0] <= 1.001 * errors[1]


def test_same_seed_same_result():
    states = []
    for _ in range(2):
        model = tiny_gpt2()
        torch.manual_seed(7)
        compress(model, iter([tokens(2, 16, seed=0), tokens(2, 16, seed=1)]), 0.5, steps=5)
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))


def test_a_model_in_training_mode_learns_without_dropout_and_stays_in_training_mode():
    states = []
    for training in (False, True):
        model = tiny_gpt2(resid_pdrop=0.5).train(training)
        torch.manual_seed(7)
        compress(model, [tokens(2, 16)], 0.5, steps=3)
        assert model.training == training
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))


@pytest.fixture(scope="session")
def demo_text():
    """English that costs no time to gather: the help topics of Python."""
    from pydoc_data.topics import topics
    return "\n\n".join(topics.values())


@pytest.fixture(scope="session")
def demo(demo_text):
    """The bundled model on the CPU and five batches [4, 128] of token ids."""
    model, tokenizer = cli.load_model(cli.BUNDLED, torch.device("cpu"), torch.float32)
    return model, encode(tokenizer, demo_text[:60_000])[:2560].view(5, 4, 128)


def test_learning_lowers_the_divergence(demo):
    dense, batches = demo
    targets = [logits(dense, ids) for ids in batches]
    after = {}
    for steps in (0, 40):
        torch.manual_seed(0)
        model = compress(copy.deepcopy(dense), batches[:4], 0.5, steps, lr=0.02)
        after[steps] = [divergence(targets[:4], model, batches[:4]), divergence(targets[4:], model, batches[4:])]
    seen, held_out = zip(*after.values())
    assert seen[1] < 0.9 * seen[0]
    assert held_out[1] < held_out[0]


def test_finding_the_replacements_leaves_the_model_alone():
    model = tiny_gpt2()
    model.transformer.wpe.requires_grad_(False)
    layers = block_layers(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    new = compressed_layers(model, layers, collect_metric(model, layers, [tokens(2, 16)]), [tokens(2, 16)], 0.5, 3)
    assert block_layers(model) == layers and new.keys() == set(layers.values())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad for layer in new.values() for p in layer.parameters())


@pytest.mark.parametrize("make", MODELS)
def test_a_compressed_model_keeps_its_other_weights_and_frees_the_dense_ones(make):
    model = make()
    dense = {name: weakref.ref(layer.weight) for name, layer in block_layers(model).items()}
    others = {name: p for name, p in model.named_parameters() if not name.startswith(tuple(dense))}
    compress(model, [tokens(2, 16)], 0.5, steps=3)
    gc.collect()
    after = dict(model.named_parameters())
    assert len(others) > 4 and all(after[name] is p for name, p in others.items())
    assert not any(weight() is not None for weight in dense.values())


def test_a_compressed_model_is_not_compressed_again():
    with pytest.raises(UserError, match="compressed already"):
        compress(compress(tiny_gpt2(), [tokens(2, 16)], 0.2, steps=0), [tokens(2, 16)], 0.2, steps=0)


def test_a_loss_that_is_not_finite_stops_and_names_the_step():
    model = tiny_gpt2()
    layers = block_layers(model)
    with pytest.raises(FloatingPointError, match="step 2 of 10.*learning rate"):
        compress(model, [tokens(2, 16)], 0.5, steps=10, lr=1e30)
    assert block_layers(model) == layers
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("ratio", [0, 1, 1.5, -0.1, float("nan"), 0.999])
def test_an_impossible_ratio_is_named(ratio):
    with pytest.raises(UserError, match=f"ratio {ratio}"):
        compress(tiny_gpt2(), [tokens(2, 16)], ratio, steps=0)


def test_the_library_prints_nothing(tmp_path):
    # a process of its own: this one has turned the progress bars of transformers off
    script = ("import test_soco as t, torch; m = t.compress(t.tiny_gpt2(), [t.tokens(2, 16)], 0.5, 3); "
              "t.save(m, 'x'); t.load('x'); t.perplexity(m, t.tokens(64), 16)")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- saving -------------------------------------------------------------------------------------

def small(make=tiny_gpt2, steps=2):
    return compress(make(), [tokens(2, 16)], 0.5, steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", MODELS)
def test_a_saved_model_comes_back_bit_for_bit(make, dtype, device, tmp_path):
    make().save_pretrained(tmp_path / "dense")
    model, ids = load(tmp_path / "dense", dtype=dtype).to(device), tokens(2, 16, device=device)
    compress(model, [ids], 0.5, steps=2)
    save(model, tmp_path / "model")
    again = load(tmp_path / "model").to(device)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert not list((tmp_path / "model").glob("*.bin"))
    again.generate(ids, max_new_tokens=3, do_sample=False)


def test_a_compressed_file_holds_fewer_numbers(tmp_path):
    dense = tiny_llama()
    matrices = block_layers(dense).values()
    dense.save_pretrained(tmp_path / "dense")
    save(small(tiny_llama), tmp_path / "model")
    before, after = (sum(value.numel() for value in load_file(tmp_path / folder / "model.safetensors").values())
                     for folder in ("dense", "model"))
    assert before - after + len(matrices) >= 0.5 * sum(matrix(layer).numel() for layer in matrices)  # a marker each


STRANGER = """
import json, sys, torch
from transformers import AutoModelForCausalLM
folder, ids = sys.argv[1], torch.load(sys.argv[2])
try:
    AutoModelForCausalLM.from_pretrained(folder)
    error = None
except Exception as e:
    error = type(e).__name__
sys.path.insert(0, sys.argv[3])
import soco
torch.save((error, soco.load(folder)(input_ids=ids, use_cache=False).logits.detach()), sys.argv[4])
"""


@pytest.fixture(scope="session")
def stranger(tmp_path_factory):
    """(error of loading without soco, logits of loading with it in a new process, logits before saving)."""
    folder = tmp_path_factory.mktemp("stranger")
    model, ids = small(), tokens(2, 16)
    save(model, folder / "model")
    torch.save(ids, folder / "ids")
    subprocess.run([sys.executable, "-c", STRANGER, folder / "model", folder / "ids", str(ROOT), folder / "result"],
                   check=True, cwd=folder, timeout=120)
    return *torch.load(folder / "result"), logits(model, ids)


def test_another_process_gets_the_same_logits(stranger):
    assert torch.equal(stranger[1], stranger[2])


def test_loading_without_the_script_fails_instead_of_inventing_weights(stranger):
    assert stranger[0] is not None


def test_saving_over_a_folder_needs_the_flag(tmp_path):
    model = small()
    save(model, tmp_path / "model")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="model exists"):
        save(model, tmp_path / "model")
    save(model, tmp_path / "model", overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_save_that_fails_leaves_nothing_half_written(error, overwrite, tmp_path):
    model = small()
    if overwrite:
        save(model, tmp_path / "model", extra=lambda folder: (folder / "old").touch())
    before = tree(tmp_path)

    def extra(folder):
        assert (folder / "model.safetensors").exists()
        raise error

    with pytest.raises(type(error)):
        save(model, tmp_path / "model", overwrite=overwrite, extra=extra)
    assert tree(tmp_path) == before and overwrite == (tmp_path / "model" / "old").exists()


def test_a_dense_model_is_not_saved(tmp_path):
    with pytest.raises(UserError, match="not compressed"):
        save(tiny_gpt2(), tmp_path / "model")
    assert tree(tmp_path) == []


def test_a_loaded_model_can_be_saved_again(tmp_path):
    model, ids = small(tiny_llama), tokens(2, 16)
    save(model, tmp_path / "one")
    save(load(tmp_path / "one"), tmp_path / "two")
    assert torch.equal(logits(load(tmp_path / "two"), ids), logits(model, ids))


def test_a_folder_that_lacks_a_tensor_is_refused(house):
    with pytest.raises(UserError, match="up.weight"):
        load(house / "partly-compressed")


@pytest.mark.parametrize("change, named", [
    (lambda config: config.update(format=99), "format 99"),
    (lambda config: config["layers"].update({"transformer.h.7.mlp.c_fc": {"down.weight": [1, 24]}}), "transformer.h.7.mlp.c_fc"),
])
def test_a_folder_of_another_kind_is_refused(change, named, tmp_path):
    save(small(steps=0), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=named):
        load(tmp_path / "model")


# ---- every model, every loader --------------------------------------------------------------------

BLOCK = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "llama": {**BLOCK, "num_key_value_heads": 2},
    "mistral": {**BLOCK, "num_key_value_heads": 2},
    "qwen2": {**BLOCK, "num_key_value_heads": 2},
    "qwen3": {**BLOCK, "num_key_value_heads": 2, "head_dim": 16},
    "gemma3_text": {**BLOCK, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 16},
    "phi3": {**BLOCK, "num_key_value_heads": 2},
    "opt": {**BLOCK, "ffn_dim": 48, "word_embed_proj_dim": 16},
    "gpt_neox": BLOCK,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {**BLOCK, "new_decoder_architecture": True, "num_kv_heads": 2},
}
METHODS = [soco, rpca]


def tiny(kind, **config):
    torch.manual_seed(0)
    config = {"vocab_size": VOCAB, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
              "initializer_range": 0.2, **config}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).eval()


def whole_matrices(method, model, ids):
    """{layer: what the method stores when it keeps everything}."""
    if method is soco:
        return {layer: student.finish() for layer, student in students_of(model, "two-sided", [ids]).items()}
    metrics = collect_metric(model, layers := block_layers(model), [ids])
    drafts = [rpca.Draft(layer, metrics[name]) for name, layer in layers.items()]
    rpca.set_ranks(drafts, 0.5, 0, False)
    return {draft.layer: draft.finish() for draft in drafts}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_is_compressed_saved_and_loaded(kind, method, tmp_path):
    model, ids = tiny(kind, **ARCHITECTURES[kind]), tokens(2, 16)
    dense, layers = logits(model, ids), block_layers(model)
    inside = {name for name, p in model.named_parameters() if p.ndim == 2 and re.search(r"\.\d+\.", name)}
    assert inside == {name + ".weight" for name in layers}  # every matrix of the blocks and no other
    with swapped(model, whole_matrices(method, model, ids)):
        torch.testing.assert_close(logits(model, ids), dense, rtol=1e-3, atol=1e-3 * dense.abs().max().item())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    method.compress(model, [ids], 0.4, **{soco: {"steps": 2}, rpca: {}}[method])
    shapes = {name: (*matrix(layer).shape, layer.bias is not None) for name, layer in layers.items()}
    numbers = sum(m * n for m, n, _ in shapes.values())
    assert 0.5 * numbers < cli.block_numbers(model, shapes)[0] <= 0.6 * numbers
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    save(model, tmp_path / "model")
    assert torch.equal(logits(load(tmp_path / "model"), ids), logits(model, ids))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_in_one_parameter_are_refused(kind):
    model = tiny(kind, **BLOCK, num_key_value_heads=2, num_local_experts=4, num_experts=4, num_experts_per_tok=2)
    with pytest.raises(UserError, match="3-D parameter, .*experts"):
        block_layers(model)


def test_what_is_not_touched_is_named():
    model = tiny_gpt2()
    model.transformer.h[1].table = nn.Embedding(5, 3)
    found = {name: (shape, reason) for name, shape, reason in untouched(model, block_layers(model))}
    assert found == {"transformer.wte.weight": ((VOCAB, 24), "outside the repeated blocks"),
                     "transformer.wpe.weight": ((64, 24), "outside the repeated blocks"),
                     "transformer.h.1.table.weight": ((5, 3), "not a Linear or Conv1D")}


@pytest.mark.parametrize("method", METHODS)
def test_a_shared_block_is_compressed_once_and_stays_shared(method):
    model = tiny_gpt2()
    model.transformer.h[1] = model.transformer.h[0]
    method.compress(model, [tokens(2, 16)], 0.4)
    assert model.transformer.h[1] is model.transformer.h[0]
    assert sum(name.endswith("c_proj") for name, _ in model.named_modules()) == 2  # attention's and the MLP's


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_devices_and_frozen_flags_are_kept(dtype, method, device):
    model = tiny_llama().to(device, dtype)
    layers = block_layers(model)
    layers["model.layers.0.mlp.up_proj"].weight.requires_grad_(False)
    method.compress(model, [tokens(2, 16)], 0.4)
    for name in layers:
        for p in model.get_submodule(name).parameters():
            assert (p.dtype, p.device) == (dtype, layers[name].weight.device)
            assert p.requires_grad == (name != "model.layers.0.mlp.up_proj")
    assert logits(model, tokens(2, 16, device=device)).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_matrices_can_be_worked_on_elsewhere(method, device):
    models = [method.compress(tiny_llama(), [tokens(2, 16)], 0.4, device=where, **{soco: {"steps": 0}, rpca: {}}[method])
              for where in (None, device)]
    assert {p.device.type for p in models[1].parameters()} == {"cpu"}
    torch.testing.assert_close(*(logits(model, tokens(2, 16)) for model in models), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", MODELS)
def test_a_compressed_folder_behaves_like_any_other(make, method, tmp_path):
    model, ids = method.compress(make(), [tokens(2, 16)], 0.5), tokens(2, 16)
    save(model, tmp_path / "one")
    tiny_tokenizer().save_pretrained(tmp_path / "one")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(logits(again, ids), logits(model, ids))
    again.save_pretrained(tmp_path / "two")
    assert torch.equal(logits(load(tmp_path / "two"), ids), logits(model, ids))
    new = again.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(new[:, 16], logits(model, ids)[:, -1].argmax(-1))
    words = pipeline("text-generation", str(tmp_path / "one"))("w1 w2", max_new_tokens=3, do_sample=False)
    assert words[0]["generated_text"].startswith("w1 w2")
    half = load(tmp_path / "one", dtype=torch.bfloat16)
    for narrow in (half, again.to(torch.bfloat16)):
        assert narrow.dtype == torch.bfloat16 and (logits(narrow, ids) - logits(model, ids)).norm() < 0.1 * logits(model, ids).norm()
    # compiled without a C++ compiler: the graph that torch.compile traces, run as it stands
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_is_split_by_device_map(method, tmp_path):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    model, ids = method.compress(tiny_llama(), [tokens(2, 16)], 0.5), tokens(2, 16)
    save(model, tmp_path / "model")
    for device_map in ("auto", {"": "cpu"}):
        loaded = load(tmp_path / "model", device_map=device_map)
        torch.testing.assert_close(logits(loaded, ids.to(loaded.device)).cpu(), logits(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_dense_model_under_device_map_is_compressed(method, tmp_path):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    tiny_llama().save_pretrained(tmp_path / "dense")
    split, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", device_map="auto"), tokens(2, 16)
    method.compress(split, [ids], 0.5)
    save(split, tmp_path / "model")
    torch.testing.assert_close(logits(load(tmp_path / "model"), ids), logits(split, ids.to(split.device)).cpu(), rtol=1e-4, atol=1e-4)


def test_an_offloaded_layer_is_refused():
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(UserError, match="q_proj is on the meta device"):
        compress(model, [tokens(2, 16)])


def test_loading_does_not_initialise_c_proj_anew(tmp_path):
    # GPT-2 gives every parameter that is named c_proj.weight new random numbers after loading what is in the file
    model = tiny_gpt2()
    compress(model, [tokens(2, 16)], 0.05, steps=0)
    kinds = {type(module) for name, module in model.named_modules() if name.endswith("c_proj")}
    assert Conv1D in kinds  # stored dense: really named c_proj.weight
    save(model, tmp_path / "model")
    torch.manual_seed(1)
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("script", ["soco", "rpca"])
def test_importing_twice_is_harmless(script, tmp_path):
    save(METHODS[script == "rpca"].compress(tiny_gpt2(), [tokens(2, 16)], 0.5), tmp_path / "model")
    code = (f"import runpy, sys, importlib; sys.path.insert(0, {str(ROOT)!r}); import {script}; "
            f"runpy.run_path({str(ROOT / (script + '.py'))!r}); importlib.reload({script}); "
            f"print(type({script}.load('model').transformer.h[0].attn.c_attn).__name__)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, [{"soco": "LowRankLinear", "rpca": "LowRankPlusSparse"}[script]]), done.stderr


def test_lora_attaches_to_the_factors():
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    model, ids = compress(tiny_llama(), [tokens(2, 16)], 0.5, steps=0), tokens(2, 16)
    before = logits(model, ids)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["down", "up"]))
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert trained and all(".down.lora_" in name or ".up.lora_" in name for name in trained)
    torch.testing.assert_close(logits(tuned, ids), before)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(5):
        losses.append(tuned(input_ids=ids, labels=ids).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_int8_weights_apply_on_top():
    quantization = pytest.importorskip("torchao.quantization", reason="int8 weights need torchao")
    model, ids = compress(tiny_llama(), [tokens(2, 16)], 0.5, steps=0), tokens(2, 16)
    before = logits(model, ids)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    low_rank = next(module for module in model.modules() if isinstance(module, LowRankLinear))
    assert type(low_rank.up.weight.data) is not torch.Tensor and type(low_rank.up.weight) is not nn.Parameter
    assert (logits(model, ids) - before).norm() < 0.1 * before.norm()


def test_gradient_checkpointing_learns_the_same_and_recomputes():
    learned, calls = [], []
    for checkpointing in (False, True):
        model = tiny_llama()
        if checkpointing:
            enable_checkpointing(model)
        count = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *call: count.append(1))
        torch.manual_seed(0)
        learned.append(logits(compress(model, [tokens(2, 16)], 0.5, steps=4), tokens(2, 16)))
        calls.append(len(count))
    torch.testing.assert_close(*learned, rtol=1e-4, atol=1e-4)
    assert calls[1] == calls[0] + 4




# ---- several processes ----------------------------------------------------------------------------

@pytest.mark.parametrize("script, more", [("soco.py", "--steps 4"), ("rpca.py", "--rank-share 0.3"), ("rpca.py", "--estimator policy")])
def test_two_processes_find_what_one_finds(script, more, house, tmp_path):
    line = [str(ROOT / script), *RPCA_LINE.format(house=house).split(), *more.split(), "--batch-size", "4", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for folder, launch in [("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])]:
        done = subprocess.run([sys.executable, *launch, *line, "--out", str(tmp_path / folder)], env=environment, cwd=tmp_path,
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("written to") == 1
    one, two = (json.loads((tmp_path / folder / "metrics.json").read_text()) for folder in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert [layer["rank"] for layer in one["layers"]] == [layer["rank"] for layer in two["layers"]]
    assert one["kept_params"] == two["kept_params"]
    for a, b in zip(one["layers"], two["layers"]):  # entries on the edge of the mask may change sides
        assert abs(a.get("nonzeros", 0) - b.get("nonzeros", 0)) <= 10
    assert two["ppl"] == pytest.approx(one["ppl"], rel=5e-3)
    a, b = (load(tmp_path / folder) for folder in ("one", "two"))
    found = logits(a, tokens(2, 16)), logits(b, tokens(2, 16))
    assert (found[0] - found[1]).norm() < (0.05 if script == "rpca.py" else 1e-3) * found[0].norm()


def test_a_batch_that_cannot_be_shared_out_is_refused(house, tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "soco.py"),
                           *RPCA_LINE.format(house=house).split(), "--batch-size", "3"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and done.stderr.count("--batch-size 3 cannot be shared out among 2 processes") == 1


# ---- evaluator ----------------------------------------------------------------------------------

@pytest.mark.parametrize("make", MODELS)
def test_perplexity_by_blocks_is_the_loss_of_the_model(make, device):
    model, ids = make().to(device), tokens(70)
    blocks = ids[:64].view(4, 16).to(device)
    result = perplexity(model, ids, 16)
    with torch.no_grad():
        assert result.nll == pytest.approx(model(input_ids=blocks, labels=blocks).loss.item(), rel=1e-5)
    assert result.ppl == pytest.approx(math.exp(result.nll), rel=1e-12)
    assert result.tokens == 4 * 15


@pytest.mark.parametrize("blocks", [None, 1, 3])
@pytest.mark.parametrize("stride", [16, 15, 7, 1])
def test_perplexity_by_stride_scores_every_token_once_with_all_its_context(stride, blocks):
    model, ids = tiny_llama(), tokens(50)
    windows = [start for start in range(0, 50, stride) if start + 16 <= 50][:blocks]
    nats = []
    for t in range(1, windows[-1] + 16):
        start = next(start for start in windows if start + 16 > t)
        if start < t:
            nats.append(-logits(model, ids[None, start:t])[0, -1].log_softmax(-1)[ids[t]].item())
    result = perplexity(model, ids, 16, stride, blocks)
    assert result.tokens == len(nats)
    assert result.nll == pytest.approx(sum(nats) / len(nats), rel=1e-5)


@pytest.mark.parametrize("length, seqlen, stride", [(15, 16, None), (40, 1, None), (40, 16, 17), (40, 16, -1)])
def test_perplexity_without_one_whole_window_is_an_error(length, seqlen, stride):
    with pytest.raises(ValueError, match=f"{length} tokens"):
        perplexity(tiny_gpt2(), tokens(length), seqlen, stride)


@pytest.mark.parametrize("training", [False, True])
def test_perplexity_is_measured_without_dropout_and_restores_the_mode(training):
    model = tiny_gpt2(resid_pdrop=0.5).train(training)
    assert perplexity(model, tokens(64), 16) == perplexity(tiny_gpt2(), tokens(64), 16)
    assert model.training == training


# ---- data ---------------------------------------------------------------------------------------

def test_blocks_are_pieces_of_the_text_in_an_order_the_seed_decides(device):
    ids = torch.arange(100, device=device)
    blocks = sample_blocks(ids, 8, 12, seed=0)
    assert sorted(block[0].item() for block in blocks) == list(range(0, 96, 8))
    assert all((block == torch.arange(block[0], block[0] + 8, device=device)).all() for block in blocks)
    assert torch.equal(sample_blocks(ids, 8, 5, seed=0), blocks[:5])
    assert torch.equal(sample_blocks(ids, 8, 30, seed=0), blocks.repeat(3, 1)[:30])
    assert not torch.equal(sample_blocks(ids, 8, 12, seed=1), blocks)


def test_a_text_is_encoded_in_one_piece():
    assert encode(tiny_tokenizer(), text(5000, seed=3)).tolist() == tokens(5000, seed=3).tolist()


def test_wikitext_rows_are_joined_by_empty_lines(tmp_path, monkeypatch):
    raw = {"test": " \n = Title = \n \nOne @-@ two .\n", "train": "train\n", "valid": "valid\n"}
    write_wikitext(tmp_path / "wikitext.zip", raw)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **options: tmp_path / "wikitext.zip")
    assert eval_ppl.load_text("wikitext2", "test") == "\n\n = Title = \n\n\n\n\nOne @-@ two .\n"
    assert eval_ppl.load_text("wikitext2", "train") == "train\n"


def test_the_splits_of_the_standard_library_share_no_text(monkeypatch):
    documents = {f"module {i}": [f"only in {i}", "in all of them"] for i in range(50)}
    monkeypatch.setattr(eval_ppl, "stdlib_documents", lambda: documents)
    train, test = (eval_ppl.load_text("stdlib", split).split("\n\n") for split in ("train", "test"))
    assert sorted(train + test) == sorted(["in all of them"] + [f"only in {i}" for i in range(50)])
    assert "in all of them" in train and 0 < len(test) < 15
    documents["module x"] = ["new"]
    assert set(test) <= set(eval_ppl.load_text("stdlib", "test").split("\n\n"))


def test_a_file_is_read_as_it_stands(tmp_path):
    (tmp_path / "stdlib").write_text("one\r\n two\n", newline="")
    assert eval_ppl.load_text(str(tmp_path / "stdlib"), "train") == eval_ppl.load_text(str(tmp_path / "stdlib"), "test")
    assert eval_ppl.load_text(str(tmp_path / "stdlib"), "test").endswith(" two\n")


# ---- command line -------------------------------------------------------------------------------

def write_wikitext(path, raw):
    with zipfile.ZipFile(path, "w") as archive:
        for split, rows in raw.items():
            archive.writestr(f"wikitext-2-raw/wiki.{split}.raw", rows)


@pytest.fixture(scope="session")
def house(tmp_path_factory):
    """A folder with the models and texts that command lines name."""
    folder = tmp_path_factory.mktemp("house")
    tokenizer = tiny_tokenizer()

    def keep(model, name):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    def edit(source, name, change):
        shutil.copytree(folder / source, folder / name)
        weights = load_file(folder / name / "model.safetensors")
        change(weights)
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})

    keep(tiny_gpt2(), "model")
    keep(tiny_gpt2(n_layer=0), "blockless")
    save(small(), folder / "compressed", extra=tokenizer.save_pretrained)
    edit("model", "nan", lambda weights: weights["transformer.h.1.mlp.c_fc.weight"][3, 4].fill_(float("nan")))
    edit("model", "partial", lambda weights: weights.pop("transformer.h.1.attn.c_proj.weight"))
    edit("compressed", "partly-compressed", lambda weights: weights.pop(next(name for name in weights if "up.weight" in name)))
    shutil.copytree(folder / "model", folder / "pickled")
    torch.save(load_file(folder / "pickled" / "model.safetensors"), folder / "pickled" / "pytorch_model.bin")
    (folder / "pickled" / "model.safetensors").unlink()
    def edit_config(name, change):
        shutil.copytree(folder / "compressed", folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        change(config["quantization_config"])
        (folder / name / "config.json").write_text(json.dumps(config))

    def one_rank_more(config):
        layer = next(shapes for shapes in config["layers"].values() if "down.weight" in shapes)
        layer["down.weight"][0] += 1

    edit_config("newer", lambda config: config.update(format=99))
    edit_config("other-ranks", one_rank_more)
    edit_config("strange-layers", lambda config: config.update(layers={"transformer.h.9.mlp.c_fc": {"down.weight": [1, 24]}}))
    edit_config("no-layers", lambda config: config.pop("layers"))
    keep(tiny("mixtral", **BLOCK, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2), "experts")
    shutil.copytree(folder / "model", folder / "torn")
    os.truncate(folder / "torn" / "model.safetensors", 5000)
    shutil.copytree(folder / "compressed", folder / "torn-compressed")
    os.truncate(folder / "torn-compressed" / "model.safetensors", 5000)
    (folder / "empty").mkdir()
    for seed, name in enumerate(["train", "test", "other"]):
        (folder / name).write_text(text(1000, seed))
    (folder / "short").write_text(text(10, 2))
    (folder / "binary").write_bytes(bytes(range(256)))
    return folder


@pytest.fixture
def command(house, capsys, monkeypatch, tmp_path):
    """Run a script like its command line, but in this process: command(script, arguments) is (code, stdout,
    stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(script, line):
        arguments = line.format(house=house).split()
        if script == "soco.py":
            arguments = f"--model {house}/model --device cpu --calib {house}/train --eval {house}/test --seqlen 16 " \
                        f"--metric-batches 2 --eval-blocks 3 --steps 2".split() + arguments
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *arguments])
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
    """(metrics.json, folder, stdout) of the bundled model's run, stderr checked to be empty."""
    folder = tmp_path_factory.mktemp("demo") / "deep" / "folder"
    done = run_script("soco.py", "--steps", 30, "--seqlen", 128, "--metric-batches", 8, "--eval-blocks", 40,
                      "--out", folder, cwd=folder.parents[1])
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads((folder / "metrics.json").read_text()), folder, done.stdout


def test_demo_order_of_the_methods(demo_run):
    ppl = demo_run[0]["ppl"]
    assert ppl["dense"] < ppl["compressed"] < ppl["svd_whitened"] < ppl["svd"]


def test_demo_metrics_tell_the_whole_run(demo_run):
    report, folder, _ = demo_run
    asked = {"method", "model", "ratio", "seed", "compressible_params", "kept_params", "dense_bytes", "file_bytes", "seconds",
             "peak_memory_bytes", "ppl", "eval", "layers", "calib", "seqlen", "batch_size", "metric_batches", "steps", "lr",
             "basis", "overwrite", "out", "eval_blocks", "no_deviation"}
    assert asked <= report.keys()
    assert {"dense", "svd", "svd_whitened", "compressed"} <= report["ppl"].keys()
    assert {"data", "seqlen", "stride", "tokens", "dtype"} <= report["eval"].keys()
    assert report["eval"]["data"] == report["calib"] == "stdlib"
    assert report["eval"]["tokens"] == 40 * (report["eval"]["seqlen"] - 1)
    assert report["file_bytes"] == (folder / "model.safetensors").stat().st_size < report["dense_bytes"]
    assert all(seconds > 0 for seconds in report["seconds"].values()) and report["peak_memory_bytes"] > report["dense_bytes"]


def test_demo_counts_are_those_of_the_saved_modules(demo_run):
    report, folder, _ = demo_run
    model, stored, dense = load(folder), 0, 0
    for layer in report["layers"]:
        m, n = layer["shape"]
        module = model.get_submodule(layer["name"])
        dense += m * n
        if layer["rank"] == "dense":
            stored += module.weight.numel()
        else:
            assert module.up.weight.shape == (m, layer["rank"]) and module.down.weight.shape == (layer["rank"], n)
            stored += module.up.weight.numel() + module.down.weight.numel()
    assert report["compressible_params"] == dense and report["kept_params"] == stored
    assert stored <= 0.5 * dense < stored + max(sum(layer["shape"]) for layer in report["layers"])


def test_demo_prints_the_table_and_the_place(demo_run):
    report, folder, out = demo_run
    for label, key in [("dense", "dense"), ("plain SVD", "svd"), ("whitened SVD", "svd_whitened"), ("SoCo", "compressed")]:
        row = next(line for line in out.splitlines() if line.startswith(label))
        gap = math.log(report["ppl"][key] / report["ppl"]["dense"])
        assert f"{report['ppl'][key]:.2f}" in row and re.search(rf"\s-?{abs(gap):.4f}\s", row)
        kept = report["compressible_params"] if key == "dense" else report["kept_params"]
        assert f"{kept:,}" in row or key.startswith("svd")
    assert f"written to {folder}" in out
    assert all(f"{setting} {report[setting]}" in out for setting in ("seed", "ratio", "steps", "lr", "basis", "seqlen"))


def test_demo_folder_scores_the_same_in_a_new_process(demo_run):
    report, folder, _ = demo_run
    done = run_script("eval_ppl.py", "--model", folder, "--eval", "stdlib", "--blocks", 40, cwd=folder)
    assert done.stderr == ""
    assert float(re.match(r"perplexity (\S+)", done.stdout)[1]) == pytest.approx(report["ppl"]["compressed"], rel=1e-5)
    for name, value in report["eval"].items():
        assert f"{name} {value}" in done.stdout


def test_a_run_can_be_repeated_from_its_metrics(command, tmp_path):
    assert command("soco.py", "--steps 3 --ratio 0.4 --seed 3 --basis whitened --lr 0.02 --eval-stride 8 --out one")[0] == 0
    first = json.loads((tmp_path / "one" / "metrics.json").read_text())
    flags = {"ratio", "calib", "seqlen", "batch_size", "metric_batches", "eval_seqlen", "eval_stride", "eval_blocks", "seed",
             "basis", "steps", "lr", "model", "device", "dtype"}
    line = " ".join(f"--{flag.replace('_', '-')} {first[flag]}" for flag in sorted(flags))
    assert command("soco.py", f"{line} --eval {first['eval']['data']} --out two")[0] == 0
    second = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert second["ppl"] == first["ppl"] and second["layers"] == first["layers"]
    assert command("soco.py", f"{line} --eval {first['eval']['data']} --out three --seed 4")[0] == 0
    assert json.loads((tmp_path / "three" / "metrics.json").read_text())["ppl"] != first["ppl"]


def test_one_text_decides_what_is_learned_and_the_other_what_is_scored(command, house, monkeypatch, tmp_path):
    monkeypatch.setitem(eval_ppl.TEXTS, "wikitext2", lambda split: (house / split).read_text())
    reports = []
    for i, line in enumerate(["", "--calib {house}/other", "--eval {house}/other", "--calib wikitext2 --eval wikitext2"]):
        assert command("soco.py", f"{line} --out {i}")[0] == 0
        reports.append(json.loads((tmp_path / str(i) / "metrics.json").read_text()))
    usual, learned_other, scored_other, splits = (report["ppl"] for report in reports)
    assert learned_other["dense"] == usual["dense"] and learned_other["compressed"] != usual["compressed"]
    assert scored_other["dense"] != usual["dense"] and reports[2]["layers"] == reports[0]["layers"]
    assert splits == usual


def test_repeating_a_command_writes_to_a_fresh_folder(command, tmp_path):
    folders = []
    for _ in range(2):
        code, out, err = command("soco.py", "--steps 0")
        assert (code, err) == (0, "")
        folders.append(re.search(r"written to (\S+);", out)[1])
    assert folders[0] != folders[1]
    assert sorted(map(Path, folders)) == sorted((tmp_path / "out").relative_to(tmp_path).glob("*"))


def test_overwrite_replaces_a_compressed_folder(command, tmp_path):
    assert command("soco.py", "--steps 0 --out mine")[0] == 0
    (tmp_path / "mine" / "old").touch()
    assert command("soco.py", "--steps 1 --out mine --overwrite")[0] == 0
    assert json.loads((tmp_path / "mine" / "metrics.json").read_text())["steps"] == 1
    assert not (tmp_path / "mine" / "old").exists() and [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_same_text_can_be_asked_for(command):
    code, out, _ = command("soco.py", "--steps 0 --calib {house}/test --same-text")
    assert code == 0 and "same_text True" in out


@pytest.mark.parametrize("script, flags", [
    ("soco.py", "model device dtype ratio calib eval same-text seqlen batch-size eval-seqlen eval-stride eval-blocks seed out "
                "overwrite basis steps lr"),
    ("eval_ppl.py", "model device dtype eval seqlen stride blocks"),
])
def test_help_shows_every_flag(script, flags, command):
    code, out, _ = command(script, "--help")
    assert code == 0 and all(f"--{flag} " in out or f"--{flag}\n" in out for flag in flags.split())


@pytest.mark.parametrize("stage", ["learning", "saving"])
def test_an_interrupted_run_leaves_nothing(stage, command, monkeypatch, tmp_path):
    if stage == "saving":
        monkeypatch.setattr(cli, "model_card", lambda *args: signal.raise_signal(signal.SIGINT))
    else:
        backward, calls = torch.Tensor.backward, itertools.count()
        monkeypatch.setattr(torch.Tensor, "backward", lambda *args, **options:  # two of them are the metric's
                            signal.raise_signal(signal.SIGINT) if next(calls) == 4 else backward(*args, **options))
    code, _, err = command("soco.py", "--steps 10 --out new/folder")
    assert code == 130 and err.count("\n") == 1 and "interrupted" in err
    assert not any(path.is_file() for path in tmp_path.rglob("*")) and not (tmp_path / "new" / "folder").exists()


# the hub, without a network: a cache folder as the hub's client writes it, and the client told to stay offline

@pytest.fixture(scope="session")
def hub_cache(house, tmp_path_factory):
    cache = tmp_path_factory.mktemp("hub")

    def snapshot(repository):
        revision = "0123456789abcdef0123456789abcdef01234567"
        folder = cache / repository / "snapshots" / revision
        folder.mkdir(parents=True)
        (cache / repository / "refs").mkdir()
        (cache / repository / "refs" / "main").write_text(revision)
        return folder

    gpt2 = snapshot("models--gpt2")
    for path in (house / "model").iterdir():
        (gpt2 / path.name).write_bytes(path.read_bytes())
    counts = {"train": 2000, "valid": 300, "test": 900}
    write_wikitext(snapshot("datasets--ggml-org--ci") / "wikitext-2-raw-v1.zip",
                   {split: text(count, seed) + "\n" for seed, (split, count) in enumerate(counts.items())})
    return cache


def test_a_hub_model_is_compressed_and_scored_on_the_test_split(hub_cache, tmp_path):
    done = run_script("soco.py", "--model", "gpt2", "--ratio", 0.5, "--steps", 2, "--seqlen", 32, "--metric-batches", 2,
                      "--dtype", "float32", "--out", "folder", cwd=tmp_path, HF_HOME=str(hub_cache), HF_HUB_CACHE=str(hub_cache))
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads((tmp_path / "folder" / "metrics.json").read_text())
    assert report["eval"] | {"data": "wikitext2", "tokens": 900 // 64 * 63, "seqlen": 64} == report["eval"]
    assert report["calib"] == "wikitext2"
    ids = tokens(900, seed=2)
    assert report["ppl"]["dense"] == pytest.approx(perplexity(tiny_gpt2(), ids, 64).ppl, rel=1e-4)
    assert report["ppl"]["compressed"] == pytest.approx(perplexity(load(tmp_path / "folder"), ids, 64).ppl, rel=1e-4)


# ---- bad input ----------------------------------------------------------------------------------

def check_refusal(code, err, *named):
    assert code == 2
    assert err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in err
    assert all(word in err for word in named), err


NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is present")


@pytest.mark.parametrize("line, named", [
    ("--ratio 0", ["--ratio", "0 "]),
    ("--ratio 1", ["--ratio", "1 "]),
    ("--ratio 1.5", ["--ratio", "1.5"]),
    ("--ratio -0.5", ["--ratio", "-0.5"]),
    ("--ratio nan", ["--ratio", "nan"]),
    ("--ratio abc", ["--ratio", "abc"]),
    ("--ratio", ["--ratio"]),
    ("--rati 0.5", ["--rati"]),
    ("--steps -1", ["--steps", "-1"]),
    ("--steps 1.5", ["--steps", "1.5"]),
    ("--lr 0", ["--lr", "0 "]),
    ("--batch-size 0", ["--batch-size", "0 "]),
    ("--seed x", ["--seed", "x"]),
    ("--seed 99999999999999999999", ["--seed", "99999999999999999999"]),
    ("--basis diagonal", ["--basis", "diagonal"]),
    ("--dtype float12", ["--dtype", "float12"]),
    ("--model nobody/no-such-model", ["nobody/no-such-model", "bundled", "folder"]),
    ("--model no/such/folder", ["no/such/folder", "bundled", "folder"]),
    ("--model {house}/empty", ["{house}/empty", "config.json"]),
    ("--model {house}/train", ["{house}/train", "folder"]),
    ("--model {house}/torn", ["{house}/torn"]),
    ("--model {house}/partial", ["{house}/partial", "transformer.h.1.attn.c_proj.weight"]),
    ("--model {house}/pickled", ["{house}/pickled", "safetensors"]),
    ("--model {house}/nan", ["{house}/nan", "transformer.h.1.mlp.c_fc.weight"]),
    ("--model {house}/blockless", ["GPT2LMHeadModel", "Linear"]),
    ("--model {house}/experts", ["{house}/experts", "3-D", "experts"]),
    ("--model {house}/compressed", ["{house}/compressed", "compressed already"]),
    ("--calib {house}/short", ["{house}/short", "10 tokens", "16"]),
    ("--eval {house}/short", ["{house}/short", "10 tokens", "64"]),
    ("--calib {house}/nowhere", ["{house}/nowhere", "stdlib"]),
    ("--calib {house}/binary", ["{house}/binary"]),
    ("--calib {house}/empty", ["{house}/empty", "stdlib"]),
    ("--eval {house}/train", ["{house}/train", "--same-text"]),
    ("--eval {house}/model/../train", ["train", "--same-text"]),
    ("--calib wikitext2", ["wikitext2", "stdlib"]),
    ("--seqlen 65", ["--seqlen 65", "64"]),
    ("--eval-seqlen 65", ["--eval-seqlen 65", "64"]),
    ("--eval-seqlen 16 --eval-stride 17", ["--eval-stride 17", "16"]),
    ("--out {house}/compressed", ["{house}/compressed", "--overwrite"]),
    ("--out {house}/empty", ["{house}/empty", "--overwrite"]),
    ("--out {house}/model --overwrite", ["{house}/model", "--overwrite"]),
    ("--out {house}/train --overwrite", ["{house}/train", "--overwrite"]),
    ("--out {house}/train/new", ["{house}/train/new"]),
    ("--out {house}/train/very/new", ["{house}/train"]),
    ("--device tpu9", ["--device tpu9", "cpu"]),
    ("--device meta", ["--device meta", "cpu"]),
    ("--device cuda:99", ["--device cuda:99", "cpu"]),
    pytest.param("--device cuda", ["--device cuda", "cpu"], marks=NO_CUDA),
])
def test_bad_input_is_one_line_and_writes_nothing(line, named, command, house, tmp_path):
    before = tree(house)
    code, out, err = command("soco.py", line)
    check_refusal(code, err, *[word.format(house=house) for word in named])
    assert out == ""  # no perplexity yet: refused before any long work
    assert tree(house) == before and tree(tmp_path) == []


@pytest.mark.parametrize("line, named", [
    ("--model {house}/nan", ["transformer.h.1.mlp.c_fc.weight"]),
    ("--model {house}/partly-compressed --eval {house}/test", ["{house}/partly-compressed", "up.weight"]),
    ("--model {house}/newer", ["{house}/newer", "format 99"]),
    ("--model {house}/torn-compressed", ["{house}/torn-compressed"]),
    ("--model {house}/other-ranks", ["{house}/other-ranks", "shape"]),
    ("--model {house}/strange-layers", ["{house}/strange-layers", "transformer.h.9.mlp.c_fc"]),
    ("--model {house}/no-layers", ["{house}/no-layers"]),
    ("--model nobody/no-such-model", ["nobody/no-such-model"]),
    ("--model {house}/model --eval {house}/short", ["{house}/short", "10 tokens", "64"]),
    ("--model {house}/model", ["wikitext2", "stdlib"]),
    ("--model {house}/model --eval {house}/test --seqlen 65", ["--seqlen 65", "64"]),
    ("--model {house}/model --eval {house}/test --seqlen 1", ["--seqlen", "1 "]),
    ("--model {house}/model --eval {house}/test --seqlen 16 --stride 17", ["--stride 17", "16"]),
    ("--blocks 0", ["--blocks", "0 "]),
    pytest.param("--device cuda", ["--device cuda", "cpu"], marks=NO_CUDA),
])
def test_bad_input_of_the_evaluator_is_one_line(line, named, command, house):
    code, out, err = command("eval_ppl.py", line)
    check_refusal(code, err, *[word.format(house=house) for word in named])
    assert out == ""


def test_a_ratio_that_leaves_too_little_is_refused(command, tmp_path):
    code, out, err = command("soco.py", "--ratio 0.99")
    check_refusal(code, err, "0.99")
    assert out == "" and tree(tmp_path) == []


def test_a_loss_that_is_not_finite_ends_the_command(command, monkeypatch, tmp_path):
    backward, calls = torch.Tensor.backward, itertools.count()  # two of them are the metric's
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss, *grad: backward(loss * float("nan") if next(calls) == 2 else loss, *grad))
    code, _, err = command("soco.py", "--steps 7")
    check_refusal(code, err, " of 7", "learning rate")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_logits_that_are_not_finite_are_refused(command, house, tmp_path):
    model = tiny_gpt2()
    model.transformer.h[0].mlp.c_proj.weight.data *= 1e30
    model.transformer.h[0].mlp.c_fc.weight.data *= 1e30
    model.save_pretrained(tmp_path / "loud")
    tiny_tokenizer().save_pretrained(tmp_path / "loud")
    code, _, err = command("soco.py", f"--model {tmp_path}/loud --out new")
    check_refusal(code, err, "loud")
    assert not (tmp_path / "new").exists()


@pytest.fixture
def empty_hub():
    """Address of a hub on this machine that knows no model."""
    class NotFound(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_model_the_hub_does_not_know_is_refused(empty_hub, tmp_path):
    done = run_script("soco.py", "--model", "nobody/no-such-model", cwd=tmp_path, HF_ENDPOINT=empty_hub, HF_HUB_OFFLINE="0",
                      HF_HOME=str(tmp_path / "cache"), NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    check_refusal(done.returncode, done.stderr, "nobody/no-such-model", "neither a folder nor a model on the hub", "bundled")
    assert done.stdout == "" and not (tmp_path / "out").exists()


# ---- devices ------------------------------------------------------------------------------------

@contextlib.contextmanager
def meta_by_default():
    """A default device without memory: a tensor made on it by accident can't be read."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("make", MODELS)
def test_compressing_makes_nothing_on_the_default_device(make, steps):
    model, ids = make(), tokens(64)
    with meta_by_default():
        compress(model, [ids.view(4, 16)], 0.5, steps)
    assert {value.device.type for value in model.state_dict().values()} == {"cpu"}
    assert math.isfinite(perplexity(model, ids, 16).ppl)


@pytest.mark.parametrize("make", MODELS)
def test_saving_loading_and_scoring_make_nothing_on_the_default_device(make, tmp_path):
    model, ids = small(make), tokens(64)
    expected = perplexity(model, ids, 16)
    with meta_by_default():
        save(model, tmp_path / "model")
        again = load(tmp_path / "model")
        assert perplexity(again, ids, 16) == expected


def test_sampling_makes_nothing_on_the_default_device():
    blocks = sample_blocks(torch.arange(80), 16, 4, seed=0)
    with meta_by_default():
        assert torch.equal(sample_blocks(torch.arange(80, device="cpu"), 16, 4, seed=0), blocks)


def test_no_source_file_names_a_device_for_the_caller():
    sources = [path for folder in (ROOT, ROOT / "demo", ROOT / "bench") for path in folder.glob("*.py") if path != Path(__file__)]
    assert len(sources) > 4
    assert not [path.name for path in sources if ".cuda()" in path.read_text()]


# ================================ rpca.py ========================================================
#
# ---- robust PCA ---------------------------------------------------------------------------------

SIZES = [(60, 40), (40, 60), (121, 31), (37, 90), (50, 50)]


def planted(m, n, seed=0, device="cpu"):
    """(L, S): rank max(min(m, n) // 20, 1), and one entry in twenty."""
    k, size = max(min(m, n) // 20, 1), random(m, n, seed=seed, device=device)
    L = random(m, k, seed=seed + 1, device=device) @ random(k, n, seed=seed + 2, device=device)
    return L, 3 * size.sign() * (size.abs() > size.abs().flatten().quantile(0.95))


def low_rank(split):
    return (split.U * split.sigma[..., None, :]) @ split.V


def objective(L, S):
    return (torch.linalg.svdvals(L.double()).sum() + max(L.shape) ** -0.5 * S.double().abs().sum()).item()


def textbook(W, iterations):
    """(L, S, multipliers Y) of principal component pursuit by ADMM with a full SVD."""
    W, lam, mu = W.double(), max(W.shape) ** -0.5, W.numel() / (4 * W.abs().sum().item())
    S = Y = torch.zeros_like(W)
    for _ in range(iterations):
        U, sigma, V = torch.linalg.svd(W - S + Y / mu, full_matrices=False)
        L = U @ torch.diag((sigma - 1 / mu).clamp_min(0)) @ V
        S = W - L + Y / mu
        S = (S - lam / mu).clamp_min(0) + (S + lam / mu).clamp_max(0)
        Y = Y + mu * (W - L - S)
    return L, S, Y


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("m, n", SIZES)
def test_planted_low_rank_and_sparse_parts_are_recovered(m, n, dtype, device):
    L, S = (part.to(dtype) for part in planted(m, n, device=device))
    split = rpca.rpca(L + S)
    k = max(min(m, n) // 20, 1)
    assert (split.U.shape, split.sigma.shape, split.V.shape, split.S.dtype) == ((m, k), (k,), (k, n), dtype)
    assert (low_rank(split) - L).norm() < 1e-5 * L.norm()
    assert (split.S - S).norm() < 1e-5 * S.norm()
    assert torch.equal(split.S != 0, S != 0)
    for columns in (split.U, split.V.T):
        torch.testing.assert_close(columns.T @ columns, torch.eye(k, dtype=dtype, device=device), rtol=0, atol=1e-5)
    assert (split.sigma.diff() <= 0).all() and split.sigma.min() > 0


@pytest.mark.parametrize("max_iter", [1, 5, 500])
@pytest.mark.parametrize("tol", [1e-2, 1e-7])
def test_residuals_end_below_tol_or_at_the_limit(tol, max_iter):
    W = sum(planted(40, 60))
    split = rpca.rpca(W, tol=tol, max_iter=max_iter)
    assert split.residuals[-1] == pytest.approx(((W - low_rank(split) - split.S).norm() / W.norm()).item(), rel=1e-6, abs=1e-14)
    assert all(residual > tol for residual in split.residuals[:-1])
    assert split.residuals[-1] <= tol or len(split.residuals) == max_iter
    assert len(split.residuals) < 100


@pytest.mark.parametrize("m, n", SIZES[:3])
def test_a_batch_gives_what_its_matrices_give_alone(m, n, device):
    parts = [planted(m, n, seed=10 * i, device=device) for i in range(6)]
    batch = torch.stack([10.0 ** (i - 3) * (L + S) for i, (L, S) in enumerate(parts)]).view(2, 3, m, n)
    together = rpca.rpca(batch, tol=0, max_iter=25)
    alone = [rpca.rpca(W, tol=0, max_iter=25) for W in batch.flatten(0, 1)]
    for W, L, S, one in zip(batch.flatten(0, 1), low_rank(together).flatten(0, 1), together.S.flatten(0, 1), alone):
        torch.testing.assert_close(L, low_rank(one), rtol=0, atol=1e-10 * W.norm().item())
        torch.testing.assert_close(S, one.S, rtol=0, atol=1e-10 * W.norm().item())
    worst = [max(steps) for steps in zip(*(one.residuals for one in alone))]
    assert together.residuals == pytest.approx(worst, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_zero_matrix_is_split_into_zeros(dtype):
    W = torch.stack([random(8, 6), 0 * random(8, 6)]).to(dtype)
    for split in (rpca.rpca(W[1]), rpca.rpca(W, max_iter=20)):
        assert split.S.isfinite().all() and low_rank(split).isfinite().all()
        assert not split.S.view(-1, 8, 6)[-1].any() and not low_rank(split).view(-1, 8, 6)[-1].any()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("iterations", [3, 60])
@pytest.mark.parametrize("m, n", SIZES[:4])
def test_with_its_penalty_the_objective_is_that_of_the_textbook(m, n, iterations, dtype, tolerance, device):
    for W in three_kinds(m, n, device):
        split = rpca.rpca(W.to(dtype), penalty=W.numel() / (4 * W.abs().sum().item()), tol=0, max_iter=iterations)
        assert objective(low_rank(split), split.S) == pytest.approx(objective(*textbook(W, iterations)[:2]), rel=tolerance)


def three_kinds(m, n, device):
    return random(m, n, device=device), random(m, n, device=device) ** 3, sum(planted(m, n, device=device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("iterations, tolerance", [(10, 1e-3), (60, 1e-4), (1000, 1e-5)])
@pytest.mark.parametrize("m, n", SIZES[:4])
def test_the_objective_is_not_above_that_of_the_textbook(m, n, iterations, dtype, tolerance, device):
    for W in three_kinds(m, n, device):
        split = rpca.rpca(W.to(dtype), tol=1e-7, max_iter=iterations)
        assert objective(low_rank(split), split.S) <= objective(*textbook(W, iterations)[:2]) * (1 + tolerance)


def test_the_penalty_that_grows_needs_half_the_iterations(device):
    W = random(200, 300, device=device)
    held = rpca.rpca(W, penalty=W.numel() / (4 * W.abs().sum().item()), tol=1e-5).residuals
    assert 2 * len(rpca.rpca(W, tol=1e-5).residuals) < len(held) < 500


@pytest.mark.parametrize("m, n", [(30, 18), (18, 30)])
def test_the_split_meets_the_dual_bound(m, n):
    # |L|_* + lam |S|_1 >= <Y, L + S> whenever |Y|_2 <= 1 and |Y|_inf <= lam
    W = random(m, n) ** 3
    split, Y = rpca.rpca(W, tol=1e-10, max_iter=5000), textbook(W, 2000)[2]
    Y = Y / max(torch.linalg.matrix_norm(Y, 2), Y.abs().max() * max(m, n) ** 0.5)
    assert 0 < len(split.sigma) < min(m, n)
    assert objective(low_rank(split), split.S) <= (Y * W).sum().item() * (1 + 1e-6)


def test_lambda_and_penalty_are_what_the_caller_says():
    W = sum(planted(40, 60))
    assert torch.equal(rpca.rpca(W, lam=60 ** -0.5).S, rpca.rpca(W).S)
    first = rpca.rpca(W, penalty=0.01, max_iter=1)
    torch.testing.assert_close(low_rank(first), product(*rpca.singular_value_threshold(W, 100.0)))
    torch.testing.assert_close(first.S, rpca.soft_threshold(W - low_rank(first), 60 ** -0.5 / 0.01))
    assert (rpca.rpca(W, lam=0.05).S != 0).sum() > (rpca.rpca(W).S != 0).sum() > (rpca.rpca(W, lam=2.0).S != 0).sum() == 0


def product(U, sigma, V):
    return U @ torch.diag_embed(sigma) @ V


def nuclear(L):
    return torch.linalg.svdvals(L).sum()


@pytest.mark.parametrize("m, n", SHAPES)
def test_soft_threshold_shrinks_every_entry(m, n):
    A = random(m, n)
    for tau in (0.0, 0.5, 100.0):
        expected = [math.copysign(max(abs(a) - tau, 0), a) for a in A.flatten().tolist()]
        assert rpca.soft_threshold(A, tau).flatten().tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("m, n", SHAPES + [(30, 12), (12, 30)])
def test_singular_value_threshold_shrinks_every_singular_value(m, n, device):
    A = random(3, m, n, device=device)
    U, sigma, V = torch.linalg.svd(A, full_matrices=False)
    for tau in (0.1, 1.01 * sigma[0].median().item(), 100.0):
        for B, parts in [(A, (U, sigma, V)), (A[1], (U[1], sigma[1], V[1]))]:
            shrunk = (parts[1] - tau).clamp_min(0)
            found = rpca.singular_value_threshold(B, tau)
            k = max(int((shrunk > 0).sum(-1).max()), 1)
            torch.testing.assert_close(found[1], shrunk[..., :k], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(product(*found), product(parts[0], shrunk, parts[2]), rtol=1e-9, atol=1e-9)
    taus = torch.tensor([0.1, 1.0, 2.0], dtype=A.dtype, device=device).view(3, 1, 1)
    torch.testing.assert_close(product(*rpca.singular_value_threshold(A, taus)),
                               product(U, (sigma - taus[..., 0]).clamp_min(0), V), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("m, n", [(120, 150), (150, 120), (90, 200)])
def test_a_nearby_span_only_makes_thresholding_cheaper(m, n, device, monkeypatch):
    A = torch.stack([sum(planted(m, n, seed=seed, device=device)) for seed in (0, 7)])
    sigma, sizes, eigh = torch.linalg.svdvals(A), [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: sizes.append(gram.shape[-1]) or eigh(gram))
    k = max(min(m, n) // 20, 1)
    for tau in (1.01 * sigma[:, k].max().item(), 0.5 * sigma.median().item()):  # the planted rank survives; many more do
        exact = rpca.singular_value_threshold(A, tau)
        found = rpca.singular_value_threshold(A, tau, nearby=rpca.leading_range(A))
        error = (product(*found) - product(*exact)).norm() / A.norm()
        assert error < 1e-3
    assert sizes == [min(m, n), 20, min(m, n), 20, min(m, n)]         # too small a span is noticed


@pytest.mark.parametrize("m, n", [(60, 80), (80, 60), (4, 7)])
def test_leading_range_is_orthonormal_and_holds_the_leading_directions(m, n, device):
    U = torch.linalg.qr(random(m, 3, device=device))[0]
    A = 100 * U @ random(3, n, seed=1, device=device) + random(m, n, seed=2, device=device)
    for start in (None, random(m, 5, seed=3, device=device)):
        basis = rpca.leading_range(A, start)
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=A.dtype, device=device), rtol=0, atol=1e-12)
        assert (U - basis @ (basis.T @ U)).norm() < 0.02


@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("operator, norm", [(rpca.soft_threshold, lambda S: S.abs().sum()),
                                            (lambda A, tau: product(*rpca.singular_value_threshold(A, tau)), nuclear)])
def test_thresholding_is_the_minimiser_of_its_problem(operator, norm, m, n):
    A = random(m, n)
    for tau in (0.3, 1.0, 3.0):
        def loss(X):
            return tau * norm(X) + (X - A).square().sum() / 2

        X = operator(A, tau)
        for i in range(12):  # what is minimised is strongly convex: it grows by |D|^2 / 2
            D = 10.0 ** -(i % 3) * random(m, n, seed=20 + i)
            assert loss(X + D) - loss(X) >= D.square().sum() / 2 - 1e-9


# ---- the global mask ----------------------------------------------------------------------------

def test_score_function_is_the_gradient_of_the_log_probability(device):
    p = random(5, 7, seed=1, device=device).sigmoid().requires_grad_()
    mask = (random(5, 7, seed=2, device=device) > 0).double()
    gradient, = torch.autograd.grad(torch.distributions.Bernoulli(p).log_prob(mask).sum(), p)
    torch.testing.assert_close(rpca.score_function(mask, p.detach()), gradient, rtol=1e-12, atol=0)


TWO_ITEMS = torch.tensor([[0.3, 2.0], [1.1, -0.7]], dtype=torch.float64)  # loss of [first kept][second kept]


def gradient_on_two_items(p):
    """Gradient of the expected loss of TWO_ITEMS under Bernoulli(p)."""
    p = p.clone().requires_grad_()
    both = torch.stack([1 - p[0], p[0]])[:, None] * torch.stack([1 - p[1], p[1]])
    return torch.autograd.grad((both * TWO_ITEMS).sum(), p)[0]


@pytest.mark.parametrize("baseline", [0.0, 0.8])
def test_loss_times_score_is_the_gradient_on_average(baseline):
    p = torch.tensor([0.35, 0.8], dtype=torch.float64)
    expected = 0
    for mask in itertools.product([0, 1], repeat=2):
        chance = math.prod(q if kept else 1 - q for q, kept in zip(p.tolist(), mask))
        expected += chance * (TWO_ITEMS[mask] - baseline) * rpca.score_function(torch.tensor(mask).double(), p)
    torch.testing.assert_close(expected, gradient_on_two_items(p), rtol=1e-12, atol=0)


def test_a_policy_step_is_the_gradient_on_average():
    # the first draw only sets the baseline; all pairs of draws are met, and weighed by their chance
    p, ends = torch.tensor([0.35, 0.6], dtype=torch.float64), {}
    for seed in range(300):
        draws = []

        def loss_of(masks, step):
            assert len(draws) == step
            draws.append(tuple(masks[0].int().tolist()))
            return TWO_ITEMS[draws[-1]].item()

        end, losses = rpca.policy_gradient(loss_of, [p], [1], 2, steps=2, lr=1e-3, generator=torch.Generator().manual_seed(seed))
        assert losses == [TWO_ITEMS[draw].item() for draw in draws]
        ends[tuple(draws)] = end[0]
    assert len(ends) == 16
    mean = sum(math.prod(q if kept else 1 - q for draw in draws for q, kept in zip(p.tolist(), draw)) * end
               for draws, end in ends.items())
    torch.testing.assert_close(mean, p - 1e-3 * gradient_on_two_items(p), rtol=1e-12, atol=0)


def test_a_mask_that_never_varies_is_left_alone():
    p = [torch.tensor([0.0, 0.0, 1.0, 1.0])]
    end, losses = rpca.policy_gradient(lambda masks, step: step % 2, p, [1], 2, steps=20)
    assert set(losses) == {0, 1} and torch.equal(end[0], p[0])


def test_policy_gradient_finds_the_good_item_within_the_budget(device):
    p, cost, budget = [torch.full((3,), 0.3, device=device), torch.full((2, 5), 0.3, device=device)], [4, 1], 6.6

    def loss_of(masks, step):
        assert [mask.shape for mask in masks] == [(3,), (2, 5)] and all(((m == 0) | (m == 1)).all() for m in masks)
        return 1 - masks[0][1].item()

    end, losses = rpca.policy_gradient(loss_of, p, cost, budget, steps=400, generator=torch.Generator(device).manual_seed(0))
    assert len(losses) == 400 and sum(losses[-50:]) < 0.2 * sum(losses[:50])
    assert end[0][1] > 0.9 and end[0][1] == max(q.max() for q in end)
    assert all(q.min() >= 0 and q.max() <= 1 for q in end)
    assert 4 * end[0].double().sum() + end[1].double().sum() <= budget
    assert torch.equal(p[0], torch.full_like(p[0], 0.3))


def corners_of_the_budget(costs, budget):
    """Vertices of {0 <= y <= 1, costs y <= budget}: at most one coordinate is neither 0 nor 1."""
    for corner in itertools.product([0.0, 1.0], repeat=len(costs)):
        spent = sum(c * y for c, y in zip(costs, corner))
        if spent <= budget:
            yield corner
            for i, c in enumerate(costs):
                if corner[i] == 0 and spent + c > budget:
                    yield corner[:i] + ((budget - spent) / c,) + corner[i + 1:]


def expected_cost(p, cost):
    return sum(c * q.double().sum().item() for q, c in zip(p, cost))


@pytest.mark.parametrize("spread", [0.2, 3.0, 30.0])
@pytest.mark.parametrize("budget", [0, 0.7, 4, 9.5, 100])
def test_project_gives_the_nearest_point_of_the_budget(budget, spread, device):
    for seed in range(5):
        q = 0.5 + spread * random(6, seed=seed, device=device)
        costs = [5, 5, 1, 1, 1, 1]
        x = rpca.project([q[:2], q[2:].view(2, 2)], [5, 1], budget)
        assert [part.shape for part in x] == [(2,), (2, 2)]
        assert expected_cost(x, [5, 1]) <= budget
        x = torch.cat([part.flatten() for part in x])
        assert x.min() >= 0 and x.max() <= 1
        assert sum(c * part for c, part in zip(costs, x.tolist())) <= budget + 1e-12
        for corner in corners_of_the_budget(costs, budget):  # x is nearest: no corner lies on the side of q
            assert (q - x) @ (torch.tensor(corner, dtype=q.dtype, device=device) - x) <= 1e-9 * (1 + spread)


def test_project_leaves_alone_what_is_inside(device):
    p = [torch.rand(4, device=device), torch.rand(3, 5, device=device)]
    spent = 7 * p[0].double().sum().item() + p[1].double().sum().item()
    assert expected_cost(p, [7, 1]) == pytest.approx(spent, rel=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(rpca.project(p, [7, 1], spent + 1e-6), p))
    assert expected_cost(rpca.project(p, [7, 1], spent / 2), [7, 1]) == pytest.approx(spent / 2, rel=1e-5)


@pytest.mark.parametrize("levels", [3, 1000])
def test_keep_most_probable_is_the_greedy_loop(levels, device):
    shapes, cost = [(3,), (2, 4), (2,), (3, 3)], [5, 1, 3, 1]
    for seed in range(20):
        p = [(random(*shape, seed=100 * seed + i, device=device).sigmoid() * levels).round().float() / levels
             for i, shape in enumerate(shapes)]
        each = [c for q, c in zip(p, cost) for _ in range(q.numel())]
        flat = torch.cat([q.flatten() for q in p]).tolist()
        for budget in [0, 0.9, 1, 4, 7.5, 11, 20, 37, 38, 100]:
            left, expected = budget, [False] * len(flat)
            for i in sorted(range(len(flat)), key=lambda i: -flat[i]):
                if each[i] <= left:
                    expected[i], left = True, left - each[i]
            masks = rpca.keep_most_probable(p, cost, budget)
            assert [mask.shape for mask in masks] == shapes and all(mask.dtype == torch.bool for mask in masks)
            assert torch.cat([mask.flatten() for mask in masks]).tolist() == expected
            assert sum(c * mask.sum().item() for mask, c in zip(masks, cost)) <= budget


@pytest.mark.parametrize("values", [
    [random(40, 5).square(), random(13, seed=1).square()],
    [(2 * random(40, 5)).round().square(), (2 * random(13, seed=1)).round().square()],
    [(30 * random(40, 5)).exp(), torch.zeros(7), torch.tensor([1e-40, 1e-45, 3e38])],
    [torch.zeros(3, 3)],
], ids=["different", "ties", "every magnitude", "zeros"])
def test_threshold_is_what_sorting_finds(values, device):
    values = [value.float().to(device) for value in values]
    falling = torch.cat([value.flatten() for value in values]).sort(descending=True)[0].tolist()
    for count in range(len(falling) + 3):
        cut = metric.threshold(lambda: iter(values), count)
        kept = sum((value > cut).sum().item() for value in values)
        if count >= len(falling):
            assert kept == len(falling)
        else:
            assert cut == falling[count]
            assert kept == sum(value > falling[count] for value in falling) <= count


def test_threshold_takes_a_transposed_tensor():
    value = random(6, 9).square().float()
    assert metric.threshold(lambda: [value.T], 20) == metric.threshold(lambda: [value], 20)


# ---- values -------------------------------------------------------------------------------------

def problem(m, n, dtype=torch.float64, device="cpu"):
    """Target T [m, n], mask of half of it, and the Gram matrix of correlated inputs."""
    T, mask = random(m, n, device=device), random(m, n, seed=1, device=device) > 0
    x = random(60, n, seed=2, device=device) @ random(n, n, seed=3, device=device)
    return T.to(dtype), mask, (x.T @ x / 60).to(dtype)


def output_error(E, G):
    return (E @ G @ E.T).trace().item()


@pytest.mark.parametrize("dtype, slack", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("m, n", SHAPES + [(20, 40)])
def test_refit_lowers_the_error_and_stays_on_the_mask(m, n, dtype, slack, device):
    T, mask, G = problem(m, n, dtype, device)
    errors = [output_error(T - T * mask, G)]
    for iterations in (1, 2, 4, 12, 30):
        S = rpca.refit(T, T * mask, mask, G, iterations)
        assert S.dtype == dtype and not S[~mask].any() and S.isfinite().all()
        errors.append(output_error(T - S, G))
    assert all(after <= before * (1 + slack) + slack for before, after in zip(errors, errors[1:]))
    if n > 1:
        assert errors[-1] < 0.9 * errors[0]


def test_refit_lowers_the_error_of_any_start(device):
    T, mask, G = problem(20, 40, device=device)
    S = random(20, 40, seed=4, device=device)
    damped = G + 1e-3 * G.diagonal().mean() * torch.eye(40, dtype=G.dtype, device=device)
    errors = [output_error(T - rpca.refit(T, S, mask, G, iterations), damped) for iterations in range(15)]
    assert errors[0] == pytest.approx(output_error(T - S * mask, damped), rel=1e-12)
    assert all(after < before for before, after in zip(errors, errors[1:]))


@pytest.mark.parametrize("m, n", SHAPES)
def test_refit_ends_at_the_least_squares_of_every_row(m, n, device):
    T, mask, G = problem(m, n, device=device)
    S = rpca.refit(T, T * mask, mask, G, iterations=200, damping=1e-6)
    damped = G + 1e-6 * G.diagonal().mean() * torch.eye(n, dtype=G.dtype, device=device)
    root = torch.linalg.cholesky(damped)                          # |(t - s) root|^2, row by row
    for row, kept, target in zip(S, mask, T):
        exact = torch.linalg.lstsq(root[kept].T, root.T @ target[:, None]).solution[:, 0] if kept.any() else target[:0]
        torch.testing.assert_close(row[kept], exact, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("inputs", [[0, 0, 0, 0, 0, 0], [1, 2, 0, 0, 3, 0]])
def test_refit_bears_inputs_that_are_always_zero(inputs):
    T, mask, _ = problem(4, 6)
    S = rpca.refit(T.float(), T.float() * mask, mask, torch.diag(torch.tensor(inputs).float()))
    torch.testing.assert_close(S, T.float() * mask)  # a diagonal G leaves nothing to make up for


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("m, n", [(20, 30), (31, 17)])
def test_alternating_never_raises_the_error(m, n, k, device):
    Q = random(m, n, device=device) ** 3
    V, numbers = torch.linalg.svd(Q)[2][:k], m * n // 2
    errors = []
    for rounds in range(8):
        U, V_ = rpca.alternate(Q, V, numbers, rounds)
        assert U.shape == (m, k) and V_.shape == (k, n)
        left = (Q - U @ V_).abs().flatten().sort()[0]
        errors.append(left[:m * n - (numbers - k * (m + n))].square().sum().item())
    truncated = (Q - Q @ V.T @ V).abs().flatten().sort()[0]
    assert errors[0] == pytest.approx(truncated[:m * n - (numbers - k * (m + n))].square().sum().item(), rel=1e-9)
    assert all(after <= before * (1 + 1e-12) for before, after in zip(errors, errors[1:]))
    assert errors[-1] < 0.99 * errors[0]


def test_alternating_finds_a_planted_split(device):
    L, S = planted(60, 40, device=device)
    V = torch.linalg.svd(L + S)[2][:2]
    U, V = rpca.alternate(L + S, V, 2 * 100 + (S != 0).sum().item(), rounds=60)
    assert (U @ V - L).norm() < 1e-6 * L.norm()


# ---- the layer ----------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (7, 9), (1, 64), (129, 3)])
def test_bits_come_back_one_an_entry(shape, device):
    for mask in (random(*shape, device=device) > 0, torch.ones(shape, dtype=torch.bool, device=device)):
        packed = sparse.pack_bits(mask)
        assert packed.dtype == torch.uint8 and packed.numel() == -(-math.prod(shape) // 8)
        assert np.array_equal(packed.cpu().numpy(), np.packbits(mask.cpu().numpy(), bitorder="little"))
        unpacked = sparse.unpack_bits(packed, mask.shape)
        assert unpacked.dtype == torch.bool and torch.equal(unpacked, mask)


def sum_layer(m, n, k, bias, device="cpu"):
    """(LowRankPlusSparse, its dense weight, its bias or 0, S, inputs), float64."""
    U, V, b = random(m, k, device=device), random(k, n, seed=1, device=device), random(m, seed=2, device=device) if bias else None
    S = random(m, n, seed=3, device=device) * (random(m, n, seed=4, device=device) > 0.3)
    layer = rpca.LowRankPlusSparse.of(U, V, S, b, like=torch.empty(m, n, dtype=torch.float64, device=device))
    return layer.eval(), U @ V + S, 0 if b is None else b, S, random(2, 4, n, seed=5, device=device)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("m, n", SHAPES)
def test_a_sum_layer_answers_for_the_weight_it_replaced(m, n, k, bias, device):
    layer, W, b, S, x = sum_layer(m, n, k, bias, device)
    torch.testing.assert_close(layer(x), x @ W.T + b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(layer(x), x @ W.T + b, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.sparse(), S)
    assert sum(p.numel() for p in layer.parameters()) == k * (m + n) + S.count_nonzero().item() + (m if bias else 0)


def test_a_sum_layer_without_any_entry_is_its_low_rank_part():
    U, V, x = random(7, 2), random(2, 5, seed=1), random(4, 5, seed=2)
    layer = rpca.LowRankPlusSparse.of(U, V, torch.zeros(7, 5), None, like=U)
    torch.testing.assert_close(layer(x), x @ (U @ V).T, rtol=1e-12, atol=1e-12)
    assert layer.values.numel() == 0


@pytest.mark.parametrize("k", [0, 2])
def test_the_gradient_reaches_values_factors_and_bias(k, device):
    layer, W, b, S, x = sum_layer(7, 5, k, True, device)
    with torch.no_grad():
        layer(x)                                                  # leaves an unpacked S behind
    target, dense = random(7, seed=6, device=device), W.clone().requires_grad_()
    layer.requires_grad_()
    (layer(x) - target).square().sum().backward()
    (x @ dense.T + b - target).square().sum().backward()
    torch.testing.assert_close(layer.values.grad, dense.grad[S != 0], rtol=1e-10, atol=1e-10)
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())
    if k:
        torch.testing.assert_close(layer.up.weight.grad, dense.grad @ layer.down.weight.T, rtol=1e-10, atol=1e-10)


def dense_weight(layer):
    """The weight [m, n] of a LowRankPlusSparse, from its parameters and the bits of its mask alone."""
    m, n = layer.shape
    bits = np.unpackbits(layer.mask.cpu().numpy(), bitorder="little")
    assert not bits[m * n:].any() and bits.sum() == len(layer.values)
    W = torch.zeros(m, n, dtype=layer.values.dtype)
    W[torch.from_numpy(bits[:m * n].reshape(m, n).astype(bool))] = layer.values.detach().cpu()
    return W + (layer.up.weight @ layer.down.weight).detach().cpu() if layer.up else W


@pytest.mark.parametrize("change", ["dtype", "dtype and back", "step", "state"])
def test_a_sum_layer_follows_its_values_after_a_forward_pass(change, device):
    for _ in range(40):  # memory that is freed may be given out again
        layer, _, b, _, x = sum_layer(64, 64, 2, True, device)
        with torch.no_grad():
            layer(x)
            if change == "step":
                layer.values += 1
            elif change == "state":
                state = {name: value + 1 if value.is_floating_point() else value for name, value in layer.state_dict().items()}
                layer.load_state_dict(state)
            else:
                layer.to(torch.bfloat16)
                layer.to(torch.float64 if change == "dtype and back" else torch.float32)
            x = x.to(layer.values)
            assert layer.mask.dtype == torch.uint8 and layer(x).dtype == layer.values.dtype
            expected = F.linear(x, dense_weight(layer).to(device), layer.bias)
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


# ---- compressing a model ------------------------------------------------------------------------

def cap(make=tiny_gpt2, ratio=0.5, batches=None, seed=0, **settings):
    model = make()
    torch.manual_seed(seed)
    return rpca.compress(model, batches or [tokens(2, 16), tokens(2, 16, seed=1)], ratio, **settings)


SETTINGS = [{}, {"rank_share": 0.3}, {"rank_share": 0, "rounds": 1}, {"rank_share": 0.3, "keep": same_share_of_matrices, "refitted": False},
            {"scale": False, "rounds": 2}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("make", MODELS)
def test_cap_meets_the_budget_exactly(make, ratio, settings):
    dense, model = block_layers(make()), cap(make, ratio, **settings)
    new = [model.get_submodule(name) for name in dense]
    stored = sum(p.numel() for layer in new for p in layer.parameters())
    stored -= sum(layer.bias.numel() for layer in dense.values() if layer.bias is not None)
    budget = (1 - ratio) * sum(matrix(layer).numel() for layer in dense.values())
    assert all(isinstance(layer, rpca.LowRankPlusSparse) for layer in new)
    assert stored <= budget
    assert budget - stored < (len(new) + 1 if settings.get("keep") else 1)  # rounded down, matrix by matrix or once
    for layer in new:
        m, n = layer.shape
        k = len(layer.down.weight) if layer.up else 0
        assert settings.get("rank_share", rpca.RANK_SHARE) > 0 or k == 0
        if settings.get("keep"):
            assert k == int(settings["rank_share"] * int((1 - ratio) * m * n) / (m + n))
    assert ratio > 0.5 or settings.get("rank_share", 0) == 0 or any(layer.up for layer in new)


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("make", MODELS)
def test_two_of_four_keeps_the_two_worthiest_of_every_four_that_the_budget_has_room_for(make, ratio):
    dense, settings = block_layers(make()), {"keep": rpca.keep_two_of_four, "rank_share": 0, "rounds": 1, "refitted": False, "scale": False}
    model = cap(make, ratio, **settings)
    fours = {name: matrix(layer).unflatten(1, (-1, 4)) for name, layer in dense.items()}
    kept = {name: dense_weight(model.get_submodule(name)).unflatten(1, (-1, 4)) != 0 for name in fours}
    numbers = sum(W.numel() for W in fours.values())
    assert sum(int(mask.sum()) for mask in kept.values()) == min(int((1 - ratio) * numbers), numbers // 2)
    for name, W in fours.items():
        assert kept[name].sum(-1).max() <= 2
        assert (W.abs().masked_fill(~kept[name], math.inf).amin(-1) >= W.abs().sort(-1).values[..., 2] * (1 - 1e-6)).all()
    rounds = cap(make, ratio, keep=rpca.keep_two_of_four, rank_share=0.1)
    assert all(rounds.get_submodule(name).sparse().unflatten(1, (-1, 4)).count_nonzero(-1).max() <= 2 for name in dense)


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("make", MODELS)
def test_the_policy_estimator_stays_in_the_budget(make, ratio):
    dense, model = block_layers(make()), cap(make, ratio, estimator="policy")
    stored = [sum(p.numel() for p in model.get_submodule(name).parameters()) - (0 if layer.bias is None else layer.bias.numel())
              for name, layer in dense.items()]
    budget = (1 - ratio) * sum(matrix(layer).numel() for layer in dense.values())
    assert budget - 1 < sum(stored) <= budget
    assert math.isfinite(perplexity(model, tokens(64), 16).ppl)


@pytest.mark.parametrize("settings, named", [
    ({"ratio": 1.0}, "ratio 1.0"), ({"rounds": 0}, "rounds 0"), ({"rounds": -1, "estimator": "policy"}, "rounds -1"),
    ({"estimator": "luck"}, "estimator luck"), ({"rank_share": 1.5}, "rank_share 1.5"), ({"rank_share": -1}, "rank_share -1"),
    ({"keep": rpca.keep_two_of_four, "estimator": "policy"}, "2:4"),
    ({"keep": rpca.keep_two_of_four, "make": lambda: tiny_gpt2(n_inner=22)}, "multiple of 4")])
def test_settings_that_cannot_be_met_are_refused_before_the_work(settings, named, monkeypatch):
    monkeypatch.setattr(rpca, "collect_metric", None)
    with pytest.raises(UserError, match=named):
        cap(**settings)


def test_a_loss_that_is_not_finite_ends_the_policy():
    with pytest.raises(FloatingPointError, match="draw 3 of 3"):
        rpca.policy_gradient(lambda masks, step: math.nan if step == 2 else 1.0, [torch.full((4,), 0.5)], [1], 2, steps=3)


@pytest.mark.parametrize("method", [soco, rpca])
@pytest.mark.parametrize("training", [False, True])
def test_compressed_layers_are_in_the_mode_of_the_model(method, training):
    model = method.compress(tiny_gpt2().train(training), [tokens(2, 16)], 0.5, **{soco: {"steps": 2}, rpca: {}}[method])
    assert {module.training for module in model.modules()} == {training}


def test_a_model_in_use_unpacks_its_sparse_parts_once(monkeypatch):
    model, unpacked, sparse = cap(), [], rpca.LowRankPlusSparse.sparse
    monkeypatch.setattr(rpca.LowRankPlusSparse, "sparse", lambda layer: unpacked.append(layer) or sparse(layer))
    with torch.no_grad():
        for _ in range(3):
            model(tokens(2, 16))
    assert len(unpacked) == len(set(unpacked)) == 8


def test_compress_and_rpca_need_no_gradients_and_make_none():
    with torch.no_grad():
        model = cap()
    assert not rpca.rpca(torch.nn.Linear(20, 30).weight, max_iter=3).S.requires_grad
    assert math.isfinite(perplexity(model, tokens(64), 16).ppl)


@pytest.mark.parametrize("estimator", rpca.ESTIMATORS)
@pytest.mark.parametrize("make", MODELS)
def test_a_cap_model_is_the_dense_model_with_its_weights(make, estimator):
    model, dense = cap(make, rank_share=0.3, estimator=estimator), make()
    layers = block_layers(dense)
    swap(dense, {layer: dense_like(layer, dense_weight(model.get_submodule(name)), layer.bias) for name, layer in layers.items()})
    ids = tokens(3, 20, seed=5)
    torch.testing.assert_close(logits(model, ids), logits(dense, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"keep": same_share_of_matrices}, {"scale": False}], ids=str)
@pytest.mark.parametrize("make", MODELS)
def test_one_round_without_refitting_keeps_the_weights_of_most_predicted_loss(make, settings):
    model, batches = make(), [tokens(4, 32)]
    layers = block_layers(model)
    metrics = collect_metric(model, layers, batches)
    new = rpca.compressed_layers(model, layers, metrics, batches, 0.5, rank_share=0, rounds=1, refitted=False, **settings)
    groups = {}
    for name, layer in layers.items():
        W, kept = matrix(layer), dense_weight(new[layer]) != 0
        assert torch.equal(dense_weight(new[layer]), W * kept)
        worth = metrics[name].R[:, None] * W.square() * metrics[name].G.diagonal() if settings.get("scale", True) else W.square()
        groups.setdefault(name if settings.get("keep") else "all", []).append((worth[kept], worth[~kept]))
    for group in groups.values():
        kept, dropped = (torch.cat(parts) for parts in zip(*group))
        assert abs(len(kept) - len(dropped)) <= 1
        assert kept.min() >= dropped.max() * (1 - 1e-4)


def predicted_loss(model, metrics, compressed):
    loss = 0.0
    for name, layer in block_layers(model).items():
        E = (matrix(layer) - dense_weight(compressed.get_submodule(name))).double()
        loss += (metrics[name].R.double() @ (E @ metrics[name].G.double() @ E.T).diagonal()).item()
    return loss


@pytest.mark.parametrize("rank_share", [0, 0.2])
@pytest.mark.parametrize("make", MODELS)
def test_refitting_and_rounds_lower_the_predicted_loss(make, rank_share):
    model, batches = make(), [tokens(8, 32)]
    metrics = collect_metric(model, block_layers(model), batches)
    masked, once, rounds = (cap(make, batches=batches, metrics=metrics, rank_share=rank_share, **settings)
                            for settings in ({"rounds": 1, "refitted": False}, {"rounds": 1}, {"rounds": 8}))
    losses = [predicted_loss(model, metrics, compressed) for compressed in (masked, once)]
    for name, layer in block_layers(model).items():  # the best values there are on the mask of one round
        new = once.get_submodule(name)
        low = new.up.weight.detach() @ new.down.weight.detach() if new.up else 0
        S, mask = new.sparse().detach(), new.sparse() != 0
        new.values.data = rpca.refit(matrix(layer) - low, S, mask, metrics[name].G, iterations=500, damping=1e-6)[mask]
    losses.append(predicted_loss(model, metrics, once))
    losses.append(predicted_loss(model, metrics, rounds))
    assert losses == sorted(losses, reverse=True) and losses[1] < 0.95 * losses[0] and losses[3] < 0.95 * losses[2]


@pytest.mark.parametrize("make", MODELS)
def test_low_rank_and_sparse_parts_make_up_the_weight(make):
    dense, model = make(), cap(make, rank_share=0.3, rounds=1, refitted=False)
    for name, layer in block_layers(dense).items():
        new = model.get_submodule(name)
        kept = new.sparse() != 0
        torch.testing.assert_close(dense_weight(new)[kept], matrix(layer)[kept], rtol=1e-4, atol=1e-5)
        if new.up:
            torch.testing.assert_close(new.up.weight.norm(dim=0), new.down.weight.norm(dim=1), rtol=1e-4, atol=0)


def test_low_rank_plus_sparse_weights_are_found_in_a_model():
    model, batches = tiny_gpt2(), [tokens(8, 32)]
    layers = block_layers(model)
    for i, layer in enumerate(layers.values()):
        matrix(layer).copy_(0.05 * sum(planted(*matrix(layer).shape, seed=10 * i)))
    metrics = collect_metric(model, layers, batches)
    with_low_rank, without = (cap(lambda: copy.deepcopy(model), 0.75, batches, metrics=metrics, keep=same_share_of_matrices, rank_share=share)
                              for share in (0.5, 0))
    assert predicted_loss(model, metrics, with_low_rank) < 0.02 * predicted_loss(model, metrics, without)


def test_the_global_mask_predicts_less_loss_than_a_uniform_one():
    model, batches = tiny_gpt2(), [tokens(8, 32)]
    metrics = collect_metric(model, block_layers(model), batches)
    everywhere, uniform = (cap(batches=batches, metrics=metrics, keep=keep) for keep in (None, same_share_of_matrices))
    assert predicted_loss(model, metrics, everywhere) < predicted_loss(model, metrics, uniform)


def test_cap_lowers_the_divergence_of_magnitude_and_wanda(demo):
    dense, batches = demo
    layers = block_layers(dense)
    metrics = collect_metric(dense, layers, batches[:4])
    target, found = [logits(dense, ids) for ids in batches[4:]], {}
    for prune in (baselines.magnitude, baselines.wanda):
        with swapped(dense, baselines.prune_all(prune, layers, metrics, 0.5)):
            found[prune] = divergence(target, dense, batches[4:])
    ours = divergence(target, rpca.compress(copy.deepcopy(dense), batches[:4], 0.5, metrics), batches[4:])
    assert ours < 0.6 * min(found.values())


@pytest.mark.parametrize("estimator", rpca.ESTIMATORS)
def test_same_seed_same_mask(estimator):
    states = [cap(estimator=estimator, rank_share=0.3, seed=7).state_dict() for _ in range(2)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))


def test_the_policy_draws_from_its_own_seed():
    model, batches = tiny_gpt2(), [tokens(2, 16)]
    layers = block_layers(model)
    metrics = collect_metric(model, layers, batches)
    found = []
    for seed in (0, 0, 1):
        new = rpca.compressed_layers(model, layers, metrics, batches, 0.5, estimator="policy", seed=seed)
        found.append(torch.cat([dense_weight(new[layer]).flatten() for layer in layers.values()]))
        torch.rand(1)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("estimator", rpca.ESTIMATORS)
def test_choosing_leaves_the_dense_model_alone(estimator):
    model, batches = tiny_gpt2(), [tokens(2, 16)]
    model.transformer.wpe.requires_grad_(False)
    layers, flags = block_layers(model), {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    new = rpca.compressed_layers(model, layers, collect_metric(model, layers, batches), batches, 0.5, estimator=estimator)
    assert block_layers(model) == layers and new.keys() == set(layers.values())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad for layer in new.values() for p in layer.parameters())


@pytest.mark.parametrize("settings", [
    {}, {"rank_share": 0.3, "keep": same_share_of_matrices}, {"scale": False}, {"estimator": "policy"}], ids=str)
@pytest.mark.parametrize("dead", ["inputs", "outputs"])
def test_cap_bears_a_layer_that_does_nothing(dead, settings):
    model = tiny_gpt2()
    block = model.transformer.h[1].mlp
    if dead == "outputs":
        block.c_proj.weight.data.zero_()
    else:
        block.c_fc.weight.data.zero_()
        block.c_fc.bias.data.fill_(-1000)
    layers = block_layers(model)
    rpca.compress(model, [tokens(2, 16)], 0.5, **settings)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    numbers = sum(len(model.get_submodule(name).values) for name in layers)
    assert numbers <= 0.5 * sum(matrix(layer).numel() for layer in layers.values())


@pytest.mark.parametrize("ratio", [0, 1, 1.5, -0.1, float("nan")])
def test_an_impossible_ratio_of_cap_is_named(ratio):
    with pytest.raises(UserError, match=f"ratio {ratio}"):
        cap(ratio=ratio)


@pytest.mark.parametrize("make", MODELS)
def test_a_uniform_mask_takes_the_same_share_of_every_matrix_or_row(make):
    rows = cap(make, keep=same_share_of_rows, rank_share=0, rounds=1, refitted=False)
    model = cap(make, keep=same_share_of_matrices, rank_share=0)
    for name, layer in block_layers(make()).items():
        assert (rows.get_submodule(name).sparse() != 0).sum(1).tolist() == [matrix(layer).shape[1] // 2] * len(matrix(layer))
        new = model.get_submodule(name)
        stored = sum(p.numel() for p in new.parameters()) - (0 if layer.bias is None else layer.bias.numel())
        assert 0 <= matrix(layer).numel() / 2 - stored < 2


# ---- on disk ------------------------------------------------------------------------------------

@pytest.mark.parametrize("estimator", rpca.ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", MODELS)
def test_a_saved_cap_model_comes_back_bit_for_bit(make, dtype, estimator, device, tmp_path):
    ids = tokens(2, 16, device=device)
    make().save_pretrained(tmp_path / "dense")
    model = rpca.load(tmp_path / "dense", dtype=dtype).to(device)
    rpca.compress(model, [ids], 0.5, rank_share=0.3, estimator=estimator)
    rpca.save(model, tmp_path / "model")
    again = rpca.load(tmp_path / "model").to(device)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    again.generate(ids, max_new_tokens=3, do_sample=False)


def test_a_cap_folder_loads_in_another_dtype(tmp_path):
    model, ids = cap(rank_share=0.3), tokens(2, 16)
    rpca.save(model, tmp_path / "model")
    again = rpca.load(tmp_path / "model", dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    expected, found = model.to(torch.bfloat16).state_dict(), again.state_dict()
    assert all(torch.equal(found[name].to(value), value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", MODELS)
def test_half_the_numbers_take_at_most_six_tenths_of_the_bytes(make, dtype, tmp_path):
    dense = block_layers(make())
    rpca.save(cap(lambda: make().to(dtype), rank_share=0.1), tmp_path / "model")
    tensors, stored, before = load_file(tmp_path / "model" / "model.safetensors"), 0, 0
    for name, layer in dense.items():
        parts = {key: value for key, value in tensors.items() if key.startswith(name + ".") and key != name + ".bias"}
        assert parts[name + ".mask"].nbytes == -(-matrix(layer).numel() // 8)
        stored += sum(value.nbytes for value in parts.values())
        before += matrix(layer).numel() * dtype.itemsize
    assert 0.5 * before < stored <= 0.60 * before


def test_the_library_of_cap_prints_nothing_and_another_process_reads_its_folder(tmp_path):
    script = ("import rpca, test_soco as t, torch; m = t.tiny_gpt2(); ids = t.tokens(2, 16); torch.manual_seed(0); "
              "rpca.compress(m, [ids], 0.5, rank_share=0.3, estimator='policy'); rpca.save(m, 'x'); rpca.load('x'); "
              "m = t.tiny_gpt2(); rpca.compress(m, [ids], 0.5, rank_share=0.3); rpca.save(m, 'y'); "
              "torch.save(t.logits(m, ids), 'logits')")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert torch.equal(logits(rpca.load(tmp_path / "y"), tokens(2, 16)), torch.load(tmp_path / "logits"))


# ---- baselines ----------------------------------------------------------------------------------

@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75, 0.8, 0.9])
@pytest.mark.parametrize("m, n", SHAPES + [(20, 30)])
def test_magnitude_and_wanda_keep_the_largest(m, n, ratio):
    W, D = random(m, n), random(n, seed=1).abs()
    falling = W.abs().flatten().sort(descending=True)[0]
    left = 1 - Fraction(str(ratio))
    count = math.floor(left * m * n)
    assert torch.equal(baselines.magnitude(W, None, ratio), W * (W.abs() > (falling[count] if count < m * n else -1)))
    pruned = baselines.wanda(W, (D ** 2).diag(), ratio)
    for row, kept in zip(W.tolist(), pruned.tolist()):
        best = sorted(range(n), key=lambda i: -abs(row[i]) * D[i].item())[:math.floor(left * n)]
        assert kept == [w if i in best else 0 for i, w in enumerate(row)]


@pytest.mark.parametrize("m, n, ratio", [(40, 64, 0.5), (24, 200, 0.5), (31, 130, 0.6), (9, 300, 0.25)])
def test_sparsegpt_leaves_the_asked_sparsity_and_less_error_than_pruning(m, n, ratio):
    W, _, G = problem(m, n, torch.float32)
    pruned = baselines.sparsegpt(W, G, ratio)
    starts = range(0, n, 128)
    assert pruned.count_nonzero() == m * n - sum(round(ratio * m * min(128, n - start)) for start in starts)
    assert abs(pruned.count_nonzero() - (1 - ratio) * m * n) <= 0.5 * len(starts)
    cut = W.abs().flatten().sort(descending=True)[0][pruned.count_nonzero()]
    assert output_error(W - pruned, G) < 0.8 * output_error(W - W * (W.abs() > cut), G)


def test_sparsegpt_drops_a_dead_input_and_leaves_the_rest_at_ratio_zero():
    W, _, G = problem(8, 12, torch.float32)
    G[3], G[:, 3] = 0, 0
    pruned = baselines.sparsegpt(W, G, 1 / 96)
    assert not pruned[:, 3].any()
    torch.testing.assert_close(pruned[:, 4:], W[:, 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank_share", [0, 0.25, 0.6])
@pytest.mark.parametrize("m, n, ratio", [(40, 60, 0.5), (61, 39, 0.5), (31, 57, 0.63), (12, 7, 0.5)])
def test_oats_keeps_its_budget(m, n, ratio, rank_share, monkeypatch):
    W, D, sparse = sum(planted(m, n)).float(), random(n, seed=1).abs().float() + 0.1, []
    top_per_row = baselines.top_per_row
    monkeypatch.setattr(baselines, "top_per_row", lambda A, k: sparse.append(top_per_row(A, k)) or sparse[-1])
    pruned = baselines.oats(W, (D ** 2).diag(), ratio, rank_share, rounds=20)
    rank = torch.linalg.matrix_rank(pruned * D - sparse[-1], atol=1e-4).item()
    numbers = rank * (m + n) + sparse[-1].count_nonzero().item()
    assert numbers <= (1 - ratio) * m * n < numbers + m + n + m
    assert len(sparse[-1].count_nonzero(1).unique()) == 1
    if rank:
        assert ((pruned - W) * D).norm() < ((baselines.wanda(W, (D ** 2).diag(), 1 - numbers / (m * n)) - W) * D).norm()


# ---- command line -------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def cap_demo(tmp_path_factory):
    """(metrics.json, folder, stdout) of the bundled model's run, stderr checked to be empty."""
    folder = tmp_path_factory.mktemp("cap") / "folder"
    done = run_script("rpca.py", "--eval-blocks", 40, "--out", folder, cwd=folder.parent)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads((folder / "metrics.json").read_text()), folder, done.stdout


def test_cap_demo_order_of_the_methods(cap_demo):
    ppl = cap_demo[0]["ppl"]
    assert ppl["dense"] < ppl["compressed"] < ppl["wanda"] < ppl["magnitude"]


def test_cap_demo_keeps_more_than_half_of_what_pruning_loses(cap_demo):
    gap = cap_demo[0]["gap"]
    assert gap["compressed"] < 0.5 * min(gap["wanda"], gap["magnitude"])


def test_cap_demo_metrics_tell_the_whole_run(cap_demo):
    report, folder, out = cap_demo
    asked = {"method", "model", "ratio", "seed", "compressible_params", "kept_params", "dense_bytes", "file_bytes", "seconds",
             "peak_memory_bytes", "ppl", "eval", "layers", "calib", "seqlen", "batch_size", "metric_batches", "estimator",
             "rank_share", "rounds", "no_scale", "no_refit"}
    assert asked <= report.keys() and report["method"] == "cap" and report["estimator"] == "metric"
    assert report["ppl"].keys() == {"dense", "magnitude", "wanda", "compressed"} == report["gap"].keys()
    assert report["eval"]["data"] == report["calib"] == "stdlib"
    assert report["eval"]["tokens"] == 40 * (report["eval"]["seqlen"] - 1)
    assert report["file_bytes"] == (folder / "model.safetensors").stat().st_size < 0.8 * report["dense_bytes"]
    for label, key in [("dense", "dense"), ("magnitude", "magnitude"), ("Wanda", "wanda"), ("CAP", "compressed")]:
        row = next(line for line in out.splitlines() if line.startswith(label))
        assert f"{report['ppl'][key]:.2f}" in row
        counts = [int(word.replace(",", "")) for word in row.split() if "," in word and word[0].isdigit()]
        assert counts == [report["compressible_params"] if key == "dense" else report["kept_params"]]
    assert f"written to {folder}" in out


def test_cap_demo_counts_and_bytes_are_those_of_the_saved_modules(cap_demo):
    report, folder, _ = cap_demo
    model, tensors, kept, dense, stored = rpca.load(folder), load_file(folder / "model.safetensors"), 0, 0, 0
    for layer in report["layers"]:
        m, n = layer["shape"]
        module = model.get_submodule(layer["name"])
        rank = len(module.down.weight) if module.down else 0
        assert (layer["rank"], layer["nonzeros"]) == (rank, len(module.values))
        assert dense_weight(module).shape == (m, n)
        kept, dense = kept + rank * (m + n) + len(module.values), dense + m * n
        stored += sum(value.nbytes for key, value in tensors.items()
                      if key.startswith(layer["name"] + ".") and not key.endswith(".bias"))
    assert report["compressible_params"] == dense and report["kept_params"] == kept
    assert dense // 2 - 1 <= kept <= dense // 2
    assert stored <= 0.60 * 4 * dense
    assert len({layer["nonzeros"] / math.prod(layer["shape"]) for layer in report["layers"]}) > 2
    assert any(layer["rank"] for layer in report["layers"])


def test_cap_demo_folder_scores_the_same_in_a_new_process(cap_demo, demo_text, tmp_path):
    _, folder, _ = cap_demo
    (tmp_path / "text").write_text(demo_text[:20_000])
    done = run_script("eval_ppl.py", "--model", folder, "--eval", tmp_path / "text", "--seqlen", 64, "--blocks", 20, cwd=tmp_path)
    assert done.stderr == ""
    model, tokenizer = cli.load_model(str(folder), torch.device("cpu"), torch.float32)
    expected = perplexity(model, encode(tokenizer, demo_text[:20_000]), 64, blocks=20).ppl
    assert float(re.match(r"perplexity (\S+)", done.stdout)[1]) == pytest.approx(expected, rel=1e-5)


def test_every_flag_of_cap_reaches_the_method(command, tmp_path):
    seen = {}
    for flag in ["", "--seed 1", "--rank-share 0.3", "--rounds 1", "--no-scale", "--no-refit", "--estimator policy",
                 "--pattern 2:4", "--ratio 0.4"]:
        code, out, err = command("rpca.py", f"{RPCA_LINE} {flag} --out folder --overwrite")
        assert (code, err) == (0, "")
        report = json.loads((tmp_path / "folder" / "metrics.json").read_text())
        seen[flag] = report["ppl"]["compressed"]
        assert report["ppl"]["dense"] == pytest.approx(perplexity(tiny_gpt2(), tokens(1000, seed=1), 64, blocks=3).ppl, rel=1e-4)
        again = re.search(r"score it again with: python eval_ppl.py (.*)", out)[1]
        assert command("eval_ppl.py", f"{again} --blocks 3")[1].startswith(f"perplexity {seen[flag]:.4f}"[:15])
    assert len(set(seen.values())) == len(seen), seen


def test_a_cap_run_can_be_repeated(command, tmp_path):
    for name in ("one", "two"):
        assert command("rpca.py", f"{RPCA_LINE} --seed 3 --rank-share 0.2 --estimator policy --out {name}")[0] == 0
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert one["ppl"] == two["ppl"] and one["layers"] == two["layers"]


def test_help_of_cap_shows_every_flag(command):
    code, out, _ = command("rpca.py", "--help")
    flags = "model device dtype ratio calib eval same-text seqlen batch-size metric-batches eval-seqlen eval-stride " \
            "eval-blocks seed out overwrite estimator rank-share rounds pattern no-scale no-refit"
    assert code == 0 and all(f"--{flag} " in out or f"--{flag}\n" in out for flag in flags.split())


def test_logits_that_are_not_finite_are_refused_by_cap(command, tmp_path):
    model = tiny_gpt2()
    model.transformer.h[0].mlp.c_proj.weight.data *= 1e30
    model.transformer.h[0].mlp.c_fc.weight.data *= 1e30
    model.save_pretrained(tmp_path / "loud")
    tiny_tokenizer().save_pretrained(tmp_path / "loud")
    code, _, err = command("rpca.py", f"{RPCA_LINE} --model {tmp_path}/loud --out new")
    check_refusal(code, err, "loud")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("line, named", [
    ("--ratio 1", ["--ratio", "1 "]),
    ("--rank-share 1", ["--rank-share", "1 "]),
    ("--rank-share -0.1", ["--rank-share", "-0.1"]),
    ("--rounds 0", ["--rounds", "0 "]),
    ("--estimator luck", ["--estimator", "luck"]),
    ("--pattern 3:4", ["--pattern", "3:4", "2:4"]),
    ("--pattern 2:4 --estimator policy", ["--pattern 2:4", "--estimator metric"]),
    ("--steps 3", ["--steps"]),
    ("--model {house}/compressed", ["{house}/compressed", "compressed already"]),
    ("--model {house}/nan", ["{house}/nan", "transformer.h.1.mlp.c_fc.weight"]),
    ("--calib {house}/short", ["{house}/short", "10 tokens"]),
    ("--eval {house}/train", ["{house}/train", "--same-text"]),
    ("--out {house}/model --overwrite", ["{house}/model", "--overwrite"]),
])
def test_bad_input_of_cap_is_one_line_and_writes_nothing(line, named, command, house, tmp_path):
    before = tree(house)
    code, out, err = command("rpca.py", RPCA_LINE + line)
    check_refusal(code, err, *[word.format(house=house) for word in named])
    assert out == "" and tree(house) == before and tree(tmp_path) == []
