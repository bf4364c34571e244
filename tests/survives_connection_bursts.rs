//! However many clients connect in the same instant, and however they leave, each is answered and the
//! next one too.

mod common;
use common::*;
use std::net::TcpStream;
use std::sync::Barrier;
use std::time::Duration;

/// Runs `client` that many times in the same instant.
fn burst(count: usize, client: impl Fn(usize) + Sync) {
    let start = Barrier::new(count);
    at_once(0..count, |number| {
        start.wait();
        client(number);
    });
}

#[test]
fn three_bursts_of_three_hundred_clients_are_all_answered() {
    need_descriptors(4096);
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("workers", 16).start();
    let before = mux.warm_footprint();
    for _ in 0..3 {
        burst(300, |_| assert_eq!(mux.message().text(), "fine"));
    }
    assert_eq!(up.requests().len(), 1 + 3 * 300);
    mux.assert_recovered(before, 16);
}

/// Closing a socket with an answer unread in it sends a reset.
#[test]
fn clients_that_reset_their_connections_leave_nothing_behind() {
    need_descriptors(4096);
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("workers", 4).start();
    let before = mux.warm_footprint();
    burst(300, |number| {
        let mut client = mux.client();
        match number % 3 {
            0 => {} // goes before it has said anything
            1 => drop(client.send("POST /claude/v1/messages HTTP/1.1\r\nhost:")),
            _ => {
                client.request("GET", "/healthz", &[], b"");
                let peeked = client.wire.socket().peek(&mut [0]);
                assert_eq!(peeked.expect("an answer"), 1);
            }
        }
    });
    mux.assert_recovered(before, 4);
}

#[test]
fn those_that_leave_while_they_wait_for_a_worker_leave_nothing_behind() {
    let go = Steps::default();
    let held = go.clone();
    let up = Upstream::start(move |req, conn| {
        if req.head.get("x-held").is_some() {
            held.wait(1);
        }
        conn.respond(200, &[], b"fine")
    });
    let mux = Setup::new(&up).set("workers", 2).start();
    let before = mux.warm_footprint();
    let mut busy: Vec<_> = (0..2).map(|_| mux.client()).collect();
    for client in &mut busy {
        client.request("POST", MESSAGES, &[BEARER, ("x-held", "1")], b"{}");
    }
    up.wait(2, |req| req.head.get("x-held").is_some());
    burst(100, |_| {
        mux.client().request("POST", MESSAGES, &[BEARER], b"{}");
    });
    go.advance();
    for client in &mut busy {
        assert_eq!(client.answer().text(), "fine");
    }
    drop(busy);
    mux.assert_recovered(before, 2);
}

#[test]
fn a_thousand_connections_one_after_the_other_leave_nothing_behind() {
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("workers", 4).start();
    let before = mux.warm_footprint();
    for _ in 0..1000 {
        TcpStream::connect(mux.addr).expect("connect to ai-mux");
    }
    mux.assert_recovered(before, 4);
}

/// While it does nothing, the kernel takes them in.
#[test]
fn a_burst_that_nobody_accepts_yet_is_queued() {
    // As many as the kernel lets anyone queue; where it does not tell, as many as it always has.
    let most = std::fs::read_to_string("/proc/sys/net/core/somaxconn").ok();
    let most = most.and_then(|text| text.trim().parse().ok());
    let count = most.unwrap_or(128).min(400);
    let mux = Mux::start(&Upstream::plain());
    mux.signal(Signal::STOP);
    let time = Duration::from_secs(5);
    let open = (0..count).map_while(|_| TcpStream::connect_timeout(&mux.addr, time).ok());
    let open: Vec<_> = open.collect();
    mux.signal(Signal::CONT);
    assert_eq!(open.len(), count);
}
