"""The API's browser at ``/docs``: Swagger UI on the OpenAPI document that the server gives."""

from selfloop.server.api_browser.dialect import DIALECT

__all__ = ["DIALECT"]
