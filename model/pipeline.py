"""LatteFlowPipeline: prompts to pictures, pictures and questions to answers, as a pipeline of diffusers."""

import reprlib
import sys
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from transformers import ImageProcessingMixin, PreTrainedModel, PreTrainedTokenizerBase

from latte_flow.model.backbone import load_vlm, read_vlm_config
from latte_flow.model.codecs import LatentCodec
from latte_flow.model.context import Context, encode_context, message_ids, tokenize_prompts, truncate_prompts
from latte_flow.model.errors import ArgumentError
from latte_flow.model.files import copy_settings, locate, read_json
from latte_flow.model.images import to_uint8
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.position import float32_positions
from latte_flow.model.sampling import image_seeds, initial_noise, sample_latents
from latte_flow.model.settings import MAX_CHARACTERS, PromptSettings, locate_saved, portable_path, read_settings

LENGTH_MULTIPLE = 32
"""Prompts are padded to a multiple of this, so that an image does not depend on the other prompts of its batch, as long as the
longest of them lies in the same multiple. Beyond it images in bfloat16 differ by its rounding."""
COMPONENTS: dict[str, type] = {
    "model": LatteFlowModel,
    "tokenizer": PreTrainedTokenizerBase,
    "codec": LatentCodec,
    "vlm": PreTrainedModel,
    "image_processor": ImageProcessingMixin,
}
"""Folder of a saved pipeline -> base class of what is loaded from it."""
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class LatteFlowPipeline(DiffusionPipeline):
    """Generates images from prompts or classes, and answers questions about images.

    Saving, loading, devices, types, progress bars and ``enable_model_cpu_offload`` are diffusers' own. Where its base class does
    not fit, this class differs:

    - A frozen VLM that has a path of its own (``vlm_path``) is saved by reference: it has gigabytes, and all pipelines trained
      beside it share them. ``from_pretrained`` loads it from there and checks its fingerprint, unless it is given ``vlm=``.
    - ``from_pretrained`` takes a folder alone: diffusers' downloader refuses components whose classes are neither its own nor
      transformers'. Download a hub repository with ``huggingface_hub.snapshot_download`` first.
    - Components run by other methods than ``forward``, which accelerate's hooks do not see: they are called here (``_onload``).
      ``enable_sequential_cpu_offload``, which hooks every submodule, is not supported for the same reason.

    A run's checkpoints and the folders of tools/convert_checkpoint.py have another layout, made for training and for weights of
    any format: ``latte_flow.load_pipeline`` reads these, and what this class saves.

    Args:
        model: the network. Its mode is left alone: the loaders return it in eval mode.
        tokenizer: the VLM's.
        codec: from latents to images.
        vlm: the VLM that a Couple model reads prompts with; None for a Blend, which holds its own.
        image_processor: the VLM's, for questions about pictures; None where the VLM came without one.
        prompt_template and all that follow: see model.settings.PromptSettings.

    Raises:
        ArgumentError: when a Blend is given a VLM beside its own, or a setting is not accepted.
    """

    model_cpu_offload_seq = "vlm->model->codec"
    _optional_components: ClassVar[list[str]] = ["vlm", "image_processor"]

    def __init__(
        self,
        model: LatteFlowModel,
        tokenizer,
        codec: LatentCodec,
        vlm: PreTrainedModel | None = None,
        image_processor=None,
        prompt_template: str = "{}",
        null_prompt: str = "",
        max_prompt_tokens: int | None = None,
        class_names: list[str] | None = None,
        vlm_path: str | None = None,
        vlm_fingerprint: str | None = None,
    ):
        super().__init__()
        if vlm is not None and model.config.variant == "blend":
            raise ArgumentError("vlm: given; accepted: None, for a Blend model holds its own")
        self.register_modules(model=model, tokenizer=tokenizer, codec=codec, vlm=vlm, image_processor=image_processor)
        settings = {
            "prompt_template": prompt_template,
            "null_prompt": null_prompt,
            "max_prompt_tokens": max_prompt_tokens,
            "class_names": class_names,
            "vlm_path": vlm_path,
            "vlm_fingerprint": vlm_fingerprint,
        }
        read_settings(PromptSettings, settings)
        self.register_to_config(**settings)

    def to(self, *args, **kwargs) -> "LatteFlowPipeline":
        """Move or cast the components as diffusers does; positions stay in float32 (``model.position.float32_positions``)."""
        with float32_positions(self.vlm or self.model):
            return super().to(*args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Save as diffusers does: model_index.json and a folder a component; a VLM that has a path of its own by reference.

        No absolute path is written: ``vlm_path`` becomes a hub id, or ``../NAME``, a folder beside the saved one.

        Raises:
            ArgumentError: when the folder holds something that is no saved pipeline, whose files would be mixed with these.
        """
        folder = Path(save_directory)
        if folder.is_dir() and any(folder.iterdir()) and not (folder / self.config_name).is_file():
            raise ArgumentError(
                f"{folder}: holds something else than a saved pipeline; accepted: a new or empty folder"
            )
        vlm, path = self.vlm, self.config.vlm_path
        if path is not None:
            self.register_modules(vlm=None)
            self.register_to_config(vlm_path=portable_path(path))
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.register_modules(vlm=vlm)
            self.register_to_config(vlm_path=path)
        for file in (folder / self.config_name, *folder.glob("*/*config.json")):
            copy_settings(file, file)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "LatteFlowPipeline":
        """Load a folder that ``save_pretrained`` wrote.

        Args:
            pretrained_model_name_or_path: the folder.
            kwargs: diffusers' own: ``dtype`` of the networks, components and settings that take the place of saved ones.

        Raises:
            FileNotFoundError: when there is no model_index.json.
            ArgumentError: when model_index.json names a class or a setting that is not a pipeline's, a file leads out of the
                folder, weights are not of the network, or the VLM at ``vlm_path`` is missing or not the one that it was trained
                with.
        """
        folder = Path(pretrained_model_name_or_path)
        index = folder / cls.config_name
        if not index.is_file():
            raise FileNotFoundError(
                f"{index} not found; accepted: a folder of save_pretrained; "
                "latte_flow.load_pipeline opens runs and converted checkpoints"
            )
        read_json(index, _check_index)
        _check_components(folder)
        pipeline = super().from_pretrained(str(folder), **kwargs)
        path = pipeline.config.vlm_path
        if path is not None and pipeline.model.config.variant == "couple" and "vlm" not in kwargs:
            dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
            if isinstance(dtype, dict):
                dtype = dtype.get("vlm", dtype.get("default"))
            if "vlm_path" not in kwargs:
                path = locate_saved(path, folder, "vlm_path, or vlm")
            expected = pipeline.config.vlm_fingerprint
            vlm, _ = load_vlm(path, dtype or torch.float32, folder / "tokenizer", expected_fingerprint=expected)
            pipeline.register_modules(vlm=vlm)
        return pipeline

    @property
    def backbone(self) -> PreTrainedModel:
        """The VLM that reads prompts and answers questions: a Blend model's own, or the component ``vlm``.

        Raises:
            ArgumentError: when a Couple model came without one.
        """
        if self.model.config.variant == "blend":
            return self.model.vlm
        if self.vlm is None:
            raise ArgumentError("vlm: None; a Couple model reads prompts with the VLM that it was trained beside")
        return self.vlm

    def _onload(self, name: str) -> None:
        """Move a component to where it runs and the one before it away, when ``enable_model_cpu_offload`` is on.

        Call it outside inference mode: parameters that are moved inside could not be trained afterwards.
        """
        component = getattr(self, name)
        if hasattr(component, "_hf_hook"):
            component._hf_hook.pre_forward(component)

    def _onload_backbone(self) -> None:
        self._onload("model" if self.model.config.variant == "blend" else "vlm")

    def encode_prompts(self, messages: Sequence[str]) -> Context:
        """Return the context of user messages, on the VLM's device."""
        self._onload_backbone()
        vlm: Any = self.backbone
        tokens = tokenize_prompts(self.tokenizer, messages, multiple=LENGTH_MULTIPLE)
        inputs = {name: t.to(vlm.device) for name, t in tokens.items()}
        with torch.inference_mode():
            return encode_context(vlm, inputs, self.model.config.context_projection)

    def messages(self, prompts: Sequence[str | int]) -> list[str]:
        """Return the user message of each prompt: a caption, or a class by its index.

        Raises:
            ArgumentError: when a class does not exist.
        """
        names = self.config.class_names
        result = []
        for prompt in prompts:
            if isinstance(prompt, bool) or not isinstance(prompt, str | Integral):
                raise ArgumentError(f"prompt: got {prompt!r}; accepted: a caption, or the index of a class")
            if isinstance(prompt, Integral):
                if names is None or not 0 <= prompt < len(names):
                    accepted = "none, this model takes prompts" if names is None else f"0 to {len(names) - 1}"
                    raise ArgumentError(f"classes: {prompt} is no class of this model; accepted: {accepted}")
                prompt = names[prompt]
            message = self.config.prompt_template.format(prompt)
            if len(message) > MAX_CHARACTERS:
                raise ArgumentError(f"prompt: got {len(message)} characters; accepted: up to {MAX_CHARACTERS}")
            result.append(message)
        return truncate_prompts(self.tokenizer, result, self.config.max_prompt_tokens)

    def __call__(
        self,
        prompt: str | int | Sequence[str | int],
        *,
        num_inference_steps: int = 40,
        guidance_scale: float = 5.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seed: int | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **sampler,
    ) -> ImagePipelineOutput | tuple:
        """Generate images, with the arguments and the output of diffusers' pipelines.

        Args:
            prompt: a caption or a class index, or several.
            num_inference_steps: steps of the sampler.
            guidance_scale: classifier-free guidance; 1 is none.
            num_images_per_prompt: images of a prompt follow each other.
            generator: draws the noise; one, or one an image. None: see ``seed``.
            seed: image i depends on (seed, i) alone, as with ``generate`` and tools/sample.py; None draws one.
            latents: the noise itself, [B, C, H, W].
            output_type: ``pil``; ``np``, [B, R, R, c] in [0, 1]; ``pt``, [B, c, R, R] in [0, 1]; ``latent``, [B, C, H, W].
            return_dict: whether to return an object with ``images``, or a tuple.
            sampler: the solver and the time grid, as model.sampling.sample_latents takes them.

        Raises:
            ArgumentError: when an argument is not accepted; the message names it.
        """
        if output_type not in OUTPUT_TYPES:
            raise ArgumentError(f"output_type: {output_type!r} is unknown; accepted: {', '.join(OUTPUT_TYPES)}")
        given = [name for name, v in (("generator", generator), ("seed", seed), ("latents", latents)) if v is not None]
        if len(given) > 1:
            raise ArgumentError(f"{', '.join(given)}: got {len(given)} of them; accepted: one")
        prompts = [prompt] if isinstance(prompt, str | int | Integral) else list(prompt)
        if not prompts or num_images_per_prompt < 1:
            raise ArgumentError("prompt, num_images_per_prompt: nothing to draw; accepted: one or more")
        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        shape = (len(prompts), *self._noise_shape)
        if generator is not None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        elif latents is None:
            seed = int(torch.randint(2**32, ())) if seed is None else seed
            sampler["seeds"] = image_seeds(seed, 0, len(prompts))
            latents = initial_noise(sampler["seeds"], self._noise_shape)
        elif latents.shape != shape:
            raise ArgumentError(f"latents: got {list(latents.shape)}; accepted: {list(shape)}")
        latents = self._sample(
            prompts,
            latents,
            num_steps=num_inference_steps,
            cfg_scale=guidance_scale,
            progress=self.progress_bar,
            **sampler,
        )
        if output_type == "latent":
            images = latents
        else:
            images = VaeImageProcessor().postprocess(self._decode(latents).float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def generate(
        self,
        prompts: Sequence[str | int],
        *,
        seed: int = 0,
        first_image: int = 0,
        num_steps: int = 40,
        cfg_scale: float = 5.0,
        **sampler,
    ) -> np.ndarray:
        """Generate one image a prompt, as bytes: for tools that draw many, batch after batch.

        Args:
            prompts: captions, or class indices.
            seed: of the run; image i of a run depends on (seed, i) alone, whatever the batches.
            first_image: i of the first image.
            num_steps: steps of the sampler.
            cfg_scale: classifier-free guidance; 1 is none.
            sampler: the solver, the time grid and a progress bar, as model.sampling.sample_latents takes them.

        Returns:
            Images as bytes, [B, R, R] (grey) or [B, R, R, 3].
        """
        seeds = image_seeds(seed, first_image, len(prompts))
        noise = initial_noise(seeds, self._noise_shape)
        latents = self._sample(prompts, noise, num_steps=num_steps, cfg_scale=cfg_scale, seeds=seeds, **sampler)
        images = to_uint8(self._decode(latents))
        self.maybe_free_model_hooks()
        return images

    @property
    def _noise_shape(self) -> tuple[int, ...]:
        return self.model.config.latent_channels, *self.model.config.latent_size

    def _sample(self, prompts: Sequence[str | int], noise: Tensor, **options) -> Tensor:
        """Return the latents that noise [B, C, H, W] becomes, one a prompt; distinct prompts are encoded once."""
        messages = self.messages(prompts)
        distinct = list(dict.fromkeys([*messages, self.config.null_prompt]))
        context = self.encode_prompts(distinct)
        rows = torch.tensor([distinct.index(message) for message in messages], device=context.mask.device)
        null_row = torch.tensor([distinct.index(self.config.null_prompt)], device=context.mask.device)
        self._onload("model")
        return sample_latents(self.model, noise, context.gather(rows), context.gather(null_row), **options)

    def _decode(self, latents: Tensor) -> Tensor:
        """Return the images [B, c, R, R] of latents, where the codec runs."""
        self._onload("codec")
        return self.codec.decode(latents)

    def ask(self, image: Image.Image | None, question: str, *, max_new_tokens: int = 128) -> str:
        """Answer a question, about a picture or without one, with the VLM: transformers' own greedy generation.

        Args:
            image: a PIL image, or None.
            question: the user's words.
            max_new_tokens: the longest answer.

        Raises:
            ArgumentError: when a picture is given and the VLM came without an image processor, or an argument is of another kind.
        """
        vlm: Any = self.backbone
        if not isinstance(question, str):
            raise ArgumentError(f"question: got {question!r}; accepted: a text")
        if image is not None and not isinstance(image, Image.Image):
            raise ArgumentError(f"image: got a {type(image).__name__}; accepted: a PIL image, or None")
        inputs, ids = {}, message_ids(self.tokenizer, question, with_image=image is not None)
        if image is not None:
            if self.image_processor is None:
                raise ArgumentError(
                    "image: the VLM came without preprocessor_config.json; accepted: None, a question alone"
                )
            inputs = dict(self.image_processor(images=[image.convert("RGB")], return_tensors="pt"))
            inputs["pixel_values"] = inputs["pixel_values"].to(vlm.dtype)
            # The template writes one placeholder per picture; each merged patch needs one.
            patches = int(inputs["image_grid_thw"].prod()) // self.image_processor.merge_size**2
            place = ids.index(vlm.config.image_token_id)
            ids[place : place + 1] = [vlm.config.image_token_id] * patches
        inputs |= self.tokenizer.pad({"input_ids": [ids]}, return_tensors="pt")
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == vlm.config.image_token_id).long()
        self._onload_backbone()
        inputs = {name: tensor.to(vlm.device) for name, tensor in inputs.items()}
        output = vlm.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        self.maybe_free_model_hooks()
        return self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _check_index(content: Any) -> None:
    """Refuse a model_index.json that does not describe a LatteFlowPipeline: diffusers imports every module that one names."""
    if not isinstance(content, dict) or content.get("_class_name") != LatteFlowPipeline.__name__:
        raise ArgumentError(f"_class_name: accepted: {LatteFlowPipeline.__name__}")
    settings = {name: value for name, value in content.items() if not name.startswith("_")}
    for name, base in COMPONENTS.items():
        entry = settings.pop(name, None)
        if entry == [None, None] and name in LatteFlowPipeline._optional_components:
            continue
        library, kind = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        # Looked up, not imported: a class of an extension is known once the extension is imported.
        found = getattr(sys.modules.get(str(library)), str(kind), None)
        if not isinstance(found, type) or not issubclass(found, base):
            raise ArgumentError(
                f"{name}: got {reprlib.repr(entry)}; accepted: the module and name of a {base.__name__}"
            )
    read_settings(PromptSettings, settings)


def _check_components(folder: Path) -> None:
    """Refuse a saved pipeline with code, which diffusers prefers to a library's class of that name, or see ``locate``."""
    for code in (*folder.glob("*.py"), *folder.glob("*/*.py")):
        raise ArgumentError(f"{code}: code is not loaded; accepted: a folder of save_pretrained, without it")
    for component in (name for name in COMPONENTS if (folder / name).is_dir()):
        locate(folder / component)
    if (folder / "vlm").is_dir():
        read_vlm_config(folder / "vlm")
