"""The weights that are compressed: finding them in a model, and putting others in their place."""
import contextlib

import torch.nn as nn

from common import UserError

def block_layers(model):
    """{name: layer} of every nn.Linear and Conv1D that stands inside the model's repeated blocks.

    Raises UserError for a model without any, for one that is quantized or compressed already, and for one with experts
    in 3-D parameters.
    """
    if getattr(getattr(model, "config", None), "quantization_config", None):
        raise UserError(f"{type(model).__name__} is quantized or compressed already: give the dense model")
    inside = block_prefixes(model)
    stacks = [f"{name}.{key}" for name, module in model.named_modules() if name.startswith(inside) and not isinstance(module, nn.Conv1d)
              for key, p in module.named_parameters(recurse=False) if p.ndim == 3]
    if stacks:
        raise UserError(f"{type(model).__name__} holds a stack of matrices in one 3-D parameter, {stacks[0]}, as mixtures of experts "
                        f"do: only models whose matrices are nn.Linear or Conv1D layers can be compressed")
    layers = {name: module for name, module in model.named_modules() if name.startswith(inside) and is_matrix(module)}
    if not layers:
        raise UserError(f"{type(model).__name__} has no nn.Linear or Conv1D inside repeated blocks: nothing to compress")
    return layers


def untouched(model, layers):
    """(name, shape, reason) of every weight of two or more dimensions that is not in one of `layers` {name: layer}."""
    inside, chosen = block_prefixes(model), {id(p) for layer in layers.values() for p in layer.parameters()}
    return [(name, tuple(p.shape), "not a Linear or Conv1D" if name.startswith(inside) else "outside the repeated blocks")
            for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in chosen]


def block_prefixes(model):
    """Beginnings of the names of all that stands inside the model's repeated blocks (its ModuleLists)."""
    return tuple(name + "." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))


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
    """Put new_of[layer] in place of every layer wherever the model holds it, in the mode, training or not, of that layer."""
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
    """Inside the with block a model runs without dropout, and only parameters switched on there get gradients.

    checkpointing: whether blocks on which gradient checkpointing was enabled use it there.
    """
    flags, training = {p: p.requires_grad for p in model.parameters()}, model.training
    model.eval()
    for module in model.modules():                   # transformers checkpoints only blocks in training mode
        module.training = checkpointing and getattr(module, "gradient_checkpointing", False)
    for p in flags:
        p.requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for p, flag in flags.items():
            p.requires_grad_(flag)


def enable_checkpointing(model):
    """Switch gradient checkpointing on, for `frozen(model, checkpointing=True)`."""
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):     # transformers' newer name, and its older one
        if hasattr(model, name):
            try:
                return getattr(model, name)()
            except ValueError as error:
                raise UserError(f"{type(model).__name__} has no gradient checkpointing: leave --gradient-checkpointing out") from error


def input_device(model):
    return model.get_input_embeddings().weight.device
