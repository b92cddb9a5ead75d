"""The JSON files of a cache and the files beside the shards: manifest, head, answers, card."""
