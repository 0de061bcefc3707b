"""The demo shop, driven as a browser would drive it but without one."""

import http.cookiejar
import importlib.util
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from urllib.parse import urlencode

import pytest

SERVER = Path(__file__).parents[2] / "examples" / "shop" / "server.py"


def load_server() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_shop_server", SERVER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


server = load_server()


class Visitor:
    """A customer with cookies of their own."""

    def __init__(self, url: str) -> None:
        self.url = url
        cookies = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), cookies)

    def get(self, path: str) -> tuple[int, str]:
        return self._open(path, None)

    def post(self, path: str, **fields: str) -> tuple[int, str]:
        return self._open(path, urlencode(fields).encode())

    def sign_in(self, name: str = "Ada", password: str = "demo") -> tuple[int, str]:
        return self.post("/sign-in", name=name, password=password)

    def orders(self) -> dict:
        return json.loads(self.get("/orders.json")[1])

    def _open(self, path: str, data: bytes | None) -> tuple[int, str]:
        try:
            with self.opener.open(self.url + path, data, timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture
def url() -> Iterator[str]:
    with server.shop() as url:
        yield url


@pytest.fixture
def ada(url: str) -> Visitor:
    visitor = Visitor(url)
    visitor.sign_in()
    return visitor


def test_buying_makes_one_order_that_can_be_counted_from_outside(ada: Visitor) -> None:
    ada.post("/cart", item="Teapot", quantity="2")
    assert "$49.80" in ada.get("/checkout")[1]

    status, page = ada.post("/pay")

    assert status == 200
    assert "A-1001" in page
    order = {"number": "A-1001", "account": "Ada", "items": {"Teapot": 2}, "total": "$49.80"}
    assert ada.orders() == {"payments_tried": 1, "orders": [order]}


def test_paying_again_is_refused_and_counted(ada: Visitor) -> None:
    ada.post("/cart", item="Notebook", quantity="1")
    ada.post("/pay")

    assert ada.post("/pay")[0] == 409

    assert ada.orders()["payments_tried"] == 2
    assert len(ada.orders()["orders"]) == 1


def test_a_wrong_password_is_refused_and_the_name_kept(url: str) -> None:
    visitor = Visitor(url)

    status, page = visitor.sign_in(password="guess")

    assert status == 401
    assert 'role="alert"' in page
    assert 'value="Ada"' in page


@pytest.mark.parametrize("path", ["/cart", "/checkout"])
def test_strangers_are_sent_to_sign_in(url: str, path: str) -> None:
    assert "<h1>Sign in</h1>" in Visitor(url).get(path)[1]


def test_a_cart_outlives_its_session(ada: Visitor) -> None:
    ada.post("/cart", item="Teapot", quantity="1")

    again = Visitor(ada.url)
    again.sign_in()

    assert "$24.90" in again.get("/cart")[1]


def test_signing_out_ends_the_session(ada: Visitor) -> None:
    assert "Sign out" in ada.get("/")[1]
    assert "Sign out" not in ada.post("/sign-out")[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"item": "Submarine", "quantity": "1"},
        {"item": "Teapot", "quantity": "0"},
        {"item": "Teapot", "quantity": "many"},
        {},
    ],
)
def test_what_can_not_be_added_is_refused(ada: Visitor, fields: dict[str, str]) -> None:
    assert ada.post("/cart", **fields)[0] == 400
    assert "empty" in ada.get("/cart")[1]


def test_another_account_does_not_see_an_order(ada: Visitor) -> None:
    ada.post("/cart", item="Teapot", quantity="1")
    ada.post("/pay")

    bob = Visitor(ada.url)
    bob.sign_in("Bob")

    assert bob.get("/orders/A-1001")[0] == 404


def test_names_are_escaped(url: str) -> None:
    visitor = Visitor(url)
    page = visitor.sign_in("<script>alert(1)</script>")[1]
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_two_shops_share_nothing(ada: Visitor) -> None:
    ada.post("/cart", item="Teapot", quantity="1")
    ada.post("/pay")
    with server.shop() as other:
        assert Visitor(other).orders() == {"payments_tried": 0, "orders": []}
