"""The saved folder: an ordinary transformers folder.

config.json names, under "quantization_config", each replaced layer and what it became; transformers calls back here,
through its extension point for quantization methods, to build the layers before it loads their weights.
"""
import contextlib
import tempfile
from pathlib import Path

import torch

from common import UserError
from common.layers import is_matrix, swap

FORMAT = 2                                       # of the folder; another is refused
SCRIPT_OF = {"soco": "soco", "cap": "rpca"}      # the module to import before such a folder can be loaded


def register(method, build):
    """Teach transformers to load folders of `method`; build(layer, shapes) makes the empty replacement of a
    dense layer whose tensors have the shapes {name: shape}."""
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
    if method in auto.AUTO_QUANTIZER_MAPPING:    # imported before, or run again in a notebook
        return

    class CompressedConfig(QuantizationConfigMixin):
        def __init__(self, layers, format, **ignored):
            self.quant_method, self.layers, self.format = method, layers, format
            if format != FORMAT:
                raise UserError(f"this folder has format {format}, and this program reads {FORMAT}: use the version that wrote it")

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
    """Replace each named layer of a model by build(layer, shapes), its weights still to be loaded."""
    layers = dict(model.named_modules())
    unknown = [name for name in specs if not is_matrix(layers.get(name))]
    if unknown:
        raise UserError(f"config.json names layer {unknown[0]}, which {type(model).__name__} does not have")
    with torch.device("meta"):
        swap(model, {layers[name]: build(layers[name], shapes) for name, shapes in specs.items()})


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
        try:
            fresh.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise


def install(model, method, layers, new):
    """Put new[layer] in place of each of `layers` {name: layer}, and write the shapes of its tensors into the model's config."""
    swap(model, new)
    shapes = {name: {key: list(tensor.shape) for key, tensor in new[layer].state_dict().items()} for name, layer in layers.items()}
    model.config.quantization_config = {"quant_method": method, "format": FORMAT, "layers": shapes}
    return model


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

    Only safetensors is read. Raises UserError where a tensor is missing or of another shape than config.json says:
    transformers would make up random numbers.
    """
    from transformers import AutoModelForCausalLM
    with quiet(), torch.device("cpu"):
        model, info = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, output_loading_info=True,
                                                           ignore_mismatched_sizes=True, **options)
    if info["mismatched_keys"]:
        name, found, asked = sorted(info["mismatched_keys"])[0]
        raise UserError(f"{folder}: tensor {name} has shape {list(found)} where config.json asks for {list(asked)}")
    if info["missing_keys"]:
        raise UserError(f"{folder} lacks tensor {sorted(info['missing_keys'])[0]}")
    return model
