"""Latent codecs: images in [-1, 1] to the latents that the flow runs in, and back, in a table that is open from outside.

Built in: ``PixelCodec``, an invertible rearrangement of pixels (the identity at patch 1), and ``DCAECodec``, the deep
compression autoencoder DC-AE through diffusers (32x downsampling, the paper's choice).

Shapes: B batch, c image channels, (R, R) resolution, C latent channels, (H, W) latent size.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from latte_flow.model.errors import ArgumentError
from latte_flow.model.files import check_sizes, loading, locate
from latte_flow.model.tables import Entry, enter, look_up

SCALING_TOLERANCE = 1e-4


@dataclass(frozen=True)
class DCAEPreset:
    """A published DC-AE: where it is, and what its latents are multiplied by to have about unit variance."""

    checkpoint: str
    scaling_factor: float


# Both are f32c32 and load into the same network, but their latents differ in scale: a checkpoint is checked against the preset.
PRESETS = {
    "dc-ae-f32c32-in-1.0": DCAEPreset("mit-han-lab/dc-ae-f32c32-in-1.0-diffusers", 0.3189),
    "dc-ae-f32c32-sana-1.0": DCAEPreset("mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers", 0.41407),
}


def apply_preset(
    preset: str | None, path: str | Path | None, scaling_factor: float | None
) -> tuple[str | Path | None, float | None]:
    """Return the path and the scaling factor of a DC-AE, what is not given taken from a preset.

    Args:
        preset: a key of ``PRESETS``, or None.
        path: folder or hub id; None for the preset's.
        scaling_factor: None for the preset's.

    Raises:
        ArgumentError: when the preset is unknown, or another scaling factor than its own is given.
    """
    if preset is None:
        return path, scaling_factor
    if preset not in PRESETS:
        raise ArgumentError(f"preset: {preset!r} is unknown; accepted values: {', '.join(PRESETS)}")
    known = PRESETS[preset]
    if scaling_factor is not None and abs(scaling_factor - known.scaling_factor) > SCALING_TOLERANCE:
        raise ArgumentError(
            f"scaling_factor: {scaling_factor} contradicts preset {preset}, whose factor is {known.scaling_factor}"
        )
    return path if path is not None else known.checkpoint, known.scaling_factor


@dataclass(frozen=True)
class CodecSpec:
    """The settings of a codec. Each kind of codec uses those it needs.

    Attributes:
        path: folder or hub id of its checkpoint; None for the preset's.
        preset: a key of ``PRESETS``.
        scaling_factor: checked against the checkpoint's.
        image_channels: c.
        patch: side of a latent position in pixels.
    """

    path: str | Path | None = None
    preset: str | None = None
    scaling_factor: float | None = None
    image_channels: int = 3
    patch: int = 1


class LatentCodec(ModelMixin, ConfigMixin):
    """What training and sampling need of an autoencoder; diffusers saves and loads it as a component of a pipeline.

    Attributes:
        image_channels: c.
        latent_channels: C.
        downsampling: R / H.
        scaling_factor: what the autoencoder's latents are multiplied by.
    """

    config_name = "config.json"
    image_channels: int
    latent_channels: int
    downsampling: int
    scaling_factor: float = 1.0

    @classmethod
    def from_spec(cls, spec: CodecSpec, dtype: torch.dtype, *, meta: bool) -> "LatentCodec":
        """Build the codec in eval mode, its weights in ``dtype``.

        Args:
            spec: its settings.
            dtype: type of the weights.
            meta: build the weights on the meta device, without reading them.

        Raises:
            ArgumentError: when a setting is invalid; the message begins with its name.
        """
        raise NotImplementedError

    @classmethod
    def checkpoint(cls, spec: CodecSpec) -> str | Path | None:
        """Return the folder or hub id that ``from_spec`` reads, whose files a run records; None if it reads none."""
        return None

    @property
    def has_weights(self) -> bool:
        """Whether encoding computes with weights, so that their type matters."""
        return any(parameter.numel() for parameter in self.parameters())

    def to(self, *args, **kwargs) -> "LatentCodec":
        """Move or cast as torch does; diffusers' own would warn of modules to keep in float32 even where there are none."""
        return nn.Module.to(self, *args, **kwargs)

    def latent_size(self, resolution: int) -> tuple[int, int]:
        """Return (H, W) of the latent of a square image.

        Raises:
            ArgumentError: when the resolution is not a multiple of the downsampling.
        """
        if resolution < 1 or resolution % self.downsampling:
            raise ArgumentError(
                f"resolution: {resolution} is not a multiple of the codec's downsampling {self.downsampling}"
            )
        return resolution // self.downsampling, resolution // self.downsampling

    def encode(self, images: Tensor) -> Tensor:
        """Encode images [B, c, R, R] in [-1, 1] to latents [B, C, H, W]."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, H, W] to images [B, c, R, R]; values may leave [-1, 1] a little."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Return a text that two codecs share when they encode alike, whatever type their weights are loaded in."""
        raise NotImplementedError


CODECS: dict[str, type[LatentCodec]] = {}
"""Name (``codec.kind``) -> class of the codec."""


def register_codec(name: str) -> Callable[[Entry], Entry]:
    """Enter a subclass of ``LatentCodec`` into the table.

    Raises:
        ArgumentError: when the name is taken.
    """
    return partial(enter, CODECS, name)


@register_codec("pixel")
class PixelCodec(LatentCodec):
    """Space-to-depth: each patch x patch square of pixels becomes the channels of one latent position. Exactly invertible.

    Args:
        image_channels: 1 for grey images, 3 for colour.
        patch: side of the square; 1 is the identity.
    """

    @register_to_config
    def __init__(self, image_channels: int, patch: int = 1):
        super().__init__()
        self.image_channels = image_channels
        self.latent_channels = image_channels * patch**2
        self.downsampling = patch
        # diffusers and accelerate read a component's device and type from its parameters, and this one has no others.
        self.placement = nn.Parameter(torch.empty(0), requires_grad=False)

    @classmethod
    def from_spec(cls, spec: CodecSpec, dtype: torch.dtype, *, meta: bool) -> "PixelCodec":
        """See LatentCodec. It has no weights to leave out."""
        return cls(spec.image_channels, spec.patch).to(dtype).eval()

    def encode(self, images: Tensor) -> Tensor:
        p = self.downsampling
        return rearrange(images, "b c (h p) (w q) -> b (c p q) h w", p=p, q=p)

    def decode(self, latents: Tensor) -> Tensor:
        p = self.downsampling
        return rearrange(latents, "b (c p q) h w -> b c (h p) (w q)", p=p, q=p)

    def fingerprint(self) -> str:
        return f"pixel, {self.image_channels} channels, patch {self.downsampling}"

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Write config.json, which is all there is."""
        self.save_config(save_directory)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, torch_dtype: torch.dtype | None = None, **kwargs) -> "PixelCodec":
        """Build the codec of a saved config.json; diffusers' other arguments are about weights, and there are none."""
        return cls.from_config(cls.load_config(path)).to(torch_dtype or torch.float32).eval()


@register_codec("dc-ae")
class DCAECodec(LatentCodec):
    """DC-AE: diffusers' AutoencoderDC, its latents multiplied by the checkpoint's scaling factor.

    The encoder is deterministic. The model stays in eval mode: its decoder has BatchNorm, which would otherwise normalise by the
    batch at hand.

    Args:
        autoencoder: the diffusers model.
        scaling_factor: what latents are multiplied by; None for the checkpoint's own (0.3189 for in-1.0, 0.41407 for Sana's).

    Raises:
        ArgumentError: when ``scaling_factor`` contradicts the checkpoint's configuration.
    """

    def __init__(self, autoencoder: AutoencoderDC, scaling_factor: float | None = None):
        super().__init__()
        own = autoencoder.config.scaling_factor
        if scaling_factor is not None and abs(own - scaling_factor) > SCALING_TOLERANCE:
            raise ArgumentError(
                f"scaling_factor: {scaling_factor} differs from {own} in the checkpoint's config.json; latents scaled by "
                "another checkpoint's factor do not have unit variance"
            )
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.scaling_factor = own
        self.image_channels = autoencoder.config.in_channels
        self.latent_channels = autoencoder.config.latent_channels
        self.downsampling = autoencoder.spatial_compression_ratio

    @classmethod
    def from_spec(cls, spec: CodecSpec, dtype: torch.dtype, *, meta: bool) -> "DCAECodec":
        """See LatentCodec."""
        path, scaling_factor = apply_preset(spec.preset, spec.path, spec.scaling_factor)
        if path is None:
            raise ArgumentError(
                "path: missing; kind dc-ae needs a folder or hub id of a diffusers AutoencoderDC, or a preset "
                f"({', '.join(PRESETS)})"
            )
        if meta:
            with torch.device("meta"):
                return cls(AutoencoderDC.from_config(_read_settings(path)), scaling_factor)
        return cls.from_pretrained(path, scaling_factor=scaling_factor, torch_dtype=dtype)

    @classmethod
    def checkpoint(cls, spec: CodecSpec) -> str | Path | None:
        """See LatentCodec."""
        path, _ = apply_preset(spec.preset, spec.path, spec.scaling_factor)
        return path

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Write the autoencoder as diffusers does; its config.json has the scaling factor."""
        self.autoencoder.save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        scaling_factor: float | None = None,
        torch_dtype: torch.dtype | None = None,
        **kwargs,
    ) -> "DCAECodec":
        """Load a diffusers AutoencoderDC.

        Args:
            path: folder or hub id.
            scaling_factor: checked against the checkpoint's.
            torch_dtype: type of the weights; None for float32.
            kwargs: diffusers' own.

        Raises:
            ArgumentError: when it is missing, damaged, another model's, or lacks weights.
        """
        _read_settings(path)
        with loading(path):
            autoencoder, report = AutoencoderDC.from_pretrained(
                path, torch_dtype=torch_dtype or torch.float32, output_loading_info=True, **kwargs
            )
            if report["missing_keys"]:  # diffusers leaves these random and goes on
                raise ArgumentError(f"its weights lack {', '.join(report['missing_keys'][:3])}, ...")
        return cls(autoencoder, scaling_factor)

    def train(self, mode: bool = True) -> "DCAECodec":
        """Stay in eval mode whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.autoencoder.encode(images.to(self.autoencoder.dtype)).latent * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents.to(self.autoencoder.dtype) / self.scaling_factor).sample

    def fingerprint(self) -> str:
        """Return the SHA-256 of the encoder's weights, rounded to bfloat16, and of the scaling factor.

        Rounded, so that the type the weights are loaded in does not matter; of the encoder alone, because an autoencoder whose
        decoder was tuned has the same latents.
        """
        return weights_fingerprint(self.autoencoder.encoder, self.scaling_factor)


def weights_fingerprint(network: nn.Module, scaling_factor: float) -> str:
    """Return the SHA-256 of a network's weights, rounded to bfloat16, and of the factor its latents are multiplied by."""
    digest = hashlib.sha256(f"{scaling_factor:.6g}".encode())
    for name, weight in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        bits = weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16)
        digest.update(bits.numpy().tobytes())
    return digest.hexdigest()


def load_codec(kind: str, *, dtype: torch.dtype | None = None, meta: bool = False, **settings: Any) -> LatentCodec:
    """Build a codec in eval mode.

    Args:
        kind: a key of ``CODECS``.
        dtype: type of its weights; None for float32.
        meta: build it on the meta device, in float32: of a checkpoint only its config.json is read.
        settings: the fields of ``CodecSpec``.

    Raises:
        ArgumentError: when the kind is unknown, or the checkpoint is missing or another model's.
    """
    return look_up(CODECS, kind, "kind").from_spec(CodecSpec(**settings), dtype or torch.float32, meta=meta)


def codec_checkpoint(kind: str, **settings: Any) -> str | Path | None:
    """Return the folder or hub id that ``load_codec`` reads with these arguments; None if it reads none.

    Raises:
        ArgumentError: when the kind or the preset is unknown.
    """
    return look_up(CODECS, kind, "kind").checkpoint(CodecSpec(**settings))


def _read_settings(path: str | Path) -> dict:
    """Return the configuration of an AutoencoderDC.

    Raises:
        ArgumentError: when there is none, it is of another model, or see ``model.files.locate``.
    """
    path = locate(path)
    with loading(path):
        settings = AutoencoderDC.load_config(path)
        check_sizes(settings)
    if settings.get("_class_name") != AutoencoderDC.__name__:
        found = settings.get("_class_name")
        raise ArgumentError(f"path: cannot load {path}: it holds a {found}; accepted: an {AutoencoderDC.__name__}")
    return settings
