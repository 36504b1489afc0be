"""LatteFlowPipeline: prompts to pictures, pictures and questions to answers, and the folder that holds all it takes.

A model folder:

    config.json, model.safetensors   the LatteFlowModel; its weights may be in any format of training/checkpoint/formats
    pipeline.json                    prompt template, class names, codec, and where the VLM is
    tokenizer/                       the VLM's tokenizer and image processor
    vlm/                             the VLM, when it has no path of its own (the tiny one)

A training output_dir keeps the same folder, without weights, as ``model/``.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from diffusers import ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from latte_flow.model.backbone import checkpoint_folder, fingerprint, load_image_processor, load_vlm
from latte_flow.model.codecs import LatentCodec, load_codec
from latte_flow.model.configuration import load_network_config
from latte_flow.model.context import Context, encode_context, tokenize_prompts, truncate_prompts
from latte_flow.model.images import to_uint8
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.sampling import image_seeds, initial_noise, sample_latents
from latte_flow.training.checkpoint.formats.matching import load_weights
from latte_flow.training.checkpoint.formats.recognise import open_weights
from latte_flow.training.checkpoint.formats.source import EXPORT_FILE, WeightSource

PIPELINE_FILE = "pipeline.json"
VLM_FOLDER = "vlm"
TOKENIZER_FOLDER = "tokenizer"
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class PipelineConfig:
    """What a pipeline needs beside the networks' own configurations; the content of pipeline.json.

    Attributes:
        resolution: R, side of the images in pixels.
        image_channels: c.
        prompt_template: the user message; {} stands for the class name or the caption.
        null_prompt: the user message of the null condition.
        max_prompt_tokens: longer user messages lose their end; None keeps all.
        class_names: names of the classes, or None for free prompts.
        codec: arguments of model.codecs.load_codec.
        vlm_path: folder or hub id of the VLM; None when it lies in the model folder itself.
        vlm_fingerprint: of the VLM's files, None without a path; see model.vlm.fingerprint.
    """

    resolution: int
    image_channels: int
    prompt_template: str
    null_prompt: str
    max_prompt_tokens: int | None = None
    class_names: list[str] | None = None
    codec: dict = field(default_factory=dict)
    vlm_path: str | None = None
    vlm_fingerprint: str | None = None

    @classmethod
    def load(cls, folder: Path) -> "PipelineConfig":
        """Read a model folder's pipeline.json.

        Raises:
            FileNotFoundError: when there is none.
            ValueError: when it is not what ``save_components`` writes.
        """
        file = folder / PIPELINE_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{file} not found; accepted: an exported model folder")
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{file}: damaged ({error})") from error

    def load_frozen_vlm(self, folder: Path, dtype: torch.dtype | None):
        """Load the VLM that a Couple model was trained beside.

        Args:
            folder: the model folder.
            dtype: the type of its weights; None for its own.

        Raises:
            ValueError: when it is not there, or is another one.
        """
        path = self.vlm_path or folder / VLM_FOLDER
        vlm, _ = load_vlm(path, dtype=dtype, tokenizer_path=folder / TOKENIZER_FOLDER)
        if self.vlm_fingerprint and fingerprint(checkpoint_folder(path)) != self.vlm_fingerprint:
            raise ValueError(f"vlm_path: {path} is not the VLM that this model was trained with (fingerprint differs)")
        return vlm


class LatteFlowPipeline:
    """Generates images from prompts or classes.

    Args:
        model: the network.
        vlm: the VLM that gives the context; for Blend ``model.vlm``.
        tokenizer: the VLM's.
        codec: from latents to images.
        config: prompts and names.
        image_processor: the VLM's, for questions about pictures; None where the VLM's folder holds none.
    """

    def __init__(
        self, model: LatteFlowModel, vlm, tokenizer, codec: LatentCodec, config: PipelineConfig, image_processor=None
    ):
        self.model = model.eval()
        self.vlm = vlm
        self.tokenizer = tokenizer
        self.codec = codec
        self.config = config
        self.image_processor = image_processor
        self._progress_bar_config: dict = {}

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        weights: dict[str, Tensor] | WeightSource | None = None,
        kind: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "LatteFlowPipeline":
        """Load a model folder.

        Args:
            folder: what ``save_pretrained`` wrote.
            weights: the network's state dict, or where to read one; None for the folder's own, in whatever format they are.
            kind: ``model`` or ``ema``, of weights that hold both; None for the averaged ones.
            dtype: the type of all networks; None for float32.

        Raises:
            FileNotFoundError: when the folder is not a model folder.
            ValueError: when it holds no weights and none are given, or weights of another model; when the VLM at the path noted
                in the folder is not the one the model was trained with.
        """
        folder = Path(folder)
        config = PipelineConfig.load(folder)
        if not (folder / TOKENIZER_FOLDER).is_dir():  # transformers would ask the hub for it
            raise ValueError(f"{folder / TOKENIZER_FOLDER} not found; accepted: an exported model folder")
        if weights is None:
            weights = open_weights(folder)
        model = LatteFlowModel(load_network_config(folder))
        load_weights(model, weights, kind or (None if isinstance(weights, dict) else weights.default_kind))
        tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER_FOLDER)
        is_blend = model.config.variant == "blend"
        vlm = model.vlm if is_blend else config.load_frozen_vlm(folder, dtype or torch.float32)
        codec = load_codec(**config.codec, dtype=dtype)
        image_processor = load_image_processor(folder / TOKENIZER_FOLDER)
        return cls(model.to(dtype or torch.float32), vlm, tokenizer, codec, config, image_processor)

    def save_components(self, folder: str | Path) -> None:
        """Write everything but the network's weights into a model folder; what is there already is replaced."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(folder / TOKENIZER_FOLDER)
        if self.config.vlm_path is None and self.model.config.variant == "couple":
            self.vlm.save_pretrained(folder / VLM_FOLDER)
        (folder / PIPELINE_FILE).write_text(json.dumps(dataclasses.asdict(self.config), indent=1))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a model folder that ``from_pretrained`` loads.

        Raises:
            ValueError: when the folder holds what a conversion has written, whose files would be mixed with these.
        """
        if (Path(folder) / EXPORT_FILE).is_file():
            raise ValueError(f"{folder}: holds an export ({EXPORT_FILE}); accepted: another folder")
        self.save_components(folder)
        self.model.save_pretrained(folder)

    def to(self, *args, **kwargs) -> "LatteFlowPipeline":
        """Move or cast all networks as ``torch.nn.Module.to`` does, and return the pipeline."""
        for module in (self.model, self.vlm, self.codec):
            module.to(*args, **kwargs)
        return self

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the network's weights."""
        return self.model.dtype

    def set_progress_bar_config(self, **kwargs) -> None:
        """Set what ``tqdm`` is called with by the calls that follow, as of diffusers' pipelines: ``disable=True`` for none."""
        self._progress_bar_config = kwargs

    def progress_bar(self, steps: Iterable) -> Iterable:
        """Wrap the steps of a sampling loop."""
        return tqdm(steps, **{"unit": "step", **self._progress_bar_config})

    @torch.inference_mode()
    def encode_prompts(self, messages: Sequence[str]) -> Context:
        """Return the context of user messages, on the model's device."""
        inputs = {name: t.to(self.model.device) for name, t in tokenize_prompts(self.tokenizer, messages).items()}
        return encode_context(self.vlm, inputs, self.model.config.context_projection)

    def messages(self, prompts: Sequence[str | int]) -> list[str]:
        """Return the user message of each prompt: a caption, or a class by its index.

        Raises:
            ValueError: when a class does not exist.
        """
        names = self.config.class_names
        result = []
        for prompt in prompts:
            if isinstance(prompt, bool) or not isinstance(prompt, str | Integral):
                raise ValueError(f"prompt: got {prompt!r}; accepted: a caption, or the index of a class")
            if isinstance(prompt, Integral):
                if names is None or not 0 <= prompt < len(names):
                    accepted = "none, this model takes prompts" if names is None else f"0 to {len(names) - 1}"
                    raise ValueError(f"classes: {prompt} is no class of this model; accepted: {accepted}")
                prompt = names[prompt]
            result.append(self.config.prompt_template.format(prompt))
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
        solver: str = "euler",
        output_type: str = "pil",
        return_dict: bool = True,
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
            solver: ``euler`` or ``heun``.
            output_type: ``pil``; ``np``, [B, R, R, c] in [0, 1]; ``pt``, [B, c, R, R] in [0, 1]; ``latent``, [B, C, H, W].
            return_dict: whether to return an object with ``images``, or a tuple.

        Raises:
            ValueError: when an argument is not accepted; the message names it.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: {output_type!r} is unknown; accepted: {', '.join(OUTPUT_TYPES)}")
        given = [name for name, v in (("generator", generator), ("seed", seed), ("latents", latents)) if v is not None]
        if len(given) > 1:
            raise ValueError(f"{', '.join(given)}: got {len(given)} of them; accepted: one")
        prompts = [prompt] if isinstance(prompt, str | Integral) else list(prompt)
        if not prompts or num_images_per_prompt < 1:
            raise ValueError("prompt, num_images_per_prompt: nothing to draw; accepted: one or more")
        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        shape = (len(prompts), *self._noise_shape)
        if generator is not None:
            latents = randn_tensor(shape, generator=generator, device=self.device, dtype=torch.float32)
        elif latents is None:
            seed = int(torch.randint(2**32, ())) if seed is None else seed
            latents = initial_noise(image_seeds(seed, 0, len(prompts)), self._noise_shape)
        elif latents.shape != shape:
            raise ValueError(f"latents: got {list(latents.shape)}; accepted: {list(shape)}")
        latents = self._sample(
            prompts,
            latents,
            num_steps=num_inference_steps,
            cfg_scale=guidance_scale,
            solver=solver,
            progress=self.progress_bar,
        )
        if output_type == "latent":
            images = latents
        else:
            images = VaeImageProcessor().postprocess(self.codec.decode(latents).float(), output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def generate(
        self,
        prompts: Sequence[str | int],
        *,
        seed: int = 0,
        first_image: int = 0,
        num_steps: int = 40,
        cfg_scale: float = 5.0,
        solver: str = "euler",
        progress: Callable[[Iterable], Iterable] = iter,
    ) -> np.ndarray:
        """Generate one image a prompt, as bytes: for tools that draw many, batch after batch.

        Args:
            prompts: captions, or class indices.
            seed: of the run; image i of a run depends on (seed, i) alone, whatever the batches.
            first_image: i of the first image.
            num_steps: steps of the sampler.
            cfg_scale: classifier-free guidance; 1 is none.
            solver: ``euler`` or ``heun``.
            progress: wraps the iterable of steps, e.g. tqdm.

        Returns:
            Images as bytes, [B, R, R] (grey) or [B, R, R, 3].
        """
        noise = initial_noise(image_seeds(seed, first_image, len(prompts)), self._noise_shape)
        options = {"num_steps": num_steps, "cfg_scale": cfg_scale, "solver": solver, "progress": progress}
        return to_uint8(self.codec.decode(self._sample(prompts, noise, **options)))

    @property
    def _noise_shape(self) -> tuple[int, ...]:
        return self.model.config.latent_channels, *self.model.config.latent_size

    def _sample(self, prompts: Sequence[str | int], noise: Tensor, **options) -> Tensor:
        """Return the latents that noise [B, C, H, W] becomes, one a prompt; distinct prompts are encoded once."""
        messages = self.messages(prompts)
        distinct = list(dict.fromkeys([*messages, self.config.null_prompt]))
        context = self.encode_prompts(distinct)
        rows = torch.tensor([distinct.index(message) for message in messages], device=self.device)
        null_row = torch.tensor([distinct.index(self.config.null_prompt)], device=self.device)
        return sample_latents(self.model, noise, context.gather(rows), context.gather(null_row), **options)

    @torch.inference_mode()
    def ask(self, image: Image.Image | None, question: str, *, max_new_tokens: int = 128) -> str:
        """Answer a question, about a picture or without one, with the VLM: transformers' own greedy generation.

        Args:
            image: a PIL image, or None.
            question: the user's words.
            max_new_tokens: the longest answer.

        Raises:
            ValueError: when a picture is given and the VLM came without an image processor; when an argument is of another
                kind, or the question holds the token that stands for a picture.
        """
        placeholder = self.tokenizer.convert_ids_to_tokens(self.vlm.config.image_token_id)
        if not isinstance(question, str) or placeholder in question:
            raise ValueError(f"question: got {question!r}; accepted: a text without {placeholder}")
        if image is not None and not isinstance(image, Image.Image):
            raise ValueError(f"image: got a {type(image).__name__}; accepted: a PIL image, or None")
        content = [{"type": "text", "text": question}]
        if image is not None:
            content.insert(0, {"type": "image"})
        chat = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        inputs = {}
        if image is not None:
            if self.image_processor is None:
                raise ValueError(
                    "image: the VLM came without preprocessor_config.json; accepted: None, a question alone"
                )
            inputs = dict(self.image_processor(images=[image.convert("RGB")], return_tensors="pt"))
            inputs["pixel_values"] = inputs["pixel_values"].to(self.vlm.dtype)
            # The template writes one placeholder a picture; each merged patch needs one.
            patches = int(inputs["image_grid_thw"].prod()) // self.image_processor.merge_size**2
            text = text.replace(placeholder, placeholder * patches, 1)
        inputs |= self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.vlm.config.image_token_id).long()
        inputs = {name: tensor.to(self.vlm.device) for name, tensor in inputs.items()}
        output = self.vlm.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
