"""The parts of a run, for people with a loop of their own: see examples/own_loop.py.

Rows become trees (`encode_rows`), trees become packs (`Plan`), a `PackedModel` gives the log-probs
of a pack and its loss (`Objective`), and a `MovingReference` is what it is compared with.
"""

from fasttr.batch import PackedBatch, Tree, TreeSource
from fasttr.data.in_memory import ListTrees
from fasttr.data.load import DataConfig, encode_rows, load_trees
from fasttr.data.unpaired import Unpaired
from fasttr.losses import LossInputs, Objective
from fasttr.models.given import give_back, pack_model
from fasttr.models.load import ModelConfig, load_model, load_tokenizer
from fasttr.models.packed import PackedModel
from fasttr.packing.layout import pack
from fasttr.packing.plan import Plan
from fasttr.reference.logp_table import LogpTable, fill_logps
from fasttr.reference.moving import MovingReference
from fasttr.reference.schedule import Fixed, Hard, Soft

__all__ = [
    "DataConfig",
    "Fixed",
    "Hard",
    "ListTrees",
    "LogpTable",
    "LossInputs",
    "ModelConfig",
    "MovingReference",
    "Objective",
    "PackedBatch",
    "PackedModel",
    "Plan",
    "Soft",
    "Tree",
    "TreeSource",
    "Unpaired",
    "encode_rows",
    "fill_logps",
    "give_back",
    "load_model",
    "load_tokenizer",
    "load_trees",
    "pack",
    "pack_model",
]
