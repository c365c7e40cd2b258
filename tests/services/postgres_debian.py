"""Starts the PostgreSQL that Debian's package brings, as our own child, and in another language if asked.

It never touches the system's cluster. Called by tests. `python -m tests.services.postgres_debian COMMAND ...` runs a command
whose test databases are on it, given by its URL: `make on-url`. The embedded PostgreSQL has no
translations; Debian's has, but its messages are translated only in a locale that exists, and most machines have none but
C. So the locale is compiled into a folder of ours, which the server alone is told of: nothing is changed on the machine.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from exactly_once.testing.child import ServerFailed
from exactly_once.testing.postgres import EmbeddedPostgres

__all__ = ["DebianPostgres", "missing", "missing_language", "speaking"]

LANGUAGE = "de_DE"


def missing() -> str | None:
    """Say why Debian's PostgreSQL cannot run here, or return None."""
    return None if _programs() else "there is no /usr/lib/postgresql here (Debian: apt-get install postgresql)"


def missing_language() -> str | None:
    """Say why it cannot speak German here, or return None."""
    if reason := missing():
        return reason
    translation = Path(f"/usr/share/locale/{LANGUAGE[:2]}/LC_MESSAGES/postgres-{_version()}.mo")
    if not translation.exists():
        return f"PostgreSQL's German messages are not installed: {translation} (minimal images leave them out)"
    if shutil.which("localedef") is None or not Path(f"/usr/share/i18n/locales/{LANGUAGE}").exists():
        return "the sources of locales are not installed (Debian: apt-get install locales)"
    return None


class DebianPostgres(EmbeddedPostgres):
    """The newest PostgreSQL below /usr/lib/postgresql; everything else as its parent."""

    def __init__(self, *, settings: dict[str, str] | None = None, environ: dict[str, str] | None = None) -> None:
        programs = _programs()
        if programs is None:
            raise ServerFailed(f"Debian's PostgreSQL cannot run: {missing()}.")
        super().__init__(settings=settings, programs=programs, environ=environ)


@contextmanager
def speaking(language: str = LANGUAGE) -> Iterator[DebianPostgres]:
    """Run a server whose messages are in another language."""
    with TemporaryDirectory(prefix="exactly-once-locale-") as folder:
        Path(folder).chmod(0o755)  # the server runs as another user
        command = ["localedef", "-i", language, "-f", "UTF-8", f"{folder}/{language}.UTF-8"]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode > 1:  # 1: made, with warnings
            raise ServerFailed(f"The locale {language} could not be made: {made.stderr}")
        # LC_ALL and LANGUAGE of the caller would win over the server's setting
        environ = {"LOCPATH": folder, "LC_ALL": "", "LANGUAGE": "", "LANG": f"{language}.UTF-8"}
        with DebianPostgres(settings={"lc_messages": f"{language}.UTF-8"}, environ=environ) as server:
            yield server


def _programs() -> Path | None:
    found = {int(p.parts[-3]): p.parent for p in Path("/usr/lib/postgresql").glob("[0-9]*/bin/postgres")}
    return found[max(found)] if found else None


def _version() -> str:
    programs = _programs()
    return programs.parent.name if programs else ""


if __name__ == "__main__":
    with DebianPostgres() as started:
        given = {"EXACTLY_ONCE_TEST_SOURCE": "url", "EXACTLY_ONCE_TEST_DATABASE": started.url}
        sys.exit(subprocess.run(sys.argv[1:], env=os.environ | given).returncode)
