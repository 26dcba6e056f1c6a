"""Image-text data: shards, the reader with resumable order, the small sample set."""

from onestill.data.shards import ReaderState, Sample, ShardReader, ShardWriter, find_shards, sample_shards

__all__ = ["ReaderState", "Sample", "ShardReader", "ShardWriter", "find_shards", "sample_shards"]
