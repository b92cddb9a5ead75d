"""Your own loss on a cache, in a bare PyTorch loop.

    python examples/custom_loss.py --cache demo-output/caches/train --student demo-output/students/untrained

Where the teacher is uncertain, the student learns the teacher's distribution (`distill.sparse_kl`); elsewhere, it
learns the text. A loss with terms of your own is any function of the logits and a row.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

import distill

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--cache", default="demo-output/caches/train", help="[default: %(default)s]")
parser.add_argument("--student", default="demo-output/students/untrained", help="[default: %(default)s]")
parser.add_argument("--output", default="demo-output/examples/custom-loss", help="[default: %(default)s]")
parser.add_argument("--steps", type=int, default=10, help="[default: %(default)s]")
parser.add_argument(
    "--nats", type=float, default=0.5, help="entropy of the teacher above which it is uncertain [default: %(default)s]"
)
given = parser.parse_args()

cache = distill.open_cache(given.cache)
tail = "sampled" if cache.metadata.sampled else "bucket"


def logits_of(model: PreTrainedModel, row) -> Tensor:
    """[T, V]. A row may hold several documents: each is run by itself, so that it does not see the others."""
    documents = torch.tensor(row.input_ids, dtype=torch.long).split(row.segment_lengths.tolist())
    logits = torch.cat([model(input_ids=document[None]).logits[0] for document in documents])
    return logits[:, : cache.metadata.vocab_size]


def loss_of(logits: Tensor, row) -> Tensor:
    """Mean over the loss tokens of a row. Index t is about the prediction made from token t; nothing is shifted."""
    uncertain = row.loss_mask & (row.targets.entropy > given.nats)
    kl = distill.sparse_kl(logits, row.targets, loss_mask=uncertain, tail=tail, reduction="sum")
    labels = torch.tensor(row.label_ids)  # -100 where t is not a loss token
    labels[torch.tensor(uncertain)] = -100
    ce = functional.cross_entropy(logits, labels, reduction="sum")
    return (kl + ce) / max(1, int(row.loss_mask.sum()))


model = AutoModelForCausalLM.from_pretrained(given.student, dtype=torch.float32).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
for step in range(given.steps):
    row = cache[step % len(cache)]
    loss = loss_of(logits_of(model, row), row)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.4f}")
model.save_pretrained(given.output)
print(f"saved {given.output}")
