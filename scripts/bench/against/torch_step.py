"""The baseline in PyTorch, for a GPU: a plain GPT, autocast, torch.compile, AdamW.

It has the shapes and parameter counts of style nanodo: pre-LayerNorm without bias, GELU, learned positions, tied
embeddings. SAM is the usual optimizer wrapper: climb in place, take a second pass, go back, step.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from steppe.lm.model.transformer import Shape
from steppe.scripts.bench.turns import repeat


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.heads, width = shape.heads, shape.width
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, shape.mlp_width, bias=False)
        self.down = nn.Linear(shape.mlp_width, width, bias=False)

    def forward(self, x_BxTxD):
        B, T, D = x_BxTxD.shape
        parts = self.qkv(self.norms[0](x_BxTxD)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).reshape(B, T, D)
        x_BxTxD = x_BxTxD + self.out(mixed)
        return x_BxTxD + self.down(F.gelu(self.up(self.norms[1](x_BxTxD)), approximate="tanh"))


class Transformer(nn.Module):
    """(tokens, targets) [B, T] -> mean loss, nats a token."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.sequence_length, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width, bias=False)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, inputs_BxT, targets_BxT):
        x_BxTxD = self.tokens(inputs_BxT) + self.positions.weight[: inputs_BxT.shape[1]]
        for block in self.blocks:
            x_BxTxD = block(x_BxTxD)
        logits_BxTxV = F.linear(self.norm(x_BxTxD), self.tokens.weight)
        return F.cross_entropy(logits_BxTxV.flatten(0, 1).float(), targets_BxT.flatten())


def measure(shape: Shape, batch_size: int, sam: bool, seconds: float) -> tuple[float, float]:
    """(seconds of a step, peak memory in bytes) of AdamW, or of SAM around it; 0 bytes on a CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = Transformer(shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), fused=device == "cuda")
    loss_of = torch.compile(model) if device == "cuda" else model
    tokens = torch.randint(shape.vocabulary, (batch_size, shape.sequence_length + 1), device=device)

    def backward():
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(tokens[:, :-1], tokens[:, 1:])
        loss.backward()

    def step(_):
        backward()
        if sam:
            _climb_and_back(model, backward)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    spent, _ = repeat(step, None, seconds, lambda _: torch.cuda.synchronize() if device == "cuda" else None)
    return spent, torch.cuda.max_memory_allocated() if device == "cuda" else 0


def _climb_and_back(model: nn.Module, backward: Callable[[], None], rho: float = 0.05) -> None:
    """Replaces the gradient at θ by the gradient at θ + ρ g / ‖g‖."""
    every: Any = torch  # its operations on lists, which its optimizers use, have no public names
    with torch.no_grad():
        gradients = [parameter.grad for parameter in model.parameters()]
        length = torch.linalg.vector_norm(torch.stack(every._foreach_norm(gradients)))
        epsilon = every._foreach_mul(gradients, rho / (length + 1e-12))
        every._foreach_add_(list(model.parameters()), epsilon)
    model.zero_grad(set_to_none=True)
    backward()
    with torch.no_grad():
        every._foreach_sub_(list(model.parameters()), epsilon)
