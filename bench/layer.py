"""One decoder layer, forward and backward, as its weights and a compiler may have it: time, what it
keeps for the backward, and where its time goes.

    python -m bench layer --archs llama-3-8b,pythia-2.8b --tokens 16384

`fp32`: weights in fp32, products in bf16 on a GPU, eager. `split`: matrices in bf16, residual and
norms in fp32. `bf16`: all of it. `compiled`: split, fused by a compiler; `compiled@0.8` at that
`activation_memory_budget`. The output and the gradient by the layer's input must equal those of the
first mode within the rounding of bf16.

Legend: T packed tokens, D hidden size.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.ablation import twin
from bench.harness import Bars, Benchmark, Case, Contender, add_common_arguments, compare
from bench.lengths import LENGTHS, trees_filling
from bench.profiling import kinds_line, profile_of
from bench.shapes import SHAPES, build
from bench.text import reasons, titled
from bench.timing import peak_bytes_of
from fasttr.batch import PackedBatch
from fasttr.models.compiled import budgeted
from fasttr.models.given import pack_model
from fasttr.models.halves import round_matrices
from fasttr.models.load import ModelConfig
from fasttr.models.packed import PackedModel
from fasttr.packing.layout import pack

IDS = 64  # rows of the embedding, which is not measured
MODES = ("fp32", "split", "bf16", "compiled", "compiled@0.8")
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    parser.add_argument("--archs", default="llama-3-8b,pythia-2.8b" if gpu else "10m")
    parser.add_argument("--tokens", type=int, default=16384 if gpu else 1024)
    parser.add_argument("--lengths", choices=LENGTHS, default="hh")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--compile_backend", default="inductor")
    add_common_arguments(parser, "runs/layer", seconds=4.0)


def cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    for arch in args.archs.split(","):
        facts = {"arch": arch, "lengths": args.lengths}
        yield facts | measure(arch, args, device)


def measure(arch: str, args: argparse.Namespace, device: torch.device) -> Case:
    """All modes of one layer on one pack."""
    shape = SHAPES[arch]._replace(vocabulary=IDS)
    batch = pack(trees_filling(args.lengths, args.tokens, IDS)).to(device)
    layers = Layers(build(shape, device, layers=1), batch, device, args.compile_backend)
    names = args.modes.split(",")
    both = {
        name: Contender(
            call=lambda name=name: layers.ready[name].both(),
            check=lambda name=name: layers.check(name),
        )
        for name in names
    }
    found = compare(both, device, seconds=args.seconds / 2)
    forward = {name: Contender(layers.ready[name].forward) for name in found.times}
    forward_times = compare(forward, device, seconds=args.seconds / 2).times
    rows = {}
    for name, times in found.times.items():
        began = forward_times[name].median
        rows[name] = {
            **times.as_dict(),
            "forward_s": began,
            "backward_s": times.median - began,
            **layers.ready[name].facts(device),
        }
    tokens = len(batch.input_ids)
    return {
        "tokens": tokens,
        "segments": len(batch.attention.cu_q) - 1,
        "hidden_size": shape.hidden,
        "product_flop": 6 * shape.layer_weights * tokens,
        "device": str(device),
        "modes": rows,
        **found.reasons(),
    }


class Call(NamedTuple):
    """A layer with what its model hands it for a pack."""

    layer: Callable[..., Any]
    model: PackedModel
    hidden: Tensor  # (1, T, D), a leaf
    kwargs: dict[str, Any]
    upstream: Tensor  # (1, T, D)

    def forward(self) -> Tensor:
        with self.model.autocast():
            out = self.layer(self.hidden, **self.kwargs)
        return out if isinstance(out, Tensor) else out[0]

    def both(self) -> Tensor:
        """Forward and backward; the gradients of the last call stay."""
        self.hidden.grad = None
        self.model.zero_grad(set_to_none=True)
        out = self.forward()
        out.backward(self.upstream)
        return out.detach()

    def facts(self, device: torch.device) -> dict[str, Any]:
        tokens, dim = self.hidden.shape[1:]
        kept = self.kept_bytes()
        ran = profile_of(self.both, device)
        return {
            "kept_bytes": kept,
            "kept_in_D_bytes_a_token": kept / tokens / dim,
            "peak_bytes": peak_bytes_of(self.both, device),
            "forward_kernels": len(profile_of(self.forward, device).kernels),
            "kernels": len(ran.kernels),
            "kinds": ran.kinds(),
            "top": ran.top(),
        }

    def kept_bytes(self) -> int:
        """Bytes of activations that the forward leaves for the backward; casts of weights, which
        have no row a token, are not among them."""
        tokens = self.hidden.shape[1]
        found: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            if tokens in x.shape:
                found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            self.forward()
        found.pop(self.hidden.untyped_storage().data_ptr(), None)
        return sum(found.values())


class Layers:
    """The modes of one layer over the same weights."""

    def __init__(self, model: Any, batch: PackedBatch, device: torch.device, backend: str):
        self.plain = model
        self.batch = batch
        self.device = device
        self.backend = backend
        self.ready: dict[str, Call] = {}
        self._expected: tuple[Tensor, Tensor] | None = None

    def check(self, name: str) -> str:
        """Empty, or how far output and gradient lie from the first mode's."""
        self.ready[name] = self._made(name)
        out = self.ready[name].both().float()
        d_hidden = self.ready[name].hidden.grad
        assert d_hidden is not None
        found = (out, d_hidden.float())
        if self._expected is None:
            self._expected = found
            return ""
        in_bf16 = self.device.type == "cuda" or name != "fp32"
        allowed = ALLOWED[torch.bfloat16 if in_bf16 else torch.float32]
        off = max(_relative(a, b) for a, b in zip(found, self._expected, strict=True))
        return "" if off <= allowed else f"off by {off:.1e} from the first mode's, {allowed:.0e}"

    def _made(self, name: str) -> Call:
        mode, _, budget = name.partition("@")
        makers = {"fp32": self.fp32, "split": self.split, "bf16": self.bf16}
        if mode == "compiled":
            return self.compiled(float(budget or 1))
        if mode not in makers:
            raise ValueError(f"got {name}; wanted some of {', '.join(MODES)}")
        return makers[mode]()

    def fp32(self) -> Call:
        return self._call(self._packed(bf16=self.device.type == "cuda"))

    def split(self) -> Call:
        model = self._packed(bf16=True, copied=True)
        round_matrices(model.model)
        return self._call(model)

    def bf16(self) -> Call:
        model = self._packed(bf16=True, copied=True)
        model.to(torch.bfloat16)
        return self._call(model)

    def compiled(self, budget: float) -> Call:
        call = self.split()
        backend = budgeted(self.backend, budget)
        compiled = torch.compile(call.layer, backend=backend, dynamic=True, fullgraph=True)
        return call._replace(layer=compiled)

    def _packed(self, *, bf16: bool, copied: bool = False) -> PackedModel:
        model = copy.deepcopy(self.plain) if copied else twin(self.plain)
        config = ModelConfig(name="the layer", device=self.device, bf16=bf16)
        return pack_model(model, config)

    @torch.no_grad()
    def _call(self, model: PackedModel) -> Call:
        """The layer with the arguments that its model gives it."""
        layer = model.model.base_model.layers[0]
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hook = layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        with model.autocast():
            model.hidden_states(self.batch)
        hook.remove()
        args, kwargs = seen[0]
        hidden = args[0] if args else kwargs.pop("hidden_states")
        make = torch.Generator(self.device).manual_seed(3)
        upstream = torch.randn(hidden.shape, generator=make, device=self.device)
        leaf = hidden.detach().clone().requires_grad_()
        return Call(layer, model, leaf, dict(kwargs), upstream.to(leaf.dtype))


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


COLUMNS = (
    "layer",
    "forward, ms",
    "backward, ms",
    "kernels, f and b",
    "kept, D bytes a token",
    "TFLOP/s",
    "time by kind",
)


def table(case: Case) -> str:
    rows = []
    for name, row in case["modes"].items():
        backward = row["kernels"] - row["forward_kernels"]
        rows.append(
            [
                name,
                f"{row['forward_s'] * 1e3:.2f}",
                f"{row['backward_s'] * 1e3:.2f}",
                f"{row['forward_kernels']} + {backward}",
                f"{row['kept_in_D_bytes_a_token']:.1f}",
                f"{case['product_flop'] / row['median_s'] / 1e12:.3g}",
                kinds_line(row["kinds"]),
            ]
        )
    title = (
        f"one layer of {case['arch']}, {case['tokens']:,} tokens in {case['segments']} segments "
        f"({case['lengths']})"
    )
    return titled(title, COLUMNS, rows + reasons(case, len(COLUMNS)))


BENCHMARK = Benchmark(
    name="layer",
    title="One decoder layer",
    cases=cases,
    table=table,
    bars=Bars("modes", "median_s", "seconds, forward and backward"),
)
