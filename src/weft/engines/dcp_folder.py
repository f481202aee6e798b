"""A folder written by torch's distributed checkpoints, read tensor by tensor in one process."""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from weft.engines.shards import Part, Reading
from weft.errors import ModelError

PICKLED = ".metadata"  # DCP's own index, a pickle


class DcpFolder:
    """Tensors of a DCP folder by name. shapes: of each, and its dtype. left_out: entries that are no tensors."""

    def __init__(self, folder: Path, allow_pickle: bool = False) -> None:
        """Raises ModelError for a folder whose index may run code, unless that was allowed."""
        pickled = (folder / PICKLED).is_file()
        if pickled and not allow_pickle:
            raise ModelError(
                f"{folder}: its index, {PICKLED}, is a pickle, which can run any code when it is read. If you trust "
                "whoever wrote it, say --allow-pickle."
            )
        self.reader = FileSystemReader(folder) if pickled else HuggingFaceStorageReader(str(folder))
        self.metadata = self.reader.read_metadata()
        self.reader.set_up_storage_reader(self.metadata, True)
        entries = self.metadata.state_dict_metadata
        self.shapes = {
            name: (tuple(entry.size), entry.properties.dtype)
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.left_out = sorted(entries.keys() - self.shapes.keys())

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        shape, dtype = self.shapes[name]
        tensor = torch.empty(shape, dtype=dtype)
        planner = Reading({name: Part(tensor, (0,) * len(shape), shape)})
        planner.set_up_planner({}, self.metadata, True)
        plan = self.reader.prepare_local_plan(planner.create_local_plan())
        (plan,) = self.reader.prepare_global_plan([plan])
        self.reader.read_data(planner.finish_plan(plan), planner).wait()
        return tensor
