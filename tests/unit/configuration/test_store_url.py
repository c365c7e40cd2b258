"""A database URL whose spelling SQLAlchemy does not know is answered with one that it does."""

import pytest

from exactly_once.database.store import Store
from exactly_once.errors import ConfigurationError


@pytest.mark.parametrize(
    ("url", "told"),
    [("postgres://shop:hunter2@db/shop", "postgresql+psycopg://"), ("oracel://shop:hunter2@db/shop", "sqlite")],
)
def test_a_misspelt_database_is_told_how_it_is_spelt(url: str, told: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        _ = Store("default", url).engine
    assert told in str(error.value)
    assert "hunter2" not in str(error.value)
