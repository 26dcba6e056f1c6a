from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from onestill.errors import CheckpointError
from onestill.networks.condition import Condition
from onestill.networks.contrastive import tokens
from onestill.networks.denoiser import Denoiser, load_unet, training_schedule
from onestill.train.discriminator.cnn import CNNFeatures
from onestill.train.discriminator.features import (
    FeatureNetwork,
    LatentFeatures,
    TeacherFeatures,
    TowerFeatures,
    ViTFeatures,
)
from tests.tiny import WIDTH
from tests.train.parts import CHANNELS, SIZE, write_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_parts(tmp_path_factory.mktemp("parts"))
    kind = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetModel(ResNetConfig(**kind)).save_pretrained(folder / "resnet")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4)).save_pretrained(folder / "vit")
    text = {**sizes, "vocab_size": 50, "max_position_embeddings": 16}
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 4})
    CLIPModel(config).save_pretrained(folder / "clip")
    (folder / "clip/preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 1]}')
    return folder


def said(seed: int = 0) -> Condition:
    text = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed))
    return Condition(text, torch.ones(2, 5, dtype=torch.bool))


def teacher_features(parts: Path) -> TeacherFeatures:
    teacher = load_unet(parts / "model/unet").eval().requires_grad_(False)
    return TeacherFeatures(Denoiser(teacher, training_schedule()))


def networks(parts: Path) -> list[tuple[FeatureNetwork, torch.Tensor]]:
    latents = torch.randn(3, CHANNELS, SIZE, SIZE)
    return [
        (TowerFeatures(parts / "latents", (0, 1, 3)), latents),
        (TowerFeatures(parts / "pixels", (0, 2, 4)), torch.randn(3, 3, 32, 32)),
        (teacher_features(parts), latents),
        (LatentFeatures(CHANNELS), latents),
        (ViTFeatures(parts / "dinov2", (0, 1, 2), 24), torch.rand(3, 3, 32, 32) * 2 - 1),
        (ViTFeatures(parts / "vit", (2,), 16, add_class_token=False), torch.rand(3, 3, 12, 12) * 2 - 1),
        (ViTFeatures(parts / "clip", (0, 2), 32), torch.rand(3, 3, 32, 32) * 2 - 1),
        (CNNFeatures(parts / "lite0", ("stages.1", "stages.4")), torch.rand(3, 3, 32, 32) * 2 - 1),
        (CNNFeatures(parts / "resnet", ("encoder.stages.0", "encoder.stages.1"), 32), torch.rand(3, 3, 64, 64) * 2 - 1),
    ]


def test_features_are_tokens_on_a_square_grid_of_the_widths_told(parts: Path) -> None:
    for network, x in networks(parts):
        found = network.features(x)
        assert [one.shape[-1] for one in found] == list(network.widths)
        for one in found:
            assert one.shape[0] == 3
            assert int(one.shape[1] ** 0.5) ** 2 == one.shape[1]
        assert network.embed(x).shape == (3, network.embedding_width)


def test_gradients_flow_through_to_the_input_and_stay_out_of_the_weights(parts: Path) -> None:
    for network, x in networks(parts):
        if isinstance(network, LatentFeatures):
            continue  # it has no weights
        inner = next(
            getattr(network, name) for name in ("tower", "model", "network", "denoiser") if hasattr(network, name)
        )
        inner = getattr(inner, "unet", inner)
        before = {name: value.clone() for name, value in inner.state_dict().items()}
        x = x.clone().requires_grad_()
        sum(one.square().sum() for one in network.features(x)).backward()  # type: ignore[union-attr]
        assert x.grad is not None
        assert x.grad.abs().sum() > 0
        assert not inner.training
        assert all(not module.training for module in inner.modules())
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in inner.parameters())
        assert all(torch.equal(value, before[name]) for name, value in inner.state_dict().items())


def test_a_sample_does_not_see_its_batch(parts: Path) -> None:
    for network, x in networks(parts):
        alone = network.features(x[:1])
        for together, single in zip(network.features(x), alone, strict=True):
            torch.testing.assert_close(together[:1], single, rtol=1e-4, atol=1e-4)


def test_the_teachers_features_follow_noise_and_words(parts: Path) -> None:
    features, latents = teacher_features(parts), torch.randn(2, CHANNELS, SIZE, SIZE)
    noise, text = torch.randn_like(latents), said()
    at = torch.tensor([100, 100])
    base = features.noised_features(latents, at, noise, text)[-1]
    assert not torch.allclose(base, features.noised_features(latents, at + 300, noise, text)[-1])
    assert not torch.allclose(base, features.noised_features(latents, at, noise, said(1))[-1])
    pure = torch.tensor([999, 999])  # zero terminal SNR: nothing of the latents is left
    one, other = (features.noised_features(x, pure, noise, text)[-1] for x in (latents, latents + 1))
    assert torch.equal(one, other)


def test_the_teachers_encoder_is_the_unets_own(parts: Path) -> None:
    features = teacher_features(parts)
    unet, seen = features.denoiser.unet, []
    hook = unet.mid_block.register_forward_hook(lambda _m, _i, output: seen.append(output))
    latents, text = torch.randn(2, CHANNELS, SIZE, SIZE), said()
    at = torch.tensor([10, 400])
    found = features.noised_features(latents, at, torch.zeros_like(latents), text)
    alpha, _ = features.denoiser.signal(at)
    unet(alpha * latents, at, text.text)
    hook.remove()
    torch.testing.assert_close(tokens(seen[1]), found[-1])


def test_layers_that_are_not_there(parts: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has layers 0 to 3, not \[4\]"):
        TowerFeatures(parts / "latents", (4,))


def test_a_vit_sees_what_transformers_shows_it(parts: Path) -> None:
    """Pictures in [-1, 1] are normalised as the folder says; features are its hidden states without the class token."""
    clip = ViTFeatures(parts / "clip", (2,), 16, add_class_token=False)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    pixels = torch.cat([x[:, :2], x[:, 2:] / 2], 1)  # ((x + 1) / 2 - 0.5) / (0.5, 0.5, 1)
    with torch.no_grad():
        output = clip.model(pixel_values=pixels, output_hidden_states=True)
        torch.testing.assert_close(clip.features(x)[0], output.hidden_states[2][:, 1:])
        added = ViTFeatures(parts / "clip", (2,), 16).features(x)[0]
        torch.testing.assert_close(added, output.hidden_states[2][:, 1:] + output.hidden_states[2][:, :1])
        torch.testing.assert_close(clip.embed(x), output.pooler_output)
        dinov2 = ViTFeatures(parts / "dinov2", (), 16)
        pixels = ((x + 1) / 2 - dinov2._mean) / dinov2._deviation
        torch.testing.assert_close(dinov2.embed(x), dinov2.model(pixel_values=pixels).last_hidden_state[:, 0])


def test_what_is_no_vit(parts: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no vision transformer"):
        ViTFeatures(parts / "model/unet", (0,), 16)
    with pytest.raises(CheckpointError, match=r"has layers 0 to 2, not \[5\]"):
        ViTFeatures(parts / "dinov2", (5,), 16)
    with pytest.raises(CheckpointError, match="is no multiple"):
        ViTFeatures(parts / "dinov2", (0,), 18)


def test_each_of_the_teachers_levels_is_tapped_before_the_grid_is_halved(parts: Path) -> None:
    network = teacher_features(parts)
    blocks = network.denoiser.unet.down_blocks
    fine = [SIZE // 2 ** sum(block.downsamplers is not None for block in blocks[:k]) for k in range(len(blocks))]
    counts = [one.shape[1] for one in network.features(torch.randn(1, CHANNELS, SIZE, SIZE))]
    assert counts == [side * side for side in (*fine, fine[-1])]
    assert counts[0] == SIZE * SIZE > counts[-1]


def test_a_stage_that_is_not_there_is_named(parts: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no stage 'stages\.9': choose cnn_stages from stages\.0"):
        CNNFeatures(parts / "lite0", ("stages.9",))
    with pytest.raises(CheckpointError, match="gives no map"):
        CNNFeatures(parts / "dinov2", ("embeddings",), 16)


def test_a_folder_without_a_cnn_is_one_sentence(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no whole convolutional network"):
        CNNFeatures(tmp_path, ("stages.1",))
    shutil.copytree(parts / "lite0", tmp_path / "cut")
    (tmp_path / "cut/model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="holds no whole convolutional network"):
        CNNFeatures(tmp_path / "cut", ("stages.1",))


def test_a_smaller_view_is_the_mean_of_the_pixels(parts: Path) -> None:
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    whole = CNNFeatures(parts / "lite0", ("stages.2",), 32).features(x)
    halved = CNNFeatures(parts / "lite0", ("stages.2",)).features(torch.nn.functional.avg_pool2d(x, 2))
    assert torch.allclose(whole[0], halved[0], atol=1e-5)
