"""The benchmarks that have cases, in the order of the README."""

from __future__ import annotations

from bench import attention, head, layer, lerp, on_policy, optim, overhead, scale, step

BENCHMARKS = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (head, lerp, optim, layer, attention, step, overhead, on_policy, scale)
}
