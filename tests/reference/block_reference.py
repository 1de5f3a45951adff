"""Models of blocks that do what published ones do, and what reaches their layers, by whole runs."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional

WIDTH, WIDE, TOKENS = 8, 12, 6


class Mixer(nn.Module):
    """Ends with a layer whose output is changed in place, and returns a tuple."""

    def __init__(self):
        super().__init__()
        self.left = nn.Linear(WIDTH, WIDTH)
        self.right = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.out(self.left(x).tanh() * self.right(input=x))
        y += 0.1
        return y, None


class Feed(nn.Module):
    """Works on flattened tokens, with a ReLU inside; what it returns is its last layer's output."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDE)
        self.down = nn.Linear(WIDE, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.last(self.down(functional.relu(self.up(x))))


class Block(nn.Module):
    """Called by keyword; returns its hidden states and a tensor that nobody needs."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mixer = Mixer()
        self.feed = Feed()

    def forward(self, hidden_states, gain):
        hidden_states = hidden_states + self.mixer(self.norm(hidden_states))[0] * gain
        flat = self.norm(hidden_states).flatten(0, 1)
        hidden_states = hidden_states + self.feed(flat).view_as(hidden_states)
        return hidden_states, hidden_states.mean()


class Plain(nn.Module):
    """Layers before the blocks, one of which makes an argument of theirs, and after them."""

    def __init__(self, depth=3):
        super().__init__()
        self.stem = nn.Linear(5, WIDTH)
        self.gain = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.neck = nn.Linear(WIDTH, WIDTH)
        self.side = nn.Linear(WIDTH, 3)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x, attention_mask=None):
        first = self.stem(x)
        gain, hidden = self.gain(first), first
        for block in self.blocks:
            hidden = block(hidden_states=hidden, gain=gain)[0]
        hidden = hidden + first  # what comes before the blocks is read after them as well
        side = self.side(hidden)
        return self.head(functional.relu(self.neck(hidden))), side


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDE)
        self.up = nn.Linear(WIDTH, WIDE)
        self.down = nn.Linear(WIDE, WIDTH)

    def forward(self, x):
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Routed(nn.Module):
    """Each token goes to one expert, by the sign of its first features."""

    def __init__(self, experts=4):
        super().__init__()
        self.router = nn.Linear(WIDTH, experts)
        self.experts = nn.ModuleList(Expert() for _ in range(experts))

    def forward(self, x, attention_mask=None):
        flat = x.flatten(0, 1)
        chosen = self.router(flat).argmax(1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == number)
            if len(rows):
                out.index_add_(0, rows, expert(flat[rows]))
        return x + out.view_as(x)


class Experts(nn.Module):
    """Blocks of routed experts. Some batches do not reach all of them."""

    def __init__(self, depth=2, experts=4):
        super().__init__()
        self.layers = nn.ModuleList(Routed(experts) for _ in range(depth))

    def forward(self, x, attention_mask=None):
        for layer in self.layers:
            x = layer(x)
        return x


def plain_batches(width=5):
    """Features of two batches, which differ in size and length."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(3, TOKENS, width), (2, TOKENS - 1, width)]
    return [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]


def run(model, batch):
    """Call a model with a batch: a tensor or a mapping."""
    return model(**batch) if isinstance(batch, dict) else model(batch)


@torch.no_grad()
def layer_inputs(model, batch, weights):
    """What reaches every linear layer that is called, in a copy of the model with these weights."""
    model = copy.deepcopy(model)
    for name, weight in weights.items():
        module = model.get_submodule(name)
        module.weight = nn.Parameter(weight.clone())  # tied layers do not follow
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: seen.update(
                    {name: (args[0] if args else kwargs["input"]).clone()}
                ),
                with_kwargs=True,
            )
    run(model, batch)
    return seen
