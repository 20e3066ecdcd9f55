"""What the OpenAPI page says of bodies that the routes read themselves."""

from typing import Any

from pydantic import BaseModel


def body_of(kind: type[BaseModel]) -> dict[str, Any]:
    """The request body of a route as a JSON schema. Definitions are put where they are used: the page has no place for them."""
    schema = kind.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(schema, schema.pop("$defs", {}))}}}}


def _inlined(value: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        if "$ref" in value:
            return _inlined(definitions[value["$ref"].rpartition("/")[2]], definitions)
        return {name: _inlined(item, definitions) for name, item in value.items()}
    return [_inlined(item, definitions) for item in value] if isinstance(value, list) else value
