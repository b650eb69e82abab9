"""`ann.json`: how a level's vector index was built, from which shards, and the recall measured. Knows no FAISS."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

from msgspec import Meta

from rapidindex import typed
from rapidindex.errors import DamagedIndex
from rapidindex.search.calibration import Calibration
from rapidindex.store import ANN, Rows, index_of, read_json, write_json
from rapidindex.typed import Count, RowLength

NAME = f"{ANN}.json"


@dataclass(frozen=True)
class IndexMetadata:
    """The content of `ann.json`."""

    requested_factory: str | None
    """The factory that the user chose; None for a choice by size. Its key in the file is `asked`."""
    factory: str
    """`exact`, or a string for FAISS's `index_factory`."""
    dim: RowLength
    """Length of a folded row."""
    K: RowLength
    """Length of a stored row."""
    shards: list[tuple[str, str, Count]]
    """(name, sha256, rows) of each indexed shard, in the order of the rows."""
    live: Count
    """Live rows when the index was built or last updated; more may have been removed since."""
    target_recall: float
    seed: Count
    file: Annotated[str, Meta(pattern=rf"^{ANN}\.[0-9a-f]{{8}}\.faiss\Z")] | None = None
    """The name of FAISS's file in the same folder; None where every search is exact."""
    file_bytes: Count = 0
    file_sha256: str = ""
    faiss: str = ""
    """The version of FAISS that wrote the file."""
    proponents: Calibration | None = None
    """None where recall could not be measured; searches are exact then."""
    opponents: Calibration | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options of `VectorIndex.build` that build the index anew."""
        options = {"dim": self.dim, "target_recall": self.target_recall, "seed": self.seed}
        return {"factory": self.requested_factory, **options}

    @property
    def rows(self) -> int:
        """The number of indexed rows, removed ones included."""
        return sum(rows for _, _, rows in self.shards)

    def calibration(self, largest: bool) -> Calibration | None:
        """Return the calibration for proponents (`largest`) or for opponents."""
        return self.proponents if largest else self.opponents

    def covers(self, rows: Rows) -> bool:
        """Return whether `rows` still start with the indexed shards, so that row numbers agree; more may follow."""
        return rows.K == self.K and rows.shards[: len(self.shards)] == self.shards

    def continues(self, rows: Rows) -> bool:
        """Return whether the indexed shards start with those of `rows`, so that row numbers agree."""
        return rows.K == self.K and self.shards[: len(rows.shards)] == rows.shards

    def stale(self, rows: Rows) -> str | None:
        """Return in words how the index and the stored `rows` differ; None where they agree, or searches are exact."""
        if not self.file or self.shards == rows.shards:
            return None
        if self.covers(rows):
            return f"it lacks the {len(rows) - self.rows:,} newest rows"
        if self.continues(rows):
            return f"it holds {self.rows - len(rows):,} rows more, added since the index was opened"
        return "its rows were replaced by others"

    def describe(self, rows: Rows) -> dict[str, Any]:
        """Return plain data: the metadata without shards and checksum, the number of rows, and whether it is stale."""
        fields = self._as_json()
        del fields["shards"], fields["file_sha256"]
        return {**fields, "rows": self.rows, "stale": self.stale(rows)}

    def verify(self, folder: Path) -> None:
        """Read FAISS's file in `folder` and compare its size and checksum. Raises DamagedIndex."""
        if self.file is None:
            return
        path = folder / self.file
        try:
            size, regular = path.lstat().st_size, path.is_file() and not path.is_symlink()
            if not regular:
                raise self.damaged(folder, "it is not an ordinary file")
            if size != self.file_bytes:
                raise self.damaged(folder, f"it should have {self.file_bytes:,} bytes and has {size:,}")
            with open(path, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError as error:
            raise self.damaged(folder, "it is missing") from error
        except OSError as error:
            raise self.damaged(folder, f"it cannot be read ({error.strerror})") from error
        if sha256 != self.file_sha256:
            raise self.damaged(folder, "it was changed after it was written")

    def damaged(self, folder: Path, reason: str) -> DamagedIndex:
        """Return the error that says why FAISS's file in `folder` cannot be used."""
        return DamagedIndex(f"{folder / str(self.file)} is damaged: {reason}.", hint=rebuild_hint(folder))

    def write(self, folder: Path) -> None:
        """Replace `ann.json` in `folder`. Raises ResourceError or StoreError where it cannot be written."""
        write_json(folder / NAME, self._as_json())

    @classmethod
    def read(cls, folder: Path) -> "IndexMetadata | None":
        """Read `ann.json` in `folder`; None where there is none.

        Raises DamagedIndex where it was changed or has other fields, StoreError where it cannot be read.
        """
        try:
            fields = read_json(folder / NAME)
        except FileNotFoundError:
            return None
        try:
            metadata = typed.fit({"requested_factory": fields.pop("asked"), **fields}, cls, "its content")
            if metadata.K % metadata.dim:
                raise ValueError(f"dim {metadata.dim} does not divide K = {metadata.K}")
            return metadata
        except (KeyError, ValueError) as error:
            message = f"{folder / NAME} is damaged, or another version wrote it: its fields do not match ({error})."
            raise DamagedIndex(message, hint=rebuild_hint(folder)) from error

    def _as_json(self) -> dict[str, Any]:
        fields = asdict(self)
        return {"asked": fields.pop("requested_factory"), **fields}


def rebuild_hint(folder: Path) -> str:
    """Return the command that rebuilds the vector index in a level's `folder`, as a hint."""
    return f"Type `rapidindex index {quote(str(index_of(folder / NAME)))}`."
