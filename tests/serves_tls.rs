//! HTTPS with TLS 1.2 and 1.3, every usual form of a key, and a pair that is renewed without a restart.

mod common;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use common::*;
use rustls::version::{TLS12, TLS13};
use std::fs;
use std::io::{self, Read, Write};
use std::net::TcpStream;

fn pem(label: &str, der: &[u8]) -> String {
    let text = BASE64_STANDARD.encode(der);
    let lines: Vec<_> = text
        .as_bytes()
        .chunks(64)
        .map(String::from_utf8_lossy)
        .collect();
    format!(
        "-----BEGIN {label}-----\n{}\n-----END {label}-----\n",
        lines.join("\n")
    )
}

/// The key that a PKCS#8 wrapping holds: everything after the header of its octet string.
fn unwrapped(pkcs8: &[u8], header: &[u8]) -> Vec<u8> {
    let at = pkcs8
        .windows(header.len())
        .position(|w| w == header)
        .expect("an octet string");
    pkcs8[at + header.len()..].to_vec()
}

#[test]
fn versions_1_2_and_1_3_and_kept_connections() {
    let authority = Authority::new();
    let up = Upstream::plain();
    let mux = Setup::new(&up).tls(&authority).start();
    assert!(
        mux.log().contains("listening on https://127.0.0.1:"),
        "{}",
        mux.log()
    );
    for version in [&TLS12, &TLS13] {
        let wire = authority
            .connect(mux.addr, &[version])
            .expect("a handshake");
        let mut client = Client::on(wire);
        for _ in 0..3 {
            let answer = client.request("POST", MESSAGES, &[BEARER], b"{}").answer();
            assert_eq!(answer.text(), "fine");
        }
        let answer = client.request("POST", MESSAGES, &[], b"{}").answer();
        assert_eq!(answer.status, 401);
    }
}

#[test]
fn a_pair_that_is_not_enabled_is_not_looked_at() {
    let up = Upstream::plain();
    let tls = json!({"enabled": false, "cert_path": "/nowhere", "key_path": "/nowhere"});
    let mux = Setup::new(&up).set("tls", tls).start();
    assert_eq!(mux.message().text(), "fine");
}

#[test]
fn every_form_of_a_key() {
    let up = Upstream::plain();
    let curve = Authority::new();
    let rsa = rcgen::KeyPair::from_pem(include_str!("common/rsa.pem")).expect("an RSA key");
    let rsa = Authority::with(rsa);
    let sec1 = [
        b"\x30\x6b".to_vec(),
        unwrapped(&curve.key, b"\x04\x6d\x30\x6b"),
    ]
    .concat();
    let size = &rsa.key[22..26];
    let pkcs1 = unwrapped(&rsa.key, size);
    for (authority, key) in [
        (&curve, curve.key_pem.clone()),
        (&curve, pem("EC PRIVATE KEY", &sec1)),
        (&rsa, rsa.key_pem.clone()),
        (&rsa, pem("RSA PRIVATE KEY", &pkcs1)),
    ] {
        let mut authority = authority.clone();
        authority.key_pem = key;
        let mux = Setup::new(&up).tls(&authority).start();
        let mut client = Client::tls(mux.addr, &authority);
        let answer = client.request("POST", MESSAGES, &[BEARER], b"{}").answer();
        assert_eq!(
            answer.text(),
            "fine",
            "{}",
            authority.key_pem.lines().next().unwrap_or_default()
        );
    }
}

/// A client may know none but the authority at its far end.
#[test]
fn a_certificate_is_shown_with_all_of_its_chain() {
    let authority = Authority::new();
    let mut chain = authority.clone();
    chain.cert_pem += &Authority::new().cert_pem;
    let mux = Setup::new(&Upstream::plain()).tls(&chain).start();
    for version in [&TLS12, &TLS13] {
        let mut socket = mux.client().wire.socket().try_clone().expect("a socket");
        let mut tls = authority.client(&[version]);
        while tls.is_handshaking() {
            tls.complete_io(&mut socket).expect("a handshake");
        }
        let shown = tls.peer_certificates().expect("certificates").iter();
        let shown: String = shown.map(|der| pem("CERTIFICATE", der)).collect();
        assert_eq!(shown, chain.cert_pem);
    }
}

/// Whether a new connection is shown this certificate.
fn shows(mux: &Mux, authority: &Authority) -> bool {
    authority.connect(mux.addr, rustls::ALL_VERSIONS).is_ok()
}

fn wait_until_shown(mux: &Mux, authority: &Authority) {
    wait_until("the new certificate is in use", || shows(mux, authority));
}

#[test]
fn a_renewed_pair_is_used_and_a_broken_one_is_not() {
    let (first, second, third) = (Authority::new(), Authority::new(), Authority::new());
    let fourth = Authority::new();
    let up = Upstream::plain();
    let mux = Setup::new(&up).tls(&first).start();
    let put =
        |name: &str, text: &str| fs::write(mux.folder.0.join(name), text).expect("write a file");
    let rested = mux.footprint().threads;
    let mut kept = Client::tls(mux.addr, &first);
    assert_eq!(
        kept.request("POST", MESSAGES, &[BEARER], b"{}")
            .answer()
            .status,
        200
    );

    put("cert.pem", &second.cert_pem);
    put("key.pem", &second.key_pem);
    wait_until_shown(&mux, &second);
    mux.wait_log("cert.pem is in use");
    assert!(!shows(&mux, &first));
    let old = kept.request("POST", MESSAGES, &[BEARER], b"{}").answer();
    assert_eq!(old.status, 200, "an open connection lives on");

    // The last two fail in the same words, and are told both.
    for (number, broken) in ["not a certificate", &fourth.cert_pem, &third.cert_pem]
        .into_iter()
        .enumerate()
    {
        let said = mux.log_lines("cert.pem").len();
        put("cert.pem", broken);
        mux.wait_log_times("cert.pem", said + 1);
        let told = mux.log_lines("cert.pem").pop().expect("a line");
        assert!(told.contains("ERROR"), "{told}");
        assert!(shows(&mux, &second), "broken pair {number}");
    }
    // One that stays is told once, although it is looked at each time that idle workers are ended.
    let mut wait_for_chores = || {
        for _ in 0..2 {
            kept.request("POST", MESSAGES, &[BEARER], b"{}").answer();
            let ended = || mux.footprint().threads <= rested;
            wait_until("idle workers are ended", ended);
        }
    };
    let said = mux.log_lines("cert.pem").len();
    wait_for_chores();
    assert_eq!(mux.log_lines("cert.pem").len(), said);
    put("key.pem", &third.key_pem);
    wait_until_shown(&mux, &third);
    wait_for_chores();
    assert_eq!(mux.log_lines("cert.pem is in use").len(), 2);
}

/// Within 10 s: that is what a head has, and one that was begun behind the change is let go after it.
#[test]
fn a_renewed_pair_is_used_before_a_half_sent_head_is_let_go() {
    let (first, second) = (Authority::new(), Authority::new());
    let up = Upstream::plain();
    let mux = Setup::new(&up).tls(&first).start();
    let mut slow = Client::tls(mux.addr, &first);
    for (name, text) in [("cert.pem", &second.cert_pem), ("key.pem", &second.key_pem)] {
        fs::write(mux.folder.0.join(name), text).expect("write a file");
    }
    assert_eq!(slow.send("GET / HT").answer().status, 408);
    assert!(shows(&mux, &second));
}

/// It is tried again, and told once.
#[test]
fn a_pair_that_cannot_be_read_for_a_moment() {
    let (first, second) = (Authority::new(), Authority::new());
    let up = Upstream::plain();
    let mux = Setup::new(&up).tls(&first).start();
    let put =
        |name: &str, text: &str| fs::write(mux.folder.0.join(name), text).expect("write a file");
    let old = mux.limit_descriptors(3);
    put("cert.pem", &second.cert_pem);
    put("key.pem", &second.key_pem);
    mux.wait_log("the old certificate stays in use");
    mux.limit_descriptors(old);
    wait_until_shown(&mux, &second);
    assert_eq!(mux.log_lines("the old certificate").len(), 1);
}

/// Of what TLS has taken in, the socket does not tell any more.
#[test]
fn a_head_and_a_body_that_fill_several_records() {
    let authority = Authority::new();
    let up = Upstream::start(|req, conn| conn.respond(200, &[], &req.body));
    let mux = Setup::new(&up).tls(&authority).start();
    let (long, body) = ("x".repeat(4000), "x".repeat(100_000));
    let fields = ["x-a", "x-b", "x-c", "x-d", "x-e", "x-f", "x-g"];
    let mut headers = vec![BEARER];
    headers.extend(fields.map(|name| (name, long.as_str())));
    let mut client = Client::tls(mux.addr, &authority);
    for _ in 0..3 {
        client.request("POST", MESSAGES, &headers, body.as_bytes());
        let answer = client.answer();
        assert_eq!((answer.status, answer.text() == body), (200, true));
    }
}

#[test]
fn a_client_that_speaks_no_tls_harms_nobody() {
    let authority = Authority::new();
    let up = Upstream::plain();
    let mux = Setup::new(&up).tls(&authority).start();
    let mut plain = mux.client();
    plain.request("POST", MESSAGES, &[BEARER], b"{}");
    assert!(!plain.rest().starts_with(b"HTTP/1.1 200"));
    let mut client = Client::tls(mux.addr, &authority);
    assert_eq!(
        client
            .request("POST", MESSAGES, &[BEARER], b"{}")
            .answer()
            .status,
        200
    );
    assert_eq!(up.requests().len(), 1);
}

#[test]
fn a_pair_that_cannot_be_used_stops_the_start() {
    let (one, other) = (Authority::new(), Authority::new());
    let up = Upstream::plain();
    for (cert, key) in [
        (one.cert_pem.as_str(), other.key_pem.as_str()),
        ("garbage", one.key_pem.as_str()),
        (one.cert_pem.as_str(), "garbage"),
        ("", ""),
    ] {
        let mut pair = one.clone();
        (pair.cert_pem, pair.key_pem) = (cert.to_owned(), key.to_owned());
        let (code, log) = Setup::new(&up).tls(&pair).refused();
        assert_eq!(code, 2, "{log}");
        assert!(log.contains(".pem"), "{log}");
        assert!(!log.contains("panicked"), "{log}");
    }
    let setup = Setup::new(&up).tls(&one);
    fs::remove_file(setup.folder.0.join("key.pem")).expect("remove the key");
    let (code, log) = setup.refused();
    assert_eq!(code, 2, "{log}");
    assert!(log.contains("key.pem: No such file"), "{log}");
}

/// With a close_notify behind it, or a client could not tell that nobody cut it off.
#[test]
fn the_last_answer_ends_tls() {
    let authority = Authority::new();
    let up = Upstream::plain();
    let mux = Setup::new(&up).tls(&authority).start();
    let mut client = Client::tls(mux.addr, &authority);
    let close = ("connection", "close");
    client.request("POST", MESSAGES, &[BEARER, close], b"{}");
    assert_eq!(client.answer().text(), "fine");
    assert_eq!(client.wire.some().expect("a clean end"), b"");
}

/// So do a stop, and making room for others: nothing was cut off there, either (RFC 9112 section 9.8).
#[test]
fn an_idle_connection_that_is_closed_ends_tls() {
    let authority = Authority::new();
    let up = Upstream::plain();
    // That carries one worker and five connections.
    let setup = Setup::new(&up).tls(&authority).set("workers", 1);
    let mut mux = setup.shell("ulimit -n 40; exec \"$@\"").start();
    let idle = |mux: &Mux| {
        let mut client = Client::tls(mux.addr, &authority);
        // From the gate itself: a worker might still have the connection when others come.
        client.request("GET", "/healthz", &[], b"");
        assert_eq!(client.answer().status, 200);
        client
    };
    let mut quietest = idle(&mux);
    let others: Vec<_> = (0..5).map(|_| Client::new(mux.addr)).collect();
    assert_eq!(quietest.wire.some().expect("a clean end"), b"");
    drop(others);
    // And one that a worker has served, wherever it is by then.
    let mut last = Client::tls(mux.addr, &authority);
    last.request("POST", MESSAGES, &[BEARER], b"{}");
    assert_eq!(last.answer().text(), "fine");
    mux.signal(Signal::TERM);
    assert_eq!(last.wire.some().expect("a clean end"), b"");
    assert_eq!(mux.wait_exit(), 0);
}

/// One that knows nothing newer is served, and one that has no protocol in common is told so.
#[test]
fn the_protocol_is_agreed_on_or_its_lack_is_told() {
    let authority = Authority::new();
    let mux = Setup::new(&Upstream::plain()).tls(&authority).start();
    let ask = |version, protocol: &str| -> io::Result<String> {
        let mut socket = TcpStream::connect(mux.addr)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let mut tls = authority.client_of(&[version], &[protocol]);
        let mut tls = rustls::Stream::new(&mut tls, &mut socket);
        tls.write_all(b"HEAD / HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        tls.read_to_string(&mut answer).map(|_| answer)
    };
    for version in [&TLS12, &TLS13] {
        for known in ["http/1.1", "http/1.0"] {
            let answer = ask(version, known).expect("an answer");
            assert!(answer.starts_with("HTTP/1.1 200"), "{known}: {answer}");
        }
        let ended = ask(version, "h2").expect_err("no protocol").to_string();
        assert!(ended.contains("NoApplicationProtocol"), "{ended}");
    }
}
