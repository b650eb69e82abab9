"""dattri-llm: gradients captured by its hooks and offloaded to its store on disk, LoGRA-projected or as they are.

    python -m bench.peers.dattri_store --style logra|whole ...

LoGRA projects both factors of a layer's gradient to 16: 61,440 numbers for the 240 modules of the LoRA. `whole` keeps
every entry. Its `invasive_linear_io` hooks are meant for capture alone: they skip the summed weight gradients.
"""

import sys
from collections.abc import Callable

from dattri_llm import REGISTER_ALL, GradientStorageManager, HookManager, HookManagerConfig, OffloadCallback

from bench.peers.measuring import Setting, losses, main

SIDE = 16
PROJECTION = {"style": "logra", "proj_dim": SIDE, "proj_max_batch_size": 8, "proj_type": "rademacher"}


def preparing(style: str) -> Callable:
    """Return the function that prepares the capture of one style."""

    def prepare(setting: Setting) -> Callable[[list[list[int]]], None]:
        model = setting.model()
        projection = {"projection_kwargs": {"__default__": PROJECTION}} if style == "logra" else {}
        config = HookManagerConfig(invasive_linear_io=REGISTER_ALL, capture_style="materialized", **projection)
        manager = HookManager(model, config=config)

        def collect(batches: list[list[int]]) -> None:
            store = GradientStorageManager(str(setting.out))
            callback = OffloadCallback(offload_interval=1, file_manager=store, recording_type="per_batch")
            manager._callbacks = [callback]
            with manager.collect():
                for batch in batches:
                    losses(model, *setting.rows.padded(batch)).sum().backward()
                    model.zero_grad(set_to_none=True)

        return collect

    return prepare


if __name__ == "__main__":
    style = sys.argv.pop(sys.argv.index("--style") + 1)
    sys.argv.remove("--style")
    kept = f"projected to {SIDE} × {SIDE} each" if style == "logra" else "every entry"
    computes = f"gradients of linear modules, {kept}, float32, written to disk"
    main(f"dattri-llm, {style}", preparing(style), {"package": "dattri-llm", "computes": computes, "keeps_rows": True})
