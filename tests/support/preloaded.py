"""What commands import: loaded once, by the server that `command` forks processes from."""

import gc
import importlib

import dask
from distributed.utils import get_mp_context

MODULES = (
    "cli",
    "faiss",
    "pipeline.cluster",
    "pipeline.job",
    "pipeline.phantom.files",
    "pipeline.preview",
    "pipeline.stages.discover",
    "pipeline.stages.embed",
    "pipeline.stages.near_duplicates",
    "pipeline.stages.placing",
    "scipy.sparse.csgraph",
    "store.report",
    "store.verification",
    "tests.support.command",
    "torch._dynamo",  # with the first optimiser
    "torch.utils.tensorboard",
    "trainer.export",
    "trainer.loop",
    "trainer.nets",
)

for name in MODULES:
    importlib.import_module(name)
dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})
get_mp_context()  # loads what Dask would load into a server of its own
gc.freeze()  # collecting garbage in a forked process would copy all this
