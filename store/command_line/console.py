"""The command line's group and commands: their help, verbosity, log file, and errors in one line.

Libraries log with `logging`. Here the loggers of all packages get a handler for standard error and,
with --log-file, one for a file. No record contains a path or a name of an archive; messages of
errors may, so the file gets only the kinds of errors and where they were raised.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from store import progress
from store.command_line.options import LocalPath
from store.errors import ConfigError, SemgenError

_PACKAGES: Final = ("pipeline", "store", "trainer")
_PRINTED: Final = frozenset({__name__, "store.progress", "trainer.messages"})
"""Loggers of lines that are also printed, or meant for the file only."""
_KEY: Final = "semgen."
"""Prefix of what these options leave in the `meta` of a click context."""
_log = logging.getLogger(__name__)


# Groups and commands ------------------------------------------------------------------------------


class Command(click.Command):
    """A command that takes the options of verbosity, too, and lists its settings by heading."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += _verbosity_options(hidden=True)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write options; those that are settings below their headings."""
        heading, sections = "Options", dict[str, list[tuple[str, str]]]()
        headings: Mapping[str, str] = getattr(self.callback, "headings", {})
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)):
                if param.name in getattr(self.callback, "settings", ()):
                    heading = headings.get(str(param.name), heading)
                    sections.setdefault(heading, []).append(record)
                else:
                    sections.setdefault("Options", []).append(record)
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command while the loggers have their handlers."""
        with _open_log(ctx):
            return super().invoke(ctx)


class Group(click.Group):
    """Commands by section, in the order of use, each with its first sentence."""

    command_class = Command
    sections: Mapping[str, Sequence[str]] = {}
    """Names of commands by section; others come last."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write whole sentences, wrapped."""
        listed = {name for names in self.sections.values() for name in names}
        others = [name for name in self.commands if name not in listed]
        width = max(map(len, self.commands))
        for title, names in {**self.sections, "Commands": others}.items():
            rows = [
                (name.ljust(width), self.commands[name].get_short_help_str(limit=1000))
                for name in names
                if name in self.commands
            ]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


class _WrongSetting(click.ClickException):
    exit_code = 2


class MainGroup(Group):
    """The whole command line: expected errors become one line and exit status 1, or 2.

    2 is for wrong settings, as for wrong options.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += _verbosity_options(hidden=False)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        _open_closed_streams()
        with _ended_like_ctrl_c():
            return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may not be UTF-8
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of our output has ended; click exits quietly
        except (KeyboardInterrupt, RuntimeError) as error:
            if not _is_interrupt(error):
                raise
            raise click.ClickException(
                "interrupted; run the same command again to resume"
            ) from error
        except Exception as error:
            text = _explain(error)
            if text is None or ctx.params["debug"]:
                raise  # a bug keeps its traceback
            wrong = isinstance(error, ConfigError)
            raise (_WrongSetting if wrong else click.ClickException)(text) from error


@contextlib.contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """SIGTERM, which batch systems send when the time is over, does what Ctrl-C does."""
    before = signal.getsignal(signal.SIGTERM)
    watched = before is signal.SIG_DFL and threading.current_thread() is threading.main_thread()
    if watched:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if watched:
            signal.signal(signal.SIGTERM, before)


def _open_closed_streams() -> None:
    """Lead standard streams that the caller closed nowhere: no file of ours may get their number.

    Libraries and workers write to number 2 directly.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
            stream = open(number, "w" if number else "r", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)


def _explain(error: BaseException) -> str | None:
    """One line for an error that is meant for the user; None for a bug."""
    if isinstance(error, SemgenError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:  # the system's: permissions, disk, network
        text = f"{error.filename or ''}: {error.strerror}".lstrip(": ")
        if error.errno == errno.ENOSPC:
            text += "; free disk space, then run the same command again to resume"
        return text
    return None


def _is_interrupt(error: BaseException | None) -> bool:
    """Ctrl-C, also where it came while a lock was being released (a RuntimeError)."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, RuntimeError) and _is_interrupt(error.__context__)
    )


# Verbosity and logs -------------------------------------------------------------------------------


class Terminal(progress.Terminal):
    """The progress of a command; with --quiet, only the log file gets it."""

    def __init__(self) -> None:
        super().__init__(quiet=is_quiet())


def is_quiet() -> bool:
    """Whether the command was given --quiet."""
    return bool(click.get_current_context().meta.get(f"{_KEY}quiet"))


def has_colour(stream: Any) -> bool:
    """Whether to write coloured text to a stream."""
    return progress.can_draw(stream) and not os.environ.get("NO_COLOR")


def _verbosity_options(*, hidden: bool) -> list[click.Parameter]:
    def remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value:
            ctx.meta[f"{_KEY}{param.name}"] = value  # shared by a group and its command

    kinds: tuple[tuple[list[str], dict[str, Any]], ...] = (
        (["-v", "--verbose"], {"is_flag": True, "help": "Print details, with the time of day."}),
        (["-q", "--quiet"], {"is_flag": True, "help": "Print only errors and the result."}),
        (
            ["--log-file"],
            {
                "type": LocalPath(dir_okay=False),
                "help": "Append all details to this file. Like -v and -q also allowed after the"
                " command.",
            },
        ),
    )
    return [
        click.Option(names, hidden=hidden, expose_value=False, callback=remember, **rest)
        for names, rest in kinds
    ]


@contextlib.contextmanager
def _open_log(ctx: click.Context) -> Iterator[None]:
    """Give the packages' loggers their handlers, and log how the command begins and ends."""
    verbose, quiet, file = (ctx.meta.get(_KEY + name) for name in ("verbose", "quiet", "log_file"))
    if verbose and quiet:
        raise click.UsageError("give either --verbose or --quiet")
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING
    handlers: list[logging.Handler] = [_StandardError(level)]
    if file is not None and os.environ.get("RANK", "0") == "0":  # of several processes, the first
        handlers.append(_open_file(file))
    loggers = [logging.getLogger(name) for name in _PACKAGES]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(min(handler.level for handler in handlers))
        logger.propagate = False
        for handler in handlers:
            logger.addHandler(handler)
    try:
        with _logged(ctx):
            yield
    finally:
        for logger, (old_level, propagates) in zip(loggers, before, strict=True):
            logger.setLevel(old_level)
            logger.propagate = propagates
            for handler in handlers:
                logger.removeHandler(handler)
        for handler in handlers:
            handler.close()


class _StandardError(logging.Handler):
    """Writes to what is standard error then: while a bar is drawn, the text above it."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        if level == logging.DEBUG:
            self.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
        self.addFilter(lambda record: record.name not in _PRINTED)

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


class _LogFile(logging.FileHandler):
    """Says once when the file cannot be written, as on a full disk; the command goes on."""

    reported = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.reported:
            self.reported = True
            print(f"{self.baseFilename}: {error.strerror}; lines are missing", file=sys.stderr)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # reported above
            super().close()


def _open_file(file: Path) -> logging.Handler:
    handler = _LogFile(file, encoding="utf-8")
    handler.setLevel(logging.DEBUG)
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S%z")
    )
    return handler


@contextlib.contextmanager
def _logged(ctx: click.Context) -> Iterator[None]:
    began = time.perf_counter()
    _log.info("semgen %s begins", ctx.info_name)
    try:
        yield
    except click.exceptions.Exit as ended:
        _log.info("ends with status %d", ended.exit_code)
        raise
    except BaseException as error:
        if _is_interrupt(error):
            _log.info("interrupted")
        elif isinstance(error, click.ClickException) or _explain(error) is not None:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}, line {frame.lineno}"
            _log.error("%s in %s; standard error says more", type(error).__name__, where)
        else:
            _log.error("a bug; its message is on standard error\n%s", _frames(error))
        raise
    _log.info("ends after %s", progress.format_duration(time.perf_counter() - began))


def _frames(error: BaseException | None) -> str:
    """The traceback without the messages of exceptions: they may quote files and headers."""
    parts: list[str] = []
    while error is not None:
        frames = traceback.format_tb(error.__traceback__)
        parts.append("".join([*frames, type(error).__qualname__]))
        error = error.__cause__ or error.__context__
    return "\n\nraised while handling:\n\n".join(parts)
