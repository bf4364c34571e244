//! A TLS handshake that stalls, drips, breaks off or is none at all holds nobody up, and is let go in time.

mod common;
use common::*;
use std::io::{self, Read, Write};
use std::thread;
use std::time::Duration;

/// The first bytes of a handshake that a real client would go on with: a record of 512 bytes is announced.
const BEGINNING: &[u8] = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";

fn served(mux: &Mux, authority: &Authority) {
    let mut client = Client::tls(mux.addr, authority);
    let answer = client.request("POST", MESSAGES, &[BEARER], b"{}").answer();
    assert_eq!(answer.text(), "fine");
}

/// All kinds at the same time, 50 of each, for the limit of 10 s is real.
#[test]
fn whatever_comes_instead_of_a_handshake_is_let_go() {
    need_descriptors(4096);
    let authority = Authority::new();
    let up = Upstream::plain();
    let setup = Setup::new(&up).set("workers", 4).tls(&authority);
    let mux = setup.start();
    served(&mux, &authority);
    let before = mux.footprint();
    let beginnings: [&[u8]; 6] = [
        b"",
        b"\x16",
        BEGINNING,
        b"GET /healthz HTTP/1.1\r\nhost: ai-mux\r\n\r\n",
        b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10",
        &[0xff; 4096],
    ];
    let mut clients = Vec::new();
    for beginning in beginnings {
        for _ in 0..50 {
            let mut client = mux.client();
            client.send(beginning);
            clients.push(client);
        }
    }
    // One that goes on for ever, a byte at a time.
    let mut dripping = mux.client();
    dripping.send(BEGINNING);
    served(&mux, &authority);
    let drips = (0..100).take_while(|_| {
        thread::sleep(Duration::from_millis(500));
        dripping.wire.send(b"x").is_ok()
    });
    assert!(drips.count() < 100, "a handshake may drip for ever");
    for client in &mut clients {
        let rest = client.rest();
        assert!(!rest.starts_with(b"HTTP/"), "an answer without TLS");
    }
    drop((clients, dripping));
    served(&mux, &authority);
    mux.assert_settled(before, 4);
    assert_eq!(up.requests().len(), 3);
}

#[test]
fn clients_that_leave_in_mid_handshake_leave_nothing_behind() {
    let authority = Authority::new();
    let up = Upstream::plain();
    let setup = Setup::new(&up).set("workers", 4).tls(&authority);
    let mux = setup.start();
    served(&mux, &authority);
    let before = mux.footprint();
    at_once(0..100, |number| {
        let mut client = mux.client();
        client.send(&BEGINNING[..number % BEGINNING.len()]);
        match number % 2 {
            0 => client.wire.cut(),
            _ => client.wire.end_sending(),
        }
        let _ = client.wire.socket().read(&mut [0]);
    });
    served(&mux, &authority);
    mux.assert_settled(before, 4);
}

/// With more of them than may be open, the handshakes that have stalled longest make room.
#[test]
fn stalled_handshakes_keep_nobody_out_at_the_cap() {
    let authority = Authority::new();
    let up = Upstream::plain();
    let setup = Setup::new(&up).set("workers", 4).tls(&authority);
    let mux = setup.shell("ulimit -n 128; exec \"$@\"").start();
    served(&mux, &authority);
    let before = mux.footprint();
    let mut stalled = Vec::new();
    for _ in 0..200 {
        let mut client = mux.client();
        let _ = client.wire.send(BEGINNING);
        stalled.push(client);
    }
    served(&mux, &authority);
    // Not because they were let go in time: those that came later are stalled still.
    let socket = stalled[150].wire.socket();
    socket.set_nonblocking(true).expect("set nonblocking");
    let peeked = socket.peek(&mut [0]).map_err(|e| e.kind());
    assert_eq!(peeked, Err(io::ErrorKind::WouldBlock));
    drop(stalled);
    served(&mux, &authority);
    mux.assert_settled(before, 4);
}

/// What comes with the last of the handshake is looked at as if it came alone.
#[test]
fn a_head_or_half_of_one_in_the_same_flight() {
    let authority = Authority::new();
    let up = Upstream::plain();
    let mux = Setup::new(&up).tls(&authority).start();
    let head = b"GET /healthz HTTP/1.1\r\nhost: ai-mux\r\n\r\n";
    for (early, status) in [(&head[..], 200), (&head[..20], 408)] {
        let wire = authority.connect_with(mux.addr, rustls::ALL_VERSIONS, early);
        let mut client = Client::on(wire.expect("a handshake"));
        assert_eq!(client.answer().status, status);
    }
}

/// What the gate itself answers is bounded by what a client takes.
#[test]
fn one_that_asks_and_asks_and_never_reads_is_let_go() {
    let authority = Authority::new();
    let up = Upstream::plain();
    let mux = Setup::new(&up).tls(&authority).start();
    let before = mux.footprint();
    let mut client = Client::tls(mux.addr, &authority);
    let head = "GET /healthz HTTP/1.1\r\nhost: ai-mux\r\n\r\n";
    let ended = (0..1_000_000).find_map(|_| client.wire.send(head.as_bytes()).err());
    let ended = ended.expect("answers pile up for ever");
    assert_ne!(ended.kind(), io::ErrorKind::WouldBlock, "it is held");
    drop(client);
    served(&mux, &authority);
    mux.assert_settled(before, 1);
}

/// A head has 10 s from its first byte, also where that is inside a record which is not whole yet.
#[test]
fn a_record_that_drips_is_let_go() {
    let authority = Authority::new();
    let up = Upstream::plain();
    let mux = Setup::new(&up).tls(&authority).start();
    // The first one of a connection, and a later one.
    at_once(0..2, |asked| {
        let mut client = Client::tls(mux.addr, &authority);
        for _ in 0..asked {
            client.request("POST", MESSAGES, &[BEARER], b"{}").answer();
        }
        let mut socket = client.wire.socket();
        socket
            .write_all(b"\x17\x03\x03\x00\x80")
            .expect("send the beginning");
        let drips = (0..100).take_while(|_| {
            thread::sleep(Duration::from_millis(500));
            socket.write_all(b"x").is_ok()
        });
        assert!(drips.count() < 100, "a record may drip for ever");
    });
}

/// One that ends in time is ended like any other: with a close_notify, since no answer was cut off.
#[test]
fn a_record_that_stays_half_is_let_go_in_form() {
    let authority = Authority::new();
    let mux = Setup::new(&Upstream::plain()).tls(&authority).start();
    let mut client = Client::tls(mux.addr, &authority);
    client.request("POST", MESSAGES, &[BEARER], b"{}").answer();
    let beginning = b"\x17\x03\x03\x00\x80";
    let mut socket = client.wire.socket();
    socket.write_all(beginning).expect("send the beginning");
    assert_eq!(client.wire.some().expect("a clean end"), b"");
}

/// A client that changes its keys between two requests has begun none: it is answered when it does,
/// and hears of none that was too slow, but of a clean end, when it does not.
#[test]
fn new_keys_are_no_head_that_has_begun() {
    let authority = Authority::new();
    let up = Upstream::plain();
    let mux = Setup::new(&up).tls(&authority).start();
    let socket = mux.client().wire.socket().try_clone().expect("a socket");
    let tls = authority.client(&[&rustls::version::TLS13]);
    let mut client = rustls::StreamOwned::new(tls, socket);
    let ask = b"HEAD /healthz HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut heard = vec![0; 4096];
    for _ in 0..3 {
        client.write_all(ask).expect("send");
        let count = client.read(&mut heard).expect("an answer");
        let answer = &heard[..count];
        assert!(answer.starts_with(b"HTTP/1.1 200 ") && answer.ends_with(b"\r\n\r\n"));
        client.conn.refresh_traffic_keys().expect("new keys");
        client.flush().expect("send them");
        // Whoever comes after them is served after they have been read.
        served(&mux, &authority);
    }
    let more = client.read(&mut heard).expect("a clean end");
    assert_eq!(more, 0, "an answer that nobody asked for");
    assert!(!mux.log().contains("status=408"), "{}", mux.log());
}

/// What a client puts into its handshake is no line in the log: nobody has seen a token of it.
#[test]
fn a_handshake_writes_no_log() {
    let authority = Authority::new();
    let mut mux = Setup::new(&Upstream::plain()).tls(&authority).start();
    let mut hello = Vec::new();
    let mut tls = authority.client(rustls::ALL_VERSIONS);
    tls.write_tls(&mut hello).expect("a hello");
    let name = hello.windows(9).position(|part| part == b"localhost");
    let name = name.expect("the name that is asked for");
    for odd in [b"127.0.0.1", b"!!!!!!!!!"] {
        hello[name..name + 9].copy_from_slice(odd);
        let mut client = mux.client();
        client.send(&hello);
        // It has been read once it is answered.
        let read = client.wire.socket().read(&mut [0]);
        assert_eq!(read.expect("an answer"), 1);
    }
    assert_eq!(mux.stop(), 0);
    let log = mux.whole_log();
    assert!(!log.contains("rustls") && !log.contains("peer="), "{log}");
}

/// Whoever looks for the reason finds it at debug.
#[test]
fn at_debug_a_handshake_that_fails_is_told() {
    let authority = Authority::new();
    let setup = Setup::new(&Upstream::plain()).tls(&authority);
    let mux = setup.set("log_level", "debug").start();
    let mut client = mux.client();
    client.send("GET /healthz HTTP/1.1\r\nhost: ai-mux\r\n\r\n");
    client.rest();
    mux.wait_log(" closed: ");
    let line = mux.log_lines(" closed: ").remove(0);
    let why = line.split(" closed: ").nth(1).unwrap_or_default();
    assert!(!["", "the client ended it"].contains(&why), "{line}");
}
