"""Who may ask the dashboard: tokens and cookies, names of the host, origins, and what another page may try."""

import os
import stat
from pathlib import Path

import pytest

from weft.dashboard.security import LOOPBACK, Asked, Gate, host_name
from weft.dashboard.tokens import FILE, Token, kept_token

TOKEN = Token("t" * 43)
GATE = Gate(TOKEN, "weft_7020")


def asking(method: str = "GET", path: str = "/", query: str = "", **headers: str) -> Asked:
    sent = {"host": "127.0.0.1:7020", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return Asked(method, path, query, {name: [value] for name, value in sent.items() if value})


def refused(request: Asked, gate: Gate = GATE) -> int | None:
    refusal = gate.refusal(request)
    return refusal.status if refusal else None


# ---- The token -----------------------------------------------------------------------------------------------------


def test_a_token_is_made_once_and_only_its_user_can_read_it(tmp_path):
    state = tmp_path / "state" / "weft"
    token, notice = kept_token(state)
    assert len(token.text) >= 43 and notice == ""
    assert kept_token(state)[0] == token
    assert stat.S_IMODE((state / FILE).stat().st_mode) == 0o600 and stat.S_IMODE(state.stat().st_mode) == 0o700


def test_a_new_token_is_another_one_and_stays(tmp_path):
    old = kept_token(tmp_path)[0]
    new = kept_token(tmp_path, renew=True)[0]
    assert new.text != old.text and kept_token(tmp_path)[0] == new


def test_a_token_that_others_could_read_is_replaced_and_said(tmp_path):
    old = kept_token(tmp_path)[0]
    (tmp_path / FILE).chmod(0o644)
    new, notice = kept_token(tmp_path)
    assert new.text != old.text and "could be read by others" in notice
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


@pytest.mark.parametrize("content", ["", "short", "a b" * 20, "\x00" * 40])
def test_a_damaged_token_is_replaced(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    (tmp_path / FILE).chmod(0o600)
    assert len(kept_token(tmp_path)[0].text) >= 43


def test_without_a_place_to_keep_it_the_token_is_this_process_s_alone_and_said(tmp_path):
    (tmp_path / "state").write_text("a file, and no folder")
    token, notice = kept_token(tmp_path / "state")
    assert token.file is None and len(token.text) >= 43 and "cannot be written" in notice


def test_the_cookie_does_not_tell_the_token(tmp_path):
    assert TOKEN.text not in TOKEN.cookie and TOKEN.admits(TOKEN.cookie) and not TOKEN.admits(TOKEN.text)
    assert not TOKEN.opens(TOKEN.cookie) and Token("u" * 43).cookie != TOKEN.cookie


# ---- The place from which it is asked ------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1:7020", "localhost:7020", "LOCALHOST:8888", "[::1]:7020", "127.0.0.1"])
def test_this_machine_s_own_names_are_known_at_any_port_as_a_tunnel_may_give_another(host):
    assert refused(asking(host=host)) is None


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:7020", "127.0.0.1.evil.example", "localhost.evil.example:7020", "", "127.0.0.1:7020@evil.example",
        "user@127.0.0.1:7020", "127.0.0.1:port", "127.0.0.1/x", "10.0.0.5:7020", "[::1", "localhost:7020 evil",
        "0.0.0.0",
    ],
)  # fmt: skip
def test_a_name_that_somebody_bent_to_this_machine_is_refused(host):
    assert refused(asking(host=host)) == 403


def test_two_hosts_in_one_request_are_refused():
    request = asking()
    request.headers["host"] = ["127.0.0.1:7020", "evil.example"]
    assert refused(request) == 403


def test_a_name_that_was_allowed_is_known_and_no_other():
    gate = Gate(TOKEN, "weft_7020", LOOPBACK | {"gpu.lab"})
    assert refused(asking(host="gpu.lab:7020"), gate) is None and refused(asking(host="gpu2.lab:7020"), gate) == 403


def test_where_all_addresses_are_served_one_in_digits_is_known_and_a_name_is_not():
    gate = Gate(TOKEN, "weft_7020", by_address=True)
    assert [refused(asking(host=host), gate) for host in ("10.0.0.5:7020", "[fe80::1]:7020")] == [None, None]
    assert refused(asking(host="evil.example:7020"), gate) == 403


def test_the_name_of_a_host_header_is_without_its_port():
    assert [host_name(h) for h in ("A.b:1", "[::1]:1", "a", "a:b", "a@b")] == ["a.b", "[::1]", "a", "", ""]


@pytest.mark.parametrize("origin", ["http://127.0.0.1:7020", "https://127.0.0.1:7020"])
def test_the_dashboard_s_own_page_may_ask(origin):
    assert refused(asking(origin=origin)) is None


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "http://127.0.0.1:3000", "http://localhost:7020", "null", "file://", "http://127.0.0.1:7020.x"],
)  # fmt: skip
def test_a_page_from_elsewhere_may_not_ask_not_even_from_another_port_of_this_machine(origin):
    assert refused(asking(origin=origin)) == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_page_may_lead_a_visitor_here_and_may_not_load_our_data(site):
    assert refused(asking(path="/api/runs", sec_fetch_site=site, sec_fetch_mode="no-cors")) == 403
    assert refused(asking(sec_fetch_site=site, sec_fetch_mode="navigate")) is None


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_a_command_that_a_form_could_send_is_refused(kind):
    request = asking("POST", "/api/runs/a/control", origin="http://127.0.0.1:7020", content_type=kind)
    assert refused(request) == 415


def test_a_command_with_a_cookie_must_say_that_it_comes_from_our_page():
    sent = {"content_type": "application/json", "cookie": f"weft_7020={TOKEN.cookie}"}
    assert refused(asking("POST", **sent)) == 403
    assert refused(asking("POST", **sent, origin="http://evil.example")) == 403
    assert refused(asking("POST", **sent, sec_fetch_site="same-site")) == 403
    assert refused(asking("POST", **sent, sec_fetch_mode="navigate", sec_fetch_site="cross-site")) == 403
    assert refused(asking("POST", **sent, origin="http://127.0.0.1:7020")) is None
    assert refused(asking("POST", **sent, sec_fetch_site="same-origin")) is None


def test_a_program_with_the_token_may_command_without_an_origin():
    sent = {"content_type": "application/json; charset=utf-8", "authorization": f"Bearer {TOKEN.text}"}
    assert refused(asking("POST", **sent)) is None


def test_very_long_addresses_are_refused():
    assert refused(asking(path="/" + "a" * 3_000)) == 414 and refused(asking(query="a" * 20_000)) == 414


# ---- The key -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN.text}"}, {"authorization": "Bearer"},
        {"cookie": f"weft_7020={TOKEN.text}"}, {"cookie": f"weft_7021={TOKEN.cookie}"}, {"cookie": "weft_7020"},
        {"cookie": f"xweft_7020={TOKEN.cookie}"}, {"authorization": f"Bearer {TOKEN.cookie}"},
        {"authorization": "Bearer \xff"},
    ],
)  # fmt: skip
def test_nothing_but_the_token_or_its_cookie_opens(headers):
    assert not GATE.admits(asking(**headers))


def test_token_and_cookie_open_among_whatever_cookies_other_programs_have_set():
    assert GATE.admits(asking(authorization=f"bearer {TOKEN.text}"))
    assert GATE.admits(asking(cookie=f'odd="a;b"; {{json: 1}}; weft_7020={TOKEN.cookie}; z'))


def test_the_place_behind_a_token_is_never_another_host():
    assert asking(path="//evil.example/x", query="token=a").without_token == "/evil.example/x"
    assert asking(path="/\\evil.example", query="token=a").without_token == "/evil.example"
    assert asking(path="/a%2Fb", query="x=1&token=a&y=").without_token == "/a%2Fb?x=1&y="
    assert "\r" not in asking(path="/a\r\nx: y", query="token=a").without_token


def test_only_files_of_this_user_are_believed(tmp_path: Path):
    if os.getuid() != 0:
        pytest.skip("needs root, to give a file away")
    token = kept_token(tmp_path)[0]
    os.chown(tmp_path / FILE, 12345, 12345)
    assert kept_token(tmp_path)[0].text != token.text
