"""Read a cache with numpy or with SQL, without torch and transformers.

    python examples/read_without_torch.py --cache demo-output/caches/train

`cache_format` reads every cache, also from object stores. The shards of the encoding `columns` are plain Arrow files,
which duckdb, polars, pandas and others read by themselves (cache_format/SPEC.md).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

import cache_format as cf

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--cache", default="demo-output/caches/train", help="[default: %(default)s]")
given = parser.parse_args()

# Row by row: numpy arrays, where index t is about the prediction made from token t.
cache = cf.open_cache(given.cache)
row = cache[0]
t = int(row.loss_mask.argmax())
ids, logprobs = row.targets.at(t)
print(f"{cache.num_rows:,} rows, {cache.num_tokens:,} tokens, made by {cache.metadata.teacher['name']}")
exact = row.targets.exact_counts[t]  # then sampled entries, with their weights in place of probabilities
entries = [
    f"{token} {np.exp(value):.3f}{'' if i < exact else ' (sampled)'}"
    for i, (token, value) in enumerate(zip(ids, logprobs, strict=True))
]
print(f"after token {row.input_ids[t]}: {', '.join(entries[:4])}")

# Whole record batches as flat arrays, for statistics over all tokens.
entropy = np.concatenate([batch.entropy[batch.loss_mask] for batch in cache.iter_record_batches()])
shares = np.histogram(entropy, [0, 0.1, 1, 2, 4, np.inf])[0] / max(1, len(entropy))
print("teacher entropy, share of loss tokens in [0, 0.1, 1, 2, 4, ∞) nats:", shares.round(3).tolist())

# SQL over the Arrow files.
if cache.metadata.encoding == "columns":
    shards = pa.concat_tables(pa.ipc.open_file(file).read_all() for file in Path(given.cache).glob("shards/*.arrow"))
    query = "select row, len(input_ids) as tokens, list_avg(entropy) as nats from shards order by nats desc limit 3"
    for number, tokens, nats in duckdb.sql(query).fetchall():
        print(f"row {number}: {tokens} tokens, mean entropy {nats:.3f} nats")

assert "torch" not in sys.modules
