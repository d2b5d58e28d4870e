"""Perplexity of any causal language model, dense or compressed, by a stated protocol.

    python eval_ppl.py                                   # the bundled model, offline, on a laptop
    python eval_ppl.py --model gpt2 --seqlen 1024        # GPT-2 on the WikiText-2 test split, on a GPU if there is one
    python eval_ppl.py --model out/FOLDER                # what soco.py or rpca.py wrote

Protocol. The text is tokenised in one piece and cut into non-overlapping blocks of `seqlen` tokens;
the tail is dropped; each block is scored alone, its first token not scored; one sum of nats over one
count of tokens. With a stride smaller than `seqlen`, windows overlap and every token is scored once,
with all the context its window gives it (the sliding window of the transformers documentation).
Perplexities of different protocols, text or tokenisers do not compare.
"""
import ast
import functools
import math
import sysconfig
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common import UserError, bar
from common.cli import (BUNDLED, Parser, add_model_flags, check_seqlen, load_model, longest_input, pick_device, pick_dtype,
                        run, whole)
from common.layers import input_device


class Perplexity(NamedTuple):
    ppl: float        # exp(nats per token)
    nll: float        # nats per token
    tokens: int       # tokens scored


@torch.no_grad()
def perplexity(model, ids, seqlen, stride=None, blocks=None, progress=False):
    """exp of the mean negative log-likelihood of `ids` [tokens], in windows of `seqlen` tokens.

    stride: tokens from one window to the next (default seqlen: blocks that share nothing).
    blocks: score only the first so many windows. Raises ValueError when there is not one whole window, and
    FloatingPointError when the result is not finite.
    """
    stride = stride or seqlen
    starts = range(0, len(ids) - seqlen + 1, stride)[:blocks]
    if not starts or not 1 <= stride <= seqlen or seqlen < 2:
        raise ValueError(f"{len(ids)} tokens, seqlen {seqlen}, stride {stride}: no whole window to score")
    training = model.training
    model.eval()
    nats = tokens = 0
    at_once = max(1024 // seqlen, 1)                                   # windows in one forward pass
    for first in bar(range(0, len(starts), at_once), progress, desc="perplexity", unit="batch"):
        some = starts[first:first + at_once]
        windows = torch.stack([ids[start:start + seqlen] for start in some]).to(input_device(model))
        logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
        targets = windows[:, 1:].to(logits.device, copy=True)
        for target, start in zip(targets, some):
            target[:seqlen - stride - 1 if start and stride < seqlen else 0] = -100     # scored in the window before
        for logit, target in zip(logits, targets):
            nats += F.cross_entropy(logit.float(), target, reduction="sum").item()
        tokens += (targets != -100).sum().item()
    model.train(training)
    if not math.isfinite(nats):
        raise FloatingPointError(f"perplexity is {nats}: the model's logits are not finite in {model.dtype}; try --dtype float32")
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
    """{name: [text, ...]}: the help topics and the docstrings, module by module, of this Python's standard library."""
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


def load_text(name, split):
    """The text called `name` (wikitext2, stdlib) in its train or test split, or the text file `name` as it stands."""
    if Path(name).is_file():
        try:
            return Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read text {name!r} ({error}): give a UTF-8 text file, wikitext2 or stdlib") from error
    if name not in TEXTS:
        raise UserError(f"{name!r} is no text: give a text file, or one of {', '.join(TEXTS)}")
    try:
        return TEXTS[name](split)
    except (OSError, StopIteration, zipfile.BadZipFile) as error:
        raise UserError(f"cannot get {name} from the hub ({type(error).__name__}): give a text file, or stdlib") from error


TEXTS = {"wikitext2": wikitext2, "stdlib": stdlib}


def encode(tokenizer, text):
    """Token ids [tokens] of a whole text, with the special tokens that the tokenizer adds by itself."""
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def load_tokens(tokenizer, name, split, seqlen):
    """Token ids [tokens] of a named text; a text shorter than one block is bad input."""
    ids = encode(tokenizer, load_text(name, split))
    if len(ids) < seqlen:
        raise UserError(f"text {name!r} has {len(ids)} tokens, fewer than one block of {seqlen}: "
                        f"give a longer text or a smaller sequence length")
    return ids


# ---- the command ------------------------------------------------------------------------------

def main():
    parser = Parser(__doc__)
    add_model_flags(parser)
    parser.add("--eval", "text to score: wikitext2, stdlib or a file; its test split")
    parser.add("--seqlen", "tokens a window (default: what the model reads, at most 2048)", type=whole(2))
    parser.add("--stride", "tokens from one window to the next (default: seqlen)", type=whole(1))
    parser.add("--blocks", "score only the first so many windows (default: all)", type=whole(1))
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model, tokenizer = load_model(args.model, device, dtype, revision=args.revision, trust_remote_code=args.trust_remote_code)
    seqlen = args.seqlen or min(longest_input(model) or 2048, 2048)
    if (args.stride or seqlen) > seqlen:
        raise UserError(f"--stride {args.stride} is longer than the window, {seqlen} tokens: it would skip text")
    check_seqlen("--seqlen", seqlen, model)
    data = args.eval or ("stdlib" if args.model == BUNDLED else "wikitext2")
    result = perplexity(model, load_tokens(tokenizer, data, "test", seqlen), seqlen, args.stride, args.blocks, progress=True)
    print(f"perplexity {result.ppl:.4f} ({result.nll:.5f} nats a token; model {args.model}, data {data}, split test, "
          f"seqlen {seqlen}, stride {args.stride or seqlen}, tokens {result.tokens}, dtype {str(dtype).removeprefix('torch.')})")


if __name__ == "__main__":
    run(main)
