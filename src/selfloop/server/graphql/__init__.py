"""The GraphQL dialect: the few queries that the ``truss`` command line asks beside REST."""

from selfloop.server.graphql.dialect import DIALECT

__all__ = ["DIALECT"]
