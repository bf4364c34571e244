//! Asked to stop, it finishes what runs, refuses what is new, and ends with 0.

mod common;
use common::*;
use rustix::net::sockopt;
use std::io::Write;
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

/// A stream that waits for `go` between its two events, and the client that reads it.
fn running(up: &Upstream, setup: Setup) -> (Mux, Client) {
    let mux = setup.start();
    let mut client = mux.client();
    client.request("POST", MESSAGES, &[BEARER, ("x-held", "1")], b"{}");
    client.head();
    assert_eq!(client.text(), "one");
    up.wait(1, |_| true);
    (mux, client)
}

#[test]
fn a_running_stream_is_finished_and_idle_connections_are_closed() {
    for signal in [Signal::TERM, Signal::INT] {
        let (up, go) = two_events();
        let (mut mux, mut client) = running(&up, Setup::new(&up));
        let mut refused = mux.client();
        let answer = refused.request("POST", MESSAGES, &[], b"{}").answer();
        assert_eq!(answer.status, 401); // from here on it is drained
        let mut idle = mux.client();
        assert_eq!(
            idle.request("GET", "/healthz", &[], b"").answer().status,
            200
        );
        let mut silent = mux.client();
        thread::sleep(Duration::from_millis(200)); // were these drained too, it would be that much longer
        mux.signal(signal);
        assert!(idle.closed() && silent.closed());
        // For good: what they still send is not waited for, unlike what the refused one sends. The
        // first byte draws a reset, which the next one meets.
        let open = |client: &Client| client.wire.socket().write_all(b"x").is_ok();
        let _ = (open(&idle), open(&silent));
        for client in [idle, silent] {
            loop {
                let drained = open(&refused);
                if !open(&client) {
                    break;
                }
                assert!(drained, "it is open for as long as one that is drained");
                thread::sleep(Duration::from_millis(1));
            }
        }
        assert!(TcpStream::connect(mux.addr).is_err(), "it still accepts");
        // Time enough for a program that waits for nobody to be gone.
        thread::sleep(Duration::from_millis(500));
        go.advance();
        assert_eq!(client.text(), "two");
        assert_eq!(client.piece().expect("a proper end"), None);
        assert_eq!(mux.wait_exit(), 0);
        assert!(mux.log_lines("cut short").is_empty(), "nothing was");
    }
}

#[test]
fn a_stream_that_takes_too_long_is_broken_off() {
    let (up, go) = two_events();
    // Without an end of its own before: it would break off by itself if a stop took longer.
    let setup = Setup::new(&up).set("stream_idle_timeout", "20s");
    let (mut mux, mut client) = running(&up, setup.set("workers", 1));
    let mut waiting = mux.client();
    waiting.request("POST", MESSAGES, &[BEARER], b"{}");
    let health = mux.client().request("GET", "/healthz", &[], b"").answer();
    assert_eq!(
        health.status, 200,
        "from the gate, which has seen what waits"
    );
    let asked = Instant::now();
    mux.signal(Signal::TERM);
    assert_eq!(mux.wait_exit(), 0);
    let time = asked.elapsed();
    assert!(time >= Duration::from_secs(10), "it had only {time:?}");
    assert!(client.piece().is_err(), "an end that is no end");
    let answer = waiting.answer();
    assert_eq!((answer.status, up.requests().len()), (503, 1));
    assert!(answer.error().contains("worker"));
    assert_eq!(mux.log_lines("status=503").len(), 1);
    assert_eq!(mux.log_lines("1 requests are still running").len(), 1);
    go.advance();
}

#[test]
fn what_waits_for_upstream_is_cut_short_with_its_line() {
    let go = Steps::default();
    let held = go.clone();
    let up = Upstream::start(move |request, conn| {
        if request.head.get("x-begin").is_some() {
            conn.stream(&[])?;
            conn.chunk("one")?;
        }
        held.wait(1);
        Ok(())
    });
    let mut mux = Mux::start(&up);
    let mut begun = mux.client();
    begun.request("POST", RESPONSES, &[BEARER, ("x-begin", "1")], b"{}");
    begun.head();
    assert_eq!(begun.text(), "one");
    let mut silent = mux.client();
    silent.request("POST", MESSAGES, &[BEARER], b"{}");
    up.wait(2, |_| true);
    assert_eq!(mux.stop(), 0);
    assert!(begun.piece().is_err(), "an end that is no end");
    let answer = silent.answer();
    assert_eq!(answer.status, 502);
    assert!(answer.error().contains("a stop of ai-mux cut it short"));
    for what in ["status=200 bytes=3 ", "status=502 "] {
        let lines = mux.log_lines(what);
        assert!(
            lines.len() == 1 && lines[0].contains(" ended=\"a stop of ai-mux"),
            "upstream is blamed: {lines:?}"
        );
    }
    go.advance();
}

/// One whose end is that of its connection, which looks whole once that is closed.
#[test]
fn an_answer_without_a_size_that_is_cut_short_is_broken() {
    let go = Steps::default();
    let held = go.clone();
    let up = Upstream::start(move |_, conn| {
        conn.head(200, &[("connection", "close")])?;
        conn.wire.send(b"one")?;
        held.wait(1);
        Ok(())
    });
    let mut mux = Mux::start(&up);
    let mut client = mux.client();
    client.request("POST", MESSAGES, &[BEARER], b"{}");
    client.head();
    assert_eq!(client.text(), "one");
    assert_eq!(mux.stop(), 0);
    assert!(client.piece().is_err(), "an end that is no end");
    let lines = mux.log_lines("status=200 bytes=3 ");
    assert!(
        lines.len() == 1 && lines[0].contains(" ended=\"a stop of ai-mux"),
        "{lines:?}"
    );
    go.advance();
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let (term, int) = (Signal::TERM, Signal::INT);
    at_once([(term, term), (int, int), (int, term)], |(one, other)| {
        let (up, go) = two_events();
        let (mut mux, mut client) = running(&up, Setup::new(&up));
        let mut idle = mux.client();
        mux.signal(one);
        assert!(idle.closed(), "the first signal was heard");
        mux.signal(other);
        assert_ne!(mux.wait_exit(), 0, "{one:?} {other:?}");
        assert!(mux.whole_log().contains("stopping") && mux.log_lines("cut short").is_empty());
        assert!(client.piece().is_err());
        go.advance();
    });
}

#[test]
fn a_refresh_is_waited_for_until_it_is_saved() {
    let keys = [
        ("claude", "/claudeAiOauth/refreshToken"),
        ("chatgpt", "/tokens/refresh_token"),
    ];
    at_once(keys, |(provider, key)| {
        let up = Upstream::plain();
        let go = up.hold_refreshes();
        let old = up.login(provider, 300);
        let setup = Setup::new(&up).save(provider, &old.file(provider));
        let mut mux = setup.set("log_level", "debug").start();
        up.wait(1, Request::is_refresh);
        let mut idle = mux.client();
        mux.signal(Signal::TERM);
        assert!(idle.closed(), "the signal was heard");
        mux.wait_log("no refresh begins any more");
        // Time enough for a program that waits for nothing to be gone.
        thread::sleep(Duration::from_millis(500));
        go.advance();
        assert_eq!(mux.wait_exit(), 0);
        let file = login::read(&mux.state(), provider);
        let saved = file.pointer(key).expect("a refresh token");
        assert_ne!(saved, &json!(old.refresh), "{provider}");
        assert_eq!((up.refreshes().len(), up.reused()), (1, 0));
    });
}

/// Sooner than another that was asked earlier but has a request to finish.
#[test]
fn with_nothing_to_do_it_ends_at_once() {
    let (up, go) = two_events();
    let (mut busy, mut client) = running(&up, Setup::new(&up));
    let plain = Upstream::plain();
    let mut mux = Mux::start(&plain);
    assert_eq!(mux.message().status, 200);
    busy.signal(Signal::TERM);
    assert_eq!(mux.stop(), 0);
    assert_eq!(mux.log_lines("ERROR").len(), 0);
    assert!(!busy.log().contains("cut short"), "{}", busy.log());
    go.advance();
    assert_eq!(client.text(), "two");
    assert_eq!(busy.wait_exit(), 0);
}

#[test]
fn a_request_that_waits_for_a_worker_is_served() {
    let (up, go) = two_events();
    let (mut mux, mut client) = running(&up, Setup::new(&up).set("workers", 1));
    let mut waiting = mux.client();
    waiting.request("POST", MESSAGES, &[BEARER], b"{}");
    // Answered by the gate, which has thus seen what came before.
    let mut other = mux.client();
    other.request("GET", "/healthz", &[], b"");
    assert_eq!(other.answer().status, 200);
    mux.signal(Signal::TERM);
    assert!(other.closed(), "the signal was heard");
    go.advance();
    assert_eq!(client.text(), "two");
    assert_eq!(waiting.answer().text(), "fine");
    assert_eq!(mux.wait_exit(), 0);
}

/// A request that it will not read any more must not cost the answer before it: were the socket closed with
/// that unread, the kernel would reset the connection.
#[test]
fn a_request_behind_the_running_one_costs_no_answer() {
    const SIZE: usize = 30_000; // what the smallest send buffer takes
    let go = Steps::default();
    let held = go.clone();
    let up = Upstream::start(move |_, conn| {
        held.wait(1);
        conn.respond(200, &[], &[b'x'; SIZE])
    });
    let mut mux = Mux::start(&up);
    let mut client = mux.client();
    sockopt::set_socket_recv_buffer_size(client.wire.socket(), 4096).expect("a small buffer");
    client.request("POST", MESSAGES, &[BEARER], b"{}");
    up.wait(1, |_| true);
    client.request("GET", "/healthz", &[], b"");
    mux.signal(Signal::TERM);
    mux.wait_log("stopping");
    go.advance();
    mux.wait_log(&format!("bytes={SIZE}"));
    assert_eq!(mux.wait_exit(), 0);
    let answer = client.answer();
    assert_eq!((answer.status, answer.body.len()), (200, SIZE));
    assert!(client.closed());
}

/// While one provider's refresh is waited for, no other begins: it could be cut off by an end that comes meanwhile.
#[test]
fn no_refresh_begins_after_the_signal() {
    let up = Upstream::plain();
    let (heard, seen) = (Steps::default(), Steps::default());
    let signalled = heard.clone();
    let refused = seen.clone();
    up.on_refresh(move |request, conn| {
        if request.provider() == "chatgpt" {
            refused.advance();
            return conn.json(503, &json!({})).map(|()| true);
        }
        signalled.wait(1);
        thread::sleep(Duration::from_secs(11)); // the other one's back-off is 5 s, and requests have 10
        Ok(false)
    });
    let old = up.login("claude", -10);
    let setup = Setup::bare(&up).save("claude", &old.claude());
    let setup = setup.save("chatgpt", &up.login("chatgpt", -10).flat());
    let mut mux = setup.start();
    up.wait(2, Request::is_refresh);
    seen.wait(1);
    mux.signal(Signal::TERM);
    mux.wait_log("stopping");
    heard.advance();
    assert_eq!(mux.wait_exit(), 0);
    assert_eq!(seen.count(), 1);
    assert_eq!(up.refreshes().len(), 2);
    let file = login::read(&mux.state(), "claude");
    assert_ne!(file["claudeAiOauth"]["refreshToken"], json!(old.refresh));
}

/// Not even for a login that has ended, and has won over the refresh that runs.
#[test]
fn no_second_refresh_begins_behind_the_one_that_is_waited_for() {
    let up = Upstream::plain();
    let go = up.hold_refreshes();
    let setup = Setup::new(&up).save("claude", &up.login("claude", -10).claude());
    let mut mux = setup.set("log_level", "debug").start();
    up.wait(1, Request::is_refresh);
    mux.signal(Signal::TERM);
    mux.wait_log("no refresh begins any more");
    let winner = up.login("claude", -10);
    login::save(&mux.state(), "claude", &winner.claude());
    go.advance();
    assert_eq!(mux.wait_exit(), 0);
    assert_eq!((up.refreshes().len(), up.reused()), (1, 0));
    assert!(up.honours(&winner.refresh));
}
