"""Tiny models of speech of random weights, each in a folder with its processor, and a folder of sounds."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import torch
import transformers as t

from image_models import bytes_tokenizer, write_model

RATE = 16_000
SHARED: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "pad_token_id": 0}
WHISPER = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 40,
    "num_mel_bins": 8,
    "max_source_positions": 50,  # a second
    "max_target_positions": 128,
}
MOONSHINE = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "encoder_num_hidden_layers": 2,
    "decoder_num_hidden_layers": 2,
    "encoder_num_attention_heads": 2,
    "decoder_num_attention_heads": 2,
}
TYPES = ("whisper", "moonshine")


def sound_folder(folder: Path, model_type: str) -> Path:
    """Write a tiny model of a type with its processor."""
    tokenizer = bytes_tokenizer()
    processor: Any
    if model_type == "whisper":
        processor = t.WhisperProcessor(t.WhisperFeatureExtractor(feature_size=8, chunk_length=1), tokenizer)
    else:
        processor = t.Wav2Vec2Processor(t.Wav2Vec2FeatureExtractor(sampling_rate=RATE), tokenizer)
    sizes = WHISPER if model_type == "whisper" else MOONSHINE
    config = t.AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **sizes, **SHARED)
    model = t.AutoModelForSpeechSeq2Seq.from_config(config)
    write_model(folder, model, processor)
    return folder


def write_sounds(folder: Path, count: int = 40, *, rate: int = RATE, seconds: float = 0.2) -> Path:
    """A folder of short noises with their texts."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        samples = (3000 * torch.randn(int(seconds * rate), generator=generator)).to(torch.int16)
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, rate, 0, "NONE", ""))
            file.writeframes(samples.numpy().tobytes())
        rows.append({"file_name": f"{number}.wav", "transcription": f"noise {number} of {count}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
