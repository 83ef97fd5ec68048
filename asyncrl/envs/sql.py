"""Text to SQL: the model may try queries on a read-only SQLite database and answers with one; the rows must match.

Queries run in a sandbox, on a copy of the database, under a time limit.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import sqlglot
from sqlglot.tokens import TokenType

from asyncrl.envs.base import Tokenizer
from asyncrl.envs.chat import Message
from asyncrl.envs.data import Row
from asyncrl.envs.multi_turn import SHIPPED, Episode, MultiTurn, field
from asyncrl.envs.sandbox import Limits, Sandbox
from asyncrl.envs.tools import shorten, tagged
from asyncrl.utils.quote import cut, quote

_RUN = """
import json, sqlite3, sys
connection = sqlite3.connect("file:data.sqlite?mode=ro&immutable=1", uri=True)
try:
    rows = connection.execute(sys.stdin.read()).fetchall()
except (sqlite3.Error, sqlite3.Warning) as error:
    sys.exit(f"{type(error).__name__}: {error}")
print(json.dumps(rows, default=lambda blob: {"blob": blob.hex()}))
"""
_SYSTEM = (
    "Answer the question with one SQLite query. The tables:\n{schema}\n"
    "Try a query with <sql>SELECT ...</sql>, one per turn. End with <answer>SELECT ...</answer>."
)


class QueryError(Exception):
    """A query that did not run to its end; the text is the database's."""


class TextToSQL(MultiTurn):
    """Rows of `schema` (SQL that makes the tables and fills them), `question` and `sql` (a right query).

    Reward 1 if the answer returns the rows of the right query: as a list if the outermost part of that one sorts, as a
    multiset otherwise (execution match, as in Spider, Yu et al., 2018). A blob is no text, whatever it holds.
    """

    pass_reward = 1.0

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        data: str | Path = SHIPPED / "sql.jsonl",
        max_turns: int = 3,
        max_context_tokens: int = 1024,
        time_limit_s: float = 5.0,
    ) -> None:
        self._sandbox = Sandbox(Limits(time_s=time_limit_s))
        super().__init__(tokenizer, data=data, max_turns=max_turns, max_context_tokens=max_context_tokens)

    def opening(self, row: Row) -> list[Message]:
        database, tables = build(field(row, "schema"))
        check_query(database, field(row, "sql"))
        sorts(row["sql"])
        return [
            {"role": "system", "content": _SYSTEM.format(schema=tables)},
            {"role": "user", "content": field(row, "question")},
        ]

    @asynccontextmanager
    async def episode(self, row: Row) -> AsyncIterator[Episode]:
        yield _SQLEpisode(self._sandbox, build(row["schema"])[0], row["sql"])


class _SQLEpisode:
    def __init__(self, sandbox: Sandbox, database: bytes, right: str) -> None:
        self.metrics = {"queries": 0.0, "bad_calls": 0.0}
        self._sandbox, self._database, self._right, self._answer = sandbox, database, right, ""

    async def respond(self, reply: str) -> str | None:
        if (answer := tagged(reply, "answer")) is not None:
            self._answer = answer
            return None
        query = tagged(reply, "sql")
        if query is None:
            self.metrics["bad_calls"] += 1
            return "error: no query; write <sql>...</sql>, or <answer>...</answer> to end"
        self.metrics["queries"] += 1
        try:
            return shorten(json.dumps(await self._rows(query), default=lambda blob: f"x'{blob.hex()}'"))
        except QueryError as error:
            self.metrics["bad_calls"] += 1
            return shorten(f"error: {error}")

    async def score(self) -> float:
        if not self._answer:
            return 0.0
        try:
            found = await self._rows(self._answer)
        except QueryError:
            return 0.0
        try:
            right = await self._rows(self._right)
        except QueryError as error:
            raise RuntimeError(f"the data's own query {quote(self._right, 200)} fails: {cut(str(error))}") from error
        if sorts(self._right):
            return float(found == right)
        return float(Counter(map(tuple, found)) == Counter(map(tuple, right)))

    async def _rows(self, query: str) -> list[Any]:
        outcome = await self._sandbox.run(_RUN, stdin=query, files={"data.sqlite": self._database})
        if not outcome.ok:
            raise QueryError(outcome.explain())
        rows: list[Any] = json.loads(outcome.stdout, object_hook=lambda blob: bytes.fromhex(blob["blob"]))
        return rows


def sorts(query: str) -> bool:
    """Whether the order of a query's rows means something: its outermost part has ORDER BY, not one in brackets alone.

    Raises `ValueError` for a query that is no SQL.
    """
    depth = 0
    try:
        tokens = sqlglot.tokenize(query, read="sqlite")
    except sqlglot.errors.TokenError as error:
        raise ValueError(f"a row's right query cannot be read: {cut(str(error))}: {quote(query, 200)}") from error
    for token in tokens:
        depth += {TokenType.L_PAREN: 1, TokenType.R_PAREN: -1}.get(token.token_type, 0)
        if token.token_type is TokenType.ORDER_BY and depth == 0:
            return True
    return False


def check_query(database: bytes, query: str) -> None:
    """Raises `ValueError` for a right query that the database cannot even plan: it would score every answer 0."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.deserialize(database)
        connection.execute(f"EXPLAIN {query}")
    except (sqlite3.Error, sqlite3.Warning) as error:
        raise ValueError(f"a row's right query does not run: {cut(str(error))}: {quote(query, 200)}") from error
    finally:
        connection.close()


def build(schema: str) -> tuple[bytes, str]:
    """The database that `schema` makes, as a file's content, and its CREATE statements."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(schema)
        tables = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        return connection.serialize(), ";\n".join(sql for (sql,) in tables)
    except sqlite3.Error as error:
        raise ValueError(f"a row's schema does not run: {cut(str(error))}: {quote(schema, 200)}") from error
    finally:
        connection.close()
