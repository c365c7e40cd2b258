"""Behind `eo.claim` the caller catches the error that ended their transaction, and commits.

The kind: the claim is gone with the transaction, and COMMIT says nothing of it. PostgreSQL answers ROLLBACK to the COMMIT of an
aborted transaction; MySQL and MariaDB have begun another one, and so has SQLite's driver; a procedure has rolled back. The caller
would acknowledge a message of which nothing stands, or only the later half, which a copy writes again.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from exactly_once import ExactlyOnce, Misuse
from exactly_once.testing.databases import DatabaseServer
from exactly_once.testing.postgres import EmbeddedPostgres
from tests.integration.shop import EFFECT, GROUP, ONLY, STOCK, Shop, on, put
from tests.integration.threads import Turn, in_thread
from tests.integration.ways import in_session, mariadb_procedures
from tests.waiting import until

pytestmark = pytest.mark.nightly(meet=2)


@pytest.fixture
def eo() -> ExactlyOnce:
    """It needs a group and nothing else: the claim goes where the session goes."""
    return ExactlyOnce(group=GROUP)


# -- how a caller's transaction is committed ---------------------------------------------------------------------------

Do = Callable[[Session], object]


def _session_begin(connection: Connection, do: Do) -> None:
    with Session(connection.engine) as session, session.begin():
        do(session)


def _session_commit(connection: Connection, do: Do) -> None:
    with Session(connection.engine) as session:
        do(session)
        session.commit()


def _session_of_a_connection(connection: Connection, do: Do) -> None:
    with connection.begin(), Session(connection) as session:
        do(session)
        session.flush()


def _session_in_a_savepoint(connection: Connection, do: Do) -> None:
    with connection.begin(), Session(connection, join_transaction_mode="create_savepoint") as session:
        do(session)
        with suppress(DBAPIError):  # its savepoint went with the transaction
            session.commit()


def _connection_commit(connection: Connection, do: Do) -> None:
    with Session(connection) as session:
        do(session)
        connection.commit()


ENDS = {
    "session.begin": _session_begin,
    "session.commit": _session_commit,
    "connection.begin": _session_of_a_connection,
    "joined in a savepoint": _session_in_a_savepoint,
    "connection.commit": _connection_commit,
}
each_end = pytest.mark.parametrize("end", ENDS)


def run(shop: Shop, end: str, do: Do) -> None:
    """Do this in a transaction of the shop's colour that ends so."""
    commits = ENDS[end]
    own = commits in (_session_begin, _session_commit)

    async def awaited() -> None:
        if own:
            async with AsyncSession(shop.async_engine) as session:
                if commits is _session_commit:
                    await session.run_sync(do)
                    await session.commit()
                    return
                async with session.begin():
                    await session.run_sync(do)
            return
        async with shop.async_engine.connect() as connection:
            await connection.run_sync(commits, do)

    if shop.is_async:
        shop.await_(awaited())
    elif own:
        commits(shop.engine, do)  # type: ignore[arg-type]  # an engine is its own `engine`
    else:
        with shop.engine.connect() as connection:
            commits(connection, do)


def nothing_stands(shop: Shop) -> None:
    shop.assert_kept(claims=[])


def once_more(shop: Shop, end: str, eo: ExactlyOnce) -> None:
    """What the redelivery does: it is the first."""
    with shop.outside.begin() as connection:
        connection.execute(EFFECT.delete())

    def do(session: Session) -> None:
        assert eo.claim(session, "handler", "A-1")
        put(session, "again")

    run(shop, end, do)
    shop.assert_kept("again", claims=["A-1"])


# -- the errors --------------------------------------------------------------------------------------------------------


@each_end
def test_an_error_that_is_caught_as_the_last_thing(shop: Shop, eo: ExactlyOnce, end: str) -> None:
    with shop.outside.begin() as connection:
        connection.execute(insert(ONLY).values(text="there"))

    def do(session: Session) -> None:
        assert eo.claim(session, "handler", "A-1")
        put(session, "effect")
        with suppress(IntegrityError):
            session.execute(insert(ONLY).values(text="there"))

    if shop.dialect != "postgres":  # elsewhere such an error undoes its statement alone
        run(shop, end, do)
        shop.assert_kept("effect", claims=["A-1"])
        return
    with pytest.raises(Misuse, match=r"'A-1' of 'handler'.*[Dd]o not acknowledge.*begin_nested"):
        run(shop, end, do)
    nothing_stands(shop)
    once_more(shop, end, eo)


@each_end
@pytest.mark.parametrize("savepoint", [True, False])
@on("postgres", "mariadb")
def test_a_deadlock_that_is_caught(shop: Shop, eo: ExactlyOnce, end: str, savepoint: bool) -> None:
    with shop.outside.begin() as connection:
        connection.execute(insert(STOCK), [{"item": item, "amount": 9} for item in (1, 2)])
    ours, theirs = Turn(), Turn()

    def take(session: Any, item: int) -> None:
        session.execute(update(STOCK).where(STOCK.c.item == item).values(amount=STOCK.c.amount - 1))

    def other() -> None:
        with shop.outside.begin() as connection:
            if shop.dialect == "postgres":
                connection.execute(text("SET LOCAL deadlock_timeout = '60s'"))
            connection.execute(insert(STOCK), [{"item": item, "amount": 0} for item in range(100, 400)])
            take(connection, 2)
            theirs.come()
            ours.wait()
            take(connection, 1)

    def both(session: Session) -> None:
        theirs.wait()
        take(session, 1)
        ours.come()
        take(session, 2)

    met: list[object] = []

    def do(session: Session) -> None:
        assert eo.claim(session, "handler", "A-1")
        put(session, "before")
        try:
            if savepoint:
                with session.begin_nested():
                    both(session)
            else:
                both(session)
        except OperationalError as error:
            met.append(error)
        with suppress(DBAPIError):  # PostgreSQL refuses what follows by itself, where no savepoint was
            put(session, "after")

    with in_thread(other):
        if shop.dialect == "postgres" and savepoint:
            run(shop, end, do)
            shop.assert_kept("before", "after", claims=["A-1"])
            assert met
            return
        with pytest.raises(Misuse, match=r"'A-1' of 'handler'.*[Dd]o not acknowledge"):
            run(shop, end, do)
    assert met
    nothing_stands(shop)
    once_more(shop, end, eo)


ROLLS_BACK = {
    "ON CONFLICT ROLLBACK": "INSERT OR ROLLBACK INTO only_one (text) VALUES ('there')",
    "RAISE(ROLLBACK)": "INSERT INTO only_one (text) VALUES ('never')",
}


@each_end
@pytest.mark.parametrize("how", ROLLS_BACK)
@pytest.mark.parametrize("goes_on", [True, False])
@on("sqlite")
def test_an_error_with_which_sqlite_rolls_back(shop: Shop, eo: ExactlyOnce, end: str, how: str, goes_on: bool) -> None:
    with shop.outside.begin() as connection:
        connection.execute(insert(ONLY).values(text="there"))
        connection.execute(
            text(
                "CREATE TRIGGER IF NOT EXISTS never BEFORE INSERT ON only_one WHEN NEW.text = 'never'"
                " BEGIN SELECT RAISE(ROLLBACK, 'never'); END"
            )
        )

    def do(session: Session) -> None:
        assert eo.claim(session, "handler", "A-1")
        put(session, "before")
        with suppress(IntegrityError):
            session.execute(text(ROLLS_BACK[how]))
        if goes_on:
            put(session, "after")

    with pytest.raises(Misuse, match=r"'A-1' of 'handler'.*[Dd]o not acknowledge"):
        run(shop, end, do)
    nothing_stands(shop)
    once_more(shop, end, eo)


# -- a MariaDB that undoes the whole transaction where others undo a statement -----------------------------------------


@pytest.mark.parametrize("error", ["lock wait timeout", "snapshot"])
def test_an_error_that_costs_the_transaction_where_the_server_is_set_so(
    strict: Shop, eo: ExactlyOnce, error: str
) -> None:
    with strict.outside.begin() as connection:
        connection.execute(insert(STOCK), [{"item": 1, "amount": 9}])
    met: list[object] = []

    def take(session: Any) -> None:
        session.execute(update(STOCK).where(STOCK.c.item == 1).values(amount=STOCK.c.amount - 1))

    def do(session: Session) -> None:
        session.execute(text("SET SESSION innodb_lock_wait_timeout = 1"))
        session.execute(select(STOCK)).all()  # the snapshot
        assert eo.claim(session, "handler", "A-1")
        put(session, "before")
        with strict.outside.connect() as other:
            take(other)
            if error == "snapshot":
                other.commit()
            try:
                with session.begin_nested():
                    take(session)
            except OperationalError as caught:
                met.append(caught)
            other.rollback()
        put(session, "after")

    with pytest.raises(Misuse, match=r"'A-1' of 'handler'.*[Dd]o not acknowledge"):
        run(strict, "session.begin", do)
    assert met
    nothing_stands(strict)
    once_more(strict, "session.begin", eo)


# -- what ended it without an error ------------------------------------------------------------------------------------


@pytest.mark.parametrize("procedure", ["gives_up", "commits"])
@on("mariadb")
def test_a_procedure_that_ended_the_transaction_as_the_last_thing(shop: Shop, eo: ExactlyOnce, procedure: str) -> None:
    """Its EXIT HANDLER rolls back, as many do: the driver says that nothing is open, and COMMIT would say that all is well."""
    mariadb_procedures(
        shop,
        gives_up=(
            "() BEGIN DECLARE EXIT HANDLER FOR SQLEXCEPTION BEGIN ROLLBACK; END;"
            " INSERT INTO staging VALUES (1); SIGNAL SQLSTATE '45000'; END"
        ),
        commits="() BEGIN COMMIT; END",
    )

    def do(session: Session) -> None:
        if eo.claim(session, "handler", "A-1"):
            put(session, "effect")
            session.execute(text(f"CALL {procedure}()"))

    with pytest.raises(Misuse, match=r"'A-1' of 'handler'.*[Dd]o not acknowledge"):
        run(shop, "session.begin", do)
    if procedure == "gives_up":
        nothing_stands(shop)
        once_more(shop, "session.begin", eo)
    else:  # the copy finds that it was done
        assert in_session(shop, lambda session: eo.claim(session, "handler", "A-1")) is False
        shop.assert_kept("effect", claims=["A-1"])


# -- what is no such error ---------------------------------------------------------------------------------------------


def fails_in(session: Session) -> None:
    """An error that aborts the transaction on PostgreSQL, and a statement elsewhere."""
    session.execute(text("SELECT nothing FROM nowhere"))


def test_the_error_itself_comes_out_where_the_caller_lets_it_out(shop: Shop, eo: ExactlyOnce) -> None:
    def do(session: Session) -> None:
        assert eo.claim(session, "handler", "A-1")
        put(session, "effect")
        fails_in(session)

    with pytest.raises(DBAPIError):
        in_session(shop, do)
    nothing_stands(shop)


def test_a_caller_who_rolls_back_and_runs_all_of_it_again_commits(shop: Shop, eo: ExactlyOnce) -> None:
    def do(session: Session) -> None:
        for last in (False, True):
            assert eo.claim(session, "handler", "A-1")
            put(session, "effect")
            if not last:
                with suppress(DBAPIError):
                    fails_in(session)
                session.rollback()

    run(shop, "session.commit", do)
    shop.assert_kept("effect", claims=["A-1"])


@on("postgres")  # elsewhere such an error undoes its statement alone
def test_a_refused_session_is_usable_after_its_rollback(shop: Shop, eo: ExactlyOnce) -> None:
    def claims_in_vain(session: Session) -> None:
        assert eo.claim(session, "handler", "A-1")
        put(session, "lost")
        with suppress(DBAPIError):
            fails_in(session)

    def claims(session: Session) -> None:
        assert eo.claim(session, "handler", "A-1")
        put(session, "effect")

    async def awaited() -> None:
        async with AsyncSession(shop.async_engine) as session:
            await session.run_sync(claims_in_vain)
            with pytest.raises(Misuse):
                await session.commit()
            await session.rollback()
            await session.run_sync(claims)
            await session.commit()

    if shop.is_async:
        shop.await_(awaited())
    else:
        with Session(shop.engine) as session:
            claims_in_vain(session)
            with pytest.raises(Misuse):
                session.commit()
            session.rollback()
            claims(session)
            session.commit()
    shop.assert_kept("effect", claims=["A-1"])


def test_a_transaction_without_a_claim_of_its_own_is_nobodys_business(shop: Shop, eo: ExactlyOnce) -> None:
    def swallows(session: Session) -> None:
        put(session, "in vain")
        with suppress(DBAPIError):
            fails_in(session)

    def a_duplicate(session: Session) -> None:
        assert eo.claim(session, "handler", "A-1") is False
        swallows(session)

    assert in_session(shop, lambda session: eo.claim(session, "handler", "A-1"))
    in_session(shop, swallows)  # on the connection that the claim had
    in_session(shop, a_duplicate)


@on("sqlite")  # whose way to lose a transaction needs no second session
def test_another_claim_behind_the_loss_is_refused(shop: Shop, eo: ExactlyOnce) -> None:
    """Of a list of messages in one transaction, each in its savepoint."""
    with shop.outside.begin() as connection:
        connection.execute(insert(ONLY).values(text="there"))

    def do(session: Session) -> None:
        assert eo.claim(session, "handler", "A-1")
        with suppress(IntegrityError):
            session.execute(text(ROLLS_BACK["ON CONFLICT ROLLBACK"]))
        for other in (eo, ExactlyOnce(group=GROUP)):
            with pytest.raises(Misuse, match=r"'A-1' of 'handler'"):
                other.claim(session, "handler", "A-2")

    with pytest.raises(Misuse):
        in_session(shop, do)
    nothing_stands(shop)


@on("postgres", "mariadb", colour="sync")  # SQLite has no two phases
def test_a_prepared_transaction_is_refused_too(shop: Shop, eo: ExactlyOnce) -> None:
    """Two phases: the server refuses to commit what it has not prepared."""
    with shop.outside.begin() as connection:
        connection.execute(insert(ONLY).values(text="there"))

    with suppress(DBAPIError, Misuse), Session(shop.engine, twophase=True) as session, session.begin():
        assert eo.claim(session, "handler", "A-1")
        put(session, "effect")
        with suppress(IntegrityError):
            session.execute(insert(ONLY).values(text="there"))
    assert (shop.effects(), shop.claims()) in ((["effect"], ["A-1"]), ([], []))


def test_what_cannot_be_prepared_keeps_no_half_in_another_database() -> None:
    """Two phases over two databases of PostgreSQL: PREPARE of an aborted transaction answers ROLLBACK, and no error."""
    with EmbeddedPostgres(settings={"max_prepared_transactions": "8"}) as own:
        server = DatabaseServer(own.url, source="url")
        first, second = (create_engine(server.create()) for _ in "ab")
        EFFECT.metadata.create_all(first)
        EFFECT.metadata.create_all(second)
        eo = ExactlyOnce(group=GROUP)

        def do(key: str) -> None:
            with Session(first, twophase=True) as session, session.begin():
                assert eo.claim(session, "handler", key)
                session.execute(insert(EFFECT).values(text="there"), bind_arguments={"bind": second})
                with suppress(DBAPIError):
                    session.execute(text("SELECT 1 / 0"), bind_arguments={"bind": first})

        for no in range(12):  # which of them SQLAlchemy prepares first is chance
            with pytest.raises(Misuse, match=f"'A-{no}' of 'handler'"):
                do(f"A-{no}")
        for engine in (first, second):
            with engine.connect() as connection:
                assert connection.execute(select(EFFECT)).all() == []
                assert connection.execute(text("SELECT gid FROM pg_prepared_xacts")).all() == []
            engine.dispose()


@on("mariadb")
def test_a_statement_that_is_killed_in_a_savepoint_undoes_itself_alone(shop: Shop, eo: ExactlyOnce) -> None:
    """KILL QUERY, by a watchdog of long statements."""

    def do(session: Session) -> None:
        assert eo.claim(session, "handler", "A-1")
        put(session, "before")
        killed_once(shop, session)
        put(session, "after")

    in_session(shop, do)
    shop.assert_kept("before", "after", claims=["A-1"])


def killed_once(shop: Shop, session: Session) -> None:
    """A statement of this session is killed, in a savepoint."""
    number = session.execute(text("SELECT CONNECTION_ID()")).scalar_one()
    looks = text(f"SELECT count(*) FROM information_schema.processlist WHERE id = {number} AND info LIKE '%SLEEP%'")

    def watchdog() -> None:
        with shop.outside.connect() as outside:
            until(lambda: bool(outside.execute(looks).scalar_one()), "it runs")
            outside.execute(text(f"KILL QUERY {number}"))

    def half() -> None:
        with session.begin_nested():
            put(session, "half")
            session.execute(text("UPDATE effect SET text = SLEEP(20)"))

    with in_thread(watchdog), pytest.raises(DBAPIError):
        half()


# -- a commit that was forgotten ---------------------------------------------------------------------------------------


def _block_without_begin(shop: Shop, do: Do) -> None:
    with Session(shop.engine) as session:
        do(session)


def _closed(shop: Shop, do: Do) -> None:
    session = Session(shop.engine)
    do(session)
    session.close()


def _removed(shop: Shop, do: Do) -> None:
    scoped = scoped_session(sessionmaker(shop.engine))
    do(scoped())
    scoped.remove()


def _connection_without_begin(shop: Shop, do: Do) -> None:
    with shop.engine.connect() as connection, Session(connection, join_transaction_mode="control_fully") as session:
        do(session)


def told_of_claims(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "exactly_once.claim"]


@pytest.mark.parametrize("forgets", [_block_without_begin, _closed, _removed, _connection_without_begin])
@on(colour="sync")
def test_a_claim_that_nobody_committed_is_told(
    shop: Shop, eo: ExactlyOnce, caplog: pytest.LogCaptureFixture, forgets: Callable[[Shop, Do], None]
) -> None:
    """`with Session(engine) as session:` without `session.begin()`: no error says so, and the message is acknowledged."""

    def do(session: Session) -> None:
        assert eo.claim(session, "handler", "A-1")
        put(session, "effect")

    forgets(shop, do)
    (told,) = told_of_claims(caplog)
    assert told.startswith(
        "The claim of the key 'A-1' of 'handler' was rolled back, with all that was written beside it"
    )
    assert "session.begin()" in told
    shop.assert_kept(claims=[])


@pytest.mark.parametrize(
    "end", ["commit", "rollback", "raises", "raises in begin", "known", "refused", "in a savepoint"]
)
def test_what_is_meant_or_told_otherwise_is_not_told_again(
    shop: Shop, eo: ExactlyOnce, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    def do(session: Session) -> None:
        assert eo.claim(session, "handler", "A-1")
        if end == "refused":
            with suppress(DBAPIError):
                session.execute(text("SELECT * FROM nowhere"))
        if end.startswith("raises"):
            raise ZeroDivisionError
        if end == "rollback":
            session.rollback()
        elif end == "in a savepoint":
            with session.begin_nested() as savepoint:
                savepoint.rollback()
            session.commit()
        elif end == "commit":
            session.commit()

    def known(session: Session) -> None:
        assert not eo.claim(session, "handler", "A-1")

    if end == "known":
        in_session(shop, lambda session: eo.claim(session, "handler", "A-1"))

    async def awaited() -> None:
        async with AsyncSession(shop.async_engine) as session:
            if end == "raises in begin":
                async with session.begin():
                    await session.run_sync(do)
            else:
                await session.run_sync(known if end == "known" else do)

    with suppress(ZeroDivisionError):
        if shop.is_async:
            shop.await_(awaited())
        else:
            with Session(shop.engine) as session:
                if end == "raises in begin":
                    with session.begin():
                        do(session)
                else:
                    (known if end == "known" else do)(session)
    if end != "refused" or shop.dialect == "postgres":  # elsewhere a statement that fails ends nothing
        assert told_of_claims(caplog) == []


# -- a claim in a savepoint --------------------------------------------------------------------------------------------


def _claims_and_raises(eo: ExactlyOnce, session: Session, key: str, depth: int = 1) -> None:
    """Claim in so many savepoints; the outermost is rolled back by an error, the inner ones are released."""
    with session.begin_nested():
        if depth > 1:
            with session.begin_nested():
                assert eo.claim(session, "handler", key)
        else:
            assert eo.claim(session, "handler", key)
        put(session, key)
        raise ValueError(key)


@each_end
@pytest.mark.parametrize("depth", [1, 2])
def test_a_claim_whose_savepoint_was_rolled_back_is_told_at_commit(
    shop: Shop, eo: ExactlyOnce, caplog: pytest.LogCaptureFixture, end: str, depth: int
) -> None:
    """The error is caught outside of the savepoint, and the caller may take the True for done."""

    def do(session: Session) -> None:
        for key in ("A-1", "A-2", "A-3"):
            with suppress(ValueError):
                if key == "A-3":
                    assert eo.claim(session, "handler", key)
                    put(session, key)
                else:
                    _claims_and_raises(eo, session, key, depth)
        assert told_of_claims(caplog) == []

    run(shop, end, do)
    (told,) = told_of_claims(caplog)
    assert told.startswith(
        "The claim of the key 'A-1' of 'handler' (and 1 more) was rolled back with the savepoint it was made in"
    )
    assert "the rest of the transaction is committed" in told
    assert "Do not acknowledge" in told
    shop.assert_kept("A-3", claims=["A-3"])


@pytest.mark.parametrize("how", ["made again", "all rolled back", "savepoint kept"])
def test_a_savepoint_that_takes_no_claim_away_is_not_told(
    shop: Shop, eo: ExactlyOnce, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    def do(session: Session) -> None:
        if how == "savepoint kept":
            with session.begin_nested():
                assert eo.claim(session, "handler", "A-1")
            with suppress(ValueError), session.begin_nested():
                raise ValueError
            return
        with suppress(ValueError):
            _claims_and_raises(eo, session, "A-1")
        if how == "all rolled back":
            raise ZeroDivisionError
        assert eo.claim(session, "handler", "A-1")

    with suppress(ZeroDivisionError):
        run(shop, "session.begin", do)
    assert told_of_claims(caplog) == []
    assert shop.claims() == ([] if how == "all rolled back" else ["A-1"])
