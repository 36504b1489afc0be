"""Codecs: pixels rearranged as torch does it, DC-AE as diffusers computes it."""

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from latte_flow.model.codecs import DCAECodec, PixelCodec, load_codec

SCALING_FACTOR = 0.3189


def tiny_autoencoder(scaling_factor: float = SCALING_FACTOR) -> AutoencoderDC:
    """A random DC-AE of the real one's kinds of blocks: 4x downsampling, batch norm in the decoder."""
    torch.manual_seed(0)
    model = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(0, 1, 1),
        decoder_layers_per_block=(0, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        upsample_block_type="pixel_shuffle",
        downsample_block_type="pixel_unshuffle",
        decoder_norm_types=("batch_norm", "batch_norm", "rms_norm"),
        decoder_act_fns=("relu", "relu", "silu"),
        scaling_factor=scaling_factor,
    )
    # Running statistics unlike any batch's: eval and train mode differ visibly.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dc_ae")
    tiny_autoencoder().save_pretrained(folder)
    return folder


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


class TestPixelCodec:
    @given(
        channels=st.integers(1, 4), patch=st.integers(1, 5), height=st.integers(1, 4), width=st.integers(1, 4),
        batch=st.integers(1, 3),
    )  # fmt: skip
    def test_decoding_inverts_encoding_exactly(self, channels, patch, height, width, batch):
        codec = PixelCodec(channels, patch)
        x = images(batch, channels, height * patch, width * patch)
        latents = codec.encode(x)
        assert latents.shape == (batch, codec.latent_channels, height, width)
        assert torch.equal(codec.decode(latents), x)
        assert torch.equal(codec.encode(codec.decode(latents)), latents)

    @pytest.mark.parametrize("patch", [1, 2, 4])
    def test_channels_are_ordered_as_torchs_pixel_unshuffle(self, patch):
        x = images(2, 3, 8, 8)
        codec = PixelCodec(3, patch)
        assert torch.equal(codec.encode(x), torch.nn.functional.pixel_unshuffle(x, patch))
        assert torch.equal(codec.decode(codec.encode(x)), torch.nn.functional.pixel_shuffle(codec.encode(x), patch))

    def test_patch_one_is_the_identity(self):
        x = images(2, 1, 8, 8)
        assert torch.equal(load_codec("pixel", image_channels=1).encode(x), x)

    def test_latent_size(self):
        assert PixelCodec(3, 4).latent_size(64) == (16, 16)

    @pytest.mark.parametrize("resolution", [62, 0, -4])
    def test_a_resolution_that_does_not_divide_is_refused(self, resolution):
        with pytest.raises(ValueError, match=rf"^resolution: {resolution} is not a multiple .* downsampling 4"):
            PixelCodec(3, 4).latent_size(resolution)


class TestDCAE:
    def test_equals_diffusers_times_the_scaling_factor(self, folder):
        codec, theirs = load_codec("dc-ae", path=folder), AutoencoderDC.from_pretrained(folder).eval()
        x = images(2, 3, 16, 16)
        with torch.no_grad():
            latents = theirs.encode(x).latent
            decoded = theirs.decode(latents).sample
        torch.testing.assert_close(codec.encode(x), latents * SCALING_FACTOR, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(codec.decode(latents * SCALING_FACTOR), decoded, rtol=1e-5, atol=1e-5)
        assert latents.abs().max() > 1e-2

    def test_says_its_shapes(self, folder):
        codec = load_codec("dc-ae", path=folder)
        assert (codec.image_channels, codec.latent_channels, codec.downsampling) == (3, 4, 4)
        assert codec.encode(images(1, 3, 16, 16)).shape == (1, 4, *codec.latent_size(16))

    @pytest.mark.parametrize("inside_a_module", [False, True])
    def test_stays_in_eval_mode(self, folder, inside_a_module):
        """In train mode the decoder's batch norm would make an image depend on its neighbours in the batch."""
        codec = load_codec("dc-ae", path=folder)
        (torch.nn.ModuleList([codec]) if inside_a_module else codec).train()
        assert not any(module.training for module in codec.modules())
        latents = images(3, 4, 4, 4)
        torch.testing.assert_close(codec.decode(latents)[:1], codec.decode(latents[:1]), rtol=1e-4, atol=1e-5)
        before = {name: x.clone() for name, x in codec.autoencoder.named_buffers()}
        codec.decode(latents)
        assert all(torch.equal(x, before[name]) for name, x in codec.autoencoder.named_buffers())

    def test_is_frozen(self, folder):
        codec = load_codec("dc-ae", path=folder)
        assert not any(p.requires_grad for p in codec.parameters())
        assert not codec.encode(images(1, 3, 16, 16).requires_grad_()).requires_grad

    def test_weights_are_float32_or_as_asked(self, folder):
        assert {p.dtype for p in load_codec("dc-ae", path=folder).parameters()} == {torch.float32}
        half = load_codec("dc-ae", path=folder, dtype=torch.bfloat16)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        assert half.encode(images(1, 3, 16, 16)).dtype == torch.bfloat16  # float32 images are cast

    @pytest.mark.parametrize("stated", [SCALING_FACTOR, SCALING_FACTOR + 5e-5, None])
    def test_takes_the_checkpoints_scaling_factor(self, folder, stated):
        assert load_codec("dc-ae", path=folder, scaling_factor=stated).scaling_factor == SCALING_FACTOR

    def test_another_checkpoints_scaling_factor_is_refused(self, folder):
        with pytest.raises(ValueError, match=r"^scaling_factor: 0.41407 differs from 0.3189"):
            load_codec("dc-ae", path=folder, scaling_factor=0.41407)
        assert DCAECodec(tiny_autoencoder(0.41407), 0.41407).scaling_factor == 0.41407


class TestErrors:
    def test_unknown_kind(self):
        with pytest.raises(ValueError, match=r"^kind: 'vae' is unknown; accepted values: pixel, dc-ae"):
            load_codec("vae")

    def test_no_path(self):
        with pytest.raises(ValueError, match=r"^path: missing"):
            load_codec("dc-ae")

    def test_a_path_that_is_not_there(self, tmp_path):
        missing = tmp_path / "nothing"
        with pytest.raises(ValueError, match=rf"^path: cannot load {missing}"):
            load_codec("dc-ae", path=missing)

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(ValueError, match=rf"^path: cannot load {tmp_path}"):
            load_codec("dc-ae", path=tmp_path)

    def test_another_kind_of_autoencoder(self, tmp_path):
        AutoencoderKL(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"^path: .*AutoencoderKL.*accepted"):
            load_codec("dc-ae", path=tmp_path)

    def test_a_folder_without_weights(self, folder, tmp_path):
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        with pytest.raises(ValueError, match=rf"^path: cannot load {tmp_path}"):
            load_codec("dc-ae", path=tmp_path)

    def test_damaged_weights(self, folder, tmp_path):
        for file in folder.iterdir():
            content = file.read_bytes()
            (tmp_path / file.name).write_bytes(content if file.suffix == ".json" else content[: len(content) // 2])
        with pytest.raises(ValueError, match=rf"^path: cannot load {tmp_path}"):
            load_codec("dc-ae", path=tmp_path)

    def test_weights_of_another_shape(self, folder, tmp_path):
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = (tmp_path / "config.json").read_text()
        (tmp_path / "config.json").write_text(config.replace('"latent_channels": 4', '"latent_channels": 8'))
        with pytest.raises(ValueError, match=rf"^path: cannot load {tmp_path}"):
            load_codec("dc-ae", path=tmp_path)

    def test_weights_that_lack_a_part(self, folder, tmp_path):
        """diffusers would leave that part random and only warn."""
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        name = "diffusion_pytorch_model.safetensors"
        weights = load_file(folder / name)
        save_file({key: x for key, x in weights.items() if not key.startswith("decoder.conv_in")}, tmp_path / name)
        with pytest.raises(ValueError, match=rf"^path: cannot load {tmp_path}: .*decoder.conv_in"):
            load_codec("dc-ae", path=tmp_path)
