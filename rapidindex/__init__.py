"""Which training examples, and which words in them, made the language model say that?

from rapidindex import BuildRequest, Index, build

build(BuildRequest(data=dataset, output="my-index", model=trainer.model, tokenizer=tokenizer))
index = Index.open("my-index", model=trainer.model, tokenizer=tokenizer)
result = index.query("What are the origins of yoga?", token="Japan", k=10)
"""

from importlib import import_module
from typing import Any

_HOME = {
    "build": "caching.build",
    "add": "caching.update",
    "remove": "caching.update",
    "finetune": "model.finetune",
    "distill": "query.anchors",
    "check": "search.check",
    "specialize": "query.specialize",
    "verify": "evaluate.verify",
    "Index": "query.index",
    "Query": "query.questions",
    "QueryOptions": "config",
    "SpecializeOptions": "config",
    "Result": "results",
    "Match": "results",
    "Verification": "results",
    "BuildRequest": "config",
    "ModelConfig": "config",
    "FinetuneConfig": "config",
    "DistillConfig": "config",
    "EncoderConfig": "config",
    "VerifyOptions": "config",
    "RapidIndexError": "errors",
}
"""The module of each public name: modules are imported when a name is first used, because torch takes seconds."""

__all__ = [
    "BuildRequest",
    "DistillConfig",
    "EncoderConfig",
    "FinetuneConfig",
    "Index",
    "Match",
    "ModelConfig",
    "Query",
    "QueryOptions",
    "RapidIndexError",
    "Result",
    "SpecializeOptions",
    "Verification",
    "VerifyOptions",
    "add",
    "build",
    "check",
    "distill",
    "finetune",
    "remove",
    "specialize",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rapidindex' has no attribute {name!r}")
    return getattr(import_module(f"rapidindex.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
