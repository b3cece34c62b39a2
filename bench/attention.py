"""Attention over packed trees, forward and backward: the back ends beside each other, and what the
gather of keys and values costs.

    python -m bench attention --lengths hh,ultrafeedback --heads 32/8x128,32/32x80

Every one is held to fp32 attention, segment by segment. `without sharing` packs every completion
with a prompt of its own; `padded` is a right-padded batch of them, as trainers without packing have
it. Both compute more tokens, and are compared by time for the same pairs.

Legend: T packed rows, H heads, Hkv heads of keys and values, Dh head width.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fasttr_kernels.gather import gather_keys, sum_over_readers
from torch import Tensor

from bench.harness import Bars, Benchmark, Case, Contender, add_common_arguments, compare
from bench.lengths import trees_filling
from bench.text import by_median, reasons, spread, titled
from fasttr.batch import AttentionLayout, Tree
from fasttr.models.attention import packed_attention
from fasttr.packing.layout import pack
from fasttr.packing.tiers import unshared

IDS = 64  # different tokens, of which attention reads none
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative error, outputs and gradients
Attend = Callable[["Inputs"], Tensor]


class Heads(NamedTuple):
    queries: int
    keys: int
    width: int

    @classmethod
    def of(cls, text: str) -> Heads:
        """From `32/8x128`."""
        counts, _, width = text.partition("x")
        queries, _, keys = counts.partition("/")
        return cls(int(queries), int(keys), int(width))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    parser.add_argument("--lengths", default="hh,ultrafeedback" if gpu else "hh")
    parser.add_argument("--heads", default="32/8x128,32/32x80" if gpu else "4/4x64")
    parser.add_argument("--tokens", type=int, default=16384 if gpu else 1024)
    add_common_arguments(parser, "runs/attention", seconds=3.0)


def cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    for lengths in args.lengths.split(","):
        for heads in args.heads.split(","):
            facts = {"lengths": lengths, "heads": heads}
            yield facts | measure(lengths, Heads.of(heads), args.tokens, device, args.seconds)


class Inputs(NamedTuple):
    """Leaves of one layer's attention over a pack, and the layout."""

    query: Tensor  # (1, H, T, Dh)
    key: Tensor  # (1, Hkv, T, Dh)
    value: Tensor  # (1, Hkv, T, Dh)
    layout: AttentionLayout
    upstream: Tensor  # (1, T, H, Dh)

    @classmethod
    def of(
        cls, trees: Sequence[Tree], heads: Heads, device: torch.device, dtype: torch.dtype
    ) -> Inputs:
        batch = pack(trees).to(device)
        tokens = len(batch.input_ids)
        make = torch.Generator(device).manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=make, device=device).to(dtype)

        return cls(
            query=drawn(1, heads.queries, tokens, heads.width).requires_grad_(),
            key=drawn(1, heads.keys, tokens, heads.width).requires_grad_(),
            value=drawn(1, heads.keys, tokens, heads.width).requires_grad_(),
            layout=batch.attention,
            upstream=drawn(1, tokens, heads.queries, heads.width),
        )

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    def both(self, attend: Attend) -> list[Tensor]:
        """Forward and backward: the output and three gradients."""
        out = attend(self)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, self.upstream)]

    def in_fp32(self) -> Inputs:
        query, key, value = (x.detach().float().requires_grad_() for x in self.leaves)
        return Inputs(query, key, value, self.layout, self.upstream.float())

    @property
    def attended(self) -> int:
        """Pairs of a query with a key that it sees."""
        lengths = zip(*self.layout.lengths(), strict=True)
        return sum(q * k - q * (q - 1) // 2 for q, k in lengths)


def measure(lengths: str, heads: Heads, tokens: int, device: torch.device, seconds: float) -> Case:
    """All back ends on the pairs of one pack."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    trees = trees_filling(lengths, tokens, IDS)
    inputs = Inputs.of(trees, heads, device, dtype)
    alone = Inputs.of([unshared(tree) for tree in trees], heads, device, dtype)
    contenders = {}
    for name, provider in PROVIDERS.items():
        of_provider = inputs if provider.shares_prompts else alone
        contenders[name] = Contender(
            call=lambda x=of_provider, attend=provider.attend: x.both(attend),
            check=lambda x=of_provider, attend=provider.attend: _wrong(x, attend),
            absent=provider.absent(device),
        )
    gathers = {"the gather alone": lambda: gather(inputs)}
    found = compare(contenders, device, seconds=seconds, yardsticks=gathers)
    gathering = found.times.pop("the gather alone")
    operations = 12 * inputs.attended * heads.queries * heads.width
    return {
        "tokens": inputs.query.shape[2],
        "pairs": len(trees),
        "device": str(device),
        "gather": gathering.as_dict(),
        "flop": operations,
        "providers": {
            name: {**times.as_dict(), "tflops": operations / times.median / 1e12}
            for name, times in found.times.items()
        },
        **found.reasons(),
    }


def _wrong(inputs: Inputs, attend: Attend) -> str:
    """Empty, or how far outputs and gradients lie from fp32's."""
    expected = inputs.in_fp32().both(_segments)
    found = inputs.both(attend)
    off = max(
        float((a.float() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)
    )
    allowed = ALLOWED[inputs.query.dtype]
    return "" if off <= allowed else f"off by {off:.1e} from fp32, allowed {allowed:.0e}"


@torch.no_grad()
def gather(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Keys and values into the order of the segments, and their gradients back."""
    sources, offsets, readers = inputs.layout.keys
    key, value = (leaf[0].transpose(0, 1) for leaf in (inputs.key, inputs.value))
    return sum_over_readers(*gather_keys(key, value, sources), offsets, readers)


LAYER = SimpleNamespace(is_causal=True, config=None)


def _through_fasttr(backend: str) -> Attend:
    def attend(inputs: Inputs) -> Tensor:
        layer: Any = LAYER
        out, _ = packed_attention(
            layer, *inputs.leaves, None, fasttr_layout=inputs.layout, fasttr_backend=backend
        )
        return out

    return attend


_segments = _through_fasttr("segments")


def _repeated_heads(inputs: Inputs) -> Tensor:
    """torch's varlen attention on gathered keys and values, heads of keys repeated: what it takes
    in versions that know no grouped heads."""
    from torch.nn.attention.varlen import varlen_attn

    layout = inputs.layout
    number = inputs.query.shape[1] // inputs.key.shape[1]
    sources = layout.keys.sources
    query, key, value = (leaf[0].transpose(0, 1) for leaf in inputs.leaves)
    key, value = (x[sources].repeat_interleave(number, dim=1) for x in (key, value))
    out = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        layout.cu_q,
        layout.cu_k,
        *layout.on_host.diff().amax(1).tolist(),
        scale=query.shape[-1] ** -0.5,
        window_size=(-1, 0),
    )
    return out[None]


def _padded(inputs: Inputs) -> Tensor:
    """A right-padded batch, one completion with its prompt a row, causal: no mask is needed, since
    what lies behind a row's end is not read."""
    lengths, _ = inputs.layout.lengths()
    longest = max(lengths)

    def rows(x: Tensor) -> Tensor:
        parts = x[0].transpose(0, 1).split(lengths)
        padded = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
        return padded.transpose(1, 2)

    grouped = inputs.query.shape[1] != inputs.key.shape[1]
    out = F.scaled_dot_product_attention(
        rows(inputs.query),
        rows(inputs.key),
        rows(inputs.value),
        is_causal=True,
        enable_gqa=grouped,
    )
    kept = out.transpose(1, 2).flatten(0, 1)
    place = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(lengths)])
    return kept[place.to(kept.device)][None]


class Provider(NamedTuple):
    attend: Attend
    shares_prompts: bool = True
    cuda_only: bool = False

    def absent(self, device: torch.device) -> str | None:
        return "needs a GPU" if self.cuda_only and device.type != "cuda" else None


PROVIDERS = {
    "fasttr, segments": Provider(_segments),
    "fasttr, varlen": Provider(_through_fasttr("varlen"), cuda_only=True),
    "varlen, repeated heads": Provider(_repeated_heads, cuda_only=True),
    "segments without sharing": Provider(_segments, shares_prompts=False),
    "varlen without sharing": Provider(
        _through_fasttr("varlen"), shares_prompts=False, cuda_only=True
    ),
    "padded": Provider(_padded, shares_prompts=False),
}


COLUMNS = ("attention", "ms (p20 to p80)", "TFLOP/s")


def table(case: Case) -> str:
    rows = [
        [name, spread(row, 1e-3), f"{row['tflops']:.3g}"]
        for name, row in by_median(case["providers"])
    ]
    title = (
        f"{case['pairs']} pairs of {case['lengths']} ({case['tokens']:,} packed tokens), heads "
        f"{case['heads']}, forward and backward; the gather alone {spread(case['gather'], 1e-3)} ms"
    )
    return titled(title, COLUMNS, rows + reasons(case, len(COLUMNS)))


BENCHMARK = Benchmark(
    name="attention",
    title="Attention",
    cases=cases,
    table=table,
    bars=Bars("providers", "median_s", "seconds"),
)
