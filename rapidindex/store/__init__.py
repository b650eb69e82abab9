"""The files of an index: HDF5 shards, a manifest, and their integrity. Knows bytes, not models.

container one file that checks itself              writing   how it is written
shards    what a shard holds                       rows      a level's rows through all its shards
folder    names, JSON files, the lock              manifest  what the manifest says
store     the folder as a whole                    check     reads every byte, and repairs
"""

from rapidindex.store.check import Problem, check
from rapidindex.store.container import USER_BLOCK, damaged, index_of
from rapidindex.store.folder import ANN, MOMENT, read_json, write_json
from rapidindex.store.rows import Rows
from rapidindex.store.shards import ROW_TYPE, ShardContent, decode_rows, encode_rows, row_bytes
from rapidindex.store.sizes import disk_bytes
from rapidindex.store.store import Store
from rapidindex.store.writing import atomic_file, encode_json, replace_file

__all__ = [
    "ANN",
    "MOMENT",
    "ROW_TYPE",
    "USER_BLOCK",
    "Problem",
    "Rows",
    "ShardContent",
    "Store",
    "atomic_file",
    "check",
    "damaged",
    "decode_rows",
    "disk_bytes",
    "encode_json",
    "encode_rows",
    "index_of",
    "read_json",
    "replace_file",
    "row_bytes",
    "write_json",
]
