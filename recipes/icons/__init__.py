"""The recipe of the shipped model's data: fetch the packages, build one table of icons, draw captioned shards."""
