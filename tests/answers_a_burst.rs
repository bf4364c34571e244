//! Many clients at the same instant are all answered, and a pool that is full says so.

mod common;
use common::*;
use std::thread;
use std::time::{Duration, Instant};

#[test]
fn sixty_four_clients_connect_in_the_same_instant_and_keep_their_connections() {
    let up = Upstream::plain();
    let mux = Mux::start(&up);
    let (ready, answered) = (Steps::default(), Steps::default());
    let addr = mux.addr;
    let one = move |ready: Steps, answered: Steps| {
        ready.advance();
        ready.wait(64);
        let mut client = Client::new(addr);
        // Nobody leaves before everybody was answered: 64 connections are open throughout.
        for round in 1..=3 {
            let answer = client.request("POST", MESSAGES, &[BEARER], b"{}").answer();
            assert_eq!(answer.text(), "fine");
            answered.advance();
            answered.wait(round * 64);
        }
    };
    let start = |_| {
        let (ready, answered) = (ready.clone(), answered.clone());
        thread::spawn(move || one(ready, answered))
    };
    let threads: Vec<_> = (0..64).map(start).collect();
    for thread in threads {
        thread.join().expect("a client that was answered");
    }
    assert_eq!(up.requests().len(), 3 * 64);
    assert_eq!(mux.message().status, 200);
}

/// Connections are no workers: more of them than workers may be open and idle.
#[test]
fn open_connections_hold_no_worker() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("workers", 2).start();
    let mut clients: Vec<_> = (0..100).map(|_| mux.client()).collect();
    for _ in 0..2 {
        for client in &mut clients {
            assert_eq!(
                client
                    .request("POST", MESSAGES, &[BEARER], b"{}")
                    .answer()
                    .text(),
                "fine"
            );
        }
    }
}

#[test]
fn exactly_as_many_as_workers_are_served_at_once() {
    serves_at_once(3, |setup| setup.set("workers", 3));
    serves_at_once(64, |setup| setup); // the default
}

fn serves_at_once(count: usize, with: fn(Setup) -> Setup) {
    let go = Steps::default();
    let held = go.clone();
    let up = Upstream::start(move |_, conn| {
        conn.stream(&[])?;
        conn.chunk("one")?;
        held.wait(1);
        conn.finish()
    });
    let mux = with(Setup::new(&up).set("request_timeout", "3s")).start();
    let mut busy: Vec<_> = (0..count).map(|_| mux.client()).collect();
    for client in &mut busy {
        client.request("POST", MESSAGES, &[BEARER], b"{}").head();
        assert_eq!(client.text(), "one");
    }
    let full = mux.message();
    assert_eq!(full.status, 503);
    assert!(
        full.header("retry-after")
            .is_some_and(|s| s.parse().is_ok_and(|s: u64| (1..=60).contains(&s)))
    );
    assert_eq!(full.header("x-should-retry"), None);
    full.error();
    assert_eq!(up.requests().len(), count);
    go.advance();
    for client in &mut busy {
        assert_eq!(client.piece().expect("a proper end"), None);
    }
    assert_eq!(mux.message().status, 200);
}

#[test]
fn a_request_waits_for_a_worker() {
    let go = Steps::default();
    let held = go.clone();
    let up = Upstream::start(move |req, conn| {
        if req.head.get("x-first").is_some() {
            held.wait(1);
        }
        conn.respond(200, &[], b"fine")
    });
    let mux = Setup::new(&up).set("workers", 1).start();
    let mut first = mux.client();
    first.request("POST", MESSAGES, &[BEARER, ("x-first", "1")], b"{}");
    up.wait(1, |_| true);
    let mut second = mux.client();
    second.request("POST", MESSAGES, &[BEARER], b"{}");
    assert_eq!(
        mux.client()
            .request("GET", "/healthz", &[], b"")
            .answer()
            .status,
        200
    );
    assert_eq!(up.requests().len(), 1, "the second one waits");
    go.advance();
    assert_eq!(first.answer().text(), "fine");
    assert_eq!(second.answer().text(), "fine");
}

#[test]
fn who_waits_longest_is_served_next() {
    let (up, go) = two_events();
    let mux = Setup::new(&up).set("workers", 1).start();
    let mut busy = mux.client();
    busy.request("POST", MESSAGES, &[BEARER, ("x-held", "1")], b"{}");
    busy.head();
    let numbers = ["1", "2", "3", "4"];
    let mut waiting = numbers.map(|number| {
        let mut client = mux.client();
        client.request("POST", MESSAGES, &[BEARER, ("x-number", number)], b"{}");
        // Answered by the gate, which has thus seen what came before.
        let health = mux.client().request("GET", "/healthz", &[], b"").answer();
        assert_eq!(health.status, 200);
        client
    });
    go.advance();
    for client in &mut waiting {
        assert_eq!(client.answer().text(), "fine");
    }
    let requests = up.requests();
    let served = requests.iter().filter_map(|r| r.head.get("x-number"));
    assert_eq!(served.collect::<Vec<_>>(), numbers);
}

/// The most that are kept: a second burst of that size connects to upstream no more.
#[test]
fn connections_to_upstream_that_a_burst_needed_are_kept() {
    const KEPT: usize = 32;
    let go = Steps::default();
    let held = go.clone();
    let up = Upstream::start(move |req, conn| {
        let round = req.head.get("x-round").map(str::parse);
        held.wait(round.expect("a round").expect("a number"));
        conn.respond(200, &[], b"fine")
    });
    let mux = Mux::start(&up);
    let mut clients: Vec<_> = (0..KEPT).map(|_| mux.client()).collect();
    for round in 1..=2 {
        for client in &mut clients {
            let headers = [BEARER, ("x-round", &round.to_string())];
            client.request("POST", MESSAGES, &headers, b"{}");
        }
        up.wait(round * KEPT, |_| true);
        go.advance();
        for client in &mut clients {
            assert_eq!(client.answer().text(), "fine");
        }
        // Its line comes once a request is done with its connection.
        mux.wait_log_times("status=200", round * KEPT);
    }
    assert_eq!(up.connections(), KEPT);
}

/// A stack that has grown keeps its pages for as long as its thread lives.
#[test]
fn workers_that_a_burst_needed_end_after_it() {
    let together = Steps::default();
    let served = together.clone();
    let up = Upstream::start(move |_, conn| {
        served.advance();
        served.wait(16);
        conn.respond(200, &[], b"fine")
    });
    let mux = Mux::start(&up);
    let before = mux.footprint().threads;
    let mut clients: Vec<_> = (0..16).map(|_| mux.client()).collect();
    for client in &mut clients {
        client.request("POST", MESSAGES, &[BEARER], b"{}");
    }
    for client in &mut clients {
        assert_eq!(client.answer().text(), "fine");
    }
    let deadline = Instant::now() + 2 * PATIENCE;
    while mux.footprint().threads > before {
        assert!(Instant::now() < deadline, "workers are left");
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(mux.message().status, 200);
}
