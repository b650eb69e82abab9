"""The files of an index: HDF5 shards, a manifest, and their integrity. Knows bytes, not models.

container one file that checks itself              writing   how it is written
shards    what a shard holds                       rows      a level's rows through all its shards
folder    names, JSON files, the lock              manifest  what the manifest says
store     the folder as a whole                    check     reads every byte, and repairs
"""

from rapidindex.store.check import Problem, check
from rapidindex.store.rows import Rows
from rapidindex.store.shards import decode_rows, encode_rows
from rapidindex.store.store import Store

__all__ = ["Problem", "Rows", "Store", "check", "decode_rows", "encode_rows"]
