"""The files of an index: HDF5 shards, a manifest, and their integrity. Knows bytes, not models.

The other rooms import from here only.

    container   the format of a sealed file, and how it is read
    writing     files that appear whole or not at all; how a sealed file is written
    folder      the names of the files, JSON files with a checksum, the lock
    shards      the content of a shard; how rows are quantized
    manifest    the content of the manifest
    rows        the rows of a level, through all its shards
    store       the index folder as a whole
    several     a folder of indexes, one for each checkpoint of a training
    sizes       the disk space that an index will take
    check       reads every byte, reports damage, and repairs it
"""

from rapidindex.store.check import Problem, check
from rapidindex.store.container import damaged, index_of
from rapidindex.store.folder import ANN, GRADIENTS, MOMENT, read_json, write_json
from rapidindex.store.rows import Rows
from rapidindex.store.several import Checkpoints, checkpoints_at, indexes_at
from rapidindex.store.shards import ROW_TYPE, ShardContent, decode_rows, encode_rows, row_bytes
from rapidindex.store.sizes import disk_bytes
from rapidindex.store.store import Store
from rapidindex.store.writing import NO_ROOM, atomic_file, encode_json, replace_file

__all__ = [
    "ANN",
    "GRADIENTS",
    "MOMENT",
    "NO_ROOM",
    "ROW_TYPE",
    "Checkpoints",
    "Problem",
    "Rows",
    "ShardContent",
    "Store",
    "atomic_file",
    "check",
    "checkpoints_at",
    "damaged",
    "decode_rows",
    "disk_bytes",
    "encode_json",
    "encode_rows",
    "index_of",
    "indexes_at",
    "read_json",
    "replace_file",
    "row_bytes",
    "write_json",
]
