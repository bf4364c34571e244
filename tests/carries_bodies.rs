//! Bodies arrive as they were sent, in both directions, however they are framed, up to the limit.

mod common;
use common::*;
use std::thread;
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;

/// Bytes that differ by their place, so that nothing can be lost, doubled or moved unseen.
fn pattern(size: usize) -> Vec<u8> {
    (0..size)
        .map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8)
        .collect()
}

fn sizes() -> [usize; 10] {
    [
        0,
        1,
        100,
        8191,
        65_536,
        200_000,
        MIB - 1,
        MIB,
        MIB + 1,
        3 * MIB,
    ]
}

#[test]
fn up_with_a_length() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let mut client = mux.client();
    for size in sizes() {
        let answer = client
            .request("POST", MESSAGES, &[BEARER], &pattern(size))
            .answer();
        assert_eq!(answer.text(), "fine", "{size}");
        let request = up.requests().pop().expect("a request");
        assert!(request.whole && request.body == pattern(size), "{size}");
        assert_eq!(
            request.head.get("content-length"),
            Some(size.to_string().as_str())
        );
    }
}

#[test]
fn up_in_chunks() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let mut client = mux.client();
    for (size, piece) in sizes()
        .into_iter()
        .flat_map(|size| [(size, 1000), (size, 70_000)])
    {
        client.start(
            "POST",
            MESSAGES,
            &[BEARER, ("transfer-encoding", "chunked")],
        );
        let body = pattern(size);
        body.chunks(piece).for_each(|piece| {
            client.chunk(piece);
        });
        assert_eq!(client.finish().answer().text(), "fine", "{size}");
        let request = up.requests().pop().expect("a request");
        assert!(
            request.whole && request.body == body,
            "{size} in chunks of {piece}"
        );
    }
}

#[test]
fn chunk_extensions_and_trailers_are_no_part_of_a_body() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let mut client = mux.client();
    client.start(
        "POST",
        MESSAGES,
        &[BEARER, ("transfer-encoding", "chunked")],
    );
    client.send("3;a=b\r\nabc\r\n02\r\nde\r\n0;x\r\nx-sum: 1\r\n\r\n");
    assert_eq!(client.answer().status, 200);
    let request = up.requests().pop().expect("a request");
    assert_eq!(
        (request.body.as_slice(), request.head.get("x-sum")),
        (&b"abcde"[..], None)
    );
    assert_eq!(
        client
            .request("POST", MESSAGES, &[BEARER], b"{}")
            .answer()
            .status,
        200
    );
}

/// More than what is held for a replay goes on while the client still sends.
#[test]
fn a_large_body_streams_up_and_is_not_kept() {
    let arrived = Steps::default();
    let told = arrived.clone();
    let up = Upstream::at_head(move |req, conn| {
        let mut framing = req.head.framing(http::Framing::Done);
        let mut size = 0;
        while let Some(piece) = conn.wire.piece(&mut framing)? {
            let before = size / (4 * MIB);
            size += piece.len();
            (before..size / (4 * MIB)).for_each(|_| told.advance());
        }
        conn.respond(200, &[], size.to_string().as_bytes())
    });
    let mux = Mux::start(&up);
    let piece = pattern(5 * MIB);
    let mut client = mux.client();
    let size = (60 * MIB).to_string();
    for (seen, framing) in [
        (0, ("content-length", size.as_str())),
        (15, ("transfer-encoding", "chunked")),
    ] {
        client.start("POST", MESSAGES, &[BEARER, framing]);
        for n in 1..=12 {
            match framing.1 {
                "chunked" => client.chunk(&piece),
                _ => client.send(&piece),
            };
            arrived.wait(seen + n);
        }
        if framing.1 == "chunked" {
            client.finish();
        }
        assert_eq!(client.answer().text(), size);
    }
    let peak = mux.peak_memory();
    assert!(
        peak < 40 * MIB,
        "{} MiB to carry two bodies of 60 MiB",
        peak / MIB
    );
}

#[test]
fn sixty_four_mebibytes_are_taken_and_one_byte_more_is_not() {
    let up = Upstream::at_head(|req, conn| {
        let size = conn.wire.body(req.head.framing(http::Framing::Done))?.len();
        conn.respond(200, &[], size.to_string().as_bytes())
    });
    let mux = Mux::start(&up);
    let limit = pattern(64 * MIB);
    let answer = mux.ask("POST", MESSAGES, &[], &limit);
    assert_eq!(answer.text(), limit.len().to_string());
    assert_eq!(up.requests().len(), 1);

    let over = (limit.len() + 1).to_string();
    let mut client = mux.client();
    let headers = [
        BEARER,
        ("content-length", &over),
        ("expect", "100-continue"),
    ];
    let answer = client.start("POST", MESSAGES, &headers).answer();
    assert_eq!(answer.status, 413, "before any of the body");
    assert_eq!(answer.header("x-should-retry"), Some("false"));
    answer.error();
    assert!(client.closed());
    assert_eq!(up.requests().len(), 1);
}

/// The upstream must not take what it got so far for a whole body.
#[test]
fn a_chunked_body_that_grows_over_the_limit_drops_the_upstream() {
    let broke = Steps::default();
    let told = broke.clone();
    let up = Upstream::at_head(move |req, conn| {
        let body = conn.wire.body(req.head.framing(http::Framing::Done));
        if body.is_err() {
            told.advance();
        }
        conn.respond(200, &[], b"whole")
    });
    let mux = Mux::start(&up);
    let mut client = mux.client();
    client.start(
        "POST",
        MESSAGES,
        &[BEARER, ("transfer-encoding", "chunked")],
    );
    let piece = pattern(MIB);
    (0..64).for_each(|_| {
        client.chunk(&piece);
    });
    let answer = client.chunk(b"x").answer();
    assert_eq!(answer.status, 413);
    answer.error();
    broke.wait(1);
}

#[test]
fn a_client_that_expects_100_gets_it_before_its_body() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let mut client = mux.client();
    for framing in [("content-length", "5"), ("transfer-encoding", "chunked")] {
        client.start(
            "POST",
            MESSAGES,
            &[BEARER, framing, ("expect", "100-Continue")],
        );
        assert_eq!(client.head().word(1), "100", "{framing:?}");
        match framing.0 {
            "content-length" => client.send(b"abcde"),
            _ => client.chunk(b"abcde").finish(),
        };
        assert_eq!(client.answer().status, 200);
        let request = up.requests().pop().expect("a request");
        assert_eq!(
            (request.body.as_slice(), request.head.get("expect")),
            (&b"abcde"[..], None)
        );
    }
    // So does one whose body is too large to be held.
    let length = ("content-length", "3000000");
    let headers = [BEARER, length, ("expect", "100-continue")];
    client.start("POST", MESSAGES, &headers);
    assert_eq!(client.head().word(1), "100");
    let large = pattern(3_000_000);
    assert_eq!(client.send(&large).answer().status, 200);
    let request = up.requests().pop().expect("a request");
    assert!(request.whole && request.body == large);
    // There is none to wait for.
    let headers = [BEARER, ("content-length", "0"), ("expect", "100-continue")];
    client.start("POST", MESSAGES, &headers);
    assert_eq!(client.head().word(1), "200");
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let up = Upstream::start(|req, conn| conn.respond(200, &[], &req.body));
    let mux = Mux::start(&up);
    let mut client = mux.client();
    let one = |body: &str| {
        let size = body.len();
        format!(
            "POST {MESSAGES} HTTP/1.1\r\nhost: x\r\nx-api-key: {TOKEN}\r\ncontent-length: {size}\r\n\r\n{body}"
        )
    };
    client.send(one("first") + &one("second") + &one(""));
    assert_eq!(client.answer().text(), "first");
    assert_eq!(client.answer().text(), "second");
    assert_eq!(client.answer().text(), "");
    assert_eq!(
        client
            .request("POST", MESSAGES, &[BEARER], b"third")
            .answer()
            .text(),
        "third"
    );
    // Each is begun when the one before has ended, not when its time for a head is over.
    client.send(one("again").repeat(8));
    let end = Instant::now() + PATIENCE;
    for _ in 0..8 {
        assert_eq!(client.answer().text(), "again");
        assert!(Instant::now() < end, "they are waited for");
    }
}

/// What came behind a reply that was cut could be taken for the rest of it.
#[test]
fn a_reply_that_does_not_fit_is_the_last() {
    let mux = Mux::start(&Upstream::plain());
    let mut client = mux.client();
    let asks = format!("GET /none HTTP/1.1\r\nhost: x\r\nx-api-key: {TOKEN}\r\n\r\n").repeat(1000);
    // More than two sockets can hold the replies to; none of them is read until the client is let go.
    let sent = (0..250).take_while(|_| client.wire.send(asks.as_bytes()).is_ok());
    assert!(sent.count() < 250, "all of it is taken");
    let all = client.rest();
    let second = all.windows(9).skip(1).position(|part| part == b"HTTP/1.1 ");
    let size = second.expect("two replies") + 1;
    // Each begins where a whole one would end, so only the last can have been cut.
    let begins = |reply: &[u8]| reply.starts_with(b"HTTP/1.1 ") || reply.len() < 9;
    assert!(all.chunks(size).all(begins));
}

#[test]
fn an_http_1_0_client_is_answered_and_let_go() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    // It does not know 100 Continue, and would take it for its answer.
    for expect in ["", "expect: 100-continue\r\n"] {
        let mut client = mux.client();
        client.send(format!(
            "POST {MESSAGES} HTTP/1.0\r\nx-api-key: {TOKEN}\r\n{expect}content-length: 2\r\n\r\n{{}}"
        ));
        let answer = client.answer();
        assert_eq!((answer.status, answer.text()), (200, "fine"));
        assert!(client.closed());
    }
}

/// Once the answer has begun it is of no more use, however long that takes.
#[test]
fn a_held_body_is_given_back_while_its_answer_runs() {
    let (up, go) = two_events();
    let mux = Mux::start(&up);
    let before = mux.warm_footprint();
    let body = vec![b'x'; MIB];
    let mut clients: Vec<_> = (0..32).map(|_| mux.client()).collect();
    for client in &mut clients {
        client.request("POST", MESSAGES, &[BEARER, ("x-held", "1")], &body);
        client.head();
        assert_eq!(client.text(), "one");
    }
    let running = mux.footprint();
    assert!(
        running.resident < before.resident + (16 << 10),
        "{before:?} {running:?}"
    );
    go.advance();
}

#[test]
fn down_however_it_is_framed() {
    let up = Upstream::start(|req, conn| {
        let size = req
            .head
            .get("x-size")
            .and_then(|n| n.parse().ok())
            .unwrap_or(0);
        let body = pattern(size);
        match req.head.get("x-framing") {
            Some("sized") => conn.respond(200, &[("content-encoding", "gzip")], &body),
            Some("chunked") => {
                conn.stream(&[("content-encoding", "zstd")])?;
                body.chunks(50_000)
                    .try_for_each(|piece| conn.chunk(piece))?;
                conn.finish()
            }
            _ => {
                conn.head(200, &[("connection", "close")])?;
                conn.wire.send(&body)?;
                conn.cut()
            }
        }
    });
    let mux = Mux::start(&up);
    let mut client = mux.client();
    let mut asked = 0;
    for framing in ["sized", "chunked", "until close"] {
        for size in sizes() {
            let text = size.to_string();
            let headers = [BEARER, ("x-framing", framing), ("x-size", &text)];
            let answer = client.request("GET", MESSAGES, &headers, b"").answer();
            assert!(answer.body == pattern(size), "{size}, {framing}");
            if framing == "sized" {
                assert_eq!(answer.header("content-length"), Some(text.as_str()));
            }
            asked += 1;
            mux.wait_log_times("status=200", asked);
            let line = mux.log_lines("status=200").pop().expect("a line");
            assert!(line.contains(&format!(" bytes={size} ")), "{line}");
        }
    }
}

/// Its end may be seen without the client having gone: it hears what is wrong.
#[test]
fn a_body_that_ends_too_early_is_malformed() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let sized = [BEARER, ("content-length", "5")];
    let chunked = [BEARER, ("transfer-encoding", "chunked")];
    for (headers, part) in [
        (sized, "abc"),
        (chunked, "5\r\nabc"),
        (chunked, "3\r\nabc\r\n"),
    ] {
        let mut client = mux.client();
        client.start("POST", MESSAGES, &headers).send(part);
        client.wire.end_sending();
        let answer = client.answer();
        assert_eq!(answer.status, 400, "{part}");
        assert!(!answer.error().contains("rustls"), "{}", answer.text());
    }
    assert_eq!(up.requests().len(), 0);
}

/// The time for an answer begins when the whole request is there.
#[test]
fn an_upload_may_take_longer_than_the_request_timeout() {
    let up = Upstream::at_head(|req, conn| {
        let body = conn.wire.body(req.head.framing(http::Framing::Done))?;
        conn.respond(200, &[], body.len().to_string().as_bytes())
    });
    let mux = Setup::new(&up).set("request_timeout", "4s").start();
    let mut client = mux.client();
    let length = ("content-length", "2500000");
    client.start("POST", MESSAGES, &[BEARER, length]);
    for _ in 0..5 {
        client.send(vec![b'x'; 500_000]);
        thread::sleep(Duration::from_secs(1));
    }
    assert_eq!(client.answer().text(), "2500000");
}

/// The same where it is upstream that takes it slowly, also for the part that is held in memory.
#[test]
fn a_slow_way_to_upstream_does_not_cut_it() {
    let options = "-o /dev/null -e trace=sendto -e inject=sendto:delay_enter=15000";
    let Some(script) = setup::under_strace(options) else {
        return say("SKIPPED: needs strace");
    };
    let up =
        Upstream::start(|req, conn| conn.respond(200, &[], req.body.len().to_string().as_bytes()));
    let setup = Setup::new(&up).set("request_timeout", "1s");
    let mux = setup.shell(&script).start();
    let mut client = mux.client();
    let framing = ("transfer-encoding", "chunked");
    client.start("POST", MESSAGES, &[BEARER, framing]);
    client.chunk(&[b'x'; 3 * MIB / 2]).finish();
    assert_eq!(client.answer().text(), (3 * MIB / 2).to_string());
}
