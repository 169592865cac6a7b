"""Tiny vision-language models of random weights, each in a folder with its processor, and folders of images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SIDE, PATCH = 32, 8  # of an image, in pixels
SQUARE = {"height": SIDE, "width": SIDE}
GRID = [[SIDE, 2 * SIDE]]
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
TOWER = {"idefics3": "model.text_model"}  # where the text is read, if not in model.language_model
IMAGE_TOKEN = 3
Built = tuple[Any, t.PreTrainedConfig]  # a processor and a config


def bytes_tokenizer(**special: str) -> t.PreTrainedTokenizerFast:
    """A token for each byte, and special ones by the names that processors know them by; the first has the id 3."""
    named = ["<pad>", "<s>", "</s>", *special.values()]
    vocabulary = {token: number for number, token in enumerate([*named, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return t.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=special
    )


def _config(model_type: str, tokenizer: Any, of_text: str | None, of_vision: str | None, **settings: Any) -> Any:
    """A config; those of its parts are of these types."""
    text: dict[str, Any] = {**TEXT, "vocab_size": len(tokenizer), **settings.pop("text", {})}
    vision: dict[str, Any] = settings.pop("vision", VISION)
    return t.AutoConfig.for_model(
        model_type,
        text_config={**text, **({"model_type": of_text} if of_text else {})},
        vision_config={**vision, **({"model_type": of_vision} if of_vision else {})},
        **settings,
    )


def _llava(model_type: str) -> Built:
    tokenizer = bytes_tokenizer(image_token="<image>")
    if model_type == "llava":
        pixels: Any = t.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE)
        made: Any = t.LlavaProcessor
        more: dict[str, Any] = {}
    else:
        pixels = t.LlavaNextImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=GRID)
        made, more = t.LlavaNextProcessor, {"image_grid_pinpoints": GRID}
    processor = made(
        pixels, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    vision = {**VISION, "projection_dim": 16}
    return processor, _config(
        model_type, tokenizer, "llama", "clip_vision_model", vision=vision, image_token_index=IMAGE_TOKEN, **more
    )


def _paligemma(model_type: str) -> Built:
    tokenizer = bytes_tokenizer(image_token="<image>")
    pixels: Any = t.SiglipImageProcessor(size=SQUARE)
    pixels.image_seq_length = (SIDE // PATCH) ** 2
    processor = t.PaliGemmaProcessor(pixels, tokenizer)  # adds a thousand tokens for places in images
    vision = {**VISION, "projection_dim": 32}
    return processor, _config(
        model_type,
        processor.tokenizer,
        "gemma",
        "siglip_vision_model",
        vision=vision,
        image_token_index=processor.image_token_id,
        projection_dim=32,
    )


def _gemma3(model_type: str) -> Built:
    tokenizer = bytes_tokenizer(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>")
    processor = t.Gemma3Processor(t.Gemma3ImageProcessor(size=SQUARE), tokenizer, image_seq_length=4)
    return processor, _config(
        model_type,
        tokenizer,
        "gemma3_text",
        "siglip_vision_model",
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=4,
        eoi_token_index=5,
    )


def _idefics3(model_type: str) -> Built:
    tokenizer = bytes_tokenizer(image_token="<image>", around="<fake_token_around_image>", whole="<global-img>")
    edge = {"longest_edge": SIDE}
    pixels = t.Idefics3ImageProcessor(size=edge, max_image_size=edge, do_image_splitting=False)
    processor = t.Idefics3Processor(pixels, tokenizer, image_seq_len=4)
    tokenizer = processor.tokenizer
    return processor, _config(
        model_type,
        tokenizer,
        "llama",
        None,
        text={"pad_token_id": 0},
        scale_factor=2,
        image_token_id=processor.image_token_id,
    )


def _aya_vision(model_type: str) -> Built:
    tokens = ("<|IMG_PATCH|>", "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL")
    tokenizer = bytes_tokenizer(**{f"token_{number}": token for number, token in enumerate(tokens)})
    pixels = t.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=False)
    processor = t.AyaVisionProcessor(pixels, tokenizer, patch_size=PATCH, img_size=SIDE, downsample_factor=2)
    vision = {**VISION, "vision_use_head": False}
    return processor, _config(
        model_type,
        tokenizer,
        "cohere2",
        "siglip_vision_model",
        vision=vision,
        image_token_index=IMAGE_TOKEN,
        downsample_factor=2,
    )


def _mistral3(model_type: str) -> Built:
    tokenizer = bytes_tokenizer(image="[IMG]", image_break="[IMG_BREAK]", image_end="[IMG_END]")
    pixels = t.PixtralImageProcessor(size={"longest_edge": SIDE}, patch_size=PATCH)
    processor = t.PixtralProcessor(pixels, tokenizer, patch_size=PATCH, spatial_merge_size=2)
    vision = {**VISION, "head_dim": 8}
    return processor, _config(
        model_type,
        tokenizer,
        "mistral",
        "pixtral",
        vision=vision,
        image_token_index=IMAGE_TOKEN,
        spatial_merge_size=2,
    )


def _internvl(model_type: str) -> Built:
    tokenizer = bytes_tokenizer(
        context_image_token="<IMG_CONTEXT>", start_image_token="<img>", end_image_token="</img>", video_token="<video>"
    )
    pixels = t.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=False)
    processor = t.InternVLProcessor(pixels, tokenizer, t.InternVLVideoProcessor(), image_seq_length=4)
    vision = {**VISION, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
    return processor, _config(
        model_type,
        tokenizer,
        "qwen2",
        "internvl_vision",
        vision=vision,
        image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
    )


def _qwen(model_type: str) -> Built:
    tokenizer = bytes_tokenizer(
        image_token="<|image_pad|>", video_token="<|video_pad|>", start="<|vision_start|>", end="<|vision_end|>"
    )
    pixels = t.Qwen2VLImageProcessor(
        patch_size=PATCH, temporal_patch_size=2, merge_size=2, min_pixels=16 * 16, max_pixels=SIDE * SIDE
    )
    classes: dict[str, tuple[Any, dict[str, Any]]] = {
        "qwen2_vl": (t.Qwen2VLProcessor, {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}),
        "qwen2_5_vl": (t.Qwen2_5_VLProcessor, {"window_size": 16, "fullatt_block_indexes": [1]}),
        "qwen3_vl": (t.Qwen3VLProcessor, {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}),
    }
    made, vision = classes[model_type]
    vision |= {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if model_type != "qwen2_vl":
        vision |= {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24}
    video: Any = t.Qwen2VLVideoProcessor
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    return made(pixels, tokenizer, video()), _config(
        model_type,
        tokenizer,
        None,
        None,
        text={"rope_parameters": rope},
        vision=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=4,
        vision_start_token_id=5,
        vision_end_token_id=6,
    )


def _llava_onevision(model_type: str) -> Built:
    tokenizer = bytes_tokenizer(image_token="<image>", video_token="<video>")
    pixels = t.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=GRID)
    processor = t.LlavaOnevisionProcessor(
        pixels,
        tokenizer,
        t.LlavaOnevisionVideoProcessor(),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
    )
    vision = {**VISION, "vision_use_head": False}
    return processor, _config(
        model_type,
        tokenizer,
        "qwen2",
        "siglip_vision_model",
        vision=vision,
        image_token_index=IMAGE_TOKEN,
        video_token_index=4,
        image_grid_pinpoints=GRID,
    )


TYPES: dict[str, Callable[[str], Built]] = {
    "llava": _llava,
    "llava_next": _llava,
    "llava_onevision": _llava_onevision,
    "paligemma": _paligemma,
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "aya_vision": _aya_vision,
    "mistral3": _mistral3,
    "internvl": _internvl,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
}


def write_model(folder: Path, model: t.PreTrainedModel, processor: Any) -> None:
    """Save a model with random weights that are large enough for its inputs to matter, and its processor."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            around = 1.0 if weight.dim() == 1 else 0.0
            weight.copy_(around + 0.2 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def image_folder(folder: Path, model_type: str) -> Path:
    """Write a tiny model of a type with its processor."""
    processor, config = TYPES[model_type](model_type)
    model = t.AutoModelForImageTextToText.from_config(config)
    write_model(folder, model, processor)
    return folder


def noise(number: int, height: int = 36) -> Image.Image:
    """An image of its own, 40 pixels wide."""
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (height, 40, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def write_images(folder: Path, count: int = 16, *, column: str = "text") -> Path:
    """A folder of images with their texts, in the layout of the hub's image folders."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        noise(number).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", column: f"Picture {number}: noise, {number % 7} by {number % 5}."})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def first_prompt(processor: Any) -> str:
    """What a user writes before a question about one image, where there is no chat template."""
    return f"{getattr(processor, 'boi_token', None) or processor.image_token}What is it?"
