"""Tokenizers that cannot pad a batch or write a chat are refused."""

import pytest

from conftest import build_tokenizer
from core.data.tokens import check_tokenizer
from core.runtime.errors import RecipeError


def test_a_tokenizer_needs_a_chat_template_and_a_pad_token():
    tokenizer = build_tokenizer()
    check_tokenizer(tokenizer, "tiny")
    template, tokenizer.chat_template = tokenizer.chat_template, None
    with pytest.raises(RecipeError, match="tokenizer of tiny has no chat template"):
        check_tokenizer(tokenizer, "tiny")
    tokenizer.chat_template, tokenizer.pad_token = template, None
    with pytest.raises(RecipeError, match="tokenizer of tiny has no pad token"):
        check_tokenizer(tokenizer, "tiny")
