"""``scm-export`` in the process of the test."""

from click.testing import CliRunner, Result

from scm_sdk.export.cli import main


def invoke(*arguments: object) -> Result:
    """Run ``scm-export`` with these arguments; an exception that it does not report as an error is raised."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run(*arguments: object, code: int = 0) -> Result:
    """Run ``scm-export`` as ``invoke`` does, and check its exit code."""
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    return result
