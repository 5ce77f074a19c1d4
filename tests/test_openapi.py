"""The tables behind both OpenAPI descriptions name each route once, and no other."""

import ast

import pytest

import gpu_service.openapi
import relay.openapi
from relay.app import create_app
from relay.settings import Settings
from schema import Table
from tests.conftest import ROOT


def test_the_relays_table_has_its_routes_and_no_other() -> None:
    found = create_app(Settings()).openapi()["paths"]
    assert {(method.upper(), path) for path, methods in found.items() for method in methods} == set(relay.openapi.TABLE)


def test_the_gpus_table_has_its_routes_and_no_other() -> None:
    calls = [n for n in ast.walk(ast.parse((ROOT / "gpu_service/app.py").read_text())) if isinstance(n, ast.Call)]
    routes = [n for n in calls if ast.unparse(n.func) == "app.add_api_route"]
    found = {
        (method, str(ast.literal_eval(n.args[0])).replace(":path}", "}"))
        for n in routes
        for keyword in n.keywords
        for method in ast.literal_eval(keyword.value)
    }
    assert found == set(gpu_service.openapi.TABLE)


@pytest.mark.parametrize("table", [relay.openapi.TABLE, gpu_service.openapi.TABLE])
def test_whoever_needs_a_key_may_be_refused_and_whoever_sends_a_body_may_send_too_much(table: Table) -> None:
    for route, doc in table.items():
        assert doc.open or 401 in doc.errors, route
        assert 500 not in doc.errors, route
        if doc.body is not None:
            assert {400, 413} <= set(doc.errors), route
