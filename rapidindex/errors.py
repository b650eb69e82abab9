"""The errors a user can meet. Each says what happened, what was expected and found, and what to type next.

RapidIndexError            exit code 1
├── UsageError             exit code 2: options that do not fit together or have no meaning
├── DataError              a training or query file that cannot be used
├── ModelError             a model, adapter or tokenizer that cannot be used
├── ResourceError          not enough disk or memory, or no such device
├── StoreError             an index folder that cannot be used
│   ├── NotAnIndex         there is no index there
│   ├── ConfigMismatch     the index was built with other options, data or model
│   ├── IndexBusy          another process is writing to it
│   ├── NewerFormat        written by a newer version of rapidindex
│   └── DamagedIndex       a shard is missing, truncated or changed
└── QueryError             a query that cannot be answered
    └── TokenNotFound      --token names nothing in the answer
"""


class RapidIndexError(Exception):
    """An expected failure: `message` says what happened, `hint` what to do next (may be empty)."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UsageError(RapidIndexError):
    """Options that do not fit together or have no meaning."""

    exit_code = 2


class DataError(RapidIndexError):
    """A training or query file that cannot be used."""


class ModelError(RapidIndexError):
    """A model, adapter or tokenizer that cannot be used."""


class ResourceError(RapidIndexError):
    """Not enough disk or memory, or no such device."""


class StoreError(RapidIndexError):
    """An index folder that cannot be used."""


class NotAnIndex(StoreError):
    """There is no index at that path."""


class ConfigMismatch(StoreError):
    """The index was built with other options, data or model."""


class IndexBusy(StoreError):
    """Another process is writing to the index."""


class NewerFormat(StoreError):
    """The index was written by a newer version of rapidindex."""


class DamagedIndex(StoreError):
    """A shard is missing, truncated or changed."""


class QueryError(RapidIndexError):
    """A query that cannot be answered."""


class TokenNotFound(QueryError):
    """`--token` names nothing in the answer."""
