//! A head or a body that is malformed, or that two readers could understand in two ways, is refused, and
//! nothing of it reaches upstream. In the order of RFC 9112.

mod common;
use common::*;
use std::time::Instant;

/// What an attacker would have served as a request of its own, if the one before ended elsewhere.
const SMUGGLED: &str =
    "GET /claude/v1/smuggled HTTP/1.1\r\nhost: ai-mux\r\nx-api-key: wK3vQ9xZ2mB7nR5tY8pL\r\n\r\n";

fn served(mux: &Mux) {
    let answer = mux.message();
    assert_eq!((answer.status, answer.text()), (200, "fine"));
}

/// Sends `raw` and the smuggled request; the status of the only answer, after which the connection ends.
fn refused(mux: &Mux, raw: &[u8]) -> String {
    let case = String::from_utf8_lossy(raw).into_owned();
    let mut client = mux.client();
    let _ = client.wire.send(&[raw, SMUGGLED.as_bytes()].concat());
    let rest = String::from_utf8_lossy(&client.rest()).into_owned();
    assert_eq!(rest.matches("HTTP/1.1 ").count(), 1, "{case:?}: {rest:?}");
    let answer = rest.strip_prefix("HTTP/1.1 ").expect("an answer");
    assert!(answer.contains("\"type\":\"error\""), "{case:?}: {rest:?}");
    let final_word = answer.contains("\r\nx-should-retry: false\r\n");
    assert!(final_word, "{case:?}: {rest:?}");
    answer[..3].to_owned()
}

/// Nothing has reached upstream but the request of `warm_footprint`, and these two, which show that others are served.
fn assert_kept_out(up: &Upstream, mux: &Mux, before: Footprint) {
    mux.assert_recovered(before, 4);
    served(mux);
    assert_eq!(up.requests().len(), 3);
}

/// The request line, RFC 9112 sections 2 and 3.
const LINES: [&str; 44] = [
    "\r\n\r\nGET /claude/v1/models HTTP/1.1",
    "GET",
    "GET /claude/v1/models",
    "GET  /claude/v1/models HTTP/1.1",
    "GET /claude/v1/models  HTTP/1.1",
    "GET\t/claude/v1/models\tHTTP/1.1",
    "GET /claude/v1/models HTTP/1.1 ",
    " GET /claude/v1/models HTTP/1.1",
    "GET /claude/v1/models HTTP/1.1\r",
    "GET /claude/v1/models HTTP/1.1\nx-lf: bare",
    "GET /claude/v1/mod els HTTP/1.1",
    "GET /claude/v1/models HTTP/1.2",
    "GET /claude/v1/models HTTP/2.0",
    "GET /claude/v1/models HTTP/0.9",
    "GET /claude/v1/models HTTP/11",
    "GET /claude/v1/models HTTP/1.1.1",
    "GET /claude/v1/models HTTP/01.1",
    "GET /claude/v1/models HTTP/1.",
    "GET /claude/v1/models http/1.1",
    "GET /claude/v1/models HTTPS/1.1",
    "PRI * HTTP/2.0",
    "get /claude/v1/models HTTP/1.1",
    "G(T /claude/v1/models HTTP/1.1",
    "G\0T /claude/v1/models HTTP/1.1",
    "SIXTEEN-CAPITALS /claude/v1/models HTTP/1.1",
    "TRACE /claude/v1/models HTTP/1.1",
    "TRACK /claude/v1/models HTTP/1.1",
    "CONNECT api.example:443 HTTP/1.1",
    "CONNECT /claude/v1/models HTTP/1.1",
    "OPTIONS * HTTP/1.1",
    "GET * HTTP/1.1",
    "GET claude/v1/models HTTP/1.1",
    "GET http://ai-mux/claude/v1/models HTTP/1.1",
    "GET HTTP://ai-mux/claude/v1/models HTTP/1.1",
    "GET //ai-mux@claude/v1/models\u{7f} HTTP/1.1",
    "GET /claude/v1/models#part HTTP/1.1",
    "GET /claude/v1/models\0 HTTP/1.1",
    "GET /claude/v1/mod\u{b}els HTTP/1.1",
    "GET /claude/v1/m\u{f6}dels HTTP/1.1",
    "GET /claude/v1/models?a=<b> HTTP/1.1",
    "GET /claude/v1/models?a=\"b\" HTTP/1.1",
    "\0\0\0\0",
    "\u{16}\u{3}\u{1}\u{2}\0\u{1}\0\u{1}\u{fc}\u{3}\u{3}",
    "SSH-2.0-OpenSSH_9.9",
];

#[test]
fn a_request_line_that_is_not_plain() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("workers", 4).start();
    let before = mux.warm_footprint();
    at_once(LINES, |line| {
        let head = format!("{line}\r\nhost: ai-mux\r\nx-api-key: {TOKEN}\r\n\r\n");
        assert_eq!(refused(&mux, head.as_bytes()), "400", "{line:?}");
    });
    assert_kept_out(&up, &mux, before);
}

/// Whoever writes https for http has no other hint.
#[test]
fn a_tls_handshake_is_told_that_this_is_none() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let hello = b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x03";
    let said = String::from_utf8_lossy(&mux.client().send(hello).rest()).into_owned();
    assert!(said.starts_with("HTTP/1.1 400 "), "{said}");
    assert!(said.contains("https, but this port is http"), "{said}");
}

/// Fields, RFC 9112 sections 3.2 and 5, RFC 9110 section 5. Each goes into a head that is fine without it.
const FIELDS: [&[u8]; 34] = [
    b"host: ai-mux",
    b"Host: other",
    b"no colon",
    b": no name",
    b"x-name : a space before the colon",
    b"x-name\t: a tab before the colon",
    b" x-name: a space before the name",
    b"x name: a space within",
    b"x-name: one\r\n folded",
    b"x-name: one\r\n\tfolded",
    b"x-name:\r\n folded",
    b"x-(name): a delimiter",
    b"x-n\xc3\xa4me: not ASCII",
    b"x-name: not \xc3\xa4SCII",
    b"x-name: obs\xfftext",
    b"x-n\0me: NUL",
    b"x-name: N\0L",
    b"x-name: be\x07l",
    b"x-name: del\x7f",
    b"x-name: bare\nx-lf: here",
    b"x-name: bare\rx-cr: here",
    b"x-name: two\r\r\nx-cr: here",
    b"x-name: lf\n",
    b"\n",
    b"host:",
    b"transfer-encoding: gzip, chunked",
    b"transfer-encoding: chunked, gzip",
    b"transfer-encoding: chunked, chunked",
    b"transfer-encoding: identity",
    b"transfer-encoding: xchunked",
    b"transfer-encoding: \"chunked\"",
    b"transfer-encoding: chunked;q=1",
    b"transfer-encoding:",
    b"transfer-encoding: \x0bchunked",
];

#[test]
fn a_field_that_is_not_plain() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("workers", 4).start();
    let before = mux.warm_footprint();
    at_once(FIELDS, |field| {
        let start = format!("POST {MESSAGES} HTTP/1.1\r\nhost: ai-mux\r\nx-api-key: {TOKEN}\r\n");
        let head = [start.as_bytes(), field, b"\r\n\r\n"].concat();
        let case = String::from_utf8_lossy(field);
        assert_eq!(refused(&mux, &head), "400", "{case:?}");
    });
    assert_kept_out(&up, &mux, before);
}

#[test]
fn a_head_without_host_or_with_one_that_is_none() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("workers", 4).start();
    let before = mux.warm_footprint();
    for host in [
        "",
        "host: a b\r\n",
        "host: a,b\r\n",
        "host: a/b\r\n",
        "host: user@ai-mux\r\n",
        "host: a?b\r\n",
        "host: a\"b\r\n",
        "hos\u{212a}t: ai-mux\r\n",
    ] {
        let head = format!("GET /claude/v1/models HTTP/1.1\r\n{host}x-api-key: {TOKEN}\r\n\r\n");
        assert_eq!(refused(&mux, head.as_bytes()), "400", "{host:?}");
    }
    assert_kept_out(&up, &mux, before);
}

/// Lengths, RFC 9112 section 6, and what they may not stand beside: section 11.2.
const LENGTHS: [&str; 30] = [
    "content-length: -1",
    "content-length: +1",
    "content-length: 1.0",
    "content-length: 0x1",
    "content-length: 1e3",
    "content-length: one",
    "content-length: chunked\r\n\r\n0",
    "transfer-encoding: 1",
    "content-length:",
    "content-length: 1 1",
    "content-length: 1,1",
    "content-length: 1, 2",
    "content-length: \"1\"",
    "content-length: 1;",
    "content-length: \u{661}",
    "content-length: 99999999999999999999999999x",
    "content-length: 1\r\ncontent-length: 1",
    "content-length: 1\r\ncontent-length: 2",
    "content-length: 0\r\ncontent-length: 1",
    "Content-Length: 1\r\ncontent-length: 0",
    "content-length: 1\r\ntransfer-encoding: chunked",
    "transfer-encoding: chunked\r\ncontent-length: 1",
    "content-length: 0\r\ntransfer-encoding: chunked",
    "transfer-encoding: chunked\r\ntransfer-encoding: chunked",
    "transfer-encoding: gzip\r\ntransfer-encoding: chunked",
    "transfer-encoding: chunked\r\ntransfer-encoding: identity",
    "transfer-encoding: chunked\r\ntransfer-encoding:",
    "content-length : 1",
    "content-length\0: 1",
    "content-length: 1\r\n ",
];

#[test]
fn a_length_that_two_could_read_in_two_ways() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("workers", 4).start();
    let before = mux.warm_footprint();
    at_once(LENGTHS, |lengths| {
        let head = format!(
            "POST {MESSAGES} HTTP/1.1\r\nhost: ai-mux\r\nx-api-key: {TOKEN}\r\n{lengths}\r\n\r\n"
        );
        assert_eq!(refused(&mux, head.as_bytes()), "400", "{lengths:?}");
    });
    for head in [
        format!(
            "POST {MESSAGES} HTTP/1.0\r\nx-api-key: {TOKEN}\r\ntransfer-encoding: chunked\r\n\r\n"
        ),
        "HEAD /healthz HTTP/1.1\r\nhost: ai-mux\r\ncontent-length: 5\r\n\r\n".to_owned(),
        "HEAD /healthz HTTP/1.1\r\nhost: ai-mux\r\ntransfer-encoding: chunked\r\n\r\n".to_owned(),
    ] {
        assert_eq!(refused(&mux, head.as_bytes()), "400", "{head:?}");
    }
    assert_kept_out(&up, &mux, before);
}

/// A length that is absurd, but a number: nothing is allocated for it, with or without a token.
#[test]
fn a_length_beyond_all_bounds() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("workers", 4).start();
    let before = mux.warm_footprint();
    for length in [
        "67108865",
        "99999999999999",
        "9223372036854775807",
        "18446744073709551615",
        "18446744073709551616",
        "99999999999999999999999999999999999999999",
    ] {
        for (token, status) in [(TOKEN, 413), ("wrong", 401), ("", 401)] {
            let mut client = mux.client();
            let headers = [("x-api-key", token), ("content-length", length)];
            client.start("POST", MESSAGES, &headers);
            let answer = client.answer();
            assert_eq!(answer.status, status, "{length}");
            answer.error();
            assert!(client.closed(), "{length}");
        }
    }
    mux.assert_recovered(before, 4);
    assert_eq!(up.requests().len(), 2);
}

/// Heads that are large, or never end: refused as soon as they are, and not kept.
#[test]
fn a_head_that_is_too_large() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("workers", 4).start();
    let before = mux.warm_footprint();
    let long = "x".repeat(9 << 10);
    let filled = format!("x-name: {}\r\n", "x".repeat(4000)).repeat(9);
    let cases = [
        format!("GET /{long}"),
        format!("{long} / HTTP/1.1\r\n"),
        format!("GET / HTTP/1.1\r\nx-name: {long}"),
        format!("GET / HTTP/1.1\r\n{long}"),
        format!("GET / HTTP/1.1\r\n{filled}"),
        format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(101)),
        format!("GET / HTTP/1.1\r\n{}", "a: b\r\n".repeat(10_000)),
    ];
    for case in &cases {
        let status = refused(&mux, case.as_bytes());
        assert_eq!(status, "431", "{:?}", &case[..40]);
    }
    // One that goes on for ever, as long as it is let.
    let mut client = mux.client();
    let line = b"x-endless: 0123456789\r\n".repeat(100);
    client.send("GET / HTTP/1.1\r\n");
    let end = Instant::now() + PATIENCE;
    let ended = loop {
        assert!(Instant::now() < end, "an endless head is read for ever");
        if let Err(e) = client.wire.send(&line) {
            break e.kind();
        }
    };
    assert_ne!(ended, std::io::ErrorKind::WouldBlock, "it is held");
    assert_kept_out(&up, &mux, before);
}

/// Chunked bodies, RFC 9112 section 7.
const CHUNKS: [&[u8]; 34] = [
    b"\r\n",
    b"g\r\n",
    b"-1\r\n",
    b"+1\r\nx\r\n0\r\n\r\n",
    b"0x1\r\nx\r\n0\r\n\r\n",
    b" 1\r\nx\r\n0\r\n\r\n",
    b"1 \r\nx\r\n0\r\n\r\n",
    b"1\t\r\nx\r\n0\r\n\r\n",
    b"1 ;ext\r\nx\r\n0\r\n\r\n",
    b"1_0\r\n",
    b"1.0\r\n",
    b";ext\r\n",
    b"\x31\x00\r\n",
    b"1\xff\r\nx\r\n0\r\n\r\n",
    b"1\nx\r\n0\r\n\r\n",
    b"1\rx\r\n0\r\n\r\n",
    b"1\r\r\nx\r\n0\r\n\r\n",
    b"1;a\nb\r\nx\r\n0\r\n\r\n",
    b"1;a\rb\r\nx\r\n0\r\n\r\n",
    b"1;a\0b\r\nx\r\n0\r\n\r\n",
    b"1;\xff\r\nx\r\n0\r\n\r\n",
    b"1\r\nxx\r\n0\r\n\r\n",
    b"1\r\nx0\r\n\r\n",
    b"1\r\nx\n0\r\n\r\n",
    b"1\r\nx\r0\r\n\r\n",
    b"2\r\nx\r\n0\r\n\r\n",
    b"10000000000000000\r\n",
    b"fffffffffffffffff\r\n",
    b"0000000000000000000000000000000000x\r\n",
    b"1\r\nx\r\n0\n\r\n",
    b"1\r\nx\r\n0\r\n\n",
    b"1\r\nx\r\n0\r\nx-trailer: bare\n\r\n",
    b"1\r\nx\r\n0\r\nx-trailer: N\0L\r\n\r\n",
    b"1\r\nx\r\n0\r\nx-trailer: \xff\r\n\r\n",
];

/// Each is refused, and for each the upstream, which has heard nothing, is spared.
#[test]
fn a_chunked_body_that_is_broken() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("workers", 4).start();
    let before = mux.warm_footprint();
    let start = format!(
        "POST {MESSAGES} HTTP/1.1\r\nhost: ai-mux\r\nx-api-key: {TOKEN}\r\ntransfer-encoding: chunked\r\n\r\n"
    );
    let long = [b"1;", b"x".repeat(9 << 10).as_slice(), b"\r\n"].concat();
    let zeros = b"0".repeat(9 << 10);
    let trailers = [b"0\r\n".to_vec(), b"a: b\r\n".repeat(200), b"\r\n".to_vec()].concat();
    let cases = CHUNKS.into_iter().chain([&long[..], &zeros, &trailers]);
    at_once(cases, |chunks| {
        let case = String::from_utf8_lossy(&chunks[..chunks.len().min(60)]);
        let status = refused(&mux, &[start.as_bytes(), chunks].concat());
        assert_eq!(status, "400", "{case:?}");
    });
    // A line without an end is not waited for.
    let mut client = mux.client();
    client.send([start.as_bytes(), &zeros].concat());
    assert_eq!(client.answer().status, 400);
    assert_kept_out(&up, &mux, before);
}

/// The same after more than what is held of a body: the upstream has heard its beginning, and must not
/// take it for the whole.
#[test]
fn a_chunked_body_that_breaks_when_upstream_has_heard_its_beginning() {
    const START: usize = 2 << 20;
    let ends = Steps::default();
    let broken = ends.clone();
    let up = Upstream::at_head(move |req, conn| {
        match conn.wire.body(req.head.framing(http::Framing::Done)) {
            Ok(body) if body.len() < START => conn.respond(200, &[], b"fine"),
            Ok(_) => conn.respond(200, &[], b"whole"),
            Err(_) => {
                broken.advance();
                conn.cut()
            }
        }
    });
    let mux = Setup::new(&up).set("workers", 4).start();
    let before = mux.warm_footprint();
    let cases = ["g\r\n", "1\r\nxx\r\n", "1\nx\r\n", "-1\r\n", "0\n\r\n"];
    for (number, chunks) in cases.into_iter().enumerate() {
        let mut client = mux.client();
        let headers = [BEARER, ("transfer-encoding", "chunked")];
        client.start("POST", MESSAGES, &headers);
        client.chunk(&vec![b'x'; START]).send(chunks);
        let answer = client.answer();
        assert_eq!(answer.status, 400, "{chunks:?}");
        assert!(client.closed());
        ends.wait(number + 1);
    }
    mux.assert_recovered(before, 4);
    served(&mux);
}

/// A body that ends, by half a close, before its length or its last chunk: nobody takes it for whole.
#[test]
fn a_body_that_ends_early() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("workers", 4).start();
    let before = mux.warm_footprint();
    for headers in ["content-length: 10", "transfer-encoding: chunked"] {
        for body in ["", "5\r\n", "5\r\nxyz", "5\r\nhello"] {
            let mut client = mux.client();
            client.send(format!(
                "POST {MESSAGES} HTTP/1.1\r\nhost: ai-mux\r\nx-api-key: {TOKEN}\r\n{headers}\r\n\r\n{body}"
            ));
            client.wire.end_sending();
            let answer = client.answer();
            assert_eq!(answer.status, 400, "{headers} {body:?}");
            answer.error();
            assert!(client.closed(), "{headers} {body:?}");
        }
    }
    mux.assert_recovered(before, 4);
    assert_eq!(up.requests().len(), 2);
}

/// What looks odd but is right is served: the strictness above keeps no real client out.
#[test]
fn odd_but_right_is_served() {
    let up = Upstream::start(|req, conn| conn.respond(200, &[], &req.body));
    let mux = Setup::new(&up).set("workers", 4).start();
    let start = format!("POST {MESSAGES} HTTP/1.1\r\nhost: ai-mux\r\nx-api-key: {TOKEN}\r\n");
    let cases = [
        (format!("\r\n{start}content-length: 2\r\n\r\nok"), "ok"),
        (format!("{start}content-length:2\r\n\r\nok"), "ok"),
        (format!("{start}content-length: \t 2 \t \r\n\r\nok"), "ok"),
        (format!("{start}CONTENT-LENGTH: 0002\r\n\r\nok"), "ok"),
        (
            format!("{start}Transfer-Encoding: Chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
            "ok",
        ),
        (
            format!("{start}transfer-encoding: chunked\r\n\r\n0002;a=\"b\"\r\nok\r\n00\r\n\r\n"),
            "ok",
        ),
        (
            format!(
                "{start}transfer-encoding: chunked\r\n\r\nA\r\n0123456789\r\n0\r\na: b\r\n\r\n"
            ),
            "0123456789",
        ),
        (format!("{start}x-empty:\r\nx-colon: a:b\r\n\r\n"), ""),
        (format!("{start}!#$%&'*+-.^_`|~: name\r\n\r\n"), ""),
        (
            format!(
                "POST {MESSAGES}?a=b%20c&d=[e]|f HTTP/1.1\r\nhost: [::1]:80\r\nx-api-key: {TOKEN}\r\n\r\n"
            ),
            "",
        ),
        (
            format!(
                "POST {MESSAGES} HTTP/1.0\r\nx-api-key: {TOKEN}\r\ncontent-length: 2\r\n\r\nok"
            ),
            "ok",
        ),
        // As container networks and zones have them; and what else a name may be made of.
        (start.replace("ai-mux", "ai_mux:8080") + "\r\n", ""),
        (start.replace("ai-mux", "[fe80::1%25eth0]:80") + "\r\n", ""),
        (start.replace("ai-mux", "~x") + "\r\n", ""),
    ];
    for (request, body) in cases {
        let mut client = mux.client();
        let answer = client.send(&request).answer();
        assert_eq!((answer.status, answer.text()), (200, body), "{request:?}");
        let raw = up.requests().pop().expect("a request").head.raw;
        let raw = String::from_utf8_lossy(&raw).to_ascii_lowercase();
        let framings =
            raw.matches("transfer-encoding:").count() + raw.matches("content-length:").count();
        assert_eq!(framings, 1, "{request:?}: {raw:?}");
    }
}

/// Each says what was wrong and what would be right; and those that end the connection, that they do.
#[test]
fn what_was_wrong_is_said() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let open = Setup::new(&up).set("users", Value::Null).start();
    let long = "x".repeat(9 << 10);
    for (mux, header, status, advice) in [
        (&open, ("origin", "null"), 403, "configure `users`"),
        (
            &mux,
            ("content-length", "67108865"),
            413,
            "over 64 MiB; send less",
        ),
        (
            &mux,
            ("x-long", long.as_str()),
            431,
            "fewer or shorter headers",
        ),
        (&mux, ("content-length", "x"), 400, "one Content-Length"),
        (&mux, ("host", "b"), 400, "not one host name"),
        (&mux, ("upgrade", "websocket"), 426, "use plain HTTP"),
    ] {
        let mut client = mux.client();
        let answer = client.start("POST", MESSAGES, &[BEARER, header]).answer();
        let said = answer.error();
        assert!(answer.status == status && said.contains(advice), "{said}");
        if [400, 413, 431].contains(&status) {
            assert_eq!(answer.header("connection"), Some("close"), "{said}");
            assert!(client.closed(), "{said}");
        }
    }
    for (raw, advice) in [
        ("GET / HTTP/1.1\r\n\r\n", "the Host header is missing"),
        (
            "get / HTTP/1.1\r\nhost: x\r\n\r\n",
            "the method is not valid",
        ),
        (
            "TRACE / HTTP/1.1\r\nhost: x\r\n\r\n",
            "one that can be passed on",
        ),
        (
            "GET http://x/ HTTP/1.1\r\nhost: x\r\n\r\n",
            "must be a path",
        ),
        ("GET /<> HTTP/1.1\r\nhost: x\r\n\r\n", "percent-encoded"),
        ("GET / HTTP/1.1\nhost: x\r\n\r\n", "a bare LF"),
        (
            "HEAD / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\n",
            "must have no body",
        ),
    ] {
        let mut client = mux.client();
        client.send(raw);
        let head = client.head();
        assert_eq!(
            (head.word(1), head.get("connection")),
            ("400", Some("close"))
        );
        let rest = String::from_utf8_lossy(&client.rest()).into_owned();
        assert!(rest.contains(advice), "{raw:?}: {rest}");
    }
}
