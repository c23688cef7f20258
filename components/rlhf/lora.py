"""A LoRA layer that computes in the type of its input.

The library's own layer turns activations into float32 and back wherever the adapter is float32, as a trained one must be. Here only
the adapter's small matrices are cast, its product is accumulated into the base layer's output, and the backward pass keeps the
input once.

Shapes: N tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners import lora
from torch import Tensor
from torch.nn import functional


class LoraLinear(lora.Linear):
    """`peft`'s linear layer with one active adapter, without dropout; everything but `forward` is the library's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        if not active:
            return functional.linear(x, base.weight, base.bias)
        (name,) = active
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return cast(Tensor, _LowRank.apply(x, base.weight, base.bias, a, b, self.scaling[name]))


class _LowRank(torch.autograd.Function):
    """x W^T + bias + scaling (x A^T) B^T; W and the bias are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        a_rI, b_Or = a.to(x.dtype), (b * scaling).to(x.dtype)
        low_Nr = x_NI @ a_rI.T
        ctx.save_for_backward(x_NI, low_Nr, weight, a_rI, b_Or)
        ctx.facts = x.shape, scaling, a.dtype
        return functional.linear(x_NI, weight, bias).addmm_(low_Nr, b_Or.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, low_Nr, weight, a_rI, b_Or = ctx.saved_tensors
        shape, scaling, dtype = ctx.facts
        gradient_NO = gradients[0].reshape(-1, gradients[0].shape[-1])
        low_gradient_Nr = gradient_NO @ b_Or
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        x_gradient = a_gradient = b_gradient = None
        if needs_x:
            x_gradient = (gradient_NO @ weight).addmm_(low_gradient_Nr, a_rI).view(shape)
        if needs_a:
            a_gradient = (low_gradient_Nr.T @ x_NI).to(dtype)
        if needs_b:
            b_gradient = (gradient_NO.T @ low_Nr).to(dtype) * scaling
        return x_gradient, None, None, a_gradient, b_gradient, None
