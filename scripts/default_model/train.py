"""Train the default model on a CPU: python train.py --data FOLDER --out FOLDER --mix train_a.bin:0.7,train_b.bin:0.3 …

Data are uint16 token ids (build_tokenizer.py pack). Matrices are trained by Muon, the rest by Adam; computation is in
bf16. The state is kept in OUT/last.pt every five minutes and at the end; a run continues from there, with the mixture
and the steps that it is given, so that a curriculum is a sequence of calls. Same calls, same threads: same model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model import Config, Model, MoE
from torch import Tensor

LOSS_ROWS = 1024  # rows of logits that exist at one time
MOMENTUM = 0.95
WEIGHT_DECAY = 0.02
EMBEDDING_LR = 8  # times the others': embeddings are that much wider
BIAS_STEP = 2e-3  # of the selection bias, towards an even load of the experts
MIN_LR = 0.05  # of the full rate, at the end of the decay
SAVE_EVERY = 300.0  # seconds
LOG_EVERY, EVALUATE_EVERY = 20, 100  # steps
SEED = 1234


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of head(hidden), without ever holding all logits in f32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        head = weight.bfloat16()
        n = hidden.shape[0]
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        total = torch.zeros(())
        for start in range(0, n, LOSS_ROWS):
            rows, ids = hidden[start : start + LOSS_ROWS], target[start : start + LOSS_ROWS, None]
            p = torch.softmax((rows @ head.t()).float(), -1)
            total -= p.gather(1, ids).clamp_min(1e-20).log().sum()
            p.scatter_add_(1, ids, torch.full(ids.shape, -1.0))
            gradient = p.bfloat16()
            d_hidden[start : start + LOSS_ROWS] = gradient @ head
            d_weight += (gradient.t() @ rows).float()
        ctx.save_for_backward(d_hidden.div_(n), d_weight.div_(n))
        return total / n

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * gradient, d_weight * gradient, None


def loss_of(model: Model, ids: Tensor, targets: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.hidden(ids)
    hidden = hidden.reshape(-1, hidden.shape[-1]).bfloat16()
    return LinearCrossEntropy.apply(hidden, model.head.weight, targets.reshape(-1))


class Muon:
    """Momentum, orthogonalised by Newton-Schulz iterations, for (stacks of) matrices."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.momentum = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for p, momentum in zip(self.parameters, self.momentum):
            momentum.lerp_(p.grad, 1 - MOMENTUM)
            update = orthogonalised(p.grad.lerp(momentum, MOMENTUM))
            p.mul_(1 - lr * WEIGHT_DECAY).add_(update, alpha=-lr * 0.2 * math.sqrt(max(p.shape[-2:])))
            p.grad = None


@torch.no_grad()
def orthogonalised(gradient: Tensor, n_iterations: int = 5) -> Tensor:
    x = gradient.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.transpose(-1, -2)
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True).bfloat16() + 1e-7)
    x = x.contiguous()
    for _ in range(n_iterations):
        a = x @ x.transpose(-1, -2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return (x.transpose(-1, -2) if tall else x).float()


class Data:
    """Random windows of the files, each drawn with its weight; lengths are drawn per step with theirs."""

    def __init__(self, mix: dict[Path, float], lengths: dict[int, float], n_tokens: int, seed: int) -> None:
        self.texts = [np.fromfile(path, dtype=np.uint16) for path in mix]
        self.weights = np.array(list(mix.values())) / sum(mix.values())
        self.lengths, self.n_tokens, self.random = lengths, n_tokens, np.random.default_rng(seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        """(B, T) ids and what follows each, with B · T tokens in all."""
        length = int(self.random.choice(list(self.lengths), p=list(self.lengths.values())))
        windows = np.empty((self.n_tokens // length, length + 1), dtype=np.int64)
        for window in windows:
            text = self.texts[self.random.choice(len(self.texts), p=self.weights)]
            start = self.random.integers(0, len(text) - length - 1)
            window[:] = text[start : start + length + 1]
        ids = torch.from_numpy(windows)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


@torch.no_grad()
def evaluate(model: Model, folder: Path, n_windows: int = 16, length: int = 256) -> dict[str, float]:
    """Mean loss over the first windows of each val_*.bin, nats per token."""
    model.eval()
    losses = {}
    for path in sorted(folder.glob("val_*.bin")):
        text = torch.from_numpy(np.fromfile(path, dtype=np.uint16).astype(np.int64))
        starts = range(0, min(n_windows, (len(text) - 1) // length) * length, length)
        windows = [text[start : start + length + 1][None] for start in starts]
        each = [loss_of(model, window[:, :-1], window[:, 1:]).item() for window in windows]
        losses[path.stem.removeprefix("val_")] = round(float(np.mean(each)), 4)
    model.train()
    return losses


class Training:
    """Model, optimisers and counters: what a checkpoint holds."""

    def __init__(self, lr: float, lr_adam: float, checkpoint: Path) -> None:
        state = torch.load(checkpoint, weights_only=False) if checkpoint.exists() else None
        self.config = Config(**state["config"]) if state else Config()
        self.model = Model(self.config)
        self.lr, self.lr_adam, self.checkpoint = lr, lr_adam, checkpoint
        matrices = [
            p
            for name, p in self.model.named_parameters()
            if p.dim() > 1 and not name.startswith(("emb", "head")) and "router" not in name
        ]
        ours = {id(p) for p in matrices}
        embedding = self.model.emb.weight
        self.rest = [p for p in self.model.parameters() if id(p) not in ours]
        self.muon = Muon(matrices)
        groups = [{"params": [p for p in self.rest if p is not embedding]}, {"params": [embedding]}]
        self.adam = torch.optim.AdamW(groups, lr=lr_adam, betas=(0.9, 0.95), weight_decay=0.0)
        self.moes = [block.ffn for block in self.model.blocks if isinstance(block.ffn, MoE)]
        self.n_steps, self.n_tokens = 0, 0
        if state:
            self.model.load_state_dict(state["model"])
            self.adam.load_state_dict(state["adam"])
            self.muon.momentum = state["muon"]
            self.n_steps, self.n_tokens = state["n_steps"], state["n_tokens"]
        self.model.train()

    def step(self, ids: Tensor, targets: Tensor, rate: float) -> float:
        """One update at this share of the full learning rate; returns the loss."""
        loss = loss_of(self.model, ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
        for group, factor in zip(self.adam.param_groups, (1, EMBEDDING_LR)):
            group["lr"] = self.lr_adam * rate * factor
        self.adam.step()
        self.muon.step(self.lr * rate)
        self.adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            for moe in self.moes:
                load = moe.load.float()
                moe.bias += BIAS_STEP * rate * torch.sign(load.mean() - load)
        self.n_steps += 1
        self.n_tokens += ids.numel()
        return loss.item()

    def imbalance(self) -> float:
        """Load of the busiest expert of any layer, as a multiple of the mean."""
        return max(float(moe.load.max() / moe.load.float().mean()) for moe in self.moes)

    def save(self) -> None:
        state = {
            "config": dataclasses.asdict(self.config),
            "model": self.model.state_dict(),
            "adam": self.adam.state_dict(),
            "muon": self.muon.momentum,
            "n_steps": self.n_steps,
            "n_tokens": self.n_tokens,
        }
        unfinished = self.checkpoint.with_suffix(".tmp")
        torch.save(state, unfinished)
        unfinished.replace(self.checkpoint)


def train(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    options.out.mkdir(parents=True, exist_ok=True)
    training = Training(options.lr, options.lr_adam, options.out / "last.pt")
    mix = {options.data / name: weight for name, weight in _pairs(options.mix).items()}
    lengths = {int(length): share for length, share in _pairs(options.lengths).items()}
    data = Data(mix, lengths, options.batch, SEED + training.n_steps)
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))  # finish the step, save, exit

    first, saved, losses = training.n_steps, time.monotonic(), []
    while training.n_steps < options.steps and not stop:
        warmed = (training.n_steps - first + 1) / options.warmup
        left = (options.steps - training.n_steps) / options.decay_steps
        losses.append(training.step(*data.batch(), rate=min(1.0, warmed, max(MIN_LR, left))))
        if training.n_steps % LOG_EVERY == 0:
            _log(training, loss=round(float(np.mean(losses)), 4), imbalance=round(training.imbalance(), 2))
            losses = []
        if training.n_steps % EVALUATE_EVERY == 0:
            _log(training, **evaluate(training.model, options.data))
        if time.monotonic() - saved > SAVE_EVERY:
            training.save()
            saved = time.monotonic()
    training.save()
    if not stop:
        _log(training, **evaluate(training.model, options.data, n_windows=48))


def _pairs(text: str) -> dict[str, float]:
    """ "a:0.7,b:0.3" -> {"a": 0.7, "b": 0.3}"""
    return {name: float(value) for name, value in (pair.rsplit(":", 1) for pair in text.split(","))}


def _log(training: Training, **values: float) -> None:
    print(json.dumps({"step": training.n_steps, "tokens": training.n_tokens, **values}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mix", required=True, help="files of DATA and their weights")
    parser.add_argument("--lengths", default="256:0.7,512:0.2,1024:0.1", help="lengths of windows, and their shares")
    parser.add_argument("--batch", type=int, default=4096, help="tokens of a step")
    parser.add_argument("--lr", type=float, default=0.004, help="of Muon")
    parser.add_argument("--lr-adam", type=float, default=0.0015)
    parser.add_argument("--warmup", type=int, default=5, help="steps, counted from the start of this call")
    parser.add_argument("--steps", type=int, required=True, help="train until this many, earlier calls included")
    parser.add_argument("--decay-steps", type=int, default=1, help="the last of them, with a falling rate")
    parser.add_argument("--threads", type=int, default=2)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
