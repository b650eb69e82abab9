"""The errors that a user can meet. Each says what happened, what was expected and found, and what to type next.

RapidIndexError            exit code 1
├── UsageError             exit code 2: options that do not fit together or have no meaning
├── DataError              training data or a file of queries that cannot be used
├── ModelError             a model, adapter or tokenizer that cannot be used
├── ResourceError          too little disk or memory, or a device that does not exist
├── StoreError             an index folder that cannot be used
│   ├── NotAnIndex         the folder holds no index
│   ├── ConfigMismatch     the index was built with other options, data or model
│   ├── IndexBusy          another process is writing to it
│   ├── NewerFormat        the index was written by a newer version of rapidindex
│   └── DamagedIndex       a shard is missing, truncated or changed
└── QueryError             a query that cannot be answered
    └── TokenNotFound      --token or --span names nothing in the answer

RapidIndexWarning          a Python warning: it stops nothing
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
    """Training data or a file of queries that cannot be used."""


class ModelError(RapidIndexError):
    """A model, adapter or tokenizer that cannot be used."""


class ResourceError(RapidIndexError):
    """Too little disk or memory, or a device that does not exist."""


class StoreError(RapidIndexError):
    """An index folder that cannot be used."""


class NotAnIndex(StoreError):
    """The folder holds no index."""


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
    """`--token` or `--span` names nothing in the answer."""


class RapidIndexWarning(UserWarning):
    """Options that have a meaning, and may not be meant. The command line shows it as a sentence on stderr."""
