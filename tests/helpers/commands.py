"""Commands that are expected to succeed."""

from click.testing import CliRunner

from scm_sdk.export.cli import main


def run(*arguments: object) -> str:
    """Run ``scm-export`` with these arguments and return what it printed."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return str(done.output)
