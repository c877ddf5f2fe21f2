"""SQLite asked in the event loop itself: to change threads takes several times as long as to find a row by its key."""

from typing import Any

from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine import URL
from sqlalchemy.pool import AsyncAdaptedQueuePool

DRIVER = "sqlite+inline"


class InlineSqlite(SQLiteDialect_pysqlite):
    """The standard driver under SQLAlchemy's asynchronous sessions, which never wait for it elsewhere."""

    driver = "inline"
    is_async = True
    supports_statement_cache = True

    @classmethod
    def get_pool_class(cls, url: URL) -> type[AsyncAdaptedQueuePool]:
        return AsyncAdaptedQueuePool

    def get_driver_connection(self, connection: Any) -> Any:
        return connection


registry.register(DRIVER.replace("+", "."), __name__, InlineSqlite.__name__)
