"""The encodings of a cache, by the manifest's `encoding`."""

from __future__ import annotations

from cache_format.codecs.codec import Codec
from cache_format.codecs.columns import ColumnsCodec
from cache_format.codecs.packed.packed_codec import PackedCodec
from cache_format.codecs.packed.streams import FREQUENCIES, PackedStreams
from cache_format.manifest.metadata import CacheMetadata

__all__ = ["FREQUENCIES", "Codec", "PackedStreams", "codec_for"]


def codec_for(metadata: CacheMetadata) -> Codec:
    """The codec of a cache; a packed one is completed by `Codec.with_lexicon`."""
    return PackedCodec(metadata) if metadata.encoding == "packed" else ColumnsCodec(metadata)
