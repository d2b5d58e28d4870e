"""What a run would need: memory by arithmetic, without loading a weight; time from parts timed on this device.

    python bench/plan.py --model FOLDER_OR_SHAPE --memory 24       # GB (1e9 bytes) of one device
    python bench/plan.py --model llama-7b --time 4                 # 1 and 4 blocks of random weights, scaled to all
    python bench/plan.py --table                                   # known shapes on 24 and 80 GB

Memory: weights, factors or drafts, the metric's sums over a group of blocks, and what a forward pass keeps for its
backward pass. Not planned: the policy gradient, and what several processes send each other.
"""
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import soco
from bench.speed import SHAPES, build, parts
from eval_ppl import Parser, pick_device, pick_dtype, add_model_flags, between, run, whole


def kept(model, ids):
    """Bytes that a forward pass keeps for its backward pass, beside the model's own."""
    own, found = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}, {}

    def keep(tensor):
        found[tensor.untyped_storage()._cdata] = tensor               # held: no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for key, tensor in found.items() if key not in own)


def memory(name, dtype, args, device):
    """({what: bytes}, groups of blocks) of a run on one device of `device` bytes."""
    with FakeTensorMode():
        model, size = build(name, dtype, "cpu"), dtype.itemsize
        layers, ids = soco.block_layers(model), torch.zeros(args.batch_size, args.seqlen, dtype=torch.long)
        shapes, blocks = [soco.matrix(layer).shape for layer in layers.values()], model.config.num_hidden_layers
        logits = ids.numel() * model.get_output_embeddings().weight.shape[0]
        sizes = [((m, min(m, n)), (min(m, n),), (min(m, n), n)) for m, n in shapes]
        scored = {layer: soco.ScoredLinear(layer, *map(torch.empty, three)) for layer, three in zip(layers.values(), sizes)}
        with soco.frozen(model):
            model.get_input_embeddings().weight.requires_grad_()
            # the hooks' inputs; probabilities and their sums
            metric = kept(model, ids) + ids.numel() * size * sum(n for _, n in shapes) + logits * (size + 2 * 4)
        with soco.frozen(model), soco.swapped(model, scored):     # logits, their gradient; rows of KLDivergence
            step = kept(model, ids) + 3 * size * logits + 3 * 4 * logits // len(ids)
    weights, entries = size * sum(p.numel() for p in model.parameters()), sum(m * n for m, n in shapes)
    factors, sums = (sum(f(m, n) for m, n in shapes) for f in (lambda m, n: size * min(m, n) * (m + n), lambda m, n: 4 * (m * m + n * n)))
    ...
