"""Messages of the package's errors."""

import pytest

from scm_sdk.errors import ConfigError, ScmError, printable


def test_a_message_commands_no_terminal() -> None:
    assert str(ConfigError("name \x1b[2J\x07\u202eevil\nnext\tline")) == "name \\x1b[2J\\x07\\u202eevil\nnext\tline"
    assert printable("Grüße, 日本語 🦊") == "Grüße, 日本語 🦊"


@pytest.mark.parametrize("length", [100, 4000, 1_000_000])
def test_a_message_is_at_most_a_page_long_and_keeps_its_ends(length: int) -> None:
    text = str(ScmError("found " + "a" * length + ". Do this."))
    assert len(text) < 4100 and text.startswith("found a") and text.endswith("a. Do this.")
