"""A small demo shop on loopback: sign in, a cart, a checkout, and orders that can be counted from outside.

It needs nothing but Python, loads nothing from anywhere else, and forgets everything when it ends. Every account has
the password `demo`. A cart belongs to the account, so it outlives a browser session. `/orders.json` tells how many
payments were tried and which orders came of them, which is how one sees that nothing was paid twice.

    python examples/shop/server.py --port 0
"""

import argparse
import json
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from html import escape
from http import HTTPStatus
from http.cookies import SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

PASSWORD = "demo"
MOST_OF_ONE_ITEM = 10


@dataclass(frozen=True, slots=True)
class Product:
    """Something on the shelf; `drawing` is the inside of a 48 by 48 SVG."""

    name: str
    price: Decimal
    about: str
    drawing: str


PRODUCTS = {
    product.name: product
    for product in (
        Product(
            "Teapot",
            Decimal("24.90"),
            "Stoneware, holds four cups and does not drip.",
            '<path d="M12 22h22v6a11 11 0 0 1-22 0z"/><path d="M34 24q8-6 8-10M12 24q-8-1-7 5t8 4M16 22q7-9 14 0"/>'
            '<circle cx="23" cy="14" r="2"/>',
        ),
        Product(
            "Reading lamp",
            Decimal("58.00"),
            "Warm light, a heavy foot, one switch.",
            '<path d="M14 42h16M22 42V26L34 14"/><path d="M27 7l14 14-8 3-9-9z"/>',
        ),
        Product(
            "Notebook",
            Decimal("7.50"),
            "Ninety-six pages, sewn, lies flat when open.",
            '<rect x="13" y="7" width="24" height="34" rx="3"/><path d="M19 7v34M24 16h8M24 22h8"/>',
        ),
        Product(
            "Wool blanket",
            Decimal("89.00"),
            "Woven in one piece, warm without weight.",
            '<rect x="8" y="12" width="32" height="22" rx="3"/><path d="M8 19h32M8 27h32"/>'
            '<path d="M12 34v5M20 34v5M28 34v5M36 34v5"/>',
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Order:
    """A paid cart."""

    number: str
    account: str
    items: dict[str, int]
    total: Decimal


@dataclass(slots=True)
class Shop:
    """What the shop knows. Every request holds `lock` while it reads or changes this."""

    sessions: dict[str, str] = field(default_factory=dict)
    carts: dict[str, dict[str, int]] = field(default_factory=dict)
    orders: list[Order] = field(default_factory=list)
    payments_tried: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def sign_in(self, account: str) -> str:
        """A new session's token."""
        token = secrets.token_urlsafe(16)
        self.sessions[token] = account
        return token

    def add(self, account: str, item: str, quantity: int) -> None:
        """Put `quantity` of `item` into the account's cart; more than the shop sells of one thing is cut off."""
        cart = self.carts.setdefault(account, {})
        cart[item] = min(MOST_OF_ONE_ITEM, cart.get(item, 0) + quantity)

    def total(self, items: dict[str, int]) -> Decimal:
        """What these items cost."""
        return sum((PRODUCTS[item].price * quantity for item, quantity in items.items()), Decimal(0))

    def pay(self, account: str) -> Order | None:
        """An order of what is in the cart, which is empty then; nothing when it is empty already."""
        self.payments_tried += 1
        items = self.carts.pop(account, {})
        if not items:
            return None
        order = Order(f"A-{1001 + len(self.orders)}", account, items, self.total(items))
        self.orders.append(order)
        return order


STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #667085; --paper: #f6f5f1; --card: #fff; --line: #e2dfd6;
  --accent: #1f6f54; --on-accent: #fff; --bad: #a62b2b }
@media (prefers-color-scheme: dark) { :root { --ink: #eceae4; --soft: #a3a8b4; --paper: #16181d; --card: #1f2229;
  --line: #343842; --accent: #63c79f; --on-accent: #0d1f18; --bad: #ff9b9b } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", sans-serif }
header { background: var(--card); border-bottom: 1px solid var(--line) }
header nav, main, footer { max-width: 68rem; margin: auto; padding: 1rem 1.5rem }
nav { display: flex; gap: 1.25rem; align-items: center } nav .brand { font-weight: 700; font-size: 1.15rem }
nav .end { margin-left: auto; display: flex; gap: 1rem; align-items: center }
a { color: inherit } nav a { text-decoration: none } nav a:hover { text-decoration: underline }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 1.5rem 0 .5rem } h2 { font-size: 1.15rem; margin: .75rem 0 .25rem }
p { margin: .25rem 0 } .soft, footer { color: var(--soft) } .alert { color: var(--bad); font-weight: 600 }
.shelf { list-style: none; padding: 0; display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)) }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 1.25rem }
.shelf .card { display: flex; flex-direction: column } .shelf form { margin-top: auto; padding-top: .9rem }
.narrow { max-width: 26rem }
svg { width: 4.5rem; fill: none; stroke: var(--accent); stroke-width: 2; stroke-linecap: round;
  stroke-linejoin: round }
.price { font-weight: 700; font-variant-numeric: tabular-nums } form.row { display: flex; gap: .6rem }
label { display: block; font-weight: 600; margin-top: .8rem } .hidden { position: absolute; clip-path: inset(50%) }
input { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: .5rem .6rem; width: 100% } form.row input { width: 4.2rem }
button, .button { font: inherit; font-weight: 600; border: 0; border-radius: 8px; padding: .55rem 1rem; cursor: pointer;
  background: var(--accent); color: var(--on-accent); text-decoration: none; display: inline-block;
  white-space: nowrap }
button.quiet { background: none; color: inherit; padding: 0; font-weight: 400; text-decoration: underline }
form > button { margin-top: 1rem } form.row > button, nav form > button { margin-top: 0 }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px }
table { width: 100%; border-collapse: collapse; margin: 1rem 0 } th, td { text-align: left; padding: .5rem .25rem;
  border-bottom: 1px solid var(--line) } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
tfoot th, tfoot td { border: 0; font-weight: 700; font-size: 1.1rem }
"""


def money(amount: Decimal) -> str:
    """`amount` as the shop writes it."""
    return f"${amount:.2f}"


def document(title: str, body: str, account: str | None, in_cart: int) -> str:
    """A whole page around `body`."""
    who = (
        f'<span class="soft">Hello, {escape(account)}</span>'
        '<form method="post" action="/sign-out"><button class="quiet">Sign out</button></form>'
        if account
        else '<a href="/sign-in">Sign in</a>'
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)} - Corner Shop</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>{STYLE}</style></head><body>
<header><nav aria-label="Shop"><a class="brand" href="/">Corner Shop</a>
<span class="end"><a href="/cart">Cart ({in_cart})</a>{who}</span></nav></header>
<main>{body}</main>
<footer>A demo shop. Nothing here is for sale, and nothing is sent.</footer></body></html>"""


def shelf() -> str:
    """The products, each with its form."""
    cards = "".join(
        f'<li class="card"><svg viewBox="0 0 48 48" aria-hidden="true">{product.drawing}</svg>'
        f'<h2>{escape(name)}</h2><p class="soft">{escape(product.about)}</p><p class="price">{money(product.price)}</p>'
        f'<form class="row" method="post" action="/cart"><input type="hidden" name="item" value="{escape(name)}">'
        f'<label class="hidden" for="quantity-{number}">Quantity of {escape(name)}</label>'
        f'<input id="quantity-{number}" name="quantity" type="number" min="1" max="{MOST_OF_ONE_ITEM}" value="1">'
        f'<button aria-label="Add to cart: {escape(name)}">Add to cart</button></form></li>'
        for number, (name, product) in enumerate(PRODUCTS.items(), 1)
    )
    return f'<h1>Good things for quiet evenings</h1><ul class="shelf">{cards}</ul>'


def sign_in_form(name: str = "", problem: str = "") -> str:
    """The sign-in form, with what went wrong the last time."""
    alert = f'<p role="alert" class="alert">{escape(problem)}</p>' if problem else ""
    return f"""<h1>Sign in</h1><div class="card narrow">{alert}<form method="post" action="/sign-in">
<label for="name">Name</label><input id="name" name="name" value="{escape(name)}" autocomplete="username" required>
<label for="password">Password</label>
<input id="password" name="password" type="password" autocomplete="current-password" required>
<button>Sign in</button></form><p class="soft">Any name will do; the password is "{PASSWORD}".</p></div>"""


def lines(items: dict[str, int], total: Decimal) -> str:
    """A table of items with their total."""
    rows = "".join(
        f'<tr><th scope="row">{escape(item)}</th><td class="number">{quantity}</td>'
        f'<td class="number">{money(PRODUCTS[item].price * quantity)}</td></tr>'
        for item, quantity in items.items()
    )
    return f"""<table><thead><tr><th scope="col">Item</th><th scope="col" class="number">Quantity</th>
<th scope="col" class="number">Price</th></tr></thead><tbody>{rows}</tbody>
<tfoot><tr><th scope="row" colspan="2">Total</th><td class="number" data-testid="total">{money(total)}</td></tr></tfoot>
</table>"""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    shop: Shop  # given by the subclass that `shop` makes

    def do_GET(self) -> None:
        with self.shop.lock:
            self._get(urlsplit(self.path).path)

    def do_POST(self) -> None:
        length = min(int(self.headers.get("Content-Length") or 0), 10_000)
        fields = {name: values[-1] for name, values in parse_qs(self.rfile.read(length).decode()).items()}
        with self.shop.lock:
            self._post(urlsplit(self.path).path, fields)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: whoever started the shop has something better to show."""

    def _get(self, path: str) -> None:
        match path.strip("/").split("/"):
            case [""]:
                self._page("Shop", shelf())
            case ["sign-in"]:
                self._page("Sign in", sign_in_form())
            case ["cart"] | ["checkout"] if not self._account:
                self._redirect("/sign-in")
            case ["cart"] if cart := self._cart:
                self._page(
                    "Cart",
                    f'<h1>Your cart</h1><div class="card">{lines(cart, self.shop.total(cart))}'
                    '<a class="button" href="/checkout">Go to checkout</a></div>',
                )
            case ["checkout"] if cart := self._cart:
                total = self.shop.total(cart)
                self._page(
                    "Checkout",
                    f'<h1>Checkout</h1><div class="card">{lines(cart, total)}'
                    f'<form method="post" action="/pay"><button>Pay {money(total)}</button></form></div>',
                )
            case ["cart"] | ["checkout"]:
                self._page("Cart", '<h1>Your cart</h1><p>Your cart is empty. <a href="/">Go on shopping.</a></p>')
            case ["orders.json"]:
                self._json(
                    {
                        "payments_tried": self.shop.payments_tried,
                        "orders": [public(order) for order in self.shop.orders],
                    }
                )
            case ["orders", number] if order := self._order(number):
                self._page(
                    f"Order {number}",
                    f"<h1>Thank you, {escape(order.account)}</h1><p>Your order number is "
                    f'<strong data-testid="number">{order.number}</strong>.</p>'
                    f'<div class="card">{lines(order.items, order.total)}</div>',
                )
            case _:
                self._page("Not found", '<h1>Not found</h1><p><a href="/">To the shop</a></p>', HTTPStatus.NOT_FOUND)

    def _post(self, path: str, fields: dict[str, str]) -> None:
        match path:
            case "/sign-in":
                name = fields.get("name", "").strip()
                if not name or fields.get("password") != PASSWORD:
                    body = sign_in_form(name, "That name and password do not go together.")
                    self._page("Sign in", body, HTTPStatus.UNAUTHORIZED)
                else:
                    self._redirect("/", session=self.shop.sign_in(name))
            case "/sign-out":
                self.shop.sessions.pop(self._session, None)
                self._redirect("/", session="")
            case "/cart" | "/pay" if not self._account:
                self._redirect("/sign-in")
            case "/cart":
                quantity = fields.get("quantity", "")
                if fields.get("item") not in PRODUCTS or not quantity.isdecimal() or not 1 <= int(quantity) <= 10:
                    self._page("Cart", "<h1>That can't be added</h1>", HTTPStatus.BAD_REQUEST)
                else:
                    self.shop.add(self._account, fields["item"], int(quantity))
                    self._redirect("/cart")
            case "/pay":
                if order := self.shop.pay(self._account):
                    self._redirect(f"/orders/{order.number}")
                else:
                    self._page("Checkout", "<h1>There is nothing to pay</h1>", HTTPStatus.CONFLICT)
            case _:
                self._page("Not found", "<h1>Not found</h1>", HTTPStatus.NOT_FOUND)

    @property
    def _session(self) -> str:
        morsel = SimpleCookie(self.headers.get("Cookie", "")).get("session")
        return morsel.value if morsel else ""

    @property
    def _account(self) -> str:
        return self.shop.sessions.get(self._session, "")

    @property
    def _cart(self) -> dict[str, int]:
        return self.shop.carts.get(self._account, {})

    def _order(self, number: str) -> Order | None:
        """The account's own order of this number."""
        mine = (order for order in self.shop.orders if order.account == self._account)
        return next((order for order in mine if order.number == number), None)

    def _page(self, title: str, body: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        html = document(title, body, self._account or None, sum(self._cart.values()))
        self._send(html.encode(), "text/html; charset=utf-8", status)

    def _json(self, value: object) -> None:
        self._send(json.dumps(value, indent=2).encode(), "application/json")

    def _send(self, content: bytes, type_: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", type_)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def _redirect(self, to: str, session: str | None = None) -> None:
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", to)
        if session is not None:
            self.send_header("Set-Cookie", f"session={session}; Path=/; HttpOnly; SameSite=Lax")
        self.send_header("Content-Length", "0")
        self.end_headers()


def public(order: Order) -> dict[str, object]:
    """`order` as `/orders.json` shows it."""
    return {"number": order.number, "account": order.account, "items": order.items, "total": money(order.total)}


@contextmanager
def shop(port: int = 0) -> Iterator[str]:
    """A new shop's address, on a free port of loopback unless one is given; closed at the end of the block."""
    handler = type("ShopHandler", (Handler,), {"shop": Shop()})
    with ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        # The poll interval is how long shutdown takes.
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="shop", daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="A small demo shop on loopback.")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free port")
    with shop(parser.parse_args().port) as url:
        print(url, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
