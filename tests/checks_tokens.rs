//! Only who shows a user's token may ask; anyone else is told so before anything of the body is read.

mod common;
use common::*;

const BOB: &str = "Lr6ZcX1dWq8FhJ4uGe0S";

fn two_users(up: &Upstream) -> Setup {
    up.secret(BOB);
    Setup::new(up).set(
        "users",
        json!([{"name": "alice", "token": TOKEN}, {"name": "bob", "token": BOB}]),
    )
}

#[test]
fn a_token_is_admitted_in_either_header_and_must_be_exact() {
    let up = Upstream::plain();
    let mux = two_users(&up).start();
    let bearer = |token: &str| ("authorization", format!("Bearer {token}"));
    let key = |token: &str| ("x-api-key", token.to_owned());
    let plain = |value: &str| ("authorization", value.to_owned());
    let wrong = "wK3vQ9xZ2mB7nR5tY8pM";
    for (status, headers) in [
        (200, vec![bearer(TOKEN)]),
        (200, vec![key(TOKEN)]),
        (200, vec![bearer(TOKEN), key(TOKEN)]),
        (200, vec![bearer(BOB)]),
        (200, vec![key(BOB)]),
        (200, vec![plain(&format!("bearer {TOKEN}"))]),
        (200, vec![plain(&format!("BEARER {TOKEN}"))]),
        (401, vec![]),
        (401, vec![bearer(wrong)]),
        (401, vec![key(wrong)]),
        (401, vec![bearer(TOKEN), key(wrong)]),
        (401, vec![bearer(wrong), key(TOKEN)]),
        (401, vec![bearer(TOKEN), key(BOB)]),
        (401, vec![bearer(&TOKEN[..19])]),
        (401, vec![bearer(&format!("{TOKEN}x"))]),
        (401, vec![bearer(&TOKEN.to_lowercase())]),
        (401, vec![bearer("")]),
        (401, vec![key("")]),
        (401, vec![bearer(TOKEN), key("")]),
        (401, vec![bearer("alice")]),
        (401, vec![plain(TOKEN)]),
        (401, vec![plain(&format!("Basic {TOKEN}"))]),
        (401, vec![plain(&format!("Bearer {TOKEN}, Bearer {BOB}"))]),
        (401, vec![bearer(TOKEN), bearer(BOB)]),
        (401, vec![key(TOKEN), key(wrong)]),
        (401, vec![("cookie", format!("token={TOKEN}"))]),
    ] {
        let shown: Vec<_> = headers.iter().map(|(n, v)| (*n, v.as_str())).collect();
        let answer = mux
            .client()
            .request("POST", MESSAGES, &shown, b"{}")
            .answer();
        assert_eq!(answer.status, status, "{shown:?}");
    }
    assert_eq!(up.requests().len(), 7);
    let users = |name| mux.log_lines(&format!("user={name} ")).len();
    mux.wait_log_times("status=", 26);
    assert_eq!((users("alice"), users("bob"), users("-")), (5, 2, 19));
}

#[test]
fn a_refused_client_learns_why_and_that_trying_again_is_no_use() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let targets = [
        ("POST", MESSAGES),
        ("POST", RESPONSES),
        ("POST", "/nowhere"),
        ("GET", MESSAGES),
    ];
    for (method, target) in targets {
        let mut client = mux.client();
        let body: &[u8] = if method == "POST" { b"{}" } else { b"" };
        let answer = client.request(method, target, &[], body).answer();
        assert_eq!(answer.status, 401);
        assert!(
            answer
                .header("www-authenticate")
                .is_some_and(|v| v.starts_with("Bearer"))
        );
        assert_eq!(answer.header("x-should-retry"), Some("false"));
        assert_eq!(answer.header("connection"), Some("close"));
        assert_eq!(answer.header("content-type"), Some("application/json"));
        assert_eq!(answer.json()["error"]["type"], "authentication_error");
        // An error that names x-api-key Claude Code takes for a missing login of its own, and shows that.
        let why = answer.error();
        assert!(
            why.contains("token") && !why.to_lowercase().contains("x-api-key"),
            "{why}"
        );
        assert!(client.closed());
    }
}

#[test]
fn a_refusal_comes_before_any_byte_of_the_body() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    for framing in [("content-length", "1000"), ("transfer-encoding", "chunked")] {
        let mut client = mux.client();
        client.start("POST", MESSAGES, &[framing, ("expect", "100-continue")]);
        assert_eq!(client.answer().status, 401, "{framing:?}");
        assert!(client.closed());
    }
}

/// A connection that is closed over unread bytes is reset, which can cost a client the answer: it must end
/// cleanly instead.
#[test]
fn a_refusal_is_seen_by_a_client_that_sends_first() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let mut client = mux.client();
    client
        .start("POST", MESSAGES, &[("content-length", "400000")])
        .send([b'x'; 100_000]);
    assert_eq!(client.answer().status, 401);
    assert_eq!(client.wire.some().expect("a clean end"), b"");
}

#[test]
fn a_token_file_is_read_and_trimmed() {
    let up = Upstream::plain();
    up.secret(BOB);
    for at_home in [false, true] {
        let setup = Setup::new(&up);
        let file = setup.write("bob.token", format!("\n  {BOB}\t\r\n\n"));
        let file = if at_home { "~/bob.token".into() } else { file };
        let bob = json!([{"name": "bob", "token": null, "token_file": file}]);
        let mux = setup.set("users", bob).start();
        let ask = |token| {
            mux.client()
                .request("GET", MESSAGES, &[("x-api-key", token)], b"")
                .answer()
        };
        assert_eq!(ask(BOB).status, 200);
        assert_eq!(ask(TOKEN).status, 401);
        mux.wait_log("user=bob ");
    }
}

/// A client that reads only once it has sent its whole body hears why, too, and not of a reset.
#[test]
fn a_refused_client_with_a_large_body_hears_why() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    at_once(0..4, |_| {
        let body = vec![b'x'; 16 << 20];
        let mut client = mux.client();
        let answer = client.request("POST", MESSAGES, &[], &body).answer();
        assert_eq!(answer.status, 401);
        assert!(client.closed());
    });
    assert!(mux.peak_memory() < 32 << 20, "what it drains is not kept");
}

#[test]
fn without_users_everyone_is_admitted_but_a_web_page() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("users", Value::Null).start();
    let ask = |headers: &[(&str, &str)]| {
        mux.client()
            .request("POST", MESSAGES, headers, b"{}")
            .answer()
    };
    assert_eq!(ask(&[]).status, 200);
    assert_eq!(ask(&[("authorization", "Bearer whatever")]).status, 200);
    assert_eq!(
        ask(&[("x-api-key", "a"), ("authorization", "Basic b")]).status,
        200
    );
    for origin in ["https://example.org", "null"] {
        let refused = ask(&[("origin", origin)]);
        assert_eq!(refused.status, 403);
        assert_eq!(refused.header("x-should-retry"), Some("false"));
        refused.error();
    }
    assert_eq!(up.requests().len(), 3);
    assert_eq!(
        mux.log_lines("WARN").len(),
        0,
        "a loopback listener is no reason to warn"
    );
}

#[test]
fn with_users_a_web_page_with_a_token_is_admitted() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let answer = mux.ask(
        "POST",
        MESSAGES,
        &[("origin", "https://example.org")],
        b"{}",
    );
    assert_eq!(answer.status, 200);
}

#[test]
fn an_open_listener_without_users_is_warned_about() {
    let up = Upstream::plain();
    // A port alone is [::], or where there is no IPv6 the other once more.
    for listen in ["0.0.0.0:0", ":0"] {
        let mux = Setup::new(&up)
            .set("users", Value::Null)
            .set("listen", listen)
            .start();
        let warnings = mux.log_lines("WARN");
        assert_eq!(warnings.len(), 1, "{listen} {warnings:?}");
        assert!(warnings[0].contains("users"), "{warnings:?}");
    }
    let mux = Setup::new(&up).set("listen", "0.0.0.0:0").start();
    assert_eq!(mux.log_lines("WARN").len(), 0);
}
