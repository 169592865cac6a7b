"""A tokenizer loads with its model, or an error says what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from model_folders import fails
from secateur.models.tokenizer import load_tokenizer


class TestTokenizer:
    def test_it_comes_back(self, plain_folder: Path) -> None:
        words = Tokenizer(models.WordLevel({"?": 0, "cut": 1, "the": 2, "rose": 3}, unk_token="?"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(plain_folder)
        assert load_tokenizer(str(plain_folder))("cut the other rose").input_ids == [1, 2, 0, 3]

    def test_a_folder_without_one(self, plain_folder: Path) -> None:
        with fails(f"{str(plain_folder)!r}: no tokenizer can be loaded; ValueError"):
            load_tokenizer(str(plain_folder))

    def test_a_folder_for_which_transformers_makes_an_empty_one(self, tmp_path: Path) -> None:
        AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
        with fails("no tokenizer can be loaded; there is no vocabulary. Expected tokenizer.json"):
            load_tokenizer(str(tmp_path))

    def test_a_config_alone(self, plain_folder: Path) -> None:
        with fails("a config file has no tokenizer. Name the folder that has one, or 'demo'."):
            load_tokenizer(str(plain_folder / "config.json"))

    @pytest.mark.demo_model
    def test_that_of_the_demo_saved_and_loaded_is_the_same(
        self, demo_tokenizer: PreTrainedTokenizerBase, demo_config: PreTrainedConfig, tmp_path: Path
    ) -> None:
        demo_tokenizer.save_pretrained(tmp_path)
        demo_config.save_pretrained(tmp_path)
        for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
            text = "Prune  the rose,\n\n\tprune 'it' 12345 times — naïve 🌹 <|im_start|>x<|im_end|>"
            assert again(text).input_ids == demo_tokenizer(text).input_ids
            assert again.decode(again(text).input_ids) == text
            assert again.chat_template == demo_tokenizer.chat_template is not None
            assert again.special_tokens_map == demo_tokenizer.special_tokens_map
            assert again.all_special_ids == demo_tokenizer.all_special_ids
            ids = (again.bos_token_id, again.eos_token_id, again.pad_token_id, again.unk_token_id)
            assert ids == (1, 2, 2, 0)
            chat = [{"role": "user", "content": "hello"}]
            assert again.apply_chat_template(chat, tokenize=False) == demo_tokenizer.apply_chat_template(
                chat, tokenize=False
            )
