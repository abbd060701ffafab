"""Muon for all matrices of one shape at once: torch's update, step for step."""

import pytest
import torch

from shakespeare_gpt.speed.muon import Muon, orthogonalize


@pytest.mark.parametrize(
    "shapes", [[(24, 24)], [(8, 40)], [(40, 8)], [(16, 48), (16, 48), (48, 16), (16, 16)]], ids=str
)
def test_muon_is_torchs_muon(shapes):
    """Ours works on all matrices of a shape at once; the update must be torch's, step for step."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    mine = [torch.nn.Parameter(w.clone()) for w in weights]
    precise = [torch.nn.Parameter(w.double()) for w in weights]
    theirs = [torch.nn.Parameter(w.clone()) for w in weights]
    options = {"lr": 0.05, "weight_decay": 0.0, "momentum": 0.9}
    ours = Muon(mine, dtype=torch.bfloat16, **options)
    exact = Muon(precise, dtype=torch.float64, **options)
    torchs = torch.optim.Muon(theirs, **options)
    for step in range(6):
        for a, e, b in zip(mine, precise, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator) * 10.0 ** (step - 3)
            e.grad, b.grad = a.grad.double(), a.grad.clone()
        before = [b.detach().clone() for b in theirs]
        for optimizer in (ours, exact, torchs):
            optimizer.param_groups[0]["lr"] = 0.05 / (step + 1)
            optimizer.step()
        for a, e, b, old in zip(mine, precise, theirs, before, strict=True):
            update = b.detach() - old
            assert update.norm() > 0.1 * 0.05 / (step + 1)
            # bf16 keeps three digits, and the two round at other moments: both lie near the update
            # without rounding, torch's at 1 to 2 %, ours at up to 4 %.
            assert (a - e).norm() < 0.05 * update.norm()
            assert (b - e).norm() < 0.05 * update.norm()
            a.data.copy_(b.data)
            e.data.copy_(b.data)


def test_muon_takes_the_parts_of_a_matrix_apart():
    """Queries, keys and values lie in one matrix: each must get the update that it would get alone."""
    generator = torch.Generator().manual_seed(0)
    stored = torch.nn.Parameter(torch.randn(36, 12, generator=generator))
    alone = [torch.nn.Parameter(part.detach().clone()) for part in stored.chunk(3)]
    options = {"lr": 0.05, "weight_decay": 0.0, "dtype": torch.float32}
    together = Muon([{"params": [stored], "parts": 3}], **options)
    apart = Muon(alone, **options)
    for _ in range(3):
        stored.grad = (
            torch.randn(36, 12, generator=generator)
            * torch.tensor([1.0, 10.0, 100.0]).repeat_interleave(12)[:, None]
        )
        for p, grad in zip(alone, stored.grad.chunk(3), strict=True):
            p.grad = grad.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(stored, torch.cat(alone), rtol=0, atol=1e-6)


def test_muon_leaves_out_what_has_no_gradient():
    """A layer that took no part must not be moved, nor stop the others."""
    a, b = (torch.nn.Parameter(torch.eye(6)) for _ in range(2))
    a.grad = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    Muon([a, b], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(b, torch.eye(6)) and not torch.equal(a, torch.eye(6))


@pytest.mark.parametrize("shape", [(2, 24, 96), (2, 96, 24), (2, 32, 40), (2, 1, 50)])
def test_orthogonalize_in_fp32(shape):
    """The short way of a long matrix must be the same polynomial: here beside the long way in fp64."""
    few = torch.randn(shape[0], shape[1], 3, generator=torch.Generator().manual_seed(1))
    many = torch.randn(shape[0], 3, shape[2], generator=torch.Generator().manual_seed(2))
    matrices = few @ many + 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(3))
    a, b, c = coefficients = (3.4445, -4.775, 2.0315)
    ours = orthogonalize(matrices, coefficients, steps=5, eps=1e-7)
    expected = matrices.double()
    expected = expected / expected.flatten(1).norm(dim=1)[:, None, None]
    for _ in range(5):
        square = expected @ expected.mT
        expected = a * expected + (b * square + c * square @ square) @ expected
    assert (ours - expected).norm() < 1e-3 * expected.norm()
    values = torch.linalg.svdvals(ours)[:, : min(3, *shape[1:])]
    assert values.min() > 0.6 and values.max() < 1.3
