"""Windows that show images: what the model reads is what its own processor makes of them."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from image_models import TYPES, image_folder, noise, write_images
from secateur.data.calibration import CalibrationOptions
from secateur.data.pairs import holds_pairs, reader_of
from secateur.data.rows import IGNORED
from secateur.data.windows import calibration_windows, digest, held_out_windows, unscored
from secateur.errors import DataError
from secateur.models import media
from secateur.models.inputs import arguments, token_ids
from secateur.models.media import Shown, shown_in, shows, with_shown
from secateur.models.tokenizer import load_tokenizer
from secateur.planning.options import CutOptions, settled
from secateur.scoring.passes.loss import labels_of

CHAT = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}\n{% endfor %}"
)
CALIBRATION = CalibrationOptions(samples=6, length=80, held_out=3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("models") / "llava", "llava")


def processor_of(folder: Path) -> Any:
    processor: Any = AutoProcessor.from_pretrained(folder)
    return processor


def options_of(source: Path, **changes: Any) -> CalibrationOptions:
    return replace(CALIBRATION, text=(str(source),), **changes)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_window_is_what_the_processor_gives(
    model_type: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of windows in a batch are those of each output of the processor, of which the end is cut off."""
    folder = image_folder(tmp_path, model_type)
    processor, model = processor_of(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()
    made: list[Any] = []
    real = type(processor).__call__

    @functools.wraps(real)
    def recorded(*positional: Any, **named: Any) -> Any:
        made.append(real(*positional, **named))
        return made[-1]

    monkeypatch.setattr(type(processor), "__call__", recorded)
    windows = calibration_windows(processor, options_of(pictures))
    assert windows.shape == (6, 80)
    with torch.no_grad():
        logits = model(**arguments(model, windows)).logits
        blind = model(**arguments(model, token_ids(windows))).logits
        for whole, ours_TV, blind_TV in zip(made, logits, blind, strict=True):
            alone_TV = model(**{name: whole[name] for name in whole if name != "labels"}).logits[0, :80]
            assert whole["input_ids"].shape[1] > 80
            assert torch.allclose(ours_TV, alone_TV, atol=1e-3)
            assert not torch.allclose(ours_TV, blind_TV, atol=1e-1)  # the image matters


def test_no_token_of_an_image_is_predicted(llava: Path, pictures: Path) -> None:
    model, windows = (
        AutoModelForImageTextToText.from_pretrained(llava),
        calibration_windows(processor_of(llava), options_of(pictures)),
    )
    labels = labels_of(model, windows)
    assert labels is not None
    following = token_ids(windows)[:, 1:]
    assert torch.equal(labels[:, :-1] == IGNORED, following == model.config.image_token_id)
    assert torch.equal(labels[:, :-1][following != 3], following[following != 3])


def test_windows_follow_from_the_options_and_the_images(llava: Path, pictures: Path, tmp_path: Path) -> None:
    processor = processor_of(llava)
    windows = calibration_windows(processor, options_of(pictures))
    assert torch.equal(windows, calibration_windows(processor, options_of(pictures)))
    assert not torch.equal(windows, calibration_windows(processor, options_of(pictures, seed=1)))
    held_out = held_out_windows(processor, options_of(pictures))
    assert not set(shown_numbers(windows)) & set(shown_numbers(held_out))
    assert len({*shown_numbers(windows), *shown_numbers(held_out)}) == 9
    others = write_images(tmp_path / "others")
    for number in range(16):
        noise(number + 100).save(others / f"{number}.png")
    changed = calibration_windows(processor, options_of(others))
    assert torch.equal(token_ids(changed), token_ids(windows))  # the same texts
    assert digest(changed) != digest(windows)


def shown_numbers(windows: torch.Tensor) -> list[int]:
    return list((windows >> 32).amax(1).tolist())


def test_two_images_never_have_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (Shown({"pixel_values": torch.full((1, 3, 2, 2), value)}, {}, 1) for value in (1.0, 2.0))
    ids, places = torch.tensor([7, 8]), torch.tensor([True, False])
    number = shown_numbers(with_shown(ids, places, one)[None])[0]
    monkeypatch.setitem(media._DIGESTS, number, b"of another")  # as if it had been there before
    moved, window = with_shown(ids, places, one), with_shown(ids, places, other)
    assert shown_numbers(moved[None]) == [number + 1]
    shown = shown_in(torch.stack([moved, window]))["pixel_values"]
    assert shown[:, 0, 0, 0].tolist() == [1, 2]


def test_images_are_cropped_to_one_shape(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "qwen", "qwen2_vl")  # whose images take as many tokens as their shape has patches
    pictures = write_images(tmp_path / "pictures")
    for number in range(16):
        noise(number, height=24 + 16 * (number % 3)).save(pictures / f"{number}.png")
    windows = calibration_windows(processor_of(folder), options_of(pictures))
    assert len({int((row >> 32 > 0).sum()) for row in windows}) == 1
    assert shown_in(windows)["image_grid_thw"].unique(dim=0).shape[0] == 1


def test_what_is_cut_off_an_image_is_read_as_text(llava: Path, pictures: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(llava)
    windows = calibration_windows(processor_of(llava), options_of(pictures))
    assert "pixel_values" in arguments(model, windows[:2])
    assert "pixel_values" in arguments(model, windows[:, :70])
    assert "pixel_values" not in arguments(model, windows[:, :7])
    assert shows(windows)
    assert not shows(token_ids(windows))
    assert unscored(windows, options_of(pictures)).shape[1] == 80


def test_the_chat_template_is_used_where_it_has_a_place_for_an_image(llava: Path, pictures: Path) -> None:
    processor = processor_of(llava)
    processor.chat_template = CHAT
    windows = calibration_windows(processor, options_of(pictures))
    assert processor.tokenizer.decode(token_ids(windows[0])).startswith("user: <image>")
    without = []
    for template in (None, "{{ raise_exception('no images') }}", "{% for m in messages %}{{ m.role }}{% endfor %}"):
        processor.chat_template = template  # of texts alone, as the tokenizer of a language model may have it
        without.append(calibration_windows(processor, options_of(pictures)))
    assert torch.equal(without[0], without[1])
    assert torch.equal(without[0], without[2])
    assert not torch.equal(without[0], windows)


def test_a_parquet_file_with_images(llava: Path, tmp_path: Path) -> None:
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    folder = write_images(tmp_path / "pictures", column="caption")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    table = [
        {"image": {"bytes": (folder / row["file_name"]).read_bytes(), "path": None}, "caption": row["caption"]}
        for row in rows
    ]
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "rows.parquet")
    assert holds_pairs(str(tmp_path / "rows.parquet"))
    by_file = calibration_windows(processor_of(llava), options_of(tmp_path / "rows.parquet"))
    assert torch.equal(by_file, calibration_windows(processor_of(llava), options_of(folder)))


def test_images_are_not_varied(pictures: Path) -> None:
    options = settled(options_of(pictures), CutOptions(), pairs=True)
    assert (options.varied, options.copied) == (0.0, 0.0)


class TestErrors:
    def test_too_few_images(self, llava: Path, pictures: Path) -> None:
        with pytest.raises(DataError, match=r"has 16 images, and samples=20 and held_out=3 .*\(samples=13\)"):
            calibration_windows(processor_of(llava), options_of(pictures, samples=20))

    def test_windows_that_are_too_short(self, llava: Path, pictures: Path) -> None:
        with pytest.raises(DataError, match=r"the image ends with token 16, and windows have 16\. .*length=80"):
            calibration_windows(processor_of(llava), options_of(pictures, length=16))

    def test_a_mix(self, llava: Path, pictures: Path) -> None:
        options = replace(CALIBRATION, text=(str(pictures), "demo"))
        with pytest.raises(DataError, match="images and sound stand alone"):
            calibration_windows(processor_of(llava), options)

    def test_forms_of_texts(self, llava: Path, pictures: Path) -> None:
        with pytest.raises(DataError, match=r"varied=0.5 is for texts without images or sound"):
            calibration_windows(processor_of(llava), options_of(pictures, varied=0.5))

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"text": "a"}, r"line 1: no 'file_name' among \['text'\]"),
            ({"file_name": "none.png", "text": "a"}, r"line 1: the image cannot be read \(FileNotFoundError"),
            (
                {"file_name": "metadata.jsonl", "text": "a"},
                r"line 1: the image cannot be read \(Unidentified",
            ),
            ({"file_name": "0.png", "title": "a"}, r"line 1: no column 'text'"),
        ],
    )
    def test_a_row(self, row: dict[str, str], reason: str, llava: Path, tmp_path: Path) -> None:
        folder = write_images(tmp_path / "pictures", count=1)
        (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError, match=reason):
            calibration_windows(processor_of(llava), options_of(folder, samples=1, held_out=1))

    def test_a_row_without_an_image(self, llava: Path, tmp_path: Path) -> None:
        pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
        rows = [{"image": None, "text": "a"}, {"image": {"bytes": b"", "path": "a.png"}, "text": "a"}]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
        with pytest.raises(DataError, match=r"row 1: neither 'image' nor 'audio' among \['image', 'text'\]"):
            calibration_windows(processor_of(llava), options_of(tmp_path / "rows.parquet"))

    def test_a_model_of_text(self, tiny: Path, pictures: Path) -> None:
        with pytest.raises(DataError, match=r"pictures' has images or sound, and .* no processor that reads them"):
            reader_of(str(tiny), options_of(pictures), load_tokenizer(str(tiny)))
