//! A 401 from upstream is answered with a fresh token and the same request, once, and nothing else ever is.

mod common;
use common::*;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

fn revoked(up: &Upstream) -> Mux {
    let login = up.login("claude", 3600);
    up.revoke(&login.access);
    Setup::new(up).save("claude", &login.claude()).start()
}

#[test]
fn with_the_same_body_and_a_new_token() {
    let up = Upstream::start(|req, conn| conn.respond(200, &[], &req.body));
    for chunked in [false, true] {
        let mux = revoked(&up);
        let before = up.requests().len();
        let body: Vec<u8> = (0..1u32 << 20).map(|i| i as u8).collect(); // the most that is held
        let mut client = mux.client();
        let kept = ("x-kept", "yes");
        if chunked {
            client.start(
                "POST",
                MESSAGES,
                &[BEARER, kept, ("transfer-encoding", "chunked")],
            );
            client.chunk(&body).finish();
        } else {
            client.request("POST", MESSAGES, &[BEARER, kept], &body);
        }
        let answer = client.answer();
        assert!(
            answer.status == 200 && answer.body == body,
            "{}",
            answer.status
        );
        let requests = up.requests().split_off(before);
        assert_eq!(requests.len(), 2);
        assert_ne!(requests[0].bearer(), requests[1].bearer());
        for request in &requests {
            assert!(request.body == body && request.head.get("x-kept") == Some("yes"));
            assert_eq!(request.head.word(1), "/anthropic/v1/messages");
        }
    }
    assert_eq!(up.refreshes().len(), 2);
}

#[test]
fn with_no_body_where_there_was_none() {
    let up = Upstream::plain();
    for (method, target) in [("GET", "/claude/v1/models"), ("POST", MESSAGES)] {
        let mux = revoked(&up);
        let before = up.requests().len();
        assert_eq!(mux.ask(method, target, &[], b"").status, 200, "{method}");
        let requests = up.requests().split_off(before);
        assert_eq!(requests.len(), 2, "{method}");
        assert_ne!(requests[0].bearer(), requests[1].bearer());
        assert_eq!(requests[0].head.start, requests[1].head.start);
        assert!(requests[1].body.is_empty(), "{method}");
    }
}

/// The answer that the client gets has `request_timeout`, however long the login took meanwhile.
#[test]
fn with_a_time_of_its_own() {
    let up = Upstream::plain();
    up.on_refresh(|_, _| {
        std::thread::sleep(std::time::Duration::from_secs(4));
        Ok(false)
    });
    let login = up.login("claude", 3600);
    up.revoke(&login.access);
    let setup = Setup::new(&up).save("claude", &login.claude());
    let mux = setup.set("request_timeout", "3s").start();
    assert_eq!(mux.message().status, 200);
    assert_eq!((up.requests().len(), up.refreshes().len()), (2, 1));
}

#[test]
fn with_the_token_on_disk_if_that_is_newer() {
    let (tokens, newer, refreshes) = replaced_meanwhile(3600);
    assert_eq!(tokens[1..], [newer]);
    assert_eq!(refreshes, 0);
}

/// A newer login may have ended, too.
#[test]
fn with_what_a_refresh_makes_of_a_newer_login_that_has_ended() {
    let (tokens, newer, refreshes) = replaced_meanwhile(-10);
    assert!(tokens.len() == 2 && tokens[1] != newer);
    assert_eq!(refreshes, 1);
}

/// The login is replaced while upstream looks at the old one, which it refuses: the tokens that upstream saw,
/// the one on disk, and how many refreshes there were.
fn replaced_meanwhile(ttl: i64) -> (Vec<String>, String, usize) {
    let (up, setup, newer) = replaces(Login::new("claude", 3600), Login::new("claude", ttl));
    assert_eq!(setup.start().message().text(), "fine");
    let requests = up.requests();
    let tokens = requests.iter().map(|r| r.bearer().to_owned());
    (tokens.collect(), newer, up.refreshes().len())
}

/// An upstream that refuses the old login and puts the newer one in its place; and the access token of that.
fn replaces(old: Login, newer: Login) -> (Upstream, Setup, String) {
    let state = Arc::new(OnceLock::<PathBuf>::new());
    let (seen, stale, file) = (state.clone(), old.access.clone(), newer.claude());
    let up = Upstream::start(move |req, conn| {
        if req.bearer() != stale {
            return conn.respond(200, &[], b"fine");
        }
        login::save(seen.get().expect("a folder"), "claude", &file);
        conn.respond(401, &[], b"stale")
    });
    up.accept(&old);
    up.accept(&newer);
    let setup = Setup::bare(&up).save("claude", &old.claude());
    state.set(setup.state()).expect("set once");
    (up, setup, newer.access)
}

/// Which may take as long as the vendor likes. It is one in the background, for a token that lasts five minutes.
#[test]
fn with_the_token_on_disk_even_while_a_refresh_runs() {
    let (up, setup, newer) = replaces(Login::new("claude", 300), Login::new("claude", 3600));
    let go = up.hold_refreshes();
    let mux = setup.start();
    up.wait(1, Request::is_refresh);
    assert_eq!(mux.message().text(), "fine");
    let used = up.requests().pop().expect("a request");
    assert_eq!(used.bearer(), newer);
    go.advance();
}

/// The upstream refuses every token: its second word stands, and is not asked for again within a minute.
#[test]
fn a_second_401_passes_through() {
    let up = Upstream::start(|_, conn| {
        conn.respond(401, &[("x-from", "upstream")], b"upstream's own words")
    });
    let mux = Mux::start(&up);
    for (requests, refreshes) in [(2, 1), (3, 1), (4, 1)] {
        let answer = mux.message();
        assert_eq!(
            (answer.status, answer.text()),
            (401, "upstream's own words")
        );
        assert_eq!(answer.header("x-from"), Some("upstream"));
        assert_eq!(
            (up.requests().len(), up.refreshes().len()),
            (requests, refreshes)
        );
    }
}

/// Nor is it rewritten where the refresh shows that the login has ended: the next request is told.
#[test]
fn a_401_that_no_refresh_helps_passes_through() {
    let up = Upstream::start(|_, conn| conn.respond(401, &[], b"upstream's own words"));
    up.on_refresh(|_, conn| {
        conn.json(400, &json!({"error": "invalid_grant"}))
            .map(|()| true)
    });
    let mux = Mux::start(&up);
    let answer = mux.message();
    assert_eq!(
        (answer.status, answer.text()),
        (401, "upstream's own words")
    );
    assert_eq!(mux.message().status, 503);
    assert_eq!((up.requests().len(), up.refreshes().len()), (1, 1));
}

#[test]
fn not_when_the_body_was_too_large_to_hold() {
    let up = Upstream::plain();
    let mux = revoked(&up);
    let body = vec![b'x'; (1 << 20) + 1];
    assert_eq!(mux.ask("POST", MESSAGES, &[], &body).status, 401);
    assert_eq!(up.requests().len(), 1);
    assert_eq!(mux.message().status, 200, "the next one has a new token");
    assert_eq!(up.refreshes().len(), 1);
    // One that does not say its size, too.
    let mux = revoked(&up);
    let mut client = mux.client();
    let chunked = [BEARER, ("transfer-encoding", "chunked")];
    client.start("POST", MESSAGES, &chunked);
    client.chunk(&body).finish();
    assert_eq!(client.answer().status, 401);
    assert_eq!(up.requests().len(), 3);
}

#[test]
fn fifty_at_once_share_one_refresh() {
    let up = Upstream::plain();
    let mux = revoked(&up);
    let mut clients: Vec<_> = (0..50).map(|_| mux.client()).collect();
    for client in &mut clients {
        client.request("POST", MESSAGES, &[BEARER], b"{}");
    }
    for client in &mut clients {
        assert_eq!(client.answer().status, 200);
    }
    assert_eq!((up.refreshes().len(), up.reused()), (1, 0));
    assert!(up.requests().len() <= 100);
}

#[test]
fn nothing_but_a_401() {
    let up = Upstream::start(|req, conn| {
        let status = req
            .head
            .get("x-status")
            .and_then(|s| s.parse().ok())
            .unwrap_or(0);
        conn.respond(status, &[], b"")
    });
    let mux = Mux::start(&up);
    for (number, status) in [400, 403, 404, 408, 409, 429, 500, 502, 503, 529]
        .into_iter()
        .enumerate()
    {
        let answer = mux.ask(
            "POST",
            MESSAGES,
            &[("x-status", &status.to_string())],
            b"{}",
        );
        assert_eq!(answer.status, status);
        assert_eq!(up.requests().len(), number + 1);
    }
    assert_eq!(up.refreshes().len(), 0);
}

#[test]
fn not_when_the_upstream_breaks_off() {
    let up = Upstream::start(|_, conn| conn.cut());
    let mux = Mux::start(&up);
    assert_eq!(mux.message().status, 502);
    assert_eq!(mux.ask("GET", MESSAGES, &[], b"").status, 502);
    assert_eq!(up.requests().len(), 2);
}
