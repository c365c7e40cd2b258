"""Which characters a connection can carry into its database, as the driver and the server reported. Sends no query.

A text of ours must never keep a message from being written down, so it is escaped to this character set. Where the server still
refuses the text (the server and Python read a multi-byte character set differently), the caller writes ASCII. Called by `store`,
`failures`, `alembic` and `transports.sql`.
"""

from typing import Any, Final

from sqlalchemy import URL, Connection, text

from exactly_once.wording.text import EVERY, THREE_BYTES

__all__ = ["characters_of", "narrow", "utf8_args"]

_ASCII: Final = "ascii"  # every character set of every server has it
_MYSQL: Final = {"utf8mb4": EVERY, "utf8": THREE_BYTES, "utf8mb3": THREE_BYTES, "latin1": "cp1252"}
_POSTGRESQL: Final = {
    "UTF8": EVERY,
    "SQL_ASCII": EVERY,  # bytes are stored as they come: no character set at all
    **{f"LATIN{n}": f"iso8859-{part}" for n, part in enumerate((1, 2, 3, 4, 9, 10, 13, 14, 15, 16), 1)},
    **{f"ISO_8859_{part}": f"iso8859-{part}" for part in (5, 6, 7, 8)},
    **{f"WIN{page}": f"cp{page}" for page in (866, 874, *range(1250, 1259))},
    "KOI8R": "koi8-r",
    "KOI8U": "koi8-u",
    "EUC_JP": "euc-jp",
    "EUC_KR": "euc-kr",
    "EUC_CN": "gb2312",
}


def characters_of(connection: Connection) -> str:
    """Return the character set that texts to this database must fit, in the form that `storable` takes. No round trip."""
    driver = _driver(connection)
    match connection.dialect.name:
        case "postgresql":
            database, client = _encodings(driver)
            if client == "UTF8":
                return _POSTGRESQL.get(database, _ASCII)
            return _POSTGRESQL.get(client, _ASCII) if client == database else _ASCII
        case "mysql" | "mariadb":
            return _MYSQL.get(str(driver.character_set_name()), _ASCII)
        case _:
            return EVERY


def narrow(connection: Connection) -> str | None:
    """Return the character set that lacks characters: of a PostgreSQL database, or of a MySQL connection.

    None if it lacks none.
    """
    match connection.dialect.name:
        case "postgresql":
            database, _ = _encodings(_driver(connection))
            return None if database == "UTF8" else database
        case "mysql" | "mariadb":
            sets = connection.execute(
                text("SELECT @@character_set_client, @@character_set_connection, @@character_set_results")
            ).one()
            return next((str(name) for name in sets if name != "utf8mb4"), None)
        case _:
            return None


def utf8_args(url: URL) -> dict[str, str]:
    """Return connection arguments that make texts travel as UTF-8, whatever encoding a PostgreSQL database stores.

    Without them libpq uses the database's own character set. Then the driver refuses characters that this
    set lacks. For SQL_ASCII the driver returns bytes, on which SQLAlchemy fails at the first connection.
    """
    if url.get_backend_name() != "postgresql" or "client_encoding" in url.query:
        return {}
    return {"client_encoding": "utf8"}


def _driver(connection: Connection) -> Any:
    dbapi: Any = connection.connection.dbapi_connection
    return getattr(dbapi, "driver_connection", None) or getattr(dbapi, "_connection", dbapi)


def _encodings(driver: Any) -> tuple[str, str]:
    said = driver.info.parameter_status
    return said("server_encoding") or "", said("client_encoding") or ""
