//! A client that asks for a WebSocket is told at once to use HTTP, which Codex then does.

mod common;
use common::*;

const UPGRADE: [(&str, &str); 4] = [
    ("Connection", "keep-alive, Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
];

#[test]
fn a_websocket_is_426_and_nothing_goes_upstream() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    for (target, value) in [
        (RESPONSES, "websocket"),
        (RESPONSES, "WebSocket"),
        (MESSAGES, "h2c, websocket"),
    ] {
        let mut headers = UPGRADE;
        headers[1].1 = value;
        let answer = mux
            .client()
            .start("GET", target, &[&[BEARER], &headers[..]].concat())
            .answer();
        assert_eq!(answer.status, 426, "{target} {value}");
        // What to use in its place has to be said (RFC 9110 section 15.5.22), and for this hop.
        assert_eq!(answer.header("upgrade"), Some("HTTP/1.1"));
        assert_eq!(answer.header("connection"), Some("upgrade"));
        answer.error();
    }
    assert_eq!(up.requests().len(), 0);
    assert_eq!(mux.ask("POST", RESPONSES, &[], b"{}").status, 200);
}

/// No login is needed to say so, and no worker: one that is busy delays it by nothing.
#[test]
fn it_is_said_at_once() {
    let go = Steps::default();
    let held = go.clone();
    let up = Upstream::start(move |_, conn| {
        held.wait(1);
        conn.respond(200, &[], b"late")
    });
    let login = up.login("claude", 3600).claude();
    let setup = Setup::bare(&up).save("claude", &login);
    let mux = setup.set("workers", 1).start();
    let mut busy = mux.client();
    busy.request("POST", MESSAGES, &[BEARER], b"{}");
    up.wait(1, |_| true);
    let answer = mux
        .client()
        .start("GET", RESPONSES, &[&[BEARER], &UPGRADE[..]].concat())
        .answer();
    assert_eq!(answer.status, 426);
    go.advance();
    assert_eq!(busy.answer().text(), "late");
}

#[test]
fn another_upgrade_is_a_plain_request() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let headers = [
        BEARER,
        ("connection", "upgrade, http2-settings"),
        ("upgrade", "h2c"),
        ("http2-settings", "AAMA"),
    ];
    let answer = mux
        .client()
        .request("POST", MESSAGES, &headers, b"{}")
        .answer();
    assert_eq!(answer.text(), "fine");
    let request = up.requests().pop().expect("a request");
    assert_eq!(
        (
            request.head.get("upgrade"),
            request.head.get("http2-settings")
        ),
        (None, None)
    );
}
