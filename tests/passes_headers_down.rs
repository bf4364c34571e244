//! What the client sees of the upstream's answer: its status, its end-to-end headers and nothing else.

mod common;
use common::*;

/// Headers that frame the answer on this hop.
const HOP: [&str; 2] = ["content-length", "transfer-encoding"];

fn end_to_end(answer: &Answer) -> Vec<(String, String)> {
    let all = answer.head.headers.iter();
    let lower = all.map(|(name, value)| (name.to_ascii_lowercase(), value.clone()));
    let mut rest: Vec<_> = lower
        .filter(|(name, _)| !HOP.contains(&name.as_str()))
        .collect();
    rest.sort_by(|a, b| a.0.cmp(&b.0));
    rest
}

#[test]
fn every_end_to_end_header_arrives_and_repeats_keep_their_order() {
    let sent = [
        ("Date", "Mon, 23 Nov 2026 14:30:00 GMT"),
        ("Server", "cloudflare"),
        ("Content-Type", "application/json"),
        ("anthropic-ratelimit-unified-status", "allowed"),
        ("anthropic-ratelimit-unified-5h-utilization", "0.25"),
        ("anthropic-ratelimit-unified-7d-reset", "1795000000"),
        ("x-codex-primary-used-percent", "12.5"),
        ("x-codex-turn-state", " odd \t\"value\";a=b "),
        ("retry-after", "17"),
        ("x-should-retry", "true"),
        ("request-id", "req_011CQ"),
        ("Content-Encoding", "br"),
        ("Cache-Control", "no-store"),
        ("ETag", "\"x\""),
        ("Location", "https://example.org/elsewhere"),
        ("Strict-Transport-Security", "max-age=1"),
        ("Via", "1.1 google"),
        ("Vary", "a"),
        ("X-Empty", ""),
        ("vary", "c, b"),
        ("VARY", "a"),
    ];
    let up = Upstream::start(move |_, conn| conn.respond(200, &sent, b"\xff\x00body"));
    let mux = Mux::start(&up);
    let answer = mux.message();
    let lower = sent
        .iter()
        .map(|(n, v)| (n.to_ascii_lowercase(), v.trim().to_owned()));
    let mut expected: Vec<_> = lower.collect();
    expected.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(end_to_end(&answer), expected);
    assert_eq!(answer.body, b"\xff\x00body");
}

#[test]
fn cookies_alternatives_and_hop_by_hop_headers_are_dropped() {
    let up = Upstream::start(|_, conn| {
        let dropped = [
            ("Set-Cookie", "a=1"),
            ("set-cookie", "b=2"),
            ("Alt-Svc", "h3=\":443\""),
            ("Connection", "keep-alive, x-hop"),
            ("X-Hop", "1"),
            ("Keep-Alive", "timeout=5"),
            ("Proxy-Authenticate", "Basic"),
            ("TE", "trailers"),
            ("Trailer", "x-sum"),
            ("Upgrade", "h2c"),
        ];
        let kept = [("Proxy-Status", "edge; error=none"), ("x-kept", "yes")];
        conn.respond(200, &[&dropped[..], &kept].concat(), b"fine")
    });
    let mux = Mux::start(&up);
    let kept = [("proxy-status", "edge; error=none"), ("x-kept", "yes")];
    let kept = kept.map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(end_to_end(&mux.message()), kept);
}

#[test]
fn a_header_value_in_another_alphabet_keeps_its_bytes() {
    let up = Upstream::start(|_, conn| {
        conn.wire
            .send(b"HTTP/1.1 200 OK\r\nx-name: caf\xe9 \xc3\xa9\r\ncontent-length: 0\r\n\r\n")
    });
    let mux = Mux::start(&up);
    let answer = mux.message();
    let raw = answer.head.raw.as_slice();
    let value = b": caf\xe9 \xc3\xa9\r\n";
    assert!(raw.windows(value.len()).any(|w| w == value), "{raw:?}");
}

#[test]
fn a_status_is_passed_on_and_no_error_is_rewritten() {
    let up = Upstream::start(|req, conn| {
        let status = req
            .head
            .get("x-status")
            .and_then(|s| s.parse().ok())
            .unwrap_or(0);
        conn.respond(
            status,
            &[("content-type", "text/html")],
            b"<html>upstream's own words",
        )
    });
    let mux = Mux::start(&up);
    for status in [
        200, 201, 202, 206, 400, 403, 404, 405, 409, 413, 422, 429, 500, 502, 503, 529, 599,
    ] {
        let answer = mux.ask(
            "POST",
            MESSAGES,
            &[("x-status", &status.to_string())],
            b"{}",
        );
        assert_eq!(
            (answer.status, answer.text()),
            (status, "<html>upstream's own words")
        );
        assert_eq!(answer.header("x-should-retry"), None);
    }
}

#[test]
fn no_redirect_is_followed() {
    let up = Upstream::start(|req, conn| {
        let status = req
            .head
            .get("x-status")
            .and_then(|s| s.parse().ok())
            .unwrap_or(0);
        conn.respond(
            status,
            &[("location", "/anthropic/v1/elsewhere")],
            b"go there",
        )
    });
    let mux = Mux::start(&up);
    for status in [301, 302, 303, 307, 308] {
        let answer = mux.ask("GET", MESSAGES, &[("x-status", &status.to_string())], b"");
        assert_eq!(answer.status, status);
        assert_eq!(answer.header("location"), Some("/anthropic/v1/elsewhere"));
        assert_eq!(answer.text(), "go there");
    }
    assert_eq!(up.requests().len(), 5);
}

/// By its own word, not by upstream's.
#[test]
fn a_connection_that_ends_says_so() {
    let up = Upstream::start(|_, conn| conn.respond(200, &[("connection", "close")], b"fine"));
    let mux = Mux::start(&up);
    let mut client = mux.client();
    let mut ask = |headers: &[_]| client.request("POST", MESSAGES, headers, b"{}").answer();
    assert_eq!(ask(&[BEARER]).header("connection"), None);
    let last = ask(&[BEARER, ("connection", "close")]);
    assert_eq!(last.header("connection"), Some("close"));
    assert!(client.closed());
}

/// Each of these ends where its head ends, and the connection serves the next request.
#[test]
fn an_answer_without_a_body_leaves_the_connection_good() {
    let up = Upstream::start(|req, conn| match req.head.get("x-status") {
        Some("204") => conn.head(204, &[]),
        Some("none of 5") => conn.head(204, &[("content-length", "5")]),
        Some("304") => conn.head(304, &[("etag", "x"), ("content-length", "5")]),
        Some("head") => conn.head(200, &[("content-length", "1234")]),
        Some("chunked") => conn.head(200, &[("transfer-encoding", "chunked")]),
        Some("empty") => conn.respond(200, &[], b""),
        _ => conn.respond(200, &[], b"fine"),
    });
    let mux = Mux::start(&up);
    let mut client = mux.client();
    for (status, method, case) in [
        (204, "POST", "204"),
        (204, "POST", "none of 5"),
        (304, "GET", "304"),
        (200, "HEAD", "head"),
        (200, "HEAD", "chunked"),
        (200, "POST", "empty"),
    ] {
        let answer = client
            .request(method, MESSAGES, &[BEARER, ("x-status", case)], b"")
            .answer();
        assert_eq!((answer.status, answer.body.len()), (status, 0), "{case}");
        assert_eq!(answer.header("transfer-encoding"), None, "{case}");
        if status == 204 {
            // A length must not be sent (RFC 9110 section 8.6).
            assert_eq!(answer.header("content-length"), None, "{case}");
        }
        if case == "head" {
            assert_eq!(answer.header("content-length"), Some("1234"));
        }
        let next = client.request("POST", MESSAGES, &[BEARER], b"{}").answer();
        assert_eq!(next.text(), "fine", "after {case}");
    }
}

#[test]
fn trailers_and_interim_answers_are_dropped() {
    let up = Upstream::start(|_, conn| {
        conn.head(103, &[("link", "</x>; rel=preload")])?;
        conn.stream(&[("trailer", "x-sum")])?;
        conn.chunk("body")?;
        conn.wire.send(b"0\r\nx-sum: 1\r\n\r\n")
    });
    let mux = Mux::start(&up);
    let mut client = mux.client();
    client.request("POST", MESSAGES, &[BEARER], b"{}");
    assert_eq!(client.head().word(1), "200");
    assert_eq!(client.body().expect("a whole body"), b"body");
    // Nor is any of it in the way of the next.
    assert_eq!(
        client
            .request("POST", MESSAGES, &[BEARER], b"{}")
            .answer()
            .status,
        200
    );
}

/// It comes in one piece with an answer that is larger than what is read in one go.
#[test]
fn an_interim_answer_hides_no_large_one() {
    let up = Upstream::start(|req, conn| {
        let interim = match req.head.get("x-way") {
            Some("100") => "HTTP/1.1 100 Continue\r\n\r\n".to_owned(),
            Some("103") => "HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n".to_owned(),
            _ => "HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n".repeat(1000),
        };
        let head = "HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n";
        let all = interim + head + &"x".repeat(100_000);
        conn.wire.send(all.as_bytes())
    });
    let mux = Setup::new(&up).set("workers", 1).start();
    for way in ["100", "103", "a thousand"] {
        let answer = mux.ask("POST", MESSAGES, &[("x-way", way)], b"{}");
        assert_eq!((answer.status, answer.body.len()), (200, 100_000), "{way}");
    }
    assert_eq!(up.connections(), 1);
}

/// On one upstream connection: what was small enough for the events of a stream is large enough
/// for what follows, a head of nearly 16 KiB.
#[test]
fn a_large_head_behind_a_stream() {
    let large = "x".repeat(6000);
    let value = large.clone();
    let up = Upstream::start(move |req, conn| {
        if req.head.get("x-large").is_some() {
            let fields = [
                ("x-one", &value[..]),
                ("x-two", &value),
                ("x-three", &value[..3750]),
            ];
            return conn.respond(200, &fields, b"fine");
        }
        conn.stream(&[])?;
        conn.chunk("one")?;
        conn.chunk("two")?;
        conn.finish()
    });
    let mux = Setup::new(&up).set("workers", 1).start();
    for _ in 0..3 {
        assert_eq!(mux.message().text(), "onetwo");
        let answer = mux.ask("POST", MESSAGES, &[("x-large", "1")], b"{}");
        assert_eq!(answer.header("x-two"), Some(large.as_str()));
        assert_eq!(answer.header("x-three"), Some(&large[..3750]));
        assert_eq!(answer.text(), "fine");
    }
    assert_eq!(up.connections(), 1);
}

/// A length that is said twice, or beside chunks, would be read in two ways by some.
#[test]
fn a_length_that_is_not_all_of_the_framing_is_not_passed_on() {
    let up = Upstream::start(|req, conn| {
        if req.head.get("x-way") == Some("chunks") {
            conn.stream(&[("content-length", "3")])?;
            conn.chunk("fine")?;
            return conn.finish();
        }
        conn.head(200, &[("content-length", "4"), ("content-length", "4")])?;
        conn.wire.send(b"fine")
    });
    let mux = Mux::start(&up);
    for way in ["twice", "chunks"] {
        let answer = mux.ask("POST", MESSAGES, &[("x-way", way)], b"{}");
        assert_eq!(answer.text(), "fine", "{way}");
        assert!(answer.head.all("content-length").is_empty(), "{way}");
    }
}

/// Without its length, nobody could tell where it ends.
#[test]
fn a_length_that_connection_names_is_passed_on() {
    let up = Upstream::start(|_, conn| {
        let named = ("connection", "content-length, x-own");
        conn.head(200, &[named, ("content-length", "4"), ("x-own", "1")])?;
        conn.wire.send(b"fine")
    });
    let mux = Mux::start(&up);
    let answer = mux.message();
    assert_eq!(answer.header("content-length"), Some("4"));
    assert_eq!(answer.header("x-own"), None);
    assert_eq!(answer.text(), "fine");
}
