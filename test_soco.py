"""Tests of soco.py, rpca.py and eval_ppl.py: `pytest -q`, without a network, with or without a GPU.

Every expected value is computed here a second way, by a slower or plainer formula; none is from a run.
"""
import copy
import functools
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, on import: no test may reach for the network
ROOT = Path(__file__).resolve().parent

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline
from transformers.pytorch_utils import Conv1D

import eval_ppl
import rpca
import soco
from eval_ppl import perplexity
from soco import (BASES, LEARNED, LowRankLinear, ScoredLinear, block_layers, choose, collect_metric,
                  compress, factor, load, matrix, save, swapped)

VOCAB = 64
SHAPES = [(7, 5), (5, 11), (8, 8), (1, 6), (6, 1)]
KINDS, METHODS = ["linear", "linear without bias", "conv1d"], {"soco": soco, "cap": rpca}


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


CONFIG = {  # of every architecture, which reads of it what it knows
    "vocab_size": VOCAB, "hidden_size": 24, "word_embed_proj_dim": 16, "intermediate_size": 40, "ffn_dim": 40,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2,
    "new_decoder_architecture": True, "sliding_window": 16, "max_position_embeddings": 64, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}


def tiny(kind, **config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, initializer_range=0.2, **CONFIG | config)).eval()


tiny_gpt2 = functools.partial(tiny, "gpt2", num_attention_heads=2)
tiny_llama = functools.partial(tiny, "llama")
MODELS, IDS = [tiny_gpt2, tiny_llama], tokens(2, 16)
make, method, basis, kind = (pytest.fixture(lambda request: request.param, params=params)
                             for params in (MODELS, METHODS, BASES, KINDS))


@pytest.fixture(autouse=True)
def groups_of_one(monkeypatch):
    """The tiny models have no room for ranks in multiples of 8."""
    monkeypatch.setattr(soco, "GROUP", 1)


def tiny_tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w63")


def text(count, seed):
    return " ".join(f"w{i}" for i in tokens(count, seed=seed))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def divergence(dense_logits, model, batches):
    """Mean of KL(dense || model) over batches, by the plain formula."""
    values = [F.kl_div(logits(model, ids).log_softmax(-1), dense.log_softmax(-1), log_target=True,
                       reduction="sum") / ids.numel() for dense, ids in zip(dense_logits, batches)]
    return torch.stack(values).mean().item()


def assert_near(ours, theirs, tolerance):
    assert ours.shape == theirs.shape and (ours - theirs).norm() <= tolerance * theirs.norm()


def stored_parameters(model, dense):
    """Parameters of what stands for the block layers of `dense`, biases aside, counted anew."""
    states = [model.get_submodule(name).state_dict() for name in block_layers(dense)]
    return sum(int(value.count_nonzero()) if key == "S" else value.numel()
               for state in states for key, value in state.items() if value.ndim == 2)


# ---- the mathematics ----
def metric_of(basis, m, n, device="cpu"):
    x, g = random(60, n, seed=3, device=device), random(60, m, seed=4, device=device)
    by_G, by_R = BASES[basis]
    return x, g, x.T @ x / 60 if by_G else None, g.T @ g / 60 if by_R else None


@pytest.mark.parametrize("m, n", SHAPES)
def test_factors_are_the_singular_value_decomposition_in_the_metric(basis, m, n, device):
    W = random(m, n, device=device)
    x, g, G, R = metric_of(basis, m, n, device)
    U, sigma, V = factor(W, G, R, damping=1e-13, output_damping=1e-13)
    assert (U.shape, sigma.shape, V.shape) == ((m, min(m, n)), (min(m, n),), (min(m, n), n))
    assert_close((U * sigma) @ V, W, rtol=1e-8, atol=1e-8)
    seen = {"plain": W, "whitened": W @ x.T / 60 ** 0.5, "two-sided": g @ W @ x.T / 60}[basis]
    assert_close(sigma, torch.linalg.svdvals(seen)[:len(sigma)], rtol=1e-7, atol=1e-8)
    for k in range(len(sigma)):  # what truncation costs, by the definition of each metric
        change = W - (U[:, :k] * sigma[:k]) @ V[:k]
        cost = {"plain": change.square().sum(),
                "whitened": (x @ change.T).square().sum(1).mean(),
                "two-sided": (g @ change @ x.T).square().mean()}[basis]  # of every g with every x
        assert_close(cost, sigma[k:].square().sum(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("W, G, R", [
    (torch.zeros(4, 6), None, None),
    (torch.ones(4, 6), torch.ones(6, 6), None),
    (random(4, 6), torch.zeros(6, 6), torch.zeros(4, 4)),
    (random(4, 6), torch.tensor([1e6, 1, 1e-6, 0, 0, 0]).diag(), torch.tensor([1, 0, 0, 1e-9]).diag()),
    (random(4, 6), torch.tensor([1, 1, 1, 1, 1, -5e-3]).diag(), None),
])  # zero weight, rank one, all zero, mostly zero, rounded below zero
def test_a_degenerate_metric_still_gives_the_weight_back(W, G, R):
    U, sigma, V = factor(W, G, R)
    assert_close((U * sigma) @ V, W.double(), rtol=1e-6, atol=1e-6)
    with pytest.raises(torch.linalg.LinAlgError, match="negative"):
        factor(W, -torch.eye(6))


CHOICES = {1: [(4, 30), (5, 5), (9, 6)], 3: [(10, 30), (13, 13), (2, 9)],
           8: [(20, 40), (24, 25), (17, 70)]}
WORTHS = {"steep": lambda x: (2 * x).exp(), "flat": torch.ones_like,
          "half zero": lambda x: x.clamp_min(0)}


def cost_and_value(ranks, shapes, worth):
    """What a choice costs, and the worth of what it keeps: all of a matrix that is stored dense."""
    cost = [min(k * (m + n), m * n) for k, (m, n) in zip(ranks, shapes)]
    kept = [len(w) if c == m * n else k for c, k, w, (m, n) in zip(cost, ranks, worth, shapes)]
    return sum(cost), sum(w.sort(descending=True)[0][:k].sum().item() for k, w in zip(kept, worth))


@pytest.mark.parametrize("group", CHOICES)
@pytest.mark.parametrize("worths", WORTHS)
def test_choose_is_as_good_as_any_choice_and_spends_the_budget(worths, group, device, monkeypatch):
    monkeypatch.setattr(soco, "GROUP", group)
    shapes, sides = CHOICES[group], torch.tensor(CHOICES[group], device=device).T
    worth = [WORTHS[worths](random(min(shape), seed=i, device=device)) for i, shape in enumerate(shapes)]
    padded = nn.utils.rnn.pad_sequence(worth, batch_first=True, padding_value=-1)
    allowed = [[*range(group, min(shape), group), min(shape)] for shape in shapes]
    points = [cost_and_value(ranks, shapes, worth) for ranks in itertools.product(*allowed)]
    prices = np.geomspace(1e-6, 10, 500)  # of a parameter: what is best at one is best at its cost
    best = dict(max(points, key=lambda point: point[1] - price * point[0]) for price in prices)
    for budget in [*range(min(points)[0], max(points)[0] + 20, group), *best]:
        keep = choose(padded, *sides, budget + 0.5)
        ranks = keep.sum(1).tolist()
        for k, kept, w, (m, n), some in zip(ranks, keep, padded, shapes, allowed):
            assert k in some and (k * (m + n) < m * n or k == min(m, n))
            assert not kept[w < 0].any() and (k == min(m, n) or w[kept].min() >= w[~kept].max())
        cost, value = cost_and_value(ranks, shapes, worth)
        assert value >= max(best[corner] for corner in best if corner <= budget) - 1e-9
        steps = [group * (m + n) for (m, n), k in zip(shapes, ranks) if k < min(m, n)]
        assert 0 <= budget - cost < max(steps, default=math.inf)


# ---- the layers ----
def scored(kind, m, n, basis="plain", device="cpu", dtype=torch.float64):
    """(layer, its ScoredLinear, inputs [4, n])."""
    layer = make_layer(kind, m, n, device).to(dtype)
    *_, G, R = metric_of(basis, m, n, device)
    student = ScoredLinear(layer, *factor(matrix(layer), G, R), unit=3.0)
    return layer, student, random(4, n, seed=7, device=device).to(dtype)


def learn_anything(student):
    for seed, name in enumerate(LEARNED):
        own = getattr(student, name)
        own.data = random(len(own), seed=9 + seed, device=own.device).float()


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-6), ("bfloat16", 2e-2), ("float16", 3e-3)])
def test_what_is_learned_gets_its_gradient_and_masked_scores_that_of_coming_back(
        basis, kind, dtype, tolerance, device):
    layer, student, x = scored(kind, 5, 11, basis, device, getattr(torch, dtype))
    for inputs in (x, x[None], x[:0], x[None, :0]):  # scores of one, full rank
        assert_near(student(inputs).double(), layer(inputs).double(), tolerance)
    learn_anything(student)
    student.kept = torch.tensor([0, 1, 0, 1, 0], device=device).bool()
    own = [x.requires_grad_(), *map(student.get_parameter, LEARNED)]
    plain = [value.detach().double().clone() for value in own]
    plain[1] *= student.kept  # scores of zero, as it were
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
def test_what_shrinks_and_what_is_stored_answers_like_what_learned(kind, kept, m, n, device):
    layer, student, x = scored(kind, m, n, "two-sided", device)
    learn_anything(student)
    k, r = min(kept, m, n), min(m, n)
    student.kept = (torch.arange(r, device=device) % 2 == 0) | (torch.arange(r, device=device) >= r - k)
    expected, fisher, k = student(x).detach(), student.fisher[student.kept], int(student.kept.sum())
    moments = {"step": torch.ones(1), "exp_avg": torch.arange(r, device=device)}  # of Adam
    kept = moments["exp_avg"][student.kept]
    student.shrink(moments)
    assert_close([student(x), student.fisher, moments["exp_avg"]], [expected, fisher, kept])
    new = student.finish()
    assert_close(new(x), expected, rtol=1e-5, atol=1e-5)
    assert type(new) is (LowRankLinear if k * (m + n) < m * n else nn.Linear)
    assert soco.stored(layer, new) == min(k * (m + n), m * n) + m * (layer.bias is None)
    assert new.weight.dtype == layer.weight.dtype


# ---- the metric ----
def scored_of(model, batches=(IDS,)):
    with soco.frozen(model):
        students = soco.scored_layers(collect_metric(model, block_layers(model), batches))
        soco.set_fisher(model, students, batches)
    return students


def test_metric_fisher_information_and_worths_are_moments_of_what_autograd_finds(make, device, monkeypatch):
    model, batches = make().to(device), [tokens(3, 20, device=device), tokens(2, 9, device=device)]
    layers, seen = block_layers(model), {}
    labels = [tokens(60, seed=1, device=device), tokens(18, seed=2, device=device)]

    def with_labels(collect):  # the same in every pass: not drawn
        remaining = iter([label[:, None] for label in labels])
        with mock.patch.object(torch, "searchsorted", lambda *_: next(remaining)):
            with soco.frozen(model):
                return collect()

    metric = with_labels(lambda: collect_metric(model, layers, batches))
    students = soco.scored_layers(metric)
    with_labels(lambda: soco.set_fisher(model, students, batches))
    drafts = with_labels(lambda: rpca.drafted(model, layers, batches))
    monkeypatch.setattr(soco, "collect_metric", lambda *args: with_labels(lambda: collect_metric(*args)))
    for room in (16e9, 30_000, 1):  # the metric in parts, one pass for each
        monkeypatch.setattr(soco, "METRIC_BYTES", room)
        parts = [part[2:] for part in soco.measured(model, layers, batches)]
        assert_close(parts, [part[2:] for part in metric])

    def with_scores_for_every_token(name, layer, inputs, output):  # which are 1, and take gradients
        x, student = inputs[0], students[name]
        S = x.new_ones(*x.shape[:-1], len(student.V)).requires_grad_()
        output.retain_grad()
        seen.setdefault(name, []).append((x.detach(), output, S))
        return output + (x @ student.V.T * (S - 1)) @ student.U.T

    for name, layer in layers.items():
        layer.register_forward_hook(functools.partial(with_scores_for_every_token, name))
    for ids, label in zip(batches, labels):
        found = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        F.cross_entropy(found, label, reduction="sum").backward()
    for name, layer, G, R in metric:
        values = zip(*[(x, output.grad, S.grad) for x, output, S in seen[name]])
        x, g, dS = (torch.cat([value.flatten(0, 1) for value in some]) for some in values)
        assert_near(G, x.T @ x / 78, 1e-3)
        assert_near(R, g.T @ g / 78, 1e-3)
        assert_near(students[name].fisher, dS.square().mean(0), 1e-3)  # (dL/dS)^2, token by token
        fisher = (g ** 2 * (x ** 2 @ (matrix(layer) ** 2).T)).mean(0)  # (W dL/dW)^2, summed over a row
        assert_close(drafts[name].worth().sum(1), fisher, rtol=1e-3, atol=1e-5 * fisher.max().item())


def test_fisher_information_is_the_second_difference_of_the_divergence():
    model, ids, step = tiny_gpt2(), torch.full((10_000, 1), 5), 1e-3  # of texts of one token
    with mock.patch.object(torch, "rand", lambda size, *_, generator: (torch.arange(size)[:, None] + 0.5) / size):
        students = scored_of(model, [ids])  # labels in exact proportion to their probability
    dense = logits(model.double(), ids[:1])
    with swapped(model, students):
        for student in students.values():
            student.U, student.V, student.S.data = (A.double() for A in (student.U, student.V, student.S.data))
        for student in students.values():
            measured = torch.zeros(6)
            for i in range(6):
                student.S.data[i] += step
                measured[i] = 2 * divergence([dense], model, [ids[:1]]) / step ** 2
                student.S.data[i] -= step
            assert (student.fisher[:6] - measured).norm() <= 0.02 * measured.norm() + 1e-9


def test_layers_that_no_token_reaches_stay_dense_and_are_named(method, caplog):
    model = tiny_gpt2(add_cross_attention=True)
    lost = {name for name in block_layers(model) if "cross" in name}
    METHODS[method].compress(model, [IDS], 0.5, steps=1)
    assert model.config.compressed["layers"].keys() == block_layers(tiny_gpt2()).keys()
    assert lost and len(caplog.messages) == 1 and all(name in caplog.text for name in lost)
    total = sum(layer.weight.numel() for layer in block_layers(tiny_gpt2()).values())
    assert stored_parameters(model, tiny_gpt2()) <= total / 2


# ---- learning ----
@pytest.mark.parametrize("steps, learned", [(0, LEARNED), (7, LEARNED), (7, "S"), (7, "ac")])
@pytest.mark.parametrize("ratio, group", [(0.2, 1), (0.5, 1), (0.7, 2), (0.3, 8)])
def test_the_budget_is_met_and_ranks_are_multiples(make, ratio, group, steps, learned, monkeypatch):
    monkeypatch.setattr(soco, "GROUP", group)
    model, dense = make(), make()
    compress(model, [IDS], ratio, steps, learned=learned)
    total, most = 0, 0
    for name, layer in block_layers(dense).items():
        kind, sizes = model.config.compressed["layers"][name]
        rank, (m, n) = sizes.get("rank", 0), layer.weight.shape
        assert rank % group == 0 and (kind == "Linear" or rank == len(model.get_submodule(name).down.weight))
        total, most = total + m * n, max(most, group * (m + n))
    biases = sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias"))
    biases -= sum(p.numel() for name, p in dense.named_parameters() if name.endswith("bias"))
    assert 0 <= int((1 - ratio) * total + 1e-6) - stored_parameters(model, dense) - biases < most
    assert (biases > 0) == (make is tiny_llama and steps > 0 and "d" in learned)


def test_the_learning_curve_tells_the_three_stages():
    scored = scored_of(model := tiny_gpt2())
    with soco.frozen(model):
        curve = soco.learn(model, scored, [IDS], 0.4, steps=20)
    assert curve["stage"] == 10 * ["descend"] + 2 * ["swing"] + 8 * ["polarise"]
    kept, target = curve["kept"], soco.budget_for(scored.values(), 0.4) / soco.budget_for(scored.values(), 0)
    assert all(after < before for before, after in itertools.pairwise(kept[:10]))
    assert kept[9:13] == pytest.approx([target, 1.02 * target, 0.98 * target, target])
    assert len(curve["KL"]) == 20 and all(map(math.isfinite, curve["KL"]))
    assert [len(curve["ranks"][stage]) for stage in ("descend", "swing")] == 2 * [len(scored)]
    assert all(student.kept.all() for student in scored.values())  # in stage 3 nothing else is left


def told(model):
    return ([(module, module.training, len(module._forward_hooks)) for module in model.modules()],
            [(p.requires_grad, p.grad) for p in model.parameters()], model.config)


def test_one_seed_gives_one_result_in_training_mode_and_under_no_grad(method):
    states = []
    for training in (False, True):
        model = tiny_gpt2(resid_pdrop=0.5).train(training)
        torch.manual_seed(7)
        with torch.set_grad_enabled(not training):
            METHODS[method].compress(model, iter([IDS, tokens(2, 16, seed=1)]), 0.5, steps=5)
        modules, flags, _ = told(model)
        assert all(mode == training and not hooks for _, mode, hooks in modules) and set(flags) == {(True, None)}
        states.append(model.state_dict())
    assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("place", ["collect_metric", "distil", "finished"])
def test_an_exception_leaves_the_model_as_it_was(method, place, monkeypatch):
    model, compress = tiny_gpt2(resid_pdrop=0.5), METHODS[method].compress
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    model.transformer.wpe.requires_grad_(False)
    before = told(model)
    with pytest.raises(IndexError):  # within a pass of the model: one token more than it can read
        compress(model, [IDS, tokens(1, 65)], 0.5, steps=3)
    assert told(model) == before
    for script in METHODS.values():
        if hasattr(script, place):
            monkeypatch.setattr(script, place, mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compress(model, [IDS], 0.5, steps=3)
    assert told(model) == before
    monkeypatch.undo()
    for error, settings in ((FloatingPointError, {"lr": 1e30, "steps": 10}), (ValueError, {"ratio": 0.999})):
        with pytest.raises(error):
            soco.compress(model, [IDS], **settings)
        assert told(model) == before


def test_learning_lowers_the_divergence_also_on_other_text(method):
    dense, tokenizer = eval_ppl.load_model(eval_ppl.BUNDLED, "cpu", "float32")
    ids = eval_ppl.load_tokens(tokenizer, f"{eval_ppl.BUNDLED}/train.txt", "train", 640)
    batches, found = ids[100_000:100_640].view(5, 2, 64), []
    for steps in (0, 20):
        torch.manual_seed(0)
        model = METHODS[method].compress(copy.deepcopy(dense), batches[:4], 0.6, steps)
        found.append([divergence(map(functools.partial(logits, dense), some), model, some)
                      for some in (batches[:4], batches[4:])])
    (seen, other), (seen_learned, other_learned) = found
    assert seen_learned < 0.8 * seen and other_learned < 0.95 * other


# ---- architectures and folders ----
ARCHITECTURES = ("gpt2 llama mistral qwen2 qwen3 gemma3_text phi3 opt gpt_neox bloom falcon granite olmo2 "
                 "starcoder2 mpt").split()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_is_compressed_saved_and_loaded(kind, method, tmp_path):
    model, dense = tiny(kind), tiny(kind)
    layers = block_layers(model)
    inside = {name for name, p in model.named_parameters() if p.ndim == 2 and re.search(r"\.\d+\.", name)}
    assert inside == {name + ".weight" for name in layers}  # every matrix of the blocks and no other
    with soco.frozen(model):
        students = soco.scored_layers(collect_metric(model, layers, [IDS]))
    with swapped(model, students):
        assert_near(logits(model, IDS), logits(dense, IDS), 1e-3)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    METHODS[method].compress(model, [IDS], 0.4, steps=2)
    parameters = sum(layer.weight.numel() for layer in layers.values())
    assert 0.5 * parameters < stored_parameters(model, dense) <= 0.6 * parameters
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    save(model, tmp_path / "model")
    assert torch.equal(logits(load(tmp_path / "model"), IDS), logits(model, IDS))


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """{method: (folder, logits)} of saved models, with a tokenizer; CAP's L is never empty by the policy."""
    with mock.patch.object(soco, "GROUP", 1):
        made = {"soco": soco.compress(tiny_gpt2(), [IDS], 0.5, 2),
                "cap": rpca.compress(tiny_llama(), [IDS], 0.5, estimator="policy", rounds=1)}
    for method, model in made.items():
        folder = save(model, tmp_path_factory.mktemp("saved") / method)
        tiny_tokenizer().save_pretrained(folder)
        made[method] = folder, logits(model, IDS)
    return made


DAMAGES = {  # of a saved folder: what is done to its tensors
    "missing": lambda state, name: state.pop(name),
    "left over": lambda state, name: state.update(more=torch.ones(1)),
    "mis-shaped": lambda state, name: state.update({name: state[name][:-1].contiguous()})}


def attempt(load, *args, **options):
    try:
        return logits(load(*args, **options), IDS)
    except (ValueError, OSError, RuntimeError) as error:
        return str(error)


STRANGER = """
import sys, torch
from transformers import AutoModelForCausalLM
read, (good, bad, IDS) = AutoModelForCausalLM.from_pretrained, torch.load("given")
HELPERS
found = {folder: attempt(read, folder, trust_remote_code=True, use_cache=False) for folder in good + bad}
found |= {"without " + folder: attempt(read, folder) for folder in good}
assert not {"soco", "rpca", "eval_ppl"} & set(sys.modules)
torch.save(found, "found")
""".replace("HELPERS", inspect.getsource(logits) + inspect.getsource(attempt))


def python(code, cwd, **environment):
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=clean | environment, capture_output=True,
                          text=True)


def test_a_folder_is_what_was_saved_or_an_error_by_all_three_ways(saved, tmp_path):
    good, bad = {str(folder): expected for folder, expected in saved.values()}, []
    for method, (folder, expected) in saved.items():
        ways = METHODS[method].load, AutoModelForCausalLM.from_pretrained
        assert all(torch.equal(attempt(way, folder, use_cache=False), expected) for way in ways)
        for what, change in DAMAGES.items():
            bad.append(str(shutil.copytree(folder, tmp_path / f"{method}-{what}")))
            state = load_file(path := Path(bad[-1], "model.safetensors"))
            change(state, next(key for key in state if key.endswith(("down.weight", "values"))))
            save_file(state, path, {"format": "pt"})
            assert all(isinstance(attempt(way, bad[-1]), str) for way in ways), bad[-1]
    torch.save((list(good), bad, IDS), tmp_path / "given")
    done = python(STRANGER, cwd=tmp_path, HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found", weights_only=False)
    assert all(torch.equal(found[folder], expected) for folder, expected in good.items())
    assert all(isinstance(found[f"without {folder}"], str) for folder in good)  # never random weights
    assert all(isinstance(found[folder], str) for folder in bad)


def test_a_loaded_model_is_like_any_other(method, saved):
    (folder, expected), read = saved[method], METHODS[method].load
    words = {"use_cache": False, "pad_token_id": 3, "attn_implementation": "eager", "output_attentions": True}
    for way in (read, AutoModelForCausalLM.from_pretrained):
        config = way(folder, **words).config
        assert (config.use_cache, config.pad_token_id, config.output_attentions) == (False, 3, True)
        assert config._attn_implementation == "eager"
    assert_near(logits(read(folder, dtype=torch.bfloat16).float(), IDS), expected, 0.02)
    words = pipeline("text-generation", str(folder))("w1 w2", max_new_tokens=3, do_sample=False)
    assert words[0]["generated_text"].startswith("w1 w2")
    if importlib.util.find_spec("accelerate"):
        assert_close(logits(read(folder, device_map={"": "cpu"}), IDS), expected)
    if method == "soco" and importlib.util.find_spec("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
        quantize_(model := read(folder), Int8WeightOnlyConfig())
        assert_close(logits(model, IDS), expected, rtol=0.1, atol=0.1)


def test_a_model_is_trained_by_lora_or_whole_and_saved(method, saved, tmp_path):
    model = trained = METHODS[method].load(saved[method][0])
    if importlib.util.find_spec("peft"):
        from peft import LoraConfig, get_peft_model
        trained = get_peft_model(model, LoraConfig(r=2, target_modules=["down", "up"])).requires_grad_()
    zeros = {module: module.S == 0 for module in model.modules() if hasattr(module, "S")}
    adam = torch.optim.Adam(trained.parameters(), lr=0.01)
    trained(input_ids=IDS, labels=IDS).loss.backward()
    adam.step()
    assert all((module.S[zero] == 0).all() for module, zero in zeros.items())
    expected = logits(trained, IDS)
    save(trained.merge_and_unload() if trained is not model else model, tmp_path / "new")
    assert_close(logits(load(tmp_path / "new"), IDS), expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(expected, saved[method][1])


def test_save_overwrites_nothing_and_leaves_nothing_half_done(tmp_path):
    model = compress(tiny_gpt2(), [IDS], 0.5, steps=0)

    def taken_meanwhile(folder):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "mine").touch()

    assert save(model, tmp_path / "new", taken_meanwhile) == tmp_path / "new-2"
    with pytest.raises(ZeroDivisionError):
        save(model, tmp_path / "broken", lambda folder: 1 / 0)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "new-2"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mine"]


# ---- perplexity and texts ----
@pytest.mark.parametrize("bos, blocks", [(None, None), (5, 1), (5, 3)])
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
    ppl, nll, count = perplexity(model.train(), ids, 16, stride, blocks, bos=bos)
    assert count == len(nats) and nll == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert ppl == pytest.approx(math.exp(nll), rel=1e-12) and model.training
    own = model.eval()(input_ids=IDS[:1].to(device), labels=IDS[:1].to(device)).loss.item()
    assert perplexity(model, IDS[0], 16)[1] == pytest.approx(own)  # the model's own loss
    for none_whole in ((51, None), (1, None), (16, 17), (16, -1)):
        with pytest.raises(ValueError, match="50 tokens"):
            perplexity(model, ids, *none_whole)


def test_texts_are_read_whole_and_marks_of_rare_words_not_learned_from(tmp_path, monkeypatch):
    read = functools.partial(eval_ppl.load_tokens, tiny_tokenizer())
    with zipfile.ZipFile(tmp_path / "wikitext.zip", "w") as archive:
        archive.writestr("wikitext-2-raw/wiki.test.raw", " \n = Title = \n \nOne @-@ two .\n")
        archive.writestr("wikitext-2-raw/wiki.train.raw", "w1 w2\n")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **options: tmp_path / "wikitext.zip")
    assert eval_ppl.wikitext2("test") == "\n\n = Title = \n\n\n\n\nOne @-@ two .\n"
    assert read("wikitext2", "train", 2).tolist() == [1, 2]
    (tmp_path / "marked").write_text("\ufeff" + " <unk> ".join(text(100, seed=0).split()), "utf-8")
    train, test = (read(tmp_path / "marked", split, 16) for split in ("train", "test"))
    assert torch.equal(train, tokens(100)) and torch.equal(test[::2], train) and not test[1::2].any()
    assert [eval_ppl.longest_window(model) for model in (tiny("mpt", max_seq_len=32), tiny_gpt2())] == [32, 64]


# ---- the commands ----
@pytest.fixture(scope="session")
def house(tmp_path_factory):
    """A folder with the model and the texts that command lines name: model, train, test."""
    folder = tmp_path_factory.mktemp("house")
    tiny_gpt2().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for seed, name in enumerate(["train", "test"]):
        (folder / name).write_text(text(1000, seed))
    return folder


@pytest.fixture
def command(house, capsys, monkeypatch, tmp_path):
    """command(script, words): (exit code, stdout, stderr) of a run that takes a second."""
    monkeypatch.chdir(tmp_path)

    def call(script, words):
        flags = f"--model {house}/model --eval {house}/test --device cpu --eval-blocks 3"
        if script != "eval_ppl":
            flags += f" --calib {house}/train --seqlen 16 --metric-batches 2 --steps 6"
        monkeypatch.setattr(sys, "argv", [script + ".py", *flags.split(), *words.split()])
        capsys.readouterr()
        try:
            code = sys.modules[script].main() or 0
        except SystemExit as end:
            code = end.code
        soco.bar.keywords["disable"] = True
        return code, *capsys.readouterr()

    return call


ROWS = {"soco": {"dense", "svd", "svd_whitened", "svd_kfac", "svd_global", "compressed"},
        "cap": {"dense", "magnitude", "wanda", "compressed"}}


def test_a_run_writes_what_it_prints_and_its_folder_scores_the_same_again(method, command, tmp_path):
    code, out, err = command(METHODS[method].__name__, "--out made --bos --seed 3")
    report, model = json.loads((tmp_path / "made/metrics.json").read_text()), load(tmp_path / "made")
    assert (code, err) == (0, "") and "written to" in out and report["ppl"].keys() == ROWS[method]
    for key, ppl in report["ppl"].items():
        gap = math.log(ppl / report["ppl"]["dense"])
        assert re.search(rf" {ppl:.2f} +{gap:.4f} +[0-9,]{{5,}} ", out), key
    dense = block_layers(tiny_gpt2())
    assert report["compressible_params"] == sum(layer.weight.numel() for layer in dense.values())
    assert report["kept_params"] == stored_parameters(model, tiny_gpt2()) <= report["compressible_params"] / 2
    for layer, (name, module) in zip(report["layers"], dense.items()):
        new = model.get_submodule(name)
        assert (layer["name"], layer["shape"]) == (name, list(matrix(module).shape))
        rank = len(new.down.weight) if getattr(new, "down", None) else 0
        assert (layer["kind"], layer["rank"] or 0) == (type(new).__name__, rank)
    size = (tmp_path / "made/model.safetensors").stat().st_size
    assert report["file_bytes"] == size < report["dense_bytes"] < report["peak_memory_bytes"]
    assert {"method": method, "ratio": 0.5, "seed": 3, "steps": 6, "bos": True}.items() <= report.items()
    assert report["seconds"] > 0 and (method == "cap" or len(report["curve"]["KL"]) == 6)
    code, out, err = command("eval_ppl", "--model made --bos")
    assert (code, err) == (0, "") and f"perplexity {report['ppl']['compressed']:.4f} " in out
    own = "--basis plain --learn S d" if method == "soco" else "--estimator policy --rounds 1"
    found = [command(METHODS[method].__name__, f"--no-baselines {words}")[1].splitlines()[-3].split()[-3]
             for words in ("", own, "--lr 0.1", "--ratio 0.3", "--seed 4", "--dtype bfloat16")]
    assert len(set(found)) == len(found)  # each reaches the method
    assert {f"model-{method}-0.5", f"model-{method}-0.5-2"} <= {path.name for path in (tmp_path / "out").iterdir()}


BAD = ("--ratio 0|--ratio 1.5|--ratio nan|--ratio half|--model nobody/none|--model no/such/folder|--model {empty}"
       "|--model {pickle}|--model {made}|--eval nowhere|--calib wikitext2|--eval {short}|--calib {short}"
       "|--calib {binary}|--seqlen 65|--eval-seqlen 65|--device tpu9|--device cuda:99|--device-map nowhere"
       "|--out {full}|--out {short}|--basis diagonal|--rati 0.5|--dtype int3")


@pytest.mark.parametrize("line", BAD.split("|"))
def test_bad_input_is_one_line_before_any_work_and_writes_nothing(line, command, house, saved, tmp_path):
    places = {name: tmp_path / name for name in ("empty", "short", "binary", "pickle")}
    places |= {"made": saved["soco"][0], "full": house}
    places["empty"].mkdir()
    places["short"].write_text("w1 w2")
    places["binary"].write_bytes(bytes(range(256)))
    shutil.copytree(house / "model", places["pickle"])
    torch.save(load_file(house / "model/model.safetensors"), places["pickle"] / "pytorch_model.bin")
    (places["pickle"] / "model.safetensors").unlink()
    before = sorted(tmp_path.rglob("*"))
    with mock.patch.object(soco, "collect_metric", None):
        code, out, err = command("soco", line.format(**places))
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("soco.py: error: "), err
    assert line.split()[1].format(**places).split("/")[-1] in err or line.split()[0].strip("-")[:4] in err
    assert sorted(tmp_path.rglob("*")) == before


# ---- copying and pasting ----
def run_readme(word, folder="", found=None):
    code = next(block for block in (ROOT / "README.md").read_text().split("```python") if word in block)
    exec(code.split("```")[0].replace('"folder"', f'"{folder}"'), found)


def test_the_readmes_lines_for_lm_eval_read_a_folder(saved):
    lm_eval, found = pytest.importorskip("lm_eval"), {}
    with mock.patch.object(lm_eval, "simple_evaluate", lambda model, tasks: {"results": model}):
        run_readme("lm_eval", saved["soco"][0], found)
    assert_close(logits(found["model"].model.float().cpu(), IDS), saved["soco"][1])


def test_half_of_the_fisher_information_is_what_a_component_costs_as_the_readme_shows(capsys):
    run_readme("set_fisher(", found={})
    found = re.findall(r"KL (\S+), half of F S\^2 (\S+)\n", capsys.readouterr().out)
    assert len(found) == 4 and all(1 / 1.3 < float(KL) / float(half) < 1.3 for KL, half in found)


def test_the_files_work_where_they_are_copied(house, tmp_path):
    for name in ("soco.py", "rpca.py", "eval_ppl.py"):
        shutil.copy(ROOT / name, tmp_path)
    text = f"--eval {house}/test"
    run = f"--model {house}/model {text} --calib {house}/train --seqlen 16 --metric-batches 2 --steps 1 --ratio 0.2"
    for words in (f"soco.py {run} --out a", f"rpca.py {run} --out b", f"eval_ppl.py --model b {text}"):
        done = subprocess.run([sys.executable, *words.split()], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", done.stderr
    (tmp_path / "eval_ppl.py").unlink()
    assert python("import rpca; rpca.load('a')", cwd=tmp_path).returncode == 0


# what can be pasted: the names it needs beside it, with torch and the standard library, and a use
PASTED = {
    "factor": ("cholesky", "factor(W, W.T @ W, W @ W.T)"),
    "choose": ("", "choose(W.abs(), *torch.tensor([[9, 8, 7, 6], [5, 6, 7, 8]]), 60)"),
    "ScoredLinear": ("LowRankLinear filled matrix", "[(s(W), s.finish()(W)) for s in [ScoredLinear(dense, "
                     "W[:, :k], W[0, :k].abs(), W[:k]) for k in (2, 4)]]"),
    "rpca": ("singular_value_threshold soft_threshold", "rpca(W)[:4]"),
    "project": ("", "project([W.sigmoid()], [2], 9)"),
    "policy_gradient": ("project", "policy_gradient(lambda masks, step: masks[0].sum().item(), "
                        "[W.sigmoid()], [1], 9, range(9))"),
    "keep_most_probable": ("", "keep_most_probable([W], [2], 9)"),
    "refit": ("", "refit(W, 0 * W, W > 0, W.T @ W)"),
    "perplexity": ("", "perplexity(model, ids, 16)"),
}


@pytest.mark.parametrize("name", PASTED)
def test_what_the_readme_lists_does_where_it_is_pasted_what_it_does_in_its_place(name):
    place = {"torch": torch, "nn": nn, "F": F, "math": math, "Conv1D": Conv1D, "GROUP": 1, "tqdm": eval_ppl.tqdm}
    assert f"`{name}`" in (ROOT / "README.md").read_text()
    for part in [*PASTED[name][0].split(), name]:
        home = next(script for script in (soco, rpca, eval_ppl)
                    if getattr(getattr(script, part, None), "__module__", None) == script.__name__)
        exec(inspect.getsource(getattr(home, part)), place)
    given = {"W": random(4, 5), "dense": make_layer("linear", 4, 5), "model": tiny_gpt2(), "ids": tokens(16)}
    found = [torch.manual_seed(0) and eval(PASTED[name][1], names | given) for names in (place, vars(home))]
    assert_close(*found, rtol=0, atol=0)


# ---- rpca.py ----
def planted(m, n, seed=0, device="cpu"):
    """(L, S): rank max(min(m, n) // 20, 1), and one entry in twenty."""
    k, size = max(min(m, n) // 20, 1), random(m, n, seed=seed, device=device)
    L = random(m, k, seed=seed + 1, device=device) @ random(k, n, seed=seed + 2, device=device)
    return L, 3 * size.sign() * (size.abs() > size.abs().flatten().quantile(0.95))


@pytest.mark.parametrize("scale", [1e-24, 1.0, 1e15])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("m, n", [(60, 40), (37, 90), (121, 31)])
def test_planted_low_rank_and_sparse_parts_are_recovered(m, n, dtype, scale, device):
    L, S = ((scale * part).to(dtype) for part in planted(m, n, device=device))
    U, sigma, V, found, residuals = rpca.rpca(L + S)
    k = max(min(m, n) // 20, 1)
    assert (U.shape, V.shape, found.dtype) == ((m, k), (k, n), dtype) and (sigma.diff() <= 0).all()
    for ours, theirs in (((U * sigma) @ V / scale, L / scale), (found / scale, S / scale)):
        assert_near(ours, theirs, 2e-5)
    assert torch.equal(found != 0, S != 0)
    assert residuals[-1] <= 1e-6 < min(residuals[:-1]) and len(residuals) < 40
    assert rpca.rpca((L + S).bfloat16(), max_iter=2)[3].dtype == torch.float32


def test_policy_gradient_is_reinforce_by_autograd(device):
    loss_of = lambda masks, step: 0.1 * masks[1].sum().item() - masks[0][1].item() + 0.05 * step
    p = [torch.full(shape, 0.3, dtype=torch.float64, device=device) for shape in [(3,), (2, 5)]]
    draws, again, losses = torch.Generator(device).manual_seed(0), torch.Generator(device).manual_seed(0), []
    found, found_losses = rpca.policy_gradient(loss_of, p, [4, 1], 6.1, range(9), lr=0.01, generator=draws)
    for step in range(9):
        masks = [torch.bernoulli(q, generator=again) for q in p]
        losses.append(loss_of(masks, step))
        better = np.mean(losses[-6:-1] or losses) - losses[-1]  # than the mean of the five before
        p = [q.requires_grad_() for q in p]
        chance = sum(torch.distributions.Bernoulli(q).log_prob(mask).sum() for q, mask in zip(p, masks))
        score, p = torch.autograd.grad(chance, p), [q.detach() for q in p]
        p = rpca.project([q + 0.01 * better * s for q, s in zip(p, score)], [4, 1], 6.1)
    assert found_losses == losses and p[0].max() - p[0].min() > 0.01
    assert_close(found, p, rtol=1e-9, atol=0)


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
        assert furthest - torch.dot(q - x, x).item() <= 1e-8 * (1 + spread)


def test_keep_most_probable_is_the_greedy_loop(device):
    cost = [5, 1, 3]
    for seed, budget in itertools.product(range(20), [0, 4, 7.5, 11, 20, 37, 100]):
        p = [random(*shape, seed=100 * seed + i, device=device).sigmoid()
             for i, shape in enumerate([(3,), (2, 4), (3, 3)])]
        left, expected = budget, [torch.zeros_like(q).bool() for q in p]
        items = [(q, i, place) for i, part in enumerate(p) for place, q in np.ndenumerate(part.cpu())]
        for _, i, place in sorted(items, key=lambda item: -item[0]):
            left -= cost[i]
            expected[i][place] = left >= 0
        assert_close(rpca.keep_most_probable(p, cost, budget), expected)


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
    root = torch.linalg.cholesky(H)  # |(t - s) root|^2, row by row
    for row, kept, target in zip(S, mask, T):
        if kept.any():
            exact = torch.linalg.lstsq(root[kept].T, root.T @ target[:, None]).solution[:, 0]
            assert_close(row[kept], exact, rtol=100 * slack, atol=100 * slack)


@pytest.mark.parametrize("m, n, k, bias", [(7, 5, 2, True), (5, 11, 0, True), (1, 6, 1, False)])
def test_a_sum_layer_answers_learns_and_is_stored_as_its_weight(m, n, k, bias, device):
    dense = make_layer("linear" if bias else "linear without bias", m, n, device)
    U, V, S, x = (random(*shape, device=device) for shape in [(m, k), (k, n), (m, n), (4, n)])
    S = S * (S > 0)
    layer, W = rpca.low_rank_plus_sparse(U, V, S.clone(), dense), (U @ V + S).requires_grad_()
    layer(x).square().sum().backward()
    F.linear(x, W, dense.bias).square().sum().backward()
    assert_close(layer.S.grad, W.grad * (S != 0))  # zeros get no gradient, and stay zero
    assert soco.stored(dense, layer) == k * (m + n) + S.count_nonzero()
    values, mask = layer.pack(layer.S.detach()).values()
    assert torch.equal(values, S[S != 0]) and len(mask) == -(-m * n // 8)
    layer.values, layer.mask, layer.S = nn.Parameter(values), mask, None
    layer.unpack()
    assert torch.equal(layer.S, S)


def test_a_round_keeps_the_worthiest_and_rounds_and_refits_lower_the_error(make):
    losses, model = [], make()
    for rounds, refit_all in ((1, lambda drafts: None), (1, rpca.refit_all), (8, rpca.refit_all)):
        torch.manual_seed(0)
        with soco.frozen(model), mock.patch.object(rpca, "refit_all", refit_all):
            drafts = rpca.drafted(model, block_layers(model), [tokens(8, 32)])
            rpca.choose_by_metric(model, drafts, None, 0.5, rounds)
        drafts, losses = list(drafts.values()), losses + [0]
        kept = torch.cat([draft.S.flatten() for draft in drafts]) != 0
        assert 0.49 * len(kept) < kept.sum() <= len(kept) // 2
        for draft in drafts:
            E = draft.rows[:, None] * (draft.target() - draft.S)
            losses[-1] += (E @ draft.G * E).sum().item()
            draft.S = matrix(draft.layer)
        worth = torch.cat([draft.worth().flatten() for draft in drafts])
        assert rounds > 1 or worth[kept].min() > worth[~kept].max()
    assert losses[2] < 0.95 * losses[1] < 0.95 ** 2 * losses[0]


def gpt2_with_planted_and_dead_layers():
    model = tiny_gpt2()
    matrix(model.transformer.h[0].attn.c_attn).copy_(0.1 * sum(planted(72, 24)))
    model.transformer.h[1].mlp.c_proj.weight.data.zero_()
    return model


@pytest.mark.parametrize("settings", [{}, {"steps": 0, "rounds": 2}, {"estimator": "policy"}])
@pytest.mark.parametrize("make", [*MODELS, gpt2_with_planted_and_dead_layers])
def test_compress_meets_the_budget_with_the_weights_that_it_says(make, settings, monkeypatch):
    monkeypatch.setattr(rpca, "RANK_SHARE", 0.3)
    for ratio in (0.2, 0.5, 0.8):
        dense, model = make(), make()
        rpca.compress(model, [IDS, tokens(2, 16, seed=1)], ratio, **settings)
        total, stored = 0, stored_parameters(model, dense)
        for name, layer in block_layers(dense).items():
            new = model.get_submodule(name)
            L = new.up.weight @ new.down.weight if new.up else 0
            matrix(layer).copy_((new.S + L).detach())
            total += new.S.numel()
        assert stored <= (1 - ratio) * total and (make not in MODELS or stored > 0.98 * (1 - ratio) * total)
        assert_close(logits(model, tokens(3, 20)), logits(dense, tokens(3, 20)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tenths", [3, 5, 8, 9])
@pytest.mark.parametrize("m, n", [(7, 5), (5, 11), (20, 20)])
def test_baselines_keep_the_largest_and_as_much_as_the_ratio_leaves(m, n, tenths):
    layer = make_layer("linear", m, n).float()
    W, D = matrix(layer), random(n, seed=1).abs().float()
    draft = rpca.Draft(layer, (D ** 2).diag(), torch.ones(m))
    found = {key: rpca.pruned(worth, draft, tenths / 10).S for key, worth in rpca.BASELINES.items()}
    cut = sorted(W.abs().flatten().tolist(), reverse=True)[m * n * (10 - tenths) // 10 - 1]
    assert torch.equal(found["magnitude"], W * (W.abs() >= cut))
    for row, kept in zip(W.tolist(), found["wanda"].tolist()):
        order = sorted(range(n), key=lambda i: -abs(row[i]) * D[i].item())[:n * (10 - tenths) // 10]
        assert kept == [w if i in order else 0 for i, w in enumerate(row)]
