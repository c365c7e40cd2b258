"""Whether a database can be used: it answers, our tables exist, and its connections carry every character.

Asked at a start, by the doctor and by commands. If waiting helps, it returns a sentence; else it raises.
"""

from exactly_once.alembic.migrate import check
from exactly_once.database.characters import narrow
from exactly_once.database.connections.had_before import is_firsthand, kept_firsthand, moment
from exactly_once.database.dialects.contract import ErrorKind
from exactly_once.database.dialects.schema_lookup import as_sessions_begin
from exactly_once.database.engines import WHERE_GIVEN, refuse_options
from exactly_once.database.errors.drivers_own import is_of_a_database
from exactly_once.database.errors.interrupted import interrupted
from exactly_once.database.errors.unusable import denied, is_denied, is_read_only, read_only, silent, unusable, words
from exactly_once.database.mysql_session import put_right
from exactly_once.database.store import Store
from exactly_once.errors import ConfigurationError, SchemaError
from exactly_once.exceptions.drivers import is_drivers
from exactly_once.exceptions.words import words_of
from exactly_once.wording.redaction import redacted
from exactly_once.wording.text import escaped, stopped

__all__ = ["problem", "refusal", "waited_for"]


def problem(store: Store) -> str | None:
    """Check whether this database can be used. None if so, else what is waited for (it does not answer).

    Raises:
        ConfigurationError: Waiting would not repair it: no such user or database, or the schema is missing or old.
    """
    dialect = store.dialect
    ours = store.engine in store.made  # else the application's own connect function may ignore the URL
    if ours and dialect.name == "mysql" and (told := silent(store.engine.url)) is not None:
        return f"{redacted(store.engine.url)} does not answer ({told})"
    try:
        missing, lacking = _found(store)
    except TypeError as error:
        refuse_options(store.engine.url)  # for an engine we were given: drivers report unknown options so
        where = redacted(store.engine.url)
        if dialect.name != "postgresql":
            said = escaped(words_of(error), 200)
            raise ConfigurationError(
                f"The database {where} cannot be used: {stopped(said)} Check the URL {WHERE_GIVEN}"
            ) from error
        # SQLAlchemy reads bytes instead of text there, and raises this for it.
        raise ConfigurationError(
            f"The database {where} cannot be spoken to; most likely its character set is SQL_ASCII."
            " Give a URL in place of the engine, or: create_engine(..., connect_args={'client_encoding': 'utf8'})"
        ) from error
    except Exception as error:
        where = redacted(store.engine.url)
        if is_of_a_database(error) or is_drivers(error):  # what we send on the driver raises the driver's errors
            if (refused := refusal(store, error)) is not None:
                raise ConfigurationError(refused) from error
            if dialect.error_kind(error) is ErrorKind.UNAVAILABLE and not dialect.hopeless(error):
                return f"{where} does not answer ({unusable(error, store.engine.url) if ours else words(error)})"
            raise ConfigurationError(
                f"The database {where} cannot be used: {stopped(words(error))} Check the URL {WHERE_GIVEN}"
            ) from error
        if not store.unreached(error):
            raise
        # The application's own connect function raised: a service that it asks for a token is away, for example.
        return f"{where} does not answer ({escaped(words_of(error), 200)})"
    if missing is not None:
        raise SchemaError(missing)
    if lacking is not None and dialect.name == "mysql":
        url = store.engine.url
        # Before all other options: what follows a password is not printed.
        wanted = url.set(query={"charset": "utf8mb4", **{k: v for k, v in url.query.items() if k != "charset"}})
        raise ConfigurationError(
            f"The connection to {redacted(url)} uses the character set {lacking}, which lacks characters: messages with"
            f" an emoji or a rare letter could not be handled, nor kept as they are. Write {redacted(wanted)}"
        )
    store.lacking = lacking
    return None


def refusal(store: Store, error: BaseException) -> str | None:
    """Say what to do if the server lets us log in but not work: the user lacks a right."""
    return denied(error, store.engine.url, schema=store.schema) if is_denied(error) else None


def waited_for(store: Store, error: BaseException) -> str | None:
    """Return what is waited for if an error means that this database cannot be written to now; None for any other error."""
    if is_read_only(error):
        return read_only(store.engine.url)
    if not store.away(error):
        return None
    said = words(error) if is_of_a_database(error) else escaped(words_of(error), 200)
    return f"{redacted(store.engine.url)} does not answer ({said})"


def _found(store: Store) -> tuple[str | None, str | None]:
    """Return what the tables lack, and a character set that is too narrow. Uses another connection if others used this one."""
    dialect, since = store.dialect, moment()
    while True:
        with store.engine.connect() as connection:
            believed = is_firsthand(connection, since)
            kept_firsthand(connection)
            try:
                if dialect.name == "postgresql":
                    as_sessions_begin(connection)
                elif dialect.name == "mysql":
                    # First: with completion_type RELEASE the rollback below would end the connection.
                    put_right(connection)
                missing, lacking = check(connection, store.schema), narrow(connection)
                connection.rollback()
                if missing is None:
                    dialect.prepare(connection.connection.dbapi_connection, {}, wait_ms=1000)
            except Exception as error:
                if believed or dialect.error_kind(error) is ErrorKind.UNAVAILABLE or interrupted(error):
                    raise
            else:
                if believed or (missing is None and lacking is None):
                    return missing, lacking
            connection.invalidate()
