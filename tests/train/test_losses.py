from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from onestill.networks.denoiser import training_schedule
from onestill.schedule import NoiseSchedule, add_noise, scaled_linear_alphas_cumprod, to_eps, to_x0
from onestill.train.losses import (
    boundary_scalings,
    distillation,
    exponential_weight,
    gradient_difference,
    hinge_discriminator,
    hinge_fake,
    hinge_generator,
    info_nce,
    min_snr_weight,
    nfsd_direction,
    pseudo_huber,
    r1,
    score_target,
    sds_weight,
    unit_moments,
)
from onestill.train.methods.contrastive import same_captions


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_hinge_is_summed_over_heads_and_averaged_within() -> None:
    real = [torch.tensor([[2.0, 0.0]]), torch.tensor([[-1.0]])]
    fake = [torch.tensor([[-3.0, 1.0]]), torch.tensor([[0.5]])]
    # head 1: (0 + 1)/2 + (0 + 2)/2, head 2: 2 + 1.5
    assert hinge_discriminator(real, fake).item() == pytest.approx(0.5 + 1 + 2 + 1.5)
    assert hinge_generator(fake).item() == pytest.approx(1 - 0.5)


def test_hinge_pushes_only_what_is_inside_the_margin() -> None:
    real, fake = torch.tensor([0.0, 2.0], requires_grad=True), torch.tensor([0.0, -2.0], requires_grad=True)
    hinge_discriminator([real], [fake]).backward()
    assert real.grad is not None
    assert fake.grad is not None
    assert real.grad.tolist() == [-0.5, 0.0]
    assert fake.grad.tolist() == [0.5, 0.0]


def test_r1_of_a_constant_head_is_zero() -> None:
    feature = noise(3, 4, 5).requires_grad_()
    constant = nn.Linear(5, 1)
    nn.init.zeros_(constant.weight)
    unconnected = nn.Parameter(torch.ones(3, 4)) * 2
    assert r1([feature], [constant(feature).squeeze(-1)]).item() == 0
    assert r1([feature], [unconnected]).item() == 0
    assert r1([feature], [torch.ones(3, 4)]).item() == 0


def test_r1_of_linear_heads_is_exact() -> None:
    """D = mean over N tokens of w.f: each token's gradient is w/N, the squared norm over a sample ||w||^2 / N."""
    features = [noise(3, 4, 5).requires_grad_(), noise(3, 9, 2, seed=1).requires_grad_()]
    heads = [nn.Linear(5, 1), nn.Linear(2, 1)]
    penalty = r1(features, [head(f).squeeze(-1) for head, f in zip(heads, features, strict=True)])
    expected = sum(head.weight.square().sum().item() / f.shape[1] for head, f in zip(heads, features, strict=True))
    assert penalty.item() == pytest.approx(expected, rel=1e-5)


def test_r1_trains_the_head_and_nothing_below_it() -> None:
    below, head = nn.Linear(6, 5), nn.Linear(5, 1)
    x = noise(3, 4, 6).requires_grad_()
    feature = below(x).detach().requires_grad_()
    r1([feature], [head(feature).square().squeeze(-1)]).backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().sum() > 0
    assert below.weight.grad is None
    assert x.grad is None


def test_sds_weight_gives_the_score_distillation_gradient() -> None:
    """The gradient of Eq. 4 is eps_hat - eps', as the difference of the x0s is (sigma / alpha) (eps_hat - eps')."""
    schedule = training_schedule()
    x_theta = noise(2, 3, 2, 2).double().requires_grad_()
    eps, output = noise(2, 3, 2, 2, seed=1).double(), noise(2, 3, 2, 2, seed=2).double()
    for t in (20, 499, 980):
        alpha, sigma = float(schedule.alpha[t]), float(schedule.sigma[t])
        x_t = add_noise(x_theta.detach(), eps, alpha, sigma)
        x_psi = to_x0(output, x_t, alpha, sigma, "v_prediction")
        eps_hat = to_eps(output, x_t, alpha, sigma, "v_prediction")
        torch.testing.assert_close(x_theta.detach() - x_psi, sigma / alpha * (eps_hat - eps))
        weight = sds_weight(torch.tensor([alpha] * 2).double(), torch.tensor([sigma] * 2).double(), w=0.7)
        (gradient,) = torch.autograd.grad(distillation(x_theta, x_psi, weight), x_theta)
        torch.testing.assert_close(gradient * x_theta.numel(), 0.7 * (eps_hat - eps), rtol=1e-6, atol=1e-6)


def test_nfsd_direction_is_its_definition() -> None:
    text, empty, negative = (noise(4, 2, 1, 1, seed=i) for i in range(3))
    made = nfsd_direction(text, empty, negative, torch.tensor([0, 199, 200, 999]), 7.5)
    torch.testing.assert_close(made[:2], empty[:2] + 7.5 * (text - empty)[:2])
    torch.testing.assert_close(made[2:], (empty - negative)[2:] + 7.5 * (text - empty)[2:])


def test_score_target_with_the_teachers_noise_is_the_teachers_x0() -> None:
    schedule = training_schedule()
    x_theta, eps, output = (noise(2, 3, 2, 2, seed=i).double() for i in range(3))
    for t in (20, 499, 980):
        alpha, sigma = torch.tensor(schedule.alpha[t]), torch.tensor(schedule.sigma[t])
        x_t = add_noise(x_theta, eps, alpha, sigma)
        direction = to_eps(output, x_t, alpha, sigma, "v_prediction") - eps
        expected = to_x0(output, x_t, alpha, sigma, "v_prediction")
        torch.testing.assert_close(score_target(x_theta, direction, alpha, sigma), expected)


def test_hinge_fake_counts_only_what_is_kept() -> None:
    fake = [torch.tensor([[1.0, -3.0], [5.0, 5.0]]), torch.tensor([[0.0], [7.0]])]
    assert hinge_fake(fake, torch.tensor([True, False])).item() == pytest.approx(2 / 2 + 1)
    assert hinge_fake(fake, torch.tensor([False, False])).item() == 0


def test_boundary_scalings_are_those_of_the_released_scheduler() -> None:
    from diffusers import LCMScheduler

    t = torch.tensor([0, 1, 19, 259, 999])
    c_skip, c_out = boundary_scalings(t)
    scheduler = LCMScheduler()
    expected = [scheduler.get_scalings_for_boundary_condition_discrete(int(one)) for one in t]
    torch.testing.assert_close(c_skip, torch.tensor([float(a) for a, _ in expected]))
    torch.testing.assert_close(c_out, torch.tensor([float(b) for _, b in expected]))
    assert (c_skip[0], c_out[0]) == (1.0, 0.0)  # f(x, 0) = x


def test_pseudo_huber_is_square_near_and_absolute_far() -> None:
    assert pseudo_huber(torch.zeros(3), torch.zeros(3), 0.1).item() == pytest.approx(0, abs=1e-7)
    assert pseudo_huber(torch.full((2,), 0.01), torch.zeros(2), 1.0).item() == pytest.approx(0.01**2 / 2, rel=1e-2)
    assert pseudo_huber(torch.full((2,), 100.0), torch.zeros(2), 1e-3).item() == pytest.approx(100, rel=1e-3)


def test_x0_at_the_last_timestep() -> None:
    """v at zero terminal SNR: x0 = -v. eps on Stable Diffusion's table: (x - sigma eps) / alpha, errors times 14.6."""
    zero_snr, plain = training_schedule(), NoiseSchedule(scaled_linear_alphas_cumprod())
    x, output = noise(2, 3, 2, 2).double(), noise(2, 3, 2, 2, seed=1).double()
    torch.testing.assert_close(zero_snr.x0(output, x, 999), -output)
    alpha, sigma = plain.at(999)
    torch.testing.assert_close(plain.x0(output, x, 999), (x - sigma * output) / alpha)
    shifted = plain.x0(output + 0.01, x, 999) - plain.x0(output, x, 999)
    torch.testing.assert_close(shifted, torch.full_like(shifted, -0.01 * 14.6146), rtol=1e-4, atol=0)


def test_distillation_weighs_samples_and_stops_at_the_target() -> None:
    x_theta, x_psi = torch.zeros(2, 3, requires_grad=True), torch.tensor([[1.0, 1, 1], [2.0, 2, 2]], requires_grad=True)
    loss = distillation(x_theta, x_psi, torch.tensor([0.5, 0.25]))
    assert loss.item() == pytest.approx((0.5 * 1 + 0.25 * 4) / 2)
    loss.backward()
    assert x_psi.grad is None


def test_exponential_weight_is_alpha_not_its_square() -> None:
    schedule = training_schedule()
    alpha = torch.tensor(schedule.alpha)
    assert torch.equal(exponential_weight(alpha), alpha)
    assert exponential_weight(alpha)[999] == 0


def test_min_snr_weight() -> None:
    weights = min_snr_weight(torch.tensor([0.0, 1.0, 5.0, 15.0]), 5.0)
    assert weights.tolist() == pytest.approx([0.0, 1 / 2, 5 / 6, 5 / 16])


def test_gradient_difference_sees_edges_not_brightness() -> None:
    x = noise(2, 3, 8, 8)
    assert gradient_difference(x, x + 0.7).item() == pytest.approx(0, abs=1e-6)
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    # A ramp of slope 1 across, 0 down; its halvings have slopes 2 and 4.
    assert gradient_difference(ramp, torch.zeros_like(ramp)).item() == pytest.approx((1 + 2 + 4) / 3)


def test_unit_moments_is_the_divergence_from_a_unit_gaussian() -> None:
    values = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    assert unit_moments(values).item() == pytest.approx(0)
    assert unit_moments(3 * values + 2).item() == pytest.approx(0.5 * (4 + 9 - 1 - math.log(9)))
    assert math.isfinite(unit_moments(torch.ones(2, 1, 1, 1)).item())


def test_info_nce() -> None:
    image = torch.eye(3)
    none = torch.zeros(3, 3, dtype=torch.bool)
    expected = math.log(math.exp(2) + 2) - 2
    assert info_nce(image, image, torch.tensor(2.0), none).item() == pytest.approx(expected, rel=1e-5)
    assert info_nce(image, image[[1, 0, 2]], torch.tensor(2.0), none).item() > expected


def test_info_nce_does_not_hold_equal_captions_apart() -> None:
    captions = ["a heart", "a star", "a heart"]
    same = same_captions(captions)
    assert same.nonzero().tolist() == [[0, 2], [2, 0]]
    hearts = torch.eye(2)[[0, 1, 0]]
    scale = torch.tensor(100.0)
    assert info_nce(hearts, hearts, scale, same).item() == pytest.approx(0, abs=1e-6)
    held_apart = info_nce(hearts, hearts, scale, torch.zeros_like(same)).item()
    assert held_apart == pytest.approx(2 / 3 * math.log(2), rel=1e-3)
