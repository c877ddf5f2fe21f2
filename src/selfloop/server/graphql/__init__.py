"""The GraphQL dialect: the few queries that the ``truss`` command line asks beside REST."""

from selfloop.server.graphql.route import router

__all__ = ["router"]
