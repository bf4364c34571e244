//! Connections on which nothing happens cost little, and never keep a new client out: at the cap the one
//! that has been idle longest makes room.

mod common;
use common::*;
use std::net::TcpStream;

fn ask(client: &mut Client) -> Answer {
    client.request("POST", MESSAGES, &[BEARER], b"{}").answer()
}

#[test]
fn two_thousand_idle_connections_keep_nobody_out() {
    need_descriptors(4096);
    let up = Upstream::plain();
    let mux = Setup::new(&up).set("workers", 4).start();
    let before = mux.warm_footprint();
    let mut idle = Vec::new();
    for number in 0..2000 {
        idle.push(TcpStream::connect(mux.addr).expect("connect to ai-mux"));
        if number % 100 == 99 {
            assert_eq!(mux.message().status, 200, "beside {number} idle ones");
        }
    }
    let full = mux.footprint();
    assert!(full.descriptors < 1500, "{full:?}");
    assert!(full.descriptors > 1024, "as many may be idle: {full:?}");
    assert!(full.resident < before.resident + (16 << 10), "{full:?}");
    drop(idle);
    mux.assert_recovered(before, 4);
}

/// Whatever it waits for: heads, a worker, an event.
#[test]
fn what_waits_uses_no_processor() {
    let (up, go) = two_events();
    let mux = Setup::new(&up).set("workers", 1).start();
    let (mut idle, mut half, mut running, mut queued) =
        (mux.client(), mux.client(), mux.client(), mux.client());
    assert_eq!(ask(&mut idle).status, 200);
    half.send("GET / HT");
    running.request("POST", MESSAGES, &[BEARER, ("x-held", "1")], b"{}");
    running.head();
    assert_eq!(running.text(), "one");
    queued.request("POST", MESSAGES, &[BEARER], b"{}");
    // Beside this thread, which is busy for a second: were ai-mux, too, it would get about as much.
    let (used, mine) = (mux.processor_time(), own_processor_time());
    while own_processor_time() < mine + 100 {}
    let used = mux.processor_time() - used;
    assert!(used < 25, "{used} hundredths of what this thread has used");
    go.advance();
    assert_eq!(running.text(), "two");
    assert_eq!(queued.answer().text(), "fine");
}

/// The limit of 128 descriptors carries 4 workers and 84 connections.
#[test]
fn at_the_cap_the_longest_idle_one_makes_room() {
    let up = Upstream::plain();
    let setup = Setup::new(&up).set("workers", 4);
    let mux = setup.shell("ulimit -n 128; exec \"$@\"").start();
    let before = mux.warm_footprint();
    let mut clients = Vec::new();
    // Answered by the gate, so they go idle in this order: two workers may overtake each other.
    let health = |client: &mut Client| client.request("GET", "/healthz", &[], b"").answer();
    for _ in 0..84 {
        let mut client = mux.client();
        assert_eq!(health(&mut client).status, 200);
        clients.push(client);
    }
    // The first two are now the youngest, whoever answers.
    assert_eq!(ask(&mut clients[0]).status, 200);
    assert_eq!(health(&mut clients[1]).status, 200);
    let mut new = mux.client();
    assert_eq!(ask(&mut new).status, 200);
    assert!(clients[2].closed(), "the longest idle one");
    for number in (3..84).chain([0, 1]) {
        assert_eq!(ask(&mut clients[number]).status, 200, "{number}");
    }
    drop((clients, new));
    mux.assert_recovered(before, 4);
}

#[test]
fn a_busy_connection_never_makes_room() {
    let (up, go) = two_events();
    let setup = Setup::new(&up).set("workers", 4);
    let mux = setup.shell("ulimit -n 128; exec \"$@\"").start();
    let mut busy: Vec<_> = (0..3).map(|_| mux.client()).collect();
    for client in &mut busy {
        client.request("POST", MESSAGES, &[BEARER, ("x-held", "1")], b"{}");
        client.head();
        assert_eq!(client.text(), "one");
    }
    let before = mux.footprint();
    let mut idle: Vec<_> = (0..200).map(|_| mux.client()).collect();
    assert_eq!(ask(idle.last_mut().expect("the last")).status, 200);
    assert_eq!(mux.message().status, 200);
    go.advance();
    for client in &mut busy {
        assert_eq!(client.text(), "two");
        assert_eq!(client.piece().expect("a proper end"), None);
    }
    drop((idle, busy));
    mux.assert_recovered(before, 4);
}
