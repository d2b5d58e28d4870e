"""What soco.py and rpca.py share: the weights they compress, the metric they measure a change with, and the saved folder.

**One metric serves both.** Replace a weight W [m, n] by W'. To second order the loss grows by what a Kronecker-factored
Fisher matrix says (K-FAC, Martens & Grosse 2015, arXiv 1503.05671), up to a factor of one half:

    E[ |R^(1/2) (W - W') x|^2 ]  =  | R^(1/2) (W - W') L |_F^2,      G = E[x x^T] = L L^T,   R = diag E[g g^T]

with x [n] the layer's input at a token and g [m] the gradient of that token's loss at its output. In the scaled
matrix R^(1/2) W L a squared singular value, or a squared entry, is the loss it costs to drop it, in the same
currency for every matrix of the model: one threshold on (loss per stored number) spreads the budget.
SoCo truncates singular values in it; CAP, with the diagonal of G only, drops entries and directions.
"""
import contextlib
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


class UserError(ValueError):
    """Input that cannot be used. A command prints its message, one line that says the way out, and exits with 2."""


# ---- the weights ------------------------------------------------------------------------------

def block_layers(model):
    """{name: layer} of every nn.Linear and Conv1D that stands inside the model's repeated blocks (its ModuleLists)."""
    if getattr(getattr(model, "config", None), "quantization_config", None):
        raise UserError(f"{type(model).__name__} is quantized or compressed already: give the dense model")
    inside = tuple(name + "." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    layers = {name: module for name, module in model.named_modules() if name.startswith(inside) and is_matrix(module)}
    if not layers:
        raise UserError(f"{type(model).__name__} has no nn.Linear or Conv1D inside repeated blocks: nothing to compress")
    return layers


def is_conv1d(layer):
    return type(layer).__name__ == "Conv1D"          # transformers' GPT-2 layer: a Linear whose weight lies transposed


def is_matrix(layer):
    return isinstance(layer, nn.Linear) or is_conv1d(layer)


def matrix(layer):
    """The weight of a layer as W [m, n] (outputs, inputs): y = W x + b."""
    return layer.weight.detach().T if is_conv1d(layer) else layer.weight.detach()


def dense_like(layer, W, bias):
    """A layer of the same type as `layer` with weight W [m, n] and bias [m] or None."""
    new = nn.Linear(W.shape[1], W.shape[0], device="meta") if not is_conv1d(layer) else type(layer)(*W.shape)
    new.weight = nn.Parameter((W.T if is_conv1d(layer) else W).to(layer.weight).contiguous(), layer.weight.requires_grad)
    new.bias = None if bias is None else nn.Parameter(bias.to(layer.weight), layer.weight.requires_grad)
    return new


def swap(model, new_of):
    """Put new_of[layer] in place of every layer wherever the model holds it."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new_of:
                parent._modules[name] = new_of[child]


@contextlib.contextmanager
def swapped(model, new_of):
    """`swap` for the length of a with block."""
    swap(model, new_of)
    try:
        yield model
    finally:
        swap(model, {new: old for old, new in new_of.items()})


# ---- the metric -------------------------------------------------------------------------------

@dataclass
class Metric:
    G: torch.Tensor      # E[x x^T] [n, n] float32, inputs of the layer
    R: torch.Tensor      # diagonal of E[g g^T] [m] float32, gradients of the loss at the outputs


def collect_metric(model, layers, batches, progress=False):
    """{name: Metric} of `layers` {name: layer} over `batches` of token ids [batch, length].

    One pass forward and one backward of the whole model a batch, watched by hooks; sums in float32. The labels are
    drawn from the model's own prediction: E[g g^T] is then the Fisher matrix, the curvature of KL(model || changed
    model), and not that of one text. Raises UserError for a layer that no token reached.
    """
    G, R, same_input, tokens = {}, dict.fromkeys(layers, 0), {}, 0
    latest = (None, None)                                    # q, k and v read the same tensor: one Gram matrix for all

    def watch(name, layer, inputs, output):
        nonlocal latest
        if inputs[0] is latest[1]:
            same_input[name] = latest[0]
        else:
            latest = (name, inputs[0])
            x = inputs[0].detach().flatten(0, -2).float()
            G[name] = G.get(name, 0) + x.T @ x
        output.register_hook(lambda g: R.update({name: R[name] + g.flatten(0, -2).float().square().sum(0)}))

    hooks = [layer.register_forward_hook(functools.partial(watch, name)) for name, layer in layers.items()]
    hooks.append(model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_()))
    try:
        with frozen(model):                                  # gradients of the outputs are all that is asked for
            for ids in bar(batches, progress, desc="metric", unit="batch"):
                logits = model(input_ids=ids.to(input_device(model)), use_cache=False).logits.flatten(0, 1).float()
                labels = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
                F.cross_entropy(logits, labels, reduction="sum").backward()
                latest, tokens = (None, None), tokens + ids.numel()
    finally:
        for hook in hooks:
            hook.remove()
    unreached = [name for name in layers if not torch.is_tensor(R[name])]
    if unreached:
        raise UserError(f"no calibration token reached layer {unreached[0]}: use more calibration text")
    G = {name: moment / tokens for name, moment in G.items()}
    return {name: Metric(G[same_input.get(name, name)], R[name] / tokens) for name in layers}


@contextlib.contextmanager
def frozen(model):
    """Inside the with block a model runs without dropout, and only parameters switched on there get gradients."""
    flags, training = {p: p.requires_grad for p in model.parameters()}, model.training
    model.eval()
    for p in flags:
        p.requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for p, flag in flags.items():
            p.requires_grad_(flag)


def input_device(model):
    return model.get_input_embeddings().weight.device


def sample_blocks(ids, seqlen, count, seed):
    """`count` blocks of `seqlen` tokens [count, seqlen] of a text's ids [tokens], without overlap, in random order;
    the order repeats when the text has fewer."""
    blocks = ids[:len(ids) // seqlen * seqlen].view(-1, seqlen)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed), device="cpu")
    return blocks[order.repeat(count // len(blocks) + 1)[:count]]


def bar(items, progress, **words):
    """A progress bar over items, if asked for and if standard error is a terminal."""
    from tqdm import tqdm
    return tqdm(items, disable=None if progress else True, leave=False, **words)


# ---- the saved folder -------------------------------------------------------------------------
#
# An ordinary transformers folder. config.json names, under "quantization_config", each replaced layer and what it
# became; transformers calls back here, through its extension point for quantization methods, to build the layers.

FORMAT = 1                                       # of the folder; a newer one is refused
SCRIPT_OF = {"soco": "soco", "cap": "rpca"}      # the module to import before such a folder can be loaded


def register(method, build):
    """Teach transformers to load folders of `method`; build(layer, **spec) makes an empty replacement of a layer."""
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
    if method in auto.AUTO_QUANTIZER_MAPPING:    # imported before, or run again in a notebook
        return

    class CompressedConfig(QuantizationConfigMixin):
        def __init__(self, layers, format, **ignored):
            self.quant_method, self.layers, self.format = method, layers, format
            if format > FORMAT:
                raise UserError(f"this folder has format {format}, this program reads up to {FORMAT}: update it")

    class CompressedQuantizer(HfQuantizer):
        requires_calibration = False
        is_trainable = True

        def is_serializable(self):
            return True

        def _process_model_before_weight_loading(self, model, **kwargs):
            rebuild(model, self.quantization_config.layers, build)
            model.config.quantization_config = self.quantization_config

    auto.register_quantization_config(method)(CompressedConfig)
    auto.register_quantizer(method)(CompressedQuantizer)


def rebuild(model, specs, build):
    """Replace each named layer of a model by build(layer, **spec), its weights still to be loaded."""
    layers = dict(model.named_modules())
    unknown = [name for name in specs if not is_matrix(layers.get(name))]
    if unknown:
        raise UserError(f"config.json names layer {unknown[0]}, which {type(model).__name__} does not have")
    with torch.device("meta"):
        swap(model, {layers[name]: build(layers[name], **spec) for name, spec in specs.items()})


@contextlib.contextmanager
def new_folder(folder, overwrite=False):
    """A temporary folder beside `folder`, which takes its name when the with block ends well and is removed if not."""
    folder = Path(folder).absolute()
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} exists: give another folder, or ask to overwrite it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        fresh, old = Path(beside) / "new", Path(beside) / "old"
        fresh.mkdir()
        yield fresh
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)


def mark_compressed(model, method, specs):
    """Write into a model's config what became of each layer: specs {name: keywords of `build`}."""
    model.config.quantization_config = {"quant_method": method, "format": FORMAT, "layers": specs}


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


def save(model, folder, overwrite=False, extra=None):
    """Write a compressed model to a new folder, complete or not at all; extra(folder) adds files before it gets its name."""
    if getattr(model.config, "quantization_config", None) is None:
        raise UserError("this model was not compressed: save it with save_pretrained")
    with new_folder(folder, overwrite) as fresh, quiet():
        model.save_pretrained(fresh)
        if extra:
            extra(fresh)


def load(folder, **options):
    """The model in a folder, compressed or dense; options as for transformers' from_pretrained (dtype, device_map, ...).

    Only safetensors is read. Raises UserError where a tensor is missing: transformers would make up random numbers.
    """
    from transformers import AutoModelForCausalLM
    with quiet(), torch.device("cpu"):
        model, info = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    if info["missing_keys"]:
        raise UserError(f"{folder} lacks tensor {sorted(info['missing_keys'])[0]}")
    return model
