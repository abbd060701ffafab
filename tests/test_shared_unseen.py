"""The tokens that a text lacks share one embedding: the same loss, a smaller output layer."""

import pytest
import torch
from small_run import IDS, assert_same_run, changed, new_model, run

from shakespeare_gpt.memorization import score
from shakespeare_gpt.speed.shared_unseen import ReducedGPT

FEW = IDS % 40 + 7  # 40 of the 97 kinds of token
SHARED = changed(share_unseen=True)


def test_the_loss_is_that_of_the_whole_vocabulary():
    """Tokens left out of the sum make a loss look lower than it is."""
    model = new_model()
    reduced = ReducedGPT(model, FEW)
    reduced.write_back()
    x = FEW[:16][None]
    y = FEW[1:17][None]
    loss = reduced(x, y)
    torch.testing.assert_close(loss, model(x, y))
    loss.backward()
    ours = reduced.wte.weight.grad.clone(), model.h[0].mlp.c_fc.weight.grad.clone()
    model.zero_grad()
    model(x, y).backward()
    full = model.wte.weight.grad
    unseen = torch.ones(97, dtype=torch.bool)
    unseen[FEW] = False
    torch.testing.assert_close(ours[0][:-1], full[~unseen])
    torch.testing.assert_close(ours[0][-1], full[unseen].sum(0))
    torch.testing.assert_close(ours[1], model.h[0].mlp.c_fc.weight.grad)


def test_the_whole_text_is_measured_over_the_whole_vocabulary():
    """A model that knows its text among 40 tokens only would be a smaller model."""
    model, step = run(SHARED, FEW)
    assert model.wte.weight.shape == (97, 32)
    assert step.text_loss == pytest.approx(score(model, FEW).loss, abs=1e-6) and step.text_loss < 1.43
    unseen = [token for token in range(97) if token not in FEW]
    assert len(model.wte.weight[unseen].unique(dim=0)) == 1
    assert model(FEW[None, :16]).softmax(-1)[..., unseen].sum(-1).max() < 0.5


def test_the_model_is_whole_at_every_step():
    """A caller samples from the model while it trains, and a checkpoint keeps it."""
    model = new_model()
    before = model.wte.weight.clone()
    run(SHARED, FEW, model=model, stop_after=1)
    assert (model.wte.weight != before).any(1).all()


def test_resuming_is_exact(tmp_path):
    whole = run(SHARED, FEW)
    path = tmp_path / "a.pt"
    run(SHARED, FEW, checkpoint=path, stop_after=30)
    assert_same_run(run(SHARED, FEW, checkpoint=path), whole)


def test_a_text_with_every_token_has_nothing_to_share():
    """The row of the others would stand for none, and count log(0)."""
    _, step = run(SHARED, torch.arange(97).repeat(3), stop_after=2)
    assert step.step == 2
