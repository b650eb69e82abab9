"""The caching stage: training examples become stored RapidGrads.

job           the data and model of a build, read and checked, and the work that is left
batches       examples, or single tokens, in batches of like length
moment        the second moment, from a sample of the examples
shard_writer  one process's work: compute, collect, write
units         the units that are left, and what a worker does with one
workers       several processes
actors        the actors of a Ray cluster
build         the whole stage
checkpoints   the index of several checkpoints: a build for each
update        add data to an index, remove examples from it
estimate      what a build takes in time, disk and memory
"""
