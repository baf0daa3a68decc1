"""E-AT in one file: a CIFAR-10 network robust to Linf and L1 attacks, and so to L2 too (arXiv 2105.12508, section 4).

python examples/minimal_eat.py --data_dir=./datasets       and then: python eval.py --model_name=minimal_eat.pth

Trains as `python train.py --attack=apgd --l_norms='Linf L1'` does: tests/test_minimal_eat.py finds the same weights. Published, 5 seeds
(lr 1.0 for BatchNorm and biases, here as all others): clean 82.2 %, Linf 42.7 %, L2 67.5 %, L1 53.6 %, all three at once 42.4 %.
"""

import argparse
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import datasets, transforms

NORMS, EPS = ("Linf", "L1"), {"Linf": 8 / 255, "L1": 12.0}  # radii for pixels in [0, 1]
N_ITER, BATCH_SIZE, LR_MAX, WEIGHT_DECAY = 10, 128, 0.05, 5e-4
FLAGS = {"data_dir": "./datasets", "epochs": 80, "width": 64, "seed": 0, "save": "minimal_eat.pth"}


class PreActBlock(nn.Module):
    """Two convolutions, each after BatchNorm and softplus, which unlike ReLU is smooth."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_planes), nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False)) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.softplus(self.bn1(x))
        skip = self.shortcut(out) if self.shortcut else x
        return torch.add(skip, self.conv2(F.softplus(self.bn2(self.conv1(out)))))


def preact_resnet18(w: int) -> nn.Sequential:
    """PreAct ResNet-18 (arXiv 1603.05027) of width w: images (B, 3, H, W) -> logits (B, 10)."""
    layers: dict[str, nn.Module] = {"conv1": nn.Conv2d(3, w, 3, padding=1, bias=False)}
    for stage, (i, o) in enumerate([(w, w), (w, 2 * w), (2 * w, 4 * w), (4 * w, 8 * w)], start=1):
        layers[f"layer{stage}"] = nn.Sequential(PreActBlock(i, o, o // i), PreActBlock(o, o, 1))
    pool = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(OrderedDict(layers, bn=nn.BatchNorm2d(8 * w), pool=pool, linear=nn.Linear(8 * w, 10)))


def project(delta: Tensor, x: Tensor, norm: str) -> Tensor:
    """The nearest point to delta (B, C, H, W) with ||delta|| <= eps and x + delta in [0, 1] (arXiv 2103.01208, section 3)."""
    if norm == "Linf":
        return delta.clamp(-EPS["Linf"], EPS["Linf"]).clamp(-x, 1 - x)
    size, room = delta.abs(), torch.where(delta > 0, 1 - x, x)  # entries shrink by the smallest t that meets the radius
    low, high = torch.zeros_like(x[:, :1, :1, :1]), size.amax((1, 2, 3), keepdim=True)
    for _ in range(torch.finfo(x.dtype).bits):  # more halvings than a float has digits, so that t is exact
        t = (low + high) / 2
        outside = (size - t).clamp(min=0).minimum(room).sum((1, 2, 3), keepdim=True) > EPS["L1"]
        low, high = torch.where(outside, t, low), torch.where(outside, high, t)
    return delta.sign() * (size - high).clamp(min=0).minimum(room)


def sparse_direction(grad: Tensor, keep: Tensor) -> Tensor:
    """The signs of each gradient's `keep` (B, 1, 1, 1) largest entries, length 1 in L1: one pixel alone soon meets the box."""
    size = grad.abs().flatten(1)
    kth_largest = size.sort(descending=True).values.gather(1, keep.ceil().long().clamp(min=1).flatten(1) - 1)
    signs = grad.sign() * (size >= kth_largest).view_as(grad)
    return signs / signs.abs().sum((1, 2, 3), keepdim=True).clamp(min=1)


def loss_and_grad(model: nn.Module, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Each example's cross-entropy, shaped (B, 1, 1, 1) to broadcast over images, and its gradient at x_adv (B, C, H, W)."""
    loss = F.cross_entropy(model(x_adv.requires_grad_()), y, reduction="none")
    return loss.detach().view(-1, 1, 1, 1), torch.autograd.grad(loss.sum(), x_adv)[0]


def apgd(model: nn.Module, x: Tensor, y: Tensor, norm: str, n_iter: int) -> Tensor:
    """Points x_adv (B, C, H, W) of highest loss (algorithms 1 of arXiv 2003.01690 and 2103.01208), a step size for each."""
    eps, linf = EPS[norm], norm == "Linf"
    delta = delta_old = delta_best = torch.zeros_like(x)
    loss, grad = loss_best, grad_best = loss_and_grad(model, x + delta, y)
    step = torch.full_like(loss, 2 * eps if linf else eps)
    rises, halved, loss_check = torch.zeros_like(loss), torch.ones_like(loss, dtype=torch.bool), loss  # for Linf
    nonzeros, keep = torch.full_like(loss, x[0].numel()), torch.full_like(loss, 0.05 * x[0].numel())  # for L1
    interval = left = max(int((0.22 if linf else 0.04) * n_iter), 1)
    for i in range(n_iter):
        new = project(delta + step * (grad.sign() if linf else sparse_direction(grad, keep)), x, norm)
        momentum = delta + 0.75 * (new - delta) + 0.25 * (delta - delta_old)
        delta, delta_old, loss_old = project(momentum, x, norm) if linf and i > 0 else new, delta, loss
        loss, grad = loss_and_grad(model, x + delta, y)
        rises, better, left = rises + (loss > loss_old), loss > loss_best, left - 1
        delta_best, loss_best = torch.where(better, delta, delta_best), torch.where(better, loss, loss_best)
        grad_best = torch.where(better, grad, grad_best)
        if left > 0:
            continue
        if linf:  # a check-point: halve the step where the loss rose too rarely, or not since the last check-point
            back = (rises <= 0.75 * interval) | (~halved & (loss_best <= loss_check))
            step, halved, loss_check, rises = torch.where(back, step / 2, step), back, loss_best, 0 * rises
            interval = max(interval - max(int(0.03 * n_iter), 1), int(0.06 * n_iter), 1)
        else:  # a check-point: a large step where the best point became sparser, else a smaller one
            count = (delta_best != 0).sum((1, 2, 3), keepdim=True).to(x.dtype)
            back, nonzeros, keep = count < 0.95 * nonzeros, count, count / 1.5
            step = torch.where(back, eps, (step / 1.5).clamp(min=eps / 10))
        delta, loss = torch.where(back, delta_best, delta), torch.where(back, loss_best, loss)
        grad, left = torch.where(back, grad_best, grad), interval
    return x + delta_best


def sample_norm(wrong: Tensor, seen: Tensor) -> int:
    """Which norm the next batch meets: drawn in proportion to its running robust error, evenly until each was seen."""
    return int(torch.multinomial(wrong / seen if seen.all() and wrong.any() else torch.ones_like(seen), 1))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, norm: str) -> int:
    """One update on the batch's adversarial examples in one norm; how many of them are misclassified."""
    model.eval()  # the attack must not move BatchNorm's statistics
    x_adv = apgd(model, x, y, norm, N_ITER)
    model.train()
    logits = model(x_adv)
    optimizer.zero_grad()
    torch.autograd.backward(F.cross_entropy(logits, y))
    optimizer.step()
    return int((logits.argmax(1) != y).sum())


def main(argv: list[str] | None = None) -> None:
    """Train as the flags say and save the weights after each epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in FLAGS.items():
        parser.add_argument(f"--{flag}", type=type(default), default=default, help="(%(default)s)")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = preact_resnet18(args.width).to(device)
    weights = {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": WEIGHT_DECAY}
    others = {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}  # BatchNorm and biases
    optimizer = torch.optim.SGD([weights, others], lr=LR_MAX, momentum=0.9)
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    data = datasets.CIFAR10(args.data_dir, transform=transforms.Compose(augment), download=True)
    loader = torch.utils.data.DataLoader(data, BATCH_SIZE, shuffle=True, num_workers=2)
    wrong, seen = torch.zeros(2), torch.zeros(2)  # in each norm, over the whole run
    for epoch in range(args.epochs):
        for i, (x, y) in enumerate(loader):
            for group in optimizer.param_groups:  # piecewise-70-10: lr / 10 after 70 of 80 epochs
                group["lr"] = LR_MAX if (epoch + i / len(loader)) / args.epochs < 70 / 80 else LR_MAX / 10
            drawn = sample_norm(wrong, seen)
            wrong[drawn] += train_step(model, optimizer, x.to(device), y.to(device), NORMS[drawn])
            seen[drawn] += len(y)
        print(f"epoch {epoch + 1}  running error Linf {wrong[0] / seen[0]:.3f} L1 {wrong[1] / seen[1]:.3f}", flush=True)
        torch.save(model.state_dict(), args.save)


if __name__ == "__main__":
    main()
