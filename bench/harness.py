"""The same text scored twice: by the EleutherAI evaluation harness (`pip install lm_eval`) and by eval_ppl.py.

    python bench/harness.py --model out/FOLDER                       # a compressed folder, or any other model

The harness's rolling log-likelihood scores every token once, in windows of L tokens that begin with one token of context;
that is eval_ppl.py's sliding window of L + 1 tokens with stride L, over the text with the harness's prefix token before it.
"""
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import UserError
from common.cli import BUNDLED, Parser, add_model_flags, load_model, pick_device, pick_dtype, run, whole
from eval_ppl import encode, load_text, perplexity


def main():
    parser = Parser(__doc__)
    add_model_flags(parser)
    parser.add("--eval", "text to score: wikitext2, stdlib or a file; its test split")
    parser.add("--seqlen", "tokens a window", type=whole(8), default=128)
    parser.add("--blocks", "windows to score", type=whole(1), default=16)
    args = parser.parse_args()
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(f"the harness is not installed ({error}): pip install lm_eval") from error
    device = pick_device(args.device)
    model, tokenizer = load_model(args.model, device, pick_dtype(args.dtype, device), revision=args.revision,
                                  trust_remote_code=args.trust_remote_code)
    text = load_text(args.eval or ("stdlib" if args.model == BUNDLED else "wikitext2"), "test")
    words = text.split(" ")
    while len(ids := encode(tokenizer, " ".join(words))) > args.seqlen * args.blocks:
        words = words[:int(len(words) * min(args.seqlen * args.blocks / len(ids), 0.99))]
    text, whole_windows = " ".join(words), len(ids) // args.seqlen * args.seqlen
    harness = HFLM(pretrained=model, tokenizer=tokenizer, max_length=args.seqlen, batch_size=1, device=str(device))
    instance = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
    theirs = -harness.loglikelihood_rolling([instance], disable_tqdm=True)[0] / len(ids)
    prefix = torch.tensor([harness.prefix_token_id])
    scored = perplexity(model, torch.cat([prefix, ids[:whole_windows]]), args.seqlen + 1, args.seqlen)
    rest = len(ids) - whole_windows                           # the harness scores the last tokens too, with a whole window of context
    nats = scored.nll * scored.tokens
    if rest:
        window = ids[-args.seqlen - 1:][None].to(device)
        with torch.no_grad():
            logs = model(input_ids=window, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        nats -= logs[torch.arange(args.seqlen), window[0, 1:].to(logs.device)][-rest:].sum().item()
    ours = nats / len(ids)
    print(f"{len(ids)} tokens: harness {theirs:.6f} nats a token (perplexity {math.exp(theirs):.4f}), eval_ppl.py {ours:.6f} "
          f"({math.exp(ours):.4f}), relative difference {abs(theirs / ours - 1):.1e}")


if __name__ == "__main__":
    run(main)
