"""One finished sweep's folder with its report, for all tests that only read it."""

import example_sweep
import pytest

from ray_peft.report.files import write_report


@pytest.fixture(scope="session")
def swept(tmp_path_factory):
    """The folder, with report.md, report.html, report.csv and plots."""
    folder = example_sweep.build(tmp_path_factory.mktemp("swept"))
    write_report(folder)
    return folder
