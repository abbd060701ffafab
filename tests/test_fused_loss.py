"""The output layer and its loss in one: equal to the plain one, gradients too."""

import math

import pytest
import torch
from torch.nn import functional as F

from shakespeare_gpt.model import GPT, GPTConfig
from shakespeare_gpt.speed import fused_loss
from shakespeare_gpt.speed.fused_loss import linear_cross_entropy


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def plain_loss(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.T).flatten(0, -2).float(), targets.flatten())


def loss_and_gradients(function, hidden, weight, targets, scale=1.0):
    hidden, weight = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    loss = function(hidden, weight, targets)
    (loss * scale).sum().backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.fixture
def small_chunks(monkeypatch):
    """Five rows at a time, so that a small test has several blocks and a shorter last one."""
    monkeypatch.setitem(fused_loss.CHUNK_ROWS, "cpu", 5)


def test_loss_equals_cross_entropy(small_chunks):
    """Gradients written by hand: a forgotten mean, a block's share lost."""
    hidden, weight = (torch.randn(3, 8, 16, generator=seeded(1)), torch.randn(97, 16, generator=seeded(2)))
    targets = torch.randint(0, 97, (3, 8), generator=seeded(3))
    ours = loss_and_gradients(linear_cross_entropy, hidden, weight, targets, 3.0)
    expected = loss_and_gradients(plain_loss, hidden, weight, targets, 3.0)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_loss_gradients_numerically(monkeypatch):
    """Finite differences know nothing of any formula."""
    monkeypatch.setitem(fused_loss.CHUNK_ROWS, "cpu", 3)
    hidden = torch.randn(7, 4, generator=seeded(1), dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, generator=seeded(2), dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([3, 1, 0, 10, 10, 5, 7])

    def loss(h, w):
        return linear_cross_entropy(h, w, targets)

    # The sums are kept in fp32, so the differences are coarse.
    assert torch.autograd.gradcheck(loss, (hidden, weight), eps=1e-2, atol=2e-3, rtol=2e-2)


def test_loss_in_bf16(small_chunks):
    """Under autocast the products run in bf16; sums in bf16 too would lose the small gradients."""
    hidden, weight = (torch.randn(4, 32, 64, generator=seeded(1)), torch.randn(997, 64, generator=seeded(2)))
    targets = torch.randint(0, 997, (4, 32), generator=seeded(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = loss_and_gradients(linear_cross_entropy, hidden, weight, targets)
    expected = loss_and_gradients(plain_loss, hidden, weight, targets)
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() / theirs.norm() < 0.02


def test_loss_stays_finite_when_the_model_is_sure_and_wrong():
    """A probability that underflows to 0 must not make the loss infinite: training would stop for nothing."""
    hidden, weight = torch.eye(4) * 200.0, torch.eye(4)
    loss, grad_hidden, grad_weight = loss_and_gradients(
        linear_cross_entropy, hidden, weight, torch.tensor([1, 2, 3, 3])
    )
    assert math.isfinite(loss) and loss > 60
    assert grad_hidden.isfinite().all() and grad_weight.isfinite().all()


def test_the_models_loss_is_that_of_its_logits():
    """Two paths to one number: a loss that the logits do not have cannot be checked by anybody."""
    config = GPTConfig(vocab_size=211, n_positions=24, n_embd=48, n_layer=2, n_head=4)
    model = GPT(config, seeded(0)).eval()
    ids = torch.randint(0, 211, (2, 13), generator=seeded(5))
    with torch.no_grad():
        loss, logits = model(ids[:, :-1], ids[:, 1:]), model(ids[:, :-1])
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert not loss.requires_grad
