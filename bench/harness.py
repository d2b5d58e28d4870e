"""Zero-shot accuracies by the EleutherAI harness (`pip install lm_eval`), and a text that it scores as we do.

    python bench/harness.py --model out/FOLDER                                   # compressed or dense
    python bench/harness.py --model out/FOLDER --tasks next_passage              # an accuracy, offline
    python bench/harness.py --model out/FOLDER --tasks arc_easy hellaswag piqa   # accuracies; need the hub

The harness brings no multiple-choice task that works without a download; `next_passage` is made here, of a
text with a paragraph a line. Without --tasks the text is scored twice, by the harness and by eval_ppl.py. The
harness scores every token once, in windows of 128 tokens after one token of context: eval_ppl.py's sliding
window of 129 tokens with stride 128, over the text after the harness's prefix token.
"""
import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval_ppl

LENGTH = 128


def next_passage(text, words=24, most=400):
    """A task of the harness: after the first words of a paragraph, which of four passages follows? The others
    follow in the next three paragraphs, so that all four are about the same. Chance is 0.25."""
    from datasets import Dataset
    lines = [line.split(" ") for line in text.splitlines()]
    parts = [[" ".join(line[at:at + words]) for at in (0, words)] for line in lines if len(line) >= 2 * words]
    documents = []
    for i, (query, _) in enumerate(parts[:-3][:most]):
        choices = [after for _, after in parts[i:i + 4]]
        choices[0], choices[i % 4] = choices[i % 4], choices[0]       # the true one stands at i % 4
        documents.append({"query": query, "choices": choices, "gold": i % 4})
    if not documents:
        raise eval_ppl.UserError(f"next_passage needs lines of {2 * words} words: give another text, --eval")
    return {"task": "next_passage", "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "query",
            "doc_to_choice": "choices", "doc_to_target": "gold", "metric_list": [{"metric": "acc"}]}


def main():
    parser = eval_ppl.Parser(__doc__)
    eval_ppl.add_model_flags(parser)
    parser.add_argument("--eval", help="text, its test split (default: what the folder was scored on)")
    parser.add_argument("--tasks", nargs="+", help="tasks of the harness, or next_passage")
    args = parser.parse_args()
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    model, tokenizer = eval_ppl.load_named(args)
    metrics = Path(args.model, "metrics.json")
    data = args.eval or eval_ppl.default_text(args.model)
    if metrics.is_file() and not args.eval:
        data = json.loads(metrics.read_text())["eval"]["data"]
    text = eval_ppl.load_text(data, "test") if not args.tasks or "next_passage" in args.tasks else ""
    if args.tasks:
        tasks = [next_passage(text) if task == "next_passage" else task for task in args.tasks]
        found = simple_evaluate(HFLM(model, tokenizer=tokenizer), tasks=tasks)["results"]
        return print(json.dumps(found, indent=1))
    words = text.split(" ")[:2000]
    while len(ids := eval_ppl.encode(tokenizer, " ".join(words))) % LENGTH:      # until it is whole windows
        words.pop()
    whole = Instance("loglikelihood_rolling", {}, (" ".join(words),), 0)
    harness = HFLM(model, tokenizer=tokenizer, max_length=LENGTH)
    theirs = -harness.loglikelihood_rolling([whole], disable_tqdm=True)[0] / len(ids)
    ids = torch.cat([torch.tensor([harness.prefix_token_id]), ids])
    ours = eval_ppl.perplexity(model, ids, LENGTH + 1, LENGTH).nll
    print(f"{data}, {len(ids) - 1} tokens: perplexity {math.exp(theirs):.5f} by the harness, "
          f"{math.exp(ours):.5f} by eval_ppl.py; relative difference of nats {abs(theirs / ours - 1):.1e}")


if __name__ == "__main__":
    eval_ppl.run(main, ImportError)
