import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.spec import ModelSpec
from models.yolo import Model
from utils.pruning.recalibrate import recalibrate

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture
def model(tiny_spec):
    """A float64 network in eval mode with statistics far from those of the images."""
    torch.manual_seed(0)
    model = Model(ModelSpec.from_dict(tiny_spec)).double().eval()
    for bn in batchnorms(model).values():
        nn.init.uniform_(bn.weight, -1.5, 1.5)
        nn.init.uniform_(bn.bias, -0.5, 0.5)
        bn.running_mean.uniform_(-5, 5)
        bn.running_var.uniform_(10, 20)
        bn.num_batches_tracked.fill_(1000)
    return model


def batchnorms(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def batches(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, 3, 64, 64, generator=generator, dtype=torch.float64) for n in sizes]


@torch.no_grad()
def by_hand(model, images):
    """Mean and variance of what reaches every batch norm, where each normalises by the batch."""
    found = {}

    def normalise(name, bn):
        def hook(module, inputs, output):
            (x,) = inputs
            mean, variance = x.mean((0, 2, 3)), x.transpose(0, 1).flatten(1).var(1)
            found[name] = mean, variance
            biased = x.transpose(0, 1).flatten(1).var(1, unbiased=False)
            scale = bn.weight / (biased + bn.eps).sqrt()
            return (x - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + bn.bias.view(-1, 1, 1)

        bn.register_forward_hook(hook)

    probe = copy.deepcopy(model).eval()
    for name, bn in batchnorms(probe).items():
        normalise(name, bn)
    probe(images)
    return found


def test_one_batch_by_hand(model):
    (images,) = batches(4)
    expected = by_hand(model, images)
    for name, bn in batchnorms(recalibrate(model, [images])).items():
        torch.testing.assert_close(bn.running_mean, expected[name][0])
        torch.testing.assert_close(bn.running_var, expected[name][1])
        assert bn.num_batches_tracked == 1


def test_the_first_layer_without_any_hook(model):
    (images,) = batches(4)
    block = recalibrate(model, [images]).model[0]
    with torch.no_grad():
        x = F.conv2d(images, model.model[0].conv.weight, stride=2, padding=2)
    torch.testing.assert_close(block.bn.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(block.bn.running_var, x.transpose(0, 1).flatten(1).var(1))


def test_batches_count_alike_whatever_their_size_and_order(model):
    images = batches(4, 1, 2)
    expected = [by_hand(model, batch) for batch in images]
    recalibrated = recalibrate(model, iter(images))
    for name, bn in batchnorms(recalibrated).items():
        means, variances = zip(*(part[name] for part in expected), strict=True)
        torch.testing.assert_close(bn.running_mean, torch.stack(means).mean(0))
        torch.testing.assert_close(bn.running_var, torch.stack(variances).mean(0))
    backwards = recalibrate(model, images[::-1]).state_dict()
    for name, tensor in recalibrated.state_dict().items():
        torch.testing.assert_close(tensor, backwards[name])


def test_a_second_time_changes_nothing(model):
    images = batches(2, 2)
    once = recalibrate(model, images)
    twice = recalibrate(once, images).state_dict()
    assert all(torch.equal(tensor, twice[name]) for name, tensor in once.state_dict().items())


def test_only_the_statistics_change_and_the_original_does_not(model):
    before = copy.deepcopy(model.state_dict())
    after = recalibrate(model, batches(2)).state_dict()
    assert list(after) == list(before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        is_statistic = name.endswith(STATISTICS)
        assert torch.equal(after[name], tensor) != is_statistic, name


@pytest.mark.parametrize("training", [True, False])
def test_momentum_mode_and_gradients_are_as_before(model, training):
    model.train(training)
    model.model[3].bn.momentum = 0.5
    model.model[5].train(not training)
    modes = {name: module.training for name, module in model.named_modules()}
    copied = recalibrate(model, batches(2))
    assert {name: module.training for name, module in copied.named_modules()} == modes
    momenta = {name: bn.momentum for name, bn in batchnorms(model).items()}
    assert {name: bn.momentum for name, bn in batchnorms(copied).items()} == momenta
    assert set(momenta.values()) == {0.03, 0.5}
    assert all(p.requires_grad and p.grad is None for p in copied.parameters())


def test_it_repairs_what_a_change_of_the_weights_does(model):
    """Batch norm takes out any scale of a convolution, once its statistics know of it."""
    images = batches(4)
    for bn in batchnorms(model).values():
        bn.eps = 1e-14  # else the scale would show
    right = recalibrate(model, images)
    with torch.no_grad():
        expected, _ = right(images[0])
        for name, module in right.named_modules():
            if name.endswith(".conv"):
                module.weight *= 3
        spoilt, _ = right(images[0])
        repaired, _ = recalibrate(right, images)(images[0])
    torch.testing.assert_close(repaired, expected)
    assert (spoilt - expected).abs().max() > 1


@pytest.mark.parametrize("images", [[], iter(())], ids=["list", "iterator"])
def test_no_batches_are_refused(model, images):
    with pytest.raises(ValueError, match="no images"):
        recalibrate(model, images)


def test_a_folded_network_is_refused(model):
    with pytest.raises(ValueError, match="no batch norm"):
        recalibrate(model.fuse(), batches(1))
