"""Models of speech, calibrated with sound: scored as autograd would, cut, loaded and made to listen."""

from __future__ import annotations

import importlib.util
import json
import wave
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from secateur import CalibrationOptions, verify
from secateur.cli.main import run
from secateur.data.sound import _from_wave, _sound_of
from secateur.data.windows import calibration_windows, held_out_windows
from secateur.errors import DataError
from secateur.models.inputs import arguments, token_ids
from secateur.models.media import Pair
from secateur.scoring.collect_backward import gradient_statistics
from sound_models import RATE, TYPES, sound_folder, write_sounds


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sounds(tmp_path_factory.mktemp("data") / "sounds")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sound_folder(tmp_path_factory.mktemp("models") / "whisper", "whisper")


def options_of(source: Path, **changes: Any) -> CalibrationOptions:
    return CalibrationOptions((str(source),), **{"samples": 4, "length": 24, "held_out": 2, **changes})


@pytest.mark.parametrize("model_type", TYPES)
def test_gradients_are_autograds_of_the_transcription(model_type: str, sounds: Path, tmp_path: Path) -> None:
    folder = sound_folder(tmp_path, model_type)
    model: Any = AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval()
    windows = calibration_windows(AutoProcessor.from_pretrained(folder), options_of(sounds))
    found = gradient_statistics(model, windows, {"squared": lambda evidence: evidence.squared}, second_order=True)
    total, squared = 0.0, dict[str, Tensor]()
    used = {name: p for name, p in model.named_parameters() if name in found.sums["squared"]}
    for window_T in windows:
        given, ids = arguments(model, window_T[None]), token_ids(window_T)
        assert given.keys() == {model.main_input_name, "decoder_input_ids", "use_cache"}
        loss = functional.cross_entropy(model(**given).logits[0, :-1], ids[1:])
        total += float(loss.detach()) / len(windows)
        gradients = torch.autograd.grad(loss, [*used.values()])
        for name, gradient in zip(used, gradients, strict=True):
            squared[name] = squared.get(name, 0) + gradient.square() / len(windows)
    assert found.loss == pytest.approx(total, rel=1e-4)
    assert any("encoder" in name for name in used)
    largest = max(float(expected.max()) for expected in squared.values())
    for name, expected in squared.items():
        rows = expected.reshape(len(expected), -1).sum(1)
        assert torch.allclose(found.sums["squared"][name][0], rows, rtol=1e-3, atol=1e-5 * largest), name


@pytest.mark.parametrize("model_type", TYPES)
def test_it_is_cut_by_the_command_line_and_listens(model_type: str, sounds: Path, tmp_path: Path) -> None:
    folder, out, numbers = sound_folder(tmp_path / "dense", model_type), tmp_path / "out", tmp_path / "numbers.json"
    command = ["prune", str(folder), str(out), "--calibration", str(sounds), "--samples", "6", "--length", "24"]
    command += ["--held-out", "2", "--axes", "mlp", "--shape", "uniform", "--of", "units", "--ratio", "0.25"]
    assert run([*command, "--quiet", "--json", str(numbers)]) == 0
    losses = json.loads(numbers.read_text())["scored"]["held_out_loss"]
    assert {"cut", "repaired"} <= losses.keys()  # of random weights, either may be less
    assert verify(out).problems == ()
    dense, model = (AutoModelForSpeechSeq2Seq.from_pretrained(each).eval() for each in (folder, out))
    assert model.num_parameters() < dense.num_parameters()
    processor: Any = AutoProcessor.from_pretrained(out)
    heard = processor(audio=torch.randn(RATE).numpy(), sampling_rate=RATE, return_tensors="pt")
    assert model.generate(**heard, max_new_tokens=4).shape[0] == 1


def test_each_sound_is_in_one_window(whisper: Path, sounds: Path) -> None:
    processor: Any = AutoProcessor.from_pretrained(whisper)
    windows = torch.cat([read(processor, options_of(sounds)) for read in (calibration_windows, held_out_windows)])
    texts = [processor.tokenizer.decode(token_ids(window_T)) for window_T in windows]
    spoken = [word for text in texts for word in text.removesuffix("</s>").split("noise ") if " of " in word]
    assert len(spoken) == len(set(spoken)) >= 6


class TestErrors:
    def read(self, whisper: Path, source: Path, **changes: Any) -> None:
        calibration_windows(AutoProcessor.from_pretrained(whisper), options_of(source, **changes))

    def test_too_little_sound(self, whisper: Path, sounds: Path) -> None:
        with pytest.raises(DataError, match=r"too little sound: samples=100 and held_out=2 windows of 24 .*samples=50"):
            self.read(whisper, sounds, samples=100)

    def test_windows_with_more_tokens_than_a_sound(self, whisper: Path, sounds: Path) -> None:
        with pytest.raises(DataError, match=r"takes 1 seconds of sound at once, .* where windows have 120"):
            self.read(whisper, sounds, length=120)

    def test_another_rate(self, whisper: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"sampling rate is 8,000 Hz, and the model expects 16,000 Hz"):
            self.read(whisper, write_sounds(tmp_path / "sounds", rate=8_000))

    def test_no_sound(self, whisper: Path, tmp_path: Path) -> None:
        folder = write_sounds(tmp_path / "sounds", count=1)
        (folder / "0.wav").write_bytes(b"RIFF")
        with pytest.raises(DataError, match=r"line 1: the sound cannot be read \("):
            self.read(whisper, folder)

    def test_what_python_alone_cannot_read(
        self, whisper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            "secateur.data.sound.importlib.util.find_spec",
            lambda name, *package: None if name == "soundfile" else find(name, *package),
        )
        sound = write_sounds(tmp_path / "sounds", count=1) / "0.wav"
        sound.write_bytes(sound.read_bytes()[:-1])  # half a sample
        with pytest.raises(DataError, match=r"the sound cannot be read \(.*; pip install 'secateur\[sound\]'"):
            self.read(whisper, sound.parent)
        with wave.open(str(sound), "wb") as file:
            file.setparams((1, 3, RATE, 0, "NONE", ""))
            file.writeframes(bytes(3 * RATE))
        with pytest.raises(DataError, match=r"cannot be read \(.*24 bits, where 16 are read; pip install"):
            self.read(whisper, sound.parent)


def test_a_wave_file_is_read_alike_without_the_package(tmp_path: Path) -> None:
    folder = write_sounds(tmp_path / "sounds", count=1)
    stereo = folder / "stereo.wav"
    with wave.open(str(stereo), "wb") as file:
        file.setparams((2, 2, RATE, 0, "NONE", ""))
        file.writeframes(torch.tensor([[1000, 3000], [-2000, 0]], dtype=torch.int16).numpy().tobytes())
    samples, rate = _from_wave(Pair("", "", stereo, is_sound=True))
    assert rate == RATE
    assert torch.allclose(samples, torch.tensor([2000.0, -1000.0]) / 2**15)
    for path in (stereo, folder / "0.wav"):
        pair = Pair("", "", {"bytes": path.read_bytes(), "path": None}, is_sound=True)
        assert torch.allclose(_sound_of(pair, RATE), _from_wave(pair)[0], atol=1e-4)
