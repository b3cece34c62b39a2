"""What a forward pass keeps for its backward, layer by layer, and what a compiler would keep of it.

Eager autograd keeps the inputs of nearly every operation. A layer that is compiled is cut by
torch's partitioner, which makes cheap operations again: left are the residual stream, what
products and attention made (unless it was only added to the residual), and, where memory is not
asked to be saved, what products read.

Legend: T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Kept(NamedTuple):
    """Bytes a token that one layer keeps for the backward."""

    input: float  # the residual stream where it enters: all that is kept when a layer is made again
    products: float  # compiled, cheap operations made again: `activation_memory_budget` 0.8
    compiled: float  # compiled, as little made again as is fastest: budget 1
    eager: float  # what autograd keeps


_PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_grouped_mm",
    "convolution",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "attend",
)
_ATTENTION = tuple(name for name in _PRODUCTS if "dot_product" in name or name == "attend")
# Operations whose output is another form of their input.
_FORMS = ("_to_copy", "clone", "view", "t", "transpose", "permute", "expand", "reshape")


class _Layer:
    """What was seen inside one layer; storages by their address."""

    def __init__(self) -> None:
        self.input: dict[int, int] = {}
        self.saved: dict[int, int] = {}
        self.made: dict[int, int] = {}  # by products and attention
        self.read: dict[int, int] = {}  # by products, once for all forms
        self.sums: set[int] = set()  # of the residual stream
        self.added: set[int] = set()  # what went nowhere but into such a sum
        self.weights = 0
        self.attention_width = 0


class Watch(TorchDispatchMode):
    """Counts one forward pass of a model under FakeTensorMode.

    Args:
        tokens: T, a number that no other dimension has as a factor.
        model: its weights are not counted.
        layers: its decoder layers.
    """

    def __init__(self, tokens: int, model: nn.Module, layers: nn.ModuleList):
        super().__init__()
        self._tokens = tokens
        self._model = model
        self._stack = layers
        self._own = {_address(p) for p in model.parameters()}
        self._layers = [_Layer() for _ in layers]
        self._rest = _Layer()
        self._now = self._rest
        self._form_of: dict[int, int] = {}
        self._made_in: dict[int, _Layer] = {}
        self._alive: list[Any] = []  # an address means a storage as long as it lives

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        hooks: list[Any] = []
        for number, layer in enumerate(self._stack):
            enter = self._entering(number)
            hooks.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(layer.register_forward_hook(self._left))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._save, lambda x: x), self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def kept(self, number: int) -> Kept:
        """Of one layer."""
        seen = self._layers[number]
        residual = {a: n for a, n in seen.saved.items() if a in seen.sums}
        made = {a: n for a, n in seen.made.items() if a not in seen.added}
        forms_of_made = {self._root(a) for a in (*made, *residual, *seen.input)}
        read = {a: n for a, n in seen.read.items() if a not in forms_of_made}
        products = {**seen.input, **residual, **made}
        return Kept(
            input=sum(seen.input.values()) / self._tokens,
            products=sum(products.values()) / self._tokens,
            compiled=(sum(products.values()) + sum(read.values())) / self._tokens,
            eager=sum(seen.saved.values()) / self._tokens,
        )

    def outside(self) -> int:
        """Bytes a token that autograd keeps outside all layers."""
        counted = {a for seen in self._layers for a in seen.saved}
        rest = sum(n for a, n in self._rest.saved.items() if a not in counted)
        return rest // self._tokens

    def product_weights(self, number: int) -> int:
        return self._layers[number].weights // self._tokens

    def attention_width(self) -> int:
        """Multiplications a pair of a query with a key, of all layers that were watched."""
        return sum(seen.attention_width for seen in self._layers)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._alive.append(out)
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, Tensor):
                self._made_in.setdefault(_address(x), self._now)
        name = func.overloadpacket.__name__
        tensors = [x for x in args if isinstance(x, Tensor)]
        if name in _PRODUCTS:
            self._note_product(name, tensors, out)
        elif name in _FORMS:
            self._form_of[_address(out)] = self._root(_address(tensors[0]))
        elif name in ("add", "add_") and len(tensors) == 2:
            self._note_sum(tensors, out)
        return out

    def _note_product(self, name: str, tensors: list[Tensor], out: Any) -> None:
        outputs = out if isinstance(out, tuple) else (out,)
        for x in outputs:
            if isinstance(x, Tensor) and self._is_of_tokens(x):
                self._now.made[_address(x)] = x.untyped_storage().nbytes()
        if name in _ATTENTION:
            queries = tensors[0]
            self._now.attention_width += 2 * queries.numel() // self._tokens
            return
        read = [x for x in tensors if self._is_of_tokens(x)]
        for x in read:
            self._now.read.setdefault(self._root(_address(x)), x.untyped_storage().nbytes())
        if len(read) < 2:  # a product with a weight: of the rows that it has, by their width
            self._now.weights += sum(r.shape[-2] * r.shape[-1] * outputs[0].shape[-1] for r in read)

    def _note_sum(self, tensors: list[Tensor], out: Tensor) -> None:
        stream = next(iter(self._now.input.values()), None)
        if out.untyped_storage().nbytes() == stream:
            self._now.sums.add(_address(out))
            self._now.added |= {self._root(_address(x)) for x in tensors}

    def _entering(self, number: int) -> Any:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._now = self._layers[number]
            hidden = args[0] if args else kwargs["hidden_states"]
            self._now.input[_address(hidden)] = hidden.untyped_storage().nbytes()

        return enter

    def _left(self, *_: Any) -> None:
        self._now = self._rest

    def _save(self, x: Tensor) -> Tensor:
        self._alive.append(x)
        address = _address(x)
        if address not in self._own and self._is_of_tokens(x):
            is_here = self._now is self._rest or address in self._now.input
            holder = self._now if is_here else self._made_in.get(address, self._rest)
            holder.saved[address] = x.untyped_storage().nbytes()
        return x

    def _is_of_tokens(self, x: Tensor) -> bool:
        return any(n > 0 and n % self._tokens == 0 for n in x.shape)

    def _root(self, address: int) -> int:
        return self._form_of.get(address, address)


def _address(x: Tensor) -> int:
    return x.untyped_storage()._cdata
