"""Which origins pages may reach: patterns, what counts as private, and how lists go together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_flow import config
from mcp_flow.errors import InvalidInput
from mcp_flow.rails import Rails, place

PUBLIC = "93.184.216.34"


@pytest.mark.parametrize(
    ("pattern", "host", "port", "matches"),
    [
        ("https://shop.example", "shop.example", 443, True),
        ("https://shop.example/", "SHOP.example.", 443, True),
        ("https://shop.example", "shop.example", 80, False),
        ("https://shop.example", "evil-shop.example", 443, False),
        ("https://shop.example:8443", "shop.example", 8443, True),
        ("wss://shop.example", "shop.example", 443, True),
        ("shop.example", "shop.example", 8080, True),
        ("*.shop.example", "pay.shop.example", 443, True),
        ("*.shop.example", "shop.example", 443, False),
        ("*.shop.example", "evilshop.example", 443, False),
        ("http://*", "any.example", 80, True),
        ("http://*", "any.example", 443, False),
        ("https://b\N{LATIN SMALL LETTER U WITH DIAERESIS}cher.example", "xn--bcher-kva.example", 443, True),
    ],
)
def test_a_pattern_stands_for_these_hosts_and_ports(pattern: str, host: str, port: int, matches: bool) -> None:
    assert (Rails.of([pattern], []).refusal(host, port, [PUBLIC]) is None) is matches
    assert (Rails.of([], [pattern]).refusal(host, port, [PUBLIC]) is None) is not matches


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.100.100.200", "0.0.0.0"),
        *("168.63.129.16", "224.0.0.1", "::1", "fe80::1", "fd00:ec2::254", "::ffff:10.0.0.1", "2002:7f00:1::"),
        *("64:ff9b::a9fe:a9fe", "[::1]", "::"),
    ],
)
def test_private_and_metadata_addresses_are_refused_unless_named_also_by_another_name(address: str) -> None:
    for rails in (Rails(), Rails.of(["*"], []), Rails.of(["http://*:*"], [])):
        refusal = rails.refusal(address, 80)
        assert refusal is not None
        assert "private address" in refusal
        assert "allow_origins" in refusal
        refusal = rails.refusal("harmless.example", 80, [PUBLIC, address.strip("[]")])
        assert refusal is not None
        assert "leads to the private address" in refusal
    written = f"[{address}]" if ":" in address and "[" not in address else address
    assert Rails.of([f"http://{written}"], []).refusal(address, 80) is None
    assert Rails.of(["*", "harmless.example"], []).refusal("harmless.example", 80, [address.strip("[]")]) is None


def test_localhost_is_private_before_it_is_resolved() -> None:
    for name in ("localhost", "LOCALHOST.", "shop.localhost"):
        assert "private" in (Rails().refusal(name, 80) or "")
    assert Rails.of(["http://localhost:*"], []).refusal("localhost", 3000, ["127.0.0.1"]) is None


def test_both_allow_lists_must_hold_either_may_name_a_private_address_and_a_block_is_final() -> None:
    settings, workflow = Rails.of(["*", "http://10.0.0.1"], ["ads.example"]), Rails.of(["*.shop.example"], [])
    both = settings & workflow
    assert both.refusal("pay.shop.example", 443, [PUBLIC]) is None
    assert "not among allow_origins" in (both.refusal("10.0.0.1", 80) or "")
    assert (settings & Rails.of([], [])).refusal("10.0.0.1", 80) is None
    assert (Rails.of([], []) & Rails.of(["http://10.0.0.1"], [])).refusal("10.0.0.1", 80) is None
    assert "block_origins (ads.example)" in (
        (settings & Rails.of(["ads.example"], [])).refusal("ads.example", 80) or ""
    )
    assert Rails.load(both.dump()) == both


@pytest.mark.parametrize(
    "pattern",
    ["", "shop.example/path", "ftp://shop.example", "shop.*", "a b", "http://", "x:99999", "http://u@h", "file:///etc"],
)
def test_what_is_no_origin_is_refused_and_how_one_is_written_is_said(pattern: str) -> None:
    with pytest.raises(InvalidInput, match=r"allow_origins: .* is no origin. Write it like"):
        Rails.of([pattern], [])


def test_a_text_is_no_list_of_origins() -> None:
    with pytest.raises(InvalidInput, match="takes a list of origins"):
        Rails.of("https://shop.example", [])


@given(st.text(max_size=40), st.integers(1, 65535))
def test_no_host_whatever_passes_a_list_that_names_another(host: str, port: int) -> None:
    if host.strip("[]").rstrip(".").lower() != "shop.example":
        assert Rails.of(["shop.example"], []).refusal(host, port) is not None


def test_settings_take_lists_from_a_file_and_words_from_the_environment(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MCP_FLOW_ALLOW_ORIGINS")
    (config.Path(str(tmp_path)) / "settings.toml").write_text('allow_origins = ["*", "http://localhost:3000"]')
    loaded = config.load(home=tmp_path, files=tmp_path)
    assert loaded.allow_origins == ("*", "http://localhost:3000")
    assert loaded.files == tmp_path
    given = loaded.environment()
    monkeypatch.setenv("MCP_FLOW_ALLOW_ORIGINS", given["MCP_FLOW_ALLOW_ORIGINS"])
    monkeypatch.setenv("MCP_FLOW_BLOCK_ORIGINS", "ads.example, *.ads.example")
    again = config.load(home=tmp_path)
    assert again.allow_origins == loaded.allow_origins
    assert again.block_origins == ("ads.example", "*.ads.example")
    monkeypatch.setenv("MCP_FLOW_BLOCK_ORIGINS", "no/origin")
    with pytest.raises(InvalidInput, match="MCP_FLOW_BLOCK_ORIGINS: 'no/origin' is no origin"):
        config.load(home=tmp_path)


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("https://shop.example/a?b", ("shop.example", 443)),
        ("http://[::1]:8080/", ("::1", 8080)),
        ("data:text/html,x", None),
        ("about:blank", None),
        ("http://h:port/", None),
    ],
)
def test_where_a_url_leads(url: str, found: tuple[str, int] | None) -> None:
    assert place(url) == found
