"""Statistics of what convolutions read, against slow answers."""

import pytest
import torch
from test_rewrite import BLOCKS, image, lively, spec_of

from utils.pruning import activations
from utils.pruning.activations import constant_inputs, expected_inputs, measure_inputs
from utils.pruning.channel_groups import find_channel_groups


@pytest.mark.parametrize(("rows", "sources"), BLOCKS.values(), ids=BLOCKS)
def test_measured_statistics(rows, sources, monkeypatch):
    """All pixels of all batches: NumPy's mean and covariance of what the hooks saw."""
    monkeypatch.setattr(activations, "PIXELS_PER_IMAGE", 10**9)
    model = lively(spec_of(rows, sources))
    found = find_channel_groups(model, "group")
    seen = {path: [] for path in found.inputs}
    hooks = [
        model.model.get_submodule(path).register_forward_pre_hook(
            lambda _, inputs, path=path: seen[path].append(inputs[0].transpose(0, 1).flatten(1))
        )
        for path in found.inputs
    ]
    batches = [image(seed=3), image(32, seed=4)]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    measured = measure_inputs(model, found, batches)
    assert measured.keys() == found.inputs.keys()
    for path, parts in seen.items():
        pixels = torch.cat(parts, 1)
        torch.testing.assert_close(measured[path].mean, pixels.mean(1), rtol=1e-4, atol=1e-5)
        covariance = torch.cov(pixels, correction=0).reshape(len(pixels), -1)
        torch.testing.assert_close(measured[path].covariance, covariance, rtol=1e-3, atol=1e-5)
        assert torch.equal(measured[path].variance, measured[path].covariance.diagonal().clamp(0))


def test_a_sample_of_the_pixels_is_the_same_every_time(monkeypatch):
    monkeypatch.setattr(activations, "PIXELS_PER_IMAGE", 50)
    model = lively(spec_of(*BLOCKS["SPPF"]))
    found = find_channel_groups(model, "group")
    first, second = (measure_inputs(model, found, [image()]) for _ in range(2))
    other = measure_inputs(model, found, [image()], seed=1)
    assert all(torch.equal(first[path].mean, second[path].mean) for path in first)
    assert any(not torch.equal(first[path].mean, other[path].mean) for path in first)


def test_no_images():
    model = lively(spec_of(*BLOCKS["SPPF"]))
    with pytest.raises(ValueError, match="no images"):
        measure_inputs(model, find_channel_groups(model), [])


def test_expected_statistics_of_a_sum():
    """A Monte Carlo answer for the input of a bottleneck's reader: two summands."""
    model = lively(spec_of(*BLOCKS["bottleneck row"]))
    found = find_channel_groups(model, "group")
    assert [term.path for term in found.terms["2"]] == ["0", "1.cv2"]
    generator = torch.Generator().manual_seed(0)
    total = 0
    for term in found.terms["2"]:
        bn = model.model.get_submodule(term.path).bn
        z = torch.randn(16, 400_000, generator=generator, dtype=torch.float64)
        total = total + torch.nn.functional.silu(bn.bias[:, None] + bn.weight[:, None] * z)
    expected = expected_inputs(model, found)["2"]
    torch.testing.assert_close(expected.mean, total.mean(1).detach(), rtol=0, atol=0.01)
    torch.testing.assert_close(expected.variance, total.var(1).detach(), rtol=0.02, atol=0.01)
    assert expected.covariance is None


def test_constants_lie_where_the_concat_puts_them():
    model = lively(spec_of(*BLOCKS["upsample and concat"]))
    found = find_channel_groups(model, "group")
    silu = torch.nn.functional.silu
    first, second = (silu(model.model[n].bn.bias.detach()) for n in (1, 0))
    constants = constant_inputs(model, found)
    torch.testing.assert_close(constants["4"], torch.cat([first, second]))
    assert not constants["0"].any()
