//! However a token endpoint misbehaves, the login is kept as it was, the client is told when to come back,
//! the other provider serves, and a healthy answer later heals it.

mod common;
use common::*;
use std::net::TcpListener;
use std::time::Duration;
use std::{io, thread};

/// Not much more than one call may take.
const LONG: Duration = Duration::from_secs(60);

/// Until the other side has had enough of it.
fn stay_silent(conn: &mut Conn) -> io::Result<()> {
    conn.wire.socket().set_read_timeout(Some(LONG))?;
    conn.wire.some()?;
    conn.cut()
}

/// Misbehaves without spending a token.
fn misbehave(way: &str, conn: &mut Conn) -> io::Result<()> {
    let json = |conn: &mut Conn, text: &str| {
        let headers = [("content-type", "application/json")];
        conn.respond(200, &headers, text.as_bytes())
    };
    match way {
        "nonsense" => json(conn, "}{ \u{fffd} nonsense"),
        "nothing" => json(conn, ""),
        "not even text" => conn.respond(200, &[], &[0, 159, 146, 150]),
        "half of it" => json(conn, "{\"access_token\":\"abc"),
        "HTML" => conn.respond(
            200,
            &[("content-type", "text/html")],
            b"<html>Log in</html>",
        ),
        "HTML that refuses" => conn.respond(503, &[("content-type", "text/html")], b"<html>"),
        "an empty token" => json(conn, r#"{"access_token":"","refresh_token":""}"#),
        "a token of blanks" => json(conn, r#"{"access_token":"  ","expires_in":3600}"#),
        "a token with a line end" => {
            json(conn, r#"{"access_token":"a\r\nx: y","expires_in":3600}"#)
        }
        "a token of another type" => json(conn, r#"{"access_token":{"a":1},"expires_in":3600}"#),
        "no token" => json(conn, r#"{"token_type":"bearer","expires_in":3600}"#),
        "a list" => json(conn, "[1,2,3]"),
        "nested without end" => json(conn, &"[".repeat(60_000)),
        "null" => json(conn, "null"),
        "too much" => {
            let text = format!(
                "{{\"pad\":\"{}\",\"access_token\":\"abc\"}}",
                "x".repeat(80 << 10)
            );
            json(conn, &text)
        }
        "without an end" => {
            conn.stream(&[])?;
            while conn.chunk([b' '; 4096]).is_ok() {}
            conn.cut()
        }
        "broken off" => {
            conn.head(200, &[("content-length", "1000")])?;
            conn.wire.send(b"{\"access_token\":\"abc\",")?;
            conn.cut()
        }
        "garbage" => {
            conn.wire.send(b"\x16\x03\x01 no HTTP\r\n\r\n")?;
            conn.cut()
        }
        "a cut" => conn.cut(),
        "an endless head" => {
            conn.wire.send(b"HTTP/1.1 200 OK\r\n")?;
            while conn.wire.send(&b"a: b\r\n".repeat(100)).is_ok() {}
            conn.cut()
        }
        "a redirect" => conn.respond(307, &[("location", "/anthropic/v1/elsewhere")], b""),
        "too many requests" => conn.respond(429, &[("retry-after", "1")], b"{}"),
        "an absurd wait" => conn.respond(429, &[("retry-after", "9999999999999999999")], b"{}"),
        "silence" => stay_silent(conn),
        "silence in the body" => {
            conn.head(200, &[("content-length", "1000")])?;
            conn.wire.send(b"{")?;
            stay_silent(conn)
        }
        "a drip" => {
            conn.head(200, &[("content-length", "1000")])?;
            while conn.wire.send(b" ").is_ok() {
                thread::sleep(Duration::from_secs(1));
            }
            conn.cut()
        }
        way => panic!("there is no way {way:?}"),
    }
}

const WAYS: [&str; 26] = [
    "nonsense",
    "nothing",
    "not even text",
    "half of it",
    "HTML",
    "HTML that refuses",
    "an empty token",
    "a token of blanks",
    "a token with a line end",
    "a token of another type",
    "no token",
    "a list",
    "nested without end",
    "null",
    "too much",
    "without an end",
    "broken off",
    "garbage",
    "a cut",
    "an endless head",
    "a redirect",
    "too many requests",
    "an absurd wait",
    "silence",
    "silence in the body",
    "a drip",
];

fn ask(mux: &Mux, provider: &str) -> Answer {
    let mut client = mux.client();
    let socket = client.wire.socket();
    socket.set_read_timeout(Some(LONG)).expect("set a timeout");
    client
        .request("POST", target(provider), &[BEARER], b"{}")
        .answer()
}

#[test]
fn each_costs_no_login_and_heals() {
    at_once(WAYS, |way| {
        // Both vendors alike: half of the ways with each.
        let number = WAYS.iter().position(|w| *w == way).expect("a way");
        let provider = ["claude", "chatgpt"][number % 2];
        let other = ["chatgpt", "claude"][number % 2];
        let up = Upstream::plain();
        up.on_refresh(move |_, conn| misbehave(way, conn).map(|()| true));
        let expired = up.login(provider, -10).file(provider);
        let setup = Setup::new(&up).set("workers", 4).save(provider, &expired);
        let mux = setup.start();
        up.wait(1, Request::is_refresh);
        assert_eq!(ask(&mux, other).text(), "fine", "{way}: beside the call");

        let answer = ask(&mux, provider);
        assert_eq!(answer.status, 503, "{way}");
        let wait = answer.header("retry-after").and_then(|s| s.parse().ok());
        assert!(
            wait.is_some_and(|seconds: u64| seconds > 0),
            "{way}: {wait:?}"
        );
        assert_eq!(answer.header("x-should-retry"), None, "{way}");
        answer.error();
        assert_eq!(up.refreshes().len(), 1, "{way}: the wait is obeyed");
        assert_eq!(login::read(&mux.state(), provider), expired, "{way}");
        mux.wait_log(&format!("{provider}: refresh"));

        up.refresh_again();
        if way == "an absurd wait" {
            // Nobody waits for a day: the owner logs in anew.
            let login = up.login(provider, 3600);
            login::save(&mux.state(), provider, &login.file(provider));
        }
        let tries = (0..80).find(|_| {
            thread::sleep(Duration::from_millis(250));
            ask(&mux, provider).status == 200
        });
        assert!(tries.is_some(), "{way}: it never heals");
        assert_eq!(up.reused(), 0, "{way}");
        assert_eq!(ask(&mux, other).text(), "fine", "{way}");
    });
}

/// The tokens are all there, and the old one is spent: an answer may break off behind them.
#[test]
fn an_answer_whose_end_is_missing_costs_no_login() {
    at_once(
        [("claude", true), ("chatgpt", false)],
        |(provider, sized)| {
            let up = Upstream::plain();
            let shared = up.shared.clone();
            up.on_refresh(move |request, conn| {
                let answer = shared.vendors.renew(request, 3600).expect("a new login");
                if sized {
                    conn.head(200, &[("content-length", "10000")])?;
                    conn.wire.send(answer.to_string().as_bytes())?;
                } else {
                    conn.stream(&[])?;
                    conn.chunk(answer.to_string())?;
                }
                conn.cut().map(|()| true)
            });
            let expired = up.login(provider, -10).file(provider);
            let mux = Setup::new(&up).save(provider, &expired).start();
            assert_eq!(ask(&mux, provider).text(), "fine");
            assert_eq!((up.refreshes().len(), up.reused()), (1, 0));
        },
    );
}

/// The refresh token is spent by then: what nobody needs of the answer must not cost what it brings.
#[test]
fn what_is_odd_beside_the_tokens_costs_no_login() {
    let odd: [&[u8]; 4] = [
        br#""a cut-off name \ud83d""#,
        b"\"Latin-1: \xe9\"",
        b"1e400",
        &[b"[".repeat(200), b"]".repeat(200)].concat(),
    ];
    at_once(odd, |odd| {
        let up = Upstream::plain();
        let (vendor, odd) = (up.shared.clone(), odd.to_vec());
        up.on_refresh(move |request, conn| {
            let answer = vendor.vendors.renew(request, 3600).expect("a new login");
            let text = answer.to_string();
            let end = text.strip_suffix('}').expect("an object").as_bytes();
            let body = [end, b",\"organization\":{\"name\":", &odd, b"}}"].concat();
            conn.respond(200, &[], &body).map(|()| true)
        });
        let setup = Setup::new(&up).save("claude", &up.login("claude", -10).claude());
        assert_eq!(setup.start().message().status, 200);
        assert_eq!((up.refreshes().len(), up.reused()), (1, 0));
    });
}

/// It comes in one piece with an answer that is larger than what is read in one go.
#[test]
fn an_interim_answer_before_the_tokens_costs_no_login() {
    let up = Upstream::plain();
    let shared = up.shared.clone();
    up.on_refresh(move |request, conn| {
        let answer = shared.vendors.renew(request, 3600).expect("a new login");
        let body = answer.to_string() + &" ".repeat(20_000);
        let length = body.len();
        let interim = "HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n";
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n");
        let all = [interim, &head, &body].concat();
        conn.wire.send(all.as_bytes()).map(|()| true)
    });
    let setup = Setup::new(&up).save("claude", &up.login("claude", -10).claude());
    assert_eq!(setup.start().message().status, 200);
    assert_eq!((up.refreshes().len(), up.reused()), (1, 0));
}

/// A new token that is said to have expired already is used, and not refreshed over and over.
#[test]
fn an_expiry_in_the_past_starts_no_storm() {
    let cases = [
        ("claude", json!(0)),
        ("claude", json!(-3600)),
        ("claude", json!("soon")),
        ("claude", json!(1e300)),
        ("chatgpt", json!(null)),
    ];
    at_once(cases, |(provider, lifetime)| {
        let up = Upstream::plain();
        let (shared, claimed) = (up.shared.clone(), lifetime.clone());
        up.on_refresh(move |req, conn| {
            let mut answer = shared.vendors.renew(req, 0).expect("a good refresh token");
            answer["expires_in"] = claimed.clone();
            conn.json(200, &answer).map(|()| true)
        });
        let expired = up.login(provider, -10).file(provider);
        let setup = Setup::new(&up).set("refresh_check_interval", "1s");
        let mux = setup.save(provider, &expired).start();
        let other = if provider == "claude" {
            "chatgpt"
        } else {
            "claude"
        };
        assert_eq!(ask(&mux, other).text(), "fine");
        let before = mux.footprint();
        at_once(0..32, |_| {
            assert_eq!(ask(&mux, provider).text(), "fine", "{lifetime}")
        });
        for _ in 0..10 {
            thread::sleep(Duration::from_millis(300));
            assert_eq!(ask(&mux, provider).text(), "fine", "{lifetime}");
        }
        assert_eq!((up.refreshes().len(), up.reused()), (1, 0), "{lifetime}");
        assert_eq!(ask(&mux, other).text(), "fine");
        mux.assert_settled(before, 64);
    });
}

/// Fifty-nine requests that need a refresh which stalls: each hears 503, and workers and memory are back.
#[test]
fn a_stalled_refresh_under_load() {
    let (up, end) = (Upstream::plain(), Steps::default());
    let held = end.clone();
    up.on_refresh(move |_, conn| {
        held.wait(1);
        conn.cut().map(|()| true)
    });
    let expired = up.login("chatgpt", -10).codex();
    let setup = Setup::new(&up).set("workers", 64).save("chatgpt", &expired);
    let mux = setup.start();
    let before = mux.warm_footprint();
    at_once(0..60, |number| {
        if number == 59 {
            up.wait(1, Request::is_refresh);
            assert_eq!(mux.message().text(), "fine", "beside those that wait");
            end.advance();
        } else {
            assert_eq!(ask(&mux, "chatgpt").status, 503);
        }
    });
    assert_eq!(up.refreshes().len(), 1);
    mux.assert_recovered(before, 1); // idle workers end, so those that waited must have been let go
}

/// Where IPv6 is broken, its addresses would take most of the time that a call has, and the answer could be lost.
#[test]
fn of_a_names_addresses_those_of_ipv4_are_called_first() {
    let authority = Authority::new();
    let up = Upstream::tls(&authority, |_, conn| conn.respond(200, &[], b"fine"));
    let Ok(silent) = TcpListener::bind(("::1", up.addr.port())) else {
        return say("SKIPPED: no IPv6 here, or the port is taken");
    };
    silent
        .set_nonblocking(true)
        .expect("not to wait for a call");
    let expired = up.login("claude", -10).claude();
    let setup = Setup::new(&up).save("claude", &expired);
    let hosts = setup.write("hosts", "::1 upstream.test\n127.0.0.1 upstream.test\n");
    let Some(script) = setup::mounting(&hosts, "/etc/hosts") else {
        return say("SKIPPED: only root has an /etc/hosts of its own");
    };
    let roots = setup.write("roots.pem", &authority.cert_pem);
    let url = format!("https://upstream.test:{}", up.addr.port());
    let setup = setup.provider(0, "token_url", format!("{url}/claude/token"));
    let setup = setup.provider(0, "base_url", url);
    let mux = setup.env("SSL_CERT_FILE", roots).shell(&script).start();
    assert_eq!(mux.message().text(), "fine");
    let called = silent.accept().map_err(|e| e.kind());
    assert_eq!(called.unwrap_err(), io::ErrorKind::WouldBlock);
}

/// Ready is who can serve: not one whose token has ended and cannot be renewed for now.
#[test]
fn health_tells_who_cannot_serve_for_now() {
    let up = Upstream::plain();
    up.on_refresh(|_, conn| conn.respond(500, &[], b"").map(|()| true));
    let setup = Setup::new(&up).save("claude", &up.login("claude", -10).claude());
    let mux = setup
        .save("chatgpt", &up.login("chatgpt", 300).codex())
        .start();
    mux.wait_log_times("next try", 2);
    assert_eq!(mux.message().status, 503);
    assert_eq!(mux.ask("POST", RESPONSES, &[], b"{}").status, 200);
    let health = mux.client().request("GET", "/healthz", &[], b"").answer();
    let ready = json!({"claude": "unavailable", "chatgpt": "ready"});
    assert_eq!(health.json()["providers"], ready);
}

#[test]
fn health_counts_on_a_refresh_that_has_not_failed() {
    let up = Upstream::plain();
    let go = up.hold_refreshes();
    let login = up.login("claude", -10).claude();
    let mux = Setup::new(&up).save("claude", &login).start();
    up.wait(1, Request::is_refresh);
    let health = mux.client().request("GET", "/healthz", &[], b"").answer();
    assert_eq!(health.json()["providers"]["claude"], "ready");
    go.advance();
}
