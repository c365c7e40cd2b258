"""What other programs do to a shop's database and to its pool, and read from it."""

from typing import Any

from tests.integration.shop import Shop


def run(shop: Shop, *statements: str) -> None:
    with shop.outside.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def column(shop: Shop, statement: str) -> list[Any]:
    with shop.outside.connect() as connection:
        return list(connection.exec_driver_sql(statement).scalars())


def by_other_code(shop: Shop, *statements: str) -> None:
    """Code of the program that shares the pool with its handlers: in a transaction of its own, committed."""
    if shop.is_async:

        async def send() -> None:
            async with shop.async_engine.begin() as connection:
                for statement in statements:
                    await connection.exec_driver_sql(statement)

        shop.await_(send())
        return
    with shop.engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def set_autocommit(shop: Shop) -> None:
    async def by_await() -> None:
        async with shop.async_engine.connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            await driver.set_autocommit(True)

    if shop.is_async:
        shop.await_(by_await())
        return
    with shop.engine.connect() as connection:
        connection.connection.driver_connection.autocommit = True  # type: ignore[union-attr]
