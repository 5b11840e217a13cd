"""What several files of this folder read and none changes."""

import pytest


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """What two ranks recorded, a dictionary per rank by case of `two_ranks.CASES`."""
    import two_ranks

    return two_ranks.run(tmp_path_factory)[2]


@pytest.fixture(scope="session")
def three(tmp_path_factory):
    """What three ranks recorded, by case of `two_ranks.THREE`."""
    import two_ranks

    return two_ranks.run(tmp_path_factory)[3]
