"""Products of frozen linear layers in float8, for which Hopper GPUs have twice the rate of bfloat16 (ours).

The gradient of its inputs is all that a frozen layer passes on. Its weight is therefore quantized once, for either direction,
and stays as it is beside that, for checkpoints. Each row of inputs, of gradients and of a weight has a scale of its own.
"""

import torch
from torch import nn

from granulon_hf.errors import GranulonError

FLOAT8 = torch.float8_e4m3fn


def to_float8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float8 values [R x C] and scales [R x 1]; the largest of a row becomes the largest that float8 has."""
    rows = rows.float()
    scale = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / torch.finfo(FLOAT8).max
    return (rows / scale).to(FLOAT8), scale


def multiply(inputs: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return inputs [... x C] times the transpose of a quantized weight [R x C], in the inputs' dtype. Shape [... x R]."""
    values, own = to_float8(inputs.flatten(0, -2))
    product = torch._scaled_mm(values, weight.t(), scale_a=own, scale_b=scale.t(), out_dtype=torch.bfloat16)
    return product.view(*inputs.shape[:-1], len(weight)).to(inputs.dtype)


class Product(torch.autograd.Function):
    """[`multiply`] by a weight, and the gradient by its transpose."""

    @staticmethod
    def forward(ctx, inputs, weight, scale, turned, turned_scale):
        ctx.save_for_backward(turned, turned_scale)
        return multiply(inputs, weight, scale)

    @staticmethod
    def backward(ctx, gradient):
        return multiply(gradient, *ctx.saved_tensors), None, None, None, None


class Float8Linear(nn.Module):
    """A frozen `nn.Linear` on the device where it stays, which leaves the dtype of its inputs as it is."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        # No buffers: DDP would send them around, and `to` would change their dtype.
        self.quantized = (*to_float8(linear.weight.detach()), *to_float8(linear.weight.detach().t()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = Product.apply(inputs, *self.quantized)
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)


def use_float8(module: nn.Module) -> int:
    """Replace the frozen linear layers in a module, in place, and return how many.

    Names of weights stay. Layers whose sides are not multiples of 16, which the GPU's product needs, are left alone.

    Raises:
        GranulonError: there is none that can be replaced.
    """
    layers = [
        (name, linear)
        for name, linear in module.named_modules()
        if type(linear) is nn.Linear and not linear.weight.requires_grad and not any(side % 16 for side in linear.weight.shape)
    ]
    if not layers:
        raise GranulonError(
            "--frozen_dtype fp8 finds no frozen linear layer to replace: those of a quantized language model, and those "
            "with sides that are no multiples of 16, stay as they are; leave it out."
        )
    for name, linear in layers:
        module.set_submodule(name, Float8Linear(linear))
    return len(layers)
