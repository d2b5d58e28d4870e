"""Perplexity of any causal language model, dense or compressed, by a stated protocol.

    python eval_ppl.py                                   # the bundled model, offline, on a laptop
    python eval_ppl.py --model gpt2 --seqlen 1024        # GPT-2 on WikiText-2, on a GPU if there is one
    python eval_ppl.py --model out/FOLDER --eval stdlib  # what soco.py or rpca.py wrote, on any text

Protocol. The text is tokenised in one piece and cut into non-overlapping blocks of `seqlen` tokens; the tail
is dropped; each block is scored alone, its first token not scored; one sum of nats over one count of tokens.
With a stride smaller than `seqlen`, windows overlap and every token is scored once, with all the context its
window gives it (the sliding window of the transformers documentation). With --bos a token, by itself the
tokenizer's <bos>, takes the place of every window's first (llama.cpp puts it there too), for models that have
always seen it, such as Gemma. Perplexities of different protocols, texts or tokenisers do not compare.

soco.py and rpca.py take from here the texts, the loading of a model and the conventions of the command line.
"""
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # Ctrl-C while torch is imported: no traceback

import argparse
import ast
import functools
import importlib
import json
import math
import os
import re
import sysconfig
import traceback
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

BUNDLED = str(Path(__file__).resolve().parent / "demo")           # a small GPT-2 that needs no download


class UserError(ValueError):
    """Input that cannot be used. A command prints this line, with the way out; its exit code is 2."""


class Perplexity(NamedTuple):
    ppl: float        # exp(nats per token)
    nll: float        # nats per token
    tokens: int       # tokens scored


@torch.no_grad()
def perplexity(model, ids, seqlen, stride=None, blocks=None, progress=lambda batches: batches, bos=None):
    """exp of the mean negative log-likelihood of `ids` [tokens], in windows of `seqlen` tokens.

    stride: tokens from one window to the next (default seqlen: blocks that share nothing). blocks: score only
    the first so many windows. progress: wraps the iterable of batches, as tqdm does. bos: a token to stand in
    place of the first of every window. The model is left in the mode, module by module, in which it was.
    Raises ValueError when there is not one whole window, FloatingPointError when the result is not finite.
    """
    stride = stride or seqlen
    starts = range(0, len(ids) - seqlen + 1, stride)[:blocks]
    if not starts or not 1 <= stride <= seqlen or seqlen < 2:
        raise ValueError(f"{len(ids)} tokens, seqlen {seqlen}, stride {stride}: no whole window to score")
    device, modes = model.get_input_embeddings().weight.device, {m: m.training for m in model.modules()}
    device = "cpu" if device.type == "meta" else device           # offloaded: a hook moves what it reads
    model.eval()
    nats, tokens, at_once = 0.0, 0, max(1024 // seqlen, 1)        # windows in one forward pass
    try:
        for first in progress(range(0, len(starts), at_once)):
            some = starts[first:first + at_once]
            windows = torch.stack([ids[start:start + seqlen] for start in some]).to(device)
            if bos is not None:
                windows[:, 0] = bos
            logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
            targets = windows[:, 1:].to(logits.device, torch.long, copy=True)
            targets[0 if first else 1:, :max(seqlen - stride - 1, 0)] = -100    # scored by the window before
            tokens += int((targets >= 0).sum())
            nats += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum").item()
    finally:
        for module, training in modes.items():
            module.training = training
    if not math.isfinite(nats):
        raise FloatingPointError(f"perplexity is {nats}: the model's logits are not finite in {model.dtype}; "
                                 f"try --dtype float32")
    return Perplexity(math.exp(min(nats / tokens, 700)), nats / tokens, tokens)


# ---- text -------------------------------------------------------------------------------------

def wikitext2(split):
    """WikiText-2 raw (Merity et al. 2016) from the hub: `split` is train, valid or test."""
    from huggingface_hub import hf_hub_download
    path = hf_hub_download("ggml-org/ci", "wikitext-2-raw-v1.zip", repo_type="dataset")
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith(f"wiki.{split}.raw"))
        lines = archive.read(name).decode("utf-8").splitlines(keepends=True)
    return "\n\n".join(line if line.strip() else "" for line in lines)


@functools.cache
def stdlib_documents():
    """{name: [text, ...]}: help topics and docstrings, by module, of this Python's standard library."""
    from pydoc_data.topics import topics
    documents = {f"topic {name}": [text] for name, text in topics.items()}
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idlelib", "site-packages", "lib2to3", "turtledemo"}
    for path in sorted(root.rglob("*.py")):
        if skip.isdisjoint(path.relative_to(root).parts):
            documents[path.relative_to(root).as_posix()] = docstrings(path.read_bytes())
    return documents


def docstrings(source):
    """All docstrings of a Python source."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return list(filter(None, map(ast.get_docstring, nodes)))


def is_held_out(name):
    """Whether the document of that name belongs to the test split: one in ten, by a hash."""
    return zlib.crc32(name.encode()) % 10 == 0


def stdlib(split):
    """English that every Python installation carries; `is_held_out` names the documents of the test split.

    A text that stands in both, word for word, stays in train only.
    """
    documents = stdlib_documents()
    held_out = set(filter(is_held_out, documents))
    train = dict.fromkeys(text for name in documents if name not in held_out for text in documents[name])
    test = dict.fromkeys(text for name in sorted(held_out) for text in documents[name] if text not in train)
    return "\n\n".join(train if split == "train" else test)


TEXTS = {"wikitext2": wikitext2, "stdlib": stdlib}


def load_text(name, split):
    """The text called `name`, wikitext2 or stdlib, in its train or test split, or the text file `name`."""
    try:
        return TEXTS[name](split) if name in TEXTS else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, StopIteration, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read text {name!r} ({type(error).__name__}): give a UTF-8 text file, "
                        f"wikitext2 (needs the hub) or stdlib") from error


def encode(tokenizer, text):
    """Token ids [tokens] of a whole text, with the special tokens that the tokenizer adds by itself."""
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0].long()


def load_tokens(model, tokenizer, name, split, seqlen):
    """Token ids [tokens] of a named text; too few, or ids that the model has not, are bad input.

    In a train split, which is there to learn from, WikiText's mark of a rare word, <unk>, is left out: it is
    no text, and a tokenizer spells it out or has a token for it that the model has hardly seen.
    """
    text = load_text(name, split)
    ids = encode(tokenizer, text.replace(" <unk>", "") if split == "train" else text)
    if len(ids) < seqlen:
        raise UserError(f"text {name!r} has {len(ids)} tokens, fewer than one block of {seqlen}: "
                        f"give a longer text or a smaller sequence length")
    known = model.get_input_embeddings().num_embeddings
    if ids.max() >= known:
        raise UserError(f"the tokenizer gives token {ids.max()} in text {name!r}, the model knows {known}: "
                        f"give the model its own tokenizer")
    return ids


def first_token(model, tokenizer, bos):
    """The token id that --bos means: None without it, the tokenizer's <bos> for OWN_BOS."""
    if bos == OWN_BOS and tokenizer.bos_token_id is None:
        raise UserError("--bos: the tokenizer has no <bos>: give the id of a token, or leave it out")
    bos = tokenizer.bos_token_id if bos == OWN_BOS else bos
    known = model.get_input_embeddings().num_embeddings
    if bos is not None and bos >= known:
        raise UserError(f"--bos {bos}: the model knows {known} tokens: give one of them, or leave it out")
    return bos


# ---- models -----------------------------------------------------------------------------------

def pick_device(name):
    """torch.device for auto (CUDA if there is one), cpu, cuda, cuda:1, ...; under torchrun, one a process."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]    # not mps: it has no float64
    if name not in known:
        raise UserError(f"--device {name!r}: no such device; use auto or one of {', '.join(known)}")
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)                             # a first backward pass of its own:
        torch.ones(1, device=device, requires_grad=True).sum().backward()    # else cuBLAS warns of no context
    return device


def pick_dtype(name, device):
    """torch.dtype for auto (bfloat16 on CUDA, else float32), float32, bfloat16, float16."""
    auto = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, auto if name == "auto" else name)


def load_model(name, device, dtype, device_map=None, **options):
    """(model, tokenizer) of a local folder, dense or compressed, or of a hub id; only safetensors is read.

    device_map: as for from_pretrained, in place of `device`. options: revision and trust_remote_code.
    Raises UserError for what cannot be loaded.
    """
    from transformers import AutoTokenizer
    try:
        load = check_folder(Path(name)) if Path(name).is_dir() else load_dense
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model = load(name, dtype=dtype, device_map=device_map, **options)
        model = model if device_map else model.to(device)
    except Exception as error:  # of transformers, tokenizers, safetensors, ...
        innermost = traceback.extract_tb(error.__traceback__)[-1].filename
        ours = Path(innermost).parent == Path(__file__).parent
        if out_of_memory(error) or ours and not isinstance(error, (ValueError, OSError)):
            raise                                                 # ... but not full memory, nor our defects
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"cannot load --model {name}: {why}; give a folder with config.json, "
                        f"model.safetensors and a tokenizer, or a hub id") from error
    blocks = [len(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    if blocks and not any(blocks):
        raise UserError(f"--model {name}: it has no blocks; mend its config.json")
    bad = next((key for key, value in model.state_dict().items()
                if not (value.is_meta or value.isfinite().all())), None)     # meta: offloaded
    if bad:
        raise UserError(f"--model {name}: tensor {bad} holds NaN or infinity in {dtype}; "
                        f"mend the weights or use --dtype float32")
    return model, tokenizer


def load_named(args):
    """`load_model` of the flags of `add_model_flags`."""
    device = pick_device(args.device)
    return load_model(args.model, device, pick_dtype(args.dtype, device), args.device_map,
                      revision=args.revision, trust_remote_code=args.trust_remote_code)


def load_dense(name, **options):
    """from_pretrained, which must not invent a tensor."""
    from transformers import AutoModelForCausalLM
    model, info = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, output_loading_info=True,
                                                       **options)
    if info["missing_keys"]:
        raise UserError(f"tensor {sorted(info['missing_keys'])[0]} is missing")
    return model


def check_folder(folder):
    """What loads a local folder: load_dense or, for a compressed model, `load` of the script that wrote it.

    Refuses weights outside the folder, and pickles: an index of shards may name any file.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        index = folder / "model.safetensors.index.json"
        shards = json.loads(index.read_text())["weight_map"].values() if index.is_file() else []
        method = (config.get("compressed") or {}).get("method")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"config.json or the index of its weights is broken ({error!r})") from error
    outside = [name for name in shards if not re.fullmatch(r"[^/\\]+\.safetensors", str(name))]
    outside += [config["transformers_weights"]] if config.get("transformers_weights") else []
    outside += ["adapter_config.json"] if (folder / "adapter_config.json").exists() else []
    if outside:
        raise ValueError(f"it leads to {outside[0]}; only safetensors files in the folder itself are read")
    if method is None:
        return load_dense
    try:
        return importlib.import_module({"soco": "soco", "cap": "rpca"}[method]).load
    except (KeyError, ImportError) as error:
        raise ValueError(f"compressed by {method!r}: put soco.py and rpca.py beside eval_ppl.py") from error


def window(model, flag, seqlen):
    """Tokens a window: `seqlen`, for None what the model reads, at most 2048. Refuses more than it reads."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest and seqlen and seqlen > longest:
        raise UserError(f"{flag} {seqlen}: this model reads at most {longest} tokens at a time")
    return seqlen or min(longest or 2048, 2048)


# ---- the command line ---------------------------------------------------------------------------

class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):                           # unless its words tell the default
        told = action.default is None or "(default" in action.help
        return action.help if told else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults and turns a wrong flag into a UserError."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=Formatter, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (see --help)")

    def parse_args(self):
        if bad := [arg for arg in sys.argv if arg.endswith("=--")]:   # argparse takes this for an empty list
            self.error(f"{bad[0]}: -- is no value")
        return super().parse_args()


def whole(low, high=2 ** 31):
    """argparse type: a whole number from `low` to `high`; argparse names it in its errors as here."""
    def whole_number(text):
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {low} to {high}")
        return int(text)
    return whole_number


def between(low, high, or_low=False):
    """argparse type: a number between `low` and `high`, both excluded; with or_low, `low` may be."""
    def number(text):
        if not (low < float(text) < high or or_low and float(text) == low):
            ends = "from {} to below {}" if or_low else "between {} and {}, both excluded"
            raise argparse.ArgumentTypeError(f"{text} is not a number {ends.format(low, high)}")
        return float(text)
    return number


def device_map(text):
    """argparse type: JSON, or a word."""
    return json.loads(text) if text.startswith("{") else text


def add_model_flags(parser):
    add = parser.add_argument
    add("--model", default=BUNDLED, help="folder or hub id of a causal language model, dense or "
        "compressed (default: a small GPT-2 in demo/)")
    add("--revision", help="of a hub model: a branch, tag or commit")
    add("--trust-remote-code", action="store_true", help="run the Python code that a hub model brings along")
    add("--device", default="auto", help="cpu, cuda, cuda:1; auto takes CUDA if there is one")
    add("--device-map", type=device_map, help="in place of --device, what from_pretrained takes: auto (over "
        "several GPUs, needs accelerate), a device, or JSON {module: device}")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights; auto is bfloat16 on CUDA, else float32")


OWN_BOS = -1         # --bos without an id


def add_text_flags(parser, prefix="--"):
    add = parser.add_argument
    add("--eval", help="text to score, its test split: wikitext2, stdlib or a file (default: stdlib for the "
                       "bundled model, else wikitext2)")
    add(f"{prefix}seqlen", dest="eval_seqlen", type=whole(2), help="tokens a window of the perplexity "
        "(default: what the model reads, at most 2048)")
    add(f"{prefix}stride", dest="eval_stride", type=whole(1), help="tokens from one window to the next "
        f"(default: {prefix}seqlen)")
    add(f"{prefix}blocks", dest="eval_blocks", type=whole(1), help="score only the first so many windows "
        "(default: all)")
    add("--bos", nargs="?", type=whole(0), const=OWN_BOS, metavar="ID", help="token to stand in place of the "
        "first of every block of text; without ID the tokenizer's <bos> (default: the text as it is)")


def default_text(model):
    return "stdlib" if Path(model).resolve() == Path(BUNDLED) else "wikitext2"


def load_scored(args, prefix="--"):
    """The model, its tokenizer, and the token ids to score, of the flags of `add_model_flags` and
    `add_text_flags`. Fills in, in `args`, what only the model tells."""
    model, tokenizer = load_named(args)
    args.eval, args.bos = args.eval or default_text(args.model), first_token(model, tokenizer, args.bos)
    args.eval_seqlen = window(model, f"{prefix}seqlen", args.eval_seqlen)
    args.eval_stride = args.eval_stride or args.eval_seqlen
    if args.eval_stride > args.eval_seqlen:
        raise UserError(f"{prefix}stride {args.eval_stride} is longer than the window of {args.eval_seqlen}: "
                        f"it would skip text")
    ids = load_tokens(model, tokenizer, args.eval, "test", args.eval_seqlen)
    if args.bos is None and ids[0] == tokenizer.bos_token_id:
        say(f"note: the tokenizer begins a text with {tokenizer.bos_token}; with --bos every block begins so")
    return model, tokenizer, ids


def score(model, ids, args, progress=lambda batches: batches):
    """(Perplexity, {its protocol}) of a model by the flags of `load_scored`."""
    found = perplexity(model, ids, args.eval_seqlen, args.eval_stride, args.eval_blocks, progress, args.bos)
    return found, {"data": args.eval, "split": "test", "seqlen": args.eval_seqlen, "stride": args.eval_stride,
                   "bos": args.bos, "tokens": found.tokens, "dtype": str(model.dtype)[6:]}


def listed(settings):
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def say(line):
    """Print a line; a stdout that nobody reads any more does not end the run."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def out_of_memory(error):
    """Whether an exception says that memory is full: of the host, of a device, of one of CUDA's libraries."""
    told = re.search("allocate memory|out of memory|ALLOC_FAILED", str(error))
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and bool(told)


def torchrun_rank():
    """The rank of this process among those that torchrun started, as text; "0" for one alone."""
    return os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"


def run(main, *bad_input):
    """Call a script's main(). Bad input (UserError, `bad_input`) ends it with one line and exit code 2; a
    defect keeps its traceback. Of several processes that torchrun started, the first alone prints, but for
    failures.
    """
    import huggingface_hub.utils.logging
    from transformers.utils import logging
    huggingface_hub.utils.logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    script, rank = Path(sys.argv[0]).name, torchrun_rank()
    if rank != "0":
        sys.stdout = open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace")             # as stderr: for names it cannot print
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # temporary folders are removed on the way out

    def fail(message):
        joined = torch.distributed.is_available() and torch.distributed.is_initialized()
        if rank == "0" or joined:                                 # before they join, all processes fail alike
            print(f"{script}: error: {f'process {rank}: ' if joined else ''}{message}", file=sys.stderr)
        sys.exit(2)

    try:
        main()
    except (UserError, FloatingPointError, *bad_input) as error:
        fail(" ".join(str(error).split()))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        fail(f"out of memory: {str(error).partition(chr(10))[0]}; give a smaller --seqlen or batch, or "
             f"--device-map")
    except KeyboardInterrupt:
        print(f"{script}: interrupted, nothing half written is left", file=sys.stderr)
        sys.exit(130)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def main():
    parser = Parser(__doc__)
    add_model_flags(parser)
    add_text_flags(parser)
    args = parser.parse_args()
    model, _, ids = load_scored(args)
    bar = functools.partial(tqdm, desc="perplexity", disable=None, leave=False)       # on a terminal
    found, protocol = score(model, ids, args, bar)
    say(f"perplexity {found.ppl:.4f} ({found.nll:.5f} nats a token; model {args.model}, {listed(protocol)})")


if __name__ == "__main__":
    run(main)
