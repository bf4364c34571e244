//! Each piece reaches the client before the upstream sends the next one. The proof is lock-step: the upstream
//! sends event n + 1 only after the client has shown event n, so an event that is held back ends the test.

mod common;
use common::*;
use std::io;

const EVENTS: usize = 5;

fn event(n: usize) -> String {
    format!("event: delta\ndata: {{\"n\":{n}}}\n\n")
}

/// Sends each event when the one before was shown to the client, with the framing that the request names.
fn in_lock_step(req: &Request, conn: &mut Conn, shown: &Steps) -> io::Result<()> {
    let size = (1..=EVENTS)
        .map(|n| event(n).len())
        .sum::<usize>()
        .to_string();
    let content_type = req.head.get("x-type").map(|value| ("content-type", value));
    let mut headers: Vec<_> = content_type.into_iter().collect();
    let framing = req.head.get("x-framing").unwrap_or("chunked");
    match framing {
        "sized" => headers.push(("content-length", &size)),
        "chunked" => headers.push(("transfer-encoding", "chunked")),
        _ => headers.push(("connection", "close")),
    }
    conn.head(200, &headers)?;
    for n in 1..=EVENTS {
        match framing {
            "chunked" => conn.chunk(event(n))?,
            _ => conn.wire.send(event(n).as_bytes())?,
        }
        shown.wait(n);
    }
    match framing {
        "sized" => Ok(()),
        "chunked" => conn.finish(),
        _ => conn.cut(),
    }
}

/// Reads the events, each in a piece of its own, telling the upstream of each.
fn follow(client: &mut Client, shown: &Steps, headers: &[(&str, &str)], case: &str) {
    client.request("POST", MESSAGES, &[&[BEARER], headers].concat(), b"{}");
    assert_eq!(client.head().word(1), "200", "{case}");
    for n in 1..=EVENTS {
        assert_eq!(client.text(), event(n), "{case}");
        shown.advance();
    }
    assert_eq!(client.piece().expect("a proper end"), None, "{case}");
}

/// An upstream in lock-step; each request has a counter of its own, in the order of their `x-number`.
fn upstream(count: usize, authority: Option<&Authority>) -> (Upstream, Vec<Steps>) {
    let shown: Vec<_> = (0..count).map(|_| Steps::default()).collect();
    let all = shown.clone();
    let script = move |req: &Request, conn: &mut Conn| {
        let number = req
            .head
            .get("x-number")
            .and_then(|n| n.parse().ok())
            .unwrap_or(0);
        in_lock_step(req, conn, &all[number])
    };
    let up = match authority {
        Some(authority) => Upstream::tls(authority, script),
        None => Upstream::start(script),
    };
    (up, shown)
}

#[test]
fn whatever_the_type_and_the_framing() {
    let types = [
        "none",
        "text/event-stream",
        "text/event-stream; charset=utf-8",
        "application/json",
    ];
    let framings = ["chunked", "sized", "until close"];
    let (up, shown) = upstream(types.len() * framings.len(), None);
    let mux = Mux::start(&up);
    for (i, content_type) in types.iter().enumerate() {
        for (j, framing) in framings.iter().enumerate() {
            let number = i * framings.len() + j;
            let (case, text) = (format!("{content_type}, {framing}"), number.to_string());
            let mut headers = vec![("x-framing", *framing), ("x-number", &text)];
            if *content_type != "none" {
                headers.push(("x-type", content_type));
            }
            follow(&mut mux.client(), &shown[number], &headers, &case);
        }
    }
}

#[test]
fn with_tls_on_either_side() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let (up, shown) = upstream(2, Some(&theirs));
    let setup = Setup::new(&up).tls(&ours);
    let roots = setup.write("roots.pem", &theirs.cert_pem);
    let mux = setup.env("SSL_CERT_FILE", roots).start();
    let mut client = Client::tls(mux.addr, &ours);
    follow(
        &mut client,
        &shown[0],
        &[("x-number", "0")],
        "without a type",
    );
    let headers = [("x-number", "1"), ("x-type", "text/event-stream")];
    follow(&mut client, &shown[1], &headers, "with a type");
}

#[test]
fn the_head_does_not_wait_for_the_first_event() {
    let held = Steps::default();
    let go = held.clone();
    let up = Upstream::start(move |_, conn| {
        conn.stream(&[])?;
        go.wait(1);
        conn.chunk("late")?;
        conn.finish()
    });
    let mux = Mux::start(&up);
    let mut client = mux.client();
    client.request("POST", MESSAGES, &[BEARER], b"{}");
    assert_eq!(client.head().word(1), "200");
    held.advance();
    assert_eq!(client.text(), "late");
}

#[test]
fn to_an_http_1_0_client_without_chunks() {
    let (up, shown) = upstream(1, None);
    let mux = Mux::start(&up);
    let mut client = mux.client();
    client.send(format!(
        "GET {MESSAGES} HTTP/1.0\r\nhost: x\r\nx-api-key: {TOKEN}\r\n\r\n"
    ));
    let head = client.head();
    assert_eq!((head.word(1), head.get("transfer-encoding")), ("200", None));
    for n in 1..=EVENTS {
        assert_eq!(client.text(), event(n));
        shown[0].advance();
    }
    assert!(client.closed());
}

/// All 64 stand at the same event before any of them goes on.
#[test]
fn sixty_four_at_once() {
    let (up, shown) = upstream(64, None);
    let mux = Mux::start(&up);
    let mut clients: Vec<_> = (0..64).map(|_| mux.client()).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        let number = number.to_string();
        client.request("POST", MESSAGES, &[BEARER, ("x-number", &number)], b"{}");
    }
    for client in &mut clients {
        assert_eq!(client.head().word(1), "200");
    }
    for n in 1..=EVENTS {
        for client in &mut clients {
            assert_eq!(client.text(), event(n));
        }
        shown.iter().for_each(Steps::advance);
    }
    for client in &mut clients {
        assert_eq!(client.piece().expect("a proper end"), None);
    }
}

/// `request_timeout` ends with the head; silence shorter than `stream_idle_timeout` cuts nothing.
#[test]
fn longer_than_the_request_timeout() {
    let (up, shown) = upstream(1, None);
    // Nor do all its silences together, which last longer.
    let setup = Setup::new(&up).set("stream_idle_timeout", "4s");
    let mux = setup.set("request_timeout", "2s").start();
    let mut client = mux.client();
    client.request("POST", MESSAGES, &[BEARER], b"{}");
    client.head();
    for n in 1..=EVENTS {
        assert_eq!(client.text(), event(n));
        std::thread::sleep(std::time::Duration::from_millis(900));
        shown[0].advance();
    }
    assert_eq!(client.piece().expect("a proper end"), None);
}

/// Not also one to set a time-out: with 256 streams that is seen.
#[test]
fn an_event_costs_two_system_calls_on_sockets() {
    const MANY: usize = 50;
    let shown = Steps::default();
    let steps = shown.clone();
    let up = Upstream::start(move |_, conn| {
        conn.stream(&[])?;
        for n in 1..=MANY {
            conn.chunk(event(n))?;
            steps.wait(n);
        }
        conn.finish()
    });
    let setup = Setup::new(&up);
    let calls = setup.folder.0.join("calls");
    let options = format!("-o {} -e trace=setsockopt,recvfrom,sendto", calls.display());
    let Some(script) = setup::under_strace(&options) else {
        return say("SKIPPED: no strace");
    };
    let mut mux = setup.shell(&script).start();
    let mut client = mux.client();
    client.request("POST", MESSAGES, &[BEARER], b"{}").head();
    for n in 1..=MANY {
        assert_eq!(client.text(), event(n));
        shown.advance();
    }
    assert_eq!(client.piece().expect("a proper end"), None);
    assert_eq!(mux.stop(), 0);
    let calls = std::fs::read_to_string(calls).expect("what strace wrote");
    let count = |name: &str| calls.lines().filter(|line| line.contains(name)).count();
    for call in ["sendto(", "recvfrom("] {
        assert!((MANY..2 * MANY).contains(&count(call)), "{call}: {calls}");
    }
    assert!(count("setsockopt(") < MANY / 2, "{calls}");
    // Or a small event could wait for the other side's word on the one before.
    assert_eq!(count("TCP_NODELAY, [1]"), 2, "{calls}");
}
