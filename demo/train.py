"""How the bundled model and its two texts were made: a GPT-2 of 1.9 million parameters.

    python demo/train.py FOLDER       # on Python 3.11; about half an hour on two cores

It writes train.txt and test.txt, the help topics and docstrings of the standard library, of which one
document in ten is held out for the test; then the model and its tokenizer. The model also learned
from comments of the library's modules and from its tests, those of held-out modules excepted. It
prints, on the same held-out tokens, the perplexity of an interpolated trigram model (Kneser-Ney
discounting) of the same training text beside the model's own.
"""
import argparse
import ast
import collections
import functools
import io
import math
import sys
import sysconfig
import tokenize
import zlib
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from eval_ppl import perplexity

VOCAB, SEQLEN, BATCH, MUON_LR, ADAM_LR = 2048, 256, 16, 0.02, 5e-3


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


def comments(source):
    """The comments of a Python source, one text for each run of lines that are nothing else."""
    texts, last = [], -2
    try:
        for token in tokenize.tokenize(io.BytesIO(source).readline):
            if token.type == tokenize.COMMENT:
                words = token.string.lstrip("#! ")
                if token.start[0] == last + 1 and texts:
                    texts[-1] += "\n" + words
                else:
                    texts.append(words)
                last = token.start[0]
    except (tokenize.TokenError, SyntaxError, UnicodeDecodeError):
        pass                         # the library's tests hold files that are broken on purpose
    return [text for text in texts if len(text) > 40]


def more_text():
    """Comments of the standard library and docstrings of its tests, without a word of what `stdlib` holds."""
    root, known, texts = Path(sysconfig.get_paths()["stdlib"]), stdlib_documents(), {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or is_held_out(name):
            continue
        source = path.read_bytes()
        texts |= dict.fromkeys(comments(source))
        if name not in known:
            try:
                texts |= dict.fromkeys(docstrings(source))
            except (SyntaxError, ValueError):
                pass
    own = {text for document in known.values() for text in document}
    return "\n\n".join(text for text in texts if text not in own)


def train_tokenizer(text):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(text.split("\n\n"), trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def trigram_perplexity(train, test, seqlen, discount=0.75):
    """Interpolated Kneser-Ney trigram, scored on the blocks and positions that the model is scored on."""
    trigrams = collections.Counter(zip(train, train[1:], train[2:]))
    bigrams = collections.Counter((b, c) for _, b, c in trigrams)         # continuation counts, from here
    unigrams = collections.Counter(c for _, c in bigrams)

    def totals(counts):
        total, kinds = collections.Counter(), collections.Counter()
        for gram, count in counts.items():
            total[gram[:-1]] += count
            kinds[gram[:-1]] += 1
        return total, kinds

    (total3, kinds3), (total2, kinds2), total1 = totals(trigrams), totals(bigrams), sum(unigrams.values())

    def probability(a, b, c):
        p = (unigrams[c] + 1) / (total1 + VOCAB)
        if total2[b,]:
            p = (max(bigrams[b, c] - discount, 0) + discount * kinds2[b,] * p) / total2[b,]
        if total3[a, b]:
            p = (max(trigrams[a, b, c] - discount, 0) + discount * kinds3[a, b] * p) / total3[a, b]
        return p

    nats = [-math.log(probability(*(test[i - 2:i + 1] if i > 1 else [-1] + test[i - 1:i + 1])))
            for i in range(1, len(test) // seqlen * seqlen) if i % seqlen]
    return math.exp(sum(nats) / len(nats))


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    if Path(args.folder).exists():
        parser.error(f"{args.folder} is there already: give a new folder")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(stdlib("train"))
    Path(args.folder).mkdir()
    for split in ("train", "test"):
        Path(args.folder, f"{split}.txt").write_text(stdlib(split), encoding="utf-8")
    texts = stdlib("train") + "\n\n" + more_text(), stdlib("test")
    train, test = (tokenizer(text, return_tensors="pt").input_ids[0] for text in texts)
    config = GPT2Config(vocab_size=VOCAB, n_positions=SEQLEN, n_embd=160, n_layer=5, n_head=5,
                        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {len(train):,} train tokens, {len(test):,} test")
    print(f"trigram perplexity {trigram_perplexity(train.tolist(), test.tolist(), SEQLEN):.2f}")
    blocks = [p for p in model.transformer.h.parameters() if p.ndim == 2]   # Muon's; AdamW has the rest
    others = [p for p in model.parameters() if not any(p is q for q in blocks)]
    optimizers = [torch.optim.Muon(blocks, lr=MUON_LR, weight_decay=0.1),
                  torch.optim.AdamW(others, lr=ADAM_LR, weight_decay=0.0)]
    rate = lambda step: min((step + 1) / 100, 1 - step / args.steps)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    progress = tqdm(range(args.steps), mininterval=10)
    for step in progress:
        starts = torch.randint(len(train) - SEQLEN, (BATCH,)).tolist()
        ids = torch.stack([train[start:start + SEQLEN] for start in starts])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepped in optimizers + schedules:
            stepped.step()
        if step % 500 == 0 or step == args.steps - 1:
            held_out = perplexity(model, test, SEQLEN)[0]
            progress.write(f"step {step}: loss {loss.item():.3f}, held-out perplexity {held_out:.2f}")
    model.half().save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)


if __name__ == "__main__":
    main()
