"""How a value leaves a page: packed there as JSON with tags, within a budget, and unpacked and cut here."""

from __future__ import annotations

import json
from typing import Any

from mcp_flow.page.guard import whole

_EXACT = 2**53


def unpacked(text: str) -> dict[str, Any]:
    """What the page packed. Its numbers are all doubles, of which a large one is no exact integer."""

    def number(digits: str) -> int | float:
        return exact if abs(exact := int(digits)) <= _EXACT else float(digits)

    return dict(json.loads(text, parse_int=number))


def capped(value: Any, packed: dict[str, Any], max_chars: int) -> tuple[Any, str, bool]:
    """The value, its type, and whether the value had to be cut to `max_chars` characters."""
    kind = whole(str(packed["t"]))
    value = _whole(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if not packed["c"] and len(text) <= max_chars:
        return value, kind, False
    what = "its text" if isinstance(value, str) else "its JSON"
    total = f" of {packed['n']}" if "n" in packed else ""
    return text[:max_chars], f"{kind}, cut: the first {min(len(text), max_chars)}{total} characters of {what}", True


def _whole(value: Any) -> Any:
    """The value without lone surrogates, which no encoding of the answer would take."""
    match value:
        case str():
            return whole(value)
        case list():
            return [_whole(item) for item in value]
        case dict():
            return {whole(key): _whole(item) for key, item in value.items()}
        case _:
            return value


def with_sources(value: Any, sources: list[str]) -> Any:
    """The value with each numbered regular expression replaced by its text."""
    match value:
        case {"$RegExp": int(number), **rest} if not rest:
            return {"$RegExp": sources[number]}
        case {"$Object": dict(plain), **rest} if not rest:
            return {"$Object": {key: with_sources(item, sources) for key, item in plain.items()}}
        case dict():
            return {key: with_sources(item, sources) for key, item in value.items()}
        case list():
            return [with_sources(item, sources) for item in value]
        case _:
            return value


_CALL = """
  const literal = (value, code) => {
    if (typeof value !== "function") return false;
    const source = Function.prototype.toString.call(value);
    return code.includes(source)
      && /^(?:\\s|[();]|\\/\\/[^\\n]*|\\/\\*[^]*?\\*\\/)*$/.test(code.replace(source, () => ""));
  };"""

RUN_READ = (
    "(form) => {"
    + _CALL
    + """
  const element = %(element)s;
  let value = form(element);
  if (literal(value, %(code)s)) value = value(element);
  if (!ArrayBuffer.isView(value) && Object.prototype.toString.call(value) === "[object Promise]") return value;
  return (%(pack)s)(value, false, %(budget)d);
}"""
)

"""Runs a form in `read` mode: a promise comes back as it is, anything else packed. To be filled with `%`."""

RUN_WRITE = (
    "async (form) => {"
    + _CALL
    + """
  const element = %(element)s;
  let value = await form(element);
  if (literal(value, %(code)s)) value = await value(element);
  return (%(pack)s)(value, true, %(budget)d);
}"""
)

"""The same in `write` mode, in which what comes back is a promise of what is packed."""

PACK = r"""(value, effects, budget) => {
  // Only what V8 holds for free of side effects: no delete, spread or class, no setting of an outer variable,
  // no Map.forEach, no RegExp.source, no tag of a typed array.
  const stack = [], paths = [], regexps = [];
  // cut: not even its JSON is whole; short: it is, but some description in it is not, or a key is missing.
  const state = {left: budget, cut: false, short: false};
  const text = (string) => {
    if (string.length > state.left) { state.cut = true; string = string.slice(0, state.left > 0 ? state.left : 0); }
    state.left -= string.length + 2;
    return JSON.stringify(string);
  };
  const brief = (string, limit) => {
    if (string.length <= limit) return string;
    state.short = true;
    return string.slice(0, limit) + "\u2026";
  };
  const node = (it) => {
    if (it.nodeType === 9) return "#document " + it.URL;
    if (it.nodeType !== 1) return it.nodeName + ' "' + brief(String(it.nodeValue || "").trim(), 60) + '"';
    let out = "<" + it.localName;
    for (const name of ["id", "class", "type", "name", "role", "href"]) {
      const held = it.getAttribute(name);
      if (held) out += " " + name + '="' + brief(held, 40) + '"';
    }
    const whole = (it.textContent || "").trim(), inner = whole.slice(0, 400).replace(/\s+/g, " ");
    if (inner.length > 60 || whole.length <= 400) return out + ">" + brief(inner, 60);
    state.short = true;
    return out + ">" + inner + "\u2026";
  };
  const list = (it, path) => {
    let out = "[";
    for (let i = 0; i < it.length; i++) {
      if (state.left < 0) { state.cut = true; break; }
      if (i) out += ",";
      out += nested(it, i, path);
    }
    return out + "]";
  };
  const object = (it, path) => {
    let out = "{", count = 0, tagged = false;
    for (const key of Object.getOwnPropertySymbols(it)) {
      const own = Object.getOwnPropertyDescriptor(it, key);
      if (own && own.enumerable) state.short = true;
    }
    for (const key of Object.keys(it)) {
      if (state.left < 0) { state.cut = true; break; }
      tagged = count === 0 && key[0] === "$";
      out += (count++ ? "," : "") + text(key) + ":" + nested(it, key, path);
      state.left -= 2;
    }
    out += "}";
    return tagged && count === 1 ? '{"$Object":' + out + "}" : out;
  };
  const entries = (it, path) => {
    const items = [];
    for (const item of it) { if (items.push(item) > state.left) { state.cut = true; break; } }
    return list(items, path);
  };
  // [type, JSON text, whether JSON itself says the type]
  const tag = (it, path) => {
    if (it === null) return ["null", "null", true];
    switch (typeof it) {
      case "undefined": return ["undefined", "null", false];
      case "boolean": return ["boolean", String(it), true];
      case "string": return ["string", text(it), true];
      case "number":
        if (Object.is(it, -0)) return ["number", '"-0"', false];
        return Number.isFinite(it) ? ["number", String(it), true] : ["number", '"' + it + '"', false];
      case "bigint": return ["bigint", text(String(it)), false];
      case "symbol": return ["symbol", text(Symbol.prototype.toString.call(it)), false];
      case "function": return ["function", text(brief(Function.prototype.toString.call(it), 200)), false];
    }
    const seen = stack.indexOf(it);
    if (seen >= 0) return ["cycle", text(paths[seen]), false];
    if (stack.length > 60) { state.cut = true; return ["Object", '"\u2026"', false]; }
    stack.push(it); paths.push(path);
    try {
      if (it.window === it) return ["Window", '"[Window]"', false];
      if (Array.isArray(it)) return ["array", list(it, path), true];
      if (ArrayBuffer.isView(it)) {
        const name = String(it.constructor.name);
        return name === "DataView" ? [name, text(it.byteLength + " bytes"), false] : [name, list(it, path), false];
      }
      const name = Object.prototype.toString.call(it).slice(8, -1);
      if (typeof it.nodeType === "number" && typeof it.nodeName === "string") {
        return [it.nodeType === 1 ? "Element" : it.nodeType === 9 ? "Document" : "Node", text(node(it)), false];
      }
      if (name === "Date") {
        return ["Date", Number.isFinite(it.getTime()) ? text(it.toISOString()) : '"Invalid Date"', false];
      }
      if (name === "RegExp") return ["RegExp", effects ? text(String(it)) : String(regexps.push(it) - 1), false];
      if (name === "Error" || name === "DOMException") {
        return ["Error", text(String(it.name) + ": " + String(it.message)), false];
      }
      if (name === "Map") return ["Map", entries(it, path), false];
      if (name === "Set") return ["Set", entries(it, path), false];
      if (name === "ArrayBuffer") return [name, text(it.byteLength + " bytes"), false];
      if (name === "URL" || name === "Location") return [name, text(it.href), false];
      if (/(List|Collection|Arguments|NamedNodeMap)$/.test(name) && typeof it.length === "number") {
        return [name, list(it, path), false];
      }
      if (/^DOM(Rect|Point)/.test(name)) {
        const plain = {};
        for (const key of ["x", "y", "z", "w", "width", "height", "top", "right", "bottom", "left"]) {
          if (typeof it[key] === "number") plain[key] = it[key];
        }
        return [name, object(plain, path), false];
      }
      if (Object.keys(it).length === 0 && name !== "Object") {
        if (effects && typeof it.toJSON === "function") return [name, nested([it.toJSON()], 0, path), false];
        return [name, text("[object " + name + "]"), false];
      }
      return ["object", object(it, path), true];
    } finally {
      stack.pop(); paths.pop();
    }
  };
  const guarded = (it, path) => {
    try {
      return tag(it, path);
    } catch (error) {
      return ["thrown", thrown(error), false];
    }
  };
  const thrown = (error) => {
    try { return text(String(error && error.message || error)); } catch { return '"unreadable"'; }
  };
  const nested = (holder, key, path) => {
    let it;
    try { it = holder[key]; } catch (error) { return '{"$thrown":' + thrown(error) + "}"; }
    if (typeof it === "string") return text(it);
    state.left -= 1;
    if (typeof it === "number" && Number.isFinite(it) && !Object.is(it, -0)) {
      const json = String(it);
      state.left -= json.length;
      return json;
    }
    const tagged = guarded(it, path + (typeof key === "number" ? "[" + key + "]" : "." + key));
    if (tagged[2]) { state.left -= 4; return tagged[1]; }
    state.left -= tagged[0].length + 6;
    return '{"$' + tagged[0] + '":' + tagged[1] + "}";
  };
  const length = typeof value === "string" ? ',"n":' + value.length : "";
  const [type, json] = guarded(value, "$");
  const flags = ',"c":' + state.cut + ',"s":' + state.short;
  const packed = '{"t":' + JSON.stringify(type) + ',"v":' + json + flags + length + "}";
  return regexps.length ? [packed].concat(regexps) : packed;
}"""
"""Packs a value as JSON text within a budget of characters: type `t`, value `v`, length `n`, cut `c`, abridged `s`.

With `effects` it may call what V8 does not hold for free of side effects. Without, regular expressions come behind the
text in a list, by whose numbers the text names them.
"""
