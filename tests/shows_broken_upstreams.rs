//! An upstream that fails is seen to fail: an answer that broke off is never shown as whole, and one that
//! never came is an error that says so.

mod common;
use common::*;
use rustix::net::{self, AddressFamily, SocketType};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

/// Fails in the way that `x-way` names.
fn fail(req: &Request, conn: &mut Conn) -> io::Result<()> {
    match req.head.get("x-way").unwrap_or_default() {
        "sized, half way" => {
            conn.head(200, &[("content-length", "1000")])?;
            conn.wire.send(&[b'x'; 500])?;
        }
        "sized, before the first byte" => conn.head(200, &[("content-length", "1000")])?,
        "sized, before the last byte" => {
            conn.head(200, &[("content-length", "1000")])?;
            conn.wire.send(&[b'x'; 999])?;
        }
        "chunked, after a chunk" => {
            conn.stream(&[("content-type", "text/event-stream")])?;
            conn.chunk("data: 1\n\n")?;
        }
        "chunked, within a chunk" => {
            conn.stream(&[])?;
            conn.wire.send(b"100\r\nhalf of it")?;
        }
        "chunked, before the first" => conn.stream(&[])?,
        "chunked, not a number" => {
            conn.stream(&[])?;
            conn.chunk("data: 1\n\n")?;
            conn.wire.send(b"zz\r\nwhat\r\n")?;
        }
        "closed" => {}
        "half a head" => conn.wire.send(b"HTTP/1.1 200 OK\r\nContent-Le")?,
        "garbage" => conn.wire.send(b"\x16\x03\x01 this is no HTTP\r\n\r\n")?,
        "a bad header" => conn.wire.send(b"HTTP/1.1 200 OK\r\nbad header\r\n\r\n")?,
        way => panic!("there is no way {way:?}"),
    }
    conn.cut()
}

const CUT: [&str; 7] = [
    "sized, half way",
    "sized, before the first byte",
    "sized, before the last byte",
    "chunked, after a chunk",
    "chunked, within a chunk",
    "chunked, before the first",
    "chunked, not a number",
];

#[test]
fn an_answer_that_breaks_off_is_broken_for_the_client_too() {
    let up = Upstream::start(fail);
    let mux = Mux::start(&up);
    for (number, way) in CUT.into_iter().enumerate() {
        let mut client = mux.client();
        client.request("POST", MESSAGES, &[BEARER, ("x-way", way)], b"{}");
        assert_eq!(client.head().word(1), "200", "{way}");
        let error = client.body().expect_err(way);
        assert_ne!(
            error.kind(),
            io::ErrorKind::WouldBlock,
            "{way}: the connection stays open"
        );
        mux.wait_log_times("ended=", number + 1);
    }
    assert_eq!(up.requests().len(), CUT.len(), "nothing is replayed");
}

/// A reader of TLS can tell a cut from an end by the missing close_notify.
#[test]
fn over_tls_it_ends_without_a_farewell() {
    let authority = Authority::new();
    let up = Upstream::start(fail);
    let mux = Setup::new(&up).tls(&authority).start();
    let cut = |way| [(way, "keep-alive"), (way, "close")];
    for (way, connection) in CUT.into_iter().flat_map(cut) {
        let mut client = Client::tls(mux.addr, &authority);
        let headers = [BEARER, ("x-way", way), ("connection", connection)];
        client.request("POST", MESSAGES, &headers, b"{}");
        client.head();
        let end = loop {
            match client.wire.some() {
                Ok(piece) if piece.is_empty() => break Ok(()),
                Ok(_) => {}
                Err(e) => break Err(e.kind()),
            }
        };
        assert_eq!(
            end,
            Err(io::ErrorKind::UnexpectedEof),
            "{way}, {connection}"
        );
    }
}

#[test]
fn an_answer_that_never_begins_is_502() {
    let up = Upstream::start(fail);
    let mux = Mux::start(&up);
    for way in ["closed", "half a head", "garbage", "a bad header"] {
        let answer = mux.ask("POST", MESSAGES, &[("x-way", way)], b"{}");
        assert_eq!(answer.status, 502, "{way}");
        assert_eq!(
            answer.header("x-should-retry"),
            None,
            "{way}: another try may succeed"
        );
        answer.error();
    }
    assert_eq!(up.requests().len(), 4, "nothing is replayed");
}

#[test]
fn an_upstream_that_is_not_there_is_502() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let place = up.url();
    drop(up);
    let answer = mux.message();
    assert_eq!(answer.status, 502);
    let said = answer.error();
    assert!(said.contains(&place), "{said}");
}

#[test]
fn a_reset_before_the_head_is_502() {
    let up = Upstream::at_head(|_, conn| {
        // Closing a socket whose input was not read sends a reset; the head's reader left most of it.
        conn.wire.socket().peek(&mut [0])?;
        conn.cut()
    });
    let mux = Mux::start(&up);
    let answer = mux.ask("POST", MESSAGES, &[], &[b'x'; 500_000]);
    assert_eq!(answer.status, 502);
    answer.error();
}

#[test]
fn a_certificate_that_nobody_vouches_for_is_502() {
    let theirs = Authority::new();
    let up = Upstream::tls(&theirs, |_, conn| conn.respond(200, &[], b"fine"));
    assert_eq!(Mux::start(&up).message().status, 502);
    let setup = Setup::new(&up);
    let others = setup.write("others.pem", Authority::new().cert_pem);
    assert_eq!(
        setup.env("SSL_CERT_FILE", others).start().message().status,
        502
    );
    // Alone, or wherever it stands among others.
    let among = Authority::new().cert_pem + &theirs.cert_pem;
    for roots in [theirs.cert_pem, among] {
        let setup = Setup::new(&up);
        let right = setup.write("right.pem", roots);
        assert_eq!(
            setup.env("SSL_CERT_FILE", right).start().message().text(),
            "fine"
        );
    }
}

/// Whoever set it does not want those that are built in.
#[test]
fn roots_that_cannot_be_had_stop_the_start() {
    let up = Upstream::plain();
    for name in ["missing.pem", "empty.pem"] {
        let setup = Setup::new(&up);
        let path = setup.write(name, "no certificate");
        if name == "missing.pem" {
            std::fs::remove_file(&path).expect("remove a file");
        }
        let (code, said) = setup.env("SSL_CERT_FILE", &path).refused();
        assert_eq!(code, 1, "{said}");
        assert!(
            said.contains("SSL_CERT_FILE") && said.contains(name),
            "{said}"
        );
    }
}

#[test]
fn silence_before_the_head_is_504_and_names_its_setting() {
    let end = Steps::default();
    let held = end.clone();
    let up = Upstream::start(move |_, conn| {
        held.wait(1);
        conn.cut()
    });
    let mux = Setup::new(&up).set("request_timeout", "1s").start();
    let answer = mux.message();
    assert_eq!(answer.status, 504);
    assert_eq!(answer.header("x-should-retry"), None);
    assert!(
        answer.error().contains("request_timeout"),
        "{}",
        answer.text()
    );
    end.advance();
}

/// As where a firewall drops what is sent: a listener whose queue is full answers no more.
#[test]
fn silence_before_the_connection_is_504() {
    let socket = net::socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
    net::bind(&socket, &SocketAddr::from(([127, 0, 0, 1], 0))).expect("bind");
    net::listen(&socket, 0).expect("listen");
    let full = TcpListener::from(socket);
    let addr = full.local_addr().expect("an address");
    let soon = Duration::from_millis(200);
    let queued = (0..100).map_while(|_| TcpStream::connect_timeout(&addr, soon).ok());
    let queued: Vec<_> = queued.collect();
    assert!(queued.len() < 100, "its queue has no end");
    let up = Upstream::plain();
    let setup = Setup::new(&up).set("request_timeout", "1s");
    let setup = setup.provider(0, "base_url", format!("http://{addr}"));
    let answer = setup.start().message();
    assert_eq!(answer.status, 504);
    assert!(
        answer.error().contains("request_timeout"),
        "{}",
        answer.text()
    );
}

#[test]
fn silence_in_a_body_breaks_it_off() {
    let end = Steps::default();
    let held = end.clone();
    let up = Upstream::start(move |_, conn| {
        conn.stream(&[])?;
        conn.chunk("data: 1\n\n")?;
        held.wait(1);
        conn.finish()
    });
    let mux = Setup::new(&up).set("stream_idle_timeout", "2s").start();
    let mut client = mux.client();
    client.request("POST", MESSAGES, &[BEARER], b"{}");
    client.head();
    assert_eq!(client.text(), "data: 1\n\n");
    let error = client.piece().expect_err("an end that is no end");
    assert_ne!(error.kind(), io::ErrorKind::WouldBlock);
    mux.wait_log("ended=\"upstream was silent for stream_idle_timeout\"");
    end.advance();
}

/// An answer without a size is whole only if its connection ends properly: no reset, and over TLS a close_notify
/// (RFC 9112 section 9.8).
#[test]
fn an_answer_without_a_size_ends_as_its_connection_does() {
    let authority = Authority::new();
    let ways = [
        ("a FIN", None, true),
        ("a reset", None, false),
        ("a close_notify", Some(&authority), true),
        ("a FIN", Some(&authority), false),
    ];
    for (way, tls, is_whole) in ways {
        let shown = Steps::default();
        let addr = ends_by(way, tls.cloned(), shown.clone());
        let up = Upstream::plain();
        let setup = Setup::new(&up);
        let roots = setup.write("roots.pem", &authority.cert_pem);
        let scheme = if tls.is_some() { "https" } else { "http" };
        let setup = setup.provider(0, "base_url", format!("{scheme}://{addr}"));
        let mux = setup.env("SSL_CERT_FILE", roots).start();
        let mut client = mux.client();
        client.request("POST", MESSAGES, &[BEARER], b"{}");
        client.head();
        assert_eq!(client.text(), "all of it", "{scheme}, {way}");
        shown.advance();
        match client.piece() {
            Ok(None) => assert!(is_whole, "{scheme}, {way} is no end"),
            Ok(Some(piece)) => panic!("{scheme}, {way}: {piece:?} was never sent"),
            Err(e) => assert!(!is_whole, "{scheme}, {way} is an end: {e}"),
        }
        mux.wait_log("status=200");
        let broke = mux.log().contains("ended=\"upstream broke off");
        assert_eq!(broke, !is_whole, "{scheme}, {way}");
    }
}

/// An upstream that answers once, without a size, and ends its connection in that way, once that is shown.
fn ends_by(way: &'static str, authority: Option<Authority>, shown: Steps) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let addr = listener.local_addr().expect("an address");
    std::thread::spawn(move || -> io::Result<()> {
        let (mut socket, _) = listener.accept()?;
        let mut tls = authority.map(|authority| authority.server());
        let mut wire: Box<dyn http::Io> = match &mut tls {
            Some(tls) => Box::new(rustls::Stream::new(tls, &mut socket)),
            None => Box::new(&mut socket),
        };
        let mut asked = [0; 4096];
        while !asked.windows(2).any(|two| two == b"{}") {
            let _ = wire.read(&mut asked)?;
        }
        wire.write_all(b"HTTP/1.1 200 OK\r\n\r\nall of it")?;
        drop(wire);
        shown.wait(1);
        match (way, tls) {
            ("a reset", _) => net::sockopt::set_socket_linger(&socket, Some(Duration::ZERO))?,
            ("a close_notify", Some(mut tls)) => {
                tls.send_close_notify();
                tls.write_tls(&mut socket)?;
            }
            _ => {}
        }
        Ok(())
    });
    addr
}

/// Sends events until the other side has gone: how many it took.
fn events_until_gone(conn: &mut Conn) -> io::Result<usize> {
    let mut socket = conn.wire.socket().try_clone()?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    for n in 1..10 {
        conn.chunk(format!("data: {n}\n\n"))?;
        if !matches!(socket.read(&mut [0]), Err(e) if e.kind() == io::ErrorKind::WouldBlock) {
            return Ok(n);
        }
    }
    Ok(10)
}

#[test]
fn a_client_that_goes_away_drops_the_upstream() {
    let authority = Authority::new();
    at_once([None, Some(&authority)], assert_dropped);
}

fn assert_dropped(tls: Option<&Authority>) {
    let gone = Steps::default();
    let go = gone.clone();
    let (told, taken) = std::sync::mpsc::channel();
    let up = Upstream::start(move |_, conn| {
        conn.stream(&[])?;
        conn.chunk("data: 0\n\n")?;
        go.wait(1);
        told.send(events_until_gone(conn)?)
            .expect("a test that waits");
        conn.cut()
    });
    let setup = Setup::new(&up);
    let mux = match tls {
        None => setup.start(),
        Some(authority) => setup.tls(authority).start(),
    };
    let mut client = match tls {
        None => mux.client(),
        Some(authority) => Client::tls(mux.addr, authority),
    };
    client.request("POST", MESSAGES, &[BEARER], b"{}");
    client.head();
    assert_eq!(client.text(), "data: 0\n\n");
    drop(client);
    gone.advance();
    mux.wait_log("ended=\"the client went away");
    let count = taken.recv_timeout(PATIENCE).expect("a count");
    assert!(count <= 2, "noticed after {count} writes");
}

#[test]
fn half_a_close_is_no_departure() {
    let shown = Steps::default();
    let held = shown.clone();
    let up = Upstream::start(move |_, conn| {
        conn.stream(&[])?;
        conn.chunk("one")?;
        held.wait(1);
        conn.chunk("two")?;
        conn.finish()
    });
    let mux = Mux::start(&up);
    let mut client = mux.client();
    client.request("POST", MESSAGES, &[BEARER], b"{}");
    client.wire.end_sending();
    client.head();
    assert_eq!(client.text(), "one");
    shown.advance();
    assert_eq!(client.text(), "two");
    assert_eq!(client.piece().expect("a proper end"), None);
}

#[test]
fn upstream_connections_are_kept_and_a_closed_one_is_noticed_before_it_is_used() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let mut client = mux.client();
    for round in 1..=20 {
        for _ in 0..3 {
            let answer = client.request("POST", MESSAGES, &[BEARER], b"{}").answer();
            assert_eq!(answer.status, 200, "round {round}");
        }
        assert_eq!(up.connections(), round);
        up.close_connections();
    }
}

#[test]
fn after_any_failure_the_next_request_is_served() {
    let up = Upstream::start(|req, conn| match req.head.get("x-way") {
        Some(_) => fail(req, conn),
        None => conn.respond(200, &[], b"fine"),
    });
    let mux = Setup::new(&up).set("workers", 1).start();
    for way in CUT.into_iter().chain(["closed", "half a head", "garbage"]) {
        let mut client = mux.client();
        client.request("POST", MESSAGES, &[BEARER, ("x-way", way)], b"{}");
        client.head();
        assert_eq!(mux.message().text(), "fine", "after {way}");
    }
}

/// `stream_idle_timeout` is for bodies; the head has all of `request_timeout`.
#[test]
fn a_slow_head_is_not_cut_by_a_short_stream_idle_timeout() {
    let up = Upstream::start(move |_, conn| {
        std::thread::sleep(std::time::Duration::from_millis(1200));
        conn.json(200, &json!({}))
    });
    let setup = Setup::new(&up).set("stream_idle_timeout", "400ms");
    let mux = setup.set("request_timeout", "30s").start();
    assert_eq!(mux.message().status, 200);
}

/// Nobody asked for another protocol, and what would come is no answer.
#[test]
fn a_switch_of_protocols_is_502() {
    let up = Upstream::start(|_, conn| {
        conn.head(101, &[("connection", "upgrade"), ("upgrade", "x")])?;
        conn.wire.send(b"0123")
    });
    let mux = Mux::start(&up);
    for _ in 0..2 {
        let answer = mux.message();
        assert_eq!(answer.status, 502);
        answer.error();
    }
}
