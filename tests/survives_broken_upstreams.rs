//! However an upstream misbehaves, under load too: the client sees that it failed, the next one is served,
//! and nothing of an answer ends up in another.

mod common;
use common::*;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;
use std::time::Instant;

/// Sends `piece` until the other side has had enough; true if it has.
fn flood(conn: &mut Conn, piece: &[u8]) -> bool {
    // By time: what may be silent for two seconds takes many megabytes in them.
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        if conn.wire.send(piece).is_err() {
            return true;
        }
    }
    false
}

const HEAD: &[u8] = b"HTTP/1.1 200 OK\r\n";

/// Misbehaves in the way that `x-way` names.
fn misbehave(req: &Request, conn: &mut Conn) -> io::Result<()> {
    let long = "x".repeat(20 << 10);
    let raw = match req.head.get("x-way").unwrap_or_default() {
        "" => return conn.respond(200, &[], b"fine"),
        "an endless line" => {
            conn.wire.send(b"HTTP/1.1 200 OK\r\nx-endless: ")?;
            assert!(flood(conn, &[b'x'; 4096]), "it is read for ever");
            return conn.cut();
        }
        "endless headers" => {
            conn.wire.send(HEAD)?;
            assert!(flood(conn, &b"x-name: value\r\n".repeat(100)), "read for ever");
            return conn.cut();
        }
        "a flood of 1xx" => {
            let early = b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n".repeat(100);
            assert!(flood(conn, &early), "it is read for ever");
            return conn.cut();
        }
        "endless trailers" => {
            conn.stream(&[])?;
            conn.wire.send(b"0\r\n")?;
            assert!(flood(conn, &b"x-name: value\r\n".repeat(100)), "read for ever");
            return conn.cut();
        }
        "an endless size of a chunk" => {
            conn.stream(&[])?;
            assert!(flood(conn, &[b'0'; 4096]), "it is read for ever");
            return conn.cut();
        }
        "an endless chunk extension" => {
            conn.stream(&[])?;
            conn.wire.send(b"1;")?;
            assert!(flood(conn, &[b'x'; 4096]), "it is read for ever");
            return conn.cut();
        }
        "a reset" => {
            // What is asked is larger than what one read takes: closing with input unread sends a reset.
            conn.wire.socket().peek(&mut [0])?;
            return conn.cut();
        }
        "nothing" => "".to_owned(),
        "a line too long" => format!("HTTP/1.1 200 OK\r\nx: {long}\r\n\r\n"),
        "a head too long" => format!(
            "HTTP/1.1 200 OK\r\n{}\r\n",
            format!("x: {}\r\n", &long[..1000]).repeat(20)
        ),
        "too many headers" => format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(500)),
        "no version" => "200 OK\r\n\r\n".to_owned(),
        "HTTP/2" => "HTTP/2.0 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned(),
        "HTTP/0.9" => "<html>ok</html>".to_owned(),
        "no status" => "HTTP/1.1 OK\r\ncontent-length: 2\r\n\r\nok".to_owned(),
        "a status of words" => "HTTP/1.1 abc OK\r\ncontent-length: 2\r\n\r\nok".to_owned(),
        "a status of two digits" => "HTTP/1.1 20 OK\r\ncontent-length: 2\r\n\r\nok".to_owned(),
        "a negative length" => "HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\nok".to_owned(),
        "a length of words" => "HTTP/1.1 200 OK\r\ncontent-length: two\r\n\r\nok".to_owned(),
        "two lengths" => {
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok".to_owned()
        }
        "a length beyond all bounds" => {
            "HTTP/1.1 200 OK\r\ncontent-length: 18446744073709551615\r\n\r\nok".to_owned()
        }
        "a chunk beyond all bounds" => {
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffff\r\nok".to_owned()
        }
        "a chunk of more than 64 bits" => {
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n10000000000000002\r\nok\r\n0\r\n\r\n"
                .to_owned()
        }
        "a chunk longer than its size" => {
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nok\r\n0\r\n\r\n".to_owned()
        }
        "a NUL within a header" => "HTTP/1.1 200 OK\r\nx: a\0b\r\n\r\n".to_owned(),
        way => panic!("there is no way {way:?}"),
    };
    conn.wire.send(raw.as_bytes())?;
    conn.cut()
}

const NO_ANSWER: [&str; 16] = [
    "an endless line",
    "endless headers",
    "a reset",
    "nothing",
    "a line too long",
    "a head too long",
    "too many headers",
    "no version",
    "HTTP/2",
    "HTTP/0.9",
    "no status",
    "a status of words",
    "a status of two digits",
    "a negative length",
    "a length of words",
    "a NUL within a header",
];

const FLOOD: [&str; 1] = ["a flood of 1xx"];

const BROKEN: [&str; 8] = [
    "a chunk longer than its size",
    "two lengths",
    "endless trailers",
    "an endless size of a chunk",
    "an endless chunk extension",
    "a length beyond all bounds",
    "a chunk beyond all bounds",
    "a chunk of more than 64 bits",
];

fn start(up: &Upstream) -> Mux {
    let setup = Setup::new(up).set("workers", 16);
    setup.set("stream_idle_timeout", "2s").start()
}

/// More than is read in one go, so that a reset comes where it should.
fn body() -> Vec<u8> {
    vec![b'x'; 300_000]
}

#[test]
fn an_answer_that_is_none_is_502_or_504() {
    let up = Upstream::at_head(|req, conn| match req.head.get("x-way") {
        Some("a reset") => misbehave(req, conn),
        _ => {
            conn.wire.body(req.head.framing(http::Framing::Done))?;
            misbehave(req, conn)
        }
    });
    // A flood ends when the time for an answer is over, which is that for a free worker, too: the
    // crowd, who share theirs, have more of it.
    let (crowd, floods) = ((&NO_ANSWER[..], "60s", 502), (&FLOOD[..], "2s", 504));
    at_once([crowd, floods], |(ways, time, status)| {
        let setup = Setup::new(&up).set("workers", 16);
        let mux = setup.set("request_timeout", time).start();
        let before = mux.warm_footprint();
        at_once(ways.iter().flat_map(|way| [way; 8]), |way| {
            let answer = mux.ask("POST", MESSAGES, &[("x-way", way)], &body());
            assert_eq!(answer.status, status, "{way}");
            assert_eq!(answer.header("x-should-retry"), None, "{way}");
            answer.error();
        });
        mux.assert_recovered(before, 16);
    });
    let tries = (NO_ANSWER.len() + FLOOD.len()) * 8;
    assert_eq!(up.requests().len(), 2 * 2 + tries, "one try each");
}

#[test]
fn an_answer_that_breaks_is_never_shown_as_whole() {
    let up = Upstream::start(misbehave);
    let mux = start(&up);
    let before = mux.warm_footprint();
    let cases = BROKEN.into_iter().flat_map(|way| [way; 8]);
    at_once(cases, |way| {
        let mut client = mux.client();
        client.request("POST", MESSAGES, &[BEARER, ("x-way", way)], b"{}");
        let head = client.head();
        if head.word(1) == "200" {
            let end = client.body().expect_err(way);
            assert_ne!(
                end.kind(),
                io::ErrorKind::WouldBlock,
                "{way}: it stays open"
            );
        } else {
            assert_eq!(head.word(1), "502", "{way}");
        }
    });
    mux.assert_recovered(before, 16);
}

/// What an upstream sends beyond its answer is never taken for the answer to the next request.
#[test]
fn what_comes_after_an_answer_is_no_answer_to_the_next() {
    let up = Upstream::start(|req, conn| {
        let more = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nstale";
        let answer = match req.head.get("x-way").unwrap_or_default() {
            "" => return conn.respond(200, &[], b"fine"),
            "sized" => format!("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok{more}"),
            "chunked" => {
                format!(
                    "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n{more}"
                )
            }
            "no content" => format!("HTTP/1.1 204 No Content\r\n\r\n{more}"),
            "not modified" => {
                format!("HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n{more}")
            }
            "head" => format!("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n{more}"),
            way => panic!("there is no way {way:?}"),
        };
        conn.wire.send(answer.as_bytes())
    });
    let mux = start(&up);
    for way in ["sized", "chunked", "no content", "not modified", "head"] {
        for _ in 0..5 {
            let method = if way == "head" { "HEAD" } else { "POST" };
            let mut client = mux.client();
            client.request(method, MESSAGES, &[BEARER, ("x-way", way)], b"");
            let answer = client.answer();
            let body = match way {
                "sized" | "chunked" => "ok",
                _ => "",
            };
            assert_eq!(answer.text(), body, "{way}");
            assert_eq!(mux.message().text(), "fine", "after {way}");
        }
    }
}

/// Every worker at once waits for an upstream that says nothing; then all are free again.
#[test]
fn silence_holds_no_worker_for_ever() {
    let end = Steps::default();
    let held = end.clone();
    let up = Upstream::start(move |req, conn| {
        match req.head.get("x-way") {
            None => return conn.respond(200, &[], b"fine"),
            Some("head") => {}
            Some(_) => {
                conn.stream(&[])?;
                conn.chunk("one")?;
            }
        }
        held.wait(1);
        conn.cut()
    });
    let setup = Setup::new(&up).set("workers", 16);
    let setup = setup.set("request_timeout", "2s");
    let mux = setup.set("stream_idle_timeout", "2s").start();
    let before = mux.warm_footprint();
    for way in ["head", "body"] {
        at_once(0..16, |_| {
            let mut client = mux.client();
            client.request("POST", MESSAGES, &[BEARER, ("x-way", way)], b"{}");
            if way == "head" {
                assert_eq!(client.answer().status, 504);
            } else {
                client.head();
                assert_eq!(client.text(), "one");
                client.piece().expect_err("an end that is no end");
            }
        });
    }
    mux.assert_recovered(before, 16);
    end.advance();
}

#[test]
fn an_upstream_that_refuses_leaves_the_other_provider_alone() {
    let (up, gone) = (Upstream::plain(), Upstream::plain());
    let setup = Setup::new(&up).set("workers", 16);
    let mux = setup.provider(1, "base_url", gone.url()).start();
    let before = mux.warm_footprint();
    drop(gone);
    at_once(0..128, |number| {
        if number % 2 == 0 {
            let answer = mux.ask("POST", RESPONSES, &[], b"{}");
            assert_eq!(answer.status, 502);
            answer.error();
        } else {
            assert_eq!(mux.message().text(), "fine");
        }
    });
    mux.assert_recovered(before, 16);
}

/// Idle connections that upstream has closed, after a load, are noticed before one is used.
#[test]
fn an_upstream_that_closes_its_idle_connections() {
    let up = Upstream::plain();
    let mux = start(&up);
    let before = mux.warm_footprint();
    for _ in 0..10 {
        at_once(0..16, |_| assert_eq!(mux.message().text(), "fine"));
        up.close_connections();
        assert_eq!(mux.message().text(), "fine");
    }
    mux.assert_recovered(before, 16);
}

#[test]
fn certificates_that_do_not_verify() {
    let theirs = Authority::new();
    let up = Upstream::tls(&theirs, |_, conn| conn.respond(200, &[], b"fine"));
    let setup = Setup::new(&up).set("workers", 16);
    let others = setup.write("others.pem", Authority::new().cert_pem);
    let mux = setup.env("SSL_CERT_FILE", others).start();
    let health = || mux.client().request("GET", "/healthz", &[], b"").answer();
    assert_eq!(health().status, 200);
    let before = mux.footprint();
    at_once(0..64, |_| {
        let answer = mux.message();
        assert_eq!(answer.status, 502);
        answer.error();
    });
    assert_eq!(up.requests().len(), 0, "no token went there");
    assert_eq!(health().status, 200);
    mux.assert_settled(before, 16);
}

/// TLS records of no answer, here a change of keys, may come behind an answer in the same piece: the connection
/// is not used again with a part of them lost.
#[test]
fn a_change_of_keys_behind_an_answer_costs_no_request() {
    let authority = Authority::new();
    for size in [100, 4030, 4031, 4032, 4033, 4034, 4035, 4036] {
        let keys = |tls: &mut rustls::ServerConnection| tls.refresh_traffic_keys().is_ok();
        let addr = says_behind(&authority, size, keys);
        let (_up, mux) = in_front_of(&authority, addr);
        for _ in 0..3 {
            assert_eq!(mux.message().body.len(), size);
        }
    }
}

/// An upstream may end TLS in the same piece, and leave its socket open: that connection is not used again.
#[test]
fn an_end_of_tls_behind_an_answer_costs_no_request() {
    let authority = Authority::new();
    let addr = says_behind(&authority, 100, |tls| {
        tls.send_close_notify();
        true
    });
    let (_up, mux) = in_front_of(&authority, addr);
    for _ in 0..3 {
        assert_eq!(mux.message().status, 200);
    }
}

/// Over TLS as well: bytes of a record that is never whole are no answer.
#[test]
fn a_record_that_drips_is_silence() {
    let authority = Authority::new();
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let addr = listener.local_addr().expect("an address");
    let server = authority.clone();
    thread::spawn(move || -> io::Result<()> {
        let (mut socket, _) = listener.accept()?;
        let mut tls = server.server();
        let mut asked = [0; 4096];
        while !asked.windows(2).any(|two| two == b"{}") {
            let _ = rustls::Stream::new(&mut tls, &mut socket).read(&mut asked)?;
        }
        let head = b"HTTP/1.1 200 OK\r\ncontent-length: 400\r\n\r\n";
        rustls::Stream::new(&mut tls, &mut socket).write_all(head)?;
        tls.writer().write_all(&[b'x'; 400])?;
        let mut record = Vec::new();
        tls.write_tls(&mut record)?;
        for byte in &record[..100] {
            thread::sleep(Duration::from_millis(100));
            socket.write_all(&[*byte])?;
        }
        Ok(())
    });
    let up = Upstream::plain();
    let setup = Setup::new(&up);
    let roots = setup.write("roots.pem", &authority.cert_pem);
    let setup = setup.provider(0, "base_url", format!("https://{addr}"));
    let setup = setup.set("stream_idle_timeout", "1s");
    let mux = setup.env("SSL_CERT_FILE", roots).start();
    let mut client = mux.client();
    client.request("POST", MESSAGES, &[BEARER], b"{}");
    assert_eq!(client.head().word(1), "200");
    client.body().expect_err("a body that is cut");
    mux.wait_log("silent for stream_idle_timeout");
}

/// One that takes its logins from a vendor, and Claude's answers from what listens there.
fn in_front_of(authority: &Authority, addr: SocketAddr) -> (Upstream, Mux) {
    let up = Upstream::plain();
    let setup = Setup::new(&up);
    let roots = setup.write("roots.pem", &authority.cert_pem);
    let setup = setup.provider(0, "base_url", format!("https://{addr}"));
    let mux = setup.env("SSL_CERT_FILE", roots).start();
    (up, mux)
}

/// Answers each request on its connection with that many bytes, and what TLS is to say behind them.
fn says_behind(
    authority: &Authority,
    size: usize,
    say: impl Fn(&mut rustls::ServerConnection) -> bool + Clone + Send + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let addr = listener.local_addr().expect("an address");
    let authority = authority.clone();
    thread::spawn(move || {
        for mut socket in listener.incoming().map_while(Result::ok) {
            let (mut tls, say) = (authority.server(), say.clone());
            thread::spawn(move || -> io::Result<()> {
                loop {
                    let mut asked = [0; 4096];
                    let count = rustls::Stream::new(&mut tls, &mut socket).read(&mut asked)?;
                    if count == 0 {
                        return Ok(());
                    }
                    if !asked[..count].ends_with(b"{}") {
                        continue;
                    }
                    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {size}\r\n\r\n");
                    let answer = answer + &"x".repeat(size);
                    tls.writer().write_all(answer.as_bytes())?;
                    assert!(say(&mut tls));
                    let mut piece = Vec::new();
                    while tls.wants_write() {
                        tls.write_tls(&mut piece)?;
                    }
                    socket.write_all(&piece)?;
                }
            });
        }
    });
    addr
}

#[test]
fn one_that_does_not_take_the_body_is_504() {
    let end = Steps::default();
    let held = end.clone();
    let up = Upstream::at_head(move |_, conn| {
        held.wait(1);
        conn.cut()
    });
    let mux = Setup::new(&up).set("request_timeout", "1s").start();
    assert_eq!(upload(&mux).head().word(1), "504");
    end.advance();
}

/// Over TLS, too, where a write that came to its time-out says nothing of it.
#[test]
fn one_that_does_not_take_the_body_is_504_over_tls() {
    let authority = Authority::new();
    let end = Steps::default();
    let held = end.clone();
    let up = Upstream::tls_at_head(&authority, move |_, conn| {
        held.wait(1);
        conn.cut()
    });
    let setup = Setup::new(&up).set("request_timeout", "2s");
    let roots = setup.write("roots.pem", &authority.cert_pem);
    let mux = setup.env("SSL_CERT_FILE", roots).start();
    let mut client = upload(&mux);
    let (told, answer) = mpsc::channel();
    thread::spawn(move || told.send(client.head()));
    // Three times `request_timeout`; the kernel gives a write that it took in part up to twice that.
    for _ in 0..3 {
        assert_eq!(mux.message().status, 504);
    }
    let head = answer.try_recv().expect("an answer before theirs");
    assert_eq!(head.word(1), "504");
    end.advance();
}

/// A client that sends a body which no buffer holds.
fn upload(mux: &Mux) -> Client {
    let mut client = mux.client();
    let length = ("content-length", "60000000");
    client.start("POST", MESSAGES, &[BEARER, length]);
    let mut socket = client.wire.socket().try_clone().expect("clone a socket");
    thread::spawn(move || socket.write_all(&vec![b'x'; 60_000_000]));
    client
}

/// Claude's upstream has a name that is to be looked up, and so needs TLS.
fn by_name(setup: Setup, up: &Upstream, authority: &Authority) -> Setup {
    let roots = setup.write("roots.pem", &authority.cert_pem);
    let url = format!("https://upstream.test:{}", up.addr.port());
    let setup = setup.provider(0, "base_url", url);
    setup.env("SSL_CERT_FILE", roots)
}

/// Names are looked up once in a while, not for each request: a name server may be slow, or wrong for a moment.
#[test]
fn a_name_that_is_known_needs_no_name_server() {
    let authority = Authority::new();
    let up = Upstream::tls(&authority, |_, conn| conn.respond(200, &[], b"fine"));
    let setup = Setup::new(&up);
    let hosts = setup.write("hosts", "127.0.0.1 upstream.test\n");
    let Some(script) = setup::mounting(&hosts, "/etc/hosts") else {
        return say("SKIPPED: only root has an /etc/hosts of its own");
    };
    let mux = by_name(setup, &up, &authority).shell(&script).start();
    assert_eq!(mux.message().text(), "fine");
    std::fs::write(&hosts, "127.0.0.2 upstream.test\n").expect("move the name");
    for _ in 0..3 {
        assert_eq!(mux.message().text(), "fine");
        up.close_connections();
    }
}

/// A name server that has every name at 127.0.0.1, until it is told to be silent; then it tells that it was asked.
fn name_server(ip: &str, silent: Arc<AtomicBool>, asked: mpsc::Sender<()>) -> io::Result<()> {
    let socket = UdpSocket::bind((ip, 53))?;
    thread::spawn(move || {
        let mut packet = [0; 512];
        while let Ok((count, from)) = socket.recv_from(&mut packet) {
            if silent.load(Ordering::SeqCst) {
                let _ = asked.send(());
                continue;
            }
            // The question is the end of the query (RFC 1035 section 4.1); the answer has it again.
            let mut answer = packet[..count].to_vec();
            answer[2..4].copy_from_slice(&[0x81, 0x80]);
            if answer.ends_with(&[0, 1, 0, 1]) {
                answer[7] = 1;
                answer.extend(b"\xc0\x0c\0\x01\0\x01\0\0\0\0\0\x04\x7f\0\0\x01");
            }
            let _ = socket.send_to(&answer, from);
        }
    });
    Ok(())
}

#[test]
fn a_name_server_that_falls_silent_fails_no_request() {
    let authority = Authority::new();
    let up = Upstream::tls(&authority, |_, conn| conn.respond(200, &[], b"fine"));
    let setup = Setup::new(&up).set("request_timeout", "8s");
    let ip = format!("127.0.0.{}", 100 + std::process::id() % 100);
    let conf = setup.write("resolv.conf", format!("nameserver {ip}\n"));
    let (asked, second) = mpsc::channel();
    let silent = Arc::new(AtomicBool::new(false));
    let served = name_server(&ip, silent.clone(), asked).is_ok();
    let script = setup::mounting(&conf, "/etc/resolv.conf").filter(|_| served);
    let Some(script) = script else {
        return say("SKIPPED: only root has a name server of its own");
    };
    let mux = by_name(setup, &up, &authority).shell(&script).start();
    assert_eq!(mux.message().text(), "fine");
    silent.store(true, Ordering::SeqCst);
    let end = Instant::now() + 2 * PATIENCE;
    while second.try_recv().is_err() {
        assert!(Instant::now() < end, "a name is looked up once for all");
        assert_eq!(mux.message().text(), "fine");
        thread::sleep(Duration::from_millis(50));
    }
}
