"""Stage one: a teacher and a text become a cache.

    corpus (text ─▶ documents) ─▶ packing (documents ─▶ rows) ─▶ capture (rows ─▶ hidden states ─▶ targets ─▶ shards)

Never imports `pipeline.student`: what stage two knows of a teacher is what the cache says.
"""
