"""Which types the other auto classes know, and what their tiny models need besides the sizes that all share."""

from __future__ import annotations

from typing import Any

from transformers.models.auto import modeling_auto

_NAMES = {
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "AutoModelForSpeechSeq2Seq": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}
# A model without a head gives embeddings where its type is one of text: others detect, segment, synthesize.
_OF_TEXT = {name for auto in [*_NAMES][:3] for name in _NAMES[auto]} | {"clip", "siglip", "vit"}
CLASS_TYPES: dict[str, tuple[str, ...]] = {
    **{auto: tuple(sorted(names)) for auto, names in _NAMES.items()},
    "AutoModel": tuple(sorted(_OF_TEXT & {*modeling_auto.MODEL_MAPPING_NAMES})),
}
NAMES: tuple[str, ...] = tuple(f"{auto}/{model_type}" for auto, types in CLASS_TYPES.items() for model_type in types)


def _mrope(*sections: int, **others: Any) -> dict[str, Any]:
    """Sections of a rotary embedding that are half as wide as a head in all."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {"text_config": {"rope_parameters": {**rope, **others}}}


CLASS_SETTINGS: dict[str, dict[str, Any]] = {
    "blip-2": {"image_token_index": 5},
    "canary": {"encoder_config": {"conv_kernel_size": 5, "subsampling_conv_channels": 32}},
    "cohere_asr": {"encoder_config": {"conv_kernel_size": 5, "subsampling_conv_channels": 32}},
    "convbert": {"conv_kernel_size": 3},
    "distilbert": {"dim": 48, "hidden_dim": 84},
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "esmc": {"num_key_value_heads": 6},
    "funnel": {"attention_type": "relative_shift"},
    "glm46v": _mrope(2, 1, 1),
    "glm4v": _mrope(2, 1, 1),
    "glm4v_moe": _mrope(1, 1, 0),
    "glmga": _mrope(2, 1, 1),
    "instructblip": {"image_token_index": 5},
    "instructblipvideo": {"video_token_index": 5},
    "luke": {"entity_vocab_size": 53, "entity_emb_size": 40},
    "mobilebert": {"true_hidden_size": 36, "intra_bottleneck_size": 36},
    "nystromformer": {"segment_means_seq_len": 64, "num_landmarks": 64, "conv_kernel_size": 3},
    "paddleocr_vl": _mrope(2, 2, 1),
    "qwen2_5_omni_thinker": _mrope(2, 1, 1),
    "qwen2_5_vl": _mrope(2, 1, 1),
    "qwen2_vl": _mrope(2, 1, 1),
    "squeezebert": {"embedding_size": 48},
    "vision-encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
}
