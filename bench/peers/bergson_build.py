"""bergson: its `build` for one worker, from the loaded model to the index of projected gradients on disk.

Two random matrices a module, 16 × 16 numbers kept of each: 61,440 for the 240 modules of the LoRA, the nearest to
K = 65,536 that such a projection gives.
"""

from collections.abc import Callable

from bergson import GradientProcessor, IndexConfig, collect_gradients
from bergson.utils.worker_utils import setup_model_and_peft
from datasets import Dataset

from bench.peers.measuring import Setting, main

SIDE = 16


def prepare(setting: Setting) -> Callable[[list[list[int]]], None]:
    """Load the model as bergson does, and make its data set of token ids and labels."""
    rows, folder = setting.rows, setting.work / ("model" if setting.full else "adapter")
    config = IndexConfig(
        run_path=str(setting.out / "index"),
        model=str(folder),
        precision="fp32",
        projection_dim=SIDE,
        loss_reduction="mean",
    )
    model, modules = setup_model_and_peft(config)
    labels = [
        [id if counts else -100 for id, counts in zip(ids, wanted, strict=True)]
        for ids, wanted in zip(rows.input_ids, rows.is_response, strict=True)
    ]
    columns = {"input_ids": rows.input_ids, "labels": labels, "length": [len(ids) for ids in rows.input_ids]}
    data = Dataset.from_dict(columns)
    processor = GradientProcessor({}, projection_dim=SIDE)  # keeps the matrices that were drawn

    def collect(batches: list[list[int]]) -> None:
        numbers = [number for batch in batches for number in batch]
        place = {number: row for row, number in enumerate(numbers)}
        config.partial_run_path.mkdir(parents=True, exist_ok=True)
        collect_gradients(
            model,
            data.select(numbers),
            processor,
            config,
            batches=[[place[number] for number in batch] for batch in batches],
            target_modules=modules,
        )

    return collect


if __name__ == "__main__":
    computes = f"gradients of linear modules, projected to {SIDE} × {SIDE} each, float32, written to disk"
    main("bergson build", prepare, {"package": "bergson", "computes": computes, "keeps_rows": True})
